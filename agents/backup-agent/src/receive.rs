//! Receives WAL and stores it as it comes: pieces of the growing segment, then the whole.
//!
//! The server is told that WAL is safe only once the repository holds it, so its slot keeps what
//! is under way, and a commit that waits for this standby waits for the repository. Nothing is
//! spooled: when the store is slow, at most [`memory_bytes_max`] are held in memory for each group,
//! and then nothing more is read.

pub(crate) mod upload;
mod written;

use std::collections::VecDeque;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use bytes::{Buf, Bytes};
use chrono::{DateTime, Utc};
use futures_util::StreamExt;
use futures_util::stream::{FuturesOrdered, FuturesUnordered};
use shared::pg::wal::{Segment, segment_start};
use shared::telemetry::chain;
use thiserror::Error;
use tokio::time::{Instant, sleep_until};
use tokio_postgres::types::PgLsn;
use tracing::{debug, info};

use crate::replication::ReplicationError;
use crate::replication::stream_wal::{WalEvent, WalStream};
use crate::repository::{Place, RepositoryError};
use crate::wal::growing::Growing;
use crate::wal::piece::{self, Cut, Mark, Piece};
use crate::wal::{self, CHUNK_BYTES, Packed, WalError};
use written::Written;

/// Complete segments on their way to the store at once.
const UPLOADS_MAX: usize = 2;
/// How often the server is told how far we are and asked for a sign of life; it gives up after
/// `wal_sender_timeout`, 60 s by default.
const REPORT_EVERY: Duration = Duration::from_secs(5);
/// A server that has been asked and is silent for this long is gone.
const SILENCE_MAX: Duration = Duration::from_secs(30);

/// Commits are gathered for this part of [`Shipping::interval`] before they are read …
const GATHER_DIVISOR: u32 = 5;
/// … unless so much came at once that there is more.
const BUSY_BYTES: usize = 64 << 10;
/// No more is taken at once, so that what is stored is reported in between.
const BATCH_BYTES_MAX: usize = 1 << 20;

/// The most memory that receiving one group's WAL takes, in bytes: the growing segment, what is under
/// way and what of it is read back, and a larger piece whose smaller ones are being removed. Only WAL
/// that does not compress takes so much; most takes a quarter.
pub fn memory_bytes_max(segment_bytes: u64) -> u64 {
    let segments = 1 + 2 * UPLOADS_MAX as u64 + 1;
    // A batch, and what its last message is longer.
    segments * segment_bytes + 2 * BATCH_BYTES_MAX as u64
}

/// How WAL is shipped.
#[derive(Clone, Copy, Debug)]
pub struct Shipping {
    /// The longest that WAL waits before it is shipped.
    pub interval: Duration,
    /// How much may wait before it is shipped at once, in bytes.
    pub bytes: u64,
    /// zstd's level.
    pub level: i32,
}

/// Why receiving ended.
#[derive(Debug, Error)]
pub enum ReceiveError {
    /// The server or the connection to it.
    #[error(transparent)]
    Replication(#[from] ReplicationError),
    /// The WAL is not what it should be, or the repository failed.
    #[error(transparent)]
    Wal(#[from] WalError),
    /// The repository failed.
    #[error(transparent)]
    Repository(#[from] RepositoryError),
    /// WAL did not come in order.
    #[error("the server sent WAL from {found}, expected {expected}")]
    OutOfOrder {
        /// Where we are.
        expected: PgLsn,
        /// What came.
        found: PgLsn,
    },
    /// Another replica may be responsible by now.
    #[error("the lease of group {group} is over; nothing more is stored")]
    LeaseLost {
        /// The group.
        group: u32,
    },
}

/// How far receiving is, for whoever watches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Received {
    /// The timeline.
    pub timeline: u32,
    /// How far WAL was received.
    pub received_lsn: PgLsn,
    /// How far the repository holds it; 0 until it is compared with what the server sends.
    pub stored_lsn: PgLsn,
    /// How far the server's disk has it, as far as it told.
    pub server_lsn: PgLsn,
}

impl Received {
    /// WAL on the server's disk that the repository does not hold, in bytes; `None` until the
    /// server has told and what is stored was compared.
    pub fn lag_bytes(&self) -> Option<u64> {
        let (server, stored) = (u64::from(self.server_lsn), u64::from(self.stored_lsn));
        (server > 0 && stored > 0).then(|| server.saturating_sub(stored))
    }
}

/// What receiving waits for, for whoever watches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Waiting {
    /// The last moment of which all WAL that the server had is stored; `None` until there is one.
    pub caught_up_at: Option<DateTime<Utc>>,
    /// When the oldest upload that is under way began.
    pub upload_since: Option<Instant>,
}

/// What a receiver is given beside the stream.
pub struct Receiver<'a> {
    /// Where it stores.
    pub place: &'a Place,
    /// `wal_segment_size`.
    pub segment_bytes: u64,
    /// How it ships; asked each time, because commits may begin to wait for it.
    pub shipping: &'a (dyn Fn() -> Shipping + Sync),
    /// Whether it may still act: asked before each write.
    pub may_write: &'a (dyn Fn() -> bool + Sync),
    /// Told about each step forward.
    pub on_progress: &'a (dyn Fn(Received, Waiting) + Sync),
    /// Told when the store does not let what was replaced be deleted.
    pub on_kept: &'a (dyn Fn(&RepositoryError) + Sync),
}

impl fmt::Debug for Receiver<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Receiver").field("place", self.place).finish_non_exhaustive()
    }
}

type Uploading<'a> = Pin<Box<dyn Future<Output = Result<Uploaded, ReceiveError>> + Send + 'a>>;

/// What is under way to the store, in order, and since when.
#[derive(Default)]
struct Uploads<'a> {
    running: FuturesOrdered<Uploading<'a>>,
    since: VecDeque<Instant>,
}

impl<'a> Uploads<'a> {
    fn push(
        &mut self,
        object: String,
        upload: impl Future<Output = Result<Uploaded, ReceiveError>> + Send + 'a,
    ) {
        let upload: Uploading<'a> = Box::pin(upload);
        self.running.push_back(Box::pin(async move { upload::told(&object, upload).await }));
        self.since.push_back(Instant::now());
    }

    async fn next(&mut self) -> Option<Result<Uploaded, ReceiveError>> {
        let uploaded = self.running.next().await;
        self.since.pop_front();
        uploaded
    }

    fn oldest(&self) -> Option<Instant> {
        self.since.front().copied()
    }

    fn len(&self) -> usize {
        self.running.len()
    }

    fn is_empty(&self) -> bool {
        self.running.is_empty()
    }
}

/// What an upload stored: everything of `segment` up to `to`, as it was at `began_at`.
#[derive(Debug)]
struct Uploaded {
    segment: Segment,
    from: u64,
    to: u64,
    began_at: Instant,
    replaces: Replaces,
}

/// What the repository has of the segment with which receiving begins.
#[derive(Debug)]
pub enum Beginning {
    /// These pieces, or none.
    Pieces(Vec<Piece>),
    /// All of it: the server sends it again to be compared.
    Whole,
}

/// Which pieces may go, now that something larger was read back.
#[derive(Debug)]
enum Replaces {
    Nothing,
    /// Those within a larger one, which has this content.
    Within(Piece, Vec<u8>),
    /// Those of the segment that are known to be of it.
    Of(Vec<Mark>),
}

impl Receiver<'_> {
    /// Receives from the start of `segment`, of which the repository has what `beginning` says, until the
    /// server has no more on its timeline. Everything received is stored when this returns.
    ///
    /// Dropping the future stops it; what was not stored is sent again next time.
    ///
    /// # Errors
    ///
    /// Each reason to stop. What was reported as safe is stored in any case.
    pub async fn run(
        &self,
        stream: &mut WalStream,
        segment: Segment,
        beginning: Beginning,
    ) -> Result<(), ReceiveError> {
        let level = (self.shipping)().level;
        let growing = match beginning {
            Beginning::Pieces(pieces) => Growing::new(segment, self.segment_bytes, level, pieces)?,
            Beginning::Whole => Growing::again(segment, self.segment_bytes, level)?,
        };
        let mut state = State {
            stored_lsn: PgLsn::from(0),
            server_lsn: PgLsn::from(0),
            growing,
            waiting_since: None,
            ended: false,
            reply: false,
            heard_at: Instant::now(),
            written: Written::new(),
            behind_since: None,
            waiting: Waiting::default(),
        };
        let mut uploads = Uploads::default();
        let mut removals = FuturesUnordered::new();
        let mut unread = VecDeque::new();
        let (mut report_at, mut read_at) = (Instant::now(), Instant::now());
        loop {
            self.digest(&mut state, &mut unread, &mut uploads)?;
            if uploads.is_empty()
                && let Some(cut) = self.due(&mut state)?
            {
                let segment = state.growing.segment();
                let name = piece::name(segment, self.segment_bytes, &cut);
                uploads.push(name, self.ship(segment, cut));
            }
            let all_taken = state.ended && unread.is_empty();
            if all_taken && uploads.is_empty() && state.growing.waiting() == 0 {
                stream.report(state.stored_lsn, false).await?;
                return Ok(());
            }
            let may_read = unread.is_empty() && !state.ended;
            if !may_read {
                // Whoever does not listen cannot complain about silence.
                state.heard_at = Instant::now();
                state.behind_since.get_or_insert_with(Utc::now);
            }
            if !may_read || read_at > Instant::now() {
                stream.ignore();
            }
            let ship_at = state.waiting_since.map(|since| since + (self.shipping)().interval);
            tokio::select! {
                Some(uploaded) = uploads.next() => {
                    let uploaded = uploaded?;
                    self.stored(&mut state, &uploaded);
                    removals.push(self.remove(uploaded));
                    stream.report(state.stored_lsn, false).await?;
                }
                Some(()) = removals.next() => {}
                event = gathered(stream, read_at), if may_read => {
                    let (mut batch_bytes, mut event) = (0, Some(event?));
                    while let Some(next) = event {
                        batch_bytes += self.take_event(&mut state, &mut unread, next)?;
                        // Before more is read, so that what it lies in is free for that.
                        self.digest(&mut state, &mut unread, &mut uploads)?;
                        let is_full = batch_bytes >= BATCH_BYTES_MAX;
                        event = if is_full { None } else { stream.next_here()? };
                        if is_full {
                            state.behind_since.get_or_insert_with(Utc::now);
                        } else if event.is_none() {
                            state.behind_since = None;
                        }
                    }
                    let gather = (self.shipping)().interval / GATHER_DIVISOR;
                    let is_busy = batch_bytes >= BUSY_BYTES;
                    read_at = Instant::now() + if is_busy { Duration::ZERO } else { gather };
                    if std::mem::take(&mut state.reply) {
                        report_at = Instant::now();
                    }
                }
                () = sleep_until(report_at) => {
                    if state.heard_at.elapsed() > SILENCE_MAX {
                        return Err(stream.silent(SILENCE_MAX).into());
                    }
                    let ask = !state.ended;
                    stream.report(state.stored_lsn, ask).await?;
                    report_at = Instant::now() + REPORT_EVERY;
                }
                () = sleep_until(ship_at.unwrap_or_else(Instant::now)),
                    if ship_at.is_some_and(|at| at > Instant::now()) && uploads.is_empty() => {}
            }
            let caught_up_at = state.written.all_before(state.stored_lsn);
            state.waiting.caught_up_at = caught_up_at.or(state.waiting.caught_up_at);
            state.waiting.upload_since = uploads.oldest();
            let received = Received {
                timeline: segment.timeline,
                received_lsn: self.received_lsn(&state),
                stored_lsn: state.stored_lsn,
                server_lsn: state.server_lsn,
            };
            (self.on_progress)(received, state.waiting);
        }
    }

    /// Takes note of what the server sent; returns how much WAL that is.
    fn take_event(
        &self,
        state: &mut State,
        unread: &mut VecDeque<Bytes>,
        event: WalEvent,
    ) -> Result<usize, ReceiveError> {
        state.heard_at = Instant::now();
        match event {
            WalEvent::Data { lsn, data, server_lsn } => {
                state.told(server_lsn);
                let waiting: usize = unread.iter().map(Bytes::len).sum();
                let expected = u64::from(self.received_lsn(state)) + waiting as u64;
                if u64::from(lsn) != expected {
                    let expected = expected.into();
                    return Err(ReceiveError::OutOfOrder { expected, found: lsn });
                }
                let bytes = data.len();
                unread.push_back(data);
                return Ok(bytes);
            }
            WalEvent::Keepalive { server_lsn, reply } => {
                // This is how far it has sent, which may be less.
                state.told(state.server_lsn.max(server_lsn));
                state.reply |= reply;
            }
            WalEvent::Ended => state.ended = true,
        }
        Ok(0)
    }

    /// Takes what was read into the growing segment; each that is complete begins its upload, as
    /// long as there is room.
    fn digest<'s>(
        &'s self,
        state: &mut State,
        unread: &mut VecDeque<Bytes>,
        uploads: &mut Uploads<'s>,
    ) -> Result<(), ReceiveError> {
        loop {
            if state.growing.is_complete() {
                if uploads.len() >= UPLOADS_MAX {
                    return Ok(());
                }
                let next = state.growing.segment().next();
                let level = (self.shipping)().level;
                let empty = Growing::new(next, self.segment_bytes, level, Vec::new())?;
                let complete = std::mem::replace(&mut state.growing, empty);
                let segment = complete.segment();
                let (packed, known) = complete.pack()?;
                uploads.push(packed.name(), self.store(segment, packed, known));
                state.waiting_since = None;
            }
            let Some(data) = unread.front_mut() else { return Ok(()) };
            let taken = state.growing.take(data)?;
            data.advance(taken);
            if data.is_empty() {
                unread.pop_front();
            }
            if state.growing.waiting() > 0 {
                state.waiting_since.get_or_insert_with(Instant::now);
            }
            // What is before the growing segment is stored once nothing is under way.
            if state.growing.is_compared() && uploads.is_empty() {
                let stored_lsn = self.lsn(state.growing.segment(), state.growing.shipped());
                state.stored_lsn = state.stored_lsn.max(stored_lsn);
            }
        }
    }

    /// The piece that is due, if one is.
    fn due(&self, state: &mut State) -> Result<Option<Cut>, ReceiveError> {
        let Shipping { interval, bytes, .. } = (self.shipping)();
        let waited = state.waiting_since.is_some_and(|since| since.elapsed() >= interval);
        let much = state.growing.waiting() >= bytes;
        if state.growing.waiting() == 0 || !(waited || much || state.ended) {
            return Ok(None);
        }
        // Full chunks are compressed already; what is not full is only cut when it must go.
        let all = waited || state.ended || bytes < u64::from(CHUNK_BYTES);
        Ok(state.growing.cut(all)?)
    }

    /// Stores a piece; reads it back if it replaces others.
    async fn ship(&self, segment: Segment, cut: Cut) -> Result<Uploaded, ReceiveError> {
        self.require_lease()?;
        let (from, to, began_at) = (cut.from, cut.to, Instant::now());
        let replaces = if cut.replaces {
            let (piece, content) =
                piece::store_and_read(self.place, segment, self.segment_bytes, cut).await?;
            Replaces::Within(piece, content)
        } else {
            piece::store(self.place, segment, self.segment_bytes, cut).await?;
            Replaces::Nothing
        };
        let name = segment.name(self.segment_bytes);
        debug!(segment = name, from, to, "piece of a WAL segment stored");
        Ok(Uploaded { segment, from, to, began_at, replaces })
    }

    /// Stores a complete segment and reads it back: its pieces are removed on the strength of it.
    async fn store(
        &self,
        segment: Segment,
        packed: Packed,
        known: Vec<Mark>,
    ) -> Result<Uploaded, ReceiveError> {
        self.require_lease()?;
        let began_at = Instant::now();
        wal::store_and_compare(self.place, packed).await?;
        info!(segment = segment.name(self.segment_bytes), "WAL segment stored");
        let (from, to) = (0, self.segment_bytes);
        Ok(Uploaded { segment, from, to, began_at, replaces: Replaces::Of(known) })
    }

    /// Removes what an upload replaces.
    async fn remove(&self, uploaded: Uploaded) {
        let (segment, bytes) = (uploaded.segment, self.segment_bytes);
        let removed = match uploaded.replaces {
            Replaces::Nothing => Ok(()),
            Replaces::Within(piece, content) => {
                piece::remove_within(self.place, bytes, &piece, &content).await
            }
            Replaces::Of(known) => piece::remove(self.place, segment, bytes, &known).await,
        };
        if let Err(failure) = removed {
            if failure.is_denied() {
                (self.on_kept)(&failure);
            }
            // Tried again with the next that replaces them, or when receiving begins again.
            let segment = segment.name(bytes);
            debug!(segment, error = %chain(&failure), "pieces that were replaced not removed");
        }
    }

    fn require_lease(&self) -> Result<(), ReceiveError> {
        if (self.may_write)() {
            return Ok(());
        }
        Err(ReceiveError::LeaseLost { group: self.place.group })
    }

    fn stored(&self, state: &mut State, uploaded: &Uploaded) {
        let Uploaded { segment, from, to, began_at, ref replaces } = *uploaded;
        state.stored_lsn = state.stored_lsn.max(self.lsn(segment, to));
        if segment == state.growing.segment() {
            state.growing.ship(from, to, matches!(replaces, Replaces::Within(..)));
            // What waits now came since.
            state.waiting_since = (state.growing.waiting() > 0).then_some(began_at);
        }
    }

    fn received_lsn(&self, state: &State) -> PgLsn {
        self.lsn(state.growing.segment(), state.growing.at())
    }

    fn lsn(&self, segment: Segment, offset: u64) -> PgLsn {
        let start = segment_start(segment.number, self.segment_bytes).map_or(u64::MAX, u64::from);
        start.saturating_add(offset).into()
    }
}

/// Returns what comes next, at `read_at` at the earliest: a busy server sends each commit by itself,
/// and to be woken for each would cost far more than to store it.
async fn gathered(stream: &mut WalStream, read_at: Instant) -> Result<WalEvent, ReplicationError> {
    sleep_until(read_at).await;
    stream.next().await
}

/// What a receiver knows.
struct State {
    growing: Growing,
    /// Since when the oldest byte that is not shipped waits, at most.
    waiting_since: Option<Instant>,
    stored_lsn: PgLsn,
    server_lsn: PgLsn,
    /// The server has no more.
    ended: bool,
    /// The server asked for a report.
    reply: bool,
    heard_at: Instant,
    written: Written,
    /// Since when more may have come than was read: what is read then, the server sent at this time or
    /// later. `None` while all is read as it comes.
    behind_since: Option<DateTime<Utc>>,
    waiting: Waiting,
}

impl State {
    /// Takes note of how far the server's disk has WAL.
    fn told(&mut self, server_lsn: PgLsn) {
        self.server_lsn = server_lsn;
        self.written.note(server_lsn, self.behind_since.unwrap_or_else(Utc::now));
    }
}
