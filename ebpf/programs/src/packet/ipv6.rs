//! IPv6 and its extension headers (RFC 8200, RFC 4302).
//!
//! So many extension headers are followed, and so many bytes of them, as fit the programs: who sends more than any stack
//! does by itself is told by a drop reason. Authentication headers are followed although what they protect is about to
//! change: whether to believe them is the receiver's business.
//!
//! Deliberately absent: ESP, which hides the ports, and routing headers that are not at their end, whose packets are for
//! another address.

use kinesin_abi::{Addr, Be16, FlowKey, proto};

use super::{Packet, Quoted, Unparsed, at, has_ports, linearize, linearize_to, ports};
use crate::{
    family::{Family, V6},
    fragments::LATER,
    frame::Frame,
    lookup,
    skb::Skb,
};

/// Length of the fixed header.
pub const HEADER: u32 = 40;
/// Its first word, without traffic class and flow label.
pub const VERSION: u32 = 0x6000_0000u32.to_be();
/// Most extension headers that are followed, and most bytes of them: an outer transport header starts below 256.
const MOST: u32 = 6;
const MOST_BYTES: u32 = 160;

const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const DESTINATION: u8 = 60;
const MOBILITY: u8 = 135;

/// The fixed header.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Header {
    pub version_class_label: u32,
    pub payload: u16,
    pub next: u8,
    pub hops: u8,
    pub src: [u32; 4],
    pub dst: [u32; 4],
}

/// Where a chain of extension headers ends, in memory that the verifier does not look into: otherwise it would follow
/// each length of each header.
pub struct Upper {
    /// Offset of the header at hand; in the end of the transport header, or of what a later fragment carries.
    l4: u32,
    /// The sum of the headers' words.
    sum: u32,
    /// Identification in wire order; 0 without fragment header.
    fragment: u32,
    proto: u8,
    /// More fragments follow.
    more: u8,
}

/// Reads the destination and the next header of a header that was written to since it was read; none where it is cut short.
#[inline(always)]
pub fn read_again(skb: Skb, packet: &mut Packet) -> Option<()> {
    let ip = at::<Header>(skb, packet.l3 & 0xf)?;
    packet.next = ip.next;
    packet.flow.dst = Addr { words: ip.dst };
    Some(())
}

/// Reads an IPv6 packet whose IP header starts at `l3`. Of packets without ports, only the addresses are set.
#[inline(always)]
pub fn parse<C: Frame>(skb: C, l3: u32, packet: &mut Packet) -> Result<(), Unparsed> {
    linearize(skb);
    let Some(ip) = at::<Header>(skb, l3) else { return Err(Unparsed::Foreign) };
    if ip.version_class_label.to_ne_bytes()[0] >> 4 != 6 {
        return Err(Unparsed::Foreign);
    }
    // Never on the wire (RFC 4291 section 2.5.5.2); in the maps they are IPv4's.
    let (src, dst) = (Addr { words: ip.src }, Addr { words: ip.dst });
    if src.is_v4() | dst.is_v4() {
        return Err(Unparsed::Foreign);
    }
    let payload = u16::from_be(ip.payload);
    let first = ip.next;
    packet.flow.src = src;
    packet.flow.dst = dst;
    packet.flow.proto = first;
    packet.flow.pad = [0; 3];
    packet.l3 = l3;
    packet.l4 = l3 + HEADER;
    packet.ttl = ip.hops;
    packet.next = first;
    packet.payload = ip.payload;
    packet.tcp = 0;
    packet.unchecked = 0;
    packet.fragmented = 0;
    packet.whole = 1;
    packet.l4_len = 8;
    // Segments merged beyond 64 KiB have no length (RFC 2675).
    let len = if payload == 0 && skb.segment() != 0 { u16::MAX } else { payload.saturating_add(HEADER as u16) };
    packet.ip_len = len;
    let end = if len == u16::MAX { skb.len() } else { l3 + len as u32 };
    if !has_ports(first) && first != proto::ICMPV6 {
        if !C::FOLLOWS_EXTENSIONS {
            return Err(Unparsed::Extension);
        }
        linearize_to(skb, l3 + HEADER + MOST_BYTES + 20);
        match upper(skb, l3 + HEADER, first as u32, end, &mut packet.upper) {
            END => {}
            MIDDLE => {
                packet.fragmented = LATER;
                packet.fragment = packet.upper.fragment;
                return Err(Unparsed::Fragment);
            }
            TOO_MANY => return Err(Unparsed::UnknownL4),
            _ => return Err(Unparsed::Extension),
        }
        packet.l4 = packet.upper.l4;
        packet.flow.proto = packet.upper.proto;
        packet.fragmented = packet.upper.more;
        packet.fragment = packet.upper.fragment;
    }
    let protocol = packet.flow.proto;
    if protocol == proto::ICMPV6 {
        return Err(Unparsed::Icmp);
    }
    if !has_ports(protocol) {
        return Err(Unparsed::UnknownL4);
    }
    ports(skb, packet, packet.l4 & V6::L4_MASK, end, protocol)
}

// What becomes of a chain of extension headers. Plain numbers, so that all ways out look the same to the verifier.
/// It ends with another protocol.
const END: u32 = 0;
/// With a fragment that is not the first.
const MIDDLE: u32 = 1;
/// It does not end within what is followed.
const TOO_MANY: u32 = 2;
/// It is cut short, or leads elsewhere.
const BROKEN: u32 = 3;

/// Follows the extension headers of a packet from `start`, where one of type `first` is, no further than to `end`.
#[inline(never)]
fn upper<C: Frame>(skb: C, start: u32, first: u32, end: u32, found: &mut Upper) -> u32 {
    let mut next = first as u8;
    found.fragment = 0;
    found.more = 0;
    found.l4 = start;
    for _ in 0..MOST {
        // SAFETY: a reference. Volatile, so that the compiler does not keep it at hand.
        let offset = unsafe { (&raw const found.l4).read_volatile() } & 0x1ff;
        let extension = next == HOP_BY_HOP
            || next == ROUTING
            || next == FRAGMENT
            || next == AUTHENTICATION
            || next == DESTINATION
            || next == MOBILITY;
        if !extension {
            found.proto = next;
            return END;
        }
        let Some(header) = at::<[u8; 8]>(skb, offset) else { return BROKEN };
        let units = header[1] as u32;
        let mut len = (units + 1) << 3;
        if next == AUTHENTICATION {
            // In IPv6 always whole units of eight bytes (RFC 4302 section 2.2), as the sum of headers relies on.
            len = ((units + 2) << 2) & !7;
        }
        if next == ROUTING && header[3] != 0 {
            return BROKEN;
        }
        if next == FRAGMENT {
            len = 8;
            let position = u16::from_be_bytes([header[2], header[3]]);
            found.fragment = u32::from_ne_bytes([header[4], header[5], header[6], header[7]]);
            found.more = (position & 1) as u8;
            if position & 0xfff8 != 0 {
                found.l4 = offset + 8;
                return MIDDLE;
            }
        }
        next = header[0];
        if len > MOST_BYTES || offset + len > start + MOST_BYTES {
            return TOO_MANY;
        }
        found.l4 = offset + len;
        if offset + len > end {
            return BROKEN;
        }
    }
    TOO_MANY
}

/// Reads what an ICMP error quotes, with the tuple into [`Packet::quoted`]; none where it is cut short, no first
/// fragment, or of no protocol with ports.
#[inline(always)]
pub fn quoted(skb: Skb, packet: &mut Packet) -> Option<Quoted> {
    let l3 = (packet.l4 & V6::L4_MASK) + 8;
    let ip = at::<Header>(skb, l3)?;
    if ip.version_class_label.to_ne_bytes()[0] >> 4 != 6 {
        return None;
    }
    packet.quoted = FlowKey {
        src: Addr { words: ip.dst },
        dst: Addr { words: ip.src },
        sport: Be16::default(),
        dport: Be16::default(),
        proto: ip.next,
        pad: [0; 3],
    };
    let end = packet.l3 + packet.ip_len as u32;
    let first = ip.next as u32;
    if upper(skb, l3 + HEADER, first, end, &mut packet.upper) != END {
        return None;
    }
    let protocol = packet.upper.proto;
    packet.quoted.proto = protocol;
    super::quoted_ports(skb, packet, l3, packet.upper.l4 & 0x1ff, protocol)
}

/// The sum of the words of a packet's IPv6 header and extension headers.
#[inline(always)]
pub fn sum_of_headers(skb: Skb) -> Option<u32> {
    let packet = lookup::scratch()?;
    let fixed = at::<[u16; 20]>(skb, packet.l3 & 0xf)?;
    packet.upper.sum = fixed.iter().map(|word| *word as u32).sum();
    let extensions = packet.l4 - packet.l3 - HEADER;
    if extensions != 0 {
        add_extensions(skb, packet.l3, extensions, &mut packet.upper.sum);
    }
    lookup::scratch().map(|packet| packet.upper.sum)
}

/// Adds the words of so many bytes of extension headers.
#[inline(never)]
fn add_extensions(skb: Skb, l3: u32, len: u32, sum: &mut u32) {
    for i in 0..MOST_BYTES / 8 {
        if i * 8 >= len {
            break;
        }
        let Some(words) = at::<[u16; 4]>(skb, (l3 & 0xf) + HEADER + i * 8) else { break };
        for word in words {
            *sum += *word as u32;
        }
    }
}
