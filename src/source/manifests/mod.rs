//! A directory of manifests as the source, and a state directory as the place for status and leases.
//!
//! Makes Kinesin a load balancer for hosts without Kubernetes. Read are `*.yaml`, `*.yml` and `*.json` directly in the
//! directory (no subdirectories), with several documents a file and Lists. What the API server would fill in is filled in:
//! namespace `default`, protocol `TCP`, `targetPort` = `port`, the affinity timeout, a pod's phase `Running`. What it would allocate is not: cluster
//! IPs and node ports exist where the manifest names them. A `status` in a manifest counts until one was written.
//!
//! Several agents of one host may share both directories; then they are a cluster. Deliberately absent: any knowledge of who
//! may write what.

mod cache;
mod document;
mod kinds;
mod scan;
mod state;
mod table;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};

use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt};
use kinesin_core::objects::{Condition, EndpointSlice, L2Policy, Lease, Node, Object, ObjectKey, Pod, Pool, Service};
use tokio::sync::watch;

pub(super) use self::document::explain;
use self::kinds::Kind;
use self::scan::{Message, Scanner};
use self::state::StateDir;
use self::table::Snapshot;
use super::{Event, Events, Source, SourceHealth, WriteError, status};

/// Why the source could not start.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The directory does not exist, is no directory, or cannot be read.
    #[error("read manifests directory {dir}: {error}; create it or set manifests-dir")]
    Manifests {
        /// The directory.
        dir: PathBuf,
        /// What the system said.
        #[source]
        error: io::Error,
    },
    /// The state directory cannot be made.
    #[error("create state directory {dir}: {error}; check state-dir")]
    State {
        /// The directory.
        dir: PathBuf,
        /// What the system said.
        #[source]
        error: io::Error,
    },
    /// The watching thread cannot be started.
    #[error("start the thread that watches {dir}: {error}")]
    Thread {
        /// The manifests directory.
        dir: PathBuf,
        /// What the system said.
        #[source]
        error: io::Error,
    },
}

/// Objects from a directory. Watches as long as it or one of its streams lives.
pub struct ManifestsSource {
    dir: PathBuf,
    state: StateDir,
    watching: Arc<Watching>,
    calls: Arc<Calls>,
}

/// The watching thread, stopped when the last user is gone.
struct Watching {
    snapshots: watch::Receiver<Arc<Snapshot>>,
    messages: Sender<Message>,
}

impl Drop for Watching {
    fn drop(&mut self) {
        // The thread may be gone already.
        let _ = self.messages.send(Message::Stop);
    }
}

/// Figures for [`SourceHealth`].
struct Calls {
    made: AtomicU64,
    failed: AtomicU64,
    last_error: Mutex<Option<String>>,
    since: String,
}

impl ManifestsSource {
    /// Reads both directories for the first time and begins to watch them. The state directory is created.
    pub fn open(dir: impl AsRef<Path>, state_dir: impl AsRef<Path>) -> Result<Arc<Self>, OpenError> {
        let dir = std::path::absolute(dir.as_ref()).unwrap_or_else(|_| dir.as_ref().to_owned());
        if let Err(error) = std::fs::read_dir(&dir) {
            return Err(OpenError::Manifests { dir, error });
        }
        let kinds = [Service::KIND, Pool::KIND, L2Policy::KIND];
        let state_dir = std::path::absolute(state_dir.as_ref()).unwrap_or_else(|_| state_dir.as_ref().to_owned());
        let state =
            StateDir::create(&state_dir, kinds).map_err(|error| OpenError::State { dir: state_dir.clone(), error })?;

        let (messages, inbox) = channel();
        let (scanner, snapshot, again_in) = Scanner::start(&dir, &state, messages.clone());
        let (publish, snapshots) = watch::channel(Arc::new(snapshot));
        std::thread::Builder::new()
            .name("manifests".to_owned())
            .spawn(move || scanner.run(&inbox, &publish, again_in))
            .map_err(|error| OpenError::Thread { dir: dir.clone(), error })?;
        let calls = Calls {
            made: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            last_error: Mutex::new(None),
            since: status::now(),
        };
        let watching = Arc::new(Watching { snapshots, messages });
        Ok(Arc::new(Self { dir, state, watching, calls: Arc::new(calls) }))
    }

    fn snapshot(&self) -> Arc<Snapshot> {
        self.watching.snapshots.borrow().clone()
    }

    fn events<T: Kind>(&self) -> Events<T> {
        struct Follow<T> {
            watching: Arc<Watching>,
            snapshots: watch::Receiver<Arc<Snapshot>>,
            seen: Option<Arc<Snapshot>>,
            queue: VecDeque<Event<T>>,
        }
        let follow = Follow::<T> {
            watching: self.watching.clone(),
            snapshots: self.watching.snapshots.clone(),
            seen: None,
            queue: VecDeque::new(),
        };
        futures::stream::unfold(follow, |mut follow| async move {
            loop {
                if let Some(event) = follow.queue.pop_front() {
                    return Some((event, follow));
                }
                let events = match follow.seen.take() {
                    None => {
                        let now = follow.snapshots.borrow_and_update().clone();
                        let events = table::initial(&now);
                        follow.seen = Some(now);
                        events
                    }
                    Some(before) => {
                        if follow.snapshots.changed().await.is_err() {
                            // The thread died: say so once, keep the last good state, and never end.
                            let _keep = &follow.watching;
                            tracing::error!("the manifests are no longer watched");
                            return std::future::pending().await;
                        }
                        let now = follow.snapshots.borrow_and_update().clone();
                        let events = table::difference(&before, &now);
                        follow.seen = Some(now);
                        events
                    }
                };
                follow.queue = events.into();
            }
        })
        .boxed()
    }

    /// Runs a blocking write on the state directory.
    fn write<'a, R: Send + 'static>(
        &self,
        kind: &'static str,
        name: String,
        write: impl FnOnce(&StateDir) -> Result<R, WriteError> + Send + 'static,
    ) -> BoxFuture<'a, Result<R, WriteError>> {
        let (state, calls, messages) = (self.state.clone(), self.calls.clone(), self.watching.messages.clone());
        async move {
            calls.made.fetch_add(1, Ordering::Relaxed);
            let outcome = tokio::task::spawn_blocking(move || write(&state)).await.unwrap_or_else(|error| {
                Err(WriteError::Unavailable { kind, name, message: format!("the write did not finish: {error}") })
            });
            if let Err(error @ (WriteError::Unavailable { .. } | WriteError::Refused { .. })) = &outcome {
                calls.failed.fetch_add(1, Ordering::Relaxed);
                *calls.last_error.lock().unwrap_or_else(PoisonError::into_inner) = Some(error.to_string());
            }
            // Do not depend on inotify for what this process did itself.
            let _ = messages.send(Message::Wrote);
            outcome
        }
        .boxed()
    }

    fn write_status<'a, T: Kind>(
        &self,
        key: &ObjectKey,
        change: impl FnOnce(&mut T, &str) + Send + 'static,
    ) -> BoxFuture<'a, Result<(), WriteError>> {
        let (snapshot, key) = (self.snapshot(), key.clone());
        self.write(T::KIND, key.to_string(), move |state| {
            let table = T::table(&snapshot);
            // With a problem somewhere an object may be missing only because its file cannot be read now.
            if snapshot.problems.is_empty() {
                let names: std::collections::HashSet<String> =
                    table.keys().map(|key| format!("{}_{}", key.namespace, key.name)).collect();
                state.sweep::<T>(|stem| names.contains(stem));
            }
            match table.get(&key) {
                Some(object) => state.write_status(object.as_ref(), change).map(drop),
                None => Err(WriteError::NotFound { kind: T::KIND, name: key.to_string() }),
            }
        })
    }
}

impl Source for ManifestsSource {
    fn name(&self) -> &'static str {
        "manifests"
    }

    fn services(&self) -> Events<Service> {
        self.events()
    }

    fn endpoint_slices(&self) -> Events<EndpointSlice> {
        self.events()
    }

    fn pods(&self, node: &str) -> Events<Pod> {
        super::with_host_ports(self.events(), node)
    }

    fn nodes(&self) -> Events<Node> {
        self.events()
    }

    fn pools(&self) -> Events<Pool> {
        self.events()
    }

    fn l2_policies(&self) -> Events<L2Policy> {
        self.events()
    }

    fn leases(&self) -> Events<Lease> {
        self.events()
    }

    fn write_service_status<'a>(
        &'a self,
        key: &'a ObjectKey,
        ingress: &'a [IpAddr],
        condition: Option<&'a Condition>,
    ) -> BoxFuture<'a, Result<(), WriteError>> {
        let (ingress, condition) = (ingress.to_vec(), condition.cloned());
        self.write_status::<Service>(key, move |service, now| {
            service.status = status::service_status(&service.status, &ingress, condition.as_ref(), now);
        })
    }

    fn write_pool_status<'a>(
        &'a self,
        name: &'a str,
        conditions: &'a [Condition],
    ) -> BoxFuture<'a, Result<(), WriteError>> {
        let conditions = conditions.to_vec();
        self.write_status::<Pool>(&ObjectKey::new("", name), move |pool, now| {
            pool.status.conditions = status::merge_conditions(&pool.status.conditions, &conditions, now);
        })
    }

    fn write_policy_status<'a>(
        &'a self,
        name: &'a str,
        conditions: &'a [Condition],
    ) -> BoxFuture<'a, Result<(), WriteError>> {
        let conditions = conditions.to_vec();
        self.write_status::<L2Policy>(&ObjectKey::new("", name), move |policy, now| {
            policy.status.conditions = status::merge_conditions(&policy.status.conditions, &conditions, now);
        })
    }

    fn get_lease<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Option<Lease>, WriteError>> {
        let name = name.to_owned();
        self.write(Lease::KIND, name.clone(), move |state| state.get_lease(&name))
    }

    fn put_lease<'a>(&'a self, lease: &'a Lease) -> BoxFuture<'a, Result<Lease, WriteError>> {
        let lease = lease.clone();
        self.write(Lease::KIND, lease.metadata.name.to_string(), move |state| state.put_lease(&lease))
    }

    fn delete_lease<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<(), WriteError>> {
        let name = name.to_owned();
        self.write(Lease::KIND, name.clone(), move |state| state.delete_lease(&name))
    }

    fn health(&self) -> SourceHealth {
        let snapshot = self.snapshot();
        let last_error = self.calls.last_error.lock().unwrap_or_else(PoisonError::into_inner).clone();
        SourceHealth {
            connected: self.dir.is_dir(),
            since: self.calls.since.clone(),
            location: self.dir.display().to_string(),
            last_error,
            calls: self.calls.made.load(Ordering::Relaxed),
            calls_failed: self.calls.failed.load(Ordering::Relaxed),
            calls_limited: 0,
            problems: snapshot.problems.iter().map(|problem| problem.text.clone()).collect(),
        }
    }
}
