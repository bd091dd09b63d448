//! Since when WAL waits for the repository: what the server's disk had, and when. Pure.

use std::collections::VecDeque;

use chrono::{DateTime, TimeDelta, Utc};
use tokio_postgres::types::PgLsn;

/// Two positions that are kept are so far apart, at least …
const SPACING_MIN: TimeDelta = TimeDelta::milliseconds(100);
/// … and twice as far each time there are so many.
const KEPT_MAX: usize = 128;

/// Positions with a time until which the server had no WAL after them, oldest first. What is between two
/// counts as if it came with the later one, so WAL is never said to wait for less than it does.
#[derive(Debug)]
pub(super) struct Written {
    kept: VecDeque<(PgLsn, DateTime<Utc>)>,
    spacing: TimeDelta,
}

impl Written {
    pub(super) fn new() -> Self {
        Self { kept: VecDeque::new(), spacing: SPACING_MIN }
    }

    /// Takes note that at `at` the server's disk had WAL up to `lsn`.
    pub(super) fn note(&mut self, lsn: PgLsn, at: DateTime<Utc>) {
        let newest = self.kept.back().copied();
        if newest.is_some_and(|(newest, _)| lsn < newest) {
            return;
        }
        let before = self.kept.len().checked_sub(2).and_then(|index| self.kept.get(index));
        let is_near = newest
            .zip(before)
            .is_some_and(|((_, newest), (_, before))| newest - *before < self.spacing);
        if is_near || newest.is_some_and(|(newest, _)| newest == lsn) {
            self.kept.pop_back();
        } else if self.kept.len() >= KEPT_MAX {
            self.spacing = self.spacing * 2;
            let mut is_odd = true;
            self.kept.retain(|_| {
                is_odd = !is_odd;
                is_odd
            });
        }
        self.kept.push_back((lsn, newest.map_or(at, |(_, newest)| at.max(newest))));
    }

    /// The last moment of which all WAL is before `lsn`, if there is a later one than was said before.
    pub(super) fn all_before(&mut self, lsn: PgLsn) -> Option<DateTime<Utc>> {
        let mut last = None;
        while let Some((_, at)) = self.kept.pop_front_if(|(kept, _)| *kept <= lsn) {
            last = Some(at);
        }
        if self.kept.is_empty() {
            self.spacing = SPACING_MIN;
        }
        last
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(millis: i64) -> DateTime<Utc> {
        DateTime::UNIX_EPOCH + TimeDelta::milliseconds(millis)
    }

    #[test]
    fn wal_waits_since_the_last_position_before_which_all_is_stored() {
        type Notes = &'static [(u64, i64)];
        let cases: [(&str, Notes, u64, Option<i64>); 9] = [
            ("nothing was told", &[], 9, None),
            ("nothing is stored", &[(10, 0)], 9, None),
            ("all is stored", &[(10, 0)], 10, Some(0)),
            ("and nothing was written since", &[(10, 0), (10, 5000)], 10, Some(5000)),
            ("the newest waits", &[(10, 0), (20, 1000)], 19, Some(0)),
            (
                "under load, something always waits",
                &[(10, 0), (20, 1000), (30, 2000)],
                25,
                Some(1000),
            ),
            (
                "one after the other, too near to be kept",
                &[(10, 0), (20, 50), (30, 99)],
                20,
                Some(0),
            ),
            ("a keepalive knows less", &[(10, 0), (8, 1000)], 9, None),
            ("a time that is older", &[(10, 1000), (20, 0)], 20, Some(1000)),
        ];
        for (case, notes, stored, expected) in cases {
            let mut written = Written::new();
            for (lsn, millis) in notes {
                written.note((*lsn).into(), at(*millis));
            }
            assert_eq!(written.all_before(stored.into()), expected.map(at), "{case}");
            assert_eq!(written.all_before(stored.into()), None, "{case}: it is said once");
        }
    }

    /// An outage of half an hour, with a position each 10 ms.
    #[test]
    fn the_age_of_what_waits_for_long_is_nearly_exact_and_takes_no_memory() {
        let mut written = Written::new();
        for second in 0..200_000_u64 {
            written.note((second + 1).into(), at(second.cast_signed() * 10));
        }
        assert!(written.kept.len() <= KEPT_MAX);
        let mut before = 0;
        for stored in (0..200_000_u64).step_by(1000).skip(5) {
            if let Some(said) = written.all_before(stored.into()) {
                before = (said - at(0)).num_milliseconds();
            }
            let exact = stored.cast_signed() * 10;
            assert!((exact - 2_000_000 / 60..=exact).contains(&before), "{before} for {exact}");
        }
    }
}
