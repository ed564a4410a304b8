//! Nodes on two segments with a router between them: as whom clients arrive at pods across it, by each dispatch, with agents
//! on every node and real sockets at both ends. Needs root and iproute2.

#![allow(clippy::unwrap_used, reason = "a panic here is a failed test")]

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::process::Command;
use std::time::Duration;

use kinesin::admin::views::StatusView;
use kinesin::lab::{
    AgentHandle, AgentOptions, CLIENT_ADDRESS, CLIENT_ADDRESS6, ECHO_PORT, HTTP_PORT, Lab, get_from, manifests,
};
use kinesin::net::Netns;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Agents start and settle within it on a busy machine.
const LIMIT: Duration = Duration::from_secs(60);
const VIP: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 150);
const VIP6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x10, 0, 0, 0, 0, 0, 0x150);
const NODE_PORT: u16 = 30_080;

/// Three nodes with a pod each: node 1, where packets come in, and node 3 on the client's segment, node 2 beyond the router.
struct Rig {
    agents: Vec<AgentHandle>,
    lab: Lab,
}

async fn rig(name: &str, config: &[(&str, &str)], annotations: &str) -> Rig {
    let builder = Lab::builder(name).binary(env!("CARGO_BIN_EXE_kinesin")).dual_stack().segments(2);
    let lab = builder.nodes(3).pods_per_node(1).build().await.unwrap();
    manifests::write_all(&lab).unwrap();
    // The addresses are routed to node 1, and nobody's on the LAN.
    for file in ["pool-and-policy.yaml", "service.yaml", "endpoints.yaml", "nodes.yaml"] {
        std::fs::remove_file(lab.manifests_dir().join(file)).unwrap();
    }
    write(&lab, annotations);
    let entry = lab.node(1);
    ip(lab.client().netns(), &format!("route add {VIP}/32 via {}", entry.address()));
    ip(lab.client().netns(), &format!("route add {VIP6}/128 via {}", entry.address6().unwrap()));
    for pod in lab.pods() {
        pod.serve().await.unwrap();
    }
    // A lease so long that an agent that a busy machine keeps waiting stays a member.
    let mut options = AgentOptions::on_manifests(&lab)
        .config("enable-ipv6", "true")
        .config("l2-announcements-lease-duration", "900s");
    for (key, value) in config {
        options = options.config(key, value);
    }
    let agents: Vec<_> = lab.nodes().iter().map(|node| node.start_agent(&options).unwrap()).collect();
    for agent in &agents {
        agent.wait_ready(LIMIT).await.unwrap();
    }
    Rig { agents, lab }
}

fn write(lab: &Lab, annotations: &str) {
    let mut text = format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: seen, namespace: default, annotations: {{{annotations}}}}}\n\
         spec:\n  type: NodePort\n  clusterIP: 10.43.0.20\n  clusterIPs: [10.43.0.20, 'fd00:43::20']\n  \
         ipFamilies: [IPv4, IPv6]\n  ipFamilyPolicy: RequireDualStack\n  externalIPs: [{VIP}, '{VIP6}']\n  ports:\n    \
         - {{name: http, port: 80, nodePort: {NODE_PORT}}}\n    - {{name: echo, port: {ECHO_PORT}}}\n    \
         - {{name: udp, port: {ECHO_PORT}, protocol: UDP}}\n"
    );
    for node in lab.nodes() {
        let (name, v4, v6) = (node.name(), node.address(), node.address6().unwrap());
        text += &format!(
            "---\napiVersion: v1\nkind: Node\nmetadata: {{name: {name}}}\nstatus:\n  addresses:\n    \
             - {{type: InternalIP, address: {v4}}}\n    - {{type: InternalIP, address: '{v6}'}}\n"
        );
    }
    for family in ["IPv4", "IPv6"] {
        text += &format!(
            "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: seen-{}, namespace: default, \
             labels: {{kubernetes.io/service-name: seen}}}}\naddressType: {family}\nports:\n  \
             - {{name: http, port: {HTTP_PORT}}}\n  - {{name: echo, port: {ECHO_PORT}}}\n  \
             - {{name: udp, port: {ECHO_PORT}, protocol: UDP}}\nendpoints:\n",
            family.to_lowercase()
        );
        for pod in lab.pods() {
            let address = match family {
                "IPv4" => pod.address().to_string(),
                _ => format!("fd00:42:{}::1", pod.node().trim_start_matches("node-")),
            };
            text += &format!("  - {{addresses: ['{address}'], nodeName: {}}}\n", pod.node());
        }
    }
    let early = lab.manifests_dir().join(".seen.yaml.new");
    std::fs::write(&early, text).unwrap();
    std::fs::rename(early, lab.manifests_dir().join("seen.yaml")).unwrap();
}

/// Runs iproute2 in a namespace.
fn ip(netns: &Netns, arguments: &str) {
    let mut command = Command::new("ip");
    command.args(arguments.split_whitespace());
    let status = netns.run(|| command.status().unwrap()).unwrap();
    assert!(status.success(), "ip {arguments}");
}

async fn eventually(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + LIMIT;
    while !condition().await {
        assert!(tokio::time::Instant::now() < deadline, "not within {LIMIT:?}: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

impl Rig {
    async fn status(&self, number: usize) -> Option<StatusView> {
        let (code, body) = self.agents[number - 1].get("/v1/status").await.ok()?;
        (code == 200).then(|| serde_json::from_str(&body).unwrap())
    }

    /// How node `from` says that packets get to backends on node `to`.
    async fn way(&self, from: usize, to: usize) -> String {
        let status = self.status(from).await;
        let members = status.iter().flat_map(|status| &status.members);
        let name = format!("node-{to}");
        members.filter(|m| m.node == name).map(|m| m.forwarding.clone()).next().unwrap_or_default()
    }

    async fn wait_for_ways(&self, near: &str, far: &str) {
        eventually(&format!("node 1 says {far} to node 2 and {near} to node 3"), async || {
            self.way(1, 2).await.starts_with(far) && self.way(1, 3).await.starts_with(near)
        })
        .await;
        // The others know whom packets come from; the services are in the maps of all.
        for number in 1..=3 {
            eventually(&format!("node {number} knows the others and the service"), async || {
                let table = async |path: &str| self.agents[number - 1].get(path).await.map(|(_, body)| body);
                let (Ok(peers), Ok(services)) = (table("/v1/tables/peers").await, table("/v1/services").await) else {
                    return false;
                };
                peers.matches("\"wrapped by").count() >= 4 && services.contains(&VIP6.to_string())
            })
            .await;
        }
    }

    /// As whom clients arrive by TCP at each node's pod, once each has answered.
    async fn seen(&self, to: SocketAddr) -> BTreeMap<usize, IpAddr> {
        let mut seen = BTreeMap::new();
        let url = format!("http://{to}/");
        eventually(&format!("answers of all nodes at {url}"), async || {
            let answer = get_from(self.lab.client().netns(), &url, Duration::from_secs(5)).await;
            let backend = answer.unwrap().backend.expect("a pod's answer");
            let number = backend.node.trim_start_matches("node-").parse().unwrap();
            let before = seen.insert(number, backend.client.ip());
            assert!(before.is_none_or(|before| before == backend.client.ip()), "{before:?}, {backend:?}");
            seen.len() == 3
        })
        .await;
        seen
    }

    /// The same by UDP, each time from a new port.
    fn seen_by_datagram(&self, to: SocketAddr) -> BTreeMap<usize, IpAddr> {
        let mut seen = BTreeMap::new();
        let deadline = std::time::Instant::now() + LIMIT;
        while seen.len() < 3 {
            assert!(std::time::Instant::now() < deadline, "not all pods answer at {to}: {seen:?}");
            let socket = self.socket(to);
            socket.send_to(kinesin::lab::programs::WHO, to).unwrap();
            let mut bytes = [0; 512];
            let (len, from) = socket.recv_from(&mut bytes).unwrap();
            assert_eq!(from, to, "the answer comes from where the client sent to");
            let answer = std::str::from_utf8(&bytes[..len]).unwrap();
            let backend: kinesin::lab::report::Backend = answer.parse().unwrap();
            seen.insert(backend.node.trim_start_matches("node-").parse().unwrap(), backend.client.ip());
        }
        seen
    }

    fn socket(&self, to: SocketAddr) -> UdpSocket {
        let any: IpAddr = if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let socket = self.lab.client().netns().run(|| UdpSocket::bind((any, 0)).unwrap()).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        socket
    }

    /// So many bytes to some pod and back, on each of several connections; those to all nodes.
    async fn transfer(&self, to: SocketAddr, connections: usize) {
        let data: Vec<u8> = (0..1u32 << 20).map(|i| (i * 7 + i / 251) as u8).collect();
        for _ in 0..connections {
            let socket = self
                .lab
                .client()
                .netns()
                .run(|| if to.is_ipv4() { tokio::net::TcpSocket::new_v4() } else { tokio::net::TcpSocket::new_v6() })
                .unwrap()
                .unwrap();
            let (mut read, mut write) = socket.connect(to).await.unwrap().into_split();
            let sent = data.clone();
            let sender = tokio::spawn(async move { write.write_all(&sent).await.map(|()| write) });
            let mut back = vec![0; data.len()];
            tokio::time::timeout(LIMIT, read.read_exact(&mut back)).await.expect("in time").unwrap();
            assert!(back == data, "what came back from {to} differs");
            sender.await.unwrap().unwrap();
        }
    }

    /// The service's addresses and node 1's NodePort, of both families.
    fn frontends(&self) -> [SocketAddr; 4] {
        let entry = self.lab.node(1);
        [
            (VIP, 80).into(),
            (VIP6, 80).into(),
            (entry.address(), NODE_PORT).into(),
            (entry.address6().unwrap(), NODE_PORT).into(),
        ]
    }

    /// The client's and node 1's address in the family of an address.
    fn ends(&self, to: SocketAddr) -> (IpAddr, IpAddr) {
        let entry = self.lab.node(1);
        if to.is_ipv4() {
            (CLIENT_ADDRESS.into(), entry.address().into())
        } else {
            (CLIENT_ADDRESS6.into(), entry.address6().unwrap().into())
        }
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

/// Every client keeps its address at every pod, TCP and UDP, IPv4 and IPv6, and a megabyte goes both ways.
async fn assert_clients_are_kept(rig: &Rig) {
    for to in rig.frontends() {
        let (client, _) = rig.ends(to);
        assert_eq!(rig.seen(to).await, (1..=3).map(|node| (node, client)).collect(), "{to}");
    }
    for to in [SocketAddr::from((VIP, ECHO_PORT)), (VIP6, ECHO_PORT).into()] {
        let (client, _) = rig.ends(to);
        assert_eq!(rig.seen_by_datagram(to), (1..=3).map(|node| (node, client)).collect(), "{to}");
        rig.transfer(to, 9).await;
    }
}

#[tokio::test]
async fn by_ipip_clients_keep_their_address_to_pods_of_nodes_beyond_a_router() {
    let rig = rig("beyond", &[("bpf-lb-mode", "dsr"), ("bpf-lb-dsr-dispatch", "ipip")], "").await;
    rig.wait_for_ways("l2", "ipip").await;
    let status = rig.status(1).await.unwrap();
    assert_eq!(status.kube_proxy_replacement.mode, "DSR (L2 to 1, IPIP to 1 of 2 other nodes, else SNAT)");
    assert_eq!(status.problems, Vec::<String>::new());
    let (_, metrics) = rig.agents[0].get("/metrics").await.unwrap();
    assert!(metrics.contains("kinesin_peers{state=\"routed\"} 1"), "{metrics}");
    assert_clients_are_kept(&rig).await;

    // Datagrams of any length, those of several fragments too.
    for to in [SocketAddr::from((VIP, ECHO_PORT)), (VIP6, ECHO_PORT).into()] {
        for len in [1400, 1472, 4000] {
            for _ in 0..9 {
                let socket = rig.socket(to);
                let sent = vec![7; len];
                let mut back = vec![0; 9000];
                // The first that is too long is lost for the sender to learn the MTU.
                socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
                let answered = (0..20).any(|_| {
                    socket.send_to(&sent, to).is_ok() && socket.recv_from(&mut back).is_ok_and(|(got, _)| got == len)
                });
                assert!(answered, "{len} bytes to {to}");
            }
        }
    }

    // Without a way there, this node's own address goes, and status says why.
    ip(rig.lab.node(1).netns(), "route add unreachable 10.0.1.0/24");
    ip(rig.lab.node(1).netns(), "route add unreachable fd00:10:1::/64");
    rig.wait_for_ways("l2", "snat: no way there: 10.0.1.12: ").await;
    let seen = rig.seen((VIP, 80).into()).await;
    let (client, entry) = rig.ends((VIP, 80).into());
    assert_eq!(seen, BTreeMap::from([(1, client), (2, entry), (3, client)]));
}

#[tokio::test]
async fn by_opt_clients_keep_their_address_to_pods_of_nodes_beyond_a_router() {
    let rig = rig("option", &[("bpf-lb-mode", "dsr"), ("bpf-lb-dsr-dispatch", "opt")], "").await;
    rig.wait_for_ways("l2", "opt").await;
    let status = rig.status(1).await.unwrap();
    assert_eq!(status.kube_proxy_replacement.mode, "DSR (L2 to 1, OPT to 1 of 2 other nodes, else SNAT)");
    assert_eq!(status.problems, Vec::<String>::new());
    assert_clients_are_kept(&rig).await;
}

#[tokio::test]
async fn hybrid_keeps_clients_of_tcp_and_an_annotation_those_of_one_service() {
    let rig = rig("hybrid", &[("bpf-lb-mode", "hybrid"), ("bpf-lb-dsr-dispatch", "ipip")], "").await;
    rig.wait_for_ways("l2", "ipip").await;
    let expected = |to: SocketAddr, kept: bool| {
        let (client, entry) = rig.ends(to);
        let elsewhere = if kept { client } else { entry };
        BTreeMap::from([(1, client), (2, elsewhere), (3, elsewhere)])
    };
    for to in rig.frontends() {
        assert_eq!(rig.seen(to).await, expected(to, true), "{to}");
    }
    let echoes = [SocketAddr::from((VIP, ECHO_PORT)), (VIP6, ECHO_PORT).into()];
    for to in echoes {
        assert_eq!(rig.seen_by_datagram(to), expected(to, false), "{to}");
    }

    // By annotation, while the mode of the node is another one.
    let node = rig.lab.node(1);
    node.set_config("bpf-lb-mode", "snat").unwrap();
    node.set_config("bpf-lb-mode-annotation", "true").unwrap();
    for (mode, kept) in [("snat", false), ("dsr", true)] {
        write(&rig.lab, &format!("service.cilium.io/forwarding-mode: {mode}"));
        eventually(&format!("{mode} by annotation"), async || {
            let status = rig.status(1).await.map(|status| status.kube_proxy_replacement.mode).unwrap_or_default();
            let by = status.starts_with("SNAT, DSR by annotation (L2 to 1, IPIP to 1");
            by && rig.seen_by_datagram(echoes[0]) == expected(echoes[0], kept)
        })
        .await;
        for to in rig.frontends() {
            assert_eq!(rig.seen(to).await, expected(to, kept), "{mode}: {to}");
        }
    }
}
