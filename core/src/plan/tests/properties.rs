use std::collections::{BTreeMap, HashSet};

use kinesin_abi::{Backend, FrontendKey, FrontendValue, SetRef};
use proptest::collection::vec;
use proptest::prelude::*;

use super::{Maps, Pod, Spec, directly, key, limits, planner, update};
use crate::plan::{Actual, Limits, PlanError, Planner};

const NAMES: [&str; 5] = ["a", "b", "c", "d", "e"];

prop_compose! {
    fn pod()(ip in 1u8..12, ready in prop::bool::weighted(0.7), terminating: bool, serving: bool) -> Pod {
        Pod { ip, ready, terminating, serving }
    }
}

prop_compose! {
    /// Services share pods and load balancer addresses, but no frontends.
    fn spec(service: usize)(
        vip in prop::option::of(0u8..3),
        node_port: bool,
        ports in prop::collection::btree_set(0u16..3, 0..=3),
        pods in vec(pod(), 0..10),
        external_local: bool,
        internal_local in prop::bool::weighted(0.3),
        maglev: bool,
        ranges in prop::option::of(prop::collection::btree_set(0usize..super::RANGES.len(), 0..4)),
        deny: bool,
        all_types in prop::bool::weighted(0.3),
    ) -> Spec {
        let ports = ports.into_iter().map(|port| 80 + 10 * service as u16 + port).collect();
        let ranges = ranges.unwrap_or_default();
        Spec { ip: service as u8 + 1, vip, node_port, ports, pods, external_local, internal_local, maglev, ranges, deny, all_types }
    }
}

/// A service and what it becomes; `None` removes it.
fn edit() -> impl Strategy<Value = (usize, Option<Spec>)> {
    (0..NAMES.len()).prop_flat_map(|service| (Just(service), prop::option::weighted(0.85, spec(service))))
}

fn apply(planner: &mut Planner, maps: &mut Maps, service: usize, spec: &Option<Spec>) {
    match spec {
        Some(spec) => drop(update(planner, maps, NAMES[service], spec)),
        None => {
            maps.apply_safely(&planner.remove(&key(NAMES[service])));
            assert_eq!(*maps, Maps::of(planner.expected()));
        }
    }
}

fn last(edits: &[(usize, Option<Spec>)]) -> BTreeMap<usize, Spec> {
    let all: BTreeMap<usize, &Option<Spec>> = edits.iter().map(|(service, spec)| (*service, spec)).collect();
    all.into_iter().filter_map(|(service, spec)| Some((service, spec.clone()?))).collect()
}

fn assert_ids_are_unique(maps: &Maps, services: &BTreeMap<usize, Spec>) {
    let ports: HashSet<u32> = maps.frontends.values().map(|value| value.service).filter(|id| *id != 0).collect();
    let expected: usize = services.values().map(|spec| spec.ports.len()).sum();
    assert_eq!(ports.len(), expected, "one id for each port of each service");
    let backends: HashSet<_> = maps.backends.values().map(|b| (b.addr, b.port, b.proto)).collect();
    assert_eq!(backends.len(), maps.backends.len(), "one id for each backend");
}

prop_compose! {
    fn garbage_value()(
        flags in 0u32..2048,
        service in prop_oneof![0u32..4, Just(u32::MAX), any::<u32>()],
        base in prop_oneof![0u32..40, any::<u32>()],
        count in prop_oneof![0u32..6, any::<u32>()],
        base2 in 0u32..40,
        count2 in 0u32..6,
    ) -> FrontendValue {
        FrontendValue { flags, service, affinity: 0, external: SetRef { base, count }, internal: SetRef { base: base2, count: count2 } }
    }
}

prop_compose! {
    fn garbage()(
        frontends in vec(((0u8..4, 80u16..84, 0u8..20), garbage_value()), 0..12),
        slots in vec((prop_oneof![0u32..48, any::<u32>()], prop_oneof![1u32..12, any::<u32>()]), 0..60),
        backends in vec((prop_oneof![0u32..12, any::<u32>()], 0u8..12, 0u8..7), 0..14),
        ranges in vec((prop_oneof![60u32..200, any::<u32>()], prop_oneof![0u32..5, any::<u32>()], 0u32..5, 0u8..3), 0..6),
        maglev in vec((0u32..48, prop_oneof![vec(0u32..12, 13), vec(0u32..12, 0..4usize)]), 0..4),
    ) -> Actual {
        let key = |(ip, port, proto): (u8, u16, u8)| FrontendKey {
            addr: std::net::IpAddr::from([10, 96, 0, ip]).into(),
            port: kinesin_abi::Be16::new(port),
            proto: if proto > 2 { kinesin_abi::proto::TCP } else { proto },
            pad: 0,
        };
        Actual {
            frontends: frontends.into_iter().map(|(k, value)| (key(k), value)).collect(),
            slots,
            backends: backends.into_iter().map(|(id, ip, state)| (id, Backend {
                addr: std::net::IpAddr::from([10, 42, 0, ip]).into(), port: kinesin_abi::Be16::new(80), proto: 6, state, flags: 0,
            })).collect(),
            source_ranges: ranges.into_iter().map(|(prefix_len, service, list, ip)| kinesin_abi::SourceRangeKey {
                prefix_len,
                range: kinesin_abi::SourceRange { service, list, addr: std::net::IpAddr::from([198, 51, 100, ip]).into() },
            }.masked()).collect(),
            maglev: maglev.into_iter().map(|(base, table)| (base, table.into())).collect(),
        }
    }
}

/// What a kernel could hold of it: arrays have no elements beyond their end.
fn possible(mut actual: Actual) -> Maps {
    let limits = limits();
    actual.slots.retain(|(index, id)| *index < limits.slots && *id != 0);
    actual.backends.retain(|(id, value)| *id < limits.backends && *value != Backend::default());
    Maps::of(actual)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn edits_in_any_order_end_in_what_direct_creation_gives(edits in vec(edit(), 1..14)) {
        let (mut planner, mut maps) = (planner(), Maps::default());
        for (service, spec) in &edits {
            apply(&mut planner, &mut maps, *service, spec);
            if let Some(spec) = spec {
                prop_assert_eq!(planner.update(&key(NAMES[*service]), &spec.compile()), Ok(vec![]));
            }
            prop_assert!(planner.repair(&maps.actual()).is_empty());
        }
        let services = last(&edits);
        let direct = directly(services.iter().map(|(service, spec)| (NAMES[*service], spec)));
        prop_assert_eq!(maps.meaning(), direct.meaning());
        assert_ids_are_unique(&maps, &services);

        // Nothing is left behind at the end.
        for service in 0..NAMES.len() {
            apply(&mut planner, &mut maps, service, &None);
        }
        prop_assert_eq!(&maps, &Maps::default());
        prop_assert_eq!(planner.stats(), crate::plan::Stats::default());
    }

    #[test]
    fn a_restart_moves_nothing(edits in vec(edit(), 1..14)) {
        let (mut before, mut maps) = (planner(), Maps::default());
        for (service, spec) in &edits {
            apply(&mut before, &mut maps, *service, spec);
        }
        let mut after = planner();
        prop_assert_eq!(after.adopt(maps.actual()), vec![]);
        prop_assert_eq!(Maps::of(after.expected()), maps.clone());
        for (service, spec) in last(&edits) {
            prop_assert_eq!(after.update(&key(NAMES[service]), &spec.compile()), Ok(vec![]));
        }
        prop_assert_eq!(after.prune(), vec![]);
        prop_assert_eq!(Maps::of(after.expected()), maps);
    }

    #[test]
    fn an_agent_that_dies_in_the_middle_of_a_plan_is_replaced_without_a_gap(
        edits in vec(edit(), 1..10), cut in 0usize..20, later in vec(edit(), 0..4),
    ) {
        let (mut before, mut maps) = (planner(), Maps::default());
        let (head, tail) = edits.split_at(edits.len() - 1);
        for (service, spec) in head {
            apply(&mut before, &mut maps, *service, spec);
        }
        let (service, spec) = &tail[0];
        let ops = match spec {
            Some(spec) => before.update(&key(NAMES[*service]), &spec.compile()).expect("there is room"),
            None => before.remove(&key(NAMES[*service])),
        };
        maps.apply_safely(&ops[..cut.min(ops.len())]);

        let mut after = planner();
        let ops = after.adopt(maps.actual());
        maps.apply_safely(&ops);
        prop_assert_eq!(&maps, &Maps::of(after.expected()));
        let all: Vec<_> = edits.iter().chain(&later).cloned().collect();
        for (service, spec) in last(&all) {
            apply(&mut after, &mut maps, service, &Some(spec));
        }
        maps.apply_safely(&after.prune());
        prop_assert_eq!(&maps, &Maps::of(after.expected()));
        let services = last(&all);
        let direct = directly(services.iter().map(|(service, spec)| (NAMES[*service], spec)));
        prop_assert_eq!(maps.meaning(), direct.meaning());
        assert_ids_are_unique(&maps, &services);
    }

    #[test]
    fn r24_any_garbage_is_adopted_and_converges(garbage in garbage(), edits in vec(edit(), 0..8)) {
        let mut maps = possible(garbage);
        let mut planner = planner();
        let ops = planner.adopt(maps.actual());
        maps.apply_all(&ops);
        prop_assert_eq!(&maps, &Maps::of(planner.expected()));
        prop_assert_eq!(maps.check(), Ok(()));
        for (service, spec) in &edits {
            apply(&mut planner, &mut maps, *service, spec);
        }
        maps.apply_safely(&planner.prune());
        prop_assert_eq!(&maps, &Maps::of(planner.expected()));
        let services = last(&edits);
        let direct = directly(services.iter().map(|(service, spec)| (NAMES[*service], spec)));
        prop_assert_eq!(maps.meaning(), direct.meaning());
        assert_ids_are_unique(&maps, &services);
        for service in 0..NAMES.len() {
            apply(&mut planner, &mut maps, service, &None);
        }
        prop_assert_eq!(maps, Maps::default());
    }

    #[test]
    fn impossible_garbage_never_panics(garbage in garbage(), spec in spec(1)) {
        let mut planner = planner();
        planner.adopt(garbage.clone());
        let _ = planner.update(&key("b"), &spec.compile());
        planner.repair(&garbage);
        planner.prune();
    }

    #[test]
    fn r03_tampered_maps_are_repaired(edits in vec(edit(), 1..8), injected in garbage(), deleted in vec(any::<prop::sample::Index>(), 0..12)) {
        let (mut planner, mut maps) = (planner(), Maps::default());
        for (service, spec) in &edits {
            apply(&mut planner, &mut maps, *service, spec);
        }
        let mut tampered = maps.clone();
        for index in deleted {
            let nth = index.index(64);
            tampered.frontends = tampered.frontends.into_iter().enumerate().filter(|(i, _)| *i != nth).map(|(_, e)| e).collect();
            tampered.slots = tampered.slots.into_iter().enumerate().filter(|(i, _)| *i != nth / 2).map(|(_, e)| e).collect();
            tampered.backends = tampered.backends.into_iter().enumerate().filter(|(i, _)| *i != nth / 3).map(|(_, e)| e).collect();
            tampered.ranges = tampered.ranges.into_iter().enumerate().filter(|(i, _)| *i != nth / 4).map(|(_, e)| e).collect();
            tampered.maglev = tampered.maglev.into_iter().enumerate().filter(|(i, _)| *i != nth / 9).map(|(_, e)| e).collect();
        }
        let injected = possible(injected);
        tampered.frontends.extend(injected.frontends);
        tampered.slots.extend(injected.slots);
        tampered.backends.extend(injected.backends);
        tampered.maglev.extend(injected.maglev);
        tampered.ranges.extend(injected.ranges);
        tampered.apply_all(&planner.repair(&tampered.actual()));
        prop_assert_eq!(tampered, maps);
    }

    #[test]
    fn r27_a_full_map_refuses_whole_services_and_recovers(
        edits in vec(edit(), 1..20), frontends in 4u32..30, slots in 4u32..40, backends in 2u32..20, maglev_tables in 0u32..4, source_ranges in 0u32..12,
    ) {
        let limits = Limits { frontends, slots, backends, maglev_tables, source_ranges, ..limits() };
        let (mut planner, mut maps) = (Planner::new(limits), Maps::default());
        for (service, spec) in &edits {
            let before = maps.clone();
            let stats = planner.stats();
            match spec {
                Some(spec) => match planner.update(&key(NAMES[*service]), &spec.compile()) {
                    Ok(ops) => maps.apply_safely(&ops),
                    Err(PlanError::Full { .. }) => {
                        prop_assert_eq!(&Maps::of(planner.expected()), &before);
                        prop_assert_eq!(planner.stats(), stats);
                    }
                },
                None => maps.apply_safely(&planner.remove(&key(NAMES[*service]))),
            }
            prop_assert_eq!(&maps, &Maps::of(planner.expected()));
            prop_assert!(maps.frontends.len() <= frontends as usize);
            prop_assert!(maps.slots.keys().all(|index| *index < slots));
            prop_assert!(maps.backends.keys().all(|id| *id < backends && *id > 0));
            prop_assert!(maps.maglev.len() <= maglev_tables as usize);
            prop_assert!(maps.ranges.len() <= source_ranges as usize);
        }
        for name in NAMES {
            maps.apply_safely(&planner.remove(&key(name)));
        }
        prop_assert_eq!(maps, Maps::default());
    }

    #[test]
    fn conflicting_services_never_disturb_each_other(edits in vec((0usize..3, prop::option::weighted(0.7, spec(0))), 1..14)) {
        let (mut planner, mut maps) = (planner(), Maps::default());
        for (service, spec) in &edits {
            apply(&mut planner, &mut maps, *service, spec);
            for frontend in maps.frontends.iter().filter(|(_, value)| value.service != 0) {
                prop_assert!(planner.service_of(frontend.0).is_some());
            }
        }
        // Every frontend that somebody wants is there.
        for spec in last(&edits).values() {
            for frontend in spec.compile().frontends {
                let key = FrontendKey {
                    addr: frontend.addr.into(), port: kinesin_abi::Be16::new(frontend.port), proto: frontend.proto, pad: 0,
                };
                prop_assert!(maps.frontends.contains_key(&key));
            }
        }
        for service in 0..3 {
            apply(&mut planner, &mut maps, service, &None);
        }
        prop_assert_eq!(maps, Maps::default());
    }
}
