//! Whose WAL a node has, where its timeline does not tell: remembered over its restarts, and over
//! those of this agent.
//!
//! Two servers may write the same timeline, and a primary may come back without its newest WAL.
//! What a server alone has stays in its directory when it is restarted, and it then says of itself
//! what any standby does. A record names the one before it, so the WAL of another history does not fit:
//! such a standby stands still. But its receiver lays the primary's WAL over its own, and if its last
//! checkpoint is older than that, the next start replays the primary's: its position is true, and in its
//! tables there is still what it wrote alone. So it is not enough that a server goes on to replay what it
//! streams: its [`Directory`] must be another one as well.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use crate::observation::{Directory, Identity, Sample};

/// So many nodes are remembered in a group.
const NODES_MAX: usize = 256;

/// A server, from its start to its end, on one timeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    /// Its cluster.
    pub system_identifier: u64,
    /// The timeline.
    pub timeline: u32,
    /// When it was started, by its own clock. Only compared for equality.
    pub started_at: DateTime<Utc>,
    /// By what its directory is known. A file of an older version does not say.
    #[serde(default)]
    pub directory: Directory,
}

/// Whether two runs had the same data directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Same {
    /// Surely.
    Yes,
    /// Both were recovered from the same checkpoint, and so may be copies made since then.
    Perhaps,
    /// Nothing says so.
    Unknown,
}

impl Run {
    /// The run of whoever answered.
    pub fn of(sample: &Sample, timeline: u32) -> Self {
        let Identity { system_identifier, started_at, .. } = sample.identity;
        Self { system_identifier, timeline, started_at, directory: sample.directory }
    }

    /// Whether it is this run still, perhaps on a newer timeline.
    fn is_start_of(&self, run: &Self) -> bool {
        (self.system_identifier, self.started_at) == (run.system_identifier, run.started_at)
    }

    fn directory_of(&self, later: &Self) -> Same {
        let (before, now) = (self.directory, later.directory);
        if self.system_identifier != later.system_identifier {
            Same::Unknown
        } else if self.is_start_of(later)
            || (now.statistics_reset.is_some() && before.statistics_reset == now.statistics_reset)
        {
            Same::Yes
        } else if now.checkpoint != 0 && before.checkpoint == now.checkpoint {
            Same::Perhaps
        } else {
            Same::Unknown
        }
    }
}

/// Whose WAL a standby has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whose {
    /// The primary's, for all that is known.
    Primarys,
    /// Its own: the primary has not all of it.
    ItsOwn,
    /// Its own, unless it was rebuilt.
    Unclear,
}

/// What is remembered about one node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Past {
    /// It was a primary.
    wrote: Option<Run>,
    /// It had WAL of that timeline that another writer of it had not.
    strayed: Option<Run>,
    /// It may be a copy of another server since.
    #[serde(default)]
    is_unclear: bool,
}

impl Past {
    /// What it wrote, and had of its own, it has still if `run` goes on in the same directory.
    fn goes_on(&mut self, run: Run) {
        let Self { wrote, strayed, is_unclear } = self;
        let wrote = wrote.as_mut().filter(|it| it.timeline == run.timeline);
        let strayed = strayed.as_mut().filter(|it| it.timeline <= run.timeline);
        for before in wrote.into_iter().chain(strayed) {
            let same = before.directory_of(&run);
            if same != Same::Unknown {
                *before = run;
            }
            *is_unclear |= same == Same::Perhaps;
        }
    }
}

/// What is remembered about the nodes of a group, by name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pasts(BTreeMap<String, Past>);

impl Pasts {
    /// Takes in that a node is a primary. Whoever else wrote that timeline has WAL of its own.
    pub fn writes(&mut self, name: &str, run: Run) {
        let is_other = |it: &Run| {
            it.system_identifier == run.system_identifier
                && it.timeline == run.timeline
                && it.started_at != run.started_at
        };
        let mut has_rival = false;
        for (_, past) in self.0.iter_mut().filter(|(other, _)| *other != name) {
            if past.wrote.as_ref().is_some_and(is_other) {
                (past.strayed, has_rival) = (past.wrote, true);
            }
        }
        let past = self.of(name);
        // What it replayed before it was promoted is the line's.
        past.strayed.take_if(|it| it.timeline != run.timeline);
        past.goes_on(run);
        past.wrote = Some(run);
        if has_rival {
            past.strayed = past.wrote;
        }
        past.is_unclear &= past.strayed.is_some() && !has_rival;
    }

    /// Takes in that a standby has replayed what the primary has not.
    pub fn strays(&mut self, name: &str, run: Run) {
        let past = self.of(name);
        (past.strayed, past.is_unclear) = (Some(run), false);
    }

    /// Takes in that a node is a standby, and whether it has replayed what it streamed.
    pub fn follows(&mut self, name: &str, run: Run, has_streamed: bool) {
        let Some(past) = self.0.get_mut(name) else { return };
        let is_over = |it: &mut Run| {
            it.system_identifier != run.system_identifier
                || it.timeline < run.timeline
                || (it.started_at != run.started_at && has_streamed)
        };
        past.goes_on(run);
        past.wrote.take_if(is_over);
        past.strayed.take_if(is_over);
        if past.wrote.or(past.strayed).is_none() {
            self.0.remove(name);
        }
    }

    /// Whose WAL a standby has, on `run`'s timeline, where the primary writes `timeline`.
    pub fn whose(&self, name: &str, run: Run, timeline: u32) -> Whose {
        let Some(Past { strayed: Some(strayed), is_unclear, .. }) = self.0.get(name) else {
            return Whose::Primarys;
        };
        let is_same =
            (strayed.system_identifier, strayed.timeline) == (run.system_identifier, run.timeline);
        match is_same {
            false => Whose::Primarys,
            true if strayed.is_start_of(&run) && !is_unclear && run.timeline == timeline => {
                Whose::ItsOwn
            }
            true => Whose::Unclear,
        }
    }

    fn of(&mut self, name: &str) -> &mut Past {
        if self.0.len() >= NODES_MAX && !self.0.contains_key(name) {
            let timeline = |past: &Past| past.strayed.or(past.wrote).map(|run| run.timeline);
            let oldest = self.0.iter().min_by_key(|(_, past)| timeline(past));
            if let Some(oldest) = oldest.map(|(name, _)| name.clone()) {
                self.0.remove(&oldest);
            }
        }
        self.0.entry(name.to_owned()).or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(started: i64, timeline: u32) -> Run {
        let started_at = DateTime::from_timestamp(started, 0).unwrap();
        Run { system_identifier: 7, timeline, started_at, directory: Directory::default() }
    }

    fn within(run: Run, statistics_reset: i64, checkpoint: u64) -> Run {
        let statistics_reset = DateTime::from_timestamp(statistics_reset, 0);
        Run { directory: Directory { statistics_reset, checkpoint }, ..run }
    }

    /// What a node is.
    #[derive(Clone, Copy)]
    enum Is {
        Primary,
        Ahead,
        /// It has streamed?
        Standby(bool),
    }

    type Turns<'a> = Vec<(&'a str, Run, Is)>;

    fn after(turns: Turns<'_>) -> Pasts {
        let mut pasts = Pasts::default();
        for (node, run, is) in turns {
            match is {
                Is::Primary => pasts.writes(node, run),
                Is::Ahead => pasts.strays(node, run),
                Is::Standby(has_streamed) => pasts.follows(node, run, has_streamed),
            }
        }
        pasts
    }

    #[test]
    fn what_a_server_alone_has_stays_until_it_was_rebuilt() {
        use Is::{Ahead, Primary, Standby};
        let both = [("p", run(1, 3), Primary), ("s", run(2, 3), Primary)];
        let then = |turns: Turns<'static>| [both.to_vec(), turns].concat();
        let table: [(&str, Turns<'_>, Run, Whose); 14] = [
            ("a standby", vec![("s", run(2, 3), Standby(false))], run(2, 3), Whose::Primarys),
            ("both wrote", then(vec![]), run(3, 3), Whose::Unclear),
            ("in the other order", [both[1], both[0]].to_vec(), run(3, 3), Whose::Unclear),
            (
                "it was restarted",
                then(vec![("p", run(1, 3), Primary), ("s", run(3, 3), Standby(false))]),
                run(3, 3),
                Whose::Unclear,
            ),
            (
                "it has streamed, and the other writes on",
                then(vec![("s", run(3, 3), Standby(true)), ("p", run(1, 3), Primary)]),
                run(3, 3),
                Whose::Primarys,
            ),
            (
                "it is on a newer timeline",
                then(vec![("s", run(3, 4), Standby(false)), ("p", run(1, 3), Primary)]),
                run(3, 4),
                Whose::Primarys,
            ),
            ("each wrote its timeline", vec![both[0], ("s", run(2, 4), Primary)], run(3, 4), {
                Whose::Primarys
            }),
            (
                "a primary was restarted",
                vec![("s", run(1, 3), Primary), ("s", run(2, 3), Primary)],
                run(3, 3),
                Whose::Primarys,
            ),
            (
                "by two names",
                vec![("p", run(2, 3), Primary), ("s", run(2, 3), Primary)],
                run(3, 3),
                Whose::Primarys,
            ),
            (
                "it was restarted, and wrote on",
                then(vec![("s", run(3, 3), Primary)]),
                run(4, 3),
                Whose::Unclear,
            ),
            ("it is ahead", vec![both[0], ("s", run(2, 3), Ahead)], run(2, 3), Whose::ItsOwn),
            (
                "it is ahead, whatever it streams",
                vec![("s", run(2, 3), Ahead), ("s", run(2, 3), Standby(true))],
                run(2, 3),
                Whose::ItsOwn,
            ),
            (
                "it was ahead, and restarted",
                vec![("s", run(2, 3), Ahead), ("s", run(3, 3), Standby(false))],
                run(3, 3),
                Whose::Unclear,
            ),
            (
                "it was ahead, and rebuilt",
                vec![("s", run(2, 3), Ahead), ("s", run(3, 3), Standby(true))],
                run(3, 3),
                Whose::Primarys,
            ),
        ];
        for (name, turns, now, expected) in table {
            assert_eq!(after(turns).whose("s", now, 3), expected, "{name}");
        }
    }

    #[test]
    fn what_a_server_alone_has_stays_in_its_directory() {
        use Is::{Ahead, Primary, Standby};
        let both = || vec![("p", run(1, 3), Primary), ("s", within(run(2, 3), 20, 200), Primary)];
        let in_order = within(run(3, 3), 20, 300);
        let crashed = within(run(3, 3), 30, 200);
        let rebuilt = within(run(3, 3), 30, 300);
        let streams = |run: Run| vec![("s", run, Standby(true)), ("p", self::run(1, 3), Primary)];
        let table: [(&str, Vec<Turns<'_>>, Run, Whose); 10] = [
            ("stopped in order", vec![both(), streams(in_order)], in_order, Whose::ItsOwn),
            (
                "its own is not the primary's",
                vec![both(), vec![("s", in_order, Standby(false))]],
                in_order,
                Whose::ItsOwn,
            ),
            ("crashed", vec![both(), streams(crashed)], crashed, Whose::Unclear),
            ("rebuilt", vec![both(), streams(rebuilt)], rebuilt, Whose::Primarys),
            (
                "rebuilt, and nothing is written yet",
                vec![both(), vec![("s", rebuilt, Standby(false))]],
                rebuilt,
                Whose::Unclear,
            ),
            (
                "crashed, and stopped in order",
                vec![both(), streams(crashed), streams(within(run(4, 3), 30, 900))],
                within(run(4, 3), 30, 900),
                Whose::Unclear,
            ),
            (
                "stopped in order, and rebuilt",
                vec![both(), streams(in_order), streams(within(run(4, 3), 40, 900))],
                within(run(4, 3), 40, 900),
                Whose::Primarys,
            ),
            (
                "it follows to a newer timeline",
                vec![
                    both(),
                    streams(in_order),
                    vec![("s", within(run(3, 4), 20, 900), Standby(true))],
                ],
                within(run(3, 4), 20, 900),
                Whose::Unclear,
            ),
            (
                "it was ahead, and stopped in order",
                vec![vec![("s", within(run(2, 3), 20, 200), Ahead)], streams(in_order)],
                in_order,
                Whose::ItsOwn,
            ),
            (
                "a primary that is a standby of nobody else",
                vec![vec![
                    ("s", within(run(2, 3), 20, 200), Primary),
                    ("s", in_order, Standby(true)),
                ]],
                in_order,
                Whose::Primarys,
            ),
        ];
        for (name, turns, now, expected) in table {
            assert_eq!(after(turns.concat()).whose("s", now, 3), expected, "{name}");
        }
    }

    #[test]
    fn of_too_many_those_on_the_oldest_timeline_are_forgotten() {
        let mut pasts = Pasts::default();
        for number in 0..=NODES_MAX {
            let timeline = if number == 5 { 1 } else { 2 };
            pasts.strays(&format!("n{number}"), run(1, timeline));
        }
        assert_eq!(pasts.0.len(), NODES_MAX);
        assert!(!pasts.0.contains_key("n5"));
    }
}
