//! Who is there: each agent keeps one Lease with a record of itself, and judges the others by theirs.
//!
//! A node is alive while its Lease keeps changing, seen from here: `renewTime` is compared with what it was, never with a
//! clock, so that clocks may differ by any amount. Who starts anew takes everybody for alive, except those that its own
//! record says were gone and whose Lease has not changed since. Deliberately absent: reading and writing Leases, wall-clock time, and
//! the faster heartbeats that come with the full ownership protocol.

pub mod election;
mod link;
mod record;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use smol_str::SmolStr;

use crate::objects::Lease;
pub use election::{Election, Timing};
pub use link::Link;
pub use record::{ANNOTATION, Record, RecordError, TAKES_IPIP, TAKES_OPT};

/// Prefix of the names of presence Leases; the node's name follows.
pub const LEASE_PREFIX: &str = "kinesin-node-";

/// Used where a Lease does not say how long it is good for.
const DEFAULT_DURATION: Duration = Duration::from_secs(15);
/// Nobody's absence should go unnoticed for longer, whatever a Lease says.
const MAX_DURATION: Duration = Duration::from_secs(3600);

/// Name of a node's presence Lease.
pub fn lease_name(node: &str) -> String {
    format!("{LEASE_PREFIX}{node}")
}

/// The nodes that are there, as seen from one of them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Members {
    /// By node name. Includes this node as others see it, if they do.
    pub records: BTreeMap<SmolStr, Arc<Record>>,
    /// This node's own Lease is being renewed, as far as can be told: others see it as alive. False before it is written.
    pub self_seen: bool,
}

/// What happened to a node.
#[derive(Clone, Debug, PartialEq)]
pub enum Change {
    /// Is alive, and was not.
    Joined(SmolStr),
    /// Says something else about itself.
    Changed(SmolStr),
    /// Has left, or was not heard of for the duration of its Lease.
    Left(SmolStr),
}

#[derive(Clone, Debug)]
struct Peer {
    node: SmolStr,
    record: Arc<Record>,
    /// Holder, acquisition and renewal: any difference is a sign of life.
    pulse: (Option<SmolStr>, Option<SmolStr>, Option<SmolStr>),
    duration: Duration,
    /// When the pulse was last seen to change.
    changed_at: Instant,
    alive: bool,
    /// The pulse was seen to change: nothing that an earlier run knew counts any more.
    confirmed: bool,
}

impl Peer {
    fn deadline(&self) -> Instant {
        self.changed_at + self.duration
    }
}

/// Watches everybody's Lease.
///
/// Leases vouch for each other: that one of them does not change says something about its node only if another one (this
/// node's own, say) was seen to change meanwhile. Otherwise the way to the API is broken, and nobody is declared dead;
/// when changes are seen again, everybody gets a whole duration from there (R08). For this to work, agents renew at least
/// three times per duration.
#[derive(Clone, Debug)]
pub struct Tracker {
    me: SmolStr,
    /// By the Lease's name.
    peers: BTreeMap<SmolStr, Peer>,
}

impl Tracker {
    /// For the node of that name.
    pub fn new(me: impl Into<SmolStr>) -> Self {
        Self { me: me.into(), peers: BTreeMap::new() }
    }

    /// Takes a presence Lease as it is now. Other Leases are left alone. An unreadable record leaves the last one.
    pub fn observe(&mut self, lease: &Lease, now: Instant) -> Result<Vec<Change>, RecordError> {
        let name = lease.metadata.name.clone();
        if !name.starts_with(LEASE_PREFIX) {
            return Ok(Vec::new());
        }
        let spec = &lease.spec;
        if spec.holder_identity.as_deref().is_none_or(str::is_empty) {
            return Ok(self.removed(&name));
        }
        let record = Arc::new(Record::from_lease(lease)?);
        if name.strip_prefix(LEASE_PREFIX) != Some(record.node.as_str()) {
            return Err(RecordError::Foreign { lease: name, node: record.node.clone() });
        }
        let pulse = (spec.holder_identity.clone(), spec.acquire_time.clone(), spec.renew_time.clone());
        let seconds = spec.lease_duration_seconds.map(|s| Duration::from_secs(s.into()));
        let duration = seconds.unwrap_or(DEFAULT_DURATION).clamp(Duration::from_secs(1), MAX_DURATION);
        let node = record.node.clone();
        if self.peers.get(&name).is_none_or(|peer| peer.pulse != pulse) {
            self.forgive_after_silence(now);
        }
        let change = match self.peers.get_mut(&name) {
            None => {
                let peer = Peer {
                    node: node.clone(),
                    record,
                    pulse,
                    duration,
                    changed_at: now,
                    alive: true,
                    confirmed: false,
                };
                self.peers.insert(name, peer);
                Some(Change::Joined(node))
            }
            Some(peer) => {
                let differs = peer.record != record;
                let was_alive = peer.alive;
                peer.duration = duration;
                if differs {
                    peer.record = record;
                }
                peer.node = node.clone();
                if peer.pulse != pulse {
                    (peer.pulse, peer.changed_at, peer.alive, peer.confirmed) = (pulse, now, true, true);
                }
                match (was_alive, peer.alive) {
                    (false, true) => Some(Change::Joined(node)),
                    (true, _) if differs => Some(Change::Changed(node)),
                    _ => None,
                }
            }
        };
        let mut changes: Vec<Change> = change.into_iter().collect();
        changes.extend(self.recall());
        Ok(changes)
    }

    /// The nodes whose presence has run out, with the last `renewTime` of each: what this node's own record should say.
    pub fn gone(&self) -> BTreeMap<SmolStr, SmolStr> {
        let dead = self.peers.values().filter(|peer| !peer.alive && peer.node != self.me);
        dead.filter_map(|peer| Some((peer.node.clone(), peer.pulse.2.clone()?))).collect()
    }

    /// Those that an earlier run of this agent saw run out are still gone, unless their Lease has changed since.
    fn recall(&mut self) -> Vec<Change> {
        let Some(mine) = self.mine().map(|peer| Arc::clone(&peer.record)) else { return Vec::new() };
        let is_gone = |peer: &Peer| {
            let last = peer.pulse.2.as_ref();
            peer.alive && !peer.confirmed && last.is_some() && mine.gone.get(&peer.node) == last
        };
        let mut changes = Vec::new();
        for peer in self.peers.values_mut().filter(|peer| peer.node != mine.node && is_gone(peer)) {
            peer.alive = false;
            changes.push(Change::Left(peer.node.clone()));
        }
        changes
    }

    /// A presence Lease is gone, or nobody holds it: its node has left.
    pub fn removed(&mut self, lease_name: &str) -> Vec<Change> {
        let left = self.peers.remove(lease_name).filter(|peer| peer.alive);
        left.map(|peer| Change::Left(peer.node)).into_iter().collect()
    }

    /// Declares those dead whose Lease has not changed for its duration. Call it after each observation, and at
    /// [`Tracker::next_deadline`].
    pub fn expire(&mut self, now: Instant) -> Vec<Change> {
        let dead =
            self.peers.iter().filter(|(_, peer)| peer.alive && peer.node != self.me && self.is_silent(peer, now));
        let dead: Vec<SmolStr> = dead.map(|(name, _)| name.clone()).collect();
        let mut changes = Vec::new();
        for peer in dead.iter().filter_map(|name| self.peers.get(name)) {
            changes.push(Change::Left(peer.node.clone()));
        }
        for name in &dead {
            if let Some(peer) = self.peers.get_mut(name) {
                peer.alive = false;
            }
        }
        changes
    }

    /// When [`Tracker::expire`] may have something to say or [`Members::self_seen`] may change, if no Lease does.
    pub fn next_deadline(&self, now: Instant) -> Option<Instant> {
        let due = |peer: &Peer| match peer.deadline() {
            deadline if deadline > now => Some(deadline),
            // Those whose silence nobody vouches for wait for the next observation.
            _ => (peer.node != self.me && self.is_silent(peer, now)).then_some(now),
        };
        self.peers.values().filter(|peer| peer.alive).filter_map(due).min()
    }

    /// Those who are there. Does not expire anybody.
    pub fn alive(&self, now: Instant) -> Members {
        let alive = self.peers.values().filter(|peer| peer.alive);
        Members {
            records: alive.map(|peer| (peer.node.clone(), Arc::clone(&peer.record))).collect(),
            self_seen: self.mine().is_some_and(|peer| !self.is_silent(peer, now)),
        }
    }

    fn mine(&self) -> Option<&Peer> {
        self.peers.values().find(|peer| peer.node == self.me)
    }

    /// The Lease has not changed for its duration, although it would have been seen.
    fn is_silent(&self, peer: &Peer, now: Instant) -> bool {
        if now < peer.deadline() {
            return false;
        }
        // A live node would have renewed by the middle of the duration: who was heard after that vouches for the way.
        let middle = peer.changed_at + peer.duration / 2;
        let vouched = self.peers.values().any(|other| other.node != peer.node && other.changed_at >= middle);
        // Without a Lease of our own there may be nobody to vouch.
        vouched || self.mine().is_none()
    }

    fn forgive_after_silence(&mut self, now: Instant) {
        let Some(mine) = self.mine() else { return };
        let last = self.peers.values().map(|peer| peer.changed_at).max();
        if last.is_none_or(|last| now < last + mine.duration / 2) {
            return;
        }
        for peer in self.peers.values_mut().filter(|peer| peer.alive) {
            peer.changed_at = now;
        }
    }
}
