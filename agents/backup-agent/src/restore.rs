//! One restore, from the choice of a backup to a directory that PostgreSQL can start from.
//!
//! Every chunk is opened and checked before a byte of it is written, and chunks are independent,
//! so they are fetched and unpacked in parallel and in any order. `global/pg_control` gets its
//! name last: a directory that is not whole never starts.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;

use futures_util::StreamExt;
use shared::telemetry::chain;
use thiserror::Error;
use tracing::{info, warn};

use crate::catalog::Catalog;
use crate::config::Config;
use crate::container::{ContainerError, Kind};
use crate::layout::{
    CONTROL_FILE, CONTROL_FILE_UNTIL_DONE, Layout, clear, create, make_members, make_roots, sync,
};
use crate::lines::Lines;
use crate::manifest::{BackupId, Commit, ObjectRecord, part_name};
use crate::members::Members;
use crate::progress::Progress;
use crate::recovery::{Choice, Target, TargetTimeline, Unreachable, choose};
use crate::repository::{ObjectReader, Place, Repository, RepositoryError};
use crate::unpack::{STATE_FILE, begin_state, read_state, unpack};
use crate::wal::{Reach, Then, WalError, WalMap};

/// What is asked for.
#[derive(Clone, Debug)]
pub struct RestoreOptions {
    /// The data directory to make.
    pub to: PathBuf,
    /// The group.
    pub group: u32,
    /// The database cluster, where the repository has several of this group.
    pub system_identifier: Option<u64>,
    /// A certain backup.
    pub backup: Option<BackupId>,
    /// Where recovery is to stop.
    pub target: Target,
    /// Which timeline it follows.
    pub timeline: TargetTimeline,
    /// What PostgreSQL does at the target: `pause`, `promote` or `shutdown`.
    pub action: String,
    /// Other places for tablespaces: the location on the server, and here.
    pub tablespaces: Vec<(PathBuf, PathBuf)>,
    /// Empty directories that are not.
    pub force: bool,
    /// Go on with a restore that was stopped.
    pub resume: bool,
    /// Switch archiving off in the copy.
    pub archive_off: bool,
    /// How PostgreSQL fetches WAL.
    pub restore_command: String,
}

/// Why there is no restored directory.
#[derive(Debug, Error)]
pub enum RestoreError {
    /// The target cannot be reached.
    #[error(transparent)]
    Unreachable(#[from] Unreachable),
    /// The group has several database clusters.
    #[error(
        "the repository has several database clusters for group {group}: {}; \
         choose one with --system-identifier", list(.found)
    )]
    SeveralClusters {
        /// The group.
        group: u32,
        /// Their system identifiers.
        found: Vec<u64>,
    },
    /// Some commit objects cannot be read, and the choice is left to us.
    #[error("backup {backup_id} cannot be read: {reason}. Name another with --backup")]
    Unreadable {
        /// The backup.
        backup_id: BackupId,
        /// Why.
        reason: String,
    },
    /// The directory is in use.
    #[error(
        "{} holds {found}; restore into an empty directory, \
         or use --force to delete what is in it", path.display()
    )]
    NotEmpty {
        /// The directory.
        path: PathBuf,
        /// The first name in it.
        found: String,
    },
    /// A tablespace's own place is not empty, and nobody said that it may be used.
    #[error(
        "the backup has a tablespace at {}, which holds {found}: perhaps a living server's. \
         Put it elsewhere with --tablespace {}=NEW", path.display(), path.display()
    )]
    TablespaceInUse {
        /// The location.
        path: PathBuf,
        /// The first name in it.
        found: String,
    },
    /// `--force` deletes database clusters and nothing else.
    #[error(
        "{} holds {found} and is no data directory: --force deletes only what PostgreSQL or a \
         stopped restore has left. Choose another directory, or empty it yourself", path.display()
    )]
    NotOurs {
        /// The directory.
        path: PathBuf,
        /// The first name in it.
        found: String,
    },
    /// Two archives would lie in each other.
    #[error("{} and {} overlap: every tablespace needs a place of its own", one.display(), other.display())]
    Overlap {
        /// One place.
        one: PathBuf,
        /// The other.
        other: PathBuf,
    },
    /// A server may be running there.
    #[error(
        "{} has a postmaster.pid: a server may be running there. Stop it; if none runs, delete \
         that file. --force does not delete under a server", path.display()
    )]
    InUse {
        /// The directory.
        path: PathBuf,
    },
    /// There is nothing to go on with.
    #[error("{} holds no restore that was stopped; leave --resume away", path.display())]
    NothingToResume {
        /// The directory.
        path: PathBuf,
    },
    /// The restore that was stopped is of another backup.
    #[error(
        "{} holds a stopped restore that differs from this one: it says {found:?}, this one \
         {expected:?}. Give the same --backup and --tablespace, or start anew with --force",
        path.display()
    )]
    OtherRestore {
        /// The directory.
        path: PathBuf,
        /// What this restore is of, or where it goes.
        expected: String,
        /// What the one that was stopped says there.
        found: String,
    },
    /// A tablespace is to go nowhere sensible.
    #[error("--tablespace {}: the backup has no tablespace there; it has: {}", path.display(), list(.known))]
    NoSuchTablespace {
        /// The location that was named.
        path: PathBuf,
        /// The locations there are.
        known: Vec<String>,
    },
    /// Not enough room.
    #[error(
        "{} has room for {free_bytes} bytes, the backup needs {needed_bytes}; \
         make room or restore elsewhere", path.display()
    )]
    NoRoom {
        /// The directory.
        path: PathBuf,
        /// What is free there.
        free_bytes: u64,
        /// What is needed.
        needed_bytes: u64,
    },
    /// The file system failed.
    #[error("{operation} {}", path.display())]
    File {
        /// What was tried.
        operation: &'static str,
        /// With what.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// The table of files contradicts itself or the parts.
    #[error("backup {backup_id} contradicts itself: {reason}")]
    Inconsistent {
        /// The backup.
        backup_id: BackupId,
        /// How.
        reason: String,
    },
    /// WAL could not be looked at.
    #[error(transparent)]
    Wal(#[from] WalError),
    /// The repository failed.
    #[error(transparent)]
    Repository(#[from] RepositoryError),
}

impl From<ContainerError> for RestoreError {
    fn from(error: ContainerError) -> Self {
        Self::Repository(error.into())
    }
}

fn list<T: ToString>(found: &[T]) -> String {
    found.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

pub(crate) fn file_error(
    operation: &'static str,
    path: &Path,
) -> impl FnOnce(io::Error) -> RestoreError {
    let path = path.to_owned();
    move |source| RestoreError::File { operation, path, source }
}

/// What was restored.
#[derive(Clone, Debug)]
pub struct Restored {
    /// The backup.
    pub commit: Commit,
    /// How far its WAL goes.
    pub reach: Reach,
    /// Bytes unpacked by this run.
    pub bytes: u64,
}

/// Restores a backup into a directory.
///
/// # Errors
///
/// Each reason why the directory does not hold a whole backup. What was unpacked by then stays,
/// for `--resume`.
pub async fn restore(
    config: &Config,
    repository: &Repository,
    options: &RestoreOptions,
    progress: &Progress,
) -> Result<Restored, RestoreError> {
    progress.begin("reading the catalogue", 0);
    let place = choose_place(repository, options).await?;
    let catalog = Catalog::read(&place).await?;
    refuse_unreadable(&catalog, options)?;
    let segment_bytes = catalog.backups.last().map_or(16 << 20, |it| it.wal_segment_bytes);
    let wal = WalMap::read(&place, segment_bytes).await?;
    let asked = options.backup.as_ref();
    let Choice { backup, reach } =
        choose(&catalog.backups, &wal, &options.target, options.timeline, asked)?;
    if let Some(suspect) = &backup.suspect {
        warn!(backup_id = %backup.backup_id, reason = suspect.reason, "backup is suspect");
    }
    info!(
        backup_id = %backup.backup_id, recovery_target = %options.target, timeline = reach.timeline,
        "restore started"
    );

    if options.timeline == TargetTimeline::Latest {
        for (timeline, segment) in wal.left_behind(backup, reach.timeline) {
            warn!(
                timeline,
                segment,
                followed = reach.timeline,
                "another timeline goes on after the one that is followed branched off it; \
                 choose with --target-timeline"
            );
        }
    }
    let members = read_members(&place, backup).await?;
    let manifest = open_manifest(&place, backup).await?;
    // All of it, before anything is deleted; it is not kept.
    read_manifest(&manifest, |_| Ok(())).await?;
    let layout = Arc::new(Layout::new(backup, options)?);
    let done = if options.resume {
        read_state(&layout, &backup.backup_id)?
    } else {
        clear(&layout, options)?;
        BTreeSet::new()
    };
    // What a stopped restore has on disk takes its room already.
    let needed_bytes = if options.resume { 0 } else { backup.plain_bytes() };
    make_roots(&layout, &members, needed_bytes)?;
    if !options.resume {
        begin_state(&layout, &backup.backup_id)?;
    }
    make_members(&layout, backup, &members)?;
    progress.begin("restoring", backup.plain_bytes());
    let bytes = unpack(config, &place, backup, members, &layout, done, progress).await?;

    progress.begin("writing to disk", 0);
    write_manifest(&layout, &manifest).await?;
    finish(&layout, &reach, options)?;
    info!(backup_id = %backup.backup_id, bytes, to = %options.to.display(), "restore completed");
    Ok(Restored { commit: backup.clone(), reach, bytes })
}

/// The database cluster to restore: the one asked for, or the only one.
async fn choose_place(
    repository: &Repository,
    options: &RestoreOptions,
) -> Result<Place, RestoreError> {
    if let Some(system_identifier) = options.system_identifier {
        return Ok(repository.place(options.group, system_identifier));
    }
    let mut places = repository.places(options.group).await?;
    match places.len() {
        0 => Err(Unreachable::NoBackup.into()),
        1 => Ok(places.remove(0)),
        _ => {
            let found = places.iter().map(|place| place.system_identifier).collect();
            Err(RestoreError::SeveralClusters { group: options.group, found })
        }
    }
}

/// A damaged commit object may be the newest backup's: only a person may pass over it.
fn refuse_unreadable(catalog: &Catalog, options: &RestoreOptions) -> Result<(), RestoreError> {
    let concerns = |id: &BackupId| options.backup.as_ref().is_none_or(|asked| asked == id);
    for (backup_id, error) in &catalog.unreadable {
        if concerns(backup_id) {
            let reason = chain(error).to_string();
            return Err(RestoreError::Unreadable { backup_id: backup_id.clone(), reason });
        }
    }
    Ok(())
}

/// Reads the table of files.
///
/// # Errors
///
/// The repository could not be read, or holds something else than the commit object names.
pub(crate) async fn read_members(
    place: &Place,
    backup: &Commit,
) -> Result<Members, RepositoryError> {
    let reader = open_recorded(place, backup, Kind::Files, "files", &backup.files).await?;
    let (mut members, mut lines) = (Members::default(), Lines::default());
    let mut pieces = pin!(reader.pieces(1));
    while let Some(piece) = pieces.next().await {
        let read = lines.push(&piece?, |line| {
            members.push(serde_json::from_slice(line)?);
            Ok(())
        });
        let name = || backup.backup_id.object("files");
        read.map_err(|source| RepositoryError::Content { name: name(), source })?;
    }
    Ok(members)
}

/// Opens the server's manifest for reading.
///
/// # Errors
///
/// As [`read_members`].
pub(crate) async fn open_manifest(
    place: &Place,
    backup: &Commit,
) -> Result<ObjectReader, RepositoryError> {
    open_recorded(place, backup, Kind::Manifest, "manifest", &backup.manifest).await
}

/// Opens a part for reading.
///
/// # Errors
///
/// As [`read_members`].
pub(crate) async fn open_part(
    place: &Place,
    backup: &Commit,
    part: usize,
) -> Result<ObjectReader, RepositoryError> {
    open_recorded(place, backup, Kind::Part, &part_name(part), &backup.parts[part]).await
}

/// Opens an object of a backup, and checks that it is the one that the commit object names.
async fn open_recorded(
    place: &Place,
    backup: &Commit,
    kind: Kind,
    name: &str,
    record: &ObjectRecord,
) -> Result<ObjectReader, RepositoryError> {
    let name = backup.backup_id.object(name);
    let reader = place.open(kind, &name, Some(record.object_bytes)).await?;
    reader.opener.require_salt(&record.salt)?;
    Ok(reader)
}

/// Hands the server's manifest to `take`, piece by piece.
async fn read_manifest(
    manifest: &ObjectReader,
    mut take: impl FnMut(&[u8]) -> Result<(), RestoreError>,
) -> Result<(), RestoreError> {
    let mut pieces = pin!(manifest.clone().pieces(1));
    while let Some(piece) = pieces.next().await {
        take(&piece?)?;
    }
    Ok(())
}

/// Settings of a recovery that a copy must not inherit from where the backup was taken.
const RECOVERY_SETTINGS: [&str; 6] = [
    "restore_command",
    "recovery_",
    "archive_cleanup_command",
    "primary_conninfo",
    "primary_slot_name",
    "standby_mode",
];

/// Writes the server's manifest, for `pg_verifybackup`.
async fn write_manifest(layout: &Layout, manifest: &ObjectReader) -> Result<(), RestoreError> {
    let path = layout.data.join("backup_manifest");
    let begun = create(layout, &path, 0o600).and_then(|file| file.set_len(0).map(|()| file));
    let mut file = begun.map_err(file_error("write", &path))?;
    read_manifest(manifest, |text| file.write_all(text).map_err(file_error("write", &path))).await
}

/// Writes the recovery settings, syncs everything, and lets the directory start.
fn finish(layout: &Layout, reach: &Reach, options: &RestoreOptions) -> Result<(), RestoreError> {
    let data = &layout.data;
    let write = |name: &str, content: &[u8]| {
        let path = data.join(name);
        let written = || -> io::Result<()> {
            let mut file = create(layout, &path, 0o600)?;
            file.set_len(0)?;
            file.write_all(content)
        };
        written().map_err(file_error("write", &path))
    };
    let auto_conf = data.join("postgresql.auto.conf");
    // Bytes: a setting may be in any encoding.
    let before = match fs::read(&auto_conf) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(file_error("read", &auto_conf)(error)),
    };
    let mut text = Vec::new();
    for line in before.split(|byte| *byte == b'\n') {
        if !line.is_empty() && !is_recovery_setting(line) {
            text.extend_from_slice(line);
            text.push(b'\n');
        }
    }
    for (name, value) in recovery_settings(reach, options) {
        let line = format!("{name} = '{}'\n", value.replace('\'', "''"));
        text.extend_from_slice(line.as_bytes());
    }
    write("postgresql.auto.conf", &text)?;

    // A standby's backup brings its own; with it the copy would follow its old primary.
    remove(&data.join("standby.signal"))?;
    write("recovery.signal", b"")?;
    sync(layout).map_err(file_error("write to disk", data))?;
    let (control, until_done) = (data.join(CONTROL_FILE), data.join(CONTROL_FILE_UNTIL_DONE));
    fs::rename(&until_done, &control).map_err(file_error("rename to", &control))?;
    remove(&data.join(STATE_FILE))?;
    sync(layout).map_err(file_error("write to disk", data))
}

/// Tells whether a line sets one of [`RECOVERY_SETTINGS`]; case and leading blanks do not matter.
fn is_recovery_setting(line: &[u8]) -> bool {
    let line = line.trim_ascii_start();
    RECOVERY_SETTINGS.iter().any(|name| {
        line.get(..name.len()).is_some_and(|start| start.eq_ignore_ascii_case(name.as_bytes()))
    })
}

fn remove(path: &Path) -> Result<(), RestoreError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(file_error("delete", path)(error))
        }
        _ => Ok(()),
    }
}

/// The settings with which PostgreSQL recovers to the target.
fn recovery_settings(reach: &Reach, options: &RestoreOptions) -> Vec<(&'static str, String)> {
    let mut restore_command = options.restore_command.clone();
    if options.target != Target::End && reach.then != Then::End {
        // Only a target lets the recovery end where WAL is missing.
        restore_command = format!("{restore_command} --until {}", reach.until_lsn);
    }
    let mut settings = vec![
        ("restore_command", restore_command),
        // A number: `latest` would take the newest in the archive, which need not descend from
        // this backup.
        ("recovery_target_timeline", reach.timeline.to_string()),
    ];
    match &options.target {
        Target::End => {}
        Target::Immediate => settings.push(("recovery_target", "immediate".to_owned())),
        Target::Time(at) => {
            let text = at.format("%Y-%m-%d %H:%M:%S%.6f+00").to_string();
            settings.push(("recovery_target_time", text));
        }
        Target::Lsn(lsn) => settings.push(("recovery_target_lsn", lsn.to_string())),
        Target::Name(name) => settings.push(("recovery_target_name", name.clone())),
        Target::Xid(xid) => settings.push(("recovery_target_xid", xid.to_string())),
    }
    if options.target != Target::End {
        settings.push(("recovery_target_action", options.action.clone()));
    }
    if options.archive_off {
        settings.push(("archive_mode", "off".to_owned()));
    }
    settings
}
