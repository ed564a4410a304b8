//! Packets to pods of this node, straight to the pod's end of its veth pair: no routing, no netfilter and no queue of the
//! host between the translation and the pod (`enable-host-legacy-routing=false`).
//!
//! Whatever is not plain goes by the host's stack, as everything does without the setting, so nothing has to be answered
//! here: the last hop, a packet that is too long for its route, a neighbour that is not known, an address of the node
//! itself, and devices that the agent has not named ([`DEVICE_POD`]).
//!
//! Deliberately absent: answers of the pods, and ICMP, which go by the stack; what DSR has addressed to the pod already; and
//! devices without Ethernet header.

use aya_ebpf::{
    bindings::{BPF_FIB_LKUP_RET_SUCCESS, TC_ACT_REDIRECT, TC_ACT_UNSPEC},
    helpers::generated as h,
};
use kinesin_abi::{Addr, DEVICE_POD, SETTING_DIRECT_TO_PODS};

use crate::{
    family::Family,
    frame::Frame,
    lookup,
    packet::Packet,
    route,
    skb::{ETHERNET, Skb},
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

/// What the routing tables have said of packets between two ends: the way to a pod.
#[repr(C)]
pub struct Hop {
    /// Until when that is believed, nanoseconds of `lookup::now`.
    until: u64,
    src: Addr,
    dst: Addr,
    ingress: u32,
    egress: u32,
    /// The pod's, and that of our end of its pair.
    macs: [[u8; 6]; 2],
    /// The longest packet that was asked about, bytes.
    len: u16,
    family: u8,
    protocol: u8,
}

/// How many of them a CPU keeps: 8 KiB.
pub const HOPS_KEPT: u32 = 128;
/// How long an answer is believed. To ask costs as much as all the rest that is done here, and who changes routes is not told
/// sooner that the kernel goes by them.
const BELIEVED: u64 = 10_000_000;

impl Hop {
    #[inline(always)]
    fn is_of<F: Family>(&self, packet: &Packet, ingress: u32) -> bool {
        let flow = &packet.flow;
        self.family == F::AF
            && self.protocol == flow.proto
            && self.ingress == ingress
            && F::same(&self.dst, &flow.dst)
            && F::same(&self.src, &flow.src)
    }
}

/// 1 where the packet is on its way.
#[inline(always)]
fn send<F: Family>(skb: Skb, packet: &mut Packet) -> u32 {
    let direct = lookup::settings().is_some_and(|settings| settings.flags & SETTING_DIRECT_TO_PODS != 0);
    let service = packet.flow.dst;
    if !direct || packet.ttl <= 1 || !F::read_again(skb, packet) || F::same(&service, &packet.flow.dst) {
        return 0;
    }
    // Ends of addresses differ most.
    let ends = packet.flow.src.words[3] ^ packet.flow.dst.words[3];
    let Some(hop) = lookup::hop((ends ^ ends >> 16 ^ ends >> 24) % HOPS_KEPT) else { return 0 };
    let (now, ingress, len) = (lookup::now(), skb.ifindex(), packet.wire_len(skb));
    let known = now < hop.until && len <= hop.len && hop.is_of::<F>(packet, ingress);
    if !known && !ask::<F>(skb, packet, hop, now, len) {
        return 0;
    }
    // Whom the frame is for is what a bridge in the pod, with a virtual machine behind it, goes by.
    if F::hop(skb, packet).is_err() || skb.store(0, &hop.macs).is_err() {
        return 0;
    }
    // SAFETY: no pointers. Without flags it always is a redirect.
    unsafe { h::bpf_redirect_peer(hop.egress, 0) };
    1
}

/// Asks the routing tables; whether they lead to a pod.
#[inline(always)]
fn ask<F: Family>(skb: Skb, packet: &Packet, hop: &mut Hop, now: u64, len: u16) -> bool {
    let Some(query) = lookup::route_query() else { return false };
    let (flow, ingress) = (&packet.flow, skb.ifindex());
    query.ifindex = ingress;
    if route::ask::<F>(skb.context(), query, &flow.src, &flow.dst, flow.proto, len) != BPF_FIB_LKUP_RET_SUCCESS {
        return false;
    }
    let leads_to_pod = lookup::device(query.ifindex).is_some_and(|device| device.flags & DEVICE_POD != 0);
    if !leads_to_pod {
        return false;
    }
    // SAFETY: the kernel has filled in both; the other member of the union is a number too.
    let macs = unsafe { query.__bindgen_anon_6.__bindgen_anon_2 };
    hop.macs = [macs.dmac, macs.smac];
    (hop.until, hop.len, hop.family, hop.protocol) = (now + BELIEVED, len, F::AF, flow.proto);
    (hop.src, hop.dst, hop.ingress, hop.egress) = (flow.src, flow.dst, ingress, query.ifindex);
    true
}
