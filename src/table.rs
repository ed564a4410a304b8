//! Tables: the levels that actors share.
//!
//! A table holds the latest value of each key and tells its subscribers *which keys* changed, never how often: a burst of
//! a thousand writes to one key is one entry in each subscriber's set and one wake-up. So nothing here can grow beyond
//! the number of keys, a slow or restarted consumer misses nothing, and the cost of a change does not depend on the size
//! of the table.
//!
//! Deliberately absent: history, transactions, waiting for a consumer.
//!
//! Cost per row: the key twice (and a time) while it is dirty, one `Arc`. Cost per change: one reading of the clock, one
//! shard lock and one short mutex per subscriber.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::hash::Hash;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::Instant;

use dashmap::DashMap;

use crate::sync::lock;

/// What a key must be able to do.
pub trait Key: Clone + Eq + Hash + Ord + Send + Sync + fmt::Debug + 'static {}
impl<K: Clone + Eq + Hash + Ord + Send + Sync + fmt::Debug + 'static> Key for K {}

/// A shared map from keys to their latest values. Clones refer to the same table.
pub struct Table<K, V> {
    inner: Arc<Inner<K, V>>,
}

struct Inner<K, V> {
    rows: DashMap<K, Arc<V>>,
    subscribers: Mutex<Vec<Weak<Mailbox<K>>>>,
    /// Whether the first complete list has arrived; until then nothing may be pruned on account of this table.
    complete: AtomicBool,
}

struct Mailbox<K> {
    /// What changed, and since when the oldest of its changes waits.
    dirty: Mutex<HashMap<K, Instant>>,
    /// Set while a wake-up is on its way, so that it is sent once.
    woken: AtomicBool,
    wake: Box<dyn Fn() + Send + Sync>,
}

impl<K, V> Clone for Table<K, V> {
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone() }
    }
}

impl<K: Key, V: PartialEq + Send + Sync + 'static> Default for Table<K, V> {
    fn default() -> Self {
        let inner = Inner { rows: DashMap::new(), subscribers: Mutex::default(), complete: AtomicBool::new(false) };
        Self { inner: Arc::new(inner) }
    }
}

impl<K: Key, V: PartialEq + Send + Sync + 'static> Table<K, V> {
    /// Sets the value of a key. Returns whether anything changed; an equal value wakes nobody.
    pub fn put(&self, key: K, value: V) -> bool {
        self.put_since(key, value, Instant::now())
    }

    /// [`Self::put`] of a value that follows from a change made at `since`: subscribers that ask how old a change is
    /// ([`Subscription::take_since`]) see the time of its cause.
    pub fn put_since(&self, key: K, value: V, since: Instant) -> bool {
        if self.inner.rows.get(&key).is_some_and(|old| **old == value) {
            return false;
        }
        self.inner.rows.insert(key.clone(), Arc::new(value));
        self.mark(&key, since);
        true
    }

    /// Removes a key. Returns whether it was there.
    pub fn remove(&self, key: &K) -> bool {
        let removed = self.inner.rows.remove(key).is_some();
        if removed {
            self.mark(key, Instant::now());
        }
        removed
    }

    /// The latest value of a key.
    pub fn get(&self, key: &K) -> Option<Arc<V>> {
        self.inner.rows.get(key).map(|row| row.value().clone())
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.inner.rows.len()
    }

    /// Whether there are no rows.
    pub fn is_empty(&self) -> bool {
        self.inner.rows.is_empty()
    }

    /// All rows, sorted by key.
    pub fn rows(&self) -> Vec<(K, Arc<V>)> {
        let mut rows: Vec<_> = self.inner.rows.iter().map(|row| (row.key().clone(), row.value().clone())).collect();
        rows.sort_by(|a, b| a.0.cmp(&b.0));
        rows
    }

    /// All keys, unsorted.
    pub fn keys(&self) -> Vec<K> {
        self.inner.rows.iter().map(|row| row.key().clone()).collect()
    }

    /// Whether the first complete list has arrived.
    pub fn is_complete(&self) -> bool {
        self.inner.complete.load(Ordering::Acquire)
    }

    /// Records that the rows are now a complete picture, and wakes the subscribers once for it. It stays so: a later
    /// re-list replaces rows without ever showing a partial table.
    pub fn set_complete(&self) {
        if !self.inner.complete.swap(true, Ordering::AcqRel) {
            // Whatever is on its way already: a consumer may have looked at [`Self::is_complete`] and not yet taken the
            // changes, and this comes only once.
            self.each_mailbox(Mailbox::wake_again);
        }
    }

    /// Subscribes; every existing key counts as changed. `wake` is called from the writer's thread, at most once
    /// between two calls of [`Subscription::take`] and once more for completeness: it must only pass on the hint.
    pub fn subscribe(&self, wake: impl Fn() + Send + Sync + 'static) -> Subscription<K, V> {
        self.enter(wake, false)
    }

    /// [`Self::subscribe`] of the one on whom packets wait. It is woken after all others: what a task wakes last, tokio
    /// runs next on the same thread, while the rest may be taken over by a thread that must first get a processor.
    pub fn subscribe_urgently(&self, wake: impl Fn() + Send + Sync + 'static) -> Subscription<K, V> {
        self.enter(wake, true)
    }

    fn enter(&self, wake: impl Fn() + Send + Sync + 'static, urgent: bool) -> Subscription<K, V> {
        let mailbox =
            Arc::new(Mailbox { dirty: Mutex::default(), woken: AtomicBool::new(false), wake: Box::new(wake) });
        let mut subscribers = lock(&self.inner.subscribers);
        let place = if urgent { subscribers.len() } else { 0 };
        subscribers.insert(place, Arc::downgrade(&mailbox));
        drop(subscribers);
        // After registering, so that a key written meanwhile is in at least one of the two.
        let now = Instant::now();
        lock(&mailbox.dirty).extend(self.keys().into_iter().map(|key| (key, now)));
        mailbox.wake();
        Subscription { table: self.clone(), mailbox }
    }

    fn mark(&self, key: &K, since: Instant) {
        self.each_mailbox(|mailbox| {
            let mut dirty = lock(&mailbox.dirty);
            let oldest = dirty.entry(key.clone()).or_insert(since);
            *oldest = since.min(*oldest);
            drop(dirty);
            mailbox.wake();
        });
    }

    fn each_mailbox(&self, each: impl Fn(&Mailbox<K>)) {
        let mut subscribers = lock(&self.inner.subscribers);
        subscribers.retain(|subscriber| match subscriber.upgrade() {
            Some(mailbox) => {
                each(&mailbox);
                true
            }
            None => false,
        });
    }
}

impl<K> Mailbox<K> {
    fn wake(&self) {
        if !self.woken.swap(true, Ordering::AcqRel) {
            (self.wake)();
        }
    }

    fn wake_again(&self) {
        self.woken.store(true, Ordering::Release);
        (self.wake)();
    }
}

/// One consumer's view of what changed. Dropping it unsubscribes.
pub struct Subscription<K, V> {
    table: Table<K, V>,
    mailbox: Arc<Mailbox<K>>,
}

impl<K: Key, V: PartialEq + Send + Sync + 'static> Subscription<K, V> {
    /// The keys that changed since the last call, with their latest values (`None`: removed), sorted by key.
    pub fn take(&self) -> Vec<(K, Option<Arc<V>>)> {
        self.take_since().into_iter().map(|(key, value, _)| (key, value)).collect()
    }

    /// [`Self::take`], and since when the oldest change of each key has been waiting.
    pub fn take_since(&self) -> Vec<(K, Option<Arc<V>>, Instant)> {
        // First the flag: a write after this line wakes again.
        self.mailbox.woken.store(false, Ordering::Release);
        let dirty = std::mem::take(&mut *lock(&self.mailbox.dirty));
        let mut changes: Vec<_> = dirty
            .into_iter()
            .map(|(key, since)| {
                let value = self.table.get(&key);
                (key, value, since)
            })
            .collect();
        changes.sort_by(|a, b| a.0.cmp(&b.0));
        changes
    }

    /// Makes every key count as changed again, without waking.
    pub fn mark_all(&self) {
        let now = Instant::now();
        let keys = self.table.keys();
        let mut dirty = lock(&self.mailbox.dirty);
        for key in keys {
            dirty.entry(key).or_insert(now);
        }
    }

    /// The table that this subscription is of.
    pub fn table(&self) -> &Table<K, V> {
        &self.table
    }
}

/// Applies a re-list: rows that the new list does not mention go when it is complete, none before.
pub struct Listing<K> {
    seen: HashSet<K>,
}

impl<K: Key> Listing<K> {
    /// A list begins.
    pub fn begin() -> Self {
        Self { seen: HashSet::new() }
    }

    /// The list mentions this object.
    pub fn put<V: PartialEq + Send + Sync + 'static>(&mut self, table: &Table<K, V>, key: K, value: V) {
        self.seen.insert(key.clone());
        table.put(key, value);
    }

    /// The list is complete: what it did not mention is gone.
    pub fn finish<V: PartialEq + Send + Sync + 'static>(self, table: &Table<K, V>) {
        for key in table.keys() {
            if !self.seen.contains(&key) {
                table.remove(&key);
            }
        }
        table.set_complete();
    }
}

#[cfg(test)]
mod tests;
