//! Which slices belong to which Service, kept as slices come and go.
//!
//! State: one `Arc` and one key per slice, twice a map entry; nothing per endpoint.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use super::ServiceKey;
use crate::objects::{EndpointSlice, ObjectKey};

/// The index.
#[derive(Debug, Default)]
pub struct SliceIndex {
    by_service: HashMap<ServiceKey, BTreeMap<ObjectKey, Arc<EndpointSlice>>>,
    service_of: HashMap<ObjectKey, ServiceKey>,
}

impl SliceIndex {
    /// A slice as it is now. Returns the Services that it concerns: two, when its label changed.
    pub fn upsert(&mut self, key: ObjectKey, slice: Arc<EndpointSlice>) -> Vec<ServiceKey> {
        let service = slice.service();
        let mut dirty = Vec::new();
        if self.service_of.get(&key) != service.as_ref() {
            dirty.extend(self.remove(&key));
        }
        if let Some(service) = service {
            self.service_of.insert(key.clone(), service.clone());
            self.by_service.entry(service.clone()).or_default().insert(key, slice);
            dirty.push(service);
        }
        dirty
    }

    /// A slice is gone. Returns the Service that it concerned, if any.
    pub fn remove(&mut self, key: &ObjectKey) -> Vec<ServiceKey> {
        let Some(service) = self.service_of.remove(key) else { return Vec::new() };
        if let Some(slices) = self.by_service.get_mut(&service) {
            slices.remove(key);
            if slices.is_empty() {
                self.by_service.remove(&service);
            }
        }
        vec![service]
    }

    /// A Service's slices, by key.
    pub fn slices_of(&self, service: &ServiceKey) -> impl Iterator<Item = &Arc<EndpointSlice>> {
        self.by_service.get(service).into_iter().flat_map(BTreeMap::values)
    }
}
