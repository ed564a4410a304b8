//! What integration tests share: child processes that cannot outlive the test, waiting on conditions, and a real
//! Kubernetes control plane. Use it with `mod support;`.
//!
//! Deliberately absent: anything that the `kinesin` library has already (namespaces, links, the lab).
#![allow(dead_code, reason = "every test binary compiles all of this and uses its own part of it")]
#![allow(unreachable_pub, reason = "public to the test binary that includes it, which has no outside")]
#![allow(clippy::unwrap_used, reason = "test code: a panic here is a failed test, with its place")]

pub mod control_plane;
pub mod process;

use std::time::{Duration, Instant};

/// Polls `probe` until it gives a value; after `bound`, panics naming `what` and the last thing the probe complained of.
///
/// The bound is there to end a broken run, so make it generous: a loaded machine of two cores must not reach it.
#[track_caller]
pub fn wait_until<T, E: std::fmt::Display>(what: &str, bound: Duration, mut probe: impl FnMut() -> Result<T, E>) -> T {
    match try_wait_until(bound, &mut probe) {
        Ok(value) => value,
        Err(last) => panic!("waited {bound:?} for {what}; the last answer: {last}"),
    }
}

/// [`wait_until`] for callers that clean up or explain first: gives the probe's last error instead of panicking.
pub fn try_wait_until<T, E>(bound: Duration, mut probe: impl FnMut() -> Result<T, E>) -> Result<T, E> {
    let deadline = Instant::now() + bound;
    loop {
        match probe() {
            Ok(value) => return Ok(value),
            Err(last) if Instant::now() >= deadline => return Err(last),
            Err(_) => pause(),
        }
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "the pause between two probes of a bounded wait, on a thread of the test"
)]
fn pause() {
    std::thread::sleep(Duration::from_millis(20));
}
