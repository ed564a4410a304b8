//! Straight to pods on every node: backends here and behind other nodes answer as before, the key works without a restart in
//! both directions, agents that are left to decide follow who comes into the stack, and everybody is told.

use super::*;

const KEY: &str = "enable-host-legacy-routing";
/// The lab's nodes are containers, as those of kind and LXC are.
const STRAIGHT: &str = "BPF (1 devices of pods; to neighbours across eth0)";

/// What the nodes did in some rounds of echoes.
#[derive(Debug)]
struct Work {
    /// Packets that their stacks have forwarded; nobody else forwards anything here.
    forwarded: u64,
    /// Frames that they sent by `eth0`.
    sent: u64,
}

impl Rig {
    /// Whether a node's programs for answers are at its pods' devices, and how.
    async fn pod_hooks(&self, number: usize) -> Vec<(String, bool)> {
        let (_, status) = self.agent(number).get("/v1/status").await.unwrap();
        let status: kinesin::admin::views::StatusView = serde_json::from_str(&status).unwrap();
        let hooks = status.hooks.into_iter().filter(|hook| hook.program.starts_with("cil_from_container"));
        hooks.map(|hook| (hook.target, hook.ok)).collect()
    }

    /// Waits until every node says so of the way to its pods.
    async fn wait_for_host_routing(&self, says: &str) {
        for number in 1..=3 {
            self.wait_for_duty(number, says, |duties| duties.host_routing).await;
        }
    }

    fn work(&self) -> Work {
        let sum = |of: fn() -> u64| self.lab.nodes().iter().map(|node| node.netns().run(of).unwrap()).sum();
        Work { forwarded: sum(|| snmp::counters("Ip")["ForwDatagrams"]), sent: sum(|| snmp::sent("eth0")) }
    }

    /// What so many echoes over each connection take.
    async fn echoes(&self, streams: &mut [tokio::net::TcpStream], rounds: u64) -> Work {
        let before = self.work();
        for _ in 0..rounds {
            for stream in &mut *streams {
                assert_echoes(stream).await;
            }
        }
        let after = self.work();
        Work { forwarded: after.forwarded - before.forwarded, sent: after.sent - before.sent }
    }
}

#[tokio::test]
async fn packets_to_pods_go_straight_or_by_the_stack_as_the_key_says_and_connections_go_on() {
    let rig = rig("straight", &[(KEY, "false")], "").await;
    let owner = rig.owner().await;
    rig.all_neighbours(owner).await;
    rig.wait_for_host_routing(STRAIGHT).await;
    let (_, metrics) = rig.agent(owner).get("/metrics").await.unwrap();
    assert!(metrics.contains("kinesin_direct_devices 1"), "{metrics}");

    let mut streams = Vec::new();
    for _ in 0..12 {
        streams.push(echo_stream(&rig).await);
    }
    let seen = rig.seen(rig.lab.client().netns(), &vip_url(), &[1, 2, 3]).await;
    (1..=3).for_each(|node| assert_seen(&seen, node, client()));
    let straight = rig.echoes(&mut streams, 20).await;
    assert_eq!(rig.pod_hooks(owner).await, [("pods ingress".to_owned(), true)]);
    for node in rig.lab.nodes() {
        node.set_config(KEY, "true").unwrap();
    }
    rig.wait_for_host_routing("Legacy").await;
    eventually("nothing of ours is at pods' devices", async || rig.pod_hooks(owner).await.is_empty()).await;
    let by_stack = rig.echoes(&mut streams, 20).await;
    for node in rig.lab.nodes() {
        node.set_config(KEY, "false").unwrap();
    }
    rig.wait_for_host_routing(STRAIGHT).await;
    let again = rig.echoes(&mut streams, 20).await;
    // Each echo is a segment each way, and an acknowledgement on the way there.
    let echoes = streams.len() as u64 * 20;
    assert!(by_stack.forwarded >= echoes * 2, "{by_stack:?} of {echoes} echoes");
    for work in [straight, again] {
        assert!(work.forwarded < by_stack.forwarded / 10, "{work:?}, {by_stack:?}");
        // Two thirds of the connections are handed on, with two frames for each echo.
        assert!(work.sent + echoes / 4 < by_stack.sent, "{work:?}, {by_stack:?}");
    }
}

/// Runs a command, of words, on a node.
fn run(node: &kinesin::lab::Node, command: &str) {
    let words: Vec<&str> = command.split_whitespace().collect();
    let output = node.netns().run(|| Command::new(words[0]).args(&words[1..]).output()).unwrap().unwrap();
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
}

#[tokio::test]
async fn left_to_themselves_agents_go_straight_while_nobody_in_the_stack_would_look_and_connections_go_on() {
    const FORWARD: &str = "Legacy (nftables: inet watch forwarded (hook forward))";
    let rig = rig("by-itself", &[], "").await;
    let owner = rig.owner().await;
    rig.all_neighbours(owner).await;
    rig.wait_for_host_routing(STRAIGHT).await;
    let node = rig.lab.node(owner);
    let mut streams = Vec::new();
    for _ in 0..12 {
        streams.push(echo_stream(&rig).await);
    }
    let straight = rig.echoes(&mut streams, 20).await;

    // Somebody who wants to see forwarded packets, on one node: its own pod's are seen, and what it hands on stays as it was.
    run(node, "nft add table inet watch");
    run(node, "nft add chain inet watch forwarded { type filter hook forward priority 0; }");
    run(node, "nft add chain inet watch own { type filter hook input priority 0; }");
    run(node, "nft add rule inet watch own counter");
    run(node, "nft add rule inet watch forwarded ip daddr 10.42.0.0/16 counter");
    rig.wait_for_duty(owner, FORWARD, |duties| duties.host_routing).await;
    for other in (1..=3).filter(|other| *other != owner) {
        rig.wait_for_duty(other, STRAIGHT, |duties| duties.host_routing).await;
    }
    let seen = rig.echoes(&mut streams, 20).await;
    assert!(seen.forwarded > straight.forwarded && seen.sent > straight.sent, "{straight:?}, {seen:?}");
    let output = node.netns().run(|| Command::new("nft").args(["list", "table", "inet", "watch"]).output());
    let rules = String::from_utf8(output.unwrap().unwrap().stdout).unwrap();
    let rule = rules.lines().find(|line| line.contains("daddr")).unwrap();
    assert!(!rule.contains("packets 0 "), "{rules}");
    let (_, metrics) = rig.agent(owner).get("/metrics").await.unwrap();
    assert!(metrics.contains("kinesin_direct_devices 0"), "{metrics}");
    run(node, "nft delete chain inet watch forwarded");
    rig.wait_for_host_routing(STRAIGHT).await;
    let again = rig.echoes(&mut streams, 20).await;
    assert!(again.forwarded < seen.forwarded && again.sent < seen.sent, "{seen:?}, {again:?}");

    // Somebody at the pod's device alone, and at the device to the LAN beside ours.
    let pod = format!("veth-{}", rig.lab.pod(owner, 1).name());
    run(node, &format!("tc qdisc add dev {pod} clsact"));
    let apart = "BPF (0 devices of pods, 1 by the stack: tc programs of others; to neighbours across eth0)";
    rig.wait_for_duty(owner, apart, |duties| duties.host_routing).await;
    let by_stack = rig.echoes(&mut streams, 20).await;
    assert!(by_stack.forwarded > again.forwarded, "{again:?}, {by_stack:?}");
    run(node, &format!("tc qdisc delete dev {pod} clsact"));
    rig.wait_for_host_routing(STRAIGHT).await;

    // What changes without a word, and what the configuration says whoever is there.
    run(node, "iptables-legacy -t nat -L -n");
    rig.wait_for_duty(owner, "Legacy (iptables: table nat)", |duties| duties.host_routing).await;
    node.set_config(KEY, "false").unwrap();
    rig.wait_for_host_routing(STRAIGHT).await;
    rig.echoes(&mut streams, 1).await;
}

/// As many as a large node has pods, and more: all of them are written, and no actor fails over it.
#[tokio::test]
async fn a_node_with_hundreds_of_devices_has_all_of_them_in_its_map() {
    const MORE: usize = 400;
    let rig = rig("devices", &[(KEY, "false")], "").await;
    let node = rig.lab.node(1);
    let pair = |number| format!("link add more{number} type veth peer name other{number}\n");
    let links: String = (0..MORE / 2).map(pair).collect();
    let batch = node.dir().join("links");
    std::fs::write(&batch, links).unwrap();
    let mut command = Command::new("ip");
    command.arg("-batch").arg(&batch);
    assert!(node.netns().run(|| command.status().unwrap()).unwrap().success());
    eventually("the devices are in the map", async || {
        let (_, tables) = rig.agent(1).get("/v1/tables").await.unwrap();
        let tables: Vec<kinesin::admin::views::TableView> = serde_json::from_str(&tables).unwrap();
        tables.iter().any(|table| table.name == "devices" && table.rows as usize >= MORE)
    })
    .await;
    let (_, metrics) = rig.agent(1).get("/metrics").await.unwrap();
    let restarts: Vec<_> = metrics.lines().filter(|line| line.starts_with("kinesin_actor_restarts_total")).collect();
    assert_eq!(restarts, Vec::<&str>::new());
}
