//! `v1 Pod`, as far as host ports need it.

use serde::{Deserialize, Serialize};
use smol_str::SmolStr;

use super::{Meta, StringMap, null_default, object};

/// A Pod.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(from = "Written")]
pub struct Pod {
    /// `metadata`
    pub metadata: Meta,
    /// `metadata.uid`: tells a pod from a successor of the same name. Other kinds are known by their names.
    #[serde(skip_serializing)]
    pub uid: SmolStr,
    /// `spec`
    pub spec: PodSpec,
    /// `status`
    pub status: PodStatus,
}

/// A Pod as it is written: the uid is among the metadata.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Written {
    #[serde(deserialize_with = "null_default")]
    metadata: MetaWithUid,
    #[serde(deserialize_with = "null_default")]
    spec: PodSpec,
    #[serde(deserialize_with = "null_default")]
    status: PodStatus,
}

#[derive(Default, Deserialize)]
struct MetaWithUid {
    #[serde(flatten)]
    meta: Meta,
    #[serde(default, deserialize_with = "null_default")]
    uid: SmolStr,
}

impl From<Written> for Pod {
    fn from(Written { metadata: MetaWithUid { meta, uid }, spec, status }: Written) -> Self {
        Self { metadata: meta, uid, spec, status }
    }
}

object!(Pod, "Pod", ["v1"], "pods", namespaced: true);

/// `spec`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PodSpec {
    /// Where it runs; empty before it is scheduled.
    #[serde(deserialize_with = "null_default")]
    pub node_name: SmolStr,
    /// Its ports are the node's already.
    #[serde(deserialize_with = "null_default")]
    pub host_network: bool,
    /// `containers`
    #[serde(deserialize_with = "null_default")]
    pub containers: Vec<Container>,
    /// Sidecars among them serve as containers do.
    #[serde(skip_serializing_if = "Vec::is_empty", deserialize_with = "null_default")]
    pub init_containers: Vec<Container>,
}

/// An element of `spec.containers` or `spec.initContainers`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Container {
    /// `name`
    #[serde(deserialize_with = "null_default")]
    pub name: SmolStr,
    /// `ports`
    #[serde(deserialize_with = "null_default")]
    pub ports: Vec<ContainerPort>,
    /// `Always` makes an init container a sidecar.
    #[serde(skip_serializing_if = "SmolStr::is_empty", deserialize_with = "null_default")]
    pub restart_policy: SmolStr,
}

/// An element of `ports`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ContainerPort {
    /// `name`
    #[serde(skip_serializing_if = "SmolStr::is_empty", deserialize_with = "null_default")]
    pub name: SmolStr,
    /// The pod's port.
    #[serde(deserialize_with = "null_default")]
    pub container_port: u16,
    /// The node's port; 0 for none.
    #[serde(deserialize_with = "null_default")]
    pub host_port: u16,
    /// The node's address; empty for all.
    #[serde(rename = "hostIP", skip_serializing_if = "SmolStr::is_empty", deserialize_with = "null_default")]
    pub host_ip: SmolStr,
    /// `TCP` when absent.
    #[serde(skip_serializing_if = "SmolStr::is_empty", deserialize_with = "null_default")]
    pub protocol: SmolStr,
}

/// `status`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PodStatus {
    /// `Pending`, `Running`, `Succeeded`, `Failed`, `Unknown`
    #[serde(deserialize_with = "null_default")]
    pub phase: SmolStr,
    /// First of `podIPs`; kept for manifests that have only this one.
    #[serde(rename = "podIP", skip_serializing_if = "SmolStr::is_empty", deserialize_with = "null_default")]
    pub pod_ip: SmolStr,
    /// At most one of each family.
    #[serde(rename = "podIPs", skip_serializing_if = "Vec::is_empty", deserialize_with = "null_default")]
    pub pod_ips: Vec<PodIp>,
}

/// An element of `status.podIPs`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct PodIp {
    /// The address.
    #[serde(deserialize_with = "null_default")]
    pub ip: SmolStr,
}

impl Pod {
    /// Containers that serve while the pod runs, with the field that each is in.
    pub fn serving_containers(&self) -> impl Iterator<Item = (&'static str, &Container)> {
        let containers = self.spec.containers.iter().map(|container| ("spec.containers", container));
        let sidecars = self.spec.init_containers.iter().filter(|container| container.restart_policy == "Always");
        containers.chain(sidecars.map(|container| ("spec.initContainers", container)))
    }

    /// Whether anything of it is of interest here. The ports of a pod never change (they are immutable in Kubernetes).
    pub fn has_host_ports(&self) -> bool {
        !self.spec.host_network
            && self.serving_containers().any(|(_, container)| container.ports.iter().any(|port| port.host_port != 0))
    }

    /// Drops what nobody here reads: labels, annotations, ports without host port, containers without such.
    pub fn slim(&mut self) {
        self.metadata.labels = StringMap::default();
        self.metadata.annotations = StringMap::default();
        for containers in [&mut self.spec.containers, &mut self.spec.init_containers] {
            for container in containers.iter_mut() {
                container.ports.retain(|port| port.host_port != 0);
            }
            containers.retain(|container| !container.ports.is_empty());
            containers.shrink_to_fit();
        }
    }
}
