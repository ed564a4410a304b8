//! UDP flows whose service or backend goes away, of senders that never stop and never change their port.

use std::net::Ipv4Addr;

use kinesin::datapath::MapStore;
use kinesin_abi::{Backend, BackendState, DropReason, FrontendKind, FrontendValue, SetRef, frontend_flags, proto};
use kinesin_core::plan::Op;

use crate::flows::entries;
use crate::packets::{End, ends, udp};
use crate::rig::*;

const SENDER: End = (CLIENT, 61_500);
const SERVICE: End = (VIP, 53);
const OTHER: End = (VIP, 54);
/// Slots of the service, and of another one with the same pods.
const SLOTS: u32 = 40;
const OTHER_SLOTS: u32 = 60;

fn pod(last: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 42, 2, last)
}

fn id(last: u8) -> u32 {
    100 + u32::from(last)
}

fn put(service: End, base: u32, count: u32) -> Op {
    let flags = frontend_flags::ROUTABLE;
    Op::PutFrontend(frontend(service.0, service.1, proto::UDP), value(FrontendKind::LoadBalancer, flags, base, count))
}

fn backends(pods: &[u8]) -> Vec<Op> {
    pods.iter().map(|last| Op::Backend(id(*last), backend(pod(*last), 53, proto::UDP, false))).collect()
}

fn members(base: u32, pods: &[u8]) -> Vec<Op> {
    (base..).zip(pods).map(|(slot, last)| Op::Slot(slot, id(*last))).collect()
}

/// Sends a datagram; returns the pod that it is sent to. (Who has none is answered with an ICMP error.)
fn send(rig: &mut Rig) -> Option<Ipv4Addr> {
    const PROTOCOL: usize = 23;
    let (code, out) = rig.ingress(&udp(SENDER, SERVICE, b"tick"));
    (code == REDIRECT && out[PROTOCOL] == proto::UDP).then(|| ends(&out).1.0)
}

#[test]
fn r19_a_one_way_stream_follows_its_service_to_zero_and_back() {
    isolated(|| {
        let mut rig = Rig::new();
        rig.maps.apply(&[backends(&[1, 2]), members(SLOTS, &[1, 2]), vec![put(SERVICE, SLOTS, 2)]].concat()).unwrap();
        let first = send(&mut rig).expect("served");
        for _ in 0..5 {
            assert_eq!(send(&mut rig), Some(first), "a stream stays where it is");
        }
        // To zero, as the planner writes it: the frontend, then slots and backends.
        let free = [1, 2].map(|last| Op::Backend(id(last), Backend::default()));
        rig.maps.apply(&[put(SERVICE, 0, 0), Op::Slot(SLOTS, 0), Op::Slot(SLOTS + 1, 0)]).unwrap();
        for _ in 0..5 {
            assert_eq!(send(&mut rig), None, "not one packet to a pod that is gone");
        }
        rig.maps.apply(&free).unwrap();
        assert_eq!(send(&mut rig), None);
        // And back: other pods, of which one has the id of the stream's old one.
        let mut new = backends(&[3]);
        new.push(Op::Backend(id(1), backend(pod(4), 53, proto::UDP, false)));
        new.extend([Op::Slot(SLOTS, id(3)), Op::Slot(SLOTS + 1, id(1)), put(SERVICE, SLOTS, 2)]);
        rig.maps.apply(&new).unwrap();
        let next = send(&mut rig).expect("served again");
        assert!([pod(3), pod(4)].contains(&next), "{next}");
        assert_eq!(send(&mut rig), Some(next));
        // It is one flow still.
        assert_eq!(entries(&rig).iter().filter(|(key, _)| key.src == SENDER.0.into()).count(), 1);
    });
}

#[test]
fn r20_a_stream_with_a_fixed_port_outlives_the_deletion_of_its_service() {
    isolated(|| {
        let mut rig = Rig::new();
        // Another service has the same pods, so that they stay whatever becomes of this one.
        let both = [
            backends(&[1, 2]),
            members(SLOTS, &[1]),
            members(OTHER_SLOTS, &[1, 2]),
            vec![put(SERVICE, SLOTS, 1), put(OTHER, OTHER_SLOTS, 2)],
        ];
        rig.maps.apply(&both.concat()).unwrap();
        for round in 0..3 {
            let (now, then) = if round % 2 == 0 { (1, 2) } else { (2, 1) };
            assert_eq!(send(&mut rig), Some(pod(now)), "{round}");
            rig.maps
                .apply(&[Op::DeleteFrontend(frontend(SERVICE.0, SERVICE.1, proto::UDP)), Op::Slot(SLOTS, 0)])
                .unwrap();
            rig.assert_dropped(&udp(SENDER, SERVICE, b"tick"), DropReason::NoBackend);
            let again = [members(SLOTS, &[then]), vec![put(SERVICE, SLOTS, 1)]];
            rig.maps.apply(&again.concat()).unwrap();
            assert_eq!(send(&mut rig), Some(pod(then)), "{round}: not the pod of the old service");
        }
    });
}

#[test]
fn a_backend_that_leaves_one_service_and_stays_in_another_ends_the_flows_of_the_first() {
    isolated(|| {
        let mut rig = Rig::new();
        let all = [backends(&[1, 2, 3]), members(SLOTS, &[1]), vec![put(SERVICE, SLOTS, 1)]];
        rig.maps.apply(&all.concat()).unwrap();
        rig.maps.apply(&[members(OTHER_SLOTS, &[1, 2, 3]), vec![put(OTHER, OTHER_SLOTS, 3)]].concat()).unwrap();
        assert_eq!(send(&mut rig), Some(pod(1)));
        // Members around it change, it moves to another place: the stream stays.
        rig.maps.apply(&[members(SLOTS, &[2, 3, 1]), vec![put(SERVICE, SLOTS, 3)]].concat()).unwrap();
        for _ in 0..3 {
            assert_eq!(send(&mut rig), Some(pod(1)));
        }
        // The whole set moves to other slots.
        let moved = [members(SLOTS + 8, &[3, 1, 2]), vec![put(SERVICE, SLOTS + 8, 3)]];
        rig.maps.apply(&moved.concat()).unwrap();
        rig.maps.apply(&[Op::Slot(SLOTS, 0), Op::Slot(SLOTS + 1, 0), Op::Slot(SLOTS + 2, 0)]).unwrap();
        for _ in 0..3 {
            assert_eq!(send(&mut rig), Some(pod(1)));
        }
        // It leaves this service alone.
        let left = [members(SLOTS + 8, &[3, 2]), vec![put(SERVICE, SLOTS + 8, 2), Op::Slot(SLOTS + 10, 0)]];
        rig.maps.apply(&left.concat()).unwrap();
        let next = send(&mut rig).expect("served");
        assert!([pod(2), pod(3)].contains(&next), "{next}");
        assert_eq!(send(&mut rig), Some(next));
    });
}

#[test]
fn a_terminating_backend_keeps_its_flows_only_while_the_service_exists() {
    isolated(|| {
        let mut rig = Rig::new();
        rig.maps.apply(&[backends(&[1, 2]), members(SLOTS, &[1]), vec![put(SERVICE, SLOTS, 1)]].concat()).unwrap();
        assert_eq!(send(&mut rig), Some(pod(1)));
        let leaving = Backend { state: BackendState::Terminating as u8, ..backend(pod(1), 53, proto::UDP, false) };
        rig.maps.apply(&[members(SLOTS, &[2]), vec![Op::Backend(id(1), leaving)]].concat()).unwrap();
        assert_eq!(send(&mut rig), Some(pod(1)), "it finishes what it has");
        rig.maps.apply(&[Op::DeleteFrontend(frontend(SERVICE.0, SERVICE.1, proto::UDP))]).unwrap();
        assert_eq!(send(&mut rig), None);
    });
}

#[test]
fn a_member_far_behind_in_a_large_set_keeps_its_flows() {
    isolated(|| {
        let mut rig = Rig::new();
        // More members than are searched: one pod in all of them but the last.
        let many: Vec<Op> = (0..400).map(|n| Op::Slot(1000 + n, if n < 399 { id(2) } else { id(1) })).collect();
        let set = |base, count| FrontendValue {
            external: SetRef { base, count },
            ..value(FrontendKind::LoadBalancer, frontend_flags::ROUTABLE, base, count)
        };
        let key = frontend(SERVICE.0, SERVICE.1, proto::UDP);
        rig.maps
            .apply(&[backends(&[1, 2]), members(SLOTS, &[1]), vec![Op::PutFrontend(key, set(SLOTS, 1))]].concat())
            .unwrap();
        assert_eq!(send(&mut rig), Some(pod(1)));
        rig.maps.apply(&[many, vec![Op::PutFrontend(key, set(1000, 400)), Op::Slot(SLOTS, 0)]].concat()).unwrap();
        for _ in 0..3 {
            assert_eq!(send(&mut rig), Some(pod(1)));
        }
    });
}
