//! Which network devices the data path is attached to, and which of their addresses serve NodePorts.
//!
//! Deliberately absent: how devices are found out about (netlink), and attaching to them.

mod families;
#[cfg(test)]
mod tests;

use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use smol_str::SmolStr;

pub use families::{Families, families};

/// `01:23:45:67:89:ab`.
pub fn mac_text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// A network device as the kernel describes it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Device {
    /// `eth0`
    pub name: SmolStr,
    /// The kernel's number of it.
    pub ifindex: u32,
    /// Ethernet address; `None` for devices without one.
    pub mac: Option<[u8; 6]>,
    /// Administratively up (`IFF_UP`).
    pub up: bool,
    /// Has carrier (`IFF_RUNNING`).
    pub running: bool,
    /// `IFLA_INFO_KIND`: `veth`, `bridge`, `bond`, `vlan`, …; empty for hardware.
    pub kind: SmolStr,
    /// Its other end is in another network namespace (`IFLA_LINK_NETNSID`).
    pub reaches_out: bool,
    /// `IFLA_QDISC`: `noqueue`, `fq_codel`, …
    pub qdisc: SmolStr,
    /// The bridge, bond or VRF that it is part of.
    pub master: Option<u32>,
    /// Its addresses with the length of their prefixes.
    pub addresses: Vec<IpNet>,
    /// Longest packet, bytes; 0 where that is not known.
    pub mtu: u32,
    /// `IFF_LOOPBACK`
    pub is_loopback: bool,
    /// `IFF_SLAVE`
    pub is_slave: bool,
    /// A default route leaves through it.
    pub has_default_route: bool,
    /// A route to global unicast addresses leaves through it.
    pub has_global_unicast_route: bool,
}

impl Device {
    /// Can carry frames now.
    pub fn is_live(&self) -> bool {
        self.up && self.running
    }

    /// Whether it is our end of a veth pair whose other end is in another network namespace, and no queue of ours shapes what
    /// goes there: the way to a pod, or of a node that is a container itself to its LAN.
    ///
    /// Not one that is part of a bridge: what is for the other end is routed to the bridge.
    pub fn leads_across(&self) -> bool {
        self.kind == "veth" && self.reaches_out && self.qdisc == "noqueue" && self.master.is_none()
    }
}

/// Names of devices that are made by container networks, never a way to the LAN.
const OTHERS_PREFIXES: [&str; 5] = ["cilium_", "lo", "lxc", "cni", "docker"];
/// Kinds whose frames are seen on the devices below them, or that are not Ethernet.
const OTHERS_KINDS: [&str; 3] = ["bridge", "openvswitch", "ipoib"];

/// What a list of patterns says about a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Include,
    Exclude,
    Silent,
}

/// `eth0` is a name, `eth+` all names that begin so, `!eth1` and `!eth+` exclude. The first pattern that fits decides.
fn judge<P: AsRef<str>>(name: &str, filter: &[P]) -> Verdict {
    for pattern in filter {
        let pattern = pattern.as_ref().trim();
        let (pattern, verdict) = match pattern.strip_prefix('!') {
            Some(rest) => (rest, Verdict::Exclude),
            None => (pattern, Verdict::Include),
        };
        let fits = match pattern.strip_suffix('+') {
            Some(prefix) => name.starts_with(prefix),
            None => !pattern.is_empty() && name == pattern,
        };
        if fits {
            return verdict;
        }
    }
    Verdict::Silent
}

/// Why a device is not chosen by itself; `None` when it is.
pub fn unsuitable(device: &Device) -> Option<&'static str> {
    if device.is_loopback {
        return Some("loopback");
    }
    if OTHERS_PREFIXES.iter().any(|prefix| device.name.starts_with(prefix)) {
        return Some("belongs to a container network, by its name");
    }
    if !device.up {
        return Some("not up");
    }
    if device.is_slave || device.master.is_some() {
        return Some("part of another device");
    }
    if OTHERS_KINDS.iter().any(|kind| device.kind == *kind) {
        return Some("of a kind that is not used directly");
    }
    if device.addresses.is_empty() {
        return Some("has no address");
    }
    if device.kind == "veth" && !device.has_default_route {
        return Some("veth without a default route");
    }
    if !device.has_global_unicast_route {
        return Some("no route to global unicast addresses");
    }
    None
}

/// The devices to use, in the order given. Without patterns, those that suit by themselves; with patterns, those that the
/// patterns include, whatever else is true of them. Patterns that only exclude take away from the automatic choice.
pub fn select<'a, P: AsRef<str>>(devices: &'a [Device], filter: &[P]) -> Vec<&'a Device> {
    select_with(devices, filter, false)
}

/// Like [`select`]; with `force_detection` (`force-device-detection`) the automatic choice is made besides the patterns'.
pub fn select_with<'a, P: AsRef<str>>(devices: &'a [Device], filter: &[P], force_detection: bool) -> Vec<&'a Device> {
    let said: Vec<&str> = filter.iter().map(|p| p.as_ref().trim()).filter(|p| !p.is_empty()).collect();
    let only_excludes = said.iter().all(|pattern| pattern.starts_with('!'));
    let automatic = only_excludes || force_detection;
    let chosen = |device: &&Device| match judge(&device.name, &said) {
        Verdict::Include => true,
        Verdict::Exclude => false,
        Verdict::Silent => automatic && unsuitable(device).is_none(),
    };
    devices.iter().filter(chosen).collect()
}

/// Addresses on which NodePorts are served: one per family and device, the node's own address if the device has it, else
/// a private one, else a public one; only those in `cidrs` (`nodeport-addresses`) unless that is empty.
pub fn node_port_addresses(devices: &[&Device], node_ips: &[IpAddr], cidrs: &[IpNet]) -> Vec<IpAddr> {
    let mut chosen = Vec::new();
    for device in devices {
        for v6 in [false, true] {
            let usable = device.addresses.iter().map(IpNet::addr).filter(|ip| {
                ip.is_ipv6() == v6 && is_servable(*ip) && (cidrs.is_empty() || cidrs.iter().any(|net| net.contains(ip)))
            });
            // `min_by_key` keeps the first of equals: the kernel's order, primary addresses first.
            let best = usable.min_by_key(|ip| match ip {
                ip if node_ips.contains(ip) => 0,
                ip if is_private(*ip) => 1,
                _ => 2,
            });
            chosen.extend(best.filter(|ip| !chosen.contains(ip)));
        }
    }
    chosen
}

/// Every address of the node that something outside may connect to, whichever device has it.
pub fn servable_addresses(devices: &[Device]) -> impl Iterator<Item = IpAddr> + '_ {
    devices.iter().flat_map(|device| &device.addresses).map(|net| net.addr()).filter(|ip| is_servable(*ip))
}

fn is_servable(ip: IpAddr) -> bool {
    let link_local = match ip {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    !(link_local || ip.is_loopback() || ip.is_unspecified() || ip.is_multicast())
}

/// RFC 1918, RFC 4193.
fn is_private(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(v4) => v4.is_private(),
        IpAddr::V6(v6) => v6.is_unique_local(),
    }
}
