//! Reads a backup back, all of it, and says what could not be restored and why.

use std::collections::VecDeque;

use shared::pg::wal::Segment;
use shared::telemetry::chain;
use tokio::task::JoinHandle;
use tracing::warn;

use crate::catalog::Catalog;
use crate::container::{ContainerError, Kind};
use crate::manifest::{Archive, BackupId, Commit, ServerManifest, part_name};
use crate::progress::Progress;
use crate::repository::{ObjectReader, Place, RepositoryError};
use crate::restore::read_tables;
use crate::tar::{Member, TarError, TarReader};
use crate::wal;

/// Chunks fetched by one request.
const CHUNKS_PER_JOB: u32 = 8;

/// What was found out about one backup.
#[derive(Clone, Debug)]
pub struct Verified {
    /// The backup.
    pub backup_id: BackupId,
    /// Bytes of files that were read back.
    pub bytes: u64,
    /// WAL segments that were read back.
    pub segments: u64,
    /// What is wrong; none means that it can be restored.
    pub problems: Vec<String>,
}

/// Verifies one backup of a place, or all of them.
///
/// # Errors
///
/// The repository could not be read: then nothing is known. What is damaged is no error but a
/// problem in the result.
pub async fn verify(
    place: &Place,
    only: Option<&BackupId>,
    at_once: usize,
    progress: &Progress,
) -> Result<Vec<Verified>, RepositoryError> {
    let catalog = Catalog::read(place).await?;
    let mut verified = Vec::new();
    for (backup_id, error) in &catalog.unreadable {
        if only.is_none_or(|only| only == backup_id) {
            let problems = vec![chain(error).to_string()];
            let backup_id = backup_id.clone();
            verified.push(Verified { backup_id, bytes: 0, segments: 0, problems });
        }
    }
    for backup in &catalog.backups {
        if only.is_none_or(|only| *only == backup.backup_id) {
            verified.push(verify_backup(place, backup, at_once, progress).await?);
        }
    }
    if only.is_none() {
        for backup_id in catalog.vanished() {
            let problem = "was listed when the backup after it was taken; it is gone, and no \
                           tombstone says who removed it";
            let (backup_id, problems) = (backup_id.clone(), vec![problem.to_owned()]);
            verified.push(Verified { backup_id, bytes: 0, segments: 0, problems });
        }
    }
    verified.sort_by(|a, b| a.backup_id.cmp(&b.backup_id));
    Ok(verified)
}

/// Reads every object of one backup and the WAL that it needs.
async fn verify_backup(
    place: &Place,
    backup: &Commit,
    at_once: usize,
    progress: &Progress,
) -> Result<Verified, RepositoryError> {
    progress.begin("verifying", backup.plain_bytes());
    let mut verified = Verified {
        backup_id: backup.backup_id.clone(),
        bytes: 0,
        segments: 0,
        problems: Vec::new(),
    };
    if let Some(suspect) = &backup.suspect {
        verified.problems.push(format!("is suspect: {}", suspect.reason));
    }
    match read_tables(place, backup).await {
        Err(error) => verified.problems.push(problem(error)?),
        Ok((members, manifest)) => {
            check_files(place, backup, &members, &manifest, at_once, progress, &mut verified)
                .await?;
        }
    }
    check_wal(place, backup, &mut verified).await?;
    for problem in &verified.problems {
        warn!(backup_id = %backup.backup_id, problem, "backup does not verify");
    }
    Ok(verified)
}

/// What is wrong with an object, as opposed to a repository that cannot be read now.
fn problem(error: RepositoryError) -> Result<String, RepositoryError> {
    if error.is_transient() { Err(error) } else { Ok(chain(&error).to_string()) }
}

/// Sends the whole stream through the tar reader again: the files that come out must be those of
/// the table, byte for byte, and those of the server's manifest.
async fn check_files(
    place: &Place,
    backup: &Commit,
    table: &[Member],
    manifest: &[u8],
    at_once: usize,
    progress: &Progress,
    verified: &mut Verified,
) -> Result<(), RepositoryError> {
    let mut stream = Stream::new(&backup.archives);
    for (part, record) in backup.parts.iter().enumerate() {
        let name = backup.backup_id.object(&part_name(part));
        let opened = place.open(Kind::Part, &name, Some(record.object_bytes)).await;
        let reader = match opened {
            Ok(reader) => reader,
            Err(error) => {
                verified.problems.push(problem(error)?);
                continue;
            }
        };
        if let Err(error) = reader.opener.require_salt(&record.salt) {
            verified.problems.push(error.to_string());
            continue;
        }
        let mut firsts = (0..reader.opener.chunks()).step_by(CHUNKS_PER_JOB as usize);
        let mut opening: VecDeque<JoinHandle<Result<Vec<u8>, RepositoryError>>> = VecDeque::new();
        loop {
            while opening.len() < at_once
                && let Some(first) = firsts.next()
            {
                opening.push_back(open_chunks(reader.clone(), first));
            }
            let Some(next) = opening.pop_front() else { break };
            let plain = match next.await {
                Ok(Ok(plain)) => plain,
                Ok(Err(error)) => {
                    // One finding per part is enough: the rest of it is read by nobody.
                    verified.problems.push(problem(error)?);
                    break;
                }
                Err(panicked) => std::panic::resume_unwind(panicked.into_panic()),
            };
            verified.bytes += plain.len() as u64;
            progress.add(plain.len() as u64);
            if let Err(error) = stream.read(&plain) {
                verified.problems.push(error.to_string());
                return Ok(());
            }
        }
    }
    let all_read = verified.bytes == backup.plain_bytes();
    if !all_read {
        return Ok(());
    }
    if stream.members != table {
        verified.problems.push("the table of files is not the one of the stream".to_owned());
    }
    let compared = ServerManifest::read(manifest)
        .and_then(|manifest| manifest.compare(&stream.members, &backup.archives));
    if let Err(error) = compared {
        verified.problems.push(error.to_string());
    }
    Ok(())
}

/// Fetches and opens a stretch of chunks on another thread.
fn open_chunks(reader: ObjectReader, first: u32) -> JoinHandle<Result<Vec<u8>, RepositoryError>> {
    let end = (first + CHUNKS_PER_JOB).min(reader.opener.chunks());
    let runtime = tokio::runtime::Handle::current();
    tokio::task::spawn_blocking(move || {
        let sealed = runtime.block_on(reader.fetch(first, end))?;
        let mut all = Vec::new();
        reader.opener.open_stretch(first, end, &sealed, |plain| {
            all.extend_from_slice(plain);
            Ok::<_, ContainerError>(())
        })?;
        Ok(all)
    })
}

/// The tar stream of a backup, cut into its archives.
struct Stream<'a> {
    tar: TarReader,
    archives: std::iter::Peekable<std::slice::Iter<'a, Archive>>,
    members: Vec<Member>,
}

impl<'a> Stream<'a> {
    fn new(archives: &'a [Archive]) -> Self {
        let archives = archives.iter().peekable();
        Self { tar: TarReader::default(), archives, members: Vec::new() }
    }

    fn read(&mut self, mut plain: &[u8]) -> Result<(), TarError> {
        while !plain.is_empty() {
            if self.archives.next_if(|archive| archive.offset == self.tar.offset()).is_some() {
                self.tar.next_archive()?;
            }
            let next = self.archives.peek().map_or(u64::MAX, |archive| archive.offset);
            let room =
                usize::try_from(next.saturating_sub(self.tar.offset())).unwrap_or(usize::MAX);
            let (now, later) = plain.split_at(room.min(plain.len()));
            if now.is_empty() {
                break;
            }
            self.tar.read(now, |member| self.members.push(member))?;
            plain = later;
        }
        Ok(())
    }
}

/// Reads the WAL segments that make the backup consistent.
async fn check_wal(
    place: &Place,
    backup: &Commit,
    verified: &mut Verified,
) -> Result<(), RepositoryError> {
    for number in backup.segments() {
        let segment = Segment { timeline: backup.timeline, number };
        let file = segment.name(backup.wal_segment_bytes);
        let found = wal::find(place, &file).await?;
        let found = match found.as_slice() {
            [one] => one,
            [] => {
                verified.problems.push(format!("WAL segment {file} is missing"));
                continue;
            }
            several => {
                let count = several.len();
                verified
                    .problems
                    .push(format!("WAL segment {file} is there with {count} contents"));
                continue;
            }
        };
        match wal::read(place, found, |_| Ok(())).await {
            Ok(()) => verified.segments += 1,
            Err(wal::WalError::Repository(error)) => verified.problems.push(problem(error)?),
            Err(error) => verified.problems.push(chain(&error).to_string()),
        }
    }
    Ok(())
}
