//! Against a real API server: the first sync, the memory after it, and how long a change takes to the maps; ours, and
//! kube-proxy's.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, ensure};
use aya::maps::{HashMap, Map, MapData};
use kinesin::datapath::{detach_all, maps_dir};
use kinesin::lab::{AgentHandle, AgentOptions};
use kinesin_abi::{Be16, FrontendKey, FrontendValue, proto};
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use crate::cluster::{Cluster, HEALTHZ, SERVICES, SLICES, cpu_time, memory, pause, send, set_endpoints};
use crate::kube_proxy::{self, KubeProxy};
use crate::report::{heading, line, median, mib, ms, quantile, spread};
use crate::{goals, objects};

const STARTS: usize = 7;
const CHANGES: usize = 300;
/// Of kube-proxy, which takes a second for each.
const PEER_CHANGES: usize = 12;
const NOT_LATER: Duration = Duration::from_secs(60);
/// Services that kube-proxies have seen change.
static PEER_CHANGED: AtomicUsize = AtomicUsize::new(0);
/// Up to so many backends fit the maps as they are by default (`bpf-lb-map-max`).
const DEFAULT_ROOM: usize = 60_000;
const DEFAULT_SIZES: &str = "0,100,1000,5000,5000x50";

/// Services, and endpoints of each.
#[derive(Clone, Copy, PartialEq)]
struct Size {
    services: usize,
    endpoints: usize,
}

/// What a size should reach.
struct Goal {
    size: Size,
    /// The first sync, in milliseconds.
    sync: Option<(u128, &'static str)>,
    /// VmRSS, in MiB.
    resident: (u64, &'static str),
}

const GOALS: [Goal; 4] = [
    Goal { size: Size { services: 0, endpoints: 10 }, sync: None, resident: (15, "≤ 15 MiB") },
    Goal {
        size: Size { services: 1000, endpoints: 10 }, sync: Some((500, "≤ 500 ms")), resident: (30, "≤ 30 MiB")
    },
    Goal { size: Size { services: 5000, endpoints: 10 }, sync: None, resident: (45, "≤ 45 MiB") },
    Goal {
        size: Size { services: 5000, endpoints: 50 }, sync: Some((2000, "≤ 2000 ms")), resident: (75, "≤ 75 MiB")
    },
];

/// Names of rows in the table of goals.
impl Size {
    fn first_sync(self) -> String {
        format!("first sync, {self}")
    }

    fn resident(self) -> String {
        format!("VmRSS, {self}")
    }

    fn change(self) -> String {
        format!("one change, API reply to maps, p99, {self}")
    }
}

impl std::fmt::Display for Size {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.services {
            0 => f.write_str("nothing"),
            services => write!(f, "{services} × {}", self.endpoints),
        }
    }
}

fn sizes() -> anyhow::Result<Vec<Size>> {
    let text = std::env::var("KINESIN_BENCH_SERVICES").unwrap_or_else(|_| DEFAULT_SIZES.into());
    let wrong =
        "KINESIN_BENCH_SERVICES is a list of rising numbers of services, and of endpoints if not 10: 0,1000,1000x50";
    let one = |text: &str| -> anyhow::Result<Size> {
        let (services, endpoints) = text.split_once('x').unwrap_or((text, "10"));
        Ok(Size { services: services.parse().context(wrong)?, endpoints: endpoints.parse().context(wrong)? })
    };
    let sizes = text.split(',').map(one).collect::<anyhow::Result<Vec<_>>>()?;
    ensure!(sizes.windows(2).all(|pair| pair[0].services <= pair[1].services), wrong);
    ensure!(
        sizes.iter().all(|size| size.endpoints + 2 <= objects::MAX_ENDPOINTS),
        "at most {} endpoints",
        objects::MAX_ENDPOINTS - 2
    );
    Ok(sizes)
}

pub(crate) fn run() -> anyhow::Result<()> {
    let cluster = Cluster::start("bench-sync", 1, 0)?;
    let sizes = sizes()?;
    let most = sizes.iter().map(|size| size.services).max().unwrap_or(0).max(1000);
    let mut churned = false;
    let mut there = Size { services: 0, endpoints: 10 };
    for size in sizes {
        cluster.create(there.services..size.services, size.endpoints)?;
        if size.endpoints != there.endpoints {
            cluster.resize(0..there.services, size.endpoints)?;
        }
        there = size;
        heading(&format!("A real API server, {size}"));
        let agent = first_syncs(&cluster, size)?;
        if size.services >= 1000 {
            changes(&cluster, &agent, size)?;
        }
        // Once, with the most services and the fewest endpoints.
        if size.services == most && !std::mem::replace(&mut churned, true) {
            churn(&cluster, &agent, size)?;
        }
        cluster.runtime.block_on(agent.stop());
        detach_all(&cluster.node().bpf_root())?;
        if size.services >= 1000 {
            peers(&cluster, size)?;
        }
    }
    cluster.end();
    Ok(())
}

fn start_agent(cluster: &Cluster, size: Size) -> anyhow::Result<AgentHandle> {
    let mut options = AgentOptions::new(crate::agent_binary()?)
        .config("k8s-kubeconfig-path", &cluster.plane.kubeconfig().to_string_lossy())
        .config("kube-proxy-replacement", "true")
        .config("kube-proxy-replacement-healthz-bind-address", &format!("0.0.0.0:{HEALTHZ}"));
    if size.services * size.endpoints > DEFAULT_ROOM {
        options = options.config("bpf-lb-map-max", "300000");
    }
    Ok(cluster.node().start_agent(&options)?)
}

/// Starts with nothing in the kernel, then with the maps of the run before; memory. Returns the last agent, running.
fn first_syncs(cluster: &Cluster, size: Size) -> anyhow::Result<AgentHandle> {
    let (node, runtime) = (cluster.node(), &cluster.runtime);
    let (mut fresh, mut adopted) = (Vec::new(), Vec::new());
    let (mut rss, mut peak) = (Vec::new(), Vec::new());
    let start = |times: &mut Vec<Duration>| {
        let begun = Instant::now();
        let agent = {
            let _context = runtime.enter();
            start_agent(cluster, size)?
        };
        let healthy = node.netns().run(|| wait_healthy(begun))?;
        times.push(healthy.with_context(|| agent.logs(30))?);
        anyhow::Ok(agent)
    };
    for _ in 0..STARTS {
        detach_all(&node.bpf_root())?;
        let agent = start(&mut fresh)?;
        rss.push(memory(agent.pid(), "VmRSS")?);
        peak.push(memory(agent.pid(), "VmHWM")?);
        runtime.block_on(agent.stop());
    }
    for _ in 0..STARTS {
        let agent = start(&mut adopted)?;
        runtime.block_on(agent.stop());
    }
    detach_all(&node.bpf_root())?;
    let agent = start(&mut fresh)?;
    runtime.block_on(async { tokio::time::sleep(Duration::from_secs(5)).await });
    line("start to /healthz 200, nothing in the kernel", &[("time", spread(&fresh))]);
    line("start to /healthz 200, maps of an earlier agent", &[("time", spread(&adopted))]);
    line("memory at that moment", &[("VmRSS", mib(median(&rss))), ("VmHWM", mib(median(&peak)))]);
    let parts = ["VmRSS", "RssAnon", "RssFile", "VmHWM"]
        .map(|field| memory(agent.pid(), field).map(|bytes| (field, mib(bytes))));
    line("memory after 5 idle seconds", &parts.into_iter().collect::<Result<Vec<_>, _>>()?);
    let pinned = pinned(&node.bpf_root())?;
    let total = pinned.iter().map(|(_, bytes)| bytes).sum();
    line("memory of the maps (fdinfo memlock)", &[("all", mib(total))]);
    for (name, bytes) in pinned {
        if bytes > 1 << 20 {
            line(&format!("    {name}"), &[("", mib(bytes))]);
        }
    }
    if let Some(Goal { sync, resident: (most, text), .. }) = GOALS.iter().find(|goal| goal.size == size) {
        if let Some((most, text)) = sync {
            let time = median(&fresh);
            goals::ours(&size.first_sync(), text, ms(time), Some(time.as_millis() <= *most));
        }
        let resident = memory(agent.pid(), "VmRSS")?;
        goals::ours(&size.resident(), text, mib(resident), Some(resident <= most << 20));
        goals::ours(&format!("memory of the maps, {size}"), "-", mib(total), None);
    }
    for text in agent.logs(60).lines().filter(|text| text.contains("first complete sync")) {
        println!("    {text}");
    }
    Ok(agent)
}

/// Asks until `/healthz` says 200; the time since `begun`.
pub(crate) fn wait_healthy(begun: Instant) -> anyhow::Result<Duration> {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, HEALTHZ));
    loop {
        if healthy(address).unwrap_or(false) {
            return Ok(begun.elapsed());
        }
        ensure!(begun.elapsed() < NOT_LATER, "/healthz does not say 200");
        pause(Duration::from_millis(2));
    }
}

fn healthy(address: SocketAddr) -> std::io::Result<bool> {
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(1))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer.starts_with("HTTP/1.1 200"))
}

/// What the kernel charges for each pinned map, the largest first.
fn pinned(bpf_root: &Path) -> anyhow::Result<Vec<(String, u64)>> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir(maps_dir(bpf_root))? {
        let path = entry?.path();
        let map = MapData::from_pin(&path)?;
        let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", map.fd().as_fd().as_raw_fd()))?;
        let bytes = text.lines().find_map(|line| line.strip_prefix("memlock:")).and_then(|n| n.trim().parse().ok());
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        all.push((name, bytes.unwrap_or(0)));
    }
    all.sort_by_key(|(_, bytes)| std::cmp::Reverse(*bytes));
    Ok(all)
}

/// Endpoints come and go, one at a time; when does the pinned frontends map say so?
fn changes(cluster: &Cluster, agent: &AgentHandle, size: Size) -> anyhow::Result<()> {
    let Size { services, endpoints } = size;
    let watch = Watch::start(&cluster.node().bpf_root())?;
    let map = frontends(&cluster.node().bpf_root())?;
    let before = histogram(&cluster.runtime, agent)?;
    let cpu = cpu_time(agent.pid())?;
    let begun = Instant::now();
    let samples = cluster.with_client(async move |client| {
        let mut samples = Vec::new();
        for change in 0..CHANGES {
            let service = change * 7 % services;
            let name = objects::name(service);
            let get = http::Request::get(format!("{SERVICES}/{name}")).body(Vec::new())?;
            let object = client.request::<Value>(get).await?;
            let ip: Ipv4Addr = object["spec"]["clusterIP"].as_str().context("no clusterIP")?.parse()?;
            let key = FrontendKey { addr: ip.into(), port: Be16::new(80), proto: proto::TCP, pad: 0 };
            let wanted = if map.get(&key, 0)?.internal.count as usize == endpoints { endpoints + 1 } else { endpoints };
            let patch = json!({ "endpoints": objects::slice(service, wanted)["endpoints"] });
            watch.orders.send((key, u32::try_from(wanted)?))?;
            let asked = Instant::now();
            send(&client, "PATCH", &format!("{SLICES}/{name}-abcde"), &patch).await?;
            let replied = Instant::now();
            let seen = watch.seen.recv_timeout(NOT_LATER).context("the change does not reach the map")?;
            samples.push((seen.saturating_duration_since(replied), seen.duration_since(asked)));
        }
        anyhow::Ok(samples)
    })?;
    let took = begun.elapsed();
    let cpu = cpu_time(agent.pid())?.saturating_sub(cpu);
    let (replied, asked): (Vec<_>, Vec<_>) = samples.into_iter().unzip();
    let figures = |samples: &[Duration]| [0.5, 0.9, 0.99].map(|share| ms(quantile(samples, share))).join(" / ");
    line("one change, API reply to map, p50 / p90 / p99", &[("", figures(&replied))]);
    line("    counted from sending the request", &[("", figures(&asked))]);
    let slow = quantile(&replied, 0.99);
    goals::ours(&size.change(), "≤ 25 ms", ms(slow), Some(slow <= Duration::from_millis(25)));
    let per_change = cpu / u32::try_from(CHANGES)?;
    let figures = [("", ms(per_change)), ("in all, during", ms(took))];
    line("    the agent's processor time per change", &figures);
    let after = histogram(&cluster.runtime, agent)?;
    line("    in the agent, event to map, counts by seconds", &[("", between(&before, &after))]);
    let gained = |bound: &str| {
        let count = |all: &[(String, u64)]| all.iter().find(|(at, _)| at == bound).map_or(0, |(_, count)| *count);
        count(&after) - count(&before)
    };
    let share = gained("0.001") as f64 / gained("+Inf").max(1) as f64;
    let within = format!("{:.1} % within it", share * 100.0);
    goals::ours(&format!("    in the agent, p99, {size}"), "≤ 1 ms", within, Some(share >= 0.99));
    Ok(())
}

/// What a histogram has gained, by upper bounds.
pub(crate) fn between(before: &[(String, u64)], after: &[(String, u64)]) -> String {
    let inside: Vec<String> = after
        .iter()
        .map(|(bound, count)| {
            let earlier = before.iter().find(|(other, _)| other == bound).map_or(0, |(_, count)| *count);
            format!("≤{bound}: {}", count - earlier)
        })
        .collect();
    inside.join("  ")
}

type Frontends = HashMap<MapData, FrontendKey, FrontendValue>;

fn frontends(bpf_root: &Path) -> anyhow::Result<Frontends> {
    Ok(Map::HashMap(MapData::from_pin(maps_dir(bpf_root).join("FRONTENDS"))?).try_into()?)
}

/// A thread that looks at a frontend until it has so many backends, and tells when that was. It ends with the sender.
struct Watch {
    orders: SyncSender<(FrontendKey, u32)>,
    seen: Receiver<Instant>,
}

impl Watch {
    fn start(bpf_root: &Path) -> anyhow::Result<Self> {
        let map = frontends(bpf_root)?;
        let (orders, inbox) = sync_channel::<(FrontendKey, u32)>(0);
        let (tell, seen) = sync_channel(1);
        std::thread::spawn(move || {
            for (key, wanted) in inbox {
                let deadline = Instant::now() + NOT_LATER;
                while Instant::now() < deadline {
                    if map.get(&key, 0).is_ok_and(|value| value.internal.count == wanted) {
                        let _ = tell.send(Instant::now());
                        break;
                    }
                    pause(Duration::from_micros(50));
                }
            }
        });
        Ok(Self { orders, seen })
    }
}

/// Upper bounds and cumulative counts of the agent's own histogram.
pub(crate) fn histogram(runtime: &Runtime, agent: &AgentHandle) -> anyhow::Result<Vec<(String, u64)>> {
    let (_, text) = runtime.block_on(agent.get("/metrics"))?;
    let buckets = text.lines().filter_map(|line| line.strip_prefix("kinesin_endpoint_to_map_seconds_bucket{le=\""));
    Ok(buckets
        .filter_map(|line| line.split_once("\"} "))
        .map(|(bound, n)| (bound.into(), n.parse().unwrap_or(0)))
        .collect())
}

/// A thousand changes a second for a minute, or as many as the API server can take.
fn churn(cluster: &Cluster, agent: &AgentHandle, size: Size) -> anyhow::Result<()> {
    const PER_SECOND: u32 = 1000;
    const SECONDS: u32 = 60;
    const CLIENTS: usize = 16;
    let Size { services, endpoints } = size;
    let pid = agent.pid();
    let before = histogram(&cluster.runtime, agent)?;
    let (cpu, begun) = (cpu_time(pid)?, Instant::now());
    let end = begun + Duration::from_secs(SECONDS.into());
    let rss = |samples: &mut Vec<u64>| {
        samples.push(memory(pid, "VmRSS")?);
        anyhow::Ok(())
    };
    let mut samples = Vec::new();
    rss(&mut samples)?;
    let done = std::thread::scope(|scope| {
        let load = scope.spawn(|| {
            cluster.with_client(async move |client| {
                let next = AtomicU32::new(0);
                let worker = |_| async {
                    let mut done = 0u32;
                    loop {
                        let number = next.fetch_add(1, Ordering::Relaxed);
                        let due = begun + Duration::from_secs(1) / PER_SECOND * number;
                        if due >= end || Instant::now() >= end {
                            return anyhow::Ok(done);
                        }
                        tokio::time::sleep_until(due.into()).await;
                        // Each change is one: the second round through the services takes back what the first one did.
                        let (service, round) = (number as usize % services, number as usize / services);
                        set_endpoints(&client, service, endpoints + usize::from(round % 2 == 0)).await?;
                        done += 1;
                    }
                };
                let all = futures::future::try_join_all((0..CLIENTS).map(worker)).await?;
                Ok(all.into_iter().sum::<u32>())
            })
        });
        while !load.is_finished() {
            pause(Duration::from_secs(1));
            rss(&mut samples)?;
        }
        load.join().expect("the load does not panic")
    })?;
    let took = begun.elapsed();
    let cpu = cpu_time(pid)?.saturating_sub(cpu);
    // Whatever is still on its way is seen by how long one more change takes to be there.
    let after = histogram(&cluster.runtime, agent)?;
    let per_second = f64::from(done) / took.as_secs_f64();
    let cores = cpu.as_secs_f64() / took.as_secs_f64();
    line(
        "as many changes as the API server takes, at most 1,000/s",
        &[("changes/s", format!("{per_second:.0}")), ("for", ms(took))],
    );
    let each = [
        ("cores", format!("{cores:.2}")),
        ("per change", ms(cpu / done.max(1))),
        ("so at 1,000/s", format!("{:.2}", cores / per_second * 1000.0)),
    ];
    line("    the agent's processor time", &each);
    let third = samples.len() / 3;
    let figures = [
        ("at first", mib(samples[0])),
        ("after 20 s", mib(samples[third])),
        ("after 40 s", mib(samples[2 * third])),
        ("at the end", mib(samples[samples.len() - 1])),
    ];
    line("    the agent's VmRSS", &figures);
    line("    in the agent, event to map, counts by seconds", &[("", between(&before, &after))]);
    Ok(())
}

/// The same with kube-proxy where the agent was.
fn peers(cluster: &Cluster, size: Size) -> anyhow::Result<()> {
    for mode in kube_proxy::MODES {
        let title = format!("kube-proxy {mode}");
        if let Some(why) = kube_proxy::missing(mode) {
            println!("{title}: not measured, {why}");
            continue;
        }
        let proxy = KubeProxy::start(cluster, mode)?;
        let synced = match proxy.wait_synced() {
            Ok(synced) => synced,
            // iptables takes minutes for thousands of services.
            Err(error) => {
                println!("{title}: not measured: {error}");
                proxy.stop(cluster)?;
                continue;
            }
        };
        let resident = mib(memory(proxy.pid(), "VmRSS")?);
        line(&format!("{title}: start to first sync"), &[("time", ms(synced)), ("VmRSS", resident.clone())]);
        goals::other(&size.first_sync(), &title, ms(synced));
        goals::other(&size.resident(), &title, resident);
        let mut samples = Vec::new();
        for _ in 0..PEER_CHANGES {
            // A number that no other section leaves behind, of a service that had none of these changes: it is one.
            let service = PEER_CHANGED.fetch_add(1, Ordering::Relaxed) % size.services;
            let wanted = size.endpoints + 2;
            let asked = SystemTime::now();
            cluster.with_client(async move |client| set_endpoints(&client, service, wanted).await)?;
            samples.push(proxy.wait_synced_after(asked)?);
        }
        line(&format!("{title}: one change, request to rules"), &[("time", spread(&samples))]);
        goals::other(&size.change(), &title, format!("{} (median, from the request)", ms(median(&samples))));
        proxy.stop(cluster)?;
    }
    Ok(())
}
