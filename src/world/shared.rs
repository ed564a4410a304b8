//! Types of the levels that belong to no single part.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kinesin_core::devices::{Device, Families};
use kinesin_core::objects::{Condition, ObjectKey};
use kinesin_core::plan::Limits;
use kinesin_core::presence::Members;
use smol_str::SmolStr;

use crate::datapath::{HookStatus, MapStore};

/// The node's links.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Devices {
    /// Every link of the network namespace, by ifindex.
    pub all: Vec<Device>,
    /// Interface indices of the selected ones (`devices`, or the automatic rules).
    pub selected: Vec<u32>,
}

impl Devices {
    /// The selected devices.
    pub fn selected(&self) -> impl Iterator<Item = &Device> {
        self.all.iter().filter(|device| self.selected.contains(&device.ifindex))
    }

    /// Whether packets to a pod of this node may go straight to it through the device, as far as the device is concerned: not
    /// through one to the LAN.
    pub fn is_of_pod(&self, device: &Device) -> bool {
        device.leads_across() && !self.selected.contains(&device.ifindex)
    }

    /// The devices through which they may.
    pub fn pods(&self) -> impl Iterator<Item = &Device> {
        self.all.iter().filter(|device| self.is_of_pod(device))
    }

    /// The devices to the LAN whose other end is in another namespace: this node is a container.
    pub fn of_container(&self) -> impl Iterator<Item = &Device> {
        self.selected().filter(|device| device.leads_across())
    }

    /// A device by index.
    pub fn by_index(&self, ifindex: u32) -> Option<&Device> {
        self.all.iter().find(|device| device.ifindex == ifindex)
    }
}

/// The maps as soon as there are any, for who fills them.
#[derive(Clone)]
pub struct TablesHandle {
    /// Increases with each load.
    pub generation: u64,
    /// The maps.
    pub store: Arc<dyn MapStore>,
    /// How much fits.
    pub limits: Limits,
}

impl PartialEq for TablesHandle {
    fn eq(&self, other: &Self) -> bool {
        self.generation == other.generation && self.limits == other.limits
    }
}

/// The loaded data path.
#[derive(Clone, PartialEq)]
pub struct MapsHandle {
    /// The maps. Each load makes others, so that a reload counts as a change.
    pub tables: TablesHandle,
    /// What is attached where.
    pub hooks: Vec<HookStatus>,
    /// Devices that do without XDP where it is used as far as possible, and why.
    pub unaccelerated: Vec<(String, String)>,
}

impl MapsHandle {
    /// Whether both programs of a device are attached.
    pub fn serves(&self, device: &str) -> bool {
        let attached = |way: &str| {
            let place = format!("{device} {way}");
            self.hooks.iter().any(|hook| hook.place == place && hook.is_ok())
        };
        attached("ingress") && attached("egress")
    }

    /// The devices of which it was asked that their drivers forward too, and why not those that do not.
    pub fn drivers(&self) -> impl Iterator<Item = (&str, Option<&str>)> {
        let tried = self.hooks.iter().filter_map(|hook| Some((hook.accelerates()?, hook.error.as_deref())));
        tried.chain(self.unaccelerated.iter().map(|(device, why)| (device.as_str(), Some(why.as_str()))))
    }

    /// The IP versions whose program that answers for addresses was not refused on a device.
    pub fn answers(&self, device: &str) -> Families {
        let place = format!("{device} ingress");
        let refused = |v6: bool| {
            let of = |hook: &&HookStatus| hook.place == place && hook.program.ends_with('6') == v6;
            self.hooks.iter().filter(of).any(|hook| !hook.is_ok())
        };
        Families { ipv4: !refused(false), ipv6: !refused(true) }
    }
}

/// Connections that the programs know, as of the last pass over them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Connections {
    /// Entries of the table of established TCP connections, two for each.
    pub settled: u64,
    /// Of those, the ones whose connections are not established yet.
    pub opening: u64,
    /// Entries of other flows.
    pub transient: u64,
    /// Entries removed since the agent started because they had expired.
    pub expired: u64,
    /// Transient entries that the kernel forgot to make room, since the maps were made.
    pub forgotten: u64,
    /// How often an established connection found no room among its like, since the maps were made.
    pub unsettled: u64,
    /// When the pass ended; none before the first.
    pub looked: Option<Instant>,
    /// How long it took.
    pub took: Duration,
}

/// Who has the cluster-wide duties.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Leadership {
    /// This agent has them.
    pub leading: bool,
    /// Who has them, as far as this agent knows.
    pub holder: Option<SmolStr>,
}

/// The agents that are alive, this one included.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LiveMembers {
    /// What each last said of itself.
    pub members: Members,
    /// Whether the first complete list of presence leases has been seen.
    pub settled: bool,
}

/// What status_writer writes.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum StatusKey {
    /// `services/status`
    Service(ObjectKey),
    /// `ciliumloadbalancerippools/status`
    Pool(SmolStr),
    /// `ciliuml2announcementpolicies/status`
    Policy(SmolStr),
}

/// An order to write a status. The serial number makes an order that is given again a new one: somebody may have
/// overwritten what the last one wrote.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StatusOrder {
    /// Increases with each order of the same giver.
    pub serial: u64,
    /// What to write.
    pub status: StatusPatch,
}

/// The status that an object should have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StatusPatch {
    /// Addresses and the allocator's condition; `None` removes the condition.
    Service {
        /// The whole list.
        ingress: Vec<IpAddr>,
        /// Of type `cilium.io/IPAMRequestSatisfied`.
        condition: Option<Condition>,
    },
    /// Conditions of these types.
    Conditions(Vec<Condition>),
}
