//! Questions to the coordinator's primary, about Citus.
//!
//! Columns are asked for by name: there are more of them in each version. Enumerations of Citus are
//! asked for as text, and lists are bounded.

use std::collections::BTreeMap;

use shared::pg::Connection;

use super::read::{AnswerError, Columns, known, only, row, rows};
use crate::catalogue::{
    Catalogue, CitusNode, CleanupRecord, Forbidden, Hindrance, Job, Link, Mover, Owner, Placement,
    PlannedShard, Progress, Table, TableKind,
};
use crate::known::Unknown;

const VERSION: &str = "SELECT (SELECT extversion FROM pg_extension WHERE extname = 'citus')";

/// Nodes of another `citus.cluster_name` are read replicas of this cluster. A clone that is not promoted
/// yet is `unavailable`, in a group of its own.
const NODES: &str = "
    SELECT nodeid::bigint, groupid::bigint, nodename, nodeport::bigint,
           noderole::text = 'primary', isactive, shouldhaveshards, hasmetadata AND metadatasynced
      FROM pg_dist_node
     WHERE nodecluster = coalesce(current_setting('citus.cluster_name', true), 'default')
       AND noderole::text <> 'unavailable'
     ORDER BY groupid, nodeid";

/// A replica identity is what logical replication tells rows apart by: the primary key, unless it is
/// deferrable, or an index, or all columns. A partitioned table has no rows of its own.
///
/// Source: `RelationCanPublishAllModifications` in Citus' `shard_transfer.c`, and
/// `RelationGetIndexList` in PostgreSQL's `relcache.c`.
const TABLES: &str = "
    SELECT table_.oid, partition_.logicalrelid::regclass::text, partition_.partmethod::text,
           partition_.repmodel::text, partition_.colocationid::bigint,
           table_.relkind = 'p' OR table_.relreplident = 'f' OR EXISTS (
               SELECT FROM pg_index
                WHERE indrelid = table_.oid AND indisvalid
                  AND CASE table_.relreplident
                      WHEN 'd' THEN indisprimary AND indimmediate
                      WHEN 'i' THEN indisreplident
                      ELSE false END),
           CASE WHEN table_.relkind = 'r' AND method.amname <> 'heap' THEN method.amname::text END,
           table_.relpersistence = 'u', table_.relforcerowsecurity,
           has_schema_privilege(table_.relnamespace, 'USAGE'),
           pg_get_userbyid(table_.relowner), coalesce(owner_.rolcanlogin, false),
           has_schema_privilege(table_.relowner, table_.relnamespace, 'CREATE'),
           pg_has_role(table_.relowner, 'USAGE')
      FROM pg_dist_partition AS partition_
      JOIN pg_class AS table_ ON table_.oid = partition_.logicalrelid
      LEFT JOIN pg_am AS method ON method.oid = table_.relam
      LEFT JOIN pg_roles AS owner_ ON owner_.oid = table_.relowner";

const PLACEMENTS: &str = "
    SELECT shard.shardid, shard.logicalrelid::oid, placement.groupid::bigint,
           placement.shardstate = 1, shard.shardminvalue, shard.shardmaxvalue
      FROM pg_dist_shard AS shard
      JOIN pg_dist_placement AS placement ON placement.shardid = shard.shardid
     ORDER BY shard.shardid, placement.placementid";

/// The view lists the secondaries too, with the same size; it tells none of a node that does not
/// answer.
const SIZES: &str = "
    SELECT shard.shardid, min(shard.shard_size)
      FROM citus_shards AS shard
      JOIN pg_dist_node AS node
        ON node.nodename = shard.nodename AND node.nodeport = shard.nodeport
     WHERE node.noderole::text = 'primary'
     GROUP BY shard.shardid
    HAVING count(*) = count(shard.shard_size)";

const CLEANUP: &str = "
    SELECT object_name, node_group_id::bigint, policy_type = 2
      FROM pg_dist_cleanup
     ORDER BY record_id
     LIMIT 1000";

const JOBS: &str = "
    SELECT job.job_id, job.state::text, job.description,
           coalesce(max(task.retry_count), 0)::bigint
      FROM pg_dist_background_job AS job
      LEFT JOIN pg_dist_background_task AS task ON task.job_id = job.job_id
     WHERE job.state::text NOT IN ('finished', 'cancelled', 'failed')
     GROUP BY job.job_id, job.state, job.description
     ORDER BY job.job_id
     LIMIT 100";

/// 0 is a move that has yet to begin, 1 one under way, 2 one that is done.
const PROGRESS: &str = "
    SELECT shardid, sourcename || ':' || sourceport, targetname || ':' || targetport, status
      FROM get_rebalance_progress()
     WHERE progress <> 2
     LIMIT 1000";

/// What is asked for is asked in one text, to the end of its transaction.
const MOVERS: &str = r"
    SELECT pid, substring(query FROM 'citus_move_shard_placement\((\d{1,18}),')::bigint
      FROM pg_stat_activity
     WHERE application_name = current_setting('application_name') AND usename = current_user
       AND state = 'active' AND pid <> pg_backend_pid()
       AND query ~ '^SELECT (citus_move_shard_placement|replicate_reference_tables)\('
     ORDER BY pid
     LIMIT 100";

const LINKS: &str = "
    SELECT from_nodename || ':' || from_nodeport, to_nodename || ':' || to_nodeport, result
      FROM citus_check_cluster_node_health()";

const PLAN: &str = "
    SELECT shardid, targetname || ':' || targetport
      FROM get_rebalance_table_shards_plan()";

/// That of the strategy by which Citus rebalances, unless it is the one that allows everything.
const ALLOWED_BY: &str = "
    SELECT format('%I.%I', namespace.nspname, function.proname)
      FROM pg_dist_rebalance_strategy AS strategy
      JOIN pg_proc AS function ON function.oid = strategy.shard_allowed_on_node_function
      JOIN pg_namespace AS namespace ON namespace.oid = function.pronamespace
     WHERE strategy.default_strategy
       AND (namespace.nspname, function.proname) <> ('pg_catalog', 'citus_shard_allowed_on_node_true')";

/// Shards that can be moved, and groups where that function does not want them.
fn forbidden_by(function: &str) -> String {
    format!(
        "SELECT shard.shardid, node.groupid::bigint
           FROM pg_dist_shard AS shard
           JOIN pg_dist_partition AS partition_ ON partition_.logicalrelid = shard.logicalrelid
          CROSS JOIN pg_dist_node AS node
          WHERE node.noderole::text = 'primary' AND node.shouldhaveshards
            AND (partition_.partmethod = 'h' OR partition_.repmodel <> 't' AND partition_.colocationid <> 0)
            AND {function}(shard.shardid, node.nodeid) IS NOT TRUE"
    )
}

/// Where the strategy wants no shards.
async fn forbidden(connection: &Connection) -> Result<Option<Forbidden>, AnswerError> {
    let Some(function) = rows(connection, ALLOWED_BY, only::<String>).await?.pop() else {
        return Ok(None);
    };
    let sql = forbidden_by(&function);
    let places = rows(connection, &sql, |it| Ok((it.take()?, it.number("groupid")?)));
    let places = places.await?.into_iter().collect();
    Ok(Some(Forbidden { function, places }))
}

/// The version of Citus in this database; `None` without it.
pub(super) async fn version(connection: &Connection) -> Result<Option<String>, AnswerError> {
    row(connection, VERSION, only).await
}

/// Reads the catalogue: what nothing can be decided without, and then what is unknown by itself.
pub(super) async fn read(
    connection: &Connection,
    version: String,
) -> Result<Catalogue, AnswerError> {
    let is_coordinator = "SELECT citus_is_coordinator()";
    let is_coordinator = row(connection, is_coordinator, only).await?;
    let nodes = rows(connection, NODES, node).await?;
    let tables = rows(connection, TABLES, table).await?.into_iter().collect();
    // Before what a node is asked for: one that hangs may hang a move.
    let movers = rows(connection, MOVERS, |it| Ok(Mover { pid: it.take()?, shard: it.take()? }));
    let movers = known(movers.await);
    let mut placements = rows(connection, PLACEMENTS, placement).await?;
    let sizes = rows(connection, SIZES, |it| Ok((it.take()?, it.number("the size of a shard")?)));
    let sizes: Result<BTreeMap<i64, u64>, _> =
        known(sizes.await.map(|it| it.into_iter().collect()));
    for it in &mut placements {
        let untold = || Unknown(format!("the size of shard {} is not told", it.shard));
        let unknown = |why: &Unknown| Unknown(format!("the sizes of shards are unknown: {why}"));
        let sizes = sizes.as_ref().map_err(unknown);
        it.bytes = sizes.and_then(|sizes| sizes.get(&it.shard).copied().ok_or_else(untold));
    }
    let cleanup = rows(connection, CLEANUP, |it| {
        let (object, group) = (it.take()?, it.number("node_group_id")?);
        Ok(CleanupRecord { object, group, is_deferred: it.take()? })
    });
    let cleanup = known(cleanup.await);
    let jobs = known(rows(connection, JOBS, job).await);
    let progress = known(rows(connection, PROGRESS, progress).await);
    let links = rows(connection, LINKS, |it| {
        Ok(Link { from: it.take()?, to: it.take()?, works: it.take()? })
    });
    let links = known(links.await);
    let plan =
        rows(connection, PLAN, |it| Ok(PlannedShard { shard: it.take()?, target: it.take()? }));
    let citus_plan = known(plan.await);
    let forbidden = known(forbidden(connection).await);
    Ok(Catalogue {
        version,
        is_coordinator,
        nodes,
        tables,
        placements,
        cleanup,
        jobs,
        progress,
        movers,
        links,
        citus_plan,
        forbidden,
    })
}

fn node(columns: &mut Columns<'_>) -> Result<CitusNode, AnswerError> {
    Ok(CitusNode {
        id: columns.number("nodeid")?,
        group: columns.number("groupid")?,
        host: columns.take()?,
        port: columns.number("nodeport")?,
        is_primary: columns.take()?,
        is_active: columns.take()?,
        should_have_shards: columns.take()?,
        is_synced: columns.take()?,
    })
}

fn table(columns: &mut Columns<'_>) -> Result<(u32, Table), AnswerError> {
    let oid = columns.take()?;
    let name = columns.take()?;
    let mut letter = || -> Result<char, AnswerError> {
        let text: &str = columns.take()?;
        Ok(text.chars().next().unwrap_or(' '))
    };
    let (partitioned_by, replication) = (letter()?, letter()?);
    let colocation = columns.number("colocationid")?;
    let has_replica_identity = columns.take()?;
    let (method, is_unlogged, is_forced): (Option<String>, bool, bool) =
        (columns.take()?, columns.take()?, columns.take()?);
    let hindrance = match method {
        Some(method) => Some(Hindrance::AccessMethod(method)),
        None if is_unlogged => Some(Hindrance::Unlogged),
        None => is_forced.then_some(Hindrance::RowSecurity),
    };
    let is_visible = columns.take()?;
    let owner = Owner {
        name: columns.take()?,
        can_login: columns.take()?,
        can_create: columns.take()?,
        is_ours: columns.take()?,
    };
    let kind = TableKind::of(partitioned_by, replication, colocation);
    let table =
        Table { name, kind, colocation, has_replica_identity, hindrance, is_visible, owner };
    Ok((oid, table))
}

/// Without its size, which is asked for by itself.
fn placement(columns: &mut Columns<'_>) -> Result<Placement, AnswerError> {
    Ok(Placement {
        shard: columns.take()?,
        table: columns.take()?,
        group: columns.number("groupid")?,
        is_active: columns.take()?,
        range: (columns.take()?, columns.take()?),
        bytes: Err(Unknown::because("it was not asked for")),
    })
}

fn job(columns: &mut Columns<'_>) -> Result<Job, AnswerError> {
    let id = columns.take()?;
    let state = columns.take()?;
    let description: Option<String> = columns.take()?;
    let description = description.unwrap_or_default();
    Ok(Job { id, state, description, retries: columns.number("retry_count")? })
}

fn progress(columns: &mut Columns<'_>) -> Result<Progress, AnswerError> {
    let shard = columns.take()?;
    let (source, target) = (columns.take()?, columns.take()?);
    let phase: Option<String> = columns.take()?;
    Ok(Progress { shard, source, target, phase: phase.unwrap_or_default() })
}
