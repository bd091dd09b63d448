//! Pieces of a segment that is still growing, and the segment stitched from them.
//!
//! A piece is `[from, to)` of a segment, in bytes. Its name has its place and the hash of its
//! content, so two writers of the same stretch cannot overwrite each other. Larger pieces replace
//! small ones that they hold, and complete segments replace all.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use futures_util::stream::{self, StreamExt, TryStreamExt};
use shared::pg::wal::{Segment, WalFile, WalHeader};
use shared::store::{ObjectInfo, StoreError, StoreErrorKind};
use shared::telemetry::chain;
use tracing::warn;

use super::{CHUNK_BYTES, ContentHash, LISTS_MAX, WalError, find, is_hash};
use crate::container::{Compressed, ContainerError, Kind, open_each};
use crate::repository::{Place, RepositoryError};

/// So many small pieces are replaced by a larger one: a piece a second makes one a minute.
const SMALL_MAX: usize = 64;
/// Larger pieces begin at multiples of this part of a segment, or of [`WIDE_BYTES_MIN`].
const WIDE_DIVISOR: u64 = 64;
/// The same for small segments: 256 KiB would be stored hardly larger than its pieces.
const WIDE_BYTES_MIN: u64 = 1 << 20;

/// So many pieces are more than segments under way have: one request lists them.
const MANY: usize = 1000;

/// Pieces that are read at once.
const AT_ONCE: usize = 8;

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
    /// When it was stored, by the store's clock or its own word (see `times.rs`): nothing in it is
    /// younger.
    pub stored_at: DateTime<Utc>,
}

impl Piece {
    /// Whether it is what a whole segment has in its place.
    pub fn is_of(&self, segment: &[u8]) -> bool {
        let stretch = segment.get(index(self.from)..index(self.to));
        stretch.is_some_and(|stretch| self.is_stretch(stretch))
    }

    /// Whether that is its content.
    pub(super) fn is_stretch(&self, content: &[u8]) -> bool {
        content.len() as u64 == self.to - self.from && hash(self.from, content) == self.hash
    }

    /// What tells it from others of its segment.
    pub fn mark(&self) -> Mark {
        (self.from, self.to, self.hash.clone())
    }
}

/// A piece of a known segment: where it begins, where it ends, and its hash.
pub type Mark = (u64, u64, String);

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
    /// Whether it stands for many that are stored, which may go once it was read back.
    pub replaces: bool,
    pub(super) hash: String,
    pub(super) content: Compressed,
}

/// Decides where the next piece, up to `to`, begins so that it stands for many that are stored;
/// `None` while they are few. `starts` is where each of those begins, those within one chunk in any order.
///
/// Large pieces begin at few places, and those that begin at one replace each other. So a segment
/// never needs more pieces than there are such places and [`SMALL_MAX`].
pub(super) fn widened(starts: &[u64], to: u64, segment_bytes: u64) -> Option<u64> {
    let wide = (segment_bytes / WIDE_DIVISOR).max(WIDE_BYTES_MIN);
    if starts.len() < SMALL_MAX + index(to.div_ceil(wide)) {
        return None;
    }
    let from = starts[starts.len() - SMALL_MAX];
    Some(from - from % wide)
}

/// The prefix of the names of a segment's pieces.
fn stem(segment: Segment, segment_bytes: u64) -> String {
    format!("partial/{}.", segment.name(segment_bytes))
}

/// The name of the object that a piece becomes.
pub(crate) fn name(segment: Segment, segment_bytes: u64, cut: &Cut) -> String {
    let Cut { from, to, hash, .. } = cut;
    format!("{}{from:08X}-{to:08X}-{hash}", stem(segment, segment_bytes))
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
) -> Result<Piece, WalError> {
    let name = name(segment, segment_bytes, &cut);
    let Cut { from, to, replaces: _, hash, content } = cut;
    let (object, _) = content.seal(place.keys(), &place.identity(Kind::Wal, &name), CHUNK_BYTES)?;
    let (object_bytes, stored_at) = (object.len() as u64, Utc::now());
    let piece = Piece { segment, from, to, hash, name, object_bytes, stored_at };
    match place.put_sealed(Kind::Wal, &piece.name, object).await {
        Ok(()) => Ok(piece),
        // The same content, sealed with another salt by whoever was faster.
        Err(RepositoryError::Conflict { .. }) => read(place, &piece).await.map(|_| piece),
        Err(RepositoryError::Store(error)) if error.kind == StoreErrorKind::Corrupt => {
            delete(place, &piece).await?;
            Err(RepositoryError::from(error).into())
        }
        Err(error) => Err(error.into()),
    }
}

/// Stores a piece that is to replace others, and reads it back; returns its content too. One that
/// does not come back as it was is deleted.
///
/// # Errors
///
/// As [`store`]; or the store does not give back what it was given.
pub async fn store_and_read(
    place: &Place,
    segment: Segment,
    segment_bytes: u64,
    cut: Cut,
) -> Result<(Piece, Vec<u8>), WalError> {
    let piece = store(place, segment, segment_bytes, cut).await?;
    match read(place, &piece).await {
        Ok(content) => Ok((piece, content)),
        Err(WalError::Repository(error)) if !error.is_damage() => Err(error.into()),
        Err(source) => {
            delete(place, &piece).await?;
            Err(WalError::DamagedCopy { name: piece.name, source: Box::new(source) })
        }
    }
}

async fn delete(place: &Place, piece: &Piece) -> Result<(), RepositoryError> {
    Ok(place.store().delete(&place.key(&piece.name)).await?)
}

/// Reads an object's name; `None` if it is no piece.
pub(super) fn parse(info: ObjectInfo, segment_bytes: u64) -> Option<Piece> {
    let rest = info.key.strip_prefix("partial/")?;
    let (segment, rest) = rest.split_once('.')?;
    let WalFile::Segment(segment) = WalFile::parse(segment, segment_bytes).ok()? else {
        return None;
    };
    let mut parts = rest.split('-');
    let mut number = || u64::from_str_radix(parts.next()?, 16).ok();
    let (from, to) = (number()?, number()?);
    let hash = parts.next().filter(|hash| is_hash(hash))?.to_owned();
    (from < to && to <= segment_bytes && parts.next().is_none()).then_some(Piece {
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
    Ok(by_segment(settled(place, "partial/", None).await?, segment_bytes))
}

/// Lists the pieces that are there for a reason; and of a store that keeps what was replaced, where
/// that comes to more than anybody can list, only those of each timeline from `first` on: a name's
/// first 16 digits.
///
/// # Errors
///
/// The store could not be asked.
pub async fn list_since(
    place: &Place,
    segment_bytes: u64,
    first: &BTreeMap<u32, String>,
) -> Result<Pieces, RepositoryError> {
    if place.list("partial/", None, Some(MANY)).await?.len() < MANY {
        return list(place, segment_bytes).await;
    }
    let mut found = Vec::new();
    let newest = first.keys().last().copied().unwrap_or(0);
    for timeline in 1..=newest {
        let prefix = format!("partial/{timeline:08X}");
        let after = first.get(&timeline).map(|first| format!("partial/{first}"));
        found.extend(settled(place, &prefix, after.as_deref()).await?);
    }
    let newer = format!("partial/{newest:08X}G");
    found.extend(settled(place, "partial/", Some(&newer)).await?);
    Ok(by_segment(found, segment_bytes))
}

fn by_segment(listed: Vec<ObjectInfo>, segment_bytes: u64) -> Pieces {
    let mut pieces = Pieces::new();
    for piece in listed.into_iter().filter_map(|info| parse(info, segment_bytes)) {
        pieces.entry(piece.segment).or_default().push(piece);
    }
    pieces
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
    let listed = settled(place, &stem(segment, segment_bytes), None).await?;
    Ok(listed.into_iter().filter_map(|info| parse(info, segment_bytes)).collect())
}

/// Lists the pieces of one segment beside a complete one: those that vanish meanwhile were of it.
///
/// # Errors
///
/// The store could not be asked.
pub async fn list_once(
    place: &Place,
    segment: Segment,
    segment_bytes: u64,
) -> Result<Vec<Piece>, RepositoryError> {
    let listed = place.list(&stem(segment, segment_bytes), None, None).await?;
    Ok(listed.into_iter().filter_map(|info| parse(info, segment_bytes)).collect())
}

/// Lists until nothing vanishes between two lists. A piece is stored before those that it replaces
/// go; but a list that is past its place by then, and not yet at theirs, has neither.
async fn settled(
    place: &Place,
    prefix: &str,
    after: Option<&str>,
) -> Result<Vec<ObjectInfo>, RepositoryError> {
    let mut before = place.list(prefix, after, None).await?;
    for _ in 1..LISTS_MAX {
        let now = place.list(prefix, after, None).await?;
        if !has_vanished(&before, &now) {
            return Ok(now);
        }
        before = now;
    }
    Err(RepositoryError::Store(StoreError {
        operation: "list",
        key: place.key(prefix),
        kind: StoreErrorKind::Unavailable,
        source: format!("pieces vanished between each two of {LISTS_MAX} lists").into(),
    }))
}

/// Whether the later of two lists, which are in order, lacks anything of the earlier.
fn has_vanished(before: &[ObjectInfo], now: &[ObjectInfo]) -> bool {
    before.iter().any(|it| now.binary_search_by(|other| other.key.cmp(&it.key)).is_err())
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
    let chain = follow(pieces, 0, u64::MAX);
    let to = chain.last().map_or(0, |piece| piece.to);
    Cover { chain, to, furthest, pieces }
}

/// The fewest pieces that follow each other and have `[from, to)`, as far as there are any.
pub fn follow(pieces: &[Piece], from: u64, to: u64) -> Vec<&Piece> {
    let (mut chain, mut at) = (Vec::new(), from);
    let next = |at| pieces.iter().filter(move |it| it.from <= at).max_by_key(|it| it.to);
    while at < to
        && let Some(piece) = next(at).filter(|piece| piece.to > at)
    {
        at = piece.to;
        chain.push(piece);
    }
    chain
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
    stitch_named(place, segment, segment_bytes, cover, &mut String::new()).await
}

/// As [`stitch`], of pieces that are not damaged: the smaller ones of a larger piece may be there still.
/// Goes as far as if none was.
///
/// # Errors
///
/// As [`stitch`]: nothing else has what is in a damaged piece.
pub async fn stitch_whole(
    place: &Place,
    segment: Segment,
    segment_bytes: u64,
    pieces: &[Piece],
) -> Result<Vec<u8>, WalError> {
    let (mut whole, mut last) = (pieces.to_vec(), String::new());
    loop {
        // The names of those that are damaged tell as well what must be there.
        let without = Cover { pieces, ..cover(&whole) };
        let stitched = stitch_named(place, segment, segment_bytes, &without, &mut last).await;
        let Err(error) = stitched else { return stitched };
        let before = whole.len();
        whole.retain(|piece| piece.name != last);
        let is_replaced = whole.len() < before && cover(&whole).to == cover(pieces).to;
        if !error.is_damage() || !is_replaced {
            return Err(error);
        }
        warn!(piece = last, error = %chain(&error), "damaged piece of WAL left out: others have it");
    }
}

/// As [`stitch`]; `last` is the name of the piece that was read last.
async fn stitch_named(
    place: &Place,
    segment: Segment,
    segment_bytes: u64,
    cover: &Cover<'_>,
    last: &mut String,
) -> Result<Vec<u8>, WalError> {
    let mut content = vec![0; index(segment_bytes)];
    let mut written = 0;
    let reads: Vec<_> = cover.chain.iter().map(|piece| read(place, piece)).collect();
    let mut reads = stream::iter(reads).buffered(AT_ONCE);
    for piece in &cover.chain {
        last.clone_from(&piece.name);
        let Some(bytes) = reads.try_next().await? else { break };
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
    let object = super::get(place, &piece.name).await?;
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

/// Whether a piece that is not there any more was replaced, and not lost.
///
/// # Errors
///
/// The store could not be asked.
pub async fn is_replaced(
    place: &Place,
    piece: &Piece,
    segment_bytes: u64,
) -> Result<bool, RepositoryError> {
    // In this order: a complete segment is stored before its pieces go.
    let pieces = list_of(place, piece.segment, segment_bytes).await?;
    if pieces.iter().any(|other| other.name == piece.name) {
        return Ok(false);
    }
    let complete = find(place, &piece.segment.name(segment_bytes)).await?;
    Ok(!complete.is_empty() || cover(&pieces).to >= piece.to)
}

/// Deletes those pieces of a segment that is stored as a whole which are known to be of it. Another
/// one stays: nobody knows which is right.
///
/// # Errors
///
/// The store failed; what is left is removed when receiving begins the next time.
pub async fn remove(
    place: &Place,
    segment: Segment,
    segment_bytes: u64,
    known: &[Mark],
) -> Result<(), RepositoryError> {
    let mut pieces = list_once(place, segment, segment_bytes).await?;
    pieces.retain(|piece| known.contains(&piece.mark()));
    delete_each(place, pieces).await
}

/// Deletes the pieces that `larger` stands for, whose `content` was read back. One that differs from
/// it stays: nobody knows which is right.
///
/// # Errors
///
/// The store failed; what is left goes with the next one, or with the rest.
pub async fn remove_within(
    place: &Place,
    segment_bytes: u64,
    larger: &Piece,
    content: &[u8],
) -> Result<(), RepositoryError> {
    let listed = place.list(&stem(larger.segment, segment_bytes), None, None).await?;
    let pieces = listed.into_iter().filter_map(|info| parse(info, segment_bytes));
    delete_each(place, pieces.filter(|piece| is_within(piece, larger, content)).collect()).await
}

/// Whether all of a piece is in another one's content.
fn is_within(piece: &Piece, larger: &Piece, content: &[u8]) -> bool {
    let from = piece.from.checked_sub(larger.from).map(index);
    let within = from.and_then(|from| content.get(from..)?.get(..index(piece.to - piece.from)));
    piece.name != larger.name && within.is_some_and(|within| hash(piece.from, within) == piece.hash)
}

async fn delete_each(place: &Place, pieces: Vec<Piece>) -> Result<(), RepositoryError> {
    let keys = pieces.iter().map(|piece| place.key(&piece.name)).collect();
    Ok(place.store().delete_all(keys).await?)
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

    /// The larger piece `a.2` takes the place of `a.1`, `b` and `c`.
    #[test]
    fn a_list_counts_once_nothing_vanishes_before_the_next() {
        let list = |keys: &[&str]| -> Vec<ObjectInfo> {
            let info = |key: &&str| ObjectInfo {
                key: (*key).to_owned(),
                bytes: 1,
                modified_at: DateTime::UNIX_EPOCH,
            };
            keys.iter().map(info).collect()
        };
        for (case, before, now, expected) in [
            ("nothing", list(&[]), list(&[]), false),
            ("the same", list(&["a.1", "b"]), list(&["a.1", "b"]), false),
            ("one more", list(&["a.1", "b"]), list(&["a.1", "b", "c"]), false),
            ("past the larger one, and then all went", list(&["a.1"]), list(&["a.2"]), true),
            ("the larger one is there", list(&["a.2", "d"]), list(&["a.2", "d", "e"]), false),
            ("all went", list(&["a.1"]), list(&[]), true),
        ] {
            assert_eq!(has_vanished(&before, &now), expected, "{case}");
        }
    }

    #[test]
    fn a_stretch_needs_only_the_pieces_around_it() {
        type Case = (&'static str, u64, u64, &'static [(u64, u64)]);
        let stored = [(0, 10), (10, 30), (0, 30), (30, 31), (31, 50), (60, 70)];
        let pieces: Vec<_> = stored.iter().map(|(from, to)| piece(*from, *to)).collect();
        let cases: [Case; 5] = [
            ("the last", 40, 50, &[(31, 50)]),
            ("two", 30, 35, &[(30, 31), (31, 50)]),
            ("within a large one", 12, 30, &[(0, 30)]),
            ("not all is there", 49, 55, &[(31, 50)]),
            ("none is there", 55, 60, &[]),
        ];
        for (case, from, to, expected) in cases {
            let chain = follow(&pieces, from, to);
            let found: Vec<_> = chain.iter().map(|piece| (piece.from, piece.to)).collect();
            assert_eq!(found, expected, "{case}");
        }
    }

    #[test]
    fn many_pieces_are_followed_by_one_that_stands_for_them() {
        type Case = (&'static str, Vec<u64>, u64, u64, Option<u64>);
        const MIB: u64 = 1 << 20;
        let small = |count: u64, from: u64| (0..count).map(move |n| from + n * 100);
        let large = |count: u64| (0..count).map(|n| n * MIB);
        let cases: [Case; 7] = [
            ("none", vec![], 100, 16 * MIB, None),
            ("few", small(64, 0).collect(), 6400, 16 * MIB, None),
            ("many", small(65, 0).collect(), 6500, 16 * MIB, Some(0)),
            ("a large one and few", large(1).chain(small(63, 900)).collect(), 7200, 16 * MIB, None),
            (
                "small ones after large ones",
                large(10).chain(small(64, 10 * MIB)).collect(),
                10 * MIB + 6400,
                16 * MIB,
                None,
            ),
            (
                "many after large ones: those that begin there stay",
                large(10).chain(small(65, 9 * MIB + 5000)).collect(),
                9 * MIB + 20_000,
                16 * MIB,
                Some(9 * MIB),
            ),
            (
                "large segments have larger ones",
                small(128, 17 * MIB).collect(),
                20 * MIB,
                1024 * MIB,
                Some(16 * MIB),
            ),
        ];
        for (case, chain, to, segment_bytes, expected) in cases {
            assert_eq!(widened(&chain, to, segment_bytes), expected, "{case}");
        }
    }

    #[test]
    fn a_piece_is_within_another_of_the_same_content_only() {
        let content: Vec<u8> = (0_u32..200_000).flat_map(u32::to_le_bytes).collect();
        let of = |from: u64, to: u64| Piece {
            hash: hash(from, &content[index(from)..index(to)]),
            name: format!("{from}-{to}"),
            ..piece(from, to)
        };
        let larger = of(1000, 700_000);
        let part = &content[1000..700_000];
        for (from, to, expected) in [
            (1000, 2000, true),
            (5, 2000, false),
            (300_000, 600_000, true),
            (699_999, 700_000, true),
            (699_999, 700_001, false),
            (1000, 700_000, false),
        ] {
            assert_eq!(is_within(&of(from, to), &larger, part), expected, "{from} to {to}");
        }
        let other = Piece { hash: "0".repeat(16), ..of(1000, 2000) };
        assert!(!is_within(&other, &larger, part));
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
            "partial/000000010000000000000002.00000000-00040000-0123456789abcdef.tmp",
            "partial/000000010000000000000002.00000000-00040000-0123456789abcdef-x",
            "partial/000000010000000000000002.00000000-00040000-0123",
        ] {
            assert_eq!(parse(info(other), 16 << 20), None, "{other}");
        }
    }
}
