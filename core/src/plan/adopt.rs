//! Taking over what an earlier run left in the maps, and letting go of what nobody claimed.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use kinesin_abi::{BACKEND_LOCAL, Backend, BackendId, BackendState, FrontendKey, FrontendValue, SetRef};

use super::phases::trimmed;
use super::planner::{ADOPTED, BackendEntry, Front, Planner, Range, is_wildcard, references};
use super::transaction::Transaction;
use super::{Actual, Op};

fn state(raw: u8) -> Option<BackendState> {
    use BackendState::{Active, Maintenance, Terminating, TerminatingNotServing};
    [Active, Terminating, TerminatingNotServing, Maintenance].into_iter().find(|state| *state as u8 == raw)
}

impl Planner {
    /// Starts over from what the maps hold, so that ids and slots stay as they are: established connections and
    /// affinities refer to ids. Entries stay until a service claims them ([`Planner::update`]) or nobody did
    /// ([`Planner::prune`]).
    ///
    /// Returns repairs of what contradicts itself: frontends whose slots are empty, out of range, overlap another set
    /// or lead to a free backend; slots and Maglev tables that no frontend leads to. Ids of service ports that several
    /// services turn out to share are told apart when these claim them.
    pub fn adopt(&mut self, actual: Actual) -> Vec<Op> {
        *self = Self::with_seed(self.limits, self.seed);
        self.adopt_backends(&actual);
        let limit = self.limits.slots;
        let slots: HashMap<u32, BackendId> =
            actual.slots.iter().filter(|(slot, id)| *slot < limit && self.backends.contains_key(id)).copied().collect();
        let frontends = consistent(&actual.frontends, &slots, limit);
        self.adopt_ranges(&frontends, &slots);
        self.adopt_tables(&actual, &frontends);
        for (key, value) in frontends {
            if value.service != 0 {
                self.free_port_ids.take(value.service);
                self.last_port_id = self.last_port_id.max(value.service);
                self.port_ids.entry(value.service).or_default().adopted += 1;
            }
            self.frontends.insert(key, Front { value, adopted: true, claims: Vec::new() });
        }
        self.repair(&actual)
    }

    fn adopt_backends(&mut self, actual: &Actual) {
        let found: BTreeMap<BackendId, Backend> = actual.backends.iter().copied().collect();
        for (id, raw) in found {
            let Some(state) = state(raw.state) else { continue };
            if id >= self.limits.backends || !self.free_backends.take(id) {
                continue;
            }
            let local = raw.flags & BACKEND_LOCAL != 0;
            let value = Backend { flags: raw.flags & BACKEND_LOCAL, ..raw };
            self.by_target.entry((raw.addr, raw.port, raw.proto)).or_insert(id);
            self.backends.insert(id, BackendEntry { value, wants: vec![(ADOPTED, state, local)], slots: 0 });
        }
    }

    fn adopt_ranges(&mut self, frontends: &BTreeMap<FrontendKey, FrontendValue>, slots: &HashMap<u32, BackendId>) {
        for set in frontends.values().flat_map(references) {
            let empty = Range { capacity: 0, slots: Vec::new(), refs: 0, owner: None, maglev: None, checked: false };
            let range = self.ranges.entry(set.base).or_insert(empty);
            range.refs += 1;
            range.capacity = range.capacity.max(set.count);
        }
        for (base, range) in &mut self.ranges {
            range.slots = (*base..).take(range.capacity as usize).filter_map(|at| slots.get(&at).copied()).collect();
            self.free_slots.reserve(*base, range.capacity);
            for id in &range.slots {
                if let Some(backend) = self.backends.get_mut(id) {
                    backend.slots += 1;
                }
            }
        }
        // The spare room that a set had, as far as that can be known.
        for (base, range) in &mut self.ranges {
            let whole = range.capacity.next_power_of_two();
            let aligned = base & (whole - 1) == 0;
            if aligned && self.free_slots.reserve(base + range.capacity, whole - range.capacity) {
                range.capacity = whole;
            }
        }
    }

    fn adopt_tables(&mut self, actual: &Actual, frontends: &BTreeMap<FrontendKey, FrontendValue>) {
        for (base, table) in &actual.maglev {
            let whole = trimmed(table).len() == kinesin_abi::MAGLEV_TABLE_SIZE as usize;
            if whole
                && trimmed(table).iter().all(|id| self.backends.contains_key(id))
                && let Some(range) = self.ranges.get_mut(base)
            {
                range.maglev = Some(trimmed(table).into());
            }
        }
        let with_tables = frontends.values().filter(|value| value.flags & kinesin_abi::frontend_flags::MAGLEV != 0);
        for base in with_tables.map(|value| value.external).filter(|set| set.count > 0).map(|set| set.base) {
            let Some(range) = self.ranges.get(&base).filter(|range| range.maglev.is_none()) else { continue };
            let table = self.table(&range.slots);
            if let Some(range) = self.ranges.get_mut(&base) {
                range.maglev = Some(table);
            }
        }
    }

    /// Removes adopted entries that nobody claimed. To be called once, after all sources have reported.
    pub fn prune(&mut self) -> Vec<Op> {
        let mut tx = Transaction::default();
        let adopted: Vec<FrontendKey> =
            self.frontends.iter().filter(|(_, front)| front.adopted).map(|(key, _)| *key).collect();
        for key in adopted {
            self.disown_adopted(&key);
            if self.frontends.get(&key).is_some_and(|front| front.claims.is_empty()) {
                self.put_front(&mut tx, key, None);
            } else if is_wildcard(&key) {
                self.settle_wildcard(&mut tx, &key);
            }
        }
        let adopted = |entry: &BackendEntry| entry.wants.iter().any(|want| want.0 == ADOPTED);
        let backends: Vec<BackendId> =
            self.backends.iter().filter(|(_, entry)| adopted(entry)).map(|(id, _)| *id).collect();
        for id in backends {
            self.touch_backend(&mut tx, id).wants.retain(|want| want.0 != ADOPTED);
        }
        self.finish(tx)
    }
}

/// The frontends that can be kept: all their slots are in use, and no two sets overlap unless they start at the same
/// slot (one of them is then the other before or after it grew).
fn consistent(
    frontends: &[(FrontendKey, FrontendValue)],
    slots: &HashMap<u32, BackendId>,
    limit: u32,
) -> BTreeMap<FrontendKey, FrontendValue> {
    let in_use = |set: &SetRef| {
        set.base.checked_add(set.count).is_some_and(|end| end <= limit)
            && (set.base..).take(set.count as usize).all(|at| slots.contains_key(&at))
    };
    let mut kept: BTreeMap<FrontendKey, FrontendValue> = frontends
        .iter()
        .filter(|(_, value)| in_use(&value.external) && in_use(&value.internal))
        .map(|(key, value)| {
            let known = |set: SetRef| if set.count == 0 { SetRef::default() } else { set };
            (*key, FrontendValue { external: known(value.external), internal: known(value.internal), ..*value })
        })
        .collect();
    let mut ends: BTreeMap<u32, u32> = BTreeMap::new();
    for set in kept.values().flat_map(references) {
        let end = ends.entry(set.base).or_default();
        *end = (*end).max(set.base + set.count);
    }
    let mut overlapping = BTreeSet::new();
    let mut reached = 0;
    for (base, end) in ends {
        if base < reached {
            overlapping.insert(base);
        } else {
            reached = end;
        }
    }
    kept.retain(|_, value| !references(value).any(|set| overlapping.contains(&set.base)));
    kept
}
