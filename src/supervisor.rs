//! Restart policy for a fixed, ordered list of children.
//!
//! ractor reports deaths but never restarts anything; this is the one place that does. Children start in order, each
//! after the one before it has started; they stop in reverse, each given time to run its `stop`. A failure is charged to
//! the child that failed: when one child fails more often than the policy allows, the supervisor stops the others in
//! order and fails itself, so that the failure is its parent's to handle, and at the root the process's.
//!
//! Deliberately absent: names in a global registry (the wiring is arguments, in `app`), children added at run time.

use std::collections::VecDeque;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use ractor::concurrency::JoinHandle;
use ractor::{Actor as _, ActorCell, ActorProcessingErr, ActorRef, SpawnErr, SupervisionEvent};
use tokio::time::Instant;

use crate::actor::{Actor, Failed, Shell};
use crate::address::{Address, Cause, Label, Stats};

/// A running child, type-erased.
type Spawned = (ActorCell, JoinHandle<()>);
type Start = Arc<dyn Fn(ActorCell) -> BoxFuture<'static, Result<Spawned, SpawnErr>> + Send + Sync>;
type Kill = Arc<dyn Fn() -> bool + Send + Sync>;

/// One line of a supervision tree: who runs here and how to start it again.
#[derive(Clone)]
pub struct Child {
    name: &'static str,
    start: Start,
    stats: Arc<Stats>,
    kill: Option<Kill>,
    below: Option<(Policy, Arc<[Child]>)>,
}

impl Child {
    /// An actor. `args` is called afresh on every start; `address` always points at the living instance.
    pub fn actor<A: Actor>(address: &Address<A::Msg>, args: impl Fn() -> A::Args + Send + Sync + 'static) -> Self {
        let (name, stats) = (address.name(), address.stats().clone());
        let kill = {
            let address = address.clone();
            Arc::new(move || address.kill())
        };
        let address = address.clone();
        let start: Start = Arc::new(move |supervisor| {
            let (args, address) = (args(), address.clone());
            Box::pin(async move {
                let started =
                    Shell::<A>::spawn_linked(None, Shell::default(), (args, address.clone()), supervisor).await;
                if started.is_err() {
                    address.moved_to(None);
                }
                let (actor, join) = started?;
                Ok((actor.get_cell(), join))
            })
        });
        Self { name, start, stats, kill: Some(kill), below: None }
    }

    /// A supervisor of its own children.
    pub fn supervisor(name: &'static str, policy: Policy, children: Vec<Child>) -> Self {
        let stats = Arc::<Stats>::default();
        let children: Arc<[Child]> = children.into();
        let below = Some((policy, children.clone()));
        let start: Start = {
            let stats = stats.clone();
            Arc::new(move |supervisor| {
                let args = (policy, children.clone(), stats.clone());
                Box::pin(async move {
                    let (actor, join) =
                        Supervisor::spawn_linked(None, Supervisor(PhantomData), args, supervisor).await?;
                    Ok((actor.get_cell(), join))
                })
            })
        };
        Self { name, start, stats, kill: None, below }
    }

    /// The child's name, unique in the tree.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// What is known about the child across its instances.
    pub fn stats(&self) -> &Arc<Stats> {
        &self.stats
    }

    /// Policy and children, if this is a supervisor.
    pub fn below(&self) -> Option<(&Policy, &[Child])> {
        self.below.as_ref().map(|(policy, children)| (policy, &**children))
    }

    /// Finds a child of this name here or below.
    pub fn find(&self, name: &str) -> Option<&Child> {
        if self.name == name {
            return Some(self);
        }
        self.below.as_ref()?.1.iter().find_map(|child| child.find(name))
    }

    /// Makes the actor panic; `None` for supervisors, `Some(false)` when it is down anyway.
    pub fn kill(&self) -> Option<bool> {
        self.kill.as_ref().map(|kill| kill())
    }
}

/// Which siblings fall with a failed child.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Strategy {
    /// None.
    OneForOne,
    /// Every child listed after the failed one.
    RestForOne,
}

/// How much failure to absorb before asking the parent for help.
#[derive(Clone, Copy, Debug)]
pub struct Policy {
    /// Who falls with whom.
    pub strategy: Strategy,
    /// A child's failure number `max_restarts + 1` within `within` is escalated.
    pub max_restarts: usize,
    /// Window for counting a child's failures.
    pub within: Duration,
    /// Pause before a restart.
    pub backoff: Backoff,
    /// How long a child may take to stop before it is killed.
    pub grace: Duration,
}

/// Doubles with each recent failure of the child.
#[derive(Clone, Copy, Debug)]
pub struct Backoff {
    /// After the first failure.
    pub min: Duration,
    /// At most.
    pub max: Duration,
}

impl Backoff {
    /// The pause after the given number of recent failures; `spread` in 0..=1 takes up to a quarter of it away, so that
    /// agents that failed together do not come back together.
    pub fn delay(self, failures: usize, spread: f64) -> Duration {
        let doublings = failures.saturating_sub(1).min(16) as u32;
        let full = self.min.saturating_mul(1 << doublings).min(self.max);
        full.mul_f64(1.0 - 0.25 * spread.clamp(0.0, 1.0))
    }
}

/// One child failed more often than the policy allows.
#[derive(Debug, thiserror::Error)]
#[error("{child} failed {failures} times within {within:?}, last: {last}")]
pub struct TooManyRestarts {
    child: &'static str,
    failures: usize,
    within: Duration,
    last: String,
}

/// The ractor actor behind [`Child::supervisor`].
pub(crate) struct Supervisor(PhantomData<()>);

/// What a supervisor tells itself.
pub(crate) enum SupervisorMsg {
    /// The pause is over: bring these children up, in order.
    Start(Range<usize>),
}

impl Label for SupervisorMsg {
    fn label(&self) -> &'static str {
        "Start"
    }
}

/// A supervisor's state.
pub(crate) struct Slots {
    policy: Policy,
    slots: Vec<Slot>,
    stats: Arc<Stats>,
}

struct Slot {
    child: Child,
    running: Option<Spawned>,
    failures: VecDeque<Instant>,
    /// Why the next start will be a restart.
    cause: Option<Cause>,
}

impl Drop for Slots {
    fn drop(&mut self) {
        self.stats.stopped();
    }
}

impl ractor::Actor for Supervisor {
    type Msg = SupervisorMsg;
    type State = Slots;
    type Arguments = (Policy, Arc<[Child]>, Arc<Stats>);

    async fn pre_start(
        &self,
        me: ActorRef<SupervisorMsg>,
        (policy, children, stats): Self::Arguments,
    ) -> Result<Slots, ActorProcessingErr> {
        let slot = |child: &Child| Slot { child: child.clone(), running: None, failures: VecDeque::new(), cause: None };
        let slots: Vec<_> = children.iter().map(slot).collect();
        stats.started();
        // Not here: a child that refuses its first start is retried like any other failure.
        me.cast(SupervisorMsg::Start(0..slots.len()))?;
        Ok(Slots { policy, slots, stats })
    }

    async fn handle(
        &self,
        me: ActorRef<SupervisorMsg>,
        SupervisorMsg::Start(range): SupervisorMsg,
        state: &mut Slots,
    ) -> Result<(), ActorProcessingErr> {
        for i in range.clone() {
            let slot = &mut state.slots[i];
            if slot.running.is_some() {
                continue;
            }
            if let Some(cause) = slot.cause.take() {
                slot.child.stats.restarted(slot.child.name, cause);
            }
            match (slot.child.start)(me.get_cell()).await {
                Ok(running) => {
                    tracing::debug!(actor = slot.child.name, "started");
                    slot.running = Some(running);
                }
                // A refused start raises no supervision event, so it is charged here.
                Err(error) => {
                    let why = root_cause(&error);
                    return state.restart_later(&me, i..range.end, Cause::Refused, why).await;
                }
            }
        }
        Ok(())
    }

    async fn handle_supervisor_evt(
        &self,
        me: ActorRef<SupervisorMsg>,
        event: SupervisionEvent,
        state: &mut Slots,
    ) -> Result<(), ActorProcessingErr> {
        let (id, cause, why) = match event {
            SupervisionEvent::ActorFailed(cell, error) => {
                let returned = error.is::<Failed>() || error.is::<TooManyRestarts>();
                (cell.get_id(), if returned { Cause::Error } else { Cause::Panic }, error.to_string())
            }
            // Matching by value drops the carried state before any replacement starts.
            SupervisionEvent::ActorTerminated(cell, _, reason) => {
                (cell.get_id(), Cause::Error, reason.unwrap_or_else(|| "stopped by itself".into()))
            }
            _ => return Ok(()),
        };
        let is_it = |slot: &Slot| slot.running.as_ref().is_some_and(|(cell, _)| cell.get_id() == id);
        let Some(i) = state.slots.iter().position(is_it) else {
            return Ok(());
        };
        if let Some((_, join)) = state.slots[i].running.take() {
            // This event can outrun `Drop` of the dead actor's state; its task cannot.
            let _ = join.await;
        }
        let end = match state.policy.strategy {
            Strategy::OneForOne => i + 1,
            Strategy::RestForOne => state.slots.len(),
        };
        state.stop(i + 1..end).await;
        state.slots[i + 1..end].iter_mut().for_each(|slot| slot.cause = Some(Cause::Sibling));
        state.restart_later(&me, i..end, cause, why).await
    }

    async fn post_stop(&self, _: ActorRef<SupervisorMsg>, state: &mut Slots) -> Result<(), ActorProcessingErr> {
        state.stop(0..state.slots.len()).await;
        Ok(())
    }
}

impl Slots {
    /// Charges one failure to the first child of `range` and schedules the range, or gives up and escalates.
    async fn restart_later(
        &mut self,
        me: &ActorRef<SupervisorMsg>,
        range: Range<usize>,
        cause: Cause,
        why: String,
    ) -> Result<(), ActorProcessingErr> {
        let Policy { max_restarts, within, backoff, .. } = self.policy;
        let now = Instant::now();
        let slot = &mut self.slots[range.start];
        slot.cause = Some(cause);
        slot.failures.retain(|at| now.duration_since(*at) < within);
        slot.failures.push_back(now);
        let (child, failures) = (slot.child.name, slot.failures.len());
        slot.child.stats.failed(why.clone());
        if failures > max_restarts {
            tracing::error!(actor = child, failures, error = why, "fails too often: escalating");
            self.stop(0..self.slots.len()).await;
            let error = TooManyRestarts { child, failures, within, last: why };
            // The root has no supervisor to note it: the process says it as its last words.
            self.stats.failed(error.to_string());
            return Err(Box::new(error));
        }
        let delay = backoff.delay(failures, rand::random());
        tracing::warn!(actor = child, cause = cause.as_str(), error = why, ?delay, "restarting");
        me.send_after(delay, move || SupervisorMsg::Start(range));
        Ok(())
    }

    /// Stops children last-started-first, giving each a chance to run its `stop`.
    async fn stop(&mut self, range: Range<usize>) {
        for slot in self.slots[range].iter_mut().rev() {
            let Some((cell, join)) = slot.running.take() else {
                continue;
            };
            if cell.stop_and_wait(None, Some(self.policy.grace)).await.is_err() {
                tracing::warn!(actor = slot.child.name, "did not stop in time: killed");
                cell.kill();
            }
            let _ = join.await;
        }
    }
}

fn root_cause(error: &SpawnErr) -> String {
    match error {
        SpawnErr::StartupFailed(inner) => inner.to_string(),
        other => other.to_string(),
    }
}

/// A running tree.
pub struct Tree {
    root: Child,
    cell: ActorCell,
    join: JoinHandle<()>,
}

impl Tree {
    /// Starts the root supervisor. Its children start in the background.
    pub async fn start(root: Child) -> anyhow::Result<Self> {
        let (policy, children) = root.below.clone().ok_or_else(|| anyhow::anyhow!("the root is a supervisor"))?;
        let args = (policy, children, root.stats.clone());
        let (actor, join) = Supervisor::spawn(None, Supervisor(PhantomData), args).await?;
        Ok(Self { root, cell: actor.get_cell(), join })
    }

    /// The root, with what is known about everyone below.
    pub fn root(&self) -> &Child {
        &self.root
    }

    /// Resolves when the root has given up (or was stopped).
    pub async fn gave_up(&mut self) {
        let _ = (&mut self.join).await;
    }

    /// Stops everybody in reverse order.
    pub async fn stop(self) {
        self.cell.stop(None);
        let _ = self.join.await;
    }
}

#[cfg(test)]
mod tests;
