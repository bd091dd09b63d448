//! What may be stored, for the tests of this crate.

use chrono::{DateTime, Utc};
use shared::pg::wal::Segment;

use super::piece::Piece;
use super::{WalMap, WalObject};

/// Bytes of a segment.
pub(crate) const SEGMENT: u64 = 16 << 20;

/// So many seconds after the epoch.
pub(crate) fn at(second: u64) -> DateTime<Utc> {
    DateTime::from_timestamp(i64::try_from(second).unwrap(), 0).unwrap()
}

/// Complete segments (timeline, number) of 10 bytes, and pieces (timeline, number, end) of 1 byte from
/// a segment's start, each stored so many seconds after the epoch as its segment's number says.
pub(crate) fn stored(complete: &[(u32, u64)], pieces: &[(u32, u64, u64)]) -> WalMap {
    let mut map = WalMap { segment_bytes: SEGMENT, ..WalMap::default() };
    for (timeline, number) in complete {
        let wal = WalObject {
            name: String::new(),
            file: String::new(),
            hash: String::new(),
            object_bytes: 10,
            stored_at: at(*number),
        };
        map.segments.entry(*timeline).or_default().insert(*number, vec![wal]);
    }
    for (timeline, number, to) in pieces {
        let segment = Segment { timeline: *timeline, number: *number };
        let (from, hash, name) = (0, String::new(), String::new());
        let (object_bytes, stored_at) = (1, at(*number));
        let piece = Piece { segment, from, to: *to, hash, name, object_bytes, stored_at };
        map.pieces.entry(segment).or_default().push(piece);
    }
    map
}
