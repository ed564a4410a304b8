//! What is written into objects: conditions with the reasons and texts that tools look for, and when to write them.

use std::collections::BTreeSet;
use std::net::IpAddr;

use smol_str::SmolStr;

use super::pools::PoolState;
use super::range::{Count, parse_ip};
use super::{Allocator, Effect, Entry};
use crate::objects::{Condition, ObjectKey};

/// Condition of a Service: has what it asked for.
pub const CONDITION_SATISFIED: &str = "cilium.io/IPAMRequestSatisfied";
/// Condition of a pool: overlaps an older pool, or itself.
pub const CONDITION_POOL_CONFLICT: &str = "cilium.io/PoolConflict";
/// Condition of a pool whose message is the number of its addresses.
pub const CONDITION_IPS_TOTAL: &str = "cilium.io/IPsTotal";
/// Condition of a pool whose message is the number of its free addresses.
pub const CONDITION_IPS_AVAILABLE: &str = "cilium.io/IPsAvailable";
/// Condition of a pool whose message is the number of its taken addresses.
pub const CONDITION_IPS_USED: &str = "cilium.io/IPsUsed";
/// Condition of a pool: parts of its spec are left out.
pub const CONDITION_INVALID_SPEC: &str = "kinesin.io/InvalidSpec";

/// Why a Service lacks something.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    reason: &'static str,
    message: String,
}

impl Refusal {
    fn new(reason: &'static str, message: impl Into<String>) -> Self {
        Self { reason, message: message.into() }
    }

    pub(super) fn no_pool() -> Self {
        Self::new("no_pool", "There are no enabled CiliumLoadBalancerIPPools that match this service")
    }

    pub(super) fn out_of_ips() -> Self {
        Self::new(
            "out_of_ips",
            "All enabled CiliumLoadBalancerIPPools that match this service ran out of allocatable IPs",
        )
    }

    pub(super) fn no_pool_containing(ip: IpAddr) -> Self {
        Self::new("no_pool", format!("No pool exists with a CIDR containing '{ip}'"))
    }

    pub(super) fn selector_mismatch(ip: IpAddr) -> Self {
        Self::new("pool_selector_mismatch", format!("The pool that contains '{ip}' does not select this service"))
    }

    pub(super) fn already_allocated(ip: IpAddr, other: &ObjectKey) -> Self {
        Self::new("already_allocated", format!("'{ip}' is already allocated to another service, '{other}'"))
    }

    pub(super) fn incompatible(ip: IpAddr, other: &ObjectKey, why: &str) -> Self {
        Self::new(
            "already_allocated_incompatible_service",
            format!("'{ip}' is already allocated to another service, '{other}', that is not compatible. Reason: {why}"),
        )
    }

    pub(super) fn node_address(ip: IpAddr) -> Self {
        Self::new("already_allocated", format!("'{ip}' is the address of a node"))
    }

    pub(super) fn reserved_end(ip: IpAddr) -> Self {
        Self::new(
            "already_allocated",
            format!(
                "'{ip}' is the first or last address of its CIDR, which the pool keeps back (allowFirstLastIPs: No)"
            ),
        )
    }
}

fn condition(kind: &str, status: &str, reason: &str, message: String, generation: i64) -> Condition {
    Condition {
        kind: kind.into(),
        status: status.into(),
        reason: reason.into(),
        message,
        observed_generation: (generation != 0).then_some(generation),
        last_transition_time: String::new(),
    }
}

/// A Service's condition.
pub(super) fn satisfied(outcome: Result<(), Refusal>, generation: i64) -> Condition {
    match outcome {
        Ok(()) => condition(CONDITION_SATISFIED, "True", "satisfied", String::new(), generation),
        Err(refusal) => condition(CONDITION_SATISFIED, "False", refusal.reason, refusal.message, generation),
    }
}

/// Equal in what matters: times and generations alone are not worth a write.
fn says_the_same(a: &Condition, b: &Condition) -> bool {
    (&a.kind, &a.status, &a.reason, &a.message) == (&b.kind, &b.status, &b.reason, &b.message)
}

impl Allocator {
    /// Total and taken addresses of a pool; those kept back count as taken.
    pub(super) fn counts(&self, pool: &PoolState) -> (Count, Count) {
        let taken = self.taken_in_pool.get(pool.name()).copied().unwrap_or_default();
        let kept: BTreeSet<IpAddr> = pool.reserved_ends().filter(|ip| !self.taken.contains(*ip)).collect();
        (pool.total(), Count::from(u128::from(taken) + kept.len() as u128))
    }

    fn pool_conditions(&self, pool: &PoolState) -> Vec<Condition> {
        let generation = pool.pool.metadata.generation;
        let (total, used) = self.counts(pool);
        let number = |kind, count: Count| condition(kind, "Unknown", "noreason", count.to_string(), generation);
        let mut conditions = vec![
            match &pool.conflict {
                Some(text) => condition(CONDITION_POOL_CONFLICT, "True", "cidr_overlap", text.clone(), generation),
                None => condition(CONDITION_POOL_CONFLICT, "False", "resolved", String::new(), generation),
            },
            number(CONDITION_IPS_TOTAL, total),
            number(CONDITION_IPS_AVAILABLE, total.saturating_sub(used)),
            number(CONDITION_IPS_USED, used),
        ];
        let had_problems = pool.pool.status.conditions.iter().any(|c| c.kind == CONDITION_INVALID_SPEC);
        if !pool.problems.is_empty() {
            let text = pool.problems.join("; ");
            conditions.push(condition(CONDITION_INVALID_SPEC, "True", "invalid_spec", text, generation));
        } else if had_problems {
            conditions.push(condition(CONDITION_INVALID_SPEC, "False", "resolved", String::new(), generation));
        }
        conditions
    }

    /// Effects for what this step touched, where objects do not say so already.
    pub(super) fn flush(&mut self) -> Vec<Effect> {
        let services = std::mem::take(&mut self.dirty_services);
        let pools = std::mem::take(&mut self.dirty_pools);
        self.stirred.clear();
        self.stirred_groups.clear();
        if !self.synced {
            return Vec::new();
        }
        let mut effects: Vec<Effect> = services.into_iter().filter_map(|key| self.flush_service(key)).collect();
        effects.extend(pools.into_iter().filter_map(|name| self.flush_pool(name)));
        effects
    }

    fn flush_service(&mut self, key: ObjectKey) -> Option<Effect> {
        let entry = self.services.get(&key)?;
        let (ingress, condition) = self.desired(entry)?;
        let same = match &entry.emitted {
            Some((emitted, written)) => *emitted == ingress && *written == condition,
            None => says(entry, &ingress, condition.as_ref()),
        };
        if same {
            return None;
        }
        let entry = self.services.get_mut(&key)?;
        entry.emitted = Some((ingress.clone(), condition.clone()));
        Some(Effect::ServiceStatus { key, ingress, condition })
    }

    /// What the Service's status should say; `None` where it is somebody else's by now.
    fn desired(&self, entry: &Entry) -> Option<(Vec<IpAddr>, Option<Condition>)> {
        let mut ingress = Vec::new();
        let current = entry.service.ingress_addresses().map(|ip| ip.to_canonical());
        if entry.request.handled {
            // The order of the status stays: people and DNS may rely on the first entry.
            for ip in current.filter(|ip| entry.held.contains(ip)).chain(entry.held.iter().copied()) {
                if !ingress.contains(&ip) {
                    ingress.push(ip);
                }
            }
            return Some((ingress, entry.condition.clone()));
        }
        let foreign = entry.service.status.load_balancer.ingress.iter().any(|e| e.hostname.is_some());
        if foreign {
            return None;
        }
        ingress
            .extend(current.filter(|ip| self.pools.containing(*ip).next().is_none() && !entry.given_up.contains(ip)));
        Some((ingress, None))
    }

    fn flush_pool(&mut self, name: SmolStr) -> Option<Effect> {
        let pool = self.pools.get(&name)?;
        let conditions = self.pool_conditions(pool);
        let current = self.emitted_pools.get(&name).unwrap_or(&pool.pool.status.conditions);
        let same = conditions.iter().all(|wanted| current.iter().any(|there| says_the_same(wanted, there)));
        if same {
            return None;
        }
        self.emitted_pools.insert(name.clone(), conditions.clone());
        Some(Effect::PoolStatus { name, conditions })
    }
}

/// Whether the object's status says exactly this.
fn says(entry: &Entry, ingress: &[IpAddr], condition: Option<&Condition>) -> bool {
    let status = &entry.service.status;
    let there = status.conditions.iter().find(|c| c.kind == CONDITION_SATISFIED);
    let same_condition = match (there, condition) {
        (Some(there), Some(wanted)) => says_the_same(there, wanted),
        (None, None) => true,
        _ => false,
    };
    let entries = &status.load_balancer.ingress;
    same_condition
        && entries.len() == ingress.len()
        && entries.iter().zip(ingress).all(|(e, ip)| e.hostname.is_none() && parse_ip(&e.ip) == Some(*ip))
}
