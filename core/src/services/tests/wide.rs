//! What `kinesin services --wide` says of each backend.

use serde_json::json;

use super::*;
use crate::objects::ObjectKey;
use crate::services::{AllBackends, WideView, wide};

fn lines(service: &Service, slices: &[EndpointSlice], node: &NodeContext) -> Vec<WideView> {
    let compiled = compile(service, slices.iter(), node);
    let all = AllBackends::of(service, slices.iter(), node);
    wide(&ObjectKey::new("default", "web"), &compiled, "programmed", &all)
}

fn said(line: &WideView) -> Vec<(String, u32, Option<&'static str>)> {
    line.backends.iter().map(|b| (b.address.clone(), b.weight, b.unused)).collect()
}

fn mixed() -> EndpointSlice {
    let ending = |serving: bool| json!({"ready": false, "serving": serving, "terminating": true});
    slice(
        "s",
        json!([{"name": "http", "port": 8080}]),
        json!([
            {"addresses": ["10.42.0.1"], "nodeName": "here", "zone": "a"},
            {"addresses": ["10.42.0.2"], "nodeName": "here", "conditions": {"ready": false}},
            {"addresses": ["10.42.0.3"], "nodeName": "here", "conditions": ending(true)},
            {"addresses": ["10.42.0.4"], "nodeName": "here", "conditions": ending(false)},
            {"addresses": ["10.42.0.5"], "nodeName": "there"},
        ]),
    )
}

#[test]
fn every_backend_says_why_it_is_not_used() {
    let spec = json!({"ports": [{"name": "http", "port": 80}], "externalTrafficPolicy": "Local",
                      "sessionAffinity": "ClientIP", "loadBalancerSourceRanges": ["192.0.2.0/24"]});
    let lines = lines(&balanced(spec, "10.0.0.100"), &[mixed()], &node());
    let [outside, inside] = &lines[..] else { panic!("{lines:#?}") };
    assert_eq!((outside.scope, inside.scope), ("external", "internal"));
    assert_eq!((outside.external_traffic_policy, outside.internal_traffic_policy), ("Local", "Cluster"));
    assert_eq!(
        said(outside),
        [
            ("10.42.0.1:8080".into(), 1, None),
            ("10.42.0.2:8080".into(), 0, Some("not ready")),
            ("10.42.0.3:8080".into(), 0, Some("terminating, while others are ready")),
            ("10.42.0.4:8080".into(), 0, Some("terminating and serving no more")),
            ("10.42.0.5:8080".into(), 0, Some("on another node, and the traffic policy is Local")),
        ]
    );
    assert!(said(inside).contains(&("10.42.0.5:8080".into(), 1, None)));
    assert_eq!(outside.session_affinity_seconds, Some(10_800));
    assert_eq!(
        (outside.source_ranges_policy, &outside.source_ranges[..]),
        (Some("allow"), &["192.0.2.0/24".to_owned()][..])
    );
    assert!(outside.routable && outside.algorithm == "random" && outside.kind == "LoadBalancer");
}

#[test]
fn what_hints_leave_out_is_said() {
    let hinted = |address: &str, zone: &str| json!({"addresses": [address], "zone": zone, "hints": {"forZones": [{"name": zone}]}});
    let slices = [slice(
        "s",
        json!([{"name": "http", "port": 8080}]),
        json!([hinted("10.42.0.1", "a"), hinted("10.42.0.2", "b")]),
    )];
    let web = service(
        json!({"clusterIP": "10.96.0.1", "ports": [{"name": "http", "port": 80}], "trafficDistribution": "PreferSameZone"}),
    );
    let node = NodeContext { zone: "a".into(), service_topology: true, ..node() };
    let lines = lines(&web, &slices, &node);
    assert_eq!(
        said(&lines[0]),
        [("10.42.0.1:8080".into(), 1, None), ("10.42.0.2:8080".into(), 0, Some("hinted for other zones or nodes"))]
    );
    assert_eq!(
        (lines[0].routable, lines[0].session_affinity_seconds, lines[0].source_ranges_policy),
        (false, None, None)
    );
    let json = serde_json::to_value(&lines[0]).expect("JSON");
    let mut keys: Vec<&String> = json.as_object().expect("an object").keys().collect();
    keys.sort();
    assert_eq!(
        keys,
        [
            "address",
            "algorithm",
            "backends",
            "externalTrafficPolicy",
            "healthCheckNodePort",
            "internalTrafficPolicy",
            "portName",
            "routable",
            "scope",
            "service",
            "sessionAffinitySeconds",
            "sourceRanges",
            "sourceRangesPolicy",
            "status",
            "type",
        ]
    );
}
