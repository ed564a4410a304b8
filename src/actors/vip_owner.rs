//! Decides which announced addresses this node answers for.
//!
//! owns: the ownership state machine
//! hears: changes of services, policies, nodes, devices, programs, members and of where backends are; its alarm; questions
//! about views
//! says: what to answer for and when to announce it (arp_responder), what it claims (membership), policies' conditions
//! restart story: its claims are in this node's presence record and in the answered table; it decides anew from the tables
//! and drops nothing before it has decided
//!
//! Deliberately absent: sockets and maps.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use kinesin_abi::{BackendState, FrontendKind};
use kinesin_core::devices::{Device, Families};
use kinesin_core::objects::{Condition, L2Policy, Node, ObjectKey, Service};
use kinesin_core::ownership::{DeviceId, Effect, Input, Ownership, Placement, Vip};
use kinesin_core::services::{Compiled, Frontend, ServiceKey};
use metrics::gauge;
use smol_str::SmolStr;
use tokio::sync::oneshot;

use crate::actor::{Actor, Failure};
use crate::address::{Address, Label, Timer};
use crate::clock;
use crate::config::Config;
use crate::level::Follower;
use crate::table::Subscription;
use crate::world::{Devices, Leadership, LiveMembers, MapsHandle, StatusKey, StatusOrder, StatusPatch, World};

/// What the owner hears.
pub enum VipOwnerMsg {
    /// One of its inputs changed.
    Wake,
    /// The state machine asked to be woken.
    Alarm,
    /// What do you know of the addresses?
    Views(oneshot::Sender<Vec<Vip>>),
}

impl Label for VipOwnerMsg {
    fn label(&self) -> &'static str {
        match self {
            Self::Wake => "Wake",
            Self::Alarm => "Alarm",
            Self::Views(_) => "Views",
        }
    }
}

/// The actor.
pub struct VipOwner {
    world: World,
    me: Address<VipOwnerMsg>,
    services: Subscription<ObjectKey, Service>,
    policies: Subscription<ObjectKey, L2Policy>,
    nodes: Subscription<ObjectKey, Node>,
    compiled: Subscription<ServiceKey, Compiled>,
    devices: Follower<Devices>,
    maps: Follower<MapsHandle>,
    /// As last logged.
    families: BTreeMap<SmolStr, Families>,
    members: Follower<LiveMembers>,
    leadership: Follower<Leadership>,
    config: Follower<Config>,
    ownership: Ownership,
    synced: bool,
    /// The answered table's keys, by address: a change of one address must not look at the others.
    held: BTreeMap<IpAddr, BTreeSet<u32>>,
    policy_status: BTreeMap<SmolStr, Vec<Condition>>,
    serial: u64,
    alarm: Option<Timer>,
}

impl Actor for VipOwner {
    type Msg = VipOwnerMsg;
    type Args = World;

    async fn start(world: World, me: Address<VipOwnerMsg>) -> Result<Self, Failure> {
        let wake = me.waker(|| VipOwnerMsg::Wake);
        Ok(Self {
            services: world.services.subscribe(wake.clone()),
            policies: world.policies.subscribe(wake.clone()),
            nodes: world.nodes.subscribe(wake.clone()),
            compiled: world.compiled.subscribe(wake.clone()),
            devices: world.devices.follow(wake.clone()),
            maps: world.maps.follow(wake.clone()),
            families: BTreeMap::new(),
            members: world.members.follow(wake.clone()),
            leadership: world.leadership.follow(wake.clone()),
            config: world.config.follow(wake),
            ownership: Ownership::new(world.node.clone()),
            synced: false,
            held: by_address(world.answered.keys()),
            policy_status: BTreeMap::new(),
            serial: world.orders.rows().iter().map(|(_, order)| order.serial).max().unwrap_or(0),
            alarm: None,
            world,
            me,
        })
    }

    async fn handle(&mut self, message: VipOwnerMsg) -> Result<(), Failure> {
        match message {
            VipOwnerMsg::Wake => self.take_changes(),
            VipOwnerMsg::Alarm => self.step(Input::Tick),
            VipOwnerMsg::Views(reply) => {
                // Whoever asked may have given up.
                let _ = reply.send(self.ownership.views());
                return Ok(());
            }
        }
        self.publish();
        Ok(())
    }
}

impl VipOwner {
    fn take_changes(&mut self) {
        // Read before the changes are taken: rows that arrive later come with their own wake-up.
        let complete = self.is_everything_here();
        // Switched off means that no policy is in force.
        let reconfigured = self.config.changed().is_some();
        if reconfigured {
            self.policies.mark_all();
        }
        let enabled = self.world.config().l2.enabled;
        for (key, node) in self.nodes.take() {
            self.step(node.map_or(Input::NodeRemoved(key), Input::NodeUpserted));
        }
        for (key, policy) in self.policies.take() {
            self.step(policy.filter(|_| enabled).map_or(Input::PolicyRemoved(key), Input::PolicyUpserted));
        }
        for (service, compiled) in self.compiled.take() {
            let placement = compiled.as_deref().map(placement).unwrap_or_default();
            self.step(Input::Placed { service, placement });
        }
        for (key, service) in self.services.take() {
            self.step(service.map_or(Input::ServiceRemoved(key), Input::ServiceUpserted));
        }
        if (self.devices.changed().is_some() | self.maps.changed().is_some() | reconfigured)
            && let Some(announcers) = self.world.announcers()
        {
            self.note_families(&announcers);
            self.step(Input::Devices(announcers));
        }
        if let Some(live) = self.members.changed() {
            self.step(Input::Members(live.members.clone()));
        }
        if complete && !self.synced {
            self.synced = true;
            self.step(Input::Restored(self.held_before()));
            self.step(Input::Synced);
            self.forget_unclaimed();
            self.world.answered.set_complete();
        }
        if self.leadership.changed().is_some() {
            self.order_policy_status();
        }
    }

    /// One line for each device whose IP versions change.
    fn note_families(&mut self, announcers: &[(Device, Families)]) {
        let families: BTreeMap<_, _> = announcers.iter().map(|(device, can)| (device.name.clone(), *can)).collect();
        for (device, can) in families.iter().filter(|(name, can)| self.families.get(*name) != Some(*can)) {
            let Families { ipv4, ipv6 } = *can;
            tracing::info!(%device, ipv4, ipv6, "can answer for addresses");
        }
        self.families = families;
    }

    fn is_everything_here(&self) -> bool {
        let world = &self.world;
        world.services.is_complete()
            && world.policies.is_complete()
            && world.nodes.is_complete()
            && world.compiled.is_complete()
            && world.devices.get().is_some()
            && world.members.get().is_some_and(|live| live.settled)
    }

    /// What an earlier instance claimed: of this process (the answered table), or of one before (the presence record).
    fn held_before(&self) -> Vec<IpAddr> {
        let mut held: BTreeSet<_> = self.held.keys().copied().collect();
        if let Some(live) = self.world.members.get() {
            let mine = live.members.records.get(&self.world.node);
            held.extend(mine.iter().flat_map(|record| record.claims.iter().copied()));
        }
        held.into_iter().collect()
    }

    fn step(&mut self, input: Input) {
        for effect in self.ownership.step(input, clock::now()) {
            match effect {
                Effect::Claim { addr, devices } => self.claim(addr, &devices),
                Effect::Release { addr } => self.release(addr, &[]),
                Effect::Announce { addr, device } => {
                    let key = (addr, device.ifindex);
                    let before = self.world.answered.get(&key).map_or(0, |count| *count);
                    self.answer(key, before + 1);
                }
                Effect::PolicyStatus { name, conditions } => {
                    self.policy_status.insert(name.clone(), conditions);
                    self.order_status_of(&name);
                }
            }
        }
    }

    fn claim(&mut self, addr: IpAddr, devices: &[DeviceId]) {
        let names: Vec<_> = devices.iter().map(|device| device.name.as_str()).collect();
        tracing::info!(address = %addr, devices = names.join(" "), "claimed");
        for device in devices {
            let key = (addr, device.ifindex);
            if self.world.answered.get(&key).is_none() {
                self.answer(key, 0);
            }
        }
        self.release(addr, devices);
    }

    fn answer(&mut self, key: (IpAddr, u32), announcements: u64) {
        self.held.entry(key.0).or_default().insert(key.1);
        self.world.answered.put(key, announcements);
    }

    /// Stops answering for an address, except on these devices.
    fn release(&mut self, addr: IpAddr, except: &[DeviceId]) {
        let Some(devices) = self.held.get_mut(&addr) else { return };
        let answered = &self.world.answered;
        devices.retain(|ifindex| {
            let stays = except.iter().any(|device| device.ifindex == *ifindex);
            if !stays && answered.remove(&(addr, *ifindex)) {
                tracing::info!(address = %addr, ifindex, "released");
            }
            stays
        });
        if devices.is_empty() {
            self.held.remove(&addr);
        }
    }

    fn forget_unclaimed(&mut self) {
        let claims: BTreeSet<_> = self.ownership.claims().into_iter().collect();
        let unclaimed: Vec<_> = self.held.keys().copied().filter(|addr| !claims.contains(addr)).collect();
        unclaimed.into_iter().for_each(|addr| self.release(addr, &[]));
    }

    /// Every agent comes to the same conditions; the elected one writes them.
    fn order_policy_status(&mut self) {
        let names: Vec<_> = self.policy_status.keys().cloned().collect();
        names.iter().for_each(|name| self.order_status_of(name));
    }

    fn order_status_of(&mut self, name: &SmolStr) {
        let key = StatusKey::Policy(name.clone());
        let leading = self.world.leadership.get().is_some_and(|leadership| leadership.leading);
        match self.policy_status.get(name).filter(|_| leading) {
            Some(conditions) => {
                self.serial += 1;
                let status = StatusPatch::Conditions(conditions.clone());
                self.world.orders.put(key, StatusOrder { serial: self.serial, status });
            }
            None => drop(self.world.orders.remove(&key)),
        }
    }

    fn publish(&mut self) {
        if self.synced {
            let claims = self.ownership.claims();
            gauge!("kinesin_l2_claims").set(claims.len() as f64);
            self.world.claims.set(claims);
        }
        self.alarm = self.ownership.next_deadline().map(|at| {
            let delay = at.saturating_duration_since(clock::now());
            self.me.cast_after(delay, VipOwnerMsg::Alarm)
        });
    }
}

fn by_address(keys: Vec<(IpAddr, u32)>) -> BTreeMap<IpAddr, BTreeSet<u32>> {
    let mut held = BTreeMap::<_, BTreeSet<_>>::new();
    for (addr, ifindex) in keys {
        held.entry(addr).or_default().insert(ifindex);
    }
    held
}

/// Where a Service's ready backends are; of one that is at no address that could be announced, nothing: most have none.
fn placement(compiled: &Compiled) -> Placement {
    let outside = |frontend: &Frontend| matches!(frontend.kind, FrontendKind::LoadBalancer | FrontendKind::ExternalIps);
    if !compiled.frontends.iter().any(outside) {
        return Placement::default();
    }
    let backends = compiled.sets.iter().flat_map(|set| set.backends.iter());
    let mut placement = Placement::default();
    for backend in backends.filter(|backend| backend.state == BackendState::Active) {
        if backend.node.is_empty() {
            placement.anywhere = true;
        } else {
            placement.nodes.insert(SmolStr::from(&backend.node));
        }
    }
    placement
}

/// Asks for everything that is known of the addresses; `None` while nobody is there to answer.
pub async fn views(owner: &Address<VipOwnerMsg>) -> Option<Vec<Vip>> {
    let (reply, answer) = oneshot::channel();
    owner.cast(VipOwnerMsg::Views(reply));
    tokio::time::timeout(std::time::Duration::from_secs(2), answer).await.ok()?.ok()
}
