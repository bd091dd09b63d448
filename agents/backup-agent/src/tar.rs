//! Reads a tar stream as it passes: which files it holds, where, and their checksums.
//!
//! The bytes themselves are stored as they are; this only follows along. The server writes plain
//! `ustar` headers without extensions (it refuses longer names itself).
//!
//! Source: `tarCreateHeader` in `src/port/tar.c`; POSIX `pax`, "ustar Interchange Format".

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The unit of a tar stream: headers are one, contents are padded to a multiple.
pub const BLOCK_BYTES: usize = 512;

/// What a member of the archive is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MemberKind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link: tablespaces, and `pg_wal` where it is one.
    Symlink {
        /// Where it points to on the server.
        target: String,
    },
}

/// One member of an archive.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// The archive's number within the backup, from 0.
    pub archive: u32,
    /// The path within the archive, without a slash at its end.
    pub path: String,
    /// What it is.
    pub kind: MemberKind,
    /// Where its content starts in the backup's stream (all archives one after the other), bytes.
    pub offset: u64,
    /// Bytes of its content.
    pub size: u64,
    /// The permission bits.
    pub mode: u32,
    /// Modification time, seconds since 1970.
    pub mtime: u64,
    /// CRC-32C of the content; 0 for what is no file.
    pub crc32c: u32,
}

/// Why a stream is not the tar archive it should be.
#[derive(Debug, Error)]
pub enum TarError {
    /// A header is not a ustar header.
    #[error("archive {archive} holds no tar header at byte {offset}: {reason}")]
    Header {
        /// The archive.
        archive: u32,
        /// Where in the backup's stream.
        offset: u64,
        /// What is wrong.
        reason: &'static str,
    },
    /// A file whose name is no UTF-8: no file of PostgreSQL's own.
    #[error(
        "archive {archive} holds a file whose name is not UTF-8: {path:?}; \
         move it out of the data directory"
    )]
    Name {
        /// The archive.
        archive: u32,
        /// The name, with what could not be read replaced.
        path: String,
    },
    /// A path that would leave the data directory.
    #[error("archive {archive} holds the path {path:?}, which leaves the data directory")]
    Path {
        /// The archive.
        archive: u32,
        /// The path.
        path: String,
    },
    /// A link that is not a tablespace's, or a member below a link: PostgreSQL sends neither, and what is
    /// written through a link lands outside of the data directory.
    #[error(
        "archive {archive} holds {path:?}, a link or a member behind one: it is not PostgreSQL's"
    )]
    Link {
        /// The archive.
        archive: u32,
        /// The path.
        path: String,
    },
    /// It ended in the middle of a member.
    #[error("archive {archive} ends in the middle of a member, at byte {offset}")]
    Truncated {
        /// The archive.
        archive: u32,
        /// Where in the backup's stream.
        offset: u64,
    },
}

/// Follows the archives of one backup.
#[derive(Debug, Default)]
pub struct TarReader {
    archive: u32,
    /// Bytes of the whole stream seen so far.
    offset: u64,
    /// A header that has not arrived whole.
    header: Vec<u8>,
    /// The member whose content is passing.
    current: Option<Member>,
    /// Bytes of its content and of its padding still to come.
    content_left: u64,
    padding_left: u64,
    /// The two zero blocks, or one of them, have passed.
    ended: bool,
    started: bool,
    /// The links of this archive.
    links: Vec<String>,
}

impl TarReader {
    /// A new archive begins.
    ///
    /// # Errors
    ///
    /// The one before is not complete.
    pub fn next_archive(&mut self) -> Result<u32, TarError> {
        self.end_archive()?;
        if self.started {
            self.archive += 1;
        }
        self.started = true;
        self.ended = false;
        self.links.clear();
        Ok(self.archive)
    }

    /// Bytes of the stream seen so far.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// The archive is over.
    ///
    /// # Errors
    ///
    /// It ended in the middle of a member.
    pub fn end_archive(&mut self) -> Result<(), TarError> {
        if !self.header.is_empty() || self.current.is_some() || self.padding_left > 0 {
            return Err(TarError::Truncated { archive: self.archive, offset: self.offset });
        }
        Ok(())
    }

    /// Takes the next bytes and hands every member that they complete to `complete`.
    ///
    /// # Errors
    ///
    /// The stream is not a tar archive.
    pub fn read(
        &mut self,
        mut data: &[u8],
        mut complete: impl FnMut(Member),
    ) -> Result<(), TarError> {
        while !data.is_empty() {
            if let Some(member) = &mut self.current {
                let (content, rest) = split(data, self.content_left);
                member.crc32c = crc32c::crc32c_append(member.crc32c, content);
                self.content_left -= content.len() as u64;
                self.offset += content.len() as u64;
                data = rest;
            } else if self.padding_left > 0 {
                let (padding, rest) = split(data, self.padding_left);
                self.padding_left -= padding.len() as u64;
                self.offset += padding.len() as u64;
                data = rest;
            } else {
                let (part, rest) = split(data, (BLOCK_BYTES - self.header.len()) as u64);
                self.header.extend_from_slice(part);
                self.offset += part.len() as u64;
                data = rest;
                if self.header.len() == BLOCK_BYTES {
                    self.current = self.parse_header()?;
                    self.header.clear();
                }
            }
            if self.content_left == 0
                && let Some(member) = self.current.take()
            {
                complete(member);
            }
        }
        Ok(())
    }

    fn parse_header(&mut self) -> Result<Option<Member>, TarError> {
        let wrong = |reason| TarError::Header {
            archive: self.archive,
            offset: self.offset - BLOCK_BYTES as u64,
            reason,
        };
        let header = &self.header;
        if header.iter().all(|byte| *byte == 0) {
            self.ended = true;
            return Ok(None);
        }
        if self.ended {
            return Err(wrong("a member after the end of the archive"));
        }
        let sum: u64 = header.iter().map(|byte| u64::from(*byte)).sum();
        let stored: u64 = header[148..156].iter().map(|byte| u64::from(*byte)).sum();
        if number(&header[148..156]) != Some(sum - stored + 8 * u64::from(b' ')) {
            return Err(wrong("the checksum is wrong"));
        }
        let path = text(&header[..100]).ok_or_else(|| TarError::Name {
            archive: self.archive,
            path: String::from_utf8_lossy(&header[..100]).trim_end_matches('\0').to_owned(),
        })?;
        let path = path.trim_end_matches('/').trim_start_matches("./").to_owned();
        let size = number(&header[124..136]).ok_or_else(|| wrong("the size is no number"))?;
        let mode = number(&header[100..108]).ok_or_else(|| wrong("the mode is no number"))?;
        let mtime = number(&header[136..148]).ok_or_else(|| wrong("the time is no number"))?;
        let kind = match header[156] {
            b'0' | 0 => MemberKind::File,
            b'5' => MemberKind::Directory,
            b'2' => MemberKind::Symlink {
                target: text(&header[157..257])
                    .ok_or_else(|| wrong("the link's target is no text"))?
                    .to_owned(),
            },
            _ => return Err(wrong("an unknown type of member")),
        };
        if !is_inside(&path) {
            return Err(TarError::Path { archive: self.archive, path });
        }
        let is_link = matches!(kind, MemberKind::Symlink { .. });
        if is_link && !is_tablespace(&path) || self.links.iter().any(|it| is_below(&path, it)) {
            return Err(TarError::Link { archive: self.archive, path });
        }
        if is_link {
            self.links.push(path.clone());
        }
        let size = if kind == MemberKind::File { size } else { 0 };
        self.content_left = size;
        self.padding_left = size.next_multiple_of(BLOCK_BYTES as u64) - size;
        Ok(Some(Member {
            archive: self.archive,
            path,
            kind,
            offset: self.offset,
            size,
            mode: (mode & 0o7777) as u32,
            mtime,
            crc32c: 0,
        }))
    }
}

/// Tells whether a path stays below the directory it is unpacked in.
pub fn is_inside(path: &str) -> bool {
    !path.starts_with('/') && path.split('/').all(|part| part != "..")
}

/// Where the data directory has a tablespace: `pg_tblspc/16384`.
fn is_tablespace(path: &str) -> bool {
    let oid = path.strip_prefix("pg_tblspc/").unwrap_or_default();
    !oid.is_empty() && oid.bytes().all(|it| it.is_ascii_digit())
}

/// Whether a path is another, or lies below it, however the two are spelt.
fn is_below(path: &str, other: &str) -> bool {
    let mut parts = path.split('/').filter(|it| !matches!(*it, "" | "."));
    other.split('/').all(|it| parts.next() == Some(it))
}

fn split(data: &[u8], at: u64) -> (&[u8], &[u8]) {
    data.split_at(usize::try_from(at).unwrap_or(usize::MAX).min(data.len()))
}

fn text(field: &[u8]) -> Option<&str> {
    std::str::from_utf8(field.split(|byte| *byte == 0).next()?).ok()
}

/// An octal number, or the base-256 form that the server uses for what octal cannot hold.
fn number(field: &[u8]) -> Option<u64> {
    if field.first()? & 0x80 != 0 {
        return field[1..]
            .iter()
            .try_fold(0u64, |value, byte| value.checked_mul(256)?.checked_add(u64::from(*byte)));
    }
    let digits = text(field)?.trim();
    if digits.is_empty() { Some(0) } else { u64::from_str_radix(digits, 8).ok() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(name: &str, size: u64, kind: u8, target: &str) -> Vec<u8> {
        let mut block = vec![0; BLOCK_BYTES];
        block[..name.len()].copy_from_slice(name.as_bytes());
        block[100..107].copy_from_slice(b"0000600");
        block[124..135].copy_from_slice(format!("{size:011o}").as_bytes());
        block[136..147].copy_from_slice(b"00000000012");
        block[156] = kind;
        block[157..157 + target.len()].copy_from_slice(target.as_bytes());
        block[148..156].copy_from_slice(b"        ");
        let sum: u64 = block.iter().map(|byte| u64::from(*byte)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        block
    }

    fn archive() -> Vec<u8> {
        let mut tar = header("base", 0, b'5', "");
        tar.extend(header("base/1", 700, b'0', ""));
        tar.extend([7; 700]);
        tar.extend([0; 324]);
        tar.extend(header("empty", 0, b'0', ""));
        tar.extend(header("pg_tblspc/16384", 0, b'2', "/srv/space"));
        tar.extend([0; 1024]);
        tar
    }

    fn read(stream: &[u8], step: usize) -> Result<Vec<Member>, TarError> {
        let mut reader = TarReader::default();
        let mut members = Vec::new();
        reader.next_archive()?;
        for piece in stream.chunks(step) {
            reader.read(piece, |member| members.push(member))?;
        }
        reader.end_archive()?;
        Ok(members)
    }

    #[test]
    fn members_are_the_same_however_the_stream_is_cut() {
        let whole = read(&archive(), usize::MAX).unwrap();
        let seen: Vec<_> = whole.iter().map(|m| (m.path.as_str(), m.offset, m.size)).collect();
        assert_eq!(
            seen,
            [
                ("base", 512, 0),
                ("base/1", 1024, 700),
                ("empty", 2560, 0),
                ("pg_tblspc/16384", 3072, 0)
            ]
        );
        assert_eq!(whole[1].crc32c, crc32c::crc32c(&[7; 700]));
        assert_eq!(whole[3].kind, MemberKind::Symlink { target: "/srv/space".to_owned() });
        for step in [1, 7, 511, 512, 513, 4096] {
            assert_eq!(read(&archive(), step).unwrap(), whole, "step {step}");
        }
    }

    #[test]
    fn a_stream_that_breaks_off_is_no_archive() {
        let tar = archive();
        for end in [1, 511, 513, 1500, 2047] {
            assert!(matches!(read(&tar[..end], 64), Err(TarError::Truncated { .. })), "{end}");
        }
    }

    #[test]
    fn a_path_out_of_the_directory_is_refused() {
        for path in ["/etc/passwd", "../up", "base/../../up"] {
            let refused = read(&header(path, 0, b'0', ""), 512);
            assert!(matches!(refused, Err(TarError::Path { .. })), "{path}");
        }
    }

    #[test]
    fn a_link_that_is_no_tablespace_and_what_lies_behind_one_are_refused() {
        let link = |name: &str| header(name, 0, b'2', "/srv/victim");
        let file = |name: &str| header(name, 0, b'0', "");
        for (case, tar) in [
            ("a link", link("evil")),
            ("a link beside tablespaces", link("pg_tblspc/x")),
            ("a link below a tablespace", link("pg_tblspc/1/x")),
            ("a file behind a link", [link("pg_tblspc/1"), file("pg_tblspc/1/key")].concat()),
            ("spelt otherwise", [link("pg_tblspc/1"), file("pg_tblspc/.//1/key")].concat()),
            (
                "a directory in its place",
                [link("pg_tblspc/1"), header("pg_tblspc/1", 0, b'5', "")].concat(),
            ),
        ] {
            assert!(matches!(read(&tar, 512), Err(TarError::Link { .. })), "{case}");
        }
        let good =
            [link("pg_tblspc/1"), link("pg_tblspc/10"), file("pg_tblspc/2/PG_17/5/1")].concat();
        assert_eq!(read(&good, 512).unwrap().len(), 3);
    }

    #[test]
    fn a_flipped_bit_in_a_header_is_noticed() {
        let mut tar = archive();
        tar[3] ^= 1;
        assert!(matches!(read(&tar, 512), Err(TarError::Header { .. })));
    }

    #[test]
    fn sizes_beyond_octal_are_read() {
        let mut field = [0; 12];
        field[0] = 0x80;
        field[7] = 3;
        assert_eq!(number(&field), Some(3 << 32));
    }
}
