use std::net::IpAddr;

use kinesin_abi::{Backend, BackendState, Be16, FrontendKey, SLOT_EMPTY, SetRef, frontend_flags, proto};

use super::{Maps, Pod, Spec, down, key, limits, planner, terminating, up, update, ups};
use crate::plan::{Limits, Op, PlanError, Planner, keep_api_backends};

fn frontend(address: [u8; 4], port: u16) -> FrontendKey {
    let proto = if port == 0 { proto::ANY } else { proto::TCP };
    FrontendKey { addr: IpAddr::from(address).into(), port: Be16::new(port), proto, pad: 0 }
}

fn kinds(ops: &[Op]) -> Vec<&'static str> {
    ops.iter()
        .map(|op| match op {
            Op::Backend(_, value) if *value == Backend::default() => "free",
            Op::Backend(..) => "backend",
            Op::Slot(_, SLOT_EMPTY) => "empty",
            Op::Slot(..) => "slot",
            Op::PutMaglev(..) => "table",
            Op::PutFrontend(..) => "frontend",
            Op::DeleteFrontend(_) => "delete",
            Op::DeleteMaglev(_) => "delete table",
            Op::PutSourceRange(_) => "range",
            Op::DeleteSourceRange(_) => "delete range",
        })
        .collect()
}

fn web(pods: Vec<Pod>) -> Spec {
    Spec { ip: 1, ports: vec![80], pods, ..Spec::default() }
}

#[test]
fn a_change_of_one_endpoint_costs_a_few_ops() {
    let (mut planner, mut maps) = (planner(), Maps::default());
    // On another node, but for the last one.
    update(&mut planner, &mut maps, "web", &web(ups([1, 3, 5, 7, 9])));
    let table: [(&str, Vec<Pod>, &[&str]); 7] = [
        ("grows in place", ups([1, 3, 5, 7, 9, 11]), &["backend", "slot", "frontend"]),
        ("replaces one", ups([1, 3, 13, 7, 9, 11]), &["backend", "slot", "free"]),
        ("loses one in the middle", ups([1, 13, 7, 9, 11]), &["slot", "frontend", "empty", "free"]),
        ("stops one", [ups([1, 13, 7, 9]), vec![terminating(11)]].concat(), &["backend", "slot", "frontend", "empty"]),
        ("starts it again", ups([1, 13, 7, 9, 11]), &["backend", "slot", "frontend"]),
        ("gets one on this node", ups([1, 13, 7, 9, 11, 2]), &["backend", "slot", "frontend", "slot"]),
        ("loses it", ups([1, 13, 7, 9, 11]), &["slot", "frontend", "empty", "free"]),
    ];
    for (what, pods, expected) in table {
        let ops = update(&mut planner, &mut maps, "web", &web(pods));
        assert_eq!(kinds(&ops), expected, "{what}");
    }
}

#[test]
fn one_endpoint_among_five_thousand_services_touches_nothing_else() {
    let mut planner = Planner::new(Limits { frontends: 65_536, slots: 65_536, backends: 65_536, ..limits() });
    let other = |n: u32| {
        let mut compiled = web(ups(1..=3)).compile();
        for frontend in &mut compiled.frontends {
            frontend.addr = std::net::Ipv4Addr::from(0x0a61_0000 + n).into();
        }
        compiled
    };
    for n in 0..5_000 {
        planner.update(&key(&format!("other-{n}")), &other(n)).expect("there is room");
    }
    let busy = |pods| Spec { vip: Some(1), node_port: true, ..web(pods) }.compile();
    planner.update(&key("busy"), &busy(ups(1..=50))).expect("there is room");
    // Four frontends: ClusterIP, load balancer, NodePort, its surrogate. Who comes on this node takes the place of one
    // elsewhere, which goes to the end first.
    let ops = planner.update(&key("busy"), &busy(ups(2..=50))).expect("there is room");
    assert_eq!(kinds(&ops), ["slot", "frontend", "frontend", "frontend", "frontend", "empty"]);
    let ops = planner.update(&key("busy"), &busy([ups(2..=50), ups([100])].concat())).expect("there is room");
    assert_eq!(kinds(&ops), ["backend", "slot", "frontend", "frontend", "frontend", "frontend", "slot"]);
    assert_eq!(planner.update(&key("busy"), &busy([ups(2..=50), ups([100])].concat())), Ok(vec![]));
}

#[test]
fn a_set_that_outgrows_its_block_moves_before_the_old_slots_are_emptied() {
    let (mut planner, mut maps) = (planner(), Maps::default());
    update(&mut planner, &mut maps, "web", &web(ups([1])));
    // A neighbour takes the slots behind it.
    update(&mut planner, &mut maps, "next", &Spec { ip: 2, ..web(ups(1..=8)) });
    let before = maps.frontends[&frontend([10, 96, 0, 1], 80)].internal;
    update(&mut planner, &mut maps, "web", &web(ups(1..=4)));
    let after = maps.frontends[&frontend([10, 96, 0, 1], 80)].internal;
    assert_ne!(before.base, after.base);
    assert_eq!(after.count, 4);
    assert!(!maps.slots.contains_key(&before.base));
}

#[test]
fn a_service_without_usable_backends_keeps_its_frontends_and_points_at_nothing() {
    let (mut planner, mut maps) = (planner(), Maps::default());
    update(&mut planner, &mut maps, "web", &web(vec![down(1), down(2)]));
    let value = maps.frontends[&frontend([10, 96, 0, 1], 80)];
    assert_eq!((value.internal, value.external), (SetRef::default(), SetRef::default()));
    assert!(maps.slots.is_empty());
    assert_eq!(maps.backends.len(), 2, "kept for established connections");
}

#[test]
fn a_backend_of_two_services_has_one_id_and_its_best_state() {
    let (mut planner, mut maps) = (planner(), Maps::default());
    let b = |pods| Spec { ip: 2, ports: vec![90], pods, ..Spec::default() };
    update(&mut planner, &mut maps, "a", &web(vec![terminating(2)]));
    update(&mut planner, &mut maps, "b", &b(vec![up(2)]));
    let states: Vec<u8> = maps.backends.values().map(|backend| backend.state).collect();
    assert_eq!(states, [BackendState::Active as u8]);
    update(&mut planner, &mut maps, "b", &b(vec![down(2)]));
    let states: Vec<u8> = maps.backends.values().map(|backend| backend.state).collect();
    assert_eq!(states, [BackendState::Terminating as u8]);
    maps.apply_safely(&planner.remove(&key("a")));
    let states: Vec<u8> = maps.backends.values().map(|backend| backend.state).collect();
    assert_eq!(states, [BackendState::Maintenance as u8]);
    assert_eq!(planner.take_removed(), []);
    maps.apply_safely(&planner.remove(&key("b")));
    assert_eq!(planner.take_removed().len(), 1);
    assert_eq!(planner.take_removed(), []);
}

#[test]
fn a_freed_id_is_used_again_only_after_all_others() {
    let mut planner = Planner::new(Limits { backends: 5, ..limits() });
    let mut ids = Vec::new();
    for ip in 1..=6 {
        for op in planner.update(&key("web"), &web(ups([ip])).compile()).expect("there is room") {
            if let Op::Backend(id, value) = op
                && value != Backend::default()
            {
                ids.push(id);
            }
        }
    }
    assert_eq!(ids, [1, 2, 3, 4, 1, 2]);
}

#[test]
fn the_first_service_keeps_an_address_and_the_next_inherits_it() {
    let (mut planner, mut maps) = (planner(), Maps::default());
    let vip = frontend([192, 0, 2, 9], 80);
    let spec = |ip, pod| Spec { ip, vip: Some(9), ..web(ups([pod])) };
    for (name, ip) in [("first", 1), ("second", 2), ("third", 3)] {
        update(&mut planner, &mut maps, name, &spec(ip, ip));
    }
    let backend = |maps: &Maps| maps.backends[&maps.slots[&maps.frontends[&vip].external.base]].addr;
    assert_eq!(planner.service_of(&vip), Some(&key("first")));
    assert_eq!(planner.stats().conflicts, 2);
    let problems = planner.problems(&key("second"));
    assert_eq!(
        problems,
        ["address 192.0.2.9:80/TCP is in use by service default/first; give one of the two another address or port"]
    );
    // The second one's own ClusterIP is not affected.
    assert_eq!(planner.service_of(&frontend([10, 96, 0, 2], 80)), Some(&key("second")));

    maps.apply_safely(&planner.remove(&key("first")));
    assert_eq!(planner.service_of(&vip), Some(&key("second")));
    assert_eq!(backend(&maps), IpAddr::from([10, 42, 0, 2]).into());
    assert!(planner.problems(&key("second")).is_empty());
    assert!(planner.problems(&key("third"))[0].contains("default/second"));

    // Giving the address up is enough; and whoever no longer waits gets nothing.
    update(&mut planner, &mut maps, "third", &Spec { vip: None, ..spec(3, 3) });
    update(&mut planner, &mut maps, "second", &Spec { vip: None, ..spec(2, 2) });
    assert_eq!(planner.service_of(&vip), None);
    assert!(!maps.frontends.contains_key(&vip));
}

#[test]
fn wildcards_are_shared_and_go_with_their_last_service() {
    let (mut planner, mut maps) = (planner(), Maps::default());
    let wildcard = frontend([192, 0, 2, 9], 0);
    update(&mut planner, &mut maps, "a", &Spec { vip: Some(9), ..web(vec![]) });
    update(&mut planner, &mut maps, "b", &Spec { ip: 2, vip: Some(9), ports: vec![81], ..web(vec![]) });
    assert_eq!(
        maps.frontends[&wildcard].flags,
        frontend_flags::WILDCARD | frontend_flags::ROUTABLE,
        "an address for outside"
    );
    assert_eq!(maps.frontends[&wildcard].service, 0);
    assert!(planner.problems(&key("b")).is_empty());
    maps.apply_safely(&planner.remove(&key("a")));
    assert!(maps.frontends.contains_key(&wildcard));
    maps.apply_safely(&planner.remove(&key("b")));
    assert_eq!(maps, Maps::default());
}

#[test]
fn tables_exist_for_routable_maglev_frontends_only_and_follow_their_set() {
    let (mut planner, mut maps) = (planner(), Maps::default());
    let spec = |pods, maglev| Spec { vip: Some(9), maglev, ..web(pods) };
    update(&mut planner, &mut maps, "web", &spec(ups([1, 2]), true));
    let base = maps.frontends[&frontend([192, 0, 2, 9], 80)].external.base;
    assert_eq!(maps.maglev.keys().copied().collect::<Vec<_>>(), [base]);
    let before = maps.maglev[&base].clone();
    let ops = update(&mut planner, &mut maps, "web", &spec(ups([1, 2, 3]), true));
    assert!(kinds(&ops).contains(&"table"));
    let moved = maps.frontends[&frontend([192, 0, 2, 9], 80)].external.base;
    assert_ne!(maps.maglev[&moved], before);
    update(&mut planner, &mut maps, "web", &spec(vec![], true));
    assert!(maps.maglev.is_empty());
    update(&mut planner, &mut maps, "web", &spec(ups([1]), true));
    update(&mut planner, &mut maps, "web", &spec(ups([1]), false));
    assert!(maps.maglev.is_empty());
    let cluster_only = Spec { maglev: true, ..web(ups([1])) };
    update(&mut planner, &mut maps, "web", &cluster_only);
    assert!(maps.maglev.is_empty());
}

#[test]
fn r25_the_api_servers_backends_are_never_all_taken_away() {
    let api = key("kubernetes");
    assert_eq!(keep_api_backends(&api, vec![], vec![7]), (vec![7], true));
    assert_eq!(keep_api_backends(&api, vec![8], vec![7]), (vec![8], false));
    assert_eq!(keep_api_backends(&api, vec![], vec![]), (vec![], false));
    assert_eq!(keep_api_backends(&key("web"), vec![], vec![7]), (vec![], false));

    let (mut planner, mut maps) = (planner(), Maps::default());
    update(&mut planner, &mut maps, "kubernetes", &web(ups([1, 2])));
    let programmed = maps.clone();
    assert_eq!(update(&mut planner, &mut maps, "kubernetes", &web(vec![])), []);
    assert!(planner.problems(&api)[0].contains("last known ones are kept"));
    // A restart in that moment changes nothing about it.
    let mut planner = self::planner();
    assert_eq!(planner.adopt(maps.actual()), []);
    update(&mut planner, &mut maps, "kubernetes", &web(vec![]));
    maps.apply_safely(&planner.prune());
    assert_eq!(maps, programmed);
    // New ones replace them.
    update(&mut planner, &mut maps, "kubernetes", &web(ups([3])));
    assert!(planner.problems(&api).is_empty());
    assert_eq!(maps.backends.len(), 1);
    // Not ready is not usable either.
    update(&mut planner, &mut maps, "kubernetes", &web(vec![down(3)]));
    assert_eq!(maps.backends.values().map(|backend| backend.state).collect::<Vec<_>>(), [BackendState::Active as u8]);
}

#[test]
fn r27_each_map_says_that_it_is_full_and_which_key_raises_it() {
    let table = [
        (Limits { frontends: 3, ..limits() }, "frontends", "bpf-lb-map-max"),
        (Limits { slots: 3, ..limits() }, "slots", "bpf-lb-map-max"),
        (Limits { backends: 3, ..limits() }, "backends", "bpf-lb-map-max"),
        (Limits { maglev_tables: 0, ..limits() }, "maglev", "bpf-lb-maglev-map-max"),
        (Limits { source_ranges: 1, ..limits() }, "ranges", "bpf-lb-map-max"),
    ];
    for (limits, table, config) in table {
        let mut planner = Planner::new(limits);
        let small = web(ups([1])).compile();
        planner.update(&key("small"), &small).expect("there is room");
        let before = planner.expected();
        let ranges = [1, 2].into();
        let large =
            Spec { ip: 2, ports: vec![80, 81], vip: Some(1), maglev: true, ranges, ..web(ups(1..=3)) }.compile();
        let error = planner.update(&key("large"), &large).expect_err("there is no room");
        assert!(matches!(error, PlanError::Full { table: t, key, .. } if t == table && key == config), "{error:?}");
        assert!(error.to_string().contains(config), "{error}");
        assert_eq!(planner.expected(), before);
        assert_eq!(planner.update(&key("small"), &small), Ok(vec![]));
    }
}

#[test]
fn r27_a_full_backends_map_still_lets_pods_be_replaced() {
    let mut planner = Planner::new(Limits { backends: 4, ..limits() });
    let mut maps = Maps::default();
    update(&mut planner, &mut maps, "web", &web(ups([1, 2, 3])));
    assert!(planner.update(&key("web"), &web(ups([1, 2, 3, 4])).compile()).is_err());
    update(&mut planner, &mut maps, "web", &web(ups([4, 2, 5])));
    assert_eq!(maps.backends.len(), 3);
    assert_eq!(maps.frontends[&frontend([10, 96, 0, 1], 80)].internal.count, 3);
    assert!(planner.problems(&key("web")).is_empty());
    // All of them, too.
    update(&mut planner, &mut maps, "web", &web(ups([7, 8, 9])));
    assert_eq!(maps.frontends[&frontend([10, 96, 0, 1], 80)].internal.count, 3);
}

#[test]
fn an_address_can_be_changed_while_the_frontends_map_is_full() {
    let mut planner = Planner::new(Limits { frontends: 2, ..limits() });
    let ops = planner.update(&key("web"), &web(ups([1])).compile()).expect("there is room");
    assert_eq!(kinds(&ops).iter().filter(|kind| **kind == "frontend").count(), 2, "the port and the wildcard");
    let ops =
        planner.update(&key("web"), &Spec { ip: 2, ..web(ups([1])) }.compile()).expect("there is room in the end");
    let last_delete = ops.iter().rposition(|op| matches!(op, Op::DeleteFrontend(_))).expect("deletes");
    let first_put = ops.iter().position(|op| matches!(op, Op::PutFrontend(..))).expect("puts");
    assert!(last_delete < first_put);
}

#[test]
fn removing_what_is_not_there_does_nothing() {
    let mut planner = planner();
    assert_eq!(planner.remove(&key("web")), []);
    assert_eq!(planner.update(&key("headless"), &crate::services::Compiled::default()), Ok(vec![]));
    assert_eq!(planner.stats(), crate::plan::Stats::default());
}

#[test]
fn a_planned_endpoint_costs_little_memory() {
    use crate::plan::entries::{BackendEntry, Claim};
    // 250,000 endpoints: 14 MB of entries, 10 MB of ids by address, 2 MB of claims, 1 MB of slots.
    assert!(size_of::<BackendEntry>() <= 56);
    assert_eq!(size_of::<Claim>(), 8);
}

#[test]
fn members_keep_their_places_when_their_set_moves_so_that_affinity_finds_them() {
    let (mut planner, mut maps) = (planner(), Maps::default());
    let places = |maps: &Maps, key: FrontendKey| -> Vec<IpAddr> {
        let set = maps.frontends[&key].internal;
        (set.base..set.base + set.count).map(|slot| maps.backends[&maps.slots[&slot]].addr.into()).collect()
    };
    let spec = |ip, pods: Vec<Pod>| Spec { ip, ports: vec![80], pods, ..Spec::default() };
    let at = |ip| frontend([10, 96, 0, ip], 80);
    // All on one other node: those on this one would come first.
    update(&mut planner, &mut maps, "a", &spec(1, ups([9, 7, 5, 3])));
    // Another set lies right behind it, so that it cannot grow where it is.
    update(&mut planner, &mut maps, "b", &spec(2, ups(1..9)));
    let before = places(&maps, at(1));
    let base = maps.frontends[&at(1)].internal.base;
    let grown = ups((0..12).map(|n| 2 * n + 1));
    update(&mut planner, &mut maps, "a", &spec(1, grown));
    assert_ne!(maps.frontends[&at(1)].internal.base, base, "it moved");
    assert_eq!(places(&maps, at(1))[..4], before);
}

#[test]
fn r40_a_list_is_complete_before_a_frontend_asks_it_and_until_none_does() {
    let (mut planner, mut maps) = (planner(), Maps::default());
    let with =
        |ranges: &[usize], deny| Spec { vip: Some(1), ranges: ranges.iter().copied().collect(), deny, ..web(ups([1])) };
    update(&mut planner, &mut maps, "web", &with(&[], false));
    let table: [(&str, Spec, &[&str]); 5] = [
        ("restricts", with(&[1, 3], false), &["range", "range", "frontend"]),
        ("edits the list", with(&[1, 2], false), &["range", "delete range"]),
        ("turns it around", with(&[1, 2], true), &["range", "range", "frontend", "delete range", "delete range"]),
        ("restricts to nobody", with(&[5], false), &["frontend", "delete range", "delete range"]),
        ("opens", with(&[], false), &["frontend"]),
    ];
    for (what, spec, expected) in table {
        assert_eq!(kinds(&update(&mut planner, &mut maps, "web", &spec)), expected, "{what}");
    }
    update(&mut planner, &mut maps, "web", &with(&[1, 2], true));
    // The ClusterIP begins and ends to ask while the list changes.
    for (ranges, all_types) in [([2, 3], true), ([0, 1], false)] {
        update(&mut planner, &mut maps, "web", &Spec { all_types, ..with(&ranges, true) });
    }
    maps.apply_safely(&planner.remove(&key("web")));
    assert_eq!(maps, Maps::default());
}

#[test]
fn r40_a_frontend_comes_and_goes_with_a_list_that_is_its_own() {
    let (mut planner, mut maps) = (planner(), Maps::default());
    let with = |vip, range, deny| Spec { vip, ranges: [range].into(), deny, all_types: true, ..web(ups([1])) };
    for deny in [true, false] {
        update(&mut planner, &mut maps, "web", &with(Some(1), 1, deny));
        // The load balancer's address goes, to a service that waits for it or to nobody, while the list becomes another's.
        for waits in [true, false] {
            if waits {
                update(&mut planner, &mut maps, "other", &Spec { ip: 2, vip: Some(1), ..web(ups([1])) });
            }
            let ops = update(&mut planner, &mut maps, "web", &with(None, 3, deny));
            let expected: &[&str] = if waits {
                &["delete", "range", "delete range", "frontend"]
            } else {
                &["delete", "range", "delete", "delete range"]
            };
            assert_eq!(kinds(&ops), expected, "denies: {deny}");
            maps.apply_safely(&planner.remove(&key("other")));
            let ops = update(&mut planner, &mut maps, "web", &with(Some(1), 1, deny));
            assert_eq!(kinds(&ops), ["range", "frontend", "delete range", "frontend"], "denies: {deny}");
        }
    }
}
