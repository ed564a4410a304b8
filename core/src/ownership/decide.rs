//! One address at a time: who should have it, and what that means here.

use std::net::IpAddr;
use std::time::Instant;

use smol_str::SmolStr;

use super::{ANNOUNCE_COUNT, ANNOUNCE_PERIOD, AddressEntry, Candidate, DeviceId, Effect, Ownership, State, owner};
use crate::objects::TrafficPolicy;

impl Ownership {
    /// Settles one address.
    pub(super) fn decide(&mut self, addr: IpAddr, now: Instant, effects: &mut Vec<Effect>) {
        let Some(entry) = self.addresses.get(&addr) else { return };
        if entry.services.is_empty() {
            self.release(addr, effects);
            self.addresses.remove(&addr);
            return;
        }
        let answers = entry.state.answers();
        let devices = self.own_devices(addr, entry);
        let owner = self.owner_of(addr, entry);
        let is_mine = owner.as_ref() == Some(&self.me);
        let claimed = owner.as_ref().is_some_and(|o| self.claims.get(&addr).is_some_and(|nodes| nodes.contains(o)));
        // Those who had it before a restart go on at once: the LAN still talks to them.
        let may_claim = self.settled || answers || self.restored.contains(&addr);
        let state = match &owner {
            Some(_) if is_mine && may_claim => State::Announcing,
            Some(_) if is_mine => State::Waiting,
            // Make before break: nobody answers less than before until the next owner says that it does.
            Some(_) if answers && !claimed && !devices.is_empty() => State::HandingOver,
            Some(_) => State::Elsewhere,
            None => State::Unowned,
        };
        if state.answers() {
            self.claim(addr, state, devices, now, effects);
        } else {
            self.release(addr, effects);
        }
        if let Some(entry) = self.addresses.get_mut(&addr) {
            entry.state = state;
            entry.owner = owner;
        }
    }

    /// This node's devices that the address is announced on, sorted.
    fn own_devices(&self, addr: IpAddr, entry: &AddressEntry) -> Vec<DeviceId> {
        let offers = entry.services.iter().filter_map(|key| self.services.get(key)?.offers.get(&addr));
        let policies = offers.flatten().filter_map(|name| self.policies.get(name));
        let selected = policies.filter_map(|policy| policy.nodes.get(&self.me)).flatten();
        let names = selected.filter(|(_, families)| families.include(addr)).map(|(name, _)| name);
        let id = |name: &SmolStr| Some(DeviceId { ifindex: self.devices.get(name)?.0.ifindex, name: name.clone() });
        let mut devices: Vec<DeviceId> = names.filter_map(id).collect();
        devices.sort();
        devices.dedup();
        devices
    }

    /// How many of the Services at the address the node can serve.
    fn serves(&self, addr: IpAddr, entry: &AddressEntry, node: &SmolStr) -> usize {
        let served = entry.services.iter().filter(|key| {
            let Some(service) = self.services.get(*key) else { return false };
            let selected = service.offers.get(&addr).is_some_and(|names| {
                names.iter().any(|name| self.policies.get(name).is_some_and(|p| p.serves_on(node, addr)))
            });
            let local = service.service.spec.external_traffic_policy == TrafficPolicy::Local;
            let placed = || self.placements.get(*key).is_some_and(|p| p.anywhere || p.nodes.contains(node));
            selected && (!local || placed())
        });
        served.count()
    }

    fn candidate(&self, addr: IpAddr, entry: &AddressEntry, node: &SmolStr) -> Option<Candidate> {
        let serves = self.serves(addr, entry, node);
        if serves == 0 {
            return None;
        }
        let others = self.claims.get(&addr);
        let (draining, claims) = match self.members.get(node) {
            _ if *node == self.me => {
                let had = entry.state.answers() || self.restored.contains(&addr);
                // A claim that others cannot see does not stand against one that they can. What an earlier run had
                // is such a claim: who has taken over meanwhile keeps it.
                let stands = others.is_none() || (self.self_seen && entry.state.answers());
                (self.draining, had && stands)
            }
            Some(record) => (record.draining, others.is_some_and(|nodes| nodes.contains(node))),
            None => return None,
        };
        Some(Candidate { node: node.clone(), serves, draining, claims })
    }

    fn owner_of(&self, addr: IpAddr, entry: &AddressEntry) -> Option<SmolStr> {
        let claimants = self.claims.get(&addr).into_iter().flatten();
        let claimants: Vec<Candidate> =
            claimants.chain([&self.me]).filter_map(|node| self.candidate(addr, entry, node)).collect();
        // Nobody can be preferred to a claimant that stays and serves all: the others need not be looked at.
        let best = |c: &Candidate| c.claims && !c.draining && c.serves == entry.services.len();
        if claimants.iter().any(best) {
            return owner(addr, &claimants).cloned();
        }
        let all: Vec<Candidate> =
            self.members.keys().chain([&self.me]).filter_map(|node| self.candidate(addr, entry, node)).collect();
        owner(addr, &all).cloned()
    }

    fn claim(&mut self, addr: IpAddr, state: State, devices: Vec<DeviceId>, now: Instant, effects: &mut Vec<Effect>) {
        let Some(entry) = self.addresses.get_mut(&addr) else { return };
        let had = std::mem::replace(&mut entry.devices, devices.clone());
        let answered = entry.state.answers();
        if !answered {
            entry.since = Some(now);
        }
        if answered && had == devices {
            return;
        }
        effects.push(Effect::Claim { addr, devices: devices.clone() });
        for gone in had.iter().filter(|device| !devices.contains(device)) {
            self.unschedule(addr, Some(gone.ifindex));
        }
        // While handing over, the next owner's announcements should be the last that the LAN hears.
        for device in
            devices.into_iter().filter(|device| state == State::Announcing && !(answered && had.contains(device)))
        {
            self.announce(addr, device, ANNOUNCE_COUNT, now, effects);
        }
    }

    fn release(&mut self, addr: IpAddr, effects: &mut Vec<Effect>) {
        self.unschedule(addr, None);
        let Some(entry) = self.addresses.get_mut(&addr) else { return };
        let answered = entry.state.answers();
        entry.devices.clear();
        entry.since = None;
        if answered {
            effects.push(Effect::Release { addr });
        }
    }

    /// Announces now, and `count - 1` times later. Replaces what was scheduled for the same device.
    pub(super) fn announce(
        &mut self,
        addr: IpAddr,
        device: DeviceId,
        count: u8,
        now: Instant,
        effects: &mut Vec<Effect>,
    ) {
        self.unschedule(addr, Some(device.ifindex));
        effects.push(Effect::Announce { addr, device: device.clone() });
        let Some(entry) = self.addresses.get_mut(&addr).filter(|_| count > 1) else { return };
        let at = now + ANNOUNCE_PERIOD;
        entry.scheduled.insert((at, device.ifindex));
        self.schedule.insert((at, addr, device.ifindex), (device, count - 1));
    }

    fn unschedule(&mut self, addr: IpAddr, only: Option<u32>) {
        let Some(entry) = self.addresses.get_mut(&addr) else { return };
        let schedule = &mut self.schedule;
        entry.scheduled.retain(|(at, ifindex)| {
            let keep = only.is_some_and(|only| only != *ifindex);
            if !keep {
                schedule.remove(&(*at, addr, *ifindex));
            }
            keep
        });
    }

    /// Sends what is due. Late ticks do not bunch announcements up: the next one is a period after this one.
    pub(super) fn run_schedule(&mut self, now: Instant, effects: &mut Vec<Effect>) {
        while let Some(first) = self.schedule.first_entry() {
            let (at, addr, ifindex) = *first.key();
            if at > now {
                return;
            }
            let (device, count) = first.remove();
            if let Some(entry) = self.addresses.get_mut(&addr) {
                entry.scheduled.remove(&(at, ifindex));
            }
            self.announce(addr, device, count, now, effects);
        }
    }
}
