//! Source ranges: who is served, who is counted as denied, and that the trie comes back when somebody changes it.

use std::net::Ipv4Addr;

use kinesin::datapath::MapStore;
use kinesin_abi::{
    DropReason, FrontendKind, FrontendValue, SOURCE_RANGE_BITS, SOURCE_RANGE_DENY, SOURCE_RANGE_IPV6, SourceRange,
    SourceRangeKey, frontend_flags, proto,
};
use kinesin_core::objects::{ObjectKey, Service};
use kinesin_core::plan::{Limits, Op, Planner};
use kinesin_core::services::{NodeContext, compile};

use crate::flows::bytes;
use crate::packets::{SYN, ends, tcp, udp};
use crate::rig::*;

const PORT: u16 = 95;
const SERVICE: u32 = 12;
const OTHER: Ipv4Addr = Ipv4Addr::new(192, 168, 2, 50);

/// A network of the service's list.
fn range(list: u32, network: [u8; 4], bits: u32) -> SourceRangeKey {
    let addr = Ipv4Addr::from(network).into();
    let range = SourceRange { service: SERVICE, list, addr };
    SourceRangeKey { prefix_len: SOURCE_RANGE_BITS + 96 + bits, range }
}

fn serve(rig: &Rig, flags: u32) {
    let restricted = FrontendValue {
        service: SERVICE,
        ..value(FrontendKind::LoadBalancer, frontend_flags::ROUTABLE | flags, LOCAL_ID, 1)
    };
    rig.maps.apply(&[Op::PutFrontend(frontend(VIP, PORT, proto::TCP), restricted)]).unwrap();
}

/// A new connection of the client, which is served or counted as denied.
fn served(rig: &mut Rig, client: Ipv4Addr, port: u16) -> bool {
    let syn = tcp((client, port), (VIP, PORT), SYN);
    let before = rig.dropped(DropReason::SourceRange, kinesin_abi::Direction::Ingress);
    let (code, out) = rig.ingress(&syn);
    let denied = rig.dropped(DropReason::SourceRange, kinesin_abi::Direction::Ingress) - before;
    match code {
        NEXT => assert_eq!((ends(&out).1, denied), ((LOCAL_POD, 8080), 0)),
        code => assert_eq!((code, denied), (SHOT, 1)),
    }
    code == NEXT
}

const ALLOW: u32 = frontend_flags::SOURCE_RANGES;
const DENY: u32 = frontend_flags::SOURCE_RANGES | frontend_flags::SOURCE_RANGES_DENY;

#[test]
fn only_clients_of_the_listed_networks_are_served() {
    isolated(|| {
        let mut rig = Rig::new();
        serve(&rig, ALLOW);
        assert!(!served(&mut rig, CLIENT, 1), "an empty list lets nobody in");
        rig.maps.apply(&[Op::PutSourceRange(range(0, [192, 168, 1, 0], 24))]).unwrap();
        assert!(served(&mut rig, CLIENT, 2) && !served(&mut rig, OTHER, 2));
        // What is known already goes on, as the list concerns new connections.
        rig.maps.apply(&[Op::DeleteSourceRange(range(0, [192, 168, 1, 0], 24))]).unwrap();
        assert!(served(&mut rig, CLIENT, 2) && !served(&mut rig, CLIENT, 3));
        for (network, bits, both) in [([192, 168, 1, 50], 32, false), ([192, 168, 0, 0], 16, true), ([0; 4], 0, true)] {
            let key = range(0, network, bits);
            rig.maps.apply(&[Op::PutSourceRange(key)]).unwrap();
            let port = 100 + bits as u16;
            assert_eq!((served(&mut rig, CLIENT, port), served(&mut rig, OTHER, port)), (true, both), "{key:?}");
            rig.maps.apply(&[Op::DeleteSourceRange(key)]).unwrap();
        }
    });
}

#[test]
fn a_denying_list_serves_everybody_else_and_lists_do_not_mix() {
    isolated(|| {
        let mut rig = Rig::new();
        serve(&rig, DENY);
        assert!(served(&mut rig, CLIENT, 1));
        rig.maps.apply(&[Op::PutSourceRange(range(SOURCE_RANGE_DENY, [192, 168, 1, 0], 24))]).unwrap();
        assert!(!served(&mut rig, CLIENT, 2) && served(&mut rig, OTHER, 2));
        // Neither another service's list, nor the one of those served, nor `::/0` says anything about it.
        let of_other =
            |key: SourceRangeKey| SourceRangeKey { range: SourceRange { service: SERVICE + 1, ..key.range }, ..key };
        let all6 = SourceRange { list: SOURCE_RANGE_DENY | SOURCE_RANGE_IPV6, service: SERVICE, ..Default::default() };
        rig.maps
            .apply(&[
                Op::PutSourceRange(of_other(range(SOURCE_RANGE_DENY, [0; 4], 0))),
                Op::PutSourceRange(range(0, [192, 168, 1, 0], 24)),
                Op::PutSourceRange(SourceRangeKey { prefix_len: SOURCE_RANGE_BITS, range: all6 }),
            ])
            .unwrap();
        assert!(!served(&mut rig, CLIENT, 3) && served(&mut rig, OTHER, 3));
        serve(&rig, ALLOW);
        assert!(served(&mut rig, CLIENT, 4) && !served(&mut rig, OTHER, 4));
        serve(&rig, 0);
        assert!(served(&mut rig, CLIENT, 5) && served(&mut rig, OTHER, 5));
        let shown = rig.maps.dump_raw("ranges").unwrap();
        let line = |text: &str| shown.iter().any(|(key, _)| key == text);
        assert!(line("service=12 deny 192.168.1.0/24") && line("service=12 deny ::/0"), "{shown:?}");
    });
}

#[test]
fn r40_edits_end_as_if_created_so_and_the_trie_is_repaired_when_tampered_with() {
    isolated(|| {
        let mut rig = Rig::new();
        let web = |ranges: &[&str], policy: Option<&str>| -> Service {
            let policy = policy.unwrap_or("allow");
            serde_json::from_value(serde_json::json!({
                "metadata": {"name": "web", "annotations": {"service.cilium.io/src-ranges-policy": policy}},
                "spec": {"type": "LoadBalancer", "loadBalancerSourceRanges": ranges,
                    "ports": [{"name": "http", "port": 80}, {"name": "https", "port": 443}]},
                "status": {"loadBalancer": {"ingress": [{"ip": "10.0.0.200"}]}},
            }))
            .unwrap()
        };
        // The rig's own services are nobody's: adopted, and pruned.
        let mut planner = Planner::new(Limits { frontends: 1024, slots: 4096, backends: 1024, ..Limits::default() });
        let ops = planner.adopt(rig.maps.read().unwrap());
        rig.maps.apply(&ops).unwrap();
        rig.maps.apply(&planner.prune()).unwrap();
        let key = ObjectKey::new("default", "web");
        let vip = Ipv4Addr::new(10, 0, 0, 200);
        let dropped = |rig: &mut Rig, client: Ipv4Addr| {
            let before = rig.dropped(DropReason::SourceRange, kinesin_abi::Direction::Ingress);
            rig.ingress(&udp((client, 9), (vip, 80), b""));
            rig.ingress(&tcp((client, 9), (vip, 80), SYN));
            rig.dropped(DropReason::SourceRange, kinesin_abi::Direction::Ingress) - before
        };
        let steps: [(&[&str], Option<&str>, u64, u64); 6] = [
            (&["192.168.1.0/24"], None, 0, 1),
            (&["192.168.1.0/24", "192.168.2.0/24"], None, 0, 0),
            (&["192.168.2.0/24"], None, 1, 0),
            (&["192.168.2.0/24"], Some("deny"), 0, 1),
            (&["nonsense"], Some("deny"), 1, 1),
            (&[], None, 0, 0),
        ];
        for (ranges, policy, client, other) in steps {
            let compiled = compile(&web(ranges, policy), std::iter::empty(), &NodeContext::default());
            rig.maps.apply(&planner.update(&key, &compiled).unwrap()).unwrap();
            assert_eq!((dropped(&mut rig, CLIENT), dropped(&mut rig, OTHER)), (client, other), "{ranges:?} {policy:?}");
            assert_eq!(planner.repair(&rig.maps.read().unwrap()), [], "{ranges:?}");
            // A network that is missing, one that opens everything, and one written with host bits.
            let expected = rig.maps.raw_entries("ranges").unwrap();
            for (key, _) in expected.iter().take(1) {
                assert!(rig.maps.raw_delete("ranges", key).unwrap());
            }
            let everything = SourceRangeKey::default();
            let host_bits = range(0, [10, 1, 2, 3], 8);
            for key in [everything, host_bits] {
                rig.maps.raw_put("ranges", bytes(&key), &7u32.to_ne_bytes()).unwrap();
            }
            rig.maps.apply(&planner.repair(&rig.maps.read().unwrap())).unwrap();
            assert_eq!(rig.maps.raw_entries("ranges").unwrap(), expected);
            // A restart takes over what is there.
            let mut next = Planner::new(Limits::default());
            assert_eq!(next.adopt(rig.maps.read().unwrap()), []);
            assert_eq!(next.update(&key, &compiled), Ok(vec![]));
            assert_eq!(next.prune(), []);
            planner = next;
        }
        assert!(rig.maps.raw_entries("ranges").unwrap().is_empty());
    });
}
