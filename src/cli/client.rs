//! A small blocking client of the admin socket.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use super::CliError;
use crate::admin::ErrorBody;

/// Where agents listen unless told otherwise.
pub(super) const DEFAULT_SOCKET: &str = "/var/run/kinesin/kinesin.sock";
/// How long an answer may take. The slowest one reads every map of a node with thousands of services.
const DEADLINE: Duration = Duration::from_secs(30);

/// The options of every command that asks an agent.
#[derive(clap::Args, Clone, Debug)]
pub(super) struct Connection {
    /// The agent's admin socket [default: $KINESIN_SOCKET_PATH, else /var/run/kinesin/kinesin.sock]
    #[arg(long, env = "KINESIN_SOCKET", value_name = "PATH")]
    socket_path: Option<PathBuf>,
}

impl Connection {
    /// A client for it.
    pub(super) fn client(&self) -> Client {
        let from_agent = || std::env::var_os("KINESIN_SOCKET_PATH").filter(|path| !path.is_empty()).map(PathBuf::from);
        Client::new(self.socket_path.clone().or_else(from_agent).unwrap_or_else(|| DEFAULT_SOCKET.into()))
    }
}

/// Asks one agent; each question is a connection of its own.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
}

impl Client {
    /// A client of the agent that listens on `socket`.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self { socket: socket.into() }
    }

    /// Asks for `path` (with query) and reads the JSON of the answer.
    ///
    /// # Errors
    /// [`CliError::Unreachable`] when nobody answers, [`CliError::Answered`] with the agent's text otherwise.
    pub fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, CliError> {
        let body = self.request(Method::GET, path, None)?;
        serde_json::from_slice(&body).map_err(|error| {
            CliError::Answered(format!("the answer to {path} makes no sense ({error}): is the agent of this version?"))
        })
    }

    /// Sends `body` as JSON to `path`; the answer's body is of no interest.
    ///
    /// # Errors
    /// As [`Client::get`].
    pub fn post<T: Serialize>(&self, path: &str, body: &T) -> Result<(), CliError> {
        let body = serde_json::to_vec(body).map_err(|error| CliError::Answered(error.to_string()))?;
        self.request(Method::POST, path, Some(body)).map(drop)
    }

    fn request(&self, method: Method, path: &str, body: Option<Vec<u8>>) -> Result<Bytes, CliError> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| CliError::Answered(format!("cannot start: {error}")))?;
        runtime.block_on(async {
            match tokio::time::timeout(DEADLINE, exchange(&self.socket, method, path, body)).await {
                Ok(answer) => answer,
                Err(_) => Err(self.unreachable(&format!("no answer within {} s", DEADLINE.as_secs()))),
            }
        })
    }

    fn unreachable(&self, why: &str) -> CliError {
        unreachable(&self.socket, why, HINT_BUSY)
    }
}

const HINT_ABSENT: &str =
    "check that an agent runs on this node, and that --socket-path (or KINESIN_SOCKET) is its socket-path";
const HINT_DENIED: &str = "the socket belongs to the user that runs the agent: try as root";
const HINT_BUSY: &str = "an agent is there but does not answer: see its log";

fn unreachable(socket: &Path, why: &str, hint: &'static str) -> CliError {
    CliError::Unreachable { socket: socket.display().to_string(), why: why.into(), hint }
}

async fn exchange(socket: &Path, method: Method, path: &str, body: Option<Vec<u8>>) -> Result<Bytes, CliError> {
    let stream = UnixStream::connect(socket).await.map_err(|error| {
        let hint = if error.kind() == io::ErrorKind::PermissionDenied { HINT_DENIED } else { HINT_ABSENT };
        unreachable(socket, &error.to_string(), hint)
    })?;
    let broken = |error: hyper::Error| unreachable(socket, &error.to_string(), HINT_BUSY);
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
    // Its errors come out of the request too; it ends with the sender.
    tokio::spawn(connection);
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header(hyper::header::HOST, "kinesin")
        .header(hyper::header::CONTENT_TYPE, "application/json")
        .body(Full::new(Bytes::from(body.unwrap_or_default())))
        .map_err(|error| CliError::Usage(format!("{path}: {error}")))?;
    let answer = sender.send_request(request).await.map_err(broken)?;
    let code = answer.status();
    let body = answer.into_body().collect().await.map_err(broken)?.to_bytes();
    if code.is_success() {
        return Ok(body);
    }
    let text = serde_json::from_slice::<ErrorBody>(&body).map(|body| body.error);
    Err(CliError::Answered(text.unwrap_or_else(|_| format!("{code}: {}", String::from_utf8_lossy(&body)))))
}

/// `text` for use in a path or a query.
pub(super) fn percent_encode(text: &str) -> String {
    text.bytes()
        .map(|byte| match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => char::from(byte).to_string(),
            _ => format!("%{byte:02X}"),
        })
        .collect()
}
