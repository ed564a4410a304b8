//! From Services and EndpointSlices to what clients can connect to.
//!
//! [`compile`] turns one Service and its slices into [`Compiled`], a pure function of its inputs; [`SliceIndex`] knows which
//! slices belong to which Service, so that an edit recompiles that Service only; [`host_ports`] does the same for pods'
//! host ports; [`view`] is what people see of it.
//! Deliberately absent: ids, slots and maps (see [`crate::plan`]), and anything that remembers earlier results.

mod compile;
mod endpoints;
mod exposure;
mod forwarding;
mod health;
mod host_ports;
mod index;
mod problems;
mod ranges;
mod sctp;
mod topology;
mod view;
mod wide;

pub use compile::{Algorithm, NodeContext, compile};
pub use forwarding::{Dispatch, Forwarding};
pub use health::{HealthCheck, HealthPorts};
pub use host_ports::{HostContext, host_ports, object_of};
pub use index::SliceIndex;
pub use view::{address_text, view};
pub use wide::{AllBackends, WideBackend, WideView, wide};

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use ipnet::IpNet;
use kinesin_abi::{BackendState, FrontendKind};
use serde::Serialize;
use smol_str::SmolStr;

use crate::objects::{Name, ObjectKey};

/// What a Service means on this node: the unit that is compiled, planned and written as a whole.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Compiled {
    /// Everything that clients can connect to, sorted by address, port and protocol.
    pub frontends: Vec<Frontend>,
    /// Backend sets that the frontends refer to by index; equal sets are stored once.
    pub sets: Vec<BackendSet>,
    /// Who may connect to the frontends flagged [`kinesin_abi::frontend_flags::SOURCE_RANGES`]; none where all may.
    pub source_ranges: Option<SourceRanges>,
    /// What load balancers outside are told about this node; none where the Service has no health checks.
    pub health_check: Option<HealthCheck>,
    /// Parts of the object that could not be used, each naming the field and the fix.
    pub problems: Vec<String>,
}

/// `spec.loadBalancerSourceRanges`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SourceRanges {
    /// The networks are those of the clients that are not served.
    pub deny: bool,
    /// Networks without host bits, sorted. None at all with `deny` false serves nobody outside.
    pub networks: Vec<IpNet>,
}

/// One address and port of a Service.
#[derive(Clone, Debug, PartialEq)]
pub struct Frontend {
    /// `0.0.0.0` or `::` with a NodePort: sockets on this node, whichever local address they use.
    pub addr: IpAddr,
    /// 0 for a wildcard.
    pub port: u16,
    /// IP protocol number; 0 for a wildcard.
    pub proto: u8,
    /// Why it exists.
    pub kind: FrontendKind,
    /// `spec.ports[].name`
    pub port_name: SmolStr,
    /// Other bits of [`kinesin_abi::frontend_flags`] than the kind.
    pub flags: u32,
    /// Session affinity timeout, seconds; 0 for none.
    pub affinity: u32,
    /// Index into [`Compiled::sets`] for traffic from outside; `None` for wildcards.
    pub external: Option<usize>,
    /// Index into [`Compiled::sets`] for traffic from the cluster.
    pub internal: Option<usize>,
}

/// Backends of one service port under one traffic policy, sorted by address and port, without duplicates.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct BackendSet {
    /// All of them; those that take new connections (see `usable`) come first.
    pub backends: Arc<[BackendRef]>,
    /// How many of `backends` take new connections: the active ones, or the terminating ones while none is active.
    pub usable: usize,
}

/// Index of a set among those of one Service or host port; equal ones share it.
fn intern(sets: &mut Vec<BackendSet>, set: BackendSet) -> usize {
    sets.iter().position(|known| *known == set).unwrap_or_else(|| {
        sets.push(set);
        sets.len() - 1
    })
}

/// What stands for every local address: see [`kinesin_abi::FrontendKey::addr`].
const SURROGATES: [IpAddr; 2] = [IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::UNSPECIFIED)];

/// One pod behind a service port.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BackendRef {
    /// The pod's address.
    pub addr: IpAddr,
    /// The pod's port.
    pub port: u16,
    /// IP protocol number.
    pub proto: u8,
    /// From the endpoint's conditions.
    pub state: BackendState,
    /// Runs on this node.
    pub local: bool,
    /// `nodeName`
    pub node: Name,
    /// `zone`
    pub zone: Name,
}

impl BackendRef {
    /// Whether `Local` policies keep it: it runs on this node, or nobody says where.
    fn counts_as_local(&self) -> bool {
        self.local || self.node.is_empty()
    }
}

/// One object of `kinesin services -o json`.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct FrontendView {
    /// `10.96.0.1:80/TCP`
    pub address: String,
    /// `ClusterIP`, `NodePort`, `LoadBalancer`, `ExternalIPs`, `HostPort`
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// `namespace/name`
    pub service: String,
    /// Name of the Service's port.
    pub port_name: SmolStr,
    /// `all`, or `external` and `internal` when the two differ.
    pub scope: &'static str,
    /// `programmed`, `pending` or an error.
    pub status: String,
    /// Those in use come first.
    pub backends: Vec<BackendView>,
}

/// A backend of [`FrontendView`].
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct BackendView {
    /// `10.42.0.5:8080`
    pub address: String,
    /// `active`, `terminating`, `terminating-not-serving`, `maintenance`
    pub state: &'static str,
    /// Node of the pod.
    pub node: SmolStr,
    /// Zone of that node.
    pub zone: SmolStr,
}

/// Key of the compiled table: a Service's, or that of a pod's host port ([`object_of`] tells which).
pub type ServiceKey = ObjectKey;

#[cfg(test)]
mod tests;
