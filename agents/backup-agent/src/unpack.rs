//! Chunks to files: fetched, opened and written in parallel and in any order, and noted, so that a
//! restore that was stopped goes on where it was.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::task::JoinSet;

use crate::config::Config;
use crate::layout::{Layout, create_member, sync};
use crate::manifest::{BackupId, Commit};
use crate::members::Members;
use crate::progress::Progress;
use crate::repository::{ObjectReader, Place};
use crate::restore::{RestoreError, file_error, open_part};
use crate::tar::{Member, MemberKind};

/// Chunks fetched by one request and unpacked by one thread: 4 MiB of files at a time.
const CHUNKS_PER_JOB: u32 = 4;
/// Parts that are unpacked side by side, a job of each in turn. One after the other belong to the same
/// file, and a file system lets in one writer of a file at a time.
const PARTS_AT_ONCE: usize = 4;
/// How much is unpacked between two notes of what is on disk, in bytes: what a resumed restore
/// fetches again at most.
const NOTE_EVERY_BYTES: u64 = 1 << 30;
/// What a restore under way is known by, in the data directory.
pub(crate) const STATE_FILE: &str = ".pgmesh-restore";

/// A stretch of chunks of one part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Job {
    part: usize,
    first: u32,
}

/// What stands there while `--force` empties the directory.
const EMPTIED: &str = "emptied by --force";

/// What an earlier restore left in a data directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Left {
    /// Nothing.
    Nothing,
    /// An old cluster of which some may be deleted, and nothing of a backup.
    Emptied,
    /// A part of a backup: it can go on.
    Begun,
}

impl Left {
    /// Looks into a directory.
    pub fn in_directory(data: &Path) -> Self {
        match fs::read_to_string(data.join(STATE_FILE)) {
            Ok(text) if text.trim_end() == EMPTIED => Self::Emptied,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Self::Nothing,
            Ok(_) | Err(_) => Self::Begun,
        }
    }
}

/// What a restore is of and where it goes: a resumed one must agree in every line.
fn state_head(layout: &Layout, backup_id: &BackupId) -> Vec<String> {
    let roots = layout.roots.iter().map(|root| format!("to {}", root.display()));
    [backup_id.to_string()].into_iter().chain(roots).collect()
}

/// Notes that a directory is being emptied, before anything in it is deleted: it is known as ours
/// from then on, and as no restore that can go on.
pub(crate) fn begin_emptying(data: &Path) -> Result<(), RestoreError> {
    let path = data.join(STATE_FILE);
    let written = || -> io::Result<()> {
        let mut file = File::create(&path)?;
        file.write_all(format!("{EMPTIED}\n").as_bytes())?;
        file.sync_all()?;
        File::open(data)?.sync_all()
    };
    written().map_err(file_error("write", &path))
}

/// Notes what a restore is of, before anything of it is on disk.
pub(crate) fn begin_state(layout: &Layout, backup_id: &BackupId) -> Result<(), RestoreError> {
    let path = layout.data.join(STATE_FILE);
    let text = state_head(layout, backup_id).join("\n") + "\n";
    let provisional = path.with_extension("new");
    let written = fs::write(&provisional, text).and_then(|()| fs::rename(&provisional, &path));
    written.map_err(|error| {
        // What stays would be somebody's to the next restore.
        drop(fs::remove_file(&provisional));
        file_error("write", &path)(error)
    })
}

/// Reads what an earlier run had on disk.
pub(crate) fn read_state(
    layout: &Layout,
    backup_id: &BackupId,
) -> Result<BTreeSet<Job>, RestoreError> {
    let data = layout.data.clone();
    if data.join("postmaster.pid").exists() {
        return Err(RestoreError::InUse { path: data });
    }
    if Left::in_directory(&data) == Left::Emptied {
        return Err(RestoreError::OnlyEmptied { path: data });
    }
    let path = data.join(STATE_FILE);
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(RestoreError::NothingToResume { path: data });
        }
        Err(error) => return Err(file_error("read", &path)(error)),
    };
    let mut lines = text.lines();
    for expected in state_head(layout, backup_id) {
        let found = lines.next().unwrap_or_default().to_owned();
        if found != expected {
            return Err(RestoreError::OtherRestore { path: data, expected, found });
        }
    }
    // A line that was cut off by a crash is a job that is done again.
    let job = |line: &str| {
        let (part, first) = line.strip_suffix(';')?.split_once(' ')?;
        Some(Job { part: part.parse().ok()?, first: first.parse().ok()? })
    };
    Ok(lines.filter_map(job).collect())
}

/// Fetches and unpacks every chunk that is not done; returns how many bytes.
pub(crate) async fn unpack(
    config: &Config,
    place: &Place,
    backup: &Commit,
    members: Members,
    layout: &Arc<Layout>,
    mut done: BTreeSet<Job>,
    progress: &Progress,
) -> Result<u64, RestoreError> {
    if !members.is_in_order() {
        return Err(RestoreError::Inconsistent {
            backup_id: backup.backup_id.clone(),
            reason: "the table of files is not in the order of the stream".to_owned(),
        });
    }
    let members = Arc::new(members);
    let at_once = config.backup.upload().workers + config.backup.uploads.get();
    let (mut bytes, mut noted_bytes, mut unnoted) = (0, 0, Vec::new());
    let (mut part, mut part_start) = (0, 0);
    let mut running: JoinSet<Result<(Job, u64), RestoreError>> = JoinSet::new();
    let state_path = layout.data.join(STATE_FILE);
    let state = OpenOptions::new().append(true).open(&state_path);
    let mut state = state.map_err(file_error("open", &state_path))?;

    for parts in backup.parts.chunks(PARTS_AT_ONCE) {
        let mut readers = Vec::new();
        for record in parts {
            let reader = open_part(place, backup, part).await?;
            readers.push((part, part_start, reader));
            (part, part_start) = (part + 1, part_start + record.plain_bytes);
        }
        for (job, part_start, reader) in in_turn(&readers) {
            if done.remove(&job) {
                continue;
            }
            while running.len() >= at_once {
                if let Some(result) = running.join_next().await {
                    let (job, job_bytes) = flatten(result)?;
                    bytes += job_bytes;
                    unnoted.push(job);
                }
            }
            if bytes - noted_bytes > NOTE_EVERY_BYTES {
                note(layout, &mut state, &mut unnoted).map_err(file_error("write", &state_path))?;
                noted_bytes = bytes;
            }
            let (reader, members, layout) = (reader.clone(), members.clone(), layout.clone());
            let progress = progress.clone();
            running.spawn(async move {
                let bytes = unpack_job(reader, job, part_start, members, layout).await?;
                progress.add(bytes);
                Ok((job, bytes))
            });
        }
    }
    while let Some(result) = running.join_next().await {
        bytes += flatten(result)?.1;
    }
    Ok(bytes)
}

/// The jobs of several parts, one of each in turn.
fn in_turn(
    readers: &[(usize, u64, ObjectReader)],
) -> impl Iterator<Item = (Job, u64, &ObjectReader)> {
    let longest = readers.iter().map(|(.., reader)| reader.opener.chunks()).max().unwrap_or(0);
    (0..longest).step_by(CHUNKS_PER_JOB as usize).flat_map(move |first| {
        let long_enough = readers.iter().filter(move |(.., it)| first < it.opener.chunks());
        long_enough.map(move |(part, start, reader)| (Job { part: *part, first }, *start, reader))
    })
}

fn flatten<T>(
    result: Result<Result<T, RestoreError>, tokio::task::JoinError>,
) -> Result<T, RestoreError> {
    match result {
        Ok(result) => result,
        Err(error) => Err(RestoreError::File {
            operation: "run",
            path: PathBuf::from("unpack"),
            source: io::Error::other(error),
        }),
    }
}

/// Makes sure that what was unpacked is on disk, and notes it for a run that resumes this one.
fn note(layout: &Layout, state: &mut File, jobs: &mut Vec<Job>) -> io::Result<()> {
    sync(layout)?;
    let mut text = Vec::new();
    for Job { part, first } in jobs.drain(..) {
        writeln!(text, "{part} {first};")?;
    }
    state.write_all(&text)?;
    state.sync_all()
}

/// Fetches, opens and writes a stretch of chunks.
async fn unpack_job(
    reader: ObjectReader,
    job: Job,
    part_start: u64,
    members: Arc<Members>,
    layout: Arc<Layout>,
) -> Result<u64, RestoreError> {
    let end = (job.first + CHUNKS_PER_JOB).min(reader.opener.chunks());
    let sealed = reader.fetch(job.first, end).await?;
    let work = move || -> Result<u64, RestoreError> {
        let mut stream_offset = part_start + u64::from(job.first) * reader.opener.chunk_bytes();
        let mut bytes = 0;
        let mut writer = FileWriter { layout: &layout, open: None };
        reader.opener.open_stretch(job.first, end, &sealed, |plain| {
            for (member, file_offset, content) in pieces(&members, stream_offset, plain) {
                writer.write(&member, file_offset, content)?;
            }
            stream_offset += plain.len() as u64;
            bytes += plain.len() as u64;
            Ok::<_, RestoreError>(())
        })?;
        Ok(bytes)
    };
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => flatten(Err(error)),
    }
}

/// Keeps the last file open: the next piece is usually of the same one.
struct FileWriter<'a> {
    layout: &'a Layout,
    open: Option<(PathBuf, File)>,
}

impl FileWriter<'_> {
    fn write(&mut self, member: &Member, offset: u64, content: &[u8]) -> Result<(), RestoreError> {
        // `make_members` has refused paths that lead out.
        let path = self.layout.path(member).unwrap_or_default();
        if self.open.as_ref().is_none_or(|(open, _)| *open != path) {
            let file = create_member(self.layout, &path, member);
            self.open = Some((path.clone(), file.map_err(file_error("create", &path))?));
        }
        match &self.open {
            Some((_, file)) => {
                file.write_all_at(content, offset).map_err(file_error("write", &path))
            }
            None => Ok(()),
        }
    }
}

/// The pieces of files in a stretch of the stream: which file, where in it, and the bytes.
fn pieces<'a>(
    members: &'a Members,
    stream_offset: u64,
    plain: &'a [u8],
) -> impl Iterator<Item = (Member, u64, &'a [u8])> {
    let end = stream_offset + plain.len() as u64;
    (members.first_behind(stream_offset)..)
        .map_while(|index| members.get(index))
        .take_while(move |member| member.offset < end)
        .filter(|member| member.kind == MemberKind::File && member.size > 0)
        .map(move |member| {
            let from = member.offset.max(stream_offset);
            let to = (member.offset + member.size).min(end);
            let inside = |at: u64| usize::try_from(at - stream_offset).unwrap_or(plain.len());
            let file_offset = from - member.offset;
            (member, file_offset, &plain[inside(from)..inside(to)])
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stretch_of_the_stream_is_cut_into_pieces_of_files() {
        let file = |path: &str, offset, size| {
            let (path, kind) = (path.to_owned(), MemberKind::File);
            Member { archive: 0, path, kind, offset, size, mode: 0o600, mtime: 0, crc32c: 0 }
        };
        let mut members = Members::default();
        members.extend([file("1", 4, 3), file("empty", 8, 0), file("2", 10, 6)]);
        let stream = b"....aaa...bbbbbb....";
        let cases = [
            (0, 20, vec![("1", 0, "aaa"), ("2", 0, "bbbbbb")]),
            (0, 4, vec![]),
            (5, 6, vec![("1", 1, "a")]),
            (6, 12, vec![("1", 2, "a"), ("2", 0, "bb")]),
            (12, 16, vec![("2", 2, "bbbb")]),
            (16, 20, vec![]),
        ];
        for (start, end, expected) in cases {
            let found = pieces(&members, start as u64, &stream[start..end]);
            let found: Vec<_> = found
                .map(|(member, at, content)| {
                    (member.path, at, String::from_utf8_lossy(content).into_owned())
                })
                .collect();
            let expected: Vec<_> = expected
                .into_iter()
                .map(|(path, at, content)| (path.to_owned(), at, content.to_owned()))
                .collect();
            assert_eq!(found, expected, "{start}..{end}");
        }
    }
}
