//! The goals, and how far this run is from them: one table at the end, whatever sections ran.
//!
//! Deliberately absent: failing. A busy machine misses goals of time, and says so by its load average.

use std::sync::Mutex;

use crate::report::heading;

/// A figure beside its goal.
struct Row {
    what: String,
    goal: &'static str,
    ours: String,
    verdict: Verdict,
    /// The same of others: who, and their figure.
    others: Vec<(String, String)>,
}

/// What a figure says of its goal.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    Holds,
    /// Below it, but not by more than chance: the goal is in the interval of the figure.
    Within,
    Missed,
    /// There is no goal.
    Stated,
}

impl From<Option<bool>> for Verdict {
    fn from(holds: Option<bool>) -> Self {
        match holds {
            Some(true) => Self::Holds,
            Some(false) => Self::Missed,
            None => Self::Stated,
        }
    }
}

static ROWS: Mutex<Vec<Row>> = Mutex::new(Vec::new());

fn rows() -> std::sync::MutexGuard<'static, Vec<Row>> {
    ROWS.lock().expect("nobody panics with the rows in hand")
}

/// Enters our figure.
pub(crate) fn ours(what: &str, goal: &'static str, ours: String, verdict: impl Into<Verdict>) {
    rows().push(Row { what: what.into(), goal, ours, verdict: verdict.into(), others: Vec::new() });
}

/// Enters somebody else's figure beside ours; none where we have none.
pub(crate) fn other(what: &str, who: &str, figure: String) {
    if let Some(row) = rows().iter_mut().find(|row| row.what == what) {
        row.others.push((who.into(), figure));
    }
}

/// Prints the table, if there is anything in it.
pub(crate) fn print() {
    let rows = rows();
    if rows.is_empty() {
        return;
    }
    heading("The goals");
    for row in &*rows {
        let verdict = match row.verdict {
            Verdict::Holds => "holds",
            Verdict::Within => "within",
            Verdict::Missed => "MISSED",
            Verdict::Stated => "stated",
        };
        let others: Vec<_> = row.others.iter().map(|(who, figure)| format!("{who} {figure}")).collect();
        println!("{:<70} {:<12} {:<24} {verdict:<7} {}", row.what, row.goal, row.ours, others.join("; "));
    }
}
