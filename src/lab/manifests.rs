//! The cluster's objects as files: what users of Cilium apply, as they wrote it, and what a control plane would add.
//!
//! Only the lab's own service. Files are renamed into place, as agents watch the directory.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use super::{ECHO_PORT, HTTP_PORT, Lab, LabError};

/// A pool and a policy exactly as guides for homelabs have them.
pub const POOL_AND_POLICY: &str = include_str!("../../config/manifests/cilium-config.yaml");

/// The service's namespace and name.
pub const SERVICE: &str = "default/web";

/// Writes everything: pool and policy, nodes, the service and its endpoints.
///
/// # Errors
/// When a file can not be written.
pub fn write_all(lab: &Lab) -> Result<(), LabError> {
    let dir = lab.manifests_dir();
    put(&dir, "pool-and-policy.yaml", POOL_AND_POLICY)?;
    put(&dir, "nodes.yaml", &nodes(lab))?;
    put(&dir, "service.yaml", &service())?;
    write_endpoints(lab, &[])
}

/// Writes the endpoints anew, without those of nodes that are `down`: what a control plane does when a node is gone.
///
/// # Errors
/// When the file can not be written.
pub fn write_endpoints(lab: &Lab, down: &[&str]) -> Result<(), LabError> {
    put(&lab.manifests_dir(), "endpoints.yaml", &endpoints(lab, down))
}

/// Where the endpoints are.
pub fn path(lab: &Lab, file: &str) -> PathBuf {
    lab.manifests_dir().join(file)
}

fn put(dir: &Path, name: &str, text: &str) -> Result<(), LabError> {
    let path = dir.join(name);
    // Hidden, so that nobody reads it half written.
    let early = dir.join(format!(".{name}.new"));
    let written = std::fs::write(&early, text).and_then(|()| std::fs::rename(&early, &path));
    written.map_err(LabError::io(format!("write {}", path.display())))
}

fn nodes(lab: &Lab) -> String {
    let mut text = String::new();
    for node in lab.nodes() {
        let (name, address) = (node.name(), node.address());
        // Writing to a String can not fail.
        let _ = write!(
            text,
            "\
---
apiVersion: v1
kind: Node
metadata:
  name: {name}
  labels:
    kubernetes.io/hostname: {name}
    kubernetes.io/os: linux
status:
  addresses:
    - type: InternalIP
      address: {address}
    - type: Hostname
      address: {name}
"
        );
    }
    text
}

fn service() -> String {
    format!(
        "\
# Try: another address with `loadBalancerIP: 10.0.0.150` under spec, or a second service beside this one.
apiVersion: v1
kind: Service
metadata:
  name: web
  namespace: default
spec:
  type: LoadBalancer
  clusterIP: 10.43.0.10
  clusterIPs: [10.43.0.10]
  ipFamilies: [IPv4]
  selector:
    app: web
  ports:
    - name: http
      port: 80
      targetPort: {HTTP_PORT}
    - name: echo
      port: {ECHO_PORT}
      targetPort: {ECHO_PORT}
"
    )
}

fn endpoints(lab: &Lab, down: &[&str]) -> String {
    let mut text = format!(
        "\
# Try: take an endpoint away, or set a condition `ready: false`, and watch its requests stop.
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: web-1
  namespace: default
  labels:
    kubernetes.io/service-name: web
addressType: IPv4
ports:
  - name: http
    protocol: TCP
    port: {HTTP_PORT}
  - name: echo
    protocol: TCP
    port: {ECHO_PORT}
endpoints:
"
    );
    let pods = lab.pods();
    let mut living = pods.iter().filter(|pod| !down.contains(&pod.node())).peekable();
    if living.peek().is_none() {
        text.truncate(text.len() - 1);
        text.push_str(" []\n");
    }
    for pod in living {
        let _ = write!(
            text,
            "  - addresses: [{}]
    nodeName: {}
    conditions:
      ready: true
    targetRef:
      kind: Pod
      namespace: default
      name: {}
",
            pod.address(),
            pod.node(),
            pod.name()
        );
    }
    text
}
