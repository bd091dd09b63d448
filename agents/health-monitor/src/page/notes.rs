//! What a component that is well says of itself, in a few words.

use crate::component::{Component, Kind};
use crate::facts::{Facts, Of};
use crate::judge::words::{bytes, counted};
use crate::probe::agent::AgentFacts;
use crate::probe::disk::DiskFacts;
use crate::probe::etcd::EtcdFacts;
use crate::probe::haproxy::{HaproxyFacts, Server};
use crate::probe::pgbouncer::PgbouncerFacts;
use crate::probe::redis::RedisFacts;
use crate::probe::swarm::SwarmFacts;

/// The newest answer in words; empty if there is none.
pub(super) fn note(facts: &Facts, component: &Component) -> String {
    fn say<T>(known: &Of<T>, component: &Component, words: fn(&T) -> String) -> String {
        known.get(component).and_then(|it| it.now()).map(words).unwrap_or_default()
    }
    match component.kind {
        Kind::Etcd => say(&facts.etcd, component, etcd),
        Kind::Pgbouncer => say(&facts.pgbouncer, component, pgbouncer),
        Kind::Haproxy => say(&facts.haproxy, component, haproxy),
        Kind::Redis => say(&facts.redis, component, redis),
        Kind::Agent => say(&facts.agents, component, agent),
        Kind::Swarm => say(&facts.swarm, component, swarm),
        Kind::Disk => say(&facts.disks, component, disk),
        Kind::Patroni => say(&facts.patroni, component, |it| format!("{}, {}", it.role, it.state)),
        Kind::Cluster | Kind::Group | Kind::Postgres | Kind::Repository => String::new(),
    }
}

fn etcd(it: &EtcdFacts) -> String {
    let role = match it.leader_id {
        None => "knows no leader",
        Some(leader) if leader == it.member_id => "leader",
        Some(_) if it.is_learner => "learner",
        Some(_) => "follower",
    };
    format!("{role}, database of {}", bytes(it.db_bytes))
}

fn pgbouncer(it: &PgbouncerFacts) -> String {
    let (clients, most) = it.clients;
    let waiting: u32 = it.pools.iter().map(|pool| pool.waiting).sum();
    format!("{clients} of {most} clients, {}", counted(waiting.into(), "waits", "wait"))
}

fn haproxy(it: &HaproxyFacts) -> String {
    let backend = |name: &str, servers: &Option<Vec<Server>>| {
        servers.as_ref().map(|servers| {
            let up: Vec<_> = servers.iter().filter(|it| it.is_up).map(|it| &*it.name).collect();
            match &up[..] {
                [] => format!("{name} go nowhere"),
                [one] => format!("{name} go to {one}"),
                more => format!("{name} go to {} servers", more.len()),
            }
        })
    };
    let both = [backend("writes", &it.write), backend("reads", &it.read)];
    both.into_iter().flatten().collect::<Vec<_>>().join(", ")
}

fn redis(it: &RedisFacts) -> String {
    match it.memory {
        (used, 0) => format!("{}, {} in use", it.role, bytes(used)),
        (used, most) => format!("{}, {} of {} in use", it.role, bytes(used), bytes(most)),
    }
}

fn agent(it: &AgentFacts) -> String {
    it.not_ready.first().map_or_else(|| "ready".to_owned(), |why| format!("not ready: {why}"))
}

fn swarm(it: &SwarmFacts) -> String {
    let running: u32 = it.services.iter().map(|it| it.running).sum();
    let desired: u32 = it.services.iter().map(|it| it.desired.saturating_sub(it.done)).sum();
    let services = counted(it.services.len() as u64, "service", "services");
    format!("{services}, {running} of {desired} tasks run")
}

fn disk(it: &DiskFacts) -> String {
    format!("{} of {} free", bytes(it.free_bytes), bytes(it.bytes))
}
