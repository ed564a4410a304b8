//! NodePorts cannot be bound on the node, and can be everywhere else.

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpListener, UdpSocket};

use kinesin::datapath::update_settings;
use kinesin_abi::{Addr, FrontendKind, SETTING_PROTECT_NODE_PORTS, frontend_flags, proto};
use kinesin_core::plan::Op;

use crate::rig::*;
use crate::sockets::{Node, expect};

/// An address of the node that serves no NodePorts.
const APART: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 99);

fn protect(node: &Node, on: bool) {
    let flags = if on { SETTING_PROTECT_NODE_PORTS } else { 0 };
    update_settings(&*node.datapath.maps(), |settings| settings.flags = flags).unwrap();
}

/// Binds sockets of both protocols.
fn bind(addr: impl Into<IpAddr>, port: u16) -> [Result<(), ErrorKind>; 2] {
    let to = (addr.into(), port);
    [TcpListener::bind(to).map(drop), UdpSocket::bind(to).map(drop)].map(|result| result.map_err(|error| error.kind()))
}

const REFUSED: [Result<(), ErrorKind>; 2] = [Err(ErrorKind::PermissionDenied); 2];
const BOUND: [Result<(), ErrorKind>; 2] = [Ok(()); 2];

#[test]
fn a_node_port_is_bound_neither_at_its_address_nor_at_all_of_them() {
    isolated(|| {
        let node = Node::new();
        ip("addr add 192.168.1.99/24 dev lan0");
        protect(&node, true);
        node.cgroup.run(|| {
            for addr in [Ipv4Addr::UNSPECIFIED, Ipv4Addr::LOCALHOST, NODE] {
                expect("the NodePort", bind(addr, 30_080), REFUSED)?;
            }
            expect("it, for both families", bind(Ipv6Addr::UNSPECIFIED, 30_080), REFUSED)?;
            expect("it, of the family without it", bind(Ipv6Addr::LOCALHOST, 30_080), BOUND)?;
            expect("an address that does not serve it", bind(APART, 30_080), BOUND)?;
            expect("another port", bind(Ipv4Addr::UNSPECIFIED, 30_081), BOUND)?;
            expect("whatever port is free", bind(Ipv4Addr::UNSPECIFIED, 0), BOUND)?;
            // Its packets are for the ClusterIP alone.
            expect("a port that a ClusterIP has", bind(Ipv4Addr::UNSPECIFIED, 81), BOUND)
        });
        protect(&node, false);
        node.cgroup.run(|| expect("without protection", bind(Ipv4Addr::UNSPECIFIED, 30_080), BOUND));
    });
}

#[test]
fn a_node_port_of_ipv6_is_bound_neither() {
    isolated(|| {
        let node = Node::new();
        protect(&node, true);
        let node_port = value(FrontendKind::NodePort, frontend_flags::ROUTABLE, 1, 1);
        let keys = [proto::TCP, proto::UDP].map(|protocol| kinesin_abi::FrontendKey {
            addr: Addr::UNSPECIFIED,
            ..frontend(Ipv4Addr::UNSPECIFIED, 30_090, protocol)
        });
        node.datapath.maps().apply(&keys.map(|key| Op::PutFrontend(key, node_port))).unwrap();
        node.cgroup.run(|| {
            for addr in [Ipv6Addr::UNSPECIFIED, Ipv6Addr::LOCALHOST] {
                expect("the NodePort", bind(addr, 30_090), REFUSED)?;
            }
            expect("it, of the family without it", bind(Ipv4Addr::UNSPECIFIED, 30_090), BOUND)
        });
    });
}

#[test]
fn a_pod_binds_what_it_likes() {
    isolated(|| {
        let node = Node::new();
        protect(&node, true);
        node.cgroup.run(|| {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET)
                .map_err(|error| crate::sockets::text(error.into()))?;
            expect("the pod's own port", bind(Ipv4Addr::UNSPECIFIED, 30_080), BOUND)
        });
    });
}
