//! Timeline history files: where a cluster left each timeline it was on.

use thiserror::Error;
use tokio_postgres::types::PgLsn;

/// One line of a timeline history file: where the cluster left a timeline.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HistoryEntry {
    /// The timeline that was left.
    pub timeline: u32,
    /// The first position that does not belong to it any more.
    pub switch_lsn: PgLsn,
    /// Why, in the server's words.
    pub reason: String,
}

/// Why a text is no timeline history.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum HistoryError {
    /// A line does not begin with a timeline and a position.
    #[error("timeline history line {line}: expected a timeline and an LSN, found `{text}`")]
    Line {
        /// The line, from 1.
        line: usize,
        /// What it says.
        text: String,
    },
    /// The timelines do not grow.
    #[error("timeline history line {line}: timeline {timeline} is not after the line before")]
    Order {
        /// The line, from 1.
        line: usize,
        /// The timeline on it.
        timeline: u32,
    },
}

/// Reads a timeline history file: the timelines before the file's own, oldest first.
///
/// Source: `readTimeLineHistory` in `src/backend/access/transam/timeline.c`; lines that begin
/// with `#` and blank lines are left out, as there.
///
/// Positions may fall from line to line: a recovery that followed timeline 2 and stopped before 2
/// branched off 1 writes a history in which 2 ends before it began. PostgreSQL looks positions up from
/// the last line back, so that every timeline before such a line ends there too. Here they all do:
/// the first entry whose `switch_lsn` is greater than a position is the one it belongs to.
///
/// # Errors
///
/// Fails when a line does not read, or the timelines do not grow from line to line.
pub fn parse_history(text: &str) -> Result<Vec<HistoryEntry>, HistoryError> {
    let mut entries: Vec<HistoryEntry> = Vec::new();
    for (index, text) in text.lines().enumerate() {
        let text = text.trim();
        if text.is_empty() || text.starts_with('#') {
            continue;
        }
        let line = index + 1;
        let entry =
            parse_entry(text).ok_or_else(|| HistoryError::Line { line, text: text.to_owned() })?;
        if let Some(before) = entries.last()
            && entry.timeline <= before.timeline
        {
            return Err(HistoryError::Order { line, timeline: entry.timeline });
        }
        entries.push(entry);
    }
    for next in (1..entries.len()).rev() {
        entries[next - 1].switch_lsn = entries[next - 1].switch_lsn.min(entries[next].switch_lsn);
    }
    Ok(entries)
}

fn parse_entry(text: &str) -> Option<HistoryEntry> {
    let (timeline, rest) = text.split_once(char::is_whitespace)?;
    let rest = rest.trim_start();
    let (switch_lsn, reason) = rest.split_once(char::is_whitespace).unwrap_or((rest, ""));
    Some(HistoryEntry {
        timeline: timeline.parse().ok().filter(|timeline| *timeline > 0)?,
        switch_lsn: switch_lsn.parse().ok()?,
        reason: reason.trim().to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lsn(text: &str) -> PgLsn {
        text.parse().unwrap()
    }

    #[test]
    fn a_history_lists_the_timelines_before_oldest_first() {
        let text = "1\t0/3000060\tno recovery target specified\n\n# note\n\
                    2\t1/A0000000\tbefore 2026-03-01 02:00:00+00\n3 2/0\n";
        let entry = |timeline, position, reason: &str| HistoryEntry {
            timeline,
            switch_lsn: lsn(position),
            reason: reason.to_owned(),
        };
        assert_eq!(
            parse_history(text).unwrap(),
            [
                entry(1, "0/3000060", "no recovery target specified"),
                entry(2, "1/A0000000", "before 2026-03-01 02:00:00+00"),
                entry(3, "2/0", ""),
            ]
        );
        assert_eq!(parse_history("").unwrap(), []);
    }

    /// A recovery to a moment before the timeline that it followed had begun.
    #[test]
    fn a_timeline_ends_where_one_after_it_was_left() {
        for (case, text, expected) in [
            ("one that never was", "1\t0/50\n2\t0/30\n", &[(1, "0/30"), (2, "0/30")][..]),
            (
                "the one in the middle",
                "1\t0/20\n2\t0/50\n3\t0/30\n4\t0/60\n",
                &[(1, "0/20"), (2, "0/30"), (3, "0/30"), (4, "0/60")],
            ),
            ("all", "1\t0/20\n2\t0/50\n3\t0/10\n", &[(1, "0/10"), (2, "0/10"), (3, "0/10")]),
        ] {
            let found = parse_history(text).unwrap();
            let found: Vec<_> = found.iter().map(|it| (it.timeline, it.switch_lsn)).collect();
            let expected: Vec<_> = expected.iter().map(|it| (it.0, lsn(it.1))).collect();
            assert_eq!(found, expected, "{case}");
        }
    }

    #[test]
    fn a_history_that_does_not_read_is_refused_with_its_line() {
        for (text, expected) in [
            ("1\n", "timeline history line 1: expected a timeline and an LSN, found `1`"),
            (
                "x\t0/1\ty",
                "timeline history line 1: expected a timeline and an LSN, found `x\t0/1\ty`",
            ),
            (
                "1\t0/1\n2\t7\n",
                "timeline history line 2: expected a timeline and an LSN, found `2\t7`",
            ),
            (
                "2\t0/1\n2\t0/2\n",
                "timeline history line 2: timeline 2 is not after the line before",
            ),
        ] {
            assert_eq!(parse_history(text).unwrap_err().to_string(), expected);
        }
    }
}
