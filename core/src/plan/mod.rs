//! From compiled services to map writes, and back: what the maps should hold, what they hold, and the least that turns
//! one into the other.
//!
//! [`Planner`] owns the ids and the layout of the slots array. It knows only what it was told and what it ordered: it
//! performs nothing, and whoever performs its ops tells it about failures by [`Planner::repair`].

mod adopt;
mod entries;
mod image;
mod meaning;
mod phases;
mod places;
mod planner;
mod room;
mod service;
mod slots;
mod stages;

pub use meaning::{FrontendMeaning, Meaning};
pub use planner::{Limits, PlanError, Planner, Stats};
pub use service::keep_api_backends;

use std::sync::Arc;

use kinesin_abi::{Backend, BackendId, FrontendKey, FrontendValue, SourceRangeKey};

/// One write to a map. A plan is a list of them in an order that leaves every prefix safe to meet by a packet:
/// backends, then slots, tables and source ranges, then frontends, then what nothing points at any more.
#[derive(Clone, Debug, PartialEq)]
pub enum Op {
    /// Write a backend; all zero frees the id.
    Backend(BackendId, Backend),
    /// Write a slot; [`kinesin_abi::SLOT_EMPTY`] empties it.
    Slot(u32, BackendId),
    /// Write a Maglev table of [`kinesin_abi::MAGLEV_TABLE_SIZES`] backend ids, keyed by the base of its set.
    PutMaglev(u32, Arc<[BackendId]>),
    /// Write a frontend.
    PutFrontend(FrontendKey, FrontendValue),
    /// Delete a frontend; a missing one is no error (R03).
    DeleteFrontend(FrontendKey),
    /// Delete a Maglev table; a missing one is no error.
    DeleteMaglev(u32),
    /// Write a source range.
    PutSourceRange(SourceRangeKey),
    /// Delete a source range; a missing one is no error.
    DeleteSourceRange(SourceRangeKey),
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
    /// The source ranges, with nothing beyond their prefixes ([`SourceRangeKey::masked`]).
    pub source_ranges: Vec<SourceRangeKey>,
}

#[cfg(test)]
mod tests;
