//! Labels, annotations and selectors: small maps of which there are several in every object.
//!
//! A sorted list without spare room: 16 bytes, and 32 for each pair with its key shared ([`Name`]). A tree's smallest node
//! takes 544. Deliberately absent: fast insertion. Maps are read as a whole and then only looked at.

use std::fmt;
use std::ops::Index;

use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use smol_str::SmolStr;

use super::Name;

/// A map from strings to strings, in order of its keys.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct StringMap(Box<[(Name, SmolStr)]>);

impl StringMap {
    /// An empty map.
    pub fn new() -> Self {
        Self::default()
    }

    /// Number of pairs.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are no pairs.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&SmolStr> {
        self.place(key).ok().map(|at| &self.0[at].1)
    }

    /// Whether there is such a key.
    pub fn contains_key(&self, key: &str) -> bool {
        self.place(key).is_ok()
    }

    /// All pairs, sorted by key.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &SmolStr)> {
        self.0.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// Sets the value of a key. O(pairs).
    pub fn insert(&mut self, key: Name, value: SmolStr) {
        match self.place(&key) {
            Ok(at) => self.0[at].1 = value,
            Err(at) => self.edit(|pairs| pairs.insert(at, (key, value))),
        }
    }

    /// Removes a key. O(pairs).
    pub fn remove(&mut self, key: &str) {
        if let Ok(at) = self.place(key) {
            self.edit(|pairs| drop(pairs.remove(at)));
        }
    }

    /// Keeps the pairs whose key is wanted. O(pairs).
    pub fn retain(&mut self, wanted: impl Fn(&str) -> bool) {
        if !self.0.iter().all(|(key, _)| wanted(key)) {
            self.edit(|pairs| pairs.retain(|(key, _)| wanted(key)));
        }
    }

    /// Removes everything.
    pub fn clear(&mut self) {
        self.0 = Box::default();
    }

    fn place(&self, key: &str) -> Result<usize, usize> {
        self.0.binary_search_by(|(known, _)| known.as_str().cmp(key))
    }

    fn edit(&mut self, change: impl FnOnce(&mut Vec<(Name, SmolStr)>)) {
        let mut pairs = std::mem::take(&mut self.0).into_vec();
        change(&mut pairs);
        self.0 = pairs.into_boxed_slice();
    }
}

impl Index<&str> for StringMap {
    type Output = SmolStr;

    /// Panics when there is no such key: for tests and for keys that were just seen.
    fn index(&self, key: &str) -> &SmolStr {
        self.get(key).expect("the map has the key")
    }
}

impl FromIterator<(Name, SmolStr)> for StringMap {
    /// Of a key that comes several times, the last value stands.
    fn from_iter<I: IntoIterator<Item = (Name, SmolStr)>>(pairs: I) -> Self {
        let mut pairs: Vec<(Name, SmolStr)> = pairs.into_iter().collect();
        // Stable, so that the last of equal keys is the last still.
        pairs.sort_by(|a, b| a.0.cmp(&b.0));
        pairs.dedup_by(|later, earlier| {
            let same = later.0 == earlier.0;
            if same {
                std::mem::swap(later, earlier);
            }
            same
        });
        Self(pairs.into_boxed_slice())
    }
}

impl<const N: usize> From<[(Name, SmolStr); N]> for StringMap {
    fn from(pairs: [(Name, SmolStr); N]) -> Self {
        pairs.into_iter().collect()
    }
}

impl fmt::Debug for StringMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.iter()).finish()
    }
}

impl Serialize for StringMap {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.iter())
    }
}

impl<'de> Deserialize<'de> for StringMap {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Pairs;

        impl<'de> Visitor<'de> for Pairs {
            type Value = StringMap;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<StringMap, A::Error> {
                let mut pairs: Vec<(Name, SmolStr)> = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(pairs.into_iter().collect())
            }
        }

        deserializer.deserialize_map(Pairs)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Against the standard library's map, which has the same meaning and another layout.
        #[test]
        fn it_is_a_map(steps in prop::collection::vec((0u8..4, "[a-c]{0,2}", "[x-z]{0,2}"), 0..40)) {
            let (mut map, mut model) = (StringMap::new(), BTreeMap::<String, String>::new());
            for (step, key, value) in steps {
                match step {
                    0 | 1 => {
                        map.insert(key.as_str().into(), value.as_str().into());
                        model.insert(key, value);
                    }
                    2 => {
                        map.remove(&key);
                        model.remove(&key);
                    }
                    _ => {
                        map.retain(|known| known != key);
                        model.retain(|known, _| *known != key);
                    }
                }
                let pairs: Vec<_> = map.iter().map(|(k, v)| (k.to_owned(), v.to_string())).collect();
                prop_assert_eq!(pairs, model.clone().into_iter().collect::<Vec<_>>());
                for key in ["", "a", "ab", "c"] {
                    prop_assert_eq!(map.get(key).map(SmolStr::as_str), model.get(key).map(String::as_str));
                }
            }
            let text = serde_json::to_string(&map).unwrap();
            prop_assert_eq!(&text, &serde_json::to_string(&model).unwrap());
            prop_assert_eq!(serde_json::from_str::<StringMap>(&text).unwrap(), map);
        }
    }

    #[test]
    fn the_last_of_equal_keys_stands() {
        let map: StringMap = serde_json::from_str(r#"{"b": "1", "a": "2", "b": "3", "b": "4"}"#).unwrap();
        assert_eq!(map.iter().map(|(k, v)| (k, v.as_str())).collect::<Vec<_>>(), [("a", "2"), ("b", "4")]);
    }
}
