//! When a reading counts: damping and flapping; pure.
//!
//! One answer that is late is no outage, and one that is in time is no recovery. A status counts after it
//! was seen a few times in a row; one that keeps changing is called flapping, once, until it is calm. What
//! flaps says what it is now, and is no better than a warning; who is told is told of it at its worst.

use std::collections::VecDeque;
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::Serialize;

use crate::check::{Reading, Status};
use crate::judge::words::duration;

/// So many readings in a row that are worse make it worse.
const FALL: u32 = 2;
/// So many in a row that are better make it better.
pub const RISE: u32 = 3;
/// So many changes, from getting worse to getting better or back, …
const FLAPPING_CHANGES: usize = 6;
/// … within so long are flapping, until there are fewer than half of them.
const FLAPPING_WINDOW: Duration = Duration::from_mins(10);
/// What to do about it while it is well.
const LOOK_BACK: &str = "see the last events for what comes and goes";

/// A moment, by the clock that nobody sets and by the one that people read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Now {
    /// By [`clock::now`](crate::clock::now).
    pub boot: Duration,
    /// By the wall clock.
    pub wall: DateTime<Utc>,
}

/// A check of one component, as it counts.
#[derive(Clone, Debug, Serialize)]
pub struct Settled {
    /// What counts.
    pub status: Status,
    /// Since when.
    pub since: DateTime<Utc>,
    /// It keeps changing; `status` is a warning while it is ok.
    pub is_flapping: bool,
    /// The newest reading that agrees with what counts, or that brought it about.
    pub reading: Reading,
    /// The worst since it flaps, otherwise what counts: so who is told is not told of each change.
    #[serde(skip)]
    pub worst: Status,
    /// The newest reading that counted and was not ok.
    #[serde(skip)]
    last_bad: Option<Reading>,
    /// When the newest reading was taken.
    #[serde(skip)]
    read_at: Duration,
    /// How often in a row what was read differed for the worse or for the better, and the reading that
    /// differed least.
    #[serde(skip)]
    streak: Option<(bool, u32, Reading)>,
    /// When what would count without flapping began to get worse (`true`) or better, the newest last.
    #[serde(skip)]
    changes: VecDeque<(Duration, bool)>,
    /// What would count without flapping.
    #[serde(skip)]
    damped: Status,
}

/// A change of what counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Change {
    /// What counted.
    pub from: Status,
    /// What counts.
    pub to: Status,
    /// It began to flap, or is calm again: the status may be the same.
    pub is_flapping: bool,
}

impl Settled {
    /// A check that is read for the first time: there is nothing to wait for.
    pub fn new(reading: Reading, read_at: Duration, now: Now) -> Self {
        Self {
            status: reading.status,
            since: now.wall,
            is_flapping: false,
            worst: reading.status,
            last_bad: (reading.status != Status::Ok).then(|| reading.clone()),
            damped: reading.status,
            reading,
            read_at,
            streak: None,
            changes: VecDeque::new(),
        }
    }

    /// Why, and what to do next.
    pub fn words(&self) -> (String, String) {
        (self.reading.reason.clone(), self.reading.next_step().to_owned())
    }

    /// The same for somebody who reads it later, of a check that may be told at its worst: nothing of how it
    /// is just now, if it is well.
    pub fn words_to_keep(&self) -> (String, String) {
        if self.is_flapping && self.damped == Status::Ok {
            (self.comes_and_goes(""), LOOK_BACK.to_owned())
        } else {
            self.words()
        }
    }

    /// Takes a reading; `read_at` says when it was taken, so that one that is shown again does not count
    /// twice. Returns what changed, if anything did.
    pub fn take(&mut self, reading: Reading, read_at: Duration, now: Now) -> Option<Change> {
        let mut counts = None;
        if self.read_at < read_at {
            self.read_at = read_at;
            counts = self.damp(&reading, now);
        }
        let change = self.settle(now);
        // A reading that does not count yet must not lend its words to the status that does.
        let newest = if reading.status == self.damped { Some(reading) } else { counts };
        if let Some(newest) = newest.filter(|it| it.status == self.damped) {
            if newest.status != Status::Ok {
                self.last_bad = Some(newest.clone());
            }
            self.reading = newest;
        }
        if self.is_flapping && self.damped == Status::Ok {
            self.reading = self.restless();
        }
        change
    }

    fn comes_and_goes(&self, now: &str) -> String {
        let (count, window) = (self.changes.len(), duration(FLAPPING_WINDOW));
        let last = self.last_bad.as_ref().map_or("", |it| &it.reason);
        format!("it comes and goes: {count} changes in {window}{now}; last: {last}")
    }

    /// What is said of a check that is ok for now.
    fn restless(&self) -> Reading {
        let Reading { check, measures, .. } = &self.reading;
        let measures = measures.clone();
        let follows = self.last_bad.as_ref().is_some_and(|it| it.follows);
        let next = format!("{LOOK_BACK}; it is well just now");
        let reason = self.comes_and_goes(", well just now");
        let reading = Reading::new(check, Status::Warning, reason).with_next(next);
        Reading { measures, follows, ..reading }
    }

    /// What has changed so far is not flapping: somebody has declared a maintenance.
    pub fn calm(&mut self) {
        self.changes.clear();
    }

    /// Returns the reading that counts from now on, if another does.
    fn damp(&mut self, reading: &Reading, now: Now) -> Option<Reading> {
        let streak = self.streak.take();
        if reading.status == self.damped {
            return None;
        }
        let is_worse = self.damped < reading.status;
        let (count, counts) = match streak {
            Some((direction, count, least)) if direction == is_worse => {
                let is_further = if is_worse {
                    least.status < reading.status
                } else {
                    reading.status < least.status
                };
                (count + 1, if is_further { least } else { reading.clone() })
            }
            _ => (1, reading.clone()),
        };
        if count < if is_worse { FALL } else { RISE } {
            self.streak = Some((is_worse, count, counts));
            return None;
        }
        self.damped = counts.status;
        // A restart has many steps down and up again: it is one change for the worse, and one for the better.
        if self.changes.back().is_none_or(|(_, was_worse)| *was_worse != is_worse) {
            self.changes.push_back((now.boot, is_worse));
        }
        if self.changes.len() > FLAPPING_CHANGES {
            self.changes.pop_front();
        }
        Some(counts)
    }

    fn settle(&mut self, now: Now) -> Option<Change> {
        while self.changes.front().is_some_and(|(at, _)| *at + FLAPPING_WINDOW < now.boot) {
            self.changes.pop_front();
        }
        let was_flapping = self.is_flapping;
        let calm_below = if was_flapping { FLAPPING_CHANGES / 2 + 1 } else { FLAPPING_CHANGES };
        self.is_flapping = self.changes.len() >= calm_below;
        let (from, worst) = (self.status, self.worst);
        let least = if self.is_flapping { Status::Warning } else { Status::Ok };
        self.status = self.damped.max(least);
        if from != self.status {
            self.since = now.wall;
        }
        // What flaps has changed when it is worse than ever.
        let (from, to) = if self.is_flapping {
            self.worst = worst.max(self.status);
            (worst, self.worst)
        } else {
            self.worst = self.status;
            (from, self.status)
        };
        let is_change = from != to || was_flapping != self.is_flapping;
        is_change.then_some(Change { from, to, is_flapping: self.is_flapping })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalogue::ROLE;

    fn at(second: u64) -> Now {
        let wall = DateTime::from_timestamp(i64::try_from(second).unwrap(), 0).unwrap();
        Now { boot: Duration::from_secs(second), wall }
    }

    fn reading(letter: char) -> Reading {
        let status = match letter {
            'o' => Status::Ok,
            'w' => Status::Warning,
            'u' => Status::Unknown,
            _ => Status::Critical,
        };
        Reading::new(&ROLE, status, letter)
    }

    /// Takes a reading each second, and writes down what counts after each, in capitals while it flaps.
    fn run(readings: &str) -> String {
        let mut letters = readings.chars();
        let mut settled = Settled::new(reading(letters.next().unwrap()), at(0).boot, at(0));
        let mut out = String::new();
        for (second, letter) in (1..).zip(letters) {
            settled.take(reading(letter), at(second).boot, at(second));
            let name = settled.status.name().chars().next().unwrap();
            out.push(if settled.is_flapping { name.to_ascii_uppercase() } else { name });
        }
        out
    }

    #[test]
    fn a_status_counts_after_a_few_readings() {
        for (readings, expected) in [
            ("ooooo", "oooo"),
            ("occcc", "occc"),
            ("ocoococo", "ooooooo"),
            ("ccooooo", "cccooo"),
            ("ccoocooo", "cccccco"),
            // Worse and then even worse: the milder counts first.
            ("owcccc", "owwcc"),
            ("cwoooo", "ccwww"),
            ("ouuoooo", "ouuuoo"),
        ] {
            assert_eq!(run(readings), expected, "{readings}");
        }
    }

    #[test]
    fn what_keeps_changing_flaps_and_is_no_better_than_a_warning() {
        let cycle = "ccooo";
        let readings = format!("o{}{}", cycle.repeat(3), "o".repeat(700));
        let counted = run(&readings);
        let flapping_from = counted.find('W').unwrap();
        assert!(flapping_from <= 15, "{counted}");
        // Half of the six changes are too old after ten minutes.
        let calm_from = counted.rfind('W').unwrap() + 1;
        assert!((600..620).contains(&calm_from), "{calm_from}");
        assert!(counted[flapping_from..calm_from].chars().all(|it| it == 'W'));
        assert!(counted[calm_from..].chars().all(|it| it == 'o'));
    }

    #[test]
    fn a_way_down_with_many_steps_is_one_change() {
        let restart = "wwccwwwooo";
        assert!(!run(&format!("o{}", restart.repeat(2))).contains(char::is_uppercase));
        assert!(run(&format!("o{}", restart.repeat(3))).contains(char::is_uppercase));
    }

    #[test]
    fn what_changes_in_maintenance_does_not_flap() {
        let mut settled = Settled::new(reading('o'), at(0).boot, at(0));
        for (second, letter) in (1..).zip("ccooo".repeat(6).chars()) {
            settled.take(reading(letter), at(second).boot, at(second));
            settled.calm();
            assert!(!settled.is_flapping, "{second}");
        }
        assert_eq!(settled.status, Status::Ok);
    }

    #[test]
    fn what_flaps_says_what_it_is_and_is_told_at_its_worst() {
        let mut settled = Settled::new(reading('o'), at(0).boot, at(0));
        let mut changes = Vec::new();
        for (second, letter) in (1..).zip("ccoooccoooccooooooccwwwwooo".chars()) {
            changes.extend(settled.take(reading(letter), at(second).boot, at(second)));
            let Settled { is_flapping, status, worst, .. } = settled;
            if !is_flapping {
                continue;
            }
            assert_eq!(worst, Status::Critical, "{second}");
            let expected = match second {
                15..=19 | 27 => (
                    Status::Warning,
                    "it comes and goes: 6 changes in 10 min, well just now; last: ",
                ),
                20..=22 => (Status::Critical, "c"),
                _ => (Status::Warning, "w"),
            };
            assert_eq!(status, expected.0, "{second}");
            assert!(settled.reading.reason.starts_with(expected.1), "{second} {settled:?}");
            assert_eq!(settled.reading.status, status, "{second}");
            let is_well = settled.reading.reason.starts_with("it comes and goes");
            assert_eq!(settled.reading.next_step() == ROLE.next, !is_well, "{second}");
            let (reason, next) = settled.words_to_keep();
            assert!(![&reason, &next].iter().any(|it| it.contains("just now")), "{reason}; {next}");
            let told = "it comes and goes: 6 changes in 10 min; last: ";
            assert_eq!(reason.starts_with(told), is_well, "{second}: {reason}");
        }
        // Three times worse, twice better, and once that it flaps.
        assert_eq!(changes.len(), 6, "{changes:?}");
        assert!(changes.last().unwrap().is_flapping);
    }

    #[test]
    fn what_counts_has_words_of_its_own() {
        let mut settled = Settled::new(reading('c'), at(0).boot, at(0));
        for (second, letter) in (1..).zip("woo".chars()) {
            settled.take(reading(letter), at(second).boot, at(second));
        }
        assert_eq!((settled.status, settled.reading.reason.as_str()), (Status::Warning, "w"));
    }

    #[test]
    fn a_reading_that_is_shown_again_does_not_count_twice() {
        let mut settled = Settled::new(reading('o'), at(0).boot, at(0));
        for second in 1..9 {
            assert_eq!(settled.take(reading('c'), at(1).boot, at(second)), None);
        }
        let change = settled.take(reading('c'), at(9).boot, at(9)).unwrap();
        let (from, to) = (Status::Ok, Status::Critical);
        assert_eq!(change, Change { from, to, is_flapping: false });
        assert_eq!(settled.since, at(9).wall);
    }
}
