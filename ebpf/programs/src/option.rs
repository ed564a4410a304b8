//! Dispatch `opt`: packets go to backends elsewhere with the client's address, and say which service they are for.
//!
//! The first packet of a TCP connection, and every packet of other protocols, carries the service's address and port in an
//! IPv4 option, or in an IPv6 destination option. The backend's node notes them, takes the option off, and from then on
//! gives the backend's answers the service's address. All other packets go the same way without an option.
//!
//! ```text
//! IPv4  0x9a  8     port  address                  behind the header, whose length grows
//! IPv6  next  2     0x1b  20    address  port  0 0  between the header and the transport header
//! ```
//!
//! Numbers and lengths are Cilium's; ports and addresses are in wire order. Routers may drop packets with options, and
//! many do: within one administration that can be known, elsewhere `ipip` is the safer way.
//!
//! Deliberately absent: packets that have options or extension headers of their own, which go with this node's address,
//! and proof of who has added an option: whoever reaches the backend could, and harms only his own answers.

use aya_ebpf::bindings::TC_ACT_SHOT;
use kinesin_abi::{Addr, Be16, Direction, DropReason, FrontendValue, PeerKey, proto};

use crate::{
    family::{Family, V4, V6},
    frame::Frame,
    ingress::REPORT,
    lookup, opening,
    packet::{self, Packet, TCP_SYN, ipv4},
    rewrite::{self, Tuple, add, fold},
    route,
    skb::Skb,
    verdict::{self, Verdict},
};

const KIND: u8 = 0x9a;
const KIND6: u8 = 0x1b;
const DESTINATION: u8 = 60;

/// The option of IPv4.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Option4 {
    kind_len: u16,
    port: Be16,
    addr: [u16; 2],
}

/// The extension header of IPv6.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Option6 {
    next: u8,
    len: u8,
    kind: u8,
    option_len: u8,
    addr: Addr,
    port: Be16,
    pad: u16,
}

/// Carrying the service's end, which differs between the families.
pub trait Carrier: Family {
    /// Length of the option.
    const LEN: u16;
    /// Length of an IP header without options.
    const PLAIN: u32;
    /// Whether the packet has just the option, as far as its headers' length tells.
    fn may_have(packet: &Packet) -> bool;
    /// Adds the option to the packet at hand, for the service that it was for.
    fn add(skb: Skb, packet: &mut Packet) -> Result<(), DropReason>;
    /// The service's end.
    fn read(skb: Skb, packet: &Packet) -> Option<(Addr, Be16)>;
    /// Takes the option off.
    fn remove(skb: Skb, packet: &mut Packet) -> Result<(), DropReason>;
}

/// Whether packets like this one must say which service they are for.
#[inline(always)]
pub fn is_due(packet: &Packet) -> bool {
    packet.flow.proto != proto::TCP || packet.tcp & TCP_SYN != 0
}

/// Whether there is room for an option in a packet. A fragment has none, as it is as long as the way takes.
#[inline(always)]
pub fn has_room<F: Carrier>(packet: &Packet) -> bool {
    packet.fragmented == 0 && packet.l4 - packet.l3 == F::PLAIN
}

/// No codes of a hook: the packet is for [`send`], or for [`learn`].
pub const TO_BACKEND: i32 = 101;
pub const LEARN: i32 = 102;

/// Has [`send`] called where there is stack left for it.
#[inline(always)]
pub fn to_backend(addr: Addr, port: Be16) -> Verdict {
    let Some(packet) = lookup::scratch() else { return Verdict::PASS };
    packet.quoted.dst = addr;
    packet.quoted.dport = port;
    Verdict::Answered(TO_BACKEND)
}

/// Sends the packet at hand to the backend that is the destination of [`Packet::quoted`], with the option where that has
/// room; returns the code for the hook, or one of [`REPORT`].
#[inline(never)]
pub fn send<F: Carrier>(skb: Skb) -> i32 {
    let Some(packet) = lookup::scratch() else { return TC_ACT_SHOT };
    if packet.ttl <= 1 {
        return REPORT + DropReason::TtlExceeded as i32;
    }
    let (pod, port) = (packet.quoted.dst, packet.quoted.dport);
    // The backend's node knows the connection of such a packet from those before.
    let room = has_room::<F>(packet);
    let len = packet.wire_len(skb).saturating_add(if room { F::LEN } else { 0 });
    let sent = match route::find::<F>(skb, packet.flow.src, pod, packet.flow.proto, len) {
        Ok(route) => {
            let to = Tuple { src: packet.flow.src, dst: pod, sport: packet.flow.sport, dport: port };
            match rewrite::translate::<F>(skb, packet, &to, true) {
                Ok(()) if carry::<F>(skb) == 0 => Ok(Verdict::Sent(route::send::<F>(skb, &route))),
                _ => Err(DropReason::WriteError),
            }
        }
        Err(DropReason::FragmentationNeeded) => {
            packet.mtu = packet.mtu.saturating_sub(F::LEN);
            return REPORT + DropReason::FragmentationNeeded as i32;
        }
        Err(reason) => Err(reason),
    };
    verdict::finish(skb, Direction::Ingress, sent)
}

/// Adds the option where it has room; 0 where nothing failed.
///
/// Looked at again, and not carried over from before the rewriting: a known truth on the stack is what Linux 6.1 loses count
/// of. It takes the packet with room for the one without, never follows it, and removes what it would have done.
#[inline(always)]
fn carry<F: Carrier>(skb: Skb) -> u32 {
    let Some(packet) = lookup::scratch() else { return 1 };
    (has_room::<F>(packet) && F::add(skb, packet).is_err()) as u32
}

/// Notes the connection of a packet that says which service it is for, and takes the option off, unless the backend is none
/// of this node's, or the service not ours; returns the code for the hook.
#[inline(never)]
pub fn learn<F: Carrier>(skb: Skb) -> i32 {
    let verdict = if note::<F>(skb) != 0 { Verdict::TRANSLATED } else { Verdict::PASS };
    verdict::finish(skb, Direction::Ingress, Ok(verdict))
}

#[inline(always)]
fn note<F: Carrier>(skb: Skb) -> u32 {
    let Some(packet) = lookup::scratch() else { return 0 };
    if !is_due(packet) {
        return 0;
    }
    let Some(service) = F::read(skb, packet) else { return 0 };
    let Some(frontend) = frontend::<F>(&service, packet.flow.proto) else { return 0 };
    let (base, count) = (frontend.external.base, frontend.external.count);
    let (addr, port) = (service.0, service.1.raw() as u32);
    if lookup::local_member(base, count) == 0 || opening::learn(&packet.flow, &addr, port, packet.member) == 0 {
        return 0;
    }
    F::remove(skb, packet).is_ok() as u32
}

/// Takes the option off a packet of a known connection; 0 where it is off.
#[inline(never)]
pub fn take_off<F: Carrier>(skb: Skb) -> u32 {
    let Some(packet) = lookup::scratch() else { return 0 };
    if F::may_have(packet) && F::read(skb, packet).is_some() && F::remove(skb, packet).is_err() {
        return 1;
    }
    0
}

/// The service at an end, which may be a NodePort of a node that we know.
#[inline(never)]
fn frontend<F: Family>(service: &(Addr, Be16), protocol: u8) -> Option<&'static FrontendValue> {
    if let Some(frontend) = lookup::frontend_exact(service.0, service.1, protocol) {
        return Some(frontend);
    }
    lookup::peer(&PeerKey::of_addr(&service.0))?;
    if !lookup::is_node_port(service.1) {
        return None;
    }
    lookup::node_port::<F>(service.1, protocol)
}

/// Writes an IPv4 header again with another length, and what its option adds to its sum.
#[inline(always)]
fn rewrite_header(skb: Skb, packet: &mut Packet, words: u8, grown: u16, option: u32) -> Result<(), DropReason> {
    let l3 = packet.l3 & 0xf;
    let Some(ip) = packet::at::<ipv4::Header>(skb, l3) else { return Err(DropReason::WriteError) };
    let mut ip = *ip;
    ip.version_ihl = 0x40 | words;
    ip.len = packet.ip_len.wrapping_add(grown).to_be();
    ip.check = !fold(add(ip.sum(), option));
    skb.store_and_sum(l3, &ip)
}

impl Carrier for V4 {
    const LEN: u16 = 8;
    const PLAIN: u32 = 20;

    #[inline(always)]
    fn may_have(packet: &Packet) -> bool {
        packet.l4 - packet.l3 == Self::PLAIN + Self::LEN as u32
    }

    #[inline(always)]
    fn add(skb: Skb, packet: &mut Packet) -> Result<(), DropReason> {
        let [a, b, c, d] = packet.flow.dst.v4_raw().to_ne_bytes();
        let addr = [u16::from_ne_bytes([a, b]), u16::from_ne_bytes([c, d])];
        let option = Option4 { kind_len: u16::from_ne_bytes([KIND, 8]), port: packet.flow.dport, addr };
        skb.adjust_options(Self::LEN as i32)?;
        skb.store_and_sum((packet.l3 & 0xf) + Self::PLAIN, &option)?;
        let sum = option.kind_len as u32 + option.port.raw() as u32 + addr[0] as u32 + addr[1] as u32;
        rewrite_header(skb, packet, 7, Self::LEN, sum)
    }

    #[inline(always)]
    fn read(skb: Skb, packet: &Packet) -> Option<(Addr, Be16)> {
        let option = packet::at::<Option4>(skb, (packet.l3 & 0xf) + Self::PLAIN)?;
        let ([a, b], [c, d]) = (option.addr[0].to_ne_bytes(), option.addr[1].to_ne_bytes());
        let addr = Addr::from_v4_raw(u32::from_ne_bytes([a, b, c, d]));
        (option.kind_len == u16::from_ne_bytes([KIND, 8])).then_some((addr, option.port))
    }

    #[inline(always)]
    fn remove(skb: Skb, packet: &mut Packet) -> Result<(), DropReason> {
        skb.adjust_options(-(Self::LEN as i32))?;
        rewrite_header(skb, packet, 5, Self::LEN.wrapping_neg(), 0)
    }
}

impl Carrier for V6 {
    const LEN: u16 = 24;
    const PLAIN: u32 = 40;

    #[inline(always)]
    fn may_have(packet: &Packet) -> bool {
        packet.next == DESTINATION && packet.l4 - packet.l3 == Self::PLAIN + Self::LEN as u32
    }

    #[inline(always)]
    fn add(skb: Skb, packet: &mut Packet) -> Result<(), DropReason> {
        let l3 = packet.l3 & 0xf;
        packet.option = Option6 {
            next: packet.next,
            len: 2,
            kind: KIND6,
            option_len: 20,
            addr: packet.flow.dst,
            port: packet.flow.dport,
            pad: 0,
        };
        skb.adjust_options(Self::LEN as i32)?;
        skb.store_and_sum(l3 + Self::PLAIN, &packet.option)?;
        rewrite::payload6(skb, packet, Self::LEN, [DESTINATION, packet.ttl.wrapping_sub(1)])
    }

    #[inline(always)]
    fn read(skb: Skb, packet: &Packet) -> Option<(Addr, Be16)> {
        let option = packet::at::<Option6>(skb, (packet.l3 & 0xf) + Self::PLAIN)?;
        let is = option.len == 2 && option.kind == KIND6 && option.option_len == 20;
        is.then_some((option.addr, option.port))
    }

    #[inline(always)]
    fn remove(skb: Skb, packet: &mut Packet) -> Result<(), DropReason> {
        skb.adjust_options(-(Self::LEN as i32))?;
        rewrite::payload6(skb, packet, Self::LEN.wrapping_neg(), [packet.flow.proto, packet.ttl])
    }
}
