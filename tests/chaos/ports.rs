//! Source ports towards a backend run out: who is told, what is said, and that it ends.

use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use kinesin::datapath::MapStore;
use kinesin::lab::{ECHO_PORT, manifests};

use super::rig::{Lease, Rig, eventually_or};

/// What is left above these NodePorts: 1,024 ports.
const NODE_PORTS: &str = "30000,64511";
/// More connections than two backends have ports.
const MANY: usize = 2_600;
/// Attempts without an answer, one after the other, that are no accident.
const ENOUGH: u32 = 5;

impl Rig {
    /// Opens connections from the client until none gets a port any more, or there are `most`.
    fn open(&self, most: usize) -> Vec<TcpStream> {
        let to = SocketAddr::from((self.vip, ECHO_PORT));
        let connect = move || {
            let mut open = Vec::new();
            let mut refused = 0;
            while open.len() < most {
                // Below a second, after which TCP tries again, and might find a port.
                match TcpStream::connect_timeout(&to, Duration::from_millis(700)) {
                    Ok(stream) => {
                        open.push(stream);
                        refused = 0;
                    }
                    // A busy machine is late once, or twice.
                    Err(error) if error.kind() == std::io::ErrorKind::TimedOut && refused < ENOUGH => refused += 1,
                    Err(error) if error.kind() == std::io::ErrorKind::TimedOut => break,
                    Err(error) => panic!("connection {}: {error}", open.len()),
                }
            }
            open
        };
        self.lab.client().netns().run(connect).unwrap()
    }

    /// What the node says of source ports, once it satisfies a condition.
    async fn says_of_ports(&self, number: usize, what: &str, holds: impl Fn(&[String]) -> bool) {
        eventually_or(what, async || {
            let problems = self.status(number).await.problems;
            let ports: Vec<String> = problems.into_iter().filter(|text| text.contains("source-ports:")).collect();
            if holds(&ports) { Ok(()) } else { Err(format!("{ports:#?}")) }
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn source_ports_that_run_out_are_said_with_backend_service_and_node_and_so_is_the_end() {
    let settings = [("bpf-lb-mode", "snat"), ("node-port-range", NODE_PORTS), ("conntrack-gc-interval", "1s")];
    let rig = Rig::start("ports", Lease::Patient, &settings).await;
    let owner = rig.owner(&[]).await;
    // Two backends, on one other node.
    let others: Vec<usize> = (1..=3).filter(|number| *number != owner).collect();
    let (far, down) = (rig.lab.node(others[0]).clone(), rig.lab.node(others[1]).clone());
    manifests::write_endpoints(&rig.lab, &[rig.lab.node(owner).name(), down.name()]).unwrap();
    let pods: Vec<String> = far.pods().iter().map(|pod| format!("{}:{ECHO_PORT}", pod.address())).collect();
    eventually_or("the backends are those of one node", async || {
        let text = format!("{:?}", rig.maps(owner).dump_raw("backends").unwrap());
        let only = pods.iter().all(|pod| text.contains(pod.split(':').next().unwrap_or_default()));
        let kept: std::collections::BTreeSet<_> = rig.lab.node(owner).pods().iter().map(|pod| pod.address()).collect();
        if only && kept.iter().all(|pod| !text.contains(&pod.to_string())) { Ok(()) } else { Err(text) }
    })
    .await;
    rig.says_of_ports(owner, "nothing yet", <[String]>::is_empty).await;

    let some = rig.open(1_500);
    assert_eq!(some.len(), 1_500, "three of four ports");
    rig.says_of_ports(owner, "the ports are getting few", |said| {
        said.iter().any(|text| {
            text.contains("getting few")
                && pods.iter().any(|pod| text.contains(pod))
                && text.contains(&format!("default/web on {}", far.name()))
                && text.contains("bpf-lb-dsr-dispatch l2")
        })
    })
    .await;
    let more = rig.open(MANY - some.len());
    assert!(some.len() + more.len() < MANY, "two backends have 1,024 ports each");
    rig.says_of_ports(owner, "connections are refused", |said| {
        said.iter().any(|text| text.contains("running out, new connections are refused"))
    })
    .await;
    let used = rig.metric(owner, "kinesin_source_ports_used_ratio").await;
    assert!(used > 0.8 && used <= 1.0, "{used}");

    // Closed from both sides, they are forgotten after the FIN timeout.
    drop((some, more));
    rig.says_of_ports(owner, "there are ports again", <[String]>::is_empty).await;
    assert!(rig.agent(owner).logs(400).contains("problems gone area=\"source-ports\""));
    drop(rig.open(10));
}
