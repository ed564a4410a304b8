//! `kinesin dump`

use serde_json::Value;

use super::CliError;
use super::client::{Connection, percent_encode};
use super::output::{Output, Table, lines};
use crate::admin::views::{Dump, TableView};

/// The agent's tables: what it wants, and what the kernel's maps hold
#[derive(clap::Args)]
pub(super) struct Args {
    /// The table to show; without it, which ones there are
    table: Option<String>,
    #[command(flatten)]
    connection: Connection,
    #[command(flatten)]
    output: Output,
}

pub(super) fn run(args: &Args) -> Result<(), CliError> {
    let client = args.connection.client();
    let Some(name) = &args.table else {
        let tables: Vec<TableView> = client.get("/v1/tables")?;
        return args.output.print(&tables, || list(&tables));
    };
    let dump: Dump = client.get(&format!("/v1/tables/{}", percent_encode(name)))?;
    args.output.print(&dump.rows, || rows(&dump, args.output.wide()))
}

fn list(tables: &[TableView]) -> String {
    let mut table = Table::new(&["TABLE", "ROWS", "WHAT"]);
    for view in tables {
        table.row(vec![view.name.clone(), view.rows.to_string(), view.about.clone()]);
    }
    table.render("no tables")
}

fn rows(dump: &Dump, wide: bool) -> String {
    let headings: Vec<String> = dump
        .rows
        .first()
        .map(|row| row.columns.iter().map(|(name, _)| name.to_uppercase().replace('_', "-")).collect())
        .unwrap_or_default();
    let mut table = Table::new(&headings.iter().map(String::as_str).collect::<Vec<_>>());
    for row in &dump.rows {
        table.row(row.columns.iter().map(|(_, value)| cell(value, wide)).collect());
    }
    table.render(&format!("{} is empty", dump.table))
}

fn cell(value: &Value, wide: bool) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        Value::Array(items) => lines(&items.iter().map(|item| cell(item, wide)).collect::<Vec<_>>(), wide),
        other => other.to_string(),
    }
}
