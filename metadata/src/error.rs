//! What the version manager answers when it does not do what it was asked.

use crate::records::RecordError;
use crate::store::StoreError;

/// See the module. Every message names the object and says what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The object is not there.
    #[error("there is no {object}{}", advised(.advice))]
    NotFound {
        /// What was looked for.
        object: String,
        /// What to do; may be empty.
        advice: &'static str,
    },
    /// The name is taken.
    #[error("{object} exists already; {advice}")]
    AlreadyExists {
        /// What is there.
        object: String,
        /// What to do.
        advice: &'static str,
    },
    /// The request makes no sense, whatever is stored.
    #[error("{0}")]
    Invalid(String),
    /// The object is not in a state that allows it.
    #[error("{object} {problem}")]
    Precondition {
        /// Which object.
        object: String,
        /// What is wrong with it, and what to do.
        problem: String,
    },
    /// Others changed the same records first, again and again.
    #[error("{object} is being changed by others at the same time; try again")]
    Contended {
        /// Which object.
        object: String,
    },
    /// What was waited for has not happened.
    #[error("{object} is still pending after {waited_ms} ms; wait again or ask its writer")]
    Timeout {
        /// Which object.
        object: String,
        /// How long was waited.
        waited_ms: u64,
    },
    /// The store said no.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A record is not what it should be.
    #[error(transparent)]
    Record(#[from] RecordError),
}

fn advised(advice: &str) -> String {
    if advice.is_empty() { String::new() } else { format!("; {advice}") }
}

impl Error {
    pub(crate) fn not_found(object: impl Into<String>, advice: &'static str) -> Self {
        Self::NotFound { object: object.into(), advice }
    }

    pub(crate) fn precondition(object: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Precondition { object: object.into(), problem: problem.into() }
    }

    pub(crate) fn invalid(detail: impl ToString) -> Self {
        Self::Invalid(detail.to_string())
    }

    /// Whether another change came first: reading and trying again helps.
    pub(crate) const fn is_lost_race(&self) -> bool {
        matches!(self, Self::Store(StoreError::Conflict { .. }))
    }
}
