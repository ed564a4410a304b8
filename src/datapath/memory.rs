//! [`MapStore`] in memory: the same answers without a kernel, for tests and dry runs.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use kinesin_abi::{
    Backend, BackendId, DeviceValue, Direction, DropCounter, FLOW_COUNTS, FlowCount, FlowKey, FlowValue, L2Key,
    L2Value, PeerKey, PeerValue, Settings, SocketKey, SocketValue, Timeouts, drop_slot,
};
use kinesin_core::plan::{Actual, Op};

use super::collect::{self, Collected, Flows};
use super::kernel::{maglev_bytes, maglev_ids, read_ranges};
use super::options::MapSizes;
use super::{
    ApplyError, LISTED, MapError, MapStore, RawEntry, TABLES, TableError, TableUsage, bytes_of, describe, dump,
    from_bytes, hint, table_name, table_of,
};

type Entries = BTreeMap<Vec<u8>, Vec<u8>>;

/// Maps in memory. Arrays hold only what was written and is not zero.
#[derive(Debug)]
pub struct MemoryMaps {
    sizes: MapSizes,
    tables: Mutex<BTreeMap<&'static str, Entries>>,
}

impl Default for MemoryMaps {
    fn default() -> Self {
        Self::new(MapSizes::default())
    }
}

impl MemoryMaps {
    /// With the limits that the kernel's maps would have.
    pub fn new(sizes: MapSizes) -> Self {
        Self { sizes, tables: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<&'static str, Entries>> {
        // Each write is a single insertion: a panic elsewhere leaves nothing half done.
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn limit(&self, table: &str) -> u32 {
        match table {
            "settings" => 1,
            "drops" => kinesin_abi::DROP_SLOTS,
            "counts" => FLOW_COUNTS,
            _ => self.sizes.of(table).unwrap_or(0),
        }
    }

    fn is_array(table: &str) -> bool {
        matches!(table, "slots" | "backends" | "settings" | "drops" | "counts")
    }

    fn failed(&self, table: &'static str, action: &'static str, source: io::Error) -> MapError {
        MapError { table, action, hint: hint(table, &source, self.limit(table)), source }
    }

    fn put(&self, table: &'static str, key: &[u8], value: Vec<u8>) -> Result<(), MapError> {
        let limit = self.limit(table);
        let mut tables = self.lock();
        let entries = tables.entry(table).or_default();
        let fits = if Self::is_array(table) {
            from_bytes::<u32>(key).is_some_and(|index| index < limit)
        } else {
            entries.contains_key(key) || entries.len() < limit as usize
        };
        if !fits {
            return Err(self.failed(table, "write to", io::Error::from_raw_os_error(libc::E2BIG)));
        }
        if Self::is_array(table) && value.iter().all(|byte| *byte == 0) {
            entries.remove(key);
        } else {
            entries.insert(key.to_vec(), value);
        }
        Ok(())
    }

    fn remove(&self, table: &'static str, key: &[u8]) -> bool {
        self.lock().get_mut(table).is_some_and(|entries| entries.remove(key).is_some())
    }

    fn all<K: aya::Pod, V: aya::Pod>(&self, table: &'static str) -> Vec<(K, V)> {
        let tables = self.lock();
        let entries = tables.get(table).into_iter().flatten();
        entries.filter_map(|(key, value)| from_bytes(key).zip(from_bytes(value))).collect()
    }

    fn step(&self, op: &Op) -> Result<(), MapError> {
        match op {
            Op::Backend(id, backend) => self.put("backends", bytes_of(id), bytes_of(backend).to_vec()),
            Op::Slot(slot, id) => self.put("slots", bytes_of(slot), bytes_of(id).to_vec()),
            Op::PutFrontend(key, value) => self.put("frontends", bytes_of(key), bytes_of(value).to_vec()),
            Op::PutMaglev(base, ids) => {
                let table = maglev_bytes(ids).map_err(|error| self.failed("maglev", "write to", error))?;
                self.put("maglev", bytes_of(base), table)
            }
            Op::PutSourceRange(key) => self.put("ranges", bytes_of(key), bytes_of(&LISTED).to_vec()),
            Op::DeleteSourceRange(key) => {
                self.remove("ranges", bytes_of(key));
                Ok(())
            }
            Op::DeleteFrontend(key) => {
                self.remove("frontends", bytes_of(key));
                Ok(())
            }
            Op::DeleteMaglev(base) => {
                self.remove("maglev", bytes_of(base));
                Ok(())
            }
        }
    }
}

impl Flows for MemoryMaps {
    fn scan(
        &self,
        table: &'static str,
        each: &mut dyn FnMut(FlowKey, FlowValue) -> Result<(), MapError>,
    ) -> Result<(), MapError> {
        self.all(table).into_iter().try_for_each(|(key, value)| each(key, value))
    }

    fn get(&self, table: &'static str, key: &FlowKey) -> Result<Option<FlowValue>, MapError> {
        let tables = self.lock();
        let value = tables.get(table).and_then(|entries| entries.get(bytes_of(key)));
        Ok(value.and_then(|value| from_bytes(value)))
    }

    fn remove(&self, table: &'static str, key: &FlowKey) -> Result<bool, MapError> {
        Ok(self.remove(table, bytes_of(key)))
    }

    fn backend(&self, id: BackendId) -> Result<Option<Backend>, MapError> {
        let tables = self.lock();
        let value = tables.get("backends").and_then(|entries| entries.get(bytes_of(&id)));
        Ok(value.and_then(|value| from_bytes(value)))
    }
}

impl MapStore for MemoryMaps {
    fn read(&self) -> Result<Actual, MapError> {
        let mut backends: Vec<(u32, Backend)> = self.all("backends");
        let mut slots: Vec<(u32, u32)> = self.all("slots");
        // As an array is read.
        backends.sort_unstable_by_key(|(id, _)| *id);
        slots.sort_unstable();
        let source_ranges = read_ranges(self.all("ranges"));
        let tables = self.lock();
        let maglev = tables.get("maglev").into_iter().flatten();
        let maglev = maglev.filter_map(|(base, ids)| Some((from_bytes(base)?, maglev_ids(ids)))).collect();
        drop(tables);
        Ok(Actual { frontends: self.all("frontends"), slots, backends, maglev, source_ranges })
    }

    fn apply(&self, ops: &[Op]) -> Result<(), ApplyError> {
        for (index, op) in ops.iter().enumerate() {
            self.step(op).map_err(|source| ApplyError { index, op: describe(op), source })?;
            debug_assert!(TABLES.contains(&table_of(op)));
        }
        Ok(())
    }

    fn read_l2(&self) -> Result<Vec<(L2Key, L2Value)>, MapError> {
        Ok(self.all("l2"))
    }

    fn put_l2(&self, key: L2Key) -> Result<(), MapError> {
        if self.lock().get("l2").is_some_and(|entries| entries.contains_key(bytes_of(&key))) {
            return Ok(());
        }
        self.put("l2", bytes_of(&key), bytes_of(&L2Value::default()).to_vec())
    }

    fn delete_l2(&self, key: &L2Key) -> Result<(), MapError> {
        self.remove("l2", bytes_of(key));
        Ok(())
    }

    fn settings(&self) -> Result<Settings, MapError> {
        Ok(self.all::<u32, Settings>("settings").pop().map(|(_, settings)| settings).unwrap_or_default())
    }

    fn write_settings(&self, settings: &Settings) -> Result<(), MapError> {
        self.put("settings", &[0; 4], bytes_of(settings).to_vec())
    }

    fn read_devices(&self) -> Result<Vec<(u32, DeviceValue)>, MapError> {
        Ok(self.all("devices"))
    }

    fn put_device(&self, ifindex: u32, device: &DeviceValue) -> Result<(), MapError> {
        self.put("devices", bytes_of(&ifindex), bytes_of(device).to_vec())
    }

    fn delete_device(&self, ifindex: u32) -> Result<(), MapError> {
        self.remove("devices", bytes_of(&ifindex));
        Ok(())
    }

    fn read_peers(&self) -> Result<Vec<(PeerKey, PeerValue)>, MapError> {
        Ok(self.all("peers"))
    }

    fn put_peer(&self, key: &PeerKey, peer: &PeerValue) -> Result<(), MapError> {
        self.put("peers", bytes_of(key), bytes_of(peer).to_vec())
    }

    fn delete_peer(&self, key: &PeerKey) -> Result<(), MapError> {
        self.remove("peers", bytes_of(key));
        Ok(())
    }

    fn counter(&self, reason: u8, direction: Direction) -> Result<DropCounter, MapError> {
        let tables = self.lock();
        let value = tables.get("drops").and_then(|entries| entries.get(bytes_of(&drop_slot(reason, direction))));
        Ok(value.map(|value| dump::sum(value)).unwrap_or_default())
    }

    fn collect_flows(&self, timeouts: &Timeouts, now: u64) -> Result<Collected, MapError> {
        collect::pass(self, timeouts, now)
    }

    fn share_openings(&self, _counted: Option<u64>) -> Result<(), MapError> {
        Ok(())
    }

    fn flow_counts(&self) -> Result<[u64; FlowCount::ALL.len()], MapError> {
        let tables = self.lock();
        let of = |what: FlowCount| {
            let value = tables.get("counts").and_then(|entries| entries.get(bytes_of(&(what as u32))));
            value.map_or(0, |value| dump::total(value))
        };
        Ok(FlowCount::ALL.map(of))
    }

    fn flow_sizes(&self) -> (u32, u32) {
        (self.sizes.flows, self.sizes.transient)
    }

    fn sockets(&self) -> Result<Vec<(SocketKey, SocketValue)>, MapError> {
        Ok(self.all("sockets"))
    }

    fn socket(&self, key: &SocketKey) -> Result<Option<SocketValue>, MapError> {
        Ok(self.sockets()?.into_iter().find(|(known, _)| known == key).map(|(_, value)| value))
    }

    fn forget_socket(&self, key: &SocketKey) -> Result<(), MapError> {
        self.remove("sockets", bytes_of(key));
        Ok(())
    }

    fn dump_raw(&self, table: &str) -> Result<Vec<(String, String)>, TableError> {
        let name = table_name(table)?;
        let entries = self.raw_entries(name)?;
        Ok(entries.iter().filter_map(|(key, value)| dump::element(name, key, value)).collect())
    }

    fn usage(&self) -> Vec<TableUsage> {
        let tables = self.lock();
        TABLES
            .into_iter()
            .map(|name| TableUsage {
                name,
                entries: Some(tables.get(name).map_or(0, |entries| entries.len() as u64)),
                max_entries: self.limit(name),
                bytes: 0,
            })
            .collect()
    }

    fn raw_entries(&self, table: &str) -> Result<Vec<RawEntry>, TableError> {
        let name = table_name(table)?;
        Ok(self.lock().get(name).into_iter().flatten().map(|(k, v)| (k.clone(), v.clone())).collect())
    }

    fn raw_get(&self, table: &str, key: &[u8]) -> Result<Option<Vec<u8>>, TableError> {
        let name = table_name(table)?;
        Ok(self.lock().get(name).and_then(|entries| entries.get(key)).cloned())
    }

    fn raw_put(&self, table: &str, key: &[u8], value: &[u8]) -> Result<(), TableError> {
        Ok(self.put(table_name(table)?, key, value.to_vec())?)
    }

    fn raw_delete(&self, table: &str, key: &[u8]) -> Result<bool, TableError> {
        Ok(self.remove(table_name(table)?, key))
    }
}
