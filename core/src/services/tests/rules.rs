use kinesin_abi::{FrontendKind, frontend_flags as flags};
use serde_json::{Value, json};

use super::{Algorithm, NodeContext, balanced, compile, compiled, http, node, pods, service, show, slice};
use crate::objects::{EndpointSlice, Name};
use crate::services::{Dispatch, Forwarding, Frontend, ServiceKey, address_text, view};

const HTTP: &str = r#"[{"name": "http", "port": 80, "nodePort": 30080}]"#;

fn ports() -> Value {
    serde_json::from_str(HTTP).expect("json")
}

#[test]
fn each_kind_of_address_becomes_frontends() {
    let web = balanced(
        json!({"clusterIPs": ["10.96.0.1", "fd00::1"], "externalIPs": ["198.51.100.7"], "ports": ports()}),
        "192.0.2.1",
    );
    let all = "[10.42.0.1:8080 10.42.1.1:8080] [10.42.0.1:8080 10.42.1.1:8080]";
    assert_eq!(
        show(&compiled(&web, &[http(&["10.42.0.1", "10.42.1.1"])])),
        [
            format!("0.0.0.0:30080/TCP NodePort {all}"),
            "10.96.0.1:0/ANY ClusterIp [-] [-]".into(),
            format!("10.96.0.1:80/TCP ClusterIp {all}"),
            "192.0.2.1:0/ANY LoadBalancer [-] [-]".into(),
            format!("192.0.2.1:80/TCP LoadBalancer {all}"),
            format!("192.168.1.1:30080/TCP NodePort {all}"),
            format!("198.51.100.7:80/TCP ExternalIps {all}"),
            "[::]:30080/TCP NodePort [] []".into(),
            "[fd00::1]:0/ANY ClusterIp [-] [-]".into(),
            "[fd00::1]:80/TCP ClusterIp [] []".into(),
            "[fd01::1]:30080/TCP NodePort [] []".into(),
        ]
    );
}

#[test]
fn only_what_is_reachable_from_outside_is_routable() {
    let web = balanced(json!({"clusterIP": "10.96.0.1", "ports": ports()}), "192.0.2.1");
    let routable = |node: &NodeContext, kind| {
        let compiled = compile(&web, std::iter::empty(), node);
        compiled.frontends.iter().filter(|f| f.kind == kind && f.port != 0).all(|f| f.flags & flags::ROUTABLE != 0)
    };
    assert!(!routable(&node(), FrontendKind::ClusterIp));
    assert!(routable(&node(), FrontendKind::LoadBalancer));
    assert!(routable(&node(), FrontendKind::NodePort));
    assert!(routable(&NodeContext { external_cluster_ip: true, ..node() }, FrontendKind::ClusterIp));
}

#[test]
fn some_services_are_not_programmed() {
    let ours = json!({"clusterIP": "10.96.0.1", "ports": ports()});
    assert_ne!(compiled(&service(ours.clone()), &[]).frontends, []);
    let table = [
        ("headless", json!({"clusterIP": "None", "ports": ports()})),
        ("headless", json!({"clusterIPs": ["None"], "ports": ports()})),
        ("external name", json!({"type": "ExternalName", "clusterIP": "10.96.0.1", "ports": ports()})),
        ("no address yet", json!({"clusterIP": "", "ports": ports()})),
        ("unknown type", json!({"type": "Carrier", "clusterIP": "10.96.0.1", "ports": ports()})),
        ("no ports", json!({"clusterIP": "10.96.0.1"})),
    ];
    for (what, spec) in table {
        assert_eq!(compiled(&service(spec), &[http(&["10.42.0.1"])]).frontends, [], "{what}");
    }
    let mut labelled = service(ours.clone());
    labelled.metadata.labels.insert("service.kubernetes.io/headless".into(), "".into());
    assert_eq!(compiled(&labelled, &[]).frontends, [], "headless by label");
    let mut foreign = service(ours.clone());
    foreign.metadata.labels.insert("service.kubernetes.io/service-proxy-name".into(), "other".into());
    assert_eq!(compiled(&foreign, &[]).frontends, [], "another proxy's");
    let other = NodeContext { proxy_name: "other".into(), ..node() };
    assert_ne!(compile(&foreign, std::iter::empty(), &other).frontends, []);
    assert_eq!(compile(&service(ours), std::iter::empty(), &other).frontends, []);
}

#[test]
fn endpoints_are_matched_by_port_name_and_protocol_not_by_number() {
    let dns = service(json!({"clusterIP": "10.96.0.10", "ports": [
        {"name": "dns", "port": 53, "protocol": "UDP"}, {"name": "dns-tcp", "port": 53}, {"name": "metrics", "port": 9153},
    ]}));
    let a = slice(
        "a",
        json!([{"name": "dns", "port": 5353, "protocol": "UDP"}, {"name": "dns-tcp", "port": 53}]),
        pods(&["10.42.0.1"]),
    );
    // A named targetPort resolves differently here; `dns` of the wrong protocol is no match; 9153 is not called metrics.
    let b = slice(
        "b",
        json!([{"name": "dns", "port": 1053, "protocol": "UDP"}, {"name": "dns", "port": 1}, {"name": "m", "port": 9153}]),
        pods(&["10.42.0.2"]),
    );
    let expected = [
        "10.96.0.10:0/ANY ClusterIp [-] [-]",
        "10.96.0.10:53/TCP ClusterIp [10.42.0.1:53] [10.42.0.1:53]",
        "10.96.0.10:53/UDP ClusterIp [10.42.0.1:5353 10.42.0.2:1053] [10.42.0.1:5353 10.42.0.2:1053]",
        "10.96.0.10:9153/TCP ClusterIp [] []",
    ];
    let forward = compiled(&dns, &[a.clone(), b.clone()]);
    assert_eq!(show(&forward), expected);
    assert_eq!(compiled(&dns, &[b, a]), forward, "the order of slices does not matter");
}

#[test]
fn an_unnamed_port_matches_an_unnamed_port() {
    let web = service(json!({"clusterIP": "10.96.0.1", "ports": [{"port": 80}]}));
    let unnamed = slice("s", json!([{"name": null, "port": 8080}]), pods(&["10.42.0.1"]));
    assert_eq!(show(&compiled(&web, &[unnamed]))[1], "10.96.0.1:80/TCP ClusterIp [10.42.0.1:8080] [10.42.0.1:8080]");
}

#[test]
fn conditions_decide_who_is_used() {
    let web = service(json!({"clusterIP": "10.96.0.1", "ports": ports()}));
    let endpoint = |ip: &str, conditions: Value| json!({"addresses": [ip], "conditions": conditions});
    let terminating = || endpoint("10.42.0.2", json!({"ready": false, "serving": true, "terminating": true}));
    let gone = || endpoint("10.42.0.3", json!({"ready": false, "serving": false, "terminating": true}));
    let down = || endpoint("10.42.0.4", json!({"ready": false}));
    let table = [
        (
            json!([endpoint("10.42.0.5", json!({})), terminating(), gone(), down()]),
            "10.42.0.5:8080 | 10.42.0.2:8080 10.42.0.3:8080 10.42.0.4:8080",
        ),
        (json!([down(), terminating(), gone()]), "10.42.0.2:8080 | 10.42.0.3:8080 10.42.0.4:8080"),
        (json!([down(), gone()]), "| 10.42.0.3:8080 10.42.0.4:8080"),
        // publishNotReadyAddresses: the controller says ready, also while terminating.
        (json!([endpoint("10.42.0.9", json!({"ready": true, "terminating": true}))]), "10.42.0.9:8080"),
        (json!([endpoint("10.42.0.9", Value::Null)]), "10.42.0.9:8080"),
        (json!([]), ""),
    ];
    for (endpoints, expected) in table {
        let slice = slice("s", json!([{"name": "http", "port": 8080}]), endpoints.clone());
        let compiled = compiled(&web, &[slice]);
        assert_eq!(show(&compiled)[1], format!("10.96.0.1:80/TCP ClusterIp [{expected}] [{expected}]"), "{endpoints}");
    }
}

#[test]
fn an_endpoint_in_two_slices_counts_once_in_its_best_state() {
    let web = service(json!({"clusterIP": "10.96.0.1", "ports": ports()}));
    let old = slice(
        "old",
        json!([{"name": "http", "port": 8080}]),
        json!([{"addresses": ["10.42.0.1"], "conditions": {"ready": false}}]),
    );
    for slices in [[old.clone(), http(&["10.42.0.1"])], [http(&["10.42.0.1"]), old]] {
        let compiled = compiled(&web, &slices);
        assert_eq!(compiled.sets.len(), 1);
        assert_eq!((compiled.sets[0].backends.len(), compiled.sets[0].usable), (1, 1));
        assert!(compiled.sets[0].backends[0].local);
    }
}

#[test]
fn traffic_policies_keep_local_and_homeless_endpoints() {
    let spec = |etp: &str, itp: &str| {
        balanced(
            json!({"clusterIP": "10.96.0.1", "ports": ports(), "externalTrafficPolicy": etp, "internalTrafficPolicy": itp}),
            "192.0.2.1",
        )
    };
    let mut slice = http(&["10.42.0.1", "10.42.1.1", "10.42.2.1"]);
    slice.endpoints[2].node_name = Name::default();
    let near = "[10.42.0.1:8080 10.42.2.1:8080]";
    let all = "[10.42.0.1:8080 10.42.1.1:8080 10.42.2.1:8080]";
    let table = [
        ("Cluster", "Cluster", (all, all), (all, all)),
        ("Local", "Cluster", (all, all), (near, all)),
        ("Cluster", "Local", (near, near), (all, all)),
        ("Local", "Local", (near, near), (near, all)),
    ];
    for (etp, itp, cluster, outside) in table {
        let compiled = compiled(&spec(etp, itp), std::slice::from_ref(&slice));
        let line = |address: &str, kind: &str, (external, internal): (&str, &str)| {
            format!("{address}/TCP {kind} {external} {internal}")
        };
        let shown = show(&compiled);
        assert!(shown.contains(&line("10.96.0.1:80", "ClusterIp", cluster)), "{etp} {itp}: {shown:#?}");
        for (address, kind) in
            [("192.0.2.1:80", "LoadBalancer"), ("0.0.0.0:30080", "NodePort"), ("192.168.1.1:30080", "NodePort")]
        {
            assert!(shown.contains(&line(address, kind, outside)), "{etp} {itp}: {shown:#?}");
        }
        for frontend in compiled.frontends.iter().filter(|frontend| frontend.port != 0) {
            let is_cluster_ip = frontend.kind == FrontendKind::ClusterIp;
            assert_eq!(frontend.flags & flags::EXTERNAL_LOCAL != 0, etp == "Local" && !is_cluster_ip);
            assert_eq!(frontend.flags & flags::INTERNAL_LOCAL != 0, itp == "Local" && is_cluster_ip);
        }
        assert_eq!(compiled.sets.len(), if etp == "Cluster" && itp == "Cluster" { 1 } else { 2 });
    }
}

#[test]
fn a_local_set_falls_back_to_its_own_terminating_endpoints() {
    let web = balanced(json!({"ports": ports(), "externalTrafficPolicy": "Local"}), "192.0.2.1");
    let slice = slice(
        "s",
        json!([{"name": "http", "port": 8080}]),
        json!([
            {"addresses": ["10.42.0.1"], "nodeName": "here", "conditions": {"ready": false, "serving": true, "terminating": true}},
            {"addresses": ["10.42.1.1"], "nodeName": "there"},
        ]),
    );
    let shown = show(&compiled(&web, &[slice]));
    assert!(
        shown.contains(&"192.0.2.1:80/TCP LoadBalancer [10.42.0.1:8080] [10.42.1.1:8080 | 10.42.0.1:8080]".into()),
        "{shown:#?}"
    );
}

#[test]
fn load_balancer_addresses_with_mode_proxy_are_left_alone() {
    for (mode, expected) in [(Value::Null, 1), (json!("VIP"), 1), (json!("Proxy"), 0)] {
        let mut web = balanced(json!({"ports": ports()}), "192.0.2.1");
        web.status.load_balancer.ingress[0].ip_mode = serde_json::from_value(mode).expect("mode");
        let compiled = compiled(&web, &[]);
        let count = compiled.frontends.iter().filter(|f| f.kind == FrontendKind::LoadBalancer && f.port == 80).count();
        assert_eq!(count, expected);
    }
    let mut web = balanced(json!({"ports": ports()}), "192.0.2.1");
    web.status.load_balancer.ingress[0] = serde_json::from_value(json!({"hostname": "lb.example"})).expect("entry");
    assert_eq!(compiled(&web, &[]).problems, Vec::<String>::new());
}

#[test]
fn families_are_kept_apart_and_disabled_ones_are_left_out() {
    let web = service(
        json!({"type": "NodePort", "clusterIPs": ["10.96.0.1", "fd00::1"], "ipFamilies": ["IPv4", "IPv6"], "ports": ports()}),
    );
    let mut six = slice("six", json!([{"name": "http", "port": 8080}]), pods(&["fd02::1"]));
    six.address_type = "IPv6".into();
    let slices = [http(&["10.42.0.1"]), six];
    let shown = show(&compiled(&web, &slices));
    assert!(shown.contains(&"10.96.0.1:80/TCP ClusterIp [10.42.0.1:8080] [10.42.0.1:8080]".into()), "{shown:#?}");
    assert!(shown.contains(&"[fd00::1]:80/TCP ClusterIp [[fd02::1]:8080] [[fd02::1]:8080]".into()), "{shown:#?}");
    assert!(shown.contains(&"[::]:30080/TCP NodePort [[fd02::1]:8080] [[fd02::1]:8080]".into()), "{shown:#?}");
    let four = compile(&web, slices.iter(), &NodeContext { ipv6: false, ..node() });
    assert!(four.frontends.iter().all(|frontend| frontend.addr.is_ipv4()));
    assert!(four.sets.iter().flat_map(|set| set.backends.iter()).all(|backend| backend.addr.is_ipv4()));
    assert_eq!(four.problems, Vec::<String>::new());
    // A single-stack Service has NodePorts of its family only.
    let single = service(json!({"type": "NodePort", "clusterIPs": ["10.96.0.1"], "ports": ports()}));
    assert!(compiled(&single, &slices).frontends.iter().all(|frontend| frontend.addr.is_ipv4()));
}

#[test]
fn affinity_has_kubernetes_default_and_bounds() {
    let table = [
        (json!({"sessionAffinity": "ClientIP"}), 10_800, 0),
        (json!({"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 60}}}), 60, 0),
        (json!({"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": null}}), 10_800, 0),
        (
            json!({"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 0}}}),
            10_800,
            1,
        ),
        (
            json!({"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 90_000}}}),
            86_400,
            1,
        ),
        (json!({"sessionAffinity": "None", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 60}}}), 0, 0),
    ];
    for (mut spec, timeout, problems) in table {
        spec["clusterIP"] = "10.96.0.1".into();
        spec["ports"] = ports();
        let compiled = compiled(&service(spec.clone()), &[]);
        let frontend = compiled.frontends.iter().find(|frontend| frontend.port == 80).expect("there");
        assert_eq!(frontend.affinity, timeout, "{spec}");
        assert_eq!(frontend.flags & flags::AFFINITY != 0, timeout > 0, "{spec}");
        assert_eq!(compiled.problems.len(), problems, "{spec}");
    }
}

#[test]
fn maglev_is_for_routable_frontends_that_packets_meet() {
    let web = balanced(json!({"clusterIP": "10.96.0.1", "ports": ports()}), "192.0.2.1");
    let node = NodeContext { algorithm: Algorithm::Maglev, ..node() };
    let compiled = compile(&web, std::iter::empty(), &node);
    let with: Vec<String> =
        compiled.frontends.iter().filter(|f| f.flags & flags::MAGLEV != 0).map(|f| f.addr.to_string()).collect();
    assert_eq!(with, ["192.0.2.1", "192.168.1.1"]);
}

#[test]
fn wildcards_are_for_our_classes_once_per_address() {
    let wildcards = |class: Value, node: &NodeContext| {
        let web = balanced(
            json!({"clusterIP": "10.96.0.1", "externalIPs": ["198.51.100.7"], "loadBalancerClass": class,
                "ports": [{"name": "a", "port": 80}, {"name": "b", "port": 81, "nodePort": 30081}]}),
            "192.0.2.1",
        );
        let compiled = compile(&web, std::iter::empty(), node);
        let wild = compiled.frontends.iter().filter(|f| f.flags & flags::WILDCARD != 0);
        wild.map(|f| (f.addr.to_string(), f.port, f.proto, f.external, f.internal)).collect::<Vec<_>>()
    };
    let both = [("10.96.0.1".to_owned(), 0, 0, None, None), ("192.0.2.1".to_owned(), 0, 0, None, None)];
    assert_eq!(wildcards(Value::Null, &node()), both);
    assert_eq!(wildcards(json!("io.cilium/l2-announcer"), &node()), both);
    assert_eq!(wildcards(json!("io.cilium/bgp-control-plane"), &node()), both);
    assert_eq!(wildcards(json!("example.com/cloud"), &node()), []);
    let off = NodeContext { wildcards: false, ..node() };
    assert_eq!(wildcards(Value::Null, &off), []);
    let not_ours = NodeContext { default_lb_ipam: false, ..node() };
    assert_eq!(wildcards(Value::Null, &not_ours), []);
    assert_eq!(wildcards(json!("io.cilium/l2-announcer"), &not_ours), both);
}

#[test]
fn what_cannot_be_used_is_named_and_the_rest_works() {
    let web = service(json!({
        "clusterIPs": ["10.96.0.1", "10.96.0.300", "0.0.0.0"], "externalIPs": ["127.0.0.1"],
        "ports": [{"name": "http", "port": 80}, {"name": "x", "port": 80}, {"name": "icmp", "port": 1, "protocol": "ICMP"}, {"name": "zero"}],
    }));
    let bad = slice(
        "bad",
        json!([{"name": "http"}, {"name": "http", "port": 8080}]),
        json!([
            {"addresses": []}, {"addresses": ["pod-1"]}, {"addresses": ["fd02::1"]}, {"addresses": ["0.0.0.0"]}, {"addresses": ["10.42.0.1"]},
        ]),
    );
    let mut fqdn = http(&["10.42.0.9"]);
    fqdn.address_type = "FQDN".into();
    let compiled = compiled(&web, &[bad, fqdn]);
    assert_eq!(
        show(&compiled),
        ["10.96.0.1:0/ANY ClusterIp [-] [-]", "10.96.0.1:80/TCP ClusterIp [10.42.0.1:8080] [10.42.0.1:8080]"]
    );
    let expected = [
        "spec.clusterIPs: \"10.96.0.300\" is not an IP address",
        "spec.clusterIPs: 0.0.0.0 cannot be a service's address",
        "spec.externalIPs: 127.0.0.1 cannot be",
        "EndpointSlice default/bad: ports \"http\" has no port number",
        "EndpointSlice default/bad: an endpoint has no addresses",
        "EndpointSlice default/bad: endpoint address \"pod-1\" is not an IP address",
        "EndpointSlice default/bad: endpoint address fd02::1 is not of addressType IPv4",
        "EndpointSlice default/bad: endpoint address \"0.0.0.0\" is not the address of one host",
        "EndpointSlice default/s: addressType FQDN",
        "spec.ports: \"x\" and \"http\" are both 10.96.0.1:80/TCP",
        "spec.ports[2].protocol: \"ICMP\" is not supported; use TCP, UDP or SCTP",
        "spec.ports[3].port: is missing or 0",
    ];
    for part in expected {
        assert!(compiled.problems.iter().any(|problem| problem.starts_with(part)), "{part}: {:#?}", compiled.problems);
    }
}

#[test]
fn a_thousand_equal_faults_are_summed_up() {
    let web = service(json!({"clusterIP": "10.96.0.1", "ports": ports()}));
    let names: Vec<String> = (0..1000).map(|n| format!("pod-{n}")).collect();
    let slice = http(&names.iter().map(String::as_str).collect::<Vec<_>>());
    let problems = compiled(&web, &[slice]).problems;
    assert_eq!(problems.len(), 17);
    assert_eq!(problems[16], "and 984 more problems like these");
}

#[test]
fn mapped_addresses_are_their_ipv4_address() {
    let web = service(json!({"clusterIPs": ["10.96.0.1", "::ffff:10.96.0.1"], "ports": ports()}));
    let mut slice = http(&["::ffff:10.42.0.1"]);
    slice.endpoints.truncate(1);
    assert_eq!(show(&compiled(&web, &[slice]))[1..], ["10.96.0.1:80/TCP ClusterIp [10.42.0.1:8080] [10.42.0.1:8080]"]);
}

#[test]
fn the_view_splits_scopes_where_they_differ() {
    let web =
        balanced(json!({"clusterIP": "10.96.0.1", "ports": ports(), "externalTrafficPolicy": "Local"}), "192.0.2.1");
    let mut slice: EndpointSlice = http(&["10.42.0.1", "10.42.1.1"]);
    slice.endpoints[0].zone = "attic".into();
    let lines = view(&ServiceKey::new("default", "web"), &compiled(&web, &[slice]), "programmed");
    let short: Vec<String> =
        lines.iter().map(|l| format!("{} {} {} {}", l.address, l.kind, l.scope, l.backends.len())).collect();
    assert_eq!(
        short,
        [
            "0.0.0.0:30080/TCP NodePort external 1",
            "0.0.0.0:30080/TCP NodePort internal 2",
            "10.96.0.1:80/TCP ClusterIP all 2",
            "192.0.2.1:80/TCP LoadBalancer external 1",
            "192.0.2.1:80/TCP LoadBalancer internal 2",
            "192.168.1.1:30080/TCP NodePort external 1",
            "192.168.1.1:30080/TCP NodePort internal 2",
        ]
    );
    assert_eq!(
        serde_json::to_value(&lines[3]).expect("json"),
        json!({"address": "192.0.2.1:80/TCP", "type": "LoadBalancer", "service": "default/web", "portName": "http",
            "scope": "external", "status": "programmed",
            "backends": [{"address": "10.42.0.1:8080", "state": "active", "node": "here", "zone": "attic"}]})
    );
}

/// Who may connect, and the problems.
fn restricted(ranges: Value, policy: Option<&str>) -> (bool, Vec<String>, Vec<String>) {
    let mut web =
        balanced(json!({"clusterIP": "10.96.0.1", "ports": ports(), "loadBalancerSourceRanges": ranges}), "192.0.2.1");
    if let Some(policy) = policy {
        web.metadata.annotations.insert("service.cilium.io/src-ranges-policy".into(), policy.into());
    }
    let compiled = compiled(&web, &[]);
    let ranges = compiled.source_ranges.expect("the service is restricted");
    (ranges.deny, ranges.networks.iter().map(ToString::to_string).collect(), compiled.problems)
}

#[test]
fn source_ranges_are_canonical_networks_and_bad_ones_are_named() {
    let (deny, networks, problems) =
        restricted(json!([" 10.1.2.3/8 ", "2001:db8::1/64", "10.0.0.0/8", "::ffff:192.0.2.0/120"]), None);
    assert_eq!((deny, problems), (false, vec![]));
    assert_eq!(networks, ["10.0.0.0/8", "192.0.2.0/24", "2001:db8::/64"]);
    let (deny, networks, problems) = restricted(json!(["10.0.0.0/33", "192.0.2.0/24", "office"]), Some("deny"));
    assert_eq!((deny, networks), (true, vec!["192.0.2.0/24".to_owned()]));
    assert_eq!(problems.len(), 2);
    assert!(problems[0].starts_with("spec.loadBalancerSourceRanges: \"10.0.0.0/33\" is not a network"), "{problems:?}");
}

#[test]
fn a_list_without_any_network_serves_nobody_and_says_so() {
    let (deny, networks, problems) = restricted(json!(["office"]), None);
    assert_eq!((deny, networks), (false, vec![]));
    assert!(problems[1].contains("no client outside is served"), "{problems:?}");
    let (deny, networks, _) = restricted(json!(["office", ""]), Some("deny"));
    assert_eq!((deny, networks), (true, vec!["0.0.0.0/0".to_owned(), "::/0".to_owned()]));
    let (deny, _, problems) = restricted(json!(["10.0.0.0/8"]), Some("block"));
    assert!(!deny && problems[0].contains("\"block\" is no policy"), "{problems:?}");
}

#[test]
fn source_ranges_concern_load_balancer_addresses_unless_all_types_are_asked_for() {
    let spec = json!({
        "clusterIP": "10.96.0.1", "externalIPs": ["198.51.100.1"], "loadBalancerSourceRanges": ["10.0.0.0/8"],
        "ports": [{"name": "http", "port": 80, "nodePort": 30080}],
    });
    let web = balanced(spec, "192.0.2.1");
    let restricted = |node: &NodeContext| -> Vec<FrontendKind> {
        let compiled = compile(&web, std::iter::empty(), node);
        let flagged = compiled.frontends.iter().filter(|frontend| frontend.flags & flags::SOURCE_RANGES != 0);
        let mut kinds: Vec<_> = flagged.map(|frontend| frontend.kind).collect();
        kinds.sort();
        kinds.dedup();
        kinds
    };
    assert_eq!(restricted(&node()), [FrontendKind::LoadBalancer]);
    let all = NodeContext { source_range_all_types: true, ..node() };
    let every =
        [FrontendKind::ClusterIp, FrontendKind::NodePort, FrontendKind::LoadBalancer, FrontendKind::ExternalIps];
    assert_eq!(restricted(&all), every);
    // Without a load balancer's address there is nothing to restrict.
    let plain =
        service(json!({"clusterIP": "10.96.0.1", "ports": ports(), "loadBalancerSourceRanges": ["10.0.0.0/8"]}));
    assert_eq!(compiled(&plain, &[]).source_ranges, None);
}

#[test]
fn frontends_that_others_reach_from_outside_carry_the_way_to_other_nodes() {
    let forwarding = Forwarding { tcp: Dispatch::L2, other: Dispatch::Snat };
    let node = NodeContext { forwarding, ..node() };
    let ways = |policy: &str| {
        let mut service = balanced(
            json!({"clusterIP": "10.96.0.1", "externalTrafficPolicy": policy, "ports": [
                {"name": "http", "port": 80, "nodePort": 30080}, {"name": "dns", "port": 53, "protocol": "UDP"}]}),
            "203.0.113.1",
        );
        service.spec.external_ips = vec!["198.51.100.1".into()];
        let compiled = compile(&service, [&http(&["10.42.0.1"])].into_iter(), &node);
        let l2 = |f: &&Frontend| f.flags & flags::FORWARDING == flags::FORWARDING_L2;
        compiled.frontends.iter().filter(l2).map(|f| address_text(f.addr, f.port)).collect::<Vec<_>>()
    };
    assert_eq!(ways("Cluster"), ["192.168.1.1:30080", "198.51.100.1:80", "203.0.113.1:80"]);
    assert_eq!(ways("Local"), Vec::<String>::new());
}
