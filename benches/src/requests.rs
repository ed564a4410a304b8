//! What a client on the LAN gets through a service's address, over what it gets from the pod itself: with our agent, and
//! with kube-proxy in its place.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::ensure;
use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::loaded_programs;
use aya::sys::{Stats, enable_stats};
use kinesin::datapath::{detach_all, links_dir};
use kinesin::lab::{AgentHandle, AgentOptions, HTTP_PORT, Pod};
use kinesin::net::Rtnl;
use kinesin::net::rtnl::Route;
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::cluster::{Cluster, HEALTHZ, SERVICES, SLICES, pause, send};
use crate::goals::{self, Verdict};
use crate::kube_proxy::{self, KubeProxy};
use crate::limit::Bare;
use crate::report::{heading, line};
use crate::traffic::{
    PORT_RANGE, PORTS_THROUGH, Ratio, SINK_PORT, Sink, TIME_WAIT, TURNS, compare, keep_alive, new_connections, pin,
};

/// Addresses that nobody has to answer for: the client has routes to them.
pub(crate) const VIPS: [Ipv4Addr; 2] = [Ipv4Addr::new(10, 0, 0, 200), Ipv4Addr::new(10, 0, 0, 201)];
/// The services, and their port for HTTP.
const SERVED: [Option<(Ipv4Addr, u16)>; 2] = [Some((VIPS[0], 80)), Some((VIPS[1], 80))];
/// Another address of the second pod.
const ALIAS: Ipv4Addr = Ipv4Addr::new(10, 42, 2, 250);
const NAMES: [&str; 2] = ["backend on the entry node", "backend on another node"];

/// Cilium 1.20-dev with `snat`, same node and other node, measured on two cores of another machine: a fact, for comparison.
const CILIUM: [(&str, [&str; 2]); 4] = [
    ("keep-alive", ["0.86", "0.77"]),
    ("new connections", ["0.91", "0.81"]),
    ("TCP bytes", ["0.97", "0.84"]),
    ("UDP 64-byte frames", ["not known", "0.66"]),
];

pub(crate) fn run() -> anyhow::Result<()> {
    let cluster = Cluster::start("bench-requests", 2, 1)?;
    let (pods, sinks) = prepare(&cluster)?;
    let mut columns = Vec::new();

    // `auto` hands packets on to nodes that are neighbours, dispatch `l2`; there the node of the backend needs an agent too.
    // Left to decide, agents go straight to pods: nobody is in the stacks of these nodes.
    let variants = [("l2", 2, "auto", ""), ("l2, by the stacks", 2, "auto", "true"), ("snat", 1, "snat", "")];
    for (name, nodes, mode, legacy) in variants {
        if !wanted(name) {
            continue;
        }
        heading(&format!("Through a service's address, over the pod itself: Kinesin, {name}"));
        let agents = {
            let _context = cluster.runtime.enter();
            let start = |number: usize| {
                let options = AgentOptions::new(crate::agent_binary()?)
                    .config("k8s-kubeconfig-path", &cluster.plane.kubeconfig().to_string_lossy())
                    .config("kube-proxy-replacement", "true")
                    .config("bpf-lb-mode", mode)
                    .config("enable-host-legacy-routing", legacy)
                    .config("kube-proxy-replacement-healthz-bind-address", &format!("0.0.0.0:{HEALTHZ}"));
                anyhow::Ok(cluster.lab.node(number).start_agent(&options)?)
            };
            (1..=nodes).map(start).collect::<Result<Vec<_>, _>>()?
        };
        if nodes == 2 {
            // The entry node hands packets on to the other one.
            wait_said(&cluster, &agents[0], "mode", "L2 to 1 of 1")?;
        }
        let way = if legacy.is_empty() { "BPF" } else { "Legacy" };
        for agent in &agents {
            wait_said(&cluster, agent, "hostRouting", way)?;
        }
        wait_served(&cluster, || agents[0].logs(20))?;
        columns.push((format!("Kinesin, {name}"), measure(&cluster, &pods, &sinks, SERVED)?));
        cost_per_run(&cluster, name)?;
        for agent in agents {
            cluster.runtime.block_on(agent.stop());
        }
        for node in cluster.lab.nodes().iter().take(nodes) {
            detach_all(&node.bpf_root())?;
        }
        pause(TIME_WAIT);
    }
    for mode in kube_proxy::MODES.into_iter().filter(|mode| wanted(mode)) {
        heading(&format!("Through a service's address, over the pod itself: kube-proxy, {mode}"));
        if let Some(why) = kube_proxy::missing(mode) {
            println!("not measured: {why}");
            continue;
        }
        let proxy = KubeProxy::start(&cluster, mode)?;
        proxy.wait_synced()?;
        wait_served(&cluster, || "kube-proxy".into())?;
        columns.push((format!("kube-proxy, {mode}"), measure(&cluster, &pods, &sinks, SERVED)?));
        proxy.stop(&cluster)?;
        pause(TIME_WAIT);
    }
    if wanted("redirect") {
        heading("The extra hop alone: nothing on the entry node but a redirect");
        let bare = Bare::start(&cluster, &pods[1], ALIAS)?;
        columns.push(("a bare redirect".into(), measure(&cluster, &pods, &sinks, [None, Some((ALIAS, HTTP_PORT))])?));
        drop(bare);
    }
    summary(&columns);
    drop(sinks);
    cluster.end();
    Ok(())
}

/// Whether a column is measured: `KINESIN_BENCH_COLUMNS` has their names, separated by semicolons; without it all are.
fn wanted(column: &str) -> bool {
    std::env::var("KINESIN_BENCH_COLUMNS").map_or(true, |columns| columns.split(';').any(|name| name.trim() == column))
}

/// One pod on each node, a service for each, and the client's ways to both.
pub(crate) fn prepare(cluster: &Cluster) -> anyhow::Result<([Pod; 2], [Sink; 2])> {
    let lab = &cluster.lab;
    let pods = [lab.pod(1, 1), lab.pod(2, 1)];
    cluster.runtime.block_on(async {
        for pod in &pods {
            pod.serve().await?;
            for pid in std::fs::read_to_string(pod.cgroup().join("cgroup.procs"))?.lines() {
                pin(Pid::from_raw(pid.parse()?), 1)?;
            }
        }
        // To the pods themselves, which a LAN does not have; and to the services, so that nobody has to answer for them.
        let rtnl = Rtnl::open_in(lab.client().netns())?;
        let eth0 = rtnl.device("eth0").await?.ifindex;
        let via = |node: &kinesin::lab::Node| Some(node.address().into());
        for node in lab.nodes() {
            rtnl.add_route(Route { to: node.pod_cidr().into(), via: via(node), ifindex: eth0, source: None }).await?;
        }
        for vip in VIPS {
            let to = ipnet::Ipv4Net::new(vip, 32)?.into();
            rtnl.add_route(Route { to, via: via(lab.node(1)), ifindex: eth0, source: None }).await?;
        }
        anyhow::Ok(())
    })?;
    let ports = [
        ("http", "TCP", 80, HTTP_PORT),
        ("sink", "TCP", SINK_PORT, SINK_PORT),
        ("sink-udp", "UDP", SINK_PORT, SINK_PORT),
    ];
    for ((number, pod), vip) in pods.iter().enumerate().zip(VIPS) {
        let name = format!("load-{number}");
        let service = json!({
            "apiVersion": "v1", "kind": "Service", "metadata": { "name": name },
            "spec": { "externalIPs": [vip], "ports": ports.map(|(port, protocol, from, to)| json!({
                "name": port, "protocol": protocol, "port": from, "targetPort": to,
            })) },
        });
        let slice = json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": { "name": format!("{name}-1"), "labels": { "kubernetes.io/service-name": name } },
            "ports": ports.map(|(port, protocol, _, to)| json!({ "name": port, "protocol": protocol, "port": to })),
            "endpoints": [{ "addresses": [pod.address()], "nodeName": pod.node(), "conditions": { "ready": true } }],
        });
        cluster.with_client(async move |client| {
            send(&client, "POST", SERVICES, &service).await?;
            send(&client, "POST", SLICES, &slice).await.map(drop)
        })?;
    }
    let sinks = [Sink::start(&pods[0])?, Sink::start(&pods[1])?];
    Ok((pods, sinks))
}

/// Waits until an agent says so of one of kube-proxy's duties.
fn wait_said(cluster: &Cluster, agent: &AgentHandle, duty: &str, part: &str) -> anyhow::Result<()> {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        // Until its socket is there, it does not answer at all.
        let answer = cluster.runtime.block_on(agent.get("/v1/status"));
        let status = answer.ok().and_then(|(_, text)| serde_json::from_str::<Value>(&text).ok()).unwrap_or_default();
        let said = status["kubeProxyReplacement"][duty].as_str().map(str::to_owned);
        if said.as_ref().is_some_and(|said| said.contains(part)) {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "{duty} is not {part}: {said:?}; {}", agent.logs(20));
        pause(Duration::from_millis(50));
    }
}

pub(crate) fn wait_served(cluster: &Cluster, logs: impl Fn() -> String) -> anyhow::Result<()> {
    let deadline = Instant::now() + Duration::from_secs(60);
    cluster.lab.client().netns().run(|| std::fs::write(PORT_RANGE, PORTS_THROUGH))??;
    cluster.runtime.block_on(async {
        for vip in VIPS {
            let url = format!("http://{vip}/");
            while let Err(error) = cluster.lab.client().get(&url).await {
                ensure!(Instant::now() < deadline, "{url} does not answer: {error}; {}", logs());
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
        Ok(())
    })
}

/// Ratios by kind of load; none where there is no such way to the pod.
type Ratios = [Option<Ratio>; 2];

/// Measures the ways to both pods, the entry node's first: an address, and its port for HTTP.
fn measure(
    cluster: &Cluster,
    pods: &[Pod; 2],
    sinks: &[Sink; 2],
    ways: [Option<(Ipv4Addr, u16)>; 2],
) -> anyhow::Result<Vec<Ratios>> {
    let mut ratios = vec![[None; 2]; CILIUM.len()];
    for (place, where_) in NAMES.iter().enumerate() {
        let Some((address, http)) = ways[place] else { continue };
        let (pod, sink) = (pods[place].address(), &sinks[place]);
        let throughput = |to, time| sink.throughput(to, time);
        let datagrams = |to, time| sink.datagrams(to, time);
        for (kind, (name, _)) in CILIUM.iter().enumerate() {
            let (load, ports, turns): (crate::traffic::Load<'_>, _, _) = match kind {
                // Some goals are within a hundredth of what is possible at all.
                0 => (&keep_alive, (http, HTTP_PORT), 2 * TURNS + 1),
                1 => (&new_connections, (http, HTTP_PORT), 2 * TURNS + 1),
                // Bytes differ from turn to turn by a quarter, whoever balances.
                2 => (&throughput, (SINK_PORT, SINK_PORT), 3 * TURNS),
                _ => (&datagrams, (SINK_PORT, SINK_PORT), TURNS),
            };
            let (through, direct) = (SocketAddr::from((address, ports.0)), SocketAddr::from((pod, ports.1)));
            let what = format!("{name}, {where_}");
            ratios[kind][place] = Some(compare(cluster.lab.client(), &what, (through, direct), load, turns)?);
        }
    }
    Ok(ratios)
}

/// What the kernel's own counters say of the entry node's ingress program, with keep-alive requests to the other node.
fn cost_per_run(cluster: &Cluster, name: &str) -> anyhow::Result<()> {
    let _counting = enable_stats(Stats::RunTime)?;
    let before = ingress_counters(cluster)?;
    let to = SocketAddr::from((VIPS[1], 80));
    cluster.lab.client().netns().run(|| keep_alive(to, Duration::from_secs(2)))??;
    let after = ingress_counters(cluster)?;
    let (time, runs) = (after.0.saturating_sub(before.0), after.1 - before.1);
    let each = time.as_nanos() as f64 / runs.max(1) as f64;
    let figures =
        [("per run", format!("{each:.0} ns")), ("of", runs.to_string()), ("Cilium (elsewhere)", "1490 ns".into())];
    line("ingress program by run-time counters, other node", &figures);
    goals::ours(&format!("ingress program, ns per run, {name}"), "≤ 900", format!("{each:.0}"), Some(each <= 900.0));
    Ok(())
}

/// Time and runs of the program at the ingress of the entry node's devices.
fn ingress_counters(cluster: &Cluster) -> anyhow::Result<(Duration, u64)> {
    let mut programs = BTreeSet::new();
    for pin in std::fs::read_dir(links_dir(&cluster.node().bpf_root()))? {
        let path = pin?.path();
        if path.to_string_lossy().ends_with("-ingress") {
            programs.insert(FdLink::from(PinnedLink::from_pin(path)?).info()?.program_id());
        }
    }
    ensure!(!programs.is_empty(), "no program is attached by a link");
    let mut sum = (Duration::ZERO, 0);
    for program in loaded_programs() {
        let program = program?;
        if programs.contains(&program.id()) {
            sum = (sum.0 + program.run_time(), sum.1 + program.run_count());
        }
    }
    Ok(sum)
}

fn figure(ratio: Option<Ratio>) -> String {
    ratio.map_or_else(|| "-".into(), |ratio| format!("{:.2}", ratio.median))
}

/// Through a balancer nothing is faster than without one but by chance: what cannot be told from its goal is said so.
fn verdict(ratio: Ratio, least: f64) -> Verdict {
    if ratio.median >= least {
        Verdict::Holds
    } else if ratio.between.1 >= least {
        Verdict::Within
    } else {
        Verdict::Missed
    }
}

/// Least ratios by kind of load, backend on the entry node and on another.
const LEAST: [[Option<(f64, &str)>; 2]; 4] = [
    [Some((1.0, "≥ 1.0")), Some((0.85, "≥ 0.85"))],
    [Some((0.97, "≥ 0.97")), Some((0.9, "≥ 0.9"))],
    [Some((1.0, "≥ 1.0")), Some((0.95, "≥ 0.95"))],
    [None, Some((0.85, "≥ 0.85"))],
];

fn summary(columns: &[(String, Vec<Ratios>)]) {
    heading("Side by side: medians of ratios, backend on the entry node / on another");
    // Each way that `l2` has to pods is held against the goals; all else stands beside it.
    let way = |column: &str| column.strip_prefix("Kinesin, l2").map(str::to_owned);
    let ours: Vec<_> = columns.iter().filter_map(|(column, ratios)| Some((way(column)?, ratios))).collect();
    let others: Vec<_> = columns.iter().filter(|(column, _)| way(column).is_none()).collect();
    for (kind, (name, cilium)) in CILIUM.iter().enumerate() {
        let mut figures: Vec<(&str, String)> =
            columns.iter().map(|(column, ratios)| (column.as_str(), ratios[kind].map(figure).join(" / "))).collect();
        figures.push(("Cilium, snat (elsewhere)", cilium.join(" / ")));
        line(name, &figures);
        for (place, where_) in NAMES.iter().enumerate() {
            for (way, ratios) in &ours {
                let row = format!("{name}, {where_}{way}");
                let Some(ratio) = ratios[kind][place] else { continue };
                let (goal, verdict) = match LEAST[kind][place] {
                    Some((least, text)) => (text, verdict(ratio, least)),
                    None => ("-", Verdict::Stated),
                };
                let (low, high) = ratio.between;
                goals::ours(&row, goal, format!("{:.3} ({low:.2} to {high:.2})", ratio.median), verdict);
                for (column, ratios) in others.iter().filter(|(_, ratios)| ratios[kind][place].is_some()) {
                    goals::other(&row, column, figure(ratios[kind][place]));
                }
                goals::other(&row, "Cilium, snat (elsewhere)", cilium[place].to_owned());
            }
        }
    }
}
