use std::net::IpAddr;

use kinesin_abi::{
    Addr, BACKEND_LOCAL, Backend, BackendState, Be16, FrontendKey, FrontendKind, FrontendValue, MAGLEV_TABLE_SIZE,
    SLOT_EMPTY, SetRef, frontend_flags, proto,
};

use super::model::Model;
use super::*;
use crate::services::{BackendRef, BackendSet, Compiled, Frontend, ServiceKey};

pub(super) fn service(name: &str) -> ServiceKey {
    ServiceKey { namespace: "default".into(), name: name.into() }
}

pub(super) fn backend(last: u8) -> BackendRef {
    BackendRef {
        addr: [10, 42, 0, last].into(),
        port: 8080,
        proto: proto::TCP,
        state: BackendState::Active,
        local: false,
        node: "".into(),
        zone: "".into(),
    }
}

pub(super) fn set_of(backends: impl IntoIterator<Item = BackendRef>) -> BackendSet {
    let backends: Arc<[BackendRef]> = backends.into_iter().collect();
    let usable = backends.iter().filter(|b| b.state == BackendState::Active).count();
    BackendSet { backends, usable }
}

fn set(last: impl IntoIterator<Item = u8>) -> BackendSet {
    set_of(last.into_iter().map(backend))
}

pub(super) fn frontend(addr: [u8; 4], port: u16, set: usize) -> Frontend {
    let wildcard = port == 0;
    Frontend {
        addr: addr.into(),
        port,
        proto: if wildcard { proto::ANY } else { proto::TCP },
        kind: FrontendKind::LoadBalancer,
        port_name: "".into(),
        flags: if wildcard { frontend_flags::WILDCARD } else { frontend_flags::ROUTABLE },
        affinity: 0,
        external: (!wildcard).then_some(set),
        internal: (!wildcard).then_some(set),
    }
}

fn key(addr: [u8; 4], port: u16) -> FrontendKey {
    let proto = if port == 0 { proto::ANY } else { proto::TCP };
    FrontendKey { addr: IpAddr::from(addr).into(), port: Be16::new(port), proto, pad: 0 }
}

fn compiled(frontends: impl Into<Vec<Frontend>>, sets: impl Into<Vec<BackendSet>>) -> Compiled {
    Compiled { frontends: frontends.into(), sets: sets.into(), problems: Vec::new() }
}

/// A planner and the maps that it writes.
struct World {
    planner: Planner,
    maps: Model,
    limits: Limits,
}

impl World {
    fn new() -> Self {
        Self::with(Limits::default())
    }

    fn with(limits: Limits) -> Self {
        Self { planner: Planner::new(limits), maps: Model::default(), limits }
    }

    fn apply(&mut self, ops: Vec<Op>) -> Vec<Op> {
        for op in &ops {
            self.maps.apply(op, self.limits);
            self.maps.check();
        }
        assert_eq!(self.maps.read(), self.planner.expected());
        ops
    }

    fn update(&mut self, name: &str, compiled: &Compiled) -> Vec<Op> {
        let ops = self.planner.update(&service(name), compiled).unwrap();
        self.apply(ops)
    }

    fn remove(&mut self, name: &str) -> Vec<Op> {
        let ops = self.planner.remove(&service(name));
        self.apply(ops)
    }

    fn value(&self, addr: [u8; 4], port: u16) -> FrontendValue {
        self.maps.frontends[&key(addr, port)]
    }

    /// Last bytes of the addresses that a frontend leads to from outside, sorted.
    fn behind(&self, addr: [u8; 4], port: u16) -> Vec<u8> {
        let value = FrontendValue { internal: SetRef::default(), ..self.value(addr, port) };
        let mut last: Vec<u8> = self.maps.reachable(&value).iter().map(|b| last_byte(b.addr)).collect();
        last.sort();
        last.dedup();
        last
    }
}

fn last_byte(addr: Addr) -> u8 {
    match addr.into() {
        IpAddr::V4(v4) => v4.octets()[3],
        IpAddr::V6(v6) => v6.octets()[15],
    }
}

const VIP: [u8; 4] = [192, 0, 2, 1];
const CLUSTER: [u8; 4] = [10, 96, 0, 1];

#[test]
fn a_new_service_is_written_from_the_backends_up() {
    let mut w = World::new();
    let ops = w.update("a", &compiled([frontend(VIP, 80, 0), frontend(VIP, 0, 0)], [set([1, 2, 3])]));
    let active = |last: u8| Backend {
        addr: IpAddr::from([10, 42, 0, last]).into(),
        port: Be16::new(8080),
        proto: proto::TCP,
        state: BackendState::Active as u8,
        flags: 0,
    };
    let refs = SetRef { base: 0, count: 3 };
    assert_eq!(
        ops,
        [
            Op::Backend(1, active(1)),
            Op::Backend(2, active(2)),
            Op::Backend(3, active(3)),
            Op::Slot(0, 1),
            Op::Slot(1, 2),
            Op::Slot(2, 3),
            Op::PutFrontend(
                key(VIP, 0),
                FrontendValue { flags: 2 | frontend_flags::WILDCARD, ..FrontendValue::default() }
            ),
            Op::PutFrontend(
                key(VIP, 80),
                FrontendValue {
                    flags: 2 | frontend_flags::ROUTABLE,
                    service: 1,
                    affinity: 0,
                    external: refs,
                    internal: refs
                }
            ),
        ]
    );
    assert_eq!(w.planner.owner_of(&key(VIP, 80)), Some(&service("a")));
    assert_eq!(w.planner.stats(), Stats { services: 1, frontends: 2, slots: 4, backends: 3 });
}

#[test]
fn the_same_service_again_and_an_unknown_removal_write_nothing() {
    let mut w = World::new();
    let a = compiled([frontend(VIP, 80, 0)], [set([1, 2, 3])]);
    w.update("a", &a);
    assert_eq!(w.update("a", &a), []);
    assert_eq!(w.remove("b"), []);
}

#[test]
fn a_removed_service_leaves_nothing_behind() {
    let mut w = World::new();
    w.update("a", &compiled([frontend(VIP, 80, 0), frontend(VIP, 0, 0)], [set([1, 2, 3])]));
    w.remove("a");
    assert_eq!(w.maps.read(), Actual::default());
    assert_eq!(w.planner.stats(), Stats::default());
}

#[test]
fn a_set_within_its_room_grows_and_shrinks_in_place() {
    let mut w = World::new();
    let with = |last: &[u8]| compiled([frontend(VIP, 80, 0)], [set(last.iter().copied())]);
    w.update("a", &with(&[1, 2, 3]));
    let before = w.value(VIP, 80);
    let ops = w.update("a", &with(&[1, 2, 3, 4]));
    assert!(matches!(ops[..], [Op::Backend(4, _), Op::Slot(3, 4), Op::PutFrontend(..)]), "{ops:?}");
    assert_eq!(w.value(VIP, 80).external, SetRef { count: 4, ..before.external });
    // The last one takes the place of the one that left; the tail is emptied once nobody counts it.
    let ops = w.update("a", &with(&[1, 3, 4]));
    assert!(
        matches!(ops[..], [Op::Slot(1, 4), Op::PutFrontend(..), Op::Slot(3, SLOT_EMPTY), Op::Backend(2, _)]),
        "{ops:?}"
    );
    assert_eq!(w.value(VIP, 80), before);
    assert_eq!(w.behind(VIP, 80), [1, 3, 4]);
}

#[test]
fn a_set_that_outgrows_its_room_moves_and_frees_the_old_room() {
    let mut w = World::new();
    w.update("a", &compiled([frontend(VIP, 80, 0)], [set([1, 2])]));
    w.update("b", &compiled([frontend(VIP, 81, 0)], [set([1, 2])]));
    w.update("a", &compiled([frontend(VIP, 80, 0)], [set([1, 2, 3])]));
    assert_eq!(w.value(VIP, 80).external, SetRef { base: 4, count: 3 });
    assert_eq!(w.planner.stats().slots, 6);
    w.update("c", &compiled([frontend(VIP, 82, 0)], [set([1, 2])]));
    assert_eq!(w.value(VIP, 82).external.base, 0);
}

#[test]
fn a_set_that_shrinks_far_gives_up_room_without_moving() {
    let mut w = World::new();
    w.update("a", &compiled([frontend(VIP, 80, 0)], [set(1..=64)]));
    w.update("a", &compiled([frontend(VIP, 80, 0)], [set(1..=3)]));
    assert_eq!(w.value(VIP, 80).external, SetRef { base: 0, count: 3 });
    assert_eq!(w.planner.stats().slots, 8);
}

#[test]
fn an_empty_set_needs_no_slots() {
    let mut w = World::new();
    w.update("a", &compiled([frontend(VIP, 80, 0)], [set([1])]));
    w.update("a", &compiled([frontend(VIP, 80, 0)], [set([])]));
    assert_eq!(w.value(VIP, 80).external, SetRef::default());
    assert_eq!(w.planner.stats(), Stats { services: 1, frontends: 1, slots: 0, backends: 0 });
}

#[test]
fn backends_that_take_no_new_connections_stay_in_their_array_but_not_in_slots() {
    let mut w = World::new();
    let leaving = BackendRef { state: BackendState::TerminatingNotServing, ..backend(2) };
    w.update("a", &compiled([frontend(VIP, 80, 0)], [set([1, 2])]));
    w.update("a", &compiled([frontend(VIP, 80, 0)], [set_of([backend(1), leaving])]));
    assert_eq!(w.behind(VIP, 80), [1]);
    assert_eq!(w.maps.backends[&2].state, BackendState::TerminatingNotServing as u8);
}

#[test]
fn frontends_with_equal_sets_share_their_slots() {
    let mut w = World::new();
    let frontends = [frontend(VIP, 80, 0), frontend(CLUSTER, 80, 1)];
    w.update("a", &compiled(frontends, [set([1, 2]), set([2, 1])]));
    assert_eq!(w.value(VIP, 80).external, w.value(CLUSTER, 80).external);
    assert_eq!(w.maps.slots.len(), 2);
}

#[test]
fn sets_that_become_different_part_without_leading_anybody_astray() {
    let mut w = World::new();
    let frontends = [frontend(VIP, 80, 0), frontend(VIP, 81, 1)];
    w.update("a", &compiled(frontends.clone(), [set([1, 2]), set([1, 2])]));
    let shared = w.value(VIP, 80).external;
    w.update("a", &compiled(frontends, [set([1, 2]), set([3, 4])]));
    assert_eq!(w.value(VIP, 80).external, shared);
    assert_eq!((w.behind(VIP, 80), w.behind(VIP, 81)), (vec![1, 2], vec![3, 4]));
}

#[test]
fn external_and_internal_traffic_may_have_different_sets() {
    let mut w = World::new();
    let both = Frontend { internal: Some(1), ..frontend(VIP, 80, 0) };
    w.update("a", &compiled([both], [set([1]), set([1, 2, 3])]));
    let value = w.value(VIP, 80);
    assert_eq!((value.external.count, value.internal.count), (1, 3));
}

#[test]
fn services_share_backends_and_the_stronger_state_holds() {
    let mut w = World::new();
    let state = |state, local| set_of([BackendRef { state, local, ..backend(1) }]);
    w.update("a", &compiled([frontend(VIP, 80, 0)], [state(BackendState::Maintenance, false)]));
    for (stronger, raw) in [(BackendState::TerminatingNotServing, 3), (BackendState::Terminating, 2)] {
        w.update("b", &compiled([frontend(VIP, 81, 0)], [state(stronger, true)]));
        assert_eq!((w.maps.backends[&1].state, w.maps.backends[&1].flags), (raw, BACKEND_LOCAL));
    }
    w.remove("b");
    assert_eq!((w.maps.backends[&1].state, w.maps.backends[&1].flags), (4, 0));
    w.remove("a");
    assert!(w.maps.backends.is_empty());
}

#[test]
fn the_earlier_claim_keeps_a_frontend_and_the_other_gets_it_afterwards() {
    let mut w = World::new();
    let with = |last: u8| compiled([frontend(VIP, 80, 0)], [set([last])]);
    w.update("a", &with(1));
    w.update("b", &with(2));
    assert_eq!(w.behind(VIP, 80), [1]);
    assert_eq!(w.planner.problems(&service("a")), Vec::<String>::new());
    assert_eq!(
        w.planner.problems(&service("b")),
        ["192.0.2.1:80/TCP is already used by service default/a; change one of the two"]
    );
    // Not even for a moment is nobody there.
    let ops = w.remove("a");
    assert!(!ops.iter().any(|op| matches!(op, Op::DeleteFrontend(_))), "{ops:?}");
    assert_eq!(w.behind(VIP, 80), [2]);
    assert_eq!(w.planner.owner_of(&key(VIP, 80)), Some(&service("b")));
    assert_eq!(w.planner.problems(&service("b")), Vec::<String>::new());
}

#[test]
fn a_frontend_is_handed_over_when_its_service_changes() {
    let mut w = World::new();
    w.update("a", &compiled([frontend(VIP, 80, 0), frontend(VIP, 81, 0)], [set([1])]));
    w.update("b", &compiled([frontend(VIP, 80, 0)], [set([2])]));
    w.update("c", &compiled([frontend(VIP, 80, 0)], [set([3])]));
    w.update("a", &compiled([frontend(VIP, 81, 0)], [set([1])]));
    assert_eq!((w.behind(VIP, 80), w.behind(VIP, 81)), (vec![2], vec![1]));
    assert_eq!(
        w.planner.problems(&service("c")),
        ["192.0.2.1:80/TCP is already used by service default/b; change one of the two"]
    );
    // Who no longer wants it is passed over.
    w.update("c", &compiled([], []));
    w.remove("b");
    assert_eq!(w.planner.owner_of(&key(VIP, 80)), None);
    assert!(!w.maps.frontends.contains_key(&key(VIP, 80)));
}

#[test]
fn a_frontend_that_cannot_be_handed_over_is_deleted_and_says_why() {
    let mut w = World::with(Limits { slots: 2, ..Limits::default() });
    w.update("a", &compiled([frontend(VIP, 80, 0)], [set([1])]));
    w.update("b", &compiled([frontend(VIP, 80, 0)], [set([1, 2])]));
    w.remove("a");
    assert!(w.maps.frontends.is_empty());
    let why = "192.0.2.1:80/TCP is not programmed: no room in the map `slots` of 2 entries; raise `bpf-lb-map-max`";
    assert_eq!(w.planner.problems(&service("b")), [why]);
    w.update("b", &compiled([frontend(VIP, 80, 0)], [set([1, 2])]));
    assert_eq!(w.behind(VIP, 80), [1, 2]);
}

#[test]
fn a_wildcard_lives_as_long_as_one_of_those_that_share_it() {
    let mut w = World::new();
    let with = |port, last: u8| compiled([frontend(VIP, 0, 0), frontend(VIP, port, 0)], [set([last])]);
    w.update("a", &with(80, 1));
    w.update("b", &with(81, 2));
    assert_eq!(w.planner.problems(&service("b")), Vec::<String>::new());
    w.remove("a");
    assert_eq!(w.value(VIP, 0).service, 0);
    w.remove("b");
    assert!(w.maps.frontends.is_empty());
}

#[test]
fn the_frontends_of_a_port_share_its_id_and_ports_differ() {
    let mut w = World::new();
    let named = |addr, port, name: &str| Frontend { port_name: name.into(), ..frontend(addr, port, 0) };
    let of = |http: &str| {
        compiled([named(CLUSTER, 80, http), named(VIP, 30080, http), named(CLUSTER, 443, "https")], [set([1])])
    };
    w.update("a", &of("http"));
    let http = w.value(CLUSTER, 80).service;
    assert_eq!(w.value(VIP, 30080).service, http);
    assert_ne!(w.value(CLUSTER, 443).service, http);
    assert_eq!(w.update("a", &of("web")), [], "a renamed port keeps its id");
}

#[test]
fn ids_of_ports_are_not_reused_at_once() {
    let mut w = World::new();
    w.update("a", &compiled([frontend(VIP, 80, 0)], [set([1])]));
    w.remove("a");
    w.update("b", &compiled([frontend(VIP, 80, 0)], [set([1])]));
    assert_eq!(w.value(VIP, 80).service, 2);
}

fn maglev(port: u16, set: usize) -> Frontend {
    let frontend = frontend(VIP, port, set);
    Frontend { flags: frontend.flags | frontend_flags::MAGLEV, ..frontend }
}

#[test]
fn a_maglev_table_lives_with_its_set() {
    let mut w = World::new();
    let ops = w.update("a", &compiled([maglev(80, 0), frontend(CLUSTER, 80, 0)], [set([1, 2])]));
    assert_eq!(ops.iter().filter(|op| matches!(op, Op::PutMaglev(0, _))).count(), 1);
    let keys: Vec<_> = (1..=2)
        .map(|i: u8| crate::maglev::Entry {
            key: crate::maglev::backend_key([10, 42, 0, i].into(), 8080, proto::TCP),
            id: BackendId::from(i),
            weight: 1,
        })
        .collect();
    let want = crate::maglev::table(&keys, MAGLEV_TABLE_SIZE, &crate::maglev::HashSeed::default());
    assert_eq!(w.maps.maglev[&0][..], want[..]);
    let ops = w.update("a", &compiled([maglev(80, 0)], [set([1, 3])]));
    assert_eq!(ops.iter().filter(|op| matches!(op, Op::PutMaglev(0, _))).count(), 1);
    w.update("a", &compiled([maglev(80, 0)], [set([])]));
    assert!(w.maps.maglev.is_empty());
    w.update("a", &compiled([maglev(80, 0)], [set([1])]));
    w.update("a", &compiled([frontend(VIP, 80, 0)], [set([1])]));
    assert!(w.maps.maglev.is_empty());
}

#[test]
fn full_maps_refuse_what_is_new_keep_what_is_there_and_recover() {
    let big = compiled([frontend(VIP, 90, 0), frontend(VIP, 91, 0)], [set(10..=13)]);
    for (table, limits) in [
        ("frontends", Limits { frontends: 2, ..Limits::default() }),
        ("slots", Limits { slots: 5, ..Limits::default() }),
        ("backends", Limits { backends: 5, ..Limits::default() }),
    ] {
        let mut w = World::with(limits);
        w.update("a", &compiled([frontend(VIP, 80, 0)], [set([1, 2])]));
        let before = w.planner.clone();
        let limit = if table == "frontends" { 2 } else { 5 };
        let error = w.planner.update(&service("b"), &big).unwrap_err();
        assert_eq!(error, PlanError::Full { table, limit });
        assert!(error.to_string().contains(table) && error.to_string().contains("bpf-lb-map-max"));
        assert!(w.planner == before);
        w.remove("a");
        w.update("b", &big);
    }
}

#[test]
fn a_full_frontends_map_still_takes_a_replacement() {
    let mut w = World::with(Limits { frontends: 1, ..Limits::default() });
    w.update("a", &compiled([frontend(VIP, 80, 0)], [set([1])]));
    w.update("a", &compiled([frontend(VIP, 81, 0)], [set([1])]));
    // Also when the removal of one service and the arrival of another are written as one batch.
    let remove = w.planner.remove(&service("a"));
    let add = w.planner.update(&service("b"), &compiled([frontend(VIP, 82, 0)], [set([1])])).unwrap();
    w.apply(in_phases(vec![remove, add]));
}

#[test]
fn a_restart_changes_nothing() {
    let mut w = World::new();
    let a = compiled([maglev(80, 0), frontend(VIP, 0, 0)], [set([1, 2, 3])]);
    let leaving = BackendRef { state: BackendState::TerminatingNotServing, local: true, ..backend(9) };
    let b = compiled([frontend(CLUSTER, 80, 0), frontend(VIP, 0, 0)], [set_of([backend(3), leaving])]);
    w.update("gone", &compiled([frontend(CLUSTER, 1, 0)], [set([1])]));
    w.update("a", &a);
    w.update("b", &b);
    w.remove("gone");
    let mut again = World { planner: Planner::new(w.limits), maps: w.maps.clone(), limits: w.limits };
    assert_eq!(again.planner.adopt(w.maps.read()), []);
    assert_eq!(again.planner.expected(), w.planner.expected());
    assert_eq!(again.planner.owner_of(&key(VIP, 80)), None);
    assert_eq!(again.update("b", &b), []);
    assert_eq!(again.update("a", &a), []);
    assert_eq!(again.planner.prune(), []);
    assert_eq!(again.planner.expected(), w.planner.expected());
    // What happens next is the same, too.
    let next = compiled([frontend(VIP, 90, 0)], [set([7, 8])]);
    assert_eq!(again.update("c", &next), w.update("c", &next));
}

#[test]
fn what_nobody_claims_after_a_restart_stays_until_pruned() {
    let mut w = World::new();
    let a = compiled([frontend(VIP, 80, 0)], [set([1, 2])]);
    w.update("a", &a);
    w.update("b", &compiled([maglev(81, 0), frontend(VIP, 0, 0)], [set([2, 3])]));
    w.planner.adopt(w.maps.read());
    assert_eq!(w.update("a", &a), []);
    assert_eq!(w.behind(VIP, 81), [2, 3]);
    assert_eq!(w.planner.repair(&w.maps.read()), []);
    let ops = w.planner.prune();
    w.apply(ops);
    assert_eq!(w.maps.frontends.len(), 1);
    assert_eq!((w.maps.slots.len(), w.maps.backends.len(), w.maps.maglev.len()), (2, 2, 0));
}

#[test]
fn a_table_that_an_unclaimed_frontend_selects_from_stays_until_pruned() {
    let mut w = World::new();
    w.update("a", &compiled([maglev(80, 0), frontend(CLUSTER, 80, 0)], [set([1, 2])]));
    w.planner.adopt(w.maps.read());
    assert_eq!(w.update("a", &compiled([frontend(CLUSTER, 80, 0)], [set([1, 2])])), []);
    let ops = w.planner.prune();
    assert_eq!(w.apply(ops), [Op::DeleteFrontend(key(VIP, 80)), Op::DeleteMaglev(0)]);
}

#[test]
fn a_write_that_stopped_half_way_is_taken_over_and_completed() {
    let before = compiled([frontend(VIP, 80, 0), frontend(CLUSTER, 80, 0)], [set([1, 2, 3])]);
    for after in [set([1, 2, 3, 4]), set([1, 3]), set([5, 6, 7]), set(1..=9), set([])] {
        let after = compiled([frontend(VIP, 80, 0), frontend(CLUSTER, 80, 0)], [after]);
        let mut w = World::new();
        w.update("a", &before);
        let ops = w.planner.update(&service("a"), &after).unwrap();
        for done in 0..=ops.len() {
            let mut maps = w.maps.clone();
            maps.apply_all(&ops[..done], w.limits);
            let mut again = World { planner: Planner::new(w.limits), maps, limits: w.limits };
            let repairs = again.planner.adopt(again.maps.read());
            assert!(!repairs.iter().any(|op| matches!(op, Op::DeleteFrontend(_))), "{done}: {repairs:?}");
            again.apply(repairs);
            again.update("a", &after);
            let ops = again.planner.prune();
            again.apply(ops);
            assert_eq!(again.behind(VIP, 80), w_behind(&after));
        }
    }
}

fn w_behind(compiled: &Compiled) -> Vec<u8> {
    compiled.sets[0].backends.iter().map(|b| last_byte(b.addr.into())).collect()
}

#[test]
fn contradictions_are_repaired_and_ids_that_two_services_share_are_told_apart() {
    let mut w = World::new();
    let a = compiled([frontend(VIP, 80, 0)], [set([1, 2])]);
    let b = compiled([frontend(VIP, 81, 0)], [set([3, 4])]);
    w.update("a", &a);
    w.update("b", &b);
    let good = w.value(VIP, 80);
    let mut put = |port, value| w.maps.frontends.insert(key(VIP, port), value);
    // The id and the slots of another service.
    put(81, good);
    put(1, FrontendValue { external: SetRef { base: 1, count: 2 }, ..good });
    put(2, FrontendValue { external: SetRef { base: u32::MAX, count: u32::MAX }, ..good });
    put(3, FrontendValue { external: SetRef { base: 70_000, count: 1 }, ..good });
    put(4, FrontendValue { internal: SetRef { base: 0, count: 9 }, ..good });
    w.maps.slots.insert(9, 77);
    w.maps.backends.insert(5, Backend { state: 99, ..Backend::default() });
    let repairs = w.planner.adopt(w.maps.read());
    let mut deleted: Vec<_> = repairs
        .iter()
        .filter_map(|op| if let Op::DeleteFrontend(key) = op { Some(key.port.get()) } else { None })
        .collect();
    deleted.sort();
    assert_eq!(deleted, [1, 2, 3, 4]);
    w.maps.apply_all(&repairs, w.limits);
    w.apply(Vec::new());
    assert_eq!(w.update("a", &a), []);
    w.update("b", &b);
    let ops = w.planner.prune();
    w.apply(ops);
    assert_ne!(w.value(VIP, 80).service, w.value(VIP, 81).service);
    assert_eq!((w.behind(VIP, 80), w.behind(VIP, 81)), (vec![1, 2], vec![3, 4]));
}

#[test]
fn entries_that_somebody_else_changed_are_restored() {
    let mut w = World::new();
    w.update("a", &compiled([maglev(80, 0), frontend(CLUSTER, 80, 0)], [set([1, 2])]));
    let good = w.maps.read();
    assert_eq!(w.planner.repair(&good), []);
    w.maps.frontends.remove(&key(VIP, 80));
    w.maps.frontends.insert(key(VIP, 99), FrontendValue::default());
    w.maps.slots.remove(&0);
    w.maps.slots.insert(50, 2);
    w.maps.backends.insert(2, Backend { state: 4, ..w.maps.backends[&1] });
    w.maps.backends.insert(9, w.maps.backends[&1]);
    w.maps.maglev.clear();
    w.maps.maglev.insert(7, Arc::from([1]));
    let ops = w.planner.repair(&w.maps.read());
    w.maps.apply_all(&ops, w.limits);
    assert_eq!(w.maps.read(), good);
}

#[test]
fn one_endpoint_among_5000_services_costs_few_writes() {
    let mut w = World::new();
    let of = |i: usize, backends: BackendSet| {
        let [_, _, high, low] = (i as u32).to_be_bytes();
        let at = |first| frontend([first, 0, high, low], 80, 0);
        compiled([at(10), at(11), at(12)], [backends])
    };
    for i in 0..5000 {
        let ops = w.planner.update(&service(&format!("s{i}")), &of(i, set([i as u8]))).unwrap();
        w.maps.apply_all(&ops, w.limits);
    }
    w.update("s7", &of(7, set_of((0..50).map(|i| BackendRef { port: 9000, ..backend(i) }))));
    let changed = (0..50).map(|i| BackendRef { port: if i == 25 { 9001 } else { 9000 }, ..backend(i) });
    let ops = w.update("s7", &of(7, set_of(changed)));
    assert!(matches!(ops[..], [Op::Backend(..), Op::Slot(..), Op::Backend(..)]), "{ops:?}");
    let without =
        (0..50).filter(|i| *i != 10).map(|i| BackendRef { port: if i == 25 { 9001 } else { 9000 }, ..backend(i) });
    let ops = w.update("s7", &of(7, set_of(without)));
    assert!(ops.len() <= 6, "{ops:?}");
}

#[test]
fn plans_merge_by_phase_unless_they_write_the_same_key() {
    let backend = Backend { state: 1, ..Backend::default() };
    let front = |port| Op::PutFrontend(key(VIP, port), FrontendValue::default());
    let a = vec![Op::Backend(1, backend), Op::Slot(0, 1), front(80)];
    let b = vec![Op::Backend(2, backend), Op::Slot(1, 2), front(81), Op::Slot(5, SLOT_EMPTY)];
    let merged = in_phases(vec![a.clone(), b.clone()]);
    let order = [&a[0], &b[0], &a[1], &b[1], &a[2], &b[2], &b[3]].map(Clone::clone);
    assert_eq!(merged, order);
    let again = vec![Op::Backend(3, backend), Op::Slot(5, 3)];
    assert_eq!(in_phases(vec![a.clone(), b.clone(), again.clone()]), [&order[..], &again[..]].concat());
}

#[test]
fn nonsense_in_a_compiled_service_is_harmless() {
    let mut w = World::new();
    let astray = Frontend { external: Some(7), internal: None, ..frontend(VIP, 80, 0) };
    let twice = frontend(VIP, 80, 0);
    let too_many = BackendSet { usable: 9, ..set([1, 1]) };
    let free = BackendSet { backends: Arc::from([BackendRef { state: BackendState::Free, ..backend(2) }]), usable: 0 };
    w.update("a", &compiled([astray, twice, frontend(VIP, 81, 0)], [too_many, free]));
    assert_eq!(w.value(VIP, 80).external, SetRef::default());
    assert_eq!(w.value(VIP, 81).external.count, 1);
    w.remove("a");
    assert_eq!(w.maps.read(), Actual::default());
}
