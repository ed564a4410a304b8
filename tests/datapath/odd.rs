//! Packets that are odd but right: what translation does not mean to change is never changed.

use std::net::{Ipv4Addr, UdpSocket};
use std::time::Duration;

use kinesin_abi::proto;

use crate::packets::{ACK, End, IP, checksum, seal_ip};
use crate::rig::*;
use crate::traffic::{Lan, connect, exchange};

/// Xorshift: the same packets each time.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % bound
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.below(256) as u8).collect()
    }
}

/// A frame of any IPv4 header and content, its payload's offset, and where padding begins.
struct Odd {
    frame: Vec<u8>,
    l4: usize,
    end: usize,
}

fn odd(random: &mut Random, protocol: u8, from: End, to: End) -> Odd {
    let ports = [from.1.to_be_bytes(), to.1.to_be_bytes()].concat();
    let options = random.below(11) * 4;
    let content = random.below(1200);
    let mut segment = ports;
    if protocol == proto::TCP {
        let tcp_options = random.below(11) * 4;
        segment.extend(random.bytes(8));
        // Reserved bits and all flags but those that open or end a connection.
        segment
            .extend([((20 + tcp_options) << 2) as u8 | random.below(16) as u8, ACK | (random.below(256) as u8 & 0xe8)]);
        segment.extend(random.bytes(2));
        segment.extend([0, 0]);
        segment.extend(random.bytes(2 + tcp_options + content));
    } else {
        segment.extend(((8 + content) as u16).to_be_bytes());
        segment.extend([0, 0]);
        segment.extend(random.bytes(content));
    }
    let l4 = IP + 20 + options;
    let end = l4 + segment.len();
    let mut frame = [&NODE_MAC[..], &CLIENT_MAC, &[8, 0]].concat();
    frame.extend([0x40 | ((20 + options) / 4) as u8, random.below(256) as u8]);
    frame.extend(((end - IP) as u16).to_be_bytes());
    frame.extend(random.bytes(2));
    // "Don't fragment" or not, and the reserved bit.
    frame.extend([[0, 0x40, 0x80, 0xc0][random.below(4)], 0, 2 + random.below(254) as u8, protocol, 0, 0]);
    frame.extend(from.0.octets());
    frame.extend(to.0.octets());
    // No operation, so that nobody reads anything into them.
    frame.extend(vec![1; options]);
    frame.extend(segment);
    let at = if protocol == proto::TCP { 16 } else { 6 };
    let unchecked = protocol == proto::UDP && random.below(4) == 0;
    if !unchecked {
        let check = transport(&frame, l4, end);
        let check = if check == 0 && protocol == proto::UDP { 0xffff } else { check };
        frame[l4 + at..l4 + at + 2].copy_from_slice(&check.to_be_bytes());
    }
    seal_ip(&mut frame);
    frame.extend(random.bytes(random.0 as usize % 16));
    Odd { frame, l4, end }
}

/// What the transport checksum comes to; 0 where it is right.
fn transport(frame: &[u8], l4: usize, end: usize) -> u16 {
    let mut bytes = frame[IP + 12..IP + 20].to_vec();
    bytes.extend([0, frame[IP + 9]]);
    bytes.extend(((end - l4) as u16).to_be_bytes());
    bytes.extend(&frame[l4..end]);
    checksum(&bytes)
}

fn end(frame: &[u8], l4: usize, which: usize) -> End {
    let addr = &frame[IP + 12 + which * 4..][..4];
    let port = &frame[l4 + which * 2..][..2];
    (Ipv4Addr::new(addr[0], addr[1], addr[2], addr[3]), u16::from_be_bytes([port[0], port[1]]))
}

/// Asserts that everything but addresses, ports, checksums and `hops` is as it was.
#[track_caller]
fn assert_kept(sent: &Odd, out: &[u8], hops: u8) {
    let Odd { frame, l4, end } = sent;
    let check = l4 + if frame[IP + 9] == proto::TCP { 16 } else { 6 };
    let mut expected = frame.clone();
    expected[IP + 8] -= hops;
    for range in [IP + 10..IP + 20, *l4..l4 + 4, check..check + 2] {
        expected[range.clone()].copy_from_slice(&out[range]);
    }
    assert!(expected == out, "sent {frame:02x?}\n got {out:02x?}");
    assert_eq!(checksum(&out[IP..*l4]), 0, "the header's checksum");
    let unchecked = frame[IP + 9] == proto::UDP && frame[check..check + 2] == [0, 0];
    match unchecked {
        true => assert_eq!(out[check..check + 2], [0, 0], "no checksum stays none"),
        false => assert_eq!(transport(out, *l4, *end), 0, "the transport checksum"),
    }
}

#[test]
fn translation_changes_addresses_ports_and_checksums_and_nothing_else() {
    isolated(|| {
        let mut rig = Rig::new();
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        for n in 0..2000u32 {
            let protocol = if n % 2 == 0 { proto::TCP } else { proto::UDP };
            let (port, pod) = if n % 4 < 2 { (TO_LOCAL, LOCAL_POD) } else { (TO_REMOTE, REMOTE_POD) };
            let client = (CLIENT, 20_000 + n as u16);
            let sent = odd(&mut random, protocol, client, (VIP, port));
            let (_, out) = rig.ingress(&sent.frame);
            let far = end(&out, sent.l4, 1);
            assert_eq!(far, (pod, 8080), "{:02x?}", sent.frame);
            assert_kept(&sent, &out, u8::from(port == TO_REMOTE));
            let near = end(&out, sent.l4, 0);
            let answer = odd(&mut random, protocol, far, near);
            let (_, out) = if port == TO_LOCAL { rig.egress(&answer.frame) } else { rig.ingress(&answer.frame) };
            assert_eq!((end(&out, answer.l4, 0), end(&out, answer.l4, 1)), ((VIP, port), client));
            assert_kept(&answer, &out, u8::from(port == TO_REMOTE));
        }
    });
}

#[test]
fn long_frames_pass_where_the_lan_carries_them() {
    isolated(|| {
        let lan = Lan::new();
        for device in ["lan0", "pod0"] {
            ip(&format!("link set {device} mtu 9000"));
        }
        lan.switch.ip(&["link set p0 mtu 9000", "link set p1 mtu 9000", "link set p2 mtu 9000"]);
        for host in [&lan.client, &lan.pod, &lan.second] {
            host.ip(&["link set eth0 mtu 9000"]);
        }
        for port in [TO_LOCAL, TO_REMOTE] {
            lan.client.run(move || {
                exchange(&connect(port).unwrap(), 1 << 20);
                let socket = UdpSocket::bind((CLIENT, 0)).unwrap();
                socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
                socket.connect((VIP, port)).unwrap();
                // Linux sets "don't fragment" on datagrams by default.
                socket.send(&[7; 8900]).unwrap();
                assert_eq!(socket.recv(&mut [0; 9000]).unwrap(), 8900);
            });
        }
        assert_eq!(lan.datapath.as_ref().unwrap().maps().drops().unwrap(), []);
    });
}
