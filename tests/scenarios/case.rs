//! Case files: one YAML stream, read from top to bottom.
//!
//! | Document | Meaning |
//! |---|---|
//! | an object (`kind: …`) | is applied, in the next step |
//! | a ConfigMap `cilium-config` | its `data` is the configuration from that step on |
//! | `delete: [Service default/web]` | is deleted, in the next step |
//! | `devices: {lan0: [192.168.1.10/24]}` | the node's devices |
//! | `only: manifests`, `because: …` | the API server refuses some of it |
//! | `expect: \|` and lines | ends a step; what the agent must show after it |
//!
//! Deliberately absent: names of nodes. Every case is run as the node `here`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

/// The environment variable that makes runs write what they see into the case files.
pub const REWRITE: &str = "KINESIN_SCENARIOS_REWRITE";

/// One file.
#[derive(Debug, Default)]
pub struct Case {
    /// The only source that it is run over.
    pub only: Option<String>,
    pub steps: Vec<Step>,
}

/// What is done at once, and what is to be seen then.
#[derive(Debug, Default)]
pub struct Step {
    pub apply: Vec<Value>,
    /// Kind, namespace, name.
    pub delete: Vec<(String, String, String)>,
    /// Keys of the configuration, those of the steps before included.
    pub config: Option<BTreeMap<String, String>>,
    /// Addresses by device.
    pub devices: Option<BTreeMap<String, Vec<String>>>,
    pub expect: String,
}

/// All case files, sorted.
pub fn files() -> Vec<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/scenarios/cases");
    let mut found = Vec::new();
    for section in std::fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().path()) {
        found.extend(std::fs::read_dir(section).unwrap().map(|entry| entry.unwrap().path()));
    }
    found.retain(|path| path.extension().is_some_and(|extension| extension == "yaml"));
    found.sort();
    found
}

/// `3.5/terminating`
pub fn name(path: &Path) -> String {
    let part = |part: Option<&std::ffi::OsStr>| part.unwrap_or_default().to_string_lossy().into_owned();
    format!("{}/{}", part(path.parent().and_then(Path::file_name)), part(path.file_stem()))
}

/// `tests/scenarios/README.md` names every case file, under the heading of its section or with the section before it.
pub fn every_case_is_in_the_table_of_rules() -> Result<()> {
    let table = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/scenarios/README.md"))?;
    let mut named = std::collections::BTreeSet::new();
    let mut section = "";
    for line in table.lines() {
        if let Some(title) = line.strip_prefix("## ") {
            section = title.split(' ').next().unwrap_or_default();
        }
        for word in line.split('`').skip(1).step_by(2) {
            named.insert(if word.contains('/') { word.to_owned() } else { format!("{section}/{word}") });
        }
    }
    let missing: Vec<String> = files().iter().map(|path| name(path)).filter(|name| !named.contains(name)).collect();
    ensure!(missing.is_empty(), "tests/scenarios/README.md says of no rule that these show it: {missing:?}");
    Ok(())
}

/// Reads a case file.
pub fn read(path: &Path) -> Result<Case> {
    let text = std::fs::read_to_string(path)?;
    parse(&text).with_context(|| path.display().to_string())
}

fn parse(text: &str) -> Result<Case> {
    let documents: Vec<Value> = serde_saphyr::from_multiple(text)?;
    let mut case = Case::default();
    let mut step = Step::default();
    for document in documents.into_iter().filter(|document| !document.is_null()) {
        let Value::Object(fields) = &document else { bail!("a document is no object: {document}") };
        if let Some(kind) = fields.get("kind") {
            if kind == "ConfigMap" {
                step.config = Some(strings(&fields["data"]).context("the data of the ConfigMap")?);
            } else {
                step.apply.push(document);
            }
        } else if let Some(expect) = fields.get("expect") {
            step.expect = expect.as_str().context("expect: is a text")?.to_owned();
            case.steps.push(std::mem::take(&mut step));
        } else if let Some(names) = fields.get("delete") {
            step.delete = serde_json::from_value::<Vec<String>>(names.clone())?
                .iter()
                .map(|name| key(name))
                .collect::<Result<_>>()?;
        } else if let Some(devices) = fields.get("devices") {
            step.devices = Some(serde_json::from_value(devices.clone())?);
        } else if let Some(only) = fields.get("only") {
            ensure!(fields.get("because").is_some_and(Value::is_string), "only: needs a because:");
            case.only = Some(only.as_str().context("only: is a text")?.to_owned());
        } else {
            bail!("what is this? {document}");
        }
    }
    ensure!(step.apply.is_empty() && step.delete.is_empty(), "the last step has no expect:");
    ensure!(!case.steps.is_empty(), "there is no expect:");
    Ok(case)
}

fn strings(value: &Value) -> Result<BTreeMap<String, String>> {
    Ok(serde_json::from_value(value.clone())?)
}

/// `Service default/web`, `Node here`
fn key(text: &str) -> Result<(String, String, String)> {
    let (kind, name) = text.split_once(' ').with_context(|| format!("delete: {text:?} is not a kind and a name"))?;
    let (namespace, name) = name.split_once('/').unwrap_or(("", name));
    Ok((kind.into(), namespace.into(), name.into()))
}

/// The file with other expectations, one for each step; everything else stays as it is, comments too.
pub fn rewritten(text: &str, expectations: &[String]) -> String {
    let mut out = String::new();
    let mut expectations = expectations.iter();
    let mut skipping = false;
    for line in text.lines() {
        if line.starts_with("expect:") {
            out.push_str("expect: |\n");
            for expected in expectations.next().into_iter().flat_map(|text| text.lines()) {
                out.push_str(if expected.is_empty() { "" } else { "  " });
                out.push_str(expected);
                out.push('\n');
            }
            skipping = true;
        } else if !skipping || line.starts_with("---") || line.starts_with('#') {
            skipping = false;
            out.push_str(line);
            out.push('\n');
        }
    }
    out
}
