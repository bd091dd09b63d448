//! The keys of `backup-agent.toml`.

use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::thread::available_parallelism;
use std::time::Duration;

use serde::Deserialize;
use shared::config::{Check, Problems};
use shared::etcd::EtcdConfig;
use shared::pg::{Node, PostgresConfig};
use shared::schedule::Schedule;
use shared::store::StoreConfig;
use shared::topology::{PatroniConfig, TopologyConfig};

use crate::container::{CHUNK_BYTES_MAX, Kind};
use crate::keys::EncryptionConfig;
use crate::resume::OnDivergence;
use crate::retention::Retention;
use crate::upload::UploadSettings;

/// S3 refuses multipart parts smaller than this, except the last.
/// Source: Amazon S3 User Guide, "Amazon S3 multipart upload limits".
const PART_BYTES_MIN: usize = 5 << 20;
/// S3 refuses larger parts. Same source.
const PART_BYTES_MAX: usize = 5 << 30;
/// S3 refuses a multipart upload of more parts than this. Same source.
const PARTS_MAX: u64 = 10_000;
/// 15 requests at once fill 10 Gb/s, so these fill 100 Gb/s; each takes a part of memory.
/// Source: Amazon S3 User Guide, "Performance design patterns for Amazon S3".
const UPLOADS_MAX: usize = 150;
/// No more chunks are sealed at once, whatever is set. Source: tokio, `max_blocking_threads`.
const WORKERS_MAX: usize = 512;
/// What `MAX_RATE` of `BASE_BACKUP` allows, in kilobytes a second.
/// Source: `MAX_RATE_LOWER` and `MAX_RATE_UPPER` in `src/backend/backup/basebackup.c`.
const RATE_KILOBYTES: std::ops::RangeInclusive<u64> = 32..=1_048_576;
/// A folder's name has no more bytes in most file systems; and a key of S3 no more than 1024, of which
/// the prefix and what we add take the rest.
const CLUSTER_BYTES_MAX: usize = 255;
/// 1 GiB of segments of 1 MiB: more never lies ready for a recovery.
const PREFETCH_SEGMENTS_MAX: u32 = 1024;

/// The configuration of the backup agent.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The name of the cluster: a folder of the repository and a label of the metrics.
    pub cluster: String,
    /// Where `/livez`, `/readyz`, `/metrics` and `/status` answer.
    #[serde(default = "default_admin_address")]
    pub admin_address: SocketAddr,
    /// How long a stop waits; below the service's `stop_grace_period`.
    #[serde(default = "default_grace", with = "humantime_serde")]
    pub shutdown_grace: Duration,
    /// How the servers are reached.
    pub postgres: PostgresConfig,
    /// The servers, where they are listed. `wal-push` and `wal-fetch` need none.
    #[serde(default)]
    pub nodes: Vec<Node>,
    /// Where Patroni keeps what it knows, and where replicas of this agent share out the groups.
    pub etcd: Option<EtcdConfig>,
    /// The servers, where Patroni knows them.
    pub patroni: Option<PatroniConfig>,
    /// Where backups are stored.
    pub repository: StoreConfig,
    /// The S3 storage class of each kind of object; the bucket's default where none is named.
    #[serde(default)]
    pub storage_class: StorageClass,
    /// The keys.
    pub encryption: EncryptionConfig,
    /// How base backups are taken.
    #[serde(default)]
    pub backup: BackupConfig,
    /// How WAL is stored.
    #[serde(default)]
    pub wal: WalConfig,
    /// What is kept.
    #[serde(default)]
    pub retention: Retention,
}

/// S3 storage classes.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StorageClass {
    /// Base backups: large, read rarely.
    pub base: Option<String>,
    /// WAL: many, short-lived.
    pub wal: Option<String>,
    /// What describes the others: small, read often.
    pub catalog: Option<String>,
}

impl StorageClass {
    /// The class of a kind of object.
    pub fn of(&self, kind: Kind) -> Option<&str> {
        let class = match kind {
            Kind::Part => &self.base,
            Kind::Wal => &self.wal,
            Kind::Manifest
            | Kind::Files
            | Kind::Commit
            | Kind::History
            | Kind::Tombstone
            | Kind::Gap
            | Kind::Begun
            | Kind::Followed
            | Kind::Probe => &self.catalog,
        };
        class.as_deref()
    }
}

/// Which server a base backup is read from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Prefer {
    /// The standby that is least behind; the primary if none is fit.
    #[default]
    Standby,
    /// The primary only.
    Primary,
}

/// How base backups are taken.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BackupConfig {
    /// When `run` takes one; never by itself if left out.
    pub schedule: Option<Schedule>,
    /// Which server is read.
    pub prefer: Prefer,
    /// A standby further behind than this is not read, in bytes of WAL.
    pub standby_lag_bytes_max: u64,
    /// Checkpoint at once: starts sooner, and is a burst of writes.
    pub fast_checkpoint: bool,
    /// The most the server reads in a second, in bytes; no limit if left out.
    pub rate_bytes_max: Option<u64>,
    /// zstd's level, 1 to 19.
    pub compression_level: i32,
    /// Chunks compressed and encrypted at once; as many as there are cores if left out.
    pub workers: Option<NonZeroUsize>,
    /// Bytes of one multipart part.
    pub part_bytes: usize,
    /// Parts uploaded at once.
    pub uploads: NonZeroUsize,
    /// Bytes of tar stream in one object, before compression.
    pub object_bytes: u64,
    /// How long the server may be silent before the backup is given up.
    #[serde(with = "humantime_serde")]
    pub stall_timeout: Duration,
    /// How long to wait until the WAL that the backup needs is in the repository.
    #[serde(with = "humantime_serde")]
    pub wal_timeout: Duration,
}

impl Default for BackupConfig {
    fn default() -> Self {
        Self {
            schedule: None,
            prefer: Prefer::Standby,
            standby_lag_bytes_max: 256 << 20,
            fast_checkpoint: true,
            rate_bytes_max: None,
            compression_level: 1,
            workers: None,
            part_bytes: 16 << 20,
            uploads: NonZeroUsize::MIN.saturating_add(3),
            object_bytes: 1 << 30,
            stall_timeout: Duration::from_mins(10),
            wal_timeout: Duration::from_mins(10),
        }
    }
}

/// How WAL is stored.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct WalConfig {
    /// The group whose WAL `wal-push` and `wal-fetch` handle.
    pub group: u32,
    /// zstd's level, 1 to 19.
    pub compression_level: i32,
    /// Whether `run` follows each group's primary and stores WAL as it is written.
    pub receive: bool,
    /// The replication slot, and the name of the receiver's connection: what
    /// `synchronous_standby_names` lists if commits are to wait for the repository.
    pub slot: String,
    /// The longest that WAL waits before it is shipped. At once if commits wait for it.
    #[serde(with = "humantime_serde")]
    pub ship_interval: Duration,
    /// How much WAL may wait before it is shipped, in bytes.
    pub ship_bytes: u64,
    /// What is done about a primary that lacks WAL which is stored.
    pub on_divergence: OnDivergence,
    /// How often a record is written to each primary, to see it arrive in the repository; never
    /// if it is 0.
    #[serde(with = "humantime_serde")]
    pub heartbeat: Duration,
    /// The room that there is for `pg_wal` on each server, in bytes. If it is left out, and nothing else
    /// bounds it, three times `max_wal_size` is told.
    pub pg_wal_bytes_max: Option<u64>,
    /// How many segments are fetched ahead of a recovery; none if it is 0. Fewer if they are large.
    pub prefetch_segments: u32,
}

impl Default for WalConfig {
    fn default() -> Self {
        Self {
            group: 0,
            compression_level: 1,
            receive: true,
            slot: "pgmesh_backup".to_owned(),
            ship_interval: Duration::from_secs(1),
            ship_bytes: 1 << 20,
            on_divergence: OnDivergence::Follow,
            heartbeat: Duration::from_mins(1),
            pg_wal_bytes_max: None,
            prefetch_segments: 16,
        }
    }
}

impl WalConfig {
    fn check(&self, problems: &mut Problems) {
        if !(1..=19).contains(&self.compression_level) {
            problems.add("compression_level", "must be 1 to 19");
        }
        // Source: `ReplicationSlotValidateName` in `slot.c`; `NAMEDATALEN`.
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
        if !(1..=63).contains(&self.slot.len()) || !self.slot.chars().all(plain) {
            problems.add("slot", "must be 1 to 63 lower-case letters, digits and _");
        }
        if self.ship_interval.is_zero() {
            problems.add("ship_interval", "must be longer than 0s");
        }
        if self.ship_bytes == 0 {
            problems.add("ship_bytes", "must be above 0");
        }
        if self.prefetch_segments > PREFETCH_SEGMENTS_MAX {
            problems.add("prefetch_segments", format!("must be 0 to {PREFETCH_SEGMENTS_MAX}"));
        }
        if !self.heartbeat.is_zero() && self.heartbeat < Duration::from_secs(1) {
            problems.add("heartbeat", "must be 0s (never) or 1s at least");
        }
    }
}

fn default_admin_address() -> SocketAddr {
    SocketAddr::from(([0, 0, 0, 0], 9632))
}

fn default_grace() -> Duration {
    Duration::from_secs(20)
}

/// Plaintext bytes of one chunk of a base backup: large enough that the ratio does not suffer,
/// small enough that a single file is cheap to fetch.
const CHUNK_BYTES: u32 = 1 << 20;

impl BackupConfig {
    /// How the objects of a backup are written.
    pub fn upload(&self) -> UploadSettings {
        let cores = available_parallelism().map_or(1, NonZeroUsize::get);
        UploadSettings {
            level: self.compression_level,
            chunk_bytes: CHUNK_BYTES,
            part_bytes: self.part_bytes,
            uploads: self.uploads.get(),
            workers: self.workers.map_or(cores, NonZeroUsize::get),
        }
    }

    /// The server's `MAX_RATE`, in kilobytes a second.
    pub fn rate_kilobytes_max(&self) -> Option<u32> {
        self.rate_bytes_max.and_then(|bytes| u32::try_from(bytes >> 10).ok())
    }

    fn check(&self, problems: &mut Problems) {
        if !(1..=19).contains(&self.compression_level) {
            problems.add("compression_level", "must be 1 to 19");
        }
        if self.part_bytes < PART_BYTES_MIN {
            let problem =
                format!("{} is below the S3 minimum of {PART_BYTES_MIN}", self.part_bytes);
            problems.add("part_bytes", problem);
        }
        if self.part_bytes > PART_BYTES_MAX {
            let problem =
                format!("{} is above the S3 maximum of {PART_BYTES_MAX}", self.part_bytes);
            problems.add("part_bytes", problem);
        }
        for (key, value, most) in [
            ("uploads", self.uploads.get(), UPLOADS_MAX),
            ("workers", self.workers.map_or(1, NonZeroUsize::get), WORKERS_MAX),
        ] {
            if value > most {
                problems.add(key, format!("must be 1 to {most}"));
            }
        }
        if self.object_bytes < u64::from(CHUNK_BYTES_MAX) {
            problems.add("object_bytes", format!("must be at least {CHUNK_BYTES_MAX}"));
        }
        // Sealed chunks of incompressible data are a little larger than the data.
        let needed = (self.object_bytes + self.object_bytes / 1024).div_ceil(PARTS_MAX);
        if (self.part_bytes as u64) < needed {
            let problem = format!(
                "{PARTS_MAX} parts of {} bytes cannot hold object_bytes; use at least {needed}",
                self.part_bytes
            );
            problems.add("part_bytes", problem);
        }
        if let Some(rate) = self.rate_bytes_max
            && !RATE_KILOBYTES.contains(&(rate >> 10))
        {
            problems.add("rate_bytes_max", "must be 32768 to 1073741824, as the server's MAX_RATE");
        }
        for (key, timeout) in
            [("stall_timeout", self.stall_timeout), ("wal_timeout", self.wal_timeout)]
        {
            if timeout.is_zero() {
                problems.add(key, "must be longer than 0s");
            }
        }
    }
}

impl Config {
    /// Which servers there are.
    pub fn topology(&self) -> TopologyConfig<'_> {
        let Self { etcd, patroni, nodes, .. } = self;
        TopologyConfig { etcd: etcd.as_ref(), patroni: patroni.as_ref(), nodes }
    }

    /// Whether any servers are configured: a database container that only archives has none.
    pub fn has_servers(&self) -> bool {
        self.patroni.is_some() || !self.nodes.is_empty()
    }
}

impl Check for Config {
    fn check(&self, problems: &mut Problems) {
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        if self.cluster.is_empty() || !self.cluster.chars().all(plain) {
            problems.add("cluster", "must be letters, digits, - and _: it is a folder's name");
        }
        if self.cluster.len() > CLUSTER_BYTES_MAX {
            let len = self.cluster.len();
            problems.add("cluster", format!("{len} bytes; must be at most {CLUSTER_BYTES_MAX}"));
        }
        problems.within("postgres", |problems| self.postgres.check(problems));
        // The database container's own configuration, for `wal-push` alone, lists none.
        if self.has_servers() {
            self.topology().check(problems);
        }
        self.repository.check(problems);
        self.encryption.check(problems);
        problems.within("backup", |problems| self.backup.check(problems));
        problems.within("wal", |problems| self.wal.check(problems));
        problems.within("retention", |problems| self.retention.check(problems));
    }
}
