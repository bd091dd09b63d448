//! A real Alertmanager on loopback, that tells a webhook what it was told.

use std::fs;
use std::thread;
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;

use crate::daemon::{Daemon, listens, server_port};
use crate::etcd::program_is_missing;
use crate::program::{self, as_server_user, give_to_server_user};

/// Debian's name of it.
const PROGRAM: &str = "prometheus-alertmanager";
/// Longest wait for it to listen.
const START_LIMIT: Duration = Duration::from_secs(30);

/// An Alertmanager. Dropping it kills it and removes its files.
#[derive(Debug)]
pub struct Alertmanager {
    port: u16,
    daemon: Daemon,
    client: reqwest::Client,
    _directory: TempDir,
}

/// Reports the running test as skipped and returns true if Alertmanager is not installed.
pub fn alertmanager_is_missing() -> bool {
    program_is_missing(PROGRAM)
}

impl Alertmanager {
    /// Starts one that groups alerts by name, and tells `webhook` of each group and how it ended.
    pub async fn start(webhook: &str) -> Self {
        let directory = program::directory();
        let config = directory.path().join("alertmanager.yml");
        let text = format!(
            "route:\n  receiver: test\n  group_by: [alertname]\n  group_wait: 2s\n  \
             group_interval: 1s\n  repeat_interval: 1h\nreceivers:\n  - name: test\n    \
             webhook_configs:\n      - url: {webhook}\n        send_resolved: true\n"
        );
        fs::write(&config, text).unwrap();
        give_to_server_user(&config);
        let mut daemon = Daemon::new(&directory.path().join("alertmanager.log"));
        let port = server_port();
        let mut command = as_server_user(PROGRAM);
        command
            .arg(format!("--config.file={}", config.display()))
            .arg(format!("--storage.path={}", directory.path().join("data").display()))
            .arg(format!("--web.listen-address=127.0.0.1:{port}"))
            // No cluster: each test has its own.
            .arg("--cluster.listen-address=");
        daemon.start(command);
        listens("Alertmanager", port, START_LIMIT).await;
        let client = reqwest::Client::builder().no_proxy().build().unwrap();
        Self { port, daemon, client, _directory: directory }
    }

    /// Its address.
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// The alerts that fire.
    pub async fn alerts(&self) -> Vec<Value> {
        self.get("alerts").await
    }

    /// The groups of alerts that fire.
    pub async fn groups(&self) -> Vec<Value> {
        self.get("alerts/groups").await
    }

    async fn get(&self, what: &str) -> Vec<Value> {
        let url = format!("{}/api/v2/{what}", self.url());
        let answer = self.client.get(url).send().await.expect("ask Alertmanager");
        answer.json().await.expect("Alertmanager answers with JSON")
    }

    /// Kills it with SIGKILL.
    pub async fn kill9(&mut self) {
        self.daemon.kill9().await;
    }
}

impl Drop for Alertmanager {
    #[expect(clippy::print_stderr, reason = "what the server said belongs to a failing test")]
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("{}", self.daemon.log_tail());
        }
    }
}
