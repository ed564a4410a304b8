//! What the agent answers when it is asked: the levels, read together.
//!
//! Deliberately absent: state of its own, but for the tree, which exists only after this.

use std::sync::{Arc, Mutex, OnceLock};
use std::time::Instant;

use futures::future::{BoxFuture, FutureExt};
use jiff::Timestamp;
use kinesin_core::devices::mac_text;
use kinesin_core::services::{self, FrontendView, WideView};
use kinesin_core::trace::{Question, Trace};
use metrics::{counter, gauge};
use metrics_exporter_prometheus::PrometheusHandle;

use super::{kpr, objects, trees};
use crate::actors::vip_owner::{VipOwnerMsg, views};
use crate::address::Address;
use crate::admin::views::{
    ConfigSummary, ConfigView, ConnectionsView, DumpRow, Healthz, HookView, MapView, MemberView, Readiness, SourceView,
    StatusView, SyncView, TableView, TreeView, VipView,
};
use crate::admin::{Api, ApiError};
use crate::config::Report;
use crate::datapath::{TableUsage, meaning_rows};
use crate::level::Level;
use crate::source::Source;
use crate::supervisor::Child;
use crate::sync::lock;
use crate::trace::{Live, TraceError, answer};
use crate::world::{MapsHandle, World};

/// The table that is no map: the maps of services resolved, free of ids.
const RESOLVED: &str = "services";

/// Implements [`Api`].
pub(super) struct Answers {
    world: World,
    source: Arc<dyn Source>,
    report: Level<Report>,
    metrics: PrometheusHandle,
    vip_owner: Address<VipOwnerMsg>,
    tree: OnceLock<Child>,
    began: Instant,
    told: Mutex<Told>,
}

/// What was last said of kube-proxy's health.
struct Told {
    healthy: bool,
    node_eligible: bool,
    /// When traffic was last known to be welcome.
    last_good: Option<Timestamp>,
}

impl Answers {
    pub(super) fn new(
        world: World,
        source: Arc<dyn Source>,
        report: Level<Report>,
        metrics: PrometheusHandle,
        vip_owner: Address<VipOwnerMsg>,
    ) -> Arc<Self> {
        let (tree, began) = (OnceLock::new(), Instant::now());
        // As nothing is programmed yet, the first good answer is a change.
        let told = Mutex::new(Told { healthy: false, node_eligible: true, last_good: None });
        Arc::new(Self { world, source, report, metrics, vip_owner, tree, began, told })
    }

    /// Completes the answers; before, there are no actors to tell of.
    pub(super) fn set_tree(&self, root: Child) {
        // Set twice means set to the same.
        let _ = self.tree.set(root);
    }

    fn programmed(&self) -> bool {
        self.world.programmed.get().is_some_and(|programmed| *programmed)
    }

    fn status_of(&self, key: &services::ServiceKey) -> String {
        match self.world.unwritten.get(key) {
            Some(problem) => problem.to_string(),
            None if self.programmed() => "programmed".into(),
            None => "pending".into(),
        }
    }

    fn sync(&self) -> Vec<SyncView> {
        let w = &self.world;
        let view = |kind: &str, complete: bool, objects: usize| SyncView {
            kind: kind.into(),
            complete,
            objects: objects as u64,
        };
        vec![
            view("services", w.services.is_complete(), w.services.len()),
            view("endpointslices", w.slices.is_complete(), w.slices.len()),
            view("pods", w.pods.is_complete(), w.pods.len()),
            view("nodes", w.nodes.is_complete(), w.nodes.len()),
            view("ciliumloadbalancerippools", w.pools.is_complete(), w.pools.len()),
            view("ciliuml2announcementpolicies", w.policies.is_complete(), w.policies.len()),
            view("leases", w.leases.is_complete(), w.leases.len()),
        ]
    }

    fn hooks(&self) -> Vec<HookView> {
        let handle = self.world.maps.get();
        let hooks = handle.iter().flat_map(|handle| &handle.hooks);
        hooks
            .map(|hook| HookView {
                program: hook.program.clone(),
                target: hook.place.clone(),
                how: hook.attached.map_or_else(|| "-".into(), |attached| format!("{attached:?}").to_lowercase()),
                ok: hook.is_ok(),
                error: hook.error.clone(),
            })
            .collect()
    }

    fn maps(&self) -> Vec<MapView> {
        let handle = self.world.maps.get();
        let usage = handle.iter().flat_map(|handle| handle.tables.store.usage());
        usage
            .map(|table| MapView { name: table.name.into(), used: self.used(&table), max: table.max_entries.into() })
            .collect()
    }

    /// Tables of connections are too large to be counted for each question.
    fn used(&self, table: &TableUsage) -> u64 {
        let connections = self.world.connections.get().map(|connections| *connections).unwrap_or_default();
        match table.name {
            "flows" => connections.settled,
            "transient" => connections.transient,
            _ => table.entries.unwrap_or(0),
        }
    }

    fn connections(&self) -> ConnectionsView {
        let connections = self.world.connections.get().map(|connections| *connections).unwrap_or_default();
        ConnectionsView {
            established: connections.settled.saturating_sub(connections.opening),
            transient: connections.transient + connections.opening,
            expired: connections.expired,
            forgotten: connections.forgotten,
            unsettled: connections.unsettled,
            looked_seconds_ago: connections.looked.map(|at| at.elapsed().as_secs()),
            took_ms: connections.took.as_millis() as u64,
        }
    }

    fn members(&self) -> Vec<MemberView> {
        let live = self.world.members.get();
        let records = live.iter().flat_map(|live| live.members.records.keys());
        let peers = self.world.peers.get().filter(|_| self.world.config().services.hands_on());
        let way = |node: &str| peers.iter().flat_map(|peers| peers.iter()).find(|peer| peer.node == node);
        records
            .map(|node| MemberView {
                node: node.to_string(),
                state: "alive".into(),
                last_seen: None,
                forwarding: way(node).map(|peer| peer.state.text()).unwrap_or_default(),
            })
            .collect()
    }

    fn families(&self) -> Vec<&'static str> {
        let families = &self.world.config().families;
        let named = [(families.ipv4, "IPv4"), (families.ipv6, "IPv6")];
        named.into_iter().filter(|(on, _)| *on).map(|(_, name)| name).collect()
    }

    fn problems(&self) -> Vec<String> {
        let listed = self.world.problems.all().into_iter();
        let mut lines: Vec<_> =
            listed.flat_map(|(area, texts)| texts.into_iter().map(move |text| format!("{area}: {text}"))).collect();
        lines.extend(self.source.health().problems.into_iter().map(|text| format!("source: {text}")));
        for (key, compiled) in self.world.compiled.rows() {
            let (kind, object) = services::object_of(&key);
            lines.extend(compiled.problems.iter().map(|problem| format!("{kind} {object}: {problem}")));
        }
        for (key, text) in self.world.unwritten.rows() {
            let (kind, object) = services::object_of(&key);
            lines.push(format!("{kind} {object}: {text}"));
        }
        lines
    }

    async fn vip_views(&self) -> Vec<VipView> {
        let devices = self.world.devices.get();
        let vips = views(&self.vip_owner).await.unwrap_or_default();
        let (now, wall) = (Instant::now(), Timestamp::now());
        vips.into_iter()
            .map(|vip| {
                let device = vip.devices.first().and_then(|device| devices.as_ref()?.by_index(device.ifindex));
                let since =
                    vip.since.map(|since| wall - jiff::SignedDuration::try_from(now - since).unwrap_or_default());
                VipView {
                    address: vip.view.address.to_string(),
                    pool: objects::pool_of(&self.world, vip.view.address),
                    owner: vip.view.owner.map(Into::into),
                    interface: vip.view.interface,
                    mac: device.and_then(|device| device.mac).map(mac_text),
                    since,
                    state: objects::kebab(&vip.view.state),
                    services: vip.view.services,
                }
            })
            .collect()
    }

    fn handle(&self) -> Result<Arc<MapsHandle>, ApiError> {
        self.world.maps.get().ok_or_else(|| ApiError::Unavailable("the data path is not loaded yet".into()))
    }

    fn export(&self) {
        gauge!("kinesin_problems", "area" => "source").set(self.source.health().problems.len() as f64);
        gauge!("cilium_version", "version" => env!("CARGO_PKG_VERSION"), "revision" => "", "arch" => std::env::consts::ARCH)
            .set(1.0);
        gauge!("cilium_nodes_all_num").set(self.world.nodes.len() as f64);
        let Some(handle) = self.world.maps.get() else { return };
        let tables = handle.tables.store.usage();
        for table in &tables {
            let used = table.entries.unwrap_or(0) as f64 / f64::from(table.max_entries.max(1));
            gauge!("cilium_bpf_map_pressure", "map_name" => table.name).set(used);
            gauge!("cilium_bpf_map_capacity", "map_group" => table.name).set(f64::from(table.max_entries));
        }
        gauge!("cilium_bpf_maps_virtual_memory_max_bytes")
            .set(tables.iter().map(|table| table.bytes as f64).sum::<f64>());
        if let Ok(count) = handle.tables.store.accelerated() {
            counter!("kinesin_accelerated_packets_total").absolute(count.packets);
            counter!("kinesin_accelerated_bytes_total").absolute(count.bytes);
        }
        let driven = handle.drivers().filter(|(_, why)| why.is_none()).count();
        gauge!("kinesin_accelerated_devices").set(driven as f64);
        gauge!("kinesin_direct_devices").set(kpr::direct_devices(&self.world) as f64);
        for (reason, direction, count) in handle.tables.store.drops().unwrap_or_default() {
            let direction = format!("{direction:?}").to_uppercase();
            let labels = [("reason", reason.text().to_owned()), ("direction", direction)];
            counter!("cilium_drop_count_total", &labels).absolute(count.packets);
            counter!("cilium_drop_bytes_total", &labels).absolute(count.bytes);
        }
        for (direction, count) in handle.tables.store.forwarded().into_iter().flatten() {
            let labels = [("direction", format!("{direction:?}").to_uppercase())];
            counter!("cilium_forward_count_total", &labels).absolute(count.packets);
            counter!("cilium_forward_bytes_total", &labels).absolute(count.bytes);
        }
    }
}

impl Api for Answers {
    fn status(&self) -> BoxFuture<'_, StatusView> {
        async {
            let config = self.world.config();
            let health = self.source.health();
            let detail = match &health.last_error {
                Some(error) if !health.connected => error.clone(),
                _ => format!("since {}", health.since),
            };
            StatusView {
                node: self.world.node.to_string(),
                version: env!("CARGO_PKG_VERSION").into(),
                uptime_seconds: self.began.elapsed().as_secs(),
                source: SourceView {
                    kind: self.source.name().into(),
                    location: health.location,
                    healthy: health.connected,
                    detail,
                },
                config: ConfigSummary {
                    generation: config.generation.clone(),
                    report: Report {
                        settings: Vec::new(),
                        ..self.report.get().map(|r| Report::clone(&r)).unwrap_or_default()
                    },
                },
                hooks: self.hooks(),
                families: self.families().into_iter().map(String::from).collect(),
                kube_proxy_replacement: kpr::view(&self.world),
                sync: self.sync(),
                maps: self.maps(),
                connections: self.connections(),
                leader: self
                    .world
                    .leadership
                    .get()
                    .and_then(|leadership| leadership.holder.as_ref().map(ToString::to_string)),
                members: self.members(),
                problems: self.problems(),
            }
        }
        .boxed()
    }

    fn services(&self) -> BoxFuture<'_, Vec<FrontendView>> {
        async {
            let rows = self.world.compiled.rows().into_iter();
            let mut views: Vec<_> =
                rows.flat_map(|(key, compiled)| services::view(&key, &compiled, &self.status_of(&key))).collect();
            views.sort_by(|a, b| (&a.address, &a.service).cmp(&(&b.address, &b.service)));
            views
        }
        .boxed()
    }

    fn services_wide(&self) -> BoxFuture<'_, Vec<WideView>> {
        async {
            let rows = self.world.compiled.rows();
            let all = objects::backends(&self.world);
            let mut views: Vec<_> = rows
                .iter()
                .flat_map(|(key, compiled)| services::wide(key, compiled, &self.status_of(key), &all(key)))
                .collect();
            views.sort_by(|a, b| (&a.address, &a.service).cmp(&(&b.address, &b.service)));
            views
        }
        .boxed()
    }

    fn vips(&self) -> BoxFuture<'_, Vec<VipView>> {
        self.vip_views().boxed()
    }

    fn tree(&self) -> BoxFuture<'_, TreeView> {
        async { self.tree.get().map(trees::view).unwrap_or_default() }.boxed()
    }

    fn tables(&self) -> BoxFuture<'_, Vec<TableView>> {
        async {
            let handle = self.world.maps.get();
            let usage = handle.iter().flat_map(|handle| handle.tables.store.usage());
            let tables: Vec<_> = usage
                .map(|t| TableView { name: t.name.into(), about: objects::about(t.name).into(), rows: self.used(&t) })
                .collect();
            let resolved = tables.first().map(|frontends| TableView {
                name: RESOLVED.into(),
                about: objects::about(RESOLVED).into(),
                rows: frontends.rows,
            });
            resolved.into_iter().chain(tables).collect()
        }
        .boxed()
    }

    fn dump<'a>(&'a self, table: &'a str) -> BoxFuture<'a, Result<Vec<DumpRow>, ApiError>> {
        async move {
            let handle = self.handle()?;
            let (store, name) = (handle.tables.store.clone(), table.to_owned());
            let rows = tokio::task::spawn_blocking(move || {
                if name == RESOLVED {
                    return Ok(meaning_rows(&store.read()?.meaning()));
                }
                store.dump_raw(&name)
            })
            .await;
            let rows = rows.map_err(|error| ApiError::Unavailable(error.to_string()))?;
            let rows = rows.map_err(|error| ApiError::NotFound(error.to_string()))?;
            Ok(rows.into_iter().map(|(key, value)| DumpRow::new([("key", key), ("value", value)])).collect())
        }
        .boxed()
    }

    fn trace(&self, question: Question) -> BoxFuture<'_, Result<Trace, ApiError>> {
        async move {
            let handle = self.handle()?;
            let (world, runtime) = (self.world.clone(), tokio::runtime::Handle::current());
            let answer = tokio::task::spawn_blocking(move || {
                let live = Live::open(handle.tables.store.clone(), handle.hooks.clone(), runtime)?;
                answer(&live.with_names(Box::new(move |key| objects::frontend_name(&world, key))), &question)
            });
            let answer = answer.await.map_err(|error| ApiError::Unavailable(error.to_string()))?;
            answer.map_err(|error| match error {
                TraceError::Question(text) => ApiError::Invalid(text),
                error => ApiError::Unavailable(error.to_string()),
            })
        }
        .boxed()
    }

    fn get<'a>(
        &'a self,
        kind: &'a str,
        name: Option<&'a str>,
    ) -> BoxFuture<'a, Result<Vec<serde_json::Value>, ApiError>> {
        async move { objects::get(&self.world, kind, name) }.boxed()
    }

    fn kill<'a>(&'a self, actor: &'a str) -> BoxFuture<'a, Result<(), ApiError>> {
        async move {
            let child = self.tree.get().and_then(|root| root.find(actor));
            let child =
                child.ok_or_else(|| ApiError::NotFound(format!("there is no actor {actor}; see kinesin tree")))?;
            match child.kill() {
                Some(true) => Ok(()),
                Some(false) => Err(ApiError::Unavailable(format!("{actor} is not running right now"))),
                None => Err(ApiError::Invalid(format!("{actor} is a supervisor; name one of its actors"))),
            }
        }
        .boxed()
    }

    fn metrics(&self) -> BoxFuture<'_, String> {
        async {
            self.export();
            if let Some(root) = self.tree.get() {
                trees::report(root);
            }
            crate::metrics::render(&self.metrics)
        }
        .boxed()
    }

    fn ready(&self) -> Readiness {
        let mut reasons: Vec<_> = self
            .sync()
            .into_iter()
            .filter(|list| !list.complete)
            .map(|list| format!("waiting for {}", list.kind))
            .collect();
        // Services do not wait for kinds that only addresses need.
        reasons.retain(|reason| ["services", "endpointslices", "pods"].iter().any(|kind| reason.contains(kind)));
        if !self.programmed() {
            reasons.push("the first complete sync is not in the maps yet".into());
        }
        Readiness { ready: reasons.is_empty(), reasons }
    }

    fn live(&self) -> Readiness {
        // An agent whose supervision gave up is gone; one that answers is alive.
        Readiness { ready: true, reasons: Vec::new() }
    }

    fn healthz(&self) -> Healthz {
        let current = Timestamp::now();
        let reasons = self.world.unhealthy();
        let (healthy, node_eligible) = (reasons.is_empty(), !objects::node_is_leaving(&self.world));
        let mut told = lock(&self.told);
        if told.healthy != healthy || told.node_eligible != node_eligible {
            tracing::info!(healthy, node_eligible, reasons = reasons.join("; "), "kube-proxy health changed");
        }
        (told.healthy, told.node_eligible) = (healthy, node_eligible);
        if healthy && node_eligible {
            told.last_good = Some(current);
        }
        Healthz { healthy, node_eligible, families: self.families(), last_updated: told.last_good, current }
    }

    fn config(&self) -> BoxFuture<'_, ConfigView> {
        async {
            let config = self.world.config();
            let report = self.report.get().map(|report| Report::clone(&report)).unwrap_or_default();
            ConfigView { node: config.node_name.clone(), generation: config.generation.clone(), report }
        }
        .boxed()
    }
}
