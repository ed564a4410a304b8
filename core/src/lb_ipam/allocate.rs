//! One Service at a time: what it may keep, what it gets, and why not.

use std::net::IpAddr;

use smol_str::SmolStr;

use super::status::{self, Refusal};
use super::{Allocator, Entry};
use crate::objects::ObjectKey;

impl Allocator {
    /// Brings one Service to what it should have.
    pub(super) fn reconcile(&mut self, key: &ObjectKey, first_seen: bool) {
        let Some(entry) = self.services.get_mut(key) else { return };
        let rank = entry.rank();
        self.unsatisfied.remove(&rank);
        self.dirty_services.insert(key.clone());
        if !entry.request.handled {
            let held = entry.held.clone();
            entry.given_up.extend(held);
            entry.condition = None;
            self.release_all(key);
            return;
        }
        entry.given_up.clear();
        self.drop_invalid(key);
        self.import(key, first_seen);
        let outcome = self.allocate(key);
        if outcome.is_err() {
            self.unsatisfied.insert(rank);
        }
        if let Some(entry) = self.services.get_mut(key) {
            let generation = entry.service.metadata.generation;
            entry.condition = Some(status::satisfied(outcome, generation));
        }
    }

    /// Serves Services that lack something and may get it from what this step stirred, or all that lack something.
    pub(super) fn serve_waiting(&mut self, mut all: bool) {
        loop {
            let stirred = std::mem::take(&mut self.stirred);
            let groups = std::mem::take(&mut self.stirred_groups);
            let bereft = std::mem::take(&mut self.bereft);
            let quiet = stirred.is_empty() && groups.is_empty() && bereft.is_empty() && !all;
            if self.unsatisfied.is_empty() || quiet {
                return;
            }
            let waiting: Vec<ObjectKey> = self.unsatisfied.iter().map(|(_, key)| key.clone()).collect();
            for key in waiting {
                let Some(entry) = self.services.get(&key) else { continue };
                let request = &entry.request;
                let useful = |ip: &IpAddr| match request.addresses.is_empty() {
                    false => request.addresses.contains(ip) && !entry.held.contains(ip),
                    true => request.wants(*ip) && !self.taken.contains(*ip),
                };
                let grouped = request.sharing_key.as_ref().is_some_and(|group| groups.contains(group));
                if all || grouped || bereft.contains(&key) || stirred.iter().any(useful) {
                    self.reconcile(&key, false);
                }
            }
            all = false;
        }
    }

    /// Takes back what a Service may no longer have; it is then among the first to be served again.
    pub(super) fn revalidate(&mut self, key: &ObjectKey) {
        if self.drop_invalid(key)
            && let Some(entry) = self.services.get(key)
        {
            self.unsatisfied.insert(entry.rank());
            self.bereft.insert(key.clone());
        }
    }

    fn drop_invalid(&mut self, key: &ObjectKey) -> bool {
        let Some(entry) = self.services.get(key) else { return false };
        let invalid: Vec<IpAddr> = entry.held.iter().copied().filter(|ip| !self.may_have(entry, *ip)).collect();
        for ip in &invalid {
            self.release(key, *ip);
        }
        !invalid.is_empty()
    }

    /// Whether a Service may keep, or import, an address. Closed pools do not matter: what was handed out stays.
    fn may_have(&self, entry: &Entry, ip: IpAddr) -> bool {
        entry.request.wants(ip)
            && !self.node_addresses.contains(&ip)
            && self.pools.containing(ip).any(|pool| pool.selects(&entry.service.metadata))
            && self.clash(entry, ip).is_none()
    }

    /// The first other holder of an address that the Service may not share it with, and why.
    fn clash(&self, entry: &Entry, ip: IpAddr) -> Option<(&ObjectKey, &'static str)> {
        let others = self.holders.get(&ip)?.iter().filter(|key| **key != entry.request.key);
        others.into_iter().find_map(|key| {
            let other = self.services.get(key)?;
            Some((key, entry.request.conflict_with(&other.request)?))
        })
    }

    /// Takes over addresses from the Service's status. Of a Service that is known already, only those that it lacks:
    /// its status may be older than our last decision.
    pub(super) fn import(&mut self, key: &ObjectKey, first_seen: bool) {
        let Some(entry) = self.services.get(key).filter(|entry| entry.request.handled) else { return };
        let status: Vec<IpAddr> = entry.service.ingress_addresses().map(|ip| ip.to_canonical()).collect();
        for ip in status {
            let Some(entry) = self.services.get(key) else { return };
            let lacks = first_seen
                || !entry.request.addresses.is_empty()
                || !entry.held.iter().any(|held| held.is_ipv6() == ip.is_ipv6());
            if lacks && !entry.held.contains(&ip) && self.may_have(entry, ip) {
                self.take(key, ip);
            }
        }
    }

    /// Gets what the Service lacks. The error is about the first thing that it does not get.
    fn allocate(&mut self, key: &ObjectKey) -> Result<(), Refusal> {
        let Some(entry) = self.services.get(key) else { return Ok(()) };
        let mut outcome = Ok(());
        let wanted = entry.request.addresses.clone();
        let families = if wanted.is_empty() { entry.request.families.clone() } else { Vec::new() };
        if wanted.is_empty() && families.is_empty() {
            return Err(Refusal::no_pool());
        }
        for ip in wanted {
            let Some(entry) = self.services.get(key) else { return Ok(()) };
            if entry.held.contains(&ip) {
                continue;
            }
            match self.refuse(entry, ip) {
                None => self.take(key, ip),
                Some(refusal) => outcome = outcome.and(Err(refusal)),
            }
        }
        for v6 in families {
            let Some(entry) = self.services.get(key) else { return Ok(()) };
            if entry.held.iter().any(|ip| ip.is_ipv6() == v6) {
                continue;
            }
            match self.find(entry, v6) {
                Ok(ip) => self.take(key, ip),
                Err(refusal) => outcome = outcome.and(Err(refusal)),
            }
        }
        outcome
    }

    /// Why a Service does not get this very address.
    fn refuse(&self, entry: &Entry, ip: IpAddr) -> Option<Refusal> {
        let enabled = if ip.is_ipv6() { self.config.ipv6 } else { self.config.ipv4 };
        let open: Vec<_> = self.pools.containing(ip).filter(|pool| pool.is_open()).collect();
        if open.is_empty() || !enabled {
            return Some(Refusal::no_pool_containing(ip));
        }
        let Some(pool) = open.into_iter().find(|pool| pool.selects(&entry.service.metadata)) else {
            return Some(Refusal::selector_mismatch(ip));
        };
        if self.node_addresses.contains(&ip) {
            return Some(Refusal::node_address(ip));
        }
        if let Some((other, why)) = self.clash(entry, ip) {
            return Some(match entry.request.sharing_key {
                None => Refusal::already_allocated(ip, other),
                Some(_) => Refusal::incompatible(ip, other, why),
            });
        }
        // Free, or shared with those who have it already.
        (!self.holders.contains_key(&ip) && pool.reserves(ip)).then(|| Refusal::reserved_end(ip))
    }

    /// An address of the family: one of the sharing group's, or the lowest free one of the first pool that has any.
    fn find(&self, entry: &Entry, v6: bool) -> Result<IpAddr, Refusal> {
        if !(if v6 { self.config.ipv6 } else { self.config.ipv4 }) {
            return Err(Refusal::no_pool());
        }
        let group = entry.request.sharing_key.as_ref().and_then(|group| self.groups.get(group));
        let shared = group.into_iter().flat_map(|addresses| addresses.keys().copied());
        for ip in shared.filter(|ip| ip.is_ipv6() == v6) {
            if self.refuse(entry, ip).is_none() {
                return Ok(ip);
            }
        }
        let mut matched = false;
        for pool in self.pools.iter().filter(|pool| pool.is_open() && pool.selects(&entry.service.metadata)) {
            for range in pool.ranges.iter().filter(|range| range.span.is_v6() == v6) {
                matched = true;
                if let Some(ip) = self.taken.lowest_free(&range.usable(pool.reserves_ends())) {
                    return Ok(ip);
                }
            }
        }
        Err(if matched { Refusal::out_of_ips() } else { Refusal::no_pool() })
    }

    fn take(&mut self, key: &ObjectKey, ip: IpAddr) {
        let Some(entry) = self.services.get_mut(key) else { return };
        entry.held.push(ip);
        let group = entry.request.sharing_key.clone();
        let holders = self.holders.entry(ip).or_default();
        if let Err(at) = holders.binary_search(key) {
            holders.insert(at, key.clone());
        }
        match holders.len() {
            1 => self.occupy(ip),
            // Others may be told another reason now.
            _ => drop(self.stirred.insert(ip)),
        }
        self.join_group(group.as_ref(), ip);
    }

    fn release(&mut self, key: &ObjectKey, ip: IpAddr) {
        let Some(entry) = self.services.get_mut(key) else { return };
        entry.held.retain(|held| *held != ip);
        let group = entry.request.sharing_key.clone();
        let Some(holders) = self.holders.get_mut(&ip) else { return };
        holders.retain(|holder| holder != key);
        if holders.is_empty() {
            self.holders.remove(&ip);
            if !self.node_addresses.contains(&ip) {
                self.vacate(ip);
            }
        }
        self.stirred.insert(ip);
        self.leave_group(group.as_ref(), ip);
    }

    pub(super) fn release_all(&mut self, key: &ObjectKey) {
        for ip in self.services.get(key).map(|entry| entry.held.clone()).unwrap_or_default() {
            self.release(key, ip);
        }
    }

    pub(super) fn join_group(&mut self, group: Option<&SmolStr>, ip: IpAddr) {
        let Some(group) = group else { return };
        *self.groups.entry(group.clone()).or_default().entry(ip).or_default() += 1;
        self.stirred_groups.insert(group.clone());
    }

    pub(super) fn leave_group(&mut self, group: Option<&SmolStr>, ip: IpAddr) {
        let Some(group) = group else { return };
        self.stirred_groups.insert(group.clone());
        let Some(addresses) = self.groups.get_mut(group) else { return };
        if let Some(holders) = addresses.get_mut(&ip) {
            *holders -= 1;
            if *holders == 0 {
                addresses.remove(&ip);
            }
        }
        if addresses.is_empty() {
            self.groups.remove(group);
        }
    }

    pub(super) fn occupy(&mut self, ip: IpAddr) {
        self.taken.insert(ip);
        self.count(ip, 1);
    }

    pub(super) fn vacate(&mut self, ip: IpAddr) {
        self.taken.remove(ip);
        self.count(ip, -1);
    }

    fn count(&mut self, ip: IpAddr, change: i64) {
        for pool in self.pools.containing(ip) {
            let count = self.taken_in_pool.entry(pool.name().clone()).or_default();
            *count = count.saturating_add_signed(change);
            self.dirty_pools.insert(pool.name().clone());
        }
    }

    /// Counts a pool's taken addresses anew, after its ranges have changed.
    pub(super) fn recount(&mut self, name: &SmolStr) {
        let Some(pool) = self.pools.get(name) else { return };
        let mut taken = std::collections::BTreeSet::new();
        for range in &pool.ranges {
            let span = range.span.first..=range.span.last;
            taken.extend(self.holders.range(span.clone()).map(|(ip, _)| *ip));
            taken.extend(self.node_addresses.range(span).copied());
        }
        self.taken_in_pool.insert(name.clone(), taken.len() as u64);
    }
}
