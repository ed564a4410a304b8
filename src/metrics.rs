//! The metrics recorder: installed once, rendered at each scrape.
//!
//! Names that exist in Cilium keep their name; the agent's own begin with `kinesin_`. Labels are closed sets: never an
//! address or the name of a pod.

use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};

/// From ten microseconds, a handler's usual time, to ten seconds.
const SECONDS: [f64; 13] = [1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0];

/// What the figures of the process begin with: nothing, as everywhere, and what Cilium's dashboards ask for.
const PREFIXES: [&str; 2] = ["", "cilium_"];

/// Installs the recorder of this process and keeps it from growing between scrapes.
///
/// # Errors
/// When there is one already.
pub fn install() -> Result<PrometheusHandle, BuildError> {
    let builder = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".into()), &SECONDS)?
        .set_buckets_for_metric(Matcher::Full("cilium_service_implementation_delay".into()), &SECONDS)?;
    let handle = builder.install_recorder()?;
    let upkeep = handle.clone();
    tokio::spawn(async move {
        let mut every = tokio::time::interval(std::time::Duration::from_secs(5));
        loop {
            every.tick().await;
            upkeep.run_upkeep();
        }
    });
    for prefix in PREFIXES {
        metrics_process::Collector::new(prefix).describe();
    }
    Ok(handle)
}

/// The text of a scrape.
pub fn render(handle: &PrometheusHandle) -> String {
    for prefix in PREFIXES {
        metrics_process::Collector::new(prefix).collect();
    }
    handle.render()
}
