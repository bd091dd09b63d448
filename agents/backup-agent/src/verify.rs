//! Reads a backup back, all of it, and says what could not be restored and why.

use shared::pg::wal::Segment;
use shared::telemetry::chain;
use tracing::warn;

use crate::catalog::Catalog;
use crate::manifest::{Archive, BackupId, Commit};
use crate::members::Members;
use crate::progress::Progress;
use crate::repository::{ObjectReader, Place, RepositoryError};
use crate::restore::{open_manifest, open_part, open_table, read_members};
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
    let members = check_table(place, backup, &mut verified).await?;
    check_manifest(place, backup, members.as_ref(), &mut verified).await?;
    check_files(place, backup, members.as_ref(), at_once, progress, &mut verified).await?;
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

/// Reads an object to its end, whatever is damaged: one finding names every chunk that is. What opens
/// is handed to `take`, in order; `None` stands for a chunk that does not. Returns whether all of it opened.
async fn read_object(
    reader: Result<ObjectReader, RepositoryError>,
    at_once: usize,
    verified: &mut Verified,
    take: impl FnMut(Option<&[u8]>),
) -> Result<bool, RepositoryError> {
    let read = async {
        let reader = reader?;
        let opener = reader.opener.clone();
        Ok((reader.read_through(at_once, take).await?, opener))
    };
    match read.await {
        Ok((damaged, _)) if damaged.is_empty() => return Ok(true),
        Ok((damaged, opener)) => {
            let (name, chunks) = (opener.name(), opener.chunks());
            verified.problems.push(format!("{name} is damaged in {} of {chunks}", list(&damaged)));
        }
        Err(error) => verified.problems.push(problem(error)?),
    }
    Ok(false)
}

/// `chunk 3`, or `chunks 0, 3 to 7, 9`.
fn list(damaged: &[u32]) -> String {
    const STRETCHES_MAX: usize = 10;
    let is_next = |a: &u32, b: &u32| *b == a + 1;
    let stretches: Vec<_> = damaged.chunk_by(is_next).collect();
    let shown = stretches.iter().take(STRETCHES_MAX).map(|stretch| match stretch {
        [first, .., last] => format!("{first} to {last}"),
        one => one.iter().map(u32::to_string).collect(),
    });
    let shown = shown.collect::<Vec<_>>().join(", ");
    let more: usize = stretches.iter().skip(STRETCHES_MAX).map(|stretch| stretch.len()).sum();
    match (damaged.len(), more) {
        (1, _) => format!("chunk {shown}"),
        (_, 0) => format!("chunks {shown}"),
        _ => format!("chunks {shown} and {more} more"),
    }
}

/// Reads the table of files; `None` if it cannot be used.
async fn check_table(
    place: &Place,
    backup: &Commit,
    verified: &mut Verified,
) -> Result<Option<Members>, RepositoryError> {
    let error = match read_members(place, backup).await {
        Ok(members) => return Ok(Some(members)),
        Err(error) => error,
    };
    // If it opens now, what is wrong is what it says.
    if !error.is_damage()
        || read_object(open_table(place, backup).await, 1, verified, |_| ()).await?
    {
        verified.problems.push(problem(error)?);
    }
    Ok(None)
}

/// Compares the table of files with the server's manifest.
async fn check_manifest(
    place: &Place,
    backup: &Commit,
    members: Option<&Members>,
    verified: &mut Verified,
) -> Result<(), RepositoryError> {
    let mut comparison = members.map(|members| Comparison::new(members, &backup.archives));
    let take = |piece: Option<&[u8]>| {
        if let (Some(comparison), Some(piece)) = (&mut comparison, piece) {
            comparison.read(piece);
        }
    };
    let is_whole = read_object(open_manifest(place, backup).await, 1, verified, take).await?;
    if let Some(comparison) = comparison.filter(|_| is_whole)
        && let Err(error) = comparison.finish()
    {
        verified.problems.push(error.to_string());
    }
    Ok(())
}

/// Sends the whole stream through the tar reader again: the files that come out must be those of
/// the table, byte for byte. After a hole it is no tar stream any more, and is only opened.
async fn check_files(
    place: &Place,
    backup: &Commit,
    members: Option<&Members>,
    at_once: usize,
    progress: &Progress,
    verified: &mut Verified,
) -> Result<(), RepositoryError> {
    let mut stream = members.map(|members| Stream::new(&backup.archives, members));
    for part in 0..backup.parts.len() {
        let (mut bytes, mut torn) = (0, None);
        let take = |plain: Option<&[u8]>| {
            let Some(plain) = plain else {
                stream = None;
                return;
            };
            bytes += plain.len() as u64;
            progress.add(plain.len() as u64);
            let read = stream.as_mut().map_or(Ok(()), |stream| stream.read(plain));
            if let Err(error) = read {
                (stream, torn) = (None, Some(error.to_string()));
            }
        };
        let is_whole = read_object(open_part(place, backup, part).await, at_once, verified, take);
        if !is_whole.await? {
            stream = None;
        }
        verified.bytes += bytes;
        verified.problems.extend(torn);
    }
    if stream.is_some_and(|stream| !stream.is_as_in_table()) {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn damaged_chunks_are_listed_shortly() {
        let every_other: Vec<u32> = (0..40).step_by(2).collect();
        for (damaged, expected) in [
            (&[3][..], "chunk 3"),
            (&[0, 3, 4, 5, 9], "chunks 0, 3 to 5, 9"),
            (&[7, 8], "chunks 7 to 8"),
            (&every_other, "chunks 0, 2, 4, 6, 8, 10, 12, 14, 16, 18 and 10 more"),
        ] {
            assert_eq!(list(damaged), expected);
        }
    }
}
