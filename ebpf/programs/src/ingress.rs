//! The two sentences of the tc hooks.

use kinesin_abi::{
    AffinityKey, BACKEND_LOCAL, Backend, BackendId, DropReason, FLOW_REDIRECT, FLOW_REPLY, FlowValue, FrontendValue,
    frontend_flags,
};

use crate::{
    affinity, arp,
    flows::{self, Opening},
    icmp, lookup,
    packet::{self, Packet, Unparsed},
    reject,
    rewrite::{self, Tuple},
    route::{self, Route},
    skb::{ETHERNET, Skb, TO_ANOTHER_HOST, TO_US},
    verdict::Verdict,
};

const ETH_ARP: u16 = 0x0806u16.to_be();
const ETH_IPV4: u16 = 0x0800u16.to_be();

/// A packet from a device into the node. `link` is the length of the link-layer header.
#[inline(always)]
pub fn from_netdev(skb: Skb, link: u32) -> Result<Verdict, DropReason> {
    if skb.packet_type() == TO_ANOTHER_HOST || skb.belongs_to_vlan() {
        return Ok(Verdict::Pass);
    }
    match skb.protocol() {
        ETH_IPV4 if skb.packet_type() == TO_US => match ipv4(skb, link) {
            // Here alone, because the verifier follows it from wherever it is called.
            Err(reason @ (DropReason::FragmentationNeeded | DropReason::TtlExceeded)) => {
                Ok(Verdict::Answered(reject::report(skb, link, reason as u32)))
            }
            Ok(Verdict::Refused) => Ok(Verdict::Answered(reject::report(skb, link, DropReason::NoBackend as u32))),
            verdict => verdict,
        },
        ETH_ARP if link == ETHERNET => arp::respond(skb),
        _ => Ok(Verdict::Pass),
    }
}

#[inline(always)]
fn ipv4(skb: Skb, link: u32) -> Result<Verdict, DropReason> {
    let Some(packet) = lookup::scratch() else { return Ok(Verdict::Pass) };
    let parsed = packet::ipv4(skb, link, packet);
    // Looked up again, so that the compiler cannot carry over what it knows about the values just written.
    let Some(packet) = lookup::scratch() else { return Ok(Verdict::Pass) };
    let packet = &*packet;
    if let Err(unparsed) = parsed {
        if unparsed == Unparsed::Icmp {
            return icmp::from_netdev(skb, link);
        }
        if unparsed == Unparsed::Foreign || !lookup::claimed(packet.flow.dst) {
            return Ok(Verdict::Pass);
        }
        return Err(match unparsed {
            Unparsed::UnknownL4 => DropReason::UnknownL4,
            Unparsed::Fragment => DropReason::Fragment,
            _ => DropReason::InvalidPacket,
        });
    }
    if let Some(flow) = flows::find(packet) {
        return follow(skb, packet, flow);
    }
    match lookup::frontend(&packet.flow)? {
        Some(frontend) => begin(skb, packet, frontend),
        None => Ok(Verdict::Pass),
    }
}

/// A packet of a known connection.
#[inline(always)]
fn follow(skb: Skb, packet: &Packet, flow: &mut FlowValue) -> Result<Verdict, DropReason> {
    if packet.fragmented != 0 {
        return Err(DropReason::Fragment);
    }
    let redirect = flow.flags & FLOW_REDIRECT != 0;
    if !redirect && flow.flags & FLOW_REPLY != 0 {
        // A reply of a local backend leaves by egress; whoever claims to be one out here is not.
        return Ok(Verdict::Pass);
    }
    if redirect && packet.ttl <= 1 {
        return Err(DropReason::TtlExceeded);
    }
    let to = Tuple { src: flow.src, dst: flow.dst, sport: flow.sport, dport: flow.dport };
    flows::track(packet, flow);
    if !redirect {
        rewrite::translate(skb, packet, &to, false)?;
        return Ok(Verdict::Translated);
    }
    let route = route::find(skb, to.src, to.dst, packet.flow.proto, packet.wire_len(skb))?;
    rewrite::translate(skb, packet, &to, true)?;
    Ok(Verdict::Sent(route::send(skb, &route)))
}

/// The first packet of a connection to one of our frontends.
#[inline(always)]
fn begin(skb: Skb, packet: &Packet, frontend: &FrontendValue) -> Result<Verdict, DropReason> {
    if frontend.flags & frontend_flags::WILDCARD != 0 {
        return Err(DropReason::NoBackend);
    }
    if frontend.flags & frontend_flags::ROUTABLE == 0 {
        return Err(DropReason::IsClusterIp);
    }
    if frontend.flags & frontend_flags::SOURCE_RANGES != 0 && !lookup::serves_client(frontend, packet.flow.src) {
        return Err(DropReason::SourceRange);
    }
    if packet.fragmented != 0 {
        return Err(DropReason::Fragment);
    }
    if frontend.external.count == 0 {
        return Ok(Verdict::Refused);
    }
    let (id, backend) = choose(frontend, packet).ok_or(DropReason::NoBackend)?;
    let redirect = backend.flags & BACKEND_LOCAL == 0;
    let mut source = packet.flow.src;
    let mut route = Route::NONE;
    if redirect {
        if packet.ttl <= 1 {
            return Err(DropReason::TtlExceeded);
        }
        route = route::find(skb, packet.flow.src, backend.addr, packet.flow.proto, packet.wire_len(skb))?;
        source = lookup::source_address(route.ifindex, skb.ifindex()).ok_or(DropReason::NoNatMapping)?;
    }
    let sport = flows::open(&Opening { packet, backend, id, source, redirect })?;
    let to = Tuple { src: source, dst: backend.addr, sport, dport: backend.port };
    rewrite::translate(skb, packet, &to, redirect)?;
    if redirect { Ok(Verdict::Sent(route::send(skb, &route))) } else { Ok(Verdict::Translated) }
}

/// The backend that the client is bound to, else any.
#[inline(always)]
fn choose(frontend: &FrontendValue, packet: &Packet) -> Option<(BackendId, &'static Backend)> {
    if frontend.flags & frontend_flags::AFFINITY == 0 {
        return lookup::select(frontend, &packet.flow).map(|chosen| (chosen.id, chosen.backend));
    }
    let client = AffinityKey { client: packet.flow.src, service: frontend.service, flags: 0 };
    if let Some(bound) = affinity::recall(frontend, frontend.external, &client) {
        return Some(bound);
    }
    let chosen = lookup::select(frontend, &packet.flow)?;
    affinity::remember(&client, &chosen);
    Some((chosen.id, chosen.backend))
}

/// A packet from the node out of a device: only replies of local backends are ours.
#[inline(always)]
pub fn to_netdev(skb: Skb, link: u32) -> Result<Verdict, DropReason> {
    if skb.take_translated() || skb.protocol() != ETH_IPV4 {
        return Ok(Verdict::Pass);
    }
    let Some(packet) = lookup::scratch() else { return Ok(Verdict::Pass) };
    match packet::ipv4(skb, link, packet) {
        Ok(()) => {}
        Err(Unparsed::Icmp) => return icmp::to_netdev(skb),
        Err(_) => return Ok(Verdict::Pass),
    }
    let Some(flow) = flows::find(packet) else { return Ok(Verdict::Pass) };
    if flow.flags & (FLOW_REPLY | FLOW_REDIRECT) != FLOW_REPLY {
        return Ok(Verdict::Pass);
    }
    let to = Tuple { src: flow.src, dst: flow.dst, sport: flow.sport, dport: flow.dport };
    flows::track(packet, flow);
    if packet.fragmented != 0 {
        return Err(DropReason::Fragment);
    }
    rewrite::translate(skb, packet, &to, false)?;
    Ok(Verdict::Translated)
}
