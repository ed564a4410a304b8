//! `discovery.k8s.io/v1 EndpointSlice`.

use serde::{Deserialize, Serialize};
use smol_str::SmolStr;

use super::{Meta, ObjectKey, null_default, object};

/// Label that names the Service of a slice; slices without it are ignored (R38).
pub const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";

/// An EndpointSlice.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct EndpointSlice {
    /// `metadata`
    #[serde(deserialize_with = "null_default")]
    pub metadata: Meta,
    /// `IPv4`, `IPv6` or `FQDN`
    #[serde(deserialize_with = "null_default")]
    pub address_type: SmolStr,
    /// `endpoints`
    #[serde(deserialize_with = "null_default")]
    pub endpoints: Vec<Endpoint>,
    /// `ports`
    #[serde(deserialize_with = "null_default")]
    pub ports: Vec<EndpointPort>,
}
object!(EndpointSlice, "EndpointSlice", ["discovery.k8s.io/v1"], "endpointslices", namespaced: true);

/// An element of `endpoints`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Endpoint {
    /// All equal in meaning; the first one is used.
    #[serde(deserialize_with = "null_default")]
    pub addresses: Vec<SmolStr>,
    /// `conditions`
    #[serde(deserialize_with = "null_default")]
    pub conditions: EndpointConditions,
    /// Where the pod runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node_name: Option<SmolStr>,
    /// Topology zone of that node.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub zone: Option<SmolStr>,
    /// Topology hints.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hints: Option<Box<EndpointHints>>,
}

/// `conditions`; absent `ready` means ready, absent `serving` follows `ready`, absent `terminating` means no.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct EndpointConditions {
    /// `ready`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ready: Option<bool>,
    /// `serving`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serving: Option<bool>,
    /// `terminating`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub terminating: Option<bool>,
}

/// `hints`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct EndpointHints {
    /// `forZones`
    #[serde(deserialize_with = "null_default", skip_serializing_if = "Vec::is_empty")]
    pub for_zones: Vec<ForName>,
    /// `forNodes`
    #[serde(deserialize_with = "null_default", skip_serializing_if = "Vec::is_empty")]
    pub for_nodes: Vec<ForName>,
}

/// A zone's or node's name.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ForName {
    /// The name.
    #[serde(deserialize_with = "null_default")]
    pub name: SmolStr,
}

/// An element of `ports`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct EndpointPort {
    /// Equals the Service port's name.
    #[serde(skip_serializing_if = "SmolStr::is_empty", deserialize_with = "null_default")]
    pub name: SmolStr,
    /// `TCP` when absent.
    #[serde(skip_serializing_if = "SmolStr::is_empty", deserialize_with = "null_default")]
    pub protocol: SmolStr,
    /// Absent means "all ports", which no Service uses.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
}

impl EndpointSlice {
    /// The Service that this slice belongs to, by its label.
    pub fn service(&self) -> Option<ObjectKey> {
        let name = self.metadata.labels.get(SERVICE_NAME_LABEL)?;
        Some(ObjectKey::new(self.metadata.namespace.clone(), name.clone()))
    }
}
