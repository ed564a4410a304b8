//! ICMP destination unreachable, port unreachable (RFC 792; RFC 1122 section 3.2.2.1): a service without backends
//! refuses at once instead of letting clients wait.
//!
//! The client's packet becomes the payload, whole. That is on purpose: its checksum may still be left to offload, and
//! then nobody here knows its bytes. But whoever fills it in makes the sum of the segment the complement of its pseudo
//! header's sum, so the ICMP checksum is known without reading the payload.

use kinesin_abi::{DropReason, SETTING_REJECT_NO_BACKEND};

use crate::{
    lookup,
    packet::{self, Packet},
    rewrite::{add, fold},
    route,
    skb::{ETHERNET, Skb},
    verdict::Verdict,
};

/// With the new headers this fits an Ethernet MTU.
const LONGEST: u16 = 1472;
const HEADERS: u16 = 28;
/// Type 3, code 3.
const PORT_UNREACHABLE: u16 = 0x0303u16.to_be();
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
    unused: u32,
}

/// Sends the refusal back, or drops silently where refusing is switched off or not possible.
#[inline(always)]
pub fn port_unreachable(skb: Skb, packet: &Packet, link: u32) -> Result<Verdict, DropReason> {
    if lookup::settings().is_none_or(|settings| settings.flags & SETTING_REJECT_NO_BACKEND == 0) {
        return Ok(Verdict::Dropped);
    }
    if packet.ip_len > LONGEST {
        return Ok(Verdict::Dropped);
    }
    let (client, vip) = (packet.flow.src.v4_raw(), packet.flow.dst.v4_raw());
    // Without a UDP checksum the sum of the segment would have to be read: quote its header only, as RFC 792 asks for.
    let mut quoted = packet.ip_len;
    let mut payload = pseudo_header(packet);
    if packet.unchecked != 0 {
        quoted = (packet.l4 - packet.l3) as u16 + 8;
        let ports = add(packet.flow.sport.raw() as u32, packet.flow.dport.raw() as u32);
        let len = packet.ip_len - (packet.l4 - packet.l3) as u16;
        payload = !add(ports, len.to_be() as u32);
        skb.truncate(packet.l3 + quoted as u32)?;
    }
    let addresses = if link == ETHERNET {
        let Some(ethernet) = packet::ethernet(skb) else { return Ok(Verdict::Dropped) };
        [ethernet.src, ethernet.dst]
    } else {
        [[0; 3]; 2]
    };
    skb.insert_after_link_header(HEADERS as i32)?;

    let len = (quoted + HEADERS).to_be();
    let mut sum = add(VERSION_IHL_TOS as u32 + len as u32, DONT_FRAGMENT as u32 + TTL_ICMP as u32);
    sum = add(sum, add(vip, client));
    // The quoted IP header sums to zero by its own checksum.
    let icmp_sum = add(PORT_UNREACHABLE as u32, !payload);
    let headers = Headers {
        version_ihl_tos: VERSION_IHL_TOS,
        len,
        id: 0,
        fragment: DONT_FRAGMENT,
        ttl_proto: TTL_ICMP,
        check: !fold(sum),
        src: vip,
        dst: client,
        icmp: PORT_UNREACHABLE,
        icmp_check: !fold(icmp_sum),
        unused: 0,
    };
    skb.store(packet.l3, &headers)?;
    if link == ETHERNET {
        skb.store(0, &addresses)?;
    }
    Ok(Verdict::Answered(route::back(skb)))
}

/// The sum over the pseudo header (RFC 793 section 3.1).
#[inline(always)]
fn pseudo_header(packet: &Packet) -> u32 {
    let len = packet.ip_len - (packet.l4 - packet.l3) as u16;
    let rest = (packet.flow.proto as u16).to_be() as u32 + len.to_be() as u32;
    add(rest, add(packet.flow.src.v4_raw(), packet.flow.dst.v4_raw()))
}
