//! Building and checking packets, independently of the code under test.

use std::net::Ipv4Addr;

use kinesin_abi::proto;

use crate::rig::{CLIENT_MAC, NODE_MAC};

pub(crate) const SYN: u8 = 0x02;
pub(crate) const RST: u8 = 0x04;
pub(crate) const ACK: u8 = 0x10;
pub(crate) const FIN: u8 = 0x01;

/// Where the parts of a packet without IP options are.
pub(crate) const IP: usize = 14;
pub(crate) const L4: usize = 34;

pub(crate) type End = (Ipv4Addr, u16);

/// RFC 1071, the slow and obvious way.
pub(crate) fn checksum(bytes: &[u8]) -> u16 {
    let mut sum = 0u32;
    for pair in bytes.chunks(2) {
        sum += u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// The transport segment behind its pseudo header.
fn with_pseudo_header(ip: &[u8], segment: &[u8]) -> Vec<u8> {
    let mut bytes = ip[12..20].to_vec();
    bytes.extend([0, ip[9]]);
    bytes.extend((segment.len() as u16).to_be_bytes());
    bytes.extend(segment);
    bytes
}

/// An Ethernet frame with an IPv4 packet from the client to the node.
pub(crate) fn ipv4(src: Ipv4Addr, dst: Ipv4Addr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = [&NODE_MAC[..], &CLIENT_MAC, &[8, 0]].concat();
    let len = (20 + payload.len()) as u16;
    let mut ip = vec![0x45, 0];
    ip.extend(len.to_be_bytes());
    ip.extend([0x12, 0x34, 0, 0, 64, protocol, 0, 0]);
    ip.extend(src.octets());
    ip.extend(dst.octets());
    let check = checksum(&ip);
    ip[10..12].copy_from_slice(&check.to_be_bytes());
    frame.extend(ip);
    frame.extend(payload);
    seal(&mut frame);
    frame
}

/// Sets the transport checksum.
pub(crate) fn seal(frame: &mut [u8]) {
    let at = match frame[IP + 9] {
        proto::TCP => 16,
        proto::UDP => 6,
        _ => return,
    };
    let (ip, segment) = frame[IP..].split_at_mut(20);
    if segment.len() < at + 2 {
        return;
    }
    segment[at..at + 2].fill(0);
    let check = checksum(&with_pseudo_header(ip, segment));
    segment[at..at + 2].copy_from_slice(&check.to_be_bytes());
}

/// Sets the IP header's checksum.
pub(crate) fn seal_ip(frame: &mut [u8]) {
    let end = IP + usize::from(frame[IP] & 15) * 4;
    frame[IP + 10..IP + 12].fill(0);
    let check = checksum(&frame[IP..end]);
    frame[IP + 10..IP + 12].copy_from_slice(&check.to_be_bytes());
}

pub(crate) fn tcp(from: End, to: End, flags: u8) -> Vec<u8> {
    let mut segment = [from.1.to_be_bytes(), to.1.to_be_bytes()].concat();
    segment.extend([0, 0, 0, 1, 0, 0, 0, 0, 0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
    ipv4(from.0, to.0, proto::TCP, &segment)
}

pub(crate) fn udp(from: End, to: End, payload: &[u8]) -> Vec<u8> {
    let mut datagram = [from.1.to_be_bytes(), to.1.to_be_bytes()].concat();
    datagram.extend((8 + payload.len() as u16).to_be_bytes());
    datagram.extend([0, 0]);
    datagram.extend(payload);
    ipv4(from.0, to.0, proto::UDP, &datagram)
}

/// CRC32c (RFC 9260 appendix A), bit by bit.
fn crc32c(bytes: &[u8]) -> u32 {
    let mut crc = !0u32;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
        }
    }
    !crc
}

/// SCTP between two ports, with one chunk of this type.
pub(crate) fn association(from: u16, to: u16, chunk: u8) -> Vec<u8> {
    let mut packet = [from.to_be_bytes(), to.to_be_bytes()].concat();
    packet.extend([0xab, 0xcd, 0xef, 0x12, 0, 0, 0, 0]);
    packet.extend([chunk, 0, 0, 20, 1, 2, 3, 4, 0, 1, 0, 0, 0, 10, 0, 10, 9, 8, 7, 6]);
    let check = crc32c(&packet);
    packet[8..12].copy_from_slice(&check.to_le_bytes());
    packet
}

pub(crate) fn sctp(from: End, to: End, chunk: u8) -> Vec<u8> {
    ipv4(from.0, to.0, proto::SCTP, &association(from.1, to.1, chunk))
}

/// The packet of a transport protocol, TCP as a SYN.
pub(crate) fn packet(protocol: u8, from: End, to: End) -> Vec<u8> {
    if protocol == proto::TCP { tcp(from, to, SYN) } else { udp(from, to, b"hello, world") }
}

/// Source and destination; asserts that all checksums are right.
#[track_caller]
pub(crate) fn ends(frame: &[u8]) -> (End, End) {
    let ip = &frame[IP..L4];
    assert_eq!(checksum(ip), 0, "IP checksum");
    let segment = &frame[L4..];
    let unchecked = ip[9] == proto::UDP && segment[6..8] == [0, 0];
    if ip[9] == proto::SCTP {
        let mut packet = segment.to_vec();
        packet[8..12].fill(0);
        assert_eq!(crc32c(&packet).to_le_bytes(), segment[8..12], "CRC32c");
    } else if !unchecked {
        assert_eq!(checksum(&with_pseudo_header(ip, segment)), 0, "transport checksum");
    }
    let addr = |at: usize| Ipv4Addr::new(ip[at], ip[at + 1], ip[at + 2], ip[at + 3]);
    let port = |at: usize| u16::from_be_bytes([segment[at], segment[at + 1]]);
    ((addr(12), port(0)), (addr(16), port(2)))
}

pub(crate) fn ttl(frame: &[u8]) -> u8 {
    frame[IP + 8]
}

/// An ARP packet in an Ethernet frame.
pub(crate) fn arp(to: [u8; 6], operation: u16, sender: ([u8; 6], Ipv4Addr), target: ([u8; 6], Ipv4Addr)) -> Vec<u8> {
    let mut frame = [&to[..], &sender.0, &[8, 6, 0, 1, 8, 0, 6, 4]].concat();
    frame.extend(operation.to_be_bytes());
    frame.extend(sender.0);
    frame.extend(sender.1.octets());
    frame.extend(target.0);
    frame.extend(target.1.octets());
    frame
}
