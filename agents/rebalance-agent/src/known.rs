//! What is known, and what is not: a state of its own, with its reason.

use std::fmt;

use serde::Serialize;

/// What was found out, or why it was not.
pub type Known<T> = Result<T, Unknown>;

/// Why something is not known: a sentence without full stop, for an operator.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Unknown(pub String);

impl Unknown {
    /// Not known for this reason.
    pub fn because(reason: impl fmt::Display) -> Self {
        Self(reason.to_string())
    }
}

impl fmt::Display for Unknown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
