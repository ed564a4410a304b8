//! Health-check node ports: who has one, and what counts.

use serde_json::json;

use super::*;
use crate::objects::ObjectKey;
use crate::services::{HealthCheck, HealthPorts};

fn local(mut spec: Value) -> Service {
    spec["externalTrafficPolicy"] = "Local".into();
    spec["healthCheckNodePort"] = 31_000.into();
    spec["ports"] = json!([{"name": "http", "port": 80, "nodePort": 30_080}, {"name": "admin", "port": 81}]);
    balanced(spec, "10.0.0.100")
}

fn check(service: &Service, slices: &[EndpointSlice], node: &NodeContext) -> Option<HealthCheck> {
    compile(service, slices.iter(), node).health_check
}

#[test]
fn pods_count_once_and_only_local_ones_that_are_ready() {
    let ports = json!([{"name": "http", "port": 8080}, {"name": "admin", "port": 9090}]);
    let endpoints = json!([
        {"addresses": ["10.42.0.1"], "nodeName": "here"},
        {"addresses": ["10.42.0.2"], "nodeName": "here", "conditions": {"ready": false}},
        {"addresses": ["10.42.0.3"], "nodeName": "here", "conditions": {"ready": false, "serving": true, "terminating": true}},
        {"addresses": ["10.42.0.4"], "nodeName": "there"},
        // Without a node it is everywhere, as for the traffic itself.
        {"addresses": ["10.42.0.5"]},
    ]);
    let slices = [slice("s", ports, endpoints)];
    assert_eq!(check(&local(json!({})), &slices, &node()), Some(HealthCheck { port: 31_000, local: 2 }));
    assert_eq!(check(&local(json!({})), &[], &node()), Some(HealthCheck { port: 31_000, local: 0 }));
}

#[test]
fn a_pod_with_addresses_of_both_families_counts_once() {
    let ports = || json!([{"name": "http", "port": 8080}]);
    let mut six = slice("six", ports(), json!([{"addresses": ["fd00::1"], "nodeName": "here"}]));
    six.address_type = "IPv6".into();
    let slices = [slice("four", ports(), json!([{"addresses": ["10.42.0.1"], "nodeName": "here"}])), six];
    assert_eq!(check(&local(json!({})), &slices, &node()).map(|check| check.local), Some(1));
}

#[test]
fn only_load_balancers_with_the_local_policy_have_one() {
    let node_ = node();
    let without = [
        local(json!({"healthCheckNodePort": 0})),
        {
            let mut service = local(json!({}));
            service.spec.health_check_node_port = Some(0);
            service
        },
        {
            let mut service = local(json!({}));
            service.spec.external_traffic_policy = crate::objects::TrafficPolicy::Cluster;
            service
        },
        {
            let mut service = local(json!({}));
            service.spec.kind = crate::objects::ServiceType::NodePort;
            service
        },
        {
            let mut service = local(json!({}));
            service.metadata.labels.insert("service.kubernetes.io/service-proxy-name".into(), "other".into());
            service
        },
    ];
    assert!(check(&without[0], &[], &node_).is_some(), "the helper sets the port");
    for service in &without[1..] {
        assert_eq!(check(service, &[], &node_), None, "{service:?}");
    }
    let off = NodeContext { health_check_node_ports: false, ..node() };
    assert_eq!(check(&local(json!({})), &[], &off), None);
    let beside_kube_proxy = NodeContext { kube_proxy_replacement: false, ..node() };
    assert_eq!(check(&local(json!({})), &[], &beside_kube_proxy), None, "kube-proxy listens there");
}

#[test]
fn the_load_balancers_address_leads_to_the_answer_when_asked_for() {
    let on = NodeContext { health_check_on_load_balancer: true, ..node() };
    let service = local(json!({"sessionAffinity": "ClientIP", "loadBalancerSourceRanges": ["192.0.2.0/24"]}));
    let compiled = compile(&service, std::iter::empty(), &on);
    let shown = show(&compiled);
    assert!(
        shown.iter().any(|line| line.starts_with("10.0.0.100:31000/TCP") && line.contains("192.168.1.1:31000")),
        "{shown:#?}"
    );
    let frontend = compiled.frontends.iter().find(|frontend| frontend.port == 31_000).expect("there");
    use kinesin_abi::frontend_flags as flags;
    assert_eq!(frontend.flags & (flags::AFFINITY | flags::SOURCE_RANGES), 0, "who checks is no client");
    assert!(!show(&compile(&service, std::iter::empty(), &node())).iter().any(|line| line.contains("31000")));

    let mut clash = service.clone();
    clash.spec.ports[0].port = 31_000;
    let compiled = compile(&clash, std::iter::empty(), &on);
    assert!(compiled.problems.iter().any(|text| text.starts_with("spec.healthCheckNodePort: 10.0.0.100:31000")));
}

#[test]
fn one_service_answers_on_a_port_and_the_other_one_is_told() {
    let (a, b) = (ObjectKey::new("default", "a"), ObjectKey::new("default", "b"));
    let mut ports = HealthPorts::default();
    ports.set(&b, Some(31_000));
    assert_eq!(ports.wanted(), [(31_000, &b)].into());
    ports.set(&a, Some(31_000));
    assert_eq!(ports.wanted(), [(31_000, &a)].into(), "whatever the order");
    assert_eq!(
        ports.problems(),
        ["Service default/b: spec.healthCheckNodePort 31000 is answered for default/a; give each Service its own port"]
    );
    ports.set(&a, Some(31_001));
    assert_eq!(ports.wanted(), [(31_000, &b), (31_001, &a)].into());
    ports.set(&a, None);
    ports.set(&b, None);
    assert!(ports.wanted().is_empty() && ports.problems().is_empty());
}
