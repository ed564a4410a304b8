//! Where objects come from, where files are, and the devices that are served.

use super::{KeyDef, live, reattach};
use crate::config::value::Kind;

const SOURCE: &str = "Sources";
const PATHS: &str = "Files and directories";
const DEVICES: &str = "Devices and families";

pub(super) static KEYS: &[KeyDef] = &[
    live(
        SOURCE,
        "source",
        "kubernetes",
        Kind::Choice(|c| &mut c.source.kind),
        "Where objects come from: the Kubernetes API or a directory of YAML.",
    ),
    live(
        SOURCE,
        "manifests-dir",
        "",
        Kind::Path { optional: true, at: |c| &mut c.source.manifests_dir },
        "The directory that `source=manifests` reads and watches.",
    ),
    live(
        SOURCE,
        "lb-init-wait-timeout",
        "1m",
        Kind::Duration(|c| &mut c.services.init_wait),
        "How long to wait for the first complete lists before the state is reported as degraded; nothing is pruned before they are complete.",
    ),
    live(
        PATHS,
        "state-dir",
        "/var/run/kinesin",
        Kind::Path { optional: false, at: |c| &mut c.paths.state_dir },
        "Where the agent keeps its own files.",
    ),
    live(
        PATHS,
        "socket-path",
        "/var/run/kinesin/kinesin.sock",
        Kind::Path { optional: false, at: |c| &mut c.paths.socket },
        "The admin socket, which the command line talks to.",
    ),
    reattach(
        PATHS,
        "bpf-root",
        "/sys/fs/bpf",
        Kind::Path { optional: false, at: |c| &mut c.paths.bpf_root },
        "Where the BPF file system is mounted; pinned maps and links live in `kinesin/` under it.",
    ),
    reattach(
        PATHS,
        "cgroup-root",
        "",
        Kind::Path { optional: true, at: |c| &mut c.paths.cgroup_root },
        "The cgroup2 directory whose sockets are translated; empty uses the mount found in /proc/mounts.",
    ),
    reattach(
        DEVICES,
        "devices",
        "",
        Kind::Words(|c| &mut c.devices),
        "Devices that traffic from outside comes in on: names, `eth+` for a prefix, `!docker0` to exclude, first match wins; empty selects automatically.",
    ),
    live(DEVICES, "enable-ipv4", "true", Kind::Bool(|c| &mut c.families.ipv4), "Serve IPv4."),
    live(DEVICES, "enable-ipv6", "false", Kind::Bool(|c| &mut c.families.ipv6), "Serve IPv6."),
];
