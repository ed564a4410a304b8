//! Compiles Services and their EndpointSlices, and the host ports of pods, into what clients can connect to.
//!
//! owns: the compiled table, the health checks' table, and the index from Services to their slices
//! hears: changes of services, slices, this node's pods, labels and addresses, the configuration
//! says: changed services to the compiled table's subscribers; health checks
//! restart story: recompiles everything from the tables; equal results wake nobody
//!
//! A change of one slice recompiles one Service: its cost is that Service's endpoints, whatever else exists.
//! Deliberately absent: knowledge of maps.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use kinesin_core::devices::{node_port_addresses, servable_addresses};
use kinesin_core::objects::{EndpointSlice, Node, Object, ObjectKey, Pod, Service};
use kinesin_core::services::{self, Compiled, HostContext, NodeContext, ServiceKey, SliceIndex};
use metrics::{counter, gauge};

use crate::actor::{Actor, Failure};
use crate::address::{Address, Label};
use crate::config;
use crate::level::Follower;
use crate::table::{Subscription, Table};
use crate::world::{Devices, World};

/// What the syncer hears.
pub enum EndpointSyncerMsg {
    /// One of its inputs changed.
    Wake,
}

impl Label for EndpointSyncerMsg {
    fn label(&self) -> &'static str {
        "Wake"
    }
}

/// The actor.
pub struct EndpointSyncer {
    world: World,
    services: Subscription<ObjectKey, Service>,
    slices: Subscription<ObjectKey, EndpointSlice>,
    pods: Subscription<ObjectKey, Pod>,
    nodes: Subscription<ObjectKey, Node>,
    devices: Follower<Devices>,
    config: Follower<config::Config>,
    index: SliceIndex,
    context: NodeContext,
    host: HostContext,
    /// Keys of host ports in the compiled table.
    host_ports: BTreeSet<ServiceKey>,
    compiled: Table<ServiceKey, Compiled>,
    /// Rows of an instance before: their Services may have gone while there was none.
    inherited: Vec<ServiceKey>,
}

impl Actor for EndpointSyncer {
    type Msg = EndpointSyncerMsg;
    type Args = World;

    async fn start(world: World, me: Address<EndpointSyncerMsg>) -> Result<Self, Failure> {
        let wake = me.waker(|| EndpointSyncerMsg::Wake);
        let (host_ports, inherited): (Vec<_>, Vec<_>) =
            world.compiled.keys().into_iter().partition(|key| services::object_of(key).0 == Pod::KIND);
        Ok(Self {
            services: world.services.subscribe_urgently(wake.clone()),
            slices: world.slices.subscribe_urgently(wake.clone()),
            pods: world.pods.subscribe(wake.clone()),
            nodes: world.nodes.subscribe(wake.clone()),
            devices: world.devices.follow(wake.clone()),
            config: world.config.follow(wake),
            index: SliceIndex::default(),
            context: NodeContext::default(),
            host: HostContext::default(),
            host_ports: host_ports.into_iter().collect(),
            inherited,
            compiled: world.compiled.clone(),
            world,
        })
    }

    async fn handle(&mut self, EndpointSyncerMsg::Wake: EndpointSyncerMsg) -> Result<(), Failure> {
        // Read before the changes are taken: rows that arrive later come with their own wake-up.
        let pods_matter = self.world.config().services.kube_proxy_replacement;
        let complete = self.world.services.is_complete()
            && self.world.slices.is_complete()
            && (self.world.pods.is_complete() || !pods_matter);
        let (context_changed, host_changed) = self.look_at_the_node();
        for (key, since) in self.dirty(context_changed) {
            self.compile(&key, since);
        }
        if host_changed || context_changed || !self.pods.take().is_empty() {
            self.compile_host_ports();
        }
        gauge!("kinesin_services").set((self.compiled.len() - self.host_ports.len()) as f64);
        if complete {
            self.compiled.set_complete();
        }
        Ok(())
    }
}

impl EndpointSyncer {
    /// The services that the changes since the last call concern, each with the time of the oldest of its changes.
    fn dirty(&mut self, context_changed: bool) -> BTreeMap<ServiceKey, Instant> {
        if context_changed {
            self.services.mark_all();
        }
        let mut dirty: BTreeMap<_, _> =
            self.services.take_since().into_iter().map(|(key, _, since)| (key, since)).collect();
        dirty.extend(std::mem::take(&mut self.inherited).into_iter().map(|key| (key, Instant::now())));
        for (key, slice, since) in self.slices.take_since() {
            let services = match slice {
                Some(slice) => self.index.upsert(slice),
                None => self.index.remove(&key).into_iter().collect(),
            };
            for service in services {
                let oldest = dirty.entry(service).or_insert(since);
                *oldest = since.min(*oldest);
            }
        }
        dirty
    }

    /// Whether what Services mean depends on has changed, and what host ports depend on besides.
    fn look_at_the_node(&mut self) -> (bool, bool) {
        // All three are read, so that none of them stays marked.
        let (nodes, devices, config) = (self.nodes.take(), self.devices.changed(), self.config.changed());
        let mine = nodes.iter().any(|(key, _)| key.name == self.world.node);
        if !(mine || devices.is_some() || config.is_some()) {
            return (false, false);
        }
        let node = self.world.nodes.get(&ObjectKey::new("", self.world.node.clone()));
        let devices = self.world.devices.get();
        let context = node_context(&self.world, node.as_deref(), devices.as_deref());
        let range = self.world.config().services.node_port_range;
        let host = HostContext {
            addresses: devices.iter().flat_map(|devices| servable_addresses(&devices.all)).collect(),
            node_ports: (range.first, range.last),
        };
        let changed = (context != self.context, host != self.host);
        self.world.node_context.set(context.clone());
        (self.context, self.host) = (context, host);
        changed
    }

    /// All of them together: a pod's port depends on the other pods'. Their number is that of pods on this node at most.
    fn compile_host_ports(&mut self) {
        let pods = self.world.pods.rows();
        let wanted = services::host_ports(pods.iter().map(|(_, pod)| &**pod), &self.host, &self.context);
        self.host_ports.retain(|key| {
            let stays = wanted.contains_key(key);
            if !stays {
                tracing::info!(host_port = %key, "host port removed");
                self.compiled.remove(key);
            }
            stays
        });
        for (key, compiled) in wanted {
            if self.host_ports.insert(key.clone()) {
                tracing::info!(host_port = %key, frontends = compiled.frontends.len(), "host port added");
            }
            self.compiled.put(key, compiled);
        }
        gauge!("kinesin_host_ports").set(self.host_ports.len() as f64);
    }

    fn compile(&self, key: &ServiceKey, since: Instant) {
        let Some(service) = self.world.services.get(key) else {
            self.world.health_checks.remove(key);
            if self.compiled.remove(key) {
                counter!("cilium_services_events_total", "action" => "delete").increment(1);
            }
            return;
        };
        let compiled = services::compile(&service, self.index.slices(key), &self.context);
        match compiled.health_check {
            Some(check) => drop(self.world.health_checks.put(key.clone(), check)),
            None => drop(self.world.health_checks.remove(key)),
        }
        let action = if self.compiled.get(key).is_some() { "update" } else { "add" };
        if self.compiled.put_since(key.clone(), compiled, since) {
            counter!("cilium_services_events_total", "action" => action).increment(1);
        }
    }
}

/// Label of a node's topology zone.
const ZONE_LABEL: &str = "topology.kubernetes.io/zone";

/// What a Service's meaning on this node depends on, besides the Service and its slices.
fn node_context(world: &World, node: Option<&Node>, devices: Option<&Devices>) -> NodeContext {
    let config = world.config();
    let labels = node.map(|node| node.metadata.labels.clone()).unwrap_or_default();
    let node_ips: Vec<_> =
        node.iter().flat_map(|node| &node.status.addresses).filter_map(|a| a.address.parse().ok()).collect();
    let selected: Vec<_> = devices.iter().flat_map(|devices| devices.selected()).collect();
    NodeContext {
        name: world.node.clone(),
        zone: labels.get(ZONE_LABEL).cloned().unwrap_or_default(),
        labels,
        node_port_addresses: node_port_addresses(&selected, &node_ips, &config.services.node_port_addresses),
        ipv4: config.families.ipv4,
        ipv6: config.families.ipv6,
        algorithm: match config.services.algorithm {
            config::Algorithm::Random => services::Algorithm::Random,
            config::Algorithm::Maglev => services::Algorithm::Maglev,
        },
        forwarding: config.services.forwarding(),
        dsr_by_annotation: config.services.dsr_by_annotation(),
        algorithm_by_annotation: config.services.algorithm_annotation,
        proxy_name: config.services.proxy_name.as_str().into(),
        default_lb_ipam: config.lb_ipam.default_for == config::DefaultIpam::LbIpam,
        service_topology: config.services.topology,
        external_cluster_ip: config.services.external_cluster_ip,
        wildcards: config.services.wildcards,
        kube_proxy_replacement: config.services.kube_proxy_replacement,
        health_check_node_ports: config.services.health_check_node_ports,
        health_check_on_load_balancer: config.services.health_check_on_load_balancer,
        source_range_all_types: config.services.source_range_all_types,
        sctp: config.services.sctp,
    }
}
