//! Where a translated packet leaves the node when it does not pass the host's stack.

use core::ffi::c_void;

use aya_ebpf::{
    bindings::{
        BPF_FIB_LKUP_RET_FRAG_NEEDED, BPF_FIB_LKUP_RET_FWD_DISABLED, BPF_FIB_LKUP_RET_NO_NEIGH,
        BPF_FIB_LKUP_RET_SUCCESS, bpf_fib_lookup, bpf_redir_neigh,
    },
    helpers::generated as h,
};
use kinesin_abi::{Addr, DropReason};

use crate::{
    family::{Family, V4},
    lookup,
    skb::Skb,
};

/// A device and the next hop on it.
#[repr(C)]
pub struct Route {
    pub ifindex: u32,
    family: u32,
    hop: [u32; 4],
}

impl Route {
    /// Nowhere; for packets that the stack delivers.
    pub const NONE: Self = Self { ifindex: 0, family: 0, hop: [0; 4] };

    /// What the routing tables have answered.
    #[inline(always)]
    pub fn of(answer: &bpf_fib_lookup) -> Self {
        // SAFETY: all members of the union are integers; IPv4 uses the first word.
        let hop = unsafe { answer.__bindgen_anon_4.ipv6_dst };
        Self { ifindex: answer.ifindex, family: answer.family as u32, hop }
    }
}

/// Asks the kernel's routing tables, by whichever hook's context, for the way of an IP packet from the query's device;
/// returns their code.
#[inline(always)]
pub fn ask<F: Family>(
    context: *mut c_void,
    query: &mut bpf_fib_lookup,
    src: &Addr,
    dst: &Addr,
    protocol: u8,
    len: u16,
) -> u32 {
    query.family = F::AF;
    query.l4_protocol = protocol;
    query.__bindgen_anon_1.tot_len = len;
    // The type of service, where the last answer has the route's metric.
    query.__bindgen_anon_2.flowinfo = 0;
    if F::AF == V4::AF {
        query.__bindgen_anon_3.ipv4_src = src.v4_raw();
        query.__bindgen_anon_4.ipv4_dst = dst.v4_raw();
    } else {
        query.__bindgen_anon_3.ipv6_src = src.words;
        query.__bindgen_anon_4.ipv6_dst = dst.words;
    }
    // SAFETY: the structure outlives the call.
    unsafe { h::bpf_fib_lookup(context, query, size_of::<bpf_fib_lookup>() as i32, 0) as u32 }
}

/// Asks the kernel's routing tables for the way of an IP packet of `len` bytes; merged segments count one by one. Where
/// the packet does not fit, that is the error, and `Packet::mtu` says what does.
#[inline(always)]
pub fn find<F: Family>(skb: Skb, src: Addr, dst: Addr, protocol: u8, len: u16) -> Result<Route, DropReason> {
    let query = lookup::route_query().ok_or(DropReason::FibLookupFailed)?;
    query.ifindex = skb.ifindex();
    let code = ask::<F>(skb.as_ptr().cast(), query, &src, &dst, protocol, len);
    // SAFETY: all members of the union are integers; IPv4 uses the first word.
    let hop = unsafe { query.__bindgen_anon_4.ipv6_dst };
    match code {
        // Without a neighbour entry yet, the redirect resolves it.
        BPF_FIB_LKUP_RET_SUCCESS | BPF_FIB_LKUP_RET_NO_NEIGH => {
            Ok(Route { ifindex: query.ifindex, family: query.family as u32, hop })
        }
        // A load balancer need not be a router: without IP forwarding, back to the LAN that the packet came from.
        BPF_FIB_LKUP_RET_FWD_DISABLED => Ok(Route { ifindex: skb.ifindex(), family: 0, hop }),
        BPF_FIB_LKUP_RET_FRAG_NEEDED => {
            // SAFETY: both members are the same integer.
            let mtu = unsafe { query.__bindgen_anon_1.mtu_result };
            // Older kernels leave the length there.
            let mtu = if mtu < len { mtu } else { 0 };
            if let Some(packet) = lookup::scratch() {
                packet.mtu = mtu;
            }
            Err(DropReason::FragmentationNeeded)
        }
        _ => Err(DropReason::FibLookupFailed),
    }
}

/// Sends the packet; returns the code for the hook.
#[inline(always)]
pub fn send<F: Family>(skb: Skb, route: &Route) -> i32 {
    if F::LONG_ADDRESSES { apart(skb, route) } else { redirect(skb, route) }
}

/// [`redirect`] with a stack of its own.
#[inline(never)]
fn apart(skb: Skb, route: &Route) -> i32 {
    redirect(skb, route)
}

#[inline(always)]
fn redirect(skb: Skb, route: &Route) -> i32 {
    skb.mark_translated();
    if route.family == 0 {
        // SAFETY: no structure, so the kernel looks the next hop up on that device.
        return unsafe { h::bpf_redirect_neigh(route.ifindex, core::ptr::null_mut(), 0, 0) } as i32;
    }
    // SAFETY: integers and a union of integers; zero is valid.
    let mut neighbour: bpf_redir_neigh = unsafe { core::mem::zeroed() };
    neighbour.nh_family = route.family;
    neighbour.__bindgen_anon_1.ipv6_nh = route.hop;
    let size = size_of::<bpf_redir_neigh>() as i32;
    // SAFETY: the structure outlives the call, which copies it.
    unsafe { h::bpf_redirect_neigh(route.ifindex, &mut neighbour, size, 0) as i32 }
}

/// Sends the packet back out of the device that it came in by, as it is.
#[inline(always)]
pub fn back(skb: Skb) -> i32 {
    skb.mark_translated();
    reflect(skb)
}

/// [`back`] for what egress does not look at.
#[inline(always)]
pub fn reflect(skb: Skb) -> i32 {
    // SAFETY: no pointers.
    unsafe { h::bpf_redirect(skb.ifindex(), 0) as i32 }
}
