//! A model of the maps that ops are applied to, and services to plan.

mod adoption;
mod phases;
mod properties;
mod rules;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use kinesin_abi::{
    Addr, Backend, BackendId, FrontendKey, FrontendValue, SLOT_EMPTY, SOURCE_RANGE_DENY, SetRef, SourceRange,
    SourceRangeKey, frontend_flags,
};
use smol_str::{SmolStr, format_smolstr};

use super::{Actual, Limits, Op, Planner};
use crate::maglev::HashSeed;
use crate::objects::{
    Endpoint, EndpointConditions, EndpointPort, EndpointSlice, IngressEntry, Meta, ObjectKey, Service, ServicePort,
    ServiceType, TrafficPolicy,
};
use crate::services::{Algorithm, Compiled, NodeContext, compile};

/// Small tables, so that properties over thousands of plans stay fast.
fn limits() -> Limits {
    Limits {
        frontends: 512,
        slots: 1024,
        backends: 256,
        maglev_tables: 128,
        source_ranges: 256,
        maglev_size: 13,
        maglev_seed: HashSeed::default(),
    }
}

fn planner() -> Planner {
    Planner::new(limits())
}

/// What the kernel would hold.
#[derive(Clone, Debug, Default, PartialEq)]
struct Maps {
    frontends: BTreeMap<FrontendKey, FrontendValue>,
    slots: BTreeMap<u32, BackendId>,
    backends: BTreeMap<BackendId, Backend>,
    maglev: BTreeMap<u32, Arc<[BackendId]>>,
    ranges: BTreeSet<SourceRangeKey>,
}

impl Maps {
    fn of(actual: Actual) -> Self {
        Self {
            frontends: actual.frontends.into_iter().collect(),
            slots: actual.slots.into_iter().collect(),
            backends: actual.backends.into_iter().collect(),
            maglev: actual.maglev.into_iter().collect(),
            ranges: actual.source_ranges.into_iter().collect(),
        }
    }

    fn actual(&self) -> Actual {
        Actual {
            frontends: self.frontends.clone().into_iter().collect(),
            slots: self.slots.clone().into_iter().collect(),
            backends: self.backends.clone().into_iter().collect(),
            maglev: self.maglev.clone().into_iter().collect(),
            source_ranges: self.ranges.iter().copied().collect(),
        }
    }

    fn apply(&mut self, op: &Op) {
        match op {
            Op::Backend(id, value) if *value == Backend::default() => drop(self.backends.remove(id)),
            Op::Backend(id, value) => drop(self.backends.insert(*id, *value)),
            Op::Slot(index, SLOT_EMPTY) => drop(self.slots.remove(index)),
            Op::Slot(index, id) => drop(self.slots.insert(*index, *id)),
            Op::PutMaglev(base, table) => drop(self.maglev.insert(*base, table.clone())),
            Op::PutFrontend(key, value) => drop(self.frontends.insert(*key, *value)),
            Op::DeleteFrontend(key) => drop(self.frontends.remove(key)),
            Op::DeleteMaglev(base) => drop(self.maglev.remove(base)),
            Op::PutSourceRange(key) => drop(self.ranges.insert(*key)),
            Op::DeleteSourceRange(key) => drop(self.ranges.remove(key)),
        }
    }

    fn apply_all(&mut self, ops: &[Op]) {
        ops.iter().for_each(|op| self.apply(op));
    }

    /// Applies the ops one by one; after each, a packet may arrive. R40: whoever is served before and after is served in
    /// between, and nobody is who is served neither before nor after.
    fn apply_safely(&mut self, ops: &[Op]) {
        let before = self.served();
        let mut steps = Vec::new();
        for (done, op) in ops.iter().enumerate() {
            self.apply(op);
            if let Err(problem) = self.check() {
                panic!("after op {done} {op:?} of {ops:#?}: {problem}");
            }
            steps.push(self.served());
        }
        let after = self.served();
        for (done, step) in steps.iter().enumerate() {
            for (key, served) in step {
                let allowed = [before.get(key), after.get(key)];
                for (client, served) in served.iter().enumerate() {
                    let known = allowed.iter().any(|then| then.is_some_and(|then| then[client]) == *served);
                    assert!(known, "client {client} of {key:?} after op {done} of {ops:#?}");
                }
            }
        }
    }

    /// Whether each of [`CLIENTS`] is served, by frontend.
    fn served(&self) -> BTreeMap<FrontendKey, Vec<bool>> {
        let frontends = self.frontends.iter();
        frontends.map(|(key, value)| (*key, CLIENTS.map(|client| self.serves(value, client)).to_vec())).collect()
    }

    /// As the programs decide it.
    fn serves(&self, frontend: &FrontendValue, client: std::net::IpAddr) -> bool {
        if frontend.flags & frontend_flags::SOURCE_RANGES == 0 {
            return true;
        }
        let deny = frontend.flags & frontend_flags::SOURCE_RANGES_DENY != 0;
        let family = if client.is_ipv4() { 0 } else { kinesin_abi::SOURCE_RANGE_IPV6 };
        let list = family | if deny { SOURCE_RANGE_DENY } else { 0 };
        let range = SourceRange { service: frontend.service, list, addr: Addr::from(client) };
        let listed = self.ranges.iter().any(|key| {
            let client = SourceRangeKey { prefix_len: key.prefix_len, range };
            client.masked() == key.masked()
        });
        listed != deny
    }

    /// No packet meets an empty slot or a free backend.
    fn check(&self) -> Result<(), String> {
        for (key, value) in &self.frontends {
            for set in [value.external, value.internal].into_iter().filter(|set| set.count > 0) {
                for index in set.base..set.base + set.count {
                    let Some(id) = self.slots.get(&index) else {
                        return Err(format!("{key:?} counts empty slot {index}"));
                    };
                    if !self.backends.contains_key(id) {
                        return Err(format!("{key:?} leads to free backend {id} in slot {index}"));
                    }
                }
            }
        }
        for (base, table) in &self.maglev {
            if let Some(id) = table.iter().find(|id| !self.backends.contains_key(id)) {
                return Err(format!("table {base} leads to free backend {id}"));
            }
        }
        Ok(())
    }

    fn set(&self, set: SetRef) -> BTreeSet<Backend> {
        let ids: Vec<BackendId> = (set.base..set.base + set.count).map(|index| self.slots[&index]).collect();
        let backends: BTreeSet<Backend> = ids.iter().map(|id| self.backends[id]).collect();
        assert_eq!(backends.len(), ids.len(), "a backend is in a set twice");
        backends
    }

    /// What clients see: everything but numbering and placement.
    fn meaning(&self) -> Meaning {
        let mut first_with_id: BTreeMap<u32, FrontendKey> = BTreeMap::new();
        let frontends = self
            .frontends
            .iter()
            .map(|(key, value)| {
                let port = *first_with_id.entry(value.service).or_insert(*key);
                let table = |set: SetRef| -> Vec<Backend> {
                    let table = (set.count > 0).then(|| self.maglev.get(&set.base)).flatten();
                    table.into_iter().flat_map(|table| table.iter()).map(|id| self.backends[id]).collect()
                };
                let seen = FrontendMeaning {
                    flags: value.flags,
                    affinity: value.affinity,
                    port,
                    external: self.set(value.external),
                    internal: self.set(value.internal),
                    tables: [table(value.external), table(value.internal)],
                    served: CLIENTS.map(|client| self.serves(value, client)),
                };
                (*key, seen)
            })
            .collect();
        Meaning {
            frontends,
            backends: self.backends.values().copied().collect(),
            slots: self.slots.len(),
            ranges: self.ranges.len(),
        }
    }
}

#[derive(Debug, PartialEq)]
struct Meaning {
    frontends: BTreeMap<FrontendKey, FrontendMeaning>,
    backends: BTreeSet<Backend>,
    slots: usize,
    ranges: usize,
}

#[derive(Debug, PartialEq)]
struct FrontendMeaning {
    flags: u32,
    affinity: u32,
    port: FrontendKey,
    external: BTreeSet<Backend>,
    internal: BTreeSet<Backend>,
    tables: [Vec<Backend>; 2],
    served: [bool; CLIENTS.len()],
}

/// A service in the short form that tests write and properties generate.
#[derive(Clone, Debug, Default, PartialEq)]
struct Spec {
    /// Last byte of the ClusterIP.
    ip: u8,
    /// Last byte of the load balancer's address.
    vip: Option<u8>,
    node_port: bool,
    /// Port numbers; the last digit chooses the pods' port, so that services share backends.
    ports: Vec<u16>,
    pods: Vec<Pod>,
    external_local: bool,
    internal_local: bool,
    maglev: bool,
    /// Indices of [`RANGES`].
    ranges: BTreeSet<usize>,
    deny: bool,
    all_types: bool,
}

/// Source ranges that contain each other, of both families, and one that is none.
const RANGES: [&str; 6] = ["0.0.0.0/0", "198.51.100.0/24", "198.51.100.7/32", "203.0.113.0/28", "::/0", "anybody"];

/// Clients inside and outside of them.
const CLIENTS: [std::net::IpAddr; 5] = [
    std::net::IpAddr::V4(std::net::Ipv4Addr::new(198, 51, 100, 7)),
    std::net::IpAddr::V4(std::net::Ipv4Addr::new(198, 51, 100, 8)),
    std::net::IpAddr::V4(std::net::Ipv4Addr::new(203, 0, 113, 15)),
    std::net::IpAddr::V4(std::net::Ipv4Addr::new(203, 0, 113, 16)),
    std::net::IpAddr::V6(std::net::Ipv6Addr::LOCALHOST),
];

/// Pod 10.42.0.`ip`; on this node where it is even.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Pod {
    ip: u8,
    ready: bool,
    terminating: bool,
    serving: bool,
}

fn up(ip: u8) -> Pod {
    Pod { ip, ready: true, terminating: false, serving: true }
}

fn terminating(ip: u8) -> Pod {
    Pod { ip, ready: false, terminating: true, serving: true }
}

fn down(ip: u8) -> Pod {
    Pod { ip, ready: false, terminating: false, serving: false }
}

fn ups(ips: impl IntoIterator<Item = u8>) -> Vec<Pod> {
    ips.into_iter().map(up).collect()
}

fn key(name: &str) -> ObjectKey {
    ObjectKey::new("default", name)
}

impl Spec {
    fn compile(&self) -> Compiled {
        let policy = |local| if local { TrafficPolicy::Local } else { TrafficPolicy::Cluster };
        let mut service = Service::default();
        service.spec.kind = match (self.vip, self.node_port) {
            (Some(_), _) => ServiceType::LoadBalancer,
            (None, true) => ServiceType::NodePort,
            (None, false) => ServiceType::ClusterIP,
        };
        service.spec.cluster_ip = format_smolstr!("10.96.0.{}", self.ip);
        service.spec.external_traffic_policy = policy(self.external_local);
        service.spec.internal_traffic_policy = policy(self.internal_local);
        service.spec.ports = self
            .ports
            .iter()
            .map(|port| ServicePort {
                name: format_smolstr!("p{port}"),
                port: *port,
                node_port: if self.node_port { 30_000 + *port } else { 0 },
                ..ServicePort::default()
            })
            .collect();
        service.status.load_balancer.ingress = self
            .vip
            .iter()
            .map(|vip| IngressEntry { ip: format_smolstr!("192.0.2.{vip}"), ..IngressEntry::default() })
            .collect();
        service.spec.load_balancer_source_ranges = self.ranges.iter().map(|range| RANGES[*range].into()).collect();
        if self.deny {
            service.metadata.annotations.insert("service.cilium.io/src-ranges-policy".into(), "deny".into());
        }
        let slice = EndpointSlice {
            metadata: Meta { name: "slice".into(), ..Meta::default() },
            address_type: "IPv4".into(),
            ports: self
                .ports
                .iter()
                .map(|port| EndpointPort {
                    name: format_smolstr!("p{port}"),
                    protocol: SmolStr::default(),
                    port: Some(8000 + *port % 10),
                })
                .collect(),
            endpoints: self
                .pods
                .iter()
                .map(|pod| Endpoint {
                    address: format!("10.42.0.{}", pod.ip).as_str().into(),
                    conditions: EndpointConditions {
                        ready: Some(pod.ready),
                        serving: Some(pod.serving),
                        terminating: Some(pod.terminating),
                    },
                    node_name: if pod.ip % 2 == 0 { "here" } else { "there" }.into(),
                    ..Endpoint::default()
                })
                .collect(),
        };
        let node = NodeContext {
            name: "here".into(),
            node_port_addresses: vec![[192, 168, 1, 1].into()],
            algorithm: if self.maglev { Algorithm::Maglev } else { Algorithm::Random },
            ipv6: false,
            source_range_all_types: self.all_types,
            ..NodeContext::default()
        };
        compile(&service, [&slice].into_iter(), &node)
    }
}

/// Plans an update and applies it, checking every prefix.
fn update(planner: &mut Planner, maps: &mut Maps, name: &str, spec: &Spec) -> Vec<Op> {
    let ops = planner.update(&key(name), &spec.compile()).expect("there is room");
    maps.apply_safely(&ops);
    assert_eq!(*maps, Maps::of(planner.expected()));
    ops
}

/// The maps of these services, created one after the other.
fn directly<'a>(services: impl IntoIterator<Item = (&'a str, &'a Spec)>) -> Maps {
    let (mut planner, mut maps) = (planner(), Maps::default());
    for (name, spec) in services {
        update(&mut planner, &mut maps, name, spec);
    }
    maps
}
