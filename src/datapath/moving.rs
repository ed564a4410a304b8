//! Replacing tables that the programs write to, without losing what is in them.
//!
//! New programs come with new tables, but not to all hooks at once, and copying takes time. So the programs look into the
//! old tables of connections where the new ones have nothing (`FLOWS_OLD`, `TRANSIENT_OLD`), from before the first of them
//! is attached until the last entry has been copied. Until then the old tables stay pinned beside the new ones: who dies
//! in between leaves them to the next agent. Other tables are copied before the new programs are attached, and what the
//! old ones added meanwhile afterwards.
//!
//! Deliberately absent: tables that the agent itself writes; it reads them back and repairs them.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use kinesin_abi::{FlowKey, FlowValue, proto, tcp_closed};

use super::batch::Table;
use super::pin::{Migration, Shape};
use super::{bytes_of, from_bytes, sys};

/// `BPF_MAP_TYPE_LRU_HASH`: what the tables of connections that forget the oldest are.
const LRU_HASH: u32 = 9;

/// Tables that only the programs write, and that are not for connections.
const LATE: [&str; 2] = ["SOCKETS", "AFFINITY"];

/// A table that is being replaced.
#[derive(Debug)]
struct Old {
    name: &'static str,
    fd: OwnedFd,
    difference: String,
    /// Where it is pinned meanwhile, for tables of connections.
    pin: Option<PathBuf>,
}

/// The tables that are being replaced, and those that they are replaced with.
#[derive(Debug)]
pub struct Moving {
    old: Vec<Old>,
    flows: OwnedFd,
    transient: OwnedFd,
    late: Vec<(&'static str, OwnedFd)>,
    /// `FLOWS_OLD` and `TRANSIENT_OLD`.
    visible: [OwnedFd; 2],
}

/// Where an old table of connections is pinned until it is empty.
fn old_pin(maps: &Path, name: &str) -> PathBuf {
    maps.join(format!("{name}-old"))
}

/// Whether a table has connections, which need more than copying.
pub(super) fn has_connections(name: &str) -> bool {
    matches!(name, "FLOWS" | "TRANSIENT")
}

impl Moving {
    /// Notes what an agent that died in the middle has left behind.
    ///
    /// # Errors
    /// A pin or file descriptor cannot be used.
    pub(super) fn new(
        maps: &Path,
        fd: impl Fn(&str) -> io::Result<OwnedFd>,
        shapes: &[(&'static str, &'static str, Shape)],
    ) -> io::Result<Self> {
        let late = LATE.into_iter().map(|name| Ok((name, fd(name)?))).collect::<io::Result<_>>()?;
        let visible = [fd("FLOWS_OLD")?, fd("TRANSIENT_OLD")?];
        let mut moving = Self { old: Vec::new(), flows: fd("FLOWS")?, transient: fd("TRANSIENT")?, late, visible };
        for name in shapes.iter().map(|(_, name, _)| *name).filter(|name| has_connections(name)) {
            let pin = old_pin(maps, name);
            if let Some(fd) = sys::open_pin(&pin)? {
                moving.add(name, fd, "left unfinished".into(), Some(pin))?;
            }
        }
        Ok(moving)
    }

    /// Keeps a table of connections that is about to be replaced; `path` is its pin, which is free afterwards.
    pub(super) fn keep(&mut self, name: &'static str, fd: OwnedFd, difference: String, path: &Path) -> io::Result<()> {
        let pin = path.with_file_name(format!("{name}-old"));
        if self.old.iter().any(|old| old.pin.as_ref() == Some(&pin)) {
            // Two moves at once: the older is finished into the table that is replaced now, which nobody else writes any
            // more than the programs did before.
            let index = self.old.iter().position(|old| old.pin.as_ref() == Some(&pin));
            if let Some(older) = index.map(|index| self.old.swap_remove(index)) {
                let into = Table::new(fd.try_clone()?, 1)?;
                copy_new(&Table::new(older.fd, 1)?, &into)?;
            }
            fs::remove_file(&pin)?;
        }
        fs::rename(path, &pin)?;
        self.add(name, fd, difference, Some(pin))
    }

    /// Notes a table that has been copied once and is copied again at the end.
    pub(super) fn again(&mut self, name: &'static str, fd: OwnedFd) -> io::Result<()> {
        if LATE.contains(&name) { self.add(name, fd, String::new(), None) } else { Ok(()) }
    }

    fn add(&mut self, name: &'static str, fd: OwnedFd, difference: String, pin: Option<PathBuf>) -> io::Result<()> {
        let info = sys::map_info(fd.as_fd())?;
        if pin.is_some() {
            let flow = (size_of::<FlowKey>() as u32, size_of::<FlowValue>() as u32);
            let outer = &self.visible[usize::from(info.kind == LRU_HASH)];
            if (info.key, info.value) == flow {
                // Refused only for a table that the programs could not read; it is copied all the same.
                let _ = sys::update(outer.as_fd(), &[0; 4], &fd.as_raw_fd().to_ne_bytes());
            }
        }
        self.old.push(Old { name, fd, difference, pin });
        Ok(())
    }

    /// Whether there is nothing to move.
    pub fn is_empty(&self) -> bool {
        self.old.is_empty()
    }

    /// Copies what the new tables do not have, and lets go of the old ones. Call it when all programs are attached; takes
    /// about a microsecond per entry.
    pub fn finish(self) -> Vec<Migration> {
        let mut done = Vec::new();
        for old in &self.old {
            // What cannot be read is lost; it must not keep the agent from working.
            let (kept, lost) = self.copy(old).unwrap_or((0, 0));
            if old.pin.is_some() {
                let (map, difference) = (old.name.to_owned(), old.difference.clone());
                done.push(Migration { map, difference, kept, lost });
            }
        }
        for outer in &self.visible {
            // Empty already is as good.
            let _ = sys::delete(outer.as_fd(), &[0; 4]);
        }
        for pin in self.old.iter().filter_map(|old| old.pin.as_ref()) {
            let _ = fs::remove_file(pin);
        }
        done
    }

    fn copy(&self, old: &Old) -> io::Result<(usize, usize)> {
        let from = Table::new(old.fd.try_clone()?, 1)?;
        if let Some((_, fd)) = self.late.iter().find(|(name, _)| *name == old.name) {
            return copy_new(&from, &Table::new(fd.try_clone()?, 1)?);
        }
        if (from.key, from.value) != (size_of::<FlowKey>(), size_of::<FlowValue>()) {
            let mut lost = 0;
            from.scan(|_, _| lost += 1)?;
            return Ok((0, lost));
        }
        let (flows, transient) = (Table::new(self.flows.try_clone()?, 1)?, Table::new(self.transient.try_clone()?, 1)?);
        // In the order of use, so that what does not fit is the oldest.
        let mut entries: Vec<(FlowKey, FlowValue)> = Vec::new();
        from.scan(|key, value| entries.extend(from_bytes(key).zip(from_bytes(value))))?;
        entries.sort_unstable_by_key(|(_, value)| value.last_seen);
        let settles = |key: &FlowKey| key.proto == proto::TCP && old.name == "FLOWS";
        let (mut kept, mut lost) = (0, 0);
        for (key, value) in entries.iter().rev() {
            if !settles(key) {
                continue;
            }
            let (key_bytes, value_bytes) = (bytes_of(key), bytes_of(value));
            // A full table leaves the rest where the oldest are forgotten, as the programs do.
            let there = superseded(&transient, key, value)?
                || flows.add(key_bytes, value_bytes)?
                || transient.add(key_bytes, value_bytes)?;
            kept += usize::from(there);
            lost += usize::from(!there);
        }
        for (key, value) in entries.iter().filter(|(key, _)| !settles(key)) {
            let there = transient.add(bytes_of(key), bytes_of(value))?;
            kept += usize::from(there);
            lost += usize::from(!there);
        }
        Ok((kept, lost))
    }
}

/// Whether the new table of transient flows has a connection that came after this one, which is over.
fn superseded(transient: &Table, key: &FlowKey, value: &FlowValue) -> io::Result<bool> {
    Ok(tcp_closed(value.tcp) && transient.get(bytes_of(key))?.is_some())
}

/// Adds what is in one table and not in the other; returns (kept, lost).
fn copy_new(from: &Table, to: &Table) -> io::Result<(usize, usize)> {
    let (mut kept, mut lost, mut outcome) = (0, 0, Ok(()));
    from.scan(|key, value| match to.add(key, value) {
        Ok(true) => kept += 1,
        Ok(false) => lost += 1,
        Err(error) => outcome = Err(error),
    })?;
    outcome.map(|()| (kept, lost))
}
