//! Taking over maps that an earlier agent left, in whatever state.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use kinesin_abi::{Backend, BackendId, FrontendKey, FrontendValue, SLOT_EMPTY, SetRef, SourceRangeKey, frontend_flags};

use super::entries::{FrontendEntry, Table, claimable};
use super::image::Image;
use super::slots::order_for;
use super::stages::Stages;
use super::{Actual, Op, Planner};

impl Planner {
    /// Takes over what the maps hold: ids, blocks and tables stay where they are, so that a restart moves nothing and cuts
    /// nothing. To be called once, before the first update.
    ///
    /// What contradicts itself is repaired at once and as gently as possible (R24): a set that overlaps another one, lies
    /// where no set may lie or counts slots without backends is copied to a place of its own, without what is missing; a
    /// frontend whose set has nothing usable points at none; backends that cannot be read, slots of no set and tables of no
    /// set are freed. Services claim what is theirs by [`Planner::update`]; the rest stays until [`Planner::prune`].
    pub fn adopt(&mut self, actual: Actual) -> Vec<Op> {
        *self = Self::new(self.image.limits.clone());
        let mut stages = Stages::default();
        let unreadable = self.adopt_backends(&actual);
        let slots = self.read_slots(&actual);
        let frontends: BTreeMap<FrontendKey, FrontendValue> = actual.frontends.into_iter().collect();

        let refs: BTreeSet<(u32, u32)> = frontends
            .values()
            .flat_map(|value| [value.external, value.internal])
            .filter(|set| set.count > 0)
            .map(|set| (set.base, set.count))
            .collect();
        let moved = self.adopt_sets(&refs, &slots, &mut stages);
        self.adopt_frontends(frontends, &moved, &mut stages);
        self.adopt_tables(actual.maglev, &mut stages);
        self.adopt_ranges(actual.source_ranges, &mut stages);

        for index in actual.slots.iter().map(|(index, _)| *index).collect::<BTreeSet<u32>>() {
            let in_use =
                self.image.blocks.range(..=index).next_back().is_some_and(|(base, block)| index - base < block.len);
            if !in_use && index < self.image.limits.slots {
                if self.image.slot(index) == SLOT_EMPTY {
                    stages.empty_unknown(index);
                } else {
                    self.image.empty_slot(index, &mut stages);
                }
            }
        }
        for id in unreadable {
            Image::free_unknown(id, &mut stages);
        }
        // Blocks made for sets that no frontend points at any more.
        self.image.sweep(&mut stages);
        stages.into_ops()
    }

    /// Returns the ids of unreadable backends.
    fn adopt_backends(&mut self, actual: &Actual) -> Vec<BackendId> {
        let backends: BTreeMap<BackendId, Backend> = actual.backends.iter().copied().collect();
        let mut unreadable = Vec::new();
        for (id, backend) in backends {
            if id >= self.image.limits.backends || backend == Backend::default() {
                continue;
            }
            if id == 0 || claimable(backend.state).is_none() {
                unreadable.push(id);
            } else {
                self.image.adopt_backend(id, backend);
            }
        }
        unreadable
    }

    /// Slots that hold a known backend.
    fn read_slots(&self, actual: &Actual) -> BTreeMap<u32, BackendId> {
        let all: BTreeMap<u32, BackendId> = actual.slots.iter().copied().collect();
        let limit = self.image.limits.slots;
        all.into_iter().filter(|(index, id)| *index < limit && self.image.backend(*id).is_some()).collect()
    }

    /// Takes over the sets that make sense and copies the others. Returns where each of the others is now.
    fn adopt_sets(
        &mut self,
        refs: &BTreeSet<(u32, u32)>,
        slots: &BTreeMap<u32, BackendId>,
        stages: &mut Stages,
    ) -> HashMap<(u32, u32), SetRef> {
        for (index, id) in slots {
            self.image.note_slot(*index, *id);
        }
        let mut bad: Vec<(u32, u32)> = Vec::new();
        // The longest first: an interrupted plan leaves several counts for one base, and the rest is inside the longest.
        for &(base, count) in refs.iter().rev() {
            if self.image.blocks.get(&base).is_some_and(|block| count <= block.len) {
                continue;
            }
            let whole = || slots.range(base..base.saturating_add(count)).count() == count as usize;
            let order = order_for(count as usize).filter(|_| base > 0 && count <= self.image.limits.slots && whole());
            match order {
                Some(order) if self.image.allocator.reserve(base, order) => {
                    self.image.add_block(base, order);
                    if let Some(block) = self.image.blocks.get_mut(&base) {
                        block.len = count;
                    }
                }
                _ => bad.push((base, count)),
            }
        }
        // Copies read what the maps held, in at most a few times the length of the array, however wild the counts are.
        let mut budget = self.image.limits.slots as usize * 4;
        let mut moved = HashMap::new();
        for (base, count) in bad {
            let mut seen = HashSet::new();
            let mut read = 0;
            let members: Vec<BackendId> = slots
                .range(base..base.saturating_add(count))
                .take(budget)
                .inspect(|_| read += 1)
                .map(|(_, id)| *id)
                .filter(|id| seen.insert(*id))
                .collect();
            budget -= read;
            let place = order_for(members.len()).and_then(|order| Some((order, self.image.allocator.allocate(order)?)));
            let set = match place {
                Some((order, at)) => {
                    self.image.add_block(at, order);
                    self.image.fill(at, &members, stages);
                    self.image.set_ref(at)
                }
                None => SetRef::default(),
            };
            moved.insert((base, count), set);
        }
        moved
    }

    fn adopt_frontends(
        &mut self,
        frontends: BTreeMap<FrontendKey, FrontendValue>,
        moved: &HashMap<(u32, u32), SetRef>,
        stages: &mut Stages,
    ) {
        for (key, value) in frontends {
            let now = |set: SetRef| moved.get(&(set.base, set.count)).copied().unwrap_or(set);
            let repaired = FrontendValue { external: now(value.external), internal: now(value.internal), ..value };
            self.image.count_refs(&repaired, true, stages);
            self.image.frontends.insert(key, FrontendEntry { value: repaired, owner: None, users: 0 });
            if repaired != value {
                stages.put_adopted(key, repaired);
            }
            if value.service != 0 {
                self.adopted_ids.insert(value.service);
                self.next_id = self.next_id.max(value.service.saturating_add(1));
            }
        }
    }

    /// Keeps tables that can be right; writes those that must be there.
    fn adopt_tables(&mut self, tables: Vec<(u32, Arc<[BackendId]>)>, stages: &mut Stages) {
        let wanted: BTreeSet<u32> = self
            .image
            .frontends
            .values()
            .filter(|entry| entry.value.flags & frontend_flags::MAGLEV != 0)
            .flat_map(|entry| [entry.value.external, entry.value.internal])
            .filter(|set| set.count > 0)
            .map(|set| set.base)
            .collect();
        let tables: BTreeMap<u32, Arc<[BackendId]>> = tables.into_iter().collect();
        for (base, entries) in tables {
            let members: HashSet<BackendId> = self.image.content(base).collect();
            let right_size = entries.len() == self.image.limits.maglev_size as usize;
            self.image.tables.insert(base, Table::Adopted(entries.clone()));
            if !wanted.contains(&base) {
                self.image.delete_table(base, stages);
            } else if !right_size || entries.iter().any(|id| !members.contains(id)) {
                self.image.put_table(base, stages);
            }
        }
        for base in wanted {
            if !self.image.tables.contains_key(&base) {
                self.image.put_table(base, stages);
            }
        }
    }
}

impl Planner {
    /// Takes over the ranges of service ports that there are; those of others go at once.
    fn adopt_ranges(&mut self, ranges: Vec<SourceRangeKey>, stages: &mut Stages) {
        for key in ranges {
            self.image.ranges.entry(key.range.service).or_default().insert(key);
        }
        let orphaned: Vec<u32> =
            self.image.ranges.keys().filter(|id| !self.adopted_ids.contains(id)).copied().collect();
        for id in orphaned {
            self.image.set_ranges(id, BTreeSet::new(), stages);
        }
    }
}

/// Ops that turn `actual` into what the image says, in the order of a plan. Maps are large and differ seldom: nothing is
/// copied but what differs.
pub(super) fn difference(actual: &Actual, image: &Image) -> Vec<Op> {
    let (backends, frees) = compare(&actual.backends, image.backends().map(|(id, entry)| (id, entry.value)));
    let mut ops: Vec<Op> = backends.into_iter().map(|(id, backend)| Op::Backend(id, backend)).collect();
    let frees = frees.into_iter().map(|id| Op::Backend(id, Backend::default()));

    let (slots, empties) = compare(&actual.slots, image.slots());
    ops.extend(slots.into_iter().map(|(index, id)| Op::Slot(index, id)));
    let empties = empties.into_iter().map(|index| Op::Slot(index, SLOT_EMPTY));

    let tables: BTreeMap<u32, &Table> = image.tables.iter().map(|(base, table)| (*base, table)).collect();
    let (tables, table_deletes) =
        compare(&actual.maglev, tables.into_iter().map(|(base, table)| (base, image.table(table))));
    ops.extend(tables.into_iter().map(|(base, table)| Op::PutMaglev(base, table)));

    let have: BTreeSet<SourceRangeKey> = actual.source_ranges.iter().copied().collect();
    let want: BTreeSet<SourceRangeKey> = image.ranges.values().flatten().copied().collect();
    let foreign = have.difference(&want).map(|key| Op::DeleteSourceRange(*key));
    ops.extend(want.difference(&have).map(|key| Op::PutSourceRange(*key)));

    let (frontends, deletes) = compare_frontends(&actual.frontends, image);
    // Foreign entries first: they may fill the map, and nobody's traffic needs them.
    ops.extend(deletes.into_iter().map(Op::DeleteFrontend));
    ops.extend(frontends.into_iter().map(|(key, value)| Op::PutFrontend(key, value)));

    ops.extend(foreign);
    ops.extend(table_deletes.into_iter().map(Op::DeleteMaglev));
    ops.extend(empties);
    ops.extend(frees);
    ops
}

/// Elements of one map, by key.
type Elements<K, V> = Vec<(K, V)>;

/// What is wanted and not there, and the keys of what is there and not wanted. `want` is in the order of its keys, and so is
/// nearly always `have`: arrays are read from their beginning.
fn compare<K: Copy + Ord, V: PartialEq>(
    have: &[(K, V)],
    want: impl Iterator<Item = (K, V)>,
) -> (Elements<K, V>, Vec<K>) {
    let mut order: Vec<u32> = Vec::new();
    if !have.is_sorted_by_key(|(key, _)| *key) {
        order = (0..have.len() as u32).collect();
        order.sort_by_key(|at| have[*at as usize].0);
    }
    let at = |place: usize| match order.get(place) {
        Some(at) => have.get(*at as usize),
        None => have.get(place),
    };
    let (mut missing, mut extra, mut place) = (Vec::new(), Vec::new(), 0);
    for (key, value) in want {
        while let Some((before, _)) = at(place).filter(|(held, _)| *held < key) {
            extra.push(*before);
            place += 1;
        }
        match at(place).filter(|(held, _)| *held == key) {
            Some((_, held)) => {
                if *held != value {
                    missing.push((key, value));
                }
                place += 1;
            }
            None => missing.push((key, value)),
        }
    }
    while let Some((held, _)) = at(place) {
        extra.push(*held);
        place += 1;
    }
    (missing, extra)
}

/// [`compare`] of the frontends, which no side has in order; the results are.
fn compare_frontends(
    have: &[(FrontendKey, FrontendValue)],
    image: &Image,
) -> (Elements<FrontendKey, FrontendValue>, Vec<FrontendKey>) {
    let (mut right, mut missing, mut extra) = (0, Vec::new(), Vec::new());
    for (key, value) in have {
        match image.frontends.get(key) {
            Some(entry) if entry.value == *value => right += 1,
            Some(entry) => missing.push((*key, entry.value)),
            None => extra.push(*key),
        }
    }
    if right + missing.len() < image.frontends.len() {
        let there: HashSet<&FrontendKey> = have.iter().map(|(key, _)| key).collect();
        let absent = image.frontends.iter().filter(|(key, _)| !there.contains(key));
        missing.extend(absent.map(|(key, entry)| (*key, entry.value)));
    }
    missing.sort_unstable_by_key(|(key, _)| *key);
    extra.sort_unstable();
    (missing, extra)
}
