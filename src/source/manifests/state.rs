//! The state directory: status and leases as files that several agents of one host share.
//!
//! Every file is written whole and renamed into place, so readers need no lock. Writers that depend on what was there
//! before hold the directory's lock. Nothing is synced to disk: after a power loss addresses are allocated again, and
//! leases have expired anyway.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use kinesin_core::objects::{Lease, Object, ObjectKey};
use nix::fcntl::{Flock, FlockArg};
use serde_json::json;
use sha2::{Digest, Sha256};

use super::document::is_dns_subdomain;
use super::kinds::Kind;
use crate::source::{LEASE_LABEL, LEASE_LABEL_VALUE, WriteError, status};

/// How long to wait for another agent's write; each takes well under a millisecond.
const LOCK_PATIENCE: Duration = Duration::from_secs(2);
/// Temporary files older than this belong to a writer that died.
const ABANDONED: Duration = Duration::from_secs(60);
/// A status younger than this may belong to an object that only another agent has seen so far.
const SWEEP_AGE: Duration = Duration::from_secs(2);

/// Paths and locking.
#[derive(Clone, Debug)]
pub(super) struct StateDir {
    root: PathBuf,
}

impl StateDir {
    /// Creates the directories that are missing.
    pub(super) fn create<const N: usize>(root: &Path, kinds: [&'static str; N]) -> io::Result<Self> {
        let state = Self { root: root.to_owned() };
        let statuses = kinds.map(|kind| root.join("status").join(kind));
        for dir in statuses.iter().chain([&state.lease_dir()]) {
            fs::create_dir_all(dir)?;
            remove_abandoned(dir);
        }
        Ok(state)
    }

    pub(super) fn lease_dir(&self) -> PathBuf {
        self.root.join("leases")
    }

    pub(super) fn status_dir<T: Kind>(&self) -> PathBuf {
        self.root.join("status").join(T::KIND)
    }

    fn status_file<T: Kind>(&self, key: &ObjectKey) -> PathBuf {
        // Neither part can contain `_`.
        self.status_dir::<T>().join(format!("{}_{}.json", key.namespace, key.name))
    }

    fn lock(&self) -> io::Result<Flock<fs::File>> {
        let mut file = fs::OpenOptions::new().create(true).append(true).open(self.root.join(".lock"))?;
        let until = Instant::now() + LOCK_PATIENCE;
        loop {
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => return Ok(lock),
                Err((_, errno)) if errno != nix::errno::Errno::EAGAIN => return Err(errno.into()),
                Err(_) if Instant::now() > until => {
                    return Err(io::Error::new(
                        io::ErrorKind::TimedOut,
                        "another agent holds the state directory's lock",
                    ));
                }
                Err((unlocked, _)) => file = unlocked,
            }
            #[allow(
                clippy::disallowed_methods,
                reason = "on a blocking thread; waiting in the kernel could not be given up, and locks last microseconds"
            )]
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Rewrites the status of `object`. Returns whether a file was written.
    pub(super) fn write_status<T: Kind>(
        &self,
        object: &T,
        change: impl FnOnce(&mut T, &str),
    ) -> Result<bool, WriteError> {
        let key = object.key();
        let unavailable = |error: io::Error| unavailable(T::KIND, &key, &error);
        let path = self.status_file::<T>(&key);
        let _lock = self.lock().map_err(unavailable)?;
        let stored: Option<T> = match fs::read(&path) {
            // A file that cannot be parsed is as good as none: it is replaced.
            Ok(bytes) => serde_json::from_slice(&bytes).ok(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(unavailable(error)),
        };
        let mut wanted = object.clone();
        if let Some(stored) = &stored {
            wanted.take_status(stored);
        }
        let before = wanted.clone();
        change(&mut wanted, &status::now());
        if wanted == before && stored.is_some() {
            return Ok(false);
        }
        let whole = serde_json::to_value(&wanted).map_err(|e| unavailable(io::Error::other(e)))?;
        let mut file = json!({
            "apiVersion": T::API_VERSIONS[0],
            "kind": T::KIND,
            "metadata": {"name": key.name},
            "status": whole.get("status"),
        });
        if T::NAMESPACED {
            file["metadata"]["namespace"] = json!(key.namespace);
        }
        let text = format!("{file:#}\n");
        replace(&path, text.as_bytes()).map_err(unavailable)?;
        Ok(true)
    }

    /// Deletes the statuses of objects that do not exist (any more), so that a successor of the same name starts anew.
    pub(super) fn sweep<T: Kind>(&self, exists: impl Fn(&str) -> bool) {
        let Ok(entries) = fs::read_dir(self.status_dir::<T>()) else { return };
        for entry in entries.flatten() {
            let name = entry.file_name().into_string().unwrap_or_default();
            let settled = is_older(&entry, SWEEP_AGE);
            if let Some(stem) = name.strip_suffix(".json")
                && settled
                && !exists(stem)
            {
                // Somebody else may have been faster.
                let _ = fs::remove_file(entry.path());
            }
        }
    }

    fn lease_file(&self, name: &str) -> Result<PathBuf, WriteError> {
        if is_dns_subdomain(name) {
            return Ok(self.lease_dir().join(format!("{name}.json")));
        }
        let message = "not a valid name for a Lease".to_owned();
        Err(WriteError::Refused { kind: Lease::KIND, name: name.to_owned(), message })
    }

    pub(super) fn get_lease(&self, name: &str) -> Result<Option<Lease>, WriteError> {
        let path = self.lease_file(name)?;
        let key = ObjectKey::new("", name);
        match fs::read(&path) {
            Ok(bytes) => parse_lease(&bytes).map(Some).map_err(|error| WriteError::Unavailable {
                kind: Lease::KIND,
                name: name.to_owned(),
                message: format!("{}: {error}; delete the file", path.display()),
            }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(unavailable(Lease::KIND, &key, &error)),
        }
    }

    /// Compare and swap by the version, which is a digest of the content.
    pub(super) fn put_lease(&self, lease: &Lease) -> Result<Lease, WriteError> {
        let key = lease.key();
        let name = || key.name.to_string();
        let path = self.lease_file(&key.name)?;
        let failed = |error: io::Error| unavailable(Lease::KIND, &key, &error);
        let _lock = self.lock().map_err(failed)?;
        let expected = &lease.metadata.resource_version;
        match (fs::read(&path), expected.is_empty()) {
            (Err(error), true) if error.kind() == io::ErrorKind::NotFound => {}
            (Err(error), false) if error.kind() == io::ErrorKind::NotFound => {
                return Err(WriteError::Conflict { kind: Lease::KIND, name: name() });
            }
            (Err(error), _) => return Err(failed(error)),
            // A damaged file is nobody's lease.
            (Ok(bytes), _) if parse_lease(&bytes).is_err() => {}
            (Ok(bytes), _) if version(&bytes) == *expected => {}
            (Ok(_), _) => return Err(WriteError::Conflict { kind: Lease::KIND, name: name() }),
        }
        let mut stored = lease.clone();
        stored.metadata.resource_version = Default::default();
        stored.metadata.labels.insert(LEASE_LABEL.into(), LEASE_LABEL_VALUE.into());
        if stored.metadata.creation_timestamp.is_empty() {
            stored.metadata.creation_timestamp = status::now().into();
        }
        let mut bytes = serde_json::to_vec_pretty(&stored).map_err(|e| failed(io::Error::other(e)))?;
        bytes.push(b'\n');
        replace(&path, &bytes).map_err(failed)?;
        stored.metadata.resource_version = version(&bytes).into();
        Ok(stored)
    }

    pub(super) fn delete_lease(&self, name: &str) -> Result<(), WriteError> {
        let path = self.lease_file(name)?;
        let key = ObjectKey::new("", name);
        let failed = |error: io::Error| unavailable(Lease::KIND, &key, &error);
        let _lock = self.lock().map_err(failed)?;
        match fs::remove_file(&path) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(WriteError::NotFound { kind: Lease::KIND, name: name.to_owned() })
            }
            Err(error) => Err(failed(error)),
        }
    }
}

/// A Lease with its version filled in.
pub(super) fn parse_lease(bytes: &[u8]) -> Result<Lease, serde_json::Error> {
    let mut lease: Lease = serde_json::from_slice(bytes)?;
    lease.metadata.resource_version = version(bytes).into();
    Ok(lease)
}

/// Equal contents have equal versions: swapping one for the other loses nothing.
fn version(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

fn unavailable(kind: &'static str, key: &ObjectKey, error: &io::Error) -> WriteError {
    WriteError::Unavailable { kind, name: key.to_string(), message: error.to_string() }
}

/// Puts a whole file in place at once.
fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    static SERIAL: AtomicU64 = AtomicU64::new(0);
    let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temporary = path.with_file_name(format!(".{name}.{}.{serial}.tmp", std::process::id()));
    let outcome = fs::write(&temporary, bytes).and_then(|()| fs::rename(&temporary, path));
    if outcome.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    outcome
}

fn remove_abandoned(dir: &Path) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if is_older(&entry, ABANDONED) && name.starts_with('.') && name.ends_with(".tmp") {
            let _ = fs::remove_file(entry.path());
        }
    }
}

fn is_older(entry: &fs::DirEntry, age: Duration) -> bool {
    let modified = entry.metadata().and_then(|meta| meta.modified());
    modified.is_ok_and(|at| SystemTime::now().duration_since(at).is_ok_and(|known| known > age))
}
