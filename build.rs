//! Compiles `ebpf/programs` for the BPF target and leaves the object in `OUT_DIR/kinesin`.

use aya_build::{Package, Toolchain};

/// The last nightly whose LLVM (22) bpf-linker 0.13 can read.
const EBPF_TOOLCHAIN: &str = "nightly-2026-07-01";

fn main() -> anyhow::Result<()> {
    // The builder below watches the programs' own directory alone: without this, a change of what they share with the agent
    // would be in the agent and not in them.
    println!("cargo::rerun-if-changed=ebpf/abi");
    aya_build::build_ebpf(
        [Package {
            name: "kinesin-ebpf",
            root_dir: concat!(env!("CARGO_MANIFEST_DIR"), "/ebpf/programs"),
            ..Default::default()
        }],
        Toolchain::Custom(EBPF_TOOLCHAIN),
    )
}
