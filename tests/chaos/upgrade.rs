//! Another agent takes the programs over, beside programs of others.

use aya::programs::{SchedClassifier, TcAttachType};
use kinesin::lab::Node;
use kinesin::net::Rtnl;

use super::bpf::{self, Foreign};
use super::rig::{LIMIT, Lease, RATE, Rig};

/// Names and ids of the programs on both hooks of the LAN device, in their order.
fn chains(node: &Node) -> [Vec<(String, u32)>; 2] {
    let query = |hook| {
        let (_, programs) = SchedClassifier::query_tcx(c"eth0", hook).unwrap();
        programs.iter().map(|info| (info.name_as_str().unwrap_or_default().to_owned(), info.id())).collect()
    };
    node.netns().run(|| [TcAttachType::Ingress, TcAttachType::Egress].map(query)).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_agent_replaces_its_own_programs_and_leaves_those_of_others_alone() {
    let mut rig = Rig::start("upgrade", Lease::Patient, &[]).await;
    let owner = rig.owner(&[]).await;
    let node = rig.lab.node(owner).clone();
    let ifindex = Rtnl::open_in(node.netns()).unwrap().device("eth0").await.unwrap().ifindex;
    // Each lets every packet through to the next one.
    let program = Foreign::load(bpf::SCHED_CLS, 0, bpf::NEXT);
    let links = node
        .netns()
        .run(|| {
            // One program can hang in one place of a hook only.
            let second = Foreign::load(bpf::SCHED_CLS, 0, bpf::NEXT);
            [bpf::TCX_INGRESS, bpf::TCX_EGRESS].map(|hook| {
                [(&program, bpf::BEFORE), (&second, bpf::AFTER)]
                    .map(|(program, order)| program.link(ifindex, hook, order).unwrap())
            })
        })
        .unwrap();
    let before = chains(&node);
    for chain in &before {
        assert_eq!(chain.len(), 3, "a foreign program, ours, a foreign program: {before:?}");
        assert!(chain[1].1 < chain[0].1 && chain[1].1 < chain[2].1, "ours is the oldest: {before:?}");
    }
    let load = rig.load().await;

    let mut ours: Vec<u32> = before.iter().map(|chain| chain[1].1).collect();
    for way in ["a new process", "a new process after a stop", "a new instance of the actor"] {
        match way {
            "a new process" => rig.take_agent(owner).kill9(),
            "a new process after a stop" => drop(rig.take_agent(owner).stop().await),
            _ => assert!(rig.kill(owner, "loader").await),
        }
        if way != "a new instance of the actor" {
            let gone = chains(&node);
            assert_eq!(gone.iter().map(|chain| chain[1].1).collect::<Vec<_>>(), ours, "{way}: they stay meanwhile");
            rig.start_agent(owner);
            rig.agent(owner).wait_ready(LIMIT).await.unwrap();
        }
        super::rig::eventually_or(&format!("{way}: new programs in the old places"), async || {
            let after = chains(&node);
            let foreign = |chains: &[Vec<(String, u32)>; 2]| {
                chains.each_ref().map(|chain| (chain.len(), chain.first().cloned(), chain.last().cloned()))
            };
            assert_eq!(foreign(&after), foreign(&before), "{way}: those of others are where they were");
            let now: Vec<u32> = after.iter().map(|chain| chain[1].1).collect();
            if now.iter().zip(&ours).all(|(now, then)| now > then) {
                ours = now;
                return Ok(());
            }
            Err(format!("{after:?}"))
        })
        .await;
        load.more(RATE.into()).await;
    }
    drop(links);
    assert_eq!(chains(&node).map(|chain| chain.len()), [1, 1]);
    load.more(RATE.into()).await;
    load.nothing_lost().await;
}
