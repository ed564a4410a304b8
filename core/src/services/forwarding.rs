//! How packets get to backends on other nodes, and the annotations that say so for one Service.

use kinesin_abi::{frontend_flags, proto};

use super::problems::Problems;
use super::{Algorithm, NodeContext};
use crate::objects::Service;
use crate::presence::{TAKES_IPIP, TAKES_OPT};

/// How packets of this Service get to backends on other nodes.
const MODE: &str = "service.cilium.io/forwarding-mode";
/// How this Service's backends are selected.
const ALGORITHM: &str = "service.cilium.io/lb-algorithm";

/// One way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Dispatch {
    /// With this node's address as source: replies come back here.
    #[default]
    Snat,
    /// As they are, to a node on the same segment, which answers the client itself; else as [`Self::Snat`].
    L2,
    /// As [`Self::L2`]; to nodes elsewhere inside another IP packet, where they take it.
    Ipip,
    /// As [`Self::L2`]; to backends elsewhere with the client's address, and the service's in an option, where their node
    /// takes it.
    Opt,
}

impl Dispatch {
    /// Of [`frontend_flags::FORWARDING`].
    pub fn flag(self) -> u32 {
        match self {
            Self::Snat => frontend_flags::FORWARDING_SNAT,
            Self::L2 => frontend_flags::FORWARDING_L2,
            Self::Ipip => frontend_flags::FORWARDING_IPIP,
            Self::Opt => frontend_flags::FORWARDING_OPT,
        }
    }

    /// The name that keys and status show.
    pub fn text(self) -> &'static str {
        match self {
            Self::Snat => "snat",
            Self::L2 => "l2",
            Self::Ipip => "ipip",
            Self::Opt => "opt",
        }
    }

    /// What a node's presence record must say for packets to go to it in this way when it is elsewhere; none where nothing
    /// goes there.
    pub fn taken_as(self) -> Option<&'static str> {
        match self {
            Self::Snat | Self::L2 => None,
            Self::Ipip => Some(TAKES_IPIP),
            Self::Opt => Some(TAKES_OPT),
        }
    }
}

/// The ways by transport (`bpf-lb-mode` and `bpf-lb-dsr-dispatch`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Forwarding {
    /// Of TCP.
    pub tcp: Dispatch,
    /// Of everything else.
    pub other: Dispatch,
}

impl Forwarding {
    /// The same way for all.
    pub fn all(dispatch: Dispatch) -> Self {
        Self { tcp: dispatch, other: dispatch }
    }

    /// The way of an IP protocol.
    pub fn of(self, protocol: u8) -> Dispatch {
        if protocol == proto::TCP { self.tcp } else { self.other }
    }
}

/// The ways of a Service: its annotation's, where that counts and can be read, else the node's.
pub(super) fn of(service: &Service, node: &NodeContext, problems: &mut Problems) -> Forwarding {
    let Some(text) = service.metadata.annotations.get(MODE) else { return node.forwarding };
    let Some(dsr) = node.dsr_by_annotation else {
        problems.note(format!("metadata.annotations[{MODE}]: has no effect; set bpf-lb-mode-annotation=true"));
        return node.forwarding;
    };
    match text.as_str() {
        "dsr" => dsr,
        "snat" => Forwarding::all(Dispatch::Snat),
        other => {
            problems.note(format!("metadata.annotations[{MODE}]: \"{other}\" is unknown and ignored; use dsr or snat"));
            node.forwarding
        }
    }
}

/// The algorithm of a Service, in the same way.
pub(super) fn algorithm(service: &Service, node: &NodeContext, problems: &mut Problems) -> Algorithm {
    let Some(text) = service.metadata.annotations.get(ALGORITHM) else { return node.algorithm };
    if !node.algorithm_by_annotation {
        problems
            .note(format!("metadata.annotations[{ALGORITHM}]: has no effect; set bpf-lb-algorithm-annotation=true"));
        return node.algorithm;
    }
    match text.as_str() {
        "random" => Algorithm::Random,
        "maglev" => Algorithm::Maglev,
        other => {
            problems.note(format!(
                "metadata.annotations[{ALGORITHM}]: \"{other}\" is unknown and ignored; use random or maglev"
            ));
            node.algorithm
        }
    }
}
