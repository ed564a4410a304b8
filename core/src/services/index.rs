//! Which slices belong to which Service.

use std::collections::HashMap;
use std::sync::Arc;

use super::ServiceKey;
use crate::objects::{EndpointSlice, Object, ObjectKey};

/// The slices of every Service, so that an edit of one touches that Service only.
///
/// Slices are shared with whoever delivered them (`Arc`), so the index itself costs about 200 bytes a slice. An endpoint
/// inside is 56 bytes (a test holds this), the names of nodes and zones being shared: 250,000 endpoints are 14 MB, once per
/// agent.
#[derive(Debug, Default)]
pub struct SliceIndex {
    /// By slice.
    owners: HashMap<ObjectKey, ServiceKey>,
    /// By Service, sorted by name, so that iteration has one order. Nearly always one: a tree's smallest node has room for
    /// eleven.
    slices: HashMap<ServiceKey, Vec<Arc<EndpointSlice>>>,
}

impl SliceIndex {
    /// Takes a new or changed slice. Returns the Services to compile again: none when nothing changed or when the slice
    /// names no Service (R38), two when it moved from one to another.
    pub fn upsert(&mut self, slice: Arc<EndpointSlice>) -> Vec<ServiceKey> {
        let key = slice.key();
        let service = slice.service().filter(|service| !service.name.is_empty());
        let before = self.owners.get(&key);
        if let Some(owner) = before
            && service.as_ref() == Some(owner)
            && self.known(owner, &key).is_some_and(|old| same(old, &slice))
        {
            // Only metadata changed. The old object is let go all the same.
            self.store(owner.clone(), slice);
            return Vec::new();
        }
        let mut dirty = Vec::new();
        if before.is_some() && before != service.as_ref() {
            dirty.extend(self.remove(&key));
        }
        if let Some(service) = service {
            self.owners.insert(key, service.clone());
            self.store(service.clone(), slice);
            dirty.push(service);
        }
        dirty
    }

    /// Forgets a slice. Returns the Service to compile again, if it had one.
    pub fn remove(&mut self, slice: &ObjectKey) -> Option<ServiceKey> {
        let service = self.owners.remove(slice)?;
        if let Some(slices) = self.slices.get_mut(&service) {
            slices.retain(|known| known.metadata.name != slice.name);
            if slices.is_empty() {
                self.slices.remove(&service);
            }
        }
        Some(service)
    }

    /// A Service's slices in order of their names.
    pub fn slices(&self, service: &ServiceKey) -> impl Iterator<Item = &EndpointSlice> {
        self.slices.get(service).into_iter().flatten().map(Arc::as_ref)
    }

    /// Every slice that belongs to a Service, by key.
    pub fn keys(&self) -> impl Iterator<Item = &ObjectKey> {
        self.owners.keys()
    }

    /// How many slices belong to a Service.
    pub fn len(&self) -> usize {
        self.owners.len()
    }

    /// Whether no slice belongs to a Service.
    pub fn is_empty(&self) -> bool {
        self.owners.is_empty()
    }

    fn known(&self, service: &ServiceKey, slice: &ObjectKey) -> Option<&Arc<EndpointSlice>> {
        self.slices.get(service)?.iter().find(|known| known.metadata.name == slice.name)
    }

    fn store(&mut self, service: ServiceKey, slice: Arc<EndpointSlice>) {
        let slices = self.slices.entry(service).or_insert_with(|| Vec::with_capacity(1));
        match slices.binary_search_by(|known| known.metadata.name.cmp(&slice.metadata.name)) {
            Ok(at) => slices[at] = slice,
            Err(at) => slices.insert(at, slice),
        }
    }
}

/// Whether two versions of a slice mean the same.
fn same(a: &EndpointSlice, b: &EndpointSlice) -> bool {
    a.address_type == b.address_type && a.ports == b.ports && a.endpoints == b.endpoints
}
