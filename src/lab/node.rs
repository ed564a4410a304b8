//! A node and its pods: namespaces, addresses, processes, and what can be done to them.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use ipnet::{Ipv4Net, Ipv6Net};
use tokio::time::Instant;

use super::builder::Segment;
use super::client::{GET_LIMIT, LoadHandle, Response, get_from};
use super::programs::ClientOptions;
use super::{ECHO_PORT, HTTP_PORT, LabError};
use crate::net::proc::Process;
use crate::net::{Netns, Rtnl, cgroup};

/// A node of the lab. Cheap to clone; clones are the same node.
#[derive(Debug, Clone)]
pub struct Node {
    pub(super) inner: Arc<NodeInner>,
}

#[derive(Debug)]
pub(super) struct NodeInner {
    pub(super) number: usize,
    pub(super) name: String,
    pub(super) address: Ipv4Addr,
    pub(super) segment: Segment,
    pub(super) pod_cidr: Ipv4Net,
    pub(super) netns: Netns,
    pub(super) lan: Netns,
    pub(super) cgroup: PathBuf,
    pub(super) dir: PathBuf,
    pub(super) lab_dir: PathBuf,
    pub(super) binary: PathBuf,
    pub(super) pods: Mutex<Vec<Pod>>,
    pub(super) dual_stack: bool,
}

impl Node {
    /// From 1.
    pub fn number(&self) -> usize {
        self.inner.number
    }

    /// `node-1`, also the Kubernetes name.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// Its address on its segment.
    pub fn address(&self) -> Ipv4Addr {
        self.inner.address
    }

    /// Its IPv6 address on the LAN, `fd00:10::11` and up, where the lab has such.
    pub fn address6(&self) -> Option<Ipv6Addr> {
        self.inner.dual_stack.then(|| self.inner.segment.address6(0x10 + self.number() as u16))
    }

    /// The IPv6 addresses of its pods, where the lab has such.
    pub fn pod_cidr6(&self) -> Option<Ipv6Net> {
        let number = self.number() as u16;
        self.inner.dual_stack.then(|| Ipv6Net::new_assert(Ipv6Addr::new(0xfd00, 0x42, number, 0, 0, 0, 0, 0), 64))
    }

    /// The addresses of its pods.
    pub fn pod_cidr(&self) -> Ipv4Net {
        self.inner.pod_cidr
    }

    /// Its network namespace.
    pub fn netns(&self) -> &Netns {
        &self.inner.netns
    }

    /// Its cgroup2 directory; its pods are in directories below. An agent takes it for the whole hierarchy.
    pub fn cgroup(&self) -> &Path {
        &self.inner.cgroup
    }

    /// Its own BPF file system.
    pub fn bpf_root(&self) -> PathBuf {
        self.inner.dir.join("bpf")
    }

    /// Its files: `bpf/`, `config/`, `state/`, `agent.sock`.
    pub fn dir(&self) -> &Path {
        &self.inner.dir
    }

    /// The lab's directory, common to all nodes.
    pub fn lab_dir(&self) -> &Path {
        &self.inner.lab_dir
    }

    /// A log file of this node.
    pub fn log(&self, of: &str) -> PathBuf {
        self.inner.lab_dir.join("logs").join(format!("{}-{of}.log", self.name()))
    }

    /// A pod by its number from 1.
    ///
    /// # Panics
    /// When there is no such pod.
    pub fn pod(&self, number: usize) -> Pod {
        let pods = self.pods();
        let found = number.checked_sub(1).and_then(|i| pods.get(i)).cloned();
        found.unwrap_or_else(|| panic!("no pod {number} on {}: it has {}", self.name(), pods.len()))
    }

    /// Its pods, in order.
    pub fn pods(&self) -> Vec<Pod> {
        self.inner.pods.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Runs a program on the node: in its namespace and cgroup, output in a log named after `name`. It dies with the
    /// handle.
    ///
    /// # Errors
    /// When it can not be started.
    pub fn spawn(&self, name: &str, command: Command) -> Result<Process, LabError> {
        let full = format!("{name} on {}", self.name());
        let prepared = Process::command(full, command).netns(self.netns()).cgroup(self.cgroup()).log(&self.log(name));
        Ok(prepared.start()?)
    }

    /// One HTTP request from the node itself, at most five seconds.
    ///
    /// # Errors
    /// When there is no complete answer.
    pub async fn get(&self, url: &str) -> Result<Response, LabError> {
        get_from(self.netns(), url, GET_LIMIT).await
    }

    /// Starts the load program on the node itself.
    ///
    /// # Errors
    /// When it can not be started.
    pub fn load(&self, options: &ClientOptions) -> Result<LoadHandle, LabError> {
        LoadHandle::start(&self.inner.binary, self.netns(), self.cgroup(), &self.log("load"), options)
    }

    /// Pulls the cable: the node sees its carrier go, the LAN no longer sees the node.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub async fn cut_link(&self) -> Result<(), LabError> {
        let lan = Rtnl::open_in(&self.inner.lan)?;
        let port = lan.device(self.name()).await?;
        Ok(lan.set_down(port.ifindex).await?)
    }

    /// Puts the cable back.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub async fn restore_link(&self) -> Result<(), LabError> {
        let lan = Rtnl::open_in(&self.inner.lan)?;
        let port = lan.device(self.name()).await?;
        Ok(lan.set_up(port.ifindex).await?)
    }

    /// Cuts the power: first the cable, so that no dying socket says good-bye, then every process of the node and its pods.
    /// Kernel state (pinned programs, routes) stays, but nothing reaches it; [`Self::restore_link`] is not a reboot.
    ///
    /// # Errors
    /// When the kernel refuses, or a process does not die.
    pub async fn power_off(&self) -> Result<(), LabError> {
        self.cut_link().await?;
        Ok(cgroup::kill_all(self.cgroup())?)
    }

    /// The MAC of its `eth0`.
    ///
    /// # Errors
    /// When the interface is gone.
    pub async fn mac(&self) -> Result<[u8; 6], LabError> {
        let eth0 = Rtnl::open_in(self.netns())?.device("eth0").await?;
        Ok(eth0.mac.expect("invariant: a veth has a MAC"))
    }
}

/// A pod of the lab. Cheap to clone; clones are the same pod.
#[derive(Debug, Clone)]
pub struct Pod {
    pub(super) inner: Arc<PodInner>,
}

#[derive(Debug)]
pub(super) struct PodInner {
    pub(super) name: String,
    pub(super) node: String,
    pub(super) address: Ipv4Addr,
    pub(super) netns: Netns,
    pub(super) cgroup: PathBuf,
    pub(super) log: PathBuf,
    pub(super) binary: PathBuf,
    pub(super) server: Mutex<Option<Process>>,
}

impl Pod {
    /// `pod-1-2` is the second of node-1.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// The name of its node.
    pub fn node(&self) -> &str {
        &self.inner.node
    }

    /// `10.42.<node>.<pod>`
    pub fn address(&self) -> Ipv4Addr {
        self.inner.address
    }

    /// Its network namespace.
    pub fn netns(&self) -> &Netns {
        &self.inner.netns
    }

    /// Its cgroup, below its node's.
    pub fn cgroup(&self) -> &Path {
        &self.inner.cgroup
    }

    /// Runs a program in the pod; it dies with the handle.
    ///
    /// # Errors
    /// When it can not be started.
    pub fn spawn(&self, name: &str, command: Command) -> Result<Process, LabError> {
        let full = format!("{name} in {}", self.name());
        let prepared = Process::command(full, command).netns(self.netns()).cgroup(self.cgroup()).log(&self.inner.log);
        Ok(prepared.start()?)
    }

    /// One HTTP request from the pod, at most five seconds.
    ///
    /// # Errors
    /// When there is no complete answer.
    pub async fn get(&self, url: &str) -> Result<Response, LabError> {
        get_from(self.netns(), url, GET_LIMIT).await
    }

    /// Starts the load program in the pod.
    ///
    /// # Errors
    /// When it can not be started.
    pub fn load(&self, options: &ClientOptions) -> Result<LoadHandle, LabError> {
        LoadHandle::start(&self.inner.binary, self.netns(), self.cgroup(), &self.inner.log, options)
    }

    /// Starts the server (HTTP on [`HTTP_PORT`], echo on [`ECHO_PORT`]) and returns when it answers. A running one is
    /// replaced.
    ///
    /// # Errors
    /// When it does not answer within ten seconds; the error has its last words.
    pub async fn serve(&self) -> Result<(), LabError> {
        self.stop();
        let mut command = Command::new(&self.inner.binary);
        command.arg(super::programs::SERVE).args(["--pod", self.name(), "--node", self.node()]);
        command.args(["--http-port", &HTTP_PORT.to_string(), "--echo-port", &ECHO_PORT.to_string()]);
        let server = self.spawn("server", command)?;
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, ECHO_PORT));
        let deadline = Instant::now() + Duration::from_secs(10);
        // The echo port opens last.
        while super::client::connect(self.netns(), address, Duration::from_secs(1)).await.is_err() {
            if server.exit_status().is_some() || Instant::now() > deadline {
                return Err(LabError::Program(format!("the pod does not answer: {}", server.report())));
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        *self.inner.server.lock().unwrap_or_else(PoisonError::into_inner) = Some(server);
        Ok(())
    }

    /// Kills the server, if it runs. Its connections are reset by the pod's kernel.
    pub fn stop(&self) {
        drop(self.inner.server.lock().unwrap_or_else(PoisonError::into_inner).take());
    }
}
