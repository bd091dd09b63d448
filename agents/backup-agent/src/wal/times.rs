//! When WAL was stored, where it says what a restore can reach.
//!
//! The store's times are as old as its copy of an object: a repository that was copied without them
//! would seem to reach until the copy was made. What an object says of itself is copied too. A copy may
//! have older times as well: no WAL was stored before a backup began whose start lies before its end.

use std::collections::BTreeSet;

use chrono::{DateTime, Utc};
use futures_util::stream::{self, StreamExt, TryStreamExt};
use shared::pg::wal::{SEGMENT_BYTES_MIN, Segment, WalFile, segment_number};

use tokio_postgres::types::PgLsn;

use super::piece::cover;
use super::{WalMap, kind, object};
use crate::container::Kind;
use crate::manifest::BackupId;
use crate::repository::{Place, RepositoryError};

/// Objects that are asked at once.
const AT_ONCE: usize = 8;

/// An object at the end of a stretch without a gap.
#[derive(Debug)]
struct End {
    segment: Segment,
    kind: Kind,
    name: String,
    /// Where its WAL ends, exclusive.
    until_lsn: PgLsn,
    stored_at: DateTime<Utc>,
}

/// When a backup began, on which timeline, and where: as its name says.
pub(super) type Begun = (DateTime<Utc>, u32, PgLsn);

impl WalMap {
    /// Asks the objects at both ends of each stretch without a gap when they were written, and
    /// believes the store only if it names an earlier time that can be true.
    ///
    /// # Errors
    ///
    /// The store could not be asked.
    pub(super) async fn ask_ends(
        &mut self,
        place: &Place,
        backups: &[Begun],
    ) -> Result<(), RepositoryError> {
        let written_at = |end: End| async move {
            match place.sealed_at(end.kind, &end.name).await {
                Ok(at) => Ok(at.map(|at| (end, at))),
                Err(error) if error.is_transient() => Err(error),
                // Whoever reads it says what is wrong with it; or it was replaced meanwhile.
                Err(_) => Ok(None),
            }
        };
        let asked = stream::iter(self.ends().into_iter().map(written_at)).buffer_unordered(AT_ONCE);
        let found: Vec<Option<(End, DateTime<Utc>)>> = asked.try_collect().await?;
        for (end, sealed_at) in found.into_iter().flatten() {
            let after = self.begun_before(backups, end.segment.timeline, end.until_lsn);
            let at = believed(end.stored_at, sealed_at, after);
            let timeline = self.segments.get_mut(&end.segment.timeline);
            let complete = timeline.and_then(|it| it.get_mut(&end.segment.number));
            for wal in complete.into_iter().flatten().filter(|it| it.name == end.name) {
                wal.stored_at = at;
            }
            let pieces = self.pieces.get_mut(&end.segment);
            for piece in pieces.into_iter().flatten().filter(|it| it.name == end.name) {
                piece.stored_at = at;
            }
        }
        Ok(())
    }

    /// Asks when each timeline's history was stored, as [`WalMap::ask_ends`].
    ///
    /// # Errors
    ///
    /// The store could not be asked.
    pub(super) async fn ask_histories(
        &mut self,
        place: &Place,
        backups: &[Begun],
    ) -> Result<(), RepositoryError> {
        for wal in place.list("history/", None, None).await?.into_iter().filter_map(object) {
            // The size of a segment does not matter to the name of a history file.
            let Ok(WalFile::History { timeline }) = WalFile::parse(&wal.file, SEGMENT_BYTES_MIN)
            else {
                continue;
            };
            let sealed_at = match place.sealed_at(Kind::History, &wal.name).await {
                Ok(at) => at,
                Err(error) if error.is_transient() => return Err(error),
                Err(_) => None,
            };
            let left = self.began(timeline).map(|entry| entry.switch_lsn);
            let after = left.and_then(|left| self.begun_before(backups, timeline, left));
            let at = sealed_at.map_or(wal.stored_at, |at| believed(wal.stored_at, at, after));
            // A second one is of another key, and was sealed later.
            let at = self.history_times.get(&timeline).map_or(at, |known| at.min(*known));
            self.history_times.insert(timeline, at);
        }
        Ok(())
    }

    /// When the last backup began whose start is before a position on the way to a timeline: the WAL that
    /// ends there was stored later.
    fn begun_before(&self, backups: &[Begun], timeline: u32, lsn: PgLsn) -> Option<DateTime<Utc>> {
        let before = backups.iter().filter(|(_, on, start_lsn)| {
            *start_lsn < lsn && self.on_the_way(timeline, *start_lsn) == *on
        });
        before.map(|(at, ..)| *at).max()
    }

    /// The objects at both ends of each stretch, and before the places where timelines were left.
    fn ends(&self) -> Vec<End> {
        let mut timelines: BTreeSet<u32> = self.segments.keys().copied().collect();
        timelines.extend(self.pieces.keys().map(|segment| segment.timeline));
        let left = self.histories.values().flatten();
        let left: BTreeSet<Segment> = left
            .map(|entry| {
                let number = segment_number(entry.switch_lsn, self.segment_bytes);
                Segment { timeline: entry.timeline, number }
            })
            .collect();
        let mut ends = Vec::new();
        for timeline in timelines {
            let numbers: BTreeSet<u64> = self.numbers(timeline).collect();
            for number in &numbers {
                let is_first = number.checked_sub(1).is_none_or(|it| !numbers.contains(&it));
                let next = Segment { timeline, number: number + 1 };
                let is_last = !numbers.contains(&next.number) || left.contains(&next);
                if is_first || is_last {
                    self.add_ends(Segment { timeline, number: *number }, &mut ends);
                }
            }
        }
        ends
    }

    /// Adds the objects of a segment; of pieces the first and the last.
    fn add_ends(&self, segment: Segment, ends: &mut Vec<End>) {
        let start = segment.number * self.segment_bytes;
        let end = |kind, name: &String, to, stored_at| {
            let (name, until_lsn) = (name.clone(), PgLsn::from(start + to));
            End { segment, kind, name, until_lsn, stored_at }
        };
        let complete = self.objects(segment);
        let whole = complete
            .iter()
            .map(|it| end(kind(&it.file), &it.name, self.segment_bytes, it.stored_at));
        ends.extend(whole);
        if complete.is_empty() {
            let pieces = self.pieces.get(&segment).map_or(&[][..], Vec::as_slice);
            let chain = cover(pieces).chain;
            let rest = chain.get(1..).unwrap_or_default();
            let both = chain.first().into_iter().chain(rest.last());
            ends.extend(both.map(|it| end(Kind::Wal, &it.name, it.to, it.stored_at)));
        }
    }
}

/// The backups that there are or were begun.
pub(super) async fn backups(place: &Place) -> Result<Vec<Begun>, RepositoryError> {
    let ids = place.list_folders("base/").await?;
    let ids = ids.into_iter().filter_map(|id| id.parse::<BackupId>().ok());
    let begun = |id: BackupId| {
        let (timeline, start_lsn) = id.start();
        Some((id.started_at()?, timeline, start_lsn))
    };
    Ok(ids.filter_map(begun).collect())
}

/// When an object was stored, by the store's time and its own, if that was after a backup had begun. The
/// earlier one, because a clock may have been ahead; but one before that was made up by a copy.
fn believed(
    stored_at: DateTime<Utc>,
    sealed_at: DateTime<Utc>,
    after: Option<DateTime<Utc>>,
) -> DateTime<Utc> {
    let is_possible = after.is_none_or(|after| after <= stored_at);
    if is_possible { stored_at.min(sealed_at) } else { sealed_at }
}

#[cfg(test)]
mod tests {
    use shared::pg::wal::HistoryEntry;

    use super::*;
    use crate::wal::example::{SEGMENT, at, stored};

    #[test]
    fn few_objects_of_many_are_asked() {
        let complete: Vec<_> =
            (10..20).chain(30..31).map(|it| (1, it)).chain((17..19).map(|it| (2, it))).collect();
        let mut map = stored(&complete, &[(2, 19, 100)]);
        let of = |map: &WalMap| -> Vec<(u32, u64)> {
            let segments = map.ends().into_iter().map(|end| end.segment);
            segments.map(|it| (it.timeline, it.number)).collect()
        };
        assert_eq!(of(&map), [(1, 10), (1, 19), (1, 30), (2, 17), (2, 19)]);

        let switch_lsn = (17 * SEGMENT + 5).into();
        let entry = HistoryEntry { timeline: 1, switch_lsn, reason: String::new() };
        map.histories.insert(2, vec![entry]);
        assert_eq!(of(&map), [(1, 10), (1, 16), (1, 19), (1, 30), (2, 17), (2, 19)]);
        assert!(stored(&[], &[]).ends().is_empty());
    }

    #[test]
    fn the_store_is_believed_only_if_what_it_says_can_be() {
        for (case, stored, sealed, after, expected) in [
            ("both say the same", 100, 100, Some(50), 100),
            ("copied later without its times", 900, 100, Some(50), 100),
            ("sealed by a clock that was ahead", 100, 900, Some(50), 100),
            ("copied with older times", 10, 100, Some(50), 100),
            ("no backup tells", 10, 100, None, 10),
            ("in the moment in which the backup began", 50, 100, Some(50), 50),
        ] {
            let found = believed(at(stored), at(sealed), after.map(at));
            assert_eq!(found, at(expected), "{case}");
        }
    }

    /// Timeline 2 began in segment 17; each backup (second, timeline, segment) starts with a segment.
    #[test]
    fn wal_was_stored_after_the_backups_that_start_before_it_had_begun() {
        let mut map = stored(&[], &[]);
        let lsn = |segment: u64| PgLsn::from(segment * SEGMENT);
        let entry = HistoryEntry { timeline: 1, switch_lsn: lsn(17), reason: String::new() };
        map.histories.insert(2, vec![entry]);
        let backups = [(10, 1, 5), (20, 1, 15), (40, 1, 25), (50, 2, 30)];
        let backups = backups.map(|(second, timeline, it)| (at(second), timeline, lsn(it)));
        for (case, timeline, segment, expected) in [
            ("before all", 1, 4, None),
            ("where the first starts", 1, 5, None),
            ("after the first", 1, 6, Some(10)),
            ("after the second, on its timeline", 1, 17, Some(20)),
            ("beyond where the timeline was left", 1, 26, Some(40)),
            ("the timeline after it, which has nothing of that", 2, 26, Some(20)),
            ("its own backup", 2, 31, Some(50)),
            ("of nobody", 3, 31, None),
        ] {
            let found = map.begun_before(&backups, timeline, lsn(segment));
            assert_eq!(found, expected.map(at), "{case}");
        }
    }
}
