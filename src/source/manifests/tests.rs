//! Parsing: every document to objects, or to a line that says what is wrong where.

use kinesin_core::objects::{TargetPort, YesNo};
use proptest::prelude::*;

use super::document::{Reading, read};
use super::kinds::{AnyObject, Kind};
use super::*;

fn only<T: Kind>(reading: &Reading) -> Vec<T> {
    reading.objects.iter().filter_map(T::unwrap).map(|object| T::clone(object)).collect()
}

fn problems(reading: &Reading) -> Vec<&str> {
    reading.problems.iter().map(|problem| problem.text.as_str()).collect()
}

#[test]
fn the_guides_manifests_are_read_as_they_stand() {
    let reading = read("cilium-config.yaml", include_str!("../../../config/manifests/cilium-config.yaml"));
    assert!(reading.problems.is_empty() && reading.notes.is_empty(), "{reading:?}");
    let pools: Vec<Pool> = only(&reading);
    // Cluster-scoped, although it is written with a namespace.
    assert_eq!(pools[0].key(), ObjectKey::new("", "first-pool"));
    assert_eq!(
        (pools[0].spec.blocks[0].start.as_str(), pools[0].spec.blocks[0].stop.as_str()),
        ("10.0.0.100", "10.0.0.200")
    );
    let policies: Vec<L2Policy> = only(&reading);
    assert_eq!(policies[0].key(), ObjectKey::new("", "default-l2-announcement-policy"));
    assert!(policies[0].spec.external_ips && policies[0].spec.load_balancer_ips);

    let reading = read("service-blue.yaml", include_str!("../../../config/manifests/service-blue.yaml"));
    let services: Vec<Service> = only(&reading);
    assert_eq!(services[0].key(), ObjectKey::new("example", "service-blue"));
    assert_eq!(services[0].metadata.annotations["io.cilium/lb-ipam-ips"], "20.0.10.100,20.0.10.200");
}

#[test]
fn what_the_api_server_would_fill_in_is_filled_in() {
    let text = "apiVersion: v1\nkind: Service\nmetadata:\n  name: a\n  creationTimestamp: null\n  labels: null\n\
                spec:\n  clusterIP: 10.96.0.10\n  sessionAffinity: ClientIP\n  ports: [{port: 80}]\nstatus: {loadBalancer: {}}\n";
    let services: Vec<Service> = only(&read("a.yaml", text));
    let service = &services[0];
    assert_eq!(service.metadata.namespace, "default");
    assert_eq!(service.spec.cluster_ips, ["10.96.0.10"]);
    assert_eq!(service.spec.ports[0].protocol, "TCP");
    assert_eq!(service.spec.ports[0].target_port, Some(TargetPort::Number(80)));
    let affinity = service.spec.session_affinity_config.as_ref().and_then(|c| c.client_ip.as_ref());
    assert_eq!(affinity.and_then(|c| c.timeout_seconds), Some(10_800));
}

#[test]
fn an_unquoted_no_is_the_word_that_it_looks_like() {
    let text = "apiVersion: cilium.io/v2\nkind: CiliumLoadBalancerIPPool\nmetadata: {name: p}\n\
                spec: {allowFirstLastIPs: No, blocks: [{cidr: 10.0.0.0/24}]}\n";
    let pools: Vec<Pool> = only(&read("p.yaml", text));
    assert_eq!(pools[0].spec.allow_first_last_ips, Some(YesNo::No));
}

#[test]
fn lists_of_both_kinds_are_read() {
    let text = r#"{"apiVersion": "v1", "kind": "List", "items": [
        {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1"}},
        {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "a"}}]}"#;
    let reading = read("list.json", text);
    assert_eq!((only::<Node>(&reading).len(), only::<Service>(&reading).len()), (1, 1), "{reading:?}");
    let text = "apiVersion: v1\nkind: ServiceList\nitems:\n- metadata: {name: a}\n- metadata: {name: b}\n";
    let reading = read("list.yaml", text);
    assert_eq!(only::<Service>(&reading).len(), 2, "{reading:?}");
}

#[test]
fn a_wrong_value_is_reported_with_line_column_object_field_and_fix() {
    let text = "apiVersion: v1\nkind: Service\nmetadata:\n  name: good\n---\n\
                apiVersion: v1\nkind: Service\nmetadata:\n  name: bad\n  namespace: shop\nspec:\n  ports:\n  - port: 80\n  - port: 70000\n";
    let reading = read("s.yaml", text);
    assert_eq!(only::<Service>(&reading).len(), 1);
    assert_eq!(
        problems(&reading),
        ["s.yaml:14:11: Service shop/bad: spec.ports[1].port: invalid value: integer `70000`, \
          expected a number from 0 to 65535"]
    );
    let text = "apiVersion: v1\nkind: Service\nmetadata:\n  name: bad\n  labels:\n    version: 2\n";
    assert_eq!(
        problems(&read("s.yaml", text)),
        ["s.yaml:6:14: Service default/bad: metadata.labels.version: invalid type: integer `2`, \
          expected a string; put the value in quotes"]
    );
}

#[test]
fn broken_yaml_is_reported_with_line_and_column() {
    let reading = read("s.yaml", "apiVersion: v1\nkind: Service\nmetadata: {name: a\nspec:\n");
    assert_eq!(reading.problems.len(), 1);
    let text = problems(&reading)[0];
    assert!(text.starts_with("s.yaml:") && text.contains("stays") && !text.contains('\n'), "{text}");
    assert!(text.split(':').nth(1).is_some_and(|line| line.parse::<u32>().is_ok()), "{text}");
}

#[test]
fn names_versions_and_shapes_that_no_api_server_takes_are_refused() {
    let cases = [
        ("apiVersion: v1\nkind: Service\nmetadata: {name: ../../etc/passwd}\n", "metadata.name"),
        ("apiVersion: v1\nkind: Service\nmetadata: {name: A_b}\n", "metadata.name"),
        ("apiVersion: v1\nkind: Service\nmetadata: {name: a, namespace: ..}\n", "metadata.namespace"),
        ("apiVersion: v1\nkind: Service\n", "metadata.name: is missing"),
        ("apiVersion: v2\nkind: Service\nmetadata: {name: a}\n", "write v1"),
        ("kind: Service\nmetadata: {name: a}\n", "apiVersion is missing"),
        ("apiVersion: v1\nmetadata: {name: a}\n", "kind is missing"),
        ("- 1\n- 2\n", "expected an object"),
        ("apiVersion: v1\nkind: List\nitems: 7\n", "items: expected a list"),
        ("apiVersion: v1\nkind: List\nitems: [{apiVersion: v1, kind: List, items: []}]\n", "List inside a List"),
        ("apiVersion: v1\nkind: Service\nmetadata: []\n", "metadata"),
    ];
    for (text, expected) in cases {
        let reading = read("x.yaml", text);
        assert!(reading.objects.is_empty(), "{text}");
        assert_eq!(reading.problems.len(), 1, "{text}");
        assert!(reading.problems[0].text.contains(expected), "{}", reading.problems[0].text);
    }
}

#[test]
fn unknown_kinds_and_the_old_cidrs_field_are_noted_and_harm_nothing() {
    let text = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\n---\n---\n\
                apiVersion: cilium.io/v2alpha1\nkind: CiliumLoadBalancerIPPool\nmetadata: {name: p}\nspec: {cidrs: [{cidr: 10.0.0.0/8}]}\n";
    let reading = read("x.yaml", text);
    assert!(reading.problems.is_empty(), "{reading:?}");
    assert_eq!(only::<Pool>(&reading).len(), 1);
    let notes: Vec<&str> = reading.notes.iter().map(|note| note.text.as_str()).collect();
    assert!(notes[0].contains("ConfigMap") && notes[1].contains("spec.blocks"), "{notes:?}");
}

/// Any JSON, with the keys that the reader looks at more likely than others.
fn arbitrary_json() -> impl Strategy<Value = serde_json::Value> {
    let words = prop_oneof![
        Just("v1".to_owned()),
        Just("discovery.k8s.io/v1".to_owned()),
        Just("cilium.io/v2".to_owned()),
        Just("Service".to_owned()),
        Just("EndpointSlice".to_owned()),
        Just("CiliumLoadBalancerIPPool".to_owned()),
        Just("List".to_owned()),
        "[a-z0-9./:-]{0,12}",
        any::<String>(),
    ];
    let leaf = prop_oneof![
        Just(serde_json::Value::Null),
        any::<bool>().prop_map(Into::into),
        any::<i64>().prop_map(Into::into),
        any::<f64>().prop_map(Into::into),
        words.prop_map(Into::into),
    ];
    let key = prop_oneof![
        4 => prop::sample::select(vec![
            "apiVersion", "kind", "metadata", "name", "namespace", "labels", "annotations", "spec", "status", "items",
            "ports", "port", "targetPort", "endpoints", "addresses", "conditions", "blocks", "cidrs", "serviceSelector",
            "matchLabels", "type", "clusterIPs", "sessionAffinityConfig", "clientIP", "loadBalancer", "ingress",
        ]).prop_map(str::to_owned),
        1 => any::<String>(),
    ];
    leaf.prop_recursive(5, 64, 8, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..6).prop_map(Into::into),
            prop::collection::vec((key.clone(), inner), 0..8)
                .prop_map(|fields| serde_json::Value::Object(fields.into_iter().collect())),
        ]
    })
}

/// An otherwise good object with one part replaced by anything.
fn almost_good() -> impl Strategy<Value = serde_json::Value> {
    let kinds = prop::sample::select(vec![
        ("v1", "Service"),
        ("v1", "Node"),
        ("v1", "Pod"),
        ("discovery.k8s.io/v1", "EndpointSlice"),
        ("cilium.io/v2alpha1", "CiliumLoadBalancerIPPool"),
        ("cilium.io/v2alpha1", "CiliumL2AnnouncementPolicy"),
    ]);
    (kinds, arbitrary_json(), arbitrary_json(), any::<bool>()).prop_map(|((version, kind), part, status, in_meta)| {
        let mut object = serde_json::json!({
            "apiVersion": version, "kind": kind, "metadata": {"name": "a"}, "status": status,
        });
        object[if in_meta { "metadata" } else { "spec" }] = part;
        object
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_json_document_is_read_or_reported_and_nothing_panics(value in arbitrary_json()) {
        read("x.json", &value.to_string());
    }

    #[test]
    fn an_object_with_any_content_is_read_or_reported(value in almost_good()) {
        let reading = read("x.json", &value.to_string());
        prop_assert_eq!(reading.objects.len() + reading.problems.len(), 1, "{:?}", reading);
        for object in &reading.objects {
            let AnyObject::Service(service) = object else { continue };
            // What was read can be written and read again.
            let mut written = serde_json::to_value(service.as_ref()).unwrap();
            written["apiVersion"] = "v1".into();
            written["kind"] = "Service".into();
            let again = read("x.json", &written.to_string());
            prop_assert_eq!(only::<Service>(&again), vec![Service::clone(service)]);
        }
    }

    #[test]
    fn any_text_is_read_or_reported(text in "\\PC{0,200}") {
        read("x.yaml", &text);
    }
}
