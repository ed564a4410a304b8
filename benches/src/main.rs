//! `make bench`: what Kinesin costs, as tables of medians. Needs root, and the release binary beside this one.
//!
//! `kinesin-bench [section…]` runs `micro`, `programs`, `requests`, `acceleration`, `sync` and `flood`, or those that are
//! named. Nothing is compared with earlier runs here, and nothing fails because it is slow: a table at the end says which
//! goals hold, and docs/performance.md keeps the figures.

#![allow(clippy::print_stdout, reason = "a program that prints tables")]

mod acceleration;
#[path = "../../tests/support/bpf.rs"]
mod bpf;
mod cluster;
mod count;
mod flood;
mod goals;
mod kube_proxy;
mod limit;
mod micro;
mod objects;
#[allow(dead_code, reason = "shared with the tests, which use all of it")]
#[path = "../../tests/datapath/packets.rs"]
mod packets;
mod programs;
mod report;
mod requests;
#[allow(dead_code, reason = "shared with the tests, which use all of it")]
#[path = "../../tests/datapath/rig.rs"]
mod rig;
#[path = "../../tests/support/mod.rs"]
mod support;
mod sync;
mod traffic;

use std::path::PathBuf;

use anyhow::{Context, bail};

#[global_allocator]
static ALLOCATOR: count::Counting = count::Counting;

type Section = fn() -> anyhow::Result<()>;

const SECTIONS: [(&str, Section); 6] = [
    ("micro", micro::run),
    ("programs", programs::run),
    ("requests", requests::run),
    ("acceleration", acceleration::run),
    ("sync", sync::run),
    ("flood", flood::run),
];

fn main() -> anyhow::Result<()> {
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    if let Some(unknown) = wanted.iter().find(|name| SECTIONS.iter().all(|(section, _)| section != name)) {
        bail!("there is no section {unknown:?}; there are {}", SECTIONS.map(|(name, _)| name).join(", "));
    }
    if !nix::unistd::Uid::effective().is_root() {
        bail!("namespaces and eBPF need root");
    }
    report::machine();
    for (name, section) in SECTIONS {
        if wanted.is_empty() || wanted.iter().any(|wanted| wanted == name) {
            section().with_context(|| format!("section {name}"))?;
        }
    }
    goals::print();
    Ok(())
}

/// The release binary that was built together with this program.
pub(crate) fn agent_binary() -> anyhow::Result<PathBuf> {
    let path = std::env::current_exe()?.with_file_name("kinesin");
    if !path.exists() {
        bail!("{} is missing: run `make bench`, which builds it", path.display());
    }
    Ok(path)
}
