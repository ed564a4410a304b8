//! What the real agent tells of its Services: the metrics that Cilium's dashboards ask for, scraped over the LAN, and
//! `kinesin services --wide`.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::process::Command;

use kinesin::lab::HTTP_PORT;
use serde_json::{Value, json};

use super::rig::{Rig, eventually};

const METRICS: u16 = 9962;
const VIP: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 100);

/// Series with their labels, as written, and their values.
async fn scrape(rig: &Rig, number: usize) -> BTreeMap<String, f64> {
    let url = format!("http://{}:{METRICS}/metrics", rig.lab.node(number).address());
    let text = rig.lab.client().get(&url).await.unwrap().body;
    let series = text.lines().filter(|line| !line.starts_with('#') && !line.is_empty());
    series
        .map(|line| line.rsplit_once(' ').unwrap())
        .map(|(name, value)| (name.to_owned(), value.parse().unwrap()))
        .collect()
}

/// Waits until a series has at least this value.
async fn reaches(rig: &Rig, number: usize, series: &str, least: f64) {
    eventually(&format!("{series} of at least {least}"), async || {
        let all = scrape(rig, number).await;
        let name = series.split('{').next().unwrap();
        match all.get(series) {
            Some(value) if *value >= least => Ok(()),
            _ => Err(format!("{:?}", all.iter().filter(|(known, _)| known.starts_with(name)).collect::<Vec<_>>())),
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn dashboards_find_the_metrics_of_services_under_ciliums_names() {
    let rig =
        Rig::start("metrics", &[("prometheus-serve-addr", &format!(":{METRICS}")), ("map-verify-interval", "1s")])
            .await;
    let spec = |port: u16| json!({"type": "LoadBalancer", "clusterIP": "10.43.0.10", "ports": [{"name": "http", "port": port, "targetPort": HTTP_PORT}]});
    rig.put_service("web", &spec(80), &[VIP]);
    let ready = |ready: bool| [(rig.lab.pod(1, 1), json!({"ready": ready}))];
    rig.put_endpoints("web", &json!([{"name": "http", "port": HTTP_PORT}]), &ready(true));
    eventually("the service answers", async || {
        rig.lab.client().get(&format!("http://{VIP}/")).await.map(drop).map_err(|error| error.to_string())
    })
    .await;
    let owner = eventually("somebody owns the address", async || {
        let vips = rig.ask(1, "/v1/vips").await;
        let owner = vips[0]["owner"].as_str().ok_or(vips.to_string())?.to_owned();
        rig.lab.nodes().iter().position(|node| node.name() == owner).map(|at| at + 1).ok_or(owner)
    })
    .await;

    reaches(&rig, owner, r#"cilium_services_events_total{action="add"}"#, 1.0).await;
    reaches(&rig, owner, r#"cilium_forward_count_total{direction="INGRESS"}"#, 1.0).await;
    reaches(&rig, owner, r#"cilium_forward_bytes_total{direction="INGRESS"}"#, 60.0).await;
    reaches(&rig, owner, r#"cilium_bpf_map_ops_total{map_name="frontends",operation="update",outcome="success"}"#, 3.0)
        .await;
    reaches(&rig, owner, r#"cilium_bpf_map_pressure{map_name="frontends"}"#, f64::MIN_POSITIVE).await;
    reaches(&rig, owner, r#"cilium_bpf_map_capacity{map_group="frontends"}"#, 65_536.0).await;
    reaches(&rig, owner, "cilium_bpf_maps_virtual_memory_max_bytes", 1e6).await;
    reaches(&rig, owner, "cilium_process_resident_memory_bytes", 1e6).await;
    reaches(&rig, owner, "process_resident_memory_bytes", 1e6).await;
    reaches(&rig, owner, "cilium_nodes_all_num", 2.0).await;
    let version = format!(
        r#"cilium_version{{version="{}",revision="",arch="{}"}}"#,
        env!("CARGO_PKG_VERSION"),
        std::env::consts::ARCH
    );
    reaches(&rig, owner, &version, 1.0).await;
    reaches(&rig, owner, r#"cilium_kubernetes_events_total{scope="Service",action="create",outcome="success"}"#, 1.0)
        .await;
    let received = r#"cilium_kubernetes_events_received_total{scope="EndpointSlice",action="create",validity="valid",equal="false"}"#;
    reaches(&rig, owner, received, 1.0).await;

    // An edit, a port that no service has, and the end of the service.
    rig.put_service("web", &spec(81), &[VIP]);
    reaches(&rig, owner, r#"cilium_services_events_total{action="update"}"#, 1.0).await;
    reaches(&rig, owner, r#"cilium_service_implementation_delay_count{action="upsert"}"#, 1.0).await;
    let dropped = rig.lab.client().get(&format!("http://{VIP}:99/")).await;
    assert!(dropped.is_err(), "{dropped:?}");
    reaches(&rig, owner, r#"cilium_drop_count_total{reason="Service backend not found",direction="INGRESS"}"#, 1.0)
        .await;
    rig.remove("service-web");
    reaches(&rig, owner, r#"cilium_services_events_total{action="delete"}"#, 1.0).await;
    reaches(&rig, owner, r#"cilium_bpf_map_ops_total{map_name="frontends",operation="delete",outcome="success"}"#, 1.0)
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn services_in_full_come_from_the_objects_as_they_are() {
    let rig = Rig::start("wide", &[]).await;
    let spec = json!({
        "type": "LoadBalancer", "clusterIP": "10.43.0.10", "externalTrafficPolicy": "Local", "healthCheckNodePort": 31_000,
        "sessionAffinity": "ClientIP", "loadBalancerSourceRanges": ["10.0.0.0/24"],
        "ports": [{"name": "http", "port": 80, "nodePort": 30_080, "targetPort": HTTP_PORT}],
    });
    rig.put_service("web", &spec, &[VIP]);
    let conditions = [json!({}), json!({"ready": false})];
    let mut pods: Vec<_> = conditions.into_iter().zip(1..).map(|(c, number)| (rig.lab.pod(1, number), c)).collect();
    pods.push((rig.lab.pod(2, 1), json!({})));
    rig.put_endpoints("web", &json!([{"name": "http", "port": HTTP_PORT}]), &pods);

    let wide = async || {
        let mut command = Command::new(rig.lab.binary());
        command.args(["services", "--wide", "-o", "json", "--socket-path"]).arg(rig.lab.node(1).agent_socket());
        let output = tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice::<Value>(&output.stdout).unwrap()
    };
    let line = eventually("the frontend with all three backends", async || {
        let lines = wide().await;
        let address = format!("{VIP}:80/TCP");
        let mine =
            lines.as_array().unwrap().iter().find(|line| line["address"] == address && line["scope"] == "external");
        mine.filter(|line| line["backends"].as_array().map(Vec::len) == Some(3)).cloned().ok_or(lines.to_string())
    })
    .await;
    assert_eq!((&line["externalTrafficPolicy"], &line["internalTrafficPolicy"]), (&json!("Local"), &json!("Cluster")));
    assert_eq!((&line["sessionAffinitySeconds"], &line["healthCheckNodePort"]), (&json!(10_800), &json!(31_000)));
    assert_eq!((&line["sourceRangesPolicy"], &line["sourceRanges"]), (&json!("allow"), &json!(["10.0.0.0/24"])));
    let said: Vec<(&Value, &Value)> =
        line["backends"].as_array().unwrap().iter().map(|backend| (&backend["weight"], &backend["unused"])).collect();
    let elsewhere = json!("on another node, and the traffic policy is Local");
    assert_eq!(said, [(&json!(1), &Value::Null), (&json!(0), &json!("not ready")), (&json!(0), &elsewhere)]);
}
