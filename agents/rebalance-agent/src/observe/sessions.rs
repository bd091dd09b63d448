//! Who is behind a process.

use shared::pg::Connection;

use super::read::{AnswerError, Columns, rows_of};
use crate::catalogue::{Catalogue, CitusNode};
use crate::servers::Session;

/// The columns of a [`Session`], of `pg_stat_activity AS process`.
pub(super) const COLUMNS: &str = "
    process.pid, coalesce(process.usename::text, ''), process.application_name, host(process.client_addr)";

/// Those that have a lock on one of these tables, the longest first.
const READERS: &str = "
      FROM pg_stat_activity AS process
     WHERE pid <> pg_backend_pid()
       AND pid IN (SELECT lock.pid FROM pg_locks AS lock
                    WHERE locktype = 'relation' AND granted
                      AND relation = ANY (ARRAY(SELECT to_regclass(name)::oid FROM unnest($1::text[]) AS name)))
     ORDER BY xact_start, pid
     LIMIT 3";

pub(super) fn session(columns: &mut Columns<'_>) -> Result<Session, AnswerError> {
    Ok(Session {
        pid: columns.take()?,
        user: columns.take()?,
        application: columns.take()?,
        address: columns.take()?,
    })
}

/// Who uses tables that are to be dropped.
pub(super) async fn readers(
    server: &Connection,
    coordinator: &Connection,
    catalogue: &Catalogue,
    group: u32,
) -> Result<Vec<String>, AnswerError> {
    let records = catalogue.cleanup.iter().flatten();
    let records = records.filter(|it| it.is_deferred && it.group == group);
    let names: Vec<&str> = records.map(|it| it.object.as_str()).collect();
    if names.is_empty() {
        return Ok(Vec::new());
    }
    let sql = format!("SELECT {COLUMNS} {READERS}");
    let mut found = Vec::new();
    for it in rows_of(server, &sql, &[&names], session).await? {
        found.push(name(coordinator, catalogue, &it).await?);
    }
    Ok(found)
}

/// What an operator finds a process by. Behind one of Citus' own there is that of a client.
pub(super) async fn name(
    coordinator: &Connection,
    catalogue: &Catalogue,
    it: &Session,
) -> Result<String, AnswerError> {
    let Some((node, pid)) = it.client() else { return Ok(it.name()) };
    let node = catalogue.nodes.iter().find(|it| it.id == node);
    let clients = match node {
        // Of the others none can be asked from here.
        Some(node) if node.group != 0 => Vec::new(),
        _ => {
            let sql =
                format!("SELECT {COLUMNS} FROM pg_stat_activity AS process WHERE pid = $1::int");
            rows_of(coordinator, &sql, &[&pid], session).await?
        }
    };
    let client = clients.first().map_or_else(|| format!("pid {pid}"), Session::name);
    let place = node.map_or_else(|| "the coordinator".to_owned(), CitusNode::address);
    Ok(format!("{client} on {place}, by pid {}", it.pid))
}
