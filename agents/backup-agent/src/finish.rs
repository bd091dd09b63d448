//! What turns unpacked files into a directory that PostgreSQL starts from, and recovers in.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use tracing::warn;

use crate::archive::NOT_THERE;
use crate::layout::{CONTROL_FILE, CONTROL_FILE_UNTIL_DONE, Layout, chown, create, sync};
use crate::manifest::BackupId;
use crate::restore::{RestoreError, RestoreOptions, file_error};
use crate::settings;
use crate::unpack::STATE_FILE;
use crate::wal::Reach;

/// Writes the recovery settings, syncs everything, and lets the directory start.
pub(crate) fn finish(
    layout: &Layout,
    backup_id: &BackupId,
    reach: &Reach,
    options: &RestoreOptions,
) -> Result<(), RestoreError> {
    let data = &layout.data;
    if data.join("postmaster.pid").exists() {
        return Err(RestoreError::InUse { path: data.clone() });
    }
    let path = data.join("postgresql.auto.conf");
    let before = match fs::read(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(file_error("read", &path)(error)),
    };
    let text = settings::auto_conf(&before, backup_id, reach, options);
    replace(layout, &path, &text).map_err(file_error("write", &path))?;

    // A standby's backup brings its own; with it the copy would follow its old primary.
    remove(&data.join("standby.signal"))?;
    let path = data.join("recovery.signal");
    replace(layout, &path, b"").map_err(file_error("write", &path))?;
    sync(layout).map_err(file_error("write to disk", data))?;
    let (control, until_done) = (data.join(CONTROL_FILE), data.join(CONTROL_FILE_UNTIL_DONE));
    fs::rename(&until_done, &control).map_err(file_error("rename to", &control))?;
    remove(&data.join(STATE_FILE))?;
    sync(layout).map_err(file_error("write to disk", data))
}

/// Warns of what keeps the server from starting, or from fetching WAL.
pub(crate) async fn warn_of_server(layout: &Layout, options: &RestoreOptions) {
    let data = &layout.data;
    if !data.join("postgresql.conf").exists() {
        warn!(
            "there is no postgresql.conf in the backup: it lies elsewhere on the server, as on \
             Debian in /etc/postgresql, and is needed to start PostgreSQL"
        );
    }
    if let Some(command) = chown(layout, rustix::process::geteuid().is_root()) {
        warn!(
            command,
            "the directory belongs to root, and PostgreSQL does not start as root: give it to the \
             server's user before the start"
        );
    }
    let owner = layout.owner();
    let (data, restore_command) = (data.clone(), options.restore_command.clone());
    let fetch = move || fetch_problem(&data, &restore_command, owner);
    if let Some(problem) = tokio::task::spawn_blocking(fetch).await.unwrap_or_default() {
        let (user, group) = owner.unzip();
        warn!(
            user,
            group,
            problem,
            "the server will not get WAL, as restore_command fails for its user: give it access to this \
             program, the configuration, the key and the repository"
        );
    }
}

/// Runs `restore_command` as the server does, as that user and group, for a file that there never
/// is; returns what was said unless the answer is right.
fn fetch_problem(data: &Path, restore_command: &str, owner: Option<(u32, u32)>) -> Option<String> {
    let filled = |part: &str| part.replace("%f", "00000001.history").replace("%p", "pg_wal/none");
    let script: Vec<_> = restore_command.split("%%").map(filled).collect();
    let mut command = Command::new("/bin/sh");
    command.arg("-c").arg(script.join("%")).current_dir(data).stdin(Stdio::null());
    if let Some((user, group)) = owner {
        command.uid(user).gid(group);
    }
    match command.output() {
        Ok(output) if output.status.code() == Some(NOT_THERE.into()) => None,
        Ok(output) => Some(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
        Err(error) => Some(error.to_string()),
    }
}

/// Writes a file, or leaves it as it was: a restore that is stopped here goes on with what it says.
fn replace(layout: &Layout, path: &Path, content: &[u8]) -> io::Result<()> {
    let provisional = path.with_extension("pgmesh-restore");
    let mode = fs::metadata(path).map_or(0o600, |it| it.permissions().mode() & 0o7777);
    let mut file = create(layout, &provisional, mode)?;
    file.set_len(0)?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(&provisional, path)
}

fn remove(path: &Path) -> Result<(), RestoreError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(file_error("delete", path)(error))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Root restored with a configuration that only root could read: the server found that out.
    #[test]
    fn the_servers_user_has_to_get_the_answer_that_there_is_no_such_file() {
        let directory = tempfile::tempdir().unwrap();
        let cases = [
            ("the answer", "exit 1", None),
            ("the key cannot be read", "echo denied >&2; exit 254", Some("denied")),
            ("any file will do for it", "echo x >&2; exit 0", Some("x")),
            (
                "as the server fills it in",
                "echo '%%f' %f %p >&2",
                Some("%f 00000001.history pg_wal/none"),
            ),
        ];
        for (case, command, expected) in cases {
            let problem = fetch_problem(directory.path(), command, None);
            assert_eq!(problem.as_deref(), expected, "{case}");
        }
    }
}
