//! Packets in fragments, of both families.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use kinesin::datapath::MapStore;
use kinesin_abi::{Backend, Direction, DropReason, FrontendKind, PEER_TAKES_NEW, Settings, frontend_flags, proto};
use kinesin_core::plan::Op;

use crate::dispatch;
use crate::packets::{self, IP, SYN, checksum, seal_ip, tcp, udp};
use crate::packets6::{self, FRAGMENT, addresses, datagram, framed, padding, sum, tcp6};
use crate::rig::*;

/// Bytes of an IPv4 packet behind its header.
const L4: usize = packets::L4;

/// Cuts the packet in a frame into fragments of so many bytes (a multiple of eight) each.
fn cut(frame: &[u8], size: usize, id: u16) -> Vec<Vec<u8>> {
    let payload = &frame[L4..];
    let count = payload.len().div_ceil(size);
    (0..count)
        .map(|n| {
            let part = &payload[n * size..payload.len().min((n + 1) * size)];
            let mut fragment = [&frame[..L4], part].concat();
            let more = if n + 1 < count { 0x2000 } else { 0 };
            fragment[IP + 2..IP + 4].copy_from_slice(&(20 + part.len() as u16).to_be_bytes());
            fragment[IP + 4..IP + 6].copy_from_slice(&id.to_be_bytes());
            fragment[IP + 6..IP + 8].copy_from_slice(&((n * size / 8) as u16 | more).to_be_bytes());
            seal_ip(&mut fragment);
            fragment
        })
        .collect()
}

/// Puts them together again; asserts that each header's checksum is right and that they belong together.
#[track_caller]
fn joined(fragments: &[Vec<u8>]) -> Vec<u8> {
    let mut whole = fragments[0][..L4].to_vec();
    for fragment in fragments {
        assert_eq!((checksum(&fragment[IP..L4]), &fragment[IP + 12..L4]), (0, &whole[IP + 12..L4]));
        assert_eq!(fragment[IP + 4..IP + 6], whole[IP + 4..IP + 6]);
        let offset = usize::from(u16::from_be_bytes([fragment[IP + 6], fragment[IP + 7]]) & 0x1fff) * 8;
        whole.resize(whole.len().max(L4 + offset), 0);
        whole.truncate(L4 + offset);
        whole.extend(&fragment[L4..]);
    }
    let len = (whole.len() - IP) as u16;
    whole[IP + 2..IP + 4].copy_from_slice(&len.to_be_bytes());
    whole[IP + 6..IP + 8].fill(0);
    seal_ip(&mut whole);
    whole
}

/// The same for IPv6: the packet's UDP datagram cut behind `extensions`.
fn cut6(from: packets6::End6, to: packets6::End6, len: usize, size: usize, id: u32) -> Vec<Vec<u8>> {
    let mut whole = datagram(from.1, to.1, &vec![0x5a; len]);
    let check = sum(from.0, to.0, proto::UDP, &whole);
    whole[6..8].copy_from_slice(&check.to_be_bytes());
    let count = whole.len().div_ceil(size);
    (0..count)
        .map(|n| {
            let part = &whole[n * size..whole.len().min((n + 1) * size)];
            let header = packets6::fragment((n * size) as u16, n + 1 < count, id);
            framed(from.0, to.0, &[padding(0, 1), header], proto::UDP, part)
        })
        .collect()
}

/// Asserts that fragments of IPv6 make a datagram with a right checksum; its source and destination.
#[track_caller]
fn ends_of6(fragments: &[Vec<u8>]) -> (packets6::End6, packets6::End6) {
    let (src, dst) = addresses(&fragments[0]);
    let mut whole = Vec::new();
    for fragment in fragments {
        assert_eq!((addresses(fragment), fragment[packets6::L4]), ((src, dst), FRAGMENT));
        whole.extend(&fragment[packets6::L4 + 16..]);
    }
    assert_eq!(sum(src, dst, proto::UDP, &whole), 0, "transport checksum");
    let port = |at: usize| u16::from_be_bytes([whole[at], whole[at + 1]]);
    ((src, port(0)), (dst, port(2)))
}

#[test]
fn fragments_follow_their_first_one_to_the_backend_and_back() {
    isolated(|| {
        let mut rig = Rig::new();
        for (port, to_backend) in [(TO_LOCAL, NEXT), (TO_REMOTE, REDIRECT)] {
            let sent = udp((CLIENT, 61_500), (VIP, port), &[0x5a; 3000]);
            let mut run = |program: &'static str, fragments: &[Vec<u8>], wanted: i32| -> Vec<Vec<u8>> {
                let out: Vec<_> = fragments.iter().map(|fragment| rig.run(program, fragment)).collect();
                assert!(out.iter().all(|(code, _)| *code == wanted), "{out:?}");
                out.into_iter().map(|(_, out)| out).collect()
            };
            let out = joined(&run("cil_from_netdev", &cut(&sent, 1480, 7), to_backend));
            let (from, pod) = packets::ends(&out);
            assert_eq!(out[L4 + 8..], sent[L4 + 8..]);
            let reply = udp(pod, from, &[0xa5; 2000]);
            let back = if port == TO_LOCAL { ("cil_to_netdev", NEXT) } else { ("cil_from_netdev", REDIRECT) };
            let out = joined(&run(back.0, &cut(&reply, 512, 9), back.1));
            assert_eq!(packets::ends(&out), ((VIP, port), (CLIENT, 61_500)));
        }
        assert_eq!(rig.maps.drops().unwrap(), []);
        let dump = rig.maps.dump_raw("fragments").unwrap();
        assert!(dump.iter().any(|(key, _)| key == "192.168.1.50 -> 10.0.0.100 id=0x7"), "{dump:?}");
    });
}

#[test]
fn fragments_of_ipv6_follow_their_first_one_to_the_backend_and_back() {
    isolated(|| {
        let mut rig = Rig::dual();
        for (port, to_backend) in [(TO_LOCAL, NEXT), (TO_REMOTE, REDIRECT)] {
            let (client, service) = ((CLIENT6, 61_500), (VIP6, port));
            let mut run = |program: &'static str, fragments: &[Vec<u8>], wanted: i32| -> Vec<Vec<u8>> {
                let out: Vec<_> = fragments.iter().map(|fragment| rig.run(program, fragment)).collect();
                assert!(out.iter().all(|(code, _)| *code == wanted), "{out:?}");
                out.into_iter().map(|(_, out)| out).collect()
            };
            let out = run("cil_from_netdev6", &cut6(client, service, 3000, 1400, 0xabcd), to_backend);
            let (from, pod) = ends_of6(&out);
            assert_eq!(pod.1, 8080);
            let back = if port == TO_LOCAL { ("cil_to_netdev6", NEXT) } else { ("cil_from_netdev6", REDIRECT) };
            let out = run(back.0, &cut6(pod, from, 2000, 512, 1), back.1);
            assert_eq!(ends_of6(&out), (service, client));
        }
        assert_eq!(rig.maps.drops().unwrap(), []);
        let dump = rig.maps.dump_raw("fragments").unwrap();
        assert!(dump.iter().any(|(key, _)| key == "fd00:1::50 -> fd00:99::100 id=0xabcd"), "{dump:?}");
    });
}

#[test]
fn a_fragment_that_comes_before_its_first_one_is_dropped_for_its_own_reason() {
    isolated(|| {
        let mut rig = Rig::dual();
        let fragments = cut(&udp((CLIENT, 61_500), (VIP, TO_REMOTE), &[1; 2000]), 1480, 7);
        let fragments6 = cut6((CLIENT6, 61_500), (VIP6, TO_REMOTE), 2000, 1400, 7);
        for [first, second] in [[&fragments[0], &fragments[1]], [&fragments6[0], &fragments6[1]]] {
            rig.assert_dropped(second, DropReason::FragmentNotFound);
            let program = if second.len() == fragments[1].len() { "cil_from_netdev" } else { "cil_from_netdev6" };
            assert_eq!(rig.run(program, first).0, REDIRECT);
            assert_eq!(rig.run(program, second).0, REDIRECT);
        }
        // Another identification, source or protocol is another packet.
        let whole = udp((CLIENT, 61_500), (VIP, TO_REMOTE), &[1; 2000]);
        rig.assert_dropped(&cut(&whole, 1480, 8)[1], DropReason::FragmentNotFound);
        let stranger = udp((Ipv4Addr::new(192, 168, 1, 51), 61_500), (VIP, TO_REMOTE), &[1; 2000]);
        rig.assert_dropped(&cut(&stranger, 1480, 7)[1], DropReason::FragmentNotFound);
        let mut segment = tcp((CLIENT, 61_500), (VIP, TO_REMOTE), SYN);
        segment.extend([0; 2000]);
        rig.assert_dropped(&cut(&segment, 1480, 7)[1], DropReason::FragmentNotFound);
        // What is not ours passes.
        let other = Ipv6Addr::new(0xfd00, 1, 0, 0, 0, 0, 0, 0x10);
        rig.assert_untouched(&cut(&udp((CLIENT, 1), (NODE, 53), &[1; 2000]), 1480, 7)[1]);
        rig.assert_untouched(&cut6((CLIENT6, 1), (other, 53), 2000, 1400, 7)[1]);
    });
}

#[test]
fn what_a_first_fragment_said_is_not_believed_for_long() {
    isolated(|| {
        let mut rig = Rig::new();
        let fragments = cut(&udp((CLIENT, 61_500), (VIP, TO_REMOTE), &[1; 2000]), 1480, 7);
        rig.ingress(&fragments[0]);
        let (key, mut value) = rig.maps.raw_entries("fragments").unwrap().pop().expect("an entry");
        let seen = u64::from_ne_bytes(value[..8].try_into().unwrap());
        value[..8].copy_from_slice(&(seen.saturating_sub(61_000_000_000)).to_ne_bytes());
        rig.maps.raw_put("fragments", &key, &value).unwrap();
        rig.assert_dropped(&fragments[1], DropReason::FragmentNotFound);
    });
}

#[test]
fn a_later_fragment_opens_no_connection() {
    isolated(|| {
        let mut rig = Rig::new();
        let fragments = cut(&udp((CLIENT, 61_500), (VIP, TO_REMOTE), &[1; 2000]), 1480, 7);
        rig.ingress(&fragments[0]);
        crate::flows::forget_all(&rig);
        rig.assert_dropped(&fragments[1], DropReason::FragmentNotFound);
        assert_eq!(crate::flows::entries(&rig).len(), 0);
    });
}

#[test]
fn without_the_setting_fragments_to_our_addresses_are_dropped_and_others_pass() {
    isolated(|| {
        let mut rig = Rig::dual();
        rig.maps.write_settings(&Settings { flags: 0, ..settings() }).unwrap();
        for port in [TO_LOCAL, TO_REMOTE] {
            let whole = udp((CLIENT, 61_500), (VIP, port), &[1; 2000]);
            for fragment in cut(&whole, 1480, 7) {
                rig.assert_dropped(&fragment, DropReason::Fragment);
            }
            // Of a known flow as well.
            rig.ingress(&whole);
            rig.assert_dropped(&cut(&whole, 1480, 7)[0], DropReason::Fragment);
            for fragment in cut6((CLIENT6, 61_500), (VIP6, port), 2000, 1400, 7) {
                rig.assert_dropped(&fragment, DropReason::Fragment);
            }
        }
        for fragment in cut(&udp((CLIENT, 1), (NODE, 53), &[1; 2000]), 1480, 7) {
            rig.assert_untouched(&fragment);
        }
        // A reply of a local backend.
        let (_, out) = rig.ingress(&udp((CLIENT, 40_000), (VIP, TO_LOCAL), b"?"));
        let (from, to) = packets::ends(&out);
        let (code, _) = rig.egress(&cut(&udp(to, from, &[1; 2000]), 1480, 9)[0]);
        assert_eq!((code, rig.dropped(DropReason::Fragment, Direction::Egress)), (SHOT, 1));
        // "Don't fragment" is no fragment.
        let mut whole = udp((CLIENT, 41_000), (VIP, TO_LOCAL), b"");
        whole[IP + 6] = 0x40;
        seal_ip(&mut whole);
        assert_eq!(rig.ingress(&whole).0, NEXT);
    });
}

#[test]
fn a_refused_first_fragment_is_quoted_by_its_headers_and_later_ones_are_not_answered() {
    isolated(|| {
        let mut rig = Rig::dual();
        let fragments = cut(&udp((CLIENT, 61_500), (VIP, TO_NOBODY), &[1; 2000]), 1480, 7);
        let (code, out) = rig.ingress(&fragments[0]);
        assert_eq!((code, out.len()), (REDIRECT, IP + 20 + 8 + 28));
        assert_eq!(
            (checksum(&out[L4..]), &out[L4..L4 + 2], &out[L4 + 8..]),
            (0, &[3, 3][..], &fragments[0][IP..L4 + 8])
        );
        assert_eq!(rig.ingress(&fragments[1]).0, SHOT);
        let fragments = cut6((CLIENT6, 61_500), (VIP6, TO_NOBODY), 2000, 1200, 7);
        let (code, out) = rig.ingress6(&fragments[0]);
        let (src, dst) = addresses(&out);
        assert_eq!((code, src, dst), (REDIRECT, VIP6, CLIENT6));
        assert_eq!(sum(src, dst, proto::ICMPV6, &out[packets6::L4..]), 0);
        assert_eq!(out[packets6::L4 + 8..], fragments[0][IP..packets6::L4 + 16 + 8]);
        assert_eq!(rig.ingress6(&fragments[1]).0, SHOT);
        // The service's connections are not disturbed.
        assert_eq!(rig.ingress6(&tcp6((CLIENT6, 1), (VIP6, TO_LOCAL), SYN)).0, NEXT);
    });
}

#[test]
fn fragments_for_a_neighbours_pod_go_on_as_they_are_and_those_that_a_peer_hands_on_are_put_through_here() {
    isolated(|| {
        let mut rig = Rig::dual();
        dispatch::peer(&rig, PEER_TAKES_NEW);
        let flags = frontend_flags::ROUTABLE | frontend_flags::FORWARDING_L2;
        let mut ops = Vec::new();
        for (vip, pod, id) in [
            (IpAddr::from(VIP), IpAddr::from(REMOTE_POD), 10 + REMOTE_ID),
            (VIP6.into(), REMOTE_POD6.into(), SIX + 10 + REMOTE_ID),
        ] {
            let remote =
                Backend { flags: Backend::flags_of(false, dispatch::TAG), ..backend(pod, 8080, proto::UDP, false) };
            let value = value(FrontendKind::LoadBalancer, flags, id, 1);
            ops.extend([Op::Backend(id, remote), Op::PutFrontend(frontend(vip, TO_REMOTE, proto::UDP), value)]);
        }
        rig.maps.apply(&ops).unwrap();
        let four = |port| cut(&udp((CLIENT, 61_500), (VIP, port), &[0x5a; 3000]), 1480, 7);
        let six = |port| cut6((CLIENT6, 61_500), (VIP6, port), 3000, 1400, 0xabcd);
        for (program, fragments) in [("cil_from_netdev", four(TO_REMOTE)), ("cil_from_netdev6", six(TO_REMOTE))] {
            rig.assert_dropped(&fragments[1], DropReason::FragmentNotFound);
            for sent in fragments {
                let (code, out) = rig.run(program, &sent);
                assert_eq!((code, &out[..6], &out[6..12]), (REDIRECT, &dispatch::PEER_MAC[..], &NODE_MAC[..]));
                let mut expected = sent.clone();
                expected[..12].copy_from_slice(&out[..12]);
                if program == "cil_from_netdev" {
                    expected[IP + 8] -= 1;
                    seal_ip(&mut expected);
                } else {
                    expected[IP + 7] -= 1;
                }
                assert_eq!(out, expected, "the same but for one hop");
            }
        }
        // The other way round: this is the backend's node, and a peer is the entry.
        let from_peer = |mut fragment: Vec<u8>| {
            fragment[6..12].copy_from_slice(&dispatch::PEER_MAC);
            fragment
        };
        let out: Vec<_> = four(TO_LOCAL).into_iter().map(|fragment| rig.ingress(&from_peer(fragment))).collect();
        assert!(out.iter().all(|(code, _)| *code == NEXT), "{out:?}");
        let out: Vec<_> = out.into_iter().map(|(_, out)| out).collect();
        assert_eq!(packets::ends(&joined(&out)), ((CLIENT, 61_500), (LOCAL_POD, 8080)));
        let out: Vec<_> = six(TO_LOCAL).into_iter().map(|fragment| rig.ingress6(&from_peer(fragment))).collect();
        assert!(out.iter().all(|(code, _)| *code == NEXT), "{out:?}");
        let out: Vec<_> = out.into_iter().map(|(_, out)| out).collect();
        assert_eq!(ends_of6(&out), ((CLIENT6, 61_500), (LOCAL_POD6, 8080)));
    });
}
