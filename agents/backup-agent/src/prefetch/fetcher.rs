//! The process that fetches WAL ahead of a recovery.

use std::collections::BTreeMap;
use std::error::Error;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use shared::pg::wal::{Segment, WalFile};
use shared::shutdown;
use shared::telemetry::chain;
use tokio::task::JoinSet;
use tokio::time::sleep;
use tracing::{info, warn};

use super::{Ahead, PART, POLL, Wanted};
use crate::archive;
use crate::config::Config;
use crate::repository::{Place, Repository};
use crate::wal::{self, WalError, WalObject, conflict};

/// A recovery that takes nothing for so long pauses, or goes on by streaming.
const IDLE: Duration = Duration::from_mins(1);

/// Segments fetched at once. Each takes a core while it is opened, and memory for its object.
const AT_ONCE: u64 = 4;
/// The most WAL that is fetched at once, for larger segments, in bytes.
const AT_ONCE_BYTES: u64 = 256 << 20;
/// The most WAL that lies ready, for larger segments, in bytes.
const AHEAD_BYTES: u64 = 1 << 30;
/// Objects listed at once: one request to an S3 store.
const LISTED: usize = 256;

/// Fetches ahead for the recovery that wants its segments at `path`, as long as it goes on.
///
/// # Errors
///
/// The repository cannot be opened, or the directory not be read.
pub async fn run(config: &Config, path: &Path) -> anyhow::Result<()> {
    let stop = shutdown::signalled().context("install signal handlers")?;
    let Some(ahead) = Ahead::of(path) else { return Ok(()) };
    let directory = File::open(&ahead.directory).context("open the directory of fetched WAL")?;
    if directory.try_lock().is_err() {
        return Ok(());
    }
    ahead.remove_leftovers();
    let place = Repository::open(config).await?;
    let place = place.place(config.wal.group, archive::system_identifier()?);
    let segments = config.wal.prefetch_segments;
    let mut prefetcher = Prefetcher::new(place, ahead.clone(), segments).context("begin")?;
    info!(directory = %ahead.directory.display(), "fetching WAL ahead of the recovery");
    let done = tokio::select! {
        done = prefetcher.work() => done,
        () = ahead.is_over(path) => Ok(()),
        _ = stop => Ok(()),
    };
    prefetcher.running.shutdown().await;
    info!(segments = prefetcher.fetched, "no more WAL is fetched ahead");
    // `directory` is locked until nothing is left of it.
    let removed = fs::remove_dir_all(&ahead.directory).context("remove what was fetched ahead");
    done.and(removed)
}

/// How many segments lie ready or are on their way, and how many of them are fetched at once.
fn limits(segments: u32, segment_bytes: u64) -> (u64, u64) {
    let ahead = u64::from(segments).min((AHEAD_BYTES / segment_bytes).max(1));
    (ahead, AT_ONCE.min((AT_ONCE_BYTES / segment_bytes).max(1)))
}

/// Where to go on once `wal-fetch` has fetched `wanted` itself: at `begin`, if what follows is on
/// its way or ready, from `oldest` on; otherwise after `wanted`.
fn go_on(wanted: Segment, oldest: Segment, begin: Segment) -> Segment {
    if (oldest..=begin).contains(&wanted.next()) { begin } else { wanted.next() }
}

/// What is fetched for the recovery.
#[derive(Debug)]
struct Prefetcher {
    place: Place,
    ahead: Ahead,
    /// The setting.
    segments: u32,
    wanted: Wanted,
    /// What the last look at the directory showed.
    names: Vec<String>,
    /// The oldest segment that is on its way or ready; `begin` if there is none.
    oldest: Segment,
    /// The first segment that was not begun.
    begin: Segment,
    /// What the store has, as listed last: the objects of each file.
    listed: BTreeMap<String, Vec<WalObject>>,
    running: JoinSet<Result<(), WalError>>,
    /// Nothing more is begun until `wal-fetch` had to fetch a segment itself: the WAL ends here, or
    /// could not be read.
    is_stuck: bool,
    /// Segments that were fetched.
    fetched: u64,
}

impl Prefetcher {
    fn new(place: Place, ahead: Ahead, segments: u32) -> io::Result<Self> {
        let wanted = ahead.wanted()?;
        let begin = wanted.segment.next();
        Ok(Self {
            place,
            ahead,
            segments,
            wanted,
            names: Vec::new(),
            oldest: begin,
            begin,
            listed: BTreeMap::new(),
            running: JoinSet::new(),
            is_stuck: false,
            fetched: 0,
        })
    }

    async fn work(&mut self) -> anyhow::Result<()> {
        let mut moved_at = Instant::now();
        while moved_at.elapsed() < IDLE {
            if self.follow().context("look at what was fetched ahead")? {
                moved_at = Instant::now();
            }
            if let Err(error) = self.begin_more().await {
                self.stick(&error);
            }
            tokio::select! {
                Some(ended) = self.running.join_next() => match ended {
                    Ok(Ok(())) => self.fetched += 1,
                    Ok(Err(error)) => self.stick(&error),
                    Err(error) => self.stick(&error),
                },
                () = sleep(POLL) => {}
            }
        }
        Ok(())
    }

    /// `wal-fetch` will come to what is missing, and say what is wrong.
    fn stick(&mut self, error: &(dyn Error + 'static)) {
        warn!(error = %chain(error), "WAL not fetched ahead");
        self.is_stuck = true;
    }

    /// Finds out what the recovery did since the last look; returns whether it did anything.
    fn follow(&mut self) -> io::Result<bool> {
        let (wanted, names) = (self.ahead.wanted()?, self.ahead.names()?);
        let has_moved = wanted != self.wanted || names != self.names;
        if wanted != self.wanted {
            self.begin = go_on(wanted.segment, self.oldest, self.begin);
            self.wanted = wanted;
            self.listed.clear();
            self.is_stuck = false;
        }
        self.oldest = self.begin;
        for name in &names {
            let file = name.strip_suffix(PART).unwrap_or(name);
            let Ok(WalFile::Segment(segment)) = WalFile::parse(file, wanted.segment_bytes) else {
                continue;
            };
            if (wanted.segment.next()..self.begin).contains(&segment) {
                self.oldest = self.oldest.min(segment);
            } else if file == name {
                // Gone already if the recovery has just taken it.
                fs::remove_file(self.ahead.directory.join(name)).ok();
            }
        }
        self.names = names;
        Ok(has_moved)
    }

    /// Begins to fetch as many segments as are allowed and there is room for.
    async fn begin_more(&mut self) -> Result<(), WalError> {
        let segment_bytes = self.wanted.segment_bytes;
        let (ahead, at_once) = limits(self.segments, segment_bytes);
        while !self.is_stuck
            && (self.running.len() as u64) < at_once
            && self.begin.number < self.oldest.number + ahead
            && self.ahead.has_room(ahead * segment_bytes)
        {
            let file = self.begin.name(segment_bytes);
            if !self.listed.contains_key(&file) {
                self.listed = wal::stored_from(&self.place, &file, Some(LISTED)).await?;
            }
            match self.listed.remove(&file).as_deref() {
                Some([object]) => {
                    self.begin_one(object.clone(), self.ahead.part(&file))?;
                    self.begin = self.begin.next();
                }
                // The end, or two contents.
                _ => self.is_stuck = true,
            }
        }
        Ok(())
    }

    fn begin_one(&mut self, object: WalObject, part: PathBuf) -> Result<(), WalError> {
        match File::create_new(&part) {
            Ok(target) => {
                self.running.spawn(fetch(self.place.clone(), object, part, target));
                Ok(())
            }
            // Of a task that runs since before the recovery went elsewhere and came back.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            Err(source) => Err(WalError::Write { name: part.display().to_string(), source }),
        }
    }
}

/// Fetches a segment; it gets its name when it is whole.
async fn fetch(
    place: Place,
    object: WalObject,
    part: PathBuf,
    mut target: File,
) -> Result<(), WalError> {
    let failed = |source| WalError::Write { name: part.display().to_string(), source };
    let whole = async {
        let (mut segment_bytes, file) = (0, &object.file);
        let take = |chunk: &[u8]| {
            segment_bytes += chunk.len() as u64;
            target.write_all(chunk).map_err(failed)
        };
        wal::read(&place, &object, take).await?;
        let pieces = conflict::pieces_of(&place, file, segment_bytes).await?;
        conflict::require_same(file, File::open(&part).map_err(failed)?, &pieces)?;
        fs::rename(&part, part.with_extension("")).map_err(failed)
    };
    let whole = whole.await;
    if whole.is_err() {
        fs::remove_file(&part).ok();
    }
    whole
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn larger_segments_are_fewer() {
        let cases = [
            ("the default", 16, 16, (16, 4)),
            ("small segments", 16, 1, (16, 4)),
            ("many", 200, 16, (64, 4)),
            ("one", 1, 16, (1, 4)),
            ("128 MiB", 16, 128, (8, 2)),
            ("1 GiB", 16, 1024, (1, 1)),
        ];
        for (case, segments, mib, expected) in cases {
            assert_eq!(limits(segments, mib * MIB), expected, "{case}");
        }
    }

    #[test]
    fn what_is_on_its_way_is_kept_if_it_follows() {
        let at = |timeline, number| Segment { timeline, number };
        let cases = [
            ("one before what is ready", at(1, 4), at(1, 9)),
            ("one in between, that could not be read", at(1, 6), at(1, 9)),
            ("the last begun", at(1, 8), at(1, 9)),
            ("beyond: the store has more now", at(1, 9), at(1, 10)),
            ("far beyond", at(1, 90), at(1, 91)),
            ("back, to where the redo begins", at(1, 1), at(1, 2)),
            ("another timeline", at(2, 6), at(2, 7)),
        ];
        for (case, wanted, expected) in cases {
            assert_eq!(go_on(wanted, at(1, 5), at(1, 9)), expected, "{case}");
        }
    }
}
