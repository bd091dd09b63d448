//! What somebody was told, and what is to be told next; pure.
//!
//! A notice is the difference between what is and what was told. So there is no queue: whoever could not
//! be told for an hour is told how it stands then, and never twice.

use std::collections::BTreeMap;
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use super::alerts::{Picture, Problem, Severity, Subject};

/// What somebody was told of and is not over, as far as they know.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Vec<Told>", into = "Vec<Told>")]
pub struct Ledger(BTreeMap<Subject, Problem>);

/// One entry, as it is written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Told {
    /// What it is about.
    #[serde(flatten)]
    pub subject: Subject,
    /// What was told.
    #[serde(flatten)]
    pub problem: Problem,
}

impl From<Vec<Told>> for Ledger {
    fn from(all: Vec<Told>) -> Self {
        Self(all.into_iter().map(|it| (it.subject, it.problem)).collect())
    }
}

impl From<Ledger> for Vec<Told> {
    fn from(ledger: Ledger) -> Self {
        ledger.0.into_iter().map(|(subject, problem)| Told { subject, problem }).collect()
    }
}

/// What happened to a problem.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Event {
    /// It is there.
    Began,
    /// It matters more, or less, than before.
    Changed {
        /// How much it mattered.
        before: Severity,
    },
    /// It keeps changing.
    Flapping,
    /// It is over.
    Ended {
        /// How long it lasted.
        after: Duration,
    },
    /// What it is about is not watched any more: nobody knows how it is.
    Unwatched {
        /// How long it had lasted.
        after: Duration,
    },
}

impl Event {
    /// Its name in messages.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Began => "began",
            Self::Changed { .. } => "changed",
            Self::Flapping => "flapping",
            Self::Ended { .. } => "ended",
            Self::Unwatched { .. } => "unwatched",
        }
    }

    /// Whether nothing more will be told of it.
    pub const fn is_last(self) -> bool {
        matches!(self, Self::Ended { .. } | Self::Unwatched { .. })
    }
}

/// Something to tell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notice {
    /// What happened.
    pub event: Event,
    /// To what.
    pub subject: Subject,
    /// The problem; of one that is over, as it was told last.
    pub problem: Problem,
}

impl Ledger {
    /// What is to be told, the worst first.
    pub fn due(&self, picture: &Picture, now: DateTime<Utc>) -> Vec<Notice> {
        let mut due: Vec<Notice> = picture
            .firing()
            .filter_map(|(subject, problem)| {
                let (event, since) = match self.0.get(subject) {
                    None => (Event::Began, problem.since),
                    // It may be as bad as it was: for how long it is so begins to count anew.
                    Some(told) if picture.is_young && problem.severity < told.severity => {
                        return None;
                    }
                    Some(told) if told.severity != problem.severity => {
                        (Event::Changed { before: told.severity }, told.since)
                    }
                    Some(told) if problem.is_flapping && !told.is_flapping => {
                        (Event::Flapping, told.since)
                    }
                    Some(_) => return None,
                };
                let problem = Problem { since, ..problem.clone() };
                Some(Notice { event, subject: subject.clone(), problem })
            })
            .collect();
        due.extend(self.0.iter().filter(|(it, _)| picture.is_over(it)).map(
            |(subject, problem)| {
                let after = (now - problem.since).to_std().unwrap_or_default();
                let (subject, problem) = (subject.clone(), problem.clone());
                let event = if picture.watched.contains(&subject.component) {
                    Event::Ended { after }
                } else {
                    Event::Unwatched { after }
                };
                Notice { event, subject, problem }
            },
        ));
        due.sort_by_key(|it| {
            (it.event.is_last(), std::cmp::Reverse(it.problem.severity), it.problem.since)
        });
        due
    }

    /// Notes that this was told.
    pub fn note(&mut self, notice: &Notice) {
        let Notice { event, subject, problem } = notice;
        match event {
            Event::Ended { .. } | Event::Unwatched { .. } => {
                self.0.remove(subject);
            }
            Event::Began | Event::Changed { .. } | Event::Flapping => {
                self.0.insert(subject.clone(), problem.clone());
            }
        }
    }

    /// Takes the words of now, where nothing else has changed.
    pub fn refresh(&mut self, picture: &Picture) {
        for (subject, problem) in picture.firing() {
            if let Some(told) = self.0.get_mut(subject) {
                problem.reason.clone_into(&mut told.reason);
                problem.next.clone_into(&mut told.next);
            }
        }
    }

    /// What was told of a subject, if it is not over.
    pub fn get_mut(&mut self, subject: &Subject) -> Option<&mut Problem> {
        self.0.get_mut(subject)
    }

    /// All of it.
    pub fn iter(&self) -> impl Iterator<Item = (&Subject, &Problem)> {
        self.0.iter()
    }
}

#[cfg(test)]
mod tests {
    use super::super::alerts::tests::{at, firing, problem_at, subject};
    use super::super::alerts::{Hold, Standing};
    use super::*;

    fn names(notices: &[Notice]) -> Vec<String> {
        let name = |it: &Notice| {
            let severity = it.problem.severity.name();
            format!("{} {} {severity}", it.event.name(), it.subject.component.name)
        };
        notices.iter().map(name).collect()
    }

    /// What is told as the picture changes from one to the next.
    fn tell(pictures: &[Picture]) -> Vec<Vec<String>> {
        let mut ledger = Ledger::default();
        let told = pictures.iter().map(|picture| {
            let due = ledger.due(picture, at(100).wall);
            for notice in &due {
                ledger.note(notice);
            }
            assert!(ledger.due(picture, at(100).wall).is_empty(), "told twice");
            names(&due)
        });
        told.collect()
    }

    #[test]
    fn a_monitor_that_has_just_begun_takes_nothing_back() {
        let (warning, critical) = (Severity::Warning, Severity::Critical);
        let one = |severity| firing(&[(subject("a", "x"), problem_at(severity, 5))]);
        let young = |severity| Picture { is_young: true, ..one(severity) };
        let told = tell(&[one(critical), young(warning), young(critical), one(warning)]);
        assert_eq!(told, [vec!["began a critical"], vec![], vec![], vec!["changed a warning"]]);
        let told = tell(&[one(warning), young(critical), firing(&[])]);
        let expected = [["began a warning"], ["changed a critical"], ["ended a critical"]];
        assert_eq!(told, expected);
    }

    #[test]
    fn a_problem_is_told_when_it_begins_changes_and_ends() {
        let (warning, critical) = (Severity::Warning, Severity::Critical);
        let one = |severity| firing(&[(subject("a", "x"), problem_at(severity, 5))]);
        let flapping = || {
            let problem = Problem { is_flapping: true, ..problem_at(critical, 9) };
            firing(&[(subject("a", "x"), problem)])
        };
        let held = |hold| Picture {
            standings: BTreeMap::from([(subject("a", "x"), Standing::Held(hold))]),
            ..firing(&[])
        };
        let pictures = [
            one(warning),
            one(warning),
            one(critical),
            flapping(),
            one(critical),
            flapping(),
            held(Hold::Silenced),
            held(Hold::Follows),
            firing(&[]),
            held(Hold::New),
            firing(&[]),
        ];
        let expected: [&[&str]; 11] = [
            &["began a warning"],
            &[],
            &["changed a critical"],
            &["flapping a critical"],
            &[],
            &[],
            &[],
            &[],
            &["ended a critical"],
            &[],
            &[],
        ];
        assert_eq!(tell(&pictures), expected);
    }

    #[test]
    fn what_is_not_watched_any_more_is_not_well() {
        let mut ledger = Ledger::default();
        let picture = firing(&[(subject("a", "x"), problem_at(Severity::Critical, 5))]);
        let due = ledger.due(&picture, at(60).wall);
        ledger.note(&due[0]);
        let mut gone = firing(&[]);
        gone.watched.remove(&subject("a", "x").component);
        let due = ledger.due(&gone, at(65).wall);
        assert_eq!(due[0].event, Event::Unwatched { after: Duration::from_mins(1) });
        ledger.note(&due[0]);
        assert!(ledger.due(&gone, at(65).wall).is_empty());
    }

    #[test]
    fn the_worst_comes_first_and_what_is_over_last() {
        let (warning, critical) = (Severity::Warning, Severity::Critical);
        let told = tell(&[
            firing(&[(subject("z", "x"), problem_at(critical, 0))]),
            firing(&[
                (subject("a", "x"), problem_at(warning, 1)),
                (subject("b", "x"), problem_at(critical, 3)),
                (subject("c", "x"), problem_at(critical, 2)),
            ]),
        ]);
        let expected =
            ["began c critical", "began b critical", "began a warning", "ended z critical"];
        assert_eq!(told[1], expected);
    }

    #[test]
    fn how_long_it_lasted_counts_from_its_begin() {
        let mut ledger = Ledger::default();
        for problem in [problem_at(Severity::Warning, 5), problem_at(Severity::Critical, 50)] {
            let picture = firing(&[(subject("a", "x"), problem)]);
            let due = ledger.due(&picture, at(60).wall);
            ledger.note(&due[0]);
        }
        let due = ledger.due(&firing(&[]), at(65).wall);
        assert_eq!(due[0].event, Event::Ended { after: Duration::from_mins(1) });
        // A clock that was set back.
        let due = ledger.due(&firing(&[]), at(0).wall);
        assert_eq!(due[0].event, Event::Ended { after: Duration::ZERO });
    }

    #[test]
    fn what_is_kept_is_read_back() {
        let mut ledger = Ledger::default();
        let picture = firing(&[(subject("a", "x"), problem_at(Severity::Critical, 5))]);
        let due = ledger.due(&picture, at(60).wall);
        ledger.note(&due[0]);
        let text = serde_json::to_string(&ledger).unwrap();
        assert_eq!(
            text,
            "[{\"component\":{\"kind\":\"postgres\",\"group\":1,\"name\":\"a\"},\"check\":\"x\",\
             \"severity\":\"critical\",\"is_flapping\":false,\"since\":\"2027-01-15T08:00:05Z\",\
             \"reason\":\"no connection: refused\",\"next\":\"look at it\"}]"
        );
        assert_eq!(serde_json::from_str::<Ledger>(&text).unwrap(), ledger);
    }
}
