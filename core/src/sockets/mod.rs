//! Which sockets talk to a backend that their service does not have any more.
//!
//! A socket that was translated when it connected keeps its backend for as long as its owner keeps it. A change of a
//! Service tells which pairs of frontend and backend are over ([`Gone`]); the cost of finding out is that Service's
//! frontends and backends. Whether a socket belongs to a pair is asked for the few sockets that are connected to such a
//! backend.
//!
//! Deliberately absent: sockets, and how they are ended.

#[cfg(test)]
mod tests;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use kinesin_abi::BackendState;

use crate::services::{Compiled, Frontend};

/// Address, port and IP protocol number.
pub type End = (IpAddr, u16, u8);

/// Pairs of backend and frontend that are over.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Gone {
    /// By backend: the frontends through which sockets came to it. A NodePort of all addresses has an unspecified one.
    pairs: HashMap<End, BTreeSet<End>>,
}

impl Gone {
    /// What a change of a Service ends: backends that are in none of a frontend's sets any more, or take no packets, and
    /// all of them where the frontend is gone.
    pub fn between(old: Option<&Compiled>, new: Option<&Compiled>) -> Self {
        let mut gone = Self::default();
        let Some(old) = old else { return gone };
        let served: HashMap<End, HashSet<End>> = new.map(served).unwrap_or_default();
        for frontend in old.frontends.iter().filter(|frontend| frontend.port != 0) {
            let still = served.get(&end(frontend));
            for backend in backends(old, frontend, |_| true) {
                if still.is_none_or(|still| !still.contains(&backend)) {
                    gone.pairs.entry(backend).or_default().insert(end(frontend));
                }
            }
        }
        gone
    }

    /// The pairs among `sockets` (what was asked for, and where it led) that no Service has; for what changed while
    /// nobody watched.
    pub fn among<'a>(sockets: impl Iterator<Item = (End, End)>, services: impl Iterator<Item = &'a Compiled>) -> Self {
        let mut gone = Self::default();
        for (asked, backend) in sockets {
            gone.pairs.entry(backend).or_default().insert(asked);
        }
        for service in services {
            for (frontend, backends) in served(service) {
                for backend in backends {
                    let Some(asked) = gone.pairs.get_mut(&backend) else { continue };
                    asked.retain(|asked| !leads(&frontend, asked));
                    if asked.is_empty() {
                        gone.pairs.remove(&backend);
                    }
                }
            }
        }
        gone
    }

    /// Whether nothing is over.
    pub fn is_empty(&self) -> bool {
        self.pairs.is_empty()
    }

    /// Adds the pairs of another.
    pub fn merge(&mut self, other: Self) {
        for (backend, frontends) in other.pairs {
            self.pairs.entry(backend).or_default().extend(frontends);
        }
    }

    /// Whether any pair is of this IP protocol.
    pub fn has_protocol(&self, protocol: u8) -> bool {
        self.pairs.keys().any(|backend| backend.2 == protocol)
    }

    /// Whether sockets connected to this backend may have to be ended.
    pub fn concerns(&self, backend: &End) -> bool {
        self.pairs.contains_key(backend)
    }

    /// Whether a socket that asked for one end and was led to a backend is to be ended.
    pub fn includes(&self, asked: &End, backend: &End) -> bool {
        self.pairs.get(backend).is_some_and(|frontends| frontends.iter().any(|frontend| leads(frontend, asked)))
    }
}

/// Whether who asks for `asked` is served by the frontend. Sockets reach NodePorts by any local address.
fn leads(frontend: &End, asked: &End) -> bool {
    let any = frontend.0 == IpAddr::V4(Ipv4Addr::UNSPECIFIED) || frontend.0 == IpAddr::V6(Ipv6Addr::UNSPECIFIED);
    (frontend.1, frontend.2) == (asked.1, asked.2) && (frontend.0 == asked.0 || any)
}

fn end(frontend: &Frontend) -> End {
    (frontend.addr, frontend.port, frontend.proto)
}

/// The backends of a frontend, of both scopes, by state.
fn backends(
    compiled: &Compiled,
    frontend: &Frontend,
    which: impl Fn(BackendState) -> bool + Copy,
) -> impl Iterator<Item = End> {
    let sets = [frontend.external, frontend.internal].into_iter().flatten();
    let sets = sets.filter_map(|index| compiled.sets.get(index)).flat_map(|set| set.backends.iter());
    let ends: Vec<End> = sets.filter(|b| which(b.state)).map(|b| (b.addr, b.port, b.proto)).collect();
    ends.into_iter()
}

/// What each frontend leads to: backends that take packets.
fn served(compiled: &Compiled) -> HashMap<End, HashSet<End>> {
    let takes = |state| matches!(state, BackendState::Active | BackendState::Terminating);
    let mut all: HashMap<End, HashSet<End>> = HashMap::new();
    for frontend in compiled.frontends.iter().filter(|frontend| frontend.port != 0) {
        all.entry(end(frontend)).or_default().extend(backends(compiled, frontend, takes));
    }
    all
}
