//! How each server of a group stands to the primary that is followed, and what the log says of those
//! that do not belong there.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;
use shared::pg::wal::HistoryEntry;
use shared::topology::{Group, NodeState, Role};
use tokio::time::Instant;
use tracing::{error, info, warn};

use crate::rival::Line;

/// A failover or a restart that is over within this is not told …
const SOON: Duration = Duration::from_secs(10);
/// … nor that a standby has not found its new primary yet.
const FOLLOWS_WITHIN: Duration = Duration::from_secs(30);
/// How often it is told again.
const TELL_EVERY: Duration = Duration::from_mins(10);

/// How a server stands to the primary that is followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum Standing {
    /// It is that primary or on its timeline.
    Ok,
    /// It does not answer.
    Unreachable,
    /// It is of another database cluster, and left alone.
    OtherCluster {
        /// Which.
        #[serde(serialize_with = "as_text")]
        system_identifier: u64,
        /// The group's.
        #[serde(serialize_with = "as_text")]
        of_group: u64,
    },
    /// A primary on a lower timeline than the one that the group has reached.
    OldPrimary {
        /// Its timeline.
        timeline: u32,
        /// The group's.
        newest: u32,
    },
    /// A standby that receives the rest of a timeline that the primary has left.
    CatchingUp {
        /// Its timeline.
        timeline: u32,
    },
    /// A standby that receives WAL of a lower timeline than the group's.
    OtherTimeline {
        /// Its timeline.
        timeline: u32,
        /// The group's.
        newest: u32,
    },
    /// A standby on a higher timeline than the primary, and nobody knows where it has that from.
    Ahead {
        /// Its timeline.
        timeline: u32,
        /// The primary's.
        newest: u32,
    },
    /// It cannot be told: no primary was seen yet, or a standby receives nothing.
    Unknown {
        /// Its timeline, or an older one.
        timeline: u32,
        /// The group's.
        newest: Option<u32>,
    },
}

/// Too many digits for a number of JSON.
#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
fn as_text<S: serde::Serializer>(number: &u64, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(number)
}

impl Standing {
    /// All of them, as `/status` and the metrics name them.
    pub const NAMES: [&str; 8] = [
        "ok",
        "unreachable",
        "other_cluster",
        "old_primary",
        "other_timeline",
        "ahead",
        "unknown",
        "catching_up",
    ];

    /// What it is called.
    pub fn name(self) -> &'static str {
        let index = match self {
            Self::Ok => 0,
            Self::Unreachable => 1,
            Self::OtherCluster { .. } => 2,
            Self::OldPrimary { .. } => 3,
            Self::OtherTimeline { .. } => 4,
            Self::Ahead { .. } => 5,
            Self::Unknown { .. } => 6,
            Self::CatchingUp { .. } => 7,
        };
        Self::NAMES[index]
    }

    /// What is wrong with the server, and what to do; `None` if nothing is, or if nobody knows.
    pub fn problem(self) -> Option<String> {
        match self {
            Self::Ok
            | Self::Unreachable
            | Self::CatchingUp { .. }
            | Self::Unknown { newest: None, .. } => None,
            Self::OtherCluster { system_identifier, of_group } => Some(format!(
                "it is of another database cluster, {system_identifier} and not {of_group}, and left alone. \
                 Take it out of the configuration"
            )),
            Self::OldPrimary { timeline, newest } => Some(format!(
                "an old primary that came back: it is a primary on timeline {timeline}, and the group is on \
                 timeline {newest}. Do the applications write to another server? Then stop this one, or make \
                 it a standby (pg_rewind). Do they write to this one? Then stop who is on timeline {newest}, take \
                 it out of the configuration, and remove what it has stored: `backup-agent expire --timeline \
                 {newest}`"
            )),
            Self::OtherTimeline { timeline, newest } => Some(format!(
                "a standby on timeline {timeline}, and the primary is on {newest}: it does not follow, and \
                 its slot is not moved. Its log says why; pg_rewind it, or make it anew"
            )),
            Self::Ahead { timeline, newest } => Some(format!(
                "a standby on timeline {timeline}, ahead of the primary, which is on {newest} and may be an old \
                 one: find the server that this one followed. Until then leave it as it is: it may be the only \
                 one with the newest data"
            )),
            Self::Unknown { timeline, newest: Some(newest) } => Some(format!(
                "a standby that receives from no server. It was last known on timeline {timeline}, and the group \
                 is on {newest}. Does it fetch its WAL (restore_command)? Then nothing is wrong. If not, its log \
                 says why nothing comes"
            )),
        }
    }

    /// How long it lasts before it is told; `None` if it never is.
    fn told_after(self) -> Option<Duration> {
        match self {
            Self::Ok
            | Self::Unreachable
            | Self::CatchingUp { .. }
            | Self::Unknown { newest: None, .. } => None,
            Self::OtherCluster { .. } => Some(Duration::ZERO),
            Self::OldPrimary { .. } => Some(SOON),
            Self::OtherTimeline { .. } | Self::Ahead { .. } | Self::Unknown { .. } => {
                Some(FOLLOWS_WITHIN)
            }
        }
    }
}

/// How the servers stand, if the group is of the database cluster `own` and has reached timeline `newest`. The
/// `line` of a primary tells where it left the timelines before, if that is known.
pub(crate) fn standings(
    group: &Group,
    own: Option<u64>,
    newest: Option<u32>,
    line: Option<Line<'_>>,
) -> BTreeMap<String, Standing> {
    let standing = |observation: &shared::topology::Observation| {
        let Ok(state) = &observation.state else { return Standing::Unreachable };
        let system_identifier = state.system_identifier;
        match own {
            Some(of_group) if of_group != system_identifier => {
                Standing::OtherCluster { system_identifier, of_group }
            }
            _ => on_timeline(state, newest, line.filter(|it| Some(it.timeline) == newest)),
        }
    };
    group.nodes.iter().map(|it| (it.node.name.clone(), standing(it))).collect()
}

fn on_timeline(state: &NodeState, newest: Option<u32>, line: Option<Line<'_>>) -> Standing {
    let timeline = state.timeline;
    let Some(newest) = newest else { return Standing::Unknown { timeline, newest } };
    match state.role {
        _ if timeline == newest => Standing::Ok,
        Role::Primary if timeline < newest => Standing::OldPrimary { timeline, newest },
        Role::Primary => Standing::Ok,
        Role::Standby if timeline > newest => Standing::Ahead { timeline, newest },
        Role::Standby if is_on_its_way(state, line.map_or(&[], |it| it.history)) => {
            Standing::CatchingUp { timeline }
        }
        Role::Standby if state.received_timeline.is_some() => {
            Standing::OtherTimeline { timeline, newest }
        }
        Role::Standby => Standing::Unknown { timeline, newest: Some(newest) },
    }
}

/// Whether a standby receives WAL of the primary's history, before where that timeline was left.
fn is_on_its_way(state: &NodeState, history: &[HistoryEntry]) -> bool {
    let left = history.iter().find(|it| Some(it.timeline) == state.received_timeline);
    left.zip(state.flush_lsn).is_some_and(|(left, flushed)| flushed < left.switch_lsn)
}

/// What was told of the servers.
#[derive(Debug, Default)]
pub(super) struct Told {
    problems: BTreeMap<String, Problem>,
}

#[derive(Debug)]
struct Problem {
    standing: Standing,
    since: Instant,
    told_at: Option<Instant>,
}

impl Told {
    /// Says what lasts, each ten minutes, and what is over.
    pub(super) fn tell(&mut self, servers: &BTreeMap<String, Standing>) {
        for (node, standing) in servers {
            // It may be as it was.
            if matches!(standing, Standing::Unreachable | Standing::Unknown { newest: None, .. }) {
                continue;
            }
            let before = self.problems.remove(node);
            let Some(after) = standing.told_after() else {
                if before.is_some_and(|it| it.told_at.is_some()) {
                    info!(
                        node,
                        "the server is on the primary's timeline and of its database cluster again"
                    );
                }
                continue;
            };
            let now = Instant::now();
            let fresh = Problem { standing: *standing, since: now, told_at: None };
            let same = before.filter(|it| it.standing.name() == standing.name());
            let mut problem = Problem { standing: *standing, ..same.unwrap_or(fresh) };
            let is_due = problem.told_at.is_none_or(|at| at.elapsed() >= TELL_EVERY);
            if problem.since.elapsed() >= after && is_due {
                problem.told_at = Some(now);
                let what = standing.problem().unwrap_or_default();
                match standing {
                    Standing::OtherTimeline { .. } => {
                        warn!(node, problem = what, "a standby does not follow the primary");
                    }
                    Standing::Unknown { .. } => {
                        warn!(node, problem = what, "a standby may not follow the primary");
                    }
                    Standing::Ahead { .. } => {
                        error!(node, problem = what, "a standby is ahead of the primary");
                    }
                    _ => error!(node, problem = what, "a server does not belong in the group"),
                }
            }
            self.problems.insert(node.clone(), problem);
        }
        self.problems.retain(|node, _| servers.contains_key(node));
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::sleep;

    use super::super::cluster::tests::{group, receiving};
    use super::*;

    #[test]
    fn each_server_is_judged_by_what_is_followed() {
        let (p, s) = (Role::Primary, Role::Standby);
        let group = group(&[
            ("a", Some((p, 2, 7))),
            ("b", Some((p, 1, 7))),
            ("c", Some((s, 2, 7))),
            receiving("d", 1),
            ("e", Some((s, 1, 7))),
            ("f", Some((s, 3, 7))),
            ("x", Some((p, 9, 8))),
            ("y", Some((s, 2, 8))),
            ("z", None),
        ]);
        let names = |own, newest| {
            let found = standings(&group, own, newest, None);
            found.values().map(|it| it.name()).collect::<Vec<_>>().join(" ")
        };
        for (case, own, newest, expected) in [
            (
                "a is followed",
                Some(7),
                Some(2),
                "ok old_primary ok other_timeline unknown ahead other_cluster other_cluster unreachable",
            ),
            (
                "it is over, and the one that follows it is away",
                Some(7),
                Some(3),
                "old_primary old_primary unknown other_timeline unknown ok other_cluster other_cluster \
                 unreachable",
            ),
            (
                "no primary was seen yet",
                Some(7),
                None,
                "unknown unknown unknown unknown unknown unknown other_cluster other_cluster unreachable",
            ),
            (
                "nothing is known",
                None,
                None,
                "unknown unknown unknown unknown unknown unknown unknown unknown unreachable",
            ),
        ] {
            assert_eq!(names(own, newest), expected, "{case}");
        }
        for (node, standing) in standings(&group, Some(7), Some(2), None) {
            let is_said = standing.problem().is_some();
            assert_eq!(is_said, !["a", "c", "z"].contains(&node.as_str()), "{node}");
            assert_eq!(is_said, standing.told_after().is_some(), "{node}");
            let is_newest = standing.name() == "ahead";
            let advice = standing.problem().unwrap_or_default();
            assert!(
                !is_newest || !advice.contains("pg_rewind") && !advice.contains("anew"),
                "{advice}"
            );
        }
    }

    /// A large rest of the timeline before takes longer than a failover.
    #[test]
    fn a_standby_that_receives_what_the_primary_left_is_well() {
        let history = [HistoryEntry { timeline: 1, switch_lsn: 100.into(), reason: String::new() }];
        for (case, flushed, timeline, expected) in [
            ("on its way", Some(99), 2, "catching_up"),
            ("it is there, and does not go on", Some(100), 2, "other_timeline"),
            ("beyond", Some(101), 2, "other_timeline"),
            ("it does not say", None, 2, "other_timeline"),
            ("of a primary of before", Some(99), 3, "other_timeline"),
        ] {
            let mut group = group(&[receiving("d", 1)]);
            for state in group.nodes.iter_mut().filter_map(|it| it.state.as_mut().ok()) {
                state.flush_lsn = flushed.map(Into::into);
            }
            let line = Line { timeline: 2, history: &history };
            let found = standings(&group, Some(7), Some(timeline), Some(line))["d"];
            assert_eq!(found.name(), expected, "{case}");
            assert_eq!(found.problem().is_some(), expected != "catching_up", "{case}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_lasts_is_told_once_in_ten_minutes() {
        let mut told = Told::default();
        let mut at = |standing| {
            told.tell(&BTreeMap::from([("b".to_owned(), standing)]));
            told.problems.get("b").and_then(|it| it.told_at)
        };
        let old = Standing::OldPrimary { timeline: 1, newest: 2 };
        assert_eq!(at(old), None, "a failover");
        sleep(SOON).await;
        let first = at(old);
        assert!(first.is_some(), "it lasts");
        sleep(SOON).await;
        assert_eq!(at(old), first, "told a moment ago");
        assert_eq!(at(Standing::Unreachable), first, "nobody knows");
        assert_eq!(
            at(Standing::Unknown { timeline: 1, newest: None }),
            first,
            "nor without a primary"
        );
        sleep(TELL_EVERY).await;
        assert!(at(old) > first, "told long ago");
        assert_eq!(at(Standing::Ok), None, "it is over");
        let other = Standing::OtherCluster { system_identifier: 8, of_group: 7 };
        assert!(at(other).is_some(), "told at once");
    }
}
