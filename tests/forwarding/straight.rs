//! `enable-host-legacy-routing=false` on every node: backends here and behind other nodes answer as before, the key works
//! without a restart in both directions, and everybody is told.

use kinesin::lab::Node;

use super::*;

const KEY: &str = "enable-host-legacy-routing";

impl Rig {
    /// Waits until every node says so of the way to its pods.
    async fn wait_for_host_routing(&self, says: &str) {
        for number in 1..=3 {
            self.wait_for_duty(number, says, |duties| duties.host_routing).await;
        }
    }

    /// Packets that the stacks of all nodes have forwarded; nobody else forwards anything here.
    fn forwarded(&self) -> u64 {
        let of = |node: &Node| node.netns().run(|| snmp::counters("Ip")["ForwDatagrams"]).unwrap();
        self.lab.nodes().iter().map(of).sum()
    }

    /// What the stacks forward of so many echoes over each connection.
    async fn echoes(&self, streams: &mut [tokio::net::TcpStream], rounds: u64) -> u64 {
        let before = self.forwarded();
        for _ in 0..rounds {
            for stream in &mut *streams {
                assert_echoes(stream).await;
            }
        }
        self.forwarded() - before
    }
}

#[tokio::test]
async fn packets_to_pods_go_straight_or_by_the_stack_as_the_key_says_and_connections_go_on() {
    let rig = rig("straight", &[(KEY, "false")], "").await;
    let owner = rig.owner().await;
    rig.all_neighbours(owner).await;
    rig.wait_for_host_routing("BPF (1 devices of pods)").await;
    let (_, metrics) = rig.agent(owner).get("/metrics").await.unwrap();
    assert!(metrics.contains("kinesin_direct_devices 1"), "{metrics}");

    let mut streams = Vec::new();
    for _ in 0..12 {
        streams.push(echo_stream(&rig).await);
    }
    let seen = rig.seen(rig.lab.client().netns(), &vip_url(), &[1, 2, 3]).await;
    (1..=3).for_each(|node| assert_seen(&seen, node, client()));
    let straight = rig.echoes(&mut streams, 20).await;
    for node in rig.lab.nodes() {
        node.set_config(KEY, "true").unwrap();
    }
    rig.wait_for_host_routing("Legacy").await;
    let by_stack = rig.echoes(&mut streams, 20).await;
    for node in rig.lab.nodes() {
        node.set_config(KEY, "false").unwrap();
    }
    rig.wait_for_host_routing("BPF (1 devices of pods)").await;
    let again = rig.echoes(&mut streams, 20).await;
    // Each echo is a segment each way, and an acknowledgement on the way there; the stack forwards what comes back.
    let echoes = streams.len() as u64 * 20;
    assert!(by_stack >= echoes * 2, "{by_stack} of {echoes} echoes");
    assert!(straight < by_stack * 3 / 4 && again < by_stack * 3 / 4, "{straight}, {by_stack}, {again}");
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
