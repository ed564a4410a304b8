//! What is dropped or refused, and under which reason it is counted.

use std::net::Ipv4Addr;

use kinesin::datapath::MapStore;
use kinesin_abi::{Direction, DropReason, FrontendKind, frontend_flags, proto};
use kinesin_core::plan::Op;

use crate::packets::{ACK, IP, L4, SYN, checksum, ends, ipv4, packet, seal_ip, tcp, udp};
use crate::rig::*;

/// Asserts an ICMP port unreachable from the service to the client that quotes `quoted`.
#[track_caller]
fn assert_port_unreachable(out: &[u8], quoted: &[u8]) {
    assert_eq!((&out[..6], &out[6..12]), (&CLIENT_MAC[..], &NODE_MAC[..]), "back to where it came from");
    let ip = &out[IP..L4];
    assert_eq!((ip[0], ip[8], ip[9], checksum(ip)), (0x45, 64, proto::ICMP, 0));
    assert_eq!((&ip[12..16], &ip[16..20]), (&VIP.octets()[..], &CLIENT.octets()[..]));
    let len = usize::from(u16::from_be_bytes([ip[2], ip[3]]));
    let icmp = &out[L4..IP + len];
    assert_eq!((icmp[0], icmp[1], &icmp[4..8], checksum(icmp)), (3, 3, &[0; 4][..], 0));
    assert_eq!(&icmp[8..], quoted);
}

#[test]
fn a_service_without_backends_refuses_at_once() {
    isolated(|| {
        let mut rig = Rig::new();
        // An empty set has no slots: the one at its base is another service's.
        rig.maps.apply(&[Op::Slot(0, LOCAL_ID)]).unwrap();
        for (n, sent) in [
            tcp((CLIENT, 40_000), (VIP, TO_NOBODY), SYN),
            udp((CLIENT, 40_000), (VIP, TO_NOBODY), b""),
            udp((CLIENT, 40_000), (VIP, TO_NOBODY), b"odd"),
            udp((CLIENT, 40_000), (VIP, TO_NOBODY), &[7; 1000]),
        ]
        .iter()
        .enumerate()
        {
            let (code, out) = rig.ingress(sent);
            assert_eq!(code, REDIRECT);
            assert_port_unreachable(&out, &sent[IP..]);
            assert_eq!(rig.dropped(DropReason::NoBackend, Direction::Ingress), n as u64 + 1);
        }
        assert_eq!(rig.maps.forwarded().unwrap()[0].1.packets, 0);
    });
}

#[test]
fn a_maglev_service_without_backends_does_not_use_the_table_of_another() {
    isolated(|| {
        let mut rig = Rig::new();
        let flags = frontend_flags::ROUTABLE | frontend_flags::MAGLEV;
        let nobody = value(FrontendKind::LoadBalancer, flags, LOCAL_ID, 0);
        rig.maps.apply(&[Op::PutFrontend(frontend(VIP, TO_NOBODY, proto::TCP), nobody)]).unwrap();
        let sent = tcp((CLIENT, 40_000), (VIP, TO_NOBODY), SYN);
        let (_, out) = rig.ingress(&sent);
        assert_port_unreachable(&out, &sent[IP..]);
    });
}

#[test]
fn the_refusal_quotes_only_the_header_of_udp_without_checksum() {
    isolated(|| {
        let mut rig = Rig::new();
        let mut sent = udp((CLIENT, 40_000), (VIP, TO_NOBODY), b"some payload");
        sent[L4 + 6..L4 + 8].fill(0);
        let (code, out) = rig.ingress(&sent);
        assert_eq!(code, REDIRECT);
        assert_port_unreachable(&out, &sent[IP..L4 + 8]);
    });
}

#[test]
fn the_refusal_does_not_quote_padding() {
    isolated(|| {
        let mut rig = Rig::new();
        let mut sent = tcp((CLIENT, 40_000), (VIP, TO_NOBODY), SYN);
        let quoted = sent[IP..].to_vec();
        sent.extend([0xee; 6]);
        let (_, out) = rig.ingress(&sent);
        assert_port_unreachable(&out, &quoted);
    });
}

#[test]
fn a_long_packet_is_refused_by_its_headers_and_a_setting_makes_refusals_silent() {
    isolated(|| {
        let mut rig = Rig::new();
        let long = udp((CLIENT, 40_000), (VIP, TO_NOBODY), &[0; 1460]);
        let (code, out) = rig.ingress(&long);
        assert_eq!(code, REDIRECT);
        assert_port_unreachable(&out, &long[IP..L4 + 8]);
        rig.maps.write_settings(&kinesin_abi::Settings { flags: 0, ..settings() }).unwrap();
        rig.assert_dropped(&tcp((CLIENT, 40_000), (VIP, TO_NOBODY), SYN), DropReason::NoBackend);
    });
}

#[test]
fn a_set_whose_slots_lead_nowhere_is_no_backend() {
    isolated(|| {
        let mut rig = Rig::new();
        rig.maps.apply(&[Op::Slot(LOCAL_ID, 0)]).unwrap();
        rig.assert_dropped(&tcp((CLIENT, 40_000), (VIP, TO_LOCAL), SYN), DropReason::NoBackend);
    });
}

#[test]
fn a_port_that_no_service_has_is_dropped_instead_of_bouncing() {
    isolated(|| {
        let mut rig = Rig::new();
        for protocol in [proto::TCP, proto::UDP] {
            rig.assert_dropped(&packet(protocol, (CLIENT, 40_000), (VIP, 9999)), DropReason::NoBackend);
        }
        // A packet to the wildcard's own key is no connection either.
        let wildcard = value(kinesin_abi::FrontendKind::LoadBalancer, kinesin_abi::frontend_flags::WILDCARD, 0, 0);
        rig.maps.apply(&[Op::PutFrontend(frontend(VIP, 7, proto::TCP), wildcard)]).unwrap();
        rig.assert_dropped(&tcp((CLIENT, 40_000), (VIP, 7), SYN), DropReason::NoBackend);
    });
}

#[test]
fn a_cluster_ip_is_not_reached_from_outside() {
    isolated(|| {
        let mut rig = Rig::new();
        for protocol in [proto::TCP, proto::UDP] {
            rig.assert_dropped(&packet(protocol, (CLIENT, 40_000), (CLUSTER_IP, 80)), DropReason::IsClusterIp);
        }
    });
}

#[test]
fn other_transports_to_our_addresses_are_dropped() {
    isolated(|| {
        let mut rig = Rig::new();
        for protocol in [47, 50, 136] {
            rig.assert_dropped(&ipv4(CLIENT, VIP, protocol, &[0; 32]), DropReason::UnknownL4);
            rig.assert_untouched(&ipv4(CLIENT, NODE, protocol, &[0; 32]));
        }
    });
}

#[test]
fn the_last_hop_is_not_forwarded() {
    isolated(|| {
        let mut rig = Rig::new();
        let with_ttl = |mut frame: Vec<u8>, ttl| {
            frame[IP + 8] = ttl;
            seal_ip(&mut frame);
            frame
        };
        let sent = tcp((CLIENT, 61_500), (VIP, TO_REMOTE), SYN);
        let mut count = 0;
        let mut assert_exceeded = |rig: &mut Rig, packet: Vec<u8>| {
            let (code, out) = rig.ingress(&packet);
            count += 1;
            assert_eq!((code, rig.dropped(DropReason::TtlExceeded, Direction::Ingress)), (REDIRECT, count));
            let icmp = &out[L4..];
            assert_eq!((&icmp[..2], &icmp[4..8], checksum(icmp)), (&[11, 0][..], &[0; 4][..], 0));
            assert_eq!(&icmp[8..], &packet[IP..L4 + 20]);
            // From whom it was for, to whom it was from.
            assert_eq!((&out[IP + 12..IP + 16], &out[IP + 16..L4]), (&packet[IP + 16..L4], &packet[IP + 12..IP + 16]));
            assert_eq!((checksum(&out[IP..L4]), &out[..6], &out[6..12]), (0, &packet[6..12], &packet[..6]));
        };
        for ttl in [0, 1] {
            assert_exceeded(&mut rig, with_ttl(sent.clone(), ttl));
        }
        let (code, out) = rig.ingress(&with_ttl(sent.clone(), 2));
        assert_eq!((code, crate::packets::ttl(&out), ends(&out).0), (REDIRECT, 1, (NODE, 61_500)));
        // Known connections and replies as well; towards local backends the stack decides.
        assert_exceeded(&mut rig, with_ttl(sent, 1));
        let (from, to) = ends(&out);
        assert_exceeded(&mut rig, with_ttl(tcp(to, from, SYN | ACK), 1));
        assert_eq!(rig.ingress(&with_ttl(tcp((CLIENT, 1), (VIP, TO_LOCAL), SYN), 1)).0, NEXT);
    });
}

#[test]
fn without_a_route_the_packet_is_dropped() {
    isolated(|| {
        let mut rig = Rig::new();
        rig.assert_dropped(&tcp((CLIENT, 40_000), (VIP, TO_ROUTELESS), SYN), DropReason::FibLookupFailed);
        // Also when the route is lost later, in either direction.
        let (_, out) = rig.ingress(&tcp((CLIENT, 40_000), (VIP, TO_REMOTE), SYN));
        ip("route del 10.42.2.0/24");
        ip("route add unreachable 10.42.2.0/24");
        rig.assert_dropped(&tcp((CLIENT, 40_000), (VIP, TO_REMOTE), ACK), DropReason::FibLookupFailed);
        let (from, to) = ends(&out);
        ip("route add unreachable 192.168.1.50/32");
        rig.assert_dropped(&tcp(to, from, SYN | ACK), DropReason::FibLookupFailed);
    });
}

#[test]
fn truncated_packets_to_our_addresses_are_invalid_at_every_length() {
    isolated(|| {
        let mut rig = Rig::new();
        for (whole, header) in [
            (tcp((CLIENT, 40_000), (VIP, TO_LOCAL), SYN), 20),
            (udp((CLIENT, 40_000), (VIP, TO_LOCAL), b"0123456789"), 8),
        ] {
            // Below a whole IP header the kernel's test run refuses the packet itself.
            for len in L4..whole.len() {
                let short = &whole[..len];
                rig.assert_dropped(short, DropReason::InvalidPacket);
                // And with a length field that admits it.
                if (L4..L4 + header).contains(&len) {
                    let mut honest = short.to_vec();
                    honest[IP + 2..IP + 4].copy_from_slice(&((len - IP) as u16).to_be_bytes());
                    seal_ip(&mut honest);
                    rig.assert_dropped(&honest, DropReason::InvalidPacket);
                }
            }
            assert_eq!(rig.ingress(&whole).0, NEXT);
        }
        // Cut short on their way to others they are the stack's.
        rig.assert_untouched(&tcp((CLIENT, 40_000), (NODE, 22), SYN)[..40]);
    });
}

#[test]
fn contradicting_headers_are_invalid() {
    isolated(|| {
        let mut rig = Rig::new();
        let good = tcp((CLIENT, 40_000), (VIP, TO_LOCAL), SYN);
        let patched = |at: usize, byte: u8| {
            let mut frame = good.clone();
            frame[at] = byte;
            frame
        };
        // TCP data offset below five words.
        rig.assert_dropped(&patched(L4 + 12, 0x40), DropReason::InvalidPacket);
        // More IP header than packet; total length longer than the frame.
        rig.assert_dropped(&patched(IP, 0x4f), DropReason::InvalidPacket);
        rig.assert_dropped(&patched(IP + 2, 4), DropReason::InvalidPacket);
        // Another version, or a header shorter than one: the stack's to refuse.
        rig.assert_untouched(&patched(IP, 0x65));
        rig.assert_untouched(&patched(IP, 0x44));
        // UDP length below its header.
        let mut bad = udp((CLIENT, 40_000), (VIP, TO_LOCAL), b"x");
        bad[L4 + 4..L4 + 6].copy_from_slice(&[0, 7]);
        rig.assert_dropped(&bad, DropReason::InvalidPacket);
    });
}

#[test]
fn no_bytes_whatever_confuse_the_programs() {
    isolated(|| {
        let mut rig = Rig::new();
        let quoted = tcp((VIP, TO_REMOTE), (CLIENT, 61_500), ACK);
        let seeds = [
            tcp((CLIENT, 61_500), (VIP, TO_REMOTE), SYN),
            udp((CLIENT, 40_000), (VIP, TO_NOBODY), b"?"),
            crate::packets::arp([0xff; 6], 1, (CLIENT_MAC, CLIENT), ([0; 6], VIP)),
            ipv4(CLIENT, VIP, proto::ICMP, &[8, 0, 0xf7, 0xff, 0, 0, 0, 0]),
            ipv4(CLIENT, VIP, proto::ICMP, &[&[3, 4, 0, 0, 0, 0, 5, 120][..], &quoted[IP..]].concat()),
        ];
        let mut random = 0x2545_f491_4f6c_dd1d_u64;
        for n in 0..3000 {
            let mut frame = seeds[n % seeds.len()].clone();
            for _ in 0..1 + n % 4 {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                let at = 12 + (random as usize >> 8) % (frame.len() - 12);
                frame[at] = random as u8;
            }
            for program in ["cil_from_netdev", "cil_to_netdev", "cil_from_l3dev", "cil_to_l3dev"] {
                let (code, _) = rig.run(program, &frame);
                assert!([NEXT, SHOT, REDIRECT].contains(&code), "{program} returned {code} for {frame:02x?}");
            }
        }
    });
}

#[test]
fn drops_are_counted_with_their_bytes() {
    isolated(|| {
        let mut rig = Rig::new();
        let sent = tcp((CLIENT, 40_000), (Ipv4Addr::new(10, 96, 0, 1), 80), SYN);
        rig.assert_dropped(&sent, DropReason::IsClusterIp);
        rig.assert_dropped(&sent, DropReason::IsClusterIp);
        let drops = rig.maps.drops().unwrap();
        let [(reason, way, counter)] = drops[..] else { panic!("{drops:?}") };
        assert_eq!((reason, way, counter.bytes), (DropReason::IsClusterIp, Direction::Ingress, 2 * sent.len() as u64));
        let dump = rig.maps.dump_raw("drops").unwrap();
        assert_eq!(dump, [("ingress 174 Is a ClusterIP".to_owned(), "2 packets, 108 bytes".to_owned())]);
    });
}
