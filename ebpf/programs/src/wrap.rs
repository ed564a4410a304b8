//! Dispatch `ipip`: packets go on to a node across routers as they are, inside an IP packet from this node to that one
//! (RFC 2003, RFC 2473).
//!
//! What is inside is the client's packet, one hop later. The other node takes the outer header off where it comes from a peer
//! and is to the device's own address, and treats what was inside as if a neighbour had handed it on: see `dispatch`.
//! What came wrapped never goes on to a third node, and is dropped where it is for no service of ours: nobody gets
//! anything else into the node by this way.
//!
//! The outer header says `don't fragment`, as nobody could put its fragments together here. So what does not fit is
//! reported to the client if it may not be fragmented, and else goes with this node's address as source. Its traffic
//! class is the inner one without congestion bits, which nobody would bring back (RFC 6040 section 4.1, compatibility
//! mode); its flow label is the inner one.
//!
//! Deliberately absent: IPv4 inside IPv6 and the reverse, a tunnel device, and errors that routers on the way report about
//! the outer packet: they have the MTU of routes to be right.

use kinesin_abi::{Addr, DropReason, PeerKey, PeerValue, proto};

use crate::{
    dispatch::{KEPT, OUT_OF_HOPS, SENT, TOO_LONG, UNWRITTEN},
    family::{Family, V4, V6},
    frame::Frame,
    lookup,
    packet::{self, Packet, ipv4, ipv6},
    rewrite::fold,
    route,
    skb::Skb,
};

/// Of outer headers.
const TTL: u8 = 64;
const DONT_FRAGMENT: u16 = 0x4000u16.to_be();
/// More fragments, or an offset.
const FRAGMENTED: u16 = 0x3fffu16.to_be();
/// The congestion bits of the traffic class.
const CONGESTION: u8 = 3;
const CONGESTION6: u32 = 0x0030_0000u32.to_be();

/// An outer header, of either family.
pub union Outer {
    v4: ipv4::Header,
    v6: ipv6::Header,
}

/// What wrapping is made of, which differs between the families.
pub trait Wrapper: Family {
    /// Length of an outer header.
    const OUTER: u16;
    /// Its protocol number.
    const INSIDE: u8;
    /// The protocol that the header names.
    fn protocol(skb: Skb, l3: u32) -> u8;
    /// Source and destination of an outer header without options, in one piece, around a packet of the same family.
    fn ends(skb: Skb, l3: u32) -> Option<(Addr, Addr)>;
    /// The peer's address.
    fn of_peer(peer: &PeerValue) -> Option<Addr>;
    /// Writes the outer header at the packet's `l3`, whose traffic class is that of the header behind it.
    fn write(skb: Skb, packet: &mut Packet, src: &Addr, dst: &Addr) -> Result<(), DropReason>;
}

/// Sends the packet at hand to a peer by route, inside another one.
#[inline(never)]
pub fn send<F: Wrapper>(skb: Skb, peer: &PeerValue) -> u32 {
    let Some(packet) = lookup::scratch() else { return KEPT };
    let Some(dst) = F::of_peer(peer) else { return KEPT };
    let Some(own) = lookup::source_address::<F>(skb.ifindex(), skb.ifindex()) else { return KEPT };
    if packet.from != 0 {
        return KEPT;
    }
    if packet.ttl <= 1 {
        return OUT_OF_HOPS;
    }
    let len = packet.wire_len(skb).saturating_add(F::OUTER);
    let route = match route::find::<F>(skb, own, dst, F::INSIDE, len) {
        Ok(route) => route,
        // With this node's address as source it may fit; TCP cannot change its way.
        Err(DropReason::FragmentationNeeded) if packet.whole == 0 && packet.flow.proto != proto::TCP => return KEPT,
        Err(DropReason::FragmentationNeeded) => {
            packet.mtu = packet.mtu.saturating_sub(F::OUTER);
            return TOO_LONG;
        }
        Err(_) => return KEPT,
    };
    let Some(src) = lookup::source_address::<F>(route.ifindex, skb.ifindex()) else { return KEPT };
    if F::hop(skb, packet).is_err() || skb.wrap(F::OUTER as i32, !F::LONG_ADDRESSES).is_err() {
        return UNWRITTEN;
    }
    if F::write(skb, packet, &src, &dst).is_err() {
        return UNWRITTEN;
    }
    // It always is a redirect.
    route::send::<F>(skb, &route);
    SENT
}

/// Takes the outer header off a packet that a peer has wrapped for this node, and notes the peer; leaves all others alone.
#[inline(always)]
pub fn open<F: Wrapper>(skb: Skb, l3: u32) {
    if F::protocol(skb, l3) == F::INSIDE {
        take_off::<F>(skb, l3);
    }
}

#[inline(never)]
fn take_off<F: Wrapper>(skb: Skb, l3: u32) -> u32 {
    let Some(packet) = lookup::scratch() else { return 0 };
    let Some((src, dst)) = F::ends(skb, l3) else { return 0 };
    if !lookup::is_own::<F>(&dst, skb.ifindex()) {
        return 0;
    }
    let Some(peer) = lookup::peer(&PeerKey::of_addr(&src)) else { return 0 };
    if !F::of_peer(peer).is_some_and(|addr| F::same(&addr, &src)) || skb.unwrap(F::OUTER as i32).is_err() {
        return 0;
    }
    packet.from = peer.node;
    1
}

impl Wrapper for V4 {
    const OUTER: u16 = 20;
    const INSIDE: u8 = proto::IPIP;

    #[inline(always)]
    fn protocol(skb: Skb, l3: u32) -> u8 {
        packet::linearize(skb);
        packet::at::<ipv4::Header>(skb, l3).map_or(0, |ip| ip.proto)
    }

    #[inline(always)]
    fn ends(skb: Skb, l3: u32) -> Option<(Addr, Addr)> {
        let ip = packet::at::<ipv4::Header>(skb, l3)?;
        let plain = ip.version_ihl == 0x45 && ip.fragment & FRAGMENTED == 0;
        plain.then(|| (Addr::from_v4_raw(ip.src), Addr::from_v4_raw(ip.dst)))
    }

    #[inline(always)]
    fn of_peer(peer: &PeerValue) -> Option<Addr> {
        (peer.ipv4 != 0).then(|| Addr::from_v4_raw(peer.ipv4))
    }

    #[inline(always)]
    fn write(skb: Skb, packet: &mut Packet, src: &Addr, dst: &Addr) -> Result<(), DropReason> {
        let l3 = packet.l3 & 0xf;
        let tos = packet::at::<ipv4::Header>(skb, l3 + 20).map_or(0, |ip| ip.tos) & !CONGESTION;
        let mut outer = ipv4::Header {
            version_ihl: 0x45,
            tos,
            len: packet.ip_len.saturating_add(Self::OUTER).to_be(),
            id: 0,
            fragment: DONT_FRAGMENT,
            ttl: TTL,
            proto: Self::INSIDE,
            check: 0,
            src: src.v4_raw(),
            dst: dst.v4_raw(),
        };
        outer.check = !fold(outer.sum());
        packet.outer.v4 = outer;
        // SAFETY: just written; integers.
        skb.store(l3, unsafe { &packet.outer.v4 })
    }
}

impl Wrapper for V6 {
    const OUTER: u16 = 40;
    const INSIDE: u8 = proto::IPV6;

    #[inline(always)]
    fn protocol(skb: Skb, l3: u32) -> u8 {
        packet::linearize(skb);
        packet::at::<ipv6::Header>(skb, l3).map_or(0, |ip| ip.next)
    }

    #[inline(always)]
    fn ends(skb: Skb, l3: u32) -> Option<(Addr, Addr)> {
        let ip = packet::at::<ipv6::Header>(skb, l3)?;
        let plain = ip.version_class_label.to_ne_bytes()[0] >> 4 == 6;
        plain.then_some((Addr { words: ip.src }, Addr { words: ip.dst }))
    }

    #[inline(always)]
    fn of_peer(peer: &PeerValue) -> Option<Addr> {
        (!peer.ipv6.is_unspecified()).then_some(peer.ipv6)
    }

    #[inline(always)]
    fn write(skb: Skb, packet: &mut Packet, src: &Addr, dst: &Addr) -> Result<(), DropReason> {
        let l3 = packet.l3 & 0xf;
        let first = packet::at::<ipv6::Header>(skb, l3 + 40).map_or(ipv6::VERSION, |ip| ip.version_class_label);
        packet.outer.v6 = ipv6::Header {
            version_class_label: first & !CONGESTION6,
            payload: packet.ip_len.to_be(),
            next: Self::INSIDE,
            hops: TTL,
            src: src.words,
            dst: dst.words,
        };
        // SAFETY: just written; integers.
        skb.store_and_sum(l3, unsafe { &packet.outer.v6 })
    }
}
