//! On which nodes, and by which kind of address.

use kinesin_abi::FrontendKind;
use proptest::prelude::*;
use serde_json::json;

use super::{Compiled, NodeContext, balanced, compile, node};

/// A Service with every kind of frontend and these annotations, as a node with these labels sees it.
fn seen(annotations: &[(&str, &str)], labels: &[(&str, &str)]) -> Compiled {
    let mut web = balanced(
        json!({
            "clusterIP": "10.96.0.1", "externalIPs": ["198.51.100.1"],
            "ports": [{"name": "http", "port": 80, "nodePort": 30080}],
        }),
        "192.0.2.1",
    );
    for (name, value) in annotations {
        web.metadata.annotations.insert((*name).into(), (*value).into());
    }
    let labels = labels.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect();
    compile(&web, std::iter::empty(), &NodeContext { labels, ..node() })
}

const LABELS: [(&str, &str); 3] = [("zone", "a"), ("tier", "edge"), ("service.cilium.io/node", "t1")];

#[test]
fn a_type_leaves_that_kind_of_frontend_and_external_addresses() {
    let kinds = |value: &str| {
        let mut kinds: Vec<FrontendKind> =
            seen(&[("service.cilium.io/type", value)], &[]).frontends.iter().map(|frontend| frontend.kind).collect();
        kinds.sort();
        kinds.dedup();
        kinds
    };
    use FrontendKind::{ClusterIp, ExternalIps, LoadBalancer, NodePort};
    assert_eq!(kinds("ClusterIP"), [ClusterIp, ExternalIps]);
    assert_eq!(kinds("NodePort"), [NodePort, ExternalIps]);
    assert_eq!(kinds("LoadBalancer"), [LoadBalancer, ExternalIps]);
    assert_eq!(kinds("Everything"), [ClusterIp, NodePort, LoadBalancer, ExternalIps]);
    let problems = seen(&[("service.cilium.io/type", "Everything")], &[]).problems;
    assert!(problems[0].contains("\"Everything\" is unknown"), "{problems:?}");
}

#[test]
fn a_node_serves_what_selects_it() {
    let table = [
        ("zone=a", true),
        ("zone==a , tier = edge", true),
        ("zone=b", false),
        ("zone!=b", true),
        ("rack!=b", true),
        ("tier in (edge,core),zone=a", true),
        ("zone=a,tier notin (edge, core)", false),
        ("zone", true),
        ("!zone", false),
        ("!rack,zone", true),
        ("", true),
    ];
    for (selector, serves) in table {
        let compiled = seen(&[("service.cilium.io/node-selector", selector)], &LABELS);
        assert_eq!((!compiled.frontends.is_empty(), compiled.problems), (serves, vec![]), "{selector}");
    }
    for bad in ["zone in (a", "zone (a)", "=a", "zone=a,", "a b", "zone in (a) tier", ",", "in (a)"] {
        let compiled = seen(&[("service.cilium.io/node-selector", bad)], &LABELS);
        assert!(compiled.frontends.is_empty() && compiled.problems[0].contains("no node serves"), "{bad}");
    }
}

#[test]
fn a_node_annotation_wants_the_label_of_its_name_and_the_selector_wins() {
    let name = "service.cilium.io/node";
    assert!(!seen(&[(name, "t1")], &LABELS).frontends.is_empty());
    assert!(seen(&[(name, "t2")], &LABELS).frontends.is_empty());
    assert!(seen(&[(name, "t1")], &[]).frontends.is_empty());
    assert!(!seen(&[(name, "t2"), ("service.cilium.io/node-selector", "zone=a")], &LABELS).frontends.is_empty());
    assert!(seen(&[(name, "t1"), ("service.cilium.io/node-selector", "zone=b")], &LABELS).frontends.is_empty());
}

#[test]
fn cluster_ips_are_routable_where_they_are_asked_to_be() {
    let node = NodeContext { external_cluster_ip: true, ..node() };
    let web = balanced(json!({"clusterIP": "10.96.0.1", "ports": [{"port": 80}]}), "192.0.2.1");
    let compiled = compile(&web, std::iter::empty(), &node);
    let routable =
        compiled.frontends.iter().filter(|f| f.port != 0).all(|f| f.flags & kinesin_abi::frontend_flags::ROUTABLE != 0);
    assert!(routable, "{compiled:?}");
}

#[test]
fn one_service_may_have_its_own_way_and_algorithm_where_annotations_count() {
    use crate::services::{Algorithm, Dispatch, Forwarding};
    use kinesin_abi::frontend_flags::{FORWARDING, FORWARDING_L2, FORWARDING_SNAT, MAGLEV};
    let (mode, algorithm) = ("service.cilium.io/forwarding-mode", "service.cilium.io/lb-algorithm");
    let strict = NodeContext { forwarding: Forwarding::all(Dispatch::L2), ..node() };
    let free = NodeContext {
        dsr_by_annotation: Some(Forwarding::all(Dispatch::L2)),
        algorithm_by_annotation: true,
        ..strict.clone()
    };
    let maglev = NodeContext { algorithm: Algorithm::Maglev, forwarding: Forwarding::default(), ..free.clone() };
    let table: [(&NodeContext, &str, &str, u32, Option<&str>); 9] = [
        (&free, mode, "snat", FORWARDING_SNAT, None),
        (&free, mode, "dsr", FORWARDING_L2, None),
        (&maglev, mode, "dsr", FORWARDING_L2 | MAGLEV, None),
        (&free, mode, "DSR", FORWARDING_L2, Some("\"DSR\" is unknown and ignored; use dsr or snat")),
        (&strict, mode, "snat", FORWARDING_L2, Some("has no effect; set bpf-lb-mode-annotation=true")),
        (&free, algorithm, "maglev", FORWARDING_L2 | MAGLEV, None),
        (&maglev, algorithm, "random", FORWARDING_SNAT, None),
        (&free, algorithm, "", FORWARDING_L2, Some("\"\" is unknown and ignored; use random or maglev")),
        (&strict, algorithm, "maglev", FORWARDING_L2, Some("has no effect; set bpf-lb-algorithm-annotation=true")),
    ];
    for (node, annotation, value, flags, problem) in table {
        let mut web = balanced(json!({"clusterIP": "10.96.0.1", "ports": [{"port": 80}]}), "192.0.2.1");
        web.metadata.annotations.insert(annotation.into(), value.into());
        let compiled = compile(&web, std::iter::empty(), node);
        let vip = compiled
            .frontends
            .iter()
            .find(|f| f.addr == std::net::IpAddr::from([192, 0, 2, 1]) && f.port == 80)
            .expect("a frontend");
        assert_eq!(vip.flags & (FORWARDING | MAGLEV), flags, "{annotation}: {value}");
        let expected: Vec<String> =
            problem.map(|text| format!("metadata.annotations[{annotation}]: {text}")).into_iter().collect();
        assert_eq!(compiled.problems, expected);
    }
}

proptest! {
    #[test]
    fn no_selector_panics(text in "[a-c=!(),in ]{0,24}|\\PC{0,16}") {
        let compiled = seen(&[("service.cilium.io/node-selector", &text)], &LABELS);
        prop_assert!(compiled.problems.is_empty() || compiled.frontends.is_empty());
    }
}
