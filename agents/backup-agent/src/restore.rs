//! One restore, from the choice of a backup to a directory that PostgreSQL can start from.
//!
//! Every chunk is opened and checked before a byte of it is written, and chunks are independent,
//! so they are fetched and unpacked in parallel and in any order. `global/pg_control` gets its
//! name last: a directory that is not whole never starts.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;

use futures_util::StreamExt;
use shared::store::{StoreError, StoreErrorKind};
use shared::telemetry::chain;
use thiserror::Error;
use tracing::{info, warn};

use crate::backup::require_parts;
use crate::catalog::Catalog;
use crate::config::Config;
use crate::container::{ContainerError, Kind};
use crate::finish::{finish, warn_of_server};
use crate::layout::{
    Layout, clear, create, lock, make_members, make_roots, require_room, to_empty, try_roots,
};
use crate::lines::Lines;
use crate::manifest::{BackupId, Commit, ObjectRecord, part_name};
use crate::members::Members;
use crate::progress::Progress;
use crate::recovery::{Choice, Target, TargetTimeline, Unreachable, choose};
use crate::repository::{ObjectReader, Place, Repository, RepositoryError};
use crate::tablespaces::refuse_later_tablespaces;
use crate::unpack::{Left, begin_state, read_state, unpack};
use crate::wal::{LeftBehind, Reach, WalError, WalMap};

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

impl RestoreOptions {
    /// Whether the server stays in recovery at the target, for a look.
    pub fn pauses(&self) -> bool {
        self.target != Target::End && self.action == "pause"
    }
}

/// Why there is no restored directory.
#[derive(Debug, Error)]
pub enum RestoreError {
    /// The target cannot be reached.
    #[error(transparent)]
    Unreachable(#[from] Unreachable),
    /// No backups at all.
    #[error(
        "there is no backup of cluster {cluster}, group {group} in {location}; \
         take one with `backup-agent backup`"
    )]
    NoBackup {
        /// The cluster.
        cluster: String,
        /// The group.
        group: u32,
        /// The repository.
        location: String,
    },
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
    /// The database cluster that is asked for is not there.
    #[error(
        "there is no backup of system identifier {asked} for group {group} in {location}; there are: {}",
        list(.found)
    )]
    NoSuchCluster {
        /// The system identifier asked for.
        asked: u64,
        /// The group.
        group: u32,
        /// The repository.
        location: String,
        /// Those that there are.
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
    /// The backups were sealed with other keys than those that are configured.
    #[error(
        "no backup can be read with the configured keys: {reason}. Put the right key into its file, or add \
         the one that is missing to encryption.keys"
    )]
    NoKey {
        /// What the first one says.
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
         Put it elsewhere with --tablespace {}=NEW", path.display(), escaped(path)
    )]
    TablespaceInUse {
        /// The location.
        path: PathBuf,
        /// The first name in it.
        found: String,
    },
    /// The server made a tablespace after the backup, and its place here is not empty.
    #[error(
        "after the backup a tablespace was made at {}, which holds {found}: perhaps a living \
         server's. The recovery would write over it. Restore on another machine, or empty it \
         yourself", path.display()
    )]
    LaterTablespaceInUse {
        /// The location.
        path: PathBuf,
        /// The first name in it.
        found: String,
    },
    /// A server that runs here has a tablespace that the backup has not.
    #[error(
        "the server in {} has a tablespace at {}, which the backup has not: the recovery would make it \
         again there, and write over that server's files. Restore on another machine or in a \
         container, or to a time before it was made", server.display(), path.display()
    )]
    LivingTablespace {
        /// The location.
        path: PathBuf,
        /// The server's data directory.
        server: PathBuf,
    },
    /// A tablespace's place is not empty, and is not the data directory's that is replaced.
    #[error(
        "{} holds {found}, and {} has no link to it: perhaps it is a living server's. Choose \
         another place, or empty it yourself", path.display(), data.display()
    )]
    TablespaceOfNobody {
        /// The place.
        path: PathBuf,
        /// The first name in it.
        found: String,
        /// The data directory.
        data: PathBuf,
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
    /// It lies in another server's data directory.
    #[error(
        "{} lies in {}, which is a server's data directory or tablespace: choose a place beside it",
        path.display(), data.display()
    )]
    Inside {
        /// Where the restore would go.
        path: PathBuf,
        /// The data directory, or the tablespace.
        data: PathBuf,
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
    /// Another restore writes there.
    #[error(
        "another restore into {} is under way on this machine: find it with fuser -v {}, and wait for it or \
         stop it", path.display(), path.display()
    )]
    UnderWay {
        /// The directory.
        path: PathBuf,
    },
    /// There is nothing to go on with.
    #[error("{} holds no restore that was stopped; leave --resume away", path.display())]
    NothingToResume {
        /// The directory.
        path: PathBuf,
    },
    /// A restore with `--force` was stopped before it wrote anything.
    #[error(
        "{} holds what is left of a cluster that --force was deleting, and nothing of the backup: start \
         anew with --force, without --resume", path.display()
    )]
    OnlyEmptied {
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
    /// A tablespace is to go to two places.
    #[error("--tablespace {}=NEW is given twice: say once where it goes", path.display())]
    MappedTwice {
        /// The location that was named.
        path: PathBuf,
    },
    /// Not enough room.
    #[error(
        "{} has room for {free_bytes} bytes, what goes to its file system needs {needed_bytes}; \
         make room or restore elsewhere", path.display()
    )]
    NoRoom {
        /// A directory of the file system.
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

impl RestoreError {
    /// What to do about what the restore `left`, if that is not the message's own word.
    pub fn next_step(&self, left: Left) -> &'static str {
        const RESUME: &str = "; go on with --resume once the cause is gone";
        const OLDER: &str = "; another backup may be whole: name it with --backup";
        const AGAIN: &str = "; what was there is deleted, or a part of it: once the cause is gone, start \
                             anew with --force";
        const OTHER: &str = "; --resume cannot help: take another backup with --backup and --force";
        let is_gone = |error: &StoreError| {
            error.kind == StoreErrorKind::NotFound && error.operation != "list"
        };
        let is_in_backup = match self {
            Self::Repository(RepositoryError::Store(error)) => is_gone(error),
            Self::Repository(error) => error.is_damage(),
            Self::Inconsistent { .. } => true,
            _ => false,
        };
        match self {
            _ if is_in_backup && left == Left::Nothing => OLDER,
            _ if is_in_backup => OTHER,
            _ if left == Left::Nothing => "",
            Self::Repository(_) | Self::Wal(_) | Self::File { .. } | Self::NoRoom { .. } => {
                if left == Left::Emptied { AGAIN } else { RESUME }
            }
            Self::NotEmpty { .. } if left == Left::Begun => {
                "; a restore was stopped there: go on with it with --resume"
            }
            // Refused before anything was done, by words that say what to do.
            _ => "",
        }
    }
}

impl From<ContainerError> for RestoreError {
    fn from(error: ContainerError) -> Self {
        Self::Repository(error.into())
    }
}

/// A location as `--tablespace` takes it.
fn escaped(path: &Path) -> String {
    path.display().to_string().replace('=', r"\=")
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
    let no_backup = || RestoreError::NoBackup {
        cluster: config.cluster.clone(),
        group: options.group,
        location: repository.location(),
    };
    let place = choose_place(repository, options).await?.ok_or_else(no_backup)?;
    let catalog = Catalog::read(&place).await?;
    say_unreadable(&catalog, options)?;
    if catalog.backups.is_empty() {
        return Err(no_backup());
    }
    let segment_bytes = catalog.backups.last().map_or(16 << 20, |it| it.wal_segment_bytes);
    let wal = WalMap::read(&place, segment_bytes).await?;
    let asked = options.backup.as_ref();
    let Choice { backup, reach } =
        choose(&catalog.backups, &wal, &options.target, options.timeline, asked)?;
    refuse_to_guess(&catalog, &backup.backup_id, options)?;
    refuse_later_tablespaces(&catalog, backup, options)?;
    say(backup, &reach, &wal, options);
    let members = read_members(&place, backup).await?;
    let manifest = open_manifest(&place, backup).await?;
    // All of it, before anything is deleted; it is not kept.
    read_manifest(&manifest, |_| Ok(())).await?;
    require_parts(&place, backup).await?;
    let layout = Arc::new(Layout::new(backup, options)?);
    // Before anything is deleted, and until all is written.
    let mut locks = BTreeMap::new();
    lock(&layout, &mut locks)?;
    let done = if options.resume {
        read_state(&layout, &backup.backup_id)?
    } else {
        let full = to_empty(&layout, options)?;
        // What a stopped restore has on disk takes its room already: this is for a new one alone.
        require_room(&layout, &members, &full)?;
        try_roots(&layout)?;
        lock(&layout, &mut locks)?;
        clear(&layout, &full)?;
        BTreeSet::new()
    };
    make_roots(&layout, &members)?;
    lock(&layout, &mut locks)?;
    if !options.resume {
        begin_state(&layout, &backup.backup_id)?;
    }
    make_members(&layout, backup, &members)?;
    progress.begin("restoring", backup.plain_bytes());
    let bytes = unpack(config, &place, backup, members, &layout, done, progress).await?;

    progress.begin("writing to disk", 0);
    write_manifest(&layout, &manifest).await?;
    finish(&layout, &backup.backup_id, &reach, options)?;
    drop(locks);
    warn_of_server(&layout, options).await;
    info!(backup_id = %backup.backup_id, bytes, to = %options.to.display(), "restore completed");
    Ok(Restored { commit: backup.clone(), reach, bytes })
}

/// Says what will be restored, before anything is done.
fn say(backup: &Commit, reach: &Reach, wal: &WalMap, options: &RestoreOptions) {
    if let Some(suspect) = &backup.suspect {
        warn!(backup_id = %backup.backup_id, reason = suspect.reason, "backup is suspect");
    }
    info!(
        backup_id = %backup.backup_id,
        finished_at = %backup.finished_at,
        recovery_target = %options.target,
        timeline = reach.timeline,
        until_lsn = %reach.until_lsn,
        until = reach.until.map(tracing::field::display),
        "restore started"
    );
    if options.timeline != TargetTimeline::Latest {
        return;
    }
    let followed = reach.timeline;
    if let Ok(Some(own)) = wal.own(None)
        && !wal.leads(backup, own)
    {
        warn!(
            newest = own,
            followed, "the newest timeline is another one: what it has is not in what is restored"
        );
    }
    let is_of_backup = |left: &LeftBehind| left.timeline >= backup.timeline;
    for left in wal.left_behind(followed).filter(is_of_backup) {
        warn!(
            timeline = left.timeline,
            from_lsn = %left.from_lsn,
            until_lsn = %left.until_lsn,
            followed,
            "another timeline goes on after the one that is followed branched off it; \
             choose with --target-timeline"
        );
    }
}

/// The database cluster to restore: the one asked for, or the only one; `None` if there is none.
async fn choose_place(
    repository: &Repository,
    options: &RestoreOptions,
) -> Result<Option<Place>, RestoreError> {
    let places = repository.places(options.group).await?;
    let found: Vec<_> = places.iter().map(|place| place.system_identifier).collect();
    let chosen = one_of(found, options, || repository.location())?;
    Ok(places.into_iter().find(|place| Some(place.system_identifier) == chosen))
}

/// Which of the database clusters that were found is meant.
fn one_of(
    found: Vec<u64>,
    options: &RestoreOptions,
    location: impl Fn() -> String,
) -> Result<Option<u64>, RestoreError> {
    let group = options.group;
    match (options.system_identifier, found.as_slice()) {
        (_, []) => Ok(None),
        (Some(asked), _) if found.contains(&asked) => Ok(Some(asked)),
        (Some(asked), _) => {
            Err(RestoreError::NoSuchCluster { asked, group, location: location(), found })
        }
        (None, [only]) => Ok(Some(*only)),
        (None, _) => Err(RestoreError::SeveralClusters { group, found }),
    }
}

/// Says which backups cannot be read, and refuses if the one that is asked for is among them, or if
/// there is no other.
fn say_unreadable(catalog: &Catalog, options: &RestoreOptions) -> Result<(), RestoreError> {
    for (backup_id, error) in &catalog.unreadable {
        let reason = chain(error).to_string();
        if catalog.is_locked() {
            return Err(RestoreError::NoKey { reason });
        }
        if options.backup.as_ref() == Some(backup_id) || catalog.backups.is_empty() {
            return Err(RestoreError::Unreadable { backup_id: backup_id.clone(), reason });
        }
        warn!(%backup_id, error = reason, "backup cannot be read: it is passed over");
    }
    Ok(())
}

/// Only a person may pass over a backup that might have been the one to start from, if that makes a
/// difference.
fn refuse_to_guess(
    catalog: &Catalog,
    chosen: &BackupId,
    options: &RestoreOptions,
) -> Result<(), RestoreError> {
    let matters = |id: &BackupId| options.backup.is_none() && options.target.depends_on(id, chosen);
    match catalog.unreadable.iter().find(|(id, _)| matters(id)) {
        Some((backup_id, error)) => {
            let reason = chain(error).to_string();
            Err(RestoreError::Unreadable { backup_id: backup_id.clone(), reason })
        }
        None => Ok(()),
    }
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
    let reader = open_table(place, backup).await?;
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

/// Opens the table of files for reading.
///
/// # Errors
///
/// As [`read_members`].
pub(crate) async fn open_table(
    place: &Place,
    backup: &Commit,
) -> Result<ObjectReader, RepositoryError> {
    open_recorded(place, backup, Kind::Files, "files", &backup.files).await
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

/// Writes the server's manifest, for `pg_verifybackup`.
async fn write_manifest(layout: &Layout, manifest: &ObjectReader) -> Result<(), RestoreError> {
    let path = layout.data.join("backup_manifest");
    let begun = create(layout, &path, 0o600).and_then(|file| file.set_len(0).map(|()| file));
    let mut file = begun.map_err(file_error("write", &path))?;
    read_manifest(manifest, |text| file.write_all(text).map_err(file_error("write", &path))).await
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// To the end, beside a server that lives.
    pub(crate) fn options() -> RestoreOptions {
        RestoreOptions {
            to: PathBuf::from("/to"),
            group: 0,
            system_identifier: None,
            backup: None,
            target: Target::End,
            timeline: TargetTimeline::Latest,
            action: "pause".to_owned(),
            tablespaces: Vec::new(),
            force: false,
            resume: false,
            archive_off: true,
            restore_command: String::new(),
        }
    }

    #[test]
    fn a_cluster_that_is_not_there_is_told_from_none() {
        let options = |system_identifier| RestoreOptions { system_identifier, ..options() };
        let nothing: Result<_, &str> = Ok(None);
        for (found, asked, expected) in [
            (&[][..], None, nothing),
            (&[], Some(5), nothing),
            (&[7], None, Ok(Some(7))),
            (&[7, 8], Some(8), Ok(Some(8))),
            (&[7, 8], None, Err("several database clusters for group 0: 7, 8")),
            (&[7, 8], Some(5), Err("system identifier 5 for group 0 in here; there are: 7, 8")),
        ] {
            let chosen = one_of(found.to_vec(), &options(asked), || "here".to_owned());
            match (chosen, expected) {
                (Ok(chosen), Ok(expected)) => assert_eq!(chosen, expected, "{found:?} {asked:?}"),
                (Err(error), Err(says)) => assert!(error.to_string().contains(says), "{error}"),
                (chosen, _) => panic!("{found:?} {asked:?}: {chosen:?}"),
            }
        }
    }

    #[test]
    fn a_restore_is_resumed_only_where_that_can_help() {
        let (path, found) = (|| PathBuf::from("/x"), || "y".to_owned());
        let store = |kind, operation| {
            let (key, source) = ("k".to_owned(), "no".into());
            RestoreError::Repository(StoreError { operation, key, kind, source }.into())
        };
        let damaged = ContainerError::Damaged { name: found(), chunk: 1, chunks: 2 };
        for (error, resume, other) in [
            (store(StoreErrorKind::Unavailable, "get"), true, false),
            (store(StoreErrorKind::NotFound, "list"), true, false),
            (store(StoreErrorKind::NotFound, "get"), false, true),
            (damaged.into(), false, true),
            (file_error("write", Path::new("/x"))(io::ErrorKind::StorageFull.into()), true, false),
            (RestoreError::NotEmpty { path: path(), found: found() }, true, false),
            (RestoreError::UnderWay { path: path() }, false, false),
            (RestoreError::NothingToResume { path: path() }, false, false),
        ] {
            let next = error.next_step(Left::Begun);
            let says = (next.contains("with --resume"), next.contains("cannot help"));
            assert_eq!(says, (resume, other), "{error}: {next}");
            let nothing = error.next_step(Left::Nothing);
            assert_eq!(!nothing.is_empty(), other, "{error}: {nothing}");
            assert!(!nothing.contains("--resume"), "{error}: {nothing}");
            let emptied = error.next_step(Left::Emptied);
            assert!(!emptied.contains("with --resume"), "{error}: {emptied}");
        }
    }
}
