//! Nodes and agents that go away for longer than their lease.

use std::time::Duration;

use kinesin::lab::manifests;
use kinesin::lab::report::Totals;
use tokio::time::Instant;

use super::rig::{LIMIT, Lease, RATE, Rig};

/// What a take-over may take beyond the lease: noticing, deciding, announcing, on a busy machine.
const MARGIN: Duration = Duration::from_secs(4);

fn gap_bound() -> u64 {
    (Duration::from_secs(Lease::Quick.seconds()) + MARGIN).as_millis() as u64
}

/// Longer than a new agent waits before it claims what nobody has, and than any announcement is repeated.
const SETTLED: Duration = Duration::from_secs(4);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn when_the_owner_loses_power_another_takes_over_and_keeps_the_address() {
    let mut rig = Rig::start("power", Lease::Quick, &[]).await;
    let first = rig.owner(&[]).await;
    let load = rig.load().await;
    let wire = rig.watch_wire();
    wire.hears(first).await;
    let node = rig.lab.node(first).clone();
    node.power_off().await.unwrap();
    drop(rig.take_agent(first));
    // In a cluster the control plane would notice after a while.
    manifests::write_endpoints(&rig.lab, &[node.name()]).unwrap();
    let second = rig.owner(&[first]).await;
    load.more(RATE.into()).await;
    let after = load.totals();
    assert!(after.longest_gap_ms <= gap_bound(), "{after:?}");

    // The dead node's last words still say that it has the address: a restarted owner must not believe them.
    let before = load.totals();
    rig.take_agent(second).kill9();
    rig.start_agent(second);
    rig.agent(second).wait_ready(LIMIT).await.unwrap();
    stays(&rig, second).await;
    assert_eq!(load.totals().failed, before.failed, "a restart of the new owner's agent costs nothing");

    node.restore_link().await.unwrap();
    for pod in node.pods() {
        pod.serve().await.unwrap();
    }
    rig.start_agent(first);
    rig.agent(first).wait_ready(LIMIT).await.unwrap();
    manifests::write_endpoints(&rig.lab, &[]).unwrap();
    let before = load.totals();
    stays(&rig, second).await;
    let after = load.handle.wait_for("the node's pods serve again", LIMIT, |t: &Totals| {
        t.nodes.get(node.name()) > before.nodes.get(node.name())
    });
    let after = after.await.unwrap();
    assert_eq!(after.failed, before.failed, "its return costs nothing: {after:?}");

    let heard = wire.stop().await;
    assert!(heard.iter().all(|(_, answering)| answering.len() <= 1), "never two: {heard:?}");
    let order: Vec<_> = heard.iter().filter_map(|(_, answering)| answering.first().copied()).collect();
    assert_eq!(order, [first, second], "{heard:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn when_the_owners_agent_stays_dead_its_programs_answer_until_another_takes_over() {
    let mut rig = Rig::start("agent-dead", Lease::Quick, &[]).await;
    let first = rig.owner(&[]).await;
    let load = rig.load().await;
    let wire = rig.watch_wire();
    wire.hears(first).await;
    let killed = Instant::now();
    rig.take_agent(first).kill9();
    let second = rig.owner(&[first]).await;
    load.more(RATE.into()).await;
    let after = load.totals();
    assert!(after.longest_gap_ms <= gap_bound(), "{after:?}");
    stays(&rig, second).await;

    // What its map still holds from before must not come to life again (R53).
    rig.start_agent(first);
    rig.agent(first).wait_ready(LIMIT).await.unwrap();
    stays(&rig, second).await;
    assert!(rig.picture(first)["l2"].is_empty(), "pruned");

    let heard = wire.stop().await;
    eprintln!(
        "answers after the kill: {:?}",
        heard.iter().map(|(at, a)| (at.duration_since(killed), a)).collect::<Vec<_>>()
    );
    assert!(heard.iter().all(|(_, answering)| answering.len() <= 1), "never two: {heard:?}");
    let order: Vec<_> = heard.iter().filter_map(|(_, answering)| answering.first().copied()).collect();
    assert_eq!(order, [first, second], "{heard:?}");
    let silent = heard.iter().find(|(_, answering)| *answering != [first]).expect("it fell silent").0;
    assert!(silent.duration_since(killed) > Duration::from_secs(1), "it went on for a while: {heard:?}");
}

/// The node goes on to be the only one that answers, for as long as anything might come up.
async fn stays(rig: &Rig, owner: usize) {
    let until = Instant::now() + SETTLED;
    while Instant::now() < until {
        assert_eq!(rig.answering().await, [owner]);
    }
    assert_eq!(rig.owner(&[]).await, owner);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn when_the_owners_cable_is_pulled_another_takes_over_at_once_and_keeps_the_address() {
    let rig = Rig::start("cable", Lease::Patient, &[]).await;
    let first = rig.owner(&[]).await;
    let load = rig.load().await;
    let wire = rig.watch_wire();
    wire.hears(first).await;
    let node = rig.lab.node(first).clone();
    node.cut_link().await.unwrap();
    manifests::write_endpoints(&rig.lab, &[node.name()]).unwrap();
    let second = rig.owner(&[first]).await;
    load.more(RATE.into()).await;
    let after = load.totals();
    // The owner itself says that it is cut off; no lease has to run out.
    assert!(after.longest_gap_ms <= MARGIN.as_millis() as u64, "{after:?}");

    node.restore_link().await.unwrap();
    manifests::write_endpoints(&rig.lab, &[]).unwrap();
    stays(&rig, second).await;
    let heard = wire.stop().await;
    assert!(heard.iter().all(|(_, answering)| answering.len() <= 1), "never two: {heard:?}");
    let order: Vec<_> = heard.iter().filter_map(|(_, answering)| answering.first().copied()).collect();
    assert_eq!(order, [first, second], "{heard:?}");
    load.handle.stop().await.unwrap();
}
