//! A cluster of three nodes with two pods each, a client that counts, and ways to look at it from outside.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kinesin::admin::views::{NodeState, StatusView, TreeView};
use kinesin::datapath::{KernelMaps, MapStore};
use kinesin::lab::programs::ClientOptions;
use kinesin::lab::report::Totals;
use kinesin::lab::{AgentHandle, AgentOptions, ECHO_PORT, Lab, LoadHandle, manifests};
use kinesin_abi::Settings;
use serde::de::DeserializeOwned;
use serde_json::json;
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::Instant;

/// Longer than anything takes on a busy machine, short enough to wait for when something is broken.
pub(crate) const LIMIT: Duration = Duration::from_secs(40);
/// For a new connection and its answer. Below the second after which TCP repeats a lost SYN: one lost packet is a failure.
const REQUEST_LIMIT: Duration = Duration::from_millis(900);
/// New connections per second.
pub(crate) const RATE: u32 = 50;
/// Long-lived connections.
const HELD: u32 = 50;

/// Each test has ten processes and is judged by time: more than one at once would measure the machine.
static TURNS: Semaphore = Semaphore::const_new(1);

/// Every table but the counters.
pub(crate) const VERIFIED: [&str; 7] = ["frontends", "slots", "backends", "maglev", "l2", "devices", "settings"];

/// How long a node counts as present.
#[derive(Clone, Copy)]
pub(crate) enum Lease {
    /// Long enough that nothing ever moves by time, whatever the machine does.
    Patient,
    /// Short enough to wait for.
    Quick,
}

impl Lease {
    pub(crate) fn seconds(self) -> u64 {
        match self {
            Self::Patient => 60,
            Self::Quick => 4,
        }
    }
}

/// The running cluster. Fields drop in order: programs first, what they stand on last.
pub(crate) struct Rig {
    agents: Vec<Option<AgentHandle>>,
    pub(crate) lab: Lab,
    pub(crate) vip: Ipv4Addr,
    lease: Lease,
    more: Vec<(String, String)>,
    _turn: SemaphorePermit<'static>,
}

/// The contents of maps, as bytes: what counters and clocks write is left out.
pub(crate) type Picture = BTreeMap<&'static str, BTreeMap<Vec<u8>, Vec<u8>>>;

impl Rig {
    /// Three nodes, all agents ready, the address owned by one of them.
    pub(crate) async fn start(name: &str, lease: Lease, more: &[(&str, &str)]) -> Self {
        let turn = TURNS.acquire().await.unwrap();
        let builder = Lab::builder(name).binary(env!("CARGO_BIN_EXE_kinesin"));
        let lab = builder.nodes(3).pods_per_node(2).build().await.unwrap();
        manifests::write_all(&lab).unwrap();
        for pod in lab.pods() {
            pod.serve().await.unwrap();
        }
        let more = more.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect();
        let agents = lab.nodes().iter().map(|_| None).collect();
        let mut rig = Self { agents, lab, vip: Ipv4Addr::UNSPECIFIED, lease, more, _turn: turn };
        for number in 1..=3 {
            rig.start_agent(number);
        }
        for number in 1..=3 {
            rig.agent(number).wait_ready(LIMIT).await.unwrap();
        }
        rig.vip = rig.address().await;
        rig.owner(&[]).await;
        rig
    }

    /// Starts the agent of a node; whoever cares waits until it is ready.
    pub(crate) fn start_agent(&mut self, number: usize) {
        let lease = self.lease.seconds();
        let mut options = AgentOptions::new(self.lab.binary())
            .state_dir(self.lab.dir().join("state"))
            .config("manifests-dir", &self.lab.manifests_dir().to_string_lossy())
            .config("source", "manifests")
            .config("kube-proxy-replacement", "true")
            .config("enable-l2-announcements", "true")
            .config("map-verify-interval", "1s")
            .config("l2-announcements-lease-duration", &format!("{lease}s"))
            .config("l2-announcements-renew-deadline", &format!("{}s", lease / 2))
            .config("l2-announcements-retry-period", "500ms");
        for (key, value) in &self.more {
            options = options.config(key, value);
        }
        self.agents[number - 1] = Some(self.lab.node(number).start_agent(&options).unwrap());
    }

    pub(crate) fn agent(&self, number: usize) -> &AgentHandle {
        self.agents[number - 1].as_ref().unwrap_or_else(|| panic!("the agent of node {number} does not run"))
    }

    /// The agent, to be ended; its node has none afterwards.
    pub(crate) fn take_agent(&mut self, number: usize) -> AgentHandle {
        self.agents[number - 1].take().unwrap_or_else(|| panic!("the agent of node {number} does not run"))
    }

    /// A JSON answer of an agent; `None` while it does not answer.
    pub(crate) async fn ask<T: DeserializeOwned>(&self, number: usize, path: &str) -> Option<T> {
        match self.agent(number).get(path).await {
            Ok((200, body)) => {
                Some(serde_json::from_str(&body).unwrap_or_else(|error| panic!("{path}: {error}: {body}")))
            }
            _ => None,
        }
    }

    pub(crate) async fn tree(&self, number: usize) -> Option<TreeView> {
        self.ask(number, "/v1/tree").await
    }

    pub(crate) async fn status(&self, number: usize) -> StatusView {
        let mut found = None;
        eventually("the agent tells its status", async || {
            found = self.ask(number, "/v1/status").await;
            found.is_some()
        })
        .await;
        found.unwrap()
    }

    /// The sum of a metric over its labels.
    pub(crate) async fn metric(&self, number: usize, name: &str) -> f64 {
        let mut found = None;
        // Asked while the server itself may be on its way back.
        eventually("the agent tells its metrics", async || {
            found = self.agent(number).get("/metrics").await.ok();
            found.is_some()
        })
        .await;
        let (status, text) = found.expect("just seen");
        assert_eq!(status, 200, "{text}");
        let lines = text
            .lines()
            .filter(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(' ') || rest.starts_with('{')));
        lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
    }

    /// Tells an actor to panic. Returns whether it was there and the answer arrived.
    pub(crate) async fn kill(&self, number: usize, actor: &str) -> bool {
        match self.agent(number).post("/v1/debug/kill", &json!({ "actor": actor })).await {
            Ok((204, _)) => true,
            Ok((503, _)) => false,
            // The one that answers is the one that was told to die.
            Err(_) if actor == "health_server" => false,
            other => panic!("kill {actor}: {other:?}"),
        }
    }

    async fn address(&self) -> Ipv4Addr {
        let mut found = None;
        eventually("the service has an address", async || {
            let vips: Vec<serde_json::Value> = self.ask(1, "/v1/vips").await.unwrap_or_default();
            found = vips.iter().find_map(|vip| vip["address"].as_str()?.parse().ok());
            found.is_some()
        })
        .await;
        found.unwrap()
    }

    /// Numbers of the nodes that answer on the wire for the address right now.
    pub(crate) async fn answering(&self) -> Vec<usize> {
        self.answering_within(Duration::from_millis(300)).await
    }

    pub(crate) async fn answering_within(&self, bound: Duration) -> Vec<usize> {
        let heard = self.lab.client().arp_probe_within(self.vip, bound).await.unwrap();
        let mut numbers = Vec::new();
        for mac in heard {
            for node in self.lab.nodes() {
                if node.mac().await.unwrap() == mac {
                    numbers.push(node.number());
                }
            }
        }
        numbers
    }

    /// Waits until exactly one node answers, none of `not`, and every living agent agrees.
    pub(crate) async fn owner(&self, not: &[usize]) -> usize {
        let mut seen = String::new();
        let mut owner = 0;
        eventually_or("one owner that all agents know", async || {
            let answering = self.answering().await;
            let mut said = Vec::new();
            for number in (1..=3).filter(|number| self.agents[number - 1].is_some()) {
                let vips: Vec<serde_json::Value> = self.ask(number, "/v1/vips").await.unwrap_or_default();
                let vip = vips.iter().find(|vip| vip["address"] == json!(self.vip.to_string()));
                said.push(vip.and_then(|vip| vip["owner"].as_str().map(str::to_owned)));
            }
            seen = format!("answering {answering:?}, agents say {said:?}");
            let [one] = answering[..] else { return Err(seen.clone()) };
            owner = one;
            let name = self.lab.node(one).name();
            let agreed = !not.contains(&one) && said.iter().all(|who| who.as_deref() == Some(name));
            if agreed { Ok(()) } else { Err(seen.clone()) }
        })
        .await;
        owner
    }

    /// Starts the traffic and waits until it is at ease.
    pub(crate) async fn load(&self) -> Load {
        let mut options = ClientOptions::new(format!("http://{}/", self.vip))
            .rate(RATE)
            .timeout(REQUEST_LIMIT)
            .hold(HELD, SocketAddr::from((self.vip, ECHO_PORT)));
        options.report_ms = 100;
        let handle = self.lab.client().load(&options).unwrap();
        let calm = |t: &Totals| t.held.open == u64::from(HELD) && t.nodes.len() == 3 && t.succeeded > u64::from(RATE);
        let totals = handle.wait_for("calm traffic to all backends", LIMIT, calm).await.unwrap();
        assert_eq!((totals.failed, totals.held.broken, totals.held.open_failures), (0, 0, 0), "{totals:?}");
        Load { handle }
    }

    /// The pinned maps of a node.
    pub(crate) fn maps(&self, number: usize) -> KernelMaps {
        KernelMaps::open_pinned(&self.lab.node(number).bpf_root()).unwrap().expect("an agent pinned its maps")
    }

    /// What the maps of a node hold.
    pub(crate) fn picture(&self, number: usize) -> Picture {
        picture(&self.maps(number))
    }

    /// The last words of all agents, for failures.
    pub(crate) fn words(&self) -> String {
        let tail = |node: &kinesin::lab::Node| kinesin::net::proc::tail(&node.log("agent"), 200);
        self.lab.nodes().iter().map(|node| format!("--- {}\n{}\n", node.name(), tail(node))).collect()
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.words());
        }
    }
}

pub(crate) fn picture(maps: &KernelMaps) -> Picture {
    let table = |name: &'static str| {
        let entries = maps.raw_entries(name).unwrap().into_iter();
        let entries: BTreeMap<_, _> = match name {
            // Arrays are full of zeros.
            "slots" | "backends" => entries.filter(|(_, value)| value.iter().any(|byte| *byte != 0)).collect(),
            "l2" => entries.map(|(key, _)| (key, Vec::new())).collect(),
            "settings" => entries
                .map(|(key, mut value)| {
                    value[..size_of_val(&Settings::default().alive_at)].fill(0);
                    (key, value)
                })
                .collect(),
            _ => entries.collect(),
        };
        (name, entries)
    };
    VERIFIED.into_iter().map(table).collect()
}

/// What differs between two pictures, for people.
pub(crate) fn difference(before: &Picture, after: &Picture) -> Vec<String> {
    let mut lines = Vec::new();
    for (table, was) in before {
        let is = &after[table];
        for key in was.keys().chain(is.keys().filter(|key| !was.contains_key(*key))) {
            if was.get(key) != is.get(key) {
                let short = |value: Option<&Vec<u8>>| value.map(|bytes| bytes[..bytes.len().min(32)].to_vec());
                lines.push(format!("{table} {key:?}: {:?} became {:?}", short(was.get(key)), short(is.get(key))));
            }
        }
    }
    lines
}

/// A running client.
pub(crate) struct Load {
    pub(crate) handle: LoadHandle,
}

impl Load {
    pub(crate) fn totals(&self) -> Totals {
        self.handle.totals()
    }

    /// Waits until this many more requests have succeeded.
    pub(crate) async fn more(&self, requests: u64) {
        let goal = self.totals().succeeded + requests;
        self.handle.wait_for("more successes", LIMIT, |totals| totals.succeeded >= goal).await.unwrap();
    }

    /// Ends the traffic: nothing may have been lost since its start.
    pub(crate) async fn nothing_lost(self) -> Totals {
        let totals = self.handle.stop().await.unwrap();
        assert_eq!((totals.failed, totals.held.broken, totals.held.open_failures), (0, 0, 0), "{totals:?}");
        totals
    }
}

/// All actors of a tree, by name.
pub(crate) fn actors(tree: &TreeView) -> BTreeMap<String, TreeView> {
    let mut all = BTreeMap::new();
    let mut queue = vec![tree];
    while let Some(node) = queue.pop() {
        queue.extend(&node.children);
        if node.children.is_empty() {
            all.insert(node.name.clone(), node.clone());
        }
    }
    all
}

pub(crate) fn is_running(node: &TreeView) -> bool {
    node.state == NodeState::Running
}

/// Waits until a condition holds.
pub(crate) async fn eventually(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    eventually_or(what, async || if condition().await { Ok(()) } else { Err(String::new()) }).await;
}

/// Waits until a condition holds; when it does not, what it said last is in the failure.
pub(crate) async fn eventually_or(what: &str, mut condition: impl AsyncFnMut() -> Result<(), String>) {
    let deadline = Instant::now() + LIMIT;
    while let Err(last) = condition().await {
        assert!(Instant::now() < deadline, "not within {LIMIT:?}: {what}; last: {last}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A witness on the LAN who asks for the address without a pause.
pub(crate) struct Wire {
    task: tokio::task::JoinHandle<()>,
    heard: Arc<Mutex<Vec<Heard>>>,
}

/// When somebody was asked for, and the numbers of the nodes that answered.
pub(crate) type Heard = (Instant, Vec<usize>);

impl Rig {
    pub(crate) fn watch_wire(&self) -> Wire {
        let (client, vip) = (self.lab.client().clone(), self.vip);
        let nodes = self.lab.nodes().to_vec();
        let heard = Arc::<Mutex<Vec<_>>>::default();
        let task = tokio::spawn({
            let heard = heard.clone();
            async move {
                let mut macs = BTreeMap::new();
                for node in &nodes {
                    macs.insert(node.mac().await.unwrap(), node.number());
                }
                loop {
                    let at = Instant::now();
                    let answers = client.arp_probe_within(vip, Duration::from_millis(100)).await.unwrap();
                    let mut numbers: Vec<usize> = answers.iter().map(|mac| macs[mac]).collect();
                    numbers.sort_unstable();
                    heard.lock().unwrap().push((at, numbers));
                }
            }
        });
        Wire { task, heard }
    }
}

impl Wire {
    /// Waits until the witness has heard exactly this node.
    pub(crate) async fn hears(&self, number: usize) {
        eventually("the witness hears the owner", async || {
            self.heard.lock().unwrap().last().is_some_and(|(_, answering)| *answering == [number])
        })
        .await;
    }

    /// Ends it: when somebody was asked for, and the numbers of the nodes that answered. Changes only.
    pub(crate) async fn stop(self) -> Vec<Heard> {
        self.task.abort();
        let ended = self.task.await;
        assert!(ended.is_err_and(|error| error.is_cancelled()), "the witness heard somebody unknown");
        let mut heard = std::mem::take(&mut *self.heard.lock().unwrap());
        heard.dedup_by(|later, earlier| later.1 == earlier.1);
        heard
    }
}
