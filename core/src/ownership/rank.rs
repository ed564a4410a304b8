//! Highest random weight: every node computes the same order of nodes for an address, without talking.

use std::net::IpAddr;

use smol_str::SmolStr;

/// SplitMix64's output function: a bijection in which every input bit moves about half of the output bits.
fn mix(word: u64) -> u64 {
    let z = word.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Weight of a node for an address. It is part of the protocol between agents of all versions and must never change:
/// the state begins with the bytes `Kinesin1` (big-endian) and becomes `mix(state ^ word)` for each word of: the two
/// halves of the address in network order (IPv4 as IPv4-mapped IPv6), the name in little-endian words of eight bytes, the
/// last one filled with zeros, and the name's length.
pub fn weight(addr: IpAddr, node: &str) -> u64 {
    let addr = match addr.to_canonical() {
        IpAddr::V4(v4) => v4.to_ipv6_mapped(),
        IpAddr::V6(v6) => v6,
    };
    let bits = u128::from(addr);
    let mut state = u64::from_be_bytes(*b"Kinesin1");
    let mut absorb = |word: u64| state = mix(state ^ word);
    absorb((bits >> 64) as u64);
    absorb(bits as u64);
    for chunk in node.as_bytes().chunks(8) {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        absorb(u64::from_le_bytes(word));
    }
    absorb(node.len() as u64);
    state
}

/// A live node that may answer for an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Its name.
    pub node: SmolStr,
    /// How many of the Services at the address it can serve; at least one.
    pub serves: usize,
    /// Is going away.
    pub draining: bool,
    /// Says that it answers for the address now.
    pub claims: bool,
}

/// Who should answer: among those who stay and serve most, whoever claims the address already, else any; the highest
/// weight decides, and the name between equal weights. A pure function of its input, whatever the order of that.
pub fn owner(addr: IpAddr, candidates: &[Candidate]) -> Option<&SmolStr> {
    let key = |c: &Candidate| (!c.draining, c.serves, c.claims, weight(addr, &c.node));
    candidates.iter().max_by(|a, b| key(a).cmp(&key(b)).then_with(|| a.node.cmp(&b.node))).map(|c| &c.node)
}
