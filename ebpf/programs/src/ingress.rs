//! The two sentences of the tc hooks.

use kinesin_abi::{
    AffinityKey, BackendId, Direction, DropReason, FLOW_DIRECT, FLOW_HANDED_ON, FLOW_REDIRECT, FLOW_REPLY, FlowValue,
    FrontendValue, SLOT_EMPTY, frontend_flags,
};

use crate::{
    affinity, arp, deliver, dispatch,
    family::{Family, V4, V6},
    flows, fragments, icmp, lookup, ndp,
    opening::{self, Opening},
    option::{self, Carrier},
    packet::{Packet, TCP_SYN, Unparsed},
    reject::{self, Reporter},
    rewrite::{self, Tuple},
    route::{self, Route},
    skb::{ETHERNET, Skb, TO_ANOTHER_HOST, TO_GROUP, TO_US},
    verdict::{self, Verdict},
    wrap::{self, Wrapper},
};

const ETH_ARP: u16 = 0x0806u16.to_be();

/// A packet from a device into the node, but for IPv6. `link` is the length of the link-layer header.
#[inline(always)]
pub fn from_netdev(skb: Skb, link: u32) -> Result<Verdict, DropReason> {
    if skb.packet_type() == TO_ANOTHER_HOST || skb.belongs_to_vlan() {
        return Ok(Verdict::PASS);
    }
    match skb.protocol() {
        V4::ETHERTYPE if skb.packet_type() == TO_US => serve::<V4>(skb, link),
        ETH_ARP if link == ETHERNET => arp::respond(skb),
        _ => Ok(Verdict::PASS),
    }
}

/// An IPv6 packet from a device into the node.
#[inline(always)]
pub fn from_netdev6(skb: Skb, link: u32) -> Result<Verdict, DropReason> {
    if skb.protocol() != V6::ETHERTYPE || skb.packet_type() == TO_ANOTHER_HOST || skb.belongs_to_vlan() {
        return Ok(Verdict::PASS);
    }
    // Solicitations come to a group, or to the address itself from those who check that it is still here.
    if link == ETHERNET
        && (skb.packet_type() == TO_GROUP || skb.packet_type() == TO_US)
        && let Some(verdict) = ndp::respond(skb)
    {
        return Ok(verdict);
    }
    if skb.packet_type() == TO_US { serve::<V6>(skb, link) } else { Ok(Verdict::PASS) }
}

/// A packet for this node's MAC.
#[inline(always)]
fn serve<F: Reporter + Wrapper + Carrier>(skb: Skb, link: u32) -> Result<Verdict, DropReason> {
    let Some(packet) = lookup::scratch() else { return Ok(Verdict::PASS) };
    packet.from = 0;
    wrap::open::<F>(skb, link);
    let parsed = parse::<F>(skb, link, packet);
    // Looked up again, so that the compiler cannot carry over what it knows about the values just written.
    let Some(packet) = lookup::scratch() else { return Ok(Verdict::PASS) };
    let packet = &*packet;
    if let Err(unparsed) = parsed {
        if unparsed == Unparsed::Icmp {
            return icmp::from_netdev::<F>(skb, link);
        }
        if unparsed == Unparsed::Foreign || !lookup::claimed(packet.flow.dst) {
            return no_service(packet);
        }
        return Err(match unparsed {
            Unparsed::UnknownL4 => DropReason::UnknownL4,
            Unparsed::Fragment if fragments::enabled::<F>() => DropReason::FragmentNotFound,
            Unparsed::Fragment => DropReason::Fragment,
            Unparsed::Extension if F::AF == V6::AF => DropReason::Extension,
            _ => DropReason::InvalidPacket,
        });
    }
    // Done here, where there is stack left for it, and once, because the verifier follows it from wherever it is called.
    let mut code = apart::<F>(skb, link);
    if code == option::TO_BACKEND {
        code = option::send::<F>(skb);
    } else if code == option::LEARN {
        code = option::learn::<F>(skb);
    }
    if code >= REPORT {
        code = reject::report::<F>(skb, link, (code - REPORT) as u32);
    }
    Ok(Verdict::Answered(deliver::finish::<F>(skb, link, code)))
}

/// No codes of a hook: its sender is owed a report about the drop reason that is added.
pub const REPORT: i32 = 0x1000;

/// What is for no service goes on as it came, but not out of what it came in.
#[inline(always)]
fn no_service(packet: &Packet) -> Result<Verdict, DropReason> {
    if packet.from == 0 { Ok(Verdict::PASS) } else { Err(DropReason::Encapsulated) }
}

/// [`code_of`] with a stack of its own: with that of ICMP there is no room for long addresses.
#[inline(never)]
fn apart<F: Wrapper + Carrier>(skb: Skb, link: u32) -> i32 {
    let Some(packet) = lookup::scratch() else { return verdict::finish(skb, Direction::Ingress, Ok(Verdict::PASS)) };
    code_of::<F>(skb, link, packet)
}

/// What [`translate`] makes of a packet.
#[inline(always)]
fn code_of<F: Wrapper + Carrier>(skb: Skb, link: u32, packet: &Packet) -> i32 {
    match translate::<F>(skb, link, packet) {
        Err(reason @ (DropReason::FragmentationNeeded | DropReason::TtlExceeded)) => REPORT + reason as i32,
        Ok(Verdict::Refused(reason)) => REPORT + reason as i32,
        verdict => verdict::finish(skb, Direction::Ingress, verdict),
    }
}

/// A packet with ports.
#[inline(always)]
fn translate<F: Wrapper + Carrier>(skb: Skb, link: u32, packet: &Packet) -> Result<Verdict, DropReason> {
    if let Some(flow) = flows::find(packet) {
        if flow.flags & (FLOW_DIRECT | FLOW_REPLY) == FLOW_DIRECT {
            flows::track(packet, flow);
            return if option::take_off::<F>(skb) == 0 { Ok(Verdict::TRANSLATED) } else { Err(DropReason::WriteError) };
        }
        // What goes to the backend itself need not say for which service any more.
        let to_backend = flow.flags & FLOW_REDIRECT != 0 && !option::is_due(packet);
        if flow.flags & FLOW_HANDED_ON == 0 || to_backend {
            return follow::<F>(skb, packet, flow);
        }
        // Without Ethernet there are no neighbours to hand it to, and what came wrapped is for this node: it begins anew,
        // as when its node is gone.
        if link == ETHERNET
            && packet.from == 0
            && let Some(verdict) = go_on::<F>(skb, packet, flow)?
        {
            return Ok(verdict);
        }
    }
    let mut frontend = lookup::frontend(&packet.flow)?;
    if (link == ETHERNET || packet.from != 0) && frontend.is_none() {
        frontend = dispatch::node_port_of_peer::<F>(skb, link, &packet.flow);
    }
    match frontend {
        Some(frontend) => begin::<F>(skb, link, packet, frontend),
        None if F::may_have(packet) && packet.from == 0 => Ok(Verdict::Answered(option::LEARN)),
        None => no_service(packet),
    }
}

/// Reads a packet; the ports of a later fragment come from its first one.
#[inline(always)]
fn parse<F: Family>(skb: Skb, link: u32, packet: &mut Packet) -> Result<(), Unparsed> {
    match F::parse(skb, link, packet) {
        Err(Unparsed::Fragment) if fragments::follow::<F>(packet) != 0 => Ok(()),
        parsed => parsed,
    }
}

/// A packet of a known connection.
#[inline(always)]
fn follow<F: Family>(skb: Skb, packet: &Packet, flow: &mut FlowValue) -> Result<Verdict, DropReason> {
    if packet.fragmented != 0 && fragments::lead::<F>(packet) == 0 {
        return Err(DropReason::Fragment);
    }
    let redirect = flow.flags & FLOW_REDIRECT != 0;
    if !redirect && flow.flags & FLOW_REPLY != 0 {
        // A reply of a local backend leaves by egress; whoever claims to be one out here is not.
        return no_service(packet);
    }
    if redirect && packet.ttl <= 1 {
        return Err(DropReason::TtlExceeded);
    }
    let to = Tuple { src: flow.src, dst: flow.dst, sport: flow.sport, dport: flow.dport };
    flows::track(packet, flow);
    if !redirect {
        rewrite::translate::<F>(skb, packet, &to, false)?;
        return Ok(Verdict::TRANSLATED);
    }
    let route = route::find::<F>(skb, to.src, to.dst, packet.flow.proto, packet.wire_len(skb))?;
    rewrite::translate::<F>(skb, packet, &to, true)?;
    Ok(Verdict::Sent(route::send::<F>(skb, &route)))
}

/// A packet of a connection that another node has; none where that node is gone.
#[inline(always)]
fn go_on<F: Wrapper>(skb: Skb, packet: &Packet, flow: &mut FlowValue) -> Result<Option<Verdict>, DropReason> {
    if packet.fragmented != 0 && fragments::lead::<F>(packet) == 0 {
        return Err(DropReason::Fragment);
    }
    flows::track(packet, flow);
    if flow.flags & FLOW_REDIRECT != 0 {
        return Ok(Some(option::to_backend(flow.dst, flow.dport)));
    }
    dispatch::follow::<F>(skb, flow, packet.flow.proto)
}

/// The first packet of a connection to one of our frontends.
#[inline(always)]
fn begin<F: Wrapper + Carrier>(
    skb: Skb,
    link: u32,
    packet: &Packet,
    frontend: &FrontendValue,
) -> Result<Verdict, DropReason> {
    if frontend.flags & frontend_flags::WILDCARD != 0 {
        return Err(DropReason::NoBackend);
    }
    if frontend.flags & frontend_flags::ROUTABLE == 0 {
        return Err(DropReason::IsClusterIp);
    }
    if frontend.flags & frontend_flags::SOURCE_RANGES != 0 && lookup::serves_client(frontend, &packet.flow.src) == 0 {
        return Err(DropReason::SourceRange);
    }
    if packet.fragmented != 0 {
        // The connection of its first one is over.
        if packet.fragmented == fragments::LATER {
            return Err(DropReason::FragmentNotFound);
        }
        if fragments::lead::<F>(packet) == 0 {
            return Err(DropReason::Fragment);
        }
    }
    if frontend.external.count == 0 {
        return Ok(Verdict::Refused(DropReason::NoBackend));
    }
    let id = choose::<F>(skb, link, frontend);
    let backend = lookup::backend(id).ok_or(DropReason::NoBackend)?;
    let redirect = !backend.is_local();
    if redirect
        && link == ETHERNET
        && packet.handed_on == 0
        && frontend.flags & frontend_flags::FORWARDING != frontend_flags::FORWARDING_SNAT
        && let Some(verdict) = dispatch::begin::<F>(skb, packet, frontend, (id, backend))?
    {
        return Ok(verdict);
    }
    let mut source = packet.flow.src;
    let mut route = Route::NONE;
    if redirect {
        if packet.ttl <= 1 {
            return Err(DropReason::TtlExceeded);
        }
        route = route::find::<F>(skb, packet.flow.src, backend.addr, packet.flow.proto, packet.wire_len(skb))?;
        source = lookup::source_address::<F>(route.ifindex, skb.ifindex()).ok_or(DropReason::NoNatMapping)?;
    }
    let sport = opening::open::<F>(skb, &Opening { packet, backend, id, source, redirect })?;
    let to = Tuple { src: source, dst: backend.addr, sport, dport: backend.port };
    rewrite::translate::<F>(skb, packet, &to, redirect)?;
    if redirect { Ok(Verdict::Sent(route::send::<F>(skb, &route))) } else { Ok(Verdict::TRANSLATED) }
}

/// The backend that the client is bound to, else any; of what a peer has handed on, one of this node if there is one.
///
/// A function of its own with a plain number, so that the verifier checks what follows once, however it came about.
#[inline(never)]
fn choose<F: Family>(skb: Skb, link: u32, frontend: &FrontendValue) -> BackendId {
    let Some(packet) = lookup::scratch() else { return SLOT_EMPTY };
    let handed_on = dispatch::is_handed_on::<F>(skb, link, packet);
    packet.handed_on = handed_on as u8;
    let client = AffinityKey { client: packet.flow.src, service: frontend.service, flags: 0 };
    let binds = frontend.flags & frontend_flags::AFFINITY != 0;
    if binds
        && let Some((id, backend)) = affinity::recall(frontend, frontend.external, &client)
        && (!handed_on || backend.is_local())
    {
        return id;
    }
    let Some(mut chosen) = lookup::select(frontend, &packet.flow) else { return SLOT_EMPTY };
    if handed_on {
        chosen = dispatch::local(frontend.external, chosen);
    }
    if binds {
        affinity::remember(&client, &chosen);
    }
    chosen.id
}

/// A packet from the node out of a device: only replies of local backends are ours.
#[inline(always)]
pub fn to_netdev<F: Family>(skb: Skb, link: u32) -> Result<Verdict, DropReason> {
    if skb.protocol() != F::ETHERTYPE || skb.take_translated() {
        return Ok(Verdict::PASS);
    }
    let Some(packet) = lookup::scratch() else { return Ok(Verdict::PASS) };
    match parse::<F>(skb, link, packet) {
        Ok(()) => {}
        Err(Unparsed::Icmp) => return icmp::to_netdev::<F>(skb),
        Err(_) => return Ok(Verdict::PASS),
    }
    let Some(flow) = flows::find(packet) else {
        if packet.tcp & TCP_SYN != 0 {
            flows::give_way(&packet.flow);
        }
        return Ok(Verdict::PASS);
    };
    if flow.flags & (FLOW_REPLY | FLOW_REDIRECT) != FLOW_REPLY {
        return Ok(Verdict::PASS);
    }
    let to = Tuple { src: flow.src, dst: flow.dst, sport: flow.sport, dport: flow.dport };
    flows::track(packet, flow);
    if packet.fragmented != 0 && fragments::lead::<F>(packet) == 0 {
        return Err(DropReason::Fragment);
    }
    rewrite::translate::<F>(skb, packet, &to, false)?;
    Ok(Verdict::TRANSLATED)
}
