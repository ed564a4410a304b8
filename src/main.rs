//! The `kinesin` binary: the agent and the commands that talk to it.

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> std::process::ExitCode {
    kinesin::lab::programs::dispatch().unwrap_or_else(kinesin::cli::main)
}
