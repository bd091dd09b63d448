//! What a standby does without a file that cannot be fetched just now.
//!
//! One that streams asks elsewhere, and comes back. One that has nothing to stream from takes exit
//! code 1 for the end of the WAL as soon as it is promoted, and leaves behind what is stored: for it
//! `wal-fetch` waits.

use std::fs;
use std::os::unix::process::parent_id;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use tokio::time::sleep;

/// Says that the server, in whose data directory we are, stays a standby until it is promoted.
const STANDBY: &str = "standby.signal";
/// Says that it recovers to a target, or to the end of the WAL.
const RECOVERY: &str = "recovery.signal";
/// Is there from the request to promote the server until the server takes note of it.
/// Source: `PROMOTE_SIGNAL_FILE` in `xlog.h`.
const PROMOTE: &str = "promote";
/// The name under which the server asks for the history of a timeline.
/// Source: `timeline.c`.
const HISTORY_FILE: &str = "RECOVERYHISTORY";
/// An option with which Patroni starts every server, beside those of the operator.
const PATRONI: &str = "--wal_log_hints=";
/// Between two looks whether the server is still there.
const LOOK_EVERY: Duration = Duration::from_millis(500);

pub(super) fn is_recovering() -> bool {
    [STANDBY, RECOVERY].iter().any(|signal| Path::new(signal).exists())
}

pub(super) fn is_standby() -> bool {
    Path::new(STANDBY).exists()
}

/// Whether the server has the history of a timeline itself: it falls back to that.
/// Source: `RestoreArchivedFile` in `xlogarchive.c`.
pub(super) fn has_history(file: &str) -> bool {
    file.ends_with(".history") && Path::new("pg_wal").join(file).exists()
}

/// Whether nobody has to be asked for a file: the history of the parent, for which a server asks that
/// is promoted, after it has removed its signal file. If that failed, it would start on the old
/// timeline, as a primary. The first timeline has no history, and the server has any other, as it has
/// followed it up to there.
///
/// Source: `StartupXLOG` in `xlog.c`, `writeTimeLineHistory` and `readTimeLineHistory` in `timeline.c`.
pub fn needs_nobody(file: &str, path: &Path) -> bool {
    path.file_name() == Some(HISTORY_FILE.as_ref())
        && (file == "00000001.history" || !is_recovering() && has_history(file))
}

/// The server whose recovery waits for a file.
#[derive(Debug)]
pub(super) struct Server {
    /// What identifies this run of it: the process, the data directory and when it started.
    run: Vec<String>,
    /// Who started us: the server's startup process, or a shell of its.
    parent: u32,
}

/// What is known of a standby that asks for a file.
#[derive(Clone, Copy, Debug)]
struct Known<'a> {
    /// Patroni decides who is promoted.
    is_patroni: bool,
    /// `primary_conninfo`; `None` if it cannot be told.
    primary_conninfo: Option<&'a str>,
    /// `restore_command`; `None` if it cannot be told.
    restore_command: Option<&'a str>,
    /// It lets nobody in yet, and is not to be promoted. What it has in `pg_wal` may be all that it needs
    /// for that, and to wait would hold it up: it reads ahead of what it replays (`recovery_prefetch`).
    is_starting: bool,
}

/// What the standby does without the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Without {
    /// It goes on: why.
    GoesOn(&'static str),
    /// It has nothing but the repository.
    Waits,
}

/// Decides what a standby does without a file.
fn decide(known: Known<'_>) -> Without {
    match known {
        // It promotes at once, with an empty primary_conninfo too, and looks after what is lost.
        Known { is_patroni: true, .. } => Without::GoesOn("left to Patroni"),
        Known { primary_conninfo: Some(""), restore_command: Some(""), .. } => {
            Without::GoesOn("restore_command was taken away")
        }
        Known { primary_conninfo: Some(""), is_starting: true, .. } => {
            Without::GoesOn("left to what the server has in pg_wal")
        }
        Known { primary_conninfo: Some(""), .. } => Without::Waits,
        Known { .. } => Without::GoesOn("left to streaming"),
    }
}

impl Server {
    /// The server in whose data directory we are; `None` if none runs there.
    pub(super) fn here() -> Option<Self> {
        let server = Self { run: run(), parent: parent_id() };
        (!server.is_gone()).then_some(server)
    }

    fn process(&self) -> &str {
        self.run.first().map_or("", |line| line.trim())
    }

    /// Whether it has ended, or started anew, or its startup process has ended.
    fn is_gone(&self) -> bool {
        let program = Path::new("/proc").join(self.process()).join("exe");
        // Of one that has ended and that nobody has waited for, this cannot be read.
        let is_alive = self.run.len() == 3 && fs::read_link(program).is_ok();
        !is_alive || run() != self.run || parent_id() != self.parent
    }

    /// Resolves when the server has ended.
    pub(super) async fn gone(&self) {
        while !self.is_gone() {
            sleep(LOOK_EVERY).await;
        }
    }

    /// What it does without a file.
    pub(super) fn without(&self) -> Without {
        let arguments = self.arguments();
        let setting = |name| self.setting(&arguments, name);
        let (primary_conninfo, restore_command) =
            (setting("primary_conninfo"), setting("restore_command"));
        decide(Known {
            is_patroni: arguments.iter().any(|it| it.starts_with(PATRONI)),
            primary_conninfo: primary_conninfo.as_deref(),
            restore_command: restore_command.as_deref(),
            is_starting: is_starting() && !Path::new(PROMOTE).exists(),
        })
    }

    /// What it was started with.
    fn arguments(&self) -> Vec<String> {
        let line = Path::new("/proc").join(self.process()).join("cmdline");
        let line = fs::read(line).unwrap_or_default();
        let words = line.split(|byte| *byte == 0).skip(1).filter(|word| !word.is_empty());
        words.map(|word| String::from_utf8_lossy(word).into_owned()).collect()
    }

    /// A setting of its configuration; `None` if it cannot be told.
    fn setting(&self, arguments: &[String], name: &str) -> Option<String> {
        let program = Path::new("/proc").join(self.process()).join("exe");
        let program = fs::read_link(program).ok()?;
        // A path that was relative to where the server was started is the working directory's.
        [&[][..], &["-D", "."][..]].into_iter().find_map(|directory| {
            let mut command = Command::new(&program);
            command.args(arguments).args(directory).args(["-C", name]);
            let output = command.stdin(Stdio::null()).output().ok()?;
            let text = String::from_utf8_lossy(&output.stdout);
            output.status.success().then(|| text.trim_end_matches('\n').to_owned())
        })
    }
}

/// The first three lines of `postmaster.pid`. Source: `CreateLockFile` in `miscinit.c`.
fn run() -> Vec<String> {
    let lines = fs::read_to_string("postmaster.pid").unwrap_or_default();
    lines.lines().take(3).map(str::to_owned).collect()
}

/// Whether the server lets nobody in yet: it has not come to where it is consistent.
/// Source: `LOCK_FILE_LINE_PM_STATUS` in `pidfile.h`.
fn is_starting() -> bool {
    let lines = fs::read_to_string("postmaster.pid").unwrap_or_default();
    lines.lines().nth(7).is_some_and(|status| status.trim() == "starting")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_who_has_nothing_but_the_repository_waits() {
        let shipped = Known {
            is_patroni: false,
            primary_conninfo: Some(""),
            restore_command: Some("backup-agent wal-fetch %f %p"),
            is_starting: false,
        };
        let streams = Known { primary_conninfo: Some("host=postgres-1"), ..shipped };
        let unknown = Known { primary_conninfo: None, restore_command: None, ..shipped };
        let cases = [
            ("nothing to stream from", shipped, None),
            ("restore_command unknown", Known { restore_command: None, ..shipped }, None),
            ("it streams", streams, Some("left to streaming")),
            ("it cannot be told", unknown, Some("left to streaming")),
            ("Patroni", Known { is_patroni: true, ..shipped }, Some("left to Patroni")),
            (
                "restore_command is empty",
                Known { restore_command: Some(""), ..shipped },
                Some("restore_command was taken away"),
            ),
            (
                "it starts",
                Known { is_starting: true, ..shipped },
                Some("left to what the server has in pg_wal"),
            ),
        ];
        for (case, known, expected) in cases {
            let expected = expected.map_or(Without::Waits, Without::GoesOn);
            assert_eq!(decide(known), expected, "{case}");
        }
    }
}
