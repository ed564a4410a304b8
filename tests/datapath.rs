//! The data path in the kernel: packet bytes in, verdict and bytes out, through the real verifier; hooks, pins and
//! sockets for real. Each test has network and mount namespaces of its own, which vanish with its thread. Needs root
//! and iproute2.
// A test fails by panicking.
#![allow(clippy::unwrap_used)]

#[path = "support/bpf.rs"]
mod bpf;
#[path = "support/snmp.rs"]
mod snmp;

#[path = "datapath/affinity.rs"]
mod affinity;
#[path = "datapath/arp.rs"]
mod arp;
#[path = "datapath/binds.rs"]
mod binds;
#[path = "datapath/conntrack.rs"]
mod conntrack;
#[path = "datapath/deliver.rs"]
mod deliver;
#[path = "datapath/depart.rs"]
mod depart;
#[path = "datapath/dispatch.rs"]
mod dispatch;
#[path = "datapath/flows.rs"]
mod flows;
#[path = "datapath/foreign.rs"]
mod foreign;
#[path = "datapath/fragments.rs"]
mod fragments;
#[path = "datapath/hooks.rs"]
mod hooks;
#[path = "datapath/icmp.rs"]
mod icmp;
#[path = "datapath/ipv6.rs"]
mod ipv6;
#[path = "datapath/local.rs"]
mod local;
#[path = "datapath/maps.rs"]
mod maps;
#[path = "datapath/ndp.rs"]
mod ndp;
#[path = "datapath/odd.rs"]
mod odd;
#[path = "datapath/option.rs"]
mod option;
#[path = "datapath/packets.rs"]
mod packets;
#[path = "datapath/packets6.rs"]
mod packets6;
#[path = "datapath/pressure.rs"]
mod pressure;
#[path = "datapath/programs.rs"]
mod programs;
#[path = "datapath/ranges.rs"]
mod ranges;
#[path = "datapath/reaper.rs"]
mod reaper;
#[path = "datapath/refusals.rs"]
mod refusals;
#[path = "datapath/rig.rs"]
mod rig;
#[path = "datapath/sctp.rs"]
mod sctp;
#[path = "datapath/services.rs"]
mod services;
#[path = "datapath/sockets.rs"]
mod sockets;
#[path = "datapath/sockets6.rs"]
mod sockets6;
#[path = "datapath/stale.rs"]
mod stale;
#[path = "datapath/trace.rs"]
mod trace;
#[path = "datapath/traffic.rs"]
mod traffic;
#[path = "datapath/traffic6.rs"]
mod traffic6;
#[path = "datapath/wrap.rs"]
mod wrap;
#[path = "datapath/xdp.rs"]
mod xdp;
#[path = "datapath/xdp_hooks.rs"]
mod xdp_hooks;
