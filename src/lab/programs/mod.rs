//! Small programs that run inside the lab's namespaces, as hidden subcommands of `kinesin`: a pod's server and a client that counts.

mod client;
mod serve;
mod tally;

pub use client::{ClientOptions, client, parse_url};
pub use serve::{ServeOptions, serve};

use std::process::ExitCode;

use clap::Parser;

/// The subcommand of [`serve`].
pub const SERVE: &str = "lab-serve";
/// The subcommand of [`client`].
pub const CLIENT: &str = "lab-client";

#[derive(Debug, Parser)]
#[command(name = "kinesin", disable_help_subcommand = true)]
enum Program {
    /// A pod of the lab
    #[command(name = SERVE)]
    Serve(ServeOptions),
    /// A client of the lab
    #[command(name = CLIENT)]
    Client(ClientOptions),
}

/// Runs a program of the lab when the command line asks for one; `None` leaves it to the real commands.
pub fn dispatch() -> Option<ExitCode> {
    let wanted = std::env::args_os().nth(1)?;
    if wanted != SERVE && wanted != CLIENT {
        return None;
    }
    let program = Program::parse();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let outcome = runtime.map_err(anyhow::Error::from).and_then(|runtime| {
        runtime.block_on(async {
            match program {
                Program::Serve(options) => serve(options).await,
                Program::Client(options) => client(options).await,
            }
        })
    });
    Some(match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    })
}
