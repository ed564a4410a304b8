//! Frontends as people see them.

use std::net::IpAddr;

use kinesin_abi::frontend_flags;

use super::{BackendRef, BackendView, Compiled, FrontendView, ServiceKey};
use crate::maglev::protocol_name;

/// What `kinesin services` shows of one Service, in order of address, port and protocol.
///
/// A frontend is one line with scope `all`, or two, `external` and `internal`, when clients outside and inside get
/// different backends. Wildcards are left out: nobody connects to them. The surrogate of a NodePort is shown, as Cilium
/// does: `0.0.0.0:30080/TCP` is what people look for, and the node's own addresses follow.
pub fn view(key: &ServiceKey, compiled: &Compiled, status: &str) -> Vec<FrontendView> {
    let service = key.to_string();
    let mut lines = Vec::new();
    for frontend in &compiled.frontends {
        if frontend.flags & frontend_flags::WILDCARD != 0 {
            continue;
        }
        let line = |scope, set| FrontendView {
            address: format!("{}/{}", address_text(frontend.addr, frontend.port), protocol_name(frontend.proto)),
            kind: frontend.kind.text(),
            service: service.clone(),
            port_name: frontend.port_name.clone(),
            scope,
            status: status.to_owned(),
            backends: backends(compiled, set),
        };
        if frontend.external == frontend.internal {
            lines.push(line("all", frontend.internal));
        } else {
            lines.push(line("external", frontend.external));
            lines.push(line("internal", frontend.internal));
        }
    }
    lines
}

fn backends(compiled: &Compiled, set: Option<usize>) -> Vec<BackendView> {
    let Some(set) = set.and_then(|index| compiled.sets.get(index)) else { return Vec::new() };
    set.backends.iter().map(backend).collect()
}

fn backend(backend: &BackendRef) -> BackendView {
    BackendView {
        address: address_text(backend.addr, backend.port),
        state: backend.state.text(),
        node: (&backend.node).into(),
        zone: (&backend.zone).into(),
    }
}

/// `10.96.0.1:80`, `[fd00::1]:80`.
pub fn address_text(addr: IpAddr, port: u16) -> String {
    std::net::SocketAddr::new(addr, port).to_string()
}
