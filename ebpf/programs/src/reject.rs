//! ICMP errors that this node reports (RFC 792), each instead of silence about a packet that is dropped and counted:
//! - Port unreachable (RFC 1122 section 3.2.2.1): a service without backends refuses at once.
//! - Fragmentation needed (RFC 1191 section 4): what may not be fragmented is too long for the way to its backend or
//!   client, whose MTU the sender learns.
//! - Time exceeded (RFC 1812 section 5.3.1): this node is a hop, so it shows in a trace of the route.
//!
//! They come from the address that the packet was for, which is the one that its sender knows: the service's, or this
//! node's where it is a backend's client. There is none about packets from nobody in particular (RFC 1122 section
//! 3.2.2), and as the kernel's limit does not see them they have one of their own (see `lookup::may_complain`). What is
//! for MAC broadcast, ICMP, or a later fragment does not get here.
//!
//! A refusal quotes the whole packet where it fits, an error about long packets only its headers: at least the 8 bytes of
//! RFC 792, and the checksum of TCP, which the kernel wants to keep. The checksum of what is quoted may still be left to
//! offload, and then nobody here knows its bytes. But whoever fills it in makes the sum of the segment the complement of
//! its pseudo header's sum, so the sum is known without reading: of a whole packet always, of headers where the field
//! holds just the pseudo header's sum. (One finished checksum in 65,536 looks like that; its error is then lost.)

use aya_ebpf::bindings::TC_ACT_SHOT;
use kinesin_abi::{Direction, DropReason, SETTING_REJECT_NO_BACKEND, proto};

use crate::{
    lookup,
    packet::{self, Packet},
    rewrite::{add, fold},
    route,
    skb::{ETHERNET, Skb},
};

/// With the new headers this fits an Ethernet MTU.
const LONGEST: u16 = 1472;
const HEADERS: u16 = 28;
/// Type and code.
const PORT_UNREACHABLE: u16 = 0x0303;
const FRAGMENTATION_NEEDED: u16 = 0x0304;
const TIME_EXCEEDED: u16 = 0x0b00;
const DONT_FRAGMENT: u16 = 0x4000u16.to_be();
const VERSION_IHL_TOS: u16 = 0x4500u16.to_be();
const TTL_ICMP: u16 = 0x4001u16.to_be();

/// An IPv4 header without options and an ICMP header, in 16-bit words.
#[repr(C)]
struct Headers {
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

/// Counts a packet that is dropped, and tells its sender why, if somebody may be told; returns the code for the hook.
#[inline(never)]
pub fn report(skb: Skb, link: u32, reason: u32) -> i32 {
    lookup::count(reason as u8, Direction::Ingress, skb.len());
    answer(skb, link, reason).unwrap_or(TC_ACT_SHOT)
}

#[inline(always)]
fn answer(skb: Skb, link: u32, reason: u32) -> Result<i32, DropReason> {
    let Some(packet) = lookup::scratch() else { return Ok(TC_ACT_SHOT) };
    let packet = &*packet;
    let mut mtu = 0;
    let mut icmp = TIME_EXCEEDED;
    if reason == DropReason::FragmentationNeeded as u32 {
        if packet.whole == 0 {
            return Ok(TC_ACT_SHOT);
        }
        (icmp, mtu) = (FRAGMENTATION_NEEDED, packet.mtu);
    } else if reason == DropReason::NoBackend as u32 {
        if lookup::settings().is_none_or(|settings| settings.flags & SETTING_REJECT_NO_BACKEND == 0) {
            return Ok(TC_ACT_SHOT);
        }
        icmp = PORT_UNREACHABLE;
    }
    if !packet.has_unicast_source() || !lookup::may_complain() {
        return Ok(TC_ACT_SHOT);
    }
    let (client, vip) = (packet.flow.src.v4_raw(), packet.flow.dst.v4_raw());
    let pseudo = pseudo_header(packet);
    let mut quoted = packet.ip_len;
    let mut payload = !pseudo;
    let whole = icmp == PORT_UNREACHABLE && packet.unchecked == 0 && packet.ip_len <= LONGEST;
    if !whole {
        let Some((sum, check)) = packet::transport(skb, packet) else { return Ok(TC_ACT_SHOT) };
        if check != fold(pseudo) {
            payload = sum;
        }
        quoted = (packet.l4 - packet.l3) as u16 + if packet.flow.proto == proto::TCP { 20 } else { 8 };
        skb.truncate(packet.l3 + quoted as u32)?;
    }
    let addresses = if link == ETHERNET {
        let Some(ethernet) = packet::ethernet(skb) else { return Ok(TC_ACT_SHOT) };
        [ethernet.src, ethernet.dst]
    } else {
        [[0; 3]; 2]
    };
    skb.insert_after_link_header(HEADERS as i32)?;

    let len = (quoted + HEADERS).to_be();
    let mut sum = add(VERSION_IHL_TOS as u32 + len as u32, DONT_FRAGMENT as u32 + TTL_ICMP as u32);
    sum = add(sum, add(vip, client));
    let (icmp, mtu) = (icmp.to_be(), mtu.to_be());
    // The quoted IP header sums to zero by its own checksum.
    let icmp_sum = add(icmp as u32 + mtu as u32, payload);
    let headers = Headers {
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
    skb.store(packet.l3, &headers)?;
    if link == ETHERNET {
        skb.store(0, &addresses)?;
    }
    Ok(route::back(skb))
}

/// The sum over the pseudo header (RFC 793 section 3.1).
#[inline(always)]
fn pseudo_header(packet: &Packet) -> u32 {
    let len = packet.ip_len - (packet.l4 - packet.l3) as u16;
    let rest = (packet.flow.proto as u16).to_be() as u32 + len.to_be() as u32;
    add(rest, add(packet.flow.src.v4_raw(), packet.flow.dst.v4_raw()))
}
