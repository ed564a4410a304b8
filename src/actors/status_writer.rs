//! Writes status where users look for it.
//!
//! owns: writes in flight and their retries
//! hears: orders of lb_ipam and vip_owner; results of writes
//! says: status updates to the source
//! restart story: the orders are a table; those that the objects already show are not written again
//!
//! Deliberately absent: deciding what to write. At most `AT_ONCE` writes are in flight, each object's in order.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use kinesin_core::objects::{Condition, ObjectKey};
use metrics::counter;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::actor::{Actor, Failure};
use crate::address::{Address, Label, Timer};
use crate::source::{Source, WriteError};
use crate::supervisor::Backoff;
use crate::table::Subscription;
use crate::world::{StatusKey, StatusOrder, StatusPatch, World};

/// What the writer hears.
pub enum StatusWriterMsg {
    /// Orders changed.
    Wake,
    /// A write has ended.
    Written {
        /// Of which object.
        key: StatusKey,
        /// The order that was carried out.
        order: Arc<StatusOrder>,
        /// How it went.
        result: Result<(), WriteError>,
    },
    /// Time to try again.
    Retry(StatusKey),
}

impl Label for StatusWriterMsg {
    fn label(&self) -> &'static str {
        match self {
            Self::Wake => "Wake",
            Self::Written { .. } => "Written",
            Self::Retry(_) => "Retry",
        }
    }
}

/// Enough to hide the API's latency, few enough not to starve watches.
const AT_ONCE: usize = 8;

/// As the incumbent's allocator waits between attempts.
const BACKOFF: Backoff = Backoff { min: Duration::from_millis(250), max: Duration::from_secs(300) };

/// The actor.
pub struct StatusWriter {
    world: World,
    source: Arc<dyn Source>,
    me: Address<StatusWriterMsg>,
    orders: Subscription<StatusKey, StatusOrder>,
    in_flight: BTreeSet<StatusKey>,
    failures: BTreeMap<StatusKey, (usize, Timer)>,
    permits: Arc<Semaphore>,
    /// Ends with the actor.
    writes: JoinSet<()>,
}

impl Actor for StatusWriter {
    type Msg = StatusWriterMsg;
    type Args = (World, Arc<dyn Source>);

    async fn start((world, source): Self::Args, me: Address<StatusWriterMsg>) -> Result<Self, Failure> {
        let wake = me.waker(|| StatusWriterMsg::Wake);
        Ok(Self {
            orders: world.orders.subscribe(wake),
            world,
            source,
            me,
            in_flight: BTreeSet::new(),
            failures: BTreeMap::new(),
            permits: Arc::new(Semaphore::new(AT_ONCE)),
            writes: JoinSet::new(),
        })
    }

    async fn handle(&mut self, message: StatusWriterMsg) -> Result<(), Failure> {
        match message {
            StatusWriterMsg::Wake => {
                for (key, order) in self.orders.take() {
                    match order {
                        Some(order) => self.dispatch(key, order),
                        None => drop(self.failures.remove(&key)),
                    }
                }
            }
            StatusWriterMsg::Written { key, order, result } => self.written(key, &order, result),
            StatusWriterMsg::Retry(key) => {
                if let Some(order) = self.world.orders.get(&key) {
                    self.dispatch(key, order);
                }
            }
        }
        while self.writes.try_join_next().is_some() {}
        Ok(())
    }
}

impl StatusWriter {
    fn dispatch(&mut self, key: StatusKey, order: Arc<StatusOrder>) {
        if self.already_so(&key, &order.status) || !self.in_flight.insert(key.clone()) {
            return;
        }
        let (source, permits, me) = (self.source.clone(), self.permits.clone(), self.me.clone());
        self.writes.spawn(async move {
            let _permit = permits.acquire().await;
            let result = write(&*source, &key, &order.status).await;
            me.cast(StatusWriterMsg::Written { key, order, result });
        });
    }

    fn written(&mut self, key: StatusKey, order: &Arc<StatusOrder>, result: Result<(), WriteError>) {
        self.in_flight.remove(&key);
        let outcome = if result.is_ok() { "success" } else { "fail" };
        counter!("kinesin_status_writes_total", "outcome" => outcome).increment(1);
        match result {
            Ok(()) => drop(self.failures.remove(&key)),
            // The object is gone, and its status with it.
            Err(WriteError::NotFound { .. }) => drop(self.failures.remove(&key)),
            Err(error) => {
                let failures = self.failures.get(&key).map_or(1, |(failures, _)| failures + 1);
                let delay = BACKOFF.delay(failures, rand::random());
                tracing::warn!(object = ?key, %error, ?delay, "status not written");
                let retry = self.me.cast_after(delay, StatusWriterMsg::Retry(key.clone()));
                self.failures.insert(key.clone(), (failures, retry));
            }
        }
        match self.world.orders.get(&key) {
            Some(latest) if latest.serial != order.serial => self.dispatch(key, latest),
            _ => {}
        }
    }

    /// Whether the object already shows what the order asks for.
    fn already_so(&self, key: &StatusKey, patch: &StatusPatch) -> bool {
        match (key, patch) {
            (StatusKey::Service(key), StatusPatch::Service { ingress, condition }) => {
                let Some(service) = self.world.services.get(key) else { return false };
                let ours =
                    service.status.conditions.iter().find(|c| c.kind == kinesin_core::lb_ipam::CONDITION_SATISFIED);
                let entries = service.status.load_balancer.ingress.len();
                entries == ingress.len()
                    && service.ingress_addresses().eq(ingress.iter().copied())
                    && same(ours, condition.as_ref())
            }
            (StatusKey::Pool(name), StatusPatch::Conditions(wanted)) => {
                let pool = self.world.pools.get(&ObjectKey::new("", name.clone()));
                pool.is_some_and(|pool| shown(&pool.status.conditions, wanted))
            }
            (StatusKey::Policy(name), StatusPatch::Conditions(wanted)) => {
                let policy = self.world.policies.get(&ObjectKey::new("", name.clone()));
                policy.is_some_and(|policy| shown(&policy.status.conditions, wanted))
            }
            _ => false,
        }
    }
}

fn shown(conditions: &[Condition], wanted: &[Condition]) -> bool {
    wanted.iter().all(|condition| same(conditions.iter().find(|c| c.kind == condition.kind), Some(condition)))
}

/// Equal but for the time, which the writer sets.
fn same(shown: Option<&Condition>, wanted: Option<&Condition>) -> bool {
    match (shown, wanted) {
        (None, None) => true,
        (Some(a), Some(b)) => {
            (&a.status, &a.reason, &a.message, a.observed_generation)
                == (&b.status, &b.reason, &b.message, b.observed_generation)
        }
        _ => false,
    }
}

async fn write(source: &dyn Source, key: &StatusKey, patch: &StatusPatch) -> Result<(), WriteError> {
    match (key, patch) {
        (StatusKey::Service(key), StatusPatch::Service { ingress, condition }) => {
            source.write_service_status(key, ingress, condition.as_ref()).await
        }
        (StatusKey::Pool(name), StatusPatch::Conditions(conditions)) => {
            source.write_pool_status(name, conditions).await
        }
        (StatusKey::Policy(name), StatusPatch::Conditions(conditions)) => {
            source.write_policy_status(name, conditions).await
        }
        (key, _) => unreachable!("lb_ipam and vip_owner pair {key:?} with its own kind of patch"),
    }
}
