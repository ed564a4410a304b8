//! A client that asks each of a list of addresses once, all at the same time, and says what came of each: one JSON line
//! per question.
//!
//! A process of its own, because only processes inside a node's or pod's cgroup have their sockets translated.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use serde::{Deserialize, Serialize};
use tokio::net::{TcpSocket, UdpSocket};
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::lab::client::request;
use crate::lab::report::Backend;

/// A datagram that asks the pod who it is, instead of being echoed.
pub const WHO: &[u8] = b"?";

/// After how long a datagram is sent again: one may be lost where a neighbour is still being asked for.
const RESEND: Duration = Duration::from_millis(400);

/// Arguments of `kinesin lab-probe`.
#[derive(Debug, Clone, clap::Args)]
pub struct ProbeOptions {
    /// A file with one [`Probe`] per line, as JSON
    #[arg(long)]
    pub probes: PathBuf,
}

/// How to ask.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum How {
    /// An HTTP request.
    Tcp,
    /// A datagram of a connected socket.
    UdpConnected,
    /// A datagram by `sendto(2)`.
    UdpUnconnected,
}

/// A question.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Probe {
    /// Comes back with the answer.
    pub id: usize,
    /// The local port. Its own for each probe: a backend that sees two connections of one client with one port, one to
    /// itself and one to a service, could not tell them apart.
    pub port: u16,
    /// Whom to ask.
    pub to: SocketAddr,
    /// How.
    pub how: How,
    /// How long to wait, milliseconds.
    pub limit_ms: u64,
}

/// What came of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "outcome")]
pub enum Outcome {
    /// A pod answered.
    Answered {
        /// Its name.
        pod: String,
        /// The client, as the pod saw it.
        client: SocketAddr,
        /// The pod, as the client sees it: `getpeername(2)`, or the source of the datagram.
        peer: SocketAddr,
    },
    /// The system call was not permitted (EPERM).
    Denied,
    /// Refused: by a reset or an ICMP error.
    Refused,
    /// Nothing came in time.
    Silent,
    /// Anything else.
    Failed {
        /// The error's text.
        detail: String,
    },
}

/// An answer to a [`Probe`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Probed {
    /// Of the probe.
    pub id: usize,
    /// What came of it.
    #[serde(flatten)]
    pub outcome: Outcome,
}

/// Asks everything in the file and prints what comes of it.
///
/// # Errors
/// The file cannot be read, or standard output is gone.
pub async fn probe(options: ProbeOptions) -> anyhow::Result<()> {
    let text = std::fs::read_to_string(&options.probes).context("read the probes")?;
    let mut running = JoinSet::new();
    for line in text.lines() {
        let probe: Probe = serde_json::from_str(line).with_context(|| format!("read {line:?}"))?;
        running.spawn(async move { Probed { id: probe.id, outcome: one(probe).await } });
    }
    while let Some(done) = running.join_next().await {
        super::say(&done?)?;
    }
    Ok(())
}

async fn one(probe: Probe) -> Outcome {
    let limit = Duration::from_millis(probe.limit_ms);
    let work = async {
        match probe.how {
            How::Tcp => tcp(probe.port, probe.to).await,
            How::UdpConnected => udp(probe.port, probe.to, true).await,
            How::UdpUnconnected => udp(probe.port, probe.to, false).await,
        }
    };
    match timeout(limit, work).await {
        Err(_) => Outcome::Silent,
        Ok(Ok(outcome)) => outcome,
        Ok(Err(error)) => match error.raw_os_error() {
            Some(libc::EPERM) => Outcome::Denied,
            Some(libc::ECONNREFUSED) => Outcome::Refused,
            Some(libc::ETIMEDOUT) => Outcome::Silent,
            _ => Outcome::Failed { detail: error.to_string() },
        },
    }
}

/// Every address of the namespace, in the family of another one.
fn any(to: SocketAddr, port: u16) -> SocketAddr {
    let ip = if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    SocketAddr::new(ip, port)
}

async fn tcp(port: u16, to: SocketAddr) -> io::Result<Outcome> {
    let socket = if to.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    socket.bind(any(to, port))?;
    let stream = socket.connect(to).await?;
    let peer = stream.peer_addr()?;
    let answer = request(stream, to, "/").await.map_err(io::Error::other)?;
    Ok(match answer.backend {
        Some(backend) => answered(backend, peer),
        None => Outcome::Failed { detail: format!("status {}: {:?}", answer.status, answer.body) },
    })
}

async fn udp(port: u16, to: SocketAddr, connected: bool) -> io::Result<Outcome> {
    let socket = UdpSocket::bind(any(to, port)).await?;
    let mut bytes = [0; 512];
    if connected {
        socket.connect(to).await?;
    }
    loop {
        if connected {
            socket.send(WHO).await?
        } else {
            socket.send_to(WHO, to).await?
        };
        let Ok(received) = timeout(RESEND, socket.recv_from(&mut bytes)).await else { continue };
        let (length, from) = received?;
        let peer = if connected { socket.peer_addr()? } else { from };
        let text = String::from_utf8_lossy(&bytes[..length]);
        return Ok(match text.parse() {
            Ok(backend) => answered(backend, peer),
            Err(detail) => Outcome::Failed { detail },
        });
    }
}

fn answered(backend: Backend, peer: SocketAddr) -> Outcome {
    Outcome::Answered { pod: backend.pod, client: backend.client, peer }
}
