//! A real `PgBouncer` on loopback.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::time::Duration;

use rustix::process::Signal;
use tempfile::TempDir;

use crate::daemon::{Daemon, listens, server_port};
use crate::etcd::program_is_missing;
use crate::program::{self, as_server_user, give_to_server_user};

/// Longest wait for it to listen.
const START_LIMIT: Duration = Duration::from_secs(20);

/// A `PgBouncer`. Dropping it kills it and removes its files.
#[derive(Debug)]
pub struct PgBouncer {
    port: u16,
    daemon: Daemon,
    directory: TempDir,
}

/// Reports the running test as skipped and returns true if `PgBouncer` is not installed.
pub fn pgbouncer_is_missing() -> bool {
    program_is_missing("pgbouncer")
}

impl PgBouncer {
    /// Who may log in, to the admin console too, and the password.
    pub const LOGIN: (&str, &str) = ("monitor", "monitor-password");

    /// Starts one with these databases (name and connection string) and settings, by default as it
    /// comes but for who may log in, and waits until it listens.
    pub async fn start(databases: &[(&str, &str)], settings: &[(&str, &str)]) -> Self {
        let directory = program::directory();
        let port = server_port();
        let daemon = Daemon::new(&directory.path().join("pgbouncer.log"));
        let (user, password) = Self::LOGIN;
        let users = directory.path().join("users.txt");
        write(&users, &format!("\"{user}\" \"{password}\"\n"));
        let mut text = "[databases]\n".to_owned();
        for (name, conninfo) in databases {
            writeln!(text, "{name} = {conninfo}").unwrap();
        }
        writeln!(
            text,
            "[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n\
             auth_type = scram-sha-256\nauth_file = {}\nstats_users = {user}",
            users.display()
        )
        .unwrap();
        for (name, value) in settings {
            writeln!(text, "{name} = {value}").unwrap();
        }
        write(&directory.path().join("pgbouncer.ini"), &text);
        let mut bouncer = Self { port, daemon, directory };
        bouncer.start_again().await;
        bouncer
    }

    /// Starts it after it was killed.
    pub async fn start_again(&mut self) {
        let mut command = as_server_user("pgbouncer");
        command.arg(self.directory.path().join("pgbouncer.ini"));
        self.daemon.start(command);
        listens("PgBouncer", self.port, START_LIMIT).await;
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

fn write(path: &Path, text: &str) {
    fs::write(path, text).unwrap();
    give_to_server_user(path);
}
