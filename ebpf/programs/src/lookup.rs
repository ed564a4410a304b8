//! Services, settings, devices and counters. With `flows` the only code that touches maps.

use aya_ebpf::{bindings::bpf_fib_lookup, btf_maps::lpm_trie::Key, helpers::generated as h};
use kinesin_abi::{
    Addr, BACKEND_LOCAL, Backend, BackendId, BackendState, Be16, DeviceValue, Direction, DropReason, FlowKey,
    FrontendKey, FrontendValue, L2Key, PeerKey, PeerValue, SEARCHED_MEMBERS, SELECTION_TRIES, SLOT_EMPTY,
    SOURCE_RANGE_ALL_BITS, SOURCE_RANGE_DENY, SOURCE_RANGE_IPV6, SetRef, Settings, SocketKey, SocketValue, SourceRange,
    drop_slot, frontend_flags, maglev_hash, maglev_index, proto,
};

use crate::family::{Family, V4};
use crate::loaded;
use crate::maps::{
    BACKENDS, COMPLAINTS, DEVICES, DROPS, FRONTENDS, L2, MAGLEV, PACKET, PEERS, RANGES, ROUTE, SETTINGS, SLOTS,
    SOCKETS, WAYS,
};
use crate::packet::Packet;
use crate::ways::Way;

/// Memory of this CPU for the packet at hand.
#[inline(always)]
pub fn scratch() -> Option<&'static mut Packet> {
    // SAFETY: hooks run to their end on one CPU without another hook in between, so nobody else has it.
    PACKET.get_ptr_mut(0).map(|packet| unsafe { &mut *packet })
}

/// Memory of this CPU for the route that is being looked for. It holds the last answer; ports are never in it.
#[inline(always)]
pub fn route_query() -> Option<&'static mut bpf_fib_lookup> {
    // SAFETY: as above.
    ROUTE.get_ptr_mut(0).map(|query| unsafe { &mut *query })
}

/// Memory of this CPU for a way past the host's stack.
#[inline(always)]
pub fn way(index: u32) -> Option<&'static mut Way> {
    // SAFETY: as above.
    WAYS.get_ptr_mut(index).map(|way| unsafe { &mut *way })
}

/// The frontend at exactly this address, port and protocol.
#[inline(always)]
pub fn frontend_exact(addr: Addr, port: Be16, protocol: u8) -> Option<&'static FrontendValue> {
    let key = FrontendKey { addr, port, proto: protocol, pad: 0 };
    // SAFETY: read-only use before anything else writes to this map in the program.
    unsafe { FRONTENDS.get(&key) }
}

/// Whether a port is of those that NodePorts come from.
#[inline(always)]
pub fn is_node_port(port: Be16) -> bool {
    let port = port.get();
    settings().is_some_and(|settings| port >= settings.node_port_min && port <= settings.node_port_max)
}

/// The NodePort that all addresses of this node have at this port and protocol.
#[inline(always)]
pub fn node_port<F: Family>(port: Be16, protocol: u8) -> Option<&'static FrontendValue> {
    let any = if F::AF == V4::AF { Addr::from_v4_raw(0) } else { Addr::UNSPECIFIED };
    frontend_exact(any, port, protocol)
}

/// Whether all ports of the address are ours, so that what no service wants is dropped here.
#[inline(always)]
pub fn claimed(addr: Addr) -> bool {
    frontend_exact(addr, Be16::new(0), proto::ANY).is_some()
}

/// The frontend of a packet: exact, else an error if the address is ours alone, else none.
#[inline(always)]
pub fn frontend(flow: &FlowKey) -> Result<Option<&'static FrontendValue>, DropReason> {
    match frontend_exact(flow.dst, flow.dport, flow.proto) {
        None if claimed(flow.dst) => Err(DropReason::NoBackend),
        found => Ok(found),
    }
}

/// 1 where a client outside is one that the service serves. A sentence of its own, so that services without ranges do
/// not carry its key.
#[inline(never)]
pub fn serves_client(frontend: &FrontendValue, client: &Addr) -> u32 {
    let deny = frontend.flags & frontend_flags::SOURCE_RANGES_DENY != 0;
    let mut list = if deny { SOURCE_RANGE_DENY } else { 0 };
    if !client.is_v4() {
        list |= SOURCE_RANGE_IPV6;
    }
    let range = SourceRange { service: frontend.service, list, addr: *client };
    (RANGES.get(&Key::new(SOURCE_RANGE_ALL_BITS, range)).is_some() != deny) as u32
}

/// A backend by id, unless the id is free.
#[inline(always)]
pub fn backend(id: BackendId) -> Option<&'static Backend> {
    if id == SLOT_EMPTY {
        return None;
    }
    BACKENDS.get(id).filter(|backend| backend.state != BackendState::Free as u8)
}

/// A member of a set.
#[derive(Clone, Copy)]
pub struct Chosen {
    pub id: BackendId,
    pub backend: &'static Backend,
    /// Where in the set it is, as far as is known.
    pub position: u32,
}

/// Chooses from a set at random.
#[inline(always)]
pub fn select_random(set: SetRef) -> Option<Chosen> {
    // An empty set has no slots of its own: its base is another set's.
    if set.count == 0 {
        return None;
    }
    let mut position = random_below(set.count);
    for attempt in 0..SELECTION_TRIES {
        if let Some(chosen) = member(set, position) {
            return Some(chosen);
        }
        // Met a set in the middle of a rewrite: walk from its start.
        position = attempt;
        if position >= set.count {
            break;
        }
    }
    None
}

/// Chooses from a set for a packet, by Maglev where the service says so and its table is there.
#[inline(always)]
pub fn select(frontend: &FrontendValue, flow: &FlowKey) -> Option<Chosen> {
    let set = frontend.external;
    if frontend.flags & frontend_flags::MAGLEV != 0 && set.count != 0 {
        let seed = settings().map_or(0, |settings| settings.maglev_seed);
        // SAFETY: the table is an array, whose element stays in place.
        if let Some(table) = unsafe { MAGLEV.get_value(&set.base, &0) } {
            // With affinity all connections of a client go to one backend, also through a node that does not know the
            // client yet.
            let sport = if frontend.flags & frontend_flags::AFFINITY != 0 { Be16::new(0) } else { flow.sport };
            let hash = maglev_hash(&flow.src, sport, flow.dport, flow.proto, seed);
            let index = maglev_index(hash, loaded::maglev_size());
            // SAFETY: the index is below the table's size, and the padding lets the verifier see it.
            let id = unsafe { *table.ids.as_ptr().add(index as usize) };
            if let Some(backend) = backend(id) {
                return Some(Chosen { id, backend, position: 0 });
            }
        }
    }
    select_random(set)
}

/// A number below `limit`, or 0.
#[inline(always)]
pub fn random_below(limit: u32) -> u32 {
    // SAFETY: no arguments.
    let random = unsafe { h::bpf_get_prandom_u32() };
    ((random as u64 * limit as u64) >> 32) as u32
}

#[inline(always)]
pub fn settings() -> Option<&'static Settings> {
    SETTINGS.get(0)
}

#[inline(always)]
pub fn device(ifindex: u32) -> Option<&'static DeviceValue> {
    // SAFETY: read-only use.
    unsafe { DEVICES.get(&ifindex) }
}

/// A node on a segment of ours.
#[inline(always)]
pub fn peer(key: &PeerKey) -> Option<&'static PeerValue> {
    // SAFETY: read-only use.
    unsafe { PEERS.get(key) }
}

/// The member of a set at a position, unless its slot is being rewritten.
#[inline(always)]
pub fn member(set: SetRef, position: u32) -> Option<Chosen> {
    let &id = SLOTS.get(set.base.wrapping_add(position))?;
    backend(id).map(|backend| Chosen { id, backend, position })
}

/// Finds the backend of this node that the packet at hand is addressed to among the members of a set; 1 where there is one,
/// with its id in `Packet::member`.
///
/// Written for the verifier, as `affinity::search`; and each step without branches but for its end.
#[inline(never)]
pub fn local_member(base: u32, count: u32) -> u32 {
    let Some(packet) = scratch() else { return 0 };
    let (addr, port) = (packet.flow.dst, packet.flow.dport.raw());
    for position in 0..SEARCHED_MEMBERS {
        let Some(&id) = SLOTS.get(base.wrapping_add(position)) else { return 0 };
        let Some(backend) = BACKENDS.get(id) else { return 0 };
        let mut difference = (backend.port.raw() ^ port) as u32 | !backend.flags & BACKEND_LOCAL;
        for i in 0..4 {
            difference |= backend.addr.words[i] ^ addr.words[i];
        }
        if difference == 0 {
            packet.member = id;
            // Behind the set lies another one.
            return (position < count) as u32;
        }
    }
    0
}

/// The source address for connections that leave by one device and came in by another.
#[inline(always)]
pub fn source_address<F: Family>(egress: u32, ingress: u32) -> Option<Addr> {
    let of = |ifindex| device(ifindex).and_then(F::of_device);
    of(egress).or_else(|| of(ingress))
}

/// CLOCK_MONOTONIC in nanoseconds, as of the last tick: no interval that is looked at is as short as two, and reading the
/// counter took a tenth of what a known packet costs. For kernels without it the loader writes the other helper instead.
#[inline(always)]
pub fn now() -> u64 {
    // SAFETY: no arguments.
    unsafe { h::bpf_ktime_get_coarse_ns() }
}

/// Whether the agent lives.
#[inline(always)]
pub fn agent_alive() -> bool {
    settings().is_some_and(|settings| settings.is_alive(now()))
}

/// Whether packets to pods of this node and their answers pass the host's stack by.
#[inline(always)]
pub fn goes_straight() -> bool {
    settings().is_some_and(|settings| settings.goes_straight(now()))
}

/// Whether the address is the device's own.
#[inline(always)]
pub fn is_own<F: Family>(addr: &Addr, ifindex: u32) -> bool {
    device(ifindex).and_then(F::of_device).is_some_and(|own| F::same(&own, addr))
}

/// Whether this node answers for the address on this device; counts the answer.
#[inline(always)]
pub fn answer_for(addr: Addr, ifindex: u32) -> bool {
    let Some(value) = L2.get_ptr_mut(&L2Key { addr, ifindex }) else { return false };
    // SAFETY: points into the map; answers of two CPUs at once may count as one.
    unsafe { (*value).responses_sent += 1 };
    true
}

/// Counts a packet; `reason` 0 is forwarded.
#[inline(always)]
pub fn count(reason: u8, direction: Direction, bytes: u32) {
    if let Some(counter) = DROPS.get_ptr_mut(drop_slot(reason, direction)) {
        // SAFETY: this CPU's own element.
        unsafe {
            (*counter).packets += 1;
            (*counter).bytes += bytes as u64;
        }
    }
}

/// Remembers what the application asked for; best effort, as the map forgets the oldest.
#[inline(always)]
pub fn remember_socket(key: &SocketKey, value: &SocketValue) {
    let _ = SOCKETS.insert(key, value, 0);
}

/// What the application asked for when its socket talks to this backend.
#[inline(always)]
pub fn socket(key: &SocketKey) -> Option<&'static SocketValue> {
    // SAFETY: read-only use before anything else writes to this map in the program.
    unsafe { SOCKETS.get(key) }
}

/// Whether this node announces the address on this device.
#[inline(always)]
pub fn announced(addr: Addr, ifindex: u32) -> bool {
    L2.get_ptr_mut(&L2Key { addr, ifindex }).is_some()
}

/// Time between two ICMP errors of one CPU in the long run, and how many may come at once: the kernel's own limits
/// (`icmp_msgs_per_sec`, `icmp_msgs_burst`), which its redirects bypass. In nanoseconds.
const COMPLAINT: u64 = 1_000_000;
const COMPLAINTS_AT_ONCE: u64 = 50;

/// Whether one more ICMP error may be sent (RFC 1812 section 4.3.2.8); spends it.
#[inline(always)]
pub fn may_complain() -> bool {
    let Some(spent) = COMPLAINTS.get_ptr_mut(0) else { return false };
    let now = now();
    // SAFETY: this CPU's own element.
    let until = unsafe { *spent };
    let until = if until > now { until } else { now };
    if until - now > COMPLAINT * (COMPLAINTS_AT_ONCE - 1) {
        return false;
    }
    // SAFETY: as above.
    unsafe { *spent = until + COMPLAINT };
    true
}
