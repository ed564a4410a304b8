//! What a trace says: steps, ways and verdicts. Shapes of `kinesin trace -o json`: fields are added, never renamed.

use std::net::{IpAddr, SocketAddr};

use kinesin_abi::DropReason;
use serde::{Deserialize, Serialize};

/// One answer of the maps, or of the kernel.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "step", rename_all = "kebab-case", rename_all_fields = "camelCase")]
pub enum Step {
    /// A hook that the packet meets.
    Hook {
        /// `cil_from_netdev`
        program: String,
        /// `tcx ingress of eth0`
        place: String,
        /// What it does with this packet, where that is all there is to say.
        note: String,
    },
    /// Who answers a neighbour that asks for the destination address (ARP, NDP) on the device.
    Neighbour {
        /// The destination address.
        address: IpAddr,
        /// The device.
        device: String,
        /// Who.
        answers: Neighbour,
    },
    /// A connection that is known.
    Flow {
        /// Which packets of it this is one of.
        direction: FlowDirection,
        /// What the packet becomes.
        becomes: Tuple,
        /// The backend's id.
        backend: u32,
        /// Seconds since its last packet in this direction.
        idle_seconds: u64,
        /// What was seen of a TCP connection: `answered`, `fin`, `fin-reply`, `rst`.
        seen: Vec<String>,
        /// Why it does not count, where it does not.
        past: Option<String>,
    },
    /// No connection is known by this tuple.
    NoFlow,
    /// What the destination is.
    Frontend {
        /// The key that was found, `10.0.0.100:80/TCP`.
        key: String,
        /// `exact`, `wildcard`, `any-local-address` (a NodePort by a loopback address), or `another-node` (one by another
        /// node's address).
        by: String,
        /// `ClusterIP`, `NodePort`, `LoadBalancer`, `ExternalIPs`, `HostPort`
        kind: String,
        /// `namespace/name:port`, where the agent knows.
        service: Option<String>,
        /// Node-local id of the service port.
        id: u32,
        /// `external` or `internal`: whose traffic policy applies.
        scope: String,
        /// `Cluster` or `Local`.
        policy: String,
        /// How many backends that scope has here.
        backends: u32,
    },
    /// The destination is no service.
    NoFrontend {
        /// The keys that were looked for.
        tried: Vec<String>,
    },
    /// `loadBalancerSourceRanges`.
    SourceRanges {
        /// The client.
        client: IpAddr,
        /// `allow` or `deny`: what the list says about the clients in it.
        list: String,
        /// The longest prefix that contains the client.
        matched: Option<String>,
        /// The outcome.
        served: bool,
    },
    /// `sessionAffinity: ClientIP`.
    Affinity {
        /// The client: an address, or a network namespace.
        client: String,
        /// Seconds after which it ends.
        timeout_seconds: u32,
        /// What is known.
        bond: Bond,
    },
    /// How a backend is chosen.
    Selection {
        /// The method.
        method: Method,
        /// Of how many.
        of: u32,
    },
    /// The backend of this way.
    Backend(Member),
    /// The source address and port that the backend sees.
    Source {
        /// `kept`, or `node` where this node's address takes its place.
        address: IpAddr,
        /// Whether the client's own address is kept.
        kept: bool,
        /// The port.
        port: Port,
        /// Why.
        why: String,
    },
    /// The way that the kernel's routing tables know.
    Route {
        /// To where.
        to: IpAddr,
        /// `eth0`
        device: String,
        /// The next hop; none where the destination is on the link.
        via: Option<IpAddr>,
        /// The next hop's MAC, where the neighbour table has it.
        mac: Option<String>,
        /// State of that entry: `reachable`, `stale`, …; `none` where there is none yet.
        neighbour: String,
    },
    /// There is no way.
    NoRoute {
        /// To where.
        to: IpAddr,
        /// What the kernel says.
        why: String,
    },
}

/// See [`Step::Neighbour`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Neighbour {
    /// Our program, as this node announces the address there.
    Program,
    /// Nobody, though this node should: its agent has been dead for too long.
    SilentWithoutAgent,
    /// The host's stack: the address is the device's own.
    Host,
    /// Not this node.
    NotThisNode,
}

/// See [`Step::Flow`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FlowDirection {
    /// From the client.
    Request,
    /// From the backend.
    Reply,
}

/// See [`Step::Affinity`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "kind", rename_all_fields = "camelCase")]
pub enum Bond {
    /// The client comes back to this backend.
    Binds {
        /// Its id.
        backend: u32,
        /// Seconds since the client's last new connection.
        idle_seconds: u64,
    },
    /// There is an entry that no longer counts.
    Void {
        /// Its backend.
        backend: u32,
        /// Why it does not count.
        why: String,
    },
    /// The client is new; it will be bound to whoever it is given.
    None,
    /// Sockets are bound by network namespace, and which one is not known.
    Unknown,
}

/// See [`Step::Selection`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "kind")]
pub enum Method {
    /// The client is bound.
    Affinity,
    /// At random.
    Random,
    /// By the table.
    Maglev {
        /// Where in the table the client's connection hashes to.
        index: u32,
        /// Entries of the table.
        size: u32,
        /// Seed of the hash.
        seed: u32,
    },
    /// By the table, which is not there or leads to no backend; so at random.
    MaglevMissing {
        /// What is wrong.
        why: String,
    },
}

/// A backend.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Member {
    /// Its id.
    pub id: u32,
    /// `10.42.1.5:8080`
    pub address: SocketAddr,
    /// `active`, `terminating`, `terminating-not-serving`, `maintenance`
    pub state: String,
    /// On this node.
    pub local: bool,
}

/// A port, or the range that it is taken from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Port {
    /// The first.
    pub first: u16,
    /// The last; equal where there is no choice.
    pub last: u16,
}

impl Port {
    /// This one.
    pub const fn only(port: u16) -> Self {
        Self { first: port, last: port }
    }

    /// Whether a port is one of these.
    pub const fn contains(self, port: u16) -> bool {
        self.first <= port && port <= self.last
    }
}

/// What a packet becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tuple {
    /// Source address.
    pub src: IpAddr,
    /// Source port.
    pub sport: Port,
    /// Destination address.
    pub dst: IpAddr,
    /// Destination port.
    pub dport: u16,
}

/// One of the ways on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Way {
    /// Probability, 0 to 1.
    pub chance: f64,
    /// The backend, where there is one.
    pub backend: Option<Member>,
    /// What happens on this way.
    pub steps: Vec<Step>,
    /// And how it ends.
    pub verdict: Verdict,
}

/// How it ends.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", rename_all_fields = "camelCase")]
pub enum Verdict {
    /// Handed on untouched.
    Pass {
        /// Why it is none of ours.
        why: String,
    },
    /// Translated, and handed on to the host's stack.
    Translated(Tuple),
    /// Translated, and sent out of a device past the host's stack.
    Sent {
        /// The new tuple.
        #[serde(flatten)]
        tuple: Tuple,
        /// The device.
        device: String,
    },
    /// Sent on as it is to the node of its backend, which translates it.
    HandedOn {
        /// The node's MAC.
        mac: String,
        /// The device.
        device: String,
    },
    /// Sent on as it is, inside another IP packet, to the node of its backend, which translates it.
    Wrapped {
        /// The outer source: this node's address.
        from: IpAddr,
        /// The node's address.
        to: IpAddr,
        /// The device.
        device: String,
    },
    /// Answered by the program.
    Answered {
        /// With what.
        with: String,
    },
    /// Dropped and counted.
    Dropped {
        /// As in metrics: `Service backend not found`.
        reason: String,
        /// Its number.
        number: u8,
        /// What the sender is told, if anything.
        told: Option<String>,
    },
    /// The socket talks to this address instead, and sees the one it asked for.
    Connects {
        /// The backend.
        to: SocketAddr,
    },
    /// The system call fails.
    Denied {
        /// `EPERM`
        errno: String,
    },
}

impl Verdict {
    pub(super) fn dropped(reason: DropReason) -> Self {
        Self::Dropped { reason: reason.text().into(), number: reason as u8, told: None }
    }

    pub(super) fn pass(why: impl Into<String>) -> Self {
        Self::Pass { why: why.into() }
    }
}
