//! Where a restored backup lies on disk: directories, links, empty files, and what may be deleted.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{
    DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, lchown, symlink,
};
use std::path::{Path, PathBuf};

use tracing::info;

use crate::manifest::Commit;
use crate::members::Members;
use crate::restore::{RestoreError, RestoreOptions, file_error};
use crate::tar::{Member, MemberKind, is_inside};
use crate::unpack::STATE_FILE;

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
    /// Who is to own the files, if that is not who we are.
    owner: Option<(u32, u32)>,
}

impl Layout {
    pub(crate) fn new(backup: &Commit, options: &RestoreOptions) -> Result<Self, RestoreError> {
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
        let layout = Self { data: options.to.clone(), roots, links, owner: owner(&options.to) };
        layout.refuse_overlap()?;
        Ok(layout)
    }

    /// Two archives in one directory would overwrite each other's files.
    fn refuse_overlap(&self) -> Result<(), RestoreError> {
        // In-place tablespaces lie in the data directory by design.
        let in_place = self.data.join("pg_tblspc");
        let apart: Vec<&PathBuf> =
            self.roots.iter().filter(|root| !root.starts_with(&in_place)).collect();
        for (index, one) in apart.iter().enumerate() {
            for other in &apart[index + 1..] {
                if one.starts_with(other) || other.starts_with(one) {
                    let (one, other) = ((*one).clone(), (*other).clone());
                    return Err(RestoreError::Overlap { one, other });
                }
            }
        }
        Ok(())
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

/// Root restores for whoever owns the directory, or the one above it: PostgreSQL does not start
/// as root.
fn owner(to: &Path) -> Option<(u32, u32)> {
    if !rustix::process::geteuid().is_root() {
        return None;
    }
    let existing = to.ancestors().find_map(|path| fs::metadata(path).ok())?;
    (existing.uid() != 0).then(|| (existing.uid(), existing.gid()))
}

/// Makes sure that every root is an empty directory, or empties it. Every root is looked at before
/// anything is deleted.
pub(crate) fn clear(layout: &Layout, options: &RestoreOptions) -> Result<(), RestoreError> {
    let mut full = Vec::new();
    for root in layout.roots.iter().filter(|root| root.exists()) {
        let names = names(root)?;
        let Some(first) = names.first() else { continue };
        let not_empty = || (root.clone(), first.clone());
        if *root != layout.data {
            // It may be the tablespace of a server that lives: only a person can tell.
            let is_asked_for = options.tablespaces.iter().any(|(_, to)| to == root);
            if !is_asked_for {
                let (path, found) = not_empty();
                return Err(RestoreError::TablespaceInUse { path, found });
            }
        }
        if root.join("postmaster.pid").exists() {
            return Err(RestoreError::InUse { path: root.clone() });
        }
        if !options.force {
            let (path, found) = not_empty();
            return Err(RestoreError::NotEmpty { path, found });
        }
        let is_ours = if *root == layout.data {
            names.iter().any(|name| name == "PG_VERSION" || name == STATE_FILE)
        } else {
            names.iter().all(|name| name.starts_with("PG_"))
        };
        if !is_ours {
            let (path, found) = not_empty();
            return Err(RestoreError::NotOurs { path, found });
        }
        full.push(root);
    }
    for root in full {
        empty(root)?;
    }
    Ok(())
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

/// Makes the roots, and refuses a disk without room for `needed_bytes`.
///
/// They are as open to the group as the directories in them: `initdb --allow-group-access`.
pub(crate) fn make_roots(
    layout: &Layout,
    members: &Members,
    needed_bytes: u64,
) -> Result<(), RestoreError> {
    let directory = members.iter().find(|it| it.kind == MemberKind::Directory);
    let mode = directory.map_or(0o700, |directory| directory.mode);
    for root in &layout.roots {
        make_directory(layout, root, mode)?;
    }
    require_room(layout, needed_bytes)
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
    Ok(())
}

/// Deletes what is in a directory.
fn empty(path: &Path) -> Result<(), RestoreError> {
    info!(path = %path.display(), "directory emptied");
    for entry in fs::read_dir(path).map_err(file_error("read", path))? {
        let entry = entry.map_err(file_error("read", path))?;
        let path = entry.path();
        let is_directory = entry.file_type().map_err(file_error("read", &path))?.is_dir();
        let removed = if is_directory { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        removed.map_err(file_error("delete", &path))?;
    }
    Ok(())
}

fn require_room(layout: &Layout, needed_bytes: u64) -> Result<(), RestoreError> {
    // Tablespaces may lie elsewhere; how large each is, is not known apart. This catches the
    // usual case, and a full disk is an error all the same.
    let path = &layout.data;
    let room = rustix::fs::statvfs(path)
        .map_err(|error| file_error("ask for room at", path)(error.into()))?;
    let free_bytes = room.f_bavail * room.f_frsize;
    if layout.links.is_empty() && free_bytes < needed_bytes {
        return Err(RestoreError::NoRoom { path: path.clone(), free_bytes, needed_bytes });
    }
    Ok(())
}

fn make_directory(layout: &Layout, path: &Path, mode: u32) -> Result<(), RestoreError> {
    let make = |path: &Path, mode: u32| -> io::Result<()> {
        match fs::DirBuilder::new().mode(0o700).create(path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => {}
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

/// Writes everything to disk: one call per file system instead of one per file.
pub(crate) fn sync(layout: &Layout) -> io::Result<()> {
    let mut devices = BTreeSet::new();
    for root in layout.roots.iter().chain([&layout.data]) {
        let directory = File::open(root)?;
        if devices.insert(directory.metadata()?.dev()) {
            rustix::fs::syncfs(&directory)?;
        }
    }
    Ok(())
}
