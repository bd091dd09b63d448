//! Where a restored backup lies on disk: directories, links, empty files, and what may be deleted.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{
    DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, lchown, symlink,
};
use std::path::{Component, Path, PathBuf};
use std::sync::OnceLock;

use tracing::warn;

use crate::manifest::Commit;
use crate::members::Members;
use crate::restore::{RestoreError, RestoreOptions, file_error};
use crate::tar::{Member, MemberKind, is_inside};
use crate::unpack::{STATE_FILE, begin_emptying};

/// `global/pg_control` until the restore is whole.
pub(crate) const CONTROL_FILE: &str = "global/pg_control";
pub(crate) const CONTROL_FILE_UNTIL_DONE: &str = "global/pg_control.pgmesh-restore";

/// Where each archive of the backup goes.
#[derive(Debug)]
pub(crate) struct Layout {
    /// The data directory.
    pub(crate) data: PathBuf,
    /// The root of each archive, in the order of the stream.
    pub(crate) roots: Vec<PathBuf>,
    /// The links to make below `pg_tblspc`: object id and location.
    links: Vec<(u32, PathBuf)>,
    /// A directory of each file system, opened before anything is written: `syncfs` tells what
    /// could not be written since then.
    disks: OnceLock<Vec<File>>,
    /// Who is to own the files, if that is not who we are.
    owner: Option<(u32, u32)>,
}

impl Layout {
    pub(crate) fn new(backup: &Commit, options: &RestoreOptions) -> Result<Self, RestoreError> {
        let known: Vec<String> =
            backup.archives.iter().filter_map(|archive| archive.location.clone()).collect();
        for (index, (from, _)) in options.tablespaces.iter().enumerate() {
            if options.tablespaces[..index].iter().any(|(other, _)| other == from) {
                return Err(RestoreError::MappedTwice { path: from.clone() });
            }
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
        let (data, owner) = (options.to.clone(), owner(&options.to));
        let layout = Self { data, roots, links, disks: OnceLock::new(), owner };
        layout.refuse_overlap()?;
        layout.refuse_inside()?;
        Ok(layout)
    }

    /// Two archives in one directory would overwrite each other's files.
    fn refuse_overlap(&self) -> Result<(), RestoreError> {
        let apart: Vec<_> = self.apart().map(|root| (root, resolved(root))).collect();
        for (index, (one, real)) in apart.iter().enumerate() {
            for (other, other_real) in &apart[index + 1..] {
                if real.starts_with(other_real) || other_real.starts_with(real) {
                    let (one, other) = ((*one).to_owned(), (*other).to_owned());
                    return Err(RestoreError::Overlap { one, other });
                }
            }
        }
        Ok(())
    }

    /// The roots but those of in-place tablespaces, which lie in the data directory by design.
    fn apart(&self) -> impl Iterator<Item = &Path> {
        let in_place = self.data.join("pg_tblspc");
        self.roots.iter().map(PathBuf::as_path).filter(move |root| !root.starts_with(&in_place))
    }

    /// What lies in another server's data directory or tablespace is in that server's backups, and in
    /// its way.
    fn refuse_inside(&self) -> Result<(), RestoreError> {
        for root in self.apart() {
            let real = resolved(root);
            if let Some(data) = real.ancestors().skip(1).find(|above| is_a_servers(above)) {
                let (path, data) = (root.to_owned(), data.to_owned());
                return Err(RestoreError::Inside { path, data });
            }
        }
        Ok(())
    }

    /// Who is to own the files, if that is not who we are: user and group.
    pub(crate) fn owner(&self) -> Option<(u32, u32)> {
        self.owner
    }

    /// Where a member goes; `pg_control` under its provisional name.
    pub(crate) fn path(&self, member: &Member) -> Option<PathBuf> {
        let root = self.roots.get(member.archive as usize)?;
        if !is_inside(&member.path) {
            return None;
        }
        let is_control = *root == self.data && member.path == CONTROL_FILE;
        Some(root.join(if is_control { CONTROL_FILE_UNTIL_DONE } else { &member.path }))
    }

    fn own(&self, path: &Path) -> io::Result<()> {
        match self.owner {
            Some((uid, gid)) => lchown(path, Some(uid), Some(gid)),
            None => Ok(()),
        }
    }
}

/// Whether a directory is a server's data directory, or a tablespace.
fn is_a_servers(directory: &Path) -> bool {
    let is_of_tablespace = |name: &str| {
        let version = name.strip_prefix("PG_").and_then(|rest| rest.split_once('_'));
        version.is_some_and(|(major, catalog)| {
            [major, catalog]
                .iter()
                .all(|it| !it.is_empty() && it.bytes().all(|b| b.is_ascii_digit()))
        })
    };
    let mut names = fs::read_dir(directory).into_iter().flatten().flatten();
    directory.join("PG_VERSION").exists()
        || names.any(|entry| entry.file_name().to_str().is_some_and(is_of_tablespace))
}

/// Where a path leads, without links and `..`, whether it exists or not.
fn resolved(path: &Path) -> PathBuf {
    let existing = path.ancestors().find_map(|above| Some((above, above.canonicalize().ok()?)));
    let Some((above, mut real)) = existing else { return path.to_owned() };
    for part in path.strip_prefix(above).into_iter().flat_map(Path::components) {
        match part {
            Component::ParentDir => drop(real.pop()),
            part => real.push(part),
        }
    }
    real
}

/// What root has to do to files that would be its own.
pub(crate) fn chown(layout: &Layout, is_root: bool) -> Option<String> {
    let is_roots = is_root && layout.owner.is_none();
    let roots: Vec<_> = layout.apart().map(|root| root.display().to_string()).collect();
    is_roots.then(|| format!("chown -R postgres: {}", roots.join(" ")))
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

/// Locks the roots that are there and not locked yet: one that was stopped for a while and goes on must not
/// write under the server that another restore has made startable.
pub(crate) fn lock(
    layout: &Layout,
    locks: &mut BTreeMap<PathBuf, File>,
) -> Result<(), RestoreError> {
    for root in layout.roots.iter().chain([&layout.data]).filter(|root| root.is_dir()) {
        if locks.contains_key(root) {
            continue;
        }
        let directory = File::open(root).map_err(file_error("open", root))?;
        match directory.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(RestoreError::UnderWay { path: root.clone() });
            }
            Err(TryLockError::Error(error)) => return Err(file_error("lock", root)(error)),
        }
        locks.insert(root.clone(), directory);
    }
    Ok(())
}

/// Makes sure that every root is an empty directory, or one that may be emptied; returns those.
pub(crate) fn to_empty<'a>(
    layout: &'a Layout,
    options: &RestoreOptions,
) -> Result<Vec<&'a Path>, RestoreError> {
    let (data, in_place) = (layout.data.as_path(), layout.data.join("pg_tblspc"));
    let mut full = Vec::new();
    // Tablespaces first: as long as they are not empty, the data directory has links to them.
    let tablespaces = layout.apart().filter(|root| *root != data);
    for root in tablespaces.chain([data]).filter(|root| root.exists()) {
        let names = names(root)?;
        let Some(found) = names.first().cloned() else { continue };
        let path = root.to_owned();
        if root != data {
            // It may be the tablespace of a server that lives: only a person can tell.
            if !options.tablespaces.iter().any(|(_, to)| to == root) {
                return Err(RestoreError::TablespaceInUse { path, found });
            }
            if !has_link(&in_place, root) {
                let data = data.to_owned();
                return Err(RestoreError::TablespaceOfNobody { path, found, data });
            }
        }
        if root.join("postmaster.pid").exists() {
            return Err(RestoreError::InUse { path });
        }
        if !options.force {
            return Err(RestoreError::NotEmpty { path, found });
        }
        let is_ours = if root == data {
            names.iter().any(|name| name == "PG_VERSION" || name == STATE_FILE)
        } else {
            names.iter().all(|name| name.starts_with("PG_"))
        };
        if !is_ours {
            return Err(RestoreError::NotOurs { path, found });
        }
        full.push(root);
    }
    Ok(full)
}

/// Deletes what is in these roots.
pub(crate) fn clear(layout: &Layout, full: &[&Path]) -> Result<(), RestoreError> {
    let data = layout.data.as_path();
    if full.contains(&data) {
        for (link, target) in stays(data, full) {
            let (link, target) = (link.display(), target.display());
            warn!(%link, %target, "--force: what this link leads to stays where it is");
        }
        begin_emptying(data)?;
    }
    full.iter().try_for_each(|root| empty(root))
}

/// The links of a data directory, and what they lead to, that are not emptied with it: `pg_wal` and
/// tablespaces that the backup has not or that go elsewhere.
fn stays(data: &Path, full: &[&Path]) -> Vec<(PathBuf, PathBuf)> {
    let emptied: BTreeSet<_> = full.iter().filter_map(|root| root.canonicalize().ok()).collect();
    let tablespaces = fs::read_dir(data.join("pg_tblspc")).into_iter().flatten().flatten();
    let links = tablespaces.map(|link| link.path()).chain([data.join("pg_wal")]);
    let led = links.filter(|link| link.is_symlink());
    let led = led.filter_map(|link| link.canonicalize().ok().map(|target| (link, target)));
    led.filter(|(_, target)| !emptied.contains(target)).collect()
}

/// Whether one of the links in `pg_tblspc` leads to a directory.
fn has_link(pg_tblspc: &Path, directory: &Path) -> bool {
    let Ok(directory) = directory.canonicalize() else { return false };
    let links = fs::read_dir(pg_tblspc).into_iter().flatten().flatten();
    links.into_iter().any(|link| link.path().canonicalize().is_ok_and(|it| it == directory))
}

fn names(path: &Path) -> Result<Vec<String>, RestoreError> {
    let entries = fs::read_dir(path).map_err(file_error("read", path))?;
    let name = |entry: io::Result<fs::DirEntry>| {
        entry.map(|entry| entry.file_name().to_string_lossy().into_owned())
    };
    let mut names: Vec<String> =
        entries.map(name).collect::<Result<_, _>>().map_err(file_error("read", path))?;
    names.sort();
    Ok(names)
}

/// Makes the roots that are not there, and asks whether those that are can be written to: what does not
/// work is known before anything is deleted. If one does not, none is left behind.
pub(crate) fn try_roots(layout: &Layout) -> Result<(), RestoreError> {
    let mut made = Vec::new();
    let tried = layout.apart().try_for_each(|root| {
        if !root.is_dir() {
            let missing = root.ancestors().take_while(|above| !above.exists());
            made.extend(missing.map(Path::to_owned));
            return make_directory(layout, root, 0o700);
        }
        let access = rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK;
        rustix::fs::access(root, access).map_err(|error| file_error("write to", root)(error.into()))
    });
    if tried.is_err() {
        made.sort();
        // Some of them may not have been made.
        made.iter().rev().for_each(|path| drop(fs::remove_dir(path)));
    }
    tried
}

/// Makes the roots. They are as open to the group as the directories in them: `initdb
/// --allow-group-access`.
pub(crate) fn make_roots(layout: &Layout, members: &Members) -> Result<(), RestoreError> {
    let directory = members.iter().find(|it| it.kind == MemberKind::Directory);
    let mode = directory.map_or(0o700, |directory| directory.mode);
    for root in &layout.roots {
        make_directory(layout, root, mode)?;
    }
    let disks = disks(layout).map_err(file_error("open", &layout.data))?;
    layout.disks.get_or_init(|| disks);
    Ok(())
}

/// Makes directories, links and empty files.
pub(crate) fn make_members(
    layout: &Layout,
    backup: &Commit,
    members: &Members,
) -> Result<(), RestoreError> {
    for member in members.iter() {
        let path = layout.path(&member).ok_or_else(|| RestoreError::Inconsistent {
            backup_id: backup.backup_id.clone(),
            reason: format!("the path {:?} leaves the data directory", member.path),
        })?;
        match &member.kind {
            MemberKind::Directory => make_directory(layout, &path, member.mode)?,
            MemberKind::File if member.size == 0 => {
                create_member(layout, &path, &member).map_err(file_error("create", &path))?;
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
    Ok(())
}

/// Deletes what is in a directory, but what it is known by as ours.
fn empty(path: &Path) -> Result<(), RestoreError> {
    let (files, bytes) = held(path);
    warn!(path = %path.display(), files, bytes, "--force: what is in the directory is deleted now");
    for entry in fs::read_dir(path).map_err(file_error("read", path))? {
        let entry = entry.map_err(file_error("read", path))?;
        let path = entry.path();
        if entry.file_name() == STATE_FILE {
            continue;
        }
        let is_directory = entry.file_type().map_err(file_error("read", &path))?.is_dir();
        let removed = if is_directory { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        removed.map_err(file_error("delete", &path))?;
    }
    Ok(())
}

/// How many files are in a directory, and their bytes: as far as they can be looked at.
fn held(directory: &Path) -> (u64, u64) {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.fold((0, 0), |(files, bytes), entry| match entry.metadata() {
        Ok(about) if about.is_dir() => {
            let (more_files, more_bytes) = held(&entry.path());
            (files + more_files, bytes + more_bytes)
        }
        Ok(about) => (files + 1, bytes + about.len()),
        Err(_) => (files, bytes),
    })
}

/// How many bytes become free on a file system when what is in a directory is deleted. A file that has
/// another name elsewhere keeps its room.
fn freed(directory: &Path, device: u64) -> u64 {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let bytes = entries.map(|entry| match entry.metadata() {
        Ok(about) if about.is_dir() => freed(&entry.path(), device),
        Ok(about) if about.dev() == device && about.nlink() == 1 => about.blocks() * 512,
        _ => 0,
    });
    bytes.sum()
}

/// The directory that a place is in, or that itself, as far as it is there.
fn existing(path: &Path) -> &Path {
    path.ancestors().find(|above| above.exists()).unwrap_or(path)
}

/// Refuses a file system without room for all that goes there, when these roots are empty.
pub(crate) fn require_room(
    layout: &Layout,
    members: &Members,
    full: &[&Path],
) -> Result<(), RestoreError> {
    let mut needed: BTreeMap<u32, u64> = BTreeMap::new();
    for member in members.iter() {
        let bytes = needed.entry(member.archive).or_default();
        *bytes = bytes.saturating_add(member.size);
    }
    let mut disks: BTreeMap<u64, (&Path, u64)> = BTreeMap::new();
    for (archive, root) in (0..).zip(&layout.roots) {
        let about = fs::metadata(existing(root)).map_err(file_error("ask for room at", root))?;
        let device = about.dev();
        let (_, bytes) = disks.entry(device).or_insert((root, 0));
        *bytes = bytes.saturating_add(needed.get(&archive).copied().unwrap_or(0));
    }
    for (device, (path, needed_bytes)) in disks {
        let room = rustix::fs::statvfs(existing(path))
            .map_err(|error| file_error("ask for room at", path)(error.into()))?;
        let deleted: u64 = full.iter().map(|root| freed(root, device)).sum();
        let free_bytes = room.f_bavail * room.f_frsize + deleted;
        if free_bytes < needed_bytes {
            return Err(RestoreError::NoRoom { path: path.to_owned(), free_bytes, needed_bytes });
        }
    }
    Ok(())
}

fn make_directory(layout: &Layout, path: &Path, mode: u32) -> Result<(), RestoreError> {
    let make = |path: &Path, mode: u32| -> io::Result<()> {
        match fs::DirBuilder::new().mode(0o700).create(path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_symlink() => {
                let problem =
                    "it is a link to what is not there: make that directory, or delete the link";
                return Err(io::Error::new(io::ErrorKind::NotFound, problem));
            }
            created => created?,
        }
        fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
        layout.own(path)
    };
    // Those above it too belong to whom it belongs, or nobody could get there.
    let missing: Vec<_> = path.ancestors().skip(1).take_while(|above| !above.exists()).collect();
    for above in missing.into_iter().rev() {
        make(above, 0o755).map_err(file_error("make directory", above))?;
    }
    make(path, mode).map_err(file_error("make directory", path))
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
pub(crate) fn create(layout: &Layout, path: &Path, mode: u32) -> io::Result<File> {
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

/// Opens a file of the backup for writing, as [`create`]. One that is longer was written to by a
/// restore that was stopped.
pub(crate) fn create_member(layout: &Layout, path: &Path, member: &Member) -> io::Result<File> {
    let file = create(layout, path, member.mode)?;
    if file.metadata()?.len() > member.size {
        file.set_len(member.size)?;
    }
    Ok(file)
}

/// Opens a directory of each file system that the restore writes to.
fn disks(layout: &Layout) -> io::Result<Vec<File>> {
    let (mut disks, mut devices) = (Vec::new(), BTreeSet::new());
    for root in layout.roots.iter().chain([&layout.data]) {
        let directory = File::open(root)?;
        if devices.insert(directory.metadata()?.dev()) {
            disks.push(directory);
        }
    }
    Ok(disks)
}

/// Writes everything to disk: one call per file system instead of one per file.
pub(crate) fn sync(layout: &Layout) -> io::Result<()> {
    for disk in layout.disks.get().ok_or(io::ErrorKind::NotFound)? {
        rustix::fs::syncfs(disk)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::Archive;
    use crate::recovery::tests::backup;
    use crate::restore::tests::options;

    /// A data directory `data` and a tablespace at `space`, below `directory`.
    fn layout(directory: &Path) -> Layout {
        let [data, space] = ["data", "space"].map(|name| directory.join(name));
        for root in [&data, &space] {
            fs::create_dir_all(root.join("PG_17")).unwrap();
        }
        fs::create_dir(data.join("pg_tblspc")).unwrap();
        let roots = vec![data.clone(), space.clone()];
        Layout { data, roots, links: vec![(1, space)], disks: OnceLock::new(), owner: None }
    }

    fn forced(layout: &Layout) -> RestoreOptions {
        RestoreOptions {
            to: layout.data.clone(),
            tablespaces: layout.links.iter().map(|(_, to)| (to.clone(), to.clone())).collect(),
            force: true,
            ..options()
        }
    }

    fn left(path: &Path) -> Vec<String> {
        names(path).unwrap()
    }

    /// It was a living server's, and `--tablespace OLD=OLD` was said.
    #[test]
    fn two_restores_cannot_write_to_one_place() {
        let directory = tempfile::tempdir().unwrap();
        let layout = layout(directory.path());
        fs::create_dir_all(&layout.data).unwrap();
        let (mut ours, mut theirs) = (BTreeMap::new(), BTreeMap::new());
        lock(&layout, &mut ours).unwrap();
        // Again, for what was made meanwhile.
        lock(&layout, &mut ours).unwrap();
        let error = lock(&layout, &mut theirs).unwrap_err();
        assert!(matches!(error, RestoreError::UnderWay { .. }), "{error}");
        drop(ours);
        lock(&layout, &mut theirs).unwrap();
    }

    #[test]
    fn a_tablespace_is_emptied_only_if_the_data_directory_links_to_it() {
        let directory = tempfile::tempdir().unwrap();
        let layout = layout(directory.path());
        fs::write(layout.data.join("PG_VERSION"), "17").unwrap();
        let clear_forced = |layout: &Layout| {
            let full = to_empty(layout, &forced(layout))?;
            clear(layout, &full)
        };
        let refused = clear_forced(&layout).unwrap_err().to_string();
        assert!(refused.contains("space holds PG_17"), "{refused}");
        assert_eq!(left(&layout.roots[1]), ["PG_17"]);

        symlink(&layout.roots[1], layout.data.join("pg_tblspc/1")).unwrap();
        clear_forced(&layout).unwrap();
        assert_eq!(left(&layout.roots[1]), Vec::<String>::new());
        assert_eq!(left(&layout.data), [STATE_FILE]);
    }

    /// `--force` was killed while it deleted: `PG_VERSION` was gone already.
    #[test]
    fn a_directory_that_was_being_emptied_is_emptied() {
        let directory = tempfile::tempdir().unwrap();
        let layout = layout(directory.path());
        fs::remove_dir_all(&layout.roots[1]).unwrap();
        assert!(to_empty(&layout, &forced(&layout)).is_err());
        begin_emptying(&layout.data).unwrap();
        clear(&layout, &to_empty(&layout, &forced(&layout)).unwrap()).unwrap();
        assert_eq!(left(&layout.data), [STATE_FILE]);
    }

    #[test]
    fn places_overlap_wherever_their_links_lead() {
        let directory = tempfile::tempdir().unwrap();
        let mut layout = layout(directory.path());
        symlink(&layout.data, directory.path().join("alias")).unwrap();
        let cases = [
            ("space", true),
            ("new", true),
            ("data/inside", false),
            ("alias/inside", false),
            ("no/such/../../data/inside", false),
            ("data/../new", true),
        ];
        for (space, is_apart) in cases {
            layout.roots[1] = directory.path().join(space);
            assert_eq!(layout.refuse_overlap().is_ok(), is_apart, "{space}");
        }
    }

    /// It would be in the backups of the server there, and go with its directory.
    #[test]
    fn a_place_in_a_data_directory_is_none_to_restore_to() {
        let directory = tempfile::tempdir().unwrap();
        let mut layout = layout(directory.path());
        let living = directory.path().join("living");
        fs::create_dir_all(living.join("base")).unwrap();
        fs::write(living.join("PG_VERSION"), "17").unwrap();
        symlink(&living, directory.path().join("alias")).unwrap();
        for path in ["tablespace/PG_17_202406281", "tablespaces/PG_old_1"] {
            fs::create_dir_all(directory.path().join(path)).unwrap();
        }
        for (place, is_apart) in [
            ("copy", true),
            ("living", true),
            ("living/copy", false),
            ("living/base/no/such", false),
            ("alias/copy", false),
            ("living/../copy", true),
            ("tablespace/copy", false),
            ("tablespace/PG_17_202406281/5", false),
            ("tablespaces/copy", true),
        ] {
            for root in 0..2 {
                let before = layout.roots[root].clone();
                layout.roots[root] = directory.path().join(place);
                assert_eq!(layout.refuse_inside().is_ok(), is_apart, "{place}");
                layout.roots[root] = before;
            }
        }
    }

    /// Where there were tablespaces nobody looked whether there was room.
    #[test]
    fn all_that_goes_to_a_file_system_needs_room_there() {
        let directory = tempfile::tempdir().unwrap();
        let mut layout = layout(directory.path());
        let free = |path: &Path| {
            let room = rustix::fs::statvfs(path).unwrap();
            room.f_bavail * room.f_frsize
        };
        let most = free(directory.path()) / 10 * 6;
        let says = |layout: &Layout, sizes: [u64; 2]| {
            let mut members = Members::default();
            members.extend((0..).zip(sizes).map(|(archive, size)| file(archive, size)));
            match require_room(layout, &members, &[]) {
                Err(RestoreError::NoRoom { path, needed_bytes, .. }) => Some((path, needed_bytes)),
                refused => refused.map(|()| None).unwrap(),
            }
        };
        let data = || layout.data.clone();
        assert_eq!(says(&layout, [most, 0]), None);
        assert_eq!(says(&layout, [0, most]), None);
        assert_eq!(says(&layout, [most, most]), Some((data(), 2 * most)));
        // Another file system, where this machine has one.
        let Ok(other) = tempfile::tempdir_in("/dev/shm") else { return };
        let device = |path: &Path| fs::metadata(path).unwrap().dev();
        if device(other.path()) == device(directory.path()) {
            return;
        }
        let room = free(other.path());
        let data = data();
        layout.roots[1] = other.path().to_owned();
        assert_eq!(says(&layout, [most, room / 2]), None);
        assert_eq!(
            says(&layout, [1, room + (1 << 30)]),
            Some((other.path().to_owned(), room + (1 << 30)))
        );
        assert_eq!(says(&layout, [2 * most, 1]), Some((data, 2 * most)));
    }

    /// `--force` deleted the old cluster, and found then that the new one cannot go there.
    #[test]
    fn what_can_be_known_is_known_before_anything_is_deleted() {
        let directory = tempfile::tempdir().unwrap();
        let mut layout = layout(directory.path());
        layout.roots[1] = directory.path().join("new/space");
        let (new, roots) = (directory.path().join("new"), layout.roots.clone());
        // Not there yet, so where it will be counts.
        assert!(require_room(&layout, &Members::default(), &[]).is_ok());
        assert!(!new.exists());
        try_roots(&layout).unwrap();
        assert!(roots[1].is_dir());

        fs::remove_dir_all(&new).unwrap();
        fs::write(directory.path().join("file"), "").unwrap();
        let nowhere = directory.path().join("file/space");
        symlink(directory.path().join("gone"), directory.path().join("dangling")).unwrap();
        let dangling = directory.path().join("dangling");
        for (place, why) in [(nowhere, "make directory"), (dangling, "make directory")] {
            layout.roots.truncate(2);
            layout.roots.push(place);
            let refused = try_roots(&layout).unwrap_err().to_string();
            assert!(refused.contains(why), "{refused}");
            assert!(!new.exists(), "what was made for it is left");
            assert_eq!(left(&layout.data), ["PG_17", "pg_tblspc"]);
        }
    }

    /// The server does not start, and nobody had said a word.
    #[test]
    fn what_would_be_roots_is_to_be_given_away() {
        let directory = tempfile::tempdir().unwrap();
        let mut layout = layout(directory.path());
        assert_eq!(chown(&layout, false), None);
        let [data, space] = [&layout.roots[0], &layout.roots[1]].map(|root| root.display());
        let expected = format!("chown -R postgres: {data} {space}");
        assert_eq!(chown(&layout, true), Some(expected));
        layout.owner = Some((999, 999));
        assert_eq!(chown(&layout, true), None);
    }

    #[test]
    fn a_tablespace_goes_to_one_place() {
        let archive = |location: &str| Archive {
            tablespace_oid: Some(1),
            location: Some(location.to_owned()),
            offset: 0,
        };
        let backup = Commit { archives: vec![archive("/a"), archive("/b")], ..backup(1, 2, false) };
        let directory = tempfile::tempdir().unwrap();
        let mut options = forced(&layout(directory.path()));
        for (given, is_right) in [
            (&[("/a", "1"), ("/b", "2")][..], true),
            (&[("/a", "1"), ("/a", "2")], false),
            (&[("/a", "1"), ("/b", "2"), ("/a", "1")], false),
        ] {
            let place =
                |(from, to): &(&str, &str)| (from.into(), directory.path().join("new").join(to));
            options.tablespaces = given.iter().map(place).collect();
            let refused = Layout::new(&backup, &options).err().map(|error| error.to_string());
            assert_eq!(refused.is_none(), is_right, "{refused:?}");
            assert!(refused.is_none_or(|it| it.contains("/a=NEW is given twice")));
        }
    }

    #[test]
    fn what_is_deleted_makes_room() {
        let directory = tempfile::tempdir().unwrap();
        let layout = layout(directory.path());
        let device = fs::metadata(&layout.data).unwrap().dev();
        fs::write(layout.data.join("PG_17/one"), vec![1; 1 << 20]).unwrap();
        fs::write(layout.data.join("two"), vec![1; 1 << 20]).unwrap();
        fs::hard_link(layout.data.join("two"), directory.path().join("kept")).unwrap();
        symlink(directory.path(), layout.data.join("pg_wal")).unwrap();
        let bytes = freed(&layout.data, device);
        assert!((1 << 20..2 << 20).contains(&bytes), "{bytes}");
        assert_eq!(freed(&layout.data, device + 1), 0);
    }

    #[test]
    fn what_a_link_leads_to_is_said_to_stay_unless_it_is_emptied_too() {
        let directory = tempfile::tempdir().unwrap();
        let layout = layout(directory.path());
        let (wal, link) = (directory.path().join("wal"), layout.data.join("pg_wal"));
        fs::create_dir(&wal).unwrap();
        symlink(&wal, &link).unwrap();
        symlink(&layout.roots[1], layout.data.join("pg_tblspc/1")).unwrap();
        let wal = wal.canonicalize().unwrap();
        let [data, space] = [&layout.roots[0], &layout.roots[1]].map(PathBuf::as_path);
        assert_eq!(stays(data, &[space, data]), [(link, wal)]);
        assert_eq!(stays(data, &[data]).len(), 2);
    }

    fn file(archive: u32, size: u64) -> Member {
        let (path, kind) = ("file".to_owned(), MemberKind::File);
        Member { archive, path, kind, offset: 0, size, mode: 0o600, mtime: 0, crc32c: 0 }
    }

    /// A restore that was killed after it had written its settings left more than the backup has.
    #[test]
    fn a_file_of_a_stopped_restore_is_as_long_as_in_the_backup() {
        let directory = tempfile::tempdir().unwrap();
        let layout = layout(directory.path());
        let path = layout.data.join("file");
        let member = file(0, 4);
        for before in ["", "1234", "12345678"] {
            fs::write(&path, before).unwrap();
            create_member(&layout, &path, &member).unwrap();
            assert_eq!(fs::read(&path).unwrap(), before.as_bytes()[..before.len().min(4)]);
        }
    }
}
