use std::sync::Arc;

use proptest::prelude::*;
use serde_json::json;

use super::{http, pods, slice};
use crate::objects::{Endpoint, EndpointSlice, ObjectKey};
use crate::services::SliceIndex;

fn named(name: &str, service: Option<&str>, pod: &str) -> Arc<EndpointSlice> {
    let mut slice = slice(name, json!([{"name": "http", "port": 8080}]), pods(&[pod]));
    slice.metadata.labels.clear();
    if let Some(service) = service {
        slice.metadata.labels.insert("kubernetes.io/service-name".into(), service.into());
    }
    Arc::new(slice)
}

fn key(name: &str) -> ObjectKey {
    ObjectKey::new("default", name)
}

fn names(index: &SliceIndex, service: &str) -> Vec<String> {
    index.slices(&key(service)).map(|slice| slice.metadata.name.to_string()).collect()
}

#[test]
fn an_edit_makes_its_service_dirty_and_no_other() {
    let mut index = SliceIndex::default();
    assert_eq!(index.upsert(named("a", Some("web"), "10.42.0.1")), [key("web")]);
    assert_eq!(index.upsert(named("b", Some("web"), "10.42.0.2")), [key("web")]);
    assert_eq!(index.upsert(named("c", Some("db"), "10.42.0.3")), [key("db")]);
    assert_eq!(names(&index, "web"), ["a", "b"]);
    assert_eq!(index.upsert(named("a", Some("web"), "10.42.0.9")), [key("web")]);
    assert_eq!(index.upsert(named("a", Some("web"), "10.42.0.9")), [], "nothing changed");
    assert_eq!(index.remove(&key("a")), Some(key("web")));
    assert_eq!(index.remove(&key("a")), None);
    assert_eq!(names(&index, "web"), ["b"]);
}

#[test]
fn a_slice_that_changes_its_label_makes_both_services_dirty() {
    let mut index = SliceIndex::default();
    index.upsert(named("a", Some("web"), "10.42.0.1"));
    assert_eq!(index.upsert(named("a", Some("db"), "10.42.0.1")), [key("web"), key("db")]);
    assert_eq!((names(&index, "web"), names(&index, "db")), (vec![], vec!["a".to_owned()]));
    assert_eq!(index.upsert(named("a", None, "10.42.0.1")), [key("db")]);
    assert!(index.is_empty());
}

#[test]
fn r38_a_slice_without_the_label_belongs_to_nobody() {
    let mut index = SliceIndex::default();
    assert_eq!(index.upsert(named("a", None, "10.42.0.1")), []);
    assert_eq!(index.upsert(named("b", Some(""), "10.42.0.1")), []);
    assert_eq!(index.len(), 0);
}

#[test]
fn slices_are_shared_not_copied() {
    let mut index = SliceIndex::default();
    let slice = Arc::new(http(&["10.42.0.1"]));
    index.upsert(slice.clone());
    assert_eq!(Arc::strong_count(&slice), 2);
    assert!(std::ptr::eq(index.slices(&key("web")).next().expect("there"), &*slice));
}

#[test]
fn an_endpoint_costs_little_memory() {
    // See `SliceIndex`: 250,000 of them in 14 MB.
    assert!(size_of::<Endpoint>() <= 56, "{}", size_of::<Endpoint>());
    assert_eq!(size_of::<smol_str::SmolStr>(), 24);
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_index_holds_what_the_last_edits_say(edits in prop::collection::vec((0usize..4, prop::option::of(prop::option::of(0usize..3))), 0..30)) {
        let (slices, services) = (["a", "b", "c", "d"], ["x", "y", "z"]);
        let mut index = SliceIndex::default();
        let mut last = std::collections::BTreeMap::new();
        for (slice, edit) in edits {
            let before = last.get(&slice).copied().flatten();
            match edit {
                Some(service) => {
                    let dirty = index.upsert(named(slices[slice], service.map(|i: usize| services[i]), "10.42.0.1"));
                    prop_assert_eq!(!dirty.is_empty(), before != service);
                    last.insert(slice, service);
                }
                None => {
                    prop_assert_eq!(index.remove(&key(slices[slice])), before.map(|i| key(services[i])));
                    last.remove(&slice);
                }
            }
        }
        for (i, service) in services.iter().enumerate() {
            let expected: Vec<_> = last.iter().filter(|(_, s)| **s == Some(i)).map(|(slice, _)| slices[*slice].to_owned()).collect();
            prop_assert_eq!(names(&index, service), expected);
        }
        prop_assert_eq!(index.len(), last.values().flatten().count());
        prop_assert!(index.keys().all(|key| last.contains_key(&slices.iter().position(|name| *name == key.name).expect("known"))));
    }
}
