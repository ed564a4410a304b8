//! Host ports: ports of the node that lead to a pod on it (`hostPort`).
//!
//! All of a node's pods are compiled together, because they compete for the node's ports; there are few that have any.
//! Deliberately absent: what waits for a pod to be ready. A host port leads to its pod while it runs.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};

use kinesin_abi::{BackendState, FrontendKind, frontend_flags as flags};

use super::problems::Problems;
use super::{BackendRef, BackendSet, Compiled, Frontend, NodeContext, SURROGATES, ServiceKey, endpoints};
use crate::maglev::protocol_name;
use crate::objects::{ContainerPort, ObjectKey, Pod};

/// What host ports depend on besides the pods and the [`NodeContext`].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HostContext {
    /// Addresses of the node that `hostIP` may name: all of its global ones, on whichever device.
    pub addresses: BTreeSet<IpAddr>,
    /// `node-port-range`, both inclusive: host ports in it are refused, because any of them may become a NodePort.
    pub node_ports: (u16, u16),
}

/// Stands between the pod's name and the port in a key; no name of a Service or Pod may contain it.
const MARK: &str = ":host-port:";

/// The key under which a pod's host port is compiled: `<namespace>/<pod>:host-port:<port>:<uid>`, as Cilium names it. With
/// the uid a successor of the same name is something else.
fn key(pod: &Pod, port: u16) -> ServiceKey {
    let meta = &pod.metadata;
    ServiceKey::new(meta.namespace.clone(), format!("{}{MARK}{port}:{}", meta.name, pod.uid))
}

/// Whose a key of the compiled table is: kind and key of the object, a `Service` or a `Pod`.
pub fn object_of(key: &ServiceKey) -> (&'static str, ObjectKey) {
    match key.name.split_once(MARK) {
        Some((pod, _)) => ("Pod", ObjectKey::new(key.namespace.clone(), pod)),
        None => ("Service", key.clone()),
    }
}

/// The host ports of all `pods` of this node, one entry for each pod and port number; nothing without
/// `kube-proxy-replacement`.
///
/// | `hostIP` | Addresses |
/// |---|---|
/// | absent, `0.0.0.0`, `::` | those of NodePorts, and `0.0.0.0` and `::` for local sockets that connect to loopback |
/// | loopback | only the latter, of its family |
/// | another | itself, if the node has it |
///
/// in the families of the pod's addresses. A port belongs to the pod that has been there for longest; those that end
/// (`deletionTimestamp`) come last, so a successor takes over at once. A pod that cannot have a port is told which one has
/// it, and serves its others. Pods that do not run (any more) have none.
pub fn host_ports<'a>(
    pods: impl Iterator<Item = &'a Pod>,
    host: &HostContext,
    node: &NodeContext,
) -> BTreeMap<ServiceKey, Compiled> {
    let mut running: Vec<&Pod> = pods
        .filter(|pod| node.kube_proxy_replacement && pod.status.phase == "Running" && pod.has_host_ports())
        .filter(|pod| pod.spec.node_name == node.name)
        .collect();
    running.sort_by_key(|pod| {
        let meta = &pod.metadata;
        (meta.deletion_timestamp.is_some(), &meta.creation_timestamp, &meta.namespace, &meta.name, &pod.uid)
    });
    let mut out: BTreeMap<ServiceKey, (Compiled, Problems)> = BTreeMap::new();
    let mut taken: BTreeMap<(IpAddr, u16, u8), ServiceKey> = BTreeMap::new();
    for pod in running {
        let backends = Addresses::of(pod, node);
        for (field, container) in pod.serving_containers() {
            for port in container.ports.iter().filter(|port| port.host_port != 0) {
                let key = key(pod, port.host_port);
                let (compiled, problems) = out.entry(key.clone()).or_default();
                let note = |problems: &mut Problems, text: String| {
                    problems.note(format!("{field}[{}].ports[].{text}", container.name));
                };
                let (proto, addresses) = match claim(port, &backends, host, node) {
                    Ok(claim) => claim,
                    Err(text) => {
                        note(problems, text);
                        continue;
                    }
                };
                let number = port.host_port;
                if let Some(owner) = addresses.iter().find_map(|addr| taken.get(&(*addr, number, proto))) {
                    note(
                        problems,
                        format!(
                            "hostPort: {number}/{} is in use by Pod {}; give one of the two another hostPort or hostIP",
                            protocol_name(proto),
                            object_of(owner).1
                        ),
                    );
                    continue;
                }
                for addr in addresses {
                    let Some(backend) = backends.of_family(addr) else { continue };
                    taken.insert((addr, number, proto), key.clone());
                    let backend = BackendRef {
                        addr: backend,
                        port: port.container_port,
                        proto,
                        state: backends.state,
                        local: true,
                        node: node.name.as_str().into(),
                        zone: node.zone.as_str().into(),
                    };
                    let set = BackendSet { backends: [backend].into(), usable: 1 };
                    let index = super::intern(&mut compiled.sets, set);
                    compiled.frontends.push(Frontend {
                        addr,
                        port: number,
                        proto,
                        kind: FrontendKind::HostPort,
                        port_name: port.name.clone(),
                        flags: flags::ROUTABLE,
                        affinity: 0,
                        external: Some(index),
                        internal: Some(index),
                    });
                }
            }
        }
    }
    let finish = |(key, (mut compiled, problems)): (ServiceKey, (Compiled, Problems))| {
        compiled.frontends.sort_by_key(|frontend| (frontend.addr, frontend.port, frontend.proto));
        compiled.problems = problems.finish();
        (key, compiled)
    };
    out.into_iter().map(finish).collect()
}

/// Where a pod is reached.
struct Addresses {
    v4: Option<IpAddr>,
    v6: Option<IpAddr>,
    state: BackendState,
}

impl Addresses {
    fn of(pod: &Pod, node: &NodeContext) -> Self {
        let status = &pod.status;
        let texts = status.pod_ips.iter().map(|ip| &ip.ip).chain([&status.pod_ip]);
        let all: Vec<IpAddr> = texts.filter_map(|text| endpoints::host_address(text.parse().ok()?).ok()).collect();
        let first = |v4: bool, on: bool| all.iter().copied().find(|addr| on && addr.is_ipv4() == v4);
        let ending = pod.metadata.deletion_timestamp.is_some();
        let state = if ending { BackendState::Terminating } else { BackendState::Active };
        Self { v4: first(true, node.ipv4), v6: first(false, node.ipv6), state }
    }

    /// The pod's address that connections to this one go to.
    fn of_family(&self, addr: IpAddr) -> Option<IpAddr> {
        if addr.is_ipv4() { self.v4 } else { self.v6 }
    }
}

/// Protocol and addresses that a port asks for, or the field that is wrong, why, and the fix.
fn claim(
    port: &ContainerPort,
    backends: &Addresses,
    host: &HostContext,
    node: &NodeContext,
) -> Result<(u8, Vec<IpAddr>), String> {
    let proto = endpoints::protocol(&port.protocol)
        .ok_or_else(|| format!("protocol: \"{}\" is not supported; use TCP, UDP or SCTP", port.protocol))?;
    if proto == kinesin_abi::proto::SCTP {
        if !node.sctp {
            return Err("protocol: SCTP is not served on this node; set enable-sctp to true".to_owned());
        }
        if port.host_port != port.container_port {
            return Err(format!(
                "hostPort: SCTP ports are not rewritten, so {} does not reach container port {}; make the two equal",
                port.host_port, port.container_port
            ));
        }
    }
    let (first, last) = host.node_ports;
    if (first..=last).contains(&port.host_port) {
        return Err(format!(
            "hostPort: {} is among the ports that NodePorts come from ({first}-{last}, node-port-range) and is not served; use one outside them",
            port.host_port
        ));
    }
    if port.container_port == 0 {
        return Err("containerPort: is missing or 0; use 1 to 65535".to_owned());
    }
    if backends.v4.is_none() && backends.v6.is_none() {
        return Err(
            "hostPort: the pod has no address yet in a family that is served; it is served once it has".to_owned()
        );
    }
    let reachable = |addr: &IpAddr| backends.of_family(*addr).is_some();
    let asked = match port.host_ip.as_str() {
        "" => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        text => text
            .parse::<IpAddr>()
            .map_err(|_| format!("hostIP: \"{text}\" is not an IP address; correct or remove it"))?
            .to_canonical(),
    };
    if asked.is_unspecified() {
        let own = node.node_port_addresses.iter().map(IpAddr::to_canonical);
        return Ok((proto, own.chain(SURROGATES).filter(reachable).collect()));
    }
    let at = if asked.is_loopback() {
        SURROGATES[usize::from(asked.is_ipv6())]
    } else if host.addresses.contains(&asked) {
        asked
    } else {
        return Err(format!(
            "hostIP: {asked} is not an address of this node, so nothing comes to it; remove it for all of them"
        ));
    };
    if !reachable(&at) {
        return Err(format!("hostIP: the pod has no address of the family of {asked}; remove it or give the pod one"));
    }
    Ok((proto, vec![at]))
}
