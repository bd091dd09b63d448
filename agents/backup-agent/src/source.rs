//! Which server a base backup is read from.

use std::time::Duration;

use chrono::{DateTime, Utc};
use shared::pg::{Connection, Node, QueryError};
use shared::topology::{Group, GroupError, NodeState, Role};
use thiserror::Error;
use tokio::time::sleep;

use crate::arrival::Takers;
use crate::config::{BackupConfig, Prefer};

/// The servers of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// The server to read.
    pub node: Node,
    /// What it said of itself.
    pub state: NodeState,
    /// The primary, which is asked to switch WAL and to hold the lock.
    pub primary: Node,
    /// Why another server, if one was preferred, is not read.
    pub passed_over: Vec<String>,
}

/// Why there is no server to read.
#[derive(Debug, Error)]
pub enum SourceError {
    /// The group has no primary, or several.
    #[error(transparent)]
    Group(#[from] GroupError),
}

/// Chooses the server: by preference the standby that has replayed most, if it is not too far
/// behind and not among those that have `refused`; otherwise the primary.
///
/// # Errors
///
/// The group has not exactly one primary: a backup of either side of a split cluster would be
/// wrong for the other.
pub fn choose(
    group: &Group,
    config: &BackupConfig,
    refused: &[String],
) -> Result<Source, SourceError> {
    let (primary, primary_state) = group.primary()?;
    let mut passed_over = Vec::new();
    let mut best: Option<(&Node, &NodeState)> = None;
    let written = primary_state.flush_lsn.map_or(0, u64::from);
    if config.prefer == Prefer::Standby {
        for (node, state) in group.standbys() {
            match state.replay_lsn {
                _ if refused.contains(&node.name) => {}
                None => passed_over.push(format!("{} has replayed nothing yet", node.name)),
                Some(_) if state.timeline != primary_state.timeline => {
                    passed_over.push(format!(
                        "{} is on timeline {}, the primary on {}",
                        node.name, state.timeline, primary_state.timeline
                    ));
                }
                Some(lsn) if written.saturating_sub(lsn.into()) > config.standby_lag_bytes_max => {
                    let lag_bytes = written.saturating_sub(lsn.into());
                    passed_over.push(format!("{} is {lag_bytes} bytes behind", node.name));
                }
                Some(lsn) => {
                    if best.is_none_or(|(_, state)| state.replay_lsn < Some(lsn)) {
                        best = Some((node, state));
                    }
                }
            }
        }
        for (node, _) in group.unknown() {
            passed_over.push(format!("{} did not answer", node.name));
        }
    }
    let (node, state) = best.unwrap_or((primary, primary_state));
    Ok(Source { node: node.clone(), state: state.clone(), primary: primary.clone(), passed_over })
}

/// The lock that a run holds on the primary: one base backup of a group at a time, whoever takes
/// it. It ends with its connection, so a run that is killed frees it.
///
/// The number is ours alone among advisory locks with a key of two numbers: `pgme` in ASCII.
const LOCK: (i32, i32) = (0x7067_6d65, 1);

/// How often a run makes sure of its lock, so that hours of copying are not in vain.
const LOCK_POLL: Duration = Duration::from_secs(15);

/// Proof that no other run is under way, as long as the connection lives.
#[derive(Debug)]
pub struct RunLock {
    connection: Connection,
}

impl RunLock {
    /// Takes the lock if it is free.
    ///
    /// # Errors
    ///
    /// The primary did not answer.
    pub async fn take(connection: Connection) -> Result<Option<Self>, QueryError> {
        let taken = "SELECT pg_try_advisory_lock($1, $2)";
        let row = connection.query_one(taken, &[&LOCK.0, &LOCK.1]).await?;
        Ok(row.get::<_, bool>(0).then_some(Self { connection }))
    }

    /// Tells whether the lock is still held, by asking the server that holds it, and whether that
    /// server is still a primary.
    ///
    /// # Errors
    ///
    /// The server did not answer: then nobody knows.
    pub async fn is_held(&self) -> Result<bool, QueryError> {
        let held = "SELECT NOT pg_is_in_recovery() AND EXISTS (SELECT FROM pg_locks \
                    WHERE locktype = 'advisory' AND pid = pg_backend_pid() AND granted \
                    AND classid::bigint = $1::int AND objid::bigint = $2::int AND objsubid = 2)";
        let row = self.connection.query_one(held, &[&LOCK.0, &LOCK.1]).await?;
        Ok(row.get(0))
    }

    /// Resolves when the lock is lost, or when nobody knows any more whether it is held.
    pub async fn lost(&self) {
        loop {
            sleep(LOCK_POLL).await;
            if !self.is_held().await.unwrap_or(false) {
                return;
            }
        }
    }

    /// Who takes the primary's WAL.
    ///
    /// # Errors
    ///
    /// The primary did not answer.
    pub async fn takers(&self, slot: &str) -> Result<Takers, QueryError> {
        Takers::ask(&self.connection, slot).await
    }

    /// What the primary's clock says.
    ///
    /// # Errors
    ///
    /// No answer.
    pub async fn now(&self) -> Result<DateTime<Utc>, QueryError> {
        Ok(self.connection.query_one("SELECT clock_timestamp()", &[]).await?.get(0))
    }

    /// Ends the current WAL segment, so that it is archived now and not when it is full.
    ///
    /// # Errors
    ///
    /// The role may not (`GRANT EXECUTE ON FUNCTION pg_switch_wal()`), or no answer.
    pub async fn switch_wal(&self) -> Result<(), QueryError> {
        self.connection.query_one("SELECT pg_switch_wal()", &[]).await?;
        Ok(())
    }
}

/// Tells whether a state is a standby's.
pub fn is_standby(state: &NodeState) -> bool {
    state.role == Role::Standby
}
