//! The hash that indexes Maglev tables.
//!
//! It is part of the contract between nodes: a moved address keeps its connections on the same backends only while every
//! node and every version computes the same number. Bob Jenkins' lookup3 mixing (public domain), read in big-endian order
//! so that the byte order of the machine does not matter.

use crate::{Addr, Be16};

/// Index into a Maglev table of so many entries, from [`maglev_hash`].
#[inline(always)]
pub const fn maglev_index(hash: u32, size: u32) -> u32 {
    // Multiply and shift instead of a remainder: the verifier can bound it, and it needs no division.
    ((hash as u64 * size as u64) >> 32) as u32
}

/// What decides where in a Maglev table a client's connection is.
///
/// The destination address is left out on purpose: two addresses of one service lead a client to the same backend.
#[inline(always)]
pub fn maglev_hash(src: &Addr, sport: Be16, dport: Be16, proto: u8, seed: u32) -> u32 {
    let ports = (sport.get() as u32) << 16 | dport.get() as u32;
    let start = 0xdead_beef_u32.wrapping_add(6 << 2).wrapping_add(seed);
    let mut a = start.wrapping_add(u32::from_be(src.words[0]));
    let mut b = start.wrapping_add(u32::from_be(src.words[1]));
    let mut c = start.wrapping_add(u32::from_be(src.words[2]));
    a = a.wrapping_sub(c) ^ c.rotate_left(4);
    c = c.wrapping_add(b);
    b = b.wrapping_sub(a) ^ a.rotate_left(6);
    a = a.wrapping_add(c);
    c = c.wrapping_sub(b) ^ b.rotate_left(8);
    b = b.wrapping_add(a);
    a = a.wrapping_sub(c) ^ c.rotate_left(16);
    c = c.wrapping_add(b);
    b = b.wrapping_sub(a) ^ a.rotate_left(19);
    a = a.wrapping_add(c);
    c = c.wrapping_sub(b) ^ b.rotate_left(4);
    b = b.wrapping_add(a);
    a = a.wrapping_add(u32::from_be(src.words[3]));
    b = b.wrapping_add(ports);
    c = c.wrapping_add(proto as u32);
    c = (c ^ b).wrapping_sub(b.rotate_left(14));
    a = (a ^ c).wrapping_sub(c.rotate_left(11));
    b = (b ^ a).wrapping_sub(a.rotate_left(25));
    c = (c ^ b).wrapping_sub(b.rotate_left(16));
    a = (a ^ c).wrapping_sub(c.rotate_left(4));
    b = (b ^ a).wrapping_sub(a.rotate_left(14));
    (c ^ b).wrapping_sub(b.rotate_left(24))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{MAGLEV_TABLE_SIZE, MAGLEV_TABLE_SIZES, maglev_size, maglev_words};

    fn index(src: &Addr, sport: u16, dport: u16, seed: u32) -> u32 {
        maglev_index(maglev_hash(src, Be16::new(sport), Be16::new(dport), 6, seed), MAGLEV_TABLE_SIZE)
    }

    #[test]
    fn the_index_is_the_same_on_every_version() {
        let src = Addr::from(core::net::Ipv4Addr::new(192, 0, 2, 7));
        let golden: [u32; 4] = core::array::from_fn(|i| index(&src, 40_000 + i as u16, 80, 0x5eed));
        assert_eq!(golden, GOLDEN);
    }

    const GOLDEN: [u32; 4] = [9018, 1893, 8953, 8688];

    #[test]
    fn the_indices_spread_over_the_table() {
        let mut buckets = [0u32; 16];
        for port in 1024..65_000u16 {
            let src = Addr::from(core::net::Ipv4Addr::new(10, 1, (port % 7) as u8, 9));
            let index = index(&src, port, 443, 0);
            assert!(index < MAGLEV_TABLE_SIZE);
            buckets[(index * 16 / MAGLEV_TABLE_SIZE) as usize] += 1;
        }
        let mean = (65_000 - 1024) / 16;
        assert!(buckets.iter().all(|n| n.abs_diff(mean) < mean / 8), "{buckets:?}");
    }

    #[test]
    fn every_size_of_a_table_is_known_by_its_words_and_bounds_its_index() {
        for size in MAGLEV_TABLE_SIZES {
            assert_eq!(maglev_size(maglev_words(size) as usize), Some(size));
            assert_eq!((maglev_index(0, size), maglev_index(u32::MAX, size)), (0, size - 1));
        }
        assert_eq!(maglev_size(100), None);
    }
}
