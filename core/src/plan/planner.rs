//! What the maps should hold, and who it belongs to.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use kinesin_abi::{
    Addr, BACKEND_LOCAL, Backend, BackendId, BackendState, Be16, FrontendKey, FrontendValue, MAGLEV_TABLE_SIZE, SetRef,
    proto,
};
use smol_str::SmolStr;
use thiserror::Error;

use super::alloc::{Ids, Slots};
use super::phases::difference;
use super::transaction::Transaction;
use super::{Actual, Op};
use crate::maglev::{self, HashSeed};
use crate::services::{Compiled, ServiceKey};

/// How many entries the maps have room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Entries of the frontends hash.
    pub frontends: u32,
    /// Length of the slots array.
    pub slots: u32,
    /// Length of the backends array; index 0 is never used.
    pub backends: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self { frontends: 65_536, slots: 65_536, backends: 65_536 }
    }
}

/// Why a service was not planned; what was planned before stays as it was.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum PlanError {
    /// A map has no room for what the service needs.
    #[error("no room in the map `{table}` of {limit} entries; raise `bpf-lb-map-max`")]
    Full {
        /// `frontends`, `slots` or `backends`.
        table: &'static str,
        /// Its size.
        limit: u32,
    },
}

/// How much of the maps is in use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Services that have been planned.
    pub services: usize,
    /// Frontends, wildcards included.
    pub frontends: usize,
    /// Slots that are taken, spare room of the sets included.
    pub slots: usize,
    /// Backends.
    pub backends: usize,
}

/// A service's number, for the lifetime of a planner.
pub(super) type No = u32;

/// Stands for the unknown services of adopted entries.
pub(super) const ADOPTED: No = 0;

/// A backend's identity.
pub(super) type Target = (Addr, Be16, u8);

#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Service {
    pub(super) no: No,
    /// Ids of its ports, by name and protocol.
    pub(super) ports: BTreeMap<(SmolStr, u8), u32>,
    /// Frontends that it has, shared wildcards included.
    pub(super) frontends: BTreeSet<FrontendKey>,
    /// Frontends that another service has.
    pub(super) lost: BTreeSet<FrontendKey>,
    pub(super) backends: BTreeSet<BackendId>,
    /// Bases of the ranges that its frontends lead to.
    pub(super) ranges: BTreeSet<u32>,
    /// Kept for the day that a lost frontend becomes free.
    pub(super) pending: Option<Compiled>,
    /// Why a frontend that became free could not be taken.
    pub(super) full: Option<PlanError>,
}

#[derive(Clone, Debug, PartialEq)]
pub(super) struct Front {
    pub(super) value: FrontendValue,
    /// Found in the maps, and not settled yet.
    pub(super) adopted: bool,
    /// Whose it is and the flags they want; at most one unless it is a wildcard.
    pub(super) claims: Vec<(No, u32)>,
}

#[derive(Clone, Debug, PartialEq)]
pub(super) struct Range {
    pub(super) capacity: u32,
    /// What `base..` holds; no longer than `capacity`.
    pub(super) slots: Vec<BackendId>,
    /// How many set references of frontends lead here.
    pub(super) refs: u32,
    /// `None` until a service claims it.
    pub(super) owner: Option<No>,
    pub(super) maglev: Option<Arc<[BackendId]>>,
    /// The table was computed here, not adopted.
    pub(super) checked: bool,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct BackendEntry {
    pub(super) value: Backend,
    /// Who has it in a set, and how.
    pub(super) wants: Vec<(No, BackendState, bool)>,
    /// How many slots hold it.
    pub(super) slots: u32,
}

impl BackendEntry {
    /// Whoever lets most through decides: an established connection outlives a disagreement.
    pub(super) fn settled(&self) -> Backend {
        let Some(state) = self.wants.iter().map(|(_, state, _)| *state).min() else { return self.value };
        let local = self.wants.iter().any(|(_, _, local)| *local);
        Backend { state: state as u8, flags: if local { BACKEND_LOCAL } else { 0 }, ..self.value }
    }
}

/// Who uses the id of a service port.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct PortId {
    pub(super) owner: Option<No>,
    /// Adopted frontends that carry it.
    pub(super) adopted: u32,
}

/// Gives out ids and ranges of slots, and knows what the maps should hold.
///
/// Pure: it is told what was found in the maps once ([`Planner::adopt`]) and answers every change with the writes that
/// it takes. The writes are expected to happen in order; what fails is made good by [`Planner::repair`].
#[derive(Clone, Debug, PartialEq)]
pub struct Planner {
    pub(super) limits: Limits,
    pub(super) seed: HashSeed,
    pub(super) services: HashMap<ServiceKey, Service>,
    pub(super) names: HashMap<No, ServiceKey>,
    pub(super) next_no: No,
    pub(super) frontends: HashMap<FrontendKey, Front>,
    /// Who wants a frontend that another service has, in the order they asked.
    pub(super) waiting: HashMap<FrontendKey, Vec<No>>,
    pub(super) ranges: BTreeMap<u32, Range>,
    pub(super) free_slots: Slots,
    pub(super) backends: HashMap<BackendId, BackendEntry>,
    pub(super) by_target: HashMap<Target, BackendId>,
    pub(super) free_backends: Ids,
    pub(super) port_ids: HashMap<u32, PortId>,
    pub(super) free_port_ids: Ids,
    pub(super) last_port_id: u32,
}

impl Planner {
    /// For empty maps, with the default seed.
    pub fn new(limits: Limits) -> Self {
        Self::with_seed(limits, HashSeed::default())
    }

    /// For empty maps.
    pub fn with_seed(limits: Limits, seed: HashSeed) -> Self {
        Self {
            limits,
            seed,
            services: HashMap::new(),
            names: HashMap::new(),
            next_no: ADOPTED + 1,
            frontends: HashMap::new(),
            waiting: HashMap::new(),
            ranges: BTreeMap::new(),
            free_slots: Slots::new(limits.slots),
            backends: HashMap::new(),
            by_target: HashMap::new(),
            free_backends: Ids::new(1, limits.backends.saturating_sub(1)),
            port_ids: HashMap::new(),
            free_port_ids: Ids::new(1, u32::MAX),
            last_port_id: 0,
        }
    }

    /// Plans a service as it is now, in place of what was planned for it before. The least writes that it takes, in a
    /// safe order, at a cost that depends on this service alone (and on those that wait for a frontend of it).
    ///
    /// A frontend that another service has stays there until that one lets go of it; see [`Planner::problems`].
    ///
    /// # Errors
    /// When a map has no room. A set that outgrows its range needs the new range beside the old one.
    pub fn update(&mut self, key: &ServiceKey, compiled: &Compiled) -> Result<Vec<Op>, PlanError> {
        let mut tx = Transaction::default();
        self.plan(key, compiled, &mut tx)?;
        self.hand_over(&mut tx);
        Ok(self.finish(tx))
    }

    /// Plans the end of a service. Frontends that others wait for go to them. No ops for an unknown one.
    pub fn remove(&mut self, key: &ServiceKey) -> Vec<Op> {
        let mut tx = Transaction::default();
        // Nothing needs no room, so this cannot fail.
        if self.services.contains_key(key) && self.plan(key, &Compiled::default(), &mut tx).is_ok() {
            self.hand_over(&mut tx);
        }
        let ops = self.finish(tx);
        if let Some(service) = self.services.remove(key) {
            self.names.remove(&service.no);
        }
        ops
    }

    /// Writes that bring maps that hold `actual` to what they should hold: entries that were deleted, changed or added
    /// by somebody else. Adopted entries that nobody claimed yet should still be there, until [`Planner::prune`].
    pub fn repair(&self, actual: &Actual) -> Vec<Op> {
        difference(&self.expected(), actual, self.limits)
    }

    /// What the maps should hold now, sorted.
    pub fn expected(&self) -> Actual {
        let mut frontends: Vec<_> = self.frontends.iter().map(|(key, front)| (*key, front.value)).collect();
        frontends.sort_unstable_by_key(|(key, _)| *key);
        let mut backends: Vec<_> = self.backends.iter().map(|(id, entry)| (*id, entry.value)).collect();
        backends.sort_unstable_by_key(|(id, _)| *id);
        let slots = self.ranges.iter().flat_map(|(base, range)| (*base..).zip(range.slots.iter().copied())).collect();
        let tables = self.ranges.iter().filter_map(|(base, range)| Some((*base, range.maglev.clone()?)));
        Actual { frontends, slots, backends, maglev: tables.collect() }
    }

    /// Who has a frontend; of those that share a wildcard, the first. `None` for adopted ones that nobody claimed yet.
    pub fn owner_of(&self, frontend: &FrontendKey) -> Option<&ServiceKey> {
        let (no, _) = self.frontends.get(frontend)?.claims.first()?;
        self.names.get(no)
    }

    /// How much of the maps is in use.
    pub fn stats(&self) -> Stats {
        Stats {
            services: self.services.len(),
            frontends: self.frontends.len(),
            slots: self.free_slots.reserved() as usize,
            backends: self.backends.len(),
        }
    }

    /// Frontends of a service that it cannot have now, each with the reason. Others' updates change this: ask for all
    /// services when status is written.
    pub fn problems(&self, key: &ServiceKey) -> Vec<String> {
        let Some(service) = self.services.get(key) else { return Vec::new() };
        service
            .lost
            .iter()
            .map(|frontend| match (self.owner_of(frontend), &service.full) {
                (Some(owner), _) => {
                    format!("{} is already used by service {owner}; change one of the two", display(frontend))
                }
                (None, Some(full)) => format!("{} is not programmed: {full}", display(frontend)),
                (None, None) => format!("{} is not programmed", display(frontend)),
            })
            .collect()
    }

    /// The table of a set of backends.
    pub(super) fn table(&self, slots: &[BackendId]) -> Arc<[BackendId]> {
        let keys: Vec<_> = slots
            .iter()
            .filter_map(|id| {
                let backend = &self.backends.get(id)?.value;
                let key = maglev::backend_key(backend.addr.into(), backend.port.get(), backend.proto);
                Some(maglev::Entry { key, id: *id, weight: 1 })
            })
            .collect();
        maglev::table(&keys, MAGLEV_TABLE_SIZE, &self.seed).into()
    }
}

/// A wildcard: it only drops, and services share it.
pub(super) fn is_wildcard(key: &FrontendKey) -> bool {
    key.port.get() == 0
}

/// The set references of a frontend that lead to slots.
pub(super) fn references(value: &FrontendValue) -> impl Iterator<Item = SetRef> + use<> {
    [value.external, value.internal].into_iter().filter(|set| set.count > 0)
}

/// `10.96.0.1:80/TCP`
fn display(key: &FrontendKey) -> String {
    let at = SocketAddr::new(IpAddr::from(key.addr), key.port.get());
    match key.proto {
        proto::TCP => format!("{at}/TCP"),
        proto::UDP => format!("{at}/UDP"),
        proto::SCTP => format!("{at}/SCTP"),
        other => format!("{at}/{other}"),
    }
}
