//! The levels that the agent's actors share. Each has exactly one writer, named at its field.
//!
//! Deliberately absent: methods that change anything.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use kinesin_core::devices::{Device, Families, families};
use kinesin_core::host_routing::HostRouting;
use kinesin_core::objects::{EndpointSlice, L2Policy, Lease, Node, ObjectKey, Pod, Pool, Service};
use kinesin_core::peers::Peer;
use kinesin_core::services::{Compiled, HealthCheck, NodeContext, ServiceKey};
use smol_str::SmolStr;

use crate::config::Config;
use crate::level::Level;
use crate::table::Table;

mod problems;
mod shared;

pub use problems::Problems;
pub use shared::{
    Connections, Devices, Leadership, LiveMembers, MapsHandle, StatusKey, StatusOrder, StatusPatch, TablesHandle,
};

/// Everything that actors share.
#[derive(Clone)]
pub struct World {
    /// This node's name.
    pub node: SmolStr,
    /// Written by config_watcher.
    pub config: Level<Config>,
    /// Written by service_watcher.
    pub services: Table<ObjectKey, Service>,
    /// Written by endpoint_watcher.
    pub slices: Table<ObjectKey, EndpointSlice>,
    /// Written by pod_watcher: those of this node that have host ports.
    pub pods: Table<ObjectKey, Pod>,
    /// Written by node_watcher.
    pub nodes: Table<ObjectKey, Node>,
    /// Written by pool_watcher.
    pub pools: Table<ObjectKey, Pool>,
    /// Written by policy_watcher.
    pub policies: Table<ObjectKey, L2Policy>,
    /// Written by lease_watcher.
    pub leases: Table<ObjectKey, Lease>,
    /// Written by link_watcher.
    pub devices: Level<Devices>,
    /// Written by stack_watcher: which way packets to pods of this node take; absent before its first look. Ask
    /// [`World::host_routing`].
    pub host_routing: Level<HostRouting>,
    /// Written by loader: the maps, which may still be without programs.
    pub tables: Level<TablesHandle>,
    /// Written by loader: ids of its programs, before they are attached.
    pub programs: Level<BTreeSet<u32>>,
    /// Written by loader: the maps with programs, and what is attached where.
    pub maps: Level<MapsHandle>,
    /// Written by flow_collector: what its last pass found.
    pub connections: Level<Connections>,
    /// Written by endpoint_syncer.
    pub compiled: Table<ServiceKey, Compiled>,
    /// Written by endpoint_syncer: what it compiles for.
    pub node_context: Level<NodeContext>,
    /// Written by endpoint_syncer: what load balancers outside are told of this node, for the few Services that have it.
    pub health_checks: Table<ServiceKey, HealthCheck>,
    /// Written by map_writer: services whose entries could not be written, and why.
    pub unwritten: Table<ServiceKey, String>,
    /// Written by map_writer: set once the first complete sync is in the maps, and these have programs.
    pub programmed: Level<bool>,
    /// Written by leader_elector.
    pub leadership: Level<Leadership>,
    /// Written by membership.
    pub members: Level<LiveMembers>,
    /// Written by peer_watcher: the other living nodes, and whether packets can be handed on to them.
    pub peers: Level<Vec<Peer>>,
    /// Written by vip_owner: the addresses that this node answers for; absent before its first decision.
    pub claims: Level<Vec<IpAddr>>,
    /// Written by vip_owner: address and device that this node answers for, with the number of announcements it wants made
    /// so far; complete once it has decided for the first time.
    pub answered: Table<(IpAddr, u32), u64>,
    /// Orders for status_writer; written by lb_ipam and vip_owner, each under its own keys.
    pub orders: Table<StatusKey, StatusOrder>,
    /// What is wrong, by area; written by everybody, each under its own areas.
    pub problems: Problems,
}

impl World {
    /// Empty levels for a node.
    pub fn new(node: SmolStr, config: Config) -> Self {
        Self {
            node,
            config: Level::with(config),
            services: Table::default(),
            slices: Table::default(),
            pods: Table::default(),
            nodes: Table::default(),
            pools: Table::default(),
            policies: Table::default(),
            leases: Table::default(),
            devices: Level::default(),
            host_routing: Level::default(),
            tables: Level::default(),
            programs: Level::default(),
            maps: Level::default(),
            connections: Level::default(),
            compiled: Table::default(),
            node_context: Level::default(),
            health_checks: Table::default(),
            unwritten: Table::default(),
            programmed: Level::with(false),
            leadership: Level::default(),
            members: Level::default(),
            peers: Level::default(),
            claims: Level::default(),
            answered: Table::default(),
            orders: Table::default(),
            problems: Problems::default(),
        }
    }

    /// Why traffic should not be sent here for now, in the sense of kube-proxy's health; empty when all is well.
    pub fn unhealthy(&self) -> Vec<String> {
        let mut reasons = self.problems.of("maps");
        if !self.programmed.get().is_some_and(|programmed| *programmed) {
            reasons.push("the first complete sync is not in the maps yet".into());
        }
        reasons
    }

    /// The selected devices, with the IP versions in which this node can answer for addresses there: those that are switched
    /// on, that the device has a network of, and whose program the kernel has not refused. None before devices are known.
    pub fn announcers(&self) -> Option<Vec<(Device, Families)>> {
        let (devices, maps) = (self.devices.get()?, self.maps.get());
        let on = self.config().families;
        let can = |device: &Device| {
            let programs = maps.as_ref().map_or(Families::BOTH, |maps| maps.answers(&device.name));
            on.and(families(device, &devices.all)).and(programs)
        };
        Some(devices.selected().map(|device| (device.clone(), can(device))).collect())
    }

    /// Which way packets to pods of this node take: the host's stack while that is not known yet.
    pub fn host_routing(&self) -> Arc<HostRouting> {
        self.host_routing.get().unwrap_or_default()
    }

    /// The configuration in force.
    pub fn config(&self) -> Arc<Config> {
        self.config.get().expect("World::new sets it and nobody removes it")
    }
}
