//! How often a component is asked; pure.

use std::time::Duration;

use crate::facts::Stage;
use crate::settle::RISE;

/// After the first failure a component is asked again so soon: one lost answer is no outage.
pub const SECOND_LOOK: Duration = Duration::from_millis(250);
/// A primary that let a question pass without an answer has so long for the next: it is asked at once, on a
/// new connection, and what counts after two failures must count within two seconds.
const SECOND_LIMIT: Duration = Duration::from_millis(300);
/// What is asked seldom is asked so often when it fails, until it is well again: a recovery too is only seen
/// where it is looked for.
const FAILED_EVERY: Duration = Duration::from_secs(5);

/// How often a component is asked, and how long it may take to answer.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// Between two questions.
    pub every: Duration,
    /// The most that an answer may take.
    pub limit: Duration,
    /// Before the first: not all at once.
    pub wait: Duration,
    /// It is asked more often while this group has lost its primary and has no other.
    pub searches: Option<u32>,
}

/// How the last questions went.
#[derive(Clone, Copy, Debug, Default)]
pub struct Course {
    fails: bool,
    /// The last question was the first that failed, and it was not answered in time.
    hangs: bool,
    /// Answers that are still needed until it counts as well.
    owes: u32,
}

impl Course {
    /// The most that the next answer may take.
    pub fn limit(&self, leads: bool, limit: Duration) -> Duration {
        if leads && self.hangs { SECOND_LIMIT.min(limit) } else { limit }
    }

    /// From one question to the next; `failed` says how far the one before it got, if there was no answer.
    pub fn pause(&mut self, failed: Option<Stage>, every: Duration) -> Duration {
        let fails = failed.is_some();
        let failed_before = std::mem::replace(&mut self.fails, fails);
        self.hangs = failed == Some(Stage::Timeout) && !failed_before;
        self.owes = if fails { RISE } else { self.owes.saturating_sub(1) };
        match (fails, failed_before) {
            (true, false) => SECOND_LOOK.min(every),
            _ if self.owes > 0 => FAILED_EVERY.min(every),
            _ => every,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_primary_that_hangs_is_soon_given_up() {
        let [limit, short] = [Duration::from_secs(1), SECOND_LIMIT];
        for (leads, course, expected) in [
            (true, "......", [limit; 6]),
            (true, ".hhh.h", [limit, short, limit, limit, limit, short]),
            (true, ".xhx.h", [limit, limit, limit, limit, limit, short]),
            (false, "hh.h..", [limit; 6]),
        ] {
            let mut state = Course::default();
            let limits = course.chars().map(|it| {
                let failed = match it {
                    'h' => Some(Stage::Timeout),
                    'x' => Some(Stage::Dial),
                    _ => None,
                };
                state.pause(failed, limit);
                state.limit(leads, limit)
            });
            assert_eq!(limits.collect::<Vec<_>>(), expected, "{course}");
        }
        let mut state = Course::default();
        state.pause(Some(Stage::Timeout), limit);
        assert_eq!(state.limit(true, short / 2), short / 2);
    }

    #[test]
    fn what_is_asked_seldom_is_asked_often_until_it_is_well_again() {
        let (seldom, often) = (Duration::from_mins(1), Duration::from_secs(1));
        let [soon, failed] = [SECOND_LOOK, FAILED_EVERY];
        for (every, course, expected) in [
            (seldom, "....", vec![seldom; 4]),
            (
                seldom,
                ".xxx....",
                vec![seldom, soon, failed, failed, failed, failed, seldom, seldom],
            ),
            (seldom, "x.x...", vec![soon, failed, soon, failed, failed, seldom]),
            (often, ".xx..", vec![often, soon, often, often, often]),
        ] {
            let mut state = Course::default();
            let failed = |it| (it == 'x').then_some(Stage::Dial);
            let pauses = course.chars().map(|it| state.pause(failed(it), every));
            assert_eq!(pauses.collect::<Vec<_>>(), expected, "{course}");
        }
    }
}
