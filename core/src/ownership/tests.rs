use serde_json::json;

use super::*;

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

pub(super) fn device(name: &str, ifindex: u32) -> Device {
    Device { name: name.into(), ifindex, mac: Some([2, 0, 0, 0, 0, 1]), up: true, running: true, ..Device::default() }
}

/// Devices that can answer for everything.
pub(super) fn all_of(devices: &[Device]) -> Input {
    Input::Devices(devices.iter().map(|device| (device.clone(), Families::BOTH)).collect())
}

fn service_with(name: &str, ips: &[&str], spec: serde_json::Value) -> Arc<Service> {
    let mut spec = spec;
    spec["type"] = spec.get("type").cloned().unwrap_or(json!("LoadBalancer"));
    let ingress: Vec<_> = ips.iter().map(|ip| json!({"ip": ip})).collect();
    let object = json!({
        "metadata": {"namespace": "default", "name": name},
        "spec": spec,
        "status": {"loadBalancer": {"ingress": ingress}},
    });
    Arc::new(serde_json::from_value(object).unwrap())
}

pub(super) fn service(name: &str, ips: &[&str]) -> Arc<Service> {
    service_with(name, ips, json!({}))
}

pub(super) fn policy(name: &str, spec: serde_json::Value) -> Arc<L2Policy> {
    Arc::new(serde_json::from_value(json!({"metadata": {"name": name}, "spec": spec})).unwrap())
}

fn node(name: &str, labels: serde_json::Value) -> Arc<Node> {
    Arc::new(serde_json::from_value(json!({"metadata": {"name": name, "labels": labels}})).unwrap())
}

pub(super) fn record(node: &str, claims: &[IpAddr]) -> Record {
    Record { node: node.into(), devices: vec!["eth0".into()], claims: claims.to_vec(), ..Record::default() }
}

pub(super) fn members(records: impl IntoIterator<Item = Record>) -> Members {
    let records = records.into_iter().map(|record| (record.node.clone(), Arc::new(record))).collect();
    Members { records, self_seen: true }
}

fn key(name: &str) -> ObjectKey {
    ObjectKey::new("default", name)
}

fn claimed(effects: &[Effect]) -> Vec<IpAddr> {
    effects.iter().filter_map(|e| if let Effect::Claim { addr, .. } = e { Some(*addr) } else { None }).collect()
}

fn released(effects: &[Effect]) -> Vec<IpAddr> {
    effects.iter().filter_map(|e| if let Effect::Release { addr } = e { Some(*addr) } else { None }).collect()
}

fn announcements(effects: &[Effect]) -> usize {
    effects.iter().filter(|e| matches!(e, Effect::Announce { .. })).count()
}

/// One node, ready to decide.
struct Lone {
    machine: Ownership,
    now: Instant,
}

impl Lone {
    fn new(me: &str) -> Self {
        let mut lone = Self { machine: Ownership::new(me), now: Instant::now() };
        lone.step(all_of(&[device("eth0", 2)]));
        lone.step(Input::Members(members([])));
        lone.step(Input::Synced);
        lone
    }

    fn with_policy(me: &str) -> Self {
        let mut lone = Self::new(me);
        lone.step(Input::PolicyUpserted(policy("all", json!({"loadBalancerIPs": true, "externalIPs": true}))));
        lone
    }

    fn step(&mut self, input: Input) -> Vec<Effect> {
        self.machine.step(input, self.now)
    }

    fn state(&self, addr: &str) -> Option<State> {
        self.machine.views().into_iter().find(|vip| vip.view.address == ip(addr)).map(|vip| vip.view.state)
    }

    fn owner(&self, addr: &str) -> Option<String> {
        let vip = self.machine.views().into_iter().find(|vip| vip.view.address == ip(addr))?;
        vip.view.owner.map(|owner| owner.to_string())
    }

    fn advance(&mut self, millis: u64) -> Vec<Effect> {
        self.now += Duration::from_millis(millis);
        self.step(Input::Tick)
    }
}

#[test]
fn weights_never_change() {
    // Part of the protocol between versions: a change here makes two agents disagree.
    // Computed from the documentation by another program.
    let cases = [
        ("10.0.0.100", "node-1", 0xa134_989c_7466_20ab),
        ("10.0.0.100", "node-2", 0x266b_3979_a049_6bc0),
        ("10.0.0.101", "node-1", 0xe5a9_67fd_a69f_cf48),
        ("2001:db8::1", "a-node-with-a-long-name.example.com", 0x037d_92cb_e54d_1162),
        ("0.0.0.0", "", 0xa11b_c1a4_3018_280a),
    ];
    for (addr, node, expected) in cases {
        assert_eq!(weight(ip(addr), node), expected, "{addr} {node:?} is {:#018x}", weight(ip(addr), node));
    }
    assert_eq!(weight(ip("::ffff:10.0.0.100"), "node-1"), weight(ip("10.0.0.100"), "node-1"));
}

#[test]
fn weights_spread_addresses_evenly() {
    let mut counts = [0usize; 5];
    for i in 0..10_000u32 {
        let addr = IpAddr::V4((0x0a00_0000 + i).into());
        let best = (0..5).max_by_key(|n| weight(addr, &format!("node-{n}"))).unwrap();
        counts[best] += 1;
    }
    assert!(counts.iter().all(|count| (1800..2200).contains(count)), "{counts:?}");
}

#[test]
fn the_owner_is_sticky_and_served_by_those_who_stay_and_serve_most() {
    let candidate = |node: &str, serves, draining, claims| Candidate { node: node.into(), serves, draining, claims };
    let addr = ip("10.0.0.1");
    let mut nodes = ["a", "b", "c"];
    nodes.sort_by_key(|n| weight(addr, n));
    let [low, mid, high] = nodes;
    let cases: Vec<(Vec<Candidate>, Option<&str>)> = vec![
        (vec![], None),
        (vec![candidate(low, 1, false, false), candidate(high, 1, false, false)], Some(high)),
        (vec![candidate(low, 1, false, true), candidate(high, 1, false, false)], Some(low)),
        (
            vec![candidate(low, 1, false, true), candidate(mid, 1, false, true), candidate(high, 1, false, false)],
            Some(mid),
        ),
        (vec![candidate(high, 1, true, true), candidate(low, 1, false, false)], Some(low)),
        (vec![candidate(high, 1, true, true), candidate(low, 1, true, false)], Some(high)),
        (vec![candidate(high, 1, false, true), candidate(low, 2, false, false)], Some(low)),
    ];
    for (mut candidates, expected) in cases {
        for _ in 0..2 {
            assert_eq!(owner(addr, &candidates).map(SmolStr::as_str), expected, "{candidates:?}");
            candidates.reverse();
        }
    }
}

#[test]
fn a_lone_node_claims_announces_three_times_and_releases() {
    let mut lone = Lone::with_policy("a");
    let eth0 = DeviceId { ifindex: 2, name: "eth0".into() };
    let addr = ip("10.0.0.1");
    let announce = Effect::Announce { addr, device: eth0.clone() };
    let effects = lone.step(Input::ServiceUpserted(service("web", &["10.0.0.1"])));
    assert_eq!(effects, [Effect::Claim { addr, devices: vec![eth0] }, announce.clone()]);
    assert_eq!(lone.machine.claims(), [addr]);
    assert_eq!(lone.machine.next_deadline(), Some(lone.now + ANNOUNCE_PERIOD));
    assert_eq!(lone.advance(999), []);
    assert_eq!(lone.advance(1), std::slice::from_ref(&announce));
    assert_eq!(lone.advance(1000), [announce]);
    assert_eq!((lone.advance(1000), lone.machine.next_deadline()), (vec![], None));
    let vip = &lone.machine.views()[0];
    assert_eq!((vip.view.interface.as_deref(), vip.view.owner.as_deref()), (Some("eth0"), Some("a")));
    assert_eq!(vip.view.services, ["default/web"]);
    assert_eq!(serde_json::to_value(&vip.view).unwrap()["state"], "announcing");
    assert_eq!(lone.step(Input::ServiceRemoved(key("web"))), [Effect::Release { addr }]);
    assert!(lone.machine.views().is_empty() && lone.machine.claims().is_empty());
}

#[test]
fn policies_decide_what_is_announced() {
    let both = json!({"loadBalancerIPs": true, "externalIPs": true});
    let with = |mut spec: serde_json::Value, more: serde_json::Value| {
        spec.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        spec
    };
    let lb = || service_with("web", &["10.0.0.1"], json!({"externalIPs": ["192.0.2.1", "nonsense"]}));
    let class =
        |c: &str| service_with("web", &["10.0.0.1"], json!({"loadBalancerClass": c, "externalIPs": ["192.0.2.1"]}));
    let cluster_ip = || service_with("web", &["10.0.0.1"], json!({"type": "ClusterIP", "externalIPs": ["192.0.2.1"]}));
    let cases: Vec<(Arc<Service>, serde_json::Value, &[&str])> = vec![
        (lb(), both.clone(), &["10.0.0.1", "192.0.2.1"]),
        (lb(), json!({"loadBalancerIPs": true}), &["10.0.0.1"]),
        (lb(), json!({"externalIPs": true}), &["192.0.2.1"]),
        (lb(), json!({}), &[]),
        (cluster_ip(), both.clone(), &["192.0.2.1"]),
        (class("io.cilium/l2-announcer"), both.clone(), &["10.0.0.1", "192.0.2.1"]),
        (class("io.cilium/bgp-control-plane"), both.clone(), &[]),
        (lb(), with(both.clone(), json!({"serviceSelector": {"matchLabels": {"a": "b"}}})), &[]),
        (
            lb(),
            with(both.clone(), json!({"serviceSelector": {"matchLabels": {"io.kubernetes.service.name": "web"}}})),
            &["10.0.0.1", "192.0.2.1"],
        ),
        (lb(), with(both, json!({"interfaces": ["^wlan"]})), &[]),
    ];
    for (service, spec, expected) in cases {
        // Whatever comes first.
        for policy_first in [true, false] {
            let mut lone = Lone::new("a");
            let inputs =
                [Input::PolicyUpserted(policy("p", spec.clone())), Input::ServiceUpserted(Arc::clone(&service))];
            let order: Vec<Input> = if policy_first { inputs.into() } else { inputs.into_iter().rev().collect() };
            for input in order {
                lone.step(input);
            }
            assert_eq!(lone.machine.claims(), expected.iter().map(|a| ip(a)).collect::<Vec<_>>(), "{spec}");
            let effects = lone.step(Input::PolicyRemoved(ObjectKey::new("", "p")));
            assert_eq!(released(&effects).len(), expected.len());
        }
    }
}

#[test]
fn interfaces_are_unanchored_expressions_and_policies_add_up() {
    let mut lone = Lone::new("a");
    let devices = ["eth0", "eth1", "enp3s0", "wlan0"];
    let names: Vec<_> = devices.iter().zip(2..).map(|(name, i)| device(name, i)).collect();
    lone.step(all_of(&names));
    lone.step(Input::ServiceUpserted(service("web", &["10.0.0.1"])));
    let on = |lone: &Lone| lone.machine.views()[0].view.interface.clone().unwrap_or_default();
    lone.step(Input::PolicyUpserted(policy("p", json!({"loadBalancerIPs": true, "interfaces": ["th", "^wlan0$"]}))));
    assert_eq!(on(&lone), "eth0,eth1,wlan0");
    lone.step(Input::PolicyUpserted(policy("p", json!({"loadBalancerIPs": true, "interfaces": ["eth1"]}))));
    assert_eq!(on(&lone), "eth1");
    let effects =
        lone.step(Input::PolicyUpserted(policy("q", json!({"loadBalancerIPs": true, "interfaces": ["^enp"]}))));
    assert_eq!(on(&lone), "eth1,enp3s0");
    assert_eq!((claimed(&effects).len(), announcements(&effects)), (1, 1), "only where it is new: {effects:?}");
    lone.step(Input::PolicyRemoved(ObjectKey::new("", "p")));
    assert_eq!(on(&lone), "enp3s0");
}

#[test]
fn what_a_policy_gets_wrong_is_reported_and_set_right() {
    let cases = [
        (json!({"interfaces": ["eth0", "("]}), CONDITION_BAD_INTERFACE_REGEX, "spec.interfaces[1]: \"(\"", 1),
        (
            json!({"nodeSelector": {"matchExpressions": [{"key": "a", "operator": "Nah"}]}}),
            CONDITION_BAD_NODE_SELECTOR,
            "spec.nodeSelector.matchExpressions[0]",
            0,
        ),
        (
            json!({"serviceSelector": {"matchExpressions": [{"key": "a", "operator": "In"}]}}),
            CONDITION_BAD_SERVICE_SELECTOR,
            "spec.serviceSelector.matchExpressions[0]",
            0,
        ),
    ];
    for (mut spec, kind, text, still_claimed) in cases {
        spec["loadBalancerIPs"] = json!(true);
        let mut lone = Lone::new("a");
        lone.step(Input::ServiceUpserted(service("web", &["10.0.0.1"])));
        let effects = lone.step(Input::PolicyUpserted(policy("p", spec)));
        let Some(Effect::PolicyStatus { name, conditions }) = effects.last() else { panic!("{effects:?}") };
        let [condition] = conditions.as_slice() else { panic!("{conditions:?}") };
        assert_eq!((name.as_str(), condition.kind.as_str(), condition.reason.as_str()), ("p", kind, "error"));
        assert!(condition.status == "True" && condition.message.starts_with(text), "{condition:?}");
        assert_eq!(lone.machine.claims().len(), still_claimed, "what is right is used");
        assert_eq!(lone.machine.policy_problems("p").len(), 1);
        // Fixed; the object carries the old condition.
        let mut fixed = L2Policy::clone(&policy("p", json!({"loadBalancerIPs": true})));
        fixed.status.conditions = conditions.clone();
        let effects = lone.step(Input::PolicyUpserted(Arc::new(fixed.clone())));
        let Some(Effect::PolicyStatus { conditions, .. }) = effects.last() else { panic!("{effects:?}") };
        assert_eq!((conditions[0].kind.as_str(), conditions[0].status.as_str()), (kind, "False"));
        // Once it says so, there is nothing to write.
        fixed.status.conditions = conditions.clone();
        assert_eq!(lone.step(Input::PolicyUpserted(Arc::new(fixed))), []);
    }
    assert_eq!(
        Lone::new("a").step(Input::PolicyUpserted(policy("fine", json!({})))),
        [],
        "nothing wrong, nothing to say"
    );
}

#[test]
fn the_node_selector_sees_each_nodes_labels() {
    let mut lone = Lone::new("a");
    lone.step(Input::Members(members([record("b", &[])])));
    lone.step(Input::ServiceUpserted(service("web", &["10.0.0.1"])));
    let selector = json!({"matchExpressions": [{"key": "role", "operator": "In", "values": ["edge"]}]});
    lone.step(Input::PolicyUpserted(policy("p", json!({"loadBalancerIPs": true, "nodeSelector": selector}))));
    assert_eq!((lone.state("10.0.0.1"), lone.owner("10.0.0.1")), (Some(State::Unowned), None));
    lone.step(Input::NodeUpserted(node("b", json!({"role": "edge"}))));
    assert_eq!((lone.state("10.0.0.1"), lone.owner("10.0.0.1")), (Some(State::Elsewhere), Some("b".into())));
    lone.step(Input::NodeUpserted(node("a", json!({"role": "edge"}))));
    lone.step(Input::NodeRemoved(ObjectKey::new("", "b")));
    assert_eq!(lone.owner("10.0.0.1"), Some("a".into()));
    let effects = lone.step(Input::NodeUpserted(node("a", json!({"role": "core"}))));
    assert_eq!(released(&effects), [ip("10.0.0.1")]);
}

#[test]
fn r02_external_traffic_policy_decides_which_nodes_may_answer() {
    let local = json!({"externalTrafficPolicy": "Local", "selector": {"app": "web"}});
    let placement =
        |nodes: &[&str], anywhere| Placement { nodes: nodes.iter().map(|n| (*n).into()).collect(), anywhere };
    let cases: Vec<(serde_json::Value, Placement, &[&str])> = vec![
        (json!({}), placement(&["b"], false), &["a", "b"]),
        (json!({}), placement(&[], false), &["a", "b"]),
        (json!({}), placement(&[], true), &["a", "b"]),
        (local.clone(), placement(&["a"], false), &["a"]),
        (local.clone(), placement(&["b", "z"], false), &["b"]),
        (local.clone(), placement(&[], false), &[]),
        (local.clone(), placement(&["z"], false), &[]),
        (local.clone(), placement(&[], true), &["a", "b"]),
        (local, placement(&["b"], true), &["a", "b"]),
    ];
    for (spec, placement, expected) in cases {
        // Each node's own view agrees on the owner, and every address finds one of the expected.
        for n in 0..8 {
            let addr = format!("10.0.0.{n}");
            let mut owners = BTreeSet::new();
            for (me, other) in [("a", "b"), ("b", "a")] {
                let mut lone = Lone::with_policy(me);
                lone.step(Input::Members(members([record(other, &[])])));
                lone.step(Input::Placed { service: key("web"), placement: placement.clone() });
                lone.step(Input::ServiceUpserted(service_with("web", &[&addr], spec.clone())));
                owners.insert(lone.owner(&addr));
            }
            assert_eq!(owners.len(), 1, "{spec} {placement:?}");
            let owner = owners.pop_first().flatten();
            assert_eq!(owner.is_none(), expected.is_empty(), "{spec} {placement:?}");
            assert!(owner.is_none_or(|o| expected.contains(&o.as_str())), "{spec} {placement:?}");
        }
    }
}

#[test]
fn r06_services_that_share_an_address_have_one_owner_and_r07_it_stays_until_the_last_goes() {
    let mut lone = Lone::with_policy("a");
    assert_eq!(claimed(&lone.step(Input::ServiceUpserted(service("one", &["10.0.0.1"])))).len(), 1);
    assert_eq!(lone.step(Input::ServiceUpserted(service("two", &["10.0.0.1"]))), []);
    assert_eq!(lone.machine.views()[0].view.services, ["default/one", "default/two"]);
    assert_eq!(lone.step(Input::ServiceRemoved(key("one"))), []);
    assert_eq!(released(&lone.step(Input::ServiceRemoved(key("two")))), [ip("10.0.0.1")]);
}

#[test]
fn a_shared_address_goes_to_a_node_that_serves_all_of_its_services() {
    let local = json!({"externalTrafficPolicy": "Local"});
    for n in 0..8 {
        let addr = format!("10.0.0.{n}");
        let mut lone = Lone::with_policy("a");
        lone.step(Input::Members(members([record("b", &[])])));
        lone.step(Input::ServiceUpserted(service("everywhere", &[&addr])));
        lone.step(Input::ServiceUpserted(service_with("on-b", &[&addr], local.clone())));
        let placement = Placement { nodes: ["b".into()].into(), anywhere: false };
        lone.step(Input::Placed { service: key("on-b"), placement });
        assert_eq!(lone.owner(&addr), Some("b".into()));
    }
}

#[test]
fn a_returning_node_takes_nothing_back() {
    let addr = ip("10.0.0.1");
    let mut lone = Lone::with_policy("a");
    lone.step(Input::ServiceUpserted(service("web", &["10.0.0.1"])));
    // Many others come, some of them with a higher weight, none with a claim.
    let others: Vec<Record> = (0..20).map(|n| record(&format!("n{n}"), &[])).collect();
    assert!(others.iter().any(|other| weight(addr, &other.node) > weight(addr, "a")));
    assert_eq!(lone.step(Input::Members(members(others))), []);
    assert_eq!(lone.owner("10.0.0.1"), Some("a".into()));
    // And the other way round: another one has it when we come.
    let mut lone = Lone::with_policy("z");
    lone.step(Input::Members(members([record("a", &[addr])])));
    assert_eq!(lone.step(Input::ServiceUpserted(service("web", &["10.0.0.1"]))), []);
    assert_eq!(lone.owner("10.0.0.1"), Some("a".into()));
    // Until it dies.
    assert_eq!(claimed(&lone.step(Input::Members(members([])))), [addr]);
}

#[test]
fn of_two_claims_the_higher_weight_stays() {
    let addr = ip("10.0.0.1");
    let (low, high) = if weight(addr, "a") < weight(addr, "b") { ("a", "b") } else { ("b", "a") };
    for (me, other, stays) in [(high, low, true), (low, high, false)] {
        let mut lone = Lone::with_policy(me);
        lone.step(Input::ServiceUpserted(service("web", &["10.0.0.1"])));
        let effects = lone.step(Input::Members(members([record(other, &[addr])])));
        assert_eq!(released(&effects).is_empty(), stays);
        assert_eq!(lone.owner("10.0.0.1").as_deref(), Some(high));
    }
    // A claim that others cannot see does not stand, whatever its weight: they think that we are dead.
    let mut lone = Lone::with_policy(high);
    lone.step(Input::ServiceUpserted(service("web", &["10.0.0.1"])));
    let unseen = Members { self_seen: false, ..members([]) };
    assert_eq!(lone.step(Input::Members(unseen)), [], "a single node never fences itself");
    let unseen = Members { self_seen: false, ..members([record(low, &[addr])]) };
    assert_eq!(released(&lone.step(Input::Members(unseen))), [addr]);
}

#[test]
fn a_draining_node_answers_until_the_next_owner_says_that_it_does() {
    let addr = ip("10.0.0.1");
    let mut lone = Lone::with_policy("a");
    lone.step(Input::ServiceUpserted(service("web", &["10.0.0.1"])));
    assert_eq!(lone.step(Input::Draining(true)), [], "alone, it goes on");
    lone.step(Input::Members(members([record("b", &[])])));
    assert_eq!((lone.state("10.0.0.1"), lone.owner("10.0.0.1")), (Some(State::HandingOver), Some("b".into())));
    assert_eq!(lone.machine.claims(), [addr]);
    // The next owner, seeing that we drain, claims although we do, too.
    let mut next = Lone::with_policy("b");
    let draining = Record { draining: true, ..record("a", &[addr]) };
    next.step(Input::Members(members([draining])));
    assert_eq!(claimed(&next.step(Input::ServiceUpserted(service("web", &["10.0.0.1"])))), [addr]);
    let effects = lone.step(Input::Members(members([record("b", &[addr])])));
    assert_eq!(released(&effects), [addr]);
}

#[test]
fn a_local_service_moves_before_the_old_owner_lets_go() {
    let mut lone = Lone::with_policy("a");
    lone.step(Input::Members(members([record("b", &[])])));
    let on = |node: &str| Input::Placed {
        service: key("web"),
        placement: Placement { nodes: [node.into()].into(), anywhere: false },
    };
    lone.step(on("a"));
    lone.step(Input::ServiceUpserted(service_with("web", &["10.0.0.1"], json!({"externalTrafficPolicy": "Local"}))));
    assert_eq!(lone.state("10.0.0.1"), Some(State::Announcing));
    assert_eq!(lone.step(on("b")), []);
    assert_eq!(lone.state("10.0.0.1"), Some(State::HandingOver));
    // The pod comes back before b has claimed: nothing happened.
    assert_eq!(lone.step(on("a")), []);
    assert_eq!(lone.state("10.0.0.1"), Some(State::Announcing));
}

#[test]
fn a_device_that_comes_back_is_announced_on_again() {
    let mut lone = Lone::with_policy("a");
    lone.step(all_of(&[device("eth0", 2), device("eth1", 3)]));
    lone.step(Input::ServiceUpserted(service("web", &["10.0.0.1"])));
    lone.advance(1000);
    lone.advance(1000);
    assert_eq!(lone.machine.next_deadline(), None);
    let unplugged = Device { running: false, ..device("eth1", 3) };
    let effects = lone.step(all_of(&[device("eth0", 2), unplugged]));
    assert_eq!((claimed(&effects).len(), announcements(&effects)), (1, 0), "only eth0 is left: {effects:?}");
    let effects = lone.step(all_of(&[device("eth0", 2), device("eth1", 3)]));
    assert_eq!((claimed(&effects).len(), announcements(&effects)), (1, 1), "{effects:?}");
    assert_eq!((announcements(&lone.advance(1000)), announcements(&lone.advance(1000))), (1, 1));
    // Another MAC, another number: clients have to learn.
    let other_mac = Device { mac: Some([2, 0, 0, 0, 0, 9]), ..device("eth1", 3) };
    let effects = lone.step(all_of(&[device("eth0", 2), other_mac]));
    assert_eq!((claimed(&effects).len(), announcements(&effects)), (0, 1), "{effects:?}");
    let effects = lone.step(all_of(&[device("eth0", 2), device("eth1", 7)]));
    assert_eq!((claimed(&effects).len(), announcements(&effects)), (1, 1), "{effects:?}");
    // The same again is nothing.
    assert_eq!(lone.step(all_of(&[device("eth0", 2), device("eth1", 7)])), []);
    // All gone: nothing can be answered, and others should take over.
    assert_eq!(released(&lone.step(all_of(&[]))), [ip("10.0.0.1")]);
    assert_eq!(lone.machine.next_deadline(), None, "no announcements for what is not ours");
}

#[test]
fn nothing_is_decided_before_everything_is_known() {
    let now = Instant::now();
    let mut machine = Ownership::new("a");
    let policy = policy("p", json!({"loadBalancerIPs": true}));
    for input in [
        all_of(&[device("eth0", 2)]),
        Input::PolicyUpserted(policy),
        Input::ServiceUpserted(service("web", &["10.0.0.1"])),
        Input::Tick,
    ] {
        assert_eq!(machine.step(input, now), []);
    }
    // Others cannot see us yet: wait a little for those who start with us, but not for ever.
    assert_eq!(machine.step(Input::Synced, now), []);
    assert_eq!(machine.views()[0].view.state, State::Waiting);
    assert_eq!(machine.next_deadline(), Some(now + SETTLE));
    assert_eq!(machine.step(Input::Tick, now + SETTLE / 2), []);
    assert_eq!(claimed(&machine.step(Input::Tick, now + SETTLE)), [ip("10.0.0.1")]);
}

#[test]
fn r47_nodes_that_start_together_wait_until_they_are_seen() {
    let mut lone = Lone { machine: Ownership::new("a"), now: Instant::now() };
    lone.step(all_of(&[device("eth0", 2)]));
    lone.step(Input::PolicyUpserted(policy("p", json!({"loadBalancerIPs": true}))));
    lone.step(Input::ServiceUpserted(service("web", &["10.0.0.1"])));
    assert_eq!(lone.step(Input::Synced), []);
    assert_eq!(claimed(&lone.step(Input::Members(members([])))), [ip("10.0.0.1")], "seen: no need to wait longer");
}

#[test]
fn r53_a_restarted_agent_keeps_what_nobody_took_and_drops_the_rest() {
    let (mine, taken, gone) = (ip("10.0.0.1"), ip("10.0.0.2"), ip("10.0.0.3"));
    let mut lone = Lone { machine: Ownership::new("a"), now: Instant::now() };
    lone.step(all_of(&[device("eth0", 2)]));
    lone.step(Input::PolicyUpserted(policy("p", json!({"loadBalancerIPs": true}))));
    lone.step(Input::ServiceUpserted(service("web", &["10.0.0.1", "10.0.0.2"])));
    lone.step(Input::Restored(vec![mine, taken, gone]));
    let others: Vec<Record> = (0..20).map(|n| record(&format!("n{n}"), &[taken][usize::from(n != 7)..])).collect();
    lone.step(Input::Members(Members { self_seen: false, ..members(others) }));
    let effects = lone.step(Input::Synced);
    assert_eq!((claimed(&effects), released(&effects)), (vec![mine], vec![taken, gone]));
    assert_eq!(lone.owner("10.0.0.2"), Some("n7".into()));
}

#[test]
fn an_input_about_one_service_touches_one_address() {
    let mut lone = Lone::with_policy("a");
    for n in 0..10_000u32 {
        let addr = std::net::Ipv4Addr::from(0x0a00_0000 + n).to_string();
        lone.step(Input::ServiceUpserted(service(&format!("s{n}"), &[&addr])));
    }
    assert_eq!(lone.machine.claims().len(), 10_000);
    let effects = lone.step(Input::ServiceUpserted(service("s7", &["10.9.9.9"])));
    assert_eq!((claimed(&effects), released(&effects)), (vec![ip("10.9.9.9")], vec![ip("10.0.0.7")]));
    assert!(lone.machine.dirty.is_empty());
}

const ONLY_IPV4: Families = Families { ipv4: true, ipv6: false };

#[test]
fn a_node_is_asked_for_the_ip_versions_that_it_can_answer_for() {
    let addr = "fd00::100";
    let best = (0..100).map(|n| format!("n{n}")).max_by_key(|node| weight(ip(addr), node)).unwrap();
    let mut lone = Lone::with_policy("me");
    lone.step(Input::ServiceUpserted(service("web", &[addr, "10.0.0.1"])));
    // The highest weight of all does not help a node without IPv6.
    let without = |node: &str| {
        let mut record = record(node, &[]);
        record.set_announcers([("eth0".into(), ONLY_IPV4)]);
        record
    };
    lone.step(Input::Members(members([without(&best)])));
    assert_eq!(lone.owner(addr).as_deref(), Some("me"));
    // It has got IPv6 now; whoever answers keeps what it has.
    lone.step(Input::Members(members([record(&best, &[])])));
    assert_eq!(lone.owner(addr).as_deref(), Some("me"));

    // This node loses IPv6: it lets go of that at once, and of nothing else.
    let effects = lone.step(Input::Devices(vec![(device("eth0", 2), ONLY_IPV4)]));
    assert_eq!(released(&effects), [ip(addr)]);
    assert_eq!((lone.owner(addr), lone.state(addr)), (Some(best.clone()), Some(State::Elsewhere)));
    // Nobody has it any more: then nobody is told to answer.
    lone.step(Input::Members(members([without(&best)])));
    assert_eq!((lone.owner(addr), lone.state(addr)), (None, Some(State::Unowned)));
    // Where there is one device with IPv6, it is asked for on that one.
    let two = vec![(device("eth0", 2), ONLY_IPV4), (device("eth1", 3), Families::BOTH)];
    let effects = lone.step(Input::Devices(two));
    let eth1 = DeviceId { ifindex: 3, name: "eth1".into() };
    assert!(effects.contains(&Effect::Claim { addr: ip(addr), devices: vec![eth1] }), "{effects:?}");
}
