//! Changes of EndpointSlices without an API server and etcd on the same cores: one after the other with pauses, and then a
//! thousand a second for a minute, which no API server on two cores takes. This one only sends: a list of Services and
//! EndpointSlices, and then changes of them at the rate that is asked for.
//!
//! Deliberately absent: TLS, and everything that an agent writes; it is told that it was stored.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use kinesin::datapath::detach_all;
use kinesin::lab::{AgentHandle, AgentOptions, Lab, ROUTER_ADDRESS};
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use crate::cluster::{HEALTHZ, cpu_time, memory, pause};
use crate::report::{heading, line, mib, ms};
use crate::sync::{between, histogram, wait_healthy};
use crate::{goals, objects};

const SERVICES: usize = 5000;
const ENDPOINTS: usize = 10;
/// Changes a second, and for how many seconds.
const CALM: (u32, u32) = (20, 50);
const FLOOD: (u32, u32) = (1000, 60);

pub(crate) fn run() -> anyhow::Result<()> {
    heading(&format!("Changes without an API server beside, {SERVICES} services × {ENDPOINTS}"));
    let runtime = Runtime::new()?;
    let binary = crate::agent_binary()?;
    let lab = runtime.block_on(Lab::builder("bench-flood").nodes(1).pods_per_node(0).binary(&binary).build())?;
    let sender = Sender::start(&lab)?;
    let node = lab.node(1);
    let begun = Instant::now();
    let agent = {
        let _context = runtime.enter();
        let options = AgentOptions::new(&binary)
            .config("k8s-api-server-urls", &format!("http://{}", sender.address))
            .config("kube-proxy-replacement", "true")
            .config("kube-proxy-replacement-healthz-bind-address", &format!("0.0.0.0:{HEALTHZ}"));
        node.start_agent(&options)?
    };
    let synced = node.netns().run(|| wait_healthy(begun))?.with_context(|| agent.logs(30))?;
    line("start to /healthz 200", &[("time", ms(synced))]);
    pause(Duration::from_secs(5));

    let mut watch = sender.slices.lock().expect("no thread panics with it").take().context("nobody watches slices")?;
    let done = calm(&runtime, &agent, &mut watch)?;
    let before = histogram(&runtime, &agent)?;
    let (cpu, begun) = (cpu_time(agent.pid())?, Instant::now());
    let mut resident = vec![memory(agent.pid(), "VmRSS")?];
    let sent = std::thread::scope(|scope| {
        let flood = scope.spawn(|| send(&mut watch, done, FLOOD, begun));
        while !flood.is_finished() {
            pause(Duration::from_secs(1));
            resident.push(memory(agent.pid(), "VmRSS")?);
        }
        flood.join().expect("the sender does not panic")
    })?;
    let took = begun.elapsed();
    // All of them, and how long after the last one was sent.
    let after = arrived(&runtime, &agent, &before, sent)?;
    let stored = gained(&before, &after, ALL);
    let behind = begun.elapsed() - took;
    let cores = cpu_time(agent.pid())?.saturating_sub(cpu).as_secs_f64() / took.as_secs_f64();
    let (first, last) = (resident[0], resident[resident.len() - 1]);
    let most = resident.iter().copied().max().unwrap_or(0);
    line(
        &format!("{} changes a second for {} s", FLOOD.0, FLOOD.1),
        &[("sent", sent.to_string()), ("in the maps", stored.to_string()), ("behind by", ms(behind))],
    );
    line("    the agent's processor time", &[("cores", format!("{cores:.2}"))]);
    line("    the agent's VmRSS", &[("before", mib(first)), ("most", mib(most)), ("at the end", mib(last))]);
    line("    in the agent, event to map, counts by seconds", &[("", between(&before, &after))]);
    let text = format!("{cores:.2} cores, {} to {}", mib(first), mib(last));
    let holds = cores < 0.5 && stored == sent && last <= first + first / 10;
    goals::ours("1,000 changes a second for 60 s", "< 0.5, flat", text, Some(holds));
    runtime.block_on(agent.stop());
    detach_all(&node.bpf_root())?;
    runtime.block_on(async { drop(lab) });
    Ok(())
}

/// Changes with pauses between them, as most clusters have them; how many.
fn calm(runtime: &Runtime, agent: &AgentHandle, watch: &mut TcpStream) -> anyhow::Result<u64> {
    let before = histogram(runtime, agent)?;
    let cpu = cpu_time(agent.pid())?;
    let sent = send(watch, 0, CALM, Instant::now())?;
    let after = arrived(runtime, agent, &before, sent)?;
    let cpu = cpu_time(agent.pid())?.saturating_sub(cpu);
    let (fast, all) = (gained(&before, &after, "0.001"), gained(&before, &after, ALL));
    line(
        &format!("{} changes a second for {} s", CALM.0, CALM.1),
        &[("sent", sent.to_string()), ("processor time each", ms(cpu / sent.max(1) as u32))],
    );
    line("    in the agent, event to map, counts by seconds", &[("", between(&before, &after))]);
    let holds = all == sent && fast * 100 >= all * 99;
    goals::ours("event to maps, nobody beside, ≤ 1 ms", "99 %", format!("{fast} of {all}"), Some(holds));
    Ok(sent)
}

/// The histogram once so many changes more are in it, or ten seconds later.
fn arrived(runtime: &Runtime, agent: &AgentHandle, before: &[Bucket], sent: u64) -> anyhow::Result<Vec<Bucket>> {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let after = histogram(runtime, agent)?;
        if gained(before, &after, ALL) >= sent || Instant::now() > deadline {
            return Ok(after);
        }
        pause(Duration::from_millis(20));
    }
}

/// A bucket of a histogram: its bound as text, and what is not above it.
type Bucket = (String, u64);

/// The bucket of everything.
const ALL: &str = "+Inf";

/// How many more are not above a bound.
fn gained(before: &[Bucket], after: &[Bucket], bound: &str) -> u64 {
    let within =
        |histogram: &[Bucket]| histogram.iter().find(|(other, _)| other == bound).map_or(0, |(_, count)| *count);
    within(after) - within(before)
}

/// The server.
struct Sender {
    address: SocketAddr,
    /// The connection on which EndpointSlices are watched.
    slices: Arc<Mutex<Option<TcpStream>>>,
}

impl Sender {
    fn start(lab: &Lab) -> anyhow::Result<Self> {
        let listener = lab.lan().run(|| TcpListener::bind((ROUTER_ADDRESS, 0)))??;
        let (address, slices) = (listener.local_addr()?, Arc::<Mutex<Option<TcpStream>>>::default());
        let watched = slices.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let watched = watched.clone();
                // It ends with the agent's connection.
                std::thread::spawn(move || answer(&stream, &watched));
            }
        });
        Ok(Self { address, slices })
    }
}

/// Sends changes at a rate for some seconds, each when it is due; how many. The `first` so many have been sent before.
fn send(watch: &mut TcpStream, first: u64, (per_second, seconds): (u32, u32), begun: Instant) -> anyhow::Result<u64> {
    // The second round through the services takes back what the first one did.
    let rounds: Vec<Vec<Vec<u8>>> = [ENDPOINTS + 1, ENDPOINTS]
        .map(|endpoints| (0..SERVICES).map(|number| event("MODIFIED", objects::slice(number, endpoints))).collect())
        .into();
    let (mut sent, all) = (0, (per_second * seconds) as usize);
    while sent < all {
        let due = ((begun.elapsed().as_secs_f64() * f64::from(per_second)) as usize).min(all);
        let numbers = (sent..due).map(|number| number + first as usize);
        let now: Vec<u8> =
            numbers.flat_map(|number| rounds[number / SERVICES % 2][number % SERVICES].iter().copied()).collect();
        if !now.is_empty() {
            chunk(watch, &now)?;
        }
        sent = due;
        pause(Duration::from_millis(1));
    }
    ensure!(begun.elapsed() < Duration::from_secs(u64::from(seconds) * 2), "the agent does not read so fast");
    Ok(sent as u64)
}

/// Answers one connection.
fn answer(stream: &TcpStream, slices: &Mutex<Option<TcpStream>>) -> anyhow::Result<()> {
    stream.set_nodelay(true)?;
    let (mut reader, mut writer) = (BufReader::new(stream.try_clone()?), stream.try_clone()?);
    loop {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if reader.read_line(&mut head)? == 0 {
                return Ok(());
            }
        }
        let lower = head.to_ascii_lowercase();
        let length = lower.split("content-length: ").nth(1).and_then(|rest| rest.split("\r\n").next()?.parse().ok());
        let mut body = vec![0; length.unwrap_or(0)];
        reader.read_exact(&mut body)?;
        let path = head.split(' ').nth(1).unwrap_or_default();
        let (path, query) = path.split_once('?').unwrap_or((path, ""));
        if query.contains("watch=") {
            writer.write_all(
                b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n",
            )?;
            list(&mut writer, path, query.contains("sendInitialEvents="))?;
            if path.ends_with("/endpointslices") {
                *slices.lock().expect("no thread panics with it") = Some(writer.try_clone()?);
            }
        } else if head.starts_with("GET ") {
            respond(&mut writer, "404 Not Found", &json!({ "kind": "Status", "status": "Failure", "code": 404 }))?;
        } else {
            let mut stored: Value = serde_json::from_slice(&body).unwrap_or_else(|_| json!({}));
            stored["metadata"]["resourceVersion"] = json!("2");
            respond(&mut writer, "201 Created", &stored)?;
        }
    }
}

/// The list at the beginning of a watch, and its end.
fn list(writer: &mut TcpStream, path: &str, initial: bool) -> anyhow::Result<()> {
    if !initial {
        return Ok(());
    }
    // Without it the agent answers as one whose node is going away.
    if path.ends_with("/nodes") {
        let status = json!({ "addresses": [{ "type": "InternalIP", "address": "10.0.0.11" }] });
        let node = json!({ "apiVersion": "v1", "kind": "Node", "metadata": { "name": "node-1" }, "status": status });
        chunk(writer, &event("ADDED", node))?;
    }
    let ip = |number: usize| format!("10.96.{}.{}", (number + 10) >> 8, (number + 10) & 255);
    for number in 0..SERVICES {
        match path.rsplit('/').next() {
            Some("services") => chunk(writer, &event("ADDED", objects::service(number, Some(ip(number)))))?,
            Some("endpointslices") => chunk(writer, &event("ADDED", objects::slice(number, ENDPOINTS)))?,
            _ => {}
        }
    }
    let annotations = json!({ "k8s.io/initial-events-end": "true" });
    let end = json!({ "kind": "Bookmark", "metadata": { "resourceVersion": "1", "annotations": annotations } });
    chunk(writer, &event("BOOKMARK", end))
}

fn event(kind: &str, mut object: Value) -> Vec<u8> {
    object["metadata"]["resourceVersion"] = json!("1");
    let mut line = json!({ "type": kind, "object": object }).to_string().into_bytes();
    line.push(b'\n');
    line
}

fn chunk(writer: &mut TcpStream, bytes: &[u8]) -> anyhow::Result<()> {
    let head = format!("{:x}\r\n", bytes.len());
    Ok(writer.write_all(&[head.as_bytes(), bytes, b"\r\n"].concat())?)
}

fn respond(writer: &mut TcpStream, status: &str, body: &Value) -> anyhow::Result<()> {
    let body = body.to_string();
    let head = format!("HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n", body.len());
    Ok(writer.write_all(&[head.as_bytes(), body.as_bytes()].concat())?)
}
