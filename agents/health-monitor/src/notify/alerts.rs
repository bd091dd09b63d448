//! What people are to be told of; pure.
//!
//! Each check that is not ok is a problem, unless it only follows from another one, is silenced, or has
//! not lasted yet: then it is held. What is held neither begins nor ends: who was told of it before stays
//! told, and hears how it ended when it is not held any more.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use crate::catalogue::{REACHABLE, REDUNDANCY, STREAMING};
use crate::check::Status;
use crate::component::{Component, Kind};
use crate::settle::{Now, Settled};
use crate::verdict::Checks;

/// So many problems are told at a time, the worst that began first. More than that is one problem, and
/// the list would be read by nobody.
const PROBLEMS_MAX: usize = 500;
/// So long after the first look what is new to this monitor may be old: longer than any check counts until
/// it says that something has lasted too long.
const YOUNG_FOR: Duration = Duration::from_mins(3);
/// Longest reason or advice that is told, in characters.
const TEXT_MAX: usize = 300;

/// What a problem is about.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Subject {
    /// Of what.
    pub component: Component,
    /// The check.
    pub check: String,
}

/// How much it matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// Somebody should look, in daylight. What cannot be told is that too: where it hurts, a check of
    /// its own is critical.
    Warning,
    /// Somebody must act now.
    Critical,
}

impl Severity {
    /// Its name in labels and messages.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Warning => "warning",
            Self::Critical => "critical",
        }
    }

    /// What a status comes to; `None` for ok. A component that others stand in for is a warning, as in
    /// the verdict.
    pub fn of(status: Status, stands_in: bool) -> Option<Self> {
        match status {
            Status::Ok => None,
            Status::Critical if !stands_in => Some(Self::Critical),
            Status::Critical | Status::Unknown | Status::Warning => Some(Self::Warning),
        }
    }
}

/// What is told of a check that is not ok.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// How much it matters.
    pub severity: Severity,
    /// It keeps changing.
    pub is_flapping: bool,
    /// Since when.
    pub since: DateTime<Utc>,
    /// Why, in one sentence without a full stop.
    pub reason: String,
    /// What to do next.
    pub next: String,
}

/// Why nobody is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Hold {
    /// It has not lasted long enough.
    New,
    /// It follows from something else that is told.
    Follows,
    /// It is silenced.
    Silenced,
    /// There are too many worse ones.
    TooMany,
}

/// How a check that is not ok stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    /// People are to be told.
    Firing(Problem),
    /// They are not.
    Held(Hold),
}

/// All checks that are not ok.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Picture {
    /// How each stands.
    pub standings: BTreeMap<Subject, Standing>,
    /// Everything was asked: what is not among them is over.
    pub is_complete: bool,
    /// What is watched: of anything else nobody knows how it is.
    pub watched: BTreeSet<Component>,
    /// Components that do not answer: what else is wrong with them is not known.
    pub silent: BTreeSet<Component>,
    /// An agent does not answer: what it would tell of the repository is not known.
    pub is_agent_silent: bool,
    /// This monitor has not looked for long: what it takes for new may be old, and worse than it says.
    pub is_young: bool,
}

impl Picture {
    /// Whether a problem that somebody was told of is over.
    pub fn is_over(&self, subject: &Subject) -> bool {
        let is_untold = self.is_agent_silent && subject.component.kind == Kind::Repository;
        self.is_complete
            && !is_untold
            && !self.standings.contains_key(subject)
            && !self.silent.contains(&subject.component)
    }

    /// What people are to be told of.
    pub fn firing(&self) -> impl Iterator<Item = (&Subject, &Problem)> {
        self.standings.iter().filter_map(|(subject, standing)| match standing {
            Standing::Firing(problem) => Some((subject, problem)),
            Standing::Held(_) => None,
        })
    }

    /// Leaves the worst; of equals those that began first.
    fn limit(&mut self, most: usize) {
        let mut order: Vec<_> = self
            .firing()
            .map(|(subject, it)| (std::cmp::Reverse(it.severity), it.since, subject.clone()))
            .collect();
        order.sort_unstable();
        for (_, _, subject) in order.drain(..).skip(most) {
            self.standings.insert(subject, Standing::Held(Hold::TooMany));
        }
    }
}

/// Remembers since when each check has been bad.
#[derive(Debug)]
pub struct Lookout {
    after: Duration,
    begun: BTreeMap<Subject, Duration>,
    first_at: Option<Duration>,
}

/// What is looked at.
#[derive(Clone, Copy, Debug)]
pub struct Sight<'a, S, Q> {
    /// The checks as they count.
    pub checks: &'a Checks,
    /// Whether others stand in for a component.
    pub stands_in: S,
    /// Whether a check is silenced.
    pub is_silenced: Q,
    /// Everything was asked.
    pub is_complete: bool,
}

impl Lookout {
    /// Nobody is told of what has not lasted for `after`.
    pub fn new(after: Duration) -> Self {
        Self { after, begun: BTreeMap::new(), first_at: None }
    }

    /// How things stand now.
    pub fn look<S, Q>(&mut self, sight: Sight<'_, S, Q>, now: Now) -> Picture
    where
        S: Fn(&Component) -> bool,
        Q: Fn(&Subject) -> bool,
    {
        let Sight { checks, stands_in, is_silenced, is_complete } = sight;
        let watched = checks.keys().cloned().collect();
        let first_at = *self.first_at.get_or_insert(now.boot);
        let is_young = now.boot.saturating_sub(first_at) < YOUNG_FOR;
        let mut picture = Picture { is_complete, watched, is_young, ..Picture::default() };
        let mut begun = BTreeMap::new();
        for (component, checks) in checks {
            for (check, settled) in checks {
                let Some(severity) = Severity::of(settled.worst, stands_in(component)) else {
                    continue;
                };
                if *check == "reachable" {
                    picture.silent.insert(component.clone());
                }
                // It cannot do its work, where it is there: that is a warning.
                let is_silent = settled.status > Status::Warning;
                picture.is_agent_silent |= component.kind == Kind::Agent && is_silent;
                let (component, check) = (component.clone(), (*check).to_owned());
                let subject = Subject { component, check };
                let standing = if settled.reading.follows {
                    Standing::Held(Hold::Follows)
                } else {
                    let since = *self.begun.get(&subject).unwrap_or(&now.boot);
                    begun.insert(subject.clone(), since);
                    if is_silenced(&subject) {
                        Standing::Held(Hold::Silenced)
                    } else if now.boot.saturating_sub(since) < self.after {
                        Standing::Held(Hold::New)
                    } else {
                        Standing::Firing(problem(settled, severity))
                    }
                };
                picture.standings.insert(subject, standing);
            }
        }
        self.begun = begun;
        picture.limit(PROBLEMS_MAX);
        picture
    }
}

/// Groups of which all standbys that are missing are silenced: that they are missing need not be told.
pub fn excused(checks: &Checks, is_silenced: impl Fn(&Component) -> bool) -> BTreeSet<Subject> {
    let is_missing = |checks: &BTreeMap<&'static str, Settled>| {
        let ailing = [REACHABLE.name, STREAMING.name].map(|it| checks.get(it));
        ailing.into_iter().flatten().any(|it| it.status != Status::Ok)
    };
    let mut excused = BTreeSet::new();
    for (group, of_group) in checks.iter().filter(|(it, _)| it.kind == Kind::Group) {
        let mut missing = checks
            .iter()
            .filter(|(it, checks)| {
                it.kind == Kind::Postgres && it.group == group.group && is_missing(checks)
            })
            .peekable();
        // That commits wait for them has advice of its own, and hurts.
        let hurts = of_group.get(REDUNDANCY.name).is_none_or(|it| it.reading.next.is_some());
        if !hurts && missing.peek().is_some() && missing.all(|(it, _)| is_silenced(it)) {
            let (component, check) = (group.clone(), REDUNDANCY.name.to_owned());
            excused.insert(Subject { component, check });
        }
    }
    excused
}

fn problem(settled: &Settled, severity: Severity) -> Problem {
    let short = |text: &str| match text.char_indices().nth(TEXT_MAX) {
        Some((end, _)) => format!("{}…", text.get(..end).unwrap_or_default()),
        None => text.to_owned(),
    };
    let (reason, next) = settled.words_to_keep();
    Problem {
        severity,
        is_flapping: settled.is_flapping,
        since: settled.since,
        reason: short(&reason),
        next: short(&next),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::catalogue::CONNECTIONS;
    use crate::check::{Check, Reading};

    pub(in crate::notify) fn at(second: i64) -> Now {
        let wall = DateTime::from_timestamp(1_800_000_000 + second, 0).unwrap();
        Now { boot: Duration::from_secs(second.unsigned_abs()), wall }
    }

    pub(in crate::notify) fn server(name: &str) -> Component {
        Component::of_group(Kind::Postgres, 1, name)
    }

    pub(in crate::notify) fn subject(name: &str, check: &str) -> Subject {
        Subject { component: server(name), check: check.to_owned() }
    }

    pub(in crate::notify) fn problem_at(severity: Severity, second: i64) -> Problem {
        let (reason, next) = ("no connection: refused".to_owned(), "look at it".to_owned());
        Problem { severity, is_flapping: false, since: at(second).wall, reason, next }
    }

    /// A picture in which these fire.
    pub(in crate::notify) fn firing(problems: &[(Subject, Problem)]) -> Picture {
        let standings = problems
            .iter()
            .map(|(subject, problem)| (subject.clone(), Standing::Firing(problem.clone())))
            .collect();
        let watched = ["a", "b", "c", "z"].map(server).into();
        Picture { standings, watched, is_complete: true, ..Picture::default() }
    }

    fn checks(all: &[(&str, &'static Check, Status, bool)]) -> Checks {
        let mut checks = Checks::new();
        for (name, check, status, follows) in all {
            let reading = Reading { follows: *follows, ..Reading::new(check, *status, "so it is") };
            let settled = Settled::new(reading, at(0).boot, at(0));
            checks.entry(server(name)).or_default().insert(check.name, settled);
        }
        checks
    }

    fn look(lookout: &mut Lookout, checks: &Checks, silenced: &str, now: Now) -> Picture {
        let sight = Sight {
            checks,
            stands_in: |it: &Component| it.name == "standby",
            is_silenced: |it: &Subject| it.component.name == silenced,
            is_complete: true,
        };
        lookout.look(sight, now)
    }

    /// `name=` with the severity, or why it is held.
    fn told(picture: &Picture) -> String {
        let all = picture.standings.iter().map(|(subject, standing)| {
            let standing = match standing {
                Standing::Firing(problem) => problem.severity.name().to_owned(),
                Standing::Held(hold) => format!("{hold:?}"),
            };
            format!("{}={standing}", subject.component.name)
        });
        all.collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn each_check_that_is_not_ok_fires_once_with_its_severity() {
        use Status::{Critical, Ok, Unknown, Warning};
        for (case, all, expected) in [
            ("nothing is watched", &[][..], ""),
            ("well", &[("a", &REACHABLE, Ok, false)], ""),
            ("warning", &[("a", &CONNECTIONS, Warning, false)], "a=warning"),
            ("not known", &[("a", &CONNECTIONS, Unknown, false)], "a=warning"),
            ("critical", &[("a", &REACHABLE, Critical, false)], "a=critical"),
            ("others stand in", &[("standby", &REACHABLE, Critical, false)], "standby=warning"),
            ("it follows", &[("a", &REACHABLE, Critical, true)], "a=Follows"),
            ("silenced", &[("b", &REACHABLE, Critical, false)], "b=Silenced"),
            (
                "two of one",
                &[("a", &REACHABLE, Critical, false), ("a", &CONNECTIONS, Warning, false)],
                "a=warning a=critical",
            ),
        ] {
            let mut lookout = Lookout::new(Duration::ZERO);
            assert_eq!(told(&look(&mut lookout, &checks(all), "b", at(5))), expected, "{case}");
        }
    }

    #[test]
    fn nobody_is_told_of_what_does_not_last() {
        let bad = checks(&[("a", &REACHABLE, Status::Critical, false)]);
        let follows = checks(&[("a", &REACHABLE, Status::Critical, true)]);
        let good = checks(&[("a", &REACHABLE, Status::Ok, false)]);
        let mut lookout = Lookout::new(Duration::from_secs(10));
        for (second, checks, silenced, expected) in [
            (0, &bad, "", "a=New"),
            (9, &bad, "", "a=New"),
            (10, &bad, "", "a=critical"),
            (11, &good, "", ""),
            (12, &bad, "", "a=New"),
            (20, &follows, "", "a=Follows"),
            (25, &bad, "", "a=New"),
            // Being silenced does not stop the time: what still holds afterwards is told at once.
            (26, &bad, "a", "a=Silenced"),
            (40, &bad, "a", "a=Silenced"),
            (41, &bad, "", "a=critical"),
        ] {
            let picture = look(&mut lookout, checks, silenced, at(second));
            assert_eq!(told(&picture), expected, "{second}");
        }
    }

    #[test]
    fn what_is_not_known_to_be_over_is_not_over() {
        let mut picture =
            firing(&[(subject("a", "connections"), problem_at(Severity::Warning, 0))]);
        assert!(!picture.is_over(&subject("a", "connections")));
        assert!(picture.is_over(&subject("b", "connections")));
        picture.silent.insert(server("b"));
        assert!(!picture.is_over(&subject("b", "connections")), "it does not answer");
        picture.silent.clear();
        picture.is_agent_silent = true;
        assert!(picture.is_over(&subject("b", "connections")));
        let component = Component::of_group(Kind::Repository, 1, "");
        let repository = Subject { component, check: "backup_age".to_owned() };
        assert!(!picture.is_over(&repository), "nobody tells of it");
        picture.is_agent_silent = false;
        assert!(picture.is_over(&repository));
        picture.is_complete = false;
        assert!(!picture.is_over(&subject("b", "connections")), "not all were asked");
    }

    #[test]
    fn standbys_that_are_silenced_are_not_missed() {
        let group = || Component::group(1);
        let mut checks = checks(&[
            ("a", &REACHABLE, Status::Critical, false),
            ("b", &STREAMING, Status::Critical, false),
            ("c", &REACHABLE, Status::Ok, false),
        ]);
        let redundancy = Reading::new(&REDUNDANCY, Status::Warning, "1 of 3 standbys stream");
        let settled = Settled::new(redundancy.clone(), at(0).boot, at(0));
        checks.insert(group(), BTreeMap::from([(REDUNDANCY.name, settled)]));
        let all = BTreeSet::from([Subject { component: group(), check: "redundancy".to_owned() }]);
        assert_eq!(excused(&checks, |it| ["a", "b"].contains(&it.name.as_str())), all);
        assert_eq!(excused(&checks, |it| it.name == "a"), BTreeSet::new());
        let hangs = Settled::new(redundancy.with_next("writes hang"), at(0).boot, at(0));
        checks.insert(group(), BTreeMap::from([(REDUNDANCY.name, hangs)]));
        assert_eq!(excused(&checks, |_| true), BTreeSet::new());
    }

    #[test]
    fn what_is_new_to_a_monitor_that_is_young_may_be_old() {
        let mut lookout = Lookout::new(Duration::ZERO);
        let checks = checks(&[("a", &REACHABLE, Status::Warning, false)]);
        for (second, expected) in [(100, true), (279, true), (280, false)] {
            assert_eq!(look(&mut lookout, &checks, "", at(second)).is_young, expected, "{second}");
        }
    }

    #[test]
    fn of_too_many_the_worst_are_told() {
        let mut picture = firing(&[
            (subject("a", "x"), problem_at(Severity::Warning, 0)),
            (subject("b", "x"), problem_at(Severity::Critical, 9)),
            (subject("c", "x"), problem_at(Severity::Critical, 1)),
        ]);
        picture.limit(2);
        assert_eq!(told(&picture), "a=TooMany b=critical c=critical");
        picture.limit(1);
        assert_eq!(told(&picture), "a=TooMany b=TooMany c=critical");
    }

    #[test]
    fn texts_are_bounded() {
        let reading = Reading::new(&REACHABLE, Status::Critical, "ä".repeat(1000));
        let settled = Settled::new(reading, at(0).boot, at(0));
        let problem = problem(&settled, Severity::Critical);
        assert_eq!(problem.reason.chars().count(), TEXT_MAX + 1);
    }
}
