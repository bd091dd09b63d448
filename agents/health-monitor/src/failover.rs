//! Which server is the primary of each group, and what it cost when that changed; pure.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use serde::Serialize;
use tokio_postgres::types::PgLsn;

use crate::component::{Component, Kind};
use crate::facts::{Answer, Facts};
use crate::judge::group;
use crate::probe::postgres::PostgresFacts;
use crate::settle::Now;

/// So long another primary is searched for.
const SEARCHED_FOR: Duration = Duration::from_mins(2);

/// A primary, as it was last seen to take writes.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Primary {
    /// The server.
    pub name: String,
    /// The timeline it wrote.
    pub timeline: u32,
    /// How far it had flushed.
    #[serde(serialize_with = "as_text")]
    pub lsn: Option<PgLsn>,
    /// When it said so.
    pub at: DateTime<Utc>,
}

#[expect(clippy::ref_option, reason = "serde hands it over so")]
fn as_text<S: serde::Serializer>(lsn: &Option<PgLsn>, to: S) -> Result<S::Ok, S::Error> {
    lsn.map(|it| it.to_string()).serialize(to)
}

/// A group has another primary, or the same on a new timeline.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Failover {
    /// The group.
    pub group: u32,
    /// The old primary, when it was last seen to take writes.
    pub old: Primary,
    /// The new one, when it was first seen to.
    pub new: Primary,
    /// How long nobody took writes at most: from the last answer of the old, or the end of the connection
    /// that was kept to it, to the first answer of the new.
    pub unavailable_at_most_seconds: f64,
    /// And at least: from the first answer that the old one owed to the last of the new one as a standby.
    pub unavailable_at_least_seconds: f64,
    /// WAL that the old one had flushed beyond what the new one began with, if that can be told: commits
    /// in it are lost unless they wait for a standby.
    pub lost_bytes_at_most: Option<u64>,
}

/// What is remembered of a primary.
#[derive(Clone, Debug)]
struct Seen {
    primary: Primary,
    /// When the question was sent that it last answered as a primary, or a connection to it ended that
    /// was kept: it took writes until then.
    wrote_at: Duration,
    /// When it was first seen not to take writes: it had ended by then.
    ended_by: Option<Duration>,
}

/// The primaries as they were last seen to take writes.
#[derive(Clone, Debug, Default)]
pub struct Primaries {
    seen: BTreeMap<u32, Seen>,
    /// When the question was sent that each server last answered as a standby.
    standby_at: BTreeMap<Component, Duration>,
}

impl Primaries {
    /// Takes what is known now; returns the failovers that it shows.
    pub fn take(&mut self, facts: &Facts, now: Now) -> Vec<Failover> {
        let mut failovers = Vec::new();
        for group in group::groups(facts) {
            self.note_end(facts, group);
            if let Some((component, answer)) = group::primary(facts, group) {
                failovers.extend(self.note_primary(group, component, answer, now));
            }
        }
        self.standby_at.retain(|component, _| facts.postgres.contains_key(component));
        for (component, seen) in &facts.postgres {
            if let Some(answer) = seen.answer.as_ref().filter(|it| it.facts.in_recovery) {
                self.standby_at.insert(component.clone(), answer.asked_at);
            }
        }
        failovers
    }

    /// Notes when the known primary of a group was first seen not to take writes any more.
    fn note_end(&mut self, facts: &Facts, group: u32) {
        let Some(known) = self.seen.get_mut(&group) else { return };
        let component = Component::of_group(Kind::Postgres, group, &known.primary.name);
        let Some(seen) = facts.postgres.get(&component) else { return };
        let answer = seen.answer.as_ref();
        let demoted = answer.filter(|it| it.facts.in_recovery).map(|it| it.answered_at);
        let ended_by = seen.failing_since.or(demoted);
        known.ended_by = ended_by.map(|it| known.ended_by.unwrap_or(seen.lost_at.unwrap_or(it)));
        known.wrote_at = known.wrote_at.max(seen.lost_at.unwrap_or_default());
    }

    /// The groups that lost their primary not long ago, and have no other.
    pub fn leaderless(&self, now: Now) -> BTreeSet<u32> {
        let is_searched = |it: &Duration| now.boot.saturating_sub(*it) < SEARCHED_FOR;
        let lost = self.seen.iter().filter(|(_, it)| it.ended_by.as_ref().is_some_and(is_searched));
        lost.map(|(group, _)| *group).collect()
    }

    fn note_primary(
        &mut self,
        group: u32,
        component: &Component,
        answer: &Answer<PostgresFacts>,
        now: Now,
    ) -> Option<Failover> {
        let found = found(component, answer, now);
        let Some(known) = self.seen.get(&group) else {
            self.seen.insert(group, found);
            return None;
        };
        // An old primary that comes back is no failover; two that write are told elsewhere.
        if found.primary.timeline < known.primary.timeline {
            return None;
        }
        let standby_at = self.standby_at.get(component).copied();
        let failover = is_other(&known.primary, &found.primary)
            .then(|| failover(group, known, &found, (standby_at, answer.answered_at)));
        self.seen.insert(group, found);
        failover
    }

    /// The name of each group's primary, as last seen.
    pub fn names(&self) -> BTreeMap<u32, String> {
        self.seen.iter().map(|(group, seen)| (*group, seen.primary.name.clone())).collect()
    }
}

fn is_other(old: &Primary, new: &Primary) -> bool {
    old.name != new.name || old.timeline != new.timeline
}

fn found(component: &Component, answer: &Answer<PostgresFacts>, now: Now) -> Seen {
    let PostgresFacts { timeline, lsn, .. } = answer.facts;
    let ago = TimeDelta::from_std(now.boot.saturating_sub(answer.answered_at)).unwrap_or_default();
    let primary = Primary { name: component.name.clone(), timeline, lsn, at: now.wall - ago };
    Seen { primary, wrote_at: answer.asked_at, ended_by: None }
}

/// `times`: when the new one was last asked and answered as a standby, and when it first answered as a
/// primary.
fn failover(
    group: u32,
    old: &Seen,
    new: &Seen,
    (standby_at, primary_at): (Option<Duration>, Duration),
) -> Failover {
    let at_most = primary_at.saturating_sub(old.wrote_at);
    let at_least = old.ended_by.zip(standby_at).map(|(ended, began)| began.saturating_sub(ended));
    let lsns = old.primary.lsn.map(u64::from).zip(new.primary.lsn.map(u64::from));
    Failover {
        group,
        old: old.primary.clone(),
        new: new.primary.clone(),
        unavailable_at_most_seconds: at_most.as_secs_f64(),
        unavailable_at_least_seconds: at_least.unwrap_or_default().min(at_most).as_secs_f64(),
        lost_bytes_at_most: lsns.map(|(flushed, began)| flushed.saturating_sub(began)),
    }
}
