//! `cilium.io/v2alpha1 CiliumL2AnnouncementPolicy`.

use serde::{Deserialize, Serialize};
use smol_str::SmolStr;

use super::{Condition, Meta, null_default, object};
use crate::selector::LabelSelector;

/// Which Services' addresses are announced, by which nodes, on which devices.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct L2Policy {
    /// `metadata`; the kind is cluster-scoped.
    #[serde(deserialize_with = "null_default")]
    pub metadata: Meta,
    /// `spec`
    #[serde(deserialize_with = "null_default")]
    pub spec: L2PolicySpec,
    /// `status`
    #[serde(deserialize_with = "null_default")]
    pub status: L2PolicyStatus,
}
object!(
    L2Policy,
    "CiliumL2AnnouncementPolicy",
    ["cilium.io/v2alpha1"],
    "ciliuml2announcementpolicies",
    namespaced: false
);

/// `spec`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", default)]
pub struct L2PolicySpec {
    /// Services by label; absent selects all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub service_selector: Option<LabelSelector>,
    /// Nodes by label; absent selects all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node_selector: Option<LabelSelector>,
    /// Unanchored regular expressions for device names; none selects all devices.
    #[serde(deserialize_with = "null_default", skip_serializing_if = "Vec::is_empty")]
    #[cfg_attr(feature = "schema", schemars(with = "Vec<String>"))]
    pub interfaces: Vec<SmolStr>,
    /// Announce `spec.externalIPs`.
    #[serde(rename = "externalIPs", deserialize_with = "null_default")]
    pub external_ips: bool,
    /// Announce `status.loadBalancer.ingress[].ip`.
    #[serde(rename = "loadBalancerIPs", deserialize_with = "null_default")]
    pub load_balancer_ips: bool,
}

/// `status`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct L2PolicyStatus {
    /// Errors in the spec.
    #[serde(deserialize_with = "null_default", skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
}
