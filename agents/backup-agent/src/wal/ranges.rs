//! The stored WAL as ranges without a gap. Pure.

use chrono::{DateTime, Utc};
use shared::pg::wal::Segment;
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
    /// When its first object was stored: nothing before is younger.
    pub from: DateTime<Utc>,
    /// When its last object was stored: nothing in it is younger.
    pub until: DateTime<Utc>,
    /// What is after it.
    pub next: Next,
}

/// What is after a range.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// Nothing is stored after it: it is the newest of its timeline.
    Newest,
    /// A later timeline branched off in it or at its end.
    Timeline {
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
        let Next::Gap { until_lsn, .. } = range.next else { continue };
        let number = |lsn: PgLsn| u64::from(lsn) / map.segment_bytes;
        let mut missing = number(range.until_lsn)..number(until_lsn);
        let segment = |number| Segment { timeline: range.timeline, number };
        if !missing.is_empty() && missing.all(|number| is_spare(segment(number))) {
            range.next = Next::Expired { until_lsn };
        }
    }
    ranges
}

fn of_timeline(map: &WalMap, timeline: u32, gaps: &[Gap]) -> Vec<Range> {
    let mut numbers: Vec<u64> = map.numbers(timeline).collect();
    numbers.sort_unstable();
    numbers.dedup();
    let mut ranges: Vec<Range> = Vec::new();
    for number in numbers {
        let stretch = stretch(map, Segment { timeline, number });
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
        last.next = match beyond(map, timeline, last.until_lsn) {
            Some(until_lsn) => gap(last, until_lsn, gaps),
            None => branch(map, last).unwrap_or(Next::Newest),
        };
    }
    let is_missing = |range: &Range| matches!(range.next, Next::Gap { .. });
    ranges.retain(|range| range.from_lsn < range.until_lsn || is_missing(range));
    ranges
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
        from: times.clone().next().unwrap_or_default(),
        until: times.last().unwrap_or_default(),
        next: Next::Newest,
    }
}

impl Range {
    fn extend(&mut self, more: &Self) {
        self.until_lsn = more.until_lsn;
        self.segments += more.segments;
        self.object_bytes += more.object_bytes;
        self.until = more.until;
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

/// The first timeline that branched off in a range or at its end.
fn branch(map: &WalMap, range: &Range) -> Option<Next> {
    map.histories.keys().find_map(|timeline| {
        let left = map.began(*timeline).filter(|entry| entry.timeline == range.timeline)?;
        (range.from_lsn <= left.switch_lsn)
            .then_some(Next::Timeline { timeline: *timeline, switch_lsn: left.switch_lsn })
    })
}

#[cfg(test)]
mod tests {
    use shared::pg::wal::HistoryEntry;

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
        let mut map = stored(&[(1, 3), (2, 4)], &[(1, 4, 500)]);
        let switch_lsn = (4 * SEGMENT + 500).into();
        let entry = HistoryEntry { timeline: 1, switch_lsn, reason: String::new() };
        map.histories.insert(2, vec![entry]);
        let found: Vec<_> = ranges(&map, &[], |_| false).into_iter().map(|it| it.next).collect();
        assert_eq!(found, [Next::Timeline { timeline: 2, switch_lsn }, Next::Newest]);
    }
}
