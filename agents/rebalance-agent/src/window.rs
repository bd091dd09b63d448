//! When something may be moved: from a time of a schedule on, for some hours. Pure.

use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::Deserialize;
use shared::config::Problems;
use shared::schedule::Schedule;

/// A shorter window would be over before Citus has begun: its queue is looked at every 5 s.
const LENGTH_MIN: Duration = Duration::from_mins(1);
const LENGTH_MAX: Duration = Duration::from_hours(7 * 24);

/// So often it may open again before it closes.
const OPENINGS_MAX: u32 = 1000;

/// The table `[window]`.
///
/// ```toml
/// [window]
/// schedule = { cron = "0 1 * * *", time_zone = "Europe/Berlin" }
/// length = "4h"
/// ```
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Window {
    /// When it opens.
    pub schedule: Schedule,
    /// For how long. Hours that pass, not hours of the clock: they are as many on the days on
    /// which the clock changes.
    #[serde(with = "humantime_serde")]
    pub length: Duration,
}

/// Whether a window is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opening {
    /// It is, and closes then.
    Open {
        /// When: that moment is outside.
        until: DateTime<Utc>,
    },
    /// It is not, and opens then; `None` if never again.
    Closed {
        /// When.
        next: Option<DateTime<Utc>>,
    },
}

impl Window {
    /// Whether it is open at `now`. Where one opening begins before the last has ended, the later
    /// end counts.
    pub fn at(&self, now: DateTime<Utc>) -> Opening {
        let mut opened = None;
        let mut next = self.schedule.next_after(now - self.length);
        while let Some(start) = next.filter(|it| *it <= now) {
            opened = Some(start);
            next = self.schedule.next_after(start);
        }
        opened.map_or(Opening::Closed { next }, |it| Opening::Open { until: it + self.length })
    }

    /// Since when it is open at `now`; `now` if it is not.
    pub fn opened_at(&self, now: DateTime<Utc>) -> DateTime<Utc> {
        match self.at(now) {
            Opening::Open { until } => until - self.length,
            Opening::Closed { .. } => now,
        }
    }

    pub(crate) fn check(&self, problems: &mut Problems) {
        if !(LENGTH_MIN..=LENGTH_MAX).contains(&self.length) {
            problems.add("length", "must be 1m to 7days");
            return;
        }
        // Each time that it is asked whether it is open, all of them are counted.
        let (mut openings, start) = (0, DateTime::UNIX_EPOCH);
        let mut next = self.schedule.next_after(start);
        let Some(end) = next.map(|it| it + self.length) else { return };
        while let Some(opening) = next.filter(|it| *it < end && openings <= OPENINGS_MAX) {
            openings += 1;
            next = self.schedule.next_after(opening);
        }
        if OPENINGS_MAX < openings {
            problems.add(
                "schedule",
                format!(
                    "opens more than {OPENINGS_MAX} times before it closes once: let it open less often, or \
                     for less long"
                ),
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn time(text: &str) -> DateTime<Utc> {
        text.parse().unwrap()
    }

    #[test]
    fn a_window_opens_by_its_schedule_and_closes_after_its_length() {
        for (schedule, length, now, expected) in [
            ("\"0 1 * * *\"", "4h", "2026-03-10T00:59:59Z", Err("2026-03-10T01:00:00Z")),
            ("\"0 1 * * *\"", "4h", "2026-03-10T01:00:00Z", Ok("2026-03-10T05:00:00Z")),
            ("\"0 1 * * *\"", "4h", "2026-03-10T04:59:59Z", Ok("2026-03-10T05:00:00Z")),
            ("\"0 1 * * *\"", "4h", "2026-03-10T05:00:00Z", Err("2026-03-11T01:00:00Z")),
            // Over midnight, and over the week.
            ("\"0 22 * * 6\"", "8h", "2026-03-08T05:00:00Z", Ok("2026-03-08T06:00:00Z")),
            ("\"0 22 * * 6\"", "8h", "2026-03-08T06:00:00Z", Err("2026-03-14T22:00:00Z")),
            // Openings that overlap.
            ("\"0 * * * *\"", "90m", "2026-03-10T03:10:00Z", Ok("2026-03-10T04:30:00Z")),
            // 02:30 in Berlin: 01:30 in winter, 00:30 in summer; that of the day the clock skips
            // it, 2026-03-29, at 03:00, which is 01:00.
            (
                "{ cron = \"30 2 * * *\", time_zone = \"Europe/Berlin\" }",
                "1h",
                "2026-03-28T01:30:00Z",
                Ok("2026-03-28T02:30:00Z"),
            ),
            (
                "{ cron = \"30 2 * * *\", time_zone = \"Europe/Berlin\" }",
                "1h",
                "2026-03-29T00:30:00Z",
                Err("2026-03-29T01:00:00Z"),
            ),
            (
                "{ cron = \"30 2 * * *\", time_zone = \"Europe/Berlin\" }",
                "1h",
                "2026-03-30T00:30:00Z",
                Ok("2026-03-30T01:30:00Z"),
            ),
        ] {
            let window: Window =
                toml::from_str(&format!("schedule = {schedule}\nlength = \"{length}\"\n")).unwrap();
            let expected = match expected {
                Ok(until) => Opening::Open { until: time(until) },
                Err(next) => Opening::Closed { next: Some(time(next)) },
            };
            assert_eq!(window.at(time(now)), expected, "{schedule} {length} at {now}");
        }
    }

    #[test]
    fn a_window_of_years_gone_by_never_opens() {
        let window: Window =
            toml::from_str("schedule = \"0 0 1 1 1 * 2020\"\nlength = \"1h\"\n").unwrap();
        assert_eq!(window.at(time("2026-03-10T00:00:00Z")), Opening::Closed { next: None });
    }
}
