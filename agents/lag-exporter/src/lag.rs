//! How far one standby is behind the line of primaries.

use std::time::Duration;

use crate::line::Line;
use crate::observation::{PAGE_BYTES, ReplayPause, Sample, StandbyPosition};
use crate::pace::float;
use crate::ring::Behind;
use crate::timelines::{Kinship, kinship, shared_part};
use crate::view::{CatchUp, Lag, LagState, LagView};

/// The longest part of a record that may be missing: a record refers to 33 blocks at most.
/// Source: `XLR_MAX_BLOCK_ID` in `xlogrecord.h`.
const PARTIAL_RECORD_BYTES_MAX: u64 = 33 * PAGE_BYTES;

/// What is known about one standby.
#[derive(Clone, Copy, Debug)]
pub struct Standby<'a> {
    /// The newest sample.
    pub sample: &'a Sample,
    /// The positions in it.
    pub position: &'a StandbyPosition,
    /// How far it had received when it was asked before that.
    pub received_before: Option<u64>,
    /// The newest timeline of which it surely has WAL; `None` unless that was told with the positions.
    pub timeline: Option<u32>,
    /// The timeline on which it had replayed more than the primary had written later on.
    pub ahead_on: Option<u32>,
    /// Bytes that it replays per second.
    pub bytes_per_second: Option<f64>,
}

/// A lag without a number.
pub fn none(state: LagState) -> LagView {
    let unknown = Lag::default();
    LagView {
        state,
        replay: unknown,
        receive: unknown,
        replay_bytes: None,
        receive_bytes: None,
        catch_up: CatchUp::Unknown,
    }
}

/// Decides how far `standby` is behind `line`.
pub fn lag(standby: Standby<'_>, line: &Line, stale_after: Duration) -> LagView {
    let Positions { replay, replay_at_most, receive } = match positions(standby, line) {
        Ok(positions) => positions,
        Err(state) => return none(state),
    };
    let Sample { asked_at, answered_at, .. } = *standby.sample;
    let behind = |lsn| said(line.ring.behind(lsn, asked_at, answered_at), stale_after);
    let end = line.ring.position(asked_at).filter(|_| line.is_fresh(asked_at, stale_after));
    let bytes = |lsn: u64| end.map(|end| end.saturating_sub(lsn));
    let (state, mut replay_lag) = behind(replay);
    if replay < replay_at_most {
        let at_least = behind(replay_at_most).1.lower.unwrap_or_default();
        replay_lag.lower = replay_lag.lower.map(|lower| lower.min(at_least));
    }
    let replay_bytes = bytes(replay);
    LagView {
        state,
        replay: replay_lag,
        receive: behind(receive).1,
        replay_bytes,
        receive_bytes: bytes(receive),
        catch_up: catch_up(standby, line, state, replay_bytes),
    }
}

/// The positions of a standby on the line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Positions {
    /// How far it has replayed, for all that queries can see.
    pub replay: u64,
    /// The same, unless what it has received beyond that may be part of a single record.
    pub replay_at_most: u64,
    /// How far it has the line's WAL on its disk.
    pub receive: u64,
}

/// The positions of a standby, or why they cannot be compared with the line's.
///
/// # Errors
///
/// The state of a standby whose lag has no number.
pub fn positions(standby: Standby<'_>, line: &Line) -> Result<Positions, LagState> {
    let Standby { sample, position, timeline, ahead_on, .. } = standby;
    if sample.identity.system_identifier != line.system_identifier {
        return Err(LagState::OtherCluster);
    }
    let (Some(replayed), Some(timeline)) = (position.replay_lsn.map(u64::from), timeline) else {
        return Err(LagState::Unknown);
    };
    match kinship(&line.forks, line.timeline, timeline, replayed) {
        Kinship::Diverged => return Err(LagState::Diverged),
        Kinship::Newer => return Err(LagState::PrimaryUnknown),
        Kinship::Unclear => return Err(LagState::Unknown),
        // A server sends nothing that is not on its disk. So this primary has lost WAL.
        Kinship::Shared if ahead_on == Some(line.timeline) => return Err(LagState::Diverged),
        Kinship::Shared => {}
    }
    let (replay, replay_at_most) = visible(standby, replayed);
    let received = position.receive_lsn.map_or(replay, u64::from);
    let received = shared_part(&line.forks, line.timeline, timeline, received);
    // Streaming begins at the start of a segment, which may be replayed already.
    Ok(Positions { replay, replay_at_most, receive: received.max(replay) })
}

/// How far a standby has replayed, for all that queries can see: surely, and at most.
///
/// A primary with an open transaction and nothing to do writes whole pages only, so what is on
/// the standby's disk may end within a record. It cannot be replayed, and no commit is in it,
/// but the position stays before the record. The signs: the received WAL ends at a page, the startup
/// process waits for WAL, and the WAL ended there a sample ago. Without the last it may as well be a
/// startup process that was stopped while it waited, and looks as if it still did. Without the
/// second, as when replay is paused or the link is cut, it may be so and may not.
fn visible(Standby { position, received_before, .. }: Standby<'_>, replayed: u64) -> (u64, u64) {
    match position.receive_lsn.map(u64::from) {
        Some(received)
            if received.is_multiple_of(PAGE_BYTES)
                && (replayed..=replayed + PARTIAL_RECORD_BYTES_MAX).contains(&received) =>
        {
            let is_partial =
                position.startup_waits == Some(true) && received_before == Some(received);
            (if is_partial { received } else { replayed }, received)
        }
        _ => (replayed, replayed),
    }
}

fn said(behind: Behind, stale_after: Duration) -> (LagState, Lag) {
    let unknown = Lag::default();
    match behind {
        Behind::Unknown => (LagState::PrimaryUnknown, unknown),
        Behind::Nothing(upper) if upper <= stale_after => {
            let zero = Some(Duration::ZERO);
            (LagState::CaughtUp, Lag { lower: zero, estimate: zero, upper: Some(upper) })
        }
        Behind::Nothing(upper) => (LagState::PrimaryUnknown, Lag { upper: Some(upper), ..unknown }),
        Behind::By(lag) => (LagState::Ok, lag),
        Behind::More(lower) => (LagState::BeyondHistory, Lag { lower: Some(lower), ..unknown }),
    }
}

fn catch_up(
    standby: Standby<'_>,
    line: &Line,
    state: LagState,
    replay_bytes: Option<u64>,
) -> CatchUp {
    match (state, replay_bytes) {
        (LagState::CaughtUp, _) => CatchUp::Done,
        (LagState::Ok | LagState::BeyondHistory, Some(bytes)) => {
            if standby.position.replay_pause == ReplayPause::Paused {
                return CatchUp::Never;
            }
            let rates = standby.bytes_per_second.zip(line.rate.bytes_per_second());
            rates.map_or(CatchUp::Unknown, |(replay, write)| {
                let gain = replay - write;
                // A gain of nothing gives more seconds than there are.
                let seconds = if gain > 0.0 { float(bytes) / gain } else { f64::INFINITY };
                Duration::try_from_secs_f64(seconds).map_or(CatchUp::Never, CatchUp::In)
            })
        }
        _ => CatchUp::Unknown,
    }
}
