//! The order in which a change's ops are safe.

use kinesin_abi::{BackendId, FrontendKey, FrontendValue, SLOT_EMPTY};

use super::Op;

/// Ops by the stage in which they are safe, in this order.
#[derive(Default)]
pub(super) struct Stages {
    pub(super) backends: Vec<Op>,
    pub(super) slots: Vec<Op>,
    /// Slots whose member has moved to where only the new counts reach.
    pub(super) late_slots: Vec<Op>,
    pub(super) tables: Vec<Op>,
    /// Frontends that no longer ask a list of clients not served: before that list grows for others.
    pub(super) opened: Vec<Op>,
    /// Deletions of frontends that ask a list of clients: before that list changes for those that stay.
    pub(super) withdrawn: Vec<Op>,
    pub(super) ranges: Vec<Op>,
    pub(super) frontends: Vec<Op>,
    pub(super) deletes: Vec<Op>,
    pub(super) range_deletes: Vec<Op>,
    /// Frontends that begin to ask such a list, and new ones that ask any: not before it has shrunk.
    pub(super) closed: Vec<Op>,
    pub(super) table_deletes: Vec<Op>,
    pub(super) empties: Vec<Op>,
    pub(super) frees: Vec<Op>,
    /// Blocks that lost a user.
    pub(super) idle: Vec<u32>,
    /// Backends that lost a slot or a claim.
    pub(super) touched: Vec<BackendId>,
    /// Only when the frontends map is full: make room before filling it.
    pub(super) delete_first: bool,
    /// The same for the map of tables. In between, the programs choose at random.
    pub(super) delete_tables_first: bool,
}

impl Stages {
    /// A slot whose content the image does not know; only at adoption.
    pub(super) fn empty_unknown(&mut self, index: u32) {
        self.empties.push(Op::Slot(index, SLOT_EMPTY));
    }

    /// A frontend that the image has as repaired already; only at adoption.
    pub(super) fn put_adopted(&mut self, key: FrontendKey, value: FrontendValue) {
        self.frontends.push(Op::PutFrontend(key, value));
    }

    /// All ops in an order of which every prefix is safe.
    pub(super) fn into_ops(mut self) -> Vec<Op> {
        let mut ops = self.backends;
        ops.append(&mut self.slots);
        if self.delete_tables_first {
            ops.append(&mut self.table_deletes);
        }
        ops.append(&mut self.tables);
        ops.append(&mut self.opened);
        ops.append(&mut self.withdrawn);
        ops.append(&mut self.ranges);
        if self.delete_first {
            ops.append(&mut self.deletes);
        }
        ops.append(&mut self.frontends);
        ops.append(&mut self.deletes);
        ops.append(&mut self.range_deletes);
        ops.append(&mut self.closed);
        ops.append(&mut self.late_slots);
        ops.append(&mut self.table_deletes);
        ops.append(&mut self.empties);
        ops.append(&mut self.frees);
        ops
    }
}
