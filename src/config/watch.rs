//! Notices that a config directory changed: a ConfigMap's link swap or an edit of one file.
//!
//! What is in the directory is compared, not what the kernel says happened to it: events only say when to look. A slow
//! look without any event covers what inotify cannot see (links to elsewhere, a directory that appears later, a host
//! whose inotify instances are used up).

use std::collections::hash_map::DefaultHasher;
use std::fs;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::time::Duration;

use notify::{RecursiveMode, Watcher as _};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

/// Events come in bursts; the directory is read once it has been quiet this long.
const QUIET: Duration = Duration::from_millis(50);
/// How often to look without an event.
const RESCAN: Duration = Duration::from_secs(10);

/// A watched directory; watching ends when it is dropped.
#[derive(Debug)]
pub struct Watch {
    changes: watch::Receiver<u64>,
    task: JoinHandle<()>,
}

impl Watch {
    /// Completes once the contents differ from when this was last called (or the watch began). Cancel safe. Several
    /// changes in between count as one.
    pub async fn changed(&mut self) {
        if self.changes.changed().await.is_err() {
            // The task only ends with the runtime: there is nothing to report any more.
            std::future::pending::<()>().await;
        }
    }

    /// A receiver of its own for the number of changes so far.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.changes.clone()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Begins to watch `dir`, which need not exist yet. Must be called within a tokio runtime.
pub fn watch(dir: &Path) -> Watch {
    watch_every(dir, RESCAN)
}

/// As [`watch`], with the time between two looks without an event.
pub(super) fn watch_every(dir: &Path, rescan: Duration) -> Watch {
    let (count, changes) = watch::channel(0);
    let before = fingerprint(dir);
    // One pending wake-up is enough: a look sees everything.
    let (wake, woken) = mpsc::channel(1);
    let watcher = match watch_events(dir, wake.clone()) {
        Ok(watcher) => Some(watcher),
        Err(error) => {
            tracing::warn!(dir = %dir.display(), %error, "config dir is only looked at periodically");
            None
        }
    };
    let task = tokio::spawn(look(dir.to_path_buf(), rescan, before, count, (wake, woken), watcher));
    Watch { changes, task }
}

type Wake = (mpsc::Sender<()>, mpsc::Receiver<()>);

fn watch_events(dir: &Path, wake: mpsc::Sender<()>) -> notify::Result<notify::RecommendedWatcher> {
    let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        // Reading is an event too; looking because of our own look would never end.
        if !event.is_ok_and(|event| event.kind.is_access()) {
            // Full means that a look is due anyway.
            let _ = wake.try_send(());
        }
    })?;
    watcher.watch(dir, RecursiveMode::NonRecursive)?;
    Ok(watcher)
}

async fn look(
    dir: PathBuf,
    rescan: Duration,
    mut seen: u64,
    count: watch::Sender<u64>,
    (wake, mut woken): Wake,
    mut watcher: Option<notify::RecommendedWatcher>,
) {
    loop {
        // `wake` lives in this task, so the channel is never closed: an error is the time running out.
        if tokio::time::timeout(rescan, woken.recv()).await.is_ok() {
            while tokio::time::timeout(QUIET, woken.recv()).await.is_ok() {}
        }
        if watcher.is_none() || !dir.exists() {
            watcher = watch_events(&dir, wake.clone()).ok();
        }
        let path = dir.clone();
        let Ok(now) = tokio::task::spawn_blocking(move || fingerprint(&path)).await else { continue };
        if now != seen {
            seen = now;
            count.send_modify(|n| *n += 1);
        }
    }
}

/// A hash of all names and contents; whatever cannot be read counts as absent.
fn fingerprint(dir: &Path) -> u64 {
    let data = fs::canonicalize(dir.join("..data")).unwrap_or_else(|_| dir.to_path_buf());
    let mut files: Vec<PathBuf> =
        fs::read_dir(data).map(|d| d.flatten().map(|e| e.path()).collect()).unwrap_or_default();
    files.sort();
    let mut hash = DefaultHasher::new();
    for file in files {
        if let (Some(name), Ok(text)) = (file.file_name(), fs::read(&file)) {
            (name, text).hash(&mut hash);
        }
    }
    hash.finish()
}
