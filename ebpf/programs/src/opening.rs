//! New connections: their entries, and the source ports that backends see.
//!
//! Deliberately absent: looking for entries that have expired, but for those in the way, which are taken over.

use aya_ebpf::bindings::{BPF_ANY, BPF_NOEXIST};
use kinesin_abi::{
    Addr, Backend, BackendId, Be16, DropReason, FLOW_DIRECT, FLOW_FROM_LAN, FLOW_HANDED_ON, FLOW_REDIRECT, FlowCount,
    FlowKey, FlowValue, Settings, proto, tcp_closed,
};

use crate::{
    family::Family,
    flows::{ABSENT, MOVING, SECOND, count, direct_partner, fetch, forget, has_room, partner},
    local, lookup,
    maps::{FLOW, FLOWS, FLOWS_OLD, TRANSIENT, TRANSIENT_OLD},
    packet::Packet,
    skb::Skb,
};

/// Random source ports tried for a new connection: such as nobody has, then those of connections that have expired or are
/// over.
const ATTEMPTS: u32 = 16;
const PRESSED_ATTEMPTS: u32 = 8;

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
    packet.quoted = key.reversed();
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
/// The client's own port is kept where possible, and its usual one ([`Settings::usual_snat_port`]) given where that is out
/// of the range. Another one is needed where two clients meet behind one source address, or one client reaches one backend
/// through two addresses.
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
    if !fixed && opening.redirect && (own < min || own - min >= span) {
        if span == 0 {
            return Err(DropReason::NoNatMapping);
        }
        forward.sport = Be16::new(usual_port(client) as u16);
    }
    let range = if fixed { 0 } else { min << 16 | span };
    let result = allocate::<F>(skb, client, &mut forward, range);
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
/// First the one that `forward` has, be it that a connection of the same client has it that is over; then the first that
/// nobody has of the client's usual one and some random ones, and only when those are hard to find random ones of connections
/// that are over or have expired: looking at holders is what the verifier takes longest for.
#[inline(never)]
fn allocate<F: Family>(skb: Skb, client: &FlowKey, forward: &mut FlowValue, range: u32) -> u32 {
    let reply = partner(client, forward);
    let mut key = forward.translated_key(client);
    let (min, span) = (range >> 16, range & 0xffff);
    let mut result = OCCUPIED;
    // Towards a local backend the address is the client's, so that no socket of the node has it.
    if forward.flags & FLOW_REDIRECT == 0 || local::has_socket::<F>(skb, &key) == 0 {
        result = take(&key, &reply, (span == 0) as u32);
    }
    let mut attempt = 0;
    while result == OCCUPIED && attempt < ATTEMPTS && span != 0 {
        let port = if attempt == 0 { usual_port(client) } else { min + lookup::random_below(span) };
        key.dport = Be16::new(port as u16);
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
        forget(&key);
        result = OCCUPIED;
    }
    forward.sport = key.dport;
    result
}

/// See [`Settings::usual_snat_port`]. On its own for what it needs of the stack, of which its caller has none left.
#[inline(never)]
fn usual_port(client: &FlowKey) -> u32 {
    lookup::settings().map_or(0, |settings| settings.usual_snat_port(&client.src, client.sport))
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
    if key.proto == proto::TCP && has_room() != 0 {
        let how = if over == 0 { BPF_NOEXIST } else { BPF_ANY };
        match FLOWS.insert(key, value, how as u64) {
            // What the other table may have is found by nobody any more, and goes later.
            Ok(()) => {
                count(FlowCount::Opened);
                return TAKEN;
            }
            // Somebody was quicker.
            Err(EXISTS) => return OCCUPIED,
            // It is full.
            Err(_) => {}
        }
    }
    match TRANSIENT.insert(key, value, BPF_NOEXIST as u64) {
        Ok(()) => count(FlowCount::Created),
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
    let quiet = settings.timeouts.of(key.proto, holder.flags, holder.tcp) as u64 * SECOND;
    if reply.last_seen.saturating_sub(holder.last_seen) <= quiet {
        return 0;
    }
    // The client may be the only one who talks. One that was learned has its partner elsewhere, which is taken for silent.
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
