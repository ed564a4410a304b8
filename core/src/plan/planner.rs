//! The planner: what each service wants, against what the maps hold.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use kinesin_abi::{
    BACKEND_LOCAL, Backend, BackendId, BackendState, Be16, FrontendKey, FrontendValue, MAGLEV_TABLE_SIZE, SetRef,
    frontend_flags,
};
use smol_str::SmolStr;

use super::image::{BackendKey, Claim, Image, Stages, key_of};
use super::slots::order_for;
use super::{Actual, Op};
use crate::maglev::{HashSeed, protocol_name};
use crate::services::{BackendRef, BackendSet, Compiled, ServiceKey, address_text};

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
        /// `frontends`, `slots`, `backends`, `maglev`
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
    /// Frontends that a service wants and another one has.
    pub conflicts: usize,
}

/// What the planner remembers of a service.
#[derive(Debug, Default)]
struct Record {
    /// Id of each port, by name and protocol.
    ids: BTreeMap<(SmolStr, u8), u32>,
    /// Claimed backends with the state that this service gives them.
    claims: Vec<Claim>,
    /// Frontends that it has.
    owned: Vec<FrontendKey>,
    /// Wildcards that it shares.
    wildcards: Vec<FrontendKey>,
    /// Frontends that others have.
    waiting: Vec<FrontendKey>,
    /// What it wants; kept only while it waits.
    wants: Option<Arc<Compiled>>,
    /// Backends of the API server are kept although it has none (R25).
    kept: bool,
    /// New backends did not fit.
    short: Option<PlanError>,
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
/// - The backends of `default/kubernetes` are never all taken away (R25).
#[derive(Debug)]
pub struct Planner {
    pub(super) image: Image,
    services: HashMap<Arc<ServiceKey>, Record>,
    /// Who waits for a frontend, first come first.
    waiting: HashMap<FrontendKey, Vec<Arc<ServiceKey>>>,
    /// Ids of service ports in use.
    ids: HashSet<u32>,
    /// Ids that adopted frontends carry, until the prune.
    pub(super) adopted_ids: HashSet<u32>,
    pub(super) next_id: u32,
}

/// The Service through which the agent itself may reach the API server.
fn is_api_service(key: &ServiceKey) -> bool {
    key.namespace == "default" && key.name == "kubernetes"
}

/// The backends to program for the API server's Service: `held` while `wanted` is empty, because a data path that empties
/// that set can cut its own agent off from ever hearing of new ones (R25).
pub fn keep_api_backends(key: &ServiceKey, wanted: Vec<BackendId>, held: Vec<BackendId>) -> (Vec<BackendId>, bool) {
    if is_api_service(key) && wanted.is_empty() && !held.is_empty() { (held, true) } else { (wanted, false) }
}

/// One frontend that a service wants.
struct Wanted {
    key: FrontendKey,
    flags: u32,
    affinity: u32,
    port: (SmolStr, u8),
    sets: [Option<usize>; 2],
}

/// What was taken while planning, to be given back when the plan fails.
enum Taken {
    New { base: u32, order: u8 },
    Extended { base: u32, from: u8 },
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
            .filter_map(|claim| self.image.backend(claim.id))
            .filter(|entry| entry.only_claim() && !wanted.contains(&key_of(&entry.value)))
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
        self.image.end_adoption(&mut stages);
        self.image.sweep(&mut stages);
        stages.into_ops()
    }

    /// What makes maps that hold `actual` hold what they should: for maps that somebody else has changed, and after a
    /// write that failed. Missing and foreign entries are equally fine (R03).
    pub fn repair(&self, actual: &Actual) -> Vec<Op> {
        super::adopt::difference(actual, &self.expected())
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
        }
    }

    /// Backends that left the maps since the last call, in order: connectionless flows to them can be ended, sockets
    /// destroyed. One that came back since is among them nevertheless, under another id.
    pub fn take_removed(&mut self) -> Vec<Backend> {
        std::mem::take(&mut self.image.removed)
    }

    /// Who has a frontend; nobody for wildcards and unclaimed ones.
    pub fn service_of(&self, frontend: &FrontendKey) -> Option<&ServiceKey> {
        self.image.frontends.get(frontend)?.owner.as_deref()
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
                    Some(owner) => format!(
                        "address {address}/{protocol} is in use by service {owner}; give one of the two another address or port"
                    ),
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

    /// Plans one service; returns the frontends that it gave up and others wait for.
    fn apply(
        &mut self,
        key: &ServiceKey,
        compiled: &Compiled,
        ops: &mut Vec<Op>,
    ) -> Result<Vec<FrontendKey>, PlanError> {
        let me = self.services.get_key_value(key).map_or_else(|| Arc::new(key.clone()), |(me, _)| me.clone());
        let mut record = self.services.remove(key).unwrap_or_default();
        let planned = self.plan(&me, &mut record, compiled);
        if record.owned.is_empty() && record.wildcards.is_empty() && record.waiting.is_empty() {
            debug_assert!(record.claims.is_empty());
        } else {
            self.services.insert(me, record);
        }
        let (stages, freed) = planned?;
        ops.extend(stages.into_ops());
        Ok(freed)
    }

    fn plan(
        &mut self,
        me: &Arc<ServiceKey>,
        record: &mut Record,
        compiled: &Compiled,
    ) -> Result<(Stages, Vec<FrontendKey>), PlanError> {
        let mut stages = Stages::default();

        // What is wanted, and what of that can be had.
        let (exact, wildcards) = wanted(compiled);
        let (mine, lost): (Vec<Wanted>, Vec<Wanted>) = exact.into_values().partition(|wanted| {
            self.image
                .frontends
                .get(&wanted.key)
                .is_none_or(|entry| entry.owner.as_ref().is_none_or(|owner| owner == me))
        });
        let mine_keys: BTreeSet<FrontendKey> = mine.iter().map(|wanted| wanted.key).collect();
        let dropped: Vec<FrontendKey> = record.owned.iter().filter(|key| !mine_keys.contains(key)).copied().collect();
        let dropped_wildcards: Vec<FrontendKey> =
            record.wildcards.iter().filter(|key| !wildcards.contains(key)).copied().collect();

        stages.delete_first = self.check_frontends(&mine_keys, &wildcards, &dropped, &dropped_wildcards)?;
        let Backends { ids, mut claims, new } = self.number_backends(&mine, compiled)?;

        // Members of each set that one of my frontends uses.
        let refs = self.references(&mine, &dropped);
        let mut sets: BTreeMap<usize, Members> = BTreeMap::new();
        for wanted in &mine {
            for (scope, index) in wanted.sets.iter().enumerate() {
                let Some(index) = *index else { continue };
                let members = sets.entry(index).or_insert_with(|| Members::of(compiled, index, &ids));
                let held = self.image.frontends.get(&wanted.key).map(|entry| scopes(&entry.value)[scope]);
                if let Some(base) = held.filter(|set| set.count > 0).map(|set| set.base)
                    && !members.candidates.contains(&base)
                {
                    members.candidates.push(base);
                }
                members.tabled |= wanted.flags & frontend_flags::MAGLEV != 0;
            }
        }
        let kept = self.keep_api(me, &mut sets, &mut claims);
        let (placed, taken) = self.place(&sets, &refs)?;
        stages.delete_tables_first = match self.check_tables(&sets, &placed, &refs) {
            Ok(delete_first) => delete_first,
            Err(full) => {
                self.give_back(taken);
                return Err(full);
            }
        };

        // From here on nothing can fail.
        let mut old = Vec::new();
        for (id, value) in &claims {
            self.image.claim(*id, *value);
        }
        // Old claims go before anything is written, so that a state changes in one write.
        for claim in std::mem::take(&mut record.claims) {
            self.image.unclaim(claim, &mut stages);
            old.push(claim.id);
        }
        for id in claims.iter().map(|(id, _)| *id).chain(old) {
            self.image.settle(id, new.contains(&id), &mut stages);
        }
        record.claims = claims.iter().map(|(id, value)| Claim::new(*id, value)).collect();
        record.kept = kept;
        record.short = None;

        for (index, base) in &placed {
            self.image.fill(*base, &sets[index].ids, &mut stages);
            if sets[index].tabled {
                self.image.put_table(*base, &mut stages);
            }
        }
        self.number_ports(record, &mine);
        for wanted in &mine {
            let set = |index: Option<usize>| match index.and_then(|index| placed.get(&index)) {
                Some(base) => self.image.set_ref(*base),
                None => SetRef::default(),
            };
            let value = FrontendValue {
                flags: wanted.flags,
                service: record.ids.get(&wanted.port).copied().unwrap_or_default(),
                affinity: wanted.affinity,
                external: set(wanted.sets[0]),
                internal: set(wanted.sets[1]),
            };
            self.image.put_frontend(wanted.key, value, &mut stages);
            if let Some(entry) = self.image.frontends.get_mut(&wanted.key) {
                entry.owner = Some(me.clone());
            }
        }
        for key in &wildcards {
            let value = FrontendValue { flags: frontend_flags::WILDCARD, ..FrontendValue::default() };
            self.image.put_frontend(*key, value, &mut stages);
            if !record.wildcards.contains(key)
                && let Some(entry) = self.image.frontends.get_mut(key)
            {
                entry.users += 1;
            }
        }
        for key in &dropped {
            self.image.delete_frontend(*key, &mut stages);
        }
        for key in &dropped_wildcards {
            let Some(entry) = self.image.frontends.get_mut(key) else { continue };
            entry.users = entry.users.saturating_sub(1);
            if entry.users == 0 {
                self.image.delete_frontend(*key, &mut stages);
            }
        }
        for (index, base) in &placed {
            if !sets[index].tabled {
                self.image.delete_table(*base, &mut stages);
            }
        }
        self.image.sweep(&mut stages);

        record.owned = mine_keys.into_iter().collect();
        record.wildcards = wildcards.into_iter().collect();
        self.wait(me, record, lost.iter().map(|wanted| wanted.key).collect(), compiled);
        let freed = dropped.into_iter().filter(|key| self.waiting.contains_key(key)).collect();
        Ok((stages, freed))
    }

    /// Whether there is room, and if so whether only after deleting first.
    fn check_frontends(
        &self,
        mine: &BTreeSet<FrontendKey>,
        wildcards: &BTreeSet<FrontendKey>,
        dropped: &[FrontendKey],
        dropped_wildcards: &[FrontendKey],
    ) -> Result<bool, PlanError> {
        let frontends = &self.image.frontends;
        let capacity = self.image.limits.frontends as usize;
        let new = mine.iter().chain(wildcards).filter(|key| !frontends.contains_key(key)).count();
        let gone = dropped.len()
            + dropped_wildcards.iter().filter(|key| frontends.get(key).is_some_and(|entry| entry.users <= 1)).count();
        let peak = frontends.len() + new;
        if new > 0 && peak.saturating_sub(gone) > capacity {
            return Err(self.full("frontends"));
        }
        Ok(peak > capacity)
    }

    /// The same for tables: those of my blocks that will not have one any more make room.
    fn check_tables(
        &self,
        sets: &BTreeMap<usize, Members>,
        placed: &BTreeMap<usize, u32>,
        refs: &HashMap<u32, u32>,
    ) -> Result<bool, PlanError> {
        let tables = &self.image.tables;
        let capacity = self.image.limits.maglev_tables as usize;
        let tabled: BTreeSet<u32> =
            placed.iter().filter(|(index, _)| sets[index].tabled).map(|(_, base)| *base).collect();
        let new = tabled.iter().filter(|base| !tables.contains_key(base)).count();
        let gone = refs
            .iter()
            .filter(|(base, mine)| {
                tables.contains_key(base)
                    && !tabled.contains(base)
                    && self.image.blocks.get(base).is_some_and(|block| block.users == **mine)
            })
            .count();
        let peak = tables.len() + new;
        if new > 0 && peak - gone > capacity {
            return Err(self.full("maglev"));
        }
        Ok(peak > capacity)
    }

    fn full(&self, table: &'static str) -> PlanError {
        let limits = &self.image.limits;
        let (capacity, key) = match table {
            "frontends" => (limits.frontends, "bpf-lb-map-max"),
            "slots" => (limits.slots, "bpf-lb-map-max"),
            "backends" => (limits.backends, "bpf-lb-map-max"),
            _ => (limits.maglev_tables, "bpf-lb-maglev-map-max"),
        };
        PlanError::Full { table, capacity, key }
    }

    /// Ids and claims for all backends of the sets that are used.
    fn number_backends(&self, mine: &[Wanted], compiled: &Compiled) -> Result<Backends, PlanError> {
        let used: BTreeSet<usize> = mine.iter().flat_map(|wanted| wanted.sets.into_iter().flatten()).collect();
        let mut values: BTreeMap<BackendKey, Backend> = BTreeMap::new();
        for set in used.iter().filter_map(|index| compiled.sets.get(*index)) {
            for backend in set.backends.iter().filter(|backend| backend.state != BackendState::Free) {
                let value = Backend {
                    addr: backend.addr.into(),
                    port: Be16::new(backend.port),
                    proto: backend.proto,
                    state: backend.state as u8,
                    flags: if backend.local { BACKEND_LOCAL } else { 0 },
                };
                values
                    .entry(key_of(&value))
                    .and_modify(|known| {
                        known.state = known.state.min(value.state);
                        known.flags |= value.flags;
                    })
                    .or_insert(value);
            }
        }
        let missing = values.keys().filter(|key| self.image.backend_id(key).is_none()).count();
        let fresh = self.image.next_ids(missing);
        if fresh.len() < missing {
            return Err(self.full("backends"));
        }
        let mut fresh_ids = fresh.iter().copied();
        let ids: HashMap<BackendKey, BackendId> = values
            .keys()
            .filter_map(|key| Some((*key, self.image.backend_id(key).or_else(|| fresh_ids.next())?)))
            .collect();
        let mut claims: Vec<(BackendId, Backend)> =
            values.into_iter().filter_map(|(key, value)| Some((*ids.get(&key)?, value))).collect();
        // Known ones first, then the new ones in the order in which ids are handed out.
        let position: HashMap<BackendId, usize> = fresh.iter().enumerate().map(|(i, id)| (*id, i + 1)).collect();
        claims.sort_unstable_by_key(|(id, _)| (position.get(id).copied().unwrap_or(0), *id));
        Ok(Backends { ids, claims, new: fresh.into_iter().collect() })
    }

    /// How often each block is used by frontends that are mine, or will no longer be.
    fn references(&self, mine: &[Wanted], dropped: &[FrontendKey]) -> HashMap<u32, u32> {
        let mut refs = HashMap::new();
        for key in mine.iter().map(|wanted| &wanted.key).chain(dropped) {
            let Some(entry) = self.image.frontends.get(key) else { continue };
            for set in scopes(&entry.value).into_iter().filter(|set| set.count > 0) {
                *refs.entry(set.base).or_insert(0) += 1;
            }
        }
        refs
    }

    /// Applies [`keep_api_backends`] to every set.
    fn keep_api(
        &self,
        me: &ServiceKey,
        sets: &mut BTreeMap<usize, Members>,
        claims: &mut Vec<(BackendId, Backend)>,
    ) -> bool {
        if !is_api_service(me) {
            return false;
        }
        let mut any = false;
        for set in sets.values_mut() {
            let held = set.candidates.first().map(|base| self.image.content(*base).collect()).unwrap_or_default();
            let (ids, kept) = keep_api_backends(me, std::mem::take(&mut set.ids), held);
            set.ids = ids;
            any |= kept;
            for id in set.ids.iter().filter(|_| kept) {
                let Some(entry) = self.image.backend(*id) else { continue };
                match claims.iter_mut().find(|(claimed, _)| claimed == id) {
                    Some((_, value)) => value.state = value.state.min(entry.value.state),
                    None => claims.insert(0, (*id, entry.value)),
                }
            }
        }
        any
    }

    /// Finds a block for each set that has members: the one whose content it already is, else one that it can have in
    /// place, else a new one. Only blocks that nobody else uses are changed (R24).
    fn place(
        &mut self,
        sets: &BTreeMap<usize, Members>,
        refs: &HashMap<u32, u32>,
    ) -> Result<(BTreeMap<usize, u32>, Vec<Taken>), PlanError> {
        let mut placed: BTreeMap<usize, u32> = BTreeMap::new();
        let mut taken: HashSet<u32> = HashSet::new();
        let exclusive = |image: &Image, base: &u32| {
            image.blocks.get(base).is_some_and(|block| refs.get(base).is_some_and(|mine| *mine == block.users))
        };
        let filled = || sets.iter().filter(|(_, set)| !set.ids.is_empty());
        for (index, set) in filled() {
            let mut ids = set.ids.clone();
            ids.sort_unstable();
            let same = |base: &&u32| {
                let mut content: Vec<BackendId> = self.image.content(**base).collect();
                content.sort_unstable();
                content == ids
            };
            let found =
                set.candidates.iter().filter(|base| !taken.contains(base) && exclusive(&self.image, base)).find(same);
            if let Some(base) = found {
                taken.insert(*base);
                placed.insert(*index, *base);
            }
        }
        let mut undo: Vec<Taken> = Vec::new();
        for (index, set) in filled() {
            if placed.contains_key(index) {
                continue;
            }
            let candidates: Vec<u32> = set
                .candidates
                .iter()
                .filter(|base| !taken.contains(base) && exclusive(&self.image, base))
                .copied()
                .collect();
            let found = order_for(set.ids.len()).and_then(|order| {
                candidates
                    .iter()
                    .copied()
                    .find(|base| self.grow(*base, order, &mut undo))
                    .or_else(|| self.new_block(order, &mut undo))
            });
            let Some(base) = found else {
                self.give_back(undo);
                return Err(self.full("slots"));
            };
            taken.insert(base);
            placed.insert(*index, base);
        }
        Ok((placed, undo))
    }

    /// Makes room for `1 << order` slots where the block lies, if that is possible.
    fn grow(&mut self, base: u32, order: u8, undo: &mut Vec<Taken>) -> bool {
        let Some(block) = self.image.blocks.get_mut(&base) else { return false };
        let from = block.order;
        let mut now = from;
        while now < order && self.image.allocator.extend(base, now) {
            now += 1;
        }
        if now < order {
            self.image.allocator.shrink(base, from, now);
            return false;
        }
        block.order = now;
        if now > from {
            undo.push(Taken::Extended { base, from });
        }
        true
    }

    fn new_block(&mut self, order: u8, undo: &mut Vec<Taken>) -> Option<u32> {
        let base = self.image.allocator.allocate(order)?;
        self.image.add_block(base, order);
        undo.push(Taken::New { base, order });
        Some(base)
    }

    fn give_back(&mut self, undo: Vec<Taken>) {
        for taken in undo.into_iter().rev() {
            match taken {
                Taken::New { base, order } => {
                    self.image.blocks.remove(&base);
                    self.image.allocator.release(base, order);
                }
                Taken::Extended { base, from } => {
                    if let Some(block) = self.image.blocks.get_mut(&base) {
                        self.image.allocator.shrink(base, from, block.order);
                        block.order = from;
                    }
                }
            }
        }
    }

    /// Gives each port an id: its own, else the one that its adopted frontends carry, else a new one.
    fn number_ports(&mut self, record: &mut Record, mine: &[Wanted]) {
        let ports: BTreeSet<&(SmolStr, u8)> = mine.iter().map(|wanted| &wanted.port).collect();
        record.ids.retain(|port, id| {
            let stays = ports.contains(port);
            if !stays {
                self.ids.remove(id);
            }
            stays
        });
        for wanted in mine {
            if record.ids.contains_key(&wanted.port) {
                continue;
            }
            let adopted = self
                .image
                .frontends
                .get(&wanted.key)
                .filter(|entry| entry.unclaimed())
                .map(|entry| entry.value.service)
                .filter(|id| *id != 0 && !self.ids.contains(id));
            if let Some(id) = adopted {
                self.ids.insert(id);
                record.ids.insert(wanted.port.clone(), id);
            }
        }
        for wanted in mine {
            if !record.ids.contains_key(&wanted.port) {
                let id = self.new_port_id();
                record.ids.insert(wanted.port.clone(), id);
            }
        }
    }

    /// Ids go up and come back only after 2³² of them, so that state kept under an old id meets no new service.
    fn new_port_id(&mut self) -> u32 {
        loop {
            let id = self.next_id;
            self.next_id = id.checked_add(1).unwrap_or(1);
            if id != 0 && !self.adopted_ids.contains(&id) && self.ids.insert(id) {
                return id;
            }
        }
    }

    /// Enters the service in the queues of what it lost, and takes it out of the others.
    fn wait(&mut self, me: &Arc<ServiceKey>, record: &mut Record, lost: BTreeSet<FrontendKey>, compiled: &Compiled) {
        for key in record.waiting.iter().filter(|key| !lost.contains(key)) {
            if let Some(queue) = self.waiting.get_mut(key) {
                queue.retain(|waiting| waiting != me);
                if queue.is_empty() {
                    self.waiting.remove(key);
                }
            }
        }
        for key in lost.iter().filter(|key| !record.waiting.contains(key)) {
            self.waiting.entry(*key).or_default().push(me.clone());
        }
        record.wants = (!lost.is_empty()).then(|| Arc::new(compiled.clone()));
        record.waiting = lost.into_iter().collect();
    }
}

struct Backends {
    ids: HashMap<BackendKey, BackendId>,
    claims: Vec<(BackendId, Backend)>,
    new: HashSet<BackendId>,
}

/// The usable backends of a set, and where it may be kept.
struct Members {
    ids: Vec<BackendId>,
    candidates: Vec<u32>,
    tabled: bool,
}

impl Members {
    fn of(compiled: &Compiled, index: usize, ids: &HashMap<BackendKey, BackendId>) -> Self {
        let mut seen = HashSet::new();
        let members = compiled
            .sets
            .get(index)
            .into_iter()
            .flat_map(|set| set.backends.iter().take(set.usable))
            .filter_map(|backend| ids.get(&key_of_ref(backend)).copied())
            .filter(|id| seen.insert(*id))
            .collect();
        Self { ids: members, candidates: Vec::new(), tabled: false }
    }
}

fn key_of_ref(backend: &BackendRef) -> BackendKey {
    (backend.addr.into(), Be16::new(backend.port), backend.proto)
}

fn backend_keys(compiled: &Compiled) -> impl Iterator<Item = BackendKey> + '_ {
    compiled.sets.iter().flat_map(|set| set.backends.iter()).map(key_of_ref)
}

fn scopes(value: &FrontendValue) -> [SetRef; 2] {
    [value.external, value.internal]
}

/// Exact frontends by key, and wildcards.
fn wanted(compiled: &Compiled) -> (BTreeMap<FrontendKey, Wanted>, BTreeSet<FrontendKey>) {
    let mut exact = BTreeMap::new();
    let mut wildcards = BTreeSet::new();
    for frontend in &compiled.frontends {
        let key = FrontendKey {
            addr: frontend.addr.into(),
            port: Be16::new(frontend.port),
            proto: frontend.proto,
            ..FrontendKey::default()
        };
        if frontend.flags & frontend_flags::WILDCARD != 0 {
            wildcards.insert(key);
            continue;
        }
        exact.entry(key).or_insert_with(|| Wanted {
            key,
            flags: frontend.flags & !frontend_flags::KIND | frontend.kind as u32,
            affinity: frontend.affinity,
            port: (frontend.port_name.clone(), frontend.proto),
            sets: [frontend.external, frontend.internal],
        });
    }
    wildcards.retain(|key| !exact.contains_key(key));
    (exact, wildcards)
}
