//! A primary and its standby without Patroni, reached over TLS and a network that can be cut.

use std::fs;
use std::path::Path;
use std::time::Duration;

use harness::postgres::postgres_is_missing;
use harness::{Authority, Mode, PgServer, Proxy, directory, skip};
use tempfile::TempDir;
use tokio::task::JoinSet;
use tokio_postgres::Client;

use super::{After, Deep, Each, Hang, KEYS, May, Standard, begin};
use crate::exporter::node;
use crate::health_postgres::certify;
use crate::monitor::Monitor;
use crate::scene::write;

/// The role of the monitor, and its password.
const ROLE: (&str, &str) = ("pgmesh_health", "right");
/// Low enough to be reached within seconds.
const LIMITS: &str = "[limits.postgres]\n\
    locks = { warning = 1, critical = 600 }\n\
    blocking = { warning = 2, critical = 20 }\n\
    long_transactions = { warning = 1, critical = 600 }\n\
    archiving = { warning = 1, critical = 600 }\n\
    replication_lag = { warning = 1000000, critical = 10000000000 }\n\
    wraparound = { warning = 0.002, critical = 50 }\n\
    wal_size = { warning = 10000, critical = 100000 }\n";
/// As many transactions as the limit above, of 2^31.
const TRANSACTIONS: u32 = 50_000;

struct Scene {
    monitor: Monitor,
    primary: PgServer,
    standby: PgServer,
    /// What the monitor goes through to the standby.
    link: Proxy,
    authority: Authority,
    _directory: TempDir,
    _proxy: Proxy,
}

impl Scene {
    async fn start() -> Self {
        let mut builder = PgServer::builder().name("primary").tls().wal_segment_mib(1);
        for (name, value) in [
            ("fsync", "on"),
            ("max_connections", "20"),
            ("archive_mode", "on"),
            ("archive_command", "true"),
            ("max_slot_wal_keep_size", "8MB"),
            ("wal_keep_size", "4MB"),
        ] {
            builder = builder.setting(name, value);
        }
        let hba = format!("hostssl all {} all scram-sha-256", ROLE.0);
        let primary = builder.hba(&hba).primary().await;
        primary.psql(include_str!("../../../init-scripts/10-roles.sql")).await;
        let set = format!("ALTER ROLE {} PASSWORD '{}'", ROLE.0, ROLE.1);
        primary.psql(&set).await;
        primary.psql("CREATE TABLE t (i int); CREATE ROLE app LOGIN").await;
        let authority = Authority::new();
        certify(&primary, &authority.issue("first")).await;
        let standby = primary.standby("standby").await;
        standby.catch_up(&primary).await;
        let proxy = async |server: &PgServer| {
            Proxy::start(format!("127.0.0.1:{}", server.port()).as_str()).await
        };
        let (first, link) = (proxy(&primary).await, proxy(&standby).await);
        let directory = directory();
        let password = directory.path().join("password");
        write(&password, ROLE.1);
        let tables = format!(
            "[postgres]\nuser = \"{}\"\npassword_file = \"{}\"\nca_file = \"{}\"\n{LIMITS}{}{}",
            ROLE.0,
            password.display(),
            authority.ca_file().display(),
            node("primary", "127.0.0.1", first.port()),
            node("standby", "127.0.0.1", link.port()),
        );
        let monitor = Monitor::configured(KEYS, &tables).started().await;
        Self { monitor, primary, standby, link, authority, _directory: directory, _proxy: first }
    }
}

#[tokio::test]
async fn each_fault_of_a_server_is_named_and_nothing_else() {
    if postgres_is_missing() {
        return;
    }
    let mut scene = Scene::start().await;
    links(&scene).await;
    logins(&scene).await;
    sessions(&scene).await;
    wal(&scene).await;
    replay(&scene).await;
    scene.monitor.terminate().await.assert_success();
    scene.monitor = scene.monitor.started().await;
    drift(&mut scene).await;
    identifiers(&scene).await;
    clocks(&scene).await;
    scene.monitor.terminate().await.assert_success();
    scene.monitor = scene.monitor.started().await;
    servers(&mut scene).await;
    scene.monitor.terminate().await.assert_success();
    scene.monitor = scene.monitor.started().await;
    two_primaries(scene).await;
}

async fn links(scene: &Scene) {
    let Scene { monitor, link, .. } = scene;
    let signs = [(Each, "postgres standby reachable critical")];
    let fault = begin(monitor, "the link to a standby is cut", &signs).await;
    link.cut();
    fault.told().await;
    link.heal();
    fault.over().await;

    let signs = [(Hang, "postgres standby reachable critical")];
    let fault = begin(monitor, "the link to a standby loses all", &signs).await;
    link.stall();
    fault.told().await;
    link.heal();
    fault.over().await;
}

async fn logins(scene: &Scene) {
    let Scene { monitor, primary, authority, .. } = scene;
    // Who is logged in goes on.
    let signs = [
        (Deep, "postgres primary new_connections warning"),
        (Deep, "postgres standby new_connections warning"),
    ];
    let fault = begin(monitor, "the password is another", &signs).await;
    let set = |password: &str| format!("ALTER ROLE {} PASSWORD '{password}'", ROLE.0);
    primary.psql(&set("wrong")).await;
    fault.told().await;
    primary.psql(&set(ROLE.1)).await;
    fault.over().await;

    let signs = [(Deep, "postgres primary certificate critical")];
    let fault = begin(monitor, "the certificate is expired", &signs).await;
    certify(primary, &authority.issue_expired("old")).await;
    fault.told().await;
    certify(primary, &authority.issue("new")).await;
    fault.over().await;
}

async fn sessions(scene: &Scene) {
    let Scene { monitor, primary, .. } = scene;
    let signs = [
        (Each, "postgres primary connections critical"),
        (Deep, "postgres primary new_connections critical"),
    ];
    let mut fault = begin(monitor, "connections are exhausted", &signs).await;
    let mut clients: Vec<Client> = Vec::new();
    while let Ok(client) = primary.try_connect_as("app", "postgres").await {
        clients.push(client);
    }
    fault.now();
    fault.told().await;
    drop(clients);
    fault.over().await;

    let second = Duration::from_secs(1);
    let front = primary.connect().await;
    let signs = [(After(second + 2 * super::DEEP), "postgres primary long_transactions warning")];
    let fault = begin(monitor, "a transaction stays open", &signs).await;
    front.batch_execute("BEGIN; SELECT pg_current_xact_id()").await.unwrap();
    fault.told().await;
    front.batch_execute("COMMIT").await.unwrap();
    fault.over().await;

    let signs = [
        (After(2 * super::STANDARD + second), "postgres primary locks warning"),
        (Deep, "postgres primary blocking warning"),
        (May, "postgres primary long_transactions warning"),
    ];
    let fault = begin(monitor, "sessions wait for one that does not commit", &signs).await;
    front.batch_execute("BEGIN; LOCK TABLE t").await.unwrap();
    let mut waiting = JoinSet::new();
    for client in [primary.connect().await, primary.connect().await] {
        waiting.spawn(async move { client.batch_execute("SELECT FROM t").await });
    }
    fault.told().await;
    front.batch_execute("COMMIT").await.unwrap();
    fault.over().await;
}

async fn wal(scene: &Scene) {
    let Scene { monitor, primary, standby, .. } = scene;
    let signs = [(After(2 * super::STANDARD), "postgres primary archiving warning")];
    let fault = begin(monitor, "archiving fails", &signs).await;
    primary.set("archive_command", "false").await;
    primary.psql("INSERT INTO t VALUES (1); SELECT pg_switch_wal()").await;
    fault.told().await;
    primary.set("archive_command", "true").await;
    fault.over().await;

    let signs = [(Standard, "postgres primary slots critical")];
    let mut fault = begin(monitor, "a slot is lost", &signs).await;
    primary.psql("SELECT pg_create_physical_replication_slot('forgotten', true)").await;
    let switch = "INSERT INTO t VALUES (1); SELECT pg_switch_wal();";
    primary.psql(&switch.repeat(16)).await;
    // Which has no slot: what it lacked would be gone.
    standby.catch_up(primary).await;
    primary.psql("CHECKPOINT").await;
    fault.now();
    fault.told().await;
    primary.psql("SELECT pg_drop_replication_slot('forgotten')").await;
    fault.over().await;
}

async fn replay(scene: &Scene) {
    let Scene { monitor, primary, standby, .. } = scene;
    let signs = [
        (Each, "postgres standby streaming warning"),
        (Each, "postgres standby replication_lag warning"),
    ];
    let fault = begin(monitor, "replay is paused", &signs).await;
    standby.psql("SELECT pg_wal_replay_pause()").await;
    primary.psql("INSERT INTO t SELECT generate_series(1, 100000)").await;
    fault.told().await;
    standby.psql("SELECT pg_wal_replay_resume()").await;
    fault.over().await;
}

async fn drift(scene: &mut Scene) {
    let Scene { monitor, standby, .. } = scene;
    let signs = [
        (Deep, "group 0 settings_drift warning"),
        (May, "postgres standby settings warning"),
        (May, "postgres standby reachable warning"),
        (May, "postgres standby reachable critical"),
        (May, "postgres standby streaming warning"),
        (May, "group 0 redundancy critical"),
    ];
    let mut fault = begin(monitor, "wal_level is another on a standby", &signs).await;
    standby.set("wal_level", "logical").await;
    standby.restart().await;
    fault.now();
    fault.told().await;
    standby.psql("ALTER SYSTEM RESET wal_level").await;
    standby.restart().await;
    fault.over().await;
}

/// The age is real, and small: it is the limit that is low.
async fn identifiers(scene: &Scene) {
    let Scene { monitor, primary, .. } = scene;
    let signs = [
        (Deep, "postgres primary wraparound warning"),
        (May, "postgres primary long_queries warning"),
    ];
    let mut fault = begin(monitor, "transaction identifiers run out", &signs).await;
    let use_up = format!(
        "SET synchronous_commit = off; DO $$ BEGIN FOR i IN 1..{TRANSACTIONS} LOOP \
         PERFORM pg_current_xact_id(); COMMIT; END LOOP; END $$"
    );
    primary.psql(&use_up).await;
    fault.now();
    fault.told().await;
    primary.psql("ALTER DATABASE template0 ALLOW_CONNECTIONS true").await;
    for database in ["template0", "template1", "postgres"] {
        primary.psql_in(database, "VACUUM FREEZE").await;
    }
    fault.over().await;
}

/// A stand-in: no clock of this machine can be moved, so the servers get a `clock_timestamp()` that is
/// ahead. The session that has prepared the old one ends.
async fn clocks(scene: &Scene) {
    let Scene { monitor, primary, standby, .. } = scene;
    let signs =
        [(Each, "postgres primary clock warning"), (Each, "postgres standby clock warning")];
    let fault = begin(monitor, "clocks are ahead (a stand-in)", &signs).await;
    let allow = "SET allow_system_table_mods = on;";
    primary
        .psql(&format!(
            "{allow} ALTER FUNCTION pg_catalog.clock_timestamp() RENAME TO true_clock; \
             CREATE FUNCTION pg_catalog.clock_timestamp() RETURNS timestamptz LANGUAGE sql VOLATILE \
             AS 'SELECT pg_catalog.true_clock() + interval ''10 s'''"
        ))
        .await;
    standby.catch_up(primary).await;
    let end = format!(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{}'",
        ROLE.0
    );
    primary.psql(&end).await;
    standby.psql(&end).await;
    fault.told().await;
    primary
        .psql(&format!(
            "{allow} DROP FUNCTION pg_catalog.clock_timestamp(); \
             ALTER FUNCTION pg_catalog.true_clock() RENAME TO clock_timestamp"
        ))
        .await;
    standby.catch_up(primary).await;
    primary.psql(&end).await;
    standby.psql(&end).await;
    fault.over().await;
}

async fn servers(scene: &mut Scene) {
    let Scene { monitor, primary, standby, .. } = scene;
    let signs = [
        (Each, "postgres standby reachable critical"),
        (Standard, "group 0 redundancy critical"),
        (May, "postgres standby reachable warning"),
        (May, "postgres standby streaming warning"),
    ];
    let fault = begin(monitor, "a standby is lost", &signs).await;
    standby.kill9().await;
    fault.told().await;
    standby.start().await;
    fault.over().await;

    let signs = [
        (Each, "postgres primary reachable critical"),
        (Each, "group 0 primary critical"),
        (Each, "group 0 redundancy unknown"),
        (May, "group 0 redundancy critical"),
        (May, "postgres primary reachable warning"),
        (May, "postgres standby streaming warning"),
    ];
    let fault = begin(monitor, "a primary is lost", &signs).await;
    primary.kill9().await;
    fault.told().await;
    primary.start().await;
    fault.over().await;
}

/// The standby is promoted while its primary goes on to write; then the old one becomes its standby.
async fn two_primaries(scene: Scene) {
    let Scene { monitor, mut primary, standby, .. } = scene;
    let signs = [
        (Each, "group 0 primary critical"),
        (Each, "group 0 redundancy unknown"),
        (Each, "postgres primary role critical"),
        (Each, "group 0 split_brain critical"),
        (May, "group 0 split_brain warning"),
        (May, "postgres standby streaming warning"),
        // While the old one becomes a standby.
        (May, "group 0 redundancy critical"),
        (May, "postgres primary reachable critical"),
        (May, "postgres primary reachable warning"),
        (May, "postgres primary streaming warning"),
    ];
    let fault = begin(&monitor, "two servers take writes", &signs).await;
    standby.promote().await;
    for server in [&primary, &standby].repeat(4) {
        server.psql("INSERT INTO t VALUES (2)").await;
        tokio::time::sleep(super::INTERVAL / 2).await;
    }
    fault.told().await;
    primary.stop(Mode::Fast).await;
    primary.rejoin(&standby).await;
    fault.over().await;
}

/// Not a server's, but that of this host.
#[tokio::test]
async fn a_disk_that_fills_up_is_named_and_nothing_else() {
    if postgres_is_missing() {
        return;
    }
    let Some(small) = std::env::var_os("PGMESH_TEST_SMALL_DISK") else {
        return skip("no small file system (PGMESH_TEST_SMALL_DISK is not set)");
    };
    let small = Path::new(&small);
    let server = PgServer::builder().setting("fsync", "on").primary().await;
    let tables = format!(
        "[postgres]\nuser = \"postgres\"\ntls = \"disable\"\n{}\
         [[disks]]\nname = \"small\"\npath = \"{}\"\n",
        crate::exporter::server(&server),
        small.display()
    );
    let monitor = Monitor::configured(KEYS, &tables).started().await;
    let signs = [(Each, "disk small space critical")];
    let fault = begin(&monitor, "a disk is full", &signs).await;
    let filler = small.join("health-filler");
    let mut file = fs::File::create(&filler).unwrap();
    while std::io::Write::write_all(&mut file, &[1; 1 << 12]).is_ok() {}
    fault.told().await;
    drop(file);
    fs::remove_file(&filler).unwrap();
    fault.over().await;
}
