//! The L2 responder of IPv6.

use std::net::Ipv6Addr;

use kinesin::datapath::MapStore;
use kinesin_abi::{L2Key, Settings, proto};

use crate::packets::IP;
use crate::packets6::{L4, icmp6, sum, with_hops};
use crate::rig::{CLIENT_MAC, CLIENT6, NODE_MAC, REDIRECT, Rig, VIP6, isolated, settings};

const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

fn owner() -> Rig {
    let rig = Rig::new();
    rig.maps.put_l2(L2Key { addr: VIP6.into(), ifindex: rig.lan }).unwrap();
    rig
}

fn answers(rig: &Rig) -> u64 {
    rig.maps.read_l2().unwrap()[0].1.responses_sent
}

/// The solicited-node group of an address (RFC 4291 section 2.7.1).
fn group(addr: Ipv6Addr) -> Ipv6Addr {
    let [.., a, b, c] = addr.octets();
    Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00 | u16::from(a), u16::from_be_bytes([b, c]))
}

/// A neighbour solicitation with options, to a destination.
fn ask(src: Ipv6Addr, dst: Ipv6Addr, target: Ipv6Addr, options: &[u8]) -> Vec<u8> {
    let mut frame = with_hops(icmp6(src, dst, [135, 0, 0, 0, 0, 0], &[&target.octets()[..], options].concat()), 255);
    if dst.is_multicast() {
        let [.., a, b, c, d] = dst.octets();
        frame[..6].copy_from_slice(&[0x33, 0x33, a, b, c, d]);
    }
    frame
}

/// As a host asks that does not know the address yet.
pub(crate) fn solicitation(src: Ipv6Addr, target: Ipv6Addr) -> Vec<u8> {
    ask(src, group(target), target, &[&[1, 1][..], &CLIENT_MAC].concat())
}

/// The whole frame that answers.
fn advertisement(to: [u8; 6], dst: Ipv6Addr, flags: u8) -> Vec<u8> {
    let option = [&[2, 1][..], &NODE_MAC].concat();
    let data = [&VIP6.octets()[..], &option].concat();
    let mut frame = with_hops(icmp6(VIP6, dst, [136, 0, flags, 0, 0, 0], &data), 255);
    frame[IP + 1..IP + 4].fill(0);
    frame[..12].copy_from_slice(&[to, NODE_MAC].concat());
    frame
}

#[test]
fn a_solicitation_of_our_address_becomes_the_advertisement_byte_for_byte() {
    isolated(|| {
        let mut rig = owner();
        // Solicited and override (RFC 4861 section 4.4).
        let wanted = advertisement(CLIENT_MAC, CLIENT6, 0x60);
        assert_eq!(rig.ingress6(&solicitation(CLIENT6, VIP6)), (REDIRECT, wanted.clone()));
        // From one who only checks that it is still here, without and with options, of which a nonce is one.
        let nonce = [&[1, 1][..], &CLIENT_MAC, &[14, 1, 1, 2, 3, 4, 5, 6]].concat();
        for options in [&[][..], &[1, 1, 2, 0, 0, 0, 0, 0x50], &nonce, &[0xfd; 32]] {
            assert_eq!(rig.ingress6(&ask(CLIENT6, VIP6, VIP6, options)), (REDIRECT, wanted.clone()));
        }
        let link_local = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0x50);
        let (code, out) = rig.ingress6(&solicitation(link_local, VIP6));
        assert_eq!((code, out), (REDIRECT, advertisement(CLIENT_MAC, link_local, 0x60)));
        assert_eq!(answers(&rig), 6);
        assert_eq!(rig.maps.drops().unwrap(), []);
    });
}

#[test]
fn who_wants_the_address_for_itself_is_told_before_everybody() {
    isolated(|| {
        let mut rig = owner();
        // RFC 4861 section 7.2.4: unsolicited, to all nodes.
        let wanted = advertisement([0x33, 0x33, 0, 0, 0, 1], ALL_NODES, 0x20);
        let probe = ask(Ipv6Addr::UNSPECIFIED, group(VIP6), VIP6, &[]);
        assert_eq!(rig.ingress6(&probe), (REDIRECT, wanted.clone()));
        let with_nonce = ask(Ipv6Addr::UNSPECIFIED, group(VIP6), VIP6, &[14, 1, 1, 2, 3, 4, 5, 6]);
        assert_eq!(rig.ingress6(&with_nonce), (REDIRECT, wanted));
    });
}

#[test]
fn everything_else_goes_on_to_the_stack() {
    isolated(|| {
        let mut rig = owner();
        let good = solicitation(CLIENT6, VIP6);
        let patched = |at: usize, byte: u8| {
            let mut frame = good.clone();
            frame[at] = byte;
            frame
        };
        let sealed = |mut frame: Vec<u8>| {
            let [src, dst] = [8, 24].map(|at| <[u8; 16]>::try_from(&frame[IP + at..IP + at + 16]).unwrap().into());
            frame[L4 + 2..L4 + 4].fill(0);
            let check = sum(src, dst, proto::ICMPV6, &frame[L4..]);
            frame[L4 + 2..L4 + 4].copy_from_slice(&check.to_be_bytes());
            frame
        };
        for frame in [
            // Has come through a router; a wrong checksum; another type and code.
            patched(IP + 7, 254),
            patched(L4 + 2, good[L4 + 2] ^ 1),
            sealed(patched(L4, 136)),
            sealed(patched(L4 + 1, 1)),
            // Somebody else's address.
            solicitation(CLIENT6, Ipv6Addr::new(0xfd00, 0x99, 0, 0, 0, 0, 0, 0x101)),
            // Flooded to us.
            patched(0, 0x02),
            // Our own question.
            [&good[..6], &NODE_MAC, &good[12..]].concat(),
        ] {
            rig.assert_untouched(&frame);
        }
        for len in L4..good.len() {
            rig.assert_untouched(&good[..len]);
        }
        assert_eq!(answers(&rig), 0);
        assert_eq!(rig.ingress6(&good).0, REDIRECT);
    });
}

#[test]
fn a_node_whose_agent_is_gone_falls_silent() {
    isolated(|| {
        let mut rig = owner();
        rig.maps.write_settings(&Settings { alive_at: 1, alive_for: 1, ..settings() }).unwrap();
        rig.assert_untouched(&solicitation(CLIENT6, VIP6));
        rig.maps.write_settings(&settings()).unwrap();
        assert_eq!(rig.ingress6(&solicitation(CLIENT6, VIP6)).0, REDIRECT);
    });
}
