//! What the services' maps mean, for people and for comparing: `kinesin dump services`.
//!
//! Two nodes that serve the same print the same, whatever ids and slots they use. Deliberately absent: names of Services;
//! the maps do not hold any.

use std::collections::BTreeSet;
use std::net::IpAddr;

use kinesin_abi::{Backend, BackendState, FrontendKey, frontend_flags};
use kinesin_core::plan::{FrontendMeaning, Meaning};

use super::dump;

/// One row for each frontend, then one for each backend that no frontend leads to, then what is wrong; in order.
pub fn meaning_rows(meaning: &Meaning) -> Vec<(String, String)> {
    // In the order of addresses, which the maps' keys do not have.
    let mut frontends: Vec<_> = meaning.frontends.iter().collect();
    frontends.sort_unstable_by_key(|(key, _)| (IpAddr::from(key.addr), key.port.get(), key.proto));
    let mut rows: Vec<_> =
        frontends.iter().map(|(key, value)| (dump::frontend_key(key), frontend(key, value))).collect();
    let used: BTreeSet<&Backend> =
        meaning.frontends.values().flat_map(|f| f.external.iter().chain(&f.internal)).collect();
    let resting = in_order(meaning.backends.iter().filter(|backend| !used.contains(backend)));
    rows.extend(resting.into_iter().map(|backend| ("backend".to_owned(), dump::backend(backend))));
    rows.extend(meaning.faults.iter().map(|fault| ("fault".to_owned(), fault.clone())));
    rows
}

/// `LoadBalancer routable,affinity affinity=10800s external=10.42.0.5:8080(local) internal=10.42.0.5:8080(local),…`
fn frontend(key: &FrontendKey, value: &FrontendMeaning) -> String {
    if value.flags & frontend_flags::WILDCARD != 0 {
        let outside = value.flags & frontend_flags::ROUTABLE != 0;
        return if outside { "wildcard routable".into() } else { "wildcard".into() };
    }
    let mut text = dump::kind_and_flags(value.flags);
    if value.affinity > 0 {
        text += &format!(" affinity={}s", value.affinity);
    }
    if value.flags & frontend_flags::SOURCE_RANGES != 0 {
        let mut ranges: Vec<_> = value.ranges.iter().collect();
        ranges.sort_unstable_by_key(|range| (IpAddr::from(range.range.addr), range.prefix_len));
        let networks: Vec<String> = ranges.into_iter().map(dump::range_network).collect();
        text += &format!(" ranges={}", or_dash(networks.join(",")));
    }
    if value.external == value.internal {
        text += &format!(" backends={}", set(key, &value.external));
    } else {
        text += &format!(" external={} internal={}", set(key, &value.external), set(key, &value.internal));
    }
    let tables = value.tables.iter().filter(|table| !table.is_empty()).map(|table| maglev(table));
    for table in tables.collect::<BTreeSet<_>>() {
        text += &format!(" table={table}");
    }
    text
}

fn set(key: &FrontendKey, backends: &BTreeSet<Backend>) -> String {
    let member = |backend: &Backend| {
        let mut notes = Vec::new();
        notes.extend((backend.state != BackendState::Active as u8).then(|| dump::backend_state(backend)));
        notes.extend(backend.is_local().then_some("local"));
        // A frontend of one protocol that leads to another one is a fault worth seeing.
        notes.extend((backend.proto != key.proto).then_some("other-protocol"));
        let notes = if notes.is_empty() { String::new() } else { format!("({})", notes.join(",")) };
        format!("{}{notes}", dump::endpoint(backend.addr, backend.port))
    };
    or_dash(in_order(backends).into_iter().map(member).collect::<Vec<_>>().join(","))
}

fn in_order<'a>(backends: impl IntoIterator<Item = &'a Backend>) -> Vec<&'a Backend> {
    let mut backends: Vec<&Backend> = backends.into_iter().collect();
    backends.sort_unstable_by_key(|backend| (IpAddr::from(backend.addr), backend.port.get(), backend.proto));
    backends
}

fn or_dash(text: String) -> String {
    if text.is_empty() { "-".into() } else { text }
}

/// A fingerprint of the table, which nodes agree on, and how many entries each backend has, in the backends' order.
fn maglev(table: &[Backend]) -> String {
    let members = in_order(table.iter().collect::<BTreeSet<_>>());
    let share = |member: &&Backend| table.iter().filter(|backend| *backend == *member).count().to_string();
    let shares: Vec<String> = members.iter().map(share).collect();
    format!("{:016x}({})", fingerprint(table), shares.join("+"))
}

/// FNV-1a, 64 bits, over addresses and ports.
fn fingerprint(table: &[Backend]) -> u64 {
    const PRIME: u64 = 0x0000_0100_0000_01b3;
    const OFFSET: u64 = 0xcbf2_9ce4_8422_2325;
    let bytes = table.iter().flat_map(|backend| {
        let address = match IpAddr::from(backend.addr) {
            IpAddr::V4(v4) => v4.to_ipv6_mapped(),
            IpAddr::V6(v6) => v6,
        };
        address.octets().into_iter().chain(backend.port.get().to_be_bytes())
    });
    bytes.fold(OFFSET, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(PRIME))
}
