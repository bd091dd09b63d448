//! What is decided, ready to be rendered.
//!
//! Unknown is `None` or a state, never 0: what renders this leaves the sample out. All ages are
//! those of the moment the view was made for, see [`crate::group::Group::view`], and so is the upper
//! bound of a lag; the rest of it is that of the moment when the standby was last asked.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio_postgres::types::PgLsn;

use crate::json;
use crate::observation::{Archiver, Conflicts, Receiver, ReplayPause, WalStatus};

/// Whether `pg_rewind` can help a standby on timeline `of` that has WAL which nobody on timeline `line`
/// has. On the same timeline it finds nothing to do.
pub fn can_rewind(of: Option<u32>, line: Option<u32>) -> bool {
    of.is_none() || of != line
}

/// What is known about one group.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GroupView {
    /// The group's number.
    pub group: u32,
    /// Its nodes by name, with those that left the topology a while ago.
    pub nodes: Vec<NodeView>,
    /// How many nodes say they are primaries, and said so just now.
    pub primaries: u32,
    /// The primary whose WAL the lag is measured against; `None` if none is known, or if two
    /// write the same timeline.
    pub primary: Option<String>,
    /// The standby whose WAL the lag is measured against, in a group whose primary is elsewhere:
    /// the others are behind it by so much, and behind the primary by more.
    pub standby_leader: Option<String>,
    /// Time since one of these two, or the last one there was, told its position. `None` if none
    /// ever did.
    #[serde(with = "json::seconds")]
    pub primary_sample_age: Option<Duration>,
    /// The number of the cluster that the primary belongs to.
    pub system_identifier: Option<u64>,
    /// The timeline that the lag is measured on.
    pub timeline: Option<u32>,
    /// Whether more than one primary takes writes.
    pub split_brain: SplitBrain,
    /// Whether commits that wait for standbys go on.
    pub quorum: Quorum,
    /// Sessions of the primary whose commit waits for standbys, when it was last asked; `None` if
    /// the role may not see it.
    pub sync_waiting: Option<u32>,
    /// For so long the same session has surely been one of them; 0 if none was seen twice.
    #[serde(with = "json::seconds")]
    pub sync_wait: Option<Duration>,
    /// What would be lost if the primary were lost now.
    pub rpo: Rpo,
    /// Who should be promoted if the last primary is lost. `None` if a standby that answers does not
    /// tell what it has.
    pub most_wal: Option<MostWal>,
    /// WAL written since this process began to watch, in bytes: grows only, over failovers too.
    pub wal_written_bytes: u64,
    /// WAL written per second, over the last minute.
    pub wal_bytes_per_second: Option<f64>,
    /// How far back positions have an age.
    #[serde(with = "json::seconds")]
    pub history: Option<Duration>,
    /// How many positions are kept for that.
    pub history_entries: usize,
}

/// What is known about one node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NodeView {
    /// Its name.
    pub name: String,
    /// Whether the topology still has it.
    pub is_member: bool,
    /// Whether it was asked lately, and answered. `None` before the first time.
    pub up: Option<bool>,
    /// Whether the last new connection was made. `None` before the first.
    pub fresh_connect: Option<bool>,
    /// Time since it answered; `None` if it never did.
    #[serde(with = "json::seconds")]
    pub last_success_age: Option<Duration>,
    /// Time from question to answer, the last time.
    #[serde(with = "json::seconds")]
    pub round_trip: Option<Duration>,
    /// What it said of itself; `None` if that is too long ago.
    pub state: Option<NodeState>,
    /// How far it is behind; `None` of a primary.
    pub lag: Option<LagView>,
    /// What changes slowly; `None` if it never said so, or too long ago.
    pub details: Option<DetailsView>,
}

/// What a node said of itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NodeState {
    /// `primary` or `standby`.
    pub role: Role,
    /// The number of its cluster.
    pub system_identifier: u64,
    /// `server_version_num`: 170002 is 17.2.
    pub server_version: u32,
    /// The timeline that it writes, or the newest that it is known to have replayed or received.
    pub timeline: Option<u32>,
    /// Of a primary how far WAL is on its disk, of a standby how far it is replayed.
    #[serde(with = "json::lsn")]
    pub wal_lsn: Option<PgLsn>,
    /// Of a standby how far streamed WAL is on its disk.
    #[serde(with = "json::lsn")]
    pub receive_lsn: Option<PgLsn>,
    /// Of a standby whether replay is paused.
    pub replay_pause: Option<ReplayPause>,
    /// Of a standby its receiver; `None` if none runs.
    pub receiver: Option<Receiver>,
    /// Its wall clock less ours.
    pub clock: Clock,
}

/// What a server is in its cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Not in recovery.
    Primary,
    /// In recovery.
    Standby,
}

/// The difference of two wall clocks.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Clock {
    /// The server's less this host's, in seconds.
    pub ahead_seconds: f64,
    /// The true difference is no further from that, in seconds.
    pub error_seconds: f64,
}

/// How far a standby is behind.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LagView {
    /// What the numbers mean, or why there are none.
    pub state: LagState,
    /// The age of the oldest WAL of the primary that is not replayed here: what queries miss.
    pub replay: Lag,
    /// The age of the oldest WAL of the primary that is not on this disk: what would be lost.
    pub receive: Lag,
    /// Bytes of WAL that are not replayed here.
    pub replay_bytes: Option<u64>,
    /// Bytes of WAL that are not on this disk.
    pub receive_bytes: Option<u64>,
    /// When it will have caught up.
    pub catch_up: CatchUp,
}

/// A lag, as far as it is known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lag {
    /// It is not less.
    #[serde(with = "json::seconds")]
    pub lower: Option<Duration>,
    /// It probably is this: between `lower` and `upper`.
    #[serde(with = "json::seconds")]
    pub estimate: Option<Duration>,
    /// It is not more.
    #[serde(with = "json::seconds")]
    pub upper: Option<Duration>,
}

/// What a lag's numbers mean, or why there are none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LagState {
    /// It is behind, and by how much is known.
    Ok,
    /// It has all that the primary was last seen to have: 0, `upper` says how sure.
    CaughtUp,
    /// It is further behind than positions have an age: only `lower`.
    BeyondHistory,
    /// It has all that the primary was last seen to have, but that is too long ago: only `upper`.
    /// Or no primary was ever seen, or it follows another one, or two write the same timeline: no
    /// number.
    PrimaryUnknown,
    /// It has WAL that is not part of the primary's history: no number, it must be rebuilt.
    Diverged,
    /// It belongs to another cluster: no number.
    OtherCluster,
    /// It did not answer the last question: no number.
    Unreachable,
    /// It has not been asked yet, has replayed nothing yet, or its history cannot be told from
    /// the primary's: no number. So it is with one that had WAL of its own and was restarted, until
    /// it replays what it streams or is on a newer timeline.
    Unknown,
}

impl LagState {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Ok,
        Self::CaughtUp,
        Self::BeyondHistory,
        Self::PrimaryUnknown,
        Self::Diverged,
        Self::OtherCluster,
        Self::Unreachable,
        Self::Unknown,
    ];

    /// As it stands in a label.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::CaughtUp => "caught_up",
            Self::BeyondHistory => "beyond_history",
            Self::PrimaryUnknown => "primary_unknown",
            Self::Diverged => "diverged",
            Self::OtherCluster => "other_cluster",
            Self::Unreachable => "unreachable",
            Self::Unknown => "unknown",
        }
    }
}

/// When a standby will have caught up, at the pace of the last quarter of a minute.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CatchUp {
    /// Its pace is not known yet, or the lag is not.
    Unknown,
    /// It has.
    Done,
    /// After this time.
    In(Duration),
    /// Not at this pace: the primary writes as fast as it replays, or faster.
    Never,
}

/// What changes slowly.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DetailsView {
    /// Time since it was told.
    #[serde(with = "json::seconds")]
    pub age: Option<Duration>,
    /// Who is connected to receive WAL, by name; each name once.
    pub senders: Option<Vec<SenderView>>,
    /// Its slots.
    pub slots: Option<Vec<SlotView>>,
    /// Queries that replay cancelled.
    pub conflicts: Option<Conflicts>,
    /// The archiver.
    pub archiver: Option<Archiver>,
    /// `recovery_min_apply_delay`: lag that is wanted.
    #[serde(with = "json::seconds")]
    pub apply_delay: Option<Duration>,
    /// `host:port` that it receives from.
    pub upstream: Option<String>,
    /// The slot that it receives by.
    pub upstream_slot: Option<String>,
    /// The name by which its upstream knows it.
    pub application_name: Option<String>,
}

/// Somebody who is connected to receive WAL.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SenderView {
    /// Its `application_name`, with `@` and its address where several have that name,
    /// and with `/` and the process where several have both.
    pub name: String,
    /// What it is.
    pub kind: SenderKind,
    /// `pg_stat_replication.state`.
    pub state: String,
    /// `sync_state`: `async`, `potential`, `sync` or `quorum`.
    pub sync_state: String,
    /// `write_lag`; `None` is not 0.
    #[serde(with = "json::seconds")]
    pub write_lag: Option<Duration>,
    /// `flush_lag`; `None` is not 0.
    #[serde(with = "json::seconds")]
    pub flush_lag: Option<Duration>,
    /// `replay_lag`; `None` is not 0.
    #[serde(with = "json::seconds")]
    pub replay_lag: Option<Duration>,
    /// Seconds since its last reply, and by how much its clock is behind the server's.
    pub reply_age_seconds: Option<f64>,
}

/// What is at the other end of a walsender.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SenderKind {
    /// A server that replays.
    Standby,
    /// It stores WAL and replays none: `pg_receivewal`, a backup agent.
    Receiver,
    /// It decodes: a subscription.
    Logical,
    /// It takes a base backup.
    Backup,
    /// It has only just connected.
    Starting,
}

impl SenderKind {
    /// As it stands in a label.
    pub fn name(self) -> &'static str {
        match self {
            Self::Standby => "standby",
            Self::Receiver => "receiver",
            Self::Logical => "logical",
            Self::Backup => "backup",
            Self::Starting => "starting",
        }
    }
}

/// A replication slot.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SlotView {
    /// Its name.
    pub name: String,
    /// Whether it is a logical slot.
    pub logical: bool,
    /// Whether somebody uses it.
    pub active: bool,
    /// WAL that it holds back, in bytes.
    pub retained_bytes: Option<u64>,
    /// WAL that may still be written before it is lost, in bytes; `None` if there is no limit.
    pub safe_wal_bytes: Option<u64>,
    /// Its state; `None` if it holds back nothing.
    pub wal_status: Option<WalStatus>,
    /// How long nobody has used it.
    #[serde(with = "json::seconds")]
    pub inactive_for: Option<Duration>,
    /// How long it lasts.
    pub runway: Runway,
    /// How old the oldest transaction is whose rows it keeps from vacuum.
    pub xmin_age: Option<u32>,
}

/// How long a slot lasts if what it holds back goes on to grow as it did in the last minutes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Runway {
    /// There is no limit but the disk, or it was not watched for long enough.
    Unknown,
    /// For this time. 0: it is lost, or the next checkpoint takes it.
    Lasts(Duration),
    /// For ever: nothing is written, or somebody moves it on as fast.
    Endless,
}

/// Whether more than one primary takes writes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "grade", content = "nodes")]
pub enum SplitBrain {
    /// No.
    #[default]
    No,
    /// These were primaries at one and the same moment.
    Candidate(Vec<String>),
    /// And each of them has written WAL since.
    Confirmed(Vec<String>),
}

/// Whether as many standbys are connected as commits wait for, and none is seen to hang.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Quorum {
    /// The primary was not asked yet, does not answer or does not show its walsenders to this role,
    /// its setting does not read, or it depends on a connection that may be dead.
    #[default]
    Unknown,
    /// Commits wait for nobody.
    NotWanted,
    /// There are enough.
    Met(SyncCount),
    /// There are too few, or a session was seen to wait all the same: commits hang.
    Missed(SyncCount),
}

/// Standbys that commits wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SyncCount {
    /// So many must have it.
    pub wanted: u32,
    /// So many are connected that may count.
    pub present: u32,
}

/// The standby that has most of the primary's WAL, of those that answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MostWal {
    /// Its name.
    pub standby: String,
    /// What it lacks of the WAL that the primary was last seen to have, in bytes.
    pub lacks_bytes: u64,
}

/// What would be lost if the primary were lost now and the best standby that answers were
/// promoted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rpo {
    /// The primary's position is not known, or not yet those of the standbys.
    #[default]
    Unknown,
    /// Everything: no standby answers that has this history.
    NoStandby,
    /// What this standby has not received: the best of those that answer.
    Loss {
        /// Its name.
        standby: String,
        /// The age of the oldest lost WAL. Without `lower` while it cannot be told of a standby that
        /// answers whether it has more.
        lag: Lag,
        /// How much WAL; `None` if the primary's position is too old.
        bytes: Option<u64>,
    },
}
