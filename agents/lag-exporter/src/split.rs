//! Whether two primaries of one cluster take writes at the same time.
//!
//! That two nodes were primaries when each was last asked proves nothing: after a failover the
//! old one may have died in between. Two uninterrupted runs of samples that overlap do.

use std::collections::BTreeMap;
use std::time::Duration;

use chrono::{DateTime, Utc};

use crate::view::SplitBrain;

/// The uninterrupted time in which a node said that it is a primary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reign {
    /// Which cluster it is a primary of.
    pub system_identifier: u64,
    /// The timeline that it writes.
    pub timeline: u32,
    /// Tells whether a node of another name is the same server.
    pub started_at: DateTime<Utc>,
    /// It was one at this moment, when it first said so.
    pub since: Duration,
    /// It still was one at this moment, when it was last asked.
    pub until: Duration,
    /// How far it had written then.
    pub flush_lsn: u64,
}

/// The primaries that were there at the same time, and how far they had written when that began.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rivals(BTreeMap<String, u64>);

impl Rivals {
    /// Takes in who reigns now. Whoever has not said so for `stale_after` does not.
    pub fn update(&mut self, reigns: &[(&str, Reign)], now: Duration, stale_after: Duration) {
        let fresh: Vec<_> = fresh(reigns, now, stale_after).collect();
        let has_rival = |(_, a): &(&str, Reign)| {
            fresh.iter().any(|(_, b)| {
                a.started_at != b.started_at
                    && a.system_identifier == b.system_identifier
                    && a.since.max(b.since) <= a.until.min(b.until)
            })
        };
        let rivals = fresh.iter().filter(|it| has_rival(it));
        let rivals: BTreeMap<_, _> =
            rivals.map(|(name, reign)| ((*name).to_owned(), reign.flush_lsn)).collect();
        if !rivals.keys().eq(self.0.keys()) {
            self.0 = rivals;
        }
    }

    /// Whether this is one of them.
    pub fn has(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    /// The verdict at `now`: confirmed if each has written since. What a server writes by itself
    /// counts; that it does is enough to make the two differ.
    pub fn verdict(
        &self,
        reigns: &[(&str, Reign)],
        now: Duration,
        stale_after: Duration,
    ) -> SplitBrain {
        let then = |(name, reign)| Some((name, reign, *self.0.get(name)?));
        let rivals: Vec<_> = fresh(reigns, now, stale_after).filter_map(then).collect();
        if rivals.len() < 2 {
            return SplitBrain::No;
        }
        let names = rivals.iter().map(|(name, ..)| (*name).to_owned()).collect();
        if rivals.iter().all(|(_, reign, before)| *before < reign.flush_lsn) {
            SplitBrain::Confirmed(names)
        } else {
            SplitBrain::Candidate(names)
        }
    }
}

/// Those who said so just now.
pub fn fresh<'a>(
    reigns: &[(&'a str, Reign)],
    now: Duration,
    stale_after: Duration,
) -> impl Iterator<Item = (&'a str, Reign)> {
    reigns.iter().copied().filter(move |(_, reign)| now <= reign.until + stale_after)
}

#[cfg(test)]
mod tests {
    use super::*;

    const STALE: Duration = Duration::from_secs(5);

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn reign(server: i64, since: u64, until: u64, flush_lsn: u64) -> Reign {
        Reign {
            system_identifier: 7,
            timeline: 1,
            started_at: DateTime::from_timestamp(server, 0).unwrap(),
            since: at(since),
            until: at(until),
            flush_lsn,
        }
    }

    /// A moment, and who reigns then.
    type Turn<'a> = (u64, Vec<(&'a str, Reign)>);

    #[test]
    fn two_runs_that_overlap_are_a_split_brain() {
        let old = |until, lsn| ("old", reign(1, 10, until, lsn));
        let new = |until, lsn| ("new", reign(2, 20, until, lsn));
        let names = || vec!["new".to_owned(), "old".to_owned()];
        let table: [(&str, Vec<Turn<'_>>, SplitBrain); 9] = [
            ("nobody", vec![(20, vec![])], SplitBrain::No),
            ("one", vec![(20, vec![old(20, 5)])], SplitBrain::No),
            (
                "a failover: the old one was not heard of since",
                vec![(21, vec![old(19, 5), new(21, 6)])],
                SplitBrain::No,
            ),
            (
                "both at a time",
                vec![(21, vec![new(21, 6), old(20, 5)])],
                SplitBrain::Candidate(names()),
            ),
            (
                "only one writes",
                vec![(21, vec![new(21, 6), old(20, 5)]), (22, vec![new(22, 9), old(21, 5)])],
                SplitBrain::Candidate(names()),
            ),
            (
                "both write",
                vec![(21, vec![new(21, 6), old(20, 5)]), (22, vec![new(22, 9), old(21, 8)])],
                SplitBrain::Confirmed(names()),
            ),
            (
                "the old one is gone",
                vec![(21, vec![new(21, 6), old(20, 5)]), (26, vec![new(26, 9), old(20, 5)])],
                SplitBrain::No,
            ),
            (
                "another cluster",
                vec![(
                    21,
                    vec![("new", Reign { system_identifier: 8, ..new(21, 6).1 }), old(20, 5)],
                )],
                SplitBrain::No,
            ),
            (
                "a server by two names",
                vec![(21, vec![("new", reign(1, 20, 21, 6)), old(20, 5)])],
                SplitBrain::No,
            ),
        ];
        for (name, turns, expected) in table {
            let mut rivals = Rivals::default();
            for (now, reigns) in &turns {
                rivals.update(reigns, at(*now), STALE);
            }
            let (now, reigns) = turns.last().unwrap();
            assert_eq!(rivals.verdict(reigns, at(*now), STALE), expected, "{name}");
        }
    }

    #[test]
    fn a_verdict_ends_when_one_of_them_is_silent() {
        let reigns = [("a", reign(1, 10, 30, 5)), ("b", reign(2, 20, 31, 6))];
        let mut rivals = Rivals::default();
        rivals.update(&reigns, at(31), STALE);
        let verdict = |now| rivals.verdict(&reigns, at(now), STALE);
        assert_eq!(verdict(35), SplitBrain::Candidate(vec!["a".to_owned(), "b".to_owned()]));
        assert_eq!(verdict(36), SplitBrain::No);
    }
}
