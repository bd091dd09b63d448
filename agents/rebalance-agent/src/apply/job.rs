//! Has Citus move all that it plans as one background job; watches it, and stops it when it must.
//!
//! Its tasks run as our role with that role's own settings, whatever the session was set to that began them. So
//! the role has a `lock_timeout`, and without it no job begins; how long the locks are kept is watched.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use chrono::Utc;
use humantime::format_duration;
use shared::pg::{Connection, QueryError, Settings, connect};
use shared::telemetry::chain;
use tokio::time::{Instant, sleep, timeout};
use tokio_postgres::Row;
use tracing::debug;

use super::locks::Movers;
use super::progress::{self, Progress, Standstill};
use super::{ApplyError, CANCEL_LIMIT, Hand, TICK, TICK_NEAR_THE_END};
use crate::config::Apply;
use crate::job::{Next, Remaining, Seen, Task, differs, next};
use crate::ledger::{End, Entry, Outcome};
use crate::memory::MemoryError;
use crate::plan::Move;
use crate::words::bytes as in_words;

/// How long Citus may plan: it asks for the size of every shard.
const BEGIN_TIMEOUT: Duration = Duration::from_mins(1);
/// How long the server waits for us between its answer and the last word: what it holds up meanwhile is
/// its own queue.
const LAST_WORD: &str = "SET idle_in_transaction_session_timeout = '10s'";

/// In sessions of their own, as those of the tasks are.
const LOCK_TIMEOUTS: &str = "
    SELECT coalesce(bool_and(success AND result = 't'), false)
      FROM run_command_on_all_nodes(
               format('SELECT setting::bigint BETWEEN 1 AND %s FROM pg_settings
                        WHERE name = ''lock_timeout''', $1::bigint))";

/// NULL if it would move nothing. The same transfer mode as that of a move, and the same strategy as that of
/// the plan: the default one.
const START: &str = "SELECT citus_rebalance_start(shard_transfer_mode := 'auto')";

/// What the tasks of a job move.
const TASKS: &str = r"
    SELECT match[1]::bigint, source.groupid::bigint, target.groupid::bigint
      FROM pg_dist_background_task AS task
      LEFT JOIN LATERAL regexp_match(
               command, '^SELECT pg_catalog\.citus_move_shard_placement\((\d+),(\d+),(\d+),''auto''\)$')
           AS match ON true
      LEFT JOIN pg_dist_node AS source ON source.nodeid = match[2]::int
      LEFT JOIN pg_dist_node AS target ON target.nodeid = match[3]::int
     WHERE job_id = $1";

/// These relations tell it while a node is away, when `citus_job_status()` fails. A process that has ended may
/// stand there a second longer.
const SEEN: &str = "
    SELECT job.state::text, count(task.task_id)::bigint,
           count(*) FILTER (WHERE task.status::text = 'done')::bigint,
           coalesce(max(task.retry_count) FILTER (WHERE task.status::text <> 'done'), 0)::bigint,
           (array_agg(task.message ORDER BY task.retry_count DESC)
               FILTER (WHERE task.status::text <> 'done' AND 0 < task.retry_count))[1],
           array_agg(task.pid) FILTER (WHERE process.pid IS NOT NULL)
      FROM pg_dist_background_job AS job
      LEFT JOIN pg_dist_background_task AS task ON task.job_id = job.job_id
      LEFT JOIN pg_stat_activity AS process
        ON process.pid = task.pid AND task.status::text IN ('running', 'cancelling')
     WHERE job.job_id = $1
     GROUP BY job.state";

/// What the moves of a job touch that are not done: from where, to where, and whose tables.
const REMAINING: &str = r"
    SELECT source.groupid::bigint, target.groupid::bigint, table_.colocationid::bigint
      FROM pg_dist_background_task AS task
      CROSS JOIN LATERAL regexp_match(
               command, '^SELECT pg_catalog\.citus_move_shard_placement\((\d+),(\d+),(\d+),')
           AS match
      LEFT JOIN pg_dist_node AS source ON source.nodeid = match[2]::int
      LEFT JOIN pg_dist_node AS target ON target.nodeid = match[3]::int
      LEFT JOIN pg_dist_shard AS shard ON shard.shardid = match[1]::bigint
      LEFT JOIN pg_dist_partition AS table_ ON table_.logicalrelid = shard.logicalrelid
     WHERE job_id = $1 AND status::text <> 'done'";

/// What a job is at, by the process that does it.
type Tasks = BTreeMap<i32, Progress>;

impl Hand<'_> {
    /// Has Citus begin a job that moves just that. `record` writes down its number before the last word.
    ///
    /// # Errors
    ///
    /// It did not begin; unless `record` did its part, and the last word was not answered.
    pub async fn begin_job(
        &self,
        moves: &[Move],
        record: impl AsyncFnOnce(i64) -> Result<(), MemoryError>,
    ) -> Result<(), ApplyError> {
        let settings = Settings { statement_timeout: BEGIN_TIMEOUT, ..self.settings.clone() };
        let connection = Box::pin(connect(&settings, self.coordinator)).await?;
        let limit = i64::try_from(self.limits.lock_timeout.as_millis()).unwrap_or(i64::MAX);
        let is_bounded: bool = connection.query_one(LOCK_TIMEOUTS, &[&limit]).await?.get(0);
        if !is_bounded {
            let (role, limit) = (settings.user, self.limits.lock_timeout);
            return Err(ApplyError::Unbounded { role, limit });
        }
        connection.simple_query(LAST_WORD).await?;
        connection.simple_query("BEGIN").await?;
        let refused = |reason: String| Err(ApplyError::BrokenOff { reason });
        // What is not committed is gone with the connection.
        let Some(id) = connection.query_one(START, &[]).await?.get::<_, Option<i64>>(0) else {
            return refused("Citus would move nothing any more".to_owned());
        };
        if let Some(reason) = differs(moves, &tasks(&connection, id).await?) {
            return refused(reason);
        }
        record(id).await?;
        if !self.claim.is_valid() {
            return refused("the lease was not renewed in time".to_owned());
        }
        connection.simple_query("COMMIT").await?;
        Ok(())
    }

    /// Watches a job until it has ended, or until `halted` or what it does say how it is to end. `left` bytes may
    /// be written for it. `show` takes what Citus says, how far it is, and how many bytes were written.
    ///
    /// # Errors
    ///
    /// It must not go on: how it is to end.
    pub async fn watch_job(
        &self,
        entry: &Entry,
        left: u64,
        halted: impl Future<Output = End>,
        show: impl FnMut(&Seen, String, u64),
    ) -> Result<End, End> {
        let (movers, is_building) = (Movers::default(), AtomicBool::new(false));
        tokio::select! {
            end = Box::pin(self.watch_tasks(entry, left, &movers, &is_building, show)) => end,
            why = halted => Err(why),
            why = Box::pin(self.see_locks(&movers, false)) => Err(why),
            never = Box::pin(self.see_builds(&entry.shards, &is_building)) => match never {},
        }
    }

    /// What the moves of a job touch that are not done.
    ///
    /// # Errors
    ///
    /// The coordinator does not tell.
    pub async fn remaining(&self, id: i64) -> Result<Remaining, ApplyError> {
        let connection = Box::pin(connect(self.settings, self.coordinator)).await?;
        let mut remaining = Remaining::default();
        let number = |it: Option<i64>| u32::try_from(it?).ok();
        for row in connection.query(REMAINING, &[&id]).await? {
            let (source, target) = (number(row.get(0)), number(row.get(1)));
            remaining.groups.extend(source.into_iter().chain(target));
            remaining.targets.extend(target);
            remaining.colocations.extend(number(row.get(2)));
        }
        Ok(remaining)
    }

    /// Stops a job, and says how it ended.
    ///
    /// # Errors
    ///
    /// It has not ended, as far as anybody knows: why, as a sentence without full stop.
    pub async fn stop_job(&self, entry: &Entry, why: End) -> Result<End, String> {
        match timeout(CANCEL_LIMIT, self.cancel_job(entry.job.unwrap_or_default())).await {
            // It was quicker.
            Ok(Ok(seen)) if seen.state == "finished" => Ok(End::new(Outcome::Moved, "")),
            Ok(Ok(seen)) => Ok(End::new(why.outcome, format!("{}; {}", why.reason, seen.so_far()))),
            Ok(Err(error)) => Err(format!("{}; but {}", why.reason, chain(&error))),
            Err(_) => {
                let limit = format_duration(CANCEL_LIMIT);
                Err(format!("{}; but it has not ended {limit} later", why.reason))
            }
        }
    }

    /// Cancels a job by its number, so no other, and waits until nothing of it is under way.
    async fn cancel_job(&self, id: i64) -> Result<Seen, ApplyError> {
        let connection = Box::pin(connect(self.settings, self.coordinator)).await?;
        // Once: told again, Citus would believe that its processes are gone.
        if see(&connection, id).await?.is_some_and(|it| it.state != "cancelling") {
            connection.query_one("SELECT citus_job_cancel($1)", &[&id]).await?;
        }
        loop {
            match see(&connection, id).await? {
                Some(seen) if !seen.is_over() => sleep(TICK_NEAR_THE_END).await,
                seen => return Ok(seen.unwrap_or_default()),
            }
        }
    }

    /// Asks how far the job is. Returns how it ended, or else why it must.
    async fn watch_tasks(
        &self,
        entry: &Entry,
        left: u64,
        movers: &Movers,
        is_building: &AtomicBool,
        mut show: impl FnMut(&Seen, String, u64),
    ) -> Result<End, End> {
        let (mut watch, mut connection) = (Watch::new(*self.limits, left), None);
        loop {
            let asked = self.ask_job(&mut connection, movers, entry.job.unwrap_or_default()).await;
            let unknown = |error: &ApplyError| debug!(error = %chain(error), "the job is unknown");
            let answer = asked.inspect_err(unknown).ok();
            if answer.is_none() {
                connection = None;
            }
            let now = Instant::now();
            if is_building.swap(false, Ordering::Relaxed) {
                watch.standstill.went_on(now);
            }
            let tasks = match &answer {
                None => None,
                Some((seen, tasks)) => {
                    match next(seen.as_ref(), Utc::now() - entry.at) {
                        Next::Watch => {}
                        Next::Stop(why) => return Err(why),
                        Next::Over(end) => return Ok(end),
                    }
                    seen.as_ref().zip(Some(tasks))
                }
            };
            if let Some((seen, _)) = tasks {
                watch.had(seen, entry.bytes);
            }
            if let Some(why) = watch.see(tasks.map(|(seen, tasks)| (seen.done, tasks)), now) {
                return Err(why);
            }
            if let Some((seen, tasks)) = tasks {
                show(seen, how_far(seen, tasks), watch.written());
            }
            let is_near = tasks.is_some_and(|(_, it)| it.values().any(Progress::is_near_the_end));
            sleep(if is_near { TICK_NEAR_THE_END } else { TICK }).await;
        }
    }

    async fn ask_job(
        &self,
        connection: &mut Option<Connection>,
        movers: &Movers,
        id: i64,
    ) -> Result<(Option<Seen>, Tasks), ApplyError> {
        let connection = self.kept(connection).await?;
        let seen = see(connection, id).await?;
        let pids = seen.as_ref().map(|it| it.pids.as_slice()).unwrap_or_default();
        // Who waits for them is asked meanwhile.
        movers.are(pids);
        // Citus does not tell while one of their nodes is away.
        let tasks = progress::of_pids(connection, pids).await.unwrap_or_else(|error| {
            debug!(error = %chain(&error), "how far the job is, is unknown");
            pids.iter().map(|it| (*it, Progress::default())).collect()
        });
        movers.see(&tasks);
        Ok((seen, tasks))
    }
}

async fn tasks(connection: &Connection, id: i64) -> Result<Vec<Task>, QueryError> {
    let rows = connection.query(TASKS, &[&id]).await?;
    let group = |it: Option<i64>| u32::try_from(it?).ok();
    let task =
        |it: &Row| Some((it.get::<_, Option<i64>>(0)?, group(it.get(1))?, group(it.get(2))?));
    Ok(rows.iter().map(task).collect())
}

/// What Citus says of a job; `None` if it knows of none.
async fn see(connection: &Connection, id: i64) -> Result<Option<Seen>, QueryError> {
    let rows = connection.query(SEEN, &[&id]).await?;
    let number = |it: i64| u32::try_from(it).unwrap_or(u32::MAX);
    Ok(rows.first().map(|row| Seen {
        state: row.get(0),
        tasks: number(row.get(1)),
        done: number(row.get(2)),
        retries: number(row.get(3)),
        message: row.get::<_, Option<String>>(4).unwrap_or_default(),
        pids: row.get::<_, Option<Vec<i32>>>(5).unwrap_or_default(),
    }))
}

/// `3 of 16 moves are done, Copying Data`.
fn how_far(seen: &Seen, tasks: &Tasks) -> String {
    let mut phases: Vec<&str> = tasks.values().filter_map(|it| it.phase.as_deref()).collect();
    phases.sort_unstable();
    phases.dedup();
    let so_far = seen.so_far();
    phases.insert(0, &so_far);
    phases.join(", ")
}

/// What a job does, from one look to the next. Pure.
#[derive(Debug)]
struct Watch {
    limits: Apply,
    /// What may be written for it, in bytes.
    left: u64,
    standstill: Standstill<(u32, Tasks)>,
    under_way: BTreeMap<i32, UnderWay>,
    /// What those wrote that have ended, the ones that failed too; `None` before it was first seen.
    before: Option<u64>,
}

/// A move of a job.
#[derive(Debug)]
struct UnderWay {
    since: Instant,
    bytes: u64,
}

impl Watch {
    fn new(limits: Apply, left: u64) -> Self {
        Self {
            limits,
            left,
            standstill: Standstill::new(limits.stall_timeout),
            under_way: BTreeMap::new(),
            before: None,
        }
    }

    /// Takes in that some of it, which has so many bytes, was done before it was watched.
    fn had(&mut self, seen: &Seen, bytes: u64) {
        self.before.get_or_insert(match u64::from(seen.tasks) {
            0 => 0,
            tasks => bytes / tasks * u64::from(seen.done),
        });
    }

    /// What was written for it, in bytes.
    fn written(&self) -> u64 {
        let now: u64 = self.under_way.values().map(|it| it.bytes).sum();
        self.before.unwrap_or(0).saturating_add(now)
    }

    /// Takes in how many tasks are done and how far the others are, and says so if it must not go on.
    /// `None`: Citus does not tell.
    fn see(&mut self, seen: Option<(u32, &Tasks)>, now: Instant) -> Option<End> {
        let Apply { move_timeout, .. } = self.limits;
        let unknown = Progress::default();
        if let Some((_, tasks)) = seen {
            let mut ended = 0;
            self.under_way.retain(|pid, it| {
                let goes_on = tasks.contains_key(pid);
                ended += if goes_on { 0 } else { it.bytes };
                goes_on
            });
            self.before = self.before.map(|it| it.saturating_add(ended));
            for pid in tasks.keys() {
                self.under_way.entry(*pid).or_insert(UnderWay { since: now, bytes: 0 });
            }
        }
        for (pid, it) in &mut self.under_way {
            let progress = seen.and_then(|(_, tasks)| tasks.get(pid)).unwrap_or(&unknown);
            if move_timeout <= now.duration_since(it.since) {
                let why = format!("a move of it took {}", format_duration(move_timeout));
                return Some(End::new(Outcome::Failed, why));
            }
            it.bytes = it.bytes.max(progress.bytes.unwrap_or(0));
        }
        if self.left < self.written() {
            let (written, left) = (in_words(self.written()), in_words(self.left));
            let why = format!("{written} were written for it, and {left} were left of the budget");
            return Some(End::new(Outcome::Stopped, why));
        }
        let seen = seen.map(|(done, tasks)| (done, tasks.clone()));
        // Between two tasks it tells no phase, but that there is one to come.
        let phase = |(_, tasks): &(u32, Tasks)| match tasks.values().next() {
            Some(progress) => progress.phase.clone(),
            None => Some("its queue: no task begins".to_owned()),
        };
        let why = self.standstill.see(seen, now, phase)?;
        Some(End::new(Outcome::Failed, why))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Apply = Apply {
        engine: crate::config::Engine::Job,
        lock_timeout: Duration::from_secs(1),
        move_timeout: Duration::from_mins(30),
        stall_timeout: Duration::from_mins(1),
        pause: Duration::ZERO,
    };

    /// `7 Copying Data 5`: what a process does, and how many bytes it has written.
    fn tasks(text: &str) -> Tasks {
        let task = |text: &str| {
            let (pid, rest) = text.split_once(' ').unwrap();
            let (phase, bytes) = rest.rsplit_once(' ').unwrap();
            let progress = Progress {
                phase: (phase != "?").then(|| phase.to_owned()),
                bytes: bytes.parse().ok(),
                lsn: None,
                source: None,
            };
            (pid.parse().unwrap(), progress)
        };
        text.split(", ").filter(|it| !it.is_empty()).map(task).collect()
    }

    /// What was seen, how many ms after the start: how many moves are done, and the others.
    type Look = (u64, Option<(u32, &'static str)>);

    /// How a job ends of which that was seen; nothing may end it before the last.
    fn end_of(name: &str, looks: Vec<Look>) -> Option<(Outcome, String)> {
        let (mut watch, start) = (Watch::new(LIMITS, 100), Instant::now());
        let mut last = None;
        for (at, look) in looks {
            assert_eq!(last, None, "{name}: too soon");
            let look = look.map(|(done, text)| (done, tasks(text)));
            watch.had(&Seen::default(), 100);
            let now = start + Duration::from_millis(at);
            last = watch.see(look.as_ref().map(|(done, tasks)| (*done, tasks)), now);
        }
        last.map(|it| (it.outcome, it.reason))
    }

    #[test]
    fn a_job_goes_on_while_it_copies() {
        for (name, looks, expected) in [
            ("it begins", vec![(0, Some((0, "")))], None),
            (
                "it copies",
                vec![(0, Some((0, "7 Copying Data 1"))), (50_000, Some((0, "7 Copying Data 2")))],
                None,
            ),
            ("silent as it copies", vec![(0, Some((0, "7 Copying Data 1"))), (9000, None)], None),
        ] {
            assert_eq!(end_of(name, looks), expected, "{name}");
        }
    }

    #[test]
    fn a_job_goes_on_while_it_moves_within_its_time_and_its_budget() {
        let failed = |why: &str| Some((Outcome::Failed, why.to_owned()));
        for (name, looks, expected) in [
            (
                "it stands still",
                vec![(0, Some((1, "7 Catching Up 1"))), (60_000, Some((1, "7 Catching Up 1")))],
                failed("it stands still for 1m in Catching Up"),
            ),
            (
                "nothing begins",
                vec![(0, Some((1, ""))), (60_000, Some((1, "")))],
                failed("it stands still for 1m in its queue: no task begins"),
            ),
            ("another is done", vec![(0, Some((1, ""))), (60_000, Some((2, "")))], None),
            (
                "one move takes too long",
                (0..=60)
                    .map(|it| {
                        (
                            it * 30_000,
                            Some((
                                0,
                                if it % 2 == 0 { "7 Copying Data 1" } else { "7 Copying Data 2" },
                            )),
                        )
                    })
                    .collect(),
                failed("a move of it took 30m"),
            ),
            (
                "the budget",
                vec![
                    (0, Some((0, "7 Copying Data 60"))),
                    (500, Some((0, ""))),
                    (1000, Some((0, "8 Copying Data 41"))),
                ],
                Some((
                    Outcome::Stopped,
                    "101 B were written for it, and 100 B were left of the budget".to_owned(),
                )),
            ),
            (
                "just the budget",
                vec![(0, Some((0, "7 Copying Data 60"))), (500, Some((1, "8 Copying Data 40")))],
                None,
            ),
        ] {
            assert_eq!(end_of(name, looks), expected, "{name}");
        }
    }

    /// Who finds it half done knows no better.
    #[test]
    fn what_was_written_before_it_was_watched_counts_by_the_number_of_moves() {
        let mut watch = Watch::new(LIMITS, 100);
        watch.had(&Seen { tasks: 4, done: 3, ..Seen::default() }, 100);
        let tasks = tasks("7 Copying Data 20");
        assert_eq!(watch.see(Some((3, &tasks)), Instant::now()), None);
        assert_eq!(watch.written(), 95);
        let seen = Seen { tasks: 4, done: 3, ..Seen::default() };
        assert_eq!(how_far(&seen, &tasks), "3 of 4 moves are done, Copying Data");
    }
}
