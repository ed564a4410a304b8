//! Connections. Each has an entry per direction, so that client packets and replies take one lookup and one rewrite.
//!
//! There is no collector: the map forgets the oldest, and entries of connections that are over are taken over where
//! their source port is wanted.

use aya_ebpf::bindings::{BPF_ANY, BPF_NOEXIST};
use kinesin_abi::{
    Addr, Backend, BackendId, BackendState, Be16, DropReason, FLOW_FROM_LAN, FLOW_REDIRECT, FLOW_REPLY, FlowKey,
    FlowValue, TCP_SEEN_FIN, TCP_SEEN_FIN_REPLY, TCP_SEEN_REPLY, TCP_SEEN_RST, proto,
};

use crate::{
    lookup,
    maps::FLOWS,
    packet::{Packet, TCP_FIN, TCP_RST, TCP_SYN},
};

const SECOND: u64 = 1_000_000_000;
/// How stale `last_seen` may get: writing it for each packet would move its cache line between CPUs.
const FRESH: u64 = SECOND;
/// After this much silence a connection's source port may be taken over: closed, never answered, or UDP.
const QUIET: u64 = 60 * SECOND;
/// The same for an established TCP connection (the default of `bpf-ct-timeout-service-tcp`).
const ESTABLISHED: u64 = 8000 * SECOND;
/// Source ports tried for a new connection, twice: sparing connections that have just closed, then not.
const ATTEMPTS: u32 = 16;

/// The entry for the packet's tuple, unless it belongs to the past.
#[inline(always)]
pub fn find(packet: &Packet) -> Option<&'static mut FlowValue> {
    let flow = FLOWS.get_ptr_mut(&packet.flow)?;
    // SAFETY: points into the map; other CPUs write only `last_seen` and `tcp` meanwhile, which are advisory.
    let flow = unsafe { &mut *flow };
    // A SYN after the end begins something new in either direction: also the SYN-ACK of a connection that the client has
    // opened to the pod itself, from a port that it once reached it from through us.
    let past = if packet.flow.proto == proto::TCP {
        packet.tcp & TCP_SYN != 0 && closed(flow.tcp)
    } else {
        flow.flags & FLOW_REPLY == 0 && !serves(flow)
    };
    if past { None } else { Some(flow) }
}

/// The entry for packets of this tuple, whatever its state, for an ICMP error about their partners. Errors neither
/// refresh nor end a connection (RFC 5508 section 4.2.3).
#[inline(always)]
pub fn related(key: &FlowKey) -> Option<&'static FlowValue> {
    // SAFETY: points into the map; other CPUs write only `last_seen` and `tcp` meanwhile.
    FLOWS.get_ptr_mut(key).map(|flow| unsafe { &*flow })
}

/// Whether the backend that a connectionless flow was given still exists and takes packets.
#[inline(always)]
fn serves(flow: &FlowValue) -> bool {
    let Some(backend) = lookup::backend(flow.backend) else { return false };
    backend.addr == flow.dst
        && backend.port == flow.dport
        && (backend.state == BackendState::Active as u8 || backend.state == BackendState::Terminating as u8)
}

#[inline(always)]
fn closed(tcp: u8) -> bool {
    const BOTH: u8 = TCP_SEEN_FIN | TCP_SEEN_FIN_REPLY;
    tcp & TCP_SEEN_RST != 0 || tcp & BOTH == BOTH
}

/// The key of the entry of the other direction, from that of this one. (Its padding comes along: three zero bytes would
/// be a call.)
#[inline(always)]
fn partner_key(flow: &FlowValue, key: &FlowKey) -> FlowKey {
    FlowKey { src: flow.dst, dst: flow.src, sport: flow.dport, dport: flow.sport, ..*key }
}

/// The entry of the other direction.
#[inline(always)]
fn partner(key: &FlowKey, flow: &FlowValue) -> FlowValue {
    FlowValue {
        last_seen: flow.last_seen,
        src: key.dst,
        dst: key.src,
        sport: key.dport,
        dport: key.sport,
        flags: flow.flags ^ FLOW_REPLY,
        tcp: flow.tcp,
        pad: [0; 2],
        backend: flow.backend,
        pad2: 0,
    }
}

/// Notes a packet of a known connection: when, and what its TCP flags mean for both entries.
#[inline(always)]
pub fn track(packet: &Packet, flow: &mut FlowValue) {
    let reply = flow.flags & FLOW_REPLY != 0;
    let mut seen = if reply { TCP_SEEN_REPLY } else { 0 };
    if packet.tcp & TCP_FIN != 0 {
        seen |= if reply { TCP_SEEN_FIN_REPLY } else { TCP_SEEN_FIN };
    }
    if packet.tcp & TCP_RST != 0 {
        seen |= TCP_SEEN_RST;
    }
    let now = lookup::now();
    if seen & !flow.tcp != 0 || now.saturating_sub(flow.last_seen) > FRESH {
        note(&packet.flow, flow, seen, now);
    }
}

/// The rare part of [`track`]: also restores the other entry where the map has forgotten it.
#[inline(never)]
fn note(key: &FlowKey, flow: &mut FlowValue, seen: u8, now: u64) {
    flow.last_seen = now;
    flow.tcp |= seen;
    let other = partner_key(flow, key);
    if let Some(found) = FLOWS.get_ptr_mut(&other) {
        // SAFETY: points into the map.
        unsafe { (*found).tcp |= seen };
    } else {
        let value = partner(key, flow);
        let _ = FLOWS.insert(&other, &value, BPF_NOEXIST as u64);
    }
}

/// What a new connection becomes.
pub struct Opening<'a> {
    /// The client's packet.
    pub packet: &'a Packet,
    /// The backend chosen.
    pub backend: &'a Backend,
    pub id: BackendId,
    /// The source address that the backend will see.
    pub source: Addr,
    /// The packets leave by route, not through the host's stack.
    pub redirect: bool,
}

/// Records a connection in both directions; returns the source port that the backend will see.
///
/// The client's own port is kept where possible. Another one is needed where two clients meet behind one source
/// address, or one client reaches one backend through two addresses.
#[inline(always)]
pub fn open(opening: &Opening) -> Result<Be16, DropReason> {
    let client = &opening.packet.flow;
    let (min, span) = lookup::settings()
        .filter(|settings| settings.snat_max >= settings.snat_min && settings.snat_min != 0)
        .map_or((0, 0), |settings| (settings.snat_min as u32, settings.snat_max as u32 - settings.snat_min as u32 + 1));
    let mut forward = FlowValue {
        last_seen: lookup::now(),
        src: opening.source,
        dst: opening.backend.addr,
        sport: client.sport,
        dport: opening.backend.port,
        flags: FLOW_FROM_LAN | if opening.redirect { FLOW_REDIRECT } else { 0 },
        tcp: 0,
        pad: [0; 2],
        backend: opening.id,
        pad2: 0,
    };
    let own = client.sport.get() as u32;
    // Towards a local backend the client's address stays, and with it any port of the client is as good.
    // A port of SCTP cannot be rewritten: it is the client's own, or the connection is refused.
    let fixed = client.proto == proto::SCTP;
    let own_port_fits = fixed || !opening.redirect || (own >= min && own - min < span);
    let range = if fixed { 0 } else { min << 16 | span };
    let own_port = if own_port_fits { OWN_PORT } else { 0 };
    let mut result = allocate(client, &mut forward, range, own_port);
    if result == OCCUPIED {
        result = allocate(client, &mut forward, range, own_port | PRESSED);
    }
    match result {
        TAKEN => {}
        OCCUPIED => return Err(DropReason::NoNatMapping),
        _ => return Err(DropReason::FlowInsertFailed),
    }
    FLOWS.insert(client, &forward, BPF_ANY as u64).map_err(|_| DropReason::FlowInsertFailed)?;
    Ok(forward.sport)
}

// What a try to take a source port comes to. Plain numbers, so that all ways out of a function look the same to the
// verifier.
const OCCUPIED: u32 = 0;
const TAKEN: u32 = 1;
const FAILED: u32 = 2;

/// The client's own port will do.
const OWN_PORT: u32 = 1;
/// There is no other: take over connections that have just closed.
const PRESSED: u32 = 2;

/// Finds a source port whose entry of the backend's direction is free, takes it, and notes it in `forward`. `range` is
/// the first port and, in the lower half, how many there are; `how` is [`OWN_PORT`] and [`PRESSED`].
#[inline(never)]
fn allocate(client: &FlowKey, forward: &mut FlowValue, range: u32, how: u32) -> u32 {
    let reply = partner(client, forward);
    let mut key = partner_key(forward, client);
    let (min, span) = (range >> 16, range & 0xffff);
    for attempt in 0..ATTEMPTS {
        if attempt > 0 || how & OWN_PORT == 0 {
            if span == 0 {
                return OCCUPIED;
            }
            key.dport = Be16::new((min + lookup::random_below(span)) as u16);
        }
        let result = take(&key, &reply, how & PRESSED);
        if result != OCCUPIED {
            forward.sport = key.dport;
            return result;
        }
    }
    OCCUPIED
}

/// `EEXIST`, as helpers return it.
const EXISTS: i32 = -17;

/// Writes the entry of the backend's direction unless a living connection of somebody else has it.
#[inline(never)]
fn take(key: &FlowKey, reply: &FlowValue, pressed: u32) -> u32 {
    match FLOWS.insert(key, reply, BPF_NOEXIST as u64) {
        Ok(()) => return TAKEN,
        Err(EXISTS) => {}
        Err(_) => return FAILED,
    }
    if let Some(holder) = FLOWS.get_ptr_mut(key) {
        // SAFETY: points into the map.
        let holder = unsafe { &*holder };
        if !same_tuple(holder, reply) && !abandoned(holder, key, reply.last_seen, pressed != 0) {
            return OCCUPIED;
        }
    }
    if FLOWS.insert(key, reply, BPF_ANY as u64).is_ok() { TAKEN } else { FAILED }
}

/// Whether two entries lead to the same. Without branches: each would double what the verifier follows, per attempt.
#[inline(always)]
fn same_tuple(a: &FlowValue, b: &FlowValue) -> bool {
    let mut difference = (a.sport.raw() ^ b.sport.raw()) as u32 | (a.dport.raw() ^ b.dport.raw()) as u32;
    for i in 0..4 {
        difference |= a.src.words[i] ^ b.src.words[i];
        difference |= a.dst.words[i] ^ b.dst.words[i];
    }
    difference == 0
}

/// Whether the connection of this reply entry is over, or has been silent for longer than it may.
#[inline(always)]
fn abandoned(reply: &FlowValue, key: &FlowKey, now: u64, pressed: bool) -> bool {
    let over = closed(reply.tcp);
    // A closed connection may still send its last segments; spare it while others may do.
    if over && pressed {
        return true;
    }
    let quiet = if key.proto == proto::TCP && !over && reply.tcp & TCP_SEEN_REPLY != 0 { ESTABLISHED } else { QUIET };
    if now.saturating_sub(reply.last_seen) <= quiet {
        return false;
    }
    // The client may be the only one who talks.
    match FLOWS.get_ptr_mut(&partner_key(reply, key)) {
        // SAFETY: points into the map.
        Some(forward) => now.saturating_sub(unsafe { (*forward).last_seen }) > quiet,
        None => true,
    }
}
