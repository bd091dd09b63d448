//! A server in its role: beside its primary.

use std::time::Duration;

use super::super::words::{bytes, duration, number};
use super::Server;
use crate::catalogue::{REPLICATION_LAG, ROLE, STREAMING};
use crate::check::{Reading, Status};
use crate::probe::postgres::PostgresFacts;

/// A standby has so long to follow a new timeline …
const FOLLOWS_WITHIN: Duration = Duration::from_secs(30);
/// … and so long where it lives on archived WAL: the control file tells it late.
const FOLLOWS_ARCHIVE_WITHIN: Duration = Duration::from_mins(10);
/// A receiver that is gone is a warning for so long: it is started anew every five seconds.
const RECEIVER_GONE_FOR: Duration = Duration::from_mins(1);
/// A primary says something every thirty seconds at least.
/// Source: `wal_sender_timeout` is 60 s by default, and half of it the longest silence.
const SILENT_FOR: Duration = Duration::from_secs(45);

/// A primary takes writes; a standby follows its primary.
pub(super) fn role(facts: &PostgresFacts, primary: Option<&PostgresFacts>) -> Reading {
    let critical = |reason: String| Reading::new(&ROLE, Status::Critical, reason);
    let word = if facts.in_recovery { "standby" } else { "primary" };
    let timeline = facts.timeline;
    let fine = || Reading::new(&ROLE, Status::Ok, format!("{word} on timeline {timeline}"));
    if let Some(primary) = primary
        && primary.system_identifier != facts.system_identifier
    {
        let (ours, theirs) = (facts.system_identifier, primary.system_identifier);
        return critical(format!(
            "it belongs to another cluster: its system identifier is {ours}, its primary's {theirs}"
        ));
    }
    if facts.read_only {
        return critical("it refuses writes: default_transaction_read_only is on".to_owned())
            .with_next("see who set it; with a full disk free space first");
    }
    let Some(primary) = primary.filter(|it| it.timeline != timeline) else { return fine() };
    let newest = primary.timeline;
    if !facts.in_recovery {
        return critical(format!(
            "it takes writes on timeline {timeline}, and the primary does on {newest}"
        ))
        .with_next("stop it before anything else; keep its data directory, then pg_rewind it");
    }
    let grace = if facts.should_stream { FOLLOWS_WITHIN } else { FOLLOWS_ARCHIVE_WITHIN };
    let changed_at = primary.role_since.max(facts.role_since);
    let since = changed_at.unwrap_or_else(|| primary.connected_at.max(facts.connected_at));
    if facts.at.saturating_sub(since) < grace {
        let reason = format!("standby on timeline {timeline}, about to follow to {newest}");
        return match changed_at {
            Some(_) => Reading::new(&ROLE, Status::Ok, reason),
            // It was so at the first look: perhaps for long.
            None => Reading::new(&ROLE, Status::Warning, format!("{reason}, or it has diverged")),
        };
    }
    critical(format!(
        "it stays on timeline {timeline}, and the primary is on {newest}: it may have diverged"
    ))
}

/// A standby receives and replays; told only while there is a primary to receive from.
pub(super) fn streaming(facts: &PostgresFacts, primary: Option<&PostgresFacts>) -> Option<Reading> {
    if !facts.in_recovery {
        return None;
    }
    if facts.replay_paused {
        let next = "SELECT pg_wal_replay_resume() after whatever it was for; a standby also pauses by \
                    itself where its max_connections and the like are below the primary's: see its log";
        let reading = Reading::new(&STREAMING, Status::Warning, "replay is paused");
        return Some(reading.with_next(next));
    }
    primary?;
    if !facts.should_stream {
        let reason = "it replays archived WAL: primary_conninfo is empty";
        return Some(Reading::new(&STREAMING, Status::Ok, reason));
    }
    let Some(since) = facts.not_streaming_since else { return Some(receives(facts)) };
    let gone_for = facts.at.saturating_sub(since);
    let status = if gone_for < RECEIVER_GONE_FOR { Status::Warning } else { Status::Critical };
    let what = match &facts.receiver {
        None => "no WAL receiver runs".to_owned(),
        Some(receiver) => format!("its WAL receiver is {}", receiver.status),
    };
    let reason = format!("it has received nothing for {}: {what}", duration(gone_for));
    Some(Reading::new(&STREAMING, status, reason))
}

fn receives(facts: &PostgresFacts) -> Reading {
    let silent_for = facts.receiver.as_ref().and_then(|it| it.silent_for).unwrap_or_default();
    if silent_for < SILENT_FOR {
        return Reading::new(&STREAMING, Status::Ok, "it streams");
    }
    let reason = format!("its WAL receiver has heard nothing for {}", duration(silent_for));
    Reading::new(&STREAMING, Status::Critical, reason)
        .with_next("see the network to the primary; a receiver that hangs is ended with the server")
}

/// How far a standby is behind, where the primary's position can be compared with its own.
pub(super) fn lag(
    server: Server<'_>,
    facts: &PostgresFacts,
    primary: Option<&PostgresFacts>,
) -> Option<Reading> {
    let primary = primary.filter(|it| {
        facts.in_recovery
            && (it.system_identifier, it.timeline) == (facts.system_identifier, facts.timeline)
    })?;
    let is_late = !facts.apply_delay.is_zero();
    let received = facts.receiver.as_ref().and_then(|it| it.lsn).filter(|_| is_late);
    let position = u64::from(received.or(facts.lsn)?);
    let behind = primary_at(primary, facts.at)?.saturating_sub(position);
    let reason = if is_late {
        let delay = duration(facts.apply_delay);
        format!("it lacks {} of WAL, and replays {delay} late on purpose", bytes(behind))
    } else {
        format!("it has {} of WAL to replay", bytes(behind))
    };
    Some(server.number(&REPLICATION_LAG, "behind", number(behind), reason))
}

/// Where the primary was when the standby was asked: between its last two answers, or at the nearer one.
/// At some gigabytes a minute a second would look like a lag.
fn primary_at(primary: &PostgresFacts, at: Duration) -> Option<u64> {
    let lsn = u64::from(primary.lsn?);
    let Some((then, earlier)) = primary.earlier.filter(|_| at < primary.at) else {
        return Some(lsn);
    };
    let earlier = u64::from(earlier);
    let span = primary.at.saturating_sub(then).as_secs_f64();
    let part = at.saturating_sub(then).as_secs_f64() / span.max(f64::MIN_POSITIVE);
    let written = number(lsn.saturating_sub(earlier)) * part.min(1.0);
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "at most what was written"
    )]
    Some(earlier + written as u64)
}
