//! WAL in the repository: what is there, what may be stored, and what a restore can reach.

use std::collections::BTreeMap;
use std::io::{self, Read as _};

use chrono::{DateTime, Utc};
use sha2::{Digest, Sha256};
use shared::pg::wal::{
    HistoryEntry, SEGMENT_BYTES_MIN, Segment, WalFile, WalFileError, WalHeader, WalHeaderError,
    parse_history, segment_number,
};
use thiserror::Error;
use tokio_postgres::types::PgLsn;

use crate::container::{Compressed, ContainerError, Kind, open_each};
use crate::manifest::Commit;
use crate::repository::{Place, RepositoryError};

/// Hexadecimal digits of the content's SHA-256 in an object's name: 64 bits. It makes names
/// unique by content, so that a store that ignores `If-None-Match` cannot lose one of two.
const HASH_DIGITS: usize = 16;

/// The longest history file that is taken: a line for each promotion there ever was.
const HISTORY_BYTES_MAX: usize = 1 << 20;

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
    /// The first digits of the SHA-256 of its content.
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

/// Plaintext bytes of a chunk of WAL.
const CHUNK_BYTES: u32 = 1 << 20;

/// A hash as it stands in names.
fn in_name(hash: Sha256) -> String {
    let mut text = hex::encode(hash.finalize());
    text.truncate(HASH_DIGITS);
    text
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
    pub fn read(file: &str, mut from: impl io::Read, level: i32) -> Result<Self, WalError> {
        let unreadable = |source| WalError::Read { name: file.to_owned(), source };
        let mut checked = Checked::new(file)?;
        let mut content = Compressed::default();
        let mut chunk = Vec::with_capacity(CHUNK_BYTES as usize);
        loop {
            chunk.clear();
            let limit = u64::from(CHUNK_BYTES);
            io::Read::by_ref(&mut from).take(limit).read_to_end(&mut chunk).map_err(unreadable)?;
            if chunk.is_empty() {
                break;
            }
            checked.take(&chunk)?;
            content.push(&chunk, level).map_err(|error| unreadable(io::Error::other(error)))?;
        }
        let (hash, system_identifier) = checked.finish()?;
        Ok(Self { file: file.to_owned(), hash, content, system_identifier })
    }
}

/// Checks a WAL file while it passes: its header, its length, its hash.
struct Checked<'a> {
    file: &'a str,
    /// What a segment's name says; `None` for files that are no segments.
    is_segment: bool,
    header: Option<WalHeader>,
    /// The whole of a file that is no segment: it is small.
    text: Vec<u8>,
    bytes: u64,
    hash: Sha256,
}

impl<'a> Checked<'a> {
    fn new(file: &'a str) -> Result<Self, WalFileError> {
        // Any size will do to tell what kind of file it is; 1 MiB allows every number.
        let is_segment = match WalFile::parse(file, SEGMENT_BYTES_MIN)? {
            WalFile::Segment(_) | WalFile::Partial(_) => true,
            WalFile::BackupLabel { .. } | WalFile::History { .. } => false,
        };
        let (header, text) = (None, Vec::new());
        Ok(Self { file, is_segment, header, text, bytes: 0, hash: Sha256::new() })
    }

    fn take(&mut self, chunk: &[u8]) -> Result<(), WalError> {
        if self.bytes == 0 && self.is_segment {
            let refuse = |source| WalError::Header { name: self.file.to_owned(), source };
            let header = WalHeader::parse(chunk).map_err(refuse)?;
            let segment_bytes = header.segment_bytes;
            if let WalFile::Segment(segment) | WalFile::Partial(segment) =
                WalFile::parse(self.file, segment_bytes)?
            {
                header.check(segment, segment_bytes, header.system_identifier).map_err(refuse)?;
            }
            self.header = Some(header);
        }
        if !self.is_segment {
            if self.text.len() + chunk.len() > HISTORY_BYTES_MAX {
                let reason = format!("longer than {HISTORY_BYTES_MAX} bytes");
                return Err(WalError::History { name: self.file.to_owned(), reason });
            }
            self.text.extend_from_slice(chunk);
        }
        self.hash.update(chunk);
        self.bytes += chunk.len() as u64;
        Ok(())
    }

    /// Returns the hash, and the system identifier of a segment.
    fn finish(self) -> Result<(String, Option<u64>), WalError> {
        let name = self.file.to_owned();
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
        Ok((in_name(self.hash), self.header.map(|header| header.system_identifier)))
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

/// Lists the complete segments of a timeline from `first` on: the object names of each.
///
/// # Errors
///
/// The store could not be asked.
pub async fn stored_from(
    place: &Place,
    first: &str,
) -> Result<BTreeMap<String, Vec<String>>, RepositoryError> {
    let timeline_prefix = format!("wal/{}/", &first[..8]);
    let mut stored: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let listed = place.list(&timeline_prefix, Some(&stem(first)), None).await?;
    for wal in listed.into_iter().filter_map(object) {
        stored.entry(wal.file).or_default().push(wal.name);
    }
    Ok(stored)
}

/// Fetches one file and hands it to `take`, chunk by chunk.
///
/// The content is checked as a whole only at the end: until this returns, what `take` was given
/// must not be used.
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
    let (hash, system_identifier) = checked.finish().map_err(wrong)?;
    if hash != wal.hash {
        return Err(ContainerError::Misplaced { name: wal.name.clone() }.into());
    }
    match system_identifier {
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
        return Ok(Stored::Before);
    }
    let name = format!("{}{hash}", stem(&file));
    let kind = kind(&file);
    let (object, _) = content.seal(place.keys(), &place.identity(kind, &name), CHUNK_BYTES)?;
    let stored = match place.put_sealed(kind, &name, object).await {
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
    Ok(stored)
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
        for wal in place.list("wal/", None, None).await?.into_iter().filter_map(object) {
            if let Ok(WalFile::Segment(segment)) = WalFile::parse(&wal.file, segment_bytes) {
                let timeline = map.segments.entry(segment.timeline).or_default();
                timeline.entry(segment.number).or_default().push(wal);
            }
        }
        map.histories = histories(place).await?;
        Ok(map)
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
            let name = || Segment { timeline: on, number }.name(self.segment_bytes);
            let then = match found.map(Vec::as_slice) {
                Some([wal]) => {
                    until = until.max(Some(wal.stored_at));
                    number += 1;
                    continue;
                }
                Some([_, _, ..]) => Then::Conflict { segment: name() },
                Some([]) | None if self.is_beyond(target, history, on, number) => Then::End,
                Some([]) | None => Then::Gap { segment: name() },
            };
            let until_lsn = PgLsn::from(number * self.segment_bytes);
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

    /// Tells whether nothing is stored at or after a segment on the way to `target`.
    fn is_beyond(&self, target: u32, history: &[HistoryEntry], on: u32, number: u64) -> bool {
        let newest = |timeline: u32| {
            self.segments.get(&timeline).and_then(|it| it.keys().next_back().copied())
        };
        let later = history.iter().map(|entry| entry.timeline).chain([target]);
        later.filter(|timeline| *timeline >= on).all(|timeline| newest(timeline) < Some(number))
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
    if let Some(later) = later.into_iter().find_map(object) {
        return Ok(Absence::Missing {
            reason: format!("{} is stored, which is after it", later.file),
        });
    }
    // The end of the WAL comes after something. Without it, this may as well be a hole.
    let before = Segment { timeline: before_is_on, ..before }.name(segment_bytes);
    if find(place, &before).await?.is_empty() {
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
