//! A real Redis server on loopback.

use std::time::Duration;

use rustix::process::Signal;
use tempfile::TempDir;

use crate::daemon::{Daemon, listens, server_port};
use crate::etcd::program_is_missing;
use crate::program::{self, as_server_user};

/// Longest wait for it to listen.
const START_LIMIT: Duration = Duration::from_secs(20);

/// A Redis server. Dropping it kills it and removes its files.
#[derive(Debug)]
pub struct RedisServer {
    port: u16,
    daemon: Daemon,
    _directory: TempDir,
}

/// Reports the running test as skipped and returns true if Redis is not installed.
pub fn redis_is_missing() -> bool {
    program_is_missing("redis-server")
}

impl RedisServer {
    /// Starts a server with more options, such as `--requirepass`, and waits until it listens.
    pub async fn start(options: &[&str]) -> Self {
        let directory = program::directory();
        let mut daemon = Daemon::new(&directory.path().join("redis.log"));
        let port = server_port();
        let mut command = as_server_user("redis-server");
        command
            .args(["--bind", "127.0.0.1", "--port", &port.to_string(), "--save", "", "--dir"])
            .arg(directory.path())
            .args(options);
        daemon.start(command);
        listens("Redis", port, START_LIMIT).await;
        Self { port, daemon, _directory: directory }
    }

    /// Its port on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
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
