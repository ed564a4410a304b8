//! What would happen to a packet: the questions that the eBPF programs ask of the maps, asked in their order, each answer
//! written down.
//!
//! [`trace`] reads a [`View`] and changes nothing. Where the programs choose at random, every choice is a [`Way`] with its
//! probability, so that the real outcome is always one of them; `tests/datapath/trace.rs` holds that against the
//! programs in the kernel, on the same maps. Where this and the programs differ, this is wrong.
//!
//! A traced packet is the first of a connection as far as nothing says otherwise: TCP is a SYN, ICMP is an echo request,
//! nothing is fragmented, expired or too long, and it comes from the client and not from a node that hands it on.
//!
//! Deliberately absent: reading maps and routing tables (`src/trace`), and what other programs or the host's firewall do
//! with a packet that is handed on.

mod egress;
mod flows;
mod icmp;
mod ingress;
mod place;
mod question;
mod route;
mod select;
mod socket;
mod step;
mod text;

use std::net::IpAddr;
use std::sync::Arc;

use kinesin_abi::{
    Addr, AffinityKey, AffinityValue, Backend, BackendId, Be16, DeviceValue, FlowKey, FlowValue, FrontendKey,
    FrontendValue, L2Key, PeerKey, PeerValue, SetRef, Settings, SourceRangeKey,
};
use serde::{Deserialize, Serialize};

pub use place::{Misplaced, place};
pub use question::{HookChoice, Question, QuestionError, Source, Written};
pub use route::{Hop, RouteQuery};
pub use step::{Bond, FlowDirection, Member, Method, Neighbour, Port, Step, Tuple, Verdict, Way};

/// The tuple of the packet in question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Source address; none of a socket that has not been bound.
    pub src: Option<IpAddr>,
    /// Source port, host order.
    pub sport: u16,
    /// Destination address.
    pub dst: IpAddr,
    /// Destination port, host order; 0 for ICMP.
    pub dport: u16,
    /// IP protocol number.
    pub proto: u8,
}

impl Packet {
    fn dst(&self) -> Addr {
        self.dst.into()
    }

    fn src(&self) -> Addr {
        self.src.map_or(Addr::UNSPECIFIED, Addr::from)
    }

    fn key(&self) -> FlowKey {
        FlowKey {
            src: self.src(),
            dst: self.dst(),
            sport: Be16::new(self.sport),
            dport: Be16::new(self.dport),
            proto: self.proto,
            pad: [0; 3],
        }
    }
}

/// Where a packet comes from, and so which hook sees it first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In by a device of this node, by index.
    Device(u32),
    /// A socket of this node, where it connects or sends.
    Socket {
        /// `bpf_get_netns_cookie` of its network namespace, where it is known.
        netns: Option<u64>,
        /// A process of the node itself, not of a pod.
        host: bool,
    },
    /// From this node, past the socket hooks: an answer, or a raw socket.
    Node,
}

/// A hook that a packet may meet. Each family has programs of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// tc ingress of a device.
    Ingress {
        /// The device.
        ifindex: u32,
        /// For IPv6.
        v6: bool,
    },
    /// tc egress of a device.
    Egress {
        /// The device.
        ifindex: u32,
        /// For IPv6.
        v6: bool,
    },
    /// tc ingress of pods' devices.
    Pod {
        /// For IPv6.
        v6: bool,
    },
    /// The socket hooks, of which those of `connect` and `sendmsg` matter here.
    Socket {
        /// For IPv6.
        v6: bool,
    },
}

/// Whether a program is at a hook.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Attached {
    /// It is, in this way (`tcx`, `clsact`, `cgroup`).
    Yes(String),
    /// Packets meet nothing of ours, for this reason.
    No(String),
}

/// What the maps, the routing tables and the clock answer. Each question is asked anew, of what is there now.
pub trait View {
    /// Why a question could not be answered.
    type Error;

    /// An entry of `frontends`.
    fn frontend(&self, key: &FrontendKey) -> Result<Option<FrontendValue>, Self::Error>;
    /// The slots of a set, `count` ids from `base` on.
    fn slots(&self, set: SetRef) -> Result<Vec<BackendId>, Self::Error>;
    /// An element of `backends`; none where the id is free.
    fn backend(&self, id: BackendId) -> Result<Option<Backend>, Self::Error>;
    /// The Maglev table of a set.
    fn maglev(&self, base: u32) -> Result<Option<Arc<[BackendId]>>, Self::Error>;
    /// An entry of `flows`, else of `transient`.
    fn flow(&self, key: &FlowKey) -> Result<Option<FlowValue>, Self::Error>;
    /// An entry of `affinity`.
    fn affinity(&self, key: &AffinityKey) -> Result<Option<AffinityValue>, Self::Error>;
    /// The source ranges of a service port, of both lists and families.
    fn source_ranges(&self, service: u32) -> Result<Vec<SourceRangeKey>, Self::Error>;
    /// Whether this node announces an address on a device.
    fn announced(&self, key: &L2Key) -> Result<bool, Self::Error>;
    /// An entry of `devices`.
    fn device(&self, ifindex: u32) -> Result<Option<DeviceValue>, Self::Error>;
    /// An entry of `peers`.
    fn peer(&self, key: &PeerKey) -> Result<Option<PeerValue>, Self::Error>;
    /// What the programs are told.
    fn settings(&self) -> Result<Settings, Self::Error>;
    /// Whether the agent serves a device: its programs are there, or should be. `devices` also holds those of pods.
    fn serves(&self, ifindex: u32) -> bool;
    /// Whether a program of ours is at a hook.
    fn attached(&self, hook: Hook) -> Result<Attached, Self::Error>;
    /// The kernel's way to an address; the inner error is its refusal, in words.
    fn route(&self, query: &RouteQuery) -> Result<Result<Hop, String>, Self::Error>;
    /// Whether a device forwards packets of other hosts (`net.ipv4.conf.<device>.forwarding`, or of IPv6).
    fn forwards(&self, ifindex: u32, v4: bool) -> Result<bool, Self::Error>;
    /// A device's name; `if<index>` where it has gone.
    fn device_name(&self, ifindex: u32) -> String;
    /// A device's index.
    fn device_index(&self, name: &str) -> Option<u32>;
    /// `bpf_get_netns_cookie` of the node's own network namespace, where the kernel tells (Linux 5.14).
    fn host_netns(&self) -> Option<u64>;
    /// CLOCK_MONOTONIC in nanoseconds.
    fn now(&self) -> u64;

    /// `namespace/name:port` of the Service of a frontend, where somebody knows.
    fn service_name(&self, _key: &FrontendKey) -> Option<String> {
        None
    }
}

/// What would happen.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Trace {
    /// The question, as it was understood: `192.168.1.50:40000 -> 10.0.0.100:80 TCP`.
    pub packet: String,
    /// What is the same whatever is chosen at random.
    pub steps: Vec<Step>,
    /// How it goes on; the probabilities add up to 1.
    pub ways: Vec<Way>,
}

/// Follows a packet.
///
/// # Errors
/// Only those of the view.
pub fn trace<V: View>(view: &V, packet: &Packet, place: Place) -> Result<Trace, V::Error> {
    let mut tracer = Tracer { view, packet: *packet, steps: Vec::new() };
    let ways = match place {
        Place::Device(ifindex) => tracer.ingress(ifindex)?,
        Place::Socket { netns, host } => tracer.socket(netns, host)?,
        Place::Node => tracer.leave()?,
    };
    Ok(Trace { packet: text::packet(packet), steps: tracer.steps, ways })
}

/// A trace in the making.
struct Tracer<'a, V> {
    view: &'a V,
    packet: Packet,
    steps: Vec<Step>,
}

impl<V: View> Tracer<'_, V> {
    fn say(&mut self, step: Step) {
        self.steps.push(step);
    }
}

/// The only way.
fn sure(verdict: Verdict) -> Vec<Way> {
    vec![Way { chance: 1.0, backend: None, steps: Vec::new(), verdict }]
}

#[cfg(test)]
mod tests;
