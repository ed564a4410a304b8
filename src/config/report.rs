//! What became of each key that was written: for the log, for status, and for `kinesin config`.

use serde::{Deserialize, Serialize};

use super::keys::Reload;

/// The outcome of reading a configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Report {
    /// Known keys of Cilium that change nothing here, sorted.
    pub accepted_without_effect: Vec<String>,
    /// Keys that nobody knows.
    pub unknown: Vec<Unknown>,
    /// Values that could not be used.
    pub invalid: Vec<Invalid>,
    /// Values that were used in another way than written, and combinations that will not do what they seem to.
    pub warnings: Vec<String>,
    /// Every effective setting and where it came from, in the order of the documentation.
    pub settings: Vec<Setting>,
}

/// A key that nobody knows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unknown {
    /// As written.
    pub key: String,
    /// File, environment variable or flag.
    pub source: String,
    /// The known key that looks most like it.
    pub nearest: Option<String>,
}

/// A value that could not be used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Invalid {
    /// The key.
    pub key: String,
    /// As written.
    pub value: String,
    /// File, environment variable or flag.
    pub source: String,
    /// What may be written instead.
    pub allowed: String,
    /// What is used.
    pub used: String,
}

/// One effective setting.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setting {
    /// The key.
    pub key: String,
    /// The effective value.
    pub value: String,
    /// File, environment variable, flag, or `default`; `last good value` after an invalid one.
    pub source: String,
    /// What a change costs.
    pub reload: Reload,
}

impl Report {
    /// Whether everything that was written is understood and used as written.
    pub fn is_clean(&self) -> bool {
        self.unknown.is_empty() && self.invalid.is_empty() && self.warnings.is_empty()
    }

    /// Everything that an operator should look at, one line each; what only has no effect is left out.
    pub fn problems(&self) -> Vec<String> {
        let invalid = self.invalid.iter().map(|i| i.to_string());
        let unknown = self.unknown.iter().map(|u| u.to_string());
        invalid.chain(unknown).chain(self.warnings.iter().cloned()).collect()
    }

    /// Writes the report to the log: one warning per problem, and one line for all keys without effect.
    pub fn log(&self) {
        for problem in self.problems() {
            tracing::warn!(problem, "configuration");
        }
        if !self.accepted_without_effect.is_empty() {
            tracing::info!(keys = self.accepted_without_effect.join(" "), "configuration keys accepted, no effect");
        }
    }
}

impl std::fmt::Display for Unknown {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "unknown key {} ({})", self.key, self.source)?;
        match &self.nearest {
            Some(nearest) => write!(f, ": did you mean {nearest}?"),
            None => f.write_str(": see `kinesin agent --help` for the keys"),
        }
    }
}

impl std::fmt::Display for Invalid {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { key, value, source, allowed, used } = self;
        write!(f, "{key}={value:?} ({source}) is not {allowed}; using {used:?}")
    }
}
