//! What the image knows of one backend, block, table or frontend.

use std::sync::Arc;

use kinesin_abi::{BACKEND_LOCAL, Backend, BackendId, BackendState, FrontendValue, NodeTag};

use crate::services::ServiceKey;

/// One backend. 56 bytes; with its place in `ids` about 64 bytes a backend.
#[derive(Clone, Debug, Default)]
pub(super) struct BackendEntry {
    /// In the map.
    pub(super) value: Backend,
    /// How many services claim it in each state (index: state - 1).
    pub(super) claims: [u32; 4],
    /// How many services claim that it is local.
    pub(super) local: u32,
    /// Where all claims say that it runs; see `Image::disputed` for when they differ.
    pub(super) node: NodeTag,
    /// How many slots hold it.
    pub(super) slots: u32,
    /// Found at the start; somebody may still claim it, so it stays until the prune.
    pub(super) adopted: bool,
}

impl BackendEntry {
    pub(super) fn claimed(&self) -> bool {
        self.claims.iter().any(|n| *n > 0)
    }

    /// Goes when its only claim goes.
    pub(super) fn only_claim(&self) -> bool {
        self.claims.iter().sum::<u32>() == 1 && !self.adopted
    }
}

/// What one service says of one backend: 8 bytes for each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Claim {
    pub(super) id: BackendId,
    /// [`Backend::flags`], and in bits that these do not use, the state.
    said: u32,
}

/// Where [`Claim::said`] has the state, which is below 8.
const STATE_SHIFT: u32 = 1;

impl Claim {
    pub(super) fn new(id: BackendId, value: &Backend) -> Self {
        Self { id, said: value.flags | u32::from(value.state) << STATE_SHIFT }
    }

    pub(super) fn state(self) -> Option<BackendState> {
        claimable((self.said >> STATE_SHIFT & 0b111) as u8)
    }

    pub(super) fn is_local(self) -> bool {
        self.said & BACKEND_LOCAL != 0
    }

    pub(super) fn node(self) -> NodeTag {
        Backend { flags: self.said, ..Backend::default() }.node()
    }
}

/// The state of [`Backend::state`] as services may claim it; none where the id is free, or the number stands for nothing.
pub(super) fn claimable(state: u8) -> Option<BackendState> {
    BackendState::of(state).filter(|state| *state != BackendState::Free)
}

/// A run of slots that holds one set.
#[derive(Clone, Debug)]
pub(super) struct Block {
    /// Capacity: `1 << order` slots.
    pub(super) order: u8,
    /// Slots in use, from the first one on.
    pub(super) len: u32,
    /// References by frontends, each scope counted.
    pub(super) users: u32,
}

/// A Maglev table in the map.
#[derive(Clone, Debug)]
pub(super) enum Table {
    /// Read back, not verified yet.
    Adopted(Arc<[BackendId]>),
    /// Follows from these members (sorted); computed again when somebody asks, which saves 64 KiB for each set.
    Of(Box<[BackendId]>),
}

/// A frontend in the map.
#[derive(Clone, Debug)]
pub(super) struct FrontendEntry {
    /// In the map.
    pub(super) value: FrontendValue,
    /// Who has it; nobody for wildcards and for adopted ones that were not claimed yet.
    pub(super) owner: Option<ServiceKey>,
    /// How many services share it; only wildcards.
    pub(super) users: u32,
}

impl FrontendEntry {
    /// Adopted, and nobody has claimed it so far.
    pub(super) fn unclaimed(&self) -> bool {
        self.owner.is_none() && self.users == 0
    }
}
