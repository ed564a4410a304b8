//! What maps mean to clients: numbers and places resolved, so that two maps with the same meaning are equal here.
//!
//! Deliberately absent: what is not wrong yet means nothing to clients, such as spare slots of a block.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use kinesin_abi::{Backend, BackendId, FrontendKey, SetRef, SourceRangeKey, frontend_flags};

use super::Actual;
use crate::maglev::protocol_name;
use crate::services::address_text;

/// The whole of [`Actual`], free of ids.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Meaning {
    /// Everything that clients can connect to.
    pub frontends: BTreeMap<FrontendKey, FrontendMeaning>,
    /// Every backend, also those that no frontend leads to (they take no new connections).
    pub backends: BTreeSet<Backend>,
    /// What no planner writes: frontends that lead to nothing, and entries that nothing leads to. For people.
    pub faults: Vec<String>,
}

/// What a frontend means.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FrontendMeaning {
    /// [`kinesin_abi::frontend_flags`]
    pub flags: u32,
    /// Session affinity timeout, seconds.
    pub affinity: u32,
    /// The least frontend of the same service port: they share affinity and source ranges. None for wildcards.
    pub port: Option<FrontendKey>,
    /// Backends for traffic from outside.
    pub external: BTreeSet<Backend>,
    /// Backends for traffic from the cluster.
    pub internal: BTreeSet<Backend>,
    /// Maglev tables of both, entry by entry; empty where there is none, or the frontend does not ask it.
    pub tables: [Vec<Backend>; 2],
    /// Source ranges of the service port, under service 0.
    pub ranges: BTreeSet<SourceRangeKey>,
}

impl Actual {
    /// What these maps mean. O(size of the maps).
    pub fn meaning(&self) -> Meaning {
        let slots: HashMap<u32, BackendId> = self.slots.iter().copied().collect();
        let backends: HashMap<BackendId, Backend> = self.backends.iter().copied().collect();
        let tables: HashMap<u32, &[BackendId]> = self.maglev.iter().map(|(base, ids)| (*base, &**ids)).collect();
        let mut faults = Vec::new();
        let mut ports: HashMap<u32, FrontendKey> = HashMap::new();
        let mut used = BTreeSet::new();
        let mut frontends: Vec<_> = self.frontends.clone();
        frontends.sort_unstable_by_key(|(key, _)| *key);
        for (key, value) in &frontends {
            if value.service != 0 {
                ports.entry(value.service).or_insert(*key);
            }
        }
        let mut resolved = BTreeMap::new();
        for (key, value) in frontends {
            let name = || frontend_text(&key);
            let mut set = |set: SetRef| {
                let mut members = BTreeSet::new();
                for slot in set.base..set.base.saturating_add(set.count) {
                    used.insert(slot);
                    let id = slots.get(&slot);
                    match id.and_then(|id| backends.get(id)) {
                        Some(backend) if !members.insert(*backend) => {
                            faults.push(format!("{} leads to {backend:?} twice", name()));
                        }
                        Some(_) => {}
                        None => faults.push(match id {
                            Some(id) => format!("{} leads to free backend {id}", name()),
                            None => format!("{} counts empty slot {slot}", name()),
                        }),
                    }
                }
                members
            };
            let (external, internal) = (set(value.external), set(value.internal));
            let tabled = value.flags & frontend_flags::MAGLEV != 0;
            let mut table = |set: SetRef| {
                let ids = tables.get(&set.base).filter(|_| tabled && set.count > 0).copied().unwrap_or_default();
                let known = |id: &BackendId| {
                    let backend = backends.get(id).copied();
                    if backend.is_none() {
                        faults.push(format!("{} has a table with free backend {id}", name()));
                    }
                    backend.unwrap_or_default()
                };
                ids.iter().map(known).collect()
            };
            let tables = [table(value.external), table(value.internal)];
            let ranges = self.source_ranges.iter().filter(|range| range.range.service == value.service);
            let meaning = FrontendMeaning {
                flags: value.flags,
                affinity: value.affinity,
                port: ports.get(&value.service).copied(),
                external,
                internal,
                tables,
                ranges: ranges.map(|range| anonymous(*range)).collect(),
            };
            resolved.insert(key, meaning);
        }
        faults.extend(self.orphans(&used, &ports));
        Meaning { frontends: resolved, backends: backends.values().copied().collect(), faults }
    }

    /// Entries that no frontend leads to.
    fn orphans(&self, used: &BTreeSet<u32>, ports: &HashMap<u32, FrontendKey>) -> Vec<String> {
        let slots = self.slots.iter().filter(|(slot, _)| !used.contains(slot));
        let slots = slots.map(|(slot, id)| format!("slot {slot} holds backend {id} and no frontend counts it"));
        let tables = self.maglev.iter().filter(|(base, _)| !used.contains(base));
        let tables = tables.map(|(base, _)| format!("table {base} belongs to no frontend"));
        let ranges = self.source_ranges.iter().filter(|range| !ports.contains_key(&range.range.service));
        let ranges =
            ranges.map(|range| format!("a source range belongs to service {}, which is none", range.range.service));
        slots.chain(tables).chain(ranges).collect()
    }
}

fn anonymous(mut range: SourceRangeKey) -> SourceRangeKey {
    range.range.service = 0;
    range
}

fn frontend_text(key: &FrontendKey) -> String {
    format!("{}/{}", address_text(IpAddr::from(key.addr), key.port.get()), protocol_name(key.proto))
}
