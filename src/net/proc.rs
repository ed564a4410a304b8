//! Child processes that never outlive us, with their output in a file.
//!
//! `PR_SET_PDEATHSIG` fires when the *thread* that forked ends, so all forks happen on one thread that lives as long as
//! the process. Every child leads a process group: Ctrl-C in the terminal reaches only us, and a kill reaches its children.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError, mpsc};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{NetError, Netns};

/// How a child is started. Made by [`Process::command`].
#[derive(Debug)]
pub struct ProcessBuilder {
    name: String,
    command: Command,
    netns: Option<Netns>,
    cgroup: Option<PathBuf>,
    log: Option<PathBuf>,
    piped: bool,
}

/// A running (or finished) child. Killed, with its process group, when dropped.
#[derive(Debug)]
pub struct Process {
    name: String,
    pid: u32,
    log: Option<PathBuf>,
    child: Mutex<Child>,
}

impl Process {
    /// Prepares a child; `name` is what messages call it.
    pub fn command(name: impl Into<String>, command: Command) -> ProcessBuilder {
        ProcessBuilder { name: name.into(), command, netns: None, cgroup: None, log: None, piped: false }
    }

    /// What messages call it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Where its output goes, if anywhere.
    pub fn log(&self) -> Option<&Path> {
        self.log.as_deref()
    }

    /// The last `lines` lines of its output; empty without a log.
    pub fn log_tail(&self, lines: usize) -> String {
        self.log.as_deref().map_or_else(String::new, |path| tail(path, lines))
    }

    /// Its standard output, once, if it was piped.
    pub fn take_stdout(&self) -> Option<ChildStdout> {
        self.lock().stdout.take()
    }

    /// How it ended, or `None` while it runs.
    pub fn exit_status(&self) -> Option<ExitStatus> {
        self.lock().try_wait().unwrap_or_else(|_| Some(ExitStatus::from_raw(0)))
    }

    /// Sends a signal; a process that is gone is no error.
    pub fn signal(&self, signal: Signal) {
        if self.exit_status().is_none() {
            let _ = kill(Pid::from_raw(self.pid as i32), signal);
        }
    }

    /// `kill -9` of the process and its group; returns when it is reaped.
    pub fn kill9(&self) {
        let mut child = self.lock();
        if matches!(child.try_wait(), Ok(None)) {
            let _ = kill(Pid::from_raw(-(self.pid as i32)), Signal::SIGKILL);
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// SIGTERM, then SIGKILL when it has not ended within `grace`. Returns how it ended by itself, if it did.
    pub async fn stop(&self, grace: Duration) -> Option<ExitStatus> {
        self.signal(Signal::SIGTERM);
        let ended = self.wait(grace).await;
        if ended.is_none() {
            self.kill9();
        }
        ended
    }

    /// Waits for its end at most `limit`.
    pub async fn wait(&self, limit: Duration) -> Option<ExitStatus> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.exit_status() {
                return Some(status);
            }
            if Instant::now() >= deadline {
                return None;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// One paragraph for a failure message: the name, whether it runs, and its last words.
    pub fn report(&self) -> String {
        let state = match self.exit_status() {
            None => "still runs".to_string(),
            Some(status) => format!("ended with {status}"),
        };
        format!("{} (pid {}) {state}; its last lines:\n{}", self.name, self.pid, self.log_tail(30))
    }

    fn lock(&self) -> MutexGuard<'_, Child> {
        self.child.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill9();
    }
}

impl ProcessBuilder {
    /// Starts it in this network namespace.
    pub fn netns(mut self, netns: &Netns) -> Self {
        self.netns = Some(netns.clone());
        self
    }

    /// Puts it into this cgroup before it runs.
    pub fn cgroup(mut self, dir: &Path) -> Self {
        self.cgroup = Some(dir.to_path_buf());
        self
    }

    /// Appends its output to this file; without, the output is discarded.
    pub fn log(mut self, path: &Path) -> Self {
        self.log = Some(path.to_path_buf());
        self
    }

    /// Keeps standard output for [`Process::take_stdout`]; only errors go to the log.
    pub fn piped_stdout(mut self) -> Self {
        self.piped = true;
        self
    }

    /// Starts it.
    ///
    /// # Errors
    /// When the program can not be run, or the namespace or cgroup not be entered.
    pub fn start(mut self) -> Result<Process, NetError> {
        let what = format!("start {}", self.name);
        self.command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        if let Some(path) = &self.log {
            let open = || File::options().create(true).append(true).open(path);
            let file = open().map_err(NetError::io(format!("open log {}", path.display())))?;
            let copy = file.try_clone().map_err(NetError::io(what.clone()))?;
            self.command.stdout(copy).stderr(file);
        }
        if self.piped {
            self.command.stdout(Stdio::piped());
        }
        let cgroup = match &self.cgroup {
            None => None,
            Some(dir) => {
                let path = dir.join("cgroup.procs");
                let file = File::options().write(true).open(&path);
                Some(file.map_err(NetError::io(format!("open {}", path.display())))?)
            }
        };
        let netns = self.netns.clone();
        let parent = std::process::id();
        self.command.process_group(0);
        let prepare = move || {
            // SAFETY: between fork and exec only async-signal-safe calls are made: prctl, getppid, write and setns on
            // file descriptors that were opened before, without allocation.
            unsafe {
                if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
                    return Err(io::Error::last_os_error());
                }
                // The parent may have died before prctl took effect.
                if libc::getppid() as u32 != parent {
                    libc::_exit(1);
                }
                if let Some(cgroup) = &cgroup
                    && libc::write(cgroup.as_raw_fd(), c"0".as_ptr().cast(), 1) != 1
                {
                    return Err(io::Error::last_os_error());
                }
                if let Some(netns) = &netns
                    && libc::setns(netns.as_raw_fd(), libc::CLONE_NEWNET) != 0
                {
                    return Err(io::Error::last_os_error());
                }
            }
            Ok(())
        };
        // SAFETY: see above for what the closure does in the forked child.
        unsafe { self.command.pre_exec(prepare) };
        let child = fork_on_lasting_thread(self.command).map_err(NetError::io(what))?;
        Ok(Process { name: self.name, pid: child.id(), log: self.log, child: Mutex::new(child) })
    }
}

/// What a fork order carries and where its result goes.
type Order = (Command, mpsc::SyncSender<io::Result<Child>>);

/// Forks on the one thread that never ends, so that a child's parent-death signal means the death of this process.
fn fork_on_lasting_thread(command: Command) -> io::Result<Child> {
    static ORDERS: OnceLock<Option<mpsc::Sender<Order>>> = OnceLock::new();
    let orders = ORDERS.get_or_init(|| {
        let (orders, queue) = mpsc::channel::<Order>();
        let work = move || {
            for (mut command, result) in queue {
                let _ = result.send(command.spawn());
            }
        };
        std::thread::Builder::new().name("forker".into()).spawn(work).ok().map(|_| orders)
    });
    let gone = || io::Error::other("the forking thread is gone");
    let (result, answer) = mpsc::sync_channel(1);
    orders.as_ref().ok_or_else(gone)?.send((command, result)).map_err(|_| gone())?;
    answer.recv().map_err(|_| gone())?
}

/// The last `lines` lines of a file, reading at most its last 64 KiB; empty when it can not be read.
pub fn tail(path: &Path, lines: usize) -> String {
    const WINDOW: u64 = 64 * 1024;
    let read = || -> io::Result<String> {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(WINDOW)))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    let text = read().unwrap_or_default();
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

/// The two fields of `/proc/<pid>/stat` that identify a process and its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stat {
    /// `R`, `S`, `D`, `Z`, …
    pub state: char,
    /// Clock ticks from boot to its start: with the pid it names a process for good.
    pub start_time: u64,
}

/// Reads `/proc/<pid>/stat`; `None` when there is no such process.
pub fn stat(pid: i32) -> Option<Stat> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command name is in parentheses and may hold anything, also spaces and parentheses.
    let mut fields = text[text.rfind(')')? + 1..].split_whitespace();
    let state = fields.next()?.chars().next()?;
    // proc(5): state is field 3, starttime is field 22.
    let start_time = fields.nth(18)?.parse().ok()?;
    Some(Stat { state, start_time })
}
