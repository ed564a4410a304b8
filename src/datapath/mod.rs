//! The kernel side of the agent: eBPF programs, their maps, and where they are attached.
//!
//! [`Datapath`] loads and attaches; [`MapStore`] is all that actors see of the maps, and [`MemoryMaps`] is the same
//! in memory, for tests and dry runs. Maps and links are pinned below `<bpf-root>/kinesin`, so that traffic goes on
//! while no agent runs, and the next one adopts them.
//!
//! Deliberately absent: decisions. What the maps should hold comes from `core`, when to write from the actors.

mod attach;
mod batch;
mod clsact;
mod collect;
mod counts;
mod device;
mod dump;
mod hooks;
mod inner;
mod kernel;
mod loader;
mod meaning;
mod memory;
mod moving;
mod object;
mod options;
mod pin;
mod pods;
mod sys;
mod tcx;

use std::io;
use std::sync::{Mutex, PoisonError};

use kinesin_abi::{
    COUNT_ACCELERATED, DeviceValue, Direction, DropCounter, DropReason, FlowCount, L2Key, L2Value, PeerKey, PeerValue,
    Settings, SocketKey, SocketValue, Timeouts,
};
use kinesin_core::plan::{Actual, Op};
use serde::Serialize;

pub(crate) use attach::xdp_link;
pub use attach::{Attachment, DeviceHooks, HookStatus, pinned_hooks};
pub use collect::Collected;
pub(crate) use device::ethtool;
pub use hooks::AttachError;
pub use kernel::KernelMaps;
pub(crate) use kernel::maglev_ids;
pub use loader::{Datapath, OBJECT};
pub use meaning::meaning_rows;
pub use memory::MemoryMaps;
pub use moving::Moving;
pub use options::{Acceleration, AttachMode, LoadError, LoadOptions, MapSizes};
pub use pin::{Migration, cgroup2_root, detach_all, ensure_bpffs, links_dir, maps_dir, pins};
pub use tcx::programs_at;

/// Names of all tables, as `kinesin dump` takes them. Upper case, they are the names of the maps and their pins.
pub const TABLES: [&str; 16] = [
    "frontends",
    "slots",
    "backends",
    "maglev",
    "flows",
    "transient",
    "fragments",
    "sockets",
    "affinity",
    "ranges",
    "l2",
    "devices",
    "peers",
    "settings",
    "drops",
    "counts",
];

/// A table could not be read or written.
#[derive(Debug, thiserror::Error)]
#[error("{action} {table}: {source}{hint}")]
pub struct MapError {
    /// Which one, of [`TABLES`].
    pub table: &'static str,
    /// What was tried.
    pub action: &'static str,
    /// What the operator can do about it, or empty.
    pub hint: String,
    /// The kernel's answer.
    pub source: io::Error,
}

/// A plan stopped; everything before `index` is in the maps.
#[derive(Debug, thiserror::Error)]
#[error("step {index} of the plan, {op}: {source}")]
pub struct ApplyError {
    /// Index of the failed step in the plan.
    pub index: usize,
    /// The failed step, for people.
    pub op: String,
    /// Which table and why.
    pub source: MapError,
}

/// There is no table of that name.
#[derive(Debug, thiserror::Error)]
pub enum TableError {
    /// Not one of [`TABLES`].
    #[error("there is no table {0:?}; there are {tables}", tables = TABLES.join(", "))]
    Unknown(String),
    /// It could not be read or written.
    #[error(transparent)]
    Map(#[from] MapError),
}

/// Size and use of one table.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct TableUsage {
    /// One of [`TABLES`].
    pub name: &'static str,
    /// Elements in use; none where counting would be expensive.
    pub entries: Option<u64>,
    /// Most elements that fit.
    pub max_entries: u32,
    /// Kernel memory charged for it, bytes, as `/proc/self/fdinfo` tells it (0 where it does not).
    pub bytes: u64,
}

/// Key and value of one element, as bytes.
pub type RawEntry = (Vec<u8>, Vec<u8>);

/// What actors see of the maps.
///
/// All methods block on bpf(2); a whole first load of thousands of services takes milliseconds.
pub trait MapStore: Send + Sync + 'static {
    /// The services maps as they are. Arrays are read whole, in batches.
    fn read(&self) -> Result<Actual, MapError>;

    /// Writes in order; neighbouring steps of one kind go in one batch. Deleting what is not there is no error (R03).
    /// After an error the steps before it are in the maps.
    fn apply(&self, ops: &[Op]) -> Result<(), ApplyError>;

    /// The addresses answered for on the LAN.
    fn read_l2(&self) -> Result<Vec<(L2Key, L2Value)>, MapError>;
    /// Starts to answer for an address; an entry that is there keeps its counter.
    fn put_l2(&self, key: L2Key) -> Result<(), MapError>;
    /// Stops to answer; a missing entry is no error.
    fn delete_l2(&self, key: &L2Key) -> Result<(), MapError>;

    /// What the programs are told.
    fn settings(&self) -> Result<Settings, MapError>;
    /// Replaces what the programs are told.
    fn write_settings(&self, settings: &Settings) -> Result<(), MapError>;

    /// Devices by interface index.
    fn read_devices(&self) -> Result<Vec<(u32, DeviceValue)>, MapError>;
    /// Adds or replaces a device.
    fn put_device(&self, ifindex: u32, device: &DeviceValue) -> Result<(), MapError>;
    /// Removes a device; a missing one is no error.
    fn delete_device(&self, ifindex: u32) -> Result<(), MapError>;

    /// Nodes that packets are handed on to, and whom they come from.
    fn read_peers(&self) -> Result<Vec<(PeerKey, PeerValue)>, MapError>;
    /// Adds or replaces an entry of a peer.
    fn put_peer(&self, key: &PeerKey, peer: &PeerValue) -> Result<(), MapError>;
    /// Removes an entry of a peer; a missing one is no error.
    fn delete_peer(&self, key: &PeerKey) -> Result<(), MapError>;

    /// What is counted under a reason's number, or one of those in place of a reason, summed over the CPUs.
    fn counter(&self, reason: u8, direction: Direction) -> Result<DropCounter, MapError>;
    /// Packets dropped, summed over the CPUs; counters at zero are left out.
    fn drops(&self) -> Result<Vec<(DropReason, Direction, DropCounter)>, MapError> {
        let mut found = Vec::new();
        for direction in [Direction::Ingress, Direction::Egress] {
            for reason in DropReason::ALL {
                let counter = self.counter(*reason as u8, direction)?;
                if counter.packets > 0 {
                    found.push((*reason, direction, counter));
                }
            }
        }
        Ok(found)
    }
    /// Packets translated and passed on, by direction, summed over the CPUs; those of [`Self::accelerated`] among them.
    fn forwarded(&self) -> Result<[(Direction, DropCounter); 2], MapError> {
        let ingress = dump::both(self.counter(0, Direction::Ingress)?, self.accelerated()?);
        Ok([(Direction::Ingress, ingress), (Direction::Egress, self.counter(0, Direction::Egress)?)])
    }
    /// Packets that the XDP program has sent, summed over the CPUs.
    fn accelerated(&self) -> Result<DropCounter, MapError> {
        self.counter(COUNT_ACCELERATED, Direction::Ingress)
    }

    /// Goes through the connections once and removes those that have been silent for longer than they may; `now` is
    /// CLOCK_MONOTONIC in nanoseconds. Reads in chunks, holds no lock, and writes only what goes.
    fn collect_flows(&self, timeouts: &Timeouts, now: u64) -> Result<Collected, MapError>;
    /// Shares out among the CPUs what connections that are not established yet take of the table of those that are: as many as
    /// were counted, or as the programs have counted. A CPU that sees connections begin and another one that sees them go on
    /// would both be wrong in the end.
    fn share_openings(&self, counted: Option<u64>) -> Result<(), MapError>;
    /// What has happened to connections since the maps were made, summed over the CPUs, in the order of
    /// [`FlowCount::ALL`].
    fn flow_counts(&self) -> Result<[u64; FlowCount::ALL.len()], MapError>;
    /// Most entries of the tables of established and of other connections.
    fn flow_sizes(&self) -> (u32, u32);

    /// The translated sockets.
    fn sockets(&self) -> Result<Vec<(SocketKey, SocketValue)>, MapError>;
    /// What one socket asked for when it was led to this backend, if our programs led it there.
    fn socket(&self, key: &SocketKey) -> Result<Option<SocketValue>, MapError>;
    /// Forgets a socket; a missing entry is no error.
    fn forget_socket(&self, key: &SocketKey) -> Result<(), MapError>;

    /// All elements of a table, for people, in order of their keys.
    fn dump_raw(&self, table: &str) -> Result<Vec<(String, String)>, TableError>;
    /// The names that [`Self::dump_raw`] takes.
    fn tables(&self) -> &'static [&'static str] {
        &TABLES
    }
    /// Size and use of every table.
    fn usage(&self) -> Vec<TableUsage>;

    /// All elements of a table as bytes; values of per-CPU tables hold those of all CPUs, values of `maglev` are whole
    /// tables. For tests that tamper, and for migration.
    fn raw_entries(&self, table: &str) -> Result<Vec<RawEntry>, TableError>;
    /// The value of one element, as [`Self::raw_entries`] has it; none where there is none.
    fn raw_get(&self, table: &str, key: &[u8]) -> Result<Option<Vec<u8>>, TableError>;
    /// Writes an element, whatever it means.
    fn raw_put(&self, table: &str, key: &[u8], value: &[u8]) -> Result<(), TableError>;
    /// Deletes an element, or zeroes it where the table is an array; returns whether there was one.
    fn raw_delete(&self, table: &str, key: &[u8]) -> Result<bool, TableError>;
}

/// Changes part of the settings, whoever else changes another part at the same time.
pub fn update_settings(store: &dyn MapStore, change: impl FnOnce(&mut Settings)) -> Result<(), MapError> {
    // Between reading and writing; of all stores, because nobody waits long.
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _guard = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let mut settings = store.settings()?;
    change(&mut settings);
    store.write_settings(&settings)
}

/// The name in [`TABLES`] that equals `table`.
pub(crate) fn table_name(table: &str) -> Result<&'static str, TableError> {
    TABLES.into_iter().find(|name| *name == table).ok_or_else(|| TableError::Unknown(table.to_owned()))
}

/// Which table a step writes to.
pub(crate) fn table_of(op: &Op) -> &'static str {
    match op {
        Op::Backend(..) => "backends",
        Op::Slot(..) => "slots",
        Op::PutMaglev(..) | Op::DeleteMaglev(_) => "maglev",
        Op::PutFrontend(..) | Op::DeleteFrontend(_) => "frontends",
        Op::PutSourceRange(_) | Op::DeleteSourceRange(_) => "ranges",
    }
}

/// What to do about a table that is full. `bpf-lb-map-max` sizes the tables of services.
pub(crate) fn hint(table: &str, error: &io::Error, entries: u32) -> String {
    let full = matches!(error.raw_os_error(), Some(libc::E2BIG | libc::ENOSPC | libc::ENOMEM));
    match table {
        "frontends" | "slots" | "backends" | "maglev" | "ranges" if full => {
            format!("; the table holds {entries} entries: raise bpf-lb-map-max")
        }
        "flows" if full => format!("; the table holds {entries} entries: raise bpf-ct-global-tcp-max"),
        "transient" if full => format!("; the table holds {entries} entries: raise bpf-ct-global-any-max"),
        _ if full => format!("; the table holds {entries} entries"),
        _ => String::new(),
    }
}

/// A step, for people.
pub(crate) fn describe(op: &Op) -> String {
    match op {
        Op::Backend(id, backend) => format!("backend {id} {}", dump::backend(backend)),
        Op::Slot(slot, id) => format!("slot {slot} = {id}"),
        Op::PutMaglev(base, _) => format!("maglev table {base}"),
        Op::PutFrontend(key, _) => format!("frontend {}", dump::frontend_key(key)),
        Op::DeleteFrontend(key) => format!("delete frontend {}", dump::frontend_key(key)),
        Op::DeleteMaglev(base) => format!("delete maglev table {base}"),
        Op::PutSourceRange(key) => format!("source range {}", dump::range_key(key)),
        Op::DeleteSourceRange(key) => format!("delete source range {}", dump::range_key(key)),
    }
}

/// Value of every element of `ranges`: that it is there says all.
pub(crate) const LISTED: u32 = 1;

/// The bytes of a map key or value.
pub(crate) fn bytes_of<T: aya::Pod>(value: &T) -> &[u8] {
    // SAFETY: `Pod` types are plain integers without padding, readable as bytes for their whole size.
    unsafe { std::slice::from_raw_parts((&raw const *value).cast(), size_of::<T>()) }
}

/// A map key or value from its bytes; none where there are too few.
pub(crate) fn from_bytes<T: aya::Pod>(bytes: &[u8]) -> Option<T> {
    // SAFETY: long enough as checked, read unaligned, and any bytes are a valid `Pod`.
    (bytes.len() >= size_of::<T>()).then(|| unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
}

#[cfg(test)]
mod tests;
