//! The agent on a node: the real binary, with directories of its own.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::Duration;

use http_body_util::{BodyExt, Full};
use hyper::Method;
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use nix::sys::signal::Signal;
use tokio::net::UnixStream;
use tokio::time::Instant;

use super::{Lab, LabError, Node};
use crate::net::proc::Process;

/// The configuration of agents that read the lab's manifests, beside the directory: the features of the lab, and leases
/// that make a failover quick to watch.
const ON_MANIFESTS: [(&str, &str); 6] = [
    ("source", "manifests"),
    ("enable-l2-announcements", "true"),
    ("kube-proxy-replacement", "true"),
    ("l2-announcements-lease-duration", "3s"),
    ("l2-announcements-renew-deadline", "2s"),
    ("l2-announcements-retry-period", "500ms"),
];

/// How to start an agent.
#[derive(Debug, Clone, Default)]
pub struct AgentOptions {
    binary: PathBuf,
    args: Vec<OsString>,
    env: Vec<(String, String)>,
    config: BTreeMap<String, String>,
    state_dir: Option<PathBuf>,
}

impl AgentOptions {
    /// The binary whose `agent` command is run.
    pub fn new(binary: impl Into<PathBuf>) -> Self {
        Self { binary: binary.into(), ..Self::default() }
    }

    /// Agents that read the lab's manifests and form a cluster through a state directory that they share, with short
    /// leases: what `kinesin lab` runs.
    pub fn on_manifests(lab: &Lab) -> Self {
        let options = Self::new(lab.binary()).state_dir(lab.state_dir());
        let options = options.config("manifests-dir", &lab.manifests_dir().to_string_lossy());
        ON_MANIFESTS.iter().fold(options, |options, (key, value)| options.config(key, value))
    }

    /// Another binary.
    pub fn binary(mut self, path: impl Into<PathBuf>) -> Self {
        self.binary = path.into();
        self
    }

    /// One more argument.
    pub fn arg(mut self, arg: impl Into<OsString>) -> Self {
        self.args.push(arg.into());
        self
    }

    /// One more environment variable.
    pub fn env(mut self, key: &str, value: &str) -> Self {
        self.env.push((key.into(), value.into()));
        self
    }

    /// A key of the configuration directory, as in the ConfigMap.
    pub fn config(mut self, key: &str, value: &str) -> Self {
        self.config.insert(key.into(), value.into());
        self
    }

    /// Another state directory than the node's own, for example one that all nodes share.
    pub fn state_dir(mut self, path: impl Into<PathBuf>) -> Self {
        self.state_dir = Some(path.into());
        self
    }
}

/// A started agent. Dropping it kills the process; what it pinned stays until the lab goes.
#[derive(Debug)]
pub struct AgentHandle {
    process: Process,
    socket: PathBuf,
}

impl Node {
    /// Where this node's agent listens for the command line.
    pub fn agent_socket(&self) -> PathBuf {
        self.dir().join("agent.sock")
    }

    /// Where this node's agent reads its configuration, one file per key.
    pub fn config_dir(&self) -> PathBuf {
        self.dir().join("config")
    }

    /// Writes or changes a key of this node's configuration.
    ///
    /// # Errors
    /// When the file can not be written.
    pub fn set_config(&self, key: &str, value: &str) -> Result<(), LabError> {
        let path = self.config_dir().join(key);
        // Renamed into place: the agent watches the directory and must never read half a value.
        let early = self.dir().join(format!(".{key}"));
        let written = std::fs::write(&early, value).and_then(|()| std::fs::rename(&early, &path));
        written.map_err(LabError::io(format!("write {}", path.display())))
    }

    /// Starts `kinesin agent` on this node and returns at once; see [`AgentHandle::wait_ready`].
    ///
    /// # Errors
    /// When it can not be started.
    pub fn start_agent(&self, options: &AgentOptions) -> Result<AgentHandle, LabError> {
        for (key, value) in &options.config {
            self.set_config(key, value)?;
        }
        let socket = self.agent_socket();
        let state_dir = options.state_dir.clone().unwrap_or_else(|| self.dir().join("state"));
        let mut command = Command::new(&options.binary);
        command.arg("agent");
        let bpf_root = self.bpf_root();
        let config_dir = self.config_dir();
        let flags: [(&str, &Path); 5] = [
            ("--config-dir", &config_dir),
            ("--state-dir", &state_dir),
            ("--bpf-root", &bpf_root),
            ("--cgroup-root", self.cgroup()),
            ("--socket-path", &socket),
        ];
        for (flag, path) in flags {
            command.arg(flag).arg(path);
        }
        command.args(&options.args);
        command.env("K8S_NODE_NAME", self.name());
        command.envs(options.env.iter().map(|(key, value)| (key, value)));
        Ok(AgentHandle { process: self.spawn("agent", command)?, socket })
    }
}

impl AgentHandle {
    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// The process, for its log and state.
    pub fn process(&self) -> &Process {
        &self.process
    }

    /// Its unix socket.
    pub fn socket_path(&self) -> &Path {
        &self.socket
    }

    /// The last lines of its log.
    pub fn logs(&self, lines: usize) -> String {
        self.process.log_tail(lines)
    }

    /// `kill -9`; returns when it is dead.
    pub fn kill9(&self) {
        self.process.kill9();
    }

    /// SIGTERM, and SIGKILL when that does not help within ten seconds. Returns how it ended by itself, if it did.
    pub async fn stop(&self) -> Option<ExitStatus> {
        self.process.stop(Duration::from_secs(10)).await
    }

    /// SIGTERM without waiting.
    pub fn terminate(&self) {
        self.process.signal(Signal::SIGTERM);
    }

    /// Waits until `/readyz` on its socket says 200.
    ///
    /// # Errors
    /// When it ends before, or is not ready within `limit`; the error has its last answer and words.
    pub async fn wait_ready(&self, limit: Duration) -> Result<(), LabError> {
        let deadline = Instant::now() + limit;
        loop {
            let answer = match unix_request(&self.socket, Method::GET, "/readyz", String::new()).await {
                Ok((200, _)) => return Ok(()),
                Ok((status, body)) => format!("{status} {body}"),
                Err(error) => error.to_string(),
            };
            if self.process.exit_status().is_some() || Instant::now() > deadline {
                let report = self.process.report();
                return Err(LabError::Program(format!("the agent is not ready (/readyz: {answer}): {report}")));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Asks the agent's socket for a path; returns status and body.
    ///
    /// # Errors
    /// When it does not answer.
    pub async fn get(&self, path: &str) -> Result<(u16, String), LabError> {
        self.request(Method::GET, path, String::new()).await
    }

    /// Sends JSON to a path of the agent's socket; returns status and body.
    ///
    /// # Errors
    /// When it does not answer.
    pub async fn post(&self, path: &str, body: &serde_json::Value) -> Result<(u16, String), LabError> {
        self.request(Method::POST, path, body.to_string()).await
    }

    async fn request(&self, method: Method, path: &str, body: String) -> Result<(u16, String), LabError> {
        unix_request(&self.socket, method, path, body).await.map_err(|e| {
            LabError::Program(format!("ask {path} of {}: {e}; {}", self.socket.display(), self.process.report()))
        })
    }
}

/// One HTTP request over a unix socket.
async fn unix_request(
    socket: &Path,
    method: Method,
    path: &str,
    body: String,
) -> Result<(u16, String), Box<dyn std::error::Error + Send + Sync>> {
    let work = async {
        let stream = UnixStream::connect(socket).await?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        let connection = tokio::spawn(connection);
        let request = hyper::Request::builder().method(method).uri(path).header(hyper::header::HOST, "localhost");
        let request =
            request.header(hyper::header::CONTENT_TYPE, "application/json").body(Full::new(Bytes::from(body)))?;
        let response = sender.send_request(request).await?;
        let status = response.status().as_u16();
        let body = response.into_body().collect().await?.to_bytes();
        connection.abort();
        Ok((status, String::from_utf8_lossy(&body).into_owned()))
    };
    tokio::time::timeout(Duration::from_secs(5), work).await?
}
