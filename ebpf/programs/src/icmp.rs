//! ICMP that comes by (RFC 792, RFC 4443): echo requests to our addresses, and errors about translated connections.
//!
//! Verdicts on ingress, in this order:
//! - An error (destination unreachable, packet too big, time exceeded, parameter problem) that quotes a packet of a translated
//!   connection goes to whoever sent that packet, and quotes it as it was sent (RFC 5508 section 4.2), so that path MTU
//!   discovery (RFC 1191, RFC 8201) works through translation. Its TTL counts down where the stack does not see it. The quoted
//!   packet's source must be the error's destination, else anybody could have errors sent to third parties.
//! - An error about a connection that was handed on to another node (see `dispatch`) goes there as it is.
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
    Be16, Direction, DropReason, FLOW_HANDED_ON, FLOW_REDIRECT, FLOW_REPLY, SETTING_ANSWER_PING, frontend_flags, proto,
};

use crate::{
    dispatch,
    family::Family,
    flows,
    frame::Frame,
    lookup,
    packet::{self, Icmp, Packet, link},
    rewrite::{self, add, change, updated},
    route,
    skb::{ETHERNET, Skb},
    verdict::{self, Verdict},
    wrap::Wrapper,
};

/// Offset of the checksum in the ICMP header.
const CHECK: u32 = 2;
const TCP_CHECK: u32 = 16;
const UDP_CHECK: u32 = 6;
/// Of echo replies.
const TTL: u8 = 64;

/// An ICMP packet from a device into the node.
#[inline(always)]
pub fn from_netdev<F: Wrapper>(skb: Skb, link: u32) -> Result<Verdict, DropReason> {
    match ingress::<F>(skb, link) {
        // Done here, where there is stack left for it.
        HAND_ON if link == ETHERNET => hand_on::<F>(skb),
        code => Ok(Verdict::Answered(code)),
    }
}

/// Hands an error on to the node that has the connection.
#[inline(always)]
fn hand_on<F: Wrapper>(skb: Skb) -> Result<Verdict, DropReason> {
    let Some(packet) = lookup::scratch() else { return Ok(Verdict::PASS) };
    let Some(flow) = flows::related(&packet.quoted) else { return Ok(Verdict::PASS) };
    match dispatch::follow::<F>(skb, flow, packet.quoted.proto) {
        // No error about an error (RFC 1122 section 3.2.2).
        Err(reason) => Ok(Verdict::Answered(verdict::finish(skb, Direction::Ingress, Err(reason)))),
        Ok(verdict) => Ok(verdict.unwrap_or(Verdict::PASS)),
    }
}

/// No code of a hook: the error goes to another node.
const HAND_ON: i32 = 100;

/// An ICMP packet from the node out of a device.
#[inline(always)]
pub fn to_netdev<F: Family>(skb: Skb) -> Result<Verdict, DropReason> {
    Ok(Verdict::Answered(egress::<F>(skb)))
}

// Functions of their own, with stacks of their own: a sentence beside that of TCP and UDP, which it must not burden.

#[inline(never)]
fn ingress<F: Family>(skb: Skb, link: u32) -> i32 {
    verdict::finish(skb, Direction::Ingress, incoming::<F>(skb, link))
}

#[inline(never)]
fn egress<F: Family>(skb: Skb) -> i32 {
    verdict::finish(skb, Direction::Egress, outgoing::<F>(skb))
}

#[inline(always)]
fn incoming<F: Family>(skb: Skb, link: u32) -> Result<Verdict, DropReason> {
    let Some(packet) = lookup::scratch() else { return Ok(Verdict::PASS) };
    let packet = &*packet;
    let icmp = packet::icmp::<F>(skb, packet);
    if let Some(icmp) = &icmp
        && let Some(verdict) = related::<F>(skb, packet, icmp, Direction::Ingress)?
    {
        return Ok(verdict);
    }
    let (vip, ifindex) = (packet.flow.dst, skb.ifindex());
    if lookup::is_own::<F>(&vip, ifindex) {
        return Ok(Verdict::PASS);
    }
    if !lookup::announced(vip, ifindex) {
        match lookup::frontend_exact(vip, Be16::new(0), proto::ANY) {
            None => return Ok(Verdict::PASS),
            Some(claim) if claim.flags & frontend_flags::ROUTABLE == 0 => return Err(DropReason::IsClusterIp),
            Some(_) => {}
        }
    }
    if packet.fragmented != 0 {
        return Err(DropReason::Fragment);
    }
    let icmp = icmp.ok_or(DropReason::InvalidPacket)?;
    if F::is_error(icmp.kind) {
        return Err(DropReason::UnknownConnection);
    }
    let answering = lookup::settings().is_some_and(|settings| settings.flags & SETTING_ANSWER_PING != 0);
    if icmp.kind != F::ECHO_REQUEST || !answering {
        return Err(F::UNKNOWN_ICMP);
    }
    if !F::is_unicast(&packet.flow.src) {
        return Err(DropReason::InvalidPacket);
    }
    echo::<F>(skb, packet, &icmp, link)
}

#[inline(always)]
fn outgoing<F: Family>(skb: Skb) -> Result<Verdict, DropReason> {
    let Some(packet) = lookup::scratch() else { return Ok(Verdict::PASS) };
    let packet = &*packet;
    let Some(icmp) = packet::icmp::<F>(skb, packet) else { return Ok(Verdict::PASS) };
    Ok(related::<F>(skb, packet, &icmp, Direction::Egress)?.unwrap_or(Verdict::PASS))
}

/// Turns an echo request into the reply and sends it back. Identifier, sequence and data stay.
#[inline(always)]
fn echo<F: Family>(skb: Skb, packet: &Packet, icmp: &Icmp, header: u32) -> Result<Verdict, DropReason> {
    let addresses = if header == ETHERNET {
        let ethernet = link::ethernet(skb).ok_or(DropReason::InvalidPacket)?;
        [ethernet.src, ethernet.dst]
    } else {
        [[0; 3]; 2]
    };
    F::header(skb, packet, TTL, packet.flow.dst, packet.flow.src)?;
    let word = |kind| u16::from_ne_bytes([kind, 0]) as u32;
    // A code, which should be zero, stays; type and checksum change.
    let check = updated(icmp.check, add(!word(F::ECHO_REQUEST) & 0xffff, word(F::ECHO_REPLY)));
    F::store(skb, packet.l4, &F::ECHO_REPLY)?;
    F::store(skb, packet.l4 + CHECK, &check)?;
    if header == ETHERNET {
        skb.store(0, &addresses)?;
    }
    Ok(Verdict::Answered(route::back(skb)))
}

/// Translates an error about a connection of ours; none where it is not.
#[inline(always)]
fn related<F: Family>(
    skb: Skb,
    packet: &Packet,
    icmp: &Icmp,
    direction: Direction,
) -> Result<Option<Verdict>, DropReason> {
    if !F::is_error(icmp.kind) || packet.fragmented != 0 {
        return Ok(None);
    }
    let Some(scratch) = lookup::scratch() else { return Ok(None) };
    let Some(quoted) = F::quoted(skb, scratch) else { return Ok(None) };
    let Some(packet) = lookup::scratch() else { return Ok(None) };
    let packet = &*packet;
    let old = &packet.quoted;
    if !F::same(&old.dst, &packet.flow.dst) {
        return Ok(None);
    }
    // The error travels the way of the packets that answer the one it quotes.
    let Some(flow) = flows::related(old) else { return Ok(None) };
    if flow.flags & (FLOW_HANDED_ON | FLOW_REDIRECT) == FLOW_HANDED_ON {
        return Ok((direction == Direction::Ingress).then_some(Verdict::Answered(HAND_ON)));
    }
    let (redirect, reply) = (flow.flags & FLOW_REDIRECT != 0, flow.flags & FLOW_REPLY != 0);
    let ours = match direction {
        // From outside nobody may speak for what is inside.
        Direction::Ingress => redirect || !reply,
        Direction::Egress => reply && !redirect,
    };
    if !ours {
        return Ok(None);
    }
    let (src, dst, sport, dport) = (flow.src, flow.dst, flow.sport, flow.dport);
    // A backend that sees its client learns from whom the error is.
    let reporter = if reply || redirect && flow.flags & FLOW_HANDED_ON == 0 { src } else { packet.flow.src };
    let mut route = route::Route::NONE;
    let mut ttl = packet.ttl;
    if redirect {
        // No error about an error (RFC 1122 section 3.2.2).
        if ttl <= 1 {
            return Err(DropReason::TtlExceeded);
        }
        ttl -= 1;
        route = route::find::<F>(skb, reporter, dst, F::ICMP, packet.ip_len)?;
    }

    // What it quotes went the other way.
    let addresses = F::difference(&old.dst, &dst, &old.src, &src);
    let (old_ports, new_ports) = (rewrite::ports(old.dport, old.sport), rewrite::ports(dport, sport));
    let mut payload = change(old_ports, new_ports, 0, 0);
    if quoted.check != 0 {
        let mut check = updated(quoted.check, add(addresses, payload));
        // Zero would mean that there is none (RFC 768).
        if check == 0 {
            check = 0xffff;
        }
        payload = add(payload, change(quoted.check as u32, check as u32, 0, 0));
        let at = if old.proto == proto::TCP { TCP_CHECK } else { UDP_CHECK };
        F::store(skb, quoted.l4 + at, &check)?;
    }
    F::store(skb, quoted.l4, &new_ports)?;
    F::requote(skb, &quoted, addresses, dst, src)?;
    let outer = F::header(skb, packet, ttl, reporter, dst)?;
    // A quoted IPv4 header sums to the same as before, thanks to its own checksum.
    if F::ICMP_HAS_PSEUDO_HEADER {
        payload = add(payload, add(addresses, outer));
    }
    F::store(skb, packet.l4 + CHECK, &updated(icmp.check, payload))?;
    Ok(Some(if redirect { Verdict::Sent(route::send::<F>(skb, &route)) } else { Verdict::TRANSLATED }))
}
