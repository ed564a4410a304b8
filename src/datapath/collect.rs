//! One pass over the tables of connections. The rules are in [`kinesin_core::flows`]; here is how the tables are read.
//!
//! Deliberately absent: locks. An entry that a packet has used between reading and removing is looked at once more right
//! before; what is removed all the same in the microsecond left is restored by its partner's next packet.

use std::collections::HashMap;

use kinesin_abi::{Backend, BackendId, FlowKey, FlowValue, Timeouts, proto, tcp_established};
use kinesin_core::flows::ports::{PortCount, Ports};
use kinesin_core::flows::{Found, Look, is_leaving, look};

use super::MapError;

/// What a pass found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Collected {
    /// In the table of established connections.
    pub settled: Found,
    /// Of those kept there, the ones whose connections are not established yet.
    pub opening: u64,
    /// In the table of all others.
    pub transient: Found,
    /// Entries of the latter that were no more than copies of expired ones of the former.
    pub copies: u64,
    /// Where most source ports are in use.
    pub ports: Vec<(Ports, u32)>,
}

/// The tables that a pass needs.
pub(super) trait Flows {
    /// Calls `each` with all elements; what changes meanwhile may be seen or not.
    fn scan(
        &self,
        table: &'static str,
        each: &mut dyn FnMut(FlowKey, FlowValue) -> Result<(), MapError>,
    ) -> Result<(), MapError>;
    fn get(&self, table: &'static str, key: &FlowKey) -> Result<Option<FlowValue>, MapError>;
    /// Whether there was such an element.
    fn remove(&self, table: &'static str, key: &FlowKey) -> Result<bool, MapError>;
    fn backend(&self, id: BackendId) -> Result<Option<Backend>, MapError>;
}

const SETTLED: &str = "flows";
const TRANSIENT: &str = "transient";

/// A pass under way.
struct Pass<'a, T> {
    tables: &'a T,
    timeouts: &'a Timeouts,
    now: u64,
    /// What has been asked about backends: `None` where one is gone.
    backends: HashMap<BackendId, Option<Backend>>,
    opening: u64,
    copies: u64,
    ports: PortCount,
}

/// Removes what has expired at `now` (CLOCK_MONOTONIC, nanoseconds).
pub(super) fn pass<T: Flows>(tables: &T, timeouts: &Timeouts, now: u64) -> Result<Collected, MapError> {
    let mut pass =
        Pass { tables, timeouts, now, backends: HashMap::new(), opening: 0, copies: 0, ports: PortCount::default() };
    let (settled, transient) = (pass.table(SETTLED)?, pass.table(TRANSIENT)?);
    let Pass { opening, copies, ports, .. } = pass;
    Ok(Collected { settled, opening, transient, copies, ports: ports.fullest() })
}

impl<T: Flows> Pass<'_, T> {
    fn table(&mut self, table: &'static str) -> Result<Found, MapError> {
        let mut found = Found::default();
        self.tables.scan(table, &mut |key, value| {
            let expired = self.expired(table, &key, &value)? && self.remove(table, &key)?;
            found.note(key.proto, expired);
            self.opening += u64::from(!expired && table == SETTLED && !tcp_established(value.tcp));
            if !expired && PortCount::counts(&key, &value) && !self.is_copy(table, &key)? {
                self.ports.note(&key, &value);
            }
            // Or a new connection would find what the old one left behind when it moved.
            if expired && table == SETTLED && self.tables.remove(TRANSIENT, &key)? {
                self.copies += 1;
            }
            Ok(())
        })?;
        Ok(found)
    }

    /// Whether this is what a connection left behind when it moved, not collected yet.
    fn is_copy(&self, table: &'static str, key: &FlowKey) -> Result<bool, MapError> {
        Ok(table == TRANSIENT && key.proto == proto::TCP && self.tables.get(SETTLED, key)?.is_some())
    }

    /// Whether both directions have been silent for too long.
    fn expired(&mut self, table: &'static str, key: &FlowKey, value: &FlowValue) -> Result<bool, MapError> {
        if !self.silent(key, value)? {
            return Ok(false);
        }
        if self.is_copy(table, key)? {
            return Ok(true);
        }
        let other = value.partner_key(key);
        for table in [SETTLED, TRANSIENT] {
            if (table == TRANSIENT || other.proto == proto::TCP)
                && let Some(partner) = self.tables.get(table, &other)?
            {
                // A partner that leads elsewhere belongs to another connection.
                return if partner.partner_key(&other) == *key { self.silent(&other, &partner) } else { Ok(true) };
            }
        }
        Ok(true)
    }

    fn silent(&mut self, key: &FlowKey, value: &FlowValue) -> Result<bool, MapError> {
        match look(self.timeouts, key, value, self.now) {
            Look::Keep => Ok(false),
            Look::Silent => Ok(true),
            Look::SilentIfLeaving => self.leaving(key, value),
        }
    }

    fn leaving(&mut self, key: &FlowKey, value: &FlowValue) -> Result<bool, MapError> {
        let known = match self.backends.get(&value.backend) {
            Some(known) => *known,
            None => {
                let read = self.tables.backend(value.backend)?;
                self.backends.insert(value.backend, read);
                read
            }
        };
        // An id may have passed on to another backend; which end of the entry is the backend's depends on its direction.
        Ok(known.is_none_or(|backend| is_leaving(backend.state) || !self.is_end(key, value, &backend)))
    }

    fn is_end(&self, key: &FlowKey, value: &FlowValue, backend: &Backend) -> bool {
        let reply = value.flags & kinesin_abi::FLOW_REPLY != 0;
        // A reply's entry does not name the backend; its partner is asked as well, and does.
        reply || value.backend_end(key) == (backend.addr, backend.port)
    }

    /// Removes an entry unless a packet has used it meanwhile; returns whether it did.
    fn remove(&self, table: &'static str, key: &FlowKey) -> Result<bool, MapError> {
        let Some(value) = self.tables.get(table, key)? else { return Ok(false) };
        if value.last_seen > self.now || look(self.timeouts, key, &value, self.now) == Look::Keep {
            return Ok(false);
        }
        self.tables.remove(table, key)
    }
}
