use std::collections::HashMap;

use kinesin_abi::{MAGLEV_TABLE_SIZE, SLOT_EMPTY, proto};

use super::{DEFAULT_SEED, Entry, HashSeed, backend_key, murmur3_x64_128, table};

fn entries(n: u32) -> Vec<Entry> {
    (0..n)
        .map(|i| Entry { key: backend_key([10, 42, 0, i as u8].into(), 8080, proto::TCP), id: 100 + i, weight: 1 })
        .collect()
}

#[test]
fn murmur_agrees_with_published_vectors() {
    for (text, h1, h2) in [
        ("", 0, 0),
        ("hello", 0xcbd8_a7b3_41bd_9b02, 0x5b1e_906a_48ae_1d19),
        ("hello, world", 0x342f_ac62_3a5e_bc8e, 0x4cdc_bc07_9642_414d),
        ("19 Jan 2038 at 3:14:07 AM", 0xb89e_5988_b737_affc, 0x664f_c295_0231_b2cb),
        ("The quick brown fox jumps over the lazy dog.", 0xcd99_481f_9ee9_02c9, 0x695d_a1a3_8987_b6e7),
    ] {
        assert_eq!(murmur3_x64_128(text.as_bytes(), 0), (h1, h2), "{text:?}");
    }
}

#[test]
fn the_default_seed_is_three_big_endian_words() {
    // `echo JLfvgnHc2kaSUFaI | base64 -d | xxd`
    let seed = HashSeed { murmur: 0x24b7_ef82, jhash: 0x71dc_da46, jhash6: 0x9250_5688 };
    assert_eq!(HashSeed::parse(DEFAULT_SEED), Ok(seed));
    assert_eq!(HashSeed::default(), seed);
    assert_eq!(HashSeed::parse("AAAAAAAAAAAAAAA+").expect("valid").jhash6, 62);
}

#[test]
fn a_bad_seed_says_what_to_write_instead() {
    for (text, part) in [
        ("", "0 characters"),
        ("JLfvgnHc2kaSUFa", "15 characters"),
        ("JLfvgnHc2kaSUFa=", "'='"),
        ("ÄLfvgnHc2kaSUFaI", "'Ä'"),
    ] {
        let error = HashSeed::parse(text).expect_err("bad").to_string();
        assert!(error.contains(part) && error.contains("base64 -w0"), "{error}");
    }
}

#[test]
fn backend_keys_name_address_port_and_protocol() {
    assert_eq!(backend_key([10, 0, 0, 1].into(), 53, proto::UDP), "[10.0.0.1:53/UDP,State:active]");
    assert_eq!(backend_key("fd00::1".parse().expect("address"), 80, proto::SCTP), "[[fd00::1]:80/SCTP,State:active]");
}

#[test]
fn a_table_depends_on_keys_only_not_on_order_or_ids() {
    let seed = HashSeed::default();
    let forward = entries(7);
    let mut renumbered: Vec<Entry> = entries(7).into_iter().map(|e| Entry { id: e.id * 10, ..e }).collect();
    renumbered.reverse();
    let a = table(&forward, 1021, &seed);
    let b: Vec<u32> = table(&renumbered, 1021, &seed).into_iter().map(|id| id / 10).collect();
    assert_eq!(a, b);
}

#[test]
fn a_table_never_changes_between_versions() {
    // Computed independently (a direct transcription of the paper's pseudo code in another language).
    let seed = HashSeed::default();
    let got = table(&entries(3), 13, &seed);
    assert_eq!(got, GOLDEN_13);
    let digest =
        table(&entries(3), 16_381, &seed).iter().fold(0u64, |d, id| d.wrapping_mul(31).wrapping_add(u64::from(*id)));
    assert_eq!(digest, GOLDEN_16381);
}

#[test]
fn every_backend_has_an_almost_equal_share() {
    let table = table(&entries(5), MAGLEV_TABLE_SIZE, &HashSeed::default());
    let mut shares: HashMap<u32, u32> = HashMap::new();
    table.iter().for_each(|id| *shares.entry(*id).or_default() += 1);
    assert_eq!(shares.len(), 5);
    assert!(shares.values().all(|n| n.abs_diff(MAGLEV_TABLE_SIZE / 5) <= 1), "{shares:?}");
}

#[test]
fn weights_give_shares_in_proportion() {
    let mut entries = entries(3);
    entries[0].weight = 4;
    entries[1].weight = 2;
    entries[2].weight = 0;
    let table = table(&entries, 6_007, &HashSeed::default());
    let share = |id| table.iter().filter(|entry| **entry == id).count();
    assert!(share(100).abs_diff(4_005) <= 2, "{}", share(100));
    assert!(share(101).abs_diff(2_002) <= 2, "{}", share(101));
    assert_eq!(share(102), 0);
}

#[test]
fn losing_one_backend_disturbs_few_of_the_others_connections() {
    let seed = HashSeed::default();
    let before = table(&entries(10), MAGLEV_TABLE_SIZE, &seed);
    let after = table(&entries(9), MAGLEV_TABLE_SIZE, &seed);
    let moved = before.iter().zip(&after).filter(|(a, b)| **a != 109 && a != b).count();
    assert!(moved < MAGLEV_TABLE_SIZE as usize / 20, "{moved}");
}

#[test]
fn odd_sizes_and_inputs_end() {
    let seed = HashSeed::default();
    assert!(table(&entries(3), 0, &seed).is_empty());
    assert_eq!(table(&[], 5, &seed), [SLOT_EMPTY; 5]);
    for m in [1, 2, 4, 6, 12, 100] {
        assert!(table(&entries(9), m, &seed).iter().all(|id| *id != SLOT_EMPTY), "{m}");
    }
    let twice = [entries(1), entries(1)].concat();
    assert_eq!(table(&twice, 3, &seed), [100; 3]);
}

const GOLDEN_13: [u32; 13] = [100, 102, 100, 100, 102, 101, 102, 101, 102, 101, 101, 100, 100];
const GOLDEN_16381: u64 = 0x4d8a_457b_92e5_92ee;
