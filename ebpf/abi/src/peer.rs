//! Other nodes: where packets go that are handed on, and whom they come from.

use crate::{Addr, NodeTag};

/// Key of the peers hash. Each peer has one entry by its tag; one by its MAC where it is on a segment of this node, with the
/// same value; and one by each address that it may wrap packets with.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct PeerKey {
    words: [u32; 2],
}

/// Set in the second word of keys by MAC, which fill only its lower half.
const BY_MAC: u32 = 1 << 31;
/// Set in the second word of keys by IPv4 address, which fill only the first.
const BY_IPV4: u32 = 1 << 30;
/// Set in the second word of keys by IPv6 address, whose 16 bytes are folded into the rest.
const BY_IPV6: u32 = 1 << 29;

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

    /// Who sends packets with this outer source address. Two of IPv6 may have one key: the value says which is meant.
    #[inline(always)]
    pub const fn of_addr(addr: &Addr) -> Self {
        let [a, b, c, d] = addr.words;
        if addr.is_v4() {
            return Self { words: [d, BY_IPV4] };
        }
        Self { words: [d ^ b.rotate_left(13), (c ^ a.rotate_left(7)) & (BY_IPV6 - 1) | BY_IPV6] }
    }

    /// The node, of a key made by [`Self::of_node`].
    pub const fn node(&self) -> Option<NodeTag> {
        if self.words[1] == 0 { Some(self.words[0]) } else { None }
    }

    /// Whether it was made by [`Self::of_addr`].
    pub const fn is_by_addr(&self) -> bool {
        self.words[1] & BY_MAC == 0 && self.words[1] & (BY_IPV4 | BY_IPV6) != 0
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
    /// The peer's MAC on the segment, as three 16-bit words of a header; zero of a peer by route.
    pub mac: [u16; 3],
    /// [`PEER_TAKES_NEW`], [`PEER_BY_ROUTE`], [`PEER_ACROSS`]
    pub flags: u16,
    /// The device of this node on that segment; 0 of a peer by route.
    pub ifindex: u32,
    /// The peer.
    pub node: NodeTag,
    /// The peer's primary IPv4 address on the segment, in wire order; 0 for none. NodePorts are handed on for this one. Of a
    /// peer by route, and under a key by address: that of one of its links, where wrapped packets go or come from.
    pub ipv4: u32,
    /// The same for IPv6; unspecified for none.
    pub ipv6: Addr,
}

/// New connections may be handed on to the peer; without it only those that were before.
pub const PEER_TAKES_NEW: u16 = 1;

/// The peer is on no segment of this node: packets for it are sent by route, in the way of
/// [`crate::frontend_flags::FORWARDING`].
pub const PEER_BY_ROUTE: u16 = 2;

/// The device of this node on that segment is a veth whose other end, on the segment, is in another network namespace: frames
/// for the peer go straight into that end, past what this node does with frames on their way out.
pub const PEER_ACROSS: u16 = 4;

impl PeerValue {
    /// Whether this is its address.
    #[inline(always)]
    pub fn is_at(&self, addr: &Addr) -> bool {
        if addr.is_v4() { self.ipv4 == addr.v4_raw() } else { self.ipv6 == *addr }
    }

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

    #[test]
    fn keys_by_address_meet_no_others() {
        let v4 = PeerKey::of_addr(&Addr::from_v4_raw(2));
        let v6 = PeerKey::of_addr(&Addr { words: [0xfd, 0, u32::MAX, 2] });
        for key in [v4, v6] {
            assert!(key.is_by_addr() && key.node().is_none() && key != PeerKey::of_mac([2, 0, 0, 0, 0, 0]));
        }
        assert_ne!(v4, v6);
        assert!(!PeerKey::of_mac([0xff; 6]).is_by_addr() && !PeerKey::of_node(2).is_by_addr());
    }
}
