//! Session affinity: which backend a client was given, and when.

use crate::{Addr, BackendId};

/// Key of the affinity map: a client of a service port.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct AffinityKey {
    /// The client's address, or with [`AFFINITY_NETNS`] the two words of `bpf_get_netns_cookie` and zeros.
    pub client: Addr,
    /// [`crate::FrontendValue::service`]
    pub service: u32,
    /// 0 or [`AFFINITY_NETNS`].
    pub flags: u32,
}

/// The client is a network namespace whose sockets are translated, not an address.
pub const AFFINITY_NETNS: u32 = 1;

impl AffinityKey {
    /// The clients of one network namespace: a pod, or the node itself.
    #[inline(always)]
    pub const fn of_netns(cookie: u64, service: u32) -> Self {
        Self { client: Addr { words: [cookie as u32, (cookie >> 32) as u32, 0, 0] }, service, flags: AFFINITY_NETNS }
    }

    /// The cookie of [`Self::of_netns`].
    pub const fn netns(&self) -> u64 {
        self.client.words[0] as u64 | (self.client.words[1] as u64) << 32
    }
}

/// Value of the affinity map.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct AffinityValue {
    /// `bpf_ktime_get_ns` (CLOCK_MONOTONIC) of the client's last new connection.
    pub last_used: u64,
    /// The backend.
    pub backend: BackendId,
    /// Where in its set the backend was, as a number below [`crate::SetRef::count`]. Only a hint: whether the backend is
    /// still a member is asked of the set.
    pub position: u32,
}

/// Whether an entry of that age still binds, `timeout` being [`crate::FrontendValue::affinity`] in seconds.
#[inline(always)]
pub const fn affinity_binds(last_used: u64, now: u64, timeout: u32) -> bool {
    now.saturating_sub(last_used) < timeout as u64 * 1_000_000_000
}

crate::pod! { AffinityKey = 24, AffinityValue = 16 }
