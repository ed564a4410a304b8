use kinesin_abi::{BackendState, FrontendKey, SetRef};

use super::{Maps, Spec, directly, key, planner, update, ups};
use crate::plan::Op;

fn two_services() -> (Spec, Spec) {
    let web = Spec { ip: 1, ports: vec![80], pods: ups([1, 2]), ..Spec::default() };
    let db = Spec { ip: 2, ports: vec![91], pods: ups([3, 4]), ..Spec::default() };
    (web, db)
}

fn key_at(maps: &Maps, nth: usize) -> FrontendKey {
    *maps.frontends.iter().filter(|(_, value)| value.service != 0).nth(nth).expect("there are so many").0
}

#[test]
fn r23_a_restart_loses_no_backend_while_slices_still_arrive() {
    let (web, db) = two_services();
    let mut maps = directly([("web", &web), ("db", &db)]);
    let before = maps.clone();
    let mut planner = planner();
    assert_eq!(planner.adopt(maps.actual()), []);
    // Only one of the two has been heard of.
    update(&mut planner, &mut maps, "web", &web);
    assert_eq!(maps, before);
    assert_eq!(planner.stats().unclaimed, 2, "the other's port and wildcard");
    update(&mut planner, &mut maps, "db", &db);
    assert_eq!(planner.prune(), []);
    assert_eq!(maps, before);
}

#[test]
fn what_nobody_claims_is_pruned_but_not_before() {
    let (web, db) = two_services();
    let mut maps = directly([("web", &web), ("db", &db)]);
    let mut planner = planner();
    planner.adopt(maps.actual());
    update(&mut planner, &mut maps, "web", &web);
    maps.apply_safely(&planner.prune());
    assert_eq!(maps.meaning(), directly([("web", &web)]).meaning());
    let removed: Vec<_> = planner.take_removed().iter().map(|backend| backend.addr).collect();
    assert_eq!(removed, [3u8, 4].map(|ip| std::net::IpAddr::from([10, 42, 0, ip]).into()));
}

#[test]
fn r24_services_that_share_an_id_or_a_set_are_separated() {
    let (web, db) = two_services();
    let mut maps = directly([("web", &web), ("db", &db)]);
    let (first, second) = (key_at(&maps, 0), key_at(&maps, 1));
    let stolen = maps.frontends[&first];
    maps.frontends.insert(second, stolen);

    let mut planner = planner();
    maps.apply_safely(&planner.adopt(maps.actual()));
    update(&mut planner, &mut maps, "db", &db);
    update(&mut planner, &mut maps, "web", &web);
    maps.apply_safely(&planner.prune());
    assert_eq!(maps.meaning(), directly([("web", &web), ("db", &db)]).meaning());
    assert_ne!(maps.frontends[&first].service, maps.frontends[&second].service);
    assert_ne!(maps.frontends[&first].internal.base, maps.frontends[&second].internal.base);
}

#[test]
fn r24_overlapping_sets_are_copied_apart_and_keep_serving() {
    let (web, db) = two_services();
    let mut maps = directly([("web", &web), ("db", &db)]);
    let second = key_at(&maps, 1);
    let set = maps.frontends[&key_at(&maps, 0)].internal;
    // The upper half of the first service's set.
    let inner = SetRef { base: set.base + 1, count: 1 };
    let value = maps.frontends.get_mut(&second).expect("there");
    (value.internal, value.external) = (inner, inner);
    let meant = maps.set(inner);

    let mut planner = planner();
    maps.apply_safely(&planner.adopt(maps.actual()));
    let (a, b) = (maps.frontends[&key_at(&maps, 0)].internal, maps.frontends[&second].internal);
    assert!(a.base + a.count <= b.base || b.base + b.count <= a.base, "{a:?} {b:?}");
    assert_eq!(maps.set(b), meant);
}

#[test]
fn r24_holes_free_backends_and_wild_references_are_repaired() {
    let (web, _) = two_services();
    let healthy = directly([("web", &web)]);
    let frontend = key_at(&healthy, 0);
    let set = healthy.frontends[&frontend].internal;
    type Damage = (&'static str, fn(&mut Maps, SetRef), u32);
    let table: [Damage; 5] = [
        (
            "an empty slot",
            |maps, set| {
                maps.slots.remove(&set.base);
            },
            1,
        ),
        (
            "a free backend",
            |maps, set| {
                maps.backends.remove(&maps.slots[&set.base]);
            },
            1,
        ),
        (
            "an unreadable backend",
            |maps, set| maps.backends.get_mut(&maps.slots[&set.base]).expect("there").state = 200,
            1,
        ),
        ("no backends", |maps, _| maps.backends.clear(), 0),
        ("no slots", |maps, _| maps.slots.clear(), 0),
    ];
    for (what, damage, left) in table {
        let mut maps = healthy.clone();
        damage(&mut maps, set);
        let mut planner = planner();
        maps.apply_all(&planner.adopt(maps.actual()));
        assert_eq!(maps.check(), Ok(()), "{what}");
        assert_eq!(maps.frontends[&frontend].internal.count, left, "{what}");
        assert!(maps.backends.values().all(|backend| backend.state <= BackendState::Maintenance as u8), "{what}");
        update(&mut planner, &mut maps, "web", &web);
        maps.apply_safely(&planner.prune());
        assert_eq!(maps.meaning(), healthy.meaning(), "{what}");
    }
    for wild in
        [SetRef { base: u32::MAX, count: u32::MAX }, SetRef { base: 0, count: 5 }, SetRef { base: 1023, count: 9 }]
    {
        let mut maps = healthy.clone();
        let value = maps.frontends.get_mut(&frontend).expect("there");
        (value.internal, value.external) = (wild, wild);
        let mut planner = planner();
        maps.apply_all(&planner.adopt(maps.actual()));
        assert_eq!(maps.check(), Ok(()), "{wild:?}");
        update(&mut planner, &mut maps, "web", &web);
        assert_eq!(maps.meaning(), healthy.meaning(), "{wild:?}");
    }
}

#[test]
fn a_table_that_cannot_be_right_is_written_anew_and_a_right_one_is_not() {
    let web = Spec { ip: 1, vip: Some(1), ports: vec![80], pods: ups([1, 2, 3]), maglev: true, ..Spec::default() };
    let healthy = directly([("web", &web)]);
    let base = *healthy.maglev.keys().next().expect("a table");
    assert_eq!(planner().adopt(healthy.actual()), []);
    for table in [vec![], vec![1; 12], vec![0; 13], vec![77; 13]] {
        let mut maps = healthy.clone();
        maps.maglev.insert(base, table.into());
        let ops = planner().adopt(maps.actual());
        assert_eq!(ops, [Op::PutMaglev(base, healthy.maglev[&base].clone())]);
    }
    // One that could be right is checked once its service is known.
    let mut maps = healthy.clone();
    maps.maglev.insert(base, vec![1; 13].into());
    let mut planner = planner();
    assert_eq!(planner.adopt(maps.actual()), []);
    update(&mut planner, &mut maps, "web", &web);
    assert_eq!(maps, healthy);
    // And one of no set goes.
    maps.maglev.insert(base + 1, vec![1; 13].into());
    assert_eq!(self::planner().adopt(maps.actual()), [Op::DeleteMaglev(base + 1)]);
}

#[test]
fn ids_of_unclaimed_services_are_not_given_to_new_ones() {
    let (web, db) = two_services();
    let mut maps = directly([("web", &web), ("db", &db)]);
    let mut planner = planner();
    planner.adopt(maps.actual());
    let new = Spec { ip: 3, ports: vec![100], pods: ups([1]), ..Spec::default() };
    update(&mut planner, &mut maps, "new", &new);
    update(&mut planner, &mut maps, "db", &db);
    update(&mut planner, &mut maps, "web", &web);
    let mut ids: Vec<u32> = maps.frontends.values().map(|value| value.service).filter(|id| *id != 0).collect();
    ids.sort_unstable();
    assert_eq!(ids, [1, 2, 3]);
    assert_eq!(planner.service_of(&key_at(&maps, 2)), Some(&key("new")));
}

#[test]
fn ids_that_wrap_around_pass_over_those_in_use() {
    let (web, db) = two_services();
    let mut maps = directly([("web", &web), ("db", &db)]);
    let (first, second) = (key_at(&maps, 0), key_at(&maps, 1));
    maps.frontends.get_mut(&first).expect("there").service = u32::MAX;
    maps.frontends.get_mut(&second).expect("there").service = 1;
    let mut planner = planner();
    assert_eq!(planner.adopt(maps.actual()), []);
    let new = Spec { ip: 3, ports: vec![100], pods: ups([1]), ..Spec::default() };
    update(&mut planner, &mut maps, "new", &new);
    assert_eq!(maps.frontends[&key_at(&maps, 2)].service, 2);
}
