//! Namespaces, sysctls, link monitor, gratuitous ARP, ARP probes.

use std::net::Ipv4Addr;
use std::time::Instant;

use kinesin::net::arp::{self, ArpSocket};
use kinesin::net::rtnl::Rtnl;
use kinesin::net::{GarpSender, LinkMonitor, Netns, garp, local_ports, sysctl};
use kinesin_core::devices::Device;
use tokio::sync::watch;

use super::{LIMIT, lab};
use kinesin::net::Snapshot;

#[test]
fn a_namespace_exists_as_long_as_its_value_and_is_another_than_ours() {
    let name = format!("kinesin-test-{}", std::process::id());
    let netns = Netns::create(&name).unwrap();
    assert!(Netns::create(&name).is_err(), "the name is taken");
    let here = std::fs::read_link("/proc/thread-self/ns/net").unwrap();
    let there = netns.run(|| std::fs::read_link("/proc/thread-self/ns/net").unwrap()).unwrap();
    assert_ne!(here, there);
    let same = Netns::open(&name).unwrap().run(|| std::fs::read_link("/proc/thread-self/ns/net").unwrap()).unwrap();
    assert_eq!(there, same, "opened by name it is the same one");
    assert_eq!(here, std::fs::read_link("/proc/thread-self/ns/net").unwrap(), "the caller has not moved");
    drop(netns);
    assert!(!std::path::Path::new("/run/netns").join(&name).exists());
    assert!(Netns::open(&name).is_err());
}

#[test]
fn a_namespace_name_that_is_a_path_is_refused() {
    for name in ["", "..", "a/b"] {
        let error = Netns::create(name).unwrap_err().to_string();
        assert!(error.contains("no file name"), "{error}");
    }
}

#[test]
fn a_panic_inside_a_namespace_reaches_the_caller() {
    let netns = Netns::create(&format!("kinesin-test-panic-{}", std::process::id())).unwrap();
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| netns.run(|| panic!("inside"))));
    assert!(result.is_err());
}

#[test]
fn sysctls_are_written_in_the_namespace_and_nowhere_else() {
    let netns = Netns::create(&format!("kinesin-test-sysctl-{}", std::process::id())).unwrap();
    let here = sysctl::read("ipv4/ip_default_ttl").unwrap();
    sysctl::write_in(&netns, &[("ipv4/ip_default_ttl", "77")]).unwrap();
    assert_eq!(netns.run(|| sysctl::read("ipv4/ip_default_ttl").unwrap()).unwrap(), "77");
    assert_eq!(sysctl::read("ipv4/ip_default_ttl").unwrap(), here);
    let error = sysctl::write_in(&netns, &[("ipv4/no_such_key", "1")]).unwrap_err().to_string();
    assert!(error.contains("net/ipv4/no_such_key"), "{error}");
}

#[test]
fn node_ports_are_reserved_where_the_kernel_would_give_them_to_connections() {
    let netns = Netns::create(&format!("kinesin-test-reserve-{}", std::process::id())).unwrap();
    let reserved = || netns.run(|| sysctl::read("ipv4/ip_local_reserved_ports").unwrap()).unwrap();
    let reserve = |may_write| netns.run(|| local_ports::reserve(30_000..=32_767, may_write)).unwrap();
    let own = [("ipv4/ip_local_port_range", "32768\t60999"), ("ipv4/ip_local_reserved_ports", "8080")];
    sysctl::write_in(&netns, &own).unwrap();
    reserve(true).unwrap();
    assert_eq!(reserved(), "8080", "they do not meet");
    sysctl::write_in(&netns, &[("ipv4/ip_local_port_range", "32000\t60999")]).unwrap();
    let error = reserve(false).unwrap_err();
    assert!(error.contains("node-port-range 30000-32767") && error.contains("32000\t60999"), "{error}");
    assert_eq!(reserved(), "8080", "without leave nothing is written");
    reserve(true).unwrap();
    assert_eq!(reserved(), "8080,30000-32767");
    reserve(false).unwrap();
}

#[tokio::test]
async fn the_link_monitor_begins_with_what_is_there_and_goes_on_with_changes() {
    let lab = lab("monitor").nodes(1).build().await.unwrap();
    let node = lab.node(1);
    let mut monitor = node.netns().run(LinkMonitor::open_here).unwrap().unwrap();
    let first = tokio::time::timeout(LIMIT, monitor.next()).await.unwrap().unwrap();
    let names: Vec<&str> = first.iter().map(|d| d.name.as_str()).collect();
    assert!(names.contains(&"lo") && names.contains(&"eth0"), "{names:?}");
    node.cut_link().await.unwrap();
    let cut = async {
        loop {
            let next = monitor.next().await.unwrap();
            if next.iter().any(|d| d.name == "eth0" && !d.running) {
                return;
            }
        }
    };
    tokio::time::timeout(LIMIT, cut).await.expect("the carrier loss is never seen");
    // In the namespace of the test itself, where there is at least a loopback device.
    let mut here = LinkMonitor::open().await.unwrap();
    let first = tokio::time::timeout(LIMIT, here.next()).await.unwrap().unwrap();
    assert!(first.iter().any(|d| d.is_loopback));
}

/// Waits for a snapshot with a device of which the condition holds.
async fn see(
    snapshots: &mut watch::Receiver<Option<Snapshot>>,
    what: &str,
    condition: impl Fn(&Device) -> bool,
) -> Device {
    let seen = |s: &Option<Snapshot>| s.as_ref().is_some_and(|s| s.iter().any(&condition));
    let waited = tokio::time::timeout(LIMIT, snapshots.wait_for(seen)).await;
    let snapshot = waited.ok().map(|ended| ended.expect("the monitor ended").clone());
    let Some(Some(snapshot)) = snapshot else { panic!("never seen: {what}; last: {:?}", snapshots.borrow()) };
    snapshot.iter().find(|d| condition(d)).unwrap().clone()
}

#[tokio::test]
async fn the_link_monitor_sees_carrier_addresses_names_and_removal() {
    let lab = lab("links").nodes(1).pods_per_node(1).build().await.unwrap();
    let node = lab.node(1);
    let monitor = node.netns().run(LinkMonitor::open_here).unwrap().unwrap();
    let mut snapshots = monitor.watch();
    let eth0 = see(&mut snapshots, "eth0 at the start", |d| d.name == "eth0").await;
    assert!(eth0.is_live() && !eth0.is_loopback && !eth0.is_slave, "{eth0:?}");
    assert!(eth0.has_default_route && eth0.has_global_unicast_route, "{eth0:?}");
    assert_eq!(eth0.kind, "veth");
    assert_eq!(eth0.mac, Some(node.mac().await.unwrap()));
    assert!(eth0.addresses.contains(&"10.0.0.11/24".parse().unwrap()), "{eth0:?}");
    let pod = see(&mut snapshots, "the pod's device", |d| d.name.starts_with("veth-")).await;
    assert!(pod.leads_across() && eth0.reaches_out, "{pod:?} {eth0:?}");
    let lo = see(&mut snapshots, "lo", |d| d.is_loopback).await;
    assert!(!lo.reaches_out && !lo.leads_across(), "{lo:?}");
    assert!(lo.name == "lo" && lo.mac.is_none() && !lo.has_global_unicast_route, "{lo:?}");
    assert_eq!(kinesin_core::devices::unsuitable(&eth0), None, "the agent would choose it");
    let veth = see(&mut snapshots, "the pod's veth", |d| d.name == "veth-pod-1-1").await;
    assert!(veth.has_global_unicast_route && !veth.has_default_route, "{veth:?}");

    assert!(kinesin_core::devices::unsuitable(&veth).is_some(), "the agent would leave it alone");

    node.cut_link().await.unwrap();
    let cut = see(&mut snapshots, "carrier loss", |d| d.name == "eth0" && !d.running).await;
    assert!(cut.up, "administratively it is still up: {cut:?}");
    node.restore_link().await.unwrap();
    see(&mut snapshots, "carrier", |d| d.name == "eth0" && d.running).await;

    let rtnl = Rtnl::open_in(node.netns()).unwrap();
    rtnl.add_address(eth0.ifindex, "10.0.0.77/32".parse().unwrap()).await.unwrap();
    rtnl.add_address(eth0.ifindex, "fd00::77/64".parse().unwrap()).await.unwrap();
    see(&mut snapshots, "new addresses", |d| {
        let has = |a: &str| d.addresses.contains(&a.parse().unwrap());
        has("10.0.0.77/32") && has("fd00::77/64")
    })
    .await;

    // Taking the link down removes its IPv4 routes without any notification of a route.
    rtnl.set_down(eth0.ifindex).await.unwrap();
    see(&mut snapshots, "no route through a link that is down", |d| d.name == "eth0" && !d.up && !d.has_default_route)
        .await;

    rtnl.set_down(veth.ifindex).await.unwrap();
    rtnl.rename(veth.ifindex, "renamed").await.unwrap();
    let renamed = see(&mut snapshots, "the new name", |d| d.name == "renamed").await;
    assert_eq!(renamed.ifindex, veth.ifindex);
    rtnl.delete_link(veth.ifindex).await.unwrap();
    let gone = |s: &Option<Snapshot>| s.as_ref().is_some_and(|s| s.iter().all(|d| d.name != "renamed"));
    tokio::time::timeout(LIMIT, snapshots.wait_for(gone)).await.expect("the removal is never seen").unwrap();

    drop(monitor);
    tokio::time::timeout(LIMIT, async { while snapshots.changed().await.is_ok() {} })
        .await
        .expect("the receiver must end with the monitor");
}

#[tokio::test]
async fn the_link_monitor_ends_with_the_truth_after_a_storm_of_changes() {
    let lab = lab("storm").nodes(1).build().await.unwrap();
    let netns = lab.node(1).netns();
    let monitor = netns.run(LinkMonitor::open_here).unwrap().unwrap();
    let mut snapshots = monitor.watch();
    let eth0 = see(&mut snapshots, "eth0", |d| d.name == "eth0").await;
    let rtnl = Rtnl::open_in(netns).unwrap();
    for last in 1..=250 {
        rtnl.add_address(eth0.ifindex, format!("10.9.0.{last}/32").parse().unwrap()).await.unwrap();
    }
    let seen = see(&mut snapshots, "all addresses", |d| d.addresses.len() >= 251).await;
    assert_eq!(seen, rtnl.device("eth0").await.unwrap());
}

/// Notifications that the kernel dropped because a netlink socket of the namespace was full.
fn dropped_notifications(netns: &Netns) -> u64 {
    let table = netns.run(|| std::fs::read_to_string("/proc/thread-self/net/netlink").unwrap()).unwrap();
    // Columns: sk Eth Pid Groups Rmem Wmem Dump Locks Drops Inode
    table.lines().skip(1).filter_map(|line| line.split_whitespace().nth(8)?.parse::<u64>().ok()).sum()
}

#[tokio::test]
async fn the_link_monitor_recovers_when_the_kernel_had_to_drop_notifications() {
    let lab = lab("overrun").nodes(1).build().await.unwrap();
    let netns = lab.node(1).netns();
    let monitor = netns.run(LinkMonitor::open_here).unwrap().unwrap();
    let mut snapshots = monitor.watch();
    let eth0 = see(&mut snapshots, "eth0", |d| d.name == "eth0").await;
    // This blocks the test's runtime, so the monitor reads nothing meanwhile.
    let storm = async {
        let rtnl = Rtnl::open().unwrap();
        for round in 0..40_000 {
            if round % 100 == 0 && dropped_notifications(netns) > 0 {
                break;
            }
            rtnl.set_down(eth0.ifindex).await.unwrap();
            rtnl.set_up(eth0.ifindex).await.unwrap();
        }
        rtnl.add_address(eth0.ifindex, "10.0.0.88/32".parse().unwrap()).await.unwrap();
    };
    netns
        .run(|| {
            // Not inside the context of the test's runtime, which run() has entered.
            let thread = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(storm);
            std::thread::scope(|scope| scope.spawn(thread).join().unwrap());
        })
        .unwrap();
    assert!(dropped_notifications(netns) > 0, "nothing was dropped, so this test proves nothing");
    see(&mut snapshots, "the last change", |d| d.addresses.contains(&"10.0.0.88/32".parse().unwrap())).await;
    // And it still listens.
    lab.node(1).cut_link().await.unwrap();
    see(&mut snapshots, "a later change", |d| d.name == "eth0" && !d.running).await;
}

#[tokio::test]
async fn a_gratuitous_arp_arrives_on_the_lan_as_a_broadcast_request_for_the_address_itself() {
    let lab = lab("garp").nodes(1).build().await.unwrap();
    let vip = Ipv4Addr::new(10, 0, 0, 100);
    let client = lab.client();
    let heard_at = Rtnl::open_in(client.netns()).unwrap().device("eth0").await.unwrap().ifindex;
    let listener = client.netns().run(|| ArpSocket::open(heard_at)).unwrap().unwrap();

    let eth0 = Rtnl::open_in(lab.node(1).netns()).unwrap().device("eth0").await.unwrap();
    let sender = lab.node(1).netns().run(GarpSender::open).unwrap().unwrap();
    let mac = lab.node(1).mac().await.unwrap();
    sender.send(eth0.ifindex, mac, vip).unwrap();

    let deadline = Instant::now() + LIMIT;
    let heard = tokio::task::spawn_blocking(move || {
        loop {
            let arp = listener.receive(deadline).unwrap().expect("no gratuitous ARP on the LAN");
            if arp.sender == vip {
                return arp;
            }
        }
    });
    let arp = heard.await.unwrap();
    assert_eq!(arp.operation, arp::REQUEST);
    assert_eq!((arp.sender, arp.target), (vip, vip));
    assert_eq!((arp.sender_mac, arp.ethernet_source), (mac, mac));
    assert_eq!((arp.target_mac, arp.ethernet_destination), ([0xff; 6], [0xff; 6]));

    let error = sender.send(9999, mac, vip).unwrap_err().to_string();
    assert!(error.contains("10.0.0.100") && error.contains("9999"), "{error}");
}

#[test]
fn the_gratuitous_arp_is_what_an_independent_parser_reads() {
    let mac = [2, 0, 0, 0, 0, 1];
    let vip = Ipv4Addr::new(10, 0, 0, 100);
    let bytes = garp::frame(mac, vip);
    let packet = etherparse::SlicedPacket::from_ethernet(&bytes).unwrap();
    let Some(etherparse::LinkSlice::Ethernet2(ethernet)) = packet.link else { panic!("no Ethernet header") };
    assert_eq!((ethernet.source(), ethernet.destination()), (mac, [0xff; 6]));
    let Some(etherparse::NetSlice::Arp(arp)) = packet.net else { panic!("no ARP packet") };
    assert_eq!(arp.operation(), etherparse::ArpOperation::REQUEST);
    assert_eq!((arp.sender_hw_addr(), arp.target_hw_addr()), (&mac[..], &[0xff; 6][..]));
    assert_eq!((arp.sender_protocol_addr(), arp.target_protocol_addr()), (&vip.octets()[..], &vip.octets()[..]));
}

#[test]
fn whatever_is_no_ipv4_arp_is_not_read_as_one() {
    let good = garp::frame([2; 6], Ipv4Addr::new(10, 0, 0, 1));
    assert!(arp::parse(&good).is_some());
    for length in 0..good.len() {
        assert_eq!(arp::parse(&good[..length]), None, "{length} bytes");
    }
    for (offset, what) in [(12, "ethertype"), (14, "hardware"), (16, "protocol"), (18, "MAC length"), (19, "IP length")]
    {
        let mut bad = good;
        bad[offset] ^= 0x40;
        assert_eq!(arp::parse(&bad), None, "{what}");
    }
}

#[tokio::test]
async fn an_arp_probe_finds_exactly_those_who_answer() {
    let lab = lab("probe").nodes(3).build().await.unwrap();
    let address = Ipv4Addr::new(10, 0, 0, 99);
    assert_eq!(lab.client().arp_probe(address).await.unwrap(), Vec::<[u8; 6]>::new());
    assert_eq!(lab.client().arp_probe(lab.node(2).address()).await.unwrap(), vec![lab.node(2).mac().await.unwrap()]);

    let mut expected = Vec::new();
    for number in [1, 3] {
        let rtnl = Rtnl::open_in(lab.node(number).netns()).unwrap();
        let eth0 = rtnl.device("eth0").await.unwrap();
        rtnl.add_address(eth0.ifindex, "10.0.0.99/32".parse().unwrap()).await.unwrap();
        expected.push(eth0.mac.unwrap());
        let mut found = lab.client().arp_probe(address).await.unwrap();
        found.sort();
        expected.sort();
        assert_eq!(found, expected, "after node-{number} got the address too");
    }

    lab.node(3).cut_link().await.unwrap();
    assert_eq!(lab.client().arp_probe(address).await.unwrap(), vec![lab.node(1).mac().await.unwrap()]);
}
