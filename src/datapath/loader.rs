//! Loading the programs and their maps, and attaching them.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use aya::maps::{Map, MapData};
use aya::programs::{CgroupSockAddr, Program, ProgramError, SchedClassifier, TcAttachType};
use aya::{Ebpf, EbpfLoader};

use super::attach::{self, Attachment, DeviceHooks, HookStatus, chain};
use super::kernel::KernelMaps;
use super::pin::{self, Migration, Pinned, Shape};
use super::{MapStore, TABLES};

/// The compiled programs.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/kinesin"));

/// The programs of Ethernet devices and of devices without link-layer header, (ingress, egress).
const ETHERNET: [&str; 2] = ["cil_from_netdev", "cil_to_netdev"];
const LAYER3: [&str; 2] = ["cil_from_l3dev", "cil_to_l3dev"];

/// The socket programs with their `enum bpf_attach_type`.
const SOCKETS: [(&str, u32); 8] = [
    ("cil_sock4_connect", 10),
    ("cil_sock6_connect", 11),
    ("cil_sock4_sendmsg", 14),
    ("cil_sock6_sendmsg", 15),
    ("cil_sock4_recvmsg", 19),
    ("cil_sock6_recvmsg", 20),
    ("cil_sock4_getpeername", 29),
    ("cil_sock6_getpeername", 30),
];

/// How to attach to devices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AttachMode {
    /// By tcx link, or as clsact filter where the kernel has no tcx.
    #[default]
    Auto,
    /// As clsact filter.
    Clsact,
}

/// Most elements of each map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapSizes {
    /// Frontends.
    pub frontends: u32,
    /// Members of all backend sets.
    pub slots: u32,
    /// Backends.
    pub backends: u32,
    /// Maglev tables.
    pub maglev: u32,
    /// Connections, two elements each.
    pub flows: u32,
    /// Translated sockets.
    pub sockets: u32,
    /// Clients of services with session affinity.
    pub affinity: u32,
    /// Source ranges of all services, each counted once per service port.
    pub ranges: u32,
    /// Addresses answered for, per device.
    pub l2: u32,
    /// Devices.
    pub devices: u32,
}

impl MapSizes {
    /// From `bpf-lb-map-max`: so many frontends and backends, and room for each backend in four sets.
    pub fn for_services(max: u32) -> Self {
        let max = max.max(1);
        Self {
            frontends: max,
            slots: max.saturating_mul(4),
            backends: max,
            maglev: max,
            ranges: max,
            ..Self::default()
        }
    }

    pub(crate) fn of(&self, table: &str) -> Option<u32> {
        match table {
            "frontends" => Some(self.frontends),
            "slots" => Some(self.slots),
            "backends" => Some(self.backends),
            "maglev" => Some(self.maglev),
            "flows" => Some(self.flows),
            "sockets" => Some(self.sockets),
            "affinity" => Some(self.affinity),
            "ranges" => Some(self.ranges),
            "l2" => Some(self.l2),
            "devices" => Some(self.devices),
            _ => None,
        }
    }
}

impl Default for MapSizes {
    fn default() -> Self {
        Self {
            frontends: 65_536,
            slots: 262_144,
            backends: 65_536,
            maglev: 65_536,
            flows: 131_072,
            sockets: 65_536,
            affinity: 65_536,
            ranges: 65_536,
            l2: 4096,
            devices: 256,
        }
    }
}

/// Where to pin and how big.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// A directory on a bpf filesystem (`--bpf-root`).
    pub bpf_root: PathBuf,
    /// Sizes of the maps.
    pub max_entries: MapSizes,
    /// How to attach to devices.
    pub attach: AttachMode,
}

impl LoadOptions {
    /// Defaults below a root.
    pub fn new(bpf_root: impl Into<PathBuf>) -> Self {
        Self { bpf_root: bpf_root.into(), max_entries: MapSizes::default(), attach: AttachMode::default() }
    }
}

/// The maps could not be made. Programs that do not load are no such error: see [`Datapath::hooks`].
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// Nothing can be pinned there.
    #[error("bpf-root {path} is not on a bpf filesystem; mount one with: mount -t bpf bpf {path}", path = .0.display())]
    NotBpffs(PathBuf),
    /// A directory or pin cannot be made or read.
    #[error("pin below {path}: {source}", path = .path.display())]
    Pin {
        /// Where.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The object cannot be parsed, or a map cannot be made.
    #[error("load the eBPF object: {0}")]
    Object(String),
}

/// A device cannot be looked at.
#[derive(Debug, thiserror::Error)]
#[error("attach to device {name} (index {ifindex}): {source}")]
pub struct AttachError {
    /// The device.
    pub name: String,
    /// Its index.
    pub ifindex: u32,
    /// The kernel's answer.
    pub source: io::Error,
}

/// The loaded programs. Dropping it leaves maps and hooks in the kernel, where they go on.
pub struct Datapath {
    ebpf: Ebpf,
    maps: Arc<KernelMaps>,
    options: LoadOptions,
    links: PathBuf,
    /// By program: why the verifier refused it.
    refused: BTreeMap<String, String>,
    /// By place.
    hooks: BTreeMap<(String, String), HookStatus>,
    migrations: Vec<Migration>,
}

impl Datapath {
    /// Makes or adopts the maps, and loads the programs. Nothing is attached yet: hooks of an earlier agent go on with
    /// their own programs and maps until [`Self::attach_device`] and [`Self::attach_cgroup`] replace them.
    ///
    /// # Errors
    /// The root is not a bpf filesystem, or a map cannot be made. A program that the verifier refuses is no error here.
    pub fn load(options: &LoadOptions) -> Result<Self, LoadError> {
        Self::load_object(OBJECT, options)
    }

    /// [`Self::load`] of other bytes than [`OBJECT`].
    pub fn load_object(object: &[u8], options: &LoadOptions) -> Result<Self, LoadError> {
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

        let shapes = shapes(object, &options.max_entries)?;
        let mut loader = EbpfLoader::new();
        let mut replaced = Vec::new();
        for (table, name, shape) in &shapes {
            if let Some(entries) = options.max_entries.of(table) {
                loader.map_max_entries(name, entries);
            }
            let mut path = maps.join(name);
            if let Pinned::Differs(old, difference) = pin::inspect(&path, shape).map_err(pin_error(&path))? {
                let temporary = maps.join(format!("{name}-new"));
                let _ = fs::remove_file(&temporary);
                replaced.push((*name, old, difference, temporary.clone(), path));
                path = temporary;
            }
            loader.map_pin_path(name, path);
        }
        let ebpf = loader.load(object).map_err(|error| LoadError::Object(chain(&error)))?;

        let cpus = aya::util::nr_cpus().map_or(1, |n| n.get() as usize);
        let mut migrations = Vec::new();
        for (name, old, difference, temporary, path) in replaced {
            let fd = map_fd(&ebpf, name)?;
            let cpus = if name == "DROPS" { cpus } else { 1 };
            // What cannot be read is lost; it must not keep the agent from starting.
            let (kept, lost) = pin::copy(old, fd, cpus, name == "MAGLEV").unwrap_or((0, 0));
            fs::rename(&temporary, &path).map_err(pin_error(&path))?;
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
        let mut datapath = Self {
            ebpf,
            maps: Arc::new(maps),
            options: options.clone(),
            links,
            refused: BTreeMap::new(),
            hooks: BTreeMap::new(),
            migrations,
        };
        datapath.load_programs();
        attach::sweep(&datapath.links);
        Ok(datapath)
    }

    /// Each on its own: one that is refused leaves the others working (R34). Those for devices without link-layer header
    /// wait until there is one: verifying them takes as long again.
    fn load_programs(&mut self) {
        for program in ETHERNET.into_iter().chain(SOCKETS.map(|(program, _)| program)) {
            self.load_program(program);
        }
    }

    /// Loads a program unless it is loaded.
    fn load_program(&mut self, name: &str) {
        let result = match self.ebpf.program_mut(name) {
            Some(Program::SchedClassifier(program)) => program.load(),
            Some(Program::CgroupSockAddr(program)) => program.load(),
            _ => Err(ProgramError::UnexpectedProgramType),
        };
        match result {
            Ok(()) | Err(ProgramError::AlreadyLoaded) => {}
            Err(error) => {
                self.refused.insert(name.to_owned(), refusal(&error));
            }
        }
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

    /// The loaded object, for tests that run programs.
    pub fn ebpf_mut(&mut self) -> &mut Ebpf {
        &mut self.ebpf
    }

    /// Attaches both directions of a device of the calling thread's network namespace, or replaces the programs that
    /// are attached. A direction that fails says so in its status and leaves the other working.
    ///
    /// # Errors
    /// The device is not there.
    pub fn attach_device(&mut self, name: &str, ifindex: u32) -> Result<DeviceHooks, AttachError> {
        let failed = |source| AttachError { name: name.to_owned(), ifindex, source };
        let programs = if has_ethernet_header(name).map_err(failed)? { ETHERNET } else { LAYER3 };
        let ingress = self.attach_direction(name, ifindex, programs[0], TcAttachType::Ingress);
        let egress = self.attach_direction(name, ifindex, programs[1], TcAttachType::Egress);
        Ok(DeviceHooks { ingress, egress })
    }

    fn attach_direction(&mut self, name: &str, ifindex: u32, program: &str, direction: TcAttachType) -> HookStatus {
        let place = match direction {
            TcAttachType::Ingress => format!("{name} ingress"),
            TcAttachType::Egress => format!("{name} egress"),
        };
        let result = self.try_attach(ifindex, program, direction);
        let status = HookStatus::new(program, place, result);
        self.hooks.insert((attach::device_pin(ifindex, direction), String::new()), status.clone());
        status
    }

    fn try_attach(&mut self, ifindex: u32, program: &str, direction: TcAttachType) -> Result<Attachment, String> {
        if LAYER3.contains(&program) {
            self.load_program(program);
        }
        if let Some(error) = self.refused.get(program) {
            return Err(error.clone());
        }
        let loaded: &mut SchedClassifier = self
            .ebpf
            .program_mut(program)
            .ok_or("not in the object")?
            .try_into()
            .map_err(|error: ProgramError| chain(&error))?;
        let fd = loaded.fd().map_err(|error| chain(&error))?.try_clone().map_err(|error| chain(&error))?;
        if self.options.attach == AttachMode::Auto {
            match attach::tcx(fd.as_fd(), ifindex, direction, &self.links) {
                Ok(()) => return Ok(Attachment::Tcx),
                // What kernels before 6.6 say.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
                Err(error) => return Err(error.to_string()),
            }
        }
        attach::clsact(loaded, ifindex, direction, &self.links)?;
        Ok(Attachment::Clsact)
    }

    /// Takes the programs off a device; a device that has gone is no error.
    pub fn detach_device(&mut self, name: &str, ifindex: u32) -> Result<(), AttachError> {
        for direction in [TcAttachType::Ingress, TcAttachType::Egress] {
            self.hooks.remove(&(attach::device_pin(ifindex, direction), String::new()));
        }
        attach::detach(ifindex, &self.links).map_err(|source| AttachError { name: name.to_owned(), ifindex, source })
    }

    /// Attaches the socket programs to a cgroup2 directory, or replaces those that are attached; each on its own.
    pub fn attach_cgroup(&mut self, cgroup_root: &Path) -> Vec<HookStatus> {
        let place = cgroup_root.display().to_string();
        let cgroup = File::open(cgroup_root).and_then(|dir| Ok((dir.metadata()?.ino(), dir)));
        let mut all = Vec::new();
        for (program, attach_type) in SOCKETS {
            let result = match &cgroup {
                Ok((id, dir)) => self.try_attach_socket(program, attach_type, dir, *id),
                Err(error) => Err(format!("open {place}: {error}")),
            };
            let status = HookStatus::new(program, place.clone(), result);
            self.hooks.insert((place.clone(), program.to_owned()), status.clone());
            all.push(status);
        }
        all
    }

    fn try_attach_socket(&self, program: &str, attach_type: u32, cgroup: &File, id: u64) -> Result<Attachment, String> {
        if let Some(error) = self.refused.get(program) {
            return Err(error.clone());
        }
        let loaded: &CgroupSockAddr = self
            .ebpf
            .program(program)
            .ok_or("not in the object")?
            .try_into()
            .map_err(|error: ProgramError| chain(&error))?;
        let fd = loaded.fd().map_err(|error| chain(&error))?;
        let path = self.links.join(format!("cgroup-{program}"));
        attach::cgroup(fd.as_fd(), (cgroup.as_fd(), id), attach_type, &path).map_err(|error| error.to_string())?;
        Ok(Attachment::Cgroup)
    }

    /// Every hook that was attached or tried, and every program that the verifier refused.
    pub fn hooks(&self) -> Vec<HookStatus> {
        let mut all: Vec<HookStatus> = self.hooks.values().cloned().collect();
        for (program, error) in &self.refused {
            if !all.iter().any(|status| status.program == *program) {
                all.push(HookStatus::new(program, String::new(), Err(error.clone())));
            }
        }
        all
    }
}

/// Tables, map names and shapes that the object expects, in the order of [`TABLES`].
fn shapes(object: &[u8], sizes: &MapSizes) -> Result<Vec<(&'static str, &'static str, Shape)>, LoadError> {
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
                entries: sizes.of(table).unwrap_or(map.max_entries()),
                flags: map.map_flags(),
                inner: outer.then_some(pin::INNER_VALUE),
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
    "SOCKETS",
    "AFFINITY",
    "RANGES",
    "L2",
    "DEVICES",
    "SETTINGS",
    "DROPS",
];

fn map_fd(ebpf: &Ebpf, name: &str) -> Result<OwnedFd, LoadError> {
    let data: &MapData = match ebpf.map(name) {
        Some(
            Map::Array(data)
            | Map::HashMap(data)
            | Map::LruHashMap(data)
            | Map::LpmTrie(data)
            | Map::PerCpuArray(data)
            | Map::HashOfMaps(data),
        ) => data,
        _ => return Err(LoadError::Object(format!("map {name} is missing or of another kind"))),
    };
    data.fd().as_fd().try_clone_to_owned().map_err(|error| LoadError::Object(format!("map {name}: {error}")))
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

/// Whether packets of the device have an Ethernet header (`ARPHRD_ETHER`, `ARPHRD_LOOPBACK`).
fn has_ethernet_header(name: &str) -> io::Result<bool> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
    use std::os::fd::AsRawFd;
    let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    // SAFETY: integers, arrays and unions of them; zero is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= libc::IFNAMSIZ {
        return Err(io::Error::from_raw_os_error(libc::ENODEV));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    // SAFETY: the request is valid for this ioctl and outlives it.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFHWADDR, &raw mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: SIOCGIFHWADDR fills this member.
    let family = unsafe { request.ifr_ifru.ifru_hwaddr.sa_family };
    Ok(family == libc::ARPHRD_ETHER || family == libc::ARPHRD_LOOPBACK)
}
