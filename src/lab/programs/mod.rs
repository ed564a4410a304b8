//! Small programs that run inside the lab's namespaces, as hidden subcommands of `kinesin`: a pod's server, a client that
//! counts, and one that asks everybody once.

mod client;
mod probe;
mod serve;
mod tally;

pub use client::{ClientOptions, client, parse_url};
pub use probe::{How, Outcome, Probe, ProbeOptions, Probed, WHO, probe};
pub use serve::{ServeOptions, serve};

use std::io::{self, Write};
use std::process::ExitCode;

use clap::Parser;

/// The subcommand of [`serve`].
pub const SERVE: &str = "lab-serve";
/// The subcommand of [`client`].
pub const CLIENT: &str = "lab-client";
/// The subcommand of [`probe`].
pub const PROBE: &str = "lab-probe";

#[derive(Debug, Parser)]
#[command(name = "kinesin", disable_help_subcommand = true)]
enum Program {
    /// A pod of the lab
    #[command(name = SERVE)]
    Serve(ServeOptions),
    /// A client of the lab
    #[command(name = CLIENT)]
    Client(ClientOptions),
    /// A client of the lab that asks everybody once
    #[command(name = PROBE)]
    Probe(ProbeOptions),
}

/// One line, complete and at once: a reader at the other end of the pipe may be waiting for it.
fn say(event: &impl serde::Serialize) -> anyhow::Result<()> {
    let mut line = serde_json::to_vec(event)?;
    line.push(b'\n');
    let mut out = io::stdout().lock();
    out.write_all(&line)?;
    Ok(out.flush()?)
}

/// Runs a program of the lab when the command line asks for one; `None` leaves it to the real commands.
pub fn dispatch() -> Option<ExitCode> {
    let wanted = std::env::args_os().nth(1)?;
    if ![SERVE, CLIENT, PROBE].iter().any(|name| wanted == *name) {
        return None;
    }
    let program = Program::parse();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let outcome = runtime.map_err(anyhow::Error::from).and_then(|runtime| {
        runtime.block_on(async {
            match program {
                Program::Serve(options) => serve(options).await,
                Program::Client(options) => client(options).await,
                Program::Probe(options) => probe(options).await,
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
