//! The keys that have an effect. Everything else about them is derived from these tables: see the module's header.

mod cluster;
mod maps;
mod node;
mod services;

use super::value::Kind;

/// A key of the configuration.
pub struct KeyDef {
    /// The file's name in the config directory, the flag, and (upper case, `_`) the environment variable.
    pub name: &'static str,
    /// An older name that means the same, or empty.
    pub alias: &'static str,
    /// Heading in documentation and help.
    pub group: &'static str,
    /// As it would be written.
    pub default: &'static str,
    /// What it does, one line.
    pub doc: &'static str,
    /// What a change of it costs.
    pub reload: Reload,
    /// The type and the place.
    pub(super) kind: Kind,
}

/// What applying a changed value costs. No key needs a restart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reload {
    /// Nothing: whoever uses it reads the new value.
    Live,
    /// Programs or maps are made anew and replace the old ones; connections go on.
    Reattach,
}

impl KeyDef {
    /// What may be written.
    pub fn allowed(&self) -> String {
        self.kind.allowed()
    }

    /// The type's short name, as a flag's placeholder.
    pub fn type_name(&self) -> &'static str {
        self.kind.name()
    }

    /// Whether the flag may stand alone, meaning `true`.
    pub fn is_switch(&self) -> bool {
        matches!(self.kind, Kind::Bool(_) | Kind::OptionalBool(_))
    }

    /// Whether several values make one.
    pub fn is_list(&self) -> bool {
        matches!(self.kind, Kind::Words(_) | Kind::Urls(_) | Kind::Cidrs(_))
    }

    /// The environment variable, with the preferred prefix.
    pub fn env(&self) -> String {
        format!("KINESIN_{}", self.name.to_uppercase().replace('-', "_"))
    }
}

/// Every key that has an effect, in the order of the documentation.
pub fn all() -> impl Iterator<Item = &'static KeyDef> + Clone {
    [node::KEYS, services::KEYS, maps::KEYS, cluster::KEYS].into_iter().flatten()
}

/// The key called `name`, which may be an alias.
pub fn find(name: &str) -> Option<&'static KeyDef> {
    all().find(|key| key.name == name || (!key.alias.is_empty() && key.alias == name))
}

const fn live(group: &'static str, name: &'static str, default: &'static str, kind: Kind, doc: &'static str) -> KeyDef {
    KeyDef { name, alias: "", group, default, doc, reload: Reload::Live, kind }
}

const fn reattach(
    group: &'static str,
    name: &'static str,
    default: &'static str,
    kind: Kind,
    doc: &'static str,
) -> KeyDef {
    KeyDef { name, alias: "", group, default, doc, reload: Reload::Reattach, kind }
}

/// Of two tables.
const SERVICES: &str = "Services";
