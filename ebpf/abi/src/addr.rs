//! Wire-order addresses and ports.

use core::fmt;
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// An IPv6 address, or an IPv4 address in IPv4-mapped form (`::ffff:a.b.c.d`), as four words in wire order.
///
/// Words, not bytes: the programs load and compare them without a loop.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Addr {
    /// The 16 bytes as they are on the wire, read as native words.
    pub words: [u32; 4],
}

/// Third word of an IPv4-mapped address, as loaded from memory.
const MAPPED: u32 = u32::from_ne_bytes([0, 0, 0xff, 0xff]);

impl Addr {
    /// `::`, which no IPv4 address maps to.
    pub const UNSPECIFIED: Self = Self { words: [0; 4] };

    /// `raw` holds the four bytes of an IPv4 address in wire order, as loaded from a header.
    #[inline(always)]
    pub const fn from_v4_raw(raw: u32) -> Self {
        Self { words: [0, 0, MAPPED, raw] }
    }

    /// The IPv4 address in wire order; meaningful only where [`Self::is_v4`].
    #[inline(always)]
    pub const fn v4_raw(&self) -> u32 {
        self.words[3]
    }

    /// Whether this is an IPv4-mapped address.
    #[inline(always)]
    pub const fn is_v4(&self) -> bool {
        // Without branches, each of which the verifier would follow.
        self.words[0] | self.words[1] | (self.words[2] ^ MAPPED) == 0
    }

    /// What stands for every address of this one's family: `0.0.0.0` or `::`.
    #[inline(always)]
    pub const fn every(&self) -> Self {
        if self.is_v4() { Self::from_v4_raw(0) } else { Self::UNSPECIFIED }
    }

    /// All four words zero: no address at all.
    #[inline(always)]
    pub const fn is_unspecified(&self) -> bool {
        self.words[0] | self.words[1] | self.words[2] | self.words[3] == 0
    }
}

impl From<Ipv4Addr> for Addr {
    fn from(v4: Ipv4Addr) -> Self {
        Self::from_v4_raw(u32::from_ne_bytes(v4.octets()))
    }
}

impl From<Ipv6Addr> for Addr {
    fn from(v6: Ipv6Addr) -> Self {
        let b = v6.octets();
        let word = |i: usize| u32::from_ne_bytes([b[i], b[i + 1], b[i + 2], b[i + 3]]);
        Self { words: [word(0), word(4), word(8), word(12)] }
    }
}

impl From<IpAddr> for Addr {
    fn from(ip: IpAddr) -> Self {
        match ip {
            IpAddr::V4(v4) => v4.into(),
            IpAddr::V6(v6) => v6.into(),
        }
    }
}

impl From<Addr> for IpAddr {
    fn from(addr: Addr) -> Self {
        if addr.is_v4() {
            return IpAddr::V4(Ipv4Addr::from(addr.v4_raw().to_ne_bytes()));
        }
        let mut bytes = [0; 16];
        for (chunk, word) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(addr.words) {
            *chunk = word.to_ne_bytes();
        }
        IpAddr::V6(Ipv6Addr::from(bytes))
    }
}

impl fmt::Debug for Addr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&IpAddr::from(*self), f)
    }
}

/// A 16-bit number in wire order.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Be16(u16);

impl Be16 {
    /// From host order.
    #[inline(always)]
    pub const fn new(host: u16) -> Self {
        Self(host.to_be())
    }

    /// From the two bytes as loaded from a header.
    #[inline(always)]
    pub const fn from_raw(raw: u16) -> Self {
        Self(raw)
    }

    /// In host order.
    #[inline(always)]
    pub const fn get(self) -> u16 {
        u16::from_be(self.0)
    }

    /// As stored in a header.
    #[inline(always)]
    pub const fn raw(self) -> u16 {
        self.0
    }
}

impl fmt::Debug for Be16 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.get(), f)
    }
}

crate::pod! { Addr = 16, Be16 = 2 }
