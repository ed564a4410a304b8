//! Real traffic of both families: neighbour discovery, offloaded checksums, fragments as the kernel makes them, VLANs.

use std::io::Read;
use std::net::{IpAddr, Shutdown, SocketAddr, UdpSocket};

use kinesin::datapath::{Datapath, MapStore};

use crate::packets::{SYN, tcp};
use crate::packets6::tcp6;

use crate::rig::*;
use crate::traffic::{Lan, PATIENCE, command, connect_to, exchange, ping};

/// Client and service of each family.
fn families() -> [(IpAddr, IpAddr); 2] {
    [(CLIENT.into(), VIP.into()), (CLIENT6.into(), VIP6.into())]
}

fn socket(from: IpAddr, to: SocketAddr) -> UdpSocket {
    let socket = UdpSocket::bind((from, 0)).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket.connect(to).unwrap();
    socket
}

#[test]
fn connections_and_datagrams_of_ipv6_reach_local_and_remote_backends() {
    isolated(|| {
        let lan = Lan::dual();
        for port in [TO_LOCAL, TO_REMOTE] {
            lan.client.run(move || {
                let stream = connect_to((VIP6, port).into()).unwrap();
                exchange(&stream, 4 << 20);
                stream.shutdown(Shutdown::Write).unwrap();
                assert_eq!((&stream).read(&mut [0; 1]).unwrap(), 0, "the end of the connection arrives too");
                let socket = socket(CLIENT6.into(), (VIP6, port).into());
                for len in [0, 1, 1200] {
                    socket.send(&vec![len as u8; len]).unwrap();
                    assert_eq!(socket.recv(&mut [0; 2048]).unwrap(), len);
                }
            });
        }
        // Who the LAN sees: the neighbour was found by solicitation.
        let neighbours = command(&lan.client, "ip -6 neigh show fd00:99::100");
        assert!(neighbours.contains("02:00:00:00:00:10"), "{neighbours}");
        let maps = lan.datapath.as_ref().unwrap().maps();
        let answered = maps.read_l2().unwrap().into_iter().find(|(key, _)| key.addr == VIP6.into()).unwrap();
        assert!(answered.1.responses_sent > 0);
        assert_eq!(maps.drops().unwrap(), []);
    });
}

#[test]
fn datagrams_longer_than_the_mtu_go_through_in_fragments_both_ways() {
    isolated(|| {
        let lan = Lan::dual();
        for (client, vip) in families() {
            for port in [TO_LOCAL, TO_REMOTE] {
                lan.client.run(move || {
                    let socket = socket(client, (vip, port).into());
                    for round in 0..20 {
                        let sent: Vec<u8> = (0..4000 + round * 37).map(|i| (i * 7 + round) as u8).collect();
                        socket.send(&sent).unwrap();
                        let mut received = vec![0; 9000];
                        let len = socket.recv(&mut received).unwrap();
                        assert!(received[..len] == sent, "{vip} port {port}: the bytes that came back differ");
                    }
                });
            }
        }
        let maps = lan.datapath.as_ref().unwrap().maps();
        assert!(maps.raw_entries("fragments").unwrap().len() > 8, "they were fragments");
        assert_eq!(maps.drops().unwrap(), []);
    });
}

#[test]
fn a_refusal_of_ipv6_arrives_at_real_sockets() {
    isolated(|| {
        let lan = Lan::dual();
        lan.client.run(|| {
            let error = connect_to((VIP6, TO_NOBODY).into()).unwrap_err();
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused);
            for payload in [&b""[..], &[7; 1001], &[9; 1400]] {
                let socket = socket(CLIENT6.into(), (VIP6, TO_NOBODY).into());
                socket.send(payload).unwrap();
                let error = socket.recv(&mut [0; 8]).unwrap_err();
                assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused, "{} bytes", payload.len());
            }
        });
    });
}

#[test]
fn a_service_address_of_ipv6_answers_a_real_ping() {
    isolated(|| {
        let lan = Lan::dual();
        lan.client.run(|| {
            for len in [0, 1, 56, 1400] {
                let payload = vec![len as u8; len];
                assert_eq!(ping((VIP6, 1).into(), &payload).unwrap(), payload);
            }
        });
        assert_eq!(lan.datapath.as_ref().unwrap().maps().drops().unwrap(), []);
    });
}

#[test]
fn long_transfers_of_ipv6_find_their_way_through_a_smaller_mtu() {
    let narrow = |port, host: fn(&Lan) -> &crate::traffic::Host, route: &'static str, of: &'static str| {
        isolated(move || {
            let lan = Lan::dual();
            ip(route);
            lan.client.run(move || exchange(&connect_to((VIP6, port).into()).unwrap(), 1 << 20));
            let routes = command(host(&lan), of);
            assert!(routes.contains("mtu 1300"), "the sender knows the way's MTU: {routes}");
        });
    };
    let to_vip = "ip route get fd00:99::100";
    narrow(TO_REMOTE, |lan| &lan.client, "route change fd00:42:2::/48 via fd00:1::11 mtu lock 1300", to_vip);
    // The stack reports it, about the translated packet.
    narrow(TO_LOCAL, |lan| &lan.client, "route add fd00:42:1::5/128 dev pod0 mtu lock 1300", to_vip);
    // Replies.
    let to_client = "route add fd00:1::50/128 dev lan0 mtu lock 1300";
    narrow(TO_LOCAL, |lan| &lan.pod, to_client, "ip route get fd00:1::50");
    narrow(TO_REMOTE, |lan| &lan.second, to_client, "ip route get fd00:1::10");
}

/// Sends a frame out of a device, from a socket below everything else.
fn send_raw(device: u32, frame: &[u8]) {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
    use std::os::fd::AsRawFd;
    let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::empty(), None).unwrap();
    // SAFETY: integers and an array; zero is valid.
    let mut to: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    (to.sll_family, to.sll_ifindex) = (libc::AF_PACKET as u16, device as i32);
    // SAFETY: both pointers describe values that outlive the call, with their lengths.
    let sent = unsafe {
        let (bytes, len) = (frame.as_ptr().cast(), frame.len());
        libc::sendto(socket.as_raw_fd(), bytes, len, 0, (&raw const to).cast(), size_of_val(&to) as libc::socklen_t)
    };
    assert_eq!(sent, frame.len() as isize);
}

/// The frame with an 802.1Q tag.
fn tagged(mut frame: Vec<u8>, tag: u16) -> Vec<u8> {
    let [a, b] = tag.to_be_bytes();
    frame.splice(12..12, [0x81, 0, a, b]);
    frame
}

#[test]
fn tagged_frames_are_left_to_their_vlan_and_a_priority_tag_is_none() {
    // A managed device may carry VLANs of somebody else, with the same addresses.
    isolated(|| {
        let mut rig = Rig::dual();
        let both = Datapath::load(&dual(rig.root())).unwrap().attach_device(LAN, rig.lan).unwrap();
        assert!(both.are_ok() && both.ipv6.is_some(), "{both:?}");
        let wire = ifindex("lan1");
        const VLAN: u16 = 7;
        const PRIORITY: u16 = 5 << 13;
        for (port, tag) in [(40_001, VLAN), (40_002, PRIORITY | VLAN), (40_003, PRIORITY)] {
            send_raw(wire, &tagged(tcp((CLIENT, port), (VIP, TO_LOCAL), SYN), tag));
            send_raw(wire, &tagged(tcp6((CLIENT6, port), (VIP6, TO_LOCAL), SYN), tag));
        }
        // The last ones are served, and so all have come.
        let clients = || {
            let flows = crate::flows::entries(&rig);
            let from_client = flows.iter().map(|(key, _)| *key);
            let mut ports: Vec<u16> =
                from_client.filter(|key| key.dport.get() == TO_LOCAL).map(|key| key.sport.get()).collect();
            ports.sort();
            ports
        };
        let deadline = std::time::Instant::now() + PATIENCE;
        while clients() != [40_003, 40_003] {
            assert!(std::time::Instant::now() < deadline, "{:?}", clients());
            std::thread::yield_now();
        }
        assert_eq!(rig.maps.drops().unwrap(), []);
        // A tag inside the packet, where a device has not taken it off, is another protocol.
        for frame in [tcp((CLIENT, 1), (VIP, TO_LOCAL), SYN), tcp6((CLIENT6, 1), (VIP6, TO_LOCAL), SYN)] {
            let frame = tagged(frame, PRIORITY);
            for program in ["cil_from_netdev", "cil_to_netdev", "cil_from_netdev6", "cil_to_netdev6"] {
                assert_eq!(rig.run(program, &frame), (NEXT, frame.clone()), "{program}");
            }
        }
    });
}
