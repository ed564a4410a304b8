//! Where maps and links are pinned, and what to do with a pinned map of another shape: never reused blindly, never fatal.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use kinesin_abi::ABI_VERSION;
use nix::mount::MsFlags;
use serde::Serialize;

use super::batch::Table;
use super::{attach, sys};

/// `BPF_FS_MAGIC` of statfs(2).
const BPF_FS_MAGIC: i64 = 0xcafe_4a11;

/// `<bpf-root>/kinesin/v<abi>/maps`
pub fn maps_dir(bpf_root: &Path) -> PathBuf {
    bpf_root.join("kinesin").join(format!("v{ABI_VERSION}")).join("maps")
}

/// `<bpf-root>/kinesin/links`: of all versions, so that an upgrade replaces programs instead of attaching beside them.
pub fn links_dir(bpf_root: &Path) -> PathBuf {
    bpf_root.join("kinesin").join("links")
}

/// Whether the path is on a bpf filesystem.
pub(crate) fn is_bpffs(path: &Path) -> io::Result<bool> {
    let stat = nix::sys::statfs::statfs(path)?;
    Ok(stat.filesystem_type().0 as i64 & 0xffff_ffff == BPF_FS_MAGIC)
}

/// Makes the path a bpf filesystem: creates and mounts it unless it is on one already.
///
/// # Errors
/// The directory cannot be made, or mount(2) is not permitted.
pub fn ensure_bpffs(path: &Path) -> io::Result<()> {
    fs::create_dir_all(path)?;
    if is_bpffs(path)? {
        return Ok(());
    }
    nix::mount::mount(Some("bpf"), path, Some("bpf"), MsFlags::empty(), Some("mode=0700"))?;
    Ok(())
}

/// Where cgroup2 is mounted: alone, or beside version 1 at a path of the distribution's choice.
pub fn cgroup2_root() -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/mounts").ok()?;
    mounts.lines().find_map(|line| {
        let mut fields = line.split(' ');
        let (path, kind) = (fields.nth(1)?, fields.next()?);
        // Spaces and the like are octal escapes, which no sensible path has.
        (kind == "cgroup2").then(|| PathBuf::from(path.replace("\\040", " ")))
    })
}

/// Removes everything that an agent has left in the kernel below this root: hooks first, then maps. Missing pins are no
/// error; what cannot be removed is reported after the rest is gone.
pub fn detach_all(bpf_root: &Path) -> io::Result<()> {
    let mut first_error = attach::detach_pinned(&links_dir(bpf_root)).err();
    if let Err(error) = fs::remove_dir_all(bpf_root.join("kinesin"))
        && error.kind() != io::ErrorKind::NotFound
    {
        first_error.get_or_insert(error);
    }
    first_error.map_or(Ok(()), Err)
}

/// What [`detach_all`] would remove: the pins of hooks and maps, of all versions, sorted.
///
/// # Errors
/// A directory cannot be read.
pub fn pins(bpf_root: &Path) -> io::Result<Vec<PathBuf>> {
    let (mut found, mut dirs) = (Vec::new(), vec![bpf_root.join("kinesin")]);
    while let Some(dir) = dirs.pop() {
        let entries = match fs::read_dir(&dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            entries => entries?,
        };
        for entry in entries {
            let entry = entry?;
            if entry.file_type()?.is_dir() { dirs.push(entry.path()) } else { found.push(entry.path()) }
        }
    }
    found.sort();
    Ok(found)
}

/// A pinned map of another shape than the programs have, and what became of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Migration {
    /// The map.
    pub map: String,
    /// What differed, for people: `max_entries 1024, now 65536`.
    pub difference: String,
    /// Elements taken over.
    pub kept: usize,
    /// Elements that could not be taken over.
    pub lost: usize,
}

/// What the programs expect of a map; `inner` is the value size of the maps that a map of maps holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    pub(crate) kind: u32,
    pub(crate) key: u32,
    pub(crate) value: u32,
    pub(crate) entries: u32,
    pub(crate) flags: u32,
    pub(crate) inner: Option<u32>,
}

/// What is pinned where a map should be.
pub(crate) enum Pinned {
    /// Nothing, or nothing worth keeping.
    Nothing,
    /// A map of the right shape.
    Fits,
    /// A map of another shape.
    Differs(OwnedFd, String),
}

/// Looks at what is pinned.
pub(crate) fn inspect(path: &Path, expected: &Shape) -> io::Result<Pinned> {
    let Some(fd) = sys::open_pin(path)? else { return Ok(Pinned::Nothing) };
    let Ok(info) = sys::map_info(fd.as_fd()) else {
        // Not a map at all.
        return Ok(Pinned::Differs(fd, "not a map".into()));
    };
    let mut differences: Vec<String> = [
        ("type", info.kind, expected.kind),
        ("key size", info.key, expected.key),
        ("value size", info.value, expected.value),
        ("max_entries", info.entries, expected.entries),
        ("flags", info.flags, expected.flags),
    ]
    .into_iter()
    .filter(|(_, is, should)| is != should)
    .map(|(what, is, should)| format!("{what} {is}, now {should}"))
    .collect();
    if differences.is_empty()
        && let Some(should) = expected.inner
    {
        match inner_value_size(&fd)? {
            Some(is) if is == should => {}
            Some(is) => differences.push(format!("inner value size {is}, now {should}")),
            // The kernel does not tell the inner shape of an empty map; a fresh one costs nothing.
            None => differences.push("empty".into()),
        }
    }
    if differences.is_empty() { Ok(Pinned::Fits) } else { Ok(Pinned::Differs(fd, differences.join(", "))) }
}

/// Value size of the first inner map.
fn inner_value_size(outer: &OwnedFd) -> io::Result<Option<u32>> {
    let mut first = None;
    let table = Table::new(outer.try_clone()?, 1)?;
    table.scan(|_, id| first = first.or_else(|| super::from_bytes::<u32>(id)))?;
    let Some(inner) = first.and_then(|id| sys::map_by_id(id).ok()) else { return Ok(None) };
    Ok(Some(sys::map_info(inner.as_fd())?.value))
}

/// `BPF_MAP_TYPE_PERCPU_ARRAY`
const PERCPU_ARRAY: u32 = 6;

/// Copies what fits from a map of another shape; returns (kept, lost).
pub(crate) fn copy(from: &OwnedFd, to: &OwnedFd, cpus: usize, maps: bool) -> io::Result<(usize, usize)> {
    let is_array = matches!(sys::map_info(from.as_fd())?.kind, sys::MAP_ARRAY | PERCPU_ARRAY);
    let (from, to) = (Table::new(from.try_clone()?, cpus)?, Table::new(to.try_clone()?, cpus)?);
    let (mut keys, mut values, mut count) = (Vec::new(), Vec::new(), 0usize);
    from.scan(|key, value| {
        // Elements of arrays always exist; those never written are zero in the new one too, and nothing lost where that is
        // too short for them.
        if is_array && value.iter().all(|byte| *byte == 0) {
            return;
        }
        keys.extend_from_slice(key);
        values.extend_from_slice(value);
        count += 1;
    })?;
    if from.key != to.key || from.value != to.value {
        return Ok((0, count));
    }
    if maps {
        return Ok((copy_inner(&keys, &values, &to), 0));
    }
    let mut kept = 0;
    for (key, value) in keys.chunks(to.key * 1024).zip(values.chunks(to.value * 1024)) {
        match to.put_all(key, value) {
            Ok(()) => kept += key.len() / to.key,
            Err(stopped) => {
                kept += stopped.done;
                break;
            }
        }
    }
    Ok((kept, count - kept))
}

/// Copies the fields that both layouts of the settings have; those that only the new one has stay zero, which means what
/// was before.
pub(crate) fn copy_settings(from: &OwnedFd, to: &OwnedFd) -> io::Result<(usize, usize)> {
    let (from, to) = (Table::new(from.try_clone()?, 1)?, Table::new(to.try_clone()?, 1)?);
    let Some(mut value) = from.get(&[0; 4])? else { return Ok((0, 0)) };
    value.resize(to.value, 0);
    to.put(&[0; 4], &value)?;
    Ok((1, 0))
}

/// Inner maps move by reference: the tables themselves are shared. None is lost where its size is another one: that is
/// computed anew from its service.
fn copy_inner(keys: &[u8], ids: &[u8], to: &Table) -> usize {
    keys.chunks_exact(to.key)
        .zip(ids.as_chunks().0)
        .filter(|(key, id)| {
            let inner = sys::map_by_id(u32::from_ne_bytes(**id));
            inner.is_ok_and(|inner| to.put(key, &inner.as_raw_fd().to_ne_bytes()).is_ok())
        })
        .count()
}
