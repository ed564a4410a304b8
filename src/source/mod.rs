//! Where objects come from and where status goes: the Kubernetes API, or a directory of manifests.
//!
//! Both sources deliver the same types through the same trait, so that nothing above them can tell which one runs.
//! Deliberately absent: any decision about the objects, any cache that consumers could read (each keeps what it needs), and
//! any panic: bad input becomes [`Event::Problem`], the objects around it are delivered.

pub mod crds;
mod event;
pub mod kubernetes;
pub mod manifests;
mod status;

use std::net::IpAddr;

use futures::future::BoxFuture;
use futures::{StreamExt, future};
use kinesin_core::objects::{Condition, EndpointSlice, L2Policy, Lease, Node, Object, ObjectKey, Pod, Pool, Service};
use serde::Serialize;

pub use event::{Event, Events};
pub use kubernetes::{ConnectError, KubernetesOptions, KubernetesSource};
pub use manifests::{ManifestsSource, OpenError};

/// Type of the only condition that Kinesin writes on Services, the one that LB-IPAM users know from Cilium.
pub use kinesin_core::lb_ipam::CONDITION_SATISFIED as IPAM_CONDITION;

/// Label on every Lease that Kinesin writes, with the value [`LEASE_LABEL_VALUE`]; [`Source::leases`] delivers only these.
pub const LEASE_LABEL: &str = "app.kubernetes.io/managed-by";
/// Value of [`LEASE_LABEL`].
pub const LEASE_LABEL_VALUE: &str = "kinesin";

/// A source of objects. Streams are independent of each other and of `&self`: each begins with a complete list, goes on with
/// changes, and recovers by itself.
///
/// Writes are idempotent and never wait for the streams. An object that is gone is [`WriteError::NotFound`], which callers
/// treat as done.
pub trait Source: Send + Sync + 'static {
    /// `kubernetes` or `manifests`.
    fn name(&self) -> &'static str;

    /// All Services of the cluster.
    fn services(&self) -> Events<Service>;
    /// All EndpointSlices of the cluster.
    fn endpoint_slices(&self) -> Events<EndpointSlice>;
    /// The Pods of one node that have host ports; others are read, but not delivered.
    fn pods(&self, node: &str) -> Events<Pod>;
    /// All Nodes.
    fn nodes(&self) -> Events<Node>;
    /// All pools.
    fn pools(&self) -> Events<Pool>;
    /// All L2 announcement policies.
    fn l2_policies(&self) -> Events<L2Policy>;
    /// Kinesin's own Leases: those labelled [`LEASE_LABEL`] in the agents' namespace.
    fn leases(&self) -> Events<Lease>;

    /// Sets a Service's `status.loadBalancer.ingress` to exactly these addresses and its [`IPAM_CONDITION`] to `condition`
    /// (`None` removes it). Conditions of other types stay. `lastTransitionTime` is set here.
    fn write_service_status<'a>(
        &'a self,
        key: &'a ObjectKey,
        ingress: &'a [IpAddr],
        condition: Option<&'a Condition>,
    ) -> BoxFuture<'a, Result<(), WriteError>>;

    /// Sets conditions of a pool by their type; other types stay.
    fn write_pool_status<'a>(
        &'a self,
        name: &'a str,
        conditions: &'a [Condition],
    ) -> BoxFuture<'a, Result<(), WriteError>>;

    /// Sets conditions of an L2 policy by their type; other types stay.
    fn write_policy_status<'a>(
        &'a self,
        name: &'a str,
        conditions: &'a [Condition],
    ) -> BoxFuture<'a, Result<(), WriteError>>;

    /// Reads a Lease of the agents' namespace, past every cache.
    fn get_lease<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Option<Lease>, WriteError>>;

    /// Writes a Lease if it still is what `metadata.resourceVersion` says; an empty one means "does not exist yet".
    /// Returns it as stored, with its new version. The namespace and [`LEASE_LABEL`] are filled in.
    ///
    /// # Errors
    /// [`WriteError::Conflict`] when somebody else wrote, created or deleted it meanwhile.
    fn put_lease<'a>(&'a self, lease: &'a Lease) -> BoxFuture<'a, Result<Lease, WriteError>>;

    /// Deletes a Lease. [`WriteError::NotFound`] when there is none.
    fn delete_lease<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<(), WriteError>>;

    /// Makes the kinds that are Kinesin's to define known to the cluster; for the elected agent only.
    fn register_kinds(&self) -> BoxFuture<'_, Result<(), crds::RegisterError>> {
        Box::pin(std::future::ready(Ok(())))
    }

    /// Changes `k8s-client-qps` and `k8s-client-burst`, where there is a client.
    fn set_rate_limit(&self, _qps: f64, _burst: u32) {}

    /// How the source is doing, for status and metrics.
    fn health(&self) -> SourceHealth;
}

/// Leaves of a stream the Pods of one node that have host ports, without what nobody reads.
fn with_host_ports(events: Events<Pod>, node: &str) -> Events<Pod> {
    let node = node.to_owned();
    let ours = move |pod: &Pod| pod.spec.node_name == node && pod.has_host_ports();
    let slim = |mut pod: Pod| {
        pod.slim();
        pod
    };
    let kept = move |event| {
        future::ready(match event {
            Event::InitApply(pod) => ours(&pod).then(|| Event::InitApply(slim(pod))),
            Event::Apply(pod) if ours(&pod) => Some(Event::Apply(slim(pod))),
            // It may have been ours in an earlier version, of a manifest at least.
            Event::Apply(pod) => Some(Event::Delete(pod.key())),
            other => Some(other),
        })
    };
    events.filter_map(kept).boxed()
}

/// Why a write (or a direct read) did not happen.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WriteError {
    /// The object is gone; nothing is left to do.
    #[error("{kind} {name} does not exist")]
    NotFound {
        /// The object's kind.
        kind: &'static str,
        /// `namespace/name` or the name.
        name: String,
    },
    /// Somebody else wrote the object since it was read: read it again and decide anew.
    #[error("{kind} {name} was changed by somebody else meanwhile")]
    Conflict {
        /// The object's kind.
        kind: &'static str,
        /// `namespace/name` or the name.
        name: String,
    },
    /// The write itself is wrong or not allowed: repeating it as it is will not help.
    #[error("write {kind} {name}: {message}")]
    Refused {
        /// The object's kind.
        kind: &'static str,
        /// `namespace/name` or the name.
        name: String,
        /// What the server or file system said.
        message: String,
    },
    /// Nothing is known about the outcome: try again later.
    #[error("write {kind} {name}: {message}")]
    Unavailable {
        /// The object's kind.
        kind: &'static str,
        /// `namespace/name` or the name.
        name: String,
        /// What went wrong on the way.
        message: String,
    },
}

/// How a source is doing.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct SourceHealth {
    /// Whether the last attempt to reach the server (or read the directory) succeeded.
    pub connected: bool,
    /// Since when `connected` has its value, RFC 3339.
    pub since: String,
    /// The server in use, or the directory.
    pub location: String,
    /// The last thing that went wrong, also when all is well again.
    pub last_error: Option<String>,
    /// Calls made: HTTP requests, or writes to the state directory.
    pub calls: u64,
    /// Calls that failed.
    pub calls_failed: u64,
    /// Calls that had to wait for the client rate limit.
    pub calls_limited: u64,
    /// What is wrong with the input right now, one line each.
    pub problems: Vec<String>,
}
