//! What the API server sends, to objects; one bad object never costs the others.
//!
//! The fast way parses straight into the slim types. Only when that fails is the text parsed again as JSON of any shape, to
//! find out which object it was, where it is wrong, and to keep the rest.

use kinesin_core::objects::{
    EndpointSlice, L2Policy, Lease, Node, Object, ObjectKey, Pod, Pool, SERVICE_NAME_LABEL, Service, null_default,
};
use kube::core::Status;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use smol_str::SmolStr;

use super::Shared;
use crate::source::IPAM_CONDITION;

/// Annotation with a copy of the whole manifest.
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";
/// Annotation on the bookmark that ends the list of a streaming list.
const INITIAL_EVENTS_END: &str = "k8s.io/initial-events-end";

/// A kind that is watched.
pub(super) trait Kind: Object + DeserializeOwned {
    /// Keeps the conditions that Kinesin may write, for when it does.
    fn remember_conditions(&self, _: &Shared) {}
    /// Drops what only tools read and nobody here uses.
    fn slim(&mut self) {}
}

impl Kind for Service {
    fn remember_conditions(&self, shared: &Shared) {
        let ours = self.status.conditions.iter().find(|c| c.kind == IPAM_CONDITION);
        shared.conditions().remember_service(self.key(), ours);
    }
}
impl Kind for Pool {
    fn remember_conditions(&self, shared: &Shared) {
        shared.conditions().remember_custom(Self::KIND, self.metadata.name.clone(), &self.status.conditions);
    }
}
impl Kind for L2Policy {
    fn remember_conditions(&self, shared: &Shared) {
        shared.conditions().remember_custom(Self::KIND, self.metadata.name.clone(), &self.status.conditions);
    }
}
impl Kind for EndpointSlice {
    fn slim(&mut self) {
        // Nearly always there, of no use here, and a slice is the object of which there are most.
        self.metadata.annotations.clear();
        self.metadata.labels.retain(|label| label == SERVICE_NAME_LABEL);
    }
}
impl Kind for Node {}
impl Kind for Pod {}
impl Kind for Lease {}

/// An object that cannot be used.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Bad {
    pub(super) key: ObjectKey,
    /// Kind, key, field, error.
    pub(super) text: String,
}

/// One line of a watch.
#[derive(Debug)]
pub(super) enum Line<T> {
    Added(T),
    Deleted {
        key: ObjectKey,
        version: SmolStr,
    },
    Bookmark {
        version: SmolStr,
        ends_list: bool,
    },
    /// The object may still be the last good one that was delivered before.
    Bad {
        bad: Bad,
        version: SmolStr,
    },
    Error(Box<Status>),
    /// Not a watch event at all.
    Noise(String),
}

/// A page of a list.
#[derive(Debug)]
pub(super) struct Page<T> {
    pub(super) objects: Vec<T>,
    pub(super) bad: Vec<Bad>,
    pub(super) version: SmolStr,
    /// Empty on the last page.
    pub(super) next: String,
}

#[derive(Deserialize)]
struct RawLine<T> {
    #[serde(rename = "type")]
    kind: SmolStr,
    object: T,
}

#[derive(Deserialize)]
#[serde(bound = "T: Deserialize<'de>")]
struct RawList<T> {
    #[serde(default, deserialize_with = "null_default")]
    metadata: ListMeta,
    #[serde(default = "Vec::new", deserialize_with = "null_items")]
    items: Vec<T>,
}

fn null_items<'de, D: serde::Deserializer<'de>, T: Deserialize<'de>>(d: D) -> Result<Vec<T>, D::Error> {
    Ok(Option::deserialize(d)?.unwrap_or_default())
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct ListMeta {
    #[serde(deserialize_with = "null_default")]
    resource_version: SmolStr,
    #[serde(rename = "continue", deserialize_with = "null_default")]
    next: String,
}

/// Reads one line of a watch.
pub(super) fn line<T: Kind>(text: &[u8]) -> Line<T> {
    match serde_json::from_slice::<RawLine<T>>(text) {
        Ok(RawLine { kind, object }) if matches!(kind.as_str(), "ADDED" | "MODIFIED") => match arrive(object) {
            Ok(object) => Line::Added(object),
            Err(bad) => Line::Bad { bad, version: SmolStr::default() },
        },
        Ok(RawLine { kind, object }) if kind == "DELETED" => {
            let version = object.meta().resource_version.clone();
            Line::Deleted { key: key_of::<T>(&object.meta().namespace, &object.meta().name), version }
        }
        _ => slow_line(text),
    }
}

/// Bookmarks, errors, and objects that do not fit.
fn slow_line<T: Kind>(text: &[u8]) -> Line<T> {
    let noise = || {
        let shown = String::from_utf8_lossy(&text[..text.len().min(200)]).into_owned();
        Line::Noise(format!("{}: not a watch event: {shown}", T::KIND))
    };
    let Ok(RawLine { kind, object }) = serde_json::from_slice::<RawLine<Value>>(text) else {
        // Some proxies answer with a bare Status.
        return match serde_json::from_slice::<Status>(text) {
            Ok(status) if status.code != 0 => Line::Error(status.boxed()),
            _ => noise(),
        };
    };
    let meta = &object["metadata"];
    let version = SmolStr::new(meta["resourceVersion"].as_str().unwrap_or_default());
    match kind.as_str() {
        "ADDED" | "MODIFIED" => match object_from::<T>(object) {
            Ok(object) => Line::Added(object),
            Err(bad) => Line::Bad { bad, version },
        },
        "DELETED" => Line::Deleted { key: raw_key::<T>(&object), version },
        "BOOKMARK" => Line::Bookmark { version, ends_list: meta["annotations"][INITIAL_EVENTS_END] == "true" },
        "ERROR" => match serde_json::from_value::<Status>(object) {
            Ok(status) => Line::Error(status.boxed()),
            Err(_) => noise(),
        },
        _ => noise(),
    }
}

/// Reads a page of a list.
pub(super) fn page<T: Kind>(text: &[u8]) -> Result<Page<T>, serde_json::Error> {
    let (mut objects, mut bad) = (Vec::new(), Vec::new());
    let mut take = |outcome: Result<T, Bad>| match outcome {
        Ok(object) => objects.push(object),
        Err(wrong) => bad.push(wrong),
    };
    let metadata = match serde_json::from_slice::<RawList<T>>(text) {
        Ok(list) => {
            list.items.into_iter().map(arrive).for_each(&mut take);
            list.metadata
        }
        Err(_) => {
            let list = serde_json::from_slice::<RawList<Value>>(text)?;
            list.items.into_iter().map(object_from).for_each(&mut take);
            list.metadata
        }
    };
    Ok(Page { objects, bad, version: metadata.resource_version, next: metadata.next })
}

/// Reads a single object.
pub(super) fn object<T: Kind>(text: &[u8]) -> Result<T, String> {
    match serde_json::from_slice::<T>(text) {
        Ok(object) => arrive(object).map_err(|bad| bad.text),
        Err(_) => {
            let raw = serde_json::from_slice::<Value>(text).map_err(|error| error.to_string())?;
            object_from(raw).map_err(|bad| bad.text)
        }
    }
}

fn object_from<T: Kind>(mut raw: Value) -> Result<T, Bad> {
    let key = raw_key::<T>(&raw);
    drop_nulls(&mut raw);
    match serde_path_to_error::deserialize::<_, T>(raw) {
        Ok(object) => arrive(object),
        Err(error) => {
            let message = crate::source::manifests::explain(&error.inner().to_string());
            let text = format!("{} {key}: {}: {message}; its last good version stays", T::KIND, error.path());
            Err(Bad { key, text })
        }
    }
}

/// Normalises an object on arrival.
fn arrive<T: Kind>(mut object: T) -> Result<T, Bad> {
    let meta = object.meta_mut();
    if meta.name.is_empty() {
        let text = format!("{} in {}: metadata.name is missing", T::KIND, meta.namespace);
        return Err(Bad { key: ObjectKey::default(), text });
    }
    if !T::NAMESPACED {
        meta.namespace = SmolStr::default();
    }
    meta.annotations.remove(LAST_APPLIED);
    object.slim();
    Ok(object)
}

/// Go reads `null` as "not said", whatever the type.
fn drop_nulls(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            fields.retain(|_, field| !field.is_null());
            fields.values_mut().for_each(drop_nulls);
        }
        Value::Array(items) => {
            items.retain(|item| !item.is_null());
            items.iter_mut().for_each(drop_nulls);
        }
        _ => {}
    }
}

fn key_of<T: Kind>(namespace: &str, name: &str) -> ObjectKey {
    ObjectKey::new(if T::NAMESPACED { namespace } else { "" }, name)
}

fn raw_key<T: Kind>(raw: &Value) -> ObjectKey {
    let text = |field: &str| raw["metadata"][field].as_str().unwrap_or_default();
    key_of::<T>(text("namespace"), text("name"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn read<T: Kind>(kind: &str, object: Value) -> Line<T> {
        line(json!({"type": kind, "object": object}).to_string().as_bytes())
    }

    #[test]
    fn objects_arrive_without_what_only_tools_read() {
        let Line::Added(service) = read::<Service>(
            "ADDED",
            json!({"metadata": {"name": "a", "namespace": "b", "managedFields": [{"manager": "x"}],
                   "annotations": {LAST_APPLIED: "{}", "keep": "me"}}}),
        ) else {
            panic!("expected an object")
        };
        assert_eq!(service.metadata.annotations.len(), 1);
        let Line::Added(pool) =
            read::<Pool>("MODIFIED", json!({"metadata": {"name": "p", "namespace": "kube-system"}}))
        else {
            panic!("expected an object")
        };
        assert_eq!(pool.key(), ObjectKey::new("", "p"));
    }

    #[test]
    fn nulls_mean_absent() {
        let object = json!({"metadata": {"name": "a", "creationTimestamp": null, "uid": null}, "addressType": null,
                            "ports": null, "endpoints": [{"addresses": ["10.0.0.1"], "nodeName": null, "conditions": {"ready": null}}]});
        assert!(matches!(read::<EndpointSlice>("ADDED", object), Line::Added(slice) if slice.endpoints.len() == 1));
    }

    #[test]
    fn a_bad_object_is_named_with_its_field() {
        let object =
            json!({"metadata": {"name": "a", "namespace": "b", "resourceVersion": "7"}, "ports": [{"port": "http"}]});
        let Line::Bad { bad, version } = read::<EndpointSlice>("MODIFIED", object) else {
            panic!("expected a problem")
        };
        assert_eq!(bad.key, ObjectKey::new("b", "a"));
        assert_eq!(version, "7");
        assert!(
            bad.text.starts_with("EndpointSlice b/a: ports[0].port: ") && bad.text.contains("http"),
            "{}",
            bad.text
        );
    }

    #[test]
    fn bookmarks_and_errors_are_not_mistaken_for_objects() {
        // An EndpointSlice would accept both.
        let bookmark = json!({"kind": "EndpointSlice", "metadata": {"resourceVersion": "9", "creationTimestamp": null,
                              "annotations": {INITIAL_EVENTS_END: "true"}}, "endpoints": null});
        assert!(matches!(read::<EndpointSlice>("BOOKMARK", bookmark),
                         Line::Bookmark { version, ends_list: true } if version == "9"));
        let error = json!({"kind": "Status", "metadata": {}, "status": "Failure", "reason": "Expired", "code": 410});
        assert!(matches!(read::<EndpointSlice>("ERROR", error), Line::Error(status) if status.code == 410));
    }

    #[test]
    fn one_bad_item_does_not_cost_the_list() {
        let list = json!({"metadata": {"resourceVersion": "5", "continue": "more"}, "items": [
            {"metadata": {"name": "a", "namespace": "x"}},
            {"metadata": {"name": "b", "namespace": "x"}, "spec": {"ports": [{"port": "http"}]}},
            {"metadata": {"name": "c", "namespace": "x", "labels": null}}]});
        let page = page::<Service>(list.to_string().as_bytes()).unwrap();
        assert_eq!(page.objects.iter().map(|s| s.metadata.name.as_str()).collect::<Vec<_>>(), ["a", "c"]);
        assert!(page.bad[0].text.contains("x/b: spec.ports[0].port"), "{:?}", page.bad);
        assert_eq!((page.version.as_str(), page.next.as_str()), ("5", "more"));
        assert!(super::page::<Service>(br#"{"items": null}"#).unwrap().objects.is_empty());
    }

    fn arbitrary() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Into::into),
            any::<i64>().prop_map(Into::into),
            "[a-zA-Z0-9.:/]{0,8}".prop_map(Into::into),
        ];
        let key = prop::sample::select(vec![
            "metadata",
            "name",
            "namespace",
            "spec",
            "status",
            "ports",
            "port",
            "endpoints",
            "addresses",
            "conditions",
            "annotations",
            "resourceVersion",
            "blocks",
            "taints",
            "type",
            "object",
            "items",
            "ready",
            "hints",
            "forZones",
            "containers",
            "hostPort",
            "podIPs",
        ]);
        leaf.prop_recursive(5, 48, 6, move |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::vec((key.clone(), inner), 0..6)
                    .prop_map(|fields| Value::Object(fields.into_iter().map(|(k, v)| (k.to_owned(), v)).collect())),
            ]
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn no_answer_makes_the_reader_panic(
            kind in prop::sample::select(vec!["ADDED", "MODIFIED", "DELETED", "BOOKMARK", "ERROR", "?"]),
            value in arbitrary(),
            cut in 0usize..400,
        ) {
            fn all<T: Kind>(text: &[u8], list: &[u8]) {
                line::<T>(text);
                let _ = page::<T>(list);
                let _ = object::<T>(list);
            }
            let mut text = json!({"type": kind, "object": value}).to_string().into_bytes();
            let list = json!({"metadata": {}, "items": [value]}).to_string().into_bytes();
            if cut < text.len() {
                text.truncate(cut);
            }
            all::<Service>(&text, &list);
            all::<EndpointSlice>(&text, &list);
            all::<Node>(&text, &list);
            all::<Pod>(&text, &list);
            all::<Pool>(&text, &list);
            all::<L2Policy>(&text, &list);
            all::<Lease>(&text, &list);
        }
    }
}
