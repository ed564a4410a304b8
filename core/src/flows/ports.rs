//! Source ports of translated connections: how many are in use towards each backend, and what to say when they run out.
//!
//! A port of this node serves one connection per backend. The programs try a few at random, so that a few connections fail
//! long before the last port is taken. Deliberately absent: counting what is in the tables.

use std::collections::HashMap;
use std::net::IpAddr;

use kinesin_abi::{FLOW_REDIRECT, FLOW_REPLY, FlowKey, FlowValue, proto};

/// What connections with this source and this destination share: the ports of one address of this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ports {
    /// The backend's address.
    pub backend: IpAddr,
    /// Its port.
    pub port: u16,
    /// IP protocol number.
    pub proto: u8,
    /// This node's address, as the backend sees it.
    pub source: IpAddr,
}

/// From this share on, new connections may soon be refused: of some twenty ports that are tried all are taken once in a
/// hundred thousand connections here, and once in five where nine of ten are taken.
const PRESSURE: f64 = 0.6;
/// More backends than these are not named.
const NAMED: usize = 8;

/// Counts ports in use.
#[derive(Clone, Debug, Default)]
pub struct PortCount(HashMap<Ports, u32>);

impl PortCount {
    /// Whether an entry stands for a port: the one of the client's direction. SCTP keeps the client's port, whatever its
    /// range.
    pub fn counts(key: &FlowKey, value: &FlowValue) -> bool {
        value.flags & (FLOW_REDIRECT | FLOW_REPLY) == FLOW_REDIRECT && key.proto != proto::SCTP
    }

    /// Notes an entry that [counts](Self::counts).
    pub fn note(&mut self, key: &FlowKey, value: &FlowValue) {
        let ports =
            Ports { backend: value.dst.into(), port: value.dport.get(), proto: key.proto, source: value.src.into() };
        *self.0.entry(ports).or_default() += 1;
    }

    /// The fullest, first.
    pub fn fullest(self) -> Vec<(Ports, u32)> {
        let mut all: Vec<_> = self.0.into_iter().collect();
        all.sort_by_key(|(ports, used)| (std::cmp::Reverse(*used), *ports));
        all.truncate(NAMED);
        all
    }
}

/// Share of the ports that the fullest has in use, 0 to 1.
pub fn pressure(fullest: &[(Ports, u32)], span: u32) -> f64 {
    fullest.first().map_or(0.0, |(_, used)| f64::from(*used) / f64::from(span.max(1)))
}

/// What is to be said: of `fullest`, where so many ports are to be had, and `refused` says that a new connection has
/// found none since the last look. `name` gives a backend's Service and node, for people. The texts stay the same while
/// the condition does.
pub fn problems(
    fullest: &[(Ports, u32)],
    span: u32,
    refused: bool,
    name: impl Fn(&Ports) -> Option<String>,
) -> Vec<String> {
    let tight = fullest.iter().filter(|(_, used)| f64::from(*used) >= PRESSURE * f64::from(span));
    let texts: Vec<String> = tight
        .map(|(ports, _)| {
            let Ports { backend, port, proto, source } = ports;
            let end = std::net::SocketAddr::new(*backend, *port);
            let of = name(ports).map(|name| format!(" ({name})")).unwrap_or_default();
            let what = if refused { "are running out, new connections are refused" } else { "are getting few" };
            format!(
                "source ports of {source} towards backend {end}/{}{of} {what}: give the Service more backends, let the backends' nodes take packets as they are (bpf-lb-mode dsr, bpf-lb-dsr-dispatch l2), or lower bpf-ct-timeout-regular-tcp and bpf-ct-timeout-regular-any",
                crate::maglev::protocol_name(*proto)
            )
        })
        .collect();
    if texts.is_empty() && refused {
        return vec![
            "new connections are refused for want of a source address or port: see that this node has an address on the way to its backends, and that no two clients use the same SCTP port"
                .into(),
        ];
    }
    texts
}

#[cfg(test)]
mod tests {
    use kinesin_abi::Be16;

    use super::*;

    fn entry(n: u16, backend: &str, flags: u8, protocol: u8) -> (FlowKey, FlowValue) {
        let backend: IpAddr = backend.parse().expect("an address");
        let source: IpAddr =
            if backend.is_ipv4() { [192, 168, 1, 10].into() } else { [0xfd00, 1, 0, 0, 0, 0, 0, 0x10].into() };
        let key = FlowKey { proto: protocol, sport: Be16::new(n), ..FlowKey::default() };
        let value = FlowValue {
            src: source.into(),
            dst: backend.into(),
            dport: Be16::new(8080),
            flags,
            ..FlowValue::default()
        };
        (key, value)
    }

    #[test]
    fn ports_are_counted_by_backend_and_running_short_is_said() {
        let mut count = PortCount::default();
        let mut note = |n: u16, backend, flags, protocol| {
            for n in 0..n {
                let (key, value) = entry(n, backend, flags, protocol);
                if PortCount::counts(&key, &value) {
                    count.note(&key, &value);
                }
            }
        };
        note(70, "10.42.2.5", FLOW_REDIRECT, proto::TCP);
        note(59, "10.42.2.6", FLOW_REDIRECT, proto::TCP);
        note(60, "fd00:42:2::5", FLOW_REDIRECT, proto::UDP);
        // The other direction, a local backend, and a protocol whose ports stay.
        note(99, "10.42.2.7", FLOW_REDIRECT | FLOW_REPLY, proto::TCP);
        note(99, "10.42.1.5", 0, proto::TCP);
        note(99, "10.42.2.8", FLOW_REDIRECT, proto::SCTP);
        let fullest = count.fullest();
        assert_eq!(fullest.iter().map(|(_, used)| *used).collect::<Vec<_>>(), [70, 60, 59]);
        assert!((pressure(&fullest, 100) - 0.7).abs() < 1e-9 && pressure(&[], 100) == 0.0);

        let name =
            |ports: &Ports| (ports.port == 8080 && ports.backend.is_ipv4()).then(|| "default/web on node-2".into());
        let texts = problems(&fullest, 100, false, name);
        assert_eq!(texts.len(), 2, "{texts:#?}");
        let begin =
            "source ports of 192.168.1.10 towards backend 10.42.2.5:8080/TCP (default/web on node-2) are getting few";
        assert!(texts[0].starts_with(begin), "{texts:#?}");
        assert!(texts[1].contains("[fd00:42:2::5]:8080/UDP are getting few: give the Service"), "{texts:#?}");
        let texts = problems(&fullest, 100, true, name);
        assert!(texts[0].contains("are running out, new connections are refused"), "{texts:#?}");
        assert_eq!(problems(&fullest, 1000, false, name), Vec::<String>::new());
        // Something else than the ports is missing.
        let texts = problems(&fullest, 1000, true, name);
        assert!(texts.len() == 1 && texts[0].contains("address on the way"), "{texts:#?}");
    }
}
