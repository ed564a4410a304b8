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
#[path = "scenarios/edits.rs"]
mod edits;
#[path = "scenarios/feed.rs"]
mod feed;
#[path = "scenarios/kernel.rs"]
mod kernel;
#[path = "scenarios/latency.rs"]
mod latency;
#[path = "scenarios/odd.rs"]
mod odd;
#[path = "scenarios/property.rs"]
mod property;
#[path = "scenarios/run.rs"]
mod run;
#[path = "scenarios/schema.rs"]
mod schema;
#[path = "scenarios/shared.rs"]
mod shared;

use libtest_mimic::{Arguments, Trial};

use feed::SourceKind;

/// A test's name, and what it does.
type Test = (&'static str, fn() -> anyhow::Result<()>);

/// What is no case file.
const TESTS: [Test; 11] = [
    ("every_case_is_in_the_table_of_rules", case::every_case_is_in_the_table_of_rules),
    ("r40_edits_end_as_if_created_so", edits::r40_edits_end_as_if_created_so),
    (
        "r56_a_single_change_goes_at_once_and_a_burst_in_batches",
        latency::r56_a_single_change_goes_at_once_and_a_burst_in_batches,
    ),
    ("r38_odd_slices_and_nodes_in_manifests", odd::r38_odd_slices_and_nodes_in_manifests),
    ("r38_odd_slices_and_nodes_of_an_api_server", odd::r38_odd_slices_and_nodes_of_an_api_server),
    ("r38_odd_values_in_this_nodes_own_object", odd::r38_odd_values_in_this_nodes_own_object),
    ("r38_odd_pods_in_manifests", odd::r38_odd_pods_in_manifests),
    ("r39_odd_services_in_manifests", odd::r39_odd_services_in_manifests),
    ("r39_odd_services_of_an_api_server", odd::r39_odd_services_of_an_api_server),
    ("r39_annotation_flips_on_a_live_service_in_manifests", odd::r39_annotation_flips_on_a_live_service_in_manifests),
    (
        "r39_annotation_flips_on_a_live_service_of_an_api_server",
        odd::r39_annotation_flips_on_a_live_service_of_an_api_server,
    ),
];

fn main() {
    let arguments = Arguments::from_args();
    let mut trials = Vec::new();
    for path in case::files() {
        for kind in SourceKind::ALL {
            let (name, path) = (format!("{}::{kind}", case::name(&path)), path.clone());
            trials.push(Trial::test(name, move || run::case(&path, kind).map_err(|error| format!("{error:#}").into())));
        }
    }
    for (name, test) in TESTS {
        trials.push(Trial::test(name, move || test().map_err(|error| format!("{error:#}").into())));
    }
    let conclusion = libtest_mimic::run(&arguments, trials);
    shared::close();
    conclusion.exit();
}
