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
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures::FutureExt;
use futures::future::BoxFuture;
use kinesin_core::objects::{Condition, EndpointSlice, L2Policy, Lease, Node, Object, ObjectKey, Pod, Pool, Service};
use smol_str::SmolStr;

use self::servers::Servers;
pub(super) use self::servers::chain;
pub use self::servers::{ConnectError, KubernetesOptions};
use self::watch::Selection;
use self::wire::Kind;
use super::{Events, IPAM_CONDITION, LEASE_LABEL, LEASE_LABEL_VALUE, Source, SourceHealth, WriteError};

/// Objects from the Kubernetes API.
pub struct KubernetesSource {
    shared: Arc<Shared>,
}

/// What streams and writes share.
struct Shared {
    servers: Servers,
    namespace: String,
    /// What the watches saw of conditions that Kinesin may write.
    conditions: Mutex<Conditions>,
}

/// Conditions seen. Of Services, of which there are thousands, only what their transition time depends on.
#[derive(Default)]
struct Conditions {
    /// Status and `lastTransitionTime` of LB-IPAM's condition.
    services: HashMap<ObjectKey, (SmolStr, SmolStr)>,
    /// By kind and name, whole.
    custom: HashMap<(&'static str, SmolStr), Vec<Condition>>,
}

impl Shared {
    fn conditions(&self) -> MutexGuard<'_, Conditions> {
        self.conditions.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Conditions {
    fn remember_service(&mut self, key: ObjectKey, condition: Option<&Condition>) {
        match condition {
            Some(c) => {
                drop(self.services.insert(key, (SmolStr::new(&c.status), SmolStr::new(&c.last_transition_time))))
            }
            None => drop(self.services.remove(&key)),
        }
    }

    /// As much of the condition as [`super::status::transition`] asks for.
    fn of_service(&self, key: &ObjectKey) -> Option<Condition> {
        self.services.get(key).map(|(status, since)| Condition {
            kind: IPAM_CONDITION.to_owned(),
            status: status.to_string(),
            last_transition_time: since.to_string(),
            ..Condition::default()
        })
    }

    fn remember_custom(&mut self, kind: &'static str, name: SmolStr, conditions: &[Condition]) {
        self.custom.insert((kind, name), conditions.to_vec());
    }

    fn of_custom(&self, kind: &'static str, name: &str) -> Vec<Condition> {
        self.custom.get(&(kind, SmolStr::new(name))).cloned().unwrap_or_default()
    }

    fn forget(&mut self, kind: &'static str, key: &ObjectKey) {
        if kind == Service::KIND {
            self.services.remove(key);
        } else {
            self.custom.remove(&(kind, key.name.clone()));
        }
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
        watch::events(self.shared.clone(), path::<T>(None), Selection::default())
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

    fn pods(&self, node: &str) -> Events<Pod> {
        // The API server indexes pods by node: neither it nor we look at those of other nodes.
        let selection = Selection { labels: None, fields: Some(format!("spec.nodeName={node}")) };
        super::with_host_ports(watch::events(self.shared.clone(), path::<Pod>(None), selection), node)
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
        let labels = Some(format!("{LEASE_LABEL}={LEASE_LABEL_VALUE}"));
        let selection = Selection { labels, fields: None };
        watch::events(self.shared.clone(), path::<Lease>(Some(&self.shared.namespace)), selection)
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
