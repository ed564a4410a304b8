//! What other programs ask: `/metrics`, `/livez`, `/readyz`, and kube-proxy's `/healthz` and `/livez`.

use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Json, Response};
use axum::routing::get;
use metrics::counter;
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

/// Serves only `/healthz` and `/livez`, as kube-proxy does on its health address, until `shutdown` completes.
///
/// # Errors
/// None that a caller could act on; accept errors are retried inside.
pub async fn serve_healthz(
    listener: TcpListener,
    api: Arc<dyn Api>,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    let router = Router::new().route("/healthz", get(healthz)).route("/livez", get(livez)).with_state(api);
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

/// Body of kube-proxy's two answers, with its names and order.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ProxyHealth {
    last_updated: String,
    current_time: String,
    /// Only in `/healthz`.
    #[serde(skip_serializing_if = "Option::is_none")]
    node_eligible: Option<bool>,
    healthy: bool,
    status: BTreeMap<&'static str, FamilyHealth>,
}

/// Health of one address family: here both share their fate.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct FamilyHealth {
    last_updated: String,
    healthy: bool,
}

/// What Go prints for a time that never was.
const NEVER: &str = "0001-01-01T00:00:00Z";

/// Whether load balancers elsewhere should send traffic here.
async fn healthz(State(api): State<Shared>) -> Response {
    let health = api.healthz();
    let eligible = health.node_eligible;
    proxy_health("healthz", health.healthy && eligible, &health, Some(eligible))
}

/// Whether the proxy works, on a node that is going away too: KEP-3836 keeps the kubelet from restarting it for that.
async fn livez(State(api): State<Shared>) -> Response {
    let health = api.healthz();
    proxy_health("livez", health.healthy, &health, None)
}

fn proxy_health(path: &'static str, ok: bool, health: &Healthz, node_eligible: Option<bool>) -> Response {
    let last_updated = || health.last_updated.map_or_else(|| NEVER.into(), |time| time.to_string());
    let family = |name: &&'static str| (*name, FamilyHealth { last_updated: last_updated(), healthy: health.healthy });
    let body = ProxyHealth {
        last_updated: last_updated(),
        current_time: health.current.to_string(),
        node_eligible,
        healthy: health.healthy,
        status: health.families.iter().map(family).collect(),
    };
    let code = if ok { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    counter!("kinesin_proxy_health_answers_total", "path" => path, "code" => code.as_str().to_owned()).increment(1);
    (code, [(header::X_CONTENT_TYPE_OPTIONS, "nosniff")], Json(body)).into_response()
}
