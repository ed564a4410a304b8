//! The control plane that the cluster tests run against is a real one: it keeps what is applied, survives an outage with
//! it, keeps users to their rights, and runs in a network namespace of its own.

#![allow(clippy::unwrap_used, reason = "test code: a panic here is a failed test, with its place")]

mod support;

use std::fs::File;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use k8s_openapi::api::core::v1::Service;
use serde_json::Value;
use support::control_plane::{ControlPlane, Options, User};
use support::process::{Process, enter_netns};
use support::wait_until;

const WEB: &str = r#"
apiVersion: v1
kind: Service
metadata: { name: web }
spec:
  type: LoadBalancer
  allocateLoadBalancerNodePorts: true
  ports: [{ name: http, port: 80, targetPort: 8080 }]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: { name: web-1, labels: { kubernetes.io/service-name: web } }
addressType: IPv4
endpoints: [{ addresses: ["10.244.1.2"], conditions: { ready: true } }]
ports: [{ name: http, port: 8080 }]
"#;

fn read(plane: &ControlPlane, object: &str) -> Value {
    serde_json::from_str(&plane.kubectl_ok(&["get", object, "-o", "json"])).unwrap()
}

#[test]
fn what_is_applied_is_read_back_and_survives_an_outage() {
    let dir = tempfile::tempdir().unwrap();
    let mut plane = ControlPlane::start(dir.path(), Options::default()).unwrap();
    plane.kubectl_apply(WEB);

    let service = read(&plane, "service/web");
    let cluster_ip = service["spec"]["clusterIP"].as_str().unwrap().to_owned();
    assert!(cluster_ip.starts_with("10.96."), "from the service range: {cluster_ip}");
    assert!(service["spec"]["ports"][0]["nodePort"].is_u64());
    assert_eq!(read(&plane, "endpointslice/web-1")["endpoints"][0]["addresses"][0], "10.244.1.2");

    plane.kill();
    let refused = plane.kubectl(&["get", "service", "web"]);
    assert!(!refused.status.success(), "an API server that was killed does not answer");

    plane.restart().unwrap();
    assert_eq!(read(&plane, "service/web")["spec"]["clusterIP"], cluster_ip.as_str());

    plane.stop();
    plane.restart().unwrap();
    assert_eq!(read(&plane, "service/web")["spec"]["clusterIP"], cluster_ip.as_str());
}

#[test]
fn two_run_side_by_side_and_do_not_share_objects() {
    std::thread::scope(|scope| {
        for name in ["one", "two"] {
            scope.spawn(move || {
                let dir = tempfile::tempdir().unwrap();
                let plane = ControlPlane::start(dir.path(), Options::default()).unwrap();
                plane.kubectl_apply(&WEB.replace("name: web }", &format!("name: {name} }}")));
                let names = plane.kubectl_ok(&["get", "services", "-o", "name"]);
                assert_eq!(names.lines().collect::<Vec<_>>(), ["service/kubernetes", &format!("service/{name}")]);
            });
        }
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn the_agents_own_client_reads_it_with_the_rights_its_user_has() {
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let dir = tempfile::tempdir().unwrap();
    let users = vec![
        User { name: "reader".into(), groups: vec!["readers".into()] },
        User { name: "nobody".into(), groups: Vec::new() },
    ];
    let options = Options { users, ..Options::default() };
    let path = dir.path().to_owned();
    let plane = tokio::task::spawn_blocking(move || {
        let plane = ControlPlane::start(&path, options).unwrap();
        plane.kubectl_apply(WEB);
        plane.kubectl_ok(&["create", "clusterrole", "readers", "--verb=get", "--resource=services"]);
        plane.kubectl_ok(&["create", "clusterrolebinding", "readers", "--clusterrole=readers", "--group=readers"]);
        // The authorizer sees a role through a watch, a moment later.
        let allowed = ["auth", "can-i", "get", "services", "--as=reader", "--as-group=readers"];
        wait_until("the reader's rights", Duration::from_secs(60), || {
            let output = plane.kubectl(&allowed);
            output.status.success().then_some(()).ok_or_else(|| format!("{output:?}"))
        });
        plane
    })
    .await
    .unwrap();

    let services = async |user: &str| {
        let config = kube::config::Kubeconfig::read_from(plane.kubeconfig_of(user)).unwrap();
        let config = kube::Config::from_custom_kubeconfig(config, &Default::default()).await.unwrap();
        let services: kube::Api<Service> = kube::Api::namespaced(kube::Client::try_from(config).unwrap(), "default");
        services.get("web").await
    };
    assert_eq!(services("reader").await.unwrap().spec.unwrap().type_.as_deref(), Some("LoadBalancer"));
    match services("nobody").await {
        Err(kube::Error::Api(status)) => assert_eq!(status.code, 403),
        other => panic!("a user without a role may read nothing: {other:?}"),
    }
    tokio::task::spawn_blocking(move || drop(plane)).await.unwrap();
}

#[test]
fn it_runs_in_a_network_namespace_and_makes_slices_there() {
    let namespace = Namespace::with_address("10.88.0.1/24");
    let dir = tempfile::tempdir().unwrap();
    let options = Options { netns: Some(namespace.path()), bind: "10.88.0.1".parse().unwrap(), ..Options::default() };
    let mut plane = ControlPlane::start(dir.path(), options).unwrap();
    let own = ["get", "endpointslice", "-l", "kubernetes.io/service-name=kubernetes", "-o", ADDRESSES];
    wait_until_reads(&plane, &own, "10.88.0.1");

    // The controllers are upstream's too: a pod that is ready becomes an endpoint of the Service that selects it.
    let args = ["--controllers=endpointslice-controller", "--leader-elect=false", "--secure-port=0"];
    plane.start_component("kube-controller-manager", &args).unwrap();
    plane.kubectl_apply(
        r#"
apiVersion: v1
kind: Node
metadata: { name: node-1 }
---
apiVersion: v1
kind: Service
metadata: { name: blue }
spec: { selector: { app: blue }, ports: [{ port: 80 }] }
---
apiVersion: v1
kind: Pod
metadata: { name: blue-0, labels: { app: blue } }
spec: { nodeName: node-1, containers: [{ name: web, image: none }] }
"#,
    );
    let status = r#"{"status":{"phase":"Running","podIP":"10.244.1.2","podIPs":[{"ip":"10.244.1.2"}],
        "conditions":[{"type":"Ready","status":"True"}]}}"#;
    plane.kubectl_ok(&["patch", "pod", "blue-0", "--subresource=status", "--type=merge", "-p", status]);
    let slices = ["get", "endpointslice", "-l", "kubernetes.io/service-name=blue", "-o", ADDRESSES];
    wait_until_reads(&plane, &slices, "10.244.1.2");
}

const ADDRESSES: &str = "jsonpath={.items[*].endpoints[*].addresses[*]}";

fn wait_until_reads(plane: &ControlPlane, args: &[&str], want: &str) {
    wait_until(want, Duration::from_secs(120), || match plane.kubectl_ok(args) {
        text if text == want => Ok(()),
        other => Err(format!("kubectl {args:?} gives {other:?}")),
    });
}

#[test]
fn a_child_outlives_the_thread_that_started_it_but_not_its_owner() {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("sleep.log");
    let mut child = std::thread::spawn(move || {
        let mut command = Command::new("sleep");
        command.arg("3600");
        Process::spawn("sleep", command, None, &log).unwrap()
    })
    .join()
    .unwrap();
    // Had the kernel sent the death signal of that thread, the child would be gone by the time another has run.
    assert!(Command::new("true").status().unwrap().success());
    assert_eq!(child.exited(), None);

    let stat = PathBuf::from(format!("/proc/{}/stat", child.id()));
    assert!(stat.exists());
    drop(child);
    assert!(!stat.exists(), "killed and reaped");
}

/// A network namespace with one address on its loopback; it goes when the last descriptor and process in it are gone.
struct Namespace(File);

impl Namespace {
    fn with_address(address: &str) -> Self {
        let file = std::thread::spawn(|| {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            File::open("/proc/thread-self/ns/net").unwrap()
        })
        .join()
        .unwrap();
        let namespace = Self(file);
        for args in [["link", "set", "lo", "up"].as_slice(), &["address", "add", address, "dev", "lo"]] {
            let mut ip = Command::new("ip");
            enter_netns(ip.args(args), Some(&namespace.path())).unwrap();
            assert!(ip.status().unwrap().success(), "ip {args:?}");
        }
        namespace
    }

    fn path(&self) -> PathBuf {
        use std::os::fd::AsRawFd;
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd()).into()
    }
}
