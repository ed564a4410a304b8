//! The changes of one plan: made to the planner's state at once, turned into ordered ops at the end.
//!
//! What the plan frees cannot be given out again before its end, so that no plan writes a key twice.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use kinesin_abi::{Backend, BackendId, BackendState, FrontendKey, FrontendValue, SLOT_EMPTY, frontend_flags};

use super::Op;
use super::phases::sort;
use super::planner::{BackendEntry, Front, No, Planner, Target, references};

/// What was there before, for everything that the plan touched.
#[derive(Default)]
pub(super) struct Transaction {
    pub(super) frontends: BTreeMap<FrontendKey, Option<FrontendValue>>,
    pub(super) backends: BTreeMap<BackendId, Backend>,
    pub(super) maglev: BTreeMap<u32, Option<Arc<[BackendId]>>>,
    pub(super) slots: Vec<Op>,
    /// Bases of ranges that lost a reference.
    pub(super) ranges: BTreeSet<u32>,
    /// Base and length of the spare room that shrunken sets gave up.
    pub(super) spare: Vec<(u32, u32)>,
    /// Frontends that were let go and that others wait for.
    pub(super) released: BTreeSet<FrontendKey>,
}

impl Planner {
    /// Sets, replaces or removes what the frontends hash holds for `key`, and keeps count of the references.
    pub(super) fn put_front(&mut self, tx: &mut Transaction, key: FrontendKey, value: Option<FrontendValue>) {
        let before = self.frontends.get(&key).map(|front| front.value);
        if before == value {
            return;
        }
        tx.frontends.entry(key).or_insert(before);
        for set in value.iter().flat_map(references) {
            if let Some(range) = self.ranges.get_mut(&set.base) {
                range.refs += 1;
            }
        }
        for set in before.iter().flat_map(references) {
            if let Some(range) = self.ranges.get_mut(&set.base) {
                range.refs -= 1;
                tx.ranges.insert(set.base);
            }
        }
        match value {
            None => {
                self.frontends.remove(&key);
            }
            Some(value) => {
                let new = Front { value, adopted: false, claims: Vec::new() };
                self.frontends.entry(key).or_insert(new).value = value;
            }
        }
    }

    /// The entry of a backend that the plan may change.
    pub(super) fn touch_backend(&mut self, tx: &mut Transaction, id: BackendId) -> &mut BackendEntry {
        let entry = self.backends.entry(id).or_default();
        tx.backends.entry(id).or_insert(entry.value);
        entry
    }

    /// Records that a service has a backend in a set; the id is given out if there is none. There must be a free one.
    pub(super) fn want(
        &mut self,
        tx: &mut Transaction,
        no: No,
        target: Target,
        state: BackendState,
        local: bool,
    ) -> BackendId {
        let id = match self.by_target.get(&target) {
            Some(id) => *id,
            None => {
                let id = self.free_backends.lowest().expect("invariant: the plan was checked to fit");
                self.by_target.insert(target, id);
                let (addr, port, proto) = target;
                let entry = self.touch_backend(tx, id);
                entry.value = Backend { addr, port, proto, ..Backend::default() };
                id
            }
        };
        let entry = self.touch_backend(tx, id);
        match entry.wants.iter_mut().find(|want| want.0 == no) {
            Some(want) => *want = (no, state, local),
            None => entry.wants.push((no, state, local)),
        }
        id
    }

    /// Replaces what a range holds. Slots that stay within the new length are written before the frontends, and the
    /// rest is emptied after them.
    pub(super) fn fill_range(&mut self, tx: &mut Transaction, base: u32, slots: Vec<BackendId>) {
        let Some(range) = self.ranges.get_mut(&base) else { return };
        let before = std::mem::replace(&mut range.slots, slots.clone());
        for (at, id) in (base..).zip(&slots) {
            if before.get((at - base) as usize) != Some(id) {
                tx.slots.push(Op::Slot(at, *id));
            }
        }
        tx.slots.extend((base..).zip(&before).skip(slots.len()).map(|(at, _)| Op::Slot(at, SLOT_EMPTY)));
        for id in slots {
            self.touch_backend(tx, id).slots += 1;
        }
        for id in before {
            self.touch_backend(tx, id).slots -= 1;
        }
        self.give_up_spare(tx, base);
    }

    /// A range of which three quarters are spare gives up half of them or more.
    fn give_up_spare(&mut self, tx: &mut Transaction, base: u32) {
        let Some(range) = self.ranges.get_mut(&base) else { return };
        let used = range.slots.len() as u32;
        let keep = used.next_power_of_two() * 2;
        if used > 0 && used <= range.capacity / 4 && keep < range.capacity {
            tx.spare.push((base + keep, range.capacity - keep));
            range.capacity = keep;
        }
    }

    pub(super) fn set_maglev(&mut self, tx: &mut Transaction, base: u32, table: Option<Arc<[BackendId]>>) {
        let Some(range) = self.ranges.get_mut(&base) else { return };
        tx.maglev.entry(base).or_insert_with(|| range.maglev.clone());
        range.maglev = table;
    }

    /// Whether a claimed range has a table that none of its frontends selects from.
    fn has_idle_table(&self, base: u32) -> bool {
        let Some(range) = self.ranges.get(&base).filter(|range| range.maglev.is_some()) else { return false };
        let owner = range.owner.and_then(|no| self.names.get(&no)).and_then(|key| self.services.get(key));
        let selects = |value: &FrontendValue| {
            value.flags & frontend_flags::MAGLEV != 0 && value.external.count > 0 && value.external.base == base
        };
        owner.is_some_and(|service| {
            // Otherwise somebody unknown leads here, too.
            let mut values = service.frontends.iter().filter_map(|at| self.frontends.get(at)).map(|front| front.value);
            let known = values.clone().flat_map(|value| references(&value)).filter(|set| set.base == base).count();
            known == range.refs as usize && !values.any(|value| selects(&value))
        })
    }

    /// Frees what nothing leads to any more, and lists all writes in a safe order.
    pub(super) fn finish(&mut self, mut tx: Transaction) -> Vec<Op> {
        for base in std::mem::take(&mut tx.ranges) {
            if self.has_idle_table(base) {
                self.set_maglev(&mut tx, base, None);
            }
            if self.ranges.get(&base).is_some_and(|range| range.refs == 0) {
                self.set_maglev(&mut tx, base, None);
                self.fill_range(&mut tx, base, Vec::new());
                if let Some(range) = self.ranges.remove(&base) {
                    tx.spare.push((base, range.capacity));
                }
            }
        }
        let mut ops = std::mem::take(&mut tx.slots);
        for (base, before) in tx.maglev {
            let now = self.ranges.get(&base).and_then(|range| range.maglev.clone());
            match now {
                Some(table) if before.as_ref() != Some(&table) => ops.push(Op::PutMaglev(base, table)),
                None if before.is_some() => ops.push(Op::DeleteMaglev(base)),
                _ => {}
            }
        }
        for (key, before) in tx.frontends {
            match self.frontends.get(&key).map(|front| front.value) {
                Some(value) if before != Some(value) => ops.push(Op::PutFrontend(key, value)),
                None if before.is_some() => ops.push(Op::DeleteFrontend(key)),
                _ => {}
            }
        }
        for (id, before) in tx.backends {
            let Some(entry) = self.backends.get_mut(&id) else { continue };
            let now = if entry.wants.is_empty() && entry.slots == 0 {
                let target = (entry.value.addr, entry.value.port, entry.value.proto);
                if self.by_target.get(&target) == Some(&id) {
                    self.by_target.remove(&target);
                }
                self.backends.remove(&id);
                self.free_backends.release(id);
                Backend::default()
            } else {
                entry.value = entry.settled();
                entry.value
            };
            if now != before {
                ops.push(Op::Backend(id, now));
            }
        }
        for (base, len) in tx.spare {
            self.free_slots.release(base, len);
        }
        sort(&mut ops);
        ops
    }
}
