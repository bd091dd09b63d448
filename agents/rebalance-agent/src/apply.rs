//! Moves one shard group, or copies the reference tables that nodes lack: bounded in time and in what writers
//! wait, watched, and broken off when it must.
//!
//! Citus' own background jobs ignore the settings of the session that starts them, so a transaction that
//! wrote to the shard and stays open holds up all its writers at the end of a move for as long as it
//! likes. `citus_move_shard_placement` in a session of ours does not: it waits `lock_timeout`, and fails.

mod job;
mod locks;
mod orphans;
mod progress;

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use shared::lease::Claim;
use shared::pg::{ConnectError, Connection, Node, QueryError, Settings, connect};
use shared::telemetry::chain;
use thiserror::Error;
use tokio::time::{Instant, sleep, timeout_at};
use tokio_postgres::error::SqlState;
use tracing::{debug, error};

use crate::config::Apply;
use crate::ledger::{End, Outcome};
use crate::memory::MemoryError;
use crate::words::held;
use locks::Movers;
pub use progress::{Progress, Standstill};

/// So often a move is asked how far it is …
const TICK: Duration = Duration::from_millis(500);
/// … and so often when its writers may have to wait.
const TICK_NEAR_THE_END: Duration = Duration::from_millis(200);
/// So often it is asked whether an index is built; more often only where little patience is configured.
const TICK_OF_BUILDS: Duration = Duration::from_secs(30);
/// How long a move may take to end after it was cancelled; it drops what it has copied by then.
const CANCEL_LIMIT: Duration = Duration::from_secs(15);
/// How long Citus may clean up; a node that hangs would hold it up.
const CLEANUP_TIMEOUT: Duration = Duration::from_mins(1);

/// The number of each node as it is now, and whether the shard is where it was: a failover or another
/// move may have come in between.
const CHECK: &str = "
    SELECT citus_is_coordinator() AND NOT pg_is_in_recovery(),
           (SELECT nodeid FROM pg_dist_node
             WHERE groupid = $2::int AND noderole::text = 'primary' AND isactive),
           (SELECT nodeid FROM pg_dist_node
             WHERE groupid = $3::int AND noderole::text = 'primary' AND isactive AND shouldhaveshards),
           EXISTS (SELECT FROM pg_dist_placement
                    WHERE shardid = $1::bigint AND groupid = $2::int AND shardstate = 1),
           pg_backend_pid(),
           (SELECT format('bring back or fence %s, whichever does not answer',
                          string_agg(nodename || ':' || nodeport, ' or ' ORDER BY groupid = $2::int))
              FROM pg_dist_node
             WHERE groupid IN ($2::int, $3::int) AND noderole::text = 'primary')";

/// Whether a session has not come to its end.
const LIVES: &str = "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE pid = $1)";

/// Whether a node that is to have shards lacks one of those. Citus looks at its first reference table
/// only: if a node has that, it copies none of the others.
const LACKING: &str = "
    SELECT min(shardid)
      FROM unnest($1::bigint[]) AS shard (shardid) CROSS JOIN pg_dist_node AS node
     WHERE noderole::text = 'primary' AND isactive AND shouldhaveshards
       AND NOT EXISTS (SELECT FROM pg_dist_placement AS placement
                        WHERE placement.shardid = shard.shardid
                          AND placement.groupid = node.groupid AND shardstate = 1)";

/// What is to be moved, or copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Order<'a> {
    /// Whether these are reference tables, to be copied to each node that lacks them.
    pub copies: bool,
    /// The lowest shard of the group.
    pub shard: i64,
    /// All of them.
    pub shards: &'a [i64],
    /// The group it is on.
    pub from: u32,
    /// The group it is to be on.
    pub to: u32,
}

/// Why Citus did not do what it was asked.
#[derive(Debug, Error)]
pub enum ApplyError {
    /// The coordinator takes no connection.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// It refuses, or does not answer.
    #[error(transparent)]
    Query(#[from] QueryError),
    /// It was not to go on.
    #[error("broken off: {reason}")]
    BrokenOff {
        /// Why: a sentence without full stop.
        reason: String,
    },
    /// It could not be written down.
    #[error("it cannot be written down")]
    Memory(#[from] MemoryError),
    /// Citus would let the tasks of a job wait for locks longer than that, and writers behind them.
    #[error(
        "role {role} has no lock_timeout of {} or less on every node, and tasks of a job have no other: ALTER ROLE \
         {role} SET lock_timeout = '{}ms'",
        humantime::format_duration(*limit),
        limit.as_millis()
    )]
    Unbounded {
        /// The role that the tasks run as.
        role: String,
        /// How long they may wait.
        limit: Duration,
    },
    /// Citus says that it is done, and it is not.
    #[error(
        "Citus copied nothing, because it looks at its first reference table alone; shard {shard} is lacking: \
         copy it with citus_copy_shard_placement()"
    )]
    Lacking {
        /// What is not everywhere.
        shard: i64,
    },
}

/// Acts on the coordinator's primary.
#[derive(Clone, Copy, Debug)]
pub struct Hand<'a> {
    /// How it is reached.
    pub settings: &'a Settings,
    /// What bounds a move.
    pub limits: &'a Apply,
    /// The coordinator's primary.
    pub coordinator: &'a Node,
    /// The right to act.
    pub claim: &'a Claim,
}

impl Hand<'_> {
    /// Has Citus drop what moves left behind; what it cannot reach stays, and is seen at the next look.
    ///
    /// # Errors
    ///
    /// The coordinator refuses, or does not answer.
    pub async fn clean_up(&self) -> Result<(), ApplyError> {
        let settings = Settings { statement_timeout: CLEANUP_TIMEOUT, ..self.settings.clone() };
        let connection = Box::pin(connect(&settings, self.coordinator)).await?;
        // Not in a transaction: it drops one thing after the other.
        connection.simple_query("CALL citus_cleanup_orphaned_resources()").await?;
        Ok(())
    }

    /// Moves a shard group, or copies reference tables, until it is done or `halted` says how it is to
    /// end. `show` takes how far it is.
    pub async fn carry(
        &self,
        order: Order<'_>,
        halted: impl Future<Output = End>,
        show: impl FnMut(&Progress),
    ) -> End {
        let connection = match self.session().await {
            Ok(connection) => connection,
            Err(error) => return End::new(Outcome::Failed, chain(&error).to_string()),
        };
        let Statement { sql, pid, next } = match check(&connection, order).await {
            Ok(Ok(statement)) => statement,
            Ok(Err(reason)) => return End::new(Outcome::Failed, reason),
            Err(error) => return End::new(Outcome::Failed, chain(&error).to_string()),
        };
        let work = async {
            self.bounded(&connection, &sql).await?;
            if order.copies { is_copied(&connection, order.shards).await } else { Ok(()) }
        };
        tokio::pin!(work);
        let (movers, is_building) = (Movers::default(), AtomicBool::new(false));
        let (ended, broken_off) = tokio::select! {
            ended = &mut work => (Some(ended), None),
            why = halted => (None, Some(why)),
            why = Box::pin(self.watch(order, pid, &movers, &is_building, show)) => {
                (None, Some(why))
            }
            why = Box::pin(self.see_locks(&movers, order.copies)) => (None, Some(why)),
            never = Box::pin(self.see_builds(order.shards, &is_building)) => match never {},
        };
        let deadline = Instant::now() + CANCEL_LIMIT;
        let ended = if ended.is_some() {
            ended
        } else {
            // It drops what it has copied; what it cannot, Citus does later.
            Box::pin(connection.cancel()).await;
            timeout_at(deadline, work).await.ok()
        };
        let end = match (ended, broken_off) {
            (Some(Ok(())), _) => return End::new(Outcome::Moved, ""),
            (Some(Err(error)), broken_off) => self.end(error, broken_off),
            (None, why) => {
                let reason = why.map(|it| it.reason).unwrap_or_default();
                let reason = format!("{reason}; and it does not answer to being cancelled");
                End::new(Outcome::Unknown, reason)
            }
        };
        match Box::pin(self.is_over(&connection, pid, deadline)).await {
            Ok(true) => end,
            Ok(false) => {
                let held = held(pid, order.shard);
                error!(reason = held, next, "a move that has ended keeps its locks");
                let reason = format!("{}; {held}: {next}", end.reason);
                End { keeps_locks: true, ..End::new(Outcome::Unknown, reason) }
            }
            Err(error) => {
                let why = chain(&error);
                let reason =
                    format!("{}; and whether its session has ended is unknown: {why}", end.reason);
                End::new(Outcome::Unknown, reason)
            }
        }
    }

    /// Whether a session has come to its end. The error that ends a statement is sent before the server gives
    /// back its locks, and that waits for all nodes that had a part in it.
    async fn is_over(
        &self,
        connection: &Connection,
        pid: i32,
        deadline: Instant,
    ) -> Result<bool, ApplyError> {
        match timeout_at(deadline, connection.simple_query("ROLLBACK")).await {
            Ok(Ok(_)) => return Ok(true),
            Ok(Err(QueryError::Failed { source, .. })) if source.code().is_some() => {
                return Ok(true);
            }
            _ => {}
        }
        let mut other = None;
        loop {
            let row = self.kept(&mut other).await?.query_one(LIVES, &[&pid]).await?;
            let lives: bool = row.get(0);
            if !lives || deadline < Instant::now() {
                return Ok(!lives);
            }
            sleep(TICK).await;
        }
    }

    /// A session for what takes its time.
    async fn session(&self) -> Result<Connection, ApplyError> {
        let settings =
            Settings { statement_timeout: self.limits.move_timeout, ..self.settings.clone() };
        let connection = Box::pin(connect(&settings, self.coordinator)).await?;
        // What is set for the transaction is then set on the nodes too, where the locks are taken. And a
        // move whose agent is gone ends.
        let set = "SET citus.propagate_set_commands = 'local'; \
                   SET client_connection_check_interval = '2s'";
        connection.simple_query(set).await?;
        Ok(connection)
    }

    /// Runs a statement that waits for no lock longer than it may, here or on a node.
    async fn bounded(&self, connection: &Connection, sql: &str) -> Result<(), ApplyError> {
        let Apply { lock_timeout, move_timeout, .. } = self.limits;
        let (lock, statement) = (lock_timeout.as_millis(), move_timeout.as_millis());
        // One by one: Citus passes on the whole text in which it finds a SET LOCAL, the move included.
        // But the end comes with the move: an agent that is stopped meanwhile must not keep its locks.
        for sql in [
            "BEGIN",
            &format!("SET LOCAL lock_timeout = '{lock}ms'"),
            &format!("SET LOCAL statement_timeout = '{statement}ms'"),
            &format!("{sql}; COMMIT"),
        ] {
            // However long this process was stopped in between.
            if !self.claim.is_valid() {
                let reason = "the lease was not renewed in time".to_owned();
                return Err(ApplyError::BrokenOff { reason });
            }
            connection.simple_query(sql).await?;
        }
        Ok(())
    }

    /// What came of it. `broken_off` says how it was to end, if it was.
    fn end(&self, error: ApplyError, broken_off: Option<End>) -> End {
        let error = match error {
            ApplyError::BrokenOff { reason } => return End::new(Outcome::Stopped, reason),
            error @ ApplyError::Lacking { .. } => {
                return End::new(Outcome::Failed, error.to_string());
            }
            error => error,
        };
        let code = match &error {
            ApplyError::Query(QueryError::Failed { source, .. }) => source.code().cloned(),
            _ => None,
        };
        match (code, broken_off) {
            (None, _) => {
                let reason = format!("how it ended is unknown: {}", chain(&error));
                End::new(Outcome::Unknown, reason)
            }
            (Some(_), Some(end)) => end,
            (Some(SqlState::LOCK_NOT_AVAILABLE), None) => {
                let waited = humantime::format_duration(self.limits.lock_timeout);
                let reason = format!("it did not get a lock within {waited}: {}", chain(&error));
                End::new(Outcome::NoLock, reason)
            }
            (Some(_), None) => End::new(Outcome::Failed, chain(&error).to_string()),
        }
    }

    /// Asks how far the move is, until it stands still. `pid` is the session that does it, unless Citus names
    /// another.
    async fn watch(
        &self,
        order: Order<'_>,
        pid: i32,
        movers: &Movers,
        is_building: &AtomicBool,
        mut show: impl FnMut(&Progress),
    ) -> End {
        let mut standstill = Standstill::new(self.limits.stall_timeout);
        let (mut connection, mut is_near, mut last) = (None, false, None);
        movers.are(&[pid]);
        loop {
            sleep(if is_near { TICK_NEAR_THE_END } else { TICK }).await;
            let progress = match self.ask(&mut connection, order.shards).await {
                Ok((mover, progress)) => {
                    let mut all = BTreeMap::from([(pid, Progress::default())]);
                    // A session of Citus' own copies, and does not tell at its end.
                    last = mover.or(last.filter(|_| order.copies));
                    all.insert(last.unwrap_or(pid), progress.clone());
                    movers.see(&all);
                    progress
                }
                Err(error) => {
                    debug!(error = %chain(&error), "how far the move is, is unknown");
                    connection = None;
                    Progress::default()
                }
            };
            let now = Instant::now();
            if is_building.swap(false, Ordering::Relaxed) {
                standstill.went_on(now);
            }
            let known = (progress != Progress::default()).then(|| progress.clone());
            if let Some(why) = standstill.see(known, now, |it| it.phase.clone()) {
                return End::new(Outcome::Failed, why);
            }
            is_near = progress.is_near_the_end();
            show(&progress);
        }
    }

    async fn ask(
        &self,
        connection: &mut Option<Connection>,
        shards: &[i64],
    ) -> Result<(Option<i32>, Progress), ApplyError> {
        Ok(progress::read(self.kept(connection).await?, shards).await?)
    }

    /// A connection that is kept as long as it lives.
    async fn kept<'a>(
        &self,
        connection: &'a mut Option<Connection>,
    ) -> Result<&'a Connection, ConnectError> {
        self.kept_to(self.coordinator, connection).await
    }

    async fn kept_to<'a>(
        &self,
        node: &Node,
        connection: &'a mut Option<Connection>,
    ) -> Result<&'a Connection, ConnectError> {
        let kept = match connection.take().filter(|it| !it.is_closed()) {
            Some(kept) => kept,
            None => Box::pin(connect(self.settings, node)).await?,
        };
        Ok(connection.insert(kept))
    }

    /// Says each time that an index of these shards is being built: a move shows nothing of it, for as
    /// long as it takes. It asks by itself, because a node that hangs holds it up.
    async fn see_builds(&self, shards: &[i64], is_building: &AtomicBool) -> Infallible {
        let mut connection = None;
        loop {
            sleep((self.limits.stall_timeout / 4).min(TICK_OF_BUILDS)).await;
            let asked = async {
                let kept = self.kept(&mut connection).await?;
                Ok::<_, ApplyError>(progress::is_building(kept, shards).await?)
            };
            match asked.await {
                Ok(is_seen) => is_building.store(is_seen, Ordering::Relaxed),
                Err(error) => {
                    debug!(error = %chain(&error), "whether an index is built is unknown");
                    connection = None;
                }
            }
        }
    }
}

/// Fails unless each node has them.
async fn is_copied(connection: &Connection, shards: &[i64]) -> Result<(), ApplyError> {
    let row = connection.query_one(LACKING, &[&shards]).await?;
    match row.get(0) {
        Some(shard) => Err(ApplyError::Lacking { shard }),
        None => Ok(()),
    }
}

/// What moves it.
struct Statement {
    sql: String,
    /// The session that does it.
    pid: i32,
    /// What to do if that does not end.
    next: String,
}

/// What moves it; or why it must not be.
async fn check(
    connection: &Connection,
    order: Order<'_>,
) -> Result<Result<Statement, String>, QueryError> {
    let Order { copies, shard, from, to, .. } = order;
    let number = |group: u32| i32::try_from(group).unwrap_or(-1);
    let row = connection.query_one(CHECK, &[&shard, &number(from), &number(to)]).await?;
    let (is_coordinator, source, target, is_there): (bool, Option<i32>, Option<i32>, bool) =
        (row.get(0), row.get(1), row.get(2), row.get(3));
    let sql = match (is_coordinator, source, target, is_there) {
        (false, ..) => Err("the coordinator is no primary any more".to_owned()),
        (_, _, _, false) => Err(format!("shard {shard} is not on group {from} any more")),
        (_, None, ..) => Err(format!("group {from} has no active primary any more")),
        (_, _, None, _) => Err(format!("group {to} takes no shards any more")),
        // Citus does it in a session of its own, where this one's limits do not hold: the watch bounds it.
        _ if copies => Ok("SELECT replicate_reference_tables('auto')".to_owned()),
        (_, Some(source), Some(target), true) => {
            Ok(format!("SELECT citus_move_shard_placement({shard}, {source}, {target}, 'auto')"))
        }
    };
    Ok(sql.map(|sql| Statement { sql, pid: row.get(4), next: row.get(5) }))
}
