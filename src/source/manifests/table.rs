//! Everything that the directories say at one moment, and the differences between two such moments.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use kinesin_core::objects::{EndpointSlice, L2Policy, Lease, Node, ObjectKey, Pod, Pool, Service};

use super::document::Problem;
use super::kinds::Kind;
use crate::source::Event;

/// Objects of one kind. Values are shared between snapshots, so that comparing two costs pointer comparisons.
pub(super) type Table<T> = BTreeMap<ObjectKey, Arc<T>>;

/// A consistent view of the manifest and state directories.
#[derive(Clone, Debug, Default)]
pub(super) struct Snapshot {
    pub(super) services: Table<Service>,
    pub(super) endpoint_slices: Table<EndpointSlice>,
    pub(super) nodes: Table<Node>,
    pub(super) pods: Table<Pod>,
    pub(super) pools: Table<Pool>,
    pub(super) policies: Table<L2Policy>,
    pub(super) leases: Table<Lease>,
    /// What is wrong now.
    pub(super) problems: BTreeSet<Problem>,
    /// What is ignored on purpose.
    pub(super) notes: BTreeSet<Problem>,
}

impl Snapshot {
    /// What the stream of `kind` tells: its own problems; those of whole files and unknown kinds go with Services.
    fn told<T: Kind>(&self) -> impl Iterator<Item = &Problem> {
        let other = |kind: &str| !OWN_STREAM.contains(&kind);
        self.problems
            .iter()
            .chain(&self.notes)
            .filter(move |p| p.kind == T::KIND || (T::KIND == "Service" && other(&p.kind)))
    }
}

/// Kinds whose problems are told by a stream of their own.
const OWN_STREAM: [&str; 6] =
    ["EndpointSlice", "Node", "Pod", "CiliumLoadBalancerIPPool", "CiliumL2AnnouncementPolicy", "Lease"];

/// The first events of a stream: a complete list, and what is wrong with it.
pub(super) fn initial<T: Kind>(now: &Snapshot) -> Vec<Event<T>> {
    let table = T::table(now);
    let mut events = Vec::with_capacity(table.len() + 2);
    events.push(Event::Init);
    events.extend(table.values().map(|object| Event::InitApply(T::clone(object))));
    events.push(Event::InitDone);
    events.extend(now.told::<T>().map(|problem| Event::Problem(problem.text.clone())));
    events
}

/// What changed for one kind between two moments; deletions first, so that what they held is free.
pub(super) fn difference<T: Kind>(before: &Snapshot, now: &Snapshot) -> Vec<Event<T>> {
    let (old, new) = (T::table(before), T::table(now));
    let mut events = Vec::new();
    events.extend(old.keys().filter(|key| !new.contains_key(*key)).map(|key| Event::Delete(key.clone())));
    for (key, object) in new {
        let same = old.get(key).is_some_and(|known| Arc::ptr_eq(known, object) || known == object);
        if !same {
            events.push(Event::Apply(T::clone(object)));
        }
    }
    let known: BTreeSet<&Problem> = before.told::<T>().collect();
    let fresh = now.told::<T>().filter(|problem| !known.contains(problem));
    events.extend(fresh.map(|problem| Event::Problem(problem.text.clone())));
    events
}
