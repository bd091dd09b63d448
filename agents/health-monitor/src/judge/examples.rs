//! What the tests of the judges have in common.

use std::collections::BTreeMap;
use std::sync::LazyLock;
use std::time::Duration;

use crate::facts::{Answer, Failure, Seen, Stage};
use crate::probe::postgres::PostgresFacts;
use crate::thresholds::{Scale, Thresholds};
use crate::verdict::Checks;

/// An answer at second 1.
pub(super) fn answered<T>(facts: T) -> Seen<T> {
    answered_at(facts, 1)
}

/// An answer at that second.
pub(super) fn answered_at<T>(facts: T, second: u64) -> Seen<T> {
    let at = Duration::from_secs(second);
    let answer = Answer { asked_at: at, answered_at: at, facts };
    Seen { at, failure: None, failing_since: None, answer: Some(answer), lost_at: None }
}

/// No answer, and never one before.
pub(super) fn failed<T>(stage: Stage, error: &str) -> Seen<T> {
    let at = Duration::from_secs(1);
    let failure = Failure { stage, error: error.to_owned() };
    Seen { at, failure: Some(failure), failing_since: Some(at), answer: None, lost_at: None }
}

/// The catalogue's limits, and nothing before.
pub(super) fn scale() -> Scale<'static> {
    static THRESHOLDS: LazyLock<Thresholds> = LazyLock::new(Thresholds::default);
    static BEFORE: Checks = BTreeMap::new();
    Scale { thresholds: &THRESHOLDS, before: &BEFORE }
}

/// What a server says of its role, and nothing else.
pub(super) fn server(in_recovery: bool) -> PostgresFacts {
    PostgresFacts { in_recovery, ..PostgresFacts::default() }
}
