//! One service's change: what it needs, whether that fits, and then the change itself, which cannot fail.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use kinesin_abi::{BackendId, BackendState, FrontendKey, FrontendValue, SetRef, frontend_flags};
use smol_str::SmolStr;

use super::planner::{No, PlanError, Planner, PortId, Range, Service, Target, is_wildcard, references};
use super::transaction::Transaction;
use crate::services::{BackendRef, BackendSet, Compiled, Frontend, ServiceKey};

/// Frontends' references to sets with the same usable backends; they share a range.
struct Group {
    /// Usable backends, without duplicates.
    members: Vec<Target>,
    /// How many references of this group lead to each range now.
    now: BTreeMap<u32, u32>,
    /// How many references it has.
    references: u32,
    /// Selection by Maglev table for some frontend's external traffic.
    maglev: bool,
}

/// Where the slots of a group will be.
#[derive(Clone, Copy)]
enum Place {
    /// A range that holds just the wanted backends, in whichever order.
    Same(u32),
    /// A range that only this group's frontends lead to: changed in place.
    Edit(u32),
    /// A new range, and its capacity.
    New(u32, u32),
}

fn target(backend: &BackendRef) -> Target {
    (backend.addr.into(), kinesin_abi::Be16::new(backend.port), backend.proto)
}

fn usable(set: &BackendSet) -> &[BackendRef] {
    set.backends.get(..set.usable).unwrap_or(&set.backends)
}

fn flags(frontend: &Frontend) -> u32 {
    frontend.kind as u32 | frontend.flags & !frontend_flags::KIND
}

impl Planner {
    /// Whether a service may have a frontend now.
    fn may_claim(&self, key: &FrontendKey, no: Option<No>) -> bool {
        let holder = self.frontends.get(key).and_then(|front| front.claims.first());
        is_wildcard(key) || holder.is_none_or(|(holder, _)| Some(*holder) == no)
    }

    /// Brings the state to what `compiled` says, or leaves everything as it is. Frontends that the service lets go and
    /// that others wait for are left in `tx`.
    pub(super) fn plan(
        &mut self,
        key: &ServiceKey,
        compiled: &Compiled,
        tx: &mut Transaction,
    ) -> Result<(), PlanError> {
        let old = self.services.get(key);
        let no = old.map(|service| service.no);
        let none = Service::default();
        let old = old.unwrap_or(&none);

        let mut owned: BTreeMap<FrontendKey, &Frontend> = BTreeMap::new();
        let mut lost: BTreeSet<FrontendKey> = BTreeSet::new();
        for frontend in &compiled.frontends {
            let at = FrontendKey {
                addr: frontend.addr.into(),
                port: kinesin_abi::Be16::new(frontend.port),
                proto: frontend.proto,
                pad: 0,
            };
            if self.may_claim(&at, no) {
                owned.entry(at).or_insert(frontend);
            } else {
                lost.insert(at);
            }
        }

        let mut wants: BTreeMap<Target, (BackendState, bool)> = BTreeMap::new();
        for backend in compiled.sets.iter().flat_map(|set| set.backends.iter()) {
            let state = match backend.state {
                BackendState::Free => BackendState::Maintenance,
                state => state,
            };
            let want = wants.entry(target(backend)).or_insert((state, backend.local));
            *want = (want.0.min(state), want.1 || backend.local);
        }

        let (groups, group_of) = self.groups(compiled, &owned);
        let gone: Vec<FrontendKey> = old.frontends.iter().filter(|at| !owned.contains_key(at)).copied().collect();
        self.check_frontends(&owned, &gone)?;
        self.check_backends(&wants)?;
        let own_ranges = old.ranges.clone();
        let places = self.places(&groups, &gone, &own_ranges, no)?;

        // From here on nothing can fail.
        let no = no.unwrap_or_else(|| self.register(key));
        let backends: BTreeSet<BackendId> =
            wants.into_iter().map(|(target, (state, local))| self.want(tx, no, target, state, local)).collect();
        let sets: Vec<SetRef> =
            groups.iter().zip(places).map(|(group, place)| self.materialise(tx, no, group, place)).collect();
        let set_of = |index: Option<usize>| -> SetRef {
            index.and_then(|i| group_of.get(&i)).map_or(SetRef::default(), |group| sets[*group])
        };
        let ports = self.port_ids(key, no, &owned);
        for (at, frontend) in &owned {
            if is_wildcard(at) {
                self.claim_wildcard(tx, *at, no, flags(frontend));
                continue;
            }
            let value = FrontendValue {
                flags: flags(frontend),
                service: ports[&(frontend.port_name.clone(), frontend.proto)],
                affinity: frontend.affinity,
                external: set_of(frontend.external),
                internal: set_of(frontend.internal),
            };
            self.disown_adopted(at);
            self.put_front(tx, *at, Some(value));
            if let Some(front) = self.frontends.get_mut(at) {
                front.claims = vec![(no, value.flags)];
            }
        }
        for at in &gone {
            self.let_go(tx, at, no);
        }
        for (group, set) in groups.iter().zip(&sets) {
            self.refresh_table(tx, set.base, group);
        }
        let frontends = owned.keys().copied().collect();
        let new = Service { no, ports, frontends, lost, backends, ..Service::default() };
        self.record(tx, key, new, compiled);
        Ok(())
    }

    fn groups(
        &self,
        compiled: &Compiled,
        owned: &BTreeMap<FrontendKey, &Frontend>,
    ) -> (Vec<Group>, HashMap<usize, usize>) {
        let mut groups: Vec<Group> = Vec::new();
        let mut by_members: HashMap<Vec<Target>, usize> = HashMap::new();
        let mut by_set: HashMap<usize, usize> = HashMap::new();
        for (at, frontend) in owned.iter().filter(|(at, _)| !is_wildcard(at)) {
            let now = self.frontends.get(at).map(|front| front.value).unwrap_or_default();
            let roles = [(frontend.external, now.external, true), (frontend.internal, now.internal, false)];
            for (index, now, external) in roles {
                let Some((index, set)) = index.and_then(|i| Some((i, compiled.sets.get(i)?))) else { continue };
                if usable(set).is_empty() {
                    continue;
                }
                let group = *by_set.entry(index).or_insert_with(|| {
                    let mut seen = HashSet::new();
                    let members: Vec<Target> = usable(set).iter().map(target).filter(|t| seen.insert(*t)).collect();
                    let mut sorted = members.clone();
                    sorted.sort_unstable();
                    *by_members.entry(sorted).or_insert_with(|| {
                        groups.push(Group { members, now: BTreeMap::new(), references: 0, maglev: false });
                        groups.len() - 1
                    })
                });
                let group = &mut groups[group];
                group.references += 1;
                if now.count > 0 {
                    *group.now.entry(now.base).or_default() += 1;
                }
                group.maglev |= external && frontend.flags & frontend_flags::MAGLEV != 0;
            }
        }
        (groups, by_set)
    }

    fn check_frontends(&self, owned: &BTreeMap<FrontendKey, &Frontend>, gone: &[FrontendKey]) -> Result<(), PlanError> {
        let fresh = owned.keys().filter(|at| !self.frontends.contains_key(at)).count();
        let stays = |at: &FrontendKey| {
            self.waiting.contains_key(at)
                || self.frontends.get(at).is_some_and(|front| front.adopted || front.claims.len() > 1)
        };
        let freed = gone.iter().filter(|at| !stays(at)).count();
        let limit = self.limits.frontends;
        if fresh > 0 && self.frontends.len() - freed + fresh > limit as usize {
            return Err(PlanError::Full { table: "frontends", limit });
        }
        Ok(())
    }

    fn check_backends(&self, wants: &BTreeMap<Target, (BackendState, bool)>) -> Result<(), PlanError> {
        let fresh = wants.keys().filter(|target| !self.by_target.contains_key(target)).count();
        if fresh as u64 > self.free_backends.available() {
            return Err(PlanError::Full { table: "backends", limit: self.limits.backends });
        }
        Ok(())
    }

    /// Finds each group a range, and takes the new ones.
    fn places(
        &mut self,
        groups: &[Group],
        gone: &[FrontendKey],
        own: &BTreeSet<u32>,
        no: Option<No>,
    ) -> Result<Vec<Place>, PlanError> {
        // Frontends about to be deleted do not mind what happens to their slots, as long as these are in use.
        let mut leaving: HashMap<u32, u32> = HashMap::new();
        for value in gone.iter().filter_map(|at| self.frontends.get(at)).map(|front| front.value) {
            references(&value).for_each(|set| *leaving.entry(set.base).or_default() += 1);
        }
        let mut places: Vec<Option<Place>> = vec![None; groups.len()];
        let mut used = HashSet::new();
        let mine = |range: &Range| range.owner.is_none() || range.owner == no;
        for (group, place) in groups.iter().zip(&mut places) {
            let ids: Option<HashSet<BackendId>> =
                group.members.iter().map(|target| self.by_target.get(target).copied()).collect();
            let Some(ids) = ids else { continue };
            let same = group.now.keys().chain(own).find(|base| {
                self.ranges.get(base).is_some_and(|range| {
                    mine(range)
                        && !used.contains(*base)
                        && range.slots.len() == ids.len()
                        && range.slots.iter().collect::<HashSet<_>>().len() == ids.len()
                        && range.slots.iter().all(|id| ids.contains(id))
                })
            });
            if let Some(base) = same {
                used.insert(*base);
                *place = Some(Place::Same(*base));
            }
        }
        for (group, place) in groups.iter().zip(&mut places).filter(|(_, place)| place.is_none()) {
            let edit = group.now.iter().find(|(base, users)| {
                self.ranges.get(base).is_some_and(|range| {
                    mine(range)
                        && !used.contains(*base)
                        && range.refs == **users + leaving.get(base).copied().unwrap_or(0)
                        && range.capacity as usize >= group.members.len()
                })
            });
            if let Some((base, _)) = edit {
                used.insert(*base);
                *place = Some(Place::Edit(*base));
            }
        }
        let mut found = Vec::with_capacity(places.len());
        for (group, place) in groups.iter().zip(places) {
            let capacity = group.members.len().checked_next_power_of_two().and_then(|n| u32::try_from(n).ok());
            let new = || Some(Place::New(self.free_slots.allocate(capacity?)?, capacity?));
            let Some(place) = place.or_else(new) else {
                for place in found {
                    if let Place::New(base, capacity) = place {
                        self.free_slots.release(base, capacity);
                    }
                }
                return Err(PlanError::Full { table: "slots", limit: self.limits.slots });
            };
            found.push(place);
        }
        Ok(found)
    }

    fn register(&mut self, key: &ServiceKey) -> No {
        let no = self.next_no;
        self.next_no += 1;
        self.names.insert(no, key.clone());
        self.services.insert(key.clone(), Service { no, ..Service::default() });
        no
    }

    /// Gives a group its range. References are counted when frontends are written.
    fn materialise(&mut self, tx: &mut Transaction, no: No, group: &Group, place: Place) -> SetRef {
        let ids: Vec<BackendId> =
            group.members.iter().filter_map(|target| self.by_target.get(target).copied()).collect();
        let count = ids.len() as u32;
        let base = match place {
            Place::Same(base) => base,
            Place::Edit(base) => {
                let before = self.ranges.get(&base).map(|range| range.slots.clone()).unwrap_or_default();
                self.fill_range(tx, base, edited(&before, &ids));
                base
            }
            Place::New(base, capacity) => {
                let empty = Range { capacity, slots: Vec::new(), refs: 0, owner: None, maglev: None, checked: true };
                self.ranges.insert(base, empty);
                self.fill_range(tx, base, ids);
                base
            }
        };
        if let Some(range) = self.ranges.get_mut(&base) {
            range.owner = Some(no);
        }
        SetRef { base, count }
    }

    /// The ids of the service's ports: those that its frontends carry already, where nobody else has them.
    fn port_ids(
        &mut self,
        key: &ServiceKey,
        no: No,
        owned: &BTreeMap<FrontendKey, &Frontend>,
    ) -> BTreeMap<(SmolStr, u8), u32> {
        let mut carried: BTreeMap<(SmolStr, u8), BTreeSet<u32>> = BTreeMap::new();
        for (at, frontend) in owned.iter().filter(|(at, _)| !is_wildcard(at)) {
            let ids = carried.entry((frontend.port_name.clone(), frontend.proto)).or_default();
            ids.extend(self.frontends.get(at).map(|front| front.value.service).filter(|id| *id != 0));
        }
        let mut old = self.services.get_mut(key).map(|service| std::mem::take(&mut service.ports)).unwrap_or_default();
        let mut ports: BTreeMap<(SmolStr, u8), u32> = BTreeMap::new();
        let mut missing = Vec::new();
        for (port, ids) in carried {
            match old.remove(&port) {
                Some(id) => {
                    ports.insert(port, id);
                }
                None => missing.push((port, ids)),
            }
        }
        for (port, ids) in missing {
            // A renamed port keeps its id, and an adopted frontend its own.
            let renamed = ids.iter().copied().find(|id| old.values().any(|free| free == id));
            let adopted =
                || ids.iter().copied().find(|id| self.port_ids.get(id).is_some_and(|port| port.owner.is_none()));
            let id = match renamed.or_else(adopted) {
                Some(id) => id,
                None => self.new_port_id(),
            };
            old.retain(|_, free| *free != id);
            self.port_ids.entry(id).or_default().owner = Some(no);
            ports.insert(port, id);
        }
        for id in old.into_values() {
            if let Some(port) = self.port_ids.get_mut(&id) {
                port.owner = None;
                self.drop_port_id(id);
            }
        }
        ports
    }

    /// Goes around instead of taking the lowest, so that what remembers an id (session affinity) has long forgotten it.
    fn new_port_id(&mut self) -> u32 {
        let id = self.free_port_ids.next(self.last_port_id).expect("invariant: there are fewer ports than numbers");
        self.last_port_id = id;
        id
    }

    fn drop_port_id(&mut self, id: u32) {
        if let Some(PortId { owner: None, adopted: 0 }) = self.port_ids.get(&id) {
            self.port_ids.remove(&id);
            self.free_port_ids.release(id);
        }
    }

    /// An adopted frontend is claimed or deleted: it no longer stands for a service port of its own.
    pub(super) fn disown_adopted(&mut self, at: &FrontendKey) {
        let Some(front) = self.frontends.get_mut(at) else { return };
        let id = front.value.service;
        if std::mem::take(&mut front.adopted)
            && let Some(port) = self.port_ids.get_mut(&id)
        {
            port.adopted -= 1;
            self.drop_port_id(id);
        }
    }

    fn claim_wildcard(&mut self, tx: &mut Transaction, at: FrontendKey, no: No, flags: u32) {
        if !self.frontends.contains_key(&at) {
            self.put_front(tx, at, Some(FrontendValue { flags, ..FrontendValue::default() }));
        }
        if let Some(front) = self.frontends.get_mut(&at) {
            match front.claims.iter_mut().find(|claim| claim.0 == no) {
                Some(claim) => claim.1 = flags,
                None => front.claims.push((no, flags)),
            }
        }
        self.settle_wildcard(tx, &at);
    }

    /// A wildcard stays what it is for as long as somebody wants it so. Adopted ones wait for everybody to have spoken.
    pub(super) fn settle_wildcard(&mut self, tx: &mut Transaction, at: &FrontendKey) {
        let Some(front) = self.frontends.get(at) else { return };
        let Some((_, first)) = front.claims.first() else { return };
        let plain = FrontendValue { flags: front.value.flags, ..FrontendValue::default() };
        let wanted = front.adopted || front.claims.iter().any(|(_, flags)| *flags == plain.flags);
        let value = if wanted { plain } else { FrontendValue { flags: *first, ..plain } };
        if front.value.service != 0 {
            self.disown_adopted(at);
        }
        self.put_front(tx, *at, Some(value));
    }

    /// Ends a service's claim. The frontend goes, unless others share it; those that wait for it come first.
    fn let_go(&mut self, tx: &mut Transaction, at: &FrontendKey, no: No) {
        let Some(front) = self.frontends.get_mut(at) else { return };
        front.claims.retain(|claim| claim.0 != no);
        if !front.claims.is_empty() {
            self.settle_wildcard(tx, at);
        } else if self.waiting.contains_key(at) {
            tx.released.insert(*at);
        } else if !front.adopted {
            self.put_front(tx, *at, None);
        }
    }

    fn refresh_table(&mut self, tx: &mut Transaction, base: u32, group: &Group) {
        let Some(range) = self.ranges.get(&base) else { return };
        let changed = tx
            .slots
            .iter()
            .any(|op| matches!(op, super::Op::Slot(at, _) if (base..base + range.capacity).contains(at)));
        match (&range.maglev, group.maglev) {
            // An adopted frontend that nobody claimed may still select from it; `finish` sees it go.
            (Some(_), false) if range.refs > group.references => {}
            (Some(_), false) => self.set_maglev(tx, base, None),
            (Some(_), true) if range.checked && !changed => {}
            (None, false) => {}
            (_, true) => {
                let table = self.table(&range.slots);
                self.set_maglev(tx, base, Some(table));
            }
        }
        if let Some(range) = self.ranges.get_mut(&base) {
            range.checked = true;
        }
    }

    /// Keeps what the service is now, and lets go of backends and of places in queues that it no longer needs.
    fn record(&mut self, tx: &mut Transaction, key: &ServiceKey, mut new: Service, compiled: &Compiled) {
        let no = new.no;
        let values = new.frontends.iter().filter_map(|at| self.frontends.get(at)).map(|front| front.value);
        new.ranges = values.flat_map(|value| references(&value)).map(|set| set.base).collect();
        new.pending = (!new.lost.is_empty()).then(|| compiled.clone());
        let old = self.services.insert(key.clone(), new.clone()).unwrap_or_default();
        for id in old.backends.difference(&new.backends) {
            self.touch_backend(tx, *id).wants.retain(|want| want.0 != no);
        }
        for at in old.lost.difference(&new.lost) {
            if let Some(queue) = self.waiting.get_mut(at) {
                queue.retain(|waiter| *waiter != no);
                if queue.is_empty() {
                    self.waiting.remove(at);
                }
            }
        }
        for at in new.lost.difference(&old.lost) {
            self.waiting.entry(*at).or_default().push(no);
        }
    }

    /// Gives frontends that were let go to the first of those that wait and have room for it.
    pub(super) fn hand_over(&mut self, tx: &mut Transaction) {
        while let Some(at) = tx.released.pop_first() {
            for no in self.waiting.get(&at).cloned().unwrap_or_default() {
                let Some(key) = self.names.get(&no).cloned() else { continue };
                let pending = self.services.get_mut(&key).and_then(|service| service.pending.take());
                let Some(compiled) = pending else { continue };
                let Err(full) = self.plan(&key, &compiled, tx) else { break };
                // The next in the queue may need less.
                if let Some(service) = self.services.get_mut(&key) {
                    service.pending = Some(compiled);
                    service.full = Some(full);
                }
            }
            if self.frontends.get(&at).is_some_and(|front| front.claims.is_empty()) {
                self.put_front(tx, at, None);
            }
        }
    }
}

/// The wanted ids in an order that changes as few places as possible: those that stay keep theirs, others fill the gaps.
fn edited(before: &[BackendId], wanted: &[BackendId]) -> Vec<BackendId> {
    let mut missing: HashSet<BackendId> = wanted.iter().copied().collect();
    let mut places: Vec<Option<BackendId>> = vec![None; wanted.len()];
    for (place, id) in places.iter_mut().zip(before) {
        *place = missing.remove(id).then_some(*id);
    }
    let mut fill = wanted.iter().copied().filter(|id| missing.contains(id));
    places.into_iter().filter_map(|place| place.or_else(|| fill.next())).collect()
}
