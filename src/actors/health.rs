//! Answers those who ask how the agent is: the admin socket, metrics, liveness and readiness, the kube-proxy health port.
//!
//! owns: the listeners
//! hears: the end of a server; changes of the configuration
//! says: answers over HTTP
//! restart story: binds again
//!
//! Deliberately absent: the answers. They are the app's, behind [`crate::admin::Api`].

use std::future::{Future, pending};
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context;
use tokio::task::JoinHandle;

use crate::actor::{Actor, Failure};
use crate::address::{Address, Label};
use crate::admin::{self, AdminSocket, Api};
use crate::config::{Config, ListenAddr};
use crate::level::Follower;
use crate::world::World;

/// What the actor hears.
pub enum HealthMsg {
    /// The configuration changed.
    Wake,
    /// A server ended, which none should.
    Ended(String),
}

impl Label for HealthMsg {
    fn label(&self) -> &'static str {
        match self {
            Self::Wake => "Wake",
            Self::Ended(_) => "Ended",
        }
    }
}

/// Where to listen.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Listening {
    socket: PathBuf,
    metrics: Option<ListenAddr>,
    healthz: Option<ListenAddr>,
}

impl From<&Config> for Listening {
    fn from(config: &Config) -> Self {
        let observe = &config.observe;
        // Without the replacement kube-proxy itself listens there.
        let healthz = observe.healthz.filter(|_| config.services.kube_proxy_replacement);
        Self { socket: config.paths.socket.clone(), metrics: observe.prometheus, healthz }
    }
}

/// The actor.
pub struct Health {
    world: World,
    api: Arc<dyn Api>,
    me: Address<HealthMsg>,
    config: Follower<Config>,
    listening: Option<Listening>,
    servers: Vec<JoinHandle<()>>,
}

impl Actor for Health {
    type Msg = HealthMsg;
    type Args = (World, Arc<dyn Api>);

    async fn start((world, api): Self::Args, me: Address<HealthMsg>) -> Result<Self, Failure> {
        let config = world.config.follow(me.waker(|| HealthMsg::Wake));
        Ok(Self { world, api, me, config, listening: None, servers: Vec::new() })
    }

    async fn handle(&mut self, message: HealthMsg) -> Result<(), Failure> {
        match message {
            HealthMsg::Wake => {
                if let Some(config) = self.config.changed() {
                    self.listen(Listening::from(&*config)).await?;
                }
                Ok(())
            }
            HealthMsg::Ended(error) => anyhow::bail!(error),
        }
    }

    async fn stop(&mut self) {
        self.close().await;
    }
}

impl Health {
    async fn listen(&mut self, wanted: Listening) -> Result<(), Failure> {
        if self.listening.as_ref() == Some(&wanted) {
            return Ok(());
        }
        self.close().await;
        let socket = AdminSocket::bind(&wanted.socket)
            .with_context(|| format!("open the admin socket {} (socket-path)", wanted.socket.display()))?;
        self.serve("admin socket", socket.serve(self.api.clone(), pending()));
        // A port that is taken must not take the socket down with it.
        let mut problems = Vec::new();
        for (what, address) in [("metrics", wanted.metrics), ("kube-proxy healthz", wanted.healthz)] {
            let Some(address) = address else { continue };
            match admin::bind(&address).await {
                Ok(listener) if what == "metrics" => {
                    self.serve(what, admin::serve_metrics(listener, self.api.clone(), pending()));
                }
                Ok(listener) => self.serve(what, admin::serve_healthz(listener, self.api.clone(), pending())),
                Err(error) => problems.push(format!("{what}: {error}")),
            }
        }
        self.world.problems.set("listeners", problems);
        self.listening = Some(wanted);
        Ok(())
    }

    fn serve(&mut self, what: &'static str, server: impl Future<Output = std::io::Result<()>> + Send + 'static) {
        let me = self.me.clone();
        self.servers.push(tokio::spawn(async move {
            let ended = server.await.err().map_or_else(|| "ended".into(), |error| error.to_string());
            me.cast(HealthMsg::Ended(format!("{what}: {ended}")));
        }));
    }

    /// Waits for the servers, so that their addresses are free afterwards.
    async fn close(&mut self) {
        for server in self.servers.drain(..) {
            server.abort();
            let _ = server.await;
        }
        self.listening = None;
    }
}

impl Drop for Health {
    fn drop(&mut self) {
        self.servers.iter().for_each(JoinHandle::abort);
    }
}
