//! SCTP keeps port numbers.

use serde_json::json;

use super::*;

fn ports(name: &str, port: u16) -> Value {
    json!([{"name": name, "port": port, "protocol": "SCTP"}])
}

#[test]
fn endpoints_on_the_services_own_port_are_served_like_those_of_other_protocols() {
    let spec = json!({"clusterIP": "10.96.0.1", "ports": [{"name": "s", "port": 7, "protocol": "SCTP"}]});
    let compiled =
        compiled(&balanced(spec, "10.0.0.100"), &[slice("s", ports("s", 7), pods(&["10.42.0.1", "10.42.0.2"]))]);
    let backends = "[10.42.0.1:7 10.42.0.2:7]";
    let expected = [("10.0.0.100:7/SCTP", "LoadBalancer"), ("10.96.0.1:7/SCTP", "ClusterIp")];
    for (address, kind) in expected {
        let line = format!("{address} {kind} {backends} {backends}");
        assert!(show(&compiled).contains(&line), "{line}: {:#?}", show(&compiled));
    }
    assert_eq!(compiled.problems, Vec::<String>::new());
}

#[test]
fn what_would_need_another_port_is_left_out_and_named() {
    let spec = json!({"type": "NodePort", "clusterIP": "10.96.0.1", "ports": [
        {"name": "same", "port": 7, "nodePort": 30007, "protocol": "SCTP"},
        {"name": "other", "port": 8, "protocol": "SCTP"},
        {"name": "high", "port": 30009, "nodePort": 30009, "protocol": "SCTP"},
    ]});
    let slices = [
        slice("a", ports("same", 7), pods(&["10.42.0.1"])),
        slice("b", ports("other", 9000), pods(&["10.42.0.1"])),
        slice("c", ports("high", 30009), pods(&["10.42.0.1"])),
    ];
    let compiled = compiled(&service(spec), &slices);
    let sctp: Vec<_> = show(&compiled).into_iter().filter(|line| line.contains("SCTP")).collect();
    assert_eq!(sctp.len(), 4, "the NodePort of an endpoint that listens on it works: {sctp:#?}");
    assert!(sctp.iter().all(|line| line.contains(":7/SCTP ClusterIp") || line.contains(":30009/SCTP")), "{sctp:#?}");
    let [node_port, target] = &compiled.problems[..] else { panic!("{:#?}", compiled.problems) };
    assert!(node_port.starts_with("spec.ports[0].nodePort: SCTP ports are not rewritten, so 30007"), "{node_port}");
    assert!(target.starts_with("spec.ports[1].targetPort: SCTP ports are not rewritten, so port 8 "), "{target}");
    assert!(target.ends_with("make port and targetPort equal"), "{target}");
}

#[test]
fn of_endpoints_with_several_ports_those_with_the_services_own_are_used() {
    let spec =
        json!({"clusterIP": "10.96.0.1", "ports": [{"name": "s", "port": 7, "protocol": "SCTP", "targetPort": "s"}]});
    let slices = [slice("a", ports("s", 7), pods(&["10.42.0.1"])), slice("b", ports("s", 8), pods(&["10.42.0.2"]))];
    let compiled = compiled(&service(spec), &slices);
    assert!(show(&compiled).contains(&"10.96.0.1:7/SCTP ClusterIp [10.42.0.1:7] [10.42.0.1:7]".to_owned()));
    assert_eq!(compiled.problems.len(), 1);
}

#[test]
fn one_port_number_is_free_for_each_protocol() {
    let spec = json!({"clusterIP": "10.96.0.1", "ports": [
        {"name": "s", "port": 7, "protocol": "SCTP"}, {"name": "t", "port": 7}, {"name": "u", "port": 7, "protocol": "UDP"},
    ]});
    let all = json!([{"name": "s", "port": 7, "protocol": "SCTP"}, {"name": "t", "port": 7},
        {"name": "u", "port": 7, "protocol": "UDP"}]);
    let compiled = compiled(&service(spec), &[slice("a", all, pods(&["10.42.0.1"]))]);
    assert_eq!(compiled.frontends.iter().filter(|frontend| frontend.port == 7).count(), 3);
    assert_eq!(compiled.problems, Vec::<String>::new());
}

#[test]
fn without_the_setting_other_protocols_of_the_service_go_on() {
    let spec = json!({"clusterIP": "10.96.0.1", "ports": [
        {"name": "s", "port": 7, "protocol": "SCTP"}, {"name": "t", "port": 8},
    ]});
    let all = json!([{"name": "s", "port": 7, "protocol": "SCTP"}, {"name": "t", "port": 8}]);
    let off = NodeContext { sctp: false, ..node() };
    let compiled = compile(&service(spec), [slice("a", all, pods(&["10.42.0.1"]))].iter(), &off);
    assert!(show(&compiled).iter().all(|line| !line.contains("SCTP")));
    assert!(show(&compiled).iter().any(|line| line.contains(":8/TCP")));
    assert_eq!(compiled.problems, ["spec.ports[0].protocol: SCTP is not served on this node; set enable-sctp to true"]);
}
