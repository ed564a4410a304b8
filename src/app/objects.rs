//! Objects as the source has them, and small questions about them.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use kinesin_abi::{Addr, FrontendKey};
use kinesin_core::objects::{EndpointSlice, Object, ObjectKey};
use kinesin_core::services::AllBackends;
use kinesin_core::services::Frontend;
use serde::Serialize;
use serde_json::{Value, json};

use crate::admin::ApiError;
use crate::config::SourceKind;
use crate::table::Table;
use crate::world::World;

/// Objects of a kind, by lower-case plural.
pub(super) fn get(world: &World, kind: &str, name: Option<&str>) -> Result<Vec<Value>, ApiError> {
    let found = match kind {
        "services" => rows(&world.services, name),
        "endpointslices" => rows(&world.slices, name),
        "nodes" => rows(&world.nodes, name),
        "pods" => rows(&world.pods, name),
        "ciliumloadbalancerippools" => rows(&world.pools, name),
        "ciliuml2announcementpolicies" => rows(&world.policies, name),
        "leases" => rows(&world.leases, name),
        _ => return Err(ApiError::NotFound(format!("kind {kind} is not read by this agent"))),
    };
    match name {
        Some(name) if found.is_empty() => Err(ApiError::NotFound(format!("{kind} \"{name}\" not found"))),
        _ => Ok(found),
    }
}

fn rows<T: Object + Serialize>(table: &Table<ObjectKey, T>, name: Option<&str>) -> Vec<Value> {
    let wanted = |key: &ObjectKey| name.is_none_or(|name| key.name == name || key.to_string() == name);
    let rows = table.rows().into_iter().filter(|(key, _)| wanted(key));
    rows.map(|(_, object)| with_type(&object)).collect()
}

fn with_type<T: Object + Serialize>(object: &Arc<T>) -> Value {
    let mut value = serde_json::to_value(&**object).unwrap_or_default();
    if let Value::Object(fields) = &mut value {
        fields.insert("apiVersion".into(), json!(T::API_VERSIONS[0]));
        fields.insert("kind".into(), json!(T::KIND));
    }
    value
}

/// How to find all backends of a Service, used or not. Reads the slices once: O(slices) for each question, and nothing
/// kept.
pub(super) fn backends(world: &World) -> impl Fn(&ObjectKey) -> AllBackends {
    let mut slices: HashMap<ObjectKey, Vec<Arc<EndpointSlice>>> = HashMap::new();
    for (_, slice) in world.slices.rows() {
        if let Some(service) = slice.service() {
            slices.entry(service).or_default().push(slice);
        }
    }
    let (services, context) = (world.services.clone(), world.node_context.get());
    move |key| match (services.get(key), &context) {
        (Some(service), Some(context)) => {
            let slices = slices.get(key).into_iter().flatten().map(Arc::as_ref);
            AllBackends::of(&service, slices, context)
        }
        _ => AllBackends::default(),
    }
}

/// The pool that an address comes from.
pub(super) fn pool_of(world: &World, address: IpAddr) -> Option<String> {
    let pools = world.pools.rows().into_iter();
    let mut holding = pools.filter(|(_, pool)| kinesin_core::lb_ipam::contains(pool, address));
    holding.next().map(|(key, _)| key.name.to_string())
}

/// `namespace/name:port` of the Service that a frontend belongs to.
pub(super) fn frontend_name(world: &World, key: &FrontendKey) -> Option<String> {
    let is = |frontend: &Frontend| {
        (Addr::from(frontend.addr), frontend.port, frontend.proto) == (key.addr, key.port.get(), key.proto)
    };
    world.compiled.rows().into_iter().find_map(|(service, compiled)| {
        let frontend = compiled.frontends.iter().find(|frontend| is(frontend))?;
        let port =
            if frontend.port_name.is_empty() { frontend.port.to_string() } else { frontend.port_name.to_string() };
        Some(format!("{service}:{port}"))
    })
}

/// A unit variant as it is written in JSON.
pub(super) fn kebab(value: &impl Serialize) -> String {
    serde_json::to_value(value).ok().and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
}

/// Whether load balancers elsewhere should stop sending traffic here. A node that the API server does not have (any more)
/// is leaving; in a directory of manifests nodes need not be written down.
pub(super) fn node_is_leaving(world: &World) -> bool {
    match world.nodes.get(&ObjectKey::new("", world.node.clone())) {
        Some(node) => node.is_leaving(),
        None => world.nodes.is_complete() && world.config().source.kind == SourceKind::Kubernetes,
    }
}

/// What is in a table, one line.
pub(super) fn about(table: &str) -> &'static str {
    match table {
        "services" => "frontends with the backends they lead to, the same on every node that serves the same",
        "frontends" => "what clients connect to",
        "slots" => "members of backend sets",
        "backends" => "pods by id",
        "maglev" => "consistent selection, by set",
        "flows" => "established TCP connections, one entry per direction",
        "transient" => "other flows, one entry per direction",
        "fragments" => "ports of packets in fragments",
        "sockets" => "translated sockets",
        "ranges" => "networks whose clients services serve, or not",
        "affinity" => "backends that clients stay with",
        "l2" => "addresses answered for, per device",
        "devices" => "MAC and addresses of devices",
        "peers" => "nodes that packets are handed on to, and whom they come from",
        "settings" => "what the programs are told",
        "drops" => "packets dropped, by reason",
        "counts" => "what happens to connections",
        _ => "",
    }
}
