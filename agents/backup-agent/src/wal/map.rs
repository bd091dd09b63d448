//! The map of a place's WAL, and what a recovery reaches on it.

use std::collections::{BTreeMap, BTreeSet};

use chrono::{DateTime, Utc};
use futures_util::stream::{self, StreamExt, TryStreamExt};
use shared::pg::wal::{HistoryEntry, Segment, WalFile, segment_number};
use shared::telemetry::chain;
use tokio_postgres::types::PgLsn;
use tracing::warn;

use super::followed;
use super::piece::{self, Pieces};
use super::times;
use super::{WalError, WalObject, fetch_history, find, list_some, object, stem};
use crate::manifest::Commit;
use crate::repository::{Place, RepositoryError};

/// Histories that are read at once.
pub(super) const AT_ONCE: usize = 8;

/// All WAL of one database cluster in the repository, as far as names tell.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WalMap {
    /// Bytes of a segment.
    pub segment_bytes: u64,
    /// Per timeline, the segments by number; more than one object is a conflict.
    pub segments: BTreeMap<u32, BTreeMap<u64, Vec<WalObject>>>,
    /// The pieces of segments that are not complete.
    pub pieces: Pieces,
    /// Per timeline, where it comes from.
    pub histories: BTreeMap<u32, Vec<HistoryEntry>>,
    /// When the histories were stored, where all was read.
    pub history_times: BTreeMap<u32, DateTime<Utc>>,
    /// The timelines from whose primary was received, where that was read.
    pub followed: BTreeSet<u32>,
    /// Names of objects among the complete segments that are none.
    pub strange: Vec<String>,
    /// Objects that do not open, of segments of which another one does.
    pub unopened: Vec<WalObject>,
    /// Pieces that differ from the complete segment beside them, as far as they were compared.
    pub different: BTreeMap<Segment, Vec<String>>,
}

/// Where a recovery from a backup would stop, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reach {
    /// The timeline that recovery follows.
    pub timeline: u32,
    /// The end of the last segment that can be replayed, exclusive.
    pub until_lsn: PgLsn,
    /// When that segment was stored: no commit in it is younger. `None` if there is no segment.
    pub until: Option<DateTime<Utc>>,
    /// What is after it.
    pub then: Then,
}

/// What is after the last segment that can be replayed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Then {
    /// Nothing: it is the newest.
    End,
    /// A missing segment; there is WAL after it.
    Gap {
        /// The first missing segment's name.
        segment: String,
    },
    /// A segment that is there with two contents.
    Conflict {
        /// Its name.
        segment: String,
    },
}

impl WalMap {
    /// Lists the WAL of a place. `segment_bytes` is the cluster's `wal_segment_size`.
    ///
    /// # Errors
    ///
    /// The store could not be asked, or a history file is damaged.
    pub async fn read(place: &Place, segment_bytes: u64) -> Result<Self, WalError> {
        let mut map = Self { segment_bytes, ..Self::default() };
        // Before the complete segments, which take their place: what is completed meanwhile is in
        // one of the two lists.
        map.pieces = piece::list(place, segment_bytes).await?;
        for info in place.list("wal/", None, None).await? {
            let name = info.key.clone();
            if !object(info).is_some_and(|wal| map.add(wal)) {
                map.strange.push(name);
            }
        }
        map.leave_out_unopened(place).await?;
        // What cannot be read is told by whoever reads it.
        drop(map.compare(place).await?);
        map.histories = histories(place).await?;
        let backups = times::backups(place).await?;
        map.ask_ends(place, &backups).await?;
        map.ask_histories(place, &backups).await?;
        Ok(map)
    }

    /// Lists what tells where receiving goes on: of the complete segments those from `lsn` on, or from
    /// where the server's `history` left their timeline, and of each timeline some before and the
    /// newest. So a large repository takes no longer than a small one.
    ///
    /// # Errors
    ///
    /// As [`WalMap::read`].
    pub async fn read_from(
        place: &Place,
        segment_bytes: u64,
        lsn: PgLsn,
        history: &[HistoryEntry],
    ) -> Result<Self, WalError> {
        let mut folders = BTreeMap::new();
        for timeline in place.list_folders("wal/").await? {
            let Ok(number) = u32::from_str_radix(&timeline, 16) else { continue };
            let left = history.iter().find(|entry| entry.timeline == number);
            let from = left.map_or(lsn, |entry| lsn.min(entry.switch_lsn));
            let first = Segment { timeline: number, number: segment_number(from, segment_bytes) };
            let first = first.name(segment_bytes)[..16].to_owned();
            let there = place.list_folders(&format!("wal/{timeline}/")).await?;
            let before = there.iter().rev().find(|it| **it < first).cloned();
            folders.insert(number, (before, there));
        }
        let before = folders.iter();
        let before = before.filter_map(|(timeline, (it, _))| Some((*timeline, it.clone()?)));
        let first: BTreeMap<u32, String> = before.collect();
        // Before the complete segments, as in `read`.
        let mut pieces = piece::list_since(place, segment_bytes, &first).await?;
        // What is before those of its timeline tells nothing about where to go on.
        pieces.retain(|segment, _| {
            let first = first.get(&segment.timeline);
            first.is_none_or(|first| segment.name(segment_bytes)[..16] >= **first)
        });
        let mut map = Self { segment_bytes, pieces, ..Self::default() };
        for (timeline, (before, folders)) in folders {
            map.add_from(place, timeline, before.as_ref(), &folders).await?;
        }
        let growing = map.pieces.keys().copied().filter(|it| map.objects(*it).is_empty());
        for segment in growing.collect::<Vec<_>>() {
            for wal in find(place, &segment.name(segment_bytes)).await? {
                map.add(wal);
            }
        }
        map.leave_out_unopened(place).await?;
        map.histories = histories(place).await?;
        map.followed = followed::list(place).await?;
        Ok(map)
    }

    /// Lists the WAL from `lsn` on, of every timeline, and the newest of each.
    ///
    /// # Errors
    ///
    /// As [`WalMap::read`].
    pub async fn read_since(
        place: &Place,
        segment_bytes: u64,
        lsn: PgLsn,
    ) -> Result<Self, WalError> {
        let mut map = Self::read_from(place, segment_bytes, lsn, &[]).await?;
        drop(map.compare(place).await?);
        map.ask_ends(place, &times::backups(place).await?).await?;
        Ok(map)
    }

    /// Lists the newest WAL of each timeline, and all histories with their times.
    ///
    /// # Errors
    ///
    /// As [`WalMap::read`].
    pub async fn read_newest(place: &Place, segment_bytes: u64) -> Result<Self, WalError> {
        let last = PgLsn::from(u64::MAX);
        let mut map = Self::read_from(place, segment_bytes, last, &[]).await?;
        map.ask_histories(place, &times::backups(place).await?).await?;
        Ok(map)
    }

    /// Lists the complete segments of a timeline from the folder `first` on, of all its `folders` without
    /// one; or if that is empty, from the last before it that is not.
    async fn add_from(
        &mut self,
        place: &Place,
        timeline: u32,
        first: Option<&String>,
        folders: &[String],
    ) -> Result<(), WalError> {
        let prefix = format!("wal/{timeline:08X}/");
        let before = folders.iter().rev().skip_while(|folder| Some(*folder) > first);
        for folder in before.chain(folders.first()) {
            let folder = format!("{prefix}{folder}/");
            let listed = place.list(&prefix, Some(&folder), None).await?;
            let is_empty = listed.first().is_none_or(|info| !info.key.starts_with(&folder));
            for wal in listed.into_iter().filter_map(object) {
                self.add(wal);
            }
            // Where a directory is the store, one that was just made may be empty.
            if !is_empty {
                break;
            }
        }
        Ok(())
    }

    /// Lists what tells about one segment: its own objects, those of the timeline before, a few that
    /// come after, and all pieces and histories.
    ///
    /// # Errors
    ///
    /// As [`WalMap::read`].
    pub async fn around(
        place: &Place,
        segment: Segment,
        segment_bytes: u64,
    ) -> Result<Self, WalError> {
        let pieces = pieces_since(place, segment, segment_bytes).await?;
        let histories = histories(place).await?;
        let mut map = Self { segment_bytes, pieces, histories, ..Self::default() };
        let parent = map.parent(segment).map(|(parent, _)| parent);
        for near in [Some(segment), parent].into_iter().flatten() {
            let prefix = format!("wal/{:08X}/", near.timeline);
            let first = stem(&near.name(segment_bytes));
            for wal in list_some(place, &prefix, &first, Some(4)).await? {
                map.add(wal);
            }
        }
        map.leave_out_unopened(place).await?;
        Ok(map)
    }

    /// Takes a complete segment in; returns whether it is one.
    fn add(&mut self, wal: WalObject) -> bool {
        let Ok(WalFile::Segment(segment)) = WalFile::parse(&wal.file, self.segment_bytes) else {
            return false;
        };
        let timeline = self.segments.entry(segment.timeline).or_default();
        let objects = timeline.entry(segment.number).or_default();
        // Two lists may both have it.
        if !objects.contains(&wal) {
            objects.push(wal);
        }
        true
    }

    /// How much of a segment is stored, from its first byte on: all of it if it is complete.
    pub fn covered(&self, segment: Segment) -> u64 {
        let complete = self.segments.get(&segment.timeline);
        if complete.is_some_and(|timeline| timeline.contains_key(&segment.number)) {
            return self.segment_bytes;
        }
        self.pieces.get(&segment).map_or(0, |pieces| piece::cover(pieces).to)
    }

    /// Complete segments of which there are pieces still: whoever stored them was stopped there.
    pub fn superseded(&self) -> impl Iterator<Item = Segment> {
        let complete = |segment: &Segment| {
            let timeline = self.segments.get(&segment.timeline);
            timeline.is_some_and(|timeline| timeline.contains_key(&segment.number))
        };
        self.pieces.keys().copied().filter(complete)
    }

    /// The objects of a complete segment.
    pub fn objects(&self, segment: Segment) -> &[WalObject] {
        let timeline = self.segments.get(&segment.timeline);
        timeline.and_then(|it| it.get(&segment.number)).map_or(&[], Vec::as_slice)
    }

    /// Takes a complete segment for one that is not there, because it is damaged.
    pub fn disregard(&mut self, segment: Segment) {
        if let Some(timeline) = self.segments.get_mut(&segment.timeline) {
            timeline.remove(&segment.number);
        }
    }

    /// How much of a segment a recovery can have: what is stored of it; or, of the segment in which
    /// its timeline began, the beginning that it has in common with the timeline before.
    pub fn within_reach(&self, segment: Segment) -> u64 {
        let own = self.covered(segment);
        let Some((parent, common)) = self.parent(segment).filter(|(_, common)| own < *common)
        else {
            return own;
        };
        own.max(self.covered(parent).min(common))
    }

    /// The same segment on the timeline before, if `segment` is the one in which its timeline
    /// began, and how many bytes the two have in common.
    pub fn parent(&self, segment: Segment) -> Option<(Segment, u64)> {
        let entry = self.began(segment.timeline)?;
        let begins_here = segment_number(entry.switch_lsn, self.segment_bytes) == segment.number;
        let parent = Segment { timeline: entry.timeline, ..segment };
        begins_here.then_some((parent, u64::from(entry.switch_lsn) % self.segment_bytes))
    }

    /// What proves that a segment, of which the first `covered` bytes are stored, was longer.
    pub fn goes_on(&self, segment: Segment, covered: u64) -> Option<String> {
        let Segment { timeline, number } = segment;
        if let Some(later) = self.numbers(timeline).filter(|later| *later > number).min() {
            let later = Segment { timeline, number: later }.name(self.segment_bytes);
            return Some(format!("{later} is stored, which is after it"));
        }
        let end = number * self.segment_bytes + covered;
        let left =
            |entry: &&HistoryEntry| entry.timeline == timeline && u64::from(entry.switch_lsn) > end;
        self.histories.iter().find_map(|(child, history)| {
            let entry = history.iter().find(left)?;
            Some(format!("timeline {child} branched off it at {}", entry.switch_lsn))
        })
    }

    /// Whether another timeline left this one after what is stored of a segment: then `wal-fetch` does not hand
    /// it over, nor says that it is the end.
    fn went_on(&self, segment: Segment) -> bool {
        // Of the segment in which it was left, the other timeline has a copy.
        let bytes = match self.within_reach(segment) {
            0 => self.segment_bytes,
            covered => covered + 1,
        };
        let end = segment.number * self.segment_bytes + bytes;
        let mut left =
            self.histories.values().flatten().filter(|it| it.timeline == segment.timeline);
        left.any(|entry| u64::from(entry.switch_lsn) >= end)
    }

    /// The numbers of the segments of a timeline of which anything is stored, not in order.
    pub fn numbers(&self, timeline: u32) -> impl Iterator<Item = u64> {
        let complete = self.segments.get(&timeline).into_iter().flat_map(BTreeMap::keys).copied();
        let of_timeline = move |segment: &&Segment| segment.timeline == timeline;
        complete.chain(self.pieces.keys().filter(of_timeline).map(|segment| segment.number))
    }

    /// Where the stored WAL of a timeline ends, gaps or not; `None` if there is none.
    pub fn end_of(&self, timeline: u32) -> Option<PgLsn> {
        let number = self.numbers(timeline).max()?;
        let covered = self.covered(Segment { timeline, number });
        Some((number * self.segment_bytes + covered).into())
    }

    /// Follows the WAL of a backup along the timeline `target` as far as it goes without a gap.
    ///
    /// `None` if `target` does not branch off the backup's timeline after the backup's end: what
    /// branched off before knows nothing of what the backup may hold.
    pub fn reach(&self, backup: &Commit, target: u32) -> Option<Reach> {
        if !self.leads(backup, target) {
            return None;
        }
        let history = self.way(target);
        let mut number = segment_number(backup.start_lsn, self.segment_bytes);
        let mut until = None;
        loop {
            // The segment in which a timeline ends is read from the timeline after it, which
            // begins with a copy.
            let on = history
                .iter()
                .find(|entry| number < segment_number(entry.switch_lsn, self.segment_bytes))
                .map_or(target, |entry| entry.timeline);
            let found = self.segments.get(&on).and_then(|timeline| timeline.get(&number));
            let segment = Segment { timeline: on, number };
            let name = || segment.name(self.segment_bytes);
            let pieces = self.pieces.get(&segment).map_or(&[][..], Vec::as_slice);
            let cover = piece::cover(pieces);
            let then = match found.map(Vec::as_slice) {
                Some([_]) if self.conflict(segment).is_some() => Then::Conflict { segment: name() },
                Some([wal]) => {
                    until = Some(wal.stored_at);
                    number += 1;
                    continue;
                }
                Some([_, _, ..]) => Then::Conflict { segment: name() },
                Some([]) | None if cover.furthest > cover.to => Then::Gap { segment: name() },
                Some([]) | None if self.went_on(segment) => Then::Gap { segment: name() },
                Some([]) | None if self.is_beyond(target, history, segment) => Then::End,
                Some([]) | None => Then::Gap { segment: name() },
            };
            let conflict = matches!(then, Then::Conflict { .. });
            if !conflict {
                until = cover.chain.last().map(|piece| piece.stored_at).or(until);
            }
            let more = if conflict { 0 } else { self.within_reach(segment) };
            let until_lsn = PgLsn::from(number * self.segment_bytes + more);
            return Some(Reach { timeline: target, until_lsn, until, then });
        }
    }

    /// Tells whether WAL is stored after what is missing where a recovery ends: otherwise it may be on
    /// its way.
    pub fn goes_on_after(&self, reach: &Reach) -> bool {
        let Reach { timeline: target, until_lsn, .. } = *reach;
        let history = self.way(target);
        let number = segment_number(until_lsn, self.segment_bytes);
        let on = self.on_the_way(target, until_lsn);
        !self.is_beyond(target, history, Segment { timeline: on, number })
    }

    /// Tells whether nothing is stored after a segment, which is not complete, on the way to
    /// `target`.
    fn is_beyond(&self, target: u32, history: &[HistoryEntry], segment: Segment) -> bool {
        let Segment { timeline: on, number } = segment;
        let later = history.iter().map(|entry| entry.timeline).chain([target]);
        let last_allowed =
            |timeline| if timeline == on { number } else { number.saturating_sub(1) };
        later
            .filter(|timeline| *timeline >= on)
            .all(|timeline| self.numbers(timeline).all(|it| it <= last_allowed(timeline)))
    }
}

/// Lists the pieces from about a segment on, on its timeline and those before.
pub(super) async fn pieces_since(
    place: &Place,
    segment: Segment,
    segment_bytes: u64,
) -> Result<Pieces, RepositoryError> {
    let first = |timeline| Segment { timeline, ..segment }.name(segment_bytes)[..16].to_owned();
    let first = (1..=segment.timeline).map(|timeline| (timeline, first(timeline))).collect();
    piece::list_since(place, segment_bytes, &first).await
}

/// Reads every timeline history in the repository that a configured key opens.
pub(super) async fn histories(place: &Place) -> Result<BTreeMap<u32, Vec<HistoryEntry>>, WalError> {
    // Those of one content are sealed with different keys.
    let mut objects = BTreeMap::<_, Vec<WalObject>>::new();
    for wal in place.list("history/", None, None).await?.into_iter().filter_map(object) {
        // The size of a segment does not matter to the name of a history file.
        if let Ok(WalFile::History { timeline }) = WalFile::parse(&wal.file, 1 << 20) {
            objects.entry((timeline, wal.hash.clone())).or_default().push(wal);
        }
    }
    let read = |((timeline, _), objects): (_, Vec<WalObject>)| async move {
        let mut locked = None;
        for wal in objects {
            match fetch_history(place, &wal).await {
                Err(error) if error.is_locked() => locked = Some(error),
                history => return Ok((timeline, Ok(history?))),
            }
        }
        Ok::<_, WalError>((timeline, Err(locked)))
    };
    let read = stream::iter(objects.into_iter().map(read)).buffered(AT_ONCE);
    let read: Vec<(u32, Result<_, Option<WalError>>)> = read.try_collect().await?;
    let (mut histories, mut locked) = (BTreeMap::new(), BTreeMap::new());
    for (timeline, history) in read {
        match history {
            Ok(history) => drop(histories.insert(timeline, history)),
            Err(error) => drop(locked.insert(timeline, error)),
        }
    }
    for (timeline, error) in locked.iter().filter(|(it, _)| !histories.contains_key(it)) {
        let error = error.as_ref().map(|error| chain(error).to_string());
        warn!(timeline, error, "history left out: what is on its timeline leads nowhere");
    }
    Ok(histories)
}
