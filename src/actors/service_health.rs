//! Answers on the health-check node ports of Services: load balancers outside send only to nodes that have endpoints.
//!
//! owns: a listener on `spec.healthCheckNodePort` of each Service that has one
//! hears: changed health checks; the clock while a port cannot be opened
//! says: over HTTP 200 or 503 and the number of local endpoints; which ports could not be opened
//! restart story: opens the ports again, from the table of health checks
//!
//! Deliberately absent: counting, which the compiler of Services does. An answer reads the table at that moment.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::extract::connect_info::{ConnectInfo, Connected};
use axum::http::{HeaderName, StatusCode, header};
use axum::response::{IntoResponse, Json, Response};
use axum::serve::IncomingStream;
use kinesin_core::services::{HealthCheck, HealthPorts, ServiceKey};
use metrics::{counter, gauge};
use serde::Serialize;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::actor::{Actor, Failure};
use crate::address::{Address, Label, Timer};
use crate::admin;
use crate::config::ListenAddr;
use crate::sync::lock;
use crate::table::Subscription;
use crate::world::World;

/// What the actor hears.
pub enum ServiceHealthMsg {
    /// A health check changed.
    Wake,
    /// Time to try the ports again that could not be opened.
    Retry,
}

impl Label for ServiceHealthMsg {
    fn label(&self) -> &'static str {
        match self {
            Self::Wake => "Wake",
            Self::Retry => "Retry",
        }
    }
}

/// How long to wait before a port that somebody else has is tried again.
const RETRY: Duration = Duration::from_secs(5);
/// How many requests a load balancer should send here in proportion to other nodes; kube-proxy has it too.
const WEIGHT: HeaderName = HeaderName::from_static("x-load-balancing-endpoint-weight");

/// The actor.
pub struct ServiceHealth {
    world: World,
    me: Address<ServiceHealthMsg>,
    checks: Subscription<ServiceKey, HealthCheck>,
    ports: HealthPorts,
    open: BTreeMap<u16, Open>,
    /// Whom each open port speaks for.
    speaks_for: Arc<Mutex<BTreeMap<u16, ServiceKey>>>,
    retry: Option<Timer>,
}

/// A listener. Dropping it closes the port and lets requests under way finish.
struct Open {
    _stop: oneshot::Sender<()>,
    server: JoinHandle<()>,
}

impl Actor for ServiceHealth {
    type Msg = ServiceHealthMsg;
    type Args = World;

    async fn start(world: World, me: Address<ServiceHealthMsg>) -> Result<Self, Failure> {
        let checks = world.health_checks.subscribe(me.waker(|| ServiceHealthMsg::Wake));
        let (ports, open, speaks_for) = (HealthPorts::default(), BTreeMap::new(), Arc::default());
        Ok(Self { world, me, checks, ports, open, speaks_for, retry: None })
    }

    async fn handle(&mut self, _: ServiceHealthMsg) -> Result<(), Failure> {
        for (service, check) in self.checks.take() {
            self.ports.set(&service, check.map(|check| check.port));
        }
        self.listen().await;
        Ok(())
    }
}

impl ServiceHealth {
    /// Opens and closes ports until they are those that are wanted.
    async fn listen(&mut self) {
        let wanted: BTreeMap<u16, ServiceKey> =
            self.ports.wanted().into_iter().map(|(port, service)| (port, service.clone())).collect();
        self.open.retain(|port, open| {
            let stays = wanted.contains_key(port) && !open.server.is_finished();
            if !stays {
                tracing::info!(port, "health-check port closed");
            }
            stays
        });
        lock(&self.speaks_for).clone_from(&wanted);
        let mut problems = self.ports.problems();
        let mut failed = 0;
        for (&port, service) in &wanted {
            if self.open.contains_key(&port) {
                continue;
            }
            match admin::bind(&ListenAddr { ip: None, port }).await {
                Ok(listener) => {
                    tracing::info!(port, service = %service, "health-check port opened");
                    self.open.insert(port, self.serve(port, listener));
                }
                Err(error) => {
                    failed += 1;
                    problems.push(format!(
                        "Service {service}: spec.healthCheckNodePort {port}: {error}; end what has the port on this node, or give the Service another one"
                    ));
                }
            }
        }
        gauge!("kinesin_health_check_ports", "state" => "open").set(self.open.len() as f64);
        gauge!("kinesin_health_check_ports", "state" => "failed").set(f64::from(failed));
        self.world.problems.set("health-check-ports", problems);
        self.retry = (failed > 0).then(|| self.me.cast_after(RETRY, ServiceHealthMsg::Retry));
    }

    fn serve(&self, port: u16, listener: TcpListener) -> Open {
        let (stop, stopped) = oneshot::channel::<()>();
        let asked = Asked { world: self.world.clone(), speaks_for: self.speaks_for.clone(), port };
        let service = Router::new().fallback(answer).with_state(asked).into_make_service_with_connect_info::<Local>();
        let server = tokio::spawn(async move {
            let until = async { drop(stopped.await) };
            // It ends when it is told to; accept errors are retried inside.
            let _ = axum::serve(listener, service).with_graceful_shutdown(until).await;
        });
        Open { _stop: stop, server }
    }
}

/// What an answer needs.
#[derive(Clone)]
struct Asked {
    world: World,
    speaks_for: Arc<Mutex<BTreeMap<u16, ServiceKey>>>,
    port: u16,
}

/// The address of this node that was asked.
#[derive(Clone, Copy)]
struct Local(Option<IpAddr>);

impl Connected<IncomingStream<'_, TcpListener>> for Local {
    fn connect_info(stream: IncomingStream<'_, TcpListener>) -> Self {
        Self(stream.io().local_addr().ok().map(|addr| addr.ip().to_canonical()))
    }
}

/// The body, with kube-proxy's names.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Body<'a> {
    service: &'a ServiceKey,
    local_endpoints: usize,
    service_proxy_healthy: bool,
}

/// Whatever the path and the method, as kube-proxy does.
async fn answer(State(asked): State<Asked>, ConnectInfo(Local(at)): ConnectInfo<Local>) -> Response {
    let networks = &asked.world.config().services.node_port_addresses;
    let served = networks.is_empty() || at.is_some_and(|at| networks.iter().any(|network| network.contains(&at)));
    let service = lock(&asked.speaks_for).get(&asked.port).cloned();
    let Some(service) = service.filter(|_| served) else { return StatusCode::NOT_FOUND.into_response() };
    let local = asked.world.health_checks.get(&service).map_or(0, |check| check.local);
    let healthy = asked.world.unhealthy().is_empty();
    let code = if local > 0 && healthy { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    counter!("kinesin_health_check_answers_total", "code" => code.as_str().to_owned()).increment(1);
    let headers = [(header::X_CONTENT_TYPE_OPTIONS, "nosniff".to_owned()), (WEIGHT, local.to_string())];
    let body = Body { service: &service, local_endpoints: local, service_proxy_healthy: healthy };
    (code, headers, Json(body)).into_response()
}
