//! Which timeline is the database cluster's own, what leads to it, and what was left behind. Pure.
//!
//! The way to a timeline is its history: the timelines before it, each up to where it was left. A
//! backup leads to a timeline if it ended on the way there. WAL that is stored of a timeline beyond
//! where the way left it is left behind: by a failover or a restore to an earlier moment, and then it
//! is nobody's database any more; or it is a server's that lives on beside a copy of it.
//!
//! The cluster's own timeline is the one that its primary writes. Where no primary is known, it is the
//! newest of which WAL is stored, unless WAL that is not on the way there was stored later. One of which
//! only the history is stored may be it, too: its first WAL is on its way.

use std::cmp::Reverse;
use std::collections::BTreeSet;

use chrono::{DateTime, Utc};
use shared::pg::wal::{HistoryEntry, Segment, segment_number};
use thiserror::Error;
use tokio_postgres::types::PgLsn;

use super::WalMap;
use super::piece::cover;
use crate::manifest::Commit;

/// More than one timeline may be the cluster's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error(
    "timeline {newest} is the newest, and WAL of timeline {other}, which is not on the way there, was \
     stored later: a copy was promoted beside its server, or an old primary is back. Say which one is \
     the database with --target-timeline {other} or --target-timeline {newest}; what a copy has stored is \
     removed by `backup-agent expire --timeline`"
)]
pub struct Rivals {
    /// The newest timeline.
    pub newest: u32,
    /// One of which WAL was stored later.
    pub other: u32,
}

/// WAL that the way to a timeline does not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeftBehind {
    /// Its timeline.
    pub timeline: u32,
    /// Where the way left that timeline.
    pub from_lsn: PgLsn,
    /// How far it is stored.
    pub until_lsn: PgLsn,
}

/// Where a time lies on the way to a timeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// On it, as far as anything tells.
    OnTheWay,
    /// On this earlier timeline, before the way left it.
    Before(u32),
    /// On this timeline, in what was left behind: the next one on the way had not begun.
    LeftBehind(u32),
}

impl WalMap {
    /// The timelines that may be the cluster's own, first the newest of which WAL is stored; `primary` is
    /// what its primary writes. Of a timeline that has just begun no WAL is stored: then the one before
    /// counts.
    pub fn candidates(&self, primary: Option<u32>) -> Vec<u32> {
        if let Some(primary) = primary.filter(|it| self.end_of(*it).is_some()) {
            return vec![primary];
        }
        let Some(newest) = self.newest_with_wal() else { return Vec::new() };
        let is_rival = |timeline: &u32| {
            *timeline != newest
                && self.last_stored(*timeline) > self.last_stored(newest)
                && self.end_of(*timeline) > self.left_at(newest, *timeline)
        };
        let rivals = self.with_wal().into_iter().rev().filter(is_rival);
        let begun =
            self.histories.keys().rev().copied().filter(|it| self.began_beside(*it, newest));
        [newest].into_iter().chain(rivals).chain(begun).collect()
    }

    /// Whether a timeline of which only the history is stored has left another one that lived on: WAL of
    /// that, beyond where it was left, was stored later.
    fn began_beside(&self, timeline: u32, other: u32) -> bool {
        let began_at = self.history_times.get(&timeline).copied();
        self.end_of(timeline).is_none()
            && self.left_at(timeline, other).is_some_and(|left| Some(left) < self.end_of(other))
            && began_at.is_some_and(|at| Some(at) < self.last_stored(other))
    }

    /// The cluster's own timeline; `None` if no WAL is stored.
    ///
    /// # Errors
    ///
    /// More than one may be.
    pub fn own(&self, primary: Option<u32>) -> Result<Option<u32>, Rivals> {
        let mut candidates = self.candidates(primary);
        candidates.sort_unstable_by_key(|timeline| Reverse(*timeline));
        match candidates[..] {
            [] => Ok(None),
            [own] => Ok(Some(own)),
            [newest, other, ..] => Err(Rivals { newest, other }),
        }
    }

    /// The timelines of which WAL is stored, oldest first.
    pub fn with_wal(&self) -> Vec<u32> {
        let complete = self.segments.iter().filter(|(_, numbers)| !numbers.is_empty());
        let mut timelines: Vec<u32> = complete.map(|(timeline, _)| *timeline).collect();
        timelines.extend(self.pieces.keys().map(|segment| segment.timeline));
        timelines.sort_unstable();
        timelines.dedup();
        timelines
    }

    /// The newest timeline of which WAL is stored.
    pub fn newest_with_wal(&self) -> Option<u32> {
        self.with_wal().last().copied()
    }

    /// The timelines of which WAL or a history is stored, oldest first.
    pub fn timelines(&self) -> BTreeSet<u32> {
        self.with_wal().into_iter().chain(self.histories.keys().copied()).collect()
    }

    /// The newest timeline of which WAL or a history is stored.
    pub fn newest_stored(&self) -> Option<u32> {
        self.newest_with_wal().max(self.histories.keys().copied().max())
    }

    /// When WAL of a timeline was last stored.
    pub fn last_stored(&self, timeline: u32) -> Option<DateTime<Utc>> {
        let complete = self.segments.get(&timeline).and_then(|it| it.last_key_value());
        let complete = complete.into_iter().flat_map(|(_, objects)| objects);
        let pieces = self.pieces.iter().rfind(|(segment, _)| segment.timeline == timeline);
        let piece =
            pieces.and_then(|(_, pieces)| cover(pieces).chain.last().map(|it| it.stored_at));
        complete.map(|wal| wal.stored_at).max().max(piece)
    }

    /// Whether a recovery from a backup can follow a timeline: the backup ended on the way there.
    pub fn leads(&self, backup: &Commit, timeline: u32) -> bool {
        let left = |entry: &HistoryEntry| {
            entry.timeline == backup.timeline && entry.switch_lsn >= backup.end_lsn
        };
        timeline == backup.timeline || self.way(timeline).iter().any(left)
    }

    /// The timeline that a recovery from a backup follows: the cluster's `own`, or one that branched off
    /// it and of which no WAL is stored yet; or the newest to which the backup leads if that is another.
    pub fn followed(&self, backup: &Commit, own: Option<u32>) -> u32 {
        let led_to = |timeline: &u32| self.leads(backup, *timeline);
        let Some(own) = own.filter(led_to) else {
            let newest = self.histories.keys().copied().filter(led_to).max();
            return newest.unwrap_or(backup.timeline);
        };
        let has_begun = |timeline: &u32| {
            self.end_of(*timeline).is_none()
                && self.left_at(*timeline, own).is_some()
                && !self.began_beside(*timeline, own)
        };
        let begun = self.histories.keys().copied().filter(|it| led_to(it) && has_begun(it));
        begun.max().unwrap_or(own)
    }

    /// The timelines before one, each with where the way left it.
    pub(super) fn way(&self, timeline: u32) -> &[HistoryEntry] {
        self.histories.get(&timeline).map_or(&[], Vec::as_slice)
    }

    /// The timeline that the way to `timeline` has at a position.
    pub fn on_the_way(&self, timeline: u32, lsn: PgLsn) -> u32 {
        let entry = self.way(timeline).iter().find(|entry| lsn < entry.switch_lsn);
        entry.map_or(timeline, |entry| entry.timeline)
    }

    /// Where a timeline began: the timeline that has the byte before, and the first byte after it.
    pub fn began(&self, timeline: u32) -> Option<&HistoryEntry> {
        let way = self.way(timeline);
        // Those after it, if any, have nothing on this way.
        way.iter().find(|entry| Some(entry.switch_lsn) == way.last().map(|last| last.switch_lsn))
    }

    /// Where the way to `timeline` left another; `None` if that is not on it at all.
    pub fn left_at(&self, timeline: u32, other: u32) -> Option<PgLsn> {
        let entry = self.way(timeline).iter().find(|entry| entry.timeline == other);
        entry.map(|entry| entry.switch_lsn)
    }

    /// What goes on of the timelines that the way to `timeline` has left, oldest first. After a failover
    /// it is little or nothing.
    pub fn left_behind(&self, timeline: u32) -> impl Iterator<Item = LeftBehind> {
        self.way(timeline).iter().filter_map(|entry| {
            let HistoryEntry { timeline, switch_lsn: from_lsn, .. } = *entry;
            let until_lsn = self.end_of(timeline).filter(|end| from_lsn < *end)?;
            Some(LeftBehind { timeline, from_lsn, until_lsn })
        })
    }

    /// Where a time lies on the way to `timeline`, by the times at which WAL was stored. Only where
    /// something was left behind can a time mean two things.
    pub fn moment(&self, timeline: u32, at: DateTime<Utc>) -> Moment {
        for left in self.left_behind(timeline) {
            if Some(at) <= self.stored_before(left.timeline, left.from_lsn) {
                return Moment::Before(left.timeline);
            }
            let next = self.on_the_way(timeline, left.from_lsn);
            if self.began_by(next).is_some_and(|began| at < began) {
                // It may be of yet another that was left, by two restores to ever earlier moments.
                let has_begun = |it: &u32| *it < next && self.began_by(*it) <= Some(at);
                let newest = self.with_wal().into_iter().rfind(has_begun);
                return Moment::LeftBehind(newest.unwrap_or(left.timeline));
            }
        }
        Moment::OnTheWay
    }

    /// When the last WAL of a timeline that ends at or before a position was stored.
    fn stored_before(&self, timeline: u32, lsn: PgLsn) -> Option<DateTime<Utc>> {
        let number = segment_number(lsn, self.segment_bytes);
        let pieces = self.pieces.get(&Segment { timeline, number }).map_or(&[][..], Vec::as_slice);
        let offset = u64::from(lsn) % self.segment_bytes;
        let piece = cover(pieces).chain.into_iter().rfind(|piece| piece.to <= offset);
        let before = Segment { timeline, number: number.checked_sub(1)? };
        let complete = self.objects(before).iter().map(|wal| wal.stored_at).max();
        piece.map(|piece| piece.stored_at).or(complete)
    }

    /// When a timeline had begun: its history or its first WAL was stored.
    pub fn began_by(&self, timeline: u32) -> Option<DateTime<Utc>> {
        let number = self.numbers(timeline).min();
        let first = number.map(|number| Segment { timeline, number });
        let complete = first.and_then(|it| self.objects(it).first()).map(|wal| wal.stored_at);
        let pieces = first.and_then(|it| self.pieces.get(&it)).map_or(&[][..], Vec::as_slice);
        let piece = cover(pieces).chain.first().map(|piece| piece.stored_at);
        let history = self.history_times.get(&timeline).copied();
        [complete, piece, history].into_iter().flatten().min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recovery::tests::{at, backup, later, lsn, map};

    /// A server on timeline 1, restored to segment 10 (timeline 2), and then to segment 6; the history
    /// as PostgreSQL writes it if that followed timeline 2.
    fn restored_twice() -> WalMap {
        let timelines = [(1, (2..20).collect()), (2, (10..16).collect()), (3, (6..9).collect())];
        let histories: &[(u32, &[(u32, u64)])] = &[(2, &[(1, 10)]), (3, &[(1, 6), (2, 6)])];
        later(later(map(&timelines, histories), 2, 20), 3, 50)
    }

    /// Restored to segment 6, and then a standby was promoted.
    fn restored_and_failed_over() -> WalMap {
        let timelines = [(1, (2..20).collect()), (2, (6..12).collect()), (3, (12..15).collect())];
        let histories: &[(u32, &[(u32, u64)])] = &[(2, &[(1, 6)]), (3, &[(1, 6), (2, 12)])];
        later(later(map(&timelines, histories), 2, 20), 3, 20)
    }

    /// A copy was promoted in segment 6 while the server lived on.
    fn copied() -> WalMap {
        let timelines = [(1, (2..20).collect()), (2, (6..8).collect())];
        later(map(&timelines, &[(2, &[(1, 6)])]), 2, 3)
    }

    #[test]
    fn the_clusters_own_timeline_is_its_primarys_or_the_newest_unless_another_lives() {
        let rivals = Err(Rivals { newest: 2, other: 1 });
        let failed_over = map(&[(1, vec![2, 3]), (2, vec![4])], &[(2, &[(1, 3)])]);
        // The new primary archived the rest of the old timeline after its own first segment.
        let late = later(map(&[(1, vec![2]), (2, vec![3])], &[(2, &[(1, 3)])]), 1, 10);
        let unknown = map(&[(1, vec![2]), (2, vec![3])], &[]);
        for (case, wal, primary, expected) in [
            ("nothing is stored", map(&[], &[]), None, Ok(None)),
            ("nothing is stored, there is a primary", map(&[], &[]), Some(1), Ok(None)),
            ("one", map(&[(1, vec![2])], &[]), None, Ok(Some(1))),
            ("a failover", failed_over.clone(), None, Ok(Some(2))),
            ("a failover, nothing stored yet", failed_over, Some(3), Ok(Some(2))),
            ("WAL of the way, stored late", late, None, Ok(Some(2))),
            ("a timeline without a history", unknown, None, Ok(Some(2))),
            ("restored twice", restored_twice(), None, Ok(Some(3))),
            ("restored and failed over", restored_and_failed_over(), None, Ok(Some(3))),
            ("a copy", copied(), None, rivals),
            ("a copy beside the primary", copied(), Some(1), Ok(Some(1))),
            ("a copy that is the primary", copied(), Some(2), Ok(Some(2))),
        ] {
            assert_eq!(wal.own(primary), expected, "{case}");
        }
    }

    /// A history is stored at once, the first WAL when there is some. Whoever followed the copy would be
    /// without what the server has written since.
    #[test]
    fn a_timeline_of_which_only_the_history_is_stored_is_followed_unless_the_other_lives_on() {
        let rivals = Err(Rivals { newest: 2, other: 1 });
        let backup = backup(1, 2, false);
        for (case, end, minute, own, followed) in [
            ("a failover", 6, 5, Ok(Some(1)), 2),
            ("a failover that lost WAL", 9, 12, Ok(Some(1)), 2),
            ("a copy, while the server is idle", 6, 12, Ok(Some(1)), 2),
            ("a copy beside its server", 9, 7, rivals, 1),
        ] {
            // Timeline 2 began in segment 6; each segment was stored in the minute of its number.
            let mut wal = map(&[(1, (2..end).collect())], &[(2, &[(1, 6)])]);
            wal.history_times.insert(2, at(minute));
            assert_eq!(wal.own(None), own, "{case}");
            assert_eq!(wal.followed(&backup, Some(1)), followed, "{case}");
            assert_eq!(wal.own(Some(1)), Ok(Some(1)), "{case}");
        }
    }

    #[test]
    fn a_backup_leads_to_the_timelines_on_whose_way_it_ended() {
        let (one, three) = (map(&[(1, vec![2])], &[]), restored_twice());
        // A backup (timeline, first segment) ends two segments after its first.
        for (case, wal, backup, leads, followed) in [
            ("the only timeline", &one, backup(1, 2, false), vec![1], 1),
            ("before both restores", &three, backup(1, 2, false), vec![1, 2, 3], 3),
            ("before the first of them", &three, backup(1, 7, false), vec![1, 2], 2),
            ("of what the first gave up", &three, backup(1, 12, false), vec![1], 1),
            ("of what the second gave up", &three, backup(2, 11, false), vec![2], 2),
            ("of what lives", &three, backup(3, 6, false), vec![3], 3),
        ] {
            let found: Vec<u32> = (1..4).filter(|it| wal.leads(&backup, *it)).collect();
            assert_eq!(found, leads, "{case}");
            let own = wal.own(None).unwrap();
            assert_eq!(wal.followed(&backup, own), followed, "{case}");
        }
        // A standby was promoted: its history is stored, and nothing else of it yet.
        let begun = map(&[(1, (2..9).collect())], &[(2, &[(1, 8)])]);
        assert_eq!(begun.followed(&backup(1, 2, false), Some(1)), 2);
        assert_eq!(begun.followed(&backup(1, 7, false), Some(1)), 1);
    }

    #[test]
    fn the_way_to_a_timeline_passes_over_what_it_left() {
        let wal = restored_twice();
        let began = wal.began(3).unwrap();
        assert_eq!((began.timeline, u64::from(began.switch_lsn)), (1, u64::from(lsn(6)) + 100));
        assert_eq!(wal.began(1), None);
        for (segment, expected) in [(2, 1), (6, 1), (7, 3), (12, 3)] {
            assert_eq!(wal.on_the_way(3, lsn(segment)), expected, "{segment}");
        }
        let left = |wal: &WalMap, timeline| -> Vec<(u32, PgLsn)> {
            wal.left_behind(timeline).map(|it| (it.timeline, it.until_lsn)).collect()
        };
        assert_eq!(left(&wal, 3), [(1, lsn(20)), (2, lsn(16))]);
        assert_eq!(left(&wal, 2), [(1, lsn(20))]);
        assert_eq!(left(&restored_and_failed_over(), 3), [(1, lsn(20))]);
    }

    /// Each segment was stored in the minute of its number, of timeline 2 later by 20, of 3 by 50 or 20.
    #[test]
    fn a_time_of_what_was_left_behind_is_told_from_one_on_the_way() {
        let (twice, failed_over) = (restored_twice(), restored_and_failed_over());
        for (case, wal, timeline, minute, expected) in [
            ("before both restores", &twice, 3, 5, Moment::Before(1)),
            ("what both gave up", &twice, 3, 10, Moment::LeftBehind(1)),
            ("what the second gave up", &twice, 3, 33, Moment::LeftBehind(2)),
            ("what lives", &twice, 3, 56, Moment::OnTheWay),
            ("before the first restore, on the way to 2", &twice, 2, 9, Moment::Before(1)),
            ("what the first gave up, on the way to 2", &twice, 2, 15, Moment::LeftBehind(1)),
            ("the second, on the way to 2", &twice, 2, 33, Moment::OnTheWay),
            ("there is only one", &twice, 1, 10, Moment::OnTheWay),
            ("between restore and failover", &failed_over, 3, 28, Moment::OnTheWay),
            ("before the restore", &failed_over, 3, 4, Moment::Before(1)),
            ("given up by the restore", &failed_over, 3, 15, Moment::LeftBehind(1)),
            ("after the failover", &failed_over, 3, 33, Moment::OnTheWay),
        ] {
            assert_eq!(wal.moment(timeline, at(minute)), expected, "{case}");
        }
        let mut idle = twice;
        idle.history_times.insert(3, at(40));
        assert_eq!(idle.moment(3, at(45)), Moment::OnTheWay, "before its first segment was full");
    }
}
