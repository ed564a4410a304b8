//! Addresses: how actors reach each other, whichever instance lives at the moment.
//!
//! Deliberately absent: buffering for an actor that is down. What is cast to it is dropped and counted; the levels in
//! [`crate::table`] repair it when the next instance starts.

use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;
use metrics::counter;
use ractor::ActorRef;

use crate::sync::lock;

/// What travels in every mailbox.
pub enum Envelope<M> {
    /// A message, and when it was sent.
    Deliver(M, Instant),
    /// Panic, for `kinesin debug kill`.
    Die,
}

/// Names a message in metrics.
pub trait Label {
    /// A closed set: the variant's name, never its content.
    fn label(&self) -> &'static str;
}

/// What is known about one actor across its instances.
#[derive(Default)]
pub struct Stats {
    /// Handled messages.
    pub messages: AtomicU64,
    /// Nanoseconds spent in handlers.
    pub busy_nanos: AtomicU64,
    /// Longest handler, nanoseconds.
    pub longest_nanos: AtomicU64,
    /// Messages waiting.
    pub depth: AtomicI64,
    /// Messages that found nobody.
    pub lost: AtomicU64,
    /// Restarts by cause, see [`Cause`].
    pub restarts: [AtomicU64; 4],
    /// Whether an instance runs.
    pub running: AtomicBool,
    last_error: Mutex<Option<String>>,
    since: Mutex<Option<Instant>>,
}

/// Why an actor was started again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// Its handler panicked.
    Panic = 0,
    /// Its handler returned an error.
    Error = 1,
    /// It refused to start.
    Refused = 2,
    /// A sibling that it depends on was restarted.
    Sibling = 3,
}

impl Cause {
    /// All causes, in the order of [`Stats::restarts`].
    pub const ALL: [Self; 4] = [Self::Panic, Self::Error, Self::Refused, Self::Sibling];

    /// As in metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Panic => "panic",
            Self::Error => "error",
            Self::Refused => "refused",
            Self::Sibling => "sibling",
        }
    }
}

impl Stats {
    pub(crate) fn started(&self) {
        *lock(&self.since) = Some(Instant::now());
        self.depth.store(0, Ordering::Relaxed);
        self.running.store(true, Ordering::Release);
    }

    pub(crate) fn stopped(&self) {
        self.running.store(false, Ordering::Release);
    }

    pub(crate) fn failed(&self, error: String) {
        *lock(&self.last_error) = Some(error);
    }

    pub(crate) fn restarted(&self, actor: &'static str, cause: Cause) {
        self.restarts[cause as usize].fetch_add(1, Ordering::Relaxed);
        counter!("kinesin_actor_restarts_total", "actor" => actor, "cause" => cause.as_str()).increment(1);
    }

    /// The text of the last failure.
    pub fn last_error(&self) -> Option<String> {
        lock(&self.last_error).clone()
    }

    /// How long the present instance has been running.
    pub fn uptime(&self) -> Option<Duration> {
        let running = self.running.load(Ordering::Acquire);
        lock(&self.since).filter(|_| running).map(|since| since.elapsed())
    }

    /// Restarts for every cause together.
    pub fn total_restarts(&self) -> u64 {
        self.restarts.iter().map(|n| n.load(Ordering::Relaxed)).sum()
    }
}

/// A handle that always points at the living instance of an actor. Clones are cheap.
pub struct Address<M: 'static> {
    inner: Arc<Inner<M>>,
}

struct Inner<M: 'static> {
    name: &'static str,
    living: ArcSwapOption<ActorRef<Envelope<M>>>,
    stats: Arc<Stats>,
}

impl<M> Clone for Address<M> {
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone() }
    }
}

impl<M: Label + Send + 'static> Address<M> {
    /// An address that nobody lives at yet.
    pub fn new(name: &'static str) -> Self {
        let inner = Inner { name, living: ArcSwapOption::empty(), stats: Arc::default() };
        Self { inner: Arc::new(inner) }
    }

    /// The actor's name.
    pub fn name(&self) -> &'static str {
        self.inner.name
    }

    /// What is known about the actor.
    pub fn stats(&self) -> &Arc<Stats> {
        &self.inner.stats
    }

    /// Sends a fact or an order. Returns whether somebody was there to take it; a miss is counted, and repaired by the
    /// level that the message hints at.
    pub fn cast(&self, message: M) -> bool {
        let stats = &self.inner.stats;
        stats.depth.fetch_add(1, Ordering::Relaxed);
        let taken = self.send(Envelope::Deliver(message, Instant::now()));
        if !taken {
            stats.depth.fetch_sub(1, Ordering::Relaxed);
            stats.lost.fetch_add(1, Ordering::Relaxed);
            counter!("kinesin_actor_lost_messages_total", "actor" => self.inner.name).increment(1);
        }
        taken
    }

    /// A hint to pass on to a table or level: casts the message that `make` makes.
    pub fn waker(
        &self,
        make: impl Fn() -> M + Clone + Send + Sync + 'static,
    ) -> impl Fn() + Clone + Send + Sync + 'static {
        let address = self.clone();
        move || {
            // Nobody there means that the next instance will subscribe anew.
            address.cast(make());
        }
    }

    /// Sends a message after a delay; the living instance of that moment gets it.
    pub fn cast_after(&self, delay: Duration, message: M) -> Timer {
        let address = self.clone();
        let task = tokio::spawn(async move {
            tokio::time::sleep(delay).await;
            address.cast(message);
        });
        Timer(task)
    }

    /// Makes the living instance panic. Returns whether there was one.
    pub fn kill(&self) -> bool {
        self.send(Envelope::Die)
    }

    fn send(&self, envelope: Envelope<M>) -> bool {
        self.inner.living.load().as_ref().is_some_and(|actor| actor.cast(envelope).is_ok())
    }

    pub(crate) fn moved_to(&self, actor: Option<ActorRef<Envelope<M>>>) {
        self.inner.living.store(actor.map(Arc::new));
    }
}

/// A message on its way; dropping it calls it back (unless it has been delivered).
#[must_use = "dropping a timer cancels it"]
pub struct Timer(tokio::task::JoinHandle<()>);

impl Drop for Timer {
    fn drop(&mut self) {
        self.0.abort();
    }
}
