//! `kinesin debug`

use clap::Subcommand;

use super::CliError;
use super::client::Connection;
use super::output::print;
use crate::admin::Kill;

/// Break things on purpose
#[derive(clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Make an actor panic, to see it restarted (root only)
    Kill {
        /// Its name in `kinesin tree`
        actor: String,
        #[command(flatten)]
        connection: Connection,
    },
}

pub(super) fn run(args: &Args) -> Result<(), CliError> {
    let What::Kill { actor, connection } = &args.what;
    connection.client().post("/v1/debug/kill", &Kill { actor: actor.clone() })?;
    print(&format!("{actor} was told to panic"))
}
