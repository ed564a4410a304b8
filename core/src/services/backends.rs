//! Endpoints to backends: which belong to a port, in which state, and which of them take new connections.

use std::collections::BTreeMap;
use std::net::IpAddr;

use kinesin_abi::BackendState;
use smol_str::{SmolStr, format_smolstr};

use super::compile::protocol_number;
use super::{BackendRef, BackendSet, NodeContext};
use crate::objects::{Endpoint, EndpointConditions, EndpointSlice, Service};

/// An endpoint of one port.
#[derive(Clone, Debug)]
pub(super) struct Candidate {
    addr: IpAddr,
    port: u16,
    state: BackendState,
    local: bool,
    node: SmolStr,
    zone: SmolStr,
}

/// What joins a Service's port with a slice's: name and protocol.
pub(super) fn port_key(name: &str, protocol: u8) -> SmolStr {
    format_smolstr!("{protocol}/{name}")
}

/// Everything behind a Service, by port and family (`true` is IPv6).
pub(super) fn collect<'a>(
    service: &Service,
    slices: impl Iterator<Item = &'a EndpointSlice>,
    node: &NodeContext,
    problems: &mut Vec<String>,
) -> BTreeMap<(SmolStr, bool), Vec<Candidate>> {
    let mut found: BTreeMap<(SmolStr, bool), Vec<Candidate>> = BTreeMap::new();
    for slice in slices.filter(|slice| slice.address_type != "FQDN") {
        for port in &slice.ports {
            let (Some(protocol), Some(number)) = (protocol_number(&port.protocol), port.port) else { continue };
            for (i, endpoint) in slice.endpoints.iter().enumerate() {
                let Some(text) = endpoint.addresses.first() else { continue };
                let Ok(addr) = text.parse::<IpAddr>() else {
                    let name = &slice.metadata.name;
                    problems.push(format!(
                        "EndpointSlice {name}: endpoints[{i}].addresses[0]: \"{text}\" is not an IP address"
                    ));
                    continue;
                };
                let candidate = Candidate {
                    addr,
                    port: number,
                    state: state(endpoint.conditions, service.spec.publish_not_ready_addresses),
                    local: is_local(endpoint, &node.name),
                    node: endpoint.node_name.clone().unwrap_or_default(),
                    zone: endpoint.zone.clone().unwrap_or_default(),
                };
                found.entry((port_key(&port.name, protocol), addr.is_ipv6())).or_default().push(candidate);
            }
        }
    }
    for candidates in found.values_mut() {
        // Of an endpoint in several slices, the best state counts: the slices are copies of different age.
        candidates.sort_by_key(|c| (c.addr, c.port, c.state as u8));
        candidates.dedup_by_key(|c| (c.addr, c.port));
    }
    found
}

/// The set of a port under a policy.
pub(super) fn set(candidates: &[Candidate], protocol: u8, only_local: bool) -> BackendSet {
    let mut backends: Vec<_> = candidates
        .iter()
        .filter(|candidate| candidate.local || !only_local)
        .map(|candidate| BackendRef {
            addr: candidate.addr,
            port: candidate.port,
            proto: protocol,
            state: candidate.state,
            local: candidate.local,
            node: candidate.node.clone(),
            zone: candidate.zone.clone(),
        })
        .collect();
    let any_active = backends.iter().any(|backend| backend.state == BackendState::Active);
    let taking = if any_active { BackendState::Active } else { BackendState::Terminating };
    // Stable: within each half the order by address stays.
    backends.sort_by_key(|backend| backend.state != taking);
    let usable = backends.iter().take_while(|backend| backend.state == taking).count();
    BackendSet { backends: backends.into(), usable }
}

/// An endpoint without a node could be anywhere, so it counts as here.
fn is_local(endpoint: &Endpoint, node: &str) -> bool {
    endpoint.node_name.as_deref().is_none_or(|name| name.is_empty() || name == node)
}

/// Absent `ready` means ready, absent `serving` follows it, absent `terminating` means no.
fn state(conditions: EndpointConditions, publish_not_ready: bool) -> BackendState {
    let ready = conditions.ready.unwrap_or(true) || publish_not_ready;
    let serving = conditions.serving.unwrap_or(ready);
    match (ready, conditions.terminating.unwrap_or(false), serving) {
        (true, ..) => BackendState::Active,
        (false, true, true) => BackendState::Terminating,
        (false, true, false) => BackendState::TerminatingNotServing,
        (false, false, _) => BackendState::Maintenance,
    }
}
