//! Connections: when the collector looks for those that have expired, and what it makes of what it finds.
//!
//! How long a silent connection is kept is [`kinesin_abi::Timeouts`], which the programs share; a connection is silent
//! only when both of its directions are. A pass over the tables costs in proportion to their content, so [`Pace`] makes
//! passes rarer while they find little, and early only when the programs have added much: in the long run a pass looks at
//! no more than some twenty entries for each that it removes, or at fewer than were added since the last one.
//!
//! Deliberately absent: the tables and the clock.

pub mod ports;
#[cfg(test)]
mod tests;

use std::time::Duration;

use kinesin_abi::{BackendState, FlowCount, FlowKey, FlowValue, Timeouts, proto, tcp_closed, tcp_established};

/// Nanoseconds of a number of seconds.
const SECOND: u64 = 1_000_000_000;

/// What is to be done about one entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look {
    /// It is in use.
    Keep,
    /// It has expired if the other direction has.
    Silent,
    /// It has expired if the other direction has, and its backend takes no new connections.
    SilentIfLeaving,
}

/// Looks at one entry. `now` and the entry's time are CLOCK_MONOTONIC in nanoseconds. An entry from the future is in use.
pub fn look(timeouts: &Timeouts, key: &FlowKey, value: &FlowValue, now: u64) -> Look {
    let silent = now.saturating_sub(value.last_seen);
    let longer_than = |seconds: u32| silent > u64::from(seconds) * SECOND;
    if longer_than(timeouts.of(key.proto, value.flags, value.tcp)) {
        return Look::Silent;
    }
    let established = tcp_established(value.tcp) && !tcp_closed(value.tcp);
    if key.proto == proto::TCP && established && longer_than(timeouts.leaving()) {
        return Look::SilentIfLeaving;
    }
    Look::Keep
}

/// Whether established connections to a backend of this state ([`kinesin_abi::Backend::state`]) get the grace period only.
pub fn is_leaving(state: u8) -> bool {
    state != BackendState::Active as u8 && state != BackendState::Maintenance as u8
}

/// The share of the table of established TCP connections that others may have, which begin: an eighth.
const OPENING_SHARE: u32 = 8;

/// How many entries of connections that are not established yet may be in a table of `size` entries.
pub const fn most_opening(size: u32) -> u32 {
    size / OPENING_SHARE
}

/// What a pass over one table found, entries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// Kept, by TCP and other protocols.
    pub alive: [u64; 2],
    /// Removed, by TCP and other protocols.
    pub expired: [u64; 2],
}

impl Found {
    /// Notes one entry.
    pub fn note(&mut self, protocol: u8, expired: bool) {
        let which = usize::from(protocol != proto::TCP);
        let counter = if expired { &mut self.expired[which] } else { &mut self.alive[which] };
        *counter += 1;
    }

    /// Entries kept.
    pub fn kept(&self) -> u64 {
        self.alive.iter().sum()
    }

    /// Entries removed.
    pub fn removed(&self) -> u64 {
        self.expired.iter().sum()
    }
}

/// How often passes are made (`conntrack-gc-interval`, `conntrack-gc-max-interval`); zero leaves it to [`Pace`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Intervals {
    /// This and no other.
    pub fixed: Duration,
    /// No longer than this.
    pub max: Duration,
}

/// When the next pass is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pace {
    interval: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self { interval: Self::FIRST }
    }
}

impl Pace {
    /// Before anything is known.
    pub const FIRST: Duration = Duration::from_secs(5 * 60);
    /// Passes are at least this far apart.
    pub const MIN: Duration = Duration::from_secs(10);
    /// And at most this far.
    pub const MAX: Duration = Duration::from_secs(12 * 3600);

    /// How long after the last pass the next one is due.
    pub fn interval(&self, limits: &Intervals) -> Duration {
        if !limits.fixed.is_zero() {
            return limits.fixed.max(Duration::from_secs(1));
        }
        if limits.max.is_zero() { self.interval } else { self.interval.min(limits.max.max(Self::MIN)) }
    }

    /// Takes a pass into account: more often where more than a quarter had expired, more rarely where less than a
    /// twentieth had.
    pub fn passed(&mut self, kept: u64, removed: u64) {
        let all = kept + removed;
        let share = if all == 0 { 0.0 } else { removed as f64 / all as f64 };
        let factor = if share > 0.25 {
            1.0 - share
        } else if share < 0.05 {
            1.5
        } else {
            1.0
        };
        self.interval = self.interval.mul_f64(factor).clamp(Self::MIN, Self::MAX);
    }

    /// Whether a pass is due earlier, by what the programs have counted since the last one, which was `since` ago: a table
    /// may have filled up, or the share of connections that begin be used up by half. `sizes` are those of the tables of
    /// established and of other connections.
    pub fn is_urgent(since: Duration, last: &Counts, now: &Counts, sizes: (u32, u32)) -> bool {
        let settled = now.of(FlowCount::Settled).saturating_sub(last.of(FlowCount::Settled));
        let created = now.of(FlowCount::Created).saturating_sub(last.of(FlowCount::Created));
        let refused = now.of(FlowCount::Unsettled) > last.of(FlowCount::Unsettled);
        let opening = now.opening() >= u64::from(most_opening(sizes.0) / 2).max(1);
        since >= Self::MIN && (refused || opening || settled >= u64::from(sizes.0 / 4) || created >= u64::from(sizes.1))
    }
}

/// The programs' counts, in the order of [`FlowCount::ALL`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts(pub [u64; FlowCount::ALL.len()]);

impl Counts {
    /// One of them.
    pub fn of(&self, what: FlowCount) -> u64 {
        self.0[what as usize]
    }

    /// Entries of the table of established connections whose connections are not, as far as the programs have counted.
    pub fn opening(&self) -> u64 {
        let gone = self.of(FlowCount::Settled).wrapping_add(self.of(FlowCount::WrittenOff));
        // Somewhat less than none, where entries were removed before they were settled elsewhere.
        (self.of(FlowCount::Opened).wrapping_sub(gone) as i64).max(0) as u64
    }

    /// How many transient entries the kernel has forgotten to make room: all that were added, less those that were removed
    /// and those that are there. The numbers are read one after the other while packets go on, so a small difference means
    /// nothing: an eighth of the table is left out of account.
    pub fn forgotten(&self, present: u64, size: u32) -> u64 {
        let gone = self.of(FlowCount::Removed) + self.of(FlowCount::Collected) + present;
        let forgotten = self.of(FlowCount::Created).saturating_sub(gone);
        if forgotten <= u64::from(size / 8) { 0 } else { forgotten }
    }
}
