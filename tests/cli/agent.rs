//! An agent that knows a few things, behind a real admin socket and real TCP listeners.

use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use futures::FutureExt;
use futures::future::BoxFuture;
use kinesin::admin::views::{
    ConfigSummary, ConfigView, ConnectionsView, DumpRow, Healthz, HookView, KprView, MapView, MemberView, NodeKind,
    NodeState, Readiness, SourceView, StatusView, SyncView, TableView, TreeView, VipView,
};
use kinesin::admin::{self, AdminSocket, Api, ApiError};
use kinesin::config::{self, Inputs, ListenAddr};
use kinesin_core::services::{BackendView, FrontendView, WideBackend, WideView};
use kinesin_core::trace::{Member, Question, Step, Trace, Verdict, Way};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::sync::oneshot;

/// An agent that knows a few things.
#[derive(Default)]
pub(crate) struct Sample {
    pub(crate) synced: AtomicBool,
    pub(crate) leaving: AtomicBool,
    pub(crate) killed: Mutex<Vec<String>>,
}

fn backend(address: &str, state: &'static str, node: &str) -> BackendView {
    BackendView { address: address.into(), state, node: node.into(), zone: "".into() }
}

pub(crate) fn service_object() -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": { "name": "web", "namespace": "shop" },
        "spec": {
            "type": "LoadBalancer", "clusterIP": "10.96.0.1",
            "ports": [{ "port": 80, "nodePort": 30080, "protocol": "TCP" }, { "port": 53, "protocol": "UDP" }],
            "selector": { "app": "web" },
        },
        "status": { "loadBalancer": { "ingress": [{ "ip": "10.0.0.100" }] } },
    })
}

impl Api for Sample {
    fn status(&self) -> BoxFuture<'_, StatusView> {
        let view = StatusView {
            families: vec!["IPv4".into()],
            node: "pi-1".into(),
            version: "0.1.0".into(),
            uptime_seconds: 3700,
            source: SourceView { kind: "manifests".into(), location: "/m".into(), healthy: true, detail: "".into() },
            config: ConfigSummary { generation: "abc123".into(), ..ConfigSummary::default() },
            hooks: vec![
                HookView {
                    program: "cil_from_netdev".into(),
                    target: "eth0".into(),
                    how: "tcx/ingress".into(),
                    ok: true,
                    error: None,
                },
                HookView {
                    program: "cil_sock4_connect".into(),
                    target: "/sys/fs/cgroup".into(),
                    how: "cgroup/connect4".into(),
                    ok: false,
                    error: Some("refused".into()),
                },
            ],
            kube_proxy_replacement: KprView {
                enabled: true,
                devices: vec!["eth0 192.168.1.2".into()],
                backend_selection: "Random".into(),
                services: [("NodePort".into(), "Enabled (Range: 30000-32767)".into())].into(),
                ..KprView::default()
            },
            sync: vec![
                SyncView { kind: "services".into(), complete: true, objects: 3 },
                SyncView { kind: "endpointslices".into(), complete: false, objects: 0 },
            ],
            maps: vec![MapView { name: "frontends".into(), used: 1, max: 4 }],
            connections: ConnectionsView {
                established: 12,
                looked_seconds_ago: Some(30),
                ..ConnectionsView::default()
            },
            leader: Some("pi-2".into()),
            members: vec![MemberView { node: "pi-2".into(), state: "alive".into(), ..MemberView::default() }],
            problems: vec!["service shop/web: no pool contains 10.9.9.9".into()],
        };
        async { view }.boxed()
    }

    fn services(&self) -> BoxFuture<'_, Vec<FrontendView>> {
        let backends = (1..=6).map(|i| backend(&format!("10.42.0.{i}:8080"), "active", "pi-1")).collect();
        let frontend = |address: &str, kind, status: &str, backends| FrontendView {
            address: address.into(),
            kind,
            service: "shop/web".into(),
            port_name: "http".into(),
            scope: "all",
            status: status.into(),
            backends,
        };
        let views = vec![
            frontend("10.0.0.100:80/TCP", "LoadBalancer", "programmed", backends),
            frontend(
                "10.96.0.1:80/TCP",
                "ClusterIP",
                "pending",
                vec![backend("10.42.1.7:8080", "terminating", "pi-2")],
            ),
            frontend("10.96.0.2:80/TCP", "ClusterIP", "programmed", vec![]),
        ];
        async { views }.boxed()
    }

    fn services_wide(&self) -> BoxFuture<'_, Vec<WideView>> {
        let backend = |address: &str, state, node: &str, zone: &str, unused: Option<&'static str>| WideBackend {
            address: address.into(),
            state,
            node: node.into(),
            zone: zone.into(),
            weight: u32::from(unused.is_none()),
            unused,
        };
        let view = WideView {
            address: "10.0.0.100:80/TCP".into(),
            kind: "LoadBalancer",
            service: "shop/web".into(),
            port_name: "http".into(),
            scope: "external",
            status: "programmed".into(),
            routable: true,
            external_traffic_policy: "Local",
            internal_traffic_policy: "Cluster",
            algorithm: "maglev",
            session_affinity_seconds: Some(10_800),
            source_ranges_policy: Some("deny"),
            source_ranges: vec!["192.0.2.0/24".into()],
            health_check_node_port: Some(31_000),
            backends: vec![
                backend("10.42.0.1:8080", "active", "pi-1", "a", None),
                backend("10.42.0.2:8080", "maintenance", "pi-1", "", Some("not ready")),
            ],
        };
        async { vec![view] }.boxed()
    }

    fn vips(&self) -> BoxFuture<'_, Vec<VipView>> {
        let views = vec![
            VipView {
                address: "10.0.0.100".into(),
                services: vec!["shop/web".into()],
                pool: Some("first-pool".into()),
                owner: Some("pi-1".into()),
                interface: Some("eth0".into()),
                mac: Some("02:00:00:00:00:01".into()),
                since: Some("2026-01-02T03:04:05Z".parse().unwrap()),
                state: "announced".into(),
            },
            VipView {
                address: "10.0.0.101".into(),
                services: vec!["shop/api".into()],
                state: "pending".into(),
                ..VipView::default()
            },
        ];
        async { views }.boxed()
    }

    fn tree(&self) -> BoxFuture<'_, TreeView> {
        let actor = |name: &str, restarts: u64| TreeView {
            name: name.into(),
            messages: 12,
            mean_handle_us: 1500,
            restarts: if restarts == 0 { Default::default() } else { [("panic".into(), restarts)].into() },
            uptime_seconds: Some(61),
            ..TreeView::default()
        };
        let supervisor = |name: &str, strategy: &str, children| TreeView {
            name: name.into(),
            kind: NodeKind::Supervisor,
            strategy: Some(strategy.into()),
            children,
            ..TreeView::default()
        };
        let writer =
            TreeView { state: NodeState::Restarting, last_error: Some("map is full".into()), ..actor("map_writer", 2) };
        let datapath = supervisor("datapath", "rest_for_one", vec![actor("loader", 0), writer]);
        let health = supervisor("health", "one_for_one", vec![actor("watchdog", 0)]);
        async move { supervisor("agent", "one_for_one", vec![datapath, health]) }.boxed()
    }

    fn tables(&self) -> BoxFuture<'_, Vec<TableView>> {
        async { vec![TableView { name: "frontends".into(), about: "what the map holds".into(), rows: 2 }] }.boxed()
    }

    fn dump<'a>(&'a self, table: &'a str) -> BoxFuture<'a, Result<Vec<DumpRow>, ApiError>> {
        let rows = match table {
            "frontends" => Ok(vec![
                DumpRow::new([
                    ("address", json!("10.0.0.100:80/TCP")),
                    ("service_id", json!(7)),
                    ("note", Value::Null),
                ]),
                DumpRow::new([("address", json!("10.96.0.1:80/TCP")), ("service_id", json!(8)), ("note", json!("x"))]),
            ]),
            "with space/é" => Ok(vec![]),
            _ => Err(ApiError::NotFound(format!("no table {table}: see `kinesin dump`"))),
        };
        async { rows }.boxed()
    }

    fn trace(&self, question: Question) -> BoxFuture<'_, Result<Trace, ApiError>> {
        let way = |chance, port: u16, local| Way {
            chance,
            backend: Some(Member {
                id: u32::from(port),
                address: ([10, 42, 0, 1], port).into(),
                state: "active".into(),
                local,
            }),
            steps: vec![],
            verdict: Verdict::Connects { to: ([10, 42, 0, 1], port).into() },
        };
        let answer = match question.parse() {
            Ok(written) if question.device == "gone" => Err(format!("--device: {:?}", written.device)),
            Ok(_) => Ok(Trace {
                packet: format!("{} -> {}", question.src, question.dst),
                steps: vec![Step::NoFlow],
                ways: vec![way(0.75, 8080, true), way(0.25, 8081, false)],
            }),
            Err(error) => Err(error.to_string()),
        };
        async { answer.map_err(ApiError::Invalid) }.boxed()
    }

    fn get<'a>(&'a self, kind: &'a str, name: Option<&'a str>) -> BoxFuture<'a, Result<Vec<Value>, ApiError>> {
        let answer = match (kind, name) {
            ("services", None | Some("web" | "shop/web")) => Ok(vec![service_object()]),
            ("services", Some(name)) => Err(ApiError::NotFound(format!("no Service {name}"))),
            ("ciliumloadbalancerippools", _) => Ok(vec![]),
            _ => Err(ApiError::NotFound(format!("no objects of kind {kind} are read"))),
        };
        async { answer }.boxed()
    }

    fn kill<'a>(&'a self, actor: &'a str) -> BoxFuture<'a, Result<(), ApiError>> {
        self.killed.lock().unwrap().push(actor.into());
        async move { if actor == "map_writer" { Ok(()) } else { Err(ApiError::NotFound(format!("no actor {actor}"))) } }
            .boxed()
    }

    fn metrics(&self) -> BoxFuture<'_, String> {
        async { "agent_up 1\n".to_string() }.boxed()
    }

    fn ready(&self) -> Readiness {
        let ready = self.synced.load(Ordering::SeqCst);
        let reasons = if ready { vec![] } else { vec!["endpointslices: no complete list yet".into()] };
        Readiness { ready, reasons }
    }

    fn live(&self) -> Readiness {
        Readiness { ready: true, reasons: vec![] }
    }

    fn healthz(&self) -> Healthz {
        let synced = self.synced.load(Ordering::SeqCst);
        let now = "2026-01-02T03:04:05Z".parse().unwrap();
        let last_updated = synced.then_some(now);
        let node_eligible = !self.leaving.load(Ordering::SeqCst);
        Healthz { healthy: synced, node_eligible, families: vec!["IPv4"], last_updated, current: now }
    }

    fn config(&self) -> BoxFuture<'_, ConfigView> {
        let flags =
            [("bpf-lb-algorithm", "maglef"), ("devices", "eth0"), ("enable-hubble", "true"), ("enable-ipv44", "1")];
        let flags = flags.map(|(key, value)| (key.to_string(), value.to_string())).to_vec();
        let inputs = Inputs { flags, hostname: "pi-1".into(), ..Inputs::default() };
        let (config, report) = config::load(&inputs).unwrap();
        async { ConfigView { node: config.node_name, generation: config.generation, report } }.boxed()
    }
}

/// The sample agent on a socket of its own, until dropped.
pub(crate) struct Agent {
    pub(crate) api: Arc<Sample>,
    pub(crate) dir: TempDir,
    pub(crate) metrics: std::net::SocketAddr,
    pub(crate) healthz: std::net::SocketAddr,
    stop: Vec<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Agent {
    pub(crate) fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run/kinesin.sock");
        let api = Arc::new(Sample::default());
        let served: Arc<dyn Api> = api.clone();
        let (mut stop, mut stopped) = (Vec::new(), Vec::new());
        for _ in 0..3 {
            let (send, receive) = oneshot::channel::<()>();
            stop.push(send);
            stopped.push(async { drop(receive.await) });
        }
        let (ready, started) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let local = ListenAddr { ip: Some([127, 0, 0, 1].into()), port: 0 };
                let (metrics, healthz) = (admin::bind(&local).await.unwrap(), admin::bind(&local).await.unwrap());
                let socket = AdminSocket::bind(&path).unwrap();
                ready.send((metrics.local_addr().unwrap(), healthz.local_addr().unwrap())).unwrap();
                let (a, b, c) = (stopped.remove(0), stopped.remove(0), stopped.remove(0));
                let (a, b, c) = tokio::join!(
                    socket.serve(served.clone(), a),
                    admin::serve_metrics(metrics, served.clone(), b),
                    admin::serve_healthz(healthz, served.clone(), c),
                );
                a.and(b).and(c).unwrap();
            });
        });
        let (metrics, healthz) = started.recv().unwrap();
        Self { api, dir, metrics, healthz, stop, thread: Some(thread) }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.path().join("run/kinesin.sock")
    }

    pub(crate) fn run(&self, args: &[&str]) -> Output {
        command(args).env("KINESIN_SOCKET", self.socket()).output().unwrap()
    }

    /// Standard output of a command that must succeed.
    pub(crate) fn ok(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert_eq!(output.status.code(), Some(0), "{args:?}: {}", stderr(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    pub(crate) fn json(&self, args: &[&str]) -> Value {
        serde_json::from_str(&self.ok(&[args, &["-o", "json"]].concat())).unwrap()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.stop.drain(..).for_each(|stop| _ = stop.send(()));
        let ended = self.thread.take().unwrap().join();
        assert!(ended.is_ok() || std::thread::panicking());
        assert!(!self.socket().exists() || std::thread::panicking(), "the socket goes with the server");
    }
}

pub(crate) fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kinesin"));
    for (name, _) in std::env::vars_os() {
        let name = name.to_string_lossy().into_owned();
        if name.starts_with("KINESIN_") || name.starts_with("CILIUM_") {
            command.env_remove(name);
        }
    }
    command.args(args);
    command
}

pub(crate) fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}
