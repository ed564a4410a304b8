//! The supervision tree as people read it.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

use metrics::gauge;

use crate::address::{Cause, Stats};
use crate::admin::views::{NodeKind, NodeState, TreeView};
use crate::supervisor::{Child, Strategy};

/// A child and everybody below.
pub(super) fn view(child: &Child) -> TreeView {
    let stats = child.stats();
    let messages = stats.messages.load(Ordering::Relaxed);
    let micros = |nanos: u64| nanos / 1_000;
    let below = child.below();
    TreeView {
        name: child.name().into(),
        kind: if below.is_some() { NodeKind::Supervisor } else { NodeKind::Actor },
        strategy: below.map(|(policy, _)| match policy.strategy {
            Strategy::OneForOne => "one_for_one".into(),
            Strategy::RestForOne => "rest_for_one".into(),
        }),
        state: if stats.running.load(Ordering::Acquire) { NodeState::Running } else { NodeState::Restarting },
        restarts: restarts(stats),
        messages,
        mailbox_depth: stats.depth.load(Ordering::Relaxed).max(0).unsigned_abs(),
        mean_handle_us: micros(stats.busy_nanos.load(Ordering::Relaxed)).checked_div(messages).unwrap_or(0),
        max_handle_us: micros(stats.longest_nanos.load(Ordering::Relaxed)),
        last_error: stats.last_error(),
        uptime_seconds: stats.uptime().map(|uptime| uptime.as_secs()),
        children: below.map(|(_, children)| children.iter().map(view).collect()).unwrap_or_default(),
    }
}

fn restarts(stats: &Stats) -> BTreeMap<String, u64> {
    let count = |cause: Cause| stats.restarts[cause as usize].load(Ordering::Relaxed);
    Cause::ALL.into_iter().filter(|c| count(*c) > 0).map(|c| (c.as_str().to_owned(), count(c))).collect()
}

/// Publishes what is only known by looking.
pub(super) fn report(child: &Child) {
    let depth = child.stats().depth.load(Ordering::Relaxed).max(0);
    gauge!("kinesin_actor_mailbox_depth", "actor" => child.name()).set(depth as f64);
    for child in child.below().map(|(_, children)| children).unwrap_or_default() {
        report(child);
    }
}
