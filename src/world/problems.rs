//! What is wrong at the moment, for status, a metric and one log line per change.

use metrics::gauge;

use crate::table::Table;

/// Problems by area. Clones refer to the same list.
#[derive(Clone, Default)]
pub struct Problems(Table<&'static str, Vec<String>>);

/// More than this many texts per area help nobody; the count goes on in the log.
const PER_AREA: usize = 32;

impl Problems {
    /// Replaces an area's problems; logs those that are new and notes when there are none left.
    pub fn set(&self, area: &'static str, texts: Vec<String>) {
        let before = self.of(area);
        for text in texts.iter().filter(|text| !before.contains(text)).take(PER_AREA) {
            tracing::warn!(area, problem = text, "problem");
        }
        if texts.is_empty() && !before.is_empty() {
            tracing::info!(area, "problems gone");
        }
        self.store(area, texts.into_iter().take(PER_AREA).collect());
    }

    /// Forgets an area's problems.
    pub fn clear(&self, area: &'static str) {
        self.set(area, Vec::new());
    }

    /// All problems, sorted by area.
    pub fn all(&self) -> Vec<(&'static str, Vec<String>)> {
        self.0.rows().into_iter().map(|(area, texts)| (area, texts.to_vec())).collect()
    }

    /// An area's problems.
    pub fn of(&self, area: &'static str) -> Vec<String> {
        self.0.get(&area).map(|texts| texts.to_vec()).unwrap_or_default()
    }

    fn store(&self, area: &'static str, texts: Vec<String>) {
        gauge!("kinesin_problems", "area" => area).set(texts.len() as f64);
        if texts.is_empty() {
            self.0.remove(&area);
        } else {
            self.0.put(area, texts);
        }
    }
}
