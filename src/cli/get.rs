//! `kinesin get`: the objects that the agent works with, shown as kubectl shows them.

use serde_json::{Value, json};

use super::CliError;
use super::client::{Connection, percent_encode};
use super::output::{Format, Output, Table, ago};

/// Objects as the agent's source has them
#[derive(clap::Args)]
pub(super) struct Args {
    /// services, endpointslices, nodes, pools, l2policies, leases, or their Kubernetes names
    kind: String,
    /// A name, or namespace/name
    name: Option<String>,
    /// Only objects of this namespace
    #[arg(short, long)]
    namespace: Option<String>,
    #[command(flatten)]
    connection: Connection,
    #[command(flatten)]
    output: Output,
}

pub(super) fn run(args: &Args) -> Result<(), CliError> {
    let kind = plural(&args.kind);
    let name = match (&args.namespace, &args.name) {
        (Some(namespace), Some(name)) if name.contains('/') => {
            return Err(CliError::Usage(format!("{name} has a namespace already: leave out --namespace {namespace}")));
        }
        (Some(namespace), Some(name)) => Some(format!("{namespace}/{name}")),
        (_, name) => name.clone(),
    };
    let query = name.as_ref().map(|name| format!("?name={}", percent_encode(name))).unwrap_or_default();
    let mut objects: Vec<Value> =
        args.connection.client().get(&format!("/v1/objects/{}{query}", percent_encode(&kind)))?;
    if let Some(namespace) = &args.namespace {
        objects.retain(|object| text(object, "/metadata/namespace") == namespace.as_str());
    }
    match args.output.format {
        Some(Format::Json | Format::Yaml) => {
            // As kubectl: one object alone when one was asked for, else a List.
            let shown = match (&name, objects.as_mut_slice()) {
                (Some(_), [object]) => object.take(),
                _ => json!({ "apiVersion": "v1", "kind": "List", "items": objects }),
            };
            args.output.print(&shown, String::new)
        }
        _ => args.output.print(&objects, || table(&kind, &objects, args.output.wide())),
    }
}

/// The lower-case plural that stands for `kind`, which may be a short name, singular, or of another case.
fn plural(kind: &str) -> String {
    let kind = kind.to_lowercase();
    match kind.as_str() {
        "svc" | "service" => "services",
        "eps" | "endpointslice" => "endpointslices",
        "no" | "node" => "nodes",
        "po" | "pod" => "pods",
        "pool" | "pools" | "ippool" | "ippools" | "lbippool" | "lbippools" | "ciliumloadbalancerippool" => {
            "ciliumloadbalancerippools"
        }
        "l2policy" | "l2policies" | "l2announcement" | "ciliuml2announcementpolicy" => "ciliuml2announcementpolicies",
        "lease" => "leases",
        other => other,
    }
    .to_string()
}

type Column = (&'static str, fn(&Value) -> String);

const NAMESPACE: Column = ("NAMESPACE", |o| text(o, "/metadata/namespace").into());
const NAME: Column = ("NAME", |o| text(o, "/metadata/name").into());
const AGE: Column = ("AGE", |o| text(o, "/metadata/creationTimestamp").parse().map(ago).unwrap_or_default());
const LABELS: Column = ("LABELS", |o| pairs(o, "/metadata/labels"));

fn columns(kind: &str, wide: bool) -> Vec<Column> {
    let (mut columns, more): (Vec<Column>, Vec<Column>) = match kind {
        "services" => (
            vec![
                NAMESPACE,
                NAME,
                ("TYPE", |o| text(o, "/spec/type").into()),
                ("CLUSTER-IP", |o| text(o, "/spec/clusterIP").into()),
                ("EXTERNAL-IP", external_ips),
                ("PORT(S)", ports),
                AGE,
            ],
            vec![("SELECTOR", |o| pairs(o, "/spec/selector"))],
        ),
        "endpointslices" => (
            vec![
                NAMESPACE,
                NAME,
                ("ADDRESSTYPE", |o| text(o, "/addressType").into()),
                ("PORTS", |o| each(o, "/ports", |p| scalar(&p["port"]))),
                ("ENDPOINTS", |o| each(o, "/endpoints", |e| each(e, "/addresses", scalar))),
                AGE,
            ],
            vec![LABELS],
        ),
        "nodes" => (vec![NAME, ("INTERNAL-IP", |o| each(o, "/status/addresses", internal_ip)), AGE], vec![LABELS]),
        "pods" => (
            vec![
                NAMESPACE,
                NAME,
                ("STATUS", |o| text(o, "/status/phase").into()),
                ("HOST PORTS", |o| each(o, "/spec/containers", |c| each(c, "/ports", host_port))),
                ("IP", |o| each(o, "/status/podIPs", |ip| scalar(&ip["ip"]))),
                AGE,
            ],
            vec![("NODE", |o| text(o, "/spec/nodeName").into())],
        ),
        "ciliumloadbalancerippools" => (
            vec![
                NAME,
                ("DISABLED", |o| scalar(&o["spec"]["disabled"])),
                ("CONFLICTING", |o| condition(o, "cilium.io/PoolConflict", "status")),
                ("IPS AVAILABLE", |o| condition(o, "cilium.io/IPsAvailable", "message")),
                AGE,
            ],
            vec![("BLOCKS", |o| each(o, "/spec/blocks", block))],
        ),
        "ciliuml2announcementpolicies" => (
            vec![
                NAME,
                ("INTERFACES", |o| each(o, "/spec/interfaces", scalar)),
                ("EXTERNALIPS", |o| scalar(&o["spec"]["externalIPs"])),
                ("LOADBALANCERIPS", |o| scalar(&o["spec"]["loadBalancerIPs"])),
                AGE,
            ],
            vec![LABELS],
        ),
        "leases" => (
            vec![NAMESPACE, NAME, ("HOLDER", |o| text(o, "/spec/holderIdentity").into()), AGE],
            vec![("RENEWED", |o| text(o, "/spec/renewTime").parse().map(ago).unwrap_or_default())],
        ),
        _ => (vec![NAMESPACE, NAME, AGE], vec![LABELS]),
    };
    if wide {
        columns.extend(more);
    }
    columns
}

fn table(kind: &str, objects: &[Value], wide: bool) -> String {
    let columns = columns(kind, wide);
    let mut table = Table::new(&columns.iter().map(|(heading, _)| *heading).collect::<Vec<_>>());
    for object in objects {
        table.row(columns.iter().map(|(_, value)| value(object)).collect());
    }
    table.render(&format!("no {kind}"))
}

fn text<'a>(object: &'a Value, pointer: &str) -> &'a str {
    object.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

fn scalar(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// The items of a list, without those that come out empty.
fn each(object: &Value, pointer: &str, show: fn(&Value) -> String) -> String {
    let items = object.pointer(pointer).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    items.iter().map(show).filter(|item| !item.is_empty()).collect::<Vec<_>>().join(",")
}

fn pairs(object: &Value, pointer: &str) -> String {
    let Some(map) = object.pointer(pointer).and_then(Value::as_object) else { return String::new() };
    map.iter().map(|(key, value)| format!("{key}={}", scalar(value))).collect::<Vec<_>>().join(",")
}

fn external_ips(service: &Value) -> String {
    let parts = [
        each(service, "/status/loadBalancer/ingress", |i| {
            scalar(if i["ip"].is_null() { &i["hostname"] } else { &i["ip"] })
        }),
        each(service, "/spec/externalIPs", scalar),
    ];
    let ips = parts.iter().filter(|part| !part.is_empty()).cloned().collect::<Vec<_>>().join(",");
    if ips.is_empty() && text(service, "/spec/type") == "LoadBalancer" { "<pending>".into() } else { ips }
}

/// `80:30080/TCP`
fn ports(service: &Value) -> String {
    each(service, "/spec/ports", |port| {
        let protocol = port["protocol"].as_str().unwrap_or("TCP");
        match port["nodePort"].as_u64() {
            Some(node_port) if node_port > 0 => format!("{}:{node_port}/{protocol}", scalar(&port["port"])),
            _ => format!("{}/{protocol}", scalar(&port["port"])),
        }
    })
}

/// `8080->80/TCP`, `127.0.0.1:8080->80/TCP`
fn host_port(port: &Value) -> String {
    let at = port["hostIP"].as_str().map(|ip| format!("{ip}:")).unwrap_or_default();
    let protocol = port["protocol"].as_str().unwrap_or("TCP");
    format!("{at}{}->{}/{protocol}", scalar(&port["hostPort"]), scalar(&port["containerPort"]))
}

fn internal_ip(address: &Value) -> String {
    if address["type"] == "InternalIP" { scalar(&address["address"]) } else { String::new() }
}

fn block(block: &Value) -> String {
    let cidr = scalar(&block["cidr"]);
    if cidr.is_empty() { format!("{}-{}", scalar(&block["start"]), scalar(&block["stop"])) } else { cidr }
}

fn condition(object: &Value, kind: &str, field: &str) -> String {
    let conditions = object.pointer("/status/conditions").and_then(Value::as_array);
    let found = conditions.and_then(|all| all.iter().find(|condition| condition["type"] == kind));
    found.map(|condition| scalar(&condition[field])).unwrap_or_default()
}
