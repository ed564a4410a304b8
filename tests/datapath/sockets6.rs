//! IPv6 sockets of the node, to services of IPv6.

use std::io::{Read, Write};
use std::net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};

use kinesin_abi::{FrontendKind, frontend_flags, proto};
use kinesin_core::plan::Op;

use crate::rig::*;
use crate::sockets::{Node, expect, text};

const LOOPBACK: Ipv6Addr = Ipv6Addr::LOCALHOST;
const NODE_PORT: u16 = 30_080;

fn peer(addr: Ipv6Addr, port: u16) -> SocketAddr {
    (addr, port).into()
}

/// A node whose IPv6 ClusterIP and NodePort lead to listeners on loopback.
fn node() -> (Node, TcpListener, UdpSocket) {
    let node = Node::new();
    let (tcp, udp) = (TcpListener::bind((LOOPBACK, 0)).unwrap(), UdpSocket::bind((LOOPBACK, 0)).unwrap());
    let ports = [tcp.local_addr().unwrap().port(), udp.local_addr().unwrap().port()];
    let mut ops = Vec::new();
    for (id, protocol, port) in [(11, proto::TCP, ports[0]), (12, proto::UDP, ports[1])] {
        ops.push(Op::Backend(id, backend(LOOPBACK, port, protocol, true)));
        ops.push(Op::Slot(id, id));
        let node_port = value(FrontendKind::NodePort, frontend_flags::ROUTABLE, id, 1);
        ops.push(Op::PutFrontend(frontend(CLUSTER_IP6, 80, protocol), value(FrontendKind::ClusterIp, 0, id, 1)));
        ops.push(Op::PutFrontend(frontend(NODE6, NODE_PORT, protocol), node_port));
        ops.push(Op::PutFrontend(frontend(Ipv6Addr::UNSPECIFIED, NODE_PORT, protocol), node_port));
        ops.push(Op::PutFrontend(frontend(CLUSTER_IP6, 81, protocol), value(FrontendKind::ClusterIp, 0, 0, 0)));
    }
    node.datapath.maps().apply(&ops).unwrap();
    (node, tcp, udp)
}

#[test]
fn a_connection_reaches_the_backend_and_shows_the_service() {
    isolated(|| {
        let (node, tcp, _) = node();
        let targets = [peer(CLUSTER_IP6, 80), peer(NODE6, NODE_PORT), peer(LOOPBACK, NODE_PORT)];
        for target in targets {
            node.cgroup.run(|| {
                let mut stream = TcpStream::connect(target).map_err(text)?;
                expect("peer", stream.peer_addr().map_err(text)?, target)?;
                stream.write_all(b"hello").map_err(text)
            });
            let (mut stream, from) = tcp.accept().unwrap();
            let mut said = String::new();
            stream.read_to_string(&mut said).unwrap();
            assert_eq!((said.as_str(), from.ip()), ("hello", LOOPBACK.into()));
        }
        assert_eq!(node.datapath.maps().raw_entries("sockets").unwrap().len(), targets.len());
    });
}

#[test]
fn datagrams_reach_the_backend_and_answers_come_from_the_service() {
    isolated(|| {
        let (node, _tcp, server) = node();
        // Answers everything until the test's thread, and with it the namespace, is gone.
        std::thread::spawn(move || {
            let mut buffer = [0; 64];
            while let Ok((len, from)) = server.recv_from(&mut buffer) {
                let _ = server.send_to(&buffer[..len], from);
            }
        });
        for target in [peer(CLUSTER_IP6, 80), peer(NODE6, NODE_PORT), peer(LOOPBACK, NODE_PORT)] {
            node.cgroup.run(|| {
                let mut buffer = [0; 64];
                let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0)).map_err(text)?;
                socket.set_read_timeout(Some(crate::traffic::PATIENCE)).map_err(text)?;
                socket.send_to(b"unconnected", target).map_err(text)?;
                let (len, from) = socket.recv_from(&mut buffer).map_err(text)?;
                expect("source of the answer", (&buffer[..len], from), (&b"unconnected"[..], target))?;
                socket.connect(target).map_err(text)?;
                socket.send(b"connected").map_err(text)?;
                let len = socket.recv(&mut buffer).map_err(text)?;
                expect("answer", &buffer[..len], b"connected")?;
                expect("peer", socket.peer_addr().map_err(text)?, target)
            });
        }
    });
}

#[test]
fn a_service_without_backends_denies_and_others_are_not_touched() {
    isolated(|| {
        let (node, tcp, _) = node();
        let direct = peer(LOOPBACK, tcp.local_addr().unwrap().port());
        node.cgroup.run(|| {
            let denied = TcpStream::connect(peer(CLUSTER_IP6, 81)).err().and_then(|error| error.raw_os_error());
            expect("connect", denied, Some(libc::EPERM))?;
            let stream = TcpStream::connect(direct).map_err(text)?;
            expect("peer", stream.peer_addr().map_err(text)?, direct)?;
            // Only loopback stands for all of the node's addresses, and only for NodePorts.
            let refused = TcpStream::connect(peer(LOOPBACK, 80)).err().map(|error| error.kind());
            expect("connect to loopback", refused, Some(std::io::ErrorKind::ConnectionRefused))
        });
        assert_eq!(node.datapath.maps().raw_entries("sockets").unwrap().len(), 0);
    });
}
