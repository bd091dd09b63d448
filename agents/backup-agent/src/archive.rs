//! `wal-push` and `wal-fetch`: what PostgreSQL runs as `archive_command` and `restore_command`.

mod standby;

use std::fs;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use shared::config::{self, ConfigError};
use shared::pg::wal::{Segment, WalFile};
use shared::telemetry::chain;
use thiserror::Error;
use tokio::time::{Instant, sleep};
use tokio_postgres::types::PgLsn;
use tracing::{debug, error, info, warn};

use crate::config::Config;
use crate::prefetch;
use crate::repository::{OpenError, Place, Repository, RepositoryError};
use crate::wal::{self, Absence, Packed, Stored, WalError, WalMap, conflict, newest, piece};
use standby::{Server, Without};

pub use standby::needs_nobody;

/// Where a server keeps its system identifier, below the data directory: the first eight bytes.
/// Source: `ControlFileData` in `src/include/catalog/pg_control.h`.
const CONTROL_FILE: &str = "global/pg_control";

/// Between two attempts for a standby that waits.
const RETRY_EVERY: Duration = Duration::from_secs(5);
/// How often it is said that it waits.
const SAY_EVERY: Duration = Duration::from_mins(1);

/// `wal-fetch`: the file was never produced, or the server is to do without it. PostgreSQL takes it
/// as the end of the WAL, unless it is a standby that can go on otherwise.
pub const NOT_THERE: u8 = 1;
/// `wal-fetch`: anything else. Above 125 PostgreSQL gives the recovery up instead of taking it as
/// the end of the WAL, and promoting without what was committed after.
/// Source: PostgreSQL manual, "Archive Recovery"; `shell_restore.c`.
pub const GIVE_UP: u8 = 254;

/// Why a WAL file was not pushed or fetched.
#[derive(Debug, Error)]
pub enum ArchiveError {
    /// The file cannot be read.
    #[error("read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// The file cannot be written.
    #[error("write {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// Not run where PostgreSQL runs it.
    #[error(
        "no global/pg_control in {}: run it as PostgreSQL does, in the data directory", path.display()
    )]
    NoDataDirectory {
        /// The working directory.
        path: PathBuf,
    },
    /// The configuration cannot be used.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The repository cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The WAL is not what it should be, or the repository failed.
    #[error(transparent)]
    Wal(#[from] WalError),
    /// A file is missing that must have been there.
    #[error("{file} is missing in the repository, and it was produced: {reason}")]
    Missing {
        /// The file.
        file: String,
        /// The proof.
        reason: String,
    },
    /// A standby pushes what is still being received.
    #[error(
        "{file} is not stored yet: the segment is still growing, try later. Pieces of it are stored, and \
         what a standby has of it may be less than all. Whoever receives it (`backup-agent run`) stores the \
         whole; if nobody does any more, push it from the primary"
    )]
    Growing {
        /// The file.
        file: String,
    },
    /// Two contents.
    #[error("{file} is in the repository with {count} contents; nobody knows which is right")]
    Ambiguous {
        /// The file.
        file: String,
        /// How many.
        count: usize,
    },
    /// Nobody waits for the file any more.
    #[error("the server has ended, or its recovery")]
    ServerGone,
}

impl From<RepositoryError> for ArchiveError {
    fn from(error: RepositoryError) -> Self {
        Self::Wal(error.into())
    }
}

/// Stores one WAL file: `path` is `%p`, below the data directory, which is the working directory.
///
/// # Errors
///
/// Each reason why PostgreSQL must keep the file.
pub async fn push(config: &Config, path: &Path) -> Result<Stored, ArchiveError> {
    let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let read = |source| ArchiveError::Read { path: path.to_owned(), source };
    let packed =
        Packed::read(&file, fs::File::open(path).map_err(read)?, config.wal.compression_level)?;
    let expected = system_identifier()?;
    let found = packed.header.map(|header| header.system_identifier);
    if let Some(found) = found.filter(|found| *found != expected) {
        return Err(WalError::OtherServer { name: file, expected, found }.into());
    }
    let place = Repository::open(config).await?.place(config.wal.group, expected);
    if let Some(header) = packed.header {
        let pieces = conflict::pieces_of(&place, &file, header.segment_bytes).await?;
        let is_stored = async || wal::find(&place, &file).await.map(|found| !found.is_empty());
        if standby::is_recovering() && !pieces.is_empty() && !is_stored().await? {
            return Err(ArchiveError::Growing { file });
        }
        conflict::require_same(&file, fs::File::open(path).map_err(read)?, &pieces)?;
    }
    let stored = wal::push(&place, packed).await?;
    match stored {
        Stored::Now => info!(segment = file, "WAL file stored"),
        Stored::Before => info!(segment = file, "WAL file was stored before, with this content"),
    }
    Ok(stored)
}

/// What `wal-fetch` came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fetched {
    /// The file is in place.
    Done,
    /// The repository proves that it was never produced.
    NeverProduced,
    /// The server needs it not, or gets along without it.
    Left,
}

/// Fetches one WAL file: `file` is `%f`, `path` is `%p`. `until` promises that the recovery has a target
/// there or before: PostgreSQL ends it with an error if it does not come so far. It reads ahead of
/// what it replays all the same (`recovery_prefetch`), so what comes after is the end of its WAL.
///
/// The content is checked before the file gets its name, so PostgreSQL never sees a part of it.
///
/// Whatever it fails for, a standby that streams goes on without it. For one that has nothing but the
/// repository it waits as long as it cannot be fetched: such a one ends its recovery without it when it
/// is promoted.
///
/// # Errors
///
/// Everything but the file or the proof that it was never produced, unless the server is a standby.
pub async fn fetch(
    config_file: &Path,
    file: &str,
    path: &Path,
    until: Option<PgLsn>,
) -> Result<Fetched, ArchiveError> {
    let wanted = Wanted { config_file, file, path, until };
    let fetched = wanted.fetch().await;
    let Err(failure) = &fetched else { return fetched };
    if standby::has_history(file) {
        warn!(file, error = %chain(failure), "history not fetched; left to what the server has");
        return Ok(Fetched::Left);
    }
    if !standby::is_standby() {
        return fetched;
    }
    let Some(server) = Server::here() else {
        warn!(segment = file, error = %chain(failure), "WAL not fetched; left to streaming");
        return Ok(Fetched::Left);
    };
    tokio::select! {
        fetched = wanted.wait(&server, fetched) => fetched,
        () = server.gone() => Err(ArchiveError::ServerGone),
    }
}

/// A file that a server waits for.
#[derive(Debug)]
struct Wanted<'a> {
    config_file: &'a Path,
    file: &'a str,
    path: &'a Path,
    until: Option<PgLsn>,
}

impl Wanted<'_> {
    async fn fetch(&self) -> Result<Fetched, ArchiveError> {
        let config: Config = config::load(self.config_file)?;
        let repository = Repository::open(&config).await?;
        let place = repository.place(config.wal.group, system_identifier()?);
        let fetched = fetch_once(&place, self.file, self.path, self.until).await?;
        if fetched == Fetched::Done && config.wal.prefetch_segments > 0 {
            prefetch::start(self.config_file, self.file, self.path);
        }
        Ok(fetched)
    }

    /// Tries again as long as the standby has nothing but the repository. Whatever it fails for, to give up
    /// would end the server, and somebody may mend it meanwhile, the configuration and the keys too.
    async fn wait(
        &self,
        server: &Server,
        mut fetched: Result<Fetched, ArchiveError>,
    ) -> Result<Fetched, ArchiveError> {
        let (segment, mut said_at) = (self.file, None::<Instant>);
        while let Err(failure) = &fetched {
            let error = chain(failure);
            if let Without::GoesOn(how) = server.without() {
                warn!(segment, %error, "WAL not fetched; {how}");
                return Ok(Fetched::Left);
            }
            if said_at.is_none_or(|said_at| said_at.elapsed() >= SAY_EVERY) {
                said_at = Some(Instant::now());
                warn!(
                    segment, %error,
                    "WAL is waited for: this standby has no primary_conninfo, so it gets WAL from the \
                     repository alone, and is promoted only with all that is stored. To promote it \
                     without, set restore_command = '' and reload"
                );
            }
            sleep(RETRY_EVERY).await;
            fetched = self.fetch().await;
        }
        if said_at.is_some() {
            info!(segment, "WAL is no longer waited for");
        }
        fetched
    }
}

async fn fetch_once(
    place: &Place,
    file: &str,
    path: &Path,
    until: Option<PgLsn>,
) -> Result<Fetched, ArchiveError> {
    if let Some(until) = until {
        let segment_bytes = newest::segment_bytes(place).await?;
        if is_behind(file, segment_bytes, until) {
            info!(segment = file, %until, "WAL behind the target is left");
            return Ok(Fetched::Left);
        }
    }
    fetch_from(place, file, path, until).await
}

/// Whether a file is a segment that begins at a position or after it.
pub(crate) fn is_behind(file: &str, segment_bytes: u64, until: PgLsn) -> bool {
    let segment = WalFile::parse(file, segment_bytes);
    matches!(segment, Ok(WalFile::Segment(it)) if it.number * segment_bytes >= until.into())
}

async fn fetch_from(
    place: &Place,
    file: &str,
    path: &Path,
    until: Option<PgLsn>,
) -> Result<Fetched, ArchiveError> {
    let found = wal::readable(place, wal::find(place, file).await?).await?;
    let found = match found.as_slice() {
        [one] => one,
        [] => return fetch_growing(place, file, path, until).await,
        several => {
            let (file, count) = (file.to_owned(), several.len());
            return Err(ArchiveError::Ambiguous { file, count });
        }
    };
    let provisional = path.with_extension("pgmesh");
    let failed = |source| WalError::Write { name: provisional.display().to_string(), source };
    let mut target = fs::File::create(&provisional).map_err(failed)?;
    let written = wal::read(place, found, |chunk| target.write_all(chunk).map_err(failed)).await;
    if let Err(error) = written {
        fs::remove_file(&provisional).map_err(failed)?;
        // Listed and gone: somebody deletes. Nothing is proven by that.
        if error.is_gone() {
            let reason = "it was listed a moment ago".to_owned();
            return Err(ArchiveError::Missing { file: file.to_owned(), reason });
        }
        let pieces = if error.is_damage() { all_pieces(place, file).await? } else { None };
        let Some(content) = pieces else { return Err(error.into()) };
        put(path, &content)?;
        warn!(segment = file, error = %chain(&error), "damaged WAL segment put together from its pieces");
        return Ok(Fetched::Done);
    }
    if let Err(error) = require_same(place, file, &provisional).await {
        fs::remove_file(&provisional).map_err(failed)?;
        return Err(error);
    }
    fs::rename(&provisional, path)
        .map_err(|source| ArchiveError::Write { path: path.to_owned(), source })?;
    debug!(segment = file, "WAL file fetched");
    Ok(Fetched::Done)
}

/// Refuses a segment from which a piece that is stored of it differs: `path` has its content.
async fn require_same(place: &Place, file: &str, path: &Path) -> Result<(), ArchiveError> {
    let read = |source| ArchiveError::Read { path: path.to_owned(), source };
    let content = fs::File::open(path).map_err(read)?;
    let segment_bytes = content.metadata().map_err(read)?.len();
    let pieces = conflict::pieces_of(place, file, segment_bytes).await?;
    Ok(conflict::require_same(file, content, &pieces)?)
}

/// Fetches a segment of which only pieces are stored, because it was still growing; or only the
/// beginning that it has in common with the timeline before, because nothing came after.
async fn fetch_growing(
    place: &Place,
    file: &str,
    path: &Path,
    until: Option<PgLsn>,
) -> Result<Fetched, ArchiveError> {
    let segment_bytes = newest::segment_bytes(place).await?;
    let Ok(WalFile::Segment(segment)) = WalFile::parse(file, segment_bytes) else {
        return absent(place, file, segment_bytes).await;
    };
    for _ in 0..wal::LISTS_MAX {
        let stored = WalMap::around(place, segment, segment_bytes).await?;
        if let Some(fetched) = fetch_listed(&stored, segment, (place, file, path, until)).await? {
            return Ok(fetched);
        }
    }
    let reason = "each time one of its pieces was listed a moment ago".to_owned();
    Err(ArchiveError::Missing { file: file.to_owned(), reason })
}

/// Fetches a growing segment as it was listed; `None` if a piece of it was replaced meanwhile.
async fn fetch_listed(
    stored: &WalMap,
    segment: Segment,
    (place, file, path, until): (&Place, &str, &Path, Option<PgLsn>),
) -> Result<Option<Fetched>, ArchiveError> {
    // Complete segments are stored before their pieces are removed: it is one by now if the list of
    // pieces was read while they were.
    if !wal::find(place, file).await?.is_empty() {
        return Box::pin(fetch_from(place, file, path, until)).await.map(Some);
    }
    let missing = |reason| Err(ArchiveError::Missing { file: file.to_owned(), reason });
    let pieces = stored.pieces.get(&segment).map_or(&[][..], Vec::as_slice);
    let cover = piece::cover(pieces);
    let covered = stored.within_reach(segment);
    if covered == 0 {
        return absent(place, file, stored.segment_bytes).await.map(Some);
    }
    if cover.furthest > covered {
        return missing(format!("a piece of it is missing after {covered} bytes"));
    }
    let start = segment.number * stored.segment_bytes;
    let has_target = until.map(u64::from).is_some_and(|it| start < it && it <= start + covered);
    if let Some(reason) = stored.goes_on(segment, covered).filter(|_| !has_target) {
        return missing(format!("only {covered} bytes of it are stored, and {reason}"));
    }
    let content = match beginning(place, stored, segment, covered).await {
        // A larger piece, or the complete segment, was stored before it went.
        Err(error) if error.is_gone() => return Ok(None),
        content => content?,
    };
    let end = usize::try_from(covered).unwrap_or(usize::MAX).min(content.len());
    if has_itself(path, file, &content[..end])? {
        info!(
            segment = file,
            bytes = covered,
            "left to the server's own, which begins with what is stored"
        );
        return Ok(Some(Fetched::Left));
    }
    put(path, &content)?;
    info!(segment = file, bytes = covered, "WAL segment put together from its pieces");
    Ok(Some(Fetched::Done))
}

/// Whether the server has the segment itself, and what is stored of it is the beginning of that. PostgreSQL
/// would put the file that it is given in the place of its own: with what the repository does not have yet,
/// commits would go that a synchronous standby has confirmed.
///
/// Source: `KeepFileRestoredFromArchive` in `xlogarchive.c`.
fn has_itself(path: &Path, file: &str, stored: &[u8]) -> Result<bool, ArchiveError> {
    let own = path.with_file_name(file);
    if own == path {
        return Ok(false);
    }
    let mut beginning = vec![0; stored.len()];
    match fs::File::open(&own).and_then(|mut own| own.read_exact(&mut beginning)) {
        Ok(()) => Ok(beginning == stored),
        Err(error) => match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::UnexpectedEof => Ok(false),
            _ => Err(ArchiveError::Read { path: own, source: error }),
        },
    }
}

/// Writes a segment; it gets its name when it is whole.
fn put(path: &Path, content: &[u8]) -> Result<(), ArchiveError> {
    let provisional = path.with_extension("pgmesh");
    let written = fs::write(&provisional, content).and_then(|()| fs::rename(&provisional, path));
    written.map_err(|source| {
        // What there is of it would take room on a disk that may have none.
        fs::remove_file(&provisional).ok();
        ArchiveError::Write { path: path.to_owned(), source }
    })
}

/// All of a segment whose complete object is damaged, from pieces that were not removed yet, or that
/// the store keeps; `None` if they are not all there.
async fn all_pieces(place: &Place, file: &str) -> Result<Option<Vec<u8>>, ArchiveError> {
    let segment_bytes = newest::segment_bytes(place).await?;
    let Ok(WalFile::Segment(segment)) = WalFile::parse(file, segment_bytes) else {
        return Ok(None);
    };
    let pieces = piece::list_of(place, segment, segment_bytes).await?;
    if piece::cover(&pieces).to < segment_bytes {
        return Ok(None);
    }
    match piece::stitch_whole(place, segment, segment_bytes, &pieces).await {
        Ok(content) => Ok(Some(content)),
        Err(error) if error.is_damage() => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// The first `covered` bytes of a segment and zeros after them: from its own pieces, or, if those
/// do not go so far, from the same segment of the timeline before.
async fn beginning(
    place: &Place,
    stored: &WalMap,
    segment: Segment,
    covered: u64,
) -> Result<Vec<u8>, WalError> {
    let bytes = stored.segment_bytes;
    let pieces = |segment| stored.pieces.get(&segment).map_or(&[][..], Vec::as_slice);
    if piece::cover(pieces(segment)).to >= covered {
        return piece::stitch_whole(place, segment, bytes, pieces(segment)).await;
    }
    let mut content = Vec::new();
    let Some((parent, _)) = stored.parent(segment) else { return Ok(content) };
    let mut is_damaged = false;
    if let [complete] = stored.objects(parent) {
        let read = wal::read(place, complete, |chunk| {
            content.extend_from_slice(chunk);
            Ok(())
        });
        match read.await {
            Err(error) if error.is_damage() && piece::cover(pieces(parent)).to >= covered => {
                warn!(segment = complete.name, error = %chain(&error), "damaged WAL segment left out");
                is_damaged = true;
            }
            read => read?,
        }
    }
    if is_damaged || stored.objects(parent).is_empty() {
        content = piece::stitch_whole(place, parent, bytes, pieces(parent)).await?;
    }
    let end = usize::try_from(covered).unwrap_or(usize::MAX).min(content.len());
    content[end..].fill(0);
    Ok(content)
}

async fn absent(place: &Place, file: &str, segment_bytes: u64) -> Result<Fetched, ArchiveError> {
    match wal::absence(place, file, segment_bytes).await? {
        Absence::NeverProduced => {
            info!(segment = file, "WAL file was never produced, as far as the repository shows");
            Ok(Fetched::NeverProduced)
        }
        Absence::Missing { reason } => Err(ArchiveError::Missing { file: file.to_owned(), reason }),
    }
}

/// The exit code of `wal-fetch`.
pub fn exit_code(fetched: &Result<Fetched, ArchiveError>) -> u8 {
    match fetched {
        Ok(Fetched::Done) => 0,
        Ok(Fetched::NeverProduced | Fetched::Left) => NOT_THERE,
        Err(failure) => {
            error!(error = %chain(failure), "WAL file not fetched; recovery must not go on");
            GIVE_UP
        }
    }
}

/// The system identifier of the server in whose data directory we are.
///
/// # Errors
///
/// There is no such file, or it cannot be read.
pub fn system_identifier() -> Result<u64, ArchiveError> {
    let here = || std::env::current_dir().unwrap_or_default();
    let control = fs::read(CONTROL_FILE).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => ArchiveError::NoDataDirectory { path: here() },
        _ => ArchiveError::Read { path: here().join(CONTROL_FILE), source: error },
    })?;
    match control.first_chunk::<8>() {
        Some(bytes) => Ok(u64::from_le_bytes(*bytes)),
        None => Err(ArchiveError::Read {
            path: here().join(CONTROL_FILE),
            source: io::ErrorKind::UnexpectedEof.into(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A recovery reads ahead of its target (`recovery_prefetch`), and asks for the segment after a
    /// backup's own WAL, which retention has removed.
    #[test]
    fn segments_behind_the_target_are_the_end_of_the_wal() {
        let cases = [
            ("before it", "000000010000000000000003", 0x400_0000, false),
            ("it ends there", "000000010000000000000003", 0x400_0001, false),
            ("it begins there", "000000010000000000000004", 0x400_0000, true),
            ("the target is in it", "000000010000000000000004", 0x400_0001, false),
            ("far behind, of another timeline", "000000020000000100000000", 0x400_0000, true),
            ("a history", "00000009.history", 0x400_0000, false),
            ("nonsense", "nonsense", 0, false),
        ];
        for (case, file, until, expected) in cases {
            assert_eq!(is_behind(file, 16 << 20, PgLsn::from(until)), expected, "{case}");
        }
        assert!(is_behind("000000010000000000000004", 1 << 20, PgLsn::from(0x40_0000)));
    }

    #[test]
    fn a_server_keeps_its_own_segment_if_what_is_stored_is_the_beginning_of_it() {
        let directory = tempfile::tempdir().unwrap();
        let (file, path) = ("000000010000000000000003", directory.path().join("RECOVERYXLOG"));
        let own = directory.path().join(file);
        assert!(!has_itself(&path, file, b"stored").unwrap(), "it has none");
        for (case, content, expected) in [
            ("the same", "stored", true),
            ("more", "stored and more", true),
            ("less, and zeros after it", "stor\0\0\0\0", false),
            ("it ends before", "stor", false),
            ("another", "recycled", false),
        ] {
            fs::write(&own, content).unwrap();
            assert_eq!(has_itself(&path, file, b"stored").unwrap(), expected, "{case}");
            // Somebody asks for it by hand.
            assert!(!has_itself(&own, file, b"stored").unwrap(), "{case}");
        }
    }
}
