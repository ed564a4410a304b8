//! What drivers that forward (`bpf-lb-acceleration`) save: the two programs on the same packets, and requests through a
//! service's address to a pod on another node, with and without, in both ways to forward.
//!
//! In a lab whose cables carry what wires carry. A veth makes a frame of a packet before XDP sees it, and a packet of the
//! frame after it, which no driver of a card does: requests here show what it does, not what it saves there.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use aya::programs::Xdp;
use aya::{TestRun, TestRunOptions};
use kinesin::admin::views::StatusView;
use kinesin::datapath::{Acceleration, MapSizes, MapStore, detach_all};
use kinesin::lab::{AgentHandle, AgentOptions, HTTP_PORT};
use kinesin_abi::{Addr, Backend, FrontendKind, PEER_TAKES_NEW, PeerKey, PeerValue, frontend_flags, mac_words, proto};
use kinesin_core::plan::Op;

use crate::cluster::{Cluster, HEALTHZ, pause};
use crate::packets::{ACK, SYN, ends, tcp};
use crate::programs::once;
use crate::report::{heading, line, median, quantile};
use crate::requests::{VIPS, prepare, wait_served};
use crate::rig::{CLIENT, LAN, REMOTE_POD, Rig, TO_REMOTE, VIP, backend, frontend, isolated, small, value};
use crate::traffic::{Load, SINK_PORT, TIME_WAIT, TURNS, compare, keep_alive, new_connections};

const CALLS: usize = 4_000;
const INGRESS: &str = "cil_from_netdev";
const TAG: u32 = 0xabcdef;
const PEER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0x11];
/// A port whose pod is behind a neighbour that frames are handed on to.
const HANDED_ON: u16 = 90;
const OTHER_POD: u32 = 200;

pub(crate) fn run() -> anyhow::Result<()> {
    heading("One packet of a known connection to another node: ns by tc / in the driver");
    isolated(costs);
    requests()
}

fn costs() {
    let mut rig = Rig::with(MapSizes { peers: 16, ..small() });
    rig.datapath.accelerate(Acceleration::Native);
    let lan = rig.lan;
    let hooks = rig.datapath.attach_device(LAN, lan).expect("the device is there");
    assert!(hooks.are_ok(), "{hooks:?}");
    let peer = PeerValue {
        mac: mac_words(PEER_MAC),
        flags: PEER_TAKES_NEW,
        ifindex: lan,
        node: TAG,
        ipv4: 0,
        ipv6: Addr::UNSPECIFIED,
    };
    rig.maps.put_peer(&PeerKey::of_node(TAG), &peer).expect("it fits");
    let flags = frontend_flags::ROUTABLE | frontend_flags::FORWARDING_L2;
    let pod = Backend { flags: Backend::flags_of(false, TAG), ..backend(REMOTE_POD, 8080, proto::TCP, false) };
    let handed_on = value(FrontendKind::LoadBalancer, flags, OTHER_POD, 1);
    let ops = [
        Op::Backend(OTHER_POD, pod),
        Op::Slot(OTHER_POD, OTHER_POD),
        Op::PutFrontend(frontend(VIP, HANDED_ON, proto::TCP), handed_on),
    ];
    rig.maps.apply(&ops).expect("they fit");

    let client = (CLIENT, 50_000);
    let (_, out) = rig.ingress(&tcp(client, (VIP, TO_REMOTE), SYN));
    let (near, far) = ends(&out);
    rig.ingress(&tcp(far, near, SYN | ACK));
    rig.ingress(&tcp(client, (VIP, TO_REMOTE), ACK));
    rig.ingress(&tcp(client, (VIP, HANDED_ON), SYN));
    rig.ingress(&tcp(client, (VIP, HANDED_ON), ACK));
    for (what, packet) in [
        ("of no service", tcp(client, ([192, 168, 1, 77].into(), 443), ACK)),
        ("SNAT: to the pod", tcp(client, (VIP, TO_REMOTE), ACK)),
        ("SNAT: its answer", tcp(far, near, ACK)),
        ("L2: handed on", tcp(client, (VIP, HANDED_ON), ACK)),
    ] {
        let times: Vec<_> =
            (0..CALLS).map(|_| (once(&mut rig, INGRESS, &packet), in_driver(&mut rig, &packet))).collect();
        let (by_tc, in_driver): (Vec<_>, Vec<_>) = times.into_iter().unzip();
        let text = |times: &[u64]| format!("{} (p90 {})", median(times), quantile(times, 0.9));
        line(what, &[("tc", text(&by_tc)), ("driver", text(&in_driver))]);
    }
}

/// Nanoseconds of one run of the XDP program, as the kernel counted them.
fn in_driver(rig: &mut Rig, frame: &[u8]) -> u64 {
    let words = [0, frame.len() as u32, 0, rig.lan, 0, 0];
    let context: Vec<u8> = words.into_iter().flat_map(u32::to_ne_bytes).collect();
    let program = rig.datapath.ebpf_mut().program_mut("cil_xdp_entry").expect("in the object");
    let program: &mut Xdp = program.try_into().expect("an XDP program");
    let options = TestRunOptions { data_in: Some(frame), ctx_in: Some(&context), ..TestRunOptions::new() };
    let result = program.test_run(options).expect("the kernel runs it");
    u64::try_from(result.duration.as_nanos()).unwrap_or(u64::MAX)
}

fn requests() -> anyhow::Result<()> {
    let cluster = Cluster::start_with("bench-driver", 2, 1, |lab| lab.wires())?;
    let (pods, sinks) = prepare(&cluster)?;
    let mut quiet = Instant::now();
    for mode in ["snat", "auto"] {
        for acceleration in ["disabled", "native"] {
            pause(quiet.saturating_duration_since(Instant::now()));
            heading(&format!("Through a service's address, over the pod itself: {mode}, acceleration {acceleration}"));
            let agents = start(&cluster, mode, acceleration)?;
            wait_served(&cluster, || agents[0].logs(20))?;
            wait_for_way(&cluster, &agents[0], if mode == "auto" { "l2" } else { "" })?;
            let before = accelerated(&cluster, &agents[0])?;
            let (vip, pod) = (VIPS[1], pods[1].address());
            let datagrams = |to, time| sinks[1].datagrams(to, time);
            let loads: [(_, Load<'_>, _, _); 3] = [
                ("keep-alive", &keep_alive, 80, HTTP_PORT),
                ("new connections", &new_connections, 80, HTTP_PORT),
                ("UDP 64-byte frames", &datagrams, SINK_PORT, SINK_PORT),
            ];
            for (name, load, port, target) in loads {
                let (through, direct) = (SocketAddr::from((vip, port)), SocketAddr::from((pod, target)));
                let what = format!("{name}, backend on another node");
                compare(cluster.lab.client(), &what, (through, direct), load, TURNS)?;
            }
            let sent = accelerated(&cluster, &agents[0])? - before;
            line("packets sent by the driver", &[("in all", sent.to_string())]);
            ensure!((sent > 0) == (acceleration == "native"), "{sent} packets with acceleration {acceleration}");
            quiet = Instant::now() + TIME_WAIT;
            for (agent, node) in agents.into_iter().zip(cluster.lab.nodes()) {
                cluster.runtime.block_on(agent.stop());
                detach_all(&node.bpf_root())?;
            }
        }
    }
    drop(sinks);
    cluster.end();
    Ok(())
}

fn start(cluster: &Cluster, mode: &str, acceleration: &str) -> anyhow::Result<Vec<AgentHandle>> {
    let _context = cluster.runtime.enter();
    let binary = crate::agent_binary()?;
    let options = |acceleration| {
        AgentOptions::new(&binary)
            .config("k8s-kubeconfig-path", &cluster.plane.kubeconfig().to_string_lossy())
            .config("kube-proxy-replacement", "true")
            .config("bpf-lb-mode", mode)
            .config("bpf-lb-acceleration", acceleration)
            .config("kube-proxy-replacement-healthz-bind-address", &format!("0.0.0.0:{HEALTHZ}"))
    };
    // On the entry node alone: requests to the pod itself go through the other one's device, too.
    let accelerations = [acceleration, "disabled"];
    cluster.lab.nodes().iter().zip(accelerations).map(|(node, how)| Ok(node.start_agent(&options(how))?)).collect()
}

fn status(cluster: &Cluster, agent: &AgentHandle) -> anyhow::Result<StatusView> {
    Ok(serde_json::from_str(&cluster.runtime.block_on(agent.get("/v1/status"))?.1)?)
}

/// Waits until the entry node says so of its way to the other one.
fn wait_for_way(cluster: &Cluster, agent: &AgentHandle, way: &str) -> anyhow::Result<()> {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let members = status(cluster, agent)?.members;
        if way.is_empty() || members.iter().any(|member| member.forwarding == way) {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "not {way}: {members:?}");
        pause(Duration::from_millis(50));
    }
}

/// Packets that the entry node's driver has sent.
fn accelerated(cluster: &Cluster, agent: &AgentHandle) -> anyhow::Result<u64> {
    let metrics = cluster.runtime.block_on(agent.get("/metrics"))?.1;
    let line = metrics.lines().find_map(|line| line.strip_prefix("kinesin_accelerated_packets_total "));
    Ok(line.context("the metric is there")?.parse()?)
}
