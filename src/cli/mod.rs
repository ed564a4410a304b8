//! The command line: `kinesin agent` runs the agent, everything else asks a running one over its admin socket.
//!
//! Exit codes: 0 done, 1 the agent (or the command) answered with an error, 2 wrong usage, 3 no agent answered.

mod agent;
mod client;
mod config;
mod debug;
mod dump;
mod get;
mod lab;
mod output;
mod services;
mod status;
mod trace;
mod tree;
mod uninstall;
mod version;
mod vips;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use thiserror::Error;

pub use client::Client;

/// The networking agent of a Kubernetes node, and the commands that ask it.
#[derive(Parser)]
#[command(name = "kinesin", version, max_term_width = 120)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Agent(Box<agent::Args>),
    Status(status::Args),
    Services(services::Args),
    Vips(vips::Args),
    Tree(tree::Args),
    Dump(dump::Args),
    Trace(Box<trace::Args>),
    Get(get::Args),
    Config(config::Args),
    Debug(debug::Args),
    Uninstall(uninstall::Args),
    Version(version::Args),
    Lab(lab::Args),
}

/// Why a command failed; the variants are the exit codes.
#[derive(Debug, Error)]
pub enum CliError {
    /// The agent, or the command itself, says what is wrong.
    #[error("{0}")]
    Answered(String),
    /// The words on the command line make no sense together.
    #[error("{0}")]
    Usage(String),
    /// Nobody answers on the socket.
    #[error("no agent answers on {socket}: {why}\n{hint}")]
    Unreachable {
        /// The socket's path.
        socket: String,
        /// What the kernel said.
        why: String,
        /// What to check.
        hint: &'static str,
    },
}

impl CliError {
    fn code(&self) -> u8 {
        match self {
            Self::Answered(_) => 1,
            Self::Usage(_) => 2,
            Self::Unreachable { .. } => 3,
        }
    }
}

/// Entry point.
pub fn main() -> ExitCode {
    // Fails only when a provider is installed already, which is as good.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let done = match Cli::parse().command {
        Command::Agent(args) => agent::run(*args),
        Command::Status(args) => status::run(&args),
        Command::Services(args) => services::run(&args),
        Command::Vips(args) => vips::run(&args),
        Command::Tree(args) => tree::run(&args),
        Command::Dump(args) => dump::run(&args),
        Command::Trace(args) => trace::run(&args),
        Command::Get(args) => get::run(&args),
        Command::Config(args) => config::run(&args),
        Command::Debug(args) => debug::run(&args),
        Command::Uninstall(args) => uninstall::run(&args),
        Command::Version(args) => version::run(&args),
        Command::Lab(args) => lab::run(args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kinesin: {error}");
            ExitCode::from(error.code())
        }
    }
}
