//! What the agent tells about itself: HTTP and JSON on a unix socket for the command line, and the TCP endpoints that
//! Prometheus, the kubelet and load balancers ask.
//!
//! Everything here is a question; what answers is an [`Api`], which the agent implements. Deliberately absent: state.

mod probes;
mod server;
pub mod views;

use futures::future::BoxFuture;
use kinesin_core::services::{FrontendView, WideView};
use kinesin_core::trace::{Question, Trace};
use serde::Serialize;
use thiserror::Error;

pub use probes::{bind, serve_healthz, serve_metrics};
pub(crate) use server::Kill;
pub use server::{AdminSocket, router};
use views::{ConfigView, DumpRow, Healthz, Readiness, StatusView, TableView, TreeView, VipView};

/// The agent, as seen from outside.
///
/// Questions may wait for an actor, but only as long as the implementation allows: the server sets no deadline. The
/// probes (`ready`, `live`, `healthz`) must answer at once, because a late answer counts as a bad one.
pub trait Api: Send + Sync + 'static {
    /// Everything at a glance.
    fn status(&self) -> BoxFuture<'_, StatusView>;
    /// One entry per frontend, sorted by address.
    fn services(&self) -> BoxFuture<'_, Vec<FrontendView>>;
    /// The same with everything that decides who gets a connection, and the backends that get none.
    fn services_wide(&self) -> BoxFuture<'_, Vec<WideView>>;
    /// One entry per announced address, sorted by address.
    fn vips(&self) -> BoxFuture<'_, Vec<VipView>>;
    /// The actors, from the root.
    fn tree(&self) -> BoxFuture<'_, TreeView>;
    /// The tables that [`Api::dump`] knows, in a stable order.
    fn tables(&self) -> BoxFuture<'_, Vec<TableView>>;
    /// A table's rows.
    ///
    /// # Errors
    /// [`ApiError::NotFound`] for a table that does not exist.
    fn dump<'a>(&'a self, table: &'a str) -> BoxFuture<'a, Result<Vec<DumpRow>, ApiError>>;
    /// What would happen to a packet, from the maps as they are now.
    ///
    /// # Errors
    /// [`ApiError::Invalid`] for a question that makes no sense, with the argument and what to write.
    fn trace(&self, question: Question) -> BoxFuture<'_, Result<Trace, ApiError>>;
    /// Objects as the source has them, with `apiVersion` and `kind`. `kind` is a lower-case plural (`services`); `name`
    /// is `namespace/name`, or a bare name, which may match in several namespaces.
    ///
    /// # Errors
    /// [`ApiError::NotFound`] for a kind that is not read, or a name that no object has.
    fn get<'a>(
        &'a self,
        kind: &'a str,
        name: Option<&'a str>,
    ) -> BoxFuture<'a, Result<Vec<serde_json::Value>, ApiError>>;
    /// Makes an actor panic. The server lets only root ask.
    ///
    /// # Errors
    /// [`ApiError::NotFound`] for an actor that is not there.
    fn kill<'a>(&'a self, actor: &'a str) -> BoxFuture<'a, Result<(), ApiError>>;
    /// The metrics in Prometheus' text format.
    fn metrics(&self) -> BoxFuture<'_, String>;
    /// Whether new traffic may be sent here: the first complete sync is done.
    fn ready(&self) -> Readiness;
    /// Whether the process should be left running.
    fn live(&self) -> Readiness;
    /// What kube-proxy's health server would say.
    fn healthz(&self) -> Healthz;
    /// The configuration in effect.
    fn config(&self) -> BoxFuture<'_, ConfigView>;
}

/// Why a question has no answer. The text is for people and names what was asked.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum ApiError {
    /// There is no such thing.
    #[error("{0}")]
    NotFound(String),
    /// The question makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// Somebody else may ask this.
    #[error("{0}")]
    Forbidden(String),
    /// Whoever knows is not running right now.
    #[error("{0}")]
    Unavailable(String),
}

/// Body of an answer that is an error.
#[derive(Debug, Serialize, serde::Deserialize)]
pub struct ErrorBody {
    /// The text of an [`ApiError`].
    pub error: String,
}

#[cfg(test)]
mod tests;
