//! The page header at the start of a WAL segment.

use std::fmt;

use thiserror::Error;
use tokio_postgres::types::PgLsn;

use super::{Segment, SegmentSizeError, check_segment_bytes, segment_start};

/// The long header on the first page of every WAL segment: which cluster wrote it, and where in
/// the WAL it belongs.
///
/// Layout, little-endian: magic u16, info u16, timeline u32, page address u64, remaining bytes
/// u32, 4 bytes of padding, system identifier u64, segment size u32, block size u32.
///
/// Source: `XLogLongPageHeaderData` in `src/include/access/xlog_internal.h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WalHeader {
    /// `XLOG_PAGE_MAGIC`: which major version wrote it.
    pub magic: u16,
    /// The timeline of the first record on the page.
    pub timeline: u32,
    /// Where the page, and so the segment, begins.
    pub start_lsn: PgLsn,
    /// How many bytes of a record of the segment before continue here.
    pub remaining_bytes: u32,
    /// The cluster's system identifier.
    pub system_identifier: u64,
    /// `wal_segment_size` in bytes, checked.
    pub segment_bytes: u64,
    /// The size of a WAL page in bytes.
    pub block_bytes: u32,
}

/// Bytes in a long page header.
pub const WAL_HEADER_BYTES: usize = 40;

/// The flag of a long header. Source: `XLP_LONG_HEADER`.
const LONG_HEADER: u16 = 0x0002;

/// `XLOG_PAGE_MAGIC` of each major version of PostgreSQL we read.
const MAGICS: [(u16, u32); 4] = [(0xD110, 15), (0xD113, 16), (0xD116, 17), (0xD118, 18)];

/// Why bytes are not the start of a WAL segment.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum WalHeaderError {
    /// There are too few bytes.
    #[error("WAL segment ends after {found} bytes, expected a header of {WAL_HEADER_BYTES}")]
    Short {
        /// How many there are.
        found: usize,
    },
    /// The magic number is of no version we know.
    #[error("WAL page magic is {found:04X}, expected one of {}", Magics)]
    Magic {
        /// The number found.
        found: u16,
    },
    /// The first page of a segment must have a long header.
    #[error(
        "WAL page flags are {found:04X}, \
         expected a long header ({LONG_HEADER:04X}) at the start of a segment"
    )]
    NotLong {
        /// The flags found.
        found: u16,
    },
    /// The timeline is 0.
    #[error("WAL page timeline is 0, expected 1 or above")]
    Timeline,
    /// The segment size is impossible.
    #[error("WAL page header")]
    SegmentSize(#[from] SegmentSizeError),
    /// The page does not begin a segment.
    #[error("WAL page address is {found}, expected a multiple of {segment_bytes} bytes")]
    Address {
        /// The address found.
        found: PgLsn,
        /// The segment size in the same header.
        segment_bytes: u64,
    },
    /// The segment is not the one its name says, or of another cluster.
    #[error("WAL segment {name} holds {what} {found}, expected {expected}")]
    Mismatch {
        /// The segment's name.
        name: String,
        /// What differs.
        what: &'static str,
        /// The value in the header.
        found: String,
        /// The value it should have.
        expected: String,
    },
}

struct Magics;

impl fmt::Display for Magics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (magic, version)) in MAGICS.iter().enumerate() {
            let comma = if index == 0 { "" } else { ", " };
            write!(f, "{comma}{magic:04X} (PostgreSQL {version})")?;
        }
        Ok(())
    }
}

impl WalHeader {
    /// Reads the header from the first bytes of a WAL segment.
    ///
    /// Only the header is checked: a segment may still be damaged, or filled with zeros, after it.
    ///
    /// # Errors
    ///
    /// Fails when the bytes are too few, of a version we do not know, or contradict each other.
    pub fn parse(bytes: &[u8]) -> Result<Self, WalHeaderError> {
        let Some((header, _)) = bytes.split_first_chunk::<WAL_HEADER_BYTES>() else {
            return Err(WalHeaderError::Short { found: bytes.len() });
        };
        let magic = u16::from_le_bytes(field(header, 0));
        if !MAGICS.iter().any(|(known, _)| *known == magic) {
            return Err(WalHeaderError::Magic { found: magic });
        }
        let flags = u16::from_le_bytes(field(header, 2));
        if flags & LONG_HEADER == 0 {
            return Err(WalHeaderError::NotLong { found: flags });
        }
        let timeline = u32::from_le_bytes(field(header, 4));
        if timeline == 0 {
            return Err(WalHeaderError::Timeline);
        }
        let segment_bytes = check_segment_bytes(u32::from_le_bytes(field(header, 32)).into())?;
        let address = u64::from_le_bytes(field(header, 8));
        if !address.is_multiple_of(segment_bytes) {
            return Err(WalHeaderError::Address { found: address.into(), segment_bytes });
        }
        Ok(Self {
            magic,
            timeline,
            start_lsn: address.into(),
            remaining_bytes: u32::from_le_bytes(field(header, 16)),
            system_identifier: u64::from_le_bytes(field(header, 24)),
            segment_bytes,
            block_bytes: u32::from_le_bytes(field(header, 36)),
        })
    }

    /// The major version of PostgreSQL that wrote the segment.
    pub fn major_version(&self) -> u32 {
        let known = MAGICS.iter().find(|(magic, _)| *magic == self.magic);
        known.map_or(0, |(_, version)| *version)
    }

    /// Checks that this header begins `segment` of the cluster `system_identifier`.
    ///
    /// The timeline may be older than the segment's: after a promotion the first page of the new
    /// timeline's first segment is a copy of the old timeline's.
    ///
    /// # Errors
    ///
    /// Fails with the first thing that differs.
    pub fn check(
        &self,
        segment: Segment,
        segment_bytes: u64,
        system_identifier: u64,
    ) -> Result<(), WalHeaderError> {
        let mismatch = |what, found: &dyn fmt::Display, expected: &dyn fmt::Display| {
            Err(WalHeaderError::Mismatch {
                name: segment.name(segment_bytes),
                what,
                found: found.to_string(),
                expected: expected.to_string(),
            })
        };
        if self.system_identifier != system_identifier {
            return mismatch("system identifier", &self.system_identifier, &system_identifier);
        }
        if self.segment_bytes != segment_bytes {
            return mismatch("segment size", &self.segment_bytes, &segment_bytes);
        }
        let start_lsn = segment_start(segment.number, segment_bytes);
        if Some(self.start_lsn) != start_lsn {
            let expected = start_lsn.unwrap_or(u64::MAX.into());
            return mismatch("page address", &self.start_lsn, &expected);
        }
        if self.timeline > segment.timeline {
            let expected = format!("{} or below", segment.timeline);
            return mismatch("timeline", &self.timeline, &expected);
        }
        Ok(())
    }
}

/// The `N` bytes of `header` from `start` on, which the layout keeps inside the header.
fn field<const N: usize>(header: &[u8; WAL_HEADER_BYTES], start: usize) -> [u8; N] {
    std::array::from_fn(|index| header[start + index])
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn lsn(text: &str) -> PgLsn {
        text.parse().unwrap()
    }

    /// The first 40 bytes of a segment written by PostgreSQL 15.
    const WRITTEN_BY_15: [u8; WAL_HEADER_BYTES] = [
        0x10, 0xD1, 0x02, 0x00, 0x01, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x01, 0x00, 0x00, 0x00,
        0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x4F, 0xE6, 0x69, 0x0E, 0x61, 0x19,
        0x01, 0x6B, 0x00, 0x00, 0x00, 0x01, 0x00, 0x20, 0x00, 0x00,
    ];

    fn with(offset: usize, bytes: &[u8]) -> Result<WalHeader, WalHeaderError> {
        let mut header = WRITTEN_BY_15;
        header[offset..offset + bytes.len()].copy_from_slice(bytes);
        WalHeader::parse(&header)
    }

    #[test]
    fn a_header_tells_where_its_segment_belongs() {
        let header = WalHeader::parse(&WRITTEN_BY_15).unwrap();
        assert_eq!(
            header,
            WalHeader {
                magic: 0xD110,
                timeline: 1,
                start_lsn: lsn("0/1000000"),
                remaining_bytes: 0,
                system_identifier: 0x6B01_1961_0E69_E64F,
                segment_bytes: 16 * MIB,
                block_bytes: 8192,
            }
        );
        assert_eq!(header.major_version(), 15);
        for (magic, version) in [(0xD113_u16, 16), (0xD116, 17), (0xD118, 18)] {
            assert_eq!(with(0, &magic.to_le_bytes()).unwrap().major_version(), version);
        }
    }

    #[test]
    fn a_wrong_header_says_what_was_found_and_expected() {
        let short = WalHeader::parse(&WRITTEN_BY_15[..39]).unwrap_err();
        assert_eq!(short.to_string(), "WAL segment ends after 39 bytes, expected a header of 40");
        for (offset, bytes, expected) in [
            (
                0,
                &[0, 0][..],
                "WAL page magic is 0000, expected one of D110 (PostgreSQL 15), \
                 D113 (PostgreSQL 16), D116 (PostgreSQL 17), D118 (PostgreSQL 18)",
            ),
            (
                2,
                &[1, 0],
                "WAL page flags are 0001, expected a long header (0002) at the start of a segment",
            ),
            (4, &[0], "WAL page timeline is 0, expected 1 or above"),
            (8, &[0, 0x20], "WAL page address is 0/1002000, expected a multiple of 16777216 bytes"),
        ] {
            assert_eq!(with(offset, bytes).unwrap_err().to_string(), expected);
        }
        assert_eq!(
            with(32, &[0, 0, 0, 3]).unwrap_err(),
            WalHeaderError::SegmentSize(SegmentSizeError(48 * MIB))
        );
    }

    #[test]
    fn a_segment_under_a_wrong_name_is_noticed() {
        let header = WalHeader::parse(&WRITTEN_BY_15).unwrap();
        let id = header.system_identifier;
        let segment = Segment { timeline: 1, number: 1 };
        let check = |segment, segment_bytes, id| {
            header.check(segment, segment_bytes, id).map_err(|error| error.to_string())
        };
        assert_eq!(check(segment, 16 * MIB, id), Ok(()));
        // The first segment of timeline 2 begins as a copy.
        assert_eq!(check(Segment { timeline: 2, ..segment }, 16 * MIB, id), Ok(()));
        assert_eq!(
            check(segment.next(), 16 * MIB, id).unwrap_err(),
            "WAL segment 000000010000000000000002 holds page address 0/1000000, expected 0/2000000"
        );
        assert_eq!(
            check(segment, 32 * MIB, id).unwrap_err(),
            "WAL segment 000000010000000000000001 holds segment size 16777216, expected 33554432"
        );
        assert_eq!(
            check(segment, 16 * MIB, 7).unwrap_err(),
            format!(
                "WAL segment 000000010000000000000001 holds system identifier {id}, expected 7"
            )
        );
    }
}
