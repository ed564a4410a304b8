//! IPv6: connections through each position, extension headers, and what is refused and how.

use std::net::Ipv6Addr;

use kinesin::datapath::MapStore;
use kinesin_abi::{
    Be16, Direction, DropReason, FrontendKind, MAGLEV_TABLE_SIZE, SOURCE_RANGE_BITS, SOURCE_RANGE_IPV6, SourceRange,
    SourceRangeKey, frontend_flags, maglev_hash, maglev_index, proto,
};
use kinesin_core::plan::Op;

use crate::packets::{ACK, IP, SYN, arp, tcp};
use crate::packets6::*;
use crate::rig::*;

const TRANSPORTS: [u8; 2] = [proto::TCP, proto::UDP];
const ROUTER: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);

fn syn(protocol: u8, from: End6, to: End6) -> Vec<u8> {
    packet6(protocol, from, to, SYN, &[])
}

/// What a backend answers to a translated packet.
fn answer(to: &[u8]) -> Vec<u8> {
    let (from, to_end) = ends6(to);
    packet6(to[IP + 6], to_end, from, SYN | ACK, &[])
}

#[test]
fn a_local_backend_gets_the_packet_with_the_clients_address_and_replies_as_the_service() {
    isolated(|| {
        let mut rig = Rig::dual();
        for protocol in TRANSPORTS {
            let sent = syn(protocol, (CLIENT6, 40_000), (VIP6, TO_LOCAL));
            let (code, out) = rig.ingress6(&sent);
            assert_eq!((code, ends6(&out)), (NEXT, ((CLIENT6, 40_000), (LOCAL_POD6, 8080))));
            // Nothing else of the header changes.
            assert_eq!(out[..IP + 24], sent[..IP + 24]);
            let (code, reply) = rig.egress6(&answer(&out));
            assert_eq!((code, ends6(&reply), hops(&reply)), (NEXT, ((VIP6, TO_LOCAL), (CLIENT6, 40_000)), 64));
        }
        let counted = rig.maps.forwarded().unwrap();
        assert_eq!((counted[0].1.packets, counted[1].1.packets), (2, 2));
    });
}

#[test]
fn a_remote_backend_is_reached_from_the_nodes_address_and_its_replies_go_to_the_client() {
    isolated(|| {
        let mut rig = Rig::dual();
        for protocol in TRANSPORTS {
            let (code, out) = rig.ingress6(&syn(protocol, (CLIENT6, 61_500), (VIP6, TO_REMOTE)));
            assert_eq!((code, ends6(&out)), (REDIRECT, ((NODE6, 61_500), (REMOTE_POD6, 8080))));
            assert_eq!((hops(&out), &out[IP..IP + 4]), (63, &[0x60, 0x2a, 0xbc, 0xde][..]));
            let (code, reply) = rig.ingress6(&answer(&out));
            assert_eq!((code, ends6(&reply), hops(&reply)), (REDIRECT, ((VIP6, TO_REMOTE), (CLIENT6, 61_500)), 63));
            // Another client with that port gets another one of the node's.
            let other = Ipv6Addr::new(0xfd00, 1, 0, 0, 0, 0, 0, 0x51);
            let (_, second) = rig.ingress6(&syn(protocol, (other, 61_500), (VIP6, TO_REMOTE)));
            let ((source, port), _) = ends6(&second);
            assert!(source == NODE6 && port != 61_500 && (61_000..=65_000).contains(&port), "{port}");
        }
    });
}

#[test]
fn a_device_without_ipv6_address_can_not_be_the_source() {
    isolated(|| {
        let mut rig = Rig::dual();
        let bare = kinesin_abi::DeviceValue { ipv6: kinesin_abi::Addr::UNSPECIFIED, ..device() };
        rig.maps.put_device(rig.lan, &bare).unwrap();
        let sent = syn(proto::TCP, (CLIENT6, 61_500), (VIP6, TO_REMOTE));
        rig.assert_dropped(&sent, DropReason::NoNatMapping);
    });
}

#[test]
fn each_familys_programs_leave_the_other_family_alone() {
    isolated(|| {
        let mut rig = Rig::dual();
        let six = syn(proto::TCP, (CLIENT6, 61_500), (VIP6, TO_REMOTE));
        let four = tcp((CLIENT, 61_500), (VIP, TO_REMOTE), SYN);
        let question = arp([0xff; 6], 1, (CLIENT_MAC, CLIENT), ([0; 6], VIP));
        for program in ["cil_from_netdev", "cil_to_netdev", "cil_from_l3dev", "cil_to_l3dev"] {
            assert_eq!(rig.run(program, &six), (NEXT, six.clone()), "{program}");
        }
        for packet in [four, question] {
            for program in ["cil_from_netdev6", "cil_to_netdev6", "cil_from_l3dev6", "cil_to_l3dev6"] {
                assert_eq!(rig.run(program, &packet), (NEXT, packet.clone()), "{program}");
            }
        }
        assert_eq!(crate::flows::entries(&rig).len(), 0);
    });
}

#[test]
fn addresses_mapped_from_ipv4_do_not_reach_services_of_ipv4() {
    isolated(|| {
        let mut rig = Rig::dual();
        let (vip, client) = (VIP.to_ipv6_mapped(), CLIENT.to_ipv6_mapped());
        for (from, to) in [(CLIENT6, vip), (client, vip), (client, VIP6)] {
            rig.assert_untouched(&syn(proto::TCP, (from, 40_000), (to, TO_LOCAL)));
        }
    });
}

#[test]
fn maglev_affinity_and_source_ranges_work_as_for_ipv4() {
    isolated(|| {
        let mut rig = Rig::dual();
        for port in 30_000..30_100 {
            let (_, out) = rig.ingress6(&tcp6((CLIENT6, port), (VIP6, TO_MAGLEV), SYN));
            let (sport, dport) = (Be16::new(port), Be16::new(TO_MAGLEV));
            let hash = maglev_hash(&CLIENT6.into(), sport, dport, proto::TCP, settings().maglev_seed);
            let index = maglev_index(hash, MAGLEV_TABLE_SIZE);
            let expected = if index.is_multiple_of(2) { LOCAL_POD6 } else { REMOTE_POD6 };
            assert_eq!(ends6(&out).1, (expected, 8080));
        }
        let both = value(FrontendKind::LoadBalancer, frontend_flags::ROUTABLE | frontend_flags::AFFINITY, SIX + 1, 2);
        let sticky = kinesin_abi::FrontendValue { affinity: 60, ..both };
        rig.maps.apply(&[Op::PutFrontend(frontend(VIP6, 90, proto::TCP), sticky)]).unwrap();
        let mut backends: Vec<_> =
            (0..20).map(|n| ends6(&rig.ingress6(&tcp6((CLIENT6, 20_000 + n), (VIP6, 90), SYN)).1).1).collect();
        backends.dedup();
        assert_eq!(backends.len(), 1, "{backends:?}");

        let flags = frontend_flags::ROUTABLE | frontend_flags::SOURCE_RANGES;
        let ranged =
            kinesin_abi::FrontendValue { service: 7, ..value(FrontendKind::LoadBalancer, flags, SIX + LOCAL_ID, 1) };
        let range = SourceRange {
            service: 7,
            list: SOURCE_RANGE_IPV6,
            addr: Ipv6Addr::from([0xfd00, 1, 0, 0, 0, 0, 0, 0]).into(),
        };
        let key = SourceRangeKey { prefix_len: SOURCE_RANGE_BITS + 64, range };
        rig.maps.apply(&[Op::PutSourceRange(key), Op::PutFrontend(frontend(VIP6, 91, proto::TCP), ranged)]).unwrap();
        assert_eq!(rig.ingress6(&tcp6((CLIENT6, 40_000), (VIP6, 91), SYN)).0, NEXT);
        rig.assert_dropped(&tcp6((ROUTER, 40_000), (VIP6, 91), SYN), DropReason::SourceRange);
    });
}

#[test]
fn unknown_ports_cluster_ips_and_routeless_backends_are_dropped_for_their_reasons() {
    isolated(|| {
        let mut rig = Rig::dual();
        for protocol in TRANSPORTS {
            rig.assert_dropped(&syn(protocol, (CLIENT6, 40_000), (VIP6, 9999)), DropReason::NoBackend);
            rig.assert_dropped(&syn(protocol, (CLIENT6, 40_000), (CLUSTER_IP6, 80)), DropReason::IsClusterIp);
            rig.assert_dropped(&syn(protocol, (CLIENT6, 40_000), (VIP6, TO_ROUTELESS)), DropReason::FibLookupFailed);
        }
        for protocol in [46, 47, 50, 59] {
            rig.assert_dropped(&ipv6(CLIENT6, VIP6, protocol, &[0; 32]), DropReason::UnknownL4);
            rig.assert_untouched(&ipv6(CLIENT6, NODE6, protocol, &[0; 32]));
        }
        rig.assert_untouched(&syn(proto::TCP, (CLIENT6, 40_000), (NODE6, 22)));
    });
}

/// An ICMPv6 error as the service (or whoever the packet was for) reports it, back to where it came from.
#[track_caller]
fn assert_reported(out: &[u8], sent: &[u8], header: [u8; 6], quoted: usize) {
    let (src, dst) = addresses(sent);
    let mut wanted = icmp6(dst, src, header, &sent[IP..IP + quoted]);
    wanted[IP + 1..IP + 4].fill(0);
    wanted[..12].copy_from_slice(&[&sent[6..12], &sent[..6]].concat());
    assert_eq!(out, wanted);
}

#[test]
fn a_service_without_backends_refuses_at_once() {
    isolated(|| {
        let mut rig = Rig::dual();
        let options = [padding(OPTIONS, 2)];
        for sent in [
            tcp6((CLIENT6, 40_000), (VIP6, TO_NOBODY), SYN),
            udp6((CLIENT6, 40_000), (VIP6, TO_NOBODY), b""),
            udp6((CLIENT6, 40_000), (VIP6, TO_NOBODY), b"odd"),
            udp6((CLIENT6, 40_000), (VIP6, TO_NOBODY), &[7; 1184]),
            packet6(proto::TCP, (CLIENT6, 40_000), (VIP6, TO_NOBODY), SYN, &options),
        ] {
            let (code, out) = rig.ingress6(&sent);
            assert_eq!(code, REDIRECT);
            assert_reported(&out, &sent, [1, 4, 0, 0, 0, 0], sent.len() - IP);
        }
        // What does not fit is quoted by its headers, also behind extensions.
        let long = udp6((CLIENT6, 40_000), (VIP6, TO_NOBODY), &[7; 1185]);
        assert_reported(&rig.ingress6(&long).1, &long, [1, 4, 0, 0, 0, 0], 48);
        let data = datagram(40_000, TO_NOBODY, &[9; 1300]);
        let long = extended(CLIENT6, VIP6, &options, proto::UDP, &data);
        assert_reported(&rig.ingress6(&long).1, &long, [1, 4, 0, 0, 0, 0], 64);
        assert_eq!(rig.dropped(DropReason::NoBackend, Direction::Ingress), 7);
        // Nobody in particular is told nothing.
        for src in [Ipv6Addr::UNSPECIFIED, Ipv6Addr::LOCALHOST, Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1)] {
            rig.assert_dropped(&tcp6((src, 40_000), (VIP6, TO_NOBODY), SYN), DropReason::NoBackend);
        }
        rig.maps.write_settings(&kinesin_abi::Settings { flags: 0, ..settings() }).unwrap();
        rig.assert_dropped(&tcp6((CLIENT6, 40_000), (VIP6, TO_NOBODY), SYN), DropReason::NoBackend);
    });
}

#[test]
fn the_last_hop_is_not_forwarded() {
    isolated(|| {
        let mut rig = Rig::dual();
        let sent = tcp6((CLIENT6, 61_500), (VIP6, TO_REMOTE), SYN);
        for left in [0, 1] {
            let last = with_hops(sent.clone(), left);
            let (code, out) = rig.ingress6(&last);
            assert_eq!(code, REDIRECT);
            assert_reported(&out, &last, [3, 0, 0, 0, 0, 0], 60);
        }
        let (code, out) = rig.ingress6(&with_hops(sent, 2));
        assert_eq!((code, hops(&out), ends6(&out).0), (REDIRECT, 1, (NODE6, 61_500)));
        let last = with_hops(answer(&out), 1);
        assert_reported(&rig.ingress6(&last).1, &last, [3, 0, 0, 0, 0, 0], 60);
        assert_eq!(rig.dropped(DropReason::TtlExceeded, Direction::Ingress), 3);
        // Towards local backends the stack decides.
        assert_eq!(rig.ingress6(&with_hops(tcp6((CLIENT6, 1), (VIP6, TO_LOCAL), SYN), 1)).0, NEXT);
    });
}

#[test]
fn what_does_not_fit_its_way_is_reported_with_the_mtu() {
    isolated(|| {
        let mut rig = Rig::dual();
        ip("route change fd00:42:2::/48 via fd00:1::11 mtu lock 1400");
        let mtu = [2, 0, 0, 0, 0x05, 0x78];
        let long = |from: End6, to: End6, len: usize| udp6(from, to, &vec![7; len - 48]);
        let sent = long((CLIENT6, 61_500), (VIP6, TO_REMOTE), 1401);
        assert_reported(&rig.ingress6(&sent).1, &sent, mtu, 48);
        let (code, out) = rig.ingress6(&long((CLIENT6, 61_500), (VIP6, TO_REMOTE), 1400));
        assert_eq!(code, REDIRECT);
        // A known one, and a reply.
        assert_reported(&rig.ingress6(&sent).1, &sent, mtu, 48);
        ip("route replace fd00:1::50/128 dev lan0 mtu lock 1300");
        let (node, pod) = ends6(&out);
        let reply = long(pod, node, 1400);
        assert_reported(&rig.ingress6(&reply).1, &reply, [2, 0, 0, 0, 0x05, 0x14], 48);
        assert_eq!(rig.dropped(DropReason::FragmentationNeeded, Direction::Ingress), 3);
    });
}

/// An extension header: its number, and what follows the number of the next one.
type Header = (u8, Vec<u8>);

/// Chains of extension headers that hosts send, with their length.
fn chains() -> Vec<(Vec<Header>, usize)> {
    // Type 0 with no segments left, and an authentication header with a value of 12 bytes.
    let routing = (43, vec![2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    let authentication = (51, vec![4, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]);
    vec![
        (vec![padding(0, 1)], 8),
        (vec![padding(OPTIONS, 3)], 24),
        (vec![routing.clone()], 24),
        (vec![authentication.clone()], 24),
        // An atomic fragment (RFC 6946).
        (vec![fragment(0, false, 7)], 8),
        (vec![padding(0, 1), padding(OPTIONS, 1), routing, authentication, padding(OPTIONS, 4)], 96),
        (vec![padding(OPTIONS, 1); 5], 40),
        (vec![padding(0, 20)], 160),
    ]
}

#[test]
fn extension_headers_are_skipped_and_kept() {
    isolated(|| {
        let mut rig = Rig::dual();
        for (chain, len) in chains() {
            for protocol in TRANSPORTS {
                let sent = packet6(protocol, (CLIENT6, 61_500), (VIP6, TO_REMOTE), SYN, &chain);
                let (code, out) = rig.ingress6(&sent);
                assert_eq!(code, REDIRECT, "{chain:?}");
                let (node, pod) = ends_behind(&out, protocol, len);
                assert_eq!((node.0, pod), (NODE6, (REMOTE_POD6, 8080)));
                assert_eq!(out[L4..L4 + len], sent[L4..L4 + len]);
                let reply = packet6(protocol, pod, node, SYN | ACK, &chain);
                let (code, out) = rig.ingress6(&reply);
                assert_eq!((code, ends_behind(&out, protocol, len).0), (REDIRECT, (VIP6, TO_REMOTE)));
            }
        }
    });
}

#[test]
fn extension_headers_that_lead_nowhere_are_dropped_for_our_addresses_only() {
    isolated(|| {
        let mut rig = Rig::dual();
        let waypoint = (43, vec![2, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        // Longer than the packet, and a next header beyond its end.
        let beyond = (OPTIONS, vec![9, 1, 4, 0, 0, 0, 0]);
        for (chain, reason) in [
            (vec![waypoint], DropReason::Extension),
            (vec![beyond], DropReason::Extension),
            (vec![padding(OPTIONS, 1); 6], DropReason::UnknownL4),
            (vec![padding(OPTIONS, 21)], DropReason::UnknownL4),
        ] {
            rig.assert_dropped(&packet6(proto::TCP, (CLIENT6, 1), (VIP6, TO_LOCAL), SYN, &chain), reason);
            rig.assert_untouched(&packet6(proto::TCP, (CLIENT6, 1), (NODE6, 22), SYN, &chain));
        }
    });
}

#[test]
fn truncated_packets_to_our_addresses_are_invalid_at_every_length() {
    isolated(|| {
        let mut rig = Rig::dual();
        let whole = tcp6((CLIENT6, 40_000), (VIP6, TO_LOCAL), SYN);
        let datagram = udp6((CLIENT6, 40_000), (VIP6, TO_LOCAL), b"0123456789");
        for (whole, header) in [(whole, 20), (datagram, 8)] {
            // Below a whole IP header the kernel's test run refuses the packet itself.
            for len in L4..whole.len() {
                rig.assert_dropped(&whole[..len], DropReason::InvalidPacket);
                if len < L4 + header {
                    let mut honest = whole[..len].to_vec();
                    honest[IP + 4..IP + 6].copy_from_slice(&((len - L4) as u16).to_be_bytes());
                    rig.assert_dropped(&honest, DropReason::InvalidPacket);
                }
            }
            assert_eq!(rig.ingress6(&whole).0, NEXT);
        }
        let chained = packet6(proto::TCP, (CLIENT6, 1), (VIP6, TO_LOCAL), SYN, &[padding(OPTIONS, 2)]);
        for len in L4..chained.len() {
            let reason = if len < L4 + 8 { DropReason::Extension } else { DropReason::InvalidPacket };
            rig.assert_dropped(&chained[..len], reason);
        }
    });
}

/// How much of a packet's transport is quoted.
const QUOTES: [usize; 4] = [8, 16, 20, 1000];
const TOO_BIG: [u8; 6] = [2, 0, 0, 0, 0x05, 0x78];

fn quote(frame: &[u8], transport: usize) -> &[u8] {
    &frame[IP..frame.len().min(L4 + transport)]
}

fn segment(protocol: u8, from: End6, to: End6) -> Vec<u8> {
    packet6(protocol, from, to, ACK, &[])
}

/// What is on the wire where addresses of the link layer, class and label do not matter.
fn from_payload(frame: &[u8]) -> &[u8] {
    &frame[IP + 4..]
}

#[test]
fn errors_about_remote_backends_travel_both_ways() {
    isolated(|| {
        let mut rig = Rig::dual();
        let (client, service) = ((CLIENT6, 40_000), (VIP6, TO_REMOTE));
        for protocol in TRANSPORTS {
            let (_, out) = rig.ingress6(&syn(protocol, client, service));
            let (node, pod) = ends6(&out);
            for len in QUOTES {
                for (reporter, header) in [(ROUTER, TOO_BIG), (pod.0, [1, 4, 0, 0, 0, 0]), (ROUTER, [3, 0, 0, 0, 0, 0])]
                {
                    let error = icmp6(reporter, NODE6, header, quote(&segment(protocol, node, pod), len));
                    let (code, out) = rig.ingress6(&error);
                    let wanted = icmp6(VIP6, CLIENT6, header, quote(&segment(protocol, client, service), len));
                    assert_eq!((code, from_payload(&out)), (REDIRECT, from_payload(&with_hops(wanted, 63))));
                }
                let error = icmp6(ROUTER, VIP6, TOO_BIG, quote(&segment(protocol, service, client), len));
                let (code, out) = rig.ingress6(&error);
                let wanted = icmp6(NODE6, REMOTE_POD6, TOO_BIG, quote(&segment(protocol, pod, node), len));
                assert_eq!((code, from_payload(&out)), (REDIRECT, from_payload(&with_hops(wanted, 63))));
            }
            // Nobody else may hear of it.
            let quoted = segment(protocol, node, pod);
            rig.assert_untouched(&icmp6(ROUTER, CLIENT6, TOO_BIG, quote(&quoted, 8)));
            rig.assert_dropped(&icmp6(ROUTER, VIP6, TOO_BIG, quote(&quoted, 8)), DropReason::UnknownConnection);
            let last = with_hops(icmp6(ROUTER, NODE6, TOO_BIG, quote(&quoted, 8)), 1);
            let (code, _) = rig.ingress6(&last);
            assert_eq!(code, SHOT, "no error about an error");
        }
    });
}

#[test]
fn errors_about_local_backends_are_translated_on_the_way_in_and_out() {
    isolated(|| {
        let mut rig = Rig::dual();
        let (client, service) = ((CLIENT6, 40_000), (VIP6, TO_LOCAL));
        for protocol in TRANSPORTS {
            let (_, out) = rig.ingress6(&syn(protocol, client, service));
            let pod = ends6(&out).1;
            for len in QUOTES {
                let error = icmp6(ROUTER, VIP6, TOO_BIG, quote(&segment(protocol, service, client), len));
                let (code, out) = rig.ingress6(&error);
                let wanted = icmp6(ROUTER, LOCAL_POD6, TOO_BIG, quote(&segment(protocol, pod, client), len));
                assert_eq!((code, from_payload(&out)), (NEXT, from_payload(&wanted)));
                for reporter in [LOCAL_POD6, NODE6] {
                    let error = icmp6(reporter, CLIENT6, TOO_BIG, quote(&segment(protocol, client, pod), len));
                    let (code, out) = rig.egress6(&error);
                    let wanted = icmp6(VIP6, CLIENT6, TOO_BIG, quote(&segment(protocol, client, service), len));
                    assert_eq!((code, from_payload(&out)), (NEXT, from_payload(&wanted)));
                    rig.assert_untouched(&error);
                }
            }
        }
    });
}

#[test]
fn errors_about_packets_with_extension_headers_are_translated_too() {
    isolated(|| {
        let mut rig = Rig::dual();
        let chain = [padding(0, 1), padding(OPTIONS, 2)];
        let (client, service) = ((CLIENT6, 61_500), (VIP6, TO_REMOTE));
        let sent = |from, to| packet6(proto::TCP, from, to, ACK, &chain);
        let (_, out) = rig.ingress6(&packet6(proto::TCP, client, service, SYN, &chain));
        let (node, pod) = ends_behind(&out, proto::TCP, 24);
        let error = icmp6(ROUTER, NODE6, TOO_BIG, &sent(node, pod)[IP..]);
        let (code, out) = rig.ingress6(&error);
        let wanted = icmp6(VIP6, CLIENT6, TOO_BIG, &sent(client, service)[IP..]);
        assert_eq!((code, from_payload(&out)), (REDIRECT, from_payload(&with_hops(wanted, 63))));
    });
}

#[test]
fn a_service_address_answers_a_ping() {
    isolated(|| {
        let mut rig = Rig::dual();
        for (left, data) in [(64, &b"are you there? "[..]), (1, b""), (255, &[0xff; 1400])] {
            let request = with_hops(icmp6(CLIENT6, VIP6, [128, 0, 0xab, 0xcd, 0, 9], data), left);
            let (code, reply) = rig.ingress6(&request);
            let wanted = icmp6(VIP6, CLIENT6, [129, 0, 0xab, 0xcd, 0, 9], data);
            assert_eq!((code, &reply[IP..]), (REDIRECT, &wanted[IP..]));
            assert_eq!((&reply[..6], &reply[6..12]), (&CLIENT_MAC[..], &NODE_MAC[..]));
        }
        for kind in [0, 129, 133, 134, 137, 143, 200] {
            let message = icmp6(CLIENT6, VIP6, [kind, 0, 0, 0, 0, 0], &[0; 12]);
            rig.assert_dropped(&message, DropReason::UnknownIcmp6Type);
        }
        let ping = |dst| icmp6(CLIENT6, dst, [128, 0, 0, 1, 0, 1], b"?");
        rig.assert_dropped(&ping(CLUSTER_IP6), DropReason::IsClusterIp);
        rig.assert_dropped(&icmp6(CLIENT6, VIP6, [1, 4, 0, 0, 0, 0], &[0; 48]), DropReason::UnknownConnection);
        rig.assert_dropped(&icmp6(Ipv6Addr::UNSPECIFIED, VIP6, [128, 0, 0, 1, 0, 1], b"?"), DropReason::InvalidPacket);
        for dst in [NODE6, CLIENT6] {
            rig.assert_untouched(&ping(dst));
        }
        rig.maps.write_settings(&kinesin_abi::Settings { flags: 0, ..settings() }).unwrap();
        rig.assert_dropped(&ping(VIP6), DropReason::UnknownIcmp6Type);
    });
}

#[test]
fn no_bytes_whatever_confuse_the_programs() {
    isolated(|| {
        let mut rig = Rig::dual();
        let quoted = segment(proto::TCP, (VIP6, TO_REMOTE), (CLIENT6, 61_500));
        let chain = [padding(0, 1), fragment(0, true, 9), padding(OPTIONS, 2)];
        let seeds = [
            tcp6((CLIENT6, 61_500), (VIP6, TO_REMOTE), SYN),
            udp6((CLIENT6, 40_000), (VIP6, TO_NOBODY), b"?"),
            packet6(proto::TCP, (CLIENT6, 61_500), (VIP6, TO_REMOTE), SYN, &chain),
            icmp6(CLIENT6, VIP6, [128, 0, 0, 0, 0, 0], b""),
            icmp6(CLIENT6, VIP6, TOO_BIG, &quoted[IP..]),
            crate::ndp::solicitation(CLIENT6, VIP6),
        ];
        let mut random = 0x2545_f491_4f6c_dd1d_u64;
        for n in 0..3000 {
            let mut frame = seeds[n % seeds.len()].clone();
            for _ in 0..1 + n % 4 {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                let at = IP + (random as usize >> 8) % (frame.len() - IP);
                frame[at] = random as u8;
            }
            for program in ["cil_from_netdev6", "cil_to_netdev6", "cil_from_l3dev6", "cil_to_l3dev6"] {
                let (code, _) = rig.run(program, &frame);
                assert!([NEXT, SHOT, REDIRECT].contains(&code), "{program} returned {code} for {frame:02x?}");
            }
        }
    });
}
