//! The load client's book-keeping, apart from its sockets: every request ends in exactly one column.

use std::time::Duration;

use crate::lab::report::{Backend, Held, Reason, Totals};

/// Counts, with times as durations since the start.
#[derive(Debug, Default)]
pub(super) struct Tally {
    totals: Totals,
    last_success: Option<Duration>,
    longest_gap: Duration,
}

impl Tally {
    pub(super) fn started(&mut self) {
        self.totals.attempted += 1;
        self.totals.in_flight += 1;
    }

    pub(super) fn succeeded(&mut self, now: Duration, backend: Backend) {
        self.totals.in_flight -= 1;
        self.totals.succeeded += 1;
        *self.totals.backends.entry(backend.pod).or_default() += 1;
        *self.totals.nodes.entry(backend.node).or_default() += 1;
        match self.last_success {
            None => self.totals.first_success_ms = Some(millis(now)),
            Some(last) => self.longest_gap = self.longest_gap.max(now.saturating_sub(last)),
        }
        self.last_success = Some(now);
    }

    pub(super) fn failed(&mut self, reason: Reason) {
        self.totals.in_flight -= 1;
        self.totals.failed += 1;
        *self.totals.failures.entry(reason).or_default() += 1;
    }

    /// Everything as of `now`, with the gap that is still open.
    pub(super) fn totals(&self, now: Duration, held: Held) -> Totals {
        let open_gap = now.saturating_sub(self.last_success.unwrap_or_default());
        Totals {
            elapsed_ms: millis(now),
            longest_gap_ms: millis(self.longest_gap.max(open_gap)),
            held,
            ..self.totals.clone()
        }
    }

    pub(super) fn in_flight(&self) -> u64 {
        self.totals.in_flight
    }
}

pub(super) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn backend(pod: &str) -> Backend {
        format!("pod={pod} node=n client=10.0.0.1:1").parse().expect("a backend")
    }

    #[test]
    fn every_request_ends_in_exactly_one_column() {
        let mut tally = Tally::default();
        for _ in 0..5 {
            tally.started();
        }
        tally.succeeded(at(10), backend("a"));
        tally.succeeded(at(20), backend("b"));
        tally.failed(Reason::Refused);
        let totals = tally.totals(at(30), Held::default());
        assert_eq!((totals.attempted, totals.succeeded, totals.failed, totals.in_flight), (5, 2, 1, 2));
        assert_eq!(totals.backends.values().sum::<u64>(), totals.succeeded);
        assert_eq!(totals.failures.values().sum::<u64>(), totals.failed);
    }

    #[test]
    fn the_longest_gap_counts_from_success_to_success_and_the_open_one() {
        let mut tally = Tally::default();
        for _ in 0..3 {
            tally.started();
        }
        tally.succeeded(at(500), backend("a"));
        assert_eq!(tally.totals(at(500), Held::default()).first_success_ms, Some(500));
        assert_eq!(tally.totals(at(500), Held::default()).longest_gap_ms, 0, "waiting for the first is no gap");
        tally.succeeded(at(800), backend("a"));
        tally.succeeded(at(900), backend("a"));
        assert_eq!(tally.totals(at(900), Held::default()).longest_gap_ms, 300);
        assert_eq!(tally.totals(at(2000), Held::default()).longest_gap_ms, 1100, "nothing since 900");
    }

    #[test]
    fn without_any_success_the_gap_is_the_whole_time() {
        assert_eq!(Tally::default().totals(at(700), Held::default()).longest_gap_ms, 700);
    }
}
