//! The heartbeat: a record is written to the primary, and read back from the repository. So the
//! whole path is proven, whether there is other traffic or not.

use std::time::Duration;

use shared::pg::connect::connect;
use shared::pg::wal::Segment;
use shared::pg::{ConnectError, QueryError};
use thiserror::Error;
use tokio::time::{Instant, timeout};
use tokio_postgres::types::PgLsn;

use crate::follow::{Following, Primary};
use crate::repository::{Place, RepositoryError};
use crate::wal::{self, WalError, piece};

/// How long a record may take to the repository before that is a failure.
const ARRIVAL_LIMIT: Duration = Duration::from_mins(1);
/// The prefix of the logical message.
const PREFIX: &str = "pgmesh";
/// Bytes of a WAL page, and of the headers of a segment's first page and of the others.
/// Source: `XLOG_BLCKSZ` as Debian builds it; `xlog_internal.h`.
const PAGE_BYTES: usize = 8192;
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
    // It is not transactional, so no commit flushes it: the last argument does, from 17 on. Before,
    // it goes with the next flush, after `wal_writer_delay` at the latest.
    let version = connection.query_one("SELECT current_setting('server_version_num')::int", &[]);
    let emit = if version.await?.get::<_, i32>(0) >= 170_000 {
        "SELECT pg_logical_emit_message(false, $1, $2, true)"
    } else {
        "SELECT pg_logical_emit_message(false, $1, $2)"
    };
    let began_at = Instant::now();
    let row = connection.query_one(emit, &[&PREFIX, &content]).await?;
    let lsn: PgLsn = row.get(0);
    let arrived = changes.wait_for(|state| state.received.is_some_and(|it| it.stored_lsn >= lsn));
    if timeout(ARRIVAL_LIMIT, arrived).await.is_err() {
        return Err(HeartbeatError::NotStored { lsn, limit: ARRIVAL_LIMIT });
    }
    let took = began_at.elapsed();

    let segment_bytes = primary.segment_bytes;
    let number = u64::from(lsn).saturating_sub(1) / segment_bytes;
    let segment = Segment { timeline: primary.timeline, number };
    let stored = read(place, segment, segment_bytes).await?;
    let text = without_headers(&stored);
    if text.windows(content.len()).any(|window| window == content.as_bytes()) {
        return Ok(took);
    }
    Err(HeartbeatError::NotFound { lsn, segment: segment.name(segment_bytes) })
}

/// Reads a segment back, as a whole or from its pieces.
async fn read(place: &Place, segment: Segment, bytes: u64) -> Result<Vec<u8>, HeartbeatError> {
    let mut content = Vec::new();
    if let Some(complete) = wal::find(place, &segment.name(bytes)).await?.first() {
        wal::read(place, complete, |chunk| {
            content.extend_from_slice(chunk);
            Ok(())
        })
        .await?;
        return Ok(content);
    }
    let pieces = piece::list_of(place, segment, bytes).await?;
    Ok(piece::stitch(place, segment, bytes, &piece::cover(&pieces)).await?)
}

/// A segment without its page headers, which may lie in the middle of a record.
fn without_headers(segment: &[u8]) -> Vec<u8> {
    let mut text = Vec::with_capacity(segment.len());
    for (index, page) in segment.chunks(PAGE_BYTES).enumerate() {
        let header = if index == 0 { LONG_HEADER_BYTES } else { SHORT_HEADER_BYTES };
        text.extend_from_slice(page.get(header..).unwrap_or_default());
    }
    text
}
