//! From compiled services to map writes, and back: what the maps should hold, what they hold, and the least that turns
//! one into the other.
//!
//! [`Planner`] gives out ids and ranges of slots and knows what the maps should hold. Deliberately absent: the maps. A
//! plan that could not be written as a whole is made good by [`Planner::repair`], against what was read back.

mod adopt;
mod alloc;
#[cfg(test)]
mod model;
mod phases;
mod planner;
#[cfg(test)]
mod properties;
#[cfg(test)]
mod tests;
mod transaction;
mod update;

pub use phases::in_phases;
pub use planner::{Limits, PlanError, Planner, Stats};

use std::sync::Arc;

use kinesin_abi::{Backend, BackendId, FrontendKey, FrontendValue};

/// One write to a map. A plan is a list of them in an order that leaves every prefix safe to meet by a packet:
/// backends, then slots and tables, then frontends (those deleted before those written, so that a full table has room),
/// then what nothing points at any more.
#[derive(Clone, Debug, PartialEq)]
pub enum Op {
    /// Write a backend; all zero frees the id.
    Backend(BackendId, Backend),
    /// Write a slot; [`kinesin_abi::SLOT_EMPTY`] empties it.
    Slot(u32, BackendId),
    /// Write a Maglev table of [`kinesin_abi::MAGLEV_TABLE_SIZE`] backend ids, keyed by the base of its set.
    PutMaglev(u32, Arc<[BackendId]>),
    /// Write a frontend.
    PutFrontend(FrontendKey, FrontendValue),
    /// Delete a frontend; a missing one is no error (R03).
    DeleteFrontend(FrontendKey),
    /// Delete a Maglev table; a missing one is no error.
    DeleteMaglev(u32),
}

/// What the kernel's maps hold, read back. Free backends and empty slots are left out.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Actual {
    /// The frontends hash.
    pub frontends: Vec<(FrontendKey, FrontendValue)>,
    /// The slots array.
    pub slots: Vec<(u32, BackendId)>,
    /// The backends array.
    pub backends: Vec<(BackendId, Backend)>,
    /// The Maglev tables.
    pub maglev: Vec<(u32, Arc<[BackendId]>)>,
}
