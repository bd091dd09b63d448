//! Gates that close for the whole cluster.

use std::collections::BTreeMap;
use std::time::Duration;

use humantime::format_duration;

use super::{Gate, Inputs, Refusals, Scope, spent};
use crate::catalogue::{Catalogue, CitusNode, CleanupRecord, Link, Mover};
use crate::config::Limits;
use crate::job::RETRIES_FINE;
use crate::ledger::{Entry, Outcome, Setback};
use crate::observation::Observation;
use crate::surroundings::Health;
use crate::window::Opening;
use crate::words::{bytes, count, held, some};

/// A verdict that is older is none: the monitor judges at least each second.
const VERDICT_AGE_MAX: Duration = Duration::from_mins(1);

const ALL: Scope = Scope::Cluster;

pub(super) fn check(inputs: Inputs<'_>, refusals: &mut Refusals) {
    let observation = inputs.observation;
    catalogue(&observation.catalogue, refusals);
    sizes(observation, refusals);
    reachable(observation, refusals);
    links(&observation.catalogue, refusals);
    patroni(observation, refusals);
    busy(inputs, refusals);
    asked(inputs, refusals);
    health(inputs, refusals);
}

fn catalogue(catalogue: &Catalogue, refusals: &mut Refusals) {
    if !catalogue.is_coordinator {
        let next = "point [[nodes]] with group 0, or [patroni], at the coordinator";
        refusals.add(Gate::Coordinator, ALL, "the server that was asked is a worker", next);
    }
    for node in catalogue.nodes.iter().filter(|it| it.is_primary) {
        if !node.is_active {
            let reason = format!("{} is not active", node.address());
            let next = "activate it with citus_activate_node(), or remove it";
            refusals.add(Gate::Nodes, ALL, reason, next);
        } else if !node.is_synced {
            let reason = format!("the metadata of {} are out of date", node.address());
            let next = "Citus brings them up to date each minute; see the coordinator's log if not";
            refusals.add(Gate::Nodes, ALL, reason, next);
        }
    }
    let mut orphans: Vec<u32> = catalogue.placements.iter().map(|it| it.group).collect();
    orphans.extend(catalogue.nodes.iter().map(|it| it.group));
    orphans.sort_unstable();
    orphans.dedup();
    // The coordinator need not be a node of its own cluster.
    orphans.retain(|it| catalogue.primary(*it).is_none());
    for group in orphans {
        let reason = format!("pg_dist_node has no primary of group {group}");
        let next = "wait for the failover to end, or add the node";
        refusals.add(Gate::Nodes, ALL, reason, next);
    }
}

fn sizes(observation: &Observation, refusals: &mut Refusals) {
    let groups = observation.catalogue.shard_groups();
    let unknown: Vec<_> = groups.iter().filter_map(|it| it.bytes.as_ref().err()).collect();
    let tables = observation.catalogue.tables.values();
    let mut hidden: Vec<_> = tables.filter(|it| !it.is_visible).map(|it| it.name.clone()).collect();
    hidden.sort_unstable();
    if let Some(first) = unknown.first() {
        if !hidden.is_empty() {
            let (role, tables) = (&observation.role, some(&hidden));
            let reason = format!(
                "{role} may not use the schema of {tables}: Citus tells no size of a node that has \
                 a shard there"
            );
            let next = format!("GRANT USAGE ON SCHEMA … TO {role}");
            return refusals.add(Gate::Sizes, ALL, reason, next);
        }
        let more = match unknown.len() - 1 {
            0 => String::new(),
            more => format!(", nor are those of {more} more"),
        };
        let next = "see why the node does not answer the coordinator: its log has a WARNING";
        refusals.add(Gate::Sizes, ALL, format!("{first}{more}"), next);
    }
}

fn reachable(observation: &Observation, refusals: &mut Refusals) {
    for node in observation.catalogue.nodes.iter().filter(|it| it.is_primary) {
        let why = match observation.servers.get(&node.group) {
            Some(servers) => servers.primary.as_ref().err().map(ToString::to_string),
            None => Some("it was not asked".to_owned()),
        };
        if let Some(why) = why {
            let reason = format!("the primary of group {} does not answer: {why}", node.group);
            refusals.add(Gate::Reachable, ALL, reason, "bring it back, or wait for its failover");
        }
    }
}

fn links(catalogue: &Catalogue, refusals: &mut Refusals) {
    let what = "which node reaches which";
    let Some(links) = refusals.known(Gate::Links, ALL, what, &catalogue.links) else { return };
    let path = |it: &Link| format!("{} to {}", it.from, it.to);
    let broken: Vec<_> = links.iter().filter(|it| it.works == Some(false)).map(path).collect();
    if !broken.is_empty() {
        let reason = format!("no connection from {}", some(&broken));
        let next =
            "try citus_check_connection_to_node() there; look at pg_hba.conf and the network";
        refusals.add(Gate::Links, ALL, reason, next);
    }
    let unknown: Vec<_> = links.iter().filter(|it| it.works.is_none()).map(path).collect();
    if !unknown.is_empty() {
        let reason = format!("unknown whether there is a connection from {}", some(&unknown));
        refusals.add(Gate::Links, ALL, reason, "bring back the node that does not answer");
    }
}

fn patroni(observation: &Observation, refusals: &mut Refusals) {
    let Some(known) = &observation.patroni else { return };
    let Some(groups) = refusals.known(Gate::Patroni, ALL, "what Patroni does", known) else {
        return;
    };
    for node in observation.catalogue.nodes.iter().filter(|it| it.is_primary) {
        let (reason, next) = match groups.iter().find(|it| it.group == node.group) {
            None => ("is not in etcd", "see whether its scope and namespace are those configured"),
            Some(it) if !it.has_leader => ("has no leader", "wait for its failover to end"),
            Some(it) if it.is_paused => ("is paused", "end it with patronictl resume"),
            Some(it) if it.is_switching => ("is about to switch over", "wait for it to end"),
            Some(_) => continue,
        };
        refusals.add(Gate::Patroni, ALL, format!("group {} {reason}", node.group), next);
    }
}

fn busy(inputs: Inputs<'_>, refusals: &mut Refusals) {
    let catalogue = &inputs.observation.catalogue;
    let is_ours = |id| inputs.ledger.iter().any(|it| it.newest().any(|it| it.job == Some(id)));
    let jobs = refusals.known(Gate::Busy, ALL, "whether a job of Citus runs", &catalogue.jobs);
    for job in jobs.into_iter().flatten() {
        let retried = match job.retries {
            0 => String::new(),
            times => format!(", and a task of it failed {}", count(times as usize, "time")),
        };
        let reason = format!("job {} is {}: {}{retried}", job.id, job.state, job.description);
        let next = if is_ours(job.id) {
            "this agent began it and watches it; to stop it, rebalance-agent pause"
        } else if RETRIES_FINE < job.retries {
            "see citus_job_status(), and end it with citus_rebalance_stop() or citus_job_cancel()"
        } else {
            "wait for it to end, or end it with citus_rebalance_stop() or citus_job_cancel()"
        };
        refusals.add(Gate::Busy, ALL, reason, next);
    }
    let what = "whether a shard is moved";
    let moves = refusals.known(Gate::Busy, ALL, what, &catalogue.progress);
    for it in moves.into_iter().flatten().take(1) {
        let (shard, phase) = (it.shard, &it.phase);
        let reason = format!("shard {shard} is moved from {} to {}: {phase}", it.source, it.target);
        refusals.add(Gate::Busy, ALL, reason, "wait for it to end");
    }
    movers(inputs, refusals);
    let what = "what Citus has to clean up";
    let records = refusals.known(Gate::Cleanup, ALL, what, &catalogue.cleanup);
    let mut groups = BTreeMap::<Scope, Vec<&CleanupRecord>>::new();
    for record in records.into_iter().flatten() {
        // What a move left that succeeded is dropped as soon as nobody reads it, and that may be long.
        let scope = if record.is_deferred { Scope::Group(record.group) } else { ALL };
        groups.entry(scope).or_default().push(record);
    }
    for (scope, records) in groups {
        let names: Vec<_> =
            records.iter().map(|it| format!("{} on group {}", it.object, it.group)).collect();
        let reason =
            format!("{} of a move to clean up: {}", count(names.len(), "object"), some(&names));
        let servers = records.first().and_then(|it| inputs.observation.servers.get(&it.group));
        let primary = servers.and_then(|it| it.primary.as_ref().ok());
        let readers = primary.and_then(|it| it.readers.as_ref().ok()).filter(|it| !it.is_empty());
        let next = match (records.first(), primary.zip(readers)) {
            (Some(it), Some((primary, readers))) if it.is_deferred => format!(
                "Citus does so each 15 s, once nobody reads it: end {} on {}",
                readers.join(" and "),
                primary.name
            ),
            (Some(it), _) if it.is_deferred => format!(
                "Citus does so each 15 s, unless somebody reads it: there, SELECT pid, query FROM pg_locks JOIN \
                 pg_stat_activity USING (pid) WHERE relation = '{}'::regclass",
                it.object
            ),
            _ => "Citus does so each 15 s; if they stay, CALL citus_cleanup_orphaned_resources()"
                .to_owned(),
        };
        refusals.add(Gate::Cleanup, scope, reason, next);
    }
}

/// Sessions of this agent that nobody watches. One that was told to end keeps its locks until all nodes that
/// had a part in the move have answered.
fn movers(inputs: Inputs<'_>, refusals: &mut Refusals) {
    let catalogue = &inputs.observation.catalogue;
    let what = "which sessions move something";
    let movers = refusals.known(Gate::Busy, ALL, what, &catalogue.movers);
    let ledger = inputs.ledger.as_ref().ok();
    for Mover { pid, shard } in movers.into_iter().flatten() {
        let is_it = |it: &&Entry| shard.map_or(it.copies, |shard| it.shards.contains(&shard));
        match (ledger.and_then(|it| it.newest().find(is_it)), shard) {
            (Some(entry), _) if entry.outcome != Outcome::Started => {
                let node = |group: u32| {
                    let node = catalogue.primary(group);
                    node.map_or_else(|| format!("group {group}"), CitusNode::address)
                };
                let (from, to) = (node(entry.from), node(entry.to));
                let next = format!("bring back or fence {to} or {from}, whichever does not answer");
                refusals.add(Gate::Locks, ALL, held(*pid, entry.shard), next);
            }
            (Some(_), _) => {}
            (None, shard) => {
                let what = shard.map_or("reference tables".to_owned(), |it| format!("shard {it}"));
                let reason = format!("session {pid} of an agent on the coordinator moves {what}");
                refusals.add(Gate::Busy, ALL, reason, "wait for it to end");
            }
        }
    }
}

/// The window, a pause, the budget of the day.
fn asked(inputs: Inputs<'_>, refusals: &mut Refusals) {
    if let Some(Opening::Closed { next }) = inputs.window.map(|it| it.at(inputs.now)) {
        let opens = next.map_or_else(
            || "its schedule has no more times".to_owned(),
            |it| format!("it opens at {}", it.format("%Y-%m-%d %H:%M UTC")),
        );
        refusals.add(Gate::Window, ALL, "the window is closed", opens);
    }
    let control = refusals.known(Gate::Paused, ALL, "whether it is paused", inputs.control);
    if let Some(pause) = control.and_then(|it| it.pause_at(inputs.now)) {
        let next = "end it with rebalance-agent resume";
        refusals.add(Gate::Paused, ALL, pause.reason(), next);
    }
    let what = "what was moved in the last 24 hours";
    let Some(ledger) = refusals.known(Gate::Budget, ALL, what, inputs.ledger) else { return };
    for it in ledger.setbacks().into_iter().filter(|it| inputs.now < it.until) {
        let Setback { colocation, until, failures, why } = it;
        let scope = colocation.map_or(ALL, Scope::Colocation);
        let next = format!(
            "see the logs of the coordinator and of both nodes; it is tried again at {}, or at once after \
             rebalance-agent resume",
            until.format("%Y-%m-%d %H:%M:%S UTC")
        );
        let reason = format!("the last {failures} moves failed: {why}");
        refusals.add(Gate::Setbacks, scope, reason, next);
    }
    let (day, run) = spent(ledger, inputs.window, inputs.now);
    let Limits { bytes_per_day, moves_per_day, bytes_per_run, moves_per_run } = *inputs.budget;
    let of_run =
        if inputs.window.is_some() { "since the window opened" } else { "in the last hour" };
    for (spent, bytes_max, moves_max, when) in [
        (day, bytes_per_day, moves_per_day, "in the last 24 hours"),
        (run, bytes_per_run, moves_per_run, of_run),
    ] {
        let next = "wait, or raise [budget]";
        if moves_max <= spent.moves {
            let moves = count(spent.moves as usize, "shard group");
            let reason = format!("moves of {moves} began {when}, as many as may");
            refusals.add(Gate::Budget, ALL, reason, next);
        }
        if bytes_max <= spent.bytes {
            let (spent, limit) = (bytes(spent.bytes), bytes(bytes_max));
            refusals.add(
                Gate::Budget,
                ALL,
                format!("{spent} of {limit} began to be moved {when}"),
                next,
            );
        }
    }
}

fn health(inputs: Inputs<'_>, refusals: &mut Refusals) {
    if let Some(known) = &inputs.observation.verdict {
        let what = "the health monitor's verdict";
        if let Some(verdict) = refusals.known(Gate::Health, ALL, what, known) {
            let age = (inputs.now - verdict.decided_at).abs().to_std().unwrap_or_default();
            let next = "see the health monitor's status page";
            if VERDICT_AGE_MAX < age {
                let age = format_duration(Duration::from_secs(age.as_secs()));
                let reason = format!("the health monitor's verdict is {age} away from now");
                refusals.add(Gate::Health, ALL, reason, next);
            } else if Health::Warning < verdict.health {
                let name = match verdict.health {
                    Health::Critical => "critical",
                    _ => "unknown",
                };
                let reason = format!("the health monitor says {name}: {}", verdict.reason);
                refusals.add(Gate::Health, ALL, reason, next);
            }
        }
    }
    let Some(known) = &inputs.observation.activities else { return };
    let what = "what other agents do";
    let activities = refusals.known(Gate::Activity, ALL, what, known);
    for activity in activities.into_iter().flatten() {
        // A drill works on a server of its own, and a move is this agent's.
        if matches!(activity.kind.as_str(), "drill" | "move") {
            continue;
        }
        let (scope, of) = match activity.group {
            Some(group) if activity.kind != "restore" => (Scope::Group(group), String::new()),
            Some(group) => (ALL, format!(" of group {group}")),
            None => (ALL, String::new()),
        };
        let reason = format!("a {}{of} is under way", activity.kind);
        refusals.add(Gate::Activity, scope, reason, "wait for it to end");
    }
}
