//! Three agents in network namespaces against a real etcd and kube-apiserver, with the rights that are shipped, and a
//! client on their LAN that counts every loss.

#![allow(clippy::unwrap_used, reason = "a panic here is a failed test")]

#[path = "cluster/fixture.rs"]
mod fixture;
#[path = "cluster/guide.rs"]
mod guide;
#[path = "cluster/host_ports.rs"]
mod host_ports;
#[path = "cluster/outages.rs"]
mod outages;
#[path = "cluster/restarts.rs"]
mod restarts;
#[path = "cluster/traffic.rs"]
mod traffic;

mod support;
