//! YAML text to objects, with the place of every error.
//!
//! A file is parsed once into a tree that knows its lines; objects are made from that. Deliberately absent: files (see
//! `scan.rs`), and strictness about unknown fields: the types are slim on purpose.

use std::fmt;

use kinesin_core::objects::{EndpointSlice, L2Policy, Meta, Node, ObjectKey, Pod, Pool, Service};
use serde::Deserialize;
use serde::de::{self, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::Value as Json;
use serde_path_to_error::{Path, Segment};
use serde_saphyr::Spanned;

use super::kinds::{AnyObject, Kind};

/// What a file contains.
#[derive(Debug, Default)]
pub(super) struct Reading {
    /// The good objects, in the order of the file.
    pub(super) objects: Vec<AnyObject>,
    /// The bad ones; while there are any, objects that were read from this file before stay.
    pub(super) problems: Vec<Problem>,
    /// What is ignored on purpose; costs nobody anything.
    pub(super) notes: Vec<Problem>,
}

/// Something to tell about the input.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Problem {
    /// The kind that it is about, so that it can be told once; empty when it concerns a whole file.
    pub(super) kind: String,
    /// One line: file, line, column, object, field, error, fix.
    pub(super) text: String,
}

/// A YAML node with its place in the file.
struct Tree {
    node: Content,
    line: u64,
    column: u64,
}

enum Content {
    Null,
    Bool(bool),
    Signed(i64),
    Unsigned(u64),
    Float(f64),
    Text(String),
    List(Vec<Tree>),
    Map(Vec<(String, Tree)>),
}

impl<'de> Deserialize<'de> for Tree {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let spanned = Spanned::<Content>::deserialize(deserializer)?;
        let at = spanned.referenced;
        Ok(Self { node: spanned.value, line: at.line(), column: at.column() })
    }
}

impl<'de> Deserialize<'de> for Content {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct NodeVisitor;
        impl<'de> Visitor<'de> for NodeVisitor {
            type Value = Content;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a YAML value")
            }
            fn visit_bool<E>(self, v: bool) -> Result<Content, E> {
                Ok(Content::Bool(v))
            }
            fn visit_i64<E>(self, v: i64) -> Result<Content, E> {
                Ok(Content::Signed(v))
            }
            fn visit_u64<E>(self, v: u64) -> Result<Content, E> {
                Ok(Content::Unsigned(v))
            }
            fn visit_f64<E>(self, v: f64) -> Result<Content, E> {
                Ok(Content::Float(v))
            }
            fn visit_str<E>(self, v: &str) -> Result<Content, E> {
                Ok(Content::Text(v.to_owned()))
            }
            fn visit_string<E>(self, v: String) -> Result<Content, E> {
                Ok(Content::Text(v))
            }
            fn visit_unit<E>(self) -> Result<Content, E> {
                Ok(Content::Null)
            }
            fn visit_none<E>(self) -> Result<Content, E> {
                Ok(Content::Null)
            }
            fn visit_some<D: Deserializer<'de>>(self, d: D) -> Result<Content, D::Error> {
                d.deserialize_any(self)
            }
            fn visit_newtype_struct<D: Deserializer<'de>>(self, d: D) -> Result<Content, D::Error> {
                d.deserialize_any(self)
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Content, A::Error> {
                let mut items = Vec::new();
                while let Some(item) = seq.next_element()? {
                    items.push(item);
                }
                Ok(Content::List(items))
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Content, A::Error> {
                let mut fields = Vec::new();
                while let Some(field) = map.next_entry::<String, Tree>()? {
                    fields.push(field);
                }
                Ok(Content::Map(fields))
            }
            fn visit_bytes<E: de::Error>(self, _: &[u8]) -> Result<Content, E> {
                Err(E::custom("binary values have no place in a manifest"))
            }
        }
        deserializer.deserialize_any(NodeVisitor)
    }
}

impl Tree {
    /// As JSON, with `null` fields left out: the API server reads them as absent.
    fn to_json(&self) -> Json {
        match &self.node {
            Content::Null => Json::Null,
            Content::Bool(v) => Json::Bool(*v),
            Content::Signed(v) => Json::from(*v),
            Content::Unsigned(v) => Json::from(*v),
            Content::Float(v) => serde_json::Number::from_f64(*v).map_or(Json::Null, Json::Number),
            Content::Text(v) => Json::String(v.clone()),
            Content::List(items) => items.iter().map(Tree::to_json).filter(|item| !item.is_null()).collect(),
            Content::Map(fields) => fields
                .iter()
                .map(|(key, value)| (key.clone(), value.to_json()))
                .filter(|(_, value)| !value.is_null())
                .collect(),
        }
    }

    fn field(&self, name: &str) -> Option<&Tree> {
        let Content::Map(fields) = &self.node else { return None };
        fields.iter().find(|(key, _)| key == name).map(|(_, value)| value)
    }

    fn text(&self, name: &str) -> &str {
        match self.field(name) {
            Some(Tree { node: Content::Text(text), .. }) => text,
            _ => "",
        }
    }

    /// The deepest node on the path.
    fn at(&self, path: &Path) -> &Tree {
        let mut tree = self;
        for segment in path {
            let next = match (segment, &tree.node) {
                (Segment::Seq { index }, Content::List(items)) => items.get(*index),
                (Segment::Map { key }, _) => tree.field(key),
                _ => None,
            };
            let Some(next) = next else { break };
            tree = next;
        }
        tree
    }
}

/// Limits against hostile YAML, with room for a cluster's worth of endpoints in one file.
fn options() -> serde_saphyr::Options {
    let mut options = serde_saphyr::Options::default();
    options.with_snippet = false;
    // `allowFirstLastIPs: No` is a string here; YAML 1.1's booleans surprise people.
    options.strict_booleans = true;
    if let Some(budget) = &mut options.budget {
        budget.max_events = 20_000_000;
        budget.max_nodes = 10_000_000;
        budget.max_documents = 100_000;
    }
    options
}

/// Reads a whole file. `file` is how errors name it.
pub(super) fn read(file: &str, text: &str) -> Reading {
    let mut reading = Reading::default();
    let documents: Vec<Tree> = match serde_saphyr::from_multiple_with_options(text, options()) {
        Ok(documents) => documents,
        Err(error) => {
            let place = error.location().map(|at| format!(":{}:{}", at.line(), at.column())).unwrap_or_default();
            let message = one_line(&error.without_snippet().to_string());
            reading.problems.push(Problem {
                kind: String::new(),
                text: format!("{file}{place}: {message}; what was read from this file before stays"),
            });
            return reading;
        }
    };
    for document in &documents {
        if !matches!(document.node, Content::Null) {
            read_document(file, document, None, &mut reading);
        }
    }
    reading
}

fn read_document(file: &str, tree: &Tree, item_kind: Option<(&str, &str)>, reading: &mut Reading) {
    let place = format!("{file}:{}:{}", tree.line, tree.column);
    let fault = |text: String| Problem { kind: String::new(), text: format!("{place}: {text}") };
    if !matches!(tree.node, Content::Map(_)) {
        reading.problems.push(fault("expected an object with apiVersion, kind and metadata".to_owned()));
        return;
    }
    let (default_version, default_kind) = item_kind.unwrap_or_default();
    let kind = Some(tree.text("kind")).filter(|k| !k.is_empty()).unwrap_or(default_kind);
    let version = Some(tree.text("apiVersion")).filter(|v| !v.is_empty()).unwrap_or(default_version);
    if kind.is_empty() || version.is_empty() {
        let missing = if kind.is_empty() { "kind" } else { "apiVersion" };
        reading.problems.push(fault(format!("{missing} is missing")));
        return;
    }
    if let (Some(of), Some(items)) = (kind.strip_suffix("List"), tree.field("items")) {
        match &items.node {
            // Items of a plain List carry their kind; those of a ServiceList may leave it out.
            Content::List(items) if item_kind.is_none() => {
                let inherited = if of.is_empty() { None } else { Some((version, of)) };
                for item in items {
                    read_document(file, item, Some(inherited.unwrap_or_default()), reading);
                }
            }
            Content::Null => {}
            Content::List(_) => reading.problems.push(fault(format!("{kind}: a List inside a List is not read"))),
            _ => reading.problems.push(fault(format!("{kind}: items: expected a list"))),
        }
        return;
    }
    match kind {
        "Service" => read_object::<Service>(file, tree, version, reading),
        "EndpointSlice" => read_object::<EndpointSlice>(file, tree, version, reading),
        "Node" => read_object::<Node>(file, tree, version, reading),
        "Pod" => read_object::<Pod>(file, tree, version, reading),
        "CiliumLoadBalancerIPPool" => read_object::<Pool>(file, tree, version, reading),
        "CiliumL2AnnouncementPolicy" => read_object::<L2Policy>(file, tree, version, reading),
        _ => reading.notes.push(Problem {
            kind: kind.to_owned(),
            text: format!("{place}: objects of kind {kind} ({version}) are not used and ignored"),
        }),
    }
}

fn read_object<T: Kind>(file: &str, tree: &Tree, version: &str, reading: &mut Reading) {
    let name = display_name::<T>(tree);
    let fault = |at: &Tree, text: String| Problem {
        kind: T::KIND.to_owned(),
        text: format!("{file}:{}:{}: {} {name}: {text}", at.line, at.column, T::KIND),
    };
    if !T::API_VERSIONS.contains(&version) {
        let known = T::API_VERSIONS.join(" or ");
        let at = tree.field("apiVersion").unwrap_or(tree);
        reading.problems.push(fault(at, format!("apiVersion: {version} is not read; write {known}")));
        return;
    }
    let mut object: T = match serde_path_to_error::deserialize(tree.to_json()) {
        Ok(object) => object,
        Err(error) => {
            let at = tree.at(error.path());
            let message = explain(&error.inner().to_string());
            reading.problems.push(fault(at, format!("{}: {message}", error.path())));
            return;
        }
    };
    if let Err((field, message)) = check_names(object.meta(), T::NAMESPACED) {
        let at = tree.field("metadata").map_or(tree, |meta| meta.field(field).unwrap_or(meta));
        reading.problems.push(fault(at, format!("metadata.{field}: {message}")));
        return;
    }
    if let Some(at) = tree.field("spec").and_then(|spec| spec.field("cidrs"))
        && T::KIND == "CiliumLoadBalancerIPPool"
    {
        let text = "spec.cidrs: not a field of this kind any more; write spec.blocks with a cidr each";
        reading.notes.push(fault(at, text.to_owned()));
    }
    object.complete();
    reading.objects.extend(object.wrap());
}

fn display_name<T: Kind>(tree: &Tree) -> ObjectKey {
    let Some(meta) = tree.field("metadata") else { return ObjectKey::new("", "(no name)") };
    let name = Some(meta.text("name")).filter(|n| !n.is_empty()).unwrap_or("(no name)");
    match (T::NAMESPACED, meta.text("namespace")) {
        (false, _) => ObjectKey::new("", name),
        (true, "") => ObjectKey::new("default", name),
        (true, namespace) => ObjectKey::new(namespace, name),
    }
}

/// Names become file names and keys: only what the API server would take.
pub(super) fn check_names(meta: &Meta, namespaced: bool) -> Result<(), (&'static str, String)> {
    if meta.name.is_empty() {
        return Err(("name", "is missing".to_owned()));
    }
    if !is_dns_subdomain(&meta.name) {
        return Err(("name", format!("\"{}\" {DNS_RULE}", meta.name)));
    }
    if namespaced && !meta.namespace.is_empty() && !is_dns_subdomain(&meta.namespace) {
        return Err(("namespace", format!("\"{}\" {DNS_RULE}", meta.namespace)));
    }
    Ok(())
}

const DNS_RULE: &str = "is not a valid name; use at most 253 lower-case letters, digits, - and ., beginning and ending with a letter or digit";

/// RFC 1123 section 2.1, as Kubernetes applies it to object names.
pub(super) fn is_dns_subdomain(name: &str) -> bool {
    name.len() <= 253
        && name.split('.').all(|label| {
            !label.is_empty()
                && label.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
                && !label.starts_with('-')
                && !label.ends_with('-')
        })
}

/// serde's words in a user's words.
pub(in crate::source) fn explain(message: &str) -> String {
    let message = one_line(message)
        .replace("expected u16", "expected a number from 0 to 65535")
        .replace("expected u32", "expected a whole number that is not negative")
        .replace("expected i64", "expected a whole number")
        .replace("expected a sequence", "expected a list")
        .replace("expected struct ", "expected an object: ")
        .replace("expected a map", "expected an object");
    let message = message.split(" at line ").next().unwrap_or_default().to_owned();
    let wants_text = message.contains("expected a string") || message.contains("expected a Unicode string");
    if wants_text && !message.contains("map,") && !message.contains("sequence,") {
        return format!("{message}; put the value in quotes");
    }
    message
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Whether objects of this kind are read from manifests.
pub(super) fn is_known_kind(kind: &str) -> bool {
    matches!(
        kind,
        "Service" | "EndpointSlice" | "Node" | "Pod" | "CiliumLoadBalancerIPPool" | "CiliumL2AnnouncementPolicy"
    )
}
