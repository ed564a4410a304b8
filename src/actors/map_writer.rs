//! Writes services into the maps.
//!
//! owns: the plan (ids, slots, what the maps should hold) and every write to the services' maps
//! hears: changed services, a (re)loaded data path, the clock for comparing maps with the plan
//! says: which services could not be written; that the first complete sync is in the maps, and these have programs
//! restart story: reads the maps back as the actual state, adopts their ids, and plans only the difference; prunes
//! nothing before every source has reported its first complete list
//!
//! Deliberately absent: waiting. A refused write is retried on a later tick, other services go on.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kinesin_core::plan::{Limits, Op, Planner};
use kinesin_core::services::{Compiled, ServiceKey};
use metrics::{counter, gauge, histogram};

use crate::actor::{Actor, Failure};
use crate::address::{Address, Label, Timer};
use crate::datapath::{MapStore, TableUsage, table_of};
use crate::footprint::forget_start;
use crate::level::Follower;
use crate::table::Subscription;
use crate::world::{MapsHandle, TablesHandle, World};

/// What the writer hears.
pub enum MapWriterMsg {
    /// Services changed, or the data path was loaded.
    Wake,
    /// Time to compare the maps with the plan, and to try again what was refused.
    Verify,
}

impl Label for MapWriterMsg {
    fn label(&self) -> &'static str {
        match self {
            Self::Wake => "Wake",
            Self::Verify => "Verify",
        }
    }
}

/// Up to this many operations are written on the actor's own thread: they take less than a handler's budget of 10 ms.
const INLINE_OPS: usize = 2_048;

/// So many services are planned before they are written: many enough for large batches, and few enough that the steps
/// of a first load do not need more memory than the services.
const PART: usize = 512;

/// So long after the first sync the last parts of the start run: leases are taken, definitions registered, tables collected.
const START_LASTS: Duration = Duration::from_secs(3);

/// After a refused write the maps are read back this soon.
const RETRY: Duration = Duration::from_secs(1);

/// The actor.
pub struct MapWriter {
    world: World,
    me: Address<MapWriterMsg>,
    compiled: Subscription<ServiceKey, Compiled>,
    tables: Follower<TablesHandle>,
    maps: Follower<MapsHandle>,
    store: Option<Arc<dyn MapStore>>,
    planner: Planner,
    /// What the planner was made with.
    limits: Limits,
    pruned: bool,
    /// Services that did not fit, or met another's address; tried again after every removal and on every verification.
    refused: BTreeMap<ServiceKey, String>,
    verify: Timer,
}

impl Actor for MapWriter {
    type Msg = MapWriterMsg;
    type Args = World;

    async fn start(world: World, me: Address<MapWriterMsg>) -> Result<Self, Failure> {
        let wake = me.waker(|| MapWriterMsg::Wake);
        let verify = me.cast_after(world.config().services.verify_interval, MapWriterMsg::Verify);
        Ok(Self {
            compiled: world.compiled.subscribe_urgently(wake.clone()),
            tables: world.tables.follow(wake.clone()),
            maps: world.maps.follow(wake),
            store: None,
            planner: Planner::new(Limits::default()),
            limits: Limits::default(),
            pruned: false,
            refused: BTreeMap::new(),
            verify,
            me,
            world,
        })
    }

    async fn handle(&mut self, message: MapWriterMsg) -> Result<(), Failure> {
        if let Some(tables) = self.tables.changed() {
            self.adopt(&tables).await?;
        }
        if let Some(maps) = self.maps.changed() {
            self.adopt(&maps.tables).await?;
        }
        let Some(store) = self.store.clone() else {
            return Ok(());
        };
        match message {
            MapWriterMsg::Wake => self.sync(&store).await?,
            MapWriterMsg::Verify => self.verify(&store).await?,
        }
        self.look_whether_all_is_there();
        Ok(())
    }
}

impl MapWriter {
    /// Starts over on a freshly loaded data path.
    async fn adopt(&mut self, tables: &TablesHandle) -> Result<(), Failure> {
        let TablesHandle { store, limits, .. } = tables;
        let same = |old: &Arc<dyn MapStore>| Arc::ptr_eq(old, store) && self.limits == *limits;
        if self.store.as_ref().is_some_and(same) {
            return Ok(());
        }
        let actual = blocking({
            let store = store.clone();
            move || store.read()
        })
        .await??;
        tracing::info!(frontends = actual.frontends.len(), backends = actual.backends.len(), "maps adopted");
        self.planner = Planner::new(limits.clone());
        let repairs = self.planner.adopt(actual);
        self.store = Some(store.clone());
        self.limits = limits.clone();
        self.pruned = false;
        self.refused.clear();
        self.compiled.mark_all();
        self.apply(store, repairs, "adopt").await;
        Ok(())
    }

    /// Plans and writes what changed.
    async fn sync(&mut self, store: &Arc<dyn MapStore>) -> Result<(), Failure> {
        let begun = Instant::now();
        // Read before the changes are taken: rows that arrive later come with their own wake-up.
        let complete = self.world.compiled.is_complete();
        let changes = self.compiled.take_since();
        let first = complete && !self.pruned;
        let mut written = true;
        for part in changes.chunks(PART) {
            let mut plans = Vec::new();
            for (key, compiled, _) in part {
                match compiled {
                    Some(compiled) => self.plan(key, compiled, &mut plans),
                    None => {
                        self.refused.remove(key);
                        plans.push(self.planner.remove(key));
                    }
                }
            }
            // After a refusal the rest waits for the comparison that follows soon.
            written = written && self.apply(store, self.planner.in_phases(plans), "sync").await;
        }
        let mut plans = Vec::new();
        if changes.iter().any(|(_, compiled, _)| compiled.is_none()) {
            self.retry_refused(&mut plans);
        }
        if first {
            plans.push(self.planner.prune());
        }
        written = written && self.apply(store, self.planner.in_phases(plans), "sync").await;
        self.publish_refused();
        histogram!("kinesin_map_sync_seconds").record(begun.elapsed());
        // The first load says nothing about how quickly a change arrives.
        if written && self.pruned {
            let done = Instant::now();
            for (_, compiled, since) in &changes {
                let (took, action) =
                    (done.duration_since(*since), if compiled.is_some() { "upsert" } else { "delete" });
                histogram!("kinesin_endpoint_to_map_seconds").record(took);
                histogram!("cilium_service_implementation_delay", "action" => action).record(took);
            }
        }
        if first && written {
            self.pruned = true;
            let stats = self.planner.stats();
            tracing::info!(services = stats.services, frontends = stats.frontends, backends = stats.backends, took = ?begun.elapsed(), "first complete sync is in the maps");
        }
        Ok(())
    }

    /// Tells when services work for the first time: the maps may be full before the programs that read them are loaded.
    fn look_whether_all_is_there(&self) {
        let mine = |maps: &MapsHandle| self.store.as_ref().is_some_and(|store| Arc::ptr_eq(store, &maps.tables.store));
        if self.pruned && self.world.maps.get().is_some_and(|maps| mine(&maps)) && self.world.programmed.set(true) {
            // Not on any actor's time, and whether or not this one still lives then.
            tokio::spawn(async {
                tokio::time::sleep(START_LASTS).await;
                forget_start();
            });
        }
    }

    fn plan(&mut self, key: &ServiceKey, compiled: &Compiled, plans: &mut Vec<Vec<Op>>) {
        // Other parts of a Service are programmed when one address is somebody else's.
        let refusal = match self.planner.update(key, compiled) {
            Ok(ops) => {
                plans.push(ops);
                self.planner.problems(key).join("; ")
            }
            Err(error) => error.to_string(),
        };
        if refusal.is_empty() {
            self.refused.remove(key);
        } else if self.refused.insert(key.clone(), refusal.clone()).as_ref() != Some(&refusal) {
            tracing::error!(service = %key, error = refusal, "service not fully programmed");
        }
    }

    fn retry_refused(&mut self, plans: &mut Vec<Vec<Op>>) {
        for key in self.refused.keys().cloned().collect::<Vec<_>>() {
            match self.world.compiled.get(&key) {
                Some(compiled) => self.plan(&key, &compiled, plans),
                None => drop(self.refused.remove(&key)),
            }
        }
    }

    /// Compares the maps with the plan and writes the difference: what others changed, and what was refused.
    async fn verify(&mut self, store: &Arc<dyn MapStore>) -> Result<(), Failure> {
        self.verify = self.me.cast_after(self.world.config().services.verify_interval, MapWriterMsg::Verify);
        let actual = blocking({
            let store = store.clone();
            move || store.read()
        })
        .await??;
        let repairs = self.planner.repair(&actual);
        if !repairs.is_empty() {
            counter!("kinesin_map_repairs_total").increment(repairs.len() as u64);
            tracing::warn!(operations = repairs.len(), "maps differed from the plan: repaired");
        }
        self.apply(store, repairs, "repair").await;
        let mut plans = Vec::new();
        self.retry_refused(&mut plans);
        self.apply(store, self.planner.in_phases(plans), "retry").await;
        self.publish_refused();
        for table in store.usage() {
            gauge!("kinesin_map_pressure", "map_name" => table.name).set(pressure(&table));
        }
        Ok(())
    }

    /// Writes operations; after a refusal the kernel's state is unknown, so it is read back soon.
    async fn apply(&mut self, store: &Arc<dyn MapStore>, ops: Vec<Op>, why: &'static str) -> bool {
        if ops.is_empty() {
            return true;
        }
        let count = ops.len();
        let counts = by_table(&ops);
        let result = if count <= INLINE_OPS {
            store.apply(&ops)
        } else {
            let store = store.clone();
            match blocking(move || store.apply(&ops)).await {
                Ok(result) => result,
                Err(error) => {
                    tracing::error!(%error, "map writes panicked");
                    return false;
                }
            }
        };
        let outcome = if result.is_ok() { "success" } else { "fail" };
        counter!("kinesin_map_operations_total", "why" => why, "outcome" => outcome).increment(count as u64);
        for ((table, operation), count) in counts {
            counter!("cilium_bpf_map_ops_total", "map_name" => table, "operation" => operation, "outcome" => outcome)
                .increment(count);
        }
        match result {
            Ok(()) => {
                self.world.problems.clear("maps");
                true
            }
            Err(error) => {
                self.world.problems.set("maps", vec![error.to_string()]);
                self.verify = self.me.cast_after(RETRY, MapWriterMsg::Verify);
                false
            }
        }
    }

    fn publish_refused(&self) {
        for key in self.world.unwritten.keys() {
            if !self.refused.contains_key(&key) {
                self.world.unwritten.remove(&key);
            }
        }
        for (key, text) in &self.refused {
            self.world.unwritten.put(key.clone(), text.clone());
        }
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Failure> {
    Ok(tokio::task::spawn_blocking(work).await?)
}

/// How many operations of each kind go to each table.
fn by_table(ops: &[Op]) -> BTreeMap<(&'static str, &'static str), u64> {
    let mut counts = BTreeMap::new();
    for op in ops {
        let deletes = matches!(op, Op::DeleteFrontend(_) | Op::DeleteMaglev(_) | Op::DeleteSourceRange(_));
        let operation = if deletes { "delete" } else { "update" };
        *counts.entry((table_of(op), operation)).or_insert(0) += 1;
    }
    counts
}

/// Share of a table that is in use, 0 to 1; 0 where counting is expensive.
fn pressure(table: &TableUsage) -> f64 {
    table.entries.unwrap_or(0) as f64 / f64::from(table.max_entries.max(1))
}

#[cfg(test)]
mod tests;
