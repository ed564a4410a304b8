//! What is around the data path of Services, on the real agent in network namespaces: health checks that load balancers
//! outside ask for, host ports of pods, and what is told of Services: metrics, `kinesin services --wide`.

#![allow(clippy::unwrap_used, reason = "a panic here is a failed test")]

#[path = "service_edges/health.rs"]
mod health;
#[path = "service_edges/host_ports.rs"]
mod host_ports;
#[path = "service_edges/metrics.rs"]
mod metrics;
#[path = "service_edges/rig.rs"]
mod rig;
