//! One load: what it depends on, and what it makes.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use crate::actor::Failure;
use crate::config::{self, Config};
use crate::datapath::{Acceleration, Datapath, LoadOptions, MapSizes, MapStore, cgroup2_root, ensure_bpffs};
use crate::machine;
use crate::sync::lock;
use anyhow::Context;

/// Counts loads of this process, so that every load is a change to those who follow the maps.
static GENERATION: AtomicU64 = AtomicU64::new(0);

/// What a load depends on; a change of it makes maps and programs anew.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Options {
    pub(super) bpf_root: PathBuf,
    pub(super) sizes: MapSizes,
    /// What was asked for and may not fit into the memory.
    pub(super) tight: Vec<String>,
    /// Where sockets are translated.
    pub(super) cgroup: Option<PathBuf>,
    /// Serve IPv6 on devices.
    pub(super) ipv6: bool,
    pub(super) maglev_size: u32,
}

/// What a load makes.
pub(super) struct Loaded {
    pub(super) generation: u64,
    /// Behind a lock, because loading takes longer than a handler may: it happens on another thread, for which the
    /// handler waits.
    pub(super) datapath: Arc<Mutex<Datapath>>,
    pub(super) store: Arc<dyn MapStore>,
    /// The programs are verified, and hang at the cgroup.
    pub(super) programs: bool,
}

/// Makes the maps, on a thread of its own: large ones take the kernel some milliseconds.
pub(super) async fn open(options: Options, acceleration: Acceleration) -> Result<Loaded, Failure> {
    let datapath = tokio::task::spawn_blocking(move || {
        ensure_bpffs(&options.bpf_root).with_context(|| format!("mount bpffs at {}", options.bpf_root.display()))?;
        let load = LoadOptions {
            max_entries: options.sizes,
            ipv6: options.ipv6,
            maglev_size: options.maglev_size,
            acceleration,
            ..LoadOptions::new(&options.bpf_root)
        };
        anyhow::Ok(Datapath::open(&load)?)
    })
    .await??;
    let generation = GENERATION.fetch_add(1, Ordering::Relaxed) + 1;
    let store = datapath.maps();
    Ok(Loaded { generation, datapath: Arc::new(Mutex::new(datapath)), store, programs: false })
}

impl Loaded {
    pub(super) fn datapath(&self) -> MutexGuard<'_, Datapath> {
        lock(&self.datapath)
    }

    /// Loads the programs, and attaches those of sockets, on a thread of its own: the verifier takes a good part of a
    /// second.
    pub(super) async fn load_programs(&mut self, cgroup: Option<PathBuf>) -> Result<(), Failure> {
        let datapath = self.datapath.clone();
        tokio::task::spawn_blocking(move || {
            let mut datapath = lock(&datapath);
            datapath.load_programs();
            if let Some(cgroup) = &cgroup {
                datapath.attach_cgroup(cgroup);
            }
        })
        .await?;
        self.programs = true;
        Ok(())
    }
}

impl From<&Config> for Options {
    fn from(config: &Config) -> Self {
        let (sizes, tight) = config.services.sizes.resolve(machine::memory());
        let sizes = MapSizes { fragments: config.services.fragments_max, ..MapSizes::from(sizes) };
        let set = Some(config.paths.cgroup_root.clone()).filter(|path| !path.as_os_str().is_empty());
        let cgroup = config.services.socket_lb().then(|| set.or_else(cgroup2_root)).flatten();
        let ipv6 = config.families.ipv6;
        let maglev_size = config.services.maglev_table_size;
        Self { bpf_root: config.paths.bpf_root.clone(), sizes, tight, cgroup, ipv6, maglev_size }
    }
}

/// Whether drivers run a program too.
pub(super) fn acceleration(config: &Config) -> Acceleration {
    match config.services.acceleration {
        config::Acceleration::Disabled => Acceleration::Disabled,
        config::Acceleration::Native => Acceleration::Native,
        config::Acceleration::BestEffort => Acceleration::BestEffort,
    }
}
