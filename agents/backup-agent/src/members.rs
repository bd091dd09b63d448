//! The table of the files of a backup, in memory and as it is stored: one JSON object a line.
//!
//! A cluster can have millions of files, so the table takes a few dozen bytes for each, and is
//! read and written piece by piece.

use std::collections::BTreeMap;

use crate::tar::{Member, MemberKind};

/// The members of a backup's archives, in the order of the stream.
#[derive(Debug, Default)]
pub struct Members {
    entries: Vec<Entry>,
    /// The paths, one after the other.
    paths: String,
    /// The targets of the few symbolic links, by the link's place in the table.
    targets: BTreeMap<usize, String>,
}

/// A [`Member`] without its texts.
#[derive(Debug)]
struct Entry {
    offset: u64,
    size: u64,
    mtime: u64,
    /// Where its path ends in `paths`; it starts where the one before ends.
    path_end: usize,
    archive: u32,
    mode: u32,
    crc32c: u32,
    is_file: bool,
}

impl Members {
    /// Adds the next one.
    pub fn push(&mut self, member: Member) {
        let Member { archive, path, kind, offset, size, mode, mtime, crc32c } = member;
        let is_file = kind == MemberKind::File;
        if let MemberKind::Symlink { target } = kind {
            self.targets.insert(self.entries.len(), target);
        }
        self.paths.push_str(&path);
        let path_end = self.paths.len();
        self.entries.push(Entry { offset, size, mtime, path_end, archive, mode, crc32c, is_file });
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Tells whether there are none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The one at a place.
    pub fn get(&self, index: usize) -> Option<Member> {
        let entry = self.entries.get(index)?;
        let &Entry { offset, size, mtime, archive, mode, crc32c, is_file, .. } = entry;
        let kind = match self.targets.get(&index) {
            Some(target) => MemberKind::Symlink { target: target.clone() },
            None if is_file => MemberKind::File,
            None => MemberKind::Directory,
        };
        let path = self.path(index).to_owned();
        Some(Member { archive, path, kind, offset, size, mode, mtime, crc32c })
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = Member> {
        (0..self.len()).filter_map(|index| self.get(index))
    }

    /// The files among them, as places in the table, sorted by archive and path.
    pub(crate) fn files_by_path(&self) -> Vec<u32> {
        let files = (0..).zip(&self.entries).filter(|(_, entry)| entry.is_file);
        let mut files: Vec<u32> = files.map(|(index, _)| index).collect();
        files.sort_unstable_by(|a, b| self.place(*a).cmp(&self.place(*b)));
        files
    }

    /// The archive of a member and the path in it.
    pub(crate) fn place(&self, index: u32) -> (u32, &str) {
        let index = index as usize;
        (self.entries.get(index).map_or(0, |entry| entry.archive), self.path(index))
    }

    /// Bytes and CRC-32C of a member's content.
    pub(crate) fn content(&self, index: u32) -> (u64, u32) {
        self.entries.get(index as usize).map_or((0, 0), |entry| (entry.size, entry.crc32c))
    }

    fn path(&self, index: usize) -> &str {
        let end = |index: usize| self.entries.get(index).map(|entry| entry.path_end);
        let start = index.checked_sub(1).and_then(end).unwrap_or(0);
        self.paths.get(start..end(index).unwrap_or(start)).unwrap_or_default()
    }

    /// Tells whether each content lies behind the one before it, as in a stream of archives.
    pub(crate) fn is_in_order(&self) -> bool {
        self.entries.is_sorted_by(|one, next| one.end() <= next.offset)
    }

    /// The place of the first member whose content ends behind an offset of the stream, if the
    /// members are in order.
    pub(crate) fn first_behind(&self, stream_offset: u64) -> usize {
        self.entries.partition_point(|entry| entry.end() <= stream_offset)
    }
}

impl Entry {
    fn end(&self) -> u64 {
        self.offset.saturating_add(self.size)
    }
}

impl Extend<Member> for Members {
    fn extend<T: IntoIterator<Item = Member>>(&mut self, members: T) {
        members.into_iter().for_each(|member| self.push(member));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(path: &str, kind: MemberKind, offset: u64, size: u64) -> Member {
        let path = path.to_owned();
        Member { archive: 1, path, kind, offset, size, mode: 0o600, mtime: 1 << 33, crc32c: 7 }
    }

    fn table() -> Vec<Member> {
        let link = MemberKind::Symlink { target: "/srv/space".to_owned() };
        vec![
            member("base", MemberKind::Directory, 512, 0),
            member("base/2", MemberKind::File, 1024, 700),
            member("pg_tblspc/16384", link, 2560, 0),
            member("base/1", MemberKind::File, 3072, u64::from(u32::MAX)),
            member("", MemberKind::File, 1 << 40, 0),
        ]
    }

    #[test]
    fn members_come_back_as_they_were() {
        let mut members = Members::default();
        members.extend(table());
        assert_eq!(members.iter().collect::<Vec<_>>(), table());
        assert_eq!((members.len(), members.get(5)), (5, None));
        assert_eq!(members.files_by_path(), [4, 3, 1]);
        assert_eq!((members.place(1), members.content(1)), ((1, "base/2"), (700, 7)));
    }

    #[test]
    fn a_member_takes_a_few_dozen_bytes() {
        assert!(size_of::<Entry>() <= 48);
    }

    #[test]
    fn the_members_behind_an_offset_are_found() {
        let mut members = Members::default();
        members.extend(table());
        assert!(members.is_in_order());
        for (offset, first) in [(0, 0), (512, 1), (1723, 1), (1724, 2), (3072, 3), (1 << 41, 5)] {
            assert_eq!(members.first_behind(offset), first, "{offset}");
        }
        members.push(member("base/3", MemberKind::File, 4096, 1));
        assert!(!members.is_in_order());
    }
}
