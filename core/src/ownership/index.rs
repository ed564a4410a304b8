//! What each input changes: the indexes, and the addresses that have to be looked at again.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use smol_str::SmolStr;

use super::policy::PolicyEntry;
use super::{ANNOUNCE_COUNT, DeviceId, Effect, Ownership, Placement, ServiceEntry};
use crate::devices::{Device, Families};
use crate::objects::{L2Policy, Object, ObjectKey, Service, StringMap};
use crate::presence::{Members, Record};

impl Ownership {
    pub(super) fn service_upserted(&mut self, service: Arc<Service>) {
        let key = service.key();
        let before = self.services.remove(&key);
        if let Some(entry) = &before
            && entry.service == service
        {
            self.services.extend(before.map(|entry| (key, entry)));
            return;
        }
        let mut offers: BTreeMap<IpAddr, Vec<SmolStr>> = BTreeMap::new();
        for (name, policy) in &self.policies {
            for addr in policy.addresses_of(&service) {
                offers.entry(addr).or_default().push(name.clone());
            }
        }
        let old = before.map(|entry| entry.offers).unwrap_or_default();
        self.reindex(&key, &old, &offers);
        self.services.insert(key, ServiceEntry { service, offers });
    }

    pub(super) fn service_removed(&mut self, key: &ObjectKey) {
        if let Some(entry) = self.services.remove(key) {
            self.reindex(key, &entry.offers, &BTreeMap::new());
        }
    }

    /// Brings the indexes from what a Service offered to what it offers.
    fn reindex(&mut self, key: &ObjectKey, old: &BTreeMap<IpAddr, Vec<SmolStr>>, new: &BTreeMap<IpAddr, Vec<SmolStr>>) {
        let policies = |offers: &BTreeMap<IpAddr, Vec<SmolStr>>| offers.values().flatten().cloned().collect();
        let (had, has): (BTreeSet<SmolStr>, BTreeSet<SmolStr>) = (policies(old), policies(new));
        for name in had.symmetric_difference(&has) {
            if let Some(policy) = self.policies.get_mut(name) {
                match has.contains(name) {
                    true => policy.services.insert(key.clone()),
                    false => policy.services.remove(key),
                };
            }
        }
        for addr in old.keys().filter(|addr| !new.contains_key(*addr)) {
            if let Some(entry) = self.addresses.get_mut(addr) {
                entry.services.remove(key);
            }
        }
        for addr in new.keys() {
            self.addresses.entry(*addr).or_default().services.insert(key.clone());
        }
        self.dirty.extend(old.keys().chain(new.keys()));
    }

    pub(super) fn placed(&mut self, key: ObjectKey, placement: Placement) {
        if *self.placements.get(&key).unwrap_or(&Placement::default()) == placement {
            return;
        }
        if let Some(entry) = self.services.get(&key) {
            self.dirty.extend(entry.offers.keys());
        }
        // Kept when the Service goes: it may come back before its endpoints change.
        match placement == Placement::default() {
            true => self.placements.remove(&key),
            false => self.placements.insert(key, placement),
        };
    }

    pub(super) fn policy_upserted(&mut self, policy: Arc<L2Policy>) {
        let name = policy.metadata.name.clone();
        self.dirty_policies.insert(name.clone());
        if let Some(entry) = self.policies.get_mut(&name)
            && entry.policy.spec == policy.spec
        {
            if entry.policy != policy {
                entry.policy = policy;
                entry.emitted = None;
            }
            return;
        }
        self.policy_replaced(&name, Some(PolicyEntry::read(policy)));
    }

    pub(super) fn policy_removed(&mut self, name: &SmolStr) {
        self.dirty_policies.remove(name);
        self.policy_replaced(name, None);
    }

    fn policy_replaced(&mut self, name: &SmolStr, new: Option<PolicyEntry>) {
        let old = self.policies.remove(name);
        let mut affected = old.map(|entry| entry.services).unwrap_or_default();
        if let Some(mut entry) = new {
            entry.services.clone_from(&affected);
            for service in self.services.values() {
                if !entry.addresses_of(&service.service).is_empty() {
                    affected.insert(service.service.key());
                }
            }
            self.policies.insert(name.clone(), entry);
            let nodes: Vec<SmolStr> = self.members.keys().chain([&self.me]).cloned().collect();
            for node in nodes {
                self.refresh_nodes(Some(name), &node);
            }
        }
        for key in affected {
            let Some(entry) = self.services.get(&key) else { continue };
            let addresses = self.policies.get(name).map(|p| p.addresses_of(&entry.service)).unwrap_or_default();
            let mut offers = entry.offers.clone();
            for policies in offers.values_mut() {
                policies.retain(|policy| policy != name);
            }
            for addr in addresses {
                let policies = offers.entry(addr).or_default();
                let at = policies.partition_point(|policy| policy < name);
                policies.insert(at, name.clone());
            }
            offers.retain(|_, policies| !policies.is_empty());
            let old = entry.offers.clone();
            self.reindex(&key, &old, &offers);
            if let Some(entry) = self.services.get_mut(&key) {
                entry.offers = offers;
            }
        }
    }

    pub(super) fn labels_changed(&mut self, node: &SmolStr, labels: Option<&StringMap>) {
        if self.labels.get(node) == labels {
            return;
        }
        match labels {
            Some(labels) => self.labels.insert(node.clone(), labels.clone()),
            None => self.labels.remove(node),
        };
        self.refresh_nodes(None, node);
    }

    pub(super) fn members_changed(&mut self, members: Members) {
        let self_seen_changed = std::mem::replace(&mut self.self_seen, members.self_seen) != members.self_seen;
        let mut records = members.records;
        records.remove(&self.me);
        let old = std::mem::replace(&mut self.members, records);
        let names: BTreeSet<SmolStr> = old.keys().chain(self.members.keys()).cloned().collect();
        for node in names {
            let (before, after) = (old.get(&node), self.members.get(&node).cloned());
            if before == after.as_ref() {
                continue;
            }
            let claims = |record: Option<&Arc<Record>>| -> BTreeSet<IpAddr> {
                record.into_iter().flat_map(|r| &r.claims).map(|ip| ip.to_canonical()).collect()
            };
            let (had, has) = (claims(before), claims(after.as_ref()));
            for addr in had.symmetric_difference(&has) {
                let nodes = self.claims.entry(*addr).or_default();
                match has.contains(addr) {
                    true => nodes.insert(node.clone()),
                    false => nodes.remove(&node),
                };
                if nodes.is_empty() {
                    self.claims.remove(addr);
                }
                self.dirty.insert(*addr);
            }
            if before.is_some_and(|r| r.draining) != after.is_some_and(|r| r.draining) {
                self.dirty_all();
            }
            self.refresh_nodes(None, &node);
        }
        if !self_seen_changed {
            return;
        }
        // Claims of others weigh differently while our own is not seen.
        let contested = self.addresses.keys().filter(|addr| self.claims.contains_key(*addr));
        let contested: Vec<IpAddr> = contested.copied().collect();
        self.dirty.extend(contested);
    }

    /// Brings up to date which of a node's devices the policies (or one of them) select.
    fn refresh_nodes(&mut self, only: Option<&SmolStr>, node: &SmolStr) {
        let labels = self.labels.get(node);
        for (name, policy) in &mut self.policies {
            if only.is_some_and(|only| only != name) {
                continue;
            }
            let devices = match self.members.get(node) {
                _ if *node == self.me => {
                    policy.devices_on(labels, self.devices.iter().map(|(name, (_, families))| (name, *families)))
                }
                Some(record) => policy.devices_on(labels, record.announcers()),
                None => Vec::new(),
            };
            let old = match devices.is_empty() {
                true => policy.nodes.remove(node),
                false => policy.nodes.insert(node.clone(), devices),
            };
            if old.as_ref() != policy.nodes.get(node) {
                self.stirred_policies.insert(name.clone());
            }
        }
    }

    /// Looks again at the addresses of policies whose nodes have changed: once, however many nodes came or went.
    pub(super) fn expand_policies(&mut self) {
        for name in std::mem::take(&mut self.stirred_policies) {
            for key in self.policies.get(&name).into_iter().flat_map(|policy| &policy.services) {
                if let Some(entry) = self.services.get(key) {
                    self.dirty.extend(entry.offers.keys());
                }
            }
        }
    }

    pub(super) fn devices_changed(
        &mut self,
        devices: Vec<(Device, Families)>,
        now: Instant,
        effects: &mut Vec<Effect>,
    ) {
        let live = devices.into_iter().filter(|(device, _)| device.is_live());
        let live = live.map(|(device, families)| (device.name.clone(), (device, families)));
        let old = std::mem::replace(&mut self.devices, live.collect());
        let me = self.me.clone();
        self.refresh_nodes(None, &me);
        // The same name with another number or MAC is another card: whoever talks to us has to learn that.
        let swapped = |name: &SmolStr| match (old.get(name), self.devices.get(name)) {
            (Some((old, _)), Some((new, _))) if (old.ifindex, old.mac) != (new.ifindex, new.mac) => {
                Some(DeviceId { ifindex: new.ifindex, name: name.clone() })
            }
            _ => None,
        };
        let swapped: Vec<DeviceId> = self.devices.keys().filter_map(swapped).collect();
        if swapped.is_empty() {
            return;
        }
        let mut again = Vec::new();
        for (addr, entry) in self.addresses.iter().filter(|(_, entry)| entry.state.answers()) {
            for device in &swapped {
                match entry.devices.iter().find(|d| d.name == device.name) {
                    Some(known) if known == device => again.push((*addr, device.clone())),
                    // The claim itself changes, and announces.
                    Some(_) => drop(self.dirty.insert(*addr)),
                    None => {}
                }
            }
        }
        for (addr, device) in again {
            self.announce(addr, device, ANNOUNCE_COUNT, now, effects);
        }
    }
}
