//! One holder of one Lease, for duties that only one agent may have.
//!
//! The protocol is the one of Kubernetes' own components, so that its Leases read the same: who finds the Lease free, or
//! unchanged for its duration as seen from here, writes itself into it; the holder renews; who cannot renew in time
//! stops before others may start. Writes are conditional on the resource version, so that two never both succeed.
//! Deliberately absent: the wall clock (the writer stamps `renewTime`, and `acquireTime` where it is left out) and jitter.

use std::time::{Duration, Instant};

use smol_str::SmolStr;

use crate::objects::{Lease, LeaseSpec};

/// How long a Lease is good for, how long its holder tries to renew it, and how often everybody tries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// Others wait this long after the last change that they saw.
    pub lease_duration: Duration,
    /// The holder gives up when it has not managed to renew for this long.
    pub renew_deadline: Duration,
    /// Between attempts.
    pub retry_period: Duration,
}

impl Default for Timing {
    /// The defaults of `l2-announcements-lease-duration` and its siblings.
    fn default() -> Self {
        let seconds = Duration::from_secs;
        Self { lease_duration: seconds(15), renew_deadline: seconds(5), retry_period: seconds(2) }
    }
}

impl Timing {
    /// Values that work, and a warning for each that had to be changed.
    pub fn sanitised(self) -> (Self, Vec<String>) {
        let mut timing = self;
        let mut warnings = Vec::new();
        let mut change = |what: &str, why: &str, value: &mut Duration, to: Duration| {
            warnings.push(format!("{what} {value:?} {why}; using {to:?}"));
            *value = to;
        };
        let second = Duration::from_secs(1);
        if timing.lease_duration < second {
            change("lease duration", "is below one second", &mut timing.lease_duration, second);
        }
        if timing.renew_deadline.is_zero() {
            change("renew deadline", "is zero", &mut timing.renew_deadline, second);
        }
        if timing.retry_period.is_zero() {
            change("retry period", "is zero", &mut timing.retry_period, Duration::from_millis(200));
        }
        if timing.lease_duration <= timing.renew_deadline {
            let to = timing.lease_duration / 2;
            change("renew deadline", "is not below the lease duration", &mut timing.renew_deadline, to);
        }
        // Below 1.2 retry periods a single late attempt would lose the Lease.
        if timing.renew_deadline * 5 <= timing.retry_period * 6 {
            let to = timing.renew_deadline / 2;
            change("retry period", "is not well below the renew deadline", &mut timing.retry_period, to);
        }
        (timing, warnings)
    }
}

/// What the election hears.
#[derive(Clone, Debug)]
pub enum Input {
    /// The Lease as it is now; `None` when there is none.
    Lease(Option<Lease>),
    /// Our write landed; the Lease as the server returned it.
    WriteSucceeded(Lease),
    /// Our write was refused because the Lease had changed, or it failed for any other reason.
    WriteFailed,
    /// Time has passed.
    Tick,
    /// Stop: let go, so that the next one need not wait.
    Release,
}

/// What should happen.
#[derive(Clone, Debug, PartialEq)]
pub enum Effect {
    /// Write the Lease, on the condition that it has not changed. Answer with `WriteSucceeded` or `WriteFailed`; after
    /// a conflict, send the Lease as it is now first.
    Write {
        /// `renewTime` is to be stamped by the writer; `acquireTime` too, where it is absent.
        spec: LeaseSpec,
        /// Of the Lease to replace; `None` to create it.
        resource_version: Option<SmolStr>,
    },
    /// This agent has the duty now.
    BecameLeader,
    /// This agent must stop at once.
    LostLeadership,
    /// Send [`Input::Tick`] then, or a little later.
    WakeAt(Instant),
}

/// The state machine of one candidate. It starts by waiting for the first [`Input::Lease`].
#[derive(Clone, Debug)]
pub struct Election {
    me: SmolStr,
    timing: Timing,
    /// The Lease as last seen, once it was; inside, `None` when there is none.
    seen: Option<Option<Lease>>,
    /// When it was last seen to change.
    changed_at: Option<Instant>,
    /// When the oldest write that has not been answered was sent off.
    writing_since: Option<Instant>,
    /// When the last one was.
    last_sent: Option<Instant>,
    next_attempt: Option<Instant>,
    /// When the write that made or kept us leader was sent off: before any other could have seen it.
    renewed_at: Option<Instant>,
    released: bool,
    emptied: bool,
}

impl Election {
    /// A candidate of that identity.
    pub fn new(me: impl Into<SmolStr>, timing: Timing) -> Self {
        Self {
            me: me.into(),
            timing: timing.sanitised().0,
            seen: None,
            changed_at: None,
            writing_since: None,
            last_sent: None,
            next_attempt: None,
            renewed_at: None,
            released: false,
            emptied: false,
        }
    }

    /// Has the duty.
    pub fn is_leader(&self) -> bool {
        self.renewed_at.is_some()
    }

    /// Who has it, as far as the Lease says.
    pub fn holder(&self) -> Option<&str> {
        let lease = self.seen.as_ref()?.as_ref()?;
        lease.spec.holder_identity.as_deref().filter(|holder| !holder.is_empty())
    }

    fn is_mine(&self) -> bool {
        self.holder() == Some(self.me.as_str())
    }

    /// New timing from the next attempt on.
    pub fn set_timing(&mut self, timing: Timing) {
        self.timing = timing.sanitised().0;
    }

    /// Takes one input.
    pub fn step(&mut self, input: Input, now: Instant) -> Vec<Effect> {
        let mut effects = Vec::new();
        match input {
            Input::Lease(lease) => self.see(lease, now),
            Input::WriteSucceeded(lease) => {
                // With several unanswered writes it is not known which this was: the oldest is the safe assumption.
                let sent = self.writing_since.take().unwrap_or(now);
                self.see(Some(lease), now);
                self.next_attempt = Some((sent + self.timing.retry_period).max(now));
                let in_time = now < sent + self.timing.renew_deadline;
                if self.is_mine() && in_time && !self.released && self.renewed_at.replace(sent).is_none() {
                    effects.push(Effect::BecameLeader);
                }
                effects.extend(self.let_go());
            }
            Input::WriteFailed => {
                let sent = self.writing_since.take().unwrap_or(now);
                self.next_attempt = Some((sent + self.timing.retry_period).max(now));
                effects.extend(self.let_go());
            }
            Input::Tick => {}
            Input::Release => {
                self.released = true;
                if self.renewed_at.take().is_some() {
                    effects.push(Effect::LostLeadership);
                }
                effects.extend(self.let_go());
            }
        }
        self.check_leadership(now, &mut effects);
        self.attempt(now, &mut effects);
        effects.extend(self.wake().map(Effect::WakeAt));
        effects
    }

    fn see(&mut self, lease: Option<Lease>, now: Instant) {
        let pulse = |lease: &Lease| {
            let spec = &lease.spec;
            (spec.holder_identity.clone(), spec.acquire_time.clone(), spec.renew_time.clone(), spec.lease_transitions)
        };
        let before = self.seen.as_ref().map(|seen| seen.as_ref().map(pulse));
        if before != Some(lease.as_ref().map(pulse)) {
            self.changed_at = Some(now);
        }
        self.seen = Some(lease);
    }

    /// Stops when somebody else has the Lease, or when it could not be renewed for too long.
    fn check_leadership(&mut self, now: Instant, effects: &mut Vec<Effect>) {
        let Some(renewed_at) = self.renewed_at else { return };
        let taken = self.holder().is_some_and(|holder| holder != self.me);
        if taken || now >= renewed_at + self.timing.renew_deadline {
            self.renewed_at = None;
            effects.push(Effect::LostLeadership);
        }
    }

    fn attempt(&mut self, now: Instant, effects: &mut Vec<Effect>) {
        // A write that nobody answers must not silence us for good (R09).
        let busy =
            self.writing_since.is_some() && self.last_sent.is_some_and(|sent| now < sent + self.timing.renew_deadline);
        let due = self.next_attempt.is_none_or(|at| now >= at);
        let Some(seen) = self.seen.as_ref().filter(|_| !self.released && !busy && due) else { return };
        if self.held_by_other_until().is_some_and(|until| now < until) {
            return;
        }
        let old = seen.as_ref().map(|lease| &lease.spec);
        let mine = self.is_mine();
        let transitions = old.and_then(|spec| spec.lease_transitions).unwrap_or(0);
        let seconds = self.timing.lease_duration.as_millis().div_ceil(1000);
        let spec = LeaseSpec {
            holder_identity: Some(self.me.clone()),
            lease_duration_seconds: Some(u32::try_from(seconds).unwrap_or(u32::MAX)),
            acquire_time: old.filter(|_| mine).and_then(|spec| spec.acquire_time.clone()),
            renew_time: None,
            lease_transitions: Some(if mine || old.is_none() { transitions } else { transitions.saturating_add(1) }),
        };
        let resource_version = seen.as_ref().map(|lease| lease.metadata.resource_version.clone());
        self.writing_since = self.writing_since.or(Some(now));
        self.last_sent = Some(now);
        effects.push(Effect::Write { spec, resource_version });
    }

    /// Somebody else has the Lease, and until when it is theirs if nothing changes.
    fn held_by_other_until(&self) -> Option<Instant> {
        self.holder().filter(|holder| *holder != self.me)?;
        let lease = self.seen.as_ref()?.as_ref()?;
        let said = lease.spec.lease_duration_seconds.map(|s| Duration::from_secs(s.into()));
        Some(self.changed_at? + said.unwrap_or(self.timing.lease_duration))
    }

    fn wake(&self) -> Option<Instant> {
        let give_up = self.renewed_at.map(|at| at + self.timing.renew_deadline);
        let attempt = match (self.writing_since, self.last_sent) {
            _ if self.released || self.seen.is_none() => None,
            (Some(_), Some(sent)) => Some(sent + self.timing.renew_deadline),
            _ => self.held_by_other_until().max(self.next_attempt),
        };
        give_up.into_iter().chain(attempt).min()
    }

    /// After [`Input::Release`], empties the Lease once no write is on its way that would fill it again.
    fn let_go(&mut self) -> Option<Effect> {
        if !self.released || self.emptied || self.writing_since.is_some() || !self.is_mine() {
            return None;
        }
        let lease = self.seen.as_ref()?.as_ref()?;
        self.emptied = true;
        // One second, so that those who do not look at the holder need not wait either.
        let spec = LeaseSpec {
            holder_identity: None,
            lease_duration_seconds: Some(1),
            renew_time: None,
            ..lease.spec.clone()
        };
        Some(Effect::Write { spec, resource_version: Some(lease.metadata.resource_version.clone()) })
    }
}
