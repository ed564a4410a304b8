//! The Kubernetes API as the source.
//!
//! Watches have slim types and a loop of their own (kube's watcher loses a whole list to one bad object). Status is written
//! without reading first: Services by strategic merge, custom resources by server-side apply; the transition times come from
//! what the watches saw. Deliberately absent: any cache of objects.

mod limit;
mod servers;
#[cfg(test)]
pub(in crate::source) mod testing;
#[cfg(test)]
mod tests;
mod watch;
mod wire;
mod write;

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

use futures::FutureExt;
use futures::future::BoxFuture;
use kinesin_core::objects::{Condition, EndpointSlice, L2Policy, Lease, Node, Object, ObjectKey, Pool, Service};
use smol_str::SmolStr;

use self::servers::Servers;
pub use self::servers::{ConnectError, KubernetesOptions};
use self::wire::Kind;
use super::{Events, LEASE_LABEL, LEASE_LABEL_VALUE, Source, SourceHealth, WriteError};

/// Objects from the Kubernetes API.
pub struct KubernetesSource {
    shared: Arc<Shared>,
}

/// What streams and writes share.
struct Shared {
    servers: Servers,
    namespace: String,
    /// Status and transition time of the conditions that Kinesin may write, by type.
    conditions: Mutex<HashMap<(&'static str, ObjectKey), Vec<Known>>>,
}

/// A condition as far as its transition time depends on it.
struct Known {
    kind: SmolStr,
    status: SmolStr,
    since: SmolStr,
}

impl Shared {
    fn remember<T: Kind>(&self, object: &T) {
        if T::HAS_CONDITIONS {
            self.remember_conditions(T::KIND, object.key(), object.our_conditions());
        }
    }

    fn remember_conditions<'a>(
        &self,
        kind: &'static str,
        key: ObjectKey,
        conditions: impl Iterator<Item = &'a Condition>,
    ) {
        let known: Vec<Known> = conditions
            .map(|c| Known {
                kind: SmolStr::new(&c.kind),
                status: SmolStr::new(&c.status),
                since: SmolStr::new(&c.last_transition_time),
            })
            .collect();
        let mut all = self.conditions.lock().unwrap_or_else(PoisonError::into_inner);
        if known.is_empty() {
            all.remove(&(kind, key));
        } else {
            all.insert((kind, key), known);
        }
    }

    fn forget(&self, kind: &'static str, key: &ObjectKey) {
        self.conditions.lock().unwrap_or_else(PoisonError::into_inner).remove(&(kind, key.clone()));
    }

    /// The conditions of an object, as far as they matter for [`super::status::transition`].
    fn known(&self, kind: &'static str, key: &ObjectKey) -> Vec<Condition> {
        let all = self.conditions.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(known) = all.get(&(kind, key.clone())) else { return Vec::new() };
        let restore = |known: &Known| Condition {
            kind: known.kind.to_string(),
            status: known.status.to_string(),
            last_transition_time: known.since.to_string(),
            ..Condition::default()
        };
        known.iter().map(restore).collect()
    }
}

/// API path of all objects of a kind, or of those in one namespace.
fn path<T: Object>(namespace: Option<&str>) -> String {
    let version = T::API_VERSIONS[0];
    let root = if version.contains('/') { "/apis" } else { "/api" };
    match namespace {
        Some(namespace) => format!("{root}/{version}/namespaces/{namespace}/{}", T::PLURAL),
        None => format!("{root}/{version}/{}", T::PLURAL),
    }
}

impl KubernetesSource {
    /// Makes the clients. Whether a server answers shows in [`Source::health`]; an outage at start is no error.
    pub async fn connect(options: KubernetesOptions) -> Result<Arc<Self>, ConnectError> {
        let servers = Servers::new(&options).await?;
        let shared = Shared { servers, namespace: options.namespace, conditions: Mutex::default() };
        Ok(Arc::new(Self { shared: Arc::new(shared) }))
    }

    /// A client for the API server in use, for what [`Source`] does not offer.
    pub fn client(&self) -> kube::Client {
        self.shared.servers.client()
    }

    fn events<T: Kind>(&self) -> Events<T> {
        watch::events(self.shared.clone(), path::<T>(None), None)
    }
}

impl Source for KubernetesSource {
    fn name(&self) -> &'static str {
        "kubernetes"
    }

    fn services(&self) -> Events<Service> {
        self.events()
    }

    fn endpoint_slices(&self) -> Events<EndpointSlice> {
        self.events()
    }

    fn nodes(&self) -> Events<Node> {
        self.events()
    }

    fn pools(&self) -> Events<Pool> {
        self.events()
    }

    fn l2_policies(&self) -> Events<L2Policy> {
        self.events()
    }

    fn leases(&self) -> Events<Lease> {
        let labels = format!("{LEASE_LABEL}={LEASE_LABEL_VALUE}");
        watch::events(self.shared.clone(), path::<Lease>(Some(&self.shared.namespace)), Some(labels))
    }

    fn write_service_status<'a>(
        &'a self,
        key: &'a ObjectKey,
        ingress: &'a [IpAddr],
        condition: Option<&'a Condition>,
    ) -> BoxFuture<'a, Result<(), WriteError>> {
        write::service_status(&self.shared, key, ingress, condition).boxed()
    }

    fn write_pool_status<'a>(
        &'a self,
        name: &'a str,
        conditions: &'a [Condition],
    ) -> BoxFuture<'a, Result<(), WriteError>> {
        write::custom_status::<Pool>(&self.shared, name, conditions, write::LB_IPAM).boxed()
    }

    fn write_policy_status<'a>(
        &'a self,
        name: &'a str,
        conditions: &'a [Condition],
    ) -> BoxFuture<'a, Result<(), WriteError>> {
        write::custom_status::<L2Policy>(&self.shared, name, conditions, write::L2_ANNOUNCER).boxed()
    }

    fn get_lease<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Option<Lease>, WriteError>> {
        write::get_lease(&self.shared, name).boxed()
    }

    fn put_lease<'a>(&'a self, lease: &'a Lease) -> BoxFuture<'a, Result<Lease, WriteError>> {
        write::put_lease(&self.shared, lease).boxed()
    }

    fn delete_lease<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<(), WriteError>> {
        write::delete_lease(&self.shared, name).boxed()
    }

    /// Also for calls that wait already.
    fn set_rate_limit(&self, qps: f64, burst: u32) {
        self.shared.servers.limiter.set(qps, burst);
    }

    fn register_kinds(&self) -> BoxFuture<'_, Result<(), super::crds::RegisterError>> {
        Box::pin(async { super::crds::register(self.client()).await.map(drop) })
    }

    fn health(&self) -> SourceHealth {
        self.shared.servers.health()
    }
}
