//! The plan for one service: what it wants, what of that it can have, and the changes that lead there.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use ipnet::IpNet;
use kinesin_abi::{
    BACKEND_LOCAL, Backend, BackendId, BackendState, Be16, FrontendKey, FrontendKind, FrontendValue, SOURCE_RANGE_BITS,
    SOURCE_RANGE_DENY, SOURCE_RANGE_IPV6, SetRef, SourceRange, SourceRangeKey, frontend_flags,
};
use smol_str::SmolStr;

use super::entries::Claim;
use super::image::{BackendKey, key_of};
use super::room::{Members, scopes};
use super::stages::Stages;
use super::{Op, PlanError, Planner};
use crate::peers;
use crate::services::{BackendRef, Compiled, ServiceKey};

/// What the planner remembers of a service.
#[derive(Debug, Default)]
pub(super) struct Record {
    /// Id of each port, in order of name and protocol. A tree's smallest node has room for eleven.
    ids: Vec<(Port, u32)>,
    /// Claimed backends with the state that this service gives them.
    pub(super) claims: Vec<Claim>,
    /// Frontends that it has.
    pub(super) owned: Vec<FrontendKey>,
    /// Wildcards that it shares.
    pub(super) wildcards: Vec<FrontendKey>,
    /// Frontends that others have.
    pub(super) waiting: Vec<FrontendKey>,
    /// What it wants; kept only while it waits.
    pub(super) wants: Option<Arc<Compiled>>,
    /// Backends of the API server are kept although it has none (R25).
    pub(super) kept: bool,
    /// New backends did not fit.
    pub(super) short: Option<PlanError>,
}

/// Name and protocol.
type Port = (SmolStr, u8);

impl Record {
    /// The id of a port.
    pub(super) fn id(&self, port: &Port) -> Option<u32> {
        self.ids.iter().find(|(known, _)| known == port).map(|(_, id)| *id)
    }
}

/// One frontend that a service wants.
pub(super) struct Wanted {
    pub(super) key: FrontendKey,
    pub(super) flags: u32,
    pub(super) affinity: u32,
    pub(super) port: Port,
    pub(super) sets: [Option<usize>; 2],
}

struct Backends {
    ids: HashMap<BackendKey, BackendId>,
    claims: Vec<(BackendId, Backend)>,
    new: HashSet<BackendId>,
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

impl Planner {
    /// Plans one service; returns the frontends that it gave up and others wait for.
    pub(super) fn apply(
        &mut self,
        key: &ServiceKey,
        compiled: &Compiled,
        ops: &mut Vec<Op>,
    ) -> Result<Vec<FrontendKey>, PlanError> {
        let me = self.services.get_key_value(key).map_or_else(|| key.clone(), |(me, _)| me.clone());
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
        me: &ServiceKey,
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
        self.check_ranges(record, &mine, compiled)?;
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
            let members = self.in_known_order(&sets[index], *base);
            self.image.fill(*base, &members, &mut stages);
            if sets[index].tabled {
                self.image.put_table(*base, &mut stages);
            }
        }
        let old_ports: Vec<u32> = record.ids.iter().map(|(_, id)| *id).collect();
        self.number_ports(record, &mine);
        for id in old_ports.into_iter().filter(|id| !self.ids.contains(id)) {
            self.image.set_ranges(id, BTreeSet::new(), &mut stages);
        }
        for (port, id) in &record.ids {
            let restricted = |w: &Wanted| w.port == *port && w.flags & frontend_flags::SOURCE_RANGES != 0;
            let ranges = if mine.iter().any(restricted) { ranges_of(compiled, *id) } else { BTreeSet::new() };
            self.image.set_ranges(*id, ranges, &mut stages);
        }
        for wanted in &mine {
            let set = |index: Option<usize>| match index.and_then(|index| placed.get(&index)) {
                Some(base) => self.image.set_ref(*base),
                None => SetRef::default(),
            };
            let value = FrontendValue {
                flags: wanted.flags,
                service: record.id(&wanted.port).unwrap_or_default(),
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
            let from_outside = compiled.frontends.iter().any(|frontend| {
                frontend.flags & frontend_flags::WILDCARD != 0
                    && key.addr == frontend.addr.into()
                    && frontend.kind != FrontendKind::ClusterIp
            });
            let reach = if from_outside { frontend_flags::ROUTABLE } else { 0 };
            let value = FrontendValue { flags: frontend_flags::WILDCARD | reach, ..FrontendValue::default() };
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
                    flags: Backend::flags_of(backend.local, peers::tag(&backend.node)),
                };
                values
                    .entry(key_of(&value))
                    .and_modify(|known| {
                        known.state = known.state.min(value.state);
                        // The same pod twice in one service; that its node has two names nobody can mean.
                        let node = if known.node() == value.node() { known.node() } else { 0 };
                        known.flags = Backend::flags_of((known.flags | value.flags) & BACKEND_LOCAL != 0, node);
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

    /// Gives each port an id: its own, else the one that its adopted frontends carry, else a new one.
    fn number_ports(&mut self, record: &mut Record, mine: &[Wanted]) {
        let ports: BTreeSet<&Port> = mine.iter().map(|wanted| &wanted.port).collect();
        record.ids.retain(|(port, id)| {
            let stays = ports.contains(port);
            if !stays {
                self.ids.remove(id);
            }
            stays
        });
        for wanted in mine {
            if record.id(&wanted.port).is_some() {
                continue;
            }
            if let Some(id) = self.adopted_id(&wanted.key) {
                self.ids.insert(id);
                record.ids.push((wanted.port.clone(), id));
            }
        }
        for wanted in mine {
            if record.id(&wanted.port).is_none() {
                let id = self.new_port_id();
                record.ids.push((wanted.port.clone(), id));
            }
        }
        record.ids.sort_unstable();
        record.ids.shrink_to_fit();
    }

    /// The id of an adopted frontend, unless somebody has it.
    pub(super) fn adopted_id(&self, key: &FrontendKey) -> Option<u32> {
        let entry = self.image.frontends.get(key).filter(|entry| entry.unclaimed())?;
        Some(entry.value.service).filter(|id| *id != 0 && !self.ids.contains(id))
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
    fn wait(&mut self, me: &ServiceKey, record: &mut Record, lost: BTreeSet<FrontendKey>, compiled: &Compiled) {
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

/// The service's ranges for one of its ports.
pub(super) fn ranges_of(compiled: &Compiled, service: u32) -> BTreeSet<SourceRangeKey> {
    let Some(ranges) = &compiled.source_ranges else { return BTreeSet::new() };
    let deny = if ranges.deny { SOURCE_RANGE_DENY } else { 0 };
    let key = |network: &IpNet| {
        let v4 = network.addr().is_ipv4();
        let range = SourceRange {
            service,
            list: deny | if v4 { 0 } else { SOURCE_RANGE_IPV6 },
            addr: network.network().into(),
        };
        let prefix_len = SOURCE_RANGE_BITS + if v4 { 96 } else { 0 } + u32::from(network.prefix_len());
        SourceRangeKey { prefix_len, range }
    };
    ranges.networks.iter().map(key).collect()
}

pub(super) fn key_of_ref(backend: &BackendRef) -> BackendKey {
    (backend.addr.into(), Be16::new(backend.port), backend.proto)
}

pub(super) fn backend_keys(compiled: &Compiled) -> impl Iterator<Item = BackendKey> + '_ {
    compiled.sets.iter().flat_map(|set| set.backends.iter()).map(key_of_ref)
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
