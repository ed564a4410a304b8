//! Against a real API server: the first sync, the memory after it, and how long a change takes to the maps.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use aya::maps::{HashMap, Map, MapData};
use futures::{StreamExt, TryStreamExt};
use kinesin::datapath::{detach_all, maps_dir};
use kinesin::lab::{AgentHandle, AgentOptions, Lab, Node};
use kinesin_abi::{Be16, FrontendKey, FrontendValue, proto};
use kube::Client;
use serde_json::{Value, json};

use crate::objects;
use crate::report::{heading, line, median, mib, ms, quantile, spread};
use crate::support::control_plane::{ControlPlane, Options};

const HEALTHZ: u16 = 10_256;
/// The API server listens where the LAN's router is.
const API: Ipv4Addr = kinesin::lab::ROUTER_ADDRESS;
const IN_FLIGHT: usize = 32;
const ENDPOINTS: usize = 10;
const STARTS: usize = 7;
const CHANGES: usize = 300;
const NOT_LATER: Duration = Duration::from_secs(60);

pub(crate) fn run() -> anyhow::Result<()> {
    let runtime = tokio::runtime::Runtime::new()?;
    let binary = crate::agent_binary()?;
    let lab = runtime.block_on(Lab::builder("bench-sync").binary(&binary).build())?;
    let options = Options { netns: Some(lab.lan().path().to_owned()), bind: IpAddr::V4(API), ..Options::default() };
    let plane = ControlPlane::start(&lab.dir().join("control-plane"), options)?;
    create_node(&lab, &plane)?;

    let sizes = std::env::var("KINESIN_BENCH_SERVICES").unwrap_or_else(|_| "0,100,1000,5000".into());
    let mut there = 0;
    for size in sizes.split(',') {
        let size: usize = size.parse().context("KINESIN_BENCH_SERVICES is a list of numbers such as 0,100,1000")?;
        ensure!(size >= there, "KINESIN_BENCH_SERVICES must rise: services are added");
        create(&lab, &plane, there..size)?;
        there = size;
        heading(&format!("A real API server, {size} services × {ENDPOINTS}"));
        let agent = first_syncs(&runtime, &lab, &plane)?;
        if size >= 1000 {
            changes(&runtime, &lab, &plane, &agent, size)?;
        }
        runtime.block_on(agent.stop());
    }
    drop(plane);
    runtime.block_on(async { drop(lab) });
    Ok(())
}

/// Runs `work` with an API client whose connections begin in the lab's LAN.
fn with_client<T: Send>(
    lab: &Lab,
    plane: &ControlPlane,
    work: impl AsyncFnOnce(Client) -> anyhow::Result<T> + Send,
) -> anyhow::Result<T> {
    let kubeconfig = kube::config::Kubeconfig::read_from(plane.kubeconfig())?;
    lab.lan().run(move || {
        // On this very thread, which is in the namespace for good.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async move {
            let options = kube::config::KubeConfigOptions::default();
            let config = kube::Config::from_custom_kubeconfig(kubeconfig, &options).await?;
            work(Client::try_from(config)?).await
        })
    })?
}

async fn send(client: &Client, method: &str, path: &str, body: &Value) -> anyhow::Result<Value> {
    let kind = if method == "PATCH" { "application/strategic-merge-patch+json" } else { "application/json" };
    // EndpointSlices have no strategic merge of their lists: the merge patch replaces them as a whole.
    let kind = if method == "PATCH" && path.contains("endpointslices") { "application/merge-patch+json" } else { kind };
    let request = http::Request::builder().method(method).uri(path).header(http::header::CONTENT_TYPE, kind);
    let request = request.body(serde_json::to_vec(body)?)?;
    client.request::<Value>(request).await.with_context(|| format!("{method} {path}"))
}

const SERVICES: &str = "/api/v1/namespaces/default/services";
const SLICES: &str = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices";

fn create_node(lab: &Lab, plane: &ControlPlane) -> anyhow::Result<()> {
    let node = lab.node(1);
    let object = json!({ "apiVersion": "v1", "kind": "Node", "metadata": { "name": node.name() } });
    let status = json!({ "status": { "addresses": [{ "type": "InternalIP", "address": node.address() }] } });
    let path = format!("/api/v1/nodes/{}/status", node.name());
    with_client(lab, plane, async move |client| {
        send(&client, "POST", "/api/v1/nodes", &object).await?;
        send(&client, "PATCH", &path, &status).await.map(drop)
    })
}

fn create(lab: &Lab, plane: &ControlPlane, numbers: std::ops::Range<usize>) -> anyhow::Result<()> {
    let begun = Instant::now();
    let count = numbers.len();
    with_client(lab, plane, async move |client| {
        let one = |number: usize| {
            let client = client.clone();
            async move {
                send(&client, "POST", SERVICES, &objects::service(number, None)).await?;
                send(&client, "POST", SLICES, &objects::slice(number, ENDPOINTS)).await.map(drop)
            }
        };
        futures::stream::iter(numbers).map(one).buffer_unordered(IN_FLIGHT).try_collect::<()>().await
    })?;
    if count > 0 {
        line(&format!("(making {count} services and slices)"), &[("time", ms(begun.elapsed()))]);
    }
    Ok(())
}

fn start_agent(node: &Node, plane: &ControlPlane) -> anyhow::Result<AgentHandle> {
    let options = AgentOptions::new(crate::agent_binary()?)
        .config("k8s-kubeconfig-path", &plane.kubeconfig().to_string_lossy())
        .config("kube-proxy-replacement", "true")
        .config("kube-proxy-replacement-healthz-bind-address", &format!("0.0.0.0:{HEALTHZ}"));
    Ok(node.start_agent(&options)?)
}

/// Starts with nothing in the kernel, then with the maps of the run before; memory. Returns the last agent, running.
fn first_syncs(runtime: &tokio::runtime::Runtime, lab: &Lab, plane: &ControlPlane) -> anyhow::Result<AgentHandle> {
    let node = lab.node(1);
    let (mut fresh, mut adopted) = (Vec::new(), Vec::new());
    let (mut rss, mut peak) = (Vec::new(), Vec::new());
    let start = |times: &mut Vec<Duration>| {
        let begun = Instant::now();
        let agent = {
            let _context = runtime.enter();
            start_agent(node, plane)?
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
    for text in agent.logs(60).lines().filter(|text| text.contains("first complete sync")) {
        println!("    {text}");
    }
    Ok(agent)
}

/// Asks until `/healthz` says 200; the time since `begun`.
fn wait_healthy(begun: Instant) -> anyhow::Result<Duration> {
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

#[expect(clippy::disallowed_methods, reason = "a thread of the benchmark, which looks at something again and again")]
fn pause(time: Duration) {
    std::thread::sleep(time);
}

/// A field of `/proc/<pid>/status`, in bytes.
fn memory(pid: u32, field: &str) -> anyhow::Result<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let found = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':')?.split_whitespace().next());
    let kib: u64 = found.with_context(|| format!("no {field} in the status of {pid}"))?.parse()?;
    Ok(kib * 1024)
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
fn changes(
    runtime: &tokio::runtime::Runtime,
    lab: &Lab,
    plane: &ControlPlane,
    agent: &AgentHandle,
    services: usize,
) -> anyhow::Result<()> {
    let watch = Watch::start(&lab.node(1).bpf_root())?;
    let map = frontends(&lab.node(1).bpf_root())?;
    let before = histogram(runtime, agent)?;
    let cpu = cpu_time(agent.pid())?;
    let begun = Instant::now();
    let samples = with_client(lab, plane, async move |client| {
        let mut samples = Vec::new();
        for change in 0..CHANGES {
            let service = change * 7 % services;
            let name = objects::name(service);
            let get = http::Request::get(format!("{SERVICES}/{name}")).body(Vec::new())?;
            let object = client.request::<Value>(get).await?;
            let ip: Ipv4Addr = object["spec"]["clusterIP"].as_str().context("no clusterIP")?.parse()?;
            let key = FrontendKey { addr: ip.into(), port: Be16::new(80), proto: proto::TCP, pad: 0 };
            let wanted = if map.get(&key, 0)?.internal.count as usize == ENDPOINTS { ENDPOINTS + 1 } else { ENDPOINTS };
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
    let per_change = cpu / u32::try_from(CHANGES)?;
    let figures = [("", ms(per_change)), ("in all, during", ms(took))];
    line("    the agent's processor time per change", &figures);
    let after = histogram(runtime, agent)?;
    let inside: Vec<String> = after
        .iter()
        .map(|(bound, count)| {
            let earlier = before.iter().find(|(other, _)| other == bound).map_or(0, |(_, count)| *count);
            format!("≤{bound}: {}", count - earlier)
        })
        .collect();
    line("    in the agent, event to map, counts by seconds", &[("", inside.join("  "))]);
    Ok(())
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
fn histogram(runtime: &tokio::runtime::Runtime, agent: &AgentHandle) -> anyhow::Result<Vec<(String, u64)>> {
    let (_, text) = runtime.block_on(agent.get("/metrics"))?;
    let buckets = text.lines().filter_map(|line| line.strip_prefix("kinesin_endpoint_to_map_seconds_bucket{le=\""));
    Ok(buckets
        .filter_map(|line| line.split_once("\"} "))
        .map(|(bound, n)| (bound.into(), n.parse().unwrap_or(0)))
        .collect())
}

/// User and system time of a process.
fn cpu_time(pid: u32) -> anyhow::Result<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // Fields 14 and 15, proc(5); the second may hold spaces, but ends with the last parenthesis.
    let rest = stat.rsplit_once(')').context("/proc/<pid>/stat has no name")?.1;
    let ticks: u64 = rest.split_whitespace().skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum();
    let per_second = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK)?.unwrap_or(100);
    Ok(Duration::from_millis(ticks * 1000 / u64::try_from(per_second)?))
}
