//! Odd objects from the API server's own schema: every field of a kind, absent, null, empty, or with a value that nobody
//! expects.

use std::collections::BTreeSet;

use anyhow::{Context, Result};
use serde_json::{Map, Value, json};

/// A place in an object, and what its schema says of it.
#[derive(Clone, Debug)]
pub struct Field {
    /// Names from the root; `0` is the first element of a list.
    pub path: Vec<String>,
    schema: Value,
}

/// Deeper than any field that the agent reads.
const DEPTH: usize = 7;

/// Every field below a schema of an OpenAPI v3 document, in order of their paths.
pub fn fields(document: &Value, name: &str) -> Result<Vec<Field>> {
    let schemas = &document["components"]["schemas"];
    let root = schemas.get(name).with_context(|| format!("the API server has no schema {name}"))?;
    let mut found = Vec::new();
    walk(schemas, root, &mut Vec::new(), &mut found, &mut BTreeSet::new());
    Ok(found)
}

fn walk(schemas: &Value, schema: &Value, path: &mut Vec<String>, found: &mut Vec<Field>, above: &mut BTreeSet<String>) {
    // `$ref`, or `allOf` with one, is a type of its own; one inside itself has nothing new to say.
    let reference = schema["$ref"].as_str().or_else(|| schema["allOf"][0]["$ref"].as_str());
    if let Some(name) = reference.and_then(|text| text.rsplit('/').next()) {
        if above.insert(name.to_owned()) {
            walk(schemas, &schemas[name], path, found, above);
            above.remove(name);
        }
        return;
    }
    if !path.is_empty() {
        found.push(Field { path: path.clone(), schema: schema.clone() });
    }
    if path.len() >= DEPTH {
        return;
    }
    let mut below = |name: &str, schema: &Value| {
        path.push(name.to_owned());
        walk(schemas, schema, path, found, above);
        path.pop();
    };
    for (name, schema) in schema["properties"].as_object().into_iter().flatten() {
        below(name, schema);
    }
    if schema["items"].is_object() {
        below("0", &schema["items"]);
    }
    if schema["additionalProperties"].is_object() {
        below("odd-key", &schema["additionalProperties"]);
    }
}

impl Field {
    /// `spec.ports[0].port`
    pub fn text(&self) -> String {
        let mut text = String::new();
        for name in &self.path {
            match name.as_str() {
                "0" => text.push_str("[0]"),
                name if text.is_empty() => text.push_str(name),
                name => text.push_str(&format!(".{name}")),
            }
        }
        text
    }

    /// The last name in it that is no number.
    pub fn name(&self) -> &str {
        self.path.iter().rev().find(|name| *name != "0").map_or("", |name| name)
    }

    /// Whether an object has the field.
    pub fn is_in(&self, object: &Value) -> bool {
        object.pointer(&format!("/{}", self.path.join("/"))).is_some()
    }

    /// What stands in the field; `None` is nothing at all.
    pub fn values(&self) -> Vec<Option<Value>> {
        let mut values = vec![None, Some(Value::Null)];
        let long = "x".repeat(300);
        let odd = match self.schema["type"].as_str() {
            Some("integer" | "number") => {
                json!([0, -1, 1, 65_535, 65_536, 2_147_483_648u32, i64::MAX, u64::MAX, 1.5, "80", "", true])
            }
            Some("boolean") => json!([true, false, "true", 0, "", []]),
            Some("array") => json!([[], [null], [[]], [{}, {}], ["", ""], ["x", "x"], {}, "", 7]),
            Some("object") => json!([{}, {"": ""}, {"odd": null}, {"kubernetes.io/service-name": ""}, [], "", 7]),
            // Strings, and what may be a number or a string.
            _ => json!([
                "",
                " ",
                "None",
                "none",
                "tcp",
                "TRUE",
                "Local ",
                "ß\u{202e}\u{301}",
                "\u{0}",
                "a\nb",
                long,
                "-1",
                "65536",
                "255.255.255.256",
                "::ffff:10.0.0.1",
                "0.0.0.0",
                "::",
                "127.0.0.1",
                "224.0.0.1",
                "fe80::1%eth0",
                "10.0.0.1/33",
                "2026-13-41T25:61:61Z",
                7,
                70_000,
                -7,
                true,
                {},
                []
            ]),
        };
        values.extend(odd.as_array().into_iter().flatten().cloned().map(Some));
        values
    }

    /// Puts the value there. Parents that are missing, or of another shape, are made.
    pub fn put(&self, object: &mut Value, value: Option<Value>) {
        let (last, parents) = self.path.split_last().expect("the root is no field");
        let mut at = object;
        for (name, next) in parents.iter().zip(&self.path[1..]) {
            at = step(at, name);
            let list = next == "0";
            if list != at.is_array() || (!list && !at.is_object()) {
                *at = if list { json!([]) } else { Value::Object(Map::new()) };
            }
        }
        match (at, value) {
            (Value::Object(fields), None) => drop(fields.remove(last)),
            (Value::Array(items), None) => items.clear(),
            (at, Some(value)) => *step(at, last) = value,
            (_, None) => {}
        }
    }
}

fn step<'a>(at: &'a mut Value, name: &str) -> &'a mut Value {
    match at {
        Value::Array(items) => {
            if items.is_empty() {
                items.push(Value::Null);
            }
            &mut items[0]
        }
        other => &mut other[name],
    }
}
