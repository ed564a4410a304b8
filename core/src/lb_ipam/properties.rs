//! Random lives of pools and Services, against what must always hold.

use std::collections::BTreeSet;
use std::sync::Arc;

use proptest::prelude::*;
use serde_json::json;

use super::request::Request;
use super::tests::{World, key, pool};
use super::*;

/// One thing that somebody does to the cluster. Small numbers, so that things collide.
#[derive(Clone, Debug)]
enum Act {
    Put { service: u8, shape: Shape },
    Remove { service: u8 },
    PutPool { pool: u8, first: u8, len: u8, created: u8, disabled: bool, reserve: bool, blue_only: bool },
    DropPool { pool: u8 },
    Nodes(BTreeSet<u8>),
}

#[derive(Clone, Debug)]
struct Shape {
    request: Option<u8>,
    second: Option<u8>,
    share: Option<bool>,
    port: u8,
    local: bool,
    blue: bool,
    dual: bool,
    load_balancer: bool,
}

fn shape() -> impl Strategy<Value = Shape> {
    let request = (prop::option::weighted(0.3, 0..24u8), prop::option::weighted(0.1, 0..24u8));
    let rest = (prop::option::weighted(0.4, any::<bool>()), 0..3u8, prop::bool::weighted(0.2), any::<bool>());
    (request, rest, prop::bool::weighted(0.2), prop::bool::weighted(0.9)).prop_map(
        |((request, second), (share, port, local, blue), dual, load_balancer)| Shape {
            request,
            second,
            share,
            port,
            local,
            blue,
            dual,
            load_balancer,
        },
    )
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        8 => (0..8u8, shape()).prop_map(|(service, shape)| Act::Put { service, shape }),
        3 => (0..8u8).prop_map(|service| Act::Remove { service }),
        3 => (0..3u8, 0..20u8, 1..8u8, 0..3u8, prop::bool::weighted(0.2), prop::bool::weighted(0.2), prop::bool::weighted(0.3))
            .prop_map(|(pool, first, len, created, disabled, reserve, blue_only)| Act::PutPool {
                pool, first, len, created, disabled, reserve, blue_only
            }),
        1 => (0..3u8).prop_map(|pool| Act::DropPool { pool }),
        1 => prop::collection::btree_set(0..24u8, 0..2).prop_map(Act::Nodes),
    ]
}

fn service(index: u8, shape: &Shape) -> Service {
    let mut annotations = serde_json::Map::new();
    if let Some(ip) = shape.second {
        annotations.insert("lbipam.cilium.io/ips".into(), json!(format!("10.0.0.{ip}")));
    }
    if let Some(which) = shape.share {
        annotations.insert("lbipam.cilium.io/sharing-key".into(), json!(if which { "k" } else { "l" }));
        if index.is_multiple_of(2) {
            annotations.insert("lbipam.cilium.io/sharing-cross-namespace".into(), json!("*"));
        }
    }
    serde_json::from_value(json!({
        "metadata": {
            "name": format!("s{index}"), "namespace": format!("n{}", index % 3), "annotations": annotations,
            "labels": if shape.blue { json!({"color": "blue"}) } else { json!({}) },
            "creationTimestamp": format!("2026-01-0{}T00:00:00Z", 1 + index % 4),
        },
        "spec": {
            "type": if shape.load_balancer { "LoadBalancer" } else { "ClusterIP" },
            "loadBalancerIP": shape.request.map(|ip| format!("10.0.0.{ip}")).unwrap_or_default(),
            "ipFamilyPolicy": shape.dual.then_some("PreferDualStack"),
            "ports": [{"port": 80 + u16::from(shape.port)}],
            "externalTrafficPolicy": if shape.local { "Local" } else { "Cluster" },
            "selector": {"app": "web"},
        },
    }))
    .unwrap()
}

fn perform(world: &mut World, act: &Act) -> Vec<Effect> {
    match act {
        Act::Put { service: index, shape } => world.put(service(*index, shape)),
        Act::Remove { service } => world.remove(&format!("n{}/s{service}", service % 3)),
        Act::PutPool { pool: index, first, len, created, disabled, reserve, blue_only } => {
            let mut spec = json!({
                "disabled": disabled,
                "blocks": [
                    {"start": format!("10.0.0.{first}"), "stop": format!("10.0.0.{}", first + len)},
                    {"cidr": format!("10.0.{}.0/30", 1 + index)},
                    {"cidr": format!("2001:db8:{index}::/126")},
                ],
            });
            if *reserve {
                spec["allowFirstLastIPs"] = json!("No");
            }
            if *blue_only {
                spec["serviceSelector"] = json!({"matchLabels": {"color": "blue"}});
            }
            world.put_pool(pool(&format!("p{index}"), &format!("2026-01-0{}", created + 1), spec))
        }
        Act::DropPool { pool } => world.drop_pool(&format!("p{pool}")),
        Act::Nodes(addresses) => {
            world.nodes = addresses.iter().map(|n| format!("10.0.0.{n}").parse().unwrap()).collect();
            world.step(Input::NodeAddresses(world.nodes.clone()))
        }
    }
}

fn addresses(world: &World) -> BTreeMap<ObjectKey, BTreeSet<IpAddr>> {
    world.services.iter().map(|(key, service)| (key.clone(), service.ingress_addresses().collect())).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn no_address_is_held_by_two_services_unless_they_share_it(acts in prop::collection::vec(act(), 1..40)) {
        let mut world = World::new();
        for act in &acts {
            perform(&mut world, act);
            // Judged by the objects, not by the allocator's own books.
            let mut seen: BTreeMap<IpAddr, Vec<Request>> = BTreeMap::new();
            for service in world.services.values() {
                for ip in service.ingress_addresses() {
                    let request = Request::read(service, &world.config);
                    let others = seen.entry(ip).or_default();
                    for other in others.iter() {
                        prop_assert_eq!(request.conflict_with(other), None, "{} twice", ip);
                    }
                    others.push(request);
                    prop_assert!(world.allocator.pool_of(ip).is_some(), "{} is in no pool", ip);
                    prop_assert!(!world.nodes.contains(&ip), "{} is a node's", ip);
                }
            }
        }
    }

    #[test]
    fn r14_a_restart_changes_nothing(acts in prop::collection::vec(act(), 1..40)) {
        let mut world = World::new();
        for act in &acts {
            perform(&mut world, act);
            for reversed in [false, true] {
                let (allocator, effects) = world.restarted(reversed);
                prop_assert_eq!(&effects, &vec![]);
                prop_assert_eq!(&allocator.holders, &world.allocator.holders);
                prop_assert_eq!(allocator.stats(), world.allocator.stats());
            }
        }
    }

    #[test]
    fn r15_an_address_changes_only_if_its_own_service_or_a_pool_changed(acts in prop::collection::vec(act(), 1..40)) {
        let mut world = World::new();
        for act in &acts {
            let before = addresses(&world);
            perform(&mut world, act);
            let after = addresses(&world);
            let changed = match act {
                Act::Put { service, .. } | Act::Remove { service } => key(&format!("n{}/s{service}", service % 3)),
                _ => continue,
            };
            for (key, had) in before.iter().filter(|(key, _)| **key != changed) {
                prop_assert!(after[key].is_superset(had), "{} had {:?}, has {:?}", key, had, after[key]);
            }
        }
    }

    #[test]
    fn r17_free_and_used_make_up_each_pool(acts in prop::collection::vec(act(), 1..60)) {
        let mut world = World::new();
        for act in &acts {
            perform(&mut world, act);
            for pool in world.allocator.stats().pools {
                prop_assert_eq!(pool.used + pool.available, pool.total);
                let state = world.allocator.pools.get(&pool.name).unwrap();
                let held = world.services.values().flat_map(|s| s.ingress_addresses().collect::<Vec<_>>());
                let mut taken: BTreeSet<IpAddr> = held.filter(|ip| state.contains(*ip)).collect();
                taken.extend(world.nodes.iter().filter(|ip| state.contains(**ip)));
                taken.extend(state.reserved_ends());
                prop_assert_eq!(pool.used, Count::from(taken.len() as u128));
            }
        }
    }

    #[test]
    fn equal_histories_have_equal_effects(acts in prop::collection::vec(act(), 1..40)) {
        let (mut one, mut two) = (World::new(), World::new());
        for act in &acts {
            prop_assert_eq!(perform(&mut one, act), perform(&mut two, act));
        }
    }

    #[test]
    fn the_first_decision_does_not_depend_on_the_order_of_events(
        acts in prop::collection::vec(act(), 1..40),
        statuses in prop::collection::vec((0..8u8, 0..24u8), 0..8),
    ) {
        let mut world = World::new();
        for act in &acts {
            perform(&mut world, act);
        }
        // Statuses that nobody has checked, as somebody else's controller may have left them.
        for (index, ip) in statuses {
            if let Some(service) = world.services.get_mut(&key(&format!("n{}/s{index}", index % 3))) {
                let entry = json!([{"ip": format!("10.0.0.{ip}")}]);
                Arc::make_mut(service).status.load_balancer.ingress = serde_json::from_value(entry).unwrap();
            }
        }
        let ((one, effects), (two, reversed)) = (world.restarted(false), world.restarted(true));
        prop_assert_eq!(effects, reversed);
        prop_assert_eq!(one.holders, two.holders);
    }

    #[test]
    fn no_text_in_a_pool_or_a_request_makes_it_panic(
        texts in prop::collection::vec("[0-9a-f:./ -]{0,12}|::|::/0|0.0.0.0/0|255.255.255.255|ffff::|.{0,8}", 6),
    ) {
        let mut world = World::new();
        let spec = json!({
            "allowFirstLastIPs": "No",
            "blocks": [{"cidr": texts[0]}, {"start": texts[1], "stop": texts[2]}, {"start": texts[3]}, {"cidr": "::/0"}],
        });
        world.put_pool(pool("p", &texts[4], spec));
        let object = json!({
            "metadata": {"name": "s", "annotations": {"lbipam.cilium.io/ips": texts[4]}},
            "spec": {"type": "LoadBalancer", "loadBalancerIP": texts[5]},
        });
        world.put(serde_json::from_value(object).unwrap());
        prop_assert_eq!(world.restarted(true).1, vec![]);
    }
}
