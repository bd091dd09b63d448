//! The questions to a server, and its answers as [`crate::observation`] has them.
//!
//! A role with `pg_monitor` may ask all of them. Without it there are no rows in, or `NULL` instead
//! of, `pg_stat_wal_receiver`, `pg_stat_replication` and the startup process' `wait_event`, and
//! `pg_ls_waldir()` is refused, so no timeline of a standby is known; everything else is answered to
//! any role.

use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use shared::pg::QueryError;
use shared::pg::wal::check_segment_bytes;
use tokio_postgres::Row;
use tokio_postgres::types::{FromSql, PgLsn};

use crate::observation::{
    Archiver, CheckpointAge, Conflicts, Directory, Identity, Position, Receiver, ReceiverStatus,
    ReplayPause, Sender, Slot, StandbyDetails, StandbyPosition, SyncWaits, WalFileAge, WalStatus,
};

/// [`Identity`], and [`Directory`].
pub(crate) const IDENTITY: &str = "
    SELECT (SELECT system_identifier FROM pg_control_system()),
           current_setting('server_version_num')::int,
           pg_size_bytes(current_setting('wal_segment_size')),
           pg_postmaster_start_time(),
           pg_has_role('pg_monitor', 'USAGE'),
           (SELECT stats_reset FROM pg_stat_archiver),
           (SELECT checkpoint_lsn FROM pg_control_checkpoint())";

/// [`Position`], in recovery and out of it. It costs the server about 20 µs.
///
/// The role is read once, in a subquery that cannot be flattened; a promotion right after it fails
/// the question, and the next one is answered. Of the subqueries only the one of the branch that
/// is taken runs, so `pg_stat_activity` is read only where the signature of a partial record is
/// possible (`PAGE_BYTES`).
pub(crate) const POSITION: &str = "
    SELECT now.in_recovery,
           clock_timestamp(),
           CASE WHEN NOT now.in_recovery
               THEN ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::int
           END,
           CASE WHEN NOT now.in_recovery THEN pg_current_wal_insert_lsn() END,
           CASE WHEN NOT now.in_recovery THEN pg_current_wal_flush_lsn() END,
           now.receive_lsn,
           now.replay_lsn,
           CASE WHEN now.in_recovery THEN pg_get_wal_replay_pause_state() END,
           CASE WHEN now.in_recovery
                 AND now.replay_lsn < now.receive_lsn
                 AND (now.receive_lsn - '0/0') % 8192 = 0
               THEN (SELECT wait_event = 'RecoveryWalStream'
                       FROM pg_stat_activity WHERE backend_type = 'startup')
           END,
           coalesce(receiver.status, CASE WHEN receiver.pid IS NOT NULL THEN 'other' END),
           receiver.received_tli,
           receiver.last_msg_receipt_time
      FROM (SELECT pg_is_in_recovery() AS in_recovery,
                   pg_last_wal_replay_lsn() AS replay_lsn,
                   pg_last_wal_receive_lsn() AS receive_lsn
            OFFSET 0) AS now
      LEFT JOIN pg_stat_wal_receiver AS receiver ON now.in_recovery";

/// The newest timeline of which a standby surely has WAL, where no receiver that streams tells it:
/// the control file alone may name an old one long after the switch, so the segments count too (not
/// the histories). Asked after [`POSITION`], so replay was not beyond it then.
pub(crate) const TIMELINE: &str = "
    SELECT greatest(
               (SELECT min_recovery_end_timeline FROM pg_control_recovery()),
               (SELECT timeline_id FROM pg_control_checkpoint()),
               (SELECT max(('x' || left(name, 8))::bit(32)::int)
                  FROM pg_ls_waldir() WHERE name ~ '^[0-9A-F]{24}$'))";

/// What there is one of, with the question that a version understands.
///
/// The connection string of a receiver, as the server shows it, has its keywords in libpq's order
/// and quotes nothing; a receiver always sets the fallback.
pub(crate) fn general(server_version: u32) -> String {
    let logical_slot =
        if server_version < 160_000 { "NULL::bigint" } else { "sum(confl_active_logicalslot)" };
    format!(
        "SELECT pg_is_in_recovery(),
                clock_timestamp(),
                current_setting('synchronous_standby_names'),
                current_setting('synchronous_commit'),
                conflicts.*,
                archiver.archived_count, archiver.failed_count,
                archiver.last_archived_time, archiver.last_failed_time,
                extract(epoch FROM current_setting('recovery_min_apply_delay')::interval)::float8,
                receiver.sender_host, receiver.sender_port, receiver.slot_name,
                coalesce(
                    substring(receiver.conninfo FROM
                        '(?:^| )application_name=(.*?) fallback_application_name='),
                    substring(receiver.conninfo FROM
                        '(?:^| )fallback_application_name=(.*?)(?: [a-z_]+=|$)')),
                waiting.sessions, waiting.oldest,
                archiver.stats_reset,
                (SELECT checkpoint_lsn FROM pg_control_checkpoint())
           FROM pg_stat_archiver AS archiver
          CROSS JOIN (
                SELECT sum(confl_tablespace)::bigint, sum(confl_lock)::bigint,
                       sum(confl_snapshot)::bigint, sum(confl_bufferpin)::bigint,
                       sum(confl_deadlock)::bigint, {logical_slot}::bigint
                  FROM pg_stat_database_conflicts) AS conflicts
           LEFT JOIN (
                SELECT count(*)::bigint, min(state_change)
                  FROM pg_stat_activity WHERE wait_event = 'SyncRep'
                ) AS waiting (sessions, oldest) ON pg_has_role('pg_read_all_stats', 'USAGE')
           LEFT JOIN pg_stat_wal_receiver AS receiver ON true"
    )
}

/// `pg_stat_replication`: a server has `max_wal_senders` rows at most.
pub(crate) const SENDERS: &str = "
    SELECT clock_timestamp(),
           sender.application_name,
           host(sender.client_addr),
           sender.state,
           (SELECT datid IS NOT NULL FROM pg_stat_get_activity(sender.pid)),
           sender.flush_lsn,
           sender.replay_lsn,
           extract(epoch FROM sender.write_lag)::float8,
           extract(epoch FROM sender.flush_lag)::float8,
           extract(epoch FROM sender.replay_lag)::float8,
           sender.reply_time,
           sender.sync_priority,
           sender.sync_state,
           sender.pid
      FROM pg_stat_replication AS sender";

/// `pg_replication_slots`: a server has `max_replication_slots` rows at most.
pub(crate) fn slots(server_version: u32) -> String {
    let inactive_since =
        if server_version < 170_000 { "NULL::timestamptz" } else { "inactive_since" };
    format!(
        "SELECT clock_timestamp(),
                slot_name::text,
                slot_type = 'logical',
                active,
                restart_lsn,
                wal_status,
                safe_wal_size,
                {inactive_since},
                greatest(age(xmin), age(catalog_xmin))
           FROM pg_replication_slots"
    )
}

/// The segment that a primary writes, its timeline, and its last checkpoint.
pub(crate) const CHECKPOINT: &str = "
    SELECT clock_timestamp(),
           ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::int,
           pg_walfile_name(pg_current_wal_lsn()),
           redo_lsn, timeline_id, checkpoint_time
      FROM pg_control_checkpoint()";

/// The newest segments that are complete, as many as a history needs.
pub(crate) const WAL_FILES: &str = "
    SELECT clock_timestamp(), name, modification
      FROM pg_ls_waldir()
     WHERE name ~ '^[0-9A-F]{24}$' AND name <= pg_walfile_name(pg_current_wal_lsn())
     ORDER BY name DESC
     LIMIT 2000";

/// A column that is not of the type, or in the range, that PostgreSQL documents.
#[derive(Debug, thiserror::Error)]
pub enum AnswerError {
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
struct Columns<'a> {
    row: &'a Row,
    next: usize,
}

impl<'a> Columns<'a> {
    fn of(row: &'a Row) -> Self {
        Self { row, next: 0 }
    }

    fn take<T: FromSql<'a>>(&mut self) -> Result<T, AnswerError> {
        self.next += 1;
        Ok(self.row.try_get(self.next - 1)?)
    }
}

/// Reads the answer to [`IDENTITY`], and whether the role has `pg_monitor`.
pub(crate) fn identity(row: &Row) -> Result<(Identity, bool, Directory), AnswerError> {
    let mut columns = Columns::of(row);
    let system_identifier: i64 = columns.take()?;
    let version: i32 = columns.take()?;
    let segment_bytes: i64 = columns.take()?;
    let segment_bytes = u64::try_from(segment_bytes).ok().map(check_segment_bytes);
    let identity = Identity {
        // The server shows this unsigned number as a signed one.
        system_identifier: system_identifier.cast_unsigned(),
        server_version: unsigned(version, "server_version_num")?,
        wal_segment_bytes: segment_bytes
            .and_then(Result::ok)
            .ok_or(AnswerError::Range("wal_segment_size"))?,
        started_at: columns.take()?,
    };
    let is_monitor = columns.take()?;
    Ok((identity, is_monitor, directory(&mut columns)?))
}

fn directory(columns: &mut Columns<'_>) -> Result<Directory, AnswerError> {
    let statistics_reset = columns.take()?;
    let checkpoint: PgLsn = columns.take()?;
    Ok(Directory { statistics_reset, checkpoint: checkpoint.into() })
}

/// A row of [`POSITION`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct PositionRow<'a> {
    pub(crate) in_recovery: bool,
    pub(crate) clock: DateTime<Utc>,
    timeline: Option<i32>,
    insert_lsn: Option<PgLsn>,
    flush_lsn: Option<PgLsn>,
    receive_lsn: Option<PgLsn>,
    replay_lsn: Option<PgLsn>,
    pause: Option<&'a str>,
    startup_waits: Option<bool>,
    receiver_status: Option<&'a str>,
    received_timeline: Option<i32>,
    message_at: Option<DateTime<Utc>>,
}

impl<'a> PositionRow<'a> {
    pub(crate) fn read(row: &'a Row) -> Result<Self, AnswerError> {
        let mut columns = Columns::of(row);
        Ok(Self {
            in_recovery: columns.take()?,
            clock: columns.take()?,
            timeline: columns.take()?,
            insert_lsn: columns.take()?,
            flush_lsn: columns.take()?,
            receive_lsn: columns.take()?,
            replay_lsn: columns.take()?,
            pause: columns.take()?,
            startup_waits: columns.take()?,
            receiver_status: columns.take()?,
            received_timeline: columns.take()?,
            message_at: columns.take()?,
        })
    }

    pub(crate) fn position(self) -> Result<Position, AnswerError> {
        if !self.in_recovery {
            let timeline = self.timeline.ok_or(AnswerError::Range("no timeline"))?;
            return Ok(Position::Primary {
                timeline: unsigned(timeline, "timeline")?,
                flush_lsn: self.flush_lsn.ok_or(AnswerError::Range("no flush LSN"))?,
                insert_lsn: self.insert_lsn.ok_or(AnswerError::Range("no insert LSN"))?,
                fork_lsn: self.receive_lsn.and(self.replay_lsn),
            });
        }
        let receiver = self.receiver_status.map(|status| Receiver {
            status: ReceiverStatus::parse(status),
            // 0 before the first message.
            received_timeline: self
                .received_timeline
                .and_then(|it| u32::try_from(it).ok())
                .filter(|timeline| *timeline != 0),
            message_age: self.message_at.map(|at| age(self.clock, at)),
        });
        Ok(Position::Standby(StandbyPosition {
            receive_lsn: self.receive_lsn,
            replay_lsn: self.replay_lsn,
            replay_pause: match self.pause {
                Some("paused") => ReplayPause::Paused,
                Some("pause requested") => ReplayPause::Requested,
                _ => ReplayPause::NotPaused,
            },
            startup_waits: self.startup_waits,
            timeline: receiver.and_then(|it| it.received_timeline),
            receiver,
        }))
    }
}

/// The answer to [`general`].
#[derive(Debug)]
pub(crate) struct General {
    pub(crate) synchronous_standby_names: String,
    pub(crate) synchronous_commit: String,
    pub(crate) conflicts: Conflicts,
    pub(crate) archiver: Archiver,
    pub(crate) standby: Option<StandbyDetails>,
    pub(crate) sync_waits: Option<SyncWaits>,
    pub(crate) directory: Directory,
}

impl General {
    pub(crate) fn read(row: &Row) -> Result<Self, AnswerError> {
        let mut columns = Columns::of(row);
        let in_recovery: bool = columns.take()?;
        let now: DateTime<Utc> = columns.take()?;
        let (synchronous_standby_names, synchronous_commit) = (columns.take()?, columns.take()?);
        let mut count = || -> Result<Option<u64>, AnswerError> {
            let count: Option<i64> = columns.take()?;
            count.map(|it| unsigned(it, "a count")).transpose()
        };
        let conflicts = Conflicts {
            tablespace: count()?.unwrap_or(0),
            lock: count()?.unwrap_or(0),
            snapshot: count()?.unwrap_or(0),
            buffer_pin: count()?.unwrap_or(0),
            deadlock: count()?.unwrap_or(0),
            logical_slot: count()?,
        };
        let (archived_count, failed_count) = (count()?.unwrap_or(0), count()?.unwrap_or(0));
        let mut age_of = || -> Result<Option<Duration>, AnswerError> {
            let at: Option<DateTime<Utc>> = columns.take()?;
            Ok(at.map(|at| age(now, at)))
        };
        let archiver = Archiver {
            archived: archived_count,
            failed: failed_count,
            last_archived_age: age_of()?,
            last_failed_age: age_of()?,
        };
        let apply_delay: Option<f64> = columns.take()?;
        let host: Option<String> = columns.take()?;
        let port: Option<i32> = columns.take()?;
        let standby = StandbyDetails {
            apply_delay: apply_delay.and_then(seconds),
            upstream: host.zip(port).map(|(host, port)| address(&host, port)),
            slot: columns.take()?,
            application_name: columns.take()?,
        };
        let standby = in_recovery.then_some(standby);
        let sessions: Option<i64> = columns.take()?;
        let oldest = columns.take()?;
        let sync_waits = sessions.map(|it| unsigned(it, "a count")).transpose()?;
        let sync_waits = sync_waits.map(|sessions| SyncWaits { sessions, oldest });
        Ok(Self {
            synchronous_standby_names,
            synchronous_commit,
            conflicts,
            archiver,
            standby,
            sync_waits,
            directory: directory(&mut columns)?,
        })
    }
}

/// Reads the answer to [`TIMELINE`].
pub(crate) fn timeline(row: &Row) -> Result<u32, AnswerError> {
    let timeline: i32 = Columns::of(row).take()?;
    unsigned(timeline, "timeline")
}

/// Reads a row of [`SENDERS`].
pub(crate) fn sender(row: &Row) -> Result<Sender, AnswerError> {
    let mut columns = Columns::of(row);
    let now: DateTime<Utc> = columns.take()?;
    let text = |it: Option<String>| it.unwrap_or_default();
    let application_name = text(columns.take()?);
    let client_address = columns.take()?;
    let state = text(columns.take()?);
    let logical: Option<bool> = columns.take()?;
    let (flush_lsn, replay_lsn) = (columns.take()?, columns.take()?);
    let mut lag = || -> Result<Option<Duration>, AnswerError> {
        let lag: Option<f64> = columns.take()?;
        Ok(lag.and_then(seconds))
    };
    let (write_lag, flush_lag, replay_lag) = (lag()?, lag()?, lag()?);
    let reply_at: Option<DateTime<Utc>> = columns.take()?;
    let sync_priority: Option<i32> = columns.take()?;
    Ok(Sender {
        application_name,
        client_address,
        state,
        logical: logical.unwrap_or(false),
        flush_lsn,
        replay_lsn,
        write_lag,
        flush_lag,
        replay_lag,
        reply_age: reply_at.map(|at| now - at),
        sync_priority: unsigned(sync_priority.unwrap_or(0), "sync_priority")?,
        sync_state: text(columns.take()?),
        pid: columns.take()?,
    })
}

/// The walsenders, unless the role may not see more of one than its process.
pub(crate) fn seen(senders: Vec<Sender>) -> Option<Vec<Sender>> {
    senders.iter().all(|it| !it.state.is_empty()).then_some(senders)
}

/// Reads a row of [`slots`].
pub(crate) fn slot(row: &Row) -> Result<Slot, AnswerError> {
    let mut columns = Columns::of(row);
    let now: DateTime<Utc> = columns.take()?;
    let name = columns.take()?;
    let logical = columns.take()?;
    let active = columns.take()?;
    let restart_lsn = columns.take()?;
    let wal_status: Option<&str> = columns.take()?;
    let safe_wal_bytes = columns.take()?;
    let inactive_since: Option<DateTime<Utc>> = columns.take()?;
    let xmin_age: Option<i32> = columns.take()?;
    Ok(Slot {
        name,
        logical,
        active,
        restart_lsn,
        wal_status: wal_status.and_then(WalStatus::parse),
        safe_wal_bytes,
        inactive_for: inactive_since.map(|at| age(now, at)),
        // Below 0 is ahead of the next transaction: nothing is held back.
        xmin_age: xmin_age.map(|it| u32::try_from(it).unwrap_or(0)),
    })
}

/// The answer to [`CHECKPOINT`].
#[derive(Debug)]
pub(crate) struct LastCheckpoint {
    /// By the server's clock.
    pub(crate) now: DateTime<Utc>,
    pub(crate) timeline: u32,
    pub(crate) current_segment: String,
    pub(crate) checkpoint: CheckpointAge,
}

/// Reads the answer to [`CHECKPOINT`].
pub(crate) fn checkpoint(row: &Row) -> Result<LastCheckpoint, AnswerError> {
    let mut columns = Columns::of(row);
    let now: DateTime<Utc> = columns.take()?;
    let timeline: i32 = columns.take()?;
    let current_segment = columns.take()?;
    let redo_lsn = columns.take()?;
    let of_checkpoint: i32 = columns.take()?;
    let at: DateTime<Utc> = columns.take()?;
    let checkpoint =
        CheckpointAge { redo_lsn, timeline: unsigned(of_checkpoint, "timeline")?, age: now - at };
    let timeline = unsigned(timeline, "timeline")?;
    Ok(LastCheckpoint { now, timeline, current_segment, checkpoint })
}

/// Reads a row of [`WAL_FILES`].
pub(crate) fn wal_file(row: &Row) -> Result<WalFileAge, AnswerError> {
    let mut columns = Columns::of(row);
    let now: DateTime<Utc> = columns.take()?;
    let name = columns.take()?;
    let at: DateTime<Utc> = columns.take()?;
    Ok(WalFileAge { name, age: now - at })
}

fn unsigned<S, U: TryFrom<S>>(value: S, what: &'static str) -> Result<U, AnswerError> {
    U::try_from(value).map_err(|_| AnswerError::Range(what))
}

/// The time from `at` to `now`, not below zero: between two readings of one clock it is that only
/// if the clock was set back.
fn age(now: DateTime<Utc>, at: DateTime<Utc>) -> Duration {
    TimeDelta::to_std(&(now - at)).unwrap_or_default()
}

fn seconds(seconds: f64) -> Option<Duration> {
    Duration::try_from_secs_f64(seconds.max(0.0)).ok()
}

/// `10.0.0.7:5432`, `[::1]:5432`; of a Unix socket its directory.
fn address(host: &str, port: i32) -> String {
    match host {
        socket if socket.starts_with('/') => socket.to_owned(),
        host if host.contains(':') => format!("[{host}]:{port}"),
        host => format!("{host}:{port}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lsn(text: &str) -> Option<PgLsn> {
        text.parse().ok()
    }

    /// What a primary answers that was never a standby.
    fn primary() -> PositionRow<'static> {
        PositionRow {
            in_recovery: false,
            clock: "2026-03-01T12:00:10Z".parse().unwrap(),
            timeline: Some(3),
            insert_lsn: lsn("1/C0"),
            flush_lsn: lsn("1/A0"),
            receive_lsn: None,
            replay_lsn: None,
            pause: None,
            startup_waits: None,
            receiver_status: None,
            received_timeline: None,
            message_at: None,
        }
    }

    /// What a standby answers that streams.
    fn standby() -> PositionRow<'static> {
        PositionRow {
            in_recovery: true,
            timeline: None,
            insert_lsn: None,
            flush_lsn: None,
            receive_lsn: lsn("1/A0"),
            replay_lsn: lsn("1/90"),
            pause: Some("not paused"),
            receiver_status: Some("streaming"),
            received_timeline: Some(3),
            message_at: Some("2026-03-01T12:00:08Z".parse().unwrap()),
            ..primary()
        }
    }

    #[test]
    fn a_primary_says_where_its_timeline_began_if_it_was_promoted() {
        let position = |fork_lsn| Position::Primary {
            timeline: 3,
            flush_lsn: lsn("1/A0").unwrap(),
            insert_lsn: lsn("1/C0").unwrap(),
            fork_lsn,
        };
        for (case, row, expected) in [
            ("never a standby", primary(), None),
            ("after a crash", PositionRow { replay_lsn: lsn("1/50"), ..primary() }, None),
            (
                "promoted",
                PositionRow { receive_lsn: lsn("1/50"), replay_lsn: lsn("1/50"), ..primary() },
                lsn("1/50"),
            ),
        ] {
            assert_eq!(row.position().unwrap(), position(expected), "{case}");
        }
        let unknown = PositionRow { flush_lsn: None, ..primary() };
        let error = unknown.position().unwrap_err();
        assert_eq!(error.to_string(), "the server answers no flush LSN out of range");
    }

    #[test]
    fn a_standby_says_what_it_received_and_replayed() {
        let streaming = StandbyPosition {
            receive_lsn: lsn("1/A0"),
            replay_lsn: lsn("1/90"),
            replay_pause: ReplayPause::NotPaused,
            startup_waits: None,
            timeline: Some(3),
            receiver: Some(Receiver {
                status: ReceiverStatus::Streaming,
                received_timeline: Some(3),
                message_age: Some(Duration::from_secs(2)),
            }),
        };
        let alone = PositionRow { receiver_status: None, received_timeline: None, ..standby() };
        let starting = PositionRow {
            receiver_status: Some("starting"),
            received_timeline: Some(0),
            message_at: None,
            ..standby()
        };
        let waits = PositionRow { startup_waits: Some(true), pause: Some("paused"), ..standby() };
        for (case, row, expected) in [
            ("streaming", standby(), streaming),
            ("no receiver", alone, StandbyPosition { receiver: None, timeline: None, ..streaming }),
            (
                "a receiver that has not heard anything",
                starting,
                StandbyPosition {
                    receiver: Some(Receiver {
                        status: ReceiverStatus::Starting,
                        received_timeline: None,
                        message_age: None,
                    }),
                    timeline: None,
                    ..streaming
                },
            ),
            (
                "paused at the start of a page",
                waits,
                StandbyPosition {
                    replay_pause: ReplayPause::Paused,
                    startup_waits: Some(true),
                    ..streaming
                },
            ),
            (
                "nothing was streamed or replayed",
                PositionRow { receive_lsn: None, replay_lsn: None, ..standby() },
                StandbyPosition { receive_lsn: None, replay_lsn: None, ..streaming },
            ),
        ] {
            assert_eq!(row.position().unwrap(), Position::Standby(expected), "{case}");
        }
    }

    #[test]
    fn the_question_fits_the_version() {
        assert!(general(150_004).contains("NULL::bigint"));
        assert!(general(170_002).contains("confl_active_logicalslot"));
        assert!(slots(160_001).contains("NULL::timestamptz"));
        assert!(slots(170_002).contains("inactive_since"));
    }

    #[test]
    fn walsenders_of_which_only_the_process_is_shown_are_not_known() {
        let sender = |state: &str| Sender { state: state.to_owned(), ..Sender::default() };
        assert_eq!(seen(Vec::new()), Some(Vec::new()));
        assert_eq!(seen(vec![sender("streaming")]), Some(vec![sender("streaming")]));
        assert_eq!(seen(vec![sender("streaming"), sender("")]), None);
    }

    #[test]
    fn an_upstream_is_an_address() {
        for (host, expected) in
            [("10.0.0.7", "10.0.0.7:5432"), ("::1", "[::1]:5432"), ("/run/pg", "/run/pg")]
        {
            assert_eq!(address(host, 5432), expected);
        }
    }
}
