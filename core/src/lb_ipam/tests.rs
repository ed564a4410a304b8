use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use serde_json::json;

use super::range::{Count, parse_block};
use super::*;
use crate::objects::{IngressEntry, Object, PoolBlock};

pub(super) fn pool(name: &str, created: &str, spec: serde_json::Value) -> Arc<Pool> {
    let object = json!({"metadata": {"name": name, "creationTimestamp": created}, "spec": spec});
    Arc::new(serde_json::from_value(object).unwrap())
}

fn service(name: &str, spec: serde_json::Value) -> Service {
    annotated(name, spec, json!({}))
}

fn annotated(name: &str, mut spec: serde_json::Value, annotations: serde_json::Value) -> Service {
    spec["type"] = spec.get("type").cloned().unwrap_or(json!("LoadBalancer"));
    let (namespace, name) = name.split_once('/').unwrap_or(("default", name));
    let metadata = json!({"namespace": namespace, "name": name, "annotations": annotations});
    serde_json::from_value(json!({"metadata": metadata, "spec": spec})).unwrap()
}

/// An API server that lands every write at once.
pub(super) struct World {
    pub(super) allocator: Allocator,
    pub(super) pools: BTreeMap<SmolStr, Arc<Pool>>,
    pub(super) services: BTreeMap<ObjectKey, Arc<Service>>,
    pub(super) nodes: BTreeSet<IpAddr>,
    pub(super) config: Config,
}

impl World {
    pub(super) fn new() -> Self {
        Self::with(Config::default())
    }

    pub(super) fn with(config: Config) -> Self {
        let mut world = Self {
            allocator: Allocator::new(config.clone()),
            pools: BTreeMap::new(),
            services: BTreeMap::new(),
            nodes: BTreeSet::new(),
            config,
        };
        assert_eq!(world.allocator.step(Input::Synced), []);
        world
    }

    pub(super) fn land(&mut self, effects: &[Effect]) {
        for effect in effects {
            match effect {
                Effect::ServiceStatus { key, ingress, condition } => {
                    let object = Arc::make_mut(self.services.get_mut(key).expect("effects are about known services"));
                    let entry = |ip: &IpAddr| IngressEntry { ip: ip.to_string().into(), ..Default::default() };
                    object.status.load_balancer.ingress = ingress.iter().map(entry).collect();
                    object.status.conditions.retain(|c| c.kind != CONDITION_SATISFIED);
                    object.status.conditions.extend(condition.clone());
                    let again = self.allocator.step(Input::ServiceUpserted(Arc::clone(&self.services[key])));
                    assert_eq!(again, [], "our own write needs no write");
                }
                Effect::PoolStatus { name, conditions } => {
                    let object = Arc::make_mut(self.pools.get_mut(name).expect("effects are about known pools"));
                    object.status.conditions = conditions.clone();
                    let again = self.allocator.step(Input::PoolUpserted(Arc::clone(&self.pools[name])));
                    assert_eq!(again, [], "our own write needs no write");
                }
            }
        }
    }

    pub(super) fn step(&mut self, input: Input) -> Vec<Effect> {
        let effects = self.allocator.step(input);
        self.land(&effects);
        effects
    }

    pub(super) fn put_pool(&mut self, mut pool: Arc<Pool>) -> Vec<Effect> {
        let name = pool.metadata.name.clone();
        if let Some(old) = self.pools.get(&name) {
            Arc::make_mut(&mut pool).status = old.status.clone();
        }
        self.pools.insert(name, Arc::clone(&pool));
        self.step(Input::PoolUpserted(pool))
    }

    pub(super) fn drop_pool(&mut self, name: &str) -> Vec<Effect> {
        self.pools.remove(name);
        self.step(Input::PoolRemoved(ObjectKey::new("", name)))
    }

    /// Keeps the status that the service has.
    pub(super) fn put(&mut self, mut service: Service) -> Vec<Effect> {
        let key = service.key();
        if let Some(old) = self.services.get(&key) {
            service.status = old.status.clone();
        }
        self.put_with_status(service)
    }

    pub(super) fn put_with_status(&mut self, service: Service) -> Vec<Effect> {
        let service = Arc::new(service);
        self.services.insert(service.key(), Arc::clone(&service));
        self.step(Input::ServiceUpserted(service))
    }

    pub(super) fn remove(&mut self, name: &str) -> Vec<Effect> {
        let key = key(name);
        self.services.remove(&key);
        self.step(Input::ServiceRemoved(key))
    }

    fn ips(&self, name: &str) -> Vec<String> {
        self.services[&key(name)].ingress_addresses().map(|ip| ip.to_string()).collect()
    }

    fn why(&self, name: &str) -> (String, String, String) {
        let conditions = &self.services[&key(name)].status.conditions;
        let c = conditions.iter().find(|c| c.kind == CONDITION_SATISFIED).expect("has the condition");
        (c.status.clone(), c.reason.clone(), c.message.clone())
    }

    fn reason(&self, name: &str) -> String {
        self.why(name).1
    }

    fn pool_condition(&self, name: &str, kind: &str) -> Condition {
        self.pools[name].status.conditions.iter().find(|c| c.kind == kind).expect("has the condition").clone()
    }

    fn counts(&self, name: &str) -> [String; 3] {
        [CONDITION_IPS_TOTAL, CONDITION_IPS_USED, CONDITION_IPS_AVAILABLE].map(|k| self.pool_condition(name, k).message)
    }

    /// What a new leader would write, having read the same objects in the given order.
    pub(super) fn restarted(&self, reversed: bool) -> (Allocator, Vec<Effect>) {
        let mut inputs: Vec<Input> = self.pools.values().cloned().map(Input::PoolUpserted).collect();
        inputs.extend(self.services.values().cloned().map(Input::ServiceUpserted));
        inputs.push(Input::NodeAddresses(self.nodes.clone()));
        if reversed {
            inputs.reverse();
        }
        let mut allocator = Allocator::new(self.config.clone());
        for input in inputs {
            assert_eq!(allocator.step(input), [], "nothing is written before both lists are complete");
        }
        let effects = allocator.step(Input::Synced);
        (allocator, effects)
    }
}

pub(super) fn key(name: &str) -> ObjectKey {
    let (namespace, name) = name.split_once('/').unwrap_or(("default", name));
    ObjectKey::new(namespace, name)
}

fn guide_pool() -> Arc<Pool> {
    pool("first-pool", "2026-01-01T00:00:00Z", json!({"blocks": [{"start": "10.0.0.100", "stop": "10.0.0.200"}]}))
}

#[test]
fn the_lowest_free_address_is_handed_out_and_reused() {
    let mut world = World::new();
    world.put_pool(guide_pool());
    for (i, name) in ["a", "b", "c"].into_iter().enumerate() {
        world.put(service(name, json!({})));
        assert_eq!(world.ips(name), [format!("10.0.0.{}", 100 + i)]);
    }
    assert_eq!(world.why("a"), ("True".into(), "satisfied".into(), String::new()));
    world.remove("b");
    world.put(service("d", json!({})));
    assert_eq!(world.ips("d"), ["10.0.0.101"]);
    assert_eq!(world.counts("first-pool"), ["101", "3", "98"]);
    assert_eq!(world.allocator.pool_of("10.0.0.101".parse().unwrap()), Some("first-pool"));
    assert_eq!(world.allocator.holders_of("10.0.0.101".parse().unwrap()), [key("d")]);
}

#[test]
fn an_unchanged_object_yields_no_effect() {
    let mut world = World::new();
    world.put_pool(guide_pool());
    world.put(service("a", json!({})));
    let (pools, services) = (world.pools.clone(), world.services.clone());
    for pool in pools.into_values() {
        assert_eq!(world.step(Input::PoolUpserted(pool)), []);
    }
    for service in services.into_values() {
        assert_eq!(world.step(Input::ServiceUpserted(service)), []);
    }
}

#[test]
fn an_effect_is_not_repeated_while_its_write_is_on_its_way() {
    let mut allocator = Allocator::new(Config::default());
    allocator.step(Input::PoolUpserted(guide_pool()));
    let a = Arc::new(service("a", json!({})));
    allocator.step(Input::ServiceUpserted(Arc::clone(&a)));
    assert_eq!(allocator.step(Input::Synced).len(), 2, "the service and the pool");
    assert_eq!(allocator.step(Input::ServiceUpserted(a)), [], "the same object again");
    assert_eq!(allocator.step(Input::PoolUpserted(guide_pool())), [], "the same object again");
}

#[test]
fn a_change_of_one_service_writes_that_service_and_the_pool_only() {
    let mut world = World::new();
    world.put_pool(guide_pool());
    for i in 0..50 {
        world.put(service(&format!("s{i}"), json!({})));
    }
    let effects = world.put(service("one-more", json!({})));
    assert_eq!(effects.len(), 2, "{effects:?}");
}

#[test]
fn a_tampered_status_is_put_right() {
    let mut world = World::new();
    world.put_pool(guide_pool());
    world.put(service("a", json!({})));
    let mut tampered = Service::clone(&world.services[&key("a")]);
    tampered.status.load_balancer.ingress =
        serde_json::from_value(json!([{"ip": "203.0.113.9"}, {"hostname": "elsewhere"}])).unwrap();
    world.put_with_status(tampered);
    assert_eq!(world.ips("a"), ["10.0.0.100"]);
    assert_eq!(world.services[&key("a")].status.load_balancer.ingress.len(), 1);
}

#[test]
fn blocks_are_read_as_written() {
    type Expected = Result<(&'static str, &'static str), &'static str>;
    let cases: &[(serde_json::Value, Expected)] = &[
        (json!({"cidr": "10.0.0.7/24"}), Ok(("10.0.0.0", "10.0.0.255"))),
        (json!({"cidr": "10.0.0.7"}), Ok(("10.0.0.7", "10.0.0.7"))),
        (json!({"cidr": "2001:db8::/64"}), Ok(("2001:db8::", "2001:db8::ffff:ffff:ffff:ffff"))),
        (json!({"cidr": "10.0.0.0/31", "start": "1.1.1.1"}), Ok(("10.0.0.0", "10.0.0.1"))),
        (json!({"start": "10.0.0.1"}), Ok(("10.0.0.1", "10.0.0.1"))),
        (json!({"start": " 10.0.0.1", "stop": "10.0.1.5 "}), Ok(("10.0.0.1", "10.0.1.5"))),
        (json!({"cidr": "10.0.0.0/33"}), Err("spec.blocks[3].cidr: \"10.0.0.0/33\"")),
        (json!({"start": "10.0.0.300"}), Err("spec.blocks[3].start: \"10.0.0.300\"")),
        (json!({"start": "10.0.0.1", "stop": "x"}), Err("spec.blocks[3].stop: \"x\"")),
        (json!({"start": "10.0.0.9", "stop": "10.0.0.1"}), Err("spec.blocks[3].start: 10.0.0.9 is after stop")),
        (json!({"start": "10.0.0.9", "stop": "::1"}), Err("spec.blocks[3].start: 10.0.0.9 and stop ::1 are of diff")),
        (json!({"stop": "10.0.0.9"}), Err("spec.blocks[3].start: is missing; stop stands alone")),
        (json!({}), Err("spec.blocks[3].start: is missing; give cidr")),
    ];
    for (block, expected) in cases {
        let block: PoolBlock = serde_json::from_value(block.clone()).unwrap();
        match (parse_block(3, &block), expected) {
            (Ok(range), Ok((first, last))) => {
                assert_eq!(
                    (range.span.first.to_string().as_str(), range.span.last.to_string().as_str()),
                    (*first, *last)
                );
            }
            (Err(error), Err(start)) => assert!(error.starts_with(start), "{error}"),
            (got, _) => panic!("{block:?}: {got:?}"),
        }
    }
}

#[test]
fn a_bad_block_is_named_and_the_others_are_used() {
    let mut world = World::new();
    let blocks = json!({"blocks": [{"start": "10.0.0.9", "stop": "10.0.0.1"}, {"cidr": "10.1.0.0/30"}]});
    world.put_pool(pool("p", "1", blocks));
    world.put(service("a", json!({})));
    assert_eq!(world.ips("a"), ["10.1.0.0"]);
    let condition = world.pool_condition("p", CONDITION_INVALID_SPEC);
    assert_eq!(condition.status, "True");
    assert!(condition.message.contains("spec.blocks[0].start") && condition.message.contains("swap"));
    assert_eq!(world.allocator.pool_problems("p").len(), 1);
    world.put_pool(pool("p", "1", json!({"blocks": [{"cidr": "10.1.0.0/30"}]})));
    assert_eq!(world.pool_condition("p", CONDITION_INVALID_SPEC).status, "False");
}

#[test]
fn first_and_last_addresses_are_kept_back_when_told() {
    let mut world = World::new();
    let spec = |first_last: &str| {
        json!({"allowFirstLastIPs": first_last,
            "blocks": [{"cidr": "10.0.0.0/30"}, {"cidr": "10.0.1.0/31"}, {"start": "10.0.2.1"}]})
    };
    world.put_pool(pool("p", "1", spec("No")));
    assert_eq!(world.counts("p"), ["7", "2", "5"]);
    for (name, ip) in [("a", "10.0.0.1"), ("b", "10.0.0.2"), ("c", "10.0.1.0"), ("d", "10.0.1.1"), ("e", "10.0.2.1")] {
        world.put(service(name, json!({})));
        assert_eq!(world.ips(name), [ip]);
    }
    world.put(service("f", json!({})));
    assert_eq!(world.reason("f"), "out_of_ips");
    world.put(service("g", json!({"loadBalancerIP": "10.0.0.3"})));
    assert!(world.why("g").2.contains("allowFirstLastIPs"));
    world.put_pool(pool("p", "1", spec("Yes")));
    assert_eq!((world.ips("f"), world.ips("g")), (vec!["10.0.0.0".to_string()], vec!["10.0.0.3".to_string()]));
    // Back to No revokes nothing.
    world.put_pool(pool("p", "1", spec("No")));
    assert_eq!((world.ips("f"), world.ips("g")), (vec!["10.0.0.0".to_string()], vec!["10.0.0.3".to_string()]));
    assert_eq!(world.restarted(false).1, []);
    assert_eq!(world.counts("p"), ["7", "7", "0"]);
}

#[test]
fn selectors_see_labels_namespace_and_name() {
    let mut world = World::new();
    let select = |labels: serde_json::Value, start: &str| json!({"serviceSelector": {"matchLabels": labels}, "blocks": [{"start": start}]});
    world.put_pool(pool("colour", "1", select(json!({"color": "blue"}), "10.0.0.1")));
    world.put_pool(pool("space", "2", select(json!({"io.kubernetes.service.namespace": "shop"}), "10.0.0.2")));
    world.put_pool(pool("name", "3", select(json!({"io.kubernetes.service.name": "web"}), "10.0.0.3")));
    let mut blue = service("b", json!({}));
    blue.metadata.labels.insert("color".into(), "blue".into());
    world.put(blue);
    world.put(service("shop/x", json!({})));
    world.put(service("web", json!({})));
    world.put(service("other", json!({})));
    assert_eq!(world.ips("b"), ["10.0.0.1"]);
    assert_eq!(world.ips("shop/x"), ["10.0.0.2"]);
    assert_eq!(world.ips("web"), ["10.0.0.3"]);
    let text = "There are no enabled CiliumLoadBalancerIPPools that match this service";
    assert_eq!(world.why("other"), ("False".into(), "no_pool".into(), text.into()));
    world.put(service("asks", json!({"loadBalancerIP": "10.0.0.1"})));
    assert_eq!(world.reason("asks"), "pool_selector_mismatch");
    // Labels changed: the address goes, and to nobody else.
    world.put(service("b", json!({})));
    assert_eq!((world.ips("b").len(), world.reason("b")), (0, "no_pool".into()));
}

#[test]
fn an_invalid_selector_selects_nothing_and_is_reported() {
    let mut world = World::new();
    let selector = json!({"matchExpressions": [{"key": "a", "operator": "Near"}]});
    world.put_pool(pool("p", "1", json!({"serviceSelector": selector, "blocks": [{"cidr": "10.0.0.0/24"}]})));
    world.put(service("a", json!({})));
    assert_eq!(world.reason("a"), "no_pool");
    let text = world.pool_condition("p", CONDITION_INVALID_SPEC).message;
    assert!(text.starts_with("spec.serviceSelector.matchExpressions[0]: \"Near\""), "{text}");
}

#[test]
fn requested_addresses_are_all_given() {
    for (spec, annotations) in [
        (json!({}), json!({"io.cilium/lb-ipam-ips": "10.0.0.150,10.0.0.120"})),
        (
            json!({}),
            json!({"lbipam.cilium.io/ips": " 10.0.0.150 , 10.0.0.120,10.0.0.150", "io.cilium/lb-ipam-ips": "1.1.1.1"}),
        ),
        (json!({"loadBalancerIP": "10.0.0.150"}), json!({"lbipam.cilium.io/ips": "10.0.0.120"})),
        (json!({"loadBalancerIP": "10.0.0.150"}), json!({"lbipam.cilium.io/ips": "nonsense,10.0.0.120"})),
    ] {
        let mut world = World::new();
        world.put_pool(guide_pool());
        world.put(annotated("a", spec, annotations));
        assert_eq!(world.ips("a"), ["10.0.0.150", "10.0.0.120"]);
        assert_eq!(world.reason("a"), "satisfied");
    }
}

#[test]
fn a_requested_address_without_a_pool_is_explained_and_the_others_are_kept() {
    let mut world = World::new();
    world.put_pool(guide_pool());
    world.put(annotated("blue", json!({}), json!({"io.cilium/lb-ipam-ips": "20.0.10.100,10.0.0.120"})));
    assert_eq!(world.ips("blue"), ["10.0.0.120"]);
    let text = "No pool exists with a CIDR containing '20.0.10.100'";
    assert_eq!(world.why("blue"), ("False".into(), "no_pool".into(), text.into()));
    world.put_pool(pool("blue-pool", "2", json!({"blocks": [{"cidr": "20.0.10.0/24"}]})));
    assert_eq!(world.ips("blue"), ["10.0.0.120", "20.0.10.100"]);
    assert_eq!(world.reason("blue"), "satisfied");
}

#[test]
fn unreadable_requests_are_reported_and_nothing_else_is_lost() {
    let mut world = World::new();
    world.put_pool(guide_pool());
    world.put(annotated("a", json!({"loadBalancerIP": "10.0.0"}), json!({"lbipam.cilium.io/ips": "x"})));
    assert_eq!(world.ips("a"), ["10.0.0.100"]);
    let problems = world.allocator.service_problems(&key("a"));
    assert_eq!(problems.len(), 2);
    assert!(problems[0].starts_with("spec.loadBalancerIP: \"10.0.0\" is not"), "{problems:?}");
}

#[test]
fn an_address_in_use_is_waited_for() {
    let mut world = World::new();
    world.put_pool(guide_pool());
    world.put(service("a", json!({})));
    world.put(service("b", json!({"loadBalancerIP": "10.0.0.100"})));
    assert_eq!((world.ips("b").len(), world.reason("b")), (0, "already_allocated".into()));
    world.remove("a");
    assert_eq!(world.ips("b"), ["10.0.0.100"]);
    // A new request moves it, and frees the old address.
    world.put(service("b", json!({"loadBalancerIP": "10.0.0.101"})));
    assert_eq!(world.ips("b"), ["10.0.0.101"]);
    assert_eq!(world.counts("first-pool")[1], "1");
}

#[test]
fn who_waits_is_told_the_truth_when_others_join() {
    let mut world = World::new();
    world.put_pool(guide_pool());
    let shared = |name: &str, port: u16| {
        annotated(name, json!({"ports": [{"port": port}]}), json!({"lbipam.cilium.io/sharing-key": "k"}))
    };
    world.put(shared("m", 80));
    world.put(service("waits", json!({"loadBalancerIP": "10.0.0.100"})));
    assert!(world.why("waits").2.contains("'default/m'"));
    world.put(shared("a", 81));
    assert_eq!(world.ips("a"), ["10.0.0.100"]);
    assert!(world.why("waits").2.contains("'default/a'"));
    assert_eq!(world.restarted(false).1, [], "a new leader says the same");
}

#[test]
fn exhausted_pools_are_told_apart_from_missing_ones_and_served_oldest_first() {
    let mut world = World::new();
    world.put_pool(pool("p", "1", json!({"blocks": [{"start": "10.0.0.1"}]})));
    world.put(service("a", json!({})));
    let aged = |name: &str, created: &str| {
        let mut s = service(name, json!({}));
        s.metadata.creation_timestamp = created.into();
        s
    };
    world.put(aged("young", "2026-02-02T00:00:00Z"));
    world.put(aged("zzz-old", "2026-02-01T00:00:00Z"));
    let text = "All enabled CiliumLoadBalancerIPPools that match this service ran out of allocatable IPs";
    assert_eq!(world.why("young"), ("False".into(), "out_of_ips".into(), text.into()));
    assert_eq!(world.allocator.stats().services_unsatisfied, 2);
    world.remove("a");
    assert_eq!(world.ips("zzz-old"), ["10.0.0.1"]);
    assert!(world.ips("young").is_empty());
}

#[test]
fn sharing_rules_decide_who_may_join() {
    let holder = |spec: serde_json::Value, mut more: serde_json::Value| {
        more["lbipam.cilium.io/sharing-key"] = json!("k");
        annotated("x/holder", spec, more)
    };
    let tcp80 = json!({"ports": [{"port": 80, "protocol": "TCP"}]});
    let local = |port: u16, app: &str| {
        let selector = if app.is_empty() { json!(null) } else { json!({"app": app}) };
        json!({"ports": [{"port": port}], "externalTrafficPolicy": "Local", "selector": selector})
    };
    let k = json!({"io.cilium/lb-ipam-sharing-key": "k"});
    let cross = |of: &str| json!({"lbipam.cilium.io/sharing-key": "k", "lbipam.cilium.io/sharing-cross-namespace": of});
    let cases: Vec<(Service, &str, serde_json::Value, serde_json::Value, &str)> = vec![
        (holder(tcp80.clone(), json!({})), "x/b", json!({"ports": [{"port": 81}]}), k.clone(), ""),
        (holder(tcp80.clone(), json!({})), "x/b", json!({"ports": [{"port": 80, "protocol": "UDP"}]}), k.clone(), ""),
        (
            holder(tcp80.clone(), json!({})),
            "x/b",
            json!({"ports": [{"port": 80}]}),
            k.clone(),
            "same port and protocol",
        ),
        (
            holder(tcp80.clone(), json!({})),
            "x/b",
            json!({}),
            json!({"lbipam.cilium.io/sharing-key": "z"}),
            "different sharing key",
        ),
        (holder(tcp80.clone(), json!({})), "y/b", json!({}), k.clone(), "different namespace"),
        (holder(tcp80.clone(), cross("y")), "y/b", json!({}), k.clone(), "different namespace"),
        (holder(tcp80.clone(), cross("z, y")), "y/b", json!({}), cross("x"), ""),
        (holder(tcp80.clone(), cross("*")), "y/b", json!({}), cross("*"), ""),
        (holder(tcp80.clone(), json!({})), "x/b", local(81, "a"), k.clone(), "different ExternalTrafficPolicy"),
        (holder(local(80, "a"), json!({})), "x/b", local(81, "a"), k.clone(), ""),
        (holder(local(80, "a"), json!({})), "x/b", local(81, "b"), k.clone(), "same ExternalTrafficPolicy Local"),
        (holder(local(80, ""), json!({})), "x/b", local(81, ""), k, "same ExternalTrafficPolicy Local"),
    ];
    for (first, name, spec, annotations, refused) in cases {
        let mut world = World::new();
        world.put_pool(guide_pool());
        world.put(first.clone());
        // Generic: joins, or gets an address of its own.
        world.put(annotated(name, spec.clone(), annotations.clone()));
        let expected = if refused.is_empty() { "10.0.0.100" } else { "10.0.0.101" };
        assert_eq!(world.ips(name), [expected], "{name} {spec} {annotations}");
        // Specific: joins, or is told why not.
        let mut spec = spec;
        spec["loadBalancerIP"] = json!("10.0.0.100");
        world.put(annotated(name, spec, annotations));
        let (_, reason, message) = world.why(name);
        match refused {
            "" => assert_eq!(reason, "satisfied"),
            _ => {
                assert_eq!(reason, "already_allocated_incompatible_service");
                assert!(message.contains("Reason: ") && message.contains(refused), "{message}");
            }
        }
    }
}

#[test]
fn r07_a_shared_address_stays_until_its_last_service_goes() {
    let mut world = World::new();
    world.put_pool(guide_pool());
    let shared = |name: &str, port: u16| {
        annotated(name, json!({"ports": [{"port": port}]}), json!({"lbipam.cilium.io/sharing-key": "k"}))
    };
    for (i, name) in ["a", "b", "c"].into_iter().enumerate() {
        world.put(shared(name, 80 + i as u16));
    }
    assert_eq!(world.counts("first-pool")[1], "1");
    world.remove("a");
    assert_eq!((world.ips("b"), world.ips("c")), (vec!["10.0.0.100".to_string()], vec!["10.0.0.100".to_string()]));
    world.remove("c");
    assert_eq!(world.ips("b"), ["10.0.0.100"]);
    // Leaving the group while alone keeps the address, too.
    world.put(service("b", json!({})));
    assert_eq!(world.ips("b"), ["10.0.0.100"]);
    world.remove("b");
    assert_eq!(world.counts("first-pool"), ["101", "0", "101"]);
}

#[test]
fn a_service_that_stops_fitting_its_group_gets_an_address_of_its_own() {
    let mut world = World::new();
    world.put_pool(guide_pool());
    let shared = |name: &str, port: u16| {
        annotated(name, json!({"ports": [{"port": port}]}), json!({"lbipam.cilium.io/sharing-key": "k"}))
    };
    world.put(shared("a", 80));
    world.put(shared("b", 81));
    world.put(shared("b", 80));
    assert_eq!((world.ips("a"), world.ips("b")), (vec!["10.0.0.100".to_string()], vec!["10.0.0.101".to_string()]));
}

#[test]
fn families_follow_the_policy() {
    let both = || Config::default();
    let only6 = || Config { ipv4: false, ..Config::default() };
    let only4 = || Config { ipv6: false, ..Config::default() };
    let (v4, v6) = ("10.0.0.0", "2001:db8::");
    let cases: Vec<(Config, serde_json::Value, Vec<&str>)> = vec![
        (both(), json!({}), vec![v4]),
        (only6(), json!({}), vec![v6]),
        (both(), json!({"ipFamilies": ["IPv6"]}), vec![v6]),
        (both(), json!({"ipFamilies": ["IPv6", "IPv4"], "ipFamilyPolicy": "SingleStack"}), vec![v6]),
        (only4(), json!({"ipFamilies": ["IPv6"]}), vec![]),
        (both(), json!({"ipFamilyPolicy": "PreferDualStack"}), vec![v4, v6]),
        (only4(), json!({"ipFamilyPolicy": "PreferDualStack", "ipFamilies": ["IPv4", "IPv6"]}), vec![v4]),
        (both(), json!({"ipFamilyPolicy": "PreferDualStack", "ipFamilies": ["IPv6", "IPv4"]}), vec![v6, v4]),
        (both(), json!({"ipFamilyPolicy": "RequireDualStack"}), vec![v4, v6]),
        (both(), json!({"ipFamilies": ["IPv5"]}), vec![v4]),
    ];
    for (config, spec, expected) in cases {
        let mut world = World::with(config);
        world.put_pool(pool("p", "1", json!({"blocks": [{"cidr": "10.0.0.0/24"}, {"cidr": "2001:db8::/64"}]})));
        world.put(service("a", spec.clone()));
        assert_eq!(world.ips("a"), expected, "{spec}");
        assert_eq!(world.reason("a") == "satisfied", !expected.is_empty(), "{spec}");
    }
}

#[test]
fn dual_stack_with_a_pool_for_one_family_keeps_that_address() {
    let mut world = World::new();
    world.put_pool(guide_pool());
    world.put(service("a", json!({"ipFamilyPolicy": "RequireDualStack"})));
    assert_eq!((world.ips("a"), world.reason("a")), (vec!["10.0.0.100".to_string()], "no_pool".into()));
    world.put_pool(pool("six", "2", json!({"blocks": [{"cidr": "::/0"}]})));
    assert_eq!(world.ips("a"), ["10.0.0.100", "::"]);
}

#[test]
fn counts_do_not_overflow() {
    let mut world = World::new();
    world.put_pool(pool("p", "1", json!({"blocks": [{"cidr": "::/0"}, {"cidr": "0.0.0.0/0"}]})));
    assert_eq!(
        world.counts("p"),
        ["340282366920938463463374607436063178752", "0", "340282366920938463463374607436063178752"]
    );
    world.put(service("a", json!({"loadBalancerIP": "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"})));
    world.put(service("b", json!({"loadBalancerIP": "255.255.255.255"})));
    assert_eq!(world.reason("a"), "satisfied");
    assert_eq!(world.counts("p")[2], "340282366920938463463374607436063178750");
    assert_eq!((Count::from(u128::MAX) + Count::from(1)).to_string(), "340282366920938463463374607431768211456");
    let huge = (Count::from(u128::MAX) + Count::from(1)).saturating_sub(Count::from(1));
    assert_eq!(huge, Count::from(u128::MAX));
}

#[test]
fn of_two_overlapping_pools_the_younger_waits_and_recovers() {
    let spec = |cidr: &str| json!({"blocks": [{"cidr": cidr}]});
    for old_first in [true, false] {
        let mut world = World::new();
        let old = pool("zz-old", "2026-01-01T00:00:00Z", spec("10.0.0.0/24"));
        let young = pool("aa-young", "2026-01-02T00:00:00Z", spec("10.0.0.128/25"));
        let order = if old_first { [&old, &young] } else { [&young, &old] };
        for pool in order {
            world.put_pool(Arc::clone(pool));
        }
        let condition = world.pool_condition("aa-young", CONDITION_POOL_CONFLICT);
        assert_eq!((condition.status.as_str(), condition.reason.as_str()), ("True", "cidr_overlap"));
        let text = "Pool conflicts since range '10.0.0.128 - 10.0.0.255' overlaps range '10.0.0.0 - 10.0.0.255' from IP Pool 'zz-old'";
        assert_eq!(condition.message, text);
        let fresh = world.pool_condition("zz-old", CONDITION_POOL_CONFLICT);
        assert_eq!((fresh.status.as_str(), fresh.reason.as_str(), fresh.message.as_str()), ("False", "resolved", ""));
        assert!(world.allocator.stats().pools[1].conflicting);
        world.put_pool(pool("zz-old", "2026-01-01T00:00:00Z", spec("10.0.0.0/25")));
        let resolved = world.pool_condition("aa-young", CONDITION_POOL_CONFLICT);
        assert_eq!((resolved.status.as_str(), resolved.reason.as_str()), ("False", "resolved"));
    }
}

#[test]
fn a_pool_that_overlaps_itself_gives_nothing_out() {
    let mut world = World::new();
    world.put_pool(pool("p", "1", json!({"blocks": [{"cidr": "10.0.0.0/24"}, {"start": "10.0.0.9"}]})));
    let text = world.pool_condition("p", CONDITION_POOL_CONFLICT).message;
    assert!(text.contains("'10.0.0.9 - 10.0.0.9'") && text.contains("same pool"), "{text}");
    world.put(service("a", json!({})));
    assert_eq!(world.reason("a"), "no_pool");
}

#[test]
fn addresses_in_disabled_and_conflicting_pools_are_kept_and_imported() {
    let mut world = World::new();
    world.put_pool(pool("p", "2", json!({"blocks": [{"cidr": "10.0.0.0/24"}]})));
    world.put_pool(pool("q", "3", json!({"blocks": [{"cidr": "10.1.0.0/24"}]})));
    world.put(service("a", json!({})));
    world.put(service("b", json!({"loadBalancerIP": "10.1.0.7"})));
    // p comes into conflict with an older pool, q is disabled.
    world.put_pool(pool("older", "1", json!({"blocks": [{"cidr": "10.0.0.0/16"}]})));
    world.put_pool(pool("q", "3", json!({"disabled": true, "blocks": [{"cidr": "10.1.0.0/24"}]})));
    assert_eq!((world.ips("a"), world.ips("b")), (vec!["10.0.0.0".to_string()], vec!["10.1.0.7".to_string()]));
    for reversed in [false, true] {
        assert_eq!(world.restarted(reversed).1, []);
    }
    world.put(service("c", json!({"loadBalancerIP": "10.1.0.8"})));
    assert_eq!(world.why("c").2, "No pool exists with a CIDR containing '10.1.0.8'");
    // The older pool does not hand out again what the younger one gave.
    world.put(service("d", json!({})));
    assert_eq!(world.ips("d"), ["10.0.0.1"]);
}

#[test]
fn a_shrunk_pool_moves_only_those_who_lost_their_address() {
    let mut world = World::new();
    let spec = |stop: &str| json!({"blocks": [{"start": "10.0.0.1", "stop": stop}]});
    world.put_pool(pool("p", "1", spec("10.0.0.3")));
    for name in ["a", "b", "c"] {
        world.put(service(name, json!({})));
    }
    world.put_pool(pool("q", "2", json!({"blocks": [{"start": "10.9.0.1"}]})));
    world.put_pool(pool("p", "1", spec("10.0.0.2")));
    assert_eq!(["a", "b", "c"].map(|n| world.ips(n)), [["10.0.0.1"], ["10.0.0.2"], ["10.9.0.1"]]);
    world.put_pool(pool("p", "1", json!({"blocks": [{"cidr": "10.0.0.0/24"}]})));
    assert_eq!(["a", "b", "c"].map(|n| world.ips(n)), [["10.0.0.1"], ["10.0.0.2"], ["10.9.0.1"]]);
}

#[test]
fn r16_a_pool_deleted_and_made_again_gives_no_address_twice() {
    let mut world = World::new();
    world.put_pool(guide_pool());
    for i in 0..20 {
        world.put(service(&format!("s{i:02}"), json!({})));
    }
    world.put_pool(pool("second", "2", json!({"blocks": [{"start": "10.1.0.1", "stop": "10.1.0.5"}]})));
    world.drop_pool("first-pool");
    let seen =
        |world: &World| -> Vec<String> { world.services.keys().flat_map(|k| world.ips(&k.to_string())).collect() };
    assert_eq!(seen(&world).len(), 5);
    world.put_pool(guide_pool());
    let all = seen(&world);
    assert_eq!((all.len(), all.iter().collect::<BTreeSet<_>>().len()), (20, 20));
}

#[test]
fn r17_an_address_is_freed_when_its_service_stops_being_ours() {
    for spec in [json!({"type": "NodePort"}), json!({"loadBalancerClass": "example.com/other"})] {
        let mut world = World::new();
        world.put_pool(guide_pool());
        world.put(service("a", json!({})));
        let effects = world.put(service("a", spec));
        let cleared = Effect::ServiceStatus { key: key("a"), ingress: vec![], condition: None };
        assert!(effects.contains(&cleared), "{effects:?}");
        assert_eq!(world.counts("first-pool"), ["101", "0", "101"]);
        assert!(world.services[&key("a")].status.conditions.is_empty());
        world.put(service("a", json!({})));
        assert_eq!(world.ips("a"), ["10.0.0.100"]);
    }
}

#[test]
fn r18_without_a_pool_no_service_is_written() {
    let mut world = World::new();
    let mut foreign = service("a", json!({}));
    foreign.status.load_balancer.ingress = serde_json::from_value(json!([{"ip": "203.0.113.1"}])).unwrap();
    assert_eq!(world.put_with_status(foreign), []);
    assert_eq!(world.put(service("b", json!({}))), []);
    assert_eq!(world.restarted(false).1, []);
    // The first pool wakes it, the last one's end lets go of everything, and then it sleeps again.
    world.put_pool(guide_pool());
    assert_eq!(world.ips("b"), ["10.0.0.101"]);
    assert_eq!(world.ips("a"), ["10.0.0.100"]);
    world.drop_pool("first-pool");
    assert!(world.ips("a").is_empty() && world.ips("b").is_empty());
    assert_eq!(world.put(service("c", json!({}))), []);
}

#[test]
fn services_of_other_classes_are_left_alone() {
    let config = Config { handle_classless: false, classes: vec![CLASS_L2.into()], ..Config::default() };
    let mut world = World::with(config);
    world.put_pool(guide_pool());
    for spec in [json!({}), json!({"loadBalancerClass": CLASS_BGP}), json!({"type": "ClusterIP"})] {
        let mut other = service("other", spec);
        other.status.load_balancer.ingress = serde_json::from_value(json!([{"hostname": "lb.example.com"}])).unwrap();
        assert_eq!(world.put_with_status(other), []);
    }
    world.put(service("ours", json!({"loadBalancerClass": CLASS_L2})));
    assert_eq!(world.ips("ours"), ["10.0.0.100"]);
    assert_eq!(world.allocator.stats().services_matching, 1);
}

#[test]
fn r13_a_node_address_is_never_handed_out_and_taken_back() {
    let mut world = World::new();
    world.put_pool(guide_pool());
    world.put(service("a", json!({})));
    world.nodes = ["10.0.0.100", "10.0.0.101"].into_iter().map(|ip| ip.parse().unwrap()).collect();
    world.step(Input::NodeAddresses(world.nodes.clone()));
    assert_eq!(world.ips("a"), ["10.0.0.102"]);
    world.put(service("b", json!({"loadBalancerIP": "10.0.0.101"})));
    assert_eq!(world.why("b").2, "'10.0.0.101' is the address of a node");
    assert_eq!(world.counts("first-pool"), ["101", "3", "98"]);
    assert_eq!(world.restarted(false).1, []);
    world.nodes.clear();
    world.step(Input::NodeAddresses(BTreeSet::new()));
    assert_eq!(world.ips("b"), ["10.0.0.101"]);
}

#[test]
fn r14_existing_addresses_are_imported_before_new_ones_are_handed_out() {
    // The new service sorts first and has no address yet; the others have theirs.
    let mut allocator = Allocator::new(Config::default());
    allocator.step(Input::ServiceUpserted(Arc::new(service("a-new", json!({})))));
    for (name, ip) in [("m", "10.0.0.100"), ("n", "10.0.0.101")] {
        let mut s = service(name, json!({}));
        s.status.load_balancer.ingress = serde_json::from_value(json!([{"ip": ip}])).unwrap();
        allocator.step(Input::ServiceUpserted(Arc::new(s)));
    }
    allocator.step(Input::PoolUpserted(guide_pool()));
    allocator.step(Input::Synced);
    for (ip, name) in [("10.0.0.100", "m"), ("10.0.0.101", "n"), ("10.0.0.102", "a-new")] {
        assert_eq!(allocator.holders_of(ip.parse().unwrap()), [key(name)]);
    }
}

#[test]
fn ten_thousand_services_take_no_time_worth_mentioning() {
    let mut allocator = Allocator::new(Config::default());
    allocator.step(Input::Synced);
    allocator.step(Input::PoolUpserted(pool("p", "1", json!({"blocks": [{"cidr": "10.0.0.0/16"}]}))));
    for i in 0..10_000 {
        let effects = allocator.step(Input::ServiceUpserted(Arc::new(service(&format!("s{i}"), json!({})))));
        assert_eq!(effects.len(), 2);
    }
    assert_eq!(allocator.stats().pools[0].used, Count::from(10_000));
    allocator.step(Input::ServiceRemoved(key("s5000")));
    let effects = allocator.step(Input::ServiceUpserted(Arc::new(service("again", json!({})))));
    let expected: IpAddr = "10.0.19.136".parse().unwrap();
    assert!(matches!(&effects[0], Effect::ServiceStatus { ingress, .. } if *ingress == [expected]), "{effects:?}");
}
