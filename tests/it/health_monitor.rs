//! The running health monitor: what it says, and how soon.

use std::path::Path;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use harness::postgres::postgres_is_missing;
use harness::{PgServer, directory, eventually, server_port, skip};
use serde_json::Value;
use tokio::task::JoinSet;
use tokio::time::sleep;

use crate::exporter::{node, piped, server};
use crate::monitor::Monitor;
use crate::scene::write;

/// What a client and the monitor may differ in, about for how long nobody took writes.
const AGREEMENT: f64 = 0.5;
/// So soon the loss of a primary counts, at the interval that is the default.
const NOTICED_WITHIN: TimeDelta = TimeDelta::seconds(2);

async fn pair() -> (PgServer, PgServer) {
    // What the harness turns off to be fast would be told.
    let durable = ("fsync", "on");
    let builder = PgServer::builder().setting(durable.0, durable.1);
    // For pg_rewind.
    let primary = builder.setting("wal_keep_size", "64MB").primary().await;
    primary.psql("CREATE TABLE marks (at timestamptz DEFAULT clock_timestamp())").await;
    let standby = primary.standby_with("standby", &[durable]).await;
    standby.catch_up(&primary).await;
    (primary, standby)
}

/// Tries to commit every 20 ms; returns when the first commit was acknowledged.
async fn write_until_it_works(server: &PgServer) -> DateTime<Utc> {
    loop {
        let client = server.connect().await;
        if client.execute("INSERT INTO marks DEFAULT VALUES", &[]).await.is_ok() {
            return Utc::now();
        }
        sleep(Duration::from_millis(20)).await;
    }
}

/// With `PGMESH_TEST_FAILOVERS` as often as that says.
#[tokio::test]
async fn a_lost_primary_is_told_at_once_and_what_it_cost_agrees_with_a_client() {
    if postgres_is_missing() {
        return;
    }
    let count = std::env::var("PGMESH_TEST_FAILOVERS").map_or(2, |it| it.parse().unwrap());
    let (mut old, mut new) = pair().await;
    let mut monitor = Monitor::of_servers(&[server(&old), server(&new)]);
    for _ in 0..count {
        // Anew each time: a primary that is lost again and again flaps.
        monitor = monitor.started().await;
        monitor.until_wrong(&[]).await;
        fail_over(&monitor, &mut old, &new).await;
        old.rejoin(&new).await;
        std::mem::swap(&mut old, &mut new);
        monitor.terminate().await.assert_success();
    }
}

#[expect(clippy::print_stdout, reason = "what was measured is worth to be read")]
async fn fail_over(monitor: &Monitor, old: &mut PgServer, new: &PgServer) {
    let writes = write_until_it_fails(old);
    let killed = async {
        sleep(Duration::from_secs(2)).await;
        old.kill9().await;
    };
    let (last_written, ()) = tokio::join!(writes, killed);
    let reachable = format!("postgres {} reachable critical", old.name());
    let down = ["group 0 primary critical", "group 0 redundancy unknown", &reachable];
    monitor.until_wrong(&down).await;
    let events = monitor.events().await;
    let lost = events.iter().find(|it| it["check"] == "primary").unwrap();
    let noticed = lost["at"].as_str().unwrap().parse::<DateTime<Utc>>().unwrap() - last_written;
    assert!(noticed <= NOTICED_WITHIN, "noticed after {noticed}");

    let ((), written_again) = tokio::join!(new.promote(), write_until_it_works(new));
    monitor.until_wrong(&["group 0 redundancy critical", &reachable]).await;
    let events = monitor.events().await;
    let failovers: Vec<_> = events.iter().filter(|it| it["event"] == "failover").collect();
    assert_eq!(failovers.len(), 1, "{failovers:?}");
    assert_eq!(failovers[0]["old"]["name"], old.name());
    assert_eq!(failovers[0]["new"]["name"], new.name());
    let said = |key: &str| failovers[0][key].as_f64().unwrap();
    let at_least = said("unavailable_at_least_seconds");
    let at_most = said("unavailable_at_most_seconds");
    let measured = (written_again - last_written).as_seconds_f64();
    println!(
        "noticed after {} ms; unavailable: the client {measured:.2} s, the monitor {at_least:.2} to \
         {at_most:.2} s",
        noticed.num_milliseconds()
    );
    for bound in [at_least, at_most] {
        assert!(
            (bound - measured).abs() <= AGREEMENT,
            "a client measured {measured}, the monitor {at_least} to {at_most}"
        );
    }
}

/// Commits every 20 ms until that fails; tells when the last commit was acknowledged. It borrows nothing,
/// so that the server can be killed meanwhile.
fn write_until_it_fails(server: &PgServer) -> impl Future<Output = DateTime<Utc>> + use<> {
    let conninfo = server.conninfo("client");
    async move {
        let (client, connection) =
            tokio_postgres::connect(&conninfo, tokio_postgres::NoTls).await.unwrap();
        let mut driver = JoinSet::new();
        driver.spawn(connection);
        let mut last = Utc::now();
        while client.execute("INSERT INTO marks DEFAULT VALUES", &[]).await.is_ok() {
            last = Utc::now();
            sleep(Duration::from_millis(20)).await;
        }
        last
    }
}

/// Whose connections do not end.
#[tokio::test]
async fn a_primary_that_hangs_is_told_as_soon_as_one_that_is_lost() {
    if postgres_is_missing() {
        return;
    }
    let (primary, standby) = pair().await;
    let monitor = Monitor::of_servers(&[server(&primary), server(&standby)]).started().await;
    for _ in 0..2 {
        hang(&monitor, &primary, NOTICED_WITHIN).await;
    }
}

/// Of whom no other server says that it is gone.
#[tokio::test]
async fn a_primary_that_stands_alone_and_hangs_is_told_as_soon() {
    if postgres_is_missing() {
        return;
    }
    let primary = PgServer::builder().setting("fsync", "on").primary().await;
    let monitor = Monitor::of_servers(&[server(&primary)]).started().await;
    // Between two questions, at different moments, and once it is known for the primary.
    for moment in [1500, 170] {
        sleep(Duration::from_millis(moment)).await;
        // 1.85 s by the pace of its questions, which leaves a machine at work no room below 2 s.
        hang(&monitor, &primary, NOTICED_WITHIN * 2).await;
    }
}

/// Freezes a primary until it is missed, and waits until all is well again.
#[expect(clippy::print_stdout, reason = "what was measured is worth to be read")]
async fn hang(monitor: &Monitor, primary: &PgServer, within: TimeDelta) {
    monitor.until_wrong(&[]).await;
    primary.sigstop();
    let stopped_at = Utc::now();
    let mut lost_at = None;
    eventually("the primary is missed", Duration::from_secs(10), async || {
        let events = monitor.events().await;
        let of_primary = |it: &&Value| it["check"] == "primary" && it["to"] == "critical";
        let at = events.iter().find(of_primary).map(|it| it["at"].as_str().unwrap().parse());
        lost_at = at.map(Result::<DateTime<Utc>, _>::unwrap).filter(|it| stopped_at < *it);
        lost_at.is_some()
    })
    .await;
    primary.sigcont();
    let noticed = lost_at.unwrap() - stopped_at;
    println!("a primary that hangs was noticed after {} ms", noticed.num_milliseconds());
    assert!(noticed <= within, "noticed after {noticed}");
    monitor.until_wrong(&[]).await;
}

#[tokio::test]
async fn a_standby_that_hangs_is_told_and_nothing_else_turns_red() {
    if postgres_is_missing() {
        return;
    }
    let (primary, standby) = pair().await;
    let mut monitor = Monitor::of_servers(&[server(&primary), server(&standby)]).started().await;
    monitor.until_wrong(&[]).await;
    standby.sigstop();
    monitor.until_wrong(&["postgres standby reachable critical"]).await;
    let status = monitor.status().await;
    assert_eq!(status["verdict"]["status"], "warning", "{}", status["verdict"]);
    let roles: Vec<_> = status["nodes"].as_array().unwrap().iter().map(|it| &it["role"]).collect();
    assert_eq!(roles, ["primary", "unknown"]);
    standby.sigcont();
    monitor.until_wrong(&[]).await;
    let agent = monitor.terminate().await;
    agent.assert_success();
    let expected = ["check changed"];
    assert_eq!(agent.unexpected_log_lines(&expected), Vec::<&str>::new());
}

#[tokio::test]
async fn check_says_it_once_for_people_programs_and_plugins() {
    if postgres_is_missing() {
        return;
    }
    let (primary, mut standby) = pair().await;
    let monitor = Monitor::of_servers(&[server(&primary), server(&standby)]);
    let well = monitor.command(&["check", "--level", "comprehensive"]).await;
    well.assert_code(0);
    assert!(!well.stdout.contains("CRITICAL") && well.stdout.contains(" ok\n"), "{}", well.stdout);
    let plugin = monitor.command(&["check", "--format", "nagios"]).await;
    plugin.assert_code(0);
    assert!(plugin.stdout.starts_with("HEALTH OK: "), "{}", plugin.stdout);
    assert!(plugin.stdout.contains(" | 'postgres primary of group 0 connections used'="));

    standby.kill9().await;
    let text = monitor.command(&["check"]).await;
    text.assert_code(2);
    assert!(text.stdout.contains("What to do\n"), "{}", text.stdout);
    let json = monitor.command(&["check", "--level", "basic", "--format", "json"]).await;
    json.assert_code(2);
    let json: Value = serde_json::from_str(&json.stdout).unwrap();
    let reachable = json["checks"].as_array().unwrap().iter().find(|it| it["check"] == "reachable");
    assert_eq!(reachable.unwrap()["status"], "critical", "the worst comes first");
    let other = ["check", "--level", "basic", "--component", "primary"];
    monitor.command(&other).await.assert_code(0);
    monitor.command(&["check", "--component", "nobody"]).await.assert_code(3);
    monitor.command(&["check", "--component"]).await.assert_code(3);
    monitor.command(&["nothing"]).await.assert_code(2);

    write(&monitor.config(), "cluster = 1");
    let broken = monitor.command(&["check", "--format", "nagios"]).await;
    broken.assert_code(3);
    assert!(broken.stdout.starts_with("HEALTH UNKNOWN: "), "{}", broken.stdout);
    monitor.command(&["check-config"]).await.assert_code(1);
}

#[tokio::test]
async fn promtool_has_nothing_to_say_about_the_monitor() {
    if postgres_is_missing() {
        return;
    }
    if !Path::new("/usr/bin/promtool").exists() {
        skip("promtool is not installed");
        return;
    }
    let (primary, standby) = pair().await;
    let dead = node("dead", "127.0.0.1", server_port());
    let monitor = Monitor::of_servers(&[server(&primary), server(&standby), dead]).started().await;
    let missing = ["group 0 redundancy warning", "postgres dead reachable critical"];
    monitor.until_wrong(&missing).await;
    let text = monitor.metrics().await;
    let checked = piped(&directory(), "/usr/bin/promtool check metrics", &text).await;
    checked.assert_success();
    assert_eq!((checked.stdout.as_str(), checked.stderr.as_str()), ("", ""), "{text}");
    assert!(text.contains("pgmesh_health_cluster_status{cluster=\"tests\"} 1"), "{text}");
    // Of a server that does not answer nothing is said to be well.
    let dead: Vec<_> = text.lines().filter(|it| it.contains("node=\"dead\"")).collect();
    assert!(dead.iter().any(|it| it.contains("check=\"reachable\"") && it.ends_with(" 2.0")));
    assert!(!dead.iter().any(|it| it.contains("check_status") && it.ends_with(" 0.0")), "{dead:?}");
}
