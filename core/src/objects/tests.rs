use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::*;
use crate::selector::LabelSelector;

fn read<T: DeserializeOwned>(value: Value) -> T {
    serde_json::from_value(value.clone()).unwrap_or_else(|error| panic!("{error}: {value}"))
}

/// Everything that may be absent is, at every depth.
#[test]
fn r36_empty_objects_are_read_as_defaults() {
    assert_eq!(read::<Service>(json!({})), Service::default());
    assert_eq!(read::<EndpointSlice>(json!({})), EndpointSlice::default());
    assert_eq!(read::<Node>(json!({})), Node::default());
    assert_eq!(read::<Pool>(json!({})), Pool::default());
    assert_eq!(read::<L2Policy>(json!({})), L2Policy::default());
    assert_eq!(read::<Lease>(json!({})), Lease::default());
    let hollow = json!({"metadata": {}, "spec": {}, "status": {}});
    assert_eq!(read::<Service>(hollow.clone()), Service::default());
    assert_eq!(read::<Pool>(hollow.clone()), Pool::default());
    assert_eq!(read::<L2Policy>(hollow.clone()), L2Policy::default());
    assert_eq!(read::<Node>(hollow.clone()), Node::default());
    assert_eq!(read::<Lease>(hollow), Lease::default());
}

#[test]
fn r36_nulls_are_read_as_absent_where_go_writes_them() {
    let meta = json!({"name": "a", "labels": null, "annotations": null, "deletionTimestamp": null});
    let service: Service = read(json!({
        "metadata": meta,
        "spec": {
            "clusterIPs": null, "externalIPs": null, "loadBalancerClass": null, "loadBalancerSourceRanges": null,
            "ipFamilies": null, "ipFamilyPolicy": null, "ports": null, "selector": null, "sessionAffinityConfig": null,
        },
        "status": {"loadBalancer": null, "conditions": null},
    }));
    assert_eq!(service.spec, ServiceSpec::default());
    assert_eq!(service.status, ServiceStatus::default());
    let slice: EndpointSlice = read(json!({
        "metadata": meta, "addressType": "IPv4", "ports": [{"name": null, "protocol": null, "port": null}],
        "endpoints": [{"addresses": null, "conditions": null, "nodeName": null, "zone": null, "hints": null}],
    }));
    assert_eq!(slice.endpoints, [Endpoint::default()]);
    assert_eq!(slice.ports, [EndpointPort::default()]);
    let empty: EndpointSlice = read(json!({"endpoints": null, "ports": null}));
    assert_eq!(empty, EndpointSlice::default());
    let pool: Pool = read(
        json!({"spec": {"blocks": null, "serviceSelector": null, "allowFirstLastIPs": null}, "status": {"conditions": null}}),
    );
    assert_eq!(pool, Pool::default());
    let policy: L2Policy = read(json!({"spec": {"interfaces": null, "serviceSelector": null, "nodeSelector": null}}));
    assert_eq!(policy, L2Policy::default());
    let lease: Lease = read(json!({"spec": {"holderIdentity": null, "renewTime": null, "leaseDurationSeconds": null}}));
    assert_eq!(lease, Lease::default());
    let node: Node = read(json!({"spec": {"taints": null}, "status": {"addresses": null}}));
    assert_eq!(node, Node::default());
}

#[test]
fn unknown_values_of_enums_lose_nothing_else() {
    let service: Service = read(json!({"spec": {
        "type": "Teleport", "externalTrafficPolicy": "Sideways", "internalTrafficPolicy": "", "sessionAffinity": "Cookie",
        "ports": [{"port": 80, "targetPort": "web", "somethingNew": {"a": 1}}], "somethingNew": [1],
    }}));
    assert_eq!(service.spec.kind, ServiceType::Unknown);
    assert_eq!(service.spec.external_traffic_policy, TrafficPolicy::Cluster);
    assert_eq!(service.spec.internal_traffic_policy, TrafficPolicy::Cluster);
    assert_eq!(service.spec.session_affinity, Affinity::None);
    assert_eq!(service.spec.ports[0].target_port, Some(TargetPort::Name("web".into())));
}

#[test]
fn the_guides_service_is_read_as_it_stands() {
    let service: Service = read(json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {
            "name": "service-blue", "namespace": "example", "labels": {"color": "blue"},
            "annotations": {"io.cilium/lb-ipam-ips": "20.0.10.100,20.0.10.200"},
        },
        "spec": {"type": "LoadBalancer", "ports": [{"port": 1234}]},
    }));
    assert_eq!(service.key(), ObjectKey::new("example", "service-blue"));
    assert_eq!(service.key().to_string(), "example/service-blue");
    assert_eq!((service.spec.kind, service.spec.ports[0].port), (ServiceType::LoadBalancer, 1234));
    assert_eq!(service.spec.ports[0].node_port, 0);
}

/// The guide's pool and policy carry a namespace, although their kinds are cluster-scoped: it is still the same object.
#[test]
fn cluster_scoped_kinds_say_so_and_can_be_rid_of_a_namespace() {
    let mut pool: Pool = read(json!({
        "apiVersion": "cilium.io/v2alpha1", "kind": "CiliumLoadBalancerIPPool",
        "metadata": {"name": "first-pool", "namespace": "kube-system"},
        "spec": {"blocks": [{"start": "10.0.0.100", "stop": "10.0.0.200"}, {"cidr": "192.168.30.240/28"}]},
    }));
    const { assert!(!Pool::NAMESPACED && !L2Policy::NAMESPACED && !Node::NAMESPACED) };
    const { assert!(Service::NAMESPACED && EndpointSlice::NAMESPACED && Lease::NAMESPACED) };
    assert!(Pool::API_VERSIONS.contains(&"cilium.io/v2alpha1"));
    pool.meta_mut().namespace = SmolStr::default();
    assert_eq!(pool.key(), ObjectKey::new("", "first-pool"));
    assert_eq!(pool.key().to_string(), "first-pool");
    assert_eq!(pool.spec.blocks.len(), 2);
    assert_eq!(
        (pool.spec.blocks[0].start.as_str(), pool.spec.blocks[1].cidr.as_str()),
        ("10.0.0.100", "192.168.30.240/28")
    );
    let policy: L2Policy = read(json!({
        "apiVersion": "cilium.io/v2alpha1", "kind": "CiliumL2AnnouncementPolicy",
        "metadata": {"name": "policy1", "namespace": "kube-system"},
        "spec": {
            "serviceSelector": {"matchLabels": {"color": "blue"}},
            "nodeSelector": {"matchExpressions": [{"key": "node-role.kubernetes.io/control-plane", "operator": "DoesNotExist"}]},
            "interfaces": ["^eth[0-9]+"], "externalIPs": true, "loadBalancerIPs": true,
        },
    }));
    assert!(policy.spec.external_ips && policy.spec.load_balancer_ips);
    assert_eq!(policy.spec.interfaces, ["^eth[0-9]+"]);
    assert_eq!(policy.spec.node_selector.as_ref().map(LabelSelector::validate), Some(Ok(())));
}

#[test]
fn field_names_are_those_of_the_api_in_both_directions() {
    let pool = json!({
        "metadata": {"name": "p"},
        "spec": {"blocks": [{"cidr": "10.0.0.0/24"}], "allowFirstLastIPs": "No", "disabled": true},
        "status": {"conditions": [{"type": "t", "status": "True", "reason": "r", "message": "m", "observedGeneration": 3}]},
    });
    assert_eq!(serde_json::to_value(read::<Pool>(pool.clone())).unwrap(), pool);
    let lease = json!({
        "metadata": {"name": "l", "namespace": "n", "resourceVersion": "7"},
        "spec": {"holderIdentity": "a", "leaseDurationSeconds": 15, "acquireTime": "x", "renewTime": "y", "leaseTransitions": 2},
    });
    assert_eq!(serde_json::to_value(read::<Lease>(lease.clone())).unwrap(), lease);
    let service = json!({
        "metadata": {"name": "s", "namespace": "n"},
        "spec": {
            "type": "LoadBalancer", "clusterIP": "10.96.0.1", "clusterIPs": ["10.96.0.1"], "externalIPs": ["192.0.2.1"],
            "loadBalancerIP": "10.0.0.1", "loadBalancerClass": "c", "loadBalancerSourceRanges": ["0.0.0.0/0"],
            "ipFamilies": ["IPv4"], "ipFamilyPolicy": "SingleStack", "selector": {"a": "b"},
            "ports": [{"name": "p", "protocol": "UDP", "port": 53, "nodePort": 30053, "targetPort": 5353}],
            "externalTrafficPolicy": "Local", "internalTrafficPolicy": "Cluster", "sessionAffinity": "ClientIP",
            "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 60}}, "healthCheckNodePort": 31000,
            "allocateLoadBalancerNodePorts": false, "publishNotReadyAddresses": true, "trafficDistribution": "PreferClose",
        },
        "status": {"loadBalancer": {"ingress": [{"ip": "10.0.0.1", "ipMode": "VIP"}]}},
    });
    assert_eq!(serde_json::to_value(read::<Service>(service.clone())).unwrap(), service);
}

#[test]
fn values_of_the_wrong_kind_are_errors_and_not_defaults() {
    for value in [
        json!({"spec": {"ports": [{"port": 70000}]}}),
        json!({"spec": {"ports": [{"port": "http"}]}}),
        json!({"spec": {"ports": "80"}}),
        json!({"spec": {"externalIPs": "192.0.2.1"}}),
        json!({"metadata": {"labels": ["a"]}}),
    ] {
        assert!(serde_json::from_value::<Service>(value.clone()).is_err(), "{value}");
    }
    for value in [json!({"spec": {"allowFirstLastIPs": true}}), json!({"spec": {"disabled": "yes"}})] {
        assert!(serde_json::from_value::<Pool>(value.clone()).is_err(), "{value}");
    }
}

#[test]
fn ingress_entries_without_a_readable_address_are_left_out() {
    let service: Service = read(json!({"status": {"loadBalancer": {"ingress": [
        {"ip": "10.0.0.1"}, {"hostname": "lb.example.com"}, {"ip": "10.0.0"}, {"ip": ""}, {"ip": "2001:db8::1", "ipMode": "Proxy"},
    ]}}}));
    let ips: Vec<String> = service.ingress_addresses().map(|ip| ip.to_string()).collect();
    assert_eq!(ips, ["10.0.0.1", "2001:db8::1"]);
}

#[test]
fn r38_a_slice_without_the_label_belongs_to_no_service() {
    let slice = |labels: Value| read::<EndpointSlice>(json!({"metadata": {"namespace": "n", "labels": labels}}));
    assert_eq!(slice(json!(null)).service(), None);
    assert_eq!(slice(json!({"other": "x"})).service(), None);
    let label = json!({"kubernetes.io/service-name": "web"});
    assert_eq!(slice(label).service(), Some(ObjectKey::new("n", "web")));
}

/// Every copy of the value in which one part, at any depth, is null.
fn with_one_null(value: &Value) -> Vec<Value> {
    let mut all = vec![Value::Null];
    match value {
        Value::Object(map) => {
            for (key, part) in map {
                all.extend(with_one_null(part).into_iter().map(|part| {
                    let mut copy = map.clone();
                    copy.insert(key.clone(), part);
                    Value::Object(copy)
                }));
            }
        }
        Value::Array(list) => {
            for (index, part) in list.iter().enumerate() {
                // An element that is null is nothing that anybody writes.
                all.extend(with_one_null(part).into_iter().filter(|part| !part.is_null()).map(|part| {
                    let mut copy = list.clone();
                    copy[index] = part;
                    Value::Array(copy)
                }));
            }
        }
        _ => {}
    }
    all
}

/// Templates leave keys without a value; the API server takes those for absent, and so do manifests.
#[test]
fn r36_any_one_field_may_be_null() {
    fn check<T: DeserializeOwned>(object: &Value) {
        for value in with_one_null(object).into_iter().filter(|value| !value.is_null()) {
            read::<T>(value);
        }
    }
    let meta = json!({"name": "a", "namespace": "b", "uid": "c", "resourceVersion": "1", "generation": 1, "creationTimestamp": "x", "labels": {}});
    check::<Service>(&json!({
        "metadata": meta,
        "spec": {
            "type": "LoadBalancer", "clusterIP": "", "loadBalancerIP": "", "externalTrafficPolicy": "Local",
            "internalTrafficPolicy": "Local", "sessionAffinity": "ClientIP", "publishNotReadyAddresses": true,
            "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 1}}, "allocateLoadBalancerNodePorts": true,
            "ports": [{"name": "a", "protocol": "TCP", "port": 1, "nodePort": 1, "targetPort": 1}], "externalIPs": [],
        },
        "status": {"loadBalancer": {"ingress": [{"ip": "a", "ipMode": "VIP", "hostname": "h"}]}, "conditions": []},
    }));
    check::<Pool>(&json!({
        "metadata": meta, "status": {"conditions": [{"type": "a", "status": "b", "reason": "c", "message": "d"}]},
        "spec": {"blocks": [{"cidr": "a", "start": "b", "stop": "c"}], "disabled": true, "allowFirstLastIPs": "No",
            "serviceSelector": {"matchLabels": {}, "matchExpressions": [{"values": []}]}},
    }));
    check::<L2Policy>(&json!({
        "metadata": meta, "status": {"conditions": []},
        "spec": {"interfaces": [], "externalIPs": true, "loadBalancerIPs": true, "nodeSelector": {"matchLabels": {}}},
    }));
    check::<EndpointSlice>(&json!({
        "metadata": meta, "addressType": "IPv4", "ports": [{"name": "a", "protocol": "TCP", "port": 1}],
        "endpoints": [{"addresses": ["a"], "conditions": {"ready": true, "serving": true, "terminating": true},
            "hints": {"forZones": [{"name": "a"}], "forNodes": []}}],
    }));
    check::<Node>(&json!({
        "metadata": meta, "spec": {"unschedulable": true, "taints": [{"key": "a", "effect": "b"}]},
        "status": {"addresses": [{"type": "InternalIP", "address": "a"}]},
    }));
    check::<Lease>(&json!({"metadata": meta, "spec": {"holderIdentity": "a", "leaseDurationSeconds": 1}}));
}

#[test]
fn r38_a_number_that_is_no_port_does_not_cost_the_slice() {
    let ports = json!([{"port": -1}, {"port": 65_536}, {"port": null}, {"port": 65_535}, {}]);
    let slice: EndpointSlice = serde_json::from_value(json!({"ports": ports})).unwrap();
    let numbers: Vec<Option<u16>> = slice.ports.iter().map(|port| port.port).collect();
    assert_eq!(numbers, [Some(0), Some(0), None, Some(65_535), None]);
}
