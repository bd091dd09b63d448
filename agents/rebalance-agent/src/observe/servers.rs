//! Questions to the servers of a group. Any role may ask all of it that has `pg_monitor`; without it
//! much would be left out without a word, so then it is unknown.

use std::collections::BTreeMap;
use std::time::Duration;

use futures_util::future::join_all;
use shared::pg::{Connection, Node, Settings, connect};
use shared::telemetry::chain;

use super::orphans;
use super::read::{AnswerError, Columns, finish, known, only, row, rows};
use super::sessions::{self, session};
use crate::catalogue::{Catalogue, CitusNode};
use crate::known::{Known, Unknown};
use crate::servers::{
    Disk, GroupServers, IdleSlot, Primary, Replay, Resource, Sender, Session, Standby, Transaction,
    Wal,
};

const ROLE: &str = "
    SELECT pg_is_in_recovery(), pg_has_role('pg_monitor', 'USAGE'), current_setting('wal_level')";

/// A function of Citus, which any role may call.
const DISK: &str = "
    SELECT available_disk_size, total_disk_size FROM citus_local_disk_space_stats()";

const WAL: &str = "
    SELECT coalesce(sum(size), 0)::bigint, pg_size_bytes(current_setting('max_wal_size'))
      FROM pg_ls_waldir()";

/// Background workers have a type of their own making, so they are what is nothing else.
const RESOURCES: &str = r"
    WITH process AS (SELECT backend_type AS type FROM pg_stat_activity)
    SELECT 'max_connections', (SELECT count(*) FROM process WHERE type = 'client backend'),
           current_setting('max_connections')::bigint
           - current_setting('superuser_reserved_connections')::bigint
           - coalesce(current_setting('reserved_connections', true), '0')::bigint
    UNION ALL
    SELECT 'max_wal_senders', (SELECT count(*) FROM process WHERE type = 'walsender'),
           current_setting('max_wal_senders')::bigint
    UNION ALL
    SELECT 'max_replication_slots', (SELECT count(*) FROM pg_replication_slots),
           current_setting('max_replication_slots')::bigint
    UNION ALL
    SELECT 'max_worker_processes',
           (SELECT count(*) FROM process WHERE type NOT IN (
               'archiver', 'autovacuum launcher', 'autovacuum worker', 'background writer',
               'checkpointer', 'client backend', 'io worker', 'slotsync worker',
               'standalone backend', 'startup', 'walreceiver', 'walsender', 'walsummarizer',
               'walwriter')),
           current_setting('max_worker_processes')::bigint
    UNION ALL
    SELECT 'max_logical_replication_workers',
           (SELECT count(*) FROM process WHERE type LIKE 'logical replication % worker'),
           current_setting('max_logical_replication_workers')::bigint";

/// Those that have written have a number; those that have only read hold up nobody, and autovacuum
/// gives way.
const OLDEST: &str = "
    SELECT gid, pid, usename, application_name, host(client_addr),
           extract(epoch FROM clock_timestamp() - since)::double precision
      FROM (SELECT NULL, pid, coalesce(usename::text, ''), application_name, client_addr, xact_start
              FROM pg_stat_activity
             WHERE backend_xid IS NOT NULL AND xact_start IS NOT NULL
               AND backend_type <> 'autovacuum worker'
            UNION ALL
            SELECT gid, 0, '', '', NULL, prepared FROM pg_prepared_xacts)
        AS open (gid, pid, usename, application_name, client_addr, since)
     ORDER BY since
     LIMIT 1";

/// Those of moves are told by themselves. Since when nobody has used one, PostgreSQL tells from 17 on; whoever
/// moves it on, as Patroni does for standbys that follow another, uses it.
const IDLE_SLOTS: &str = r"
    SELECT slot_name::text, greatest(pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn), 0)::bigint,
           extract(epoch FROM clock_timestamp() - (to_jsonb(slot) ->> 'inactive_since')::timestamptz)
               ::double precision
      FROM pg_replication_slots AS slot
     WHERE NOT active AND NOT temporary AND restart_lsn IS NOT NULL
       AND wal_status IS DISTINCT FROM 'lost' AND slot_name NOT LIKE 'citus\_shard\_%'
     ORDER BY restart_lsn
     LIMIT 100";

/// Not base backups, which are counted by themselves, nor the subscriptions of moves. What only
/// receives WAL replays none of it.
const SENDERS: &str = "
    SELECT coalesce(nullif(application_name, ''), host(client_addr), 'pid ' || pid), state,
           pg_wal_lsn_diff(pg_current_wal_lsn(), coalesce(replay_lsn, flush_lsn, write_lsn))::bigint
      FROM pg_stat_replication AS sender
     WHERE state <> 'backup'
       AND NOT EXISTS (SELECT FROM pg_replication_slots AS slot
                        WHERE slot.active_pid = sender.pid AND slot.slot_type = 'logical')
     ORDER BY 1
     LIMIT 100";

const LSN: &str = "SELECT pg_current_wal_lsn()";

/// One that replays files alone receives nothing.
const REPLAY: &str = "
    SELECT EXISTS (SELECT FROM pg_stat_wal_receiver WHERE status = 'streaming'),
           pg_last_wal_replay_lsn()";

const BASE_BACKUPS: &str = "SELECT count(*) FROM pg_stat_progress_basebackup";

/// Source: the names that Citus gives to what a move needs; measured.
const ARTIFACTS: &str = r"
    SELECT 'slot ' || slot_name FROM pg_replication_slots WHERE slot_name LIKE 'citus\_shard\_%'
    UNION ALL
    SELECT 'publication ' || pubname FROM pg_publication WHERE pubname LIKE 'citus\_shard\_%'
    UNION ALL
    SELECT 'subscription ' || subname FROM pg_subscription WHERE subname LIKE 'citus\_shard\_%'
    UNION ALL
    SELECT 'role ' || rolname FROM pg_roles WHERE rolname LIKE 'citus\_shard\_%\_role\_%'
    ORDER BY 1
    LIMIT 100";

const ACTIVE: &str = "
    SELECT count(*) FROM pg_stat_activity
     WHERE backend_type = 'client backend' AND state = 'active' AND pid <> pg_backend_pid()";

/// One server, as it answered.
enum Answer {
    Primary(Box<Primary>),
    Standby(Standby),
}

/// The servers of a group: those of the topology, or else the one that Citus knows.
pub(super) fn nodes(primary: &CitusNode, members: &[Node]) -> Vec<Node> {
    let of_group: Vec<_> = members.iter().filter(|it| it.group == primary.group).cloned().collect();
    if !of_group.is_empty() {
        return of_group;
    }
    let (host, port) = (primary.host.clone(), primary.port);
    vec![Node { group: primary.group, name: primary.address(), host, port }]
}

/// What is to be known to ask servers.
#[derive(Clone, Copy)]
pub(super) struct Ask<'a> {
    /// How they are reached.
    pub(super) settings: &'a Settings,
    /// The coordinator's primary, which knows more of what they say.
    pub(super) coordinator: &'a Connection,
    /// What it said a moment before.
    pub(super) catalogue: &'a Catalogue,
}

impl Ask<'_> {
    /// Asks all servers of a group, at the same time.
    pub(super) async fn all(self, nodes: &[Node]) -> GroupServers {
        let answers =
            nodes.iter().map(async |node| (node.name.clone(), Box::pin(self.one(node)).await));
        sort(join_all(answers).await)
    }

    async fn one(self, node: &Node) -> Known<Answer> {
        let connection = connect(self.settings, node).await;
        let connection = connection.map_err(|error| Unknown::because(chain(&error)))?;
        // On the heap, as the whole: many are asked at the same time.
        let answer = Box::pin(ask_on(&connection, self, node)).await;
        finish(connection).await;
        answer
    }
}

/// Finds the primary: exactly one says that it is.
fn sort(answers: Vec<(String, Known<Answer>)>) -> GroupServers {
    let mut primaries = Vec::new();
    let mut others = Vec::new();
    let mut standbys = BTreeMap::new();
    let mut silent = BTreeMap::new();
    let is_alone = answers.len() == 1;
    for (name, answer) in answers {
        match answer {
            Ok(Answer::Primary(primary)) => primaries.push(*primary),
            Ok(Answer::Standby(standby)) => {
                others.push(format!("{name} is a standby"));
                standbys.insert(name, Ok(standby));
            }
            // Of one that is alone the reason says all.
            Err(why) if is_alone => return GroupServers { primary: Err(why), standbys },
            Err(why) => {
                others.push(format!("{name} does not answer: {why}"));
                silent.insert(name, Err(why));
            }
        }
    }
    let primary = match primaries.len() {
        1 => primaries.pop(),
        _ => None,
    };
    let primary = primary.ok_or_else(|| {
        if primaries.is_empty() {
            return Unknown(format!("none says that it is the primary: {}", others.join("; ")));
        }
        let names: Vec<_> = primaries.iter().map(|it| it.name.as_str()).collect();
        Unknown(format!("{} all say that they are the primary", names.join(" and ")))
    });
    if primary.is_ok() {
        // Otherwise one of them may be the primary, of which that is said already.
        standbys.append(&mut silent);
    }
    GroupServers { primary, standbys }
}

async fn ask_on(connection: &Connection, ask: Ask<'_>, node: &Node) -> Known<Answer> {
    let Ask { settings, coordinator, catalogue } = ask;
    let role = row(connection, ROLE, |it| Ok((it.take()?, it.take()?, it.take()?)));
    let (in_recovery, is_monitor, wal_level): (bool, bool, String) = known(role.await)?;
    if !is_monitor {
        return Err(Unknown(format!("role {} lacks pg_monitor", settings.user)));
    }
    if in_recovery {
        let base_backups = known(count(connection, BASE_BACKUPS).await);
        let replay =
            row(connection, REPLAY, |it| Ok(Replay { streams: it.take()?, lsn: it.take()? }));
        return Ok(Answer::Standby(Standby { base_backups, replay: known(replay.await) }));
    }
    let disk = row(connection, DISK, |it| {
        Ok(Disk { available: it.number("the free disk")?, total: it.number("the disk")? })
    });
    let wal = row(connection, WAL, |it| {
        Ok(Wal { bytes: it.number("the size of pg_wal")?, max_bytes: it.number("max_wal_size")? })
    });
    let resources = rows(connection, RESOURCES, resource);
    let oldest = rows(connection, OLDEST, transaction);
    let slots = rows(connection, IDLE_SLOTS, idle_slot);
    let senders = rows(connection, SENDERS, sender);
    let artifacts = rows(connection, ARTIFACTS, only);
    let lsn = row(connection, LSN, only);
    // They go out together, and are answered one after the other.
    let (disk, wal, resources, oldest, slots, senders, artifacts, lsn, base_backups, active) = tokio::join!(
        disk,
        wal,
        resources,
        oldest,
        slots,
        senders,
        artifacts,
        lsn,
        count(connection, BASE_BACKUPS),
        count(connection, ACTIVE),
    );
    let oldest = async {
        let Some((whose, age)) = oldest?.into_iter().next() else { return Ok(None) };
        let name = match whose {
            Whose::Prepared(name) => format!("prepared transaction {name}"),
            Whose::Session(session) => sessions::name(coordinator, catalogue, &session).await?,
        };
        Ok(Some(Transaction { name, age }))
    };
    let (oldest, readers, orphans) = tokio::join!(
        oldest,
        sessions::readers(connection, coordinator, catalogue, node.group),
        Box::pin(orphans::find(connection, coordinator, catalogue, node.group)),
    );
    Ok(Answer::Primary(Box::new(Primary {
        name: node.name.clone(),
        wal_level,
        disk: known(disk),
        wal: known(wal),
        resources: known(resources),
        oldest_transaction: known(oldest),
        senders: known(senders),
        lsn: known(lsn),
        base_backups: known(base_backups),
        artifacts: known(artifacts),
        orphans: known(orphans).and_then(|it| it),
        idle_slots: known(slots),
        readers: known(readers),
        active_connections: known(active),
    })))
}

async fn count(connection: &Connection, sql: &str) -> Result<u32, AnswerError> {
    row(connection, sql, |it| it.number("a count")).await
}

fn resource(columns: &mut Columns<'_>) -> Result<Resource, AnswerError> {
    let setting = columns.take()?;
    Ok(Resource { setting, used: columns.number("a count")?, limit: columns.number("a limit")? })
}

/// Whose transaction it is.
enum Whose {
    /// Nobody's: it has this name.
    Prepared(String),
    Session(Session),
}

fn transaction(columns: &mut Columns<'_>) -> Result<(Whose, Duration), AnswerError> {
    let (prepared, session) = (columns.take::<Option<String>>()?, session(columns)?);
    Ok((prepared.map_or(Whose::Session(session), Whose::Prepared), seconds(columns.take()?)))
}

/// Nobody's clock goes backwards for long.
fn seconds(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds.max(0.0)).unwrap_or_default()
}

fn idle_slot(columns: &mut Columns<'_>) -> Result<IdleSlot, AnswerError> {
    let (name, held_bytes) = (columns.take()?, columns.number("what a slot holds back")?);
    Ok(IdleSlot { name, held_bytes, idle_for: columns.take::<Option<f64>>()?.map(seconds) })
}

fn sender(columns: &mut Columns<'_>) -> Result<Sender, AnswerError> {
    let name = columns.take()?;
    let state: Option<String> = columns.take()?;
    let lag: Option<i64> = columns.take()?;
    Ok(Sender {
        name,
        state: state.unwrap_or_default(),
        // A standby of a promoted server may be ahead of what was asked a moment before.
        lag_bytes: lag.map(|it| u64::try_from(it).unwrap_or(0)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn primary(name: &str) -> (String, Known<Answer>) {
        let answer = Answer::Primary(Box::new(Primary {
            name: name.to_owned(),
            wal_level: "logical".to_owned(),
            disk: Ok(Disk { available: 1, total: 1 }),
            wal: Ok(Wal { bytes: 1, max_bytes: 1 }),
            resources: Ok(vec![]),
            oldest_transaction: Ok(None),
            senders: Ok(vec![]),
            lsn: Ok(0.into()),
            base_backups: Ok(0),
            artifacts: Ok(vec![]),
            orphans: Ok(vec![]),
            idle_slots: Ok(vec![]),
            readers: Ok(vec![]),
            active_connections: Ok(0),
        }));
        (name.to_owned(), Ok(answer))
    }

    fn standby(name: &str) -> (String, Known<Answer>) {
        let replay = Ok(Replay { streams: true, lsn: Some(0.into()) });
        (name.to_owned(), Ok(Answer::Standby(Standby { base_backups: Ok(0), replay })))
    }

    fn silent(name: &str) -> (String, Known<Answer>) {
        (name.to_owned(), Err(Unknown::because("no route to host")))
    }

    #[test]
    fn a_group_has_one_primary_or_an_unknown_one() {
        for (answers, expected) in [
            (vec![standby("b"), primary("a")], Ok("a")),
            (vec![primary("a"), silent("b")], Ok("a")),
            (
                vec![standby("b"), silent("a")],
                Err("none says that it is the primary: b is a standby; \
                     a does not answer: no route to host"),
            ),
            (vec![silent("a")], Err("no route to host")),
            (vec![primary("a"), primary("b")], Err("a and b all say that they are the primary")),
        ] {
            let servers = sort(answers);
            // One that is silent is a standby only if another is the primary.
            let silent = servers.standbys.values().filter(|it| it.is_err()).count();
            assert!(servers.primary.is_ok() || silent == 0, "{servers:?}");
            let found = servers.primary.map(|it| it.name).map_err(|it| it.0);
            assert_eq!(found, expected.map(str::to_owned).map_err(str::to_owned));
        }
    }

    #[test]
    fn without_members_of_its_group_the_address_of_citus_is_asked() {
        let worker = crate::catalogue::tests::node(2);
        let member = |group, name: &str| {
            let (name, host) = (name.to_owned(), name.to_owned());
            Node { group, name, host, port: 5432 }
        };
        let names = |members: &[Node]| {
            nodes(&worker, members).iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        assert_eq!(names(&[member(0, "coord")]), ["w2:5432 (w2:5432)"]);
        assert_eq!(
            names(&[member(0, "coord"), member(2, "a"), member(2, "b")]),
            ["a (a:5432)", "b (b:5432)"]
        );
    }
}
