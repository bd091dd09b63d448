//! What one look at a server returned.
//!
//! Three questions are put to a server on its kept connection: a [`Sample`] each second, the
//! [`Details`] each 10 to 15 s, and a [`Seed`] when [`crate::group::Group::wants_seed`] asks for
//! it. A moment is this host's `CLOCK_BOOTTIME`, which no one sets and which goes on while the
//! host is suspended; an age was computed by the server, between two readings of its own clock.
//! So no value here depends on two clocks that agree, except [`Sample::clock_ahead`], which
//! measures just that.

use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use serde::{Deserialize, Serialize};
use tokio_postgres::types::PgLsn;

use crate::json;

/// One thing that was learnt about one server.
#[derive(Clone, Debug, PartialEq)]
pub enum Report {
    /// The positions.
    Sample(Sample),
    /// All that changes slowly.
    Details(Box<Details>),
    /// The ages of positions before the first sample.
    Seed(Seed),
    /// The server does not tell them.
    SeedRefused,
    /// A question on the kept connection, or the attempt to make one, gave no answer.
    Failed {
        /// When that was clear.
        at: Duration,
        /// How far it came.
        stage: Stage,
    },
    /// The outcome of a new connection, made beside the kept one and closed again: only that
    /// shows a postmaster that hangs.
    FreshConnect {
        /// When it was made, or failed.
        at: Duration,
        /// How far it came, if it failed.
        outcome: Result<(), Stage>,
    },
}

/// How far an attempt came before it failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Stage {
    /// No connection.
    Dial,
    /// No TLS.
    Tls,
    /// No login.
    Auth,
    /// The server refused the question.
    Query,
    /// Nobody said anything in time.
    Timeout,
}

impl Stage {
    /// All of them, in the order an attempt meets them.
    pub const ALL: [Self; 5] = [Self::Dial, Self::Tls, Self::Auth, Self::Query, Self::Timeout];

    /// As it stands in a label.
    pub fn name(self) -> &'static str {
        match self {
            Self::Dial => "dial",
            Self::Tls => "tls",
            Self::Auth => "auth",
            Self::Query => "query",
            Self::Timeout => "timeout",
        }
    }
}

/// Where a server is, asked each second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sample {
    /// Read before the question was sent.
    pub asked_at: Duration,
    /// Read after the answer had come. The positions are those of a moment in between.
    pub answered_at: Duration,
    /// Who answered.
    pub identity: Identity,
    /// By what its data directory is known, as it was last asked.
    pub directory: Directory,
    /// The server's `clock_timestamp()` less this host's wall clock, read midway between
    /// `asked_at` and `answered_at`: right to half of the time between them.
    pub clock_ahead: TimeDelta,
    /// The positions.
    pub position: Position,
}

/// What cannot change while a connection lasts: asked once for each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// `pg_control_system()`.
    pub system_identifier: u64,
    /// `server_version_num`: 170002 is 17.2.
    pub server_version: u32,
    /// `wal_segment_size` in bytes, checked by [`shared::pg::wal::check_segment_bytes`].
    pub wal_segment_bytes: u64,
    /// `pg_postmaster_start_time()`, by the server's clock. Only compared for equality.
    pub started_at: DateTime<Utc>,
}

/// What a data directory keeps while its server is down: asked on connecting, and with what changes slowly.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Directory {
    /// `pg_stat_archiver.stats_reset`. A server that was stopped in order has it again when it starts; it is
    /// that of the start after a crash, a base backup and `pg_rewind`, and before version 15 of any
    /// start in recovery.
    pub statistics_reset: Option<DateTime<Utc>>,
    /// `pg_control_checkpoint().checkpoint_lsn`: what it is recovered from. After a crash it is what it was;
    /// a base backup of a primary begins with a checkpoint of its own. 0 is not known.
    pub checkpoint: u64,
}

/// The positions of a server in WAL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Position {
    /// Not in recovery.
    Primary {
        /// From `pg_walfile_name(pg_current_wal_lsn())`: the control file names the old timeline
        /// until the first checkpoint after a promotion.
        timeline: u32,
        /// `pg_current_wal_flush_lsn()`. Neither the insert position nor the write position, which a
        /// crash may take back.
        flush_lsn: PgLsn,
        /// `pg_current_wal_insert_lsn()`, read before that: it jumps over page headers, see
        /// [`before_page_header`]. What is beyond `flush_lsn` no standby has yet.
        insert_lsn: PgLsn,
        /// Where `timeline` left its parent: exactly what the history file says, and any role may
        /// ask it. After a promotion `pg_last_wal_replay_lsn()` stays where replay ended, until the
        /// server restarts. `None` without a promotion since then; where nothing was streamed
        /// before (`pg_last_wal_receive_lsn()` is `NULL`) it may stem from a crash recovery, which
        /// forks nothing.
        fork_lsn: Option<PgLsn>,
    },
    /// In recovery.
    Standby(StandbyPosition),
}

impl Position {
    /// How far WAL is on a primary's disk, or replayed by a standby.
    pub fn lsn(&self) -> Option<PgLsn> {
        match self {
            Self::Primary { flush_lsn, .. } => Some(*flush_lsn),
            Self::Standby(position) => position.replay_lsn,
        }
    }
}

/// The positions of a server in recovery.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StandbyPosition {
    /// `pg_last_wal_receive_lsn()`; `None` if nothing was streamed since the server started. May
    /// be before `replay_lsn`: streaming begins at the start of a segment.
    pub receive_lsn: Option<PgLsn>,
    /// `pg_last_wal_replay_lsn()`.
    pub replay_lsn: Option<PgLsn>,
    /// `pg_get_wal_replay_pause_state()`.
    pub replay_pause: ReplayPause,
    /// Whether the startup process waits for the receiver: its `wait_event` is
    /// `RecoveryWalStream`. Asked only where it matters, which is where `receive_lsn` is at the
    /// start of a page ([`PAGE_BYTES`]) and beyond `replay_lsn`; else `None`.
    pub startup_waits: Option<bool>,
    /// The newest timeline of which it surely has WAL, asked after the positions: that of the
    /// receiver if one streams, or else the greatest of
    /// `pg_control_recovery().min_recovery_end_timeline`, `pg_control_checkpoint().timeline_id` and
    /// the segments in `pg_ls_waldir()`. `None` if the server does not tell.
    pub timeline: Option<u32>,
    /// `pg_stat_wal_receiver`; `None` if no receiver runs.
    pub receiver: Option<Receiver>,
}

/// `XLOG_BLCKSZ`: WAL goes to disk in pages of this many bytes.
pub const PAGE_BYTES: u64 = 8192;

/// Where the WAL before an insert position ends: at the start of a page the position is after the
/// header that the page will have, which the flush position is not.
///
/// Source: `XLogBytePosToRecPtr` in `xlog.c`; the sizes of `XLogPageHeaderData`, and of
/// `XLogLongPageHeaderData` at the start of a segment.
pub fn before_page_header(lsn: u64, wal_segment_bytes: u64) -> u64 {
    let header = if lsn % wal_segment_bytes < PAGE_BYTES { 40 } else { 24 };
    if lsn % PAGE_BYTES == header { lsn - header } else { lsn }
}

/// Whether replay is paused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReplayPause {
    /// `not paused`
    NotPaused,
    /// `pause requested`: it will pause before the next record.
    Requested,
    /// `paused`
    Paused,
}

/// A WAL receiver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Receiver {
    /// Its status.
    pub status: ReceiverStatus,
    /// `received_tli`: the timeline of what it has flushed.
    pub received_timeline: Option<u32>,
    /// Time since `last_msg_receipt_time`, by the standby's clock.
    #[serde(with = "json::seconds")]
    pub message_age: Option<Duration>,
}

/// `pg_stat_wal_receiver.status`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReceiverStatus {
    /// `stopped`
    Stopped,
    /// `starting`
    Starting,
    /// `streaming`
    Streaming,
    /// `waiting`: the upstream has no more of its timeline, the startup process says what next.
    Waiting,
    /// `restarting`
    Restarting,
    /// `stopping`
    Stopping,
    /// A word that no version up to 18 has, or one that the role may not see.
    Other,
}

impl ReceiverStatus {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Stopped,
        Self::Starting,
        Self::Streaming,
        Self::Waiting,
        Self::Restarting,
        Self::Stopping,
        Self::Other,
    ];

    /// In the server's word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Stopped => "stopped",
            Self::Starting => "starting",
            Self::Streaming => "streaming",
            Self::Waiting => "waiting",
            Self::Restarting => "restarting",
            Self::Stopping => "stopping",
            Self::Other => "other",
        }
    }

    /// The reverse of [`Self::name`].
    pub fn parse(status: &str) -> Self {
        Self::ALL.into_iter().find(|it| it.name() == status).unwrap_or(Self::Other)
    }
}

/// All of a server that changes slowly. `None` in a part: that question failed or was not asked
/// of this version.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Details {
    /// Read before the first question.
    pub asked_at: Duration,
    /// Read after the last answer.
    pub answered_at: Duration,
    /// `synchronous_standby_names`, as it is set; empty if commits wait for nobody.
    pub synchronous_standby_names: Option<String>,
    /// `synchronous_commit`, as it is set for this role: with `off` and `local` commits wait for
    /// nobody either, unless a session says otherwise.
    pub synchronous_commit: Option<String>,
    /// Sessions whose commit waits for standbys; `None` if the role may not see it.
    pub sync_waits: Option<SyncWaits>,
    /// `pg_stat_replication`, every row; `None` too if the role may not see it.
    pub senders: Option<Vec<Sender>>,
    /// `pg_replication_slots`, every row.
    pub slots: Option<Vec<Slot>>,
    /// `pg_stat_database_conflicts`, summed over databases.
    pub conflicts: Option<Conflicts>,
    /// `pg_stat_archiver`.
    pub archiver: Option<Archiver>,
    /// What only a standby has. `None` on a primary too.
    pub standby: Option<StandbyDetails>,
}

/// Sessions whose `wait_event` is `SyncRep`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SyncWaits {
    /// So many.
    pub sessions: u32,
    /// The least `state_change`, by the server's clock. Only compared for equality: the statement
    /// may have run for long before it began to wait.
    pub oldest: Option<DateTime<Utc>>,
}

/// What only a standby has.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StandbyDetails {
    /// `recovery_min_apply_delay`: lag that is wanted.
    pub apply_delay: Option<Duration>,
    /// `sender_host:sender_port` of the receiver; `None` if none runs.
    pub upstream: Option<String>,
    /// The slot that the receiver uses.
    pub slot: Option<String>,
    /// What its upstream calls it in `pg_stat_replication`: the `application_name` of the receiver.
    pub application_name: Option<String>,
}

/// A row of `pg_stat_replication`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sender {
    /// `application_name`: of a standby its `cluster_name` or what `primary_conninfo` says.
    pub application_name: String,
    /// `client_addr`; `None` over a Unix socket.
    pub client_address: Option<String>,
    /// `state`: `startup`, `catchup`, `streaming`, `backup` or `stopping`.
    pub state: String,
    /// Whether it decodes: a logical walsender is connected to a database, so that its row in
    /// `pg_stat_activity` has a `datid`.
    pub logical: bool,
    /// `flush_lsn`.
    pub flush_lsn: Option<PgLsn>,
    /// `replay_lsn`: always `NULL` of `pg_receivewal` and its like, which replay nothing.
    pub replay_lsn: Option<PgLsn>,
    /// `write_lag`; `NULL` when there is nothing to measure *and* when nothing comes back.
    pub write_lag: Option<Duration>,
    /// `flush_lag`, likewise.
    pub flush_lag: Option<Duration>,
    /// `replay_lag`, likewise.
    pub replay_lag: Option<Duration>,
    /// `clock_timestamp() - reply_time`: not only an age, for `reply_time` is by the standby's
    /// clock.
    pub reply_age: Option<TimeDelta>,
    /// `sync_priority`: above 0 if commits may wait for it.
    pub sync_priority: u32,
    /// `sync_state`: `async`, `potential`, `sync` or `quorum`.
    pub sync_state: String,
    /// `pid`.
    pub pid: i32,
}

/// A row of `pg_replication_slots`.
#[derive(Clone, Debug, PartialEq)]
pub struct Slot {
    /// `slot_name`.
    pub name: String,
    /// `slot_type = 'logical'`.
    pub logical: bool,
    /// Whether somebody uses it.
    pub active: bool,
    /// What it holds back; `None` if it reserves nothing yet, or is lost.
    pub restart_lsn: Option<PgLsn>,
    /// `None` if the slot holds back nothing.
    pub wal_status: Option<WalStatus>,
    /// `safe_wal_size` in bytes, below 0 if the next checkpoint takes it; `None` if the slot is
    /// lost or `max_slot_wal_keep_size` sets no limit.
    pub safe_wal_bytes: Option<i64>,
    /// Time since `inactive_since`; `None` if it is active, or before version 17.
    pub inactive_for: Option<Duration>,
    /// The greater of `age(xmin)` and `age(catalog_xmin)`, in transactions.
    pub xmin_age: Option<u32>,
}

/// `pg_replication_slots.wal_status`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WalStatus {
    /// Within `max_wal_size`.
    Reserved,
    /// Beyond `max_wal_size`, still held.
    Extended,
    /// No longer held: the next checkpoint takes it.
    Unreserved,
    /// Gone. The slot is of no use.
    Lost,
}

impl WalStatus {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Reserved, Self::Extended, Self::Unreserved, Self::Lost];

    /// In the server's word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Reserved => "reserved",
            Self::Extended => "extended",
            Self::Unreserved => "unreserved",
            Self::Lost => "lost",
        }
    }

    /// The reverse of [`Self::name`].
    pub fn parse(status: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|it| it.name() == status)
    }
}

/// Queries that replay cancelled, by why. Counted since the statistics were reset.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Conflicts {
    /// `confl_tablespace`
    pub tablespace: u64,
    /// `confl_lock`
    pub lock: u64,
    /// `confl_snapshot`
    pub snapshot: u64,
    /// `confl_bufferpin`
    pub buffer_pin: u64,
    /// `confl_deadlock`
    pub deadlock: u64,
    /// `confl_active_logicalslot`; `None` before version 16.
    pub logical_slot: Option<u64>,
}

/// The archiver.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Archiver {
    /// `archived_count`
    pub archived: u64,
    /// `failed_count`
    pub failed: u64,
    /// Time since `last_archived_time`; `None` if nothing was archived.
    #[serde(with = "json::seconds")]
    pub last_archived_age: Option<Duration>,
    /// Time since `last_failed_time`; `None` if nothing failed.
    #[serde(with = "json::seconds")]
    pub last_failed_age: Option<Duration>,
}

/// When positions before the first sample were written: what a primary knows free of charge.
#[derive(Clone, Debug, PartialEq)]
pub struct Seed {
    /// Read before the question was sent.
    pub asked_at: Duration,
    /// Read after the answer had come.
    pub answered_at: Duration,
    /// Who answered.
    pub identity: Identity,
    /// Time since the server was started, `clock_timestamp() - pg_postmaster_start_time()`.
    pub up_for: TimeDelta,
    /// The timeline that it writes.
    pub timeline: u32,
    /// The name of the segment that it writes, `pg_walfile_name(pg_current_wal_lsn())`. Later
    /// names are files that wait to be used again, with times of long ago.
    pub current_segment: String,
    /// `pg_ls_waldir()`, every row.
    pub files: Vec<WalFileAge>,
    /// `pg_control_checkpoint()`.
    pub checkpoint: Option<CheckpointAge>,
}

/// A row of `pg_ls_waldir()`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WalFileAge {
    /// Its name.
    pub name: String,
    /// `clock_timestamp() - modification`. The server cuts `modification` to whole seconds, so
    /// it was modified up to a second later.
    pub age: TimeDelta,
}

/// The last checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CheckpointAge {
    /// `redo_lsn`
    pub redo_lsn: PgLsn,
    /// `timeline_id`
    pub timeline: u32,
    /// `clock_timestamp() - checkpoint_time`, which is when it began, cut to whole seconds.
    pub age: TimeDelta,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_insert_position_at_the_start_of_a_page_is_after_its_header() {
        const SEGMENT: u64 = 16 << 20;
        for (lsn, expected) in [
            (3 * SEGMENT + 40, 3 * SEGMENT),
            (3 * SEGMENT + 24, 3 * SEGMENT + 24),
            (3 * SEGMENT + 48, 3 * SEGMENT + 48),
            (3 * SEGMENT + PAGE_BYTES + 24, 3 * SEGMENT + PAGE_BYTES),
            (3 * SEGMENT + PAGE_BYTES + 40, 3 * SEGMENT + PAGE_BYTES + 40),
            (3 * SEGMENT + PAGE_BYTES, 3 * SEGMENT + PAGE_BYTES),
        ] {
            assert_eq!(before_page_header(lsn, SEGMENT), expected, "{lsn:X}");
        }
    }
}
