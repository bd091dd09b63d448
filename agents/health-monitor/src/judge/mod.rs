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

use crate::catalogue::{ETCD_QUORUM, MEMBERS, PATRONI, PRIMARY, REACHABLE, REDUNDANCY, STREAMING};
use crate::check::{Check, Reading, Status};
use crate::component::{Component, Kind};
use crate::facts::{Facts, Membership, Of, Seen};
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
    all.extend(each(&facts.haproxy, |it, seen| {
        let mut readings = haproxy::judge(seen);
        let group = it.group.map(|group| group::roles(facts, group)).unwrap_or_default();
        if let Some(compared) = haproxy::compare(seen, &group) {
            readings.retain(|it| it.check != compared.check);
            readings.push(compared);
        }
        readings
    }));
    all.extend(each(&facts.redis, |it, seen| redis::judge(it, seen, scale)));
    all.extend(each(&facts.agents, |it, seen| {
        let readings = agent::judge(seen);
        let is_other = it.name.starts_with("backup-agent")
            && seen.now().is_some_and(|it| !repository::is_told_by(it));
        if is_other { vec![agent::other()] } else { readings }
    }));
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
    if let Some(membership) = &facts.membership {
        all.extend(judge_members(membership, now));
        missing(&mut all, membership);
    }
    let isolation = group::judge_isolation(facts);
    explain(&mut all, isolation.status, facts.membership.is_some());
    all.push(Taken { component: Component::cluster(), reading: isolation, at: now });
    all
}

/// Whether it is known who belongs to the cluster; and a group without anybody has no primary.
fn judge_members(membership: &Membership, now: Duration) -> Vec<Taken> {
    let Membership { unknown, is_early, empty_groups, .. } = membership;
    let of = |component, reading| Taken { component, reading, at: now };
    let members = match unknown {
        Some(_) if *is_early => None,
        Some(why) => Some(Reading::new(&MEMBERS, Status::Unknown, why.as_str())),
        None => Some(Reading::new(&MEMBERS, Status::Ok, "Patroni says who the members are")),
    };
    let empty = empty_groups.iter().map(|group| {
        let reason = "Patroni knows the group, and none of its members is there";
        let reading = Reading::new(&PRIMARY, Status::Critical, reason)
            .with_next("start its members; see `patronictl list`");
        of(Component::group(*group), reading)
    });
    members.map(|it| of(Component::cluster(), it)).into_iter().chain(empty).collect()
}

/// Who is not listed any more and does not answer has died, or was taken away: that has to be said.
fn missing(all: &mut [Taken], membership: &Membership) {
    for Taken { component, reading, .. } in all {
        let is_reachable = [&REACHABLE, &PATRONI].contains(&reading.check);
        if !is_reachable || reading.status == Status::Ok {
            continue;
        }
        let server = Component { kind: Kind::Postgres, ..component.clone() };
        if membership.left.contains(&server) {
            reading.reason = format!("{}; Patroni does not list it any more", reading.reason);
            let name = &component.name;
            let next =
                format!("bring it back; if it is gone for good: health-monitor forget {name}");
            reading.next = Some(next);
        }
    }
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
fn explain(all: &mut [Taken], isolation: Status, has_patroni: bool) {
    let bad = |checks: &[&Check]| -> BTreeSet<Option<u32>> {
        let bad = all.iter().filter(|it| it.reading.status != Status::Ok);
        let bad = bad.filter(|it| checks.contains(&it.reading.check));
        bad.map(|it| it.component.group).collect()
    };
    let is_critical = |it: &Taken, check: &Check| {
        it.reading.check == check && it.reading.status == Status::Critical
    };
    let no_primary: BTreeSet<Option<u32>> =
        all.iter().filter(|it| is_critical(it, &PRIMARY)).map(|it| it.component.group).collect();
    let no_quorum = all.iter().any(|it| is_critical(it, &ETCD_QUORUM));
    let ailing = bad(&[&REDUNDANCY, &REACHABLE, &STREAMING, &PATRONI]);
    for Taken { component, reading, .. } in all.iter_mut() {
        if reading.status == Status::Ok {
            continue;
        }
        // What is asked without a network is known all the same.
        let is_local = matches!(component.kind, Kind::Disk | Kind::Swarm);
        if isolation != Status::Ok && !is_local {
            reading.status = Status::Unknown;
            reading.reason = format!("this monitor reaches nobody; {}", reading.reason);
            reading.follows = true;
            continue;
        }
        let (groups, lacks) = match (component.kind, reading.check.name) {
            (Kind::Cluster, "members") if no_quorum => {
                reading.next =
                    Some("see the check etcd_quorum: they are listed in etcd".to_owned());
                reading.follows = true;
                continue;
            }
            (Kind::Group, "primary") if no_quorum && has_patroni && reading.next.is_none() => {
                let next =
                    "see the check etcd_quorum first: without it Patroni lets nobody take writes";
                reading.next = Some(next.to_owned());
                continue;
            }
            (Kind::Pgbouncer, "query" | "waiting") | (Kind::Haproxy, "write") => {
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::examples::{answered, failed, scale, server};
    use super::*;
    use crate::facts::Stage;
    use crate::probe::agent::AgentFacts;
    use crate::probe::disk::DiskFacts;
    use crate::probe::haproxy::{HaproxyFacts, Server};

    fn judged(facts: &Facts, component: &Component) -> Vec<(Status, String)> {
        let all = judge(facts, &Writes::default(), scale(), Duration::from_secs(1));
        let all = all.into_iter().filter(|it| it.component == *component);
        all.map(|it| (it.reading.status, it.reading.reason)).collect()
    }

    #[test]
    fn a_disk_is_known_where_nobody_can_be_reached() {
        let disk = Component::new(Kind::Disk, "data");
        let full = DiskFacts { free_bytes: 0, bytes: 100, free_inodes: 50, inodes: 100 };
        let mut facts = Facts::default();
        facts.disks.insert(disk.clone(), answered(full));
        for name in ["a", "b"] {
            let silent = failed(Stage::Timeout, "no answer");
            facts.postgres.insert(Component::of_group(Kind::Postgres, 0, name), silent);
        }
        let found = judged(&facts, &disk);
        assert!(found.iter().any(|(status, _)| *status == Status::Critical), "{found:?}");
    }

    #[test]
    fn nobody_is_told_to_promote_while_patroni_lacks_etcd() {
        let of = |etcd: &[Stage], membership: Option<Membership>| {
            let mut facts = Facts { membership, ..Facts::default() };
            for name in ["a", "b"] {
                let component = Component::of_group(Kind::Postgres, 0, name);
                facts.postgres.insert(component, answered(server(true)));
            }
            for (index, stage) in etcd.iter().enumerate() {
                let component = Component::new(Kind::Etcd, index.to_string());
                facts.etcd.insert(component, failed(*stage, "no answer"));
            }
            let all = judge(&facts, &Writes::default(), scale(), Duration::from_secs(1));
            let next = |check: &Check| {
                let found = all.iter().find(|it| it.reading.check == check)?;
                Some((found.reading.next_step().contains("etcd_quorum"), found.reading.follows))
            };
            (next(&PRIMARY).unwrap().0, next(&MEMBERS))
        };
        let unknown = Membership { unknown: Some("?".to_owned()), ..Membership::default() };
        let lost = [Stage::Refused];
        assert_eq!(of(&lost, Some(unknown.clone())), (true, Some((true, true))));
        assert_eq!(of(&lost, None), (false, None), "nobody waits for Patroni");
        assert_eq!(of(&[], Some(unknown)), (false, Some((false, false))));
    }

    #[test]
    fn a_proxy_that_sends_writes_to_a_standby_is_critical() {
        let proxy = Component::of_group(Kind::Haproxy, 0, "haproxy");
        let up = |name: &str| Server {
            name: name.to_owned(),
            is_up: true,
            state: "UP (L4OK)".to_owned(),
        };
        for (name, expected) in [
            ("a", (Status::Ok, "a is up")),
            ("b", (Status::Critical, "writes go to b, and a is the primary")),
        ] {
            let mut facts = Facts::default();
            for (name, in_recovery) in [("a", false), ("b", true)] {
                let component = Component::of_group(Kind::Postgres, 0, name);
                facts.postgres.insert(component, answered(server(in_recovery)));
            }
            let said = HaproxyFacts { write: Some(vec![up(name)]), read: None };
            facts.haproxy.insert(proxy.clone(), answered(said));
            let expected = (expected.0, expected.1.to_owned());
            assert!(judged(&facts, &proxy).contains(&expected), "{:?}", judged(&facts, &proxy));
        }
    }

    #[test]
    fn a_backup_agent_must_tell_of_a_repository() {
        for (name, status, expected) in [
            ("backup-agent", json!({"now": "2026-11-21T14:00:00Z", "groups": {}}), Status::Ok),
            ("backup-agent-1", json!({"groups": {"0": {"status": "ok"}}}), Status::Unknown),
            ("backup-agent-2", json!({}), Status::Unknown),
            ("lag-exporter", json!({}), Status::Ok),
        ] {
            let agent = Component::new(Kind::Agent, name);
            let mut facts = Facts::default();
            let said = AgentFacts { not_ready: Vec::new(), status };
            facts.agents.insert(agent.clone(), answered(said));
            assert_eq!(judged(&facts, &agent)[0].0, expected, "{name}");
        }
    }
}
