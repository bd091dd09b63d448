//! Stored timelines that are not the database's: a copy was restored with `--archive-mode preserve` and
//! promoted beside its server, and archives into the server's own repository. Pure.
//!
//! Which timeline is the database's, its primary tells. An old primary that came back says the same, so its
//! word alone is not enough to remove another timeline: what is stored must show that the primary went on
//! beside it, or a person says so.

use chrono::{DateTime, TimeDelta, Utc};
use shared::pg::wal::HistoryEntry;
use thiserror::Error;
use tokio_postgres::types::PgLsn;

use crate::quantities::time;
use crate::wal::WalMap;

/// Whoever stored something so short a time ago counts as running.
pub const QUIET_MIN: TimeDelta = TimeDelta::minutes(2);

/// The timeline that a primary writes, and those before it by its own history.
#[derive(Clone, Copy, Debug)]
pub struct Line<'a> {
    /// The timeline.
    pub timeline: u32,
    /// The timelines before, oldest first.
    pub history: &'a [HistoryEntry],
}

impl<'a> From<&'a (u32, Vec<HistoryEntry>)> for Line<'a> {
    fn from((timeline, history): &'a (u32, Vec<HistoryEntry>)) -> Self {
        Self { timeline: *timeline, history }
    }
}

impl<'a> Line<'a> {
    /// The timelines of which the line has anything, each with what is before it.
    pub(crate) fn parts(self) -> impl Iterator<Item = (u32, &'a [HistoryEntry])> {
        let began = move |at: usize| at.checked_sub(1).and_then(|it| self.history.get(it));
        let has_part = move |(at, entry): &(usize, &HistoryEntry)| {
            // One that was left where it began, or before, only has a number.
            began(*at).is_none_or(|began| began.switch_lsn < entry.switch_lsn)
        };
        let before = self.history.iter().enumerate().filter(has_part);
        let before = before.map(|(at, entry)| (entry.timeline, &self.history[..at]));
        before.chain([(self.timeline, self.history)])
    }

    /// Whether what is stored of a timeline is of this line. Without a stored history the number tells.
    pub fn has(self, stored: &WalMap, timeline: u32) -> bool {
        let mut parts = self.parts();
        parts.any(|(it, before)| it == timeline && is_stored(stored, timeline, before))
    }

    /// A timeline of the line of which another server's history is stored: where that began, and where
    /// the line says that it did.
    pub fn contradicted(self, stored: &WalMap) -> Option<(u32, Option<PgLsn>, Option<PgLsn>)> {
        let place = |history: &[HistoryEntry]| history.last().map(|entry| entry.switch_lsn);
        let mut parts = self.parts();
        parts.find_map(|(timeline, before)| {
            let other = stored.histories.get(&timeline)?;
            (!is_stored(stored, timeline, before)).then(|| (timeline, place(other), place(before)))
        })
    }

    /// Whether WAL of this line, from beyond where another timeline left it, was stored after a moment.
    fn goes_on(self, stored: &WalMap, beside: u32, after: DateTime<Utc>) -> bool {
        self.parts().filter(|(it, _)| *it != beside && self.has(stored, *it)).any(|(it, _)| {
            let from_lsn = stored.left_at(beside, it);
            let entry = self.history.iter().find(|entry| entry.timeline == it);
            entry.is_none_or(|entry| from_lsn < Some(entry.switch_lsn))
                && stored.end_of(it) > from_lsn
                && stored.last_stored(it) > Some(after)
        })
    }
}

/// Whether the stored history of a timeline says the same as another one; none contradicts nothing.
fn is_stored(stored: &WalMap, timeline: u32, history: &[HistoryEntry]) -> bool {
    let places = |history: &[HistoryEntry]| -> Vec<(u32, PgLsn)> {
        history.iter().map(|entry| (entry.timeline, entry.switch_lsn)).collect()
    };
    stored.histories.get(&timeline).is_none_or(|own| places(own) == places(history))
}

/// A stored timeline that is not the primary's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rival {
    /// The timeline.
    pub timeline: u32,
    /// The timeline that it left, and where; `None` if nothing tells.
    pub left: Option<(u32, PgLsn)>,
    /// When it had begun; `None` if nothing tells.
    pub since: Option<DateTime<Utc>>,
    /// Whether the primary's own WAL is refused because of it, or will be.
    pub blocks: bool,
}

/// The stored timelines beside a primary's. One that a restore or a failover gave up is none: nothing of it
/// was stored since the primary's had begun.
pub fn rivals(stored: &WalMap, line: Line<'_>) -> Vec<Rival> {
    let began_at = stored.began_by(line.timeline);
    let lives = |timeline: u32| began_at.is_some() && stored.last_stored(timeline) > began_at;
    let others = stored.timelines().into_iter().filter(|it| !line.has(stored, *it));
    let rival = |timeline: u32| Rival {
        timeline,
        left: stored.began(timeline).map(|entry| (entry.timeline, entry.switch_lsn)),
        since: stored.began_by(timeline),
        blocks: timeline >= line.timeline || line.parts().any(|(it, _)| it == timeline),
    };
    others.map(rival).filter(|rival| rival.blocks || lives(rival.timeline)).collect()
}

/// A timeline that is to be removed.
#[derive(Clone, Copy, Debug)]
pub struct Asked {
    /// The timeline.
    pub timeline: u32,
    /// When the first of it was stored, by the store's clock.
    pub first_stored_at: DateTime<Utc>,
    /// When the last of it was stored, by the store's clock.
    pub last_stored_at: DateTime<Utc>,
    /// What the store's clock says, if it is to be removed now.
    pub now: Option<DateTime<Utc>>,
    /// Somebody knows that the primary is the database.
    pub force: bool,
}

/// Why a timeline stays.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Stays {
    /// The primary writes it.
    #[error(
        "it is the one that the primary writes. If the primary is not the database, correct [[nodes]] or \
         [patroni] in the configuration"
    )]
    Written,
    /// The primary's history has it.
    #[error(
        "it leads to timeline {primary}, which the primary writes: no backup of it could be restored \
         without. What nothing needs any more goes with `backup-agent expire --apply`"
    )]
    OnTheWay {
        /// What the primary writes.
        primary: u32,
    },
    /// Another one came from it.
    #[error(
        "timeline {by} is stored, which came from it. If that is not the database's either, remove it \
         first: `backup-agent expire --timeline {by}`"
    )]
    Branched {
        /// The other one.
        by: u32,
    },
    /// It may be the database.
    #[error(
        "nothing shows that it is a copy's: nothing that the primary wrote beside it was stored since it \
         began, at {}. The primary may be an old one that came back, and this the database. If the \
         applications write to the primary, say so with --force", time(*.began_at)
    )]
    Unproven {
        /// When the first of it was stored.
        began_at: DateTime<Utc>,
    },
    /// Its server runs.
    #[error(
        "its server is running: something of it was stored {} s ago, at {}. Stop that server, or give it \
         another cluster name; {} min later this can be done", .ago.num_seconds(), time(*.at),
        QUIET_MIN.num_minutes()
    )]
    Lives {
        /// When the last of it was stored.
        at: DateTime<Utc>,
        /// How long ago that is.
        ago: TimeDelta,
    },
}

/// Whether a timeline may be removed beside a primary.
///
/// # Errors
///
/// Why it stays.
pub fn may_go(stored: &WalMap, line: Line<'_>, asked: Asked) -> Result<(), Stays> {
    let Asked { timeline, first_stored_at: began_at, last_stored_at: at, now, force } = asked;
    let primary = line.timeline;
    if line.has(stored, timeline) {
        return Err(if timeline == primary { Stays::Written } else { Stays::OnTheWay { primary } });
    }
    let came_from = |(other, history): (&u32, &Vec<HistoryEntry>)| {
        let other = Line { timeline: *other, history };
        (other.timeline != timeline && other.has(stored, timeline)).then_some(other.timeline)
    };
    if let Some(by) = stored.histories.iter().find_map(came_from) {
        return Err(Stays::Branched { by });
    }
    if !force && !line.goes_on(stored, timeline, began_at) {
        return Err(Stays::Unproven { began_at });
    }
    match now.map(|now| now - at).filter(|ago| *ago < QUIET_MIN) {
        Some(ago) => Err(Stays::Lives { at, ago }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recovery::tests::{at, later, map};

    /// The timelines that a history names, and the segment in which each was left.
    fn history(entries: &[(u32, u64)]) -> Vec<HistoryEntry> {
        map(&[], &[(9, entries)]).histories.remove(&9).unwrap()
    }

    /// Segments 2 to 20 of timeline 1, and 6 to 8 of timeline 2, which left it in segment 6; each was stored
    /// in the minute of its number, of timeline 2 so many minutes later.
    fn copied(minutes: i64) -> WalMap {
        let timelines = [(1, (2..20).collect()), (2, (6..8).collect())];
        later(map(&timelines, &[(2, &[(1, 6)])]), 2, minutes)
    }

    /// The way to timeline 4 passes 3, which both have left 1 in segment 10; of 2, which left it in 6, the
    /// primary has only the number, or something.
    fn moved_on() -> WalMap {
        let timelines = [(1, (2..11).collect()), (2, vec![6, 7]), (3, vec![10, 11, 12])];
        map(&timelines, &[(2, &[(1, 6)]), (3, &[(1, 10)])])
    }

    #[test]
    fn a_stored_timeline_is_the_primarys_if_the_primarys_history_has_it() {
        let falling =
            map(&[(1, vec![2]), (2, vec![10])], &[(2, &[(1, 10)]), (3, &[(1, 6), (2, 6)])]);
        let unknown = map(&[(1, vec![2]), (2, vec![6])], &[]);
        for (case, stored, timeline, entries, expected) in [
            ("the first", copied(0), 1, &[][..], &[1][..]),
            ("after a failover", copied(0), 2, &[(1, 6)], &[1, 2]),
            ("its own of that number", copied(0), 2, &[(1, 15)], &[1]),
            ("past the copy's number", copied(0), 3, &[(1, 15)], &[1, 3]),
            ("past its own of that number", copied(0), 3, &[(1, 15), (2, 18)], &[1, 3]),
            ("two failovers", moved_on(), 4, &[(1, 10), (3, 12)], &[1, 3, 4]),
            ("restored twice, to ever earlier", falling, 3, &[(1, 6), (2, 6)], &[1, 3]),
            ("no history is stored", unknown, 2, &[(1, 6)], &[1, 2]),
        ] {
            let entries = history(entries);
            let line = Line { timeline, history: &entries };
            let found: Vec<u32> = (1..5).filter(|it| line.has(&stored, *it)).collect();
            assert_eq!(found, expected, "{case}");
        }
    }

    #[test]
    fn a_rival_is_told_as_soon_as_it_is_stored() {
        let begun = |minute| {
            let mut map = map(&[(1, (2..20).collect())], &[(2, &[(1, 6)])]);
            map.history_times.insert(2, at(minute));
            map
        };
        // The primary's timeline 3 began in minute 12.
        let beside = |minutes| {
            let timelines = [(1, (2..13).collect()), (2, vec![6, 7]), (3, (12..20).collect())];
            later(map(&timelines, &[(2, &[(1, 6)]), (3, &[(1, 12)])]), 2, minutes)
        };
        for (case, stored, timeline, entries, expected) in [
            ("nothing but its own", map(&[(1, vec![2])], &[]), 1, &[][..], &[][..]),
            ("a copy", copied(0), 1, &[], &[(2, Some(6), true)]),
            ("a copy of which the history is stored", begun(7), 1, &[], &[(2, Some(7), true)]),
            ("a failover", copied(20), 2, &[(1, 6)], &[]),
            ("a failover, nothing stored yet", map(&[(1, vec![2])], &[]), 2, &[(1, 2)], &[]),
            ("its own of that number", copied(0), 2, &[(1, 15)], &[(2, Some(6), true)]),
            ("past its own of it", copied(0), 3, &[(1, 15), (2, 18)], &[(2, Some(6), true)]),
            ("past the copy's number", beside(20), 3, &[(1, 12)], &[(2, Some(26), false)]),
            ("given up before it began", beside(0), 3, &[(1, 12)], &[]),
        ] {
            let entries = history(entries);
            let found = rivals(&stored, Line { timeline, history: &entries });
            let found: Vec<_> = found.iter().map(|it| (it.timeline, it.since, it.blocks)).collect();
            let expected: Vec<_> =
                expected.iter().map(|(it, since, blocks)| (*it, since.map(at), *blocks)).collect();
            assert_eq!(found, expected, "{case}");
        }
        let found = rivals(&copied(0), Line { timeline: 1, history: &[] });
        assert_eq!(found[0].left.map(|(left, _)| left), Some(1));
    }

    #[test]
    fn only_what_is_not_the_primarys_goes_and_only_when_that_is_shown() {
        let two = |timelines: &[(u32, u64)]| {
            let mut map = copied(0);
            map.segments.insert(3, map.segments[&2].clone());
            map.histories.insert(3, history(timelines));
            map
        };
        // The primary was gone when timeline 2 began, in minute 26; what it had beyond that was stored.
        let failed_over = copied(20);
        let given_up = Stays::Unproven { began_at: at(26) };
        let lives = Stays::Lives { at: at(7), ago: TimeDelta::minutes(1) };
        let way = |primary| Some(Stays::OnTheWay { primary });
        let quiet = Some(at(30));
        for (case, stored, timeline, (primary, entries), now, force, expected) in [
            ("a copy", copied(0), 2, (1, &[][..]), quiet, false, None),
            ("a copy, for a look", copied(0), 2, (1, &[]), None, false, None),
            ("a copy that runs", copied(0), 2, (1, &[]), Some(at(8)), false, Some(lives.clone())),
            ("a copy that runs", copied(0), 2, (1, &[]), Some(at(8)), true, Some(lives)),
            ("for a look, while it runs", copied(0), 2, (1, &[]), None, false, None),
            ("a copy that ran a moment ago", copied(0), 2, (1, &[]), Some(at(9)), false, None),
            ("what the primary writes", copied(0), 1, (1, &[]), quiet, true, Some(Stays::Written)),
            (
                "what it writes since",
                copied(0),
                2,
                (2, &[(1, 6)]),
                quiet,
                true,
                Some(Stays::Written),
            ),
            ("what it came from", copied(0), 1, (2, &[(1, 6)]), quiet, true, way(2)),
            ("its own 2 began elsewhere", copied(0), 2, (2, &[(1, 15)]), quiet, false, None),
            ("and was left", copied(0), 2, (3, &[(1, 15), (2, 18)]), quiet, false, None),
            ("and came from 1", copied(0), 1, (2, &[(1, 15)]), quiet, true, way(2)),
            ("an old primary", failed_over.clone(), 2, (1, &[]), quiet, false, Some(given_up)),
            ("that is none", failed_over, 2, (1, &[]), quiet, true, None),
            (
                "another came from it",
                two(&[(1, 6), (2, 7)]),
                2,
                (1, &[]),
                quiet,
                true,
                Some(Stays::Branched { by: 3 }),
            ),
            ("the other", two(&[(1, 6), (2, 7)]), 3, (1, &[]), quiet, false, None),
            (
                "another came from its namesake",
                two(&[(1, 9), (2, 12)]),
                2,
                (1, &[]),
                quiet,
                false,
                None,
            ),
            ("another beside it", two(&[(1, 6)]), 2, (1, &[]), quiet, false, None),
        ] {
            let entries = history(entries);
            let line = Line { timeline: primary, history: &entries };
            let asked = Asked {
                timeline,
                first_stored_at: stored.began_by(timeline).unwrap(),
                last_stored_at: stored.last_stored(timeline).unwrap(),
                now,
                force,
            };
            assert_eq!(may_go(&stored, line, asked).err(), expected, "{case}");
        }
    }
}
