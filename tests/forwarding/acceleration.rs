//! `bpf-lb-acceleration` on nodes whose cables carry what real ones carry: what the driver sends arrives, connections live on
//! through restarts of the agent and changes of the key, and everybody is told.

use kinesin::lab::Lab;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::*;

const KEY: &str = "bpf-lb-acceleration";
/// Connections enough for backends on every node to have some.
const STREAMS: usize = 12;
/// What each one carries and gets back; a few dozen segments.
const BYTES: usize = 64 * 1024;

/// Every stream carries data there and back, unharmed.
async fn carry(streams: &mut [TcpStream]) {
    for (number, stream) in streams.iter_mut().enumerate() {
        let sent: Vec<u8> = (0..BYTES).map(|at| (at * 7 + at / 251 + number) as u8).collect();
        let (mut reader, mut writer) = stream.split();
        let mut received = vec![0; BYTES];
        let both = async { tokio::join!(writer.write_all(&sent), reader.read_exact(&mut received)) };
        let (written, read) = tokio::time::timeout(LIMIT, both).await.expect("in time");
        written.unwrap();
        read.unwrap();
        assert!(sent == received, "stream {number} came back changed");
    }
}

impl Rig {
    /// Packets that the driver of a node has sent.
    async fn accelerated(&self, number: usize) -> u64 {
        let (_, metrics) = self.agent(number).get("/metrics").await.unwrap();
        let line = metrics.lines().find_map(|line| line.strip_prefix("kinesin_accelerated_packets_total "));
        line.map_or(0, |count| count.parse().unwrap())
    }

    /// Waits until a node says so of its acceleration.
    async fn wait_for_acceleration(&self, number: usize, says: &str) {
        self.wait_for_duty(number, says, |duties| duties.xdp_acceleration).await;
    }
}

#[tokio::test]
async fn the_driver_sends_what_leaves_again_in_every_mode_through_restarts_and_changes() {
    let builder = Lab::builder("driver").wires();
    let mut rig = rig_of(builder, &[(KEY, "native"), ("enable-l2-announcements", "true")], "").await;
    let owner = rig.owner().await;
    rig.all_neighbours(owner).await;
    let native = "Native (eth0 in its driver)";
    rig.wait_for_acceleration(owner, native).await;
    assert_eq!(rig.status(owner).await.unwrap().problems, Vec::<String>::new());

    let mut streams = Vec::new();
    for (mode, name) in [("auto", "Auto"), ("snat", "SNAT")] {
        for node in rig.lab.nodes() {
            node.set_config("bpf-lb-mode", mode).unwrap();
        }
        eventually(&format!("mode {name}"), async || {
            rig.status(owner).await.is_some_and(|status| status.kube_proxy_replacement.mode.starts_with(name))
        })
        .await;
        let before = rig.accelerated(owner).await;
        let mut opened = Vec::new();
        for _ in 0..STREAMS {
            opened.push(echo_stream(&rig).await);
        }
        carry(&mut opened).await;
        // A third of them is with this node's own pod; of the rest every segment comes by here at least once.
        let sent = rig.accelerated(owner).await - before;
        assert!(sent as usize > STREAMS * BYTES / 1448 / 4, "{mode}: the driver sent {sent} packets");
        streams.extend(opened);
    }

    // Nothing of it depends on the agent, and the next one takes over what it finds.
    rig.agents[owner - 1].take().unwrap().kill9();
    carry(&mut streams).await;
    let options = AgentOptions::on_manifests(&rig.lab).config("map-verify-interval", "1s").config(KEY, "native");
    rig.agents[owner - 1] = Some(rig.lab.node(owner).start_agent(&options).unwrap());
    rig.agent(owner).wait_ready(LIMIT).await.unwrap();
    rig.wait_for_acceleration(owner, native).await;
    carry(&mut streams).await;

    // Off and on again, while connections go on.
    rig.lab.node(owner).set_config(KEY, "disabled").unwrap();
    rig.wait_for_acceleration(owner, "Disabled").await;
    let before = rig.accelerated(owner).await;
    carry(&mut streams).await;
    assert_eq!(rig.accelerated(owner).await, before);
    rig.lab.node(owner).set_config(KEY, "native").unwrap();
    rig.wait_for_acceleration(owner, native).await;
    carry(&mut streams).await;
    assert!(rig.accelerated(owner).await > before);
    let log = rig.agent(owner).logs(1000);
    assert!(log.contains("no longer accelerated") && log.contains("the driver runs our program"), "{log}");
}

#[tokio::test]
async fn r48_a_driver_that_refuses_is_a_problem_or_done_without_and_services_work() {
    // An MTU that takes more than one buffer.
    let builder = Lab::builder("refusing").wires();
    let rig = rig_of(builder, &[("bpf-lb-mode", "snat")], "").await;
    let owner = rig.owner().await;
    let mut ports = Command::new("ip");
    ports.args(["link", "set", &format!("node-{owner}"), "mtu", "9000"]);
    assert!(rig.lab.lan().run(|| ports.status().unwrap()).unwrap().success());
    rig.lab.node(owner).set_config(KEY, "native").unwrap();
    eventually("the problem is told", async || {
        let problems = rig.status(owner).await.map(|status| status.problems).unwrap_or_default();
        problems.iter().any(|text| text.contains("cil_xdp_entry eth0 xdp: its driver refuses XDP"))
    })
    .await;
    rig.seen(rig.lab.client().netns(), &vip_url(), &[1, 2, 3]).await;
    rig.lab.node(owner).set_config(KEY, "best-effort").unwrap();
    eventually("nothing is wrong any more", async || {
        let Some(status) = rig.status(owner).await else { return false };
        let says = &status.kube_proxy_replacement.xdp_acceleration;
        says.starts_with("Best-Effort (eth0 by tc: a veth") && status.problems.is_empty()
    })
    .await;
    rig.seen(rig.lab.client().netns(), &vip_url(), &[1, 2, 3]).await;
}
