//! Entry points of Kinesin's eBPF programs. An eBPF program is a sentence: parse, look up, rewrite, verdict.
//!
//! `packet` alone reads packet memory, `lookup`, `flows`, `opening`, `fragments` and `affinity` alone touch maps, `rewrite`,
//! `dispatch`, `deliver`, `depart`, `wrap`, `option`, `accelerate`, `arp`, `ndp`, `icmp` and `reject` alone write. What IPv4 and IPv6 do not have in
//! common is in `family`; each has programs of its own, but for that of XDP, of which a device takes one. Names are
//! Cilium's, so that habits with `bpftool` carry over.
//!
//! Deliberately absent: CO-RE, kernel BTF, kfuncs, `bpf_loop` (the floor is Linux 5.10), and any per-packet logging.
#![no_std]
#![no_main]
// The macros' outer functions take the context as a raw pointer.
#![allow(clippy::not_unsafe_ptr_arg_deref)]

// A check of the whole workspace builds this for the host too, with the host's panic handler.
#[cfg(not(target_arch = "bpf"))]
extern crate std;

mod accelerate;
mod affinity;
mod arp;
mod bind;
mod deliver;
mod depart;
mod dispatch;
mod family;
mod flows;
mod fragments;
mod frame;
mod icmp;
mod ingress;
mod loaded;
mod local;
mod lookup;
mod maps;
mod ndp;
mod opening;
mod option;
mod packet;
mod reject;
mod rewrite;
mod route;
mod skb;
mod sock;
mod verdict;
mod ways;
mod wrap;
mod xdp;

use aya_ebpf::{
    macros::{cgroup_sock, cgroup_sock_addr, classifier, xdp},
    programs::{SockAddrContext, SockContext, TcContext, XdpContext},
};
use kinesin_abi::Direction;

use crate::{
    family::{V4, V6},
    skb::{ETHERNET, NO_LINK_HEADER, Skb},
    xdp::Xdp,
};

macro_rules! device_programs {
    ($($(#[$doc:meta])* $name:ident => $direction:ident, $handler:expr, $link:expr;)*) => {$(
        $(#[$doc])*
        #[classifier]
        pub fn $name(ctx: TcContext) -> i32 {
            let skb = Skb::new(&ctx);
            verdict::finish(skb, Direction::$direction, $handler(skb, $link))
        }
    )*};
}

device_programs! {
    /// From the LAN into the node: ARP, services, and replies of remote backends.
    cil_from_netdev => Ingress, ingress::from_netdev, ETHERNET;
    /// Out of the node: replies of local backends.
    cil_to_netdev => Egress, ingress::to_netdev::<V4>, ETHERNET;
    /// [`cil_from_netdev`] for devices without Ethernet header.
    cil_from_l3dev => Ingress, ingress::from_netdev, NO_LINK_HEADER;
    /// [`cil_to_netdev`] for devices without Ethernet header.
    cil_to_l3dev => Egress, ingress::to_netdev::<V4>, NO_LINK_HEADER;
    /// IPv6 from the LAN into the node: solicitations, services, and replies of remote backends.
    cil_from_netdev6 => Ingress, ingress::from_netdev6, ETHERNET;
    /// IPv6 out of the node: replies of local backends.
    cil_to_netdev6 => Egress, ingress::to_netdev::<V6>, ETHERNET;
    /// From a pod of this node: answers, which go straight to the LAN.
    cil_from_container => Egress, depart::from_container::<V4>, ETHERNET;
    /// IPv6 from a pod of this node.
    cil_from_container6 => Egress, depart::from_container::<V6>, ETHERNET;
    /// [`cil_from_netdev6`] for devices without Ethernet header.
    cil_from_l3dev6 => Ingress, ingress::from_netdev6, NO_LINK_HEADER;
    /// [`cil_to_netdev6`] for devices without Ethernet header.
    cil_to_l3dev6 => Egress, ingress::to_netdev::<V6>, NO_LINK_HEADER;
}

/// From the driver of an Ethernet device, before [`cil_from_netdev`] and [`cil_from_netdev6`]: packets of both families that
/// leave the node again.
#[xdp]
pub fn cil_xdp_entry(ctx: XdpContext) -> u32 {
    accelerate::from_driver(Xdp::new(&ctx))
}

macro_rules! sock_programs {
    ($($(#[$doc:meta])* $hook:ident $name:ident => $handler:path;)*) => {$(
        $(#[$doc])*
        #[cgroup_sock_addr($hook)]
        pub fn $name(ctx: SockAddrContext) -> i32 {
            $handler(ctx.sock_addr)
        }
    )*};
}

sock_programs! {
    /// `connect(2)` of IPv4 sockets.
    connect4 cil_sock4_connect => sock::connect4;
    /// `sendto(2)` and `sendmsg(2)` of unconnected IPv4 UDP sockets.
    sendmsg4 cil_sock4_sendmsg => sock::connect4;
    /// The source address that `recvfrom(2)` tells.
    recvmsg4 cil_sock4_recvmsg => sock::restore4;
    /// The address that `getpeername(2)` tells.
    getpeername4 cil_sock4_getpeername => sock::restore4;
    /// `connect(2)` of IPv6 sockets.
    connect6 cil_sock6_connect => sock::connect6;
    /// `sendmsg(2)` of unconnected IPv6 UDP sockets.
    sendmsg6 cil_sock6_sendmsg => sock::connect6;
    /// The source address that `recvfrom(2)` tells IPv6 sockets.
    recvmsg6 cil_sock6_recvmsg => sock::restore6;
    /// The address that `getpeername(2)` tells IPv6 sockets.
    getpeername6 cil_sock6_getpeername => sock::restore6;
}

/// `bind(2)` of IPv4 sockets, once they have their port.
#[cgroup_sock(post_bind4)]
pub fn cil_sock4_post_bind(ctx: SockContext) -> i32 {
    bind::post_bind4(ctx.sock)
}

/// `bind(2)` of IPv6 sockets, once they have their port.
#[cgroup_sock(post_bind6)]
pub fn cil_sock6_post_bind(ctx: SockContext) -> i32 {
    bind::post_bind6(ctx.sock)
}

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    // Never reached: nothing in the programs panics, and the verifier would refuse the loop.
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 4] = *b"GPL\0";
