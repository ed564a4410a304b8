//! `kinesin lab`: a cluster to look at.

use super::CliError;
use crate::lab;

/// Three nodes, a LAN and a client in network namespaces, with a Service to look at; needs root and nothing else
#[derive(clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    options: lab::LabOptions,
}

pub(super) fn run(args: Args) -> Result<(), CliError> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let outcome = runtime.map_err(anyhow::Error::from).and_then(|runtime| runtime.block_on(lab::run(args.options)));
    outcome.map_err(|error| CliError::Answered(format!("{error:#}")))
}
