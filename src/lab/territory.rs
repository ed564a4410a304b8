//! Everything of a lab that outlives a thread: found by the lab's id, removed in one place.
//!
//! A lab is `/run/kinesin-lab/<id>/` with the owner's pid and start time in it, namespaces named `<id>.…`, a cgroup `<id>`
//! and mounts below the directory. The directory appears first and goes last, so nothing is ever without a trace.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::LabError;
use crate::net::{Netns, cgroup, proc};

/// Directories of labs. `/run`, because socket paths must be short and nothing should survive a reboot.
pub const BASE_DIR: &str = "/run/kinesin-lab";

const OWNER_FILE: &str = "owner";

/// The right to the things of one id.
#[derive(Debug)]
pub(super) struct Territory {
    id: String,
    dir: PathBuf,
    cgroup: PathBuf,
}

impl Territory {
    /// Removes what dead labs of this name left, and claims a fresh id.
    pub(super) fn claim(name: &str) -> Result<Self, LabError> {
        static COUNTER: AtomicU32 = AtomicU32::new(1);
        let valid = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        if name.is_empty() || name.len() > 40 || !name.chars().all(valid) {
            return Err(LabError::Invalid(format!(
                "lab name {name:?} does not work: use at most 40 of a-z, 0-9 and -"
            )));
        }
        clean_leftovers(name);
        let id = format!("{name}-{:x}-{}", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed));
        let dir = Path::new(BASE_DIR).join(&id);
        let cgroup = cgroup::root()?.join(format!("kinesin-lab-{id}"));
        let territory = Self { id, dir, cgroup };
        territory.prepare()?;
        Ok(territory)
    }

    /// The directory appears complete with its owner, so that no other lab takes it for abandoned.
    fn prepare(&self) -> Result<(), LabError> {
        let what = || LabError::io(format!("create {}", self.dir.display()));
        fs::create_dir_all(BASE_DIR).map_err(what())?;
        let early = Path::new(BASE_DIR).join(format!(".{}", self.id));
        fs::create_dir_all(&early).map_err(what())?;
        fs::write(early.join(OWNER_FILE), Owner::me().to_text()).map_err(what())?;
        fs::rename(&early, &self.dir).map_err(what())?;
        fs::create_dir_all(&self.cgroup).map_err(LabError::io(format!("create {}", self.cgroup.display())))?;
        for below in ["manifests", "state", "logs"] {
            fs::create_dir_all(self.dir.join(below)).map_err(what())?;
        }
        Ok(())
    }

    pub(super) fn id(&self) -> &str {
        &self.id
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// A namespace of this lab.
    pub(super) fn netns(&self, name: &str) -> Result<Netns, LabError> {
        Ok(Netns::create(&format!("{}.{name}", self.id))?)
    }

    /// A cgroup of this lab; `name` may have several parts.
    pub(super) fn make_cgroup(&self, name: &str) -> Result<PathBuf, LabError> {
        let path = self.cgroup.join(name);
        fs::create_dir_all(&path).map_err(LabError::io(format!("create cgroup {}", path.display())))?;
        Ok(path)
    }
}

impl Drop for Territory {
    fn drop(&mut self) {
        erase(&self.id);
    }
}

/// Mounts a BPF file system at a directory, which is created.
pub(super) fn mount_bpffs(path: &Path) -> Result<(), LabError> {
    let what = || format!("mount bpffs at {}", path.display());
    fs::create_dir_all(path).map_err(LabError::io(what()))?;
    mount(Some("bpf"), path, Some("bpf"), MsFlags::empty(), None::<&str>).map_err(|e| LabError::io(what())(e.into()))
}

/// Removes labs of this name whose owner is dead.
fn clean_leftovers(name: &str) {
    let Ok(entries) = fs::read_dir(BASE_DIR) else { return };
    for entry in entries.flatten() {
        let id = entry.file_name().to_string_lossy().into_owned();
        if name_of(&id) != Some(name) {
            continue;
        }
        // Labs of other processes may clean at the same time; one of them wins, the others find nothing.
        let Ok(text) = fs::read_to_string(entry.path().join(OWNER_FILE)) else { continue };
        if Owner::from_text(&text).is_some_and(|owner| !owner.is_alive()) {
            tracing::info!(lab = id, "removing what a killed run left behind");
            erase(&id);
        }
    }
}

/// `web-a` of `web-a-1f3-2`.
fn name_of(id: &str) -> Option<&str> {
    let (rest, _) = id.rsplit_once('-')?;
    let (name, _) = rest.rsplit_once('-')?;
    Some(name)
}

/// Removes everything of a lab: processes, mounts, namespaces, cgroups, files. Each step is tried whatever became of
/// the others, and doing it twice is harmless.
fn erase(id: &str) {
    let dir = Path::new(BASE_DIR).join(id);
    let complain = |what: &str, error: &dyn std::fmt::Display| tracing::warn!(lab = id, %error, "{what}");
    let cgroup = cgroup::root().ok().map(|root| root.join(format!("kinesin-lab-{id}")));
    if let Some(cgroup) = &cgroup
        && let Err(error) = cgroup::kill_all(cgroup)
    {
        complain("processes of the lab are still there", &error);
    }
    for mount in mounts_below(&dir) {
        if let Err(error) = umount2(&mount, MntFlags::MNT_DETACH) {
            complain("a mount of the lab is still there", &error);
        }
    }
    let prefix = format!("{id}.");
    for name in Netns::names().iter().filter(|name| name.starts_with(&prefix)) {
        let _ = Netns::remove(name);
    }
    if let Some(cgroup) = &cgroup
        && let Err(error) = cgroup::remove(cgroup)
    {
        complain("a cgroup of the lab is still there", &error);
    }
    match fs::remove_dir_all(&dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => complain("files of the lab are still there", &error),
        _ => {}
    }
}

/// Mount points below a directory, the deepest first.
fn mounts_below(dir: &Path) -> Vec<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let mut found: Vec<PathBuf> = mounts
        .lines()
        .filter_map(|line| line.split(' ').nth(1))
        .map(PathBuf::from)
        .filter(|target| target.starts_with(dir))
        .collect();
    found.reverse();
    found
}

/// A process, for good: pids are reused, a pid with its start time is not.
#[derive(Debug, PartialEq, Eq)]
struct Owner {
    pid: i32,
    start_time: u64,
}

impl Owner {
    fn me() -> Self {
        let pid = std::process::id() as i32;
        Self { pid, start_time: proc::stat(pid).map_or(0, |stat| stat.start_time) }
    }

    fn to_text(&self) -> String {
        format!("{} {}\n", self.pid, self.start_time)
    }

    fn from_text(text: &str) -> Option<Self> {
        let (pid, start_time) = text.trim_end().split_once(' ')?;
        Some(Self { pid: pid.parse().ok()?, start_time: start_time.parse().ok()? })
    }

    fn is_alive(&self) -> bool {
        proc::stat(self.pid).is_some_and(|stat| stat.start_time == self.start_time && stat.state != 'Z')
    }
}
