//! The L2 responder: answers ARP requests for addresses that this node owns (RFC 826).
//!
//! Everything that is not a request for one of ours goes on to the stack untouched, malformed packets too: they are
//! either for the host, or for nobody.

use kinesin_abi::{Addr, DropReason, mac_words};

use crate::{frame::Frame, lookup, packet::link, route, skb::Skb, verdict::Verdict};

const HARDWARE_ETHERNET: u16 = 1u16.to_be();
const PROTOCOL_IPV4: u16 = 0x0800u16.to_be();
/// Six bytes of MAC, four of IP.
const LENGTHS: u16 = 0x0604u16.to_be();
const REQUEST: u16 = 1u16.to_be();
const REPLY: u16 = 2u16.to_be();
const BROADCAST: [u16; 3] = [0xffff; 3];

/// Offset of the operation, from which on a reply differs from its request.
const OPERATION: u32 = 20;

#[repr(C)]
struct Reply {
    operation: u16,
    sender_mac: [u16; 3],
    sender_ip: [u16; 2],
    target_mac: [u16; 3],
    target_ip: [u16; 2],
}

/// Turns a request for one of our addresses into the reply and sends it back.
#[inline(always)]
pub fn respond(skb: Skb) -> Result<Verdict, DropReason> {
    let Some(arp) = link::arp(skb) else { return Ok(Verdict::PASS) };
    let well_formed = arp.hardware == HARDWARE_ETHERNET
        && arp.protocol == PROTOCOL_IPV4
        && arp.lengths == LENGTHS
        && arp.operation == REQUEST;
    // Sender and target equal is an announcement: for user space to judge, not to answer.
    if !well_formed || arp.sender_ip == arp.target_ip {
        return Ok(Verdict::PASS);
    }
    let Some(device) = lookup::device(skb.ifindex()) else { return Ok(Verdict::PASS) };
    let mac = mac_words(device.mac);
    let to_us = arp.eth.dst == BROADCAST || arp.eth.dst == mac;
    if !to_us || arp.sender_mac == mac || mac == [0; 3] {
        return Ok(Verdict::PASS);
    }
    let requester = arp.eth.src;
    let reply = Reply {
        operation: REPLY,
        sender_mac: mac,
        sender_ip: arp.target_ip,
        target_mac: arp.sender_mac,
        target_ip: arp.sender_ip,
    };
    let ([a, b], [c, d]) = (arp.target_ip[0].to_ne_bytes(), arp.target_ip[1].to_ne_bytes());
    let target = Addr::from_v4_raw(u32::from_ne_bytes([a, b, c, d]));
    if !lookup::agent_alive() || !lookup::answer_for(target, skb.ifindex()) {
        return Ok(Verdict::PASS);
    }
    skb.store(0, &[requester, mac])?;
    skb.store(OPERATION, &reply)?;
    Ok(Verdict::Answered(route::reflect(skb)))
}
