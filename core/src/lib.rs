//! Kinesin's decisions, and nothing else.
//!
//! Everything here is synchronous and total: it takes inputs (and `now`, where time matters) and returns what should
//! happen. Deliberately absent: tokio, actors, sockets, files, the Kubernetes client, aya, the clock, randomness. Cargo
//! keeps it so: none of them is a dependency of this crate.

pub mod devices;
pub mod flows;
pub mod host_routing;
pub mod lb_ipam;
pub mod maglev;
pub mod node_ports;
pub mod objects;
pub mod ownership;
pub mod peers;
pub mod plan;
pub mod presence;
pub mod selector;
pub mod services;
pub mod sizing;
pub mod sockets;
pub mod trace;
