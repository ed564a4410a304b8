//! The `kinesin` binary: the agent and the commands that talk to it.

use std::ffi::{c_int, c_long};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

unsafe extern "C" {
    /// Of mimalloc, which is linked as the allocator.
    fn mi_option_set(option: c_int, value: c_long);
}

/// `mi_option_purge_delay`, the same number in all versions of mimalloc since 2.0.
const PURGE_DELAY: c_int = 15;

fn main() -> std::process::ExitCode {
    // Freed pages go back to the kernel at once, not a second later at the next allocation: an agent loads programs and
    // lists at its start and is idle from then on, with threads that never allocate again.
    // SAFETY: it writes one integer of a static table, and no other thread runs yet.
    unsafe { mi_option_set(PURGE_DELAY, 0) };
    kinesin::lab::programs::dispatch().unwrap_or_else(kinesin::cli::main)
}
