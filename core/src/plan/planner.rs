//! The planner as others see it: services come and go, ops come out.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::IpAddr;

use kinesin_abi::{Backend, FrontendKey, FrontendValue, MAGLEV_TABLE_SIZE, frontend_flags};

use super::image::{BackendKey, Image, key_of};
use super::phases;
use super::service::{Record, backend_keys, key_of_ref};
use super::stages::Stages;
use super::{Actual, Op};
use crate::maglev::{HashSeed, protocol_name};
use crate::services::{BackendRef, BackendSet, Compiled, ServiceKey, address_text, object_of};

/// Sizes of the maps, and what Maglev tables are made with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Entries of the frontends hash.
    pub frontends: u32,
    /// Elements of the slots array. Blocks are powers of two, so it should be twice what is needed, or more.
    pub slots: u32,
    /// Elements of the backends array; element 0 is not used.
    pub backends: u32,
    /// Entries of the hash of Maglev tables.
    pub maglev_tables: u32,
    /// Entries of the source ranges trie.
    pub source_ranges: u32,
    /// Entries of one table (`bpf-lb-maglev-table-size`): a prime.
    pub maglev_size: u32,
    /// `bpf-lb-maglev-hash-seed`
    pub maglev_seed: HashSeed,
}

impl Default for Limits {
    /// The defaults of `bpf-lb-map-max` and the Maglev keys, with four slots for each backend.
    fn default() -> Self {
        Self {
            frontends: 65_536,
            slots: 262_144,
            backends: 65_536,
            maglev_tables: 65_536,
            source_ranges: 65_536,
            maglev_size: MAGLEV_TABLE_SIZE,
            maglev_seed: HashSeed::default(),
        }
    }
}

/// Why a service cannot be programmed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// A map has no room. Nothing was changed; trying again later makes sense (R27).
    #[error("the {table} map is full ({capacity} entries): raise {key} or remove services")]
    Full {
        /// `frontends`, `slots`, `backends`, `maglev`, `ranges`
        table: &'static str,
        /// Its capacity.
        capacity: u32,
        /// The configuration key that raises it.
        key: &'static str,
    },
}

/// How full the maps are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Services that have, or wait for, frontends.
    pub services: usize,
    /// Entries of the frontends map, wildcards included.
    pub frontends: usize,
    /// Wildcards among them.
    pub wildcards: usize,
    /// Found at the start and not claimed so far.
    pub unclaimed: usize,
    /// Backends in use.
    pub backends: usize,
    /// Slots in blocks, spare ones included.
    pub slots: usize,
    /// Backend sets.
    pub sets: usize,
    /// Maglev tables.
    pub maglev_tables: usize,
    /// Source ranges.
    pub source_ranges: usize,
    /// Frontends that a service wants and another one has.
    pub conflicts: usize,
}

/// Turns what services mean into ops, and knows what the maps hold after them.
///
/// Cost of an update: the size of that service, and ops only for what differs. Nothing here iterates over other services,
/// except [`Self::adopt`], [`Self::prune`], [`Self::repair`] and [`Self::expected`], which are about everything.
///
/// Rules:
/// - A set lies in a block of `2^n` slots, of which the first `count` are in use. It changes in place where it can.
/// - A backend (address, port, protocol) has one id, whoever uses it. When services disagree about its state, the best one
///   stands (active before terminating, terminating-not-serving, maintenance); it is local if any of them says so.
/// - Backends that take no new connections stay in the backends map, without slots, until their service drops them.
/// - The first service to claim a frontend keeps it. Others wait, in order, see [`Self::problems`], and get it when it
///   becomes free. Wildcards are shared.
/// - Every prefix of the ops is safe: no frontend counts an empty slot, no slot holds a free backend.
/// - While source ranges change, a client is treated as before or as after, never otherwise (R40).
/// - The backends of `default/kubernetes` are never all taken away (R25).
#[derive(Debug)]
pub struct Planner {
    pub(super) image: Image,
    pub(super) services: HashMap<ServiceKey, Box<Record>>,
    /// Who waits for a frontend, first come first.
    pub(super) waiting: HashMap<FrontendKey, Vec<ServiceKey>>,
    /// Ids of service ports in use.
    pub(super) ids: HashSet<u32>,
    /// Ids that adopted frontends carry, until the prune.
    pub(super) adopted_ids: HashSet<u32>,
    pub(super) next_id: u32,
}

impl Planner {
    /// A planner for empty maps of these sizes. Use [`Self::adopt`] for maps that hold something.
    pub fn new(limits: Limits) -> Self {
        Self {
            image: Image::new(limits),
            services: HashMap::new(),
            waiting: HashMap::new(),
            ids: HashSet::new(),
            adopted_ids: HashSet::new(),
            next_id: 1,
        }
    }

    /// Plans what a new or changed service needs.
    ///
    /// # Errors
    /// [`PlanError::Full`], and then everything stays as it was, in the maps and here. A service that gives up as many
    /// backends as it adds is served in a full map too, the old ones leaving before the new ones come.
    pub fn update(&mut self, key: &ServiceKey, compiled: &Compiled) -> Result<Vec<Op>, PlanError> {
        let mut ops = Vec::new();
        let freed = match self.apply(key, compiled, &mut ops) {
            Err(full) if self.fits_after_leaving(key, compiled) => {
                let remaining = self.known_part(compiled);
                let mut freed = self.apply(key, &remaining, &mut ops).map_err(|_| full)?;
                // The first part must be performed in any case. Should the second one still find no room, for slots, the
                // service at least has lost its dead backends, and says what is missing.
                match self.apply(key, compiled, &mut ops) {
                    Ok(more) => freed.extend(more),
                    Err(full) => self.note_short(key, full),
                }
                freed
            }
            result => result?,
        };
        self.hand_over(freed, &mut ops);
        Ok(ops)
    }

    /// Whether the new backends of the service fit once those that only it had, and no longer wants, are gone.
    fn fits_after_leaving(&self, key: &ServiceKey, compiled: &Compiled) -> bool {
        let Some(record) = self.services.get(key) else { return false };
        let wanted: HashSet<BackendKey> = backend_keys(compiled).collect();
        let missing = wanted.iter().filter(|key| self.image.backend_id(key).is_none()).count();
        let leaving = record
            .claims
            .iter()
            .filter(|claim| self.image.only_claim(claim.id))
            .filter_map(|claim| self.image.backend(claim.id))
            .filter(|entry| !wanted.contains(&key_of(&entry.value)))
            .count();
        missing > 0
            && leaving > 0
            && self.image.backends_used() + 1 + missing - leaving <= self.image.limits.backends as usize
    }

    /// The service without the backends that nobody has so far.
    fn known_part(&self, compiled: &Compiled) -> Compiled {
        let known = |backend: &&BackendRef| self.image.backend_id(&key_of_ref(backend)).is_some();
        let sets = compiled
            .sets
            .iter()
            .map(|set| BackendSet {
                usable: set.backends.iter().take(set.usable).filter(known).count(),
                backends: set.backends.iter().filter(known).cloned().collect(),
            })
            .collect();
        Compiled { sets, ..compiled.clone() }
    }

    fn note_short(&mut self, key: &ServiceKey, full: PlanError) {
        if let Some(record) = self.services.get_mut(key) {
            record.short = Some(full);
        }
    }

    /// Plans the end of a service. What it had and others wait for goes to them.
    pub fn remove(&mut self, key: &ServiceKey) -> Vec<Op> {
        if !self.services.contains_key(key) {
            return Vec::new();
        }
        let mut ops = Vec::new();
        // Nothing is asked for, so no map can be too full.
        let freed = self.apply(key, &Compiled::default(), &mut ops).unwrap_or_default();
        self.hand_over(freed, &mut ops);
        ops
    }

    /// Plans the removal of everything that was adopted and nobody claimed. Only for when every source has delivered its
    /// first complete list (R23).
    pub fn prune(&mut self) -> Vec<Op> {
        let mut stages = Stages::default();
        let mut stale: Vec<FrontendKey> =
            self.image.frontends.iter().filter(|(_, entry)| entry.unclaimed()).map(|(key, _)| *key).collect();
        stale.sort_unstable();
        for key in stale {
            self.image.delete_frontend(key, &mut stages);
        }
        self.adopted_ids.clear();
        let stale: Vec<u32> = self.image.ranges.keys().filter(|id| !self.ids.contains(id)).copied().collect();
        for id in stale {
            self.image.set_ranges(id, BTreeSet::new(), &mut stages);
        }
        self.image.end_adoption(&mut stages);
        self.image.sweep(&mut stages);
        stages.into_ops()
    }

    /// What makes maps that hold `actual` hold what they should: for maps that somebody else has changed, and after a
    /// write that failed. Missing and foreign entries are equally fine (R03).
    pub fn repair(&self, actual: &Actual) -> Vec<Op> {
        super::adopt::difference(actual, &self.image)
    }

    /// What the maps hold once all ops so far are done, sorted by key.
    pub fn expected(&self) -> Actual {
        let mut frontends: Vec<_> = self.image.frontends.iter().map(|(key, entry)| (*key, entry.value)).collect();
        frontends.sort_unstable_by_key(|(key, _)| *key);
        let mut maglev: Vec<_> =
            self.image.tables.iter().map(|(base, table)| (*base, self.image.table(table))).collect();
        maglev.sort_unstable_by_key(|(base, _)| *base);
        Actual {
            frontends,
            slots: self.image.slots().collect(),
            backends: self.image.backends().map(|(id, entry)| (id, entry.value)).collect(),
            maglev,
            source_ranges: self.image.ranges.values().flatten().copied().collect::<BTreeSet<_>>().into_iter().collect(),
        }
    }

    /// Backends that left the maps since the last call, in order: connectionless flows to them can be ended, sockets
    /// destroyed. One that came back since is among them nevertheless, under another id.
    pub fn take_removed(&mut self) -> Vec<Backend> {
        std::mem::take(&mut self.image.removed)
    }

    /// Who has a frontend; nobody for wildcards and unclaimed ones.
    pub fn service_of(&self, frontend: &FrontendKey) -> Option<&ServiceKey> {
        self.image.frontends.get(frontend)?.owner.as_ref()
    }

    /// What of a service could not be programmed, each with the reason and the fix.
    pub fn problems(&self, key: &ServiceKey) -> Vec<String> {
        let Some(record) = self.services.get(key) else { return Vec::new() };
        let mut problems: Vec<String> = record
            .waiting
            .iter()
            .map(|frontend| {
                let address = address_text(IpAddr::from(frontend.addr), frontend.port.get());
                let protocol = protocol_name(frontend.proto);
                match self.service_of(frontend) {
                    Some(owner) => {
                        let (kind, owner) = object_of(owner);
                        format!(
                            "address {address}/{protocol} is in use by {} {owner}; give one of the two another address or port",
                            kind.to_lowercase()
                        )
                    }
                    None => format!("address {address}/{protocol} could not be taken over yet"),
                }
            })
            .collect();
        problems.extend(record.short.map(|full| format!("new endpoints are not in use: {full}")));
        if record.kept {
            problems.push(
                "no usable endpoints: the last known ones are kept, so that the API server stays reachable".to_owned(),
            );
        }
        problems
    }

    /// Merges the plans of several services that this planner made one after the other, none of which is written yet, into
    /// few large batches that are safe in the same way.
    pub fn in_phases(&self, plans: Vec<Vec<Op>>) -> Vec<Op> {
        let room = (self.image.limits.frontends as usize).saturating_sub(self.image.frontends.len());
        phases::in_phases(plans, room)
    }

    /// How full the maps are. O(frontends).
    pub fn stats(&self) -> Stats {
        let image = &self.image;
        let is_wildcard = |value: &FrontendValue| value.flags & frontend_flags::WILDCARD != 0;
        Stats {
            services: self.services.len(),
            frontends: image.frontends.len(),
            wildcards: image.frontends.values().filter(|entry| is_wildcard(&entry.value)).count(),
            unclaimed: image.frontends.values().filter(|entry| entry.unclaimed()).count(),
            backends: image.backends_used(),
            slots: image.allocator.capacity().saturating_sub(1).saturating_sub(image.allocator.left()) as usize,
            sets: image.blocks.len(),
            maglev_tables: image.tables.len(),
            source_ranges: image.ranges_used(),
            conflicts: self.waiting.values().map(Vec::len).sum(),
        }
    }

    /// Gives frontends that became free to those who wait for them.
    fn hand_over(&mut self, freed: Vec<FrontendKey>, ops: &mut Vec<Op>) {
        for frontend in freed {
            let Some(next) = self.waiting.get(&frontend).and_then(|queue| queue.first()).cloned() else { continue };
            let Some(wants) = self.services.get(&next).and_then(|record| record.wants.clone()) else { continue };
            // When there is no room it goes on waiting and its next update tries again. Taking more never frees anything
            // that a third one waits for.
            let _ = self.apply(&next, &wants, ops);
        }
    }
}
