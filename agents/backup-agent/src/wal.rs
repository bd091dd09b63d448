//! WAL in the repository: what is there, what may be stored, and what a restore can reach.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use sha2::{Digest, Sha256};
use shared::pg::wal::{
    HistoryEntry, Segment, WalFile, WalFileError, WalHeader, WalHeaderError, parse_history,
    segment_number,
};
use thiserror::Error;
use tokio_postgres::types::PgLsn;

use crate::container::Kind;
use crate::manifest::Commit;
use crate::repository::{Place, RepositoryError};

/// Hexadecimal digits of the content's SHA-256 in an object's name: 64 bits. It makes names
/// unique by content, so that a store that ignores `If-None-Match` cannot lose one of two.
const HASH_DIGITS: usize = 16;

/// Why a WAL file was not stored or not given.
#[derive(Debug, Error)]
pub enum WalError {
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

/// The content's hash as it stands in names.
fn hash(content: &[u8]) -> String {
    let mut text = hex::encode(Sha256::digest(content));
    text.truncate(HASH_DIGITS);
    text
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

/// Fetches one file, checked against its hash.
///
/// # Errors
///
/// The store failed, the object is damaged, or the content is not what its name says.
pub async fn read(place: &Place, wal: &WalObject) -> Result<Vec<u8>, WalError> {
    let (content, _) = place.get(kind(&wal.file), &wal.name).await?;
    if hash(&content) != wal.hash {
        let name = wal.name.clone();
        return Err(
            RepositoryError::from(crate::container::ContainerError::Misplaced { name }).into()
        );
    }
    Ok(content)
}

/// What became of a file that was to be stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stored {
    /// It is new.
    Now,
    /// The same content was there.
    Before,
}

/// Stores a WAL file that was checked by [`check_file`].
///
/// The same content again is fine. Other content under the same name is refused, whichever came
/// first: the list is read before and after, so that of two writers at the same moment at least
/// one sees the other, on every store.
///
/// # Errors
///
/// [`WalError::Conflict`]; or the repository failed.
pub async fn store(
    place: &Place,
    file: &str,
    content: &[u8],
    level: i32,
) -> Result<Stored, WalError> {
    let hash = hash(content);
    let conflict = |found: &[WalObject]| -> Result<(), WalError> {
        let others: Vec<_> =
            found.iter().filter(|it| it.hash != hash).map(|it| it.name.as_str()).collect();
        if others.is_empty() {
            return Ok(());
        }
        Err(WalError::Conflict { name: file.to_owned(), found: others.join(", ") })
    };
    let before = find(place, file).await?;
    conflict(&before)?;
    if let Some(same) = before.first() {
        // Acknowledged only if it can be read back: a truncated object must not stand for it.
        match read(place, same).await {
            Ok(stored) if stored == content => return Ok(Stored::Before),
            Err(WalError::Repository(error)) if error.is_transient() => return Err(error.into()),
            Err(source) => {
                let (name, source) = (same.name.clone(), Box::new(source));
                return Err(WalError::DamagedCopy { name, source });
            }
            Ok(_) => {}
        }
    }
    let name = format!("{}{hash}", stem(file));
    let stored = match place.put(kind(file), &name, content, level).await {
        Ok(_) => Stored::Now,
        // The other writer had the same content, sealed with another salt.
        Err(RepositoryError::Conflict { .. }) => Stored::Before,
        Err(error) => return Err(error.into()),
    };
    conflict(&find(place, file).await?)?;
    Ok(stored)
}

/// Checks that a file's content is what its name says; returns the system identifier in it, if
/// the kind of file has one.
///
/// # Errors
///
/// The first thing that differs.
pub fn check_file(file: &str, content: &[u8]) -> Result<Option<u64>, WalError> {
    let segment_of = |segment_bytes| match WalFile::parse(file, segment_bytes)? {
        WalFile::Segment(segment) | WalFile::Partial(segment) => Ok(Some(segment)),
        WalFile::BackupLabel { .. } | WalFile::History { .. } => Ok::<_, WalFileError>(None),
    };
    // Any size will do to tell what kind of file it is; 1 MiB allows every number.
    if segment_of(1 << 20)?.is_none() {
        if file.ends_with(".history") {
            let reason = |reason: String| WalError::History { name: file.to_owned(), reason };
            let text = std::str::from_utf8(content).map_err(|error| reason(error.to_string()))?;
            parse_history(text).map_err(|error| reason(error.to_string()))?;
        }
        return Ok(None);
    }
    let refuse = |source| WalError::Header { name: file.to_owned(), source };
    let header = WalHeader::parse(content).map_err(refuse)?;
    if content.len() as u64 != header.segment_bytes {
        return Err(WalError::Length {
            name: file.to_owned(),
            expected: header.segment_bytes,
            found: content.len() as u64,
        });
    }
    if let Some(segment) = segment_of(header.segment_bytes)? {
        header.check(segment, header.segment_bytes, header.system_identifier).map_err(refuse)?;
    }
    Ok(Some(header.system_identifier))
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
    let segment = match WalFile::parse(file, segment_bytes)? {
        WalFile::Segment(segment) => segment,
        // No history file, no such timeline: the list is the proof.
        WalFile::History { .. } | WalFile::Partial(_) | WalFile::BackupLabel { .. } => {
            return Ok(Absence::NeverProduced);
        }
    };
    for (child, history) in histories(place).await? {
        for entry in &history {
            let ends_in = segment_number(entry.switch_lsn, segment_bytes);
            if child == segment.timeline && segment.number < ends_in {
                // Recovery asks on the newest timeline first; this is an older one's.
                return Ok(Absence::NeverProduced);
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
    Ok(match later.into_iter().find_map(object) {
        None => Absence::NeverProduced,
        Some(later) => {
            Absence::Missing { reason: format!("{} is stored, which is after it", later.file) }
        }
    })
}

/// Reads every timeline history in the repository.
async fn histories(place: &Place) -> Result<BTreeMap<u32, Vec<HistoryEntry>>, WalError> {
    let mut histories = BTreeMap::new();
    for wal in place.list("history/", None, None).await?.into_iter().filter_map(object) {
        // The size of a segment does not matter to the name of a history file.
        let Ok(WalFile::History { timeline }) = WalFile::parse(&wal.file, 1 << 20) else {
            continue;
        };
        let text = read(place, &wal).await?;
        let history = parse_history(&String::from_utf8_lossy(&text)).map_err(|error| {
            WalError::History { name: wal.name.clone(), reason: error.to_string() }
        })?;
        histories.insert(timeline, history);
    }
    Ok(histories)
}
