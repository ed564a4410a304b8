//! A small API server on loopback, real enough for lists, pages, watches, bookmarks, versions, patches and every way to
//! misbehave. The real one is met in the cluster tests.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{Query, Request, State};
use axum::response::Response;
use http::{Method, StatusCode};
use http_body_util::BodyExt;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::watch;

/// How the server treats `sendInitialEvents`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(in crate::source) enum StreamingLists {
    Served,
    /// As with the feature gate off.
    Refused,
    /// As before 1.27: the parameter is not known.
    Unknown,
}

#[derive(Clone, Debug)]
pub(in crate::source) struct Seen {
    pub(in crate::source) method: Method,
    pub(in crate::source) path: String,
    pub(in crate::source) query: BTreeMap<String, String>,
    pub(in crate::source) content_type: String,
    pub(in crate::source) body: Value,
}

pub(in crate::source) struct World {
    version: u64,
    objects: BTreeMap<String, Value>,
    log: Vec<(u64, String, Value)>,
    /// Watches from before this version are told 410.
    pub(in crate::source) compacted: u64,
    pub(in crate::source) streaming: StreamingLists,
    /// Collections that are not served.
    pub(in crate::source) missing: BTreeSet<String>,
    /// Answers every so many-th request with this status; 0 for none.
    pub(in crate::source) fail_every: (u64, u16),
    pub(in crate::source) latency: Duration,
    requests: u64,
    pub(in crate::source) seen: Vec<Seen>,
    /// Watches end when this changes.
    epoch: u64,
}

type Shared = (Arc<Mutex<World>>, watch::Sender<u64>);

/// The server; stops when dropped, its world can be served again.
pub(in crate::source) struct Api {
    pub(in crate::source) url: String,
    shared: Shared,
    server: tokio::task::JoinHandle<()>,
    stop: watch::Sender<bool>,
}

impl Drop for Api {
    fn drop(&mut self) {
        self.stop.send_replace(true);
        self.server.abort();
    }
}

impl Api {
    pub(in crate::source) async fn start() -> Self {
        let world = World {
            version: 100,
            objects: BTreeMap::new(),
            log: Vec::new(),
            compacted: 0,
            streaming: StreamingLists::Served,
            missing: BTreeSet::new(),
            fail_every: (0, 0),
            latency: Duration::ZERO,
            requests: 0,
            seen: Vec::new(),
            epoch: 0,
        };
        Self::serve("127.0.0.1:0", (Arc::new(Mutex::new(world)), watch::Sender::new(0))).await
    }

    /// Stops answering: connections are cut, new ones refused.
    pub(in crate::source) async fn stop(self) -> (String, Shared) {
        self.stop.send_replace(true);
        self.server.abort();
        while !self.server.is_finished() {
            tokio::task::yield_now().await;
        }
        (self.url.trim_start_matches("http://").to_owned(), self.shared.clone())
    }

    pub(in crate::source) async fn serve(address: &str, shared: Shared) -> Self {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.set_reuseaddr(true).unwrap();
        socket.bind(address.parse().unwrap()).unwrap();
        let listener: TcpListener = socket.listen(64).unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (stop, mut stopped) = watch::channel(false);
        let app = Router::new().fallback(answer).with_state(shared.clone());
        let server = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            loop {
                let stream = tokio::select! {
                    accepted = listener.accept() => accepted.unwrap().0,
                    _ = stopped.changed() => return,
                };
                let service = hyper_util::service::TowerToHyperService::new(app.clone());
                connections.spawn(async move {
                    let io = hyper_util::rt::TokioIo::new(stream);
                    let _ = hyper::server::conn::http1::Builder::new().serve_connection(io, service).await;
                });
            }
        });
        Self { url, shared, server, stop }
    }

    pub(in crate::source) fn world(&self) -> MutexGuard<'_, World> {
        self.shared.0.lock().unwrap()
    }

    /// Creates or changes an object; `collection` is its API path without namespace.
    pub(in crate::source) fn put(&self, collection: &str, namespace: &str, name: &str, rest: Value) {
        self.world().put(collection, namespace, name, rest);
        self.wake();
    }

    pub(in crate::source) fn delete(&self, collection: &str, namespace: &str, name: &str) {
        self.world().delete(&id(collection, namespace, name)).unwrap();
        self.wake();
    }

    pub(in crate::source) fn get(&self, collection: &str, namespace: &str, name: &str) -> Value {
        self.world().objects[&id(collection, namespace, name)].clone()
    }

    /// Moves the version on and tells the watches of a collection, as servers do now and then.
    pub(in crate::source) fn bookmark(&self, collection: &str) {
        let mut world = self.world();
        world.version += 1;
        let version = world.version;
        let event = json!({"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": version.to_string()}}});
        world.log.push((version, format!("{collection}/"), event));
        drop(world);
        self.wake();
    }

    /// Sends any line on the watches of a collection.
    pub(in crate::source) fn send(&self, collection: &str, line: Value) {
        let mut world = self.world();
        world.version += 1;
        let version = world.version;
        world.log.push((version, format!("{collection}/"), line));
        drop(world);
        self.wake();
    }

    /// Ends all watches.
    pub(in crate::source) fn cut(&self) {
        self.world().epoch += 1;
        self.wake();
    }

    /// Forgets what happened so far.
    pub(in crate::source) fn compact(&self) {
        let mut world = self.world();
        world.version += 1;
        world.compacted = world.version;
        world.log.clear();
    }

    pub(in crate::source) fn writes(&self) -> Vec<Seen> {
        self.world().seen.iter().filter(|seen| seen.method != Method::GET).cloned().collect()
    }

    fn wake(&self) {
        self.shared.1.send_modify(|n| *n += 1);
    }
}

fn id(collection: &str, namespace: &str, name: &str) -> String {
    format!("{collection}/{namespace}/{name}")
}

impl World {
    fn put(&mut self, collection: &str, namespace: &str, name: &str, mut object: Value) -> Value {
        self.version += 1;
        object["metadata"]["name"] = json!(name);
        object["metadata"]["resourceVersion"] = json!(self.version.to_string());
        if !namespace.is_empty() {
            object["metadata"]["namespace"] = json!(namespace);
        }
        let id = id(collection, namespace, name);
        let kind = if self.objects.contains_key(&id) { "MODIFIED" } else { "ADDED" };
        self.log.push((self.version, id.clone(), json!({"type": kind, "object": object})));
        self.objects.insert(id, object.clone());
        object
    }

    fn delete(&mut self, id: &str) -> Option<Value> {
        let mut object = self.objects.remove(id)?;
        self.version += 1;
        object["metadata"]["resourceVersion"] = json!(self.version.to_string());
        self.log.push((self.version, id.to_owned(), json!({"type": "DELETED", "object": object})));
        Some(object)
    }
}

fn json_answer(code: u16, body: &Value) -> Response {
    let mut response = Response::new(Body::from(body.to_string()));
    *response.status_mut() = StatusCode::from_u16(code).unwrap();
    response
}

fn refuse(code: u16, reason: &str, message: &str) -> Response {
    let status = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
                        "reason": reason, "message": message, "code": code});
    json_answer(code, &status)
}

/// Splits a path into collection, namespace, name and subresource.
fn split(path: &str) -> (String, String, String, String) {
    let parts: Vec<&str> = path.trim_matches('/').split('/').collect();
    let root = if parts[0] == "api" { 2 } else { 3 };
    let (prefix, rest) = parts.split_at(root.min(parts.len()));
    let (namespace, rest) = match rest {
        ["namespaces", namespace, rest @ ..] if !rest.is_empty() => (*namespace, rest),
        rest => ("", rest),
    };
    let part = |index: usize| rest.get(index).copied().unwrap_or_default().to_owned();
    (format!("/{}/{}", prefix.join("/"), part(0)), namespace.to_owned(), part(1), part(2))
}

async fn answer(
    State((world, changed)): State<Shared>,
    Query(query): Query<BTreeMap<String, String>>,
    request: Request,
) -> Response {
    let (parts, body) = request.into_parts();
    let body = body.collect().await.unwrap().to_bytes();
    let path = parts.uri.path().to_owned();
    let (collection, namespace, name, subresource) = split(&path);
    let latency = world.lock().unwrap().latency;
    tokio::time::sleep(latency).await;
    let mut guard = world.lock().unwrap();
    let content_type = parts.headers.get("content-type").and_then(|v| v.to_str().ok()).unwrap_or_default().to_owned();
    let body: Value = serde_json::from_slice(&body).unwrap_or_default();
    guard.seen.push(Seen {
        method: parts.method.clone(),
        path,
        query: query.clone(),
        content_type,
        body: body.clone(),
    });
    guard.requests += 1;
    let (every, code) = guard.fail_every;
    if every > 0 && guard.requests % every == 0 {
        return refuse(code, "InternalError", "out of order");
    }
    if guard.missing.contains(&collection) {
        return refuse(404, "NotFound", "the server could not find the requested resource");
    }
    if query.get("watch").is_some_and(|v| v == "true") {
        drop(guard);
        return watch_answer(world, changed, format!("{collection}/{namespace}"), &query);
    }
    let key = id(&collection, &namespace, &name);
    let response = match (&parts.method, name.is_empty()) {
        (&Method::GET, true) => list_answer(&guard, &format!("{collection}/{namespace}"), &query),
        (&Method::GET, false) => match guard.objects.get(&key) {
            Some(object) => json_answer(200, object),
            None => refuse(404, "NotFound", "not found"),
        },
        (&Method::POST, _) => {
            let name = body["metadata"]["name"].as_str().unwrap_or_default().to_owned();
            if guard.objects.contains_key(&id(&collection, &namespace, &name)) {
                refuse(409, "AlreadyExists", "already exists")
            } else {
                json_answer(201, &guard.put(&collection, &namespace, &name, body))
            }
        }
        (&Method::PUT, _) => match guard.objects.get(&key) {
            // Leases are created on update, but not with the uid of one that is gone.
            None => refuse(409, "Conflict", "precondition failed: UID"),
            Some(stored) if stored["metadata"]["resourceVersion"] != body["metadata"]["resourceVersion"] => {
                refuse(409, "Conflict", "the object has been modified")
            }
            Some(_) => json_answer(200, &guard.put(&collection, &namespace, &name, body)),
        },
        (&Method::PATCH, _) => match guard.objects.get(&key).cloned() {
            None => refuse(404, "NotFound", "not found"),
            Some(mut stored) => {
                assert_eq!(subresource, "status");
                patch(&mut stored["status"], &body["status"]);
                json_answer(200, &guard.put(&collection, &namespace, &name, stored))
            }
        },
        (&Method::DELETE, _) => match guard.delete(&key) {
            Some(object) => json_answer(200, &object),
            None => refuse(404, "NotFound", "not found"),
        },
        _ => refuse(405, "MethodNotAllowed", "method not allowed"),
    };
    drop(guard);
    changed.send_modify(|n| *n += 1);
    response
}

/// Enough of strategic merge for a status: conditions by type, everything else replaced.
fn patch(target: &mut Value, change: &Value) {
    let Some(fields) = change.as_object() else { return };
    for (field, value) in fields {
        if field != "conditions" {
            target[field] = value.clone();
            continue;
        }
        let mut conditions = target["conditions"].as_array().cloned().unwrap_or_default();
        for condition in value.as_array().into_iter().flatten() {
            conditions.retain(|known| known["type"] != condition["type"]);
            if condition.get("$patch").is_none() {
                conditions.push(condition.clone());
            }
        }
        target["conditions"] = conditions.into();
    }
}

fn selected<'a>(world: &'a World, prefix: &str, query: &BTreeMap<String, String>) -> Vec<&'a Value> {
    let selector = query.get("labelSelector").and_then(|s| s.split_once('='));
    let wanted = |object: &&Value| selector.is_none_or(|(key, value)| object["metadata"]["labels"][key] == value);
    let in_prefix = world.objects.iter().filter(|(id, _)| id.starts_with(prefix));
    in_prefix.map(|(_, object)| object).filter(wanted).collect()
}

fn list_answer(world: &World, prefix: &str, query: &BTreeMap<String, String>) -> Response {
    let all = selected(world, prefix, query);
    let limit = query.get("limit").and_then(|l| l.parse().ok()).unwrap_or(usize::MAX);
    let from: usize = query.get("continue").and_then(|token| token.parse().ok()).unwrap_or(0);
    let items: Vec<&Value> = all.iter().skip(from).take(limit).copied().collect();
    let next = if from + items.len() < all.len() { (from + items.len()).to_string() } else { String::new() };
    let meta = json!({"resourceVersion": world.version.to_string(), "continue": next});
    json_answer(200, &json!({"metadata": meta, "items": items}))
}

fn watch_answer(
    world: Arc<Mutex<World>>,
    changed: watch::Sender<u64>,
    prefix: String,
    query: &BTreeMap<String, String>,
) -> Response {
    let guard = world.lock().unwrap();
    let initial = query.get("sendInitialEvents").is_some_and(|v| v == "true");
    if initial && guard.streaming == StreamingLists::Refused {
        return refuse(422, "Invalid", "sendInitialEvents is forbidden unless the WatchList feature gate is enabled");
    }
    let from: u64 = query.get("resourceVersion").and_then(|v| v.parse().ok()).unwrap_or(0);
    if from > 0 && from < guard.compacted {
        return refuse(410, "Expired", "too old resource version");
    }
    let mut lines = Vec::new();
    let mut version = from;
    if from == 0 {
        version = guard.version;
        lines.extend(selected(&guard, &prefix, query).iter().map(|o| json!({"type": "ADDED", "object": o})));
        if initial && guard.streaming == StreamingLists::Served {
            lines.push(json!({"type": "BOOKMARK", "object": {"metadata": {
                "resourceVersion": version.to_string(), "annotations": {"k8s.io/initial-events-end": "true"}}}}));
        }
    }
    let epoch = guard.epoch;
    drop(guard);
    let receiver = changed.subscribe();
    let stream = futures::stream::unfold((lines, version, receiver), move |(mut lines, mut version, mut receiver)| {
        let (world, prefix) = (world.clone(), prefix.clone());
        async move {
            loop {
                if !lines.is_empty() {
                    let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
                    return Some((Ok::<_, std::io::Error>(text), (Vec::new(), version, receiver)));
                }
                {
                    let world = world.lock().unwrap();
                    let news = world.log.iter().filter(|(at, id, _)| *at > version && id.starts_with(&prefix));
                    lines.extend(news.map(|(_, _, line)| line.clone()));
                    version = world.version;
                    if lines.is_empty() && world.epoch != epoch {
                        return None;
                    }
                }
                if lines.is_empty() && receiver.changed().await.is_err() {
                    return None;
                }
            }
        }
    });
    Response::new(Body::from_stream(stream))
}
