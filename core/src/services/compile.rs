//! One Service and its slices, as this node sees them.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use kinesin_abi::{FrontendKind, frontend_flags as flags, proto};
use smol_str::SmolStr;

use super::backends::{self, Candidate};
use super::{BackendSet, Compiled, Frontend, NodeContext};
use crate::lb_ipam::{CLASS_BGP, CLASS_L2};
use crate::objects::{Affinity, EndpointSlice, Service, ServicePort, ServiceType, TrafficPolicy};

/// `service.kubernetes.io/headless`
const HEADLESS_LABEL: &str = "service.kubernetes.io/headless";
/// `service.kubernetes.io/service-proxy-name`
const PROXY_NAME_LABEL: &str = "service.kubernetes.io/service-proxy-name";
/// Kubernetes' default of `sessionAffinityConfig.clientIP.timeoutSeconds`.
const AFFINITY_TIMEOUT: u32 = 10_800;
/// The map keeps 24 bits.
const AFFINITY_MAX: u32 = (1 << 24) - 1;

/// How backends are selected where a Service does not say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Algorithm {
    /// Evenly at random.
    #[default]
    Random,
    /// By a Maglev table that is the same on every node.
    Maglev,
}

/// Compiles a Service. Total: what cannot be used ends in [`Compiled::problems`], the rest is programmed.
///
/// - Headless Services, `ExternalName` and Services of another proxy have no frontends.
/// - `externalTrafficPolicy: Local` restricts what comes from outside through NodePort, LoadBalancer and external
///   addresses to this node's backends; the cluster's own traffic to them may go anywhere.
///   `internalTrafficPolicy: Local` restricts the cluster's traffic to the ClusterIP.
/// - Endpoints belong to a port by the port's *name*, whatever its number.
pub fn compile<'a>(service: &Service, slices: impl Iterator<Item = &'a EndpointSlice>, node: &NodeContext) -> Compiled {
    let mut compiler = Compiler { service, node, compiled: Compiled::default() };
    if compiler.is_ours() {
        let candidates = backends::collect(service, slices, node, &mut compiler.compiled.problems);
        compiler.frontends(&candidates);
        compiler.wildcards();
        compiler.compiled.frontends.sort_by_key(|f| (f.addr, f.port, f.proto));
        compiler.without_duplicates();
    }
    compiler.compiled
}

struct Compiler<'a> {
    service: &'a Service,
    node: &'a NodeContext,
    compiled: Compiled,
}

impl Compiler<'_> {
    fn is_ours(&self) -> bool {
        let (meta, spec) = (&self.service.metadata, &self.service.spec);
        let proxy = meta.labels.get(PROXY_NAME_LABEL).map_or("", SmolStr::as_str);
        let headless = spec.cluster_ip == "None"
            || spec.cluster_ips.iter().any(|ip| ip == "None")
            || meta.labels.contains_key(HEADLESS_LABEL);
        proxy == self.node.proxy_name && !headless && spec.kind != ServiceType::ExternalName
    }

    fn frontends(&mut self, candidates: &BTreeMap<(SmolStr, bool), Vec<Candidate>>) {
        let spec = &self.service.spec;
        let cluster_ips = self.addresses("spec.clusterIPs", cluster_ips(self.service));
        let external_ips = self.addresses("spec.externalIPs", spec.external_ips.iter().collect());
        let load_balancer_ips = self.load_balancer_ips();
        for (i, port) in spec.ports.iter().enumerate() {
            let Some(protocol) = self.protocol(i, port) else { continue };
            if port.port == 0 {
                let text = format!("spec.ports[{i}].port: 0 is no port; use 1 to 65535");
                self.compiled.problems.push(text);
                continue;
            }
            let mut wanted = Vec::new();
            let mut add = |kind, ips: &[IpAddr], number| wanted.extend(ips.iter().map(|ip| (kind, *ip, number)));
            add(FrontendKind::ClusterIp, &cluster_ips, port.port);
            add(FrontendKind::ExternalIps, &external_ips, port.port);
            add(FrontendKind::LoadBalancer, &load_balancer_ips, port.port);
            let exposed = matches!(spec.kind, ServiceType::NodePort | ServiceType::LoadBalancer);
            if exposed && port.node_port != 0 {
                for family in families(self.service, &cluster_ips) {
                    let of_node = self.node.node_port_addresses.iter().filter(|ip| ip.is_ipv6() == family);
                    let mut ips: Vec<_> = of_node.copied().collect();
                    ips.push(if family { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() });
                    add(FrontendKind::NodePort, &ips, port.node_port);
                }
            }
            for (kind, addr, number) in wanted.into_iter().filter(|(_, addr, _)| self.node.serves(*addr)) {
                let behind = candidates.get(&(backends::port_key(&port.name, protocol), addr.is_ipv6()));
                self.frontend(kind, (addr, number, protocol), port, behind.map_or(&[], Vec::as_slice));
            }
        }
    }

    fn frontend(&mut self, kind: FrontendKind, at: (IpAddr, u16, u8), port: &ServicePort, behind: &[Candidate]) {
        let (addr, number, protocol) = at;
        let spec = &self.service.spec;
        let from_outside = kind != FrontendKind::ClusterIp;
        let external_local = from_outside && spec.external_traffic_policy == TrafficPolicy::Local;
        let internal_local = !from_outside && spec.internal_traffic_policy == TrafficPolicy::Local;
        let mut bits = self.common_flags(kind);
        bits |= if external_local { flags::EXTERNAL_LOCAL } else { 0 };
        bits |= if internal_local { flags::INTERNAL_LOCAL } else { 0 };
        let external = backends::set(behind, protocol, external_local || internal_local);
        let internal = backends::set(behind, protocol, internal_local);
        self.compiled.frontends.push(Frontend {
            addr,
            port: number,
            proto: protocol,
            kind,
            port_name: port.name.clone(),
            flags: bits,
            affinity: affinity(self.service),
            external: Some(index_of(&mut self.compiled.sets, external)),
            internal: Some(index_of(&mut self.compiled.sets, internal)),
        });
    }

    fn common_flags(&self, kind: FrontendKind) -> u32 {
        let routable = if kind == FrontendKind::ClusterIp { 0 } else { flags::ROUTABLE };
        let maglev = if routable != 0 && self.node.algorithm == Algorithm::Maglev { flags::MAGLEV } else { 0 };
        let sticky = if affinity(self.service) != 0 { flags::AFFINITY } else { 0 };
        routable | maglev | sticky
    }

    /// Addresses that are ours whole: what asks for a port that no Service has is dropped instead of passed on.
    fn wildcards(&mut self) {
        let class = self.service.spec.load_balancer_class.as_deref();
        if !class.is_none_or(|class| class == CLASS_BGP || class == CLASS_L2) {
            return;
        }
        let mut addresses: Vec<_> = self
            .compiled
            .frontends
            .iter()
            .filter(|f| matches!(f.kind, FrontendKind::ClusterIp | FrontendKind::LoadBalancer))
            .map(|f| (f.addr, f.kind))
            .collect();
        addresses.sort_by_key(|(addr, kind)| (*addr, *kind as u32));
        addresses.dedup_by_key(|(addr, _)| *addr);
        self.compiled.frontends.extend(addresses.into_iter().map(|(addr, kind)| Frontend {
            addr,
            port: 0,
            proto: proto::ANY,
            kind,
            port_name: SmolStr::default(),
            flags: flags::WILDCARD,
            affinity: 0,
            external: None,
            internal: None,
        }));
    }

    /// One Service may list an address twice (external and from a pool): the first kind keeps it.
    fn without_duplicates(&mut self) {
        let mut seen = std::collections::HashSet::new();
        let problems = &mut self.compiled.problems;
        self.compiled.frontends.retain(|f| {
            let fresh = seen.insert((f.addr, f.port, f.proto));
            if !fresh && f.port != 0 {
                problems
                    .push(format!("{}:{} is listed twice with the same protocol; one entry is used", f.addr, f.port));
            }
            fresh
        });
    }

    fn addresses(&mut self, field: &str, texts: Vec<&SmolStr>) -> Vec<IpAddr> {
        let mut addresses = Vec::new();
        for (i, text) in texts.into_iter().enumerate().filter(|(_, text)| !text.is_empty()) {
            match text.parse() {
                Ok(ip) if !addresses.contains(&ip) => addresses.push(ip),
                Ok(_) => {}
                Err(_) => self.compiled.problems.push(format!("{field}[{i}]: \"{text}\" is not an IP address")),
            }
        }
        addresses.sort();
        addresses
    }

    /// Entries of mode `Proxy` belong to a load balancer elsewhere; entries with a name only have no address.
    fn load_balancer_ips(&mut self) -> Vec<IpAddr> {
        if self.service.spec.kind != ServiceType::LoadBalancer {
            return Vec::new();
        }
        let ingress = &self.service.status.load_balancer.ingress;
        let ours = ingress.iter().filter(|entry| entry.ip_mode.as_deref().is_none_or(|mode| mode == "VIP"));
        self.addresses("status.loadBalancer.ingress", ours.map(|entry| &entry.ip).collect())
    }

    fn protocol(&mut self, i: usize, port: &ServicePort) -> Option<u8> {
        let known = protocol_number(&port.protocol);
        if known.is_none() {
            let text = format!("spec.ports[{i}].protocol: \"{}\" is not one of TCP, UDP, SCTP", port.protocol);
            self.compiled.problems.push(text);
        }
        known
    }
}

/// The number of a protocol's name; absent means TCP.
pub(super) fn protocol_number(name: &str) -> Option<u8> {
    match name {
        "" | "TCP" => Some(proto::TCP),
        "UDP" => Some(proto::UDP),
        "SCTP" => Some(proto::SCTP),
        _ => None,
    }
}

/// `spec.clusterIPs`, or `spec.clusterIP` where a manifest has only that.
fn cluster_ips(service: &Service) -> Vec<&SmolStr> {
    let spec = &service.spec;
    if spec.cluster_ips.is_empty() { vec![&spec.cluster_ip] } else { spec.cluster_ips.iter().collect() }
}

/// Families of a Service's NodePorts (`true` is IPv6): as listed, else those of its addresses, else IPv4.
fn families(service: &Service, cluster_ips: &[IpAddr]) -> Vec<bool> {
    let listed = service.spec.ip_families.iter().map(|family| family == "IPv6");
    let mut families: Vec<_> = listed.chain(cluster_ips.iter().map(IpAddr::is_ipv6)).collect();
    if families.is_empty() {
        families.push(false);
    }
    families.sort_unstable();
    families.dedup();
    families
}

/// Seconds; 0 for none.
fn affinity(service: &Service) -> u32 {
    if service.spec.session_affinity != Affinity::ClientIP {
        return 0;
    }
    let config = service.spec.session_affinity_config.as_ref().and_then(|config| config.client_ip.as_ref());
    let seconds = config.and_then(|client_ip| client_ip.timeout_seconds).unwrap_or(AFFINITY_TIMEOUT);
    seconds.clamp(1, AFFINITY_MAX)
}

fn index_of(sets: &mut Vec<BackendSet>, set: BackendSet) -> usize {
    sets.iter().position(|known| *known == set).unwrap_or_else(|| {
        sets.push(set);
        sets.len() - 1
    })
}
