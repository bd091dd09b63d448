//! What the servers of a group say of themselves.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio_postgres::types::PgLsn;

use crate::known::Known;
use crate::orphans::Orphan;

/// The servers of one group.
#[derive(Clone, Debug, PartialEq)]
pub struct GroupServers {
    /// The one that takes writes.
    pub primary: Known<Primary>,
    /// The others that are known, by name.
    pub standbys: BTreeMap<String, Known<Standby>>,
}

/// The primary of a group. What it refuses to tell is unknown by itself.
#[derive(Clone, Debug, PartialEq)]
pub struct Primary {
    /// Its name in the topology, or its address.
    pub name: String,
    /// `wal_level`: a source needs `logical`.
    pub wal_level: String,
    /// The disk of its data directory.
    pub disk: Known<Disk>,
    /// What stands in `pg_wal`.
    pub wal: Known<Wal>,
    /// What is used of what it has.
    pub resources: Known<Vec<Resource>>,
    /// The oldest transaction that has written, prepared ones too; `None` if there is none.
    pub oldest_transaction: Known<Option<Transaction>>,
    /// The standbys that stream from it.
    pub senders: Known<Vec<Sender>>,
    /// How far its WAL is.
    pub lsn: Known<PgLsn>,
    /// Base backups that are taken from it.
    pub base_backups: Known<u32>,
    /// Slots, publications and subscriptions of moves, and roles: all are of a move under way, or
    /// of one that was broken off.
    pub artifacts: Known<Vec<String>>,
    /// Tables of shards that have no placement here.
    pub orphans: Known<Vec<Orphan>>,
    /// Slots that nobody reads from, and that hold back WAL; not those of moves.
    pub idle_slots: Known<Vec<IdleSlot>>,
    /// Who uses tables that moves left and that are to be dropped.
    pub readers: Known<Vec<String>>,
    /// Client connections that run something now.
    pub active_connections: Known<u32>,
}

/// A disk, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Disk {
    /// What can be written still.
    pub available: u64,
    /// All of it.
    pub total: u64,
}

impl Disk {
    /// What stays free whatever is moved, where `share` of it does.
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a share of a number of bytes is one, give or take some"
    )]
    pub fn reserve(&self, share: f64) -> u64 {
        (self.total as f64 * share) as u64
    }
}

/// The WAL of a server, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wal {
    /// What there is.
    pub bytes: u64,
    /// `max_wal_size`: what there may be without anybody holding it back.
    pub max_bytes: u64,
}

impl Wal {
    /// By how much it may grow by itself.
    pub fn growth(&self) -> u64 {
        self.max_bytes.saturating_sub(self.bytes)
    }
}

/// Something a server has a fixed number of, and a move takes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resource {
    /// The setting that limits it: `max_replication_slots`.
    pub setting: String,
    /// How many are in use.
    pub used: u32,
    /// How many there are.
    pub limit: u32,
}

/// A transaction that has written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transaction {
    /// How to find it: `pid 4711 of app (psql)`, `prepared transaction citus_0_…`.
    pub name: String,
    /// Since when it is open.
    pub age: Duration,
}

/// A process that serves somebody.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Session {
    /// `pid`.
    pub pid: i32,
    /// `usename`.
    pub user: String,
    /// `application_name`.
    pub application: String,
    /// `client_addr`; `None` where it comes by a socket.
    pub address: Option<String>,
}

/// What Citus calls a process that works for one on another node, before the number of that in the cluster.
const INTERNAL: &str = "citus_internal gpid=";
/// That number has so many times the number of the node in it.
///
/// Source: `GLOBAL_PID_NODE_ID_MULTIPLIER` in `backend_data.h`.
const NODE_FACTOR: i64 = 10_000_000_000;

impl Session {
    /// How to find it: `pid 4711 of app (psql, from 10.0.0.7)`.
    pub fn name(&self) -> String {
        let Self { pid, user, application, address } = self;
        let from = address.as_ref().map(|it| format!("from {it}"));
        let known = Some(application.clone()).filter(|it| !it.is_empty()).into_iter().chain(from);
        let known: Vec<_> = known.collect();
        let known =
            if known.is_empty() { String::new() } else { format!(" ({})", known.join(", ")) };
        format!("pid {pid} of {user}{known}")
    }

    /// The process of a client that it works for: the number of its node, and its own.
    pub fn client(&self) -> Option<(u32, i32)> {
        let number: i64 = self.application.strip_prefix(INTERNAL)?.parse().ok()?;
        let node = u32::try_from(number / NODE_FACTOR).ok()?;
        Some((node, i32::try_from(number % NODE_FACTOR).ok()?))
    }
}

/// A slot that nobody reads from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdleSlot {
    /// Its name.
    pub name: String,
    /// WAL that it holds back, in bytes.
    pub held_bytes: u64,
    /// Since when nobody has used it or moved it on; `None` before PostgreSQL 17.
    pub idle_for: Option<Duration>,
}

/// A standby, as its primary sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sender {
    /// `application_name`.
    pub name: String,
    /// `state`: `streaming`, `catchup` …
    pub state: String,
    /// WAL it has not replayed, in bytes; `None` while it has said nothing.
    pub lag_bytes: Option<u64>,
}

/// A standby.
#[derive(Clone, Debug, PartialEq)]
pub struct Standby {
    /// How it follows, wherever it gets its WAL from: its primary does not see one that does not stream,
    /// nor one that follows another standby.
    pub replay: Known<Replay>,
    /// Base backups that are taken from it.
    pub base_backups: Known<u32>,
}

/// What a standby says of its replay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Replay {
    /// Whether it receives WAL as it is written.
    pub streams: bool,
    /// How far it has replayed; `None` before it has replayed any.
    pub lsn: Option<PgLsn>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_is_named_by_all_that_is_known_of_it() {
        let session = |application: &str, address: Option<&str>| Session {
            pid: 47,
            user: "app".to_owned(),
            application: application.to_owned(),
            address: address.map(str::to_owned),
        };
        for (application, address, name, client) in [
            ("psql", Some("10.0.0.7"), "pid 47 of app (psql, from 10.0.0.7)", None),
            ("psql", None, "pid 47 of app (psql)", None),
            ("", Some("10.0.0.7"), "pid 47 of app (from 10.0.0.7)", None),
            ("", None, "pid 47 of app", None),
            (
                "citus_internal gpid=20000000812",
                None,
                "pid 47 of app (citus_internal gpid=20000000812)",
                Some((2, 812)),
            ),
            ("citus_internal gpid=x", None, "pid 47 of app (citus_internal gpid=x)", None),
        ] {
            let session = session(application, address);
            assert_eq!((session.name().as_str(), session.client()), (name, client));
        }
    }
}
