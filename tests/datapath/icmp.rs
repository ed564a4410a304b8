//! ICMP: echo requests to our addresses, and errors about translated connections.

use std::net::Ipv4Addr;

use kinesin::datapath::MapStore;
use kinesin_abi::{Direction, DropReason, L2Key, Settings, proto};

use crate::packets::{ACK, End, IP, L4, SYN, checksum, ends, ipv4, packet, seal_ip, tcp, ttl, udp};
use crate::rig::*;

/// A router that nobody knows.
const ROUTER: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
/// Destination unreachable, fragmentation needed, next hop's MTU 1400.
const TOO_BIG: [u8; 6] = [3, 4, 0, 0, 0x05, 0x78];

/// An ICMP message: type, code, the rest of the header, data.
fn icmp(src: Ipv4Addr, dst: Ipv4Addr, header: [u8; 6], data: &[u8]) -> Vec<u8> {
    let [kind, code, rest @ ..] = header;
    let mut message = vec![kind, code, 0, 0];
    message.extend(rest);
    message.extend(data);
    let check = checksum(&message);
    message[2..4].copy_from_slice(&check.to_be_bytes());
    ipv4(src, dst, proto::ICMP, &message)
}

fn ping(dst: Ipv4Addr) -> Vec<u8> {
    icmp(CLIENT, dst, [8, 0, 0xab, 0xcd, 0, 9], b"are you there? ")
}

/// The same IP packet with another TTL.
fn with_ttl(mut frame: Vec<u8>, ttl: u8) -> Vec<u8> {
    frame[IP + 8] = ttl;
    seal_ip(&mut frame);
    frame
}

/// What is on the wire where addresses of the link layer do not matter.
fn from_ip(frame: &[u8]) -> &[u8] {
    &frame[IP..]
}

#[test]
fn an_echo_request_to_a_service_address_is_answered_in_place() {
    isolated(|| {
        let mut rig = Rig::new();
        for (from, data) in [(64, &b"are you there? "[..]), (1, b""), (255, &[0xff; 1400])] {
            let request = with_ttl(icmp(CLIENT, VIP, [8, 0, 0xab, 0xcd, 0, 9], data), from);
            let (code, reply) = rig.ingress(&request);
            let wanted = icmp(VIP, CLIENT, [0, 0, 0xab, 0xcd, 0, 9], data);
            assert_eq!((code, from_ip(&reply)), (REDIRECT, from_ip(&wanted)));
            assert_eq!((&reply[..6], &reply[6..12]), (&CLIENT_MAC[..], &NODE_MAC[..]));
        }
        // Every checksum that a sequence number makes.
        for sequence in 0..300u16 {
            let [a, b] = (sequence * 219).to_be_bytes();
            let (_, reply) = rig.ingress(&icmp(CLIENT, VIP, [8, 0, 0, 1, a, b], &[]));
            assert_eq!(from_ip(&reply), from_ip(&icmp(VIP, CLIENT, [0, 0, 0, 1, a, b], &[])), "{sequence}");
        }
        assert_eq!(rig.maps.forwarded().unwrap()[0].1.packets, 0);
        assert_eq!(rig.maps.drops().unwrap(), []);
    });
}

#[test]
fn an_announced_address_without_wildcard_is_answered_for_on_its_device() {
    isolated(|| {
        let mut rig = Rig::new();
        let external = Ipv4Addr::new(10, 0, 0, 7);
        rig.assert_untouched(&ping(external));
        rig.maps.put_l2(L2Key { addr: external.into(), ifindex: rig.lan + 1 }).unwrap();
        rig.assert_untouched(&ping(external));
        rig.maps.put_l2(L2Key { addr: external.into(), ifindex: rig.lan }).unwrap();
        assert_eq!(rig.ingress(&ping(external)).0, REDIRECT);
    });
}

#[test]
fn other_icmp_to_a_service_address_is_dropped_and_the_nodes_own_is_left_alone() {
    isolated(|| {
        let mut rig = Rig::new();
        for kind in [0, 4, 5, 13, 15, 17, 42] {
            rig.assert_dropped(&icmp(CLIENT, VIP, [kind, 0, 0, 0, 0, 0], &[0; 12]), DropReason::UnknownIcmpType);
        }
        let nothing = tcp((VIP, TO_REMOTE), (CLIENT, 1), ACK);
        for kind in [3, 11, 12] {
            let error = icmp(ROUTER, VIP, [kind, 0, 0, 0, 0, 0], from_ip(&nothing));
            rig.assert_dropped(&error, DropReason::UnknownConnection);
            rig.assert_dropped(&icmp(ROUTER, VIP, [kind, 0, 0, 0, 0, 0], &[]), DropReason::UnknownConnection);
        }
        let mut fragment = ping(VIP);
        fragment[IP + 6] = 0x20;
        seal_ip(&mut fragment);
        rig.assert_dropped(&fragment, DropReason::Fragment);
        rig.assert_dropped(&ping(VIP)[..L4 + 7], DropReason::InvalidPacket);
        for src in [Ipv4Addr::UNSPECIFIED, Ipv4Addr::BROADCAST, Ipv4Addr::LOCALHOST, Ipv4Addr::new(224, 0, 0, 1)] {
            rig.assert_dropped(&icmp(src, VIP, [8, 0, 0, 0, 0, 0], &[]), DropReason::InvalidPacket);
        }
        rig.assert_dropped(&ping(CLUSTER_IP), DropReason::IsClusterIp);
        rig.assert_dropped(&icmp(CLIENT, CLUSTER_IP, [3, 3, 0, 0, 0, 0], from_ip(&nothing)), DropReason::IsClusterIp);
        // Even when the node's address is announced too, the node answers.
        rig.maps.put_l2(L2Key { addr: NODE.into(), ifindex: rig.lan }).unwrap();
        for dst in [NODE, CLIENT] {
            rig.assert_untouched(&ping(dst));
            rig.assert_untouched(&icmp(ROUTER, dst, TOO_BIG, from_ip(&tcp((dst, 22), (CLIENT, 1), ACK))));
        }
    });
}

#[test]
fn without_the_setting_pings_are_dropped() {
    isolated(|| {
        let mut rig = Rig::new();
        rig.maps.write_settings(&Settings { flags: 0, ..settings() }).unwrap();
        rig.assert_dropped(&ping(VIP), DropReason::UnknownIcmpType);
    });
}

/// How much of a packet's transport is quoted: the least (RFC 792), without and with a TCP checksum, and more.
const QUOTES: [usize; 4] = [8, 16, 20, 200];

/// Quotes an IP packet.
fn quote(frame: &[u8], transport: usize) -> &[u8] {
    &frame[IP..frame.len().min(L4 + transport)]
}

/// A packet whose payload makes sums interesting.
fn segment(protocol: u8, from: End, to: End) -> Vec<u8> {
    if protocol == proto::TCP { tcp(from, to, ACK) } else { udp(from, to, b"some payload, odd") }
}

#[test]
fn errors_about_packets_to_a_remote_backend_reach_the_client_as_about_the_service() {
    isolated(|| {
        let mut rig = Rig::new();
        let (client, service) = ((CLIENT, 40_000), (VIP, TO_REMOTE));
        for protocol in [proto::TCP, proto::UDP] {
            let (_, out) = rig.ingress(&packet(protocol, client, service));
            let (node, pod) = ends(&out);
            assert_ne!(node.1, client.1);
            for (reporter, header) in [
                (ROUTER, TOO_BIG),
                (pod.0, [3, 3, 0, 0, 0, 0]),
                (ROUTER, [11, 0, 0, 0, 0, 0]),
                (ROUTER, [12, 0, 9, 0, 0, 0]),
            ] {
                for len in QUOTES {
                    let error = icmp(reporter, NODE, header, quote(&segment(protocol, node, pod), len));
                    let (code, out) = rig.ingress(&error);
                    let wanted = icmp(VIP, CLIENT, header, quote(&segment(protocol, client, service), len));
                    assert_eq!((code, from_ip(&out)), (REDIRECT, from_ip(&with_ttl(wanted, 63))), "{protocol} {len}");
                }
            }
            // Nobody else may hear of it.
            let quoted = segment(protocol, node, pod);
            rig.assert_untouched(&icmp(ROUTER, CLIENT, TOO_BIG, quote(&quoted, 8)));
            rig.assert_dropped(&icmp(ROUTER, VIP, TOO_BIG, quote(&quoted, 8)), DropReason::UnknownConnection);
            let last = with_ttl(icmp(ROUTER, NODE, TOO_BIG, quote(&quoted, 8)), 1);
            rig.assert_dropped(&last, DropReason::TtlExceeded);
        }
    });
}

#[test]
fn errors_about_replies_reach_a_remote_backend_as_about_its_own_packets() {
    isolated(|| {
        let mut rig = Rig::new();
        let (client, service) = ((CLIENT, 40_000), (VIP, TO_REMOTE));
        for protocol in [proto::TCP, proto::UDP] {
            let (_, out) = rig.ingress(&packet(protocol, client, service));
            let (node, pod) = ends(&out);
            for reporter in [ROUTER, CLIENT] {
                for len in QUOTES {
                    let error = icmp(reporter, VIP, TOO_BIG, quote(&segment(protocol, service, client), len));
                    let (code, out) = rig.ingress(&error);
                    let wanted = icmp(NODE, REMOTE_POD, TOO_BIG, quote(&segment(protocol, pod, node), len));
                    assert_eq!((code, from_ip(&out)), (REDIRECT, from_ip(&with_ttl(wanted, 63))), "{protocol} {len}");
                }
            }
        }
    });
}

#[test]
fn errors_about_local_backends_are_translated_on_the_way_in_and_out() {
    isolated(|| {
        let mut rig = Rig::new();
        let (client, service) = ((CLIENT, 40_000), (VIP, TO_LOCAL));
        for protocol in [proto::TCP, proto::UDP] {
            let (_, out) = rig.ingress(&packet(protocol, client, service));
            let pod = ends(&out).1;
            for len in QUOTES {
                let error = icmp(ROUTER, VIP, TOO_BIG, quote(&segment(protocol, service, client), len));
                let (code, out) = rig.ingress(&error);
                let wanted = icmp(ROUTER, LOCAL_POD, TOO_BIG, quote(&segment(protocol, pod, client), len));
                assert_eq!((code, from_ip(&out)), (NEXT, from_ip(&wanted)), "{protocol} {len}");
                // From the backend, or from the stack that forwards to it.
                for reporter in [LOCAL_POD, NODE] {
                    let error = icmp(reporter, CLIENT, TOO_BIG, quote(&segment(protocol, client, pod), len));
                    let (code, out) = rig.egress(&error);
                    let wanted = icmp(VIP, CLIENT, TOO_BIG, quote(&segment(protocol, client, service), len));
                    assert_eq!((code, from_ip(&out)), (NEXT, from_ip(&wanted)), "{protocol} {len}");
                    // From outside nobody may speak for it.
                    rig.assert_untouched(&error);
                }
            }
        }
        let counted = rig.maps.forwarded().unwrap();
        assert_eq!((counted[0].1.packets, counted[1].1.packets), (10, 16));
    });
}

#[test]
fn errors_that_quote_too_little_or_something_else_are_not_translated() {
    isolated(|| {
        let mut rig = Rig::new();
        let (_, out) = rig.ingress(&packet(proto::UDP, (CLIENT, 40_000), (VIP, TO_REMOTE)));
        let (node, pod) = ends(&out);
        let quoted = segment(proto::UDP, node, pod);
        let whole = quote(&quoted, 8);
        for len in 0..whole.len() {
            rig.assert_untouched(&icmp(ROUTER, NODE, TOO_BIG, &whole[..len]));
        }
        // Later fragments, other versions, impossible lengths, other transports.
        for (at, byte) in [(7, 1), (0, 0x65), (0, 0x44), (0, 0x4f), (9, proto::ICMP)] {
            let mut bad = whole.to_vec();
            bad[at] = byte;
            rig.assert_untouched(&icmp(ROUTER, NODE, TOO_BIG, &bad));
        }
        // Queries and redirects are no errors.
        for kind in [0, 5, 8] {
            rig.assert_untouched(&icmp(ROUTER, NODE, [kind, 0, 0, 0, 0, 0], whole));
        }
        // The quoted header may have options.
        let mut long = whole.to_vec();
        long[0] = 0x46;
        long.splice(20..20, [1, 1, 1, 0]);
        let (code, out) = rig.ingress(&icmp(ROUTER, NODE, TOO_BIG, &long));
        assert_eq!((code, checksum(&out[L4..]), ttl(&out)), (REDIRECT, 0, 63));
        assert_eq!(out[L4 + 8 + 24..L4 + 8 + 28], [40_000u16.to_be_bytes(), TO_REMOTE.to_be_bytes()].concat());
    });
}

#[test]
fn errors_do_not_keep_or_end_a_connection() {
    isolated(|| {
        let mut rig = Rig::new();
        let (_, out) = rig.ingress(&tcp((CLIENT, 40_000), (VIP, TO_REMOTE), SYN));
        let (node, pod) = ends(&out);
        let before = crate::flows::entries(&rig);
        rig.ingress(&icmp(ROUTER, NODE, [3, 1, 0, 0, 0, 0], quote(&tcp(node, pod, SYN), 20)));
        let mut after = crate::flows::entries(&rig);
        let mut before = before;
        before.sort_by_key(|(key, _)| *key);
        after.sort_by_key(|(key, _)| *key);
        assert_eq!(before, after);
        assert_eq!(rig.dropped(DropReason::UnknownConnection, Direction::Ingress), 0);
    });
}

/// The same IP packet, not to be fragmented.
fn whole(mut frame: Vec<u8>) -> Vec<u8> {
    frame[IP + 6] = 0x40;
    seal_ip(&mut frame);
    frame
}

/// A TCP packet of so many bytes from the IP header on.
fn long_tcp(from: End, to: End, len: usize) -> Vec<u8> {
    let mut data = tcp(from, to, SYN)[L4..].to_vec();
    data.resize(len - 20, 0x5a);
    ipv4(from.0, to.0, proto::TCP, &data)
}

#[test]
fn what_does_not_fit_its_way_is_reported_with_the_mtu() {
    isolated(|| {
        let mut rig = Rig::new();
        ip("route change 10.42.2.0/24 via 192.168.1.11 mtu lock 1400");
        let (client, service) = ((CLIENT, 61_500), (VIP, TO_REMOTE));
        let mut count = 0;
        let assert_reported = |rig: &mut Rig, count: &mut u64, sent: Vec<u8>, mtu: u16, quoted: usize| {
            let sent = whole(sent);
            let (code, out) = rig.ingress(&sent);
            *count += 1;
            assert_eq!((code, rig.dropped(DropReason::FragmentationNeeded, Direction::Ingress)), (REDIRECT, *count));
            let addr = |at: usize| Ipv4Addr::new(sent[at], sent[at + 1], sent[at + 2], sent[at + 3]);
            let [a, b] = mtu.to_be_bytes();
            let mut wanted = icmp(addr(IP + 16), addr(IP + 12), [3, 4, 0, 0, a, b], quote(&sent, quoted));
            // Not to be fragmented itself, and without a number.
            wanted[IP + 4..IP + 8].copy_from_slice(&[0, 0, 0x40, 0]);
            seal_ip(&mut wanted);
            assert_eq!(from_ip(&out), from_ip(&wanted));
        };
        for protocol in [proto::TCP, proto::UDP] {
            let long = |from, to, len: usize| {
                if protocol == proto::TCP { long_tcp(from, to, len) } else { udp(from, to, &vec![7; len - 28]) }
            };
            let head = if protocol == proto::TCP { 20 } else { 8 };
            // A new connection, which is not recorded for it.
            assert_reported(&mut rig, &mut count, long(client, service, 1401), 1400, head);
            // Without the mark there is nobody to tell.
            rig.assert_dropped(&long((CLIENT, 61_502), service, 1401), DropReason::FragmentationNeeded);
            count += 1;
            let (code, out) = rig.ingress(&whole(long(client, service, 1400)));
            assert_eq!(code, REDIRECT);
            let (node, pod) = ends(&out);
            // A known one.
            assert_reported(&mut rig, &mut count, long(client, service, 1500), 1400, head);
            // And a reply, whose sender knows this node.
            ip("route replace 192.168.1.50/32 dev lan0 mtu lock 1300");
            assert_reported(&mut rig, &mut count, long(pod, node, 1400), 1300, head);
            assert_eq!(rig.ingress(&whole(long(pod, node, 1300))).0, REDIRECT);
            ip("route del 192.168.1.50/32");
        }
    });
}

#[test]
fn errors_are_not_sent_without_limit_nor_to_nobody() {
    isolated(|| {
        let mut rig = Rig::new();
        for src in [Ipv4Addr::UNSPECIFIED, Ipv4Addr::BROADCAST, Ipv4Addr::LOCALHOST, Ipv4Addr::new(239, 1, 1, 1)] {
            assert_eq!(rig.ingress(&tcp((src, 40_000), (VIP, TO_NOBODY), SYN)).0, SHOT);
        }
        let refused = tcp((CLIENT, 40_000), (VIP, TO_NOBODY), SYN);
        let start = std::time::Instant::now();
        let sent = (0..3000).filter(|_| rig.ingress(&refused).0 == REDIRECT).count() as u128;
        let allowed = 50 + start.elapsed().as_millis() + 1;
        let cpus = std::thread::available_parallelism().unwrap().get() as u128;
        assert!((50..=allowed * cpus).contains(&sent), "{sent} in {:?}", start.elapsed());
        assert_eq!(rig.dropped(DropReason::NoBackend, Direction::Ingress), 3004);
    });
}
