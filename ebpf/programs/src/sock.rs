//! Service addresses for sockets of this node and its pods: translated once, at `connect(2)`, instead of per packet.
//!
//! IPv6 sockets are served where they talk to IPv4-mapped addresses; real IPv6 passes. Wildcard entries do not concern
//! sockets. Deliberately absent: Maglev, which serves connections that move between nodes.

use aya_ebpf::{bindings::bpf_sock_addr, helpers::generated as h};
use kinesin_abi::{
    Addr, AffinityKey, Backend, BackendId, Be16, FrontendKind, FrontendValue, SocketKey, SocketValue, frontend_flags,
    proto,
};

use crate::{affinity, lookup};

/// The system call goes on.
const ALLOW: i32 = 1;
/// The system call fails with EPERM.
const DENY: i32 = 0;

type Context = *mut bpf_sock_addr;

/// Cookie of the agent's network namespace, set when the programs are loaded; 0 where the kernel does not tell it (before
/// 5.14), and then the node is the initial namespace.
#[unsafe(no_mangle)]
static NODE_NETNS: u64 = 0;

/// A socket's destination.
#[derive(Clone, Copy)]
struct Destination {
    addr: Addr,
    port: Be16,
}

macro_rules! read {
    ($ctx:expr, $($field:tt)+) => {
        // SAFETY: the program's context. Volatile: one field at a time, as the verifier demands.
        unsafe { (&raw const (*$ctx).$($field)+).read_volatile() }
    };
}
macro_rules! write {
    ($ctx:expr, $($field:ident)+ $([$index:literal])?, $value:expr) => {
        // SAFETY: as for reading.
        unsafe { (&raw mut (*$ctx).$($field)+ $([$index])?).write_volatile($value) }
    };
}

#[inline(always)]
fn v4(ctx: Context) -> Destination {
    Destination { addr: Addr::from_v4_raw(read!(ctx, user_ip4)), port: port(ctx) }
}

#[inline(always)]
fn v6(ctx: Context) -> Destination {
    let words = [read!(ctx, user_ip6[0]), read!(ctx, user_ip6[1]), read!(ctx, user_ip6[2]), read!(ctx, user_ip6[3])];
    Destination { addr: Addr { words }, port: port(ctx) }
}

#[inline(always)]
fn port(ctx: Context) -> Be16 {
    Be16::from_raw(read!(ctx, user_port) as u16)
}

/// Translates an IPv4 destination.
#[inline(always)]
pub fn connect4(ctx: Context) -> i32 {
    match translate(ctx, v4(ctx)) {
        Ok(None) => ALLOW,
        Ok(Some(to)) => {
            write!(ctx, user_ip4, to.addr.v4_raw());
            write!(ctx, user_port, to.port.raw() as u32);
            ALLOW
        }
        Err(NoBackend) => DENY,
    }
}

/// Translates an IPv4-mapped destination.
#[inline(always)]
pub fn connect6(ctx: Context) -> i32 {
    let destination = v6(ctx);
    if !destination.addr.is_v4() {
        return ALLOW;
    }
    match translate(ctx, destination) {
        Ok(None) => ALLOW,
        Ok(Some(to)) => {
            write!(ctx, user_ip6[3], to.addr.v4_raw());
            write!(ctx, user_port, to.port.raw() as u32);
            ALLOW
        }
        Err(NoBackend) => DENY,
    }
}

/// Tells the application the service's address instead of the backend's.
#[inline(always)]
pub fn restore4(ctx: Context) -> i32 {
    if let Some(service) = asked_for(ctx, v4(ctx)) {
        write!(ctx, user_ip4, service.addr.v4_raw());
        write!(ctx, user_port, service.port.raw() as u32);
    }
    ALLOW
}

/// [`restore4`] for IPv4-mapped addresses.
#[inline(always)]
pub fn restore6(ctx: Context) -> i32 {
    let peer = v6(ctx);
    if !peer.addr.is_v4() {
        return ALLOW;
    }
    if let Some(service) = asked_for(ctx, peer) {
        write!(ctx, user_ip6[3], service.addr.v4_raw());
        write!(ctx, user_port, service.port.raw() as u32);
    }
    ALLOW
}

struct NoBackend;

/// The backend for a destination; none where it is no service.
#[inline(always)]
fn translate(ctx: Context, to: Destination) -> Result<Option<Destination>, NoBackend> {
    let protocol = read!(ctx, protocol) as u8;
    if protocol != proto::TCP && protocol != proto::UDP {
        return Ok(None);
    }
    let Some(frontend) = frontend(ctx, to, protocol) else { return Ok(None) };
    let (id, backend) = choose(ctx, frontend).ok_or(NoBackend)?;
    let key = socket_key(ctx, backend.addr, backend.port, protocol);
    let backend = Destination { addr: backend.addr, port: backend.port };
    lookup::remember_socket(&key, &SocketValue { addr: to.addr, port: to.port, pad: 0, backend: id });
    Ok(Some(backend))
}

/// The backend that the socket's network namespace is bound to, else any.
#[inline(always)]
fn choose(ctx: Context, frontend: &FrontendValue) -> Option<(BackendId, &'static Backend)> {
    if frontend.flags & frontend_flags::AFFINITY == 0 {
        return lookup::select_random(frontend.internal).map(|chosen| (chosen.id, chosen.backend));
    }
    // SAFETY: the program's context.
    let cookie = unsafe { h::bpf_get_netns_cookie(ctx.cast()) };
    let client = AffinityKey::of_netns(cookie, frontend.service);
    if let Some(bound) = affinity::recall(frontend, frontend.internal, &client) {
        return Some(bound);
    }
    let chosen = lookup::select_random(frontend.internal)?;
    affinity::remember(&client, &chosen);
    Some((chosen.id, chosen.backend))
}

/// The frontend of a destination. The node's loopback addresses lead to NodePorts and host ports, as they do with
/// kube-proxy; those of a pod are the pod's own.
#[inline(always)]
fn frontend(ctx: Context, to: Destination, protocol: u8) -> Option<&'static FrontendValue> {
    if let Some(frontend) = lookup::frontend_exact(to.addr, to.port, protocol) {
        return (frontend.flags & frontend_flags::WILDCARD == 0).then_some(frontend);
    }
    let [first, ..] = to.addr.v4_raw().to_ne_bytes();
    if first != 127 || !on_the_node(ctx) {
        return None;
    }
    let frontend = lookup::frontend_exact(Addr::from_v4_raw(0), to.port, protocol)?;
    let kind = frontend.flags & frontend_flags::KIND;
    (kind == FrontendKind::NodePort as u32 || kind == FrontendKind::HostPort as u32).then_some(frontend)
}

/// Whether the socket is in the node's network namespace.
#[inline(always)]
fn on_the_node(ctx: Context) -> bool {
    // SAFETY: the program's context.
    let socket = unsafe { h::bpf_get_netns_cookie(ctx.cast()) };
    // SAFETY: a constant of the loaded program; volatile, as the compiler knows only the value that it was built with.
    let node = match unsafe { (&raw const NODE_NETNS).read_volatile() } {
        // SAFETY: without a context the helper tells the initial namespace's.
        0 => unsafe { h::bpf_get_netns_cookie(core::ptr::null_mut()) },
        node => node,
    };
    socket == node
}

#[inline(always)]
fn asked_for(ctx: Context, peer: Destination) -> Option<&'static SocketValue> {
    let key = socket_key(ctx, peer.addr, peer.port, read!(ctx, protocol) as u8);
    lookup::socket(&key)
}

#[inline(always)]
fn socket_key(ctx: Context, addr: Addr, port: Be16, protocol: u8) -> SocketKey {
    // SAFETY: the program's context.
    let cookie = unsafe { h::bpf_get_socket_cookie(ctx.cast()) };
    SocketKey { cookie, addr, port, proto: protocol, pad: [0; 5] }
}
