//! Host ports of pods: where they lead, and who has one that several want.

use serde_json::json;

use super::*;
use crate::objects::Pod;
use crate::services::{HostContext, host_ports, object_of};

fn pod(name: &str, ports: Value) -> Pod {
    serde_json::from_value(json!({
        "metadata": {"name": name, "namespace": "default", "uid": format!("uid-{name}"), "creationTimestamp": "2026-01-01T00:00:00Z"},
        "spec": {"nodeName": "here", "containers": [{"name": "c", "ports": ports}]},
        "status": {"phase": "Running", "podIPs": [{"ip": "10.42.0.1"}]},
    }))
    .expect("a Pod")
}

fn host() -> HostContext {
    let addresses = ["192.168.1.1", "10.8.0.1", "fd01::1"].map(|text| text.parse().expect("address"));
    HostContext { addresses: addresses.into(), node_ports: (30_000, 32_767) }
}

fn lines(pods: &[Pod]) -> (Vec<String>, Vec<String>) {
    let compiled = host_ports(pods.iter(), &host(), &node());
    let shown = compiled.values().flat_map(show).collect();
    let named = |(key, compiled): (&crate::services::ServiceKey, &Compiled)| {
        compiled
            .problems
            .iter()
            .map(|text| format!("{} {}: {text}", object_of(key).0, object_of(key).1))
            .collect::<Vec<_>>()
    };
    (shown, compiled.iter().flat_map(named).collect())
}

fn problem(port: Value) -> String {
    let (shown, problems) = lines(&[pod("web", json!([port]))]);
    assert!(shown.is_empty() && problems.len() == 1, "{shown:?} {problems:?}");
    problems.into_iter().next().expect("one")
}

#[test]
fn a_host_port_is_at_the_nodes_addresses_and_for_local_sockets() {
    let web = pod("web", json!([{"name": "http", "containerPort": 80, "hostPort": 8080}, {"containerPort": 81}]));
    let compiled = host_ports([&web].into_iter(), &host(), &node());
    let keys: Vec<String> = compiled.keys().map(ToString::to_string).collect();
    assert_eq!(keys, ["default/web:host-port:8080:uid-web"], "as Cilium names it");
    let (shown, problems) = lines(&[web]);
    assert_eq!(
        shown,
        [
            "0.0.0.0:8080/TCP HostPort [10.42.0.1:80] [10.42.0.1:80]",
            "192.168.1.1:8080/TCP HostPort [10.42.0.1:80] [10.42.0.1:80]"
        ]
    );
    assert!(problems.is_empty(), "{problems:?}");
}

#[test]
fn both_families_of_a_pod_are_served() {
    let mut web = pod("web", json!([{"containerPort": 80, "hostPort": 8080, "protocol": "UDP"}]));
    web.status.pod_ips.push(serde_json::from_value(json!({"ip": "fd00::7"})).expect("an address"));
    let (shown, _) = lines(&[web]);
    let addresses: Vec<&str> = shown.iter().map(|line| line.split(' ').next().unwrap_or_default()).collect();
    assert_eq!(addresses, ["0.0.0.0:8080/UDP", "192.168.1.1:8080/UDP", "[::]:8080/UDP", "[fd01::1]:8080/UDP"]);
}

#[test]
fn host_ip_says_where() {
    let at = |ip: &str| {
        let (shown, problems) = lines(&[pod("web", json!([{"containerPort": 80, "hostPort": 8080, "hostIP": ip}]))]);
        assert!(problems.is_empty(), "{problems:?}");
        shown.iter().map(|line| line.split(' ').next().unwrap_or_default().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(at("0.0.0.0"), at(""), "as Cilium documents it");
    assert_eq!(at("::"), at(""));
    // Also of a device that serves no NodePorts.
    assert_eq!(at("10.8.0.1"), ["10.8.0.1:8080/TCP"]);
    assert_eq!(at("::ffff:10.8.0.1"), ["10.8.0.1:8080/TCP"]);
    assert_eq!(at("127.0.0.1"), ["0.0.0.0:8080/TCP"], "only sockets look there, and only for loopback");
}

#[test]
fn what_cannot_be_served_names_pod_field_and_fix() {
    for (port, text) in [
        (
            json!({"containerPort": 80, "hostPort": 8080, "protocol": "SCTP"}),
            "Pod default/web: spec.containers[c].ports[].hostPort: SCTP ports are not rewritten, so 8080 does not reach container port 80; make the two equal",
        ),
        (
            json!({"containerPort": 80, "hostPort": 30_080}),
            "Pod default/web: spec.containers[c].ports[].hostPort: 30080 is among the ports that NodePorts come from (30000-32767, node-port-range) and is not served; use one outside them",
        ),
        (
            json!({"containerPort": 80, "hostPort": 8080, "hostIP": "192.0.2.9"}),
            "Pod default/web: spec.containers[c].ports[].hostIP: 192.0.2.9 is not an address of this node, so nothing comes to it; remove it for all of them",
        ),
        (
            json!({"containerPort": 80, "hostPort": 8080, "hostIP": "eth0"}),
            "Pod default/web: spec.containers[c].ports[].hostIP: \"eth0\" is not an IP address; correct or remove it",
        ),
        (
            json!({"containerPort": 80, "hostPort": 8080, "hostIP": "fd01::1"}),
            "Pod default/web: spec.containers[c].ports[].hostIP: the pod has no address of the family of fd01::1; remove it or give the pod one",
        ),
        (
            json!({"containerPort": 80, "hostPort": 8080, "protocol": "QUIC"}),
            "Pod default/web: spec.containers[c].ports[].protocol: \"QUIC\" is not supported; use TCP, UDP or SCTP",
        ),
        (
            json!({"hostPort": 8080}),
            "Pod default/web: spec.containers[c].ports[].containerPort: is missing or 0; use 1 to 65535",
        ),
    ] {
        assert_eq!(problem(port), text);
    }
}

#[test]
fn a_port_belongs_to_the_oldest_pod_and_the_other_one_is_told() {
    let old = pod("b-old", json!([{"containerPort": 80, "hostPort": 8080}]));
    let mut young =
        pod("a-young", json!([{"containerPort": 80, "hostPort": 8080}, {"containerPort": 81, "hostPort": 8081}]));
    young.metadata.creation_timestamp = "2026-01-02T00:00:00Z".into();
    young.status.pod_ips[0].ip = "10.42.0.2".into();
    for pods in [[old.clone(), young.clone()], [young.clone(), old.clone()]] {
        let (shown, problems) = lines(&pods);
        assert!(
            shown.iter().filter(|line| line.contains(":8080/")).all(|line| line.contains("10.42.0.1:80")),
            "{shown:?}"
        );
        assert!(
            shown.iter().any(|line| line.contains(":8081/") && line.contains("10.42.0.2:81")),
            "its other port works"
        );
        assert_eq!(
            problems,
            [
                "Pod default/a-young: spec.containers[c].ports[].hostPort: 8080/TCP is in use by Pod default/b-old; give one of the two another hostPort or hostIP"
            ]
        );
    }
    // Addresses and protocols that do not meet are no conflict; all addresses and one of them are.
    let at = |name: &str, more: Value| {
        let mut port = json!({"containerPort": 80, "hostPort": 8080});
        port.as_object_mut().expect("object").extend(more.as_object().expect("object").clone());
        pod(name, json!([port]))
    };
    let (_, problems) = lines(&[
        at("a", json!({"hostIP": "10.8.0.1"})),
        at("b", json!({"hostIP": "192.168.1.1"})),
        at("c", json!({"hostIP": "127.0.0.1"})),
        at("d", json!({"protocol": "UDP"})),
    ]);
    assert!(problems.is_empty(), "{problems:?}");
    let (_, problems) = lines(&[at("a", json!({"hostIP": "127.0.0.1"})), at("b", json!({}))]);
    assert!(
        problems.len() == 1 && problems[0].contains("Pod default/b") && problems[0].contains("by Pod default/a"),
        "{problems:?}"
    );
}

#[test]
fn a_successor_takes_the_port_of_one_that_ends() {
    let mut ending = pod("old", json!([{"containerPort": 80, "hostPort": 8080}]));
    ending.metadata.deletion_timestamp = Some("2026-01-03T00:00:00Z".into());
    let compiled = host_ports([&ending].into_iter(), &host(), &node());
    let backend = &compiled.values().next().expect("alone it goes on").sets[0].backends[0];
    assert_eq!(backend.state, kinesin_abi::BackendState::Terminating);
    let mut next = pod("new", json!([{"containerPort": 80, "hostPort": 8080}]));
    next.metadata.creation_timestamp = "2026-01-03T00:00:01Z".into();
    next.status.pod_ips[0].ip = "10.42.0.2".into();
    let (shown, problems) = lines(&[ending, next]);
    assert!(shown.iter().all(|line| line.contains("10.42.0.2:80")), "{shown:?}");
    assert!(problems[0].starts_with("Pod default/old") && problems[0].contains("Pod default/new"), "{problems:?}");
}

#[test]
fn pods_that_do_not_run_here_have_none() {
    let web = pod("web", json!([{"containerPort": 80, "hostPort": 8080}]));
    let changed = |change: fn(&mut Pod)| {
        let mut web = web.clone();
        change(&mut web);
        let (shown, problems) = lines(&[web]);
        assert!(shown.is_empty() && problems.is_empty(), "{shown:?} {problems:?}");
    };
    for phase in ["Pending", "Succeeded", "Failed", "Unknown", ""] {
        let mut web = web.clone();
        web.status.phase = phase.into();
        assert!(lines(&[web]).0.is_empty(), "{phase}");
    }
    changed(|pod| pod.spec.host_network = true);
    changed(|pod| pod.spec.node_name = "there".into());
    let beside_kube_proxy = NodeContext { kube_proxy_replacement: false, ..node() };
    assert!(
        host_ports([&web].into_iter(), &host(), &beside_kube_proxy).is_empty(),
        "the CNI plugin portmap serves them"
    );
}

#[test]
fn sidecars_serve_and_other_init_containers_do_not() {
    let mut web = pod("web", json!([]));
    web.spec.init_containers = serde_json::from_value(json!([
        {"name": "once", "ports": [{"containerPort": 1, "hostPort": 8001}]},
        {"name": "sidecar", "restartPolicy": "Always", "ports": [{"containerPort": 2, "hostPort": 8002}]},
    ]))
    .expect("containers");
    let (shown, _) = lines(&[web.clone()]);
    assert!(!shown.is_empty() && shown.iter().all(|line| line.contains(":8002/")), "{shown:?}");
    web.spec.init_containers[1].ports[0].host_port = 30_000;
    assert!(lines(&[web]).1[0].starts_with("Pod default/web: spec.initContainers[sidecar].ports[].hostPort: 30000"));
}

/// What the memory figures say: kept are only pods with host ports, without what nobody reads.
#[test]
fn a_kept_pod_is_small() {
    let mut web = pod("web", json!([{"name": "http", "containerPort": 80, "hostPort": 8080}, {"containerPort": 81}]));
    web.metadata.labels = serde_json::from_value(json!({"app": "web"})).expect("labels");
    web.metadata.annotations = serde_json::from_value(json!({"a": "b"})).expect("annotations");
    web.spec.containers.push(serde_json::from_value(json!({"name": "other", "ports": []})).expect("a container"));
    assert!(web.has_host_ports());
    web.slim();
    assert!(web.metadata.labels.is_empty() && web.metadata.annotations.is_empty());
    assert_eq!((web.spec.containers.len(), web.spec.containers[0].ports.len()), (1, 1));
    let bytes = size_of::<Pod>() + size_of::<crate::objects::Container>() + size_of::<crate::objects::ContainerPort>();
    assert!(bytes <= 640, "{bytes} bytes a pod with one host port");
    assert!(!pod("plain", json!([{"containerPort": 80}])).has_host_ports());
}
