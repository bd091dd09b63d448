//! What a primary remembers of the time before it was first asked: the file times of its WAL
//! segments, and its last checkpoint.
//!
//! All by the primary's clock, which tells ages rightly unless it was set in between: none is taken
//! of a clock that is off now ([`crate::group::Group::record`]). One that was off then and was put
//! right since cannot be told, and gives false ages, bounds too. What is from
//! before the server was started is left out: the directory may be a copy, whose files have the
//! time of the copy or of another clock. So are segments of an older timeline, which were received
//! or restored. The rest this server wrote itself: who recovers from an archive or a primary
//! writes on a timeline of its own.

use std::time::Duration;

use chrono::TimeDelta;
use shared::pg::wal::{Segment, WalFile};

use crate::observation::Seed;
use crate::ring::{Entry, Micros, micros};

/// A file time is cut to whole seconds.
const CUT: Micros = 1_000_000;
/// The file time is that of the write; the position is only passed once it is on the disk.
const SYNC: Micros = 1_000_000;

/// Returns what `seed` says, with positions in ascending order, for [`crate::ring::Ring::prepend`].
pub fn entries(seed: &Seed) -> Vec<Entry> {
    let segment_bytes = seed.identity.wal_segment_bytes;
    let segment = |name: &str| match WalFile::parse(name, segment_bytes) {
        Ok(WalFile::Segment(segment)) if segment.timeline == seed.timeline => Some(segment),
        _ => None,
    };
    let Some(current) = segment(&seed.current_segment) else { return Vec::new() };
    let is_own = |age: TimeDelta| age <= seed.up_for;
    // A later name is an old file, waiting to be used again.
    let is_complete = |it: &Segment| it.number < current.number;
    let mut entries: Vec<_> = seed
        .files
        .iter()
        .filter(|file| is_own(file.age))
        .filter_map(|file| {
            let end = segment(&file.name).filter(is_complete)?.next().number * segment_bytes;
            let written_by = before(seed.answered_at, file.age) + CUT + SYNC;
            Some(Entry { lsn: end, written_by, not_passed_at: before(seed.asked_at, file.age) })
        })
        .collect();
    let checkpoint = seed.checkpoint.filter(|it| it.timeline == seed.timeline && is_own(it.age));
    if let Some(checkpoint) = checkpoint {
        let not_passed_at = before(seed.asked_at, checkpoint.age);
        // When it was on the disk is not known: no later than the positions after it.
        let (lsn, written_by) = (checkpoint.redo_lsn.into(), Micros::MAX);
        entries.push(Entry { lsn, written_by, not_passed_at });
    }
    entries.sort_by_key(|entry| (entry.lsn, entry.written_by));
    entries.dedup_by_key(|entry| entry.lsn);
    entries
}

fn before(moment: Duration, age: TimeDelta) -> Micros {
    micros(moment).saturating_sub(age.num_microseconds().unwrap_or(Micros::MAX))
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;
    use proptest::prelude::*;
    use shared::pg::wal::segment_name;
    use tokio_postgres::types::PgLsn;

    use super::*;
    use crate::observation::{CheckpointAge, Identity, WalFileAge};
    use crate::ring::{Behind, Ring};
    use crate::view::Lag;

    const SEGMENT: u64 = 16 << 20;
    /// When the primary was asked; its WAL may be older than the boot of this host.
    const ASKED: Duration = Duration::from_secs(100);
    const ANSWERED: Duration = Duration::from_millis(100_020);

    fn seed(files: &[(&str, i64)], checkpoint: Option<(u64, u32, i64)>) -> Seed {
        Seed {
            asked_at: ASKED,
            answered_at: ANSWERED,
            identity: Identity {
                system_identifier: 7,
                server_version: 170_002,
                wal_segment_bytes: SEGMENT,
                started_at: DateTime::UNIX_EPOCH,
            },
            up_for: TimeDelta::days(30),
            timeline: 2,
            current_segment: "000000020000000000000005".to_owned(),
            files: files
                .iter()
                .map(|(name, age)| WalFileAge {
                    name: (*name).to_owned(),
                    age: TimeDelta::milliseconds(*age),
                })
                .collect(),
            checkpoint: checkpoint.map(|(lsn, timeline, age)| CheckpointAge {
                redo_lsn: PgLsn::from(lsn),
                timeline,
                age: TimeDelta::milliseconds(age),
            }),
        }
    }

    /// In milliseconds.
    fn entry(lsn: u64, written_by: i64, not_passed_at: i64) -> Entry {
        Entry { lsn, written_by: written_by * 1000, not_passed_at: not_passed_at * 1000 }
    }

    #[test]
    fn complete_segments_of_this_timeline_count() {
        let files = [
            ("000000020000000000000004", 10_500),
            ("000000020000000000000003", 300_500),
            ("000000020000000000000005", 100),
            ("000000020000000000000006", 999_000),
            ("000000010000000000000002", 400_000),
            ("000000010000000000000003.partial", 300_000),
            ("00000002.history", 300_000),
            ("nonsense", 1),
        ];
        assert_eq!(
            entries(&seed(&files, None)),
            [
                entry(4 * SEGMENT, 100_020 - 300_500 + 2000, 100_000 - 300_500),
                entry(5 * SEGMENT, 100_020 - 10_500 + 2000, 100_000 - 10_500),
            ]
        );
    }

    #[test]
    fn a_checkpoint_began_at_its_time_and_was_written_some_time_later() {
        let redo = |timeline| seed(&[], Some((5 * SEGMENT + 7, timeline, 60_000)));
        let expected = Entry { written_by: Micros::MAX, ..entry(5 * SEGMENT + 7, 0, 40_000) };
        assert_eq!(entries(&redo(2)), [expected]);
        assert_eq!(entries(&redo(1)), []);
    }

    /// The files of a copy have the time of the copy, or one by another clock.
    #[test]
    fn what_is_older_than_the_server_process_says_nothing() {
        let files = [
            ("000000020000000000000002", 100_000_500),
            ("000000020000000000000003", 60_500),
            ("000000020000000000000004", 10_500),
        ];
        let seed = |up_for| Seed {
            up_for: TimeDelta::milliseconds(up_for),
            ..seed(&files, Some((4 * SEGMENT + 7, 2, 20_000)))
        };
        let lsns = |seed: &Seed| -> Vec<_> { entries(seed).iter().map(|it| it.lsn).collect() };
        let (file, redo) = (|number: u64| number * SEGMENT, 4 * SEGMENT + 7);
        for (up_for, expected) in [
            (200_000_000, vec![file(3), file(4), redo, file(5)]),
            (60_500, vec![file(4), redo, file(5)]),
            (60_499, vec![redo, file(5)]),
            (19_999, vec![file(5)]),
            (0, vec![]),
        ] {
            assert_eq!(lsns(&seed(up_for)), expected, "{up_for}");
        }
    }

    #[test]
    fn a_seed_that_does_not_read_says_nothing() {
        let mut seed = seed(&[("000000020000000000000004", 10_500)], None);
        seed.current_segment = String::new();
        assert_eq!(entries(&seed), []);
    }

    proptest! {
        /// File times are cut to seconds, and a segment is synced a while after its last write.
        #[test]
        fn the_truth_is_within_the_bounds(
            gaps in prop::collection::vec(1..90_000_u64, 2..20),
            sync in 0..900_u64,
            replayed in 0..1_000_000_u64,
        ) {
            // The server's clock, in milliseconds, at the moment of the question.
            let now = 10_000_000_u64 + 123;
            let mut full_at: Vec<u64> =
                gaps.iter().scan(now, |at, gap| { *at -= gap; Some(*at) }).collect();
            full_at.reverse();
            let files: Vec<_> = full_at.iter().zip(0_u64..).map(|(at, number)| {
                let age = now - at / 1000 * 1000;
                let name = segment_name(2, PgLsn::from(number * SEGMENT), SEGMENT);
                WalFileAge { name, age: TimeDelta::milliseconds(age.cast_signed()) }
            }).collect();
            let end = full_at.len() as u64;
            let mut seed = seed(&[], None);
            seed.current_segment = segment_name(2, PgLsn::from(end * SEGMENT), SEGMENT);
            seed.files = files;
            let mut ring = Ring::default();
            ring.push(end * SEGMENT + 5, end * SEGMENT + 5, ASKED, ANSWERED, Duration::from_hours(72));
            prop_assert!(ring.prepend(entries(&seed)));
            // A standby that ends within segment `index`: the WAL after it was written between
            // the moments when that segment began and when it was full and synced.
            let index = 1 + usize::try_from(replayed).unwrap() % (full_at.len() - 1);
            let lsn = index as u64 * SEGMENT + replayed;
            let asked = |from: Duration| from + Duration::from_secs(3);
            let (youngest, oldest) = (now - full_at[index], now - full_at[index - 1]);
            match ring.behind(lsn, asked(ASKED), asked(ANSWERED)) {
                Behind::By(Lag { lower: Some(lower), upper: Some(upper), .. }) => {
                    let later = Duration::from_secs(3);
                    let full = Duration::from_millis(youngest.saturating_sub(sync)) + later;
                    prop_assert!(lower <= full, "{lower:?} {full:?}");
                    let begun = Duration::from_millis(oldest) + later;
                    prop_assert!(begun <= upper, "{begun:?} {upper:?}");
                }
                other => prop_assert!(false, "{other:?}"),
            }
        }
    }
}
