//! What the backup agents say of the repository, group by group, and what it comes to.
//!
//! The repository outlives the agents. While one is silent, or tells of a group no more, nothing is known
//! of what it told; but by its last answer nothing can be older than that with the time since then, and
//! what is critical by that bound is so.

use std::collections::BTreeMap;
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::Deserialize;

use super::words::{bytes, duration};
use super::{Taken, group};
use crate::catalogue::{BACKUP_AGE, WAL_AGE};
use crate::check::{Reading, Status};
use crate::component::{Component, Kind};
use crate::facts::{Answer, Facts};
use crate::probe::agent::AgentFacts;
use crate::thresholds::Scale;

/// From this on an upload takes long: the backup agent says so in its log.
const UPLOAD_IS_LONG: Duration = Duration::from_secs(30);

/// What is read of a backup agent's `/status`.
#[derive(Deserialize)]
struct AgentStatus {
    /// When that was said, by the clock that the other times are by.
    now: DateTime<Utc>,
    groups: BTreeMap<u32, GroupStatus>,
}

#[derive(Deserialize)]
struct GroupStatus {
    state: State,
    wal: Option<Wal>,
}

#[derive(Deserialize)]
struct State {
    last_run: Option<LastRun>,
    last_error: Option<String>,
    repository: Option<Repository>,
}

#[derive(Deserialize)]
struct LastRun {
    finished_at: DateTime<Utc>,
}

#[derive(Deserialize)]
struct Repository {
    observed_at: DateTime<Utc>,
    newest_at: Option<DateTime<Utc>>,
    unreadable: u64,
    broken_at: Option<String>,
}

#[derive(Deserialize)]
struct Wal {
    caught_up_at: Option<DateTime<Utc>>,
    received: Option<Received>,
    failure: Option<String>,
    no_primary: Option<String>,
    /// How long the oldest upload is under way.
    upload_seconds: Option<u64>,
}

#[derive(Deserialize)]
struct Received {
    /// None until what is stored was compared.
    lag_bytes: Option<u64>,
}

/// What is known of one group; ages are by the agent's clock, and go on by ours.
#[derive(Default)]
struct Known {
    backup_age: Option<Duration>,
    wal_age: Option<Duration>,
    was_read: bool,
    unreadable: u64,
    broken_at: Option<String>,
    last_error: Option<String>,
    /// Why WAL is not being received.
    wal_failure: Option<String>,
    /// WAL is received, or is to be.
    is_received: bool,
    /// Bytes of WAL that the primary has and the repository has not.
    wal_lag_bytes: Option<u64>,
    /// How long an upload is under way, if that is long.
    upload_takes: Option<Duration>,
    /// When the repository was read, ago.
    read_ago: Duration,
    /// The agent that told this answers no more.
    is_silent: bool,
}

/// The readings of each group that a backup agent told of; `now` is by
/// [`clock::now`](crate::clock::now).
pub fn judge(facts: &Facts, scale: Scale<'_>, now: Duration) -> Vec<Taken> {
    let agents = &facts.agents;
    let mut groups: BTreeMap<u32, Known> = BTreeMap::new();
    // The newest answer counts: where agents share the groups, one has taken it from another.
    let answers = agents.values().filter_map(|seen| Some((seen, seen.answer.as_ref()?)));
    let mut answers: Vec<_> = answers.collect();
    answers.sort_by_key(|(_, answer)| answer.answered_at);
    for (seen, answer) in answers {
        for (group, known) in read(answer, now) {
            groups.insert(group, Known { is_silent: seen.failure.is_some(), ..known });
        }
    }
    // What is known ages by itself, so it is judged anew whenever an agent was asked.
    let at = agents.values().map(|seen| seen.at).max().unwrap_or(now);
    let mut taken = Vec::new();
    for (group, known) in &groups {
        let component = Component::of_group(Kind::Repository, *group, "");
        let readings = [Some(backup(&component, known, scale)), wal(&component, known, scale)];
        let readings = readings.into_iter().flatten().map(|it| doubt(it, known.is_silent));
        taken.extend(readings.map(|reading| (component.clone(), reading)));
    }
    // A group that still has servers, and had a repository.
    let watched = group::groups(facts);
    // Who was not asked yet, or is silent, may be the one that tells of a group.
    let is_early = facts.unasked.iter().any(|it| it.kind == Kind::Agent);
    let is_one_silent = agents.values().any(|it| it.failure.is_some());
    let is_told = |it: &u32| groups.contains_key(it);
    for group in watched.iter().filter(|it| !is_told(it) && !is_early && !groups.is_empty()) {
        let component = Component::of_group(Kind::Repository, *group, "");
        if !scale.before.get(&component).is_some_and(|it| it.contains_key(WAL_AGE.name)) {
            let reason = "no backup agent tells of it";
            let reading = Reading::new(&BACKUP_AGE, Status::Unknown, reason).with_next(
                "see whether a backup agent has the group in its configuration, and its log",
            );
            taken.push((component, Reading { follows: is_one_silent, ..reading }));
        }
    }
    for (component, checks) in scale.before {
        let group = component.group.filter(|_| component.kind == Kind::Repository);
        let is_new = taken.iter().any(|(it, _)| it == component);
        if !is_new && group.is_some_and(|it| watched.contains(&it) && !groups.contains_key(&it)) {
            let reason = "no backup agent tells of it any more";
            let reading = |check| Reading::new(check, Status::Unknown, reason);
            let gone = checks.values().map(|it| (component.clone(), reading(it.reading.check)));
            taken.extend(gone);
        }
    }
    taken.into_iter().map(|(component, reading)| Taken { component, reading, at }).collect()
}

/// What was said by an agent that is silent now is not known to be so still.
fn doubt(reading: Reading, is_silent: bool) -> Reading {
    if !is_silent || reading.status == Status::Critical {
        return reading;
    }
    let reason = format!("its agent is silent; by its last answer {}", reading.reason);
    let next = "see the check of the agent";
    // Who was told that something is wrong stays told; that the agent is silent is told of the agent.
    Reading { status: Status::Unknown, reason, follows: true, ..reading }.with_next(next)
}

/// Whether that is the `/status` of a backup agent.
pub(super) fn is_told_by(facts: &AgentFacts) -> bool {
    AgentStatus::deserialize(&facts.status).is_ok()
}

/// What an agent says, if it is a backup agent.
fn read(answer: &Answer<AgentFacts>, now: Duration) -> BTreeMap<u32, Known> {
    let Ok(status) = AgentStatus::deserialize(&answer.facts.status) else {
        return BTreeMap::new();
    };
    let since = now.saturating_sub(answer.answered_at);
    let age = |at: DateTime<Utc>| (status.now - at).to_std().unwrap_or_default() + since;
    let known = |GroupStatus { state, wal }: GroupStatus| {
        let State { last_run, last_error, repository } = state;
        let mut known = Known { last_error, was_read: repository.is_some(), ..Known::default() };
        if let Some(repository) = repository {
            known.read_ago = age(repository.observed_at);
            // The repository is read once a minute; the agent's own run may be newer.
            let newer = last_run.map(|it| it.finished_at).filter(|it| repository.observed_at < *it);
            known.backup_age = newer.or(repository.newest_at).map(age);
            known.unreadable = repository.unreadable;
            known.broken_at = repository.broken_at;
        }
        if let Some(wal) = wal {
            known.wal_age = wal.caught_up_at.map(age);
            known.wal_failure = wal.failure.or(wal.no_primary);
            known.is_received = true;
            known.wal_lag_bytes = wal.received.and_then(|it| it.lag_bytes);
            let takes = wal.upload_seconds.map(Duration::from_secs);
            known.upload_takes = takes.filter(|it| UPLOAD_IS_LONG <= *it);
        }
        known
    };
    status.groups.into_iter().map(|(group, status)| (group, known(status))).collect()
}

fn backup(component: &Component, known: &Known, scale: Scale<'_>) -> Reading {
    let Some(age) = known.backup_age else {
        // Once the repository was read, what is not there is missing.
        if !known.was_read {
            let reason = "the repository was not read yet";
            return Reading::new(&BACKUP_AGE, Status::Unknown, reason);
        }
        let ago = duration(known.read_ago);
        let mut reason = format!("there was no complete backup {ago} ago");
        if let Some(error) = &known.last_error {
            reason = format!("{reason}; the last run failed: {error}");
        }
        return Reading::new(&BACKUP_AGE, Status::Critical, reason);
    };
    let mut reason = format!("the newest is {} old", duration(age));
    let measure = ("age", age.as_secs_f64(), None);
    let mut status = Status::Ok;
    if let Some(error) = &known.last_error {
        reason = format!("{reason}; the last run failed: {error}");
        status = Status::Warning;
    }
    if known.unreadable != 0 {
        reason = format!("{reason}; {} cannot be read", known.unreadable);
        status = Status::Warning;
    }
    let reading = scale.judge(component, &BACKUP_AGE, measure, reason);
    Reading { status: reading.status.max(status), ..reading }
}

/// None where WAL is not received, but comes by `archive_command` alone: its servers tell of that.
fn wal(component: &Component, known: &Known, scale: Scale<'_>) -> Option<Reading> {
    let reading = |status, reason| Some(Reading::new(&WAL_AGE, status, reason));
    if let Some(segment) = &known.broken_at {
        let reason =
            format!("WAL after the newest backup is missing or contradictory, from {segment} on");
        let next =
            "`backup-agent list --wal` says which; then take a new backup: `backup-agent backup`";
        return Some(Reading::new(&WAL_AGE, Status::Critical, reason).with_next(next));
    }
    let failure = known.wal_failure.as_ref();
    let Some(age) = known.wal_age else {
        if let Some(failure) = failure {
            let reason = format!("none was stored since the agent began: {failure}");
            return reading(Status::Critical, reason);
        }
        if !known.is_received {
            return None;
        }
        let Some(behind) = known.wal_lag_bytes.map(bytes) else {
            let reason = "the agent began, and compares what is stored".to_owned();
            return reading(Status::Unknown, reason);
        };
        let mut reason = format!("the agent began, and has {behind} to store until all is");
        reason.push_str(&hangs(known));
        return reading(Status::Warning, reason);
    };
    let mut reason = format!("all WAL was stored {} ago", duration(age));
    if let Some(failure) = failure {
        reason = format!("{reason}; none is received: {failure}");
    }
    reason.push_str(&hangs(known));
    Some(scale.judge(component, &WAL_AGE, ("age", age.as_secs_f64(), None), reason))
}

/// What is said of an upload that takes long.
fn hangs(known: &Known) -> String {
    let takes = known.upload_takes.map(duration);
    takes.map_or_else(String::new, |it| {
        format!("; the repository has taken {it} for an upload so far")
    })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::examples::{answered_at, scale};
    use super::*;
    use crate::facts::{Failure, Of, Stage, record};
    use crate::probe::postgres::PostgresFacts;
    use crate::settle::{Now, Settled};
    use crate::verdict::Checks;

    fn facts(status: Value) -> AgentFacts {
        AgentFacts { not_ready: Vec::new(), status }
    }

    /// What a backup agent says at 14:00 of group 0.
    fn status(newest_at: &Value, caught_up_at: &Value, more: &Value) -> Value {
        let repository = json!({
            "observed_at": "2026-11-21T13:59:00Z", "backups": 1, "unreadable": more["unreadable"].as_u64().unwrap_or(0),
            "newest_at": newest_at, "broken_at": more["broken_at"],
        });
        json!({"cluster": "demo", "now": "2026-11-21T14:00:00Z", "groups": {"0": {
            "running": null,
            "state": {"last_run": more["last_run"], "last_error": more["last_error"], "repository": repository},
            "wal": {"caught_up_at": caught_up_at, "failure": more["failure"], "no_primary": null,
                "received": more["received"], "upload_seconds": more["upload_seconds"]},
        }}})
    }

    fn judged(agents: &Of<AgentFacts>, now: u64) -> Vec<(Status, String)> {
        let facts = Facts { agents: agents.clone(), ..Facts::default() };
        let found = judge(&facts, scale(), Duration::from_secs(now)).into_iter();
        let readings = found.map(|it| {
            assert_eq!(it.component, Component::of_group(Kind::Repository, 0, ""));
            (it.reading.status, it.reading.reason)
        });
        readings.collect()
    }

    fn agent(name: &str) -> Component {
        Component::new(Kind::Agent, name)
    }

    #[test]
    fn ages_gaps_and_failures_are_told() {
        let (ok, warning, unknown, critical) =
            (Status::Ok, Status::Warning, Status::Unknown, Status::Critical);
        let newest = json!("2026-11-21T02:00:00Z");
        let stored = json!("2026-11-21T13:59:59Z");
        let days_ago = json!("2026-11-19T02:00:00Z");
        let minutes_ago = json!("2026-11-21T13:58:00Z");
        for (said, expected) in [
            (
                status(&newest, &stored, &json!({})),
                vec![(ok, "the newest is 12 h old"), (ok, "all WAL was stored 1.0 s ago")],
            ),
            (
                status(&days_ago, &minutes_ago, &json!({"failure": "connection refused"})),
                vec![
                    (critical, "the newest is 2 d 12 h old"),
                    (warning, "all WAL was stored 2 min ago; none is received: connection refused"),
                ],
            ),
            (
                status(
                    &newest,
                    &stored,
                    &json!({"last_error": "disk full", "unreadable": 2, "broken_at": "000000010000000000000007"}),
                ),
                vec![
                    (
                        warning,
                        "the newest is 12 h old; the last run failed: disk full; 2 cannot be read",
                    ),
                    (
                        critical,
                        "WAL after the newest backup is missing or contradictory, from 000000010000000000000007 on",
                    ),
                ],
            ),
            (
                status(
                    &Value::Null,
                    &Value::Null,
                    &json!({"last_run": {"finished_at": "2026-11-21T13:59:30Z"}}),
                ),
                vec![
                    (ok, "the newest is 30 s old"),
                    (unknown, "the agent began, and compares what is stored"),
                ],
            ),
            (
                json!({"now": "2026-11-21T14:00:00Z", "groups": {"0": {"state": {}, "wal": null}}}),
                vec![(unknown, "the repository was not read yet")],
            ),
            (
                status(
                    &Value::Null,
                    &stored,
                    &json!({"received": {"lag_bytes": null}, "upload_seconds": 31}),
                ),
                vec![
                    (critical, "there was no complete backup 1 min ago"),
                    (
                        ok,
                        "all WAL was stored 1.0 s ago; the repository has taken 31 s for an upload so far",
                    ),
                ],
            ),
            (
                status(
                    &Value::Null,
                    &Value::Null,
                    &json!({"last_error": "no space", "received": {"lag_bytes": 16 << 20}}),
                ),
                vec![
                    (
                        critical,
                        "there was no complete backup 1 min ago; the last run failed: no space",
                    ),
                    (warning, "the agent began, and has 16.0 MiB to store until all is"),
                ],
            ),
            (
                json!({"now": "2026-11-21T14:00:00Z", "groups": {"0": {"state": {},
                       "wal": {"failure": "refused"}}}}),
                vec![
                    (unknown, "the repository was not read yet"),
                    (critical, "none was stored since the agent began: refused"),
                ],
            ),
        ] {
            let agents = Of::from([(agent("backup-agent"), answered_at(facts(said), 100))]);
            let expected = expected.into_iter().map(|(status, reason)| (status, reason.to_owned()));
            assert_eq!(judged(&agents, 100), expected.collect::<Vec<_>>());
        }
    }

    #[test]
    fn of_an_agent_that_is_silent_nothing_is_known_but_what_is_critical_by_its_last_answer() {
        let said =
            status(&json!("2026-11-21T02:00:00Z"), &json!("2026-11-21T13:59:59Z"), &json!({}));
        let mut agents = Of::from([(agent("backup-agent"), answered_at(facts(said), 100))]);
        let failure = Failure { stage: Stage::Dial, error: "no connection".to_owned() };
        let later = Duration::from_secs(500);
        record(&mut agents, &agent("backup-agent"), (later, later), Err(failure));
        let expected = [
            (
                Status::Unknown,
                "its agent is silent; by its last answer the newest is 12 h 6 min old".to_owned(),
            ),
            (Status::Critical, "all WAL was stored 6 min 41 s ago".to_owned()),
        ];
        assert_eq!(judged(&agents, 500), expected);
    }

    #[test]
    fn the_newest_answer_counts_and_others_are_not_asked_of_the_repository() {
        let old = status(&json!("2026-11-20T02:00:00Z"), &Value::Null, &json!({}));
        let new =
            status(&json!("2026-11-21T13:00:00Z"), &json!("2026-11-21T14:00:00Z"), &json!({}));
        let agents = Of::from([
            (agent("backup-agent-1"), answered_at(facts(new), 100)),
            (agent("backup-agent-2"), answered_at(facts(old), 50)),
            (agent("lag-exporter"), answered_at(facts(json!({"groups": []})), 100)),
        ]);
        let expected = [
            (Status::Ok, "the newest is 1 h old".to_owned()),
            (Status::Ok, "all WAL was stored 0.0 s ago".to_owned()),
        ];
        assert_eq!(judged(&agents, 100), expected);
        assert_eq!(judged(&Of::default(), 100), []);
    }

    #[test]
    fn a_group_that_no_backup_agent_tells_of_is_not_known() {
        let said =
            status(&json!("2026-11-21T13:00:00Z"), &json!("2026-11-21T14:00:00Z"), &json!({}));
        let mut facts = Facts::default();
        facts.agents.insert(agent("a"), answered_at(self::facts(said), 100));
        for group in [0, 1] {
            let server = Component::of_group(Kind::Postgres, group, "p");
            facts.postgres.insert(server, answered_at(PostgresFacts::default(), 100));
        }
        let of_one = |facts: &Facts| {
            let found = judge(facts, scale(), Duration::from_secs(100)).into_iter();
            let found = found.filter(|it| it.component.group == Some(1)).map(|it| it.reading);
            found.map(|it| (it.status, it.reason, it.follows)).collect::<Vec<_>>()
        };
        let reason = || "no backup agent tells of it".to_owned();
        assert_eq!(of_one(&facts), [(Status::Unknown, reason(), false)]);
        // Another one may.
        facts.unasked.insert(agent("b"));
        assert_eq!(of_one(&facts), []);
        facts.unasked.clear();
        let failure = Failure { stage: Stage::Dial, error: "no connection".to_owned() };
        let at = Duration::from_secs(100);
        record(&mut facts.agents, &agent("b"), (at, at), Err(failure));
        assert_eq!(of_one(&facts), [(Status::Unknown, reason(), true)]);
        // Nobody watches backups here.
        facts.agents.clear();
        assert_eq!(of_one(&facts), []);
    }

    #[test]
    fn a_repository_that_nobody_tells_of_any_more_is_not_known() {
        let component = Component::of_group(Kind::Repository, 0, "");
        let (boot, wall) = (Duration::ZERO, DateTime::UNIX_EPOCH);
        let reading = Reading::new(&BACKUP_AGE, Status::Critical, "there was none");
        let settled = Settled::new(reading, boot, Now { boot, wall });
        let before: Checks = [(component, [("backup_age", settled)].into())].into();
        let scale = Scale { before: &before, ..scale() };
        let mut facts = Facts::default();
        facts.agents.insert(agent("a"), answered_at(self::facts(json!({"groups": {}})), 100));
        assert_eq!(judge(&facts, scale, boot), [], "the group is gone too");
        let server = Component::of_group(Kind::Postgres, 0, "p");
        facts.postgres.insert(server, answered_at(PostgresFacts::default(), 100));
        let found = judge(&facts, scale, boot);
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].reading.status, Status::Unknown);
        assert_eq!(found[0].reading.reason, "no backup agent tells of it any more");
    }
}
