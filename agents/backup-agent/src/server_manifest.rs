//! The server's `backup_manifest`: read as it comes, and compared with the files that arrived.
//!
//! It is JSON, in which the server gives each file a line of its own. Such a line is compared and
//! forgotten; all others are kept, and read as a whole at the end. A manifest that were written
//! otherwise would take more memory, nothing else.
//!
//! Source: PostgreSQL manual, "Backup Manifest Format"; `src/backend/backup/backup_manifest.c`.

use std::borrow::Cow;
use std::convert::Infallible;

use serde::Deserialize;
use sha2::{Digest, Sha256};
use thiserror::Error;
use tokio_postgres::types::PgLsn;

use crate::lines::Lines;
use crate::manifest::{Archive, lsn};
use crate::members::Members;

/// Why a stream is not the backup that the server's manifest describes.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ManifestError {
    /// Not JSON of the known form.
    #[error("backup_manifest is not readable: {0}")]
    Unreadable(String),
    /// The manifest's own checksum.
    #[error("backup_manifest is damaged: its checksum does not match its content")]
    Damaged,
    /// A file is missing.
    #[error("{0} is named by backup_manifest and missing in the stream")]
    Missing(String),
    /// A file has another size.
    #[error("{path} has {found} bytes in the stream, backup_manifest says {expected}")]
    Size {
        /// The file.
        path: String,
        /// What the manifest says.
        expected: u64,
        /// What arrived.
        found: u64,
    },
    /// A file has another checksum.
    #[error("{0} arrived with another checksum than backup_manifest says")]
    Checksum(String),
    /// A file nobody named.
    #[error("{0} is in the stream and not named by backup_manifest")]
    Unnamed(String),
    /// The WAL range is another one than the server told.
    #[error("backup_manifest names no WAL from {start_lsn} to {end_lsn} on timeline {timeline}")]
    WalRange {
        /// The timeline.
        timeline: u32,
        /// The start.
        start_lsn: PgLsn,
        /// The end.
        end_lsn: PgLsn,
    },
}

/// The manifest without the files that had a line of their own.
#[derive(Debug, Deserialize)]
struct Outline<'a> {
    #[serde(rename = "PostgreSQL-Backup-Manifest-Version")]
    version: u32,
    #[serde(borrow, rename = "Files")]
    files: Vec<ManifestFile<'a>>,
    #[serde(rename = "WAL-Ranges")]
    wal_ranges: Vec<WalRange>,
    #[serde(rename = "Manifest-Checksum")]
    checksum: String,
}

#[derive(Debug, Deserialize)]
struct ManifestFile<'a> {
    /// A name that is no UTF-8 comes in hexadecimal; the tar reader refused it before.
    #[serde(borrow, rename = "Path", alias = "Encoded-Path")]
    path: Cow<'a, str>,
    #[serde(rename = "Size")]
    size: u64,
    #[serde(borrow, default, rename = "Checksum-Algorithm")]
    checksum_algorithm: Cow<'a, str>,
    #[serde(borrow, default, rename = "Checksum")]
    checksum: Cow<'a, str>,
}

#[derive(Debug, Deserialize)]
struct WalRange {
    #[serde(rename = "Timeline")]
    timeline: u32,
    #[serde(rename = "Start-LSN", with = "lsn")]
    start_lsn: PgLsn,
    #[serde(rename = "End-LSN", with = "lsn")]
    end_lsn: PgLsn,
}

/// A manifest that is being read and compared.
#[derive(Debug)]
pub struct Comparison<'a> {
    archives: &'a [Archive],
    members: &'a Members,
    /// The files that arrived, by archive and path, and whether the manifest has named them.
    files: Vec<u32>,
    named: Vec<bool>,
    lines: Lines,
    /// The manifest's checksum covers every line but the last: so each is added with the next.
    hash: Sha256,
    last_line: Vec<u8>,
    outline: Vec<u8>,
    difference: Option<ManifestError>,
}

/// The WAL that a manifest asks for.
#[derive(Debug)]
pub struct WalRanges(Vec<WalRange>);

impl<'a> Comparison<'a> {
    /// Begins a comparison with what arrived.
    pub fn new(members: &'a Members, archives: &'a [Archive]) -> Self {
        let files = members.files_by_path();
        Self {
            archives,
            members,
            named: vec![false; files.len()],
            files,
            lines: Lines::default(),
            hash: Sha256::new(),
            last_line: Vec::new(),
            outline: Vec::new(),
            difference: None,
        }
    }

    /// Takes the next piece of the manifest.
    pub fn read(&mut self, piece: &[u8]) {
        let mut lines = std::mem::take(&mut self.lines);
        let Ok(()) = lines.push(piece, |line| {
            self.read_line(line, b"\n");
            Ok::<_, Infallible>(())
        });
        self.lines = lines;
    }

    /// The manifest has ended: checks its own SHA-256, and that it has named every file as it
    /// arrived.
    ///
    /// # Errors
    ///
    /// [`ManifestError::Unreadable`], [`ManifestError::Damaged`], or the first difference.
    pub fn finish(mut self) -> Result<WalRanges, ManifestError> {
        let lines = std::mem::take(&mut self.lines);
        if !lines.rest().is_empty() {
            self.read_line(lines.rest(), b"");
        }
        let outline = std::mem::take(&mut self.outline);
        let outline: Outline<'_> = serde_json::from_slice(&outline)
            .map_err(|error| ManifestError::Unreadable(error.to_string()))?;
        if !(1..=2).contains(&outline.version) {
            let reason = format!("version {} is not known", outline.version);
            return Err(ManifestError::Unreadable(reason));
        }
        for file in &outline.files {
            self.compare(file);
        }
        if hex::encode(self.hash.finalize()) != outline.checksum {
            return Err(ManifestError::Damaged);
        }
        if let Some(difference) = self.difference {
            return Err(difference);
        }
        // The manifest cannot name itself; the server writes no other file it does not name.
        match self.named.iter().position(|named| !named) {
            Some(unnamed) => {
                let (archive, path) = self.members.place(self.files[unnamed]);
                Err(ManifestError::Unnamed(path_in_manifest(archive, path, self.archives)))
            }
            None => Ok(WalRanges(outline.wal_ranges)),
        }
    }

    fn read_line(&mut self, line: &[u8], end: &[u8]) {
        self.hash.update(&self.last_line);
        self.last_line.clear();
        self.last_line.extend_from_slice(line);
        self.last_line.extend_from_slice(end);
        if let Ok(file) = serde_json::from_slice(line.strip_suffix(b",").unwrap_or(line)) {
            self.compare(&file);
        } else {
            self.outline.extend_from_slice(line);
            self.outline.extend_from_slice(end);
        }
    }

    /// Notes that the manifest names a file, and the first difference.
    fn compare(&mut self, file: &ManifestFile<'_>) {
        let place = self.place(&file.path);
        let found = self.files.binary_search_by(|index| self.members.place(*index).cmp(&place));
        // Who is named twice is there once.
        let found = found.ok().filter(|found| !std::mem::replace(&mut self.named[*found], true));
        let content = found.map(|found| self.members.content(self.files[found]));
        if self.difference.is_none() {
            self.difference = file.compare(content).err();
        }
    }

    /// The archive that a path of the manifest lies in, and the path in it: the reverse of
    /// [`path_in_manifest`].
    fn place<'b>(&self, path: &'b str) -> (u32, &'b str) {
        let in_tablespace = || {
            let (oid, rest) = path.strip_prefix("pg_tblspc/")?.split_once('/')?;
            Some((self.archive(Some(oid.parse().ok()?))?, rest))
        };
        in_tablespace().unwrap_or((self.archive(None).unwrap_or(0), path))
    }

    fn archive(&self, oid: Option<u32>) -> Option<u32> {
        let mut numbered = (0..).zip(self.archives);
        numbered.find(|(_, archive)| archive.tablespace_oid == oid).map(|(number, _)| number)
    }
}

impl ManifestFile<'_> {
    /// Compares bytes and CRC-32C with what arrived.
    fn compare(&self, arrived: Option<(u64, u32)>) -> Result<(), ManifestError> {
        let path = || self.path.clone().into_owned();
        let Some((found, crc32c)) = arrived else { return Err(ManifestError::Missing(path())) };
        if found != self.size {
            return Err(ManifestError::Size { path: path(), expected: self.size, found });
        }
        // The server prints the four bytes in memory order, which is little-endian on every
        // machine that PostgreSQL's packages are built for here.
        let expected = hex::encode(crc32c.to_le_bytes());
        if self.checksum_algorithm != "CRC32C" || self.checksum != expected {
            return Err(ManifestError::Checksum(path()));
        }
        Ok(())
    }
}

impl WalRanges {
    /// Checks that the manifest asks for the WAL that the server told of.
    ///
    /// # Errors
    ///
    /// [`ManifestError::WalRange`].
    pub fn require(
        &self,
        timeline: u32,
        start_lsn: PgLsn,
        end_lsn: PgLsn,
    ) -> Result<(), ManifestError> {
        let named = self.0.iter().any(|range| {
            (range.timeline, range.start_lsn, range.end_lsn) == (timeline, start_lsn, end_lsn)
        });
        if named { Ok(()) } else { Err(ManifestError::WalRange { timeline, start_lsn, end_lsn }) }
    }
}

/// The path of a file as the manifest has it: below the data directory.
fn path_in_manifest(archive: u32, path: &str, archives: &[Archive]) -> String {
    match archives.get(archive as usize).and_then(|archive| archive.tablespace_oid) {
        Some(oid) => format!("pg_tblspc/{oid}/{path}"),
        None => path.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tar::{Member, MemberKind};

    const LINES: [&str; 3] = [
        r#"{ "Path": "backup_label", "Size": 3, "Last-Modified": "2026-03-31 00:00:00 GMT", "Checksum-Algorithm": "CRC32C", "Checksum": "01000000" }"#,
        r#"{ "Path": "pg_tblspc/16384/PG_17/5/1", "Size": 0, "Checksum-Algorithm": "CRC32C", "Checksum": "00000000" }"#,
        r#"{ "Encoded-Path": "base/5/1", "Size": 8192, "Checksum-Algorithm": "CRC32C", "Checksum": "78563412" }"#,
    ];

    fn file(archive: u32, path: &str, size: u64, crc32c: u32) -> Member {
        let (path, kind) = (path.to_owned(), MemberKind::File);
        Member { archive, path, kind, offset: 0, size, mode: 0o600, mtime: 0, crc32c }
    }

    fn arrived() -> Vec<Member> {
        let mut directory = file(1, "base", 0, 0);
        directory.kind = MemberKind::Directory;
        vec![
            file(0, "PG_17/5/1", 0, 0),
            file(1, "backup_label", 3, 1),
            directory,
            file(1, "base/5/1", 8192, 0x1234_5678),
        ]
    }

    /// A manifest as the server writes it, with these files.
    fn text(files: &str) -> String {
        let body = format!(
            "{{ \"PostgreSQL-Backup-Manifest-Version\": 2,\n\"System-Identifier\": 1,\n\"Files\": [\n\
             {files}\n],\n\"WAL-Ranges\": [\n{{ \"Timeline\": 1, \"Start-LSN\": \"0/2000028\", \
             \"End-LSN\": \"0/2000120\" }}\n],\n"
        );
        let checksum = hex::encode(Sha256::digest(&body));
        format!("{body}\"Manifest-Checksum\": \"{checksum}\"}}\n")
    }

    fn compare(text: &str, step: usize, arrived: Vec<Member>) -> Result<WalRanges, ManifestError> {
        let mut members = Members::default();
        members.extend(arrived);
        let archive = |tablespace_oid| Archive { tablespace_oid, location: None, offset: 0 };
        let archives = [archive(Some(16384)), archive(None)];
        let mut comparison = Comparison::new(&members, &archives);
        text.as_bytes().chunks(step).for_each(|piece| comparison.read(piece));
        comparison.finish()
    }

    #[test]
    fn a_manifest_is_read_however_it_is_cut_and_written() {
        for separator in [",\n", ", ", ",\n\n"] {
            let text = text(&LINES.join(separator));
            for step in [1, 7, 64, text.len()] {
                let ranges = compare(&text, step, arrived()).unwrap();
                let at = |lsn: &str| lsn.parse::<PgLsn>().unwrap();
                assert_eq!(ranges.require(1, at("0/2000028"), at("0/2000120")), Ok(()));
                let other = ranges.require(1, at("0/2000028"), at("0/2000128")).unwrap_err();
                assert!(matches!(other, ManifestError::WalRange { .. }), "{other}");
            }
        }
    }

    #[test]
    fn every_difference_is_found_and_named() {
        let missing = |path: &str| ManifestError::Missing(path.to_owned());
        let whole = LINES.join(",\n");
        let cases = [
            (
                "a file more",
                whole.clone(),
                4,
                file(1, "base/5/2", 0, 0),
                ManifestError::Unnamed("base/5/2".to_owned()),
            ),
            (
                "a file more in a tablespace",
                whole.clone(),
                4,
                file(0, "PG_17/6", 0, 0),
                ManifestError::Unnamed("pg_tblspc/16384/PG_17/6".to_owned()),
            ),
            (
                "a file twice",
                whole.clone(),
                4,
                file(1, "backup_label", 3, 1),
                ManifestError::Unnamed("backup_label".to_owned()),
            ),
            (
                "named twice",
                format!("{whole},\n{}", LINES[0]),
                1,
                file(1, "backup_label", 3, 1),
                missing("backup_label"),
            ),
            (
                "another name",
                whole.clone(),
                1,
                file(1, "backup_labe", 3, 1),
                missing("backup_label"),
            ),
            (
                "another archive",
                whole.clone(),
                0,
                file(1, "PG_17/5/1", 0, 0),
                missing("pg_tblspc/16384/PG_17/5/1"),
            ),
            (
                "another size",
                whole.clone(),
                3,
                file(1, "base/5/1", 8191, 0x1234_5678),
                ManifestError::Size { path: "base/5/1".to_owned(), expected: 8192, found: 8191 },
            ),
            (
                "another content",
                whole.clone(),
                3,
                file(1, "base/5/1", 8192, 0x1234_5679),
                ManifestError::Checksum("base/5/1".to_owned()),
            ),
            (
                "no checksum",
                whole.replace("CRC32C", "NONE"),
                1,
                file(1, "backup_label", 3, 1),
                ManifestError::Checksum("backup_label".to_owned()),
            ),
        ];
        for (case, files, place, member, expected) in cases {
            let mut arrived = arrived();
            arrived.splice(place..(place + 1).min(arrived.len()), [member]);
            assert_eq!(compare(&text(&files), 64, arrived).unwrap_err(), expected, "{case}");
        }
    }

    #[test]
    fn a_manifest_that_is_not_whole_is_refused() {
        let text = text(&LINES.join(",\n"));
        let damaged = text.replace("8192", "8193");
        assert_eq!(compare(&damaged, 64, arrived()).unwrap_err(), ManifestError::Damaged);
        for end in [0, 1, 100, text.len() - 100, text.len() - 3] {
            let refused = compare(&text[..end], 64, arrived()).unwrap_err();
            assert!(matches!(refused, ManifestError::Unreadable(_)), "{end}: {refused}");
        }
        let later = text.replace("Version\": 2", "Version\": 3");
        let refused = compare(&later, 64, arrived()).unwrap_err().to_string();
        assert_eq!(refused, "backup_manifest is not readable: version 3 is not known");
    }
}
