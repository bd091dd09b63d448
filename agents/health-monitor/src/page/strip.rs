//! The last hour of a group or the cluster, as a strip: the worse, the higher.

use std::collections::BTreeMap;
use std::time::Duration;

use chrono::{DateTime, Utc};

use crate::check::Status;
use crate::monitor::PAST;

/// A moment of the past stands for so long at most: what comes after it was not seen.
const MOMENT_MAX: Duration = Duration::from_mins(1);

/// A strip.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Strip {
    pub(super) runs: Vec<Run>,
    /// The same for those who do not see it.
    pub(super) words: String,
}

/// A time in which the status was the same.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) status: &'static str,
    /// Seconds from the left end, an hour ago.
    pub(super) from: u64,
    pub(super) seconds: u64,
    /// Of 100, from above.
    pub(super) top: u32,
}

/// Draws the statuses, the oldest first, each with when it was seen.
pub(super) fn strip(
    past: impl Iterator<Item = (DateTime<Utc>, Option<Status>)>,
    now: DateTime<Utc>,
) -> Strip {
    let begin = now - PAST;
    let second = |at: DateTime<Utc>| (at - begin).to_std().map_or(0, |it| it.as_secs());
    let end = PAST.as_secs();
    let mut runs: Vec<Run> = Vec::new();
    let mut totals = BTreeMap::<Status, u64>::new();
    let mut past = past.peekable();
    while let Some((at, status)) = past.next() {
        let from = second(at).min(end);
        let until = past.peek().map_or(end, |(next, _)| second(*next).min(end));
        let seconds = until.saturating_sub(from).min(MOMENT_MAX.as_secs());
        let Some(status) = status.filter(|_| seconds > 0) else { continue };
        *totals.entry(status).or_default() += seconds;
        match runs.last_mut() {
            Some(last) if last.status == status.name() && last.from + last.seconds == from => {
                last.seconds += seconds;
            }
            _ => runs.push(Run { status: status.name(), from, seconds, top: top(status) }),
        }
    }
    let told = totals.iter().rev().map(|(status, seconds)| {
        let minutes = seconds.div_ceil(60);
        format!("{status} {minutes} min")
    });
    let told: Vec<_> = told.collect();
    let words = if told.is_empty() { "nothing known".to_owned() } else { told.join(", ") };
    Strip { runs, words: format!("the last hour: {words}") }
}

fn top(status: Status) -> u32 {
    match status {
        Status::Ok => 75,
        Status::Warning => 45,
        Status::Unknown => 20,
        Status::Critical => 0,
    }
}

#[cfg(test)]
mod tests {
    use chrono::TimeDelta;

    use super::*;

    #[test]
    fn equal_moments_are_one_run_and_gaps_stay_empty() {
        let now = DateTime::from_timestamp(1_000_000, 0).unwrap();
        let ago = |seconds| now - TimeDelta::seconds(seconds);
        let (ok, critical) = (Some(Status::Ok), Some(Status::Critical));
        let drawn = |past: &[(i64, Option<Status>)]| {
            let strip = strip(past.iter().map(|(it, status)| (ago(*it), *status)), now);
            let runs = strip.runs.iter().map(|it| (it.status, it.from, it.seconds));
            (runs.collect::<Vec<_>>(), strip.words)
        };
        for (case, past, runs, words) in [
            ("nothing", vec![], vec![], "nothing known"),
            ("one moment", vec![(10, ok)], vec![("ok", 3590, 10)], "ok 1 min"),
            (
                "a fault",
                vec![(120, ok), (90, ok), (60, critical), (30, ok)],
                vec![("ok", 3480, 60), ("critical", 3540, 30), ("ok", 3570, 30)],
                "critical 1 min, ok 2 min",
            ),
            (
                "the monitor was away",
                vec![(3600, ok), (600, critical)],
                vec![("ok", 0, 60), ("critical", 3000, 60)],
                "critical 1 min, ok 1 min",
            ),
            (
                "a group that was not there",
                vec![(60, None), (30, ok)],
                vec![("ok", 3570, 30)],
                "ok 1 min",
            ),
            ("older than an hour", vec![(3700, ok), (3590, ok)], vec![("ok", 0, 70)], "ok 2 min"),
        ] {
            assert_eq!(drawn(&past), (runs, format!("the last hour: {words}")), "{case}");
        }
    }
}
