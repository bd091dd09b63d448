//! Whether a timeline began where a file of it says so: what is stored otherwise leads nowhere, or to the
//! WAL of another server.

use shared::pg::wal::{
    HistoryEntry, SEGMENT_BYTES_MIN, Segment, WalFile, WalHeader, history_name, segment_number,
};

use super::rekey::readable;
use super::{WalError, fetch_history, find, read_history};
use crate::repository::Place;

/// Refuses a history that does not say which timeline its own came from.
pub(super) fn require_parent(file: &str, text: &[u8]) -> Result<(), WalError> {
    // The size of a segment does not matter to the name of a history file.
    let Ok(WalFile::History { timeline }) = WalFile::parse(file, SEGMENT_BYTES_MIN) else {
        return Ok(());
    };
    let reason = match read_history(file, text)?.last() {
        Some(parent) if parent.timeline < timeline => return Ok(()),
        Some(parent) => format!("it names timeline {} as one before its own", parent.timeline),
        None => "it names no timeline before its own, so nothing would lead there".to_owned(),
    };
    Err(WalError::History { name: file.to_owned(), reason })
}

/// Refuses a segment that begins on an earlier timeline than its name says, unless its own began in it by
/// the stored history: there, and only there, a promotion copies what is before. PostgreSQL archives
/// the history first.
pub(super) async fn require_begun(
    place: &Place,
    file: &str,
    header: &WalHeader,
) -> Result<(), WalError> {
    let WalFile::Segment(segment) = WalFile::parse(file, header.segment_bytes)? else {
        return Ok(());
    };
    if header.timeline == segment.timeline {
        return Ok(());
    }
    let stored = match histories(place, segment.timeline).await {
        // Nobody may read it who only archives.
        Err(WalError::Repository(error)) if error.is_denied() => return Ok(()),
        stored => stored?,
    };
    let refuse = |reason| {
        let (name, found) = (file.to_owned(), header.timeline);
        WalError::Branch { name, found, reason }
    };
    begun(segment, header, &stored).map_err(refuse)
}

/// The stored histories of a timeline; more than one if two servers wrote it.
async fn histories(place: &Place, timeline: u32) -> Result<Vec<Vec<HistoryEntry>>, WalError> {
    let mut stored = Vec::new();
    for wal in readable(place, find(place, &history_name(timeline)).await?).await? {
        stored.push(fetch_history(place, &wal).await?);
    }
    Ok(stored)
}

/// Whether a segment may begin on the timeline in its header, and why not.
fn begun(segment: Segment, header: &WalHeader, stored: &[Vec<HistoryEntry>]) -> Result<(), String> {
    let (timeline, history) = (segment.timeline, history_name(segment.timeline));
    let begins_in = |entry: &HistoryEntry| {
        // At a segment's first byte there is nothing to copy.
        segment_number(entry.switch_lsn, header.segment_bytes) == segment.number
            && entry.switch_lsn > header.start_lsn
    };
    let comes_from = |history: &&Vec<HistoryEntry>| {
        history.last().is_some_and(begins_in)
            && history.iter().any(|entry| entry.timeline == header.timeline)
    };
    match (stored.iter().find(comes_from), stored.iter().find_map(|history| history.last())) {
        (Some(_), _) => Ok(()),
        (None, Some(entry)) => Err(format!(
            "the {history} that is stored says that timeline {timeline} left timeline {} at {}: two \
             servers wrote timeline {timeline}, or the file has another one's name",
            entry.timeline, entry.switch_lsn
        )),
        (None, None) => Err(format!(
            "no {history} is stored that says that timeline {timeline} began in it: push that first, as \
             PostgreSQL does"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEGMENT: u64 = 16 << 20;

    /// The timelines that a history names, and the segment and the offset in which each was left.
    fn history(entries: &[(u32, u64, u64)]) -> Vec<HistoryEntry> {
        let entry = |(timeline, segment, offset): &(u32, u64, u64)| HistoryEntry {
            timeline: *timeline,
            switch_lsn: (segment * SEGMENT + offset).into(),
            reason: String::new(),
        };
        entries.iter().map(entry).collect()
    }

    #[test]
    fn a_segment_begins_on_an_earlier_timeline_only_where_its_own_began() {
        let first = history(&[(1, 5, 100)]);
        for (case, timeline, found, stored, expected) in [
            ("the first of its timeline", 2, 1, vec![first.clone()], ""),
            ("no history", 2, 1, vec![], "no 00000002.history is stored"),
            ("one that names nothing", 2, 1, vec![vec![]], "no 00000002.history is stored"),
            ("a later one", 2, 1, vec![history(&[(1, 4, 100)])], "left timeline 1 at 0/4000064"),
            ("an earlier one", 2, 1, vec![history(&[(1, 6, 100)])], "left timeline 1 at 0/6000064"),
            (
                "nothing was copied",
                2,
                1,
                vec![history(&[(1, 5, 0)])],
                "left timeline 1 at 0/5000000",
            ),
            ("the segment that ends there", 2, 1, vec![history(&[(1, 6, 0)])], "at 0/6000000"),
            ("two promotions in it", 3, 1, vec![history(&[(1, 5, 100), (2, 5, 200)])], ""),
            ("not of its way", 4, 2, vec![history(&[(1, 5, 1), (3, 5, 2)])], "left timeline 3"),
            ("two servers wrote it", 2, 1, vec![history(&[(1, 4, 9)]), first.clone()], ""),
        ] {
            let segment = Segment { timeline, number: 5 };
            let header = WalHeader {
                magic: 0xD116,
                timeline: found,
                start_lsn: (5 * SEGMENT).into(),
                remaining_bytes: 0,
                system_identifier: 7,
                segment_bytes: SEGMENT,
                block_bytes: 8192,
            };
            let said = begun(segment, &header, &stored).err().unwrap_or_default();
            assert!(
                said.contains(expected) && said.is_empty() == expected.is_empty(),
                "{case}: {said}"
            );
        }
    }

    #[test]
    fn a_history_names_the_timeline_that_its_own_came_from() {
        for (file, text, is_taken) in [
            ("00000002.history", "1\t0/5000060\tno recovery target specified\n", true),
            ("00000002.history", "", false),
            ("00000002.history", "# nothing\n\n", false),
            ("00000001.history", "", false),
            ("00000001.history", "1\t0/5000060\t\n", false),
            ("00000004.history", "1\t0/5000060\t\n7\t0/6000000\t\n", false),
            ("00000004.history", "1\t0/5000060\t\n3\t0/6000000\t\n", true),
            ("000000020000000000000005.00000028.backup", "", true),
        ] {
            let found = require_parent(file, text.as_bytes());
            assert_eq!(found.is_ok(), is_taken, "{file}: {text:?}");
        }
    }
}
