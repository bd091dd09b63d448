//! Segments of which two contents are stored: two complete ones, or a complete one and pieces that are
//! none of it. Nobody knows which is right, so nothing goes past them, and none of it is removed.

use std::io::{self, Read, Seek, SeekFrom};

use shared::pg::wal::{Segment, WalFile};
use tracing::debug;

use super::piece::{self, Piece};
use super::{WalError, WalMap, WalObject, read};
use crate::repository::{Place, RepositoryError};

/// Complete segments of each timeline that are compared with their pieces, the newest: who stores pieces
/// does not go past a conflict. There are more only where the store does not let pieces be deleted.
const COMPARED: usize = 4;

/// What to do about a segment with two contents.
pub(crate) fn remedy(segment: &str) -> String {
    format!(
        "Stop the server that should not write, or give it another cluster name. Which content is \
         right tells the server that the applications write to: run in its data directory, \
         `RUST_LOG=backup_agent=debug backup-agent wal-push pg_wal/{segment}` names each object that is not \
         its own. Delete these from the repository. Was that server put back from an older copy of its files? Then what \
         is stored is what it has lost: restore it"
    )
}

impl WalMap {
    /// Compares complete segments with the pieces that are stored of them; returns those that cannot be
    /// read.
    ///
    /// # Errors
    ///
    /// The store could not be asked.
    pub async fn compare(&mut self, place: &Place) -> Result<Vec<(Segment, WalError)>, WalError> {
        let mut unread = Vec::new();
        for timeline in self.with_wal() {
            let superseded: Vec<Segment> =
                self.superseded().filter(|it| it.timeline == timeline).collect();
            for segment in superseded.into_iter().rev().take(COMPARED) {
                match self.compare_one(place, segment).await {
                    Ok(()) => {}
                    Err(WalError::Repository(error)) if error.is_transient() => {
                        return Err(error.into());
                    }
                    Err(error) => unread.push((segment, error)),
                }
            }
        }
        Ok(unread)
    }

    /// Compares one complete segment with the pieces that are stored of it.
    ///
    /// # Errors
    ///
    /// The complete one cannot be read.
    pub async fn compare_one(&mut self, place: &Place, segment: Segment) -> Result<(), WalError> {
        let [complete] = self.objects(segment) else { return Ok(()) };
        let pieces = self.pieces.get(&segment).map_or(&[][..], Vec::as_slice);
        let different = different(place, complete, pieces).await?;
        if !different.is_empty() {
            self.different.insert(segment, different);
        }
        Ok(())
    }

    /// The objects of a segment that contradict each other.
    pub fn conflict(&self, segment: Segment) -> Option<String> {
        let complete = self.objects(segment).iter().map(|it| it.name.as_str());
        let pieces = self.different.get(&segment).into_iter().flatten().map(String::as_str);
        if complete.len() + pieces.clone().count() < 2 {
            return None;
        }
        let names: Vec<String> = [named(complete), named(pieces)].into_iter().flatten().collect();
        Some(names.join("; "))
    }

    /// The segments that have two contents, and the objects of each.
    pub fn conflicts(&self) -> impl Iterator<Item = (Segment, String)> {
        let complete = self.segments.iter().flat_map(|(timeline, numbers)| {
            numbers.keys().map(|number| Segment { timeline: *timeline, number: *number })
        });
        complete.filter_map(|segment| Some((segment, self.conflict(segment)?)))
    }
}

/// Names the first of some objects, and says how many more there are; `None` if there is none. Of a
/// growing segment there may be dozens.
pub(crate) fn named<'a>(names: impl IntoIterator<Item = &'a str>) -> Option<String> {
    let mut names = names.into_iter();
    let first = names.next()?;
    Some(match names.count() {
        0 => first.to_owned(),
        more => format!("{first} and {more} more"),
    })
}

/// The names of the pieces that are not what a complete segment has in their place.
async fn different(
    place: &Place,
    complete: &WalObject,
    pieces: &[Piece],
) -> Result<Vec<String>, WalError> {
    let mut content = Vec::new();
    let take = |chunk: &[u8]| {
        content.extend_from_slice(chunk);
        Ok(())
    };
    read(place, complete, take).await?;
    let different = pieces.iter().filter(|piece| !piece.is_of(&content));
    Ok(different.map(|piece| piece.name.clone()).collect())
}

/// The pieces that are stored of a file, if it is a segment of so many bytes.
///
/// # Errors
///
/// The store could not be asked.
pub(crate) async fn pieces_of(
    place: &Place,
    file: &str,
    segment_bytes: u64,
) -> Result<Vec<Piece>, RepositoryError> {
    let Ok(WalFile::Segment(segment)) = WalFile::parse(file, segment_bytes) else {
        return Ok(Vec::new());
    };
    piece::list_once(place, segment, segment_bytes).await
}

/// Refuses a segment, in a file, from which a piece that is stored of it differs.
///
/// # Errors
///
/// [`WalError::Conflict`]; or the file cannot be read.
pub(crate) fn require_same(
    file: &str,
    mut content: impl Read + Seek,
    pieces: &[Piece],
) -> Result<(), WalError> {
    let mut is_of = |piece: &Piece| -> io::Result<bool> {
        content.seek(SeekFrom::Start(piece.from))?;
        let mut stretch = Vec::new();
        content.by_ref().take(piece.to - piece.from).read_to_end(&mut stretch)?;
        Ok(piece.is_stretch(&stretch))
    };
    let mut found = Vec::new();
    for piece in pieces {
        let is_same = is_of(piece);
        if !is_same.map_err(|source| WalError::Read { name: file.to_owned(), source })? {
            found.push(piece.name.as_str());
        }
    }
    for piece in &found {
        debug!(segment = file, object = piece, "not of this content");
    }
    match named(found) {
        None => Ok(()),
        Some(found) => Err(WalError::Conflict { name: file.to_owned(), found }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_many_objects_the_first_is_named_and_the_others_are_counted() {
        let cases: [(&[&str], Option<&str>); 4] = [
            (&[], None),
            (&["a"], Some("a")),
            (&["a", "b"], Some("a and 1 more")),
            (&["a", "b", "c", "d"], Some("a and 3 more")),
        ];
        for (names, expected) in cases {
            assert_eq!(named(names.iter().copied()).as_deref(), expected, "{names:?}");
        }
    }
}
