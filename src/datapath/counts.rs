//! What happens to connections, as the programs count it per CPU, and what the agent adds to that.

use kinesin_abi::FlowCount;

use super::kernel::KernelMaps;
use super::{MapError, bytes_of, dump};

impl KernelMaps {
    /// See [`MapStore::share_openings`](super::MapStore::share_openings).
    pub(super) fn even_out(&self, counted: Option<u64>) -> Result<(), MapError> {
        use FlowCount::{Opened, Settled, WrittenOff};
        let (opened, settled, before) = (self.per_cpu(Opened)?, self.per_cpu(Settled)?, self.per_cpu(WrittenOff)?);
        let added: Vec<u64> =
            opened.iter().zip(&settled).map(|(opened, settled)| opened.wrapping_sub(*settled)).collect();
        let all = counted.unwrap_or_else(|| {
            let left = added.iter().zip(&before).map(|(added, off)| added.wrapping_sub(*off) as i64).sum::<i64>();
            left.max(0) as u64
        });
        // Those that never begin a connection need no share.
        let busy = opened.iter().filter(|opened| **opened > 0).count().max(1) as u64;
        let share = |opened| if opened > 0 { all.div_ceil(busy) } else { 0 };
        let after: Vec<u64> =
            added.iter().zip(opened).map(|(added, opened)| added.wrapping_sub(share(opened))).collect();
        if after != before {
            let value: Vec<u8> = after.iter().flat_map(|count| count.to_ne_bytes()).collect();
            self.table("counts")
                .put(bytes_of(&(WrittenOff as u32)), &value)
                .map_err(self.failed("counts", "write to"))?;
        }
        Ok(())
    }

    /// Adds to one of the counts that only the agent writes, in the first CPU's element.
    pub(super) fn count(&self, what: FlowCount, more: u64) -> Result<(), MapError> {
        let table = self.table("counts");
        let key = what as u32;
        let value = table.get(bytes_of(&key)).map_err(self.failed("counts", "read"))?;
        let mut value = value.unwrap_or_else(|| vec![0; table.value]);
        if let Some(first) = value.first_chunk_mut() {
            *first = u64::from_ne_bytes(*first).wrapping_add(more).to_ne_bytes();
        }
        table.put(bytes_of(&key), &value).map_err(self.failed("counts", "write to"))
    }

    /// One of the counts, of each CPU.
    fn per_cpu(&self, what: FlowCount) -> Result<Vec<u64>, MapError> {
        let table = self.table("counts");
        let value = table.get(bytes_of(&(what as u32))).map_err(self.failed("counts", "read"))?;
        let value = value.unwrap_or_else(|| vec![0; table.value]);
        Ok(dump::per_cpu(&value).collect())
    }
}
