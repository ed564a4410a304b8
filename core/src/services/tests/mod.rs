//! Objects are written as manifests here, so that these tests also show what the types read.

mod exposure;
mod health;
mod host_ports;
mod index;
mod rules;
mod sctp;
mod topology;
mod total;
mod wide;

use serde_json::{Value, json};

use super::{Algorithm, Compiled, NodeContext, compile};
use crate::objects::{EndpointSlice, Service};

fn node() -> NodeContext {
    NodeContext {
        name: "here".into(),
        node_port_addresses: vec![[192, 168, 1, 1].into(), "fd01::1".parse().expect("address")],
        ..NodeContext::default()
    }
}

fn service(spec: Value) -> Service {
    let with_name = json!({"metadata": {"name": "web", "namespace": "default"}, "spec": spec});
    serde_json::from_value(with_name).expect("a Service")
}

/// A LoadBalancer Service with this address.
fn balanced(mut spec: Value, ip: &str) -> Service {
    spec["type"] = "LoadBalancer".into();
    let mut service = service(spec);
    service.status.load_balancer.ingress = vec![serde_json::from_value(json!({"ip": ip})).expect("entry")];
    service
}

fn slice(name: &str, ports: Value, endpoints: Value) -> EndpointSlice {
    serde_json::from_value(json!({
        "metadata": {"name": name, "namespace": "default", "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4",
        "ports": ports,
        "endpoints": endpoints,
    }))
    .expect("an EndpointSlice")
}

/// Ready endpoints, the first one on this node.
fn pods(addresses: &[&str]) -> Value {
    addresses
        .iter()
        .enumerate()
        .map(|(i, address)| json!({"addresses": [address], "nodeName": if i == 0 { "here" } else { "there" }}))
        .collect()
}

fn http(addresses: &[&str]) -> EndpointSlice {
    slice("s", json!([{"name": "http", "port": 8080}]), pods(addresses))
}

/// One line for each frontend: address, kind, backends from outside and from inside (those in use before the bar).
fn show(compiled: &Compiled) -> Vec<String> {
    let set = |index: Option<usize>| match index.and_then(|index| compiled.sets.get(index)) {
        None => "-".to_owned(),
        Some(set) => {
            let mut names: Vec<String> = set.backends.iter().map(|b| super::address_text(b.addr, b.port)).collect();
            if set.usable < names.len() {
                names.insert(set.usable, "|".into());
            }
            names.join(" ")
        }
    };
    compiled
        .frontends
        .iter()
        .map(|f| {
            let address = super::address_text(f.addr, f.port);
            let protocol = crate::maglev::protocol_name(f.proto);
            format!("{address}/{protocol} {:?} [{}] [{}]", f.kind, set(f.external), set(f.internal))
        })
        .collect()
}

fn compiled(service: &Service, slices: &[EndpointSlice]) -> Compiled {
    compile(service, slices.iter(), &node())
}
