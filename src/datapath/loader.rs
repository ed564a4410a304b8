//! Loading the programs and their maps. Attaching them is in `hooks`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread;

use aya::maps::{Map, MapData};
use aya::programs::{Program, ProgramError};
use aya::util::KernelVersion;
use aya::{Ebpf, EbpfLoader};
use kinesin_abi::maglev_words;
use kinesin_core::flows::most_opening;

use super::attach::{self, HookStatus, Place, chain};
use super::hooks::{ETHERNET, Hook, SOCKETS};
use super::kernel::KernelMaps;
use super::moving::{Moving, has_connections};
use super::object::{with_exact_clock, with_maglev_size};
use super::options::{LoadError, LoadOptions};
use super::pin::{self, Migration, Pinned, Shape};
use super::pods::PodHooks;
use super::{MapStore, TABLES, sys};
use crate::sync::lock;

/// The compiled programs.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/kinesin"));

/// The programs' constant for the cookie of the node's network namespace.
const NODE_NETNS: &str = "NODE_NETNS";
/// That for what a CPU may have of connections that begin.
const MOST_OPENING: &str = "MOST_OPENING";
/// That for the entries of a Maglev table.
const MAGLEV_SIZE: &str = "MAGLEV_SIZE";
/// Since when kernels have the clock of the last tick, `bpf_ktime_get_coarse_ns`.
const HAS_COARSE_CLOCK: KernelVersion = KernelVersion::new(5, 11, 0);

/// The loaded programs. Dropping it leaves maps and hooks in the kernel, where they go on.
pub struct Datapath {
    pub(super) ebpf: Ebpf,
    maps: Arc<KernelMaps>,
    pub(super) options: LoadOptions,
    pub(super) links: PathBuf,
    /// By program: why the verifier refused it.
    pub(super) refused: BTreeMap<String, String>,
    pub(super) hooks: BTreeMap<Hook, HookStatus>,
    /// Devices that do without XDP, by index: name and why.
    pub(super) spared: BTreeMap<u32, (String, String)>,
    pub(super) pods: PodHooks,
    migrations: Vec<Migration>,
    /// Tables that are being replaced, until somebody takes it on to empty them.
    moving: Option<Moving>,
}

impl Datapath {
    /// [`Self::open`] and [`Self::load_programs`]. Nothing is attached yet: hooks of an earlier agent go on with their own
    /// programs and maps until [`Self::attach_device`] and [`Self::attach_cgroup`] replace them.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn load(options: &LoadOptions) -> Result<Self, LoadError> {
        Self::load_object(OBJECT, options)
    }

    /// [`Self::load`] of other bytes than [`OBJECT`].
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn load_object(object: &[u8], options: &LoadOptions) -> Result<Self, LoadError> {
        let mut datapath = Self::open_object(object, options)?;
        datapath.load_programs();
        Ok(datapath)
    }

    /// Makes or adopts the maps, which can be filled from now on: verifying the programs takes much longer.
    ///
    /// # Errors
    /// The root is not a bpf filesystem, or a map cannot be made. A program that the verifier refuses is no error here
    /// and later.
    pub fn open(options: &LoadOptions) -> Result<Self, LoadError> {
        Self::open_object(OBJECT, options)
    }

    fn open_object(object: &[u8], options: &LoadOptions) -> Result<Self, LoadError> {
        let root = &options.bpf_root;
        let pin_error = |path: &Path| {
            let path = path.to_owned();
            move |source| LoadError::Pin { path, source }
        };
        if !pin::is_bpffs(root).map_err(pin_error(root))? {
            return Err(LoadError::NotBpffs(root.clone()));
        }
        let (maps, links) = (pin::maps_dir(root), pin::links_dir(root));
        for dir in [&maps, &links] {
            fs::create_dir_all(dir).map_err(pin_error(dir))?;
        }
        raise_memlock();

        let mut object = with_maglev_size(object, options.maglev_size).map_err(LoadError::Object)?;
        if KernelVersion::current().is_ok_and(|kernel| kernel < HAS_COARSE_CLOCK) {
            object = with_exact_clock(&object).map_err(LoadError::Object)?.into();
        }
        let object = &*object;
        let shapes = shapes(object, options)?;
        let mut loader = EbpfLoader::new();
        let mut replaced = Vec::new();
        for (table, name, shape) in &shapes {
            if let Some(entries) = options.max_entries.of(table) {
                loader.map_max_entries(name, entries);
            }
            let mut path = maps.join(name);
            // Of an agent that died at just this point.
            let temporary = maps.join(format!("{name}-new"));
            let _ = fs::remove_file(&temporary);
            if let Pinned::Differs(old, difference) = pin::inspect(&path, shape).map_err(pin_error(&path))? {
                replaced.push((*name, old, difference, temporary.clone(), path));
                path = temporary;
            }
            loader.map_pin_path(name, path);
        }
        let cookie = sys::own_netns_cookie().unwrap_or(0);
        loader.override_global(NODE_NETNS, &cookie, false);
        let online = aya::util::online_cpus().map_or(1, |cpus| cpus.len().max(1)) as u32;
        let flows = shapes.iter().find(|(table, ..)| *table == "flows").map_or(0, |(_, _, shape)| shape.entries);
        let most_opening = most_opening(flows) / online;
        loader.override_global(MOST_OPENING, &most_opening, false);
        loader.override_global(MAGLEV_SIZE, &options.maglev_size, false);
        let ebpf = loader.load(object).map_err(|error| LoadError::Object(chain(&error)))?;

        let cpus = aya::util::nr_cpus().map_or(1, |n| n.get() as usize);
        let mut migrations = Vec::new();
        let fd = |name: &str| map_fd(&ebpf, name).map_err(io::Error::other);
        let mut moving = Moving::new(&maps, fd, &shapes).map_err(pin_error(&maps))?;
        for (name, old, difference, temporary, path) in replaced {
            if has_connections(name) {
                moving.keep(name, old, difference, &path).map_err(pin_error(&path))?;
                fs::rename(&temporary, &path).map_err(pin_error(&path))?;
                continue;
            }
            let fd = map_fd(&ebpf, name)?;
            let cpus = if matches!(name, "DROPS" | "COUNTS") { cpus } else { 1 };
            // What cannot be read is lost; it must not keep the agent from starting.
            let copied = match name {
                "SETTINGS" => pin::copy_settings(&old, &fd),
                _ => pin::copy(&old, &fd, cpus, name == "MAGLEV"),
            };
            let (kept, lost) = copied.unwrap_or((0, 0));
            fs::rename(&temporary, &path).map_err(pin_error(&path))?;
            // What cannot be read now cannot be read later.
            let _ = moving.again(name, old);
            if difference != "empty" {
                migrations.push(Migration { map: name.to_owned(), difference, kept, lost });
            }
        }
        let mut fds = Vec::new();
        for (_, name, _) in &shapes {
            fds.push(map_fd(&ebpf, name)?);
        }
        let fds = fds.try_into().map_err(|_| LoadError::Object("maps are missing".into()))?;
        let maps = KernelMaps::new(fds).map_err(pin_error(&maps))?;
        attach::sweep(&links);
        Ok(Self {
            ebpf,
            maps: Arc::new(maps),
            options: options.clone(),
            links,
            refused: BTreeMap::new(),
            hooks: BTreeMap::new(),
            spared: BTreeMap::new(),
            pods: PodHooks::default(),
            migrations,
            moving: Some(moving),
        })
    }

    /// Loads the programs, each on its own: one that is refused leaves the others working (R34). Those for devices without
    /// link-layer header wait until there is one, because verifying them takes as long again, and that of drivers for a
    /// driver that takes it. Returns when the kernel has verified all of them, as many at a time as there are processors.
    pub fn load_programs(&mut self) {
        let devices =
            Place::ALL.into_iter().zip(ETHERNET).filter(|(place, _)| *place != Place::Xdp && self.has(*place));
        // The largest first, so that none of them begins last.
        let devices = devices.map(|(_, program)| program).chain(self.pod_programs());
        let wanted: Vec<_> = devices.chain(SOCKETS.map(|(program, _)| program)).collect();
        let mut programs: Vec<_> = self.ebpf.programs_mut().filter(|(name, _)| wanted.contains(name)).collect();
        programs.sort_by_key(|(name, _)| wanted.iter().position(|wanted| wanted == name));
        let missing = wanted.iter().filter(|name| programs.iter().all(|(there, _)| there != *name));
        let mut refused: Vec<_> =
            missing.map(|name| ((*name).to_owned(), refusal(&ProgramError::UnexpectedProgramType))).collect();
        let threads = thread::available_parallelism().map_or(1, usize::from).min(programs.len());
        let queue = Mutex::new(programs.into_iter());
        let work = || {
            let mut refused = Vec::new();
            loop {
                // In a statement of its own, which gives the lock back before the kernel begins to verify.
                let next = lock(&queue).next();
                let Some((name, program)) = next else { return refused };
                refused.extend(load_program(program).err().map(|why| (name.to_owned(), why)));
            }
        };
        thread::scope(|scope| {
            let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
            refused.extend(work());
            for other in others {
                refused.extend(other.join().expect("loading a program does not panic"));
            }
        });
        self.refused.extend(refused);
    }

    /// Loads a program unless it is loaded.
    pub(super) fn load_program(&mut self, name: &str) {
        let result = match self.ebpf.program_mut(name) {
            Some(program) => load_program(program),
            None => Err(refusal(&ProgramError::UnexpectedProgramType)),
        };
        if let Err(why) = result {
            self.refused.insert(name.to_owned(), why);
        }
    }

    /// Ids of the programs that are loaded.
    pub fn program_ids(&self) -> BTreeSet<u32> {
        self.ebpf.programs().filter_map(|(_, program)| Some(program.info().ok()?.id())).collect()
    }

    /// The maps, for as long as somebody wants them.
    pub fn maps(&self) -> Arc<dyn MapStore> {
        self.maps.clone()
    }

    /// The maps with their file descriptors.
    pub fn kernel_maps(&self) -> Arc<KernelMaps> {
        self.maps.clone()
    }

    /// Pinned maps of another shape that this load has met.
    pub fn migrations(&self) -> &[Migration] {
        &self.migrations
    }

    /// Tables that this load replaces, for whoever attaches the programs to finish; none the second time. Until then the
    /// new programs find in the old tables of connections what the new ones do not have.
    pub fn take_moving(&mut self) -> Option<Moving> {
        self.moving.take()
    }

    /// The loaded object, for tests that run programs.
    pub fn ebpf_mut(&mut self) -> &mut Ebpf {
        &mut self.ebpf
    }
}

/// Tables, map names and shapes that the object expects, in the order of [`TABLES`].
fn shapes(object: &[u8], options: &LoadOptions) -> Result<Vec<(&'static str, &'static str, Shape)>, LoadError> {
    let object = aya_obj::Object::parse(object).map_err(|error| LoadError::Object(chain(&error)))?;
    TABLES
        .into_iter()
        .zip(NAMES)
        .map(|(table, name)| {
            let map = object.maps.get(name).ok_or_else(|| LoadError::Object(format!("map {name} is missing")))?;
            let outer = map.inner().is_some();
            let shape = Shape {
                kind: map.map_type(),
                key: map.key_size(),
                value: if outer { 4 } else { map.value_size() },
                entries: options.max_entries.of(table).unwrap_or(map.max_entries()),
                flags: map.map_flags(),
                inner: outer.then_some(maglev_words(options.maglev_size) * 4),
            };
            Ok((table, name, shape))
        })
        .collect()
}

/// [`TABLES`] as the maps are called.
const NAMES: [&str; TABLES.len()] = [
    "FRONTENDS",
    "SLOTS",
    "BACKENDS",
    "MAGLEV",
    "FLOWS",
    "TRANSIENT",
    "FRAGMENTS",
    "SOCKETS",
    "AFFINITY",
    "RANGES",
    "L2",
    "DEVICES",
    "PEERS",
    "SETTINGS",
    "DROPS",
    "COUNTS",
];

fn map_fd(ebpf: &Ebpf, name: &str) -> Result<OwnedFd, LoadError> {
    let data: &MapData = match ebpf.map(name) {
        Some(
            Map::Array(data)
            | Map::HashMap(data)
            | Map::LruHashMap(data)
            | Map::LpmTrie(data)
            | Map::PerCpuArray(data)
            | Map::ArrayOfMaps(data)
            | Map::HashOfMaps(data),
        ) => data,
        _ => return Err(LoadError::Object(format!("map {name} is missing or of another kind"))),
    };
    data.fd().as_fd().try_clone_to_owned().map_err(|error| LoadError::Object(format!("map {name}: {error}")))
}

/// Loads a program unless it is loaded; says why the kernel refuses it.
fn load_program(program: &mut Program) -> Result<(), String> {
    let result = match program {
        Program::SchedClassifier(program) => program.load(),
        Program::CgroupSockAddr(program) => program.load(),
        Program::CgroupSock(program) => program.load(),
        Program::Xdp(program) => program.load(),
        _ => Err(ProgramError::UnexpectedProgramType),
    };
    match result {
        Ok(()) | Err(ProgramError::AlreadyLoaded) => Ok(()),
        Err(error) => Err(refusal(&error)),
    }
}

/// Before Linux 5.11 maps count against this limit; later it does not matter.
fn raise_memlock() {
    let unlimited = libc::rlimit { rlim_cur: libc::RLIM_INFINITY, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: the structure outlives the call.
    unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &unlimited) };
}

/// The last lines of the verifier, which say why.
fn refusal(error: &ProgramError) -> String {
    const LINES: usize = 8;
    let ProgramError::LoadError { io_error, verifier_log } = error else { return chain(error) };
    let log = verifier_log.to_string();
    let lines: Vec<&str> = log.lines().filter(|line| !line.trim().is_empty()).collect();
    format!("the kernel refused it: {io_error}; {}", lines[lines.len().saturating_sub(LINES)..].join(" | "))
}
