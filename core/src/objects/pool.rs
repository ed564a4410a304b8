//! `cilium.io CiliumLoadBalancerIPPool`.

use serde::{Deserialize, Serialize};
use smol_str::SmolStr;

use super::{Condition, Meta, null_default, object};
use crate::selector::LabelSelector;

/// A pool of addresses for LoadBalancer Services.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Pool {
    /// `metadata`; the kind is cluster-scoped.
    #[serde(deserialize_with = "null_default")]
    pub metadata: Meta,
    /// `spec`
    #[serde(deserialize_with = "null_default")]
    pub spec: PoolSpec,
    /// `status`
    #[serde(deserialize_with = "null_default")]
    pub status: PoolStatus,
}
object!(
    Pool,
    "CiliumLoadBalancerIPPool",
    ["cilium.io/v2", "cilium.io/v2alpha1"],
    "ciliumloadbalancerippools",
    namespaced: false
);

/// `spec`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", default)]
pub struct PoolSpec {
    /// Ranges of addresses.
    #[serde(deserialize_with = "null_default", skip_serializing_if = "Vec::is_empty")]
    pub blocks: Vec<PoolBlock>,
    /// Services that may take addresses; absent selects all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub service_selector: Option<LabelSelector>,
    /// Whether the first and last address of each CIDR may be handed out; absent means `Yes`.
    #[serde(rename = "allowFirstLastIPs", skip_serializing_if = "Option::is_none")]
    pub allow_first_last_ips: Option<YesNo>,
    /// No new allocations; existing ones stay.
    #[serde(deserialize_with = "null_default")]
    pub disabled: bool,
}

/// A CIDR, or a first and last address.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct PoolBlock {
    /// A prefix; wins over `start` and `stop`.
    #[serde(skip_serializing_if = "SmolStr::is_empty", deserialize_with = "null_default")]
    #[cfg_attr(feature = "schema", schemars(with = "String"))]
    pub cidr: SmolStr,
    /// First address, inclusive.
    #[serde(skip_serializing_if = "SmolStr::is_empty", deserialize_with = "null_default")]
    #[cfg_attr(feature = "schema", schemars(with = "String"))]
    pub start: SmolStr,
    /// Last address, inclusive; absent means only `start`.
    #[serde(skip_serializing_if = "SmolStr::is_empty", deserialize_with = "null_default")]
    #[cfg_attr(feature = "schema", schemars(with = "String"))]
    pub stop: SmolStr,
}

/// A string that reads like a boolean.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub enum YesNo {
    /// `Yes`
    Yes,
    /// `No`
    No,
}

/// `status`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct PoolStatus {
    /// Counters and conflicts.
    #[serde(deserialize_with = "null_default", skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
}
