//! Compiled services as people read them.

use kinesin_abi::{BackendState, FrontendKind, proto};

use super::{BackendSet, BackendView, Compiled, Frontend, FrontendView, ServiceKey};

/// The Service's frontends for `kinesin services`; one object, or two where the scopes differ. Wildcards are left out.
pub fn view(key: &ServiceKey, compiled: &Compiled, status: &str) -> Vec<FrontendView> {
    let shown = compiled.frontends.iter().filter(|frontend| frontend.port != 0);
    shown
        .flat_map(|frontend| {
            let one = |scope, set| object(key, compiled, frontend, status, scope, set);
            match (frontend.external, frontend.internal) {
                (external, internal) if external == internal => vec![one("all", external)],
                (external, internal) => vec![one("external", external), one("internal", internal)],
            }
        })
        .collect()
}

fn object(
    key: &ServiceKey,
    compiled: &Compiled,
    frontend: &Frontend,
    status: &str,
    scope: &'static str,
    set: Option<usize>,
) -> FrontendView {
    let empty = BackendSet::default();
    let set = set.and_then(|index| compiled.sets.get(index)).unwrap_or(&empty);
    let backend = |backend: &super::BackendRef| BackendView {
        address: std::net::SocketAddr::new(backend.addr, backend.port).to_string(),
        state: state_name(backend.state),
        node: backend.node.clone(),
        zone: backend.zone.clone(),
    };
    let address = std::net::SocketAddr::new(frontend.addr, frontend.port);
    FrontendView {
        address: format!("{address}/{}", protocol_name(frontend.proto)),
        kind: kind_name(frontend.kind),
        service: key.to_string(),
        port_name: frontend.port_name.clone(),
        scope,
        status: status.to_owned(),
        backends: set.backends.iter().map(backend).collect(),
    }
}

/// `TCP`, `UDP`, `SCTP`, `ANY`
pub fn protocol_name(protocol: u8) -> &'static str {
    match protocol {
        proto::TCP => "TCP",
        proto::UDP => "UDP",
        proto::SCTP => "SCTP",
        _ => "ANY",
    }
}

/// As in `kinesin services`.
pub fn kind_name(kind: FrontendKind) -> &'static str {
    match kind {
        FrontendKind::ClusterIp => "ClusterIP",
        FrontendKind::NodePort => "NodePort",
        FrontendKind::LoadBalancer => "LoadBalancer",
        FrontendKind::ExternalIps => "ExternalIPs",
        FrontendKind::HostPort => "HostPort",
    }
}

/// As in `kinesin services`.
pub fn state_name(state: BackendState) -> &'static str {
    match state {
        BackendState::Free => "free",
        BackendState::Active => "active",
        BackendState::Terminating => "terminating",
        BackendState::TerminatingNotServing => "terminating-not-serving",
        BackendState::Maintenance => "maintenance",
    }
}
