//! Dispatch `ipip`: packets that go on inside another one to a node across routers, and those that come to us so.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use kinesin::datapath::MapStore;
use kinesin_abi::{
    Addr, Backend, Direction, DropReason, FLOW_HANDED_ON, FrontendKind, PEER_BY_ROUTE, PEER_TAKES_NEW, PeerKey,
    PeerValue, frontend_flags, proto,
};
use kinesin_core::plan::Op;

use crate::flows::{entries, forget_all};
use crate::packets::{ACK, FIN, IP, SYN, checksum, ends, ipv4, packet, seal_ip, tcp, udp};
use crate::packets6::{addresses, ends6, hops, ipv6, packet6, tcp6};
use crate::rig::*;

/// Beyond the router that the default route leads to.
pub(crate) const FAR: Ipv4Addr = Ipv4Addr::new(10, 7, 0, 12);
pub(crate) const FAR6: Ipv6Addr = Ipv6Addr::new(0xfd07, 0, 0, 0, 0, 0, 0, 0x12);
const TAG: u32 = 0xabcdef;
pub(crate) const NODE_PORT: u16 = 30_080;
const OUTER: usize = 20;
const OUTER6: usize = 40;

fn peer(rig: &Rig, flags: u16) {
    let value = PeerValue {
        flags: flags | PEER_BY_ROUTE,
        node: TAG,
        ipv4: u32::from_ne_bytes(FAR.octets()),
        ipv6: FAR6.into(),
        ..PeerValue::default()
    };
    for key in [PeerKey::of_node(TAG), PeerKey::of_addr(&FAR.into()), PeerKey::of_addr(&FAR6.into())] {
        rig.maps.put_peer(&key, &value).unwrap();
    }
}

/// A rig of both families whose remote pods are on a node elsewhere, reached by `ipip`.
fn rig() -> Rig {
    rig_by(frontend_flags::FORWARDING_IPIP)
}

/// The same with another way there.
pub(crate) fn rig_by(way: u32) -> Rig {
    let rig = Rig::dual();
    peer(&rig, PEER_TAKES_NEW);
    frontends(&rig, way);
    rig
}

fn frontends(rig: &Rig, way: u32) {
    let mut ops = Vec::new();
    let flags = frontend_flags::ROUTABLE | way;
    for (vip, pods, any, base) in [
        (IpAddr::from(VIP), [IpAddr::from(LOCAL_POD), REMOTE_POD.into()], IpAddr::from(Ipv4Addr::UNSPECIFIED), 0),
        (VIP6.into(), [LOCAL_POD6.into(), REMOTE_POD6.into()], Ipv6Addr::UNSPECIFIED.into(), SIX),
    ] {
        for (protocol, first) in [(proto::TCP, base), (proto::UDP, base + 10)] {
            let remote = Backend { flags: Backend::flags_of(false, TAG), ..backend(pods[1], 8080, protocol, false) };
            ops.push(Op::Backend(first + REMOTE_ID, remote));
            let to_remote = value(FrontendKind::LoadBalancer, flags, first + REMOTE_ID, 1);
            ops.push(Op::PutFrontend(frontend(vip, TO_REMOTE, protocol), to_remote));
            let both = value(FrontendKind::NodePort, frontend_flags::ROUTABLE, first + LOCAL_ID, 1);
            ops.push(Op::PutFrontend(frontend(any, NODE_PORT, protocol), both));
        }
    }
    rig.maps.apply(&ops).unwrap();
}

/// What must leave: to the router's MAC, the outer header, and the client's packet one hop later.
fn wrapped(frame: &[u8]) -> Vec<u8> {
    let mut inner = frame.to_vec();
    inner[IP + 8] -= 1;
    seal_ip(&mut inner);
    let inner = &inner[IP..];
    let mut out = ipv4(NODE, FAR, proto::IPIP, inner);
    out[IP + 4..IP + 8].copy_from_slice(&[0, 0, 0x40, 0]);
    seal_ip(&mut out);
    out
}

fn wrapped6(frame: &[u8]) -> Vec<u8> {
    let mut inner = frame.to_vec();
    inner[IP + 7] -= 1;
    let mut out = ipv6(NODE6, FAR6, proto::IPV6, &inner[IP..]);
    // Traffic class and flow label of the inner header, but for its congestion bits.
    out[IP..IP + 4].copy_from_slice(&[0x60, 0x0a, 0xbc, 0xde]);
    out
}

/// The frame from the IP header on: MACs are written when the kernel has found the next hop.
#[track_caller]
fn assert_sent(seen: (i32, Vec<u8>), expected: &[u8]) {
    assert_eq!((seen.0, &seen.1[IP..]), (REDIRECT, &expected[IP..]));
}

/// As another node sends it to us, from such an address.
fn from(src: Ipv4Addr, inner: &[u8]) -> Vec<u8> {
    ipv4(src, NODE, proto::IPIP, &inner[IP..])
}

fn from6(src: Ipv6Addr, inner: &[u8]) -> Vec<u8> {
    ipv6(src, NODE6, proto::IPV6, &inner[IP..])
}

#[test]
fn a_packet_for_a_pod_elsewhere_goes_on_unchanged_inside_another_and_leaves_one_entry() {
    isolated(|| {
        let mut rig = rig();
        for protocol in [proto::TCP, proto::UDP] {
            let mut frame = packet(protocol, (CLIENT, 40_000), (VIP, TO_REMOTE));
            // A traffic class, which shows outside, with congestion bits, which do not.
            frame[IP + 1] = 0xb9;
            seal_ip(&mut frame);
            let mut expected = wrapped(&frame);
            expected[IP + 1] = 0xb8;
            seal_ip(&mut expected);
            for _ in 0..2 {
                assert_sent(rig.ingress(&frame), &expected);
            }
            let frame = packet6(protocol, (CLIENT6, 40_000), (VIP6, TO_REMOTE), SYN, &[]);
            for _ in 0..2 {
                assert_sent(rig.ingress6(&frame), &wrapped6(&frame));
            }
        }
        let flows = entries(&rig);
        assert_eq!(flows.len(), 4, "the replies do not come by here");
        assert!(flows.iter().all(|(_, flow)| flow.flags & FLOW_HANDED_ON != 0));
    });
}

#[test]
fn what_a_peer_has_wrapped_goes_to_a_pod_here_and_is_answered_as_the_service() {
    isolated(|| {
        let mut rig = rig();
        for protocol in [proto::TCP, proto::UDP] {
            let client = (CLIENT, 40_000);
            let (code, out) = rig.ingress(&from(FAR, &packet(protocol, client, (VIP, TO_LOCAL))));
            assert_eq!((code, ends(&out)), (NEXT, (client, (LOCAL_POD, 8080))));
            let reply = match protocol {
                proto::TCP => tcp((LOCAL_POD, 8080), client, SYN | ACK),
                _ => udp((LOCAL_POD, 8080), client, b"answer"),
            };
            assert_eq!(ends(&rig.egress(&reply).1), ((VIP, TO_LOCAL), client));

            let client = (CLIENT6, 40_000);
            let (code, out) = rig.ingress6(&from6(FAR6, &packet6(protocol, client, (VIP6, TO_LOCAL), SYN, &[])));
            assert_eq!((code, ends6(&out)), (NEXT, (client, (LOCAL_POD6, 8080))));
            let reply = packet6(protocol, (LOCAL_POD6, 8080), client, SYN | ACK, &[]);
            assert_eq!(ends6(&rig.egress6(&reply).1), ((VIP6, TO_LOCAL), client));
        }
        // What follows on the same connection.
        let (code, out) = rig.ingress(&from(FAR, &tcp((CLIENT, 40_000), (VIP, TO_LOCAL), FIN | ACK)));
        assert_eq!((code, ends(&out)), (NEXT, ((CLIENT, 40_000), (LOCAL_POD, 8080))));
    });
}

#[test]
fn node_ports_are_taken_for_the_address_of_the_node_that_wrapped_them() {
    isolated(|| {
        let mut rig = rig();
        for protocol in [proto::TCP, proto::UDP] {
            let (code, out) = rig.ingress(&from(FAR, &packet(protocol, (CLIENT, 40_000), (FAR, NODE_PORT))));
            assert_eq!((code, ends(&out)), (NEXT, ((CLIENT, 40_000), (LOCAL_POD, 8080))));
            let inner = packet6(protocol, (CLIENT6, 40_000), (FAR6, NODE_PORT), SYN, &[]);
            let (code, out) = rig.ingress6(&from6(FAR6, &inner));
            assert_eq!((code, ends6(&out)), (NEXT, ((CLIENT6, 40_000), (LOCAL_POD6, 8080))));
        }
        let other = Ipv4Addr::new(10, 7, 0, 13);
        rig.assert_dropped(&from(FAR, &tcp((CLIENT, 40_000), (other, NODE_PORT), SYN)), DropReason::Encapsulated);
    });
}

#[test]
fn what_a_stranger_has_wrapped_or_is_not_for_this_node_is_the_hosts_own_business() {
    isolated(|| {
        let mut rig = rig();
        let inner = tcp((CLIENT, 40_000), (VIP, TO_LOCAL), SYN);
        let inner6 = tcp6((CLIENT6, 40_000), (VIP6, TO_LOCAL), SYN);
        rig.assert_untouched(&from(Ipv4Addr::new(10, 7, 0, 13), &inner));
        rig.assert_untouched(&from6(Ipv6Addr::new(0xfd07, 0, 0, 0, 0, 0, 0, 0x13), &inner6));
        // Between others.
        rig.assert_untouched(&ipv4(FAR, Ipv4Addr::new(192, 168, 1, 12), proto::IPIP, &inner[IP..]));
        rig.assert_untouched(&ipv6(FAR6, Ipv6Addr::new(0xfd00, 1, 0, 0, 0, 0, 0, 9), proto::IPV6, &inner6[IP..]));
        // A fragment of an outer packet.
        let mut piece = from(FAR, &inner);
        piece[IP + 6] = 0x20;
        seal_ip(&mut piece);
        rig.assert_untouched(&piece);
        // One family inside the other.
        rig.assert_untouched(&ipv4(FAR, NODE, proto::IPV6, &inner6[IP..]));
        assert_eq!(entries(&rig), []);
    });
}

#[test]
fn what_is_inside_gets_to_services_and_nowhere_else() {
    isolated(|| {
        let mut rig = rig();
        for to in [(NODE, 22), (LOCAL_POD, 8080), (Ipv4Addr::new(8, 8, 8, 8), 53)] {
            rig.assert_dropped(&from(FAR, &tcp((CLIENT, 40_000), to, SYN)), DropReason::Encapsulated);
        }
        for to in [(NODE6, 22), (LOCAL_POD6, 8080)] {
            rig.assert_dropped(&from6(FAR6, &tcp6((CLIENT6, 40_000), to, SYN)), DropReason::Encapsulated);
        }
        rig.assert_dropped(&from(FAR, &tcp((CLIENT, 40_000), (VIP, 7), SYN)), DropReason::NoBackend);
        // A packet in a packet in a packet.
        let twice = from(FAR, &from(FAR, &tcp((CLIENT, 40_000), (VIP, TO_LOCAL), SYN)));
        rig.assert_dropped(&twice, DropReason::Encapsulated);
    });
}

#[test]
fn what_came_wrapped_is_never_wrapped_again() {
    isolated(|| {
        let mut rig = rig();
        // No backend here: on with this node's address.
        let client = (CLIENT, 40_000);
        let (code, out) = rig.ingress(&from(FAR, &tcp(client, (VIP, TO_REMOTE), SYN)));
        let (src, dst) = ends(&out);
        assert_eq!((code, src.0, dst), (REDIRECT, NODE, (REMOTE_POD, 8080)));
        let (code, out) = rig.ingress6(&from6(FAR6, &tcp6((CLIENT6, 40_000), (VIP6, TO_REMOTE), SYN)));
        assert_eq!((code, ends6(&out).0.0), (REDIRECT, NODE6));
        forget_all(&rig);
        // A connection that this node had given away itself, when the address was its own.
        let first = tcp(client, (VIP, TO_REMOTE), SYN);
        assert_sent(rig.ingress(&first), &wrapped(&first));
        let (code, out) = rig.ingress(&from(FAR, &tcp(client, (VIP, TO_REMOTE), ACK)));
        assert_eq!((code, ends(&out).0.0), (REDIRECT, NODE));
    });
}

#[test]
fn where_no_wrapped_packet_goes_the_nodes_own_address_goes() {
    isolated(|| {
        let mut rig = rig();
        let assert_snat = |rig: &mut Rig, why: &str| {
            let (code, out) = rig.ingress(&tcp((CLIENT, 40_000), (VIP, TO_REMOTE), SYN));
            assert_eq!((code, ends(&out).0.0), (REDIRECT, NODE), "{why}");
            let (code, out) = rig.ingress6(&tcp6((CLIENT6, 40_000), (VIP6, TO_REMOTE), SYN));
            assert_eq!((code, ends6(&out).0.0), (REDIRECT, NODE6), "{why}");
            forget_all(rig);
        };
        // A known connection stays with a node that takes no new ones.
        let old = tcp((CLIENT, 39_999), (VIP, TO_REMOTE), SYN);
        assert_sent(rig.ingress(&old), &wrapped(&old));
        peer(&rig, 0);
        let more = tcp((CLIENT, 39_999), (VIP, TO_REMOTE), ACK);
        assert_sent(rig.ingress(&more), &wrapped(&more));
        assert_snat(&mut rig, "it takes nothing new");
        peer(&rig, PEER_TAKES_NEW);
        frontends(&rig, frontend_flags::FORWARDING_L2);
        assert_snat(&mut rig, "the service's way leads to neighbours only");
        frontends(&rig, frontend_flags::FORWARDING_IPIP);
        ip("route add unreachable 10.7.0.0/16");
        ip("route add unreachable fd07::/16");
        assert_snat(&mut rig, "there is no route");
        ip("route del unreachable 10.7.0.0/16");
        ip("route del unreachable fd07::/16");
        let value = PeerValue { flags: PEER_TAKES_NEW | PEER_BY_ROUTE, node: TAG, ..PeerValue::default() };
        rig.maps.put_peer(&PeerKey::of_node(TAG), &value).unwrap();
        assert_snat(&mut rig, "it has no address");
    });
}

#[test]
fn hops_run_out_and_what_does_not_fit_is_reported_with_the_mtu_that_does() {
    isolated(|| {
        let mut rig = rig();
        let mut last = tcp((CLIENT, 40_000), (VIP, TO_REMOTE), SYN);
        last[IP + 8] = 1;
        seal_ip(&mut last);
        let before = rig.dropped(DropReason::TtlExceeded, Direction::Ingress);
        rig.ingress(&last);
        assert_eq!(rig.dropped(DropReason::TtlExceeded, Direction::Ingress), before + 1);
        assert_eq!(entries(&rig), []);

        ip("route add 10.7.0.0/16 via 192.168.1.11 mtu lock 1400");
        ip("route add fd07::/16 via fd00:1::11 mtu lock 1400");
        let long = |len: usize, whole: bool| {
            let mut frame = udp((CLIENT, 40_000), (VIP, TO_REMOTE), &vec![7; len - 28]);
            frame[IP + 6] = if whole { 0x40 } else { 0 };
            seal_ip(&mut frame);
            frame
        };
        // The longest that fits goes; one byte more is told the MTU without the outer header.
        let fits = long(1380, true);
        assert_sent(rig.ingress(&fits), &wrapped(&fits));
        let (code, error) = rig.ingress(&long(1381, true));
        assert_eq!(
            (code, &error[IP + 20..IP + 22], &error[IP + 26..IP + 28]),
            (REDIRECT, &[3, 4][..], &1380u16.to_be_bytes()[..])
        );
        assert_eq!(checksum(&error[IP + 20..]), 0);
        // What may be fragmented goes with this node's address, which the way to the pod takes.
        let (code, out) = rig.ingress(&long(1381, false));
        assert_eq!((code, ends(&out).0.0, ends(&out).1), (REDIRECT, NODE, (REMOTE_POD, 8080)));

        let datagram = |len: usize| {
            ipv6(CLIENT6, VIP6, proto::UDP, &crate::packets6::datagram(40_000, TO_REMOTE, &vec![7; len - 48]))
        };
        let fits = datagram(1360);
        assert_sent(rig.ingress6(&fits), &wrapped6(&fits));
        let (code, error) = rig.ingress6(&datagram(1361));
        assert_eq!(
            (code, &error[IP + 40..IP + 42], &error[IP + 44..IP + 48]),
            (REDIRECT, &[2, 0][..], &1360u32.to_be_bytes()[..])
        );
        assert_eq!((addresses(&error), hops(&error)), ((VIP6, CLIENT6), 64));
    });
}

#[test]
fn errors_about_wrapped_connections_follow_them_and_are_taken_there() {
    isolated(|| {
        let mut rig = rig();
        // From a router on the way back: it quotes the reply.
        let error = |port: u16| {
            let mut message = vec![3, 4, 0, 0, 0, 0, 5, 0];
            message.extend(&tcp((VIP, port), (CLIENT, 40_000), SYN | ACK)[IP..]);
            let check = checksum(&message);
            message[2..4].copy_from_slice(&check.to_be_bytes());
            ipv4(Ipv4Addr::new(192, 168, 1, 1), VIP, proto::ICMP, &message)
        };
        rig.ingress(&tcp((CLIENT, 40_000), (VIP, TO_REMOTE), SYN));
        assert_sent(rig.ingress(&error(TO_REMOTE)), &wrapped(&error(TO_REMOTE)));
        rig.ingress(&from(FAR, &tcp((CLIENT, 40_000), (VIP, TO_LOCAL), SYN)));
        let (code, out) = rig.ingress(&from(FAR, &error(TO_LOCAL)));
        assert_eq!(
            (code, &out[IP + 16..IP + 20]),
            (NEXT, &LOCAL_POD.octets()[..]),
            "to the pod whose packet it quotes"
        );
        assert_eq!(OUTER6 - OUTER, out.len() - error(TO_LOCAL).len() + 20, "the outer header is off");
    });
}

/// The address that a key by address stands for must be the sender's own.
#[test]
fn an_address_that_shares_its_key_with_a_peers_is_a_strangers() {
    isolated(|| {
        let mut rig = rig();
        // Folding keeps the last word apart from the second, so that swapping bits between them gives the same key.
        let Addr { words: [a, b, c, d] } = FAR6.into();
        let twin = Addr { words: [a, b ^ 1, c, d ^ 1u32.rotate_left(13)] };
        assert_eq!(PeerKey::of_addr(&twin), PeerKey::of_addr(&FAR6.into()));
        let IpAddr::V6(twin) = twin.into() else { panic!("IPv6") };
        rig.assert_untouched(&from6(twin, &tcp6((CLIENT6, 40_000), (VIP6, TO_LOCAL), SYN)));
    });
}
