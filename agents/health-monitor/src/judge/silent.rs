//! A component that does not answer.

use crate::check::{Check, Reading, Status};
use crate::facts::{Failure, Seen, Stage};

/// What nobody asked is not known.
pub(super) fn not_asked(check: &'static Check, error: &str) -> Reading {
    Reading::new(check, Status::Unknown, error)
        .with_next("this monitor does not get to it: see its log, and the load of its host")
}

/// The one reading of a component that does not answer; `None` if it does, or was never asked.
pub(super) fn no_answer<T>(check: &'static Check, seen: &Seen<T>) -> Option<Reading> {
    let Failure { stage, error } = seen.failure.as_ref()?;
    let reading = Reading::new(check, Status::Critical, error.as_str());
    Some(match stage {
        Stage::Timeout => reading.with_next(
            "it hangs, or the network to it does: see whether its host answers, then the process",
        ),
        Stage::Login => reading.with_next(
            "see the user and the password_file that are configured here for it; until then nothing else \
             is known of it",
        ),
        Stage::Tls => reading.with_next("see its certificate, and ca_file here"),
        Stage::NotAsked => not_asked(check, error),
        Stage::Dial | Stage::Refused | Stage::Full | Stage::NotNow | Stage::Answer => reading,
    })
}
