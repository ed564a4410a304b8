//! Network namespaces by name, as `ip netns` keeps them: a bind mount of the namespace file under `/run/netns`.
//!
//! No thread of the runtime ever changes its namespace: every entry happens on a thread made for it, or in a child
//! between fork and exec. Deliberately absent: mount namespaces (a node of the lab sees the host's files).

use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};

use super::NetError;

/// Where `ip netns` and `nsenter --net=` look for names.
pub const NETNS_DIR: &str = "/run/netns";

/// A network namespace. One that was created here disappears with the value; processes in it are not touched, and the
/// kernel keeps the namespace itself until the last of them is gone.
#[derive(Debug, Clone)]
pub struct Netns {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    name: String,
    path: PathBuf,
    file: File,
    owned: bool,
}

impl Netns {
    /// Makes a new, empty namespace that others can enter by its name.
    ///
    /// # Errors
    /// When the name is taken or is no file name, or when the caller may not make namespaces.
    pub fn create(name: &str) -> Result<Self, NetError> {
        let path = checked_path(name)?;
        fs::create_dir_all(NETNS_DIR).map_err(NetError::io(format!("create {NETNS_DIR}")))?;
        // The mount point is an empty file; create_new makes the name ours, or fails.
        File::create_new(&path).map_err(NetError::io(format!("create network namespace {name}")))?;
        let made = std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                unshare(CloneFlags::CLONE_NEWNET)?;
                // The thread ends here; the bind mount is what keeps its namespace.
                mount(Some("/proc/thread-self/ns/net"), &path, None::<&str>, MsFlags::MS_BIND, None::<&str>)
            });
            thread.join().unwrap_or(Err(nix::errno::Errno::EINTR))
        });
        let opened = made
            .map_err(|e| NetError::io(format!("create network namespace {name}"))(e.into()))
            .and_then(|()| File::open(&path).map_err(NetError::io(format!("open {}", path.display()))));
        match opened {
            Ok(file) => Ok(Self { inner: Arc::new(Inner { name: name.into(), path, file, owned: true }) }),
            Err(error) => {
                remove_path(&path);
                Err(error)
            }
        }
    }

    /// Opens a namespace that somebody else made, by its name or by a path such as `/proc/1/ns/net`.
    ///
    /// # Errors
    /// When there is none.
    pub fn open(name_or_path: &str) -> Result<Self, NetError> {
        let path =
            if name_or_path.starts_with('/') { PathBuf::from(name_or_path) } else { checked_path(name_or_path)? };
        let file = File::open(&path).map_err(NetError::io(format!("open network namespace {}", path.display())))?;
        let name = path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
        Ok(Self { inner: Arc::new(Inner { name, path, file, owned: false }) })
    }

    /// Removes a namespace by name, also one whose maker is gone. A name that does not exist is no error.
    pub fn remove(name: &str) -> Result<(), NetError> {
        remove_path(&checked_path(name)?);
        Ok(())
    }

    /// Names under `/run/netns`.
    pub fn names() -> Vec<String> {
        let Ok(entries) = fs::read_dir(NETNS_DIR) else { return Vec::new() };
        entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
    }

    /// The name, without directory.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// What to give to `nsenter --net=`.
    pub fn path(&self) -> &Path {
        &self.inner.path
    }

    /// Runs `work` inside on a thread of its own and waits for it. Sockets opened there stay in the namespace wherever
    /// they are used later; tokio types may be made in it when the caller is inside a runtime.
    ///
    /// # Errors
    /// When the namespace can not be entered. A panic of `work` goes on in the caller.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, NetError> {
        let runtime = tokio::runtime::Handle::try_current().ok();
        let result = std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                setns(&self.inner.file, CloneFlags::CLONE_NEWNET)
                    .map_err(|e| NetError::io(format!("enter network namespace {}", self.inner.name))(e.into()))?;
                let _context = runtime.as_ref().map(tokio::runtime::Handle::enter);
                Ok(work())
            });
            thread.join()
        });
        match result {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inner.file.as_fd()
    }
}

impl AsRawFd for Netns {
    fn as_raw_fd(&self) -> RawFd {
        self.inner.file.as_raw_fd()
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if self.owned {
            remove_path(&self.path);
        }
    }
}

/// Unmounts and unlinks; there is nobody to tell when it fails, and trying again later is harmless.
fn remove_path(path: &Path) {
    let _ = umount2(path, MntFlags::MNT_DETACH);
    let _ = fs::remove_file(path);
}

fn checked_path(name: &str) -> Result<PathBuf, NetError> {
    if name.is_empty() || name == "." || name == ".." || name.contains('/') || name.len() > 200 {
        return Err(NetError::Invalid(format!(
            "network namespace name {name:?} is no file name: use letters, digits, - and ."
        )));
    }
    Ok(Path::new(NETNS_DIR).join(name))
}
