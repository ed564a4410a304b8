//! Follows the kinds of which there are few: nodes, pools, announcement policies, leases, this node's pods with host ports.
//!
//! owns: one table each
//! hears: the source's stream of its kind
//! says: changed keys to the table's subscribers
//! restart story: re-lists from the source; the rows stay until the new list is complete
//!
//! Deliberately absent: any interpretation of the objects.

use kinesin_core::objects::{L2Policy, Lease, Node, Pod, Pool};

use super::feed::Watcher;

/// Nodes: labels, addresses, zones.
pub type NodeWatcher = Watcher<Node>;
/// Pods of this node that have host ports.
pub type PodWatcher = Watcher<Pod>;
/// Pools of addresses.
pub type PoolWatcher = Watcher<Pool>;
/// Announcement policies.
pub type PolicyWatcher = Watcher<L2Policy>;
/// Leases: leadership and presence.
pub type LeaseWatcher = Watcher<Lease>;
