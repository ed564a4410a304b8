//! The load client's books against the kernel's own counters.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use kinesin::lab::programs::{ClientOptions, SERVE};
use kinesin::lab::report::{LoadEvent, Reason};
use kinesin::lab::{ECHO_PORT, HTTP_PORT, Lab};
use kinesin::net::proc::Process;

use super::{LIMIT, eventually, lab};

/// A server on the node itself, which the client reaches without any load balancer.
async fn serve_on_node(lab: &Lab) -> Process {
    let node = lab.node(1);
    let mut command = Command::new(lab.binary());
    command.args([SERVE, "--pod", "on-the-node", "--node", node.name()]);
    let server = node.spawn("server", command).unwrap();
    let url = format!("http://{}:{HTTP_PORT}/", node.address());
    eventually("the server answers", async || {
        kinesin::lab::get_from(node.netns(), &url, Duration::from_secs(1)).await.is_ok()
    })
    .await;
    // The echo port opens after the HTTP port.
    let echo = SocketAddr::from((node.address(), ECHO_PORT));
    eventually("the echo port is open", async || {
        node.netns().run(|| std::net::TcpStream::connect_timeout(&echo, Duration::from_secs(1)).is_ok()).unwrap()
    })
    .await;
    server
}

#[tokio::test]
async fn the_load_client_counts_every_request_and_every_failure_of_a_server_that_is_killed() {
    let lab = lab("load").nodes(1).build().await.unwrap();
    let server = serve_on_node(&lab).await;
    let options = ClientOptions::new(format!("http://{}:{HTTP_PORT}/", lab.node(1).address())).rate(200);
    let load = lab.client().load(&options).unwrap();
    load.wait_for("successes", LIMIT, |t| t.succeeded >= 50).await.unwrap();
    server.kill9();
    let dead = load.wait_for("failures", LIMIT, |t| t.failed >= 100).await.unwrap();
    assert!(dead.failures.get(&Reason::Refused).copied().unwrap_or(0) >= 90, "{dead:?}");
    let _server = serve_on_node(&lab).await;
    let before = load.totals().succeeded;
    load.wait_for("successes again", LIMIT, |t| t.succeeded >= before + 50).await.unwrap();

    // Read all events: the lines must agree with the totals.
    let mut load = load;
    load.process().signal(nix::sys::signal::Signal::SIGTERM);
    let mut failed_lines = BTreeMap::new();
    let mut summary = None;
    while let Some(event) = load.next_event().await {
        match event {
            LoadEvent::Failed { reason, .. } => *failed_lines.entry(reason).or_insert(0) += 1,
            LoadEvent::Summary(totals) => summary = Some(totals),
            _ => {}
        }
    }
    let totals = summary.expect("a summary at the end");
    assert_eq!(totals.in_flight, 0);
    assert_eq!(totals.attempted, totals.succeeded + totals.failed);
    assert_eq!(totals.backends, BTreeMap::from([("on-the-node".to_string(), totals.succeeded)]));
    assert_eq!(totals.nodes, BTreeMap::from([("node-1".to_string(), totals.succeeded)]));
    assert_eq!(failed_lines, totals.failures);
    assert_eq!(totals.failures.values().sum::<u64>(), totals.failed);
    // At 200 requests per second 100 failures take about half a second.
    assert!(totals.longest_gap_ms >= 300, "{totals:?}");

    // Nobody else makes connections in the client's namespace, so the kernel knows the truth.
    let kernel = lab.client().netns().run(|| crate::snmp::counters("Tcp")).unwrap();
    assert_eq!(kernel["ActiveOpens"], totals.attempted, "{totals:?}");
    assert_eq!(kernel["AttemptFails"], totals.failures[&Reason::Refused], "{totals:?}");
}

#[tokio::test]
async fn a_load_with_a_duration_ends_by_itself_without_failures() {
    let lab = lab("calm").nodes(1).build().await.unwrap();
    let _server = serve_on_node(&lab).await;
    let url = format!("http://{}:{HTTP_PORT}/", lab.node(1).address());
    let options = ClientOptions::new(url).rate(100).timeout(Duration::from_secs(5)).duration(Duration::from_secs(1));
    let totals = lab.client().load(&options).unwrap().summary(LIMIT).await.unwrap();
    assert_eq!((totals.failed, totals.in_flight), (0, 0), "{totals:?}");
    assert!(totals.succeeded > 10 && totals.succeeded <= 102, "{totals:?}");
    assert!(totals.first_success_ms.is_some());
}

#[tokio::test]
async fn silence_is_told_apart_from_refusal() {
    let lab = lab("silence").nodes(2).build().await.unwrap();
    let short = |url: String| ClientOptions::new(url).rate(20).timeout(Duration::from_millis(200));
    let run = async |options: ClientOptions| {
        let load = lab.client().load(&options).unwrap();
        load.wait_for("failures", LIMIT, |t| t.failed >= 3).await.unwrap();
        load.stop().await.unwrap()
    };
    // Nothing listens there.
    let refused = run(short(format!("http://{}:81/", lab.node(1).address()))).await;
    assert_eq!(refused.failures.keys().collect::<Vec<_>>(), [&Reason::Refused], "{refused:?}");
    // Nobody has that address: no answer to ARP within the limit.
    let silent = run(short("http://10.0.0.200:80/".into())).await;
    assert_eq!(silent.failures.keys().collect::<Vec<_>>(), [&Reason::ConnectTimeout], "{silent:?}");
    assert_eq!(silent.longest_gap_ms, silent.elapsed_ms);
}

#[tokio::test]
async fn long_lived_connections_that_break_are_counted_once_each_and_replaced() {
    let lab = lab("held").nodes(1).build().await.unwrap();
    let server = serve_on_node(&lab).await;
    let node = lab.node(1);
    let mut options = ClientOptions::new(format!("http://{}:{HTTP_PORT}/", node.address()))
        .rate(10)
        .hold(20, SocketAddr::from((node.address(), ECHO_PORT)));
    options.hold_pause_ms = 20;
    let mut load = lab.client().load(&options).unwrap();
    let open = load.wait_for("20 open", LIMIT, |t| t.held.open == 20 && t.held.echoes > 100).await.unwrap();
    assert_eq!((open.held.wanted, open.held.opened, open.held.broken), (20, 20, 0), "{open:?}");
    server.kill9();
    let broken = load.wait_for("20 broken", LIMIT, |t| t.held.broken == 20).await.unwrap();
    assert_eq!(broken.held.open, 0);
    let _server = serve_on_node(&lab).await;
    let again = load.wait_for("20 open again", LIMIT, |t| t.held.open == 20).await.unwrap();
    assert_eq!((again.held.opened, again.held.broken), (40, 20), "{again:?}");

    load.process().signal(nix::sys::signal::Signal::SIGTERM);
    let mut lines = BTreeMap::new();
    let mut summary = None;
    while let Some(event) = load.next_event().await {
        match event {
            LoadEvent::HeldBroken { connection, echoes, .. } => {
                assert!(echoes > 0);
                *lines.entry(connection).or_insert(0) += 1;
            }
            LoadEvent::Summary(totals) => summary = Some(totals),
            _ => {}
        }
    }
    assert_eq!(lines, (0..20).map(|number| (number, 1)).collect(), "each connection broke once");
    let totals = summary.expect("a summary at the end");
    assert_eq!((totals.held.broken, totals.held.open), (20, 20), "stopping breaks nothing: {totals:?}");
}
