//! The ports that the kernel gives to connections of this network namespace.

use std::ops::RangeInclusive;

use kinesin_core::node_ports::{Reservation, reservation};

use super::{NetError, sysctl};

/// Ports that the kernel gives to connections, and which of them it does not.
const EPHEMERAL: &str = "ipv4/ip_local_port_range";
const RESERVED: &str = "ipv4/ip_local_reserved_ports";

/// Reserves a range of NodePorts where the kernel would give its ports to connections.
///
/// # Errors
/// In words: the range is not reserved and must not be, or the kernel's answer.
pub fn reserve(range: RangeInclusive<u16>, may_write: bool) -> Result<(), String> {
    let text = |error: NetError| error.to_string();
    let ephemeral = sysctl::read(EPHEMERAL).map_err(text)?;
    let reserved = sysctl::read(RESERVED).map_err(text)?;
    let Reservation::Missing { value } = reservation(range.clone(), &ephemeral, &reserved)? else {
        return Ok(());
    };
    let (first, last) = range.into_inner();
    if !may_write {
        return Err(format!(
            "node-port-range {first}-{last} overlaps the ports of the node's own connections (net.ipv4.ip_local_port_range \
             {ephemeral}): change one of them, or set enable-auto-protect-node-port-range to true"
        ));
    }
    sysctl::write(RESERVED, &value).map_err(text)?;
    tracing::info!(first, last, "NodePorts reserved: no connection of the node gets them");
    Ok(())
}
