//! What each input changes, and whose turn it is then.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use smol_str::SmolStr;

use super::pools::PoolState;
use super::request::Request;
use super::{Allocator, CONDITION_SATISFIED, Entry, Rank};
use crate::objects::{Object, ObjectKey, Pool, Service};

impl Allocator {
    pub(super) fn pool_upserted(&mut self, pool: Arc<Pool>) {
        let name = pool.metadata.name.clone();
        let before = self.pools.get(&name).map(|state| Arc::clone(&state.pool));
        if before.as_ref().is_some_and(|old| old == &pool) {
            return;
        }
        let was_active = self.is_active();
        let same_spec = before.is_some_and(|old| {
            old.spec == pool.spec && old.metadata.creation_timestamp == pool.metadata.creation_timestamp
        });
        let old = self.pools.upsert(pool);
        self.emitted_pools.remove(&name);
        self.dirty_pools.insert(name.clone());
        if !self.synced || same_spec {
            return;
        }
        self.recount(&name);
        match was_active {
            true => self.pools_changed(old),
            false => self.bootstrap(),
        }
    }

    pub(super) fn pool_removed(&mut self, name: &SmolStr) {
        let Some(old) = self.pools.remove(name) else { return };
        self.taken_in_pool.remove(name);
        self.emitted_pools.remove(name);
        self.dirty_pools.remove(name);
        if self.synced {
            self.pools_changed(Some(old));
        }
    }

    /// Takes back what the pools no longer give, from satisfied Services first, and then serves those who lack something.
    fn pools_changed(&mut self, old: Option<PoolState>) {
        let mut affected = BTreeSet::new();
        for range in old.iter().flat_map(|pool| &pool.ranges) {
            for (_, keys) in self.holders.range(range.span.first..=range.span.last) {
                affected.extend(keys.iter().cloned());
            }
        }
        for key in &affected {
            self.revalidate(key);
        }
        let names: Vec<_> = self.pools.iter().map(|pool| pool.name().clone()).collect();
        self.dirty_pools.extend(names);
        self.serve_waiting(true);
    }

    pub(super) fn service_upserted(&mut self, service: Arc<Service>) {
        let key = service.key();
        let request = Request::read(&service, &self.config);
        let has_condition = service.status.conditions.iter().any(|c| c.kind == CONDITION_SATISFIED);
        let first_seen = match self.services.remove(&key) {
            Some(entry) if entry.service == service => {
                self.services.insert(key, entry);
                return;
            }
            Some(mut entry) => {
                self.matching -= usize::from(entry.request.handled);
                self.unsatisfied.remove(&entry.rank());
                let stirs = entry.request != request;
                let old_group = std::mem::replace(&mut entry.request, request).sharing_key;
                entry.service = service;
                entry.emitted = None;
                self.matching += usize::from(entry.request.handled);
                let held = entry.held.clone();
                let group = entry.request.sharing_key.clone();
                self.services.insert(key.clone(), entry);
                for ip in held {
                    self.leave_group(old_group.as_ref(), ip);
                    self.join_group(group.as_ref(), ip);
                    if stirs {
                        self.stirred.insert(ip);
                    }
                }
                false
            }
            // Most Services are nothing to us, and nothing is kept of them.
            None if !request.handled && !has_condition => return,
            None => {
                self.matching += usize::from(request.handled);
                let (held, given_up, condition, emitted) = (Vec::new(), Vec::new(), None, None);
                let entry = Entry { service, request, held, given_up, condition, emitted };
                self.services.insert(key.clone(), entry);
                true
            }
        };
        if self.is_active() {
            self.reconcile(&key, first_seen);
            self.serve_waiting(false);
        }
    }

    pub(super) fn service_removed(&mut self, key: &ObjectKey) {
        self.release_all(key);
        self.dirty_services.remove(key);
        if let Some(entry) = self.services.remove(key) {
            self.matching -= usize::from(entry.request.handled);
            self.unsatisfied.remove(&entry.rank());
        }
        if self.is_active() {
            self.serve_waiting(false);
        }
    }

    pub(super) fn node_addresses_changed(&mut self, addresses: BTreeSet<IpAddr>) {
        let addresses: BTreeSet<IpAddr> = addresses.into_iter().map(|ip| ip.to_canonical()).collect();
        let old = std::mem::take(&mut self.node_addresses);
        for &ip in old.difference(&addresses) {
            self.stirred.insert(ip);
            if !self.holders.contains_key(&ip) {
                self.vacate(ip);
            }
        }
        for &ip in addresses.difference(&old) {
            self.stirred.insert(ip);
            if !self.holders.contains_key(&ip) {
                self.occupy(ip);
            }
        }
        let added: Vec<IpAddr> = addresses.difference(&old).copied().collect();
        self.node_addresses = addresses;
        if !self.is_active() {
            return;
        }
        for ip in added {
            for key in self.holders.get(&ip).cloned().unwrap_or_default() {
                self.revalidate(&key);
            }
        }
        self.serve_waiting(false);
    }

    /// First decisions: what Services already have, then what they lack.
    pub(super) fn bootstrap(&mut self) {
        let names: Vec<SmolStr> = self.pools.iter().map(|pool| pool.name().clone()).collect();
        for name in &names {
            self.recount(name);
        }
        self.dirty_pools.extend(names);
        if !self.is_active() {
            return;
        }
        let mut ranks: Vec<Rank> = self.services.values().map(Entry::rank).collect();
        ranks.sort();
        for (_, key) in &ranks {
            self.import(key, true);
        }
        for (_, key) in &ranks {
            self.reconcile(key, false);
        }
        self.serve_waiting(false);
    }
}
