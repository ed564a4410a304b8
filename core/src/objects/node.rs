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
/// Taint that the cluster autoscaler puts on a node before it deletes it.
const TO_BE_DELETED: &str = "ToBeDeletedByClusterAutoscaler";

impl Node {
    /// Whether load balancers outside should stop sending traffic to the node, by the rule of kube-proxy's `/healthz`: it is
    /// being deleted, or the autoscaler says that it soon will be. A cordoned node (`spec.unschedulable`) goes on serving.
    pub fn is_leaving(&self) -> bool {
        self.metadata.deletion_timestamp.is_some() || self.spec.taints.iter().any(|taint| taint.key == TO_BE_DELETED)
    }
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
