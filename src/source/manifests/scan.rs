//! The thread that watches the directories and publishes what they say.
//!
//! Owns the inotify watches and everything that was read. It is a thread, not a task, because reading a directory blocks.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use kinesin_core::objects::{L2Policy, Lease, ObjectKey, Pool, Service};
use notify::event::{AccessKind, AccessMode, EventKind, ModifyKind, RenameMode};
use notify::{RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::watch;

use super::cache::{Manifests, Scan, StateFiles, WRITER_PATIENCE};
use super::kinds::Kind;
use super::state::StateDir;
use super::table::{Snapshot, Table};

/// Looks at everything this often even when nobody reports a change: inotify queues overflow, mounts change below us.
const SAFETY_SCAN: Duration = Duration::from_secs(5);
/// The same where inotify cannot be had (its per-user limits).
const POLLING_SCAN: Duration = Duration::from_millis(500);
/// A burst of events is taken together when the next one follows within this time …
const QUIET: Duration = Duration::from_millis(5);
/// … but not for longer than this.
const BURST: Duration = Duration::from_millis(50);

/// What the thread is told.
pub(super) enum Message {
    /// From inotify.
    Changed(notify::Result<notify::Event>),
    /// This process wrote to the state directory.
    Wrote,
    /// The source is gone.
    Stop,
}

/// A table whose objects are composed of a manifest and a status; composes again only what changed.
#[derive(Debug)]
struct Merged<T> {
    parts: BTreeMap<ObjectKey, Parts<T>>,
}

/// The manifest, the status file, and the object composed of both.
type Parts<T> = (Arc<T>, Option<Arc<T>>, Arc<T>);

impl<T: Kind> Merged<T> {
    fn update<'a>(&mut self, objects: impl Iterator<Item = &'a Arc<T>>, statuses: &Table<T>) -> Table<T> {
        let same = |a: &Option<Arc<T>>, b: Option<&Arc<T>>| match (a, b) {
            (None, None) => true,
            (Some(a), Some(b)) => Arc::ptr_eq(a, b),
            _ => false,
        };
        let mut parts = BTreeMap::new();
        for base in objects {
            let key = base.key();
            let status = statuses.get(&key);
            let merged = match self.parts.remove(&key) {
                Some((known, with, merged)) if Arc::ptr_eq(&known, base) && same(&with, status) => merged,
                _ => match status {
                    Some(status) => {
                        let mut object = T::clone(base);
                        object.take_status(status);
                        Arc::new(object)
                    }
                    None => base.clone(),
                },
            };
            parts.insert(key, (base.clone(), status.cloned(), merged));
        }
        self.parts = parts;
        self.parts.iter().map(|(key, (_, _, merged))| (key.clone(), merged.clone())).collect()
    }
}

/// Everything that was read.
pub(super) struct Scanner {
    dir: PathBuf,
    state: StateDir,
    manifests: Manifests,
    service_status: StateFiles<Service>,
    pool_status: StateFiles<Pool>,
    policy_status: StateFiles<L2Policy>,
    leases: StateFiles<Lease>,
    services: Merged<Service>,
    pools: Merged<Pool>,
    policies: Merged<L2Policy>,
    writing: BTreeMap<PathBuf, Instant>,
    watcher: Option<RecommendedWatcher>,
    watched_inode: Option<(u64, u64)>,
}

/// Which directories may have changed.
#[derive(Clone, Copy, Default)]
struct Dirty {
    manifests: bool,
    state: bool,
}

impl Scanner {
    /// Begins to watch, then reads everything for the first time: no change can fall between the two.
    pub(super) fn start(dir: &Path, state: &StateDir, messages: Sender<Message>) -> (Self, Snapshot, Option<Duration>) {
        let handler = move |event| drop(messages.send(Message::Changed(event)));
        let watcher = RecommendedWatcher::new(handler, notify::Config::default())
            .inspect_err(|error| tracing::warn!(%error, "no file notifications; manifests are polled"))
            .ok();
        let mut scanner = Self {
            dir: dir.to_owned(),
            manifests: Manifests::new(dir),
            service_status: StateFiles::new(state.status_dir::<Service>()),
            pool_status: StateFiles::new(state.status_dir::<Pool>()),
            policy_status: StateFiles::new(state.status_dir::<L2Policy>()),
            leases: StateFiles::new(state.lease_dir()),
            state: state.clone(),
            services: Merged { parts: BTreeMap::new() },
            pools: Merged { parts: BTreeMap::new() },
            policies: Merged { parts: BTreeMap::new() },
            writing: BTreeMap::new(),
            watcher,
            watched_inode: None,
        };
        scanner.watch_state();
        scanner.watch_manifests();
        let scan = scanner.scan(Dirty { manifests: true, state: true });
        let snapshot = scanner.snapshot();
        (scanner, snapshot, scan.again_in)
    }

    /// Watches and publishes until told to stop.
    pub(super) fn run(
        mut self,
        messages: &Receiver<Message>,
        publish: &watch::Sender<Arc<Snapshot>>,
        mut again_in: Option<Duration>,
    ) {
        loop {
            let patience = if self.watcher.is_some() { SAFETY_SCAN } else { POLLING_SCAN };
            let mut dirty = Dirty::default();
            match messages.recv_timeout(again_in.unwrap_or(patience).min(patience)) {
                Ok(message) => {
                    if !self.take(message, &mut dirty) || !self.drain(messages, &mut dirty) {
                        return;
                    }
                    if again_in.is_some() {
                        dirty = Dirty { manifests: true, state: true };
                    }
                }
                Err(RecvTimeoutError::Timeout) => {
                    self.watch_manifests();
                    dirty = Dirty { manifests: true, state: true };
                }
                Err(RecvTimeoutError::Disconnected) => return,
            }
            if !dirty.manifests && !dirty.state {
                continue;
            }
            let scan = self.scan(dirty);
            again_in = scan.again_in;
            if scan.changed {
                publish.send_replace(Arc::new(self.snapshot()));
            }
        }
    }

    /// Takes what else arrives shortly. Returns false when it is time to stop.
    fn drain(&mut self, messages: &Receiver<Message>, dirty: &mut Dirty) -> bool {
        let until = Instant::now() + BURST;
        while let Some(left) = until.checked_duration_since(Instant::now()) {
            match messages.recv_timeout(left.min(QUIET)) {
                Ok(message) => {
                    if !self.take(message, dirty) {
                        return false;
                    }
                }
                Err(_) => break,
            }
        }
        true
    }

    fn take(&mut self, message: Message, dirty: &mut Dirty) -> bool {
        let event = match message {
            Message::Stop => return false,
            Message::Wrote => {
                dirty.state = true;
                return true;
            }
            Message::Changed(Err(error)) => {
                tracing::debug!(%error, "file notification");
                *dirty = Dirty { manifests: true, state: true };
                return true;
            }
            Message::Changed(Ok(event)) => event,
        };
        if event.need_rescan() {
            *dirty = Dirty { manifests: true, state: true };
            return true;
        }
        // Being read and opened is no change: reading the files ourselves would wake us for ever.
        let closed = matches!(event.kind, EventKind::Access(AccessKind::Close(AccessMode::Write)));
        if matches!(event.kind, EventKind::Access(_)) && !closed {
            return true;
        }
        for path in &event.paths {
            let parent = path.parent();
            if parent == Some(self.dir.as_path()) || *path == self.dir {
                dirty.manifests = true;
                match event.kind {
                    EventKind::Modify(ModifyKind::Data(_)) => {
                        self.writing.entry(path.clone()).or_insert_with(Instant::now);
                    }
                    EventKind::Modify(ModifyKind::Name(RenameMode::From)) | EventKind::Remove(_) => {
                        self.writing.remove(path);
                    }
                    _ if closed => drop(self.writing.remove(path)),
                    _ => {}
                }
            } else {
                dirty.state = true;
            }
        }
        true
    }

    fn scan(&mut self, dirty: Dirty) -> Scan {
        let now = Instant::now();
        self.writing.retain(|_, since| now.saturating_duration_since(*since) < WRITER_PATIENCE);
        let mut scan = Scan::default();
        if dirty.manifests {
            scan.merge(self.manifests.scan(now, &self.writing));
        }
        if dirty.state {
            scan.merge(self.service_status.scan(|bytes| serde_json::from_slice(bytes)));
            scan.merge(self.pool_status.scan(|bytes| serde_json::from_slice(bytes)));
            scan.merge(self.policy_status.scan(|bytes| serde_json::from_slice(bytes)));
            scan.merge(self.leases.scan(super::state::parse_lease));
        }
        scan
    }

    fn snapshot(&mut self) -> Snapshot {
        let (mut problems, mut notes) = (BTreeSet::new(), BTreeSet::new());
        let objects = self.manifests.collect(&mut problems, &mut notes);
        problems.extend(self.service_status.problems());
        problems.extend(self.pool_status.problems());
        problems.extend(self.policy_status.problems());
        problems.extend(self.leases.problems());
        fn of<'a, T: Kind>(objects: &'a [&'a super::kinds::AnyObject]) -> impl Iterator<Item = &'a Arc<T>> {
            objects.iter().filter_map(|any| T::unwrap(any))
        }
        fn table<T: Kind>(objects: &[&super::kinds::AnyObject]) -> Table<T> {
            of::<T>(objects).map(|object| (object.key(), object.clone())).collect()
        }
        Snapshot {
            services: self.services.update(of(&objects), &self.service_status.table()),
            pools: self.pools.update(of(&objects), &self.pool_status.table()),
            policies: self.policies.update(of(&objects), &self.policy_status.table()),
            endpoint_slices: table(&objects),
            nodes: table(&objects),
            pods: table(&objects),
            leases: self.leases.table(),
            problems,
            notes,
        }
    }

    fn watch_state(&mut self) {
        let dirs = [
            self.state.status_dir::<Service>(),
            self.state.status_dir::<Pool>(),
            self.state.status_dir::<L2Policy>(),
            self.state.lease_dir(),
        ];
        for dir in dirs {
            self.watch(&dir);
        }
    }

    /// Watches the manifest directory, again when another one has taken its place.
    fn watch_manifests(&mut self) {
        let inode = std::fs::metadata(&self.dir).ok().map(|meta| (meta.dev(), meta.ino()));
        if inode == self.watched_inode {
            return;
        }
        let dir = self.dir.clone();
        if self.watched_inode.is_some()
            && let Some(watcher) = &mut self.watcher
        {
            // Fails when the directory is gone, which is why we are here.
            let _ = watcher.unwatch(&dir);
        }
        self.watched_inode = if inode.is_some() && self.watch(&dir) { inode } else { None };
    }

    /// Without inotify (or with its limits reached) everything is polled.
    fn watch(&mut self, dir: &Path) -> bool {
        let Some(watcher) = &mut self.watcher else { return false };
        match watcher.watch(dir, RecursiveMode::NonRecursive) {
            Ok(()) => true,
            Err(error) => {
                tracing::warn!(dir = %dir.display(), %error, "directory cannot be watched; it is polled");
                self.watcher = None;
                false
            }
        }
    }
}
