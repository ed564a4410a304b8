//! R56: no window for batching. A change that comes alone is in the kernel's maps at once; of a burst, the writer takes
//! together what has come while it wrote.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use kinesin::datapath::MapStore;
use kinesin_core::objects::{EndpointSlice, Object};
use serde_json::json;

use crate::agent::Agent;
use crate::feed::{Feed, SourceKind};
use crate::shared::RUNTIME;

const CHANGES: u16 = 40;
const BURST: u16 = 1000;
/// The incumbent's window is 300 ms, whatever the load; a machine with ten things to do besides takes a few.
const AT_ONCE: Duration = Duration::from_millis(100);

/// A slice whose only pod listens on this port.
fn slice(port: u16) -> EndpointSlice {
    let object = json!({
        "metadata": {"name": "web-1", "namespace": "default", "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4", "ports": [{"port": port}], "endpoints": [{"addresses": ["10.42.1.5"], "nodeName": "here"}],
    });
    serde_json::from_value(object).unwrap()
}

async fn changes() -> Result<()> {
    let mut feed = Feed::new(SourceKind::Manifests).await?;
    let mut agent = Agent::start(feed.source.clone()).await?;
    let service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"},
        "spec": {"type": "NodePort", "clusterIP": "10.96.0.10", "ports": [{"port": 80, "nodePort": 30080}]},
    });
    agent.write(&mut feed, &[service], &[]).await?;
    let arrived = |agent: &Agent, port: u16| {
        let backends = agent.kernel.maps().read().map(|actual| actual.backends).unwrap_or_default();
        backends.iter().any(|(_, backend)| backend.port.get() == port)
    };

    let mut took = Vec::new();
    for port in 1000..1000 + CHANGES {
        let slice = slice(port);
        let begun = Instant::now();
        // As the watcher does when the event comes.
        agent.world.slices.put(slice.key(), slice);
        agent.until("a change", || arrived(&agent, port)).await?;
        took.push(begun.elapsed());
    }
    took.sort_unstable();
    let median = took[took.len() / 2];
    ensure!(median < AT_ONCE, "a single change takes {median:?} in the median: {took:?}");

    let slices: Vec<_> = (2000..2000 + BURST).map(slice).collect();
    let before = agent.syncs();
    for slice in slices {
        agent.world.slices.put(slice.key(), slice);
    }
    agent.until("the last of the burst", || arrived(&agent, 2000 + BURST - 1)).await?;
    let syncs = agent.syncs() - before;
    ensure!(syncs < u64::from(BURST) / 2, "{BURST} changes in a burst were written in {syncs} parts");
    let failures = agent.failures();
    ensure!(failures.is_empty(), "actors failed: {failures:#?}");
    agent.stop().await
}

pub fn r56_a_single_change_goes_at_once_and_a_burst_in_batches() -> Result<()> {
    RUNTIME.block_on(changes())
}
