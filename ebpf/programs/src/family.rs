//! What IPv4 and IPv6 do not have in common. Everything that is written once for both takes a [`Family`]; each program
//! is compiled for one, so that neither pays for the other.
//!
//! Deliberately absent: any decision.

use kinesin_abi::{Addr, DeviceValue, DropReason, SETTING_FOLLOW_FRAGMENTS4, SETTING_FOLLOW_FRAGMENTS6, proto};

use crate::{
    frame::Frame,
    packet::{self, Packet, Quoted, Unparsed},
    rewrite::{self, add, change},
    skb::Skb,
};

/// A version of the Internet protocol.
pub trait Family {
    /// EtherType in wire order.
    const ETHERTYPE: u16;
    /// `AF_INET` or `AF_INET6`.
    const AF: u8;
    /// Number of its ICMP.
    const ICMP: u8;
    /// Whether its ICMP checksum covers a pseudo header (RFC 4443 section 2.3), where IPv4 has a header checksum.
    const ICMP_HAS_PSEUDO_HEADER: bool;
    const ECHO_REQUEST: u8;
    const ECHO_REPLY: u8;
    /// An ICMP message that is neither an error nor a request that is answered.
    const UNKNOWN_ICMP: DropReason;
    /// Addresses of 16 bytes, of which few fit a program's stack.
    const LONG_ADDRESSES: bool;
    /// The setting for its fragments.
    const FOLLOW_FRAGMENTS: u32;
    /// Length of the IP header without options or extension headers.
    const HEADER: u32;
    /// Bits of the offset of an outer transport header.
    const L4_MASK: u32;

    /// Reads a packet whose IP header starts at `l3`. Of packets without ports, only the addresses are set.
    fn parse(skb: impl Frame, l3: u32, packet: &mut Packet) -> Result<(), Unparsed>;
    /// Reads what an ICMP error quotes.
    fn quoted(skb: Skb, packet: &mut Packet) -> Option<Quoted>;
    /// Writes to the packet, keeping the kernel's knowledge of its sum true where it is not true by itself.
    fn store<T>(skb: Skb, offset: u32, value: &T) -> Result<(), DropReason>;
    /// Gives the IP header a hop limit and addresses; returns how the sum of the addresses has changed.
    fn header(skb: impl Frame, packet: &Packet, hops: u8, src: Addr, dst: Addr) -> Result<u32, DropReason>;
    /// Reads whom a packet that was written to is for, and what counting a hop changes; false where it is cut short.
    fn read_again(skb: Skb, packet: &mut Packet) -> bool;
    /// Counts one hop, and changes nothing else.
    fn hop(skb: impl Frame, packet: &Packet) -> Result<(), DropReason>;
    /// Gives a quoted IP header addresses, whose sum changes by `difference`.
    fn requote(skb: Skb, quoted: &Quoted, difference: u32, src: Addr, dst: Addr) -> Result<(), DropReason>;
    /// Whether an ICMP type is of an error that concerns one packet.
    fn is_error(kind: u8) -> bool;
    /// Whether the address is of one host elsewhere, so that an answer may be sent to it.
    fn is_unicast(addr: &Addr) -> bool;
    fn same(a: &Addr, b: &Addr) -> bool;
    /// How the sum of two addresses changes.
    fn difference(from_a: &Addr, to_a: &Addr, from_b: &Addr, to_b: &Addr) -> u32;
    /// The sum of two addresses.
    fn sum(a: &Addr, b: &Addr) -> u32;
    /// The device's own address; none where it has none.
    fn of_device(device: &DeviceValue) -> Option<Addr>;
}

/// RFC 791.
pub struct V4;
/// RFC 8200.
pub struct V6;

impl Family for V4 {
    const ETHERTYPE: u16 = 0x0800u16.to_be();
    const AF: u8 = 2;
    const ICMP: u8 = proto::ICMP;
    const ICMP_HAS_PSEUDO_HEADER: bool = false;
    const ECHO_REQUEST: u8 = 8;
    const ECHO_REPLY: u8 = 0;
    const UNKNOWN_ICMP: DropReason = DropReason::UnknownIcmpType;
    const LONG_ADDRESSES: bool = false;
    const FOLLOW_FRAGMENTS: u32 = SETTING_FOLLOW_FRAGMENTS4;
    const HEADER: u32 = 20;
    const L4_MASK: u32 = 0x7f;

    #[inline(always)]
    fn parse(skb: impl Frame, l3: u32, packet: &mut Packet) -> Result<(), Unparsed> {
        packet::ipv4::parse(skb, l3, packet)
    }

    #[inline(always)]
    fn quoted(skb: Skb, packet: &mut Packet) -> Option<Quoted> {
        packet::ipv4::quoted(skb, packet)
    }

    /// What the header's checksum makes up for, and what the transport's does, leave the sum as it was.
    #[inline(always)]
    fn store<T>(skb: Skb, offset: u32, value: &T) -> Result<(), DropReason> {
        skb.store(offset, value)
    }

    #[inline(always)]
    fn header(skb: impl Frame, packet: &Packet, hops: u8, src: Addr, dst: Addr) -> Result<u32, DropReason> {
        rewrite::header4(skb, packet, hops, src, dst)
    }

    #[inline(always)]
    fn read_again(skb: Skb, packet: &mut Packet) -> bool {
        packet::ipv4::read_again(skb, packet).is_some()
    }

    #[inline(always)]
    fn hop(skb: impl Frame, packet: &Packet) -> Result<(), DropReason> {
        rewrite::hop4(skb, packet)
    }

    #[inline(always)]
    fn requote(skb: Skb, quoted: &Quoted, difference: u32, src: Addr, dst: Addr) -> Result<(), DropReason> {
        rewrite::requote4(skb, quoted, difference, src, dst)
    }

    /// Destination unreachable, time exceeded, parameter problem (RFC 792).
    #[inline(always)]
    fn is_error(kind: u8) -> bool {
        kind == 3 || kind == 11 || kind == 12
    }

    /// RFC 1122 section 3.2.2.
    #[inline(always)]
    fn is_unicast(addr: &Addr) -> bool {
        let first = addr.v4_raw().to_ne_bytes()[0];
        first != 0 && first != 127 && first < 224
    }

    #[inline(always)]
    fn same(a: &Addr, b: &Addr) -> bool {
        a.v4_raw() == b.v4_raw()
    }

    #[inline(always)]
    fn difference(from_a: &Addr, to_a: &Addr, from_b: &Addr, to_b: &Addr) -> u32 {
        change(from_a.v4_raw(), to_a.v4_raw(), from_b.v4_raw(), to_b.v4_raw())
    }

    #[inline(always)]
    fn sum(a: &Addr, b: &Addr) -> u32 {
        add(a.v4_raw(), b.v4_raw())
    }

    #[inline(always)]
    fn of_device(device: &DeviceValue) -> Option<Addr> {
        Some(device.ipv4).filter(|&ipv4| ipv4 != 0).map(Addr::from_v4_raw)
    }
}

impl Family for V6 {
    const ETHERTYPE: u16 = 0x86ddu16.to_be();
    const AF: u8 = 10;
    const ICMP: u8 = proto::ICMPV6;
    const ICMP_HAS_PSEUDO_HEADER: bool = true;
    const ECHO_REQUEST: u8 = 128;
    const ECHO_REPLY: u8 = 129;
    const UNKNOWN_ICMP: DropReason = DropReason::UnknownIcmp6Type;
    const LONG_ADDRESSES: bool = true;
    const FOLLOW_FRAGMENTS: u32 = SETTING_FOLLOW_FRAGMENTS6;
    const HEADER: u32 = packet::ipv6::HEADER;
    const L4_MASK: u32 = 0xff;

    #[inline(always)]
    fn parse(skb: impl Frame, l3: u32, packet: &mut Packet) -> Result<(), Unparsed> {
        packet::ipv6::parse(skb, l3, packet)
    }

    #[inline(always)]
    fn quoted(skb: Skb, packet: &mut Packet) -> Option<Quoted> {
        packet::ipv6::quoted(skb, packet)
    }

    /// Nothing makes up for a change of the header.
    #[inline(always)]
    fn store<T>(skb: Skb, offset: u32, value: &T) -> Result<(), DropReason> {
        skb.store_and_sum(offset, value)
    }

    #[inline(always)]
    fn header(skb: impl Frame, packet: &Packet, hops: u8, src: Addr, dst: Addr) -> Result<u32, DropReason> {
        rewrite::header6(skb, packet, hops, src, dst)
    }

    #[inline(always)]
    fn read_again(skb: Skb, packet: &mut Packet) -> bool {
        packet::ipv6::read_again(skb, packet).is_some()
    }

    #[inline(always)]
    fn hop(skb: impl Frame, packet: &Packet) -> Result<(), DropReason> {
        rewrite::hop6(skb, packet)
    }

    #[inline(always)]
    fn requote(skb: Skb, quoted: &Quoted, _difference: u32, src: Addr, dst: Addr) -> Result<(), DropReason> {
        rewrite::requote6(skb, quoted, src, dst)
    }

    /// Destination unreachable, packet too big, time exceeded, parameter problem (RFC 4443 section 2.1).
    #[inline(always)]
    fn is_error(kind: u8) -> bool {
        kind.wrapping_sub(1) < 4
    }

    /// Neither unspecified, loopback nor multicast (RFC 4443 section 2.4 (e)).
    #[inline(always)]
    fn is_unicast(addr: &Addr) -> bool {
        let [a, b, c, d] = addr.words;
        let first = a.to_ne_bytes()[0];
        let low = a | b | c | (d & !1u32.to_be()) == 0;
        (first != 0xff) & !low
    }

    #[inline(always)]
    fn same(a: &Addr, b: &Addr) -> bool {
        let mut difference = 0;
        for i in 0..4 {
            difference |= a.words[i] ^ b.words[i];
        }
        difference == 0
    }

    #[inline(always)]
    fn difference(from_a: &Addr, to_a: &Addr, from_b: &Addr, to_b: &Addr) -> u32 {
        let mut sum = 0;
        for i in 0..4 {
            sum = add(sum, change(from_a.words[i], to_a.words[i], from_b.words[i], to_b.words[i]));
        }
        sum
    }

    #[inline(always)]
    fn sum(a: &Addr, b: &Addr) -> u32 {
        let mut sum = 0;
        for i in 0..4 {
            sum = add(sum, add(a.words[i], b.words[i]));
        }
        sum
    }

    #[inline(always)]
    fn of_device(device: &DeviceValue) -> Option<Addr> {
        Some(device.ipv6).filter(|ipv6| !ipv6.is_unspecified())
    }
}
