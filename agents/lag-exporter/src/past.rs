//! Whose WAL a node has, where its timeline does not tell: remembered over its restarts, and over
//! those of this agent.
//!
//! Two servers may write the same timeline, and a primary may come back without its newest WAL.
//! What a server alone has stays in its directory when it is restarted, and it then says of itself
//! what any standby does. It has been rebuilt if it goes on to replay what it streams: a record names
//! the one before it, so the WAL of another history does not fit. One thing looks the same: if the
//! server begins its replay before its own WAL, and its receiver has laid the primary's over that.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use crate::observation::{Identity, Sample};

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
}

impl Run {
    /// The run of whoever answered.
    pub fn of(sample: &Sample, timeline: u32) -> Self {
        let Identity { system_identifier, started_at, .. } = sample.identity;
        Self { system_identifier, timeline, started_at }
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
        let goes_on = past.strayed.filter(|it| is_other(it) || *it == run);
        *past = Past { wrote: Some(run), strayed: has_rival.then_some(run).or(goes_on) };
    }

    /// Takes in that a standby has replayed what the primary has not.
    pub fn strays(&mut self, name: &str, run: Run) {
        self.of(name).strayed = Some(run);
    }

    /// Takes in that a node is a standby, and whether it has replayed what it streamed.
    pub fn follows(&mut self, name: &str, run: Run, has_streamed: bool) {
        let Some(past) = self.0.get_mut(name) else { return };
        let is_over = |it: &mut Run| {
            it.system_identifier != run.system_identifier
                || it.timeline < run.timeline
                || (it.started_at != run.started_at && has_streamed)
        };
        past.wrote.take_if(is_over);
        past.strayed.take_if(is_over);
        if *past == Past::default() {
            self.0.remove(name);
        }
    }

    /// Whose WAL a standby has, on `run`'s timeline, where the primary writes `timeline`.
    pub fn whose(&self, name: &str, run: Run, timeline: u32) -> Whose {
        let strayed = self.0.get(name).and_then(|past| past.strayed);
        let is_same =
            |it: &Run| (it.system_identifier, it.timeline) == (run.system_identifier, run.timeline);
        match strayed.filter(is_same) {
            None => Whose::Primarys,
            Some(strayed) if strayed == run && run.timeline == timeline => Whose::ItsOwn,
            Some(_) => Whose::Unclear,
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
        Run { system_identifier: 7, timeline, started_at }
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
            let mut pasts = Pasts::default();
            for (node, run, is) in turns {
                match is {
                    Primary => pasts.writes(node, run),
                    Ahead => pasts.strays(node, run),
                    Standby(has_streamed) => pasts.follows(node, run, has_streamed),
                }
            }
            assert_eq!(pasts.whose("s", now, 3), expected, "{name}");
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
