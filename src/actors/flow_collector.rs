//! Removes connections that have expired, and says when their tables are too small or source ports run out.
//!
//! owns: the removal of entries from the tables of connections
//! hears: a (re)loaded data path, changes of the configuration, the clock
//! says: the connections level; what the tables had no room for, and towards which backend source ports run out
//! restart story: begins with a short pause before its first pass, as after a start; the tables themselves are the state
//!
//! Deliberately absent: ending what is in use. Flows to backends that are gone end in the programs, with their next packet.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kinesin_abi::{Direction, DropReason, FlowCount};
use kinesin_core::flows::ports::{Ports, pressure, problems};
use kinesin_core::flows::{Counts, Intervals, Pace};
use kinesin_core::services::BackendRef;
use metrics::{counter, gauge, histogram};

use crate::actor::{Actor, Failure};
use crate::address::{Address, Label, Timer};
use crate::clock;
use crate::config::Config;
use crate::datapath::{Collected, MapStore};
use crate::level::Follower;
use crate::world::{Connections, MapsHandle, World};

/// What the collector hears.
pub enum FlowCollectorMsg {
    /// The data path was loaded, or the configuration changed.
    Wake,
    /// Time to look at the counts, and at the tables when a pass is due.
    Tick,
}

impl Label for FlowCollectorMsg {
    fn label(&self) -> &'static str {
        match self {
            Self::Wake => "Wake",
            Self::Tick => "Tick",
        }
    }
}

/// How often the programs' counts are looked at: a few system calls.
const TICK: Duration = Duration::from_secs(10);

/// While source ports run out, the tables are looked at as often as this.
const SHORT_OF_PORTS: Duration = Duration::from_secs(30);
/// The area of problems with them.
const PORTS: &str = "source-ports";

/// The actor.
pub struct FlowCollector {
    world: World,
    me: Address<FlowCollectorMsg>,
    maps: Follower<MapsHandle>,
    config: Follower<Config>,
    store: Option<Arc<dyn MapStore>>,
    pace: Pace,
    /// When the last pass ended, or this instance began.
    passed: Instant,
    /// The counts at that time.
    counts: Counts,
    /// New connections that had found no source port by then.
    portless: u64,
    tick: Timer,
}

impl Actor for FlowCollector {
    type Msg = FlowCollectorMsg;
    type Args = World;

    async fn start(world: World, me: Address<FlowCollectorMsg>) -> Result<Self, Failure> {
        let wake = me.waker(|| FlowCollectorMsg::Wake);
        Ok(Self {
            maps: world.maps.follow(wake.clone()),
            config: world.config.follow(wake),
            store: None,
            pace: Pace::default(),
            passed: Instant::now(),
            counts: Counts::default(),
            portless: 0,
            tick: me.cast_after(TICK, FlowCollectorMsg::Tick),
            me,
            world,
        })
    }

    async fn handle(&mut self, _: FlowCollectorMsg) -> Result<(), Failure> {
        if let Some(handle) = self.maps.changed() {
            let first = self.store.is_none();
            self.store = Some(handle.tables.store.clone());
            if first {
                // What was before this instance is no reason for a pass.
                self.counts = Counts(handle.tables.store.flow_counts()?);
                self.portless = portless(&*handle.tables.store)?;
            }
        }
        let _ = self.config.changed();
        if let Some(store) = self.store.clone() {
            store.share_openings(None)?;
            let now = Counts(store.flow_counts()?);
            let portless = portless(&*store)?;
            if self.is_due(&*store, &now, portless) {
                self.pass(store, &now, portless).await?;
            }
        }
        // In place of the one that may be on its way: a shorter interval counts at once.
        self.tick = self.me.cast_after(self.next(), FlowCollectorMsg::Tick);
        Ok(())
    }
}

impl FlowCollector {
    fn interval(&self) -> Duration {
        let services = &self.world.config().services;
        self.pace.interval(&Intervals { fixed: services.gc_interval, max: services.gc_max_interval })
    }

    fn next(&self) -> Duration {
        self.interval().saturating_sub(self.passed.elapsed()).clamp(Duration::from_millis(100), TICK)
    }

    fn is_due(&self, store: &dyn MapStore, now: &Counts, portless: u64) -> bool {
        let since = self.passed.elapsed();
        // Who was told that ports run out is told soon that they do not any more.
        let short = portless > self.portless && since >= Pace::MIN
            || since >= SHORT_OF_PORTS && !self.world.problems.of(PORTS).is_empty();
        short || since >= self.interval() || Pace::is_urgent(since, &self.counts, now, store.flow_sizes())
    }

    async fn pass(&mut self, store: Arc<dyn MapStore>, before: &Counts, portless: u64) -> Result<(), Failure> {
        let begun = Instant::now();
        let timeouts = self.world.config().services.timeouts.to_abi();
        let (store, result) = tokio::task::spawn_blocking(move || {
            let result = store.collect_flows(&timeouts, clock::monotonic_nanos());
            (store, result)
        })
        .await?;
        let took = begun.elapsed();
        self.passed = Instant::now();
        let status = if result.is_ok() { "completed" } else { "uncompleted" };
        counter!("cilium_datapath_conntrack_gc_runs_total", "status" => status).increment(1);
        histogram!("cilium_datapath_conntrack_gc_duration_seconds", "status" => status).record(took);
        // Transient by its nature: the next pass is due in any case.
        let found = match result {
            Ok(found) => found,
            Err(error) => {
                self.world.problems.set("connections", vec![format!("expired connections not removed: {error}")]);
                return Ok(());
            }
        };
        let (settled, transient) = (found.settled, found.transient);
        self.pace.passed(settled.kept() + transient.kept(), settled.removed() + transient.removed());
        tracing::debug!(?found, ?took, next = ?self.interval(), "looked for expired connections");
        self.report_ports(&found.ports, portless);
        self.report(&*store, &found, before, took)
    }

    fn report_ports(&mut self, fullest: &[(Ports, u32)], portless: u64) {
        let (first, last) = self.world.config().services.snat_ports();
        let span = u32::from(last.saturating_sub(first)) + 1;
        let refused = portless > self.portless;
        self.portless = portless;
        gauge!("kinesin_source_ports_used_ratio").set(pressure(fullest, span));
        self.world.problems.set(PORTS, problems(fullest, span, refused, |ports| self.name(ports)));
    }

    /// Whose backend it is, and where. Looks at all Services; only asked when ports run out.
    fn name(&self, ports: &Ports) -> Option<String> {
        self.world.compiled.rows().into_iter().find_map(|(key, compiled)| {
            let mut backends = compiled.sets.iter().flat_map(|set| set.backends.iter());
            let is_it = |b: &&BackendRef| (b.addr, b.port, b.proto) == (ports.backend, ports.port, ports.proto);
            let backend = backends.find(is_it)?;
            Some(if backend.node.is_empty() { key.to_string() } else { format!("{key} on {}", backend.node) })
        })
    }

    fn report(
        &mut self,
        store: &dyn MapStore,
        found: &Collected,
        before: &Counts,
        took: Duration,
    ) -> Result<(), Failure> {
        let (settled, transient) = (found.settled, found.transient);
        for (protocol, which) in [("TCP", 0), ("non-TCP", 1)] {
            let alive = settled.alive[which] + transient.alive[which];
            let deleted = settled.expired[which] + transient.expired[which];
            for (status, count) in [("alive", alive), ("deleted", deleted)] {
                let labels = [("protocol", protocol), ("status", status)];
                gauge!("cilium_datapath_conntrack_gc_entries", &labels).set(count as f64);
            }
        }
        let now = Counts(store.flow_counts()?);
        let (flows, others) = store.flow_sizes();
        let last = self.world.connections.get().map(|last| *last).unwrap_or_default();
        let connections = Connections {
            settled: settled.kept(),
            opening: found.opening,
            transient: transient.kept(),
            expired: last.expired + settled.removed() + transient.removed(),
            forgotten: now.forgotten(transient.kept(), others).max(last.forgotten),
            unsettled: now.of(FlowCount::Unsettled),
            looked: Some(self.passed),
            took,
        };
        counter!("kinesin_flows_expired_total").absolute(connections.expired);
        counter!("kinesin_flows_forgotten_total").absolute(connections.forgotten);
        counter!("kinesin_flows_unsettled_total").absolute(connections.unsettled);
        for (table, used, size) in [("flows", settled.kept(), flows), ("transient", transient.kept(), others)] {
            gauge!("kinesin_map_pressure", "map_name" => table).set(used as f64 / f64::from(size.max(1)));
        }
        let mut problems = Vec::new();
        if before.of(FlowCount::Unsettled) > self.counts.of(FlowCount::Unsettled) {
            problems.push(format!(
                "the table of established connections is full ({flows} entries): further ones stay where the oldest are forgotten; raise bpf-ct-global-tcp-max"
            ));
        }
        // After a restart the first pass tells of what was before.
        if last.looked.is_some() && connections.forgotten > last.forgotten {
            problems.push(format!(
                "{} flows forgotten early in a table of {others} entries: raise bpf-ct-global-any-max",
                connections.forgotten - last.forgotten
            ));
        }
        self.world.problems.set("connections", problems);
        self.world.connections.set(connections);
        self.counts = now;
        Ok(())
    }
}

/// New connections that were refused for want of a source port, since the maps were made.
fn portless(store: &dyn MapStore) -> Result<u64, Failure> {
    let of = |direction| Ok::<_, Failure>(store.counter(DropReason::NoNatMapping as u8, direction)?.packets);
    Ok(of(Direction::Ingress)? + of(Direction::Egress)?)
}
