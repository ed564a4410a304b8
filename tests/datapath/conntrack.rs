//! What connections are to the programs, packet by packet, the same for both families: half open, reset, closed in each
//! order, a tuple used again, and ports of the node that two clients want.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use kinesin::datapath::MapStore;
use kinesin_abi::{DropReason, Settings, proto};
use kinesin_core::plan::Op;

use crate::packets::{self, ACK, FIN, RST, SYN, tcp};
use crate::packets6::{self, tcp6};
use crate::rig::*;

type End = (IpAddr, u16);

/// From the id of the first remote backend to that of the other, which no service of the rig has.
const SECOND: u32 = 60;

/// A segment from one end to another.
fn segment(from: End, to: End, flags: u8) -> Vec<u8> {
    match (from.0, to.0) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => tcp((src, from.1), (dst, to.1), flags),
        (IpAddr::V6(src), IpAddr::V6(dst)) => tcp6((src, from.1), (dst, to.1), flags),
        mixed => panic!("{mixed:?} are of two families"),
    }
}

/// Source and destination of a segment, whose checksums are right.
#[track_caller]
fn ends(frame: &[u8]) -> (End, End) {
    if frame[12..14] == [8, 0] {
        let ((src, sport), (dst, dport)) = packets::ends(frame);
        ((src.into(), sport), (dst.into(), dport))
    } else {
        let ((src, sport), (dst, dport)) = packets6::ends6(frame);
        ((src.into(), sport), (dst.into(), dport))
    }
}

/// One family's client, service and pods, and what its programs do.
struct Side {
    rig: Rig,
    client: IpAddr,
    vip: IpAddr,
    /// The remote backend first chosen, and another.
    pods: [IpAddr; 2],
    /// Id of the remote backend, and the slot of the service's only member.
    id: u32,
    six: bool,
}

impl Side {
    fn each(test: impl Fn(&mut Self) + Send + Sync + 'static) {
        isolated(move || {
            let second = Ipv4Addr::new(10, 42, 2, 6);
            let second6 = Ipv6Addr::new(0xfd00, 0x42, 2, 0, 0, 0, 0, 6);
            let rig = Rig::dual();
            let pods = [REMOTE_POD.into(), second.into()];
            let mut four = Self { rig, client: CLIENT.into(), vip: VIP.into(), pods, id: REMOTE_ID, six: false };
            test(&mut four);
            let pods = [REMOTE_POD6.into(), second6.into()];
            let (client, vip, id) = (CLIENT6.into(), VIP6.into(), SIX + REMOTE_ID);
            test(&mut Self { rig: four.rig, client, vip, pods, id, six: true });
        });
    }

    fn service(&self) -> End {
        (self.vip, TO_REMOTE)
    }

    /// What ingress makes of a segment: its ends, or none where it was dropped.
    #[track_caller]
    fn sends(&mut self, from: End, to: End, flags: u8) -> Option<(End, End)> {
        let program = if self.six { "cil_from_netdev6" } else { "cil_from_netdev" };
        let (code, out) = self.rig.run(program, &segment(from, to, flags));
        (code == REDIRECT).then(|| ends(&out))
    }

    /// The client sends to the service; node and pod as the LAN behind sees them.
    #[track_caller]
    fn asks(&mut self, port: u16, flags: u8) -> (End, End) {
        self.sends((self.client, port), self.service(), flags).expect("it is forwarded")
    }

    /// Which pod gets a segment of the client.
    #[track_caller]
    fn reaches(&mut self, port: u16, flags: u8) -> IpAddr {
        self.asks(port, flags).1.0
    }

    /// The pod answers; asserts that the client hears the service.
    #[track_caller]
    fn answers(&mut self, pod: End, node: End, port: u16, flags: u8) {
        let heard = self.sends(pod, node, flags).expect("it is forwarded");
        assert_eq!(heard, (self.service(), (self.client, port)));
    }

    /// Exchanges the service's backend; the one before keeps what it has.
    fn serve_by(&self, pod: usize) {
        let second = self.id + SECOND;
        let slot = if pod == 0 { self.id } else { second };
        let ops = [Op::Backend(second, backend(self.pods[1], 8080, proto::TCP, false)), Op::Slot(self.id, slot)];
        self.rig.maps.apply(&ops).unwrap();
    }
}

#[test]
fn a_half_open_connection_is_one_however_often_it_is_tried() {
    Side::each(|side| {
        let first = side.asks(61_500, SYN);
        side.serve_by(1);
        for _ in 0..3 {
            assert_eq!(side.asks(61_500, SYN), first);
        }
        side.answers(first.1, first.0, 61_500, SYN | ACK);
        assert_eq!(side.asks(61_500, ACK), first);
        // Another one goes to the new backend.
        assert_eq!(side.reaches(61_501, SYN), side.pods[1]);
        side.serve_by(0);
    });
}

#[test]
fn a_reset_from_either_side_ends_a_connection() {
    Side::each(|side| {
        for by_client in [true, false] {
            let port = if by_client { 61_510 } else { 61_511 };
            let (node, pod) = side.asks(port, SYN);
            side.answers(pod, node, port, SYN | ACK);
            side.serve_by(1);
            if by_client {
                side.asks(port, RST);
            } else {
                side.answers(pod, node, port, RST | ACK);
            }
            // What is still on its way goes where it belongs; a new one begins anew.
            assert_eq!(side.reaches(port, ACK), side.pods[0]);
            assert_eq!(side.reaches(port, SYN), side.pods[1]);
            side.serve_by(0);
        }
    });
}

#[test]
fn both_sides_close_a_connection_in_each_order() {
    Side::each(|side| {
        // Whose FINs come, in order; true is the client's.
        for (n, order) in [[true, false], [false, true]].into_iter().enumerate() {
            let port = 61_520 + n as u16;
            let (node, pod) = side.asks(port, SYN);
            side.answers(pod, node, port, SYN | ACK);
            side.asks(port, ACK);
            side.serve_by(1);
            for (step, by_client) in order.into_iter().enumerate() {
                if by_client {
                    side.asks(port, FIN | ACK);
                } else {
                    side.answers(pod, node, port, FIN | ACK);
                }
                let half = step == 0;
                if half {
                    assert_eq!(side.reaches(port, SYN), side.pods[0], "half closed is not closed");
                    side.answers(pod, node, port, ACK);
                }
            }
            assert_eq!(side.reaches(port, ACK), side.pods[0], "the last acknowledgement");
            side.answers(pod, node, port, ACK);
            assert_eq!(side.reaches(port, SYN), side.pods[1], "the tuple is used again");
            // And the new connection is whole: the new pod's answers come from the service.
            let (node, pod) = side.asks(port, SYN);
            side.answers(pod, node, port, SYN | ACK);
            side.serve_by(0);
        }
    });
}

#[test]
fn clients_that_meet_behind_the_node_get_ports_of_their_own_until_there_is_none() {
    Side::each(|side| {
        let (low, high) = (62_000, 62_003);
        side.rig.maps.write_settings(&Settings { snat_min: low, snat_max: high, ..settings() }).unwrap();
        // All want the same port; whoever comes first keeps it.
        let clients: Vec<IpAddr> = (0..4)
            .map(|n| match side.client {
                IpAddr::V4(_) => Ipv4Addr::new(192, 168, 1, 60 + n).into(),
                IpAddr::V6(_) => Ipv6Addr::new(0xfd00, 1, 0, 0, 0, 0, 0, 0x60 + u16::from(n)).into(),
            })
            .collect();
        let service = side.service();
        let mut seen = Vec::new();
        for client in &clients {
            // Ports are tried at random, so a try may fail although one is free; a client tries again.
            let opened = (0..50).find_map(|_| side.sends((*client, low), service, SYN)).expect("a port is free");
            seen.push((*client, opened));
        }
        assert_eq!(seen[0].1.0.1, low, "its own");
        let mut ports: Vec<u16> = seen.iter().map(|(_, (node, _))| node.1).collect();
        ports.sort();
        assert_eq!(ports, [low, low + 1, low + 2, high]);
        // Each hears its own answers.
        for (client, (node, pod)) in &seen {
            assert_eq!(side.sends(*pod, *node, SYN | ACK), Some((service, (*client, low))));
        }
        let refused = segment((side.client, low), service, SYN);
        side.rig.assert_dropped(&refused, DropReason::NoNatMapping);
        // One ends; its port serves the next.
        let (client, (node, _)) = seen[2];
        side.sends((client, low), service, RST);
        let next = (0..50).find_map(|_| side.sends((side.client, low), service, SYN)).expect("a port is free again");
        assert_eq!(next.0, node);
        side.rig.maps.write_settings(&settings()).unwrap();
    });
}

#[test]
fn a_client_that_comes_again_gets_the_source_port_that_it_had() {
    Side::each(|side| {
        // Ports that the node does not translate to, as of hosts whose range was widened: each needs another.
        let (low, high) = (62_000, 62_999);
        side.rig.maps.write_settings(&Settings { snat_min: low, snat_max: high, ..settings() }).unwrap();
        let ports: Vec<u16> = (10_000..10_200).collect();
        let mut opened = Vec::new();
        for round in 0..3 {
            let ends: Vec<_> = ports.iter().map(|port| side.asks(*port, SYN)).collect();
            // No two share one, and all are where they should be.
            let mut given: Vec<_> = ends.iter().map(|(node, _)| node.1).collect();
            given.sort();
            given.dedup();
            assert_eq!(given.len(), ports.len());
            assert!(given.iter().all(|port| (low..=high).contains(port)), "{given:?}");
            if round == 0 {
                opened.clone_from(&ends);
            }
            assert_eq!(ends, opened, "round {round}");
            // Over, and before the last round forgotten too, while the pod waits for last segments.
            for port in &ports {
                side.asks(*port, RST);
            }
            if round == 1 {
                side.rig.maps.collect_flows(&settings().timeouts, u64::MAX).unwrap();
            }
        }
        // Who finds the usual port taken gets another one, and keeps off the living.
        let (node, pod) = side.asks(10_000, SYN);
        side.answers(pod, node, 10_000, SYN | ACK);
        let twin = 10_000 + (high - low + 1);
        let other = side.asks(twin, SYN);
        assert_ne!(other.0, node);
        assert!((low..=high).contains(&other.0.1));
        side.answers(pod, node, 10_000, ACK);
        side.answers(other.1, other.0, twin, SYN | ACK);
        side.rig.maps.write_settings(&settings()).unwrap();
    });
}

#[test]
fn acknowledgements_of_nobody_open_a_connection_like_any_first_packet() {
    // A node that takes an address over meets connections in their middle: they must go on by the same rules.
    Side::each(|side| {
        let (node, pod) = side.asks(61_540, ACK);
        assert_eq!(pod.0, side.pods[0]);
        side.answers(pod, node, 61_540, ACK);
    });
}
