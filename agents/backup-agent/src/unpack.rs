//! Chunks to files: fetched, opened and written in parallel and in any order, and noted, so that a
//! restore that was stopped goes on where it was.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

use tokio::task::JoinSet;

use crate::config::Config;
use crate::container::Kind;
use crate::layout::{Layout, create, sync};
use crate::manifest::{BackupId, Commit, part_name};
use crate::progress::Progress;
use crate::repository::{ObjectReader, Place};
use crate::restore::{RestoreError, file_error};
use crate::tar::{Member, MemberKind};

/// Chunks fetched by one request and unpacked by one thread: 8 MiB of files at a time.
const CHUNKS_PER_JOB: u32 = 8;
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

/// What a restore is of and where it goes: a resumed one must agree in every line.
fn state_head(layout: &Layout, backup_id: &BackupId) -> Vec<String> {
    let roots = layout.roots.iter().map(|root| format!("to {}", root.display()));
    [backup_id.to_string()].into_iter().chain(roots).collect()
}

/// Notes what a restore is of, before anything of it is on disk.
pub(crate) fn begin_state(layout: &Layout, backup_id: &BackupId) -> Result<(), RestoreError> {
    let path = layout.data.join(STATE_FILE);
    let text = state_head(layout, backup_id).join("\n") + "\n";
    fs::write(&path, text).map_err(file_error("write", &path))
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
    members: Vec<Member>,
    layout: &Arc<Layout>,
    mut done: BTreeSet<Job>,
    progress: &Progress,
) -> Result<u64, RestoreError> {
    let files = Arc::new(Files::new(members));
    let at_once = config.backup.upload().workers + config.backup.uploads.get();
    let (mut bytes, mut noted_bytes, mut unnoted) = (0, 0, Vec::new());
    let mut part_start = 0;
    let mut running: JoinSet<Result<(Job, u64), RestoreError>> = JoinSet::new();
    let state_path = layout.data.join(STATE_FILE);
    let state = OpenOptions::new().append(true).open(&state_path);
    let mut state = state.map_err(file_error("open", &state_path))?;

    for (part, record) in backup.parts.iter().enumerate() {
        let name = backup.backup_id.object(&part_name(part));
        let reader = place.open(Kind::Part, &name, Some(record.object_bytes)).await?;
        reader.opener.require_salt(&record.salt)?;
        for first in (0..reader.opener.chunks()).step_by(CHUNKS_PER_JOB as usize) {
            let job = Job { part, first };
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
            let (reader, files, layout) = (reader.clone(), files.clone(), layout.clone());
            let progress = progress.clone();
            running.spawn(async move {
                let bytes = unpack_job(reader, job, part_start, files, layout).await?;
                progress.add(bytes);
                Ok((job, bytes))
            });
        }
        part_start += record.plain_bytes;
    }
    while let Some(result) = running.join_next().await {
        bytes += flatten(result)?.1;
    }
    Ok(bytes)
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
    files: Arc<Files>,
    layout: Arc<Layout>,
) -> Result<u64, RestoreError> {
    let end = (job.first + CHUNKS_PER_JOB).min(reader.opener.chunks());
    let sealed = reader.fetch(job.first, end).await?;
    let work = move || -> Result<u64, RestoreError> {
        let mut stream_offset = part_start + u64::from(job.first) * reader.opener.chunk_bytes();
        let mut bytes = 0;
        let mut writer = FileWriter { layout: &layout, open: None };
        reader.opener.open_stretch(job.first, end, &sealed, |plain| {
            for (index, file_offset, content) in files.pieces(stream_offset, plain) {
                writer.write(index, &files.members[index], file_offset, content)?;
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
    open: Option<(usize, File)>,
}

impl FileWriter<'_> {
    fn write(
        &mut self,
        index: usize,
        member: &Member,
        offset: u64,
        content: &[u8],
    ) -> Result<(), RestoreError> {
        // `prepare` has refused paths that lead out.
        let path = self.layout.path(member).unwrap_or_default();
        if self.open.as_ref().is_none_or(|(open, _)| *open != index) {
            let file = create(self.layout, &path, member.mode);
            self.open = Some((index, file.map_err(file_error("create", &path))?));
        }
        match &self.open {
            Some((_, file)) => {
                file.write_all_at(content, offset).map_err(file_error("write", &path))
            }
            None => Ok(()),
        }
    }
}

/// The files with content, in the order of the stream.
#[derive(Debug)]
struct Files {
    members: Vec<Member>,
}

impl Files {
    fn new(members: Vec<Member>) -> Self {
        let mut members: Vec<_> = members
            .into_iter()
            .filter(|member| member.kind == MemberKind::File && member.size > 0)
            .collect();
        members.sort_by_key(|member| member.offset);
        Self { members }
    }

    /// The pieces of files in a stretch of the stream: which file, where in it, and the bytes.
    fn pieces<'a>(
        &'a self,
        stream_offset: u64,
        plain: &'a [u8],
    ) -> impl Iterator<Item = (usize, u64, &'a [u8])> {
        let end = stream_offset + plain.len() as u64;
        let first =
            self.members.partition_point(|member| member.offset + member.size <= stream_offset);
        self.members[first..]
            .iter()
            .enumerate()
            .take_while(move |(_, member)| member.offset < end)
            .map(move |(index, member)| {
                let from = member.offset.max(stream_offset);
                let to = (member.offset + member.size).min(end);
                let inside = |at: u64| usize::try_from(at - stream_offset).unwrap_or(plain.len());
                (first + index, from - member.offset, &plain[inside(from)..inside(to)])
            })
    }
}
