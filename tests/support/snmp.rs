//! The kernel's counters of this thread's network namespace: by the names that the MIBs have (RFC 4022, RFC 4293), and of
//! devices.

use std::collections::BTreeMap;

/// Those of a protocol, as `Tcp` or `Ip`, from `/proc/net/snmp`.
pub(crate) fn counters(protocol: &str) -> BTreeMap<String, u64> {
    let text = std::fs::read_to_string("/proc/thread-self/net/snmp").unwrap();
    let prefix = format!("{protocol}: ");
    let mut lines = text.lines().filter_map(|line| line.strip_prefix(&*prefix));
    let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
    // One of them is negative where there is no limit.
    names.split(' ').zip(values.split(' ')).map(|(name, value)| (name.to_owned(), value.parse().unwrap_or(0))).collect()
}

/// Frames that a device of this thread's network namespace has sent.
#[allow(dead_code, reason = "not every test binary counts frames")]
pub(crate) fn sent(device: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap();
    let of = |line: &str| {
        Some(line.trim().strip_prefix(device)?.strip_prefix(':')?.split_whitespace().nth(9)?.parse().unwrap())
    };
    text.lines().find_map(of).unwrap()
}
