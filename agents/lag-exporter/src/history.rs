//! The file that keeps the ages of positions over a restart of this agent.
//!
//! It says of which boot of this host its moments are. After another boot they mean nothing, so
//! the file needs no protection against a loss of power: what is not on the disk then is not
//! wanted. A file that cannot be trusted is as good as none.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::past::Pasts;
use crate::ring::{Entry, Micros, micros};
use crate::timelines::Fork;

/// The first word of the file.
const MAGIC: &str = "pgmesh-lag-1";
/// The name of the file in the state directory.
const FILE: &str = "lag-exporter.history";
/// Larger than the history of ten thousand nodes.
const BYTES_MAX: u64 = 256 << 20;

/// What is kept about one group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedGroup {
    /// The group's number.
    pub group: u32,
    /// The number of the cluster whose WAL it is.
    pub system_identifier: u64,
    /// Its newest timeline.
    pub timeline: u32,
    /// Where it left older ones.
    pub forks: Vec<Fork>,
    /// Whose WAL its nodes have. A file of an older version has none.
    #[serde(default)]
    pub pasts: Pasts,
    /// The positions.
    #[serde(with = "steps")]
    pub entries: Vec<Entry>,
}

/// Why a file is not used.
#[derive(Debug, Error)]
pub enum HistoryError {
    /// It cannot be read.
    #[error("read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It cannot be written.
    #[error("write {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is not what was written.
    #[error("the history is damaged: {0}")]
    Damaged(&'static str),
    /// The configuration names another cluster.
    #[error("the history is that of cluster {found}, expected {expected}")]
    OtherCluster {
        /// The cluster in the file.
        found: String,
        /// The cluster in the configuration.
        expected: String,
    },
    /// The host was booted since.
    #[error("the history is from before the last boot of this host")]
    OtherBoot,
}

/// Which process may use a history.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// The cluster, as the configuration names it.
    pub cluster: &'a str,
    /// `/proc/sys/kernel/random/boot_id`.
    pub boot_id: &'a str,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct File<Groups> {
    cluster: String,
    boot_id: String,
    saved_at: Micros,
    groups: Groups,
}

/// Writes what is known at `now`.
///
/// # Errors
///
/// Only if something in it cannot be JSON.
pub fn encode(
    place: Place<'_>,
    now: Duration,
    groups: &[SavedGroup],
) -> Result<Vec<u8>, serde_json::Error> {
    let (cluster, boot_id) = (place.cluster.to_owned(), place.boot_id.to_owned());
    let body = serde_json::to_vec(&File { cluster, boot_id, saved_at: micros(now), groups })?;
    let mut bytes = format!("{MAGIC} {:08x}\n", crc32c::crc32c(&body)).into_bytes();
    bytes.extend(body);
    Ok(bytes)
}

/// Reads what [`encode`] wrote.
///
/// # Errors
///
/// It was damaged, or is about another boot or cluster.
pub fn decode(
    place: Place<'_>,
    now: Duration,
    bytes: &[u8],
) -> Result<Vec<SavedGroup>, HistoryError> {
    let damaged = HistoryError::Damaged;
    let end = bytes.iter().position(|byte| *byte == b'\n').ok_or(damaged("no first line"))?;
    let (head, body) = (&bytes[..end], &bytes[end + 1..]);
    let expected = format!("{MAGIC} {:08x}", crc32c::crc32c(body));
    if head != expected.as_bytes() {
        return Err(damaged("not the checksum"));
    }
    let file: File<Vec<SavedGroup>> =
        serde_json::from_slice(body).map_err(|_| damaged("not the format"))?;
    let (found, expected) = (file.cluster, place.cluster.to_owned());
    if found != expected {
        return Err(HistoryError::OtherCluster { found, expected });
    }
    if file.boot_id != place.boot_id {
        return Err(HistoryError::OtherBoot);
    }
    // Nothing can be known by a moment that has not come.
    let saved_at = file.saved_at;
    let is_past = |entry: &Entry| entry.written_by.max(entry.not_passed_at) <= saved_at;
    let all_past = file.groups.iter().flat_map(|group| &group.entries).all(is_past);
    if saved_at > micros(now) || !all_past {
        return Err(damaged("moments in the future"));
    }
    Ok(file.groups)
}

/// Replaces the file in `directory`: a reader finds the old one or the new one, whole.
///
/// # Errors
///
/// Whatever the file system says.
pub fn write(directory: &Path, bytes: &[u8]) -> Result<(), HistoryError> {
    let path = directory.join(FILE);
    let written = || {
        let growing = path.with_extension("new");
        fs::write(&growing, bytes)?;
        fs::rename(&growing, &path)
    };
    written().map_err(|source| HistoryError::Write { path: path.clone(), source })
}

/// Reads the file in `directory`; `None` if there is none.
///
/// # Errors
///
/// Whatever the file system says, or the file is far too large.
pub fn read(directory: &Path) -> Result<Option<Vec<u8>>, HistoryError> {
    let path = directory.join(FILE);
    let failed = |source| HistoryError::Read { path: path.clone(), source };
    match fs::metadata(&path) {
        // To open a pipe would wait for somebody who writes.
        Ok(it) if !it.is_file() => Err(HistoryError::Damaged("no file")),
        Ok(it) if it.len() > BYTES_MAX => Err(HistoryError::Damaged("too large")),
        Ok(_) => fs::read(&path).map(Some).map_err(failed),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(failed(error)),
    }
}

/// Tries whether a history can be written there.
///
/// # Errors
///
/// It cannot.
pub fn check(directory: &Path) -> Result<(), HistoryError> {
    let path = directory.join(format!("{FILE}.check"));
    let written = fs::write(&path, "").and_then(|()| fs::remove_file(&path));
    written.map_err(|source| HistoryError::Write { path, source })
}

/// Entries as steps from one to the next, which are short numbers.
mod steps {
    use serde::{Deserialize, Deserializer, Serializer};

    use crate::ring::Entry;

    pub(super) fn serialize<S: Serializer>(
        entries: &[Entry],
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        let mut before = Entry::default();
        serializer.collect_seq(entries.iter().map(|entry| {
            let step = (
                entry.lsn.wrapping_sub(before.lsn),
                entry.written_by.wrapping_sub(before.written_by),
                entry.not_passed_at.wrapping_sub(before.not_passed_at),
            );
            before = *entry;
            step
        }))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Vec<Entry>, D::Error> {
        let mut before = Entry::default();
        let steps = Vec::<(u64, i64, i64)>::deserialize(deserializer)?;
        let entries = steps.into_iter().map(|(lsn, written_by, not_passed_at)| {
            before = Entry {
                lsn: before.lsn.wrapping_add(lsn),
                written_by: before.written_by.wrapping_add(written_by),
                not_passed_at: before.not_passed_at.wrapping_add(not_passed_at),
            };
            before
        });
        Ok(entries.collect())
    }
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;
    use proptest::prelude::*;

    use super::*;
    use crate::observation::Directory;
    use crate::past::Run;

    const PLACE: Place<'_> = Place { cluster: "demo", boot_id: "8d0a" };
    const NOW: Duration = Duration::from_secs(1000);
    const BEFORE: Duration = Duration::from_micros(999_999_999);

    fn group(number: u32, entries: Vec<Entry>) -> SavedGroup {
        let fork = Fork { timeline: 2, not_before: 90, not_after: 100 };
        SavedGroup {
            group: number,
            system_identifier: u64::MAX,
            timeline: 3,
            forks: vec![fork],
            pasts: pasts(),
            entries,
        }
    }

    fn pasts() -> Pasts {
        let started_at = DateTime::from_timestamp_micros(1_700_000_000_123_456).unwrap();
        let mut pasts = Pasts::default();
        let directory = Directory { statistics_reset: Some(started_at), checkpoint: u64::MAX };
        let run = Run { system_identifier: u64::MAX, timeline: 3, started_at, directory };
        pasts.writes("a", run);
        pasts
    }

    fn groups() -> Vec<SavedGroup> {
        let entry = |lsn, written_by, not_passed_at| Entry { lsn, written_by, not_passed_at };
        vec![
            group(0, vec![entry(5, -7_000_000, -9_000_000), entry(1 << 60, 900, 950)]),
            group(4, vec![]),
        ]
    }

    #[test]
    fn what_was_written_is_read() {
        let bytes = encode(PLACE, NOW, &groups()).unwrap();
        assert_eq!(decode(PLACE, NOW, &bytes).unwrap(), groups());
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(read(directory.path()).unwrap(), None);
        write(directory.path(), b"old").unwrap();
        write(directory.path(), &bytes).unwrap();
        assert_eq!(read(directory.path()).unwrap(), Some(bytes));
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_cannot_be_trusted_is_refused() {
        let bytes = encode(PLACE, NOW, &groups()).unwrap();
        let error = |place, now, bytes: &[u8]| decode(place, now, bytes).unwrap_err().to_string();
        let other_boot = Place { boot_id: "8d0b", ..PLACE };
        let other_cluster = Place { cluster: "prod", ..PLACE };
        let later = encode(PLACE, Duration::from_micros(949), &groups()).unwrap();
        for (expected, found) in [
            ("the history is damaged: no first line", error(PLACE, NOW, b"")),
            ("the history is damaged: not the checksum", error(PLACE, NOW, b"x\n")),
            ("the history is damaged: moments in the future", error(PLACE, BEFORE, &bytes)),
            ("the history is damaged: moments in the future", error(PLACE, NOW, &later)),
            (
                "the history is from before the last boot of this host",
                error(other_boot, NOW, &bytes),
            ),
            (
                "the history is that of cluster demo, expected prod",
                error(other_cluster, NOW, &bytes),
            ),
        ] {
            assert_eq!(found, expected);
        }
    }

    #[test]
    fn ten_groups_of_three_days_are_a_small_file() {
        let entries: Vec<_> = (0..1200_u32)
            .map(|index| Entry {
                lsn: u64::from(index) * 7_654_321,
                written_by: i64::from(index) * 216_123_456 + 1234,
                not_passed_at: i64::from(index) * 216_123_456,
            })
            .collect();
        let groups: Vec<_> = (0..10).map(|number| group(number, entries.clone())).collect();
        let bytes = encode(PLACE, Duration::from_hours(100), &groups).unwrap();
        assert!(bytes.len() < 400_000, "{} bytes", bytes.len());
    }

    proptest! {
        #[test]
        fn a_damaged_file_is_refused(
            at in any::<prop::sample::Index>(),
            byte in any::<u8>(),
            cut in any::<bool>(),
        ) {
            let good = encode(PLACE, NOW, &groups()).unwrap();
            let (mut bytes, at) = (good.clone(), at.index(good.len()));
            if cut {
                bytes.truncate(at);
            } else {
                bytes[at] = byte;
            }
            prop_assert!(bytes == good || decode(PLACE, NOW, &bytes).is_err());
        }

        #[test]
        fn any_file_is_refused_or_read(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(decode(PLACE, NOW, &bytes).is_err());
        }
    }
}
