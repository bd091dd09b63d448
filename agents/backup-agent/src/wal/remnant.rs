//! What is stored beside the WAL that a recovery reads, and is of use only as long as that is there:
//! the `.partial` files and backup labels of archivers, and the records of gaps.

use chrono::{DateTime, Utc};
use shared::pg::wal::{SEGMENT_BYTES_MIN, Segment, WalFile, segment_number};
use shared::store::ObjectInfo;
use tokio_postgres::types::PgLsn;

use super::{object, piece};
use crate::repository::{Place, RepositoryError};

/// Where they lie.
const PREFIXES: [&str; 3] = ["partial/", "history/", "gap/"];

/// What it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum What {
    /// The last segment of a timeline that a promotion ended, as the archiver had it.
    Partial,
    /// The archiver's label of a base backup.
    BackupLabel,
    /// The record of WAL that was lost.
    Gap,
}

/// One of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Remnant {
    /// What it is.
    pub what: What,
    /// The segment that it goes with: of a gap, the one in which the WAL goes on.
    pub segment: Segment,
    /// Its object's name.
    pub name: String,
    /// Bytes in the store.
    pub object_bytes: u64,
    /// When it was stored, by the store's clock.
    pub stored_at: DateTime<Utc>,
}

/// Lists them all.
///
/// # Errors
///
/// The store could not be asked.
pub async fn list(place: &Place, segment_bytes: u64) -> Result<Vec<Remnant>, RepositoryError> {
    let mut found = Vec::new();
    for prefix in PREFIXES {
        let listed = place.list(prefix, None, None).await?;
        found.extend(listed.into_iter().filter_map(|info| parse(info, segment_bytes)));
    }
    Ok(found)
}

/// The names of objects beside the complete segments that are nothing we know.
///
/// # Errors
///
/// The store could not be asked.
pub async fn strange(place: &Place, segment_bytes: u64) -> Result<Vec<String>, RepositoryError> {
    let mut found = Vec::new();
    for prefix in PREFIXES {
        let listed = place.list(prefix, None, None).await?;
        let strange = listed.into_iter().filter(|info| is_strange(info, segment_bytes));
        found.extend(strange.map(|info| info.key));
    }
    Ok(found)
}

fn is_strange(info: &ObjectInfo, segment_bytes: u64) -> bool {
    let history = Some(info.clone()).filter(|info| info.key.starts_with("history/"));
    let history = history.and_then(object);
    let history = history.and_then(|wal| WalFile::parse(&wal.file, segment_bytes).ok());
    !matches!(history, Some(WalFile::History { .. }))
        && piece::parse(info.clone(), segment_bytes).is_none()
        && parse(info.clone(), segment_bytes).is_none()
}

/// Reads an object's name; `None` if it is something else, such as a piece or a timeline's history.
fn parse(info: ObjectInfo, segment_bytes: u64) -> Option<Remnant> {
    let (object_bytes, stored_at, name) = (info.bytes, info.modified_at, info.key.clone());
    let (what, segment) = match info.key.strip_prefix("gap/") {
        Some(gap) => (What::Gap, after_gap(gap, segment_bytes)?),
        None => match WalFile::parse(&object(info)?.file, segment_bytes).ok()? {
            WalFile::Partial(segment) => (What::Partial, segment),
            WalFile::BackupLabel { segment, .. } => (What::BackupLabel, segment),
            WalFile::Segment(_) | WalFile::History { .. } => return None,
        },
    };
    Some(Remnant { what, segment, name, object_bytes, stored_at })
}

/// Whether an object is the record of a gap.
pub(super) fn is_gap(name: &str) -> bool {
    name.strip_prefix("gap/").is_some_and(|gap| after_gap(gap, SEGMENT_BYTES_MIN).is_some())
}

fn after_gap(name: &str, segment_bytes: u64) -> Option<Segment> {
    let mut parts = name.split('-');
    let timeline = u32::from_str_radix(parts.next()?, 16).ok()?;
    let until = u64::from_str_radix(parts.nth(1)?, 16).ok()?;
    let number = segment_number(PgLsn::from(until), segment_bytes);
    parts.next().is_none().then_some(Segment { timeline, number })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_says_what_it_is_and_which_segment_it_goes_with() {
        let segment = |timeline, number| Segment { timeline, number };
        let hash = "0123456789abcdef";
        let known = [
            format!("partial/000000010000000000000002.00000000-00040000-{hash}"),
            format!("history/00000002.history-{hash}"),
            format!("history/00000002.history-{hash}01234567"),
        ];
        for (name, expected) in [
            (
                format!("partial/000000010000000000000002.partial-{hash}"),
                Some((What::Partial, segment(1, 2))),
            ),
            (
                format!("history/000000030000000100000004.00000028.backup-{hash}"),
                Some((What::BackupLabel, segment(3, 260))),
            ),
            (
                "gap/0000000A-0000000004000000-0000000007000010".to_owned(),
                Some((What::Gap, segment(10, 7))),
            ),
            (format!("partial/000000010000000000000002.00000000-00040000-{hash}"), None),
            (format!("history/00000002.history-{hash}"), None),
            (format!("history/00000002.history-{hash}01234567"), None),
            ("history/00000002.history".to_owned(), None),
            (format!("history/00000002.history-{hash}.tmp"), None),
            (format!("history/00000002.history-{hash}01234567.partial"), None),
            (format!("partial/000000010000000000000002.partial-{hash}.tmp"), None),
            (format!("partial/000000010000000000000002.partial-{}", &hash[..15]), None),
            (format!("partial/000000010000000000000002.00000000-00040000-{hash}-tmp"), None),
            ("partial/000000010000000000000002.00000000-00040000-aaaa.tmp".to_owned(), None),
            ("gap/0000000A-0000000004000000".to_owned(), None),
            ("gap/0000000A-0000000004000000-0000000007000010-x".to_owned(), None),
            ("partial/anything".to_owned(), None),
        ] {
            let info =
                ObjectInfo { key: name.clone(), bytes: 1, modified_at: DateTime::UNIX_EPOCH };
            let is_strange = expected.is_none() && !known.contains(&name);
            assert_eq!(super::is_strange(&info, 16 << 20), is_strange, "{name}");
            let found = parse(info, 16 << 20).map(|it| (it.what, it.segment));
            assert_eq!(found, expected, "{name}");
        }
    }
}
