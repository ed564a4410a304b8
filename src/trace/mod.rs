//! `kinesin trace`: what the maps and the kernel answer, for `kinesin_core::trace` to decide on.
//!
//! One [`Live`] answers for an agent (its own maps) and for the command line while no agent runs (the pinned ones).
//! Deliberately absent: decisions, and writing anything.

mod live;

use kinesin_core::trace::{Question, QuestionError, Trace, place, trace};

pub use live::{Live, Names};

use crate::datapath::TableError;
use crate::net::NetError;

/// Why there is no trace.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// The question makes no sense; says which argument and what to write.
    #[error("{0}")]
    Question(String),
    /// A map could not be read.
    #[error(transparent)]
    Table(#[from] TableError),
    /// The kernel's network stack did not answer.
    #[error(transparent)]
    Net(#[from] NetError),
}

impl From<QuestionError> for TraceError {
    fn from(error: QuestionError) -> Self {
        Self::Question(error.to_string())
    }
}

/// Answers a question. Blocks on bpf(2) and netlink: not for threads of the runtime.
///
/// # Errors
/// The question makes no sense, or something could not be read.
pub fn answer(live: &Live, question: &Question) -> Result<Trace, TraceError> {
    let written = question.parse()?;
    let (packet, place) = place(live, &written)?.map_err(|misplaced| TraceError::Question(misplaced.0))?;
    trace(live, &packet, place)
}
