//! [`MapStore`] on the kernel's maps.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use kinesin_abi::{
    Backend, BackendId, DeviceValue, Direction, DropCounter, FlowCount, FlowKey, FlowValue, FrontendKey, FrontendValue,
    L2Key, L2Value, MAGLEV_TABLE_SIZES, PeerKey, PeerValue, SLOT_EMPTY, Settings, SocketKey, SocketValue,
    SourceRangeKey, Timeouts, drop_slot, maglev_size, maglev_words,
};
use kinesin_core::plan::{Actual, Op};

use super::batch::{Stopped, Table};
use super::collect::{self, Collected, Flows};
use super::{
    ApplyError, LISTED, MapError, MapStore, RawEntry, TABLES, TableError, TableUsage, bytes_of, describe, dump,
    from_bytes, hint, sys, table_name, table_of,
};

/// The maps in the kernel. Clones of its file descriptors stay valid whatever becomes of programs and pins.
#[derive(Debug)]
pub struct KernelMaps {
    tables: [Table; TABLES.len()],
}

impl KernelMaps {
    /// From one file descriptor per table, in the order of [`TABLES`].
    pub(crate) fn new(fds: [OwnedFd; TABLES.len()]) -> io::Result<Self> {
        let cpus = aya::util::nr_cpus().map_err(|(_, error)| error)?.get() as usize;
        let mut tables = Vec::with_capacity(TABLES.len());
        for (name, fd) in TABLES.into_iter().zip(fds) {
            tables.push(Table::new(fd, if matches!(name, "drops" | "counts") { cpus } else { 1 })?);
        }
        let tables = tables.try_into().map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        Ok(Self { tables })
    }

    /// The maps that an agent has pinned below this root, to look at them from outside; none while one is missing.
    ///
    /// # Errors
    /// A pin cannot be opened, or is no map.
    pub fn open_pinned(bpf_root: &std::path::Path) -> io::Result<Option<Self>> {
        let dir = super::maps_dir(bpf_root);
        let mut fds = Vec::with_capacity(TABLES.len());
        for table in TABLES {
            let Some(fd) = sys::open_pin(&dir.join(table.to_uppercase()))? else { return Ok(None) };
            fds.push(fd);
        }
        Self::new(fds.try_into().map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?).map(Some)
    }

    /// The file descriptor of a table, for tests that look at it from outside.
    pub fn raw_fd(&self, table: &str) -> Result<BorrowedFd<'_>, TableError> {
        Ok(self.table(table_name(table)?).fd())
    }

    pub(super) fn table(&self, name: &'static str) -> &Table {
        let index = TABLES.iter().position(|table| *table == name);
        &self.tables[index.expect("callers name tables by the literals of TABLES")]
    }

    pub(super) fn failed(&self, table: &'static str, action: &'static str) -> impl FnOnce(io::Error) -> MapError {
        let entries = self.table(table).entries;
        move |source| MapError { table, action, hint: hint(table, &source, entries), source }
    }

    /// All elements of a table that decode.
    fn scan<K: aya::Pod, V: aya::Pod>(&self, table: &'static str) -> Result<Vec<(K, V)>, MapError> {
        self.scan_some(table, |_| true)
    }

    /// Those elements of a table that decode and whose value is wanted. Most elements of an array are not in use.
    fn scan_some<K: aya::Pod, V: aya::Pod>(
        &self,
        table: &'static str,
        wanted: impl Fn(&V) -> bool,
    ) -> Result<Vec<(K, V)>, MapError> {
        let mut some = Vec::new();
        self.table(table)
            .scan(|key, value| {
                let element = from_bytes(key).zip(from_bytes(value));
                some.extend(element.filter(|(_, value)| wanted(value)));
            })
            .map_err(self.failed(table, "read"))?;
        Ok(some)
    }

    fn put<K: aya::Pod, V: aya::Pod>(&self, table: &'static str, key: &K, value: &V) -> Result<(), MapError> {
        self.table(table).put(bytes_of(key), bytes_of(value)).map_err(self.failed(table, "write to"))
    }

    fn remove<K: aya::Pod>(&self, table: &'static str, key: &K) -> Result<(), MapError> {
        self.table(table).remove(bytes_of(key)).map(drop).map_err(self.failed(table, "delete from"))
    }

    /// Bases and bytes of the Maglev tables; the kernel gives out ids of the inner maps.
    fn maglev(&self) -> Result<Vec<RawEntry>, MapError> {
        let inner: Vec<(u32, u32)> = self.scan("maglev")?;
        let mut tables = Vec::with_capacity(inner.len());
        for (base, id) in inner {
            tables.extend(self.inner(id)?.map(|bytes| (base.to_ne_bytes().to_vec(), bytes)));
        }
        Ok(tables)
    }

    /// The bytes of the Maglev table that is the map of this id.
    fn inner(&self, id: u32) -> Result<Option<Vec<u8>>, MapError> {
        // Replaced since it was listed: the new one is in the next reading.
        let Ok(fd) = sys::map_by_id(id) else { return Ok(None) };
        let Ok(info) = sys::map_info(fd.as_fd()) else { return Ok(None) };
        let mut bytes = vec![0; info.value as usize];
        let read = sys::lookup(fd.as_fd(), &[0; 4], &mut bytes).map_err(self.failed("maglev", "read"))?;
        Ok(read.then_some(bytes))
    }

    /// Writes a Maglev table: into the one that is there, else as a new one. A lookup that meets a table being
    /// overwritten finds an id of the old or of the new table, and both are backends.
    fn put_maglev(&self, base: &[u8], table: &[u8]) -> io::Result<()> {
        let outer = self.table("maglev");
        if let Some(id) = outer.get(base)?.and_then(|id| from_bytes::<u32>(&id))
            && let Ok(inner) = sys::map_by_id(id)
            && sys::map_info(inner.as_fd()).is_ok_and(|info| info.value as usize == table.len())
        {
            return sys::update(inner.as_fd(), &[0; 4], table);
        }
        let inner = super::inner::create("MAGLEV.inner", table.len() as u32)?;
        sys::update(inner.as_fd(), &[0; 4], table)?;
        outer.put(base, &inner.as_raw_fd().to_ne_bytes())
    }

    /// Writes a run of steps of one kind; says how many were done when it stops.
    fn apply_run(&self, ops: &[Op]) -> Result<(), Stopped> {
        let table = self.table(table_of(&ops[0]));
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        for (done, op) in ops.iter().enumerate() {
            let stopped = |error| Stopped { done, error };
            match op {
                Op::Backend(id, backend) => {
                    keys.extend_from_slice(bytes_of(id));
                    values.extend_from_slice(bytes_of(backend));
                }
                Op::Slot(slot, id) => {
                    keys.extend_from_slice(bytes_of(slot));
                    values.extend_from_slice(bytes_of(id));
                }
                Op::PutFrontend(key, value) => {
                    keys.extend_from_slice(bytes_of(key));
                    values.extend_from_slice(bytes_of(value));
                }
                Op::PutSourceRange(key) => {
                    keys.extend_from_slice(bytes_of(key));
                    values.extend_from_slice(bytes_of(&LISTED));
                }
                Op::DeleteSourceRange(key) => keys.extend_from_slice(bytes_of(key)),
                Op::DeleteFrontend(key) => keys.extend_from_slice(bytes_of(key)),
                Op::DeleteMaglev(base) => keys.extend_from_slice(bytes_of(base)),
                Op::PutMaglev(base, ids) => {
                    self.put_maglev(bytes_of(base), &maglev_bytes(ids).map_err(stopped)?).map_err(stopped)?;
                }
            }
        }
        match &ops[0] {
            Op::DeleteFrontend(_) | Op::DeleteMaglev(_) | Op::DeleteSourceRange(_) => table.remove_all(&keys).map(drop),
            Op::PutMaglev(..) => Ok(()),
            _ => table.put_all(&keys, &values),
        }
    }
}

/// A table as the kernel stores it: padded with zeros.
pub(crate) fn maglev_bytes(ids: &[BackendId]) -> io::Result<Vec<u8>> {
    if !MAGLEV_TABLE_SIZES.iter().any(|size| *size as usize == ids.len()) {
        let text = format!("a table has one of {MAGLEV_TABLE_SIZES:?} entries, not {}", ids.len());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    let mut bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_ne_bytes()).collect();
    bytes.resize(maglev_words(ids.len() as u32) as usize * 4, 0);
    Ok(bytes)
}

/// The ids of a stored table.
pub(crate) fn maglev_ids(bytes: &[u8]) -> Arc<[BackendId]> {
    let ids = bytes.as_chunks().0;
    let size = maglev_size(ids.len()).unwrap_or(0) as usize;
    ids.iter().map(|id| BackendId::from_ne_bytes(*id)).take(size).collect()
}

/// Elements of the ranges trie as the planner writes them.
pub(crate) fn read_ranges(elements: Vec<(SourceRangeKey, u32)>) -> Vec<SourceRangeKey> {
    let mut keys: Vec<SourceRangeKey> = elements.into_iter().map(|(key, _)| key.masked()).collect();
    keys.sort_unstable();
    keys.dedup();
    keys
}

impl Flows for KernelMaps {
    fn scan(
        &self,
        table: &'static str,
        each: &mut dyn FnMut(FlowKey, FlowValue) -> Result<(), MapError>,
    ) -> Result<(), MapError> {
        let mut outcome = Ok(());
        self.table(table)
            .scan(|key, value| {
                if let Some((key, value)) = from_bytes(key).zip(from_bytes(value))
                    && outcome.is_ok()
                {
                    outcome = each(key, value);
                }
            })
            .map_err(self.failed(table, "read"))?;
        outcome
    }

    fn get(&self, table: &'static str, key: &FlowKey) -> Result<Option<FlowValue>, MapError> {
        let value = self.table(table).get(bytes_of(key)).map_err(self.failed(table, "read"))?;
        Ok(value.and_then(|value| from_bytes(&value)))
    }

    fn remove(&self, table: &'static str, key: &FlowKey) -> Result<bool, MapError> {
        self.table(table).remove(bytes_of(key)).map_err(self.failed(table, "delete from"))
    }

    fn backend(&self, id: BackendId) -> Result<Option<Backend>, MapError> {
        let table = self.table("backends");
        if id >= table.entries {
            return Ok(None);
        }
        let value = table.get(bytes_of(&id)).map_err(self.failed("backends", "read"))?;
        Ok(value.and_then(|value| from_bytes(&value)))
    }
}

impl MapStore for KernelMaps {
    fn read(&self) -> Result<Actual, MapError> {
        let slots = self.scan_some("slots", |id: &BackendId| *id != SLOT_EMPTY)?;
        let backends = self.scan_some("backends", |backend: &Backend| *backend != Backend::default())?;
        let tables = self.maglev()?;
        let maglev = tables.iter().filter_map(|(base, ids)| Some((from_bytes(base)?, maglev_ids(ids)))).collect();
        let frontends = self.scan::<FrontendKey, FrontendValue>("frontends")?;
        let source_ranges = read_ranges(self.scan("ranges")?);
        Ok(Actual { frontends, slots, backends, maglev, source_ranges })
    }

    fn apply(&self, ops: &[Op]) -> Result<(), ApplyError> {
        let mut start = 0;
        for run in ops.chunk_by(|a, b| std::mem::discriminant(a) == std::mem::discriminant(b)) {
            self.apply_run(run).map_err(|stopped| {
                let op = &run[stopped.done.min(run.len() - 1)];
                let source = self.failed(table_of(op), "write to")(stopped.error);
                ApplyError { index: start + stopped.done, op: describe(op), source }
            })?;
            start += run.len();
        }
        Ok(())
    }

    fn read_l2(&self) -> Result<Vec<(L2Key, L2Value)>, MapError> {
        self.scan("l2")
    }

    fn put_l2(&self, key: L2Key) -> Result<(), MapError> {
        let there = self.table("l2").get(bytes_of(&key)).map_err(self.failed("l2", "read"))?;
        if there.is_some() { Ok(()) } else { self.put("l2", &key, &L2Value::default()) }
    }

    fn delete_l2(&self, key: &L2Key) -> Result<(), MapError> {
        self.remove("l2", key)
    }

    fn settings(&self) -> Result<Settings, MapError> {
        let bytes = self.table("settings").get(&[0; 4]).map_err(self.failed("settings", "read"))?;
        Ok(bytes.and_then(|bytes| from_bytes(&bytes)).unwrap_or_default())
    }

    fn write_settings(&self, settings: &Settings) -> Result<(), MapError> {
        self.put("settings", &0u32, settings)
    }

    fn read_devices(&self) -> Result<Vec<(u32, DeviceValue)>, MapError> {
        self.scan("devices")
    }

    fn put_device(&self, ifindex: u32, device: &DeviceValue) -> Result<(), MapError> {
        self.put("devices", &ifindex, device)
    }

    fn delete_device(&self, ifindex: u32) -> Result<(), MapError> {
        self.remove("devices", &ifindex)
    }

    fn read_peers(&self) -> Result<Vec<(PeerKey, PeerValue)>, MapError> {
        self.scan("peers")
    }

    fn put_peer(&self, key: &PeerKey, peer: &PeerValue) -> Result<(), MapError> {
        self.put("peers", key, peer)
    }

    fn delete_peer(&self, key: &PeerKey) -> Result<(), MapError> {
        self.remove("peers", key)
    }

    fn counter(&self, reason: u8, direction: Direction) -> Result<DropCounter, MapError> {
        let slot = drop_slot(reason, direction);
        let value = self.table("drops").get(bytes_of(&slot)).map_err(self.failed("drops", "read"))?;
        Ok(value.map(|value| dump::sum(&value)).unwrap_or_default())
    }

    fn collect_flows(&self, timeouts: &Timeouts, now: u64) -> Result<Collected, MapError> {
        let collected = collect::pass(self, timeouts, now)?;
        let removed = collected.transient.removed() + collected.copies;
        if removed > 0 {
            self.count(FlowCount::Collected, removed)?;
        }
        self.share_openings(Some(collected.opening))?;
        Ok(collected)
    }

    fn share_openings(&self, counted: Option<u64>) -> Result<(), MapError> {
        self.even_out(counted)
    }

    fn flow_counts(&self) -> Result<[u64; FlowCount::ALL.len()], MapError> {
        let mut counts = [0; FlowCount::ALL.len()];
        for (count, what) in counts.iter_mut().zip(FlowCount::ALL) {
            let value = self.table("counts").get(bytes_of(&(what as u32))).map_err(self.failed("counts", "read"))?;
            *count = value.map_or(0, |value| dump::total(&value));
        }
        Ok(counts)
    }

    fn flow_sizes(&self) -> (u32, u32) {
        (self.table("flows").entries, self.table("transient").entries)
    }

    fn sockets(&self) -> Result<Vec<(SocketKey, SocketValue)>, MapError> {
        self.scan("sockets")
    }

    fn socket(&self, key: &SocketKey) -> Result<Option<SocketValue>, MapError> {
        let value = self.table("sockets").get(bytes_of(key)).map_err(self.failed("sockets", "read"))?;
        Ok(value.and_then(|value| from_bytes(&value)))
    }

    fn forget_socket(&self, key: &SocketKey) -> Result<(), MapError> {
        self.remove("sockets", key)
    }

    fn dump_raw(&self, table: &str) -> Result<Vec<(String, String)>, TableError> {
        let name = table_name(table)?;
        let mut entries = self.raw_entries(name)?;
        // Arrays come in order, hashes in that of their buckets, which is another one each time.
        if !matches!(name, "slots" | "backends" | "settings" | "drops") {
            entries.sort_unstable();
        }
        Ok(entries.iter().filter_map(|(key, value)| dump::element(name, key, value)).collect())
    }

    fn usage(&self) -> Vec<TableUsage> {
        TABLES
            .into_iter()
            .map(|name| {
                let table = self.table(name);
                let mut entries = Some(0);
                let counted = match name {
                    "frontends" | "maglev" | "ranges" | "l2" | "devices" | "peers" => {
                        table.scan(|_, _| entries = entries.map(|n| n + 1))
                    }
                    "slots" | "backends" => table.scan(|_, value| {
                        let used = value.iter().any(|byte| *byte != 0);
                        entries = entries.map(|n| n + u64::from(used));
                    }),
                    _ => Err(io::Error::from(io::ErrorKind::Unsupported)),
                };
                let entries = counted.ok().and(entries);
                TableUsage { name, entries, max_entries: table.entries, bytes: memlock(table.fd()) }
            })
            .collect()
    }

    fn raw_entries(&self, table: &str) -> Result<Vec<RawEntry>, TableError> {
        let name = table_name(table)?;
        if name == "maglev" {
            return Ok(self.maglev()?);
        }
        let mut all = Vec::new();
        self.table(name)
            .scan(|key, value| all.push((key.to_vec(), value.to_vec())))
            .map_err(self.failed(name, "read"))?;
        Ok(all)
    }

    fn raw_get(&self, table: &str, key: &[u8]) -> Result<Option<Vec<u8>>, TableError> {
        let name = table_name(table)?;
        let found = self.table(name).get(key).map_err(self.failed(name, "read"))?;
        match found.as_deref().and_then(from_bytes::<u32>) {
            Some(id) if name == "maglev" => Ok(self.inner(id)?),
            _ => Ok(found),
        }
    }

    fn raw_put(&self, table: &str, key: &[u8], value: &[u8]) -> Result<(), TableError> {
        let name = table_name(table)?;
        let result = if name == "maglev" {
            let fits = maglev_size(value.len() / 4).is_some();
            if fits { self.put_maglev(key, value) } else { Err(io::Error::from_raw_os_error(libc::EINVAL)) }
        } else {
            self.table(name).put(key, value)
        };
        Ok(result.map_err(self.failed(name, "write to"))?)
    }

    fn raw_delete(&self, table: &str, key: &[u8]) -> Result<bool, TableError> {
        let name = table_name(table)?;
        let table = self.table(name);
        let result = match name {
            "slots" | "backends" | "settings" | "drops" | "counts" => {
                table.put(key, &vec![0; table.value]).map(|()| true)
            }
            _ => table.remove(key),
        };
        Ok(result.map_err(self.failed(name, "delete from"))?)
    }
}

/// Bytes that the kernel charges for a map.
fn memlock(fd: BorrowedFd<'_>) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd())).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("memlock:"));
    line.and_then(|bytes| bytes.trim().parse().ok()).unwrap_or(0)
}
