//! Who reaches whom, and as whom.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use kinesin::lab::programs::ClientOptions;
use kinesin::lab::{ECHO_PORT, HTTP_PORT, get_from};
use kinesin::net::Netns;

use super::{LIMIT, lab};

fn url(address: impl Into<IpAddr>) -> String {
    format!("http://{}/", SocketAddr::new(address.into(), HTTP_PORT))
}

#[tokio::test]
async fn pods_reach_each_other_on_one_node_and_across_nodes_with_their_own_addresses() {
    let lab = lab("paths").nodes(2).pods_per_node(2).build().await.unwrap();
    for pod in lab.pods() {
        pod.serve().await.unwrap();
    }
    for from in lab.pods() {
        for to in lab.pods() {
            let answer = from.get(&url(to.address())).await.unwrap();
            assert_eq!(answer.status, 200);
            let backend = answer.backend.expect("a pod's answer");
            assert_eq!((backend.pod.as_str(), backend.node.as_str()), (to.name(), to.node()));
            assert_eq!(backend.client.ip(), IpAddr::from(from.address()), "{} to {}", from.name(), to.name());
        }
    }
    // Nodes reach all pods, under their LAN address.
    for node in lab.nodes() {
        for to in lab.pods() {
            let answer = node.get(&url(to.address())).await.unwrap();
            let backend = answer.backend.expect("a pod's answer");
            assert_eq!(backend.client.ip(), IpAddr::from(node.address()), "{} to {}", node.name(), to.name());
        }
    }
    // The LAN knows nothing of pods: that is what a load balancer is for.
    let direct = get_from(lab.client().netns(), &url(lab.pod(1, 1).address()), Duration::from_millis(500)).await;
    assert!(direct.is_err(), "{direct:?}");
}

#[tokio::test]
async fn a_node_added_later_is_part_of_the_network() {
    let mut lab = lab("late").nodes(1).pods_per_node(1).build().await.unwrap();
    lab.add_node_with(1).await.unwrap();
    let (old, new) = (lab.pod(1, 1), lab.pod(2, 1));
    old.serve().await.unwrap();
    new.serve().await.unwrap();
    for (from, to) in [(&old, &new), (&new, &old)] {
        let answer = get_from(from.netns(), &url(to.address()), LIMIT).await.unwrap();
        assert_eq!(answer.backend.expect("a pod's answer").pod, to.name());
    }
}

#[tokio::test]
async fn pods_and_nodes_can_be_clients_of_a_load() {
    let lab = lab("inner-load").nodes(2).pods_per_node(1).build().await.unwrap();
    lab.pod(2, 1).serve().await.unwrap();
    let options = ClientOptions::new(url(lab.pod(2, 1).address())).timeout(LIMIT).duration(Duration::from_millis(500));
    for load in [lab.node(1).load(&options).unwrap(), lab.pod(1, 1).load(&options).unwrap()] {
        let totals = load.summary(LIMIT).await.unwrap();
        assert!(totals.succeeded > 0 && totals.failed == 0, "{totals:?}");
    }
}

#[tokio::test]
async fn pods_echo_datagrams() {
    let lab = lab("udp").nodes(1).pods_per_node(1).build().await.unwrap();
    let pod = lab.pod(1, 1);
    pod.serve().await.unwrap();
    let open = |netns: &Netns| netns.run(|| std::net::UdpSocket::bind("0.0.0.0:0").unwrap()).unwrap();
    let socket = open(lab.node(1).netns());
    socket.set_read_timeout(Some(LIMIT)).unwrap();
    socket.send_to(b"ping", (pod.address(), ECHO_PORT)).unwrap();
    let mut bytes = [0; 16];
    let (length, from) = socket.recv_from(&mut bytes).unwrap();
    assert_eq!((&bytes[..length], from.ip()), (&b"ping"[..], IpAddr::from(pod.address())));
}

#[tokio::test]
async fn processes_are_in_the_cgroup_and_namespace_of_their_node_and_power_off_ends_them() {
    let lab = lab("power").nodes(2).pods_per_node(1).build().await.unwrap();
    let node = lab.node(1);
    lab.pod(1, 1).serve().await.unwrap();
    lab.pod(2, 1).serve().await.unwrap();
    let mut command = std::process::Command::new("sleep");
    command.arg("1000");
    let sleeper = node.spawn("sleeper", command).unwrap();
    let cgroups = std::fs::read_to_string(format!("/proc/{}/cgroup", sleeper.pid())).unwrap();
    assert!(
        cgroups.lines().any(|l| l.starts_with("0::") && l.contains(lab.id()) && l.ends_with("/node-1")),
        "{cgroups}"
    );
    let namespace = std::fs::read_link(format!("/proc/{}/ns/net", sleeper.pid())).unwrap();
    let expected = node.netns().run(|| std::fs::read_link("/proc/thread-self/ns/net").unwrap()).unwrap();
    assert_eq!(namespace, expected);

    node.power_off().await.unwrap();
    assert!(sleeper.exit_status().is_some());
    assert_eq!(kinesin::net::cgroup::processes(node.cgroup()), Vec::<i32>::new());
    let dead = get_from(lab.pod(2, 1).netns(), &url(lab.pod(1, 1).address()), Duration::from_millis(500)).await;
    assert!(dead.is_err(), "{dead:?}");
    let alive = get_from(lab.node(2).netns(), &url(lab.pod(2, 1).address()), LIMIT).await.unwrap();
    assert_eq!(alive.status, 200);
}
