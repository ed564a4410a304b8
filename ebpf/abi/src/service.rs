//! Services: frontends, the slots of their backend sets, and backends.
//!
//! A frontend points at contiguous slots of one array, a slot holds a backend's id, an id indexes the array of backends.
//! Both arrays are plain `BPF_MAP_TYPE_ARRAY`, whose lookups the kernel's JIT inlines; the frontend is the only hash
//! lookup of a new connection. Frontends of one service port share their slots.

use crate::{Addr, Be16, FlowKey, FlowValue};

/// Index into the backends array; 0 is no backend.
pub type BackendId = u32;

/// How many members of a set are searched for a backend that is not where it was. In a larger set the client of a backend
/// that moved beyond them is given another one.
pub const SEARCHED_MEMBERS: u32 = 256;

/// How often a selection at random tries again when it meets a slot that is being rewritten.
pub const SELECTION_TRIES: u32 = 4;

/// A slot that holds no backend.
pub const SLOT_EMPTY: BackendId = 0;

/// Key of the frontends hash: where clients connect to.
///
/// A wildcard entry (`port` 0, `proto` [`crate::proto::ANY`]) claims all other ports of the address for drops.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct FrontendKey {
    /// The address that clients use. `0.0.0.0` or `::` with a NodePort stand for every local address (socket hooks only).
    pub addr: Addr,
    /// The port that clients use.
    pub port: Be16,
    /// IP protocol number.
    pub proto: u8,
    /// Zero.
    pub pad: u8,
}

/// Contiguous slots `base..base + count`, all in use.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct SetRef {
    /// First slot.
    pub base: u32,
    /// How many slots hold usable backends; 0 means that there is none.
    pub count: u32,
}

/// Value of the frontends hash.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct FrontendValue {
    /// [`frontend_flags`].
    pub flags: u32,
    /// Node-local id of the service port, for session affinity, source ranges and Maglev tables; 0 for wildcards.
    pub service: u32,
    /// Session affinity timeout in seconds; 0 when the service has none.
    pub affinity: u32,
    /// Backends for traffic from outside the cluster (follows `externalTrafficPolicy` where that applies).
    pub external: SetRef,
    /// Backends for traffic from the cluster, also from local sockets (follows `internalTrafficPolicy`).
    pub internal: SetRef,
}

/// Bits of [`FrontendValue::flags`]; the lowest three hold the [`FrontendKind`].
pub mod frontend_flags {
    /// Mask of the kind.
    pub const KIND: u32 = 0b111;
    /// May be reached from outside the node (not a plain ClusterIP). Of a wildcard: its address may.
    pub const ROUTABLE: u32 = 1 << 3;
    /// Selection by Maglev table instead of at random.
    pub const MAGLEV: u32 = 1 << 4;
    /// Only drops: the address is ours, the port is nobody's.
    pub const WILDCARD: u32 = 1 << 5;
    /// `externalTrafficPolicy: Local`.
    pub const EXTERNAL_LOCAL: u32 = 1 << 6;
    /// `internalTrafficPolicy: Local`.
    pub const INTERNAL_LOCAL: u32 = 1 << 7;
    /// Session affinity `ClientIP`.
    pub const AFFINITY: u32 = 1 << 8;
    /// `loadBalancerSourceRanges` apply.
    pub const SOURCE_RANGES: u32 = 1 << 9;
    /// The ranges are those of the clients that are not served, not of those that are.
    pub const SOURCE_RANGES_DENY: u32 = 1 << 10;
    /// Mask of how packets get to backends on other nodes.
    pub const FORWARDING: u32 = 0b111 << 11;
    /// With this node's address as source, so that replies come back here.
    pub const FORWARDING_SNAT: u32 = 0;
    /// As they are, to a node on the same segment; see [`crate::PeerValue`]. To other nodes as with `FORWARDING_SNAT`.
    pub const FORWARDING_L2: u32 = 1 << 11;
    /// As they are to a node on the same segment, wrapped in another IP packet to other nodes (RFC 2003, RFC 2473).
    pub const FORWARDING_IPIP: u32 = 2 << 11;
    /// As they are to a node on the same segment; to backends elsewhere with the client's address, and the service's in an
    /// IPv4 option or an IPv6 destination option.
    pub const FORWARDING_OPT: u32 = 3 << 11;
}

/// Why a frontend exists.
#[repr(u32)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum FrontendKind {
    /// `spec.clusterIPs`
    ClusterIp = 0,
    /// `spec.ports[].nodePort` on a node's address.
    NodePort = 1,
    /// `status.loadBalancer.ingress[].ip`
    LoadBalancer = 2,
    /// `spec.externalIPs`
    ExternalIps = 3,
    /// `hostPort` of a local pod.
    HostPort = 4,
}

impl FrontendKind {
    /// All, in the order of their numbers.
    pub const ALL: [Self; 5] = [Self::ClusterIp, Self::NodePort, Self::LoadBalancer, Self::ExternalIps, Self::HostPort];

    /// The kind in [`FrontendValue::flags`]; none of a number that stands for nothing.
    pub fn of(flags: u32) -> Option<Self> {
        Self::ALL.get((flags & frontend_flags::KIND) as usize).copied()
    }

    /// The name that the command line shows.
    pub const fn text(self) -> &'static str {
        match self {
            Self::ClusterIp => "ClusterIP",
            Self::NodePort => "NodePort",
            Self::LoadBalancer => "LoadBalancer",
            Self::ExternalIps => "ExternalIPs",
            Self::HostPort => "HostPort",
        }
    }
}

/// Element of the backends array; all zero when the id is free.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct Backend {
    /// The pod's address.
    pub addr: Addr,
    /// The pod's port.
    pub port: Be16,
    /// IP protocol number.
    pub proto: u8,
    /// [`BackendState`].
    pub state: u8,
    /// [`BACKEND_LOCAL`]; from bit 8 on the [`NodeTag`].
    pub flags: u32,
}

/// Stands for a node's name: 24 bits of a hash, so that every agent finds the same number without asking anybody, and a
/// restarted one finds it again. 0 is no node.
pub type NodeTag = u32;

/// The highest tag.
pub const NODE_TAG_MAX: NodeTag = (1 << 24) - 1;

/// Where the tag begins in [`Backend::flags`].
const NODE_SHIFT: u32 = 8;

impl Backend {
    /// [`Self::flags`] of a backend on a node.
    #[inline(always)]
    pub const fn flags_of(local: bool, node: NodeTag) -> u32 {
        node << NODE_SHIFT | if local { BACKEND_LOCAL } else { 0 }
    }

    /// The node that it runs on; 0 where that is not known.
    #[inline(always)]
    pub const fn node(&self) -> NodeTag {
        self.flags >> NODE_SHIFT
    }

    /// Whether it runs on this node.
    #[inline(always)]
    pub const fn is_local(&self) -> bool {
        self.flags & BACKEND_LOCAL != 0
    }

    /// Whether it is the one that a flow of the client's direction was given, and not another one under its id, and takes
    /// the flow's packets.
    #[inline(always)]
    pub fn serves(&self, key: &FlowKey, flow: &FlowValue) -> bool {
        let (addr, port) = flow.backend_end(key);
        self.addr == addr
            && self.port == port
            && (self.state == BackendState::Active as u8 || self.state == BackendState::Terminating as u8)
    }
}

/// The backend runs on this node.
pub const BACKEND_LOCAL: u32 = 1;

/// What may be sent to a backend (behaviour of EndpointSlice conditions).
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum BackendState {
    /// The id is free.
    Free = 0,
    /// Takes new connections.
    Active = 1,
    /// Takes new connections only while there is no active one.
    Terminating = 2,
    /// Takes no new connections; established ones go on.
    TerminatingNotServing = 3,
    /// Not ready: takes no new connections.
    Maintenance = 4,
}

impl BackendState {
    /// All, in the order of their numbers.
    pub const ALL: [Self; 5] =
        [Self::Free, Self::Active, Self::Terminating, Self::TerminatingNotServing, Self::Maintenance];

    /// The state of [`Backend::state`]; none of a number that stands for nothing.
    pub fn of(state: u8) -> Option<Self> {
        Self::ALL.get(usize::from(state)).copied()
    }

    /// The name that the command line shows.
    pub const fn text(self) -> &'static str {
        match self {
            Self::Free => "free",
            Self::Active => "active",
            Self::Terminating => "terminating",
            Self::TerminatingNotServing => "terminating-not-serving",
            Self::Maintenance => "maintenance",
        }
    }
}

crate::pod! { FrontendKey = 20, SetRef = 8, FrontendValue = 28, Backend = 24 }
