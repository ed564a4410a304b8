//! Allocators that can take over what exists: ids, and ranges of slots.

use std::collections::{BTreeMap, BTreeSet};

/// Numbers of a range, the lowest free one first. Free numbers are kept as intervals, so that any number may be taken.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Ids {
    /// First and last of each interval.
    free: BTreeMap<u32, u32>,
    available: u64,
}

impl Ids {
    /// All of `first..=last` are free.
    pub(super) fn new(first: u32, last: u32) -> Self {
        let free: BTreeMap<u32, u32> = (first <= last).then_some((first, last)).into_iter().collect();
        let available = free.iter().map(|(first, last)| u64::from(last - first) + 1).sum();
        Self { free, available }
    }

    pub(super) fn available(&self) -> u64 {
        self.available
    }

    /// Takes the lowest free one above `last`, or else the lowest.
    pub(super) fn next(&mut self, last: u32) -> Option<u32> {
        let Some(above) = last.checked_add(1) else { return self.lowest() };
        let inside = self.free.range(..=above).next_back().filter(|(_, end)| **end >= above).map(|_| above);
        match inside.or_else(|| self.free.range(above..).next().map(|(first, _)| *first)) {
            Some(id) => self.take(id).then_some(id),
            None => self.lowest(),
        }
    }

    /// Takes the lowest free one.
    pub(super) fn lowest(&mut self) -> Option<u32> {
        let id = *self.free.first_key_value()?.0;
        self.take(id).then_some(id)
    }

    /// Whether it was free.
    pub(super) fn take(&mut self, id: u32) -> bool {
        let Some((&first, &last)) = self.free.range(..=id).next_back().filter(|(_, last)| **last >= id) else {
            return false;
        };
        self.free.remove(&first);
        if first < id {
            self.free.insert(first, id - 1);
        }
        if id < last {
            self.free.insert(id + 1, last);
        }
        self.available -= 1;
        true
    }

    /// `id` was taken from here.
    pub(super) fn release(&mut self, id: u32) {
        let (mut first, mut last) = (id, id);
        if let Some((&before, &end)) = self.free.range(..id).next_back()
            && end + 1 == id
        {
            self.free.remove(&before);
            first = before;
        }
        if let Some(after) = id.checked_add(1)
            && let Some(end) = self.free.remove(&after)
        {
            last = end;
        }
        self.free.insert(first, last);
        self.available += 1;
    }
}

/// Ranges of slots: a buddy allocator, whose free blocks are as large as they can be and aligned to their size.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Slots {
    /// Bases of free blocks, by the logarithm of their size.
    free: [BTreeSet<u32>; 32],
    reserved: u32,
}

impl Slots {
    pub(super) fn new(limit: u32) -> Self {
        let mut slots = Self { free: Default::default(), reserved: limit };
        slots.release(0, limit);
        slots
    }

    /// Slots that are not free.
    pub(super) fn reserved(&self) -> u32 {
        self.reserved
    }

    /// A range of `capacity`, a power of two: the smallest block that holds it, of those the lowest.
    pub(super) fn allocate(&mut self, capacity: u32) -> Option<u32> {
        let order = capacity.trailing_zeros() as usize;
        let (found, base) = (order..self.free.len()).find_map(|o| self.free[o].first().map(|base| (o, *base)))?;
        self.free[found].remove(&base);
        for split in order..found {
            self.free[split].insert(base + (1 << split));
        }
        self.reserved += capacity;
        Some(base)
    }

    /// The free block that `slot` lies in: order and base.
    fn block_of(&self, slot: u32) -> Option<(usize, u32)> {
        (0..self.free.len())
            .map(|order| (order, slot >> order << order))
            .find(|(order, base)| self.free[*order].contains(base))
    }

    /// Takes a given range, of any size and alignment. Changes nothing and says so if it is not free as a whole.
    pub(super) fn reserve(&mut self, base: u32, len: u32) -> bool {
        let Some(end) = base.checked_add(len) else { return false };
        let mut blocks = Vec::new();
        let mut at = base;
        while at < end {
            let Some((order, block)) = self.block_of(at) else { return false };
            blocks.push((order, block));
            at = match block.checked_add(1 << order) {
                Some(next) => next,
                None => break,
            };
        }
        for (order, block) in blocks {
            self.free[order].remove(&block);
            self.reserved += 1 << order;
            let block_end = u64::from(block) + (1 << order);
            self.release(block, base.saturating_sub(block));
            self.release(end, block_end.saturating_sub(u64::from(end)) as u32);
        }
        true
    }

    /// The range was taken from here, perhaps as part of a larger one.
    pub(super) fn release(&mut self, mut base: u32, mut len: u32) {
        self.reserved -= len;
        while len > 0 {
            let order = base.trailing_zeros().min(len.ilog2()) as usize;
            self.release_block(base, order);
            len -= 1 << order;
            // Only the very last block of the numbers can wrap, and then nothing is left.
            base = base.wrapping_add(1 << order);
        }
    }

    fn release_block(&mut self, mut base: u32, mut order: usize) {
        while order + 1 < self.free.len() && self.free[order].remove(&(base ^ (1 << order))) {
            base &= !(1 << order);
            order += 1;
        }
        self.free[order].insert(base);
    }
}
