//! Where a service's sets go, and whether there is room: everything about a plan that can fail. It takes slots only, and
//! gives them back when the plan fails.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use kinesin_abi::{BackendId, FrontendKey, FrontendValue, SetRef, frontend_flags};

use super::image::{BackendKey, Image};
use super::service::{Record, Wanted, key_of_ref, ranges_of};
use super::slots::order_for;
use super::{PlanError, Planner};
use crate::services::Compiled;

/// What was taken while planning, to be given back when the plan fails.
pub(super) enum Taken {
    New { base: u32, order: u8 },
    Extended { base: u32, from: u8 },
}

/// The usable backends of a set, and where it may be kept.
pub(super) struct Members {
    pub(super) ids: Vec<BackendId>,
    pub(super) candidates: Vec<u32>,
    pub(super) tabled: bool,
}

impl Members {
    pub(super) fn of(compiled: &Compiled, index: usize, ids: &HashMap<BackendKey, BackendId>) -> Self {
        let mut seen = HashSet::new();
        let members = compiled
            .sets
            .get(index)
            .into_iter()
            .flat_map(|set| set.backends.iter().take(set.usable))
            .filter_map(|backend| ids.get(&key_of_ref(backend)).copied())
            .filter(|id| seen.insert(*id))
            .collect();
        Self { ids: members, candidates: Vec::new(), tabled: false }
    }
}

pub(super) fn scopes(value: &FrontendValue) -> [SetRef; 2] {
    [value.external, value.internal]
}

impl Planner {
    /// Whether there is room, and if so whether only after deleting first.
    pub(super) fn check_frontends(
        &self,
        mine: &BTreeSet<FrontendKey>,
        wildcards: &BTreeSet<FrontendKey>,
        dropped: &[FrontendKey],
        dropped_wildcards: &[FrontendKey],
    ) -> Result<bool, PlanError> {
        let frontends = &self.image.frontends;
        let capacity = self.image.limits.frontends as usize;
        let new = mine.iter().chain(wildcards).filter(|key| !frontends.contains_key(key)).count();
        let gone = dropped.len()
            + dropped_wildcards.iter().filter(|key| frontends.get(key).is_some_and(|entry| entry.users <= 1)).count();
        let peak = frontends.len() + new;
        if new > 0 && peak.saturating_sub(gone) > capacity {
            return Err(self.full("frontends"));
        }
        Ok(peak > capacity)
    }

    /// The same for tables: those of my blocks that will not have one any more make room.
    pub(super) fn check_tables(
        &self,
        sets: &BTreeMap<usize, Members>,
        placed: &BTreeMap<usize, u32>,
        refs: &HashMap<u32, u32>,
    ) -> Result<bool, PlanError> {
        let tables = &self.image.tables;
        let capacity = self.image.limits.maglev_tables as usize;
        let tabled: BTreeSet<u32> =
            placed.iter().filter(|(index, _)| sets[index].tabled).map(|(_, base)| *base).collect();
        let new = tabled.iter().filter(|base| !tables.contains_key(base)).count();
        let gone = refs
            .iter()
            .filter(|(base, mine)| {
                tables.contains_key(base)
                    && !tabled.contains(base)
                    && self.image.blocks.get(base).is_some_and(|block| block.users == **mine)
            })
            .count();
        let peak = tables.len() + new;
        if new > 0 && peak - gone > capacity {
            return Err(self.full("maglev"));
        }
        Ok(peak > capacity)
    }

    /// Whether the ranges of this service fit beside all others and its own old ones.
    pub(super) fn check_ranges(&self, record: &Record, mine: &[Wanted], compiled: &Compiled) -> Result<(), PlanError> {
        let restricted = |wanted: &&Wanted| wanted.flags & frontend_flags::SOURCE_RANGES != 0;
        let ports: BTreeSet<_> = mine.iter().filter(restricted).map(|wanted| &wanted.port).collect();
        let new: usize = ports
            .into_iter()
            .map(|port| {
                let id = record.id(port).or_else(|| {
                    let mut mine = mine.iter().filter(|wanted| wanted.port == *port);
                    mine.find_map(|wanted| self.adopted_id(&wanted.key))
                });
                let held = id.and_then(|id| self.image.ranges.get(&id));
                let wanted = ranges_of(compiled, id.unwrap_or_default());
                wanted.iter().filter(|key| !held.is_some_and(|held| held.contains(key))).count()
            })
            .sum();
        let fits = new == 0 || self.image.ranges_used() + new <= self.image.limits.source_ranges as usize;
        if fits { Ok(()) } else { Err(self.full("ranges")) }
    }

    pub(super) fn full(&self, table: &'static str) -> PlanError {
        let limits = &self.image.limits;
        let (capacity, key) = match table {
            "frontends" => (limits.frontends, "bpf-lb-map-max"),
            "slots" => (limits.slots, "bpf-lb-map-max"),
            "backends" => (limits.backends, "bpf-lb-map-max"),
            "ranges" => (limits.source_ranges, "bpf-lb-map-max"),
            _ => (limits.maglev_tables, "bpf-lb-maglev-map-max"),
        };
        PlanError::Full { table, capacity, key }
    }

    /// How often each block is used by frontends that are mine, or will no longer be.
    pub(super) fn references(&self, mine: &[Wanted], dropped: &[FrontendKey]) -> HashMap<u32, u32> {
        let mut refs = HashMap::new();
        for key in mine.iter().map(|wanted| &wanted.key).chain(dropped) {
            let Some(entry) = self.image.frontends.get(key) else { continue };
            for set in scopes(&entry.value).into_iter().filter(|set| set.count > 0) {
                *refs.entry(set.base).or_insert(0) += 1;
            }
        }
        refs
    }

    /// Finds a block for each set that has members: the one whose content it already is, else one that it can have in
    /// place, else a new one. Only blocks that nobody else uses are changed (R24).
    pub(super) fn place(
        &mut self,
        sets: &BTreeMap<usize, Members>,
        refs: &HashMap<u32, u32>,
    ) -> Result<(BTreeMap<usize, u32>, Vec<Taken>), PlanError> {
        let mut placed: BTreeMap<usize, u32> = BTreeMap::new();
        let mut taken: HashSet<u32> = HashSet::new();
        let exclusive = |image: &Image, base: &u32| {
            image.blocks.get(base).is_some_and(|block| refs.get(base).is_some_and(|mine| *mine == block.users))
        };
        let filled = || sets.iter().filter(|(_, set)| !set.ids.is_empty());
        for (index, set) in filled() {
            let mut ids = set.ids.clone();
            ids.sort_unstable();
            let same = |base: &&u32| {
                let mut content: Vec<BackendId> = self.image.content(**base).collect();
                content.sort_unstable();
                content == ids
            };
            let found =
                set.candidates.iter().filter(|base| !taken.contains(base) && exclusive(&self.image, base)).find(same);
            if let Some(base) = found {
                taken.insert(*base);
                placed.insert(*index, *base);
            }
        }
        let mut undo: Vec<Taken> = Vec::new();
        for (index, set) in filled() {
            if placed.contains_key(index) {
                continue;
            }
            let candidates: Vec<u32> = set
                .candidates
                .iter()
                .filter(|base| !taken.contains(base) && exclusive(&self.image, base))
                .copied()
                .collect();
            let found = order_for(set.ids.len()).and_then(|order| {
                candidates
                    .iter()
                    .copied()
                    .find(|base| self.grow(*base, order, &mut undo))
                    .or_else(|| self.new_block(order, &mut undo))
            });
            let Some(base) = found else {
                self.give_back(undo);
                return Err(self.full("slots"));
            };
            taken.insert(base);
            placed.insert(*index, base);
        }
        Ok((placed, undo))
    }

    /// Makes room for `1 << order` slots where the block lies, if that is possible.
    fn grow(&mut self, base: u32, order: u8, undo: &mut Vec<Taken>) -> bool {
        let Some(block) = self.image.blocks.get_mut(&base) else { return false };
        let from = block.order;
        let mut now = from;
        while now < order && self.image.allocator.extend(base, now) {
            now += 1;
        }
        if now < order {
            self.image.allocator.shrink(base, from, now);
            return false;
        }
        block.order = now;
        if now > from {
            undo.push(Taken::Extended { base, from });
        }
        true
    }

    /// The members of a set that moves to this block, in the order that they have where it lies now: session affinity
    /// knows them by their place.
    pub(super) fn in_known_order(&self, set: &Members, base: u32) -> Vec<BackendId> {
        let before = set.candidates.first().filter(|_| !set.candidates.contains(&base));
        let Some(before) = before else { return set.ids.clone() };
        let places: HashMap<BackendId, usize> =
            self.image.content(*before).enumerate().map(|(place, id)| (id, place)).collect();
        let mut members = set.ids.clone();
        // New ones come last, in their own order.
        members.sort_by_key(|id| places.get(id).copied().unwrap_or(usize::MAX));
        members
    }

    fn new_block(&mut self, order: u8, undo: &mut Vec<Taken>) -> Option<u32> {
        let base = self.image.allocator.allocate(order)?;
        self.image.add_block(base, order);
        undo.push(Taken::New { base, order });
        Some(base)
    }

    pub(super) fn give_back(&mut self, undo: Vec<Taken>) {
        for taken in undo.into_iter().rev() {
            match taken {
                Taken::New { base, order } => {
                    self.image.blocks.remove(&base);
                    self.image.allocator.release(base, order);
                }
                Taken::Extended { base, from } => {
                    if let Some(block) = self.image.blocks.get_mut(&base) {
                        self.image.allocator.shrink(base, from, block.order);
                        block.order = from;
                    }
                }
            }
        }
    }
}
