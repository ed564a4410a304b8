//! Frontends with everything that decides who gets a connection, and why a backend gets none.
//!
//! Made when somebody asks, from the objects themselves: what a traffic policy or a hint leaves out is in no backend set.

use std::collections::HashMap;

use kinesin_abi::{BackendState, frontend_flags as flags};
use serde::Serialize;
use smol_str::SmolStr;

use super::endpoints::{self, PortRef};
use super::problems::Problems;
use super::view::address_text;
use super::{BackendRef, BackendSet, Compiled, Frontend, NodeContext, ServiceKey};
use crate::maglev::protocol_name;
use crate::objects::{EndpointSlice, Service};

/// One object of `kinesin services --wide -o json`.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct WideView {
    /// `10.96.0.1:80/TCP`
    pub address: String,
    /// `ClusterIP`, `NodePort`, `LoadBalancer`, `ExternalIPs`, `HostPort`
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// `namespace/name`; of a host port, the key of its row.
    pub service: String,
    /// Name of the Service's port.
    pub port_name: SmolStr,
    /// `all`, or `external` and `internal` when the two differ.
    pub scope: &'static str,
    /// `programmed`, `pending` or an error.
    pub status: String,
    /// Whether clients outside the cluster are served.
    pub routable: bool,
    /// `Cluster` or `Local`, for clients outside.
    pub external_traffic_policy: &'static str,
    /// `Cluster` or `Local`, for clients inside.
    pub internal_traffic_policy: &'static str,
    /// `random` or `maglev`
    pub algorithm: &'static str,
    /// For how long a client stays with its backend, seconds; `null` without session affinity.
    pub session_affinity_seconds: Option<u32>,
    /// `allow` or `deny`; `null` where all clients are served.
    pub source_ranges_policy: Option<&'static str>,
    /// The networks of that policy.
    pub source_ranges: Vec<String>,
    /// `spec.healthCheckNodePort`, where this node answers there.
    pub health_check_node_port: Option<u16>,
    /// Those in use come first.
    pub backends: Vec<WideBackend>,
}

/// A backend of [`WideView`].
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct WideBackend {
    /// `10.42.0.5:8080`
    pub address: String,
    /// `active`, `terminating`, `terminating-not-serving`, `maintenance`
    pub state: &'static str,
    /// Node of the pod.
    pub node: SmolStr,
    /// Zone of that node.
    pub zone: SmolStr,
    /// Its share of new connections in proportion to others: 0 means that it gets none.
    pub weight: u32,
    /// Why it gets no new connections; `null` when it does.
    pub unused: Option<&'static str>,
}

/// All backends of a Service's ports, by the port's name and protocol, used or not.
#[derive(Debug, Default)]
pub struct AllBackends(HashMap<(SmolStr, u8), Vec<BackendRef>>);

impl AllBackends {
    /// Out of all slices of the Service.
    pub fn of<'a>(service: &Service, slices: impl Iterator<Item = &'a EndpointSlice>, node: &NodeContext) -> Self {
        let slices: Vec<&EndpointSlice> = slices.collect();
        // Said when the Service was compiled.
        let mut problems = Problems::default();
        let ports = service.spec.ports.iter().filter_map(|port| {
            let proto = endpoints::protocol(&port.protocol)?;
            let (all, _) = endpoints::gather(&PortRef { name: &port.name, proto }, &slices, node, &mut problems);
            Some(((port.name.clone(), proto), all))
        });
        Self(ports.collect())
    }
}

/// What `kinesin services --wide` shows of one Service or host port, in the order of [`super::view`].
pub fn wide(key: &ServiceKey, compiled: &Compiled, status: &str, all: &AllBackends) -> Vec<WideView> {
    let mut lines = Vec::new();
    for frontend in compiled.frontends.iter().filter(|frontend| frontend.flags & flags::WILDCARD == 0) {
        let line = |scope, set: Option<usize>, local: bool| {
            let ranges = compiled.source_ranges.as_ref().filter(|_| frontend.flags & flags::SOURCE_RANGES != 0);
            WideView {
                address: format!("{}/{}", address_text(frontend.addr, frontend.port), protocol_name(frontend.proto)),
                kind: frontend.kind.text(),
                service: key.to_string(),
                port_name: frontend.port_name.clone(),
                scope,
                status: status.to_owned(),
                routable: frontend.flags & flags::ROUTABLE != 0,
                external_traffic_policy: policy(frontend, flags::EXTERNAL_LOCAL),
                internal_traffic_policy: policy(frontend, flags::INTERNAL_LOCAL),
                algorithm: if frontend.flags & flags::MAGLEV != 0 { "maglev" } else { "random" },
                session_affinity_seconds: (frontend.flags & flags::AFFINITY != 0).then_some(frontend.affinity),
                source_ranges_policy: ranges.map(|ranges| if ranges.deny { "deny" } else { "allow" }),
                source_ranges: ranges.iter().flat_map(|r| &r.networks).map(ToString::to_string).collect(),
                health_check_node_port: compiled.health_check.map(|check| check.port),
                backends: backends(frontend, set.and_then(|index| compiled.sets.get(index)), all, local),
            }
        };
        let (external, internal) =
            (frontend.flags & flags::EXTERNAL_LOCAL != 0, frontend.flags & flags::INTERNAL_LOCAL != 0);
        if frontend.external == frontend.internal {
            lines.push(line("all", frontend.internal, external || internal));
        } else {
            lines.push(line("external", frontend.external, external));
            lines.push(line("internal", frontend.internal, internal));
        }
    }
    lines
}

fn policy(frontend: &Frontend, local: u32) -> &'static str {
    if frontend.flags & local != 0 { "Local" } else { "Cluster" }
}

/// Those of the set, then those that the policy (`local`) or a hint left out of it.
fn backends(frontend: &Frontend, set: Option<&BackendSet>, all: &AllBackends, local: bool) -> Vec<WideBackend> {
    let Some(set) = set else { return Vec::new() };
    let kept = set
        .backends
        .iter()
        .enumerate()
        .map(|(at, backend)| show(backend, (at >= set.usable).then(|| resting(backend))));
    let port = (frontend.port_name.clone(), frontend.proto);
    let family = |backend: &&BackendRef| backend.addr.is_ipv4() == frontend.addr.is_ipv4();
    let is_kept = |backend: &BackendRef| set.backends.iter().any(|b| (b.addr, b.port) == (backend.addr, backend.port));
    let left_out = all.0.get(&port).into_iter().flatten().filter(family).filter(|backend| !is_kept(backend));
    let why = |backend: &BackendRef| match backend.state {
        BackendState::Active | BackendState::Terminating if local => "on another node, and the traffic policy is Local",
        BackendState::Active | BackendState::Terminating => "hinted for other zones or nodes",
        _ => resting(backend),
    };
    kept.chain(left_out.map(|backend| show(backend, Some(why(backend))))).collect()
}

/// Why a member of a set gets no new connections.
fn resting(backend: &BackendRef) -> &'static str {
    match backend.state {
        BackendState::Active | BackendState::Free => "others are used",
        BackendState::Terminating => "terminating, while others are ready",
        BackendState::TerminatingNotServing => "terminating and serving no more",
        BackendState::Maintenance => "not ready",
    }
}

fn show(backend: &BackendRef, unused: Option<&'static str>) -> WideBackend {
    WideBackend {
        address: address_text(backend.addr, backend.port),
        state: backend.state.text(),
        node: backend.node.as_str().into(),
        zone: backend.zone.as_str().into(),
        weight: u32::from(unused.is_none()),
        unused,
    }
}
