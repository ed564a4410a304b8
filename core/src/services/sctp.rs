//! SCTP ports (RFC 9260), which keep their numbers on the way.
//!
//! SCTP's checksum is a CRC32c of the whole packet without addresses: a new address costs nothing, a new port would mean
//! to compute it over everything, which no eBPF helper does. So a frontend leads to the endpoints that listen on its own
//! port number, and what that leaves out is a problem of the object.

use std::net::IpAddr;

use kinesin_abi::{FrontendKind, proto};

use super::BackendRef;
use super::compile::{Builder, PortSets};
use super::topology::{self, Hints, Prefer};
use crate::objects::ServicePort;

impl Builder<'_> {
    /// Adds the frontends of the SCTP port `spec.ports[index]`.
    pub(super) fn sctp(
        &mut self,
        (index, port): (usize, &ServicePort),
        addresses: &[(IpAddr, FrontendKind)],
        (all, hints): (&[BackendRef], &[Hints]),
        prefer: Prefer,
    ) {
        if !self.node.sctp {
            self.problems.note(format!(
                "spec.ports[{index}].protocol: SCTP is not served on this node; set enable-sctp to true"
            ));
            return;
        }
        for (node_port, number) in [(false, port.port), (true, port.node_port)] {
            let mine = addresses.iter().filter(|(_, kind)| (*kind == FrontendKind::NodePort) == node_port);
            if number == 0 || mine.clone().next().is_none() {
                continue;
            }
            let same = all.iter().zip(hints).filter(|(backend, _)| backend.port == number);
            let (kept, hints): (Vec<_>, Vec<_>) = same.map(|(backend, hints)| (backend.clone(), *hints)).unzip();
            if let Some(other) = all.iter().find(|backend| backend.port != number) {
                self.problems.note(match node_port {
                    false => format!(
                        "spec.ports[{index}].targetPort: SCTP ports are not rewritten, so port {number} does not reach endpoints on port {}; make port and targetPort equal",
                        other.port
                    ),
                    true => format!(
                        "spec.ports[{index}].nodePort: SCTP ports are not rewritten, so {number} does not reach endpoints on port {}; use port {} of another address, and set spec.allocateLoadBalancerNodePorts to false",
                        other.port, port.port
                    ),
                });
                if kept.is_empty() {
                    continue;
                }
            }
            let near = [false, true].map(|v4| topology::near(&kept, &hints, prefer, v4));
            let mut sets = PortSets { all: &kept, near, known: [None; 4] };
            for &(addr, kind) in mine {
                self.add(addr, number, proto::SCTP, kind, &port.name, &mut sets);
            }
        }
    }
}
