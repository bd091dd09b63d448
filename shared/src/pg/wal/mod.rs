//! WAL files: their names, the segments and timelines they stand for, and their page header.

mod header;
mod history;

use thiserror::Error;
use tokio_postgres::types::PgLsn;

pub use header::{WAL_HEADER_BYTES, WalHeader, WalHeaderError};
pub use history::{HistoryEntry, HistoryError, parse_history};

/// Smallest `wal_segment_size`, in bytes. Source: `WalSegMinSize` in `xlog_internal.h`.
pub const SEGMENT_BYTES_MIN: u64 = 1 << 20;
/// Largest `wal_segment_size`, in bytes. Source: `WalSegMaxSize` in `xlog_internal.h`.
pub const SEGMENT_BYTES_MAX: u64 = 1 << 30;

/// Returns `segment_bytes` if it can be a `wal_segment_size`.
///
/// # Errors
///
/// Fails unless it is a power of two from 1 MiB to 1 GiB. Source: `IsValidWalSegSize`.
pub fn check_segment_bytes(segment_bytes: u64) -> Result<u64, SegmentSizeError> {
    let in_range = (SEGMENT_BYTES_MIN..=SEGMENT_BYTES_MAX).contains(&segment_bytes);
    if in_range && segment_bytes.is_power_of_two() {
        Ok(segment_bytes)
    } else {
        Err(SegmentSizeError(segment_bytes))
    }
}

/// A number of bytes that is no `wal_segment_size`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("WAL segment size is {0} bytes, expected a power of two from 1048576 to 1073741824")]
pub struct SegmentSizeError(pub u64);

/// Returns the number of the segment that holds the byte at `lsn`, counted from the start of the
/// WAL. `segment_bytes` is as in [`segment_name`].
pub fn segment_number(lsn: PgLsn, segment_bytes: u64) -> u64 {
    u64::from(lsn) / segment_bytes
}

/// Returns the position of the first byte of segment `number`, the reverse of
/// [`segment_number`]; `None` beyond the last possible LSN.
pub fn segment_start(number: u64, segment_bytes: u64) -> Option<PgLsn> {
    number.checked_mul(segment_bytes).map(PgLsn::from)
}

/// Returns the name of the WAL segment file that holds the byte at `lsn`.
///
/// The name is 24 hexadecimal digits: timeline, log number, segment number within the log.
/// `segment_bytes` is `wal_segment_size`, a power of two from 1 MiB to 1 GiB, 16 MiB unless
/// `initdb --wal-segsize` said otherwise; see [`check_segment_bytes`].
///
/// Unlike `pg_walfile_name()`, which at an exact segment boundary names the segment before (it
/// answers "where did the last byte go"), this names the segment that starts there.
///
/// Source: `XLogFileName` and `XLByteToSeg` in `src/include/access/xlog_internal.h`.
pub fn segment_name(timeline: u32, lsn: PgLsn, segment_bytes: u64) -> String {
    Segment { timeline, number: segment_number(lsn, segment_bytes) }.name(segment_bytes)
}

/// One WAL segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Segment {
    /// The timeline it belongs to.
    pub timeline: u32,
    /// Which segment, counted from the start of the WAL.
    pub number: u64,
}

impl Segment {
    /// The name of the segment's file. `segment_bytes` is as in [`segment_name`].
    pub fn name(self, segment_bytes: u64) -> String {
        let Self { timeline, number } = self;
        let segments_per_log = (1 << 32) / segment_bytes;
        format!("{timeline:08X}{:08X}{:08X}", number / segments_per_log, number % segments_per_log)
    }

    /// The segment after this one on the same timeline.
    pub fn next(self) -> Self {
        Self { number: self.number + 1, ..self }
    }
}

/// What the name of a file in `pg_wal` or in the archive says.
///
/// Source: `IsXLogFileName` and its neighbours in `src/include/access/xlog_internal.h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WalFile {
    /// A complete segment: `000000010000000000000002`.
    Segment(Segment),
    /// The last segment of a timeline that a promotion ended: `000000010000000000000002.partial`.
    Partial(Segment),
    /// The label of a base backup: `000000010000000000000002.00000028.backup`.
    BackupLabel {
        /// The segment in which the backup started.
        segment: Segment,
        /// Where in that segment it started, in bytes.
        offset: u32,
    },
    /// The history of a timeline: `00000002.history`.
    History {
        /// The timeline.
        timeline: u32,
    },
}

/// A file name that PostgreSQL would not give to a WAL file.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("`{name}` is not the name of a WAL file with segments of {segment_bytes} bytes")]
pub struct WalFileError {
    /// The name.
    pub name: String,
    /// The `wal_segment_size` it was read with.
    pub segment_bytes: u64,
}

impl WalFile {
    /// Reads a file name, without a directory. `segment_bytes` is as in [`segment_name`].
    ///
    /// # Errors
    ///
    /// Fails on any other name: wrong length, lower-case digits, a segment number that is too
    /// large for the log, timeline 0.
    pub fn parse(name: &str, segment_bytes: u64) -> Result<Self, WalFileError> {
        let parsed = Self::parse_name(name, segment_bytes);
        parsed.ok_or_else(|| WalFileError { name: name.to_owned(), segment_bytes })
    }

    fn parse_name(name: &str, segment_bytes: u64) -> Option<Self> {
        if let Some(digits) = name.strip_suffix(".history") {
            return Some(Self::History { timeline: timeline(digits)? });
        }
        let (digits, rest) = name.split_at_checked(24)?;
        let segment = parse_segment(digits, segment_bytes)?;
        match rest {
            "" => Some(Self::Segment(segment)),
            ".partial" => Some(Self::Partial(segment)),
            rest => {
                let offset = hex32(rest.strip_prefix('.')?.strip_suffix(".backup")?)?;
                let inside = u64::from(offset) < segment_bytes;
                inside.then_some(Self::BackupLabel { segment, offset })
            }
        }
    }

    /// The timeline in the name.
    pub fn timeline(self) -> u32 {
        match self {
            Self::Segment(segment) | Self::Partial(segment) | Self::BackupLabel { segment, .. } => {
                segment.timeline
            }
            Self::History { timeline } => timeline,
        }
    }
}

/// Returns the name of the history file of `timeline`.
///
/// Source: `TLHistoryFileName`. Timeline 1 has none: it has no history.
pub fn history_name(timeline: u32) -> String {
    format!("{timeline:08X}.history")
}

fn parse_segment(digits: &str, segment_bytes: u64) -> Option<Segment> {
    let segments_per_log = (1 << 32) / segment_bytes;
    let log = u64::from(hex32(digits.get(8..16)?)?);
    let in_log = u64::from(hex32(digits.get(16..24)?)?);
    if in_log >= segments_per_log {
        return None;
    }
    Some(Segment {
        timeline: timeline(digits.get(0..8)?)?,
        number: log * segments_per_log + in_log,
    })
}

fn timeline(digits: &str) -> Option<u32> {
    hex32(digits).filter(|timeline| *timeline > 0)
}

/// Eight upper-case hexadecimal digits, as PostgreSQL writes them.
fn hex32(digits: &str) -> Option<u32> {
    let is_digit = |byte: u8| matches!(byte, b'0'..=b'9' | b'A'..=b'F');
    if digits.len() != 8 || !digits.bytes().all(is_digit) {
        return None;
    }
    u32::from_str_radix(digits, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn lsn(text: &str) -> PgLsn {
        text.parse().unwrap()
    }

    #[test]
    fn segment_name_follows_timeline_log_and_segment() {
        let cases = [
            ("first byte of the WAL", 1, "0/0", 16 * MIB, "000000010000000000000000"),
            ("last byte of a segment", 1, "0/2FFFFFF", 16 * MIB, "000000010000000000000002"),
            ("first byte of the next", 1, "0/3000000", 16 * MIB, "000000010000000000000003"),
            ("last segment of a log", 1, "0/FF000000", 16 * MIB, "0000000100000000000000FF"),
            ("log number carries over", 1, "1/0", 16 * MIB, "000000010000000100000000"),
            ("timeline is hexadecimal", 26, "0/3000000", 16 * MIB, "0000001A0000000000000003"),
            ("1 GiB segments", 1, "2/C0000000", 1024 * MIB, "000000010000000200000003"),
        ];
        for (case, timeline, position, segment_bytes, expected) in cases {
            let name = segment_name(timeline, lsn(position), segment_bytes);
            assert_eq!(name, expected, "{case}");
            // And back.
            let WalFile::Segment(segment) = WalFile::parse(&name, segment_bytes).unwrap() else {
                panic!("{case}: {name} is a segment");
            };
            let number = segment_number(lsn(position), segment_bytes);
            assert_eq!(segment, Segment { timeline, number }, "{case}");
            let start = segment_start(number, segment_bytes).unwrap();
            assert!(start <= lsn(position), "{case}");
            assert!(lsn(position) < segment_start(number + 1, segment_bytes).unwrap(), "{case}");
        }
    }

    #[test]
    fn the_segment_after_the_last_of_a_log_is_the_first_of_the_next() {
        let last = Segment { timeline: 1, number: 0xFF };
        assert_eq!(last.next().name(16 * MIB), "000000010000000100000000");
    }

    #[test]
    fn every_kind_of_wal_file_is_told_by_its_name() {
        let segment = Segment { timeline: 0x1A, number: 0x1_02 };
        for (name, expected) in [
            ("0000001A0000000100000002", WalFile::Segment(segment)),
            ("0000001A0000000100000002.partial", WalFile::Partial(segment)),
            (
                "0000001A0000000100000002.00000028.backup",
                WalFile::BackupLabel { segment, offset: 0x28 },
            ),
            ("0000001A.history", WalFile::History { timeline: 0x1A }),
        ] {
            let parsed = WalFile::parse(name, 16 * MIB).unwrap();
            assert_eq!(parsed, expected);
            assert_eq!(parsed.timeline(), 0x1A);
        }
        assert_eq!(history_name(26), "0000001A.history");
    }

    #[test]
    fn other_names_are_refused() {
        for name in [
            "",
            "00000001000000000000000",
            "0000000100000000000000020",
            "00000001000000000000000a",
            "000000000000000000000002",
            "000000010000000000000100",
            "000000010000000000000002.part",
            "000000010000000000000002.01000000.backup",
            "000000010000000000000002.28.backup",
            "00000001000000000000000é",
            "1.history",
            "00000000.history",
            "../00000001.history",
            "archive_status",
            "00000002.history.tmp",
        ] {
            let error = WalFile::parse(name, 16 * MIB).unwrap_err();
            assert_eq!(
                error.to_string(),
                format!("`{name}` is not the name of a WAL file with segments of 16777216 bytes")
            );
        }
    }

    #[test]
    fn a_segment_size_is_a_power_of_two_within_limits() {
        for good in [MIB, 16 * MIB, 1024 * MIB] {
            assert_eq!(check_segment_bytes(good), Ok(good));
        }
        for bad in [0, 1, MIB / 2, 3 * MIB, 2048 * MIB, u64::MAX] {
            assert_eq!(check_segment_bytes(bad), Err(SegmentSizeError(bad)));
        }
        assert_eq!(
            SegmentSizeError(5).to_string(),
            "WAL segment size is 5 bytes, expected a power of two from 1048576 to 1073741824"
        );
    }
}
