//! Keeps the history in the state directory: read at the start, written every half minute and at
//! the end.

use std::fs;
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
/// A name for this boot of the host.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// Keeps the history of a fleet.
#[derive(Debug)]
pub struct Keeper {
    kept: Arc<Kept>,
}

#[derive(Debug)]
struct Kept {
    cluster: String,
    boot_id: String,
    directory: PathBuf,
    fleet: Fleet,
}

impl Keeper {
    /// Nothing is read yet.
    ///
    /// # Errors
    ///
    /// The boot of this host has no name.
    pub fn new(cluster: &str, directory: &Path, fleet: Fleet) -> anyhow::Result<Self> {
        let boot_id = fs::read_to_string(BOOT_ID).with_context(|| format!("read {BOOT_ID}"))?;
        let (cluster, directory) = (cluster.to_owned(), directory.to_owned());
        let kept = Kept { cluster, boot_id: boot_id.trim().to_owned(), directory, fleet };
        Ok(Self { kept: Arc::new(kept) })
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

impl Kept {
    fn place(&self) -> Place<'_> {
        Place { cluster: &self.cluster, boot_id: &self.boot_id }
    }

    fn write(&self) -> anyhow::Result<()> {
        let bytes = history::encode(self.place(), clock::now(), &self.fleet.saved())?;
        Ok(history::write(&self.directory, &bytes)?)
    }
}
