//! As whom a client arrives at pods on other nodes, with agents on every node and real sockets at both ends. Needs root
//! and iproute2.

#![allow(clippy::unwrap_used, reason = "a panic here is a failed test")]

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::process::Command;
use std::time::Duration;

use kinesin::admin::views::{KprView, StatusView};
use kinesin::lab::{AgentHandle, AgentOptions, CLIENT_ADDRESS, HTTP_PORT, Lab, LabBuilder, get_from, manifests};
use kinesin::net::Netns;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

#[path = "forwarding/acceleration.rs"]
mod acceleration;
#[path = "support/snmp.rs"]
mod snmp;
#[path = "forwarding/straight.rs"]
mod straight;

/// Agents start and elect within it on a busy machine.
const LIMIT: Duration = Duration::from_secs(60);
const VIP: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 150);
/// Long, so that an agent that a busy machine keeps waiting loses no address.
const LEASE: &str = "l2-announcements-lease-duration";
const UDP_PORT: u16 = 9999;
const NODE_PORT: u16 = 30_080;

/// Three nodes with a pod each, agents on all of them, and a service whose address one of them has.
struct Rig {
    agents: Vec<Option<AgentHandle>>,
    lab: Lab,
}

/// `service` is what differs from one test to another, below `spec`.
async fn rig(name: &str, config: &[(&str, &str)], service: &str) -> Rig {
    rig_of(Lab::builder(name), config, service).await
}

async fn rig_of(builder: LabBuilder, config: &[(&str, &str)], service: &str) -> Rig {
    let lab = builder.binary(env!("CARGO_BIN_EXE_kinesin")).nodes(3).pods_per_node(1).build().await.unwrap();
    manifests::write_all(&lab).unwrap();
    std::fs::remove_file(lab.manifests_dir().join("service.yaml")).unwrap();
    write_service(&lab, service);
    for pod in lab.pods() {
        pod.serve().await.unwrap();
    }
    let mut options = AgentOptions::on_manifests(&lab).config("map-verify-interval", "1s").config(LEASE, "900s");
    for (key, value) in config {
        options = options.config(key, value);
    }
    let agents = lab.nodes().iter().map(|node| Some(node.start_agent(&options).unwrap())).collect();
    let rig = Rig { agents, lab };
    for agent in rig.agents.iter().flatten() {
        agent.wait_ready(LIMIT).await.unwrap();
    }
    rig
}

fn write_service(lab: &Lab, more: &str) {
    let endpoints: String = lab
        .pods()
        .iter()
        .map(|pod| format!("  - addresses: [{}]\n    nodeName: {}\n", pod.address(), pod.node()))
        .collect();
    let text = format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: seen, namespace: default}}\nspec:\n  type: LoadBalancer\n  \
         loadBalancerIP: {VIP}\n  clusterIP: 10.43.0.20\n  ports:\n    - {{name: http, port: 80, nodePort: {NODE_PORT}}}\n    \
         - {{name: udp, port: {UDP_PORT}, protocol: UDP, nodePort: {UDP_NODE_PORT}}}\n    - {{name: echo, port: {ECHO}}}\n\
         {more}---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: seen-1, namespace: default, \
         labels: {{kubernetes.io/service-name: seen}}}}\naddressType: IPv4\nports:\n  - {{name: http, port: {HTTP_PORT}}}\n  \
         - {{name: udp, port: {UDP_PORT}, protocol: UDP}}\n  - {{name: echo, port: {ECHO}}}\nendpoints:\n{endpoints}"
    );
    let path = lab.manifests_dir().join("seen.yaml");
    let early = lab.manifests_dir().join(".seen.yaml.new");
    std::fs::write(&early, text).unwrap();
    std::fs::rename(early, path).unwrap();
}

const UDP_NODE_PORT: u16 = 30_099;
const ECHO: u16 = kinesin::lab::ECHO_PORT;

impl Rig {
    fn agent(&self, number: usize) -> &AgentHandle {
        self.agents[number - 1].as_ref().unwrap()
    }

    async fn status(&self, number: usize) -> Option<StatusView> {
        let (code, body) = self.agent(number).get("/v1/status").await.ok()?;
        (code == 200).then(|| serde_json::from_str(&body).unwrap())
    }

    /// The node that answers for the address.
    async fn owner(&self) -> usize {
        let mut owner = 0;
        eventually("one node answers for the address", async || {
            let macs = self.lab.client().arp_probe(VIP).await.unwrap();
            owner = 0;
            for node in self.lab.nodes() {
                if macs == [node.mac().await.unwrap()] {
                    owner = node.number();
                }
            }
            owner != 0
        })
        .await;
        owner
    }

    /// How node `from` says that packets get to backends on node `to`.
    async fn way(&self, from: usize, to: usize) -> String {
        let status = self.status(from).await;
        let members = status.iter().flat_map(|status| &status.members);
        let name = format!("node-{to}");
        members.filter(|m| m.node == name).map(|m| m.forwarding.clone()).next().unwrap_or_default()
    }

    /// Waits until a node reaches others in this way.
    async fn wait_for_ways(&self, from: usize, ways: &[(usize, &str)]) {
        eventually(&format!("node {from} says {ways:?}"), async || {
            for (to, way) in ways {
                if !self.way(from, *to).await.starts_with(way) {
                    return false;
                }
            }
            true
        })
        .await;
    }

    /// Waits until a node says so of one of kube-proxy's duties.
    async fn wait_for_duty(&self, number: usize, says: &str, duty: impl Fn(KprView) -> String) {
        eventually(&format!("node {number} says {says:?}"), async || {
            self.status(number).await.is_some_and(|status| duty(status.kube_proxy_replacement) == says)
        })
        .await;
    }

    async fn all_neighbours(&self, from: usize) {
        let others: Vec<(usize, &str)> = (1..=3).filter(|to| *to != from).map(|to| (to, "l2")).collect();
        self.wait_for_ways(from, &others).await;
    }

    /// Requests until each of these nodes' pods has answered a few times; as whom the client arrived, by node.
    async fn seen(&self, from: &Netns, url: &str, nodes: &[usize]) -> BTreeMap<usize, Vec<IpAddr>> {
        let mut seen: BTreeMap<usize, Vec<IpAddr>> = BTreeMap::new();
        eventually(&format!("answers of {nodes:?} at {url}"), async || {
            let answer = get_from(from, url, Duration::from_secs(5)).await;
            let backend = answer.unwrap().backend.expect("a pod's answer");
            let number = backend.node.trim_start_matches("node-").parse().unwrap();
            seen.entry(number).or_default().push(backend.client.ip());
            nodes.iter().all(|node| seen.get(node).is_some_and(|clients| clients.len() >= 3))
        })
        .await;
        seen
    }

    fn node_address(&self, number: usize) -> IpAddr {
        self.lab.node(number).address().into()
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for node in self.lab.nodes() {
                eprintln!("--- {}\n{}", node.name(), kinesin::net::proc::tail(&node.log("agent"), 40));
            }
        }
    }
}

/// Waits until a condition holds.
async fn eventually(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + LIMIT;
    while !condition().await {
        assert!(tokio::time::Instant::now() < deadline, "not within {LIMIT:?}: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn vip_url() -> String {
    format!("http://{VIP}/")
}

fn client() -> IpAddr {
    CLIENT_ADDRESS.into()
}

/// Everybody saw the same address.
#[track_caller]
fn assert_seen(seen: &BTreeMap<usize, Vec<IpAddr>>, node: usize, as_whom: IpAddr) {
    assert!(seen[&node].iter().all(|ip| *ip == as_whom), "node {node} should have seen {as_whom}: {seen:?}");
}

#[tokio::test]
async fn by_default_a_client_keeps_its_address_to_pods_of_all_nodes_on_its_segment() {
    let rig = rig("as-it-is", &[], "").await;
    let owner = rig.owner().await;
    rig.all_neighbours(owner).await;
    let status = rig.status(owner).await.unwrap();
    assert_eq!(status.kube_proxy_replacement.mode, "Auto (L2 to 2 of 2 other nodes, else SNAT)");
    assert_eq!(status.problems, Vec::<String>::new());
    let lan = rig.lab.client().netns();

    let seen = rig.seen(lan, &vip_url(), &[1, 2, 3]).await;
    (1..=3).for_each(|node| assert_seen(&seen, node, client()));

    // NodePorts, at every node.
    for number in 1..=3 {
        rig.all_neighbours(number).await;
        let url = format!("http://{}:{NODE_PORT}/", rig.lab.node(number).address());
        let seen = rig.seen(lan, &url, &[1, 2, 3]).await;
        (1..=3).for_each(|node| assert_seen(&seen, node, client()));
    }

    // Datagrams, whose sender the pods are asked for.
    for to in [SocketAddr::from((VIP, UDP_PORT)), SocketAddr::from((rig.lab.node(1).address(), UDP_NODE_PORT))] {
        let pods: Vec<UdpSocket> = rig.lab.pods().iter().map(|pod| udp(pod.netns(), UDP_PORT)).collect();
        let mut arrived = [0; 3];
        while arrived.contains(&0) {
            let socket = udp(lan, 0);
            socket.send_to(b"who am I", to).unwrap();
            let mut bytes = [0; 16];
            let from = wait_for_datagram(&pods, &mut arrived);
            assert_eq!(from.1.ip(), client());
            // The answer comes from where the client sent to.
            pods[from.0].send_to(b"you", from.1).unwrap();
            assert_eq!(socket.recv_from(&mut bytes).unwrap(), (3, to));
        }
    }

    // Clients on another node whose sockets are not translated (they are in no cgroup of it), and a pod of it: they keep
    // their address, but to pods of their own node, where it would come back as a stranger's.
    let other = (1..=3).find(|node| *node != owner).unwrap();
    let pod = rig.lab.pod(other, 1);
    for (from, own) in [(rig.lab.node(other).netns(), rig.node_address(other)), (pod.netns(), pod.address().into())] {
        let seen = rig.seen(from, &vip_url(), &[1, 2, 3]).await;
        for node in 1..=3 {
            assert_seen(&seen, node, if node == other { rig.node_address(owner) } else { own });
        }
    }
}

fn udp(netns: &Netns, port: u16) -> UdpSocket {
    let socket = netns.run(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port)).unwrap()).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    socket
}

/// Which pod got a datagram, and from whom.
fn wait_for_datagram(pods: &[UdpSocket], arrived: &mut [usize]) -> (usize, SocketAddr) {
    let deadline = std::time::Instant::now() + LIMIT;
    pods.iter().for_each(|pod| pod.set_nonblocking(true).unwrap());
    loop {
        assert!(std::time::Instant::now() < deadline, "no pod got the datagram");
        for (index, pod) in pods.iter().enumerate() {
            if let Ok((_, from)) = pod.recv_from(&mut [0; 16]) {
                arrived[index] += 1;
                return (index, from);
            }
        }
        std::thread::yield_now();
    }
}

/// A connection to the echo port of some pod.
async fn echo_stream(rig: &Rig) -> tokio::net::TcpStream {
    let socket = rig.lab.client().netns().run(|| tokio::net::TcpSocket::new_v4().unwrap()).unwrap();
    socket.connect((VIP, ECHO).into()).await.unwrap()
}

async fn assert_echoes(stream: &mut tokio::net::TcpStream) {
    stream.write_all(b"are you there").await.unwrap();
    let mut bytes = [0; 13];
    tokio::time::timeout(LIMIT, stream.read_exact(&mut bytes)).await.expect("in time").unwrap();
    assert_eq!(&bytes, b"are you there");
}

#[tokio::test]
async fn a_changed_mode_holds_for_new_connections_and_lets_old_ones_be() {
    let rig = rig("turned", &[], "").await;
    let owner = rig.owner().await;
    rig.all_neighbours(owner).await;
    let lan = rig.lab.client().netns();
    let mut streams = Vec::new();
    for _ in 0..12 {
        streams.push(echo_stream(&rig).await);
    }
    for (mode, name) in [("snat", "SNAT"), ("auto", "Auto")] {
        for node in rig.lab.nodes() {
            node.set_config("bpf-lb-mode", mode).unwrap();
        }
        eventually(&format!("mode {name}"), async || {
            rig.status(owner).await.is_some_and(|status| status.kube_proxy_replacement.mode.starts_with(name))
        })
        .await;
        let others = (1..=3).filter(|node| *node != owner);
        for other in others {
            let expected = if mode == "snat" { rig.node_address(owner) } else { client() };
            eventually(&format!("{mode} to node {other}"), async || {
                let seen = rig.seen(lan, &vip_url(), &[1, 2, 3]).await;
                seen[&other].last() == Some(&expected)
            })
            .await;
        }
        for stream in &mut streams {
            assert_echoes(stream).await;
        }
    }
}

#[tokio::test]
async fn a_node_that_is_no_longer_a_neighbour_gets_new_connections_by_snat_and_says_why() {
    let mut rig = rig("fallback", &[("enable-l2-announcements", "true"), (LEASE, "15s")], "").await;
    let owner = rig.owner().await;
    rig.all_neighbours(owner).await;
    let other = (1..=3).find(|node| *node != owner).unwrap();
    let lan = rig.lab.client().netns().clone();
    let ip = |rig: &Rig, arguments: &str| {
        let mut command = Command::new("ip");
        command.args(arguments.split_whitespace());
        let status = rig.lab.node(other).netns().run(|| command.status().unwrap()).unwrap();
        assert!(status.success());
    };

    // A shorter MTU, and back.
    ip(&rig, "link set eth0 mtu 1400");
    rig.wait_for_ways(owner, &[(other, "snat: its MTU is 1400, this node's 1500")]).await;
    let seen = rig.seen(&lan, &vip_url(), &[other]).await;
    assert_seen(&seen, other, rig.node_address(owner));
    ip(&rig, "link set eth0 mtu 1500");
    rig.wait_for_ways(owner, &[(other, "l2")]).await;
    let seen = rig.seen(&lan, &vip_url(), &[other]).await;
    assert_seen(&seen, other, client());

    // An agent that dies: its programs go on, so its pods are still served, but it is trusted with nothing new. It has
    // no address that others could miss.
    rig.agents[other - 1].take().unwrap().kill9();
    eventually("it is no member any more", async || {
        rig.status(owner).await.is_some_and(|status| status.members.len() == 2)
    })
    .await;
    eventually("new connections go by snat", async || {
        let seen = rig.seen(&lan, &vip_url(), &[other]).await;
        seen[&other].last() == Some(&rig.node_address(owner))
    })
    .await;
    let (_, metrics) = rig.agent(owner).get("/metrics").await.unwrap();
    assert!(metrics.contains("kinesin_peers{state=\"neighbour\"} 1"), "{metrics}");
}

#[tokio::test]
async fn affinity_holds_across_nodes_and_local_policy_keeps_to_its_node() {
    let rig = rig("bound", &[], "  sessionAffinity: ClientIP\n").await;
    let owner = rig.owner().await;
    rig.all_neighbours(owner).await;
    let lan = rig.lab.client().netns();
    let mut pods = BTreeMap::<String, usize>::new();
    for _ in 0..20 {
        let backend = get_from(lan, &vip_url(), Duration::from_secs(5)).await.unwrap().backend.unwrap();
        assert_eq!(backend.client.ip(), client());
        *pods.entry(backend.pod).or_default() += 1;
    }
    assert_eq!(pods.len(), 1, "one client, one pod: {pods:?}");

    write_service(&rig.lab, "  externalTrafficPolicy: Local\n");
    eventually("only pods of the owner answer", async || {
        let owner = rig.owner().await;
        let mut nodes = std::collections::BTreeSet::new();
        for _ in 0..10 {
            match get_from(lan, &vip_url(), Duration::from_secs(1)).await {
                Ok(answer) => {
                    let backend = answer.backend.unwrap();
                    assert_eq!(backend.client.ip(), client());
                    nodes.insert(backend.node);
                }
                // It changes hands.
                Err(_) => return false,
            }
        }
        nodes == std::collections::BTreeSet::from([format!("node-{owner}")])
    })
    .await;
}
