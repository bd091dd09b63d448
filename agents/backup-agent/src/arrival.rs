//! Whether the primary's WAL comes into a place: who takes it, and whether that is stored here.
//!
//! A receiver acknowledges only what it has stored. So what a connected one has acknowledged is in this
//! place, or whoever is connected stores elsewhere; and what is before it and not here never comes.

use std::time::Duration;

use shared::pg::wal::{Segment, segment_number};
use shared::pg::{Connection, QueryError};
use shared::telemetry::chain;
use tokio::time::{Instant, sleep};
use tokio_postgres::types::PgLsn;
use tracing::{info, warn};

use crate::backup::BackupError;
use crate::container::Kind;
use crate::follow::{RETRY_LONGEST, begun};
use crate::manifest::Commit;
use crate::repository::Place;
use crate::source::{RunLock, Source};
use crate::wal::{self, WalError, WalMap, piece};

/// How often the repository is asked for the WAL that a backup waits for.
const WAL_POLL: Duration = Duration::from_secs(1);
/// WAL that is not there after this time is late: by then it is received or archived.
const WAL_LATE: Duration = Duration::from_secs(30);
/// What a receiver needs to connect again after its longest wait, and to store the first of it.
const RECEIVER_START: Duration = Duration::from_secs(10);

/// What a primary says of those who take its WAL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Takers {
    /// `archive_mode` is on: where the archiver stores, nobody knows.
    pub archives: bool,
    /// From where the receiver's slot holds WAL back, if a receiver is connected to it.
    pub acknowledged: Option<PgLsn>,
}

/// Whether WAL comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// It does, as far as can be told.
    Comes,
    /// A receiver is connected and stores elsewhere.
    Elsewhere,
    /// Nobody takes it.
    Nobody,
}

impl Takers {
    /// Asks a primary.
    ///
    /// # Errors
    ///
    /// It did not answer.
    pub async fn ask(connection: &Connection, slot: &str) -> Result<Self, QueryError> {
        let ask = "SELECT current_setting('archive_mode') <> 'off', \
                   (SELECT restart_lsn FROM pg_replication_slots WHERE slot_name = $1 AND active)";
        let row = connection.query_one(ask, &[&slot]).await?;
        Ok(Self { archives: row.get(0), acknowledged: row.get(1) })
    }

    /// Whether a segment that is not stored never comes: the receiver is past it.
    pub fn are_past(self, number: u64, segment_bytes: u64) -> bool {
        let past = |lsn| segment_number(lsn, segment_bytes) > number;
        !self.archives && self.acknowledged.is_some_and(past)
    }

    /// Whether the WAL of a primary on `timeline` comes into `place`.
    ///
    /// # Errors
    ///
    /// The repository could not be read.
    pub async fn arrival(
        self,
        place: &Place,
        timeline: u32,
        segment_bytes: u64,
    ) -> Result<Arrival, WalError> {
        match self.acknowledged {
            _ if self.archives => Ok(Arrival::Comes),
            None => Ok(Arrival::Nobody),
            Some(lsn) if is_stored(place, timeline, segment_bytes, lsn).await? => {
                Ok(Arrival::Comes)
            }
            Some(_) => Ok(Arrival::Elsewhere),
        }
    }
}

/// Whether a place holds what a receiver has acknowledged up to `lsn`. One that begins at the start of a
/// segment has acknowledged nothing yet: then the mark of its beginning is enough.
///
/// # Errors
///
/// The repository could not be read.
pub async fn is_stored(
    place: &Place,
    timeline: u32,
    segment_bytes: u64,
    lsn: PgLsn,
) -> Result<bool, WalError> {
    let last = PgLsn::from(u64::from(lsn).saturating_sub(1));
    let stored = WalMap::read_from(place, segment_bytes, last, &[]).await?;
    let is_start = u64::from(lsn).is_multiple_of(segment_bytes);
    Ok(holds(&stored, timeline, lsn) || is_start && begun::is_marked(place).await?)
}

/// As [`is_stored`], of a receiver that may have begun just now: it has until it must have shipped.
///
/// # Errors
///
/// The repository could not be read.
pub async fn is_stored_soon(
    place: &Place,
    timeline: u32,
    segment_bytes: u64,
    lsn: PgLsn,
    ship_interval: Duration,
) -> Result<bool, WalError> {
    let began_at = Instant::now();
    loop {
        let is_late = began_at.elapsed() >= RECEIVER_START + ship_interval;
        let is_stored = is_stored(place, timeline, segment_bytes, lsn).await?;
        if is_stored || is_late {
            return Ok(is_stored);
        }
        sleep(WAL_POLL).await;
    }
}

/// Whether the byte before `lsn` is stored, on the way to a timeline.
fn holds(stored: &WalMap, timeline: u32, lsn: PgLsn) -> bool {
    let Some(last) = u64::from(lsn).checked_sub(1) else { return true };
    let timeline = stored.on_the_way(timeline, last.into());
    let number = last / stored.segment_bytes;
    stored.within_reach(Segment { timeline, number }) > last % stored.segment_bytes
}

/// The way of the primary's WAL into the repository.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Way<'a> {
    /// The place.
    pub(crate) place: &'a Place,
    /// The primary, by the connection that holds the lock.
    pub(crate) lock: &'a RunLock,
    /// The slot of the receiver.
    pub(crate) slot: &'a str,
}

impl Way<'_> {
    /// Refuses a backup whose WAL would never come. A receiver may be between two attempts: it is
    /// waited for, and until it has shipped something.
    pub(crate) async fn require(
        self,
        source: &Source,
        ship_interval: Duration,
    ) -> Result<(), BackupError> {
        let (began_at, limit) = (Instant::now(), RETRY_LONGEST + RECEIVER_START + ship_interval);
        let primary = source.primary.to_string();
        let mut said = false;
        loop {
            let takers = self.lock.takers(self.slot).await?;
            let (timeline, segment_bytes) = (source.state.timeline, source.state.wal_segment_bytes);
            let arrival = takers.arrival(self.place, timeline, segment_bytes).await?;
            let slot = self.slot.to_owned();
            match arrival {
                Arrival::Comes => return Ok(()),
                Arrival::Elsewhere | Arrival::Nobody if began_at.elapsed() < limit => {}
                Arrival::Elsewhere => {
                    let place = self.place.location();
                    return Err(BackupError::StoredElsewhere { primary, slot, place });
                }
                Arrival::Nobody => return Err(BackupError::NoArchiving { primary, slot }),
            }
            if !said {
                said = true;
                info!(slot, ?limit, "waiting for a receiver that stores WAL here");
            }
            sleep(WAL_POLL).await;
        }
    }

    /// Refuses a backup that has begun if its first segment never comes, or cannot be opened.
    pub(crate) async fn require_first(
        self,
        source: &Source,
        timeline: u32,
        start_lsn: PgLsn,
    ) -> Result<(), BackupError> {
        let segment_bytes = source.state.wal_segment_bytes;
        let first = Segment { timeline, number: segment_number(start_lsn, segment_bytes) };
        let name = first.name(segment_bytes);
        // Before the list: what the receiver has acknowledged by now is in it.
        let takers = self.lock.takers(self.slot).await?;
        let found = wal::find(self.place, &name).await?.pop().map(|it| it.name);
        if found.is_none() && takers.are_past(first.number, segment_bytes) {
            let (node, primary) = (source.node.name.clone(), source.primary.to_string());
            return Err(BackupError::Past { node, missing: name, primary });
        }
        let found = match found {
            None => piece::list_of(self.place, first, segment_bytes).await?.pop().map(|it| it.name),
            found => found,
        };
        match found {
            Some(found) => require_open(self.place, &found).await,
            None => Ok(()),
        }
    }

    /// Waits until every segment that the backup needs is stored.
    ///
    /// A backup of a primary ends its last segment itself; after one of a standby, only the primary
    /// can.
    pub(crate) async fn wait(
        self,
        commit: &Commit,
        source: &Source,
        limit: Duration,
    ) -> Result<(), BackupError> {
        let began_at = Instant::now();
        let (mut switched, mut said, mut was_past) = (!commit.from_standby, false, false);
        loop {
            // Before the list, as in `require_first`.
            let takers = self.lock.takers(self.slot).await.ok();
            let Some(segment) = first_missing(self.place, commit).await? else {
                return require_key(self.place, commit).await;
            };
            let missing = segment.name(commit.wal_segment_bytes);
            let primary = source.primary.to_string();
            let is_past =
                takers.is_some_and(|it| it.are_past(segment.number, commit.wal_segment_bytes));
            // Twice: a receiver that goes back to fill a gap has first to say so.
            if is_past && was_past {
                return Err(BackupError::Past { node: commit.node.clone(), missing, primary });
            }
            was_past = is_past;
            if !switched {
                switched = true;
                match self.lock.switch_wal().await {
                    Ok(()) => info!(node = source.primary.name, "WAL segment ended"),
                    Err(error) => warn!(
                        error = %chain(&error),
                        "WAL segment not ended; waiting until it is full or archive_timeout ends it"
                    ),
                }
            }
            let is_late = began_at.elapsed() > WAL_LATE;
            let is_taken = takers.is_none_or(|it| it.archives || it.acknowledged.is_some());
            if !said && (is_late || !is_taken) {
                said = true;
                warn!(
                    missing,
                    slot = self.slot,
                    "WAL that the backup needs is not stored yet: the log of `backup-agent run`, or the \
                     server's about archive_command, tells why"
                );
            }
            if began_at.elapsed() >= limit {
                let backup_id = commit.backup_id.clone();
                return Err(BackupError::NoWal { backup_id, missing, primary, limit });
            }
            sleep(WAL_POLL).await;
        }
    }
}

/// Refuses WAL that was sealed with a key that is not configured.
async fn require_open(place: &Place, name: &str) -> Result<(), BackupError> {
    match place.sealed_at(Kind::Wal, name).await {
        Err(error) if error.is_locked() || error.is_wrong_key() => Err(BackupError::Locked(error)),
        Err(error) if error.is_transient() => Err(error.into()),
        // What is damaged, or a piece that was just replaced, is for others to tell.
        Err(_) | Ok(_) => Ok(()),
    }
}

/// Refuses a backup whose first or last segment no configured key opens.
async fn require_key(place: &Place, commit: &Commit) -> Result<(), BackupError> {
    let segments: Vec<u64> = commit.segments().collect();
    for number in [segments.first(), segments.last()].into_iter().flatten() {
        let segment = Segment { timeline: commit.timeline, number: *number };
        for found in wal::find(place, &segment.name(commit.wal_segment_bytes)).await? {
            require_open(place, &found.name).await?;
        }
    }
    Ok(())
}

/// The first segment that the backup needs and the repository has not.
async fn first_missing(place: &Place, commit: &Commit) -> Result<Option<Segment>, WalError> {
    let segment_bytes = commit.wal_segment_bytes;
    let stored = wal::stored_from(place, &commit.first_segment(), None).await?;
    for number in commit.segments() {
        let segment = Segment { timeline: commit.timeline, number };
        let name = segment.name(segment_bytes);
        match stored.get(&name).map_or(0, Vec::len) {
            0 => return Ok(Some(segment)),
            1 => {}
            _ => {
                let found = stored.get(&name).into_iter().flatten().map(|it| it.name.as_str());
                let found = wal::conflict::named(found).unwrap_or_default();
                return Err(WalError::Conflict { name, found });
            }
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use shared::pg::wal::HistoryEntry;

    use super::*;
    use crate::wal::example::{SEGMENT, stored};

    #[test]
    fn what_is_acknowledged_is_stored_or_the_receiver_stores_elsewhere() {
        let mut promoted = stored(&[(1, 3)], &[(1, 4, 500)]);
        let switch_lsn = (4 * SEGMENT + 500).into();
        let entry = HistoryEntry { timeline: 1, switch_lsn, reason: String::new() };
        promoted.histories.insert(2, vec![entry]);
        for (case, map, timeline, lsn, expected) in [
            ("nothing is stored", stored(&[], &[]), 1, 4 * SEGMENT + 500, false),
            ("up to a piece's end", stored(&[], &[(1, 4, 500)]), 1, 4 * SEGMENT + 500, true),
            ("beyond a piece's end", stored(&[], &[(1, 4, 500)]), 1, 4 * SEGMENT + 501, false),
            ("in a complete segment", stored(&[(1, 4)], &[]), 1, 4 * SEGMENT + 501, true),
            ("its end", stored(&[(1, 4)], &[]), 1, 5 * SEGMENT, true),
            ("the segment before is missing", stored(&[(1, 3)], &[]), 1, 5 * SEGMENT, false),
            ("only older WAL", stored(&[(1, 3)], &[]), 1, 4 * SEGMENT + 1, false),
            ("another timeline's", stored(&[(1, 4)], &[]), 2, 4 * SEGMENT + 1, false),
            ("before a promotion", promoted.clone(), 2, 4 * SEGMENT, true),
            ("where it was promoted", promoted.clone(), 2, 4 * SEGMENT + 500, true),
            ("after a promotion", promoted, 2, 4 * SEGMENT + 501, false),
            ("nothing is acknowledged", stored(&[], &[]), 1, 0, true),
        ] {
            assert_eq!(holds(&map, timeline, lsn.into()), expected, "{case}");
        }
    }

    #[test]
    fn what_the_receiver_is_past_never_comes() {
        let at = |lsn: u64| Some(PgLsn::from(lsn));
        for (case, archives, acknowledged, expected) in [
            ("the receiver is before it", false, at(3 * SEGMENT + 5), false),
            ("in it", false, at(4 * SEGMENT + 5), false),
            ("at its end", false, at(5 * SEGMENT), true),
            ("an archiver may store it", true, at(9 * SEGMENT), false),
            ("no receiver is connected", false, None, false),
        ] {
            let takers = Takers { archives, acknowledged };
            assert_eq!(takers.are_past(4, SEGMENT), expected, "{case}");
        }
    }
}
