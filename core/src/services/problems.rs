//! A bounded list of what is wrong with an object.

/// More than this helps nobody, and a slice may have a thousand endpoints with the same fault.
const SHOWN: usize = 16;

/// Collects texts, each once, and counts those beyond [`SHOWN`].
#[derive(Default)]
pub(super) struct Problems {
    texts: Vec<String>,
    more: usize,
}

impl Problems {
    /// Notes one problem: which field, what is wrong, how to fix it.
    pub(super) fn note(&mut self, problem: String) {
        if self.texts.contains(&problem) {
            return;
        }
        if self.texts.len() < SHOWN {
            self.texts.push(problem);
        } else {
            self.more += 1;
        }
    }

    /// All of them, the last one saying how many were left out.
    pub(super) fn finish(mut self) -> Vec<String> {
        if self.more > 0 {
            self.texts.push(format!("and {} more problems like these", self.more));
        }
        self.texts
    }
}
