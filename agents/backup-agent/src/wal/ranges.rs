//! The stored WAL as ranges without a gap. Pure.

use chrono::{DateTime, Utc};
use shared::pg::wal::{HistoryEntry, Segment, segment_number};
use tokio_postgres::types::PgLsn;

use super::piece::cover;
use super::{Gap, WalMap};

/// WAL of one timeline that is stored without a gap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Range {
    /// The timeline.
    pub timeline: u32,
    /// Its first byte.
    pub from_lsn: PgLsn,
    /// The first byte after it.
    pub until_lsn: PgLsn,
    /// Complete segments.
    pub segments: u64,
    /// Bytes in the store.
    pub object_bytes: u64,
    /// When its first object was stored: nothing before is younger. `None` if it is empty.
    pub from: Option<DateTime<Utc>>,
    /// When its last object was stored: nothing in it is younger. `None` if it is empty.
    pub until: Option<DateTime<Utc>>,
    /// What is after it.
    pub next: Next,
}

/// What is after a range.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// Nothing is stored after it: it is the newest of its timeline.
    Newest,
    /// Later timelines branched off in it or at its end: which, and where.
    Timelines(Vec<(u32, PgLsn)>),
    /// A later timeline branched off after it, and nothing is stored of what is between, nor of that
    /// timeline: it is to come, or lost.
    Unended {
        /// The timeline.
        timeline: u32,
        /// Where.
        switch_lsn: PgLsn,
    },
    /// WAL is missing, and goes on later.
    Gap {
        /// Where it goes on.
        until_lsn: PgLsn,
        /// Why, if that was recorded.
        reason: Option<String>,
    },
    /// A segment has two contents.
    Conflict {
        /// Its name.
        segment: String,
        /// Where it ends.
        until_lsn: PgLsn,
    },
    /// WAL is missing that nothing needs, and goes on later: the retention has removed it.
    Expired {
        /// Where it goes on.
        until_lsn: PgLsn,
    },
}

/// The ranges of all timelines, oldest timeline first. `gaps` are those that were recorded; `is_spare`
/// tells the segments that nothing needs.
pub fn ranges(map: &WalMap, gaps: &[Gap], is_spare: impl Fn(Segment) -> bool) -> Vec<Range> {
    let ranges = map.with_wal().into_iter().flat_map(|timeline| of_timeline(map, timeline, gaps));
    let mut ranges: Vec<_> = ranges.collect();
    for range in &mut ranges {
        let (Next::Gap { until_lsn, .. } | Next::Unended { switch_lsn: until_lsn, .. }) =
            range.next
        else {
            continue;
        };
        let number = |lsn: PgLsn| u64::from(lsn) / map.segment_bytes;
        let mut missing = number(range.until_lsn)..number(until_lsn);
        let across = across(map, range).filter(|(_, begins)| *begins == until_lsn);
        let segment = |number| {
            let lsn = PgLsn::from((number + 1) * map.segment_bytes - 1);
            let timeline = across.map_or(range.timeline, |(child, _)| map.on_the_way(child, lsn));
            Segment { timeline, number }
        };
        if !missing.is_empty() && missing.all(|number| is_spare(segment(number))) {
            range.next = Next::Expired { until_lsn };
        }
    }
    // What was removed before a timeline's first is nothing to tell.
    ranges.retain(|range| range.from_lsn < range.until_lsn || range.is_broken());
    ranges
}

fn of_timeline(map: &WalMap, timeline: u32, gaps: &[Gap]) -> Vec<Range> {
    let mut numbers: Vec<u64> = map.numbers(timeline).collect();
    numbers.sort_unstable();
    numbers.dedup();
    let mut ranges: Vec<Range> = Vec::new();
    for number in numbers {
        let segment = Segment { timeline, number };
        let mut stretch = stretch(map, segment);
        if map.conflict(segment).is_some() {
            let (segment, until_lsn) = (segment.name(map.segment_bytes), stretch.until_lsn);
            let next = Next::Conflict { segment, until_lsn };
            stretch = Range { segments: 0, object_bytes: 0, from: None, until: None, ..stretch };
            match ranges.last_mut() {
                Some(last) if last.until_lsn == stretch.from_lsn => last.next = next,
                last => {
                    if let Some(last) = last {
                        last.next = gap(last, stretch.from_lsn, gaps);
                    }
                    let until_lsn = stretch.from_lsn;
                    ranges.push(Range { until_lsn, next, ..stretch.clone() });
                }
            }
            // What goes on after it.
            ranges.push(Range { from_lsn: until_lsn, ..stretch });
            continue;
        }
        match ranges.last_mut() {
            Some(last) if last.until_lsn == stretch.from_lsn => last.extend(&stretch),
            last => {
                if let Some(last) = last {
                    last.next = gap(last, stretch.from_lsn, gaps);
                }
                ranges.push(stretch);
            }
        }
    }
    if let Some(last) = ranges.last_mut() {
        let missing = beyond(map, timeline, last.until_lsn);
        last.next = match missing.or(across(map, last).map(|(_, begins)| begins)) {
            Some(until_lsn) => gap(last, until_lsn, gaps),
            None => branches(map, last),
        };
    }
    if let Some(before) = before_first(map, timeline, ranges.first(), gaps) {
        ranges.insert(0, before);
    }
    ranges.retain(|range| range.from_lsn < range.until_lsn || range.is_broken());
    ranges
}

/// Where a timeline's stored WAL begins, and the position at which it began if that is before.
fn late(map: &WalMap, timeline: u32) -> Option<(PgLsn, Option<PgLsn>)> {
    let first = PgLsn::from(map.numbers(timeline).min()? * map.segment_bytes);
    let switch_lsn = map.began(timeline)?.switch_lsn;
    Some((first, Some(switch_lsn).filter(|it| *it < first)))
}

/// The timeline that began after the end of a range, its timeline's last, and where its stored WAL begins:
/// what is between is missing.
fn across(map: &WalMap, range: &Range) -> Option<(u32, PgLsn)> {
    map.histories.keys().find_map(|child| {
        let left = map.began(*child).filter(|entry| entry.timeline == range.timeline)?;
        let (first, _) = late(map, *child)?;
        let is_missing = range.until_lsn < left.switch_lsn.min(first);
        is_missing.then_some((*child, first))
    })
}

/// An empty range where a timeline began, if what is stored of it begins later, and WAL up to there is
/// stored: otherwise that of the timeline before says what is missing.
fn before_first(map: &WalMap, timeline: u32, first: Option<&Range>, gaps: &[Gap]) -> Option<Range> {
    let (begins, Some(switch_lsn)) = late(map, timeline)? else { return None };
    let parent = map.began(timeline)?.timeline;
    let is_told = map.end_of(parent).is_some_and(|end| end < switch_lsn);
    let first = first.filter(|_| !is_told)?;
    let mut range = Range {
        from_lsn: switch_lsn,
        until_lsn: switch_lsn,
        segments: 0,
        object_bytes: 0,
        from: None,
        until: None,
        ..first.clone()
    };
    range.next = gap(&range, begins, gaps);
    Some(range)
}

/// Where a timeline's pieces go on after `until_lsn`, its end, if one is missing there.
fn beyond(map: &WalMap, timeline: u32, until_lsn: PgLsn) -> Option<PgLsn> {
    let of_timeline = map.pieces.values().flatten().filter(|it| it.segment.timeline == timeline);
    let starts = of_timeline.map(|it| (it.segment.number * map.segment_bytes + it.from).into());
    starts.filter(|start| until_lsn < *start).min()
}

/// What is stored of one segment, from its first byte on.
fn stretch(map: &WalMap, segment: Segment) -> Range {
    let start = segment.number * map.segment_bytes;
    let complete = map.segments.get(&segment.timeline).and_then(|it| it.get(&segment.number));
    let complete = complete.map_or(&[][..], Vec::as_slice);
    let pieces = map.pieces.get(&segment).map_or(&[][..], Vec::as_slice);
    let chain = if complete.is_empty() { cover(pieces).chain } else { Vec::new() };
    let times = complete.iter().map(|it| it.stored_at).chain(chain.iter().map(|it| it.stored_at));
    let bytes = complete.iter().map(|it| it.object_bytes).sum::<u64>()
        + chain.iter().map(|it| it.object_bytes).sum::<u64>();
    Range {
        timeline: segment.timeline,
        from_lsn: start.into(),
        until_lsn: (start + map.covered(segment)).into(),
        segments: u64::from(!complete.is_empty()),
        object_bytes: bytes,
        from: times.clone().next(),
        until: times.last(),
        next: Next::Newest,
    }
}

impl Range {
    /// Whether something is wrong after it.
    pub fn is_broken(&self) -> bool {
        matches!(self.next, Next::Gap { .. } | Next::Unended { .. } | Next::Conflict { .. })
    }

    fn extend(&mut self, more: &Self) {
        if self.from_lsn == self.until_lsn {
            self.from = more.from;
        }
        self.until_lsn = more.until_lsn;
        self.segments += more.segments;
        self.object_bytes += more.object_bytes;
        self.until = more.until.or(self.until);
    }
}

fn gap(before: &Range, until_lsn: PgLsn, gaps: &[Gap]) -> Next {
    let recorded = gaps.iter().find(|gap| {
        gap.timeline == before.timeline
            && gap.from_lsn <= before.until_lsn
            && gap.until_lsn >= until_lsn
    });
    Next::Gap { until_lsn, reason: recorded.map(|gap| gap.reason.clone()) }
}

/// The timelines that branched off in a range or at its end, if any.
fn branches(map: &WalMap, range: &Range) -> Next {
    let branch = |timeline: &u32| {
        let left = map.began(*timeline).filter(|entry| entry.timeline == range.timeline)?;
        (range.from_lsn <= left.switch_lsn).then_some((*timeline, left.switch_lsn))
    };
    let branches: Vec<_> = map.histories.keys().filter_map(branch).collect();
    // The first segment of that timeline has what is before; or that of one after it, if it was left soon.
    let is_empty = |timeline| map.numbers(timeline).next().is_none();
    let is_copied = |from: u32, number| {
        let after = |history: &[HistoryEntry]| history.iter().any(|it| it.timeline == from);
        let mut after = map.histories.iter().filter(|(_, history)| after(history));
        after.any(|(timeline, _)| map.covered(Segment { timeline: *timeline, number }) > 0)
    };
    let is_missing = |(timeline, at): &&(u32, PgLsn)| {
        let number = segment_number(*at, map.segment_bytes);
        range.until_lsn < *at && is_empty(*timeline) && !is_copied(*timeline, number)
    };
    let beyond = branches.iter().find(is_missing);
    match branches {
        _ if let Some((timeline, switch_lsn)) = beyond => {
            Next::Unended { timeline: *timeline, switch_lsn: *switch_lsn }
        }
        none if none.is_empty() => Next::Newest,
        branches => Next::Timelines(branches),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wal::example::{SEGMENT, at, stored};

    fn range(timeline: u32, from: u64, until: u64, next: Next) -> (u32, PgLsn, PgLsn, Next) {
        (timeline, from.into(), until.into(), next)
    }

    #[test]
    fn ranges_end_at_gaps_and_say_what_is_after_them() {
        let reason = "requested WAL segment has already been removed".to_owned();
        let recorded = Gap {
            timeline: 1,
            from_lsn: (4 * SEGMENT + 500).into(),
            until_lsn: (7 * SEGMENT).into(),
            noticed_at: at(7),
            reason: reason.clone(),
        };
        let gap = |until: u64, reason| Next::Gap { until_lsn: until.into(), reason };
        let cases = [
            ("nothing", stored(&[], &[]), vec![]),
            (
                "complete and growing",
                stored(&[(1, 2), (1, 3)], &[(1, 4, 500)]),
                vec![range(1, 2 * SEGMENT, 4 * SEGMENT + 500, Next::Newest)],
            ),
            (
                "a recorded gap in a segment",
                stored(&[(1, 3), (1, 7)], &[(1, 4, 500)]),
                vec![
                    range(1, 3 * SEGMENT, 4 * SEGMENT + 500, gap(7 * SEGMENT, Some(reason))),
                    range(1, 7 * SEGMENT, 8 * SEGMENT, Next::Newest),
                ],
            ),
            (
                "a gap that nobody recorded",
                stored(&[(2, 3), (2, 5)], &[]),
                vec![
                    range(2, 3 * SEGMENT, 4 * SEGMENT, gap(5 * SEGMENT, None)),
                    range(2, 5 * SEGMENT, 6 * SEGMENT, Next::Newest),
                ],
            ),
        ];
        for (case, map, expected) in cases {
            let found: Vec<_> = ranges(&map, std::slice::from_ref(&recorded), |_| false)
                .into_iter()
                .map(|it| (it.timeline, it.from_lsn, it.until_lsn, it.next))
                .collect();
            assert_eq!(found, expected, "{case}");
        }
    }

    #[test]
    fn a_missing_piece_is_a_gap_even_in_the_newest_segment() {
        let from = |mut map: WalMap, from| {
            for piece in map.pieces.values_mut().flatten() {
                piece.from = from;
            }
            map
        };
        let first_is_missing = from(stored(&[(1, 3)], &[(1, 4, 500)]), 200);
        let nothing_before = from(stored(&[], &[(1, 4, 500)]), 200);
        let gap = || Next::Gap { until_lsn: (4 * SEGMENT + 200).into(), reason: None };
        for (case, map, expected) in [
            ("its first", first_is_missing, range(1, 3 * SEGMENT, 4 * SEGMENT, gap())),
            ("nothing before", nothing_before, range(1, 4 * SEGMENT, 4 * SEGMENT, gap())),
        ] {
            let found = ranges(&map, &[], |_| false).pop().unwrap();
            let is_empty = found.from_lsn == found.until_lsn;
            assert_eq!(found.from.is_none(), is_empty, "{case}: nothing was stored at no time");
            let found = (found.timeline, found.from_lsn, found.until_lsn, found.next);
            assert_eq!(found, expected, "{case}");
        }
    }

    #[test]
    fn what_nothing_needs_is_no_gap() {
        let map = stored(&[(1, 3), (1, 6), (1, 9)], &[]);
        let gap = |number: u64| Next::Gap { until_lsn: (number * SEGMENT).into(), reason: None };
        let expired = |number: u64| Next::Expired { until_lsn: (number * SEGMENT).into() };
        for (case, spare, expected) in [
            ("nothing is spare", 0..0, [gap(6), gap(9), Next::Newest]),
            ("all before the second gap", 0..6, [expired(6), gap(9), Next::Newest]),
            ("one of the second gap is needed", 0..8, [expired(6), gap(9), Next::Newest]),
            ("both", 4..9, [expired(6), expired(9), Next::Newest]),
        ] {
            let is_spare = |segment: Segment| spare.contains(&segment.number);
            let found: Vec<_> = ranges(&map, &[], is_spare).into_iter().map(|it| it.next).collect();
            assert_eq!(found, expected, "{case}");
        }
    }

    #[test]
    fn a_timeline_that_was_left_says_for_which() {
        let mut map = stored(&[(1, 3), (2, 4), (3, 3)], &[(1, 4, 500)]);
        let branches = [(2, (4 * SEGMENT + 500).into()), (3, (3 * SEGMENT + 7).into())];
        for (timeline, switch_lsn) in branches {
            let entry = HistoryEntry { timeline: 1, switch_lsn, reason: String::new() };
            map.histories.insert(timeline, vec![entry]);
        }
        let found: Vec<_> = ranges(&map, &[], |_| false).into_iter().map(|it| it.next).collect();
        let left = Next::Timelines(branches.to_vec());
        assert_eq!(found, [left, Next::Newest, Next::Newest]);
    }

    /// The new primary's archiver stores the history, and that is lost before the rest came.
    #[test]
    fn a_timeline_that_was_left_after_what_is_stored_has_not_all() {
        let entry = |segment: u64| HistoryEntry {
            timeline: 1,
            switch_lsn: (segment * SEGMENT + 500).into(),
            reason: String::new(),
        };
        let unended = |segment: u64| Next::Unended {
            timeline: 2,
            switch_lsn: (segment * SEGMENT + 500).into(),
        };
        for (case, left_in, spare, expected) in [
            ("in a later segment", 7, 0..0, unended(7)),
            ("in the same", 4, 0..0, unended(4)),
            ("nothing needs it", 7, 0..9, Next::Expired { until_lsn: (7 * SEGMENT + 500).into() }),
        ] {
            let mut map = stored(&[(1, 3)], &[(1, 4, 200)]);
            map.histories.insert(2, vec![entry(left_in)]);
            let found = ranges(&map, &[], |segment| spare.contains(&segment.number));
            let [range] = found.as_slice() else { panic!("{case}: {found:?}") };
            assert_eq!(range.next, expected, "{case}");
            assert_eq!(range.is_broken(), spare.is_empty(), "{case}");
        }
    }

    /// Archivers store complete segments only, and two failovers may come within one.
    #[test]
    fn a_timeline_without_a_segment_of_its_own_is_in_that_of_the_next() {
        let left = |timeline, offset: u64| HistoryEntry {
            timeline,
            switch_lsn: (4 * SEGMENT + offset).into(),
            reason: String::new(),
        };
        for (case, complete, is_broken) in [
            ("the next has it", &[(1, 3), (3, 4)][..], false),
            ("the next began later", &[(1, 3), (3, 5)], true),
            ("nobody has it", &[(1, 3)], true),
        ] {
            let mut map = stored(complete, &[]);
            map.histories.insert(2, vec![left(1, 500)]);
            map.histories.insert(3, vec![left(1, 500), left(2, 900)]);
            let found = ranges(&map, &[], |_| false);
            assert_eq!(found[0].is_broken(), is_broken, "{case}: {found:?}");
        }
    }

    /// Timeline 1 is stored up to offset 500 of segment 4; timeline 2 left it in segment 5.
    #[test]
    fn what_is_missing_where_a_timeline_began_is_a_gap() {
        let gap = |until: u64| Next::Gap { until_lsn: until.into(), reason: None };
        let switch = 5 * SEGMENT + 100;
        let left = || Next::Timelines(vec![(2, switch.into())]);
        let unended = || Next::Unended { timeline: 2, switch_lsn: switch.into() };
        let first = |until, next| range(1, 3 * SEGMENT, until, next);
        let second = |from: u64| range(2, from * SEGMENT, 7 * SEGMENT, Next::Newest);
        for (case, complete, pieces, expected) in [
            (
                "nothing is missing",
                &[(1, 3), (1, 4), (2, 5), (2, 6)][..],
                &[][..],
                vec![first(5 * SEGMENT, left()), second(5)],
            ),
            (
                "before and after it began",
                &[(1, 3), (2, 6)],
                &[(1, 4, 500)],
                vec![first(4 * SEGMENT + 500, gap(6 * SEGMENT)), second(6)],
            ),
            (
                "before it began",
                &[(1, 3), (2, 5), (2, 6)],
                &[(1, 4, 500)],
                vec![first(4 * SEGMENT + 500, gap(5 * SEGMENT)), second(5)],
            ),
            (
                "after it began",
                &[(1, 3), (1, 4), (2, 6)],
                &[(1, 5, 100)],
                vec![first(switch, left()), range(2, switch, switch, gap(6 * SEGMENT)), second(6)],
            ),
            (
                "it has just begun",
                &[(1, 3)],
                &[(1, 4, 500)],
                vec![first(4 * SEGMENT + 500, unended())],
            ),
        ] {
            let mut map = stored(complete, pieces);
            let entry =
                HistoryEntry { timeline: 1, switch_lsn: switch.into(), reason: String::new() };
            map.histories.insert(2, vec![entry]);
            let found = ranges(&map, &[], |_| false).into_iter();
            let found: Vec<_> =
                found.map(|it| (it.timeline, it.from_lsn, it.until_lsn, it.next)).collect();
            assert_eq!(found, expected, "{case}");
            let expired = ranges(&map, &[], |segment| segment.number < 6);
            assert!(!expired.iter().any(Range::is_broken), "{case}");
        }
    }

    #[test]
    fn a_segment_with_two_contents_ends_a_range() {
        let conflict = |number: u64| Next::Conflict {
            segment: Segment { timeline: 1, number }.name(SEGMENT),
            until_lsn: ((number + 1) * SEGMENT).into(),
        };
        for (case, complete, number, expected) in [
            (
                "between",
                &[(1, 3), (1, 4), (1, 5)][..],
                4,
                vec![
                    range(1, 3 * SEGMENT, 4 * SEGMENT, conflict(4)),
                    range(1, 5 * SEGMENT, 6 * SEGMENT, Next::Newest),
                ],
            ),
            (
                "the last",
                &[(1, 3), (1, 4)],
                4,
                vec![range(1, 3 * SEGMENT, 4 * SEGMENT, conflict(4))],
            ),
            (
                "the first",
                &[(1, 4), (1, 5)],
                4,
                vec![
                    range(1, 4 * SEGMENT, 4 * SEGMENT, conflict(4)),
                    range(1, 5 * SEGMENT, 6 * SEGMENT, Next::Newest),
                ],
            ),
        ] {
            let mut map = stored(complete, &[(1, number, 100)]);
            map.different.insert(Segment { timeline: 1, number }, vec!["a piece".to_owned()]);
            let found = ranges(&map, &[], |_| false).into_iter();
            let found: Vec<_> =
                found.map(|it| (it.timeline, it.from_lsn, it.until_lsn, it.next)).collect();
            assert_eq!(found, expected, "{case}");
        }
    }
}
