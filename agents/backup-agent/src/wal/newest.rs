//! The newest WAL that is stored, found without a list of all of it.

use shared::pg::wal::{SEGMENT_BYTES_MIN, WalFile, WalHeader};

use super::{WalError, is_hash};
use crate::catalog;
use crate::container::{ContainerError, Kind};
use crate::repository::{Place, RepositoryError};

/// `wal_segment_size` unless `initdb --wal-segsize` said otherwise.
const SEGMENT_BYTES: u64 = 16 << 20;
/// Objects that are read until one tells: the newest may be damaged.
const READ_MAX: usize = 4;

/// The names of the newest complete segments, in order: those of the last folder that has any.
///
/// # Errors
///
/// The store could not be asked.
pub async fn segments(place: &Place) -> Result<Vec<String>, RepositoryError> {
    for timeline in place.list_folders("wal/").await?.iter().rev() {
        let timeline = format!("wal/{timeline}/");
        for folder in place.list_folders(&timeline).await?.iter().rev() {
            let listed = place.list(&format!("{timeline}{folder}/"), None, None).await?;
            let mut names: Vec<_> = listed.into_iter().map(|info| info.key).collect();
            names.retain(|name| is_segment(name));
            if !names.is_empty() {
                return Ok(names);
            }
        }
    }
    Ok(Vec::new())
}

/// The names of the pieces of segments that come after the newest complete one, in order.
///
/// # Errors
///
/// The store could not be asked.
pub async fn pieces(place: &Place, segments: &[String]) -> Result<Vec<String>, RepositoryError> {
    let complete = segments.last().map(|name| format!("partial/{}.", file(name)));
    let listed = place.list("partial/", complete.as_deref(), None).await?;
    Ok(listed.into_iter().map(|info| info.key).filter(|name| has_hash(name)).collect())
}

/// `wal_segment_size` of the server whose WAL this is: as a backup says it, or else the WAL itself.
///
/// # Errors
///
/// There is WAL and it cannot be read, or the store could not be asked.
pub async fn segment_bytes(place: &Place) -> Result<u64, WalError> {
    match catalog::wal_segment_bytes(place).await? {
        Some(segment_bytes) => Ok(segment_bytes),
        None => Ok(of_wal(place).await?.unwrap_or(SEGMENT_BYTES)),
    }
}

/// The size of segments as the newest WAL itself says it; `None` if there is none.
///
/// # Errors
///
/// As [`segment_bytes`].
pub async fn of_wal(place: &Place) -> Result<Option<u64>, WalError> {
    let mut names = segments(place).await?;
    let first_pieces = pieces(place, &names).await?.into_iter();
    names.extend(first_pieces.filter(|name| name.contains(".00000000-")));
    let mut unread = None;
    for name in names.iter().rev().take(READ_MAX) {
        match header(place, name).await {
            Ok(header) => return Ok(Some(header.segment_bytes)),
            Err(WalError::Repository(error)) if error.is_transient() => return Err(error.into()),
            Err(error) => unread = unread.or(Some(error)),
        }
    }
    unread.map_or(Ok(None), Err)
}

/// Reads the header of a segment, or of a piece from its beginning.
async fn header(place: &Place, name: &str) -> Result<WalHeader, WalError> {
    let object = place.open(Kind::Wal, name, None).await?;
    let end = object.opener.chunks().min(1);
    let (sealed, mut first) = (object.fetch(0, end).await?, Vec::new());
    object.opener.open_stretch(0, end, &sealed, |chunk| {
        first.extend_from_slice(chunk);
        Ok::<_, ContainerError>(())
    })?;
    WalHeader::parse(&first)
        .map_err(|source| WalError::Header { name: file(name).to_owned(), source })
}

/// PostgreSQL's name for the file in an object's name.
fn file(name: &str) -> &str {
    let last = name.rsplit('/').next().unwrap_or_default();
    last.split('-').next().unwrap_or_default()
}

/// Whether a name ends with a content's hash, and so is not what a copy tool left behind.
fn has_hash(name: &str) -> bool {
    name.rsplit_once('-').is_some_and(|(_, hash)| is_hash(hash))
}

/// Whether it is an object of a complete segment. 1 MiB allows every number.
fn is_segment(name: &str) -> bool {
    has_hash(name)
        && matches!(WalFile::parse(file(name), SEGMENT_BYTES_MIN), Ok(WalFile::Segment(_)))
}
