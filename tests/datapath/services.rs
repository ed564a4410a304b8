//! New connections: who gets them, and what becomes of the packet.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::sync::Arc;

use kinesin::datapath::MapStore;
use kinesin_abi::{Direction, FrontendKind, MAGLEV_TABLE_SIZE, frontend_flags, maglev_hash, maglev_index, proto};
use kinesin_core::plan::Op;

use crate::packets::{IP, L4, SYN, ends, packet, seal, seal_ip, tcp, ttl, udp};
use crate::rig::*;

const TRANSPORTS: [u8; 2] = [proto::TCP, proto::UDP];

#[test]
fn a_local_backend_gets_the_packet_with_the_clients_address() {
    isolated(|| {
        let mut rig = Rig::new();
        for protocol in TRANSPORTS {
            let (code, out) = rig.ingress(&packet(protocol, (CLIENT, 40_000), (VIP, TO_LOCAL)));
            assert_eq!((code, ends(&out)), (NEXT, ((CLIENT, 40_000), (LOCAL_POD, 8080))));
            assert_eq!((ttl(&out), &out[..IP]), (64, &packet(protocol, (CLIENT, 1), (VIP, 1))[..IP]));
        }
        assert_eq!(rig.maps.forwarded().unwrap()[0].1.packets, 2);
    });
}

#[test]
fn a_remote_backend_gets_the_packet_from_the_nodes_address() {
    isolated(|| {
        let mut rig = Rig::new();
        for protocol in TRANSPORTS {
            let (code, out) = rig.ingress(&packet(protocol, (CLIENT, 61_500), (VIP, TO_REMOTE)));
            // The client's own port lies in the range for translation, so it is kept.
            assert_eq!((code, ends(&out)), (REDIRECT, ((NODE, 61_500), (REMOTE_POD, 8080))));
            assert_eq!(ttl(&out), 63);
        }
    });
}

#[test]
fn a_source_port_outside_the_range_is_replaced_by_one_inside() {
    isolated(|| {
        let mut rig = Rig::new();
        let ports: BTreeSet<u16> = (0..50)
            .map(|n| {
                let (code, out) = rig.ingress(&tcp((CLIENT, 40_000 + n), (VIP, TO_REMOTE), SYN));
                assert_eq!(code, REDIRECT);
                ends(&out).0.1
            })
            .collect();
        assert_eq!(ports.len(), 50, "no two connections share a port");
        assert!(ports.iter().all(|port| (61_000..=65_000).contains(port)), "{ports:?}");
    });
}

#[test]
fn two_clients_with_one_port_do_not_share_the_nodes_port() {
    isolated(|| {
        let mut rig = Rig::new();
        let other = Ipv4Addr::new(192, 168, 1, 51);
        let (_, first) = rig.ingress(&tcp((CLIENT, 61_500), (VIP, TO_REMOTE), SYN));
        let (_, second) = rig.ingress(&tcp((other, 61_500), (VIP, TO_REMOTE), SYN));
        assert_eq!(ends(&first).0, (NODE, 61_500));
        assert_ne!(ends(&second).0, (NODE, 61_500));
    });
}

#[test]
fn one_client_reaches_one_backend_through_two_addresses_from_one_port() {
    isolated(|| {
        let mut rig = Rig::new();
        let second_vip = Ipv4Addr::new(10, 0, 0, 101);
        let local = value(FrontendKind::LoadBalancer, frontend_flags::ROUTABLE, LOCAL_ID, 1);
        rig.maps.apply(&[Op::PutFrontend(frontend(second_vip, TO_LOCAL, proto::TCP), local)]).unwrap();
        for vip in [VIP, second_vip] {
            let (_, out) = rig.ingress(&tcp((CLIENT, 40_000), (vip, TO_LOCAL), SYN));
            let (from, to) = ends(&out);
            assert_eq!((from.0, to), (CLIENT, (LOCAL_POD, 8080)));
            // Each connection gets its replies from the address that it was made to.
            let (_, reply) = rig.egress(&tcp(to, from, SYN | crate::packets::ACK));
            assert_eq!(ends(&reply), ((vip, TO_LOCAL), (CLIENT, 40_000)));
        }
    });
}

#[test]
fn connections_spread_over_the_backends_at_random() {
    isolated(|| {
        let mut rig = Rig::new();
        let both = value(FrontendKind::LoadBalancer, frontend_flags::ROUTABLE, LOCAL_ID, 2);
        rig.maps.apply(&[Op::PutFrontend(frontend(VIP, 90, proto::TCP), both)]).unwrap();
        let local = (0..400).filter(|n| rig.ingress(&tcp((CLIENT, 20_000 + n), (VIP, 90), SYN)).0 == NEXT).count();
        assert!((100..300).contains(&local), "{local} of 400");
    });
}

/// Where in a table of so many entries the client's connection from a port is.
fn index(port: u16, size: u32) -> u32 {
    let [sport, dport] = [port, TO_MAGLEV].map(kinesin_abi::Be16::new);
    maglev_index(maglev_hash(&CLIENT.into(), sport, dport, proto::TCP, settings().maglev_seed), size)
}

#[test]
fn maglev_chooses_by_the_table_and_leaves_the_destination_address_out() {
    isolated(|| {
        let mut rig = Rig::new();
        let second_vip = Ipv4Addr::new(10, 0, 0, 101);
        let maglev = value(FrontendKind::LoadBalancer, frontend_flags::ROUTABLE | frontend_flags::MAGLEV, LOCAL_ID, 2);
        rig.maps.apply(&[Op::PutFrontend(frontend(second_vip, TO_MAGLEV, proto::TCP), maglev)]).unwrap();
        for port in 30_000..30_200 {
            let index = index(port, MAGLEV_TABLE_SIZE);
            let expected = if index.is_multiple_of(2) { LOCAL_POD } else { REMOTE_POD };
            for vip in [VIP, second_vip] {
                let (_, out) = rig.ingress(&tcp((CLIENT, port), (vip, TO_MAGLEV), SYN));
                assert_eq!(ends(&out).1, (expected, 8080));
            }
        }
    });
}

#[test]
fn maglev_tables_have_the_size_that_is_asked_for_also_where_another_one_was() {
    isolated(|| {
        let mut rig = Rig::new();
        let mut ports = 30_000..;
        for size in [251, 131_071, 65_521, MAGLEV_TABLE_SIZE, 2039] {
            rig.reload(size);
            assert!(
                rig.datapath.hooks().iter().all(|hook| hook.error.is_none()),
                "{size}: {:#?}",
                rig.datapath.hooks()
            );
            let lost: usize = rig.datapath.migrations().iter().map(|table| table.lost).sum();
            assert_eq!(
                (rig.maps.read().unwrap().maglev, lost),
                (Vec::new(), 0),
                "tables of another size are made anew"
            );
            // Until then any backend serves.
            let (_, out) = rig.ingress(&tcp((CLIENT, ports.next().unwrap()), (VIP, TO_MAGLEV), SYN));
            assert!([LOCAL_POD, REMOTE_POD].contains(&ends(&out).1.0));
            let table: Arc<[u32]> = (0..size).map(|i| LOCAL_ID + i % 2).collect();
            rig.maps.apply(&[Op::PutMaglev(LOCAL_ID, table.clone())]).unwrap();
            assert!(rig.maps.read().unwrap().maglev == [(LOCAL_ID, table)], "{size}");
            for port in ports.by_ref().take(100) {
                let expected = if index(port, size).is_multiple_of(2) { LOCAL_POD } else { REMOTE_POD };
                let (_, out) = rig.ingress(&tcp((CLIENT, port), (VIP, TO_MAGLEV), SYN));
                assert_eq!(ends(&out).1, (expected, 8080), "{size}");
            }
            let error = rig.maps.apply(&[Op::PutMaglev(LOCAL_ID, vec![1; 100].into())]).unwrap_err();
            assert!(error.to_string().contains("entries, not 100"), "{error}");
        }
    });
}

#[test]
fn without_its_table_a_maglev_service_still_works() {
    isolated(|| {
        let mut rig = Rig::new();
        rig.maps.apply(&[Op::DeleteMaglev(LOCAL_ID)]).unwrap();
        let (code, _) = rig.ingress(&tcp((CLIENT, 40_000), (VIP, TO_MAGLEV), SYN));
        assert!(code == NEXT || code == REDIRECT);
        assert_eq!(rig.maps.forwarded().unwrap()[0], (Direction::Ingress, rig.maps.forwarded().unwrap()[0].1));
        assert_eq!(rig.maps.forwarded().unwrap()[0].1.packets, 1);
    });
}

#[test]
fn a_slot_that_is_being_rewritten_does_not_lose_the_connection() {
    isolated(|| {
        let mut rig = Rig::new();
        // Of three slots one leads nowhere: an empty one, and later a free backend.
        let three = value(FrontendKind::LoadBalancer, frontend_flags::ROUTABLE, 100, 3);
        let ops =
            [Op::Slot(100, LOCAL_ID), Op::Slot(102, LOCAL_ID), Op::PutFrontend(frontend(VIP, 90, proto::TCP), three)];
        rig.maps.apply(&ops).unwrap();
        for slot in [0, 999] {
            rig.maps.apply(&[Op::Slot(101, slot)]).unwrap();
            for n in 0..40 {
                assert_eq!(rig.ingress(&tcp((CLIENT, 20_000 + n), (VIP, 90), SYN)).0, NEXT);
            }
        }
    });
}

#[test]
fn a_node_port_on_the_nodes_own_address_is_a_frontend_like_any_other() {
    isolated(|| {
        let mut rig = Rig::new();
        let node_port = value(FrontendKind::NodePort, frontend_flags::ROUTABLE, LOCAL_ID, 2);
        rig.maps.apply(&[Op::PutFrontend(frontend(NODE, 30_080, proto::TCP), node_port)]).unwrap();
        let (_, out) = rig.ingress(&tcp((CLIENT, 40_000), (NODE, 30_080), SYN));
        assert_eq!(ends(&out).1.1, 8080);
        // Other ports of the node are the node's.
        rig.assert_untouched(&tcp((CLIENT, 40_000), (NODE, 22), SYN));
    });
}

#[test]
fn packets_to_others_and_other_protocols_are_left_alone() {
    isolated(|| {
        let mut rig = Rig::new();
        rig.assert_untouched(&tcp((CLIENT, 40_000), (Ipv4Addr::new(192, 0, 2, 1), 80), SYN));
        rig.assert_untouched(&udp((CLIENT, 40_000), (NODE, 53), b"?"));
        // ICMP to the node is the stack's.
        rig.assert_untouched(&crate::packets::ipv4(CLIENT, NODE, 1, &[8, 0, 0xf7, 0xff, 0, 0, 0, 0]));
        // IPv6 passes for now.
        let mut v6 = vec![0x60; 60];
        v6[..12].copy_from_slice(&tcp((CLIENT, 1), (VIP, 1), SYN)[..12]);
        v6[12..14].copy_from_slice(&[0x86, 0xdd]);
        rig.assert_untouched(&v6);
    });
}

#[test]
fn r55_a_frame_for_another_mac_is_left_alone() {
    // Several nodes see a flooded frame, one is addressed.
    isolated(|| {
        let mut rig = Rig::new();
        let mut flooded = tcp((CLIENT, 40_000), (VIP, TO_LOCAL), SYN);
        flooded[..6].copy_from_slice(&[2, 0, 0, 0, 0, 0x77]);
        rig.assert_untouched(&flooded);
        flooded[..6].fill(0xff);
        rig.assert_untouched(&flooded);
    });
}

#[test]
fn ip_options_are_kept_and_the_ports_behind_them_found() {
    isolated(|| {
        let mut rig = Rig::new();
        let plain = tcp((CLIENT, 40_000), (VIP, TO_LOCAL), SYN);
        let mut optioned = plain[..L4].to_vec();
        optioned.extend([1; 8]);
        optioned.extend(&plain[L4..]);
        optioned[IP] = 0x47;
        optioned[IP + 2..IP + 4].copy_from_slice(&48u16.to_be_bytes());
        seal_ip(&mut optioned);
        let (code, out) = rig.ingress(&optioned);
        assert_eq!((code, &out[L4..L4 + 8], out.len()), (NEXT, &[1; 8][..], optioned.len()));
        // Without the options it must be a packet with right checksums.
        let mut stripped = [&out[..L4], &out[L4 + 8..]].concat();
        stripped[IP] = 0x45;
        stripped[IP + 2..IP + 4].copy_from_slice(&40u16.to_be_bytes());
        assert_eq!(crate::packets::checksum(&out[IP..L4 + 8]), 0);
        seal_ip(&mut stripped);
        assert_eq!(ends(&stripped), ((CLIENT, 40_000), (LOCAL_POD, 8080)));
    });
}

#[test]
fn a_udp_packet_without_checksum_stays_without() {
    isolated(|| {
        let mut rig = Rig::new();
        let mut bare = udp((CLIENT, 40_000), (VIP, TO_LOCAL), b"x");
        bare[L4 + 6..L4 + 8].fill(0);
        let (_, out) = rig.ingress(&bare);
        assert_eq!(out[L4 + 6..L4 + 8], [0, 0]);
        assert_eq!(ends(&out).1, (LOCAL_POD, 8080));
    });
}

#[test]
fn payloads_of_any_length_and_content_keep_right_checksums() {
    isolated(|| {
        let mut rig = Rig::new();
        for n in 0..200u16 {
            let payload: Vec<u8> = (0..n).map(|i| (i * 31 + n) as u8).collect();
            let mut sent = udp((CLIENT, 20_000 + n), (VIP, if n % 2 == 0 { TO_LOCAL } else { TO_REMOTE }), &payload);
            seal(&mut sent);
            let (_, out) = rig.ingress(&sent);
            let _ = ends(&out);
            assert_eq!(out[L4 + 8..], payload);
        }
    });
}

#[test]
fn without_ip_forwarding_the_packet_goes_back_to_its_lan() {
    isolated(|| {
        let mut rig = Rig::new();
        forwarding(false);
        let (code, out) = rig.ingress(&tcp((CLIENT, 40_000), (VIP, TO_REMOTE), SYN));
        assert_eq!((code, ends(&out).1), (REDIRECT, (REMOTE_POD, 8080)));
    });
}
