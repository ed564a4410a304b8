//! How much memory there is: the machine's, and what this process's cgroups may use.
//!
//! Both versions of cgroups are read, as both are in use. Inside a container the hierarchy's root is the container's own.
//! Deliberately absent: what follows from it, which is in [`kinesin_core::sizing`].

use std::fs;
use std::path::{Path, PathBuf};

use kinesin_core::sizing::Memory;

/// Reads it. What cannot be read counts as not limited, and as no memory where it is the machine's.
pub fn memory() -> Memory {
    memory_at(Path::new("/"))
}

/// [`memory`] with another root directory than `/`, for tests.
pub fn memory_at(root: &Path) -> Memory {
    let read = |path: &str| fs::read_to_string(root.join(path)).unwrap_or_default();
    let total = read("proc/meminfo").lines().find_map(|line| {
        let kib = line.strip_prefix("MemTotal:")?.split_whitespace().next()?;
        kib.parse::<u64>().ok()?.checked_mul(1024)
    });
    let (groups, mounts) = (read("proc/self/cgroup"), read("proc/self/mountinfo"));
    let limits = groups.lines().filter_map(|line| limit(root, line, &mounts));
    Memory { total: total.unwrap_or_default(), limit: limits.min() }
}

/// The least limit of a cgroup and those around it; `line` is one of `/proc/self/cgroup` (`id:controllers:path`).
fn limit(root: &Path, line: &str, mounts: &str) -> Option<u64> {
    let mut fields = line.splitn(3, ':');
    let (_, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
    let (kind, file) = match controllers {
        "" => ("cgroup2", "memory.max"),
        _ if controllers.split(',').any(|name| name == "memory") => ("cgroup", "memory.limit_in_bytes"),
        _ => return None,
    };
    let (from, at) = mount(mounts, kind)?;
    // What is mounted may be a part of the hierarchy: in a container, the container's.
    let below = Path::new(path).strip_prefix(&from).unwrap_or(Path::new(""));
    let top = root.join(at.strip_prefix("/").unwrap_or(&at));
    let dirs = below.ancestors().map(|dir| top.join(dir));
    // `max`, and the number that version 1 has for it, which is beyond any machine.
    dirs.filter_map(|dir| fs::read_to_string(dir.join(file)).ok()?.trim().parse().ok()).min()
}

/// Root within the hierarchy and mount point of the memory controller's, or of the only, hierarchy (proc(5), mountinfo).
fn mount(mounts: &str, kind: &str) -> Option<(PathBuf, PathBuf)> {
    mounts.lines().find_map(|line| {
        let (before, after) = line.split_once(" - ")?;
        let mut after = after.split(' ');
        let (found, options) = (after.next()?, after.nth(1)?);
        if found != kind || kind == "cgroup" && !options.split(',').any(|option| option == "memory") {
            return None;
        }
        let mut before = before.split(' ').skip(3);
        Some((PathBuf::from(before.next()?), PathBuf::from(before.next()?)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// A root directory with these files.
    fn machine(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().expect("a directory");
        for (path, text) in files.iter().chain(&[("proc/meminfo", "MemTotal:       268435456 kB\nMemFree: 1 kB\n")]) {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().expect("not the root")).expect("made");
            fs::write(path, text).expect("written");
        }
        root
    }

    fn limit(files: &[(&str, &str)]) -> Option<u64> {
        let root = machine(files);
        let memory = memory_at(root.path());
        assert_eq!(memory.total, 256 << 30);
        memory.limit
    }

    const V2: &str = "30 25 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n";
    const V1: &str = "31 25 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n32 25 0:28 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n";

    #[test]
    fn a_container_sees_its_limit_at_the_root() {
        let files = [("proc/self/cgroup", "0::/\n"), ("proc/self/mountinfo", V2)];
        let with = |text| limit(&[files[0], files[1], ("sys/fs/cgroup/memory.max", text)]);
        assert_eq!(with("67108864\n"), Some(64 * MIB));
        assert_eq!(with("max\n"), None);
        assert_eq!(limit(&files), None);
        assert_eq!(limit(&[]), None);
    }

    #[test]
    fn the_tightest_limit_on_the_way_up_counts() {
        let files = [
            ("proc/self/cgroup", "0::/kubepods/pod1/c1\n"),
            ("proc/self/mountinfo", V2),
            ("sys/fs/cgroup/kubepods/memory.max", "1073741824"),
            ("sys/fs/cgroup/kubepods/pod1/memory.max", "67108864"),
            ("sys/fs/cgroup/kubepods/pod1/c1/memory.max", "max"),
        ];
        assert_eq!(limit(&files), Some(64 * MIB));
    }

    #[test]
    fn version_1_counts_alone_and_beside_version_2() {
        let both = format!("{V1}33 25 0:29 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n");
        let path = "sys/fs/cgroup/memory/a/memory.limit_in_bytes";
        for (groups, mounts) in [
            ("5:memory:/a\n4:cpu:/b\n", V1),
            ("5:memory:/a\n0::/x\n", both.as_str()),
            ("5:hugetlb,memory:/a/b\n0::/x\n", both.as_str()),
        ] {
            let files = [("proc/self/cgroup", groups), ("proc/self/mountinfo", mounts), (path, "67108864")];
            assert_eq!(limit(&files), Some(64 * MIB), "{groups}");
        }
    }

    #[test]
    fn a_part_of_a_hierarchy_that_is_mounted_alone_is_found() {
        let mounts = "40 25 0:28 /docker/c1 /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n";
        let files = [
            ("proc/self/cgroup", "5:memory:/docker/c1\n"),
            ("proc/self/mountinfo", mounts),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "67108864"),
        ];
        assert_eq!(limit(&files), Some(64 * MIB));
    }
}
