//! The clocks of the kernel and of the wall.

use std::time::Instant;

use jiff::Timestamp;
use smol_str::{SmolStr, format_smolstr};

/// The monotonic clock, which tests may pause.
pub fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

/// CLOCK_MONOTONIC in nanoseconds, as `bpf_ktime_get_ns` reads it.
pub fn monotonic_nanos() -> u64 {
    let time = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC);
    let time = time.expect("invariant: CLOCK_MONOTONIC exists on every Linux");
    u64::try_from(time.tv_sec()).unwrap_or(0) * 1_000_000_000 + u64::try_from(time.tv_nsec()).unwrap_or(0)
}

/// The wall clock as `metav1.MicroTime`: RFC 3339 with microseconds.
pub fn micro_time() -> SmolStr {
    format_smolstr!("{:.6}", Timestamp::now())
}

/// The wall clock as `metav1.Time`: RFC 3339 with seconds.
pub fn time() -> String {
    format!("{:.0}", Timestamp::now())
}
