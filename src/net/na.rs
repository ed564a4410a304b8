//! Unsolicited neighbour advertisements (RFC 4861 section 7.2.6): gratuitous ARP's sibling of IPv6.

use std::net::Ipv6Addr;

use super::{GarpSender, NetError};

/// Length of the Ethernet frame, without padding and FCS.
pub const FRAME_LEN: usize = 14 + 40 + 32;

const ETHERTYPE_IPV6: u16 = 0x86dd;
const ICMPV6: u8 = 58;
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
const ALL_NODES_MAC: [u8; 6] = [0x33, 0x33, 0, 0, 0, 1];
/// Set, so that neighbours replace the MAC that they have; not solicited, as it must be to a group (section 4.4).
const OVERRIDE: u8 = 0x20;

/// The whole Ethernet frame: to all nodes, from the address itself, with its MAC as target link-layer address.
pub fn frame(mac: [u8; 6], address: Ipv6Addr) -> [u8; FRAME_LEN] {
    let mut bytes = [0; FRAME_LEN];
    bytes[0..6].copy_from_slice(&ALL_NODES_MAC);
    bytes[6..12].copy_from_slice(&mac);
    bytes[12..14].copy_from_slice(&ETHERTYPE_IPV6.to_be_bytes());
    // Version; payload length, next header, and the hop limit that shows that no router has forwarded it.
    bytes[14] = 0x60;
    bytes[18..22].copy_from_slice(&[0, 32, ICMPV6, 255]);
    bytes[22..38].copy_from_slice(&address.octets());
    bytes[38..54].copy_from_slice(&ALL_NODES.octets());
    bytes[54..62].copy_from_slice(&[136, 0, 0, 0, OVERRIDE, 0, 0, 0]);
    bytes[62..78].copy_from_slice(&address.octets());
    bytes[78..80].copy_from_slice(&[2, 1]);
    bytes[80..86].copy_from_slice(&mac);
    let check = checksum(&bytes);
    bytes[56..58].copy_from_slice(&check.to_be_bytes());
    bytes
}

/// Of addresses, length and next header, and the message (RFC 8200 section 8.1).
fn checksum(frame: &[u8; FRAME_LEN]) -> u16 {
    let words = frame[22..].as_chunks::<2>().0.iter().map(|pair| u32::from(u16::from_be_bytes(*pair)));
    let sum: u32 = words.sum::<u32>() + 32 + u32::from(ICMPV6);
    let folded = (sum & 0xffff) + (sum >> 16);
    !(((folded & 0xffff) + (folded >> 16)) as u16)
}

/// Announces `address` at `mac` on one interface of the current network namespace, once. Never blocks.
///
/// # Errors
/// When the interface has no MAC, is gone or down, or its queue is full; announcing again is harmless.
pub fn send(ifindex: u32, mac: Option<[u8; 6]>, address: Ipv6Addr) -> Result<(), NetError> {
    let Some(mac) = mac else {
        return Err(NetError::Invalid(format!("announce {address}: interface {ifindex} has no MAC address")));
    };
    let sent = GarpSender::open()?.send_frame(ifindex, ETHERTYPE_IPV6, &frame(mac, address));
    sent.map_err(NetError::io(format!("announce {address} on interface {ifindex}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_frame_is_the_one_that_rfc_4861_describes() {
        let mac = [2, 0, 0, 0, 0, 0x10];
        let address = Ipv6Addr::new(0xfd00, 0x99, 0, 0, 0, 0, 0, 0x100);
        let bytes = frame(mac, address);
        // Laid out by hand, checksum included.
        let wanted = "333300000001 020000000010 86dd 60000000 0020 3a ff \
                      fd000099000000000000000000000100 ff020000000000000000000000000001 \
                      88 00 XXXX 20000000 fd000099000000000000000000000100 0201 020000000010";
        let text: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        let wanted: String = wanted.split_whitespace().collect();
        assert_eq!(text[..112], wanted[..112]);
        assert_eq!(text[116..], wanted[116..]);
        let sum =
            bytes[22..].chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum::<u32>() + 32 + 58;
        assert_eq!((sum & 0xffff) + (sum >> 16), 0xffff, "the checksum makes the sum all ones");
    }
}
