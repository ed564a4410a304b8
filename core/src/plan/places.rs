//! Where the members of a set lie in its block: those on this node first, so that a node that is handed a packet finds
//! its own among any number by halving.
//!
//! Who may stay where it is stays: session affinity knows members by their place, and every move is a write.

use std::collections::HashMap;

use kinesin_abi::BackendId;

/// The writes that turn one order into another, each with its index in the block.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Moves {
    /// At once, in this order.
    pub(super) first: Vec<(usize, BackendId)>,
    /// After the counts have risen, because who lies there moves to where no count reaches before.
    pub(super) late: Vec<(usize, BackendId)>,
}

/// The new order of a block that holds `old`: of `members` those that are `local` come first. New ones take the places of
/// those that leave, and where there are too few, the last ones close the gaps.
pub(super) fn arrange(old: &[BackendId], members: &[BackendId], local: impl Fn(BackendId) -> bool) -> Vec<BackendId> {
    let locals = members.iter().filter(|id| local(**id)).count();
    let in_its_part = |index: usize, id: BackendId| index < members.len() && (index < locals) == local(id);
    let was: HashMap<BackendId, usize> = old.iter().enumerate().map(|(index, id)| (*id, index)).collect();
    let mut places: Vec<Option<BackendId>> = vec![None; members.len()];
    let (mut new, mut moving) = (Vec::new(), Vec::new());
    for id in members {
        match was.get(id) {
            Some(index) if in_its_part(*index, *id) => places[*index] = Some(*id),
            Some(index) => moving.push((*index, *id)),
            None => new.push(*id),
        }
    }
    moving.sort_unstable_by(|a, b| b.cmp(a));
    new.extend(moving.into_iter().map(|(_, id)| id));
    let (here, there): (Vec<BackendId>, Vec<BackendId>) = new.into_iter().partition(|id| local(*id));
    let (mut here, mut there) = (here.into_iter(), there.into_iter());
    for (index, place) in places.iter_mut().enumerate().filter(|(_, place)| place.is_none()) {
        *place = if index < locals { here.next() } else { there.next() };
    }
    places.into_iter().flatten().collect()
}

/// The writes from `old` to `new` in an order in which nobody who stays is missing from what the old count, or later the
/// new one, reaches; where two change places there is no such order.
pub(super) fn moves(old: &[BackendId], new: &[BackendId]) -> Moves {
    let place: HashMap<BackendId, usize> = new.iter().enumerate().map(|(index, id)| (*id, index)).collect();
    let mut done: Vec<bool> = new.iter().enumerate().map(|(index, id)| old.get(index) == Some(id)).collect();
    let mut is_late = vec![false; new.len()];
    let mut moves = Moves::default();
    for start in 0..new.len() {
        // Who lies there goes to its new place first, and so on.
        let (mut chain, mut next) = (Vec::new(), Some(start));
        while let Some(at) = next.filter(|at| !done[*at]) {
            done[at] = true;
            chain.push(at);
            next = old.get(at).and_then(|id| place.get(id)).copied();
        }
        // Beyond the old count nobody is seen before it rises. Where the chain closes, somebody must go first.
        let out_of_sight = |at: usize, is_late: &[bool]| at >= old.len() || is_late[at];
        let mut waits = next.is_some_and(|at| at != start && out_of_sight(at, &is_late));
        for index in chain.into_iter().rev() {
            is_late[index] = waits;
            let stage = if waits { &mut moves.late } else { &mut moves.first };
            stage.push((index, new[index]));
            waits = out_of_sight(index, &is_late);
        }
    }
    moves
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    /// Even ones are local.
    fn even(id: BackendId) -> bool {
        id.is_multiple_of(2)
    }

    #[test]
    fn who_may_stay_stays_and_the_others_move_as_little_as_possible() {
        let cases: [(&[u32], &[u32], &[u32]); 7] = [
            (&[], &[1, 2, 3], &[2, 1, 3]),
            (&[2, 1, 3], &[1, 2, 3, 5], &[2, 1, 3, 5]),
            (&[2, 1, 3], &[1, 2, 3, 4], &[2, 4, 3, 1]),
            (&[2, 4, 1, 3], &[4, 1, 3], &[4, 3, 1]),
            (&[1, 3, 5, 7], &[5, 7], &[7, 5]),
            (&[1, 3, 5], &[9, 1, 5], &[1, 9, 5]),
            (&[2, 1], &[], &[]),
        ];
        for (old, members, expected) in cases {
            assert_eq!(arrange(old, members, even), expected, "{old:?} to {members:?}");
        }
    }

    #[test]
    fn a_member_that_makes_room_is_never_out_of_reach() {
        // 4 comes, 1 goes behind the others: only when the count has risen may its place be taken.
        assert_eq!(moves(&[2, 1, 3], &[2, 4, 3, 1]), Moves { first: vec![(3, 1)], late: vec![(1, 4)] });
        assert_eq!(moves(&[2, 4, 1, 3], &[4, 3, 1]), Moves { first: vec![(0, 4), (1, 3)], late: vec![] });
    }

    proptest! {
        #[test]
        fn every_step_keeps_whoever_stays_within_reach(
            old in proptest::collection::btree_set(1u32..40, 0..20),
            members in proptest::collection::btree_set(1u32..40, 0..20),
        ) {
            let old = arrange(&[], &old.into_iter().collect::<Vec<_>>(), even);
            let members: Vec<u32> = members.into_iter().collect();
            let new = arrange(&old, &members, even);
            prop_assert_eq!(new.iter().collect::<BTreeSet<_>>(), members.iter().collect::<BTreeSet<_>>());
            prop_assert!(new.is_sorted_by_key(|id| !even(*id)));
            let Moves { first, late } = moves(&old, &new);
            let mut slots = old.clone();
            slots.resize(old.len().max(new.len()), 0);
            let staying: Vec<u32> = old.iter().copied().filter(|id| members.contains(id)).collect();
            let check = |slots: &[u32], count: usize| {
                staying.iter().all(|id| slots[..count].contains(id)) && !slots[..count].contains(&0)
            };
            for (index, id) in first {
                slots[index] = id;
                prop_assert!(check(&slots, old.len()), "{old:?} to {new:?}: {slots:?}");
            }
            let count = if new.len() >= old.len() { new.len() } else { old.len() };
            for (index, id) in late {
                prop_assert!(check(&slots, count));
                slots[index] = id;
            }
            prop_assert_eq!(&slots[..new.len()], &new[..]);
        }
    }
}
