//! Shows that this agent is there, and watches who else is.
//!
//! owns: this node's presence Lease, and the judgement of everybody's
//! hears: changes of Leases, of this node's claims, devices, configuration and data path; results of its own writes; its
//! alarms
//! says: the members level
//! restart story: reads its own record back, with the addresses that it answered for; the others do not notice
//!
//! A presence Lease is not given up on an orderly stop: the pinned programs go on answering until it runs out, so that a
//! restarted agent finds everything as it left it. API load: one write per node and renewal, whatever the number of
//! services. Deliberately absent: deciding who owns what.

use std::net::IpAddr;
use std::sync::Arc;

use kinesin_core::devices::Families;
use kinesin_core::objects::{Lease, LeaseSpec, Meta, ObjectKey};
use kinesin_core::presence::{ANNOTATION, Link, Record, TAKES_IPIP, TAKES_OPT, Tracker, lease_name};
use metrics::gauge;
use smol_str::SmolStr;

use super::leader_elector::{in_time, timing};
use crate::actor::{Actor, Failure};
use crate::address::{Address, Label, Timer};
use crate::clock;
use crate::config::Config;
use crate::level::Follower;
use crate::source::{Source, WriteError};
use crate::table::Subscription;
use crate::world::{Devices, LiveMembers, MapsHandle, World};

/// What membership hears.
pub enum MembershipMsg {
    /// Leases, claims or devices changed.
    Wake,
    /// Time to renew.
    Renew,
    /// Somebody's presence may have run out.
    Alarm,
    /// A write has ended.
    Written(Result<Box<Lease>, WriteError>),
}

impl Label for MembershipMsg {
    fn label(&self) -> &'static str {
        match self {
            Self::Wake => "Wake",
            Self::Renew => "Renew",
            Self::Alarm => "Alarm",
            Self::Written(_) => "Written",
        }
    }
}

/// The actor.
pub struct Membership {
    world: World,
    source: Arc<dyn Source>,
    me: Address<MembershipMsg>,
    leases: Subscription<ObjectKey, Lease>,
    claims: Follower<Vec<IpAddr>>,
    devices: Follower<Devices>,
    /// What makes this node ready to take packets that others hand on to it.
    readiness: (Follower<MapsHandle>, Follower<bool>),
    config: Follower<Config>,
    /// As last written.
    takes: (Vec<Link>, Vec<SmolStr>),
    /// As last written.
    announcers: Vec<(SmolStr, Families)>,
    tracker: Tracker,
    /// The Leases that the tracker knows are all there are.
    settled: bool,
    instance: SmolStr,
    since: SmolStr,
    acquired: Option<SmolStr>,
    /// Of this node's Lease, as last written or seen.
    version: SmolStr,
    writing: bool,
    /// Something to say since the last write was sent off.
    stale: bool,
    renew: Option<Timer>,
    alarm: Option<Timer>,
}

impl Actor for Membership {
    type Msg = MembershipMsg;
    type Args = (World, Arc<dyn Source>);

    async fn start((world, source): Self::Args, me: Address<MembershipMsg>) -> Result<Self, Failure> {
        let wake = me.waker(|| MembershipMsg::Wake);
        me.cast(MembershipMsg::Renew);
        Ok(Self {
            leases: world.leases.subscribe(wake.clone()),
            claims: world.claims.follow(wake.clone()),
            devices: world.devices.follow(wake.clone()),
            readiness: (world.maps.follow(wake.clone()), world.programmed.follow(wake.clone())),
            config: world.config.follow(wake),
            takes: Default::default(),
            announcers: Vec::new(),
            tracker: Tracker::new(world.node.clone()),
            settled: false,
            instance: format!("{:08x}", rand::random::<u32>()).into(),
            since: clock::micro_time(),
            acquired: None,
            version: SmolStr::default(),
            writing: false,
            stale: false,
            renew: None,
            alarm: None,
            world,
            source,
            me,
        })
    }

    async fn handle(&mut self, message: MembershipMsg) -> Result<(), Failure> {
        match message {
            MembershipMsg::Wake => {
                self.observe();
                let said_anew = self.claims.changed().is_some() | self.devices.changed().is_some();
                let ready_anew = self.readiness.0.changed().is_some()
                    | self.readiness.1.changed().is_some()
                    | self.config.changed().is_some();
                let differs = || self.takes() != self.takes || self.announcers() != self.announcers;
                if (said_anew || ready_anew && differs()) && self.world.claims.get().is_some() {
                    self.write();
                }
            }
            MembershipMsg::Renew => {
                // The first message of an instance, which knows nobody yet: to publish that would make this node claim
                // everything.
                self.observe();
                // Two renewals may be lost before the others notice.
                let period = timing(&self.world.config()).sanitised().0.lease_duration / 3;
                self.renew = Some(self.me.cast_after(period, MembershipMsg::Renew));
                self.write();
            }
            MembershipMsg::Alarm => {}
            MembershipMsg::Written(result) => self.written(result),
        }
        self.publish();
        Ok(())
    }
}

impl Membership {
    fn observe(&mut self) {
        let now = clock::now();
        // Read before the changes are taken: a list that is completed meanwhile comes with its own wake-up.
        self.settled = self.world.leases.is_complete();
        let mut unreadable = Vec::new();
        for (key, lease) in self.leases.take() {
            let Some(lease) = lease else {
                self.tracker.removed(&key.name);
                continue;
            };
            if key.name == lease_name(&self.world.node) {
                self.acquired = lease.spec.acquire_time.clone();
                self.version = lease.metadata.resource_version.clone();
            }
            if let Err(error) = self.tracker.observe(&lease, now) {
                unreadable.push(error.to_string());
            }
        }
        if !unreadable.is_empty() {
            self.world.problems.set("presence records", unreadable);
        }
    }

    /// Writes this node's record. Before the first decision about ownership nothing is written: an empty record would
    /// give away what this node still answers for.
    fn write(&mut self) {
        let Some(claims) = self.world.claims.get() else { return };
        if self.writing {
            self.stale = true;
            return;
        }
        if !self.world.leases.is_complete() {
            return;
        }
        (self.writing, self.stale) = (true, false);
        let lease = self.lease(&claims);
        let deadline = timing(&self.world.config()).sanitised().0.renew_deadline;
        let (source, me) = (self.source.clone(), self.me.clone());
        tokio::spawn(async move {
            let result = in_time(deadline, put(&*source, lease)).await;
            me.cast(MembershipMsg::Written(result));
        });
    }

    /// Devices on which this node takes packets that others hand on to it, and in which other ways it does. While a new
    /// agent is not ready yet, those of the one before: its programs go on.
    fn takes(&self) -> (Vec<Link>, Vec<SmolStr>) {
        if self.world.programmed.get().is_none_or(|programmed| !*programmed) {
            let mine = self.world.leases.get(&ObjectKey::new("", lease_name(&self.world.node)));
            let mine = mine.and_then(|lease| Record::from_lease(&lease).ok());
            return mine.map_or_else(Default::default, |record| (record.links, record.takes));
        }
        let (Some(devices), Some(maps)) = (self.world.devices.get(), self.world.maps.get()) else {
            return Default::default();
        };
        let links = devices.selected().filter(|device| maps.serves(&device.name)).filter_map(Link::of).collect();
        (links, vec![TAKES_IPIP.into(), TAKES_OPT.into()])
    }

    /// Devices that can carry frames now, and in which IP versions this node answers there.
    fn announcers(&self) -> Vec<(SmolStr, Families)> {
        let all = self.world.announcers().unwrap_or_default().into_iter();
        all.filter(|(device, _)| device.is_live()).map(|(device, can)| (device.name, can)).collect()
    }

    fn lease(&mut self, claims: &[IpAddr]) -> Lease {
        self.takes = self.takes();
        self.announcers = self.announcers();
        let (links, takes) = self.takes.clone();
        let mut record = Record {
            links,
            takes,
            node: self.world.node.clone(),
            instance: self.instance.clone(),
            since: self.since.clone(),
            claims: claims.to_vec(),
            gone: self.tracker.gone(),
            ..Record::default()
        };
        record.set_announcers(self.announcers.iter().cloned());
        let name = SmolStr::from(lease_name(&self.world.node));
        let now = clock::micro_time();
        let seconds = timing(&self.world.config()).sanitised().0.lease_duration.as_secs_f64().ceil();
        Lease {
            metadata: Meta {
                name,
                resource_version: self.version.clone(),
                annotations: [(ANNOTATION.into(), record.to_annotation().into())].into(),
                ..Meta::default()
            },
            spec: LeaseSpec {
                holder_identity: Some(self.world.node.clone()),
                lease_duration_seconds: Some(seconds as u32),
                acquire_time: Some(self.acquired.clone().unwrap_or_else(|| now.clone())),
                renew_time: Some(now),
                lease_transitions: None,
            },
        }
    }

    fn written(&mut self, result: Result<Box<Lease>, WriteError>) {
        self.writing = false;
        match result {
            Ok(lease) => {
                self.world.problems.clear("presence");
                // Sooner than the watch. Only the version: as a sign of life it would vouch for a watch that may be broken
                // while writes go through, and the others would be declared dead.
                self.version = lease.metadata.resource_version;
            }
            Err(error) => self.world.problems.set("presence", vec![error.to_string()]),
        }
        if self.stale {
            self.write();
        }
    }

    fn publish(&mut self) {
        let now = clock::now();
        let expired = self.tracker.expire(now);
        for change in &expired {
            tracing::warn!(?change, "presence ran out");
        }
        if !expired.is_empty() {
            // So that a restart does not take their last words for news.
            self.write();
        }
        let members = self.tracker.alive(now);
        gauge!("kinesin_members").set(members.records.len() as f64);
        self.world.members.set(LiveMembers { members, settled: self.settled });
        self.alarm = self.tracker.next_deadline(now).map(|at| {
            let delay = at.saturating_duration_since(now) + std::time::Duration::from_millis(1);
            self.me.cast_after(delay, MembershipMsg::Alarm)
        });
    }
}

/// Nobody else writes this Lease: a conflict means that the version was an old one.
async fn put(source: &dyn Source, mut lease: Lease) -> Result<Lease, WriteError> {
    match source.put_lease(&lease).await {
        Err(WriteError::Conflict { .. } | WriteError::NotFound { .. }) => {
            let stored = source.get_lease(&lease.metadata.name).await?;
            lease.metadata.resource_version = stored.map(|lease| lease.metadata.resource_version).unwrap_or_default();
            source.put_lease(&lease).await
        }
        result => result,
    }
}
