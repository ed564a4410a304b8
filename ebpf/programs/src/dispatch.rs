//! Dispatch `l2`: packets go on as they are to the node of their backend, a neighbour on the segment that they came from.
//! To nodes elsewhere they go inside another packet, or to the backend itself, where the service has it so: see `wrap` and
//! `option`.
//!
//! Two nodes take part. Where the client's packets come in, a backend is chosen as always; its node becomes the frame's
//! destination, one hop is counted, and nothing else changes. That node knows the address too: it chooses among its own
//! backends, translates as for any local one, and answers the client itself. So the client's address arrives, replies
//! save the way back, and each packet costs the first node one lookup more than nothing.
//!
//! The second node tells such frames by their source, the MAC of a peer, or by what they were inside of. It hands nothing
//! on again: should it have no backend any more, it goes on with its own address as source, so that packets never
//! circle. What would come back to the node that it came from is not handed on either.
//!
//! Deliberately absent: reading back what the other node chose. Both keep a client where it is by their own entries.

use aya_ebpf::{bindings::TC_ACT_REDIRECT, helpers::generated as h};
use kinesin_abi::{
    Addr, Backend, BackendId, DropReason, FLOW_REDIRECT, FlowKey, FlowValue, FrontendKind, FrontendValue, NodeTag,
    PEER_ACROSS, PEER_BY_ROUTE, PEER_TAKES_NEW, PeerKey, PeerValue, SetRef, frontend_flags, proto,
};

use crate::{
    family::{Family, V4},
    frame::Frame,
    lookup::{self, Chosen},
    opening,
    option::{self, Carrier},
    packet::{Packet, link},
    skb::{ETHERNET, Skb},
    verdict::Verdict,
    wrap::{self, Wrapper},
};

/// Halvings that find a boundary in any set that fits the slots array.
const HALVINGS: u32 = 22;

/// Whether a new connection's first packet was handed on to us by a peer.
#[inline(always)]
pub fn is_handed_on<F: Family>(skb: Skb, link: u32, packet: &Packet) -> bool {
    if packet.from != 0 {
        return true;
    }
    let Some(peer) = sender(skb, link) else { return false };
    let ours =
        lookup::announced(packet.flow.dst, skb.ifindex()) || lookup::is_own::<F>(&packet.flow.dst, skb.ifindex());
    // A client on the peer itself, or behind it while the address is ours, has sent this to us and to nobody else.
    !(ours || is_of::<F>(peer, &packet.flow.src))
}

/// The NodePort that a packet to a peer's own address was handed on for.
#[inline(always)]
pub fn node_port_of_peer<F: Family>(skb: Skb, link: u32, flow: &FlowKey) -> Option<&'static FrontendValue> {
    if !lookup::is_node_port(flow.dport) || is_to_sender::<F>(skb, link) == 0 {
        return None;
    }
    lookup::node_port::<F>(flow.dport, flow.proto)
}

/// Whether the packet is to the address of the peer that has sent it to us; 1 if so.
#[inline(never)]
fn is_to_sender<F: Family>(skb: Skb, link: u32) -> u32 {
    let Some(packet) = lookup::scratch() else { return 0 };
    if packet.from != 0 {
        let Some(peer) = lookup::peer(&PeerKey::of_addr(&packet.flow.dst)) else { return 0 };
        return (peer.node == packet.from && is_of::<F>(peer, &packet.flow.dst)) as u32;
    }
    let Some(peer) = sender(skb, link) else { return 0 };
    is_of::<F>(peer, &packet.flow.dst) as u32
}

/// What was chosen if it is on this node, else any member that is, each as likely as the others; without one, what was
/// chosen.
#[inline(always)]
pub fn local(set: SetRef, chosen: Chosen) -> Chosen {
    if is_local(&chosen) {
        return chosen;
    }
    let count = locals(set.base, set.count);
    if count == 0 {
        return chosen;
    }
    lookup::member(set, lookup::random_below(count)).filter(is_local).unwrap_or(chosen)
}

/// Hands a new connection on to the backend's node; none where that must not or cannot be.
#[inline(always)]
pub fn begin<F: Wrapper + Carrier>(
    skb: Skb,
    packet: &Packet,
    frontend: &FrontendValue,
    chosen: (BackendId, &Backend),
) -> Result<Option<Verdict>, DropReason> {
    let (id, backend) = chosen;
    let Some(peer) = lookup::peer(&PeerKey::of_node(backend.node())) else { return Ok(None) };
    let near = frontend.flags & frontend_flags::FORWARDING == frontend_flags::FORWARDING_L2;
    if peer.flags & PEER_TAKES_NEW == 0 || near && peer.flags & PEER_BY_ROUTE != 0 {
        return Ok(None);
    }
    // Peers know only a node's primary addresses.
    let node_port = frontend.flags & frontend_flags::KIND == FrontendKind::NodePort as u32;
    if node_port && !lookup::is_own::<F>(&packet.flow.dst, skb.ifindex()) {
        return Ok(None);
    }
    if peer.flags & PEER_BY_ROUTE != 0 && frontend.flags & frontend_flags::FORWARDING == frontend_flags::FORWARDING_OPT
    {
        if !option::has_room::<F>(packet) {
            return Ok(None);
        }
        opening::hand_on(&packet.flow, backend, id, FLOW_REDIRECT)?;
        return Ok(Some(option::to_backend(backend.addr, backend.port)));
    }
    let verdict = go::<F>(skb, peer)?;
    if verdict.is_some() {
        opening::hand_on(&packet.flow, backend, id, 0)?;
    }
    Ok(verdict)
}

/// Hands a packet of a known connection on, or an ICMP error about one; none where its node is gone, or sent it itself.
#[inline(always)]
pub fn follow<F: Wrapper>(skb: Skb, flow: &FlowValue, protocol: u8) -> Result<Option<Verdict>, DropReason> {
    let Some(node) = node_of::<F>(flow, protocol) else { return Ok(None) };
    let Some(peer) = lookup::peer(&PeerKey::of_node(node)) else { return Ok(None) };
    go::<F>(skb, peer)
}

/// The node that has the connection. TCP remembers it, so that nothing that happens to the backends tears it; the entry of
/// other protocols has its place among the members there.
#[inline(always)]
pub fn node_of<F: Family>(flow: &FlowValue, protocol: u8) -> Option<NodeTag> {
    if protocol == proto::TCP {
        return Some(flow.slot);
    }
    let backend = lookup::backend(flow.backend)?;
    // Its id may be another one's by now.
    F::same(&backend.addr, &flow.dst).then(|| backend.node())
}

// What sending comes to. Plain numbers, so that all ways out of a function look the same to the verifier.
pub const KEPT: u32 = 0;
pub const SENT: u32 = 1;
pub const OUT_OF_HOPS: u32 = 2;
pub const UNWRITTEN: u32 = 3;
pub const TOO_LONG: u32 = 4;

/// Sends the packet at hand to a peer in the way that leads there.
#[inline(always)]
fn go<F: Wrapper>(skb: Skb, peer: &PeerValue) -> Result<Option<Verdict>, DropReason> {
    let code = if peer.flags & PEER_BY_ROUTE != 0 { wrap::send::<F>(skb, peer) } else { send::<F>(skb, peer) };
    match code {
        KEPT => Ok(None),
        OUT_OF_HOPS => Err(DropReason::TtlExceeded),
        UNWRITTEN => Err(DropReason::WriteError),
        TOO_LONG => Err(DropReason::FragmentationNeeded),
        _ => Ok(Some(Verdict::Sent(TC_ACT_REDIRECT))),
    }
}

/// Sends the packet at hand on to a peer, unless it comes from there, or from another segment.
#[inline(never)]
fn send<F: Family>(skb: Skb, peer: &PeerValue) -> u32 {
    let Some(packet) = lookup::scratch() else { return KEPT };
    let ifindex = skb.ifindex();
    let Some(ethernet) = link::ethernet(skb) else { return KEPT };
    if peer.ifindex != ifindex || same(ethernet.src, peer.mac) {
        return KEPT;
    }
    if packet.ttl <= 1 {
        return OUT_OF_HOPS;
    }
    // It was for us, so what it was sent to is our own.
    let macs = [peer.mac, ethernet.dst];
    if F::hop(skb, packet).is_err() || skb.store(0, &macs).is_err() {
        return UNWRITTEN;
    }
    if peer.flags & PEER_ACROSS != 0 {
        // SAFETY: as below.
        unsafe { h::bpf_redirect_peer(ifindex, 0) };
        return SENT;
    }
    skb.mark_translated();
    // SAFETY: no pointers. Without flags it always is a redirect.
    unsafe { h::bpf_redirect(ifindex, 0) };
    SENT
}

/// The peer that has sent this frame.
#[inline(always)]
fn sender(skb: Skb, l2: u32) -> Option<&'static PeerValue> {
    if l2 != ETHERNET {
        return None;
    }
    let ethernet = link::ethernet(skb)?;
    lookup::peer(&PeerKey::of_mac_words(ethernet.src))
}

#[inline(always)]
pub fn same(a: [u16; 3], b: [u16; 3]) -> bool {
    (a[0] ^ b[0]) | (a[1] ^ b[1]) | (a[2] ^ b[2]) == 0
}

/// Whether the address is the peer's primary one on the segment.
#[inline(always)]
fn is_of<F: Family>(peer: &PeerValue, addr: &Addr) -> bool {
    if F::AF == V4::AF { peer.ipv4 == addr.v4_raw() } else { F::same(&peer.ipv6, addr) }
}

#[inline(always)]
fn is_local(chosen: &Chosen) -> bool {
    chosen.backend.is_local()
}

/// How many members of a set are on this node: those come first.
///
/// Its bounds are in memory that the verifier does not look into: older ones would follow every outcome of each halving, a
/// million instructions on Linux 6.1.
#[inline(never)]
fn locals(base: u32, count: u32) -> u32 {
    let Some(packet) = lookup::scratch() else { return 0 };
    let (low, high) = (&raw mut packet.bounds[0], &raw mut packet.bounds[1]);
    // SAFETY: both point into this CPU's packet; volatile, so that no register holds what they are.
    unsafe {
        low.write_volatile(0);
        high.write_volatile(count);
        for _ in 0..HALVINGS {
            let (from, to) = (low.read_volatile(), high.read_volatile());
            if from >= to {
                break;
            }
            let middle = from + (to - from) / 2;
            match lookup::member(SetRef { base, count }, middle) {
                Some(chosen) if is_local(&chosen) => low.write_volatile(middle + 1),
                _ => high.write_volatile(middle),
            }
        }
        low.read_volatile()
    }
}
