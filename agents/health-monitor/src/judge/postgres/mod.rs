//! What a PostgreSQL server says, and what it comes to.

mod deep;
mod replication;

use std::time::Duration;

use super::silent::not_asked;
use super::words::{bytes, counted, duration, number};
use crate::catalogue::{ARCHIVING, CLOCK, CONNECTIONS, LOCKS, REACHABLE, SLOTS};
use crate::check::{Reading, Status};
use crate::component::Component;
use crate::facts::{Failure, Seen, Stage};
use crate::probe::postgres::{Archiver, PostgresFacts, Slot, StandardFacts};
use crate::thresholds::Scale;

pub use deep::judge_deep;

/// A server that starts or stops is a warning for so long: after a crash it replays WAL first.
const NOT_NOW_FOR: Duration = Duration::from_mins(2);

/// One server, and what its numbers are judged by.
#[derive(Clone, Copy)]
struct Server<'a> {
    component: &'a Component,
    scale: Scale<'a>,
}

impl Server<'_> {
    /// Judges a number; the reason says what was found.
    fn number(
        self,
        check: &'static crate::check::Check,
        name: &'static str,
        value: f64,
        reason: impl Into<String>,
    ) -> Reading {
        self.scale.judge(self.component, check, (name, value, None), reason)
    }
}

/// The readings of the basic and the standard checks. `primary` is what the primary of its group says,
/// if one answers: what can only be told beside it is left out otherwise.
pub fn judge(
    component: &Component,
    seen: &Seen<PostgresFacts>,
    primary: Option<&PostgresFacts>,
    scale: Scale<'_>,
) -> Vec<Reading> {
    if let Some(failure) = &seen.failure {
        let since = seen.failing_since.unwrap_or(seen.at);
        return vec![no_answer(failure, seen.at.saturating_sub(since))];
    }
    let Some(facts) = seen.now() else { return Vec::new() };
    let server = Server { component, scale };
    let mut readings = vec![reachable(facts), replication::role(facts, primary)];
    readings.extend(connections(server, facts));
    readings.extend(replication::streaming(facts, primary));
    readings.extend(replication::lag(server, facts, primary));
    readings.push(clock(server, facts));
    if let Some((_, standard)) = &facts.standard {
        readings.push(slots(server, standard));
        readings.extend(standard.archiver.as_ref().map(|it| archiving(server, it)));
        readings.push(locks(server, standard));
    }
    readings
}

fn no_answer(failure: &Failure, failing_for: Duration) -> Reading {
    let reading = |status| Reading::new(&REACHABLE, status, failure.error.as_str());
    match failure.stage {
        Stage::Dial | Stage::Refused => reading(Status::Critical),
        Stage::Timeout => reading(Status::Critical).with_next(
            "it hangs, or the network to it does: see whether its host answers, then its processes and \
             disks",
        ),
        Stage::Login => reading(Status::Critical).with_next(
            "compare password_file with the role's password (init-scripts/10-roles.sql), and see \
             pg_hba.conf; until then nothing else is known of the server",
        ),
        Stage::Tls => reading(Status::Critical)
            .with_next("see ssl_cert_file on the server, and ca_file here; reload after a change"),
        Stage::Full => reading(Status::Critical).with_next(CONNECTIONS.next),
        Stage::NotNow if failing_for < NOT_NOW_FOR => reading(Status::Warning)
            .with_next("wait: after a crash it replays WAL first; its log says how far it is"),
        Stage::NotNow => {
            let reason = format!("{}, for {}", failure.error, duration(failing_for));
            Reading::new(&REACHABLE, Status::Critical, reason)
                .with_next("see its log: how far it is in recovery, or who holds its shutdown up")
        }
        Stage::Answer => reading(Status::Critical).with_next("see the server's log"),
        Stage::NotAsked => not_asked(&REACHABLE, &failure.error),
    }
}

fn reachable(facts: &PostgresFacts) -> Reading {
    if facts.has_monitor {
        return Reading::new(&REACHABLE, Status::Ok, "it answers");
    }
    Reading::new(&REACHABLE, Status::Warning, "the role lacks pg_monitor: much stays unknown")
        .with_next("GRANT pg_monitor TO the role, on the primary")
}

fn connections(server: Server<'_>, facts: &PostgresFacts) -> Option<Reading> {
    let (used, max) = facts.connections;
    if !facts.has_monitor || max == 0 {
        return None;
    }
    let share = 100.0 * f64::from(used) / f64::from(max);
    let reason = format!("{used} of {max} connections are in use");
    Some(server.number(&CONNECTIONS, "used", share, reason))
}

fn clock(server: Server<'_>, facts: &PostgresFacts) -> Reading {
    let apart = facts.clock_ahead.abs();
    let direction = if facts.clock_ahead < 0.0 { "behind" } else { "ahead of" };
    let reason = format!("its clock is {apart:.1} s {direction} this monitor's");
    server.number(&CLOCK, "apart", apart, reason)
}

/// Names a few things, and says how many more there are.
fn a_few<'a>(names: impl Iterator<Item = &'a str>) -> String {
    const SHOWN: usize = 3;
    let names: Vec<&str> = names.collect();
    match names.get(..SHOWN) {
        Some(shown) if names.len() > SHOWN => {
            format!("{} and {} more", shown.join(", "), names.len() - SHOWN)
        }
        _ => names.join(", "),
    }
}

fn slots(server: Server<'_>, standard: &StandardFacts) -> Reading {
    let has = |slot: &&Slot, status: &str| slot.wal_status.as_deref() == Some(status);
    let with = |status: &str| {
        a_few(standard.slots.iter().filter(|it| has(it, status)).map(|it| it.name.as_str()))
    };
    let (lost, unreserved) = (with("lost"), with("unreserved"));
    let idle = standard.slots.iter().filter(|it| !it.active);
    let worst = idle.max_by_key(|it| it.retained_bytes);
    let held_back = worst.and_then(|it| it.retained_bytes).unwrap_or(0);
    let reason = match worst {
        _ if !lost.is_empty() => format!("lost its WAL: {lost}; its consumer must begin anew"),
        _ if !unreserved.is_empty() => {
            format!("loses its WAL at the next checkpoint: {unreserved}")
        }
        Some(slot) if held_back > 0 => {
            format!("{} has no consumer and holds back {}", slot.name, bytes(held_back))
        }
        _ => counted(standard.slots.len() as u64, "slot", "slots"),
    };
    let mut reading = server.number(&SLOTS, "held_back", number(held_back), reason);
    if !lost.is_empty() {
        reading.status = Status::Critical;
        let next = "drop it (pg_drop_replication_slot) and make it and its consumer anew; raise \
                    max_slot_wal_keep_size if it should last longer";
        return reading.with_next(next);
    }
    if !unreserved.is_empty() {
        reading.status = Status::Critical;
    }
    reading
}

fn archiving(server: Server<'_>, archiver: &Archiver) -> Reading {
    let late = archiver.failing_for.max(archiver.oldest_ready).unwrap_or_default();
    let files = counted(u64::from(archiver.ready), "file waits", "files wait");
    let waiting = match archiver.oldest_ready {
        Some(oldest) => format!("{files}, the oldest for {}", duration(oldest)),
        None => "no file waits".to_owned(),
    };
    let reason = match archiver.failing_for {
        Some(_) => format!("the last attempt to archive failed; {waiting}"),
        None => waiting,
    };
    server.number(&ARCHIVING, "late", late.as_secs_f64(), reason)
}

fn locks(server: Server<'_>, standard: &StandardFacts) -> Reading {
    let longest = standard.lock_wait.unwrap_or_default();
    let reason = match standard.lock_waiters {
        0 => "nobody waits for a lock".to_owned(),
        waiters => {
            let waiters = counted(u64::from(waiters), "session waits", "sessions wait");
            format!("{waiters} for a lock, the first for {}", duration(longest))
        }
    };
    server.number(&LOCKS, "longest", longest.as_secs_f64(), reason)
}

#[cfg(test)]
mod tests;
