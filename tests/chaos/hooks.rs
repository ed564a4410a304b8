//! Hooks that others hold or empty, with the whole agent: what it says, and that it comes back.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::process::{Command, Output};

use kinesin::datapath::{links_dir, pins};

use super::bpf::{self, Foreign};
use super::rig::{LIMIT, Lease, RATE, Rig, eventually, eventually_or};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r34_a_hook_that_fails_is_told_and_tried_again_while_the_others_work() {
    let mut rig = Rig::start("hook-taken", Lease::Patient, &[]).await;
    let owner = rig.owner(&[]).await;
    let load = rig.load().await;
    rig.take_agent(owner).kill9();
    // Somebody takes one of the hooks for himself while no agent runs.
    let node = rig.lab.node(owner);
    let cgroup = File::open(node.cgroup()).unwrap();
    let target = cgroup.as_raw_fd() as u32;
    std::fs::remove_file(links_dir(&node.bpf_root()).join("cgroup-cil_sock4_connect")).unwrap();
    let foreign = Foreign::load(bpf::CGROUP_SOCK_ADDR, bpf::INET4_CONNECT, 1);
    eventually("the kernel lets go of the link", async || foreign.attach(target, bpf::INET4_CONNECT, 0).is_ok()).await;
    rig.start_agent(owner);
    rig.agent(owner).wait_ready(LIMIT).await.unwrap();
    let status = rig.status(owner).await;
    let failed: Vec<_> = status.hooks.iter().filter(|hook| !hook.ok).collect();
    let [hook] = failed[..] else { panic!("{failed:?}") };
    assert_eq!(hook.program, "cil_sock4_connect");
    assert!(status.problems.iter().any(|line| line.contains("hooks: cil_sock4_connect")), "{:?}", status.problems);
    assert_eq!(problems(&rig, owner).await, 1.0);
    load.more(RATE.into()).await;
    let log = || std::fs::read_to_string(rig.lab.node(owner).log("agent")).unwrap();
    assert!(log().contains("cil_sock4_connect"), "one line of the log names it");

    foreign.detach(target, bpf::INET4_CONNECT);
    eventually_or("the hook is taken once it is free", async || {
        let status = rig.status(owner).await;
        if status.hooks.iter().all(|hook| hook.ok) { Ok(()) } else { Err(format!("{:?}", status.problems)) }
    })
    .await;
    assert_eq!(problems(&rig, owner).await, 0.0);
    assert!(log().contains("problems gone"));
    load.nothing_lost().await;
}

/// `kinesin_problems` of the hooks.
async fn problems(rig: &Rig, number: usize) -> f64 {
    rig.metric(number, "kinesin_problems{area=\"hooks\"}").await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r48_a_program_that_somebody_takes_off_its_hook_comes_back() {
    let rig = Rig::start("hook-emptied", Lease::Patient, &[]).await;
    let owner = rig.owner(&[]).await;
    let load = rig.load().await;
    assert_eq!(rig.metric(owner, "kinesin_hook_repairs_total").await, 0.0);
    let links = links_dir(&rig.lab.node(owner).bpf_root());
    let pins: Vec<_> = std::fs::read_dir(&links).unwrap().flatten().map(|pin| pin.path()).collect();
    assert_eq!(pins.len(), 12, "two of the device, ten of sockets: {pins:?}");
    pins.iter().for_each(|pin| bpf::detach_link(pin));
    eventually("they are repaired, and counted", async || {
        rig.metric(owner, "kinesin_hook_repairs_total").await >= pins.len() as f64
    })
    .await;
    load.more(2 * u64::from(RATE)).await;
    let calm = load.totals();
    load.more(2 * u64::from(RATE)).await;
    let totals = load.handle.stop().await.unwrap();
    assert_eq!((totals.failed, totals.held.broken), (calm.failed, 0), "traffic is as before: {totals:?}");
    let log = std::fs::read_to_string(rig.lab.node(owner).log("agent")).unwrap();
    assert!(log.contains("programs were taken off their hooks: attached again"), "the log says so");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r48_uninstalling_leaves_nothing_of_ours_and_everything_of_theirs() {
    let mut rig = Rig::start("uninstall", Lease::Patient, &[]).await;
    let node = rig.lab.node(1).clone();
    let cgroup = File::open(node.cgroup()).unwrap();
    let foreign = Foreign::load(bpf::CGROUP_SOCK_ADDR, bpf::INET4_CONNECT, 1);
    foreign.attach(cgroup.as_raw_fd() as u32, bpf::INET4_CONNECT, bpf::ALLOW_MULTI).unwrap();
    let device = Foreign::load(bpf::SCHED_CLS, 0, bpf::NEXT);
    let ingress = |program: Option<&Foreign>| {
        node.netns()
            .run(|| {
                let index = nix::net::if_::if_nametoindex("eth0").unwrap();
                program.into_iter().for_each(|program| program.attach(index, bpf::TCX_INGRESS, 0).unwrap());
                bpf::programs(index, bpf::TCX_INGRESS).unwrap()
            })
            .unwrap()
    };
    let programs = || (ingress(None), bpf::programs(cgroup.as_raw_fd() as u32, bpf::INET4_CONNECT).unwrap());
    ingress(Some(&device));
    let before = programs();
    assert_eq!((before.0.len(), before.1.len()), (2, 2));

    let binary = rig.lab.binary().to_owned();
    let uninstall = |more: &'static [&'static str]| -> Output {
        let mut command = Command::new(&binary);
        command.arg("uninstall").arg("--bpf-root").arg(node.bpf_root());
        command.arg("--socket-path").arg(node.agent_socket()).args(more);
        node.netns().run(move || command.output().unwrap()).unwrap()
    };
    let refused = uninstall(&[]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("stop it first"), "{refused:?}");
    let listed = uninstall(&["--dry-run"]);
    let count = pins(&node.bpf_root()).unwrap().len();
    assert_eq!((String::from_utf8_lossy(&listed.stdout).lines().count(), programs()), (count, before));

    rig.take_agent(1).stop().await;
    let done = uninstall(&[]);
    assert!(done.status.success(), "{done:?}");
    assert_eq!(pins(&node.bpf_root()).unwrap(), Vec::<std::path::PathBuf>::new());
    assert_eq!(programs(), (vec![device.id], vec![foreign.id]), "only theirs are left");
    assert!(uninstall(&[]).status.success(), "twice is no error");
}
