//! PostgreSQL's programs, run as the operating system user of the servers.

use std::env;
use std::ffi::OsStr;
use std::fmt::{self, Display, Formatter};
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use tempfile::TempDir;
use tokio::process::Command;
use tokio::time::timeout;

use crate::postgres::{Installation, find_installation, installation};

/// Longest run of a helper program: a base backup or a check of a large data directory.
pub(crate) const RUN_LIMIT: Duration = Duration::from_mins(5);
/// Longest temporary directory below which a Unix socket may lie. The path of a socket is at most
/// 107 bytes (`sun_path` in unix(7)); the names we add take about 40.
const SOCKET_ROOT_BYTES_MAX: usize = 60;

/// What a program that has ended left behind.
#[derive(Clone, Debug)]
pub struct Finished {
    /// How it ended; `None` when it was killed because it exceeded its time limit.
    pub status: Option<ExitStatus>,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

impl Finished {
    /// The exit code; `None` when a signal or the time limit ended the program.
    pub fn code(&self) -> Option<i32> {
        self.status.and_then(|status| status.code())
    }

    /// Whether the program exited with 0.
    pub fn is_success(&self) -> bool {
        self.code() == Some(0)
    }

    /// Whether the program was killed because it exceeded its time limit.
    pub fn timed_out(&self) -> bool {
        self.status.is_none()
    }

    /// Panics with everything the program printed unless it exited with 0.
    #[track_caller]
    pub fn assert_success(&self) -> &Self {
        assert!(self.is_success(), "expected exit code 0\n{self}");
        self
    }

    /// Panics with everything the program printed unless it exited with `code`.
    #[track_caller]
    pub fn assert_code(&self, code: i32) -> &Self {
        assert!(self.code() == Some(code), "expected exit code {code}\n{self}");
        self
    }

    /// The lines of an agent's log with level warn or error, and those of a panic, except lines
    /// that contain one of `expected`.
    pub fn unexpected_log_lines(&self, expected: &[&str]) -> Vec<&str> {
        let signs = ["\"level\":\"WARN\"", "\"level\":\"ERROR\"", "panicked at"];
        let lines = self.stdout.lines().chain(self.stderr.lines());
        lines
            .filter(|line| signs.iter().any(|sign| line.contains(sign)))
            .filter(|line| !expected.iter().any(|it| line.contains(it)))
            .collect()
    }
}

impl Display for Finished {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self.status {
            Some(status) => writeln!(f, "ended: {status}")?,
            None => writeln!(f, "ended: killed at its time limit")?,
        }
        write!(f, "--- stdout\n{}\n--- stderr\n{}", self.stdout, self.stderr)
    }
}

/// A command for a program of the PostgreSQL installation, or with a slash any program, that
/// runs as the servers' operating system user, without `PG…` variables, in English.
pub fn command(program: &str) -> Command {
    let path = if program.contains('/') {
        PathBuf::from(program)
    } else {
        installation().bin_directory().join(program)
    };
    let mut command = as_server_user(path);
    for (name, _) in env::vars_os() {
        if name.to_string_lossy().starts_with("PG") && !is_ours(&name) {
            command.env_remove(name);
        }
    }
    command.env("LC_ALL", "C.UTF-8");
    command
}

/// Runs a command to its end and returns its output. Panics unless it exits with 0 within five
/// minutes.
pub async fn run(command: &mut Command) -> Finished {
    let finished = finish(command, RUN_LIMIT).await;
    assert!(finished.is_success(), "{:?} failed\n{finished}", command.as_std());
    finished
}

/// Runs a command to its end, or kills it after `limit`.
pub async fn finish(command: &mut Command, limit: Duration) -> Finished {
    command.stdin(Stdio::null()).kill_on_drop(true);
    match timeout(limit, command.output()).await {
        Ok(output) => {
            let output = output.unwrap_or_else(|error| panic!("{:?}: {error}", command.as_std()));
            Finished {
                status: Some(output.status),
                stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
                stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
            }
        }
        Err(_) => Finished { status: None, stdout: String::new(), stderr: String::new() },
    }
}

/// Makes a temporary directory that belongs to the servers' operating system user. Its path is
/// short enough for a Unix socket in it.
pub fn directory() -> TempDir {
    let root = env::temp_dir();
    let root =
        if root.as_os_str().len() <= SOCKET_ROOT_BYTES_MAX { &root } else { Path::new("/tmp") };
    let directory =
        tempfile::Builder::new().prefix("pgm-").tempdir_in(root).expect("make a directory");
    give_to_server_user(directory.path());
    directory
}

/// Makes a file or directory belong to the servers' operating system user.
pub fn give_to_server_user(path: &Path) {
    if let Some((uid, gid)) = server_user() {
        chown(path, Some(uid), Some(gid)).expect("change the owner");
    }
}

/// User and group id of the servers; `None` for our own, and where there is no PostgreSQL.
fn server_user() -> Option<(u32, u32)> {
    find_installation().ok().and_then(Installation::user)
}

/// A command that runs as the servers' operating system user, in a directory it can enter.
pub(crate) fn as_server_user(path: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(path);
    command.current_dir("/");
    if let Some((uid, gid)) = server_user() {
        command.uid(uid).gid(gid).env("HOME", "/");
    }
    command
}

/// Variables of this project that begin with the letters libpq's begin with.
fn is_ours(name: &OsStr) -> bool {
    name.to_string_lossy().starts_with("PGMESH_")
}
