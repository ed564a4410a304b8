//! Connection state: what a packet's tuple becomes, and what a translated socket believes to talk to.

use crate::{Addr, BackendId, Be16};

/// A packet's tuple as it arrives at a hook.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct FlowKey {
    /// Source address.
    pub src: Addr,
    /// Destination address.
    pub dst: Addr,
    /// Source port.
    pub sport: Be16,
    /// Destination port.
    pub dport: Be16,
    /// IP protocol number.
    pub proto: u8,
    /// Zero.
    pub pad: [u8; 3],
}

/// What the tuple of [`FlowKey`] is rewritten to. Each connection has two entries, one per direction, so that one lookup
/// and one rewrite serve client packets and replies alike.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct FlowValue {
    /// `bpf_ktime_get_ns` (CLOCK_MONOTONIC) of the last packet in this direction.
    pub last_seen: u64,
    /// New source address.
    pub src: Addr,
    /// New destination address.
    pub dst: Addr,
    /// New source port.
    pub sport: Be16,
    /// New destination port.
    pub dport: Be16,
    /// [`FLOW_REPLY`], [`FLOW_REDIRECT`], [`FLOW_FROM_LAN`].
    pub flags: u8,
    /// `TCP_SEEN_*` of both directions; kept in both entries, so that either tells whether the connection is over.
    pub tcp: u8,
    /// Zero.
    pub pad: [u8; 2],
    /// The backend chosen; checked against the backends array for connectionless protocols.
    pub backend: BackendId,
    /// Zero.
    pub pad2: u32,
}

/// This entry is of the backend's direction.
pub const FLOW_REPLY: u8 = 1;
/// After the rewrite the packet leaves by route and neighbour lookup, not through the host's stack (whose source
/// validation would refuse it).
pub const FLOW_REDIRECT: u8 = 2;
/// The client's packets come in on a device (as opposed to a local socket).
pub const FLOW_FROM_LAN: u8 = 4;

/// The client's side sent FIN.
pub const TCP_SEEN_FIN: u8 = 1;
/// The backend's side sent FIN.
pub const TCP_SEEN_FIN_REPLY: u8 = 2;
/// Either side sent RST.
pub const TCP_SEEN_RST: u8 = 4;
/// The backend has answered.
pub const TCP_SEEN_REPLY: u8 = 8;

/// Key of the sockets map: a translated socket and the backend that it really talks to.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct SocketKey {
    /// `bpf_get_socket_cookie`.
    pub cookie: u64,
    /// The backend's address.
    pub addr: Addr,
    /// The backend's port.
    pub port: Be16,
    /// IP protocol number.
    pub proto: u8,
    /// Zero.
    pub pad: [u8; 5],
}

/// Value of the sockets map: what the application asked for.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct SocketValue {
    /// The service's address.
    pub addr: Addr,
    /// The service's port.
    pub port: Be16,
    /// Zero.
    pub pad: u16,
    /// The backend chosen.
    pub backend: BackendId,
}

/// Key of the fragments map: what all fragments of a packet have in common.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct FragmentKey {
    /// Source address.
    pub src: Addr,
    /// Destination address.
    pub dst: Addr,
    /// Identification in wire order; of IPv4 in its lower half as loaded.
    pub id: u32,
    /// IP protocol number; 0 for IPv6, whose later fragments do not say.
    pub proto: u8,
    /// Zero.
    pub pad: [u8; 3],
}

/// Value of the fragments map: what only the first fragment says.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct FragmentValue {
    /// CLOCK_MONOTONIC nanoseconds when it came.
    pub at: u64,
    /// Source port.
    pub sport: Be16,
    /// Destination port.
    pub dport: Be16,
    /// IP protocol number.
    pub proto: u8,
    /// Zero.
    pub pad: [u8; 3],
}

crate::pod! { FragmentKey = 40, FragmentValue = 16, FlowKey = 40, FlowValue = 56, SocketKey = 32, SocketValue = 24 }
