//! Reading packets. Everything that later steps need is copied out, because any write voids direct packet pointers.
//!
//! It is copied into per-CPU memory, not onto the stack: of values read back from there the verifier knows nothing, so
//! it checks the rest of the program once, and not again for each way that parsing may have gone.

pub mod ipv4;
pub mod ipv6;
pub mod link;

use kinesin_abi::{BackendId, Be16, DropReason, FlowKey, NodeTag, proto};

use crate::{family::Family, frame::Frame, option::Option6, reject::Headers6, skb::Skb, wrap::Outer};

pub const TCP_FIN: u8 = 0x01;
pub const TCP_SYN: u8 = 0x02;
pub const TCP_RST: u8 = 0x04;
pub const TCP_ACK: u8 = 0x10;

/// No more than Ethernet, the longest IPv4 header, and TCP without options.
const HEADERS: u32 = 14 + 60 + 20;
/// The same of an ICMP error: its own headers, and those that it quotes, of IPv6 with extension headers.
const QUOTING_HEADERS: u32 = 14 + 200 + 8 + 200 + 20;

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
    /// TTL or hop limit.
    pub ttl: u8,
    /// Of IPv4: the header checksum as loaded.
    pub ip_check: u16,
    /// Of IPv6: payload length and next header as loaded.
    pub payload: u16,
    pub next: u8,
    /// Length from the IP header on, in bytes.
    pub ip_len: u16,
    /// 1 for a UDP packet without checksum, and for SCTP, whose checksum is no sum of words.
    pub unchecked: u8,
    /// `fragments::FIRST` or `fragments::LATER` for a fragment, of ICMP the former for any; else 0.
    pub fragmented: u8,
    /// 1 where nobody may fragment the packet.
    pub whole: u8,
    /// Length of the transport header, in bytes.
    pub l4_len: u8,
    /// 1 for the first packet of a connection that another node has handed on to us; see `dispatch`.
    pub handed_on: u8,
    /// The peer that has sent us this packet inside another one; 0 for one that came as it is. See `wrap`.
    pub from: NodeTag,
    /// A backend that has been looked for; see `option`.
    pub member: BackendId,
    /// The longest packet that the way takes which this one does not fit; 0 where the kernel does not say (before 5.12),
    /// which makes the sender guess (RFC 1191 section 5).
    pub mtu: u16,
    /// Of what an ICMP error quotes: the tuple turned round, which is that of packets on the error's way. Else free
    /// for a tuple that there is no stack for.
    pub quoted: FlowKey,
    /// Of IPv6: the headers of an answer, while it is made.
    pub answer: Headers6,
    /// The outer header, while a packet is wrapped.
    pub outer: Outer,
    /// Of IPv6: the option, while it is added.
    pub option: Option6,
    /// The hook's code as far as it is decided; see `deliver`.
    pub code: i32,
    /// Bounds of a search; see `dispatch`.
    pub bounds: [u32; 2],
    /// Identification of a fragment, as loaded.
    pub fragment: u32,
    /// Of IPv6: where extension headers end, of the packet or of what it quotes.
    pub upper: ipv6::Upper,
}

impl Packet {
    /// Length of the IP packet on the wire, where merged segments go one by one, in bytes.
    #[inline(always)]
    pub fn wire_len(&self, skb: impl Frame) -> u16 {
        let segment = skb.segment();
        let merged = (self.l4 - self.l3) + self.l4_len as u32 + segment;
        // All ones where there are segments. Without a branch: it would double what the verifier follows.
        let mask = 0u32.wrapping_sub(0u32.wrapping_sub(segment) >> 31);
        let len = self.ip_len as u32;
        (len ^ ((len ^ merged) & mask)) as u16
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
    /// A fragment without ports; only the addresses are set.
    Fragment = DropReason::Fragment as u8,
    /// [`DropReason::Extension`], where the destination address is ours.
    Extension = DropReason::Extension as u8,
}

/// A reference to a header inside a packet that [`linearize`] has been called for, if the packet reaches that far.
#[inline(always)]
pub fn at<'a, T>(skb: impl Frame, offset: u32) -> Option<&'a T> {
    let start = skb.data() + offset as usize;
    if start + size_of::<T>() > skb.data_end() {
        return None;
    }
    // SAFETY: within the packet as just checked, in the form that the verifier follows.
    Some(unsafe { &*(start as *const T) })
}

/// Makes the headers directly readable where they are in the skb's fragments.
#[inline(always)]
pub fn linearize(skb: impl Frame) {
    linearize_to(skb, HEADERS);
}

#[inline(always)]
fn linearize_to(skb: impl Frame, most: u32) {
    let wanted = if skb.len() < most { skb.len() } else { most };
    if skb.data() + wanted as usize > skb.data_end() {
        skb.pull(wanted);
    }
}

/// Whether packets of the protocol begin with ports.
#[inline(always)]
fn has_ports(protocol: u8) -> bool {
    protocol == proto::TCP || protocol == proto::UDP || protocol == proto::SCTP
}

/// Reads the transport header at `l4` of a packet that ends at `end`.
#[inline(always)]
fn ports(skb: impl Frame, packet: &mut Packet, l4: u32, end: u32, protocol: u8) -> Result<(), Unparsed> {
    if end > skb.len() {
        return Err(Unparsed::Invalid);
    }
    if protocol == proto::TCP {
        let Some(tcp) = at::<[u16; 10]>(skb, l4) else { return Err(Unparsed::Invalid) };
        let offset_flags = u16::from_be(tcp[6]);
        if end < l4 + 20 || offset_flags >> 12 < 5 {
            return Err(Unparsed::Invalid);
        }
        packet.flow.sport = Be16::from_raw(tcp[0]);
        packet.flow.dport = Be16::from_raw(tcp[1]);
        packet.tcp = offset_flags as u8;
        packet.l4_len = (offset_flags >> 12 << 2) as u8;
    } else if protocol == proto::SCTP {
        // The common header (RFC 9260 section 3.1).
        let Some(sctp) = at::<[u16; 6]>(skb, l4) else { return Err(Unparsed::Invalid) };
        if end < l4 + 12 {
            return Err(Unparsed::Invalid);
        }
        packet.flow.sport = Be16::from_raw(sctp[0]);
        packet.flow.dport = Be16::from_raw(sctp[1]);
        packet.unchecked = 1;
        packet.l4_len = 12;
    } else {
        let Some(udp) = at::<[u16; 4]>(skb, l4) else { return Err(Unparsed::Invalid) };
        if end < l4 + 8 || u16::from_be(udp[2]) < 8 {
            return Err(Unparsed::Invalid);
        }
        packet.flow.sport = Be16::from_raw(udp[0]);
        packet.flow.dport = Be16::from_raw(udp[1]);
        packet.unchecked = (udp[3] == 0) as u8;
    }
    Ok(())
}

/// The checksum of TCP or UDP whose header is at `l4`; none of anything else, or where the packet ends before.
#[inline(always)]
pub fn checksum(skb: impl Frame, l4: u32, protocol: u8) -> Option<u16> {
    match protocol {
        proto::TCP => at::<[u16; 10]>(skb, l4).map(|tcp| tcp[8]),
        proto::UDP => at::<[u16; 4]>(skb, l4).map(|udp| udp[3]),
        _ => None,
    }
}

/// The start of a transport header that errors quote: the sum of its words, and its checksum, or 0 where there is none of
/// words.
#[inline(always)]
pub fn transport<F: Family>(skb: Skb, packet: &Packet) -> Option<(u32, u16)> {
    // No more than it can be, which the verifier has forgotten.
    let l4 = packet.l4 & F::L4_MASK;
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
        Some((sum, if packet.unchecked != 0 { 0 } else { udp[3] }))
    }
}

/// The start of an ICMP message (RFC 792, RFC 4443).
pub struct Icmp {
    /// Type.
    pub kind: u8,
    pub check: u16,
}

/// Reads the ICMP header of a packet; none where it is cut short.
#[inline(always)]
pub fn icmp<F: Family>(skb: Skb, packet: &Packet) -> Option<Icmp> {
    linearize_to(skb, QUOTING_HEADERS);
    let icmp = at::<[u16; 4]>(skb, packet.l4 & F::L4_MASK)?;
    let fits = packet.l3 + packet.ip_len as u32 <= skb.len() && packet.l4 + 8 <= packet.l3 + packet.ip_len as u32;
    fits.then_some(Icmp { kind: icmp[0].to_ne_bytes()[0], check: icmp[1] })
}

/// The headers of the packet that an ICMP error quotes.
pub struct Quoted {
    /// Offset of its IP header.
    pub l3: u32,
    /// Offset of its transport header.
    pub l4: u32,
    /// Of IPv4: its header checksum as loaded.
    pub ip_check: u16,
    /// Its transport checksum as loaded; 0 where there is none, or it is not quoted.
    pub check: u16,
}

/// Reads the ports of a quoted packet whose IP header is at `l3` into [`Packet::quoted`].
#[inline(always)]
fn quoted_ports(skb: Skb, packet: &mut Packet, l3: u32, l4: u32, protocol: u8) -> Option<Quoted> {
    if !has_ports(protocol) {
        return None;
    }
    let end = packet.l3 + packet.ip_len as u32;
    if l4 + 8 > end {
        return None;
    }
    let ports = at::<[u16; 4]>(skb, l4)?;
    let (sport, dport, mut check) = (ports[0], ports[1], if protocol == proto::UDP { ports[3] } else { 0 });
    if protocol == proto::TCP {
        check = match at::<[u16; 10]>(skb, l4) {
            Some(tcp) if l4 + 20 <= end => tcp[8],
            _ => 0,
        };
    }
    packet.quoted.sport = Be16::from_raw(dport);
    packet.quoted.dport = Be16::from_raw(sport);
    Some(Quoted { l3, l4, ip_check: 0, check })
}
