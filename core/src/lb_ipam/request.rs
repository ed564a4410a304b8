//! What a Service asks for: the addresses or families it wants, and with whom it shares.

use std::collections::BTreeSet;
use std::net::IpAddr;

use smol_str::SmolStr;

use super::Config;
use super::range::parse_ip;
use crate::objects::{Object, ObjectKey, Service, ServiceType, StringMap, TrafficPolicy};

/// `lbipam.cilium.io/ips` and the older name of it.
const IPS: [&str; 2] = ["lbipam.cilium.io/ips", "io.cilium/lb-ipam-ips"];
/// `lbipam.cilium.io/sharing-key` and the older name of it.
const SHARING_KEY: [&str; 2] = ["lbipam.cilium.io/sharing-key", "io.cilium/lb-ipam-sharing-key"];
/// `lbipam.cilium.io/sharing-cross-namespace` and the older name of it.
const CROSS_NAMESPACE: [&str; 2] =
    ["lbipam.cilium.io/sharing-cross-namespace", "io.cilium/lb-ipam-sharing-cross-namespace"];

fn annotation<'a>(annotations: &'a StringMap, names: [&str; 2]) -> Option<&'a str> {
    names.iter().find_map(|name| annotations.get(name)).map(SmolStr::as_str)
}

/// A Service's wishes, read once per change of the Service.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Request {
    pub(crate) key: ObjectKey,
    /// LoadBalancer of a class that is allocated here.
    pub(crate) handled: bool,
    /// Exactly these addresses; empty asks for one of each family below.
    pub(crate) addresses: Vec<IpAddr>,
    /// Whether IPv4, and whether IPv6, in the order of `spec.ipFamilies`; `true` is IPv6.
    pub(crate) families: Vec<bool>,
    pub(crate) sharing_key: Option<SmolStr>,
    cross_namespaces: BTreeSet<SmolStr>,
    ports: BTreeSet<(u16, SmolStr)>,
    local: bool,
    selector: StringMap,
    /// What could not be read.
    pub(crate) problems: Vec<String>,
}

impl Request {
    pub(crate) fn read(service: &Service, config: &Config) -> Self {
        let spec = &service.spec;
        let annotations = &service.metadata.annotations;
        let handled = spec.kind == ServiceType::LoadBalancer && config.handles(spec.load_balancer_class.as_deref());
        let mut request = Self { key: service.key(), handled, ..Self::default() };
        if !handled {
            return request;
        }
        request.read_addresses(&spec.load_balancer_ip, annotations);
        request.families = families(service, config);
        request.sharing_key = annotation(annotations, SHARING_KEY).filter(|key| !key.is_empty()).map(SmolStr::from);
        let namespaces = annotation(annotations, CROSS_NAMESPACE).unwrap_or_default();
        request.cross_namespaces =
            namespaces.split(',').map(str::trim).filter(|ns| !ns.is_empty()).map(SmolStr::from).collect();
        let protocol = |name: &SmolStr| if name.is_empty() { SmolStr::new_static("TCP") } else { name.clone() };
        request.ports = spec.ports.iter().map(|port| (port.port, protocol(&port.protocol))).collect();
        request.local = spec.external_traffic_policy == TrafficPolicy::Local;
        request.selector = spec.selector.clone();
        request
    }

    fn read_addresses(&mut self, load_balancer_ip: &str, annotations: &StringMap) {
        let listed = annotation(annotations, IPS).unwrap_or_default();
        let all = std::iter::once(("spec.loadBalancerIP", load_balancer_ip))
            .chain(listed.split(',').map(|text| (IPS[0], text)))
            .filter(|(_, text)| !text.trim().is_empty());
        for (field, text) in all {
            match parse_ip(text) {
                Some(ip) if self.addresses.contains(&ip) => {}
                Some(ip) => self.addresses.push(ip),
                None => {
                    self.problems.push(format!("{field}: \"{}\" is not an IP address; it is left out", text.trim()))
                }
            }
        }
    }

    /// Whether an address that the Service has, or had, is still one that it asks for.
    pub(crate) fn wants(&self, ip: IpAddr) -> bool {
        match self.addresses.is_empty() {
            true => self.families.contains(&ip.is_ipv6()),
            false => self.addresses.contains(&ip),
        }
    }

    /// Why the two may not have the same address. Symmetric.
    pub(crate) fn conflict_with(&self, other: &Self) -> Option<&'static str> {
        let permits =
            |a: &Self, b: &Self| a.cross_namespaces.contains("*") || a.cross_namespaces.contains(&b.key.namespace);
        if self.sharing_key.is_none() || self.sharing_key != other.sharing_key {
            return Some("different sharing key");
        }
        if self.key.namespace != other.key.namespace && !(permits(self, other) && permits(other, self)) {
            return Some("different namespace, and not both permit sharing with the other's");
        }
        if !self.ports.is_disjoint(&other.ports) {
            return Some("same port and protocol");
        }
        if self.local != other.local {
            return Some("different ExternalTrafficPolicy");
        }
        if self.local && (self.selector.is_empty() || self.selector != other.selector) {
            return Some("same ExternalTrafficPolicy Local, but selecting different pods");
        }
        None
    }
}

/// Families of a request without addresses, by `spec.ipFamilyPolicy` and what the cluster has.
fn families(service: &Service, config: &Config) -> Vec<bool> {
    let enabled = |v6: &bool| if *v6 { config.ipv6 } else { config.ipv4 };
    let all = || [false, true].into_iter().filter(enabled).collect::<Vec<_>>();
    let mut listed: Vec<bool> = Vec::new();
    for family in &service.spec.ip_families {
        let v6 = match family.as_str() {
            "IPv4" => false,
            "IPv6" => true,
            _ => continue,
        };
        if !listed.contains(&v6) {
            listed.push(v6);
        }
    }
    match service.spec.ip_family_policy.as_deref() {
        Some("RequireDualStack") => all(),
        Some("PreferDualStack") if listed.is_empty() => all(),
        Some("PreferDualStack") => listed.into_iter().filter(enabled).collect(),
        _ => match listed.first() {
            Some(&first) => vec![first],
            None => all().into_iter().take(1).collect(),
        },
    }
}
