//! The layout of Kinesin's eBPF maps: the only definition, shared by the programs and the agent.
//!
//! Every type is `repr(C)`, of fixed width, with explicit padding and an asserted size. Addresses and ports are kept in
//! wire order behind newtypes, so that neither side can mix byte orders up. IPv4 addresses are stored IPv4-mapped
//! (RFC 4291 section 2.5.5.2), so that one key serves both families.
//!
//! Deliberately absent: `Option`, `bool`, enums with data, `usize`, and logic other than what both sides must agree on. A
//! change of any layout here needs a new [`ABI_VERSION`] and a migration in `src/datapath`; only [`Settings`] may grow.
#![cfg_attr(not(feature = "user"), no_std)]

mod addr;
mod affinity;
mod drop;
mod flow;
mod hash;
mod peer;
mod range;
mod service;
mod settings;

pub use addr::{Addr, Be16};
pub use affinity::{AFFINITY_NETNS, AffinityKey, AffinityValue, affinity_binds};
pub use drop::{COUNT_ACCELERATED, DROP_SLOTS, Direction, DropCounter, DropReason, drop_slot};
pub use flow::{
    FLOW_COUNTS, FLOW_DIRECT, FLOW_FROM_LAN, FLOW_HANDED_ON, FLOW_REDIRECT, FLOW_REPLY, FlowCount, FlowKey, FlowValue,
    FragmentKey, FragmentValue, SocketKey, SocketValue, TCP_SEEN_ACK, TCP_SEEN_FIN, TCP_SEEN_FIN_REPLY, TCP_SEEN_REPLY,
    TCP_SEEN_RST, Timeouts, tcp_closed, tcp_established,
};
pub use hash::{maglev_hash, maglev_index};
pub use peer::{PEER_ACROSS, PEER_BY_ROUTE, PEER_TAKES_NEW, PeerKey, PeerValue, mac_words};
pub use range::{
    SOURCE_RANGE_ALL_BITS, SOURCE_RANGE_BITS, SOURCE_RANGE_DENY, SOURCE_RANGE_IPV6, SourceRange, SourceRangeKey,
};
pub use service::{
    BACKEND_LOCAL, Backend, BackendId, BackendState, FrontendKey, FrontendKind, FrontendValue, NODE_TAG_MAX, NodeTag,
    SEARCHED_MEMBERS, SELECTION_TRIES, SLOT_EMPTY, SetRef, frontend_flags,
};
pub use settings::{
    DEVICE_ACROSS, DEVICE_ETHERNET, DEVICE_POD, DEVICE_SERVED, DEVICE_XDP, DeviceValue, L2Key, L2Value,
    MAGLEV_TABLE_SIZE, MAGLEV_TABLE_SIZES, MaglevTable, SETTING_ANSWER_PING, SETTING_DIRECT_TO_PODS,
    SETTING_DIRECT_WATCHED, SETTING_FOLLOW_FRAGMENTS4, SETTING_FOLLOW_FRAGMENTS6, SETTING_PROTECT_NODE_PORTS,
    SETTING_REJECT_NO_BACKEND, Settings, WATCHED_FOR, maglev_size, maglev_words,
};

/// Version of the layouts below; part of the pin path `<bpf-root>/kinesin/v<abi>/`.
pub const ABI_VERSION: u32 = 1;

/// IP protocol numbers (IANA) of the transports that services use.
pub mod proto {
    /// Matches any protocol: only in wildcard frontends (port 0).
    pub const ANY: u8 = 0;
    /// RFC 792.
    pub const ICMP: u8 = 1;
    /// An IPv4 packet (RFC 2003).
    pub const IPIP: u8 = 4;
    /// An IPv6 packet (RFC 2473).
    pub const IPV6: u8 = 41;
    /// RFC 4443.
    pub const ICMPV6: u8 = 58;
    /// RFC 9293.
    pub const TCP: u8 = 6;
    /// RFC 768.
    pub const UDP: u8 = 17;
    /// RFC 9260.
    pub const SCTP: u8 = 132;
}

/// Marks `repr(C)` types without padding bytes or invalid bit patterns as safe to pass through `bpf(2)`.
macro_rules! pod {
    ($($t:ty = $size:expr),* $(,)?) => {$(
        const _: () = assert!(core::mem::size_of::<$t>() == $size);
        // SAFETY: the type is `Copy`, `repr(C)`, consists of integers only, and its size equals the sum of its fields
        // (asserted above against the documented size), so it has no uninitialised padding.
        #[cfg(feature = "user")]
        unsafe impl aya::Pod for $t {}
    )*};
}
pub(crate) use pod;
