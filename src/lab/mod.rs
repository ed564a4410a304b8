//! A cluster's network on one machine: nodes, pods and a LAN client in network namespaces of their own.
//!
//! ```text
//!                 LAN 10.0.0.0/24: a bridge in a namespace of its own, 10.0.0.1 is the home router
//!      ┌──────────────┬──────────────┬──────────────┬───────────────────┐
//!   node-1 .11     node-2 .12     node-3 .13      client .50            …
//!   pods 10.42.1.x pods 10.42.2.x pods 10.42.3.x
//! ```
//!
//! `kinesin lab` and every test of nodes are made of this. Nothing touches the host's own namespace; everything carries
//! the lab's id, disappears with the [`Lab`] (also after a panic), and what a killed run left behind is removed by
//! the next lab of the same name. With [`LabBuilder::segments`] there are several LANs, 10.0.0.0/24, 10.0.1.0/24 and so on,
//! with the router between them. IPv6 addresses are there when they are asked for: see [`LabBuilder::dual_stack`]. Deliberately
//! absent: a container runtime and a CNI plugin.

mod agent;
mod builder;
mod client;
mod command;
mod node;
mod territory;
mod view;
mod wire;

pub mod manifests;
pub mod programs;
pub mod report;

pub use agent::{AgentHandle, AgentOptions};
pub use builder::LabBuilder;
pub use client::{Client, LoadHandle, Response, get_from};
pub use command::{LabOptions, run, run_to_end};
pub use node::{Node, Pod};
pub use territory::BASE_DIR;

use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};

use crate::net::{NetError, Netns};
use territory::Territory;

/// Where pods serve HTTP.
pub const HTTP_PORT: u16 = 8080;
/// Where pods echo TCP streams and UDP datagrams.
pub const ECHO_PORT: u16 = 7777;
/// The client's address on the LAN.
pub const CLIENT_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 50);
/// The router's address on the LAN. It answers ARP, and forwards where the lab has several segments.
pub const ROUTER_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
/// The client's IPv6 address on the LAN, where there is one.
pub const CLIENT_ADDRESS6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x10, 0, 0, 0, 0, 0, 0x50);
/// Nodes are 10.0.0.11 and up, below the client.
pub const MAX_NODES: usize = 39;

/// What a lab could not do.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// The kernel's network stack refused something.
    #[error(transparent)]
    Net(#[from] NetError),
    /// A file or directory of the lab.
    #[error("{what}")]
    Io {
        /// The attempted action and its object.
        what: String,
        /// The kernel's answer.
        #[source]
        source: std::io::Error,
    },
    /// A program of the lab did not do what it was started for; the text ends with its last lines.
    #[error("{0}")]
    Program(String),
    /// An impossible request.
    #[error("{0}")]
    Invalid(String),
}

impl LabError {
    pub(crate) fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }
}

/// A running lab. Dropping it kills its processes and removes its mounts, namespaces, cgroups and files.
#[derive(Debug)]
pub struct Lab {
    // Fields drop in order: handles first, what they stand on last.
    client: Client,
    nodes: Vec<Node>,
    lan: Netns,
    binary: PathBuf,
    dual_stack: bool,
    segments: u8,
    /// What makes its cables wires, where it has such.
    wires: Option<Vec<wire::Wire>>,
    territory: Territory,
}

impl Lab {
    /// Starts describing a lab; `name` is lower-case letters, digits and `-`. Labs of the same name may run side by
    /// side, also in different processes.
    pub fn builder(name: &str) -> LabBuilder {
        LabBuilder::new(name)
    }

    /// The id that namespaces, cgroups and the directory carry: the name and something unique.
    pub fn id(&self) -> &str {
        self.territory.id()
    }

    /// The lab's directory: state, sockets, logs, manifests. Gone when the lab is.
    pub fn dir(&self) -> &Path {
        self.territory.dir()
    }

    /// Where agents with `source=manifests` read from.
    pub fn manifests_dir(&self) -> PathBuf {
        self.dir().join("manifests")
    }

    /// The state directory that agents with `source=manifests` share: status, leases.
    pub fn state_dir(&self) -> PathBuf {
        self.dir().join("state")
    }

    /// The node of that number; the first is 1, like its name `node-1` and its address 10.0.0.11.
    ///
    /// # Panics
    /// When there is no such node.
    pub fn node(&self, number: usize) -> &Node {
        let found = number.checked_sub(1).and_then(|i| self.nodes.get(i));
        found.unwrap_or_else(|| panic!("no node {number}: this lab has nodes 1 to {}", self.nodes.len()))
    }

    /// All nodes, in order.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// A pod by the numbers of its node and itself, both from 1.
    ///
    /// # Panics
    /// When there is no such pod.
    pub fn pod(&self, node: usize, number: usize) -> Pod {
        self.node(node).pod(number)
    }

    /// All pods, by node.
    pub fn pods(&self) -> Vec<Pod> {
        self.nodes.iter().flat_map(Node::pods).collect()
    }

    /// The host on the LAN that is no node.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// The namespace of the bridge.
    pub fn lan(&self) -> &Netns {
        &self.lan
    }

    /// The `kinesin` binary that agents, pods and clients run.
    pub fn binary(&self) -> &Path {
        &self.binary
    }
}
