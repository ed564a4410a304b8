#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::convert::Infallible;

use kinesin_abi::{
    BACKEND_LOCAL, BackendState, DEVICE_ETHERNET, FrontendKind, SETTING_REJECT_NO_BACKEND, TCP_SEEN_RST,
    frontend_flags, proto,
};

use super::*;

/// A node in a few tables: device 2 is the LAN, device 3 a pod's.
struct Fake {
    frontends: BTreeMap<FrontendKey, FrontendValue>,
    slots: Vec<BackendId>,
    backends: BTreeMap<BackendId, Backend>,
    flows: BTreeMap<FlowKey, FlowValue>,
    affinity: BTreeMap<AffinityKey, AffinityValue>,
    ingress: Attached,
}

const LAN: u32 = 2;
const NOW: u64 = 1_000_000_000_000;

impl View for Fake {
    type Error = Infallible;

    fn frontend(&self, key: &FrontendKey) -> Result<Option<FrontendValue>, Infallible> {
        Ok(self.frontends.get(key).copied())
    }
    fn slots(&self, set: SetRef) -> Result<Vec<BackendId>, Infallible> {
        let slots = set.base..set.base.saturating_add(set.count);
        Ok(slots.map(|slot| self.slots.get(slot as usize).copied().unwrap_or(0)).collect())
    }
    fn backend(&self, id: BackendId) -> Result<Option<Backend>, Infallible> {
        Ok(self.backends.get(&id).copied())
    }
    fn maglev(&self, _base: u32) -> Result<Option<Arc<[BackendId]>>, Infallible> {
        Ok(None)
    }
    fn flow(&self, key: &FlowKey) -> Result<Option<FlowValue>, Infallible> {
        Ok(self.flows.get(key).copied())
    }
    fn affinity(&self, key: &AffinityKey) -> Result<Option<AffinityValue>, Infallible> {
        Ok(self.affinity.get(key).copied())
    }
    fn source_ranges(&self, _service: u32) -> Result<Vec<SourceRangeKey>, Infallible> {
        Ok(Vec::new())
    }
    fn announced(&self, key: &L2Key) -> Result<bool, Infallible> {
        Ok(key.ifindex == LAN)
    }
    fn device(&self, ifindex: u32) -> Result<Option<DeviceValue>, Infallible> {
        let ipv4 = u32::from_ne_bytes([192, 168, 1, 10]);
        Ok((ifindex == LAN).then_some(DeviceValue { flags: DEVICE_ETHERNET, ipv4, ..DeviceValue::default() }))
    }
    fn peer(&self, key: &PeerKey) -> Result<Option<PeerValue>, Infallible> {
        let ipv4 = u32::from_ne_bytes([192, 168, 1, 11]);
        let is_it = *key == PeerKey::of_addr(&kinesin_abi::Addr::from_v4_raw(ipv4));
        Ok(is_it.then_some(PeerValue { ipv4, ..PeerValue::default() }))
    }
    fn settings(&self) -> Result<Settings, Infallible> {
        let flags = SETTING_REJECT_NO_BACKEND;
        let (node_port_min, node_port_max) = (30_000, 32_767);
        let given =
            Settings { alive_at: NOW, alive_for: 1, flags, node_port_min, node_port_max, ..Settings::default() };
        Ok(Settings { snat_min: 61_000, snat_max: 61_001, ..given })
    }
    fn serves(&self, ifindex: u32) -> bool {
        ifindex == LAN
    }
    fn attached(&self, hook: Hook) -> Result<Attached, Infallible> {
        Ok(if let Hook::Ingress { .. } = hook { self.ingress.clone() } else { Attached::Yes("tcx".into()) })
    }
    fn route(&self, query: &RouteQuery) -> Result<Result<Hop, String>, Infallible> {
        let IpAddr::V4(dst) = query.dst else { return Ok(Err("no route".into())) };
        let (local, ifindex, via) = match dst.octets() {
            [192, 168, 1, 10] => (true, 1, None),
            [10, 42, 1, _] => (false, 3, None),
            [10, 42, 9, _] => return Ok(Err("unreachable".into())),
            [192, 168, ..] => (false, LAN, None),
            _ => (false, LAN, Some([192, 168, 1, 1].into())),
        };
        Ok(Ok(Hop { local, ifindex, via, source: None, mac: None, neighbour: "none".into() }))
    }
    fn forwards(&self, _ifindex: u32, _v4: bool) -> Result<bool, Infallible> {
        Ok(true)
    }
    fn device_name(&self, ifindex: u32) -> String {
        ["", "lo", "eth0", "veth0"].get(ifindex as usize).map_or_else(|| format!("if{ifindex}"), |name| (*name).into())
    }
    fn device_index(&self, name: &str) -> Option<u32> {
        (name == "eth0").then_some(LAN)
    }
    fn host_netns(&self) -> Option<u64> {
        Some(7)
    }
    fn now(&self) -> u64 {
        NOW
    }
    fn service_name(&self, _key: &FrontendKey) -> Option<String> {
        Some("default/web:http".into())
    }
}

fn backend(last: u8, third: u8, local: bool) -> Backend {
    Backend {
        addr: IpAddr::from([10, 42, third, last]).into(),
        port: Be16::new(8080),
        proto: proto::TCP,
        state: BackendState::Active as u8,
        flags: if local { BACKEND_LOCAL } else { 0 },
    }
}

fn key(address: [u8; 4], port: u16) -> FrontendKey {
    FrontendKey { addr: IpAddr::from(address).into(), port: Be16::new(port), proto: proto::TCP, pad: 0 }
}

/// 10.0.0.100:80 leads to a backend here, one elsewhere and one that cannot be reached; :81 to nobody.
fn node() -> Fake {
    let flags = FrontendKind::LoadBalancer as u32 | frontend_flags::ROUTABLE;
    let value = |count| {
        let set = SetRef { base: 1, count };
        FrontendValue { flags, service: 5, affinity: 0, external: set, internal: set }
    };
    let wildcard = FrontendKey { port: Be16::new(0), proto: proto::ANY, ..key([10, 0, 0, 100], 0) };
    let ours = FrontendValue { flags: frontend_flags::WILDCARD | frontend_flags::ROUTABLE, ..FrontendValue::default() };
    Fake {
        frontends: [
            (key([10, 0, 0, 100], 80), value(3)),
            (key([10, 0, 0, 100], 81), value(0)),
            (key([0, 0, 0, 0], 30_080), FrontendValue { flags: FrontendKind::NodePort as u32, ..value(1) }),
            (wildcard, ours),
        ]
        .into(),
        slots: vec![0, 1, 2, 3],
        backends: [(1, backend(1, 1, true)), (2, backend(2, 2, false)), (3, backend(3, 9, false))].into(),
        flows: BTreeMap::new(),
        affinity: BTreeMap::new(),
        ingress: Attached::Yes("tcx".into()),
    }
}

fn ask(node: &Fake, src: &str, dst: &str) -> Trace {
    let question = Question { src: src.into(), dst: dst.into(), ..Question::default() };
    let Ok(placed) = place(node, &question.parse().unwrap());
    let (packet, from) = placed.unwrap();
    let Ok(trace) = trace(node, &packet, from);
    trace
}

#[test]
fn every_way_of_a_random_choice_is_told_with_its_chance_and_its_own_end() {
    let trace = ask(&node(), "192.168.1.50:40000", "10.0.0.100:80");
    let told: Vec<String> = trace.steps.iter().map(ToString::to_string).collect();
    assert_eq!(
        told,
        [
            "cil_from_netdev, tcx ingress of eth0",
            "this node answers for 10.0.0.100 on eth0",
            "a new one",
            "10.0.0.100:80/TCP (exact), LoadBalancer of default/web:http, id 5: external traffic, policy Cluster, 3 \
             backends",
            "at random, one of 3",
        ]
    );
    let ends: Vec<String> = trace.ways.iter().map(|way| way.verdict.to_string()).collect();
    assert_eq!(
        ends,
        [
            "becomes 192.168.1.50:40000 -> 10.42.1.1:8080, and the host's stack goes on with it",
            "becomes 192.168.1.10:61000 -> 10.42.2.2:8080, and leaves by eth0",
            "dropped: FIB lookup failed (169)",
        ]
    );
    assert!(trace.ways.iter().all(|way| (way.chance - 1.0 / 3.0).abs() < 1e-9));
}

#[test]
fn a_source_port_is_told_where_the_client_has_one_of_its_own_and_a_range_where_that_is_taken() {
    let remote = |node: &Fake, src: &str| ask(node, src, "10.0.0.100:80").ways.remove(1).verdict.to_string();
    let at = |port: &str| format!("becomes 192.168.1.10:{port} -> 10.42.2.2:8080, and leaves by eth0");
    let mut node = node();
    // One of two, the other for the port beside it, and the same each time.
    let usual: Vec<_> = [40_000, 40_001, 40_000].map(|port| remote(&node, &format!("192.168.1.50:{port}"))).into();
    assert_eq!(usual[0], usual[2]);
    let mut both = usual[..2].to_vec();
    both.sort();
    assert_eq!(both, [at("61000"), at("61001")]);
    let addr = |text: &str| Addr::from(text.parse::<IpAddr>().unwrap());
    // Somebody else had both; such a connection is over, and makes way.
    let other =
        FlowValue { last_seen: NOW, src: addr("10.0.0.100"), dst: addr("192.168.1.99"), ..FlowValue::default() };
    for port in [61_000, 61_001] {
        let key = FlowKey {
            src: addr("10.42.2.2"),
            dst: addr("192.168.1.10"),
            sport: Be16::new(8080),
            dport: Be16::new(port),
            proto: proto::TCP,
            pad: [0; 3],
        };
        node.flows.insert(key, FlowValue { tcp: TCP_SEEN_RST, ..other });
    }
    assert_eq!(remote(&node, "192.168.1.50:40000"), at("61000-61001"));
}

#[test]
fn refusals_name_the_reason_that_metrics_count() {
    let verdict = |src: &str, dst: &str| ask(&node(), src, dst).ways.remove(0).verdict.to_string();
    let told = "dropped: Service backend not found (158); the sender is told: ICMP port unreachable";
    assert_eq!(verdict("192.168.1.50", "10.0.0.100:81"), told);
    assert_eq!(verdict("192.168.1.50", "10.0.0.100:82"), "dropped: Service backend not found (158)");
    assert!(verdict("192.168.1.50", "10.9.9.9:80").starts_with("left as it is"));
    assert!(verdict("host", "10.0.0.100:81").contains("EPERM"));
    let off = Fake { ingress: Attached::No("refused by the verifier".into()), ..node() };
    let trace = ask(&off, "192.168.1.50", "10.0.0.100:80");
    assert!(trace.steps[0].to_string().contains("not attached: refused by the verifier"), "{trace:?}");
    assert!(matches!(trace.ways[0].verdict, Verdict::Pass { .. }));
}

#[test]
fn sockets_reach_node_ports_on_loopback_and_are_bound_by_their_namespace() {
    let mut node = node();
    let trace = ask(&node, "host", "127.0.0.1:30080");
    assert_eq!(trace.ways.len(), 1);
    assert!(
        trace.steps.iter().any(|step| step.to_string().contains("0.0.0.0:30080/TCP (any-local-address), NodePort"))
    );

    let own = ask(&node, "pod", "127.0.0.1:30080");
    assert!(matches!(own.ways[0].verdict, Verdict::Pass { .. }), "a pod's loopback is its own: {own:?}");

    let elsewhere = ask(&node, "pod", "192.168.1.11:30080");
    let text = elsewhere.steps.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n");
    assert!(text.contains("0.0.0.0:30080/TCP (another-node), NodePort"), "{text}");
    assert_eq!(elsewhere.ways.len(), 1);
    let local = node.frontends.get_mut(&key([0, 0, 0, 0], 30080)).unwrap();
    local.flags |= frontend_flags::EXTERNAL_LOCAL;
    let left = ask(&node, "pod", "192.168.1.11:30080");
    assert!(matches!(left.ways[0].verdict, Verdict::Pass { .. }), "its own pods alone may answer: {left:?}");
    assert_eq!(ask(&node, "host", "127.0.0.1:30080").ways.len(), 1, "which is not about loopback");

    let value = node.frontends.get_mut(&key([10, 0, 0, 100], 80)).unwrap();
    value.flags |= frontend_flags::AFFINITY;
    value.affinity = 10;
    let entry = |age: u64| AffinityValue { last_used: NOW - age * 1_000_000_000, backend: 2, position: 1 };
    node.affinity.insert(AffinityKey::of_netns(7, 5), entry(3));
    let bound = ask(&node, "host", "10.0.0.100:80");
    assert_eq!(bound.ways.len(), 1);
    assert_eq!(bound.ways[0].backend.as_ref().unwrap().id, 2);
    assert_eq!(ask(&node, "pod", "10.0.0.100:80").ways.len(), 3, "which namespace is not known");
    node.affinity.insert(AffinityKey::of_netns(7, 5), entry(10));
    assert_eq!(ask(&node, "host", "10.0.0.100:80").ways.len(), 3, "over");
}

#[test]
fn questions_that_make_no_sense_name_the_argument_and_what_to_write() {
    for (question, says) in [
        (["192.168.1", "10.0.0.1:80", "", "", ""], "src \"192.168.1\": write an address with or without port"),
        (["192.168.1.1@", "10.0.0.1:80", "", "", ""], "src \"192.168.1.1@\": no device after @"),
        (["host", "10.0.0.1", "", "", ""], "dst \"10.0.0.1\": no port; add one"),
        (["host", "10.0.0.1:0", "", "", ""], "dst \"10.0.0.1:0\": port 0 is no destination"),
        (["host", "web:80", "", "", ""], "dst \"web:80\": write an address and a port"),
        (["host", "[10.0.0.1", "", "", ""], "dst \"[10.0.0.1\": write an address and a port"),
        (["::1", "10.0.0.1:80", "", "", ""], "src \"::1\": not of the family of dst"),
        (["host", "10.0.0.1:80", "tpc", "", ""], "--proto \"tpc\": there are tcp, udp, sctp and icmp"),
        (["host", "10.0.0.1:80", "", "", "xdp"], "--hook \"xdp\": there are packet and socket"),
        (["1.1.1.1@eth0", "10.0.0.1:80", "", "eth1", ""], "--device \"eth1\": src names another device"),
    ] {
        let [src, dst, proto, device, hook] = question.map(String::from);
        let error = Question { src, dst, proto, device, hook }.parse().unwrap_err().to_string();
        assert!(error.starts_with(says), "{error:?} should begin with {says:?}");
    }
    let question = Question { src: "[fd00::1]:7".into(), dst: "[fd00::2]:80".into(), ..Question::default() };
    let written = question.parse().unwrap();
    assert_eq!((written.sport, written.dport, written.proto), (Some(7), 80, proto::TCP));
}

#[test]
fn a_trace_reads_back_from_json_as_it_was() {
    let trace = ask(&node(), "192.168.1.50", "10.0.0.100:80");
    let text = serde_json::to_string(&trace).unwrap();
    assert!(text.contains(r#""step":"frontend""#) && text.contains(r#""verdict":{"kind":"sent""#), "{text}");
    assert_eq!(serde_json::from_str::<Trace>(&text).unwrap(), trace);
}
