//! The questions on a new connection, and how their answers are read.

use tokio_postgres::Row;

use super::deep_facts::{
    DeadRows, Holder, OpenTransaction, RunningQuery, WalDirectory, Wraparound,
};
use super::query::{AnswerError, Columns};

/// Whether it is a standby, and its version.
pub(super) const ROLE: &str =
    "SELECT pg_is_in_recovery(), current_setting('server_version_num')::int";

/// Blocks found in shared buffers, and blocks read.
/// Then transactions, and how many identifiers were given out: only what writes takes one, subtransactions
/// too.
pub(super) const CACHE: &str = "
    SELECT sum(blks_hit)::bigint, sum(blks_read)::bigint, sum(xact_commit + xact_rollback)::bigint,
           txid_snapshot_xmax(txid_current_snapshot())
      FROM pg_stat_database";

/// The statements of clients that run longest.
pub(super) const QUERIES: &str = "
    SELECT pid, usename::text, application_name,
           extract(epoch FROM clock_timestamp() - query_start)::float8
      FROM pg_stat_activity
     WHERE backend_type = 'client backend' AND state = 'active' AND pid <> pg_backend_pid()
     ORDER BY query_start LIMIT 3";

/// The transactions that are open longest, prepared ones too.
pub(super) const TRANSACTIONS: &str = "
    SELECT * FROM (
        SELECT pid, usename::text, application_name, state, NULL::text AS prepared,
               extract(epoch FROM clock_timestamp() - xact_start)::float8 AS age
          FROM pg_stat_activity
         WHERE backend_type = 'client backend' AND xact_start IS NOT NULL
           AND pid <> pg_backend_pid()
         UNION ALL
        SELECT NULL, owner::text, NULL, NULL, gid,
               extract(epoch FROM clock_timestamp() - prepared)::float8
          FROM pg_prepared_xacts) AS open
     ORDER BY age DESC LIMIT 3";

/// Who waits for a lock, and for whom. Asking for the latter holds up everybody for a moment, so no
/// more than these are asked for.
pub(super) const WAITS: &str = "
    SELECT pid, pg_blocking_pids(pid)
      FROM (SELECT pid FROM pg_stat_activity WHERE wait_event_type = 'Lock' LIMIT 100) AS waiting";

/// What these sessions do.
pub(super) const HOLDERS: &str = "
    SELECT pid, usename::text, application_name, state,
           extract(epoch FROM clock_timestamp() - xact_start)::float8
      FROM pg_stat_activity WHERE pid = ANY($1)";

/// The databases whose oldest transaction identifier or multixact is oldest.
pub(super) const WRAPAROUND: &str = "
    SELECT datname::text, greatest(age(datfrozenxid), 0), greatest(mxid_age(datminmxid), 0)
      FROM pg_database
     ORDER BY greatest(age(datfrozenxid), mxid_age(datminmxid)) DESC LIMIT 1";

/// The tables of this database with the largest share of dead rows, of those that have many.
pub(super) const DEAD_ROWS: &str = "
    SELECT schemaname || '.' || relname, n_dead_tup,
           100.0::float8 * n_dead_tup / (n_live_tup + n_dead_tup)
      FROM pg_stat_user_tables
     WHERE n_dead_tup >= 10000
     ORDER BY 3 DESC LIMIT 3";

/// The size of each database, the largest first.
pub(super) const DATABASES: &str = "
    SELECT datname::text, pg_database_size(oid) FROM pg_database
     WHERE datallowconn ORDER BY 2 DESC";

/// Tables of this database.
pub(super) const TABLES: &str = "
    SELECT count(*)::int FROM pg_class
     WHERE relkind IN ('r', 'p', 'm') AND relnamespace NOT IN (
           SELECT oid FROM pg_namespace WHERE nspname IN ('pg_catalog', 'information_schema', 'pg_toast'))";

/// The files in `pg_wal`, and what the settings allow; -1 and 0 keep nothing.
pub(super) const WAL: &str = "
    SELECT (SELECT sum(size)::bigint FROM pg_ls_waldir()),
           pg_size_bytes(current_setting('max_wal_size'))
               + greatest(pg_size_bytes(current_setting('wal_keep_size')),
                          pg_size_bytes(current_setting('max_slot_wal_keep_size')), 0)";

/// Checkpoints that came by time, and all others.
pub(super) fn checkpoints(server_version: u32) -> &'static str {
    if server_version < 170_000 {
        "SELECT checkpoints_timed, checkpoints_req FROM pg_stat_bgwriter"
    } else {
        "SELECT num_timed, num_requested FROM pg_stat_checkpointer"
    }
}

/// What servers of a group must have in common or should have, what is known to endanger data, and
/// whatever waits for a restart.
pub(super) const SETTINGS: &str = "
    SELECT name, coalesce(setting, ''), pending_restart
      FROM pg_settings
     WHERE name = ANY($1) OR pending_restart
     ORDER BY name";

/// The settings that are looked at.
pub(super) const SETTINGS_OF_INTEREST: &[&str] = &[
    "archive_mode",
    "block_size",
    "data_checksums",
    "default_transaction_isolation",
    "fsync",
    "full_page_writes",
    "hot_standby_feedback",
    "max_connections",
    "max_locks_per_transaction",
    "max_prepared_transactions",
    "max_replication_slots",
    "max_slot_wal_keep_size",
    "max_wal_senders",
    "max_worker_processes",
    "password_encryption",
    "server_encoding",
    "server_version_num",
    "shared_preload_libraries",
    "ssl",
    "synchronous_commit",
    "TimeZone",
    "track_commit_timestamp",
    "wal_keep_size",
    "wal_level",
    "wal_log_hints",
    "wal_segment_size",
];

/// The extensions of this database.
pub(super) const EXTENSIONS: &str = "SELECT extname::text, extversion FROM pg_extension";

/// Databases that were made with another version of their collation; known since 15.
pub(super) const COLLATIONS: &str = "
    SELECT datname::text FROM pg_database
     WHERE datallowconn AND datcollversion <> pg_database_collation_actual_version(oid)
     ORDER BY datname";

fn holder(columns: &mut Columns<'_>) -> Result<Holder, AnswerError> {
    Ok(Holder { role: columns.text()?, application_name: columns.text()?, state: columns.text()? })
}

/// Reads a row of [`QUERIES`].
pub(super) fn running(row: &Row) -> Result<RunningQuery, AnswerError> {
    let mut columns = Columns::of(row);
    Ok(RunningQuery {
        pid: columns.take()?,
        role: columns.text()?,
        application_name: columns.text()?,
        running_for: columns.seconds()?.unwrap_or_default(),
    })
}

/// Reads a row of [`TRANSACTIONS`].
pub(super) fn transaction(row: &Row) -> Result<OpenTransaction, AnswerError> {
    let mut columns = Columns::of(row);
    Ok(OpenTransaction {
        pid: columns.take()?,
        holder: holder(&mut columns)?,
        prepared: columns.take()?,
        open_for: columns.seconds()?.unwrap_or_default(),
    })
}

/// Reads a row of [`HOLDERS`].
pub(super) fn known_holder(row: &Row) -> Result<(i32, Holder), AnswerError> {
    let mut columns = Columns::of(row);
    Ok((columns.take()?, holder(&mut columns)?))
}

/// Reads the row of [`WRAPAROUND`].
pub(super) fn wraparound(row: &Row) -> Result<Wraparound, AnswerError> {
    let mut columns = Columns::of(row);
    Ok(Wraparound {
        database: columns.text()?,
        transactions: columns.count("age(datfrozenxid)")?,
        multixacts: columns.count("mxid_age(datminmxid)")?,
    })
}

/// Reads a row of [`DEAD_ROWS`].
pub(super) fn dead_rows(row: &Row) -> Result<DeadRows, AnswerError> {
    let mut columns = Columns::of(row);
    Ok(DeadRows {
        table: columns.text()?,
        dead: columns.bytes()?.unwrap_or(0),
        percent: columns.take()?,
    })
}

/// Reads the row of [`WAL`].
pub(super) fn wal(row: &Row) -> Result<WalDirectory, AnswerError> {
    let mut columns = Columns::of(row);
    Ok(WalDirectory {
        bytes: columns.bytes()?.unwrap_or(0),
        allowed_bytes: columns.bytes()?.ok_or(AnswerError::Range("max_wal_size"))?,
    })
}
