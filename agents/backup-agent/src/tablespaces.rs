//! Tablespaces that a backup does not have, and that a recovery from it makes.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::{fs, io};

use chrono::{DateTime, Utc};

use crate::catalog::Catalog;
use crate::layout::CONTROL_FILE;
use crate::manifest::Commit;
use crate::recovery::Target;
use crate::restore::{RestoreError, RestoreOptions, file_error};

/// A recovery makes the tablespaces that came after its backup where they were on the server: on the
/// same machine that may be a living server's. Later backups tell where that is, and the servers that
/// run here.
///
/// # Errors
///
/// One of them is there and not empty.
pub(crate) fn refuse_later_tablespaces(
    catalog: &Catalog,
    chosen: &Commit,
    options: &RestoreOptions,
) -> Result<(), RestoreError> {
    if options.target == Target::Immediate {
        return Ok(());
    }
    for path in later_tablespaces(&catalog.backups, chosen) {
        let Ok(mut names) = fs::read_dir(&path) else { continue };
        if let Some(name) = names.next() {
            let name = name.map_err(file_error("read", &path))?.file_name();
            let found = name.to_string_lossy().into_owned();
            return Err(RestoreError::LaterTablespaceInUse { path, found });
        }
    }
    let comes_before = |made_at: DateTime<Utc>| match options.target {
        Target::Time(target) => made_at <= target,
        _ => true,
    };
    for Living { server, oid, path, made_at } in living_tablespaces(chosen.system_identifier) {
        if !has(chosen, oid) && comes_before(made_at) {
            return Err(RestoreError::LivingTablespace { path, server });
        }
    }
    Ok(())
}

/// Where later backups have tablespaces that the chosen one has not.
fn later_tablespaces(backups: &[Commit], chosen: &Commit) -> BTreeSet<PathBuf> {
    let later = backups.iter().filter(|it| it.backup_id > chosen.backup_id);
    let others = later.flat_map(|it| &it.archives).filter(|it| {
        // Servers may have the same one at different places.
        it.tablespace_oid.is_some_and(|oid| !has(chosen, oid))
    });
    let paths = others.filter_map(|it| it.location.as_ref()).map(PathBuf::from);
    // In the data directory: it goes with that.
    paths.filter(|it| it.is_absolute()).collect()
}

fn has(backup: &Commit, oid: u32) -> bool {
    backup.archives.iter().any(|it| it.tablespace_oid == Some(oid))
}

/// A tablespace of a server that runs on this machine.
struct Living {
    /// The server's data directory.
    server: PathBuf,
    oid: u32,
    /// Where the tablespace is.
    path: PathBuf,
    /// When it was made, or this server.
    made_at: DateTime<Utc>,
}

/// The tablespaces of the servers of a database cluster that run here: each stands in its data
/// directory. One that does not let itself be looked at is left out; so is every one where there is
/// no `/proc`.
fn living_tablespaces(system_identifier: u64) -> Vec<Living> {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let directories = processes.filter_map(|it| fs::read_link(it.path().join("cwd")).ok());
    let directories: BTreeSet<PathBuf> = directories.collect();
    let of_cluster = |server: &PathBuf| {
        let control = fs::read(server.join(CONTROL_FILE)).unwrap_or_default();
        server.join("postmaster.pid").exists()
            && control.starts_with(&system_identifier.to_le_bytes())
    };
    let mut living = Vec::new();
    for server in directories.into_iter().filter(of_cluster) {
        let links = fs::read_dir(server.join("pg_tblspc")).into_iter().flatten().flatten();
        for link in links {
            let oid = link.file_name().to_str().and_then(|it| it.parse().ok());
            if let (Some(oid), Ok((path, made_at))) = (oid, link_of(&link.path())) {
                living.push(Living { server: server.clone(), oid, path, made_at });
            }
        }
    }
    living
}

/// Where a link leads, and when it was made.
fn link_of(link: &Path) -> io::Result<(PathBuf, DateTime<Utc>)> {
    Ok((fs::read_link(link)?, fs::symlink_metadata(link)?.modified()?.into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::Archive;
    use crate::recovery::tests::backup;

    /// A recovery beside the living server wrote over a tablespace that was made after the backup.
    #[test]
    fn tablespaces_of_later_backups_are_made_by_the_recovery() {
        let with = |first, archives: &[(u32, &str)]| {
            let archive = |(oid, location): &(u32, &str)| Archive {
                tablespace_oid: Some(*oid),
                location: Some((*location).to_owned()),
                offset: 0,
            };
            Commit { archives: archives.iter().map(archive).collect(), ..backup(1, first, false) }
        };
        let backups = [
            with(2, &[(1, "/srv/dropped"), (2, "/srv/old")]),
            with(4, &[(2, "/srv/old of another server")]),
            with(6, &[(2, "/srv/old"), (3, "/srv/new"), (4, "pg_tblspc/in place")]),
        ];
        let expected = |paths: &[&str]| paths.iter().map(PathBuf::from).collect::<BTreeSet<_>>();
        assert_eq!(later_tablespaces(&backups, &backups[0]), expected(&["/srv/new"]));
        assert_eq!(later_tablespaces(&backups, &backups[1]), expected(&["/srv/new"]));
        assert_eq!(later_tablespaces(&backups, &backups[2]), expected(&[]));
    }
}
