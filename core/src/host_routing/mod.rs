//! Whether packets to pods of this node go straight to them, or by the host's stack: as the configuration says, or as long
//! as nobody in the stack would look at them.
//!
//! Deliberately absent: how that is found out (netlink, bpf(2)), and which devices lead to pods.

#[cfg(test)]
mod tests;

use std::collections::BTreeSet;

/// The address family of a table of nftables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// `inet`
    Inet,
    /// `ip`
    Ip,
    /// `ip6`
    Ip6,
    /// `netdev`
    Netdev,
    /// One whose packets are not routed: `arp`, `bridge`.
    Other,
}

impl Family {
    /// From `NFPROTO_*` of linux/netfilter.h.
    pub fn from_number(number: u8) -> Self {
        match number {
            1 => Self::Inet,
            2 => Self::Ip,
            5 => Self::Netdev,
            10 => Self::Ip6,
            _ => Self::Other,
        }
    }

    /// As nft(8) writes it.
    fn text(self) -> &'static str {
        match self {
            Self::Inet => "inet",
            Self::Ip => "ip",
            Self::Ip6 => "ip6",
            Self::Netdev => "netdev",
            Self::Other => "other",
        }
    }
}

/// A base chain of nftables; the others see only what these send them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    /// Of its table.
    pub family: Family,
    /// Its table.
    pub table: String,
    /// Its own name.
    pub name: String,
    /// `NF_INET_*` of linux/netfilter.h, or `NF_NETDEV_*` of `netdev`.
    pub hook: u32,
    /// Rules in it.
    pub rules: u32,
    /// Drops what no rule has accepted.
    pub drops: bool,
}

/// Names of hooks by their numbers.
const HOOKS: [&str; 6] = ["prerouting", "input", "forward", "output", "postrouting", "ingress"];
const DEVICE_HOOKS: [&str; 2] = ["ingress", "egress"];

impl Chain {
    /// Whether something becomes of packets that go through the host: what is for the host itself, and an empty chain that
    /// accepts, do not matter.
    pub fn matters(&self) -> bool {
        let on_the_way = match self.family {
            Family::Inet | Family::Ip | Family::Ip6 => !matches!(self.hook_name(), "input" | "output"),
            Family::Netdev => true,
            Family::Other => false,
        };
        on_the_way && (self.rules > 0 || self.drops)
    }

    fn hook_name(&self) -> &'static str {
        let names: &[&str] = if self.family == Family::Netdev { &DEVICE_HOOKS } else { &HOOKS };
        names.get(self.hook as usize).copied().unwrap_or("unknown")
    }

    fn text(&self) -> String {
        let Self { family, table, name, .. } = self;
        format!("nftables: {} {table} {name} (hook {})", family.text(), self.hook_name())
    }
}

/// A table of iptables as it was before nftables.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LegacyTable {
    /// Of ip6tables.
    pub v6: bool,
    /// `filter`, `nat`, …
    pub name: String,
}

/// What a device leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeadsTo {
    /// A pod of this node.
    Pod,
    /// The LAN, of a node that is a container.
    Lan,
}

/// A device that packets could go straight through, and what is at our end of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Through {
    /// The kernel's number of it.
    pub ifindex: u32,
    /// Whose other end it is.
    pub to: LeadsTo,
    /// A qdisc that holds filters (`clsact`, `ingress`).
    pub filters: bool,
    /// Ids of the programs at its tcx hooks.
    pub programs: Vec<u32>,
}

impl Through {
    /// Whether nobody else's programs are to see what goes through. To the LAN, our own qdisc of older kernels is there.
    fn is_clear(&self, ours: &BTreeSet<u32>) -> bool {
        let filters = self.filters && self.to == LeadsTo::Pod;
        !filters && self.programs.iter().all(|id| ours.contains(id))
    }
}

/// What was found. A look may end with the first that matters.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Base chains of nftables, where iptables-nft has its rules too.
    pub chains: Vec<Chain>,
    /// Tables of iptables-legacy.
    pub legacy: Vec<LegacyTable>,
    /// There are IPsec policies.
    pub policies: bool,
    /// What could not be found out, and why.
    pub unclear: Vec<String>,
    /// Devices that packets could go straight through.
    pub devices: Vec<Through>,
    /// Ids of our own programs.
    pub ours: BTreeSet<u32>,
}

impl Seen {
    /// Who wants to see packets to pods in the host's stack.
    pub fn needs_stack(&self) -> Option<String> {
        let table =
            |table: &LegacyTable| format!("{}: table {}", if table.v6 { "ip6tables" } else { "iptables" }, table.name);
        let chain = self.chains.iter().find(|chain| chain.matters()).map(Chain::text);
        chain
            .or_else(|| self.legacy.first().map(table))
            .or_else(|| self.policies.then(|| "IPsec policies".to_owned()))
            .or_else(|| self.unclear.first().cloned())
    }
}

/// Which way packets to pods of this node take. By default the host's stack.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostRouting {
    /// Straight to their devices.
    pub straight: bool,
    /// The configuration says so, whoever is in the stack.
    pub said: bool,
    /// Why by the stack, where that was found out.
    pub why: Option<String>,
    /// The devices through which they do, where that was found out: at the others are somebody else's tc programs, or nobody
    /// has looked yet.
    pub clear: BTreeSet<u32>,
}

impl HostRouting {
    /// Whether packets go straight through this device, if it leads somewhere.
    pub fn goes_straight(&self, ifindex: u32) -> bool {
        self.straight && (self.said || self.clear.contains(&ifindex))
    }
}

/// Decides. Where `legacy` (`enable-host-legacy-routing`) says which way, what was seen does not count.
pub fn decide(legacy: Option<bool>, seen: &Seen) -> HostRouting {
    if let Some(legacy) = legacy {
        return HostRouting { straight: !legacy, said: true, ..HostRouting::default() };
    }
    if let Some(why) = seen.needs_stack() {
        return HostRouting { why: Some(why), ..HostRouting::default() };
    }
    let clear = seen.devices.iter().filter(|device| device.is_clear(&seen.ours)).map(|device| device.ifindex).collect();
    HostRouting { straight: true, clear, ..HostRouting::default() }
}
