//! Every connection and every datagram, while agents are killed at any moment, started again, and started with tables of
//! other sizes: long-lived TCP, new connections, and UDP flows that are counted one by one.

use std::collections::BTreeMap;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use kinesin::datapath::{KernelMaps, MapStore};
use kinesin::lab::programs::{ClientOptions, WHO};
use kinesin::lab::report::Totals;
use kinesin::lab::{ECHO_PORT, LoadHandle, manifests};
use kinesin_abi::Be16;

use super::rig::{LIMIT, Lease, RATE, Rig, eventually, eventually_or};

/// Long-lived connections, each of which says something twenty times a second.
const HELD: u32 = 120;
/// Flows of UDP, each of which asks twenty times a second.
const DATAGRAMS: usize = 40;
const PACE: Duration = Duration::from_millis(50);
/// A busy machine answers late; what is lost is never answered.
const PATIENCE: Duration = Duration::from_secs(20);

/// Flows of UDP from the client, in a thread of its own.
struct Datagrams {
    rounds: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Vec<String>>,
}

impl Datagrams {
    fn start(rig: &Rig) -> Self {
        let (netns, service) = (rig.lab.client().netns().clone(), SocketAddr::from((rig.vip, ECHO_PORT)));
        let (rounds, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (counter, ended) = (rounds.clone(), stop.clone());
        let thread = std::thread::spawn(move || netns.run(move || ask(service, &counter, &ended)).unwrap());
        Self { rounds, stop, thread }
    }

    /// Waits until each flow has had this many more answers.
    async fn more(&self, rounds: u64) {
        let goal = self.rounds.load(Ordering::Relaxed) + rounds;
        eventually("more datagrams", async || {
            assert!(!self.thread.is_finished(), "a datagram was lost");
            self.rounds.load(Ordering::Relaxed) >= goal
        })
        .await;
    }

    fn nothing_lost(self) {
        self.stop.store(true, Ordering::Relaxed);
        assert_eq!(self.thread.join().unwrap(), Vec::<String>::new());
    }
}

/// Asks by each flow and waits for all answers, again and again. What was lost, and which flows have another pod in the end.
#[allow(clippy::disallowed_methods, reason = "a thread of its own, which paces itself")]
fn ask(service: SocketAddr, rounds: &AtomicU64, stop: &AtomicBool) -> Vec<String> {
    let open = |_| {
        let socket = UdpSocket::bind(("0.0.0.0", 0)).unwrap();
        socket.connect(service).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket
    };
    let sockets: Vec<UdpSocket> = (0..DATAGRAMS).map(open).collect();
    let exchange = |socket: &UdpSocket, question: &[u8]| -> Result<Vec<u8>, String> {
        let mut answer = [0; 256];
        socket.send(question).map_err(|error| format!("{:?}: {error}", socket.local_addr()))?;
        let length = socket.recv(&mut answer).map_err(|error| format!("{:?}: {error}", socket.local_addr()))?;
        Ok(answer[..length].to_vec())
    };
    // Who it is, without the address that it sees, which is the node's where that translates.
    let pod = |socket: &UdpSocket| {
        let answer = exchange(socket, WHO)?;
        Ok(String::from_utf8_lossy(&answer).split(' ').next().unwrap_or_default().to_owned())
    };
    let pods: Result<Vec<String>, String> = sockets.iter().map(&pod).collect();
    let Ok(pods) = pods else { return vec![format!("at the start: {pods:?}")] };
    let mut number = 0u64;
    while !stop.load(Ordering::Relaxed) {
        number += 1;
        for socket in &sockets {
            match exchange(socket, &number.to_be_bytes()) {
                Ok(answer) if answer == number.to_be_bytes() => {}
                other => return vec![format!("datagram {number}: {other:?}")],
            }
        }
        rounds.fetch_add(1, Ordering::Relaxed);
        std::thread::sleep(PACE);
    }
    let moved = sockets.iter().zip(&pods).filter_map(|(socket, before)| {
        let now = pod(socket);
        (now.as_ref() != Ok(before)).then(|| format!("{before} became {now:?}"))
    });
    moved.collect()
}

/// TCP and UDP through the address.
struct Traffic {
    tcp: LoadHandle,
    udp: Datagrams,
}

impl Traffic {
    async fn start(rig: &Rig) -> Self {
        let mut options = ClientOptions::new(format!("http://{}/", rig.vip))
            .rate(RATE)
            .timeout(PATIENCE)
            .hold(HELD, SocketAddr::from((rig.vip, ECHO_PORT)));
        (options.report_ms, options.hold_pause_ms) = (100, PACE.as_millis() as u64);
        options.hold_timeout_ms = PATIENCE.as_millis() as u64;
        let tcp = rig.lab.client().load(&options).unwrap();
        let calm = |t: &Totals| t.held.open == u64::from(HELD) && t.succeeded > u64::from(RATE);
        tcp.wait_for("all connections", LIMIT, calm).await.unwrap();
        let traffic = Self { tcp, udp: Datagrams::start(rig) };
        traffic.goes_on().await;
        traffic
    }

    /// Waits until everything has said and heard something more.
    async fn goes_on(&self) {
        let before = self.tcp.totals();
        let on = |t: &Totals| {
            t.held.echoes >= before.held.echoes + u64::from(HELD) && t.succeeded >= before.succeeded + u64::from(RATE)
        };
        self.tcp.wait_for("more traffic", LIMIT, on).await.unwrap();
        self.udp.more(3).await;
    }

    async fn nothing_lost(self) {
        self.udp.nothing_lost();
        let totals = self.tcp.stop().await.unwrap();
        assert_eq!((totals.failed, totals.held.broken, totals.held.open_failures), (0, 0, 0), "{totals:?}");
    }
}

/// Adds the echo over UDP to the Service and its endpoints.
async fn serve_datagrams(rig: &Rig) {
    for (file, port) in [
        (
            "service.yaml",
            format!("    - {{name: echo-udp, protocol: UDP, port: {ECHO_PORT}, targetPort: {ECHO_PORT}}}\n"),
        ),
        ("endpoints.yaml", format!("  - {{name: echo-udp, protocol: UDP, port: {ECHO_PORT}}}\n")),
    ] {
        let path = manifests::path(&rig.lab, file);
        let text = std::fs::read_to_string(&path).unwrap();
        let text = text.replacen("ports:\n", &format!("ports:\n{port}"), 1);
        let early = path.with_file_name(format!(".{file}"));
        std::fs::write(&early, text).unwrap();
        std::fs::rename(&early, &path).unwrap();
    }
    for number in 1..=3 {
        eventually_or("the datagrams' frontend is in the maps", async || {
            let backends = backends(&rig.maps(number));
            let here = backends.iter().any(|(key, count)| key.contains("/17") && *count > 0);
            if here { Ok(()) } else { Err(format!("{backends:?}")) }
        })
        .await;
    }
}

/// How many backends each frontend has.
fn backends(maps: &KernelMaps) -> BTreeMap<String, usize> {
    let meaning = maps.read().unwrap().meaning();
    let of = meaning.frontends.iter().filter(|(key, _)| key.port != Be16::new(0));
    of.map(|(key, front)| (format!("{:?}:{:?}/{}", key.addr, key.port, key.proto), front.external.len())).collect()
}

/// Looks at the maps of a node without a pause, and keeps what of `expected` was missing.
struct Watch {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<(u64, Vec<String>)>,
}

impl Watch {
    fn start(rig: &Rig, number: usize) -> Self {
        let maps = rig.maps(number);
        let expected = backends(&maps);
        assert!(expected.values().any(|count| *count > 1), "{expected:?}");
        let stop = Arc::new(AtomicBool::new(false));
        let ended = stop.clone();
        let thread = std::thread::spawn(move || {
            let (mut looks, mut missing) = (0, Vec::new());
            while !ended.load(Ordering::Relaxed) && missing.is_empty() {
                let now = backends(&maps);
                let less = |(key, count): (&String, &usize)| now.get(key).is_none_or(|has| has < count);
                if expected.iter().any(less) {
                    missing.push(format!("expected {expected:?}, found {now:?}"));
                }
                looks += 1;
                std::thread::yield_now();
            }
            (looks, missing)
        });
        Self { stop, thread }
    }

    fn nothing_missing(self) {
        self.stop.store(true, Ordering::Relaxed);
        let (looks, missing) = self.thread.join().unwrap();
        assert_eq!(missing, Vec::<String>::new());
        assert!(looks > 10, "{looks} looks");
    }
}

/// Nobody's presence runs out however long a busy machine takes for a restart: this is about flows, not about owners.
const LONG: (&str, &str) = ("l2-announcements-lease-duration", "900s");
const SNAT: (&str, &str) = ("bpf-lb-mode", "snat");

/// How often agents are killed; `KINESIN_RESTARTS=100` for the whole of R22.
fn restarts() -> u64 {
    std::env::var("KINESIN_RESTARTS").ok().and_then(|text| text.parse().ok()).unwrap_or(6)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r22_flows_through_a_node_without_backends_outlive_every_restart_of_its_agent() {
    // With the node's address, so that all packets of all flows depend on what this node knows.
    let mut rig = Rig::start("transit", Lease::Patient, &[SNAT, LONG]).await;
    let owner = rig.owner(&[]).await;
    manifests::write_endpoints(&rig.lab, &[rig.lab.node(owner).name()]).unwrap();
    serve_datagrams(&rig).await;
    let traffic = Traffic::start(&rig).await;
    let nodes = traffic.tcp.totals().nodes;
    let settled = rig.maps(owner).raw_entries("flows").unwrap().len();
    assert!(settled >= 2 * HELD as usize, "the node has {settled} entries of connections to {nodes:?}");
    let watch = Watch::start(&rig, owner);
    for _ in 0..restarts() {
        rig.take_agent(owner).kill9();
        traffic.goes_on().await;
        rig.start_agent(owner);
        rig.agent(owner).wait_ready(LIMIT).await.unwrap();
        traffic.goes_on().await;
    }
    watch.nothing_missing();
    assert_eq!(rig.owner(&[]).await, owner);
    traffic.nothing_lost().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r23_r31_agents_killed_at_any_moment_of_their_start_lose_no_flow_and_no_backend() {
    let mut rig = Rig::start("moments", Lease::Patient, &[LONG]).await;
    let owner = rig.owner(&[]).await;
    serve_datagrams(&rig).await;
    let traffic = Traffic::start(&rig).await;
    let watch = Watch::start(&rig, owner);
    for _ in 0..2 * restarts() {
        rig.take_agent(owner).kill9();
        rig.start_agent(owner);
        // Somewhere between its first instruction and a while after it is ready, whenever that is on this machine.
        let moment = Duration::from_millis(rand::random_range(0..2_500));
        let _ = tokio::time::timeout(moment, async {
            let _ = rig.agent(owner).wait_ready(LIMIT).await;
            std::future::pending::<()>().await;
        })
        .await;
    }
    rig.agent(owner).wait_ready(LIMIT).await.unwrap();
    traffic.goes_on().await;
    watch.nothing_missing();
    assert_eq!(rig.owner(&[]).await, owner);
    traffic.nothing_lost().await;
}

/// Keys of sizes, each with a small and a large one, and the table that shows it.
const SIZES: [(&str, [&str; 2], &str); 9] = [
    ("bpf-ct-global-tcp-max", ["30000", "300000"], "flows"),
    ("bpf-ct-global-any-max", ["20000", "200000"], "transient"),
    ("bpf-sock-rev-map-max", ["10000", "100000"], "sockets"),
    ("bpf-lb-service-map-max", ["3000", "90000"], "frontends"),
    ("bpf-lb-service-backend-map-max", ["4000", "80000"], "backends"),
    ("bpf-lb-affinity-map-max", ["5000", "50000"], "affinity"),
    ("bpf-lb-source-range-map-max", ["2000", "20000"], "ranges"),
    ("bpf-lb-maglev-map-max", ["1500", "2500"], "maglev"),
    ("bpf-fragments-map-max", ["1024", "16384"], "fragments"),
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r29_every_size_is_changed_under_traffic_live_and_by_a_restart_and_no_flow_is_lost() {
    let mut rig = Rig::start("sizes", Lease::Patient, &[SNAT, LONG]).await;
    let owner = rig.owner(&[]).await;
    serve_datagrams(&rig).await;
    let traffic = Traffic::start(&rig).await;
    for (turn, killed) in [(0, false), (1, false), (0, true), (1, true)] {
        if killed {
            rig.take_agent(owner).kill9();
        }
        for (key, values, _) in SIZES {
            rig.lab.node(owner).set_config(key, values[turn]).unwrap();
        }
        if killed {
            traffic.goes_on().await;
            rig.start_agent(owner);
        }
        eventually_or("all tables have their new sizes, and nothing is wrong", async || {
            if killed {
                rig.agent(owner).wait_ready(LIMIT).await.map_err(|error| error.to_string())?;
            }
            let status = rig.status(owner).await;
            let of = |table: &str| status.maps.iter().find(|map| map.name == table).map(|map| map.max);
            let other: Vec<_> = SIZES
                .iter()
                .filter(|(_, values, table)| of(table) != values[turn].parse().ok())
                .map(|(key, values, table)| format!("{key}={}: {:?}", values[turn], of(table)))
                .collect();
            if other.is_empty() && status.problems.is_empty() {
                Ok(())
            } else {
                Err(format!("{other:?} {:#?}", status.problems))
            }
        })
        .await;
        traffic.goes_on().await;
    }
    assert_eq!(rig.owner(&[]).await, owner);
    traffic.nothing_lost().await;
}
