//! Requests per second through a VIP, over those to the pod itself: short turns of each, one after the other, so that
//! whatever else the machine does meets both.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use kinesin::lab::{AgentOptions, HTTP_PORT, Lab, manifests};
use kinesin::net::Rtnl;
use kinesin::net::rtnl::Route;

use crate::report::{heading, line, median, quantile};

const TURN: Duration = Duration::from_millis(500);
const TURNS: usize = 15;
const CONNECTIONS: usize = 8;
const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nHost: bench\r\n\r\n";
const LAST_REQUEST: &[u8] = b"GET / HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n";

pub(crate) fn run() -> anyhow::Result<()> {
    heading("Requests through a VIP, over those to the pod itself");
    let runtime = tokio::runtime::Runtime::new()?;
    let (lab, agent) = runtime.block_on(start())?;
    for (where_, vip, pod) in [
        ("backend on the VIP's own node", Ipv4Addr::new(10, 0, 0, 100), lab.pod(1, 1).address()),
        ("backend on another node (SNAT)", Ipv4Addr::new(10, 0, 0, 101), lab.pod(2, 1).address()),
    ] {
        let (through, direct) = (SocketAddr::from((vip, 80)), SocketAddr::from((pod, HTTP_PORT)));
        compare(&lab, &format!("keep-alive, {where_}"), through, direct, keep_alive)?;
        compare(&lab, &format!("new connections, {where_}"), through, direct, new_connections)?;
    }
    runtime.block_on(async {
        agent.stop().await;
        drop(lab);
    });
    Ok(())
}

/// Two nodes with a pod each; only the first has an agent, so that it owns both VIPs.
async fn start() -> anyhow::Result<(Lab, kinesin::lab::AgentHandle)> {
    let binary = crate::agent_binary()?;
    let lab = Lab::builder("bench-requests").nodes(2).pods_per_node(1).binary(&binary).build().await?;
    for pod in lab.pods() {
        pod.serve().await?;
    }
    // The client's way to the pods themselves, which a LAN does not have.
    let rtnl = Rtnl::open_in(lab.client().netns())?;
    let eth0 = rtnl.device("eth0").await?.ifindex;
    for node in lab.nodes() {
        rtnl.add_route(Route { to: node.pod_cidr(), via: Some(node.address()), ifindex: eth0, source: None }).await?;
    }
    let directory = lab.manifests_dir();
    std::fs::create_dir_all(&directory)?;
    manifests::write_all(&lab)?;
    std::fs::remove_file(directory.join("service.yaml"))?;
    std::fs::remove_file(directory.join("endpoints.yaml"))?;
    for (number, pod) in lab.pods().into_iter().enumerate() {
        std::fs::write(directory.join(format!("service-{number}.yaml")), service(number, pod.address(), pod.node()))?;
    }
    let agent = lab.node(1).start_agent(&AgentOptions::on_manifests(&lab))?;
    agent.wait_ready(Duration::from_secs(60)).await?;
    for number in 0..2 {
        let url = format!("http://10.0.0.{}/", 100 + number);
        let deadline = Instant::now() + Duration::from_secs(60);
        while let Err(error) = lab.client().get(&url).await {
            ensure!(Instant::now() < deadline, "{url} does not answer: {error}; {}", agent.logs(20));
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
    Ok((lab, agent))
}

fn service(number: usize, pod: Ipv4Addr, node: &str) -> String {
    format!(
        "\
apiVersion: v1
kind: Service
metadata: {{ name: bench-{number}, namespace: default }}
spec:
  type: LoadBalancer
  loadBalancerIP: 10.0.0.{vip}
  clusterIP: 10.43.0.{vip}
  clusterIPs: [10.43.0.{vip}]
  ports: [{{ name: http, port: 80, targetPort: {HTTP_PORT} }}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{ name: bench-{number}-1, namespace: default, labels: {{ kubernetes.io/service-name: bench-{number} }} }}
addressType: IPv4
ports: [{{ name: http, protocol: TCP, port: {HTTP_PORT} }}]
endpoints: [{{ addresses: [{pod}], nodeName: {node}, conditions: {{ ready: true }} }}]
",
        vip = 100 + number
    )
}

type Load = fn(SocketAddr, Duration) -> anyhow::Result<u64>;

/// Turns of `through` and `direct`; prints the median of the ratios of neighbouring turns.
fn compare(lab: &Lab, what: &str, through: SocketAddr, direct: SocketAddr, load: Load) -> anyhow::Result<()> {
    let turn = |to| -> anyhow::Result<f64> {
        // Apart, because a pod's answer to one client port is either the service's or its own.
        let ports = if to == through { "10000 35000" } else { "36000 60999" };
        let load = || -> anyhow::Result<u64> {
            std::fs::write("/proc/sys/net/ipv4/ip_local_port_range", ports)?;
            load(to, TURN)
        };
        let done = lab.client().netns().run(load)?.with_context(|| format!("load on {to}"))?;
        Ok(done as f64 / TURN.as_secs_f64())
    };
    turn(through)?;
    turn(direct)?;
    let (mut ratios, mut rates) = (Vec::new(), Vec::new());
    for number in 0..TURNS {
        // Whoever comes second may profit or suffer from it: take turns in that, too.
        let (vip, pod) = if number % 2 == 0 {
            let vip = turn(through)?;
            (vip, turn(direct)?)
        } else {
            let pod = turn(direct)?;
            (turn(through)?, pod)
        };
        ratios.push(vip / pod);
        rates.push(pod);
    }
    let figures = [
        ("ratio", format!("{:.2}", median(&ratios))),
        ("quartiles", format!("{:.2} to {:.2}", quantile(&ratios, 0.25), quantile(&ratios, 0.75))),
        ("the pod itself", format!("{:.0}/s", median(&rates))),
    ];
    line(what, &figures);
    Ok(())
}

/// Several connections, each with one request under way; one thread, so that the servers have the other core.
fn keep_alive(to: SocketAddr, time: Duration) -> anyhow::Result<u64> {
    let mut connections = Vec::new();
    for _ in 0..CONNECTIONS {
        connections.push(connect(to)?);
    }
    let begun = Instant::now();
    let mut done = 0;
    let mut buffer = [0; 4096];
    while begun.elapsed() < time {
        for connection in &mut connections {
            connection.write_all(REQUEST)?;
        }
        for connection in &mut connections {
            read_answer(connection, &mut buffer)?;
            done += 1;
        }
    }
    Ok(done)
}

/// One connection per request, closed by the server, one after the other.
fn new_connections(to: SocketAddr, time: Duration) -> anyhow::Result<u64> {
    let begun = Instant::now();
    let mut done = 0;
    let mut buffer = [0; 4096];
    while begun.elapsed() < time {
        let mut connection = connect(to)?;
        connection.write_all(LAST_REQUEST)?;
        read_answer(&mut connection, &mut buffer)?;
        while connection.read(&mut buffer)? > 0 {}
        done += 1;
    }
    Ok(done)
}

fn connect(to: SocketAddr) -> anyhow::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&to, Duration::from_secs(5))?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    Ok(stream)
}

/// Reads one whole answer: the head, and as many bytes as it says.
fn read_answer(stream: &mut TcpStream, buffer: &mut [u8]) -> anyhow::Result<()> {
    let mut filled = 0;
    loop {
        let read = stream.read(&mut buffer[filled..])?;
        if read == 0 {
            bail!("the connection ended in the middle of an answer");
        }
        filled += read;
        let text = &buffer[..filled];
        let Some(head) = text.windows(4).position(|bytes| bytes == b"\r\n\r\n") else { continue };
        let head_text = String::from_utf8_lossy(&text[..head]).to_ascii_lowercase();
        ensure!(head_text.starts_with("http/1.1 200"), "{head_text}");
        let length =
            head_text.split("content-length: ").nth(1).and_then(|rest| rest.split("\r\n").next()?.parse().ok());
        let length: usize = length.context("the answer has no length")?;
        if filled >= head + 4 + length {
            return Ok(());
        }
    }
}
