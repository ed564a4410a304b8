//! Programs of others on the hooks that we use (R48): attached before, after and while ours are, they stay, in their
//! order; ours stay too, come back when they are taken away, and leave nothing behind.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;

use kinesin::datapath::{AttachMode, Attachment, Datapath, LoadOptions, detach_all, links_dir};

use crate::bpf::{self, Foreign, tc};
use crate::rig::*;
use crate::sockets::{Cgroup, Node};
use crate::traffic::{Lan, connect, exchange};

/// The ids at a hook of the LAN device without those of `foreign`.
fn ours(kind: u32, foreign: &[u32]) -> Vec<u32> {
    let all = bpf::programs(ifindex(LAN), kind).unwrap();
    all.into_iter().filter(|id| !foreign.contains(id)).collect()
}

fn assert_traffic(lan: &Lan) {
    for port in [TO_LOCAL, TO_REMOTE] {
        lan.client.run(move || exchange(&connect(port).unwrap(), 100_000));
    }
}

#[test]
fn r48_tcx_programs_of_others_and_ours_leave_each_other_alone() {
    if !bpf::has_tcx() {
        eprintln!("this kernel has no tcx: nothing to test");
        return;
    }
    isolated(|| {
        let mut lan = Lan::new();
        let index = ifindex(LAN);
        lan.datapath.as_mut().unwrap().detach_device(LAN, index).unwrap();
        let [before, after, first] = std::array::from_fn(|_| Foreign::load(bpf::SCHED_CLS, 0, bpf::NEXT));
        let hooks = [bpf::TCX_INGRESS, bpf::TCX_EGRESS];
        hooks.iter().for_each(|hook| before.attach(index, *hook, 0).unwrap());
        lan.start_agent();
        hooks.iter().for_each(|hook| after.attach(index, *hook, 0).unwrap());
        hooks.iter().for_each(|hook| first.attach(index, *hook, bpf::BEFORE).unwrap());
        assert_traffic(&lan);
        let order = |hook| {
            let [own] = ours(hook, &[first.id, before.id, after.id])[..] else { panic!("one of ours") };
            assert_eq!(bpf::programs(index, hook).unwrap(), [first.id, before.id, own, after.id]);
            own
        };
        // The next agent takes the place of its predecessor, wherever that is.
        let old = hooks.map(order);
        lan.start_agent();
        assert_ne!(hooks.map(order), old);
        assert_eq!(lan.datapath.as_mut().unwrap().verify_hooks(), 0, "nothing was taken away");
        assert_traffic(&lan);

        // Theirs go, ours stays; ours is taken away, and comes back.
        hooks.iter().for_each(|hook| before.detach(index, *hook));
        assert_traffic(&lan);
        bpf::detach_link(&links_dir(lan.root.path()).join(format!("{index}-ingress")));
        assert_eq!(bpf::programs(index, bpf::TCX_INGRESS).unwrap(), [first.id, after.id]);
        assert_eq!(lan.datapath.as_mut().unwrap().verify_hooks(), 1);
        assert_eq!(ours(bpf::TCX_INGRESS, &[first.id, after.id]).len(), 1);
        assert_traffic(&lan);

        detach_all(lan.root.path()).unwrap();
        hooks
            .iter()
            .for_each(|hook| assert_eq!(bpf::programs(index, *hook).unwrap(), [first.id, after.id], "only theirs"));
        assert!(!lan.root.path().join("kinesin").exists());
    });
}

/// Filters of the LAN device as tc shows them, one line each.
fn all_filters() -> Vec<String> {
    let all = ["ingress", "egress"].map(|way| tc(&format!("filter show dev {LAN} {way}")));
    all.concat().into_iter().filter(|line| line.contains(" handle ")).collect()
}

/// Those that are not ours: all of ours carry the name of a program.
fn foreign_filters() -> Vec<String> {
    all_filters().into_iter().filter(|line| !line.contains("cil_")).collect()
}

fn our_filters() -> usize {
    all_filters().iter().filter(|line| line.contains("cil_")).count()
}

#[test]
fn r48_filters_of_others_and_ours_leave_each_other_alone() {
    // Of the priority that ours likes; of the same, but for a protocol, so that ours cannot have it; behind ours.
    for theirs in ["protocol all pref 1 handle 1", "protocol ip pref 1 handle 1", "protocol all pref 9"] {
        for mode in [AttachMode::Clsact, AttachMode::Auto] {
            isolated(move || filters(theirs, mode));
        }
    }
}

fn filters(theirs: &str, mode: AttachMode) {
    let mut lan = Lan::new();
    let index = ifindex(LAN);
    lan.datapath.as_mut().unwrap().detach_device(LAN, index).unwrap();
    let foreign = Foreign::load(bpf::SCHED_CLS, 0, bpf::NEXT);
    let pin = lan.root.path().join("foreign");
    foreign.pin(&pin);
    let add = |way: &str, which: &str| {
        tc(&format!("filter add dev {LAN} {way} {which} bpf direct-action object-pinned {}", pin.display()));
    };
    tc(&format!("qdisc replace dev {LAN} clsact"));
    ["ingress", "egress"].iter().for_each(|way| add(way, theirs));
    let options = LoadOptions { attach: mode, ..options(lan.root.path()) };
    let mut datapath = Datapath::load(&options).unwrap();
    let is_filter = |datapath: &mut Datapath| {
        let hooks = datapath.attach_device(LAN, index).unwrap();
        assert!(hooks.ingress.is_ok() && hooks.egress.is_ok(), "{hooks:?}");
        hooks.ingress.attached == Some(Attachment::Clsact)
    };
    let before = foreign_filters();
    assert!(!before.is_empty());
    let is_filter_now = is_filter(&mut datapath);
    let expected = if is_filter_now { 2 } else { 0 };
    assert_eq!((foreign_filters(), our_filters()), (before.clone(), expected), "theirs are as they were");
    assert_traffic(&lan);
    // Another one of theirs comes while ours are there, and the next agent.
    add("ingress", "protocol ip pref 40");
    let before = foreign_filters();
    drop(datapath);
    let mut datapath = Datapath::load(&options).unwrap();
    is_filter(&mut datapath);
    assert_eq!(datapath.verify_hooks(), 0, "nothing was taken away");
    assert_eq!((foreign_filters(), our_filters()), (before.clone(), expected));
    assert_traffic(&lan);

    if is_filter_now {
        // Somebody clears what is called like Cilium's, as Cilium's own cleanup does.
        let lines = tc(&format!("filter show dev {LAN} ingress"));
        let ours = lines.iter().find(|line| line.contains("cil_from_netdev")).unwrap();
        let word = |name| ours.split(' ').skip_while(|word| *word != name).nth(1).unwrap().to_owned();
        tc(&format!("filter del dev {LAN} ingress pref {} handle {} bpf", word("pref"), word("handle")));
        assert_eq!(our_filters(), 1);
        assert_eq!(datapath.verify_hooks(), 1);
        assert_eq!((foreign_filters(), our_filters()), (before.clone(), expected));
        assert_traffic(&lan);
    }
    detach_all(lan.root.path()).unwrap();
    assert_eq!((foreign_filters(), our_filters()), (before, 0), "only theirs are left");
    assert!(!lan.root.path().join("kinesin").exists());

    // The whole qdisc goes, with everything in it.
    let mut datapath = Datapath::load(&options).unwrap();
    is_filter(&mut datapath);
    tc(&format!("qdisc del dev {LAN} clsact"));
    assert_eq!(datapath.verify_hooks(), expected, "each filter comes back");
    assert_eq!(our_filters(), expected);
    detach_all(lan.root.path()).unwrap();
}

fn cgroup_programs(cgroup: &Path) -> Vec<u32> {
    let dir = File::open(cgroup).unwrap();
    bpf::programs(dir.as_raw_fd() as u32, bpf::INET4_CONNECT).unwrap()
}

#[test]
fn r48_cgroup_programs_of_others_and_ours_leave_each_other_alone() {
    isolated(|| {
        let [before, after, below] =
            std::array::from_fn(|_| Foreign::load(bpf::CGROUP_SOCK_ADDR, bpf::INET4_CONNECT, 1));
        let mut node = Node::new();
        detach_all(node.root.path()).unwrap();
        let dir = File::open(node.cgroup.path()).unwrap();
        let target = dir.as_raw_fd() as u32;
        before.attach(target, bpf::INET4_CONNECT, bpf::ALLOW_MULTI).unwrap();
        node.restart();
        after.attach(target, bpf::INET4_CONNECT, bpf::ALLOW_MULTI).unwrap();
        // A cgroup below has one that allows no other beside it.
        let inner = node.cgroup.path().join("inner");
        std::fs::create_dir(&inner).unwrap();
        let inner_dir = File::open(&inner).unwrap();
        below.attach(inner_dir.as_raw_fd() as u32, bpf::INET4_CONNECT, 0).unwrap();
        let foreign = [before.id, after.id];
        let all = cgroup_programs(node.cgroup.path());
        assert_eq!(all.len(), 3);
        assert!(foreign.iter().all(|id| all.contains(id)), "{all:?}");
        node.assert_translates();
        node.restart();
        assert_eq!(cgroup_programs(node.cgroup.path()).len(), 3, "the next agent is in its predecessor's place");
        assert_eq!(node.datapath.verify_hooks(), 0);
        before.detach(target, bpf::INET4_CONNECT);
        node.assert_translates();
        bpf::detach_link(&links_dir(node.root.path()).join("cgroup-cil_sock4_connect"));
        assert_eq!(cgroup_programs(node.cgroup.path()), [after.id]);
        assert_eq!(node.datapath.verify_hooks(), 1, "it comes back");
        node.assert_translates();
        detach_all(node.root.path()).unwrap();
        assert_eq!(cgroup_programs(node.cgroup.path()), [after.id], "only theirs are left");
        assert_eq!(cgroup_programs(&inner), [below.id]);
        std::fs::remove_dir(&inner).unwrap();
    });
}

#[test]
fn r34_a_hook_that_somebody_keeps_for_himself_is_taken_when_it_is_free() {
    isolated(|| {
        let root = BpfRoot::new();
        let cgroup = Cgroup::new("exclusive");
        let dir = File::open(cgroup.path()).unwrap();
        let alone = Foreign::load(bpf::CGROUP_SOCK_ADDR, bpf::INET4_CONNECT, 1);
        alone.attach(dir.as_raw_fd() as u32, bpf::INET4_CONNECT, 0).unwrap();
        let mut datapath = Datapath::load(&options(root.path())).unwrap();
        let failed: Vec<_> = datapath.attach_cgroup(cgroup.path()).into_iter().filter(|hook| !hook.is_ok()).collect();
        let [hook] = &failed[..] else { panic!("{failed:?}") };
        assert_eq!(hook.program, "cil_sock4_connect");
        assert!(hook.error.as_ref().unwrap().contains("not permitted"), "{hook:?}");
        assert_eq!((datapath.retry(), datapath.verify_hooks()), (1, 0));
        assert_eq!(cgroup_programs(cgroup.path()), [alone.id], "theirs stays");
        alone.detach(dir.as_raw_fd() as u32, bpf::INET4_CONNECT);
        assert_eq!(datapath.retry(), 0);
        assert_eq!(cgroup_programs(cgroup.path()).len(), 1);
        assert_eq!(datapath.maps().drops().unwrap(), []);
        detach_all(root.path()).unwrap();
    });
}
