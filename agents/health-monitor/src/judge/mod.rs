//! What was said, and what it comes to: pure.
//!
//! A judge reads the facts about its kind of component and says what each check of the catalogue comes
//! to. A component that does not answer gets one reading, of the check `reachable`: the others cannot be
//! told, and are left out rather than repeated.

pub mod agent;
pub mod disk;
pub mod drift;
pub mod etcd;
pub mod group;
pub mod haproxy;
pub mod patroni;
pub mod pgbouncer;
pub mod postgres;
pub mod redis;
pub mod repository;
pub mod swarm;
pub mod words;

#[cfg(test)]
mod examples;
mod silent;

use std::collections::BTreeSet;
use std::time::Duration;

use group::Writes;

use crate::catalogue::{PATRONI, PRIMARY, REACHABLE, REDUNDANCY, STREAMING};
use crate::check::{Check, Reading, Status};
use crate::component::{Component, Kind};
use crate::facts::{Facts, Of, Seen};
use crate::thresholds::Scale;

/// A reading, of what, and when it was taken.
#[derive(Clone, Debug, PartialEq)]
pub struct Taken {
    /// The component.
    pub component: Component,
    /// What it says.
    pub reading: Reading,
    /// When the newest of what it goes by was there.
    pub at: Duration,
}

/// Judges everything.
pub fn judge(facts: &Facts, writes: &Writes, scale: Scale<'_>, now: Duration) -> Vec<Taken> {
    let mut all = each(&facts.postgres, |it, seen| {
        let primary = it.group.and_then(|group| group::primary(facts, group));
        postgres::judge(it, seen, primary.map(|(_, answer)| &answer.facts), scale)
    });
    all.extend(each(&facts.deep, |it, seen| {
        postgres::judge_deep(it, seen, facts.postgres.get(it).and_then(Seen::now), scale)
    }));
    all.extend(each(&facts.patroni, |it, seen| {
        let server = Component { kind: Kind::Postgres, ..it.clone() };
        patroni::judge(seen, facts.postgres.get(&server).and_then(Seen::now))
    }));
    all.extend(each(&facts.etcd, |it, seen| etcd::judge(it, seen, scale)));
    all.extend(each(&facts.pgbouncer, |it, seen| pgbouncer::judge(it, seen, scale)));
    all.extend(each(&facts.haproxy, |_, seen| haproxy::judge(seen)));
    all.extend(each(&facts.redis, |it, seen| redis::judge(it, seen, scale)));
    all.extend(each(&facts.agents, |_, seen| agent::judge(seen)));
    for (stack, seen) in &facts.swarm {
        let readings = swarm::judge(stack, seen).into_iter();
        all.extend(readings.map(|(component, reading)| Taken { component, reading, at: seen.at }));
    }
    all.extend(repository::judge(facts, scale, now));
    all.extend(each(&facts.disks, |it, seen| disk::judge(it, seen, scale)));
    for number in group::groups(facts) {
        let of_group = facts.postgres.iter().filter(|(it, _)| it.group == Some(number));
        let at = of_group.map(|(_, seen)| seen.at).max().unwrap_or(now);
        let component = Component::group(number);
        let readings =
            group::judge(facts, writes, number).into_iter().chain(drift::judge(facts, number));
        all.extend(readings.map(|reading| Taken { component: component.clone(), reading, at }));
    }
    let is_waiting = facts.unasked.iter().any(|it| it.kind == Kind::Etcd);
    if let Some(reading) = etcd::judge_quorum(&facts.etcd).filter(|_| !is_waiting) {
        let at = facts.etcd.values().map(|seen| seen.at).max().unwrap_or(now);
        all.push(Taken { component: Component::cluster(), reading, at });
    }
    let isolation = group::judge_isolation(facts);
    explain(&mut all, isolation.status);
    all.push(Taken { component: Component::cluster(), reading: isolation, at: now });
    all
}

fn each<T>(
    known: &Of<T>,
    mut judge: impl FnMut(&Component, &Seen<T>) -> Vec<Reading>,
) -> Vec<Taken> {
    let mut taken = Vec::new();
    for (component, seen) in known {
        let at = seen.at;
        let readings = judge(component, seen).into_iter();
        taken.extend(readings.map(|reading| Taken { component: component.clone(), reading, at }));
    }
    taken
}

/// What follows from something else must not look like a fault of its own: a proxy without a primary or
/// a standby behind it is well, and of components beyond a cut network nothing is known.
fn explain(all: &mut [Taken], isolation: Status) {
    let bad = |checks: &[&Check]| -> BTreeSet<Option<u32>> {
        let bad = all.iter().filter(|it| it.reading.status != Status::Ok);
        let bad = bad.filter(|it| checks.contains(&it.reading.check));
        bad.map(|it| it.component.group).collect()
    };
    let no_primary = bad(&[&PRIMARY]);
    let ailing = bad(&[&REDUNDANCY, &REACHABLE, &STREAMING, &PATRONI]);
    for Taken { component, reading, .. } in all.iter_mut() {
        if reading.status == Status::Ok {
            continue;
        }
        if isolation != Status::Ok {
            reading.status = Status::Unknown;
            reading.reason = format!("this monitor reaches nobody; {}", reading.reason);
            reading.follows = true;
            continue;
        }
        let (groups, lacks) = match (component.kind, reading.check.name) {
            (Kind::Pgbouncer, "query") | (Kind::Haproxy, "write") => {
                (&no_primary, "has no primary")
            }
            (Kind::Haproxy, "read") => (&ailing, "lacks a standby"),
            _ => continue,
        };
        if groups.contains(&component.group) {
            let group = component.group.unwrap_or_default();
            reading.status = reading.status.min(Status::Warning);
            reading.reason = format!("group {group} {lacks}: {}", reading.reason);
            reading.follows = true;
        }
    }
}
