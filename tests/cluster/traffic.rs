//! Every way to a Service, and what becomes of it when its endpoints change.

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};

use kinesin::lab::programs::ClientOptions;
use kinesin::lab::report::{LoadEvent, Reason};
use kinesin::lab::{HTTP_PORT, LoadHandle};
use serde_json::{Value, json};

use crate::fixture::{BOUND, Cluster, FIRST, Leases, PATIENT, answered_by, service, slice, web};

fn to(address: Ipv4Addr, port: u16) -> ClientOptions {
    ClientOptions::new(format!("http://{}/", SocketAddr::from((address, port)))).rate(100).timeout(PATIENT)
}

#[tokio::test(flavor = "multi_thread")]
async fn cluster_ips_node_ports_external_ips_and_vips_are_answered_from_hosts_pods_and_the_lan() {
    let cluster = Cluster::with_guide("frontends", Leases::Short).await;
    let pods = cluster.lab.pods();
    let spec = json!({"externalIPs": ["10.0.0.77"]});
    cluster.apply(&format!("{}\n---\n{}", service("web", &json!({}), &spec), slice("web", &pods)));
    cluster.has_addresses("default", "web", &["10.0.0.100"]).await;
    cluster.owner_of(FIRST).await;
    let external = Ipv4Addr::new(10, 0, 0, 77);
    cluster.owner_of(external).await;

    let object = cluster.read(&["service", "web"]);
    let cluster_ip: Ipv4Addr = object["spec"]["clusterIP"].as_str().unwrap().parse().unwrap();
    let node_port = u16::try_from(object["spec"]["ports"][0]["nodePort"].as_u64().unwrap()).unwrap();
    cluster
        .until("all frontends in the maps of all nodes", async || {
            for number in 1..=3 {
                let frontends = cluster.ask(number, &["services"])?;
                let ours = frontends.as_array().unwrap().iter().filter(|f| f["service"] == "default/web");
                let ours: Vec<_> = ours.filter(|f| f["portName"] == "http").collect();
                let kinds: std::collections::BTreeSet<_> = ours.iter().map(|f| f["type"].as_str().unwrap()).collect();
                let done = ours.iter().all(|f| f["status"] == "programmed");
                if kinds.len() != 4 || !done {
                    return Err(format!("{ours:?}"));
                }
            }
            Ok(())
        })
        .await;

    let (host, pod) = (cluster.lab.node(1), cluster.lab.pod(2, 1));
    let node = cluster.lab.node(3).address();
    let targets = [(cluster_ip, 80), (node, node_port), (external, 80), (FIRST, 80)];
    for (address, port) in targets {
        println!("from a host to {address}:{port}");
        answered_by(host.load(&to(address, port)).unwrap(), &pods).await;
        println!("from a pod to {address}:{port}");
        answered_by(pod.load(&to(address, port)).unwrap(), &pods).await;
    }
    for (address, port) in &targets[1..] {
        println!("from the client to {address}:{port}");
        answered_by(cluster.lab.client().load(&to(*address, *port)).unwrap(), &pods).await;
    }
}

/// Five requests, and each is refused: by ICMP on the wire, by the system call (EPERM) where sockets are translated.
async fn refused(mut load: LoadHandle) {
    let mut count = 0;
    while count < 5 {
        match tokio::time::timeout(BOUND, load.next_event()).await.unwrap().unwrap() {
            LoadEvent::Failed { reason: Reason::Refused, .. } => count += 1,
            LoadEvent::Failed { detail, .. } if detail.contains("not permitted") => count += 1,
            LoadEvent::Failed { reason, detail, .. } => panic!("{reason}: {detail}"),
            LoadEvent::Tick(totals) => assert_eq!(totals.succeeded, 0, "{totals:?}"),
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_without_endpoints_refuses_connections_and_serves_again_when_they_are_back() {
    let cluster = Cluster::with_guide("empty", Leases::Short).await;
    let pods = cluster.lab.pods();
    cluster.apply(&web("web", &pods));
    cluster.has_addresses("default", "web", &["10.0.0.100"]).await;
    cluster.owner_of(FIRST).await;
    cluster.answers("http://10.0.0.100/", &pods).await;

    cluster.apply(&slice("web", &[]));
    backends_everywhere(&cluster, "10.0.0.100:80/TCP", &[]).await;
    let host = cluster.lab.node(1);
    println!("from the client");
    refused(cluster.lab.client().load(&to(FIRST, 80)).unwrap()).await;
    println!("from a host");
    refused(host.load(&to(FIRST, 80)).unwrap()).await;

    cluster.apply(&slice("web", &pods[..3]));
    backends_everywhere(&cluster, "10.0.0.100:80/TCP", &pods[..3]).await;
    answered_by(cluster.lab.client().load(&to(FIRST, 80)).unwrap(), &pods[..3]).await;
    answered_by(host.load(&to(FIRST, 80)).unwrap(), &pods[..3]).await;
}

/// Waits until each node uses exactly these backends for a frontend.
async fn backends_everywhere(cluster: &Cluster, frontend: &str, pods: &[kinesin::lab::Pod]) {
    let mut wanted: Vec<String> =
        pods.iter().map(|pod| SocketAddrV4::new(pod.address(), HTTP_PORT).to_string()).collect();
    wanted.sort();
    cluster
        .until("these backends on every node", async || {
            for number in 1..=3 {
                let frontends = cluster.ask(number, &["services"])?;
                let found = frontends.as_array().unwrap().iter().find(|f| f["address"] == frontend);
                let found = found.ok_or_else(|| format!("no {frontend} on node-{number}"))?;
                let used = found["backends"].as_array().unwrap().iter().filter(|b| b["state"] == "active");
                let mut backends: Vec<String> = used.map(|b| b["address"].as_str().unwrap().into()).collect();
                backends.sort();
                if backends != wanted || found["status"] != "programmed" {
                    return Err(format!("node-{number}: {found}"));
                }
            }
            Ok(())
        })
        .await;
}

/// The raw entries of a table in the kernel, as a set.
fn dump(cluster: &Cluster, number: usize, table: &str) -> Result<std::collections::BTreeSet<String>, String> {
    let rows: Value = cluster.ask(number, &["dump", table])?;
    Ok(rows.as_array().unwrap().iter().map(ToString::to_string).collect())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_edited_endpoint_slice_reaches_the_maps_of_every_node_and_touches_no_other_service() {
    let cluster = Cluster::with_guide("edit", Leases::Short).await;
    let pods = cluster.lab.pods();
    let frontend = "10.0.0.100:80/TCP";
    // One after the other: what is already there when the pool comes is served by age and name.
    cluster.apply(&web("web", &pods));
    cluster.has_addresses("default", "web", &["10.0.0.100"]).await;
    cluster.apply(&web("other", &pods[4..]));
    cluster.has_addresses("default", "other", &["10.0.0.101"]).await;
    backends_everywhere(&cluster, frontend, &pods).await;
    backends_everywhere(&cluster, "10.0.0.101:80/TCP", &pods[4..]).await;
    let nodes = 1..=3;
    let before: Vec<_> = nodes.clone().map(|n| dump(&cluster, n, "backends").unwrap()).collect();

    // pod-1-1 goes: its backends leave the maps of every node, and nothing else does.
    cluster.apply(&slice("web", &pods[1..]));
    backends_everywhere(&cluster, frontend, &pods[1..]).await;
    for number in nodes.clone() {
        let before = &before[number - 1];
        cluster
            .until("the backend is out of the map", async || {
                let now = dump(&cluster, number, "backends")?;
                let gone = before.difference(&now).count();
                // One for the port of each kind: http and echo.
                if gone == 2 && now.is_subset(before) { Ok(()) } else { Err(format!("{before:?} to {now:?}")) }
            })
            .await;
    }
    // And is back.
    cluster.apply(&slice("web", &pods));
    backends_everywhere(&cluster, frontend, &pods).await;
    cluster.owner_of(FIRST).await;
    cluster.answers("http://10.0.0.100/", &pods).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_become_backends_through_the_real_endpoint_slice_controller() {
    let mut cluster = Cluster::with_guide("controller", Leases::Short).await;
    let args = ["--controllers=endpointslice-controller", "--leader-elect=false", "--secure-port=0"];
    cluster.plane.start_component("kube-controller-manager", &args).unwrap();
    cluster.apply(&service("web", &json!({}), &json!({"selector": {"app": "web"}})));
    let pods = cluster.lab.pods();
    for pod in &pods {
        cluster.apply(
            &json!({
                "apiVersion": "v1", "kind": "Pod", "metadata": {"name": pod.name(), "labels": {"app": "web"}},
                "spec": {"nodeName": pod.node(), "containers": [{"name": "web", "image": "none"}]},
            })
            .to_string(),
        );
    }
    let ready = |pod: &kinesin::lab::Pod, ready: &str| {
        let ip = pod.address();
        let status = json!({"status": {"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}],
            "conditions": [{"type": "Ready", "status": ready}]}});
        let status = status.to_string();
        cluster.kubectl(&["patch", "pod", pod.name(), "--subresource=status", "--type=merge", "-p", &status]);
    };
    pods.iter().for_each(|pod| ready(pod, "True"));
    cluster.has_addresses("default", "web", &["10.0.0.100"]).await;
    backends_everywhere(&cluster, "10.0.0.100:80/TCP", &pods).await;
    cluster.owner_of(FIRST).await;
    cluster.answers("http://10.0.0.100/", &pods).await;

    ready(&pods[0], "False");
    backends_everywhere(&cluster, "10.0.0.100:80/TCP", &pods[1..]).await;
    cluster.answers("http://10.0.0.100/", &pods[1..]).await;
}
