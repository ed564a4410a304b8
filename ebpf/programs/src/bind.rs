//! Ports that NodePorts have cannot be bound on the node: whoever listens there would never see a packet, which goes to the
//! service, and would not know why.
//!
//! Deliberately absent: ports of pods, which are their own, and sockets that were bound before the NodePort was there.

use aya_ebpf::bindings::bpf_sock;
use kinesin_abi::{Addr, Be16, FrontendKind, SETTING_PROTECT_NODE_PORTS, frontend_flags};

use crate::{
    lookup,
    sock::{ALLOW, DENY, any_address, on_the_node, read},
};

type Context = *mut bpf_sock;

/// Refuses a NodePort to an IPv4 socket, with EPERM.
#[inline(always)]
pub fn post_bind4(ctx: Context) -> i32 {
    let addr = Addr::from_v4_raw(read!(ctx, src_ip4));
    let every = if addr.v4_raw() == 0 { Some(addr) } else { any_address(&addr) };
    verdict(ctx, addr, [every, None])
}

/// Refuses a NodePort to an IPv6 socket, with EPERM. Bound to every address it would be IPv4's too.
#[inline(always)]
pub fn post_bind6(ctx: Context) -> i32 {
    let words = [read!(ctx, src_ip6[0]), read!(ctx, src_ip6[1]), read!(ctx, src_ip6[2]), read!(ctx, src_ip6[3])];
    let addr = Addr { words };
    let every =
        if addr.is_unspecified() { [Some(addr), Some(Addr::from_v4_raw(0))] } else { [any_address(&addr), None] };
    verdict(ctx, addr, every)
}

/// `every` stands for all addresses of the node, of each family that the socket takes them from.
#[inline(always)]
fn verdict(ctx: Context, addr: Addr, every: [Option<Addr>; 2]) -> i32 {
    let protects = lookup::settings().is_some_and(|settings| settings.flags & SETTING_PROTECT_NODE_PORTS != 0);
    if !protects || !on_the_node(ctx.cast()) {
        return ALLOW;
    }
    let (port, protocol) = (Be16::new(read!(ctx, src_port) as u16), read!(ctx, protocol) as u8);
    let taken = |addr: Addr| {
        lookup::frontend_exact(addr, port, protocol)
            .is_some_and(|frontend| frontend.flags & frontend_flags::KIND == FrontendKind::NodePort as u32)
    };
    let taken = match every {
        [None, None] => taken(addr),
        [a, b] => a.is_some_and(&taken) || b.is_some_and(&taken),
    };
    if taken { DENY } else { ALLOW }
}
