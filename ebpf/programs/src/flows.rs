//! Connections. Each has an entry per direction, so that client packets and replies take one lookup and one rewrite.
//!
//! There are two tables. Established TCP connections are in `FLOWS`, which forgets nothing to make room; everything else
//! is in `TRANSIENT`, which forgets the oldest: so whoever opens connections without end harms those that are not
//! established, and works without an agent. TCP connections begin in the first, where they stay, while those that are not
//! established yet take no more than a share of it ([`has_room`]): to move costs as much again. Beyond that they begin in
//! the second, move when the client goes on after the backend's answer, and stay there while the first is full. The copy left
//! behind goes a second later, when no CPU can be between the two lookups any more.
//!
//! Deliberately absent: looking for entries that have expired, which is the agent's; beginning connections, which is in
//! `opening`.

use aya_ebpf::bindings::BPF_NOEXIST;
use kinesin_abi::{
    BackendState, FLOW_DIRECT, FLOW_HANDED_ON, FLOW_REPLY, FlowCount, FlowKey, FlowValue, SEARCHED_MEMBERS,
    TCP_SEEN_ACK, TCP_SEEN_FIN, TCP_SEEN_FIN_REPLY, TCP_SEEN_REPLY, TCP_SEEN_RST, proto,
};

use crate::{
    affinity, loaded, lookup,
    maps::{COUNTS, FLOW, FLOWS, FLOWS_OLD, SLOTS, TRANSIENT, TRANSIENT_OLD},
    packet::{Packet, TCP_ACK, TCP_FIN, TCP_RST, TCP_SYN},
};

pub const SECOND: u64 = 1_000_000_000;
/// How stale `last_seen` may get: writing it for each packet would move its cache line between CPUs.
const FRESH: u64 = SECOND;

/// A copy of the entry for the packet's tuple, unless it belongs to the past.
#[inline(always)]
pub fn find(packet: &Packet) -> Option<&'static mut FlowValue> {
    let flow = copy_of(&packet.flow)?;
    let past = if packet.flow.proto == proto::TCP {
        // A SYN after the end begins something new in either direction: also the SYN-ACK of a connection that the client
        // has opened to the pod itself, from a port that it once reached it from through us. So does one to a backend
        // that is gone.
        packet.tcp & TCP_SYN != 0 && (flow.is_over() || flow.flags & FLOW_REPLY == 0 && !serves(&packet.flow, flow))
    } else {
        flow.flags & FLOW_REPLY == 0 && member(&packet.flow, flow) == 0
    };
    if past { None } else { Some(flow) }
}

/// Forgets a connection that is over when its backend begins another one between the same two ends that is none of ours: one
/// that the client has opened to the pod itself. Else everything that the pod says in it would get the service's address.
///
/// An entry of a table that is being replaced stays, and with it the fault that this mends, until the table is gone.
#[inline(never)]
pub fn give_way(key: &FlowKey) -> u32 {
    let Some(flow) = copy_of(key) else { return 0 };
    if flow.flags & FLOW_REPLY == 0 || !flow.is_over() {
        return 0;
    }
    let Some(packet) = lookup::scratch() else { return 0 };
    packet.quoted = flow.partner_key(key);
    forget(key);
    forget(&packet.quoted);
    0
}

/// Removes an entry of the table that forgets, and counts it.
#[inline(never)]
pub fn remove_transient(key: &FlowKey) -> u32 {
    if TRANSIENT.remove(key).is_ok() {
        count(FlowCount::Removed);
    }
    0
}

/// Removes an entry from both tables.
#[inline(never)]
pub fn forget(key: &FlowKey) -> u32 {
    let _ = FLOWS.remove(key);
    remove_transient(key)
}

/// The entry for packets of this tuple, whatever its state, for an ICMP error about their partners. Errors neither
/// refresh nor end a connection (RFC 5508 section 4.2.3).
#[inline(always)]
pub fn related(key: &FlowKey) -> Option<&'static FlowValue> {
    copy_of(key).map(|flow| &*flow)
}

/// The entry of a tuple in this CPU's memory. A copy, because of what comes from one of several tables the verifier would
/// follow the rest of the program once for each.
#[inline(always)]
fn copy_of(key: &FlowKey) -> Option<&'static mut FlowValue> {
    // SAFETY: hooks run to their end on one CPU without another hook in between, so nobody else has it.
    let flow = FLOW.get_ptr_mut(0).map(|flow| unsafe { &mut *flow })?;
    if fetch(key, flow) == ABSENT { None } else { Some(flow) }
}

// Where an entry was found. Plain numbers, so that all ways out of a function look the same to the verifier.
pub const ABSENT: u32 = 0;
/// In the table of established connections.
pub const SETTLED: u32 = 1;
const PASSING: u32 = 2;
/// In a table that is being replaced.
pub const MOVING: u32 = 3;

/// Copies the entry of a tuple.
#[inline(never)]
pub fn fetch(key: &FlowKey, into: &mut FlowValue) -> u32 {
    if key.proto == proto::TCP
        && let Some(flow) = FLOWS.get_ptr_mut(key)
    {
        // SAFETY: points into the map; other CPUs write only `last_seen` and `tcp` meanwhile, which are advisory.
        *into = unsafe { *flow };
        return SETTLED;
    }
    if let Some(flow) = TRANSIENT.get_ptr_mut(key) {
        // SAFETY: as above; they also write `slot`, which is a hint.
        *into = unsafe { *flow };
        return PASSING;
    }
    fetch_old(key, into)
}

/// Copies an entry of the tables that are being replaced, if they are. The agent moves it; a packet that changes it
/// writes it to the new table itself.
#[inline(never)]
fn fetch_old(key: &FlowKey, into: &mut FlowValue) -> u32 {
    let found = match FLOWS_OLD.get_value_ptr_mut(0, key) {
        None => TRANSIENT_OLD.get_value_ptr_mut(0, key),
        found => found,
    };
    let Some(flow) = found else { return ABSENT };
    // SAFETY: points into the old map, which lives as long as this program runs; nobody writes but `last_seen` and `tcp`.
    *into = unsafe { *flow };
    // Stale, so that its next packet is noted in the new table.
    into.last_seen = 0;
    MOVING
}

/// Whether the backend that a flow was given still exists and takes packets.
#[inline(always)]
fn serves(key: &FlowKey, flow: &FlowValue) -> bool {
    lookup::backend(flow.backend).is_some_and(|backend| backend.serves(key, flow))
}

/// Whether the service that the client of a connectionless flow talks to still exists, and the backend is still one of
/// its own. One array lookup, but for the first packet after the members around it have changed.
#[inline(never)]
fn member(key: &FlowKey, flow: &mut FlowValue) -> u32 {
    let Some(backend) = lookup::backend(flow.backend) else { return 0 };
    if !backend.serves(key, flow) {
        return 0;
    }
    // Whether it is still a member is looked at where the client's packets come in.
    if flow.flags & FLOW_DIRECT != 0 {
        return 1;
    }
    // Slots that no service has are empty.
    if SLOTS.get(flow.slot) == Some(&flow.backend) {
        return 1;
    }
    let Some(frontend) = lookup::frontend_exact(key.dst, key.dport, key.proto) else { return 0 };
    // It takes no new flows and may be among no members, but keeps those that it has.
    if backend.state == BackendState::Terminating as u8 {
        return 1;
    }
    let (outside, inside) = (frontend.external, frontend.internal);
    // The position goes to memory that the verifier does not look into.
    let base = if affinity::search(outside.base, outside.count, flow.backend, &mut flow.slot) != 0 {
        outside.base
    } else if affinity::search(inside.base, inside.count, flow.backend, &mut flow.slot) != 0 {
        inside.base
    } else {
        // Further behind nobody has looked.
        return (outside.count > SEARCHED_MEMBERS) as u32;
    };
    flow.slot = base.wrapping_add(flow.slot);
    if let Some(entry) = TRANSIENT.get_ptr_mut(key) {
        // SAFETY: points into the map.
        unsafe { (*entry).slot = flow.slot };
    }
    1
}

/// Whether the packet says that the backend has answered, of a connection whose answers do not come by here.
#[inline(always)]
fn seen_elsewhere(packet: &Packet, flow: &FlowValue) -> bool {
    flow.flags & FLOW_HANDED_ON != 0 && packet.tcp & TCP_ACK != 0
}

/// The entry of the other direction.
#[inline(always)]
pub fn partner(key: &FlowKey, flow: &FlowValue) -> FlowValue {
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
        slot: 0,
    }
}

/// Notes a packet of a known connection: when, and what its TCP flags mean for both entries.
#[inline(always)]
pub fn track(packet: &Packet, flow: &mut FlowValue) {
    let (seen, now) = (seen(packet, flow), lookup::now());
    if is_news(flow, seen, now) {
        note(&packet.flow, flow, seen, now);
    }
}

/// Whether [`track`] would write anything.
#[inline(always)]
pub fn has_news(packet: &Packet, flow: &FlowValue) -> bool {
    is_news(flow, seen(packet, flow), lookup::now())
}

#[inline(always)]
fn is_news(flow: &FlowValue, seen: u8, now: u64) -> bool {
    seen & !flow.tcp != 0 || now.saturating_sub(flow.last_seen) > FRESH
}

/// What the TCP flags of a packet mean for both entries of its connection: `TCP_SEEN_*`.
#[inline(always)]
fn seen(packet: &Packet, flow: &FlowValue) -> u8 {
    let reply = flow.flags & FLOW_REPLY != 0;
    let mut seen = if reply { TCP_SEEN_REPLY } else { 0 };
    if packet.tcp & TCP_FIN != 0 {
        seen |= if reply { TCP_SEEN_FIN_REPLY } else { TCP_SEEN_FIN };
    }
    if packet.tcp & TCP_RST != 0 {
        seen |= TCP_SEEN_RST;
    }
    // Who acknowledges what does not come by here has been answered all the same.
    let answered = seen_elsewhere(packet, flow) || flow.tcp & TCP_SEEN_REPLY != 0;
    if !reply && packet.tcp & TCP_SYN == 0 && answered {
        seen |= TCP_SEEN_ACK | TCP_SEEN_REPLY;
    }
    seen
}

/// The rare part of [`track`]: also moves an established connection to where it is safe, and restores the other entry
/// where a table has forgotten it.
#[inline(never)]
fn note(key: &FlowKey, flow: &mut FlowValue, seen: u8, now: u64) {
    flow.last_seen = now;
    flow.tcp |= seen;
    keep(key, flow, 1);
    if flow.flags & FLOW_HANDED_ON != 0 {
        return;
    }
    if flow.flags & FLOW_DIRECT != 0 {
        restore_direct(key, flow);
        return;
    }
    let value = partner(key, flow);
    keep(&flow.translated_key(key), &value, 0);
}

/// The end of [`note`] for a connection that was learned.
#[inline(never)]
fn restore_direct(key: &FlowKey, flow: &FlowValue) -> u32 {
    let Some(packet) = lookup::scratch() else { return 0 };
    packet.quoted = key.reversed();
    let value = direct_partner(flow);
    keep(&packet.quoted, &value, 0)
}

/// The entry of the other direction of a connection that was learned.
#[inline(always)]
pub fn direct_partner(flow: &FlowValue) -> FlowValue {
    FlowValue {
        src: flow.dst,
        dst: flow.src,
        sport: flow.dport,
        dport: flow.sport,
        flags: flow.flags ^ FLOW_REPLY,
        slot: 0,
        ..*flow
    }
}

/// Brings an entry up to date wherever it is, or adds it; its time only where this packet went its way.
#[inline(never)]
fn keep(key: &FlowKey, value: &FlowValue, mine: u32) -> u32 {
    let settled = key.proto == proto::TCP && value.tcp & TCP_SEEN_ACK != 0;
    if key.proto == proto::TCP
        && let Some(entry) = FLOWS.get_ptr_mut(key)
    {
        // SAFETY: points into the map; what two CPUs write at once is advisory.
        let entry = unsafe { &mut *entry };
        if settled && entry.tcp & TCP_SEEN_ACK == 0 {
            count(FlowCount::Settled);
        }
        // What is in there is older than what any CPU is about to look for: see the module's header.
        if value.last_seen.saturating_sub(entry.last_seen) > FRESH && TRANSIENT.remove(key).is_ok() {
            count(FlowCount::Removed);
        }
        refresh(entry, value, mine);
        return 0;
    }
    if settled {
        if FLOWS.insert(key, value, BPF_NOEXIST as u64).is_ok() {
            count(FlowCount::Opened);
            count(FlowCount::Settled);
            return 0;
        }
        count(FlowCount::Unsettled);
    }
    if let Some(entry) = TRANSIENT.get_ptr_mut(key) {
        // SAFETY: as above.
        refresh(unsafe { &mut *entry }, value, mine);
        return 0;
    }
    if TRANSIENT.insert(key, value, BPF_NOEXIST as u64).is_ok() {
        count(FlowCount::Created);
    }
    0
}

/// Brings an entry that is there up to date.
#[inline(always)]
fn refresh(entry: &mut FlowValue, value: &FlowValue, mine: u32) {
    entry.tcp |= value.tcp;
    if mine != 0 {
        entry.last_seen = value.last_seen;
    }
}

/// 1 where a connection may begin in the table of established ones, as far as this CPU knows: packets of a connection mostly
/// stay on one, and the agent evens out what they do not.
#[inline(never)]
pub fn has_room() -> u32 {
    let of = |what: FlowCount| COUNTS.get(what as u32).copied().unwrap_or(0);
    let opening = of(FlowCount::Opened).wrapping_sub(of(FlowCount::Settled)).wrapping_sub(of(FlowCount::WrittenOff));
    ((opening as i64) < loaded::most_opening() as i64) as u32
}

/// Counts what happens to a connection.
#[inline(always)]
pub fn count(what: FlowCount) {
    if let Some(counter) = COUNTS.get_ptr_mut(what as u32) {
        // SAFETY: this CPU's own element.
        unsafe { *counter += 1 };
    }
}
