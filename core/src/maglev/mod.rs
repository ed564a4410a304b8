//! Maglev tables (Eisenbud et al., NSDI 2016, section 3.4): every node fills the same table from the same backends, so
//! that an address which moves keeps its connections on the same pods.
//!
//! A table is part of the contract between nodes and versions: the hash, the key string of a backend, the order and the
//! fill below never change. The twin of this file is `kinesin_abi::maglev_index`, which picks the entry for a packet.
//! Deliberately absent: the choice of which sets have tables (see [`crate::plan`]).

mod murmur;

pub use murmur::murmur3_x64_128;

use std::net::IpAddr;

use kinesin_abi::{BackendId, SLOT_EMPTY, proto};

/// Default of `bpf-lb-maglev-hash-seed`.
pub const DEFAULT_SEED: &str = "JLfvgnHc2kaSUFaI";

/// The seeds that `bpf-lb-maglev-hash-seed` stands for: base64 of 12 bytes, three big-endian words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HashSeed {
    /// Bytes 0–3: seeds the hash that fills tables.
    pub murmur: u32,
    /// Bytes 4–7: seeds the hash of packets (`Settings::maglev_seed`).
    pub jhash: u32,
    /// Bytes 8–11: Cilium's second packet seed, for IPv6. Unused while one hash serves both families.
    pub jhash6: u32,
}

/// A seed that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "bpf-lb-maglev-hash-seed: {problem}; use 16 characters of base64, for example from `head -c12 /dev/urandom | base64 -w0`"
)]
pub struct SeedError {
    problem: String,
}

impl HashSeed {
    /// Reads base64 (RFC 4648 section 4) of exactly 12 bytes.
    ///
    /// # Errors
    /// [`SeedError`] names the offending character or the length.
    pub fn parse(base64: &str) -> Result<Self, SeedError> {
        let text = base64.trim();
        let mut sextets = [0u32; 16];
        let length = text.chars().count();
        if length != sextets.len() {
            return Err(SeedError { problem: format!("{length} characters instead of 16") });
        }
        for (sextet, c) in sextets.iter_mut().zip(text.chars()) {
            *sextet = match c {
                'A'..='Z' => c as u32 - 'A' as u32,
                'a'..='z' => c as u32 - 'a' as u32 + 26,
                '0'..='9' => c as u32 - '0' as u32 + 52,
                '+' => 62,
                '/' => 63,
                _ => return Err(SeedError { problem: format!("{c:?} is not a character of base64 for 12 bytes") }),
            };
        }
        let mut bytes = [0u8; 12];
        for (three, four) in bytes.as_chunks_mut::<3>().0.iter_mut().zip(sextets.as_chunks::<4>().0) {
            let bits = four.iter().fold(0, |bits, sextet| bits << 6 | sextet);
            three.copy_from_slice(&bits.to_be_bytes()[1..]);
        }
        Ok(Self::from_bytes(bytes))
    }

    /// From the decoded 12 bytes.
    pub const fn from_bytes(b: [u8; 12]) -> Self {
        Self {
            murmur: u32::from_be_bytes([b[0], b[1], b[2], b[3]]),
            jhash: u32::from_be_bytes([b[4], b[5], b[6], b[7]]),
            jhash6: u32::from_be_bytes([b[8], b[9], b[10], b[11]]),
        }
    }
}

impl Default for HashSeed {
    fn default() -> Self {
        Self::parse(DEFAULT_SEED).expect("invariant: the default seed is 16 characters of base64")
    }
}

/// One candidate for a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// [`backend_key`]: what is hashed and sorted by, so that node-local ids have no influence.
    pub key: String,
    /// Node-local id: what is stored.
    pub id: BackendId,
    /// Share of the table relative to the others; 1 everywhere for equal shares. 0 gets no entry while any other is > 0.
    pub weight: u16,
}

/// The string by which a backend is known to the hash, the same on all nodes: `[10.42.0.5:8080/TCP,State:active]`.
///
/// The state is constant: tables hold only backends that take new connections.
pub fn backend_key(addr: IpAddr, port: u16, protocol: u8) -> String {
    let protocol = protocol_name(protocol);
    match addr {
        IpAddr::V4(v4) => format!("[{v4}:{port}/{protocol},State:active]"),
        IpAddr::V6(v6) => format!("[[{v6}]:{port}/{protocol},State:active]"),
    }
}

/// `TCP`, `UDP`, `SCTP`; `ANY` for wildcards and `NONE` for numbers that no service uses.
pub fn protocol_name(protocol: u8) -> &'static str {
    match protocol {
        proto::TCP => "TCP",
        proto::UDP => "UDP",
        proto::SCTP => "SCTP",
        proto::ANY => "ANY",
        _ => "NONE",
    }
}

/// Where a backend starts in the table, how far it steps, and how far it has come.
struct Walk {
    next: u32,
    skip: u32,
    steps: u32,
    id: BackendId,
    weight: u32,
    credit: u32,
}

/// Fills a table of `m` entries (a prime) with the ids of `backends`, in turns. Without backends all entries are
/// [`SLOT_EMPTY`].
///
/// Byte-stable: depends on keys, weights, `m` and the seed only, not on the order of `backends`. A backend steps through
/// the table from `h1 % m` by `h2 % (m - 1) + 1` (the halves of murmur3 x64 128 of its key) and takes the first free entry
/// in each of its turns; with weights it has `weight` turns where the heaviest has its own weight. About `m · ln(m)`
/// steps, whatever the number of backends.
pub fn table(backends: &[Entry], m: u32, seed: &HashSeed) -> Vec<BackendId> {
    let mut table = vec![SLOT_EMPTY; m as usize];
    let mut order: Vec<&Entry> = backends.iter().collect();
    order.sort_by(|a, b| a.key.cmp(&b.key).then(a.id.cmp(&b.id)));
    order.dedup_by(|later, first| later.key == first.key);
    if order.iter().any(|entry| entry.weight > 0) {
        order.retain(|entry| entry.weight > 0);
    }
    if order.is_empty() || m == 0 {
        return table;
    }
    let mut walks: Vec<Walk> = order
        .iter()
        .map(|entry| {
            let (h1, h2) = murmur3_x64_128(entry.key.as_bytes(), seed.murmur);
            let next = (h1 % u64::from(m)) as u32;
            let skip = (h2 % u64::from(m - 1).max(1)) as u32 + 1;
            Walk { next, skip, steps: 0, id: entry.id, weight: u32::from(entry.weight.max(1)), credit: 0 }
        })
        .collect();
    let heaviest = walks.iter().map(|walk| walk.weight).max().unwrap_or(1);
    let mut free = m;
    // Each round at least the heaviest takes one entry, so this ends after at most `m` rounds.
    while free > 0 {
        for walk in &mut walks {
            walk.credit += walk.weight;
            if walk.credit < heaviest {
                continue;
            }
            walk.credit -= heaviest;
            take(&mut table, walk, m);
            free -= 1;
            if free == 0 {
                break;
            }
        }
    }
    table
}

/// Gives the next free entry on the way of `walk` to it. There must be one.
fn take(table: &mut [BackendId], walk: &mut Walk, m: u32) {
    // A prime `m` is covered in `m` steps. Another one may not be: then the walk goes on by single steps.
    while walk.steps < m.saturating_mul(2) {
        let here = walk.next as usize;
        let skip = if walk.steps < m { walk.skip } else { 1 };
        walk.next = ((u64::from(walk.next) + u64::from(skip)) % u64::from(m)) as u32;
        walk.steps += 1;
        if table[here] == SLOT_EMPTY {
            table[here] = walk.id;
            return;
        }
    }
}

#[cfg(test)]
mod tests;
