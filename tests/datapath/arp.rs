//! The L2 responder.

use std::net::Ipv4Addr;

use kinesin::datapath::MapStore;
use kinesin_abi::{L2Key, Settings};

use crate::packets::arp;
use crate::rig::{CLIENT, CLIENT_MAC, NODE_MAC, REDIRECT, Rig, VIP, isolated, settings};

const BROADCAST: [u8; 6] = [0xff; 6];
const NOBODY: [u8; 6] = [0; 6];
const REQUEST: u16 = 1;
const REPLY: u16 = 2;

fn owner() -> Rig {
    let rig = Rig::new();
    rig.maps.put_l2(L2Key { addr: VIP.into(), ifindex: rig.lan }).unwrap();
    rig
}

fn request() -> Vec<u8> {
    arp(BROADCAST, REQUEST, (CLIENT_MAC, CLIENT), (NOBODY, VIP))
}

fn answers(rig: &Rig) -> u64 {
    rig.maps.read_l2().unwrap()[0].1.responses_sent
}

#[test]
fn a_request_for_our_address_becomes_the_reply_byte_for_byte() {
    isolated(|| {
        let mut rig = owner();
        let expected = [
            &CLIENT_MAC[..],
            &NODE_MAC,
            &[8, 6, 0, 1, 8, 0, 6, 4, 0, 2],
            &NODE_MAC,
            &VIP.octets(),
            &CLIENT_MAC,
            &CLIENT.octets(),
        ]
        .concat();
        assert_eq!(rig.ingress(&request()), (REDIRECT, expected));
        assert_eq!(answers(&rig), 1);
    });
}

#[test]
fn a_unicast_request_and_a_probe_without_sender_are_answered_too() {
    isolated(|| {
        let mut rig = owner();
        for packet in [
            arp(NODE_MAC, REQUEST, (CLIENT_MAC, CLIENT), (NODE_MAC, VIP)),
            arp(BROADCAST, REQUEST, (CLIENT_MAC, Ipv4Addr::UNSPECIFIED), (NOBODY, VIP)),
        ] {
            let (code, out) = rig.ingress(&packet);
            assert_eq!(code, REDIRECT);
            assert_eq!((&out[20..22], &out[22..28], &out[28..32]), (&[0, 2][..], &NODE_MAC[..], &VIP.octets()[..]));
        }
        // Padded to the least length of a frame, as it comes from real wires.
        let mut padded = request();
        padded.resize(60, 0);
        let (code, out) = rig.ingress(&padded);
        assert_eq!((code, out.len()), (REDIRECT, 60));
        assert_eq!(answers(&rig), 3);
    });
}

#[test]
fn what_is_not_a_request_for_us_goes_on_untouched() {
    isolated(|| {
        let mut rig = owner();
        let another = Ipv4Addr::new(10, 0, 0, 101);
        for packet in [
            // For an address of somebody else, and for the host's own, which the stack answers.
            arp(BROADCAST, REQUEST, (CLIENT_MAC, CLIENT), (NOBODY, another)),
            arp(BROADCAST, REQUEST, (CLIENT_MAC, CLIENT), (NOBODY, crate::rig::NODE)),
            // A reply; an announcement of our address by somebody else; our own request, come back.
            arp(NODE_MAC, REPLY, (CLIENT_MAC, CLIENT), (NODE_MAC, VIP)),
            arp(BROADCAST, REQUEST, (CLIENT_MAC, VIP), (NOBODY, VIP)),
            arp(BROADCAST, REQUEST, (NODE_MAC, CLIENT), (NOBODY, VIP)),
            // To another host's MAC (R55), and to a multicast group.
            arp([2, 0, 0, 0, 0, 0x77], REQUEST, (CLIENT_MAC, CLIENT), (NOBODY, VIP)),
            arp([1, 0, 0x5e, 0, 0, 1], REQUEST, (CLIENT_MAC, CLIENT), (NOBODY, VIP)),
        ] {
            rig.assert_untouched(&packet);
        }
        assert_eq!(answers(&rig), 0);
    });
}

#[test]
fn malformed_requests_go_on_untouched_at_every_length() {
    isolated(|| {
        let mut rig = owner();
        for len in 14..42 {
            rig.assert_untouched(&request()[..len]);
        }
        for (at, byte) in [(15, 6), (16, 0x86), (18, 8), (19, 16), (21, 3)] {
            let mut packet = request();
            packet[at] = byte;
            rig.assert_untouched(&packet);
        }
        assert_eq!(answers(&rig), 0);
    });
}

#[test]
fn nobody_answers_once_the_agent_is_silent_for_too_long() {
    isolated(|| {
        let mut rig = owner();
        for stale in [
            Settings { alive_at: 0, ..settings() },
            Settings { alive_at: settings().alive_at - 2_000_000_000, alive_for: 1_000_000_000, ..settings() },
        ] {
            rig.maps.write_settings(&stale).unwrap();
            rig.assert_untouched(&request());
        }
        rig.maps.write_settings(&settings()).unwrap();
        assert_eq!(rig.ingress(&request()).0, REDIRECT);
    });
}

#[test]
fn an_address_is_answered_only_on_its_device() {
    isolated(|| {
        let mut rig = owner();
        rig.maps.delete_l2(&L2Key { addr: VIP.into(), ifindex: rig.lan }).unwrap();
        rig.maps.put_l2(L2Key { addr: VIP.into(), ifindex: rig.lan + 1 }).unwrap();
        rig.assert_untouched(&request());
    });
}
