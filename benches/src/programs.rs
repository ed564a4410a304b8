//! The programs in the kernel, packet by packet, by `BPF_PROG_TEST_RUN`.
//!
//! A translated packet is no longer the packet that was put in, so repeating inside one call would measure something
//! else: each call runs once. That adds the kernel's own time keeping, which is given as a line of its own.

use std::net::Ipv4Addr;

use aya::programs::SchedClassifier;
use aya::{TestRun, TestRunOptions};
use kinesin::datapath::{MapSizes, MapStore};
use kinesin_abi::{FrontendKind, L2Key, Settings, frontend_flags, proto};
use kinesin_core::plan::Op;

use crate::packets::{ACK, End, SYN, ends, tcp};
use crate::report::{heading, line, median, quantile};
use crate::rig::{
    CLIENT, CLIENT_MAC, LOCAL_ID, REMOTE_ID, Rig, TO_LOCAL, TO_REMOTE, VIP, frontend, isolated, settings, value,
};

/// Few enough that the connections to one backend take a small part of the source ports that SNAT has.
const CALLS: usize = 4_000;
const INGRESS: &str = "cil_from_netdev";
const EGRESS: &str = "cil_to_netdev";

/// What one kind of packet costs with a number of services.
type Cost = (&'static str, u64, u64);

pub(crate) fn run() -> anyhow::Result<()> {
    heading("Programs: ns per packet");
    let mut rows: Vec<Vec<Cost>> = Vec::new();
    for services in [10, 10_000] {
        let (send, costs) = std::sync::mpsc::sync_channel(1);
        isolated(move || send.send(costs_with(services)).expect("the receiver waits"));
        rows.push(costs.recv()?);
    }
    for (few, many) in rows[0].iter().zip(&rows[1]) {
        let figures = [
            ("10 services", format!("{} (p90 {})", few.1, few.2)),
            ("10,000", format!("{} (p90 {})", many.1, many.2)),
            ("ratio", format!("{:.2}", many.1 as f64 / few.1 as f64)),
        ];
        line(few.0, &figures);
    }
    Ok(())
}

fn costs_with(services: u32) -> Vec<Cost> {
    let sizes = MapSizes { l2: 64, devices: 16, ..MapSizes::default() };
    let mut rig = Rig::with(sizes);
    rig.maps.apply(&more(services)).expect("they fit");
    rig.maps.put_l2(L2Key { addr: VIP.into(), ifindex: rig.lan }).expect("it fits");

    // What agents have unless a range is configured.
    let settings = Settings { snat_min: 32_768, snat_max: 65_535, ..settings() };
    rig.maps.write_settings(&settings).expect("settings");

    let mut costs = Vec::new();
    let pass = tcp((CLIENT, 40_000), (Ipv4Addr::new(192, 168, 1, 77), 443), ACK);
    costs.push(("the next, but a million runs in one call", repeated(&mut rig, &pass), 0));
    let mut cost = |rig: &mut Rig, what, program, packet: &mut dyn FnMut(usize) -> Vec<u8>| {
        let times: Vec<u64> = (0..CALLS).map(|call| once(rig, program, &packet(call))).collect();
        costs.push((what, median(&times), quantile(&times, 0.9)));
        forget_flows(rig);
    };
    cost(&mut rig, "not for a service (TCP)", INGRESS, &mut |_| pass.clone());
    let arp = arp_request();
    cost(&mut rig, "ARP request for a VIP: answered", INGRESS, &mut |_| arp.clone());

    let client = |call: usize| -> End {
        (Ipv4Addr::from(0xc0a8_0132 + (call as u32 >> 14 << 8)), 20_000 + (call & 0x3fff) as u16)
    };
    cost(&mut rig, "new connection, backend here", INGRESS, &mut |call| tcp(client(call), (VIP, TO_LOCAL), SYN));
    cost(&mut rig, "new connection, backend on another node (SNAT)", INGRESS, &mut |call| {
        tcp(client(call), (VIP, TO_REMOTE), SYN)
    });
    // Which of many there are, with the entries in the nearest caches, and without.
    cost(&mut rig, "new connection, ten services in turn", INGRESS, &mut |call| {
        tcp((CLIENT, 10_000 + (call & 0x3fff) as u16), (address(call as u32 % 10), 80), SYN)
    });
    let spread_over = services.min(10_000);
    cost(&mut rig, "new connection, another service each time", INGRESS, &mut |call| {
        tcp((CLIENT, 10_000 + (call & 0x3fff) as u16), (address(call as u32 % spread_over), 80), SYN)
    });

    for (port, what, back, program) in [
        (TO_LOCAL, "established, backend here", "its answer (egress)", EGRESS),
        (TO_REMOTE, "established, backend on another node", "its answer (ingress)", INGRESS),
    ] {
        let from = (CLIENT, 50_000);
        let (_, out) = rig.ingress(&tcp(from, (VIP, port), SYN));
        assert_ne!(ends(&out).1, (VIP, port), "{what}: the packet is translated");
        let (near, far) = ends(&out);
        let answered = tcp(far, near, SYN | ACK);
        rig.run(program, &answered);
        let packet = tcp(from, (VIP, port), ACK);
        let answer = tcp(far, near, ACK);
        let times: Vec<_> =
            (0..CALLS).map(|_| (once(&mut rig, INGRESS, &packet), once(&mut rig, program, &answer))).collect();
        let (there, again): (Vec<_>, Vec<_>) = times.into_iter().unzip();
        costs.push((what, median(&there), quantile(&there, 0.9)));
        costs.push((back, median(&again), quantile(&again, 0.9)));
        assert_ne!(ends(&rig.run(program, &answer).1), ends(&answer), "{back} is translated");
        forget_flows(&rig);
    }
    costs
}

/// So that one kind of packet does not meet what another left behind.
fn forget_flows(rig: &Rig) {
    for table in ["flows", "transient"] {
        for (key, _) in rig.maps.raw_entries(table).expect("it can be read") {
            rig.maps.raw_delete(table, &key).expect("it can be deleted");
        }
    }
}

fn address(service: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 97, 0, 0)) + service)
}

/// LoadBalancer services beside those of the rig, all to its two backends.
fn more(services: u32) -> Vec<Op> {
    (0..services)
        .map(|service| {
            let id = if service % 2 == 0 { LOCAL_ID } else { REMOTE_ID };
            let value = value(FrontendKind::LoadBalancer, frontend_flags::ROUTABLE, id, 1);
            Op::PutFrontend(frontend(address(service), 80, proto::TCP), value)
        })
        .collect()
}

fn arp_request() -> Vec<u8> {
    let mut frame = [&[0xff; 6][..], &CLIENT_MAC, &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1], &CLIENT_MAC].concat();
    frame.extend(CLIENT.octets());
    frame.extend([0; 6]);
    frame.extend(VIP.octets());
    frame.resize(60, 0);
    frame
}

pub(crate) fn once(rig: &mut Rig, program: &str, packet: &[u8]) -> u64 {
    timed(rig, program, packet, 1)
}

fn repeated(rig: &mut Rig, packet: &[u8]) -> u64 {
    timed(rig, INGRESS, packet, 1_000_000)
}

/// Nanoseconds per run, as the kernel counted them.
fn timed(rig: &mut Rig, program: &str, packet: &[u8], repeat: u32) -> u64 {
    let lan = rig.lan;
    let program: &mut SchedClassifier =
        rig.datapath.ebpf_mut().program_mut(program).expect("in the object").try_into().expect("a classifier");
    // `struct __sk_buff` up to its eleventh word, ifindex.
    let mut context = [0u8; 44];
    context[40..].copy_from_slice(&lan.to_ne_bytes());
    let options = TestRunOptions { data_in: Some(packet), ctx_in: Some(&context), repeat, ..TestRunOptions::new() };
    let result = program.test_run(options).expect("the kernel runs it");
    u64::try_from(result.duration.as_nanos()).unwrap_or(u64::MAX)
}
