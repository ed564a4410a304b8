//! The answers' shapes, used by the agent that writes them and the command line that reads them. Field names are part
//! of the command line's `-o json`; fields are added, never renamed.

use std::collections::BTreeMap;
use std::fmt;

use jiff::Timestamp;
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;

use crate::config::Report;

/// One frontend as the command line reads it: the readable twin of [`kinesin_core::services::FrontendView`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Frontend {
    /// `10.96.0.1:80/TCP`
    pub address: String,
    /// `ClusterIP`, `NodePort`, `LoadBalancer`, `ExternalIPs`, `HostPort`
    #[serde(rename = "type")]
    pub kind: String,
    /// `namespace/name`
    pub service: String,
    /// Name of the Service's port.
    pub port_name: String,
    /// `all`, `external` or `internal`
    pub scope: String,
    /// `programmed`, `pending` or an error.
    pub status: String,
    /// Those in use come first.
    pub backends: Vec<Backend>,
}

/// A backend of [`Frontend`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Backend {
    /// `10.42.0.5:8080`
    pub address: String,
    /// `active`, `terminating`, `terminating-not-serving`, `maintenance`
    pub state: String,
    /// Node of the pod.
    pub node: String,
    /// Zone of that node.
    pub zone: String,
}

/// One frontend in full: the readable twin of [`kinesin_core::services::WideView`], which says what the fields are.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[expect(missing_docs, reason = "one place says it")]
pub struct WideFrontend {
    pub address: String,
    #[serde(rename = "type")]
    pub kind: String,
    pub service: String,
    pub port_name: String,
    pub scope: String,
    pub status: String,
    pub routable: bool,
    pub external_traffic_policy: String,
    pub internal_traffic_policy: String,
    pub algorithm: String,
    pub session_affinity_seconds: Option<u32>,
    pub source_ranges_policy: Option<String>,
    pub source_ranges: Vec<String>,
    pub health_check_node_port: Option<u16>,
    pub backends: Vec<WideBackend>,
}

/// A backend of [`WideFrontend`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[expect(missing_docs, reason = "as above")]
pub struct WideBackend {
    pub address: String,
    pub state: String,
    pub node: String,
    pub zone: String,
    pub weight: u32,
    pub unused: Option<String>,
}

/// An address on the LAN. What is not known is `null`, so that every key is always there.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct VipView {
    /// `10.0.0.100`
    pub address: String,
    /// `namespace/name` of each Service that uses it.
    pub services: Vec<String>,
    /// The pool it comes from.
    pub pool: Option<String>,
    /// The node that answers for it.
    pub owner: Option<String>,
    /// Where it is announced; known on the owner.
    pub interface: Option<String>,
    /// What it is announced with; known on the owner.
    pub mac: Option<String>,
    /// When the owner took it.
    pub since: Option<Timestamp>,
    /// `announced`, `standby`, `pending`, `conflict` or an error.
    pub state: String,
}

/// A supervisor or an actor, and what is below it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TreeView {
    /// Unique in the tree; what `kinesin debug kill` takes.
    pub name: String,
    /// What it is.
    pub kind: NodeKind,
    /// `one_for_one`, `rest_for_one`; of supervisors.
    pub strategy: Option<String>,
    /// What it is doing.
    pub state: NodeState,
    /// Restarts since the process began, by cause (`panic`, `error`, `refused`, …).
    pub restarts: BTreeMap<String, u64>,
    /// Messages handled since the last start.
    pub messages: u64,
    /// Messages waiting.
    pub mailbox_depth: u64,
    /// Mean time to handle a message, microseconds.
    pub mean_handle_us: u64,
    /// Longest time to handle a message, microseconds.
    pub max_handle_us: u64,
    /// Why it last stopped.
    pub last_error: Option<String>,
    /// Seconds since the last start.
    pub uptime_seconds: Option<u64>,
    /// In starting order.
    pub children: Vec<TreeView>,
}

/// See [`TreeView::kind`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NodeKind {
    /// Starts and restarts others.
    Supervisor,
    /// Does the work.
    #[default]
    Actor,
}

/// See [`TreeView::state`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NodeState {
    /// Alive.
    #[default]
    Running,
    /// Waits to be started again.
    Restarting,
    /// Will not be started again.
    Stopped,
}

/// The agent at a glance.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct StatusView {
    /// This node.
    pub node: String,
    /// The agent's version.
    pub version: String,
    /// Seconds since the process began.
    pub uptime_seconds: u64,
    /// Where objects come from.
    pub source: SourceView,
    /// The configuration in effect, without the list of settings.
    pub config: ConfigSummary,
    /// The IP versions that are served: `IPv4`, `IPv6`.
    #[serde(default)]
    pub families: Vec<String>,
    /// The programs and where they are attached.
    pub hooks: Vec<HookView>,
    /// Which of kube-proxy's duties are done.
    pub kube_proxy_replacement: KprView,
    /// One entry per kind that is read.
    pub sync: Vec<SyncView>,
    /// How full each map is.
    pub maps: Vec<MapView>,
    /// Connections, as of the last look at all of them.
    pub connections: ConnectionsView,
    /// The node with the cluster-wide duties.
    pub leader: Option<String>,
    /// The nodes that take part in announcing.
    pub members: Vec<MemberView>,
    /// What an operator should look at, one line each.
    pub problems: Vec<String>,
}

/// See [`StatusView::source`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SourceView {
    /// `kubernetes` or `manifests`
    pub kind: String,
    /// Where: a URL or a directory.
    pub location: String,
    /// Whether changes reach us.
    pub healthy: bool,
    /// Why not, or since when.
    pub detail: String,
}

/// See [`StatusView::config`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ConfigSummary {
    /// Short hash of the effective settings.
    pub generation: String,
    /// What became of each key that was written.
    pub report: Report,
}

/// An attached program.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct HookView {
    /// `cil_from_netdev`
    pub program: String,
    /// A device or a cgroup.
    pub target: String,
    /// `tcx/ingress`, `clsact/egress`, `cgroup/connect4`, …
    pub how: String,
    /// Whether packets meet it.
    pub ok: bool,
    /// Why not.
    pub error: Option<String>,
}

/// Kube-proxy's duties, with the headings that `cilium-dbg status --verbose` has.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct KprView {
    /// `kube-proxy-replacement`
    pub enabled: bool,
    /// Selected devices with their addresses: `eth0 192.168.1.2`.
    pub devices: Vec<String>,
    /// Translation at connect time.
    pub socket_lb: bool,
    /// `SNAT`; `Auto (L2 to 2 of 3 nodes, else SNAT)`
    pub mode: String,
    /// `Random`, `Maglev (Table Size: 16381)`
    pub backend_selection: String,
    /// `sessionAffinity: ClientIP` is honoured.
    pub session_affinity: bool,
    /// `Disabled`; `Native` or `Best-Effort`, with each device: `Native (eth0 in its driver; eth1 by tc: its driver …)`
    pub xdp_acceleration: String,
    /// `Legacy (…)`: by the host's stack, and why; `BPF (3 devices of pods; …)`: straight to pods of this node.
    pub host_routing: String,
    /// What is served: `ClusterIP` → `Enabled`, `NodePort` → `Enabled (Range: 30000-32767)`, …
    pub services: BTreeMap<String, String>,
}

/// One list of the source.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SyncView {
    /// Lower-case plural.
    pub kind: String,
    /// Whether the first complete list is there.
    pub complete: bool,
    /// How many objects it has now.
    pub objects: u64,
}

/// One map in the kernel.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct MapView {
    /// Its name.
    pub name: String,
    /// Entries in use.
    pub used: u64,
    /// Entries that fit.
    pub max: u64,
}

/// See [`StatusView::connections`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ConnectionsView {
    /// Entries of established TCP connections, two for each.
    pub established: u64,
    /// Entries of other flows: UDP, and connections that are not established.
    pub transient: u64,
    /// Entries removed because they had expired, since the agent started.
    pub expired: u64,
    /// Transient entries that the kernel forgot to make room for others.
    pub forgotten: u64,
    /// How often an established connection found no room among its like.
    pub unsettled: u64,
    /// Seconds since the last look; `null` before the first.
    pub looked_seconds_ago: Option<u64>,
    /// How long the last look took, milliseconds.
    pub took_ms: u64,
}

/// One node that takes part in announcing.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct MemberView {
    /// Its name.
    pub node: String,
    /// `alive`, `suspect`, `gone`
    pub state: String,
    /// Its last sign of life.
    pub last_seen: Option<Timestamp>,
    /// How packets get from here to backends on it: `l2`, or `snat: ` and why; empty of this node, and where all go by snat.
    #[serde(default)]
    pub forwarding: String,
}

/// A table of `kinesin dump`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TableView {
    /// What `kinesin dump` takes.
    pub name: String,
    /// What is in it, one line.
    pub about: String,
    /// How many rows it has.
    pub rows: u64,
}

/// A row of a table: columns in order, each a plain value or a list.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DumpRow {
    /// Rows of one table have the same columns in the same order. In JSON they are an object's fields, in this order.
    pub columns: Vec<(String, Value)>,
}

impl DumpRow {
    /// A row with these columns, in this order.
    pub fn new<K: Into<String>, V: Into<Value>>(columns: impl IntoIterator<Item = (K, V)>) -> Self {
        Self { columns: columns.into_iter().map(|(k, v)| (k.into(), v.into())).collect() }
    }
}

impl Serialize for DumpRow {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.columns.iter().map(|(name, value)| (name, value)))
    }
}

impl<'de> Deserialize<'de> for DumpRow {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Columns;
        impl<'de> Visitor<'de> for Columns {
            type Value = DumpRow;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<DumpRow, A::Error> {
                let mut columns = Vec::new();
                while let Some(column) = map.next_entry()? {
                    columns.push(column);
                }
                Ok(DumpRow { columns })
            }
        }
        deserializer.deserialize_map(Columns)
    }
}

/// A table with its rows, as the socket sends it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Dump {
    /// The table's name.
    pub table: String,
    /// Its rows.
    pub rows: Vec<DumpRow>,
}

/// The answer of a probe.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Readiness {
    /// The answer.
    pub ready: bool,
    /// Why not, one line each.
    pub reasons: Vec<String>,
}

/// What kube-proxy's health server tells cloud load balancers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Healthz {
    /// The first complete sync is in the maps and the agent is well.
    pub healthy: bool,
    /// The node is not going away ([`kinesin_core::objects::Node::is_leaving`]).
    pub node_eligible: bool,
    /// Families that are served: `IPv4`, `IPv6`.
    pub families: Vec<&'static str>,
    /// When the maps were last known to be right; `None` before the first complete sync.
    pub last_updated: Option<Timestamp>,
    /// Now.
    pub current: Timestamp,
}

/// The configuration in effect.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ConfigView {
    /// This node.
    pub node: String,
    /// Short hash of the effective settings.
    pub generation: String,
    /// What became of each key, and every setting with its source.
    pub report: Report,
}
