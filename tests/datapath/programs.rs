//! The programs as the kernel sees them: accepted, within bounds, refused one by one.
//!
//! `tests/kernels` runs all of these tests on other kernels, and these first, with their output.

use std::collections::BTreeSet;

use aya::Ebpf;
use aya::programs::{Program, ProgramError, ProgramInfo};
use aya::util::KernelVersion;
use kinesin::datapath::{Acceleration, AttachMode, Attachment, Datapath, LoadOptions, MapStore, OBJECT, detach_all};

use crate::bpf;
use crate::packets::{ACK, SYN, ends, tcp};
use crate::rig::*;
use crate::sockets::Cgroup;

/// How a device is attached to where nothing else is asked for.
pub(crate) fn preferred() -> Attachment {
    if bpf::has_tcx() { Attachment::Tcx } else { Attachment::Clsact }
}

/// Loads every program, also those that the agent loads only when there is such a device.
fn load_all(ebpf: &mut Ebpf) -> Vec<(String, ProgramInfo)> {
    let mut infos = Vec::new();
    for (name, program) in ebpf.programs_mut() {
        let loaded = match program {
            Program::SchedClassifier(program) => program.load(),
            Program::CgroupSock(program) => program.load(),
            Program::CgroupSockAddr(program) => program.load(),
            Program::Xdp(program) => program.load(),
            other => panic!("{name} is of a kind that this test does not know: {:?}", other.prog_type()),
        };
        match loaded {
            Ok(()) | Err(ProgramError::AlreadyLoaded) => {}
            Err(error) => panic!("{name}: {error}"),
        }
        infos.push((name.to_owned(), program.info().unwrap()));
    }
    infos.sort_by(|a, b| a.0.cmp(&b.0));
    infos
}

#[test]
fn every_program_passes_this_kernels_verifier_and_stays_far_from_its_limit() {
    isolated(|| {
        let root = BpfRoot::new();
        let mut datapath = Datapath::load(&options(root.path())).unwrap();
        let infos = load_all(datapath.ebpf_mut());
        let mut most = 0;
        let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
        println!(
            "\n| Linux {} | instructions | bytes of BPF | bytes of machine code | instructions verified |",
            release.trim()
        );
        println!("|---|---|---|---|---|");
        for (name, info) in infos {
            let bytes = info.size_translated().unwrap_or(0);
            // Since Linux 5.16.
            let verified = info.verified_instruction_count().unwrap_or(0);
            println!("| `{name}` | {} | {bytes} | {} | {verified} |", bytes / 8, info.size_jitted());
            most = most.max(verified);
        }
        // The kernel's limit is a million. Handing packets on costs a third of it; older kernels follow each chain of
        // extension headers of IPv6 to the end of the program, three times as far in all.
        let is_new = KernelVersion::current().unwrap() >= KernelVersion::new(6, 8, 0);
        let enough = if is_new { 220_000 } else { 700_000 };
        assert!(most < enough, "{most}");
    });
}

#[test]
fn packets_take_their_ways_through_the_programs() {
    isolated(|| {
        let mut rig = Rig::new();
        rig.maps.put_l2(kinesin_abi::L2Key { addr: VIP.into(), ifindex: rig.lan }).unwrap();
        let question = crate::packets::arp([0xff; 6], 1, (CLIENT_MAC, CLIENT), ([0; 6], VIP));
        let (code, answer) = rig.ingress(&question);
        assert_eq!((code, &answer[..6], &answer[6..12]), (REDIRECT, &CLIENT_MAC[..], &NODE_MAC[..]), "ARP is answered");
        for (port, there) in [(TO_LOCAL, LOCAL_POD), (TO_REMOTE, REMOTE_POD)] {
            let (_, new) = rig.ingress(&tcp((CLIENT, 40_000), (VIP, port), SYN));
            assert_eq!(ends(&new).1, (there, 8080), "a new connection");
            let (source, backend) = ends(&new);
            let reply = tcp(backend, source, SYN | ACK);
            let (_, reply) = if port == TO_LOCAL { rig.egress(&reply) } else { rig.ingress(&reply) };
            assert_eq!(ends(&reply), ((VIP, port), (CLIENT, 40_000)), "its answer");
            let (_, next) = rig.ingress(&tcp((CLIENT, 40_000), (VIP, port), ACK));
            assert_eq!(ends(&next), (source, backend), "the established connection");
        }
    });
}

#[test]
fn every_hook_is_attached_by_what_this_kernel_has() {
    isolated(|| {
        network();
        let cgroup = Cgroup::new("attached");
        for (mode, expected) in [(AttachMode::Auto, preferred()), (AttachMode::Clsact, Attachment::Clsact)] {
            let root = BpfRoot::new();
            let mut datapath = Datapath::load(&LoadOptions { attach: mode, ..dual(root.path()) }).unwrap();
            let hooks = datapath.attach_device(LAN, ifindex(LAN)).unwrap();
            for hook in [hooks.ingress, hooks.egress].into_iter().chain(hooks.ipv6.expect("both families are served")) {
                assert_eq!((hook.attached, hook.error), (Some(expected), None));
            }
            for hook in datapath.attach_cgroup(cgroup.path()) {
                assert_eq!((hook.attached, hook.error), (Some(Attachment::Cgroup), None));
            }
            detach_all(root.path()).unwrap();
        }
    });
}

/// The object with the first instruction of a program made invalid.
fn corrupted(program: &str) -> Vec<u8> {
    let mut object = OBJECT.to_vec();
    let read = |at: usize, len: usize| {
        let mut bytes = [0; 8];
        bytes[..len].copy_from_slice(&OBJECT[at..at + len]);
        u64::from_le_bytes(bytes) as usize
    };
    // ELF64: section headers, then the symbol that has the program's name.
    let (sections, count) = (read(0x28, 8), read(0x3c, 2));
    let section = |index: usize| sections + index * 64;
    let symbols = (0..count).map(section).find(|at| read(at + 4, 4) == 2).expect("a symbol table");
    let strings = read(section(read(symbols + 0x28, 4)) + 0x18, 8);
    let (start, len) = (read(symbols + 0x18, 8), read(symbols + 0x20, 8));
    let symbol = (start..start + len)
        .step_by(24)
        .find(|at| OBJECT[strings + read(*at, 4)..].starts_with(format!("{program}\0").as_bytes()))
        .expect("the program has a symbol");
    let code = read(section(read(symbol + 6, 2)) + 0x18, 8) + read(symbol + 8, 8);
    object[code..code + 8].copy_from_slice(&[0xff; 8]);
    object
}

#[test]
fn r34_each_program_that_is_refused_leaves_the_others_working() {
    // One optional program took the whole node down.
    isolated(|| {
        let mut rig = Rig::new();
        let cgroup = Cgroup::new("independent");
        // Each of them, whichever the object has: those for devices without Ethernet header have hooks of their own.
        let mut all: Vec<String> = load_all(rig.datapath.ebpf_mut()).into_iter().map(|(name, _)| name).collect();
        // Those of pods' devices have no other way to be attached.
        all.retain(|name| bpf::has_tcx() || !name.starts_with("cil_from_container"));
        assert!(all.len() >= 12, "{all:?}");
        let _tun = crate::hooks::tun();
        ip("link set tun0 up");
        for refused in &all {
            let root = BpfRoot::new();
            let options = LoadOptions { acceleration: Acceleration::Native, ..dual(root.path()) };
            let mut datapath = Datapath::load_object(&corrupted(refused), &options).unwrap();
            datapath.attach_device(LAN, ifindex(LAN)).unwrap();
            datapath.attach_device("tun0", ifindex("tun0")).unwrap();
            datapath.attach_cgroup(cgroup.path());
            datapath.follow_pods(&BTreeSet::from([ifindex(LAN)]));
            let failed: Vec<_> = datapath.hooks().into_iter().filter(|hook| !hook.is_ok()).collect();
            let [hook] = &failed[..] else { panic!("{refused}: {failed:?}") };
            assert_eq!((&hook.program, datapath.hooks().len()), (refused, all.len()));
            assert!(hook.error.as_ref().unwrap().contains("the kernel refused it"), "{hook:?}");
            // What was refused once is refused again, and costs the others nothing.
            assert_eq!((datapath.retry(), datapath.verify_hooks()), (1, 0), "{refused}");
            datapath.follow_pods(&BTreeSet::from([ifindex(LAN)]));
            assert_eq!(datapath.hooks().iter().filter(|hook| hook.is_ok()).count(), all.len() - 1);
            detach_all(root.path()).unwrap();
        }
    });
}

/// Bytes of stack that the deepest chain of calls from a program's start takes, and the frames of that chain.
fn deepest_stack(code: &[aya_obj::generated::bpf_insn]) -> (u64, Vec<u64>) {
    const CALL: u8 = 0x85;
    const PSEUDO_CALL: u8 = 1;
    const FRAME_POINTER: u8 = 10;
    /// Before Linux 6.8 the verifier rounds each frame up to so much (`check_max_stack_depth`).
    const ROUNDED: u64 = 32;
    let target = |at: usize| {
        let insn = &code[at];
        let calls = insn.code == CALL && insn.src_reg() == PSEUDO_CALL;
        calls.then(|| (at as i64 + 1 + i64::from(insn.imm)) as usize)
    };
    let mut starts: Vec<usize> = std::iter::once(0).chain((0..code.len()).filter_map(target)).collect();
    starts.sort_unstable();
    starts.dedup();
    let frame = |body: std::ops::Range<usize>| {
        let depths = body.map(|at| {
            let insn = &code[at];
            // Loads by source, stores by destination, and addresses made by adding to a copy of the frame pointer.
            let direct = match insn.code & 0x07 {
                1 => insn.src_reg() == FRAME_POINTER,
                2 | 3 => insn.dst_reg() == FRAME_POINTER,
                _ => false,
            };
            let copied = insn.code == 0x07
                && at > 0
                && code[at - 1].code == 0xbf
                && code[at - 1].src_reg() == FRAME_POINTER
                && code[at - 1].dst_reg() == insn.dst_reg();
            match (direct, copied) {
                (true, _) => i64::from(-insn.off),
                (_, true) => i64::from(-insn.imm),
                _ => 0,
            }
        });
        depths.max().unwrap_or(0).max(0) as u64
    };
    let ends = starts.iter().skip(1).copied().chain([code.len()]);
    let bodies: Vec<_> = starts.iter().copied().zip(ends).map(|(start, end)| start..end).collect();
    let frames: Vec<u64> = bodies.iter().map(|body| frame(body.clone())).collect();
    fn depth(
        of: usize,
        bodies: &[std::ops::Range<usize>],
        frames: &[u64],
        target: &dyn Fn(usize) -> Option<usize>,
    ) -> (u64, Vec<u64>) {
        let callees = bodies[of].clone().filter_map(target);
        let below = callees.map(|start| {
            let of = bodies.iter().position(|body| body.start == start).expect("every target starts a body");
            depth(of, bodies, frames, target)
        });
        let (below, mut chain) = below.max().unwrap_or_default();
        chain.insert(0, frames[of]);
        (frames[of].max(1).next_multiple_of(ROUNDED) + below, chain)
    }
    depth(0, &bodies, &frames, &target)
}

#[test]
fn stacks_fit_as_older_kernels_count_them() {
    // Newer kernels round less, so that this one would not say.
    let mut object = aya_obj::Object::parse(OBJECT).unwrap();
    let sections = object.functions.keys().map(|(section, _)| *section).collect();
    object.relocate_calls(&sections).unwrap();
    for (name, program) in &object.programs {
        let (depth, frames) = deepest_stack(&object.functions[&program.function_key()].instructions);
        println!("{name}: {depth} bytes of stack, frames {frames:?}");
        assert!(depth <= 512, "{name} takes {depth} bytes of stack: {frames:?}");
    }
}
