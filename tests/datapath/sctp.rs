//! SCTP: new addresses, the same ports, and a checksum that nobody touches.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::{FromRawFd, OwnedFd};

use kinesin::datapath::MapStore;
use kinesin_abi::{Direction, DropReason, FrontendKind, frontend_flags, proto};
use kinesin_core::plan::Op;

use crate::packets::{End, IP, L4, association, checksum, ends, ipv4, sctp, ttl};
use crate::packets6::{addresses, ipv6};
use crate::rig::*;
use crate::traffic::{Host, Lan};

const INIT: u8 = 1;
const INIT_ACK: u8 = 2;
const DATA: u8 = 0;

/// Ports of [`VIP`], and of the backends behind them: the same.
const HERE: u16 = 7;
const THERE: u16 = 9;
const NOWHERE: u16 = 11;
const OTHER_PORT: u16 = 13;

fn sctp_services() -> Vec<Op> {
    let mut ops = Vec::new();
    for (id, port, pod, pod_port) in
        [(71, HERE, LOCAL_POD, HERE), (72, THERE, REMOTE_POD, THERE), (73, OTHER_PORT, LOCAL_POD, 1313)]
    {
        ops.push(Op::Backend(id, backend(pod, pod_port, proto::SCTP, pod == LOCAL_POD)));
        ops.push(Op::Slot(id, id));
        let service = value(FrontendKind::LoadBalancer, frontend_flags::ROUTABLE, id, 1);
        ops.push(Op::PutFrontend(frontend(VIP, port, proto::SCTP), service));
    }
    let empty = value(FrontendKind::LoadBalancer, frontend_flags::ROUTABLE, 0, 0);
    ops.push(Op::PutFrontend(frontend(VIP, NOWHERE, proto::SCTP), empty));
    ops
}

fn rig() -> Rig {
    let rig = Rig::new();
    rig.maps.apply(&sctp_services()).unwrap();
    rig
}

#[test]
fn a_local_backend_gets_the_clients_packet_and_answers_as_the_service() {
    isolated(|| {
        let mut rig = rig();
        let client: End = (CLIENT, 38_412);
        for chunk in [INIT, DATA] {
            let sent = sctp(client, (VIP, HERE), chunk);
            let (code, out) = rig.ingress(&sent);
            assert_eq!((code, ends(&out), ttl(&out)), (NEXT, (client, (LOCAL_POD, HERE)), 64));
            assert_eq!(out[L4..], sent[L4..], "nothing of SCTP's own changes");
        }
        let answer = sctp((LOCAL_POD, HERE), client, INIT_ACK);
        let (code, out) = rig.egress(&answer);
        assert_eq!((code, ends(&out)), (NEXT, ((VIP, HERE), client)));
        assert_eq!(out[L4..], answer[L4..]);
    });
}

#[test]
fn a_remote_backend_sees_the_node_with_the_clients_own_port() {
    isolated(|| {
        let mut rig = rig();
        // Outside the range of ports for translation, which another protocol's port would have to leave.
        let client: End = (CLIENT, 38_412);
        let sent = sctp(client, (VIP, THERE), INIT);
        let (code, out) = rig.ingress(&sent);
        assert_eq!((code, ends(&out), ttl(&out)), (REDIRECT, ((NODE, 38_412), (REMOTE_POD, THERE)), 63));
        assert_eq!(out[L4..], sent[L4..]);
        let answer = sctp((REMOTE_POD, THERE), (NODE, 38_412), INIT_ACK);
        let (code, out) = rig.ingress(&answer);
        assert_eq!((code, ends(&out)), (REDIRECT, ((VIP, THERE), client)));
        assert_eq!(out[L4..], answer[L4..]);
        // Another client with the same port cannot be told apart behind the node's address.
        let other = sctp((Ipv4Addr::new(192, 168, 1, 51), 38_412), (VIP, THERE), INIT);
        rig.assert_dropped(&other, DropReason::NoNatMapping);
        assert_eq!(ends(&rig.ingress(&sctp(client, (VIP, THERE), DATA)).1).0, (NODE, 38_412));
    });
}

#[test]
fn a_port_is_never_rewritten_whatever_the_maps_say() {
    isolated(|| {
        let mut rig = rig();
        rig.assert_dropped(&sctp((CLIENT, 38_412), (VIP, OTHER_PORT), INIT), DropReason::CsumL4);
        rig.assert_dropped(&sctp((CLIENT, 38_412), (VIP, 9999), INIT), DropReason::NoBackend);
    });
}

#[test]
fn a_service_without_backends_refuses_sctp_by_its_headers() {
    isolated(|| {
        let mut rig = rig();
        let sent = sctp((CLIENT, 38_412), (VIP, NOWHERE), INIT);
        let (code, out) = rig.ingress(&sent);
        assert_eq!((code, rig.dropped(DropReason::NoBackend, Direction::Ingress)), (REDIRECT, 1));
        assert_eq!((checksum(&out[IP..L4]), checksum(&out[L4..])), (0, 0));
        assert_eq!((&out[L4..L4 + 2], &out[L4 + 8..]), (&[3, 3][..], &sent[IP..L4 + 8]));
    });
}

#[test]
fn an_error_about_an_association_reaches_its_client() {
    isolated(|| {
        let mut rig = rig();
        let sent = sctp((CLIENT, 38_412), (VIP, HERE), INIT);
        let (_, out) = rig.ingress(&sent);
        // The pod's host says that there is no such protocol.
        let mut icmp = [&[3, 2, 0, 0, 0, 0, 0, 0][..], &out[IP..L4 + 8]].concat();
        let check = checksum(&icmp);
        icmp[2..4].copy_from_slice(&check.to_be_bytes());
        let (code, out) = rig.egress(&ipv4(LOCAL_POD, CLIENT, proto::ICMP, &icmp));
        assert_eq!((code, checksum(&out[IP..L4]), checksum(&out[L4..])), (NEXT, 0, 0));
        assert_eq!(out[IP + 12..IP + 16], VIP.octets());
        assert_eq!(out[L4 + 8..], sent[IP..L4 + 8], "it quotes what the client has sent");
    });
}

#[test]
fn truncated_sctp_is_invalid() {
    isolated(|| {
        let mut rig = rig();
        let whole = sctp((CLIENT, 38_412), (VIP, HERE), INIT);
        for len in L4..whole.len() {
            rig.assert_dropped(&whole[..len], DropReason::InvalidPacket);
        }
        for len in 0..12 {
            rig.assert_dropped(&ipv4(CLIENT, VIP, proto::SCTP, &whole[L4..L4 + len]), DropReason::InvalidPacket);
        }
    });
}

#[test]
fn ipv6_is_the_same() {
    isolated(|| {
        let mut rig = Rig::dual();
        for (id, port, pod) in [(81, HERE, LOCAL_POD6), (82, THERE, REMOTE_POD6)] {
            let service = value(FrontendKind::LoadBalancer, frontend_flags::ROUTABLE, id, 1);
            let ops = [
                Op::Backend(id, backend(pod, port, proto::SCTP, pod == LOCAL_POD6)),
                Op::Slot(id, id),
                Op::PutFrontend(frontend(VIP6, port, proto::SCTP), service),
            ];
            rig.maps.apply(&ops).unwrap();
        }
        let packet = |src, from, dst, to, chunk| ipv6(src, dst, proto::SCTP, &association(from, to, chunk));
        let body = IP + 40;
        for (port, pod, source, code) in [(HERE, LOCAL_POD6, CLIENT6, NEXT), (THERE, REMOTE_POD6, NODE6, REDIRECT)] {
            let sent = packet(CLIENT6, 38_412, VIP6, port, INIT);
            let (is, out) = rig.ingress6(&sent);
            assert_eq!((is, addresses(&out)), (code, (source, pod)));
            assert_eq!(out[body..], sent[body..], "nothing of SCTP's own changes");
            let answer = packet(pod, port, source, 38_412, INIT_ACK);
            let (_, out) = if port == HERE { rig.egress6(&answer) } else { rig.ingress6(&answer) };
            assert_eq!(addresses(&out), (VIP6, CLIENT6));
            assert_eq!(out[body..], answer[body..]);
        }
    });
}

/// A socket of one association at a time, which is used like one of TCP; none where the kernel has no SCTP.
fn socket() -> Option<OwnedFd> {
    // SAFETY: no pointers.
    let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, libc::IPPROTO_SCTP) };
    // SAFETY: the kernel has just returned it.
    (fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(fd) })
}

fn bound(at: End) -> OwnedFd {
    let socket = socket().unwrap();
    let address = nix::sys::socket::SockaddrIn::from(std::net::SocketAddrV4::new(at.0, at.1));
    nix::sys::socket::bind(std::os::fd::AsRawFd::as_raw_fd(&socket), &address).unwrap();
    socket
}

/// Echoes one association after the other.
fn echo(host: &Host, at: End) {
    host.run(move || {
        let socket = bound(at);
        nix::sys::socket::listen(&socket, nix::sys::socket::Backlog::new(8).unwrap()).unwrap();
        let listener = TcpListener::from(socket);
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                let mut buffer = [0; 2048];
                while let Ok(len @ 1..) = stream.read(&mut buffer) {
                    let _ = stream.write_all(&buffer[..len]);
                }
            }
        });
    });
}

#[test]
fn associations_of_real_sockets_reach_local_and_remote_backends() {
    if socket().is_none() {
        // tests/kernels runs this on one that has.
        eprintln!("this kernel has no SCTP: nothing to test");
        return;
    }
    isolated(|| {
        let lan = Lan::new();
        lan.datapath.as_ref().unwrap().maps().apply(&sctp_services()).unwrap();
        echo(&lan.pod, (LOCAL_POD, HERE));
        echo(&lan.second, (REMOTE_POD, THERE));
        for port in [HERE, THERE] {
            // Twice from one port: the second association replaces the first.
            for _ in 0..2 {
                lan.client.run(move || {
                    let socket = bound((CLIENT, 38_412));
                    let address = nix::sys::socket::SockaddrIn::from(std::net::SocketAddrV4::new(VIP, port));
                    nix::sys::socket::connect(std::os::fd::AsRawFd::as_raw_fd(&socket), &address).unwrap();
                    let mut stream = TcpStream::from(socket);
                    for len in [1, 100, 1200] {
                        stream.write_all(&vec![len as u8; len]).unwrap();
                        let mut back = vec![0; len];
                        stream.read_exact(&mut back).unwrap();
                        assert_eq!(back, vec![len as u8; len]);
                    }
                });
            }
        }
        assert_eq!(lan.datapath.as_ref().unwrap().maps().drops().unwrap(), []);
    });
}
