//! Stores the stream of a base backup as it comes: the archives, cut into parts, then the server's
//! manifest, and at last, if they agree, the table of what the archives hold.

use chrono::{DateTime, Utc};
use tokio_postgres::types::PgLsn;

use crate::backup::BackupError;
use crate::config::BackupConfig;
use crate::container::Kind;
use crate::manifest::{Archive, BackupId, ObjectRecord, part_name};
use crate::members::Members;
use crate::progress::Progress;
use crate::replication::base_backup::{BaseBackup, Event, Tablespace, Verdict};
use crate::repository::{Place, RepositoryError};
use crate::server_manifest::{Comparison, ManifestError};
use crate::tar::TarReader;
use crate::upload::{ObjectWriter, UploadSettings};

/// How much of the table of files is written at a time, in bytes.
const TABLE_PIECE_BYTES: usize = 64 << 10;

/// What a stream came to.
#[derive(Debug)]
pub(crate) struct Copied {
    pub(crate) start_lsn: PgLsn,
    pub(crate) end_lsn: PgLsn,
    pub(crate) timeline: u32,
    /// When the server had sent everything.
    pub(crate) finished_at: DateTime<Utc>,
    pub(crate) archives: Vec<Archive>,
    pub(crate) parts: Vec<ObjectRecord>,
    pub(crate) manifest: ObjectRecord,
    pub(crate) files: ObjectRecord,
    pub(crate) file_count: u64,
    pub(crate) verdict: Verdict,
}

/// Stores a stream, and checks that it is what the server's manifest says.
///
/// # Errors
///
/// The stream broke, is not what it should be, or could not be stored.
pub(crate) async fn copy(
    place: &Place,
    backup_id: &BackupId,
    mut stream: BaseBackup,
    config: &BackupConfig,
    progress: &Progress,
) -> Result<Copied, BackupError> {
    let differs = |source| BackupError::Manifest { backup_id: backup_id.clone(), source };
    let mut members = Members::default();
    let (archives, parts) =
        copy_archives(place, backup_id, &mut stream, config, progress, &mut members).await?;

    let mut manifest = small_object(place, backup_id, Kind::Manifest, "manifest", config)?;
    let mut comparison = Comparison::new(&members, &archives);
    let (end_lsn, end_timeline) = loop {
        match stream.next().await? {
            Event::Data(data) => {
                comparison.read(&data);
                manifest.write(&data).await?;
            }
            Event::End { end_lsn, timeline } => break (end_lsn, timeline),
            Event::Archive { name } => return Err(BackupError::UnknownArchive { name }),
            Event::Manifest => {}
        }
    };
    let (start_lsn, timeline) = (stream.start_lsn, stream.timeline);
    let verdict = stream.finish().await?;
    let finished_at = Utc::now();

    progress.begin("checking", 0);
    if timeline != end_timeline {
        let (backup_id, before, after) = (backup_id.clone(), timeline, end_timeline);
        return Err(BackupError::TimelineChanged { backup_id, before, after });
    }
    let wal_ranges = comparison.finish().map_err(differs)?;
    wal_ranges.require(timeline, start_lsn, end_lsn).map_err(differs)?;
    let manifest = manifest.finish().await?.into();
    let files = small_object(place, backup_id, Kind::Files, "files", config)?;
    let files = write_table(files, &members).await?;
    let file_count = members.len() as u64;
    Ok(Copied {
        start_lsn,
        end_lsn,
        timeline,
        finished_at,
        archives,
        parts,
        manifest,
        files,
        file_count,
        verdict,
    })
}

/// Stores the archives, up to the beginning of the manifest.
async fn copy_archives(
    place: &Place,
    backup_id: &BackupId,
    stream: &mut BaseBackup,
    config: &BackupConfig,
    progress: &Progress,
    members: &mut Members,
) -> Result<(Vec<Archive>, Vec<ObjectRecord>), BackupError> {
    let torn = |source| BackupError::Tar { backup_id: backup_id.clone(), source };
    let mut parts = Parts::new(place, backup_id, config.upload(), config.object_bytes);
    let mut tar = TarReader::default();
    let mut archives = Vec::new();
    loop {
        match stream.next().await? {
            Event::Archive { name } => {
                tar.next_archive().map_err(torn)?;
                archives.push(archive(&name, &stream.tablespaces, tar.offset())?);
            }
            Event::Data(data) => {
                tar.read(&data, |member| members.push(member)).map_err(torn)?;
                parts.write(&data).await?;
                progress.add(data.len() as u64);
            }
            Event::Manifest => break,
            Event::End { .. } => {
                let source = ManifestError::Unreadable("the server sent none".to_owned());
                return Err(BackupError::Manifest { backup_id: backup_id.clone(), source });
            }
        }
    }
    tar.end_archive().map_err(torn)?;
    Ok((archives, parts.finish().await?))
}

/// The archive of that name among the tablespaces that the server announced.
fn archive(name: &str, tablespaces: &[Tablespace], offset: u64) -> Result<Archive, BackupError> {
    let unknown = || BackupError::UnknownArchive { name: name.to_owned() };
    let oid = match name.strip_suffix(".tar") {
        Some("base") => None,
        Some(oid) => Some(oid.parse().map_err(|_| unknown())?),
        None => return Err(unknown()),
    };
    let found = tablespaces.iter().find(|tablespace| tablespace.oid == oid).ok_or_else(unknown)?;
    Ok(Archive { tablespace_oid: oid, location: found.location.clone(), offset })
}

/// The stream cut into objects of equal size.
struct Parts<'a> {
    place: &'a Place,
    backup_id: &'a BackupId,
    settings: UploadSettings,
    part_plain_bytes: u64,
    current: Option<ObjectWriter>,
    written: Vec<ObjectRecord>,
}

impl<'a> Parts<'a> {
    fn new(
        place: &'a Place,
        backup_id: &'a BackupId,
        settings: UploadSettings,
        object_bytes: u64,
    ) -> Self {
        // A multiple of the chunk, so that chunk n of the stream is easy to find.
        let part_plain_bytes = object_bytes - object_bytes % u64::from(settings.chunk_bytes);
        Self { place, backup_id, settings, part_plain_bytes, current: None, written: Vec::new() }
    }

    async fn write(&mut self, mut data: &[u8]) -> Result<(), RepositoryError> {
        while !data.is_empty() {
            let mut writer = if let Some(writer) = self.current.take() {
                writer
            } else {
                let name = self.backup_id.object(&part_name(self.written.len()));
                ObjectWriter::new(self.place, Kind::Part, &name, self.settings)?
            };
            let room = self.part_plain_bytes - writer.plain_bytes();
            let room = usize::try_from(room).unwrap_or(usize::MAX).min(data.len());
            let (now, later) = data.split_at(room);
            writer.write(now).await?;
            data = later;
            if writer.plain_bytes() == self.part_plain_bytes {
                self.written.push(writer.finish().await?.into());
            } else {
                self.current = Some(writer);
            }
        }
        Ok(())
    }

    async fn finish(mut self) -> Result<Vec<ObjectRecord>, RepositoryError> {
        if let Some(writer) = self.current.take() {
            self.written.push(writer.finish().await?.into());
        }
        Ok(self.written)
    }
}

/// Begins one of the objects that describe the others: compressed better, without haste.
fn small_object(
    place: &Place,
    backup_id: &BackupId,
    kind: Kind,
    name: &str,
    config: &BackupConfig,
) -> Result<ObjectWriter, RepositoryError> {
    let settings = UploadSettings { level: 3, uploads: 1, ..config.upload() };
    ObjectWriter::new(place, kind, &backup_id.object(name), settings)
}

/// Writes the table of files: one JSON object a line.
async fn write_table(
    mut files: ObjectWriter,
    members: &Members,
) -> Result<ObjectRecord, RepositoryError> {
    let mut text = Vec::new();
    for member in members.iter() {
        serde_json::to_writer(&mut text, &member)
            .map_err(|source| RepositoryError::Content { name: member.path, source })?;
        text.push(b'\n');
        if text.len() >= TABLE_PIECE_BYTES {
            files.write(&text).await?;
            text.clear();
        }
    }
    files.write(&text).await?;
    Ok(files.finish().await?.into())
}
