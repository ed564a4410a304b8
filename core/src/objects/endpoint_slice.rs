//! `discovery.k8s.io/v1 EndpointSlice`.

use std::fmt;
use std::net::IpAddr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use smol_str::SmolStr;

use super::{Meta, Name, ObjectKey, null_default, object, short_list};

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
    #[serde(deserialize_with = "short_list")]
    pub endpoints: Vec<Endpoint>,
    /// `ports`
    #[serde(deserialize_with = "short_list")]
    pub ports: Vec<EndpointPort>,
}
object!(EndpointSlice, "EndpointSlice", ["discovery.k8s.io/v1"], "endpointslices", namespaced: true);

/// An element of `endpoints`. Of these there are most of all objects: 56 bytes (a test holds this), and nothing on the heap
/// but hints.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Endpoint {
    /// `addresses`, of which only the first one has a meaning, as the API says.
    #[serde(rename = "addresses", deserialize_with = "null_default")]
    pub address: EndpointAddress,
    /// `conditions`
    #[serde(deserialize_with = "null_default")]
    pub conditions: EndpointConditions,
    /// Where the pod runs; empty when absent.
    #[serde(skip_serializing_if = "str::is_empty", deserialize_with = "null_default")]
    pub node_name: Name,
    /// Topology zone of that node; empty when absent.
    #[serde(skip_serializing_if = "str::is_empty", deserialize_with = "null_default")]
    pub zone: Name,
    /// Topology hints.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hints: Option<Box<EndpointHints>>,
}

/// An endpoint's address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum EndpointAddress {
    /// The list is empty or absent.
    #[default]
    None,
    /// What the IPv4 and IPv6 slices of Kubernetes have.
    Ip(IpAddr),
    /// Anything else: a host's name, or an error to report.
    Text(Box<str>),
}

impl From<&str> for EndpointAddress {
    fn from(text: &str) -> Self {
        text.parse().map_or_else(|_| Self::Text(text.into()), Self::Ip)
    }
}

impl fmt::Display for EndpointAddress {
    /// As it was written; an IPv6 address in its canonical form (RFC 5952); nothing when there is none.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => Ok(()),
            Self::Ip(ip) => ip.fmt(f),
            Self::Text(text) => f.write_str(text),
        }
    }
}

impl Serialize for EndpointAddress {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq((*self != Self::None).then(|| self.to_string()))
    }
}

impl<'de> Deserialize<'de> for EndpointAddress {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let list = Vec::<SmolStr>::deserialize(deserializer)?;
        Ok(list.first().map_or(Self::None, |text| text.as_str().into()))
    }
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
    #[serde(deserialize_with = "short_list", skip_serializing_if = "Vec::is_empty")]
    pub for_zones: Vec<ForName>,
    /// `forNodes`
    #[serde(deserialize_with = "short_list", skip_serializing_if = "Vec::is_empty")]
    pub for_nodes: Vec<ForName>,
}

/// A zone's or node's name.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ForName {
    /// The name.
    #[serde(deserialize_with = "null_default")]
    pub name: Name,
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
    /// Absent means "all ports", which no Service uses. 0 where the number is no port: the API server takes any 32 bits,
    /// and one of them shall not cost the slice.
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "port_number")]
    pub port: Option<u16>,
}

fn port_number<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<u16>, D::Error> {
    let number = Option::<i32>::deserialize(deserializer)?;
    Ok(number.map(|number| u16::try_from(number).unwrap_or(0)))
}

impl EndpointSlice {
    /// The Service that this slice belongs to, by its label.
    pub fn service(&self) -> Option<ObjectKey> {
        let name = self.metadata.labels.get(SERVICE_NAME_LABEL)?;
        Some(ObjectKey::new(self.metadata.namespace.clone(), name.clone()))
    }
}
