use super::*;

#[test]
fn murmur3_matches_published_vectors() {
    for (text, seed, h1, h2) in [
        ("", 0, 0, 0),
        ("", 1, 0x4610abe56eff5cb5, 0x51622daa78f83583),
        ("hello", 0, 0xcbd8a7b341bd9b02, 0x5b1e906a48ae1d19),
        ("hello, world", 0, 0x342fac623a5ebc8e, 0x4cdcbc079642414d),
        ("19 Jan 2038 at 3:14:07 AM", 0, 0xb89e5988b737affc, 0x664fc2950231b2cb),
        ("The quick brown fox jumps over the lazy dog.", 0, 0xcd99481f9ee902c9, 0x695da1a38987b6e7),
    ] {
        assert_eq!(murmur3::hash(text.as_bytes(), seed), (h1, h2), "{text:?} seed {seed}");
    }
}

#[test]
fn the_seed_is_three_big_endian_words() {
    let seed = HashSeed::from_bytes([0, 0, 0, 1, 0, 0, 0, 2, 0xff, 0, 0, 3]);
    assert_eq!(seed, HashSeed { murmur: 1, jhash_v4: 2, jhash_v6: 0xff00_0003 });
    let default = HashSeed { murmur: 0x24b7_ef82, jhash_v4: 0x71dc_da46, jhash_v6: 0x9250_5688 };
    assert_eq!(HashSeed::default(), default);
}

#[test]
fn a_backend_is_known_by_its_address_port_and_protocol() {
    let key = |addr: &str, protocol| backend_key(addr.parse().unwrap(), 80, protocol);
    assert_eq!(key("10.0.0.1", proto::TCP), "[10.0.0.1:80/TCP,State:active]");
    assert_eq!(key("fd00::1", proto::UDP), "[[fd00::1]:80/UDP,State:active]");
    assert_eq!(key("fd00::1", proto::SCTP), "[[fd00::1]:80/SCTP,State:active]");
}

fn backends(n: u32) -> Vec<(String, BackendId, u32)> {
    (1..=n).map(|i| (backend_key([10, 0, 0, i as u8].into(), 80, proto::TCP), i, 1)).collect()
}

fn share(table: &[BackendId], id: BackendId) -> usize {
    table.iter().filter(|x| **x == id).count()
}

#[test]
fn every_place_is_taken_and_equal_weights_get_equal_shares() {
    let table = table(&backends(7), 1021, &HashSeed::default());
    assert_eq!(table.len(), 1021);
    for id in 1..=7 {
        assert!((145..=146).contains(&share(&table, id)), "{id}: {}", share(&table, id));
    }
}

#[test]
fn the_table_is_what_a_plain_reading_of_the_algorithm_gives() {
    // The paper's algorithm with whole permutations, written down once more in the slow way.
    let seed = HashSeed::default();
    let m = 251_u64;
    let backends = backends(5);
    let mut keys: Vec<_> = backends.iter().map(|(key, id, _)| (key.clone(), *id)).collect();
    keys.sort();
    let permutations: Vec<Vec<u64>> = keys
        .iter()
        .map(|(key, _)| {
            let (h1, h2) = murmur3::hash(key.as_bytes(), seed.murmur);
            (0..m).map(|j| (h1 % m + j * (h2 % (m - 1) + 1)) % m).collect()
        })
        .collect();
    let mut want = vec![0; m as usize];
    'fill: loop {
        for (permutation, (_, id)) in permutations.iter().zip(&keys) {
            let Some(place) = permutation.iter().find(|p| want[**p as usize] == 0) else { break 'fill };
            want[*place as usize] = *id;
        }
    }
    assert_eq!(table(&backends, m as u32, &seed), want);
}

#[test]
fn order_and_ids_of_the_backends_do_not_matter() {
    let seed = HashSeed::default();
    let a = backends(9);
    let mut b: Vec<_> = a.iter().map(|(key, id, w)| (key.clone(), id + 100, *w)).collect();
    b.reverse();
    let renumbered: Vec<_> = table(&a, 1021, &seed).iter().map(|id| id + 100).collect();
    assert_eq!(table(&b, 1021, &seed), renumbered);
}

#[test]
fn losing_a_backend_moves_little_else() {
    let seed = HashSeed::default();
    let before = table(&backends(10), 16381, &seed);
    let after = table(&backends(9), 16381, &seed);
    let moved = before.iter().zip(&after).filter(|(b, a)| **b != 10 && a != b).count();
    assert!(moved < 16381 / 20, "{moved} of 16381 places moved between backends that stayed");
}

#[test]
fn weights_are_shares_of_turns() {
    let seed = HashSeed::default();
    let mut some = backends(3);
    some[0].2 = 100;
    some[1].2 = 50;
    some[2].2 = 0;
    let table = table(&some, 1021, &seed);
    assert_eq!((share(&table, 1), share(&table, 2), share(&table, 3)), (681, 340, 0));
}

#[test]
fn odd_sizes_and_no_backends_are_fine() {
    let seed = HashSeed::default();
    assert!(table(&[], 251, &seed).is_empty());
    assert!(table(&backends(3), 0, &seed).is_empty());
    assert_eq!(table(&backends(1), 1, &seed), vec![1]);
    for m in [2, 6, 100, 128] {
        assert!(table(&backends(3), m, &seed).iter().all(|id| *id != 0), "{m}");
    }
    let mut none = backends(2);
    none.iter_mut().for_each(|b| b.2 = 0);
    assert!(table(&none, 251, &seed).iter().all(|id| *id != 0));
}
