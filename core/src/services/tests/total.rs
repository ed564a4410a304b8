//! R36, R38, R39: whatever the objects hold, nothing panics, and what comes out is well-formed.

use std::collections::HashSet;
use std::sync::Arc;

use proptest::prelude::*;
use serde_json::{Map, Value, json};

use super::{Algorithm, NodeContext, compile, node};
use crate::objects::{EndpointSlice, ObjectKey, Service};
use crate::plan::{Limits, Planner};
use crate::services::{SliceIndex, view};

/// Text that could stand in any field.
fn text() -> impl Strategy<Value = Value> {
    prop::sample::select(vec![
        "",
        "None",
        "none",
        "http",
        "TCP",
        "UDP",
        "SCTP",
        "tcp",
        "Local",
        "Cluster",
        "ClientIP",
        "10.96.0.1",
        "192.0.2.1",
        "::1",
        "fd00::1",
        "::ffff:10.0.0.1",
        "0.0.0.0",
        "255.255.255.255",
        "224.0.0.1",
        "10.0.0.300",
        "10.0.0.1/24",
        "here",
        "IPv4",
        "IPv6",
        "FQDN",
        "LoadBalancer",
        "NodePort",
        "ClusterIP",
        "ExternalName",
        "VIP",
        "Proxy",
        "\u{0}",
        "ß",
    ])
    .prop_map(Value::from)
}

fn scalar() -> impl Strategy<Value = Value> {
    prop_oneof![
        4 => text(),
        1 => Just(Value::Null),
        1 => any::<bool>().prop_map(Value::from),
        2 => prop_oneof![Just(0u32), 1u32..4, Just(80), Just(65_535), Just(65_536), any::<u32>()].prop_map(Value::from),
    ]
}

/// An object in which each of these fields is absent or has one of its values.
fn object(fields: Vec<(&'static str, BoxedStrategy<Value>)>) -> BoxedStrategy<Value> {
    let fields: Vec<_> = fields
        .into_iter()
        .map(|(name, values)| {
            prop::option::weighted(0.7, values).prop_map(move |value| value.map(|value| (name, value)))
        })
        .collect();
    fields
        .prop_map(|fields| {
            Value::Object(
                fields.into_iter().flatten().map(|(name, value)| (name.to_owned(), value)).collect::<Map<_, _>>(),
            )
        })
        .boxed()
}

fn list(values: BoxedStrategy<Value>) -> BoxedStrategy<Value> {
    prop_oneof![6 => prop::collection::vec(values, 0..4).prop_map(Value::from), 1 => Just(Value::Null)].boxed()
}

fn one_of(values: &'static [&'static str]) -> BoxedStrategy<Value> {
    prop_oneof![8 => prop::sample::select(values).prop_map(Value::from), 1 => scalar()].boxed()
}

fn number() -> BoxedStrategy<Value> {
    prop_oneof![6 => prop::sample::select(vec![1u32, 53, 80, 30_080]).prop_map(Value::from), 1 => scalar()].boxed()
}

fn bit() -> BoxedStrategy<Value> {
    prop_oneof![8 => any::<bool>().prop_map(Value::from), 1 => scalar()].boxed()
}

const ADDRESSES: &[&str] = &["10.96.0.1", "10.96.0.2", "192.0.2.1", "fd00::1", "fd00::2", "None", "", "x", "0.0.0.0"];
const NAMES: &[&str] = &["", "http", "dns"];
const PROTOCOLS: &[&str] = &["TCP", "UDP", "SCTP", "", "ICMP"];

fn labels() -> BoxedStrategy<Value> {
    object(vec![
        ("kubernetes.io/service-name", one_of(&["web", ""])),
        ("service.kubernetes.io/service-proxy-name", text().boxed()),
        ("other", text().boxed()),
    ])
}

fn metadata() -> BoxedStrategy<Value> {
    object(vec![
        ("name", one_of(&["web", "kubernetes"])),
        ("namespace", one_of(&["default"])),
        ("labels", prop_oneof![3 => Just(json!({"kubernetes.io/service-name": "web"})), 1 => labels()].boxed()),
        ("annotations", labels()),
    ])
}

fn service() -> BoxedStrategy<Value> {
    let port = object(vec![
        ("name", one_of(NAMES)),
        ("port", number()),
        ("nodePort", number()),
        ("protocol", one_of(PROTOCOLS)),
        ("targetPort", scalar().boxed()),
    ]);
    let client_ip = object(vec![("timeoutSeconds", number())]);
    let spec = object(vec![
        ("type", one_of(&["ClusterIP", "NodePort", "LoadBalancer", "ExternalName", "New"])),
        ("clusterIP", one_of(ADDRESSES)),
        ("clusterIPs", list(one_of(ADDRESSES))),
        ("externalIPs", list(one_of(ADDRESSES))),
        ("ipFamilies", list(one_of(&["IPv4", "IPv6", "IPv5"]))),
        ("ports", list(port)),
        ("loadBalancerClass", text().boxed()),
        ("loadBalancerSourceRanges", list(text().boxed())),
        ("externalTrafficPolicy", one_of(&["Local", "Cluster", "New"])),
        ("internalTrafficPolicy", one_of(&["Local", "Cluster", "New"])),
        ("sessionAffinity", one_of(&["ClientIP", "None", "New"])),
        ("sessionAffinityConfig", object(vec![("clientIP", client_ip)])),
        ("publishNotReadyAddresses", bit()),
    ]);
    let entry =
        object(vec![("ip", one_of(ADDRESSES)), ("ipMode", one_of(&["VIP", "Proxy"])), ("hostname", text().boxed())]);
    let status = object(vec![("loadBalancer", object(vec![("ingress", list(entry))]))]);
    object(vec![("metadata", metadata()), ("spec", spec), ("status", status)])
}

fn slice() -> BoxedStrategy<Value> {
    let conditions = object(vec![("ready", bit()), ("serving", bit()), ("terminating", bit())]);
    let endpoint = object(vec![
        ("addresses", list(one_of(&["10.42.0.1", "10.42.0.2", "fd02::1", "x", "::", "::ffff:10.42.0.1"]))),
        ("conditions", conditions),
        ("nodeName", one_of(&["here", "there", ""])),
        ("zone", text().boxed()),
        ("hints", object(vec![("forZones", list(object(vec![("name", text().boxed())])))])),
    ]);
    let port = object(vec![("name", one_of(NAMES)), ("port", number()), ("protocol", one_of(PROTOCOLS))]);
    object(vec![
        ("metadata", metadata()),
        ("addressType", one_of(&["IPv4", "IPv6", "FQDN", ""])),
        ("ports", list(port)),
        ("endpoints", list(endpoint)),
    ])
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, max_global_rejects: 100_000, ..ProptestConfig::default() })]

    #[test]
    fn r36_odd_objects_never_panic_and_give_well_formed_results(service in service(), slices in prop::collection::vec(slice(), 0..4), maglev: bool, reverse: bool) {
        // A type error anywhere refuses the object where it is read; what is read must be handled.
        let Ok(service) = serde_json::from_value::<Service>(service) else { return Err(TestCaseError::reject("unreadable")) };
        let slices: Vec<EndpointSlice> = slices.into_iter().filter_map(|slice| serde_json::from_value(slice).ok()).collect();
        let node = NodeContext { algorithm: if maglev { Algorithm::Maglev } else { Algorithm::Random }, ..node() };
        let compiled = compile(&service, slices.iter(), &node);

        let again: Vec<&EndpointSlice> = if reverse { slices.iter().rev().collect() } else { slices.iter().collect() };
        let mut other = compile(&service, again.into_iter(), &node);
        other.problems.clear();
        prop_assert_eq!(&other.frontends, &compiled.frontends);
        prop_assert_eq!(&other.sets, &compiled.sets);

        prop_assert!(compiled.frontends.is_sorted_by_key(|f| (f.addr, f.port, f.proto)));
        let keys: HashSet<_> = compiled.frontends.iter().map(|f| (f.addr, f.port, f.proto)).collect();
        prop_assert_eq!(keys.len(), compiled.frontends.len());
        for frontend in &compiled.frontends {
            prop_assert_eq!(frontend.port == 0, frontend.proto == 0);
            for set in [frontend.external, frontend.internal].into_iter().flatten() {
                let set = &compiled.sets[set];
                prop_assert!(set.usable <= set.backends.len());
                prop_assert!(set.backends.iter().all(|b| b.addr.is_ipv4() == frontend.addr.is_ipv4() && b.port != 0 && b.proto == frontend.proto));
            }
        }
        for (i, set) in compiled.sets.iter().enumerate() {
            prop_assert!(!compiled.sets[..i].contains(set), "equal sets are stored once");
            let keys: HashSet<_> = set.backends.iter().map(|b| (b.addr, b.port)).collect();
            prop_assert_eq!(keys.len(), set.backends.len());
        }

        let key = ObjectKey::new(service.metadata.namespace.clone(), service.metadata.name.clone());
        view(&key, &compiled, "pending");
        let mut planner = Planner::new(Limits { maglev_size: 13, ..Limits::default() });
        prop_assert!(planner.update(&key, &compiled).is_ok());
        prop_assert_eq!(planner.update(&key, &compiled), Ok(vec![]));
        let mut index = SliceIndex::default();
        for slice in slices {
            index.upsert(Arc::new(slice));
        }
        index.remove(&key);
    }
}
