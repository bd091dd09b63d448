//! What was moved in the last 24 hours, and how each move or job ended: what budgets and rests are
//! counted by. Pure.

use std::collections::BTreeSet;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use serde::{Deserialize, Serialize};

/// For so long a move counts.
pub const DAY: TimeDelta = TimeDelta::hours(24);
/// After one failure a shard group rests for so long, after each more for twice as long …
const REST_MIN: TimeDelta = TimeDelta::minutes(1);
/// … up to this.
const REST_MAX: TimeDelta = TimeDelta::hours(1);

/// After so many failures in a row, of whatever shard group, all rest …
const SETBACKS_MAX: u32 = 3;
/// … for so long, and after each more for twice as long, up to the same hour.
const SETBACK_REST_MIN: TimeDelta = TimeDelta::minutes(5);

/// How a move ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// It has not, or nobody was left to say so.
    Started,
    /// The shard group is where it was to be.
    Moved,
    /// It did not get its lock in time.
    NoLock,
    /// It made way for a statement that waited behind it, and had others wait.
    Yielded,
    /// It was to end: the window closed, somebody paused, the agent stopped.
    Stopped,
    /// It was broken off because a gate closed that it may have closed itself: a server was lost, a disk
    /// filled, the health monitor warned.
    Closed,
    /// It failed, or stood still.
    Failed,
    /// The connection broke: how it ended is not known.
    Unknown,
}

impl Outcome {
    /// All, as metrics list them.
    pub const ENDS: [Self; 7] = [
        Self::Moved,
        Self::NoLock,
        Self::Yielded,
        Self::Stopped,
        Self::Closed,
        Self::Failed,
        Self::Unknown,
    ];

    /// Its name in metrics, logs and JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Started => "started",
            Self::Moved => "moved",
            Self::NoLock => "no_lock",
            Self::Yielded => "yielded",
            Self::Stopped => "stopped",
            Self::Closed => "closed",
            Self::Failed => "failed",
            Self::Unknown => "unknown",
        }
    }
}

/// How a move ended, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct End {
    /// How.
    pub outcome: Outcome,
    /// Why: a sentence without full stop, empty if it was moved.
    pub reason: String,
    /// Whether its session lives on, with its locks.
    pub keeps_locks: bool,
}

impl End {
    /// For that reason.
    pub fn new(outcome: Outcome, reason: impl Into<String>) -> Self {
        Self { outcome, reason: reason.into(), keeps_locks: false }
    }
}

/// A move that was begun, or a job of several.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// When it began.
    pub at: DateTime<Utc>,
    /// The lowest shard of what is moved.
    pub shard: i64,
    /// The group it was on.
    pub from: u32,
    /// The group it is to be on.
    pub to: u32,
    /// Whether reference tables are copied, to each node that lacks them, and nothing is moved.
    #[serde(default)]
    pub copies: bool,
    /// The colocation group of its tables; `None` if they are in none, or an older agent wrote it.
    #[serde(default)]
    pub colocation: Option<u32>,
    /// The number of Citus' background job, where one moves several shard groups, of which `shard`, `from`
    /// and `to` name the first; 0 if Citus did not take it.
    #[serde(default)]
    pub job: Option<i64>,
    /// How many shard groups it moves.
    #[serde(default = "one")]
    pub moves: u32,
    /// Its size. What was broken off half-way counts in full: it was written, and is thrown away.
    pub bytes: u64,
    /// All shards of it.
    #[serde(default)]
    pub shards: Vec<i64>,
    /// Who moves it.
    pub replica: String,
    /// How it ended.
    pub outcome: Outcome,
    /// Why it ended so; empty if all is well.
    pub reason: String,
    /// When it ended.
    #[serde(default)]
    pub ended_at: Option<DateTime<Utc>>,
}

impl Entry {
    /// When it was last heard of.
    fn last_at(&self) -> DateTime<Utc> {
        self.ended_at.unwrap_or(self.at)
    }

    /// Why it did not come to its end.
    fn why(&self) -> &str {
        if self.outcome == Outcome::Started { "nobody said how it ended" } else { &self.reason }
    }
}

fn one() -> u32 {
    1
}

/// What was moved in some time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spent {
    /// Bytes.
    pub bytes: u64,
    /// Shard groups.
    pub moves: u32,
}

/// The moves of the last 24 hours, in their order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ledger {
    entries: Vec<Entry>,
    /// When somebody last said that what failed before is mended.
    resumed_at: Option<DateTime<Utc>>,
    /// Those that are under way: nothing can be said of them yet.
    under_way: Vec<(DateTime<Utc>, i64)>,
}

/// Why something rests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setback {
    /// The colocation group whose moves failed; `None` if those of several did.
    pub colocation: Option<u32>,
    /// Until when.
    pub until: DateTime<Utc>,
    /// How many failed in a row.
    pub failures: u32,
    /// Why the last one did.
    pub why: String,
}

impl Ledger {
    /// From what was kept, in any order.
    pub fn new(mut entries: Vec<Entry>) -> Self {
        entries.sort_by_key(|it| (it.at, it.shard));
        Self { entries, resumed_at: None, under_way: Vec::new() }
    }

    /// What failed before then makes nothing rest any more. It still counts for the budget.
    pub fn resumed(self, at: Option<DateTime<Utc>>) -> Self {
        Self { resumed_at: at.max(self.resumed_at), ..self }
    }

    /// What is known to be under way has not failed.
    pub fn under_way(mut self, is_under_way: impl Fn(&Entry) -> bool) -> Self {
        let begun = self.entries.iter().filter(|it| it.outcome == Outcome::Started);
        self.under_way = begun.filter(|it| is_under_way(it)).map(|it| (it.at, it.shard)).collect();
        self
    }

    /// Writes down a move, in place of what was said of it before, and forgets what is too old.
    pub fn record(&mut self, entry: Entry) {
        let is_other = |it: &Entry| (it.at, it.shard) != (entry.at, entry.shard);
        self.entries.retain(|it| entry.at < it.at + DAY && is_other(it));
        self.entries.push(entry);
        self.entries.sort_by_key(|it| (it.at, it.shard));
    }

    /// The newest first.
    pub fn newest(&self) -> impl Iterator<Item = &Entry> {
        self.entries.iter().rev()
    }

    /// The job that was begun, if nobody has said how it ended.
    pub fn job(&self) -> Option<&Entry> {
        let mut jobs = self.newest().filter(|it| it.job.is_some());
        jobs.find(|it| it.outcome == Outcome::Started)
    }

    /// What was moved from `since` on.
    pub fn spent(&self, since: DateTime<Utc>) -> Spent {
        let counted = self.entries.iter().filter(|it| since <= it.at);
        counted.fold(Spent::default(), |spent, it| Spent {
            bytes: spent.bytes.saturating_add(it.bytes),
            moves: spent.moves.saturating_add(it.moves),
        })
    }

    /// What rests because the last moves failed: tables whose own moves did, and everything where those of
    /// several did.
    pub fn setbacks(&self) -> Vec<Setback> {
        let mut found: Vec<_> =
            self.colocations().filter_map(|it| self.setback(Some(it))).collect();
        found.extend(self.setback(None));
        found
    }

    /// The colocation groups of which something was moved.
    fn colocations(&self) -> impl Iterator<Item = u32> {
        let all: BTreeSet<u32> = self.entries.iter().filter_map(|it| it.colocation).collect();
        all.into_iter()
    }

    fn setback(&self, colocation: Option<u32>) -> Option<Setback> {
        let is_of = |it: &Entry| colocation.is_none() || it.colocation == colocation;
        let (last, failures) = self.failures(is_of)?;
        let doublings = failures.checked_sub(SETBACKS_MAX)?;
        let until = last.last_at() + rest_after(SETBACK_REST_MIN, doublings);
        // What fails for one group of tables alone is no reason to leave others where they are.
        let is_of_one = |one: u32| self.failed(|_| true).all(|it| it.colocation == Some(one));
        if colocation.is_none() && last.colocation.is_some_and(is_of_one) {
            return None;
        }
        Some(Setback { colocation, until, failures, why: last.why().to_owned() })
    }

    /// Until when a shard group is left alone after its last moves failed, and why.
    pub fn rest(&self, shard: i64) -> Option<(DateTime<Utc>, String)> {
        self.rest_of("its last move", |it| it.shard == shard)
    }

    /// Why a shard group rests at `now`, if it does.
    pub fn resting(&self, shard: i64, now: DateTime<Utc>) -> Option<String> {
        let (until, reason) = self.rest(shard).filter(|(until, _)| now < *until)?;
        Some(format!("it rests until {}: {reason}", until.format("%H:%M:%S UTC")))
    }

    /// Why no job begins at `now`, because the last ones failed.
    pub fn jobs_resting(&self, now: DateTime<Utc>) -> Option<String> {
        let rest = self.rest_of("the last job", |it| it.job.is_some());
        let (until, reason) = rest.filter(|(until, _)| now < *until)?;
        Some(format!("none begins until {}: {reason}", until.format("%H:%M:%S UTC")))
    }

    fn rest_of(
        &self,
        what: &str,
        is_of: impl Fn(&Entry) -> bool,
    ) -> Option<(DateTime<Utc>, String)> {
        let (last, failures) = self.failures(is_of)?;
        let s = if failures == 1 { "" } else { "s" };
        let until = last.last_at() + rest_after(REST_MIN, failures - 1);
        Some((until, format!("{what}{s} failed: {}", last.why())))
    }

    /// The same without one of them.
    pub fn without(mut self, entry: &Entry) -> Self {
        self.entries.retain(|it| (it.at, it.shard) != (entry.at, entry.shard));
        self
    }

    /// The last failure and how many there are in a row, if the last of those moves failed.
    fn failures(&self, is_of: impl Fn(&Entry) -> bool) -> Option<(&Entry, u32)> {
        let mut failed = self.failed(is_of);
        let last = failed.next()?;
        Some((last, u32::try_from(failed.count()).unwrap_or(u32::MAX).saturating_add(1)))
    }

    /// Those of the last moves that failed in a row, the newest first. One that was to end, or is under way,
    /// says nothing either way.
    fn failed(&self, is_of: impl Fn(&Entry) -> bool) -> impl Iterator<Item = &Entry> {
        let is_old = |it: &Entry| self.resumed_at.is_some_and(|at| it.last_at() <= at);
        let says_nothing = |it: &Entry| {
            it.outcome == Outcome::Stopped || self.under_way.contains(&(it.at, it.shard))
        };
        self.newest()
            .filter(move |it| is_of(it) && !says_nothing(it))
            .take_while(move |it| it.outcome != Outcome::Moved && !is_old(it))
    }
}

fn rest_after(least: TimeDelta, doublings: u32) -> TimeDelta {
    REST_MAX.min(least * 2_i32.pow(doublings.min(10)))
}

/// How long an entry is to be kept.
pub fn kept_for() -> Duration {
    DAY.to_std().unwrap_or_default()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    fn at(minute: i64) -> DateTime<Utc> {
        DateTime::from_timestamp(1_800_000_000 + 60 * minute, 0).unwrap()
    }

    pub(crate) fn entry(minute: i64, shard: i64, outcome: Outcome) -> Entry {
        Entry {
            at: at(minute),
            shard,
            from: 1,
            to: 2,
            copies: false,
            colocation: None,
            job: None,
            moves: 1,
            bytes: 10,
            shards: vec![shard],
            replica: "host-1".to_owned(),
            outcome,
            reason: "why".to_owned(),
            ended_at: None,
        }
    }

    #[test]
    fn what_was_begun_counts_however_it_ended() {
        let ends = [Outcome::Moved, Outcome::Stopped, Outcome::Failed, Outcome::Started];
        let entries = (0..).zip(ends).map(|(minute, outcome)| entry(minute, minute, outcome));
        let ledger = Ledger::new(entries.collect());
        assert_eq!(ledger.spent(at(0)), Spent { bytes: 40, moves: 4 });
        assert_eq!(ledger.spent(at(2)), Spent { bytes: 20, moves: 2 });
        assert_eq!(ledger.spent(at(4)), Spent::default());
    }

    #[test]
    fn a_job_counts_as_its_moves_and_rests_as_a_whole() {
        let job = |minute, shard, outcome| Entry {
            job: Some(7),
            moves: 16,
            bytes: 160,
            ..entry(minute, shard, outcome)
        };
        let of_shard = entry(0, 1, Outcome::Moved);
        let failed = job(1, 2, Outcome::Failed);
        let ledger = Ledger::new(vec![of_shard, failed.clone()]);
        assert_eq!(ledger.spent(at(0)), Spent { bytes: 170, moves: 17 });
        let expected = "none begins until 08:02:00 UTC: the last job failed: why";
        assert_eq!(ledger.jobs_resting(at(1)).as_deref(), Some(expected));
        assert_eq!(ledger.jobs_resting(at(2)), None);
        // Whichever shard group it began with.
        let again = Ledger::new(vec![failed.clone(), job(2, 3, Outcome::NoLock)]);
        let expected = "none begins until 08:04:00 UTC: the last jobs failed: why";
        assert_eq!(again.jobs_resting(at(2)).as_deref(), Some(expected));
        assert_eq!(again.job(), None);
        let begun = job(0, 4, Outcome::Started);
        let both = Ledger::new(vec![entry(3, 1, Outcome::Started), begun.clone(), failed.clone()]);
        assert_eq!(both.job(), Some(&begun));
        assert_eq!(ledger.without(&failed).spent(at(0)), Spent { bytes: 10, moves: 1 });
        // As another version wrote it, or one without jobs.
        let text = serde_json::to_string(&failed).unwrap();
        assert_eq!(serde_json::from_str::<Entry>(&text).unwrap(), failed);
        let old = text.replace("\"job\":7,\"moves\":16,", "");
        let found = serde_json::from_str::<Entry>(&old).unwrap();
        assert_eq!((found.job, found.moves), (None, 1));
    }

    #[test]
    fn an_entry_replaces_what_was_said_before_and_a_day_is_kept() {
        let mut ledger = Ledger::default();
        ledger.record(entry(0, 1, Outcome::Started));
        ledger.record(entry(0, 1, Outcome::Moved));
        assert_eq!(ledger, Ledger::new(vec![entry(0, 1, Outcome::Moved)]));
        ledger.record(entry(24 * 60 - 1, 2, Outcome::Started));
        assert_eq!(ledger.newest().count(), 2);
        ledger.record(entry(24 * 60, 3, Outcome::Started));
        assert_eq!(ledger.newest().map(|it| it.shard).collect::<Vec<_>>(), [3, 2]);
        let text = serde_json::to_string(&entry(0, 1, Outcome::NoLock)).unwrap();
        assert_eq!(serde_json::from_str::<Entry>(&text).unwrap(), entry(0, 1, Outcome::NoLock));
    }

    #[test]
    fn a_failure_makes_a_shard_group_rest_longer_each_time() {
        use Outcome::{Closed, Failed, Moved, NoLock, Started, Stopped, Unknown};
        for (outcomes, expected) in [
            (vec![], None),
            (vec![Moved], None),
            (vec![Stopped], None),
            (vec![NoLock], Some(1)),
            // What it does to a disk or a server it would do again.
            (vec![Closed], Some(1)),
            (vec![Closed, Stopped, Closed], Some(2)),
            (vec![NoLock, Failed], Some(2)),
            (vec![Failed, Failed, Unknown, Started], Some(8)),
            (vec![Failed, Moved, Failed], Some(1)),
            (vec![Failed; 40], Some(60)),
        ] {
            let entries = (0..).zip(&outcomes).map(|(minute, it)| entry(minute, 1, *it));
            let ledger = Ledger::new(entries.collect());
            let last = i64::try_from(outcomes.len()).unwrap() - 1;
            let found = ledger.rest(1).map(|it| it.0);
            assert_eq!(found, expected.map(|it| at(last + it)), "{outcomes:?}");
            assert_eq!(ledger.rest(2), None);
        }
    }

    #[test]
    fn a_rest_begins_when_the_move_has_ended() {
        let long = Entry { ended_at: Some(at(100)), ..entry(0, 1, Outcome::Failed) };
        assert_eq!(Ledger::new(vec![long]).rest(1).map(|it| it.0), Some(at(101)));
    }

    /// An operator who has mended it need not wait for an hour.
    #[test]
    fn what_failed_before_somebody_resumed_makes_nothing_rest() {
        let entries = (0..4).map(|minute| entry(minute, 1, Outcome::Failed));
        let ledger = Ledger::new(entries.collect());
        for (resumed, rest, setback) in [
            (None, Some(3 + 8), Some(4)),
            (Some(0), Some(3 + 4), Some(3)),
            (Some(2), Some(4), None),
            (Some(3), None, None),
        ] {
            let ledger = ledger.clone().resumed(resumed.map(at));
            assert_eq!(ledger.rest(1).map(|it| it.0), rest.map(at), "{resumed:?}");
            let found = ledger.setbacks().first().map(|it| it.failures);
            assert_eq!(found, setback, "{resumed:?}");
            assert_eq!(ledger.spent(at(0)).moves, 4);
        }
    }

    #[test]
    fn failures_of_any_shard_group_make_all_rest() {
        use Outcome::{Failed, Moved, NoLock, Started, Stopped, Unknown};
        for (outcomes, expected) in [
            (vec![Failed, Failed], None),
            (vec![Failed, Failed, Failed], Some((2 + 5, 3))),
            (vec![Failed, NoLock, Unknown, Started], Some((3 + 10, 4))),
            (vec![Failed, Failed, Stopped, Failed], Some((3 + 5, 3))),
            (vec![Failed, Failed, Failed, Stopped], Some((2 + 5, 3))),
            (vec![Failed, Failed, Failed, Moved], None),
            (vec![Failed; 40], Some((39 + 60, 40))),
        ] {
            let entries = (0..).zip(&outcomes).map(|(minute, it)| entry(minute, minute, *it));
            let found = Ledger::new(entries.collect()).setbacks();
            let found = found.first().map(|it| (it.until, it.failures));
            let expected = expected.map(|(minute, times)| (at(minute), times));
            assert_eq!(found, expected, "{outcomes:?}");
        }
    }

    #[test]
    fn failures_of_one_colocation_group_make_that_one_rest() {
        use Outcome::{Failed, Moved, Stopped};
        for (moves, expected) in [
            (vec![(1, Failed); 2], vec![]),
            (vec![(1, Failed); 3], vec![(Some(1), 3)]),
            // The server that all of them go to, perhaps.
            (vec![(1, Failed), (1, Failed), (2, Failed)], vec![(None, 3)]),
            (
                vec![(1, Failed), (1, Failed), (1, Failed), (2, Failed)],
                vec![(Some(1), 3), (None, 4)],
            ),
            (
                vec![(1, Failed), (1, Failed), (2, Moved), (1, Failed), (2, Stopped)],
                vec![(Some(1), 3)],
            ),
            (vec![(1, Failed), (1, Failed), (1, Moved), (1, Failed)], vec![]),
        ] {
            let of = |(minute, (colocation, outcome)): (i64, &(u32, Outcome))| Entry {
                colocation: Some(*colocation),
                ..entry(minute, minute, *outcome)
            };
            let ledger = Ledger::new((0..).zip(&moves).map(of).collect());
            let found = ledger.setbacks().into_iter().map(|it| (it.colocation, it.failures));
            assert_eq!(found.collect::<Vec<_>>(), expected, "{moves:?}");
        }
    }

    #[test]
    fn what_is_under_way_has_not_failed() {
        let mut entries: Vec<_> = (0..2).map(|it| entry(it, 1, Outcome::Failed)).collect();
        entries.push(entry(2, 1, Outcome::Started));
        let ledger = Ledger::new(entries);
        assert_eq!((ledger.rest(1).map(|it| it.0), ledger.setbacks().len()), (Some(at(2 + 4)), 1));
        let ledger = ledger.under_way(|it| it.shard == 1);
        assert_eq!((ledger.rest(1).map(|it| it.0), ledger.setbacks()), (Some(at(1 + 2)), vec![]));
        assert_eq!(ledger.spent(at(0)).moves, 3);
    }
}
