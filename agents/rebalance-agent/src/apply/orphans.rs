//! Drops tables of shards that have no placement on their node.

use std::collections::BTreeMap;

use shared::pg::{Connection, Node, connect};

use super::{ApplyError, Hand};
use crate::observation::Observation;
use crate::orphans::{Kind, Orphan, drop_statement};

/// Whether Citus has it in use on another node, and not here; and whether it changes such things now.
const CHECK: &str = "
    SELECT NOT EXISTS (SELECT FROM pg_dist_placement WHERE shardid = $1 AND groupid = $2)
           AND EXISTS (SELECT FROM pg_dist_placement WHERE shardid = $1 AND groupid <> $2 AND shardstate = 1)
           AND NOT EXISTS (SELECT FROM pg_locks
                            WHERE locktype = 'advisory' AND objsubid = 10
                              AND database = (SELECT oid FROM pg_database WHERE datname = current_database()))";

impl Hand<'_> {
    /// Drops tables of shards that Citus has in use on other nodes, and returns what was dropped where. What may
    /// be all there is of a shard stays.
    ///
    /// # Errors
    ///
    /// A server refuses, or does not answer. What was dropped on others before is dropped.
    pub async fn drop_orphans(
        &self,
        observation: &Observation,
    ) -> Result<Vec<(Orphan, String)>, ApplyError> {
        let mut dropped = Vec::new();
        for (group, orphans) in copies(observation) {
            let Some(primary) = observation.catalogue.primary(group) else { continue };
            let (host, port, name) = (primary.host.clone(), primary.port, primary.address());
            let node = Node { group, name, host, port };
            let server = Box::pin(connect(self.settings, &node)).await?;
            let coordinator = Box::pin(connect(self.settings, self.coordinator)).await?;
            let tables: Vec<_> = orphans.iter().map(|it| it.table.clone()).collect();
            // Who uses them is waited for as long as the session waits for locks.
            let lock = format!("BEGIN; LOCK TABLE {} IN ACCESS EXCLUSIVE MODE", tables.join(", "));
            server.simple_query("SET citus.enable_manual_changes_to_shards = on").await?;
            server.simple_query(&lock).await?;
            if !are_copies(&coordinator, &orphans, group).await? {
                // The connection ends, and the transaction with it.
                let reason = format!("Citus is about to use shards on {node}: try again later");
                return Err(ApplyError::BrokenOff { reason });
            }
            server.simple_query(&drop_statement(&tables)).await?;
            server.simple_query("COMMIT").await?;
            dropped.extend(orphans.into_iter().map(|it| (it, node.name.clone())));
        }
        Ok(dropped)
    }
}

/// By group.
fn copies(observation: &Observation) -> BTreeMap<u32, Vec<Orphan>> {
    let of = |(group, servers): (&u32, &crate::servers::GroupServers)| {
        let orphans = servers.primary.as_ref().ok()?.orphans.as_ref().ok()?;
        let copies: Vec<_> = orphans.iter().filter(|it| it.kind == Kind::Copy).cloned().collect();
        (!copies.is_empty()).then_some((*group, copies))
    };
    observation.servers.iter().filter_map(of).collect()
}

/// Whether they are so still, now that nobody else has their locks.
async fn are_copies(
    coordinator: &Connection,
    orphans: &[Orphan],
    group: u32,
) -> Result<bool, ApplyError> {
    let group = i32::try_from(group).unwrap_or(-1);
    for it in orphans {
        let is_copy: bool = coordinator.query_one(CHECK, &[&it.shard, &group]).await?.get(0);
        if !is_copy {
            return Ok(false);
        }
    }
    Ok(true)
}
