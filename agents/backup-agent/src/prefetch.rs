//! Fetches WAL ahead of a recovery, so that `wal-fetch` has only to rename a file.
//!
//! PostgreSQL asks for one segment at a time and replays nothing while it waits for it. So the
//! first `wal-fetch` that had to fetch a segment itself starts a process that fetches the next
//! ones, several at once, into a directory in `pg_wal`, which PostgreSQL ignores there and which no
//! base backup contains. A file gets its name there only after it was read and checked to its end.
//!
//! The directory is all that the two share: `wal-fetch` takes a file away, and says in `wanted`
//! which segment it had to fetch itself. Its name is of one run of the server, so nobody takes
//! what lies there since another one. Whatever goes wrong here, `wal-fetch` fetches as if there
//! was nothing, and finds out itself why it does not work.

mod fetcher;

use std::env;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::statvfs;
use shared::pg::wal::{Segment, WAL_HEADER_BYTES, WalFile, WalHeader, check_segment_bytes};
use tokio::time::sleep;
use tokio_postgres::types::PgLsn;
use tracing::warn;

use crate::archive;

pub use fetcher::run;

/// What a recovery calls the segment that it asks for. `pg_rewind` asks for other names, and does
/// not bear it when files come and go in the directory that it rewinds.
/// Source: `XLogFileRead` in `xlogrecovery.c`; `pg_rewind` of PostgreSQL 13 and later.
const RECOVERY_FILE: &str = "RECOVERYXLOG";
/// What the directory's name begins with.
const DIRECTORY: &str = "pgmesh-prefetch-";
/// What a file is called until it is whole.
const PART: &str = ".part";
/// The file that says for which run of a server it was said that nothing is fetched ahead.
const OFF: &str = "pgmesh-no-prefetch";
/// The file that says which segment `wal-fetch` had to fetch itself.
const WANTED: &str = "wanted";

/// How long `wal-fetch` waits for a segment that is being fetched, before it does so itself.
const WAIT_MAX: Duration = Duration::from_secs(10);
/// Between two looks whether it is there.
const WAIT_POLL: Duration = Duration::from_millis(2);
/// Between two looks at what `wal-fetch` did.
const POLL: Duration = Duration::from_millis(20);

/// What lies ready for the recovery of one run of a server.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Ahead {
    directory: PathBuf,
}

/// The segment that `wal-fetch` fetched itself last: what follows is wanted next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Wanted {
    segment: Segment,
    segment_bytes: u64,
}

/// Moves a segment that was fetched ahead to `path`, and returns whether there was one. Waits for
/// one that is being fetched. Takes none behind the target of the recovery, `until`.
#[expect(clippy::disallowed_methods, reason = "there is no runtime yet, and nothing else to do")]
pub fn take(file: &str, path: &Path, until: Option<PgLsn>) -> bool {
    let (Some(ahead), Ok(system_identifier)) = (Ahead::of(path), archive::system_identifier())
    else {
        return false;
    };
    let ready = ahead.directory.join(file);
    let deadline = Instant::now() + WAIT_MAX;
    loop {
        // This first: it is ready from the moment on that it is not coming any more.
        let is_coming = ahead.part(file).exists() && ahead.is_kept();
        if is_segment(&ready, file, system_identifier, until) && fs::rename(&ready, path).is_ok() {
            return true;
        }
        if !is_coming || Instant::now() > deadline {
            return false;
        }
        thread::sleep(WAIT_POLL);
    }
}

/// Whether a file is that segment, as far as its header and its length tell: its content was
/// checked before it got its name. Not if it begins at `until` or behind.
fn is_segment(path: &Path, file: &str, system_identifier: u64, until: Option<PgLsn>) -> bool {
    let mut bytes = [0; WAL_HEADER_BYTES];
    let read = File::open(path).and_then(|mut opened| {
        opened.read_exact(&mut bytes)?;
        opened.metadata()
    });
    let (Ok(metadata), Ok(header)) = (read, WalHeader::parse(&bytes)) else { return false };
    let Ok(WalFile::Segment(segment)) = WalFile::parse(file, header.segment_bytes) else {
        return false;
    };
    metadata.len() == header.segment_bytes
        && until.is_none_or(|until| !archive::is_behind(file, header.segment_bytes, until))
        && header.check(segment, header.segment_bytes, system_identifier).is_ok()
}

/// Says that `file` had to be fetched to `path`, and starts a process that fetches what follows,
/// unless one runs. Does nothing if this is no recovery's file. If it fails, the recovery goes on
/// without.
pub fn start(config_file: &Path, file: &str, path: &Path) {
    if let Err(failure) = try_start(config_file, file, path) {
        warn!(error = %failure, "WAL is not fetched ahead");
    }
}

fn try_start(config_file: &Path, file: &str, path: &Path) -> io::Result<()> {
    let Some(ahead) = Ahead::of(path) else { return say_why_not(path) };
    let segment_bytes = fs::metadata(path)?.len();
    let wanted = format!("{file} {segment_bytes}");
    if Wanted::parse(&wanted).is_none() {
        return Ok(());
    }
    fs::create_dir_all(&ahead.directory)?;
    let provisional = ahead.part(WANTED);
    fs::write(&provisional, wanted)?;
    fs::rename(&provisional, ahead.directory.join(WANTED))?;
    if !ahead.is_kept() {
        let mut command = Command::new(env::current_exe()?);
        command.arg("--config").arg(config_file).arg("wal-prefetch").arg(path);
        // A process group of its own: PostgreSQL signals those of its children.
        command.process_group(0).stdin(Stdio::null()).stdout(Stdio::null()).spawn()?;
    }
    Ok(())
}

/// Says once in each run of a server that it recovers without us, if that is because it is process 1:
/// nobody else would find out why its recovery is slow.
fn say_why_not(path: &Path) -> io::Result<()> {
    let lines = fs::read_to_string("postmaster.pid").unwrap_or_default();
    let is_process_1 = lines.lines().next().is_some_and(|process| process.trim() == "1");
    if !is_process_1 || !is_recovering() || path.file_name() != Some(RECOVERY_FILE.as_ref()) {
        return Ok(());
    }
    let marker = path.with_file_name(OFF);
    let run = lines.lines().nth(2).unwrap_or_default().trim();
    if fs::read_to_string(&marker).is_ok_and(|said| said == run) {
        return Ok(());
    }
    fs::write(marker, run)?;
    warn!(
        "WAL is not fetched ahead of this recovery: PostgreSQL is process 1 of its container. Start \
         the container with an init process (docker run --init) and it recovers faster"
    );
    Ok(())
}

fn is_recovering() -> bool {
    ["recovery.signal", "standby.signal"].iter().any(|signal| Path::new(signal).exists())
}

impl Ahead {
    /// Of the server in whose data directory we are, if it recovers and wants segments at `path`.
    fn of(path: &Path) -> Option<Self> {
        let lines = fs::read_to_string("postmaster.pid").ok()?;
        is_recovering().then(|| Self::of_server(path, &lines))?
    }

    /// With the lines of `postmaster.pid`: the first is the process, the third when it started.
    /// Source: `CreateLockFile` in `miscinit.c`.
    ///
    /// Not if the server is process 1, as in a container without an init process: it would inherit
    /// our process, take it for one of its own, and start over if that is killed.
    /// Source: `CleanupBackend` in `postmaster.c`; github.com/docker-library/postgres/issues/1349.
    fn of_server(path: &Path, lines: &str) -> Option<Self> {
        let number = |line: usize| lines.lines().nth(line)?.trim().parse::<u64>().ok();
        let (process, started) = (number(0).filter(|process| *process != 1)?, number(2)?);
        let name = format!("{DIRECTORY}{process}-{started}");
        (path.file_name()? == RECOVERY_FILE).then(|| Self { directory: path.with_file_name(name) })
    }

    fn part(&self, name: &str) -> PathBuf {
        self.directory.join(format!("{name}{PART}"))
    }

    /// Whether a process fetches into it.
    fn is_kept(&self) -> bool {
        File::open(&self.directory).is_ok_and(|directory| directory.try_lock().is_err())
    }

    /// Resolves when the recovery has ended, or the server.
    async fn is_over(&self, path: &Path) {
        while Self::of(path).as_ref() == Some(self) {
            sleep(POLL).await;
        }
    }

    fn wanted(&self) -> io::Result<Wanted> {
        let text = fs::read_to_string(self.directory.join(WANTED))?;
        Wanted::parse(&text).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    /// The names of the files that are there, sorted.
    fn names(&self) -> io::Result<Vec<String>> {
        let name = |entry: fs::DirEntry| entry.file_name().to_string_lossy().into_owned();
        let names = fs::read_dir(&self.directory)?.map(|entry| entry.map(name));
        let mut names = names.collect::<io::Result<Vec<_>>>()?;
        names.sort_unstable();
        Ok(names)
    }

    /// Whether there is room for so many bytes, and for as many again: a recovery must not stop
    /// for want of what was taken by WAL that it does not need yet.
    fn has_room(&self, bytes: u64) -> bool {
        statvfs(&self.directory).is_ok_and(|disk| disk.f_bavail * disk.f_frsize > 2 * bytes)
    }

    /// Removes what a killed process had begun, and what was fetched for another run of a server,
    /// of which none can be left: a data directory has one.
    fn remove_leftovers(&self) {
        for name in self.names().unwrap_or_default() {
            if name.ends_with(PART) {
                fs::remove_file(self.directory.join(name)).ok();
            }
        }
        let beside = self.directory.parent().and_then(|parent| fs::read_dir(parent).ok());
        for entry in beside.into_iter().flatten().flatten() {
            let is_ours = entry.file_name().to_string_lossy().starts_with(DIRECTORY);
            if is_ours && entry.path() != self.directory {
                fs::remove_dir_all(entry.path()).ok();
            }
        }
    }
}

impl Wanted {
    fn parse(text: &str) -> Option<Self> {
        let (file, segment_bytes) = text.split_once(' ')?;
        let segment_bytes = check_segment_bytes(segment_bytes.parse().ok()?).ok()?;
        match WalFile::parse(file, segment_bytes) {
            Ok(WalFile::Segment(segment)) => Some(Self { segment, segment_bytes }),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn the_directory_is_of_one_run_of_a_server_and_of_a_recovery() {
        let lines = "4711\n/data\n1790000000\n5432\n/tmp\n";
        let ours = Some("pg_wal/pgmesh-prefetch-4711-1790000000");
        let cases = [
            ("a recovery", "pg_wal/RECOVERYXLOG", lines, ours),
            ("a history", "pg_wal/RECOVERYHISTORY", lines, None),
            ("pg_rewind", "/data/pg_wal/000000010000000000000001", lines, None),
            ("process 1", "pg_wal/RECOVERYXLOG", "1\n/data\n1790000000\n", None),
            ("cut short", "pg_wal/RECOVERYXLOG", "4711\n/data\n", None),
            ("no file", "pg_wal/RECOVERYXLOG", "", None),
        ];
        for (case, path, lines, expected) in cases {
            let found = Ahead::of_server(Path::new(path), lines).map(|ahead| ahead.directory);
            assert_eq!(found.as_deref(), expected.map(Path::new), "{case}");
        }
    }

    #[test]
    fn what_is_wanted_reads_back() {
        let segment = Segment { timeline: 2, number: 258 };
        let wanted = Wanted { segment, segment_bytes: 16 * MIB };
        assert_eq!(Wanted::parse("000000020000000100000002 16777216"), Some(wanted));
        for wrong in ["", "000000020000000100000002", "000000020000000100000002 0", "x 16777216"] {
            assert_eq!(Wanted::parse(wrong), None, "{wrong}");
        }
    }
}
