//! Host ports of pods: from the LAN, from the node itself, through loopback, and who has one that two pods want.

use std::net::Ipv4Addr;
use std::time::Duration;

use kinesin::lab::programs::ClientOptions;
use kinesin::lab::{ECHO_PORT, HTTP_PORT, LabError, LoadHandle, Pod};
use serde_json::{Value, json};

use super::rig::{LIMIT, Rig, eventually};

const PORT: u16 = 8088;

fn object(pod: &Pod, name: &str, created: &str, ports: &Value) -> Value {
    json!({"apiVersion": "v1", "kind": "Pod",
           "metadata": {"name": name, "namespace": "default", "uid": format!("uid-{name}"), "creationTimestamp": created},
           "spec": {"nodeName": pod.node(), "containers": [{"name": "web", "ports": ports}]},
           "status": {"podIPs": [{"ip": pod.address()}]}})
}

fn http(more: &Value) -> Value {
    let mut port = json!({"name": "http", "containerPort": HTTP_PORT, "hostPort": PORT});
    port.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    json!([port])
}

/// Waits until the client on the LAN is answered by this pod.
async fn leads_to(rig: &Rig, address: Ipv4Addr, port: u16, pod: &Pod) {
    eventually(&format!("{address}:{port} leads to {}", pod.name()), async || {
        let answer =
            rig.lab.client().get(&format!("http://{address}:{port}/")).await.map_err(|error| error.to_string())?;
        match answer.backend {
            // The client's address is kept: the pod is on this node.
            Some(backend) if backend.pod == pod.name() => {
                assert_eq!(backend.client.ip(), std::net::IpAddr::from(rig.lab.client().address()));
                Ok(())
            }
            other => Err(format!("{other:?}")),
        }
    })
    .await;
}

/// Which pod answers a program that runs there, with everything that concerns its sockets.
async fn answered(load: Result<LoadHandle, LabError>) -> Result<String, String> {
    let load = load.unwrap();
    load.wait_for("an answer or a failure", LIMIT, |totals| totals.succeeded + totals.failed > 0).await.unwrap();
    let totals = load.stop().await.unwrap();
    match totals.backends.keys().next() {
        Some(pod) if totals.failed == 0 => Ok(pod.clone()),
        _ => Err(format!("{totals:?}")),
    }
}

/// Requests that a busy machine does not make fail.
fn patient(url: &str) -> ClientOptions {
    ClientOptions::new(url).timeout(Duration::from_secs(5))
}

async fn refuses(rig: &Rig, address: Ipv4Addr, port: u16) {
    eventually(&format!("{address}:{port} leads nowhere"), async || {
        match rig.lab.client().get(&format!("http://{address}:{port}/")).await {
            Err(error) if error.to_string().contains("refused") => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_port_leads_to_its_pod_from_everywhere_and_moves_with_it() {
    let rig = Rig::start("hostport", &[]).await;
    let (node, pods) = (rig.lab.node(1), [1, 2].map(|number| rig.lab.pod(1, number)));
    rig.put("a", &object(&pods[0], "a", "2026-01-01T00:00:00Z", &http(&json!({}))));
    leads_to(&rig, node.address(), PORT, &pods[0]).await;

    // From the node itself: its address, and loopback through the sockets; from another node over the LAN.
    for url in [format!("http://{}:{PORT}/", node.address()), format!("http://127.0.0.1:{PORT}/")] {
        assert_eq!(answered(node.load(&patient(&url))).await, Ok(pods[0].name().to_owned()), "{url}");
    }
    let url = format!("http://{}:{PORT}/", node.address());
    assert_eq!(answered(rig.lab.node(2).load(&patient(&url))).await, Ok(pods[0].name().to_owned()));
    // From another pod of the node, whose own loopback is nobody else's.
    assert_eq!(answered(pods[1].load(&patient(&url))).await, Ok(pods[0].name().to_owned()));
    let own = answered(pods[1].load(&patient(&format!("http://127.0.0.1:{PORT}/")))).await.unwrap_err();
    assert!(own.contains("efused"), "{own}");

    // It is seen as what it is.
    let services = rig.ask(1, "/v1/services").await;
    let key = format!("default/a:host-port:{PORT}:uid-a");
    let mine: Vec<&Value> = services.as_array().unwrap().iter().filter(|line| line["service"] == *key).collect();
    assert_eq!(mine.len(), 2, "{services}");
    assert!(mine.iter().all(|line| line["type"] == "HostPort" && line["status"] == "programmed"), "{services}");
    assert_eq!(rig.metric(1, "kinesin_host_ports", "").await, Some(1.0));
    assert_eq!(rig.status(1).await.kube_proxy_replacement.services["HostPort"], "Enabled");
    // The other node reads its own pods only.
    assert_eq!(rig.ask(2, "/v1/objects/pods").await, json!([]));
    assert_eq!(rig.ask(1, "/v1/objects/pods").await[0]["metadata"]["name"], "a");

    // A younger pod that wants the same port is told; its other port works.
    let both = json!([http(&json!({}))[0], {"name": "echo", "containerPort": ECHO_PORT, "hostPort": 7000}, {"containerPort": HTTP_PORT, "hostPort": 8089}]);
    rig.put("b", &object(&pods[1], "b", "2026-01-02T00:00:00Z", &both));
    leads_to(&rig, node.address(), 8089, &pods[1]).await;
    leads_to(&rig, node.address(), PORT, &pods[0]).await;
    let text = "Pod default/b: spec.containers[web].ports[].hostPort: 8088/TCP is in use by Pod default/a; give one of the two another hostPort or hostIP";
    rig.has_problem(1, text, true).await;

    // It gets the port when the first one ends, and nobody has it when that ended too.
    let mut ended = object(&pods[0], "a", "2026-01-01T00:00:00Z", &http(&json!({})));
    ended["status"]["phase"] = "Succeeded".into();
    rig.put("a", &ended);
    leads_to(&rig, node.address(), PORT, &pods[1]).await;
    rig.has_problem(1, "hostPort", false).await;
    rig.remove("b");
    refuses(&rig, node.address(), PORT).await;
    refuses(&rig, node.address(), 8089).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn host_ip_and_node_ports_are_respected_and_agents_that_restart_keep_the_port() {
    let rig = Rig::start("hostip", &[]).await;
    let (node, pod) = (rig.lab.node(1), rig.lab.pod(1, 1));
    let put = |ports: &Value| rig.put("a", &object(&pod, "a", "2026-01-01T00:00:00Z", ports));

    // Loopback is for the node's own sockets.
    put(&http(&json!({"hostIP": "127.0.0.1"})));
    eventually("loopback leads to the pod", async || {
        answered(node.load(&patient(&format!("http://127.0.0.1:{PORT}/")))).await
    })
    .await;
    refuses(&rig, node.address(), PORT).await;

    put(&http(&json!({"hostIP": node.address()})));
    leads_to(&rig, node.address(), PORT, &pod).await;

    put(&http(&json!({"hostIP": "192.0.2.9"})));
    rig.has_problem(
        1,
        "Pod default/a: spec.containers[web].ports[].hostIP: 192.0.2.9 is not an address of this node",
        true,
    )
    .await;
    refuses(&rig, node.address(), PORT).await;
    put(&http(&json!({"hostPort": 30_500})));
    rig.has_problem(
        1,
        "hostPort: 30500 is among the ports that NodePorts come from (30000-32767, node-port-range)",
        true,
    )
    .await;
    // Live: the range moves away.
    node.set_config("node-port-range", "31000,31999").unwrap();
    leads_to(&rig, node.address(), 30_500, &pod).await;
    rig.has_problem(1, "hostPort", false).await;

    // Its actors may fail; the port stays.
    for actor in ["pod_watcher", "endpoint_syncer", "map_writer"] {
        let killed = rig.agent(1).post("/v1/debug/kill", &json!({"actor": actor})).await.unwrap();
        assert_eq!(killed.0, 204, "{actor}: {}", killed.1);
        eventually("everybody runs again", async || {
            let tree = rig.ask(1, "/v1/tree").await.to_string();
            if tree.contains(r#""state":"restarting""#) { Err(tree) } else { Ok(()) }
        })
        .await;
        leads_to(&rig, node.address(), 30_500, &pod).await;
    }
    rig.remove("a");
    refuses(&rig, node.address(), 30_500).await;
}
