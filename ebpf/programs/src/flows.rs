//! Connections. Each has an entry per direction, so that client packets and replies take one lookup and one rewrite.
//!
//! There are two tables. Established TCP connections are in `FLOWS`, which forgets nothing to make room; everything else
//! is in `TRANSIENT`, which forgets the oldest: so whoever opens connections without end harms those that are not
//! established, and works without an agent. A connection moves to the first when its client goes on after the
//! backend's answer, and stays in the second while the first is full. The copy left behind goes a second later, when
//! no CPU can be between the two lookups any more.
//!
//! Deliberately absent: looking for entries that have expired, which is the agent's. Those in the way of a new
//! connection are taken over here.

use aya_ebpf::bindings::{BPF_ANY, BPF_NOEXIST};
use kinesin_abi::{
    Addr, Backend, BackendId, BackendState, Be16, DropReason, FLOW_DIRECT, FLOW_FROM_LAN, FLOW_HANDED_ON,
    FLOW_REDIRECT, FLOW_REPLY, FlowCount, FlowKey, FlowValue, SEARCHED_MEMBERS, Settings, TCP_SEEN_ACK, TCP_SEEN_FIN,
    TCP_SEEN_FIN_REPLY, TCP_SEEN_REPLY, TCP_SEEN_RST, proto, tcp_closed,
};

use crate::{
    affinity,
    family::Family,
    local, lookup,
    maps::{COUNTS, FLOW, FLOWS, FLOWS_OLD, SLOTS, TRANSIENT, TRANSIENT_OLD},
    packet::{Packet, TCP_ACK, TCP_FIN, TCP_RST, TCP_SYN},
    skb::Skb,
};

const SECOND: u64 = 1_000_000_000;
/// How stale `last_seen` may get: writing it for each packet would move its cache line between CPUs.
const FRESH: u64 = SECOND;
/// Random source ports tried for a new connection: such as nobody has, then those of connections that have expired or are
/// over.
const ATTEMPTS: u32 = 16;
const PRESSED_ATTEMPTS: u32 = 8;

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
const ABSENT: u32 = 0;
/// In the table of established connections.
const SETTLED: u32 = 1;
const PASSING: u32 = 2;
/// In a table that is being replaced.
const MOVING: u32 = 3;

/// Copies the entry of a tuple.
#[inline(never)]
fn fetch(key: &FlowKey, into: &mut FlowValue) -> u32 {
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
    packet.quoted = reversed(key);
    let value = direct_partner(flow);
    keep(&packet.quoted, &value, 0)
}

/// The key of the other direction of a connection that was learned.
#[inline(always)]
fn reversed(key: &FlowKey) -> FlowKey {
    FlowKey { src: key.dst, dst: key.src, sport: key.dport, dport: key.sport, ..*key }
}

/// And its entry.
#[inline(always)]
fn direct_partner(flow: &FlowValue) -> FlowValue {
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
        // What is in there is older than what any CPU is about to look for: see the module's header.
        if value.last_seen.saturating_sub(entry.last_seen) > FRESH && TRANSIENT.remove(key).is_ok() {
            count(FlowCount::Removed);
        }
        refresh(entry, value, mine);
        return 0;
    }
    if settled {
        if FLOWS.insert(key, value, BPF_NOEXIST as u64).is_ok() {
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

/// Counts what happens to a connection.
#[inline(always)]
fn count(what: FlowCount) {
    if let Some(counter) = COUNTS.get_ptr_mut(what as u32) {
        // SAFETY: this CPU's own element.
        unsafe { *counter += 1 };
    }
}

/// Records, in the client's direction alone, that a connection goes on to the backend's node as it is, or (with
/// [`FLOW_REDIRECT`] in `how`) to the backend.
#[inline(always)]
pub fn hand_on(client: &FlowKey, backend: &Backend, id: BackendId, how: u8) -> Result<(), DropReason> {
    let flow = FlowValue {
        last_seen: lookup::now(),
        src: client.src,
        dst: backend.addr,
        sport: client.sport,
        dport: backend.port,
        flags: FLOW_FROM_LAN | FLOW_HANDED_ON | how,
        tcp: 0,
        pad: [0; 2],
        backend: id,
        // Not a place among members: that is looked for where the backend must still be one.
        slot: if client.proto == proto::TCP { backend.node() } else { 0 },
    };
    if write(client, &flow, 1) == TAKEN { Ok(()) } else { Err(DropReason::FlowInsertFailed) }
}

/// Records in both directions a connection whose packets another node addresses to the backend, and the service's end,
/// which it says. Of a client that reaches one backend from one port through two addresses, the newer connection is
/// answered.
#[inline(never)]
pub fn learn(client: &FlowKey, addr: &Addr, port: u32, id: BackendId) -> u32 {
    let flow = FlowValue {
        last_seen: lookup::now(),
        src: client.src,
        dst: *addr,
        sport: client.sport,
        dport: Be16::from_raw(port as u16),
        flags: FLOW_FROM_LAN | FLOW_DIRECT,
        tcp: 0,
        pad: [0; 2],
        backend: id,
        slot: 0,
    };
    if write(client, &flow, 1) != TAKEN {
        return 0;
    }
    write_partner(client, &flow)
}

/// Writes the entry of the other direction of a new connection, whoever has it; 0 where that failed.
#[inline(never)]
fn write_partner(key: &FlowKey, flow: &FlowValue) -> u32 {
    let value = direct_partner(flow);
    // Where there is room: see `Packet::quoted`.
    let Some(packet) = lookup::scratch() else { return 0 };
    packet.quoted = reversed(key);
    (write(&packet.quoted, &value, 1) == TAKEN) as u32
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
pub fn open<F: Family>(skb: Skb, opening: &Opening) -> Result<Be16, DropReason> {
    let client = &opening.packet.flow;
    let (min, span) = lookup::settings().map_or((0, 0), Settings::snat_ports);
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
        slot: 0,
    };
    let own = client.sport.get() as u32;
    // Towards a local backend the client's address stays, and with it any port of the client is as good.
    // A port of SCTP cannot be rewritten: it is the client's own, or the connection is refused.
    let fixed = client.proto == proto::SCTP;
    let own_port_fits = fixed || !opening.redirect || (own >= min && own - min < span);
    let range = if fixed { 0 } else { min << 16 | span };
    let result = allocate::<F>(skb, client, &mut forward, range, own_port_fits as u32);
    match result {
        TAKEN => {}
        OCCUPIED => return Err(DropReason::NoNatMapping),
        _ => return Err(DropReason::FlowInsertFailed),
    }
    if write(client, &forward, 1) != TAKEN {
        return Err(DropReason::FlowInsertFailed);
    }
    Ok(forward.sport)
}

// What a try to take a source port comes to.
const OCCUPIED: u32 = 0;
const TAKEN: u32 = 1;
const FAILED: u32 = 2;
/// Added to where an entry was found: connections that are over make way.
const PRESSED: u32 = 4;

/// Finds a source port whose entry of the backend's direction is free, takes it, and notes it in `forward`. `range` is
/// the first port and, in the lower half, how many there are.
///
/// A port whose replies a socket of the node itself waits for is not free: they would go to the client.
///
/// First the client's own port, then the first of some random ones that nobody has, and only when those are hard to find
/// random ones of connections that are over or have expired: looking at holders is what the verifier takes longest for.
#[inline(never)]
fn allocate<F: Family>(skb: Skb, client: &FlowKey, forward: &mut FlowValue, range: u32, own_port_fits: u32) -> u32 {
    let reply = partner(client, forward);
    let mut key = forward.translated_key(client);
    let (min, span) = (range >> 16, range & 0xffff);
    let mut result = OCCUPIED;
    // Towards a local backend the address is the client's, so that no socket of the node has it.
    if own_port_fits != 0 && (forward.flags & FLOW_REDIRECT == 0 || local::has_socket::<F>(skb, &key) == 0) {
        result = take(&key, &reply, (span == 0) as u32);
    }
    let mut attempt = 0;
    while result == OCCUPIED && attempt < ATTEMPTS && span != 0 {
        key.dport = Be16::new((min + lookup::random_below(span)) as u16);
        if is_held(&key) == 0 {
            result = claim::<F>(skb, &key, &reply);
            break;
        }
        attempt += 1;
    }
    attempt = 0;
    while result == OCCUPIED && attempt < PRESSED_ATTEMPTS && span != 0 {
        key.dport = Be16::new((min + lookup::random_below(span)) as u16);
        result = take(&key, &reply, 1);
        attempt += 1;
    }
    // Once, and afterwards: who is as unlucky as this tries again.
    if attempt != 0 && result == TAKEN && local::has_socket::<F>(skb, &key) != 0 {
        result = give_back(&key);
    }
    forward.sport = key.dport;
    result
}

/// Removes an entry that was just written.
#[inline(never)]
fn give_back(key: &FlowKey) -> u32 {
    if TRANSIENT.remove(key).is_ok() {
        count(FlowCount::Removed);
    }
    OCCUPIED
}

/// `EEXIST`, as helpers return it.
const EXISTS: i32 = -17;

/// Whether any table holds the tuple.
#[inline(never)]
fn is_held(key: &FlowKey) -> u32 {
    let established = key.proto == proto::TCP && FLOWS.get_ptr_mut(key).is_some();
    (established || TRANSIENT.get_ptr_mut(key).is_some() || old_has(key) != 0) as u32
}

/// Writes the entry of the backend's direction, which nobody had a moment ago. Who is unlucky here goes on among those who
/// are pressed.
#[inline(never)]
fn claim<F: Family>(skb: Skb, key: &FlowKey, reply: &FlowValue) -> u32 {
    if local::has_socket::<F>(skb, key) != 0 { OCCUPIED } else { write(key, reply, 0) }
}

/// Writes the entry of the backend's direction unless a living connection of somebody else has it.
#[inline(never)]
fn take(key: &FlowKey, reply: &FlowValue, pressed: u32) -> u32 {
    // SAFETY: the entry of the packet at hand, which this memory is for, has not been found.
    let Some(holder) = FLOW.get_ptr_mut(0).map(|flow| unsafe { &mut *flow }) else { return FAILED };
    let place = fetch(key, holder);
    if place != ABSENT && yields(holder, key, reply, place | (pressed * PRESSED)) == 0 {
        return OCCUPIED;
    }
    write(key, reply, place)
}

/// Whether the tables that are being replaced hold the tuple: it is taken, whatever its state.
#[inline(never)]
fn old_has(key: &FlowKey) -> u32 {
    (FLOWS_OLD.get_value_ptr_mut(0, key).is_some() || TRANSIENT_OLD.get_value_ptr_mut(0, key).is_some()) as u32
}

/// Writes the entry of a new connection; `over` is not 0 where one of the past may be under its tuple.
#[inline(never)]
fn write(key: &FlowKey, value: &FlowValue, over: u32) -> u32 {
    match TRANSIENT.insert(key, value, BPF_NOEXIST as u64) {
        Ok(()) => count(FlowCount::Created),
        // Somebody was quicker.
        Err(EXISTS) if over == 0 => return OCCUPIED,
        Err(EXISTS) => {
            if TRANSIENT.insert(key, value, BPF_ANY as u64).is_err() {
                return FAILED;
            }
        }
        Err(_) => return FAILED,
    }
    // Where it would be found first.
    if over != 0 && key.proto == proto::TCP {
        let _ = FLOWS.remove(key);
    }
    TAKEN
}

/// Whether a reply entry makes way for a new one: it leads to the same, its connection is over, or has been silent for
/// longer than it may.
#[inline(never)]
fn yields(holder: &FlowValue, key: &FlowKey, reply: &FlowValue, how: u32) -> u32 {
    let place = how & !PRESSED;
    if same_tuple(holder, reply) {
        return 1;
    }
    // A closed connection may still send its last segments; spare it while others may do. One that is being moved has
    // its partner elsewhere.
    if place == MOVING || how & PRESSED != 0 && tcp_closed(holder.tcp) {
        return (place != MOVING) as u32;
    }
    // Few arguments, and what is long is read and written where it is: nothing is deeper, and the stack is short.
    let (Some(settings), Some(packet)) = (lookup::settings(), lookup::scratch()) else { return 0 };
    let quiet = settings.timeouts.of(key.proto, holder.flags, holder.tcp, place == SETTLED) as u64 * SECOND;
    if reply.last_seen.saturating_sub(holder.last_seen) <= quiet {
        return 0;
    }
    // The client may be the only one who talks.
    // One that was learned has its partner elsewhere, which is taken for silent.
    holder.write_translated_key(key, &mut packet.quoted);
    (lookup::now().saturating_sub(last_seen(&packet.quoted)) > quiet) as u32
}

/// When an entry was last used; 0 where there is none.
#[inline(always)]
fn last_seen(key: &FlowKey) -> u64 {
    if key.proto == proto::TCP
        && let Some(flow) = FLOWS.get_ptr_mut(key)
    {
        // SAFETY: points into the map.
        return unsafe { (*flow).last_seen };
    }
    // SAFETY: points into the map.
    TRANSIENT.get_ptr_mut(key).map_or(0, |flow| unsafe { (*flow).last_seen })
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
