//! Several plans in few, large batches.

use std::collections::HashSet;

use kinesin_abi::{Backend, BackendId, FrontendKey, SLOT_EMPTY, SourceRangeKey, frontend_flags};

use super::Op;

/// Where an op stands in a plan. Frontends are deleted before others are written, so that a full table has room; both
/// come after everything that the written ones lead to, and before anything is freed that the deleted ones led to.
fn phase(op: &Op) -> u8 {
    match op {
        Op::Backend(_, backend) if *backend != Backend::default() => 0,
        Op::Slot(_, id) if *id != SLOT_EMPTY => 1,
        Op::PutMaglev(..) => 2,
        Op::PutSourceRange(_) => 3,
        Op::DeleteFrontend(_) => 4,
        Op::PutFrontend(..) => 5,
        Op::DeleteSourceRange(_) => 6,
        Op::DeleteMaglev(_) => 7,
        Op::Slot(..) => 8,
        Op::Backend(..) => 9,
    }
}

#[derive(PartialEq, Eq, Hash)]
enum Place {
    Backend(BackendId),
    Slot(u32),
    Maglev(u32),
    Frontend(FrontendKey),
    SourceRange(SourceRangeKey),
}

fn place(op: &Op) -> Place {
    match op {
        Op::Backend(id, _) => Place::Backend(*id),
        Op::Slot(slot, _) => Place::Slot(*slot),
        Op::PutMaglev(base, _) | Op::DeleteMaglev(base) => Place::Maglev(*base),
        Op::PutFrontend(key, _) | Op::DeleteFrontend(key) => Place::Frontend(*key),
        Op::PutSourceRange(key) | Op::DeleteSourceRange(key) => Place::SourceRange(*key),
    }
}

/// Merges the plans of several services, in the order they were made, into few larger batches: a stable sort by phase
/// of as many consecutive plans as write no key of a table twice. A plan that writes a key again starts a new batch, and
/// one that writes a key twice itself stays as it is, so that the reuse of what was freed is never reordered.
///
/// A wildcard that the last of its users gives up and a later plan takes again stays meanwhile. `room` is how many
/// frontends the map has room for when all is written: where it might not hold those that would stay, they go.
pub(super) fn in_phases(mut plans: Vec<Vec<Op>>, room: usize) -> Vec<Op> {
    let deletes = plans.iter().flatten().filter(|op| matches!(op, Op::DeleteFrontend(_))).count();
    if deletes > 0 && deletes <= room {
        keep_wildcards(&mut plans);
    }
    let mut all = Vec::with_capacity(plans.iter().map(Vec::len).sum());
    let mut batch: Vec<Op> = Vec::new();
    let mut written = HashSet::new();
    for plan in plans {
        let mine: HashSet<_> = plan.iter().map(place).collect();
        if !written.is_disjoint(&mine) || mine.len() < plan.len() {
            flush(&mut batch, &mut all);
            written.clear();
        }
        if mine.len() < plan.len() || depends_on_order(&plan) {
            flush(&mut batch, &mut all);
            written.clear();
            all.extend(plan);
        } else {
            written.extend(mine);
            batch.extend(plan);
        }
    }
    flush(&mut batch, &mut all);
    all
}

/// Takes deletions of wildcards away that a later plan undoes. Nothing else may stay so: a wildcard leads to nothing that
/// the first plan frees.
fn keep_wildcards(plans: &mut [Vec<Op>]) {
    let mut comes_back = HashSet::new();
    for plan in plans.iter_mut().rev() {
        plan.retain(|op| !matches!(op, Op::DeleteFrontend(key) if comes_back.contains(key)));
        comes_back.extend(plan.iter().filter_map(|op| match op {
            Op::PutFrontend(key, value) if value.flags & frontend_flags::WILDCARD != 0 => Some(*key),
            _ => None,
        }));
    }
}

/// Whether frontends are written or deleted before source ranges, or written after some were deleted: see `Stages`.
fn depends_on_order(plan: &[Op]) -> bool {
    let first = plan.iter().position(|op| matches!(op, Op::PutFrontend(..) | Op::DeleteFrontend(_)));
    let last = plan.iter().rposition(|op| matches!(op, Op::PutFrontend(..)));
    let put = plan.iter().rposition(|op| matches!(op, Op::PutSourceRange(_)));
    let deleted = plan.iter().position(|op| matches!(op, Op::DeleteSourceRange(_)));
    first.zip(put).is_some_and(|(first, put)| first < put)
        || last.zip(deleted).is_some_and(|(last, deleted)| deleted < last)
}

fn flush(batch: &mut Vec<Op>, all: &mut Vec<Op>) {
    batch.sort_by_key(phase);
    all.append(batch);
}
