//! Several nodes with a machine each, exchanging records, against what must always hold.

use proptest::prelude::*;
use serde_json::json;

use super::tests::{all_of, device, members, policy, record, service};
use super::*;
use crate::objects::Object;

/// The nodes and what they have told each other.
struct Cluster {
    nodes: BTreeMap<String, (Ownership, Record)>,
    now: Instant,
}

#[derive(Clone, Debug)]
enum Act {
    Join(u8),
    /// Dies without a word.
    Crash(u8),
    Drain(u8),
    Link {
        node: u8,
        up: bool,
    },
    Place(u8, BTreeSet<u8>),
}

fn act() -> impl Strategy<Value = Act> {
    let node = || 0..5u8;
    prop_oneof![
        4 => node().prop_map(Act::Join),
        3 => node().prop_map(Act::Crash),
        1 => node().prop_map(Act::Drain),
        2 => (node(), any::<bool>()).prop_map(|(node, up)| Act::Link { node, up }),
        2 => (0..4u8, prop::collection::btree_set(node(), 0..3)).prop_map(|(s, nodes)| Act::Place(s, nodes)),
    ]
}

/// Twelve addresses; those of the last Services are served only where their pods are.
fn services() -> Vec<Arc<Service>> {
    let mut services = Vec::new();
    for n in 0..12 {
        let mut object = Service::clone(&service(&format!("s{n}"), &[&format!("10.0.0.{n}")]));
        if n < 4 {
            object.spec.external_traffic_policy = crate::objects::TrafficPolicy::Local;
        }
        services.push(Arc::new(object));
    }
    // Shares the address of one of each sort.
    services.push(service("t1", &["10.0.0.1", "10.0.0.5"]));
    services
}

fn name(n: u8) -> String {
    format!("node-{n}")
}

impl Cluster {
    fn new() -> Self {
        Self { nodes: BTreeMap::new(), now: Instant::now() }
    }

    fn step(&mut self, node: &str, input: Input) -> Vec<Effect> {
        let now = self.now;
        self.nodes.get_mut(node).map(|(machine, _)| machine.step(input, now)).unwrap_or_default()
    }

    fn join(&mut self, n: u8, placements: &BTreeMap<u8, BTreeSet<u8>>) {
        let node = name(n);
        if self.nodes.contains_key(&node) {
            return;
        }
        self.nodes.insert(node.clone(), (Ownership::new(node.as_str()), record(&node, &[])));
        self.step(&node, all_of(&[device("eth0", 2)]));
        self.step(&node, Input::PolicyUpserted(policy("p", json!({"loadBalancerIPs": true}))));
        for service in services() {
            self.step(&node, Input::ServiceUpserted(service));
        }
        for (service, nodes) in placements {
            self.step(&node, placed(*service, nodes));
        }
        let members = self.members();
        self.step(&node, Input::Members(members));
        self.step(&node, Input::Synced);
    }

    fn members(&self) -> Members {
        members(self.nodes.values().map(|(_, record)| record.clone()))
    }

    /// Everybody publishes and reads, until nobody has anything new to say.
    fn exchange(&mut self) -> Result<(), TestCaseError> {
        for _ in 0..10 {
            let mut quiet = true;
            for (machine, record) in self.nodes.values_mut() {
                let claims = machine.claims();
                quiet &= record.claims == claims;
                record.claims = claims;
            }
            let members = self.members();
            for node in self.nodes.keys().cloned().collect::<Vec<_>>() {
                quiet &= self.step(&node, Input::Members(members.clone())).is_empty();
            }
            if quiet {
                return Ok(());
            }
        }
        Err(TestCaseError::fail("the nodes never come to rest"))
    }

    /// Who answers for each address.
    fn answering(&self) -> BTreeMap<IpAddr, Vec<String>> {
        let mut all: BTreeMap<IpAddr, Vec<String>> = BTreeMap::new();
        for (node, (machine, _)) in &self.nodes {
            for addr in machine.claims() {
                all.entry(addr).or_default().push(node.clone());
            }
        }
        all
    }
}

fn placed(service: u8, nodes: &BTreeSet<u8>) -> Input {
    let nodes = nodes.iter().map(|n| name(*n).into()).collect();
    let service = ObjectKey::new("default", format!("s{service}"));
    Input::Placed { service, placement: Placement { nodes, anywhere: false } }
}

fn perform(cluster: &mut Cluster, act: &Act, placements: &mut BTreeMap<u8, BTreeSet<u8>>) {
    match act {
        Act::Join(n) => cluster.join(*n, placements),
        Act::Crash(n) => drop(cluster.nodes.remove(&name(*n))),
        Act::Drain(n) => {
            cluster.step(&name(*n), Input::Draining(true));
            if let Some((_, record)) = cluster.nodes.get_mut(&name(*n)) {
                record.draining = true;
            }
        }
        Act::Link { node, up } => {
            let link = Device { running: *up, ..device("eth0", 2) };
            cluster.step(&name(*node), all_of(&[link]));
            if let Some((_, record)) = cluster.nodes.get_mut(&name(*node)) {
                record.devices = up.then(|| "eth0".into()).into_iter().collect();
            }
        }
        Act::Place(service, nodes) => {
            placements.insert(*service, nodes.clone());
            for node in cluster.nodes.keys().cloned().collect::<Vec<_>>() {
                cluster.step(&node, placed(*service, nodes));
            }
        }
    }
}

/// A node among others whose devices and whose agents differ.
#[derive(Clone, Copy, Debug)]
struct Kind {
    can: Families,
    /// Its agent is from before records told IP versions.
    old: bool,
}

fn kind() -> impl Strategy<Value = Kind> {
    let kinds = (any::<bool>(), any::<bool>(), any::<bool>());
    kinds.prop_map(|(ipv4, ipv6, old)| Kind { can: Families { ipv4, ipv6 }, old })
}

/// What agents tell each other; old ones neither write nor read IP versions.
fn told(records: &BTreeMap<String, Record>, kinds: &[Kind], reader: usize) -> Members {
    let tell = |(n, record): (usize, &Record)| {
        let mut record = record.clone();
        if !kinds[n].old && !kinds[reader].old {
            record.set_announcers([("eth0".into(), kinds[n].can)]);
        }
        record
    };
    members(records.values().enumerate().map(tell))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Old agents may wait for one that cannot answer; two never do.
    #[test]
    fn agents_that_know_of_ip_versions_and_others_that_do_not_never_answer_both(
        kinds in prop::collection::vec(kind(), 2..6), upgraded in 0..6usize,
    ) {
        let now = Instant::now();
        let mut kinds = kinds;
        let services = [service("four", &["10.0.0.1", "10.0.0.2"]), service("six", &["fd00::1", "fd00::2", "fd00::3"])];
        let start = |n: usize, kind: Kind| {
            let mut machine = Ownership::new(name(n as u8).as_str());
            let can = if kind.old { Families::BOTH } else { kind.can };
            machine.step(Input::Devices(vec![(device("eth0", 2), can)]), now);
            machine.step(Input::PolicyUpserted(policy("p", json!({"loadBalancerIPs": true}))), now);
            for service in &services {
                machine.step(Input::ServiceUpserted(service.clone()), now);
            }
            machine.step(Input::Members(members([])), now);
            machine
        };
        let mut machines: Vec<Ownership> = kinds.iter().enumerate().map(|(n, kind)| start(n, *kind)).collect();
        let mut records: BTreeMap<String, Record> =
            (0..kinds.len()).map(|n| (name(n as u8), record(&name(n as u8), &[]))).collect();
        for upgrade in [None, Some(upgraded % kinds.len())] {
            if let Some(n) = upgrade {
                kinds[n].old = false;
                machines[n] = start(n, kinds[n]);
                machines[n].step(Input::Restored(records[&name(n as u8)].claims.clone()), now);
            }
            for _ in 0..6 {
                for (n, machine) in machines.iter_mut().enumerate() {
                    machine.step(Input::Members(told(&records, &kinds, n)), now);
                    machine.step(Input::Synced, now);
                }
                for (n, machine) in machines.iter().enumerate() {
                    records.get_mut(&name(n as u8)).unwrap().claims = machine.claims();
                }
            }
            for addr in services.iter().flat_map(|s| announced(s, &policy("p", json!({"loadBalancerIPs": true})))) {
                let answering: Vec<usize> =
                    (0..kinds.len()).filter(|n| machines[*n].claims().contains(&addr)).collect();
                prop_assert!(answering.len() <= 1, "{addr} is answered by {answering:?} of {kinds:?}");
                // Agents of one version agree: whoever can, does.
                let able = |kind: &Kind| kind.old || kind.can.include(addr);
                if kinds.iter().all(|kind| !kind.old) {
                    prop_assert_eq!(answering.len(), usize::from(kinds.iter().any(able)), "{} of {:?}", addr, kinds);
                }
                prop_assert!(answering.iter().all(|n| able(&kinds[*n])), "{addr}: {answering:?} of {kinds:?}");
            }
        }
    }

    #[test]
    fn r06_every_address_has_exactly_one_owner_and_all_nodes_agree(
        acts in prop::collection::vec(act(), 1..25),
    ) {
        let mut cluster = Cluster::new();
        let mut placements = BTreeMap::new();
        for act in &acts {
            perform(&mut cluster, act, &mut placements);
            cluster.exchange()?;
            let answering = cluster.answering();
            for (addr, nodes) in &answering {
                prop_assert_eq!(nodes.len(), 1, "{} is answered by {:?}", addr, nodes);
            }
            for (machine, _) in cluster.nodes.values() {
                for vip in machine.views() {
                    let owner = vip.view.owner.map(|owner| owner.to_string());
                    let answers = answering.get(&vip.view.address).map(|nodes| nodes[0].clone());
                    prop_assert_eq!(owner, answers, "{}", vip.view.address);
                }
            }
            // Whoever can carry frames serves at least what is not bound to pods.
            let live = cluster.nodes.values().any(|(_, record)| !record.devices.is_empty());
            prop_assert!(!live || answering.len() >= 8, "{:?}", answering);
        }
    }

    #[test]
    fn only_the_addresses_of_those_who_leave_move(
        before in prop::collection::btree_set(0..5u8, 2..5), leaver in 0..5u8, newcomer in 0..5u8,
    ) {
        let mut cluster = Cluster::new();
        for n in &before {
            cluster.join(*n, &BTreeMap::new());
            cluster.exchange()?;
        }
        let first = cluster.answering();
        cluster.join(newcomer, &BTreeMap::new());
        cluster.exchange()?;
        prop_assert_eq!(&cluster.answering(), &first, "somebody coming moves nothing");
        cluster.nodes.remove(&name(leaver));
        cluster.exchange()?;
        let last = cluster.answering();
        for (addr, nodes) in &first {
            if nodes[0] != name(leaver) {
                prop_assert_eq!(&last[addr], nodes);
            }
        }
        prop_assert!(cluster.nodes.is_empty() || last.len() == first.len());
    }

    #[test]
    fn nodes_that_claim_the_same_settle_it_at_once(claims in prop::collection::vec(0..4096u16, 5)) {
        // As after a partition has healed: any set of nodes answers for any set of addresses.
        let mut cluster = Cluster::new();
        for (n, bits) in claims.iter().enumerate() {
            let node = name(n as u8);
            let mut alone = Ownership::new(node.as_str());
            let all = services();
            let mine = all.iter().take(12).enumerate().filter(|(i, _)| bits & (1 << i) != 0).map(|(_, s)| s);
            let inputs = [
                all_of(&[device("eth0", 2)]),
                Input::PolicyUpserted(policy("p", json!({"loadBalancerIPs": true}))),
                Input::Members(members([])),
                Input::Synced,
            ];
            let anywhere = Placement { anywhere: true, ..Placement::default() };
            let placed = all.iter().map(|s| Input::Placed { service: s.key(), placement: anywhere.clone() });
            for input in inputs.into_iter().chain(placed).chain(mine.cloned().map(Input::ServiceUpserted)) {
                alone.step(input, cluster.now);
            }
            prop_assert_eq!(alone.claims().len(), (bits & 0xfff).count_ones() as usize);
            let claims = alone.claims();
            cluster.nodes.insert(node.clone(), (alone, record(&node, &claims)));
        }
        let members = cluster.members();
        for node in cluster.nodes.keys().cloned().collect::<Vec<_>>() {
            cluster.step(&node, Input::Members(members.clone()));
            for service in services() {
                cluster.step(&node, Input::ServiceUpserted(service));
            }
        }
        cluster.exchange()?;
        let answering = cluster.answering();
        prop_assert_eq!(answering.len(), 12);
        for (addr, nodes) in answering {
            // Those who had it keep it, the highest weight among them.
            let index = addr.to_string().rsplit('.').next().and_then(|n| n.parse::<u16>().ok()).unwrap();
            let mut had: Vec<String> =
                (0..5u8).filter(|n| claims[usize::from(*n)] & (1 << index) != 0).map(name).collect();
            had.sort_by_key(|node| weight(addr, node));
            prop_assert_eq!(nodes.len(), 1);
            prop_assert!(had.last().is_none_or(|best| *best == nodes[0]));
        }
    }

    #[test]
    fn the_order_of_candidates_does_not_matter(
        candidates in prop::collection::vec((0..6u8, 1..3usize, any::<bool>(), any::<bool>()), 1..6),
        addr in any::<u32>(),
        seed in any::<usize>(),
    ) {
        let mut candidates: Vec<Candidate> = candidates
            .into_iter()
            .map(|(n, serves, draining, claims)| Candidate { node: name(n).into(), serves, draining, claims })
            .collect();
        let addr = IpAddr::V4(addr.into());
        let first = owner(addr, &candidates).cloned();
        let middle = seed % candidates.len();
        candidates.rotate_left(middle);
        candidates.reverse();
        prop_assert_eq!(owner(addr, &candidates).cloned(), first);
    }
}
