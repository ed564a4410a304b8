//! Host ports of pods that a real API server has, with the rights that are shipped; and health-check ports that it gives.

use serde_json::{Value, json};

use super::fixture::{Cluster, Leases, service};
use kinesin::lab::HTTP_PORT;

const PORT: u16 = 8088;

fn pod(name: &str, node: &str) -> String {
    json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"app": "web"}},
        "spec": {"nodeName": node, "containers": [{
            "name": "web", "image": "web", "ports": [{"containerPort": HTTP_PORT, "hostPort": PORT}],
        }]},
    })
    .to_string()
}

/// Says of a pod what its kubelet would.
fn report(cluster: &Cluster, name: &str, status: &Value) {
    let status = json!({"status": status}).to_string();
    cluster.kubectl(&["patch", "pod", name, "--subresource=status", "--type=merge", "-p", &status]);
}

#[tokio::test(flavor = "multi_thread")]
async fn each_node_serves_the_host_ports_of_its_own_pods() {
    let cluster = Cluster::start("hostport", Leases::Default).await;
    // What a controller manager would make first.
    cluster.apply(&json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default"}}).to_string());
    for (name, number) in [("one", 1), ("two", 2)] {
        cluster.apply(&pod(name, cluster.lab.node(number).name()));
    }
    let get = async |number: usize| {
        let url = format!("http://{}:{PORT}/", cluster.lab.node(number).address());
        let answer = cluster.lab.client().get(&url).await.map_err(|error| error.to_string())?;
        answer.backend.map(|backend| backend.pod).ok_or("no pod answered".to_owned())
    };
    // A pod that is not running yet has nothing to serve.
    let pods = |number: usize| cluster.ask(number, &["get", "pods"]);
    cluster
        .until("the agent knows the pod", async || match pods(1)?["items"].as_array().map(Vec::as_slice) {
            Some([one]) if one["metadata"]["name"] == "one" => Ok(()),
            other => Err(format!("{other:?}")),
        })
        .await;
    let refused = get(1).await.unwrap_err();
    assert!(refused.contains("refused"), "{refused}");
    for (name, number) in [("one", 1), ("two", 2)] {
        let address = cluster.lab.pod(number, 1).address();
        report(&cluster, name, &json!({"phase": "Running", "podIP": address, "podIPs": [{"ip": address}]}));
        let own = cluster.lab.pod(number, 1);
        cluster
            .until("the port leads to the pod", async || match get(number).await? {
                pod if pod == own.name() => Ok(()),
                other => Err(other),
            })
            .await;
    }
    assert!(get(3).await.unwrap_err().contains("refused"), "a node without such a pod serves nothing");
    // Kept is what host ports need, and nothing of other nodes' pods.
    let kept = pods(1).unwrap();
    assert_eq!(kept["items"].as_array().map(Vec::len), Some(1), "{kept}");
    assert_eq!(kept["items"][0]["metadata"].get("labels"), None, "{kept}");

    report(&cluster, "one", &json!({"phase": "Failed"}));
    let gone = async || get(1).await.err().filter(|error| error.contains("refused")).map(drop).ok_or("answers".into());
    cluster.until("a pod that ended serves nothing", gone).await;
    cluster.kubectl(&["delete", "pod", "two", "--grace-period=0", "--force"]);
    let gone = async || get(2).await.err().filter(|error| error.contains("refused")).map(drop).ok_or("answers".into());
    cluster.until("nor does one that was deleted", gone).await;

    // The API server gives a health-check port; the agents answer there at once.
    cluster.apply(&service("local", &json!({}), &json!({"externalTrafficPolicy": "Local"})));
    let port = cluster.read(&["service", "local"])["spec"]["healthCheckNodePort"].as_u64().unwrap();
    cluster
        .until("the health-check port answers", async || {
            let url = format!("http://{}:{port}/", cluster.lab.node(1).address());
            let answer = cluster.lab.client().get(&url).await.map_err(|error| error.to_string())?;
            let body: Value = serde_json::from_str(&answer.body).map_err(|error| error.to_string())?;
            assert_eq!((answer.status, &body["localEndpoints"]), (503, &json!(0)), "{body}");
            Ok(())
        })
        .await;
}
