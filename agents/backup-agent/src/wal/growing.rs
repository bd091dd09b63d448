//! The segment that is being received: compressed as it grows, cut into pieces, and packed when it
//! is complete. No I/O.
//!
//! Each stretch of 256 KiB is compressed once: the piece that has it and the complete
//! segment share the result. Only what is shipped before its stretch is full costs twice: it is in a
//! piece of the stretch's beginning, and again in the next one, which has the stretch from its start.
//!
//! A slow server's segment would come to thousands of pieces. So each time there are many, the next
//! one begins further back, where it stands for most of them.

use shared::pg::wal::Segment;

use super::piece::{Cut, Mark, Piece, cover, hash, index, stretch_hash, widened};
use super::{CHUNK_BYTES, Checked, ContentHash, Packed, WalError};
use crate::container::Compressed;

const CHUNK: u64 = CHUNK_BYTES as u64;

/// A segment under way.
#[derive(Debug)]
pub struct Growing {
    segment: Segment,
    segment_bytes: u64,
    level: i32,
    checked: Checked,
    /// The full chunks.
    chunks: Compressed,
    /// The hash of each.
    hashes: Vec<[u8; 32]>,
    /// What is after them.
    tail: Vec<u8>,
    /// How far the repository has it, in bytes.
    shipped: u64,
    /// Where each of the pieces begins that the repository has of it.
    pieces: Vec<u64>,
    /// What the repository has and the server sends again, until the two have been compared.
    resumed: Option<Resumed>,
    /// The pieces that were compared or cut: what they have is in this segment.
    known: Vec<Mark>,
    /// The repository has it as a whole, and the server sends it again to be compared.
    is_again: bool,
}

#[derive(Debug)]
struct Resumed {
    pieces: Vec<Piece>,
    content: Vec<u8>,
}

impl Growing {
    /// Begins a segment of which the repository has `pieces`.
    ///
    /// # Errors
    ///
    /// The segment's name cannot be one.
    pub fn new(
        segment: Segment,
        segment_bytes: u64,
        level: i32,
        pieces: Vec<Piece>,
    ) -> Result<Self, WalError> {
        let shipped = cover(&pieces).to;
        // One after a stretch that is missing counts for nothing.
        let starts = pieces.iter().map(|piece| piece.from).filter(|from| *from < shipped);
        let mut starts: Vec<_> = starts.collect();
        starts.sort_unstable();
        let resumed = (shipped > 0).then_some(Resumed { pieces, content: Vec::new() });
        Ok(Self {
            segment,
            segment_bytes,
            level,
            checked: Checked::new(&segment.name(segment_bytes))?,
            chunks: Compressed::default(),
            hashes: Vec::new(),
            tail: Vec::new(),
            shipped,
            pieces: starts,
            resumed,
            known: Vec::new(),
            is_again: false,
        })
    }

    /// Begins a segment that the repository has as a whole: to be compared.
    ///
    /// # Errors
    ///
    /// As [`Growing::new`].
    pub fn again(segment: Segment, segment_bytes: u64, level: i32) -> Result<Self, WalError> {
        let new = Self::new(segment, segment_bytes, level, Vec::new())?;
        Ok(Self { shipped: segment_bytes, is_again: true, ..new })
    }

    /// The segment.
    pub fn segment(&self) -> Segment {
        self.segment
    }

    /// Bytes received.
    pub fn at(&self) -> u64 {
        self.hashes.len() as u64 * CHUNK + self.tail.len() as u64
    }

    /// Bytes that the repository has.
    pub fn shipped(&self) -> u64 {
        self.shipped
    }

    /// Whether what the repository had at the start is what the server has.
    pub fn is_compared(&self) -> bool {
        self.resumed.is_none() && !self.is_again
    }

    /// Bytes received that the repository has not.
    pub fn waiting(&self) -> u64 {
        self.at().saturating_sub(self.shipped)
    }

    /// Whether all of it was received.
    pub fn is_complete(&self) -> bool {
        self.at() == self.segment_bytes
    }

    /// Takes what belongs to this segment off the front of `data`; returns how much that was.
    ///
    /// # Errors
    ///
    /// The content is not of this segment, or not what the repository has of it.
    pub fn take(&mut self, data: &[u8]) -> Result<usize, WalError> {
        let room = index(self.segment_bytes - self.at());
        let (taken, _) = data.split_at(data.len().min(room));
        let mut rest = taken;
        while !rest.is_empty() {
            let room = CHUNK_BYTES as usize - self.tail.len();
            let (part, after) = rest.split_at(rest.len().min(room));
            self.tail.extend_from_slice(part);
            if self.tail.len() == CHUNK_BYTES as usize {
                self.end_chunk()?;
            }
            rest = after;
        }
        self.compare(taken)?;
        Ok(taken.len())
    }

    fn end_chunk(&mut self) -> Result<(), WalError> {
        self.checked.take(&self.tail)?;
        self.push_chunk()?;
        self.hashes.push(stretch_hash(&self.tail));
        self.tail.clear();
        Ok(())
    }

    fn push_chunk(&mut self) -> Result<(), WalError> {
        self.chunks.push(&self.tail, self.level).map_err(|reason| self.failed(reason))
    }

    /// Compares what comes again with what the repository has of it.
    fn compare(&mut self, taken: &[u8]) -> Result<(), WalError> {
        let at = self.at();
        let Some(resumed) = &mut self.resumed else { return Ok(()) };
        resumed.content.extend_from_slice(taken);
        if at < self.shipped {
            return Ok(());
        }
        let differs = |piece: &&Piece| {
            let content = resumed.content.get(index(piece.from)..index(piece.to));
            content.is_some_and(|content| hash(piece.from, content) != piece.hash)
        };
        if let Some(piece) = resumed.pieces.iter().find(differs) {
            let name = self.segment.name(self.segment_bytes);
            return Err(WalError::Conflict { name, found: piece.name.clone() });
        }
        let compared = resumed.pieces.iter().filter(|it| it.to <= resumed.content.len() as u64);
        self.known.extend(compared.map(Piece::mark));
        self.resumed = None;
        Ok(())
    }

    /// Cuts the next piece, up to the last full chunk, or with `all` to the end; `None` if nothing waits
    /// there. A chunk of which a part was shipped and that is full by now is in it as a whole, because
    /// it is compressed already.
    ///
    /// # Errors
    ///
    /// What zstd said.
    pub fn cut(&mut self, all: bool) -> Result<Option<Cut>, WalError> {
        let full = self.hashes.len() as u64 * CHUNK;
        let to = if all { self.at() } else { full };
        if self.shipped >= to || self.resumed.is_some() {
            return Ok(None);
        }
        let wide = widened(&self.pieces, to, self.segment_bytes);
        let cut = if wide.is_none() && self.shipped >= full {
            self.cut_tail(index(self.shipped - full))?
        } else {
            let from = wide.unwrap_or(self.shipped - self.shipped % CHUNK);
            self.cut_chunks(from, to, wide.is_some())?
        };
        self.known.push((cut.from, cut.to, cut.hash.clone()));
        Ok(Some(cut))
    }

    /// A piece that begins with a full chunk and ends after one, or with all there is.
    fn cut_chunks(&self, from: u64, to: u64, replaces: bool) -> Result<Cut, WalError> {
        let first = index(from / CHUNK);
        let mut of_hashes = ContentHash::default();
        self.hashes.iter().skip(first).for_each(|hash| of_hashes.update(hash));
        let mut content = self.chunks.after(first, CHUNK);
        if !to.is_multiple_of(CHUNK) {
            of_hashes.update(&stretch_hash(&self.tail));
            content.push(&self.tail, self.level).map_err(|reason| self.failed(reason))?;
        }
        Ok(Cut { from, to, replaces, hash: of_hashes.in_name(), content })
    }

    /// A piece of the chunk that is not full, without its first `skipped` bytes.
    fn cut_tail(&self, skipped: usize) -> Result<Cut, WalError> {
        let raw = self.tail.get(skipped..).unwrap_or_default();
        let mut content = Compressed::default();
        content.push(raw, self.level).map_err(|reason| self.failed(reason))?;
        let (to, replaces) = (self.at(), false);
        let from = to - raw.len() as u64;
        Ok(Cut { from, to, replaces, hash: hash(from, raw), content })
    }

    /// Notes that a piece is stored, and whether it replaces those within it.
    pub fn ship(&mut self, from: u64, to: u64, replaces: bool) {
        if replaces {
            self.pieces.retain(|other| *other < from);
        }
        self.pieces.push(from);
        self.shipped = self.shipped.max(to);
    }

    /// Packs the complete segment; returns the pieces that are known to be of it, too.
    ///
    /// # Errors
    ///
    /// It is not complete, or its header and its name differ.
    pub fn pack(self) -> Result<(Packed, Vec<Mark>), WalError> {
        let file = self.segment.name(self.segment_bytes);
        let mut hash = ContentHash::default();
        self.hashes.iter().for_each(|of_chunk| hash.update(of_chunk));
        let (hash, header) = (hash.in_name(), self.checked.finish()?);
        Ok((Packed { file, hash, content: self.chunks, header }, self.known))
    }

    fn failed(&self, reason: String) -> WalError {
        let name = self.segment.name(self.segment_bytes);
        WalError::Read { name, source: std::io::Error::other(reason) }
    }
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;

    use super::*;

    const SEGMENT_BYTES: u64 = 1 << 20;
    const SEGMENT: Segment = Segment { timeline: 1, number: 2 };

    /// A segment with the header of a real one.
    fn content() -> Vec<u8> {
        let mut content: Vec<u8> = (0_u32..1 << 18).flat_map(|n| (n / 7).to_le_bytes()).collect();
        let (magic, long_header) = (0xD116_u16, 2_u16);
        content[..2].copy_from_slice(&magic.to_le_bytes());
        content[2..4].copy_from_slice(&long_header.to_le_bytes());
        content[4..8].copy_from_slice(&SEGMENT.timeline.to_le_bytes());
        content[8..16].copy_from_slice(&(SEGMENT.number * SEGMENT_BYTES).to_le_bytes());
        content[16..24].fill(0);
        content[24..32].copy_from_slice(&7_u64.to_le_bytes());
        content[32..36].copy_from_slice(&(1_u32 << 20).to_le_bytes());
        content[36..40].copy_from_slice(&8192_u32.to_le_bytes());
        content
    }

    fn piece(cut: &Cut) -> Piece {
        Piece {
            segment: SEGMENT,
            from: cut.from,
            to: cut.to,
            hash: cut.hash.clone(),
            name: format!("{}-{}", cut.from, cut.to),
            object_bytes: 1,
            stored_at: DateTime::UNIX_EPOCH,
        }
    }

    /// Feeds `content` from the start, `step` bytes at a time, and ships what is due after each.
    fn grow(growing: &mut Growing, content: &[u8], step: usize, all: bool) -> Vec<Piece> {
        let mut pieces = Vec::new();
        for data in content.chunks(step) {
            assert_eq!(growing.take(data).unwrap(), data.len());
            while let Some(cut) = growing.cut(all).unwrap() {
                growing.ship(cut.from, cut.to, cut.replaces);
                pieces.push(piece(&cut));
            }
        }
        pieces
    }

    fn empty(pieces: Vec<Piece>) -> Growing {
        Growing::new(SEGMENT, SEGMENT_BYTES, 1, pieces).unwrap()
    }

    fn name_of(growing: Growing) -> String {
        growing.pack().unwrap().0.hash
    }

    #[test]
    fn pieces_follow_each_other_and_the_whole_is_what_the_file_would_be() {
        let content = content();
        let file = SEGMENT.name(SEGMENT_BYTES);
        let expected = Packed::read(&file, content.as_slice(), 1).unwrap();
        for (step, all) in [(1000, true), (1000, false), (200_000, true), (300_000, false)] {
            let mut growing = empty(Vec::new());
            let pieces = grow(&mut growing, &content, step, all);
            let mut at = 0;
            for piece in &pieces {
                assert!(piece.from <= at && at < piece.to, "step {step}, all {all}");
                let raw = &content[index(piece.from)..index(piece.to)];
                assert_eq!(piece.hash, hash(piece.from, raw), "step {step}, all {all}");
                at = piece.to;
            }
            assert_eq!(at, SEGMENT_BYTES, "step {step}, all {all}");
            assert!(growing.is_complete() && growing.waiting() == 0);
            assert_eq!(growing.pack().unwrap().0, expected, "step {step}, all {all}");
        }
    }

    /// Whatever the pieces are cut to, and wherever the agent begins again.
    #[test]
    fn a_segment_never_has_many_pieces() {
        let content = content();
        for step in [300, 1000, 5000] {
            let mut growing = empty(Vec::new());
            let (mut stored, mut cuts, mut larger) = (Vec::<Piece>::new(), 0, 0);
            for (count, data) in content.chunks(step).enumerate() {
                growing.take(data).unwrap();
                while let Some(cut) = growing.cut(true).unwrap() {
                    (cuts, larger) = (cuts + 1, larger + u32::from(cut.replaces));
                    assert!(cut.from <= growing.shipped(), "step {step}");
                    growing.ship(cut.from, cut.to, cut.replaces);
                    if cut.replaces {
                        stored.retain(|it| it.from < cut.from);
                    }
                    stored.push(piece(&cut));
                    assert!(stored.len() <= 65, "step {step}: {} pieces", stored.len());
                }
                assert_eq!(cover(&stored).to, growing.at());
                if count % 500 == 499 && !growing.is_complete() {
                    growing = empty(stored.clone());
                    growing.take(&content[..(count + 1) * step]).unwrap();
                    assert!(growing.is_compared() && growing.cut(true).unwrap().is_none());
                }
            }
            assert_eq!(larger, (cuts - 1) / 65, "step {step}");
        }
    }

    /// A piece of a chunk's beginning was under way when the chunk became full.
    #[test]
    fn what_comes_while_a_piece_is_under_way_is_cut_next() {
        let content = content();
        for (first, second) in [(100, 300_000), (262_144, 262_244), (262_244, 600_000)] {
            let mut growing = empty(Vec::new());
            growing.take(&content[..first]).unwrap();
            let mut at = 0;
            let mut under_way = growing.cut(true).unwrap();
            growing.take(&content[first..second]).unwrap();
            while let Some(cut) = under_way {
                assert!(cut.from <= at && at < cut.to);
                let raw = &content[index(cut.from)..index(cut.to)];
                assert_eq!(cut.hash, hash(cut.from, raw));
                at = cut.to;
                growing.ship(cut.from, cut.to, cut.replaces);
                under_way = growing.cut(true).unwrap();
            }
            assert_eq!(index(at), second);
        }
    }

    #[test]
    fn what_is_sent_again_is_compared_and_not_shipped_again() {
        let content = content();
        let (first, _) = content.split_at(600_000);
        let stored = grow(&mut empty(Vec::new()), first, 70_000, true);
        let mut growing = empty(stored.clone());
        assert!(!growing.is_compared());
        assert!(grow(&mut growing, &first[..500_000], 9_999, true).is_empty());
        let pieces = grow(&mut growing, &content[500_000..], 9_999, true);
        assert!(growing.is_compared());
        assert_eq!(pieces[0].from, 600_000);
        assert_eq!(
            name_of(growing),
            name_of({
                let mut whole = empty(Vec::new());
                grow(&mut whole, &content, 1 << 20, false);
                whole
            })
        );

        let mut other = content;
        other[599_999] ^= 1;
        let mut growing = empty(stored);
        let refused = other.chunks(9_999).find_map(|data| growing.take(data).err()).unwrap();
        assert!(refused.to_string().starts_with("CONFLICT"), "{refused}");
    }

    #[test]
    fn a_segment_takes_no_more_than_is_its_own() {
        let mut data = content();
        data.extend([1; 100]);
        let mut growing = empty(Vec::new());
        assert_eq!(growing.take(&data).unwrap(), 1 << 20);
        assert_eq!(growing.take(&data[1 << 20..]).unwrap(), 0);
    }
}
