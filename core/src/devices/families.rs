//! Which IP versions a device can answer for.

use std::net::IpAddr;

use super::Device;

/// IP versions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Families {
    /// IPv4.
    pub ipv4: bool,
    /// IPv6.
    pub ipv6: bool,
}

impl Families {
    /// Both of them.
    pub const BOTH: Self = Self { ipv4: true, ipv6: true };

    /// Whether an address is of one of them.
    pub fn include(self, ip: IpAddr) -> bool {
        match ip.to_canonical() {
            IpAddr::V4(_) => self.ipv4,
            IpAddr::V6(_) => self.ipv6,
        }
    }

    /// Those that are in both sets.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self { ipv4: self.ipv4 && other.ipv4, ipv6: self.ipv6 && other.ipv6 }
    }
}

/// The IP versions in which a device of this node is part of a network: those of its addresses, and of its bridge's, bond's
/// or VRF's. Link-local addresses do not count: every device has one of IPv6 where nobody uses IPv6. Where none of these
/// has any other address it cannot be told from here, and both count.
pub fn families(device: &Device, all: &[Device]) -> Families {
    let master = device.master.and_then(|master| all.iter().find(|other| other.ifindex == master));
    let addresses = || [Some(device), master].into_iter().flatten().flat_map(|device| &device.addresses);
    let any = |v6: bool| addresses().any(|net| net.addr().is_ipv6() == v6 && super::is_servable(net.addr()));
    match (any(false), any(true)) {
        (false, false) => Families::BOTH,
        (ipv4, ipv6) => Families { ipv4, ipv6 },
    }
}
