//! Directories in the cgroup2 hierarchy, wherever it is mounted.
//!
//! Only grouping: no controller is ever enabled here.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::NetError;

/// Where cgroup2 is mounted: `/sys/fs/cgroup` where it is alone, below that in hybrid set-ups.
///
/// # Errors
/// When it is not mounted at all.
pub fn root() -> Result<PathBuf, NetError> {
    let mounts = fs::read_to_string("/proc/mounts").map_err(NetError::io("read /proc/mounts"))?;
    mounts
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ');
            let (_, target, kind) = (fields.next()?, fields.next()?, fields.next()?);
            (kind == "cgroup2").then(|| PathBuf::from(target))
        })
        .next()
        .ok_or_else(|| {
            NetError::NotFound("cgroup2 is not mounted: mount -t cgroup2 none /sys/fs/cgroup/unified".into())
        })
}

/// Process ids in a cgroup and in those below it.
pub fn processes(dir: &Path) -> Vec<i32> {
    let mut found: Vec<i32> = fs::read_to_string(dir.join("cgroup.procs"))
        .unwrap_or_default()
        .lines()
        .filter_map(|line| line.parse().ok())
        .collect();
    for below in children(dir) {
        found.extend(processes(&below));
    }
    found
}

/// Kills every process in a cgroup and below, including those that appear meanwhile, and waits until they are gone.
///
/// # Errors
/// When some are still there after two seconds (a process in an uninterruptible wait).
#[allow(clippy::disallowed_methods, reason = "also called when a lab is dropped, where nothing can be awaited")]
pub fn kill_all(dir: &Path) -> Result<(), NetError> {
    let deadline = Instant::now() + Duration::from_secs(2);
    loop {
        // 0 stands for processes of another pid namespace, which can not be reached by number.
        let found: Vec<i32> = processes(dir).into_iter().filter(|pid| *pid > 0 && !is_zombie(*pid)).collect();
        if found.is_empty() {
            return Ok(());
        }
        for pid in &found {
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(*pid), nix::sys::signal::Signal::SIGKILL);
        }
        if Instant::now() > deadline {
            return Err(NetError::Invalid(format!("processes {found:?} in {} do not die", dir.display())));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Removes a cgroup and those below it, which must be empty of processes.
///
/// # Errors
/// When one is still in use after two seconds: the kernel releases a killed process's cgroup a little later.
#[allow(clippy::disallowed_methods, reason = "called when a lab is dropped, where nothing can be awaited")]
pub fn remove(dir: &Path) -> Result<(), NetError> {
    for below in children(dir) {
        remove(&below)?;
    }
    let deadline = Instant::now() + Duration::from_secs(2);
    loop {
        match fs::remove_dir(dir) {
            Ok(()) => return Ok(()),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(e) if Instant::now() > deadline => {
                return Err(NetError::io(format!("remove cgroup {}", dir.display()))(e));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(2)),
        }
    }
}

fn children(dir: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    entries.flatten().filter(|entry| entry.file_type().is_ok_and(|t| t.is_dir())).map(|entry| entry.path()).collect()
}

/// Zombies wait for their parent and hold nothing that matters here.
fn is_zombie(pid: i32) -> bool {
    super::proc::stat(pid).is_none_or(|stat| stat.state == 'Z')
}
