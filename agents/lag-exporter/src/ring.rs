//! When each position in WAL was written: the memory that turns a position into an age.
//!
//! Every entry states two facts about the primary's flush position. Both stay true whatever is
//! forgotten in between, so a lag that is read from them is never wrong, only less exact: the
//! bounds of an old lag lie further apart than those of a young one, by 1 % of it.

use std::time::Duration;

use crate::view::Lag;

/// Two entries may be merged if they are no further apart than their age divided by this.
const THIN_AGE_RATIO: i64 = 100;
/// Or no further apart than this: it bounds the ring however often the primary is asked.
const THIN_ALWAYS: Micros = 10_000;
/// So many entries may be new before all are looked through again.
const THIN_EVERY: usize = 32;

/// A moment in microseconds of `CLOCK_BOOTTIME`. Below 0: before this host was booted, which the
/// primary remembers ([`crate::seed`]).
pub type Micros = i64;

/// What is known about one position.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    /// The position.
    pub lsn: u64,
    /// By this moment all WAL before the position was on the primary's disk.
    pub written_by: Micros,
    /// At this moment no WAL after the position was.
    pub not_passed_at: Micros,
}

/// How far back from the newest position another one is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Behind {
    /// Nothing is known.
    Unknown,
    /// Nothing was written after it, as far as was known then.
    Nothing {
        /// It may have been since the primary was asked, or not be on its disk yet: no longer ago
        /// than this.
        upper: Duration,
        /// So long ago the primary was seen to have no more on its disk.
        seen: Duration,
    },
    /// The oldest WAL after it is this old.
    By(Lag),
    /// The oldest WAL after it is older than this, and by how much is not known.
    More(Duration),
}

/// The positions of one primary, or of a line of primaries that each took over from the one
/// before. Later entries have later positions and later moments.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ring {
    entries: Vec<Entry>,
    /// How many entries were left when they were last looked through.
    thinned: usize,
    /// Where WAL ended that was not all on the disk, when the primary was last asked, and when that
    /// was.
    unflushed: Option<(u64, Micros)>,
    /// When the primary was asked, the last time but one and the last.
    seen: [Option<Micros>; 2],
}

impl Ring {
    /// A ring with these entries, or none if they are not in order.
    pub fn from_entries(entries: Vec<Entry>) -> Option<Self> {
        let ordered = entries.windows(2).all(|pair| {
            pair[0].lsn < pair[1].lsn
                && pair[0].written_by <= pair[1].written_by
                && pair[0].not_passed_at <= pair[1].not_passed_at
                && pair[0].not_passed_at <= pair[1].written_by
        });
        ordered.then_some(Self { entries, ..Self::default() })
    }

    /// The entries, oldest first.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Whether nothing is known.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The newest entry.
    pub fn newest(&self) -> Option<&Entry> {
        self.entries.last()
    }

    /// How far back from `now` every position has two bounds.
    pub fn reach(&self, now: Duration) -> Option<Duration> {
        self.entries.first().map(|oldest| span(micros(now) - oldest.written_by))
    }

    /// Takes in that the primary's flush position was `lsn` at a moment between `asked_at` and
    /// `answered_at`, and forgets what is further back than `history`.
    ///
    /// WAL ended at `inserted`. What is beyond `lsn` may hold a commit already, unless somebody
    /// waits for the flush, so `lsn` was passed before. But `inserted` was not: once the primary has
    /// flushed that far, that is an entry as well.
    ///
    /// A position before the newest one means that the primary lost the rest: it crashed within a
    /// record. What was written there since is another WAL, so the old ages are forgotten.
    pub fn push(
        &mut self,
        lsn: u64,
        inserted: u64,
        asked_at: Duration,
        answered_at: Duration,
        history: Duration,
    ) {
        if self.newest().is_some_and(|newest| lsn < newest.lsn) {
            self.rewind(lsn);
        }
        let (asked_at, answered_at) = (micros(asked_at), micros(answered_at));
        if let Some((end, at)) = self.unflushed.take().filter(|(end, _)| *end <= lsn) {
            self.append(end, at, answered_at);
        }
        if inserted <= lsn {
            self.append(lsn, asked_at, answered_at);
        } else {
            if !self.is_empty() {
                self.append(lsn, Micros::MIN, answered_at);
            }
            self.unflushed = Some((inserted, asked_at));
        }
        self.seen = [self.seen[1], Some(asked_at)];
        if self.thinned + THIN_EVERY <= self.entries.len() {
            self.expire(answered_at - micros(history));
            self.thin(answered_at);
            self.thinned = self.entries.len();
        }
    }

    /// Forgets what was written after `lsn`, for it is not part of the primary's WAL any more.
    pub fn rewind(&mut self, lsn: u64) {
        self.unflushed = None;
        let kept = self.entries.partition_point(|entry| entry.lsn <= lsn);
        let lost = self.entries.get(kept).copied();
        self.entries.truncate(kept);
        self.thinned = self.thinned.min(kept);
        // When the lost position was there, so was `lsn`, which is before it.
        if let (Some(before), Some(Entry { written_by, .. })) = (self.newest().copied(), lost)
            && before.lsn < lsn
        {
            self.entries.push(Entry { lsn, written_by, ..before });
        }
    }

    /// Forgets what was written after `fork`, where a new timeline began.
    ///
    /// `still_at` is a moment when nothing was written on the new timeline yet, and by `written_by`
    /// all before it was.
    pub fn branch(&mut self, fork: u64, still_at: Duration, written_by: Duration) {
        self.branch_after(fork, still_at);
        self.append(fork, micros(still_at), micros(written_by));
    }

    /// Does what [`Self::branch`] does where it is only known that the fork is not before `lsn`.
    pub fn branch_after(&mut self, lsn: u64, still_at: Duration) {
        self.rewind(lsn);
        // That the old primary was idle there says nothing about the new one.
        let before = self.entries.iter().rev().nth(1).map_or(Micros::MIN, |it| it.not_passed_at);
        if let Some(newest) = self.entries.last_mut()
            && newest.lsn == lsn
        {
            newest.not_passed_at = newest.not_passed_at.min(micros(still_at)).max(before);
        }
    }

    /// Adds what is known from before the oldest entry; says whether that could be true.
    ///
    /// `older` has positions in ascending order. Positions the ring knows are left out. If the
    /// moments contradict each other or the ring, none is taken.
    pub fn prepend(&mut self, mut older: Vec<Entry>) -> bool {
        let Some(oldest) = self.entries.first().copied() else { return false };
        older.retain(|entry| entry.lsn < oldest.lsn);
        // What is true of a position at one moment is true of an earlier position later on.
        let mut written_by = oldest.written_by;
        for entry in older.iter_mut().rev() {
            written_by = written_by.min(entry.written_by);
            entry.written_by = written_by;
        }
        for index in 1..older.len() {
            older[index].not_passed_at =
                older[index].not_passed_at.max(older[index - 1].not_passed_at);
        }
        older.extend(&self.entries);
        let joined = Self::from_entries(older);
        joined.map(|joined| *self = joined).is_some()
    }

    /// How far a standby is behind that had `lsn` at a moment between `asked_at` and
    /// `answered_at`.
    ///
    /// What the primary was seen to have only after `asked_at` is no proof that the standby was
    /// behind. But it makes the bounds narrower.
    pub fn behind(&self, lsn: u64, asked_at: Duration, answered_at: Duration) -> Behind {
        let (asked_at, answered_at) = (micros(asked_at), micros(answered_at));
        let after = self.entries.partition_point(|entry| entry.lsn <= lsn);
        let next = self.entries.get(after);
        let Some(entry) = after.checked_sub(1).and_then(|at| self.entries.get(at)) else {
            return next.map_or(Behind::Unknown, |next| {
                Behind::More(span(asked_at.saturating_sub(next.written_by)))
            });
        };
        let upper = span(answered_at - entry.not_passed_at);
        if next.is_none_or(|next| asked_at < next.written_by) {
            let [before, last] = self.seen;
            let seen = if next.is_none() { last } else { before.filter(|at| *at <= asked_at) };
            let seen = span(answered_at - seen.unwrap_or(Micros::MIN).max(entry.not_passed_at));
            let unflushed = self.unflushed.filter(|(end, _)| next.is_none() && *end <= lsn);
            let upper = unflushed.map_or(upper, |(_, at)| span(answered_at - at));
            return Behind::Nothing { upper, seen };
        }
        let Some(next) = next else { return Behind::Unknown };
        let lower = span(asked_at - next.written_by);
        let written_at = between(entry, next, lsn);
        let estimate = span(midpoint(asked_at, answered_at) - written_at).clamp(lower, upper);
        Behind::By(Lag { lower: Some(lower), estimate: Some(estimate), upper: Some(upper) })
    }

    /// The newest position that was known to be written by the moment `at`.
    pub fn position(&self, at: Duration) -> Option<u64> {
        let known = self.entries.partition_point(|entry| entry.written_by <= micros(at));
        known.checked_sub(1).map(|index| self.entries[index].lsn)
    }

    /// Adds what is known of a position that is not before the newest.
    fn append(&mut self, lsn: u64, not_passed_at: Micros, written_by: Micros) {
        let Some(newest) = self.entries.last_mut() else {
            return self.entries.push(Entry { lsn, written_by, not_passed_at });
        };
        // A later position has the later moments, whatever the order in which they were learnt.
        let not_passed_at = not_passed_at.max(newest.not_passed_at);
        if newest.lsn == lsn {
            newest.not_passed_at = not_passed_at;
        } else {
            let written_by = written_by.max(newest.written_by);
            self.entries.push(Entry { lsn, written_by, not_passed_at });
        }
    }

    /// Forgets entries that no position written since `start` needs.
    fn expire(&mut self, start: Micros) {
        let before = self.entries.partition_point(|entry| entry.written_by <= start);
        self.entries.drain(..before.saturating_sub(1));
    }

    /// Forgets each entry without which its neighbours are still close enough.
    fn thin(&mut self, now: Micros) {
        let entries = &mut self.entries;
        let mut kept = 1;
        for index in 1..entries.len() {
            let entry = entries[index];
            let spare = entries.get(index + 1).is_some_and(|next| {
                let gap = next.written_by - entries[kept - 1].not_passed_at;
                let age = now - next.written_by;
                gap <= THIN_ALWAYS || gap <= age / THIN_AGE_RATIO
            });
            if !spare {
                entries[kept] = entry;
                kept += 1;
            }
        }
        entries.truncate(kept);
    }
}

/// When the WAL after `lsn` was written, if the primary wrote evenly between two entries.
fn between(entry: &Entry, next: &Entry, lsn: u64) -> Micros {
    let bytes = i128::from(next.lsn - entry.lsn);
    let gap = i128::from(next.written_by - entry.not_passed_at);
    let share = gap * i128::from(lsn - entry.lsn) / bytes;
    entry.not_passed_at + i64::try_from(share).unwrap_or_default()
}

fn midpoint(a: Micros, b: Micros) -> Micros {
    a + (b - a) / 2
}

/// A moment of this host's `CLOCK_BOOTTIME` in microseconds.
pub fn micros(moment: Duration) -> Micros {
    i64::try_from(moment.as_micros()).unwrap_or(i64::MAX)
}

/// A number of microseconds, or zero if it is negative.
fn span(micros: Micros) -> Duration {
    Duration::from_micros(u64::try_from(micros).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    const HISTORY: Duration = Duration::from_hours(72);

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// A ring of samples: asked at, answered at (in milliseconds), position.
    fn ring(samples: &[(u64, u64, u64)]) -> Ring {
        let mut ring = Ring::default();
        for (asked_at, answered_at, lsn) in samples {
            ring.push(*lsn, *lsn, ms(*asked_at), ms(*answered_at), HISTORY);
        }
        ring
    }

    fn by(lower: u64, estimate: u64, upper: u64) -> Behind {
        let [lower, estimate, upper] = [lower, estimate, upper].map(|it| Some(ms(it)));
        Behind::By(Lag { lower, estimate, upper })
    }

    fn nothing(upper: Duration) -> Behind {
        Behind::Nothing { upper, seen: upper }
    }

    #[test]
    fn what_is_not_flushed_may_hold_a_commit() {
        let mut ring = Ring::default();
        let second = |second: u64| (ms(second * 1000), ms(second * 1000 + 10));
        let mut ask = |at: u64, flushed: u64, inserted: u64| {
            let (asked_at, answered_at) = second(at);
            ring.push(flushed, inserted, asked_at, answered_at, HISTORY);
            let behind = |lsn| ring.behind(lsn, ms(at * 1000 + 500), ms(at * 1000 + 500));
            (behind(flushed), behind(inserted))
        };
        let nothing = |upper, seen| Behind::Nothing { upper: ms(upper), seen: ms(seen) };
        assert_eq!(
            ask(0, 100, 150),
            (Behind::Unknown, Behind::Unknown),
            "since when, nobody knows"
        );
        assert_eq!(ask(1, 200, 200), (nothing(500, 500), nothing(500, 500)));
        assert_eq!(ask(2, 200, 250), (nothing(1500, 500), nothing(500, 500)));
        assert_eq!(ask(5, 200, 260), (nothing(4500, 500), nothing(500, 500)));
        assert_eq!(ask(6, 240, 270), (nothing(5500, 500), nothing(500, 500)));
        assert_eq!(ask(7, 300, 400), (nothing(1500, 500), nothing(500, 500)));
        let entries = ring.entries().iter().map(|it| (it.lsn, it.not_passed_at / 1_000_000));
        let expected = [(150, 0), (200, 1), (240, 1), (270, 6), (300, 6)];
        assert_eq!(entries.collect::<Vec<_>>(), expected);
    }

    #[test]
    fn a_position_has_an_age_between_two_bounds() {
        let samples = [(1000, 1010, 100), (2000, 2010, 300), (3000, 3010, 300), (4000, 4010, 700)];
        let ring = ring(&samples);
        for (name, lsn, asked_at, expected) in [
            ("before all", 99, 9000, Behind::More(ms(9000 - 1010))),
            ("the oldest", 100, 9000, by(9000 - 2010, 9010 - 1000 - 5, 9010 - 1000)),
            ("halfway", 200, 9000, by(9000 - 2010, 9005 - 1505, 9010 - 1000)),
            ("idle for a while", 300, 9000, by(9000 - 4010, 9005 - 3000, 9010 - 3000)),
            ("a quarter", 400, 9000, by(9000 - 4010, 9005 - 3253 + 1, 9010 - 3000)),
            ("the newest", 700, 9000, nothing(ms(9010 - 4000))),
            ("newer than that", 800, 9000, nothing(ms(9010 - 4000))),
            ("no proof that it was behind then", 300, 4009, nothing(ms(4019 - 3000))),
            ("proof", 300, 4010, by(0, 1015, 1020)),
            ("it had it before we asked", 700, 3500, nothing(ms(0))),
        ] {
            let found = ring.behind(lsn, ms(asked_at), ms(asked_at + 10));
            let rounded = match found {
                Behind::By(Lag { estimate: Some(estimate), .. }) => {
                    let Behind::By(expected) = expected else { panic!("{name}: {found:?}") };
                    let off = expected.estimate.unwrap().abs_diff(estimate);
                    assert!(off <= ms(1), "{name}: {found:?}");
                    Behind::By(Lag { estimate: expected.estimate, ..lag(found) })
                }
                other => other,
            };
            assert_eq!(rounded, expected, "{name}");
        }
        assert_eq!(Ring::default().behind(1, ms(1), ms(2)), Behind::Unknown);
    }

    fn lag(behind: Behind) -> Lag {
        match behind {
            Behind::By(lag) => lag,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn an_idle_primary_costs_one_entry() {
        let samples: Vec<_> = (0..3600).map(|s| (s * 1000, s * 1000 + 1, 7)).collect();
        let ring = ring(&samples);
        assert_eq!(
            ring.entries(),
            [Entry { lsn: 7, written_by: 1_000, not_passed_at: 3_599_000_000 }]
        );
    }

    #[test]
    fn what_was_lost_is_forgotten_and_nothing_else() {
        let samples = [(1000, 1010, 100), (2000, 2010, 300), (3000, 3010, 700)];
        let entry = |lsn, written_by: Micros, not_passed_at: Micros| Entry {
            lsn,
            written_by: written_by * 1000,
            not_passed_at: not_passed_at * 1000,
        };
        let [first, second, third] =
            [entry(100, 1010, 1000), entry(300, 2010, 2000), entry(700, 3010, 3000)];
        for (name, lsn, expected) in [
            ("nothing", 700, vec![first, second, third]),
            ("nothing, and more came", 800, vec![first, second, third]),
            ("a sample", 300, vec![first, second]),
            ("a part of one", 400, vec![first, second, entry(400, 3010, 2000)]),
            ("all", 99, vec![]),
        ] {
            let mut ring = ring(&samples);
            ring.rewind(lsn);
            assert_eq!(ring.entries(), expected, "{name}");
        }
        // A server that comes back with less.
        let mut back = ring(&samples);
        back.push(400, 400, ms(5000), ms(5010), HISTORY);
        assert_eq!(back.entries(), [first, second, entry(400, 3010, 5000)]);
        // A new primary: nobody wrote beyond the fork before it was promoted.
        for (fork, expected) in [
            (300, vec![first, entry(300, 2010, 6000)]),
            (400, vec![first, second, entry(400, 3010, 6000)]),
            (900, vec![first, second, third, entry(900, 7000, 6000)]),
            (50, vec![entry(50, 7000, 6000)]),
        ] {
            let mut ring = ring(&samples);
            ring.branch(fork, ms(6000), ms(7000));
            assert_eq!(ring.entries(), expected, "{fork}");
        }
        // The old primary lives on and is idle at the fork: that says nothing about the new one.
        let mut idle = ring(&samples);
        idle.branch(700, ms(2500), ms(7000));
        assert_eq!(idle.entries(), [first, second, entry(700, 3010, 2500)]);
        let mut later = ring(&samples);
        later.branch_after(700, ms(5000));
        assert_eq!(later.entries(), [first, second, third], "perhaps it was not the fork");
    }

    #[test]
    fn older_knowledge_is_joined_unless_it_contradicts() {
        let entry = |lsn, written_by, not_passed_at| Entry { lsn, written_by, not_passed_at };
        let oldest = entry(500, 100, 90);
        for (name, older, expected) in [
            ("nothing", vec![], Some(vec![oldest])),
            (
                "before the boot",
                vec![entry(100, -50, -60)],
                Some(vec![entry(100, -50, -60), oldest]),
            ),
            ("known already", vec![entry(500, 1, 1), entry(600, 2, 2)], Some(vec![oldest])),
            (
                "written by the time the next one was",
                vec![entry(100, i64::MAX, 10), entry(200, 50, 5)],
                Some(vec![entry(100, 50, 10), entry(200, 50, 10), oldest]),
            ),
            ("later than what came after it", vec![entry(100, 120, 110)], None),
            ("out of order", vec![entry(100, 60, 55), entry(200, 40, 30)], None),
        ] {
            let mut ring = Ring::from_entries(vec![oldest]).unwrap();
            assert_eq!(ring.prepend(older), expected.is_some(), "{name}");
            assert_eq!(ring.entries(), expected.unwrap_or(vec![oldest]), "{name}");
        }
        assert!(!Ring::default().prepend(vec![entry(1, 1, 1)]));
    }

    #[test]
    fn three_days_of_seconds_are_about_a_thousand_entries() {
        let mut ring = Ring::default();
        for second in 0..4 * 86_400 {
            let at = ms(second * 1000);
            ring.push(second * 500, second * 500, at, at + ms(1), HISTORY);
        }
        let now = micros(ms(4 * 86_400_000));
        let count = ring.entries().len();
        assert!((800..1600).contains(&count), "{count} entries");
        let reach = ring.reach(ms(4 * 86_400_000)).unwrap();
        assert!((HISTORY..HISTORY + ms(3_600_000)).contains(&reach), "{reach:?}");
        for pair in ring.entries().windows(2) {
            let gap = pair[1].written_by - pair[0].not_passed_at;
            let age = now - pair[1].written_by;
            assert!(gap <= 1_001_000.max(age / THIN_AGE_RATIO), "{gap} at the age of {age}");
        }
    }

    #[test]
    fn the_ring_is_bounded_however_often_the_primary_is_asked() {
        let mut ring = Ring::default();
        for sample in 0..2_000_000_u64 {
            let at = Duration::from_micros(sample * 50);
            ring.push(sample, sample, at, at, HISTORY);
        }
        assert!(ring.entries().len() < 1500, "{} entries", ring.entries().len());
    }

    /// One step of a history: time passes, the primary writes, somebody asks.
    #[derive(Clone, Copy, Debug)]
    enum Step {
        Write { after: u64, bytes: u64 },
        AskPrimary { after: u64, before_read: u64, after_read: u64, flushes: bool },
        AskStandby { after: u64, before_read: u64, after_read: u64, share: u64 },
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let after = || prop_oneof![4 => 0..50_u64, 4 => 0..2000_u64, 1 => 0..400_000_u64];
        let trip = || prop_oneof![4 => 0..5_u64, 1 => 0..1500_u64];
        let write = (after(), 0..5000_u64).prop_map(|(after, bytes)| Step::Write { after, bytes });
        let primary = (after(), trip(), trip(), any::<bool>()).prop_map(
            |(after, before_read, after_read, flushes)| Step::AskPrimary {
                after,
                before_read,
                after_read,
                flushes,
            },
        );
        let standby = (after(), trip(), trip(), 0..=1000_u64).prop_map(
            |(after, before_read, after_read, share)| Step::AskStandby {
                after,
                before_read,
                after_read,
                share,
            },
        );
        vec(prop_oneof![3 => write, 3 => primary, 2 => standby], 1..300)
    }

    /// The moment of each write, and the position after it.
    struct Truth(Vec<(u64, u64)>);

    impl Truth {
        fn flush(&self) -> u64 {
            self.0.last().map_or(0, |(_, lsn)| *lsn)
        }

        /// How far behind a standby is at `at` that has `lsn`.
        fn lag(&self, lsn: u64, at: u64) -> u64 {
            let missed = self.0.iter().find(|(_, after)| *after > lsn);
            missed.map_or(0, |(written, _)| at.saturating_sub(*written))
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]
        #[test]
        fn the_truth_is_within_the_bounds(steps in steps()) {
            let (mut ring, mut truth, mut now) = (Ring::default(), Truth(Vec::new()), 1_u64);
            let (mut asked, mut flush) = (Vec::new(), 0);
            for step in steps {
                match step {
                    Step::Write { after, bytes } => {
                        now += after;
                        let lsn = truth.flush() + bytes;
                        truth.0.push((now, lsn));
                    }
                    Step::AskPrimary { after, before_read, after_read, flushes } => {
                        if flushes {
                            flush = truth.flush();
                        }
                        let asked_at = now + after;
                        now = asked_at + before_read + after_read;
                        ring.push(flush, truth.flush(), ms(asked_at), ms(now), HISTORY);
                    }
                    Step::AskStandby { after, before_read, after_read, share } => {
                        let asked_at = now + after;
                        let read_at = asked_at + before_read;
                        now = read_at + after_read;
                        // Anything from a fresh copy to one that has everything.
                        let lsn = flush * share / 1000;
                        asked.push((lsn, asked_at, now, truth.lag(lsn, read_at)));
                    }
                }
                // What was asked before is looked at again: later samples may only narrow it.
                for (lsn, asked_at, answered_at, lag) in &asked {
                    let (lag, behind) =
                        (ms(*lag), ring.behind(*lsn, ms(*asked_at), ms(*answered_at)));
                    match behind {
                        Behind::Unknown => prop_assert!(ring.is_empty()),
                        Behind::Nothing { upper, .. } => {
                            prop_assert!(lag <= upper, "{lag:?} {behind:?}");
                        }
                        Behind::More(lower) => prop_assert!(lower <= lag, "{lag:?} {behind:?}"),
                        Behind::By(Lag { lower, estimate, upper }) => {
                            prop_assert!(lower <= Some(lag) && Some(lag) <= upper, "{lag:?} {behind:?}");
                            prop_assert!(lower <= estimate && estimate <= upper, "{behind:?}");
                        }
                    }
                }
            }
            let again = Ring::from_entries(ring.entries().to_vec());
            prop_assert!(again.is_some(), "in order");
        }
    }
}
