//! The agent, as far as services go: the real actors between a source and two sets of maps, one in memory and one in the
//! kernel.
//!
//! Deliberately absent: the loader and the link watcher, whose levels the test sets (maps and devices are what a case says),
//! and the election: this agent has the cluster-wide duties from the start.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use kinesin::actors::config_watcher::{ConfigWatcher, ConfigWatcherArgs};
use kinesin::actors::endpoint_syncer::EndpointSyncer;
use kinesin::actors::endpoint_watcher::EndpointWatcher;
use kinesin::actors::feed::WatcherArgs;
use kinesin::actors::lb_ipam::LbIpam;
use kinesin::actors::map_writer::MapWriter;
use kinesin::actors::object_watcher::{NodeWatcher, PodWatcher, PoolWatcher};
use kinesin::actors::service_watcher::ServiceWatcher;
use kinesin::actors::status_writer::StatusWriter;
use kinesin::address::Address;
use kinesin::config::{self, Inputs};
use kinesin::datapath::{MapStore, MemoryMaps, meaning_rows};
use kinesin::level::Level;
use kinesin::source::Source;
use kinesin::supervisor::{Backoff, Child, Policy, Strategy, Tree};
use kinesin::table::Table;
use kinesin::world::{Devices, Leadership, MapsHandle, TablesHandle, World};
use kinesin_core::devices::Device;
use kinesin_core::objects::{Condition, Meta, Object, ObjectKey, Service};
use kinesin_core::services;
use serde_json::json;
use tempfile::TempDir;

use crate::feed::{Feed, Key, WRITE_LABEL, Written};
use crate::kernel::{self, Borrowed};

/// Every case runs as this node.
pub const NODE: &str = "here";

/// Settings that hold unless a case says otherwise.
const CONFIG: [(&str, &str); 3] =
    [("kube-proxy-replacement", "true"), ("enable-ipv6", "true"), ("skip-crd-creation", "true")];

/// Ends a broken run; the machine may be slow.
const BOUND: Duration = Duration::from_secs(60);

/// Address of the Service that shows how far the agent has come (RFC 2544 keeps it out of every case), and its twin.
const FENCE: [&str; 2] = ["198.18.0.1", "2001:2::1"];
const FENCE_NAMESPACE: &str = "scenario-fence";
/// The API server's own Service, which only one source has.
const API_SERVICE: &str = "10.96.0.1";

/// A failure of an actor is a failed test; it is restarted only so that the test can say so.
const POLICY: Policy = Policy {
    strategy: Strategy::OneForOne,
    max_restarts: 6,
    within: Duration::from_secs(20),
    backoff: Backoff { min: Duration::from_millis(50), max: Duration::from_secs(2) },
    grace: Duration::from_secs(2),
};

const KERNEL_WRITER: &str = "map_writer_kernel";

pub struct Agent {
    pub world: World,
    /// With maps of its own; all other levels are `world`'s.
    kernel_world: World,
    pub memory: Arc<MemoryMaps>,
    pub kernel: Borrowed,
    source: Arc<dyn Source>,
    inputs: Inputs,
    config_dir: TempDir,
    tree: Tree,
    fences: u16,
}

impl Agent {
    pub async fn start(source: Arc<dyn Source>) -> Result<Self> {
        let config_dir = tempfile::tempdir()?;
        write_config(&config_dir, &BTreeMap::new())?;
        let inputs = Inputs {
            config_dir: Some(config_dir.path().to_owned()),
            env: BTreeMap::from([("K8S_NODE_NAME".to_owned(), NODE.to_owned())]),
            flags: Vec::new(),
            hostname: NODE.to_owned(),
        };
        let (config, report) = config::load(&inputs)?;
        let memory = Arc::new(MemoryMaps::new(kernel::sizes()));
        let kernel = tokio::task::spawn_blocking(kernel::borrow).await?;
        let world = World::new(NODE.into(), config);
        let kernel_world = World {
            maps: Level::default(),
            unwritten: Table::default(),
            programmed: Level::with(false),
            ..world.clone()
        };
        let handle = |store: Arc<dyn MapStore>| MapsHandle {
            tables: TablesHandle { generation: 1, store, limits: kernel::limits() },
            hooks: Vec::new(),
            unaccelerated: Vec::new(),
        };
        world.maps.set(handle(memory.clone()));
        kernel_world.maps.set(handle(kernel.maps().clone()));
        world.leadership.set(Leadership { leading: true, holder: Some(NODE.into()) });

        let args = ConfigWatcherArgs {
            world: world.clone(),
            source: source.clone(),
            inputs: Arc::new(inputs.clone()),
            report: Level::with(report),
        };
        let root = tree(&world, &kernel_world, &source, args);
        let tree = Tree::start(root).await?;
        let mut agent = Self { world, kernel_world, memory, kernel, source, inputs, config_dir, tree, fences: 0 };
        agent.set_devices(&BTreeMap::from([(
            "lan0".to_owned(),
            vec!["192.168.1.10/24".to_owned(), "fd01::10/64".to_owned()],
        )]))?;
        Ok(agent)
    }

    pub fn set_devices(&mut self, devices: &BTreeMap<String, Vec<String>>) -> Result<()> {
        let device = |(number, (name, addresses)): (u32, (&String, &Vec<String>))| {
            anyhow::Ok(Device {
                name: name.as_str().into(),
                ifindex: number,
                mac: Some([2, 0, 0, 0, 0, number as u8]),
                up: true,
                running: true,
                addresses: addresses.iter().map(|text| Ok(text.parse()?)).collect::<Result<_>>()?,
                has_global_unicast_route: true,
                ..Device::default()
            })
        };
        let all = (2..).zip(devices).map(device).collect::<Result<Vec<_>>>()?;
        let selected = all.iter().map(|device| device.ifindex).collect();
        self.world.devices.set(Devices { all, selected });
        Ok(())
    }

    /// Replaces the ConfigMap, and waits until the agent has read it.
    pub async fn set_config(&mut self, keys: &BTreeMap<String, String>) -> Result<()> {
        write_config(&self.config_dir, keys)?;
        let wanted = config::reload(&self.inputs, &self.world.config());
        let problems = wanted.report.problems();
        self.until("the configuration", || {
            let noted = self.world.problems.all().into_iter().find(|(area, _)| *area == "configuration");
            self.world.config().generation == wanted.config.generation
                && noted.map(|(_, texts)| texts).unwrap_or_default() == problems
        })
        .await
    }

    /// Writes, and waits until the agent has done with it whatever it does.
    pub async fn write(&mut self, feed: &mut Feed, apply: &[serde_json::Value], delete: &[Key]) -> Result<()> {
        let written = feed.write(apply, delete).await?;
        let seen = |written: &Written| {
            // The watch of an API server keeps of a slice's labels only the Service's name; its objects have versions.
            let arrived = self.meta(&written.key).is_some_and(|meta| match written.version {
                // Of a pod's metadata little is kept.
                0 if written.key.0 == "Pod" => meta.generation.to_string() == written.stamp,
                0 => meta.labels.get(WRITE_LABEL).is_some_and(|stamp| *stamp == written.stamp),
                version => meta.resource_version.parse().unwrap_or(0) >= version,
            });
            arrived || !written.watched || self.is_refused(&written.key)
        };
        let what = || format!("{written:?} and no more {delete:?}");
        self.until(&what(), || written.iter().all(seen) && delete.iter().all(|key| self.meta(key).is_none())).await?;
        self.pass_fence().await
    }

    /// Waits until everything that is in the tables by now is in the maps: what comes after it is.
    pub async fn pass_fence(&mut self) -> Result<()> {
        self.fences += 1;
        let proxy = self.world.config().services.proxy_name.clone();
        let mut labels = serde_json::Map::new();
        if !proxy.is_empty() {
            labels.insert("service.kubernetes.io/service-proxy-name".into(), proxy.into());
        }
        let fence: Service = serde_json::from_value(json!({
            "metadata": {"name": "fence", "namespace": FENCE_NAMESPACE, "labels": labels},
            "spec": {"clusterIPs": FENCE, "ports": [{"port": self.fences}]},
        }))?;
        // The end of the first list takes away what the list does not have.
        let world = &self.world;
        self.until("the first lists", || {
            let lists = [world.services.is_complete(), world.slices.is_complete(), world.nodes.is_complete()];
            lists == [true; 3] && world.pools.is_complete() && world.pods.is_complete()
        })
        .await?;
        // Not through the source: it shall not change what a case has there.
        self.world.services.put(fence.key(), fence);
        let passed = |store: &dyn MapStore| {
            let frontends = store.read().map(|actual| actual.frontends).unwrap_or_default();
            frontends.iter().any(|(key, _)| key.port.get() == self.fences && is_fence(&key.addr.into()))
        };
        self.until("the fence", || passed(&*self.memory) && passed(&**self.kernel.maps())).await
    }

    pub async fn until(&self, what: &str, mut holds: impl FnMut() -> bool) -> Result<()> {
        let waited = async {
            while !holds() {
                tokio::time::sleep(Duration::from_millis(3)).await;
            }
        };
        tokio::time::timeout(BOUND, waited).await.with_context(|| {
            format!("waited for {what}; problems: {:#?}; source: {:?}", self.problems(), self.source.health())
        })
    }

    /// Whether an object has arrived.
    pub fn has(&self, kind: &str, key: &ObjectKey) -> bool {
        self.meta(&(kind.to_owned(), key.namespace.to_string(), key.name.to_string())).is_some()
    }

    /// Contents of an object's labels and annotations, to tell its versions apart.
    pub fn meta_of(&self, kind: &str, key: &ObjectKey) -> Option<Meta> {
        self.meta(&(kind.to_owned(), key.namespace.to_string(), key.name.to_string()))
    }

    /// What the source says is wrong with its input.
    pub fn source_problems(&self) -> Vec<String> {
        self.source.health().problems
    }

    fn meta(&self, (kind, namespace, name): &Key) -> Option<Meta> {
        let key = ObjectKey::new(namespace.as_str(), name.as_str());
        let world = &self.world;
        match kind.as_str() {
            "Service" => world.services.get(&key).map(|object| object.metadata.clone()),
            "EndpointSlice" => world.slices.get(&key).map(|object| object.metadata.clone()),
            "Pod" => world.pods.get(&key).map(|object| object.metadata.clone()),
            "Node" => world.nodes.get(&key).map(|object| object.metadata.clone()),
            "CiliumLoadBalancerIPPool" => world.pools.get(&key).map(|object| object.metadata.clone()),
            other => panic!("no table holds objects of kind {other}"),
        }
    }

    /// Whether the source says that this object cannot be read.
    fn is_refused(&self, (kind, namespace, name): &Key) -> bool {
        let key = ObjectKey::new(namespace.as_str(), name.as_str());
        let named = format!("{kind} {key}: ");
        self.source.health().problems.iter().any(|problem| problem.contains(&named))
    }

    /// What is wrong, as `kinesin status` lists it, without the places of files.
    pub fn problems(&self) -> Vec<String> {
        let mut lines: Vec<String> = Vec::new();
        for (area, texts) in self.world.problems.all() {
            let dir = self.config_dir.path().display().to_string();
            lines.extend(texts.into_iter().map(|text| format!("{area}: {}", text.replace(&dir, "<config-dir>"))));
        }
        for problem in self.source.health().problems {
            let place = problem.find(": ").filter(|end| problem[..*end].contains(".yaml:"));
            lines.push(format!("source: {}", &problem[place.map_or(0, |end| end + 2)..]));
        }
        for (key, compiled) in self.world.compiled.rows() {
            let (kind, key) = services::object_of(&key);
            lines.extend(compiled.problems.iter().map(|problem| format!("{kind} {key}: {problem}")));
        }
        lines.extend(self.world.unwritten.rows().into_iter().map(|(key, text)| format!("Service {key}: {text}")));
        lines
    }

    /// Everything that a case compares, as text.
    pub fn picture(&self) -> Result<String> {
        let [memory, kernel] = [self.maps_text(&*self.memory)?, self.maps_text(&**self.kernel.maps())?];
        ensure!(memory == kernel, "memory maps hold\n{}\nand the kernel's\n{}", memory.join("\n"), kernel.join("\n"));
        ensure!(
            self.world.unwritten.rows() == self.kernel_world.unwritten.rows(),
            "the two kinds of maps refuse different services"
        );
        let sections = [
            ("services", self.services()),
            ("maps", memory),
            ("health", self.health()),
            ("problems", self.problems()),
            ("statuses", self.statuses()),
        ];
        let mut text = String::new();
        for (name, lines) in sections.into_iter().filter(|(_, lines)| !lines.is_empty()) {
            text += &format!("{name}:\n");
            for line in lines {
                text += &format!("  {line}\n");
            }
        }
        if text.is_empty() { Ok("nothing\n".into()) } else { Ok(text) }
    }

    /// As `kinesin services --output wide` has it.
    fn services(&self) -> Vec<String> {
        let mut lines = Vec::new();
        for (key, compiled) in self.world.compiled.rows() {
            if key.namespace == FENCE_NAMESPACE {
                continue;
            }
            let status = self.world.unwritten.get(&key).map_or_else(|| "programmed".into(), |text| text.to_string());
            for view in services::view(&key, &compiled, &status) {
                if view.address.starts_with(&format!("{API_SERVICE}:")) {
                    continue;
                }
                let backend = |b: &services::BackendView| {
                    let mut text = format!("{}@{}", b.address, if b.node.is_empty() { "-" } else { &b.node });
                    if !b.zone.is_empty() {
                        text += &format!("/{}", b.zone);
                    }
                    if b.state != "active" {
                        text += &format!("({})", b.state);
                    }
                    text
                };
                let backends: Vec<String> = view.backends.iter().map(backend).collect();
                let port = if view.port_name.is_empty() { String::new() } else { format!(":{}", view.port_name) };
                let scope = if view.scope == "all" { String::new() } else { format!(" {}", view.scope) };
                let status = if view.status == "programmed" { String::new() } else { format!(" [{}]", view.status) };
                lines.push(format!(
                    "{} {} {}{port}{scope}{status} -> {}",
                    view.address,
                    view.kind,
                    // What tells a pod from its successors differs from run to run.
                    if view.service.contains(":host-port:") {
                        view.service.rsplit_once(':').map_or("", |(name, _)| name)
                    } else {
                        &view.service
                    },
                    if backends.is_empty() { "-".into() } else { backends.join(" ") }
                ));
            }
        }
        lines
    }

    /// What is answered on health-check node ports.
    fn health(&self) -> Vec<String> {
        let checks = self.world.health_checks.rows().into_iter();
        checks.map(|(key, check)| format!("{key} port={} localEndpoints={}", check.port, check.local)).collect()
    }

    /// Messages that the writer of the kernel's maps has handled.
    pub fn syncs(&self) -> u64 {
        let writer = self.tree.root().find(KERNEL_WRITER).expect("it is in the tree");
        writer.stats().messages.load(std::sync::atomic::Ordering::Relaxed)
    }

    /// As `kinesin dump services` has it.
    fn maps_text(&self, store: &dyn MapStore) -> Result<Vec<String>> {
        let rows = meaning_rows(&store.read()?.meaning()).into_iter();
        let ours = |key: &str| {
            let address = key.rsplit_once(':').map_or(key, |(address, _)| address).trim_matches(['[', ']']);
            address != API_SERVICE && !FENCE.contains(&address)
        };
        Ok(rows.filter(|(key, _)| ours(key)).map(|(key, value)| format!("{key} {value}")).collect())
    }

    /// Conditions and addresses that the agent has written.
    fn statuses(&self) -> Vec<String> {
        let condition = |c: &Condition| {
            let (status, reason) = (&c.status, &c.reason);
            let message = if c.message.is_empty() { String::new() } else { format!(" \"{}\"", c.message) };
            format!("{}={status} {reason}{message}", c.kind)
        };
        let mut lines = Vec::new();
        for (key, service) in self.world.services.rows() {
            if !service.status.conditions.is_empty() {
                let addresses: Vec<String> = service.ingress_addresses().map(|address| address.to_string()).collect();
                let conditions: Vec<String> = service.status.conditions.iter().map(condition).collect();
                lines.push(format!("Service {key}: [{}] {}", addresses.join(" "), conditions.join("; ")));
            }
        }
        for (key, pool) in self.world.pools.rows() {
            if !pool.status.conditions.is_empty() {
                let conditions: Vec<String> = pool.status.conditions.iter().map(condition).collect();
                lines.push(format!("Pool {key}: {}", conditions.join("; ")));
            }
        }
        lines
    }

    /// Actors that failed: none in any case.
    pub fn failures(&self) -> Vec<String> {
        fn below(child: &Child, found: &mut Vec<String>) {
            if child.stats().total_restarts() > 0 {
                let error = child.stats().last_error().unwrap_or_default();
                found.push(format!("{}: {error}", child.name()));
            }
            child.below().into_iter().flat_map(|(_, children)| children).for_each(|child| below(child, found));
        }
        let mut found = Vec::new();
        below(self.tree.root(), &mut found);
        found
    }

    pub async fn stop(self) -> Result<()> {
        self.tree.stop().await;
        self.kernel.give_back()
    }
}

fn is_fence(address: &std::net::IpAddr) -> bool {
    FENCE.contains(&address.to_string().as_str())
}

/// One file for each key, as a ConfigMap is mounted.
fn write_config(dir: &TempDir, keys: &BTreeMap<String, String>) -> Result<()> {
    for entry in std::fs::read_dir(dir.path())? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if !keys.contains_key(&name) && !CONFIG.iter().any(|(key, _)| *key == name) {
            std::fs::remove_file(entry.path())?;
        }
    }
    let base = CONFIG.iter().map(|(key, value)| (*key, *value)).filter(|(key, _)| !keys.contains_key(*key));
    for (key, value) in base.chain(keys.iter().map(|(key, value)| (key.as_str(), value.as_str()))) {
        std::fs::write(dir.path().join(key), value)?;
    }
    Ok(())
}

fn tree(world: &World, kernel_world: &World, source: &Arc<dyn Source>, config: ConfigWatcherArgs) -> Child {
    macro_rules! watcher {
        ($actor:ty, $name:literal, $stream:ident, $table:ident) => {{
            let (world, source) = (world.clone(), source.clone());
            Child::actor::<$actor>(&Address::new($name), move || WatcherArgs {
                events: source.$stream(),
                table: world.$table.clone(),
            })
        }};
    }
    let w = |world: &World| {
        let world = world.clone();
        move || world.clone()
    };
    let ws = || {
        let (world, source) = (world.clone(), source.clone());
        move || (world.clone(), source.clone())
    };
    Child::supervisor(
        "scenario",
        POLICY,
        vec![
            Child::actor::<ConfigWatcher>(&Address::new("config_watcher"), move || config.clone()),
            watcher!(ServiceWatcher, "service_watcher", services, services),
            watcher!(EndpointWatcher, "endpoint_watcher", endpoint_slices, slices),
            watcher!(NodeWatcher, "node_watcher", nodes, nodes),
            {
                let (world, source) = (world.clone(), source.clone());
                Child::actor::<PodWatcher>(&Address::new("pod_watcher"), move || WatcherArgs {
                    events: source.pods(NODE),
                    table: world.pods.clone(),
                })
            },
            watcher!(PoolWatcher, "pool_watcher", pools, pools),
            Child::actor::<EndpointSyncer>(&Address::new("endpoint_syncer"), w(world)),
            Child::actor::<MapWriter>(&Address::new("map_writer_memory"), w(world)),
            Child::actor::<MapWriter>(&Address::new(KERNEL_WRITER), w(kernel_world)),
            Child::actor::<LbIpam>(&Address::new("lb_ipam"), ws()),
            Child::actor::<StatusWriter>(&Address::new("status_writer"), ws()),
        ],
    )
}
