//! ICMP errors that this node reports (RFC 792, RFC 4443), each instead of silence about a packet that is dropped and counted:
//! - Port unreachable (RFC 1122 section 3.2.2.1): a service without backends refuses at once.
//! - Fragmentation needed (RFC 1191 section 4), packet too big (RFC 4443 section 3.2): what may not be fragmented is too long for the way to its backend or
//!   client, whose MTU the sender learns.
//! - Time exceeded (RFC 1812 section 5.3.1): this node is a hop, so it shows in a trace of the route.
//!
//! They come from the address that the packet was for, which is the one that its sender knows: the service's, or this
//! node's where it is a backend's client. There is none about packets from nobody in particular (RFC 1122 section
//! 3.2.2), and as the kernel's limit does not see them they have one of their own (see `lookup::may_complain`). What is
//! for MAC broadcast or ICMP does not get here; later fragments are told nothing.
//!
//! A refusal quotes the whole packet where it fits, an error about long packets only its headers: at least the 8 bytes of
//! RFC 792, and the checksum of TCP, which the kernel wants to keep. The checksum of what is quoted may still be left to
//! offload, and then nobody here knows its bytes. But whoever fills it in makes the sum of the segment the complement of
//! its pseudo header's sum, so the sum is known without reading: of a whole packet always, of headers where the field
//! holds just the pseudo header's sum. (One finished checksum in 65,536 looks like that; its error is then lost.)
//!
//! IPv6 wants as much quoted as its minimum MTU takes (RFC 4443 section 2.4 (c)); where the whole does not fit, the headers
//! must do here too, because nobody could sum up the rest.

use aya_ebpf::bindings::TC_ACT_SHOT;
use kinesin_abi::{Direction, DropReason, SETTING_REJECT_NO_BACKEND, proto};

use crate::{
    family::{Family, V4, V6},
    fragments::LATER,
    frame::Frame,
    lookup,
    packet::{self, Packet, ipv6, link},
    rewrite::{add, fold},
    route,
    skb::{ETHERNET, Skb},
};

/// What is reported.
#[derive(Clone, Copy)]
pub enum Error {
    /// Nobody listens there.
    PortUnreachable,
    /// Longer than this MTU; 0 where it is not known.
    TooBig(u16),
    TimeExceeded,
}

/// Writing errors, which differs most between the families.
pub trait Reporter: Family {
    /// Bytes of its IP and ICMP headers.
    const HEADERS: u16;
    /// Longest packet that is quoted whole.
    const LONGEST: u16;
    /// The sum of the quoted IP headers.
    fn quoted_header(skb: Skb) -> Option<u32>;
    /// Writes the headers before `quoted` bytes whose sum is `payload`.
    fn write(skb: Skb, packet: &Packet, error: Error, quoted: u16, payload: u32) -> Result<(), DropReason>;
}

/// Counts a packet that is dropped, and tells its sender why, if somebody may be told; returns the code for the hook.
#[inline(never)]
pub fn report<R: Reporter>(skb: Skb, link: u32, reason: u32) -> i32 {
    lookup::count(reason as u8, Direction::Ingress, skb.len());
    answer::<R>(skb, link, reason).unwrap_or(TC_ACT_SHOT)
}

#[inline(always)]
fn answer<R: Reporter>(skb: Skb, header: u32, reason: u32) -> Result<i32, DropReason> {
    let Some(headers) = R::quoted_header(skb) else { return Ok(TC_ACT_SHOT) };
    let Some(packet) = lookup::scratch() else { return Ok(TC_ACT_SHOT) };
    let packet = &*packet;
    let mut error = Error::TimeExceeded;
    if reason == DropReason::FragmentationNeeded as u32 {
        if packet.whole == 0 {
            return Ok(TC_ACT_SHOT);
        }
        error = Error::TooBig(packet.mtu);
    } else if reason == DropReason::NoBackend as u32 {
        if lookup::settings().is_none_or(|settings| settings.flags & SETTING_REJECT_NO_BACKEND == 0) {
            return Ok(TC_ACT_SHOT);
        }
        error = Error::PortUnreachable;
    }
    if packet.fragmented == LATER || !R::is_unicast(&packet.flow.src) || !lookup::may_complain() {
        return Ok(TC_ACT_SHOT);
    }
    let pseudo = pseudo_header::<R>(packet);
    let mut quoted = packet.ip_len;
    let mut payload = !pseudo;
    // Of a fragment the checksum does not cover what is here.
    let complete = packet.fragmented == 0;
    let whole =
        matches!(error, Error::PortUnreachable) && packet.unchecked == 0 && complete && packet.ip_len <= R::LONGEST;
    if !whole {
        let Some((sum, check)) = packet::transport::<R>(skb, packet) else { return Ok(TC_ACT_SHOT) };
        if check != fold(pseudo) || !complete {
            payload = sum;
        }
        quoted = (packet.l4 - packet.l3) as u16 + if packet.flow.proto == proto::TCP { 20 } else { 8 };
        skb.resize(packet.l3 + quoted as u32)?;
    }
    let addresses = if header == ETHERNET {
        let Some(ethernet) = link::ethernet(skb) else { return Ok(TC_ACT_SHOT) };
        [ethernet.src, ethernet.dst]
    } else {
        [[0; 3]; 2]
    };
    skb.insert_after_link_header(R::HEADERS as i32)?;
    R::write(skb, packet, error, quoted, add(headers, payload))?;
    if header == ETHERNET {
        skb.store(0, &addresses)?;
    }
    Ok(route::back(skb))
}

/// The sum over the pseudo header (RFC 793 section 3.1, RFC 8200 section 8.1).
#[inline(always)]
fn pseudo_header<F: Family>(packet: &Packet) -> u32 {
    let len = packet.ip_len - (packet.l4 - packet.l3) as u16;
    let rest = (packet.flow.proto as u16).to_be() as u32 + len.to_be() as u32;
    add(rest, F::sum(&packet.flow.src, &packet.flow.dst))
}

const DONT_FRAGMENT: u16 = 0x4000u16.to_be();
const VERSION_IHL_TOS: u16 = 0x4500u16.to_be();
const TTL_ICMP: u16 = 0x4001u16.to_be();

/// An IPv4 header without options and an ICMP header.
#[repr(C)]
struct Headers4 {
    version_ihl_tos: u16,
    len: u16,
    id: u16,
    fragment: u16,
    ttl_proto: u16,
    check: u16,
    src: u32,
    dst: u32,
    icmp: u16,
    icmp_check: u16,
    unused: u16,
    mtu: u16,
}

impl Reporter for V4 {
    const HEADERS: u16 = 28;
    /// With the new headers this fits an Ethernet MTU.
    const LONGEST: u16 = 1472;

    /// Zero, by its own checksum.
    #[inline(always)]
    fn quoted_header(_skb: Skb) -> Option<u32> {
        Some(0)
    }

    #[inline(always)]
    fn write(skb: Skb, packet: &Packet, error: Error, quoted: u16, payload: u32) -> Result<(), DropReason> {
        let (icmp, mtu) = match error {
            Error::PortUnreachable => (0x0303u16, 0),
            Error::TooBig(mtu) => (0x0304, mtu),
            Error::TimeExceeded => (0x0b00, 0),
        };
        let (client, vip) = (packet.flow.src.v4_raw(), packet.flow.dst.v4_raw());
        let len = (quoted + Self::HEADERS).to_be();
        let mut sum = add(VERSION_IHL_TOS as u32 + len as u32, DONT_FRAGMENT as u32 + TTL_ICMP as u32);
        sum = add(sum, add(vip, client));
        let (icmp, mtu) = (icmp.to_be(), mtu.to_be());
        let icmp_sum = add(icmp as u32 + mtu as u32, payload);
        let headers = Headers4 {
            version_ihl_tos: VERSION_IHL_TOS,
            len,
            id: 0,
            fragment: DONT_FRAGMENT,
            ttl_proto: TTL_ICMP,
            check: !fold(sum),
            src: vip,
            dst: client,
            icmp,
            icmp_check: !fold(icmp_sum),
            unused: 0,
            mtu,
        };
        skb.store(packet.l3, &headers)
    }
}

const NEXT_HOPS: u16 = u16::from_ne_bytes([proto::ICMPV6, 64]);
/// What every link carries (RFC 8200 section 5).
const MINIMUM_MTU: u16 = 1280;

/// An IPv6 header and an ICMPv6 header.
#[repr(C, packed)]
pub struct Headers6 {
    version_class_label: u32,
    payload: u16,
    next_hops: u16,
    src: kinesin_abi::Addr,
    dst: kinesin_abi::Addr,
    icmp: u16,
    icmp_check: u16,
    unused: u16,
    mtu: u16,
}

impl Reporter for V6 {
    const HEADERS: u16 = 48;
    const LONGEST: u16 = MINIMUM_MTU - Self::HEADERS;

    #[inline(always)]
    fn quoted_header(skb: Skb) -> Option<u32> {
        ipv6::sum_of_headers(skb)
    }

    #[inline(always)]
    fn write(skb: Skb, packet: &Packet, error: Error, quoted: u16, payload: u32) -> Result<(), DropReason> {
        let (icmp, mtu) = match error {
            Error::PortUnreachable => (0x0104u16, 0),
            // Less would be no MTU of IPv6.
            Error::TooBig(mtu) => (0x0200, if mtu < MINIMUM_MTU { MINIMUM_MTU } else { mtu }),
            Error::TimeExceeded => (0x0300, 0),
        };
        let len = (quoted + 8).to_be();
        let (icmp, mtu) = (icmp.to_be(), mtu.to_be());
        let mut sum = add(icmp as u32 + mtu as u32, payload);
        sum = add(sum, len as u32 + (proto::ICMPV6 as u16).to_be() as u32);
        sum = add(sum, Self::sum(&packet.flow.src, &packet.flow.dst));
        // Built where there is room: the stack has none for it.
        let Some(room) = lookup::scratch() else { return Err(DropReason::WriteError) };
        room.answer = Headers6 {
            version_class_label: ipv6::VERSION,
            payload: len,
            next_hops: NEXT_HOPS,
            src: packet.flow.dst,
            dst: packet.flow.src,
            icmp,
            icmp_check: !fold(sum),
            unused: 0,
            mtu,
        };
        skb.store_and_sum(packet.l3, &room.answer)
    }
}
