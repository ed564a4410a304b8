//! Kubernetes objects, cut down to the fields that Kinesin uses.
//!
//! The same types are read from the API server and from manifest files; unknown fields are ignored, every optional field
//! may be absent (R36, R38, R39). Most of the agent's memory is these, so each field here has a user.

mod endpoint_slice;
mod l2_policy;
mod lease;
mod name;
mod node;
mod pod;
mod pool;
mod service;
mod string_map;
#[cfg(test)]
mod tests;

pub use endpoint_slice::{
    Endpoint, EndpointAddress, EndpointConditions, EndpointHints, EndpointPort, EndpointSlice, ForName,
    SERVICE_NAME_LABEL,
};
pub use l2_policy::{L2Policy, L2PolicySpec, L2PolicyStatus};
pub use lease::{Lease, LeaseSpec};
pub use name::Name;
pub use node::{Node, NodeAddress, NodeSpec, NodeStatus, Taint};
pub use pod::{Container, ContainerPort, Pod, PodIp, PodSpec, PodStatus};
pub use pool::{Pool, PoolBlock, PoolSpec, PoolStatus, YesNo};
pub use service::{
    Affinity, ClientIpConfig, IngressEntry, LoadBalancerStatus, Service, ServicePort, ServiceSpec, ServiceStatus,
    ServiceType, SessionAffinityConfig, TargetPort, TrafficPolicy,
};
pub use string_map::StringMap;

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use smol_str::SmolStr;

/// The parts of `metadata` that matter here.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Meta {
    /// `metadata.name`
    #[serde(deserialize_with = "null_default")]
    pub name: SmolStr,
    /// `metadata.namespace`; empty for cluster-scoped objects, also when a manifest carries one.
    #[serde(skip_serializing_if = "SmolStr::is_empty", deserialize_with = "null_default")]
    pub namespace: SmolStr,
    /// `metadata.resourceVersion`
    #[serde(skip_serializing_if = "SmolStr::is_empty", deserialize_with = "null_default")]
    pub resource_version: SmolStr,
    /// `metadata.generation`; 0 when absent.
    #[serde(skip_serializing_if = "is_zero", deserialize_with = "null_default")]
    pub generation: i64,
    /// `metadata.creationTimestamp`, RFC 3339 in UTC, so that lexical order is temporal order; empty when absent.
    #[serde(skip_serializing_if = "SmolStr::is_empty", deserialize_with = "null_default")]
    pub creation_timestamp: SmolStr,
    /// `metadata.deletionTimestamp`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub deletion_timestamp: Option<SmolStr>,
    /// `metadata.labels`
    #[serde(skip_serializing_if = "StringMap::is_empty", deserialize_with = "null_default")]
    pub labels: StringMap,
    /// `metadata.annotations`, without the ones that only tools read.
    #[serde(skip_serializing_if = "StringMap::is_empty", deserialize_with = "null_default")]
    pub annotations: StringMap,
}

fn is_zero(n: &i64) -> bool {
    *n == 0
}

/// Reads `null` as the type's default: Go clients write nil slices and maps that way.
pub fn null_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// [`null_default`] for lists, which are kept without spare room: reading one leaves room for four elements at least.
pub fn short_list<'de, D, T>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Deserialize<'de>,
{
    let mut list: Vec<T> = Option::deserialize(deserializer)?.unwrap_or_default();
    list.shrink_to_fit();
    Ok(list)
}

/// Namespace and name, as a pointer: tables, indexes and plans hold the same key many times.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ObjectKey(Arc<KeyParts>);

/// What an [`ObjectKey`] consists of.
#[derive(PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize)]
pub struct KeyParts {
    /// Empty for cluster-scoped objects.
    pub namespace: SmolStr,
    /// The object's name.
    pub name: SmolStr,
}

impl ObjectKey {
    /// A key from its two parts.
    pub fn new(namespace: impl Into<SmolStr>, name: impl Into<SmolStr>) -> Self {
        Self(Arc::new(KeyParts { namespace: namespace.into(), name: name.into() }))
    }
}

impl Deref for ObjectKey {
    type Target = KeyParts;

    fn deref(&self) -> &KeyParts {
        &self.0
    }
}

impl fmt::Display for ObjectKey {
    /// `namespace/name`, or only the name of a cluster-scoped object.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.namespace.is_empty() {
            return f.write_str(&self.name);
        }
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl fmt::Debug for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What the sources know about every kind.
pub trait Object: Clone + fmt::Debug + PartialEq + Send + Sync + 'static {
    /// As written in manifests.
    const KIND: &'static str;
    /// `apiVersion`s that are read, the preferred one first.
    const API_VERSIONS: &'static [&'static str];
    /// Lower-case plural, as in API paths.
    const PLURAL: &'static str;
    /// Whether objects of this kind live in namespaces.
    const NAMESPACED: bool;

    /// The object's metadata.
    fn meta(&self) -> &Meta;
    /// The object's metadata, to normalise it on arrival.
    fn meta_mut(&mut self) -> &mut Meta;

    /// Identity of the object among its kind.
    fn key(&self) -> ObjectKey {
        let meta = self.meta();
        ObjectKey::new(meta.namespace.clone(), meta.name.clone())
    }
}

macro_rules! object {
    ($t:ty, $kind:literal, [$($api:literal),+], $plural:literal, namespaced: $ns:literal) => {
        impl crate::objects::Object for $t {
            const KIND: &'static str = $kind;
            const API_VERSIONS: &'static [&'static str] = &[$($api),+];
            const PLURAL: &'static str = $plural;
            const NAMESPACED: bool = $ns;
            fn meta(&self) -> &crate::objects::Meta {
                &self.metadata
            }
            fn meta_mut(&mut self) -> &mut crate::objects::Meta {
                &mut self.metadata
            }
        }
    };
}
pub(crate) use object;

/// A standard `metav1.Condition`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", default)]
pub struct Condition {
    /// `True`, `False` or `Unknown` is about this.
    #[serde(rename = "type", deserialize_with = "null_default")]
    pub kind: String,
    /// `True`, `False` or `Unknown`.
    #[serde(deserialize_with = "null_default")]
    pub status: String,
    /// One CamelCase word (or Cilium's snake_case one).
    #[serde(deserialize_with = "null_default")]
    pub reason: String,
    /// For people.
    #[serde(deserialize_with = "null_default")]
    pub message: String,
    /// Generation of the spec that this was computed from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// RFC 3339; set by whoever writes it out, when the status changes.
    #[serde(skip_serializing_if = "String::is_empty", deserialize_with = "null_default")]
    pub last_transition_time: String,
}
