//! The admin socket: HTTP/1.1 with JSON on a unix socket that only its owner may open.

use std::fs;
use std::future::Future;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use axum::Router;
use axum::extract::connect_info::{ConnectInfo, Connected};
use axum::extract::{Path as UrlPath, Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Json, Response};
use axum::routing::{get, post};
use axum::serve::IncomingStream;
use serde::{Deserialize, Serialize};
use tokio::net::UnixListener;

use super::views::Dump;
use super::{Api, ApiError, ErrorBody, probes};

/// Longest path of a unix socket, bytes (`sun_path` without its terminator).
const SUN_PATH_MAX: usize = 107;
/// What is added to the path while the socket is prepared.
const SUFFIX: &str = ".new";

/// A bound admin socket. The file is removed when this is dropped, unless it is somebody else's by then.
#[derive(Debug)]
pub struct AdminSocket {
    listener: Option<UnixListener>,
    path: PathBuf,
    inode: u64,
}

impl AdminSocket {
    /// Creates the socket at `path` with mode 0600 and its directory. A socket file that nobody listens on is replaced;
    /// there is no moment at which others could connect.
    ///
    /// Must be called within a tokio runtime.
    ///
    /// # Errors
    /// When another process answers on `path`, when the path is too long for a socket, or when a file cannot be made.
    pub fn bind(path: &Path) -> io::Result<Self> {
        let mut temporary = path.as_os_str().to_owned();
        temporary.push(SUFFIX);
        let temporary = PathBuf::from(temporary);
        let length = temporary.as_os_str().len();
        if length > SUN_PATH_MAX {
            let max = SUN_PATH_MAX - SUFFIX.len();
            let text = format!("socket-path {} is longer than {max} bytes: choose a shorter one", path.display());
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        if StdUnixStream::connect(path).is_ok() {
            let text = format!("another agent answers on {}: give each its own socket-path", path.display());
            return Err(io::Error::new(io::ErrorKind::AddrInUse, text));
        }
        if fs::symlink_metadata(&temporary).is_ok() {
            fs::remove_file(&temporary)?;
        }
        let listener = UnixListener::bind(&temporary)?;
        fs::set_permissions(&temporary, fs::Permissions::from_mode(0o600))?;
        let inode = fs::symlink_metadata(&temporary)?.ino();
        fs::rename(&temporary, path)?;
        Ok(Self { listener: Some(listener), path: path.to_path_buf(), inode })
    }

    /// Serves until `shutdown` completes; requests under way are answered first.
    ///
    /// # Errors
    /// None that a caller could act on; accept errors are retried inside.
    pub async fn serve(
        mut self,
        api: Arc<dyn Api>,
        shutdown: impl Future<Output = ()> + Send + 'static,
    ) -> io::Result<()> {
        let Some(listener) = self.listener.take() else { return Ok(()) };
        let service = router(api).into_make_service_with_connect_info::<Peer>();
        axum::serve(listener, service).with_graceful_shutdown(shutdown).await
    }
}

impl Drop for AdminSocket {
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|meta| meta.ino() == self.inode) {
            // Best effort: the next start replaces what is left.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Who is on the other side, by the kernel's word (`SO_PEERCRED`).
#[derive(Clone, Copy, Debug)]
struct Peer {
    uid: Option<u32>,
}

impl Connected<IncomingStream<'_, UnixListener>> for Peer {
    fn connect_info(stream: IncomingStream<'_, UnixListener>) -> Self {
        Self { uid: stream.io().peer_cred().ok().map(|cred| cred.uid()) }
    }
}

type Shared = Arc<dyn Api>;

/// The routes of the admin socket. The server must provide a peer's credentials, as [`AdminSocket::serve`] does;
/// without them nobody counts as root.
pub fn router(api: Arc<dyn Api>) -> Router {
    Router::new()
        .route("/v1/status", get(async |State(api): State<Shared>| Json(api.status().await)))
        .route("/v1/services", get(async |State(api): State<Shared>| Json(api.services().await)))
        .route("/v1/services/wide", get(async |State(api): State<Shared>| Json(api.services_wide().await)))
        .route("/v1/vips", get(async |State(api): State<Shared>| Json(api.vips().await)))
        .route("/v1/tree", get(async |State(api): State<Shared>| Json(api.tree().await)))
        .route("/v1/config", get(async |State(api): State<Shared>| Json(api.config().await)))
        .route("/v1/tables", get(async |State(api): State<Shared>| Json(api.tables().await)))
        .route("/v1/tables/{table}", get(dump))
        .route("/v1/objects/{kind}", get(objects))
        .route("/v1/trace", get(trace))
        .route("/v1/debug/kill", post(kill))
        .fallback(async || ApiError::NotFound("this agent has no such question: are both of one version?".into()))
        .with_state(api.clone())
        .merge(probes::router(api))
}

async fn dump(State(api): State<Shared>, UrlPath(table): UrlPath<String>) -> Result<Json<Dump>, ApiError> {
    let rows = api.dump(&table).await?;
    Ok(Json(Dump { table, rows }))
}

async fn trace(
    State(api): State<Shared>,
    Query(question): Query<kinesin_core::trace::Question>,
) -> Result<Json<kinesin_core::trace::Trace>, ApiError> {
    Ok(Json(api.trace(question).await?))
}

#[derive(Deserialize)]
struct ObjectQuery {
    name: Option<String>,
}

async fn objects(
    State(api): State<Shared>,
    UrlPath(kind): UrlPath<String>,
    Query(query): Query<ObjectQuery>,
) -> Result<Json<Vec<serde_json::Value>>, ApiError> {
    Ok(Json(api.get(&kind, query.name.as_deref()).await?))
}

/// Body of `POST /v1/debug/kill`.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Kill {
    /// The actor's name in the tree.
    pub(crate) actor: String,
}

async fn kill(
    State(api): State<Shared>,
    peer: Option<axum::Extension<ConnectInfo<Peer>>>,
    Json(Kill { actor }): Json<Kill>,
) -> Result<StatusCode, ApiError> {
    let uid = peer.and_then(|axum::Extension(ConnectInfo(peer))| peer.uid);
    if uid != Some(0) {
        return Err(ApiError::Forbidden(format!("only root may make {actor} panic")));
    }
    tracing::warn!(actor, "asked to panic over the admin socket");
    api.kill(&actor).await?;
    Ok(StatusCode::NO_CONTENT)
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let code = match &self {
            Self::NotFound(_) => StatusCode::NOT_FOUND,
            Self::Invalid(_) => StatusCode::BAD_REQUEST,
            Self::Forbidden(_) => StatusCode::FORBIDDEN,
            Self::Unavailable(_) => StatusCode::SERVICE_UNAVAILABLE,
        };
        (code, Json(ErrorBody { error: self.to_string() })).into_response()
    }
}
