//! Dispatch `opt`: packets that go to backends elsewhere with the client's address and say which service they are for, and
//! those that come to us so.

use std::net::{Ipv4Addr, Ipv6Addr};

use kinesin_abi::{DropReason, FLOW_DIRECT, FLOW_HANDED_ON, FLOW_REDIRECT, frontend_flags, proto, tcp_established};

use crate::flows::{count, entries, forget_all};
use crate::packets::{ACK, FIN, IP, SYN, checksum, ends, ipv4, packet, seal_ip, tcp, ttl, udp};
use crate::packets6::{L4 as L4_6, ends_behind, ends6, hops, packet6, padding, tcp6};
use crate::rig::*;
use crate::wrap::{FAR, FAR6, NODE_PORT, rig_by};

const LEN: usize = 8;
const LEN6: usize = 24;

fn rig() -> Rig {
    rig_by(frontend_flags::FORWARDING_OPT)
}

/// The option, by RFC 791 section 3.1 and Cilium's number.
fn option(addr: Ipv4Addr, port: u16) -> Vec<u8> {
    [&[0x9a, 8][..], &port.to_be_bytes(), &addr.octets()].concat()
}

/// The extension header, by RFC 8200 section 4.6 and Cilium's number.
fn option6(next: u8, addr: Ipv6Addr, port: u16) -> Vec<u8> {
    [&[next, 2, 0x1b, 20][..], &addr.octets(), &port.to_be_bytes(), &[0, 0]].concat()
}

/// A frame with an option, as the other node sends it.
fn with_option(frame: &[u8], addr: Ipv4Addr, port: u16) -> Vec<u8> {
    let mut out = frame.to_vec();
    out[IP] = 0x47;
    let len = u16::from_be_bytes([out[IP + 2], out[IP + 3]]) + LEN as u16;
    out[IP + 2..IP + 4].copy_from_slice(&len.to_be_bytes());
    out.splice(IP + 20..IP + 20, option(addr, port));
    seal_ip(&mut out);
    out
}

fn with_option6(frame: &[u8], addr: Ipv6Addr, port: u16) -> Vec<u8> {
    let mut out = frame.to_vec();
    let len = u16::from_be_bytes([out[IP + 4], out[IP + 5]]) + LEN6 as u16;
    out[IP + 4..IP + 6].copy_from_slice(&len.to_be_bytes());
    out.splice(L4_6..L4_6, option6(frame[IP + 6], addr, port));
    out[IP + 6] = 60;
    out
}

#[test]
fn the_first_packet_to_a_backend_elsewhere_says_which_service_it_is_for() {
    isolated(|| {
        let mut rig = rig();
        let (client, client6) = ((CLIENT, 40_000), (CLIENT6, 40_000));
        for protocol in [proto::TCP, proto::UDP] {
            // Each one: of TCP it is the first one that is sent again.
            for _ in 0..2 {
                let (code, out) = rig.ingress(&packet(protocol, client, (VIP, TO_REMOTE)));
                let mut expected = packet(protocol, client, (REMOTE_POD, 8080));
                expected[IP + 8] -= 1;
                assert_eq!((code, &out[IP..]), (REDIRECT, &with_option(&expected, VIP, TO_REMOTE)[IP..]));

                let (code, out) = rig.ingress6(&packet6(protocol, client6, (VIP6, TO_REMOTE), SYN, &[]));
                let mut expected = packet6(protocol, client6, (REMOTE_POD6, 8080), SYN, &[]);
                expected[IP + 7] -= 1;
                assert_eq!((code, &out[IP..]), (REDIRECT, &with_option6(&expected, VIP6, TO_REMOTE)[IP..]));
                assert_eq!(ends_behind(&out, protocol, LEN6), (client6, (REMOTE_POD6, 8080)));
            }
        }
        // What follows says nothing.
        let (code, out) = rig.ingress(&tcp(client, (VIP, TO_REMOTE), ACK));
        assert_eq!((code, ends(&out), ttl(&out)), (REDIRECT, (client, (REMOTE_POD, 8080)), 63));
        let (code, out) = rig.ingress6(&tcp6(client6, (VIP6, TO_REMOTE), ACK));
        assert_eq!((code, ends6(&out), hops(&out)), (REDIRECT, (client6, (REMOTE_POD6, 8080)), 63));
        let flows = entries(&rig);
        let way = FLOW_HANDED_ON | FLOW_REDIRECT;
        assert!(flows.iter().all(|(key, flow)| flow.flags & way == way && key.dst != REMOTE_POD.into()), "{flows:?}");
        // The client's end is all that this node sees.
        rig.ingress(&tcp(client, (VIP, TO_REMOTE), FIN | ACK));
        let over = entries(&rig).into_iter().filter(|(_, flow)| flow.is_over()).count();
        assert!(over >= 1);
    });
}

#[test]
fn what_says_its_service_is_noted_and_answered_as_that_service() {
    isolated(|| {
        let mut rig = rig();
        let (client, client6) = ((CLIENT, 40_000), (CLIENT6, 40_000));
        let (pod, pod6) = ((LOCAL_POD, 8080), (LOCAL_POD6, 8080));
        for protocol in [proto::TCP, proto::UDP] {
            // Sent twice, for what is known loses its option too.
            for _ in 0..2 {
                let plain = packet(protocol, client, pod);
                assert_eq!(rig.ingress(&with_option(&plain, VIP, TO_LOCAL)), (NEXT, plain));
                let plain = packet6(protocol, client6, pod6, SYN, &[]);
                assert_eq!(rig.ingress6(&with_option6(&plain, VIP6, TO_LOCAL)), (NEXT, plain));
            }
            let answer = if protocol == proto::TCP { tcp(pod, client, SYN | ACK) } else { udp(pod, client, b"answer") };
            let (_, out) = rig.egress(&answer);
            assert_eq!(ends(&out), ((VIP, TO_LOCAL), client));
            let (_, out) = rig.egress6(&packet6(protocol, pod6, client6, SYN | ACK, &[]));
            assert_eq!(ends6(&out), ((VIP6, TO_LOCAL), client6));
        }
        let flows = entries(&rig);
        assert_eq!(flows.len(), 8);
        for (key, flow) in &flows {
            assert!(flow.flags & FLOW_DIRECT != 0);
            assert!(flows.iter().any(|(other, _)| *other == flow.partner_key(key)), "{key:?} has no partner");
        }
        // An established connection is where nothing is forgotten, both halves of it.
        let more = tcp(client, pod, ACK);
        assert_eq!(rig.ingress(&more), (NEXT, more.clone()));
        assert_eq!(count(&rig, "flows"), 4);
        assert_eq!(entries(&rig).iter().filter(|(_, flow)| tcp_established(flow.tcp)).count(), 2);
        assert_eq!(ends(&rig.egress(&tcp(pod, client, ACK)).1), ((VIP, TO_LOCAL), client));
        // Its ends are seen on both sides.
        rig.ingress(&tcp(client, pod, FIN | ACK));
        rig.egress(&tcp(pod, client, FIN | ACK));
        let of_tcp: Vec<_> =
            entries(&rig).into_iter().filter(|(key, _)| key.proto == proto::TCP && key.src.is_v4()).collect();
        assert!(of_tcp.iter().any(|(_, flow)| flow.is_over()), "{of_tcp:?}");
        // And then another one may have its tuple: one to the pod itself,
        rig.egress(&tcp(pod, client, SYN | ACK));
        assert_eq!(ends(&rig.egress(&tcp(pod, client, ACK)).1), (pod, client));
        // or one through another service.
        let plain = packet(proto::TCP, client, pod);
        assert_eq!(rig.ingress(&with_option(&plain, VIP, TO_MAGLEV)), (NEXT, plain));
        assert_eq!(ends(&rig.egress(&tcp(pod, client, SYN | ACK)).1), ((VIP, TO_MAGLEV), client));
    });
}

#[test]
fn one_half_that_was_forgotten_comes_back_from_the_other() {
    isolated(|| {
        let mut rig = rig();
        let (client, pod) = ((CLIENT, 40_000), (LOCAL_POD, 8080));
        for reply in [true, false] {
            let plain = packet(proto::TCP, client, pod);
            rig.ingress(&with_option(&plain, VIP, TO_LOCAL));
            let key =
                entries(&rig).into_iter().map(|(key, _)| key).find(|key| (key.src == pod.0.into()) == reply).unwrap();
            crate::flows::forget(&rig, &key);
            if reply {
                // Something new about the connection, so that it is noted.
                rig.ingress(&tcp(client, pod, FIN | ACK));
            } else {
                rig.egress(&tcp(pod, client, SYN | ACK));
            }
            assert_eq!(ends(&rig.egress(&tcp(pod, client, SYN | ACK)).1), ((VIP, TO_LOCAL), client), "reply {reply}");
            assert!(entries(&rig).iter().any(|(found, _)| *found == key), "reply {reply}");
            forget_all(&rig);
        }
    });
}

#[test]
fn node_ports_are_taken_for_the_addresses_of_known_nodes() {
    isolated(|| {
        let mut rig = rig();
        let plain = packet(proto::TCP, (CLIENT, 40_000), (LOCAL_POD, 8080));
        assert_eq!(rig.ingress(&with_option(&plain, FAR, NODE_PORT)), (NEXT, plain.clone()));
        assert_eq!(ends(&rig.egress(&tcp((LOCAL_POD, 8080), (CLIENT, 40_000), SYN | ACK)).1).0, (FAR, NODE_PORT));
        let plain6 = packet6(proto::TCP, (CLIENT6, 40_000), (LOCAL_POD6, 8080), SYN, &[]);
        assert_eq!(rig.ingress6(&with_option6(&plain6, FAR6, NODE_PORT)), (NEXT, plain6));
        forget_all(&rig);
        rig.assert_untouched(&with_option(&plain, Ipv4Addr::new(10, 7, 0, 13), NODE_PORT));
        assert_eq!(entries(&rig), []);
    });
}

#[test]
fn what_names_no_service_of_ours_or_no_pod_of_this_node_is_left_as_it_is() {
    isolated(|| {
        let mut rig = rig();
        let client = (CLIENT, 40_000);
        let plain = packet(proto::TCP, client, (LOCAL_POD, 8080));
        rig.assert_untouched(&with_option(&plain, Ipv4Addr::new(8, 8, 8, 8), 80));
        rig.assert_untouched(&with_option(&plain, VIP, 7));
        // A service that does not have this pod here.
        rig.assert_untouched(&with_option(&plain, VIP, TO_REMOTE));
        rig.assert_untouched(&with_option(&packet(proto::TCP, client, (LOCAL_POD, 8081)), VIP, TO_LOCAL));
        rig.assert_untouched(&with_option(&packet(proto::TCP, client, (REMOTE_POD, 8080)), VIP, TO_REMOTE));
        // In the middle of a connection.
        rig.assert_untouched(&with_option(&tcp(client, (LOCAL_POD, 8080), ACK), VIP, TO_LOCAL));
        // Another option of that length.
        let mut other = with_option(&plain, VIP, TO_LOCAL);
        other[IP + 20] = 0x94;
        seal_ip(&mut other);
        rig.assert_untouched(&other);
        let plain = packet6(proto::TCP, (CLIENT6, 40_000), (LOCAL_POD6, 8080), SYN, &[padding(60, 3)]);
        rig.assert_untouched(&plain);
        assert_eq!(entries(&rig), []);
    });
}

#[test]
fn what_has_no_room_for_an_option_goes_with_the_nodes_own_address() {
    isolated(|| {
        let mut rig = rig();
        let client = (CLIENT, 40_000);
        // Options of its own.
        let own = with_option(&packet(proto::TCP, client, (VIP, TO_REMOTE)), VIP, 1);
        let (code, out) = rig.ingress(&own);
        assert_eq!((code, &out[IP + 12..IP + 16]), (REDIRECT, &NODE.octets()[..]));
        let (code, out) =
            rig.ingress6(&packet6(proto::TCP, (CLIENT6, 40_000), (VIP6, TO_REMOTE), SYN, &[padding(60, 1)]));
        assert_eq!((code, ends_behind(&out, proto::TCP, 8).0.0), (REDIRECT, NODE6));
        // The first of several fragments.
        let mut piece = udp(client, (VIP, TO_REMOTE), &[7; 64]);
        piece[IP + 6] = 0x20;
        seal_ip(&mut piece);
        let (code, out) = rig.ingress(&piece);
        assert_eq!((code, &out[IP + 12..IP + 16]), (REDIRECT, &NODE.octets()[..]));
    });
}

#[test]
fn hops_routes_and_lengths_count_with_the_option() {
    isolated(|| {
        let mut rig = rig();
        let client = (CLIENT, 40_000);
        let mut last = tcp(client, (VIP, TO_REMOTE), SYN);
        last[IP + 8] = 1;
        seal_ip(&mut last);
        let before = rig.dropped(DropReason::TtlExceeded, kinesin_abi::Direction::Ingress);
        let (code, told) = rig.ingress(&last);
        assert_eq!((code, told[IP + 20]), (REDIRECT, 11), "it shows in a trace of the route");
        assert_eq!(rig.dropped(DropReason::TtlExceeded, kinesin_abi::Direction::Ingress), before + 1);
        ip("route change 10.42.2.0/24 via 192.168.1.11 mtu lock 1400");
        let long = |len: usize| {
            let mut frame = udp(client, (VIP, TO_REMOTE), &vec![7; len - 28]);
            frame[IP + 6] = 0x40;
            seal_ip(&mut frame);
            frame
        };
        let (code, out) = rig.ingress(&long(1392));
        assert_eq!((code, out.len()), (REDIRECT, IP + 1400));
        let (code, error) = rig.ingress(&long(1393));
        let mtu = 1392u16.to_be_bytes();
        assert_eq!((code, &error[IP + 20..IP + 22], &error[IP + 26..IP + 28]), (REDIRECT, &[3, 4][..], &mtu[..]));
        ip("route change unreachable 10.42.2.0/24");
        rig.assert_dropped(&tcp((CLIENT, 40_001), (VIP, TO_REMOTE), SYN), DropReason::FibLookupFailed);
    });
}

#[test]
fn errors_about_them_reach_the_pod_as_if_it_had_answered_itself() {
    isolated(|| {
        let mut rig = rig();
        rig.ingress(&tcp((CLIENT, 40_000), (VIP, TO_REMOTE), SYN));
        let router = Ipv4Addr::new(192, 168, 1, 1);
        let error = |quoted: &[u8], to: Ipv4Addr| {
            let mut message = vec![3, 4, 0, 0, 0, 0, 5, 0];
            message.extend(&quoted[IP..]);
            let check = checksum(&message);
            message[2..4].copy_from_slice(&check.to_be_bytes());
            ipv4(router, to, proto::ICMP, &message)
        };
        let (code, out) = rig.ingress(&error(&tcp((VIP, TO_REMOTE), (CLIENT, 40_000), SYN | ACK), VIP));
        let mut expected = error(&tcp((REMOTE_POD, 8080), (CLIENT, 40_000), SYN | ACK), REMOTE_POD);
        expected[IP + 8] -= 1;
        seal_ip(&mut expected);
        assert_eq!((code, &out[IP..]), (REDIRECT, &expected[IP..]));
    });
}
