//! How often a component is asked; pure.

use std::time::Duration;

use crate::settle::RISE;

/// After the first failure a component is asked again so soon: one lost answer is no outage.
pub const SECOND_LOOK: Duration = Duration::from_millis(250);
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
    /// Answers that are still needed until it counts as well.
    owes: u32,
}

impl Course {
    /// From one question to the next.
    pub fn pause(&mut self, fails: bool, every: Duration) -> Duration {
        let failed_before = std::mem::replace(&mut self.fails, fails);
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
            let pauses = course.chars().map(|it| state.pause(it == 'x', every));
            assert_eq!(pauses.collect::<Vec<_>>(), expected, "{course}");
        }
    }
}
