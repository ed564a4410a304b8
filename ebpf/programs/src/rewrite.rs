//! Writing a new tuple into a packet, with its checksums (RFC 1624) in whatever state of offload they are.

use kinesin_abi::{Addr, Be16, DropReason, proto};

use crate::{
    family::{Family, V4, V6},
    fragments::LATER,
    frame::Frame,
    packet::{Packet, Quoted},
    skb::Skb,
};

/// Offset of the TTL in the IPv4 header; protocol, checksum and both addresses follow it.
const TTL: u32 = 8;
/// Offset of the checksum in the IPv4 header; both addresses follow it.
const IP_CHECK: u32 = 10;
/// Offset of the payload length in the IPv6 header; next header, hop limit and both addresses follow it.
const PAYLOAD: u32 = 4;
/// Offset of the next header in the IPv6 header; the hop limit follows it.
const NEXT: u32 = 6;
/// Offset of the addresses in the IPv6 header.
const ADDRESSES: u32 = 8;
const TCP_CHECK: u32 = 16;
const UDP_CHECK: u32 = 6;

/// The tuple that a packet gets.
pub struct Tuple {
    pub src: Addr,
    pub dst: Addr,
    pub sport: Be16,
    pub dport: Be16,
}

/// TTL to the end of an IPv4 header without options.
#[repr(C)]
struct Tail {
    ttl: u8,
    proto: u8,
    check: u16,
    src: u32,
    dst: u32,
}

/// Payload length to the end of an IPv6 header.
#[repr(C)]
struct Tail6 {
    payload: u16,
    next: u8,
    hops: u8,
    src: Addr,
    dst: Addr,
}

/// Gives the packet a new tuple, and one hop less where it does not pass the host's stack.
#[inline(always)]
pub fn translate<F: Family>(skb: impl Frame, packet: &Packet, to: &Tuple, hop: bool) -> Result<(), DropReason> {
    if F::LONG_ADDRESSES {
        return if apart::<F>(skb, packet, to, hop as u32) == 0 { Ok(()) } else { Err(DropReason::WriteError) };
    }
    write::<F>(skb, packet, to, hop)
}

/// [`write`] with a stack of its own; 0 where it worked.
#[inline(never)]
fn apart<F: Family>(skb: impl Frame, packet: &Packet, to: &Tuple, hop: u32) -> u32 {
    write::<F>(skb, packet, to, hop != 0).is_err() as u32
}

#[inline(always)]
fn write<F: Family>(skb: impl Frame, packet: &Packet, to: &Tuple, hop: bool) -> Result<(), DropReason> {
    let old = &packet.flow;
    let ttl = if hop { packet.ttl.wrapping_sub(1) } else { packet.ttl };
    let difference = F::header(skb, packet, ttl, to.src, to.dst)?;
    if packet.fragmented == LATER {
        return Ok(());
    }
    let (from, ports) = (ports(old.sport, old.dport), ports(to.sport, to.dport));
    if old.proto == proto::SCTP {
        // Its checksum covers no address (RFC 9260 section 6.8), and all of the rest, which no helper sums up.
        return if from == ports { Ok(()) } else { Err(DropReason::CsumL4) };
    }
    let at = packet.l4 + if old.proto == proto::TCP { TCP_CHECK } else { UDP_CHECK };
    skb.replace_pseudo(at, difference, old.proto)?;
    if from != ports {
        skb.replace_word(at, from, ports, old.proto)?;
        skb.store(packet.l4, &ports)?;
    }
    Ok(())
}

/// Gives an IPv4 header a TTL and addresses; returns how the sum of the addresses has changed.
#[inline(always)]
pub fn header4(skb: impl Frame, packet: &Packet, ttl: u8, src: Addr, dst: Addr) -> Result<u32, DropReason> {
    let old = &packet.flow;
    let difference = V4::difference(&old.src, &src, &old.dst, &dst);
    let check = updated(packet.ip_check, add(counted(packet, ttl), difference));
    skb.store(packet.l3 + TTL, &Tail { ttl, proto: old.proto, check, src: src.v4_raw(), dst: dst.v4_raw() })?;
    Ok(difference)
}

/// Gives an IPv6 header a hop limit and addresses; returns how the sum of the addresses has changed.
#[inline(always)]
pub fn header6(skb: impl Frame, packet: &Packet, hops: u8, src: Addr, dst: Addr) -> Result<u32, DropReason> {
    let difference = V6::difference(&packet.flow.src, &src, &packet.flow.dst, &dst);
    let tail = Tail6 { payload: packet.payload, next: packet.next, hops, src, dst };
    skb.store_and_sum(packet.l3 + PAYLOAD, &tail)?;
    Ok(difference)
}

/// Counts one hop of an IPv4 packet, and changes nothing else.
#[inline(always)]
pub fn hop4(skb: impl Frame, packet: &Packet) -> Result<(), DropReason> {
    let (protocol, ttl) = (packet.flow.proto, packet.ttl.wrapping_sub(1));
    let [a, b] = updated(packet.ip_check, counted(packet, ttl)).to_ne_bytes();
    skb.store(packet.l3 + TTL, &[ttl, protocol, a, b])
}

/// Gives an IPv6 header a payload that has `grown`, and what follows its length: next header and hop limit.
#[inline(always)]
pub fn payload6(skb: Skb, packet: &Packet, grown: u16, rest: [u8; 2]) -> Result<(), DropReason> {
    let l3 = packet.l3 & 0xf;
    // In two steps: as one, Linux 6.1 follows what comes before it half as often again.
    skb.store_and_sum(l3 + PAYLOAD, &u16::from_be(packet.payload).wrapping_add(grown).to_be())?;
    skb.store_and_sum(l3 + NEXT, &rest)
}

/// Counts one hop of an IPv6 packet, and changes nothing else.
#[inline(always)]
pub fn hop6(skb: impl Frame, packet: &Packet) -> Result<(), DropReason> {
    skb.store_and_sum(packet.l3 + NEXT, &[packet.next, packet.ttl.wrapping_sub(1)])
}

/// Gives an IPv4 header that an ICMP error quotes addresses, whose sum changes by `difference`.
#[inline(always)]
pub fn requote4(skb: Skb, quoted: &Quoted, difference: u32, src: Addr, dst: Addr) -> Result<(), DropReason> {
    let check = updated(quoted.ip_check, difference);
    let ([a, b], [c, d]) = halves(src.v4_raw(), dst.v4_raw());
    skb.store(quoted.l3 + IP_CHECK, &[check, a, b, c, d])
}

/// Gives an IPv6 header that an ICMP error quotes addresses.
#[inline(always)]
pub fn requote6(skb: Skb, quoted: &Quoted, src: Addr, dst: Addr) -> Result<(), DropReason> {
    skb.store_and_sum(quoted.l3 + ADDRESSES, &[src, dst])
}

/// Two words as they are in memory, by halves.
#[inline(always)]
fn halves(first: u32, second: u32) -> ([u16; 2], [u16; 2]) {
    let split = |word: u32| {
        let [a, b, c, d] = word.to_ne_bytes();
        [u16::from_ne_bytes([a, b]), u16::from_ne_bytes([c, d])]
    };
    (split(first), split(second))
}

/// How the sum of two words changes.
#[inline(always)]
pub fn change(from_a: u32, to_a: u32, from_b: u32, to_b: u32) -> u32 {
    add(add(!from_a, to_a), add(!from_b, to_b))
}

/// A checksum after the sum that it covers has changed (RFC 1624 equation 3).
#[inline(always)]
pub fn updated(check: u16, difference: u32) -> u16 {
    !fold(add(!(check as u32) & 0xffff, difference))
}

/// Both ports as one word in wire order.
#[inline(always)]
pub fn ports(sport: Be16, dport: Be16) -> u32 {
    let ([a, b], [c, d]) = (sport.raw().to_ne_bytes(), dport.raw().to_ne_bytes());
    u32::from_ne_bytes([a, b, c, d])
}

/// How the sum of an IPv4 header changes with its TTL.
#[inline(always)]
fn counted(packet: &Packet, ttl: u8) -> u32 {
    let word = |ttl| u16::from_ne_bytes([ttl, packet.flow.proto]) as u32;
    add(!word(packet.ttl) & 0xffff, word(ttl))
}

/// Ones' complement sum of 32 bits.
#[inline(always)]
pub fn add(a: u32, b: u32) -> u32 {
    let sum = a as u64 + b as u64;
    (sum as u32).wrapping_add((sum >> 32) as u32)
}

/// To 16 bits.
#[inline(always)]
pub fn fold(sum: u32) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u16
}
