//! Who waits for what is moved, and for how long.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use futures_util::future::join_all;
use humantime::format_duration;
use shared::pg::{Connection, Node, QueryError};
use shared::telemetry::chain;
use tokio::time::{Instant, sleep, timeout};
use tracing::debug;

use super::progress::Progress;
use super::{ApplyError, Hand, TICK, TICK_NEAR_THE_END};
use crate::ledger::{End, Outcome};

/// Which processes of moves let no writer in, and a statement that has waited behind one of them for so many
/// milliseconds: of those processes, or of those that Citus has them use on another node. Only this server is
/// asked, whatever others do. Who just reads or writes is let in by a move but at its end; who waits for a
/// stronger lock has all who come later wait behind him.
///
/// Source: measured of Citus 14: from "Final Catchup" on a move asks for the lock on the metadata of colocated
/// shards (8), of a reference table on that of its shard (4), on all nodes, and from then on every writer of
/// them waits. `AdvisoryLocktagClass` in `resource_lock.h`.
const LOCKS: &str = r"
    WITH mover AS (
         SELECT pid FROM pg_stat_activity WHERE pid = ANY ($1) OR application_name ~ $2)
    SELECT ARRAY(SELECT DISTINCT pid
                   FROM pg_locks JOIN mover USING (pid)
                  WHERE locktype = 'advisory' AND objsubid IN (4, 8) AND mode = 'ExclusiveLock'),
           waiter.pid, waiter.query
      FROM (SELECT) AS one
      LEFT JOIN LATERAL (
           SELECT lock.pid, left(regexp_replace(query, '\s+', ' ', 'g'), 80) AS query
             FROM pg_locks AS lock JOIN pg_stat_activity AS process ON process.pid = lock.pid
            WHERE NOT granted AND locktype = 'relation'
              AND mode IN ('ShareLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock')
              AND waitstart <= clock_timestamp() - $3::bigint * interval '1 ms'
              AND pg_blocking_pids(lock.pid) && ARRAY(SELECT pid FROM mover)
            ORDER BY waitstart
            LIMIT 1) AS waiter ON true";

impl Hand<'_> {
    /// Asks who waits for what is moved, until somebody has for too long. It asks by itself, the coordinator and
    /// the node that is moved from: how far a move is, nobody tells while its target builds an index, or hangs.
    /// Of a copy, what it does not tell near its end counts as well: other sessions work for it.
    pub(super) async fn see_locks(&self, movers: &Movers, copies: bool) -> End {
        let limit = self.limits.lock_timeout;
        let (mut patience, mut connection) = (Patience::new(limit, copies), None);
        let mut sources = BTreeMap::<i32, (Node, Option<Connection>)>::new();
        loop {
            sleep(if patience.is_near() { TICK_NEAR_THE_END } else { TICK }).await;
            let movers = movers.within(limit.max(2 * TICK));
            let pids: Vec<i32> = movers.keys().copied().collect();
            sources.retain(|pid, _| movers.contains_key(pid));
            for (pid, progress) in &movers {
                if let Some((host, port)) = progress.source.clone() {
                    let node = Node { group: 0, name: format!("{host}:{port}"), host, port };
                    sources.entry(*pid).or_insert((node, None));
                }
            }
            let asked = async {
                let kept = self.kept(&mut connection).await?;
                Ok(locks(kept, &pids, limit).await?)
            };
            let of_sources = sources.iter_mut().map(async |(pid, (node, connection))| {
                let asked = async {
                    let kept = self.kept_to(node, connection).await?;
                    Ok(locks_of(kept, *pid, limit).await?)
                };
                let locks = within(limit, asked).await;
                if locks.is_none() {
                    *connection = None;
                }
                (*pid, locks)
            });
            let (mut locks, of_sources) = tokio::join!(within(limit, asked), join_all(of_sources));
            match &mut locks {
                None => connection = None,
                Some(locks) => of_sources.into_iter().for_each(|(pid, it)| locks.and(pid, it)),
            }
            if let Some(end) = patience.see(&movers, locks.as_ref(), Instant::now()) {
                return end;
            }
        }
    }
}

/// What is answered in time.
async fn within(
    limit: Duration,
    asked: impl Future<Output = Result<Locks, ApplyError>>,
) -> Option<Locks> {
    let unknown = |error: &ApplyError| {
        debug!(error = %chain(error), "who waits for a move is unknown");
    };
    timeout(limit, asked).await.ok()?.inspect_err(unknown).ok()
}

/// Asks what these processes keep others from; who waits for less than `limit` does not count.
async fn locks(
    connection: &Connection,
    pids: &[i32],
    limit: Duration,
) -> Result<Locks, QueryError> {
    ask_locks(connection, pids, None, limit).await
}

/// The same of what this process of the coordinator does on another node.
async fn locks_of(connection: &Connection, pid: i32, limit: Duration) -> Result<Locks, QueryError> {
    // The number of a process in the cluster has that of its node before ten digits of its own.
    let name = format!("^citus_internal gpid=\\d*{pid:010}$");
    let mut locks = ask_locks(connection, &[], Some(name), limit).await?;
    let node = connection.node();
    if let Some((_, _, place)) = &mut locks.waiter {
        place.clone_from(&node.name);
    }
    locks.writers_wait = if locks.writers_wait.is_empty() { vec![] } else { vec![pid] };
    Ok(locks)
}

async fn ask_locks(
    connection: &Connection,
    pids: &[i32],
    name: Option<String>,
    limit: Duration,
) -> Result<Locks, QueryError> {
    let limit = i64::try_from(limit.as_millis()).unwrap_or(i64::MAX);
    let row = connection.query_one(LOCKS, &[&pids, &name, &limit]).await?;
    let waiter = row.get::<_, Option<i32>>(1);
    let query = row.get::<_, Option<String>>(2).unwrap_or_default();
    let waiter = waiter.map(|pid| (pid, query, "the coordinator".to_owned()));
    Ok(Locks { writers_wait: row.get(0), unknown: vec![], waiter })
}

/// What processes that move shards keep others from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Locks {
    /// Those that let no writer in.
    writers_wait: Vec<i32>,
    /// Those of which their source does not tell.
    unknown: Vec<i32>,
    /// A statement that has waited for too long behind one of them: its process, its text, and where.
    waiter: Option<(i32, String, String)>,
}

impl Locks {
    /// With what their source says, which may be unknown as well.
    fn and(&mut self, pid: i32, source: Option<Self>) {
        let Some(source) = source else { return self.unknown.push(pid) };
        self.writers_wait.extend(source.writers_wait);
        self.waiter = self.waiter.take().or(source.waiter);
    }

    /// Whether a process lets no writer in.
    fn keeps_out(&self, pid: i32) -> Option<bool> {
        let it = self.writers_wait.contains(&pid);
        (it || !self.unknown.contains(&pid)).then_some(it)
    }
}

/// The processes that move something, how far each was when it was last known, and when that was.
#[derive(Debug, Default)]
pub(super) struct Movers(Mutex<BTreeMap<i32, (Instant, Progress)>>);

impl Movers {
    /// Takes in who they are.
    pub(super) fn are(&self, pids: &[i32]) {
        let mut movers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        movers.retain(|pid, _| pids.contains(pid));
        for pid in pids {
            movers.entry(*pid).or_insert_with(|| (Instant::now(), Progress::default()));
        }
    }

    /// Takes in how far they are.
    pub(super) fn see(&self, seen: &BTreeMap<i32, Progress>) {
        let mut movers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *movers = seen.iter().map(|(pid, it)| (*pid, (Instant::now(), it.clone()))).collect();
    }

    /// How far they are. What was so longer ago than that is not known any more.
    pub(super) fn within(&self, limit: Duration) -> BTreeMap<i32, Progress> {
        let movers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let known = |(at, it): &(Instant, Progress)| {
            if at.elapsed() <= limit { it.clone() } else { Progress::default() }
        };
        movers.iter().map(|(pid, it)| (*pid, known(it))).collect()
    }
}

/// Who waits for moves, and since when: Citus bounds how long a move waits for its locks, and not how long
/// it keeps them, nor how long others wait behind it. Pure.
#[derive(Clone, Debug)]
struct Patience {
    limit: Duration,
    /// What is not told near the end counts, whatever is known of locks.
    counts_unknown: bool,
    cutovers: BTreeMap<i32, Cutover>,
}

impl Patience {
    /// With the longest that somebody may wait.
    fn new(limit: Duration, counts_unknown: bool) -> Self {
        Self { limit, counts_unknown, cutovers: BTreeMap::new() }
    }

    /// Whether one of them was near its end when it was last known.
    fn is_near(&self) -> bool {
        self.cutovers.values().any(|it| it.was_near)
    }

    /// Takes in how far those are that move something, and their locks, and says so if somebody has waited
    /// for too long. `None`: the coordinator does not tell.
    fn see(
        &mut self,
        movers: &BTreeMap<i32, Progress>,
        locks: Option<&Locks>,
        now: Instant,
    ) -> Option<End> {
        self.cutovers.retain(|pid, _| movers.contains_key(pid));
        let limit = format_duration(self.limit);
        for (pid, progress) in movers {
            let keeps_out = locks.and_then(|it| it.keeps_out(*pid));
            let keeps_out = keeps_out.filter(|it| *it || !self.counts_unknown);
            let since = self.cutovers.entry(*pid).or_default().see(progress, keeps_out, now);
            if since.is_some_and(|it| self.limit <= now.duration_since(it)) {
                let phase = progress.phase.as_deref().unwrap_or("a phase that it does not tell");
                let why = format!("it kept writers waiting for {limit} in {phase}");
                return Some(End::new(Outcome::NoLock, why));
            }
        }
        let (pid, query, place) = locks?.waiter.as_ref()?;
        let why = format!(
            "pid {pid} on {place} has waited for {limit} behind it, and all who use the table behind that: \
             {query}"
        );
        Some(End::new(Outcome::Yielded, why))
    }
}

/// Since when writers wait for a move that has its locks.
#[derive(Clone, Debug, Default)]
struct Cutover {
    was_near: bool,
    since: Option<Instant>,
}

impl Cutover {
    /// Takes in how far it is, and whether it keeps writers out. How far it is it does not tell while an index
    /// is built on its target, and no writer waits for that. Near the end, where the locks are not known
    /// either, just that may be.
    fn see(
        &mut self,
        progress: &Progress,
        keeps_out: Option<bool>,
        now: Instant,
    ) -> Option<Instant> {
        let is_unknown = *progress == Progress::default();
        if !is_unknown {
            self.was_near = progress.is_near_the_end();
        }
        let may_keep_out =
            keeps_out.unwrap_or(is_unknown && self.was_near) || progress.is_under_locks();
        self.since = may_keep_out.then(|| self.since.unwrap_or(now));
        self.since
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What one process was seen at, how many ms after the start: its phase, and whether it kept writers out.
    type Looks = Vec<(u64, &'static str, Option<bool>)>;

    #[test]
    fn locks_are_not_kept_for_long_and_an_index_keeps_no_writer_waiting() {
        let at = |phase: &str| {
            let phase = (phase != "?").then(|| phase.to_owned());
            BTreeMap::from([(7, Progress { phase, ..Progress::default() })])
        };
        let (no, yes) = (Some(false), Some(true));
        let table: [(&str, Looks, bool); 13] = [
            ("a long copy", vec![(0, "Copying Data", no), (9000, "Copying Data", no)], false),
            ("a long way", vec![(0, "Catching Up", no), (9000, "Catching Up", no)], false),
            ("in time", vec![(0, "Final Catchup", yes), (999, "Final Catchup", yes)], false),
            ("too long", vec![(0, "Final Catchup", yes), (1000, "Final Catchup", yes)], true),
            ("over phases", vec![(0, "Final Catchup", yes), (1000, "Completing", yes)], true),
            ("its phase alone", vec![(0, "Final Catchup", no), (1000, "Completing", no)], true),
            ("its locks alone", vec![(0, "Catching Up", yes), (1000, "?", yes)], true),
            ("a silent copy", vec![(0, "Copying Data", no), (9000, "?", None)], false),
            ("an index", vec![(0, "Creating Constraints", no), (9000, "?", no)], false),
            (
                "an index, and then its locks",
                vec![(0, "Creating Constraints", no), (9000, "?", yes), (10_000, "?", yes)],
                true,
            ),
            (
                "silent near the end",
                vec![(0, "Catching Up", no), (500, "?", None), (1500, "?", None)],
                true,
            ),
            (
                "its locks alone are silent",
                vec![
                    (0, "Catching Up", no),
                    (500, "Catching Up", None),
                    (9000, "Catching Up", None),
                ],
                false,
            ),
            (
                "silent for a moment",
                vec![
                    (0, "Catching Up", no),
                    (500, "?", None),
                    (900, "Catching Up", no),
                    (1500, "?", None),
                ],
                false,
            ),
        ];
        for (name, seen, is_too_long) in table {
            let (mut patience, start) =
                (Patience::new(Duration::from_secs(1), false), Instant::now());
            let found = seen.iter().map(|(ms, phase, keeps_out)| {
                let locks = keeps_out.map(|it| Locks {
                    writers_wait: if it { vec![7] } else { vec![] },
                    ..Locks::default()
                });
                patience.see(&at(phase), locks.as_ref(), start + Duration::from_millis(*ms))
            });
            let found = found.last().unwrap().map(|it| it.outcome);
            assert_eq!(found, is_too_long.then_some(Outcome::NoLock), "{name}");
        }
    }

    #[test]
    fn what_a_copy_does_not_tell_near_its_end_counts() {
        let at = |phase: Option<&str>| {
            let phase = phase.map(str::to_owned);
            BTreeMap::from([(7, Progress { phase, ..Progress::default() })])
        };
        let start = Instant::now();
        for (copies, expected) in [(true, Some(Outcome::NoLock)), (false, None)] {
            let mut patience = Patience::new(Duration::from_secs(1), copies);
            let locks = Some(Locks::default());
            assert_eq!(patience.see(&at(Some("Catching Up")), locks.as_ref(), start), None);
            for (ms, expected) in [(500, None), (1500, expected)] {
                let now = start + Duration::from_millis(ms);
                let end = patience.see(&at(None), locks.as_ref(), now);
                assert_eq!(end.map(|it| it.outcome), expected, "{copies} {ms}");
            }
        }
    }

    /// A coordinator that waits for a node may have its locks on another already.
    #[test]
    fn what_the_source_says_counts_as_what_the_coordinator_does() {
        let of = |writers_wait: &[i32]| Locks {
            writers_wait: writers_wait.to_vec(),
            ..Locks::default()
        };
        for (coordinator, source, expected) in [
            (of(&[]), Some(of(&[])), Some(false)),
            (of(&[7]), Some(of(&[])), Some(true)),
            (of(&[]), Some(of(&[7])), Some(true)),
            (of(&[]), None, None),
            (of(&[7]), None, Some(true)),
        ] {
            let mut locks = coordinator;
            locks.and(7, source);
            assert_eq!(locks.keeps_out(7), expected, "{locks:?}");
        }
    }

    /// One after the other may keep them waiting.
    #[test]
    fn each_process_has_its_own_time() {
        let at = |phases: &[(i32, &str)]| {
            let of =
                |phase: &str| Progress { phase: Some(phase.to_owned()), ..Progress::default() };
            phases.iter().map(|(pid, phase)| (*pid, of(phase))).collect::<BTreeMap<_, _>>()
        };
        let start = Instant::now();
        for (first, then, is_too_long) in [
            (at(&[(7, "Final Catchup")]), at(&[(8, "Final Catchup")]), false),
            (
                at(&[(7, "Final Catchup"), (8, "Copying Data")]),
                at(&[(7, "Completing"), (8, "Copying Data")]),
                true,
            ),
        ] {
            let mut patience = Patience::new(Duration::from_secs(1), false);
            let locks = Some(Locks::default());
            assert_eq!(patience.see(&first, locks.as_ref(), start), None);
            assert!(patience.is_near());
            let later = start + Duration::from_secs(1);
            assert_eq!(patience.see(&then, locks.as_ref(), later).is_some(), is_too_long);
        }
    }

    /// All who come later wait behind it, whatever the move is at.
    #[test]
    fn a_statement_that_waits_behind_a_move_ends_it() {
        let movers = BTreeMap::from([(7, Progress::default())]);
        let [query, place] = ["ALTER TABLE events ADD COLUMN a int", "the coordinator"];
        let waiter = Some((9, query.to_owned(), place.to_owned()));
        let locks = Locks { waiter, ..Locks::default() };
        let end =
            Patience::new(Duration::from_secs(1), false).see(&movers, Some(&locks), Instant::now());
        let why = "pid 9 on the coordinator has waited for 1s behind it, and all who use the table behind that: \
                   ALTER TABLE events ADD COLUMN a int";
        assert_eq!(end, Some(End::new(Outcome::Yielded, why)));
    }
}
