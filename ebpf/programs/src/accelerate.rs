//! The sentence of the XDP hook: packets of known connections that leave the node again, sent from the driver, before the
//! kernel has made anything of them.
//!
//! It shares maps and steps with the tc programs, and begins nothing: whatever it does not send goes on to them untouched,
//! new connections and all that is rare among the rest (fragments, options and extension headers, ICMP, VLAN tags, hops
//! that run out, packets too long for their way, neighbours that are not known). So it is right to pass any packet, and
//! every error of tc is counted and answered there, once.
//!
//! Of a translated connection, tc gets a packet whenever there is something to note, which is once a second at least: the
//! kernel's neighbour entries are kept fresh by packets that take its way, and this is none of them.
//!
//! Deliberately absent: dropping; packets for this node's own pods, which the stack delivers.

use aya_ebpf::{
    bindings::{BPF_FIB_LKUP_RET_SUCCESS, xdp_action},
    helpers::generated as h,
};
use kinesin_abi::{
    COUNT_ACCELERATED, DEVICE_ETHERNET, DEVICE_XDP, DeviceValue, Direction, FLOW_FROM_LAN, FLOW_HANDED_ON,
    FLOW_REDIRECT, FLOW_REPLY, FlowValue, PEER_ACROSS, PEER_TAKES_NEW, PeerKey, mac_words,
};

use crate::{
    dispatch,
    family::{Family, V4, V6},
    flows,
    frame::Frame,
    lookup, option,
    packet::{self, Packet, link},
    rewrite::{self, Tuple, add, fold},
    route,
    skb::ETHERNET,
    xdp::Xdp,
};

const PASS: u32 = xdp_action::XDP_PASS;

/// All that is known of flows and peers here. What else there is, tc knows.
const FLOW_FLAGS: u8 = FLOW_REPLY | FLOW_REDIRECT | FLOW_FROM_LAN | FLOW_HANDED_ON;
const PEER_FLAGS: u16 = PEER_TAKES_NEW | PEER_ACROSS;

/// A frame from the driver; returns the hook's code.
#[inline(always)]
pub fn from_driver(xdp: Xdp) -> u32 {
    let kind = link::ethernet(xdp).map_or(0, |ethernet| ethernet.kind);
    if kind == V4::ETHERTYPE {
        serve::<V4>(xdp)
    } else if kind == V6::ETHERTYPE {
        serve::<V6>(xdp)
    } else {
        PASS
    }
}

/// A packet of one family.
#[inline(never)]
fn serve<F: Family>(xdp: Xdp) -> u32 {
    match sent::<F>(xdp) {
        Some(code) => {
            lookup::count(COUNT_ACCELERATED, Direction::Ingress, xdp.len());
            code
        }
        None => PASS,
    }
}

/// Sends a packet if it may be sent; none where tc has to see it, which then is as it came: all that is written to has been
/// read before, so that no write fails.
#[inline(always)]
fn sent<F: Family>(xdp: Xdp) -> Option<u32> {
    let parsed = F::parse(xdp, ETHERNET, lookup::scratch()?);
    // Looked up again, so that the compiler cannot carry over what it knows about the values just written.
    let packet = &*lookup::scratch()?;
    if parsed.is_err() || packet.l4 != ETHERNET + F::HEADER || packet.fragmented != 0 || packet.ttl <= 1 {
        return None;
    }
    let flow = flows::find(packet)?;
    if flow.flags & (FLOW_HANDED_ON | FLOW_REDIRECT) == 0 || flow.flags & !FLOW_FLAGS != 0 {
        return None;
    }
    let device = lookup::device(xdp.ifindex())?;
    let ethernet = link::ethernet(xdp)?;
    let ours = device.flags & DEVICE_ETHERNET != 0 && dispatch::same(ethernet.dst, mac_words(device.mac));
    if !ours || unfinished::<F>(xdp, packet) {
        return None;
    }
    if flow.flags & FLOW_REDIRECT == 0 {
        return hand_on::<F>(xdp, packet, flow, ethernet.src, device);
    }
    // What has to say which service it is for gets longer, which tc does.
    if flow.flags & FLOW_HANDED_ON != 0 && option::is_due(packet) {
        return None;
    }
    redirect::<F>(xdp, packet, flow)
}

/// Sends a packet on to the node that has its connection, as `dispatch::follow` does.
#[inline(always)]
fn hand_on<F: Family>(
    xdp: Xdp,
    packet: &Packet,
    flow: &mut FlowValue,
    from: [u16; 3],
    device: &DeviceValue,
) -> Option<u32> {
    let node = dispatch::node_of::<F>(flow, packet.flow.proto)?;
    let peer = lookup::peer(&PeerKey::of_node(node))?;
    if peer.flags & !PEER_FLAGS != 0 || peer.ifindex != xdp.ifindex() || dispatch::same(from, peer.mac) {
        return None;
    }
    flows::track(packet, flow);
    F::hop(xdp, packet).ok()?;
    xdp.store(0, &[peer.mac, mac_words(device.mac)]).ok()?;
    Some(xdp_action::XDP_TX)
}

/// Translates a packet and sends it to its next hop, as tc's `follow` does.
#[inline(always)]
fn redirect<F: Family>(xdp: Xdp, packet: &Packet, flow: &FlowValue) -> Option<u32> {
    if flows::has_news(packet, flow) {
        return None;
    }
    let query = lookup::route_query()?;
    query.ifindex = xdp.ifindex();
    let code = route::ask::<F>(xdp.as_ptr().cast(), query, &flow.src, &flow.dst, packet.flow.proto, packet.ip_len);
    let out = query.ifindex;
    if code != BPF_FIB_LKUP_RET_SUCCESS {
        return None;
    }
    // Drivers send what others hand them only while they run a program themselves.
    let away = out != xdp.ifindex();
    if away && lookup::device(out)?.flags & DEVICE_XDP == 0 {
        return None;
    }
    let to = Tuple { src: flow.src, dst: flow.dst, sport: flow.sport, dport: flow.dport };
    rewrite::translate::<F>(xdp, packet, &to, true).ok()?;
    // SAFETY: all members of the union are integers.
    let hop = unsafe { query.__bindgen_anon_6.__bindgen_anon_2 };
    xdp.store(0, &[mac_words(hop.dmac), mac_words(hop.smac)]).ok()?;
    if !away {
        return Some(xdp_action::XDP_TX);
    }
    // SAFETY: no pointers.
    Some(unsafe { h::bpf_redirect(out, 0) } as u32)
}

/// Whether a device was to fill the checksum in that the packet, which has not left the machine, never met: then it is the
/// sum of the pseudo header. The few others that have such a sum are none the worse. Of SCTP it cannot be told.
#[inline(always)]
fn unfinished<F: Family>(xdp: Xdp, packet: &Packet) -> bool {
    let protocol = packet.flow.proto;
    let Some(check) = packet::checksum(xdp, ETHERNET + F::HEADER, protocol) else { return true };
    let len = packet.ip_len.wrapping_sub(F::HEADER as u16).to_be() as u32;
    let sum = add(F::sum(&packet.flow.src, &packet.flow.dst), len + (protocol as u16).to_be() as u32);
    check == fold(sum)
}
