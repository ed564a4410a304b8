//! Session affinity: a client comes back to the backend that it had, for as long as it may and the backend serves.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use kinesin::datapath::MapStore;
use kinesin_abi::{
    AFFINITY_NETNS, AffinityKey, AffinityValue, Backend, FrontendKind, FrontendValue, MAGLEV_TABLE_SIZE, SetRef,
    frontend_flags, maglev_hash, maglev_index, proto,
};
use kinesin_core::plan::Op;

use crate::flows::bytes;
use crate::packets::{SYN, ends, packet, tcp};
use crate::rig::*;

const PORT: u16 = 90;
const SERVICE: u32 = 7;
const SECOND: u64 = 1_000_000_000;
/// `sessionAffinityConfig.clientIP.timeoutSeconds`
const TIMEOUT: u32 = 100;
/// Where the set lies, and the first of its backends.
const BASE: u32 = 100;
const FIRST: u32 = 200;

fn pod(number: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(Ipv4Addr::new(10, 42, 1, 10).to_bits() + number)
}

fn sticky(count: u32, flags: u32) -> FrontendValue {
    let set = SetRef { base: BASE, count };
    FrontendValue {
        service: SERVICE,
        affinity: TIMEOUT,
        external: set,
        internal: set,
        ..value(FrontendKind::LoadBalancer, frontend_flags::ROUTABLE | frontend_flags::AFFINITY | flags, 0, 0)
    }
}

/// `count` local backends behind port [`PORT`], with affinity.
fn serve(rig: &Rig, count: u32) {
    let mut ops: Vec<Op> = (0..count)
        .map(|n| Op::Backend(FIRST + n, backend(pod(n), 8080, proto::TCP, true)))
        .chain((0..count).map(|n| Op::Slot(BASE + n, FIRST + n)))
        .collect();
    ops.push(Op::PutFrontend(frontend(VIP, PORT, proto::TCP), sticky(count, 0)));
    rig.maps.apply(&ops).unwrap();
}

/// Where a new connection of the client goes.
fn connect(rig: &mut Rig, client: Ipv4Addr, port: u16) -> Ipv4Addr {
    let (code, out) = rig.ingress(&tcp((client, port), (VIP, PORT), SYN));
    assert_eq!(code, NEXT);
    ends(&out).1.0
}

fn key(client: Ipv4Addr) -> AffinityKey {
    AffinityKey { client: client.into(), service: SERVICE, flags: 0 }
}

fn entry(rig: &Rig, client: Ipv4Addr) -> Option<AffinityValue> {
    let all = rig.maps.raw_entries("affinity").unwrap();
    let (_, value) = all.into_iter().find(|(found, _)| found.as_slice() == bytes(&key(client)))?;
    let word = |at: usize| u32::from_ne_bytes(value[at..at + 4].try_into().unwrap());
    let last_used = u64::from_ne_bytes(value[..8].try_into().unwrap());
    Some(AffinityValue { last_used, backend: word(8), position: word(12) })
}

fn bind(rig: &Rig, client: Ipv4Addr, value: AffinityValue) {
    rig.maps.raw_put("affinity", bytes(&key(client)), bytes(&value)).unwrap();
}

/// How many backends so many new connections of one client meet.
fn met(rig: &mut Rig, client: Ipv4Addr, ports: std::ops::Range<u16>) -> BTreeSet<Ipv4Addr> {
    ports.map(|port| connect(rig, client, port)).collect()
}

#[test]
fn a_client_stays_with_its_backend_and_clients_spread() {
    isolated(|| {
        let mut rig = Rig::new();
        serve(&rig, 8);
        let mut used = BTreeSet::new();
        for last in 50..90 {
            let client = Ipv4Addr::new(192, 168, 1, last);
            let backends = met(&mut rig, client, 20_000..20_010);
            assert_eq!(backends.len(), 1, "{client} stays with one");
            used.extend(backends);
        }
        assert!(used.len() > 4, "forty clients use more than {used:?}");
        let shown = rig.maps.dump_raw("affinity").unwrap();
        let line = shown.iter().find(|(key, _)| key == "192.168.1.50 service=7");
        assert!(line.is_some_and(|(_, value)| value.starts_with("backend=2")), "{shown:?}");
    });
}

#[test]
fn without_affinity_nothing_is_remembered() {
    isolated(|| {
        let mut rig = Rig::new();
        serve(&rig, 8);
        let plain = FrontendValue { flags: sticky(8, 0).flags & !frontend_flags::AFFINITY, ..sticky(8, 0) };
        rig.maps.apply(&[Op::PutFrontend(frontend(VIP, PORT, proto::TCP), plain)]).unwrap();
        assert!(met(&mut rig, CLIENT, 20_000..20_040).len() > 1);
        assert!(rig.maps.raw_entries("affinity").unwrap().is_empty());
    });
}

#[test]
fn a_bond_ends_when_the_timeout_has_passed_and_is_renewed_by_each_connection() {
    isolated(|| {
        let mut rig = Rig::new();
        serve(&rig, 8);
        let timeout = u64::from(TIMEOUT) * SECOND;
        // Ten seconds before the end it holds, however often it is tried, and each connection renews it.
        for n in 0..20 {
            let last_used = now() - timeout + 10 * SECOND;
            bind(&rig, CLIENT, AffinityValue { last_used, backend: FIRST + 3, position: 3 });
            assert_eq!(connect(&mut rig, CLIENT, 21_000 + n), pod(3));
            assert!(entry(&rig, CLIENT).unwrap().last_used > last_used + 5 * SECOND);
        }
        // Just after the end, and a tick of the clock, it does not: of twenty choices some fall on others, and the choice is
        // written down.
        let mut chosen = BTreeSet::new();
        for n in 0..20 {
            let last_used = now() - timeout - SECOND / 10;
            bind(&rig, CLIENT, AffinityValue { last_used, backend: FIRST + 3, position: 3 });
            let to = connect(&mut rig, CLIENT, 22_000 + n);
            let value = entry(&rig, CLIENT).unwrap();
            assert_eq!(pod(value.backend - FIRST), to);
            chosen.insert(to);
        }
        assert!(chosen.len() > 1, "{chosen:?}");
    });
}

#[test]
fn an_edited_timeout_counts_for_bonds_that_are_there() {
    isolated(|| {
        let mut rig = Rig::new();
        serve(&rig, 8);
        let old = AffinityValue { last_used: now() - 50 * SECOND, backend: FIRST + 3, position: 3 };
        let with = |rig: &Rig, affinity| {
            let frontend = frontend(VIP, PORT, proto::TCP);
            rig.maps.apply(&[Op::PutFrontend(frontend, FrontendValue { affinity, ..sticky(8, 0) })]).unwrap();
        };
        let spread = |rig: &mut Rig, ports: std::ops::Range<u16>| -> usize {
            let backends: BTreeSet<_> = ports
                .map(|port| {
                    bind(rig, CLIENT, old);
                    connect(rig, CLIENT, port)
                })
                .collect();
            backends.len()
        };
        assert_eq!(spread(&mut rig, 20_000..20_020), 1);
        with(&rig, 20);
        assert!(spread(&mut rig, 21_000..21_020) > 1, "fifty seconds are too long now");
        with(&rig, 86_400);
        assert_eq!(spread(&mut rig, 22_000..22_020), 1);
    });
}

#[test]
fn a_backend_that_left_the_set_is_not_used_although_another_service_has_it() {
    isolated(|| {
        let mut rig = Rig::new();
        serve(&rig, 4);
        bind(&rig, CLIENT, AffinityValue { last_used: now(), backend: FIRST + 1, position: 1 });
        assert_eq!(connect(&mut rig, CLIENT, 20_000), pod(1));
        // As the planner does it: the last one closes the gap. The backend itself stays, active, for somebody else.
        rig.maps
            .apply(&[
                Op::Slot(BASE + 1, FIRST + 3),
                Op::PutFrontend(frontend(VIP, PORT, proto::TCP), sticky(3, 0)),
                Op::Slot(BASE + 3, 0),
            ])
            .unwrap();
        assert!(rig.maps.read().unwrap().backends.iter().any(|(id, _)| *id == FIRST + 1));
        let next = met(&mut rig, CLIENT, 21_000..21_020);
        assert_eq!(next.len(), 1, "the client stays with the next one");
        assert!(!next.contains(&pod(1)));
        // The client of the one that moved to close the gap goes on with it, and its new place is noted.
        let other = Ipv4Addr::new(192, 168, 1, 60);
        bind(&rig, other, AffinityValue { last_used: now(), backend: FIRST + 3, position: 3 });
        assert_eq!(connect(&mut rig, other, 20_000), pod(3));
        assert_eq!(entry(&rig, other).unwrap().position, 1);
        // A slot behind the set is none of it, whatever it holds.
        rig.maps.apply(&[Op::Slot(BASE + 3, FIRST + 1)]).unwrap();
        bind(&rig, CLIENT, AffinityValue { last_used: now(), backend: FIRST + 1, position: 3 });
        assert!(!met(&mut rig, CLIENT, 22_000..22_020).contains(&pod(1)));
    });
}

#[test]
fn a_set_that_moved_or_became_empty_is_met_safely() {
    isolated(|| {
        let mut rig = Rig::new();
        serve(&rig, 4);
        bind(&rig, CLIENT, AffinityValue { last_used: now(), backend: FIRST + 2, position: 2 });
        let moved = SetRef { base: 300, count: 4 };
        let mut ops: Vec<Op> = (0..4).map(|n| Op::Slot(300 + n, FIRST + 3 - n)).collect();
        let at = FrontendValue { external: moved, internal: moved, ..sticky(4, 0) };
        ops.push(Op::PutFrontend(frontend(VIP, PORT, proto::TCP), at));
        rig.maps.apply(&ops).unwrap();
        assert_eq!(connect(&mut rig, CLIENT, 20_000), pod(2));
        assert_eq!(entry(&rig, CLIENT).unwrap().position, 1);
        // A freed backend in a slot, as between two writes of a foreign hand: another one is chosen.
        rig.maps.apply(&[Op::Backend(FIRST + 2, Backend::default())]).unwrap();
        assert!(!met(&mut rig, CLIENT, 21_000..21_010).contains(&pod(2)));
        rig.maps.apply(&[Op::PutFrontend(frontend(VIP, PORT, proto::TCP), sticky(0, 0))]).unwrap();
        let (code, _) = rig.ingress(&tcp((CLIENT, 23_000), (VIP, PORT), SYN));
        assert_eq!(code, REDIRECT, "answered with port unreachable");
    });
}

#[test]
fn two_services_and_two_networks_do_not_share_bonds() {
    isolated(|| {
        let mut rig = Rig::new();
        serve(&rig, 8);
        let other = FrontendValue { service: SERVICE + 1, ..sticky(8, 0) };
        rig.maps.apply(&[Op::PutFrontend(frontend(VIP, PORT + 1, proto::TCP), other)]).unwrap();
        let bound = AffinityValue { last_used: now(), backend: FIRST + 5, position: 5 };
        bind(&rig, CLIENT, bound);
        // A network namespace whose cookie looks like the client's address.
        let netns = AffinityKey { flags: AFFINITY_NETNS, ..key(Ipv4Addr::new(192, 168, 1, 60)) };
        rig.maps.raw_put("affinity", bytes(&netns), bytes(&bound)).unwrap();
        let others: BTreeSet<Ipv4Addr> = (0..12u8)
            .map(|n| {
                let client = Ipv4Addr::new(192, 168, 1, 100 + n);
                let (_, out) = rig.ingress(&packet(proto::TCP, (client, 20_000), (VIP, PORT + 1)));
                ends(&out).1.0
            })
            .collect();
        assert!(others.len() > 1);
        rig.ingress(&packet(proto::TCP, (CLIENT, 20_000), (VIP, PORT + 1)));
        rig.ingress(&packet(proto::TCP, (Ipv4Addr::new(192, 168, 1, 60), 20_000), (VIP, PORT)));
        assert_eq!(rig.maps.raw_entries("affinity").unwrap().len(), 2 + 12 + 2);
    });
}

#[test]
fn maglev_with_affinity_leaves_the_source_port_out() {
    isolated(|| {
        let mut rig = Rig::new();
        serve(&rig, 8);
        let table = (0..MAGLEV_TABLE_SIZE).map(|i| FIRST + i % 8).collect();
        let tabled = sticky(8, frontend_flags::MAGLEV);
        rig.maps
            .apply(&[Op::PutMaglev(BASE, table), Op::PutFrontend(frontend(VIP, PORT, proto::TCP), tabled)])
            .unwrap();
        for last in 50..60 {
            let client = Ipv4Addr::new(192, 168, 1, last);
            let seed = rig.maps.settings().unwrap().maglev_seed;
            let port = kinesin_abi::Be16::new;
            let index =
                maglev_index(maglev_hash(&client.into(), port(0), port(PORT), proto::TCP, seed), MAGLEV_TABLE_SIZE);
            for source in 20_000..20_005 {
                assert_eq!(connect(&mut rig, client, source), pod(index % 8));
                // As if this node had never seen the client: the table leads it to the same backend.
                rig.maps.raw_delete("affinity", bytes(&key(client))).unwrap();
            }
            // A bond stands, whatever the table says; the place of a backend from a table is found by search.
            bind(&rig, client, AffinityValue { last_used: now(), backend: FIRST + 6, position: 0 });
            assert_eq!(connect(&mut rig, client, 30_000), pod(6));
            assert_eq!(entry(&rig, client).unwrap().position, 6);
        }
    });
}
