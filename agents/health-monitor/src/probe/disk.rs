//! File systems of this host.

use std::path::{Path, PathBuf};

use rustix::fs::statvfs;
use rustix::io::Errno;
use tokio::task::{JoinHandle, spawn_blocking};

use super::{Probe, bare};
use crate::config::DiskConfig;
use crate::facts::{Failure, Stage};

/// A file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskFacts {
    /// Bytes that are left to ordinary users.
    pub free_bytes: u64,
    /// Bytes in all, but for those that are kept for the superuser: so `df` counts, too.
    pub bytes: u64,
    /// Inodes that are left; 0 of 0 where the file system has no such number.
    pub free_inodes: u64,
    /// Inodes in all.
    pub inodes: u64,
}

/// Asks for one file system.
#[derive(Debug)]
pub struct DiskProbe {
    path: PathBuf,
    /// One that is far away may never answer, and holds a thread until it does: so there is one
    /// question at most, and the next ones wait for its answer.
    asked: Option<JoinHandle<Result<DiskFacts, Errno>>>,
}

impl DiskProbe {
    /// A probe of the file system that a path is on.
    pub fn new(config: &DiskConfig) -> Self {
        Self { path: config.path.clone(), asked: None }
    }
}

impl Probe for DiskProbe {
    type Facts = DiskFacts;

    async fn ask(&mut self) -> Result<DiskFacts, Failure> {
        let path = self.path.clone();
        let asked = self.asked.get_or_insert_with(|| spawn_blocking(move || read(&path)));
        let answer = asked.await;
        self.asked = None;
        let failure = |error: String| Failure { stage: Stage::Answer, error };
        answer
            .map_err(|error| failure(error.to_string()))?
            .map_err(|error| failure(format!("{}: {}", self.path.display(), bare(error))))
    }
}

fn read(path: &Path) -> Result<DiskFacts, Errno> {
    let found = statvfs(path)?;
    let used_blocks = found.f_blocks.saturating_sub(found.f_bfree);
    Ok(DiskFacts {
        free_bytes: found.f_bavail.saturating_mul(found.f_frsize),
        bytes: used_blocks.saturating_add(found.f_bavail).saturating_mul(found.f_frsize),
        free_inodes: found.f_favail,
        inodes: found.f_files,
    })
}
