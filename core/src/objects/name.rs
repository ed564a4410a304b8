//! Strings that thousands of objects repeat: names of nodes and zones, keys of labels.
//!
//! Equal names share one allocation, and each place that holds one costs a pointer. The table of those in use is global:
//! objects are read on several threads, and what a name *is* does not depend on it.
//!
//! Deliberately absent: an order or a hash of addresses. A name behaves like its text everywhere.

use std::borrow::Borrow;
use std::cmp::Ordering;
use std::collections::HashSet;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::ops::Deref;
use std::sync::{Arc, Mutex, PoisonError};

use serde::de::Visitor;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use smol_str::SmolStr;

/// A shared string; 8 bytes. The empty one has no allocation.
#[derive(Clone, Default)]
pub struct Name(Option<Shared>);

/// Twice boxed, so that a name is one word.
#[derive(Clone)]
struct Shared(Arc<Box<str>>);

impl Borrow<str> for Shared {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl PartialEq for Shared {
    fn eq(&self, other: &Self) -> bool {
        *self.0 == *other.0
    }
}

impl Eq for Shared {}

impl Hash for Shared {
    fn hash<H: Hasher>(&self, state: &mut H) {
        str::hash(&self.0, state);
    }
}

/// The names in use, and how many there may be before those that nobody holds any more are looked for.
struct Names {
    all: Option<HashSet<Shared>>,
    sweep_at: usize,
}

/// Fewer than this many are never swept.
const SWEEP_FROM: usize = 1_024;

static NAMES: Mutex<Names> = Mutex::new(Names { all: None, sweep_at: SWEEP_FROM });

impl Name {
    /// The name with this text.
    pub fn new(text: &str) -> Self {
        if text.is_empty() {
            return Self(None);
        }
        // A set is as good after a panic as before.
        let mut names = NAMES.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = names.all.get_or_insert_default().get(text) {
            return Self(Some(known.clone()));
        }
        if names.all.as_ref().is_some_and(|all| all.len() >= names.sweep_at) {
            names.sweep();
        }
        let shared = Shared(Arc::new(text.into()));
        names.all.get_or_insert_default().insert(shared.clone());
        Self(Some(shared))
    }

    /// Its text.
    pub fn as_str(&self) -> &str {
        self.0.as_ref().map_or("", |shared| &shared.0)
    }
}

impl Names {
    /// Drops the names that only the table holds. Nobody can take one up meanwhile: that needs the table. The next sweep
    /// comes when there are twice as many, so its cost is spread over the names that came since.
    fn sweep(&mut self) {
        let all = self.all.get_or_insert_default();
        all.retain(|shared| Arc::strong_count(&shared.0) > 1);
        all.shrink_to_fit();
        self.sweep_at = (2 * all.len()).max(SWEEP_FROM);
    }
}

impl Deref for Name {
    type Target = str;

    fn deref(&self) -> &str {
        self.as_str()
    }
}

impl Borrow<str> for Name {
    fn borrow(&self) -> &str {
        self
    }
}

impl PartialEq for Name {
    fn eq(&self, other: &Self) -> bool {
        match (&self.0, &other.0) {
            // Nearly always the same allocation; a name that was swept and came back while an old holder lived on is not.
            (Some(a), Some(b)) => Arc::ptr_eq(&a.0, &b.0) || a == b,
            (None, None) => true,
            _ => false,
        }
    }
}

impl Eq for Name {}

impl PartialEq<str> for Name {
    fn eq(&self, other: &str) -> bool {
        self.as_str() == other
    }
}

impl PartialEq<&str> for Name {
    fn eq(&self, other: &&str) -> bool {
        self.as_str() == *other
    }
}

impl PartialEq<SmolStr> for Name {
    fn eq(&self, other: &SmolStr) -> bool {
        self.as_str() == other.as_str()
    }
}

impl Hash for Name {
    fn hash<H: Hasher>(&self, state: &mut H) {
        str::hash(self, state);
    }
}

impl PartialOrd for Name {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Name {
    fn cmp(&self, other: &Self) -> Ordering {
        self.as_str().cmp(other)
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self)
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.as_str(), f)
    }
}

impl From<&str> for Name {
    fn from(text: &str) -> Self {
        Self::new(text)
    }
}

impl From<SmolStr> for Name {
    fn from(text: SmolStr) -> Self {
        Self::new(&text)
    }
}

impl From<&Name> for SmolStr {
    fn from(name: &Name) -> Self {
        Self::new(name.as_str())
    }
}

impl Serialize for Name {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self)
    }
}

impl<'de> Deserialize<'de> for Name {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;

        impl Visitor<'_> for Text {
            type Value = Name;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Name, E> {
                Ok(Name::new(text))
            }
        }

        // Not through another type: errors name the field by the key that was read like this.
        deserializer.deserialize_str(Text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_names_share_one_allocation_and_take_a_word_each() {
        let (a, b) = (Name::new("node-1"), Name::from(SmolStr::new("node-1")));
        assert!(Arc::ptr_eq(&a.0.as_ref().unwrap().0, &b.0.as_ref().unwrap().0));
        assert_eq!(size_of::<Name>(), size_of::<usize>());
        assert_eq!(Name::new(""), Name::default());
        assert!(Name::default().0.is_none());
    }

    #[test]
    fn names_behave_like_their_text() {
        let mut sorted = ["b", "", "a", "ab"].map(Name::new);
        sorted.sort();
        assert_eq!(sorted, ["", "a", "ab", "b"]);
        assert!(HashSet::from([Name::new("x")]).contains("x"));
        let read: Vec<Name> = serde_json::from_str(r#"["plain", "esc\u0061ped"]"#).unwrap();
        assert_eq!(read, ["plain", "escaped"]);
        assert_eq!(serde_json::to_string(&read).unwrap(), r#"["plain","escaped"]"#);
    }

    #[test]
    fn names_that_nobody_holds_are_forgotten_and_held_ones_are_not() {
        let held: Vec<Name> = (0..10).map(|n| Name::new(&format!("held-{n}"))).collect();
        for n in 0..20 * SWEEP_FROM {
            Name::new(&format!("passing-{n}"));
        }
        let known = || NAMES.lock().unwrap().all.as_ref().map_or(0, HashSet::len);
        assert!(known() < 10 * SWEEP_FROM, "{}", known());
        for (n, name) in held.iter().enumerate() {
            let again = Name::new(&format!("held-{n}"));
            assert!(Arc::ptr_eq(&name.0.as_ref().unwrap().0, &again.0.as_ref().unwrap().0));
        }
    }
}
