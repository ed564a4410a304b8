//! Agents that die, alone, in turn and together, under traffic.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use kinesin::lab::Client;
use kinesin::lab::report::Totals;
use serde_json::json;

use crate::fixture::{BOUND, Cluster, FIRST, Leases, service, web};

/// Connections that live for the whole test.
const HELD: u32 = 50;

/// Waits until this many more requests were answered than had been.
async fn goes_on(load: &kinesin::lab::LoadHandle, requests: u64) -> Totals {
    let before = load.totals().succeeded;
    load.wait_for("further answers", BOUND, |t| t.succeeded >= before + requests).await.unwrap()
}

fn nothing_was_lost(totals: &Totals) {
    assert_eq!((totals.failed, totals.held.broken, totals.held.open_failures), (0, 0, 0), "{totals:?}");
    assert_eq!(totals.held.open, u64::from(HELD), "{totals:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn killing_every_agent_in_turn_loses_no_connection_and_moves_no_address() {
    let mut cluster = Cluster::with_guide("kill", Leases::Default).await;
    cluster.apply(&web("web", &cluster.lab.pods()));
    cluster.has_addresses("default", "web", &["10.0.0.100"]).await;
    let owner = cluster.owner_of(FIRST).await;
    let load = cluster.load(FIRST, 50, HELD);
    load.wait_for("all connections", BOUND, |t| t.held.open == u64::from(HELD)).await.unwrap();

    // The owner last: what was learned from the others must not have moved anything.
    let mut order: Vec<usize> = cluster.running().into_iter().filter(|number| *number != owner).collect();
    order.push(owner);
    for number in order {
        cluster.kill_agent(number);
        nothing_was_lost(&goes_on(&load, 20).await);
        cluster.start_agent(number);
        cluster.agent(number).wait_ready(BOUND).await.unwrap();
        nothing_was_lost(&goes_on(&load, 20).await);
        assert_eq!(cluster.owner_of(FIRST).await, owner, "a restart fits into the lease");
    }
    let totals = load.stop().await.unwrap();
    nothing_was_lost(&totals);
    assert_eq!(totals.backends.len(), 6, "{totals:?}");
}

/// Asks the LAN for an address again and again until it is told to stop; gives every set of answers.
async fn listen(client: Client, address: Ipv4Addr, stop: Arc<AtomicBool>) -> BTreeSet<Vec<[u8; 6]>> {
    let mut heard = BTreeSet::new();
    while !stop.load(Ordering::Relaxed) {
        let mut macs = client.arp_probe_within(address, Duration::from_millis(100)).await.unwrap();
        macs.sort();
        heard.insert(macs);
    }
    heard
}

#[tokio::test(flavor = "multi_thread")]
async fn r47_r14_all_agents_restarted_at_once_never_make_a_second_owner_and_every_address_stays() {
    let mut cluster = Cluster::with_guide("together", Leases::Default).await;
    let names = ["a", "b", "c", "d"];
    for name in names {
        cluster.apply(&web(name, &cluster.lab.pods()));
    }
    let addresses = cluster
        .until("an address each", async || {
            let mut found = Vec::new();
            for name in names {
                let (mut addresses, _) = cluster.service_status("default", name);
                found.push(addresses.pop().ok_or(name)?);
            }
            Ok(found)
        })
        .await;
    let mut owners = Vec::new();
    for address in &addresses {
        owners.push(cluster.owner_of(address.parse().unwrap()).await);
    }

    let stop = Arc::new(AtomicBool::new(false));
    let listeners: Vec<_> = addresses
        .iter()
        .map(|ip| tokio::spawn(listen(cluster.lab.client().clone(), ip.parse().unwrap(), stop.clone())))
        .collect();
    for number in 1..=3 {
        cluster.kill_agent(number);
    }
    for number in 1..=3 {
        cluster.start_agent(number);
    }
    for number in 1..=3 {
        cluster.agent(number).wait_ready(BOUND).await.unwrap();
    }
    for (address, owner) in addresses.iter().zip(&owners) {
        assert_eq!(cluster.owner_of(address.parse().unwrap()).await, *owner, "{address}");
    }
    // Also of those who allocate: a new Service gets a new address, the others keep theirs.
    cluster.apply(&service("e", &json!({}), &json!({})));
    cluster.has_addresses("default", "e", &["10.0.0.104"]).await;
    for (name, address) in names.iter().zip(&addresses) {
        assert_eq!(cluster.service_status("default", name).0, [address.as_str()]);
    }
    stop.store(true, Ordering::Relaxed);
    for ((listener, address), owner) in listeners.into_iter().zip(&addresses).zip(&owners) {
        let mac = cluster.lab.node(*owner).mac().await.unwrap();
        assert_eq!(listener.await.unwrap(), BTreeSet::from([vec![mac]]), "{address}: one answer, always the same");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn when_the_elected_agent_dies_for_good_another_gives_addresses_to_new_services() {
    let mut cluster = Cluster::with_guide("leader", Leases::Short).await;
    cluster.apply(&web("before", &cluster.lab.pods()));
    cluster.has_addresses("default", "before", &["10.0.0.100"]).await;
    let leader = leader(&cluster, 1).unwrap();
    let number: usize = leader.strip_prefix("node-").unwrap().parse().unwrap();
    cluster.kill_agent(number);
    cluster.apply(&web("after", &cluster.lab.pods()));
    // The dead one wrote nothing any more; BOUND is far above the lease's three seconds.
    cluster.has_addresses("default", "after", &["10.0.0.101"]).await;
    cluster.has_addresses("default", "before", &["10.0.0.100"]).await;
    for number in cluster.running() {
        let next = self::leader(&cluster, number).unwrap();
        assert_ne!(next, leader);
    }
}

/// The elected agent, as a node's agent sees it.
fn leader(cluster: &Cluster, number: usize) -> Result<String, String> {
    let status = cluster.ask(number, &["status"])?;
    status["leader"].as_str().map(str::to_owned).ok_or_else(|| status.to_string())
}
