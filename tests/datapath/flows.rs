//! Known connections: replies, ends, staleness, and what the tables remember.

use std::net::Ipv4Addr;

use kinesin::datapath::MapStore;
use kinesin_abi::{BackendState, Be16, Direction, DropReason, FlowKey, proto};
use kinesin_core::plan::Op;

use crate::packets::{ACK, End, FIN, RST, SYN, ends, packet, tcp, ttl, udp};
use crate::rig::*;

/// What a backend answers to a translated packet.
fn answer(to: &[u8], flags: u8) -> Vec<u8> {
    let (from, to_end) = ends(to);
    if to[23] == proto::TCP { tcp(to_end, from, flags) } else { udp(to_end, from, b"answer") }
}

fn flow(rig: &Rig, from: End, to: End, protocol: u8) -> Option<(FlowKey, kinesin_abi::FlowValue)> {
    let key = FlowKey {
        src: from.0.into(),
        dst: to.0.into(),
        sport: Be16::new(from.1),
        dport: Be16::new(to.1),
        proto: protocol,
        pad: [0; 3],
    };
    entries(rig).into_iter().find(|(k, _)| *k == key)
}

/// All connections: established ones first, then the others, copies of the former included.
pub(crate) fn entries(rig: &Rig) -> Vec<(FlowKey, kinesin_abi::FlowValue)> {
    let tables = ["flows", "transient"].map(|table| rig.maps.raw_entries(table).unwrap());
    tables.iter().flatten().map(|(k, v)| decode(k, v)).collect()
}

/// Entries of one table.
pub(crate) fn count(rig: &Rig, table: &str) -> usize {
    rig.maps.raw_entries(table).unwrap().len()
}

/// Removes an entry wherever it is; returns whether there was one.
pub(crate) fn forget(rig: &Rig, key: &FlowKey) -> bool {
    ["flows", "transient"].map(|table| rig.maps.raw_delete(table, bytes(key)).unwrap()).contains(&true)
}

/// Removes all connections.
pub(crate) fn forget_all(rig: &Rig) {
    for (key, _) in entries(rig) {
        forget(rig, &key);
    }
}

pub(crate) fn decode(key: &[u8], value: &[u8]) -> (FlowKey, kinesin_abi::FlowValue) {
    assert_eq!((key.len(), value.len()), (size_of::<FlowKey>(), size_of::<kinesin_abi::FlowValue>()));
    // SAFETY: both are plain integers of just these sizes.
    unsafe {
        (
            key.as_ptr().cast::<FlowKey>().read_unaligned(),
            value.as_ptr().cast::<kinesin_abi::FlowValue>().read_unaligned(),
        )
    }
}

pub(crate) fn bytes<T: aya::Pod>(value: &T) -> &[u8] {
    // SAFETY: `Pod` types are plain integers without padding.
    unsafe { std::slice::from_raw_parts((&raw const *value).cast(), size_of::<T>()) }
}

/// Changes an entry behind the programs' back.
fn edit(rig: &Rig, from: End, to: End, protocol: u8, change: impl FnOnce(&mut kinesin_abi::FlowValue)) {
    let (key, mut value) = flow(rig, from, to, protocol).expect("the entry is there");
    change(&mut value);
    let settled = rig.maps.raw_entries("flows").unwrap().iter().any(|(k, _)| k == bytes(&key));
    rig.maps.raw_put(if settled { "flows" } else { "transient" }, bytes(&key), bytes(&value)).unwrap();
}

#[test]
fn a_local_backends_reply_leaves_with_the_services_address() {
    isolated(|| {
        let mut rig = Rig::new();
        for protocol in [proto::TCP, proto::UDP] {
            let (_, out) = rig.ingress(&packet(protocol, (CLIENT, 40_000), (VIP, TO_LOCAL)));
            let (code, reply) = rig.egress(&answer(&out, SYN | ACK));
            assert_eq!((code, ends(&reply), ttl(&reply)), (NEXT, ((VIP, TO_LOCAL), (CLIENT, 40_000)), 64));
        }
        assert_eq!(rig.maps.forwarded().unwrap()[1].1.packets, 2);
    });
}

#[test]
fn a_remote_backends_reply_goes_to_the_client_with_the_services_address() {
    isolated(|| {
        let mut rig = Rig::new();
        for protocol in [proto::TCP, proto::UDP] {
            let (_, out) = rig.ingress(&packet(protocol, (CLIENT, 40_000), (VIP, TO_REMOTE)));
            let (code, reply) = rig.ingress(&answer(&out, SYN | ACK));
            assert_eq!((code, ends(&reply), ttl(&reply)), (REDIRECT, ((VIP, TO_REMOTE), (CLIENT, 40_000)), 63));
            // And the next packet of the client follows the first.
            let (_, next) = rig.ingress(&packet(protocol, (CLIENT, 40_000), (VIP, TO_REMOTE)));
            assert_eq!(ends(&next), ends(&out));
        }
    });
}

#[test]
fn a_host_network_backends_reply_is_the_nodes_own_packet() {
    isolated(|| {
        let mut rig = Rig::new();
        rig.maps.apply(&[Op::Backend(LOCAL_ID, backend(NODE, 8080, proto::TCP, true))]).unwrap();
        let (code, out) = rig.ingress(&tcp((CLIENT, 40_000), (VIP, TO_LOCAL), SYN));
        assert_eq!((code, ends(&out).1), (NEXT, (NODE, 8080)));
        let (_, reply) = rig.egress(&answer(&out, SYN | ACK));
        assert_eq!(ends(&reply).0, (VIP, TO_LOCAL));
        // A direct connection to that port is not the service's.
        let direct = tcp((NODE, 8080), (CLIENT, 40_001), SYN | ACK);
        assert_eq!(rig.egress(&direct), (NEXT, direct));
    });
}

#[test]
fn egress_leaves_everything_else_alone() {
    isolated(|| {
        let mut rig = Rig::new();
        let (_, out) = rig.ingress(&tcp((CLIENT, 61_500), (VIP, TO_REMOTE), SYN));
        let mut short = tcp((NODE, 1), (CLIENT, 2), SYN);
        short.truncate(40);
        for packet in [
            // The translated packet itself, on its way out of the device.
            out.clone(),
            // A remote backend's reply is ingress' business, the client's packet too.
            answer(&out, SYN | ACK),
            tcp((CLIENT, 61_500), (VIP, TO_REMOTE), ACK),
            tcp((NODE, 22), (CLIENT, 5000), ACK),
            crate::packets::ipv4(NODE, CLIENT, 1, &[3, 3, 0, 0]),
            short,
        ] {
            assert_eq!(rig.egress(&packet), (NEXT, packet));
        }
    });
}

#[test]
fn who_claims_from_outside_to_be_a_local_backend_is_not_translated() {
    isolated(|| {
        let mut rig = Rig::new();
        let (_, out) = rig.ingress(&tcp((CLIENT, 40_000), (VIP, TO_LOCAL), SYN));
        rig.assert_untouched(&answer(&out, SYN | ACK));
    });
}

#[test]
fn a_syn_after_a_reset_or_both_fins_is_a_new_connection() {
    isolated(|| {
        let mut rig = Rig::new();
        let client = (CLIENT, 61_500);
        let service = (VIP, TO_REMOTE);
        let second = Ipv4Addr::new(10, 42, 2, 6);
        rig.maps.apply(&[Op::Backend(100, backend(second, 8080, proto::TCP, false))]).unwrap();
        for (number, ends_with_reset) in [(0, true), (1, false)] {
            let pods = [(REMOTE_ID, REMOTE_POD), (100, second)];
            let (old, new) = (pods[number], pods[1 - number]);
            rig.maps.apply(&[Op::Slot(REMOTE_ID, old.0)]).unwrap();
            let (_, out) = rig.ingress(&tcp(client, service, SYN));
            assert_eq!(ends(&out).1.0, old.1);
            rig.ingress(&answer(&out, SYN | ACK));
            // The member is exchanged; the connection stays with the old one, even for a repeated SYN.
            rig.maps.apply(&[Op::Slot(REMOTE_ID, new.0)]).unwrap();
            for flags in [ACK, SYN] {
                assert_eq!(ends(&rig.ingress(&tcp(client, service, flags)).1).1.0, old.1);
            }
            if ends_with_reset {
                rig.ingress(&answer(&out, RST));
            } else {
                rig.ingress(&tcp(client, service, FIN | ACK));
                assert_eq!(ends(&rig.ingress(&tcp(client, service, SYN)).1).1.0, old.1, "half closed");
                rig.ingress(&answer(&out, FIN | ACK));
            }
            assert_eq!(ends(&rig.ingress(&tcp(client, service, ACK)).1).1.0, old.1, "last acknowledgements");
            assert_eq!(ends(&rig.ingress(&tcp(client, service, SYN)).1).1.0, new.1);
            assert_eq!(ends(&rig.ingress(&tcp(client, service, ACK)).1).1.0, new.1, "and what follows goes with it");
            rig.ingress(&tcp(client, service, RST));
        }
    });
}

#[test]
fn a_syn_does_not_follow_an_old_connection_to_a_backend_that_is_gone() {
    isolated(|| {
        let mut rig = Rig::new();
        let (client, service) = ((CLIENT, 61_500), (VIP, TO_REMOTE));
        let second = Ipv4Addr::new(10, 42, 2, 6);
        let (_, out) = rig.ingress(&tcp(client, service, SYN));
        rig.ingress(&answer(&out, SYN | ACK));
        rig.ingress(&tcp(client, service, ACK));
        rig.maps.apply(&[Op::Backend(REMOTE_ID, backend(second, 8080, proto::TCP, false))]).unwrap();
        // What is established goes on: the pod may still be finishing.
        assert_eq!(ends(&rig.ingress(&tcp(client, service, ACK)).1).1.0, REMOTE_POD);
        assert_eq!(ends(&rig.ingress(&tcp(client, service, SYN)).1).1.0, second);
        assert_eq!(ends(&rig.ingress(&tcp(client, service, ACK)).1).1.0, second);
    });
}

#[test]
fn a_direct_connection_from_a_port_once_used_through_a_service_keeps_the_pods_address() {
    isolated(|| {
        let mut rig = Rig::new();
        let (_, out) = rig.ingress(&tcp((CLIENT, 40_000), (VIP, TO_LOCAL), SYN));
        let (client, pod) = ends(&out);
        for (from_client, flags) in [(false, SYN | ACK), (true, FIN | ACK), (false, FIN | ACK)] {
            if from_client {
                rig.ingress(&tcp((CLIENT, 40_000), (VIP, TO_LOCAL), flags));
            } else {
                assert_eq!(ends(&rig.egress(&tcp(pod, client, flags)).1).0, (VIP, TO_LOCAL));
            }
        }
        // The client's SYN to the pod itself is none of ours, and neither is the answer.
        assert_eq!(ends(&rig.ingress(&tcp(client, pod, SYN)).1), (client, pod));
        assert_eq!(ends(&rig.egress(&tcp(pod, client, SYN | ACK)).1), (pod, client));
        // Nor what follows, of either side.
        assert_eq!(ends(&rig.ingress(&tcp(client, pod, ACK)).1), (client, pod));
        assert_eq!(ends(&rig.egress(&tcp(pod, client, ACK)).1), (pod, client));
        assert_eq!(ends(&rig.egress(&tcp(pod, client, FIN | ACK)).1), (pod, client));
        assert!(entries(&rig).is_empty(), "nothing is known of the one before");
        // Through the service again, both are.
        let (_, again) = rig.ingress(&tcp((CLIENT, 40_000), (VIP, TO_LOCAL), SYN));
        let (client, pod) = ends(&again);
        assert_eq!(ends(&rig.egress(&tcp(pod, client, SYN | ACK)).1).0, (VIP, TO_LOCAL));
    });
}

#[test]
fn a_udp_flow_leaves_a_backend_that_is_gone_or_serves_no_more() {
    isolated(|| {
        let mut rig = Rig::new();
        let client = (CLIENT, 61_500);
        let id = 10 + REMOTE_ID;
        let second = Ipv4Addr::new(10, 42, 2, 6);
        let first = backend(REMOTE_POD, 8080, proto::UDP, false);
        let send = |rig: &mut Rig| {
            let (_, out) = rig.ingress(&udp(client, (VIP, TO_REMOTE), b"?"));
            ends(&out).1.0
        };
        rig.maps.apply(&[Op::Backend(100, backend(second, 8080, proto::UDP, false))]).unwrap();
        assert_eq!(send(&mut rig), REMOTE_POD);
        for stale in [
            kinesin_abi::Backend::default(),
            kinesin_abi::Backend { state: BackendState::TerminatingNotServing as u8, ..first },
            kinesin_abi::Backend { state: BackendState::Maintenance as u8, ..first },
            backend(REMOTE_POD, 8081, proto::UDP, false),
        ] {
            rig.maps.apply(&[Op::Backend(id, first), Op::Slot(id, id)]).unwrap();
            // Forget the other one, so that the flow is with the first again.
            forget_all(&rig);
            assert_eq!(send(&mut rig), REMOTE_POD);
            rig.maps.apply(&[Op::Slot(id, 100), Op::Backend(id, stale)]).unwrap();
            assert_eq!(send(&mut rig), second, "{stale:?}");
        }
        // Terminating backends keep what they have.
        rig.maps.apply(&[Op::Slot(id, 100), Op::Backend(id, first), Op::Slot(id, id)]).unwrap();
        forget_all(&rig);
        assert_eq!(send(&mut rig), REMOTE_POD);
        let leaving = kinesin_abi::Backend { state: BackendState::Terminating as u8, ..first };
        rig.maps.apply(&[Op::Slot(id, 100), Op::Backend(id, leaving)]).unwrap();
        assert_eq!(send(&mut rig), REMOTE_POD);
    });
}

#[test]
fn a_forgotten_direction_is_restored_by_the_other() {
    isolated(|| {
        let mut rig = Rig::new();
        let (_, out) = rig.ingress(&tcp((CLIENT, 40_000), (VIP, TO_REMOTE), SYN));
        let (node, pod) = ends(&out);
        let (reply_key, _) = flow(&rig, pod, node, proto::TCP).unwrap();
        // The reply entry is evicted: the client's next packet after a second brings it back.
        assert!(forget(&rig, &reply_key));
        edit(&rig, (CLIENT, 40_000), (VIP, TO_REMOTE), proto::TCP, |value| value.last_seen -= 2_000_000_000);
        rig.ingress(&tcp((CLIENT, 40_000), (VIP, TO_REMOTE), ACK));
        let (_, reply) = rig.ingress(&answer(&out, ACK));
        assert_eq!(ends(&reply), ((VIP, TO_REMOTE), (CLIENT, 40_000)));
        // The client's entry is evicted: the backend's next packet brings it back, port and all.
        let (key, _) = flow(&rig, (CLIENT, 40_000), (VIP, TO_REMOTE), proto::TCP).unwrap();
        assert!(forget(&rig, &key));
        edit(&rig, pod, node, proto::TCP, |value| value.last_seen -= 2_000_000_000);
        rig.ingress(&answer(&out, ACK));
        let (_, next) = rig.ingress(&tcp((CLIENT, 40_000), (VIP, TO_REMOTE), ACK));
        assert_eq!(ends(&next), (node, pod));
    });
}

#[test]
fn a_repeated_syn_after_eviction_keeps_the_source_port() {
    isolated(|| {
        let mut rig = Rig::new();
        let (_, first) = rig.ingress(&tcp((CLIENT, 61_500), (VIP, TO_REMOTE), SYN));
        let (key, _) = flow(&rig, (CLIENT, 61_500), (VIP, TO_REMOTE), proto::TCP).unwrap();
        assert!(forget(&rig, &key));
        let (_, again) = rig.ingress(&tcp((CLIENT, 61_500), (VIP, TO_REMOTE), SYN));
        assert_eq!(ends(&first), ends(&again));
    });
}

/// One source port for everybody.
fn one_port() -> Rig {
    let rig = Rig::new();
    rig.maps.write_settings(&kinesin_abi::Settings { snat_min: 61_000, snat_max: 61_000, ..settings() }).unwrap();
    rig
}

#[test]
fn without_a_free_source_port_the_connection_is_refused_and_counted() {
    isolated(|| {
        let mut rig = one_port();
        let (code, out) = rig.ingress(&tcp((CLIENT, 40_000), (VIP, TO_REMOTE), SYN));
        assert_eq!((code, ends(&out).0), (REDIRECT, (NODE, 61_000)));
        rig.assert_dropped(&tcp((CLIENT, 40_001), (VIP, TO_REMOTE), SYN), DropReason::NoNatMapping);
        // To another backend the port is free, and local backends need none.
        assert_eq!(rig.ingress(&udp((CLIENT, 40_001), (VIP, TO_REMOTE), b"")).0, REDIRECT);
        assert_eq!(rig.ingress(&tcp((CLIENT, 40_001), (VIP, TO_LOCAL), SYN)).0, NEXT);
    });
}

#[test]
fn the_port_of_a_connection_that_is_over_or_silent_is_taken_over() {
    isolated(|| {
        const MINUTE: u64 = 61_000_000_000;
        let mut rig = one_port();
        let open = |rig: &mut Rig, port| rig.ingress(&tcp((CLIENT, port), (VIP, TO_REMOTE), SYN));
        let (code, out) = open(&mut rig, 40_000);
        assert_eq!(code, REDIRECT);
        let (node, pod) = ends(&out);
        let age = |rig: &Rig, port, by: u64| {
            edit(rig, (CLIENT, port), (VIP, TO_REMOTE), proto::TCP, |value| value.last_seen -= by);
            edit(rig, pod, node, proto::TCP, |value| value.last_seen -= by);
        };
        // Never answered, a minute ago.
        assert_eq!(open(&mut rig, 40_001).0, SHOT);
        age(&rig, 40_000, MINUTE);
        assert_eq!(open(&mut rig, 40_001).0, REDIRECT);
        // Answered and gone on, a minute ago: established, so it stays.
        rig.ingress(&answer(&out, SYN | ACK));
        rig.ingress(&tcp((CLIENT, 40_001), (VIP, TO_REMOTE), ACK));
        age(&rig, 40_001, MINUTE);
        assert_eq!(open(&mut rig, 40_002).0, SHOT);
        // Established but silent for long; nothing can be older than the machine.
        const LONG: u64 = 8_000_000_000_000;
        if now() > LONG + 2 * MINUTE {
            age(&rig, 40_001, LONG);
            assert_eq!(open(&mut rig, 40_002).0, REDIRECT);
        }
        // Reset a moment ago: taken when nothing else is left.
        rig.ingress(&answer(&out, RST));
        assert_eq!(open(&mut rig, 40_003).0, REDIRECT);
    });
}

#[test]
fn without_settings_or_address_there_is_no_translation_but_local_backends_work() {
    isolated(|| {
        let mut rig = Rig::new();
        rig.maps.write_settings(&kinesin_abi::Settings::default()).unwrap();
        rig.assert_dropped(&tcp((CLIENT, 40_000), (VIP, TO_REMOTE), SYN), DropReason::NoNatMapping);
        assert_eq!(rig.ingress(&tcp((CLIENT, 40_000), (VIP, TO_LOCAL), SYN)).0, NEXT);
        rig.maps.write_settings(&settings()).unwrap();
        rig.maps.delete_device(rig.lan).unwrap();
        rig.assert_dropped(&tcp((CLIENT, 40_001), (VIP, TO_REMOTE), SYN), DropReason::NoNatMapping);
        assert_eq!(rig.dropped(DropReason::NoNatMapping, Direction::Ingress), 2);
    });
}
