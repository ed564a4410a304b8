//! What users of the guide do, in its order, with its files.

use std::net::IpAddr;

use serde_json::{Value, json};

use crate::fixture::{Cluster, FIRST, GUIDE, Leases, service, slice, web};

const BLUE: &str = include_str!("../../config/manifests/service-blue.yaml");

fn message_of(object: &Value, condition: &str) -> Option<String> {
    let conditions = object["status"]["conditions"].as_array()?;
    let found = conditions.iter().find(|c| c["type"] == condition)?;
    Some(found["message"].as_str().unwrap_or_default().to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_guides_pool_and_policy_applied_as_they_stand_give_a_service_an_address_that_the_lan_reaches_all_pods_at() {
    let cluster = Cluster::start("guide", Leases::Short).await;
    cluster.kinds_are_served().await;
    cluster.apply(GUIDE);
    cluster.apply(&web("web", &cluster.lab.pods()));

    cluster.has_addresses("default", "web", &["10.0.0.100"]).await;
    let shown = cluster.kubectl(&["get", "svc", "web"]);
    let row: Vec<&str> = shown.lines().nth(1).unwrap().split_whitespace().collect();
    assert_eq!((row[0], row[1], row[3]), ("web", "LoadBalancer", "10.0.0.100"), "{shown}");

    // 10.0.0.100 to 10.0.0.200 are 101 addresses.
    let pool = ["ciliumloadbalancerippool", "first-pool"];
    cluster
        .until("the pool's counters", async || {
            let object = cluster.read(&pool);
            let count = |name: &str| message_of(&object, name).unwrap_or_default();
            let counts = ["cilium.io/IPsTotal", "cilium.io/IPsAvailable", "cilium.io/IPsUsed"].map(count);
            if counts == ["101", "100", "1"] { Ok(()) } else { Err(format!("{counts:?}")) }
        })
        .await;
    let shown = cluster.kubectl(&["get", "ippools"]);
    let row: Vec<&str> = shown.lines().nth(1).unwrap().split_whitespace().collect();
    assert_eq!(row[..4], ["first-pool", "false", "False", "100"], "{shown}");

    // Exactly one answer, the owner's, and that is what the client's kernel believes.
    let owner = cluster.owner_of(FIRST).await;
    let mac = cluster.lab.node(owner).mac().await.unwrap();
    cluster.answers("http://10.0.0.100/", &cluster.lab.pods()).await;
    let table = cluster.lab.client().arp_table().await.unwrap();
    let entries: Vec<_> = table.iter().filter(|entry| entry.address == IpAddr::from(FIRST)).collect();
    assert_eq!(entries.len(), 1, "{table:?}");
    assert_eq!(entries[0].mac, Some(mac));

    // With the rights that are shipped nothing was refused, and nothing of the start is left to complain of.
    for number in cluster.running() {
        cluster
            .until("no problems", async || match &cluster.ask(number, &["status"])?["problems"] {
                Value::Array(problems) if problems.is_empty() => Ok(()),
                problems => Err(format!("node-{number}: {problems}")),
            })
            .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_annotation_gives_both_addresses_once_a_pool_contains_them_and_the_documented_reason_before() {
    let cluster = Cluster::with_guide("annotation", Leases::Short).await;
    cluster.kubectl(&["create", "namespace", "example"]);
    cluster.apply(BLUE);
    let message = "No pool exists with a CIDR containing '20.0.10.100'";
    cluster
        .until("the reason", async || {
            let (addresses, condition) = cluster.service_status("example", "service-blue");
            let wanted = ["False", "no_pool", message];
            if addresses.is_empty() && condition == wanted {
                Ok(())
            } else {
                Err(format!("{addresses:?} {condition:?}"))
            }
        })
        .await;

    cluster.apply(
        r#"{"apiVersion": "cilium.io/v2", "kind": "CiliumLoadBalancerIPPool", "metadata": {"name": "blue-pool"},
            "spec": {"blocks": [{"cidr": "20.0.10.0/24"}], "serviceSelector": {"matchLabels": {"color": "blue"}}}}"#,
    );
    cluster.has_addresses("example", "service-blue", &["20.0.10.100", "20.0.10.200"]).await;
    for address in ["20.0.10.100", "20.0.10.200"] {
        cluster.owner_of(address.parse().unwrap()).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn requested_addresses_are_honoured_unless_another_service_has_them() {
    let cluster = Cluster::with_guide("requested", Leases::Short).await;
    let pods = cluster.lab.pods();
    let asking = |name: &str, annotations: &Value, spec: &Value| {
        cluster.apply(&format!("{}\n---\n{}", service(name, annotations, spec), slice(name, &pods)));
    };
    asking("fixed", &json!({}), &json!({"loadBalancerIP": "10.0.0.150"}));
    cluster.has_addresses("default", "fixed", &["10.0.0.150"]).await;

    asking("two", &json!({"io.cilium/lb-ipam-ips": "10.0.0.160,10.0.0.161"}), &json!({}));
    cluster.has_addresses("default", "two", &["10.0.0.160", "10.0.0.161"]).await;
    for address in ["10.0.0.150", "10.0.0.160", "10.0.0.161"] {
        cluster.owner_of(address.parse().unwrap()).await;
        cluster.answers(&format!("http://{address}/"), &pods).await;
    }

    asking("late", &json!({"lbipam.cilium.io/ips": "10.0.0.150"}), &json!({}));
    cluster
        .until("the refusal", async || match cluster.service_status("default", "late") {
            (addresses, [status, reason, message])
                if addresses.is_empty() && status == "False" && reason == "already_allocated" =>
            {
                assert!(message.contains("10.0.0.150") && message.contains("default/fixed"), "{message}");
                Ok(())
            }
            other => Err(format!("{other:?}")),
        })
        .await;
    // Its turn comes when the address is free.
    cluster.kubectl(&["delete", "service", "fixed"]);
    cluster.has_addresses("default", "late", &["10.0.0.150"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_pool_is_refused_with_a_sentence_and_both_versions_of_pools_work() {
    let cluster = Cluster::start("kinds", Leases::Short).await;
    cluster.kinds_are_served().await;
    let pool = |version: &str, name: &str, colour: &str, block: Value| {
        json!({
            "apiVersion": format!("cilium.io/{version}"), "kind": "CiliumLoadBalancerIPPool",
            "metadata": {"name": name},
            "spec": {"blocks": [block], "serviceSelector": {"matchLabels": {"colour": colour}}},
        })
        .to_string()
    };
    let refused = |block: Value| {
        let yaml = pool("v2", "wrong", "none", block);
        cluster.try_kubectl(&["apply", "-f", "-"], &yaml).expect_err("refused")
    };
    let text = refused(json!({"stop": "10.0.0.9"}));
    assert!(text.contains("a block needs a cidr or a start"), "{text}");
    let text = refused(json!({"cidr": "10.0.0.0/33"}));
    assert!(text.contains("spec.blocks[0].cidr"), "{text}");
    let text = refused(json!({"start": "ten dot zero"}));
    assert!(text.contains("start is not an IP address"), "{text}");

    cluster.apply(&pool("v2", "new", "red", json!({"cidr": "10.0.0.96/29"})));
    cluster.apply(&pool("v2alpha1", "old", "green", json!({"start": "10.0.0.210", "stop": "10.0.0.211"})));
    for (name, wanted) in [("red", "10.0.0.96"), ("green", "10.0.0.210")] {
        let mut object: Value = serde_json::from_str(&service(name, &json!({}), &json!({}))).unwrap();
        object["metadata"]["labels"] = json!({"colour": name});
        cluster.apply(&object.to_string());
        cluster.has_addresses("default", name, &[wanted]).await;
    }
}
