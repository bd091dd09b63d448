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
    /// in it are lost unless they wait for a standby. Where both wrote that cannot be told.
    pub lost_bytes_at_most: Option<u64>,
    /// The new one took writes before the old one had ended: what one of the two wrote is lost.
    pub both_wrote: bool,
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
    /// Each server that takes writes, as it was when it was first seen to, and when.
    began: BTreeMap<Component, (Primary, Duration)>,
}

impl Primaries {
    /// Takes what is known now; returns the failovers that it shows.
    pub fn take(&mut self, facts: &Facts, now: Now) -> Vec<Failover> {
        let mut failovers = Vec::new();
        self.note_begin(facts, now);
        for group in group::groups(facts) {
            self.note_end(facts, group);
            failovers.extend(self.note_primary(facts, group, now));
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

    /// Notes since when each server takes writes on its timeline.
    fn note_begin(&mut self, facts: &Facts, now: Now) {
        let mut began = BTreeMap::new();
        for group in group::groups(facts) {
            for (component, answer) in group::primaries(facts, group) {
                let known = self.began.remove(component);
                let known = known.filter(|(it, _)| it.timeline == answer.facts.timeline);
                let first = || (primary(component, answer, now), answer.answered_at);
                began.insert(component.clone(), known.unwrap_or_else(first));
            }
        }
        self.began = began;
    }

    /// Notes who is the primary of a group: the one of the newest timeline, if several take writes; and
    /// whoever does so alone, once the one of before is seen not to.
    fn note_primary(&mut self, facts: &Facts, group: u32, now: Now) -> Option<Failover> {
        let writable = group::primaries(facts, group);
        let known = self.seen.get_mut(&group);
        let still = known
            .as_ref()
            .and_then(|known| writable.iter().find(|(it, _)| it.name == known.primary.name));
        let order = |it: &&(&Component, &Answer<PostgresFacts>)| {
            (it.1.facts.timeline, still.is_some_and(|still| still.0 == it.0))
        };
        let (component, answer) = *writable.iter().max_by_key(order)?;
        let found = Seen {
            primary: primary(component, answer, now),
            wrote_at: answer.asked_at,
            ended_by: None,
        };
        let Some(known) = known else {
            self.seen.insert(group, found);
            return None;
        };
        if !is_other(&known.primary, &found.primary) {
            *known = found;
            return None;
        }
        let (began, began_at) = self.began.get(component)?;
        if let Some((_, still)) = still.filter(|it| it.0 != component) {
            // It has to be asked once more: does it write as well, or did it end before?
            if still.asked_at < *began_at {
                return None;
            }
            (known.wrote_at, known.ended_by) = (still.asked_at, None);
        } else if found.primary.name != known.primary.name
            && found.primary.timeline < known.primary.timeline
            && !has_ended(group, known, facts, now)
        {
            return None;
        }
        let standby_at = self.standby_at.get(component).copied();
        let failover = failover(group, known, began, (standby_at, *began_at));
        *known = found;
        Some(failover)
    }

    /// Whether a server counts as the primary of its group.
    pub fn has(&self, server: &Component) -> bool {
        let known = server.group.and_then(|it| self.seen.get(&it));
        known.is_some_and(|it| it.primary.name == server.name)
    }

    /// The name of each group's primary, as last seen.
    pub fn names(&self) -> BTreeMap<u32, String> {
        self.seen.iter().map(|(group, seen)| (*group, seen.primary.name.clone())).collect()
    }
}

fn is_other(old: &Primary, new: &Primary) -> bool {
    old.name != new.name || old.timeline != new.timeline
}

/// Whether the primary of before does not take writes any more: one lost answer does not say so.
fn has_ended(group: u32, known: &Seen, facts: &Facts, now: Now) -> bool {
    let component = Component::of_group(Kind::Postgres, group, &known.primary.name);
    let seen = facts.postgres.get(&component);
    seen.is_none_or(|seen| match seen.failing_since {
        Some(since) => group::TOGETHER < now.boot.saturating_sub(since),
        None => seen.now().is_some_and(|it| it.in_recovery),
    })
}

fn primary(component: &Component, answer: &Answer<PostgresFacts>, now: Now) -> Primary {
    let PostgresFacts { timeline, lsn, .. } = answer.facts;
    let ago = TimeDelta::from_std(now.boot.saturating_sub(answer.answered_at)).unwrap_or_default();
    Primary { name: component.name.clone(), timeline, lsn, at: now.wall - ago }
}

/// `times`: when the new one was last asked and answered as a standby, and when it first answered as a
/// primary.
fn failover(
    group: u32,
    old: &Seen,
    new: &Primary,
    (standby_at, primary_at): (Option<Duration>, Duration),
) -> Failover {
    let at_most = primary_at.saturating_sub(old.wrote_at);
    let at_least = old.ended_by.zip(standby_at).map(|(ended, began)| began.saturating_sub(ended));
    let both_wrote = old.primary.name != new.name && primary_at <= old.wrote_at;
    let lsns = old.primary.lsn.map(u64::from).zip(new.lsn.map(u64::from));
    let lsns = lsns.filter(|_| !both_wrote && old.primary.timeline <= new.timeline);
    Failover {
        group,
        both_wrote,
        old: old.primary.clone(),
        new: new.clone(),
        unavailable_at_most_seconds: at_most.as_secs_f64(),
        unavailable_at_least_seconds: at_least.unwrap_or_default().min(at_most).as_secs_f64(),
        lost_bytes_at_most: lsns.map(|(flushed, began)| flushed.saturating_sub(began)),
    }
}
