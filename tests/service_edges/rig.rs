//! Two nodes with two pods each, agents on manifests, and ways to change and ask.

use std::net::Ipv4Addr;
use std::time::Duration;

use http_body_util::{BodyExt, Empty};
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use kinesin::admin::views::StatusView;
use kinesin::lab::{AgentHandle, AgentOptions, Lab, Pod, manifests};
use kinesin::net::Netns;
use serde_json::{Value, json};
use tokio::net::TcpSocket;
use tokio::time::Instant;

/// Ends a broken run; nothing that works takes nearly as long, also on two busy cores.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);
const NODES: usize = 2;

/// Fields drop in order: programs first, what they stand on last.
pub(crate) struct Rig {
    agents: Vec<AgentHandle>,
    pub(crate) lab: Lab,
}

/// An answer over HTTP with what tests look at.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Value,
}

impl Answer {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }
}

impl Rig {
    /// Both agents are ready; no manifests but the two nodes and the guide's pool and policy yet.
    pub(crate) async fn start(name: &str, config: &[(&str, &str)]) -> Self {
        let builder = Lab::builder(name).binary(env!("CARGO_BIN_EXE_kinesin"));
        let lab = builder.nodes(NODES).pods_per_node(2).build().await.unwrap();
        for pod in lab.pods() {
            pod.serve().await.unwrap();
        }
        let mut rig = Self { agents: Vec::new(), lab };
        std::fs::write(rig.lab.manifests_dir().join("pool-and-policy.yaml"), manifests::POOL_AND_POLICY).unwrap();
        for number in 1..=NODES {
            rig.put_node(number, &json!({}));
        }
        for number in 1..=NODES {
            let options = AgentOptions::on_manifests(&rig.lab);
            let options = config.iter().fold(options, |options, (key, value)| options.config(key, value));
            rig.agents.push(rig.lab.node(number).start_agent(&options).unwrap());
        }
        for agent in &rig.agents {
            agent.wait_ready(LIMIT).await.unwrap();
        }
        rig
    }

    pub(crate) fn agent(&self, number: usize) -> &AgentHandle {
        &self.agents[number - 1]
    }

    /// Writes one object, in place of what was written under this name before.
    pub(crate) fn put(&self, name: &str, object: &Value) {
        let dir = self.lab.manifests_dir();
        // Hidden, so that nobody reads it half written.
        let early = dir.join(format!(".{name}.new"));
        std::fs::write(&early, object.to_string()).unwrap();
        std::fs::rename(early, dir.join(format!("{name}.json"))).unwrap();
    }

    pub(crate) fn remove(&self, name: &str) {
        std::fs::remove_file(self.lab.manifests_dir().join(format!("{name}.json"))).unwrap();
    }

    /// Writes a Node with its address and this `spec`.
    pub(crate) fn put_node(&self, number: usize, spec: &Value) {
        let node = self.lab.node(number);
        let addresses = json!([{"type": "InternalIP", "address": node.address()}]);
        self.put(
            node.name(),
            &json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": node.name()}, "spec": spec,
                    "status": {"addresses": addresses}}),
        );
    }

    /// Writes a Service `default/<name>` with these ports' names and numbers at its pods.
    pub(crate) fn put_service(&self, name: &str, spec: &Value, addresses: &[Ipv4Addr]) {
        let ingress: Vec<Value> = addresses.iter().map(|ip| json!({"ip": ip})).collect();
        self.put(
            &format!("service-{name}"),
            &json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "default"},
                    "spec": spec, "status": {"loadBalancer": {"ingress": ingress}}}),
        );
    }

    /// Writes the Service's only slice: these pods, with these conditions.
    pub(crate) fn put_endpoints(&self, service: &str, ports: &Value, pods: &[(Pod, Value)]) {
        let endpoints: Vec<Value> = pods
            .iter()
            .map(|(pod, conditions)| {
                json!({"addresses": [pod.address()], "nodeName": pod.node(), "conditions": conditions})
            })
            .collect();
        self.put(
            &format!("slice-{service}"),
            &json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
                    "metadata": {"name": format!("{service}-1"), "namespace": "default",
                                 "labels": {"kubernetes.io/service-name": service}},
                    "ports": ports, "endpoints": endpoints}),
        );
    }

    /// A JSON answer over an agent's admin socket.
    pub(crate) async fn ask(&self, number: usize, path: &str) -> Value {
        let (status, body) = self.agent(number).get(path).await.unwrap();
        assert_eq!(status, 200, "{path}: {body}");
        serde_json::from_str(&body).unwrap()
    }

    pub(crate) async fn status(&self, number: usize) -> StatusView {
        serde_json::from_value(self.ask(number, "/v1/status").await).unwrap()
    }

    /// Waits until a node's status has a problem that contains `text`, or none that does.
    pub(crate) async fn has_problem(&self, number: usize, text: &str, there: bool) {
        eventually(&format!("problem {text:?}: {there}"), async || {
            let problems = self.status(number).await.problems;
            if problems.iter().any(|problem| problem.contains(text)) == there {
                Ok(())
            } else {
                Err(problems.join("\n"))
            }
        })
        .await;
    }

    /// The sum of a metric over its series whose labels contain `labels`; nothing when there is none.
    pub(crate) async fn metric(&self, number: usize, name: &str, labels: &str) -> Option<f64> {
        let (status, text) = self.agent(number).get("/metrics").await.unwrap();
        assert_eq!(status, 200, "{text}");
        let mine =
            |line: &&str| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(' ') || rest.starts_with('{'));
        let lines = text.lines().filter(mine).filter(|line| line.contains(labels));
        lines.map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()).reduce(|a, b| a + b)
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for node in self.lab.nodes() {
                eprintln!("--- {}\n{}", node.name(), kinesin::net::proc::tail(&node.log("agent"), 40));
            }
        }
    }
}

/// `GET url` from inside a namespace, with headers; the body must be JSON or empty.
pub(crate) async fn get(netns: &Netns, address: Ipv4Addr, port: u16, path: &str) -> Result<Answer, String> {
    let exchange = async {
        let socket = netns.run(TcpSocket::new_v4).unwrap().unwrap();
        let stream = socket.connect((address, port).into()).await.map_err(|error| error.to_string())?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|error| error.to_string())?;
        let connection = tokio::spawn(connection);
        let request = hyper::Request::get(path).header(hyper::header::HOST, "x").body(Empty::<Bytes>::new()).unwrap();
        let response = sender.send_request(request).await.map_err(|error| error.to_string())?;
        let status = response.status().as_u16();
        let text = |value: &hyper::header::HeaderValue| value.to_str().unwrap().to_owned();
        let headers = response.headers().iter().map(|(name, value)| (name.to_string(), text(value))).collect();
        let body = response.into_body().collect().await.map_err(|error| error.to_string())?.to_bytes();
        connection.abort();
        let body =
            if body.is_empty() { Value::Null } else { serde_json::from_slice(&body).map_err(|e| e.to_string())? };
        Ok(Answer { status, headers, body })
    };
    let limit = Duration::from_secs(5);
    tokio::time::timeout(limit, exchange).await.unwrap_or_else(|_| Err("no answer in time".into()))
}

/// Waits until a probe gives a value; when it does not, what it said last is in the failure.
pub(crate) async fn eventually<T>(what: &str, mut probe: impl AsyncFnMut() -> Result<T, String>) -> T {
    let deadline = Instant::now() + LIMIT;
    loop {
        match probe().await {
            Ok(value) => return value,
            Err(last) => assert!(Instant::now() < deadline, "not within {LIMIT:?}: {what}; last: {last}"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
