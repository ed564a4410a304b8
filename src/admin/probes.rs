//! What other programs ask: `/metrics`, `/livez`, `/readyz`, and kube-proxy's `/healthz`.

use std::future::Future;
use std::io;
use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Json, Response};
use axum::routing::get;
use serde::Serialize;
use tokio::net::TcpListener;

use super::Api;
use super::views::{Healthz, Readiness};
use crate::config::ListenAddr;

type Shared = Arc<dyn Api>;

/// Binds to the first of the address's candidates that works.
///
/// # Errors
/// The last candidate's error, with the address in its text.
pub async fn bind(addr: &ListenAddr) -> io::Result<TcpListener> {
    let mut last = io::Error::new(io::ErrorKind::InvalidInput, "no address");
    for candidate in addr.candidates() {
        match TcpListener::bind(candidate).await {
            Ok(listener) => return Ok(listener),
            Err(error) => last = error,
        }
    }
    Err(io::Error::new(last.kind(), format!("listen on {addr}: {last}")))
}

/// Serves `/metrics`, `/livez`, `/readyz` and `/healthz` until `shutdown` completes.
///
/// # Errors
/// None that a caller could act on; accept errors are retried inside.
pub async fn serve_metrics(
    listener: TcpListener,
    api: Arc<dyn Api>,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    axum::serve(listener, router(api)).with_graceful_shutdown(shutdown).await
}

/// Serves only `/healthz`, as kube-proxy does on its health address, until `shutdown` completes.
///
/// # Errors
/// None that a caller could act on; accept errors are retried inside.
pub async fn serve_healthz(
    listener: TcpListener,
    api: Arc<dyn Api>,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    let router = Router::new().route("/healthz", get(healthz)).with_state(api);
    axum::serve(listener, router).with_graceful_shutdown(shutdown).await
}

/// All probes, also part of the admin socket.
pub(super) fn router(api: Shared) -> Router {
    Router::new()
        .route("/metrics", get(metrics))
        .route("/livez", get(async |State(api): State<Shared>| probe(api.live())))
        .route("/readyz", get(async |State(api): State<Shared>| probe(api.ready())))
        .route("/healthz", get(healthz))
        .with_state(api)
}

async fn metrics(State(api): State<Shared>) -> Response {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], api.metrics().await).into_response()
}

fn probe(answer: Readiness) -> Response {
    let code = if answer.ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (code, Json(answer)).into_response()
}

/// Body of `/healthz`, with kube-proxy's names.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct HealthzBody {
    last_updated: String,
    current_time: String,
}

/// What Go prints for a time that never was.
const NEVER: &str = "0001-01-01T00:00:00Z";

async fn healthz(State(api): State<Shared>) -> Response {
    let Healthz { ok, last_updated, current } = api.healthz();
    let body = HealthzBody {
        last_updated: last_updated.map_or_else(|| NEVER.into(), |time| time.to_string()),
        current_time: current.to_string(),
    };
    // Without a complete sync there is nothing that could be healthy.
    let code = if ok && last_updated.is_some() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (code, [(header::X_CONTENT_TYPE_OPTIONS, "nosniff")], Json(body)).into_response()
}
