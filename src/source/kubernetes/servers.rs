//! The API servers: one client for each, the one in use, and what became of the calls.
//!
//! A server that cannot be reached is left for the next one; which one answers does not matter, they share a store.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use futures::AsyncBufRead;
use http::{HeaderName, HeaderValue, Request};
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use kube::client::ConfigExt;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::core::Status;
use kube::{Client, Config};
use tokio::sync::Notify;
use tower::{BoxError, ServiceBuilder};

use super::limit::Limiter;
use crate::source::{SourceHealth, WriteError, status};

/// A server that does not accept connections within this time is not there.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// An idle connection is probed after this time, so that a dead peer is noticed long before a watch would end by itself …
const KEEPALIVE_AFTER: Duration = Duration::from_secs(15);
/// … this often …
const KEEPALIVE_EVERY: Duration = Duration::from_secs(5);
/// … and given up after so many.
const KEEPALIVE_TRIES: u32 = 3;
/// Sent data must be acknowledged (by the peer's kernel) within this time.
const USER_TIMEOUT: Duration = Duration::from_secs(30);
/// An answer may take this long: API servers stall for 30 s behind failing webhooks (R51).
const CALL_TIMEOUT: Duration = Duration::from_secs(45);

/// How to reach the Kubernetes API.
#[derive(Clone, Debug, PartialEq)]
pub struct KubernetesOptions {
    /// `--k8s-kubeconfig-path`; without it the pod's service account is used.
    pub kubeconfig: Option<PathBuf>,
    /// `--k8s-api-server-urls`, tried in order; they replace the kubeconfig's or the pod's server.
    pub api_server_urls: Vec<String>,
    /// Namespace of the agents and their Leases (`CILIUM_K8S_NAMESPACE`).
    pub namespace: String,
    /// `k8s-client-qps`: calls per second on average; not above zero means no limit.
    pub qps: f64,
    /// `k8s-client-burst`: calls that may come at once.
    pub burst: u32,
}

/// Why no client can be made. Whether a server answers is not asked yet.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The kubeconfig cannot be read or used.
    #[error("k8s-kubeconfig-path {path}: {message}")]
    Kubeconfig {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// Neither a kubeconfig, nor a pod, nor a URL.
    #[error("{message}; set k8s-kubeconfig-path or k8s-api-server-urls when not running in a pod")]
    InCluster {
        /// What is missing.
        message: String,
    },
    /// An element of `k8s-api-server-urls` is no URL.
    #[error("k8s-api-server-urls: \"{url}\": {message}; write https://host:port")]
    Url {
        /// As written.
        url: String,
        /// What is wrong with it.
        message: String,
    },
    /// TLS or authentication cannot be set up.
    #[error("client for {url}: {message}")]
    Client {
        /// The server.
        url: String,
        /// What is wrong.
        message: String,
    },
}

/// Whether a call waits for the rate limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Class {
    /// Lists and direct reads: neither waits nor counts.
    Read,
    /// Leases: counts, does not wait.
    Lease,
    /// Status: counts and waits.
    Status,
}

/// Why a call failed.
#[derive(Debug)]
pub(super) enum CallError {
    /// The server said no.
    Answer(Box<Status>),
    /// There was no answer.
    Transport(String),
}

struct Server {
    url: String,
    client: Client,
}

struct Connection {
    up: bool,
    since: String,
    last_error: Option<String>,
}

/// All servers, and the figures for [`SourceHealth`].
pub(super) struct Servers {
    servers: Vec<Server>,
    current: AtomicUsize,
    pub(super) limiter: Limiter,
    connection: Mutex<Connection>,
    /// Told when a server answers after none did.
    pub(super) recovered: Notify,
    calls: AtomicU64,
    failed: AtomicU64,
    /// By kind and object, or by kind alone.
    problems: Mutex<BTreeMap<(&'static str, String), String>>,
}

impl Servers {
    pub(super) async fn new(options: &KubernetesOptions) -> Result<Self, ConnectError> {
        let base = config(options).await?;
        let urls = &options.api_server_urls;
        let servers = if urls.is_empty() {
            vec![server(base)?]
        } else {
            let with_url = |url: &String| {
                let wrong = |message: String| ConnectError::Url { url: url.clone(), message };
                let uri: http::Uri = url.parse().map_err(|error: http::uri::InvalidUri| wrong(error.to_string()))?;
                if uri.host().is_none() || !matches!(uri.scheme_str(), Some("http" | "https")) {
                    return Err(wrong("scheme or host is missing".to_owned()));
                }
                let mut config = base.clone();
                config.cluster_url = uri;
                server(config)
            };
            urls.iter().map(with_url).collect::<Result<Vec<_>, _>>()?
        };
        Ok(Self {
            servers,
            current: AtomicUsize::new(0),
            limiter: Limiter::new(options.qps, options.burst),
            connection: Mutex::new(Connection { up: false, since: status::now(), last_error: None }),
            recovered: Notify::new(),
            calls: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            problems: Mutex::new(BTreeMap::new()),
        })
    }

    fn current(&self) -> (usize, &Server) {
        let index = self.current.load(Ordering::Relaxed) % self.servers.len();
        (index, &self.servers[index])
    }

    /// A client for the server in use.
    pub(super) fn client(&self) -> Client {
        self.current().1.client.clone()
    }

    /// How many servers there are.
    pub(super) fn count(&self) -> usize {
        self.servers.len()
    }

    /// Makes a call and returns the whole answer.
    pub(super) async fn call(&self, class: Class, request: Request<Vec<u8>>) -> Result<Vec<u8>, CallError> {
        match class {
            Class::Read => {}
            Class::Lease => self.limiter.charge(),
            Class::Status => self.limiter.acquire().await,
        }
        self.calls.fetch_add(1, Ordering::Relaxed);
        let (index, server) = self.current();
        let outcome = tokio::time::timeout(CALL_TIMEOUT, server.client.request_text(request)).await;
        self.judge(index, outcome.map(|answer| answer.map(String::into_bytes)))
    }

    /// Opens a watch. Its lines end when the server or the connection does.
    pub(super) async fn open(&self, mut request: Request<Vec<u8>>) -> Result<impl AsyncBufRead + use<>, CallError> {
        // A compressed stream would be flushed per event and gain little; servers of 1.37 compress each event by itself.
        request.headers_mut().insert(http::header::ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        self.calls.fetch_add(1, Ordering::Relaxed);
        let (index, server) = self.current();
        let outcome = tokio::time::timeout(CALL_TIMEOUT, server.client.request_stream(request)).await;
        self.judge(index, outcome)
    }

    fn judge<R>(
        &self,
        index: usize,
        outcome: Result<kube::Result<R>, tokio::time::error::Elapsed>,
    ) -> Result<R, CallError> {
        let error = match outcome {
            Ok(Ok(answer)) => {
                self.reached();
                return Ok(answer);
            }
            Ok(Err(kube::Error::Api(answer))) => {
                if matches!(answer.code, 502..=504) {
                    self.lost(index, &format!("{}: {}", self.servers[index].url, answer.message));
                } else {
                    self.reached();
                }
                // Lost races and absent objects are everyday answers.
                if !matches!(answer.code, 404 | 409 | 410) {
                    self.failed.fetch_add(1, Ordering::Relaxed);
                }
                return Err(CallError::Answer(answer));
            }
            Ok(Err(error)) => chain(&error),
            Err(_) => format!("no answer within {} s", CALL_TIMEOUT.as_secs()),
        };
        let error = format!("{}: {error}", self.servers[index].url);
        self.failed.fetch_add(1, Ordering::Relaxed);
        self.lost(index, &error);
        Err(CallError::Transport(error))
    }

    fn reached(&self) {
        let mut connection = self.connection.lock().unwrap_or_else(PoisonError::into_inner);
        if !connection.up {
            connection.up = true;
            connection.since = status::now();
            drop(connection);
            tracing::info!(server = self.current().1.url, "API server answers");
            self.recovered.notify_waiters();
        }
    }

    /// Goes on to the next server, unless somebody else did already.
    pub(super) fn lost(&self, index: usize, error: &str) {
        let next = (index + 1) % self.servers.len();
        let _ = self.current.compare_exchange(index, next, Ordering::Relaxed, Ordering::Relaxed);
        let mut connection = self.connection.lock().unwrap_or_else(PoisonError::into_inner);
        connection.last_error = Some(error.to_owned());
        if connection.up {
            connection.up = false;
            connection.since = status::now();
            tracing::warn!(error, "API server does not answer");
        }
    }

    /// Records what is wrong with an object (or a kind, with an empty name), or that it is well again.
    pub(super) fn set_problem(&self, kind: &'static str, name: String, problem: Option<String>) {
        let mut problems = self.problems.lock().unwrap_or_else(PoisonError::into_inner);
        match problem {
            Some(text) => drop(problems.insert((kind, name), text)),
            None => drop(problems.remove(&(kind, name))),
        }
    }

    pub(super) fn health(&self) -> SourceHealth {
        let connection = self.connection.lock().unwrap_or_else(PoisonError::into_inner);
        let problems = self.problems.lock().unwrap_or_else(PoisonError::into_inner);
        SourceHealth {
            connected: connection.up,
            since: connection.since.clone(),
            location: self.current().1.url.clone(),
            last_error: connection.last_error.clone(),
            calls: self.calls.load(Ordering::Relaxed),
            calls_failed: self.failed.load(Ordering::Relaxed),
            calls_limited: self.limiter.waited(),
            problems: problems.values().cloned().collect(),
        }
    }
}

impl CallError {
    /// In the words of [`WriteError`].
    pub(super) fn into_write_error(self, kind: &'static str, name: String) -> WriteError {
        match self {
            Self::Transport(message) => WriteError::Unavailable { kind, name, message },
            Self::Answer(status) => match status.code {
                404 => WriteError::NotFound { kind, name },
                409 => WriteError::Conflict { kind, name },
                400 | 403 | 405 | 413 | 415 | 422 => {
                    WriteError::Refused { kind, name, message: status.message.clone() }
                }
                code => WriteError::Unavailable { kind, name, message: format!("{code}: {}", status.message) },
            },
        }
    }
}

/// An error with its causes, each once.
pub(in crate::source) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

async fn config(options: &KubernetesOptions) -> Result<Config, ConnectError> {
    let path = options.kubeconfig.as_ref().filter(|path| !path.as_os_str().is_empty());
    let mut config = match path {
        Some(path) => {
            let wrong = |message: String| ConnectError::Kubeconfig { path: path.clone(), message };
            let kubeconfig = Kubeconfig::read_from(path).map_err(|error| wrong(chain(&error)))?;
            Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default())
                .await
                .map_err(|error| wrong(chain(&error)))?
        }
        None => match (Config::incluster_env(), options.api_server_urls.first()) {
            (Ok(config), _) => config,
            // A plain server without credentials; the URLs are put in place by the caller.
            (Err(_), Some(_)) => Config::new(http::Uri::from_static("http://localhost")),
            (Err(error), None) => return Err(ConnectError::InCluster { message: chain(&error) }),
        },
    };
    let agent = HeaderValue::from_static(concat!("kinesin-agent/", env!("CARGO_PKG_VERSION")));
    config.headers.push((HeaderName::from_static("user-agent"), agent));
    Ok(config)
}

/// Each watch has a connection with a buffer that grows with what comes, and stays: a TLS record is 16 KiB at most.
const READ_BUFFER: usize = 64 << 10;

/// A client with connections that notice when their peer is dead. Deliberately without kube's own retries: whoever calls
/// knows better what is still worth repeating.
fn server(config: Config) -> Result<Server, ConnectError> {
    let url = config.cluster_url.to_string();
    let wrong = |error: kube::Error| ConnectError::Client { url: url.clone(), message: chain(&error) };
    // Fails only when somebody was faster, which is as good.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();

    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    tcp.set_nodelay(true);
    tcp.set_connect_timeout(Some(CONNECT_TIMEOUT));
    tcp.set_keepalive(Some(KEEPALIVE_AFTER));
    tcp.set_keepalive_interval(Some(KEEPALIVE_EVERY));
    tcp.set_keepalive_retries(Some(KEEPALIVE_TRIES));
    tcp.set_tcp_user_timeout(Some(USER_TIMEOUT));
    let connector = config.rustls_https_connector_with_connector(tcp).map_err(wrong)?;
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(config.auth_layer().map_err(wrong)?)
        .layer(config.extra_headers_layer().map_err(wrong)?)
        .map_err(BoxError::from)
        .service(
            hyper_util::client::legacy::Client::builder(TokioExecutor::new())
                .http1_max_buf_size(READ_BUFFER)
                .build(connector),
        );
    let client = Client::new(service, config.default_namespace.clone());
    Ok(Server { client, url })
}
