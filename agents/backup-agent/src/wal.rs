//! WAL in the repository: what is there, what may be stored, and what a restore can reach.

mod absence;
mod branch;
pub(crate) mod conflict;
mod contents;
#[cfg(test)]
pub(crate) mod example;
pub(crate) mod followed;
pub mod growing;
mod map;
pub mod newest;
mod packed;
pub mod piece;
mod put;
pub mod ranges;
mod rekey;
pub mod remnant;
mod timelines;
mod times;

use std::collections::BTreeMap;
use std::io;

use bytes::Bytes;
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use shared::pg::wal::{
    HistoryEntry, SEGMENT_BYTES_MIN, WalFile, WalFileError, WalHeader, WalHeaderError,
    parse_history,
};
use shared::store::StoreErrorKind;
use thiserror::Error;
use tokio_postgres::types::PgLsn;

use crate::container::{ContainerError, Kind, open_each};
use crate::manifest::lsn;
use crate::repository::{Place, RepositoryError};

pub use absence::{Absence, absence};
pub use map::{Reach, Then, WalMap};
pub use packed::Packed;
pub use put::{Stored, push, store, store_and_compare};
pub use rekey::{locked, readable, rekey, tag};
pub use timelines::{LeftBehind, Moment, Rivals};

/// Hexadecimal digits of the content's hash in an object's name: 64 bits. It makes names
/// unique by content, so that a store that ignores `If-None-Match` cannot lose one of two.
const HASH_DIGITS: usize = 16;

/// The longest object of WAL: the largest `wal_segment_size`, not shrunk at all, and what seals it.
const OBJECT_BYTES_MAX: u64 = (1 << 30) + (1 << 20);
/// The longest history file that is taken: a line for each promotion there ever was.
const HISTORY_BYTES_MAX: usize = 1 << 20;
/// How often a growing segment is looked at anew because a piece of it was replaced meanwhile.
pub(crate) const LISTS_MAX: usize = 100;

/// Why a WAL file was not stored or not given.
#[derive(Debug, Error)]
pub enum WalError {
    /// The file cannot be read.
    #[error("read {name}")]
    Read {
        /// The file.
        name: String,
        /// What the operating system said.
        source: io::Error,
    },
    /// The file cannot be written.
    #[error("write {name}")]
    Write {
        /// The file.
        name: String,
        /// What the operating system said.
        source: io::Error,
    },
    /// The name is not PostgreSQL's.
    #[error(transparent)]
    Name(#[from] WalFileError),
    /// The content is not what the name says.
    #[error("refuse {name}")]
    Header {
        /// The file.
        name: String,
        /// What differs.
        source: WalHeaderError,
    },
    /// Not as long as a segment.
    #[error("refuse {name}: it has {found} bytes, a segment has {expected}")]
    Length {
        /// The file.
        name: String,
        /// What a segment has.
        expected: u64,
        /// What it has.
        found: u64,
    },
    /// A segment begins on another timeline than its name says, and nothing says that this is right.
    #[error("refuse {name}: it begins with WAL of timeline {found}, and {reason}")]
    Branch {
        /// The file.
        name: String,
        /// The timeline in its header.
        found: u32,
        /// What the stored history says.
        reason: String,
    },
    /// The server is not the one whose WAL this is.
    #[error(
        "refuse {name}: it is of system identifier {found}, this server's pg_control says {expected}"
    )]
    OtherServer {
        /// The file.
        name: String,
        /// What `pg_control` says.
        expected: u64,
        /// What the segment says.
        found: u64,
    },
    /// Two contents under one name: two servers wrote the same timeline.
    #[error(
        "CONFLICT: {name} is in the repository with other content ({found}); \
         two servers wrote the same timeline. Nothing was overwritten. {}. If what is stored is a \
         copy's, which was promoted beside its server, `backup-agent expire --timeline` removes it",
        conflict::remedy(.name)
    )]
    Conflict {
        /// The file.
        name: String,
        /// The objects of other content.
        found: String,
    },
    /// The same file is there, damaged: it cannot stand for this one.
    #[error(
        "{name} is in the repository and cannot be read back. Delete that object; \
         the file is pushed again then"
    )]
    DamagedCopy {
        /// The object.
        name: String,
        /// What is wrong with it.
        source: Box<WalError>,
    },
    /// An object holds something else than the file it is named for.
    #[error("{object} does not hold what it is named for")]
    Stored {
        /// The object.
        object: String,
        /// What differs.
        source: Box<WalError>,
    },
    /// A history file does not read.
    #[error("read {name}: {reason}")]
    History {
        /// The file.
        name: String,
        /// What is wrong.
        reason: String,
    },
    /// The repository failed.
    #[error(transparent)]
    Repository(#[from] RepositoryError),
}

impl WalError {
    /// Whether the object was listed and is gone: somebody deletes it, or has replaced it.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        matches!(self, Self::Repository(RepositoryError::Store(error))
            if error.kind == StoreErrorKind::NotFound)
    }

    /// Whether the key that sealed an object is not configured.
    #[must_use]
    pub fn is_locked(&self) -> bool {
        matches!(self, Self::Repository(error) if error.is_locked())
    }

    /// Whether an object is there and is not what it should be.
    #[must_use]
    pub fn is_damage(&self) -> bool {
        match self {
            Self::Repository(error) => error.is_damage(),
            Self::Stored { .. } => true,
            _ => false,
        }
    }
}

impl From<ContainerError> for WalError {
    fn from(error: ContainerError) -> Self {
        Self::Repository(error.into())
    }
}

/// One WAL file in the repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WalObject {
    /// Its object's name.
    pub name: String,
    /// PostgreSQL's name for the file.
    pub file: String,
    /// The first digits of the hash of its content.
    pub hash: String,
    /// Bytes in the store.
    pub object_bytes: u64,
    /// When it was stored, by the store's clock or its own word (see `times.rs`): nothing in it is
    /// younger.
    pub stored_at: DateTime<Utc>,
}

/// The kind of a file's object.
pub fn kind(file: &str) -> Kind {
    if file.ends_with(".history") || file.ends_with(".backup") { Kind::History } else { Kind::Wal }
}

/// Where the objects of a file begin: the name up to the hash.
fn stem(file: &str) -> String {
    if file.len() == 24 {
        format!("wal/{}/{}/{file}-", &file[..8], &file[..16])
    } else if file.ends_with(".partial") {
        format!("partial/{file}-")
    } else {
        format!("history/{file}-")
    }
}

/// Plaintext bytes of a chunk of WAL: what a growing segment is compressed by.
pub(crate) const CHUNK_BYTES: u32 = 256 << 10;

/// The hash of content whose object is named for it: BLAKE3, for which a segment takes a quarter
/// of the time of SHA-256.
#[derive(Debug, Default)]
struct ContentHash(blake3::Hasher);

impl ContentHash {
    fn update(&mut self, content: &[u8]) {
        self.0.update(content);
    }

    fn finish(&self) -> [u8; 32] {
        self.0.finalize().into()
    }

    /// As it stands in names.
    fn in_name(&self) -> String {
        let mut text = hex::encode(self.finish());
        text.truncate(HASH_DIGITS);
        text
    }
}

/// Checks a WAL file while it passes: its header and its length.
#[derive(Debug)]
struct Checked {
    file: String,
    /// What a segment's name says; `None` for files that are no segments.
    is_segment: bool,
    header: Option<WalHeader>,
    /// The whole of a file that is no segment: it is small.
    text: Vec<u8>,
    bytes: u64,
}

impl Checked {
    fn new(file: &str) -> Result<Self, WalFileError> {
        // Any size will do to tell what kind of file it is; 1 MiB allows every number.
        let is_segment = match WalFile::parse(file, SEGMENT_BYTES_MIN)? {
            WalFile::Segment(_) | WalFile::Partial(_) => true,
            WalFile::BackupLabel { .. } | WalFile::History { .. } => false,
        };
        let (header, text) = (None, Vec::new());
        Ok(Self { file: file.to_owned(), is_segment, header, text, bytes: 0 })
    }

    fn take(&mut self, chunk: &[u8]) -> Result<(), WalError> {
        if self.bytes == 0 && self.is_segment {
            let refuse = |source| WalError::Header { name: self.file.clone(), source };
            let header = WalHeader::parse(chunk).map_err(refuse)?;
            let segment_bytes = header.segment_bytes;
            if let WalFile::Segment(segment) | WalFile::Partial(segment) =
                WalFile::parse(&self.file, segment_bytes)?
            {
                header.check(segment, segment_bytes, header.system_identifier).map_err(refuse)?;
            }
            self.header = Some(header);
        }
        if !self.is_segment {
            if self.text.len() + chunk.len() > HISTORY_BYTES_MAX {
                let reason = format!("longer than {HISTORY_BYTES_MAX} bytes");
                return Err(WalError::History { name: self.file.clone(), reason });
            }
            self.text.extend_from_slice(chunk);
        }
        self.bytes += chunk.len() as u64;
        Ok(())
    }

    /// Returns the header of a segment.
    fn finish(self) -> Result<Option<WalHeader>, WalError> {
        let name = self.file;
        if self.is_segment {
            let Some(header) = self.header else {
                let source = WalHeaderError::Short { found: 0 };
                return Err(WalError::Header { name, source });
            };
            if self.bytes != header.segment_bytes {
                let (expected, found) = (header.segment_bytes, self.bytes);
                return Err(WalError::Length { name, expected, found });
            }
        } else if name.ends_with(".history") {
            read_history(&name, &self.text)?;
        }
        Ok(self.header)
    }
}

/// Reads the text of a timeline history.
fn read_history(name: &str, text: &[u8]) -> Result<Vec<HistoryEntry>, WalError> {
    let wrong = |reason: String| WalError::History { name: name.to_owned(), reason };
    let text = std::str::from_utf8(text).map_err(|error| wrong(error.to_string()))?;
    parse_history(text).map_err(|error| wrong(error.to_string()))
}

/// Fetches a timeline history.
async fn fetch_history(place: &Place, wal: &WalObject) -> Result<Vec<HistoryEntry>, WalError> {
    let mut text = Vec::new();
    let take = |chunk: &[u8]| {
        text.extend_from_slice(chunk);
        Ok(())
    };
    read(place, wal, take).await?;
    read_history(&wal.name, &text)
}

/// Whether that is the hash of a content as it stands in names.
fn is_hash(text: &str) -> bool {
    text.len() == HASH_DIGITS && is_hex(text)
}

fn is_hex(text: &str) -> bool {
    text.bytes().all(|it| matches!(it, b'0'..=b'9' | b'a'..=b'f'))
}

/// Reads an object's name; `None` if it has no hash at its end, like what a copy tool leaves behind.
fn object(info: shared::store::ObjectInfo) -> Option<WalObject> {
    let (_, last) = info.key.rsplit_once('/')?;
    let (file, hash) = last.rsplit_once('-')?;
    let hash = if file.ends_with(".history") { rekey::untagged(hash) } else { hash };
    if !is_hash(hash) {
        return None;
    }
    Some(WalObject {
        file: file.to_owned(),
        hash: hash.to_owned(),
        object_bytes: info.bytes,
        stored_at: info.modified_at,
        name: info.key,
    })
}

/// Lists the objects of WAL after `after`, at least the first `wanted` if there are so many: what else
/// lies there counts for nothing.
async fn list_some(
    place: &Place,
    prefix: &str,
    after: &str,
    wanted: Option<usize>,
) -> Result<Vec<WalObject>, RepositoryError> {
    let (mut found, mut after) = (Vec::new(), after.to_owned());
    loop {
        let listed = place.list(prefix, Some(&after), wanted).await?;
        let last = listed.last().map(|info| info.key.clone());
        let is_all = wanted.is_none_or(|wanted| listed.len() < wanted);
        found.extend(listed.into_iter().filter_map(object));
        match (last, wanted) {
            (Some(last), Some(wanted)) if !is_all && found.len() < wanted => after = last,
            _ => return Ok(found),
        }
    }
}

/// Finds the objects of a file: none, one, or several if there is a conflict.
///
/// # Errors
///
/// The store could not be asked.
pub async fn find(place: &Place, file: &str) -> Result<Vec<WalObject>, RepositoryError> {
    let listed = place.list(&stem(file), None, None).await?;
    contents::contents(place, listed.into_iter().filter_map(object).collect()).await
}

/// Lists the complete segments of a timeline from `first` on: the objects of each. Lists at most
/// `limit` objects, and leaves the last segment out if there may be more of it.
///
/// # Errors
///
/// The store could not be asked.
pub async fn stored_from(
    place: &Place,
    first: &str,
    limit: Option<usize>,
) -> Result<BTreeMap<String, Vec<WalObject>>, RepositoryError> {
    let timeline_prefix = format!("wal/{}/", &first[..8]);
    let mut stored: BTreeMap<String, Vec<WalObject>> = BTreeMap::new();
    let listed = list_some(place, &timeline_prefix, &stem(first), limit).await?;
    let is_cut = limit.is_some_and(|limit| listed.len() >= limit);
    for wal in listed {
        stored.entry(wal.file.clone()).or_default().push(wal);
    }
    if is_cut {
        stored.pop_last();
    }
    for several in stored.values_mut().filter(|several| several.len() > 1) {
        *several = contents::contents(place, std::mem::take(several)).await?;
    }
    Ok(stored)
}

/// Fetches one file and hands it to `take`, chunk by chunk.
///
/// The content is checked as a whole only at the end: until this returns, what `take` was given
/// must not be used. It is not hashed again: the name, hash included, went into the key that the
/// chunks were sealed with, so what opens is what was hashed for this name.
///
/// # Errors
///
/// The store failed, the object is damaged, the content is not what its name says or of another
/// cluster, or what `take` says.
pub async fn read(
    place: &Place,
    wal: &WalObject,
    mut take: impl FnMut(&[u8]) -> Result<(), WalError>,
) -> Result<(), WalError> {
    let object = get(place, &wal.name).await?;
    let identity = place.identity(kind(&wal.file), &wal.name);
    let wrong = |source| WalError::Stored { object: wal.name.clone(), source: Box::new(source) };
    let mut checked = Checked::new(&wal.file)?;
    open_each(place.keys(), &identity, &object, |chunk| {
        checked.take(chunk).map_err(wrong)?;
        take(chunk)
    })?;
    match checked.finish().map_err(wrong)? {
        Some(header) if header.system_identifier != place.system_identifier => {
            let (found, expected) = (header.system_identifier, place.system_identifier);
            let name = wal.file.clone();
            Err(wrong(WalError::OtherServer { name, expected, found }))
        }
        _ => Ok(()),
    }
}

/// Fetches an object of WAL as a whole.
async fn get(place: &Place, name: &str) -> Result<Bytes, RepositoryError> {
    Ok(place.store().get(&place.key(name), OBJECT_BYTES_MAX).await?)
}

/// WAL that is lost: the server removed it before it was stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gap {
    /// The timeline.
    pub timeline: u32,
    /// The first position that is missing.
    #[serde(with = "lsn")]
    pub from_lsn: PgLsn,
    /// Where the WAL goes on.
    #[serde(with = "lsn")]
    pub until_lsn: PgLsn,
    /// When it was noticed, by the agent's clock.
    pub noticed_at: DateTime<Utc>,
    /// The server's words.
    pub reason: String,
}

/// Records a gap; the same again is fine.
///
/// # Errors
///
/// The repository failed.
pub async fn store_gap(place: &Place, gap: &Gap) -> Result<(), RepositoryError> {
    let (from, until) = (u64::from(gap.from_lsn), u64::from(gap.until_lsn));
    let name = format!("gap/{:08X}-{from:016X}-{until:016X}", gap.timeline);
    let wrong = |source| RepositoryError::Content { name: name.clone(), source };
    let text = serde_json::to_vec(gap).map_err(wrong)?;
    place.put_once(Kind::Gap, &name, &text).await
}

/// Reads the recorded gaps, oldest first.
///
/// # Errors
///
/// The repository failed, or a record is damaged.
pub async fn gaps(place: &Place) -> Result<Vec<Gap>, RepositoryError> {
    let mut gaps = Vec::new();
    let listed = place.list("gap/", None, None).await?;
    for info in listed.into_iter().filter(|info| remnant::is_gap(&info.key)) {
        let (text, _) = place.get(Kind::Gap, &info.key).await?;
        let wrong = |source| RepositoryError::Content { name: info.key.clone(), source };
        gaps.push(serde_json::from_slice(&text).map_err(wrong)?);
    }
    Ok(gaps)
}
