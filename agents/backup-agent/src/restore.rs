//! One restore, from the choice of a backup to a directory that PostgreSQL can start from.
//!
//! Every chunk is opened and checked before a byte of it is written, and chunks are independent,
//! so they are fetched and unpacked in parallel and in any order. `global/pg_control` gets its
//! name last: a directory that is not whole never starts.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{
    DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, symlink,
};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use shared::telemetry::chain;
use thiserror::Error;
use tokio::task::JoinSet;
use tracing::{info, warn};

use crate::catalog::Catalog;
use crate::config::Config;
use crate::container::{ContainerError, Kind};
use crate::manifest::{BackupId, Commit, part_name, read_files};
use crate::progress::Progress;
use crate::recovery::{Choice, Target, TargetTimeline, Unreachable, choose};
use crate::repository::{ObjectReader, Place, Repository, RepositoryError};
use crate::tar::{Member, MemberKind, is_inside};
use crate::wal::{Reach, WalError, WalMap};

/// Chunks fetched by one request and unpacked by one thread: 8 MiB of files at a time.
const CHUNKS_PER_JOB: u32 = 8;
/// How much is unpacked between two notes of what is on disk, in bytes: what a resumed restore
/// fetches again at most.
const NOTE_EVERY_BYTES: u64 = 1 << 30;
/// What a restore under way is known by, in the data directory.
const STATE_FILE: &str = ".pgmesh-restore";
/// `global/pg_control` until the restore is whole.
const CONTROL_FILE: &str = "global/pg_control";
const CONTROL_FILE_UNTIL_DONE: &str = "global/pg_control.pgmesh-restore";

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
    /// A server may be running there.
    #[error(
        "{} has a postmaster.pid: a server may be running there. Stop it; \
         --force does not delete under a server", path.display()
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
        "{} holds a stopped restore of backup {found}, and this one would be of {expected}; \
         name the backup with --backup {found}, or start anew with --force", path.display()
    )]
    OtherRestore {
        /// The directory.
        path: PathBuf,
        /// The backup of this restore.
        expected: BackupId,
        /// The backup of the one that was stopped.
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

fn file_error(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> RestoreError {
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

    let (members, manifest) = read_tables(&place, backup).await?;
    let layout = Arc::new(Layout::new(backup, options)?);
    let done = prepare(&layout, backup, &members, options)?;
    progress.begin("restoring", backup.plain_bytes());
    let bytes = unpack(config, &place, backup, members, &layout, done, progress).await?;

    progress.begin("writing to disk", 0);
    finish(&layout, &manifest, &reach, options)?;
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

/// Reads the table of files and the server's manifest, and checks that they are the ones that
/// the commit object names.
///
/// # Errors
///
/// The repository could not be read, or holds something else under these names.
pub async fn read_tables(
    place: &Place,
    backup: &Commit,
) -> Result<(Vec<Member>, Vec<u8>), RepositoryError> {
    let mut tables = Vec::new();
    for (kind, name, record) in
        [(Kind::Files, "files", &backup.files), (Kind::Manifest, "manifest", &backup.manifest)]
    {
        let name = backup.backup_id.object(name);
        let (content, salt) = place.get(kind, &name).await?;
        if salt != record.salt {
            return Err(ContainerError::Replaced { name }.into());
        }
        tables.push(content);
    }
    let manifest = tables.pop().unwrap_or_default();
    let files = tables.pop().unwrap_or_default();
    let name = backup.backup_id.object("files");
    let members = read_files(&files).map_err(|source| RepositoryError::Content { name, source })?;
    Ok((members, manifest))
}

/// Where each archive of the backup goes.
#[derive(Debug)]
struct Layout {
    data: PathBuf,
    /// The root of each archive, in the order of the stream.
    roots: Vec<PathBuf>,
    /// The links to make below `pg_tblspc`: object id and location.
    links: Vec<(u32, PathBuf)>,
    /// Who is to own the files, if that is not who we are.
    owner: Option<(u32, u32)>,
}

impl Layout {
    fn new(backup: &Commit, options: &RestoreOptions) -> Result<Self, RestoreError> {
        let known: Vec<String> =
            backup.archives.iter().filter_map(|archive| archive.location.clone()).collect();
        for (from, _) in &options.tablespaces {
            if !known.iter().any(|location| Path::new(location) == from) {
                return Err(RestoreError::NoSuchTablespace { path: from.clone(), known });
            }
        }
        let (mut roots, mut links) = (Vec::new(), Vec::new());
        for archive in &backup.archives {
            let (Some(oid), Some(location)) = (archive.tablespace_oid, &archive.location) else {
                roots.push(options.to.clone());
                continue;
            };
            if Path::new(location).is_relative() {
                // An in-place tablespace is a directory below pg_tblspc, without a link.
                roots.push(options.to.join(location));
                continue;
            }
            let mapped = options.tablespaces.iter().find(|(from, _)| from == Path::new(location));
            let root = mapped.map_or_else(|| PathBuf::from(location), |(_, to)| to.clone());
            links.push((oid, root.clone()));
            roots.push(root);
        }
        Ok(Self { data: options.to.clone(), roots, links, owner: owner(&options.to) })
    }

    /// Where a member goes; `pg_control` under its provisional name.
    fn path(&self, member: &Member) -> Option<PathBuf> {
        let root = self.roots.get(member.archive as usize)?;
        if !is_inside(&member.path) {
            return None;
        }
        let is_control = *root == self.data && member.path == CONTROL_FILE;
        Some(root.join(if is_control { CONTROL_FILE_UNTIL_DONE } else { &member.path }))
    }

    fn own(&self, path: &Path) -> io::Result<()> {
        match self.owner {
            Some((uid, gid)) => std::os::unix::fs::lchown(path, Some(uid), Some(gid)),
            None => Ok(()),
        }
    }
}

/// Root restores for whoever owns the directory, or the one above it: PostgreSQL does not start
/// as root.
fn owner(to: &Path) -> Option<(u32, u32)> {
    if !rustix::process::geteuid().is_root() {
        return None;
    }
    let existing = to.ancestors().find_map(|path| fs::metadata(path).ok())?;
    (existing.uid() != 0).then(|| (existing.uid(), existing.gid()))
}

/// A stretch of chunks of one part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Job {
    part: usize,
    first: u32,
}

/// Makes directories, links and empty files; returns the jobs that an earlier run has done.
fn prepare(
    layout: &Layout,
    backup: &Commit,
    members: &[Member],
    options: &RestoreOptions,
) -> Result<BTreeSet<Job>, RestoreError> {
    let done = if options.resume {
        read_state(&layout.data, &backup.backup_id)?
    } else {
        let mut roots = layout.roots.clone();
        roots.sort();
        roots.dedup();
        for root in roots.iter().filter(|root| root.exists()) {
            empty(root, options.force)?;
        }
        BTreeSet::new()
    };
    for root in &layout.roots {
        make_directory(layout, root, 0o700)?;
    }
    require_room(layout, backup, &done)?;
    if !options.resume {
        let path = layout.data.join(STATE_FILE);
        fs::write(&path, format!("{}\n", backup.backup_id)).map_err(file_error("write", &path))?;
    }
    for member in members {
        let path = layout.path(member).ok_or_else(|| RestoreError::Inconsistent {
            backup_id: backup.backup_id.clone(),
            reason: format!("the path {:?} leaves the data directory", member.path),
        })?;
        match &member.kind {
            MemberKind::Directory => make_directory(layout, &path, member.mode)?,
            MemberKind::File if member.size == 0 => {
                create(layout, &path, member.mode).map_err(file_error("create", &path))?;
            }
            MemberKind::File => {}
            // Tablespaces get theirs below; the server has no other links, and one that somebody
            // made by hand is made again as it was.
            MemberKind::Symlink { .. } if member.path.starts_with("pg_tblspc/") => {}
            MemberKind::Symlink { target } => make_link(layout, Path::new(target), &path)?,
        }
    }
    for (oid, location) in &layout.links {
        make_link(layout, location, &layout.data.join(format!("pg_tblspc/{oid}")))?;
    }
    Ok(done)
}

/// Refuses a directory that is not empty, or empties it.
fn empty(path: &Path, force: bool) -> Result<(), RestoreError> {
    let entries = fs::read_dir(path).map_err(file_error("read", path))?;
    let entries: Vec<_> = entries.collect::<Result<_, _>>().map_err(file_error("read", path))?;
    let Some(first) = entries.first() else { return Ok(()) };
    if path.join("postmaster.pid").exists() {
        return Err(RestoreError::InUse { path: path.to_owned() });
    }
    if !force {
        let found = first.file_name().to_string_lossy().into_owned();
        return Err(RestoreError::NotEmpty { path: path.to_owned(), found });
    }
    info!(path = %path.display(), entries = entries.len(), "directory emptied");
    for entry in entries {
        let path = entry.path();
        let is_directory = entry.file_type().map_err(file_error("read", &path))?.is_dir();
        let removed = if is_directory { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        removed.map_err(file_error("delete", &path))?;
    }
    Ok(())
}

fn require_room(
    layout: &Layout,
    backup: &Commit,
    done: &BTreeSet<Job>,
) -> Result<(), RestoreError> {
    // Tablespaces may lie elsewhere; how large each is, is not known apart. This catches the
    // usual case, and a full disk is an error all the same.
    let path = &layout.data;
    let stat =
        rustix::fs::statvfs(path).map_err(|e| file_error("ask for room at", path)(e.into()))?;
    let free_bytes = stat.f_bavail * stat.f_frsize;
    let job_bytes = u64::from(CHUNKS_PER_JOB) * u64::from(backup.chunk_bytes);
    let needed_bytes = backup.plain_bytes().saturating_sub(done.len() as u64 * job_bytes);
    if layout.links.is_empty() && free_bytes < needed_bytes {
        return Err(RestoreError::NoRoom { path: path.clone(), free_bytes, needed_bytes });
    }
    Ok(())
}

fn make_directory(layout: &Layout, path: &Path, mode: u32) -> Result<(), RestoreError> {
    let make = || -> io::Result<()> {
        let mut builder = fs::DirBuilder::new();
        builder.recursive(true).mode(0o700).create(path)?;
        fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
        layout.own(path)
    };
    make().map_err(file_error("make directory", path))
}

fn make_link(layout: &Layout, target: &Path, path: &Path) -> Result<(), RestoreError> {
    let made = || -> io::Result<()> {
        match symlink(target, path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => fs::remove_file(path)
                .or_else(|_| fs::remove_dir(path))
                .and_then(|()| symlink(target, path))?,
            made => made?,
        }
        layout.own(path)
    };
    made().map_err(file_error("make link", path))
}

/// Opens a file for writing, and makes it if it is not there.
fn create(layout: &Layout, path: &Path, mode: u32) -> io::Result<File> {
    match OpenOptions::new().write(true).create_new(true).mode(mode).open(path) {
        Ok(file) => {
            // The process's umask must not take away what the server had.
            file.set_permissions(fs::Permissions::from_mode(mode))?;
            layout.own(path)?;
            Ok(file)
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            OpenOptions::new().write(true).open(path)
        }
        Err(error) => Err(error),
    }
}

/// Reads what an earlier run had on disk.
fn read_state(data: &Path, backup_id: &BackupId) -> Result<BTreeSet<Job>, RestoreError> {
    let path = data.join(STATE_FILE);
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(RestoreError::NothingToResume { path: data.to_owned() });
        }
        Err(error) => return Err(file_error("read", &path)(error)),
    };
    let mut lines = text.lines();
    let found = lines.next().unwrap_or_default();
    if found != backup_id.as_str() {
        return Err(RestoreError::OtherRestore {
            path: data.to_owned(),
            expected: backup_id.clone(),
            found: found.to_owned(),
        });
    }
    // A line that was cut off by a crash is a job that is done again.
    let job = |line: &str| {
        let (part, first) = line.strip_suffix(';')?.split_once(' ')?;
        Some(Job { part: part.parse().ok()?, first: first.parse().ok()? })
    };
    Ok(lines.filter_map(job).collect())
}

/// Fetches and unpacks every chunk that is not done; returns how many bytes.
async fn unpack(
    config: &Config,
    place: &Place,
    backup: &Commit,
    members: Vec<Member>,
    layout: &Arc<Layout>,
    mut done: BTreeSet<Job>,
    progress: &Progress,
) -> Result<u64, RestoreError> {
    let files = Arc::new(Files::new(members));
    let at_once = config.backup.upload().workers + config.backup.uploads.get();
    let (mut bytes, mut noted_bytes, mut unnoted) = (0, 0, Vec::new());
    let mut part_start = 0;
    let mut running: JoinSet<Result<(Job, u64), RestoreError>> = JoinSet::new();
    let state_path = layout.data.join(STATE_FILE);
    let state = OpenOptions::new().append(true).open(&state_path);
    let mut state = state.map_err(file_error("open", &state_path))?;

    for (part, record) in backup.parts.iter().enumerate() {
        let name = backup.backup_id.object(&part_name(part));
        let reader = place.open(Kind::Part, &name, Some(record.object_bytes)).await?;
        reader.opener.require_salt(&record.salt)?;
        for first in (0..reader.opener.chunks()).step_by(CHUNKS_PER_JOB as usize) {
            let job = Job { part, first };
            if done.remove(&job) {
                continue;
            }
            while running.len() >= at_once {
                if let Some(result) = running.join_next().await {
                    let (job, job_bytes) = flatten(result)?;
                    bytes += job_bytes;
                    unnoted.push(job);
                }
            }
            if bytes - noted_bytes > NOTE_EVERY_BYTES {
                note(layout, &mut state, &mut unnoted).map_err(file_error("write", &state_path))?;
                noted_bytes = bytes;
            }
            let (reader, files, layout) = (reader.clone(), files.clone(), layout.clone());
            let progress = progress.clone();
            running.spawn(async move {
                let bytes = unpack_job(reader, job, part_start, files, layout).await?;
                progress.add(bytes);
                Ok((job, bytes))
            });
        }
        part_start += record.plain_bytes;
    }
    while let Some(result) = running.join_next().await {
        bytes += flatten(result)?.1;
    }
    Ok(bytes)
}

fn flatten<T>(
    result: Result<Result<T, RestoreError>, tokio::task::JoinError>,
) -> Result<T, RestoreError> {
    match result {
        Ok(result) => result,
        Err(error) => Err(RestoreError::File {
            operation: "run",
            path: PathBuf::from("unpack"),
            source: io::Error::other(error),
        }),
    }
}

/// Makes sure that what was unpacked is on disk, and notes it for a run that resumes this one.
fn note(layout: &Layout, state: &mut File, jobs: &mut Vec<Job>) -> io::Result<()> {
    sync(layout)?;
    let mut text = Vec::new();
    for Job { part, first } in jobs.drain(..) {
        writeln!(text, "{part} {first};")?;
    }
    state.write_all(&text)?;
    state.sync_all()
}

/// Writes everything to disk: one call per file system instead of one per file.
fn sync(layout: &Layout) -> io::Result<()> {
    let mut devices = BTreeSet::new();
    for root in layout.roots.iter().chain([&layout.data]) {
        let directory = File::open(root)?;
        if devices.insert(directory.metadata()?.dev()) {
            rustix::fs::syncfs(&directory)?;
        }
    }
    Ok(())
}

/// Fetches, opens and writes a stretch of chunks.
async fn unpack_job(
    reader: ObjectReader,
    job: Job,
    part_start: u64,
    files: Arc<Files>,
    layout: Arc<Layout>,
) -> Result<u64, RestoreError> {
    let end = (job.first + CHUNKS_PER_JOB).min(reader.opener.chunks());
    let sealed = reader.fetch(job.first, end).await?;
    let work = move || -> Result<u64, RestoreError> {
        let mut stream_offset = part_start + u64::from(job.first) * reader.opener.chunk_bytes();
        let mut bytes = 0;
        let mut writer = FileWriter { layout: &layout, open: None };
        reader.opener.open_stretch(job.first, end, &sealed, |plain| {
            for (index, file_offset, content) in files.pieces(stream_offset, plain) {
                writer.write(index, &files.members[index], file_offset, content)?;
            }
            stream_offset += plain.len() as u64;
            bytes += plain.len() as u64;
            Ok::<_, RestoreError>(())
        })?;
        Ok(bytes)
    };
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => flatten(Err(error)),
    }
}

/// Keeps the last file open: the next piece is usually of the same one.
struct FileWriter<'a> {
    layout: &'a Layout,
    open: Option<(usize, File)>,
}

impl FileWriter<'_> {
    fn write(
        &mut self,
        index: usize,
        member: &Member,
        offset: u64,
        content: &[u8],
    ) -> Result<(), RestoreError> {
        // `prepare` has refused paths that lead out.
        let path = self.layout.path(member).unwrap_or_default();
        if self.open.as_ref().is_none_or(|(open, _)| *open != index) {
            let file = create(self.layout, &path, member.mode);
            self.open = Some((index, file.map_err(file_error("create", &path))?));
        }
        match &self.open {
            Some((_, file)) => {
                file.write_all_at(content, offset).map_err(file_error("write", &path))
            }
            None => Ok(()),
        }
    }
}

/// The files with content, in the order of the stream.
#[derive(Debug)]
struct Files {
    members: Vec<Member>,
}

impl Files {
    fn new(members: Vec<Member>) -> Self {
        let mut members: Vec<_> = members
            .into_iter()
            .filter(|member| member.kind == MemberKind::File && member.size > 0)
            .collect();
        members.sort_by_key(|member| member.offset);
        Self { members }
    }

    /// The pieces of files in a stretch of the stream: which file, where in it, and the bytes.
    fn pieces<'a>(
        &'a self,
        stream_offset: u64,
        plain: &'a [u8],
    ) -> impl Iterator<Item = (usize, u64, &'a [u8])> {
        let end = stream_offset + plain.len() as u64;
        let first =
            self.members.partition_point(|member| member.offset + member.size <= stream_offset);
        self.members[first..]
            .iter()
            .enumerate()
            .take_while(move |(_, member)| member.offset < end)
            .map(move |(index, member)| {
                let from = member.offset.max(stream_offset);
                let to = (member.offset + member.size).min(end);
                let inside = |at: u64| usize::try_from(at - stream_offset).unwrap_or(plain.len());
                (first + index, from - member.offset, &plain[inside(from)..inside(to)])
            })
    }
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

/// Writes the recovery settings, syncs everything, and lets the directory start.
fn finish(
    layout: &Layout,
    manifest: &[u8],
    reach: &Reach,
    options: &RestoreOptions,
) -> Result<(), RestoreError> {
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
    write("backup_manifest", manifest)?;

    let auto_conf = data.join("postgresql.auto.conf");
    let before = match fs::read_to_string(&auto_conf) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        Err(error) => return Err(file_error("read", &auto_conf)(error)),
    };
    let inherited = |line: &&str| !RECOVERY_SETTINGS.iter().any(|name| line.starts_with(name));
    let mut lines: Vec<String> = before.lines().filter(inherited).map(str::to_owned).collect();
    for (name, value) in recovery_settings(reach, options) {
        lines.push(format!("{name} = '{}'", value.replace('\'', "''")));
    }
    lines.push(String::new());
    write("postgresql.auto.conf", lines.join("\n").as_bytes())?;

    // A standby's backup brings its own; with it the copy would follow its old primary.
    remove(&data.join("standby.signal"))?;
    write("recovery.signal", b"")?;
    sync(layout).map_err(file_error("write to disk", data))?;
    let (control, until_done) = (data.join(CONTROL_FILE), data.join(CONTROL_FILE_UNTIL_DONE));
    fs::rename(&until_done, &control).map_err(file_error("rename to", &control))?;
    remove(&data.join(STATE_FILE))?;
    sync(layout).map_err(file_error("write to disk", data))
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
    let mut settings = vec![
        ("restore_command", options.restore_command.clone()),
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
