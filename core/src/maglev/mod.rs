//! Maglev tables (Eisenbud et al., NSDI 2016, section 3.4): which backend takes which hash.
//!
//! Every node must fill the same table from the same backends, byte for byte and in every version, so that an address
//! that moves to another node keeps its connections on their backends. Hence ids, which are a node's own, are never
//! hashed: the key of a backend is its address.

mod murmur3;
#[cfg(test)]
mod tests;

use std::net::IpAddr;

use kinesin_abi::{BackendId, SLOT_EMPTY, proto};

/// What all nodes of a cluster hash with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HashSeed {
    /// Of the backends' keys.
    pub murmur: u32,
    /// Of IPv4 packets.
    pub jhash_v4: u32,
    /// Of IPv6 packets.
    pub jhash_v6: u32,
}

impl HashSeed {
    /// Three big-endian words: keys, IPv4 packets, IPv6 packets.
    pub const fn from_bytes(b: [u8; 12]) -> Self {
        Self {
            murmur: u32::from_be_bytes([b[0], b[1], b[2], b[3]]),
            jhash_v4: u32::from_be_bytes([b[4], b[5], b[6], b[7]]),
            jhash_v6: u32::from_be_bytes([b[8], b[9], b[10], b[11]]),
        }
    }
}

impl Default for HashSeed {
    /// `JLfvgnHc2kaSUFaI` in base64.
    fn default() -> Self {
        Self::from_bytes([0x24, 0xb7, 0xef, 0x82, 0x71, 0xdc, 0xda, 0x46, 0x92, 0x50, 0x56, 0x88])
    }
}

/// What is hashed of a backend, the same on every node: `[10.42.0.5:8080/TCP,State:active]`.
///
/// The state is part of the text but always this one: a table holds only backends that take new connections.
pub fn backend_key(addr: IpAddr, port: u16, protocol: u8) -> String {
    let name = match protocol {
        proto::TCP => "TCP",
        proto::UDP => "UDP",
        proto::SCTP => "SCTP",
        _ => return format!("[{}/{protocol},State:active]", std::net::SocketAddr::new(addr, port)),
    };
    format!("[{}/{name},State:active]", std::net::SocketAddr::new(addr, port))
}

/// One backend while the table is filled.
struct Turn {
    id: BackendId,
    weight: u64,
    /// The place that it prefers most among those not asked for yet.
    at: u64,
    skip: u64,
    asked: u64,
}

/// Fills a table of `m` places, `m` a prime, from `(key, id, weight)`. The order of the backends does not matter.
///
/// In each round every backend takes the next free place of its own permutation; one with half the greatest weight
/// takes a turn in every second round. Weight 0 takes none, unless all have it. Empty without backends.
pub fn table(backends: &[(String, BackendId, u32)], m: u32, seed: &HashSeed) -> Vec<BackendId> {
    let mut sorted: Vec<_> = backends.iter().collect();
    sorted.sort();
    let greatest = sorted.iter().map(|(_, _, weight)| u64::from(*weight)).max().unwrap_or(0);
    let places = u64::from(m);
    let mut turns: Vec<Turn> = sorted
        .iter()
        .filter(|(_, _, weight)| *weight > 0 || greatest == 0)
        .map(|(key, id, weight)| {
            let (h1, h2) = murmur3::hash(key.as_bytes(), seed.murmur);
            let skip = h2 % places.saturating_sub(1).max(1) + 1;
            Turn { id: *id, weight: u64::from(*weight).max(1), at: h1 % places.max(1), skip, asked: 0 }
        })
        .collect();
    if turns.is_empty() {
        return Vec::new();
    }
    let greatest = greatest.max(1);
    let mut table = vec![SLOT_EMPTY; m as usize];
    let mut taken = vec![false; m as usize];
    let mut left = m;
    let mut round = 0_u64;
    while left > 0 {
        for turn in &mut turns {
            // Whether the count of turns due goes up in this round; for the greatest weight it always does.
            if (round + 1) * turn.weight / greatest == round * turn.weight / greatest {
                continue;
            }
            while taken[turn.at as usize] {
                turn.asked += 1;
                // With a prime number of places the permutation is complete; with any other, go on one by one.
                let step = if turn.asked < places { turn.skip } else { 1 };
                turn.at = (turn.at + step) % places;
            }
            taken[turn.at as usize] = true;
            table[turn.at as usize] = turn.id;
            left -= 1;
            if left == 0 {
                break;
            }
        }
        round += 1;
    }
    table
}
