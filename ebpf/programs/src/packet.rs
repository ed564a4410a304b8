//! Reading packets. Everything that later steps need is copied out, because any write voids direct packet pointers.
//!
//! It is copied into per-CPU memory, not onto the stack: of values read back from there the verifier knows nothing, so
//! it checks the rest of the program once, and not again for each way that parsing may have gone.
//!
//! Deliberately absent: IPv6, which becomes a sibling of [`ipv4`] with the same result.

use kinesin_abi::{Addr, Be16, DropReason, FlowKey, proto};

use crate::skb::Skb;

pub const TCP_FIN: u8 = 0x01;
pub const TCP_SYN: u8 = 0x02;
pub const TCP_RST: u8 = 0x04;

/// `more fragments` and the offset, of the IPv4 flags field.
const FRAGMENT_OFFSET: u16 = 0x1fff;
const MORE_FRAGMENTS: u16 = 0x2000;

const DONT_FRAGMENT: u16 = 0x4000;

/// No more than Ethernet, the longest IPv4 header, and TCP without options.
const HEADERS: u32 = 14 + 60 + 20;
/// The same of an ICMP error: its own headers, and those that it quotes.
const QUOTING_HEADERS: u32 = 14 + 60 + 8 + 60 + 20;

/// What is known about a TCP or UDP packet.
pub struct Packet {
    /// Its tuple.
    pub flow: FlowKey,
    /// Offset of the IP header.
    pub l3: u32,
    /// Offset of the transport header.
    pub l4: u32,
    /// TCP flags; 0 for UDP.
    pub tcp: u8,
    pub ttl: u8,
    /// The header checksum as loaded.
    pub ip_check: u16,
    /// Length from the IP header on, in bytes.
    pub ip_len: u16,
    /// 1 for a UDP packet without checksum.
    pub unchecked: u8,
    /// 1 for the first fragment of several; of ICMP, for any.
    pub fragmented: u8,
    /// 1 where nobody may fragment the packet.
    pub whole: u8,
    /// Length of the transport header, in bytes.
    pub l4_len: u8,
    /// The longest packet that the way takes which this one does not fit; 0 where the kernel does not say (before 5.12),
    /// which makes the sender guess (RFC 1191 section 5).
    pub mtu: u16,
    /// Of what an ICMP error quotes: the tuple turned round, which is that of packets on the error's way.
    pub quoted: FlowKey,
}

impl Packet {
    /// Length of the IP packet on the wire, where merged segments go one by one, in bytes.
    #[inline(always)]
    pub fn wire_len(&self, skb: Skb) -> u16 {
        let segment = skb.segment();
        let merged = (self.l4 - self.l3) + self.l4_len as u32 + segment;
        // All ones where there are segments. Without a branch: it would double what the verifier follows.
        let mask = 0u32.wrapping_sub(0u32.wrapping_sub(segment) >> 31);
        let len = self.ip_len as u32;
        (len ^ ((len ^ merged) & mask)) as u16
    }

    /// Whether the source is an address of one host elsewhere, so that an answer may be sent to it (RFC 1122 section
    /// 3.2.2).
    #[inline(always)]
    pub fn has_unicast_source(&self) -> bool {
        let first = self.flow.src.v4_raw().to_ne_bytes()[0];
        first != 0 && first != 127 && first < 224
    }
}

/// Why a packet is no [`Packet`]. The numbers are those of the reasons: without payload there is no undefined byte for
/// the compiler to pass along, which the verifier would refuse.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Unparsed {
    /// Not for us to judge.
    Foreign = 0,
    /// ICMP; see `icmp`.
    Icmp = 1,
    /// [`DropReason::InvalidPacket`], where the destination address is ours.
    Invalid = DropReason::InvalidPacket as u8,
    /// [`DropReason::UnknownL4`], where the destination address is ours.
    UnknownL4 = DropReason::UnknownL4 as u8,
    /// [`DropReason::Fragment`], where the destination address is ours.
    Fragment = DropReason::Fragment as u8,
}

#[repr(C)]
struct Ipv4 {
    version_ihl: u8,
    tos: u8,
    len: u16,
    id: u16,
    fragment: u16,
    ttl: u8,
    proto: u8,
    check: u16,
    src: u32,
    dst: u32,
}

/// A reference to a header inside the packet, if the packet reaches that far.
#[inline(always)]
fn at<'a, T>(skb: Skb, offset: u32) -> Option<&'a T> {
    let start = skb.data() + offset as usize;
    if start + size_of::<T>() > skb.data_end() {
        return None;
    }
    // SAFETY: within the packet as just checked, in the form that the verifier follows.
    Some(unsafe { &*(start as *const T) })
}

/// Makes the headers directly readable where they are in the skb's fragments.
#[inline(always)]
pub fn linearize(skb: Skb) {
    linearize_to(skb, HEADERS);
}

#[inline(always)]
fn linearize_to(skb: Skb, most: u32) {
    let wanted = if skb.len() < most { skb.len() } else { most };
    if skb.data() + wanted as usize > skb.data_end() {
        skb.pull(wanted);
    }
}

/// Reads an IPv4 packet whose IP header starts at `l3`. Of packets without ports, only the addresses are set.
#[inline(always)]
pub fn ipv4(skb: Skb, l3: u32, packet: &mut Packet) -> Result<(), Unparsed> {
    linearize(skb);
    let Some(ip) = at::<Ipv4>(skb, l3) else { return Err(Unparsed::Foreign) };
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
    packet.whole = (fragment & DONT_FRAGMENT != 0) as u8;
    packet.l4_len = 8;
    if protocol == proto::ICMP {
        packet.fragmented = (fragment & (MORE_FRAGMENTS | FRAGMENT_OFFSET) != 0) as u8;
        return Err(Unparsed::Icmp);
    }
    if protocol != proto::TCP && protocol != proto::UDP {
        return Err(Unparsed::UnknownL4);
    }
    if fragment & FRAGMENT_OFFSET != 0 {
        return Err(Unparsed::Fragment);
    }
    if l3 + len as u32 > skb.len() {
        return Err(Unparsed::Invalid);
    }
    let l4 = l3 + header;
    if protocol == proto::TCP {
        let Some(tcp) = at::<[u16; 10]>(skb, l4) else { return Err(Unparsed::Invalid) };
        let offset_flags = u16::from_be(tcp[6]);
        if (len as u32) < header + 20 || offset_flags >> 12 < 5 {
            return Err(Unparsed::Invalid);
        }
        packet.flow.sport = Be16::from_raw(tcp[0]);
        packet.flow.dport = Be16::from_raw(tcp[1]);
        packet.tcp = offset_flags as u8;
        packet.l4_len = (offset_flags >> 12 << 2) as u8;
    } else {
        let Some(udp) = at::<[u16; 4]>(skb, l4) else { return Err(Unparsed::Invalid) };
        if (len as u32) < header + 8 || u16::from_be(udp[2]) < 8 {
            return Err(Unparsed::Invalid);
        }
        packet.flow.sport = Be16::from_raw(udp[0]);
        packet.flow.dport = Be16::from_raw(udp[1]);
        packet.unchecked = (udp[3] == 0) as u8;
    }
    Ok(())
}

/// The transport header of a TCP or UDP packet without options: the sum of its words, and its checksum.
#[inline(always)]
pub fn transport(skb: Skb, packet: &Packet) -> Option<(u32, u16)> {
    // No more than it can be, which the verifier has forgotten.
    let l4 = packet.l4 & 0x7f;
    let mut sum = 0;
    if packet.flow.proto == proto::TCP {
        let tcp = at::<[u16; 10]>(skb, l4)?;
        for word in tcp {
            sum += *word as u32;
        }
        Some((sum, tcp[8]))
    } else {
        let udp = at::<[u16; 4]>(skb, l4)?;
        for word in udp {
            sum += *word as u32;
        }
        Some((sum, udp[3]))
    }
}

/// The start of an ICMP message (RFC 792).
pub struct Icmp {
    /// Type.
    pub kind: u8,
    pub check: u16,
}

/// Reads the ICMP header of a packet; none where it is cut short.
#[inline(always)]
pub fn icmp(skb: Skb, packet: &Packet) -> Option<Icmp> {
    linearize_to(skb, QUOTING_HEADERS);
    let icmp = at::<[u16; 4]>(skb, packet.l4 & 0x7f)?;
    let fits = packet.l3 + packet.ip_len as u32 <= skb.len() && packet.l4 + 8 <= packet.l3 + packet.ip_len as u32;
    fits.then_some(Icmp { kind: icmp[0].to_ne_bytes()[0], check: icmp[1] })
}

/// The headers of the packet that an ICMP error quotes.
pub struct Quoted {
    /// Offset of its IP header.
    pub l3: u32,
    /// Offset of its transport header.
    pub l4: u32,
    /// Its header checksum as loaded.
    pub ip_check: u16,
    /// Its transport checksum as loaded; 0 where there is none, or it is not quoted.
    pub check: u16,
}

/// Reads what an ICMP error quotes, with the tuple into [`Packet::quoted`]; none where it is cut short, no first fragment, or of no protocol with ports. No
/// checksum is verified (RFC 5508 section 4.1 only says "should"): a wrong one stays wrong, for the receiver to see.
#[inline(always)]
pub fn quoted(skb: Skb, packet: &mut Packet) -> Option<Quoted> {
    let l3 = (packet.l4 & 0x7f) + 8;
    let ip = at::<Ipv4>(skb, l3)?;
    let header = ((ip.version_ihl & 0x0f) as u32) << 2;
    let later = u16::from_be(ip.fragment) & FRAGMENT_OFFSET != 0;
    if ip.version_ihl >> 4 != 4 || header < 20 || later || (ip.proto != proto::TCP && ip.proto != proto::UDP) {
        return None;
    }
    let l4 = l3 + header;
    let end = packet.l3 + packet.ip_len as u32;
    if l4 + 8 > end {
        return None;
    }
    let (src, dst, protocol, ip_check) = (ip.src, ip.dst, ip.proto, ip.check);
    let ports = at::<[u16; 4]>(skb, l4)?;
    let (sport, dport, mut check) = (ports[0], ports[1], ports[3]);
    if protocol == proto::TCP {
        check = match at::<[u16; 10]>(skb, l4) {
            Some(tcp) if l4 + 20 <= end => tcp[8],
            _ => 0,
        };
    }
    packet.quoted = FlowKey {
        src: Addr::from_v4_raw(dst),
        dst: Addr::from_v4_raw(src),
        sport: Be16::from_raw(dport),
        dport: Be16::from_raw(sport),
        proto: protocol,
        pad: [0; 3],
    };
    Some(Quoted { l3, l4, ip_check, check })
}

/// The start of an Ethernet frame.
#[repr(C)]
pub struct Ethernet {
    pub dst: [u16; 3],
    pub src: [u16; 3],
    pub kind: u16,
}

/// ARP for IPv4 over Ethernet (RFC 826), with the frame's header.
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
pub fn ethernet<'a>(skb: Skb) -> Option<&'a Ethernet> {
    at(skb, 0)
}
