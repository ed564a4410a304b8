//! Source ranges: who may connect to a service, or who may not.

use crate::Addr;

/// What a longest-prefix match is asked about: a client of a service port.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct SourceRange {
    /// [`crate::FrontendValue::service`]
    pub service: u32,
    /// [`SOURCE_RANGE_DENY`], [`SOURCE_RANGE_IPV6`]: a service that changes from one kind of list to the other has both
    /// for a moment, and `::/0` must not contain the IPv4 addresses, which are stored mapped.
    pub list: u32,
    /// The client's address, or the network's.
    pub addr: Addr,
}

/// The networks that may not connect, as opposed to those that may.
pub const SOURCE_RANGE_DENY: u32 = 1;
/// IPv6 networks.
pub const SOURCE_RANGE_IPV6: u32 = 2;

/// Key of the ranges trie (`BPF_MAP_TYPE_LPM_TRIE`); the value says nothing.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct SourceRangeKey {
    /// So many bits of `range` count: [`SOURCE_RANGE_BITS`] and those of the network's prefix (of an IPv4 network 96 more).
    pub prefix_len: u32,
    /// The network; bits beyond the prefix are zero.
    pub range: SourceRange,
}

/// Bits before the address.
pub const SOURCE_RANGE_BITS: u32 = 64;
/// All bits: what a client is looked up with.
pub const SOURCE_RANGE_ALL_BITS: u32 = 192;

impl SourceRangeKey {
    /// The key with the bits beyond the prefix zeroed. The trie does not tell apart what differs only there.
    #[must_use]
    pub const fn masked(mut self) -> Self {
        let len = self.prefix_len;
        self.range.service = mask(self.range.service, 0, len);
        self.range.list = mask(self.range.list, 32, len);
        let mut i = 0;
        while i < 4 {
            self.range.addr.words[i] = mask(self.range.addr.words[i], 64 + 32 * i as u32, len);
            i += 1;
        }
        self
    }
}

/// Keeps those bits of a word, read as memory in order, that lie before bit `len` when its first one is bit `at`.
const fn mask(word: u32, at: u32, len: u32) -> u32 {
    if len <= at {
        0
    } else if len - at >= 32 {
        word
    } else {
        word & (u32::MAX << (32 - (len - at))).to_be()
    }
}

crate::pod! { SourceRange = 24, SourceRangeKey = 28 }
