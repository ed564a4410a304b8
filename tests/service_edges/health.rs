//! Health-check node ports and kube-proxy's `/healthz`, asked over the LAN.

use std::net::Ipv4Addr;
use std::process::Command;

use kinesin::lab::HTTP_PORT;
use serde_json::{Value, json};

use super::rig::{Answer, Rig, eventually, get};

const VIP: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 100);
const CHECK: u16 = 31_000;
const HEALTHZ: u16 = 10_256;

fn spec(more: &Value) -> Value {
    let mut spec = json!({
        "type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": CHECK,
        "clusterIP": "10.43.0.10", "ports": [{"name": "http", "port": 80, "nodePort": 30_080, "targetPort": HTTP_PORT}],
    });
    spec.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    spec
}

fn ports() -> Value {
    json!([{"name": "http", "port": HTTP_PORT}])
}

/// Waits until the port of a node says this many.
async fn says(rig: &Rig, number: usize, address: Ipv4Addr, local: usize) -> Answer {
    eventually(&format!("node-{number} says {local}"), async || {
        let answer = get(rig.lab.client().netns(), address, CHECK, "/").await?;
        if answer.body["localEndpoints"] == local { Ok(answer) } else { Err(format!("{answer:?}")) }
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn each_node_tells_how_many_pods_it_has_as_kube_proxy_does() {
    let rig = Rig::start("health", &[("enable-health-check-loadbalancer-ip", "true")]).await;
    let (first, second) = (rig.lab.node(1).address(), rig.lab.node(2).address());
    rig.put_service("web", &spec(&json!({})), &[VIP]);
    let pods = |ready: bool| [1, 2].map(|number| (rig.lab.pod(1, number), json!({"ready": ready})));
    rig.put_endpoints("web", &ports(), &pods(true));

    let answer = says(&rig, 1, first, 2).await;
    assert_eq!(answer.status, 200);
    assert_eq!(answer.header("content-type"), Some("application/json"));
    assert_eq!(answer.header("x-content-type-options"), Some("nosniff"));
    assert_eq!(answer.header("x-load-balancing-endpoint-weight"), Some("2"));
    let body =
        json!({"service": {"namespace": "default", "name": "web"}, "localEndpoints": 2, "serviceProxyHealthy": true});
    assert_eq!(answer.body, body);
    let answer = says(&rig, 2, second, 0).await;
    assert_eq!((answer.status, answer.header("x-load-balancing-endpoint-weight")), (503, Some("0")));
    assert_eq!(rig.metric(1, "kinesin_health_check_ports", r#"state="open""#).await, Some(1.0));

    // At the load balancer's address, the node that has it answers for itself.
    let owner = eventually("somebody answers at the address", async || {
        let answer = get(rig.lab.client().netns(), VIP, CHECK, "/").await?;
        answer.body["localEndpoints"].as_u64().ok_or(format!("{answer:?}"))
    })
    .await;
    assert_eq!(owner, 2, "only the node with pods may own the address of a Local service");

    // Pods that are not ready do not count; a terminating one does not either.
    rig.put_endpoints("web", &ports(), &pods(false));
    assert_eq!(says(&rig, 1, first, 0).await.status, 503);
    rig.put_endpoints("web", &ports(), &pods(true));
    says(&rig, 1, first, 2).await;

    // The policy decides whether there is anything to ask.
    rig.put_service("web", &spec(&json!({"externalTrafficPolicy": "Cluster"})), &[VIP]);
    eventually("the port is closed", async || match get(rig.lab.client().netns(), first, CHECK, "/").await {
        Err(error) if error.contains("refused") => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await;
    assert_eq!(rig.metric(1, "kinesin_health_check_ports", r#"state="open""#).await, Some(0.0));

    // And so does the configuration, live.
    rig.put_service("web", &spec(&json!({})), &[VIP]);
    says(&rig, 1, first, 2).await;
    rig.lab.node(1).set_config("enable-health-check-nodeport", "false").unwrap();
    eventually("the port is closed", async || match get(rig.lab.client().netns(), first, CHECK, "/").await {
        Err(error) if error.contains("refused") => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await;
    rig.lab.node(1).set_config("enable-health-check-nodeport", "true").unwrap();
    says(&rig, 1, first, 2).await;

    // Addresses outside `nodeport-addresses` do not answer.
    rig.lab.node(1).set_config("nodeport-addresses", "192.0.2.0/24").unwrap();
    eventually("nothing is said here", async || match get(rig.lab.client().netns(), first, CHECK, "/").await? {
        answer if answer.status == 404 => Ok(()),
        answer => Err(format!("{answer:?}")),
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_that_somebody_else_has_is_named_and_taken_once_it_is_free() {
    let rig = Rig::start("taken", &[]).await;
    let node = rig.lab.node(1);
    let mut command = Command::new(rig.lab.binary());
    command.args(["lab-serve", "--pod", "squatter", "--node", node.name(), "--http-port", &CHECK.to_string()]);
    let squatter = node.spawn("squatter", command).unwrap();
    eventually("the squatter has the port", async || {
        node.get(&format!("http://{}:{CHECK}/", node.address())).await.map_err(|error| error.to_string())
    })
    .await;

    rig.put_service("web", &spec(&json!({})), &[]);
    rig.put_endpoints("web", &ports(), &[(rig.lab.pod(1, 1), json!({}))]);
    let text = "health-check-ports: Service default/web: spec.healthCheckNodePort 31000: listen on :31000: Address already in use";
    rig.has_problem(1, text, true).await;
    rig.has_problem(1, "end what has the port on this node, or give the Service another one", true).await;
    assert_eq!(rig.metric(1, "kinesin_health_check_ports", r#"state="failed""#).await, Some(1.0));
    // The other node is not concerned.
    says(&rig, 2, rig.lab.node(2).address(), 0).await;

    squatter.kill9();
    says(&rig, 1, node.address(), 1).await;
    rig.has_problem(1, "health-check-ports", false).await;

    // A panic of the actor opens the port again.
    let killed = rig.agent(1).post("/v1/debug/kill", &json!({"actor": "service_health"})).await.unwrap();
    assert_eq!(killed.0, 204, "{}", killed.1);
    eventually("it was started again", async || {
        let tree = rig.ask(1, "/v1/tree").await.to_string();
        if tree.contains(r#""panic":1"#) { Ok(()) } else { Err(tree) }
    })
    .await;
    says(&rig, 1, node.address(), 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn healthz_turns_503_when_the_autoscaler_is_about_to_delete_the_node() {
    let bind = format!("0.0.0.0:{HEALTHZ}");
    let rig = Rig::start("healthz", &[("kube-proxy-replacement-healthz-bind-address", &bind)]).await;
    let (client, node) = (rig.lab.client().netns(), rig.lab.node(1).address());
    let answer = get(client, node, HEALTHZ, "/healthz").await.unwrap();
    assert_eq!(answer.status, 200);
    assert_eq!(answer.header("content-type"), Some("application/json"));
    assert_eq!(answer.header("x-content-type-options"), Some("nosniff"));
    assert_eq!(answer.body["lastUpdated"], answer.body["currentTime"]);
    assert_eq!((&answer.body["nodeEligible"], &answer.body["healthy"]), (&json!(true), &json!(true)));
    assert_eq!(answer.body["status"]["IPv4"]["healthy"], true);

    // A cordoned node goes on serving.
    rig.put_node(1, &json!({"unschedulable": true}));
    let taint = |key: &str| json!({"taints": [{"key": key, "effect": "NoSchedule", "value": "1"}]});
    rig.put_node(1, &taint("node.kubernetes.io/unschedulable"));
    assert_eq!(get(client, node, HEALTHZ, "/healthz").await.unwrap().status, 200);

    rig.put_node(1, &taint("ToBeDeletedByClusterAutoscaler"));
    let drained = eventually("healthz says 503", async || match get(client, node, HEALTHZ, "/healthz").await? {
        answer if answer.status == 503 => Ok(answer),
        answer => Err(format!("{answer:?}")),
    })
    .await;
    assert_eq!((&drained.body["nodeEligible"], &drained.body["healthy"]), (&json!(false), &json!(true)));
    assert!(drained.body["lastUpdated"].as_str() < drained.body["currentTime"].as_str(), "{drained:?}");
    // The proxy itself is well: the kubelet must not restart it.
    let live = get(client, node, HEALTHZ, "/livez").await.unwrap();
    assert_eq!((live.status, live.body.get("nodeEligible")), (200, None));
    assert_eq!(get(client, rig.lab.node(2).address(), HEALTHZ, "/healthz").await.unwrap().status, 200);
    assert_eq!(
        rig.metric(1, "kinesin_proxy_health_answers_total", r#"path="healthz",code="503""#).await.map(|n| n >= 1.0),
        Some(true)
    );

    rig.put_node(1, &json!({}));
    eventually("healthz says 200", async || match get(client, node, HEALTHZ, "/healthz").await? {
        answer if answer.status == 200 => Ok(()),
        answer => Err(format!("{answer:?}")),
    })
    .await;
}
