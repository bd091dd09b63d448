//! Reads a backup back, all of it, and says what could not be restored and why.

use std::pin::pin;

use futures_util::StreamExt;
use shared::pg::wal::Segment;
use shared::telemetry::chain;
use tracing::warn;

use crate::catalog::Catalog;
use crate::manifest::{Archive, BackupId, Commit};
use crate::members::Members;
use crate::progress::Progress;
use crate::repository::{Place, RepositoryError};
use crate::restore::{open_manifest, open_part, read_members};
use crate::server_manifest::Comparison;
use crate::tar::{TarError, TarReader};
use crate::wal;

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
    match read_members(place, backup).await {
        Err(error) => verified.problems.push(problem(error)?),
        Ok(members) => {
            check_manifest(place, backup, &members, &mut verified).await?;
            check_files(place, backup, &members, at_once, progress, &mut verified).await?;
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

/// Compares the table of files with the server's manifest.
async fn check_manifest(
    place: &Place,
    backup: &Commit,
    members: &Members,
    verified: &mut Verified,
) -> Result<(), RepositoryError> {
    let mut comparison = Comparison::new(members, &backup.archives);
    let read = async {
        let mut pieces = pin!(open_manifest(place, backup).await?.pieces(1));
        while let Some(piece) = pieces.next().await {
            comparison.read(&piece?);
        }
        Ok(())
    };
    if let Err(error) = read.await {
        verified.problems.push(problem(error)?);
    } else if let Err(error) = comparison.finish() {
        verified.problems.push(error.to_string());
    }
    Ok(())
}

/// Sends the whole stream through the tar reader again: the files that come out must be those of
/// the table, byte for byte.
async fn check_files(
    place: &Place,
    backup: &Commit,
    members: &Members,
    at_once: usize,
    progress: &Progress,
    verified: &mut Verified,
) -> Result<(), RepositoryError> {
    let mut stream = Stream::new(&backup.archives, members);
    for part in 0..backup.parts.len() {
        let reader = match open_part(place, backup, part).await {
            Ok(reader) => reader,
            Err(error) => {
                verified.problems.push(problem(error)?);
                continue;
            }
        };
        let mut pieces = pin!(reader.pieces(at_once));
        while let Some(piece) = pieces.next().await {
            let piece = match piece {
                Ok(piece) => piece,
                Err(error) => {
                    // One finding per part is enough: the rest of it is read by nobody.
                    verified.problems.push(problem(error)?);
                    break;
                }
            };
            verified.bytes += piece.len() as u64;
            progress.add(piece.len() as u64);
            if let Err(error) = stream.read(&piece) {
                verified.problems.push(error.to_string());
                return Ok(());
            }
        }
    }
    let all_read = verified.bytes == backup.plain_bytes();
    if all_read && !stream.is_as_in_table() {
        verified.problems.push("the table of files is not the one of the stream".to_owned());
    }
    Ok(())
}

/// The tar stream of a backup, cut into its archives.
struct Stream<'a> {
    tar: TarReader,
    archives: std::iter::Peekable<std::slice::Iter<'a, Archive>>,
    table: &'a Members,
    /// How many members have passed, and whether each was the one of the table.
    passed: usize,
    agrees: bool,
}

impl<'a> Stream<'a> {
    fn new(archives: &'a [Archive], table: &'a Members) -> Self {
        let archives = archives.iter().peekable();
        Self { tar: TarReader::default(), archives, table, passed: 0, agrees: true }
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
            self.tar.read(now, |member| {
                self.agrees &= self.table.get(self.passed) == Some(member);
                self.passed += 1;
            })?;
            plain = later;
        }
        Ok(())
    }

    fn is_as_in_table(&self) -> bool {
        self.agrees && self.passed == self.table.len()
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
