//! Both families on whole nodes: a dual-stack Service whose addresses real agents allocate, answer for and balance, from
//! the LAN, from nodes and from pods; and an IPv6 address that moves.

#![allow(clippy::unwrap_used, reason = "a panic here is a failed test")]

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::process::Command;
use std::time::Duration;

use kinesin::lab::programs::ClientOptions;
use kinesin::lab::{AgentHandle, AgentOptions, HTTP_PORT, Lab, get_from};
use kinesin::net::Netns;
use kinesin_core::ownership::weight;
use serde_json::Value;

/// Longer than anything takes on a busy machine.
const LIMIT: Duration = Duration::from_secs(60);
const NODE_PORT: u16 = 30_080;

const VIP: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 100);
const VIP6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x10, 0, 0, 0, 0, 0, 0x100);
const CLIENT6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x10, 0, 0, 0, 0, 0, 0x50);
const CLUSTER_IP6: &str = "fd00:43::10";

fn node6(number: u16) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 0x10, 0, 0, 0, 0, 0, 0x10 + number)
}

fn pod6(number: u16) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 0x42, number, 0, 0, 0, 0, 1)
}

/// Runs iproute2 in a namespace.
fn ip(netns: &Netns, lines: &[String]) {
    netns
        .run(|| {
            for line in lines {
                let output = Command::new("ip").args(line.split_whitespace()).output().expect("iproute2 is installed");
                let said = String::from_utf8_lossy(&output.stderr);
                assert!(output.status.success(), "ip {line} on {}: {said}", netns.name());
            }
        })
        .unwrap();
}

/// Gives every host of a lab with one pod per node addresses and routes of IPv6 beside those that it has.
fn add_ipv6(lab: &Lab) {
    let address = |address: Ipv6Addr| format!("addr add {address}/64 dev eth0 nodad");
    ip(lab.client().netns(), &[address(CLIENT6)]);
    for node in lab.nodes() {
        let number = node.number() as u16;
        let gateway = format!("fd00:42:{number}::ff");
        let mut lines = vec![address(node6(number)), format!("addr add {gateway}/64 dev veth-pod-{number}-1 nodad")];
        let others = (1..=lab.nodes().len() as u16).filter(|other| *other != number);
        lines.extend(others.map(|other| format!("route add fd00:42:{other}::/64 via {}", node6(other))));
        ip(node.netns(), &lines);
        node.netns().run(|| std::fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1").unwrap()).unwrap();
        ip(node.pod(1).netns(), &[address(pod6(number)), format!("route add default via {gateway}")]);
    }
}

fn manifests(lab: &Lab) -> String {
    let mut text = format!(
        "\
apiVersion: cilium.io/v2alpha1
kind: CiliumLoadBalancerIPPool
metadata: {{name: both}}
spec:
  blocks:
    - {{start: {VIP}, stop: 10.0.0.120}}
    - {{start: '{VIP6}', stop: 'fd00:10::1ff'}}
---
apiVersion: cilium.io/v2alpha1
kind: CiliumL2AnnouncementPolicy
metadata: {{name: all}}
spec: {{externalIPs: true, loadBalancerIPs: true}}
---
apiVersion: v1
kind: Service
metadata: {{name: web, namespace: default}}
spec:
  type: LoadBalancer
  clusterIP: 10.43.0.10
  clusterIPs: [10.43.0.10, '{CLUSTER_IP6}']
  ipFamilies: [IPv4, IPv6]
  ipFamilyPolicy: RequireDualStack
  selector: {{app: web}}
  ports: [{{name: http, port: 80, targetPort: {HTTP_PORT}, nodePort: {NODE_PORT}}}]
"
    );
    for node in lab.nodes() {
        let (name, number) = (node.name(), node.number() as u16);
        text += &format!(
            "\
---
apiVersion: v1
kind: Node
metadata: {{name: {name}, labels: {{kubernetes.io/hostname: {name}}}}}
status:
  addresses:
    - {{type: InternalIP, address: {}}}
    - {{type: InternalIP, address: '{}'}}
",
            node.address(),
            node6(number)
        );
    }
    for (family, six) in [("IPv4", false), ("IPv6", true)] {
        text += &format!(
            "\
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: web-{}, namespace: default, labels: {{kubernetes.io/service-name: web}}}}
addressType: {family}
ports: [{{name: http, protocol: TCP, port: {HTTP_PORT}}}]
endpoints:
",
            family.to_lowercase()
        );
        for pod in lab.pods() {
            let number = if pod.node() == "node-1" { 1 } else { 2 };
            let address = if six { IpAddr::from(pod6(number)) } else { pod.address().into() };
            text +=
                &format!("  - {{addresses: ['{address}'], nodeName: {}, conditions: {{ready: true}}}}\n", pod.node());
        }
    }
    text
}

fn url(address: impl Into<IpAddr>, port: u16) -> String {
    format!("http://{}/", SocketAddr::new(address.into(), port))
}

async fn eventually(what: &str, agents: &[AgentHandle], mut condition: impl AsyncFnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + LIMIT;
    while !condition().await {
        let words: Vec<String> = agents.iter().map(|agent| agent.logs(40)).collect();
        assert!(tokio::time::Instant::now() < deadline, "not within {LIMIT:?}: {what}\n{}", words.join("\n----\n"));
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn json(agent: &AgentHandle, path: &str) -> Value {
    match agent.get(path).await {
        Ok((200, body)) => serde_json::from_str(&body).unwrap_or_default(),
        _ => Value::Null,
    }
}

/// The number of the node that announces an address.
async fn owner(agents: &[AgentHandle], address: IpAddr) -> Option<usize> {
    for (index, agent) in agents.iter().enumerate() {
        let vips = json(agent, "/v1/vips").await;
        let address = address.to_string();
        let announces = |vip: &Value| vip["address"] == address.as_str() && vip["state"] == "announcing";
        if vips.as_array().is_some_and(|vips| vips.iter().any(announces)) {
            return Some(index + 1);
        }
    }
    None
}

/// The pods serve, and the agents are ready.
async fn started(lab: &Lab) -> Vec<AgentHandle> {
    let options = AgentOptions::on_manifests(lab).config("enable-ipv6", "true").config("bpf-lb-mode", "snat");
    let agents: Vec<_> = lab.nodes().iter().map(|node| node.start_agent(&options).unwrap()).collect();
    for pod in lab.pods() {
        pod.serve().await.unwrap();
    }
    for agent in &agents {
        agent.wait_ready(LIMIT).await.unwrap();
    }
    agents
}

/// Two nodes with an agent and a pod each, which all serve both families.
async fn dual_stack(name: &str) -> (Lab, Vec<AgentHandle>) {
    let builder = Lab::builder(name).binary(env!("CARGO_BIN_EXE_kinesin"));
    let lab = builder.nodes(2).pods_per_node(1).build().await.unwrap();
    add_ipv6(&lab);
    std::fs::write(lab.manifests_dir().join("all.yaml"), manifests(&lab)).unwrap();
    let agents = started(&lab).await;
    for vip in [IpAddr::from(VIP), VIP6.into()] {
        eventually(&format!("{vip} is announced"), &agents, async || owner(&agents, vip).await.is_some()).await;
        // The first answer takes the first solicitation and the last map entry.
        let asked = url(vip, 80);
        eventually(&format!("{vip} serves"), &agents, async || lab.client().get(&asked).await.is_ok()).await;
    }
    (lab, agents)
}

#[tokio::test]
async fn a_dual_stack_service_is_reached_by_both_families_from_everywhere() {
    let (lab, agents) = dual_stack("dual").await;
    eventually("the status names both families and no problem", &agents, async || {
        let status = json(&agents[0], "/v1/status").await;
        status["families"] == serde_json::json!(["IPv4", "IPv6"]) && status["problems"] == serde_json::json!([])
    })
    .await;

    for (vip, client, node_address) in [
        (IpAddr::from(VIP), IpAddr::from(lab.client().address()), lab.node(1).address().into()),
        (VIP6.into(), CLIENT6.into(), IpAddr::from(node6(1))),
    ] {
        let entry = owner(&agents, vip).await.expect("it is announced");
        let entry_address =
            if vip.is_ipv4() { lab.node(entry).address().into() } else { IpAddr::from(node6(entry as u16)) };
        let mut pods = BTreeSet::new();
        for _ in 0..40 {
            let backend = lab.client().get(&url(vip, 80)).await.unwrap().backend.expect("a pod's answer");
            // A backend on the entry node sees the client, another one the entry node.
            let local = backend.node == lab.node(entry).name();
            assert_eq!(backend.client.ip(), if local { client } else { entry_address }, "{vip} at {}", backend.pod);
            pods.insert(backend.pod);
        }
        assert_eq!(pods.len(), 2, "{vip} is balanced: {pods:?}");
        lab.client().get(&url(node_address, NODE_PORT)).await.unwrap();
    }
    // The owner's answer is what the client believes.
    let entry = owner(&agents, VIP6.into()).await.expect("it is announced");
    let mac = lab.node(entry).mac().await.unwrap();
    assert_eq!(lab.client().mac_of(VIP6.into()).await.unwrap(), Some(mac));
    // Where those are heard who ask.
    let groups =
        lab.node(entry).netns().run(|| std::fs::read_to_string("/proc/thread-self/net/igmp6").unwrap()).unwrap();
    assert!(
        groups.lines().any(|line| line.contains("eth0") && line.contains("ff0200000000000000000001ff000100")),
        "{groups}"
    );

    // Sockets of nodes and pods, to ClusterIP and NodePort, loopback included.
    let cluster_ip: IpAddr = CLUSTER_IP6.parse().unwrap();
    let from_node =
        [(cluster_ip, 80), (VIP6.into(), 80), (node6(2).into(), NODE_PORT), (Ipv6Addr::LOCALHOST.into(), NODE_PORT)];
    for (to, port) in from_node {
        let options = ClientOptions::new(url(to, port)).timeout(LIMIT).duration(Duration::from_millis(300));
        let totals = lab.node(1).load(&options).unwrap().summary(LIMIT).await.unwrap();
        assert!(totals.succeeded > 0 && totals.failed == 0, "node to {to} port {port}: {totals:?}");
        if !to.is_loopback() {
            let totals = lab.pod(1, 1).load(&options).unwrap().summary(LIMIT).await.unwrap();
            assert!(totals.succeeded > 0 && totals.failed == 0, "pod to {to} port {port}: {totals:?}");
        }
    }

    // Without IPv6, its programs go and IPv4 stays.
    for node in lab.nodes() {
        node.set_config("enable-ipv6", "false").unwrap();
    }
    eventually("only IPv4 is served", &agents, async || {
        let status = json(&agents[0], "/v1/status").await;
        let hooks = status["hooks"].as_array().cloned().unwrap_or_default();
        let six = hooks.iter().any(|hook| hook["program"].as_str().is_some_and(|name| name.ends_with("netdev6")));
        status["families"] == serde_json::json!(["IPv4"]) && !hooks.is_empty() && !six
    })
    .await;
    eventually("IPv4 goes on", &agents, async || lab.client().get(&url(VIP, 80)).await.is_ok()).await;
    assert!(get_from(lab.client().netns(), &url(VIP6, 80), Duration::from_millis(500)).await.is_err());
}

#[tokio::test]
async fn an_ipv6_address_moves_with_its_owner_and_neighbours_hear_of_it() {
    let (lab, agents) = dual_stack("moves").await;
    let old = owner(&agents, VIP6.into()).await.expect("it is announced");
    let new = 3 - old;
    let mac = lab.node(new).mac().await.unwrap();
    assert_ne!(lab.client().mac_of(VIP6.into()).await.unwrap(), Some(mac));
    lab.node(old).power_off().await.unwrap();
    // Nobody asks meanwhile: the client learns the new MAC by the unsolicited advertisement alone.
    eventually("the client's neighbour table follows", &agents, async || {
        lab.client().mac_of(VIP6.into()).await.unwrap() == Some(mac)
    })
    .await;
    let pod = lab.pod(new, 1);
    eventually("the new owner serves", &agents, async || {
        let answer = lab.client().get(&url(VIP6, 80)).await;
        answer.is_ok_and(|answer| answer.backend.is_some_and(|backend| backend.pod == pod.name()))
    })
    .await;
}

/// Which node answers for each of these addresses, by its number.
async fn owners(agents: &[AgentHandle], addresses: &[IpAddr]) -> Vec<Option<usize>> {
    let mut owners = Vec::new();
    for address in addresses {
        owners.push(owner(agents, *address).await);
    }
    owners
}

#[tokio::test]
async fn addresses_of_ipv6_go_to_nodes_that_have_ipv6() {
    let builder = Lab::builder("families").binary(env!("CARGO_BIN_EXE_kinesin"));
    let lab = builder.nodes(2).pods_per_node(1).build().await.unwrap();
    add_ipv6(&lab);
    // A node of a network of IPv4 only, as most are: what IPv6 it has is link-local.
    let address_of = |number: u16| format!("{}/64 dev eth0", node6(number));
    ip(lab.node(2).netns(), &[format!("addr del {}", address_of(2))]);
    let addresses: Vec<IpAddr> =
        (0..8u16).map(|n| Ipv6Addr::new(0xfd00, 0x10, 0, 0, 0, 0, 0, 0x200 + n).into()).collect();
    let by_weight = |address: &&IpAddr| weight(**address, "node-2") > weight(**address, "node-1");
    assert!(addresses.iter().any(|address| by_weight(&address)), "asked by weight alone, node-2 would have some");
    let list: Vec<_> = addresses.iter().map(|address| format!("'{address}'")).collect();
    let text = manifests(&lab)
        .replace("  ipFamilyPolicy:", &format!("  externalIPs: [{}]\n  ipFamilyPolicy:", list.join(",")));
    std::fs::write(lab.manifests_dir().join("all.yaml"), text).unwrap();
    let agents = started(&lab).await;
    let all_at = |number: usize| vec![Some(number); addresses.len()];
    eventually("node-1 has all of them", &agents, async || owners(&agents, &addresses).await == all_at(1)).await;
    for address in &addresses {
        let asked = url(*address, 80);
        eventually(&format!("{address} serves"), &agents, async || lab.client().get(&asked).await.is_ok()).await;
    }
    eventually("IPv4 has an owner", &agents, async || owner(&agents, VIP.into()).await.is_some()).await;

    // It goes the other way round when the network does.
    ip(lab.node(2).netns(), &[format!("addr add {} nodad", address_of(2))]);
    ip(lab.node(1).netns(), &[format!("addr del {}", address_of(1))]);
    eventually("node-2 has all of them", &agents, async || owners(&agents, &addresses).await == all_at(2)).await;
    let pod = lab.pod(2, 1);
    eventually("and serves", &agents, async || {
        let answer = lab.client().get(&url(addresses[0], 80)).await;
        answer.is_ok_and(|answer| answer.backend.is_some_and(|backend| backend.pod == pod.name()))
    })
    .await;

    // Where the agent does not serve IPv6, it is asked for nothing of it.
    ip(lab.node(1).netns(), &[format!("addr add {} nodad", address_of(1))]);
    lab.node(2).set_config("enable-ipv6", "false").unwrap();
    eventually("node-1 has all of them again", &agents, async || owners(&agents, &addresses).await == all_at(1)).await;
}
