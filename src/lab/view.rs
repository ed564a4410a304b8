//! What a person sees of a running lab: one table that is redrawn in place, or plain lines where there is no terminal.

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use comfy_table::presets::UTF8_BORDERS_ONLY;
use comfy_table::{Cell, Color, ContentArrangement, Table};
use kinesin_core::devices::mac_text;

use super::report::Totals;

/// Longest list of past events on the screen.
const EVENTS_SHOWN: usize = 10;

/// What one picture shows.
#[derive(Debug, Clone, Default)]
pub(super) struct Picture {
    pub(super) up: Duration,
    pub(super) vips: Vec<Vip>,
    /// Pods with their node, in order, and whether the node has power.
    pub(super) pods: Vec<(String, String, bool)>,
    pub(super) totals: Totals,
}

/// An address as an agent reports it, and what the LAN says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Vip {
    pub(super) address: String,
    pub(super) services: String,
    pub(super) owner: String,
    pub(super) owner_mac: Option<[u8; 6]>,
    pub(super) lan_mac: Option<[u8; 6]>,
}

/// The screen, or whatever standard output is.
#[derive(Debug)]
pub(super) struct Screen {
    terminal: bool,
    drawn_lines: usize,
    events: VecDeque<String>,
}

impl Screen {
    pub(super) fn new() -> Self {
        Self { terminal: io::stdout().is_terminal(), drawn_lines: 0, events: VecDeque::new() }
    }

    pub(super) fn is_terminal(&self) -> bool {
        self.terminal
    }

    /// Something happened; it stays visible below the table, or is a line of its own.
    pub(super) fn event(&mut self, up: Duration, text: &str) {
        let line = format!("{:>6.1}s  {text}", up.as_secs_f32());
        if self.terminal {
            self.events.push_back(line);
            while self.events.len() > EVENTS_SHOWN {
                self.events.pop_front();
            }
        } else {
            write_out(&format!("{line}\n"));
        }
    }

    /// Text that stays, above everything that is redrawn.
    pub(super) fn print(&mut self, text: &str) {
        self.clear();
        write_out(text);
    }

    /// Draws the picture over the last one. Without a terminal nothing is drawn: see [`Self::print`].
    pub(super) fn draw(&mut self, picture: &Picture) {
        if !self.terminal {
            return;
        }
        let (columns, rows) = terminal_size();
        let mut lines: Vec<String> = picture.to_text(true).lines().map(str::to_string).collect();
        lines.push(String::new());
        // The tables matter more than what happened long ago.
        let room = rows.saturating_sub(lines.len() + 1);
        lines.extend(self.events.iter().skip(self.events.len().saturating_sub(room)).cloned());
        // A line that wraps or a picture that scrolls could not be drawn over.
        for line in lines.iter_mut().filter(|line| !line.contains('\x1b')) {
            if let Some((end, _)) = line.char_indices().nth(columns) {
                line.truncate(end);
            }
        }
        lines.truncate(rows.saturating_sub(1));
        self.clear();
        self.drawn_lines = lines.len();
        write_out(&format!("{}\n", lines.join("\n")));
    }

    /// Takes the last picture off the screen.
    pub(super) fn clear(&mut self) {
        if self.terminal && self.drawn_lines > 0 {
            // Up to its first line, and everything from there on away.
            write_out(&format!("\x1b[{}A\r\x1b[J", self.drawn_lines));
        }
        self.drawn_lines = 0;
    }
}

/// Columns and rows of the terminal at standard output; what is common when it does not say.
fn terminal_size() -> (usize, usize) {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCGWINSZ writes one winsize, which outlives the call.
    let result = unsafe { libc::ioctl(libc::STDOUT_FILENO, libc::TIOCGWINSZ, &raw mut size) };
    if result != 0 || size.ws_col == 0 || size.ws_row == 0 {
        return (100, 50);
    }
    (size.ws_col.into(), size.ws_row.into())
}

/// A closed pipe is no reason to leave namespaces behind.
fn write_out(text: &str) {
    let mut out = io::stdout().lock();
    let _ = out.write_all(text.as_bytes());
    let _ = out.flush();
}

impl Picture {
    /// The tables as text.
    pub(super) fn to_text(&self, colours: bool) -> String {
        let mut addresses = table(&["ADDRESS", "SERVICE", "OWNER", "MAC ON THE LAN", "WHOSE"]);
        for vip in &self.vips {
            let (mac, whose, colour) = match vip.lan_mac {
                None => ("not asked yet".to_string(), "", Color::Yellow),
                Some(mac) if vip.owner_mac == Some(mac) => (mac_text(mac), "the owner's", Color::Green),
                Some(mac) => (mac_text(mac), "NOT the owner's", Color::Red),
            };
            let paint = |cell: Cell| if colours { cell.fg(colour) } else { cell };
            let owner = if vip.owner.is_empty() { "nobody" } else { &vip.owner };
            addresses.add_row([
                Cell::new(&vip.address),
                Cell::new(&vip.services),
                Cell::new(owner),
                paint(Cell::new(mac)),
                paint(Cell::new(whose)),
            ]);
        }
        if self.vips.is_empty() {
            addresses.add_row(["no address yet", "", "", "", ""]);
        }
        let mut backends = table(&["BACKEND", "NODE", "REQUESTS", ""]);
        let most = self.totals.backends.values().copied().max().unwrap_or(0).max(1);
        for (pod, node, alive) in &self.pods {
            let requests = self.totals.backends.get(pod).copied().unwrap_or(0);
            let bar = "█".repeat(usize::try_from(requests * 24 / most).unwrap_or(0));
            let cells = [Cell::new(pod), Cell::new(node), Cell::new(requests), Cell::new(bar)];
            backends.add_row(cells.map(|cell| if colours && !alive { cell.fg(Color::DarkGrey) } else { cell }));
        }
        let up = self.up.as_secs();
        format!(
            "Kinesin lab · LAN 10.0.0.0/24 · client 10.0.0.50 · up {}:{:02}\n{addresses}\n{backends}\n{}\n",
            up / 60,
            up % 60,
            traffic(&self.totals)
        )
    }
}

/// The client's books in a line or two.
pub(super) fn traffic(totals: &Totals) -> String {
    let mut text = format!(
        "client: {} requests, {} answered, {} failed · longest gap {} ms",
        totals.attempted, totals.succeeded, totals.failed, totals.longest_gap_ms
    );
    if totals.held.wanted > 0 {
        text.push_str(&format!(
            "\n        {} long-lived connections, {} broken, {} echoes",
            totals.held.open, totals.held.broken, totals.held.echoes
        ));
    }
    if !totals.failures.is_empty() {
        let reasons: BTreeMap<String, u64> = totals.failures.iter().map(|(r, n)| (r.to_string(), *n)).collect();
        let reasons: Vec<String> = reasons.iter().map(|(reason, count)| format!("{reason} {count}")).collect();
        text.push_str(&format!("\n        failures: {}", reasons.join(", ")));
    }
    text
}

fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_BORDERS_ONLY).set_content_arrangement(ContentArrangement::Disabled).set_header(header);
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picture(lan_mac: Option<[u8; 6]>) -> Picture {
        let vip = Vip {
            address: "10.0.0.100".into(),
            services: "default/web".into(),
            owner: "node-2".into(),
            owner_mac: Some([2; 6]),
            lan_mac,
        };
        let totals = Totals { backends: BTreeMap::from([("pod-1-1".into(), 7)]), ..Totals::default() };
        let pods = vec![("pod-1-1".into(), "node-1".into(), true), ("pod-2-1".into(), "node-2".into(), false)];
        Picture { up: Duration::from_secs(61), vips: vec![vip], pods, totals }
    }

    #[test]
    fn the_table_says_whose_mac_the_lan_sees() {
        let with = |mac| picture(mac).to_text(false);
        assert!(with(Some([2; 6])).contains("02:02:02:02:02:02   the owner's"), "{}", with(Some([2; 6])));
        assert!(with(Some([3; 6])).contains("NOT the owner's"));
        assert!(with(None).contains("not asked yet"));
    }

    #[test]
    fn every_backend_has_a_row_with_its_requests_also_when_it_has_none() {
        let text = picture(None).to_text(false);
        let row = |pod: &str| text.lines().find(|line| line.contains(pod)).expect(pod).to_string();
        assert!(row("pod-1-1").contains(" 7 ") && row("pod-1-1").contains('█'), "{text}");
        assert!(row("pod-2-1").contains(" 0 ") && !row("pod-2-1").contains('█'), "{text}");
        assert!(text.contains("up 1:01"));
    }

    #[test]
    fn without_colours_there_is_no_escape_sequence() {
        assert!(!picture(Some([3; 6])).to_text(false).contains('\x1b'));
    }
}
