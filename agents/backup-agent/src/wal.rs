//! WAL in the repository: what is there, what may be stored, and what a restore can reach.

#[cfg(test)]
pub(crate) mod example;
pub mod growing;
pub mod piece;
pub mod ranges;
pub mod remnant;

use std::collections::BTreeMap;
use std::io::{self, Read};

use bytes::Bytes;
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use shared::pg::wal::{
    HistoryEntry, SEGMENT_BYTES_MIN, Segment, WalFile, WalFileError, WalHeader, WalHeaderError,
    parse_history, segment_number,
};
use shared::store::StoreErrorKind;
use thiserror::Error;
use tokio_postgres::types::PgLsn;

use crate::container::{Compressed, ContainerError, Kind, open_each};
use crate::manifest::{Commit, lsn};
use crate::repository::{Place, RepositoryError};
use piece::Pieces;

/// Hexadecimal digits of the content's hash in an object's name: 64 bits. It makes names
/// unique by content, so that a store that ignores `If-None-Match` cannot lose one of two.
const HASH_DIGITS: usize = 16;

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
         two servers wrote the same timeline. Nothing was overwritten. Stop the one that should \
         not write, or give it another cluster name"
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
    #[error("read {name} from the repository: {reason}")]
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
    /// When it was stored, by the store's clock: nothing in it is younger.
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

/// A WAL file that was read once: checked, hashed and compressed, and not sealed yet, because its
/// object's name has the hash in it.
#[derive(Debug)]
pub struct Packed {
    file: String,
    hash: String,
    content: Compressed,
    /// The system identifier in its header; history files have none.
    pub system_identifier: Option<u64>,
}

impl Packed {
    /// Reads a file and checks that its content is what its name says.
    ///
    /// # Errors
    ///
    /// It cannot be read, or the first thing that differs.
    pub fn read(file: &str, mut from: impl Read, level: i32) -> Result<Self, WalError> {
        let unreadable = |source| WalError::Read { name: file.to_owned(), source };
        let mut checked = Checked::new(file)?;
        let (mut hash, mut content) = (ContentHash::default(), Compressed::default());
        let mut buffer = vec![0; CHUNK_BYTES as usize];
        loop {
            let len = fill(&mut from, &mut buffer).map_err(unreadable)?;
            let chunk = &buffer[..len];
            if chunk.is_empty() {
                break;
            }
            checked.take(chunk)?;
            hash.update(&piece::stretch_hash(chunk));
            content.push(chunk, level).map_err(|error| unreadable(io::Error::other(error)))?;
        }
        let (hash, system_identifier) = (hash.in_name(), checked.finish()?);
        Ok(Self { file: file.to_owned(), hash, content, system_identifier })
    }
}

/// Reads until the buffer is full or nothing more comes; returns how much came.
fn fill(from: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match from.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
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

    /// Returns the system identifier of a segment.
    fn finish(self) -> Result<Option<u64>, WalError> {
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
        Ok(self.header.map(|header| header.system_identifier))
    }
}

/// Reads the text of a timeline history.
fn read_history(name: &str, text: &[u8]) -> Result<Vec<HistoryEntry>, WalError> {
    let wrong = |reason: String| WalError::History { name: name.to_owned(), reason };
    let text = std::str::from_utf8(text).map_err(|error| wrong(error.to_string()))?;
    parse_history(text).map_err(|error| wrong(error.to_string()))
}

fn object(info: shared::store::ObjectInfo) -> Option<WalObject> {
    let (_, last) = info.key.rsplit_once('/')?;
    let (file, hash) = last.rsplit_once('-')?;
    Some(WalObject {
        file: file.to_owned(),
        hash: hash.to_owned(),
        object_bytes: info.bytes,
        stored_at: info.modified_at,
        name: info.key,
    })
}

/// Finds the objects of a file: none, one, or several if there is a conflict.
///
/// # Errors
///
/// The store could not be asked.
pub async fn find(place: &Place, file: &str) -> Result<Vec<WalObject>, RepositoryError> {
    let listed = place.list(&stem(file), None, None).await?;
    Ok(listed.into_iter().filter_map(object).collect())
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
    let listed = place.list(&timeline_prefix, Some(&stem(first)), limit).await?;
    let is_cut = Some(listed.len()) == limit;
    for wal in listed.into_iter().filter_map(object) {
        stored.entry(wal.file.clone()).or_default().push(wal);
    }
    if is_cut {
        stored.pop_last();
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
    let object = place.store().get(&place.key(&wal.name)).await.map_err(RepositoryError::from)?;
    let identity = place.identity(kind(&wal.file), &wal.name);
    let wrong = |source| WalError::Stored { object: wal.name.clone(), source: Box::new(source) };
    let mut checked = Checked::new(&wal.file)?;
    open_each(place.keys(), &identity, &object, |chunk| {
        checked.take(chunk).map_err(wrong)?;
        take(chunk)
    })?;
    match checked.finish().map_err(wrong)? {
        Some(found) if found != place.system_identifier => {
            let (name, expected) = (wal.file.clone(), place.system_identifier);
            Err(wrong(WalError::OtherServer { name, expected, found }))
        }
        _ => Ok(()),
    }
}

/// What became of a file that was to be stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stored {
    /// It is new.
    Now,
    /// The same content was there.
    Before,
}

/// Stores a WAL file.
///
/// The same content again is fine. Other content under the same name is refused, whichever came
/// first: the list is read before and after, so that of two writers at the same moment at least
/// one sees the other, on every store.
///
/// # Errors
///
/// [`WalError::Conflict`]; or the repository failed.
pub async fn store(place: &Place, packed: Packed) -> Result<Stored, WalError> {
    store_object(place, packed).await.map(|(stored, _)| stored)
}

/// Stores a WAL file and reads its object back, so that what else holds it may be given up.
///
/// # Errors
///
/// As [`store`]; or the store does not give back what it was given.
pub async fn store_and_compare(place: &Place, packed: Packed) -> Result<Stored, WalError> {
    let name = format!("{}{}", stem(&packed.file), packed.hash);
    let error = match store_object(place, packed).await {
        Ok((stored, None)) => return Ok(stored),
        Ok((stored, Some((name, object)))) => {
            let is_same = place.store().holds(&place.key(&name), &object).await;
            if is_same.map_err(RepositoryError::from)? {
                return Ok(stored);
            }
            let source = ContainerError::Replaced { name: name.clone() };
            WalError::DamagedCopy { name, source: Box::new(source.into()) }
        }
        Err(error) => error,
    };
    let is_damaged = match &error {
        WalError::DamagedCopy { .. } => true,
        WalError::Repository(RepositoryError::Store(error)) => {
            error.kind == StoreErrorKind::Corrupt
        }
        _ => false,
    };
    if is_damaged {
        // Its name would stand for what the server still has, and sends again.
        place.store().delete(&place.key(&name)).await.map_err(RepositoryError::from)?;
    }
    Err(error)
}

/// Stores a WAL file; returns the object too if it was written now.
async fn store_object(
    place: &Place,
    packed: Packed,
) -> Result<(Stored, Option<(String, Bytes)>), WalError> {
    let Packed { file, hash, content, system_identifier: _ } = packed;
    let conflict = |found: &[WalObject]| -> Result<(), WalError> {
        let others: Vec<_> =
            found.iter().filter(|it| it.hash != hash).map(|it| it.name.as_str()).collect();
        if others.is_empty() {
            return Ok(());
        }
        Err(WalError::Conflict { name: file.clone(), found: others.join(", ") })
    };
    let before = find(place, &file).await?;
    conflict(&before)?;
    if let Some(same) = before.first() {
        read_back(place, same).await?;
        return Ok((Stored::Before, None));
    }
    let name = format!("{}{hash}", stem(&file));
    let kind = kind(&file);
    let (object, _) = content.seal(place.keys(), &place.identity(kind, &name), CHUNK_BYTES)?;
    let stored = match place.put_sealed(kind, &name, object.clone()).await {
        Ok(()) => Stored::Now,
        // Another writer was faster with the same content, sealed with another salt.
        Err(RepositoryError::Conflict { .. }) => Stored::Before,
        Err(error) => return Err(error.into()),
    };
    let after = find(place, &file).await?;
    conflict(&after)?;
    if stored == Stored::Before {
        for same in &after {
            read_back(place, same).await?;
        }
    }
    Ok((stored, (stored == Stored::Now).then_some((name, object))))
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
    match place.put(Kind::Gap, &name, &text, 1).await {
        Ok(_) | Err(RepositoryError::Conflict { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Reads the recorded gaps, oldest first.
///
/// # Errors
///
/// The repository failed, or a record is damaged.
pub async fn gaps(place: &Place) -> Result<Vec<Gap>, RepositoryError> {
    let mut gaps = Vec::new();
    for info in place.list("gap/", None, None).await? {
        let (text, _) = place.get(Kind::Gap, &info.key).await?;
        let wrong = |source| RepositoryError::Content { name: info.key.clone(), source };
        gaps.push(serde_json::from_slice(&text).map_err(wrong)?);
    }
    Ok(gaps)
}

/// Reads an object that is to stand for a file that is pushed again: a truncated one must not.
async fn read_back(place: &Place, same: &WalObject) -> Result<(), WalError> {
    match read(place, same, |_| Ok(())).await {
        Err(WalError::Repository(error)) if !error.is_damage() => Err(error.into()),
        Err(source) => {
            Err(WalError::DamagedCopy { name: same.name.clone(), source: Box::new(source) })
        }
        Ok(()) => Ok(()),
    }
}

/// All WAL of one database cluster in the repository, as far as names tell.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WalMap {
    /// Bytes of a segment.
    pub segment_bytes: u64,
    /// Per timeline, the segments by number; more than one object is a conflict.
    pub segments: BTreeMap<u32, BTreeMap<u64, Vec<WalObject>>>,
    /// The pieces of segments that are not complete.
    pub pieces: Pieces,
    /// Per timeline, where it comes from.
    pub histories: BTreeMap<u32, Vec<HistoryEntry>>,
}

/// Where a recovery from a backup would stop, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reach {
    /// The timeline that recovery follows.
    pub timeline: u32,
    /// The end of the last segment that can be replayed, exclusive.
    pub until_lsn: PgLsn,
    /// When that segment was stored: no commit in it is younger. `None` if there is no segment.
    pub until: Option<DateTime<Utc>>,
    /// What is after it.
    pub then: Then,
}

/// What is after the last segment that can be replayed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Then {
    /// Nothing: it is the newest.
    End,
    /// A missing segment; there is WAL after it.
    Gap {
        /// The first missing segment's name.
        segment: String,
    },
    /// A segment that is there with two contents.
    Conflict {
        /// Its name.
        segment: String,
    },
}

impl WalMap {
    /// Lists the WAL of a place. `segment_bytes` is the cluster's `wal_segment_size`.
    ///
    /// # Errors
    ///
    /// The store could not be asked, or a history file is damaged.
    pub async fn read(place: &Place, segment_bytes: u64) -> Result<Self, WalError> {
        let mut map = Self { segment_bytes, ..Self::default() };
        // Before the complete segments, which take their place: what is completed meanwhile is in
        // one of the two lists.
        map.pieces = piece::list(place, segment_bytes).await?;
        for wal in place.list("wal/", None, None).await?.into_iter().filter_map(object) {
            map.add(wal);
        }
        map.histories = histories(place).await?;
        Ok(map)
    }

    /// Lists what tells where receiving goes on: of the complete segments those from `lsn` on, or from
    /// where the server's `history` left their timeline, and of each timeline some before and the
    /// newest. So a large repository takes no longer than a small one.
    ///
    /// # Errors
    ///
    /// As [`WalMap::read`].
    pub async fn read_from(
        place: &Place,
        segment_bytes: u64,
        lsn: PgLsn,
        history: &[HistoryEntry],
    ) -> Result<Self, WalError> {
        // Before the complete segments, as in `read`.
        let pieces = piece::list(place, segment_bytes).await?;
        let mut map = Self { segment_bytes, pieces, ..Self::default() };
        for timeline in place.list_folders("wal/").await? {
            let Ok(number) = u32::from_str_radix(&timeline, 16) else { continue };
            let left = history.iter().find(|entry| entry.timeline == number);
            let from = left.map_or(lsn, |entry| lsn.min(entry.switch_lsn));
            let first = Segment { timeline: number, number: segment_number(from, segment_bytes) };
            map.add_from(place, &timeline, &first.name(segment_bytes)[..16]).await?;
        }
        let growing = map.pieces.keys().copied().filter(|it| map.objects(*it).is_empty());
        for segment in growing.collect::<Vec<_>>() {
            for wal in find(place, &segment.name(segment_bytes)).await? {
                map.add(wal);
            }
        }
        map.histories = histories(place).await?;
        Ok(map)
    }

    /// Lists the complete segments of a timeline from the folder `first` on, and those of the last
    /// folder before it that has any.
    async fn add_from(
        &mut self,
        place: &Place,
        timeline: &str,
        first: &str,
    ) -> Result<(), WalError> {
        let prefix = format!("wal/{timeline}/");
        let folders = place.list_folders(&prefix).await?;
        let before = folders.iter().rev().skip_while(|folder| folder.as_str() >= first);
        for folder in before.chain(folders.first()) {
            let folder = format!("{prefix}{folder}/");
            let listed = place.list(&prefix, Some(&folder), None).await?;
            let is_empty = listed.first().is_none_or(|info| !info.key.starts_with(&folder));
            listed.into_iter().filter_map(object).for_each(|wal| self.add(wal));
            // Where a directory is the store, one that was just made may be empty.
            if !is_empty {
                break;
            }
        }
        Ok(())
    }

    /// Lists what tells about one segment: its own objects, those of the timeline before, a few that
    /// come after, and all pieces and histories.
    ///
    /// # Errors
    ///
    /// As [`WalMap::read`].
    pub async fn around(
        place: &Place,
        segment: Segment,
        segment_bytes: u64,
    ) -> Result<Self, WalError> {
        let pieces = piece::list(place, segment_bytes).await?;
        let histories = histories(place).await?;
        let mut map = Self { segment_bytes, pieces, histories, ..Self::default() };
        let parent = map.parent(segment).map(|(parent, _)| parent);
        for near in [Some(segment), parent].into_iter().flatten() {
            let prefix = format!("wal/{:08X}/", near.timeline);
            let listed =
                place.list(&prefix, Some(&stem(&near.name(segment_bytes))), Some(4)).await?;
            for wal in listed.into_iter().filter_map(object) {
                map.add(wal);
            }
        }
        Ok(map)
    }

    fn add(&mut self, wal: WalObject) {
        if let Ok(WalFile::Segment(segment)) = WalFile::parse(&wal.file, self.segment_bytes) {
            let timeline = self.segments.entry(segment.timeline).or_default();
            let objects = timeline.entry(segment.number).or_default();
            // Two lists may both have it.
            if !objects.contains(&wal) {
                objects.push(wal);
            }
        }
    }

    /// How much of a segment is stored, from its first byte on: all of it if it is complete.
    pub fn covered(&self, segment: Segment) -> u64 {
        let complete = self.segments.get(&segment.timeline);
        if complete.is_some_and(|timeline| timeline.contains_key(&segment.number)) {
            return self.segment_bytes;
        }
        self.pieces.get(&segment).map_or(0, |pieces| piece::cover(pieces).to)
    }

    /// Complete segments of which there are pieces still: whoever stored them was stopped there.
    pub fn superseded(&self) -> impl Iterator<Item = Segment> {
        let complete = |segment: &Segment| {
            let timeline = self.segments.get(&segment.timeline);
            timeline.is_some_and(|timeline| timeline.contains_key(&segment.number))
        };
        self.pieces.keys().copied().filter(complete)
    }

    /// The objects of a complete segment.
    pub fn objects(&self, segment: Segment) -> &[WalObject] {
        let timeline = self.segments.get(&segment.timeline);
        timeline.and_then(|it| it.get(&segment.number)).map_or(&[], Vec::as_slice)
    }

    /// Takes a complete segment for one that is not there, because it is damaged.
    pub fn disregard(&mut self, segment: Segment) {
        if let Some(timeline) = self.segments.get_mut(&segment.timeline) {
            timeline.remove(&segment.number);
        }
    }

    /// How much of a segment a recovery can have: what is stored of it; or, of the segment in which
    /// its timeline began, the beginning that it has in common with the timeline before.
    pub fn within_reach(&self, segment: Segment) -> u64 {
        let own = self.covered(segment);
        let Some((parent, common)) = self.parent(segment).filter(|(_, common)| own < *common)
        else {
            return own;
        };
        own.max(self.covered(parent).min(common))
    }

    /// The same segment on the timeline before, if `segment` is the one in which its timeline
    /// began, and how many bytes the two have in common.
    pub fn parent(&self, segment: Segment) -> Option<(Segment, u64)> {
        let entry = self.histories.get(&segment.timeline)?.last()?;
        let begins_here = segment_number(entry.switch_lsn, self.segment_bytes) == segment.number;
        let parent = Segment { timeline: entry.timeline, ..segment };
        begins_here.then_some((parent, u64::from(entry.switch_lsn) % self.segment_bytes))
    }

    /// What proves that a segment, of which the first `covered` bytes are stored, was longer.
    pub fn goes_on(&self, segment: Segment, covered: u64) -> Option<String> {
        let Segment { timeline, number } = segment;
        if let Some(later) = self.numbers(timeline).filter(|later| *later > number).min() {
            let later = Segment { timeline, number: later }.name(self.segment_bytes);
            return Some(format!("{later} is stored, which is after it"));
        }
        let end = number * self.segment_bytes + covered;
        let left =
            |entry: &&HistoryEntry| entry.timeline == timeline && u64::from(entry.switch_lsn) > end;
        self.histories.iter().find_map(|(child, history)| {
            let entry = history.iter().find(left)?;
            Some(format!("timeline {child} branched off it at {}", entry.switch_lsn))
        })
    }

    /// The newest timeline of which WAL is stored.
    pub fn newest_with_wal(&self) -> Option<u32> {
        let complete = self.segments.keys().copied().max();
        complete.max(self.pieces.keys().map(|segment| segment.timeline).max())
    }

    /// The numbers of the segments of a timeline of which anything is stored, not in order.
    pub fn numbers(&self, timeline: u32) -> impl Iterator<Item = u64> {
        let complete = self.segments.get(&timeline).into_iter().flat_map(BTreeMap::keys).copied();
        let of_timeline = move |segment: &&Segment| segment.timeline == timeline;
        complete.chain(self.pieces.keys().filter(of_timeline).map(|segment| segment.number))
    }

    /// Where the stored WAL of a timeline ends, gaps or not; `None` if there is none.
    pub fn end_of(&self, timeline: u32) -> Option<PgLsn> {
        let number = self.numbers(timeline).max()?;
        let covered = self.covered(Segment { timeline, number });
        Some((number * self.segment_bytes + covered).into())
    }

    /// The newest timeline of which WAL or a history is stored.
    pub fn newest_stored(&self) -> Option<u32> {
        let histories = self.histories.keys().copied().max();
        let complete = self.segments.keys().copied().max();
        histories.max(complete).max(self.pieces.keys().map(|segment| segment.timeline).max())
    }

    /// The newest timeline that a recovery which started on `timeline` at `lsn` can follow.
    pub fn newest_timeline(&self, timeline: u32, lsn: PgLsn) -> u32 {
        let follows = |candidate: &u32| self.branch(*candidate, timeline, lsn);
        self.histories.keys().copied().filter(follows).max().unwrap_or(timeline).max(timeline)
    }

    /// Tells whether `candidate` branched off `timeline` at or after `lsn`.
    fn branch(&self, candidate: u32, timeline: u32, lsn: PgLsn) -> bool {
        let history = self.histories.get(&candidate).map_or(&[][..], Vec::as_slice);
        history.iter().any(|entry| entry.timeline == timeline && entry.switch_lsn >= lsn)
    }

    /// Follows the WAL of a backup along the timeline `target` as far as it goes without a gap.
    ///
    /// `None` if `target` does not branch off the backup's timeline after the backup's end: what
    /// branched off before knows nothing of what the backup may hold.
    pub fn reach(&self, backup: &Commit, target: u32) -> Option<Reach> {
        let Commit { timeline, start_lsn: lsn, end_lsn, .. } = *backup;
        if target != timeline && !self.branch(target, timeline, end_lsn) {
            return None;
        }
        let history = self.histories.get(&target).map_or(&[][..], Vec::as_slice);
        let mut number = segment_number(lsn, self.segment_bytes);
        let mut until = None;
        loop {
            // The segment in which a timeline ends is read from the timeline after it, which
            // begins with a copy.
            let on = history
                .iter()
                .find(|entry| number < segment_number(entry.switch_lsn, self.segment_bytes))
                .map_or(target, |entry| entry.timeline);
            let found = self.segments.get(&on).and_then(|timeline| timeline.get(&number));
            let segment = Segment { timeline: on, number };
            let name = || segment.name(self.segment_bytes);
            let pieces = self.pieces.get(&segment).map_or(&[][..], Vec::as_slice);
            let cover = piece::cover(pieces);
            let then = match found.map(Vec::as_slice) {
                Some([wal]) => {
                    until = until.max(Some(wal.stored_at));
                    number += 1;
                    continue;
                }
                Some([_, _, ..]) => Then::Conflict { segment: name() },
                Some([]) | None if cover.furthest > cover.to => Then::Gap { segment: name() },
                Some([]) | None if self.is_beyond(target, history, segment) => Then::End,
                Some([]) | None => Then::Gap { segment: name() },
            };
            until = until.max(cover.chain.iter().map(|piece| piece.stored_at).max());
            let conflict = matches!(then, Then::Conflict { .. });
            let more = if conflict { 0 } else { self.within_reach(segment) };
            let until_lsn = PgLsn::from(number * self.segment_bytes + more);
            return Some(Reach { timeline: target, until_lsn, until, then });
        }
    }

    /// Timelines of a backup that go on after the one that leads to `target` branched off them: the
    /// newest segment of each. After a failover there is none; after a restore to an earlier
    /// moment there is what was left behind, or a server that lives on beside the copy.
    pub fn left_behind(&self, backup: &Commit, target: u32) -> Vec<(u32, String)> {
        let history = self.histories.get(&target).map_or(&[][..], Vec::as_slice);
        let on_the_way = history.iter().filter(|entry| entry.timeline >= backup.timeline);
        let goes_on = on_the_way.filter_map(|entry| {
            let (number, _) = self.segments.get(&entry.timeline)?.last_key_value()?;
            let switched_in = segment_number(entry.switch_lsn, self.segment_bytes);
            let segment = Segment { timeline: entry.timeline, number: *number };
            (*number > switched_in).then(|| (entry.timeline, segment.name(self.segment_bytes)))
        });
        goes_on.collect()
    }

    /// Tells whether nothing is stored after a segment, which is not complete, on the way to
    /// `target`.
    fn is_beyond(&self, target: u32, history: &[HistoryEntry], segment: Segment) -> bool {
        let Segment { timeline: on, number } = segment;
        let later = history.iter().map(|entry| entry.timeline).chain([target]);
        let last_allowed =
            |timeline| if timeline == on { number } else { number.saturating_sub(1) };
        later
            .filter(|timeline| *timeline >= on)
            .all(|timeline| self.numbers(timeline).all(|it| it <= last_allowed(timeline)))
    }
}

/// What the repository proves about a file that PostgreSQL asks for and that is not there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Absence {
    /// It was never produced, as far as anything in the repository can tell: recovery has
    /// reached the end, or is to look on another timeline.
    NeverProduced,
    /// It was produced or may have been: there is WAL after it, or this is where it should be.
    Missing {
        /// Why it must have been there.
        reason: String,
    },
}

/// Decides whether an absent file was never produced.
///
/// # Errors
///
/// The store could not be asked, or a history file is damaged: then nothing is proven.
pub async fn absence(place: &Place, file: &str, segment_bytes: u64) -> Result<Absence, WalError> {
    // An empty place proves nothing: it is a missing mount, or another cluster's name.
    if place.list("", None, Some(1)).await?.is_empty() {
        let reason = "the repository holds nothing of this server: wrong mount, bucket, prefix, \
                      cluster name or group?"
            .to_owned();
        return Ok(Absence::Missing { reason });
    }
    let segment = match WalFile::parse(file, segment_bytes)? {
        WalFile::Segment(segment) => segment,
        // No history file, no such timeline: the list is the proof.
        WalFile::History { .. } | WalFile::Partial(_) | WalFile::BackupLabel { .. } => {
            return Ok(Absence::NeverProduced);
        }
    };
    // Where the segment before this one would be stored.
    let before = Segment { number: segment.number.saturating_sub(1), ..segment };
    let mut before_is_on = before.timeline;
    for (child, history) in histories(place).await? {
        for entry in &history {
            let ends_in = segment_number(entry.switch_lsn, segment_bytes);
            if child == segment.timeline && segment.number < ends_in {
                // Recovery asks on the newest timeline first; this is an older one's.
                return Ok(Absence::NeverProduced);
            }
            if child == segment.timeline && before.number < ends_in {
                before_is_on = before_is_on.min(entry.timeline);
            }
            if entry.timeline == segment.timeline && segment.number < ends_in {
                let reason = format!(
                    "timeline {child} branched off timeline {} after it, at {}",
                    segment.timeline, entry.switch_lsn
                );
                return Ok(Absence::Missing { reason });
            }
        }
    }
    let timeline_prefix = format!("wal/{}/", &file[..8]);
    let later = place.list(&timeline_prefix, Some(&stem(file)), Some(1)).await?;
    let pieces = piece::list(place, segment_bytes).await?;
    let later_piece =
        pieces.keys().find(|it| it.timeline == segment.timeline && it.number >= segment.number);
    let later = later.into_iter().find_map(object).map(|later| later.file);
    if let Some(later) = later.or(later_piece.map(|later| later.name(segment_bytes))) {
        let reason = if later == file {
            "its first piece is missing, and a later one is stored".to_owned()
        } else {
            format!("{later} is stored, which is after it")
        };
        return Ok(Absence::Missing { reason });
    }
    // The end of the WAL comes after something. Without it, this may as well be a hole.
    let before_segment = Segment { timeline: before_is_on, ..before };
    let before = before_segment.name(segment_bytes);
    if !pieces.contains_key(&before_segment) && find(place, &before).await?.is_empty() {
        let reason = format!("{before}, which is before it, is missing too");
        return Ok(Absence::Missing { reason });
    }
    Ok(Absence::NeverProduced)
}

/// Reads every timeline history in the repository.
async fn histories(place: &Place) -> Result<BTreeMap<u32, Vec<HistoryEntry>>, WalError> {
    let mut histories = BTreeMap::new();
    for wal in place.list("history/", None, None).await?.into_iter().filter_map(object) {
        // The size of a segment does not matter to the name of a history file.
        let Ok(WalFile::History { timeline }) = WalFile::parse(&wal.file, 1 << 20) else {
            continue;
        };
        let mut text = Vec::new();
        read(place, &wal, |chunk| {
            text.extend_from_slice(chunk);
            Ok(())
        })
        .await?;
        let history = read_history(&wal.name, &text)?;
        histories.insert(timeline, history);
    }
    Ok(histories)
}
