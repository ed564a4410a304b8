//! The agent's actors: one file each, with the same four header lines (owns, hears, says, restart story).
//!
//! They share levels ([`crate::world::World`]) and wake each other; none holds state that its restart story cannot
//! rebuild. `app` alone knows all of them.

pub mod arp_responder;
pub mod config_watcher;
pub mod endpoint_syncer;
pub mod endpoint_watcher;
pub mod feed;
pub mod flow_collector;
pub mod health;
pub mod lb_ipam;
pub mod leader_elector;
pub mod link_watcher;
pub mod loader;
pub mod map_writer;
pub mod membership;
pub mod object_watcher;
pub mod peer_watcher;
pub mod service_health;
pub mod service_watcher;
pub mod socket_reaper;
pub mod stack_watcher;
pub mod status_writer;
pub mod vip_owner;
