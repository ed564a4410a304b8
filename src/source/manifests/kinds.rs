//! The kinds that manifests may contain, and what the API server would have filled in.
//!
//! Deliberately absent: allocation. Cluster IPs and node ports are programmed as far as the manifest names them; only
//! addresses from pools are handed out, because LB-IPAM runs here too.

use std::fmt::Debug;
use std::sync::Arc;

use kinesin_core::objects::{
    Affinity, EndpointSlice, L2Policy, Lease, Node, Object, Pod, Pool, Service, ServiceType, SessionAffinityConfig,
    TargetPort,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use smol_str::SmolStr;

use super::table::{Snapshot, Table};

/// An object of any kind that manifests may contain.
#[derive(Clone, Debug)]
pub(super) enum AnyObject {
    Service(Arc<Service>),
    EndpointSlice(Arc<EndpointSlice>),
    Node(Arc<Node>),
    Pod(Arc<Pod>),
    Pool(Arc<Pool>),
    L2Policy(Arc<L2Policy>),
}

/// What this source does differently for each kind.
pub(super) trait Kind: Object + DeserializeOwned + Serialize {
    /// Fills in what the API server would.
    fn complete(&mut self);
    /// Takes over the status of the same object, as read from the state directory.
    fn take_status(&mut self, _from: &Self) {}
    /// Erases the type.
    fn wrap(self) -> Option<AnyObject>;
    /// Restores the type.
    fn unwrap(any: &AnyObject) -> Option<&Arc<Self>>;
    /// This kind's objects in a snapshot.
    fn table(snapshot: &Snapshot) -> &Table<Self>;
}

/// Kubernetes' default for `sessionAffinityConfig.clientIP.timeoutSeconds`.
const AFFINITY_SECONDS: u32 = 10_800;

fn normalise<T: Object>(object: &mut T) {
    let meta = object.meta_mut();
    if !T::NAMESPACED {
        meta.namespace = SmolStr::default();
    } else if meta.namespace.is_empty() {
        meta.namespace = SmolStr::new_static("default");
    }
    // These belong to a server that is not there; a copied manifest's ones would only mislead.
    meta.resource_version = SmolStr::default();
    meta.deletion_timestamp = None;
}

fn default_protocol(protocol: &mut SmolStr) {
    if protocol.is_empty() {
        *protocol = SmolStr::new_static("TCP");
    }
}

impl Kind for Service {
    fn complete(&mut self) {
        normalise(self);
        let spec = &mut self.spec;
        for port in &mut spec.ports {
            default_protocol(&mut port.protocol);
            port.target_port.get_or_insert(TargetPort::Number(port.port));
        }
        if spec.cluster_ips.is_empty() && !spec.cluster_ip.is_empty() {
            spec.cluster_ips.push(spec.cluster_ip.clone());
        } else if let (true, Some(first)) = (spec.cluster_ip.is_empty(), spec.cluster_ips.first()) {
            spec.cluster_ip = first.clone();
        }
        if spec.session_affinity == Affinity::ClientIP {
            let config = spec.session_affinity_config.get_or_insert_with(SessionAffinityConfig::default);
            config.client_ip.get_or_insert_default().timeout_seconds.get_or_insert(AFFINITY_SECONDS);
        }
        if spec.kind == ServiceType::LoadBalancer {
            spec.allocate_load_balancer_node_ports.get_or_insert(true);
        }
    }

    fn take_status(&mut self, from: &Self) {
        self.status = from.status.clone();
    }

    fn wrap(self) -> Option<AnyObject> {
        Some(AnyObject::Service(Arc::new(self)))
    }

    fn unwrap(any: &AnyObject) -> Option<&Arc<Self>> {
        if let AnyObject::Service(object) = any { Some(object) } else { None }
    }

    fn table(snapshot: &Snapshot) -> &Table<Self> {
        &snapshot.services
    }
}

impl Kind for EndpointSlice {
    fn complete(&mut self) {
        normalise(self);
        for port in &mut self.ports {
            default_protocol(&mut port.protocol);
        }
    }

    fn wrap(self) -> Option<AnyObject> {
        Some(AnyObject::EndpointSlice(Arc::new(self)))
    }

    fn unwrap(any: &AnyObject) -> Option<&Arc<Self>> {
        if let AnyObject::EndpointSlice(object) = any { Some(object) } else { None }
    }

    fn table(snapshot: &Snapshot) -> &Table<Self> {
        &snapshot.endpoint_slices
    }
}

impl Kind for Node {
    fn complete(&mut self) {
        normalise(self);
    }

    fn wrap(self) -> Option<AnyObject> {
        Some(AnyObject::Node(Arc::new(self)))
    }

    fn unwrap(any: &AnyObject) -> Option<&Arc<Self>> {
        if let AnyObject::Node(object) = any { Some(object) } else { None }
    }

    fn table(snapshot: &Snapshot) -> &Table<Self> {
        &snapshot.nodes
    }
}

impl Kind for Pod {
    /// Nobody but the manifest says how a pod is: one that is written down runs, unless it says otherwise.
    fn complete(&mut self) {
        normalise(self);
        if self.status.phase.is_empty() {
            self.status.phase = SmolStr::new_static("Running");
        }
        let containers = self.spec.containers.iter_mut().chain(&mut self.spec.init_containers);
        containers.flat_map(|container| &mut container.ports).for_each(|port| default_protocol(&mut port.protocol));
    }

    fn wrap(self) -> Option<AnyObject> {
        Some(AnyObject::Pod(Arc::new(self)))
    }

    fn unwrap(any: &AnyObject) -> Option<&Arc<Self>> {
        if let AnyObject::Pod(object) = any { Some(object) } else { None }
    }

    fn table(snapshot: &Snapshot) -> &Table<Self> {
        &snapshot.pods
    }
}

impl Kind for Pool {
    fn complete(&mut self) {
        normalise(self);
    }

    fn take_status(&mut self, from: &Self) {
        self.status = from.status.clone();
    }

    fn wrap(self) -> Option<AnyObject> {
        Some(AnyObject::Pool(Arc::new(self)))
    }

    fn unwrap(any: &AnyObject) -> Option<&Arc<Self>> {
        if let AnyObject::Pool(object) = any { Some(object) } else { None }
    }

    fn table(snapshot: &Snapshot) -> &Table<Self> {
        &snapshot.pools
    }
}

impl Kind for L2Policy {
    fn complete(&mut self) {
        normalise(self);
    }

    fn take_status(&mut self, from: &Self) {
        self.status = from.status.clone();
    }

    fn wrap(self) -> Option<AnyObject> {
        Some(AnyObject::L2Policy(Arc::new(self)))
    }

    fn unwrap(any: &AnyObject) -> Option<&Arc<Self>> {
        if let AnyObject::L2Policy(object) = any { Some(object) } else { None }
    }

    fn table(snapshot: &Snapshot) -> &Table<Self> {
        &snapshot.policies
    }
}

/// Leases live in the state directory only.
impl Kind for Lease {
    fn complete(&mut self) {}

    fn wrap(self) -> Option<AnyObject> {
        None
    }

    fn unwrap(_: &AnyObject) -> Option<&Arc<Self>> {
        None
    }

    fn table(snapshot: &Snapshot) -> &Table<Self> {
        &snapshot.leases
    }
}
