//! The L2 responder of IPv6: answers neighbour solicitations for addresses that this node owns (RFC 4861 section 7.2).
//!
//! What `packet::link` does not take for a solicitation, and what asks for an address that is not ours, goes on to the
//! stack untouched. A probe of somebody who wants the address for itself (RFC 4862 section 5.4.3) is answered to all, so
//! that it learns that the address is taken.
//!
//! Deliberately absent: router advertisements and redirects.

use kinesin_abi::{Addr, Direction, DropReason, mac_words, proto};

use crate::{
    family::{Family, V6},
    frame::Frame,
    lookup,
    packet::{ipv6, link},
    rewrite::{add, fold},
    route,
    skb::{ETHERNET, Skb},
    verdict::{self, Verdict},
};

const ADVERTISEMENT: u16 = 0x8800u16.to_be();
const SOLICITED: u32 = 0x4000_0000u32.to_be();
const OVERRIDE: u32 = 0x2000_0000u32.to_be();
/// Target link-layer address, of eight bytes.
const TARGET_MAC: u16 = 0x0201u16.to_be();
/// From the ICMPv6 header on.
const PAYLOAD: u16 = 32;

const ALL_NODES: Addr = Addr { words: [0xff02_0000u32.to_be(), 0, 0, 1u32.to_be()] };
const ALL_NODES_MAC: [u16; 3] = [0x3333u16.to_be(), 0, 1u16.to_be()];

/// A neighbour advertisement in its frame.
#[repr(C, packed)]
struct Advertisement {
    to: [u16; 3],
    from: [u16; 3],
    ethertype: u16,
    version: u32,
    payload: u16,
    next_hops: u16,
    src: Addr,
    dst: Addr,
    kind: u16,
    check: u16,
    flags: u32,
    target: Addr,
    option: u16,
    mac: [u16; 3],
}

/// Turns a solicitation of one of our addresses into the advertisement and sends it back; none where it is no such.
#[inline(always)]
pub fn respond(skb: Skb) -> Option<Verdict> {
    match answer(skb) {
        NOT_ASKED => None,
        code => Some(Verdict::Answered(code)),
    }
}

/// No code of a hook.
const NOT_ASKED: i32 = i32::MAX;

/// A sentence of its own, with a stack of its own.
#[inline(never)]
fn answer(skb: Skb) -> i32 {
    match advertisement(skb) {
        None => NOT_ASKED,
        Some(advertisement) => verdict::finish(skb, Direction::Ingress, send(skb, &advertisement)),
    }
}

#[inline(always)]
fn advertisement(skb: Skb) -> Option<Advertisement> {
    let asked = link::solicitation(skb)?;
    let device = lookup::device(skb.ifindex())?;
    let mac = mac_words(device.mac);
    if mac == [0; 3] || asked.from == mac || !lookup::agent_alive() || !lookup::answer_for(asked.target, skb.ifindex())
    {
        return None;
    }
    let probe = asked.src.is_unspecified();
    let (to, dst) = if probe { (ALL_NODES_MAC, ALL_NODES) } else { (asked.from, asked.src) };
    let flags = if probe { OVERRIDE } else { SOLICITED | OVERRIDE };
    let mut sum = ADVERTISEMENT as u32 + TARGET_MAC as u32 + PAYLOAD.to_be() as u32;
    sum += (proto::ICMPV6 as u16).to_be() as u32;
    sum += mac[0] as u32 + mac[1] as u32 + mac[2] as u32;
    sum = add(sum, flags);
    for i in 0..4 {
        // The target is the source of the advertisement too.
        sum = add(sum, add(dst.words[i], add(asked.target.words[i], asked.target.words[i])));
    }
    Some(Advertisement {
        to,
        from: mac,
        ethertype: V6::ETHERTYPE,
        version: ipv6::VERSION,
        payload: PAYLOAD.to_be(),
        next_hops: link::NEXT_HOPS,
        src: asked.target,
        dst,
        kind: ADVERTISEMENT,
        check: !fold(sum),
        flags,
        target: asked.target,
        option: TARGET_MAC,
        mac,
    })
}

#[inline(always)]
fn send(skb: Skb, advertisement: &Advertisement) -> Result<Verdict, DropReason> {
    skb.resize(ETHERNET + 40 + PAYLOAD as u32)?;
    skb.store_and_sum(0, advertisement)?;
    Ok(Verdict::Answered(route::reflect(skb)))
}
