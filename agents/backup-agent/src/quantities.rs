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

/// `42 s`, `25 min`, `31 h` or `12 d`: how long ago, shortly.
pub fn age(age: TimeDelta) -> String {
    match (age.num_seconds(), age.num_minutes(), age.num_hours(), age.num_days()) {
        (seconds @ ..120, ..) => format!("{} s", seconds.max(0)),
        (_, minutes, ..2, _) => format!("{minutes} min"),
        (_, _, hours, ..3) => format!("{hours} h"),
        (.., days) => format!("{days} d"),
    }
}

/// `2026-03-01T14:30:00Z`.
pub fn time(at: DateTime<Utc>) -> String {
    at.to_rfc3339_opts(SecondsFormat::Secs, true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_age_is_as_short_as_it_may_be() {
        for (seconds, expected) in [
            (-5, "0 s"),
            (0, "0 s"),
            (119, "119 s"),
            (120, "2 min"),
            (119 * 60, "119 min"),
            (120 * 60, "2 h"),
            (71 * 3600, "71 h"),
            (72 * 3600, "3 d"),
        ] {
            assert_eq!(age(TimeDelta::seconds(seconds)), expected);
        }
    }
}
