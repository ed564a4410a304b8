//! Elements of the maps, for people: `kinesin dump`.

use std::net::{IpAddr, Ipv4Addr};

use kinesin_abi::{
    AFFINITY_NETNS, Addr, AffinityKey, AffinityValue, Backend, BackendId, BackendState, Be16, COUNT_ACCELERATED,
    DEVICE_ACROSS, DEVICE_ETHERNET, DEVICE_POD, DEVICE_SERVED, DEVICE_XDP, DROP_SLOTS, DeviceValue, DropCounter,
    DropReason, FLOW_DIRECT, FLOW_FROM_LAN, FLOW_HANDED_ON, FLOW_REDIRECT, FLOW_REPLY, FlowCount, FlowKey, FlowValue,
    FragmentKey, FragmentValue, FrontendKey, FrontendKind, FrontendValue, L2Key, L2Value, PEER_ACROSS, PEER_BY_ROUTE,
    PEER_TAKES_NEW, PeerKey, PeerValue, SETTING_ANSWER_PING, SETTING_DIRECT_TO_PODS, SETTING_DIRECT_WATCHED,
    SETTING_FOLLOW_FRAGMENTS4, SETTING_FOLLOW_FRAGMENTS6, SETTING_PROTECT_NODE_PORTS, SETTING_REJECT_NO_BACKEND,
    SOURCE_RANGE_BITS, SOURCE_RANGE_DENY, SOURCE_RANGE_IPV6, Settings, SocketKey, SocketValue, SourceRangeKey,
    TCP_SEEN_ACK, TCP_SEEN_FIN, TCP_SEEN_FIN_REPLY, TCP_SEEN_REPLY, TCP_SEEN_RST, frontend_flags, proto,
};
use kinesin_core::devices::mac_text;

use super::from_bytes;

/// `10.0.0.1:80` or `[2001:db8::1]:80`.
pub(crate) fn endpoint(addr: Addr, port: Be16) -> String {
    match IpAddr::from(addr) {
        IpAddr::V4(ip) => format!("{ip}:{}", port.get()),
        IpAddr::V6(ip) => format!("[{ip}]:{}", port.get()),
    }
}

fn protocol(number: u8) -> String {
    match number {
        proto::ANY => "ANY".into(),
        proto::TCP => "TCP".into(),
        proto::UDP => "UDP".into(),
        proto::SCTP => "SCTP".into(),
        other => other.to_string(),
    }
}

pub(crate) fn frontend_key(key: &FrontendKey) -> String {
    format!("{}/{}", endpoint(key.addr, key.port), protocol(key.proto))
}

pub(crate) fn backend_state(backend: &Backend) -> &'static str {
    BackendState::of(backend.state).map_or("?", BackendState::text)
}

pub(crate) fn backend(backend: &Backend) -> String {
    let state = backend_state(backend);
    let local = if backend.is_local() { " local" } else { "" };
    let node = if backend.node() == 0 { String::new() } else { format!(" node={:#08x}", backend.node()) };
    format!("{}/{} {state}{local}{node}", endpoint(backend.addr, backend.port), protocol(backend.proto))
}

/// The names of the bits that are set.
fn flags(bits: u32, names: &[(u32, &str)]) -> String {
    let set: Vec<&str> = names.iter().filter(|(bit, _)| bits & bit != 0).map(|(_, name)| *name).collect();
    if set.is_empty() { "-".into() } else { set.join(",") }
}

/// `LoadBalancer routable,affinity`
pub(crate) fn kind_and_flags(bits: u32) -> String {
    let kind = FrontendKind::of(bits).map_or("?", FrontendKind::text);
    let names = flags(
        bits,
        &[
            (frontend_flags::ROUTABLE, "routable"),
            (frontend_flags::MAGLEV, "maglev"),
            (frontend_flags::WILDCARD, "wildcard"),
            (frontend_flags::EXTERNAL_LOCAL, "external-local"),
            (frontend_flags::INTERNAL_LOCAL, "internal-local"),
            (frontend_flags::AFFINITY, "affinity"),
            (frontend_flags::SOURCE_RANGES, "source-ranges"),
            (frontend_flags::SOURCE_RANGES_DENY, "deny"),
        ],
    );
    let forwarding = match bits & frontend_flags::FORWARDING {
        frontend_flags::FORWARDING_L2 => "l2",
        frontend_flags::FORWARDING_IPIP => "ipip",
        frontend_flags::FORWARDING_OPT => "opt",
        _ => return format!("{kind} {names}"),
    };
    if names == "-" { format!("{kind} {forwarding}") } else { format!("{kind} {names},{forwarding}") }
}

fn frontend_value(value: &FrontendValue) -> String {
    let (external, internal) = (value.external, value.internal);
    format!(
        "{} service={} affinity={}s external={}+{} internal={}+{}",
        kind_and_flags(value.flags),
        value.service,
        value.affinity,
        external.base,
        external.count,
        internal.base,
        internal.count
    )
}

fn flow_key(key: &FlowKey) -> String {
    format!("{} {} -> {}", protocol(key.proto), endpoint(key.src, key.sport), endpoint(key.dst, key.dport))
}

fn flow_value(value: &FlowValue) -> String {
    let names = flags(
        value.flags.into(),
        &[
            (FLOW_REPLY.into(), "reply"),
            (FLOW_REDIRECT.into(), "redirect"),
            (FLOW_FROM_LAN.into(), "lan"),
            (FLOW_HANDED_ON.into(), "handed-on"),
            (FLOW_DIRECT.into(), "direct"),
        ],
    );
    let tcp = flags(
        value.tcp.into(),
        &[
            (TCP_SEEN_FIN.into(), "fin"),
            (TCP_SEEN_FIN_REPLY.into(), "fin-reply"),
            (TCP_SEEN_RST.into(), "rst"),
            (TCP_SEEN_REPLY.into(), "answered"),
            (TCP_SEEN_ACK.into(), "established"),
        ],
    );
    let (src, dst) = (endpoint(value.src, value.sport), endpoint(value.dst, value.dport));
    let last = value.last_seen / 1_000_000_000;
    format!("{src} -> {dst} backend={} {names} seen={tcp} last={last}s", value.backend)
}

fn fragment_key(key: &FragmentKey) -> String {
    let (src, dst) = (IpAddr::from(key.src), IpAddr::from(key.dst));
    // IPv4 has 16 bits of it.
    let id = if src.is_ipv4() { u16::from_be(key.id as u16).into() } else { u32::from_be(key.id) };
    format!("{src} -> {dst} id={id:#x}")
}

fn fragment_value(value: &FragmentValue) -> String {
    let seconds = value.at / 1_000_000_000;
    format!("{} {} -> {} first={seconds}s", protocol(value.proto), value.sport.get(), value.dport.get())
}

fn device(value: &DeviceValue) -> String {
    let ethernet = if value.flags & DEVICE_ETHERNET != 0 { "ethernet" } else { "no-link-header" };
    let ipv6 = IpAddr::from(value.ipv6);
    const FLAGS: [(u16, &str); 4] =
        [(DEVICE_XDP, " xdp"), (DEVICE_POD, " pod"), (DEVICE_SERVED, " served"), (DEVICE_ACROSS, " across")];
    let flags: String = FLAGS.iter().filter(|(flag, _)| value.flags & flag != 0).map(|(_, text)| *text).collect();
    format!("{} {} {ipv6} {ethernet}{flags}", mac_text(value.mac), Ipv4Addr::from(value.ipv4.to_ne_bytes()))
}

fn peer(key: &PeerKey, value: &PeerValue) -> (String, String) {
    let by = match key.node() {
        Some(node) => format!("node {node:#08x}"),
        None if key.is_by_addr() => "wrapped by".into(),
        None => format!("mac {}", mac_text(value.mac_bytes())),
    };
    let state = match (value.flags & PEER_TAKES_NEW != 0, value.flags & PEER_BY_ROUTE != 0) {
        _ if key.is_by_addr() => "known",
        (true, false) => "takes-new",
        (true, true) => "takes-new by-route",
        (false, false) => "keeps-old",
        (false, true) => "keeps-old by-route",
    };
    let across = if value.flags & PEER_ACROSS != 0 { " across" } else { "" };
    let (v4, v6) = (Ipv4Addr::from(value.ipv4.to_ne_bytes()), IpAddr::from(value.ipv6));
    (by, format!("{:#08x} {} dev {}{across} {v4} {v6} {state}", value.node, mac_text(value.mac_bytes()), value.ifindex))
}

fn settings(value: &Settings) -> String {
    format!(
        "alive-at={}ns alive-for={}ns {} snat={}-{} node-ports={}-{} maglev-seed={:#x} timeouts={:?}",
        value.alive_at,
        value.alive_for,
        flags(
            value.flags,
            &[
                (SETTING_REJECT_NO_BACKEND, "reject-no-backend"),
                (SETTING_ANSWER_PING, "answer-ping"),
                (SETTING_PROTECT_NODE_PORTS, "protect-node-ports"),
                (SETTING_DIRECT_TO_PODS, "direct-to-pods"),
                (SETTING_DIRECT_WATCHED, "direct-while-watched"),
                (SETTING_FOLLOW_FRAGMENTS4, "fragments"),
                (SETTING_FOLLOW_FRAGMENTS6, "fragments6"),
            ],
        ),
        value.snat_min,
        value.snat_max,
        value.node_port_min,
        value.node_port_max,
        value.maglev_seed,
        value.timeouts
    )
}

fn socket_key(key: &SocketKey) -> String {
    format!("{:#x} {} {}", key.cookie, protocol(key.proto), endpoint(key.addr, key.port))
}

fn socket_value(value: &SocketValue) -> String {
    format!("{} backend={}", endpoint(value.addr, value.port), value.backend)
}

fn affinity_key(key: &AffinityKey) -> String {
    let client = if key.flags & AFFINITY_NETNS != 0 {
        format!("netns {:#x}", key.netns())
    } else {
        IpAddr::from(key.client).to_string()
    };
    format!("{client} service={}", key.service)
}

fn affinity_value(value: &AffinityValue) -> String {
    format!("backend={} last={}s", value.backend, value.last_used / 1_000_000_000)
}

pub(crate) fn range_key(key: &SourceRangeKey) -> String {
    let list = if key.range.list & SOURCE_RANGE_DENY != 0 { "deny" } else { "allow" };
    format!("service={} {list} {}", key.range.service, range_network(key))
}

/// `10.0.0.0/8`
pub(crate) fn range_network(key: &SourceRangeKey) -> String {
    let before = SOURCE_RANGE_BITS + if key.range.list & SOURCE_RANGE_IPV6 != 0 { 0 } else { 96 };
    match key.prefix_len.checked_sub(before) {
        Some(bits) => format!("{}/{bits}", IpAddr::from(key.range.addr)),
        None => format!("?/{}", key.prefix_len),
    }
}

fn drop_key(slot: u32) -> String {
    let direction = if slot < DROP_SLOTS / 2 { "ingress" } else { "egress" };
    let reason = slot % (DROP_SLOTS / 2);
    let text = match DropReason::ALL.iter().find(|known| **known as u32 == reason) {
        Some(known) => known.text(),
        None if reason == 0 => "Forwarded",
        None if reason == u32::from(COUNT_ACCELERATED) => "Forwarded by XDP",
        None => "?",
    };
    format!("{direction} {reason} {text}")
}

/// The sum of a per-CPU number.
pub(crate) fn total(value: &[u8]) -> u64 {
    per_cpu(value).fold(0, u64::wrapping_add)
}

/// The numbers of a per-CPU number.
pub(crate) fn per_cpu(value: &[u8]) -> impl Iterator<Item = u64> {
    value.as_chunks().0.iter().map(|cpu| u64::from_ne_bytes(*cpu))
}

/// The sum of a per-CPU counter.
pub(crate) fn sum(value: &[u8]) -> DropCounter {
    value
        .as_chunks::<{ size_of::<DropCounter>() }>()
        .0
        .iter()
        .filter_map(|cpu| from_bytes::<DropCounter>(cpu))
        .fold(DropCounter::default(), both)
}

/// Two counters as one.
pub(crate) fn both(a: DropCounter, b: DropCounter) -> DropCounter {
    DropCounter { packets: a.packets + b.packets, bytes: a.bytes + b.bytes }
}

/// One element of a table; none where it holds nothing worth showing (a free backend, an empty slot).
pub(crate) fn element(table: &str, key: &[u8], value: &[u8]) -> Option<(String, String)> {
    let number = from_bytes::<u32>(key).map(|n| n.to_string());
    match table {
        "frontends" => Some((frontend_key(&from_bytes(key)?), frontend_value(&from_bytes(value)?))),
        "slots" => from_bytes::<BackendId>(value).filter(|id| *id != 0).and_then(|id| Some((number?, id.to_string()))),
        "backends" => from_bytes::<Backend>(value)
            .filter(|value| *value != Backend::default())
            .and_then(|value| Some((number?, backend(&value)))),
        "maglev" => {
            let mut ids: Vec<BackendId> =
                value.as_chunks().0.iter().map(|id| BackendId::from_ne_bytes(*id)).filter(|id| *id != 0).collect();
            let filled = ids.len();
            ids.sort_unstable();
            ids.dedup();
            Some((number?, format!("{filled} entries, backends {ids:?}")))
        }
        "fragments" => Some((fragment_key(&from_bytes(key)?), fragment_value(&from_bytes(value)?))),
        "flows" | "transient" => Some((flow_key(&from_bytes(key)?), flow_value(&from_bytes(value)?))),
        "sockets" => Some((socket_key(&from_bytes(key)?), socket_value(&from_bytes(value)?))),
        "affinity" => Some((affinity_key(&from_bytes(key)?), affinity_value(&from_bytes(value)?))),
        "ranges" => Some((range_key(&from_bytes(key)?), String::new())),
        "l2" => {
            let key: L2Key = from_bytes(key)?;
            let value: L2Value = from_bytes(value)?;
            Some((format!("{:?} dev {}", key.addr, key.ifindex), format!("responses-sent={}", value.responses_sent)))
        }
        "devices" => Some((number?, device(&from_bytes(value)?))),
        "peers" => Some(peer(&from_bytes(key)?, &from_bytes(value)?)),
        "settings" => Some((number?, settings(&from_bytes(value)?))),
        "drops" => {
            let counter = sum(value);
            let key = drop_key(from_bytes(key)?);
            (counter.packets > 0).then(|| (key, format!("{} packets, {} bytes", counter.packets, counter.bytes)))
        }
        "counts" => {
            let index = from_bytes::<u32>(key)? as usize;
            let what = FlowCount::ALL.get(index)?;
            Some((format!("{index} {}", what.text()), total(value).to_string()))
        }
        _ => None,
    }
}
