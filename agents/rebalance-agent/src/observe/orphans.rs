//! Questions about tables that are named as shards are, where Citus knows no placement of them.
//!
//! Nothing holds still meanwhile, so the server is asked, then the coordinator, and then the server again. A shard
//! that is made is known to the coordinator first; what a move makes is written down first. One that is
//! dropped is gone by the second time, or locked by the transaction that drops it.

use shared::pg::Connection;

use super::read::{AnswerError, Columns, rows_of};
use crate::catalogue::Catalogue;
use crate::known::{Known, Unknown};
use crate::orphans::{Facts, Named, Orphan};

/// More tables than that, with names like these, are not told apart.
const NAMED_MAX: usize = 10_000;

/// Tables whose name ends with a number that may be a shard's, but for those with a placement here, and for
/// distributed tables, which every node has. Temporary ones are nobody else's.
const NAMED: &str = r"
    SELECT table_.oid, namespace.nspname::text, table_.relname::text, number,
           (SELECT left(index_.relname, -1 - length(number::text))
              FROM pg_index JOIN pg_class AS index_ ON index_.oid = indexrelid
             WHERE indrelid = table_.oid AND right(index_.relname, 1 + length(number::text)) = '_' || number
             ORDER BY indisprimary DESC, index_.relname
             LIMIT 1)
      FROM pg_class AS table_
      JOIN pg_namespace AS namespace ON namespace.oid = table_.relnamespace
      CROSS JOIN LATERAL (SELECT substring(table_.relname FROM '_([1-9]\d{0,17})$')::bigint) AS suffix (number)
     WHERE table_.relkind IN ('r', 'p') AND table_.relpersistence <> 't'
       AND namespace.nspname NOT IN ('pg_catalog', 'information_schema') AND namespace.nspname NOT LIKE 'pg\_toast%'
       AND number BETWEEN $1 AND $2 AND number <> ALL ($3)
       AND NOT EXISTS (SELECT FROM pg_dist_partition WHERE logicalrelid = table_.oid)
     ORDER BY table_.oid
     LIMIT $4";

/// What Citus does with shards, it does under a lock of this class, which its own clean-up asks for too. A record
/// names a table with its schema, quoted or not.
///
/// Source: `AdvisoryLocktagClass` in `resource_lock.h`; `LockOperationId` in `shard_cleaner.c`.
const FACTS: &str = r#"
    SELECT EXISTS (SELECT FROM pg_locks
                    WHERE locktype = 'advisory' AND objsubid = 10
                      AND database = (SELECT oid FROM pg_database WHERE datname = current_database())),
           shard.shardid IS NOT NULL,
           coalesce(shard_name(shard.logicalrelid, shard.shardid)
                    IN (format('%I.%I', schema, name), CASE WHEN schema = 'public' THEN quote_ident(name) END), false),
           EXISTS (SELECT FROM pg_dist_placement AS it WHERE it.shardid = number AND it.groupid = $5),
           EXISTS (SELECT FROM pg_dist_placement AS it
                    WHERE it.shardid = number AND it.groupid <> $5 AND it.shardstate = 1),
           EXISTS (SELECT FROM pg_dist_cleanup AS it
                    WHERE it.node_group_id = $5 AND it.object_name ~ ('_' || number || '"?$')),
           EXISTS (SELECT FROM pg_dist_partition AS it
                     JOIN pg_class AS table_ ON table_.oid = it.logicalrelid
                     JOIN pg_namespace AS namespace ON namespace.oid = table_.relnamespace
                     JOIN pg_index ON indrelid = table_.oid
                     JOIN pg_class AS index_ ON index_.oid = indexrelid
                    WHERE namespace.nspname = schema AND index_.relname = index
                      AND table_.relname = left(name, -1 - length(number::text)))
      FROM unnest($1::text[], $2::text[], $3::bigint[], $4::text[]) WITH ORDINALITY
           AS named (schema, name, number, index, position)
      LEFT JOIN pg_dist_shard AS shard ON shard.shardid = number
     ORDER BY position"#;

/// Those that are there still, and that nobody drops.
const STILL: &str = "
    SELECT format('%I.%I', nspname, relname), pg_total_relation_size(table_.oid)
      FROM pg_class AS table_ JOIN pg_namespace AS namespace ON namespace.oid = table_.relnamespace
     WHERE table_.oid = $1
       AND NOT EXISTS (SELECT FROM pg_locks
                        WHERE locktype = 'relation' AND relation = table_.oid AND mode = 'AccessExclusiveLock'
                          AND database = (SELECT oid FROM pg_database WHERE datname = current_database()))";

/// The tables of shards without a placement on a server of a group.
pub(super) async fn find(
    server: &Connection,
    coordinator: &Connection,
    catalogue: &Catalogue,
    group: u32,
) -> Result<Known<Vec<Orphan>>, AnswerError> {
    let shards = || catalogue.placements.iter().map(|it| it.shard);
    let (Some(first), Some(last)) = (shards().min(), shards().max()) else {
        return Ok(Ok(Vec::new()));
    };
    // It hides the tables of shards from who is not Citus.
    server.simple_query("SET citus.override_table_visibility = off").await?;
    let placed = catalogue.placements.iter().filter(|it| it.group == group);
    let placed: Vec<i64> = placed.map(|it| it.shard).collect();
    let most = i64::try_from(NAMED_MAX + 1).unwrap_or(i64::MAX);
    let all = rows_of(server, NAMED, &[&first, &last, &placed, &most], named).await?;
    if NAMED_MAX < all.len() {
        let why = format!("more than {NAMED_MAX} tables are named as shards are");
        return Ok(Err(Unknown(why)));
    }
    let facts = facts(coordinator, &all, group).await?;
    let mut orphans = Vec::new();
    for (named, kind) in all.iter().zip(facts).filter_map(|(it, facts)| Some((it, facts.kind()?))) {
        let orphan = |it: &mut Columns<'_>| {
            let (table, bytes) = (it.take()?, it.number("the size of a table")?);
            Ok(Orphan { table, shard: named.number, bytes, kind })
        };
        orphans.extend(rows_of(server, STILL, &[&named.oid], orphan).await?);
    }
    Ok(Ok(orphans))
}

/// What the coordinator says of them, in their order.
async fn facts(
    coordinator: &Connection,
    all: &[Named],
    group: u32,
) -> Result<Vec<Facts>, AnswerError> {
    if all.is_empty() {
        return Ok(Vec::new());
    }
    let schemas: Vec<&str> = all.iter().map(|it| it.schema.as_str()).collect();
    let names: Vec<&str> = all.iter().map(|it| it.name.as_str()).collect();
    let numbers: Vec<i64> = all.iter().map(|it| it.number).collect();
    let indexes: Vec<Option<&str>> = all.iter().map(|it| it.index.as_deref()).collect();
    let group = i32::try_from(group).unwrap_or(-1);
    rows_of(coordinator, FACTS, &[&schemas, &names, &numbers, &indexes, &group], |it| {
        Ok(Facts {
            is_at_work: it.take()?,
            is_known: it.take()?,
            is_named_so: it.take()?,
            is_placed: it.take()?,
            is_elsewhere: it.take()?,
            is_recorded: it.take()?,
            is_like_one: it.take()?,
        })
    })
    .await
}

fn named(columns: &mut Columns<'_>) -> Result<Named, AnswerError> {
    Ok(Named {
        oid: columns.take()?,
        schema: columns.take()?,
        name: columns.take()?,
        number: columns.take()?,
        index: columns.take()?,
    })
}
