//! `v1 Service`.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use smol_str::SmolStr;

use super::{Condition, Meta, StringMap, null_default, object, short_list};

/// A Service.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Service {
    /// `metadata`
    #[serde(deserialize_with = "null_default")]
    pub metadata: Meta,
    /// `spec`
    #[serde(deserialize_with = "null_default")]
    pub spec: ServiceSpec,
    /// `status`
    #[serde(deserialize_with = "null_default")]
    pub status: ServiceStatus,
}
object!(Service, "Service", ["v1"], "services", namespaced: true);

/// `spec`. Addresses stay strings until they are used, so that one bad address does not lose the object.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ServiceSpec {
    /// `spec.type`
    #[serde(rename = "type", deserialize_with = "null_default")]
    pub kind: ServiceType,
    /// First of `clusterIPs`, or `None` for headless Services; kept for manifests that have only this one.
    #[serde(rename = "clusterIP", skip_serializing_if = "SmolStr::is_empty", deserialize_with = "null_default")]
    pub cluster_ip: SmolStr,
    /// `spec.clusterIPs`
    #[serde(rename = "clusterIPs", skip_serializing_if = "Vec::is_empty", deserialize_with = "short_list")]
    pub cluster_ips: Vec<SmolStr>,
    /// `spec.externalIPs`
    #[serde(rename = "externalIPs", skip_serializing_if = "Vec::is_empty", deserialize_with = "short_list")]
    pub external_ips: Vec<SmolStr>,
    /// `spec.loadBalancerIP`
    #[serde(rename = "loadBalancerIP", skip_serializing_if = "SmolStr::is_empty", deserialize_with = "null_default")]
    pub load_balancer_ip: SmolStr,
    /// `spec.loadBalancerClass`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub load_balancer_class: Option<SmolStr>,
    /// `spec.loadBalancerSourceRanges`
    #[serde(skip_serializing_if = "Vec::is_empty", deserialize_with = "short_list")]
    pub load_balancer_source_ranges: Vec<SmolStr>,
    /// `spec.ipFamilies`: `IPv4`, `IPv6`
    #[serde(skip_serializing_if = "Vec::is_empty", deserialize_with = "short_list")]
    pub ip_families: Vec<SmolStr>,
    /// `spec.ipFamilyPolicy`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ip_family_policy: Option<SmolStr>,
    /// `spec.ports`
    #[serde(deserialize_with = "short_list")]
    pub ports: Vec<ServicePort>,
    /// `spec.selector`
    #[serde(skip_serializing_if = "StringMap::is_empty", deserialize_with = "null_default")]
    pub selector: StringMap,
    /// `spec.externalTrafficPolicy`
    #[serde(deserialize_with = "null_default")]
    pub external_traffic_policy: TrafficPolicy,
    /// `spec.internalTrafficPolicy`
    #[serde(deserialize_with = "null_default")]
    pub internal_traffic_policy: TrafficPolicy,
    /// `spec.sessionAffinity`
    #[serde(deserialize_with = "null_default")]
    pub session_affinity: Affinity,
    /// `spec.sessionAffinityConfig`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub session_affinity_config: Option<SessionAffinityConfig>,
    /// `spec.healthCheckNodePort`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub health_check_node_port: Option<u16>,
    /// `spec.allocateLoadBalancerNodePorts`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allocate_load_balancer_node_ports: Option<bool>,
    /// `spec.publishNotReadyAddresses`
    #[serde(deserialize_with = "null_default")]
    pub publish_not_ready_addresses: bool,
    /// `spec.trafficDistribution`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub traffic_distribution: Option<SmolStr>,
}

/// `spec.type`; an unknown one is kept apart and treated like ClusterIP without address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum ServiceType {
    /// The default.
    #[default]
    ClusterIP,
    /// Also on every node's addresses.
    NodePort,
    /// Also on addresses from a pool.
    LoadBalancer,
    /// A DNS alias: nothing to program.
    ExternalName,
    /// Not a type that this version knows.
    #[serde(other)]
    Unknown,
}

/// `externalTrafficPolicy`, `internalTrafficPolicy`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum TrafficPolicy {
    /// Only backends of the node that the packet came to.
    Local,
    /// Any backend.
    #[default]
    #[serde(other)]
    Cluster,
}

/// `sessionAffinity`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Affinity {
    /// A client stays with its backend.
    ClientIP,
    /// Each connection is placed anew.
    #[default]
    #[serde(other)]
    None,
}

/// `sessionAffinityConfig`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct SessionAffinityConfig {
    /// `clientIP`
    #[serde(rename = "clientIP")]
    pub client_ip: Option<ClientIpConfig>,
}

/// `sessionAffinityConfig.clientIP`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ClientIpConfig {
    /// Seconds; Kubernetes' default is 10800.
    pub timeout_seconds: Option<u32>,
}

/// An element of `spec.ports`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ServicePort {
    /// Matches the port's name in EndpointSlices; may be empty.
    #[serde(skip_serializing_if = "SmolStr::is_empty", deserialize_with = "null_default")]
    pub name: SmolStr,
    /// `TCP` when absent.
    #[serde(skip_serializing_if = "SmolStr::is_empty", deserialize_with = "null_default")]
    pub protocol: SmolStr,
    /// Where clients connect to.
    #[serde(deserialize_with = "null_default")]
    pub port: u16,
    /// `nodePort`; 0 for none.
    #[serde(skip_serializing_if = "is_zero", deserialize_with = "null_default")]
    pub node_port: u16,
    /// Resolved by the EndpointSlice controller; used here only where no slices exist.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target_port: Option<TargetPort>,
}

fn is_zero(n: &u16) -> bool {
    *n == 0
}

/// A number or a container port's name.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum TargetPort {
    /// The pod's port.
    Number(u16),
    /// The name of a container's port.
    Name(SmolStr),
}

/// `status`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ServiceStatus {
    /// `status.loadBalancer`
    #[serde(deserialize_with = "null_default")]
    pub load_balancer: LoadBalancerStatus,
    /// `status.conditions`
    #[serde(skip_serializing_if = "Vec::is_empty", deserialize_with = "short_list")]
    pub conditions: Vec<Condition>,
}

/// `status.loadBalancer`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct LoadBalancerStatus {
    /// `ingress`
    #[serde(skip_serializing_if = "Vec::is_empty", deserialize_with = "short_list")]
    pub ingress: Vec<IngressEntry>,
}

/// An element of `status.loadBalancer.ingress`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct IngressEntry {
    /// Absent for hostname-only entries.
    #[serde(skip_serializing_if = "SmolStr::is_empty", deserialize_with = "null_default")]
    pub ip: SmolStr,
    /// `VIP` when absent; `Proxy` addresses are not ours to program.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ip_mode: Option<SmolStr>,
    /// Kept so that a foreign entry is recognised.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hostname: Option<SmolStr>,
}

impl Service {
    /// The addresses in `status.loadBalancer.ingress`, unparsable ones left out.
    pub fn ingress_addresses(&self) -> impl Iterator<Item = IpAddr> + '_ {
        self.status.load_balancer.ingress.iter().filter_map(|entry| entry.ip.parse().ok())
    }
}
