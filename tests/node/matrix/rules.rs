//! What must come of each cell, by the rules of Kubernetes and of the modes; written without looking at the agent.

use std::net::IpAddr;

use kinesin::lab::programs::{How, Outcome};

use super::Mode;
use super::cells::{Cell, ENTRY, Position, Target};

/// What must come of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Expected {
    /// This pod answers, and sees this client.
    Answered { pod: String, client: IpAddr },
    /// `connect(2)` or `sendto(2)` fails.
    Denied,
    /// An ICMP error comes back.
    Refused,
    /// Nothing comes back.
    Silent,
}

/// Cells that are known not to hold, with the reason. Each is printed by every run.
pub(crate) fn excluded(_cell: &Cell, _mode: Mode) -> Option<&'static str> {
    None
}

/// By which node the packet enters the load balancer, where no socket was translated.
pub(crate) fn entered_by(cell: &Cell) -> Option<usize> {
    match (cell.position, cell.target) {
        (_, Target::HostPort) => Some(cell.service.home).filter(|home| cell.node() != Some(*home)),
        (Position::Lan, Target::LoadBalancer) => Some(cell.service.announcer()),
        // A NodePort is the same at every node, and served where the socket is; unless only that node's pods may answer.
        (Position::Host(_) | Position::Pod(_) | Position::Hairpin, Target::EntryNodePort)
            if !cell.service.local_outside =>
        {
            None
        }
        (Position::Lan, _) | (_, Target::EntryNodePort) => Some(ENTRY),
        _ => None,
    }
}

pub(crate) fn expected(cell: &Cell, mode: Mode) -> Expected {
    let service = cell.service;
    let answered = |client| Expected::Answered { pod: service.backend(), client };
    let Some(entry) = entered_by(cell) else {
        // A socket of this node. `internalTrafficPolicy` is about ClusterIPs; `externalTrafficPolicy` does not restrict
        // clients in the cluster.
        let refused = cell.target == Target::ClusterIp && service.local_inside && cell.node() != Some(service.home);
        return if refused { Expected::Denied } else { answered(cell.client()) };
    };
    if cell.target == Target::ClusterIp {
        // Not for the LAN.
        return Expected::Silent;
    }
    // A host port is on its pod's node, so it never gets here.
    if service.local_outside && entry != service.home {
        // Nobody tells a socket that is not connected of ICMP errors.
        return if cell.how == How::UdpUnconnected { Expected::Silent } else { Expected::Refused };
    }
    if entry == service.home || mode.keeps(cell.how) {
        answered(cell.client())
    } else {
        answered(service.plan.node(entry))
    }
}

impl Expected {
    pub(crate) fn meets(&self, seen: &Outcome, cell: &Cell) -> Result<(), String> {
        let fits = match (self, seen) {
            (Self::Answered { pod, client }, Outcome::Answered { pod: who, client: saw, peer }) => {
                if *peer != cell.to() {
                    return Err(format!("the answer is {peer}'s in the client's eyes"));
                }
                pod == who && *client == saw.ip()
            }
            (Self::Denied, Outcome::Denied) | (Self::Refused, Outcome::Refused) | (Self::Silent, Outcome::Silent) => {
                true
            }
            _ => false,
        };
        if fits { Ok(()) } else { Err(format!("expected {self:?}, got {seen:?}")) }
    }
}
