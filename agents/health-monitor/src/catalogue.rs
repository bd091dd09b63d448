//! Every check there is: one table, from which the configuration, the help and the judges work.

use crate::check::{Check, DefaultLimits, Level, Unit};
use crate::component::Kind;

use Kind::{
    Agent, Cluster, Disk, Etcd, Group, Haproxy, Patroni, Pgbouncer, Postgres, Redis, Repository,
    Swarm,
};
use Level::{Basic, Comprehensive, Standard};
use Unit::{Bytes, Count, Percent, Seconds};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const HOUR: u64 = 3600;
const DAY: u64 = 24 * HOUR;

/// Where limits come from that nobody wrote down before.
const OURS: &str = "chosen here";
const ORDER: &str = "the alert rules and scaling triggers this system was ordered with";

const fn plain(
    name: &'static str,
    kind: Kind,
    level: Level,
    what: &'static str,
    next: &'static str,
) -> Check {
    Check { name, kind, level, what, limits: None, next }
}

#[expect(clippy::needless_pass_by_value, reason = "a constant is made of a constant")]
const fn limited(
    check: Check,
    unit: Unit,
    warning: u64,
    critical: u64,
    source: &'static str,
) -> Check {
    let Check { name, kind, level, what, next, .. } = check;
    let limits = Some(DefaultLimits { unit, warning, critical, source });
    Check { name, kind, level, what, limits, next }
}

// --- cluster and groups ---------------------------------------------------------------------------

/// This monitor sees something of the cluster.
pub static ISOLATION: Check = plain(
    "isolation",
    Cluster,
    Basic,
    "this monitor reaches something of the cluster",
    "look at the network of the host that this monitor runs on; until then nothing is known of the rest",
);
/// Who belongs to the cluster is known.
pub static MEMBERS: Check = plain(
    "members",
    Cluster,
    Basic,
    "who the members of Patroni's cluster are is known",
    "compare scope and namespace of [patroni] here with Patroni's own, and see `patronictl list`; then etcd",
);
/// etcd as a whole can decide.
pub static ETCD_QUORUM: Check = plain(
    "etcd_quorum",
    Cluster,
    Basic,
    "members of etcd that answer and agree on a leader, of those that decide",
    "start the missing members; without a majority Patroni cannot promote anybody",
);
/// Servers have the settings in common that they must.
pub static SETTINGS_DRIFT: Check = plain(
    "settings_drift",
    Group,
    Comprehensive,
    "settings and extensions that the servers of a group must have in common",
    "set them alike (with Patroni: `patronictl edit-config`) and restart what needs it",
);
/// A group has one primary that takes writes.
pub static PRIMARY: Check = plain(
    "primary",
    Group,
    Basic,
    "exactly one server of the group takes writes",
    "see `patronictl list`; without Patroni promote the standby that is furthest (lag-exporter show)",
);
/// Two servers of a group write.
pub static SPLIT_BRAIN: Check = plain(
    "split_brain",
    Group,
    Basic,
    "two servers of the group take writes",
    "stop the one that applications and Patroni do not use, before anything else; keep its data directory",
);
/// A group survives the loss of its primary.
pub static REDUNDANCY: Check = plain(
    "redundancy",
    Group,
    Standard,
    "standbys that stream, and that commits wait for where the settings say so",
    "bring the missing standbys back; until then the loss of the primary is the loss of the group",
);

// --- PostgreSQL -----------------------------------------------------------------------------------

/// The server answers.
pub static REACHABLE: Check = plain(
    "reachable",
    Postgres,
    Basic,
    "a login and an answer",
    "see whether the server runs, and its log; then the network to it",
);
/// The server is in its role.
pub static ROLE: Check = plain(
    "role",
    Postgres,
    Basic,
    "a primary takes writes; a standby recovers, on the timeline and in the cluster of its primary",
    "see the server's log; a standby that has diverged is made anew (`patronictl reinit`, or pg_rewind)",
);
/// Connections left.
pub static CONNECTIONS: Check = limited(
    plain(
        "connections",
        Postgres,
        Standard,
        "connections in use, of those that are not reserved",
        "see pg_stat_activity by usename and application_name; let applications connect through PgBouncer",
    ),
    Percent,
    80,
    90,
    ORDER,
);
/// The standby streams.
pub static STREAMING: Check = plain(
    "streaming",
    Postgres,
    Standard,
    "a standby receives WAL and replays it",
    "see the standby's log; primary_conninfo, the slot and pg_hba.conf of the primary",
);
/// The standby is behind.
pub static REPLICATION_LAG: Check = limited(
    plain(
        "replication_lag",
        Postgres,
        Standard,
        "WAL that the primary has written and the standby has not replayed",
        "see `lag-exporter show`: is it the network, the disk, or a query that replay waits for",
    ),
    Bytes,
    64 * MIB,
    GIB,
    "4 and 64 segments",
);
/// Slots hold WAL back.
pub static SLOTS: Check = limited(
    plain(
        "slots",
        Postgres,
        Standard,
        "replication slots: WAL that one without a consumer holds back, or that is lost",
        "start its consumer, or drop the slot (pg_drop_replication_slot) once nobody needs it",
    ),
    Bytes,
    GIB,
    8 * GIB,
    "once and eight times the default of max_wal_size",
);
/// WAL is archived.
pub static ARCHIVING: Check = limited(
    plain(
        "archiving",
        Postgres,
        Standard,
        "time since archiving began to fail, or since the oldest WAL file waits for it",
        "see the server's log for what archive_command said; pg_wal grows until it works",
    ),
    Seconds,
    300,
    HOUR,
    OURS,
);
/// Somebody waits for a lock.
pub static LOCKS: Check = limited(
    plain(
        "locks",
        Postgres,
        Standard,
        "the longest wait for a lock",
        "see pg_blocking_pids(); end the session in front (pg_terminate_backend) if it does nothing",
    ),
    Seconds,
    30,
    300,
    OURS,
);
/// The buffer cache is hit. One that misses is slow and not broken: nobody is woken for it.
pub static CACHE_HIT_RATIO: Check = limited(
    plain(
        "cache_hit_ratio",
        Postgres,
        Comprehensive,
        "blocks found in the buffer cache over 15 minutes, where there were enough to tell",
        "see pg_stat_statements for who reads; more shared_buffers or memory if all of it is needed",
    ),
    Percent,
    95,
    0,
    ORDER,
);
/// A query runs long.
pub static LONG_QUERIES: Check = limited(
    plain(
        "long_queries",
        Postgres,
        Comprehensive,
        "the longest running statement of a client",
        "see pg_stat_activity; cancel it (pg_cancel_backend) if nobody waits for it; consider statement_timeout",
    ),
    Seconds,
    900,
    4 * HOUR,
    OURS,
);
/// A transaction is open long.
pub static LONG_TRANSACTIONS: Check = limited(
    plain(
        "long_transactions",
        Postgres,
        Comprehensive,
        "the oldest open or prepared transaction: it holds vacuum back",
        "see pg_stat_activity (state `idle in transaction`) and pg_prepared_xacts; end it if it is forgotten",
    ),
    Seconds,
    HOUR,
    6 * HOUR,
    OURS,
);
/// Sessions block each other.
pub static BLOCKING: Check = limited(
    plain(
        "blocking",
        Postgres,
        Comprehensive,
        "sessions that wait behind one other",
        "end the session in front (pg_terminate_backend) if it does nothing; then find who forgets to commit",
    ),
    Count,
    5,
    20,
    OURS,
);
/// Transaction identifiers run out.
pub static WRAPAROUND: Check = limited(
    plain(
        "wraparound",
        Postgres,
        Comprehensive,
        "transaction or multixact identifiers used since the oldest that is not frozen, of 2^31",
        "see what holds vacuum back: long transactions, prepared ones, slots; then VACUUM the oldest tables",
    ),
    Percent,
    25,
    50,
    "autovacuum forces itself at 10 % by default, writes are refused near 100 %: manual, Routine Vacuuming",
);
/// Dead rows pile up.
pub static BLOAT: Check = limited(
    plain(
        "bloat",
        Postgres,
        Comprehensive,
        "dead rows of the table that has most, where there are enough to tell",
        "see pg_stat_user_tables: is autovacuum held back, or too seldom for this table",
    ),
    Percent,
    30,
    60,
    "autovacuum comes at 20 % by default",
);
/// Databases grow.
pub static SIZE: Check = plain("size", Postgres, Comprehensive, "databases: bytes and tables", "");
/// WAL on disk.
pub static WAL_SIZE: Check = limited(
    plain(
        "wal_size",
        Postgres,
        Comprehensive,
        "files of pg_wal, of what max_wal_size, wal_keep_size and max_slot_wal_keep_size allow",
        "see the checks slots and archiving: what holds the WAL back",
    ),
    Percent,
    150,
    300,
    OURS,
);
/// Checkpoints come too often.
pub static CHECKPOINTS: Check = limited(
    plain(
        "checkpoints",
        Postgres,
        Comprehensive,
        "checkpoints that were forced by WAL since the last looks, where there were enough to tell",
        "raise max_wal_size",
    ),
    Percent,
    50,
    101,
    OURS,
);
/// Certificates expire.
pub static CERTIFICATE: Check = limited(
    plain(
        "certificate",
        Postgres,
        Comprehensive,
        "time until the server's certificate expires",
        "renew it where it comes from; then reload or restart the server",
    ),
    Seconds,
    21 * DAY,
    3 * DAY,
    OURS,
);
/// The server takes new connections.
pub static NEW_CONNECTIONS: Check = plain(
    "new_connections",
    Postgres,
    Comprehensive,
    "a new connection, beside the one that is kept",
    "a kept connection is answered and a new one is not: the postmaster hangs; see its log and state",
);
/// The server's own settings.
pub static SETTINGS: Check = plain(
    "settings",
    Postgres,
    Comprehensive,
    "settings that endanger data or wait for a restart, and collations of another version",
    "see pg_settings: fsync, full_page_writes, and pending_restart",
);
/// Clocks differ.
pub static CLOCK: Check = limited(
    plain(
        "clock",
        Postgres,
        Comprehensive,
        "the server's clock against this monitor's",
        "see the time service (chrony, systemd-timesyncd) of both hosts",
    ),
    Seconds,
    2,
    30,
    OURS,
);

// --- the others -----------------------------------------------------------------------------------

/// Patroni answers.
pub static PATRONI: Check = plain(
    "reachable",
    Patroni,
    Basic,
    "an answer of the member's REST API",
    "see whether Patroni runs on that node, and its log",
);
/// Patroni agrees with the server.
pub static PATRONI_ROLE: Check = plain(
    "role",
    Patroni,
    Basic,
    "Patroni's role of the member is what the server does",
    "see `patronictl list` and Patroni's log on that node",
);
/// Patroni is in charge.
pub static PATRONI_STATE: Check = plain(
    "state",
    Patroni,
    Standard,
    "Patroni is not paused, sees its store, and waits for no restart",
    "`patronictl resume` after maintenance; `patronictl restart` where a restart is pending",
);
/// A member of etcd answers.
pub static ETCD: Check = plain(
    "reachable",
    Etcd,
    Basic,
    "an answer of the member",
    "see whether etcd runs on that node, and its log",
);
/// A member of etcd is well.
pub static ETCD_HEALTH: Check = plain(
    "health",
    Etcd,
    Basic,
    "the member has a leader and no alarm",
    "see `etcdctl alarm list` and `etcdctl endpoint status`; after NOSPACE compact, defragment, disarm",
);
/// etcd's database fills.
pub static ETCD_SIZE: Check = limited(
    plain(
        "size",
        Etcd,
        Standard,
        "the member's database, of its quota",
        "compact and defragment (`etcdctl compact`, `etcdctl defrag`); at 100 % etcd refuses writes",
    ),
    Percent,
    60,
    85,
    "etcd's own alert rules warn at 95 % of the quota",
);
/// A `PgBouncer` answers.
pub static PGBOUNCER: Check = plain(
    "reachable",
    Pgbouncer,
    Basic,
    "an answer of the admin console",
    "see whether PgBouncer runs, and its log",
);
/// A query goes through.
pub static PGBOUNCER_QUERY: Check = plain(
    "query",
    Pgbouncer,
    Basic,
    "a query through the pool",
    "see PgBouncer's log and SHOW SERVERS on its admin console; is the primary reachable from there",
);
/// Clients wait.
pub static PGBOUNCER_WAITING: Check = limited(
    plain(
        "waiting",
        Pgbouncer,
        Standard,
        "how long the first client in the queue of a pool has waited",
        "see SHOW POOLS: which pool; long transactions hold its servers, or default_pool_size is too small",
    ),
    Seconds,
    5,
    30,
    "PgBouncer gives clients up after query_wait_timeout, 120 s by default",
);
/// Clients come near the limit.
pub static PGBOUNCER_CLIENTS: Check = limited(
    plain(
        "clients",
        Pgbouncer,
        Standard,
        "clients, of max_client_conn",
        "raise max_client_conn, add a PgBouncer, or find who does not close",
    ),
    Percent,
    80,
    90,
    ORDER,
);
/// An `HAProxy` answers.
pub static HAPROXY: Check = plain(
    "reachable",
    Haproxy,
    Basic,
    "an answer of the statistics page",
    "see whether HAProxy runs, and its log",
);
/// Exactly one server behind the port for writes.
pub static HAPROXY_WRITE: Check = plain(
    "write",
    Haproxy,
    Basic,
    "exactly one server is up behind the port for writes",
    "see the statistics page; compare it with `patronictl list`",
);
/// Servers behind the port for reads.
pub static HAPROXY_READ: Check = plain(
    "read",
    Haproxy,
    Standard,
    "servers that are up behind the port for reads",
    "see the statistics page: what the check of the missing server says",
);
/// Redis answers.
pub static REDIS: Check =
    plain("reachable", Redis, Basic, "PONG", "see whether Redis runs, and its log");
/// Redis is in its role, with its replicas.
pub static REDIS_ROLE: Check = plain(
    "role",
    Redis,
    Standard,
    "a replica's link is up, nothing is being loaded, the last save went well",
    "see INFO replication and INFO persistence, and Redis' log",
);
/// Redis' memory.
pub static REDIS_MEMORY: Check = limited(
    plain(
        "memory",
        Redis,
        Standard,
        "memory, of maxmemory",
        "raise maxmemory, or set a policy that evicts",
    ),
    Percent,
    85,
    95,
    OURS,
);
/// Another agent can work.
pub static AGENT: Check = plain(
    "ready",
    Agent,
    Basic,
    "the agent is there (/livez) and can do its work (/readyz)",
    "see the agent's log",
);
/// The newest backup.
pub static BACKUP_AGE: Check = limited(
    plain(
        "backup_age",
        Repository,
        Standard,
        "age of the newest complete backup",
        "see `backup-agent list` and its log; take one: `backup-agent backup`",
    ),
    Seconds,
    26 * HOUR,
    50 * HOUR,
    "one and two missed of the daily backups this system was ordered with",
);
/// WAL gets to the repository.
pub static WAL_AGE: Check = limited(
    plain(
        "wal_age",
        Repository,
        Standard,
        "how far the repository is behind the primary: what a restore would lose",
        "see the backup agent's log",
    ),
    Seconds,
    60,
    300,
    "the order asks for less than 5 s of loss",
);
/// Tasks of a Swarm service.
pub static SWARM: Check = plain(
    "tasks",
    Swarm,
    Basic,
    "tasks that run, of those that should",
    "see `docker service ps --no-trunc` of the service",
);
/// A file system fills.
pub static DISK: Check = limited(
    plain(
        "space",
        Disk,
        Comprehensive,
        "used space, or used inodes if that is more",
        "free space: at 100 % PostgreSQL stops; never delete files of pg_wal by hand",
    ),
    Percent,
    85,
    95,
    ORDER,
);

/// All of them, in the order in which they are shown.
pub static CHECKS: &[&Check] = &[
    &ISOLATION,
    &MEMBERS,
    &ETCD_QUORUM,
    &PRIMARY,
    &SPLIT_BRAIN,
    &REDUNDANCY,
    &SETTINGS_DRIFT,
    &REACHABLE,
    &ROLE,
    &CONNECTIONS,
    &STREAMING,
    &REPLICATION_LAG,
    &SLOTS,
    &ARCHIVING,
    &LOCKS,
    &CACHE_HIT_RATIO,
    &LONG_QUERIES,
    &LONG_TRANSACTIONS,
    &BLOCKING,
    &WRAPAROUND,
    &BLOAT,
    &SIZE,
    &WAL_SIZE,
    &CHECKPOINTS,
    &CERTIFICATE,
    &CLOCK,
    &NEW_CONNECTIONS,
    &SETTINGS,
    &PATRONI,
    &PATRONI_ROLE,
    &PATRONI_STATE,
    &ETCD,
    &ETCD_HEALTH,
    &ETCD_SIZE,
    &PGBOUNCER,
    &PGBOUNCER_QUERY,
    &PGBOUNCER_WAITING,
    &PGBOUNCER_CLIENTS,
    &HAPROXY,
    &HAPROXY_WRITE,
    &HAPROXY_READ,
    &REDIS,
    &REDIS_ROLE,
    &REDIS_MEMORY,
    &AGENT,
    &BACKUP_AGE,
    &WAL_AGE,
    &SWARM,
    &DISK,
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn names_are_unique_and_each_check_says_what_to_do() {
        let mut names = BTreeSet::new();
        for check in CHECKS {
            assert!(names.insert((check.kind, check.name)), "{} twice", check.name);
            assert!(!check.what.is_empty() && !check.what.ends_with('.'), "{}", check.name);
            assert!(check.name == "size" || !check.next.is_empty(), "{}", check.name);
            if let Some(limits) = &check.limits {
                assert!(limits.warning != limits.critical && !limits.source.is_empty());
            }
        }
    }
}
