//! Which runs of slots are in use: a buddy allocator over the slots array.
//!
//! A block is `1 << order` slots at a multiple of its size. That makes growing in place likely, merging free blocks cheap,
//! and the allocator restorable from nothing but the blocks in use. Lowest address first, so equal histories give equal
//! maps.

use std::collections::BTreeSet;

/// Orders up to this one exist: blocks of up to 2³¹ slots.
const MAX_ORDER: u8 = 31;

/// Free blocks, by order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Slots {
    free: Vec<BTreeSet<u32>>,
    capacity: u32,
    left: u32,
}

/// The smallest order whose block holds `count` slots; `None` for none and for more than exist.
pub(super) fn order_for(count: usize) -> Option<u8> {
    let size = u32::try_from(count).ok().filter(|count| *count > 0)?.checked_next_power_of_two()?;
    Some(size.trailing_zeros() as u8)
}

impl Slots {
    /// All of `1..capacity` free. Slot 0 is never used, so that a zeroed reference points at nothing.
    pub(super) fn new(capacity: u32) -> Self {
        let mut slots = Self { free: vec![BTreeSet::new(); usize::from(MAX_ORDER) + 1], capacity, left: 0 };
        let mut base = 1;
        while base < capacity {
            let fits = (capacity - base).ilog2() as u8;
            let order = (base.trailing_zeros() as u8).min(fits);
            slots.put(base, order);
            base += 1 << order;
        }
        slots
    }

    /// Slots in no block.
    pub(super) fn left(&self) -> u32 {
        self.left
    }

    /// Slots that there are, the unused first one included.
    pub(super) fn capacity(&self) -> u32 {
        self.capacity
    }

    /// Takes the smallest free block that is large enough, at the lowest address. O(log slots).
    pub(super) fn allocate(&mut self, order: u8) -> Option<u32> {
        let from = (order..=MAX_ORDER).find(|order| !self.free[usize::from(*order)].is_empty())?;
        let base = *self.free[usize::from(from)].first()?;
        self.take(base, from);
        self.give_back_above(base, order, from);
        Some(base)
    }

    /// Takes this very block; `false` when a part of it is in use or does not exist.
    pub(super) fn reserve(&mut self, base: u32, order: u8) -> bool {
        if order > MAX_ORDER || base.trailing_zeros() < u32::from(order) {
            return false;
        }
        let around = (order..=MAX_ORDER).find_map(|larger| {
            let start = base & !((1u32 << larger) - 1);
            self.free[usize::from(larger)].contains(&start).then_some((start, larger))
        });
        let Some((start, larger)) = around else { return false };
        self.take(start, larger);
        // Split towards `base`, giving back the halves that do not contain it.
        for half in (order..larger).rev() {
            let other = (base & !((1u32 << half) - 1)) ^ (1u32 << half);
            self.put(other, half);
        }
        true
    }

    /// Doubles a block in place, as its upper neighbour is free and the result is aligned.
    pub(super) fn extend(&mut self, base: u32, order: u8) -> bool {
        if order >= MAX_ORDER || base & (1 << order) != 0 {
            return false;
        }
        let buddy = base | (1 << order);
        if !self.free[usize::from(order)].contains(&buddy) {
            return false;
        }
        self.take(buddy, order);
        true
    }

    /// Gives the upper part of a block back, so that one of order `to` stays.
    pub(super) fn shrink(&mut self, base: u32, to: u8, from: u8) {
        for order in (to..from).rev() {
            self.release(base + (1 << order), order);
        }
    }

    /// Gives a block back and merges it with its free neighbours. O(log² slots).
    pub(super) fn release(&mut self, mut base: u32, mut order: u8) {
        while order < MAX_ORDER {
            let buddy = base ^ (1 << order);
            if !self.free[usize::from(order)].contains(&buddy) {
                break;
            }
            self.take(buddy, order);
            base = base.min(buddy);
            order += 1;
        }
        self.put(base, order);
    }

    fn give_back_above(&mut self, base: u32, to: u8, from: u8) {
        for order in (to..from).rev() {
            self.put(base + (1 << order), order);
        }
    }

    fn put(&mut self, base: u32, order: u8) {
        self.free[usize::from(order)].insert(base);
        self.left += 1 << order;
    }

    fn take(&mut self, base: u32, order: u8) {
        self.free[usize::from(order)].remove(&base);
        self.left -= 1 << order;
    }
}
