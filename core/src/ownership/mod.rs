//! Which node answers for which address, and what this node has to do about it.
//!
//! Decided per address, not per Service, so that Services that share one never have two owners (R06). Every node sees
//! the same records and computes the same owner: the one that claims the address already, else the highest weight. A node
//! that comes back takes nothing back. This first form believes presence records alone; probing the wire before a claim,
//! yielding to announcements that are seen, and settling conflicts join as further inputs, states and effects.
//!
//! Work follows the change: an input touches the addresses that it is about, through indexes by Service, by policy and by
//! claim. Deliberately absent: sockets, maps, Leases, wall-clock time.

mod decide;
mod index;
mod policy;
mod rank;

#[cfg(test)]
mod properties;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Serialize;
use smol_str::SmolStr;

use crate::devices::{Device, Families};
use crate::objects::{Condition, L2Policy, Node, ObjectKey, Service, StringMap};
use crate::presence::{Members, Record};
use policy::PolicyEntry;
pub use policy::{
    CONDITION_BAD_INTERFACE_REGEX, CONDITION_BAD_NODE_SELECTOR, CONDITION_BAD_SERVICE_SELECTOR, announced,
};
pub use rank::{Candidate, owner, weight};

/// A new agent claims nothing new until others can see its own Lease, so that those who start together (R47) know of each
/// other; but no longer than this, so that a node that cannot write Leases serves all the same.
pub const SETTLE: Duration = Duration::from_secs(3);
/// How often an address is announced after a claim: at once, and then at [`ANNOUNCE_PERIOD`].
pub const ANNOUNCE_COUNT: u8 = 3;
/// Between announcements of one address.
pub const ANNOUNCE_PERIOD: Duration = Duration::from_secs(1);

/// Nodes on which a Service has a ready backend: what `externalTrafficPolicy: Local` needs to know.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Placement {
    /// `nodeName` of ready endpoints.
    pub nodes: BTreeSet<SmolStr>,
    /// Some ready endpoint has no `nodeName`: a placeholder of a proxy that runs everywhere, or something outside the
    /// cluster. Every node serves it as well as any other (R02).
    pub anywhere: bool,
}

/// What the machine hears.
#[derive(Clone, Debug)]
pub enum Input {
    /// A Service as it is now.
    ServiceUpserted(Arc<Service>),
    /// A Service is gone.
    ServiceRemoved(ObjectKey),
    /// A policy as it is now.
    PolicyUpserted(Arc<L2Policy>),
    /// A policy is gone.
    PolicyRemoved(ObjectKey),
    /// A Node as it is now; only its labels matter.
    NodeUpserted(Arc<Node>),
    /// A Node is gone.
    NodeRemoved(ObjectKey),
    /// Where a Service's ready backends are.
    Placed {
        /// The Service.
        service: ObjectKey,
        /// All of it, replacing what was said before.
        placement: Placement,
    },
    /// This node's selected devices, all of them, with the IP versions that it can answer for on each.
    Devices(Vec<(Device, Families)>),
    /// Who is there, all of them.
    Members(Members),
    /// Addresses that an earlier run of this agent claimed and may still answer for; before [`Input::Synced`].
    Restored(Vec<IpAddr>),
    /// This node is going away (or is not, after all): hand over what it has.
    Draining(bool),
    /// The first complete lists of everything have arrived. Nothing is decided before.
    Synced,
    /// Time has passed; see [`Ownership::next_deadline`].
    Tick,
}

/// One of this node's devices.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceId {
    /// The kernel's number of it.
    pub ifindex: u32,
    /// Its name.
    pub name: SmolStr,
}

/// What should happen on this node.
#[derive(Clone, Debug, PartialEq)]
pub enum Effect {
    /// Answer for the address on exactly these devices. Comes again when the devices change.
    Claim {
        /// The address.
        addr: IpAddr,
        /// Sorted, never empty.
        devices: Vec<DeviceId>,
    },
    /// Stop answering for the address.
    Release {
        /// The address.
        addr: IpAddr,
    },
    /// Tell the segment: a gratuitous ARP, or an unsolicited neighbour advertisement.
    Announce {
        /// The address.
        addr: IpAddr,
        /// Where.
        device: DeviceId,
    },
    /// A policy's conditions of ours as they should be. Every node says the same: one may write it.
    PolicyStatus {
        /// The policy.
        name: SmolStr,
        /// Other conditions stay.
        conditions: Vec<Condition>,
    },
}

/// An address as this node stands to it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum State {
    /// No live node may answer for it.
    #[default]
    Unowned,
    /// Another node has it, or should claim it.
    Elsewhere,
    /// This node will claim it when it has settled.
    Waiting,
    /// This node answers.
    Announcing,
    /// This node answers until the next owner says that it does.
    HandingOver,
}

impl State {
    /// This node answers for the address.
    pub fn answers(self) -> bool {
        matches!(self, Self::Announcing | Self::HandingOver)
    }
}

/// One object of `kinesin vips -o json`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct VipView {
    /// The address.
    pub address: IpAddr,
    /// `namespace/name` of the Services at it.
    pub services: Vec<String>,
    /// The pool that it is from; for the caller to fill in.
    pub pool: Option<SmolStr>,
    /// The node that answers for it, or should.
    pub owner: Option<SmolStr>,
    /// This node's devices that it is announced on, joined by commas.
    pub interface: Option<String>,
    /// The MAC that the LAN sees; for the caller to fill in.
    pub mac: Option<String>,
    /// When this node began to answer, RFC 3339; for the caller to fill in, from [`Vip::since`].
    pub since: Option<String>,
    /// From this node's point of view.
    pub state: State,
}

/// A view, and what is needed to complete it.
#[derive(Clone, Debug, PartialEq)]
pub struct Vip {
    /// For people and programs.
    pub view: VipView,
    /// When this node began to answer.
    pub since: Option<Instant>,
    /// Where it does.
    pub devices: Vec<DeviceId>,
}

#[derive(Debug)]
struct ServiceEntry {
    service: Arc<Service>,
    /// Policies that announce each address.
    offers: BTreeMap<IpAddr, Vec<SmolStr>>,
}

/// An address of some Service that some policy announces.
#[derive(Debug, Default)]
struct AddressEntry {
    services: BTreeSet<ObjectKey>,
    state: State,
    owner: Option<SmolStr>,
    since: Option<Instant>,
    devices: Vec<DeviceId>,
    /// Keys of its announcements in the schedule.
    scheduled: BTreeSet<(Instant, u32)>,
}

/// The machine of one node.
#[derive(Debug)]
pub struct Ownership {
    me: SmolStr,
    synced_at: Option<Instant>,
    settled: bool,
    draining: bool,
    services: HashMap<ObjectKey, ServiceEntry>,
    placements: HashMap<ObjectKey, Placement>,
    policies: BTreeMap<SmolStr, PolicyEntry>,
    labels: HashMap<SmolStr, StringMap>,
    /// This node's devices that can carry frames, by name.
    devices: BTreeMap<SmolStr, (Device, Families)>,
    /// The other live nodes.
    members: BTreeMap<SmolStr, Arc<Record>>,
    self_seen: bool,
    /// Other live nodes by the addresses that they claim.
    claims: HashMap<IpAddr, BTreeSet<SmolStr>>,
    restored: BTreeSet<IpAddr>,
    addresses: BTreeMap<IpAddr, AddressEntry>,
    /// Announcements to come: when, what, where; and how many after it.
    schedule: BTreeMap<(Instant, IpAddr, u32), (DeviceId, u8)>,
    /// Addresses to look at again.
    dirty: BTreeSet<IpAddr>,
    /// Policies whose conditions to look at again.
    dirty_policies: BTreeSet<SmolStr>,
    /// Policies whose nodes have changed.
    stirred_policies: BTreeSet<SmolStr>,
}

impl Ownership {
    /// For the node of that name. Knows nothing yet.
    pub fn new(me: impl Into<SmolStr>) -> Self {
        Self {
            me: me.into(),
            synced_at: None,
            settled: false,
            draining: false,
            services: HashMap::new(),
            placements: HashMap::new(),
            policies: BTreeMap::new(),
            labels: HashMap::new(),
            devices: BTreeMap::new(),
            members: BTreeMap::new(),
            self_seen: false,
            claims: HashMap::new(),
            restored: BTreeSet::new(),
            addresses: BTreeMap::new(),
            schedule: BTreeMap::new(),
            dirty: BTreeSet::new(),
            dirty_policies: BTreeSet::new(),
            stirred_policies: BTreeSet::new(),
        }
    }

    /// Takes one input and returns what to do, in this order.
    ///
    /// After effects that claim or release, publish [`Ownership::claims`] in the presence record at once.
    pub fn step(&mut self, input: Input, now: Instant) -> Vec<Effect> {
        let mut effects = Vec::new();
        match input {
            Input::ServiceUpserted(service) => self.service_upserted(service),
            Input::ServiceRemoved(key) => self.service_removed(&key),
            Input::PolicyUpserted(policy) => self.policy_upserted(policy),
            Input::PolicyRemoved(key) => self.policy_removed(&key.name),
            Input::NodeUpserted(node) => self.labels_changed(&node.metadata.name, Some(&node.metadata.labels)),
            Input::NodeRemoved(key) => self.labels_changed(&key.name, None),
            Input::Placed { service, placement } => self.placed(service, placement),
            Input::Devices(devices) => self.devices_changed(devices, now, &mut effects),
            Input::Members(members) => self.members_changed(members),
            Input::Restored(addresses) => self.restored.extend(addresses.into_iter().map(|ip| ip.to_canonical())),
            Input::Draining(draining) if self.draining == draining => {}
            Input::Draining(draining) => {
                self.draining = draining;
                self.dirty_all();
            }
            Input::Synced => {
                self.synced_at.get_or_insert(now);
                self.dirty_all();
            }
            Input::Tick => {}
        }
        self.expand_policies();
        self.settle(now);
        self.run_schedule(now, &mut effects);
        if self.synced_at.is_some() {
            for addr in std::mem::take(&mut self.dirty) {
                self.decide(addr, now, &mut effects);
            }
            for addr in std::mem::take(&mut self.restored) {
                if !self.addresses.get(&addr).is_some_and(|entry| entry.state.answers()) {
                    effects.push(Effect::Release { addr });
                }
            }
            for name in std::mem::take(&mut self.dirty_policies) {
                self.flush_policy(name, &mut effects);
            }
        }
        effects
    }

    /// When to send [`Input::Tick`], if nothing else happens before.
    pub fn next_deadline(&self) -> Option<Instant> {
        let settle = self.synced_at.filter(|_| !self.settled).map(|at| at + SETTLE);
        let announce = self.schedule.keys().next().map(|(at, ..)| *at);
        settle.into_iter().chain(announce).min()
    }

    /// The addresses that this node answers for, sorted: what its presence record should say.
    pub fn claims(&self) -> Vec<IpAddr> {
        self.addresses.iter().filter(|(_, entry)| entry.state.answers()).map(|(addr, _)| *addr).collect()
    }

    /// Everything announced in the cluster, sorted by address.
    pub fn views(&self) -> Vec<Vip> {
        let vip = |(addr, entry): (&IpAddr, &AddressEntry)| {
            let names: Vec<&str> = entry.devices.iter().map(|device| device.name.as_str()).collect();
            let view = VipView {
                address: *addr,
                services: entry.services.iter().map(ToString::to_string).collect(),
                pool: None,
                owner: entry.owner.clone(),
                interface: (!names.is_empty()).then(|| names.join(",")),
                mac: None,
                since: None,
                state: entry.state,
            };
            Vip { view, since: entry.since, devices: entry.devices.clone() }
        };
        self.addresses.iter().map(vip).collect()
    }

    /// What could not be used of a policy's spec, each naming the field and the fix.
    pub fn policy_problems(&self, name: &str) -> Vec<&str> {
        self.policies.get(name).map(|entry| entry.problems().map(String::as_str).collect()).unwrap_or_default()
    }

    fn dirty_all(&mut self) {
        self.dirty.extend(self.addresses.keys().copied());
    }

    fn settle(&mut self, now: Instant) {
        let waited = self.synced_at.is_some_and(|at| now >= at + SETTLE);
        if !self.settled && self.synced_at.is_some() && (waited || self.self_seen) {
            self.settled = true;
            let waiting = self.addresses.iter().filter(|(_, entry)| entry.state == State::Waiting);
            self.dirty.extend(waiting.map(|(addr, _)| *addr));
        }
    }

    fn flush_policy(&mut self, name: SmolStr, effects: &mut Vec<Effect>) {
        let Some(entry) = self.policies.get_mut(&name) else { return };
        let conditions = entry.conditions();
        let there = entry.emitted.as_ref().unwrap_or(&entry.policy.status.conditions);
        let says = |wanted: &Condition| {
            let same =
                |c: &&Condition| (&c.kind, &c.status, &c.message) == (&wanted.kind, &wanted.status, &wanted.message);
            there.iter().find(same).is_some()
        };
        if !conditions.iter().all(says) {
            entry.emitted = Some(conditions.clone());
            effects.push(Effect::PolicyStatus { name, conditions });
        }
    }
}
