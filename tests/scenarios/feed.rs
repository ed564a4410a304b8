//! The two ways in which objects reach the agent: files in a directory, and an API server.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use kinesin::source::{KubernetesOptions, KubernetesSource, ManifestsSource, Source};
use kube::Client;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::shared;

/// Kind, namespace, name.
pub type Key = (String, String, String);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SourceKind {
    Manifests,
    Kubernetes,
}

impl SourceKind {
    pub const ALL: [Self; 2] = [Self::Manifests, Self::Kubernetes];
}

impl fmt::Display for SourceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Manifests => "manifests",
            Self::Kubernetes => "kubernetes",
        })
    }
}

/// What of a write is to be seen in the agent.
#[derive(Clone, Debug)]
pub struct Written {
    pub key: Key,
    /// Value of [`WRITE_LABEL`].
    pub stamp: String,
    /// The API server's version of it; 0 in a directory.
    pub version: u64,
    /// The agent keeps such an object: of pods, those of its node that have a network of their own.
    pub watched: bool,
}

/// Label with the number of the write that last touched an object: how a test knows that it has arrived.
pub const WRITE_LABEL: &str = "scenario-write";

/// Where objects are written, and the source that reads them there.
pub struct Feed {
    pub source: Arc<dyn Source>,
    writes: u64,
    to: To,
}

enum To {
    Directory {
        manifests: TempDir,
        _state: TempDir,
        objects: BTreeMap<Key, Value>,
    },
    /// One user at a time: objects are in the way of others.
    Server {
        client: Client,
        applied: Vec<Key>,
        _turn: tokio::sync::OwnedMutexGuard<()>,
    },
}

impl Feed {
    pub async fn new(kind: SourceKind) -> Result<Self> {
        let (source, to): (Arc<dyn Source>, To) = match kind {
            SourceKind::Manifests => {
                let (manifests, state) = (tempfile::tempdir()?, tempfile::tempdir()?);
                let source = ManifestsSource::open(manifests.path(), state.path())?;
                (source, To::Directory { manifests, _state: state, objects: BTreeMap::new() })
            }
            SourceKind::Kubernetes => {
                let plane = shared::plane().await?;
                let turn = plane.turn.clone().lock_owned().await;
                let options = KubernetesOptions {
                    kubeconfig: Some(plane.kubeconfig.clone()),
                    api_server_urls: Vec::new(),
                    namespace: "kube-system".into(),
                    qps: 1000.0,
                    burst: 1000,
                };
                let source = KubernetesSource::connect(options).await?;
                (source, To::Server { client: plane.client.clone(), applied: Vec::new(), _turn: turn })
            }
        };
        Ok(Self { source, writes: 0, to })
    }

    /// Creates or changes objects and deletes others.
    pub async fn write(&mut self, apply: &[Value], delete: &[Key]) -> Result<Vec<Written>> {
        self.writes += 1;
        let stamp = self.writes.to_string();
        let stamped = apply.iter().map(|object| {
            let mut object = object.clone();
            object["metadata"]["labels"][WRITE_LABEL] = json!(stamp);
            object
        });
        let mut written = Vec::new();
        match &mut self.to {
            To::Directory { manifests, objects, .. } => {
                for object in stamped {
                    let mut object = object;
                    if key_of(&object).0 == "Pod" {
                        object["metadata"]["generation"] = json!(self.writes);
                    }
                    let (key, watched) = (key_of(&object), is_watched(&object));
                    written.push(Written { key: key.clone(), stamp: stamp.clone(), version: 0, watched });
                    objects.insert(key, object);
                }
                for key in delete {
                    objects.remove(key).with_context(|| format!("{key:?} is not there to be deleted"))?;
                }
                write_all(manifests, objects)?;
            }
            To::Server { client, applied, .. } => {
                for object in stamped {
                    let key = key_of(&object);
                    let watched = is_watched(&object);
                    let version = put(client, &key, object).await?;
                    written.push(Written { key: key.clone(), stamp: stamp.clone(), version, watched });
                    if !applied.contains(&key) {
                        applied.push(key);
                    }
                }
                for key in delete {
                    // Nobody is there who would end a pod's containers.
                    let now = if key.0 == "Pod" { json!({"gracePeriodSeconds": 0}) } else { json!({}) };
                    send(client, "DELETE", &path_of(key)?, &now).await?;
                    applied.retain(|known| known != key);
                }
            }
        }
        Ok(written)
    }

    /// Writes an object into the directory with nothing added; what it says of itself is not looked at.
    ///
    /// # Errors
    /// This is no directory.
    pub fn write_as_is(&mut self, object: &Value) -> Result<()> {
        let To::Directory { manifests, objects, .. } = &mut self.to else { bail!("only files take anything") };
        objects.insert(key_of(object), object.clone());
        write_all(manifests, objects)
    }

    /// Everything that was written and not deleted.
    pub fn objects(&self) -> Vec<Key> {
        match &self.to {
            To::Directory { objects, .. } => objects.keys().cloned().collect(),
            To::Server { applied, .. } => applied.clone(),
        }
    }
}

fn write_all(dir: &TempDir, objects: &BTreeMap<Key, Value>) -> Result<()> {
    // JSON is YAML.
    replace(dir.path(), &objects.values().map(|object| format!("---\n{object}\n")).collect::<String>())
}

/// Makes this the only file of the directory, at once: nothing that begins with a dot is read.
pub fn replace(dir: &Path, text: &str) -> Result<()> {
    std::fs::write(dir.join(".objects.tmp"), text)?;
    Ok(std::fs::rename(dir.join(".objects.tmp"), dir.join("objects.yaml"))?)
}

/// Namespaced objects without a namespace are in `default`, as kubectl has it.
pub fn key_of(object: &Value) -> Key {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let (kind, name) = (text(&object["kind"]), text(&object["metadata"]["name"]));
    let mut namespace = text(&object["metadata"]["namespace"]);
    if namespace.is_empty() && is_namespaced(&kind) {
        namespace = "default".into();
    }
    (kind, namespace, name)
}

fn is_watched(object: &Value) -> bool {
    let spec = &object["spec"];
    object["kind"] != "Pod" || spec["nodeName"] == crate::agent::NODE && spec["hostNetwork"] != true
}

fn is_namespaced(kind: &str) -> bool {
    matches!(kind, "Service" | "EndpointSlice" | "Pod")
}

pub fn path_of((kind, namespace, name): &Key) -> Result<String> {
    let (root, plural) = match kind.as_str() {
        "Service" => ("/api/v1", "services"),
        "Pod" => ("/api/v1", "pods"),
        "Node" => ("/api/v1", "nodes"),
        "EndpointSlice" => ("/apis/discovery.k8s.io/v1", "endpointslices"),
        "CiliumLoadBalancerIPPool" => ("/apis/cilium.io/v2", "ciliumloadbalancerippools"),
        "CiliumL2AnnouncementPolicy" => ("/apis/cilium.io/v2alpha1", "ciliuml2announcementpolicies"),
        other => bail!("no case writes objects of kind {other}"),
    };
    Ok(match namespace.as_str() {
        "" => format!("{root}/{plural}/{name}"),
        namespace => format!("{root}/namespaces/{namespace}/{plural}/{name}"),
    })
}

/// Makes an object, or replaces what is there; its status goes the way that statuses go. Gives its version.
async fn put(client: &Client, key: &Key, mut object: Value) -> Result<u64> {
    let path = path_of(key)?;
    let status = object.as_object_mut().and_then(|fields| fields.remove("status"));
    // The server gives each object one.
    object["metadata"].as_object_mut().and_then(|fields| fields.remove("uid"));
    if key.1 != "default" && !key.1.is_empty() {
        let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": key.1}});
        send(client, "PATCH", &format!("/api/v1/namespaces/{}", key.1), &namespace).await?;
    }
    let mut stored = send(client, "PATCH", &path, &object).await?;
    if let Some(status) = status {
        let whole = json!({"apiVersion": object["apiVersion"], "kind": object["kind"],
                           "metadata": {"name": key.2}, "status": status});
        stored = send(client, "PATCH", &format!("{path}/status"), &whole).await?;
    }
    let version = stored["metadata"]["resourceVersion"].as_str().and_then(|version| version.parse().ok());
    version.with_context(|| format!("{path} has no version: {stored}"))
}

/// PATCH is server-side apply: what is not mentioned any more goes.
pub async fn send(client: &Client, method: &str, path: &str, body: &Value) -> Result<Value> {
    let (kind, query) = match method {
        "PATCH" => ("application/apply-patch+yaml", "?fieldManager=scenario&force=true"),
        _ => ("application/json", ""),
    };
    let request = http::Request::builder().method(method).uri(format!("{path}{query}"));
    let request = request.header(http::header::CONTENT_TYPE, kind).body(serde_json::to_vec(body)?)?;
    client.request::<Value>(request).await.with_context(|| format!("{method} {path} {body}"))
}
