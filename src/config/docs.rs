//! Files made from the table of keys: documentation, a commented ConfigMap, its schema. A test compares them with what
//! is committed; `KINESIN_BLESS=1` writes them.

use std::fmt::Write as _;

use super::keys::{self, KeyDef, Reload};
use super::known::WITHOUT_EFFECT;

/// Generated files: path in the repository and text.
pub fn files() -> Vec<(&'static str, String)> {
    vec![
        ("docs/configuration.md", documentation()),
        ("config/cilium-config.yaml", config_map()),
        ("config/cilium-config.schema.json", schema()),
    ]
}

/// Groups of keys, in order.
pub fn groups() -> Vec<(&'static str, Vec<&'static KeyDef>)> {
    let mut groups: Vec<(&str, Vec<&KeyDef>)> = Vec::new();
    for key in keys::all() {
        match groups.iter_mut().find(|(name, _)| *name == key.group) {
            Some((_, keys)) => keys.push(key),
            None => groups.push((key.group, vec![key])),
        }
    }
    groups
}

const INTRODUCTION: &str = "\
# Configuration

<!-- Generated from src/config/keys. To change it: KINESIN_BLESS=1 cargo test -p kinesin --lib config -->

A setting has one name everywhere: the key of the ConfigMap `cilium-config`, mounted as one file per key in
`--config-dir`; a flag (`--bpf-lb-algorithm=maglev`); an environment variable (`KINESIN_BPF_LB_ALGORITHM`, or with the
prefix `CILIUM_`). Flags win over the environment, the environment over the directory, the directory over the default.

Every key can change while the agent runs. *live* means that a change costs nothing, *reattach* that programs or maps
are made anew and replace the old ones; connections go on in both cases. Flags and the environment are fixed for the
life of the process, so what should change later belongs into the directory.

An invalid value never stops the agent: at start the default is used, later the last good value, and `kinesin status`
says which key, value and file it was. An unknown key is reported with the known one that looks most like it. Empty
values of types that cannot be empty count as not set. `kinesin config` shows what is in effect and where it was set.

The node's name is `K8S_NODE_NAME`, else the host's name.
";

fn documentation() -> String {
    let mut out = INTRODUCTION.to_string();
    for (group, keys) in groups() {
        // Writing to a String cannot fail.
        let _ = write!(out, "\n## {group}\n\n| Key | Default | Allowed | Change | Meaning |\n|---|---|---|---|---|\n");
        for key in keys {
            let default = if key.default.is_empty() { "empty".into() } else { format!("`{}`", key.default) };
            let alias = if key.alias.is_empty() { String::new() } else { format!(" Old name: `{}`.", key.alias) };
            let (name, doc, allowed, reload) = (key.name, key.doc, key.allowed(), reload(key));
            let _ = writeln!(out, "| `{name}` | {default} | {allowed} | {reload} | {doc}{alias} |");
        }
    }
    out.push_str("\n## Accepted, no effect\n\nKeys of Cilium's charts that may stay where they are:\n\n");
    let names: Vec<String> = WITHOUT_EFFECT.iter().map(|key| format!("`{key}`")).collect();
    out.push_str(&names.join(" · "));
    out.push('\n');
    out
}

fn reload(key: &KeyDef) -> &'static str {
    match key.reload {
        Reload::Live => "live",
        Reload::Reattach => "reattach",
    }
}

fn config_map() -> String {
    let mut out = String::from(
        "# Every key that has an effect, with its default. Uncomment what should differ and apply it: agents follow\n\
         # without a restart. Generated from src/config/keys; docs/configuration.md explains more.\n\
         apiVersion: v1\nkind: ConfigMap\nmetadata:\n  name: cilium-config\n  namespace: kube-system\ndata:\n",
    );
    for (group, keys) in groups() {
        let _ = write!(out, "  ## {group}\n\n");
        for key in keys {
            let _ = write!(
                out,
                "  # {}\n  # ({}; {})\n  # {}: {:?}\n\n",
                key.doc,
                key.allowed(),
                reload(key),
                key.name,
                key.default
            );
        }
    }
    // A map without entries would be null, which Kubernetes refuses nowhere but people stumble over.
    out.push_str("  # Keeps this map from being empty while everything above is a comment.\n  debug: \"false\"\n");
    out
}

fn schema() -> String {
    let mut properties = serde_json::Map::new();
    for key in keys::all() {
        let mut property = serde_json::Map::new();
        property.insert("type".into(), "string".into());
        property.insert("description".into(), format!("{} Allowed: {}.", key.doc, key.allowed()).into());
        property.insert("default".into(), key.default.into());
        if let Some(options) = key.kind.options() {
            // Bools have more spellings than the schema suggests.
            let name = if key.is_switch() { "examples" } else { "enum" };
            property.insert(name.into(), options.into());
        }
        properties.insert(key.name.into(), property.into());
    }
    for name in WITHOUT_EFFECT {
        let property = serde_json::json!({ "type": "string", "description": "Accepted, no effect." });
        properties.insert((*name).into(), property);
    }
    let schema = serde_json::json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "ConfigMap cilium-config as Kinesin reads it",
        "type": "object",
        "properties": { "data": { "type": "object", "properties": properties } },
    });
    let mut text = serde_json::to_string_pretty(&schema).unwrap_or_default();
    text.push('\n');
    text
}
