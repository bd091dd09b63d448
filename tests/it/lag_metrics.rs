//! What the lag exporter is to Prometheus, to PostgreSQL's permissions, and on the command line.

use std::path::Path;
use std::time::Duration;

use harness::postgres::postgres_is_missing;
use harness::{PgServer, directory, eventually, program, server_port, skip};
use serde_json::Value;
use tokio::time::{Instant, sleep};

use crate::exporter::{Exporter, LIMIT, Scrape, node, piped, server};
use crate::scene::write;

/// One that keeps WAL for a standby, with somebody connected and a slot nobody uses.
async fn pair() -> (PgServer, PgServer) {
    let primary = PgServer::builder()
        .setting("archive_mode", "on")
        .setting("archive_command", "true")
        .primary()
        .await;
    primary.psql("SELECT pg_create_physical_replication_slot('unused', true)").await;
    primary.psql("CREATE TABLE t AS SELECT generate_series(1, 1000)").await;
    let standby = primary.standby("standby").await;
    standby.catch_up(&primary).await;
    (primary, standby)
}

/// A role that can log in; `grants` follow.
async fn role(primary: &PgServer, standby: &PgServer, name: &str, grants: &str) {
    primary.psql(&format!("CREATE ROLE {name} LOGIN; {grants}")).await;
    standby.catch_up(primary).await;
}

/// Behind one address, by the name that a receiver has unless somebody gives it one.
#[tokio::test]
async fn two_standbys_of_one_name_count_as_two() {
    if postgres_is_missing() {
        return;
    }
    let primary = PgServer::builder().name("a").primary().await;
    let mut nodes = server(&primary);
    let mut standbys = Vec::new();
    for name in ["b", "c"] {
        let standby = primary.standby("walreceiver").await;
        nodes += &node(name, &standby.socket_directory().display().to_string(), standby.port());
        standbys.push(standby);
    }
    let counted = "SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'";
    eventually("both stream", LIMIT, async || primary.psql(counted).await == "2").await;
    primary.set("synchronous_standby_names", "ANY 2 (*)").await;
    // It is not asked for before the reload.
    sleep(Duration::from_millis(500)).await;
    let mut exporter = Exporter::configured("postgres", &nodes, "");
    exporter.run().await;
    let is_told = |it: &Scrape| it.values("sender_state", &[]).len() > 1;
    let scrape = exporter.until("both are told", LIMIT, is_told).await;
    let streaming = scrape.values("sender_state", &[("state", "streaming")]);
    assert_eq!(streaming, [1.0, 1.0], "{}", scrape.text);
    // One of them might be dead.
    assert_ne!(scrape.value("group_sync_quorum_met", &[]), Some(0.0), "{}", scrape.text);
    primary.psql("CREATE TABLE t (i int)").await;
}

fn is_missing(program: &str) -> bool {
    let is_missing = !Path::new(program).exists();
    if is_missing {
        skip(&format!("{program} is not installed"));
    }
    is_missing
}

#[tokio::test]
async fn promtool_has_nothing_to_say() {
    if postgres_is_missing() || is_missing("/usr/bin/promtool") {
        return;
    }
    let (primary, standby) = pair().await;
    let extra = "compat = \"postgres_exporter\"\n";
    let dead = node("dead", "127.0.0.1", server_port());
    let nodes = [server(&primary), server(&standby), dead].concat();
    let mut exporter = Exporter::configured("postgres", &nodes, extra);
    exporter.run().await;
    let scrape = exporter.until("all is there", LIMIT, |it| {
        it.value("slot_active", &[("slot", "unused")]).is_some()
            && !it.values("sender_state", &[]).is_empty()
    });
    let text = scrape.await.text;
    let checked = piped(&directory(), "/usr/bin/promtool check metrics", &text).await;
    checked.assert_success();
    assert_eq!((checked.stdout.as_str(), checked.stderr.as_str()), ("", ""), "{text}");
}

fn client() -> reqwest::Client {
    reqwest::Client::builder().no_proxy().timeout(LIMIT).build().unwrap()
}

/// What Prometheus answers to a request; nothing if it does not.
async fn answer(request: reqwest::RequestBuilder) -> Value {
    let Ok(answer) = request.send().await else { return Value::Null };
    serde_json::from_str(&answer.text().await.unwrap()).unwrap_or_default()
}

/// What Prometheus answers to a query: the value of each series.
async fn query(port: u16, query: &str) -> Vec<f64> {
    let url = format!("http://127.0.0.1:{port}/api/v1/query");
    let request = client().post(url).header("content-type", "application/x-www-form-urlencoded");
    let answer = answer(request.body(format!("query={query}"))).await;
    let series = answer["data"]["result"].as_array().cloned().unwrap_or_default();
    series.iter().map(|it| it["value"][1].as_str().unwrap().parse().unwrap()).collect()
}

#[tokio::test]
async fn prometheus_scrapes_it_without_a_warning() {
    if postgres_is_missing() || is_missing("/usr/bin/prometheus") {
        return;
    }
    let (primary, standby) = pair().await;
    let exporter = Exporter::start(&[server(&primary), server(&standby)]).await;
    let (directory, port) = (directory(), server_port());
    let config = directory.path().join("prometheus.yml");
    let target = exporter.address();
    write(
        &config,
        &format!(
            "global:\n  scrape_interval: 1s\n  scrape_timeout: 1s\nscrape_configs:\n\
             - job_name: lag\n  static_configs:\n  - targets: ['{target}']\n"
        ),
    );
    let log = directory.path().join("log");
    write(&log, "");
    let file = std::fs::File::options().append(true).open(&log).unwrap();
    let mut prometheus = program::command("/usr/bin/prometheus");
    prometheus
        .arg(format!("--config.file={}", config.display()))
        .arg(format!("--storage.tsdb.path={}", directory.path().join("data").display()))
        .arg(format!("--web.listen-address=127.0.0.1:{port}"))
        .stdin(std::process::Stdio::null())
        .stdout(file.try_clone().unwrap())
        .stderr(file)
        .kill_on_drop(true);
    let mut prometheus = prometheus.spawn().unwrap();
    eventually("Prometheus has scraped five times", LIMIT, async || {
        query(port, "count_over_time(up[1m])").await.first().is_some_and(|it| 5.0 <= *it)
    })
    .await;
    let url = format!("http://127.0.0.1:{port}/api/v1/status/buildinfo");
    let built = answer(client().get(url)).await;
    let version = built["data"]["version"].as_str().unwrap();
    let mut numbers = version.split('.').map(|it| it.parse::<u32>().unwrap_or(0));
    let version = (version, numbers.next().unwrap(), numbers.next().unwrap());
    println!("Prometheus {}", version.0);
    assert!((2, 53) <= (version.1, version.2), "{version:?}");
    for (expression, expected) in [
        ("min_over_time(up[1m])", vec![1.0]),
        ("pgmesh_lag_replay_lag_seconds{node=\"standby\"}", vec![0.0]),
        ("pgmesh_lag_lag_state{state=\"caught_up\"}", vec![1.0]),
        ("count(pgmesh_lag_target_up == 1)", vec![2.0]),
        ("count(pgmesh_lag_target_poll_duration_seconds_bucket)", vec![14.0]),
        ("increase(pgmesh_lag_dropped_series_total[1m])", vec![0.0]),
    ] {
        let escaped = expression.replace('=', "%3D").replace('+', "%2B");
        assert_eq!(query(port, &escaped).await, expected, "{expression}");
    }
    prometheus.kill().await.unwrap();
    let log = std::fs::read_to_string(&log).unwrap();
    let bad = log.lines().filter(|it| it.contains("level=warn") || it.contains("level=error"));
    assert_eq!(bad.collect::<Vec<_>>(), Vec::<&str>::new());
    assert!(log.contains("level=info"), "no log: {log}");
}

/// Series that a role with `pg_monitor` gets; the first three nobody gets without it.
const FOR_MONITORS: [(&str, &str); 5] = [
    ("wal_receiver_last_message_age_seconds", "standby"),
    ("sender_state", "primary"),
    ("sender_reply_age_seconds", "primary"),
    ("archiver_archived_total", "primary"),
    ("recovery_conflicts_total", "standby"),
];

#[tokio::test]
async fn pg_monitor_is_enough() {
    if postgres_is_missing() {
        return;
    }
    let (primary, standby) = pair().await;
    role(&primary, &standby, "lag", "GRANT pg_monitor TO lag").await;
    // So that the first sample is not the first thing that is known. A file's time is cut to whole seconds,
    // and must not be before the server's start.
    sleep(Duration::from_secs(1)).await;
    primary.psql("SELECT pg_switch_wal()").await;
    sleep(Duration::from_secs(5)).await;
    primary.psql("INSERT INTO t VALUES (1)").await;
    let nodes = [server(&primary), server(&standby)].concat();
    let mut exporter = Exporter::configured("lag", &nodes, "");
    let started_at = Instant::now();
    exporter.run().await;
    let scrape = exporter.until("all is there", LIMIT, |it| {
        let is_there =
            |(name, node): &(&str, &str)| !it.values(name, &[("node", *node)]).is_empty();
        FOR_MONITORS.iter().all(is_there) && it.state("standby") == Some("caught_up")
    });
    let scrape = scrape.await;
    let streaming = [("node", "standby"), ("state", "streaming")];
    assert_eq!(scrape.value("wal_receiver_state", &streaming), Some(1.0));
    assert_eq!(scrape.value("slot_active", &[("slot", "unused")]), Some(0.0));
    // From the files' times, which are whole seconds.
    let own = started_at.elapsed().as_secs_f64();
    assert!(scrape.value("history_seconds", &[]) > Some(own + 1.0), "{}", scrape.text);
    let finished = exporter.stop().await;
    let unexpected = finished.unexpected_log_lines(&[]);
    assert!(unexpected.is_empty(), "{unexpected:?}");
}

#[tokio::test]
async fn without_pg_monitor_nothing_is_made_up() {
    if postgres_is_missing() {
        return;
    }
    let (primary, standby) = pair().await;
    role(&primary, &standby, "lag", "").await;
    primary.set("synchronous_standby_names", "standby").await;
    let nodes = [server(&primary), server(&standby)].concat();
    let mut exporter = Exporter::configured("lag", &nodes, "");
    exporter.run().await;
    let scrape = exporter
        .until("the slots were read", LIMIT, |it| !it.values("slot_active", &[]).is_empty())
        .await;
    for (name, node) in &FOR_MONITORS[..3] {
        assert_eq!(scrape.values(name, &[("node", node)]), Vec::<f64>::new(), "{name}");
    }
    // Nor whether commits hang, which they do not.
    assert_eq!(scrape.value("group_sync_quorum_met", &[]), None);
    // Nor whether it is on the primary's timeline.
    assert_eq!(scrape.state("standby"), Some("unknown"));
    // The receiver streams, which this role may not know.
    let is_other = [("node", "standby"), ("state", "other")];
    assert_eq!(scrape.value("wal_receiver_state", &is_other), Some(1.0));
    assert_eq!(scrape.of("target_up", "standby"), Some(1.0));
    // Positions are for everybody.
    assert!(scrape.of("wal_lsn_bytes", "standby").is_some());
    // It is told once of each server, not again on each connection.
    let lost = |it: &Scrape| {
        let nodes = ["primary", "standby"].map(|node| [("node", node), ("stage", "dial")]);
        nodes.iter().all(|labels| it.value("target_errors_total", labels) == Some(1.0))
    };
    sleep(Duration::from_secs(2)).await;
    for server in [&primary, &standby] {
        let terminate = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity";
        server.psql(&format!("{terminate} WHERE usename = 'lag'")).await;
    }
    exporter.until("the sessions were replaced", LIMIT, lost).await;
    sleep(Duration::from_secs(2)).await;
    assert_eq!(exporter.scrape().await.of("target_up", "standby"), Some(1.0));
    let finished = exporter.stop().await;
    assert_eq!(finished.stdout.matches("GRANT pg_monitor").count(), 2, "{finished}");
}

#[tokio::test]
async fn commands_say_by_their_exit_code_what_is_the_matter() {
    if postgres_is_missing() {
        return;
    }
    let (primary, mut standby) = pair().await;
    let nodes = [server(&primary), server(&standby)].concat();
    let mut exporter = Exporter::configured("postgres", &nodes, "");
    exporter.command(&["check-config"]).await.assert_success();

    // By itself, and from the agent that runs.
    let shown = exporter.command(&["show"]).await;
    shown.assert_success();
    assert!(shown.stdout.contains("asked just now"), "{shown}");
    exporter.run().await;
    exporter.state("standby", "caught_up").await;
    let shown = exporter.command(&["show"]).await;
    shown.assert_success();
    assert!(shown.stdout.contains("as the agent at"), "{shown}");
    for name in ["primary", "standby"] {
        let of_node = |it: &&str| it.split_whitespace().nth(1) == Some(name);
        assert_eq!(shown.stdout.lines().filter(of_node).count(), 1, "{shown}");
    }
    let shown = exporter.command(&["show", "--json"]).await;
    let status: Value = serde_json::from_str(&shown.assert_success().stdout).unwrap();
    assert_eq!(status["groups"][0]["primary"], "primary", "{status:#}");
    assert_eq!(status["groups"][0]["nodes"][1]["lag"]["state"], "caught_up", "{status:#}");

    standby.stop(harness::Mode::Fast).await;
    exporter.state("standby", "unreachable").await;
    for arguments in [&["show"][..], &["show", "--json"], &["show", "--direct"]] {
        let shown = exporter.command(arguments).await;
        shown.assert_code(1);
        assert!(shown.stderr.contains("the lag of standby"), "{shown}");
        let text = if arguments.contains(&"--json") { "unreachable" } else { "NO ANSWER" };
        assert!(shown.stdout.contains(text), "{shown}");
    }
    exporter.stop().await;

    for (extra, topology, text) in [
        ("", format!("surplus = 1\n{nodes}"), "surplus"),
        ("state_directory = \"/nowhere\"\n", nodes.clone(), "state_directory"),
        ("state_directory = \"/proc\"\n", nodes.clone(), "state_directory"),
        ("history = \"500years\"\n", nodes.clone(), "history"),
        ("", node("a", "127.0.0.1:5432", 5432), "nodes[0].host"),
        ("", String::new(), "nodes: must list at least one server"),
    ] {
        let exporter = Exporter::configured("postgres", &topology, extra);
        let checked = exporter.command(&["check-config"]).await;
        checked.assert_code(1);
        assert!(checked.stderr.contains(text), "{checked}");
    }
    let unknown = exporter.command(&["display"]).await;
    unknown.assert_code(2);
}
