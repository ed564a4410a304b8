//! Service addresses for sockets of this node and its pods: translated once, at `connect(2)`, instead of per packet.
//!
//! IPv6 sockets may talk to either family, to IPv4 by mapped addresses. Wildcard entries do not concern sockets.
//! Deliberately absent: Maglev, which serves connections that move between nodes.

use aya_ebpf::{bindings::bpf_sock_addr, helpers::generated as h};
use kinesin_abi::{
    Addr, AffinityKey, Backend, BackendId, Be16, FrontendKind, FrontendValue, PeerKey, SocketKey, SocketValue,
    frontend_flags, proto,
};

use crate::{affinity, loaded, lookup};

/// The system call goes on.
pub const ALLOW: i32 = 1;
/// The system call fails with EPERM.
pub const DENY: i32 = 0;

type Context = *mut bpf_sock_addr;

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
pub(crate) use read;

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

/// Translates an IPv6 or IPv4-mapped destination.
#[inline(always)]
pub fn connect6(ctx: Context) -> i32 {
    match translate(ctx, v6(ctx)) {
        Ok(None) => ALLOW,
        Ok(Some(to)) => {
            write6(ctx, &to);
            ALLOW
        }
        Err(NoBackend) => DENY,
    }
}

#[inline(always)]
fn write6(ctx: Context, to: &Destination) {
    let [a, b, c, d] = to.addr.words;
    write!(ctx, user_ip6[0], a);
    write!(ctx, user_ip6[1], b);
    write!(ctx, user_ip6[2], c);
    write!(ctx, user_ip6[3], d);
    write!(ctx, user_port, to.port.raw() as u32);
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

/// [`restore4`] for IPv6 sockets.
#[inline(always)]
pub fn restore6(ctx: Context) -> i32 {
    if let Some(service) = asked_for(ctx, v6(ctx)) {
        write6(ctx, &Destination { addr: service.addr, port: service.port });
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
/// kube-proxy; those of a pod are the pod's own. NodePorts of other nodes are served here.
#[inline(always)]
fn frontend(ctx: Context, to: Destination, protocol: u8) -> Option<&'static FrontendValue> {
    if let Some(frontend) = lookup::frontend_exact(to.addr, to.port, protocol) {
        return (frontend.flags & frontend_flags::WILDCARD == 0).then_some(frontend);
    }
    let Some(every) = any_address(&to.addr) else { return node_port_elsewhere(&to, protocol) };
    if !on_the_node(ctx.cast()) {
        return None;
    }
    let frontend = lookup::frontend_exact(every, to.port, protocol)?;
    let kind = frontend.flags & frontend_flags::KIND;
    (kind == FrontendKind::NodePort as u32 || kind == FrontendKind::HostPort as u32).then_some(frontend)
}

/// What another node serves at a NodePort, which is what this one does: without the way there, and with the client's own
/// address. Not where only the pods of that node may answer (`externalTrafficPolicy: Local`).
#[inline(always)]
fn node_port_elsewhere(to: &Destination, protocol: u8) -> Option<&'static FrontendValue> {
    if !lookup::is_node_port(to.port) {
        return None;
    }
    let peer = lookup::peer(&PeerKey::of_addr(&to.addr)).filter(|peer| peer.is_at(&to.addr));
    let frontend = peer.and_then(|_| lookup::frontend_exact(to.addr.every(), to.port, protocol))?;
    let is_node_port = frontend.flags & frontend_flags::KIND == FrontendKind::NodePort as u32;
    (is_node_port && frontend.flags & frontend_flags::EXTERNAL_LOCAL == 0).then_some(frontend)
}

/// Whether the socket of a cgroup program's context is in the node's network namespace.
#[inline(always)]
pub fn on_the_node(ctx: *mut core::ffi::c_void) -> bool {
    // SAFETY: the program's context.
    let socket = unsafe { h::bpf_get_netns_cookie(ctx) };
    let node = match loaded::node_netns() {
        // SAFETY: without a context the helper tells the initial namespace's.
        0 => unsafe { h::bpf_get_netns_cookie(core::ptr::null_mut()) },
        node => node,
    };
    socket == node
}

/// What stands for every address of the node, of the family of a loopback address.
#[inline(always)]
pub fn any_address(addr: &Addr) -> Option<Addr> {
    const LOOPBACK: Addr = Addr { words: [0, 0, 0, 1u32.to_be()] };
    if addr.is_v4() {
        let [first, ..] = addr.v4_raw().to_ne_bytes();
        return (first == 127).then_some(Addr::from_v4_raw(0));
    }
    (*addr == LOOPBACK).then_some(Addr::UNSPECIFIED)
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
