//! What the tests have in place of a kernel: maps in memory, written op by op.

use std::collections::{BTreeMap, HashMap};

use kinesin_abi::{FrontendKey, FrontendValue, MAGLEV_TABLE_SIZE, SLOT_EMPTY, frontend_flags};

use super::*;

/// The kernel's maps, as far as plans can tell.
#[derive(Clone, Default)]
pub(super) struct Model {
    pub(super) frontends: HashMap<FrontendKey, FrontendValue>,
    pub(super) slots: HashMap<u32, BackendId>,
    pub(super) backends: HashMap<BackendId, Backend>,
    pub(super) maglev: BTreeMap<u32, Arc<[BackendId]>>,
}

impl Model {
    pub(super) fn of(actual: Actual) -> Self {
        Self {
            frontends: actual.frontends.into_iter().collect(),
            slots: actual.slots.into_iter().collect(),
            backends: actual.backends.into_iter().collect(),
            maglev: actual.maglev.into_iter().collect(),
        }
    }

    pub(super) fn apply(&mut self, op: &Op, limits: Limits) {
        match op.clone() {
            Op::Backend(id, backend) => {
                assert!(id > 0 && id < limits.backends, "{id} is no index of the backends array");
                self.backends.insert(id, backend);
                self.backends.retain(|_, backend| *backend != Backend::default());
            }
            Op::Slot(slot, id) => {
                assert!(slot < limits.slots, "{slot} is no index of the slots array");
                self.slots.insert(slot, id);
                self.slots.retain(|_, id| *id != SLOT_EMPTY);
            }
            Op::PutMaglev(base, table) => {
                assert_eq!(table.len(), MAGLEV_TABLE_SIZE as usize);
                self.maglev.insert(base, table);
            }
            Op::DeleteMaglev(base) => {
                self.maglev.remove(&base);
            }
            Op::PutFrontend(key, value) => {
                self.frontends.insert(key, value);
                assert!(self.frontends.len() <= limits.frontends as usize, "E2BIG");
            }
            Op::DeleteFrontend(key) => {
                self.frontends.remove(&key);
            }
        }
    }

    pub(super) fn apply_all(&mut self, ops: &[Op], limits: Limits) {
        ops.iter().for_each(|op| self.apply(op, limits));
    }

    pub(super) fn read(&self) -> Actual {
        let mut actual = Actual {
            frontends: self.frontends.iter().map(|(k, v)| (*k, *v)).collect(),
            slots: self.slots.iter().map(|(k, v)| (*k, *v)).collect(),
            backends: self.backends.iter().map(|(k, v)| (*k, *v)).collect(),
            maglev: self.maglev.iter().map(|(k, v)| (*k, v.clone())).collect(),
        };
        actual.frontends.sort_by_key(|(k, _)| *k);
        actual.slots.sort();
        actual.backends.sort();
        actual
    }

    /// The backends that a frontend may pick; panics where a packet would meet a hole.
    pub(super) fn reachable(&self, value: &FrontendValue) -> Vec<Backend> {
        let mut ids = Vec::new();
        for set in [value.external, value.internal] {
            for slot in set.base..set.base + set.count {
                ids.push(*self.slots.get(&slot).unwrap_or_else(|| panic!("slot {slot} of {value:?} is empty")));
            }
        }
        if value.flags & frontend_flags::MAGLEV != 0 && value.external.count > 0 {
            let table = self.maglev.get(&value.external.base).expect("a table where one is selected from");
            ids.extend(table.iter());
            ids.sort();
            ids.dedup();
        }
        let backend = |id| *self.backends.get(&id).unwrap_or_else(|| panic!("backend {id} of {value:?} is free"));
        ids.into_iter().map(backend).collect()
    }

    pub(super) fn check(&self) {
        self.frontends.values().for_each(|value| drop(self.reachable(value)));
    }
}
