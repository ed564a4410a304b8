//! Addresses for Services of type LoadBalancer, from pools.
//!
//! `status.loadBalancer.ingress` is the record: what Services already have is imported before anything is handed out, so
//! that a restart or a new leader changes nothing (R14). The outcome depends on the objects, not on the order in which
//! their events arrive: older pools and Services come first, names decide between equally old ones. A change costs work
//! in proportion to what it touches; searches are lookups in ordered maps, whatever the size of a pool.
//!
//! Deliberately absent: who is elected to do this, writing to the API, retrying failed writes (the writer keeps the
//! latest effect per object until it has landed), node addresses as LoadBalancer addresses (Node-IPAM).

mod allocate;
mod events;
mod pools;
mod range;
mod request;
mod status;
mod taken;

#[cfg(test)]
mod properties;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use smol_str::SmolStr;

use crate::objects::{Condition, ObjectKey, Pool, Service};
use pools::PoolTable;
pub use range::Count;
use request::Request;
pub use status::{
    CONDITION_INVALID_SPEC, CONDITION_IPS_AVAILABLE, CONDITION_IPS_TOTAL, CONDITION_IPS_USED, CONDITION_POOL_CONFLICT,
    CONDITION_SATISFIED,
};
use taken::TakenSet;

/// `spec.loadBalancerClass` of Services announced over BGP.
pub const CLASS_BGP: &str = "io.cilium/bgp-control-plane";
/// `spec.loadBalancerClass` of Services announced on the LAN.
pub const CLASS_L2: &str = "io.cilium/l2-announcer";

/// What Services are handled, and the cluster's families.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Services without `loadBalancerClass` are handled: `default-lb-service-ipam` is `lbipam`.
    pub handle_classless: bool,
    /// Values of `spec.loadBalancerClass` that are handled: [`CLASS_L2`], [`CLASS_BGP`], where those features are on.
    pub classes: Vec<SmolStr>,
    /// `enable-ipv4`
    pub ipv4: bool,
    /// `enable-ipv6`
    pub ipv6: bool,
}

impl Default for Config {
    /// Everything on.
    fn default() -> Self {
        let classes = vec![SmolStr::new_static(CLASS_L2), SmolStr::new_static(CLASS_BGP)];
        Self { handle_classless: true, classes, ipv4: true, ipv6: true }
    }
}

impl Config {
    fn handles(&self, class: Option<&str>) -> bool {
        class.map_or(self.handle_classless, |class| self.classes.iter().any(|known| known == class))
    }
}

/// What the allocator hears.
#[derive(Clone, Debug)]
pub enum Input {
    /// A pool as it is now.
    PoolUpserted(Arc<Pool>),
    /// A pool is gone.
    PoolRemoved(ObjectKey),
    /// A Service as it is now.
    ServiceUpserted(Arc<Service>),
    /// A Service is gone.
    ServiceRemoved(ObjectKey),
    /// Every address of every node: never handed out, and taken back from a Service that has one (R13).
    NodeAddresses(BTreeSet<IpAddr>),
    /// Both complete lists (and the nodes' addresses) have arrived. Nothing is decided before.
    Synced,
}

/// What should be written. An effect replaces earlier ones about the same object.
#[derive(Clone, Debug, PartialEq)]
pub enum Effect {
    /// A Service's status.
    ServiceStatus {
        /// The Service.
        key: ObjectKey,
        /// The whole of `status.loadBalancer.ingress`.
        ingress: Vec<IpAddr>,
        /// [`CONDITION_SATISFIED`] as it should be; `None` removes it. Other conditions stay.
        condition: Option<Condition>,
    },
    /// A pool's status.
    PoolStatus {
        /// The pool.
        name: SmolStr,
        /// Every condition of ours as it should be. Other conditions stay.
        conditions: Vec<Condition>,
    },
}

/// Numbers for metrics.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Stats {
    /// In order of preference.
    pub pools: Vec<PoolStats>,
    /// Services that are handled.
    pub services_matching: usize,
    /// Those of them that lack something they asked for.
    pub services_unsatisfied: usize,
}

/// A pool's part of [`Stats`].
#[derive(Clone, Debug, PartialEq)]
pub struct PoolStats {
    /// The pool.
    pub name: SmolStr,
    /// Addresses in its ranges.
    pub total: Count,
    /// Of these, taken or kept back.
    pub used: Count,
    /// The rest.
    pub available: Count,
    /// Overlaps an older pool, or itself.
    pub conflicting: bool,
}

/// Older Services come first; keys decide between equally old ones.
type Rank = (SmolStr, ObjectKey);

/// A Service whose status is ours to write: it is handled, or was and still says so.
#[derive(Debug)]
struct Entry {
    service: Arc<Service>,
    request: Request,
    held: Vec<IpAddr>,
    /// Addresses that it had when it stopped being ours.
    given_up: Vec<IpAddr>,
    condition: Option<Condition>,
    /// The effect that its next event should show.
    emitted: Option<(Vec<IpAddr>, Option<Condition>)>,
}

impl Entry {
    fn rank(&self) -> Rank {
        (self.service.metadata.creation_timestamp.clone(), self.request.key.clone())
    }
}

/// Whether an address lies in one of a pool's readable blocks.
pub fn contains(pool: &Pool, ip: IpAddr) -> bool {
    let ranges = pool.spec.blocks.iter().enumerate().filter_map(|(i, block)| range::parse_block(i, block).ok());
    ranges.into_iter().any(|range| range.span.contains(ip))
}

/// The allocator's state.
#[derive(Debug)]
pub struct Allocator {
    config: Config,
    synced: bool,
    pools: PoolTable,
    services: HashMap<ObjectKey, Entry>,
    /// Sorted keys of the Services that have the address.
    holders: BTreeMap<IpAddr, Vec<ObjectKey>>,
    node_addresses: BTreeSet<IpAddr>,
    /// Addresses that are held or belong to a node.
    taken: TakenSet,
    /// How many of each pool's addresses are taken.
    taken_in_pool: HashMap<SmolStr, u64>,
    /// Addresses held under a sharing key, with the number of holders.
    groups: HashMap<SmolStr, BTreeMap<IpAddr, usize>>,
    matching: usize,
    unsatisfied: BTreeSet<Rank>,
    emitted_pools: HashMap<SmolStr, Vec<Condition>>,
    // What this step has changed:
    bereft: BTreeSet<ObjectKey>,
    stirred: BTreeSet<IpAddr>,
    stirred_groups: BTreeSet<SmolStr>,
    dirty_services: BTreeSet<ObjectKey>,
    dirty_pools: BTreeSet<SmolStr>,
}

impl Allocator {
    /// Knows nothing yet.
    pub fn new(config: Config) -> Self {
        Self {
            config,
            synced: false,
            pools: PoolTable::default(),
            services: HashMap::new(),
            holders: BTreeMap::new(),
            node_addresses: BTreeSet::new(),
            taken: TakenSet::default(),
            taken_in_pool: HashMap::new(),
            groups: HashMap::new(),
            matching: 0,
            unsatisfied: BTreeSet::new(),
            emitted_pools: HashMap::new(),
            bereft: BTreeSet::new(),
            stirred: BTreeSet::new(),
            stirred_groups: BTreeSet::new(),
            dirty_services: BTreeSet::new(),
            dirty_pools: BTreeSet::new(),
        }
    }

    /// Takes one input and returns what should be written because of it: nothing where objects already say it.
    pub fn step(&mut self, input: Input) -> Vec<Effect> {
        match input {
            Input::PoolUpserted(pool) => self.pool_upserted(pool),
            Input::PoolRemoved(key) => self.pool_removed(&key.name),
            Input::ServiceUpserted(service) => self.service_upserted(service),
            Input::ServiceRemoved(key) => self.service_removed(&key),
            Input::NodeAddresses(addresses) => self.node_addresses_changed(addresses),
            Input::Synced if self.synced => {}
            Input::Synced => {
                self.synced = true;
                self.bootstrap();
            }
        }
        self.flush()
    }

    /// The pool that an address belongs to.
    pub fn pool_of(&self, ip: IpAddr) -> Option<&str> {
        self.pools.containing(ip).next().map(|pool| pool.name().as_str())
    }

    /// The Services that have an address, sorted.
    pub fn holders_of(&self, ip: IpAddr) -> &[ObjectKey] {
        self.holders.get(&ip).map_or(&[], Vec::as_slice)
    }

    /// What could not be used of a pool's spec, each naming the field and the fix.
    pub fn pool_problems(&self, name: &str) -> &[String] {
        self.pools.get(name).map_or(&[], |pool| &pool.problems)
    }

    /// What could not be used of a Service's requests.
    pub fn service_problems(&self, key: &ObjectKey) -> &[String] {
        self.services.get(key).map_or(&[], |entry| &entry.request.problems)
    }

    /// Numbers for metrics.
    pub fn stats(&self) -> Stats {
        let pools = self.pools.iter().map(|pool| {
            let (total, used) = self.counts(pool);
            let available = total.saturating_sub(used);
            PoolStats { name: pool.name().clone(), total, used, available, conflicting: pool.conflict.is_some() }
        });
        let active = self.is_active();
        Stats {
            pools: pools.collect(),
            services_matching: self.matching,
            services_unsatisfied: if active { self.unsatisfied.len() } else { 0 },
        }
    }

    /// Without a pool nothing is written: another controller may be at work (R18).
    fn is_active(&self) -> bool {
        self.synced && !self.pools.is_empty()
    }
}
