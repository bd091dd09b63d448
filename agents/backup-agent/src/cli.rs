//! The command line.

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;

use chrono::{DateTime, Utc};
use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use shared::cli::config_help;
use tokio_postgres::types::PgLsn;

use crate::commands::AGENT;
use crate::manifest::BackupId;
use crate::recovery::{Target, TargetTimeline};

/// Takes base backups of PostgreSQL clusters, stores their WAL, and restores both.
#[derive(Debug, Parser)]
#[command(name = "backup-agent", version, max_term_width = 100)]
#[command(mut_arg("config", |argument| config_help(argument, AGENT)))]
pub struct Cli {
    /// What every agent has.
    #[command(flatten)]
    pub shared: shared::cli::Args,
    /// What to do.
    #[command(subcommand)]
    pub command: Option<Command>,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve: take scheduled backups, apply the retention, answer /metrics and /status (default)
    Run,
    /// Take a base backup now
    ///
    /// Reads the standby that is least behind, or the primary if none is fit. It is done when
    /// every file has been compared with the server's manifest and all WAL that the backup needs
    /// is in the repository. Exit code 1 also for a suspect backup, which is kept, and if a group is being
    /// drained: of that one none is taken unless --group names it.
    Backup(GroupArgs),
    /// Show the backups and what each can be restored to; or the stored WAL
    ///
    /// AGE is since it was complete, SIZE that of the database cluster, STORED what it takes in the
    /// repository. RESTORABLE UNTIL (UTC) is as far as WAL without a gap leads from it. Below a backup
    /// stands what is wrong with it. --json tells more.
    ///
    /// With --wal: the ranges of WAL without a gap, and what is after each. Exit code 1 if a backup
    /// cannot be read or WAL is missing.
    List(ListArgs),
    /// Restore a backup into a data directory
    ///
    /// Without a target, recovery goes to the end of the WAL. The directory must be empty. Start
    /// PostgreSQL there afterwards; it fetches WAL by itself and stops at the target.
    Restore(RestoreArgs),
    /// Read backups back, completely, and say what could not be restored
    ///
    /// Of the WAL only what a backup itself needs; with --wal all of it, and no backups.
    Verify(VerifyArgs),
    /// Show what the retention would delete, or delete it
    ///
    /// Backups are marked at first and deleted when they have been marked for
    /// `retention.delete_after`.
    ///
    /// Ages count until the newest WAL or backup that is stored: where nothing new comes, nothing goes.
    /// --apply changes nothing while this host's clock is more than 15 min from the repository's or the
    /// primary's.
    ///
    /// With --timeline instead: what a copy that was promoted beside its server has stored, WAL, history and
    /// backups. The primary is asked what is the database's. Stop the copy first. A bucket with versions, as
    /// under Object Lock, keeps them until their retention ends.
    Expire(ExpireArgs),
    /// Try the whole chain now: keys, repository, clocks, servers, archiving
    Check(JsonArgs),
    /// Store a WAL file: `archive_command = 'backup-agent wal-push %p'`
    WalPush {
        /// The file, as PostgreSQL gives it in %p
        path: PathBuf,
    },
    /// Fetch a WAL file: `restore_command = 'backup-agent wal-fetch %f %p'`
    ///
    /// Exit code 1 only if the repository proves that the file was never produced; PostgreSQL
    /// takes it as the end of the WAL. 254 for everything else, which stops the recovery.
    ///
    /// Run by a recovery, it starts a process that fetches the following segments ahead; see
    /// `wal.prefetch_segments`.
    WalFetch {
        /// The file's name, as PostgreSQL gives it in %f
        file: String,
        /// Where it goes, as PostgreSQL gives it in %p
        path: PathBuf,
        /// The recovery has a target at or before this position, after which WAL is missing: `restore`
        /// adds it. Without it a segment that is not complete ends no recovery before a gap
        #[arg(long, value_name = "LSN", value_parser = parse_lsn)]
        until: Option<PgLsn>,
    },
    /// Fetch WAL ahead of a recovery: what `wal-fetch` starts
    #[command(hide = true)]
    WalPrefetch {
        /// Where PostgreSQL wants a segment, as it gives it in %p
        path: PathBuf,
    },
    /// Say that the repository is a new one: WAL is received into it though some was stored before
    ///
    /// Without it, a repository that holds nothing of a database cluster whose WAL was stored before is
    /// refused: it may not be mounted. It also says that the group is of the database cluster that its servers
    /// have now, made anew or an earlier one that is back: what was said last counts. Take a backup next.
    Begin(GroupArgs),
    /// Check the configuration and the files it names, and say what is wrong
    CheckConfig,
    /// Make an encryption key: 32 random bytes in base64
    NewKey {
        /// A file that does not exist yet; standard output if left out
        file: Option<PathBuf>,
    },
}

impl Command {
    /// Whether it is to print JSON.
    pub fn prints_json(&self) -> bool {
        match self {
            Self::Backup(args) | Self::Begin(args) => args.json,
            Self::List(args) => args.group.json,
            Self::Restore(args) => args.json,
            Self::Verify(args) => args.json,
            Self::Expire(args) => args.json,
            Self::Check(args) => args.json,
            Self::Run
            | Self::WalPush { .. }
            | Self::WalFetch { .. }
            | Self::WalPrefetch { .. }
            | Self::CheckConfig
            | Self::NewKey { .. } => false,
        }
    }
}

/// Whether a command line is one of `wal-fetch`, well-formed or not: the first command that it names.
pub fn is_wal_fetch(arguments: impl Iterator<Item = OsString>) -> bool {
    let command = Cli::command();
    let is_command =
        |word: &OsString| command.get_subcommands().any(|it| word == OsStr::new(it.get_name()));
    let mut arguments = arguments.skip(1);
    while let Some(word) = arguments.next() {
        if word == "--config" || word == "--log-format" {
            arguments.next();
        } else if is_command(&word) {
            return word == "wal-fetch";
        }
    }
    false
}

/// `--json`.
#[derive(Debug, Args)]
pub struct JsonArgs {
    /// Print JSON, for programs; if nothing else was printed, how it failed: {"error": …}
    #[arg(long)]
    pub json: bool,
}

/// `--group` and `--json`.
#[derive(Debug, Args)]
pub struct GroupArgs {
    /// The group [default: all of them]
    #[arg(long)]
    pub group: Option<u32>,
    /// Print JSON, for programs; if nothing else was printed, how it failed: {"error": …}
    #[arg(long)]
    pub json: bool,
}

/// Options of `list`.
#[derive(Debug, Args)]
pub struct ListArgs {
    /// The stored WAL instead of the backups
    #[arg(long)]
    pub wal: bool,
    /// The group and the output
    #[command(flatten)]
    pub group: GroupArgs,
}

/// Options of `verify`.
#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// All stored WAL instead of the backups
    #[arg(long, conflicts_with = "backup")]
    pub wal: bool,
    /// One backup [default: all of them]
    #[arg(long, value_name = "ID")]
    pub backup: Option<BackupId>,
    /// The group [default: all of them]
    #[arg(long)]
    pub group: Option<u32>,
    /// Print JSON, for programs; if nothing else was printed, how it failed: {"error": …}
    #[arg(long)]
    pub json: bool,
}

/// Options of `expire`.
#[derive(Debug, Args)]
pub struct ExpireArgs {
    /// Do it; without this, only show the plan
    #[arg(long)]
    pub apply: bool,
    /// All that is stored of a timeline which is not the database's, whatever its age
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub timeline: Option<u32>,
    /// The primary is the database, and no old one that came back, though nothing that is stored shows it
    #[arg(long, requires = "timeline")]
    pub force: bool,
    /// The group [default: all of them]
    #[arg(long)]
    pub group: Option<u32>,
    /// Print JSON, for programs; if nothing else was printed, how it failed: {"error": …}
    #[arg(long)]
    pub json: bool,
}

/// What PostgreSQL does at the target.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Action {
    /// Stay in recovery; look, then `pg_wal_replay_resume()`
    Pause,
    /// Become a primary
    Promote,
    /// Shut down
    Shutdown,
}

impl Action {
    /// The value of `recovery_target_action`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pause => "pause",
            Self::Promote => "promote",
            Self::Shutdown => "shutdown",
        }
    }
}

/// Whether the restored server archives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ArchiveMode {
    /// As the server that was backed up: right for a replacement
    Preserve,
    /// Not at all, and its subscriptions do not run: right for a copy beside a server that lives
    Off,
}

/// Options of `restore`.
#[derive(Debug, Args)]
pub struct RestoreArgs {
    /// The data directory to make; must be empty or not exist
    #[arg(long, value_name = "DIR")]
    pub to: PathBuf,
    /// The group
    #[arg(long, default_value_t = 0)]
    pub group: u32,
    /// The database cluster, if the group was created anew and the repository has several
    #[arg(long, value_name = "N")]
    pub system_identifier: Option<u64>,
    /// A certain backup [default: the newest that leads to the target; to a name or a transaction,
    /// of which nobody knows where it is, the oldest]
    #[arg(long, value_name = "ID")]
    pub backup: Option<BackupId>,
    /// Stop at the last commit at or before a time: '2026-03-01 14:30:00+00' (a zone is required)
    #[arg(long, value_name = "TIME", value_parser = parse_time, group = "stop")]
    pub target_time: Option<DateTime<Utc>>,
    /// Stop at a position: 0/16B9188
    #[arg(long, value_name = "LSN", value_parser = parse_lsn, group = "stop")]
    pub target_lsn: Option<PgLsn>,
    /// Stop at a restore point made by `pg_create_restore_point()`
    #[arg(long, value_name = "NAME", value_parser = parse_restore_point, group = "stop")]
    pub target_name: Option<String>,
    /// Stop at the commit of a transaction
    #[arg(long, value_name = "XID", value_parser = clap::value_parser!(u64).range(XID_MIN..), group = "stop")]
    pub target_xid: Option<u64>,
    /// Stop as soon as the backup is consistent: immediate
    #[arg(long, value_name = "WORD", value_parser = ["immediate"], group = "stop")]
    pub target: Option<String>,
    /// The timeline to follow: latest, current or a number
    #[arg(long, value_name = "TIMELINE", default_value = "latest")]
    pub target_timeline: TargetTimeline,
    /// What PostgreSQL does at the target
    #[arg(long, value_enum, default_value = "pause")]
    #[arg(requires_ifs([("pause", "stop"), ("shutdown", "stop")]))]
    pub target_action: Action,
    /// Put a tablespace elsewhere; may be given several times. One that was made after the backup is
    /// made again by the recovery where it was: not beside the living server that has it
    #[arg(long, value_name = "OLD=NEW", value_parser = parse_tablespace)]
    pub tablespace: Vec<(PathBuf, PathBuf)>,
    /// Whether the restored server archives into the repository. There is no default: what is right
    /// for a replacement would mix the WAL of a copy into that of the server that lives on
    #[arg(long, value_enum)]
    pub archive_mode: ArchiveMode,
    /// Delete what is in the directories that the restore goes to. Refused under a server
    #[arg(long, conflicts_with = "resume")]
    pub force: bool,
    /// Go on with a restore that was stopped: only what is not on disk is fetched
    #[arg(long)]
    pub resume: bool,
    /// Print JSON, for programs; if nothing else was printed, how it failed: {"error": …}
    #[arg(long)]
    pub json: bool,
}

impl RestoreArgs {
    /// Where recovery is to stop.
    pub fn stop(&self) -> Target {
        if let Some(at) = self.target_time {
            Target::Time(at)
        } else if let Some(lsn) = self.target_lsn {
            Target::Lsn(lsn)
        } else if let Some(name) = &self.target_name {
            Target::Name(name.clone())
        } else if let Some(xid) = self.target_xid {
            Target::Xid(xid)
        } else if self.target.is_some() {
            Target::Immediate
        } else {
            Target::End
        }
    }
}

/// The first transaction that anybody can have begun. Source: `FirstNormalTransactionId`.
const XID_MIN: u64 = 3;
/// The longest name of a restore point, in bytes. Source: `MAXFNAMELEN`, with its end.
const RESTORE_POINT_BYTES_MAX: usize = 63;

/// An empty name is no target to PostgreSQL: it would recover to the end of the WAL.
fn parse_restore_point(text: &str) -> Result<String, String> {
    match text.len() {
        0 => Err("it is empty".to_owned()),
        1..=RESTORE_POINT_BYTES_MAX => Ok(text.to_owned()),
        len => Err(format!("{len} bytes; a restore point has at most {RESTORE_POINT_BYTES_MAX}")),
    }
}

fn parse_lsn(text: &str) -> Result<PgLsn, String> {
    text.parse().map_err(|_| "an LSN looks like 0/16B9188".to_owned())
}

/// The zones that are UTC to PostgreSQL, however they are written. Source: `timezonesets/Default`.
const UTC: [&str; 6] = ["UTC", "UCT", "UT", "GMT", "ZULU", "Z"];

/// Reads a time with a zone, as PostgreSQL prints it or as ISO 8601 has it.
fn parse_time(text: &str) -> Result<DateTime<Utc>, String> {
    let text = text.trim();
    let (time, zone) =
        text.split_at(text.trim_end_matches(|it: char| it.is_ascii_alphabetic()).len());
    let is_utc = UTC.iter().any(|it| it.eq_ignore_ascii_case(zone));
    let utc = is_utc.then(|| format!("{}Z", time.trim_end()));
    let iso = utc.as_deref().unwrap_or(text).replacen([' ', 't'], "T", 1);
    ["%Y-%m-%dT%H:%M:%S%.f%#z", "%Y-%m-%dT%H:%M%#z"]
        .iter()
        .find_map(|format| DateTime::parse_from_str(&iso, format).ok())
        .map(|at| at.to_utc())
        .ok_or_else(|| {
            "a time looks like '2026-03-01 14:30:00+00'; the zone must be there, because the \
             server's is not known"
                .to_owned()
        })
}

/// As `pg_basebackup --tablespace-mapping` takes it.
fn parse_tablespace(text: &str) -> Result<(PathBuf, PathBuf), String> {
    // No path of an argument has a zero byte.
    let text = text.replace(r"\=", "\0");
    match text.split('=').map(|it| it.replace('\0', "=")).collect::<Vec<_>>().as_slice() {
        [old, new] if old.starts_with('/') && new.starts_with('/') => Ok((old.into(), new.into())),
        _ => {
            Err(r"must be OLD=NEW with two absolute paths; write = in one of them as \=".to_owned())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn help_fits_a_terminal_and_names_our_configuration_file() {
        let mut command = Cli::command();
        command.build();
        for command in command.get_subcommands_mut().filter(|it| it.get_name() != "help") {
            let help = command.render_long_help().to_string();
            assert!(help.contains("[default: /etc/pgmesh/backup-agent.toml]"), "{help}");
            let width = help.lines().map(|line| line.chars().count()).max();
            assert!(width <= Some(100), "{width:?}:\n{help}");
        }
    }

    #[test]
    fn a_time_needs_a_zone() {
        let cases = [
            ("2026-03-01 14:30:00+00", Some("2026-03-01T14:30:00Z")),
            ("2026-03-01 14:30:00.5+01:30", Some("2026-03-01T13:00:00.500Z")),
            ("2026-03-01T14:30:00Z", Some("2026-03-01T14:30:00Z")),
            ("2026-03-01 14:30+02", Some("2026-03-01T12:30:00Z")),
            ("2026-03-01 14:30:00 UTC", Some("2026-03-01T14:30:00Z")),
            ("2026-03-01 14:30 UTC", Some("2026-03-01T14:30:00Z")),
            ("2026-03-01 14:30:00utc", Some("2026-03-01T14:30:00Z")),
            ("2026-03-01 14:30:00 GMT", Some("2026-03-01T14:30:00Z")),
            ("2026-03-01t14:30:00z", Some("2026-03-01T14:30:00Z")),
            ("2026-03-01 14:30:00 Zulu", Some("2026-03-01T14:30:00Z")),
            ("2026-03-01 14:30:00 m", None),
            ("2026-03-01 14:30:00 CET", None),
            ("2026-03-01 14:30:00", None),
            ("yesterday", None),
        ];
        for (text, expected) in cases {
            let expected = expected.map(|text| text.parse::<DateTime<Utc>>().unwrap());
            assert_eq!(parse_time(text).ok(), expected, "{text}");
        }
    }

    #[test]
    fn a_tablespace_is_mapped_as_pg_basebackup_does() {
        for (text, expected) in [
            ("/a=/b", Some(("/a", "/b"))),
            (r"/a\=1=/b\=2", Some(("/a=1", "/b=2"))),
            (r"/a\b=/c", Some((r"/a\b", "/c"))),
            ("/a=1=/b", None),
            ("/a=/b=2", None),
            (r"/a\=/b", None),
            ("a=/b", None),
            ("/a=b", None),
            ("/a", None),
        ] {
            let expected = expected.map(|(old, new)| (old.into(), new.into()));
            assert_eq!(parse_tablespace(text).ok(), expected, "{text}");
        }
    }

    /// PostgreSQL takes the exit code of wrong use, 2, for the end of the WAL; people do not.
    #[test]
    fn only_a_command_line_of_wal_fetch_is_one() {
        let cases = [
            ("wal-fetch 000000010000000000000003 pg_wal/RECOVERYXLOG", true),
            ("--config /etc/a.toml wal-fetch", true),
            ("--config=/etc/a.toml wal-fetch --fast", true),
            ("--konfig /etc/a.toml wal-fetch x y", true),
            ("restore --to wal-fetch --archive-mode off", false),
            ("--config wal-fetch list", false),
            ("list --config wal-fetch", false),
            ("--log-format wal-fetch", false),
            ("", false),
        ];
        for (line, expected) in cases {
            let words = ["backup-agent"].into_iter().chain(line.split_whitespace());
            assert_eq!(is_wal_fetch(words.map(OsString::from)), expected, "{line}");
        }
    }

    #[test]
    fn a_target_is_one_that_postgresql_takes_for_one() {
        let longest = "x".repeat(RESTORE_POINT_BYTES_MAX);
        let too_long = format!("{longest}x");
        for (case, targets, is_right) in [
            ("none", &[][..], true),
            ("two", &["--target-lsn", "0/1", "--target-xid", "731"], false),
            ("a name", &["--target-name", "before the release"], true),
            ("no name: the end of the WAL to PostgreSQL", &["--target-name", ""], false),
            ("the longest name", &["--target-name", &longest], true),
            ("a longer one", &["--target-name", &too_long], false),
            ("no position", &["--target-lsn", ""], false),
            ("the first transaction", &["--target-xid", "3"], true),
            ("one that commits nothing", &["--target-xid", "0"], false),
            ("without a target there is only one end", &["--target-action", "promote"], true),
            ("nowhere to shut down", &["--target-action", "shutdown"], false),
            ("nowhere to pause", &["--target-action", "pause"], false),
            ("there", &["--target-action", "shutdown", "--target-xid", "3"], true),
        ] {
            let line = ["backup-agent", "restore", "--to", "/x", "--archive-mode", "off"];
            let parsed = Cli::try_parse_from(line.iter().chain(targets));
            assert_eq!(parsed.is_ok(), is_right, "{case}");
        }
    }
}
