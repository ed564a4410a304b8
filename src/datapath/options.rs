//! What the maps and programs are loaded with, and how that can fail.

use std::io;
use std::path::PathBuf;

use kinesin_abi::MAGLEV_TABLE_SIZE;
use kinesin_core::sizing::Sizes;

/// How to attach to devices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AttachMode {
    /// By tcx link, or as clsact filter where the kernel has no tcx.
    #[default]
    Auto,
    /// As clsact filter.
    Clsact,
}

/// Whether drivers run a program too (`bpf-lb-acceleration`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Acceleration {
    /// No.
    #[default]
    Disabled,
    /// A device where that is not possible has a hook that fails.
    Native,
    /// A device where that is not possible does without: see [`super::Datapath::unaccelerated`].
    BestEffort,
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
    /// Established TCP connections, two elements each.
    pub flows: u32,
    /// Packets in fragments, each while they come.
    pub fragments: u32,
    /// Other connections and flows, two elements each.
    pub transient: u32,
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
    /// Other nodes, two elements each.
    pub peers: u32,
}

impl MapSizes {
    pub(crate) fn of(&self, table: &str) -> Option<u32> {
        match table {
            "frontends" => Some(self.frontends),
            "slots" => Some(self.slots),
            "backends" => Some(self.backends),
            "maglev" => Some(self.maglev),
            "flows" => Some(self.flows),
            "fragments" => Some(self.fragments),
            "transient" => Some(self.transient),
            "sockets" => Some(self.sockets),
            "affinity" => Some(self.affinity),
            "ranges" => Some(self.ranges),
            "l2" => Some(self.l2),
            "devices" => Some(self.devices),
            "peers" => Some(self.peers),
            _ => None,
        }
    }
}

impl From<Sizes> for MapSizes {
    fn from(sizes: Sizes) -> Self {
        Self {
            frontends: sizes.frontends,
            slots: sizes.slots,
            backends: sizes.backends,
            maglev: sizes.maglev,
            flows: sizes.tcp,
            transient: sizes.any,
            sockets: sizes.sockets,
            affinity: sizes.affinity,
            ranges: sizes.ranges,
            ..Self::default()
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
            fragments: 8192,
            transient: 65_536,
            sockets: 65_536,
            affinity: 65_536,
            ranges: 65_536,
            l2: 4096,
            devices: 4096,
            peers: 8192,
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
    /// Serve IPv6 on devices (`enable-ipv6`).
    pub ipv6: bool,
    /// Entries of a Maglev table (`bpf-lb-maglev-table-size`), one of [`kinesin_abi::MAGLEV_TABLE_SIZES`].
    pub maglev_size: u32,
    /// Attach to drivers too.
    pub acceleration: Acceleration,
}

impl LoadOptions {
    /// Defaults below a root.
    pub fn new(bpf_root: impl Into<PathBuf>) -> Self {
        Self {
            bpf_root: bpf_root.into(),
            max_entries: MapSizes::default(),
            attach: AttachMode::default(),
            ipv6: false,
            maglev_size: MAGLEV_TABLE_SIZE,
            acceleration: Acceleration::default(),
        }
    }
}

/// The maps could not be made. Programs that do not load are no such error: see [`super::Datapath::hooks`].
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
