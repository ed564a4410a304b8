//! Random lives of services, restarts and tampered maps, against what must always hold.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use kinesin_abi::{
    Backend, BackendState, FrontendKey, FrontendValue, MAGLEV_TABLE_SIZE, SetRef, frontend_flags, proto,
};
use proptest::prelude::*;

use super::model::Model;
use super::planner::references;
use super::tests::{backend, frontend, service, set_of};
use super::*;
use crate::services::{BackendRef, BackendSet, Compiled, Frontend, ServiceKey};

/// Small numbers, so that things collide.
fn some_backend() -> impl Strategy<Value = BackendRef> {
    (0..14u8, prop::sample::select(vec![1, 1, 1, 2, 3, 4]), prop::bool::weighted(0.2)).prop_map(
        |(last, state, local)| {
            let state = match state {
                1 => BackendState::Active,
                2 => BackendState::Terminating,
                3 => BackendState::TerminatingNotServing,
                _ => BackendState::Maintenance,
            };
            BackendRef { state, local, ..backend(last) }
        },
    )
}

fn some_set() -> impl Strategy<Value = BackendSet> {
    prop::collection::vec(some_backend(), 0..8).prop_map(|mut backends| {
        backends.sort_by_key(|b| (b.state, b.addr));
        set_of(backends)
    })
}

fn some_frontend() -> impl Strategy<Value = Frontend> {
    let at = (0..3u8, prop::sample::select(vec![0, 80, 81, 82]));
    let sets = (prop::option::weighted(0.9, 0..4usize), prop::option::weighted(0.9, 0..4usize));
    (at, sets, prop::sample::select(vec!["", "http"]), prop::bool::weighted(0.05)).prop_map(
        |((addr, port), (external, internal), name, maglev)| {
            let plain = frontend([192, 0, 2, addr], port, 0);
            if port == 0 {
                return plain;
            }
            let flags = plain.flags | if maglev { frontend_flags::MAGLEV } else { 0 };
            Frontend { external, internal, port_name: name.into(), flags, ..plain }
        },
    )
}

fn some_service() -> impl Strategy<Value = Compiled> {
    (prop::collection::vec(some_frontend(), 0..6), prop::collection::vec(some_set(), 1..4))
        .prop_map(|(frontends, sets)| Compiled { frontends, sets, problems: Vec::new() })
}

#[derive(Clone, Debug)]
enum Act {
    Update(u8, Compiled),
    Remove(u8),
    /// Update to what it is already.
    Again(u8),
    Restart,
    Prune,
}

fn some_act() -> impl Strategy<Value = Act> {
    prop_oneof![
        12 => (0..4u8, some_service()).prop_map(|(who, what)| Act::Update(who, what)),
        3 => (0..4u8).prop_map(Act::Remove),
        2 => (0..4u8).prop_map(Act::Again),
        1 => Just(Act::Restart),
        1 => Just(Act::Prune),
    ]
}

fn some_limits() -> impl Strategy<Value = Limits> {
    prop_oneof![
        Just(Limits::default()),
        (4..10u32, 1..40u32, 2..16u32).prop_map(|(frontends, slots, backends)| Limits { frontends, slots, backends }),
    ]
}

fn name(who: u8) -> ServiceKey {
    service(&format!("s{who}"))
}

fn target(b: &BackendRef) -> super::planner::Target {
    (b.addr.into(), kinesin_abi::Be16::new(b.port), b.proto)
}

struct World {
    limits: Limits,
    planner: Planner,
    maps: Model,
    /// What was planned last for each service.
    now: BTreeMap<u8, Compiled>,
    /// Backends that each service ever had.
    ever: HashMap<ServiceKey, BTreeSet<super::planner::Target>>,
    /// Services that have, or may have since the restart, the id of a service port.
    owners: HashMap<u32, BTreeSet<ServiceKey>>,
    restarted: bool,
}

impl World {
    fn new(limits: Limits) -> Self {
        Self {
            limits,
            planner: Planner::new(limits),
            maps: Model::default(),
            now: BTreeMap::new(),
            ever: HashMap::new(),
            owners: HashMap::new(),
            restarted: false,
        }
    }

    fn note_owners(&mut self, replace: bool) {
        for (id, port) in &self.planner.port_ids {
            let Some(owner) = port.owner.and_then(|no| self.planner.names.get(&no)) else { continue };
            let owners = self.owners.entry(*id).or_default();
            if replace {
                owners.clear();
            }
            owners.insert(owner.clone());
        }
    }

    /// Applies a plan write by write; after each one, no packet may meet a hole or a stranger.
    fn apply(&mut self, ops: &[Op]) {
        self.note_owners(false);
        for op in ops {
            self.maps.apply(op, self.limits);
            for (key, value) in &self.maps.frontends {
                for found in self.maps.reachable(value) {
                    let found = (found.addr, found.port, found.proto);
                    let owners = self.owners.get(&value.service).into_iter().flatten();
                    let known = owners.filter_map(|owner| self.ever.get(owner)).any(|ever| ever.contains(&found));
                    assert!(known, "{key:?} leads to {found:?} of somebody else, after {op:?} of {ops:?}");
                }
            }
        }
        if !self.restarted {
            self.note_owners(true);
        }
        assert_eq!(self.maps.read(), self.planner.expected());
        audit(&self.planner);
    }

    fn act(&mut self, act: Act) {
        match act {
            Act::Update(who, what) => {
                let key = name(who);
                let backends = what.sets.iter().flat_map(|set| set.backends.iter()).map(target);
                self.ever.entry(key.clone()).or_default().extend(backends);
                let before = self.planner.clone();
                match self.planner.update(&key, &what) {
                    Ok(ops) => {
                        self.apply(&ops);
                        self.now.insert(who, what);
                    }
                    Err(PlanError::Full { .. }) => assert!(self.planner == before, "a refusal changes nothing"),
                }
            }
            Act::Remove(who) => {
                let ops = self.planner.remove(&name(who));
                self.apply(&ops);
                self.now.remove(&who);
            }
            Act::Again(who) => {
                let Some(what) = self.now.get(&who) else { return };
                // Right after a restart there may be something to claim, and what could not be handed over is tried again.
                let settled = !self.restarted && self.planner.services[&name(who)].full.is_none();
                if let Ok(ops) = self.planner.update(&name(who), what) {
                    assert!(!settled || ops.is_empty(), "{ops:?}");
                    self.apply(&ops);
                }
            }
            Act::Restart => {
                self.planner = Planner::new(self.limits);
                let repairs = self.planner.adopt(self.maps.read());
                assert_eq!(repairs, [], "nothing contradicts itself");
                self.restarted = true;
                self.apply(&[]);
            }
            Act::Prune => self.prune(),
        }
    }

    /// All sources report, then nobody is unknown.
    fn prune(&mut self) {
        for (who, what) in self.now.clone() {
            match self.planner.update(&name(who), &what) {
                Ok(ops) => self.apply(&ops),
                Err(_) => drop(self.now.remove(&who)),
            }
        }
        let ops = self.planner.prune();
        self.apply(&ops);
        // Services that had no room before now may have it.
        self.restarted = false;
        self.owners.clear();
        self.note_owners(true);
    }
}

/// The planner's books agree with each other.
fn audit(planner: &Planner) {
    let mut end = 0;
    let mut reserved = 0;
    let mut held: HashMap<BackendId, u32> = HashMap::new();
    for (base, range) in &planner.ranges {
        assert!(*base >= end, "ranges overlap");
        assert!(range.slots.len() <= range.capacity as usize && !range.slots.is_empty());
        end = base + range.capacity;
        reserved += range.capacity;
        range.slots.iter().for_each(|id| *held.entry(*id).or_default() += 1);
        let leading = planner.frontends.values().flat_map(|f| references(&f.value)).filter(|s| s.base == *base);
        assert_eq!(leading.count() as u32, range.refs);
        let leads = |f: &super::planner::Front| references(&f.value).any(|s| s.base == *base);
        let selects = |f: &super::planner::Front| {
            f.value.flags & frontend_flags::MAGLEV != 0 && f.value.external.count > 0 && f.value.external.base == *base
        };
        // Adopted tables are taken as they are; others hold just the set, and only where somebody selects from them.
        if !planner.frontends.values().any(|f| leads(f) && f.adopted) {
            assert_eq!(range.maglev.is_some(), planner.frontends.values().any(selects));
            let members: BTreeSet<_> = range.slots.iter().collect();
            assert!(range.maglev.iter().all(|table| table.iter().collect::<BTreeSet<_>>() == members));
        }
    }
    assert!(end <= planner.limits.slots);
    assert_eq!(planner.free_slots.reserved(), reserved);
    for (id, entry) in &planner.backends {
        assert_eq!(held.remove(id).unwrap_or(0), entry.slots);
        assert!(entry.slots > 0 || !entry.wants.is_empty());
    }
    assert!(held.is_empty());
    let all = u64::from(planner.limits.backends.saturating_sub(1));
    assert_eq!(planner.free_backends.available() + planner.backends.len() as u64, all);
    // One id, one service: also while adopted frontends are around.
    let mut users: HashMap<u32, BTreeSet<u32>> = HashMap::new();
    for front in planner.frontends.values().filter(|front| front.value.service != 0) {
        users.entry(front.value.service).or_default().extend(front.claims.iter().map(|claim| claim.0));
    }
    for (id, users) in users {
        assert!(users.len() <= 1, "id {id} is used by {users:?}");
        let port = &planner.port_ids[&id];
        assert!(port.owner == users.first().copied() || (users.is_empty() && port.adopted > 0));
    }
    for (key, service) in &planner.services {
        assert_eq!(planner.names[&service.no], *key);
        assert!(service.frontends.iter().all(|at| planner.frontends[at].claims.iter().any(|c| c.0 == service.no)));
        assert!(service.lost.iter().all(|at| planner.waiting[at].contains(&service.no)));
    }
}

/// Nonsense that a planner may find in maps of these sizes.
fn garbage(limits: Limits) -> impl Strategy<Value = Actual> {
    let slots = limits.slots;
    let some_ref = (0..slots + 2, prop_oneof![0..5u32, Just(u32::MAX)]);
    let key = (0..3u8, prop::sample::select(vec![0u16, 80, 81, 82, 83])).prop_map(|(addr, port)| FrontendKey {
        addr: std::net::IpAddr::from([192, 0, 2, addr]).into(),
        port: kinesin_abi::Be16::new(port),
        proto: if port == 0 { proto::ANY } else { proto::TCP },
        pad: 0,
    });
    let value = (0..1024u32, prop_oneof![0..4u32, Just(u32::MAX)], some_ref.clone(), some_ref).prop_map(
        |(flags, service, external, internal)| FrontendValue {
            flags,
            service,
            affinity: 0,
            external: SetRef { base: external.0, count: external.1 },
            internal: SetRef { base: internal.0, count: internal.1 },
        },
    );
    let backend = (0..6u8, 0..7u8, 0..4u32).prop_map(|(last, state, flags)| Backend {
        addr: std::net::IpAddr::from([10, 42, 0, last]).into(),
        port: kinesin_abi::Be16::new(8080),
        proto: proto::TCP,
        state,
        flags,
    });
    let table = (0..slots, 1..4u32, prop::bool::ANY).prop_map(|(base, id, whole)| {
        let len = if whole { MAGLEV_TABLE_SIZE as usize + 3 } else { 5 };
        (base, Arc::<[BackendId]>::from(vec![id; len]))
    });
    // The hash cannot hold more than its size; keys may repeat here, the maps' cannot.
    let frontends = prop::collection::btree_map(key, value, 0..limits.frontends.min(10) as usize);
    let most = limits.slots as usize;
    (
        frontends.prop_map(|map| map.into_iter().collect()),
        prop::collection::btree_map(0..slots, 1..limits.backends + 2, most / 2..=most)
            .prop_map(|map| map.into_iter().collect()),
        prop::collection::btree_map(1..limits.backends, backend, 0..limits.backends as usize)
            .prop_map(|map| map.into_iter().collect()),
        prop::collection::btree_map(table.clone().prop_map(|t| t.0), table.prop_map(|t| t.1), 0..3)
            .prop_map(|map| map.into_iter().collect()),
    )
        .prop_map(|(frontends, slots, backends, maglev)| Actual { frontends, slots, backends, maglev })
}

const SMALL: Limits = Limits { frontends: 16, slots: 24, backends: 8 };

fn roomy_services() -> impl Strategy<Value = Vec<(u8, Compiled)>> {
    prop::collection::vec((0..4u8, some_service()), 0..5)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn maps_follow_plans_and_every_prefix_of_a_plan_is_safe(
        limits in some_limits(),
        acts in prop::collection::vec(some_act(), 1..25),
    ) {
        let mut world = World::new(limits);
        for act in acts {
            world.act(act);
        }
        for who in 0..4 {
            world.act(Act::Remove(who));
        }
        world.now.clear();
        world.prune();
        prop_assert_eq!(world.maps.read(), Actual::default());
        prop_assert_eq!(world.planner.stats(), Stats::default());
        prop_assert!(world.planner.port_ids.is_empty() && world.planner.waiting.is_empty());
        prop_assert!(world.planner.free_slots == super::alloc::Slots::new(limits.slots));
    }

    #[test]
    fn a_restart_with_the_same_services_changes_nothing(
        services in roomy_services(),
        order in Just((0..4u8).collect::<Vec<_>>()).prop_shuffle(),
    ) {
        let mut world = World::new(Limits::default());
        for (who, what) in services {
            world.act(Act::Update(who, what));
        }
        // Who came first in a conflict is not written in the maps.
        for who in 0..4 {
            if !world.planner.problems(&name(who)).is_empty() {
                world.act(Act::Remove(who));
            }
        }
        let expected = world.planner.expected();
        let mut again = Planner::new(world.limits);
        prop_assert_eq!(again.adopt(world.maps.read()), []);
        for who in order {
            if let Some(what) = world.now.get(&who) {
                prop_assert_eq!(again.update(&name(who), what).unwrap(), []);
            }
        }
        prop_assert_eq!(again.prune(), []);
        prop_assert_eq!(again.expected(), expected);
        audit(&again);
    }

    #[test]
    fn whatever_is_adopted_ends_as_what_is_expected(
        found in garbage(SMALL),
        services in roomy_services(),
    ) {
        let mut planner = Planner::new(SMALL);
        let mut maps = Model::of(found.clone());
        maps.apply_all(&planner.adopt(found), SMALL);
        maps.backends.retain(|_, backend| *backend != Backend::default());
        audit(&planner);
        maps.check();
        for (who, what) in &services {
            if let Ok(ops) = planner.update(&name(*who), what) {
                for op in &ops {
                    maps.apply(op, SMALL);
                    maps.check();
                }
            }
            audit(&planner);
            let expected = planner.expected();
            prop_assert_eq!(maps.read(), expected);
        }
        maps.apply_all(&planner.prune(), SMALL);
        audit(&planner);
        prop_assert_eq!(maps.read(), planner.expected());
        for who in 0..4 {
            maps.apply_all(&planner.remove(&name(who)), SMALL);
        }
        prop_assert_eq!(maps.read(), Actual::default());
    }

    #[test]
    fn tampered_maps_are_restored(
        services in roomy_services(),
        found in garbage(SMALL),
        dropped in prop::collection::vec(any::<prop::sample::Index>(), 0..6),
    ) {
        let mut planner = Planner::new(SMALL);
        let mut maps = Model::default();
        for (who, what) in &services {
            if let Ok(ops) = planner.update(&name(*who), what) {
                maps.apply_all(&ops, SMALL);
            }
        }
        let good = maps.read();
        prop_assert_eq!(planner.repair(&good), []);
        for index in dropped {
            let actual = maps.read();
            if !actual.frontends.is_empty() {
                maps.frontends.remove(&index.get(&actual.frontends).0);
            }
            if !actual.slots.is_empty() {
                maps.slots.remove(&index.get(&actual.slots).0);
            }
            if !actual.backends.is_empty() {
                maps.backends.remove(&index.get(&actual.backends).0);
            }
        }
        let found = Model::of(found);
        maps.frontends.extend(found.frontends);
        maps.slots.extend(found.slots);
        maps.backends.extend(found.backends);
        maps.maglev.extend(found.maglev);
        // The frontends hash cannot have held more than fits.
        while maps.frontends.len() > SMALL.frontends as usize {
            let last = *maps.frontends.keys().max().unwrap();
            maps.frontends.remove(&last);
        }
        let repairs = planner.repair(&maps.read());
        maps.apply_all(&repairs, SMALL);
        let mut now = maps.read();
        // Tables are read back with padding and may keep it.
        now.maglev.iter_mut().for_each(|(_, table)| *table = super::phases::trimmed(table).into());
        prop_assert_eq!(now, good);
    }

    #[test]
    fn merged_plans_end_the_same_and_are_as_safe(
        limits in some_limits(),
        steps in prop::collection::vec((0..4u8, prop::option::weighted(0.8, some_service())), 1..8),
    ) {
        let mut planner = Planner::new(limits);
        let mut plans = Vec::new();
        for (who, what) in &steps {
            plans.push(match what {
                Some(what) => planner.update(&name(*who), what).unwrap_or_default(),
                None => planner.remove(&name(*who)),
            });
        }
        let mut maps = Model::default();
        for op in in_phases(plans) {
            maps.apply(&op, limits);
            maps.check();
        }
        prop_assert_eq!(maps.read(), planner.expected());
    }

    #[test]
    fn ranges_and_ids_are_given_out_once_and_come_back(
        limit in 0..70u32,
        steps in prop::collection::vec((0..3u8, 0..70u32, 0..20u32), 0..40),
    ) {
        let (mut slots, mut ids) = (super::alloc::Slots::new(limit), super::alloc::Ids::new(1, limit));
        let (mut ranges, mut taken): (Vec<(u32, u32)>, BTreeSet<u32>) = Default::default();
        for (what, at, len) in steps {
            match what {
                0 => {
                    let capacity = len.next_power_of_two();
                    if let Some(base) = slots.allocate(capacity) {
                        ranges.push((base, capacity));
                    }
                    let lowest = (1..=limit).find(|id| !taken.contains(id));
                    prop_assert_eq!(ids.lowest(), lowest);
                    taken.extend(lowest);
                }
                1 => {
                    let free = at + len <= limit && ranges.iter().all(|(b, l)| at + len <= *b || b + l <= at);
                    // An empty range is always free; nothing is taken then.
                    prop_assert_eq!(slots.reserve(at, len), free || len == 0);
                    if free && len > 0 {
                        ranges.push((at, len));
                    }
                    prop_assert_eq!(ids.take(at), (1..=limit).contains(&at) && taken.insert(at));
                }
                _ => {
                    if !ranges.is_empty() {
                        let (base, len) = ranges.swap_remove(at as usize % ranges.len());
                        slots.release(base, len);
                    }
                    if taken.remove(&at) {
                        ids.release(at);
                    }
                }
            }
            ranges.sort();
            prop_assert!(ranges.windows(2).all(|w| w[0].0 + w[0].1 <= w[1].0));
            prop_assert_eq!(slots.reserved(), ranges.iter().map(|(_, len)| len).sum::<u32>());
            prop_assert_eq!(ids.available(), u64::from(limit) - taken.len() as u64);
        }
        for (base, len) in ranges {
            slots.release(base, len);
        }
        prop_assert!(slots == super::alloc::Slots::new(limit));
    }
}
