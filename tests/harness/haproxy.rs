//! A real `HAProxy` on loopback, with a statistics page.

use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use rustix::process::Signal;
use tempfile::TempDir;

use crate::daemon::{Daemon, listens, server_port};
use crate::etcd::program_is_missing;
use crate::program::{self, as_server_user, give_to_server_user};

/// Longest wait for it to listen.
const START_LIMIT: Duration = Duration::from_secs(20);

/// An `HAProxy`. Dropping it kills it and removes its files.
#[derive(Debug)]
pub struct HaProxy {
    stats_port: u16,
    daemon: Daemon,
    directory: TempDir,
}

/// A backend of it.
#[derive(Clone, Debug)]
pub struct Backend {
    /// Its name.
    pub name: String,
    /// What its servers are asked, such as `/primary`, and must answer with 200. Otherwise it is
    /// enough that they take connections.
    pub http_check: Option<String>,
    /// The servers: name, port, and the port of the check.
    pub servers: Vec<(String, u16, u16)>,
}

/// Reports the running test as skipped and returns true if `HAProxy` is not installed.
pub fn haproxy_is_missing() -> bool {
    program_is_missing("haproxy")
}

impl HaProxy {
    /// The user of the statistics page, and the password.
    pub const LOGIN: (&str, &str) = ("stats", "stats-password");

    /// Starts one with these backends, all of them checked five times a second.
    pub async fn start(backends: &[Backend]) -> Self {
        let directory = program::directory();
        let stats_port = server_port();
        let daemon = Daemon::new(&directory.path().join("haproxy.log"));
        let mut haproxy = Self { stats_port, daemon, directory };
        let config = haproxy.config();
        fs::write(&config, config_text(stats_port, backends)).unwrap();
        give_to_server_user(&config);
        haproxy.start_again().await;
        haproxy
    }

    /// Starts it after it was killed.
    pub async fn start_again(&mut self) {
        let mut command = as_server_user("haproxy");
        // In the foreground, without workers: one process to freeze and kill.
        command.arg("-db").arg("-f").arg(self.config());
        self.daemon.start(command);
        listens("HAProxy", self.stats_port, START_LIMIT).await;
    }

    fn config(&self) -> PathBuf {
        self.directory.path().join("haproxy.cfg")
    }

    /// The statistics page.
    pub fn stats_url(&self) -> String {
        format!("http://127.0.0.1:{}/stats", self.stats_port)
    }

    /// Kills it with SIGKILL.
    pub async fn kill9(&mut self) {
        self.daemon.kill9().await;
    }

    /// Freezes it: its connections stay open, and nothing answers.
    pub fn sigstop(&self) {
        self.daemon.signal(Signal::STOP);
    }

    /// Lets it go on.
    pub fn sigcont(&self) {
        self.daemon.signal(Signal::CONT);
    }
}

fn config_text(stats_port: u16, backends: &[Backend]) -> String {
    let (user, password) = HaProxy::LOGIN;
    let mut text = format!(
        "defaults\n  mode tcp\n  timeout connect 2s\n  timeout check 2s\n  timeout client 30s\n  timeout server 30s\n\
         listen stats\n  mode http\n  bind 127.0.0.1:{stats_port}\n  stats enable\n  \
         stats uri /stats\n  stats auth {user}:{password}\n"
    );
    for Backend { name, http_check, servers } in backends {
        writeln!(text, "backend {name}\n  default-server inter 200ms fall 1 rise 1").unwrap();
        if let Some(path) = http_check {
            writeln!(text, "  option httpchk GET {path}\n  http-check expect status 200").unwrap();
        }
        for (name, port, check_port) in servers {
            writeln!(text, "  server {name} 127.0.0.1:{port} check port {check_port}").unwrap();
        }
    }
    text
}
