//! `metav1.LabelSelector`.

#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};
use smol_str::SmolStr;

use crate::objects::{Meta, StringMap, null_default};

/// Label under which selectors see a Service's namespace.
pub const SERVICE_NAMESPACE_LABEL: &str = "io.kubernetes.service.namespace";
/// Label under which selectors see a Service's name.
pub const SERVICE_NAME_LABEL: &str = "io.kubernetes.service.name";

/// Requirements, all of which must hold; an empty selector selects everything.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", default)]
pub struct LabelSelector {
    /// Labels with exactly these values.
    #[serde(deserialize_with = "null_default", skip_serializing_if = "StringMap::is_empty")]
    #[cfg_attr(feature = "schema", schemars(with = "std::collections::BTreeMap<String, String>"))]
    pub match_labels: StringMap,
    /// Set-based requirements.
    #[serde(deserialize_with = "null_default", skip_serializing_if = "Vec::is_empty")]
    pub match_expressions: Vec<Requirement>,
}

/// An element of `matchExpressions`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct Requirement {
    /// The label.
    #[cfg_attr(feature = "schema", schemars(with = "String"))]
    pub key: SmolStr,
    /// `In`, `NotIn`, `Exists`, `DoesNotExist`
    #[cfg_attr(feature = "schema", schemars(with = "String"))]
    pub operator: SmolStr,
    /// For `In` and `NotIn`.
    #[serde(deserialize_with = "null_default", skip_serializing_if = "Vec::is_empty")]
    #[cfg_attr(feature = "schema", schemars(with = "Vec<String>"))]
    pub values: Vec<SmolStr>,
}

/// Why a selector selects nothing at all.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SelectorError {
    /// An operator that `metav1.LabelSelector` does not have.
    #[error("matchExpressions[{index}]: \"{operator}\" is not an operator; use In, NotIn, Exists or DoesNotExist")]
    Operator {
        /// Position in `matchExpressions`.
        index: usize,
        /// As written.
        operator: SmolStr,
    },
    /// `In` and `NotIn` without values, `Exists` and `DoesNotExist` with some.
    #[error("matchExpressions[{index}]: {operator} {problem}")]
    Values {
        /// Position in `matchExpressions`.
        index: usize,
        /// As written.
        operator: SmolStr,
        /// What to change.
        problem: &'static str,
    },
}

impl LabelSelector {
    /// Finds errors in the requirements, as the API server would for its own kinds.
    pub fn validate(&self) -> Result<(), SelectorError> {
        for (index, requirement) in self.match_expressions.iter().enumerate() {
            let operator = requirement.operator.clone();
            let problem = match (operator.as_str(), requirement.values.is_empty()) {
                ("In" | "NotIn", true) => "needs at least one value",
                ("Exists" | "DoesNotExist", false) => "takes no values",
                ("In" | "NotIn", false) | ("Exists" | "DoesNotExist", true) => continue,
                _ => return Err(SelectorError::Operator { index, operator }),
            };
            return Err(SelectorError::Values { index, operator, problem });
        }
        Ok(())
    }

    /// Whether the labels that `label` looks up meet every requirement. An invalid requirement matches nothing.
    pub fn matches<'a>(&self, label: impl Fn(&str) -> Option<&'a str>) -> bool {
        self.match_labels.iter().all(|(key, value)| label(key) == Some(value.as_str()))
            && self.match_expressions.iter().all(|requirement| {
                let value = label(&requirement.key);
                let listed = value.is_some_and(|v| requirement.values.iter().any(|candidate| candidate == v));
                match requirement.operator.as_str() {
                    "In" => listed,
                    "NotIn" => !listed,
                    "Exists" => value.is_some(),
                    "DoesNotExist" => value.is_none(),
                    _ => false,
                }
            })
    }

    /// Matches a Service's labels together with the two that selectors see for its namespace and name.
    pub fn matches_service(&self, service: &Meta) -> bool {
        self.matches(|key| match key {
            SERVICE_NAMESPACE_LABEL => Some(service.namespace.as_str()),
            SERVICE_NAME_LABEL => Some(service.name.as_str()),
            _ => service.labels.get(key).map(SmolStr::as_str),
        })
    }

    /// Matches an object's own labels.
    pub fn matches_labels(&self, labels: &StringMap) -> bool {
        self.matches(|key| labels.get(key).map(SmolStr::as_str))
    }
}
