//! A level: one value that somebody keeps up to date and others follow.
//!
//! The same contract as [`crate::table`], for a single value: the latest wins, a burst is one wake-up.

use std::sync::Arc;

use crate::table::{Subscription, Table};

/// A shared value, absent until it is first set. Clones refer to the same value.
pub struct Level<V> {
    table: Table<(), V>,
}

impl<V> Clone for Level<V> {
    fn clone(&self) -> Self {
        Self { table: self.table.clone() }
    }
}

impl<V: PartialEq + Send + Sync + 'static> Default for Level<V> {
    fn default() -> Self {
        Self { table: Table::default() }
    }
}

impl<V: PartialEq + Send + Sync + 'static> Level<V> {
    /// A level that has a value from the start.
    pub fn with(value: V) -> Self {
        let level = Self::default();
        level.set(value);
        level
    }

    /// Sets the value; an equal one wakes nobody. Returns whether it changed.
    pub fn set(&self, value: V) -> bool {
        self.table.put((), value)
    }

    /// The latest value.
    pub fn get(&self) -> Option<Arc<V>> {
        self.table.get(&())
    }

    /// Calls `wake` now (if there is a value) and after every change, see [`Table::subscribe`].
    pub fn follow(&self, wake: impl Fn() + Send + Sync + 'static) -> Follower<V> {
        Follower(self.table.subscribe(wake))
    }
}

/// A subscription to a level. Dropping it ends it.
pub struct Follower<V>(Subscription<(), V>);

impl<V: PartialEq + Send + Sync + 'static> Follower<V> {
    /// The latest value, if it changed since the last call.
    pub fn changed(&self) -> Option<Arc<V>> {
        self.0.take().into_iter().find_map(|(_, value)| value)
    }
}
