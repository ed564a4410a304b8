//! `kinesin uninstall`
//!
//! Deliberately absent: anything outside the kernel. Objects in the API server are the cluster's; files belong to whoever
//! installed them.

use std::path::PathBuf;

use super::CliError;
use super::client::Connection;
use super::output::print;
use crate::datapath;

/// Remove what agents have left in the kernel of this node: programs, hooks and maps, and nothing of anybody else's
#[derive(clap::Args)]
pub(super) struct Args {
    /// As the agent has it
    #[arg(long, env = "KINESIN_BPF_ROOT", default_value = "/sys/fs/bpf", value_name = "PATH")]
    bpf_root: PathBuf,
    /// Only say what would be removed
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    connection: Connection,
}

pub(super) fn run(args: &Args) -> Result<(), CliError> {
    let root = args.bpf_root.display();
    let failed = |error: std::io::Error| CliError::Answered(format!("below {root}: {error}"));
    let pins = datapath::pins(&args.bpf_root).map_err(failed)?;
    if args.dry_run {
        let lines: Vec<_> = pins.iter().map(|pin| pin.display().to_string()).collect();
        return print(&lines.join("\n"));
    }
    if args.connection.client().get::<serde_json::Value>("/v1/status").is_ok() {
        let text = "an agent runs on this node and would attach everything again: stop it first";
        return Err(CliError::Answered(text.into()));
    }
    datapath::detach_all(&args.bpf_root).map_err(failed)?;
    print(&format!("{} hooks and maps removed below {root}", pins.len()))
}
