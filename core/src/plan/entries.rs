//! What the image knows of one backend, block, table or frontend.

use std::sync::Arc;

use kinesin_abi::{BACKEND_LOCAL, Backend, BackendId, BackendState, FrontendValue, NodeTag};

use crate::services::ServiceKey;

/// One backend. 32 bytes (a test holds this); with its place in `ids` about 40 bytes a backend.
#[derive(Clone, Debug, Default)]
pub(super) struct BackendEntry {
    /// In the map.
    pub(super) value: Backend,
    /// How many services claim it. What they say is in `value`, unless `Image::said` has it.
    pub(super) claims: u32,
    /// How many slots hold it.
    pub(super) slots: u32,
}

/// What one service says of one backend: 8 bytes for each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Claim {
    pub(super) id: BackendId,
    pub(super) said: Said,
}

impl Claim {
    pub(super) fn new(id: BackendId, value: &Backend) -> Self {
        Self { id, said: Said::of(value) }
    }
}

/// What a service says of a backend: [`Backend::flags`], and in bits that these do not use, the state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Said(u32);

/// Where [`Said`] has the state, which is below 8.
const STATE_SHIFT: u32 = 1;

impl Said {
    pub(super) fn of(value: &Backend) -> Self {
        Self(value.flags | u32::from(value.state) << STATE_SHIFT)
    }

    pub(super) fn state(self) -> Option<BackendState> {
        claimable((self.0 >> STATE_SHIFT & 0b111) as u8)
    }

    pub(super) fn is_local(self) -> bool {
        self.0 & BACKEND_LOCAL != 0
    }

    pub(super) fn node(self) -> NodeTag {
        Backend { flags: self.0, ..Backend::default() }.node()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_backend_takes_no_more_than_it_must() {
        assert_eq!(size_of::<BackendEntry>(), 32);
        assert_eq!(size_of::<Claim>(), 8);
    }
}
