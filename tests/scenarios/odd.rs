//! R38, R39: objects with fields that are absent, null, empty or odd. Nothing panics, whatever the API server accepts is
//! read, and what cannot be read or used is said with the object and the field.

use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use futures::StreamExt;
use kinesin::source::{KubernetesOptions, KubernetesSource, ManifestsSource, Source};
use kinesin_core::objects::ObjectKey;
use kube::Client;
use serde_json::{Value, json};

use crate::agent::Agent;
use crate::feed::{Feed, SourceKind, path_of, replace};
use crate::schema::{Field, fields};
use crate::shared::{self, RUNTIME};

/// Objects at a time: each has addresses of its own, and all of them fit into the maps.
const BATCH: usize = 120;
/// Values of a field that the agent does not read: none, null, and the first odd ones.
const UNREAD: usize = 4;
/// Requests on their way to the API server.
const AT_ONCE: usize = 8;

/// A kind, its schema, and what is around an odd object of it.
struct Subject {
    kind: &'static str,
    document: &'static str,
    schema: &'static str,
    /// The object as it is meant to be, with every field that the agent reads; `n` tells the objects of a batch apart.
    good: fn(usize) -> Value,
    /// What an odd one needs beside it.
    beside: fn(usize) -> Option<Value>,
}

const SUBJECTS: [Subject; 4] = [
    Subject {
        kind: "Service",
        document: "/openapi/v3/api/v1",
        schema: "io.k8s.api.core.v1.Service",
        good: service,
        beside: |n| Some(slice(n)),
    },
    Subject {
        kind: "EndpointSlice",
        document: "/openapi/v3/apis/discovery.k8s.io/v1",
        schema: "io.k8s.api.discovery.v1.EndpointSlice",
        good: slice,
        beside: |n| Some(service(n)),
    },
    Subject {
        kind: "Pod",
        document: "/openapi/v3/api/v1",
        schema: "io.k8s.api.core.v1.Pod",
        good: pod,
        beside: |_| None,
    },
    Subject {
        kind: "Node",
        document: "/openapi/v3/api/v1",
        schema: "io.k8s.api.core.v1.Node",
        good: node,
        beside: |_| None,
    },
];

fn service(n: usize) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": format!("odd-{n}"), "namespace": "default", "labels": {"app": "odd"},
                     "annotations": {"service.cilium.io/src-ranges-policy": "deny"}},
        "spec": {
            "type": "LoadBalancer", "clusterIP": format!("10.96.7.{n}"), "clusterIPs": [format!("10.96.7.{n}")],
            "externalIPs": [format!("192.168.7.{n}")], "ipFamilies": ["IPv4"], "ipFamilyPolicy": "SingleStack",
            "externalTrafficPolicy": "Local", "internalTrafficPolicy": "Local", "healthCheckNodePort": 31_000 + n,
            "sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 60}},
            "loadBalancerSourceRanges": ["198.51.100.0/24"], "trafficDistribution": "PreferClose",
            "publishNotReadyAddresses": true, "allocateLoadBalancerNodePorts": true, "selector": {"app": "odd"},
            "ports": [{"name": "http", "protocol": "TCP", "port": 80, "nodePort": 30_000 + n, "targetPort": "web", "appProtocol": "http"}],
        },
        "status": {"loadBalancer": {"ingress": [{"ip": format!("192.168.8.{n}"), "ipMode": "VIP",
                                                  "ports": [{"port": 80, "protocol": "TCP"}]}]}},
    })
}

fn slice(n: usize) -> Value {
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {"name": format!("odd-{n}"), "namespace": "default", "labels": {"kubernetes.io/service-name": format!("odd-{n}")}},
        "addressType": "IPv4",
        "ports": [{"name": "http", "protocol": "TCP", "port": 8080, "appProtocol": "http"}],
        "endpoints": [
            {"addresses": [format!("10.42.7.{n}")], "conditions": {"ready": true, "serving": true, "terminating": false},
             "nodeName": "here", "zone": "a", "hostname": "odd", "targetRef": {"kind": "Pod", "name": "odd"},
             "hints": {"forZones": [{"name": "a"}], "forNodes": [{"name": "here"}]}},
            {"addresses": [format!("10.42.8.{n}")]},
        ],
    })
}

fn node(n: usize) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": format!("odd-{n}"), "labels": {"topology.kubernetes.io/zone": "a"}},
        "spec": {"unschedulable": true, "taints": [{"key": "odd", "effect": "NoSchedule"}], "podCIDR": "10.42.1.0/24"},
        "status": {"addresses": [{"type": "InternalIP", "address": "192.168.1.10"}]},
    })
}

fn pod(n: usize) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": format!("odd-{n}"), "namespace": "default", "uid": format!("uid-{n}"), "labels": {"app": "odd"},
                     "creationTimestamp": "2026-01-01T00:00:00Z"},
        "spec": {
            "nodeName": "here", "hostNetwork": false,
            "containers": [{"name": "web", "image": "odd", "ports": [
                {"name": "http", "containerPort": 8080, "hostPort": 9000 + n, "hostIP": "192.168.1.10", "protocol": "TCP"},
                {"containerPort": 8081, "hostPort": 9200 + n}]}],
            "initContainers": [{"name": "sidecar", "restartPolicy": "Always", "ports": [
                {"name": "udp", "containerPort": 53, "hostPort": 9400 + n, "protocol": "UDP"}]}],
        },
        "status": {"phase": "Running", "podIP": format!("10.42.7.{n}"), "podIPs": [{"ip": format!("10.42.7.{n}")}]},
    })
}

/// Written beside odd pods: of those the agent keeps only such as have host ports here, but it keeps this one, the last.
const LAST_POD: &str = "odd-pods-end";

/// One odd object: the field, what is in it, and all of it.
struct Odd {
    field: Field,
    value: Option<Value>,
    object: Value,
}

impl Odd {
    fn name(&self) -> String {
        let value = self.value.as_ref().map_or_else(|| "nothing".to_owned(), Value::to_string);
        format!("{} with {} = {value}", self.object["kind"], self.field.text())
    }
}

/// Every odd object of a kind. What says which object it is at all is not a field of it.
async fn odds(subject: &Subject) -> Result<Vec<Odd>> {
    let plane = shared::plane().await?;
    let request = http::Request::get(subject.document).body(Vec::new())?;
    let document: Value = plane.client.request(request).await.context(subject.document)?;
    let mut all = Vec::new();
    for field in fields(&document, subject.schema)? {
        if matches!(field.text().as_str(), "kind" | "apiVersion" | "metadata" | "metadata.name" | "metadata.namespace")
        {
            continue;
        }
        // Fields that the agent does not read are many: what is read, and then not looked at, needs fewer values.
        let looked_at = field.is_in(&(subject.good)(1));
        // A pod has thousands, most of them of volumes and probes.
        if subject.kind == "Pod" && !looked_at && field.path.len() > 2 {
            continue;
        }
        for value in field.values().into_iter().take(if looked_at { usize::MAX } else { UNREAD }) {
            let mut object = (subject.good)(all.len() % BATCH + 1);
            field.put(&mut object, value.clone());
            all.push(Odd { field: field.clone(), value, object });
        }
    }
    Ok(all)
}

/// `kind` `namespace/name`
fn key(object: &Value) -> ObjectKey {
    let text = |field: &str| object["metadata"][field].as_str().unwrap_or_default().to_owned();
    ObjectKey::new(text("namespace"), text("name"))
}

/// What the agent says about an object: that it has it, or why not.
fn verdict(agent: &Agent, kind: &str, key: &ObjectKey) -> Option<Result<(), String>> {
    let problems = agent.source_problems();
    let named = format!("{kind} {key}: ");
    if let Some(problem) = problems.into_iter().find(|problem| problem.contains(&named)) {
        return Some(Err(problem));
    }
    let passed = kind == "Pod" && agent.has(kind, &ObjectKey::new("default", LAST_POD));
    (passed || agent.has(kind, key)).then_some(Ok(()))
}

/// Everything that is said about an object's content names a field, and what to do is said behind a semicolon or so.
fn check_problems(agent: &Agent) -> Result<()> {
    const FIELDS: [&str; 9] = [
        "spec.",
        "metadata.",
        "status.",
        "addressType",
        "ports",
        "endpoint",
        "addresses",
        "address ",
        "no usable endpoints",
    ];
    for problem in agent.problems() {
        ensure!(problem.contains("odd-"), "names no object: {problem}");
        // What the source says is compared with the field itself.
        let named = problem.starts_with("source: ") || FIELDS.iter().any(|field| problem.contains(field));
        ensure!(named, "names no field: {problem}");
    }
    let failures = agent.failures();
    ensure!(failures.is_empty(), "actors failed: {failures:#?}");
    Ok(())
}

/// Through the directory of manifests: every field with every value, batch by batch.
async fn through_manifests(subject: &Subject) -> Result<()> {
    let (manifests, state) = (tempfile::tempdir()?, tempfile::tempdir()?);
    let source: Arc<dyn Source> = ManifestsSource::open(manifests.path(), state.path())?;
    let mut agent = Agent::start(source).await?;
    let (mut read, mut refused) = (0, 0);
    for batch in odds(subject).await?.chunks(BATCH) {
        let mut around: Vec<Value> = (1..=batch.len()).filter_map(subject.beside).collect();
        if subject.kind == "Pod" {
            let mut last = pod(BATCH + 1);
            last["metadata"]["name"] = json!(LAST_POD);
            around.push(last);
        }
        let text = batch.iter().map(|odd| &odd.object).chain(&around).map(|object| format!("---\n{object}\n"));
        let text: String = text.collect();
        replace(manifests.path(), &text)?;
        let keys: Vec<ObjectKey> = batch.iter().map(|odd| key(&odd.object)).collect();
        let known = || keys.iter().all(|key| verdict(&agent, subject.kind, key).is_some());
        agent.until(subject.kind, known).await.with_context(|| {
            let unknown = keys.iter().zip(batch).filter(|(key, _)| verdict(&agent, subject.kind, key).is_none());
            format!("no word about {:#?}", unknown.map(|(_, odd)| odd.name()).collect::<Vec<_>>())
        })?;
        agent.pass_fence().await?;
        for (odd, key) in batch.iter().zip(&keys) {
            match verdict(&agent, subject.kind, key).context("it was there")? {
                Ok(()) => read += 1,
                Err(problem) => {
                    refused += 1;
                    let parent = odd.field.path.iter().rev().nth(1).map_or("", |name| name);
                    let named = problem.contains(odd.field.name()) || (problem.contains(parent) && parent != "0");
                    ensure!(named, "{}: the field is not named: {problem}", odd.name());
                }
            }
        }
        check_problems(&agent).with_context(|| format!("{} to {}", batch[0].name(), batch[batch.len() - 1].name()))?;
        replace(manifests.path(), "")?;
        agent
            .until("an empty directory", || keys.iter().all(|key| verdict(&agent, subject.kind, key).is_none()))
            .await?;
        agent.pass_fence().await?;
    }
    // A fuzz run that reads nothing, or refuses nothing, does not test what it says.
    ensure!(read > 100 && refused > 20, "{} {read} read, {refused} refused", subject.kind);
    ensure!(agent.picture()? == "nothing\n", "left:\n{}", agent.picture()?);
    agent.stop().await
}

/// What this node's own object says is a part of what every Service means here.
const OWN: [&str; 4] = ["metadata.labels", "metadata.annotations", "spec", "status.addresses"];

/// Every odd value of these fields in the Node that the agent runs on, one after the other, beside a Service.
async fn on_this_node() -> Result<()> {
    let mut feed = Feed::new(SourceKind::Manifests).await?;
    let mut agent = Agent::start(feed.source.clone()).await?;
    let subject = SUBJECTS.iter().find(|subject| subject.kind == "Node").context("a subject")?;
    agent.write(&mut feed, &[service(1), slice(1)], &[]).await?;
    let served = |agent: &Agent| agent.picture().map(|picture| picture.contains("10.96.7.1:80/TCP ClusterIP"));
    let odds = odds(subject).await?;
    let own = |odd: &&Odd| OWN.iter().any(|field| odd.field.text().starts_with(field));
    let mut tried = 0;
    for odd in odds.iter().filter(own) {
        let mut object = odd.object.clone();
        object["metadata"]["name"] = json!(crate::agent::NODE);
        let named = ObjectKey::new("", crate::agent::NODE);
        // Odd labels may be no labels: a generation tells the objects apart, which no agent reads of a Node.
        let generation = tried + 1;
        object["metadata"]["generation"] = json!(generation);
        feed.write_as_is(&object)?;
        let read = || agent.meta_of("Node", &named).is_some_and(|meta| meta.generation == generation);
        let refused = || agent.source_problems().iter().any(|problem| problem.contains("Node here: "));
        agent.until("a word about this node", || read() || refused()).await.with_context(|| odd.name())?;
        agent.pass_fence().await?;
        ensure!(served(&agent)?, "{}: a Service is no longer served:\n{}", odd.name(), agent.picture()?);
        let failures = agent.failures();
        ensure!(failures.is_empty(), "{}: actors failed: {failures:#?}", odd.name());
        tried += 1;
        // A good one in between: a problem that stays would be taken for the next one's.
        let mut good = node(1);
        good["metadata"]["name"] = json!(crate::agent::NODE);
        agent.write(&mut feed, &[good], &[]).await?;
    }
    ensure!(tried > 100, "{tried} tried");
    agent.stop().await
}

/// Through an API server: whatever it accepts is read.
async fn through_kubernetes(subject: &Subject) -> Result<()> {
    let plane = shared::plane().await?;
    let _turn = plane.turn.lock().await;
    let outcome = try_kubernetes(subject, plane).await;
    if outcome.is_err() {
        // What is left would be in the way of others.
        for (kind, namespace) in [("Service", "default"), ("EndpointSlice", "default"), ("Node", "")] {
            for n in 1..=BATCH {
                let _ = delete(&plane.client, kind, &ObjectKey::new(namespace, format!("odd-{n}"))).await;
            }
        }
    }
    outcome
}

async fn try_kubernetes(subject: &Subject, plane: &shared::Plane) -> Result<()> {
    let options = KubernetesOptions {
        kubeconfig: Some(plane.kubeconfig.clone()),
        api_server_urls: Vec::new(),
        namespace: "kube-system".into(),
        qps: 1000.0,
        burst: 1000,
    };
    let mut agent = Agent::start(KubernetesSource::connect(options).await?).await?;
    let mut accepted = 0;
    for batch in odds(subject).await?.chunks(BATCH) {
        let around: Vec<Value> = (1..=batch.len()).filter_map(subject.beside).collect();
        for object in &around {
            ensure!(
                create(&plane.client, object).await?.is_some(),
                "the API server refuses what should be good: {object}"
            );
        }
        let all = batch.iter().map(|odd| &odd.object);
        let mut there: Vec<(String, ObjectKey)> = futures::stream::iter(all)
            .map(|object| create(&plane.client, object))
            .buffer_unordered(AT_ONCE)
            .filter_map(|created| async { created.transpose() })
            .collect::<Vec<_>>()
            .await
            .into_iter()
            .collect::<Result<_>>()?;
        accepted += there.len();
        there.extend(around.iter().map(|object| (object["kind"].as_str().unwrap_or_default().to_owned(), key(object))));
        agent.until("what was accepted", || there.iter().all(|(kind, key)| agent.has(kind, key))).await.with_context(
            || {
                let missing: Vec<_> = there.iter().filter(|(kind, key)| !agent.has(kind, key)).collect();
                format!("accepted and not read: {missing:?}")
            },
        )?;
        agent.pass_fence().await?;
        check_problems(&agent)?;
        let gone =
            futures::stream::iter(&there).map(|(kind, key)| delete(&plane.client, kind, key)).buffer_unordered(AT_ONCE);
        gone.collect::<Vec<_>>().await.into_iter().collect::<Result<Vec<()>>>()?;
        agent.until("an empty cluster", || there.iter().all(|(kind, key)| !agent.has(kind, key))).await?;
    }
    agent.pass_fence().await?;
    ensure!(accepted > 50, "{}: {accepted} accepted", subject.kind);
    ensure!(agent.picture()? == "nothing\n", "left:\n{}", agent.picture()?);
    agent.stop().await
}

/// Gives what was created; nothing where the API server refuses the object.
async fn create(client: &Client, object: &Value) -> Result<Option<(String, ObjectKey)>> {
    let (kind, key) = (object["kind"].as_str().unwrap_or_default().to_owned(), key(object));
    let path = path_of(&(kind.clone(), key.namespace.to_string(), key.name.to_string()))?;
    let (collection, _) = path.rsplit_once('/').context("a path has parts")?;
    let request = http::Request::post(collection).header(http::header::CONTENT_TYPE, "application/json");
    match client.request::<Value>(request.body(serde_json::to_vec(object)?)?).await {
        Ok(_) => {}
        // With any code: an odd `resourceVersion` is the server's fault, says the server.
        Err(kube::Error::Api(_)) => return Ok(None),
        Err(error) => bail!("POST {collection} {object}: {error}"),
    }
    if object.get("status").is_some() {
        let patch = json!({"status": object["status"]});
        let request = http::Request::patch(format!("{path}/status"));
        let request = request.header(http::header::CONTENT_TYPE, "application/merge-patch+json");
        // Refused or not: the object is there.
        match client.request::<Value>(request.body(serde_json::to_vec(&patch)?)?).await {
            Ok(_) | Err(kube::Error::Api(_)) => {}
            Err(error) => bail!("PATCH {path}/status {patch}: {error}"),
        }
    }
    Ok(Some((kind, key)))
}

async fn delete(client: &Client, kind: &str, key: &ObjectKey) -> Result<()> {
    let path = path_of(&(kind.to_owned(), key.namespace.to_string(), key.name.to_string()))?;
    match client.request::<Value>(http::Request::delete(&path).body(Vec::new())?).await {
        // An odd finalizer, which nobody else would remove.
        Ok(left) if left["metadata"]["finalizers"].is_array() => {
            let request =
                http::Request::patch(&path).header(http::header::CONTENT_TYPE, "application/merge-patch+json");
            let patch = serde_json::to_vec(&json!({"metadata": {"finalizers": null}}))?;
            client.request::<Value>(request.body(patch)?).await.map(drop).with_context(|| format!("PATCH {path}"))
        }
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
        Err(error) => bail!("DELETE {path}: {error}"),
    }
}

fn each(through: impl AsyncFn(&Subject) -> Result<()>, kinds: &[&str]) -> Result<()> {
    RUNTIME.block_on(async {
        for subject in SUBJECTS.iter().filter(|subject| kinds.contains(&subject.kind)) {
            through(subject).await.context(subject.kind)?;
        }
        Ok(())
    })
}

pub fn r38_odd_slices_and_nodes_in_manifests() -> Result<()> {
    each(through_manifests, &["EndpointSlice", "Node"])
}

pub fn r38_odd_slices_and_nodes_of_an_api_server() -> Result<()> {
    each(through_kubernetes, &["EndpointSlice", "Node"])
}

pub fn r38_odd_values_in_this_nodes_own_object() -> Result<()> {
    RUNTIME.block_on(on_this_node())
}

pub fn r38_odd_pods_in_manifests() -> Result<()> {
    each(through_manifests, &["Pod"])
}

pub fn r39_odd_services_in_manifests() -> Result<()> {
    each(through_manifests, &["Service"])
}

pub fn r39_odd_services_of_an_api_server() -> Result<()> {
    each(through_kubernetes, &["Service"])
}

/// Annotations that mean something, set and taken away again on a Service that is being served.
const ANNOTATIONS: [(&str, &[&str]); 9] = [
    ("service.cilium.io/type", &["ClusterIP", "NodePort", "LoadBalancer", "", "clusterip"]),
    ("service.cilium.io/src-ranges-policy", &["deny", "allow", "", "DENY"]),
    ("service.cilium.io/node", &["here", "", "there"]),
    ("service.cilium.io/node-selector", &["a=b", "!a", "(", "", "a in (b", "ß"]),
    ("service.cilium.io/forwarding-mode", &["dsr", "snat", "", "DSR"]),
    ("service.cilium.io/lb-algorithm", &["maglev", "random", "", "best"]),
    ("service.cilium.io/proxy-delegation", &["none", "delegate-if-local", "", "x"]),
    ("service.kubernetes.io/topology-mode", &["Auto", "Disabled", ""]),
    ("lbipam.cilium.io/ips", &["", "192.168.9.9", "x,,192.168.9.9", "::"]),
];

async fn flips(kind: SourceKind) -> Result<()> {
    let mut feed = Feed::new(kind).await?;
    let mut agent = Agent::start(feed.source.clone()).await?;
    let outcome = flip(&mut feed, &mut agent, kind).await;
    let rest = feed.objects();
    let emptied = agent.write(&mut feed, &[], &rest).await;
    outcome?;
    emptied?;
    agent.stop().await
}

async fn flip(feed: &mut Feed, agent: &mut Agent, kind: SourceKind) -> Result<()> {
    let live = |change: &dyn Fn(&mut Value)| {
        let mut object = service(1);
        object["metadata"]["annotations"] = json!({});
        change(&mut object);
        object
    };
    agent.write(feed, &[live(&|_| {}), slice(1)], &[]).await?;
    let begin = agent.picture()?;
    ensure!(begin.contains("10.42.7.1"), "the service is served:\n{begin}");
    let mut pictures = std::collections::BTreeSet::new();
    for (annotation, values) in ANNOTATIONS {
        for value in values {
            agent
                .write(feed, &[live(&|object| object["metadata"]["annotations"][annotation] = json!(value))], &[])
                .await?;
            pictures.insert(agent.picture()?);
            check_problems(agent).with_context(|| format!("{annotation}: {value:?}"))?;
        }
        agent.write(feed, &[live(&|_| {})], &[]).await?;
        ensure!(
            agent.picture()? == begin,
            "after {annotation} is gone again:\n{}\nand before:\n{begin}",
            agent.picture()?
        );
    }
    ensure!(pictures.len() > 8, "annotations change what is served");
    // The class is for good while the type stays, so the API server says.
    if kind == SourceKind::Manifests {
        for class in [json!(""), json!("io.cilium/l2-announcer"), json!("ß"), json!(null)] {
            agent.write(feed, &[live(&|object| object["spec"]["loadBalancerClass"] = class.clone())], &[]).await?;
            check_problems(agent)?;
        }
        ensure!(agent.picture()? == begin, "after the class is gone again:\n{}", agent.picture()?);
    }
    Ok(())
}

pub fn r39_annotation_flips_on_a_live_service_in_manifests() -> Result<()> {
    RUNTIME.block_on(flips(SourceKind::Manifests))
}

pub fn r39_annotation_flips_on_a_live_service_of_an_api_server() -> Result<()> {
    RUNTIME.block_on(flips(SourceKind::Kubernetes))
}
