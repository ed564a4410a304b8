//! Loads the programs and keeps them attached where they belong.
//!
//! owns: the eBPF object, the hooks and their pins, the devices map, the static part of the settings, and that the kernel
//! reserves NodePorts
//! hears: changes of the node's devices, of the configuration and of the way to pods, the clock for comparing them and the
//! hooks with what is there, and for trying again what failed
//! says: which programs are ours; the tables level: the maps, which can be filled while the kernel still verifies the programs; the maps level: the
//! same maps with programs, and what is attached where
//! restart story: loads again, adopts the pinned maps and replaces the program of each pinned link in place, so that no
//! packet meets an empty hook
//!
//! Deliberately absent: detaching on stop. The pinned links carry the traffic while no agent runs.

mod devices;
mod load;
mod told;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use kinesin_abi::{
    SETTING_ANSWER_PING, SETTING_DIRECT_TO_PODS, SETTING_DIRECT_WATCHED, SETTING_FOLLOW_FRAGMENTS4,
    SETTING_FOLLOW_FRAGMENTS6, SETTING_PROTECT_NODE_PORTS, SETTING_REJECT_NO_BACKEND,
};
use kinesin_core::host_routing::HostRouting;
use kinesin_core::maglev::HashSeed;
use kinesin_core::plan::Limits;
use metrics::counter;
use smol_str::SmolStr;

use self::load::{Loaded, Options, acceleration, open};
use self::told::Told;
use crate::actor::{Actor, Failure};
use crate::address::{Address, Label, Timer};
use crate::config::{Config, NoBackend};
use crate::datapath::{Acceleration, MapSizes, update_settings};
use crate::level::Follower;
use crate::net::local_ports;
use crate::supervisor::Backoff;
use crate::sync::lock;
use crate::world::{Devices, MapsHandle, TablesHandle, World};

/// What the loader hears.
pub enum LoaderMsg {
    /// Devices, configuration or the way to pods changed.
    Wake,
    /// Time to compare what is written and attached with what should be.
    Verify,
    /// Time to load and attach again what failed.
    Retry,
}

impl Label for LoaderMsg {
    fn label(&self) -> &'static str {
        match self {
            Self::Wake => "Wake",
            Self::Verify => "Verify",
            Self::Retry => "Retry",
        }
    }
}

/// A program that the kernel refuses is likely refused again, and verifying it takes a good part of a second: what is
/// only in somebody's way is tried again soon, the rest seldom (R34).
const BACKOFF: Backoff = Backoff { min: Duration::from_secs(1), max: Duration::from_secs(300) };

/// The actor.
pub struct Loader {
    world: World,
    me: Address<LoaderMsg>,
    options: Options,
    acceleration: Acceleration,
    loaded: Loaded,
    devices: Follower<Devices>,
    config: Follower<Config>,
    host_routing: Follower<HostRouting>,
    /// Devices that carry our programs, by index.
    attached: BTreeMap<u32, SmolStr>,
    /// Those whose drivers run one too, as the devices map says.
    driven: BTreeSet<u32>,
    told: Told,
    verify: Timer,
    /// While a hook or program fails: how often it was tried again, and the next time.
    retry: Option<(usize, Timer)>,
}

impl Actor for Loader {
    type Msg = LoaderMsg;
    type Args = World;

    async fn start(world: World, me: Address<LoaderMsg>) -> Result<Self, Failure> {
        let wake = me.waker(|| LoaderMsg::Wake);
        let options = Options::from(&*world.config());
        let acceleration = acceleration(&world.config());
        // The programs follow with the first message, which one of the levels sends.
        let loader = Self {
            loaded: open(options.clone(), acceleration).await?,
            options,
            acceleration,
            driven: BTreeSet::new(),
            told: Told::default(),
            devices: world.devices.follow(wake.clone()),
            config: world.config.follow(wake.clone()),
            host_routing: world.host_routing.follow(wake),
            attached: BTreeMap::new(),
            verify: me.cast_after(world.config().services.verify_interval, LoaderMsg::Verify),
            me,
            world,
            retry: None,
        };
        loader.write_settings()?;
        loader.reserve_node_ports();
        loader.world.tables.set(loader.tables());
        Ok(loader)
    }

    async fn handle(&mut self, message: LoaderMsg) -> Result<(), Failure> {
        let mut taken = 0;
        if !self.loaded.programs {
            self.loaded.load_programs(self.options.cgroup.clone()).await?;
            self.world.programs.set(self.loaded.datapath().program_ids());
        }
        match message {
            LoaderMsg::Wake => {}
            LoaderMsg::Verify => {
                self.verify = self.me.cast_after(self.world.config().services.verify_interval, LoaderMsg::Verify);
                taken = self.loaded.datapath().verify_hooks();
            }
            LoaderMsg::Retry => {
                let datapath = self.loaded.datapath.clone();
                tokio::task::spawn_blocking(move || lock(&datapath).retry()).await?;
            }
        }
        let config = self.config.changed();
        let routing = self.host_routing.changed();
        let news = self.devices.changed().is_some() | config.is_some() | routing.is_some();
        if let Some(config) = config {
            let options = Options::from(&*config);
            if options != self.options {
                self.load_anew(options).await;
            }
            self.accelerate(acceleration(&config)).await?;
        }
        if news {
            self.reserve_node_ports();
        }
        let mut written = usize::from(self.write_settings()?);
        // Also without a change: hooks of a fresh load are still to be attached.
        if let Some(devices) = self.world.devices.get() {
            written += self.follow_devices(&devices)?;
        }
        if self.world.devices.get().is_some() {
            self.finish_moving().await?;
        }
        if taken > 0 {
            counter!("kinesin_hook_repairs_total").increment(taken as u64);
            tracing::warn!(hooks = taken, "programs were taken off their hooks: attached again");
        }
        if written > 0 && !news {
            counter!("kinesin_map_repairs_total").increment(written as u64);
            tracing::warn!(operations = written, "settings or devices differed: repaired");
        }
        self.schedule_retry(matches!(message, LoaderMsg::Retry));
        self.publish();
        Ok(())
    }
}

impl Loader {
    /// Loads with other options; where that fails, everything stays as it was.
    async fn load_anew(&mut self, options: Options) {
        let loaded = async {
            let mut loaded = open(options.clone(), self.acceleration).await?;
            loaded.load_programs(options.cgroup.clone()).await?;
            Ok::<_, Failure>(loaded)
        };
        match loaded.await {
            Ok(loaded) => {
                tracing::info!("maps and programs were made anew");
                (self.loaded, self.options) = (loaded, options);
                self.world.programs.set(self.loaded.datapath().program_ids());
                self.attached.clear();
                self.world.problems.clear("loader");
            }
            Err(error) => {
                let text = format!("settings of maps not applied, the last good ones stay: {error:#}");
                self.world.problems.set("loader", vec![text]);
            }
        }
    }

    /// Attaches to drivers, or leaves them, as the configuration now says.
    async fn accelerate(&mut self, acceleration: Acceleration) -> Result<(), Failure> {
        if acceleration != self.acceleration {
            self.acceleration = acceleration;
            let datapath = self.loaded.datapath.clone();
            tokio::task::spawn_blocking(move || lock(&datapath).accelerate(acceleration)).await?;
        }
        Ok(())
    }

    /// Empties tables that this load has replaced, now that all programs are the new ones, and tells of it.
    async fn finish_moving(&mut self) -> Result<(), Failure> {
        let (moving, mut replaced) = {
            let mut datapath = self.loaded.datapath();
            let Some(moving) = datapath.take_moving() else { return Ok(()) };
            (moving, datapath.migrations().to_vec())
        };
        replaced.extend(tokio::task::spawn_blocking(move || moving.finish()).await?);
        let mut lost = Vec::new();
        for table in &replaced {
            let (map, difference, kept) = (&table.map, &table.difference, table.kept);
            tracing::info!(%map, %difference, kept, lost = table.lost, "table replaced");
            counter!("kinesin_map_moved_entries_total", "map_name" => map.to_lowercase()).increment(kept as u64);
            if table.lost > 0 {
                lost.push(format!("{map} ({difference}): {} entries did not fit and are lost", table.lost));
            }
        }
        self.world.problems.set("maps-replaced", lost);
        Ok(())
    }

    /// Returns whether anything was different.
    fn write_settings(&self) -> Result<bool, Failure> {
        let (config, routing) = (self.world.config(), self.world.host_routing());
        let reject = config.services.no_backend == NoBackend::Reject;
        let (snat_min, snat_max) = config.services.snat_ports();
        let mut differs = false;
        update_settings(&*self.loaded.store, |settings| {
            let before = *settings;
            settings.flags = if reject { SETTING_REJECT_NO_BACKEND } else { 0 }
                | if config.services.vip_ping { SETTING_ANSWER_PING } else { 0 }
                | if routing.straight { SETTING_DIRECT_TO_PODS } else { 0 }
                | if routing.said { 0 } else { SETTING_DIRECT_WATCHED }
                | if config.services.protect_node_ports { SETTING_PROTECT_NODE_PORTS } else { 0 }
                | if config.services.fragments4 { SETTING_FOLLOW_FRAGMENTS4 } else { 0 }
                | if config.services.fragments6 { SETTING_FOLLOW_FRAGMENTS6 } else { 0 };
            (settings.snat_min, settings.snat_max) = (snat_min, snat_max);
            settings.maglev_seed = seed(&config).jhash;
            settings.timeouts = config.services.timeouts.to_abi();
            settings.pad = 0;
            let node_ports = config.services.node_port_range;
            (settings.node_port_min, settings.node_port_max) = (node_ports.first, node_ports.last);
            differs = *settings != before;
        })?;
        Ok(differs)
    }

    /// Sees to it that the node's own connections get no port that a Service may be given.
    fn reserve_node_ports(&self) {
        let config = self.world.config();
        let services = &config.services;
        let problems = if services.kube_proxy_replacement {
            local_ports::reserve(services.node_port_range.ports(), services.reserve_node_ports).err()
        } else {
            None
        };
        self.world.problems.set("node-ports", problems.into_iter().collect());
    }

    /// Tries again later while something fails, less and less often.
    fn schedule_retry(&mut self, tried: bool) {
        if self.loaded.datapath().failing() == 0 {
            self.retry = None;
        } else if tried || self.retry.is_none() {
            let tries = self.retry.take().map_or(0, |(tries, _)| tries) + usize::from(tried);
            let pause = BACKOFF.delay(tries + 1, rand::random());
            self.retry = Some((tries, self.me.cast_after(pause, LoaderMsg::Retry)));
        }
    }

    /// The maps and how much fits.
    fn tables(&self) -> TablesHandle {
        let MapSizes { frontends, slots, backends, maglev, ranges, .. } = self.options.sizes;
        let maglev_seed = seed(&self.world.config());
        let limits = Limits {
            frontends,
            slots,
            backends,
            maglev_tables: maglev,
            source_ranges: ranges,
            maglev_size: self.options.maglev_size,
            maglev_seed,
        };
        TablesHandle { generation: self.loaded.generation, store: self.loaded.store.clone(), limits }
    }

    fn publish(&mut self) {
        let (hooks, unaccelerated) = {
            let datapath = self.loaded.datapath();
            let unaccelerated = datapath.unaccelerated().map(|(device, why)| (device.to_owned(), why.to_owned()));
            (datapath.hooks(), unaccelerated.collect::<Vec<_>>())
        };
        let failed =
            hooks.iter().filter_map(|hook| Some(format!("{} {}: {}", hook.program, hook.place, hook.error.as_ref()?)));
        self.world.problems.set("hooks", failed.collect());
        self.world.problems.set("memory", self.options.tight.clone());
        let tables = self.tables();
        self.world.tables.set(tables.clone());
        let maps = MapsHandle { tables, hooks, unaccelerated };
        self.told.acceleration(&maps);
        self.world.maps.set(maps);
    }
}

/// The seed that all nodes share.
fn seed(config: &Config) -> HashSeed {
    HashSeed::from_bytes(config.services.maglev_seed.bytes)
}
