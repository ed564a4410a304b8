//! Fragments (RFC 791 section 3.2, RFC 8200 section 4.5): only the first one has ports, the others follow it.
//!
//! The first one of a packet that is translated leaves its ports under the identification that all share; those that come
//! later find them there, and with them the connection. Those that overtake their first one are dropped for a reason of
//! their own, as are all where the setting is off. Nothing is put together here: whoever receives the packet does that.
//!
//! Deliberately absent: identifications of the node's own. Fragments of two clients that meet behind the node's address
//! on their way to one backend with one identification are mixed up; their checksum tells, and IPv6 has enough numbers.

use kinesin_abi::{FragmentKey, FragmentValue};

use crate::{family::Family, lookup, maps::FRAGMENTS, packet::Packet};

/// What a packet is, in [`Packet::fragmented`].
pub const FIRST: u8 = 1;
/// Without transport header.
pub const LATER: u8 = 2;

/// How long a receiver waits for fragments (RFC 8200 section 4.5), in nanoseconds; after it, the identification may be
/// another packet's.
const TOGETHER: u64 = 60_000_000_000;

/// Lets the others of a packet follow its first fragment; 0 where it must be dropped.
#[inline(never)]
pub fn lead<F: Family>(packet: &Packet) -> u32 {
    if packet.fragmented != FIRST {
        return 1;
    }
    if !enabled::<F>() {
        return 0;
    }
    let value = FragmentValue {
        at: lookup::now(),
        sport: packet.flow.sport,
        dport: packet.flow.dport,
        proto: packet.flow.proto,
        pad: [0; 3],
    };
    FRAGMENTS.insert(&key::<F>(packet), &value, 0).is_ok() as u32
}

/// Gives a later fragment the ports of its first one; 0 where they are not known.
#[inline(never)]
pub fn follow<F: Family>(packet: &mut Packet) -> u32 {
    let Some(first) = FRAGMENTS.get_ptr_mut(&key::<F>(packet)) else { return 0 };
    // SAFETY: points into the map; a write at the same time is of another packet with the same identification.
    let first = unsafe { &*first };
    if !enabled::<F>() || lookup::now().saturating_sub(first.at) > TOGETHER {
        return 0;
    }
    packet.flow.sport = first.sport;
    packet.flow.dport = first.dport;
    packet.flow.proto = first.proto;
    1
}

/// Whether fragments of this family are followed.
#[inline(always)]
pub fn enabled<F: Family>() -> bool {
    lookup::settings().is_some_and(|settings| settings.flags & F::FOLLOW_FRAGMENTS != 0)
}

/// Later fragments of IPv6 do not say which protocol they are of.
#[inline(always)]
fn key<F: Family>(packet: &Packet) -> FragmentKey {
    let proto = if F::AF == crate::family::V4::AF { packet.flow.proto } else { 0 };
    FragmentKey { src: packet.flow.src, dst: packet.flow.dst, id: packet.fragment, proto, pad: [0; 3] }
}
