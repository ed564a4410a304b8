//! Answers of pods of this node, straight from the pod's device to the LAN: no routing, no netfilter and no queue of the host
//! between the pod and the device that they leave by.
//!
//! Whatever is not plain goes by the host's stack, and `cil_to_netdev` translates it there, as it does without this program:
//! ICMP, fragments, the last hop, what is too long for its route, a neighbour that is not known. So nothing depends on
//! whether the program is attached.
//!
//! Deliberately absent: packets that answer nobody, which are the pods' network's.

use aya_ebpf::{bindings::TC_ACT_REDIRECT, helpers::generated as h};
use kinesin_abi::{DEVICE_ACROSS, DEVICE_SERVED, DropReason, FLOW_REDIRECT, FLOW_REPLY};

use crate::{
    family::Family,
    flows::{self, SECOND},
    frame::Frame,
    lookup,
    packet::TCP_SYN,
    rewrite::{self, Tuple},
    route,
    skb::{Skb, TO_US},
    verdict::Verdict,
    ways,
};

/// A packet of a pod of this node, as it comes in by our end of its veth pair.
#[inline(always)]
pub fn from_container<F: Family>(skb: Skb, link: u32) -> Result<Verdict, DropReason> {
    if !lookup::goes_straight() || skb.protocol() != F::ETHERTYPE || skb.packet_type() != TO_US {
        return Ok(Verdict::PASS);
    }
    let Some(packet) = lookup::scratch() else { return Ok(Verdict::PASS) };
    if F::parse(skb, link, packet).is_err() {
        return Ok(Verdict::PASS);
    }
    // Looked up again, so that the compiler cannot carry over what it knows about the values just written.
    let Some(packet) = lookup::scratch() else { return Ok(Verdict::PASS) };
    let packet = &*packet;
    let Some(flow) = flows::find(packet) else {
        if packet.tcp & TCP_SYN != 0 {
            flows::give_way(&packet.flow);
        }
        // Egress need not look again.
        skb.mark_translated();
        return Ok(Verdict::PASS);
    };
    let plain = flow.flags & (FLOW_REPLY | FLOW_REDIRECT) == FLOW_REPLY && packet.fragmented == 0 && packet.ttl > 1;
    if !plain {
        return Ok(Verdict::PASS);
    }
    let Some(way) = ways::find::<F>(skb, packet, DEVICE_SERVED) else { return Ok(Verdict::PASS) };
    let to = Tuple { src: flow.src, dst: flow.dst, sport: flow.sport, dport: flow.dport };
    flows::track(packet, flow);
    rewrite::translate::<F>(skb, packet, &to, true)?;
    let now = lookup::now();
    if way.flags & DEVICE_ACROSS == 0 || now >= way.fresh {
        // By the neighbour table, which asks those again who have not been heard of for long.
        way.fresh = now + SECOND;
        return Ok(Verdict::Sent(route::send::<F>(skb, &way.route)));
    }
    skb.store(0, &way.macs)?;
    // SAFETY: no pointers. Without flags it always is a redirect.
    unsafe { h::bpf_redirect_peer(way.route.ifindex, 0) };
    Ok(Verdict::Sent(TC_ACT_REDIRECT))
}
