//! Keeps the history in the state directory: read at the start, written every half minute and at
//! the end.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use shared::telemetry::chain;
use tokio::task::spawn_blocking;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::clock;
use crate::fleet::Fleet;
use crate::history::{self, HistoryError, Place};

/// Between two writes: after a crash so much of the history is missing, at its young end, where
/// the seed is best.
const EVERY: Duration = Duration::from_secs(30);
/// Locked as long as the directory is ours. The history itself is a new file each time.
const LOCK: &str = "lag-exporter.lock";
/// A name for this boot of the host.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// Keeps the history of a fleet.
#[derive(Debug)]
pub struct Keeper {
    kept: Arc<Kept>,
    _lock: Option<File>,
}

#[derive(Debug)]
struct Kept {
    cluster: String,
    boot_id: String,
    directory: PathBuf,
    fleet: Fleet,
}

impl Keeper {
    /// Takes the directory. Nothing is read yet.
    ///
    /// # Errors
    ///
    /// The boot of this host has no name, or another process uses the directory: of two, each would
    /// replace what the other has written.
    pub fn new(cluster: &str, directory: &Path, fleet: Fleet) -> anyhow::Result<Self> {
        let boot_id = fs::read_to_string(BOOT_ID).with_context(|| format!("read {BOOT_ID}"))?;
        let lock = lock(directory)?;
        let (cluster, directory) = (cluster.to_owned(), directory.to_owned());
        let kept = Kept { cluster, boot_id: boot_id.trim().to_owned(), directory, fleet };
        Ok(Self { kept: Arc::new(kept), _lock: lock })
    }

    /// Takes up what was kept, if it can be used; why not is logged.
    pub fn restore(&self) {
        let kept = &self.kept;
        let read = history::read(&kept.directory).and_then(|bytes| match bytes {
            Some(bytes) => history::decode(kept.place(), clock::now(), &bytes),
            None => Ok(Vec::new()),
        });
        match read {
            Ok(groups) => kept.fleet.restore(groups),
            Err(error @ HistoryError::OtherBoot) => {
                info!(reason = %chain(&error), "history not restored");
            }
            Err(error) => warn!(error = %chain(&error), "history not restored"),
        }
    }

    /// Writes it every half minute, and at `shutdown` once more.
    ///
    /// # Errors
    ///
    /// Never: what goes wrong is logged and tried again.
    pub async fn run(self, shutdown: CancellationToken) -> anyhow::Result<()> {
        let mut is_failing = false;
        loop {
            tokio::select! {
                () = shutdown.cancelled() => {}
                () = sleep(EVERY) => {}
            }
            let kept = Arc::clone(&self.kept);
            // Some milliseconds for large clusters, and as long as the disk takes.
            match spawn_blocking(move || kept.write()).await? {
                Ok(()) => is_failing = false,
                Err(error) => {
                    if !std::mem::replace(&mut is_failing, true) {
                        warn!(error = %chain(error.as_ref()), "history not kept");
                    }
                }
            }
            if shutdown.is_cancelled() {
                return Ok(());
            }
        }
    }
}

/// Locks the directory. Where that cannot be done at all, what is known is told all the same.
fn lock(directory: &Path) -> anyhow::Result<Option<File>> {
    let path = directory.join(LOCK);
    let file = File::options().create(true).truncate(false).write(true).open(&path);
    let locked = file.map_err(TryLockError::Error).and_then(|file| {
        file.try_lock()?;
        Ok(file)
    });
    match locked {
        Ok(file) => Ok(Some(file)),
        Err(TryLockError::WouldBlock) => anyhow::bail!(
            "state_directory: another process has locked {}; give each its own directory",
            path.display()
        ),
        Err(TryLockError::Error(error)) => {
            let path = path.display();
            warn!(%path, error = %chain(&error), "state directory not locked");
            Ok(None)
        }
    }
}

impl Kept {
    fn place(&self) -> Place<'_> {
        Place { cluster: &self.cluster, boot_id: &self.boot_id }
    }

    fn write(&self) -> anyhow::Result<()> {
        let bytes = history::encode(self.place(), clock::now(), &self.fleet.saved())?;
        Ok(history::write(&self.directory, &bytes)?)
    }
}

#[cfg(test)]
mod tests {
    use shared::pg::Node;

    use super::*;
    use crate::group::Limits;
    use crate::history::SavedGroup;
    use crate::past::Pasts;
    use crate::ring::{Entry, micros};

    const HISTORY: Duration = Duration::from_hours(1);

    fn fleet() -> Fleet {
        let limits = Limits {
            stale_after: Duration::from_secs(6),
            history: HISTORY,
            forget_after: Duration::from_mins(5),
        };
        Fleet::new("demo", limits)
    }

    #[test]
    fn two_processes_do_not_share_a_directory() {
        let directory = tempfile::tempdir().unwrap();
        let keeper = || Keeper::new("demo", directory.path(), fleet());
        let first = keeper().unwrap();
        let error = keeper().unwrap_err().to_string();
        let path = directory.path().join("lag-exporter.lock");
        assert_eq!(
            error,
            format!(
                "state_directory: another process has locked {}; give each its own directory",
                path.display()
            )
        );
        drop(first);
        keeper().unwrap();
        // There is no directory to lock: the rest of the exporter works.
        Keeper::new("demo", Path::new("/nowhere"), fleet()).unwrap();
    }

    /// The topology may not have been read yet, or all servers of a group may be down.
    #[test]
    fn a_group_that_no_node_is_in_is_remembered_as_long_as_its_history_says_something() {
        let node = |group| {
            let (name, host) = ("a".to_owned(), "10.0.0.1".to_owned());
            Node { group, name, host, port: 5432 }
        };
        let saved = |group, age: Duration| {
            let moment = micros(clock::now()) - micros(age);
            let entry = Entry { lsn: 5, written_by: moment, not_passed_at: moment };
            let (system_identifier, timeline) = (7, 1);
            SavedGroup {
                group,
                system_identifier,
                timeline,
                forks: vec![],
                pasts: Pasts::default(),
                entries: vec![entry],
            }
        };
        let fleet = fleet();
        fleet.restore(vec![saved(0, HISTORY / 2), saved(1, HISTORY / 2), saved(2, HISTORY * 2)]);
        let numbers = |saved: Vec<SavedGroup>| -> Vec<u32> {
            saved.into_iter().map(|group| group.group).collect()
        };
        let shown = || -> Vec<u32> {
            fleet.snapshot().groups.into_iter().map(|group| group.group).collect()
        };
        fleet.set_members(&[node(0)]);
        // Group 1 is remembered, and not shown: nobody knows whether it is still there.
        assert_eq!((numbers(fleet.saved()), shown()), (vec![0, 1], vec![0]));
        fleet.set_members(&[node(0), node(1)]);
        assert_eq!((numbers(fleet.saved()), shown()), (vec![0, 1], vec![0, 1]));
        assert_eq!(fleet.snapshot().groups[1].history_entries, 1);
    }
}
