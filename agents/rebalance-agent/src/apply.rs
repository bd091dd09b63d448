//! Moves one shard group: bounded in time and in what writers wait, watched, and broken off when it must.
//!
//! Citus' own background jobs ignore the settings of the session that starts them, so a transaction that
//! wrote to the shard and stays open holds up all its writers at the end of a move for as long as it
//! likes. `citus_move_shard_placement` in a session of ours does not: it waits `lock_timeout`, and fails.

mod progress;

use std::time::Duration;

use shared::lease::Claim;
use shared::pg::{ConnectError, Connection, Node, QueryError, Settings, connect};
use shared::telemetry::chain;
use thiserror::Error;
use tokio::time::{Instant, sleep, timeout};
use tokio_postgres::error::SqlState;
use tracing::debug;

use crate::config::Apply;
use crate::ledger::Outcome;
pub use progress::{Cutover, Progress, Standstill};

/// So often a move is asked how far it is …
const TICK: Duration = Duration::from_millis(500);
/// … and so often when its writers may have to wait.
const TICK_NEAR_THE_END: Duration = Duration::from_millis(200);
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
                    WHERE shardid = $1::bigint AND groupid = $2::int AND shardstate = 1)";

/// What is to be moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Order<'a> {
    /// The lowest shard of the group.
    pub shard: i64,
    /// All of them.
    pub shards: &'a [i64],
    /// The group it is on.
    pub from: u32,
    /// The group it is to be on.
    pub to: u32,
}

/// How a move ended, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct End {
    /// How.
    pub outcome: Outcome,
    /// Why: a sentence without full stop, empty if it was moved.
    pub reason: String,
}

impl End {
    fn new(outcome: Outcome, reason: impl Into<String>) -> Self {
        Self { outcome, reason: reason.into() }
    }
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

    /// Copies the reference tables to the nodes that lack them, until it is done or `halted` says why it
    /// must not go on. Writers of those tables wait for as long as it takes, after at most `lock_timeout`
    /// in which they are waited for.
    ///
    /// # Errors
    ///
    /// The coordinator refuses, or does not answer.
    pub async fn copy_reference_tables(
        &self,
        halted: impl Future<Output = String>,
    ) -> Result<(), ApplyError> {
        let connection = self.session().await?;
        let work = self.bounded(&connection, "SELECT replicate_reference_tables('auto')");
        tokio::pin!(work);
        let reason = tokio::select! {
            done = &mut work => return done,
            reason = halted => reason,
        };
        Box::pin(connection.cancel()).await;
        match timeout(CANCEL_LIMIT, work).await {
            Ok(Ok(())) => Ok(()),
            _ => Err(ApplyError::BrokenOff { reason }),
        }
    }

    /// Moves a shard group, until it is done or `halted` says why it must not go on. `show` takes how far
    /// it is.
    pub async fn carry(
        &self,
        order: Order<'_>,
        halted: impl Future<Output = String>,
        show: impl FnMut(&Progress),
    ) -> End {
        let connection = match self.session().await {
            Ok(connection) => connection,
            Err(error) => return End::new(Outcome::Failed, chain(&error).to_string()),
        };
        let sql = match check(&connection, order).await {
            Ok(Ok(sql)) => sql,
            Ok(Err(reason)) => return End::new(Outcome::Failed, reason),
            Err(error) => return End::new(Outcome::Failed, chain(&error).to_string()),
        };
        let work = self.bounded(&connection, &sql);
        tokio::pin!(work);
        let why = tokio::select! {
            ended = &mut work => return self.end(ended, None),
            why = halted => (Outcome::Stopped, why),
            why = self.watch(order.shards, show) => why,
        };
        // It drops what it has copied; what it cannot, Citus does later.
        Box::pin(connection.cancel()).await;
        if let Ok(ended) = timeout(CANCEL_LIMIT, work).await {
            return self.end(ended, Some(why));
        }
        // The server ends it when it finds that nobody listens.
        let reason = format!("{}; and it does not answer to being cancelled", why.1);
        End::new(Outcome::Unknown, reason)
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

    /// What came of a move. `broken_off` says why it was to end, if it was.
    fn end(&self, ended: Result<(), ApplyError>, broken_off: Option<(Outcome, String)>) -> End {
        let error = match ended {
            // It was quicker.
            Ok(()) => return End::new(Outcome::Moved, ""),
            Err(ApplyError::BrokenOff { reason }) => return End::new(Outcome::Stopped, reason),
            Err(error) => error,
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
            (Some(_), Some((outcome, why))) => End::new(outcome, why),
            (Some(SqlState::LOCK_NOT_AVAILABLE), None) => {
                let waited = humantime::format_duration(self.limits.lock_timeout);
                let reason = format!("it did not get a lock within {waited}: {}", chain(&error));
                End::new(Outcome::NoLock, reason)
            }
            (Some(_), None) => End::new(Outcome::Failed, chain(&error).to_string()),
        }
    }

    /// Asks how far the move is, until it stands still or keeps its writers waiting for too long.
    async fn watch(&self, shards: &[i64], mut show: impl FnMut(&Progress)) -> (Outcome, String) {
        let Apply { lock_timeout, stall_timeout, .. } = *self.limits;
        let (mut standstill, mut cutover) =
            (Standstill::new(stall_timeout), Cutover::new(lock_timeout));
        let (mut connection, mut is_near) = (None, false);
        loop {
            sleep(if is_near { TICK_NEAR_THE_END } else { TICK }).await;
            let asked = self.ask(&mut connection, shards);
            let answer =
                if is_near { timeout(lock_timeout, asked).await.ok() } else { Some(asked.await) };
            let progress = match answer {
                Some(Ok(progress)) => progress,
                unknown => {
                    if let Some(Err(error)) = unknown {
                        debug!(error = %chain(&error), "how far the move is, is unknown");
                    }
                    connection = None;
                    Progress::default()
                }
            };
            let now = Instant::now();
            if let Some(why) = cutover.see(&progress, now) {
                return (Outcome::NoLock, why);
            }
            if let Some(why) = standstill.see(&progress, now) {
                return (Outcome::Failed, why);
            }
            is_near = progress.is_near_the_end() || (is_near && progress == Progress::default());
            show(&progress);
        }
    }

    async fn ask(
        &self,
        connection: &mut Option<Connection>,
        shards: &[i64],
    ) -> Result<Progress, ApplyError> {
        let kept = match connection.take().filter(|it| !it.is_closed()) {
            Some(kept) => kept,
            None => Box::pin(connect(self.settings, self.coordinator)).await?,
        };
        let progress = progress::read(connection.insert(kept), shards).await?;
        Ok(progress)
    }
}

/// The statement that moves it; or why it must not be.
async fn check(
    connection: &Connection,
    order: Order<'_>,
) -> Result<Result<String, String>, QueryError> {
    let Order { shard, from, to, .. } = order;
    let number = |group: u32| i32::try_from(group).unwrap_or(-1);
    let row = connection.query_one(CHECK, &[&shard, &number(from), &number(to)]).await?;
    let (is_coordinator, source, target, is_there): (bool, Option<i32>, Option<i32>, bool) =
        (row.get(0), row.get(1), row.get(2), row.get(3));
    Ok(match (is_coordinator, source, target, is_there) {
        (false, ..) => Err("the coordinator is no primary any more".to_owned()),
        (_, _, _, false) => Err(format!("shard {shard} is not on group {from} any more")),
        (_, None, ..) => Err(format!("group {from} has no active primary any more")),
        (_, _, None, _) => Err(format!("group {to} takes no shards any more")),
        (_, Some(source), Some(target), true) => {
            Ok(format!("SELECT citus_move_shard_placement({shard}, {source}, {target}, 'auto')"))
        }
    })
}
