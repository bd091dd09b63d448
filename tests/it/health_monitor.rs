//! The running health monitor: what it says, and how soon.

use std::path::{Path, PathBuf};
use std::time::Duration;

use chrono::{DateTime, Utc};
use harness::postgres::{Mode, postgres_is_missing};
use harness::{Agent, Finished, PgServer, RunningAgent, directory, eventually, server_port, skip};
use serde_json::Value;
use tempfile::TempDir;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use crate::exporter::{node, piped, server};
use crate::scene::write;

const LIMIT: Duration = Duration::from_secs(30);
/// What a client and the monitor may differ in, about when nobody took writes.
const AGREEMENT: f64 = 0.5;

/// A health monitor with its configuration.
struct Monitor {
    directory: TempDir,
    port: u16,
    agent: Option<RunningAgent>,
    client: reqwest::Client,
}

impl Monitor {
    /// For these servers, as the superuser.
    fn configured(nodes: &[String]) -> Self {
        let client = reqwest::Client::builder().no_proxy().timeout(LIMIT).build().unwrap();
        let monitor = Self { directory: directory(), port: server_port(), agent: None, client };
        let (port, nodes) = (monitor.port, nodes.concat());
        let text = format!(
            "cluster = \"tests\"\nadmin_address = \"127.0.0.1:{port}\"\n\
             [postgres]\nuser = \"postgres\"\ntls = \"disable\"\n{nodes}"
        );
        write(&monitor.config(), &text);
        monitor
    }

    /// Starts it, and waits until it has asked everything.
    async fn start(nodes: &[String]) -> Self {
        let mut monitor = Self::configured(nodes);
        monitor.agent = Some(Agent::health_monitor(&monitor.config()).spawn(&["run"]));
        let url = monitor.url("/readyz");
        eventually("the monitor is ready", LIMIT, async || {
            let answer = monitor.client.get(&url).send().await;
            answer.is_ok_and(|answer| answer.status().is_success())
        })
        .await;
        monitor
    }

    fn config(&self) -> PathBuf {
        self.directory.path().join("health-monitor.toml")
    }

    fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.port)
    }

    async fn command(&self, arguments: &[&str]) -> Finished {
        Agent::health_monitor(&self.config()).run(arguments).await
    }

    async fn get(&self, path: &str) -> String {
        let answer = self.client.get(self.url(path)).send().await.unwrap();
        answer.error_for_status().unwrap().text().await.unwrap()
    }

    async fn status(&self) -> Value {
        serde_json::from_str(&self.get("/status").await).unwrap()
    }

    /// What is not ok: kind, name and check of each.
    async fn wrong(&self) -> Vec<(String, String, String)> {
        let status = self.status().await;
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let mut wrong = Vec::new();
        for one in status["components"].as_array().unwrap() {
            for check in one["checks"].as_array().unwrap() {
                if check["status"] != "ok" {
                    let component = &one["component"];
                    let name = text(&check["reading"]["check"]);
                    wrong.push((text(&component["kind"]), text(&component["name"]), name));
                }
            }
        }
        wrong
    }

    /// Waits until exactly this is not ok; returns when that was seen.
    async fn until_wrong(&self, expected: &[(&str, &str, &str)]) -> DateTime<Utc> {
        let own = |it: &(&str, &str, &str)| (it.0.to_owned(), it.1.to_owned(), it.2.to_owned());
        let expected: Vec<_> = expected.iter().map(own).collect();
        let deadline = Instant::now() + LIMIT;
        loop {
            let wrong = self.wrong().await;
            if wrong == expected {
                return Utc::now();
            }
            let log = self.agent.as_ref().unwrap().stdout();
            assert!(Instant::now() < deadline, "{wrong:?} is wrong, not {expected:?}\n{log}");
            sleep(Duration::from_millis(50)).await;
        }
    }
}

async fn pair() -> (PgServer, PgServer) {
    // What the harness turns off to be fast would be told.
    let durable = ("fsync", "on");
    let primary = PgServer::builder().setting(durable.0, durable.1).primary().await;
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

#[tokio::test]
async fn a_lost_primary_is_told_at_once_and_what_it_cost_agrees_with_a_client() {
    if postgres_is_missing() {
        return;
    }
    let (mut primary, mut standby) = pair().await;
    let monitor = Monitor::start(&[server(&primary), server(&standby)]).await;
    monitor.until_wrong(&[]).await;
    let writes = write_until_it_fails(&primary);
    let killed = async {
        sleep(Duration::from_secs(2)).await;
        primary.kill9().await;
    };
    let (last, ()) = tokio::join!(writes, killed);
    let down = [
        ("group", "", "primary"),
        ("group", "", "redundancy"),
        ("postgres", "primary", "reachable"),
    ];
    let noticed = monitor.until_wrong(&down).await - last;
    // Twice the interval, and what this machine needs under load.
    assert!(noticed.num_milliseconds() < 5000, "noticed after {noticed}");

    standby.promote().await;
    let first = write_until_it_works(&standby).await;
    monitor.until_wrong(&[("group", "", "redundancy"), ("postgres", "primary", "reachable")]).await;
    let status = monitor.status().await;
    let events = status["events"].as_array().unwrap();
    let failovers: Vec<_> = events.iter().filter(|it| it["event"] == "failover").collect();
    assert_eq!(failovers.len(), 1, "{failovers:?}");
    let said = |key: &str| failovers[0][key].as_f64().unwrap();
    let (at_least, at_most) =
        (said("unavailable_at_least_seconds"), said("unavailable_at_most_seconds"));
    let measured = (first - last).as_seconds_f64();
    assert!(
        at_least - AGREEMENT <= measured && measured <= at_most + AGREEMENT,
        "a client measured {measured}, the monitor {at_least} to {at_most}"
    );
    // An interval at each end.
    assert!(at_most - at_least < 2.0 + 2.0 * AGREEMENT, "{at_least} to {at_most}");
    let names = [&failovers[0]["old"]["name"], &failovers[0]["new"]["name"]];
    assert_eq!(names, ["primary", "standby"]);
    standby.stop(Mode::Immediate).await;
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

#[tokio::test]
async fn a_standby_that_hangs_is_told_and_nothing_else_turns_red() {
    if postgres_is_missing() {
        return;
    }
    let (primary, standby) = pair().await;
    let monitor = Monitor::start(&[server(&primary), server(&standby)]).await;
    monitor.until_wrong(&[]).await;
    standby.sigstop();
    monitor.until_wrong(&[("postgres", "standby", "reachable")]).await;
    let status = monitor.status().await;
    assert_eq!(status["verdict"]["status"], "warning", "{}", status["verdict"]);
    let roles: Vec<_> = status["nodes"].as_array().unwrap().iter().map(|it| &it["role"]).collect();
    assert_eq!(roles, ["primary", "unknown"]);
    standby.sigcont();
    monitor.until_wrong(&[]).await;
    let agent = monitor.agent.unwrap().terminate().await;
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
    let monitor = Monitor::configured(&[server(&primary), server(&standby)]);
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
    let monitor = Monitor::start(&[server(&primary), server(&standby), dead]).await;
    let missing = [("group", "", "redundancy"), ("postgres", "dead", "reachable")];
    monitor.until_wrong(&missing).await;
    let request = monitor.client.get(monitor.url("/metrics"));
    let answer = request.header("accept", "text/plain;version=0.0.4").send().await.unwrap();
    let text = answer.text().await.unwrap();
    let checked = piped(&directory(), "/usr/bin/promtool check metrics", &text).await;
    checked.assert_success();
    assert_eq!((checked.stdout.as_str(), checked.stderr.as_str()), ("", ""), "{text}");
    assert!(text.contains("pgmesh_health_cluster_status{cluster=\"tests\"} 1"), "{text}");
    // Of a server that does not answer nothing is said to be well.
    let dead: Vec<_> = text.lines().filter(|it| it.contains("node=\"dead\"")).collect();
    assert!(dead.iter().any(|it| it.contains("check=\"reachable\"") && it.ends_with(" 2.0")));
    assert!(!dead.iter().any(|it| it.contains("check_status") && it.ends_with(" 0.0")), "{dead:?}");
}
