//! Which server is the primary of each group, and what it cost when that changed; pure.

use std::collections::BTreeMap;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use serde::Serialize;
use tokio_postgres::types::PgLsn;

use crate::component::Component;
use crate::facts::{Answer, Facts};
use crate::judge::group;
use crate::probe::postgres::PostgresFacts;
use crate::settle::Now;

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
    /// How long nobody took writes at most: from the last answer of the old to the first of the new.
    pub unavailable_at_most_seconds: f64,
    /// And at least: less the pauses between two questions.
    pub unavailable_at_least_seconds: f64,
    /// WAL that the old one had flushed beyond what the new one began with, if that can be told: commits
    /// in it are lost unless they wait for a standby.
    pub lost_bytes_at_most: Option<u64>,
}

/// What is remembered of a primary.
#[derive(Clone, Debug)]
struct Seen {
    primary: Primary,
    /// When the question was sent that it last answered as a primary: it took writes after that.
    asked_at: Duration,
    /// When a server was last asked and did not take writes, after that.
    silent_until: Duration,
}

/// The primaries as they were last seen to take writes.
#[derive(Clone, Debug, Default)]
pub struct Primaries(BTreeMap<u32, Seen>);

impl Primaries {
    /// Takes what is known now; returns the failovers that it shows.
    pub fn take(&mut self, facts: &Facts, now: Now) -> Vec<Failover> {
        let mut failovers = Vec::new();
        for group in group::groups(facts) {
            let Some((component, answer)) = group::primary(facts, group) else {
                if let Some(seen) = self.0.get_mut(&group) {
                    seen.silent_until = now.boot;
                }
                continue;
            };
            let found = found(component, answer, now);
            let Some(seen) = self.0.get(&group) else {
                self.0.insert(group, found);
                continue;
            };
            // An old primary that comes back is no failover; two that write are told elsewhere.
            if found.primary.timeline < seen.primary.timeline {
                continue;
            }
            if is_other(&seen.primary, &found.primary) {
                failovers.push(failover(group, seen, &found, answer));
            }
            self.0.insert(group, found);
        }
        failovers
    }

    /// The name of each group's primary, as last seen.
    pub fn names(&self) -> BTreeMap<u32, String> {
        self.0.iter().map(|(group, seen)| (*group, seen.primary.name.clone())).collect()
    }
}

fn is_other(old: &Primary, new: &Primary) -> bool {
    old.name != new.name || old.timeline != new.timeline
}

fn found(component: &Component, answer: &Answer<PostgresFacts>, now: Now) -> Seen {
    let PostgresFacts { timeline, lsn, .. } = answer.facts;
    let ago = TimeDelta::from_std(now.boot.saturating_sub(answer.answered_at)).unwrap_or_default();
    let primary = Primary { name: component.name.clone(), timeline, lsn, at: now.wall - ago };
    Seen { primary, asked_at: answer.asked_at, silent_until: answer.asked_at }
}

fn failover(group: u32, old: &Seen, new: &Seen, answer: &Answer<PostgresFacts>) -> Failover {
    let at_most = answer.answered_at.saturating_sub(old.asked_at);
    let at_least = old.silent_until.saturating_sub(old.asked_at);
    let began_with = new.primary.lsn.map(u64::from);
    Failover {
        group,
        old: old.primary.clone(),
        new: new.primary.clone(),
        unavailable_at_most_seconds: at_most.as_secs_f64(),
        unavailable_at_least_seconds: at_least.min(at_most).as_secs_f64(),
        lost_bytes_at_most: old
            .primary
            .lsn
            .map(u64::from)
            .zip(began_with)
            .map(|(flushed, began)| flushed.saturating_sub(began)),
    }
}
