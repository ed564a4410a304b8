//! The peer: the real kube-proxy of the control-plane program, in the namespace where the agent runs otherwise.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, ensure};
use kinesin::lab::Node;
use kinesin::net::proc::Process;

use crate::cluster::{Cluster, HEALTHZ, pause};

/// The modes, the default of new clusters first.
pub(crate) const MODES: [&str; 3] = ["nftables", "iptables", "ipvs"];
const METRICS: u16 = 10_249;
const NOT_LATER: Duration = Duration::from_secs(120);
/// Seconds since 1970 of the last time that the rules were as they should be.
const LAST_SYNC: &str = "kubeproxy_sync_proxy_rules_last_timestamp_seconds";

/// A running kube-proxy. What it wrote goes with [`KubeProxy::stop`].
pub(crate) struct KubeProxy<'a> {
    node: &'a Node,
    process: Process,
    begun: (Instant, SystemTime),
}

/// Why a mode cannot run on this machine.
pub(crate) fn missing(mode: &str) -> Option<String> {
    let tools: &[&str] = match mode {
        "nftables" => &["nft"],
        "iptables" => &["iptables", "iptables-save", "iptables-restore"],
        _ => &["ipset", "iptables-restore"],
    };
    let there = |tool: &&&str| {
        std::env::var_os("PATH").is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(tool).exists()))
    };
    if let Some(tool) = tools.iter().find(|tool| !there(tool)) {
        return Some(format!("there is no {tool} here (scripts/setup.sh bench installs it)"));
    }
    let ipvs = || std::path::Path::new("/proc/net/ip_vs").exists();
    (mode == "ipvs" && !ipvs()).then(|| "this kernel has no IPVS".to_owned())
}

impl<'a> KubeProxy<'a> {
    pub(crate) fn start(cluster: &'a Cluster, mode: &str) -> anyhow::Result<Self> {
        let program: PathBuf =
            std::env::var_os("KINESIN_CONTROLPLANE").context("KINESIN_CONTROLPLANE is not set")?.into();
        let node = cluster.node();
        let mut command = Command::new(program);
        command.arg("kube-proxy").env("HOME", node.dir());
        command.arg(format!("--kubeconfig={}", cluster.plane.kubeconfig().display()));
        command.arg(format!("--proxy-mode={mode}")).arg(format!("--hostname-override={}", node.name()));
        command.arg("--cluster-cidr=10.42.0.0/16");
        command.arg(format!("--healthz-bind-address=0.0.0.0:{HEALTHZ}"));
        command.arg(format!("--metrics-bind-address=127.0.0.1:{METRICS}"));
        // Limits that a namespace does not have of its own.
        command.args(["--conntrack-max-per-core=0", "--conntrack-min=0"]);
        command.args(["--conntrack-tcp-timeout-established=0s", "--conntrack-tcp-timeout-close-wait=0s"]);
        let begun = (Instant::now(), SystemTime::now());
        let _context = cluster.runtime.enter();
        Ok(Self { node, process: node.spawn(&format!("kube-proxy-{mode}"), command)?, begun })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Waits until the rules have been written at all; the time since the start of the process.
    pub(crate) fn wait_synced(&self) -> anyhow::Result<Duration> {
        self.wait_synced_after(self.begun.1)
    }

    /// Waits until the rules have been written after that moment, and says how long after.
    pub(crate) fn wait_synced_after(&self, moment: SystemTime) -> anyhow::Result<Duration> {
        let begun = Instant::now();
        loop {
            let last = self.node.netns().run(last_sync)?.unwrap_or_default();
            if let Ok(after) = (SystemTime::UNIX_EPOCH + last).duration_since(moment) {
                return Ok(after);
            }
            ensure!(begun.elapsed() < NOT_LATER, "kube-proxy does not write its rules");
            pause(Duration::from_millis(20));
        }
    }

    /// Ends it and removes every rule in its namespace.
    pub(crate) fn stop(self, cluster: &Cluster) -> anyhow::Result<()> {
        cluster.runtime.block_on(self.process.stop(Duration::from_secs(5)));
        self.node.netns().run(|| {
            // Both write through nf_tables here; either tool may be missing when its mode was not run.
            let _ = Command::new("nft").args(["flush", "ruleset"]).status();
            let _ = Command::new("conntrack").arg("-F").output();
        })?;
        Ok(())
    }
}

fn last_sync() -> anyhow::Result<Duration> {
    let mut stream =
        TcpStream::connect_timeout(&SocketAddr::from((Ipv4Addr::LOCALHOST, METRICS)), Duration::from_secs(1))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.write_all(b"GET /metrics HTTP/1.0\r\nHost: bench\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    let lines = text.lines().filter_map(|line| line.strip_prefix(LAST_SYNC));
    // Of each family; all services are of the first.
    let seconds = lines.filter(|line| !line.contains("IPv6")).find_map(|line| line.rsplit_once(' ')?.1.parse().ok());
    Ok(Duration::from_secs_f64(seconds.unwrap_or(0.0)))
}
