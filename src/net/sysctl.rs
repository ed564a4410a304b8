//! `/proc/sys/net`, which shows the namespace of the thread that opens it.

use std::fs;

use super::{NetError, Netns};

/// Writes `net.<key>` in the current namespace; `key` has `/` between its parts, because interface names may have dots.
///
/// # Errors
/// When the kernel has no such key or refuses the value.
pub fn write(key: &str, value: &str) -> Result<(), NetError> {
    fs::write(path(key), value).map_err(NetError::io(format!("set sysctl net/{key} to {value}")))
}

/// Reads `net.<key>` in the current namespace, without the line's end.
///
/// # Errors
/// When the kernel has no such key.
pub fn read(key: &str) -> Result<String, NetError> {
    let text = fs::read_to_string(path(key)).map_err(NetError::io(format!("read sysctl net/{key}")))?;
    Ok(text.trim_end().to_string())
}

/// Writes several keys inside a namespace, in order.
///
/// # Errors
/// The first that fails; those before it stay written.
pub fn write_in(netns: &Netns, settings: &[(&str, &str)]) -> Result<(), NetError> {
    netns.run(|| settings.iter().try_for_each(|(key, value)| write(key, value)))?
}

/// Whether netfilter's connection tracking has connections in the current namespace.
pub fn tracks_connections() -> bool {
    read("netfilter/nf_conntrack_count").is_ok_and(|count| count != "0")
}

fn path(key: &str) -> String {
    format!("/proc/sys/net/{key}")
}
