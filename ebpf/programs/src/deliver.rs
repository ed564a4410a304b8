//! Packets to pods of this node, straight to the pod's end of its veth pair: no routing, no netfilter and no queue of the
//! host between the translation and the pod (`enable-host-legacy-routing=false`).
//!
//! Whatever is not plain goes by the host's stack, as everything does without the setting, so nothing has to be answered
//! here: the last hop, a packet that is too long for its route, a neighbour that is not known, an address of the node
//! itself, and devices that the agent has not named ([`DEVICE_POD`]).
//!
//! Deliberately absent: answers of the pods, which are in `depart`; ICMP, which goes by the stack; what DSR has addressed to
//! the pod already; and devices without Ethernet header.

use aya_ebpf::{
    bindings::{TC_ACT_REDIRECT, TC_ACT_UNSPEC},
    helpers::generated as h,
};
use kinesin_abi::DEVICE_POD;

use crate::{
    family::Family,
    frame::Frame,
    lookup,
    packet::Packet,
    skb::{ETHERNET, Skb},
    ways,
};

/// Sends the packet at hand on to its pod, if it is for one; returns the code for the hook, by default the one given.
///
/// That goes by way of memory: from here on nothing is different to the verifier, whatever has happened to the packet.
#[inline(always)]
pub fn finish<F: Family>(skb: Skb, link: u32, code: i32) -> i32 {
    let Some(packet) = lookup::scratch() else { return code };
    packet.code = code;
    if link == ETHERNET { apart::<F>(skb) } else { code }
}

/// With a stack of its own.
#[inline(never)]
fn apart<F: Family>(skb: Skb) -> i32 {
    let Some(packet) = lookup::scratch() else { return TC_ACT_UNSPEC };
    let code = packet.code;
    if code == TC_ACT_UNSPEC && send::<F>(skb, packet) != 0 { TC_ACT_REDIRECT } else { code }
}

/// 1 where the packet is on its way.
#[inline(always)]
fn send<F: Family>(skb: Skb, packet: &mut Packet) -> u32 {
    let service = packet.flow.dst;
    if !lookup::goes_straight() || packet.ttl <= 1 || !F::read_again(skb, packet) || F::same(&service, &packet.flow.dst)
    {
        return 0;
    }
    let Some(way) = ways::find::<F>(skb, packet, DEVICE_POD) else { return 0 };
    // Whom the frame is for is what a bridge in the pod, with a virtual machine behind it, goes by.
    if F::hop(skb, packet).is_err() || skb.store(0, &way.macs).is_err() {
        return 0;
    }
    // SAFETY: no pointers. Without flags it always is a redirect.
    unsafe { h::bpf_redirect_peer(way.route.ifindex, 0) };
    1
}
