//! A running health monitor, and what it says is wrong.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use harness::{Agent, Finished, RunningAgent, directory, eventually, server_port};
use serde_json::Value;
use tempfile::TempDir;
use tokio::time::{Instant, sleep};

use crate::scene::write;

/// Longest wait for what should follow within seconds.
pub(crate) const LIMIT: Duration = Duration::from_secs(30);

/// What is not ok, as in `postgres standby reachable critical` and `group 0 primary critical`.
pub(crate) type Wrong = BTreeSet<String>;

/// A health monitor with its configuration.
#[derive(Debug)]
pub(crate) struct Monitor {
    directory: TempDir,
    port: u16,
    agent: Option<RunningAgent>,
    client: reqwest::Client,
}

impl Monitor {
    /// With these keys outside of tables, and these tables.
    pub(crate) fn configured(keys: &str, tables: &str) -> Self {
        let client = reqwest::Client::builder().no_proxy().timeout(LIMIT).build().unwrap();
        let monitor = Self { directory: directory(), port: server_port(), agent: None, client };
        let port = monitor.port;
        let text =
            format!("cluster = \"tests\"\nadmin_address = \"127.0.0.1:{port}\"\n{keys}{tables}");
        write(&monitor.config(), &text);
        monitor
    }

    /// For these servers, as the superuser; as it comes otherwise.
    pub(crate) fn of_servers(nodes: &[String]) -> Self {
        let nodes = nodes.concat();
        let tables = format!("[postgres]\nuser = \"postgres\"\ntls = \"disable\"\n{nodes}");
        Self::configured("", &tables)
    }

    /// Starts it, and waits until it has asked everything.
    pub(crate) async fn started(mut self) -> Self {
        self.agent = Some(Agent::health_monitor(&self.config()).spawn(&["run"]));
        let url = self.url("/readyz");
        eventually("the monitor is ready", LIMIT, async || {
            let answer = self.client.get(&url).send().await;
            answer.is_ok_and(|answer| answer.status().is_success())
        })
        .await;
        self
    }

    /// Asks it to end.
    pub(crate) async fn terminate(&mut self) -> Finished {
        self.agent.take().unwrap().terminate().await
    }

    pub(crate) fn config(&self) -> PathBuf {
        self.directory.path().join("health-monitor.toml")
    }

    /// What it has logged.
    pub(crate) fn log(&self) -> String {
        self.agent.as_ref().map(RunningAgent::stdout).unwrap_or_default()
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.port)
    }

    pub(crate) async fn command(&self, arguments: &[&str]) -> Finished {
        Agent::health_monitor(&self.config()).run(arguments).await
    }

    /// The metrics, as a scrape gets them.
    pub(crate) async fn metrics(&self) -> String {
        let request = self.client.get(self.url("/metrics"));
        let request = request.header("accept", "text/plain;version=0.0.4");
        request.send().await.unwrap().text().await.unwrap()
    }

    pub(crate) async fn status(&self) -> Value {
        let answer = self.client.get(self.url("/status")).send().await.unwrap();
        serde_json::from_str(&answer.error_for_status().unwrap().text().await.unwrap()).unwrap()
    }

    /// What happened, the newest first.
    pub(crate) async fn events(&self) -> Vec<Value> {
        self.status().await["events"].as_array().unwrap().clone()
    }

    /// What is not ok.
    pub(crate) async fn wrong(&self) -> Wrong {
        wrong(&self.status().await)
    }

    /// Waits until exactly this is not ok.
    pub(crate) async fn until_wrong(&self, expected: &[&str]) {
        let expected: Wrong = expected.iter().map(ToString::to_string).collect();
        let deadline = Instant::now() + LIMIT;
        loop {
            let wrong = self.wrong().await;
            if wrong == expected {
                return;
            }
            let late = deadline < Instant::now();
            assert!(!late, "{wrong:#?} is wrong, not {expected:#?}\n{}", self.log());
            sleep(Duration::from_millis(50)).await;
        }
    }
}

/// What is not ok, as `/status` tells it.
pub(crate) fn wrong(status: &Value) -> Wrong {
    let mut wrong = Wrong::new();
    for one in status["components"].as_array().unwrap() {
        for check in one["checks"].as_array().unwrap() {
            if check["status"] != "ok" {
                let name = &check["reading"]["check"];
                wrong.insert(words(&one["component"], name, &check["status"]));
            }
        }
    }
    wrong
}

/// `group 0 primary critical`: a component, a check and what it comes to.
pub(crate) fn words(component: &Value, check: &Value, status: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let (kind, name) = (text(&component["kind"]), text(&component["name"]));
    let name = match (&component["group"], name.as_str()) {
        (Value::Number(group), "") => format!("{kind} {group}"),
        (_, "") => kind,
        (_, name) => format!("{kind} {name}"),
    };
    format!("{name} {} {}", text(check), text(status))
}
