//! Child processes of tests: in a network namespace if wanted, logging to a file, and gone when the test is gone, however
//! it ends (return, panic, `kill -9` of the test process).
//!
//! Deliberately absent: process groups and daemons; what is started here must not fork.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Mutex, OnceLock};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::try_wait_until;

/// A running (or finished) child; killed and reaped when dropped.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts `command` with its output appended to the file `log`, in the network namespace `netns` (a file such as
    /// `/run/netns/x` or `/proc/<pid>/ns/net`; `None` is the caller's own).
    ///
    /// # Errors
    /// The log cannot be opened, the namespace cannot be entered, or the program cannot be executed.
    pub fn spawn(name: &str, mut command: Command, netns: Option<&Path>, log: &Path) -> io::Result<Self> {
        let output = OpenOptions::new().create(true).append(true).open(log)?;
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        enter_netns(&mut command, netns)?;
        let child = spawn_with_death_signal(command)?;
        Ok(Self { name: name.to_owned(), child, log: log.to_owned() })
    }

    /// The process id in the test's own pid namespace.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// How it ended, or `None` while it runs.
    pub fn exited(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("a child that is ours can be waited for")
    }

    /// Sends `signal`; nothing happens if it has ended already.
    pub fn signal(&mut self, signal: Signal) {
        if self.exited().is_none() {
            // Not reaped above, so the id is still this child's.
            let _ = kill(Pid::from_raw(self.child.id().cast_signed()), signal);
        }
    }

    /// `kill -9`, and reaps it.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// SIGTERM, then after `grace` SIGKILL. Says whether it ended by itself in time.
    pub fn stop(&mut self, grace: Duration) -> bool {
        self.signal(Signal::SIGTERM);
        let ended = try_wait_until(grace, || self.exited().ok_or(())).is_ok();
        self.kill();
        ended
    }

    /// The last `lines` lines of its output, under a heading with its name.
    pub fn log_tail(&self, lines: usize) -> String {
        let text = std::fs::read(&self.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let all: Vec<&str> = text.lines().collect();
        let tail = all[all.len().saturating_sub(lines)..].join("\n");
        format!("--- {} (end of {}):\n{tail}\n", self.name, self.log.display())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Makes `command` start in the network namespace `netns`.
///
/// # Errors
/// The namespace file cannot be opened; it is named in the error.
pub fn enter_netns(command: &mut Command, netns: Option<&Path>) -> io::Result<()> {
    let Some(path) = netns else { return Ok(()) };
    let namespace = File::open(path)
        .map_err(|error| io::Error::new(error.kind(), format!("network namespace {}: {error}", path.display())))?;
    // SAFETY: between fork and exec the closure only makes the setns(2) system call on a descriptor it owns: no
    // allocation, no lock (converting the errno to an io::Error allocates nothing).
    unsafe {
        command.pre_exec(move || setns(namespace.as_fd(), CloneFlags::CLONE_NEWNET).map_err(io::Error::from));
    }
    Ok(())
}

/// Runs `work` in the network namespace `netns`, on a thread of its own: a thread that entered one stays there.
///
/// # Errors
/// The namespace cannot be opened or entered, or whatever `work` says.
pub fn in_netns<T: Send>(netns: Option<&Path>, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let Some(path) = netns else { return work() };
    let entered = || {
        let namespace = File::open(path).with_context(|| format!("network namespace {}", path.display()))?;
        setns(namespace, CloneFlags::CLONE_NEWNET)?;
        work()
    };
    std::thread::scope(|scope| scope.spawn(entered).join()).unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

struct Job {
    command: Command,
    reply: SyncSender<io::Result<Child>>,
}

/// Spawns from a thread that lives as long as the process: PR_SET_PDEATHSIG fires when the *thread* that forked ends
/// (prctl(2)), and tests run on threads, some of them a runtime's, that end before the test does.
fn spawn_with_death_signal(mut command: Command) -> io::Result<Child> {
    static SPAWNER: OnceLock<Mutex<SyncSender<Job>>> = OnceLock::new();

    let parent = nix::unistd::getpid();
    // SAFETY: between fork and exec the closure makes two system calls and compares their results: no allocation, no lock.
    unsafe {
        command.pre_exec(move || {
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
                return Err(io::Error::last_os_error());
            }
            // The parent may have died before the call above took effect; then nobody would ever signal.
            if nix::unistd::getppid() != parent {
                return Err(io::Error::from_raw_os_error(libc::ESRCH));
            }
            Ok(())
        });
    }

    let spawner = SPAWNER.get_or_init(|| {
        let (jobs, inbox) = sync_channel::<Job>(0);
        std::thread::Builder::new()
            .name("test-spawner".into())
            .spawn(move || {
                for mut job in inbox {
                    let _ = job.reply.send(job.command.spawn());
                }
            })
            .expect("a thread can be started");
        Mutex::new(jobs)
    });
    let (reply, answer) = sync_channel(1);
    let job = Job { command, reply };
    spawner.lock().unwrap_or_else(std::sync::PoisonError::into_inner).send(job).expect("the spawner never ends");
    answer.recv().expect("the spawner answers every job")
}
