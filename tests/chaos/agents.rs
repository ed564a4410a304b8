//! Agents that die, stop, and come back.

use std::time::Duration;

use super::rig::{LIMIT, Lease, RATE, Rig, difference};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killing_and_restarting_every_agent_in_turn_loses_nothing() {
    let mut rig = Rig::start("kill-agents", Lease::Patient, &[]).await;
    let owner = rig.owner(&[]).await;
    let load = rig.load().await;
    let before: Vec<_> = (1..=3).map(|number| rig.picture(number)).collect();
    for number in [owner].into_iter().chain((1..=3).filter(|number| *number != owner)) {
        rig.take_agent(number).kill9();
        // A while without any agent there.
        load.more(RATE.into()).await;
        assert_eq!(rig.answering().await, [owner], "the programs go on without their agent");
        rig.start_agent(number);
        rig.agent(number).wait_ready(LIMIT).await.unwrap();
        assert_eq!(rig.answering().await, [owner]);
        load.more(RATE.into()).await;
    }
    assert_eq!(rig.owner(&[]).await, owner, "nothing moved");
    for number in 1..=3 {
        let changes = difference(&before[number - 1], &rig.picture(number));
        assert!(changes.is_empty(), "node {number}: {changes:#?}");
    }
    load.nothing_lost().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_orderly_stop_and_start_within_the_lease_loses_nothing_and_moves_nothing() {
    let mut rig = Rig::start("stop-agent", Lease::Patient, &[]).await;
    let owner = rig.owner(&[]).await;
    let load = rig.load().await;
    let before = rig.picture(owner);
    let stopped = rig.take_agent(owner).stop().await;
    assert!(stopped.is_some_and(|status| status.success()), "SIGTERM ends it in order: {stopped:?}");
    load.more(RATE.into()).await;
    assert_eq!(rig.answering_within(Duration::from_secs(1)).await, [owner]);
    rig.start_agent(owner);
    rig.agent(owner).wait_ready(LIMIT).await.unwrap();
    assert_eq!(rig.owner(&[]).await, owner);
    load.more(RATE.into()).await;
    let changes = difference(&before, &rig.picture(owner));
    assert!(changes.is_empty(), "{changes:#?}");
    load.nothing_lost().await;
}
