//! How answers are shown: tables for people, JSON and YAML for programs.

use std::io::{self, IsTerminal, Write};

use clap::ValueEnum;
use comfy_table::{Attribute, Cell, Color, ContentArrangement, Table as Grid, presets};
use jiff::Timestamp;
use serde::Serialize;

use super::CliError;

/// `-o`
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Format {
    /// A table with more columns and everything spelled out.
    Wide,
    /// JSON.
    Json,
    /// YAML.
    Yaml,
}

/// The option `-o`.
#[derive(clap::Args, Clone, Copy, Debug)]
pub(super) struct Output {
    /// How to show it [default: a table]
    #[arg(short = 'o', long = "output", value_name = "FORMAT")]
    pub(super) format: Option<Format>,
}

impl Output {
    /// Whether people want to see everything.
    pub(super) fn wide(self) -> bool {
        self.format == Some(Format::Wide)
    }

    /// Prints `value` for programs, or what `table` makes for people.
    pub(super) fn print<T: Serialize>(self, value: &T, table: impl FnOnce() -> String) -> Result<(), CliError> {
        let text = match self.format {
            Some(Format::Json) => serde_json::to_string_pretty(value).map_err(|e| e.to_string()),
            Some(Format::Yaml) => serde_saphyr::to_string(value).map_err(|e| e.to_string()),
            Some(Format::Wide) | None => Ok(table()),
        };
        print(&text.map_err(|error| CliError::Answered(format!("cannot show the answer: {error}")))?)
    }
}

/// Writes to standard output, ending in a newline. Whoever reads may stop reading (`| head`).
pub(super) fn print(text: &str) -> Result<(), CliError> {
    let end = if text.is_empty() || text.ends_with('\n') { "" } else { "\n" };
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.write_all(end.as_bytes())).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(CliError::Answered(format!("cannot write: {error}")))
        }
        _ => Ok(()),
    }
}

/// Whether colours help: a terminal whose user does not object (`NO_COLOR`).
pub(super) fn colours() -> bool {
    io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// A table without lines: columns in a fixed order, `-` where there is nothing.
pub(super) struct Table {
    grid: Grid,
    rows: usize,
}

impl Table {
    /// A table with these headings.
    pub(super) fn new(headings: &[&str]) -> Self {
        let mut grid = Grid::new();
        grid.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
        if colours() {
            grid.enforce_styling();
        } else {
            grid.force_no_tty();
        }
        grid.set_header(headings.iter().map(|heading| Cell::new(heading).add_attribute(Attribute::Bold)));
        for column in grid.column_iter_mut() {
            column.set_padding((0, 3));
        }
        Self { grid, rows: 0 }
    }

    /// Adds a row.
    pub(super) fn row(&mut self, cells: Vec<String>) {
        self.rows += 1;
        self.grid.add_row(cells.into_iter().map(|text| match text.as_str() {
            "" => Cell::new("-"),
            _ => {
                let colour = colour_of(&text);
                let cell = Cell::new_owned(text);
                colour.map(|colour| cell.clone().fg(colour)).unwrap_or(cell)
            }
        }));
    }

    /// The table, or `nothing` when it has no rows.
    pub(super) fn render(&self, nothing: &str) -> String {
        if self.rows == 0 { nothing.to_string() } else { self.grid.trim_fmt() }
    }
}

/// States that mean the same everywhere have the same colour everywhere.
fn colour_of(text: &str) -> Option<Color> {
    match text {
        "programmed" | "announced" | "running" | "alive" | "ok" | "complete" | "active" => Some(Color::Green),
        "pending" | "<pending>" | "restarting" | "standby" | "suspect" | "waiting" => Some(Color::Yellow),
        "conflict" | "stopped" | "gone" => Some(Color::Red),
        text if text.starts_with("error") => Some(Color::Red),
        _ => None,
    }
}

/// `3d4h`, `12m`, `40s`: the two largest units, the second one only while the first is small.
pub(super) fn age(seconds: u64) -> String {
    const UNITS: [(u64, &str); 4] = [(86_400, "d"), (3_600, "h"), (60, "m"), (1, "s")];
    let Some(first) = UNITS.iter().position(|(size, _)| seconds >= *size) else { return "0s".into() };
    let (size, unit) = UNITS[first];
    let whole = seconds / size;
    match UNITS.get(first + 1) {
        Some((next, name)) if whole < 10 && (seconds % size) / next > 0 => {
            format!("{whole}{unit}{}{name}", (seconds % size) / next)
        }
        _ => format!("{whole}{unit}"),
    }
}

/// How long ago `then` was; clocks that differ make no negative ages.
pub(super) fn ago(then: Timestamp) -> String {
    age(u64::try_from(Timestamp::now().as_second() - then.as_second()).unwrap_or(0))
}

/// The first of `items`, one a line; all of them when `all`.
pub(super) fn lines(items: &[String], all: bool) -> String {
    /// What fits comfortably into a row.
    const SHOWN: usize = 4;
    if all || items.len() <= SHOWN {
        return items.join("\n");
    }
    format!("{}\n… and {} more", items[..SHOWN - 1].join("\n"), items.len() - (SHOWN - 1))
}
