//! A lab with a real API server on its LAN, and the objects in it.

use std::net::{IpAddr, Ipv4Addr};
use std::ops::Range;
use std::path::Path;
use std::time::Instant;

use anyhow::Context;
use futures::{StreamExt, TryStreamExt};
use kinesin::lab::{Lab, LabBuilder, Node};
use kube::Client;
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use crate::objects;
use crate::report::{line, ms};
use crate::support::control_plane::{ControlPlane, Options};

pub(crate) const SERVICES: &str = "/api/v1/namespaces/default/services";
pub(crate) const SLICES: &str = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices";
/// Where agents and kube-proxies say that they have written everything.
pub(crate) const HEALTHZ: u16 = 10_256;

/// The API server listens where the LAN's router is.
const API: Ipv4Addr = kinesin::lab::ROUTER_ADDRESS;
const IN_FLIGHT: usize = 32;

/// A lab and its control plane. Dropped in this order.
pub(crate) struct Cluster {
    pub(crate) plane: ControlPlane,
    pub(crate) lab: Lab,
    pub(crate) runtime: Runtime,
}

impl Cluster {
    /// Starts both; every node of the lab is an object of the API.
    pub(crate) fn start(name: &str, nodes: usize, pods: usize) -> anyhow::Result<Self> {
        Self::start_with(name, nodes, pods, |lab| lab)
    }

    /// [`Self::start`] of a lab with something special.
    pub(crate) fn start_with(
        name: &str,
        nodes: usize,
        pods: usize,
        special: impl FnOnce(LabBuilder) -> LabBuilder,
    ) -> anyhow::Result<Self> {
        let runtime = Runtime::new()?;
        let binary = crate::agent_binary()?;
        let lab =
            runtime.block_on(special(Lab::builder(name)).nodes(nodes).pods_per_node(pods).binary(&binary).build())?;
        let options = Options { netns: Some(lab.lan().path().to_owned()), bind: IpAddr::V4(API), ..Options::default() };
        let plane = ControlPlane::start(&lab.dir().join("control-plane"), options)?;
        let cluster = Self { plane, lab, runtime };
        for node in cluster.lab.nodes() {
            cluster.create_node(node)?;
        }
        Ok(cluster)
    }

    /// The node that balances.
    pub(crate) fn node(&self) -> &Node {
        self.lab.node(1)
    }

    /// Runs `work` with an API client whose connections begin in the lab's LAN.
    pub(crate) fn with_client<T: Send>(
        &self,
        work: impl AsyncFnOnce(Client) -> anyhow::Result<T> + Send,
    ) -> anyhow::Result<T> {
        let kubeconfig = kube::config::Kubeconfig::read_from(self.plane.kubeconfig())?;
        self.lab.lan().run(move || {
            // On this very thread, which is in the namespace for good.
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async move {
                let options = kube::config::KubeConfigOptions::default();
                let config = kube::Config::from_custom_kubeconfig(kubeconfig, &options).await?;
                work(Client::try_from(config)?).await
            })
        })?
    }

    fn create_node(&self, node: &Node) -> anyhow::Result<()> {
        let object = json!({ "apiVersion": "v1", "kind": "Node", "metadata": { "name": node.name() } });
        let status = json!({ "status": { "addresses": [{ "type": "InternalIP", "address": node.address() }] } });
        let path = format!("/api/v1/nodes/{}/status", node.name());
        self.with_client(async move |client| {
            send(&client, "POST", "/api/v1/nodes", &object).await?;
            send(&client, "PATCH", &path, &status).await.map(drop)
        })
    }

    /// Makes services with one slice each.
    pub(crate) fn create(&self, numbers: Range<usize>, endpoints: usize) -> anyhow::Result<()> {
        self.for_each(numbers, "making", async move |client, number| {
            send(&client, "POST", SERVICES, &objects::service(number, None)).await?;
            send(&client, "POST", SLICES, &objects::slice(number, endpoints)).await.map(drop)
        })
    }

    /// Gives the slices of services another number of endpoints.
    pub(crate) fn resize(&self, numbers: Range<usize>, endpoints: usize) -> anyhow::Result<()> {
        self.for_each(numbers, "resizing", async move |client, number| set_endpoints(&client, number, endpoints).await)
    }

    fn for_each(
        &self,
        numbers: Range<usize>,
        what: &str,
        work: impl AsyncFn(Client, usize) -> anyhow::Result<()> + Send + Sync,
    ) -> anyhow::Result<()> {
        let (begun, count) = (Instant::now(), numbers.len());
        self.with_client(async move |client| {
            let one = |number| work(client.clone(), number);
            futures::stream::iter(numbers).map(one).buffer_unordered(IN_FLIGHT).try_collect::<()>().await
        })?;
        if count > 0 {
            line(&format!("({what} {count} services and slices)"), &[("time", ms(begun.elapsed()))]);
        }
        Ok(())
    }
}

/// Gives a service's slice this many endpoints, the first ones of those that it may have.
pub(crate) async fn set_endpoints(client: &Client, service: usize, endpoints: usize) -> anyhow::Result<()> {
    let patch = json!({ "endpoints": objects::slice(service, endpoints)["endpoints"] });
    send(client, "PATCH", &format!("{SLICES}/{}-abcde", objects::name(service)), &patch).await.map(drop)
}

/// One request to the API server.
pub(crate) async fn send(client: &Client, method: &str, path: &str, body: &Value) -> anyhow::Result<Value> {
    let kind = if method == "PATCH" { "application/merge-patch+json" } else { "application/json" };
    let request = http::Request::builder().method(method).uri(path).header(http::header::CONTENT_TYPE, kind);
    let request = request.body(serde_json::to_vec(body)?)?;
    client.request::<Value>(request).await.with_context(|| format!("{method} {path}"))
}

/// A field of `/proc/<pid>/status`, in bytes.
pub(crate) fn memory(pid: u32, field: &str) -> anyhow::Result<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let found = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':')?.split_whitespace().next());
    let kib: u64 = found.with_context(|| format!("no {field} in the status of {pid}"))?.parse()?;
    Ok(kib * 1024)
}

/// User and system time of a process.
pub(crate) fn cpu_time(pid: u32) -> anyhow::Result<std::time::Duration> {
    let stat = std::fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("stat"))?;
    // Fields 14 and 15, proc(5); the second may hold spaces, but ends with the last parenthesis.
    let rest = stat.rsplit_once(')').context("/proc/<pid>/stat has no name")?.1;
    let ticks: u64 = rest.split_whitespace().skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum();
    let per_second = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK)?.unwrap_or(100);
    Ok(std::time::Duration::from_millis(ticks * 1000 / u64::try_from(per_second)?))
}

#[expect(clippy::disallowed_methods, reason = "a thread of the benchmark, which looks at something again and again")]
pub(crate) fn pause(time: std::time::Duration) {
    std::thread::sleep(time);
}

impl Cluster {
    /// Ends everything in order.
    pub(crate) fn end(self) {
        let Self { plane, lab, runtime } = self;
        drop(plane);
        runtime.block_on(async { drop(lab) });
    }
}
