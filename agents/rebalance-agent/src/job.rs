//! A rebalance as one background job of Citus: whether one may begin, and what to do with it in each of its
//! states. Pure.
//!
//! Citus plans all of it at the start, tries what failed again for half an hour, and knows of no window, no
//! budget and no gate. So it begins only if all of it may be moved, and is stopped as a whole.

use std::collections::BTreeSet;

use chrono::{DateTime, TimeDelta, Utc};
use serde::{Deserialize, Serialize};

use crate::guard::{Gate, Refusal, Scope};
use crate::ledger::{End, Entry, Ledger, Outcome};
use crate::plan::{Move, Plan, Why, Wish};
use crate::words::count;

/// How often a task may fail. Citus tries it again after 5 s, 20 s, and then each minute for half an hour, and
/// says nothing of it.
pub const RETRIES_FINE: u32 = 1;
/// How long it may wait for its first task: Citus looks at its queue each 5 s.
const SCHEDULED_MAX: TimeDelta = TimeDelta::seconds(30);
/// How long it may run: that it is ours is remembered for a day.
const AGE_MAX: TimeDelta = TimeDelta::hours(23);

/// All that Citus would move, as one job.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// Why it does not begin, beside what is refused anyway.
    pub refused: Option<String>,
}

impl Offer {
    /// `None` if Citus would move nothing.
    pub fn new(plan: &Plan, wishes: &[Wish], ledger: &Ledger, now: DateTime<Utc>) -> Option<Self> {
        let moved: BTreeSet<i64> =
            plan.moves.iter().filter(|it| it.why == Why::Citus).map(|it| it.shard).collect();
        wishes.first()?;
        let stays = wishes.iter().find(|it| !moved.contains(&it.shard)).map(|it| {
            let name = format!("shard {} of ", it.shard);
            let skipped = plan.skipped.iter().find(|it| it.what.starts_with(&name));
            let why = skipped.map_or(plan.end.as_str(), |it| it.reason.as_str());
            format!("a job moves all that Citus plans, and shard {} stays: {why}", it.shard)
        });
        Some(Self { refused: ledger.jobs_resting(now).or(stays) })
    }
}

/// What a job counts that ended so: how many shard groups, and how many bytes. One that is stopped moves no more;
/// what it was at counts in full, as a move that is broken off does.
pub fn cost(entry: &Entry, outcome: Outcome, done: u32, written: u64) -> (u32, u64) {
    let Entry { moves, bytes, .. } = *entry;
    let begun = match outcome {
        Outcome::Moved | Outcome::Unknown => moves,
        _ => done.saturating_add(1).min(moves),
    };
    let share = u128::from(bytes) * u128::from(begun) / u128::from(moves.max(1));
    (begun, u64::try_from(share).unwrap_or(u64::MAX).max(written))
}

/// What a task of a job moves: a shard, from which group, to which; `None` if it does something else.
pub type Task = Option<(i64, u32, u32)>;

/// Where the tasks that Citus has made differ from what was planned.
pub fn differs(moves: &[Move], tasks: &[Task]) -> Option<String> {
    let is_planned = |(shard, from, to): (i64, u32, u32)| {
        moves.iter().any(|it| it.shards.contains(&shard) && (it.from, it.to) == (from, to))
    };
    if tasks.contains(&None) {
        return Some("Citus would do something that is no move of a shard, too".to_owned());
    }
    let other = tasks.iter().flatten().find(|it| !is_planned(**it));
    match other {
        Some((shard, from, to)) => Some(format!(
            "Citus would move shard {shard} from group {from} to group {to}, which it did not plan a moment ago"
        )),
        None if tasks.len() != moves.len() => Some(format!(
            "Citus would move {}, where it planned {} a moment ago",
            count(tasks.len(), "shard group"),
            moves.len()
        )),
        None => None,
    }
}

/// What Citus says of a job.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// `state`, in Citus' words.
    pub state: String,
    /// How many tasks it has.
    pub tasks: u32,
    /// How many of them are done.
    pub done: u32,
    /// How often one failed that is not done, at most.
    pub retries: u32,
    /// What that one says of it.
    pub message: String,
    /// The processes that are at a task now.
    pub pids: Vec<i32>,
}

impl Seen {
    /// Whether nothing of it will be moved any more.
    pub fn is_over(&self) -> bool {
        let is_final = matches!(self.state.as_str(), "finished" | "cancelled" | "failed");
        is_final && self.pids.is_empty()
    }

    /// `3 of 16 moves are done`.
    pub fn so_far(&self) -> String {
        format!("{} of {} are done", self.done, count(self.tasks as usize, "move"))
    }

    /// That a task of it failed, and how.
    fn failure(&self) -> End {
        let Self { retries, message, .. } = self;
        let times = count(*retries as usize, "time");
        let line = message.lines().next().unwrap_or_default();
        let line = if line.is_empty() { "it does not say why" } else { line };
        let what = format!("{}, and one failed {times}: {line}", self.so_far());
        if message.contains("lock timeout") {
            return End::new(Outcome::NoLock, what);
        }
        let next = "see the logs of the coordinator and of both nodes";
        End::new(Outcome::Failed, format!("{what}; {next}"))
    }
}

/// What the moves of a job touch that are not done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Remaining {
    /// The groups they move from and to.
    pub groups: BTreeSet<u32>,
    /// Those they move to.
    pub targets: BTreeSet<u32>,
    /// The colocation groups of their tables.
    pub colocations: BTreeSet<u32>,
}

/// Why a job must not go on: a gate has closed that would keep one of its moves from beginning, or a drain
/// has begun, which comes first. Its own moves close gates, too: those of what is moved, is to be cleaned up or
/// was spent say nothing. `remaining` is `None` while that is unknown: then all of it may concern the job.
pub fn gate(
    refusals: &[Refusal],
    drains: &BTreeSet<u32>,
    moves: &[Move],
    remaining: Option<&Remaining>,
) -> Option<End> {
    let concerns = |scope| match scope {
        Scope::Cluster | Scope::Group(0) => true,
        Scope::Group(group) => remaining.is_none_or(|it| it.groups.contains(&group)),
        Scope::Colocation(id) => remaining.is_none_or(|it| it.colocations.contains(&id)),
        Scope::Shard(_) => false,
    };
    let of_itself = |gate| {
        use Gate::{Budget, Busy, Cleanup, Leftovers, Setbacks, Sizes};
        matches!(gate, Budget | Busy | Cleanup | Leftovers | Setbacks | Sizes)
    };
    let mut closed = refusals.iter().filter(|it| concerns(it.scope));
    let closed = closed.find_map(|it| match it.ends_a_move() {
        Some(outcome) => Some(End::new(outcome, &it.reason)),
        None if of_itself(it.gate) => None,
        None => Some(End::new(Outcome::Closed, &it.reason)),
    });
    let is_drained = |group: &&u32| remaining.is_some_and(|it| it.targets.contains(group));
    let drained = drains.iter().find(is_drained).copied();
    let drained =
        drained.or_else(|| moves.iter().find(|it| it.why == Why::Drain).map(|it| it.from));
    closed.or_else(|| {
        let reason = format!("group {} is to be emptied, which comes first", drained?);
        Some(End::new(Outcome::Stopped, reason))
    })
}

/// What to do with a job that is ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// Watch it.
    Watch,
    /// Stop it.
    Stop(End),
    /// Write down how it ended.
    Over(End),
}

/// What to do with a job that is so old; `None`: Citus knows of none.
pub fn next(seen: Option<&Seen>, age: TimeDelta) -> Next {
    let stopped = |reason: String| End::new(Outcome::Stopped, reason);
    let Some(seen) = seen else {
        let reason = "Citus knows of no such job: it never began, or somebody deleted it";
        return Next::Over(End::new(Outcome::Unknown, reason));
    };
    match seen.state.as_str() {
        "finished" if seen.is_over() => Next::Over(End::new(Outcome::Moved, "")),
        "failed" if seen.is_over() => Next::Over(seen.failure()),
        "cancelled" if seen.is_over() => {
            Next::Over(stopped(format!("somebody stopped it; {}", seen.so_far())))
        }
        "failing" => Next::Stop(seen.failure()),
        "scheduled" if SCHEDULED_MAX <= age => Next::Stop(End::new(
            Outcome::Failed,
            "no task of it began within 30s: raise max_worker_processes on the coordinator if its log says that \
             it is unable to start background worker; or see citus.background_task_queue_interval",
        )),
        "running" if RETRIES_FINE < seen.retries => Next::Stop(seen.failure()),
        "running" if AGE_MAX <= age => {
            Next::Stop(stopped(format!("it ran for 23h, longer than a job may; {}", seen.so_far())))
        }
        // Of those that are over, a process may be on its way out.
        "scheduled" | "running" | "finished" | "failed" | "cancelled" | "cancelling" => Next::Watch,
        other => Next::Stop(End::new(
            Outcome::Failed,
            format!("Citus calls it {other}, which this agent does not know: update it"),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::balance::Figure;
    use crate::plan::Skipped;

    fn now() -> DateTime<Utc> {
        "2026-03-10T02:00:00Z".parse().unwrap()
    }

    fn seen(state: &str, done: u32, retries: u32, pids: &[i32]) -> Seen {
        Seen {
            state: state.to_owned(),
            tasks: 3,
            done,
            retries,
            message: "ERROR: could not fetch disk stats\nCONTEXT: Citus".to_owned(),
            pids: pids.to_vec(),
        }
    }

    #[test]
    fn what_is_done_with_a_job_follows_from_its_state() {
        let failed = |retries: &str| {
            format!(
                "1 of 3 moves are done, and one failed {retries}: ERROR: could not fetch disk stats; see the \
                 logs of the coordinator and of both nodes"
            )
        };
        let unknown = "Citus knows of no such job: it never began, or somebody deleted it";
        let waits = "no task of it began within 30s: raise max_worker_processes on the coordinator if its log \
                     says that it is unable to start background worker; or see \
                     citus.background_task_queue_interval";
        let strange = "Citus calls it paused, which this agent does not know: update it";
        let (two, three) = (failed("2 times"), failed("33 times"));
        let watch = ("watch", Outcome::Started, "");
        for (name, seen, seconds, (expected, outcome, reason)) in [
            ("gone", None, 0, ("over", Outcome::Unknown, unknown)),
            ("it waits for its turn", Some(seen("scheduled", 0, 0, &[])), 29, watch),
            (
                "it waits for a worker",
                Some(seen("scheduled", 0, 0, &[])),
                30,
                ("stop", Outcome::Failed, waits),
            ),
            ("a task runs", Some(seen("running", 0, 0, &[7])), 3600, watch),
            ("between two tasks", Some(seen("running", 1, 0, &[])), 3600, watch),
            // As after a crash of the coordinator.
            ("a task was begun again", Some(seen("running", 1, 1, &[])), 3600, watch),
            (
                "it fails again and again",
                Some(seen("running", 1, 2, &[])),
                60,
                ("stop", Outcome::Failed, &two),
            ),
            (
                "a day",
                Some(seen("running", 1, 0, &[7])),
                23 * 3600,
                (
                    "stop",
                    Outcome::Stopped,
                    "it ran for 23h, longer than a job may; 1 of 3 moves are done",
                ),
            ),
            (
                "one failed for good, others run",
                Some(seen("failing", 1, 33, &[7])),
                60,
                ("stop", Outcome::Failed, &three),
            ),
            ("failed", Some(seen("failed", 1, 33, &[])), 60, ("over", Outcome::Failed, &three)),
            ("it is being stopped", Some(seen("cancelling", 1, 0, &[7])), 60, watch),
            ("its process ends", Some(seen("cancelled", 1, 0, &[7])), 60, watch),
            (
                "somebody stopped it",
                Some(seen("cancelled", 1, 0, &[])),
                60,
                ("over", Outcome::Stopped, "somebody stopped it; 1 of 3 moves are done"),
            ),
            ("finished", Some(seen("finished", 3, 0, &[])), 60, ("over", Outcome::Moved, "")),
            (
                "of another version",
                Some(seen("paused", 1, 0, &[])),
                60,
                ("stop", Outcome::Failed, strange),
            ),
        ] {
            let found = next(seen.as_ref(), TimeDelta::seconds(seconds));
            let end = End::new(outcome, reason);
            let expected = match expected {
                "watch" => Next::Watch,
                "stop" => Next::Stop(end),
                _ => Next::Over(end),
            };
            assert_eq!(found, expected, "{name}");
        }
    }

    #[test]
    fn a_lock_that_is_not_got_is_told_from_a_failure() {
        let message = "ERROR: canceling statement due to lock timeout\nCONTEXT: Citus".to_owned();
        let seen = Seen { message, ..seen("running", 0, 2, &[]) };
        let reason = "0 of 3 moves are done, and one failed 2 times: ERROR: canceling statement due to lock \
                      timeout";
        let expected = Next::Stop(End::new(Outcome::NoLock, reason));
        assert_eq!(next(Some(&seen), TimeDelta::zero()), expected);
    }

    fn planned(shard: i64, from: u32, to: u32) -> Move {
        Move {
            shard,
            shards: vec![shard, shard + 100],
            colocation: 1,
            tables: vec![],
            bytes: 1,
            from,
            to,
            why: Why::Citus,
            gain: 0.0,
            figure_after: 0.0,
        }
    }

    /// Any shard of a group may stand for it, and all else must be as planned.
    #[test]
    fn a_job_that_is_another_than_was_planned_is_found_out() {
        let moves = [planned(1, 1, 2), planned(2, 1, 3)];
        for (tasks, expected) in [
            (vec![Some((1, 1, 2)), Some((2, 1, 3))], None),
            (vec![Some((102, 1, 3)), Some((1, 1, 2))], None),
            (vec![None, Some((1, 1, 2)), Some((2, 1, 3))], Some("something that is no move")),
            (vec![Some((1, 1, 2)), Some((2, 1, 2))], Some("shard 2 from group 1 to group 2")),
            (vec![Some((1, 1, 2)), Some((3, 1, 3))], Some("shard 3 from group 1 to group 3")),
            (vec![Some((1, 1, 2))], Some("1 shard group, where it planned 2")),
            (
                vec![Some((1, 1, 2)), Some((2, 1, 3)), Some((1, 1, 2))],
                Some("3 shard groups, where it planned 2"),
            ),
        ] {
            let found = differs(&moves, &tasks);
            let is_as_expected = match (&found, expected) {
                (None, None) => true,
                (Some(found), Some(expected)) => found.contains(expected),
                _ => false,
            };
            assert!(is_as_expected, "{tasks:?}: {found:?}");
        }
    }

    /// A move that is under way may end; a job would begin one after the other.
    #[test]
    fn what_would_keep_a_move_from_beginning_ends_a_job() {
        use Gate::{
            Activity, BaseBackup, Budget, Busy, Cleanup, Disk, Headroom, Lag, Links, Owner,
            ReplicaIdentity, Setbacks, Transactions, Window,
        };
        let remaining =
            Remaining { groups: [1, 2].into(), targets: [2].into(), colocations: [1].into() };
        let (closed, stopped) = (Some(Outcome::Closed), Some(Outcome::Stopped));
        for (gate_, scope, expected, unknown) in [
            (Window, Scope::Cluster, stopped, stopped),
            (Disk, Scope::Group(2), closed, closed),
            (Lag, Scope::Group(1), closed, closed),
            (Lag, Scope::Group(3), None, closed),
            (Lag, Scope::Group(0), closed, closed),
            (Transactions, Scope::Group(2), closed, closed),
            (BaseBackup, Scope::Group(1), closed, closed),
            (Activity, Scope::Group(1), closed, closed),
            (Headroom, Scope::Group(2), closed, closed),
            (Links, Scope::Cluster, closed, closed),
            (Owner, Scope::Colocation(1), closed, closed),
            (ReplicaIdentity, Scope::Colocation(2), None, closed),
            // As its own moves close them.
            (Busy, Scope::Cluster, None, None),
            (Cleanup, Scope::Cluster, None, None),
            (Budget, Scope::Cluster, None, None),
            (Setbacks, Scope::Cluster, None, None),
            (Budget, Scope::Shard(1), None, None),
        ] {
            let (reason, next) = ("why".to_owned(), String::new());
            let refusals = [Refusal { gate: gate_, scope, reason, next }];
            let found = |it| gate(&refusals, &BTreeSet::new(), &[], it).map(|it| it.outcome);
            assert_eq!(found(Some(&remaining)), expected, "{gate_:?} {scope}");
            assert_eq!(found(None), unknown, "{gate_:?} {scope}");
        }
        let drained = |group: u32| {
            let reason = format!("group {group} is to be emptied, which comes first");
            Some(End::new(Outcome::Stopped, reason))
        };
        let of_drain = [Move { why: Why::Drain, ..planned(7, 3, 1) }];
        for (drains, moves, expected) in [
            (BTreeSet::from([2]), &[][..], drained(2)),
            // There is nothing to move off it: it may stay empty.
            (BTreeSet::from([3]), &[], None),
            (BTreeSet::from([3]), &of_drain, drained(3)),
        ] {
            assert_eq!(gate(&[], &drains, moves, Some(&remaining)), expected, "{drains:?}");
        }
    }

    fn entry(minutes: i64, job: Option<i64>, outcome: Outcome) -> Entry {
        Entry {
            at: now() + TimeDelta::minutes(minutes),
            shard: 1,
            from: 1,
            to: 2,
            copies: false,
            colocation: None,
            job,
            moves: 2,
            bytes: 2,
            shards: vec![1, 2],
            replica: "host-1".to_owned(),
            outcome,
            reason: "why".to_owned(),
            ended_at: None,
        }
    }

    #[test]
    fn all_that_citus_plans_is_offered_or_nothing() {
        let wish = |shard, to| Wish { shard, to };
        let skipped =
            |what: &str, reason: &str| Skipped { what: what.to_owned(), reason: reason.to_owned() };
        let plan = |moves: Vec<Move>, skipped: Vec<Skipped>, end: &str| Plan {
            before: Figure::default(),
            after: Figure::default(),
            moves,
            skipped,
            hot: vec![],
            end: end.to_owned(),
        };
        let both = vec![planned(1, 1, 2), planned(2, 1, 3)];
        let stays =
            |why: &str| Some(format!("a job moves all that Citus plans, and shard 2 stays: {why}"));
        let lag = vec![skipped("w3:5432", "it lags"), skipped("shard 2 of public.a", "w3 lags")];
        let of_drain = Move { why: Why::Drain, ..planned(2, 1, 3) };
        let failed = Ledger::new(vec![entry(0, Some(7), Outcome::Failed)]);
        let rests = "none begins until 02:01:00 UTC: the last job failed: why".to_owned();
        for (name, plan, ledger, expected) in [
            ("all of it", plan(both.clone(), vec![], "so"), Ledger::default(), None),
            (
                "one stays",
                plan(vec![planned(1, 1, 2)], lag, "so"),
                Ledger::default(),
                stays("w3 lags"),
            ),
            (
                "the budget",
                plan(vec![planned(1, 1, 2)], vec![], "no more"),
                Ledger::default(),
                stays("no more"),
            ),
            (
                "a drain comes first",
                plan(vec![of_drain, planned(1, 1, 2)], vec![], "so"),
                Ledger::default(),
                stays("so"),
            ),
            ("the last one failed", plan(both, vec![], "so"), failed, Some(rests)),
        ] {
            let offer = Offer::new(&plan, &[wish(1, 2), wish(2, 3)], &ledger, now());
            assert_eq!(offer, Some(Offer { refused: expected }), "{name}");
            assert_eq!(Offer::new(&plan, &[], &ledger, now()), None, "{name}");
        }
    }

    /// Otherwise one that was stopped early would take the budget of the whole night.
    #[test]
    fn a_job_that_is_stopped_counts_as_far_as_it_came() {
        for (outcome, done, written, expected) in [
            (Outcome::Moved, 4, 390, (4, 400)),
            (Outcome::Unknown, 1, 190, (4, 400)),
            (Outcome::NoLock, 0, 90, (1, 100)),
            (Outcome::Stopped, 1, 120, (2, 200)),
            (Outcome::Failed, 1, 350, (2, 350)),
            (Outcome::Closed, 4, 390, (4, 400)),
        ] {
            let entry = Entry { moves: 4, bytes: 400, ..entry(0, Some(7), Outcome::Started) };
            assert_eq!(cost(&entry, outcome, done, written), expected, "{outcome:?} {done}");
        }
    }
}
