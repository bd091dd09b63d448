//! Pieces of a segment that is still growing, and the segment stitched from them.
//!
//! A piece is `[from, to)` of a segment, in bytes. Its name has its place and the hash of its
//! content, so two writers of the same stretch cannot overwrite each other. Complete segments
//! replace their pieces.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use shared::pg::wal::{Segment, WalFile, WalHeader};
use shared::store::{ObjectInfo, StoreErrorKind};

use super::{CHUNK_BYTES, ContentHash, WalError};
use crate::container::{Compressed, ContainerError, Kind, open_each};
use crate::repository::{Place, RepositoryError};

/// One piece in the repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The segment it is a piece of.
    pub segment: Segment,
    /// Where in the segment it begins, in bytes.
    pub from: u64,
    /// Where in the segment it ends, exclusive.
    pub to: u64,
    /// The first digits of the hash of its content, stretch by stretch of 256 KiB.
    pub hash: String,
    /// Its object's name.
    pub name: String,
    /// Bytes in the store.
    pub object_bytes: u64,
    /// When it was stored, by the store's clock: nothing in it is younger.
    pub stored_at: DateTime<Utc>,
}

/// The pieces of each segment that has any.
pub type Pieces = BTreeMap<Segment, Vec<Piece>>;

/// The hash of a piece that begins at `from`: of the hashes of the stretches between multiples of
/// [`CHUNK_BYTES`] in the segment, so that it can be told from those of whole chunks.
pub(super) fn hash(from: u64, mut content: &[u8]) -> String {
    let mut of_hashes = ContentHash::default();
    let mut at = from;
    while !content.is_empty() {
        let room = u64::from(CHUNK_BYTES) - at % u64::from(CHUNK_BYTES);
        let (stretch, rest) = content.split_at(content.len().min(index(room)));
        of_hashes.update(&stretch_hash(stretch));
        (at, content) = (at + stretch.len() as u64, rest);
    }
    of_hashes.in_name()
}

/// The hash of one stretch between multiples of [`CHUNK_BYTES`].
pub(super) fn stretch_hash(stretch: &[u8]) -> [u8; 32] {
    let mut hash = ContentHash::default();
    hash.update(stretch);
    hash.finish()
}

/// A piece that is to be stored.
#[derive(Debug)]
pub struct Cut {
    /// Where in the segment it begins, in bytes.
    pub from: u64,
    /// Where in the segment it ends, exclusive.
    pub to: u64,
    pub(super) hash: String,
    pub(super) content: Compressed,
}

/// The prefix of the names of a segment's pieces.
fn stem(segment: Segment, segment_bytes: u64) -> String {
    format!("partial/{}.", segment.name(segment_bytes))
}

/// Stores a piece. One that the store did not keep whole is deleted, because its name would stand
/// for it.
///
/// # Errors
///
/// The repository failed, or it has an object of this name that is something else.
pub async fn store(
    place: &Place,
    segment: Segment,
    segment_bytes: u64,
    cut: Cut,
) -> Result<(), WalError> {
    let Cut { from, to, hash, content } = cut;
    let name = format!("{}{from:08X}-{to:08X}-{hash}", stem(segment, segment_bytes));
    let (object, _) = content.seal(place.keys(), &place.identity(Kind::Wal, &name), CHUNK_BYTES)?;
    let (object_bytes, stored_at) = (object.len() as u64, Utc::now());
    match place.put_sealed(Kind::Wal, &name, object).await {
        Ok(()) => Ok(()),
        // The same content, sealed with another salt by whoever was faster.
        Err(RepositoryError::Conflict { .. }) => {
            read(place, &Piece { segment, from, to, hash, name, object_bytes, stored_at }).await?;
            Ok(())
        }
        Err(RepositoryError::Store(error)) if error.kind == StoreErrorKind::Corrupt => {
            place.store().delete(&place.key(&name)).await.map_err(RepositoryError::from)?;
            Err(RepositoryError::from(error).into())
        }
        Err(error) => Err(error.into()),
    }
}

/// Reads an object's name; `None` if it is no piece.
fn parse(info: ObjectInfo, segment_bytes: u64) -> Option<Piece> {
    let rest = info.key.strip_prefix("partial/")?;
    let (segment, rest) = rest.split_once('.')?;
    let WalFile::Segment(segment) = WalFile::parse(segment, segment_bytes).ok()? else {
        return None;
    };
    let mut parts = rest.split('-');
    let mut number = || u64::from_str_radix(parts.next()?, 16).ok();
    let (from, to) = (number()?, number()?);
    let hash = parts.next()?.to_owned();
    (from < to && to <= segment_bytes).then_some(Piece {
        segment,
        from,
        to,
        hash,
        object_bytes: info.bytes,
        stored_at: info.modified_at,
        name: info.key,
    })
}

/// Lists the pieces of all segments.
///
/// # Errors
///
/// The store could not be asked.
pub async fn list(place: &Place, segment_bytes: u64) -> Result<Pieces, RepositoryError> {
    let mut pieces = Pieces::new();
    for piece in place.list("partial/", None, None).await? {
        if let Some(piece) = parse(piece, segment_bytes) {
            pieces.entry(piece.segment).or_default().push(piece);
        }
    }
    Ok(pieces)
}

/// Lists the pieces of one segment.
///
/// # Errors
///
/// The store could not be asked.
pub async fn list_of(
    place: &Place,
    segment: Segment,
    segment_bytes: u64,
) -> Result<Vec<Piece>, RepositoryError> {
    let listed = place.list(&stem(segment, segment_bytes), None, None).await?;
    Ok(listed.into_iter().filter_map(|info| parse(info, segment_bytes)).collect())
}

/// What a segment's pieces come to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cover<'a> {
    /// The fewest pieces that follow each other from the segment's first byte.
    pub chain: Vec<&'a Piece>,
    /// Where they end.
    pub to: u64,
    /// The furthest that any piece goes: beyond `to` if one is missing between.
    pub furthest: u64,
    /// All of them.
    pub pieces: &'a [Piece],
}

/// Follows the pieces of one segment from its first byte on.
pub fn cover(pieces: &[Piece]) -> Cover<'_> {
    let furthest = pieces.iter().map(|piece| piece.to).max().unwrap_or(0);
    let (mut chain, mut to) = (Vec::new(), 0);
    let next = |to| pieces.iter().filter(move |it| it.from <= to).max_by_key(|it| it.to);
    while let Some(piece) = next(to).filter(|piece| piece.to > to) {
        to = piece.to;
        chain.push(piece);
    }
    Cover { chain, to, furthest, pieces }
}

/// Puts a segment together from its pieces, zeros after the last, as a primary's own unfinished
/// segment looks. PostgreSQL replays it up to the first record that is not whole.
///
/// # Errors
///
/// The store failed; a piece is damaged or not what its name says; or two that overlap differ.
pub async fn stitch(
    place: &Place,
    segment: Segment,
    segment_bytes: u64,
    cover: &Cover<'_>,
) -> Result<Vec<u8>, WalError> {
    let mut content = vec![0; index(segment_bytes)];
    let mut written = 0;
    for piece in &cover.chain {
        let bytes = read(place, piece).await?;
        let overlap = index(written - piece.from).min(bytes.len());
        if content.get(index(piece.from)..index(piece.from) + overlap) != bytes.get(..overlap) {
            let name = segment.name(segment_bytes);
            return Err(WalError::Conflict { name, found: piece.name.clone() });
        }
        content[index(piece.from)..index(piece.to)].copy_from_slice(&bytes);
        written = piece.to;
    }
    // Those that the chain does without must be of the same content: their names tell.
    let differs = |piece: &&Piece| {
        let same = content.get(index(piece.from)..index(piece.to));
        piece.to <= written && same.is_some_and(|same| hash(piece.from, same) != piece.hash)
    };
    if let Some(piece) = cover.pieces.iter().find(differs) {
        let name = segment.name(segment_bytes);
        return Err(WalError::Conflict { name, found: piece.name.clone() });
    }
    let refuse = |source| WalError::Header { name: segment.name(segment_bytes), source };
    WalHeader::parse(&content)
        .and_then(|header| header.check(segment, segment_bytes, place.system_identifier))
        .map_err(refuse)?;
    Ok(content)
}

/// Fetches one piece.
///
/// # Errors
///
/// As [`stitch`].
pub async fn read(place: &Place, piece: &Piece) -> Result<Vec<u8>, WalError> {
    let object = place.store().get(&place.key(&piece.name)).await.map_err(RepositoryError::from)?;
    let mut content = Vec::new();
    open_each(place.keys(), &place.identity(Kind::Wal, &piece.name), &object, |chunk| {
        content.extend_from_slice(chunk);
        Ok::<_, WalError>(())
    })?;
    if content.len() as u64 != piece.to - piece.from || hash(piece.from, &content) != piece.hash {
        return Err(ContainerError::Misplaced { name: piece.name.clone() }.into());
    }
    Ok(content)
}

/// Deletes the pieces of a segment that is stored as a whole.
///
/// # Errors
///
/// The store failed; what is left is removed when receiving begins the next time.
pub async fn remove(
    place: &Place,
    segment: Segment,
    segment_bytes: u64,
) -> Result<(), RepositoryError> {
    for piece in list_of(place, segment, segment_bytes).await? {
        place.store().delete(&place.key(&piece.name)).await?;
    }
    Ok(())
}

/// A position within a segment, which fits into memory.
pub(super) fn index(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEGMENT: Segment = Segment { timeline: 1, number: 2 };

    fn piece(from: u64, to: u64) -> Piece {
        Piece {
            segment: SEGMENT,
            from,
            to,
            hash: String::new(),
            name: String::new(),
            object_bytes: 1,
            stored_at: DateTime::UNIX_EPOCH,
        }
    }

    #[test]
    fn pieces_count_as_far_as_they_follow_each_other() {
        type Case = (&'static str, &'static [(u64, u64)], u64, u64, usize);
        let cases: [Case; 7] = [
            ("none", &[], 0, 0, 0),
            ("one", &[(0, 10)], 10, 10, 1),
            ("in order", &[(0, 10), (10, 30), (30, 31)], 31, 31, 3),
            ("the first is missing", &[(10, 30)], 0, 30, 0),
            ("one is missing between", &[(0, 10), (20, 30)], 10, 30, 1),
            ("a larger one stands for smaller ones", &[(0, 10), (0, 30), (10, 20)], 30, 30, 1),
            ("two writers cut differently", &[(0, 10), (5, 25), (10, 20), (20, 40)], 40, 40, 3),
        ];
        for (case, stretches, to, furthest, chain) in cases {
            let pieces: Vec<_> = stretches.iter().map(|(from, to)| piece(*from, *to)).collect();
            let cover = cover(&pieces);
            assert_eq!(
                (cover.to, cover.furthest, cover.chain.len()),
                (to, furthest, chain),
                "{case}"
            );
        }
    }

    #[test]
    fn a_name_says_segment_place_and_hash_and_nothing_else_is_a_piece() {
        let info = |key: &str| ObjectInfo {
            key: key.to_owned(),
            bytes: 1,
            modified_at: DateTime::UNIX_EPOCH,
        };
        let name = "partial/000000010000000000000002.00000000-00040000-0123456789abcdef";
        let read = parse(info(name), 16 << 20).unwrap();
        assert_eq!(
            (read.segment, read.from, read.to, read.hash.as_str()),
            (SEGMENT, 0, 0x4_0000, "0123456789abcdef")
        );
        for other in [
            "partial/000000010000000000000002.partial-0123456789abcdef",
            "partial/000000010000000000000002.00040000-00000000-0123456789abcdef",
            "partial/000000010000000000000002.00000000-01000001-0123456789abcdef",
            "partial/00000001000000000000000.00000000-00040000-0123456789abcdef",
        ] {
            assert_eq!(parse(info(other), 16 << 20), None, "{other}");
        }
    }
}
