//! The lab and the network adapters, in real namespaces with real packets. No agent runs here.

#![allow(clippy::unwrap_used, reason = "a panic here is a failed test")]

#[path = "node/adapters.rs"]
mod adapters;
#[path = "node/agents.rs"]
mod agents;
#[path = "support/bpf.rs"]
mod bpf;
#[path = "node/lifetime.rs"]
mod lifetime;
#[path = "node/load.rs"]
mod load;
#[path = "node/objects.rs"]
mod objects;
#[path = "node/paths.rs"]
mod paths;
#[path = "support/snmp.rs"]
mod snmp;
#[path = "node/stack_users.rs"]
mod stack_users;

use std::time::Duration;

use kinesin::lab::{Lab, LabBuilder};

/// Longer than anything takes on a busy machine, short enough to wait for when something is broken.
const LIMIT: Duration = Duration::from_secs(20);

/// A lab that runs the binary under test.
fn lab(name: &str) -> LabBuilder {
    Lab::builder(name).binary(env!("CARGO_BIN_EXE_kinesin"))
}

/// Waits until a condition holds.
async fn eventually(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + LIMIT;
    while !condition().await {
        assert!(tokio::time::Instant::now() < deadline, "not within {LIMIT:?}: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
