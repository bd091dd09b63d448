//! The questions on the kept connection, and how their answers are read.

use std::time::Duration;

use chrono::{DateTime, Utc};
use shared::pg::QueryError;
use tokio_postgres::Row;
use tokio_postgres::types::{FromSql, PgLsn};

use super::{Receiver, Sender, Slot};

/// What holds as long as a connection.
pub(super) const IDENTITY: &str = "
    SELECT (SELECT system_identifier FROM pg_control_system()),
           current_setting('server_version_num')::int,
           pg_postmaster_start_time(),
           pg_has_role('pg_monitor', 'USAGE'),
           current_setting('max_connections')::int
               - current_setting('superuser_reserved_connections')::int
               - coalesce(current_setting('reserved_connections', true)::int, 0)";

/// What is asked each interval.
///
/// The role is read once, in a subquery that cannot be flattened; a promotion right after it fails the
/// question, which is then asked once more. Of the subqueries only those of the branch that is taken run.
/// The control file knows a standby's timeline late, at a restartpoint, but is all there is where nothing
/// streams; the receiver's is 0 before its first message.
pub(super) const POSITION: &str = "
    SELECT now.in_recovery,
           clock_timestamp(),
           NOT now.in_recovery AND current_setting('default_transaction_read_only')::bool,
           CASE WHEN NOT now.in_recovery
               THEN ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::int
               ELSE coalesce(
                   nullif(receiver.received_tli, 0),
                   greatest((SELECT timeline_id FROM pg_control_checkpoint()),
                            (SELECT min_recovery_end_timeline FROM pg_control_recovery())))
           END,
           CASE WHEN now.in_recovery THEN now.replay_lsn ELSE pg_current_wal_flush_lsn() END,
           CASE WHEN now.in_recovery THEN pg_is_wal_replay_paused() ELSE false END,
           CASE WHEN receiver.pid IS NOT NULL THEN coalesce(receiver.status, 'unknown') END,
           extract(epoch FROM clock_timestamp() - receiver.last_msg_receipt_time)::float8,
           now.receive_lsn,
           CASE WHEN now.in_recovery
               THEN extract(epoch FROM current_setting('recovery_min_apply_delay')::interval)::float8
           END,
           CASE WHEN now.in_recovery AND pg_has_role('pg_read_all_settings', 'USAGE')
               THEN current_setting('primary_conninfo') <> ''
           END,
           (SELECT count(*)::int FROM pg_stat_get_activity(NULL)
             WHERE backend_type = 'client backend')
      FROM (SELECT pg_is_in_recovery() AS in_recovery,
                   pg_last_wal_replay_lsn() AS replay_lsn,
                   pg_last_wal_receive_lsn() AS receive_lsn
            OFFSET 0) AS now
      LEFT JOIN pg_stat_wal_receiver AS receiver ON now.in_recovery";

/// `synchronous_standby_names`; whether WAL is archived here; whether the last attempt failed.
pub(super) const ARCHIVING: &str = "
    SELECT current_setting('synchronous_standby_names'),
           CASE current_setting('archive_mode')
               WHEN 'always' THEN true WHEN 'on' THEN NOT pg_is_in_recovery() ELSE false END,
           coalesce(last_failed_time > last_archived_time, last_failed_time IS NOT NULL)
      FROM pg_stat_archiver";

/// Files that wait for the archiver, and since when the oldest does.
pub(super) const READY: &str = "
    SELECT count(*)::int, extract(epoch FROM clock_timestamp() - min(modification))::float8
      FROM pg_ls_archive_statusdir() WHERE name LIKE '%.ready'";

/// The standbys: a walsender of a logical slot is in a database.
pub(super) const SENDERS: &str = "
    SELECT application_name, coalesce(state, ''), coalesce(sync_state, '')
      FROM pg_stat_replication AS sender
     WHERE state IS DISTINCT FROM 'backup'
       AND (SELECT datid IS NULL FROM pg_stat_get_activity(sender.pid))";

/// The slots; WAL is held back from where they would go on to where the server is.
pub(super) const SLOTS: &str = "
    SELECT slot_name::text, active,
           (CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn()
                 ELSE pg_current_wal_lsn() END - restart_lsn)::bigint,
           wal_status, safe_wal_size
      FROM pg_replication_slots";

/// Who waits for a lock. `pg_locks` holds up everybody for a moment, so it is read only if somebody does.
pub(super) const LOCKS: &str = "
    SELECT count(DISTINCT pid)::int, extract(epoch FROM clock_timestamp() - min(waitstart))::float8
      FROM pg_locks
     WHERE NOT granted
       AND EXISTS (SELECT FROM pg_stat_get_activity(NULL) WHERE wait_event_type = 'Lock')";

/// An answer that is not of the type, or in the range, that PostgreSQL documents.
#[derive(Debug, thiserror::Error)]
pub(super) enum AnswerError {
    /// No answer.
    #[error(transparent)]
    Query(#[from] QueryError),
    /// Another type.
    #[error("read the answer")]
    Column(#[from] tokio_postgres::Error),
    /// Out of range.
    #[error("the server answers {0} out of range")]
    Range(&'static str),
}

/// Reads the columns of a row one after the other: by place, since a name is searched each time.
pub(super) struct Columns<'a> {
    row: &'a Row,
    next: usize,
}

impl<'a> Columns<'a> {
    pub(super) fn of(row: &'a Row) -> Self {
        Self { row, next: 0 }
    }

    pub(super) fn take<T: FromSql<'a>>(&mut self) -> Result<T, AnswerError> {
        self.next += 1;
        Ok(self.row.try_get(self.next - 1)?)
    }

    /// A number that is not below zero.
    pub(super) fn count(&mut self, what: &'static str) -> Result<u32, AnswerError> {
        let number: i32 = self.take()?;
        u32::try_from(number).map_err(|_| AnswerError::Range(what))
    }

    /// Bytes; what is below zero is none.
    pub(super) fn bytes(&mut self) -> Result<Option<u64>, AnswerError> {
        let number: Option<i64> = self.take()?;
        Ok(number.map(|it| u64::try_from(it).unwrap_or(0)))
    }

    /// A time; one below zero, after a clock was set back, is none.
    pub(super) fn seconds(&mut self) -> Result<Option<Duration>, AnswerError> {
        let seconds: Option<f64> = self.take()?;
        Ok(seconds.and_then(|it| Duration::try_from_secs_f64(it.max(0.0)).ok()))
    }

    pub(super) fn text(&mut self) -> Result<String, AnswerError> {
        let text: Option<String> = self.take()?;
        Ok(text.unwrap_or_default())
    }
}

/// The answer to [`IDENTITY`].
#[derive(Clone, Copy, Debug)]
pub(super) struct Identity {
    pub(super) system_identifier: u64,
    pub(super) server_version: u32,
    pub(super) started_at: DateTime<Utc>,
    pub(super) has_monitor: bool,
    pub(super) connections_max: u32,
}

pub(super) fn identity(row: &Row) -> Result<Identity, AnswerError> {
    let mut columns = Columns::of(row);
    let system_identifier: i64 = columns.take()?;
    Ok(Identity {
        // The server shows this unsigned number as a signed one.
        system_identifier: system_identifier.cast_unsigned(),
        server_version: columns.count("server_version_num")?,
        started_at: columns.take()?,
        has_monitor: columns.take()?,
        connections_max: columns.count("max_connections")?,
    })
}

/// The answer to [`POSITION`].
#[expect(clippy::struct_excessive_bools, reason = "what a server says, one by one")]
#[derive(Clone, Debug)]
pub(super) struct Position {
    pub(super) in_recovery: bool,
    pub(super) clock: DateTime<Utc>,
    pub(super) read_only: bool,
    pub(super) timeline: u32,
    pub(super) lsn: Option<PgLsn>,
    pub(super) replay_paused: bool,
    pub(super) receiver: Option<Receiver>,
    pub(super) apply_delay: Duration,
    pub(super) should_stream: bool,
    pub(super) connections: u32,
}

pub(super) fn position(row: &Row) -> Result<Position, AnswerError> {
    let mut columns = Columns::of(row);
    let in_recovery = columns.take()?;
    let clock = columns.take()?;
    let read_only = columns.take()?;
    let timeline = columns.count("a timeline")?;
    let lsn = columns.take()?;
    let replay_paused = columns.take()?;
    let status: Option<String> = columns.take()?;
    let silent_for = columns.seconds()?;
    let receive_lsn = columns.take()?;
    let apply_delay = columns.seconds()?.unwrap_or_default();
    let should_stream: Option<bool> = columns.take()?;
    Ok(Position {
        in_recovery,
        clock,
        read_only,
        timeline,
        lsn,
        replay_paused,
        receiver: status.map(|status| Receiver { status, silent_for, lsn: receive_lsn }),
        apply_delay,
        // Who may not see it is not told otherwise.
        should_stream: should_stream.unwrap_or(in_recovery),
        connections: columns.count("connections")?,
    })
}

/// Reads a row of [`SENDERS`].
pub(super) fn sender(row: &Row) -> Result<Sender, AnswerError> {
    let mut columns = Columns::of(row);
    Ok(Sender {
        application_name: columns.text()?,
        state: columns.text()?,
        sync_state: columns.text()?,
    })
}

/// Reads a row of [`SLOTS`].
pub(super) fn slot(row: &Row) -> Result<Slot, AnswerError> {
    let mut columns = Columns::of(row);
    Ok(Slot {
        name: columns.text()?,
        active: columns.take()?,
        retained_bytes: columns.bytes()?,
        wal_status: columns.take()?,
        safe_bytes: columns.bytes()?,
    })
}
