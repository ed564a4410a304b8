//! Several plans in few, large batches.

use std::collections::HashSet;

use kinesin_abi::{Backend, BackendId, FrontendKey, SLOT_EMPTY};

use super::Op;

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
/// of as many consecutive plans as write no key of a table twice. A plan that writes a key again starts a new batch, and
/// one that writes a key twice itself stays as it is, so that the reuse of what was freed is never reordered.
pub fn in_phases(plans: Vec<Vec<Op>>) -> Vec<Op> {
    let mut all = Vec::with_capacity(plans.iter().map(Vec::len).sum());
    let mut batch: Vec<Op> = Vec::new();
    let mut written = HashSet::new();
    for plan in plans {
        let mine: HashSet<_> = plan.iter().map(place).collect();
        if !written.is_disjoint(&mine) || mine.len() < plan.len() {
            flush(&mut batch, &mut all);
            written.clear();
        }
        if mine.len() < plan.len() {
            all.extend(plan);
        } else {
            written.extend(mine);
            batch.extend(plan);
        }
    }
    flush(&mut batch, &mut all);
    all
}

fn flush(batch: &mut Vec<Op>, all: &mut Vec<Op>) {
    batch.sort_by_key(phase);
    all.append(batch);
}
