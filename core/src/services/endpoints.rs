//! Which backends a service port has, out of any number of slices.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use kinesin_abi::BackendState;
use smol_str::SmolStr;

use super::problems::Problems;
use super::topology::Hints;
use super::{BackendRef, BackendSet, NodeContext};
use crate::objects::{EndpointAddress, EndpointConditions, EndpointSlice, Name, Object};

/// One of a Service's ports, already validated.
pub(super) struct PortRef<'a> {
    /// `spec.ports[].name`
    pub(super) name: &'a SmolStr,
    /// IP protocol number.
    pub(super) proto: u8,
}

/// All backends of one service port in both families, whatever their state, in order of address and port, and the hints
/// of each.
///
/// Slices are matched by the **name and protocol** of their ports, never by number: each slice may resolve a named
/// `targetPort` differently. An endpoint that several slices list counts once, in its best state, as during the moment
/// in which the controller moves it from one slice to another.
pub(super) fn gather(
    port: &PortRef<'_>,
    slices: &[&EndpointSlice],
    node: &NodeContext,
    problems: &mut Problems,
) -> (Vec<BackendRef>, Vec<Hints>) {
    let mut found: BTreeMap<(IpAddr, u16), (BackendRef, Hints)> = BTreeMap::new();
    for slice in slices {
        let want_v4 = match slice.address_type.as_str() {
            "IPv4" => Some(true),
            "IPv6" => Some(false),
            // Required by the API; files may leave it out, and then each address says what it is.
            "" => None,
            "FQDN" => {
                problems.note(format!(
                    "EndpointSlice {}: addressType FQDN has no addresses to balance to; use IPv4 or IPv6",
                    slice.key()
                ));
                continue;
            }
            other => {
                problems.note(format!(
                    "EndpointSlice {}: addressType \"{other}\" is unknown; use IPv4 or IPv6",
                    slice.key()
                ));
                continue;
            }
        };
        for slice_port in &slice.ports {
            if slice_port.name != *port.name || protocol(&slice_port.protocol) != Some(port.proto) {
                continue;
            }
            let Some(number) = slice_port.port.filter(|number| *number != 0) else {
                problems.note(format!(
                    "EndpointSlice {}: ports \"{}\" has no port number; set ports[].port to 1 to 65535",
                    slice.key(),
                    slice_port.name
                ));
                continue;
            };
            for endpoint in &slice.endpoints {
                let text = &endpoint.address;
                let addr = match backend_address(text) {
                    Ok(addr) if want_v4.is_none_or(|v4| v4 == addr.is_ipv4()) => addr,
                    Ok(_) => {
                        problems.note(format!(
                            "EndpointSlice {}: endpoint address {text} is not of addressType {}; put it into a slice of its family",
                            slice.key(),
                            slice.address_type
                        ));
                        continue;
                    }
                    Err(_) if *text == EndpointAddress::None => {
                        problems.note(format!("EndpointSlice {}: an endpoint has no addresses; add one", slice.key()));
                        continue;
                    }
                    Err(reason) => {
                        problems.note(format!(
                            "EndpointSlice {}: endpoint address \"{text}\" {reason}; use a pod's address",
                            slice.key()
                        ));
                        continue;
                    }
                };
                if !(if addr.is_ipv4() { node.ipv4 } else { node.ipv6 }) {
                    continue;
                }
                let candidate = BackendRef {
                    addr,
                    port: number,
                    proto: port.proto,
                    state: state(endpoint.conditions),
                    local: !endpoint.node_name.is_empty() && endpoint.node_name == node.name,
                    node: endpoint.node_name.clone(),
                    zone: endpoint.zone.clone(),
                };
                let hints = Hints::of(endpoint.hints.as_deref(), node);
                found
                    .entry((addr, number))
                    .and_modify(|known| {
                        if rank(&candidate) < rank(&known.0) {
                            *known = (candidate.clone(), hints);
                        }
                    })
                    .or_insert((candidate, hints));
            }
        }
    }
    found.into_values().unzip()
}

/// Which of two listings of the same endpoint wins: better state, then local, then the lesser names, so that the order of
/// slices does not matter.
fn rank(backend: &BackendRef) -> (BackendState, bool, &Name, &Name) {
    (backend.state, !backend.local, &backend.node, &backend.zone)
}

/// State by EndpointSlice conditions. Absent `ready` means ready, absent `serving` follows `ready`, absent `terminating`
/// means no.
///
/// `spec.publishNotReadyAddresses` needs no case of its own: the controller then sets `ready` on every endpoint, also on
/// terminating ones, and ready wins over terminating here.
pub(super) fn state(conditions: EndpointConditions) -> BackendState {
    let ready = conditions.ready.unwrap_or(true);
    let serving = conditions.serving.unwrap_or(ready);
    match (ready, conditions.terminating.unwrap_or(false), serving) {
        (true, _, _) => BackendState::Active,
        (false, true, true) => BackendState::Terminating,
        (false, true, false) => BackendState::TerminatingNotServing,
        (false, false, _) => BackendState::Maintenance,
    }
}

/// Keeps those that `keep` wants, puts those in use first and counts them: the active ones, or while there is none, the
/// terminating ones that still serve.
pub(super) fn select(all: &[BackendRef], keep: impl Fn(&BackendRef) -> bool) -> BackendSet {
    let kept = || all.iter().filter(|backend| keep(backend));
    let usable = [BackendState::Active, BackendState::Terminating]
        .into_iter()
        .find(|state| kept().any(|backend| backend.state == *state));
    let in_use = |backend: &&BackendRef| Some(backend.state) == usable;
    let resting = |backend: &&BackendRef| Some(backend.state) != usable;
    let backends: Arc<[BackendRef]> = kept().filter(in_use).chain(kept().filter(resting)).cloned().collect();
    let usable = backends.iter().filter(in_use).count();
    BackendSet { backends, usable }
}

/// A pod's address; IPv4-mapped IPv6 is read as IPv4, because the maps do not tell them apart.
fn backend_address(address: &EndpointAddress) -> Result<IpAddr, &'static str> {
    let EndpointAddress::Ip(addr) = address else { return Err("is not an IP address") };
    host_address(*addr)
}

/// The address of one host, in its own form.
pub(super) fn host_address(addr: IpAddr) -> Result<IpAddr, &'static str> {
    let addr = addr.to_canonical();
    if addr.is_unspecified() || addr.is_multicast() || addr == IpAddr::from([255; 4]) {
        return Err("is not the address of one host");
    }
    Ok(addr)
}

/// IP protocol number of a Kubernetes protocol name; TCP when absent.
pub(super) fn protocol(name: &str) -> Option<u8> {
    match name {
        "" | "TCP" => Some(kinesin_abi::proto::TCP),
        "UDP" => Some(kinesin_abi::proto::UDP),
        "SCTP" => Some(kinesin_abi::proto::SCTP),
        _ => None,
    }
}
