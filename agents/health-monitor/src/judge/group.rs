//! What the servers of a group come to together, and the cluster.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use chrono::DateTime;
use tokio_postgres::types::PgLsn;

use crate::catalogue::{ISOLATION, PRIMARY, REDUNDANCY, SPLIT_BRAIN};
use crate::check::{Reading, Status};
use crate::component::{Component, Kind};
use crate::facts::{Answer, Facts, Of, Seen, Stage};
use crate::probe::postgres::PostgresFacts;

/// Servers whose newest answers are further apart are not compared: one was promoted and the other
/// demoted in between.
pub const TOGETHER: Duration = Duration::from_secs(3);

/// A server that has written within so long goes on to write: even an idle primary logs a snapshot every
/// 15 s if anything was written before.
const WRITES_WITHIN: Duration = Duration::from_secs(20);

/// A server of the group and what it said last.
type Server<'a> = (&'a Component, &'a Seen<PostgresFacts>);

/// The servers of a group.
fn servers(facts: &Facts, group: u32) -> Vec<Server<'_>> {
    facts.postgres.iter().filter(|(component, _)| component.group == Some(group)).collect()
}

/// Those that say that they take writes, with the answer.
fn writable<'a>(servers: &[Server<'a>]) -> Vec<(&'a Component, &'a Answer<PostgresFacts>)> {
    let answers = servers.iter().filter_map(|(component, seen)| {
        let answer = seen.answer.as_ref().filter(|_| seen.failure.is_none())?;
        (!answer.facts.in_recovery).then_some((*component, answer))
    });
    answers.collect()
}

/// The servers of a group that say that they take writes, with the answer.
pub fn primaries(facts: &Facts, group: u32) -> Vec<(&Component, &Answer<PostgresFacts>)> {
    writable(&servers(facts, group))
}

/// The servers of a group by name, and whether each is the primary: the one of the newest timeline, if
/// several take writes. `None` is one that does not say.
pub fn roles(facts: &Facts, group: u32) -> Vec<(&str, Option<bool>)> {
    let primary = primary(facts, group).map(|(it, _)| it);
    let servers = servers(facts, group).into_iter();
    let role = |(it, seen): Server<'_>| seen.now().map(|_| primary.is_some_and(|one| one == it));
    servers.map(|server| (server.0.name.as_str(), role(server))).collect()
}

/// The primary of a group, as its servers say: the one of the newest timeline, if several take writes.
pub fn primary(facts: &Facts, group: u32) -> Option<(&Component, &Answer<PostgresFacts>)> {
    writable(&servers(facts, group)).into_iter().max_by_key(|(_, answer)| answer.facts.timeline)
}

/// When each server that takes writes was last seen to have written.
#[derive(Clone, Debug, Default)]
pub struct Writes(BTreeMap<Component, Position>);

#[derive(Clone, Copy, Debug)]
struct Position {
    timeline: u32,
    lsn: Option<PgLsn>,
    moved_at: Option<Duration>,
}

impl Writes {
    /// Takes what the servers say now.
    pub fn take(&mut self, facts: &Facts) {
        self.0.retain(|component, _| facts.postgres.contains_key(component));
        for (component, seen) in &facts.postgres {
            let Some(answer) = seen.answer.as_ref().filter(|it| !it.facts.in_recovery) else {
                self.0.remove(component);
                continue;
            };
            let PostgresFacts { timeline, lsn, .. } = answer.facts;
            let new = Position { timeline, lsn, moved_at: None };
            let known = self.0.entry(component.clone()).or_insert(new);
            if known.timeline != timeline {
                *known = new;
            } else if known.lsn < lsn {
                *known = Position { moved_at: Some(answer.answered_at), ..new };
            }
        }
    }

    fn goes_on(&self, component: &Component, now: Duration) -> bool {
        let moved_at = self.0.get(component).and_then(|it| it.moved_at);
        moved_at.is_some_and(|it| now.saturating_sub(it) <= WRITES_WITHIN)
    }
}

/// The readings of a group.
pub fn judge(facts: &Facts, writes: &Writes, group: u32) -> Vec<Reading> {
    let servers = servers(facts, group);
    if servers.is_empty() {
        return Vec::new();
    }
    let twins = twins(&servers);
    let mut writable = writable(&servers);
    writable.retain(|(it, _)| twins.iter().all(|(_, again)| again != it));
    let is_waiting =
        facts.unasked.iter().any(|it| it.kind == Kind::Postgres && it.group == Some(group));
    if writable.is_empty() && is_waiting {
        // One that was not asked yet may be the primary.
        return Vec::new();
    }
    let primary = judge_primary(&servers, &writable);
    let mut readings = vec![match twins.first() {
        Some((one, again)) if primary.status == Status::Ok => {
            let reason = format!("{} and {} are the same server", one.name, again.name);
            let next = "list it once: under two names it is taken for two";
            Reading::new(&PRIMARY, Status::Warning, reason).with_next(next)
        }
        _ => primary,
    }];
    readings.push(judge_split_brain(&writable, writes));
    readings.extend(match writable[..] {
        [(_, answer)] => judge_redundancy(&servers, &answer.facts),
        _ if servers.len() > 1 => {
            let reason = "there is no one primary to ask which standbys stream";
            let reading = Reading::new(&REDUNDANCY, Status::Unknown, reason);
            let reading = reading.with_next("it needs a primary first: see what is said of that");
            Some(Reading { follows: true, ..reading })
        }
        _ => None,
    });
    readings
}

/// Servers that are one, under two addresses: no other has the same identity and was started in the same
/// microsecond.
fn twins<'a>(servers: &[Server<'a>]) -> Vec<(&'a Component, &'a Component)> {
    let identity = |(component, seen): &Server<'a>| {
        let PostgresFacts { system_identifier, started_at, timeline, .. } = seen.now()?;
        let is_known = *started_at != DateTime::UNIX_EPOCH;
        is_known.then_some((*component, (*system_identifier, *started_at, *timeline)))
    };
    let known: Vec<_> = servers.iter().filter_map(identity).collect();
    let mut twins = Vec::new();
    for (index, (one, id)) in known.iter().enumerate() {
        let others = known.iter().skip(index + 1).filter(|(_, other)| other == id);
        twins.extend(others.map(|(again, _)| (*one, *again)));
    }
    twins
}

fn names(components: &[&Component]) -> String {
    components.iter().map(|it| it.name.as_str()).collect::<Vec<_>>().join(", ")
}

fn judge_primary(
    servers: &[Server<'_>],
    writable: &[(&Component, &Answer<PostgresFacts>)],
) -> Reading {
    let silent: Vec<&Component> =
        servers.iter().filter(|(_, seen)| seen.failure.is_some()).map(|(it, _)| *it).collect();
    match writable {
        [(component, answer)] if answer.facts.read_only => {
            let reason = format!("{} is the primary and refuses writes", component.name);
            let next = "see default_transaction_read_only on it; with a full disk free space first";
            Reading::new(&PRIMARY, Status::Critical, reason).with_next(next)
        }
        [(component, answer)] => {
            let timeline = answer.facts.timeline;
            let reason = format!("{} takes writes on timeline {timeline}", component.name);
            Reading::new(&PRIMARY, Status::Ok, reason)
        }
        // Split brain is said by its own check.
        [_, _, ..] => {
            let writable: Vec<_> = writable.iter().map(|(it, _)| *it).collect();
            let reason = format!("{} servers take writes: {}", writable.len(), names(&writable));
            Reading::new(&PRIMARY, Status::Critical, reason).with_next(SPLIT_BRAIN.next)
        }
        [] if servers.iter().any(|(_, seen)| seen.is_not_asked()) => {
            let reason = "not all were asked, and none of the others takes writes";
            Reading::new(&PRIMARY, Status::Unknown, reason)
        }
        [] if servers.iter().any(|(_, seen)| is_there(seen)) => {
            let there = servers.iter().filter(|(_, seen)| is_there(seen));
            let there: Vec<&Component> = there.map(|(it, _)| *it).collect();
            let reason = format!("{} may take writes: it runs, and does not say", names(&there));
            let reading = Reading::new(&PRIMARY, Status::Unknown, reason)
                .with_next("promote none: see first why it does not let this monitor ask");
            Reading { follows: true, ..reading }
        }
        [] if silent.is_empty() => {
            Reading::new(&PRIMARY, Status::Critical, "all servers are standbys: none takes writes")
        }
        [] => {
            let reason =
                format!("none that answers takes writes; no answer from {}", names(&silent));
            Reading::new(&PRIMARY, Status::Critical, reason)
        }
    }
}

/// Whether a server runs that does not say what it is: it lets this monitor not in, or nobody now.
fn is_there(seen: &Seen<PostgresFacts>) -> bool {
    let is_there = |stage| matches!(stage, Stage::Login | Stage::Tls | Stage::Full | Stage::Answer);
    seen.failure.as_ref().is_some_and(|it| is_there(it.stage))
}

/// Two that take writes are a candidate for split brain: a moment of a switchover may look the same.
/// It is confirmed when more than one of them goes on to write.
fn judge_split_brain(
    writable: &[(&Component, &Answer<PostgresFacts>)],
    writes: &Writes,
) -> Reading {
    let newest = writable.iter().map(|(_, answer)| answer.answered_at).max().unwrap_or_default();
    let together: Vec<_> = writable
        .iter()
        .filter(|(_, it)| newest.saturating_sub(it.answered_at) <= TOGETHER)
        .collect();
    let [_, _, ..] = together[..] else {
        return Reading::new(&SPLIT_BRAIN, Status::Ok, "at most one server takes writes");
    };
    let said: Vec<String> = together
        .iter()
        .map(|(component, answer)| {
            let PostgresFacts { timeline, lsn, system_identifier, .. } = &answer.facts;
            let lsn = lsn.map_or_else(|| "unknown".to_owned(), |it| it.to_string());
            format!("{} (timeline {timeline}, {lsn}, system {system_identifier})", component.name)
        })
        .collect();
    let going_on = together.iter().filter(|(it, _)| writes.goes_on(it, newest)).count();
    let (status, word) = if going_on > 1 {
        (Status::Critical, "confirmed: these go on to write")
    } else {
        (Status::Warning, "candidate: these say that they take writes")
    };
    Reading::new(&SPLIT_BRAIN, status, format!("{word}: {}", said.join(", ")))
}

fn judge_redundancy(servers: &[Server<'_>], primary: &PostgresFacts) -> Option<Reading> {
    let expected = servers.len() - 1;
    if expected == 0 {
        return None;
    }
    let (_, standard) = primary.standard.as_ref()?;
    let streaming = standard.senders.iter().filter(|it| it.state == "streaming").count();
    let waits = !standard.synchronous_standby_names.is_empty();
    let confirms =
        standard.senders.iter().any(|it| matches!(it.sync_state.as_str(), "sync" | "quorum"));
    let reason = format!("{streaming} of {expected} standbys stream");
    Some(if waits && !confirms {
        let reason = format!("commits wait for a standby, and none confirms: {reason}");
        let next = "bring a standby of synchronous_standby_names back; until then writes hang";
        Reading::new(&REDUNDANCY, Status::Critical, reason).with_next(next)
    } else if streaming == 0 {
        Reading::new(&REDUNDANCY, Status::Critical, reason)
    } else if streaming < expected {
        Reading::new(&REDUNDANCY, Status::Warning, reason)
    } else {
        Reading::new(&REDUNDANCY, Status::Ok, reason)
    })
}

/// Whether this monitor sees anything: if two or more components were asked and nobody at all can be
/// reached, it is more likely this host that is cut off.
pub fn judge_isolation(facts: &Facts) -> Reading {
    /// Whether each was reached; one that refuses a login is there, and the host of one that refuses
    /// connections.
    fn reached<T>(known: &Of<T>) -> impl Iterator<Item = bool> {
        known.values().map(|seen| {
            seen.failure.as_ref().is_none_or(|it| !matches!(it.stage, Stage::Dial | Stage::Timeout))
        })
    }
    let Facts { postgres, patroni, etcd, pgbouncer, haproxy, redis, agents, .. } = facts;
    let all: Vec<bool> = reached(postgres)
        .chain(reached(patroni))
        .chain(reached(etcd))
        .chain(reached(pgbouncer))
        .chain(reached(haproxy))
        .chain(reached(redis))
        .chain(reached(agents))
        .collect();
    let (asked, there) = (all.len(), all.iter().filter(|it| **it).count());
    let reason = format!("{there} of {asked} components can be reached");
    let is_isolated = asked > 1 && there == 0;
    let status = if is_isolated { Status::Critical } else { Status::Ok };
    Reading::new(&ISOLATION, status, reason)
}

/// The groups that anything is known of.
pub fn groups(facts: &Facts) -> BTreeSet<u32> {
    let of_group =
        |component: &Component| component.group.filter(|_| component.kind == Kind::Postgres);
    facts.postgres.keys().filter_map(of_group).collect()
}

#[cfg(test)]
mod tests {
    use super::super::examples::{answered, failed, server};
    use super::*;

    fn named(name: &str) -> Component {
        Component::of_group(Kind::Postgres, 0, name)
    }

    fn primary_says(servers: Vec<(&str, Seen<PostgresFacts>)>) -> (Status, String) {
        let postgres = servers.into_iter().map(|(name, seen)| (named(name), seen)).collect();
        let facts = Facts { postgres, ..Facts::default() };
        let readings = judge(&facts, &Writes::default(), 0);
        assert!(readings.iter().all(|it| it.check != &SPLIT_BRAIN || it.status == Status::Ok));
        let found = readings.into_iter().find(|it| it.check == &PRIMARY).unwrap();
        (found.status, found.reason)
    }

    #[test]
    fn a_server_that_is_listed_twice_is_one() {
        let started_at = DateTime::from_timestamp_micros(1_800_000_000_000_007).unwrap();
        let once = || answered(PostgresFacts { started_at, timeline: 1, ..server(false) });
        let expected = (Status::Warning, "one and two are the same server".to_owned());
        assert_eq!(primary_says(vec![("one", once()), ("two", once())]), expected);
    }

    #[test]
    fn who_refuses_connections_has_a_host_that_is_there() {
        for (stage, expected) in [
            (Stage::Dial, Status::Critical),
            (Stage::Timeout, Status::Critical),
            (Stage::Refused, Status::Ok),
            (Stage::Login, Status::Ok),
        ] {
            let silent = |name| (named(name), failed(stage, "it does not answer"));
            let facts = Facts { postgres: ["a", "b"].map(silent).into(), ..Facts::default() };
            assert_eq!(judge_isolation(&facts).status, expected, "{stage:?}");
        }
    }
}
