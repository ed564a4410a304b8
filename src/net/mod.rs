//! The kernel's networking seen from user space: netlink, raw sockets, network namespaces, child processes.
//!
//! Everything here is an adapter: it reads or changes kernel state and decides nothing. BPF is not here (see
//! `crate::datapath`), and neither is anything that survives the process.

pub mod arp;
pub mod cgroup;
pub mod garp;
pub mod groups;
pub mod links;
pub mod local_ports;
pub mod na;
pub mod netfilter;
mod netlink;
pub mod netns;
pub mod proc;
pub mod qdiscs;
mod route;
pub mod rtnl;
pub mod sock_diag;
pub mod sysctl;

use std::io;

pub use garp::GarpSender;
pub use links::{LinkMonitor, Snapshot};
pub use netns::Netns;
pub use rtnl::Rtnl;

/// What went wrong between us and the kernel's network stack.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// A system call failed.
    #[error("{what}")]
    Io {
        /// The attempted action and its object.
        what: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The kernel refused a netlink request.
    #[error("{what}")]
    Netlink {
        /// The attempted action and its object.
        what: String,
        /// The kernel's answer.
        #[source]
        source: rtnetlink::Error,
    },
    /// Something that was asked for by name is not there.
    #[error("{0}")]
    NotFound(String),
    /// A name or value that can not work.
    #[error("{0}")]
    Invalid(String),
}

impl NetError {
    /// Wraps the last failed system call with what it was for.
    pub fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }

    /// Wraps a refused netlink request with what it was for.
    pub fn netlink(what: impl Into<String>) -> impl FnOnce(rtnetlink::Error) -> Self {
        let what = what.into();
        move |source| Self::Netlink { what, source }
    }

    /// Whether the object exists already, which idempotent callers take for success.
    pub fn is_exists(&self) -> bool {
        match self {
            Self::Io { source, .. } => source.kind() == io::ErrorKind::AlreadyExists,
            Self::Netlink { source: rtnetlink::Error::NetlinkError(e), .. } => e.raw_code() == -libc::EEXIST,
            _ => false,
        }
    }
}
