//! IPv4 (RFC 791).

use kinesin_abi::{Addr, Be16, FlowKey, proto};

use super::{Packet, Quoted, Unparsed, at, has_ports, linearize, ports};
use crate::{
    family::{Family, V4},
    fragments::LATER,
    frame::Frame,
    rewrite::add,
    skb::Skb,
};

/// `more fragments`, `don't fragment` and the offset, of the flags field.
const FRAGMENT_OFFSET: u16 = 0x1fff;
const MORE_FRAGMENTS: u16 = 0x2000;
const DONT_FRAGMENT: u16 = 0x4000;

#[repr(C)]
#[derive(Clone, Copy)]
pub struct Header {
    pub version_ihl: u8,
    pub tos: u8,
    pub len: u16,
    pub id: u16,
    pub fragment: u16,
    pub ttl: u8,
    pub proto: u8,
    pub check: u16,
    pub src: u32,
    pub dst: u32,
}

impl Header {
    /// The sum of a header without options whose checksum is zero, whatever that is now.
    #[inline(always)]
    pub fn sum(&self) -> u32 {
        let sum = add(self.src, self.dst);
        let sum = add(sum, u16::from_ne_bytes([self.version_ihl, self.tos]) as u32 + self.len as u32);
        let sum = add(sum, self.id as u32 + self.fragment as u32);
        add(sum, u16::from_ne_bytes([self.ttl, self.proto]) as u32)
    }
}

/// Reads the destination and the checksum of a header that was written to since it was read; none where it is cut short.
#[inline(always)]
pub fn read_again(skb: Skb, packet: &mut Packet) -> Option<()> {
    let ip = at::<Header>(skb, packet.l3 & 0xf)?;
    packet.ip_check = ip.check;
    packet.flow.dst = Addr::from_v4_raw(ip.dst);
    Some(())
}

/// Reads an IPv4 packet whose IP header starts at `l3`. Of packets without ports, only the addresses are set.
#[inline(always)]
pub fn parse(skb: impl Frame, l3: u32, packet: &mut Packet) -> Result<(), Unparsed> {
    linearize(skb);
    let Some(ip) = at::<Header>(skb, l3) else { return Err(Unparsed::Foreign) };
    let header = ((ip.version_ihl & 0x0f) as u32) << 2;
    if ip.version_ihl >> 4 != 4 || header < 20 {
        return Err(Unparsed::Foreign);
    }
    let fragment = u16::from_be(ip.fragment);
    let len = u16::from_be(ip.len);
    let protocol = ip.proto;
    packet.flow.src = Addr::from_v4_raw(ip.src);
    packet.flow.dst = Addr::from_v4_raw(ip.dst);
    packet.flow.proto = protocol;
    packet.flow.pad = [0; 3];
    packet.l3 = l3;
    packet.l4 = l3 + header;
    packet.ttl = ip.ttl;
    packet.ip_check = ip.check;
    packet.ip_len = len;
    packet.fragmented = (fragment & MORE_FRAGMENTS != 0) as u8;
    packet.tcp = 0;
    packet.unchecked = 0;
    packet.fragment = ip.id as u32;
    packet.whole = (fragment & DONT_FRAGMENT != 0) as u8;
    packet.l4_len = 8;
    if protocol == proto::ICMP {
        packet.fragmented = (fragment & (MORE_FRAGMENTS | FRAGMENT_OFFSET) != 0) as u8;
        return Err(Unparsed::Icmp);
    }
    if !has_ports(protocol) {
        return Err(Unparsed::UnknownL4);
    }
    if fragment & FRAGMENT_OFFSET != 0 {
        packet.fragmented = LATER;
        return Err(Unparsed::Fragment);
    }
    ports(skb, packet, l3 + header, l3 + len as u32, protocol)
}

/// Reads what an ICMP error quotes, with the tuple into [`Packet::quoted`]; none where it is cut short, no first
/// fragment, or of no protocol with ports. No checksum is verified (RFC 5508 section 4.1 only says "should"): a wrong
/// one stays wrong, for the receiver to see.
#[inline(always)]
pub fn quoted(skb: Skb, packet: &mut Packet) -> Option<Quoted> {
    let l3 = (packet.l4 & V4::L4_MASK) + 8;
    let ip = at::<Header>(skb, l3)?;
    let header = ((ip.version_ihl & 0x0f) as u32) << 2;
    let later = u16::from_be(ip.fragment) & FRAGMENT_OFFSET != 0;
    if ip.version_ihl >> 4 != 4 || header < 20 || later {
        return None;
    }
    packet.quoted = FlowKey {
        src: Addr::from_v4_raw(ip.dst),
        dst: Addr::from_v4_raw(ip.src),
        sport: Be16::default(),
        dport: Be16::default(),
        proto: ip.proto,
        pad: [0; 3],
    };
    let (protocol, ip_check) = (ip.proto, ip.check);
    super::quoted_ports(skb, packet, l3, l3 + header, protocol).map(|quoted| Quoted { ip_check, ..quoted })
}
