//! The pools: what each offers, which of them collide, which of them an address belongs to.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use smol_str::SmolStr;

use super::range::{Count, Range, Span, parse_block};
use crate::objects::{Meta, Pool, YesNo};

/// A pool as it is used.
#[derive(Clone, Debug)]
pub(crate) struct PoolState {
    pub(crate) pool: Arc<Pool>,
    pub(crate) ranges: Vec<Range>,
    /// Parts of the spec that are left out, each naming the field and the fix.
    pub(crate) problems: Vec<String>,
    /// Message of the conflict with an earlier pool, or with itself.
    pub(crate) conflict: Option<String>,
    selector_valid: bool,
}

impl PoolState {
    fn read(pool: Arc<Pool>) -> Self {
        let mut ranges = Vec::new();
        let mut problems = Vec::new();
        for (index, block) in pool.spec.blocks.iter().enumerate() {
            match parse_block(index, block) {
                Ok(range) => ranges.push(range),
                Err(problem) => problems.push(problem),
            }
        }
        let selector = pool.spec.service_selector.as_ref().map_or(Ok(()), |selector| selector.validate());
        if let Err(error) = &selector {
            problems.push(format!("spec.serviceSelector.{error}"));
        }
        Self { pool, ranges, problems, conflict: None, selector_valid: selector.is_ok() }
    }

    /// Older pools come first; names decide between equal ones.
    fn rank(&self) -> (SmolStr, SmolStr) {
        (self.pool.metadata.creation_timestamp.clone(), self.pool.metadata.name.clone())
    }

    pub(crate) fn name(&self) -> &SmolStr {
        &self.pool.metadata.name
    }

    /// Gives out new addresses.
    pub(crate) fn is_open(&self) -> bool {
        !self.pool.spec.disabled && self.conflict.is_none()
    }

    pub(crate) fn selects(&self, service: &Meta) -> bool {
        self.selector_valid
            && self.pool.spec.service_selector.as_ref().is_none_or(|selector| selector.matches_service(service))
    }

    pub(crate) fn reserves_ends(&self) -> bool {
        self.pool.spec.allow_first_last_ips == Some(YesNo::No)
    }

    pub(crate) fn contains(&self, ip: IpAddr) -> bool {
        self.ranges.iter().any(|range| range.span.contains(ip))
    }

    /// The address is in the pool, but only as a reserved end of a CIDR.
    pub(crate) fn reserves(&self, ip: IpAddr) -> bool {
        self.reserves_ends() && self.contains(ip) && !self.ranges.iter().any(|range| range.usable(true).contains(ip))
    }

    /// First and last addresses that are kept back.
    pub(crate) fn reserved_ends(&self) -> impl Iterator<Item = IpAddr> + '_ {
        let kept = self.reserves_ends();
        self.ranges.iter().filter(move |range| kept && range.has_ends).flat_map(|r| [r.span.first, r.span.last])
    }

    pub(crate) fn total(&self) -> Count {
        self.ranges.iter().fold(Count::default(), |sum, range| sum + range.span.count())
    }
}

/// Every pool, in an order that does not depend on how they arrived.
#[derive(Clone, Debug, Default)]
pub(crate) struct PoolTable {
    by_rank: BTreeMap<(SmolStr, SmolStr), PoolState>,
    ranks: BTreeMap<SmolStr, SmolStr>,
    /// Ranges of pools without a conflict, which are disjoint: first address to (last address, rank).
    disjoint: BTreeMap<IpAddr, (IpAddr, (SmolStr, SmolStr))>,
    /// Ranks of the others.
    conflicting: Vec<(SmolStr, SmolStr)>,
}

impl PoolTable {
    pub(crate) fn is_empty(&self) -> bool {
        self.by_rank.is_empty()
    }

    pub(crate) fn get(&self, name: &str) -> Option<&PoolState> {
        let created = self.ranks.get(name)?;
        self.by_rank.get(&(created.clone(), SmolStr::from(name)))
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &PoolState> {
        self.by_rank.values()
    }

    /// Adds or replaces a pool; returns what it was before.
    pub(crate) fn upsert(&mut self, pool: Arc<Pool>) -> Option<PoolState> {
        let name = pool.metadata.name.clone();
        let state = PoolState::read(pool);
        let old = self.take(&name);
        self.ranks.insert(name, state.pool.metadata.creation_timestamp.clone());
        self.by_rank.insert(state.rank(), state);
        self.settle_conflicts();
        old
    }

    pub(crate) fn remove(&mut self, name: &str) -> Option<PoolState> {
        let old = self.take(name)?;
        self.settle_conflicts();
        Some(old)
    }

    fn take(&mut self, name: &str) -> Option<PoolState> {
        let created = self.ranks.remove(name)?;
        self.by_rank.remove(&(created, SmolStr::from(name)))
    }

    /// Marks each pool that overlaps itself or an unmarked older one. Runs on pool changes only: they are rare and few.
    fn settle_conflicts(&mut self) {
        self.disjoint.clear();
        self.conflicting.clear();
        let names: Vec<_> = self.by_rank.keys().cloned().collect();
        for rank in names {
            let Some(state) = self.by_rank.get(&rank) else { continue };
            let conflict = internal_overlap(&state.ranges).or_else(|| self.overlap(&state.ranges));
            match conflict {
                Some(_) => self.conflicting.push(rank.clone()),
                None => {
                    for Range { span, .. } in &state.ranges {
                        self.disjoint.insert(span.first, (span.last, rank.clone()));
                    }
                }
            }
            if let Some(state) = self.by_rank.get_mut(&rank) {
                state.conflict = conflict;
            }
        }
    }

    /// The first overlap of the ranges with those of unmarked pools.
    fn overlap(&self, ranges: &[Range]) -> Option<String> {
        ranges.iter().find_map(|Range { span, .. }| {
            let (first, (last, rank)) = self.disjoint.range(..=span.last).next_back()?;
            let other = Span { first: *first, last: *last };
            other.overlaps(span).then(|| {
                format!("Pool conflicts since range '{span}' overlaps range '{other}' from IP Pool '{}'", rank.1)
            })
        })
    }

    /// Pools with the address in one of their ranges, usable ones first. More than one only where pools conflict.
    pub(crate) fn containing(&self, ip: IpAddr) -> impl Iterator<Item = &PoolState> {
        let disjoint = self.disjoint.range(..=ip).next_back().filter(|(_, (last, _))| *last >= ip);
        let first = disjoint.and_then(|(_, (_, rank))| self.by_rank.get(rank));
        let others = self.conflicting.iter().filter_map(|rank| self.by_rank.get(rank));
        first.into_iter().chain(others.filter(move |pool| pool.contains(ip)))
    }
}

fn internal_overlap(ranges: &[Range]) -> Option<String> {
    let mut spans: Vec<Span> = ranges.iter().map(|range| range.span).collect();
    spans.sort();
    spans
        .windows(2)
        .find(|pair| pair[0].overlaps(&pair[1]))
        .map(|pair| format!("Pool conflicts since range '{}' overlaps range '{}' from the same pool", pair[1], pair[0]))
}
