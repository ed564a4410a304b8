//! What the lab's programs say, as types: tests and the live table read the same lines that the programs write.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A pod's answer: `pod=pod-1-1 node=node-1 client=10.0.0.11:40000`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backend {
    /// The pod's name.
    pub pod: String,
    /// Its node's name.
    pub node: String,
    /// Who asked, as the pod saw it.
    pub client: SocketAddr,
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pod={} node={} client={}", self.pod, self.node, self.client)
    }
}

impl FromStr for Backend {
    type Err = String;

    fn from_str(line: &str) -> Result<Self, String> {
        let mut fields = line.split_whitespace();
        let mut next = |key: &str| {
            let value = fields.next().and_then(|field| field.strip_prefix(key)?.strip_prefix('='));
            value.ok_or_else(|| format!("no {key}= in {line:?}"))
        };
        let (pod, node, client) = (next("pod")?, next("node")?, next("client")?);
        let client = client.parse().map_err(|_| format!("client={client} is no address with port"))?;
        Ok(Self { pod: pod.into(), node: node.into(), client })
    }
}

/// Why a request failed. Every failure has exactly one reason.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reason {
    /// No handshake in time.
    ConnectTimeout,
    /// The address answered with a reset.
    Refused,
    /// ICMP said so, or nobody answers ARP.
    Unreachable,
    /// The connection was there, the answer was not in time.
    AnswerTimeout,
    /// The connection ended before the answer did.
    Broken,
    /// An answer, but not a pod's: a wrong status or body.
    WrongAnswer,
    /// Anything else, for example no free local port.
    Other,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ConnectTimeout => "connect-timeout",
            Self::Refused => "refused",
            Self::Unreachable => "unreachable",
            Self::AnswerTimeout => "answer-timeout",
            Self::Broken => "broken",
            Self::WrongAnswer => "wrong-answer",
            Self::Other => "other",
        })
    }
}

/// One line of the load client's output.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum LoadEvent {
    /// A request failed.
    Failed {
        /// Milliseconds since the start.
        at_ms: u64,
        /// Why.
        reason: Reason,
        /// The error's text.
        detail: String,
    },
    /// A long-lived connection that had worked does not any more. It is replaced by a new one.
    HeldBroken {
        /// Milliseconds since the start.
        at_ms: u64,
        /// Which of them, from 0.
        connection: u32,
        /// How many echoes it had given.
        echoes: u64,
        /// The error's text.
        detail: String,
    },
    /// Everything so far; once per report interval.
    Tick(Totals),
    /// Everything; the last line.
    Summary(Totals),
}

/// Counts since the start. `attempted == succeeded + failed + in_flight` always holds, and in the summary nothing is in
/// flight.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Totals {
    /// Milliseconds since the start.
    pub elapsed_ms: u64,
    /// Requests started, each on a connection of its own.
    pub attempted: u64,
    /// Requests that a pod answered.
    pub succeeded: u64,
    /// Requests that ended in any other way.
    pub failed: u64,
    /// Requests not ended yet.
    pub in_flight: u64,
    /// Successes by pod; they add up to `succeeded`.
    pub backends: BTreeMap<String, u64>,
    /// Successes by the pod's node.
    pub nodes: BTreeMap<String, u64>,
    /// Failures by reason; they add up to `failed`.
    pub failures: BTreeMap<Reason, u64>,
    /// Milliseconds from the start to the first success.
    pub first_success_ms: Option<u64>,
    /// The longest time between two successive successes, the time since the last one included, in ms. Never below
    /// the pause between requests; `elapsed_ms` while there was no success.
    pub longest_gap_ms: u64,
    /// Long-lived connections, zero when none were asked for.
    pub held: Held,
}

/// Counts of the long-lived connections.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Held {
    /// How many should be open.
    pub wanted: u64,
    /// How many are open and have echoed at least once.
    pub open: u64,
    /// How many were ever opened: `open + broken`.
    pub opened: u64,
    /// How many broke after they had worked.
    pub broken: u64,
    /// Attempts to open one that failed.
    pub open_failures: u64,
    /// Echoes received by all of them.
    pub echoes: u64,
    /// The longest time that an echo took, in ms, pending ones included.
    pub longest_stall_ms: u64,
}
