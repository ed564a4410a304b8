//! The objects that everything is measured with: ClusterIP Services of one port, one slice each.

use kinesin_core::objects::{EndpointSlice, Service};
use serde_json::{Value, json};

/// Namespace of all of them.
pub(crate) const NAMESPACE: &str = "default";

/// Name of a service.
pub(crate) fn name(service: usize) -> String {
    format!("bench-{service:05}")
}

/// A Service as a user would create it; the API server gives it an address unless one is given here.
pub(crate) fn service(number: usize, cluster_ip: Option<String>) -> Value {
    let mut object = json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": { "name": name(number), "namespace": NAMESPACE, "labels": { "app": name(number) } },
        "spec": {
            "type": "ClusterIP",
            "selector": { "app": name(number) },
            "ports": [{ "name": "http", "protocol": "TCP", "port": 80, "targetPort": 8080 }],
        },
    });
    if let Some(ip) = cluster_ip {
        object["spec"]["clusterIPs"] = json!([ip]);
        object["spec"]["clusterIP"] = json!(ip);
    }
    object
}

/// A service has fewer endpoints than this.
pub(crate) const MAX_ENDPOINTS: usize = 64;

/// A pod's address: unique for up to 64 endpoints of 65,536 services.
pub(crate) fn endpoint_address(service: usize, endpoint: usize) -> String {
    // 10.0.0.0/16 is the LAN of the lab, 10.42.0.0/16 its pods, 10.96.0.0/16 its services: stay above.
    let number = service * MAX_ENDPOINTS + endpoint;
    format!("10.{}.{}.{}", 128 + (number >> 16), number >> 8 & 255, number & 255)
}

/// Its slice, as the controller would write it: pods spread over three nodes.
pub(crate) fn slice(number: usize, endpoints: usize) -> Value {
    let endpoints: Vec<_> = (0..endpoints).map(|endpoint| one_endpoint(number, endpoint)).collect();
    json!({
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": format!("{}-abcde", name(number)),
            "namespace": NAMESPACE,
            "labels": {
                "app": name(number),
                "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
                "kubernetes.io/service-name": name(number),
            },
        },
        "addressType": "IPv4",
        "ports": [{ "name": "http", "protocol": "TCP", "port": 8080 }],
        "endpoints": endpoints,
    })
}

/// One element of a slice's `endpoints`.
pub(crate) fn one_endpoint(service: usize, endpoint: usize) -> Value {
    json!({
        "addresses": [endpoint_address(service, endpoint)],
        "conditions": { "ready": true, "serving": true, "terminating": false },
        "nodeName": format!("node-{}", endpoint % 3 + 1),
        "targetRef": {
            "kind": "Pod",
            "namespace": NAMESPACE,
            "name": format!("{}-{endpoint:04}", name(service)),
            "uid": format!("00000000-0000-4000-8000-{:012}", service * 64 + endpoint),
        },
    })
}

/// As the agent has them: read from the API's JSON.
pub(crate) fn parsed(number: usize, endpoints: usize) -> (Service, EndpointSlice) {
    let ip = format!("10.96.{}.{}", number >> 8, number & 255);
    let service = service(number, Some(ip)).to_string();
    let slice = slice(number, endpoints).to_string();
    (serde_json::from_str(&service).expect("a Service"), serde_json::from_str(&slice).expect("an EndpointSlice"))
}
