//! Gates that close for what is on one group of servers.

use std::collections::BTreeMap;
use std::time::Duration;

use humantime::format_duration;
use tokio_postgres::types::PgLsn;

use super::{Gate, Inputs, Refusals, Scope};
use crate::config::Guard;
use crate::orphans::told;
use crate::servers::{GroupServers, Primary};
use crate::situation::room;
use crate::words::{bytes, count, some};

/// So many of each must be left: one for the move, and one for who comes at the same time.
const HEADROOM: u32 = 2;
/// A move opens several connections on either side, and applications must not be shut out.
const CONNECTIONS_HEADROOM: u32 = 10;
/// So long nobody may use a slot: a standby is restarted within it.
const IDLE_MAX: Duration = Duration::from_mins(1);

pub(super) fn check(inputs: Inputs<'_>, refusals: &mut Refusals) {
    for (group, servers) in &inputs.observation.servers {
        let scope = Scope::Group(*group);
        base_backups(scope, servers, refusals);
        // One that does not answer closes the gate of the cluster.
        if let Ok(primary) = &servers.primary {
            lag(scope, servers, inputs.limits, refusals);
            idle_slots(scope, primary, inputs.limits, refusals);
            transactions(scope, primary, inputs.limits, refusals);
            resources(scope, primary, refusals);
            disk(scope, primary, inputs.limits, refusals);
            leftovers(inputs, scope, primary, refusals);
        }
    }
}

fn base_backups(scope: Scope, servers: &GroupServers, refusals: &mut Refusals) {
    let check = |name: &str, known, refusals: &mut Refusals| {
        let what = format!("whether a base backup is taken from {name}");
        let number = refusals.known(Gate::BaseBackup, scope, &what, known);
        if number.is_some_and(|it| 0 < *it) {
            let reason = format!("a base backup is taken from {name}");
            refusals.add(Gate::BaseBackup, scope, reason, "wait for it to end");
        }
    };
    if let Ok(primary) = &servers.primary {
        check(&primary.name, &primary.base_backups, refusals);
    }
    for (name, standby) in &servers.standbys {
        match standby {
            Ok(standby) => check(name, &standby.base_backups, refusals),
            Err(why) => {
                let reason = format!("standby {name} does not answer: {why}");
                let next = "bring it back, or take it out of the topology";
                refusals.add(Gate::Reachable, scope, reason, next);
            }
        }
    }
}

/// Of each standby, what its primary says of it, or else what it says itself.
fn lag(scope: Scope, servers: &GroupServers, limits: &Guard, refusals: &mut Refusals) {
    let Ok(primary) = &servers.primary else { return };
    let what = format!("how far the standbys of {} are", primary.name);
    let senders = refusals.known(Gate::Lag, scope, &what, &primary.senders);
    let mut bad = BTreeMap::new();
    for it in senders.into_iter().flatten() {
        let reason = match it.state.as_str() {
            "streaming" => behind(&it.name, it.lag_bytes, limits),
            state => Some(format!("{} is in state {state}", it.name)),
        };
        bad.extend(reason.map(|reason| (it.name.as_str(), reason)));
    }
    for (name, standby) in &servers.standbys {
        // One that does not answer has its own gate.
        let Ok(standby) = standby else { continue };
        let reason = match &standby.replay {
            Err(why) => Some(format!("how far {name} is behind is unknown: {why}")),
            Ok(it) if !it.streams => Some(format!("{name} does not stream")),
            Ok(it) => {
                // It may be asked a little later than its primary.
                let lag =
                    |written: &PgLsn| Some(u64::from(*written).saturating_sub(u64::from(it.lsn?)));
                behind(name, primary.lsn.as_ref().ok().and_then(lag), limits)
            }
        };
        if let Some(reason) = reason {
            bad.entry(name.as_str()).or_insert(reason);
        }
    }
    for reason in bad.into_values() {
        let next = "wait until it has caught up; if it does not stream, see its log";
        refusals.add(Gate::Lag, scope, reason, next);
    }
}

fn behind(name: &str, lag_bytes: Option<u64>, limits: &Guard) -> Option<String> {
    match lag_bytes {
        None => Some(format!("how far {name} is behind is unknown")),
        Some(lag) if limits.lag_bytes_max < lag => {
            let (lag, most) = (bytes(lag), bytes(limits.lag_bytes_max));
            Some(format!("{name} is {lag} behind, and {most} may be"))
        }
        Some(_) => None,
    }
}

/// What a move writes is WAL, which they hold back until the disk is full, or until they are lost.
fn idle_slots(scope: Scope, primary: &Primary, limits: &Guard, refusals: &mut Refusals) {
    let what = format!("which slots of {} nobody reads from", primary.name);
    let slots = refusals.known(Gate::Slots, scope, &what, &primary.idle_slots);
    for it in slots.into_iter().flatten() {
        let is_long = it.idle_for.is_some_and(|idle| IDLE_MAX < idle);
        if !is_long && it.held_bytes <= limits.lag_bytes_max {
            continue;
        }
        let (name, held) = (&it.name, bytes(it.held_bytes));
        let idle = it
            .idle_for
            .map(|idle| format!(" for {}", format_duration(Duration::from_secs(idle.as_secs()))));
        let idle = idle.unwrap_or_default();
        let reason = format!(
            "nobody has read from slot {name} on {}{idle}, and it holds back {held} of WAL",
            primary.name
        );
        let next = format!(
            "bring back who reads from it; if it is gone for good, on {}: SELECT \
             pg_drop_replication_slot('{name}')",
            primary.name
        );
        refusals.add(Gate::Slots, scope, reason, next);
    }
}

fn transactions(scope: Scope, primary: &Primary, limits: &Guard, refusals: &mut Refusals) {
    let what = format!("which transactions are open on {}", primary.name);
    let known = &primary.oldest_transaction;
    let oldest = refusals.known(Gate::Transactions, scope, &what, known).and_then(Option::as_ref);
    if let Some(it) = oldest.filter(|it| limits.transaction_age_max < it.age) {
        let age = format_duration(Duration::from_secs(it.age.as_secs()));
        let reason = format!("{} on {} has written and is open for {age}", it.name, primary.name);
        let next = "end it: a move waits for it, and at its end writers wait with the move";
        refusals.add(Gate::Transactions, scope, reason, next);
    }
}

fn resources(scope: Scope, primary: &Primary, refusals: &mut Refusals) {
    if primary.wal_level != "logical" {
        let reason = format!("wal_level of {} is {}", primary.name, primary.wal_level);
        let next = "set wal_level = logical, and restart it";
        refusals.add(Gate::WalLevel, scope, reason, next);
    }
    let what = format!("what {} has left of its processes and slots", primary.name);
    let resources = refusals.known(Gate::Headroom, scope, &what, &primary.resources);
    for it in resources.into_iter().flatten() {
        let is_connections = it.setting == "max_connections";
        let needed = if is_connections { CONNECTIONS_HEADROOM } else { HEADROOM };
        if it.limit < it.used.saturating_add(needed) {
            let reason = format!(
                "{} of {} of {} are in use on {}, and {needed} must be left",
                it.used, it.limit, it.setting, primary.name
            );
            refusals.add(Gate::Headroom, scope, reason, format!("raise {}", it.setting));
        }
    }
}

fn disk(scope: Scope, primary: &Primary, limits: &Guard, refusals: &mut Refusals) {
    let what = format!("the disk of {}", primary.name);
    let room = room(primary, limits);
    if refusals.known(Gate::Disk, scope, &what, &room) == Some(&0)
        && let (Ok(disk), Ok(wal)) = (&primary.disk, &primary.wal)
    {
        let reason = format!(
            "{} of {} are free on the disk of {}, of which {} must stay free and {} are for WAL",
            bytes(disk.available),
            bytes(disk.total),
            primary.name,
            bytes(disk.reserve(limits.disk_free_min)),
            bytes(wal.growth()),
        );
        refusals.add(Gate::Disk, scope, reason, "make room, or add a worker");
    }
}

/// Objects of moves, while nobody moves anything.
fn leftovers(inputs: Inputs<'_>, scope: Scope, primary: &Primary, refusals: &mut Refusals) {
    let what = format!("what is left of moves on {}", primary.name);
    let names = refusals.known(Gate::Leftovers, scope, &what, &primary.artifacts);
    let what = format!("which tables on {} are of shards that are not there", primary.name);
    let orphans = refusals.known(Gate::Orphans, scope, &what, &primary.orphans);
    let catalogue = &inputs.observation.catalogue;
    let is_busy = |it: Option<usize>| it.is_some_and(|number| 0 < number);
    if is_busy(catalogue.jobs.as_ref().ok().map(Vec::len))
        || is_busy(catalogue.progress.as_ref().ok().map(Vec::len))
    {
        return;
    }
    for (reason, next) in orphans.map(|it| told(it, &primary.name)).into_iter().flatten() {
        refusals.add(Gate::Orphans, scope, reason, next);
    }
    if let Some(names) = names.filter(|it| !it.is_empty()) {
        let objects = count(names.len(), "object");
        let reason =
            format!("{objects} of a move that was broken off on {}: {}", primary.name, some(names));
        let records = catalogue.cleanup.as_ref().map(Vec::as_slice).unwrap_or_default();
        let is_known = |name: &str| records.iter().any(|it| it.object == name);
        let commands: Vec<_> = names.iter().filter_map(|it| drop_by_hand(it, is_known)).collect();
        let next = if commands.is_empty() {
            "CALL citus_cleanup_orphaned_resources(); a slot keeps WAL until it is dropped"
                .to_owned()
        } else {
            // Of no other role would Citus take it.
            format!(
                "Citus has no record of it: on {}, as a superuser, {}",
                primary.name,
                commands.join("; ")
            )
        };
        refusals.add(Gate::Leftovers, scope, reason, next);
    }
}

/// What drops an object that Citus will not, because it knows nothing of it.
fn drop_by_hand(object: &str, is_known: impl Fn(&str) -> bool) -> Option<String> {
    let (kind, name) = object.split_once(' ')?;
    if is_known(name) {
        return None;
    }
    match kind {
        "slot" => Some(format!("SELECT pg_drop_replication_slot('{name}')")),
        "publication" => Some(format!("DROP PUBLICATION {name}")),
        // Its slot is dropped by itself, on the node that it was for.
        "subscription" => Some(format!(
            "ALTER SUBSCRIPTION {name} DISABLE; ALTER SUBSCRIPTION {name} SET (slot_name = NONE); DROP \
             SUBSCRIPTION {name}"
        )),
        "role" => Some(format!("DROP ROLE {name}")),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_citus_has_no_record_of_is_dropped_by_hand() {
        for (object, expected) in [
            ("slot citus_shard_a", Some("SELECT pg_drop_replication_slot('citus_shard_a')")),
            ("publication citus_shard_a", Some("DROP PUBLICATION citus_shard_a")),
            (
                "subscription citus_shard_a",
                Some(
                    "ALTER SUBSCRIPTION citus_shard_a DISABLE; ALTER SUBSCRIPTION citus_shard_a SET (slot_name = \
                     NONE); DROP SUBSCRIPTION citus_shard_a",
                ),
            ),
            ("role citus_shard_a", Some("DROP ROLE citus_shard_a")),
            ("slot citus_shard_b", None),
            ("table", None),
        ] {
            let found = drop_by_hand(object, |it| it == "citus_shard_b");
            assert_eq!(found.as_deref(), expected, "{object}");
        }
    }
}
