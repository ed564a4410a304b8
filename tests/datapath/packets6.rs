//! Building and checking IPv6 packets, independently of the code under test.

use std::net::Ipv6Addr;

use kinesin_abi::proto;

use crate::packets::{IP, checksum};
use crate::rig::{CLIENT_MAC, NODE_MAC};

/// Where the transport header is behind a fixed header alone.
pub(crate) const L4: usize = IP + 40;

pub(crate) type End6 = (Ipv6Addr, u16);

/// Number of a destination options header.
pub(crate) const OPTIONS: u8 = 60;
/// Number of a fragment header.
pub(crate) const FRAGMENT: u8 = 44;

/// An upper-layer packet with its checksum field, if it has one, set (RFC 8200 section 8.1).
fn sealed(src: Ipv6Addr, dst: Ipv6Addr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let mut payload = payload.to_vec();
    let at = match protocol {
        proto::TCP => 16,
        proto::UDP => 6,
        proto::ICMPV6 => 2,
        _ => return payload,
    };
    if payload.len() >= at + 2 {
        payload[at..at + 2].fill(0);
        let check = sum(src, dst, protocol, &payload);
        payload[at..at + 2].copy_from_slice(&check.to_be_bytes());
    }
    payload
}

/// The checksum over pseudo header and payload.
pub(crate) fn sum(src: Ipv6Addr, dst: Ipv6Addr, protocol: u8, payload: &[u8]) -> u16 {
    let mut bytes = [src.octets(), dst.octets()].concat();
    bytes.extend((payload.len() as u32).to_be_bytes());
    bytes.extend([0, 0, 0, protocol]);
    bytes.extend(payload);
    checksum(&bytes)
}

/// An Ethernet frame with an IPv6 packet from the client to the node.
pub(crate) fn ipv6(src: Ipv6Addr, dst: Ipv6Addr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    extended(src, dst, &[], protocol, payload)
}

/// The same with extension headers: their types, and their bytes without the next header.
pub(crate) fn extended(
    src: Ipv6Addr,
    dst: Ipv6Addr,
    extensions: &[(u8, Vec<u8>)],
    protocol: u8,
    payload: &[u8],
) -> Vec<u8> {
    let payload = sealed(src, dst, protocol, payload);
    framed(src, dst, extensions, protocol, &payload)
}

/// The same of a payload that stays as it is.
pub(crate) fn framed(
    src: Ipv6Addr,
    dst: Ipv6Addr,
    extensions: &[(u8, Vec<u8>)],
    protocol: u8,
    payload: &[u8],
) -> Vec<u8> {
    let mut chain = Vec::new();
    let types = extensions.iter().map(|(kind, _)| *kind).chain([protocol]).collect::<Vec<_>>();
    for (next, (_, bytes)) in types[1..].iter().zip(extensions) {
        chain.push(*next);
        chain.extend(bytes);
    }
    let mut frame = [&NODE_MAC[..], &CLIENT_MAC, &[0x86, 0xdd]].concat();
    // Traffic class and flow label, which translation keeps.
    frame.extend([0x60, 0x2a, 0xbc, 0xde]);
    frame.extend(((chain.len() + payload.len()) as u16).to_be_bytes());
    frame.extend([types[0], 64]);
    frame.extend(src.octets());
    frame.extend(dst.octets());
    frame.extend(chain);
    frame.extend(payload);
    frame
}

/// An extension header of so many units of eight bytes, filled with padding (RFC 8200 section 4.2).
pub(crate) fn padding(kind: u8, units: u8) -> (u8, Vec<u8>) {
    let padding = usize::from(units) * 8 - 4;
    let mut bytes = vec![units - 1, 1, padding as u8];
    bytes.extend(vec![0; padding]);
    (kind, bytes)
}

/// A fragment header: offset in bytes, whether more follow, and the identification.
pub(crate) fn fragment(offset: u16, more: bool, id: u32) -> (u8, Vec<u8>) {
    let mut bytes = vec![0];
    bytes.extend((offset | u16::from(more)).to_be_bytes());
    bytes.extend(id.to_be_bytes());
    (FRAGMENT, bytes)
}

fn segment(from: u16, to: u16, flags: u8) -> Vec<u8> {
    let mut segment = [from.to_be_bytes(), to.to_be_bytes()].concat();
    segment.extend([0, 0, 0, 1, 0, 0, 0, 0, 0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
    segment
}

pub(crate) fn datagram(from: u16, to: u16, payload: &[u8]) -> Vec<u8> {
    let mut datagram = [from.to_be_bytes(), to.to_be_bytes()].concat();
    datagram.extend((8 + payload.len() as u16).to_be_bytes());
    datagram.extend([0, 0]);
    datagram.extend(payload);
    datagram
}

pub(crate) fn tcp6(from: End6, to: End6, flags: u8) -> Vec<u8> {
    ipv6(from.0, to.0, proto::TCP, &segment(from.1, to.1, flags))
}

pub(crate) fn udp6(from: End6, to: End6, payload: &[u8]) -> Vec<u8> {
    ipv6(from.0, to.0, proto::UDP, &datagram(from.1, to.1, payload))
}

/// The packet of a transport protocol, TCP with such flags, behind extension headers.
pub(crate) fn packet6(protocol: u8, from: End6, to: End6, flags: u8, extensions: &[(u8, Vec<u8>)]) -> Vec<u8> {
    let payload =
        if protocol == proto::TCP { segment(from.1, to.1, flags) } else { datagram(from.1, to.1, b"hello, world") };
    extended(from.0, to.0, extensions, protocol, &payload)
}

fn address(frame: &[u8], at: usize) -> Ipv6Addr {
    let bytes: [u8; 16] = frame[IP + at..IP + at + 16].try_into().expect("an IPv6 header");
    bytes.into()
}

/// Source and destination addresses.
pub(crate) fn addresses(frame: &[u8]) -> (Ipv6Addr, Ipv6Addr) {
    (address(frame, 8), address(frame, 24))
}

/// Source and destination of a packet whose extension headers take so many bytes; asserts that its checksum is right.
#[track_caller]
pub(crate) fn ends_behind(frame: &[u8], protocol: u8, extensions: usize) -> (End6, End6) {
    let (src, dst) = addresses(frame);
    let len = usize::from(u16::from_be_bytes([frame[IP + 4], frame[IP + 5]]));
    let segment = &frame[L4 + extensions..L4 + len];
    let unchecked = protocol == proto::UDP && segment[6..8] == [0, 0];
    if !unchecked {
        assert_eq!(sum(src, dst, protocol, segment), 0, "transport checksum");
    }
    let port = |at: usize| u16::from_be_bytes([segment[at], segment[at + 1]]);
    ((src, port(0)), (dst, port(2)))
}

/// The same without extension headers.
#[track_caller]
pub(crate) fn ends6(frame: &[u8]) -> (End6, End6) {
    ends_behind(frame, frame[IP + 6], 0)
}

pub(crate) fn hops(frame: &[u8]) -> u8 {
    frame[IP + 7]
}

pub(crate) fn with_hops(mut frame: Vec<u8>, hops: u8) -> Vec<u8> {
    frame[IP + 7] = hops;
    frame
}

/// An ICMPv6 message: type, code, the rest of the header, data.
pub(crate) fn icmp6(src: Ipv6Addr, dst: Ipv6Addr, header: [u8; 6], data: &[u8]) -> Vec<u8> {
    let [kind, code, rest @ ..] = header;
    let mut message = vec![kind, code, 0, 0];
    message.extend(rest);
    message.extend(data);
    ipv6(src, dst, proto::ICMPV6, &message)
}
