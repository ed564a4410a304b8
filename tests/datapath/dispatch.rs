//! Dispatch `l2`: frames that go on as they are to the node of their backend, and those that a peer hands on to us.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use kinesin::datapath::MapStore;
use kinesin_abi::{
    Addr, Backend, BackendState, DropReason, FLOW_HANDED_ON, FrontendKind, PEER_ACROSS, PEER_TAKES_NEW, PeerKey,
    PeerValue, Timeouts, frontend_flags, mac_words, proto,
};
use kinesin_core::plan::Op;

use crate::flows::decode;
use crate::packets::{ACK, End, FIN, IP, L4, RST, SYN, checksum, ends, ipv4, packet, seal_ip, tcp, ttl};
use crate::rig::*;

const PEER: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 11);
pub(crate) const PEER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0x11];
pub(crate) const TAG: u32 = 0xabcdef;
const MIXED: u16 = 90;
const NODE_PORT: u16 = 30_080;

pub(crate) fn peer(rig: &Rig, flags: u16) {
    let value = PeerValue {
        mac: mac_words(PEER_MAC),
        flags,
        ifindex: rig.lan,
        node: TAG,
        ipv4: u32::from_ne_bytes(PEER.octets()),
        ipv6: Addr::UNSPECIFIED,
    };
    for key in [PeerKey::of_node(TAG), PeerKey::of_mac(PEER_MAC)] {
        rig.maps.put_peer(&key, &value).unwrap();
    }
}

/// A rig whose remote pods are on a peer, reached by `l2`; at [`MIXED`], and at NodePorts, ten local pods before ten
/// remote ones.
pub(crate) fn rig() -> Rig {
    let rig = Rig::new();
    peer(&rig, PEER_TAKES_NEW);
    let mut ops = Vec::new();
    for (protocol, first) in [(proto::TCP, 0), (proto::UDP, 10)] {
        let remote = Backend { flags: Backend::flags_of(false, TAG), ..backend(REMOTE_POD, 8080, protocol, false) };
        ops.push(Op::Backend(first + REMOTE_ID, remote));
        let base = 100 + u32::from(protocol) * 20;
        for place in 0..20 {
            let local = place < 10;
            let addr =
                if local { Ipv4Addr::new(10, 42, 1, 100 + place) } else { Ipv4Addr::new(10, 42, 2, 100 + place) };
            let flags = Backend::flags_of(local, if local { 1 } else { TAG });
            let id = base + u32::from(place);
            ops.push(Op::Backend(id, Backend { flags, ..backend(addr, 8080, protocol, local) }));
            ops.push(Op::Slot(id, id));
        }
        let flags = frontend_flags::ROUTABLE | frontend_flags::FORWARDING_L2;
        for (port, kind, base, count) in [
            (TO_REMOTE, FrontendKind::LoadBalancer, first + REMOTE_ID, 1),
            (MIXED, FrontendKind::LoadBalancer, base, 20),
        ] {
            ops.push(Op::PutFrontend(frontend(VIP, port, protocol), value(kind, flags, base, count)));
        }
        for (addr, flags) in [(NODE, flags), (Ipv4Addr::UNSPECIFIED, frontend_flags::ROUTABLE)] {
            let value = value(FrontendKind::NodePort, flags, base, 20);
            ops.push(Op::PutFrontend(frontend(addr, NODE_PORT, protocol), value));
        }
    }
    rig.maps.apply(&ops).unwrap();
    rig
}

/// As the peer sends it, one hop later.
fn from_peer(mut frame: Vec<u8>) -> Vec<u8> {
    frame[6..12].copy_from_slice(&PEER_MAC);
    frame[IP + 8] -= 1;
    seal_ip(&mut frame);
    frame
}

/// What a frame must look like when it goes on to the peer.
pub(crate) fn handed_on(frame: &[u8]) -> Vec<u8> {
    let mut out = frame.to_vec();
    out[..6].copy_from_slice(&PEER_MAC);
    out[6..12].copy_from_slice(&NODE_MAC);
    out[IP + 8] -= 1;
    seal_ip(&mut out);
    out
}

/// Where connections are.
const TABLES: [&str; 2] = ["flows", "transient"];

fn flows(rig: &Rig) -> Vec<kinesin_abi::FlowValue> {
    TABLES
        .iter()
        .flat_map(|table| rig.maps.raw_entries(table).unwrap())
        .map(|(key, value)| decode(&key, &value).1)
        .collect()
}

fn client(port: u16) -> End {
    (CLIENT, port)
}

#[test]
fn a_packet_for_a_neighbours_pod_goes_on_as_it_is_and_leaves_one_entry() {
    isolated(|| {
        let mut rig = rig();
        for protocol in [proto::TCP, proto::UDP] {
            let frame = packet(protocol, client(40_000), (VIP, TO_REMOTE));
            // By the device, or, of a node that is a container, across it.
            for flags in [PEER_TAKES_NEW, PEER_TAKES_NEW | PEER_ACROSS] {
                peer(&rig, flags);
                assert_eq!(rig.ingress(&frame), (REDIRECT, handed_on(&frame)));
            }
        }
        let flows = flows(&rig);
        assert_eq!(flows.len(), 2, "the replies do not come by here");
        assert!(flows.iter().all(|flow| flow.flags & FLOW_HANDED_ON != 0));
    });
}

#[test]
fn a_known_connection_stays_with_its_node_when_that_takes_no_new_ones() {
    isolated(|| {
        let mut rig = rig();
        let old = tcp(client(40_000), (VIP, TO_REMOTE), SYN);
        assert_eq!(rig.ingress(&old), (REDIRECT, handed_on(&old)));
        peer(&rig, 0);
        let more = tcp(client(40_000), (VIP, TO_REMOTE), ACK);
        assert_eq!(rig.ingress(&more), (REDIRECT, handed_on(&more)));
        // A new one goes with this node's address.
        let (code, out) = rig.ingress(&tcp(client(40_001), (VIP, TO_REMOTE), SYN));
        let (from, to) = ends(&out);
        assert_eq!((code, from.0, to), (REDIRECT, NODE, (REMOTE_POD, 8080)));
        // And one of before that the mode changes under.
        rig.maps.delete_peer(&PeerKey::of_node(TAG)).unwrap();
        let (_, out) = rig.ingress(&more);
        assert_eq!(ends(&out).0.0, NODE, "without its node it begins anew");
    });
}

#[test]
fn a_frontend_without_the_way_goes_by_snat() {
    isolated(|| {
        let mut rig = rig();
        let flags = frontend_flags::ROUTABLE;
        let snat = value(FrontendKind::LoadBalancer, flags, REMOTE_ID, 1);
        let first = tcp(client(40_000), (VIP, TO_REMOTE), SYN);
        assert_eq!(rig.ingress(&first).1, handed_on(&first));
        rig.maps.apply(&[Op::PutFrontend(frontend(VIP, TO_REMOTE, proto::TCP), snat)]).unwrap();
        assert_eq!(ends(&rig.ingress(&tcp(client(40_001), (VIP, TO_REMOTE), SYN)).1).0.0, NODE);
        let more = tcp(client(40_000), (VIP, TO_REMOTE), ACK);
        assert_eq!(rig.ingress(&more).1, handed_on(&more), "connections keep the way that they began with");
    });
}

#[test]
fn what_a_peer_hands_on_goes_to_the_pods_of_this_node_only() {
    isolated(|| {
        let mut rig = rig();
        for protocol in [proto::TCP, proto::UDP] {
            let mut seen = BTreeSet::new();
            for port in 40_000..40_200 {
                let (code, out) = rig.ingress(&from_peer(packet(protocol, client(port), (VIP, MIXED))));
                let (from, to) = ends(&out);
                assert_eq!((code, from, ttl(&out)), (NEXT, client(port), 63));
                assert_eq!(to.0.octets()[..3], [10, 42, 1], "{to:?}");
                seen.insert(to.0);
            }
            assert_eq!(seen.len(), 10, "each of them gets some");
        }
    });
}

#[test]
fn the_own_pods_are_found_in_sets_of_every_size() {
    isolated(|| {
        let mut rig = rig();
        let set = |locals: u32, count: u32| {
            let mut ops = Vec::new();
            for place in 0..count {
                let local = place < locals;
                let addr = Ipv4Addr::from(0x0a2a_0000 + if local { 0x100 } else { 0x200 } + place);
                let flags = Backend::flags_of(local, if local { 1 } else { TAG });
                let id = 600 + place;
                ops.push(Op::Backend(id, Backend { flags, ..backend(addr, 8080, proto::TCP, local) }));
                ops.push(Op::Slot(id, id));
            }
            let flags = frontend_flags::ROUTABLE | frontend_flags::FORWARDING_L2;
            ops.push(Op::PutFrontend(
                frontend(VIP, 91, proto::TCP),
                value(FrontendKind::LoadBalancer, flags, 600, count),
            ));
            ops
        };
        let mut port = 20_000;
        for (locals, count) in [(1, 1), (1, 2), (1, 200), (2, 3), (3, 3), (100, 200), (199, 200), (200, 200)] {
            rig.maps.apply(&set(locals, count)).unwrap();
            for _ in 0..8 {
                port += 1;
                let (code, out) = rig.ingress(&from_peer(tcp(client(port), (VIP, 91), SYN)));
                let to = u32::from(ends(&out).1.0) - 0x0a2a_0100;
                assert!(code == NEXT && to < locals, "{locals} of {count}: {to}");
            }
        }
        // None at all: on with this node's address, never as it came.
        rig.maps.apply(&set(0, 200)).unwrap();
        let (code, out) = rig.ingress(&from_peer(tcp(client(port + 1), (VIP, 91), SYN)));
        assert_eq!((code, ends(&out).0.0), (REDIRECT, NODE));
    });
}

#[test]
fn nothing_goes_back_to_where_it_came_from() {
    isolated(|| {
        let mut rig = rig();
        // The address is ours, so this is a client behind the peer, whose pod was chosen.
        rig.maps.put_l2(kinesin_abi::L2Key { addr: VIP.into(), ifindex: rig.lan }).unwrap();
        let (code, out) = rig.ingress(&from_peer(tcp(client(40_000), (VIP, TO_REMOTE), SYN)));
        assert_eq!((code, ends(&out).0.0), (REDIRECT, NODE));
        // One whose packets used to come from elsewhere.
        let first = tcp(client(40_001), (VIP, TO_REMOTE), SYN);
        assert_eq!(rig.ingress(&first).1, handed_on(&first));
        let (code, out) = rig.ingress(&from_peer(tcp(client(40_001), (VIP, TO_REMOTE), ACK)));
        assert_eq!((code, ends(&out).0.0), (REDIRECT, NODE));
    });
}

#[test]
fn a_client_on_a_peer_gets_pods_of_all_nodes() {
    isolated(|| {
        let mut rig = rig();
        let mut ways = BTreeSet::new();
        for port in 40_000..40_100 {
            let (code, _) = rig.ingress(&from_peer(tcp((PEER, port), (VIP, MIXED), SYN)));
            ways.insert(code);
        }
        assert_eq!(ways, BTreeSet::from([NEXT, REDIRECT]));
    });
}

#[test]
fn node_ports_are_handed_on_and_taken_for_the_peers_own_address() {
    isolated(|| {
        let mut rig = rig();
        for protocol in [proto::TCP, proto::UDP] {
            // Ours: some stay here, the others go on as they are.
            let mut out = BTreeSet::new();
            for port in 40_000..40_060 {
                let frame = packet(protocol, client(port), (NODE, NODE_PORT));
                let (code, sent) = rig.ingress(&frame);
                if code == REDIRECT {
                    assert_eq!(sent, handed_on(&frame));
                }
                out.insert(code);
            }
            assert_eq!(out, BTreeSet::from([NEXT, REDIRECT]));
            // The peer's: to pods here, and the replies have its address.
            let (code, sent) = rig.ingress(&from_peer(packet(protocol, client(50_000), (PEER, NODE_PORT))));
            let (from, to) = ends(&sent);
            assert_eq!((code, from, to.0.octets()[2]), (NEXT, client(50_000), 1));
            let reply = match protocol {
                proto::TCP => tcp(to, from, SYN | ACK),
                _ => crate::packets::udp(to, from, b"answer"),
            };
            let (_, reply) = rig.egress(&reply);
            assert_eq!(ends(&reply), ((PEER, NODE_PORT), client(50_000)));
        }
        // What a peer routes to others, or to ports of no service, is not ours.
        for to in [(REMOTE_POD, NODE_PORT), (PEER, NODE_PORT + 1), (PEER, 8080)] {
            rig.assert_untouched(&from_peer(tcp(client(51_000), to, SYN)));
        }
        rig.assert_untouched(&tcp(client(51_000), (PEER, NODE_PORT), SYN));
    });
}

#[test]
fn hops_are_counted_and_run_out() {
    isolated(|| {
        let mut rig = rig();
        for left in [0, 1] {
            let mut frame = tcp(client(40_000), (VIP, TO_REMOTE), SYN);
            frame[IP + 8] = left;
            seal_ip(&mut frame);
            let before = rig.dropped(DropReason::TtlExceeded, kinesin_abi::Direction::Ingress);
            rig.ingress(&frame);
            assert_eq!(rig.dropped(DropReason::TtlExceeded, kinesin_abi::Direction::Ingress), before + 1);
        }
        assert_eq!(flows(&rig), [], "nothing is remembered of them");
    });
}

#[test]
fn errors_about_what_was_handed_on_follow_it() {
    isolated(|| {
        let mut rig = rig();
        let frame = tcp(client(40_000), (VIP, TO_REMOTE), SYN);
        rig.ingress(&frame);
        // Fragmentation needed, from a router on the way back: it quotes the reply.
        let reply = tcp((VIP, TO_REMOTE), client(40_000), SYN | ACK);
        let mut error = vec![3, 4, 0, 0, 0, 0, 5, 0];
        error.extend(&reply[IP..L4 + 20]);
        let check = checksum(&error);
        error[2..4].copy_from_slice(&check.to_be_bytes());
        let error = ipv4(Ipv4Addr::new(192, 168, 1, 1), VIP, proto::ICMP, &error);
        assert_eq!(rig.ingress(&error), (REDIRECT, handed_on(&error)));
    });
}

#[test]
fn a_client_that_begins_again_from_the_same_port_is_given_a_backend_anew_once_it_has_ended() {
    isolated(|| {
        let mut rig = rig();
        let to = (VIP, TO_REMOTE);
        for end in [FIN | ACK, RST] {
            let first = tcp(client(40_000), to, SYN);
            assert_eq!(rig.ingress(&first).1, handed_on(&first));
            rig.ingress(&tcp(client(40_000), to, end));
            // Only who begins anew meets that the peer takes nothing new.
            peer(&rig, 0);
            let last = tcp(client(40_000), to, ACK);
            assert_eq!(rig.ingress(&last).1, handed_on(&last));
            assert_eq!(ends(&rig.ingress(&first).1).0.0, NODE);
            for table in TABLES {
                for (key, _) in rig.maps.raw_entries(table).unwrap() {
                    rig.maps.raw_delete(table, &key).unwrap();
                }
            }
            peer(&rig, PEER_TAKES_NEW);
        }
        // A backend that is gone is no reason to stay either.
        let first = tcp(client(40_002), to, SYN);
        assert_eq!(rig.ingress(&first).1, handed_on(&first));
        let gone = Backend {
            state: BackendState::TerminatingNotServing as u8,
            flags: Backend::flags_of(false, TAG),
            ..backend(REMOTE_POD, 8080, proto::TCP, false)
        };
        let local = Op::Slot(REMOTE_ID, LOCAL_ID);
        rig.maps.apply(&[Op::Backend(REMOTE_ID, gone), local]).unwrap();
        let last = tcp(client(40_002), to, ACK);
        assert_eq!(rig.ingress(&last).1, handed_on(&last), "an open connection may end in peace");
        assert_eq!(ends(&rig.ingress(&first).1).1.0, LOCAL_POD);
    });
}

#[test]
fn a_handed_on_connection_that_its_client_has_closed_is_kept_while_answers_are_acknowledged_and_not_for_hours() {
    isolated(|| {
        let mut rig = rig();
        let to = (VIP, TO_REMOTE);
        let collect = |rig: &Rig, later: u64| {
            let found = rig.maps.collect_flows(&Timeouts::DEFAULT, now() + later * 1_000_000_000).unwrap();
            found.settled.removed()
        };
        for (port, last, after) in [(40_000, ACK, 8_000), (40_001, FIN | ACK, 60), (40_002, RST, 10)] {
            for flags in [SYN, ACK, last] {
                let frame = tcp(client(port), to, flags);
                assert_eq!(rig.ingress(&frame), (REDIRECT, handed_on(&frame)));
            }
            // The backend may send for as long as it likes; who gets that acknowledges it, and is still known.
            assert_eq!(collect(&rig, after - 1), 0, "{port}");
            peer(&rig, 0);
            let frame = tcp(client(port), to, ACK);
            assert_eq!(rig.ingress(&frame), (REDIRECT, handed_on(&frame)));
            peer(&rig, PEER_TAKES_NEW);
            assert_eq!(collect(&rig, after + 2), 1, "{port}");
        }
    });
}
