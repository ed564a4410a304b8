//! Ranges of addresses and how pools write them.
//!
//! Deliberately absent: which addresses are taken (see `taken`), which Service may take them (see `pools`).

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

use crate::objects::PoolBlock;

/// Reads an address; an IPv4-mapped IPv6 address means the IPv4 one, so that no address has two names.
pub(crate) fn parse_ip(text: &str) -> Option<IpAddr> {
    text.trim().parse::<IpAddr>().ok().map(|ip| ip.to_canonical())
}

/// The address as a number in its family.
pub(crate) fn number(ip: IpAddr) -> u128 {
    match ip {
        IpAddr::V4(v4) => u32::from(v4).into(),
        IpAddr::V6(v6) => v6.into(),
    }
}

/// The address of that number; `None` for a number that IPv4 does not have.
pub(crate) fn address(v6: bool, number: u128) -> Option<IpAddr> {
    if v6 {
        return Some(Ipv6Addr::from(number).into());
    }
    u32::try_from(number).ok().map(|n| Ipv4Addr::from(n).into())
}

/// First and last address, both included, of one family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Span {
    pub(crate) first: IpAddr,
    pub(crate) last: IpAddr,
}

impl Span {
    pub(crate) fn contains(&self, ip: IpAddr) -> bool {
        self.first <= ip && ip <= self.last
    }

    pub(crate) fn overlaps(&self, other: &Self) -> bool {
        self.first <= other.last && other.first <= self.last
    }

    pub(crate) fn is_v6(&self) -> bool {
        self.first.is_ipv6()
    }

    pub(crate) fn count(&self) -> Count {
        Count::from(number(self.last) - number(self.first)) + Count::from(1)
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} - {}", self.first, self.last)
    }
}

/// One usable block of a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Range {
    pub(crate) span: Span,
    /// Written as a CIDR of more than two addresses: `allowFirstLastIPs` applies.
    pub(crate) has_ends: bool,
}

impl Range {
    /// What may be handed out: without the ends when the pool reserves them.
    pub(crate) fn usable(&self, reserve_ends: bool) -> Span {
        let Span { first, last } = self.span;
        if !(reserve_ends && self.has_ends) {
            return self.span;
        }
        // More than two addresses, so neither step leaves the range.
        let inner = |n| address(first.is_ipv6(), n).expect("invariant: inside the range");
        Span { first: inner(number(first) + 1), last: inner(number(last) - 1) }
    }
}

/// Reads `spec.blocks[index]`. The error names the field and what to write instead.
pub(crate) fn parse_block(index: usize, block: &PoolBlock) -> Result<Range, String> {
    let field = |name: &str| format!("spec.blocks[{index}].{name}");
    if !block.cidr.is_empty() {
        // A bare address is a prefix of one address, as kubectl users expect.
        let net: Option<IpNet> = block.cidr.trim().parse().ok().or_else(|| parse_ip(&block.cidr).map(IpNet::from));
        let Some(net) = net else {
            return Err(format!(
                "{}: \"{}\" is not a prefix; write it as address/length, like 192.0.2.0/24",
                field("cidr"),
                block.cidr
            ));
        };
        // `broadcast()` is the last address for both families, also of /31 and /32.
        let span = Span { first: net.network(), last: net.broadcast() };
        let has_ends = number(span.last) - number(span.first) >= 2;
        return Ok(Range { span, has_ends });
    }
    if block.start.is_empty() {
        let also = match block.stop.is_empty() {
            true => "give cidr, or start and stop",
            false => "stop stands alone; put start and stop into the same list item",
        };
        return Err(format!("{}: is missing; {also}", field("start")));
    }
    let read = |name: &str, text: &str| {
        parse_ip(text)
            .ok_or_else(|| format!("{}: \"{text}\" is not an IP address; write one like 192.0.2.10", field(name)))
    };
    let first = read("start", &block.start)?;
    let last = if block.stop.is_empty() { first } else { read("stop", &block.stop)? };
    if first.is_ipv4() != last.is_ipv4() {
        return Err(format!(
            "{}: {first} and stop {last} are of different families; use one block per family",
            field("start")
        ));
    }
    if first > last {
        return Err(format!("{}: {first} is after stop {last}; swap the two", field("start")));
    }
    Ok(Range { span: Span { first, last }, has_ends: false })
}

/// A number of addresses. `::/0` alone has 2^128 of them, which `u128` does not hold, and a pool may list several ranges.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Count {
    high: u64,
    low: u128,
}

impl From<u128> for Count {
    fn from(low: u128) -> Self {
        Self { high: 0, low }
    }
}

impl std::ops::Add for Count {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        let (low, carry) = self.low.overflowing_add(other.low);
        Self { high: self.high.saturating_add(other.high).saturating_add(carry.into()), low }
    }
}

impl Count {
    /// The difference, or zero when `other` is larger.
    pub fn saturating_sub(self, other: Self) -> Self {
        if self <= other {
            return Self::default();
        }
        let (low, borrow) = self.low.overflowing_sub(other.low);
        Self { high: self.high - other.high - u64::from(borrow), low }
    }

    /// For metrics; huge counts lose precision.
    pub fn as_f64(self) -> f64 {
        self.high as f64 * 2f64.powi(128) + self.low as f64
    }
}

impl fmt::Display for Count {
    /// Decimal.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.high == 0 {
            return fmt::Display::fmt(&self.low, f);
        }
        // Long division by 10^19 over 32-bit limbs, most significant first.
        const CHUNK: u128 = 10_000_000_000_000_000_000;
        let limb = |n: u128, shift: u32| u128::from((n >> shift) as u32);
        let high = u128::from(self.high);
        let mut limbs = [
            limb(high, 32),
            limb(high, 0),
            limb(self.low, 96),
            limb(self.low, 64),
            limb(self.low, 32),
            limb(self.low, 0),
        ];
        let mut chunks = Vec::new();
        while limbs.iter().any(|&l| l != 0) {
            let mut rest = 0u128;
            for l in &mut limbs {
                let value = (rest << 32) | *l;
                *l = value / CHUNK;
                rest = value % CHUNK;
            }
            chunks.push(rest);
        }
        let mut text = String::new();
        for (i, chunk) in chunks.iter().rev().enumerate() {
            text += &if i == 0 { chunk.to_string() } else { format!("{chunk:019}") };
        }
        f.pad_integral(true, "", &text)
    }
}
