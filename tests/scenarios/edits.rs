//! R40: whatever is edited, in whatever order, ends as if it had been created so; and while the writes are made, nobody who
//! is served before and after is not.
//!
//! The planner's ops are written into the kernel's maps one at a time, and the maps are read back after each.

use std::collections::{BTreeMap, BTreeSet};

use kinesin::datapath::{KernelMaps, MapStore, meaning_rows};
use kinesin_abi::{Backend, Be16, FrontendKey};
use kinesin_core::objects::{EndpointSlice, ObjectKey, Service};
use kinesin_core::plan::{Actual, Meaning, Op, Planner};
use kinesin_core::services::{Algorithm, Compiled, NodeContext, compile};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;
use serde_json::{Map, Value, json};

use crate::kernel;
use crate::property;

const SERVICES: usize = 3;
const SLICES: usize = 3;

/// One thing that somebody does.
#[derive(Clone, Debug)]
enum Edit {
    /// Sets a field of a Service (by its path), or takes it away.
    Field(usize, &'static str, Option<Value>),
    /// As it was in the beginning.
    Create(usize),
    Delete(usize),
    /// Replaces a slice, or deletes it.
    Slice(usize, usize, Option<Value>),
    /// What all Services depend on.
    Node(Surroundings),
}

#[derive(Clone, Debug, PartialEq)]
struct Surroundings {
    zone: &'static str,
    maglev: bool,
    topology: bool,
    all_types: bool,
    external_cluster_ip: bool,
    addresses: Vec<&'static str>,
    ipv6: bool,
}

impl Surroundings {
    fn context(&self) -> NodeContext {
        NodeContext {
            name: "here".into(),
            zone: self.zone.into(),
            labels: [("zone".into(), self.zone.into())].into(),
            node_port_addresses: self.addresses.iter().map(|text| text.parse().unwrap()).collect(),
            ipv6: self.ipv6,
            algorithm: if self.maglev { Algorithm::Maglev } else { Algorithm::Random },
            external_cluster_ip: self.external_cluster_ip,
            service_topology: self.topology,
            source_range_all_types: self.all_types,
            ..NodeContext::default()
        }
    }
}

fn surroundings() -> impl Strategy<Value = Surroundings> {
    let addresses = select(vec![vec![], vec!["192.168.1.10"], vec!["192.168.1.10", "fd01::10"]]);
    let flags =
        (prop::bool::weighted(0.3), any::<bool>(), prop::bool::weighted(0.3), any::<bool>(), prop::bool::weighted(0.8));
    (select(vec!["", "a", "b"]), addresses, flags).prop_map(
        |(zone, addresses, (maglev, topology, all_types, external_cluster_ip, ipv6))| Surroundings {
            zone,
            maglev,
            topology,
            all_types,
            external_cluster_ip,
            addresses,
            ipv6,
        },
    )
}

/// Fields with the values that they may have. Services share pods, and load balancers' addresses under other ports.
fn fields(service: usize) -> Vec<(&'static str, Vec<Value>)> {
    let n = service;
    let cluster = [format!("10.96.0.{}", n + 1), format!("fd00:96::{}", n + 1)];
    let port = |i: usize, protocol: &str| {
        let number = 100 * (n + 1) + i;
        json!({"name": format!("p{i}"), "port": number, "protocol": protocol, "nodePort": 30_000 + number})
    };
    let without_node_port = json!({"name": "p0", "port": 100 * (n + 1), "protocol": "TCP"});
    let entry = |ip: &str, mode: &str| json!({"ip": ip, "ipMode": mode});
    vec![
        (
            "/spec/type",
            vec![
                "ClusterIP".into(),
                "NodePort".into(),
                "LoadBalancer".into(),
                "LoadBalancer".into(),
                "ExternalName".into(),
            ],
        ),
        (
            "/spec/clusterIPs",
            vec![json!([]), json!([cluster[0]]), json!(cluster), json!([cluster[1]]), json!(["None"])],
        ),
        (
            "/spec/ports",
            vec![
                json!([]),
                json!([port(0, "TCP")]),
                json!([port(0, "UDP")]),
                json!([port(0, "TCP"), port(1, "UDP")]),
                json!([port(1, "TCP"), port(2, "SCTP"), port(0, "TCP")]),
                json!([without_node_port]),
            ],
        ),
        (
            "/spec/externalIPs",
            vec![
                json!([]),
                json!([format!("192.168.1.10{n}")]),
                json!([format!("192.168.1.10{n}"), format!("fd01::10{n}")]),
            ],
        ),
        (
            "/status/loadBalancer/ingress",
            vec![
                json!([]),
                json!([entry("192.168.1.240", "VIP")]),
                json!([entry("192.168.1.240", "Proxy")]),
                json!([entry("192.168.1.240", "VIP"), entry("fd01::240", "VIP")]),
                json!([entry(&format!("192.168.1.25{n}"), "VIP"), {"hostname": "lb"}]),
            ],
        ),
        ("/spec/externalTrafficPolicy", vec!["Cluster".into(), "Local".into()]),
        ("/spec/internalTrafficPolicy", vec!["Cluster".into(), "Local".into()]),
        (
            "/spec/loadBalancerSourceRanges",
            vec![
                json!([]),
                json!(["198.51.100.0/24"]),
                json!(["198.51.100.0/24", "198.51.100.7/32", "::/0"]),
                json!(["0.0.0.0/0"]),
                json!(["office"]),
            ],
        ),
        ("/spec/sessionAffinity", vec!["None".into(), "ClientIP".into()]),
        (
            "/spec/sessionAffinityConfig",
            vec![json!({"clientIP": {"timeoutSeconds": 60}}), json!({"clientIP": {"timeoutSeconds": 0}})],
        ),
        ("/spec/ipFamilies", vec![json!([]), json!(["IPv4"]), json!(["IPv6"]), json!(["IPv4", "IPv6"])]),
        (
            "/spec/trafficDistribution",
            vec!["PreferClose".into(), "PreferSameZone".into(), "PreferSameNode".into(), "PreferNobody".into()],
        ),
        ("/spec/loadBalancerClass", vec!["io.cilium/l2-announcer".into(), "example.org/other".into()]),
        (
            "/metadata/annotations/service.cilium.io~1type",
            vec!["ClusterIP".into(), "NodePort".into(), "LoadBalancer".into(), "?".into()],
        ),
        ("/metadata/annotations/service.cilium.io~1src-ranges-policy", vec!["allow".into(), "deny".into(), "?".into()]),
        ("/metadata/annotations/service.cilium.io~1node-selector", vec!["zone=a".into(), "zone!=c".into(), "(".into()]),
        ("/metadata/annotations/service.cilium.io~1node", vec!["here".into()]),
        ("/metadata/annotations/service.cilium.io~1lb-algorithm", vec!["maglev".into(), "random".into()]),
        ("/metadata/annotations/service.cilium.io~1forwarding-mode", vec!["dsr".into(), "snat".into()]),
        ("/metadata/annotations/service.kubernetes.io~1topology-mode", vec!["Auto".into(), "Disabled".into()]),
        ("/metadata/labels/service.kubernetes.io~1service-proxy-name", vec!["mesh".into()]),
        ("/metadata/labels/service.kubernetes.io~1headless", vec!["".into()]),
    ]
}

/// Mostly something that is served: fields that take everything away are few among those that change it.
fn edit() -> impl Strategy<Value = Edit> {
    let service = 0..SERVICES;
    let field = service.clone().prop_flat_map(|service| {
        select(fields(service)).prop_flat_map(move |(path, values)| {
            prop::option::weighted(0.75, select(values)).prop_map(move |value| Edit::Field(service, path, value))
        })
    });
    prop_oneof![
        10 => field,
        2 => service.clone().prop_map(Edit::Create),
        1 => service.clone().prop_map(Edit::Delete),
        8 => (service, 0..SLICES, prop::option::weighted(0.85, slice())).prop_map(|(service, slot, slice)| Edit::Slice(service, slot, slice)),
        1 => surroundings().prop_map(Edit::Node),
    ]
}

fn slice() -> impl Strategy<Value = Value> {
    let conditions = prop_oneof![
        4 => Just(json!({})),
        1 => Just(json!({"ready": false})),
        1 => Just(json!({"ready": false, "serving": true, "terminating": true})),
        1 => Just(json!({"ready": false, "serving": false, "terminating": true})),
    ];
    let hints = select(vec![
        json!({}),
        json!({"forZones": [{"name": "a"}]}),
        json!({"forZones": [{"name": "b"}], "forNodes": [{"name": "here"}]}),
    ]);
    let endpoint = (1u8..7, select(vec![Some("here"), Some("there"), None]), conditions, hints);
    (any::<bool>(), vec(endpoint, 0..5), select(vec![8080u16, 9090]), prop::collection::btree_set(0u8..3, 1..=3))
        .prop_map(|(v4, endpoints, number, ports)| {
            let address = |pod: u8| if v4 { format!("10.42.0.{pod}") } else { format!("fd42::{pod}") };
            let endpoints: Vec<Value> = endpoints
                .into_iter()
                .map(|(pod, node, conditions, hints)| {
                    json!({"addresses": [address(pod)], "nodeName": node, "conditions": conditions, "hints": hints})
                })
                .collect();
            let protocols = ["TCP", "UDP", "SCTP"];
            let ports: Vec<Value> = ports
                .iter()
                .flat_map(|port| {
                    protocols.map(|protocol| json!({"name": format!("p{port}"), "port": number, "protocol": protocol}))
                })
                .collect();
            json!({"addressType": if v4 { "IPv4" } else { "IPv6" }, "endpoints": endpoints, "ports": ports})
        })
}

/// What was written so far.
struct Objects {
    services: [Option<Value>; SERVICES],
    slices: BTreeMap<(usize, usize), Value>,
    surroundings: Surroundings,
}

fn key(service: usize) -> ObjectKey {
    ObjectKey::new("default", format!("s{service}"))
}

impl Objects {
    fn new() -> Self {
        let surroundings = Surroundings {
            zone: "",
            maglev: false,
            topology: false,
            all_types: false,
            external_cluster_ip: false,
            addresses: vec!["192.168.1.10"],
            ipv6: true,
        };
        Self { services: std::array::from_fn(|n| Some(created(n))), slices: BTreeMap::new(), surroundings }
    }

    /// Gives the Services that the edit concerns.
    fn apply(&mut self, edit: &Edit) -> Vec<usize> {
        match edit {
            Edit::Field(service, path, value) => {
                if let Some(object) = &mut self.services[*service] {
                    set(object, path, value.clone());
                }
                vec![*service]
            }
            Edit::Create(service) => {
                self.services[*service] = Some(created(*service));
                vec![*service]
            }
            Edit::Delete(service) => {
                self.services[*service] = None;
                vec![*service]
            }
            Edit::Slice(service, slot, slice) => {
                match slice {
                    Some(slice) => drop(self.slices.insert((*service, *slot), slice.clone())),
                    None => drop(self.slices.remove(&(*service, *slot))),
                }
                vec![*service]
            }
            Edit::Node(surroundings) => {
                self.surroundings = surroundings.clone();
                (0..SERVICES).collect()
            }
        }
    }

    fn compiled(&self, service: usize) -> Option<Compiled> {
        let object: Service = serde_json::from_value(self.services[service].clone()?).unwrap();
        let slices = self.slices.range((service, 0)..(service + 1, 0)).map(|((_, slot), slice)| {
            let mut slice: EndpointSlice = serde_json::from_value(slice.clone()).unwrap();
            slice.metadata.name = format!("slice-{slot}").into();
            slice
        });
        let slices: Vec<EndpointSlice> = slices.collect();
        Some(compile(&object, slices.iter(), &self.surroundings.context()))
    }
}

fn created(service: usize) -> Value {
    json!({
        "metadata": {"name": format!("s{service}"), "namespace": "default", "annotations": {}, "labels": {}},
        "spec": {"type": "LoadBalancer", "clusterIPs": [format!("10.96.0.{}", service + 1)],
                 "ports": [{"name": "p0", "port": 100 * (service + 1), "protocol": "TCP"}]},
        "status": {"loadBalancer": {"ingress": [{"ip": "192.168.1.240"}]}},
    })
}

/// Sets what is at a JSON pointer, whose parents are made if need be.
fn set(object: &mut Value, pointer: &str, value: Option<Value>) {
    let (parents, last) = pointer.rsplit_once('/').unwrap();
    let mut at = object;
    for name in parents.split('/').skip(1) {
        at = at.as_object_mut().unwrap().entry(name).or_insert_with(|| Value::Object(Map::new()));
    }
    let (last, fields) = (last.replace("~1", "/"), at.as_object_mut().unwrap());
    match value {
        Some(value) => drop(fields.insert(last, value)),
        None => drop(fields.remove(&last)),
    }
}

type Ends = BTreeSet<(std::net::IpAddr, u16, u8)>;

fn ends(set: &BTreeSet<Backend>) -> Ends {
    let end = |backend: &Backend| (backend.addr.into(), Be16::get(backend.port), backend.proto);
    set.iter().map(end).collect()
}

/// Backends of a frontend from outside and from inside.
fn sets(meaning: &Meaning, key: &FrontendKey) -> Option<[Ends; 2]> {
    meaning.frontends.get(key).map(|frontend| [ends(&frontend.external), ends(&frontend.internal)])
}

/// Writes one op at a time. After each, a packet may come.
fn write(maps: &KernelMaps, ops: &[Op]) -> Result<Meaning, TestCaseError> {
    let read = || -> Result<Meaning, TestCaseError> { Ok(maps.read().map_err(fail)?.meaning()) };
    let before = read()?;
    let mut between = Vec::new();
    for op in ops {
        maps.apply(std::slice::from_ref(op)).map_err(fail)?;
        between.push(read()?);
    }
    let after = between.last().unwrap_or(&before).clone();
    for (number, (op, now)) in ops.iter().zip(&between).enumerate() {
        let at = || format!("after op {number}, {op:?}, of {ops:#?}");
        // A set that shrinks in place holds a backend twice for a moment; that costs nobody anything.
        let garbage = now.faults.iter().find(|fault| fault.contains("free backend") || fault.contains("empty slot"));
        prop_assert!(garbage.is_none(), "{garbage:?} {}", at());
        for key in before.frontends.keys() {
            let (Some(old), Some(new)) = (sets(&before, key), sets(&after, key)) else { continue };
            let now = sets(now, key);
            prop_assert!(now.is_some(), "{key:?} is missing {}", at());
            for ((old, new), now) in old.iter().zip(&new).zip(now.iter().flatten()) {
                prop_assert!(
                    now.iter().all(|end| old.contains(end) || new.contains(end)),
                    "{key:?} leads to a stranger {}",
                    at()
                );
                prop_assert!(!now.is_empty() || old.is_empty() || new.is_empty(), "{key:?} leads nowhere {}", at());
            }
        }
    }
    prop_assert_eq!(&after.faults, &Vec::<String>::new(), "after {:#?}", ops);
    Ok(after)
}

fn fail(error: impl std::fmt::Display) -> TestCaseError {
    TestCaseError::fail(error.to_string())
}

/// Plans what a batch of changes needs, as map_writer does.
fn plan(planner: &mut Planner, objects: &Objects, services: &BTreeSet<usize>) -> Result<Vec<Op>, TestCaseError> {
    let mut plans = Vec::new();
    for service in services {
        plans.push(match objects.compiled(*service) {
            Some(compiled) => planner.update(&key(*service), &compiled).map_err(fail)?,
            None => planner.remove(&key(*service)),
        });
    }
    Ok(planner.in_phases(plans))
}

fn text(meaning: &Meaning) -> String {
    meaning_rows(meaning).into_iter().map(|(key, value)| format!("{key} {value}\n")).collect()
}

fn run(batches: &[Vec<Edit>], maps: &KernelMaps, scratch: &KernelMaps) -> Result<(), TestCaseError> {
    let mut objects = Objects::new();
    let mut planner = Planner::new(kernel::limits());
    let all: BTreeSet<usize> = (0..SERVICES).collect();
    let mut edited = write(maps, &plan(&mut planner, &objects, &all)?)?;
    for batch in batches {
        let touched = batch.iter().flat_map(|edit| objects.apply(edit)).collect();
        edited = write(maps, &plan(&mut planner, &objects, &touched)?)?;
    }
    let mut other = Planner::new(kernel::limits());
    let created = write(scratch, &plan(&mut other, &objects, &all)?)?;
    prop_assert_eq!(text(&edited), text(&created));
    prop_assert_eq!(&edited, &created);
    prop_assert_eq!(planner.repair(&maps.read().map_err(fail)?), vec![]);
    for (planner, maps) in [(&mut planner, maps), (&mut other, scratch)] {
        let plans = (0..SERVICES).map(|service| planner.remove(&key(service))).collect();
        let ops = planner.in_phases(plans);
        write(maps, &ops)?;
        prop_assert_eq!(maps.read().map_err(fail)?, Actual::default());
    }
    Ok(())
}

/// `KINESIN_R40_CASES` asks for more sequences than a usual run has time for.
pub fn r40_edits_end_as_if_created_so() -> anyhow::Result<()> {
    let (maps, scratch) = (kernel::borrow(), kernel::borrow());
    property::check("KINESIN_R40", 24, &vec(vec(edit(), 1..4), 1..10), |batches| {
        let result = run(&batches, maps.maps(), scratch.maps());
        if result.is_err() {
            kernel::empty(maps.maps()).and_then(|()| kernel::empty(scratch.maps())).map_err(fail)?;
        }
        result
    })?;
    maps.give_back()?;
    scratch.give_back()
}
