//! Which addresses are taken, as merged intervals, so that the lowest free one is found in one lookup whatever the size
//! of the range.

use std::collections::BTreeMap;
use std::net::IpAddr;

use super::range::{Span, address, number};

/// A set of addresses of both families.
#[derive(Clone, Debug, Default)]
pub(crate) struct TakenSet {
    /// First to last of each maximal interval.
    v4: BTreeMap<u128, u128>,
    v6: BTreeMap<u128, u128>,
}

impl TakenSet {
    fn family(&self, v6: bool) -> &BTreeMap<u128, u128> {
        if v6 { &self.v6 } else { &self.v4 }
    }

    fn family_mut(&mut self, v6: bool) -> &mut BTreeMap<u128, u128> {
        if v6 { &mut self.v6 } else { &mut self.v4 }
    }

    /// The interval that holds the number.
    fn interval(map: &BTreeMap<u128, u128>, n: u128) -> Option<(u128, u128)> {
        map.range(..=n).next_back().map(|(&first, &last)| (first, last)).filter(|&(_, last)| last >= n)
    }

    pub(crate) fn contains(&self, ip: IpAddr) -> bool {
        Self::interval(self.family(ip.is_ipv6()), number(ip)).is_some()
    }

    pub(crate) fn insert(&mut self, ip: IpAddr) {
        let n = number(ip);
        let map = self.family_mut(ip.is_ipv6());
        if Self::interval(map, n).is_some() {
            return;
        }
        let mut first = n;
        let mut last = n;
        if let Some((left, _)) = n.checked_sub(1).and_then(|below| Self::interval(map, below)) {
            first = left;
        }
        if let Some(right) = n.checked_add(1).and_then(|above| map.remove(&above)) {
            last = right;
        }
        map.insert(first, last);
    }

    pub(crate) fn remove(&mut self, ip: IpAddr) {
        let n = number(ip);
        let map = self.family_mut(ip.is_ipv6());
        let Some((first, last)) = Self::interval(map, n) else { return };
        map.remove(&first);
        if first < n {
            map.insert(first, n - 1);
        }
        if n < last {
            map.insert(n + 1, last);
        }
    }

    /// The lowest address of the span that is not in the set.
    pub(crate) fn lowest_free(&self, span: &Span) -> Option<IpAddr> {
        let first = number(span.first);
        let free = match Self::interval(self.family(span.is_v6()), first) {
            None => first,
            // Intervals are maximal, so the number after one is free.
            Some((_, last)) => last.checked_add(1)?,
        };
        if free > number(span.last) {
            return None;
        }
        address(span.is_v6(), free)
    }
}
