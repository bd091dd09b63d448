//! What a backup is: the commit object that makes it exist.

use std::fmt;
use std::str::FromStr;

use chrono::{DateTime, NaiveDateTime, SubsecRound, Utc};
use serde::{Deserialize, Serialize};
use shared::pg::wal::segment_name;
use thiserror::Error;
use tokio_postgres::types::PgLsn;

use crate::upload::Written;

/// The format of [`Commit`]; a reader refuses a later one.
pub const COMMIT_FORMAT: u32 = 1;

/// The identity of a backup: `<UTC time>-<timeline>-<start LSN>`, so that names sort by time.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct BackupId(String);

impl BackupId {
    /// Names a backup that started then and there.
    pub fn new(started_at: DateTime<Utc>, timeline: u32, start_lsn: PgLsn) -> Self {
        let time = started_at.trunc_subsecs(0).format("%Y%m%dT%H%M%SZ");
        Self(format!("{time}-{timeline:08X}-{:016X}", u64::from(start_lsn)))
    }

    /// The name as it stands in the repository.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// When it began, by the agent's clock, as the name says; `None` if that is no time.
    pub fn started_at(&self) -> Option<DateTime<Utc>> {
        let time = self.0.split('-').next()?;
        Some(NaiveDateTime::parse_from_str(time, "%Y%m%dT%H%M%SZ").ok()?.and_utc())
    }

    /// The timeline and the position at which the backup starts, as the name says.
    pub fn start(&self) -> (u32, PgLsn) {
        let number = |part: Option<&str>| part.and_then(|it| u64::from_str_radix(it, 16).ok());
        let mut parts = self.0.split('-').skip(1);
        let timeline = number(parts.next()).and_then(|it| it.try_into().ok());
        (timeline.unwrap_or(0), number(parts.next()).unwrap_or(0).into())
    }

    /// The name of one of the backup's objects.
    pub fn object(&self, part: &str) -> String {
        format!("base/{}/{part}", self.0)
    }
}

impl fmt::Display for BackupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What is no backup identity.
#[derive(Debug, Error)]
#[error("{0:?} is no backup; `backup-agent list` shows them")]
pub struct NotABackupId(String);

impl FromStr for BackupId {
    type Err = NotABackupId;

    fn from_str(text: &str) -> Result<Self, NotABackupId> {
        let parts: Vec<_> = text.split('-').collect();
        let digits =
            |part: &str, len| part.len() == len && part.bytes().all(|b| b.is_ascii_hexdigit());
        match parts.as_slice() {
            [time, timeline, lsn]
                if time.len() == 16
                    && time.bytes().all(|b| b.is_ascii_digit() || b == b'T' || b == b'Z')
                    && digits(timeline, 8)
                    && digits(lsn, 16) =>
            {
                Ok(Self(text.to_owned()))
            }
            _ => Err(NotABackupId(text.to_owned())),
        }
    }
}

impl TryFrom<String> for BackupId {
    type Error = NotABackupId;

    fn try_from(text: String) -> Result<Self, NotABackupId> {
        text.parse()
    }
}

impl From<BackupId> for String {
    fn from(id: BackupId) -> Self {
        id.0
    }
}

/// One object of a backup, as it was written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ObjectRecord {
    /// Bytes in the store.
    pub object_bytes: u64,
    /// Bytes before compression.
    pub plain_bytes: u64,
    /// The salt in its header: tells it from any other object, an older one of the same name too.
    #[serde(with = "hex::serde")]
    pub salt: [u8; 32],
}

impl From<Written> for ObjectRecord {
    fn from(written: Written) -> Self {
        let Written { salt, plain_bytes, object_bytes } = written;
        Self { object_bytes, plain_bytes, salt }
    }
}

/// One tar archive of a backup.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Archive {
    /// The tablespace's object id; `None` for the data directory.
    pub tablespace_oid: Option<u32>,
    /// Where the tablespace lay on the server; `None` for the data directory.
    pub location: Option<String>,
    /// Where the archive starts in the backup's stream, in bytes.
    pub offset: u64,
}

/// Why a backup is not to be trusted without a look.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Suspicion {
    /// The server's words at the end.
    pub reason: String,
    /// Its warnings, one per damaged page at first.
    pub warnings: Vec<String>,
}

/// What makes a backup exist: written last, after everything it names.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Commit {
    /// [`COMMIT_FORMAT`].
    pub format: u32,
    /// The backup.
    pub backup_id: BackupId,
    /// The group it is of.
    pub group: u32,
    /// The database cluster it is of.
    pub system_identifier: u64,
    /// The server it was read from.
    pub node: String,
    /// Whether that was a standby.
    pub from_standby: bool,
    /// `server_version_num`.
    pub server_version_num: u32,
    /// `wal_segment_size`.
    pub wal_segment_bytes: u64,
    /// When it began, by the agent's clock.
    pub started_at: DateTime<Utc>,
    /// When it was complete, by the agent's clock.
    pub finished_at: DateTime<Utc>,
    /// When it was complete, by the primary's clock, which stamps commits; `None` if it did not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub server_finished_at: Option<DateTime<Utc>>,
    /// The timeline, the same at start and end.
    pub timeline: u32,
    /// Where the WAL it needs starts.
    #[serde(with = "lsn")]
    pub start_lsn: PgLsn,
    /// Where the WAL it needs ends, exclusive: the earliest position a restore of it can reach.
    #[serde(with = "lsn")]
    pub end_lsn: PgLsn,
    /// Set when the server found pages with wrong checksums.
    pub suspect: Option<Suspicion>,
    /// The archives, in the order of the stream.
    pub archives: Vec<Archive>,
    /// Plaintext bytes of each chunk.
    pub chunk_bytes: u32,
    /// The objects that hold the stream, `part-00000` first.
    pub parts: Vec<ObjectRecord>,
    /// The server's `backup_manifest`.
    pub manifest: ObjectRecord,
    /// The table of files.
    pub files: ObjectRecord,
    /// How many files there are.
    pub file_count: u64,
    /// The backup before this one that the repository listed, so that one that vanished without a
    /// tombstone is noticed.
    pub previous: Option<BackupId>,
}

impl Commit {
    /// The earliest time that a restore of it can reach, by whichever clock: a commit that is in it
    /// must not count as one after that.
    pub fn reaches_from(&self) -> DateTime<Utc> {
        self.server_finished_at.map_or(self.finished_at, |at| at.max(self.finished_at))
    }

    /// Bytes of the cluster: the tar stream.
    pub fn plain_bytes(&self) -> u64 {
        self.parts.iter().map(|part| part.plain_bytes).sum()
    }

    /// Bytes in the store.
    pub fn object_bytes(&self) -> u64 {
        let parts: u64 = self.parts.iter().map(|part| part.object_bytes).sum();
        parts + self.manifest.object_bytes + self.files.object_bytes
    }

    /// The numbers of the first and the last WAL segment that the backup needs.
    pub fn segments(&self) -> std::ops::RangeInclusive<u64> {
        let last = u64::from(self.end_lsn).saturating_sub(1).max(u64::from(self.start_lsn));
        u64::from(self.start_lsn) / self.wal_segment_bytes..=last / self.wal_segment_bytes
    }

    /// The name of the first WAL segment that the backup needs.
    pub fn first_segment(&self) -> String {
        segment_name(self.timeline, self.start_lsn, self.wal_segment_bytes)
    }
}

/// The name of part `number` within a backup.
pub fn part_name(number: usize) -> String {
    format!("part-{number:05}")
}

/// An LSN as PostgreSQL prints it.
pub mod lsn {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};
    use tokio_postgres::types::PgLsn;

    /// Writes `0/16B9188`.
    ///
    /// # Errors
    ///
    /// As the serializer.
    pub fn serialize<S: Serializer>(lsn: &PgLsn, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(lsn)
    }

    /// Reads `0/16B9188`.
    ///
    /// # Errors
    ///
    /// What is no LSN.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<PgLsn, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(|_| D::Error::custom(format!("{text:?} is no LSN")))
    }
}
