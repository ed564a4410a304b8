//! Loads the programs and keeps them attached where they belong.
//!
//! owns: the eBPF object, the hooks and their pins, the devices map, the static part of the settings
//! hears: changes of the node's devices and of the configuration
//! says: the maps level: the maps and what is attached where
//! restart story: loads again, adopts the pinned maps and replaces the program of each pinned link in place, so that no
//! packet meets an empty hook
//!
//! Deliberately absent: detaching on stop. The pinned links carry the traffic while no agent runs.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use kinesin_abi::{Addr, DEVICE_ETHERNET, DeviceValue, SETTING_REJECT_NO_BACKEND, Settings};
use kinesin_core::devices::Device;
use kinesin_core::maglev::HashSeed;

use crate::actor::{Actor, Failure};
use crate::address::{Address, Label};
use crate::config::{Config, NoBackend};
use crate::datapath::{Datapath, HookStatus, LoadOptions, MapSizes, MapStore, cgroup2_root};
use crate::level::Follower;
use crate::world::{Devices, MapsHandle, World};

/// What the loader hears.
pub enum LoaderMsg {
    /// Devices or configuration changed.
    Wake,
}

impl Label for LoaderMsg {
    fn label(&self) -> &'static str {
        "Wake"
    }
}

/// Counts loads of this process, so that every load is a change to those who follow the maps.
static GENERATION: AtomicU64 = AtomicU64::new(0);

/// The actor.
pub struct Loader {
    world: World,
    datapath: Datapath,
    store: Arc<dyn MapStore>,
    generation: u64,
    devices: Follower<Devices>,
    config: Follower<Config>,
    socket_hooks: Vec<HookStatus>,
    /// Devices that carry our programs, by index.
    attached: BTreeMap<u32, String>,
}

impl Actor for Loader {
    type Msg = LoaderMsg;
    type Args = World;

    async fn start(world: World, me: Address<LoaderMsg>) -> Result<Self, Failure> {
        let config = world.config();
        let options = LoadOptions { bpf_root: config.paths.bpf_root.clone(), max_entries: sizes(&config) };
        let cgroup = config.services.socket_lb().then(|| cgroup_root(&config)).flatten();
        // The verifier takes a good part of a second.
        let (datapath, socket_hooks) = tokio::task::spawn_blocking(move || {
            crate::datapath::ensure_bpffs(&options.bpf_root)?;
            let mut datapath = Datapath::load(&options)?;
            let socket_hooks = cgroup.map(|root| datapath.attach_cgroup(&root)).unwrap_or_default();
            anyhow::Ok((datapath, socket_hooks))
        })
        .await??;
        let wake = move || drop(me.cast(LoaderMsg::Wake));
        let loader = Self {
            store: datapath.maps(),
            datapath,
            generation: GENERATION.fetch_add(1, Ordering::Relaxed) + 1,
            devices: world.devices.follow(wake.clone()),
            config: world.config.follow(wake),
            socket_hooks,
            attached: BTreeMap::new(),
            world,
        };
        loader.write_settings()?;
        loader.publish();
        Ok(loader)
    }

    async fn handle(&mut self, LoaderMsg::Wake: LoaderMsg) -> Result<(), Failure> {
        if self.config.changed().is_some() {
            self.write_settings()?;
        }
        if let Some(devices) = self.devices.changed() {
            self.follow_devices(&devices)?;
        }
        self.publish();
        Ok(())
    }
}

impl Loader {
    fn write_settings(&self) -> Result<(), Failure> {
        let config = self.world.config();
        let flags = match config.services.no_backend {
            NoBackend::Reject => SETTING_REJECT_NO_BACKEND,
            NoBackend::Drop => 0,
        };
        let (snat_min, snat_max) = config.services.snat_ports();
        let maglev_seed = HashSeed::from_bytes(config.services.maglev_seed.bytes).jhash_v4;
        self.store.update_settings(&mut |settings: &mut Settings| {
            *settings = Settings { flags, snat_min, snat_max, maglev_seed, ..*settings };
        })?;
        Ok(())
    }

    fn follow_devices(&mut self, devices: &Devices) -> Result<(), Failure> {
        let values: BTreeMap<_, _> = devices.all.iter().map(|device| (device.ifindex, device_value(device))).collect();
        let before: BTreeMap<_, _> = self.store.read_devices()?.into_iter().collect();
        for (ifindex, value) in values.iter().filter(|(ifindex, value)| before.get(ifindex) != Some(value)) {
            self.store.put_device(*ifindex, value)?;
        }
        for ifindex in before.keys().filter(|ifindex| !values.contains_key(ifindex)) {
            self.store.delete_device(*ifindex)?;
        }
        let wanted: BTreeMap<_, _> = devices.selected().map(|device| (device.ifindex, device.name.clone())).collect();
        for (ifindex, name) in self.attached.iter().filter(|(ifindex, _)| !wanted.contains_key(ifindex)) {
            self.datapath.detach_device(name, *ifindex);
            tracing::info!(device = name, "programs detached");
        }
        for (ifindex, name) in &wanted {
            if self.attached.get(ifindex) == Some(name) {
                continue;
            }
            match self.datapath.attach_device(name, *ifindex) {
                Ok(_) => tracing::info!(device = %name, "programs attached"),
                // One device must not take the others down (R34); the hook's status carries the error.
                Err(error) => tracing::error!(device = %name, %error, "programs not attached"),
            }
        }
        self.attached = wanted.into_iter().map(|(ifindex, name)| (ifindex, name.to_string())).collect();
        Ok(())
    }

    fn publish(&self) {
        let mut hooks = self.datapath.hooks();
        for hook in &self.socket_hooks {
            if !hooks.contains(hook) {
                hooks.push(hook.clone());
            }
        }
        let failed = hooks.iter().filter_map(|hook| {
            Some(format!("{} on {}: {}", hook.program, hook.target, hook.error.as_ref()?))
        });
        self.world.problems.set("hooks", failed.collect());
        self.world.maps.set(MapsHandle { generation: self.generation, store: self.store.clone(), hooks });
    }
}

fn sizes(config: &Config) -> MapSizes {
    MapSizes { lb: config.services.map_max, flows: flow_entries(config), ..MapSizes::default() }
}

fn cgroup_root(config: &Config) -> Option<PathBuf> {
    let set = (!config.paths.cgroup_root.as_os_str().is_empty()).then(|| config.paths.cgroup_root.clone());
    set.or_else(cgroup2_root)
}

/// What the programs need to know of a device: its MAC and the addresses that translated packets may carry.
fn device_value(device: &Device) -> DeviceValue {
    let global = |v6: &std::net::Ipv6Addr| !v6.is_loopback() && v6.segments()[0] & 0xffc0 != 0xfe80;
    let addresses = || device.addresses.iter().map(|net| net.addr());
    let ipv4 = addresses().find_map(|ip| match ip {
        IpAddr::V4(v4) => Some(Addr::from(v4).v4_raw()),
        IpAddr::V6(_) => None,
    });
    let ipv6 = addresses().find_map(|ip| match ip {
        IpAddr::V6(v6) if global(&v6) => Some(Addr::from(v6)),
        _ => None,
    });
    let ethernet = device.mac != [0; 6] && !device.loopback;
    DeviceValue {
        mac: device.mac,
        flags: if ethernet { DEVICE_ETHERNET } else { 0 },
        ipv4: ipv4.unwrap_or_default(),
        ipv6: ipv6.unwrap_or_default(),
    }
}

/// How many connections fit: what the keys allow, but no more than a share of the machine's memory (1/800, the ratio that
/// charts set in `bpf-map-dynamic-size-ratio`, halved: one table instead of several), and never fewer than 16,384.
fn flow_entries(config: &Config) -> u32 {
    /// Kernel bytes of a preallocated LRU element: its header, key and value.
    const BYTES: u64 = 48 + 40 + 56;
    let wanted = config.services.ct_tcp_max.saturating_add(config.services.ct_any_max);
    let total = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = total.lines().find_map(|line| line.strip_prefix("MemTotal:")?.split_whitespace().next()?.parse::<u64>().ok());
    let share = kib.map_or(u64::from(wanted), |kib| kib * 1024 / 800 / BYTES);
    wanted.min(u32::try_from(share).unwrap_or(u32::MAX)).max(16_384)
}
