//! When WAL was stored, where it says what a restore can reach.
//!
//! The store's times are as old as its copy of an object: a repository that was copied without them
//! would seem to reach until the copy was made. What an object says of itself is copied too.

use std::collections::BTreeSet;

use chrono::{DateTime, Utc};
use futures_util::stream::{self, StreamExt, TryStreamExt};
use shared::pg::wal::{SEGMENT_BYTES_MIN, Segment, WalFile, segment_number};

use super::piece::cover;
use super::{WalMap, kind, object};
use crate::container::Kind;
use crate::repository::{Place, RepositoryError};

/// Objects that are asked at once.
const AT_ONCE: usize = 8;

impl WalMap {
    /// Asks the objects at both ends of each stretch without a gap when they were written, and
    /// believes the store only if it names an earlier time.
    ///
    /// # Errors
    ///
    /// The store could not be asked.
    pub(super) async fn ask_ends(&mut self, place: &Place) -> Result<(), RepositoryError> {
        let ends = self.ends();
        let written_at = |(segment, kind, name): (Segment, Kind, String)| async move {
            match place.sealed_at(kind, &name).await {
                Ok(at) => Ok(at.map(|at| (segment, name, at))),
                Err(error) if error.is_transient() => Err(error),
                // Whoever reads it says what is wrong with it; or it was replaced meanwhile.
                Err(_) => Ok(None),
            }
        };
        let asked = stream::iter(ends.into_iter().map(written_at)).buffer_unordered(AT_ONCE);
        let found: Vec<Option<(Segment, String, DateTime<Utc>)>> = asked.try_collect().await?;
        for (segment, name, at) in found.into_iter().flatten() {
            let timeline = self.segments.get_mut(&segment.timeline);
            for wal in timeline.and_then(|it| it.get_mut(&segment.number)).into_iter().flatten() {
                if wal.name == name {
                    wal.stored_at = wal.stored_at.min(at);
                }
            }
            for piece in self.pieces.get_mut(&segment).into_iter().flatten() {
                if piece.name == name {
                    piece.stored_at = piece.stored_at.min(at);
                }
            }
        }
        Ok(())
    }

    /// Asks when each timeline's history was stored, as [`WalMap::ask_ends`].
    ///
    /// # Errors
    ///
    /// The store could not be asked.
    pub(super) async fn ask_histories(&mut self, place: &Place) -> Result<(), RepositoryError> {
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
            let at = sealed_at.map_or(wal.stored_at, |at| wal.stored_at.min(at));
            // A second one is of another key, and was sealed later.
            let at = self.history_times.get(&timeline).map_or(at, |known| at.min(*known));
            self.history_times.insert(timeline, at);
        }
        Ok(())
    }

    /// The objects at both ends of each stretch, and before the places where timelines were left.
    fn ends(&self) -> Vec<(Segment, Kind, String)> {
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
    fn add_ends(&self, segment: Segment, ends: &mut Vec<(Segment, Kind, String)>) {
        let complete = self.objects(segment);
        ends.extend(complete.iter().map(|it| (segment, kind(&it.file), it.name.clone())));
        if complete.is_empty() {
            let pieces = self.pieces.get(&segment).map_or(&[][..], Vec::as_slice);
            let chain = cover(pieces).chain;
            let rest = chain.get(1..).unwrap_or_default();
            let both = chain.first().into_iter().chain(rest.last());
            ends.extend(both.map(|piece| (segment, Kind::Wal, piece.name.clone())));
        }
    }
}

#[cfg(test)]
mod tests {
    use shared::pg::wal::HistoryEntry;

    use super::*;
    use crate::wal::example::{SEGMENT, stored};

    #[test]
    fn few_objects_of_many_are_asked() {
        let complete: Vec<_> =
            (10..20).chain(30..31).map(|it| (1, it)).chain((17..19).map(|it| (2, it))).collect();
        let mut map = stored(&complete, &[(2, 19, 100)]);
        let of = |map: &WalMap| -> Vec<(u32, u64)> {
            map.ends().into_iter().map(|(it, ..)| (it.timeline, it.number)).collect()
        };
        assert_eq!(of(&map), [(1, 10), (1, 19), (1, 30), (2, 17), (2, 19)]);

        let switch_lsn = (17 * SEGMENT + 5).into();
        let entry = HistoryEntry { timeline: 1, switch_lsn, reason: String::new() };
        map.histories.insert(2, vec![entry]);
        assert_eq!(of(&map), [(1, 10), (1, 16), (1, 19), (1, 30), (2, 17), (2, 19)]);
        assert!(stored(&[], &[]).ends().is_empty());
    }
}
