//! The heartbeat: a record is written to the primary, and read back from the repository. So the
//! whole path is proven, whether there is other traffic or not.

use std::ops::Range;
use std::time::Duration;

use shared::pg::connect::connect;
use shared::pg::wal::Segment;
use shared::pg::{ConnectError, QueryError};
use thiserror::Error;
use tokio::time::{Instant, timeout};
use tokio_postgres::types::PgLsn;

use crate::follow::{Following, Primary};
use crate::repository::{Place, RepositoryError};
use crate::wal::piece::{self, Piece};
use crate::wal::{self, WalError};

/// How long a record may take to the repository before that is a failure.
const ARRIVAL_LIMIT: Duration = Duration::from_mins(1);
/// Writes it in a transaction: a restore to a time ends at the first commit after it, which an idle
/// database would not have. The commit is flushed, and waits for no standby.
const EMIT: &str = "SELECT set_config('synchronous_commit', 'local', true), \
                    pg_logical_emit_message(true, $1, $2) AS lsn";
/// The prefix of the logical message.
const PREFIX: &str = "pgmesh";
/// The record, its headers and those of pages, and more: it begins so far before its end at most.
const RECORD_BYTES_MAX: u64 = 512;
/// Bytes of a WAL page, and of the headers of a segment's first page and of the others.
/// Source: `XLOG_BLCKSZ` as Debian builds it; `xlog_internal.h`.
const PAGE_BYTES: u32 = 8192;
const LONG_HEADER_BYTES: usize = 40;
const SHORT_HEADER_BYTES: usize = 24;

/// Why a heartbeat did not come through.
#[derive(Debug, Error)]
pub enum HeartbeatError {
    /// The primary cannot be reached.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The primary did not write it.
    #[error(transparent)]
    Query(#[from] QueryError),
    /// It did not arrive.
    #[error("the record at {lsn} is not in the repository after {} s", limit.as_secs())]
    NotStored {
        /// Where it ends.
        lsn: PgLsn,
        /// How long it was waited.
        limit: Duration,
    },
    /// It was reported as stored, and it is not there.
    #[error(
        "the record at {lsn} was stored, and reading {segment} back from the repository does not \
         give it"
    )]
    NotFound {
        /// Where it ends.
        lsn: PgLsn,
        /// The segment that should have it.
        segment: String,
    },
    /// Reading back failed.
    #[error(transparent)]
    Wal(#[from] WalError),
    /// The repository failed.
    #[error(transparent)]
    Repository(#[from] RepositoryError),
}

/// Writes a record to the primary, waits until it is stored, and reads it back. Returns how long it
/// took until it was stored.
///
/// # Errors
///
/// Each step that can fail.
pub async fn beat(
    settings: &shared::pg::Settings,
    place: &Place,
    primary: &Primary,
    mut changes: tokio::sync::watch::Receiver<Following>,
) -> Result<Duration, HeartbeatError> {
    let mut random = [0; 16];
    // Whatever it is, it only has to be new.
    if getrandom::fill(&mut random).is_err() {
        random[..8].copy_from_slice(&chrono::Utc::now().timestamp_micros().to_le_bytes());
    }
    let content = format!("heartbeat {}", hex::encode(random));
    let connection = connect(settings, &primary.node).await?;
    let began_at = Instant::now();
    let row = connection.query_one(EMIT, &[&PREFIX, &content]).await?;
    let lsn: PgLsn = row.get("lsn");
    let arrived = changes.wait_for(|state| state.received.is_some_and(|it| it.stored_lsn >= lsn));
    if timeout(ARRIVAL_LIMIT, arrived).await.is_err() {
        return Err(HeartbeatError::NotStored { lsn, limit: ARRIVAL_LIMIT });
    }
    let took = began_at.elapsed();

    let (segment_bytes, end) = (primary.segment_bytes, u64::from(lsn));
    let number = end.saturating_sub(1) / segment_bytes;
    let segment = Segment { timeline: primary.timeline, number };
    let start = end.saturating_sub(RECORD_BYTES_MAX);
    let start = start - start % u64::from(PAGE_BYTES);
    let mut stored = Vec::new();
    // The record may begin in the segment before.
    for number in start / segment_bytes..=number {
        let first = number * segment_bytes;
        let stretch = start.max(first) - first..end.min(first + segment_bytes) - first;
        let segment = Segment { number, ..segment };
        stored.extend(read(place, segment, segment_bytes, stretch).await?);
    }
    let text = without_headers(&stored, start, segment_bytes);
    if text.windows(content.len()).any(|window| window == content.as_bytes()) {
        return Ok(took);
    }
    Err(HeartbeatError::NotFound { lsn, segment: segment.name(segment_bytes) })
}

/// Reads a stretch of a segment back, from the whole or from the pieces that have it; zeros where
/// there is none.
async fn read(
    place: &Place,
    segment: Segment,
    segment_bytes: u64,
    stretch: Range<u64>,
) -> Result<Vec<u8>, HeartbeatError> {
    for _ in 0..wal::LISTS_MAX {
        // In this order: a complete segment is stored before its pieces go.
        let pieces = piece::list_of(place, segment, segment_bytes).await?;
        if let Some(complete) = wal::find(place, &segment.name(segment_bytes)).await?.first() {
            let mut content = Vec::new();
            wal::read(place, complete, |chunk| {
                content.extend_from_slice(chunk);
                Ok(())
            })
            .await?;
            return Ok(content.get(position(stretch)).unwrap_or_default().to_vec());
        }
        match read_pieces(place, &pieces, stretch.clone()).await {
            // Replaced a moment ago.
            Err(error) if error.is_gone() => {}
            content => return Ok(content?),
        }
    }
    Ok(Vec::new())
}

async fn read_pieces(
    place: &Place,
    pieces: &[Piece],
    stretch: Range<u64>,
) -> Result<Vec<u8>, WalError> {
    let mut content = vec![0; position(stretch.clone()).len()];
    for piece in piece::follow(pieces, stretch.start, stretch.end) {
        let bytes = piece::read(place, piece).await?;
        let common = stretch.start.max(piece.from)..stretch.end.min(piece.to);
        let into = position(common.start - stretch.start..common.end - stretch.start);
        let from = position(common.start - piece.from..common.end - piece.from);
        content[into].copy_from_slice(&bytes[from]);
    }
    Ok(content)
}

/// A stretch that fits into memory.
fn position(stretch: Range<u64>) -> Range<usize> {
    let fit = |at| usize::try_from(at).unwrap_or(usize::MAX);
    fit(stretch.start)..fit(stretch.end)
}

/// Pages of WAL, of which the first begins at `start`, without their headers, which may lie in the
/// middle of a record.
fn without_headers(stored: &[u8], start: u64, segment_bytes: u64) -> Vec<u8> {
    let page_bytes = PAGE_BYTES as usize;
    let mut text = Vec::with_capacity(stored.len());
    for (page, at) in stored.chunks(page_bytes).zip((start..).step_by(page_bytes)) {
        let is_first = at.is_multiple_of(segment_bytes);
        let header = if is_first { LONG_HEADER_BYTES } else { SHORT_HEADER_BYTES };
        text.extend_from_slice(page.get(header..).unwrap_or_default());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_taken_out_wherever_the_stretch_begins() {
        const SEGMENT_BYTES: u64 = 1 << 20;
        let page = |header: usize, content: u8| {
            let mut page = vec![b'#'; 8192];
            page[header..].fill(content);
            page
        };
        let (a, b) = (page(24, b'a'), page(40, b'b'));
        let two = [a.clone(), b].concat();
        let text = without_headers(&two, SEGMENT_BYTES - 8192, SEGMENT_BYTES);
        assert_eq!(text, [vec![b'a'; 8192 - 24], vec![b'b'; 8192 - 40]].concat());
        let text = without_headers(&a[..100], 3 * 8192, SEGMENT_BYTES);
        assert_eq!(text, vec![b'a'; 76]);
    }
}
