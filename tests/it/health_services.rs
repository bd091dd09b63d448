//! What the health monitor asks of everything but PostgreSQL, against the real servers, each with its
//! faults; asserted by what the judges make of it.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use harness::postgres::postgres_is_missing;
use harness::{
    Backend, EtcdCluster, HaProxy, PatroniCluster, PgBouncer, PgServer, RedisServer,
    etcd_is_missing, eventually, haproxy_is_missing, patroni_is_missing, pgbouncer_is_missing,
    redis_is_missing, server_port,
};
use health_monitor::check::{Reading, Status};
use health_monitor::clock;
use health_monitor::component::{Component, Kind};
use health_monitor::config::{
    AgentConfig, DiskConfig, HaproxyConfig, PgbouncerConfig, RedisConfig, SwarmConfig,
};
use health_monitor::facts::{Failure, Of, Seen, Stage, record};
use health_monitor::judge;
use health_monitor::probe::Probe;
use health_monitor::probe::agent::AgentProbe;
use health_monitor::probe::disk::DiskProbe;
use health_monitor::probe::etcd::{EtcdFacts, EtcdProbe};
use health_monitor::probe::haproxy::HaproxyProbe;
use health_monitor::probe::patroni::PatroniProbe;
use health_monitor::probe::pgbouncer::{PgbouncerFacts, PgbouncerProbe};
use health_monitor::probe::postgres::PostgresFacts;
use health_monitor::probe::redis::{RedisFacts, RedisProbe};
use health_monitor::probe::swarm::SwarmProbe;
use health_monitor::thresholds::{Scale, Thresholds};
use health_monitor::verdict::Checks;
use serde_json::json;
use shared::admin::Admin;
use shared::etcd::EtcdConfig;
use shared::pg::TlsMode;
use shared::tasks::Tasks;
use shared::topology::PatroniConfig;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, UnixListener};
use tokio::time::{Instant, timeout};
use tokio_postgres::NoTls;

/// Longest wait for what should follow within seconds.
const LIMIT: Duration = Duration::from_secs(30);
/// The caller's limit on one question.
const ASK_LIMIT: Duration = Duration::from_secs(1);

/// Asks once as the monitor does, and takes the outcome to what is known.
async fn ask<P: Probe>(known: &mut Of<P::Facts>, component: &Component, probe: &mut P) {
    let asked_at = clock::now();
    let outcome = timeout(ASK_LIMIT, probe.ask()).await.unwrap_or_else(|_| {
        Err(Failure { stage: Stage::Timeout, error: "no answer in time".to_owned() })
    });
    record(known, component, (asked_at, clock::now()), outcome);
}

/// The outcome of one question.
async fn outcome<P: Probe>(probe: &mut P) -> Seen<P::Facts> {
    let (mut known, component) = (Of::new(), Component::new(Kind::Cluster, "one"));
    ask(&mut known, &component, probe).await;
    known.remove(&component).unwrap()
}

/// Check, status and reason of each reading.
fn told(readings: &[Reading]) -> Vec<(&'static str, Status, &str)> {
    readings.iter().map(|it| (it.check.name, it.status, it.reason.as_str())).collect()
}

/// The reading of that check.
fn of<'a>(readings: &'a [Reading], check: &str) -> (Status, &'a str) {
    let found = readings.iter().find(|it| it.check.name == check);
    let found = found.unwrap_or_else(|| panic!("no {check} in {readings:#?}"));
    (found.status, &found.reason)
}

/// That it is the one reading, and critical, and what its failure was.
fn assert_silent<T>(seen: &Seen<T>, readings: &[Reading], stage: Stage, reason: &str) {
    let failure = seen.failure.as_ref().unwrap();
    assert_eq!(failure.stage, stage, "{failure:?}");
    assert!(failure.error.contains(reason), "{failure:?}");
    assert_eq!(readings.len(), 1, "{readings:#?}");
    assert_eq!((readings[0].status, &readings[0].reason), (Status::Critical, &failure.error));
}

/// The catalogue's limits.
struct Defaults(Thresholds, Checks);

impl Defaults {
    fn new() -> Self {
        Self(Thresholds::default(), Checks::new())
    }

    fn scale(&self) -> Scale<'_> {
        Scale { thresholds: &self.0, before: &self.1 }
    }
}

/// A directory with a password in a file.
fn password_file(password: &str) -> (TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("password");
    fs::write(&file, password).unwrap();
    (directory, file)
}

/// A port on which something listens that takes connections and says nothing.
fn silent_port() -> (std::net::TcpListener, u16) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, port)
}

// --- Patroni --------------------------------------------------------------------------------------

fn patroni_probe(url: &str) -> PatroniProbe {
    let config = PatroniConfig {
        scope: PatroniCluster::SCOPE.to_owned(),
        namespace: "/service/".to_owned(),
        rest: Vec::new(),
        ca_file: None,
    };
    PatroniProbe::new(PatroniProbe::client(&config).unwrap(), url)
}

#[tokio::test]
async fn every_patroni_says_its_role_and_what_keeps_it_from_being_in_charge() {
    if patroni_is_missing() {
        return;
    }
    let mut cluster = PatroniCluster::start(2).await;
    let mut probes = [0, 1].map(|index| patroni_probe(&cluster.rest_url(index)));
    let server = |in_recovery| PostgresFacts { in_recovery, ..PostgresFacts::default() };
    let leader = cluster.leader().await;
    for (index, probe) in probes.iter_mut().enumerate() {
        let seen = outcome(probe).await;
        let facts = seen.now().unwrap();
        assert_eq!((facts.timeline, facts.is_paused), (Some(1), false), "{facts:?}");
        assert!(facts.store_seen_ago.unwrap() < Duration::from_secs(15), "{facts:?}");
        let readings = judge::patroni::judge(&seen, Some(&server(index != leader)));
        assert!(readings.iter().all(|it| it.status == Status::Ok), "{readings:#?}");
        let readings = judge::patroni::judge(&seen, Some(&server(index == leader)));
        assert_eq!(of(&readings, "role").0, Status::Critical);
    }

    let config = format!("{}/config", cluster.rest_url(leader));
    let patch = |body: serde_json::Value| {
        reqwest::Client::new().patch(&config).body(body.to_string()).send()
    };
    let set = json!({"pause": true, "postgresql": {"parameters": {"max_connections": 90}}});
    assert!(patch(set).await.unwrap().status().is_success());
    eventually("the pause and the restart that is pending are told", LIMIT, async || {
        let seen = outcome(&mut probes[leader]).await;
        let readings = judge::patroni::judge(&seen, Some(&server(false)));
        let (status, reason) = of(&readings, "state");
        status == Status::Warning && reason.contains("paused") && reason.contains("restarted")
    })
    .await;
    assert!(patch(json!({"pause": null})).await.unwrap().status().is_success());

    let (_listener, port) = silent_port();
    let seen = outcome(&mut patroni_probe(&format!("http://127.0.0.1:{port}/patroni"))).await;
    assert_silent(&seen, &judge::patroni::judge(&seen, None), Stage::Timeout, "in time");
    cluster.kill9(1 - leader).await;
    let seen = outcome(&mut probes[1 - leader]).await;
    let readings = judge::patroni::judge(&seen, None);
    assert_silent(&seen, &readings, Stage::Refused, "no connection: Connection refused");
    let seen = outcome(&mut patroni_probe("https://127.0.0.1:1/patroni")).await;
    assert_eq!(seen.failure.unwrap().stage, Stage::Refused);
}

// --- etcd -----------------------------------------------------------------------------------------

fn etcd_config(endpoints: Vec<String>, login: Option<(&str, &Path)>) -> EtcdConfig {
    EtcdConfig {
        endpoints,
        user: login.map(|(user, _)| user.to_owned()),
        password_file: login.map(|(_, file)| file.to_owned()),
        ca_file: None,
        certificate_file: None,
        key_file: None,
    }
}

/// The members and what they said last.
struct EtcdWatch {
    probes: Vec<(Component, EtcdProbe)>,
    known: Of<EtcdFacts>,
}

impl EtcdWatch {
    fn new(config: &EtcdConfig) -> Self {
        let probes = EtcdProbe::each(config).unwrap().into_iter();
        let probes = probes.map(|(name, probe)| (Component::new(Kind::Etcd, name), probe));
        Self { probes: probes.collect(), known: Of::new() }
    }

    /// Asks all, and judges them together.
    async fn quorum(&mut self) -> (Status, String) {
        for (component, probe) in &mut self.probes {
            ask(&mut self.known, component, probe).await;
        }
        let reading = judge::etcd::judge_quorum(&self.known).unwrap();
        (reading.status, reading.reason)
    }

    /// The readings of one member.
    fn member(&self, index: usize) -> Vec<Reading> {
        let component = &self.probes[index].0;
        judge::etcd::judge(component, &self.known[component], Defaults::new().scale())
    }

    fn seen(&self, index: usize) -> &Seen<EtcdFacts> {
        &self.known[&self.probes[index].0]
    }
}

#[tokio::test]
async fn the_quorum_of_etcd_is_followed_from_whole_to_lost_and_back() {
    if etcd_is_missing() {
        return;
    }
    let mut cluster = EtcdCluster::start(3).await;
    let mut watch = EtcdWatch::new(&etcd_config(cluster.endpoints(), None));
    eventually("all agree", LIMIT, async || {
        watch.quorum().await == (Status::Ok, "all members agree on a leader, 3 of 3".to_owned())
    })
    .await;
    let leader = cluster.leader().await;
    for index in 0..3 {
        let readings = watch.member(index);
        assert!(readings.iter().all(|it| it.status == Status::Ok), "{readings:#?}");
        let role = if index == leader { "leads" } else { "follows" };
        assert!(of(&readings, "reachable").1.ends_with(role), "{readings:#?}");
    }

    cluster.kill9(leader).await;
    let expected = format!(
        "2 of 3 members agree on a leader, without etcd-{}; one more loss stops it",
        leader + 1
    );
    eventually("the others agree on a new leader", LIMIT, async || {
        watch.quorum().await == (Status::Warning, expected.clone())
    })
    .await;
    // The question before may have been under way on a connection that was kept.
    watch.quorum().await;
    assert_silent(watch.seen(leader), &watch.member(leader), Stage::Refused, "Connection refused");

    let (frozen, left) = ((leader + 1) % 3, (leader + 2) % 3);
    cluster.sigstop(frozen);
    eventually("the quorum is lost", LIMIT, async || {
        let expected = "1 of 3 members answer, and none of them has a leader";
        watch.quorum().await == (Status::Critical, expected.to_owned())
    })
    .await;
    assert_silent(watch.seen(frozen), &watch.member(frozen), Stage::Timeout, "in time");
    let readings = watch.member(left);
    assert_eq!(of(&readings, "reachable").0, Status::Ok);
    let (status, reason) = of(&readings, "health");
    assert_eq!(status, Status::Critical);
    assert!(reason.starts_with("it knows no leader"), "{reason}");

    cluster.kill9(left).await;
    let (status, reason) = watch.quorum().await;
    assert_eq!(status, Status::Critical);
    assert!(reason.starts_with("none of 3 members answers"), "{reason}");

    cluster.sigcont(frozen);
    cluster.start_member(leader);
    cluster.start_member(left);
    eventually("all agree again", LIMIT, async || watch.quorum().await.0 == Status::Ok).await;
}

#[tokio::test]
async fn an_etcd_without_room_and_one_that_wants_a_login_are_told() {
    if etcd_is_missing() {
        return;
    }
    let cluster = EtcdCluster::start_one(&["--quota-backend-bytes", "65536"]).await;
    let mut watch = EtcdWatch::new(&etcd_config(cluster.endpoints(), None));
    assert_eq!(watch.quorum().await.0, Status::Ok);
    let value = "x".repeat(20_000);
    let etcd = crate::etcd::client(cluster.endpoints());
    eventually("etcd refuses writes", LIMIT, async || {
        etcd.put("/full", &value, None).await.is_err()
    })
    .await;
    eventually("the alarm is told", LIMIT, async || {
        let (status, reason) = watch.quorum().await;
        status == Status::Critical
            && reason == "etcd refuses what would change it: NOSPACE of etcd-1"
    })
    .await;
    let readings = watch.member(0);
    let full = "its database has reached its quota (NOSPACE)";
    assert_eq!(of(&readings, "health"), (Status::Critical, full));

    let mut cluster = EtcdCluster::start(1).await;
    cluster.enable_auth().await;
    let (_right, right) = password_file("root");
    let (_wrong, wrong) = password_file("wrong");
    let mut watch = EtcdWatch::new(&etcd_config(cluster.endpoints(), Some(("root", &right))));
    assert_eq!(watch.quorum().await, (Status::Ok, "the one member leads, 1 of 1".to_owned()));
    let mut watch = EtcdWatch::new(&etcd_config(cluster.endpoints(), Some(("root", &wrong))));
    watch.quorum().await;
    assert_silent(watch.seen(0), &watch.member(0), Stage::Login, "invalid user ID or password");
}

// --- PgBouncer ------------------------------------------------------------------------------------

fn pgbouncer_probe(port: u16, password: &Path) -> PgbouncerProbe {
    let config = PgbouncerConfig {
        name: "pgbouncer-1".to_owned(),
        host: "127.0.0.1".to_owned(),
        port,
        user: PgBouncer::LOGIN.0.to_owned(),
        password_file: Some(password.to_owned()),
        database: Some("app".to_owned()),
        group: 0,
        tls: TlsMode::Disable,
        ca_file: None,
        allow_weak_auth: false,
    };
    PgbouncerProbe::new(&config, ASK_LIMIT).unwrap()
}

fn judge_pgbouncer(seen: &Seen<PgbouncerFacts>) -> Vec<Reading> {
    let component = Component::of_group(Kind::Pgbouncer, 0, "pgbouncer-1");
    judge::pgbouncer::judge(&component, seen, Defaults::new().scale())
}

/// A PostgreSQL server, and what `[databases]` says of it.
async fn behind_pgbouncer() -> (PgServer, String) {
    let server = PgServer::primary().await;
    let host = server.socket_directory().display();
    let conninfo = format!("host={host} port={} user=postgres dbname=postgres", server.port());
    (server, conninfo)
}

#[tokio::test]
async fn a_pgbouncer_as_it_comes_is_asked_and_its_faults_are_told() {
    if postgres_is_missing() || pgbouncer_is_missing() {
        return;
    }
    let (mut server, conninfo) = behind_pgbouncer().await;
    let mut bouncer = PgBouncer::start(&[("app", &conninfo)], &[]).await;
    let (_directory, password) = password_file(PgBouncer::LOGIN.1);
    let mut probe = pgbouncer_probe(bouncer.port(), &password);
    for _ in 0..3 {
        let seen = outcome(&mut probe).await;
        let readings = judge_pgbouncer(&seen);
        let statuses: Vec<_> = told(&readings).into_iter().map(|it| (it.0, it.1)).collect();
        let checks = ["reachable", "query", "waiting", "clients"];
        assert_eq!(statuses, checks.map(|it| (it, Status::Ok)), "{readings:#?}");
    }

    let (_wrong_directory, wrong) = password_file("wrong");
    let seen = outcome(&mut pgbouncer_probe(bouncer.port(), &wrong)).await;
    assert_silent(&seen, &judge_pgbouncer(&seen), Stage::Login, "refuses");

    // The primary goes down behind it: the console goes on.
    server.kill9().await;
    let seen = outcome(&mut probe).await;
    let readings = judge_pgbouncer(&seen);
    assert_eq!(of(&readings, "reachable").0, Status::Ok);
    assert_eq!(of(&readings, "query").0, Status::Critical, "{readings:#?}");
    server.start().await;
    eventually("the query goes through again", LIMIT, async || {
        let seen = outcome(&mut probe).await;
        of(&judge_pgbouncer(&seen), "query").0 == Status::Ok
    })
    .await;

    bouncer.sigstop();
    let seen = outcome(&mut probe).await;
    assert_silent(&seen, &judge_pgbouncer(&seen), Stage::Timeout, "in time");
    bouncer.sigcont();
    eventually("it answers again", LIMIT, async || outcome(&mut probe).await.failure.is_none())
        .await;

    bouncer.kill9().await;
    let seen = outcome(&mut probe).await;
    assert_silent(&seen, &judge_pgbouncer(&seen), Stage::Refused, "Connection refused");
    bouncer.start_again().await;
    let seen = outcome(&mut probe).await;
    assert!(seen.failure.is_none(), "{:?}", seen.failure);
}

/// In both modes: a probe that kept its connection in session mode would take a server for good.
#[tokio::test]
async fn a_pool_that_is_exhausted_shows_who_waits_and_the_probe_keeps_no_server() {
    if postgres_is_missing() || pgbouncer_is_missing() {
        return;
    }
    let (_server, conninfo) = behind_pgbouncer().await;
    for mode in ["session", "transaction"] {
        let settings = [("pool_mode", mode), ("default_pool_size", "1"), ("max_client_conn", "10")];
        let bouncer = PgBouncer::start(&[("app", &conninfo)], &settings).await;
        let (_directory, password) = password_file(PgBouncer::LOGIN.1);
        let mut probe = pgbouncer_probe(bouncer.port(), &password);
        for _ in 0..2 {
            let readings = judge_pgbouncer(&outcome(&mut probe).await);
            assert_eq!(of(&readings, "query").0, Status::Ok, "{readings:#?}");
        }
        let mut config = tokio_postgres::Config::new();
        let (user, password) = PgBouncer::LOGIN;
        config.host("127.0.0.1").port(bouncer.port()).user(user).password(password).dbname("app");
        let (client, connection) = config.connect(NoTls).await.unwrap();
        let mut tasks = tokio::task::JoinSet::new();
        tasks.spawn(async move { drop(connection.await) });
        let taken = timeout(LIMIT, client.simple_query("BEGIN")).await;
        taken.expect("the one server is free").unwrap();

        let readings = judge_pgbouncer(&outcome(&mut probe).await);
        let (status, reason) = of(&readings, "query");
        assert_eq!((status, reason), (Status::Critical, "no answer within 800ms"), "{mode}");
        assert_eq!(of(&readings, "reachable").0, Status::Ok);

        // Another client queues for long, and shows in the pool.
        let (other, connection) = config.connect(NoTls).await.unwrap();
        tasks.spawn(async move { drop(connection.await) });
        tasks.spawn(async move { drop(other.simple_query("SELECT 1").await) });
        eventually("the queue is told", LIMIT, async || {
            let readings = judge_pgbouncer(&outcome(&mut probe).await);
            let (status, reason) = of(&readings, "waiting");
            status == Status::Warning && reason.contains("for app as postgres, the first for")
        })
        .await;
        client.simple_query("COMMIT").await.unwrap();
        drop(client);
        eventually("the queue is gone", LIMIT, async || {
            let readings = judge_pgbouncer(&outcome(&mut probe).await);
            [of(&readings, "query").0, of(&readings, "waiting").0] == [Status::Ok; 2]
        })
        .await;
    }
}

#[tokio::test]
async fn a_pool_that_leads_to_a_standby_is_told() {
    if postgres_is_missing() || pgbouncer_is_missing() {
        return;
    }
    let primary = PgServer::primary().await;
    let standby = primary.standby("standby1").await;
    let host = standby.socket_directory().display();
    let conninfo = format!("host={host} port={} user=postgres dbname=postgres", standby.port());
    let bouncer = PgBouncer::start(&[("app", &conninfo)], &[]).await;
    let (_directory, password) = password_file(PgBouncer::LOGIN.1);
    let readings = judge_pgbouncer(&outcome(&mut pgbouncer_probe(bouncer.port(), &password)).await);
    let expected = (Status::Critical, "the pool leads to a standby, which takes no writes");
    assert_eq!(of(&readings, "query"), expected);
}

// --- HAProxy --------------------------------------------------------------------------------------

fn haproxy_probe(url: &str, password: &Path) -> HaproxyProbe {
    HaproxyProbe::new(&HaproxyConfig {
        name: "haproxy-1".to_owned(),
        url: url.to_owned(),
        user: Some(HaProxy::LOGIN.0.to_owned()),
        password_file: Some(password.to_owned()),
        ca_file: None,
        write_backend: Some("primary".to_owned()),
        read_backend: Some("replicas".to_owned()),
        group: 0,
    })
    .unwrap()
}

async fn judge_haproxy(probe: &mut HaproxyProbe) -> Vec<Reading> {
    judge::haproxy::judge(&outcome(probe).await)
}

async fn listen() -> (TcpListener, u16) {
    let listener = TcpListener::bind(("127.0.0.1", server_port())).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, port)
}

#[tokio::test]
async fn the_servers_behind_haproxy_are_counted_and_its_faults_are_told() {
    if haproxy_is_missing() {
        return;
    }
    // Who listens is up: the primary is `a`, and only `b` serves reads.
    let ((first, a), (reader, b_read)) = (listen().await, listen().await);
    let (a_read, b, c) = (server_port(), server_port(), server_port());
    let server = |name: &str, port: u16| (name.to_owned(), port, port);
    let backend = |name: &str, servers: Vec<(String, u16, u16)>| Backend {
        name: name.to_owned(),
        http_check: None,
        servers,
    };
    let backends = [
        backend("primary", vec![server("a", a), server("b", b)]),
        backend("replicas", vec![server("a", a_read), server("b", b_read)]),
    ];
    let mut haproxy = HaProxy::start(&backends).await;
    let (_directory, password) = password_file(HaProxy::LOGIN.1);
    let mut probe = haproxy_probe(&haproxy.stats_url(), &password);
    eventually("one takes writes, the other serves reads", LIMIT, async || {
        let readings = judge_haproxy(&mut probe).await;
        let found = [of(&readings, "write"), of(&readings, "read")];
        found == [(Status::Ok, "a is up"), (Status::Ok, "1 of 2 servers are up")]
    })
    .await;

    let second = TcpListener::bind(("127.0.0.1", b)).await.unwrap();
    eventually("two take writes", LIMIT, async || {
        let readings = judge_haproxy(&mut probe).await;
        of(&readings, "write") == (Status::Critical, "2 servers are up: a, b")
    })
    .await;
    drop((first, second, reader));
    eventually("none is up", LIMIT, async || {
        let readings = judge_haproxy(&mut probe).await;
        let said = "no server is up: a is DOWN (L4CON: Connection refused), b is DOWN";
        let (write, read) = (of(&readings, "write"), of(&readings, "read"));
        (write.0, read.0) == (Status::Critical, Status::Critical) && write.1.starts_with(said)
    })
    .await;

    let (_wrong_directory, wrong) = password_file("wrong");
    let seen = outcome(&mut haproxy_probe(&haproxy.stats_url(), &wrong)).await;
    assert_silent(&seen, &judge::haproxy::judge(&seen), Stage::Login, "401 Unauthorized");
    let elsewhere = haproxy.stats_url().replace("/stats", "/nothing");
    let seen = outcome(&mut haproxy_probe(&elsewhere, &password)).await;
    assert_silent(&seen, &judge::haproxy::judge(&seen), Stage::Answer, "503 Service Unavailable");
    let tls = haproxy.stats_url().replace("http://", "https://");
    let seen = outcome(&mut haproxy_probe(&tls, &password)).await;
    assert_silent(&seen, &judge::haproxy::judge(&seen), Stage::Tls, "does not speak TLS");

    haproxy.sigstop();
    let seen = outcome(&mut probe).await;
    assert_silent(&seen, &judge::haproxy::judge(&seen), Stage::Timeout, "in time");
    haproxy.sigcont();
    eventually("it answers again", LIMIT, async || outcome(&mut probe).await.failure.is_none())
        .await;
    haproxy.kill9().await;
    let seen = outcome(&mut probe).await;
    assert_silent(&seen, &judge::haproxy::judge(&seen), Stage::Refused, "Connection refused");

    let backends = [backend("other", vec![server("c", c)])];
    let haproxy = HaProxy::start(&backends).await;
    let readings = judge_haproxy(&mut haproxy_probe(&haproxy.stats_url(), &password)).await;
    assert_eq!([of(&readings, "write").0, of(&readings, "read").0], [Status::Unknown; 2]);
}

/// As it stands in front of a real cluster: the checks are Patroni's.
#[tokio::test]
async fn haproxy_follows_a_switchover() {
    if patroni_is_missing() || haproxy_is_missing() {
        return;
    }
    let cluster_size = 2;
    let mut cluster = PatroniCluster::start(cluster_size).await;
    let servers = |index: usize| {
        let rest = cluster.rest_url(index);
        let rest = rest.rsplit_once(':').unwrap().1.trim_end_matches('/').parse().unwrap();
        (cluster.name(index).to_owned(), cluster.port(index), rest)
    };
    let backend = |name: &str, path: &str| Backend {
        name: name.to_owned(),
        http_check: Some(path.to_owned()),
        servers: (0..cluster_size).map(servers).collect(),
    };
    let backends = [backend("primary", "/primary"), backend("replicas", "/replica")];
    let haproxy = HaProxy::start(&backends).await;
    let (_directory, password) = password_file(HaProxy::LOGIN.1);
    let mut probe = haproxy_probe(&haproxy.stats_url(), &password);
    let leader = cluster.leader().await;
    for leader in [leader, 1 - leader] {
        let expected = format!("{} is up", cluster.name(leader));
        eventually("the leader alone takes writes", LIMIT, async || {
            let readings = judge_haproxy(&mut probe).await;
            of(&readings, "write") == (Status::Ok, expected.as_str())
                && of(&readings, "read") == (Status::Ok, "1 of 2 servers are up")
        })
        .await;
        if cluster.leader().await == leader {
            cluster.switchover(1 - leader).await;
        }
    }
}

// --- Redis ----------------------------------------------------------------------------------------

fn redis_probe(port: u16, password: Option<&Path>) -> RedisProbe {
    let config = RedisConfig {
        name: "redis".to_owned(),
        host: "127.0.0.1".to_owned(),
        port,
        user: None,
        password_file: password.map(Path::to_owned),
    };
    RedisProbe::new(&config).unwrap()
}

fn judge_redis(seen: &Seen<RedisFacts>) -> Vec<Reading> {
    let component = Component::new(Kind::Redis, "redis");
    judge::redis::judge(&component, seen, Defaults::new().scale())
}

#[tokio::test]
async fn a_redis_is_asked_and_its_faults_are_told() {
    if redis_is_missing() {
        return;
    }
    let (_directory, password) = password_file("redis-password");
    let (_wrong_directory, wrong) = password_file("wrong");
    let options = ["--requirepass", "redis-password", "--maxmemory", "64mb"];
    let mut redis = RedisServer::start(&options).await;
    let mut probe = redis_probe(redis.port(), Some(&password));
    let readings = judge_redis(&outcome(&mut probe).await);
    let found: Vec<_> = told(&readings).into_iter().map(|it| (it.0, it.1)).collect();
    assert_eq!(found, ["reachable", "role", "memory"].map(|it| (it, Status::Ok)));

    for (password, said) in [(Some(wrong.as_path()), "WRONGPASS"), (None, "NOAUTH")] {
        let seen = outcome(&mut redis_probe(redis.port(), password)).await;
        assert_silent(&seen, &judge_redis(&seen), Stage::Login, said);
    }
    redis.sigstop();
    let seen = outcome(&mut probe).await;
    assert_silent(&seen, &judge_redis(&seen), Stage::Timeout, "in time");
    redis.sigcont();
    eventually("it answers again", LIMIT, async || outcome(&mut probe).await.failure.is_none())
        .await;

    let master = format!("127.0.0.1 {}", redis.port());
    let options = ["--replicaof", &master, "--masterauth", "redis-password"];
    let replica = RedisServer::start(&options).await;
    let mut replica_probe = redis_probe(replica.port(), None);
    eventually("the replica's link is up", LIMIT, async || {
        let readings = judge_redis(&outcome(&mut replica_probe).await);
        of(&readings, "role") == (Status::Ok, "it is a slave")
    })
    .await;

    redis.kill9().await;
    let seen = outcome(&mut probe).await;
    assert_silent(&seen, &judge_redis(&seen), Stage::Refused, "Connection refused");
    eventually("the replica's link is down", LIMIT, async || {
        let readings = judge_redis(&outcome(&mut replica_probe).await);
        of(&readings, "role").0 == Status::Warning
    })
    .await;
}

// --- the other agents, Docker, disks --------------------------------------------------------------

#[tokio::test]
async fn an_agent_is_asked_and_its_faults_are_told() {
    let reasons = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    let not_ready = reasons.clone();
    let any_port = "127.0.0.1:0".parse().unwrap();
    let admin = Admin::bind(
        any_port,
        shared::metrics::registry(),
        move || not_ready.lock().unwrap().clone(),
        || json!({"cluster": "demo"}),
    )
    .await
    .unwrap();
    let url = format!("http://{}", admin.local_address().unwrap());
    let mut tasks = Tasks::default();
    tasks.spawn("admin", |shutdown| admin.serve(shutdown));
    let probe = |url: &str| {
        AgentProbe::new(&AgentConfig { name: "agent".to_owned(), url: url.to_owned() }).unwrap()
    };
    let seen = outcome(&mut probe(&url)).await;
    assert_eq!(seen.now().unwrap().status, json!({"cluster": "demo"}));
    let expected = [("ready", Status::Ok, "it can do its work")];
    assert_eq!(told(&judge::agent::judge(&seen)), expected);

    *reasons.lock().unwrap() = vec!["group 0: no primary".to_owned()];
    let readings = judge::agent::judge(&outcome(&mut probe(&url)).await);
    let expected = [("ready", Status::Warning, "it cannot do its work: group 0: no primary")];
    assert_eq!(told(&readings), expected);

    let (_listener, port) = silent_port();
    let seen = outcome(&mut probe(&format!("http://127.0.0.1:{port}"))).await;
    assert_silent(&seen, &judge::agent::judge(&seen), Stage::Timeout, "in time");
    drop(tasks);
    eventually("it is gone", LIMIT, async || outcome(&mut probe(&url)).await.failure.is_some())
        .await;
}

/// An answer that never ends must not fill the memory.
#[tokio::test]
async fn an_answer_without_an_end_is_given_up() {
    let (listener, port) = listen().await;
    let mut tasks = tokio::task::JoinSet::new();
    tasks.spawn(async move {
        let mut connections = tokio::task::JoinSet::new();
        while let Ok((mut client, _)) = listener.accept().await {
            connections.spawn(async move {
                drop(client.read(&mut [0; 4096]).await);
                let head = b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\n\r\n";
                drop(client.write_all(head).await);
                while client.write_all(&[b'x'; 1 << 12]).await.is_ok() {}
            });
        }
    });
    let url = format!("http://127.0.0.1:{port}");
    let mut probe = AgentProbe::new(&AgentConfig { name: "agent".to_owned(), url }).unwrap();
    let seen = outcome(&mut probe).await;
    assert_silent(&seen, &judge::agent::judge(&seen), Stage::Answer, "more than 4194304 bytes");
}

/// Speaks as Docker does to who asks for services and tasks.
async fn docker(socket: &Path, status: &'static str, services: &'static str, tasks: &'static str) {
    let listener = UnixListener::bind(socket).unwrap();
    loop {
        let (mut client, _) = listener.accept().await.unwrap();
        let mut request = vec![0; 4096];
        let length = client.read(&mut request).await.unwrap();
        let request = String::from_utf8_lossy(&request[..length]).into_owned();
        let label = "label%22%3A%5B%22com.docker.stack.namespace%3Dmesh%22%5D";
        assert!(request.contains(label), "{request}");
        let body = if request.starts_with("GET /services?") { services } else { tasks };
        let length = body.len();
        let answer = format!(
            "HTTP/1.1 {status}\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}"
        );
        client.write_all(answer.as_bytes()).await.unwrap();
    }
}

#[tokio::test]
async fn the_services_of_a_stack_are_read_from_the_docker_socket() {
    let directory = tempfile::tempdir().unwrap();
    let stack = Component::new(Kind::Swarm, "mesh");
    let probe = |socket: &Path| {
        SwarmProbe::new(&SwarmConfig { socket: socket.to_owned(), stack: "mesh".to_owned() })
            .unwrap()
    };
    let socket = directory.path().join("docker.sock");
    let seen = outcome(&mut probe(&socket)).await;
    let readings = judge::swarm::judge(&stack, &seen);
    assert_eq!(seen.failure.as_ref().unwrap().stage, Stage::Dial);
    assert_eq!((&readings[0].0, readings[0].1.status), (&stack, Status::Critical));

    let services = r#"[{"ID": "s", "Spec": {"Name": "mesh_redis", "Mode": {"Replicated": {}}},
        "ServiceStatus": {"RunningTasks": 0, "DesiredTasks": 1}}]"#;
    let tasks = r#"[{"ServiceID": "s", "Status": {"Timestamp": "2026-11-21T14:00:00Z",
        "State": "rejected", "Err": "No such image"}}]"#;
    let mut servers = tokio::task::JoinSet::new();
    let path = socket.clone();
    servers.spawn(async move { docker(&path, "200 OK", services, tasks).await });
    eventually("the socket is there", LIMIT, async || socket.exists()).await;
    let readings = judge::swarm::judge(&stack, &outcome(&mut probe(&socket)).await);
    let expected = (Status::Critical, "0 of 1 tasks run: No such image");
    assert_eq!((readings[0].1.status, readings[0].1.reason.as_str()), expected);
    assert_eq!(readings[0].0, Component::new(Kind::Swarm, "redis"));

    let worker = directory.path().join("worker.sock");
    let refusal = r#"{"message": "This node is not a swarm manager."}"#;
    let path = worker.clone();
    let status = "503 Service Unavailable";
    servers.spawn(async move { docker(&path, status, refusal, refusal).await });
    eventually("the socket is there", LIMIT, async || worker.exists()).await;
    let failure = outcome(&mut probe(&worker)).await.failure.unwrap();
    assert_eq!(failure.stage, Stage::Answer);
    assert!(failure.error.contains("not a swarm manager"), "{failure:?}");
}

#[tokio::test]
async fn a_disk_that_is_not_there_is_told() {
    let component = Component::new(Kind::Disk, "none");
    let began_at = Instant::now();
    let nowhere = DiskConfig { name: "none".to_owned(), path: PathBuf::from("/nonexistent") };
    let seen = outcome(&mut DiskProbe::new(&nowhere)).await;
    let readings = judge::disk::judge(&component, &seen, Defaults::new().scale());
    assert_silent(&seen, &readings, Stage::Answer, "/nonexistent: No such file or directory");
    assert!(began_at.elapsed() < ASK_LIMIT);
}
