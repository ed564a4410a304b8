//! The order of writes that is safe for packets, within one plan and across several.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use kinesin_abi::{Backend, BackendId, FrontendKey, MAGLEV_TABLE_SIZE, SLOT_EMPTY};

use super::{Actual, Limits, Op};

/// Where an op stands in a plan. Frontends are deleted before others are written, so that a full table has room; both
/// come after everything that the written ones lead to, and before anything is freed that the deleted ones led to.
fn phase(op: &Op) -> u8 {
    match op {
        Op::Backend(_, backend) if *backend != Backend::default() => 0,
        Op::Slot(_, id) if *id != SLOT_EMPTY => 1,
        Op::PutMaglev(..) => 2,
        Op::DeleteFrontend(_) => 3,
        Op::PutFrontend(..) => 4,
        Op::DeleteMaglev(_) => 5,
        Op::Slot(..) => 6,
        Op::Backend(..) => 7,
    }
}

/// Sorts the ops of one plan, which must write each key at most once.
pub(super) fn sort(ops: &mut [Op]) {
    ops.sort_by_key(phase);
}

#[derive(PartialEq, Eq, Hash)]
enum Place {
    Backend(BackendId),
    Slot(u32),
    Maglev(u32),
    Frontend(FrontendKey),
}

fn place(op: &Op) -> Place {
    match op {
        Op::Backend(id, _) => Place::Backend(*id),
        Op::Slot(slot, _) => Place::Slot(*slot),
        Op::PutMaglev(base, _) | Op::DeleteMaglev(base) => Place::Maglev(*base),
        Op::PutFrontend(key, _) | Op::DeleteFrontend(key) => Place::Frontend(*key),
    }
}

/// Merges the plans of several services, in the order they were made, into few larger batches: a stable sort by phase
/// of as many consecutive plans as write no key of a table twice. A plan that writes a key again starts a new batch, so
/// that the reuse of what another one freed is never reordered.
pub fn in_phases(plans: Vec<Vec<Op>>) -> Vec<Op> {
    let mut all = Vec::with_capacity(plans.iter().map(Vec::len).sum());
    let mut batch: Vec<Op> = Vec::new();
    let mut written = HashSet::new();
    for plan in plans {
        if plan.iter().any(|op| written.contains(&place(op))) {
            sort(&mut batch);
            all.append(&mut batch);
            written.clear();
        }
        written.extend(plan.iter().map(place));
        batch.extend(plan);
    }
    sort(&mut batch);
    all.append(&mut batch);
    all
}

/// A table as it was read back, without what pads it.
pub(super) fn trimmed(table: &Arc<[BackendId]>) -> &[BackendId] {
    table.get(..MAGLEV_TABLE_SIZE as usize).unwrap_or(table)
}

/// Writes that turn `is` into `should`. Entries that no map of this size can hold are left alone.
pub(super) fn difference(should: &Actual, is: &Actual, limits: Limits) -> Vec<Op> {
    let mut ops = Vec::new();

    let mut backends: BTreeMap<_, _> = is.backends.iter().filter(|(id, _)| *id < limits.backends).cloned().collect();
    for (id, backend) in &should.backends {
        if backends.remove(id) != Some(*backend) {
            ops.push(Op::Backend(*id, *backend));
        }
    }
    let empty = |backend: &Backend| *backend == Backend::default();
    ops.extend(backends.into_iter().filter(|(_, b)| !empty(b)).map(|(id, _)| Op::Backend(id, Backend::default())));

    let mut slots: BTreeMap<_, _> = is.slots.iter().filter(|(slot, _)| *slot < limits.slots).cloned().collect();
    for (slot, id) in &should.slots {
        if slots.remove(slot) != Some(*id) {
            ops.push(Op::Slot(*slot, *id));
        }
    }
    ops.extend(slots.into_iter().filter(|(_, id)| *id != SLOT_EMPTY).map(|(slot, _)| Op::Slot(slot, SLOT_EMPTY)));

    let mut maglev: BTreeMap<_, _> = is.maglev.iter().map(|(base, table)| (base, table)).collect();
    for (base, table) in &should.maglev {
        if maglev.remove(base).is_none_or(|read| trimmed(read) != trimmed(table)) {
            ops.push(Op::PutMaglev(*base, table.clone()));
        }
    }
    ops.extend(maglev.into_keys().map(|base| Op::DeleteMaglev(*base)));

    let mut frontends: BTreeMap<_, _> = is.frontends.iter().cloned().collect();
    for (key, value) in &should.frontends {
        if frontends.remove(key) != Some(*value) {
            ops.push(Op::PutFrontend(*key, *value));
        }
    }
    ops.extend(frontends.into_keys().map(Op::DeleteFrontend));

    sort(&mut ops);
    ops
}
