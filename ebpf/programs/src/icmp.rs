//! ICMP that comes by (RFC 792): echo requests to our addresses, and errors about translated connections.
//!
//! Verdicts on ingress, in this order:
//! - An error (destination unreachable, time exceeded, parameter problem) that quotes a packet of a translated
//!   connection goes to whoever sent that packet, and quotes it as it was sent (RFC 5508 section 4.2), so that path MTU
//!   discovery (RFC 1191) works through translation. Its TTL counts down where the stack does not see it. The quoted
//!   packet's source must be the error's destination, else anybody could have errors sent to third parties.
//! - To the device's own address, or to one that is not ours: left to the stack.
//! - To a ClusterIP: dropped, as [`DropReason::IsClusterIp`].
//! - An echo request to one of our addresses is answered in place (RFC 1122 section 3.2.2.6), while the setting says so
//!   and the request is in one piece and from a unicast address (section 3.2.1.3).
//! - Everything else to our addresses is dropped, so that it does not loop to the gateway.
//!
//! On egress only errors about packets to local backends are translated; they come from the backend or from the stack.
//!
//! The source of an error towards the client becomes the service's address, also where a router on the way reports it:
//! the client knows nothing of what is behind (RFC 5508 section 4.2.2, requirement 5). Towards a backend that sees this
//! node as its client it becomes the node's address; towards a local backend, which sees the client, it stays
//! (section 4.2.1, requirement 4).
//!
//! Deliberately absent: source quench (RFC 6633), redirects, which must not cross a translation, and queries other than
//! echo.

use kinesin_abi::{
    Addr, Be16, Direction, DropReason, FLOW_REDIRECT, FLOW_REPLY, SETTING_ANSWER_PING, frontend_flags, proto,
};

use crate::{
    flows, lookup,
    packet::{self, Icmp, Packet},
    rewrite::{self, change, updated},
    route,
    skb::{ETHERNET, Skb},
    verdict::{self, Verdict},
};

const ECHO_REQUEST: u8 = 8;
const DESTINATION_UNREACHABLE: u8 = 3;
const TIME_EXCEEDED: u8 = 11;
const PARAMETER_PROBLEM: u8 = 12;

/// Offset of the checksum in the ICMP header.
const CHECK: u32 = 2;
/// Offset of the checksum in the IPv4 header; both addresses follow it.
const IP_CHECK: u32 = 10;
const TCP_CHECK: u32 = 16;
const UDP_CHECK: u32 = 6;
/// Of echo replies.
const TTL: u8 = 64;

/// An ICMP packet from a device into the node.
#[inline(always)]
pub fn from_netdev(skb: Skb, link: u32) -> Result<Verdict, DropReason> {
    Ok(Verdict::Answered(ingress(skb, link)))
}

/// An ICMP packet from the node out of a device.
#[inline(always)]
pub fn to_netdev(skb: Skb) -> Result<Verdict, DropReason> {
    Ok(Verdict::Answered(egress(skb)))
}

// Functions of their own, with stacks of their own: a sentence beside that of TCP and UDP, which it must not burden.

#[inline(never)]
fn ingress(skb: Skb, link: u32) -> i32 {
    verdict::finish(skb, Direction::Ingress, incoming(skb, link))
}

#[inline(never)]
fn egress(skb: Skb) -> i32 {
    verdict::finish(skb, Direction::Egress, outgoing(skb))
}

#[inline(always)]
fn incoming(skb: Skb, link: u32) -> Result<Verdict, DropReason> {
    let Some(packet) = lookup::scratch() else { return Ok(Verdict::Pass) };
    let packet = &*packet;
    let icmp = packet::icmp(skb, packet);
    if let Some(icmp) = &icmp
        && let Some(verdict) = related(skb, packet, icmp, Direction::Ingress)?
    {
        return Ok(verdict);
    }
    let (vip, ifindex) = (packet.flow.dst, skb.ifindex());
    if lookup::device(ifindex).is_some_and(|device| device.ipv4 == vip.v4_raw()) {
        return Ok(Verdict::Pass);
    }
    if !lookup::announced(vip, ifindex) {
        match lookup::frontend_exact(vip, Be16::new(0), proto::ANY) {
            None => return Ok(Verdict::Pass),
            Some(claim) if claim.flags & frontend_flags::ROUTABLE == 0 => return Err(DropReason::IsClusterIp),
            Some(_) => {}
        }
    }
    if packet.fragmented != 0 {
        return Err(DropReason::Fragment);
    }
    let icmp = icmp.ok_or(DropReason::InvalidPacket)?;
    if is_error(icmp.kind) {
        return Err(DropReason::UnknownConnection);
    }
    let answering = lookup::settings().is_some_and(|settings| settings.flags & SETTING_ANSWER_PING != 0);
    if icmp.kind != ECHO_REQUEST || !answering {
        return Err(DropReason::UnknownIcmpType);
    }
    if !packet.has_unicast_source() {
        return Err(DropReason::InvalidPacket);
    }
    echo(skb, packet, &icmp, link)
}

#[inline(always)]
fn outgoing(skb: Skb) -> Result<Verdict, DropReason> {
    let Some(packet) = lookup::scratch() else { return Ok(Verdict::Pass) };
    let packet = &*packet;
    let Some(icmp) = packet::icmp(skb, packet) else { return Ok(Verdict::Pass) };
    Ok(related(skb, packet, &icmp, Direction::Egress)?.unwrap_or(Verdict::Pass))
}

/// Turns an echo request into the reply and sends it back. Identifier, sequence and data stay.
#[inline(always)]
fn echo(skb: Skb, packet: &Packet, icmp: &Icmp, link: u32) -> Result<Verdict, DropReason> {
    let addresses = if link == ETHERNET {
        let ethernet = packet::ethernet(skb).ok_or(DropReason::InvalidPacket)?;
        [ethernet.src, ethernet.dst]
    } else {
        [[0; 3]; 2]
    };
    rewrite::header(skb, packet, TTL, packet.flow.dst, packet.flow.src)?;
    let request = u16::from_ne_bytes([ECHO_REQUEST, 0]) as u32;
    // A code, which should be zero, stays; type and checksum change.
    let check = updated(icmp.check, !request & 0xffff);
    skb.store(packet.l4, &0u8)?;
    skb.store(packet.l4 + CHECK, &check)?;
    if link == ETHERNET {
        skb.store(0, &addresses)?;
    }
    Ok(Verdict::Answered(route::back(skb)))
}

#[inline(always)]
fn is_error(kind: u8) -> bool {
    kind == DESTINATION_UNREACHABLE || kind == TIME_EXCEEDED || kind == PARAMETER_PROBLEM
}

/// Translates an error about a connection of ours; none where it is not.
#[inline(always)]
fn related(skb: Skb, packet: &Packet, icmp: &Icmp, direction: Direction) -> Result<Option<Verdict>, DropReason> {
    if !is_error(icmp.kind) || packet.fragmented != 0 {
        return Ok(None);
    }
    let Some(scratch) = lookup::scratch() else { return Ok(None) };
    let Some(quoted) = packet::quoted(skb, scratch) else { return Ok(None) };
    let Some(packet) = lookup::scratch() else { return Ok(None) };
    let packet = &*packet;
    let old = &packet.quoted;
    if old.dst.v4_raw() != packet.flow.dst.v4_raw() {
        return Ok(None);
    }
    // The error travels the way of the packets that answer the one it quotes.
    let Some(flow) = flows::related(old) else { return Ok(None) };
    let (redirect, reply) = (flow.flags & FLOW_REDIRECT != 0, flow.flags & FLOW_REPLY != 0);
    let ours = match direction {
        // From outside nobody may speak for what is inside.
        Direction::Ingress => redirect || !reply,
        Direction::Egress => reply && !redirect,
    };
    if !ours {
        return Ok(None);
    }
    let (src, dst, sport, dport) = (flow.src.v4_raw(), flow.dst.v4_raw(), flow.sport, flow.dport);
    let reporter = Addr::from_v4_raw(if reply || redirect { src } else { packet.flow.src.v4_raw() });
    let receiver = Addr::from_v4_raw(dst);
    let mut route = route::Route::NONE;
    let mut ttl = packet.ttl;
    if redirect {
        // No error about an error (RFC 1122 section 3.2.2).
        if ttl <= 1 {
            return Err(DropReason::TtlExceeded);
        }
        ttl -= 1;
        route = route::find(skb, reporter, receiver, proto::ICMP, packet.ip_len)?;
    }

    // What it quotes went the other way.
    let addresses = change(old.dst.v4_raw(), dst, old.src.v4_raw(), src);
    let (old_ports, new_ports) = (rewrite::ports(old.dport, old.sport), rewrite::ports(dport, sport));
    let mut payload = change(old_ports, new_ports, 0, 0);
    if quoted.check != 0 {
        let mut check = updated(quoted.check, rewrite::add(addresses, payload));
        // Zero would mean that there is none (RFC 768).
        if check == 0 {
            check = 0xffff;
        }
        payload = rewrite::add(payload, change(quoted.check as u32, check as u32, 0, 0));
        let at = if old.proto == proto::TCP { TCP_CHECK } else { UDP_CHECK };
        skb.store(quoted.l4 + at, &check)?;
    }
    skb.store(quoted.l4, &new_ports)?;
    let check = updated(quoted.ip_check, addresses);
    let ([a, b], [c, d]) = halves(dst, src);
    skb.store(quoted.l3 + IP_CHECK, &[check, a, b, c, d])?;
    // The quoted IP header sums to the same as before, thanks to its own checksum.
    skb.store(packet.l4 + CHECK, &updated(icmp.check, payload))?;
    rewrite::header(skb, packet, ttl, reporter, receiver)?;
    Ok(Some(if redirect { Verdict::Sent(route::send(skb, &route)) } else { Verdict::Translated }))
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
