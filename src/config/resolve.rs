//! From what was written to what it means: defaults, precedence, validation, and what to do on a reload.

use sha2::{Digest, Sha256};
use thiserror::Error;

use super::inputs::{self, Inputs, Raw, Written};
use super::keys::{self, KeyDef};
use super::known;
use super::model::Config;
use super::report::{Invalid, Report, Setting, Unknown};
use super::rules;

/// Why the agent cannot run with what was written.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ConfigError {
    /// Keys contradict each other.
    #[error("{0}")]
    Contradiction(String),
    /// The node has no name.
    #[error("this node has no name: set the environment variable K8S_NODE_NAME")]
    NoNodeName,
}

/// The outcome of a reload.
#[derive(Clone, Debug, PartialEq)]
pub struct Reloaded {
    /// What to run with.
    pub config: Config,
    /// What became of each key.
    pub report: Report,
    /// Names of the keys whose effective value changed, in the order of the documentation.
    pub changed_keys: Vec<&'static str>,
}

/// Where a value comes from that nobody wrote.
const DEFAULT: &str = "default";
const LAST_GOOD: &str = "last good value";

/// Reads the configuration for the first time. An invalid value is replaced by the key's default and reported.
///
/// # Errors
/// Only when running is impossible; the message names the keys and the fix.
pub fn load(inputs: &Inputs) -> Result<(Config, Report), ConfigError> {
    let (written, failure) = inputs::read(inputs);
    let mut report = Report::default();
    report.warnings.extend(failure.map(|failure| format!("{failure}; running without it")));
    let mut config = resolve(written, inputs, &defaults(), DEFAULT, &mut report);
    if config.node_name.is_empty() {
        return Err(ConfigError::NoNodeName);
    }
    if let Some(contradiction) = rules::contradiction(&config) {
        return Err(ConfigError::Contradiction(contradiction.message));
    }
    report.warnings.extend(rules::adjust(&mut config));
    finish(&mut config, &mut report);
    Ok((config, report))
}

/// Reads the configuration again. An invalid value, and values that contradict each other, keep their last good value;
/// while the config dir cannot be read, all do.
pub fn reload(inputs: &Inputs, last_good: &Config) -> Reloaded {
    let (written, failure) = inputs::read(inputs);
    let mut report = Report::default();
    if let Some(failure) = failure {
        report.warnings.push(format!("{failure}; keeping the last good configuration"));
        let mut config = last_good.clone();
        for key in keys::all() {
            report.settings.push(setting(key, LAST_GOOD));
        }
        finish(&mut config, &mut report);
        return Reloaded { config, report, changed_keys: Vec::new() };
    }
    let raw = written.keys.clone();
    let mut config = resolve(written, inputs, last_good, LAST_GOOD, &mut report);
    if config.node_name.is_empty() {
        config.node_name.clone_from(&last_good.node_name);
    }
    // Each round makes one rule hold for good: the last good values satisfied it. The bound is the number of keys.
    for _ in keys::all() {
        let Some(contradiction) = rules::contradiction(&config) else { break };
        for name in contradiction.keys {
            let Some(key) = keys::find(name) else { continue };
            let used = key.kind.show(&mut last_good.clone());
            if key.kind.show(&mut config) == used {
                continue;
            }
            key.kind.set(&used, &mut config);
            let (value, source) = match raw.get(*name) {
                Some(Raw { value, source }) => (value.clone(), source.clone()),
                None => (key.default.to_string(), DEFAULT.to_string()),
            };
            let allowed = format!("usable: {}", contradiction.message);
            report.invalid.push(Invalid { key: name.to_string(), value, source, allowed, used });
            if let Some(setting) = report.settings.iter_mut().find(|s| s.key == *name) {
                setting.source = LAST_GOOD.into();
            }
        }
    }
    report.warnings.extend(rules::adjust(&mut config));
    finish(&mut config, &mut report);
    let changed_keys = changes(&config, last_good);
    Reloaded { config, report, changed_keys }
}

/// Every key's default.
pub(super) fn defaults() -> Config {
    let mut config = Config::default();
    for key in keys::all() {
        let good = key.kind.set(key.default, &mut config);
        debug_assert!(good, "default of {}", key.name);
    }
    config
}

/// Applies what was written to the defaults; what is invalid is taken from `fallback`.
fn resolve(written: Written, inputs: &Inputs, fallback: &Config, fallback_name: &str, report: &mut Report) -> Config {
    let Written { keys: mut raw, warnings } = written;
    report.warnings.extend(warnings);
    let mut config = defaults();
    let mut fallback = fallback.clone();
    for key in keys::all() {
        let mut source = DEFAULT.to_string();
        if let Some(written) = raw.remove(key.name)
            && (!written.value.is_empty() || key.kind.takes_empty())
        {
            if key.kind.set(&written.value, &mut config) {
                source = written.source;
            } else {
                let used = key.kind.show(&mut fallback);
                key.kind.set(&used, &mut config);
                source = fallback_name.to_string();
                report.invalid.push(Invalid {
                    key: key.name.into(),
                    value: written.value,
                    source: written.source,
                    allowed: key.allowed(),
                    used,
                });
            }
        }
        report.settings.push(setting(key, &source));
    }
    for (key, Raw { source, .. }) in raw {
        if known::is_without_effect(&key) {
            report.accepted_without_effect.push(key);
        } else {
            let nearest = inputs::nearest(&key).map(|(name, _)| name.to_string());
            report.unknown.push(Unknown { key, source, nearest });
        }
    }
    let name = inputs.env.get("K8S_NODE_NAME").map(|name| name.trim()).filter(|name| !name.is_empty());
    // Kubernetes registers a node under its host's name in lower case.
    config.node_name = name.map_or_else(|| inputs.hostname.trim().to_lowercase(), String::from);
    config
}

/// A setting whose value [`finish`] fills in.
fn setting(key: &KeyDef, source: &str) -> Setting {
    Setting { key: key.name.into(), value: String::new(), source: source.into(), reload: key.reload }
}

/// Writes down the effective values and their hash.
fn finish(config: &mut Config, report: &mut Report) {
    let mut hash = Sha256::new();
    for (key, setting) in keys::all().zip(&mut report.settings) {
        setting.value = key.kind.show(config);
        hash.update(format!("{}={}\n", key.name, setting.value));
    }
    let digest = hash.finalize();
    config.generation = digest.iter().take(6).map(|byte| format!("{byte:02x}")).collect();
}

fn changes(new: &Config, old: &Config) -> Vec<&'static str> {
    let (mut new, mut old) = (new.clone(), old.clone());
    keys::all().filter(|key| key.kind.show(&mut new) != key.kind.show(&mut old)).map(|key| key.name).collect()
}
