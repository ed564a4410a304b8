//! Another agent takes the programs over, beside programs of others.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use aya::programs::{SchedClassifier, TcAttachType};
use kinesin::lab::Node;
use kinesin::net::Rtnl;

use super::rig::{LIMIT, Lease, RATE, Rig};

/// From linux/bpf.h.
const BPF_PROG_LOAD: i32 = 5;
const BPF_LINK_CREATE: i32 = 28;
const BPF_PROG_TYPE_SCHED_CLS: u32 = 3;
const BPF_TCX_INGRESS: u32 = 46;
const BPF_TCX_EGRESS: u32 = 47;
const BPF_F_BEFORE: u32 = 1 << 3;
const BPF_F_AFTER: u32 = 1 << 4;

/// bpf(2), for the commands that return a descriptor.
fn bpf(command: i32, attributes: &[u64]) -> OwnedFd {
    // SAFETY: the attributes, and what they point at, outlive the call, and are as long as said.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, command, attributes.as_ptr(), size_of_val(attributes)) };
    assert!(fd >= 0, "bpf command {command}: {}", io::Error::last_os_error());
    // SAFETY: the descriptor was just made and belongs to nobody else.
    unsafe { OwnedFd::from_raw_fd(fd as i32) }
}

fn pair(low: u32, high: u32) -> u64 {
    u64::from(low) | u64::from(high) << 32
}

/// A program that lets every packet through to the next one: `return TCX_NEXT`.
fn foreign_program() -> OwnedFd {
    // mov r0, -1; exit.
    let instructions: [u64; 2] = [pair(0xb7, u32::MAX), 0x95];
    let license = c"GPL";
    let mut attributes = [0; 16];
    attributes[0] = pair(BPF_PROG_TYPE_SCHED_CLS, instructions.len() as u32);
    attributes[1] = instructions.as_ptr() as u64;
    attributes[2] = license.as_ptr() as u64;
    bpf(BPF_PROG_LOAD, &attributes)
}

fn attach(program: &OwnedFd, ifindex: u32, hook: u32, order: u32) -> OwnedFd {
    let attributes = [pair(program.as_raw_fd() as u32, ifindex), pair(hook, order), 0, 0, 0, 0];
    bpf(BPF_LINK_CREATE, &attributes)
}

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
    let program = foreign_program();
    let links = node
        .netns()
        .run(|| {
            let orders = [BPF_F_BEFORE, BPF_F_AFTER];
            // One program can hang in one place of a hook only.
            let second = foreign_program();
            [BPF_TCX_INGRESS, BPF_TCX_EGRESS]
                .map(|hook| [attach(&program, ifindex, hook, orders[0]), attach(&second, ifindex, hook, orders[1])])
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
