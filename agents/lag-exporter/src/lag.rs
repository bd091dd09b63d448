//! How far one standby is behind the line of primaries.

use std::time::Duration;

use crate::line::Line;
use crate::observation::{PAGE_BYTES, ReplayPause, Sample, StandbyPosition};
use crate::pace::float;
use crate::past::Whose;
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
    /// Whether the primary was seen to have flushed just as much as it had received, and to have
    /// begun to write more.
    pub primary_has_more: bool,
    /// The newest timeline of which it surely has WAL; `None` unless that was told with the positions.
    pub timeline: Option<u32>,
    /// Whose WAL of that timeline it has.
    pub whose: Whose,
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
///
/// A standby does not go back, so what it was behind then it is not behind by more than the time
/// since: an upper bound is that of `now`.
pub fn lag(standby: Standby<'_>, line: &Line, now: Duration, stale_after: Duration) -> LagView {
    let Positions { replay, replay_at_most, receive } = match positions(standby, line) {
        Ok(positions) => positions,
        Err(state) => return none(state),
    };
    let Sample { asked_at, answered_at, .. } = *standby.sample;
    let since = now.saturating_sub(answered_at);
    let behind = |lsn| said(line.ring.behind(lsn, asked_at, answered_at), since, stale_after);
    let end = line.ring.position(asked_at).filter(|_| line.is_fresh(asked_at, stale_after));
    let bytes = |lsn: u64| end.map(|end| end.saturating_sub(lsn));
    let (state, mut replay_lag) = behind(replay);
    if replay < replay_at_most {
        let at_least = behind(replay_at_most).1.lower.unwrap_or_default();
        replay_lag.lower = replay_lag.lower.map(|lower| lower.min(at_least));
    }
    let replay_bytes = bytes(replay);
    let (receive_state, mut receive_lag) = behind(receive);
    // Until its receiver starts, it does not say what else is on its disk since an earlier run.
    let may_have_more =
        standby.position.receive_lsn.is_none() && receive_state != LagState::CaughtUp;
    if may_have_more {
        receive_lag = Lag { upper: receive_lag.upper, ..Lag::default() };
    }
    LagView {
        state,
        replay: replay_lag,
        receive: receive_lag,
        replay_bytes,
        receive_bytes: bytes(receive).filter(|_| !may_have_more),
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
    /// How far it has the line's WAL on its disk; at least, if it does not say what it received.
    pub receive: u64,
}

/// The positions of a standby, or why they cannot be compared with the line's.
///
/// # Errors
///
/// The state of a standby whose lag has no number.
pub fn positions(standby: Standby<'_>, line: &Line) -> Result<Positions, LagState> {
    let Standby { sample, position, timeline, whose, .. } = standby;
    if sample.identity.system_identifier != line.system_identifier {
        return Err(LagState::OtherCluster);
    }
    let (Some(replayed), Some(timeline)) = (position.replay_lsn.map(u64::from), timeline) else {
        return Err(LagState::Unknown);
    };
    match kinship(&line.forks, line.timeline, timeline, replayed) {
        Kinship::Diverged => return Err(LagState::Diverged),
        Kinship::Newer => return Err(LagState::PrimaryUnknown),
        Kinship::Shared if whose == Whose::ItsOwn => return Err(LagState::Diverged),
        Kinship::Shared if whose == Whose::Primarys => {}
        Kinship::Shared | Kinship::Unclear => return Err(LagState::Unknown),
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
/// process waits for WAL, the WAL ended there a sample ago, and the primary has begun to write more
/// than it has flushed. Without the last two it may as well be a startup process that was stopped
/// while it waited, and looks as if it still did. Without the second, as when replay is paused or the link is cut, it may be so and may not.
fn visible(standby: Standby<'_>, replayed: u64) -> (u64, u64) {
    let Standby { position, received_before, primary_has_more, .. } = standby;
    match position.receive_lsn.map(u64::from) {
        Some(received)
            if received.is_multiple_of(PAGE_BYTES)
                && (replayed..=replayed + PARTIAL_RECORD_BYTES_MAX).contains(&received) =>
        {
            let is_partial = position.startup_waits == Some(true)
                && received_before == Some(received)
                && primary_has_more;
            (if is_partial { received } else { replayed }, received)
        }
        _ => (replayed, replayed),
    }
}

/// What that means `since` the standby was asked.
fn said(behind: Behind, since: Duration, stale_after: Duration) -> (LagState, Lag) {
    let unknown = Lag::default();
    let by_now = |upper| Some(upper + since);
    match behind {
        Behind::Unknown => (LagState::PrimaryUnknown, unknown),
        Behind::Nothing { upper, seen } if seen + since <= stale_after => {
            let zero = Some(Duration::ZERO);
            (LagState::CaughtUp, Lag { lower: zero, estimate: zero, upper: by_now(upper) })
        }
        Behind::Nothing { upper, .. } => {
            (LagState::PrimaryUnknown, Lag { upper: by_now(upper), ..unknown })
        }
        Behind::By(lag) => (LagState::Ok, Lag { upper: lag.upper.and_then(by_now), ..lag }),
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
