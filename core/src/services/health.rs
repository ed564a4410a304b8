//! Health-check node ports: how a load balancer outside learns which nodes have endpoints of a Service.
//!
//! Deliberately absent: listening on the ports, which is an actor's.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use kinesin_abi::{BackendState, FrontendKind, frontend_flags as flags, proto};
use smol_str::SmolStr;

use super::compile::Builder;
use super::{BackendRef, BackendSet, Frontend, NodeContext, ServiceKey};
use crate::objects::{Service, ServiceType, TrafficPolicy};

/// Name of the service port that leads to the answers; no name that a Service's port may have (DNS labels, RFC 1123).
const PORT_NAME: SmolStr = SmolStr::new_static(":health-check");

/// What is answered on `spec.healthCheckNodePort`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HealthCheck {
    /// `spec.healthCheckNodePort`
    pub port: u16,
    /// How many pods of the Service this node has that take new connections. A pod counts once, however many of the
    /// Service's ports it serves and in however many families.
    pub local: usize,
}

/// Counts a Service's pods on this node, while its ports are compiled.
pub(super) struct Tally {
    port: u16,
    pods: BTreeSet<IpAddr>,
}

impl Tally {
    /// Nothing for Services without health checks: Kubernetes gives the port to those of type LoadBalancer with
    /// `externalTrafficPolicy: Local`, and leaves it where the policy changed back only until the next update.
    pub(super) fn of(service: &Service, node: &NodeContext) -> Option<Self> {
        let spec = &service.spec;
        let applies = node.health_check_node_ports
            && node.kube_proxy_replacement
            && spec.kind == ServiceType::LoadBalancer
            && spec.external_traffic_policy == TrafficPolicy::Local;
        let port = spec.health_check_node_port.filter(|port| applies && *port != 0)?;
        Some(Self { port, pods: BTreeSet::new() })
    }

    /// Takes the backends of one of the Service's ports. Local are those that `externalTrafficPolicy: Local` leaves.
    pub(super) fn count(&mut self, backends: &[BackendRef]) {
        let ready =
            backends.iter().filter(|backend| backend.counts_as_local() && backend.state == BackendState::Active);
        self.pods.extend(ready.map(|backend| backend.addr));
    }

    pub(super) fn port(&self) -> u16 {
        self.port
    }

    pub(super) fn finish(self) -> HealthCheck {
        let v4 = self.pods.iter().filter(|pod| pod.is_ipv4()).count();
        // A pod of a dual-stack Service has an address in each family.
        HealthCheck { port: self.port, local: v4.max(self.pods.len() - v4) }
    }
}

impl Builder<'_> {
    /// With `enable-health-check-loadbalancer-ip` the answers are there at the load balancer's addresses too: frontends
    /// that lead to this node's own address. Source ranges do not restrict them, because who checks is no client.
    pub(super) fn health_frontends(&mut self, addresses: &[(IpAddr, FrontendKind)], port: u16) {
        if !self.node.health_check_on_load_balancer {
            return;
        }
        for &(addr, kind) in addresses {
            let own = self.node.node_port_addresses.iter().map(IpAddr::to_canonical);
            let Some(own) = own.into_iter().find(|own| own.is_ipv4() == addr.is_ipv4()) else { continue };
            if kind != FrontendKind::LoadBalancer {
                continue;
            }
            if self.out.contains_key(&(addr, port, proto::TCP)) {
                self.problems.note(format!(
                    "spec.healthCheckNodePort: {} is also a port of the Service, which is served there; use another port",
                    super::address_text(addr, port)
                ));
                continue;
            }
            let answer = BackendRef {
                addr: own,
                port,
                proto: proto::TCP,
                state: BackendState::Active,
                local: true,
                node: self.node.name.as_str().into(),
                zone: self.node.zone.as_str().into(),
            };
            let set = super::intern(&mut self.sets, BackendSet { backends: [answer].into(), usable: 1 });
            let frontend = Frontend {
                addr,
                port,
                proto: proto::TCP,
                kind,
                port_name: PORT_NAME,
                flags: flags::ROUTABLE | flags::EXTERNAL_LOCAL,
                affinity: 0,
                external: Some(set),
                internal: Some(set),
            };
            self.out.insert((addr, port, proto::TCP), frontend);
        }
    }
}

/// Which Service answers on which port, when each is told in any order.
///
/// Kubernetes gives a port to one Service only; manifests may give it to several, and then the first by name has it.
#[derive(Debug, Default)]
pub struct HealthPorts {
    asked: BTreeMap<u16, BTreeSet<ServiceKey>>,
    of: BTreeMap<ServiceKey, u16>,
}

impl HealthPorts {
    /// Takes a Service's port, or that it has none (any more).
    pub fn set(&mut self, service: &ServiceKey, port: Option<u16>) {
        if self.of.get(service).copied() == port {
            return;
        }
        if let Some(before) = self.of.remove(service)
            && let Some(services) = self.asked.get_mut(&before)
        {
            services.remove(service);
            if services.is_empty() {
                self.asked.remove(&before);
            }
        }
        if let Some(port) = port {
            self.of.insert(service.clone(), port);
            self.asked.entry(port).or_default().insert(service.clone());
        }
    }

    /// The ports to listen on, and for which Service.
    pub fn wanted(&self) -> BTreeMap<u16, &ServiceKey> {
        self.asked.iter().filter_map(|(port, services)| Some((*port, services.first()?))).collect()
    }

    /// One line for each Service whose port another one has.
    pub fn problems(&self) -> Vec<String> {
        let mut lines = Vec::new();
        for (port, services) in &self.asked {
            let Some(first) = services.first() else { continue };
            lines.extend(services.iter().skip(1).map(|service| {
                format!(
                    "Service {service}: spec.healthCheckNodePort {port} is answered for {first}; give each Service its own port"
                )
            }));
        }
        lines
    }
}
