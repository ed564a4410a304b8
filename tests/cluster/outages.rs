//! The control plane goes away and comes back.

use std::time::Duration;

use tokio::time::Instant;

use crate::fixture::{BOUND, Cluster, FIRST, Leases, web};

#[tokio::test(flavor = "multi_thread")]
async fn r08_an_outage_of_the_control_plane_freezes_everything_and_changes_made_after_it_are_applied() {
    let mut cluster = Cluster::with_guide("outage", Leases::Short).await;
    let pods = cluster.lab.pods();
    cluster.apply(&web("web", &pods));
    cluster.has_addresses("default", "web", &["10.0.0.100"]).await;
    let owner = cluster.owner_of(FIRST).await;
    let load = cluster.load(FIRST, 50, 50);
    load.wait_for("all connections", BOUND, |t| t.held.open == 50).await.unwrap();
    let pids: Vec<u32> = (1..=3).map(|number| cluster.agent(number).pid()).collect();

    tokio::task::block_in_place(|| cluster.plane.kill());
    // Several times as long as leases of three seconds are good for.
    let over = Instant::now() + Duration::from_secs(12);
    let mut looks = 0;
    while Instant::now() < over {
        assert_eq!(cluster.owner_of(FIRST).await, owner);
        looks += 1;
    }
    assert!(looks > 3, "{looks}");
    let during = load.totals();
    assert_eq!((during.failed, during.held.broken), (0, 0), "{during:?}");
    tokio::task::block_in_place(|| cluster.plane.restart()).unwrap();

    cluster.apply(&web("new", &pods[..2]));
    cluster.has_addresses("default", "new", &["10.0.0.101"]).await;
    cluster.owner_of("10.0.0.101".parse().unwrap()).await;
    cluster.answers("http://10.0.0.101/", &pods[..2]).await;
    assert_eq!(cluster.owner_of(FIRST).await, owner);
    let totals = load.stop().await.unwrap();
    assert_eq!((totals.failed, totals.held.broken, totals.held.open), (0, 0, 50), "{totals:?}");
    let after: Vec<u32> = (1..=3).map(|number| cluster.agent(number).pid()).collect();
    assert_eq!(pids, after, "agents stay up");
    for number in 1..=3 {
        let status = cluster.ask(number, &["status"]).unwrap();
        assert_eq!(status["source"]["healthy"], true, "{status}");
    }
}
