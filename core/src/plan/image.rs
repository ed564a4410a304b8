//! What the maps hold, as far as the planner has ordered, with the reference counts that say what is still needed.
//!
//! Every change goes through here and leaves an [`Op`] in its stage, so the image and the ops cannot disagree.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;

use hashbrown::HashTable;
use kinesin_abi::{
    Addr, BACKEND_LOCAL, Backend, BackendId, BackendState, Be16, FrontendKey, FrontendValue, SLOT_EMPTY, SetRef,
    SourceRangeKey, frontend_flags,
};

use super::entries::{BackendEntry, Block, Claim, FrontendEntry, Said, Table};
use super::places;
use super::slots::Slots;
use super::stages::Stages;
use super::{Limits, Op};
use crate::maglev;

/// What identifies a backend.
pub(super) type BackendKey = (Addr, Be16, u8);

/// So many ids rest after their backend is gone before the first of them is given to another one, while there are others:
/// connections that still know the old backend should not meet a new one under its id.
const RESTING: usize = 1024;

/// A frontend that asks a list of clients not served.
const DENIES: u32 = frontend_flags::SOURCE_RANGES | frontend_flags::SOURCE_RANGES_DENY;

/// See the module.
#[derive(Debug)]
pub(super) struct Image {
    pub(super) limits: Limits,
    /// By id; index 0 is never used.
    backends: Vec<BackendEntry>,
    /// Ids by their backends' keys. The keys are in `backends` and not here once more.
    ids: HashTable<BackendId>,
    hasher: RandomState,
    /// Backends of which some service says something else than the map holds: how many say what.
    said: HashMap<BackendId, BTreeMap<Said, u32>>,
    /// Backends found at the start. Somebody may still claim them, so they stay until the prune.
    adopted: BTreeSet<BackendId>,
    /// Free ids below `backends.len()`, the one free for longest first.
    released: VecDeque<BackendId>,
    used: usize,
    slots: Vec<BackendId>,
    pub(super) allocator: Slots,
    pub(super) blocks: BTreeMap<u32, Block>,
    pub(super) tables: HashMap<u32, Table>,
    pub(super) frontends: HashMap<FrontendKey, FrontendEntry>,
    /// Source ranges by service port; none is empty.
    pub(super) ranges: BTreeMap<u32, BTreeSet<SourceRangeKey>>,
    /// Backends that went away since somebody asked.
    pub(super) removed: Vec<Backend>,
}

/// Whether a frontend asks a list of clients, served or not.
fn restricts(value: FrontendValue) -> bool {
    value.flags & frontend_flags::SOURCE_RANGES != 0
}

pub(super) fn key_of(backend: &Backend) -> BackendKey {
    (backend.addr, backend.port, backend.proto)
}

impl Image {
    pub(super) fn new(limits: Limits) -> Self {
        Self {
            allocator: Slots::new(limits.slots),
            limits,
            backends: vec![BackendEntry::default()],
            ids: HashTable::new(),
            hasher: RandomState::new(),
            said: HashMap::new(),
            adopted: BTreeSet::new(),
            released: VecDeque::new(),
            used: 0,
            slots: Vec::new(),
            blocks: BTreeMap::new(),
            tables: HashMap::new(),
            frontends: HashMap::new(),
            ranges: BTreeMap::new(),
            removed: Vec::new(),
        }
    }

    // Backends.

    pub(super) fn backend(&self, id: BackendId) -> Option<&BackendEntry> {
        self.backends.get(id as usize).filter(|entry| entry.value.state != BackendState::Free as u8)
    }

    pub(super) fn backends(&self) -> impl Iterator<Item = (BackendId, &BackendEntry)> {
        (0..).zip(&self.backends).filter(|(_, entry)| entry.value.state != BackendState::Free as u8)
    }

    pub(super) fn backend_id(&self, key: &BackendKey) -> Option<BackendId> {
        let hash = self.hasher.hash_one(key);
        self.ids.find(hash, |id| key_of(&self.backends[*id as usize].value) == *key).copied()
    }

    /// Enters a backend that is in its place already.
    fn enter_id(&mut self, id: BackendId) {
        let hash_of = |id: &BackendId| self.hasher.hash_one(key_of(&self.backends[*id as usize].value));
        self.ids.insert_unique(hash_of(&id), id, hash_of);
    }

    /// Takes the id out, while its backend is still in its place. `false` when another id stands for that key.
    fn remove_id(&mut self, id: BackendId) -> bool {
        let hash = self.hasher.hash_one(key_of(&self.backends[id as usize].value));
        self.ids.find_entry(hash, |known| *known == id).map(|entry| entry.remove()).is_ok()
    }

    pub(super) fn backends_used(&self) -> usize {
        self.used
    }

    /// The next `n` ids, without taking them; fewer when there are not so many.
    pub(super) fn next_ids(&self, n: usize) -> Vec<BackendId> {
        let rested = self.released.len().saturating_sub(RESTING);
        let fresh = self.backends.len() as u32..self.limits.backends;
        let (rested, resting) = (self.released.iter().take(rested), self.released.iter().skip(rested));
        rested.copied().chain(fresh).chain(resting.copied()).take(n).collect()
    }

    /// Goes when its only claim goes.
    pub(super) fn only_claim(&self, id: BackendId) -> bool {
        self.backend(id).is_some_and(|entry| entry.claims == 1) && !self.adopted.contains(&id)
    }

    /// Adds a service's claim. `value` says state, locality and node; the id is new when nobody had the backend.
    pub(super) fn claim(&mut self, id: BackendId, value: Backend) {
        let said = Said::of(&value);
        if said.state().is_none() {
            return;
        }
        if self.backend(id).is_none() {
            self.take_id(id, value);
        }
        let entry = &mut self.backends[id as usize];
        let (before, known) = (entry.claims, Said::of(&entry.value));
        entry.claims += 1;
        if said == known && !self.said.contains_key(&id) {
            return;
        }
        let all = self.said.entry(id).or_insert_with(|| (before > 0).then_some((known, before)).into_iter().collect());
        *all.entry(said).or_default() += 1;
    }

    /// Takes a service's claim back.
    pub(super) fn unclaim(&mut self, claim: Claim, stages: &mut Stages) {
        let Some(entry) = self.backends.get_mut(claim.id as usize) else { return };
        if claim.said.state().is_none() {
            return;
        }
        entry.claims = entry.claims.saturating_sub(1);
        if let Some(all) = self.said.get_mut(&claim.id) {
            if let Some(count) = all.get_mut(&claim.said) {
                *count = count.saturating_sub(1);
            }
            all.retain(|_, count| *count > 0);
            if all.is_empty() {
                self.said.remove(&claim.id);
            }
        }
        stages.touched.push(claim.id);
    }

    /// Writes what the claims add up to: the best state that any service gives it, and the node if all name the same. What
    /// was found at the start counts as a claim until the prune, since its services may not have reported yet.
    pub(super) fn settle(&mut self, id: BackendId, is_new: bool, stages: &mut Stages) {
        let Some(entry) = self.backends.get_mut(id as usize).filter(|entry| entry.claims > 0) else { return };
        let mut value = entry.value;
        if let Some(all) = self.said.get(&id) {
            let mut nodes = all.keys().map(|said| said.node());
            let first = nodes.next().unwrap_or_default();
            // Packets to a backend of which it is not known where it runs are not handed on.
            let node = if nodes.all(|node| node == first) { first } else { 0 };
            let adopted = self.adopted.contains(&id);
            let local = all.keys().any(|said| said.is_local()) || adopted && value.is_local();
            let best = all.keys().filter_map(|said| said.state()).min().map_or(value.state, |state| state as u8);
            value.state = if adopted { best.min(value.state) } else { best };
            value.flags = Backend::flags_of(local, node);
            if all.len() == 1 && all.contains_key(&Said::of(&value)) {
                self.said.remove(&id);
            }
        }
        if is_new || value != entry.value {
            entry.value = value;
            stages.backends.push(Op::Backend(id, value));
        }
    }

    /// Takes over a backend that the map holds under this id.
    pub(super) fn adopt_backend(&mut self, id: BackendId, value: Backend) {
        self.make_entry(id, BackendEntry { value, ..BackendEntry::default() });
        self.adopted.insert(id);
        if self.backend_id(&key_of(&value)).is_none() {
            self.enter_id(id);
        }
        self.used += 1;
    }

    fn take_id(&mut self, id: BackendId, value: Backend) {
        self.make_entry(id, BackendEntry { value, ..BackendEntry::default() });
        self.enter_id(id);
        self.used += 1;
    }

    /// Puts an entry under a free id. O(1) for the id that is next and for those beyond the last one.
    fn make_entry(&mut self, id: BackendId, entry: BackendEntry) {
        let at = id as usize;
        if at < self.backends.len() {
            if self.released.front() == Some(&id) {
                self.released.pop_front();
            } else {
                self.released.retain(|free| *free != id);
            }
            self.backends[at] = entry;
            return;
        }
        while self.backends.len() < at {
            self.released.push_back(self.backends.len() as u32);
            self.backends.push(BackendEntry::default());
        }
        self.backends.push(entry);
    }

    fn free_backend(&mut self, id: BackendId, stages: &mut Stages) {
        let Some(entry) = self.backend(id) else { return };
        if entry.claims > 0 || entry.slots > 0 || self.adopted.contains(&id) {
            return;
        }
        let value = entry.value;
        // An adopted duplicate may have had another id than the one in use for this key.
        if self.remove_id(id) {
            self.removed.push(value);
        }
        self.backends[id as usize] = BackendEntry::default();
        self.released.push_back(id);
        self.used -= 1;
        stages.frees.push(Op::Backend(id, Backend::default()));
    }

    /// From now on backends that nobody claims are not kept for anybody.
    pub(super) fn end_adoption(&mut self, stages: &mut Stages) {
        for id in std::mem::take(&mut self.adopted) {
            stages.touched.push(id);
            self.settle(id, false, stages);
        }
    }

    // Slots and blocks.

    pub(super) fn slot(&self, index: u32) -> BackendId {
        self.slots.get(index as usize).copied().unwrap_or(SLOT_EMPTY)
    }

    pub(super) fn slots(&self) -> impl Iterator<Item = (u32, BackendId)> {
        (0..).zip(self.slots.iter().copied()).filter(|(_, id)| *id != SLOT_EMPTY)
    }

    /// The slots in use of a block.
    pub(super) fn content(&self, base: u32) -> impl Iterator<Item = BackendId> + Clone + '_ {
        let len = self.blocks.get(&base).map_or(0, |block| block.len);
        (base..base.saturating_add(len)).map(|index| self.slot(index))
    }

    /// Notes what a slot holds, without an op.
    pub(super) fn note_slot(&mut self, index: u32, id: BackendId) {
        let at = index as usize;
        if self.slots.len() <= at {
            self.slots.resize(at + 1, SLOT_EMPTY);
        }
        let before = std::mem::replace(&mut self.slots[at], id);
        for (id, sign) in [(before, false), (id, true)] {
            if id != SLOT_EMPTY
                && let Some(entry) = self.backends.get_mut(id as usize)
            {
                entry.slots = if sign { entry.slots + 1 } else { entry.slots.saturating_sub(1) };
            }
        }
    }

    fn set_slot(&mut self, index: u32, id: BackendId, stages: &mut Stages) {
        if let Some(op) = self.move_to_slot(index, id, stages) {
            let stage = if id == SLOT_EMPTY { &mut stages.empties } else { &mut stages.slots };
            stage.push(op);
        }
    }

    /// The write that makes a slot hold this, if it does not; for the caller to put in its stage.
    fn move_to_slot(&mut self, index: u32, id: BackendId, stages: &mut Stages) -> Option<Op> {
        let before = self.slot(index);
        if before == id {
            return None;
        }
        self.note_slot(index, id);
        if before != SLOT_EMPTY {
            stages.touched.push(before);
        }
        Some(Op::Slot(index, id))
    }

    /// Makes a block hold `members` with the fewest writes, those on this node first: see [`places`]. No slot that a
    /// frontend may still count is empty in between, because emptying comes after the counts are lowered.
    pub(super) fn fill(&mut self, base: u32, members: &[BackendId], stages: &mut Stages) {
        let Some(block) = self.blocks.get(&base) else { return };
        let (old_len, order) = (block.len, block.order);
        let old: Vec<BackendId> = self.content(base).collect();
        let is_local = |id| self.backend(id).is_some_and(|entry| entry.value.flags & BACKEND_LOCAL != 0);
        let new = places::arrange(&old, members, is_local);
        let len = new.len() as u32;
        let moves = places::moves(&old, &new);
        for (index, id) in moves.first {
            self.set_slot(base + index as u32, id, stages);
        }
        for (index, id) in moves.late {
            let op = self.move_to_slot(base + index as u32, id, stages);
            stages.late_slots.extend(op);
        }
        for index in base + len..base + old_len.max(len) {
            self.set_slot(index, SLOT_EMPTY, stages);
        }
        // Keep some room for coming back, but not four times of what is used.
        let keep = super::slots::order_for(members.len()).unwrap_or(0);
        let order_after = if keep + 2 <= order { keep } else { order };
        self.allocator.shrink(base, order_after, order);
        if let Some(block) = self.blocks.get_mut(&base) {
            block.len = len;
            block.order = order_after;
        }
    }

    // Frontends.

    /// Writes a frontend, unless the map holds this very value.
    pub(super) fn put_frontend(&mut self, key: FrontendKey, value: FrontendValue, stages: &mut Stages) {
        let before = self.frontends.get(&key).map(|entry| entry.value);
        if before == Some(value) {
            return;
        }
        self.count_refs(&value, true, stages);
        if let Some(before) = before {
            self.count_refs(&before, false, stages);
        }
        self.frontends.entry(key).or_insert(FrontendEntry { value, owner: None, users: 0 }).value = value;
        let denies = |value: FrontendValue| value.flags & DENIES == DENIES;
        let stage = match before {
            Some(before) if denies(before) && !restricts(value) => &mut stages.opened,
            Some(before) if !restricts(before) && denies(value) => &mut stages.closed,
            None if restricts(value) => &mut stages.closed,
            _ => &mut stages.frontends,
        };
        stage.push(Op::PutFrontend(key, value));
    }

    pub(super) fn delete_frontend(&mut self, key: FrontendKey, stages: &mut Stages) {
        if let Some(entry) = self.frontends.remove(&key) {
            self.count_refs(&entry.value, false, stages);
            let stage = if restricts(entry.value) { &mut stages.withdrawn } else { &mut stages.deletes };
            stage.push(Op::DeleteFrontend(key));
        }
    }

    pub(super) fn count_refs(&mut self, value: &FrontendValue, add: bool, stages: &mut Stages) {
        for set in [value.external, value.internal].into_iter().filter(|set| set.count > 0) {
            let Some(block) = self.blocks.get_mut(&set.base) else { continue };
            if add {
                block.users += 1;
            } else {
                block.users = block.users.saturating_sub(1);
                stages.idle.push(set.base);
            }
        }
    }

    // Tables.

    /// The table of a set with these members.
    pub(super) fn compute_table(&self, members: &[BackendId]) -> Arc<[BackendId]> {
        let entries: Vec<maglev::Entry> = members
            .iter()
            .filter_map(|id| {
                let value = self.backend(*id)?.value;
                let key = maglev::backend_key(value.addr.into(), value.port.get(), value.proto);
                Some(maglev::Entry { key, id: *id, weight: 1 })
            })
            .collect();
        maglev::table(&entries, self.limits.maglev_size, &self.limits.maglev_seed).into()
    }

    pub(super) fn table(&self, table: &Table) -> Arc<[BackendId]> {
        match table {
            Table::Adopted(entries) => entries.clone(),
            Table::Of(members) => self.compute_table(members),
        }
    }

    /// Makes the block's table follow its members.
    pub(super) fn put_table(&mut self, base: u32, stages: &mut Stages) {
        let mut members: Vec<BackendId> = self.content(base).collect();
        members.sort_unstable();
        let held = match self.tables.get(&base) {
            Some(Table::Of(known)) if **known == *members => return,
            Some(Table::Adopted(entries)) => Some(entries.clone()),
            _ => None,
        };
        let entries = self.compute_table(&members);
        if held.as_deref() != Some(&*entries) {
            stages.tables.push(Op::PutMaglev(base, entries));
        }
        self.tables.insert(base, Table::Of(members.into()));
    }

    pub(super) fn delete_table(&mut self, base: u32, stages: &mut Stages) {
        if self.tables.remove(&base).is_some() {
            stages.table_deletes.push(Op::DeleteMaglev(base));
        }
    }

    // Source ranges.

    pub(super) fn ranges_used(&self) -> usize {
        self.ranges.values().map(BTreeSet::len).sum()
    }

    /// Makes these the ranges of a service port. New ones come before frontends are written and old ones go after it:
    /// in between a list is the union of what it was and will be, so a client is treated as before or as after. Lists of
    /// those served and of those not served are separate ([`kinesin_abi::SOURCE_RANGE_DENY`]), so that a change from one
    /// to the other happens in the write of the frontend.
    pub(super) fn set_ranges(&mut self, service: u32, wanted: BTreeSet<SourceRangeKey>, stages: &mut Stages) {
        let held = self.ranges.remove(&service).unwrap_or_default();
        stages.ranges.extend(wanted.difference(&held).map(|key| Op::PutSourceRange(*key)));
        stages.range_deletes.extend(held.difference(&wanted).map(|key| Op::DeleteSourceRange(*key)));
        if !wanted.is_empty() {
            self.ranges.insert(service, wanted);
        }
    }

    /// Frees what nothing points at any more: blocks, their tables and slots, and backends.
    pub(super) fn sweep(&mut self, stages: &mut Stages) {
        let mut idle = std::mem::take(&mut stages.idle);
        idle.sort_unstable();
        idle.dedup();
        for base in idle {
            if self.blocks.get(&base).is_none_or(|block| block.users > 0) {
                continue;
            }
            let Some(block) = self.blocks.remove(&base) else { continue };
            self.delete_table(base, stages);
            for index in base..base + block.len {
                self.set_slot(index, SLOT_EMPTY, stages);
            }
            self.allocator.release(base, block.order);
        }
        let mut touched = std::mem::take(&mut stages.touched);
        touched.sort_unstable();
        touched.dedup();
        for id in touched {
            self.free_backend(id, stages);
        }
    }

    /// Empties a slot that belongs to no set; only at adoption.
    pub(super) fn empty_slot(&mut self, index: u32, stages: &mut Stages) {
        self.set_slot(index, SLOT_EMPTY, stages);
    }

    /// Frees an id that the map uses for something unreadable; only at adoption.
    pub(super) fn free_unknown(id: BackendId, stages: &mut Stages) {
        stages.frees.push(Op::Backend(id, Backend::default()));
    }

    /// A new empty block.
    pub(super) fn add_block(&mut self, base: u32, order: u8) {
        self.blocks.insert(base, Block { order, len: 0, users: 0 });
    }

    /// What a frontend's scope points at once its set is in this block.
    pub(super) fn set_ref(&self, base: u32) -> SetRef {
        match self.blocks.get(&base) {
            Some(block) if block.len > 0 => SetRef { base, count: block.len },
            _ => SetRef::default(),
        }
    }
}
