//! `kinesin trace` tells the truth: what it says of a packet is what the programs do with that packet, on the same maps.
//!
//! Services, clients, connections and settings are generated; each packet is traced and then run. Where the programs
//! choose at random, what they chose must be one of the ways that the trace names, with its probability.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;

use kinesin::datapath::{HookStatus, MapStore, detach_all};
use kinesin::trace::Live;
use kinesin_abi::{
    Backend, Direction, DropReason, FrontendKind, FrontendValue, MAGLEV_TABLE_SIZE, PEER_BY_ROUTE, PEER_TAKES_NEW,
    PeerKey, PeerValue, SETTING_ANSWER_PING, SOURCE_RANGE_BITS, SetRef, SourceRange, SourceRangeKey, frontend_flags,
    proto,
};
use kinesin_core::plan::Op;
use kinesin_core::trace::{Packet, Place, Question, Step, Trace, Tuple, Verdict, place, trace};

use crate::depart::sent_by_pod;
use crate::packets::{IP, SYN, checksum, ends, ipv4, tcp, udp};
use crate::rig::*;
use crate::sockets::Cgroup;

/// What became of a packet, as far as can be seen from outside the programs.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Seen {
    Untouched,
    Translated(SocketAddr, SocketAddr),
    Sent(SocketAddr, SocketAddr),
    HandedOn,
    Wrapped(IpAddr, IpAddr),
    Answered,
    Dropped { reason: u8, told: bool },
}

/// A rig with its own view of itself, as `kinesin trace` has it.
pub(crate) struct Traced {
    pub(crate) rig: Rig,
    live: Live,
    runtime: tokio::runtime::Runtime,
}

impl Traced {
    fn new(ops: &[Op]) -> Self {
        Self::of(Rig::new(), ops)
    }

    pub(crate) fn of(mut rig: Rig, ops: &[Op]) -> Self {
        let hooks = rig.datapath.attach_device(LAN, rig.lan).unwrap();
        rig.maps.apply(ops).unwrap();
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
        let live = Live::open(rig.maps.clone(), vec![hooks.ingress, hooks.egress], runtime.handle().clone()).unwrap();
        Self { rig, live, runtime }
    }

    /// Looks at the neighbour table anew, as each `kinesin trace` does.
    pub(crate) fn look_again(&mut self) {
        let hooks = self.rig.datapath.hooks();
        self.live = Live::open(self.rig.maps.clone(), hooks, self.runtime.handle().clone()).unwrap();
    }

    fn trace(&self, packet: &Packet, from: Place) -> Trace {
        trace(&self.live, packet, from).expect("everything can be read")
    }

    fn counters(&self) -> BTreeMap<u8, u64> {
        let drops = self.rig.maps.drops().expect("counters").into_iter();
        drops.filter(|(_, way, _)| *way == Direction::Ingress).map(|(r, _, count)| (r as u8, count.packets)).collect()
    }

    fn run(&mut self, program: &str, packet: &Packet, ifindex: u32) -> Seen {
        let mut frame = frame(packet);
        if ifindex != self.rig.lan {
            frame = sent_by_pod(&frame);
        }
        let before = self.counters();
        let (code, out) = self.rig.run_on(program, &frame, ifindex);
        let after = self.counters();
        let counted = after.iter().find(|(reason, n)| before.get(reason).copied().unwrap_or(0) < **n);
        if let Some((reason, _)) = counted {
            return Seen::Dropped { reason: *reason, told: code == REDIRECT };
        }
        if packet.proto == proto::ICMP && code == REDIRECT {
            return Seen::Answered;
        }
        if out == frame {
            assert_eq!(code, NEXT, "{packet:?}");
            return Seen::Untouched;
        }
        if out[IP + 9] == proto::IPIP {
            let addr = |at: usize| IpAddr::from([out[at], out[at + 1], out[at + 2], out[at + 3]]);
            return Seen::Wrapped(addr(IP + 12), addr(IP + 16));
        }
        let (src, dst) = ends(&out);
        if (src, dst) == ends(&frame) {
            assert_eq!(code, REDIRECT, "{packet:?}");
            return Seen::HandedOn;
        }
        let (src, dst) = (SocketAddr::from(src), SocketAddr::from(dst));
        if code == REDIRECT { Seen::Sent(src, dst) } else { Seen::Translated(src, dst) }
    }

    /// Traces a packet from the LAN, runs it, and holds one against the other.
    #[track_caller]
    pub(crate) fn agree(&mut self, packet: &Packet) -> (Trace, Seen) {
        self.agree_at("cil_from_netdev", packet, Place::Device(self.rig.lan))
    }

    /// The same of a packet of a pod behind this device.
    #[track_caller]
    pub(crate) fn agree_from_pod(&mut self, device: &str, packet: &Packet) -> (Trace, Seen) {
        self.agree_on("cil_from_container", packet, Place::Node, ifindex(device))
    }

    #[track_caller]
    pub(crate) fn agree_at(&mut self, program: &str, packet: &Packet, from: Place) -> (Trace, Seen) {
        self.agree_on(program, packet, from, self.rig.lan)
    }

    #[track_caller]
    fn agree_on(&mut self, program: &str, packet: &Packet, from: Place, ifindex: u32) -> (Trace, Seen) {
        let said = self.trace(packet, from);
        let seen = self.run(program, packet, ifindex);
        let sum: f64 = said.ways.iter().map(|way| way.chance).sum();
        assert!((sum - 1.0).abs() < 1e-6, "the chances add up to {sum}: {said:#?}");
        let fits = said.ways.iter().any(|way| matches(&way.verdict, &seen));
        assert!(fits, "the kernel: {seen:?}\nthe trace: {said:#?}");
        (said, seen)
    }
}

fn frame(packet: &Packet) -> Vec<u8> {
    let v4 = |ip: IpAddr| match ip {
        IpAddr::V4(v4) => v4,
        IpAddr::V6(_) => panic!("{ip} in an IPv4 packet"),
    };
    let (from, to) = ((v4(packet.src.unwrap()), packet.sport), (v4(packet.dst), packet.dport));
    match packet.proto {
        proto::TCP => tcp(from, to, SYN),
        proto::UDP => udp(from, to, b"hello, world"),
        proto::ICMP => {
            let mut echo = vec![8, 0, 0, 0, 0, 1, 0, 1, 1, 2, 3, 4];
            let check = checksum(&echo);
            echo[2..4].copy_from_slice(&check.to_be_bytes());
            ipv4(from.0, to.0, proto::ICMP, &echo)
        }
        proto::SCTP => {
            let ports = [from.1.to_be_bytes(), to.1.to_be_bytes()].concat();
            ipv4(from.0, to.0, proto::SCTP, &[ports, vec![0; 16]].concat())
        }
        other => ipv4(from.0, to.0, other, &[0; 20]),
    }
}

fn matches(said: &Verdict, seen: &Seen) -> bool {
    let tuple = |tuple: &Tuple, src: &SocketAddr, dst: &SocketAddr| {
        tuple.src == src.ip() && tuple.sport.contains(src.port()) && SocketAddr::new(tuple.dst, tuple.dport) == *dst
    };
    match (said, seen) {
        (Verdict::Pass { .. }, Seen::Untouched) | (Verdict::Answered { .. }, Seen::Answered) => true,
        (Verdict::Translated(to), Seen::Translated(src, dst)) => tuple(to, src, dst),
        (Verdict::Sent { tuple: to, .. }, Seen::Sent(src, dst)) => tuple(to, src, dst),
        (Verdict::HandedOn { .. }, Seen::HandedOn) => true,
        (Verdict::Wrapped { from, to, .. }, Seen::Wrapped(src, dst)) => (from, to) == (src, dst),
        (Verdict::Dropped { number, told, .. }, Seen::Dropped { reason, told: was }) => {
            number == reason && told.is_some() == *was
        }
        _ => false,
    }
}

pub(crate) fn packet(proto: u8, from: (Ipv4Addr, u16), to: (Ipv4Addr, u16)) -> Packet {
    Packet { src: Some(from.0.into()), sport: from.1, dst: to.0.into(), dport: to.1, proto }
}

/// A protocol without ports (RFC 2784).
const GRE: u8 = 47;

/// A generator of numbers, the same in every run.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: u32) -> u32 {
        // Knuth's MMIX constants; the high bits are the good ones.
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) % u64::from(limit)) as u32
    }

    fn one_in(&mut self, n: u32) -> bool {
        self.below(n) == 0
    }
}

/// First port, id of the first backend and first slot of the generated services.
const FIRST_PORT: u16 = 1000;
const FIRST_BACKEND: u32 = 100;
const FIRST_SLOT: u32 = 100;
/// Backends that are generated, by turns: on this node, on another, behind no route, and an id that is free.
const BACKENDS: u32 = 24;
const OTHER: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 77);
const FAR: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 9);

/// Services of every kind that the map can hold, sensible or not, on ports of [`VIP`], [`NODE`] and [`CLUSTER_IP`].
/// Tags of a node on the segment, and of one beyond the router.
const NEAR_TAG: u32 = 0x111;
const FAR_TAG: u32 = 0x222;

fn peers(rig: &Rig) {
    let near = PeerValue {
        mac: [0x0202, 0, 0x1100],
        flags: PEER_TAKES_NEW,
        ifindex: rig.lan,
        node: NEAR_TAG,
        ..PeerValue::default()
    };
    let ipv4 = u32::from_ne_bytes([10, 7, 0, 12]);
    let far = PeerValue { flags: PEER_TAKES_NEW | PEER_BY_ROUTE, node: FAR_TAG, ipv4, ..PeerValue::default() };
    for value in [near, far] {
        rig.maps.put_peer(&PeerKey::of_node(value.node), &value).unwrap();
    }
}

fn generated(numbers: &mut Numbers, services: u16) -> Vec<Op> {
    let mut ops = Vec::new();
    for (n, protocol) in (0..BACKENDS).flat_map(|n| [(n, proto::TCP), (n, proto::UDP)]) {
        let id = FIRST_BACKEND + n * 2 + u32::from(protocol == proto::UDP);
        let (octet, last) = (n % 4, 10 + n as u8);
        let pod = match octet {
            0 => (Ipv4Addr::new(10, 42, 1, last), true),
            1 => (Ipv4Addr::new(10, 42, 2, last), false),
            2 => (Ipv4Addr::new(10, 42, 9, last), false),
            _ => continue,
        };
        let flags = Backend::flags_of(pod.1, if pod.1 { 0 } else { [0, NEAR_TAG, FAR_TAG][n as usize / 4 % 3] });
        ops.push(Op::Backend(id, Backend { flags, ..backend(pod.0, 8000 + last as u16, protocol, pod.1) }));
    }
    let mut slot = FIRST_SLOT;
    for n in 0..services {
        let protocol = if n % 3 == 2 { proto::UDP } else { proto::TCP };
        let count = numbers.below(6);
        let base = slot;
        for _ in 0..count {
            // Some slots are empty, as in the middle of a rewrite.
            let member = FIRST_BACKEND + numbers.below(BACKENDS) * 2 + u32::from(protocol == proto::UDP);
            ops.push(Op::Slot(slot, if numbers.one_in(8) { 0 } else { member }));
            slot += 1;
        }
        let mut flags = FrontendKind::LoadBalancer as u32;
        for (bit, rarity) in [
            (frontend_flags::MAGLEV, 3),
            (frontend_flags::AFFINITY, 3),
            (frontend_flags::SOURCE_RANGES, 3),
            (frontend_flags::SOURCE_RANGES_DENY, 2),
            (frontend_flags::EXTERNAL_LOCAL, 2),
        ] {
            flags |= if numbers.one_in(rarity) { bit } else { 0 };
        }
        flags |= if numbers.one_in(8) { 0 } else { frontend_flags::ROUTABLE };
        flags |= [
            frontend_flags::FORWARDING_SNAT,
            frontend_flags::FORWARDING_L2,
            frontend_flags::FORWARDING_IPIP,
            frontend_flags::FORWARDING_OPT,
        ][numbers.below(4) as usize];
        let service = 100 + u32::from(n);
        if flags & frontend_flags::SOURCE_RANGES != 0 {
            let list = if flags & frontend_flags::SOURCE_RANGES_DENY != 0 { 1 } else { 0 };
            for (network, prefix) in [("192.168.1.0", 26), ("192.168.0.0", 16), ("203.0.113.9", 32), ("0.0.0.0", 0)] {
                if numbers.one_in(3) {
                    let addr = network.parse::<Ipv4Addr>().unwrap().into();
                    let range = SourceRange { service, list, addr };
                    let key = SourceRangeKey { prefix_len: SOURCE_RANGE_BITS + 96 + prefix, range };
                    ops.push(Op::PutSourceRange(key.masked()));
                }
            }
        }
        // A table that is missing, or whose ids are gone, is possible too.
        if flags & frontend_flags::MAGLEV != 0 && count > 0 && !numbers.one_in(4) {
            let members: Vec<u32> = (0..7).map(|_| FIRST_BACKEND + numbers.below(BACKENDS * 2)).collect();
            let of = |i: u32| members[i as usize % members.len()] & !1 | u32::from(protocol == proto::UDP);
            let table: Arc<[u32]> = (0..MAGLEV_TABLE_SIZE).map(of).collect();
            ops.push(Op::PutMaglev(base, table));
        }
        let set = SetRef { base, count };
        let affinity = if flags & frontend_flags::AFFINITY != 0 { 60 } else { 0 };
        let value = FrontendValue { flags, service, affinity, external: set, internal: set };
        let address = [VIP, NODE, VIP][usize::from(n % 3)];
        ops.push(Op::PutFrontend(frontend(address, FIRST_PORT + n, protocol), value));
    }
    ops
}

#[test]
fn what_a_trace_says_is_what_the_programs_do() {
    const SERVICES: u16 = 60;
    isolated(|| {
        let mut numbers = Numbers(7);
        let ops = generated(&mut numbers, SERVICES);
        let mut traced = Traced::new(&ops);
        peers(&traced.rig);
        let clients = [CLIENT, OTHER, FAR, Ipv4Addr::new(0, 0, 0, 5)];
        let (mut verdicts, mut known, mut recent) = (BTreeSet::new(), 0, Vec::new());
        for _ in 0..2500 {
            let protocol = if numbers.one_in(3) { proto::UDP } else { proto::TCP };
            let port = match numbers.below(20) {
                0 => 999,
                1 => TO_LOCAL,
                2 => TO_REMOTE,
                3 => TO_NOBODY,
                4 => TO_ROUTELESS,
                5 => TO_MAGLEV,
                _ => FIRST_PORT + numbers.below(SERVICES.into()) as u16,
            };
            let address = match numbers.below(10) {
                0 => CLUSTER_IP,
                1 => Ipv4Addr::new(10, 9, 9, 9),
                2..=4 => NODE,
                _ => VIP,
            };
            let protocol = match numbers.below(40) {
                0 => proto::ICMP,
                1 => proto::SCTP,
                2 => GRE,
                _ => protocol,
            };
            let client = clients[numbers.below(4) as usize];
            // Few ports, some in the range for translation: connections that are known, and that are in the way.
            let sport = [40_000, 40_001, 61_500, 61_501][numbers.below(4) as usize];
            let mut asked = packet(protocol, (client, sport), (address, port));
            // Every third one belongs to a connection that began before.
            if let Some(again) = recent.get(numbers.below(60) as usize) {
                asked = *again;
            }
            let (said, seen) = traced.agree(&asked);
            if !matches!(seen, Seen::Untouched | Seen::Answered | Seen::Dropped { .. }) {
                recent.push(asked);
                if recent.len() > 20 {
                    recent.remove(0);
                }
            }
            known += usize::from(said.steps.iter().any(|step| matches!(step, Step::Flow { .. })));
            verdicts.insert(match seen {
                Seen::Dropped { reason, told } => format!("dropped {reason} {told}"),
                other => format!("{other:?}").split('(').next().unwrap_or_default().to_owned(),
            });
            if numbers.one_in(40) {
                end_some(&traced.rig, &mut numbers);
            }
        }
        // Each of these was met, or the test has shown less than it claims.
        for reason in [
            DropReason::UnknownL4,
            DropReason::NoBackend,
            DropReason::FibLookupFailed,
            DropReason::IsClusterIp,
            DropReason::SourceRange,
        ] {
            assert!(verdicts.contains(&format!("dropped {} false", reason as u8)), "{reason:?}: {verdicts:?}");
        }
        for verdict in ["Untouched", "Translated", "Sent", "HandedOn", "Wrapped", "Answered", "dropped 158 true"] {
            assert!(verdicts.contains(verdict), "{verdict}: {verdicts:?}");
        }
        assert!(known > 300, "only {known} packets of known connections");
    });
}

/// Ends some connections, ages others, and takes backends away.
fn end_some(rig: &Rig, numbers: &mut Numbers) {
    for (key, mut value) in rig.maps.raw_entries("transient").unwrap() {
        const LAST_SEEN: usize = 0;
        const TCP: usize = 45;
        match numbers.below(6) {
            0 => value[TCP] |= 4,
            1 => value[TCP] |= 3,
            2 => value[LAST_SEEN..8].fill(0),
            _ => continue,
        }
        rig.maps.raw_put("transient", &key, &value).unwrap();
    }
    // Of UDP, so that connections to it are over.
    let gone = FIRST_BACKEND + 1 + 2 * numbers.below(BACKENDS);
    rig.maps.raw_delete("backends", &gone.to_ne_bytes()).unwrap();
}

#[test]
fn chances_are_those_of_the_programs() {
    isolated(|| {
        let mut ops = Vec::new();
        for n in 0..4 {
            ops.push(Op::Backend(200 + n, backend(Ipv4Addr::new(10, 42, 1, 50 + n as u8), 80, proto::TCP, true)));
        }
        // Position 3 leads nowhere: the programs then try the start of the set, so the first has two chances of four.
        for (slot, id) in [(300, 200), (301, 201), (302, 202), (303, 0)] {
            ops.push(Op::Slot(slot, id));
        }
        let value = value(FrontendKind::LoadBalancer, frontend_flags::ROUTABLE, 300, 4);
        ops.push(Op::PutFrontend(frontend(VIP, 2000, proto::TCP), value));
        let mut traced = Traced::new(&ops);
        let mut counts: BTreeMap<IpAddr, u32> = BTreeMap::new();
        let mut said = None;
        for sport in 0..1000 {
            let (trace, seen) = traced.agree(&packet(proto::TCP, (CLIENT, 10_000 + sport), (VIP, 2000)));
            let Seen::Translated(_, to) = seen else { panic!("{seen:?}") };
            *counts.entry(to.ip()).or_default() += 1;
            said = Some(trace);
        }
        let said = said.unwrap();
        assert_eq!(said.ways.len(), 3, "{said:#?}");
        for way in said.ways {
            let seen = counts[&way.backend.unwrap().address.ip()];
            // Five standard deviations of a binomial with 1,000 trials are below 80.
            assert!((f64::from(seen) - way.chance * 1000.0).abs() < 80.0, "{} said, {seen} of 1000 seen", way.chance);
        }
    });
}

#[test]
fn answers_are_traced_on_the_way_that_they_take() {
    isolated(|| {
        let mut traced = Traced::new(&[]);
        for (protocol, sport) in [(proto::TCP, 61_700), (proto::UDP, 61_701)] {
            traced.agree(&packet(protocol, (CLIENT, sport), (VIP, TO_REMOTE)));
            let (said, seen) = traced.agree(&packet(protocol, (REMOTE_POD, 8080), (NODE, sport)));
            assert_eq!(seen, Seen::Sent((VIP, TO_REMOTE).into(), (CLIENT, sport).into()), "{said:#?}");
            traced.agree(&packet(protocol, (CLIENT, sport), (VIP, TO_LOCAL)));
            // Of a local backend: out by egress, and nobody outside may send one.
            let answer = packet(protocol, (LOCAL_POD, 8080), (CLIENT, sport));
            let (_, seen) = traced.agree_at("cil_to_netdev", &answer, Place::Node);
            assert_eq!(seen, Seen::Translated((VIP, TO_LOCAL).into(), (CLIENT, sport).into()));
            let (_, seen) = traced.agree(&answer);
            assert_eq!(seen, Seen::Untouched);
            let (_, seen) =
                traced.agree_at("cil_to_netdev", &packet(protocol, (LOCAL_POD, 9), (CLIENT, 9)), Place::Node);
            assert_eq!(seen, Seen::Untouched);
        }
    });
}

#[test]
fn traces_follow_settings_devices_and_the_kernels_forwarding() {
    isolated(|| {
        let mut traced = Traced::new(&[]);
        let to_remote = |sport| packet(proto::TCP, (CLIENT, sport), (VIP, TO_REMOTE));
        // One port, and then none is left.
        let narrow = kinesin_abi::Settings { snat_min: 61_000, snat_max: 61_000, flags: 0, ..settings() };
        traced.rig.maps.write_settings(&narrow).unwrap();
        let (_, seen) = traced.agree(&to_remote(40_000));
        assert_eq!(seen, Seen::Sent((NODE, 61_000).into(), (REMOTE_POD, 8080).into()));
        let full = Seen::Dropped { reason: DropReason::NoNatMapping as u8, told: false };
        assert_eq!(traced.agree(&to_remote(40_001)).1, full);
        // Nobody is told, and nobody pinged.
        let dropped = |reason: DropReason| Seen::Dropped { reason: reason as u8, told: false };
        let nobody = packet(proto::TCP, (CLIENT, 1), (VIP, TO_NOBODY));
        assert_eq!(traced.agree(&nobody).1, dropped(DropReason::NoBackend));
        let ping = packet(proto::ICMP, (CLIENT, 0), (VIP, 0));
        assert_eq!(traced.agree(&ping).1, dropped(DropReason::UnknownIcmpType));
        let answering = kinesin_abi::Settings { flags: SETTING_ANSWER_PING, ..settings() };
        traced.rig.maps.write_settings(&answering).unwrap();
        assert_eq!(traced.agree(&ping).1, Seen::Answered);
        let cluster_ip = packet(proto::ICMP, (CLIENT, 0), (CLUSTER_IP, 0));
        assert_eq!(traced.agree(&cluster_ip).1, dropped(DropReason::IsClusterIp));
        let own = packet(proto::ICMP, (CLIENT, 0), (NODE, 0));
        assert_eq!(traced.agree(&own).1, Seen::Untouched);
        // A node that is no router sends back to the LAN.
        forwarding(false);
        assert!(matches!(traced.agree(&to_remote(40_002)).1, Seen::Sent(..)));
        forwarding(true);
        // A device without address has none to give.
        traced.rig.maps.put_device(traced.rig.lan, &kinesin_abi::DeviceValue { ipv4: 0, ..device() }).unwrap();
        assert_eq!(traced.agree(&to_remote(40_003)).1, dropped(DropReason::NoNatMapping));
    });
}

#[test]
fn the_place_of_a_client_follows_from_the_routes() {
    isolated(|| {
        let traced = Traced::new(&[]);
        ip("link add pod0 type veth peer name pod1");
        ip("link set pod0 up");
        ip("link set pod1 up");
        ip("route add 10.42.1.5/32 dev pod0");
        // The programs know the addresses of every device, also of those that they are not on.
        traced.rig.maps.put_device(ifindex("pod0"), &device()).unwrap();
        let at = |src: &str, device: &str, hook: &str| {
            let (src, device, hook) = (src.into(), device.into(), hook.into());
            let question = Question { src, dst: format!("{VIP}:80"), proto: String::new(), device, hook };
            let placed = place(&traced.live, &question.parse().map_err(|error| error.to_string())?);
            placed.expect("the kernel answers").map(|(_, place)| place).map_err(|error| error.to_string())
        };
        let lan = Place::Device(traced.rig.lan);
        assert_eq!(at("192.168.1.50", "", ""), Ok(lan));
        assert_eq!(at("203.0.113.9:1234", "", ""), Ok(lan), "by the default route");
        assert_eq!(at("10.42.1.5", "", ""), Ok(Place::Socket { netns: None, host: false }));
        assert_eq!(at("10.42.1.5", "", "packet"), Ok(Place::Node));
        assert_eq!(at("10.42.1.5@lan0", "", ""), Ok(lan), "a spoofed source");
        assert!(matches!(at("192.168.1.10", "", ""), Ok(Place::Socket { host: true, netns: Some(_) })));
        assert!(matches!(at("host", "", ""), Ok(Place::Socket { host: true, netns: Some(_) })));
        for (src, device, hook, says) in [
            ("192.168.1.50", "eth7", "", "--device \"eth7\": this node has no such device"),
            ("192.168.1.50", "", "socket", "not on this node"),
            ("10.42.9.5", "", "", "src 10.42.9.5: no route leads there"),
            ("host", "", "packet", "--hook packet: a packet has a source address"),
            ("host", "lan0", "", "src \"host\": what comes in by a device has an address"),
        ] {
            let error = at(src, device, hook).unwrap_err();
            assert!(error.contains(says), "{error}");
        }
    });
}

#[test]
fn traces_of_sockets_say_what_connecting_does() {
    isolated(|| {
        network();
        let root = BpfRoot::new();
        let mut datapath = kinesin::datapath::Datapath::load(&options(root.path())).unwrap();
        let cgroup = Cgroup::new("trace");
        let hooks: Vec<HookStatus> = datapath.attach_cgroup(cgroup.path());
        let listeners: Vec<TcpListener> =
            (0..3).map(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap()).collect();
        let mut ops = Vec::new();
        for (n, listener) in (0..).zip(&listeners) {
            let port = listener.local_addr().unwrap().port();
            for (first, protocol) in [(1, proto::TCP), (11, proto::UDP)] {
                ops.push(Op::Backend(first + n, backend(Ipv4Addr::LOCALHOST, port, protocol, true)));
                ops.push(Op::Slot(first + n, first + n));
            }
        }
        let sticky = FrontendValue {
            affinity: 60,
            service: 9,
            ..value(FrontendKind::ClusterIp, frontend_flags::AFFINITY, 1, 3)
        };
        for (first, protocol) in [(1, proto::TCP), (11, proto::UDP)] {
            let node_port = value(FrontendKind::NodePort, frontend_flags::ROUTABLE, first, 3);
            ops.push(Op::PutFrontend(frontend(CLUSTER_IP, 80, protocol), value(FrontendKind::ClusterIp, 0, first, 3)));
            ops.push(Op::PutFrontend(frontend(CLUSTER_IP, 81, protocol), value(FrontendKind::ClusterIp, 0, 0, 0)));
            ops.push(Op::PutFrontend(frontend(Ipv4Addr::UNSPECIFIED, 30_080, protocol), node_port));
        }
        ops.push(Op::PutFrontend(frontend(CLUSTER_IP, 82, proto::TCP), sticky));
        let wildcard = value(FrontendKind::ClusterIp, frontend_flags::WILDCARD, 0, 0);
        ops.push(Op::PutFrontend(frontend(CLUSTER_IP, 0, proto::ANY), wildcard));
        let maps = datapath.kernel_maps();
        maps.apply(&ops).unwrap();
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
        let live = Live::open(maps.clone(), hooks, runtime.handle().clone()).unwrap();

        let targets =
            [(CLUSTER_IP, 80), (CLUSTER_IP, 81), (CLUSTER_IP, 82), (CLUSTER_IP, 99), (Ipv4Addr::LOCALHOST, 30_080)];
        for (protocol, (addr, port)) in [proto::TCP, proto::UDP].into_iter().flat_map(|p| targets.map(|t| (p, t))) {
            for round in 0..4 {
                let question = Question {
                    src: "host".into(),
                    dst: format!("{addr}:{port}"),
                    proto: if protocol == proto::TCP { "tcp".into() } else { "udp".into() },
                    ..Question::default()
                };
                let said = kinesin::trace::answer(&live, &question).unwrap();
                let before: BTreeSet<_> = maps.raw_entries("sockets").unwrap().into_iter().map(|(k, _)| k).collect();
                // Whether the system call is refused, the child tells in a file.
                let told = root_file();
                let path = told.path().to_owned();
                cgroup.run(move || {
                    let failed = if protocol == proto::TCP && port != 99 {
                        TcpStream::connect((addr, port)).err()
                    } else {
                        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).map_err(|e| e.to_string())?;
                        socket.connect((addr, port)).err()
                    };
                    let errno = failed.and_then(|error| error.raw_os_error()).unwrap_or(0);
                    std::fs::write(path, errno.to_string()).map_err(|error| error.to_string())
                });
                let errno: i32 = std::fs::read_to_string(told.path()).unwrap().parse().unwrap();
                let entries = maps.raw_entries("sockets").unwrap();
                let new = entries.iter().find(|(key, _)| !before.contains(key));
                let backend = new.map(|(_, value)| u32::from_ne_bytes(value[20..24].try_into().unwrap()));
                let fits = said.ways.iter().any(|way| match &way.verdict {
                    Verdict::Connects { .. } => errno == 0 && backend == way.backend.as_ref().map(|member| member.id),
                    Verdict::Denied { .. } => errno == libc::EPERM && backend.is_none(),
                    _ => errno == 0 && backend.is_none(),
                });
                assert!(fits, "{protocol} {addr}:{port}: errno {errno}, backend {backend:?}\n{said:#?}");
                if port == 82 && protocol == proto::TCP && round > 0 {
                    assert_eq!(said.ways.len(), 1, "bound since the first: {said:#?}");
                }
            }
        }
        let _ = detach_all(root.path());
    });
}

fn root_file() -> tempfile::NamedTempFile {
    tempfile::NamedTempFile::new().expect("a temporary file")
}
