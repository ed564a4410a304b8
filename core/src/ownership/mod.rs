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

use crate::devices::Device;
use crate::objects::{Condition, L2Policy, Node, Object, ObjectKey, Service, StringMap};
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
    /// This node's selected devices, all of them.
    Devices(Vec<Device>),
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
    devices: BTreeMap<SmolStr, Device>,
    /// The other live nodes.
    members: BTreeMap<SmolStr, Arc<Record>>,
    self_seen: bool,
    /// Other live nodes by the addresses that they claim.
    claims: HashMap<IpAddr, BTreeSet<SmolStr>>,
    restored: BTreeSet<IpAddr>,
    addresses: BTreeMap<IpAddr, AddressEntry>,
    /// Announcements to come: when, what, where; and how many after it.
    schedule: BTreeMap<(Instant, IpAddr, u32), (DeviceId, u8)>,
    dirty: BTreeSet<IpAddr>,
    dirty_policies: BTreeSet<SmolStr>,
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

    fn service_upserted(&mut self, service: Arc<Service>) {
        let key = service.key();
        let before = self.services.remove(&key);
        if let Some(entry) = &before
            && entry.service == service
        {
            self.services.extend(before.map(|entry| (key, entry)));
            return;
        }
        let mut offers: BTreeMap<IpAddr, Vec<SmolStr>> = BTreeMap::new();
        for (name, policy) in &self.policies {
            for addr in policy.addresses_of(&service) {
                offers.entry(addr).or_default().push(name.clone());
            }
        }
        let old = before.map(|entry| entry.offers).unwrap_or_default();
        self.reindex(&key, &old, &offers);
        self.services.insert(key, ServiceEntry { service, offers });
    }

    fn service_removed(&mut self, key: &ObjectKey) {
        if let Some(entry) = self.services.remove(key) {
            self.reindex(key, &entry.offers, &BTreeMap::new());
        }
    }

    /// Brings the indexes from what a Service offered to what it offers.
    fn reindex(&mut self, key: &ObjectKey, old: &BTreeMap<IpAddr, Vec<SmolStr>>, new: &BTreeMap<IpAddr, Vec<SmolStr>>) {
        let policies = |offers: &BTreeMap<IpAddr, Vec<SmolStr>>| offers.values().flatten().cloned().collect();
        let (had, has): (BTreeSet<SmolStr>, BTreeSet<SmolStr>) = (policies(old), policies(new));
        for name in had.symmetric_difference(&has) {
            if let Some(policy) = self.policies.get_mut(name) {
                match has.contains(name) {
                    true => policy.services.insert(key.clone()),
                    false => policy.services.remove(key),
                };
            }
        }
        for addr in old.keys().filter(|addr| !new.contains_key(*addr)) {
            if let Some(entry) = self.addresses.get_mut(addr) {
                entry.services.remove(key);
            }
        }
        for addr in new.keys() {
            self.addresses.entry(*addr).or_default().services.insert(key.clone());
        }
        self.dirty.extend(old.keys().chain(new.keys()));
    }

    fn placed(&mut self, key: ObjectKey, placement: Placement) {
        if *self.placements.get(&key).unwrap_or(&Placement::default()) == placement {
            return;
        }
        if let Some(entry) = self.services.get(&key) {
            self.dirty.extend(entry.offers.keys());
        }
        // Kept when the Service goes: it may come back before its endpoints change.
        match placement == Placement::default() {
            true => self.placements.remove(&key),
            false => self.placements.insert(key, placement),
        };
    }

    fn policy_upserted(&mut self, policy: Arc<L2Policy>) {
        let name = policy.metadata.name.clone();
        self.dirty_policies.insert(name.clone());
        if let Some(entry) = self.policies.get_mut(&name)
            && entry.policy.spec == policy.spec
        {
            if entry.policy != policy {
                entry.policy = policy;
                entry.emitted = None;
            }
            return;
        }
        self.policy_replaced(&name, Some(PolicyEntry::read(policy)));
    }

    fn policy_removed(&mut self, name: &SmolStr) {
        self.dirty_policies.remove(name);
        self.policy_replaced(name, None);
    }

    fn policy_replaced(&mut self, name: &SmolStr, new: Option<PolicyEntry>) {
        let old = self.policies.remove(name);
        let mut affected = old.map(|entry| entry.services).unwrap_or_default();
        if let Some(mut entry) = new {
            entry.services.clone_from(&affected);
            for service in self.services.values() {
                if !entry.addresses_of(&service.service).is_empty() {
                    affected.insert(service.service.key());
                }
            }
            self.policies.insert(name.clone(), entry);
            let nodes: Vec<SmolStr> = self.members.keys().chain([&self.me]).cloned().collect();
            for node in nodes {
                self.refresh_nodes(Some(name), &node);
            }
        }
        for key in affected {
            let Some(entry) = self.services.get(&key) else { continue };
            let addresses = self.policies.get(name).map(|p| p.addresses_of(&entry.service)).unwrap_or_default();
            let mut offers = entry.offers.clone();
            for policies in offers.values_mut() {
                policies.retain(|policy| policy != name);
            }
            for addr in addresses {
                let policies = offers.entry(addr).or_default();
                let at = policies.partition_point(|policy| policy < name);
                policies.insert(at, name.clone());
            }
            offers.retain(|_, policies| !policies.is_empty());
            let old = entry.offers.clone();
            self.reindex(&key, &old, &offers);
            if let Some(entry) = self.services.get_mut(&key) {
                entry.offers = offers;
            }
        }
    }

    fn labels_changed(&mut self, node: &SmolStr, labels: Option<&StringMap>) {
        if self.labels.get(node) == labels {
            return;
        }
        match labels {
            Some(labels) => self.labels.insert(node.clone(), labels.clone()),
            None => self.labels.remove(node),
        };
        self.refresh_nodes(None, node);
    }

    fn members_changed(&mut self, members: Members) {
        let self_seen_changed = std::mem::replace(&mut self.self_seen, members.self_seen) != members.self_seen;
        let mut records = members.records;
        records.remove(&self.me);
        let old = std::mem::replace(&mut self.members, records);
        let names: BTreeSet<SmolStr> = old.keys().chain(self.members.keys()).cloned().collect();
        for node in names {
            let (before, after) = (old.get(&node), self.members.get(&node).cloned());
            if before == after.as_ref() {
                continue;
            }
            let claims = |record: Option<&Arc<Record>>| -> BTreeSet<IpAddr> {
                record.into_iter().flat_map(|r| &r.claims).map(|ip| ip.to_canonical()).collect()
            };
            let (had, has) = (claims(before), claims(after.as_ref()));
            for addr in had.symmetric_difference(&has) {
                let nodes = self.claims.entry(*addr).or_default();
                match has.contains(addr) {
                    true => nodes.insert(node.clone()),
                    false => nodes.remove(&node),
                };
                if nodes.is_empty() {
                    self.claims.remove(addr);
                }
                self.dirty.insert(*addr);
            }
            if before.is_some_and(|r| r.draining) != after.is_some_and(|r| r.draining) {
                self.dirty_all();
            }
            self.refresh_nodes(None, &node);
        }
        if !self_seen_changed {
            return;
        }
        // Claims of others weigh differently while our own is not seen.
        let contested = self.addresses.keys().filter(|addr| self.claims.contains_key(*addr));
        let contested: Vec<IpAddr> = contested.copied().collect();
        self.dirty.extend(contested);
    }

    /// Brings up to date which of a node's devices the policies (or one of them) select.
    fn refresh_nodes(&mut self, only: Option<&SmolStr>, node: &SmolStr) {
        let labels = self.labels.get(node);
        for (name, policy) in &mut self.policies {
            if only.is_some_and(|only| only != name) {
                continue;
            }
            let devices = match self.members.get(node) {
                _ if *node == self.me => policy.devices_on(labels, self.devices.keys()),
                Some(record) => policy.devices_on(labels, record.devices.iter()),
                None => Vec::new(),
            };
            let old = match devices.is_empty() {
                true => policy.nodes.remove(node),
                false => policy.nodes.insert(node.clone(), devices),
            };
            if old.as_ref() != policy.nodes.get(node) {
                for key in &policy.services {
                    if let Some(entry) = self.services.get(key) {
                        self.dirty.extend(entry.offers.keys());
                    }
                }
            }
        }
    }

    fn devices_changed(&mut self, devices: Vec<Device>, now: Instant, effects: &mut Vec<Effect>) {
        let live = devices.into_iter().filter(Device::is_live).map(|device| (device.name.clone(), device));
        let old = std::mem::replace(&mut self.devices, live.collect());
        let me = self.me.clone();
        self.refresh_nodes(None, &me);
        // The same name with another number or MAC is another card: whoever talks to us has to learn that.
        let swapped = |name: &SmolStr| match (old.get(name), self.devices.get(name)) {
            (Some(old), Some(new)) if (old.ifindex, old.mac) != (new.ifindex, new.mac) => {
                Some(DeviceId { ifindex: new.ifindex, name: name.clone() })
            }
            _ => None,
        };
        let swapped: Vec<DeviceId> = self.devices.keys().filter_map(swapped).collect();
        if swapped.is_empty() {
            return;
        }
        let mut again = Vec::new();
        for (addr, entry) in self.addresses.iter().filter(|(_, entry)| entry.state.answers()) {
            for device in &swapped {
                match entry.devices.iter().find(|d| d.name == device.name) {
                    Some(known) if known == device => again.push((*addr, device.clone())),
                    // The claim itself changes, and announces.
                    Some(_) => drop(self.dirty.insert(*addr)),
                    None => {}
                }
            }
        }
        for (addr, device) in again {
            self.announce(addr, device, ANNOUNCE_COUNT, now, effects);
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
