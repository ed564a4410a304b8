//! `kinesin tree`

use std::time::Duration;

use super::CliError;
use super::client::Connection;
use super::output::{Format, Output, Table, age, colours, print};
use crate::admin::views::{NodeKind, NodeState, TreeView};

/// The agent's actors, who restarts them, and how they are doing
#[derive(clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    connection: Connection,
    #[command(flatten)]
    output: Output,
    /// Show it again every second until interrupted
    #[arg(short, long)]
    watch: bool,
}

pub(super) fn run(args: &Args) -> Result<(), CliError> {
    let client = args.connection.client();
    loop {
        let tree: TreeView = client.get("/v1/tree")?;
        if args.watch && colours() && !matches!(args.output.format, Some(Format::Json | Format::Yaml)) {
            // Home, and clear what is below.
            print("\x1b[H\x1b[J\n")?;
        }
        args.output.print(&tree, || table(&tree))?;
        if !args.watch {
            return Ok(());
        }
        #[expect(clippy::disallowed_methods, reason = "a command without a runtime, waiting for its next look")]
        std::thread::sleep(Duration::from_secs(1));
    }
}

fn table(tree: &TreeView) -> String {
    let mut table =
        Table::new(&["NAME", "STATE", "UPTIME", "RESTARTS", "MESSAGES", "WAITING", "MEAN", "MAX", "LAST ERROR"]);
    add(&mut table, tree, "", "", "");
    table.render("")
}

/// Adds `node` with `lead` before its name, and what is below it.
fn add(table: &mut Table, node: &TreeView, indent: &str, lead: &str, below: &str) {
    let strategy = node.strategy.as_ref().map(|strategy| format!(" ({strategy})")).unwrap_or_default();
    let actor = node.kind == NodeKind::Actor;
    let or_empty = |text: String| if actor { text } else { String::new() };
    table.row(vec![
        format!("{indent}{lead}{}{strategy}", node.name),
        match node.state {
            NodeState::Running => "running",
            NodeState::Restarting => "restarting",
            NodeState::Stopped => "stopped",
        }
        .into(),
        node.uptime_seconds.map(age).unwrap_or_default(),
        restarts(node),
        or_empty(node.messages.to_string()),
        or_empty(node.mailbox_depth.to_string()),
        or_empty(micros(node.mean_handle_us)),
        or_empty(micros(node.max_handle_us)),
        node.last_error.clone().unwrap_or_default(),
    ]);
    let indent = format!("{indent}{below}");
    for (i, child) in node.children.iter().enumerate() {
        let last = i + 1 == node.children.len();
        let (lead, below) = if last { ("└─ ", "   ") } else { ("├─ ", "│  ") };
        add(table, child, &indent, lead, below);
    }
}

/// `3 (panic 2, error 1)`
fn restarts(node: &TreeView) -> String {
    let total: u64 = node.restarts.values().sum();
    if total == 0 {
        return "0".into();
    }
    let causes: Vec<String> = node.restarts.iter().map(|(cause, n)| format!("{cause} {n}")).collect();
    format!("{total} ({})", causes.join(", "))
}

fn micros(micros: u64) -> String {
    match micros {
        0..1_000 => format!("{micros}µs"),
        1_000..1_000_000 => format!("{:.1}ms", micros as f64 / 1e3),
        _ => format!("{:.1}s", micros as f64 / 1e6),
    }
}
