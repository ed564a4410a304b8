//! Source ports that the node's own sockets use: a translated connection must not take one, or it would get the replies.

use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};

use kinesin::datapath::MapStore;
use kinesin_abi::{DropReason, Settings, proto};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, socket};

use crate::packets::{self, ACK, SYN, packet, tcp};
use crate::packets6::{self, tcp6, udp6};
use crate::rig::*;
use crate::traffic::{Lan, PATIENCE, exchange};

type End = (IpAddr, u16);

fn segment(protocol: u8, from: End, to: End) -> Vec<u8> {
    match (from.0, to.0) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => packet(protocol, (src, from.1), (dst, to.1)),
        (IpAddr::V6(src), IpAddr::V6(dst)) if protocol == proto::TCP => tcp6((src, from.1), (dst, to.1), SYN),
        (IpAddr::V6(src), IpAddr::V6(dst)) => udp6((src, from.1), (dst, to.1), b"hello, world"),
        mixed => panic!("{mixed:?} are of two families"),
    }
}

/// The end that the backend sees; none where the packet was dropped.
fn source(rig: &mut Rig, protocol: u8, from: End, to: End) -> Option<End> {
    let six = from.0.is_ipv6();
    let program = if six { "cil_from_netdev6" } else { "cil_from_netdev" };
    let (code, out) = rig.run(program, &segment(protocol, from, to));
    (code == REDIRECT).then(|| match six {
        false => {
            let (src, _) = packets::ends(&out);
            (src.0.into(), src.1)
        }
        true => {
            let (src, _) = packets6::ends6(&out);
            (src.0.into(), src.1)
        }
    })
}

/// A socket of the node that is connecting to a pod that does not answer.
fn connecting(from: End, to: End) -> OwnedFd {
    let family = if from.0.is_ipv6() { AddressFamily::Inet6 } else { AddressFamily::Inet };
    let socket = socket(family, SockType::Stream, SockFlag::SOCK_NONBLOCK, None).unwrap();
    bind(socket.as_raw_fd(), &SockaddrStorage::from(SocketAddr::from(from))).unwrap();
    let begun = connect(socket.as_raw_fd(), &SockaddrStorage::from(SocketAddr::from(to)));
    assert_eq!(begun, Err(nix::errno::Errno::EINPROGRESS));
    socket
}

const PORT: u16 = 62_000;

#[test]
fn a_source_port_that_a_socket_of_the_node_uses_to_the_same_backend_is_not_taken() {
    isolated(|| {
        let mut rig = Rig::dual();
        for (node, client, vip, pod) in [
            (IpAddr::from(NODE), IpAddr::from(CLIENT), IpAddr::from(VIP), IpAddr::from(REMOTE_POD)),
            (NODE6.into(), CLIENT6.into(), VIP6.into(), REMOTE_POD6.into()),
        ] {
            let mut opens = |protocol, port| source(&mut rig, protocol, (client, port), (vip, TO_REMOTE));
            // To another port of the pod, or listening: neither waits for what the backend sends.
            let elsewhere = connecting((node, PORT), (pod, 9090));
            let listening = TcpListener::bind((node, PORT + 1)).unwrap();
            assert_eq!(opens(proto::TCP, PORT), Some((node, PORT)), "the client's own port is free");
            assert_eq!(opens(proto::TCP, PORT + 1), Some((node, PORT + 1)));
            drop((elsewhere, listening));

            let own = connecting((node, PORT + 2), (pod, 8080));
            let (address, port) = opens(proto::TCP, PORT + 2).expect("another port is free");
            assert!(address == node && port != PORT + 2, "{address} {port}");
            // A socket of UDP may send to anybody.
            let any = UdpSocket::bind((node, PORT + 2)).unwrap();
            let (address, port) = opens(proto::UDP, PORT + 2).expect("another port is free");
            assert!(address == node && port != PORT + 2, "{address} {port}");
            // Towards a pod of this node the client's address stays, and its port.
            let program = if node.is_ipv6() { "cil_from_netdev6" } else { "cil_from_netdev" };
            assert_eq!(rig.run(program, &segment(proto::TCP, (client, PORT + 2), (vip, TO_LOCAL))).0, NEXT);

            // The node's connection hears its answers.
            let answer = match (pod, node) {
                (IpAddr::V4(pod), IpAddr::V4(node)) => tcp((pod, 8080), (node, PORT + 2), SYN | ACK),
                (IpAddr::V6(pod), IpAddr::V6(node)) => tcp6((pod, 8080), (node, PORT + 2), SYN | ACK),
                mixed => panic!("{mixed:?}"),
            };
            rig.assert_untouched(&answer);
            drop((own, any));
        }
    });
}

#[test]
fn where_the_nodes_sockets_have_every_port_a_connection_is_refused_until_one_is_closed() {
    isolated(|| {
        let mut rig = Rig::new();
        rig.maps.write_settings(&Settings { snat_min: PORT, snat_max: PORT + 1, ..settings() }).unwrap();
        let sockets: Vec<_> =
            [PORT, PORT + 1].map(|port| connecting((NODE.into(), port), (REMOTE_POD.into(), 8080))).into();
        let (from, to) = ((CLIENT.into(), PORT), (VIP.into(), TO_REMOTE));
        rig.assert_dropped(&segment(proto::TCP, from, to), DropReason::NoNatMapping);
        drop(sockets);
        assert_eq!(source(&mut rig, proto::TCP, from, to), Some((NODE.into(), PORT)));
    });
}

#[test]
fn the_nodes_own_connection_and_a_clients_from_the_same_port_both_hear_their_backend() {
    isolated(|| {
        let lan = Lan::dual();
        for (node, client, vip, pod) in [
            (IpAddr::from(NODE), IpAddr::from(CLIENT), IpAddr::from(VIP), IpAddr::from(REMOTE_POD)),
            (NODE6.into(), CLIENT6.into(), VIP6.into(), REMOTE_POD6.into()),
        ] {
            let open = move |from: IpAddr, to: End| {
                let socket = TcpSocket::new(from);
                socket.connect((from, PORT), to)
            };
            let own = open(node, (pod, 8080));
            exchange(&own, 50_000);
            let theirs = lan.client.run(move || open(client, (vip, TO_REMOTE)));
            for _ in 0..3 {
                exchange(&theirs, 50_000);
                exchange(&own, 50_000);
            }
        }
    });
}

/// A TCP socket with a port of its own.
struct TcpSocket(OwnedFd);

impl TcpSocket {
    fn new(of: IpAddr) -> Self {
        let family = if of.is_ipv6() { AddressFamily::Inet6 } else { AddressFamily::Inet };
        Self(socket(family, SockType::Stream, SockFlag::empty(), None).unwrap())
    }

    fn connect(self, from: End, to: End) -> TcpStream {
        bind(self.0.as_raw_fd(), &SockaddrStorage::from(SocketAddr::from(from))).unwrap();
        connect(self.0.as_raw_fd(), &SockaddrStorage::from(SocketAddr::from(to))).unwrap();
        let stream = TcpStream::from(self.0);
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }
}
