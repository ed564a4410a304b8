//! Scenarios: YAML in, tables and maps out; and what holds for any input.
//!
//! Each file below `tests/scenarios/cases` is run over both sources, the directory of manifests and a real API server, and
//! each time into memory maps and into the kernel's; CONTRIBUTING.md tells how to add one. One control plane serves
//! the whole binary. Needs root.
//!
//! The harness is libtest-mimic's, because the files are found when the tests run.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(unreachable_pub, reason = "a test binary has no outside")]

mod support;

#[path = "scenarios/agent.rs"]
mod agent;
#[path = "scenarios/case.rs"]
mod case;
#[path = "scenarios/feed.rs"]
mod feed;
#[path = "scenarios/kernel.rs"]
mod kernel;
#[path = "scenarios/run.rs"]
mod run;
#[path = "scenarios/shared.rs"]
mod shared;

use libtest_mimic::{Arguments, Trial};

use feed::SourceKind;

fn main() {
    let arguments = Arguments::from_args();
    let mut trials = Vec::new();
    for path in case::files() {
        for kind in SourceKind::ALL {
            let (name, path) = (format!("{}::{kind}", case::name(&path)), path.clone());
            trials.push(Trial::test(name, move || run::case(&path, kind).map_err(|error| format!("{error:#}").into())));
        }
    }
    let conclusion = libtest_mimic::run(&arguments, trials);
    shared::close();
    conclusion.exit();
}
