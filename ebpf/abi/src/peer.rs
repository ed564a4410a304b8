//! Other nodes on this node's segments: where packets go that are handed on as they are, and whom they come from.

use crate::{Addr, NodeTag};

/// Key of the peers hash. Each peer has one entry by its tag and one by each of its MACs, with the same value.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct PeerKey {
    words: [u32; 2],
}

/// Set in the second word of keys by MAC, which fill only its lower half.
const BY_MAC: u32 = 1 << 31;

impl PeerKey {
    /// Where packets for the backends of a node go.
    #[inline(always)]
    pub const fn of_node(tag: NodeTag) -> Self {
        Self { words: [tag, 0] }
    }

    /// Who sends frames with this source address, given as the three 16-bit words of the header.
    #[inline(always)]
    pub const fn of_mac_words(mac: [u16; 3]) -> Self {
        Self { words: [mac[0] as u32 | (mac[1] as u32) << 16, mac[2] as u32 | BY_MAC] }
    }

    /// Who sends frames with this source address.
    pub const fn of_mac(mac: [u8; 6]) -> Self {
        Self::of_mac_words(mac_words(mac))
    }

    /// The node, of a key made by [`Self::of_node`].
    pub const fn node(&self) -> Option<NodeTag> {
        if self.words[1] == 0 { Some(self.words[0]) } else { None }
    }
}

/// A MAC as the three 16-bit words of a header, which is aligned no better.
#[inline(always)]
pub const fn mac_words([a, b, c, d, e, f]: [u8; 6]) -> [u16; 3] {
    [u16::from_ne_bytes([a, b]), u16::from_ne_bytes([c, d]), u16::from_ne_bytes([e, f])]
}

/// Value of the peers hash.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct PeerValue {
    /// The peer's MAC on the segment, as three 16-bit words of a header.
    pub mac: [u16; 3],
    /// [`PEER_TAKES_NEW`]
    pub flags: u16,
    /// The device of this node on that segment.
    pub ifindex: u32,
    /// The peer.
    pub node: NodeTag,
    /// The peer's primary IPv4 address on the segment, in wire order; 0 for none. NodePorts are handed on for this one.
    pub ipv4: u32,
    /// The same for IPv6; unspecified for none.
    pub ipv6: Addr,
}

/// New connections may be handed on to the peer; without it only those that were before.
pub const PEER_TAKES_NEW: u16 = 1;

impl PeerValue {
    /// The MAC as bytes, from first to last.
    pub const fn mac_bytes(&self) -> [u8; 6] {
        let ([a, b], [c, d], [e, f]) =
            (self.mac[0].to_ne_bytes(), self.mac[1].to_ne_bytes(), self.mac[2].to_ne_bytes());
        [a, b, c, d, e, f]
    }
}

crate::pod! { PeerKey = 8, PeerValue = 36 }

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_by_mac_and_by_node_never_meet() {
        let mac = PeerKey::of_mac([2, 0, 0, 0, 0, 0]);
        assert_eq!(mac.node(), None);
        assert_eq!(PeerKey::of_node(2).node(), Some(2));
        assert_ne!(mac, PeerKey::of_node(2));
    }
}
