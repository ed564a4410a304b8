//! `v1 Node`.

use serde::{Deserialize, Serialize};
use smol_str::SmolStr;

use super::{Meta, null_default, object};

/// A Node.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Node {
    /// `metadata`
    #[serde(deserialize_with = "null_default")]
    pub metadata: Meta,
    /// `spec`
    #[serde(deserialize_with = "null_default")]
    pub spec: NodeSpec,
    /// `status`
    #[serde(deserialize_with = "null_default")]
    pub status: NodeStatus,
}
object!(Node, "Node", ["v1"], "nodes", namespaced: false);

/// `spec`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct NodeSpec {
    /// Cordoned.
    #[serde(deserialize_with = "null_default")]
    pub unschedulable: bool,
    /// `taints`
    #[serde(skip_serializing_if = "Vec::is_empty", deserialize_with = "null_default")]
    pub taints: Vec<Taint>,
}

/// An element of `spec.taints`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Taint {
    /// `key`
    #[serde(deserialize_with = "null_default")]
    pub key: SmolStr,
    /// `effect`
    #[serde(deserialize_with = "null_default")]
    pub effect: SmolStr,
}

/// `status`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct NodeStatus {
    /// `addresses`
    #[serde(skip_serializing_if = "Vec::is_empty", deserialize_with = "null_default")]
    pub addresses: Vec<NodeAddress>,
}

/// An element of `status.addresses`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct NodeAddress {
    /// `InternalIP`, `ExternalIP`, `Hostname`, …
    #[serde(rename = "type", deserialize_with = "null_default")]
    pub kind: SmolStr,
    /// The address.
    #[serde(deserialize_with = "null_default")]
    pub address: SmolStr,
}
