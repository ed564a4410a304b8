//! `kinesin version`

use serde::Serialize;

use super::CliError;
use super::output::Output;

/// This program's version
#[derive(clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    output: Output,
}

#[derive(Serialize)]
struct Version {
    version: &'static str,
    arch: &'static str,
}

pub(super) fn run(args: &Args) -> Result<(), CliError> {
    let version = Version { version: env!("CARGO_PKG_VERSION"), arch: std::env::consts::ARCH };
    args.output.print(&version, || format!("kinesin {} {}", version.version, version.arch))
}
