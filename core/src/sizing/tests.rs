use super::*;

const GIB: u64 = 1 << 30;
const MIB: u64 = 1 << 20;

fn wishes() -> Wishes {
    Wishes { ratio: 0.0025, lb: 65_536, ..Wishes::default() }
}

fn bytes(sizes: &Sizes) -> u64 {
    total(&[sizes.tcp, sizes.any, sizes.sockets, sizes.affinity])
}

#[test]
fn a_share_of_the_memory_between_the_documented_bounds() {
    let of = |total| sizes(Memory { total, limit: None }, &wishes()).0;
    let small = of(GIB);
    assert_eq!((small.tcp, small.any, small.sockets), (128 << 10, 64 << 10, 64 << 10));
    let large = of(256 * GIB);
    assert!(large.tcp > 2_000_000 && large.tcp / 2 == large.any && large.any == large.sockets, "{large:?}");
    let share = (256 * GIB) as f64 * 0.0025;
    let taken = bytes(&large) - u64::from(large.affinity) * BYTES[3];
    assert!((taken as f64 / share - 1.0).abs() < 0.01, "{taken} of {share}");
    assert_eq!(of(u64::MAX).tcp, BOUNDS.1);
    assert_eq!(of(0).tcp, 128 << 10, "where nothing is known");
    let (fixed, _) = sizes(Memory { total: GIB, limit: None }, &Wishes { ratio: 0.0, ..wishes() });
    assert_eq!([fixed.tcp, fixed.any, fixed.sockets], STATIC);
}

#[test]
fn r30_a_small_limit_on_a_large_machine_counts() {
    let memory = Memory { total: 256 * GIB, limit: Some(64 * MIB) };
    let (small, problems) = sizes(memory, &wishes());
    assert!(bytes(&small) <= 16 * MIB, "{} of {small:?}", bytes(&small));
    assert!(small.tcp > 20_000 && small.any > 10_000, "and it is of use: {small:?}");
    assert!(problems.is_empty(), "{problems:?}");
    // The more there is, the more is used, up to what an unlimited agent uses.
    let mut last = 0;
    for limit in [16, 64, 128, 512, 4096, 262_144] {
        let (sizes, _) = sizes(Memory { limit: Some(limit * MIB), ..memory }, &wishes());
        assert!(bytes(&sizes) <= (limit * MIB / 4).max(total(&[BOUNDS.0; 4])), "{limit}: {sizes:?}");
        assert!(sizes.tcp >= last, "{limit}: {sizes:?}");
        last = sizes.tcp;
    }
    // A limit above the machine's memory is none.
    let (sizes, _) = sizes(Memory { total: GIB, limit: Some(1 << 60) }, &wishes());
    assert_eq!(sizes.tcp, 128 << 10);
}

#[test]
fn what_was_asked_for_is_given_and_what_cannot_go_well_is_said() {
    let memory = Memory { total: 256 * GIB, limit: Some(64 * MIB) };
    let asked = Wishes { tcp: 1 << 20, ..wishes() };
    let (given, problems) = sizes(memory, &asked);
    assert_eq!(given.tcp, 1 << 20);
    assert_eq!(given.any, BOUNDS.0, "nothing is left for the rest");
    assert!(problems.len() == 1 && problems[0].contains("160 MiB") && problems[0].contains("64 MiB"), "{problems:?}");
    let (_, problems) = sizes(Memory { limit: None, ..memory }, &asked);
    assert!(problems.is_empty());
    let (given, _) = sizes(memory, &Wishes { any: 5, ..wishes() });
    assert_eq!(given.any, BOUNDS.0);
}

#[test]
fn each_map_of_services_follows_its_own_key_or_the_common_one() {
    let memory = Memory { total: 8 * GIB, limit: None };
    let (common, _) = sizes(memory, &Wishes { lb: 1000, ..wishes() });
    let all = [common.frontends, common.backends, common.maglev, common.ranges];
    assert_eq!((all, common.slots, common.affinity), ([1000; 4], 4000, 1024));
    let own = Wishes { lb: 1000, services: 2000, backends: 3000, maglev: 50, ranges: 60, affinity: 7000, ..wishes() };
    let (own, _) = sizes(memory, &own);
    assert_eq!((own.frontends, own.backends, own.maglev, own.ranges), (2000, 3000, 50, 60));
    assert_eq!((own.slots, own.affinity), (12_000, 7000));
}

#[test]
fn room_for_translated_connections_is_room_for_connections() {
    let memory = Memory { total: 8 * GIB, limit: None };
    let (plain, _) = sizes(memory, &wishes());
    let (same, _) = sizes(memory, &Wishes { nat: 1000, ..wishes() });
    assert_eq!(plain, same);
    let (more, _) = sizes(memory, &Wishes { nat: 600 << 10, ..wishes() });
    assert_eq!(more.tcp + more.any, 600 << 10);
    assert_eq!(more.tcp, more.any * 2);
}
