//! `coordination.k8s.io/v1 Lease`.

use serde::{Deserialize, Serialize};
use smol_str::SmolStr;

use super::{Meta, null_default, object};

/// A Lease: the cluster-wide duties, or a node's presence.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Lease {
    /// `metadata`; presence carries the node's [`crate::presence::Record`] in an annotation.
    #[serde(deserialize_with = "null_default")]
    pub metadata: Meta,
    /// `spec`
    #[serde(deserialize_with = "null_default")]
    pub spec: LeaseSpec,
}
object!(Lease, "Lease", ["coordination.k8s.io/v1"], "leases", namespaced: true);

/// `spec`. Times are RFC 3339 with microseconds; they are compared for change, never with a clock (clocks differ).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct LeaseSpec {
    /// Empty or absent when nobody holds it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub holder_identity: Option<SmolStr>,
    /// How long after a renewal the holder keeps it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lease_duration_seconds: Option<u32>,
    /// When the holder took it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub acquire_time: Option<SmolStr>,
    /// When the holder last renewed it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub renew_time: Option<SmolStr>,
    /// How often it changed hands.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lease_transitions: Option<u32>,
}
