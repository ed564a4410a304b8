//! The question as people write it.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use kinesin_abi::proto;
use serde::{Deserialize, Serialize};

/// What is asked, in words: the arguments of `kinesin trace`, and the query of the admin socket.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Question {
    /// `<address>[:port][@device]`, `host`, or `pod`.
    pub src: String,
    /// `<address>:port`, or an address alone for ICMP.
    pub dst: String,
    /// `tcp` (which an empty text means), `udp`, `sctp`, `icmp`
    pub proto: String,
    /// The device that the packet comes in by; empty where that follows from the source.
    pub device: String,
    /// `packet` or `socket`; empty where that follows from the source.
    pub hook: String,
}

/// Which hooks are asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HookChoice {
    /// Those of sockets: the client is on this node.
    Socket,
    /// Those of packets only.
    Packet,
}

/// The source, as it was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// A process of this node, by whatever address.
    Host,
    /// A pod of this node, whichever.
    Pod,
    /// An address.
    Address(IpAddr),
}

/// A question that makes sense by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// The source.
    pub source: Source,
    /// Its port; none where none was written.
    pub sport: Option<u16>,
    /// Destination address.
    pub dst: IpAddr,
    /// Destination port; 0 for ICMP.
    pub dport: u16,
    /// IP protocol number.
    pub proto: u8,
    /// The device by name.
    pub device: Option<String>,
    /// The hook, where one was chosen.
    pub hook: Option<HookChoice>,
}

/// What is wrong with a question: the argument, what it says, and what it should.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{argument} {value:?}: {problem}")]
pub struct QuestionError {
    /// `src`, `dst`, `--proto`, `--device`, `--hook`
    pub argument: &'static str,
    /// What was written.
    pub value: String,
    /// What is wrong, and what to write instead.
    pub problem: String,
}

impl Question {
    /// Understands it.
    ///
    /// # Errors
    /// Names the argument and what to write instead.
    pub fn parse(&self) -> Result<Written, QuestionError> {
        let proto = protocol(&self.proto)?;
        let wrong = |argument, value: &str, problem: &str| QuestionError {
            argument,
            value: value.into(),
            problem: problem.into(),
        };
        let (place, at_device) = match self.src.split_once('@') {
            Some((_, "")) => return Err(wrong("src", &self.src, "no device after @; write for example @eth0")),
            Some((place, device)) => (place, Some(device)),
            None => (self.src.as_str(), None),
        };
        let device = match (at_device, self.device.as_str()) {
            (Some(a), b) if !b.is_empty() && a != b => {
                return Err(wrong("--device", b, "src names another device; leave one of them out"));
            }
            (Some(device), _) => Some(device),
            (None, device) => Some(device).filter(|device| !device.is_empty()),
        };
        let hook = match self.hook.as_str() {
            "" => None,
            "packet" => Some(HookChoice::Packet),
            "socket" => Some(HookChoice::Socket),
            other => return Err(wrong("--hook", other, "there are packet and socket")),
        };
        let (source, sport) = match place {
            "host" => (Source::Host, None),
            "pod" => (Source::Pod, None),
            text => {
                const FORMS: &str = "write an address with or without port, as 192.168.1.50:40000, or host, or pod";
                let (ip, port) = endpoint(text).ok_or_else(|| wrong("src", &self.src, FORMS))?;
                (Source::Address(ip), port)
            }
        };
        if device.is_some() && !matches!(source, Source::Address(_)) {
            return Err(wrong("src", &self.src, "what comes in by a device has an address; write that"));
        }
        let (dst, dport) = endpoint(&self.dst)
            .ok_or_else(|| wrong("dst", &self.dst, "write an address and a port, as 10.0.0.100:80 or [fd00::1]:80"))?;
        // Each family has its own.
        let proto = if proto == proto::ICMP && dst.is_ipv6() { proto::ICMPV6 } else { proto };
        let dport = match (dport, proto) {
            (_, proto::ICMP | proto::ICMPV6) => 0,
            (Some(0), _) => return Err(wrong("dst", &self.dst, "port 0 is no destination; write 1 to 65535")),
            (Some(port), _) => port,
            (None, _) => return Err(wrong("dst", &self.dst, "no port; add one as in 10.0.0.100:80, or --proto icmp")),
        };
        if let Source::Address(ip) = source
            && ip.is_ipv4() != dst.is_ipv4()
        {
            return Err(wrong("src", &self.src, "not of the family of dst; write two addresses of one family"));
        }
        Ok(Written { source, sport, dst, dport, proto, device: device.map(Into::into), hook })
    }
}

fn protocol(text: &str) -> Result<u8, QuestionError> {
    match text.to_ascii_lowercase().as_str() {
        "" | "tcp" => Ok(proto::TCP),
        "udp" => Ok(proto::UDP),
        "sctp" => Ok(proto::SCTP),
        "icmp" => Ok(proto::ICMP),
        _ => Err(QuestionError {
            argument: "--proto",
            value: text.into(),
            problem: "there are tcp, udp, sctp and icmp".into(),
        }),
    }
}

/// `10.0.0.1`, `10.0.0.1:80`, `fd00::1`, `[fd00::1]`, `[fd00::1]:80`; IPv4-mapped addresses are the IPv4 ones.
fn endpoint(text: &str) -> Option<(IpAddr, Option<u16>)> {
    if let Ok(ip) = IpAddr::from_str(text.trim_start_matches('[').trim_end_matches(']')) {
        let bare = text.starts_with('[') == text.ends_with(']');
        return bare.then_some((ip.to_canonical(), None));
    }
    let both = std::net::SocketAddr::from_str(text).ok()?;
    Some((both.ip().to_canonical(), Some(both.port())))
}

impl fmt::Display for Question {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} to {}", self.src, self.dst)
    }
}
