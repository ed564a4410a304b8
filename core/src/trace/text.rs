//! Steps and verdicts in words.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use kinesin_abi::{BackendState, FrontendKey, FrontendKind, proto};

use super::{Bond, FlowDirection, Method, Neighbour, Packet, Port, Step, Tuple, Verdict};

/// `192.168.1.50:40000 -> 10.0.0.100:80 TCP`
pub(super) fn packet(packet: &Packet) -> String {
    let end = |ip: IpAddr, port: u16| {
        if matches!(packet.proto, proto::ICMP | proto::ICMPV6) {
            ip.to_string()
        } else {
            SocketAddr::new(ip, port).to_string()
        }
    };
    let src = packet.src.map_or_else(|| "any address".into(), |ip| end(ip, packet.sport));
    format!("{src} -> {} {}", end(packet.dst, packet.dport), protocol(packet.proto))
}

pub(super) fn protocol(number: u8) -> String {
    match number {
        proto::ANY => "ANY".into(),
        proto::ICMP => "ICMP".into(),
        proto::ICMPV6 => "ICMPv6".into(),
        proto::TCP => "TCP".into(),
        proto::UDP => "UDP".into(),
        proto::SCTP => "SCTP".into(),
        other => other.to_string(),
    }
}

/// `10.0.0.100:80/TCP`
pub(super) fn frontend(key: &FrontendKey) -> String {
    format!("{}/{}", SocketAddr::new(key.addr.into(), key.port.get()), protocol(key.proto))
}

pub(super) fn kind(flags: u32) -> &'static str {
    FrontendKind::of(flags).map_or("?", FrontendKind::text)
}

pub(super) fn state(state: u8) -> &'static str {
    BackendState::of(state).map_or("?", BackendState::text)
}

impl Step {
    /// What the step is about, one or two words.
    pub const fn title(&self) -> &'static str {
        match self {
            Self::Hook { .. } => "hook",
            Self::Neighbour { .. } => "neighbour",
            Self::Flow { .. } | Self::NoFlow => "connection",
            Self::Frontend { .. } | Self::NoFrontend { .. } => "service",
            Self::SourceRanges { .. } => "source ranges",
            Self::Affinity { .. } => "affinity",
            Self::Selection { .. } => "selection",
            Self::Backend(_) => "backend",
            Self::Source { .. } => "source",
            Self::Route { .. } | Self::NoRoute { .. } => "route",
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hook { program, place, note } if note.is_empty() => write!(f, "{program}, {place}"),
            Self::Hook { program, place, note } => write!(f, "{program}, {place}: {note}"),
            Self::Neighbour { address, device, answers } => match answers {
                Neighbour::Program => write!(f, "this node answers for {address} on {device}"),
                Neighbour::SilentWithoutAgent => {
                    write!(
                        f,
                        "this node should answer for {address} on {device}, but its agent is dead, so it is silent"
                    )
                }
                Neighbour::Host => write!(f, "the host answers for {address}, an address of {device}"),
                Neighbour::NotThisNode => write!(f, "this node does not answer for {address} on {device}"),
            },
            Self::Flow { direction, becomes, backend, idle_seconds, seen, past } => {
                let of = match direction {
                    FlowDirection::Request => "from the client",
                    FlowDirection::Reply => "from the backend",
                };
                write!(f, "known, {of}: becomes {becomes}, backend {backend}, last packet {idle_seconds} s ago")?;
                if !seen.is_empty() {
                    write!(f, ", seen {}", seen.join(" "))?;
                }
                past.as_ref().map_or(Ok(()), |why| write!(f, "; does not count: {why}"))
            }
            Self::NoFlow => f.write_str("a new one"),
            Self::Frontend { key, by, kind, service, id, scope, policy, backends } => {
                let name = service.as_ref().map_or_else(String::new, |name| format!(" of {name}"));
                if by == "wildcard" {
                    return write!(f, "no service has this port, but the address is ours: {key} ({by})");
                }
                write!(f, "{key} ({by}), {kind}{name}, id {id}: {scope} traffic, policy {policy}, {backends} backends")
            }
            Self::NoFrontend { tried } => write!(f, "none: no {}", tried.join(", no ")),
            Self::SourceRanges { client, list, matched, served } => {
                let outcome = if *served { "served" } else { "refused" };
                match matched {
                    Some(prefix) => write!(f, "{client} is in {prefix} of the {list} list: {outcome}"),
                    None => write!(f, "{client} is in no prefix of the {list} list: {outcome}"),
                }
            }
            Self::Affinity { client, timeout_seconds, bond } => match bond {
                Bond::Binds { backend, idle_seconds } => write!(
                    f,
                    "{client} is bound to backend {backend}, last used {idle_seconds} s ago (timeout {timeout_seconds} s)"
                ),
                Bond::Void { backend, why } => write!(f, "{client} was bound to backend {backend}, but {why}"),
                Bond::None => write!(f, "{client} is not bound yet (timeout {timeout_seconds} s)"),
                Bond::Unknown => write!(f, "{client} may be bound to one of these; which one it is, is not known here"),
            },
            Self::Selection { method, of } => match method {
                Method::Affinity => f.write_str("the backend that the client is bound to"),
                Method::Random => write!(f, "at random, one of {of}"),
                Method::Maglev { index, size, seed } => {
                    write!(
                        f,
                        "maglev: the connection hashes to slot {index} of {size} (seed {seed:#x}), of {of} backends"
                    )
                }
                Method::MaglevMissing { why } => write!(f, "maglev, but {why}: at random, one of {of}"),
            },
            Self::Backend(member) => {
                let at = if member.local { "on this node" } else { "elsewhere" };
                write!(f, "{} {}, {}, {at}", member.id, member.address, member.state)
            }
            Self::Source { address, kept, port, why } => {
                let what = if *kept { "the client's address" } else { "this node's address" };
                write!(f, "{what} {address} port {port}: {why}")
            }
            Self::Route { to, device, via, mac, neighbour } => {
                write!(f, "to {to} by {device}")?;
                if let Some(via) = via {
                    write!(f, " via {via}")?;
                }
                match mac {
                    Some(mac) => write!(f, ", neighbour {mac} ({neighbour})"),
                    None => write!(f, ", neighbour {neighbour}"),
                }
            }
            Self::NoRoute { to, why } => write!(f, "to {to}: {why}"),
        }
    }
}

impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.first == self.last { write!(f, "{}", self.first) } else { write!(f, "{}-{}", self.first, self.last) }
    }
}

impl fmt::Display for Tuple {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let src = if self.src.is_ipv6() { format!("[{}]", self.src) } else { self.src.to_string() };
        write!(f, "{src}:{} -> {}", self.sport, SocketAddr::new(self.dst, self.dport))
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pass { why } => write!(f, "left as it is: {why}"),
            Self::Translated(tuple) => write!(f, "becomes {tuple}, and the host's stack goes on with it"),
            Self::Sent { tuple, device } => write!(f, "becomes {tuple}, and leaves by {device}"),
            Self::Wrapped { from, to, device } => {
                write!(f, "goes on as it is inside {from} -> {to} by {device}: the backend's node translates it")
            }
            Self::HandedOn { mac, device } => {
                write!(
                    f,
                    "goes on as it is to {mac}, the node of the backend, by {device}, and that node answers the client"
                )
            }
            Self::Answered { with } => write!(f, "answered at once: {with}"),
            Self::Dropped { reason, number, told } => {
                write!(f, "dropped: {reason} ({number})")?;
                told.as_ref().map_or(Ok(()), |told| write!(f, "; the sender is told: {told}"))
            }
            Self::Connects { to } => write!(f, "the socket talks to {to}, and sees the service's address"),
            Self::Denied { errno } => write!(f, "the system call fails with {errno}: the service has no backend here"),
        }
    }
}
