//! What the health monitor makes of PostgreSQL servers, and of what is done to them.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Duration;

use harness::postgres::postgres_is_missing;
use harness::program::give_to_server_user;
use harness::{Authority, Identity, PgServer, eventually, run};
use health_monitor::check::{Reading, Status};
use health_monitor::clock;
use health_monitor::component::{Component, Kind};
use health_monitor::facts::{Failure, Of, Seen, Stage, record};
use health_monitor::judge::postgres::{judge, judge_deep};
use health_monitor::probe::Probe;
use health_monitor::probe::postgres::{self, DeepFacts, DeepProbe, PostgresFacts, PostgresProbe};
use health_monitor::thresholds::{Scale, Thresholds};
use rustix::process::{Pid, Signal, kill_process};
use shared::pg::{Node, PostgresConfig, Settings};
use tokio::time::{Instant, timeout};
use tokio_postgres::Client;

use crate::scene::write;

/// How long an answer may take: more than the monitor's second, since these tests run many servers.
const LIMIT: Duration = Duration::from_secs(3);
const LONG: Duration = Duration::from_secs(30);

/// One server that is watched.
struct Watched {
    component: Component,
    node: Node,
    settings: Settings,
    thresholds: Thresholds,
    basic: PostgresProbe,
    deep: DeepProbe,
    basics: Of<PostgresFacts>,
    deeps: Of<DeepFacts>,
}

/// `[postgres]` with these keys.
fn settings(keys: &str) -> Settings {
    let config: PostgresConfig = toml::from_str(keys).unwrap();
    config.settings("pgmesh/health-monitor").unwrap()
}

impl Watched {
    /// By its Unix socket, as the role that the monitor has.
    async fn new(server: &PgServer) -> Self {
        let settings = settings("user = \"pgmesh_health\"\ntls = \"disable\"\n");
        if server.psql("SELECT pg_is_in_recovery()").await == "f" {
            server.psql(include_str!("../../init-scripts/10-roles.sql")).await;
        }
        Self::with(server, &server.socket_directory().display().to_string(), settings)
    }

    fn with(server: &PgServer, host: &str, settings: Settings) -> Self {
        let (host, port) = (host.to_owned(), server.port());
        let node = Node { group: 0, name: server.name().to_owned(), host, port };
        Self {
            component: Component::of_group(Kind::Postgres, 0, server.name()),
            basic: PostgresProbe::new(node.clone(), &settings, LIMIT, LIMIT),
            deep: DeepProbe::new(node.clone(), &settings, LIMIT),
            node,
            settings,
            thresholds: Thresholds::default(),
            basics: Of::default(),
            deeps: Of::default(),
        }
    }

    /// With limits of its own.
    fn limits(mut self, toml: &str) -> Self {
        self.thresholds = toml::from_str(toml).unwrap();
        self
    }

    /// Forgets its connection, and what it was told on it.
    fn anew(&mut self) {
        self.basic = PostgresProbe::new(self.node.clone(), &self.settings, LIMIT, LIMIT);
    }

    /// Asks anew, until everything was answered.
    async fn ask_anew(&mut self) -> Vec<Reading> {
        self.anew();
        let deadline = Instant::now() + LONG;
        loop {
            let readings = self.ask(None).await;
            if self.facts().standard.is_some() {
                return readings;
            }
            assert!(Instant::now() < deadline, "{readings:?}");
        }
    }

    /// Asks as the monitor does each interval, and judges.
    async fn ask(&mut self, primary: Option<&PostgresFacts>) -> Vec<Reading> {
        let asked_at = clock::now();
        let outcome = timeout(LIMIT, self.basic.ask()).await.unwrap_or_else(|_| {
            Err(Failure { stage: Stage::Timeout, error: "no answer within 3s".to_owned() })
        });
        record(&mut self.basics, &self.component, (asked_at, clock::now()), outcome);
        let scale = Scale { thresholds: &self.thresholds, before: &BTreeMap::new() };
        judge(&self.component, &self.basics[&self.component], primary, scale)
    }

    /// Asks for what changes slowly, and judges.
    async fn ask_deep(&mut self) -> Vec<Reading> {
        let asked_at = clock::now();
        let outcome = timeout(postgres::LIMIT, Box::pin(self.deep.ask())).await.unwrap();
        let has_failed = outcome.is_err();
        record(&mut self.deeps, &self.component, (asked_at, clock::now()), outcome);
        if has_failed {
            // Only with an answer on the kept connection after that it is known that the server is there.
            self.ask(None).await;
        }
        let scale = Scale { thresholds: &self.thresholds, before: &BTreeMap::new() };
        let basic = self.basics.get(&self.component).and_then(Seen::now);
        let readings = judge_deep(&self.component, &self.deeps[&self.component], basic, scale);
        // The servers of these tests run without fsync, which is told of each.
        let is_known = |it: &Reading| it.check.name == "settings" && it.reason.starts_with("fsync");
        readings.into_iter().filter(|it| !is_known(it)).collect()
    }

    fn facts(&self) -> &PostgresFacts {
        self.basics[&self.component].now().unwrap()
    }

    fn deep_facts(&self) -> &DeepFacts {
        self.deeps[&self.component].now().unwrap()
    }

    /// Its state is that of somebody who was asked just now and is well.
    async fn assert_well(&mut self, primary: Option<&PostgresFacts>) {
        assert_eq!(bad(&self.ask(primary).await), Vec::<String>::new());
    }
}

/// What is not ok.
fn bad(readings: &[Reading]) -> Vec<String> {
    let bad = readings.iter().filter(|it| it.status != Status::Ok);
    bad.map(|it| format!("{} {}: {}", it.check.name, it.status, it.reason)).collect()
}

/// Checks that exactly one thing is wrong, and what it is.
#[track_caller]
fn assert_only(readings: &[Reading], start: &str, words: &str) {
    let bad = bad(readings);
    let [only] = &bad[..] else { panic!("{start}: {bad:?}") };
    assert!(only.starts_with(start) && only.contains(words), "{only}");
}

/// Signals the postmaster alone.
fn postmaster(server: &PgServer, signal: Signal) {
    let pid_file = fs::read_to_string(server.data_directory().join("postmaster.pid")).unwrap();
    let pid = pid_file.lines().next().and_then(|it| it.trim().parse().ok()).and_then(Pid::from_raw);
    kill_process(pid.unwrap(), signal).unwrap();
}

#[tokio::test]
async fn a_primary_and_its_standby_are_well() {
    if postgres_is_missing() {
        return;
    }
    let server = PgServer::primary().await;
    let mut primary = Watched::new(&server).await;
    let standby_server = server.standby("standby").await;
    standby_server.catch_up(&server).await;
    let mut standby = Watched::new(&standby_server).await;

    primary.assert_well(None).await;
    standby.assert_well(Some(primary.facts())).await;
    let (first, second) = (primary.facts(), standby.facts());
    assert!(first.has_monitor && second.has_monitor);
    assert_eq!((first.in_recovery, second.in_recovery), (false, true));
    assert_eq!((first.timeline, second.timeline), (1, 1));
    assert_eq!(first.system_identifier, second.system_identifier);
    assert_eq!(first.connections, (1, 57));
    assert!(first.lsn >= second.lsn && second.lsn.is_some());
    let (_, standard) = first.standard.as_ref().unwrap();
    let senders: Vec<_> = standard.senders.iter().map(|it| it.state.as_str()).collect();
    assert_eq!(senders, ["streaming"]);

    // What is asked for seldom: nothing is refused to the role.
    for watched in [&mut primary, &mut standby] {
        assert_eq!(bad(&watched.ask_deep().await), Vec::<String>::new());
        let facts = watched.deep_facts();
        assert!(facts.wal.is_some() && facts.blockers.is_some() && facts.queries.is_some());
        assert_eq!(facts.settings["wal_level"], "replica");
        assert!(facts.extensions.contains_key("plpgsql"));
    }
    let facts = primary.deep_facts();
    assert!(facts.wraparound.is_some() && facts.dead_rows.is_some() && facts.sizes.is_some());

    // A session that somebody ends is not an outage, and the new one knows all of it again.
    let connected_at = primary.facts().connected_at;
    let sessions = "SELECT bool_and(pg_terminate_backend(pid, 5000)) FROM pg_stat_activity \
                    WHERE application_name = 'pgmesh/health-monitor'";
    assert_eq!(server.psql(sessions).await, "t");
    primary.assert_well(None).await;
    assert!(primary.facts().connected_at > connected_at);

    // Nor is a promotion, of which a standby that follows is told apart from one that does not.
    let before = primary.facts().clone();
    drop(server);
    standby_server.promote().await;
    standby.assert_well(None).await;
    assert_eq!((standby.facts().in_recovery, standby.facts().timeline), (false, 2));
    assert!(standby.facts().role_since > Some(before.at));
    assert!(standby.facts().standard.is_some());
}

#[tokio::test]
async fn a_server_that_is_killed_or_hangs_is_told_at_once_and_ends_when_it_is_back() {
    if postgres_is_missing() {
        return;
    }
    let mut server = PgServer::primary().await;
    let mut watched = Watched::new(&server).await;
    watched.assert_well(None).await;

    server.sigstop();
    let asked_at = Instant::now();
    assert_only(&watched.ask(None).await, "reachable critical", "no answer within 3s");
    assert!(asked_at.elapsed() < LIMIT * 2);
    // A new connection is not answered either.
    assert_only(&watched.ask(None).await, "reachable critical", "within 3s");
    server.sigcont();
    watched.assert_well(None).await;

    server.kill9().await;
    assert_only(&watched.ask(None).await, "reachable critical", "no connection");
    server.start().await;
    watched.assert_well(None).await;
    let (_, standard) = watched.facts().standard.clone().unwrap();
    assert_eq!(standard.slots, []);

    // The postmaster alone: who is in goes on, and nobody gets in.
    postmaster(&server, Signal::STOP);
    watched.assert_well(None).await;
    assert_only(&watched.ask_deep().await, "new_connections critical", "no login within 3s");
    postmaster(&server, Signal::CONT);
    assert_eq!(bad(&watched.ask_deep().await), Vec::<String>::new());
}

#[tokio::test]
async fn a_login_that_is_refused_is_told_as_such() {
    if postgres_is_missing() {
        return;
    }
    let server = PgServer::builder().password("right").primary().await;
    let file = server.socket_directory().join("wrong");
    let keys = format!("user = \"postgres\"\ntls = \"disable\"\npassword_file = {file:?}\n");
    let host = server.socket_directory().display().to_string();
    write(&file, "wrong");
    let mut watched = Watched::with(&server, &host, settings(&keys));
    let readings = watched.ask(None).await;
    assert_only(&readings, "reachable critical", "it refuses the password of role postgres");
    assert!(readings[0].next_step().contains("password_file"));
    // Asked again at once it is not tried again: the server would log each.
    let refusals = || server.log().matches("password authentication failed").count();
    let before = refusals();
    assert_only(&watched.ask(None).await, "reachable critical", "it refuses the password");
    assert_eq!(refusals(), before);
    write(&file, "right");
    let mut watched = Watched::with(&server, &host, settings(&keys));
    watched.assert_well(None).await;

    // A standby that lets nobody in.
    let server = PgServer::primary().await;
    let standby = server.standby_with("standby", &[("hot_standby", "off")]).await;
    let host = standby.socket_directory().display().to_string();
    let trusted = settings("user = \"postgres\"\ntls = \"disable\"\n");
    let mut watched = Watched::with(&standby, &host, trusted);
    assert_only(&watched.ask(None).await, "reachable warning", "not accepting connections");
}

#[tokio::test]
async fn what_the_role_of_the_monitor_lacks_is_said() {
    if postgres_is_missing() {
        return;
    }
    let server = PgServer::builder().setting("archive_mode", "on").primary().await;
    let mut watched = Watched::new(&server).await;
    watched.assert_well(None).await;
    // Its own limit is not the server's.
    server.psql("ALTER ROLE pgmesh_health CONNECTION LIMIT 1").await;
    let readings = watched.ask_deep().await;
    assert_only(&readings, "new_connections warning", "too many connections for role");

    server.psql("CREATE ROLE nobody LOGIN").await;
    let host = server.socket_directory().display().to_string();
    let nobody = settings("user = \"nobody\"\ntls = \"disable\"\n");
    let mut watched = Watched::with(&server, &host, nobody);
    let readings = watched.ask(None).await;
    assert_only(&readings, "reachable warning", "the role lacks pg_monitor");
    // What it may not see is left out, and not taken for none.
    assert!(readings.iter().all(|it| it.check.name != "connections"));
    let (_, standard) = watched.facts().standard.as_ref().unwrap();
    assert_eq!(standard.archiver.as_ref().unwrap().oldest_ready, None);
    assert_eq!(bad(&watched.ask_deep().await), Vec::<String>::new());
    assert_eq!(watched.deep_facts().wal, None);
}

/// Takes connections until the server has none to spare.
async fn take_all(server: &PgServer) -> Vec<Client> {
    let mut clients = Vec::new();
    while let Ok(client) = server.try_connect_as("app", "postgres").await {
        clients.push(client);
    }
    clients
}

#[tokio::test]
async fn a_server_without_a_connection_to_spare_is_full() {
    if postgres_is_missing() {
        return;
    }
    let server = PgServer::builder().setting("max_connections", "12").primary().await;
    server.psql("CREATE ROLE app LOGIN").await;
    let mut watched = Watched::new(&server).await;
    watched.assert_well(None).await;
    let clients = take_all(&server).await;
    assert_only(&watched.ask(None).await, "connections critical", "9 of 9 connections are in use");
    assert_only(
        &watched.ask_deep().await,
        "new_connections critical",
        "remaining connection slots",
    );
    // Who has no connection yet learns it too.
    let mut other = Watched::new(&server).await;
    assert_only(&other.ask(None).await, "reachable critical", "remaining connection slots");
    drop(clients);
    eventually("the connections are closed", LONG, async || {
        bad(&watched.ask(None).await).is_empty()
    })
    .await;
    assert_eq!(bad(&watched.ask_deep().await), Vec::<String>::new());
    other.assert_well(None).await;
}

#[tokio::test]
async fn who_waits_for_whom_is_named() {
    if postgres_is_missing() {
        return;
    }
    let server = PgServer::builder().setting("max_prepared_transactions", "2").primary().await;
    server.psql("CREATE TABLE t (i int)").await;
    let limits = "[postgres]\nlocks = { warning = 0.2, critical = 60 }\n\
                  blocking = { warning = 2, critical = 20 }\n\
                  long_transactions = { warning = 0.2, critical = 600 }\n\
                  long_queries = { warning = 0.2, critical = 600 }\n";
    let mut watched = Watched::new(&server).await.limits(limits);
    watched.assert_well(None).await;
    assert_eq!(bad(&watched.ask_deep().await), Vec::<String>::new());

    let front = server.connect().await;
    front.batch_execute("SET application_name = 'forgets'; BEGIN; LOCK TABLE t").await.unwrap();
    let pid: i32 = front.query_one("SELECT pg_backend_pid()", &[]).await.unwrap().get(0);
    let waiters = [server.connect().await, server.connect().await];
    let [first, second] = waiters.each_ref().map(|it| it.batch_execute("SELECT FROM t"));
    let seen = async {
        eventually("both wait", LONG, async || {
            server.psql("SELECT count(*) FROM pg_locks WHERE NOT granted").await == "2"
        })
        .await;
        tokio::time::sleep(Duration::from_millis(300)).await;
        let basic = watched.ask_anew().await;
        let deep = watched.ask_deep().await;
        front.batch_execute("COMMIT").await.unwrap();
        (basic, deep)
    };
    let (first, second, (basic, deep)) = tokio::join!(first, second, seen);
    first.and(second).unwrap();
    assert_only(&basic, "locks warning", "2 sessions wait for a lock, the first for");
    let bad_deep = bad(&deep);
    let who = format!("process {pid} (role postgres, forgets, idle in transaction)");
    for expected in [
        format!("blocking warning: 2 sessions wait behind {who}"),
        format!("long_transactions warning: a transaction of {who} is"),
        "long_queries warning: a statement of process".to_owned(),
    ] {
        assert!(bad_deep.iter().any(|it| it.starts_with(&expected)), "{expected}: {bad_deep:?}");
    }
    assert_eq!(bad_deep.len(), 3, "{bad_deep:?}");

    // A prepared transaction has no session.
    server.psql("BEGIN; INSERT INTO t VALUES (1); PREPARE TRANSACTION 'forgotten'").await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    let name = "the prepared transaction forgotten (role postgres)";
    assert_only(&watched.ask_deep().await, "long_transactions warning", name);
    server.psql("ROLLBACK PREPARED 'forgotten'").await;
    assert_eq!(bad(&watched.ask_deep().await), Vec::<String>::new());
}

#[tokio::test]
async fn a_slot_that_holds_wal_back_is_told_and_one_that_lost_it() {
    if postgres_is_missing() {
        return;
    }
    let server = PgServer::builder()
        .wal_segment_mib(1)
        .setting("max_wal_size", "8MB")
        .setting("min_wal_size", "2MB")
        .primary()
        .await;
    let limits = "[postgres]\nslots = { warning = 1000000, critical = 1000000000 }\n\
                  wal_size = { warning = 1000, critical = 10000 }\n";
    let mut watched = Watched::new(&server).await.limits(limits);
    server.psql("SELECT pg_create_physical_replication_slot('forgotten', true)").await;
    watched.assert_well(None).await;
    let switch = "CREATE TABLE IF NOT EXISTS t (i int); INSERT INTO t VALUES (1); \
                  SELECT pg_switch_wal();";
    server.psql(&switch.repeat(4)).await;
    assert_only(
        &watched.ask_anew().await,
        "slots warning",
        "forgotten has no consumer and holds back",
    );

    server.set("max_slot_wal_keep_size", "2MB").await;
    server.psql(&format!("{}CHECKPOINT", switch.repeat(8))).await;
    assert_only(&watched.ask_anew().await, "slots critical", "lost its WAL: forgotten");
    server.psql("SELECT pg_drop_replication_slot('forgotten')").await;
    assert_eq!(bad(&watched.ask_anew().await), Vec::<String>::new());
}

#[tokio::test]
async fn archiving_that_fails_is_told_until_it_works() {
    if postgres_is_missing() {
        return;
    }
    let server = PgServer::builder()
        .setting("archive_mode", "on")
        .setting("archive_command", "false")
        .primary()
        .await;
    let limits = "[postgres]\narchiving = { warning = 0.2, critical = 600 }\n";
    let mut watched = Watched::new(&server).await.limits(limits);
    watched.assert_well(None).await;
    server.psql("CREATE TABLE t (i int); SELECT pg_switch_wal()").await;
    eventually("an attempt fails", LONG, async || {
        server.psql("SELECT failed_count > 0 FROM pg_stat_archiver").await == "t"
    })
    .await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    let failed = "the last attempt to archive failed; 1 file waits, the oldest for";
    assert_only(&watched.ask_anew().await, "archiving warning", failed);
    server.set("archive_command", "true").await;
    eventually("the file is archived", LONG, async || bad(&watched.ask_anew().await).is_empty())
        .await;
}

#[tokio::test]
async fn a_standby_that_does_not_follow_is_told() {
    if postgres_is_missing() {
        return;
    }
    let server = PgServer::primary().await;
    let mut primary = Watched::new(&server).await;
    let standby_server = server.standby("standby").await;
    let limits = "[postgres]\nreplication_lag = { warning = 1000000, critical = 1000000000 }\n";
    let mut standby = Watched::new(&standby_server).await.limits(limits);
    let wal = "CREATE TABLE IF NOT EXISTS t (i int); \
               INSERT INTO t SELECT generate_series(1, 50000)";

    standby_server.psql("SELECT pg_wal_replay_pause()").await;
    server.psql(wal).await;
    primary.assert_well(None).await;
    let readings = standby.ask(Some(primary.facts())).await;
    let bad_readings = bad(&readings);
    assert_eq!(bad_readings.len(), 2, "{bad_readings:?}");
    assert_eq!(bad_readings[0], "streaming warning: replay is paused");
    assert!(bad_readings[1].starts_with("replication_lag warning: it has "), "{bad_readings:?}");
    standby_server.psql("SELECT pg_wal_replay_resume()").await;
    standby_server.catch_up(&server).await;
    primary.ask(None).await;
    standby.assert_well(Some(primary.facts())).await;

    // The receiver is cut off.
    let conninfo = standby_server.psql("SHOW primary_conninfo").await;
    standby_server.set("primary_conninfo", "host=/nowhere").await;
    eventually("the receiver is gone", LONG, async || {
        server.psql("SELECT count(*) FROM pg_stat_replication").await == "0"
    })
    .await;
    primary.assert_well(None).await;
    let readings = standby.ask(Some(primary.facts())).await;
    assert_only(&readings, "streaming warning", "it has received nothing for");
    // Without a primary there is nothing to receive.
    assert_eq!(bad(&standby.ask(None).await), Vec::<String>::new());
    standby_server.set("primary_conninfo", &conninfo).await;
    eventually("it streams again", LONG, async || {
        bad(&standby.ask(Some(primary.facts())).await).is_empty()
    })
    .await;

    // A server of another cluster in its place.
    let other = PgServer::builder().name("other").primary().await;
    let mut stranger = Watched::new(&other).await;
    let readings = stranger.ask(Some(primary.facts())).await;
    assert_only(&readings, "role critical", "it belongs to another cluster");
}

#[tokio::test]
async fn identifiers_that_run_out_are_told() {
    if postgres_is_missing() {
        return;
    }
    // Autovacuum would begin to freeze at once.
    let limit = "2000000000";
    let mut server =
        PgServer::builder().setting("autovacuum_freeze_max_age", limit).primary().await;
    let mut watched = Watched::new(&server).await;
    watched.assert_well(None).await;
    assert_eq!(bad(&watched.ask_deep().await), Vec::<String>::new());
    server.stop(harness::Mode::Fast).await;
    // The first of a file of pg_xact, so that the server makes it: 2^20 transactions each.
    let next = (954 << 20).to_string();
    let mut reset = server.program("pg_resetwal");
    run(reset.args(["-x", &next, "-D"]).arg(server.data_directory())).await;
    server.start().await;
    watched.assert_well(None).await;
    let words = "has used 46.6 % of its transaction identifiers";
    assert_only(&watched.ask_deep().await, "wraparound warning", words);
}

#[tokio::test]
async fn settings_that_differ_or_wait_are_seen() {
    if postgres_is_missing() {
        return;
    }
    let server = PgServer::primary().await;
    let mut primary = Watched::new(&server).await;
    let drifted =
        server.standby_with("standby", &[("wal_level", "logical"), ("fsync", "on")]).await;
    let mut standby = Watched::new(&drifted).await;
    for watched in [&mut primary, &mut standby] {
        watched.assert_well(None).await;
        assert_eq!(bad(&watched.ask_deep().await), Vec::<String>::new());
    }
    let level = |watched: &Watched| watched.deep_facts().settings["wal_level"].clone();
    assert_eq!((level(&primary), level(&standby)), ("replica".to_owned(), "logical".to_owned()));
    drifted.set("max_connections", "61").await;
    drifted.set("full_page_writes", "off").await;
    eventually("the settings are read", LONG, async || {
        standby.ask_deep().await;
        standby.deep_facts().settings["full_page_writes"] == "off"
    })
    .await;
    // PostgreSQL tells this too of what the command line set over the file.
    assert_eq!(standby.deep_facts().pending_restart, ["max_connections", "wal_level"]);
    let readings = standby.ask_deep().await;
    assert_only(&readings, "settings warning", "full_page_writes is off");
    drifted.set("full_page_writes", "on").await;
    eventually("that one is set again", LONG, async || {
        let readings = standby.ask_deep().await;
        bad(&readings)
            == ["settings warning: settings wait for a restart: max_connections, wal_level"]
    })
    .await;
}

/// Gives a server another certificate.
pub(crate) async fn certify(server: &PgServer, identity: &Identity) {
    let place = |from: &Path, name: &str| {
        let to = server.data_directory().join(name);
        fs::write(&to, fs::read(from).unwrap()).unwrap();
        give_to_server_user(&to);
    };
    place(&identity.certificate, "server.crt");
    place(&identity.key, "server.key");
    server.psql("SELECT pg_reload_conf()").await;
}

#[tokio::test]
async fn a_certificate_that_expires_is_told_before_and_after() {
    if postgres_is_missing() {
        return;
    }
    let server = PgServer::builder().tls().primary().await;
    let authority = Authority::new();
    let keys = format!("user = \"postgres\"\nca_file = {:?}\n", authority.ca_file());
    certify(&server, &authority.issue("good")).await;
    let mut watched = Watched::with(&server, "127.0.0.1", settings(&keys));
    eventually("the certificate is read", LONG, async || {
        watched.anew();
        bad(&watched.ask(None).await).is_empty()
    })
    .await;
    assert_eq!(bad(&watched.ask_deep().await), Vec::<String>::new());
    let until = watched.deep_facts().certificate.unwrap().not_after;
    assert_eq!(until.to_rfc3339(), "2100-01-01T00:00:00+00:00");

    certify(&server, &authority.issue_expired("old")).await;
    eventually("nobody is let in", LONG, async || {
        watched.anew();
        !bad(&watched.ask(None).await).is_empty()
    })
    .await;
    let readings = watched.ask(None).await;
    assert_only(&readings, "reachable critical", "the server's certificate must be renewed");
    let readings = watched.ask_deep().await;
    assert_only(&readings, "certificate critical", "the certificate expired");
    assert_eq!(readings.len(), 1);
    certify(&server, &authority.issue("new")).await;
    eventually("it is renewed", LONG, async || {
        watched.anew();
        bad(&watched.ask(None).await).is_empty()
    })
    .await;
    assert_eq!(bad(&watched.ask_deep().await), Vec::<String>::new());

    // It is valid, and of an authority that is not trusted.
    certify(&server, &Authority::new().issue("other")).await;
    eventually("it is not trusted", LONG, async || {
        watched.anew();
        !bad(&watched.ask(None).await).is_empty()
    })
    .await;
    assert_only(&watched.ask(None).await, "reachable critical", "a CA that is not in ca_file");
}
