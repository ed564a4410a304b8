//! The clock that BPF programs read.

/// Nanoseconds of `CLOCK_MONOTONIC`, the clock of `bpf_ktime_get_ns()`: it does not count time asleep and never jumps.
pub fn monotonic_nanos() -> u64 {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)
        .expect("invariant: every Linux has CLOCK_MONOTONIC");
    let seconds = u64::try_from(now.tv_sec()).unwrap_or_default();
    seconds * 1_000_000_000 + u64::try_from(now.tv_nsec()).unwrap_or_default()
}
