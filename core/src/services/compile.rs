//! The rules by which a Service becomes frontends and backend sets.

use std::collections::{BTreeMap, HashSet};
use std::net::IpAddr;

use kinesin_abi::{FrontendKind, frontend_flags as flags, proto};
use smol_str::SmolStr;

use super::endpoints::{self, PortRef};
use super::problems::Problems;
use super::{
    BackendRef, BackendSet, Compiled, Forwarding, Frontend, SURROGATES, SourceRanges, exposure, forwarding, health,
    ranges, topology,
};
use crate::maglev::protocol_name;
use crate::objects::{Affinity, EndpointSlice, Service, ServiceType, StringMap, TrafficPolicy};

/// Services with it (any value) have no virtual address.
const HEADLESS_LABEL: &str = "service.kubernetes.io/headless";
/// Names the proxy that handles a Service.
const PROXY_NAME_LABEL: &str = "service.kubernetes.io/service-proxy-name";
/// `loadBalancerClass`es whose unused ports are dropped; so are those of Services without class (see `default_lb_ipam`).
const OUR_CLASSES: [&str; 2] = ["io.cilium/bgp-control-plane", "io.cilium/l2-announcer"];
/// Kubernetes' default of `sessionAffinityConfig.clientIP.timeoutSeconds`, seconds.
const DEFAULT_AFFINITY: u32 = 10_800;
/// Its maximum: a day, seconds.
const MAX_AFFINITY: u32 = 86_400;

/// How frontends that are reachable from outside choose a backend (`bpf-lb-algorithm`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Algorithm {
    /// Any backend, each time anew.
    #[default]
    Random,
    /// By a table that is the same on every node.
    Maglev,
}

/// What compiling has to know about the node that it is done for.
#[derive(Clone, Debug, PartialEq)]
pub struct NodeContext {
    /// The Node's name; an endpoint with this `nodeName` is local.
    pub name: SmolStr,
    /// The Node's `topology.kubernetes.io/zone`; for topology hints.
    pub zone: SmolStr,
    /// The Node's labels; for the node-exposure annotations.
    pub labels: StringMap,
    /// Addresses of this node on which NodePorts are served.
    pub node_port_addresses: Vec<IpAddr>,
    /// `enable-ipv4`
    pub ipv4: bool,
    /// `enable-ipv6`
    pub ipv6: bool,
    /// `bpf-lb-algorithm`
    pub algorithm: Algorithm,
    /// `bpf-lb-mode` and `bpf-lb-dsr-dispatch`
    pub forwarding: Forwarding,
    /// `bpf-lb-mode-annotation`: what the annotation's `dsr` means; `None` while annotations do not count.
    pub dsr_by_annotation: Option<Forwarding>,
    /// `bpf-lb-algorithm-annotation`
    pub algorithm_by_annotation: bool,
    /// `k8s-service-proxy-name`; empty means Services without that label.
    pub proxy_name: SmolStr,
    /// `default-lb-service-ipam` is `lbipam`: Services without `loadBalancerClass` are ours, and get wildcards.
    pub default_lb_ipam: bool,
    /// `bpf-lb-external-clusterip`: ClusterIPs may be reached from outside.
    pub external_cluster_ip: bool,
    /// `enable-service-topology`: hints of EndpointSlices are used by the Services that ask for it.
    pub service_topology: bool,
    /// `bpf-lb-enable-wildcard-entries`: what comes to other ports of a service's address is dropped.
    pub wildcards: bool,
    /// `kube-proxy-replacement`: NodePorts, host ports and health-check node ports are ours to serve.
    pub kube_proxy_replacement: bool,
    /// `enable-health-check-nodeport`
    pub health_check_node_ports: bool,
    /// `enable-health-check-loadbalancer-ip`: health checks are answered at the load balancer's addresses too.
    pub health_check_on_load_balancer: bool,
    /// `bpf-lb-source-range-all-types`: source ranges restrict all frontends of a Service, not only its load balancer's
    /// addresses.
    pub source_range_all_types: bool,
    /// `enable-sctp`: SCTP ports are served, by their own numbers only.
    pub sctp: bool,
}

impl Default for NodeContext {
    /// The configuration's defaults with `kube-proxy-replacement=true`, on a node without name and addresses.
    fn default() -> Self {
        Self {
            name: SmolStr::default(),
            zone: SmolStr::default(),
            labels: StringMap::new(),
            node_port_addresses: Vec::new(),
            ipv4: true,
            ipv6: true,
            algorithm: Algorithm::Random,
            forwarding: Forwarding::default(),
            dsr_by_annotation: None,
            algorithm_by_annotation: false,
            proxy_name: SmolStr::default(),
            default_lb_ipam: true,
            external_cluster_ip: false,
            service_topology: false,
            wildcards: true,
            kube_proxy_replacement: true,
            health_check_node_ports: true,
            health_check_on_load_balancer: false,
            source_range_all_types: false,
            sctp: true,
        }
    }
}

/// What `service` means on this node, given all of its slices (in any order).
///
/// Nothing comes out of headless and ExternalName Services, of those that name another proxy, and of those whose
/// annotations `service.cilium.io/node-selector` or `/node` leave this node out; `service.cilium.io/type` leaves one kind
/// of frontend, and external IPs; `service.cilium.io/forwarding-mode` and `/lb-algorithm` count where the configuration
/// says so. Otherwise, for each port:
///
/// | Frontend | Addresses | Backends from outside | Backends from the cluster |
/// |---|---|---|---|
/// | ClusterIP | `spec.clusterIPs` | by `internalTrafficPolicy` (and dropped unless routable) | by `internalTrafficPolicy` |
/// | LoadBalancer | `status.loadBalancer.ingress[].ip` with `ipMode` VIP or none | by `externalTrafficPolicy` | all |
/// | ExternalIPs | `spec.externalIPs`, any type | by `externalTrafficPolicy` | all |
/// | NodePort, with `kube_proxy_replacement` | `node_port_addresses`, and `0.0.0.0` and `::` for local sockets | by `externalTrafficPolicy` | all |
///
/// `Local` keeps the endpoints whose `nodeName` is this node's or absent. It does not restrict clients inside the cluster
/// that use an outside address, as in Kubernetes. A frontend has backends of its own family only. Frontends without usable
/// backends stay: connections to them are refused, not forwarded.
///
/// Each ClusterIP and LoadBalancer address also gets one wildcard frontend (port 0, protocol 0) when the Service's class
/// is ours (unless `wildcards` is off): it drops what comes to other ports of the address.
///
/// With `service_topology`, a Service with `spec.trafficDistribution` or topology annotation uses only the backends that
/// are hinted for this zone or node, where every one has such a hint and one is ours; `Local` policies come first.
///
/// SCTP ports are not rewritten: their frontends have the backends that listen on the frontend's own port number.
///
/// `spec.loadBalancerSourceRanges` restrict clients outside the cluster at LoadBalancer addresses
/// ([`Compiled::source_ranges`]). A list without any network serves nobody outside.
///
/// When one address and port has several reasons to exist in this Service, the first of the table wins. Nothing here
/// panics; what cannot be used is left out and named in [`Compiled::problems`]. The result depends on the objects'
/// content only, not on the order of slices, so equal results mean that nothing has to be written.
pub fn compile<'a>(service: &Service, slices: impl Iterator<Item = &'a EndpointSlice>, node: &NodeContext) -> Compiled {
    if !is_ours(service, node) {
        return Compiled::default();
    }
    let mut problems = Problems::default();
    if !exposure::on_this_node(service, node, &mut problems) {
        return Compiled { problems: problems.finish(), ..Compiled::default() };
    }
    let slices: Vec<&EndpointSlice> = slices.collect();
    let ranges = ranges::source_ranges(service, &mut problems);
    let forwarding = forwarding::of(service, node, &mut problems);
    let algorithm = forwarding::algorithm(service, node, &mut problems);
    let (out, sets) = (BTreeMap::new(), Vec::new());
    let mut builder = Builder { service, node, out, sets, affinity: 0, ranges, forwarding, algorithm, problems };
    builder.affinity = builder.affinity_timeout();
    let mut health = health::Tally::of(service, node);
    let prefer = topology::preference(service, node, &mut builder.problems);
    let mut addresses = builder.addresses();
    if let Some(only) = exposure::only_kind(service, &mut builder.problems) {
        addresses.retain(|(_, kind)| *kind == only || *kind == FrontendKind::ExternalIps);
    }
    for (index, port) in service.spec.ports.iter().enumerate() {
        let Some(proto) = endpoints::protocol(&port.protocol) else {
            builder.problems.note(format!(
                "spec.ports[{index}].protocol: \"{}\" is not supported; use TCP, UDP or SCTP",
                port.protocol
            ));
            continue;
        };
        if port.port == 0 {
            builder.problems.note(format!("spec.ports[{index}].port: is missing or 0; use 1 to 65535"));
            continue;
        }
        let port_ref = PortRef { name: &port.name, proto };
        let (all, hints) = endpoints::gather(&port_ref, &slices, node, &mut builder.problems);
        if let Some(health) = &mut health {
            health.count(&all);
        }
        if proto == proto::SCTP {
            builder.sctp((index, port), &addresses, (&all, &hints), prefer);
            continue;
        }
        let near = [false, true].map(|v4| topology::near(&all, &hints, prefer, v4));
        let mut sets = PortSets { all: &all, near, known: [None; 4] };
        for &(addr, kind) in &addresses {
            let number = if kind == FrontendKind::NodePort { port.node_port } else { port.port };
            if number != 0 {
                builder.add(addr, number, proto, kind, &port.name, &mut sets);
            }
        }
    }
    if let Some(health) = &health {
        builder.health_frontends(&addresses, health.port());
    }
    builder.wildcards(&addresses);
    let applies = builder.out.values().any(|frontend| frontend.flags & flags::SOURCE_RANGES != 0);
    builder.sets.shrink_to_fit();
    Compiled {
        frontends: builder.out.into_values().collect(),
        sets: builder.sets,
        source_ranges: builder.ranges.filter(|_| applies),
        health_check: health.map(health::Tally::finish),
        problems: builder.problems.finish(),
    }
}

/// Whether this proxy programs the Service at all.
fn is_ours(service: &Service, node: &NodeContext) -> bool {
    let labels = &service.metadata.labels;
    let proxy = labels.get(PROXY_NAME_LABEL);
    let proxy_is_us = match proxy {
        None => node.proxy_name.is_empty(),
        Some(name) => *name == node.proxy_name && !name.is_empty(),
    };
    let headless = labels.contains_key(HEADLESS_LABEL)
        || service.spec.cluster_ip == "None"
        || service.spec.cluster_ips.iter().any(|ip| ip == "None");
    proxy_is_us && !headless && service.spec.kind != ServiceType::ExternalName
}

/// A Service on its way to being [`Compiled`].
pub(super) struct Builder<'a> {
    service: &'a Service,
    pub(super) node: &'a NodeContext,
    pub(super) out: BTreeMap<(IpAddr, u16, u8), Frontend>,
    pub(super) sets: Vec<BackendSet>,
    affinity: u32,
    ranges: Option<SourceRanges>,
    forwarding: Forwarding,
    algorithm: Algorithm,
    pub(super) problems: Problems,
}

/// The sets of one port, each made when the first frontend needs it.
pub(super) struct PortSets<'a> {
    pub(super) all: &'a [BackendRef],
    /// By family, IPv6 first: the only ones to be used, where hints say so.
    pub(super) near: [Option<HashSet<(IpAddr, u16)>>; 2],
    /// By family and policy.
    pub(super) known: [Option<usize>; 4],
}

impl Builder<'_> {
    /// Seconds; 0 without session affinity.
    fn affinity_timeout(&mut self) -> u32 {
        let spec = &self.service.spec;
        if spec.session_affinity != Affinity::ClientIP {
            return 0;
        }
        let asked = spec.session_affinity_config.as_ref().and_then(|config| config.client_ip.as_ref()?.timeout_seconds);
        match asked {
            None => DEFAULT_AFFINITY,
            Some(seconds @ 1..=MAX_AFFINITY) => seconds,
            Some(seconds) => {
                let used = if seconds == 0 { DEFAULT_AFFINITY } else { MAX_AFFINITY };
                self.problems.note(format!(
                    "spec.sessionAffinityConfig.clientIP.timeoutSeconds: {seconds} is out of range, {used} is used; use 1 to {MAX_AFFINITY}"
                ));
                used
            }
        }
    }

    /// Every address that the Service's ports are reachable at, in the order of the table above.
    fn addresses(&mut self) -> Vec<(IpAddr, FrontendKind)> {
        let spec = &self.service.spec;
        let mut found: Vec<(IpAddr, FrontendKind)> = Vec::new();
        match spec.kind {
            ServiceType::Unknown => self.problems.note(
                "spec.type: is not a type that this version knows; use ClusterIP, NodePort, LoadBalancer or ExternalName"
                    .to_owned(),
            ),
            _ if spec.cluster_ips.is_empty() => {
                self.frontend_address("spec.clusterIP", &spec.cluster_ip, FrontendKind::ClusterIp, &mut found);
            }
            _ => {
                for ip in &spec.cluster_ips {
                    self.frontend_address("spec.clusterIPs", ip, FrontendKind::ClusterIp, &mut found);
                }
            }
        }
        if spec.kind == ServiceType::LoadBalancer {
            for entry in &self.service.status.load_balancer.ingress {
                if entry.ip_mode.as_ref().is_none_or(|mode| mode == "VIP" || mode.is_empty()) {
                    let field = "status.loadBalancer.ingress[].ip";
                    self.frontend_address(field, &entry.ip, FrontendKind::LoadBalancer, &mut found);
                }
            }
        }
        for ip in &spec.external_ips {
            self.frontend_address("spec.externalIPs", ip, FrontendKind::ExternalIps, &mut found);
        }
        if self.node.kube_proxy_replacement && matches!(spec.kind, ServiceType::NodePort | ServiceType::LoadBalancer) {
            let families = self.node_port_families(&found);
            let own = self.node.node_port_addresses.iter().map(IpAddr::to_canonical);
            for addr in own.filter(|addr| !addr.is_unspecified()).chain(SURROGATES) {
                if families(addr) && self.enabled(addr) {
                    found.push((addr, FrontendKind::NodePort));
                }
            }
        }
        found
    }

    /// Which families a NodePort is served in: those of `spec.ipFamilies`, else those of the ClusterIPs, else all.
    fn node_port_families(&self, found: &[(IpAddr, FrontendKind)]) -> impl Fn(IpAddr) -> bool + use<> {
        let families = &self.service.spec.ip_families;
        let (mut v4, mut v6) =
            (families.iter().any(|family| family == "IPv4"), families.iter().any(|family| family == "IPv6"));
        if !v4 && !v6 {
            let cluster = || found.iter().filter(|(_, kind)| *kind == FrontendKind::ClusterIp);
            v4 = cluster().any(|(addr, _)| addr.is_ipv4());
            v6 = cluster().any(|(addr, _)| addr.is_ipv6());
        }
        let all = !v4 && !v6;
        move |addr| all || if addr.is_ipv4() { v4 } else { v6 }
    }

    fn enabled(&self, addr: IpAddr) -> bool {
        if addr.is_ipv4() { self.node.ipv4 } else { self.node.ipv6 }
    }

    /// Adds the address in `text`. Empty ones are not allocated yet; those of a disabled family are for other nodes.
    fn frontend_address(
        &mut self,
        field: &str,
        text: &str,
        kind: FrontendKind,
        found: &mut Vec<(IpAddr, FrontendKind)>,
    ) {
        if text.is_empty() {
            return;
        }
        let Ok(addr) = text.parse::<IpAddr>() else {
            self.problems.note(format!("{field}: \"{text}\" is not an IP address; correct or remove it"));
            return;
        };
        let addr = addr.to_canonical();
        // `0.0.0.0` and `::` mean "any local address" to the programs, and loopback is not a service's to take.
        if addr.is_unspecified() || addr.is_loopback() || addr.is_multicast() || addr == IpAddr::from([255; 4]) {
            self.problems.note(format!("{field}: {addr} cannot be a service's address; use a unicast address"));
            return;
        }
        if self.enabled(addr) {
            found.push((addr, kind));
        }
    }

    /// Adds one frontend, unless the Service already has one with this address, port and protocol.
    pub(super) fn add(
        &mut self,
        addr: IpAddr,
        number: u16,
        proto: u8,
        kind: FrontendKind,
        port_name: &SmolStr,
        sets: &mut PortSets<'_>,
    ) {
        if let Some(first) = self.out.get(&(addr, number, proto)) {
            if first.port_name != *port_name {
                self.problems.note(format!(
                    "spec.ports: \"{port_name}\" and \"{}\" are both {}/{}, the latter is used; give each its own port",
                    first.port_name,
                    super::address_text(addr, number),
                    protocol_name(proto)
                ));
            }
            return;
        }
        let spec = &self.service.spec;
        let cluster_ip = kind == FrontendKind::ClusterIp;
        let routable = !cluster_ip || self.node.external_cluster_ip;
        let external_local = !cluster_ip && spec.external_traffic_policy == TrafficPolicy::Local;
        let internal_local = cluster_ip && spec.internal_traffic_policy == TrafficPolicy::Local;

        let mut bits = 0;
        let mut set_if = |condition: bool, flag: u32| bits |= if condition { flag } else { 0 };
        set_if(routable, flags::ROUTABLE);
        set_if(external_local, flags::EXTERNAL_LOCAL);
        set_if(internal_local, flags::INTERNAL_LOCAL);
        set_if(self.affinity > 0, flags::AFFINITY);
        let restricted = kind == FrontendKind::LoadBalancer || self.node.source_range_all_types;
        let ranges = self.ranges.as_ref().filter(|_| restricted);
        set_if(ranges.is_some(), flags::SOURCE_RANGES);
        set_if(ranges.is_some_and(|ranges| ranges.deny), flags::SOURCE_RANGES_DENY);
        // Only sockets meet the surrogate addresses, and they choose at random.
        let tabled = self.algorithm == Algorithm::Maglev && routable && !addr.is_unspecified();
        set_if(tabled, flags::MAGLEV);
        // Nothing leaves the node for backends that are all on it.
        let leaves = routable && !addr.is_unspecified() && !external_local;
        set_if(leaves, self.forwarding.of(proto).flag());

        let internal = self.set(sets, addr.is_ipv4(), internal_local);
        let external = if external_local { self.set(sets, addr.is_ipv4(), true) } else { internal };
        let frontend = Frontend {
            addr,
            port: number,
            proto,
            kind,
            port_name: port_name.clone(),
            flags: bits,
            affinity: self.affinity,
            external: Some(external),
            internal: Some(internal),
        };
        self.out.insert((addr, number, proto), frontend);
    }

    /// Index of the port's backends in one family, all of them or only the local ones.
    fn set(&mut self, port: &mut PortSets<'_>, v4: bool, local: bool) -> usize {
        let known = &mut port.known[usize::from(v4) * 2 + usize::from(local)];
        if let Some(index) = *known {
            return index;
        }
        let near = port.near[usize::from(v4)].as_ref();
        let set = endpoints::select(port.all, |backend| {
            backend.addr.is_ipv4() == v4
                && if local {
                    backend.counts_as_local()
                } else {
                    near.is_none_or(|near| near.contains(&(backend.addr, backend.port)))
                }
        });
        let index = super::intern(&mut self.sets, set);
        *known = Some(index);
        index
    }

    fn wildcards(&mut self, addresses: &[(IpAddr, FrontendKind)]) {
        let ours = match &self.service.spec.load_balancer_class {
            None => self.node.default_lb_ipam,
            Some(class) => OUR_CLASSES.contains(&class.as_str()),
        };
        // Without any usable port the address is not served, so it is not claimed either.
        if !self.node.wildcards || !ours || self.out.is_empty() {
            return;
        }
        for &(addr, kind) in addresses {
            if !matches!(kind, FrontendKind::ClusterIp | FrontendKind::LoadBalancer) {
                continue;
            }
            self.out.entry((addr, 0, proto::ANY)).or_insert_with(|| Frontend {
                addr,
                port: 0,
                proto: proto::ANY,
                kind,
                port_name: SmolStr::default(),
                flags: flags::WILDCARD,
                affinity: 0,
                external: None,
                internal: None,
            });
        }
    }
}
