//! What the routing tables say of packets that do not pass the host's stack, believed for moments.
//!
//! Deliberately absent: any decision about what goes such a way, which is in `deliver` and `depart`.

use aya_ebpf::bindings::BPF_FIB_LKUP_RET_SUCCESS;
use kinesin_abi::Addr;

use crate::{
    family::Family,
    lookup,
    packet::Packet,
    route::{self, Route},
    skb::Skb,
};

/// What the routing tables have said of packets between two ends.
#[repr(C)]
pub struct Way {
    /// Until when that is believed, nanoseconds of `lookup::now`.
    until: u64,
    /// Until when the neighbour need not be asked whether it is still there; see `depart`.
    pub fresh: u64,
    src: Addr,
    dst: Addr,
    ingress: u32,
    /// The device that packets leave by, and whom they are for there.
    pub route: Route,
    /// That one's, and that of the device.
    pub macs: [[u8; 6]; 2],
    /// The longest packet that was asked about, bytes.
    len: u16,
    /// `DEVICE_*` of the device.
    pub flags: u16,
    family: u8,
    protocol: u8,
    pad: [u8; 2],
}

/// How many of them a CPU keeps: 12 KiB.
pub const WAYS_KEPT: u32 = 128;
/// How long an answer is believed. To ask costs as much as all the rest that is done here, and who changes routes is not told
/// sooner that the kernel goes by them.
const BELIEVED: u64 = 10_000_000;

impl Way {
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

/// The way of the packet at hand by a device that has one of the flags (`DEVICE_*`); none where the tables lead elsewhere, or
/// know something that only the stack does: no neighbour yet, a packet that is too long, an address of the host itself.
#[inline(always)]
pub fn find<F: Family>(skb: Skb, packet: &Packet, wanted: u16) -> Option<&'static mut Way> {
    // Ends of addresses differ most.
    let ends = packet.flow.src.words[3] ^ packet.flow.dst.words[3];
    let way = lookup::way((ends ^ ends >> 16 ^ ends >> 24) % WAYS_KEPT)?;
    let (now, ingress, len) = (lookup::now(), skb.ifindex(), packet.wire_len(skb));
    let known = now < way.until && len <= way.len && way.is_of::<F>(packet, ingress);
    if known || ask::<F>(skb, packet, way, (now, len), wanted) { Some(way) } else { None }
}

/// Asks the routing tables; false where they lead elsewhere, which is asked again for the next packet.
#[inline(always)]
fn ask<F: Family>(skb: Skb, packet: &Packet, way: &mut Way, (now, len): (u64, u16), wanted: u16) -> bool {
    let Some(query) = lookup::route_query() else { return false };
    let (flow, ingress) = (&packet.flow, skb.ifindex());
    query.ifindex = ingress;
    if route::ask::<F>(skb.context(), query, &flow.src, &flow.dst, flow.proto, len) != BPF_FIB_LKUP_RET_SUCCESS {
        return false;
    }
    let Some(device) = lookup::device(query.ifindex).filter(|device| device.flags & wanted != 0) else { return false };
    // SAFETY: the kernel has filled in both; the other member of the union is a number too.
    let macs = unsafe { query.__bindgen_anon_6.__bindgen_anon_2 };
    way.macs = [macs.dmac, macs.smac];
    way.route = Route::of(query);
    (way.until, way.len, way.family, way.protocol) = (now + BELIEVED, len, F::AF, flow.proto);
    (way.src, way.dst, way.ingress, way.flags) = (flow.src, flow.dst, ingress, device.flags);
    true
}
