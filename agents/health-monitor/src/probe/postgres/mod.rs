//! PostgreSQL, by SQL: what a server says, and why it says nothing.
//!
//! [`PostgresProbe`] asks on a kept connection, each interval; [`DeepProbe`] on a new one each time, now
//! and then: only that shows a postmaster that hangs or has no connection to spare. Neither writes, and
//! `pg_monitor` is all that they need.

mod blocking;
mod certificate;
mod counters;
mod deep;
mod deep_facts;
mod deep_query;
pub(super) mod failure;
mod kept;
mod memory;
mod query;

use std::time::Duration;

use chrono::{DateTime, Utc};
use tokio_postgres::types::PgLsn;

pub use blocking::Blocker;
pub use certificate::Certificate;
pub use deep::{DeepProbe, LIMIT};
pub use deep_facts::{
    CacheTraffic, Checkpoints, DeadRows, DeepFacts, Holder, Load, OpenTransaction, RunningQuery,
    Sizes, WalDirectory, Wraparound,
};
pub use kept::PostgresProbe;

/// What a server says each interval, on a kept connection.
#[expect(clippy::struct_excessive_bools, reason = "what a server says, one by one")]
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PostgresFacts {
    /// `server_version_num`.
    pub server_version: u32,
    /// Which cluster it is.
    pub system_identifier: u64,
    /// The role has `pg_monitor`; without it `connections` and much of `standard` are too low.
    pub has_monitor: bool,
    /// `pg_is_in_recovery()`: it is a standby.
    pub in_recovery: bool,
    /// A primary that refuses writes: `default_transaction_read_only`.
    pub read_only: bool,
    /// The timeline that is written or received.
    pub timeline: u32,
    /// A primary: how far it has flushed. A standby: how far it has replayed, if it has.
    pub lsn: Option<PgLsn>,
    /// When that was so, by [`clock::now`](crate::clock::now): between question and answer.
    pub at: Duration,
    /// `lsn` and `at` of the question before, if it had the same role and timeline.
    pub earlier: Option<(Duration, PgLsn)>,
    /// Since when it has this role and timeline; `None` if it had them at the first look.
    pub role_since: Option<Duration>,
    /// Since when the connection is kept: it took new ones then.
    pub connected_at: Duration,
    /// A standby's WAL receiver, if one runs.
    pub receiver: Option<Receiver>,
    /// A standby: since when it has not streamed, as far as this probe has seen.
    pub not_streaming_since: Option<Duration>,
    /// A standby that is told to stream; `false` is one that lives on archived WAL alone.
    pub should_stream: bool,
    /// Replay is paused.
    pub replay_paused: bool,
    /// A standby that replays late on purpose: `recovery_min_apply_delay`.
    pub apply_delay: Duration,
    /// The server's clock against ours, in seconds; it is ahead if above 0.
    pub clock_ahead: f64,
    /// When it was started, by its own clock.
    pub started_at: DateTime<Utc>,
    /// Connections in use, and how many there may be, without those that are reserved.
    pub connections: (u32, u32),
    /// What is asked for less often, and when it was answered. `None` until then, and where the
    /// server refuses it.
    pub standard: Option<(Duration, StandardFacts)>,
}

/// A standby's WAL receiver.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Receiver {
    /// `streaming`, `waiting` …
    pub status: String,
    /// Since the last message of the primary, by the server's own clock.
    pub silent_for: Option<Duration>,
    /// How far it has received.
    pub lsn: Option<PgLsn>,
}

/// What the standard checks need.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StandardFacts {
    /// A primary's standbys: `pg_stat_replication`, without backups and logical ones.
    pub senders: Vec<Sender>,
    /// `synchronous_standby_names`.
    pub synchronous_standby_names: String,
    /// Replication slots.
    pub slots: Vec<Slot>,
    /// Archiving; `None` where it is off.
    pub archiver: Option<Archiver>,
    /// The longest wait for a lock, if anybody waits, and how many do.
    pub lock_wait: Option<Duration>,
    /// Sessions that wait for a lock.
    pub lock_waiters: u32,
}

/// A standby, as its primary sees it.
#[derive(Clone, Debug, PartialEq)]
pub struct Sender {
    /// Its `application_name`.
    pub application_name: String,
    /// `streaming`, `catchup` …
    pub state: String,
    /// `sync`, `quorum`, `potential` or `async`.
    pub sync_state: String,
}

/// A replication slot.
#[derive(Clone, Debug, PartialEq)]
pub struct Slot {
    /// Its name.
    pub name: String,
    /// Somebody uses it.
    pub active: bool,
    /// WAL that it holds back, in bytes.
    pub retained_bytes: Option<u64>,
    /// `reserved`, `extended`, `unreserved` or `lost`.
    pub wal_status: Option<String>,
    /// WAL until it is lost, in bytes, if there is a limit.
    pub safe_bytes: Option<u64>,
}

/// `pg_stat_archiver`.
#[derive(Clone, Debug, PartialEq)]
pub struct Archiver {
    /// Since when it fails, as far as this probe has seen, if the last attempt failed.
    pub failing_for: Option<Duration>,
    /// The age of the oldest file that waits.
    pub oldest_ready: Option<Duration>,
    /// Files that wait.
    pub ready: u32,
}
