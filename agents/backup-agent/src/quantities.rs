//! Quantities for people.

use std::time::Duration;

use chrono::{DateTime, SecondsFormat, TimeDelta, Utc};
use indicatif::{HumanBytes, HumanDuration};

/// `1.2 GiB`.
pub fn bytes(count: u64) -> String {
    HumanBytes(count).to_string()
}

/// `3 minutes`.
pub fn span(span: TimeDelta) -> String {
    let span = span.to_std().unwrap_or(Duration::ZERO);
    if span < Duration::from_secs(1) {
        return format!("{} ms", span.as_millis());
    }
    HumanDuration(span).to_string()
}

/// `2026-03-01T14:30:00Z`.
pub fn time(at: DateTime<Utc>) -> String {
    at.to_rfc3339_opts(SecondsFormat::Secs, true)
}
