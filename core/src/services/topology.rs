//! Topology: keeping traffic in the zone, or on the node, by the hints of EndpointSlices.

use std::collections::HashSet;
use std::net::IpAddr;

use kinesin_abi::BackendState;

use super::problems::Problems;
use super::{BackendRef, NodeContext};
use crate::objects::{EndpointHints, Service, TrafficPolicy};

/// `Auto` opts in to hints for zones; the second is the older name.
const ANNOTATIONS: [&str; 2] = ["service.kubernetes.io/topology-mode", "service.kubernetes.io/topology-aware-hints"];

/// What a Service asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Prefer {
    /// Nothing: hints are not read.
    Any,
    /// Endpoints hinted for this node's zone.
    Zone,
    /// Endpoints hinted for this node, else for its zone.
    Node,
}

/// Whether an endpoint has hints, and whether they are for this node.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Hints {
    for_zones: bool,
    our_zone: bool,
    for_nodes: bool,
    our_node: bool,
}

impl Hints {
    pub(super) fn of(hints: Option<&EndpointHints>, node: &NodeContext) -> Self {
        let Some(hints) = hints else { return Self::default() };
        let zone = |name: &str| !name.is_empty() && name == node.zone;
        let here = |name: &str| !name.is_empty() && name == node.name;
        Self {
            for_zones: !hints.for_zones.is_empty(),
            our_zone: hints.for_zones.iter().any(|hint| zone(&hint.name)),
            for_nodes: !hints.for_nodes.is_empty(),
            our_node: hints.for_nodes.iter().any(|hint| here(&hint.name)),
        }
    }
}

/// The annotation wins over `spec.trafficDistribution`, as in Kubernetes. With `internalTrafficPolicy: Local` there is
/// nothing to prefer.
pub(super) fn preference(service: &Service, node: &NodeContext, problems: &mut Problems) -> Prefer {
    let spec = &service.spec;
    if !node.service_topology || spec.internal_traffic_policy == TrafficPolicy::Local {
        return Prefer::Any;
    }
    let mode = ANNOTATIONS.iter().find_map(|name| service.metadata.annotations.get(name));
    if mode.is_some_and(|mode| mode.eq_ignore_ascii_case("auto")) {
        return Prefer::Zone;
    }
    match spec.traffic_distribution.as_deref() {
        None | Some("") => Prefer::Any,
        Some("PreferClose" | "PreferSameZone") => Prefer::Zone,
        Some("PreferSameNode") => Prefer::Node,
        Some(other) => {
            problems.note(format!(
                "spec.trafficDistribution: \"{other}\" is unknown and ignored; use PreferClose, PreferSameZone or PreferSameNode"
            ));
            Prefer::Any
        }
    }
}

/// The endpoints of one family that hints leave for this node; none where hints do not apply and all are used.
///
/// Hints apply when **every** endpoint that would be used has one, and at least one of them is for this node; a single
/// endpoint without says that the controller is not done, or has found hints harmful. Endpoints that are not in use (a
/// terminating one beside active ones) never have hints; they neither count nor are they left out.
pub(super) fn near(all: &[BackendRef], hints: &[Hints], prefer: Prefer, v4: bool) -> Option<HashSet<(IpAddr, u16)>> {
    let family = || all.iter().zip(hints).filter(|(backend, _)| backend.addr.is_ipv4() == v4);
    let in_use = [BackendState::Active, BackendState::Terminating]
        .into_iter()
        .find(|state| family().any(|(backend, _)| backend.state == *state))?;
    let used = || family().filter(|(backend, _)| backend.state == in_use);
    let by_node =
        prefer == Prefer::Node && used().all(|(_, hints)| hints.for_nodes) && used().any(|(_, hints)| hints.our_node);
    let by_zone =
        prefer != Prefer::Any && used().all(|(_, hints)| hints.for_zones) && used().any(|(_, hints)| hints.our_zone);
    if !by_node && !by_zone {
        return None;
    }
    let ours = |hints: &Hints| if by_node { hints.our_node } else { hints.our_zone };
    let kept = family().filter(|(backend, hints)| backend.state != in_use || ours(hints));
    Some(kept.map(|(backend, _)| (backend.addr, backend.port)).collect())
}
