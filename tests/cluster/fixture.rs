//! A cluster: a lab's nodes, pods and client, a control plane on the LAN, and an agent on every node.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::time::Duration;

use kinesin::lab::programs::ClientOptions;
use kinesin::lab::report::Totals;
use kinesin::lab::{AgentHandle, AgentOptions, ECHO_PORT, HTTP_PORT, Lab, LoadHandle, Pod, ROUTER_ADDRESS};
use serde_json::{Value, json};
use tokio::task::block_in_place;
use tokio::time::Instant;

use crate::support::control_plane::{ControlPlane, Options};

/// Ends a broken run; nothing that works takes nearly as long, also on two busy cores.
pub(crate) const BOUND: Duration = Duration::from_secs(60);
/// What the client waits for one answer. Longer than a lost SYN's first repetition: such a loss shows in the gap.
pub(crate) const PATIENT: Duration = Duration::from_secs(5);
/// The agents' rights, as they are shipped.
const RBAC: &str = include_str!("../../deploy/manifests/rbac.yaml");
/// The guide's pool and policy, as they stand.
pub(crate) const GUIDE: &str = include_str!("../../config/manifests/cilium-config.yaml");
/// The first address of the guide's pool.
pub(crate) const FIRST: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 100);
const NODES: usize = 3;
const PODS: usize = 2;

/// How long a node counts as present, and with it the elected agent.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Leases {
    /// As they come: a restart fits into them.
    Default,
    /// Seconds, where a takeover is waited for.
    Short,
}

pub(crate) struct Cluster {
    // In the order in which they go.
    agents: Vec<Option<AgentHandle>>,
    pub(crate) plane: ControlPlane,
    pub(crate) lab: Lab,
    leases: Leases,
}

impl Cluster {
    /// Everything up to agents that are ready. No pool, policy or Service of ours yet.
    pub(crate) async fn start(name: &str, leases: Leases) -> Self {
        let builder = Lab::builder(&format!("cluster-{name}")).nodes(NODES).pods_per_node(PODS);
        let lab = builder.binary(env!("CARGO_BIN_EXE_kinesin")).build().await.unwrap();
        let netns = Some(lab.lan().path().to_owned());
        let options = Options { netns, bind: ROUTER_ADDRESS.into(), ..Options::default() };
        let dir = lab.dir().join("control-plane");
        let (plane, ()) = tokio::join!(
            async { tokio::task::spawn_blocking(move || ControlPlane::start(&dir, options)).await.unwrap().unwrap() },
            async {
                for pod in lab.pods() {
                    pod.serve().await.unwrap();
                }
            }
        );
        let mut cluster = Self { agents: (0..NODES).map(|_| None).collect(), plane, lab, leases };
        cluster.prepare().await;
        for number in 1..=NODES {
            cluster.start_agent(number);
        }
        for number in 1..=NODES {
            cluster.agent(number).wait_ready(BOUND).await.unwrap();
        }
        cluster
    }

    /// With the guide's pool and policy.
    pub(crate) async fn with_guide(name: &str, leases: Leases) -> Self {
        let cluster = Self::start(name, leases).await;
        cluster.kinds_are_served().await;
        cluster.apply(GUIDE);
        cluster
    }

    /// What an administrator does first: rights, and nodes as kubelets would write them.
    async fn prepare(&self) {
        self.until("the namespace kube-system", async || {
            self.try_kubectl(&["get", "namespace", "kube-system"], "").map(drop)
        })
        .await;
        let nodes = self.lab.nodes().iter().map(|node| {
            json!({"apiVersion": "v1", "kind": "Node", "metadata": {
                "name": node.name(), "labels": {"kubernetes.io/hostname": node.name(), "kubernetes.io/os": "linux"},
            }})
            .to_string()
        });
        self.apply(&std::iter::once(RBAC.to_owned()).chain(nodes).collect::<Vec<_>>().join("\n---\n"));
        for node in self.lab.nodes() {
            let status = json!({"status": {"addresses": [
                {"type": "InternalIP", "address": node.address()}, {"type": "Hostname", "address": node.name()},
            ]}});
            let status = status.to_string();
            self.kubectl(&["patch", "node", node.name(), "--subresource=status", "--type=merge", "-p", &status]);
            self.write_kubeconfig(node.name());
        }
    }

    /// A token of the agents' ServiceAccount for each, as each pod of a DaemonSet has.
    fn write_kubeconfig(&self, node: &str) {
        let token = self.kubectl(&["create", "token", "kinesin", "--namespace=kube-system"]);
        let mut config: Value = serde_json::from_slice(&std::fs::read(self.plane.kubeconfig()).unwrap()).unwrap();
        config["users"][0]["user"] = json!({"token": token.trim()});
        std::fs::write(self.kubeconfig_of(node), config.to_string()).unwrap();
    }

    fn kubeconfig_of(&self, node: &str) -> PathBuf {
        self.lab.dir().join(format!("{node}.kubeconfig"))
    }

    /// Starts the agent of a node, whether or not one ran before.
    pub(crate) fn start_agent(&mut self, number: usize) {
        let node = self.lab.node(number);
        let kubeconfig = self.kubeconfig_of(node.name());
        let mut options = AgentOptions::new(self.lab.binary())
            .config("source", "kubernetes")
            .config("k8s-kubeconfig-path", &kubeconfig.to_string_lossy())
            .config("k8s-namespace", "kube-system")
            .config("kube-proxy-replacement", "true")
            .config("enable-l2-announcements", "true");
        if self.leases == Leases::Short {
            options = options
                .config("l2-announcements-lease-duration", "3s")
                .config("l2-announcements-renew-deadline", "2s")
                .config("l2-announcements-retry-period", "500ms");
        }
        self.agents[number - 1] = Some(node.start_agent(&options).unwrap());
    }

    pub(crate) fn agent(&self, number: usize) -> &AgentHandle {
        self.agents[number - 1].as_ref().unwrap()
    }

    /// `kill -9`; the kernel's part of it goes on.
    pub(crate) fn kill_agent(&mut self, number: usize) {
        self.agents[number - 1].take().unwrap().kill9();
    }

    /// Numbers of the nodes whose agent runs.
    pub(crate) fn running(&self) -> Vec<usize> {
        (1..=NODES).filter(|number| self.agents[number - 1].is_some()).collect()
    }

    /// kubectl that succeeds.
    #[track_caller]
    pub(crate) fn kubectl(&self, args: &[&str]) -> String {
        block_in_place(|| self.plane.kubectl_ok(args))
    }

    /// kubectl's output, or its complaint.
    pub(crate) fn try_kubectl(&self, args: &[&str], input: &str) -> Result<String, String> {
        let output: Output = block_in_place(|| self.plane.kubectl_with_input(args, input));
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
    }

    #[track_caller]
    pub(crate) fn apply(&self, yaml: &str) -> String {
        block_in_place(|| self.plane.kubectl_apply(yaml))
    }

    /// An object as it is stored.
    #[track_caller]
    pub(crate) fn read(&self, args: &[&str]) -> Value {
        serde_json::from_str(&self.kubectl(&[&["get", "-o", "json"], args].concat())).unwrap()
    }

    /// Waits until the elected agent has registered the kinds.
    pub(crate) async fn kinds_are_served(&self) {
        for kind in ["ciliumloadbalancerippools.cilium.io", "ciliuml2announcementpolicies.cilium.io"] {
            let path = "jsonpath={.status.conditions[?(@.type==\"Established\")].status}";
            self.until(kind, async || match self.try_kubectl(&["get", "crd", kind, "-o", path], "")?.as_str() {
                "True" => Ok(()),
                other => Err(format!("established: {other:?}")),
            })
            .await;
        }
    }

    /// Polls until there is a value. What it complained of last, and the agents' logs, are in the panic.
    #[track_caller]
    pub(crate) fn until<'a, T>(
        &'a self,
        what: &'a str,
        mut probe: impl AsyncFnMut() -> Result<T, String> + 'a,
    ) -> impl Future<Output = T> + 'a {
        let caller = std::panic::Location::caller();
        async move {
            let deadline = Instant::now() + BOUND;
            loop {
                match probe().await {
                    Ok(value) => return value,
                    Err(last) if Instant::now() > deadline => {
                        panic!("{caller}: waited {BOUND:?} for {what}; the last answer: {last}")
                    }
                    Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
                }
            }
        }
    }

    /// A command of `kinesin` to a node's agent, as JSON.
    pub(crate) fn ask(&self, number: usize, args: &[&str]) -> Result<Value, String> {
        let mut command = Command::new(self.lab.binary());
        let socket = self.lab.node(number).agent_socket();
        command.args(args).args(["-o", "json", "--socket-path"]).arg(socket);
        let output = block_in_place(|| command.output()).unwrap();
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).into_owned());
        }
        serde_json::from_slice(&output.stdout).map_err(|error| error.to_string())
    }

    /// Addresses in a Service's status, and the IPAM condition's status, reason and message.
    pub(crate) fn service_status(&self, namespace: &str, name: &str) -> (Vec<String>, [String; 3]) {
        let service = self.read(&["service", name, "--namespace", namespace]);
        let entries = service["status"]["loadBalancer"]["ingress"].as_array().cloned().unwrap_or_default();
        let addresses = entries.iter().map(|entry| entry["ip"].as_str().unwrap_or_default().to_owned()).collect();
        let conditions = service["status"]["conditions"].as_array().cloned().unwrap_or_default();
        let ours = conditions.into_iter().find(|c| c["type"] == "cilium.io/IPAMRequestSatisfied").unwrap_or_default();
        (addresses, ["status", "reason", "message"].map(|key| ours[key].as_str().unwrap_or_default().to_owned()))
    }

    /// Waits for these addresses in a Service's status, with a satisfied condition.
    pub(crate) async fn has_addresses(&self, namespace: &str, name: &str, wanted: &[&str]) {
        let what = format!("addresses {wanted:?} of {namespace}/{name}");
        self.until(&what, async || {
            let (addresses, condition) = self.service_status(namespace, name);
            let satisfied = condition[0] == "True" && condition[1] == "satisfied";
            if addresses == wanted && satisfied { Ok(()) } else { Err(format!("{addresses:?} {condition:?}")) }
        })
        .await;
    }

    /// Waits until every agent that runs names the same owner of an address, and the LAN hears that node and nobody else
    /// answer for it. Gives the node's number.
    pub(crate) async fn owner_of(&self, address: Ipv4Addr) -> usize {
        self.until(&format!("one owner of {address}"), async || {
            let mut owners = BTreeSet::new();
            for number in self.running() {
                owners.insert(self.owner_seen_by(number, address)?);
            }
            let [owner] = owners.iter().collect::<Vec<_>>()[..] else { return Err(format!("owners {owners:?}")) };
            let node = self.lab.nodes().iter().find(|node| node.name() == owner).ok_or("owner of no lab")?;
            let (heard, mac) = (self.lab.client().arp_probe(address).await.unwrap(), node.mac().await.unwrap());
            if heard == [mac] { Ok(node.number()) } else { Err(format!("{owner} owns it, {heard:x?} answer")) }
        })
        .await
    }

    /// Whom a node's agent takes for the owner of an address.
    pub(crate) fn owner_seen_by(&self, number: usize, address: Ipv4Addr) -> Result<String, String> {
        let vips = self.ask(number, &["vips"])?;
        let vip = vips.as_array().into_iter().flatten().find(|vip| vip["address"] == address.to_string());
        let owner = vip.and_then(|vip| vip["owner"].as_str());
        owner.map(str::to_owned).ok_or_else(|| format!("node-{number} says {vips}"))
    }

    /// Waits until a URL on the LAN is answered by each of these pods and no other, from the client.
    pub(crate) async fn answers(&self, url: &str, pods: &[Pod]) {
        let options = ClientOptions::new(url).rate(100).timeout(PATIENT);
        let load = self.lab.client().load(&options).unwrap();
        answered_by(load, pods).await;
    }

    /// Starts requests and long-lived connections to a Service made by [`web`].
    pub(crate) fn load(&self, address: Ipv4Addr, rate: u32, hold: u32) -> LoadHandle {
        let options = ClientOptions::new(format!("http://{address}/")).rate(rate).timeout(PATIENT);
        let options = options.hold(hold, (address, ECHO_PORT).into());
        self.lab.client().load(&options).unwrap()
    }
}

/// Waits until each of these pods has answered, ends the load, and checks that nobody else did and nothing failed.
pub(crate) async fn answered_by(load: LoadHandle, pods: &[Pod]) {
    let names: BTreeSet<String> = pods.iter().map(|pod| pod.name().to_owned()).collect();
    let all = |totals: &Totals| names.iter().all(|name| totals.backends.contains_key(name));
    load.wait_for("answer of every pod", BOUND, all).await.unwrap();
    let totals = load.stop().await.unwrap();
    assert_eq!(totals.backends.keys().cloned().collect::<BTreeSet<_>>(), names, "{totals:?}");
    assert_eq!(totals.failed, 0, "{totals:?}");
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for node in self.lab.nodes() {
                eprintln!("--- agent of {}:\n{}", node.name(), kinesin::net::proc::tail(&node.log("agent"), 60));
            }
        }
    }
}

/// A LoadBalancer Service with the lab's two ports; `spec` is further YAML of the spec, `annotations` of the metadata.
pub(crate) fn service(name: &str, annotations: &Value, spec: &Value) -> String {
    let mut object = json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": name, "annotations": annotations},
        "spec": {
            "type": "LoadBalancer",
            "ports": [
                {"name": "http", "port": 80, "targetPort": HTTP_PORT},
                {"name": "echo", "port": ECHO_PORT, "targetPort": ECHO_PORT},
            ],
        },
    });
    for (key, value) in spec.as_object().into_iter().flatten() {
        object["spec"][key] = value.clone();
    }
    object.to_string()
}

/// Its endpoints, as the controller would write them.
pub(crate) fn slice(service: &str, pods: &[Pod]) -> String {
    let endpoints: Vec<Value> = pods
        .iter()
        .map(|pod| json!({"addresses": [pod.address()], "nodeName": pod.node(), "conditions": {"ready": true}}))
        .collect();
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {"name": format!("{service}-1"), "labels": {"kubernetes.io/service-name": service}},
        "addressType": "IPv4",
        "ports": [
            {"name": "http", "protocol": "TCP", "port": HTTP_PORT}, {"name": "echo", "protocol": "TCP", "port": ECHO_PORT},
        ],
        "endpoints": endpoints,
    })
    .to_string()
}

/// A Service with all its endpoints.
pub(crate) fn web(name: &str, pods: &[Pod]) -> String {
    format!("{}\n---\n{}", service(name, &json!({}), &json!({})), slice(name, pods))
}
