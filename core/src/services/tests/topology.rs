//! Which endpoints hints leave, and when they are not used at all.

use serde_json::{Value, json};

use super::{NodeContext, compile, node, service, slice};
use crate::objects::EndpointSlice;

/// An endpoint as `address zone,zone node,node state`, with `-` for none.
fn endpoint(text: &str) -> Value {
    let words: Vec<&str> = text.split(' ').collect();
    let names = |word: &str| -> Value {
        word.split(',').filter(|name| *name != "-").map(|name| json!({"name": name})).collect()
    };
    let conditions = match words.get(3) {
        Some(&"terminating") => json!({"ready": false, "terminating": true, "serving": true}),
        Some(&"down") => json!({"ready": false}),
        _ => json!({"ready": true}),
    };
    let node_name = if words[0] == "10.42.0.1" { "here" } else { "there" };
    let hints = json!({"forZones": names(words[1]), "forNodes": names(words[2])});
    json!({"addresses": [words[0]], "nodeName": node_name, "conditions": conditions, "hints": hints})
}

fn endpoints(all: &[&str]) -> EndpointSlice {
    let all: Value = all.iter().map(|text| endpoint(text)).collect();
    slice("s", json!([{"name": "http", "port": 8080}]), all)
}

/// The last numbers of the addresses that are used by the cluster's clients, of a Service with these additions.
fn used(extra: Value, annotation: Option<(&str, &str)>, all: &[&str], node: &NodeContext) -> Vec<u8> {
    let mut spec = json!({"clusterIP": "10.96.0.1", "ports": [{"name": "http", "port": 80}]});
    spec.as_object_mut().expect("object").extend(extra.as_object().expect("object").clone());
    let mut web = service(spec);
    if let Some((name, value)) = annotation {
        web.metadata.annotations.insert(name.into(), value.into());
    }
    let compiled = compile(&web, [&endpoints(all)].into_iter(), node);
    let set = &compiled.sets[compiled.frontends.last().expect("a frontend").internal.expect("a set")];
    let last = |ip: std::net::IpAddr| ip.to_string().rsplit('.').next().and_then(|n| n.parse().ok()).expect("a number");
    set.backends[..set.usable].iter().map(|backend| last(backend.addr)).collect()
}

fn zoned() -> NodeContext {
    NodeContext { zone: "a".into(), service_topology: true, ..node() }
}

const SPREAD: [&str; 3] = ["10.42.0.1 a here", "10.42.0.2 a,b there", "10.42.0.3 b there"];

#[test]
fn a_service_uses_the_endpoints_that_are_hinted_for_its_zone_or_node_if_it_asks_for_it() {
    type Annotation = Option<(&'static str, &'static str)>;
    let table: [(&str, Value, Annotation, &[u8]); 9] = [
        ("nothing asked for", json!({}), None, &[1, 2, 3]),
        ("close", json!({"trafficDistribution": "PreferClose"}), None, &[1, 2]),
        ("same zone", json!({"trafficDistribution": "PreferSameZone"}), None, &[1, 2]),
        ("same node", json!({"trafficDistribution": "PreferSameNode"}), None, &[1]),
        ("unknown", json!({"trafficDistribution": "PreferFar"}), None, &[1, 2, 3]),
        ("mode", json!({}), Some(("service.kubernetes.io/topology-mode", "Auto")), &[1, 2]),
        ("its old name", json!({}), Some(("service.kubernetes.io/topology-aware-hints", "auto")), &[1, 2]),
        ("switched off", json!({}), Some(("service.kubernetes.io/topology-mode", "Disabled")), &[1, 2, 3]),
        ("local first", json!({"trafficDistribution": "PreferClose", "internalTrafficPolicy": "Local"}), None, &[1]),
    ];
    for (what, extra, annotation, expected) in table {
        assert_eq!(used(extra, annotation, &SPREAD, &zoned()), expected, "{what}");
    }
}

#[test]
fn hints_are_used_only_when_everyone_in_use_has_one_and_one_is_ours() {
    let close = || json!({"trafficDistribution": "PreferClose"});
    let same_node = || json!({"trafficDistribution": "PreferSameNode"});
    let table: [(&str, Value, &[&str], &[u8]); 7] = [
        ("one without", close(), &["10.42.0.1 a -", "10.42.0.2 - -"], &[1, 2]),
        ("none of ours", close(), &["10.42.0.1 b -", "10.42.0.2 c -"], &[1, 2]),
        (
            "one that is not in use needs none",
            close(),
            &["10.42.0.1 a -", "10.42.0.2 b -", "10.42.0.3 - - terminating"],
            &[1],
        ),
        ("one that is not ready needs none", close(), &["10.42.0.1 a -", "10.42.0.2 b -", "10.42.0.3 - - down"], &[1]),
        ("a hint of one out of use is none of ours", close(), &["10.42.0.1 a - terminating", "10.42.0.2 b -"], &[2]),
        ("zones where no node is ours", same_node(), &["10.42.0.2 a there", "10.42.0.3 b there"], &[2]),
        (
            "zones where nodes are missing",
            same_node(),
            &["10.42.0.1 a here", "10.42.0.2 a -", "10.42.0.3 b there"],
            &[1, 2],
        ),
    ];
    for (what, extra, all, expected) in table {
        assert_eq!(used(extra, None, all, &zoned()), expected, "{what}");
    }
    let nowhere = NodeContext { zone: "".into(), ..zoned() };
    assert_eq!(used(close(), None, &SPREAD, &nowhere), [1, 2, 3], "a node without zone");
    let off = NodeContext { service_topology: false, ..zoned() };
    assert_eq!(used(close(), None, &SPREAD, &off), [1, 2, 3], "the key is off");
}
