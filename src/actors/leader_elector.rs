//! Elects the one agent that has the cluster-wide duties.
//!
//! owns: this agent's candidacy for one Lease
//! hears: changes of that Lease, results of its own writes, its alarm
//! says: the leadership level
//! restart story: waits for the Lease as it is and takes up where its holder field says; a leader that restarts renews
//!
//! Deliberately absent: the duties. Those who have them follow the level.

use std::sync::Arc;
use std::time::Duration;

use kinesin_core::objects::{Lease, Meta, Object, ObjectKey};
use kinesin_core::presence::election::{Effect, Input};
use kinesin_core::presence::{Election, Timing};
use metrics::gauge;

use crate::actor::{Actor, Failure};
use crate::address::{Address, Label, Timer};
use crate::clock;
use crate::config::Config;
use crate::level::Follower;
use crate::source::{Source, WriteError};
use crate::table::Subscription;
use crate::world::{Leadership, World};

/// What the elector hears.
pub enum LeaderElectorMsg {
    /// A Lease or the timing changed.
    Wake,
    /// The state machine asked to be woken.
    Alarm,
    /// A write has ended.
    Written(Result<Box<Lease>, WriteError>),
}

impl Label for LeaderElectorMsg {
    fn label(&self) -> &'static str {
        match self {
            Self::Wake => "Wake",
            Self::Alarm => "Alarm",
            Self::Written(_) => "Written",
        }
    }
}

/// Name of the Lease.
pub const LEASE: &str = "kinesin-leader";

/// The actor.
pub struct LeaderElector {
    world: World,
    source: Arc<dyn Source>,
    me: Address<LeaderElectorMsg>,
    leases: Subscription<ObjectKey, Lease>,
    config: Follower<Config>,
    election: Election,
    introduced: bool,
    alarm: Option<Timer>,
}

impl Actor for LeaderElector {
    type Msg = LeaderElectorMsg;
    type Args = (World, Arc<dyn Source>);

    async fn start((world, source): Self::Args, me: Address<LeaderElectorMsg>) -> Result<Self, Failure> {
        let wake = me.waker(|| LeaderElectorMsg::Wake);
        Ok(Self {
            leases: world.leases.subscribe(wake.clone()),
            config: world.config.follow(wake),
            election: Election::new(world.node.clone(), timing(&world.config())),
            introduced: false,
            alarm: None,
            world,
            source,
            me,
        })
    }

    async fn handle(&mut self, message: LeaderElectorMsg) -> Result<(), Failure> {
        match message {
            LeaderElectorMsg::Wake => self.wake(),
            LeaderElectorMsg::Alarm => self.step(Input::Tick),
            LeaderElectorMsg::Written(Ok(lease)) => self.step(Input::WriteSucceeded(*lease)),
            LeaderElectorMsg::Written(Err(error)) => {
                tracing::debug!(%error, "lease not written");
                self.step(Input::WriteFailed);
            }
        }
        Ok(())
    }

    async fn stop(&mut self) {
        // The next one need not wait; a write that fails now costs it one lease duration.
        for effect in self.election.step(Input::Release, clock::now()) {
            if let Effect::Write { spec, resource_version } = effect {
                let _ = self.source.put_lease(&lease(spec, resource_version)).await;
            }
        }
        self.world.leadership.set(Leadership::default());
    }
}

impl LeaderElector {
    fn wake(&mut self) {
        if let Some(config) = self.config.changed() {
            self.election.set_timing(timing(&config));
        }
        // Read before the changes are taken: rows that arrive later come with their own wake-up.
        let complete = self.world.leases.is_complete();
        let changed = self.leases.take().into_iter().find(|(key, _)| key.name == LEASE);
        match changed {
            Some((_, lease)) => {
                self.introduced = true;
                self.step(Input::Lease(lease.map(|lease| Lease::clone(&lease))));
            }
            // The list is complete and there is none.
            None if complete && !self.introduced => {
                self.introduced = true;
                self.step(Input::Lease(None));
            }
            None => {}
        }
    }

    fn step(&mut self, input: Input) {
        let effects = self.election.step(input, clock::now());
        for effect in effects {
            match effect {
                Effect::Write { spec, resource_version } => self.write(lease(spec, resource_version)),
                Effect::BecameLeader => tracing::info!("elected: this agent has the cluster-wide duties"),
                Effect::LostLeadership => tracing::warn!("no longer the elected agent"),
                Effect::WakeAt(at) => {
                    let delay = at.saturating_duration_since(clock::now());
                    self.alarm = Some(self.me.cast_after(delay, LeaderElectorMsg::Alarm));
                }
            }
        }
        let leading = self.election.is_leader();
        gauge!("kinesin_leader").set(f64::from(u8::from(leading)));
        self.world.leadership.set(Leadership { leading, holder: self.election.holder().map(Into::into) });
    }

    fn write(&self, lease: Lease) {
        let deadline = timing(&self.world.config()).sanitised().0.renew_deadline;
        let (source, me) = (self.source.clone(), self.me.clone());
        tokio::spawn(async move {
            let result = in_time(deadline, source.put_lease(&lease)).await;
            me.cast(LeaderElectorMsg::Written(result));
        });
    }
}

/// The Lease to write, stamped.
fn lease(mut spec: kinesin_core::objects::LeaseSpec, resource_version: Option<smol_str::SmolStr>) -> Lease {
    let now = clock::micro_time();
    spec.acquire_time.get_or_insert_with(|| now.clone());
    spec.renew_time = Some(now);
    let metadata =
        Meta { name: LEASE.into(), resource_version: resource_version.unwrap_or_default(), ..Meta::default() };
    Lease { metadata, spec }
}

/// A call that outlasts the renew deadline must not keep the next renewal from being tried: its outcome is unknown.
pub(super) async fn in_time(
    deadline: Duration,
    write: impl Future<Output = Result<Lease, WriteError>>,
) -> Result<Box<Lease>, WriteError> {
    let late = || {
        let message = format!("no answer within {deadline:?}");
        WriteError::Unavailable { kind: Lease::KIND, name: "of this agent".into(), message }
    };
    tokio::time::timeout(deadline, write).await.unwrap_or_else(|_| Err(late())).map(Box::new)
}

/// The timing that the L2 keys ask for.
pub fn timing(config: &Config) -> Timing {
    Timing {
        lease_duration: config.l2.lease_duration,
        renew_deadline: config.l2.renew_deadline,
        retry_period: config.l2.retry_period,
    }
}
