//! Packets in the driver: what is sent on from there, exactly as tc would send it, and all that is left to tc.

use std::net::{IpAddr, Ipv4Addr};

use kinesin::datapath::{Acceleration, MapStore};
use kinesin_abi::{
    Addr, Backend, DEVICE_ETHERNET, DEVICE_XDP, DeviceValue, Direction, FrontendKind, PEER_TAKES_NEW, PeerKey,
    PeerValue, TCP_SEEN_FIN, frontend_flags, mac_words, proto,
};
use kinesin_core::plan::Op;

use crate::dispatch::{self, PEER_MAC, TAG, handed_on};
use crate::flows::decode;
use crate::packets::{ACK, End, FIN, IP, L4, SYN, association, ends, ipv4, packet, seal, seal_ip, tcp, udp};
use crate::packets6::{self, End6, ends6, padding, tcp6, udp6, with_hops};
use crate::rig::*;

/// Codes of the XDP hook.
const PASS: u32 = 2;
const TX: u32 = 3;
const TO_ANOTHER: u32 = 4;

/// A rig whose LAN device runs the program.
fn driving(mut rig: Rig) -> Rig {
    rig.datapath.accelerate(Acceleration::Native);
    let lan = rig.lan;
    let hooks = rig.datapath.attach_device(LAN, lan).unwrap();
    assert_eq!(hooks.xdp.map(|hook| hook.error), Some(None));
    rig
}

/// The frame that has these MACs.
fn with_macs(mut frame: Vec<u8>, dst: [u8; 6], src: [u8; 6]) -> Vec<u8> {
    frame[..6].copy_from_slice(&dst);
    frame[6..12].copy_from_slice(&src);
    frame
}

/// The driver sends what tc sends, with the MACs that the neighbour's entry gives it there.
#[track_caller]
fn assert_as_tc(rig: &mut Rig, frame: &[u8], to: [u8; 6]) -> Vec<u8> {
    let v6 = frame[12..14] == [0x86, 0xdd];
    let (code, by_tc) = if v6 { rig.ingress6(frame) } else { rig.ingress(frame) };
    assert_eq!(code, REDIRECT);
    let before = rig.maps.accelerated().unwrap();
    let (code, out) = rig.driver(frame);
    assert_eq!((code, &out), (TX, &with_macs(by_tc, to, NODE_MAC)));
    let after = rig.maps.accelerated().unwrap();
    assert_eq!((after.packets, after.bytes), (before.packets + 1, before.bytes + frame.len() as u64));
    out
}

/// The driver leaves a frame as it is, to whoever comes next.
#[track_caller]
fn assert_passed(rig: &mut Rig, frame: &[u8], why: &str) {
    let before = rig.maps.accelerated().unwrap();
    assert_eq!(rig.driver(frame), (PASS, frame.to_vec()), "{why}");
    assert_eq!(rig.maps.accelerated().unwrap(), before, "{why}: not counted");
}

const HERE: End = (CLIENT, 40_000);
const HERE6: End6 = (CLIENT6, 40_000);
const THERE: End = (VIP, TO_REMOTE);
const THERE6: End6 = (VIP6, TO_REMOTE);

/// A segment of data. (Those without any are no different, but this is what most are.)
fn data(from: End, to: End) -> Vec<u8> {
    let mut segment = tcp(from, to, ACK)[L4..].to_vec();
    segment.extend(*b"GET / HTTP/1.1\r\n\r\n");
    ipv4(from.0, to.0, proto::TCP, &segment)
}

/// Opens a connection to a pod elsewhere by tc, up to the point at which there is nothing new about it; what the pod sees.
fn opened(rig: &mut Rig) -> End {
    let (_, syn) = rig.ingress(&tcp(HERE, THERE, SYN));
    let (source, backend) = ends(&syn);
    rig.ingress(&tcp(backend, source, SYN | ACK));
    rig.ingress(&tcp(HERE, THERE, ACK));
    source
}

#[test]
fn translated_packets_are_sent_both_ways_as_tc_sends_them() {
    isolated(|| {
        let mut rig = driving(Rig::new());
        assert_passed(&mut rig, &tcp(HERE, THERE, SYN), "a new connection");
        let source = opened(&mut rig);
        let backend = (REMOTE_POD, 8080);
        let out = assert_as_tc(&mut rig, &data(HERE, THERE), PEER_MAC);
        assert_eq!(ends(&out), (source, backend));
        let out = assert_as_tc(&mut rig, &data(backend, source), CLIENT_MAC);
        assert_eq!(ends(&out), (THERE, HERE));
        let forwarded = rig.maps.forwarded().unwrap()[0].1.packets;
        assert_eq!(forwarded, 3 + 2 * 2, "what the driver sends is counted with the rest, once");
    });
}

#[test]
fn translated_packets_of_ipv6_are_sent_both_ways_as_tc_sends_them() {
    isolated(|| {
        let mut rig = driving(Rig::dual());
        let (_, syn) = rig.ingress6(&tcp6(HERE6, THERE6, SYN));
        let (source, backend) = ends6(&syn);
        rig.ingress6(&tcp6(backend, source, SYN | ACK));
        rig.ingress6(&tcp6(HERE6, THERE6, ACK));
        let out = assert_as_tc(&mut rig, &tcp6(HERE6, THERE6, ACK), PEER_MAC);
        assert_eq!(ends6(&out), (source, backend));
        let out = assert_as_tc(&mut rig, &tcp6(backend, source, ACK), CLIENT_MAC);
        assert_eq!(ends6(&out), (THERE6, HERE6));
        // UDP, whose checksum is never absent.
        let (_, first) = rig.ingress6(&udp6(HERE6, THERE6, b"hello"));
        let out = assert_as_tc(&mut rig, &udp6(HERE6, THERE6, b"hello"), PEER_MAC);
        assert_eq!(ends6(&out), ends6(&first));
        let with_options = packets6::packet6(proto::TCP, HERE6, THERE6, ACK, &[padding(packets6::OPTIONS, 1)]);
        assert_passed(&mut rig, &with_options, "extension headers");
        assert_passed(&mut rig, &with_hops(tcp6(HERE6, THERE6, ACK), 1), "the last hop");
    });
}

#[test]
fn checksums_are_right_whatever_they_sum_up() {
    isolated(|| {
        let mut rig = driving(Rig::new());
        rig.ingress(&udp(HERE, THERE, b"first"));
        let after = |out: &[u8]| u16::from_be_bytes([out[L4 + 6], out[L4 + 7]]);
        let of_nothing = after(&rig.driver(&udp(HERE, THERE, &[0, 0])).1);
        // Each payload another sum, and the one whose sum comes out as zero, which UDP cannot say.
        for word in (1..u16::MAX).step_by(997).chain([of_nothing]) {
            let frame = udp(HERE, THERE, &word.to_be_bytes());
            let (code, out) = rig.driver(&frame);
            // A sum that looks like one that a device has yet to fill in is left to tc, which can tell.
            if code == PASS {
                continue;
            }
            assert_eq!(code, TX, "{word}");
            ends(&out);
            assert_eq!(after(&out) == 0xffff, word == of_nothing, "{word}");
        }
        let mut without = udp(HERE, THERE, b"no checksum");
        without[L4 + 6..L4 + 8].fill(0);
        let out = assert_as_tc(&mut rig, &without, PEER_MAC);
        assert_eq!(out[L4 + 6..L4 + 8], [0, 0], "it has none after it either");
    });
}

#[test]
fn frames_are_handed_on_as_tc_hands_them_on() {
    isolated(|| {
        let mut rig = driving(dispatch::rig());
        for protocol in [proto::TCP, proto::UDP] {
            let first = packet(protocol, HERE, THERE);
            assert_passed(&mut rig, &first, "a new connection");
            assert_eq!(rig.ingress(&first), (REDIRECT, handed_on(&first)));
            let next = if protocol == proto::TCP { tcp(HERE, THERE, ACK) } else { first };
            assert_eq!(rig.driver(&next), (TX, handed_on(&next)));
        }
        let fin = tcp(HERE, THERE, FIN | ACK);
        assert_eq!(rig.driver(&fin), (TX, handed_on(&fin)));
        let seen = ["flows", "transient"].iter().any(|table| {
            let entries = rig.maps.raw_entries(table).unwrap();
            entries.iter().any(|(key, value)| decode(key, value).1.tcp & TCP_SEEN_FIN != 0)
        });
        assert!(seen, "the driver notes the end");
    });
}

#[test]
fn frames_of_ipv6_are_handed_on_as_tc_hands_them_on() {
    isolated(|| {
        let rig = Rig::dual();
        dispatch::peer(&rig, PEER_TAKES_NEW);
        let flags = frontend_flags::ROUTABLE | frontend_flags::FORWARDING_L2;
        let id = SIX + REMOTE_ID;
        let remote = Backend { flags: Backend::flags_of(false, TAG), ..backend(REMOTE_POD6, 8080, proto::TCP, false) };
        let there = frontend(IpAddr::from(VIP6), TO_REMOTE, proto::TCP);
        let value = value(FrontendKind::LoadBalancer, flags, id, 1);
        rig.maps.apply(&[Op::Backend(id, remote), Op::PutFrontend(there, value)]).unwrap();
        let mut rig = driving(rig);
        let expected = |frame: &[u8]| with_macs(with_hops(frame.to_vec(), 63), PEER_MAC, NODE_MAC);
        let syn = tcp6(HERE6, THERE6, SYN);
        assert_passed(&mut rig, &syn, "a new connection");
        assert_eq!(rig.ingress6(&syn), (REDIRECT, expected(&syn)));
        let next = tcp6(HERE6, THERE6, ACK);
        assert_eq!(rig.driver(&next), (TX, expected(&next)));
    });
}

#[test]
fn what_is_rare_is_left_to_tc_as_it_is() {
    isolated(|| {
        let mut rig = driving(Rig::new());
        opened(&mut rig);
        let known = data(HERE, THERE);
        assert_eq!(rig.driver(&known).0, TX);
        let mut with = |why: &str, change: &dyn Fn(&mut Vec<u8>)| {
            let mut frame = known.clone();
            change(&mut frame);
            assert_passed(&mut rig, &frame, why);
        };
        with("for another MAC", &|frame| frame[5] ^= 1);
        with("a VLAN tag", &|frame| {
            frame.splice(12..12, [0x81, 0, 0, 7]);
        });
        with("the last hop", &|frame| {
            frame[IP + 8] = 1;
            seal_ip(frame);
        });
        with("the first fragment", &|frame| {
            frame[IP + 6] = 0x20;
            seal_ip(frame);
        });
        with("a later fragment", &|frame| {
            frame[IP + 7] = 4;
            seal_ip(frame);
        });
        with("IP options", &|frame| {
            frame[IP] = 0x46;
            frame.splice(L4..L4, [1, 1, 1, 0]);
            let len = (frame.len() - IP) as u16;
            frame[IP + 2..IP + 4].copy_from_slice(&len.to_be_bytes());
            seal_ip(frame);
        });
        with("a checksum that is still to be filled in", &|frame| {
            seal(frame);
            let segment = frame.len() - L4;
            let mut sum = u32::from(proto::TCP) + segment as u32;
            for pair in frame[IP + 12..IP + 20].chunks(2) {
                sum += u32::from(u16::from_be_bytes([pair[0], pair[1]]));
            }
            let sum = ((sum >> 16) + (sum & 0xffff)) as u16;
            frame[L4 + 16..L4 + 18].copy_from_slice(&sum.to_be_bytes());
        });
        with("cut short", &|frame| frame.truncate(L4 + 10));
        with("no more than a header", &|frame| frame.truncate(14));
        with("not IP", &|frame| frame[13] = 6);
        for (frame, why) in [
            (tcp(HERE, THERE, FIN | ACK), "its end, which is to be noted"),
            (tcp((CLIENT, 40_001), THERE, ACK), "an unknown connection"),
            (ipv4(CLIENT, VIP, proto::ICMP, &[8, 0, 0xf7, 0xfd, 0, 1, 0, 1]), "ICMP"),
            (ipv4(CLIENT, VIP, proto::SCTP, &association(40_000, TO_REMOTE, 1)), "SCTP"),
        ] {
            assert_passed(&mut rig, &frame, why);
        }
        // A pod of this node, whose packets the stack delivers.
        rig.ingress(&tcp(HERE, (VIP, TO_LOCAL), SYN));
        assert_passed(&mut rig, &tcp(HERE, (VIP, TO_LOCAL), ACK), "a local backend");
    });
}

/// Changes what the tables say of the connection from [`HERE`] to [`THERE`].
fn alter(rig: &Rig, change: impl Fn(&mut kinesin_abi::FlowValue)) {
    let entries = ["flows", "transient"].map(|table| (table, rig.maps.raw_entries(table).unwrap()));
    let mut altered = 0;
    for (table, (key, value)) in entries.iter().flat_map(|(table, all)| all.iter().map(move |entry| (*table, entry))) {
        let (flow_key, mut flow) = decode(key, value);
        if flow_key.dst == Addr::from(VIP) {
            change(&mut flow);
            // SAFETY: plain integers without padding.
            let bytes = unsafe { std::slice::from_raw_parts((&raw const flow).cast::<u8>(), size_of_val(&flow)) };
            rig.maps.raw_put(table, key, bytes).unwrap();
            altered += 1;
        }
    }
    assert!(altered > 0);
}

#[test]
fn what_the_routes_do_not_give_is_left_to_tc() {
    isolated(|| {
        let mut rig = driving(Rig::new());
        opened(&mut rig);
        let known = data(HERE, THERE);
        let mut long = tcp(HERE, THERE, ACK)[L4..].to_vec();
        long.resize(1600, 7);
        assert_passed(&mut rig, &ipv4(CLIENT, VIP, proto::TCP, &long), "too long for the way");
        ip("neigh del 192.168.1.11 dev lan0");
        assert_passed(&mut rig, &known, "a neighbour that is not known");
        ip("neigh add 192.168.1.11 lladdr 02:00:00:00:00:11 dev lan0");
        forwarding(false);
        assert_passed(&mut rig, &known, "no forwarding");
        forwarding(true);
        assert_eq!(rig.driver(&known).0, TX);
        // Once a second tc has a look, so that the neighbour's entry stays fresh.
        alter(&rig, |flow| flow.last_seen = 1);
        assert_passed(&mut rig, &known, "not seen for a second");
        assert_eq!(rig.ingress(&known).0, REDIRECT);
        assert_eq!(rig.driver(&known).0, TX);
        alter(&rig, |flow| flow.flags |= 0x80);
        assert_passed(&mut rig, &known, "a flag that only tc knows");
    });
}

#[test]
fn another_device_gets_packets_while_its_driver_takes_them() {
    isolated(|| {
        let mut rig = driving(Rig::new());
        ip("link add wan0 address 02:00:00:00:00:20 type veth peer name wan1");
        ip("link set wan0 up");
        ip("link set wan1 up");
        ip("addr add 192.168.2.10/24 dev wan0");
        ip("neigh add 192.168.2.11 lladdr 02:00:00:00:00:21 dev wan0");
        ip("route replace 10.42.2.0/24 via 192.168.2.11");
        let wan = DeviceValue { flags: DEVICE_ETHERNET, ..device() };
        let index = ifindex("wan0");
        rig.maps.put_device(index, &wan).unwrap();
        opened(&mut rig);
        let known = data(HERE, THERE);
        assert_passed(&mut rig, &known, "its driver runs no program");
        rig.maps.put_device(index, &DeviceValue { flags: DEVICE_ETHERNET | DEVICE_XDP, ..wan }).unwrap();
        let (code, out) = rig.driver(&known);
        assert_eq!(code, TO_ANOTHER);
        assert_eq!((&out[..6], &out[6..12]), (&[2, 0, 0, 0, 0, 0x21][..], &[2, 0, 0, 0, 0, 0x20][..]));
        assert_eq!(ends(&out).1, (REMOTE_POD, 8080));
    });
}

#[test]
fn peers_that_cannot_be_handed_frames_to_are_left_to_tc() {
    isolated(|| {
        let mut rig = driving(dispatch::rig());
        rig.ingress(&tcp(HERE, THERE, SYN));
        let known = tcp(HERE, THERE, ACK);
        rig.ingress(&known);
        assert_eq!(rig.driver(&known), (TX, handed_on(&known)));
        assert_passed(&mut rig, &with_macs(known.clone(), NODE_MAC, PEER_MAC), "back where it comes from");
        let put = |rig: &Rig, flags, ifindex| {
            let ipv4 = u32::from_ne_bytes(Ipv4Addr::new(192, 168, 1, 11).octets());
            let mac = mac_words(PEER_MAC);
            let value = PeerValue { mac, flags, ifindex, node: TAG, ipv4, ipv6: Addr::UNSPECIFIED };
            rig.maps.put_peer(&PeerKey::of_node(TAG), &value).unwrap();
        };
        let lan = rig.lan;
        put(&rig, 0, lan);
        assert_eq!(rig.driver(&known), (TX, handed_on(&known)), "it keeps what it has");
        put(&rig, PEER_TAKES_NEW | 0x8000, lan);
        assert_passed(&mut rig, &known, "a way that only tc knows");
        put(&rig, PEER_TAKES_NEW, lan + 1);
        assert_passed(&mut rig, &known, "another segment");
        rig.maps.delete_peer(&PeerKey::of_node(TAG)).unwrap();
        assert_passed(&mut rig, &known, "gone");
        assert_eq!(rig.maps.drops().unwrap().iter().filter(|(_, way, _)| *way == Direction::Ingress).count(), 0);
    });
}
