//! An agent in a small container on a large machine: how many entries its maps get follows the container.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use kinesin::admin::views::StatusView;
use kinesin::datapath::ensure_bpffs;
use kinesin::lab::{AgentOptions, Lab, manifests};

use super::rig::{LIMIT, eventually_or};

/// The machine seems to have 256 GiB: a share of that, as without a limit, is some 640 MiB.
const MEMINFO: &str = "MemTotal:       268435456 kB\nMemFree:        200000000 kB\nMemAvailable:   200000000 kB\n";

/// How the agent learns of its limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Limit {
    /// It is in a cgroup that has it, and is killed when it takes more.
    Real,
    /// Its own `/proc` says so.
    Told,
}

impl Limit {
    /// What a real one is measured against is more than maps: while the kernel verifies the programs, what it needs for that is
    /// charged too, 30 MiB or so, and programs built for tests are large.
    fn bytes(self) -> u64 {
        match self {
            Self::Real => 128 << 20,
            Self::Told => 64 << 20,
        }
    }
}

/// A cgroup with the limit, of whichever version has the memory controller here; removed when dropped.
struct Group(PathBuf);

impl Group {
    /// None where no hierarchy lets one be made.
    fn new() -> Option<Self> {
        let groups = fs::read_to_string("/proc/self/cgroup").unwrap();
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let mounted = |kind: &str, option: &str| {
            let line = mounts.lines().find(|line| line.contains(&format!(" - {kind} ")) && line.ends_with(option))?;
            Some(PathBuf::from(line.split(' ').nth(4)?))
        };
        let name = format!("kinesin-r30-{}", std::process::id());
        // Version 1: below the group that the test is in, which may be all that a container has.
        let v1 = groups.lines().find_map(|line| line.split_once(":memory:").map(|(_, path)| path.to_owned()));
        if let (Some(path), Some(top)) = (v1, mounted("cgroup", "memory")) {
            let dir = top.join(path.trim_start_matches('/')).join(&name);
            if fs::create_dir(&dir).is_ok() {
                let group = Self(dir);
                fs::write(group.0.join("memory.limit_in_bytes"), Limit::Real.bytes().to_string()).unwrap();
                return Some(group);
            }
        }
        let top = mounted("cgroup2", "")?;
        // Refused where processes are in the root of a container's own hierarchy.
        fs::write(top.join("cgroup.subtree_control"), "+memory").ok()?;
        let group = Self(top.join(name));
        fs::create_dir(&group.0).ok()?;
        fs::write(group.0.join("memory.max"), Limit::Real.bytes().to_string()).ok()?;
        Some(group)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Whoever was in it dies with the lab, which goes before.
        let _ = fs::remove_dir(&self.0);
    }
}

/// A program that starts the agent with the machine's memory, and its limit, as said. Mounts are its own.
fn wrapper(dir: &Path, limit: Limit, group: Option<&Group>) -> PathBuf {
    fs::write(dir.join("meminfo"), MEMINFO).unwrap();
    let (binary, at) = (env!("CARGO_BIN_EXE_kinesin"), dir.display());
    let mut inside = format!("mount --bind {at}/meminfo /proc/meminfo");
    let mut before = String::new();
    match limit {
        Limit::Real => before = format!("echo $$ > {}/cgroup.procs\n", group.expect("it is asked for").0.display()),
        Limit::Told => {
            fs::create_dir(dir.join("group")).unwrap();
            fs::write(dir.join("group/memory.max"), limit.bytes().to_string()).unwrap();
            fs::write(dir.join("cgroup"), "0::/\n").unwrap();
            fs::write(dir.join("mountinfo"), format!("30 25 0:26 / {at}/group rw - cgroup2 cgroup2 rw\n")).unwrap();
            inside += &format!(
                " && mount --bind {at}/cgroup /proc/$$/cgroup && mount --bind {at}/mountinfo /proc/$$/mountinfo"
            );
        }
    }
    let path = dir.join("agent.sh");
    let script =
        format!("#!/bin/sh\n{before}exec unshare --mount sh -c '{inside} && exec {binary} \"$@\"' sh \"$@\"\n");
    fs::write(&path, script).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

/// What the tables that grow with traffic take when they are full, bytes: what the kernel takes for each entry.
fn bytes(status: &StatusView) -> u64 {
    let of =
        |table: &str, bytes: u64| status.maps.iter().find(|map| map.name == table).map_or(0, |map| map.max * bytes);
    of("flows", 160) + of("transient", 160) + of("sockets", 120) + of("affinity", 104)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r30_an_agent_in_a_small_container_on_a_machine_with_256_gib_starts_serves_and_lives() {
    let group = Group::new();
    let limits = [Limit::Told, Limit::Real];
    for limit in limits.into_iter().filter(|limit| *limit == Limit::Told || group.is_some()) {
        let name = if limit == Limit::Real { "r30-real" } else { "r30-told" };
        let builder = Lab::builder(name).binary(env!("CARGO_BIN_EXE_kinesin"));
        let lab = builder.nodes(1).pods_per_node(1).build().await.unwrap();
        manifests::write_all(&lab).unwrap();
        lab.pod(1, 1).serve().await.unwrap();
        // Mounted here, so that what the agent pins is to be seen outside of its own mounts.
        ensure_bpffs(&lab.node(1).bpf_root()).unwrap();
        let script = wrapper(lab.node(1).dir(), limit, group.as_ref());
        let agent = lab.node(1).start_agent(&AgentOptions::on_manifests(&lab).binary(script)).unwrap();
        agent.wait_ready(LIMIT).await.unwrap();
        let pid = agent.pid();

        let (code, body) = agent.get("/v1/status").await.unwrap();
        assert_eq!(code, 200);
        let status: StatusView = serde_json::from_str(&body).unwrap();
        let taken = bytes(&status);
        assert!((1 << 20..=limit.bytes() / 4).contains(&taken), "{limit:?}: {taken} bytes: {:?}", status.maps);
        assert_eq!(status.problems, Vec::<String>::new(), "{limit:?}");
        eventually_or("the service answers", async || {
            let answer = lab.client().get("http://10.0.0.100/").await;
            answer.map(drop).map_err(|error| format!("{error}\n{}", agent.logs(20)))
        })
        .await;
        if limit == Limit::Real {
            // And it finds room for a table that is made anew beside the old one.
            lab.node(1).set_config("bpf-ct-global-tcp-max", "20000").unwrap();
            eventually_or("the table has another size", async || {
                let (_, body) = agent.get("/v1/status").await.map_err(|error| error.to_string())?;
                let status: StatusView = serde_json::from_str(&body).map_err(|error| error.to_string())?;
                let flows = status.maps.iter().find(|map| map.name == "flows").map(|map| map.max);
                if flows == Some(20_000) { Ok(()) } else { Err(format!("{flows:?} {:?}", status.problems)) }
            })
            .await;
            lab.client().get("http://10.0.0.100/").await.unwrap();
            assert_eq!((agent.pid(), agent.process().exit_status()), (pid, None), "it was never killed");
            continue;
        }
        // Asked for more than fits, the agent does as it is told (where the limit is real it may not survive it), and says so.
        lab.node(1).set_config("bpf-ct-global-tcp-max", "500000").unwrap();
        eventually_or("what was asked for is said to be too much", async || {
            let (_, body) = agent.get("/v1/status").await.map_err(|error| error.to_string())?;
            let status: StatusView = serde_json::from_str(&body).map_err(|error| error.to_string())?;
            let said =
                |text: &String| text.contains("memory limit is 64 MiB") && text.contains("bpf-ct-global-tcp-max");
            if status.problems.iter().any(said) { Ok(()) } else { Err(format!("{:?}", status.problems)) }
        })
        .await;
        lab.client().get("http://10.0.0.100/").await.unwrap();
    }
}
