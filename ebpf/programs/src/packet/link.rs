//! Ethernet, ARP (RFC 826) and neighbour solicitations (RFC 4861 section 4.3).

use kinesin_abi::{Addr, proto};

use super::{at, linearize, linearize_to};
use crate::{
    frame::Frame,
    skb::{ETHERNET, Skb},
};

/// The start of an Ethernet frame.
#[repr(C)]
pub struct Ethernet {
    pub dst: [u16; 3],
    pub src: [u16; 3],
    pub kind: u16,
}

/// ARP for IPv4 over Ethernet, with the frame's header.
#[repr(C)]
pub struct Arp {
    pub eth: Ethernet,
    pub hardware: u16,
    pub protocol: u16,
    pub lengths: u16,
    pub operation: u16,
    pub sender_mac: [u16; 3],
    pub sender_ip: [u16; 2],
    pub target_mac: [u16; 3],
    pub target_ip: [u16; 2],
}

/// Reads a whole ARP packet.
#[inline(always)]
pub fn arp<'a>(skb: Skb) -> Option<&'a Arp> {
    linearize(skb);
    at(skb, 0)
}

/// Reads the Ethernet header.
#[inline(always)]
pub fn ethernet<'a>(skb: impl Frame) -> Option<&'a Ethernet> {
    at(skb, 0)
}

/// A neighbour solicitation without its options.
#[repr(C)]
struct Ndp {
    version_class_label: u32,
    payload: u16,
    next_hops: u16,
    src: [u32; 4],
    dst: [u32; 4],
    type_code: u16,
    check: u16,
    reserved: u32,
    target: [u32; 4],
}

/// What a neighbour solicitation says.
pub struct Solicitation {
    pub src: Addr,
    pub target: Addr,
    /// MAC that the frame came from.
    pub from: [u16; 3],
}

/// ICMPv6, and a hop limit that shows that no router has forwarded it.
pub const NEXT_HOPS: u16 = u16::from_ne_bytes([proto::ICMPV6, 255]);
const SOLICITATION: u16 = 0x8700u16.to_be();
/// Most bytes of options that are read: source link-layer address and nonce (RFC 3971) are 8 each.
const OPTIONS: u32 = 32;
const PAYLOAD: u32 = 24;

/// Reads a neighbour solicitation that is valid by RFC 4861 section 7.1.1, but for what options say; none of anything
/// else.
#[inline(always)]
pub fn solicitation(skb: Skb) -> Option<Solicitation> {
    linearize_to(skb, ETHERNET + super::ipv6::HEADER + PAYLOAD + OPTIONS);
    let ndp = at::<Ndp>(skb, ETHERNET)?;
    // A packet that a router has forwarded has fewer hops.
    if ndp.next_hops != NEXT_HOPS || ndp.type_code != SOLICITATION {
        return None;
    }
    let payload = u16::from_be(ndp.payload) as u32;
    let solicitation =
        Solicitation { src: Addr { words: ndp.src }, target: Addr { words: ndp.target }, from: ethernet(skb)?.src };
    (payload >= PAYLOAD && payload & 7 == 0 && payload <= PAYLOAD + OPTIONS && sums_up(skb, payload) == 1)
        .then_some(solicitation)
}

/// 1 where the checksum of an ICMPv6 packet of so many bytes, without extension headers, is right.
#[inline(never)]
fn sums_up(skb: Skb, payload: u32) -> u32 {
    let mut sum = (payload as u16).to_be() as u32 + (proto::ICMPV6 as u16).to_be() as u32;
    // Both addresses, then the message.
    for i in 0..(32 + PAYLOAD + OPTIONS) / 8 {
        if i * 8 >= 32 + payload {
            break;
        }
        let Some(words) = at::<[u16; 4]>(skb, ETHERNET + 8 + i * 8) else { return 0 };
        sum += words[0] as u32 + words[1] as u32 + words[2] as u32 + words[3] as u32;
    }
    (crate::rewrite::fold(sum) == 0xffff) as u32
}
