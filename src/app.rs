//! Puts the agent together: the only module that knows every actor.
//!
//! Deliberately absent: anything that an actor could do.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};

use crate::actors::arp_responder::ArpResponder;
use crate::actors::config_watcher::{ConfigWatcher, ConfigWatcherArgs};
use crate::actors::endpoint_syncer::EndpointSyncer;
use crate::actors::endpoint_watcher::EndpointWatcher;
use crate::actors::feed::WatcherArgs;
use crate::actors::flow_collector::FlowCollector;
use crate::actors::health::Health;
use crate::actors::lb_ipam::LbIpam;
use crate::actors::leader_elector::LeaderElector;
use crate::actors::link_watcher::LinkWatcher;
use crate::actors::loader::Loader;
use crate::actors::map_writer::MapWriter;
use crate::actors::membership::Membership;
use crate::actors::object_watcher::{LeaseWatcher, NodeWatcher, PodWatcher, PolicyWatcher, PoolWatcher};
use crate::actors::peer_watcher::PeerWatcher;
use crate::actors::service_health::ServiceHealth;
use crate::actors::service_watcher::ServiceWatcher;
use crate::actors::socket_reaper::SocketReaper;
use crate::actors::stack_watcher::StackWatcher;
use crate::actors::status_writer::StatusWriter;
use crate::actors::vip_owner::{VipOwner, VipOwnerMsg};
use crate::address::Address;
use crate::admin::Api;
use crate::config::{self, Inputs, SourceKind};
use crate::footprint;
use crate::level::Level;
use crate::source::{KubernetesOptions, KubernetesSource, ManifestsSource, Source};
use crate::supervisor::{Backoff, Child, Policy, Strategy, Tree};
use crate::world::World;

mod answers;
mod kpr;
mod objects;
mod trees;

use answers::Answers;

/// A child may fail six times in twenty seconds; with these pauses one that cannot start at all escalates after about
/// three.
const POLICY: Policy = Policy {
    strategy: Strategy::OneForOne,
    max_restarts: 6,
    within: Duration::from_secs(20),
    backoff: Backoff { min: Duration::from_millis(50), max: Duration::from_secs(2) },
    grace: Duration::from_secs(2),
};

const REST_FOR_ONE: Policy = Policy { strategy: Strategy::RestForOne, ..POLICY };

/// A failure of a whole group is seven failures of one child already, and takes three seconds and more to come about: fewer
/// are allowed, in a longer time. The process ends after about a quarter of a minute of trying when a child refuses at
/// once, and still within the window when each attempt takes two seconds.
const ROOT: Policy = Policy { max_restarts: 3, within: Duration::from_secs(120), ..POLICY };

/// Runs the agent until it is told to stop. Fails when its supervision gives up: the process ends, its pod restarts, and
/// the pinned programs carry the traffic meanwhile.
pub fn run(inputs: Inputs) -> anyhow::Result<()> {
    if let Err(error) = footprint::run_in_short_slices() {
        tracing::debug!(%error, "no short time slices: changes may wait longer for a busy processor");
    }
    // Two threads: the work is small, and each costs memory. So do those for what blocks, which is seldom.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_keep_alive(Duration::from_secs(1))
        .on_thread_park(footprint::on_idle)
        .enable_all()
        .build()?;
    let result = runtime.block_on(agent(inputs));
    // A write in flight must not keep the process from ending.
    runtime.shutdown_timeout(Duration::from_secs(1));
    result
}

async fn agent(inputs: Inputs) -> anyhow::Result<()> {
    let (config, report) = config::load(&inputs)?;
    report.log();
    let metrics = crate::metrics::install().context("install the metrics recorder")?;
    tracing::info!(node = %config.node_name, version = env!("CARGO_PKG_VERSION"), source = %config.source.kind, generation = config.generation, "starting");
    let source = connect(&config).await?;
    let world = World::new(config.node_name.as_str().into(), config);
    world.problems.set("configuration", report.problems());
    let report = Level::with(report);
    let vip_owner = Address::new("vip_owner");
    let answers = Answers::new(world.clone(), source.clone(), report.clone(), metrics, vip_owner.clone());
    let args = ConfigWatcherArgs { world: world.clone(), source: source.clone(), inputs: Arc::new(inputs), report };
    let root = tree(&world, &source, vip_owner, args, answers.clone());
    answers.set_tree(root.clone());
    let mut tree = Tree::start(root).await?;
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tokio::select! {
        () = tree.gave_up() => anyhow::bail!("{}", tree.root().stats().last_error().unwrap_or_else(|| "supervision gave up".into())),
        _ = terminate.recv() => tracing::info!("stopping: SIGTERM"),
        _ = interrupt.recv() => tracing::info!("stopping: SIGINT"),
    }
    tree.stop().await;
    tracing::info!("stopped; pinned programs go on");
    Ok(())
}

async fn connect(config: &config::Config) -> anyhow::Result<Arc<dyn Source>> {
    Ok(match config.source.kind {
        SourceKind::Kubernetes => KubernetesSource::connect(kubernetes_options(config)).await?,
        SourceKind::Manifests => ManifestsSource::open(&config.source.manifests_dir, &config.paths.state_dir)?,
    })
}

fn kubernetes_options(config: &config::Config) -> KubernetesOptions {
    let kubernetes = &config.kubernetes;
    let given = !kubernetes.kubeconfig.as_os_str().is_empty();
    KubernetesOptions {
        kubeconfig: given.then(|| kubernetes.kubeconfig.clone()),
        api_server_urls: kubernetes.api_servers.clone(),
        namespace: kubernetes.namespace.clone(),
        qps: kubernetes.qps.into(),
        burst: kubernetes.burst,
    }
}

/// Who falls with whom.
fn tree(
    world: &World,
    source: &Arc<dyn Source>,
    vip_owner: Address<VipOwnerMsg>,
    config: ConfigWatcherArgs,
    api: Arc<Answers>,
) -> Child {
    let w = || {
        let world = world.clone();
        move || world.clone()
    };
    let ws = || {
        let (world, source) = (world.clone(), source.clone());
        move || (world.clone(), source.clone())
    };
    macro_rules! watcher {
        ($actor:ty, $name:literal, $stream:ident, $table:ident $(, of $node:ident)?) => {{
            let (world, source) = (world.clone(), source.clone());
            Child::actor::<$actor>(&Address::new($name), move || WatcherArgs {
                events: source.$stream($(&world.$node)?),
                table: world.$table.clone(),
            })
        }};
    }
    let datapath = Child::supervisor(
        "datapath",
        REST_FOR_ONE,
        vec![
            Child::actor::<Loader>(&Address::new("loader"), w()),
            Child::actor::<MapWriter>(&Address::new("map_writer"), w()),
            Child::actor::<FlowCollector>(&Address::new("flow_collector"), w()),
            Child::actor::<SocketReaper>(&Address::new("socket_reaper"), w()),
        ],
    );
    let cluster = Child::supervisor(
        "cluster",
        REST_FOR_ONE,
        vec![
            watcher!(ServiceWatcher, "service_watcher", services, services),
            watcher!(EndpointWatcher, "endpoint_watcher", endpoint_slices, slices),
            watcher!(PodWatcher, "pod_watcher", pods, pods, of node),
            Child::actor::<EndpointSyncer>(&Address::new("endpoint_syncer"), w()),
            Child::actor::<StatusWriter>(&Address::new("status_writer"), ws()),
        ],
    );
    let routing = Child::supervisor(
        "routing",
        POLICY,
        vec![
            watcher!(NodeWatcher, "node_watcher", nodes, nodes),
            watcher!(PoolWatcher, "pool_watcher", pools, pools),
            watcher!(PolicyWatcher, "policy_watcher", l2_policies, policies),
            watcher!(LeaseWatcher, "lease_watcher", leases, leases),
            Child::actor::<LeaderElector>(&Address::new("leader_elector"), ws()),
            Child::actor::<LbIpam>(&Address::new("lb_ipam"), ws()),
            Child::actor::<Membership>(&Address::new("membership"), ws()),
            Child::actor::<PeerWatcher>(&Address::new("peer_watcher"), w()),
            Child::actor::<VipOwner>(&vip_owner, w()),
            Child::actor::<ArpResponder>(&Address::new("arp_responder"), w()),
        ],
    );
    let node = Child::supervisor(
        "node",
        REST_FOR_ONE,
        vec![
            Child::actor::<LinkWatcher>(&Address::new("link_watcher"), w()),
            Child::actor::<StackWatcher>(&Address::new("stack_watcher"), w()),
        ],
    );
    let health = Child::supervisor(
        "health",
        POLICY,
        vec![
            Child::actor::<ConfigWatcher>(&Address::new("config_watcher"), move || config.clone()),
            Child::actor::<ServiceHealth>(&Address::new("service_health"), w()),
            Child::actor::<Health>(&Address::new("health_server"), {
                let world = world.clone();
                move || (world.clone(), api.clone() as Arc<dyn Api>)
            }),
        ],
    );
    Child::supervisor("agent", ROOT, vec![health, node, datapath, cluster, routing])
}
