//! What the newest backup and the WAL after it come to: until when a moment can be restored, and
//! whether a new backup is needed. Pure.
//!
//! Only what leads to the cluster's own timeline counts (see `wal/timelines.rs`). What that has left is
//! nobody's database any more, and no backup mends a gap in it.

use chrono::{DateTime, Utc};
use serde::Serialize;

use crate::manifest::Commit;
use crate::wal::{Gap, Reach, Then, WalMap};

/// What there is to expect.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Outlook {
    /// Until when, from the newest backup that is not suspect, without a gap.
    pub reachable_until: Option<DateTime<Utc>>,
    /// The first WAL segment that is missing or ambiguous after it.
    pub broken_at: Option<String>,
    /// Whether no backup leads to the primary's timeline, or none is after the last recorded gap on the
    /// way to the cluster's own.
    pub needs_backup: bool,
    /// Whether WAL after the newest backup, suspect or not, is missing. What is on its way out of
    /// order looks the same, for a moment.
    pub gap_seen: bool,
}

/// The backups that lead to the cluster's own timeline; none if nobody can tell which it is. `primary`
/// is the timeline that the primary writes.
pub fn leading<'a>(backups: &'a [Commit], wal: &WalMap, primary: Option<u32>) -> Vec<&'a Commit> {
    let Ok(own) = wal.own(primary) else { return Vec::new() };
    backups.iter().filter(|it| own.is_none_or(|own| wal.leads(it, own))).collect()
}

/// Works it out. `wal` has everything from the start of the newest backups of [`leading`] on. A suspect
/// backup answers a gap too: its server would give no better one a minute later.
pub fn outlook(backups: &[Commit], wal: &WalMap, gaps: &[Gap], primary: Option<u32>) -> Outlook {
    let own = wal.own(primary).ok().flatten();
    let leading = leading(backups, wal, primary);
    let Some(newest) = leading.last() else {
        // Any other server's backup would lead there as little.
        let needs_backup = !backups.is_empty() && primary.is_some() && primary == own;
        return Outlook { needs_backup, ..Outlook::default() };
    };
    // Another one that has begun is a copy's: the primary does not write it.
    let written = own.filter(|own| primary == Some(*own));
    let followed = |backup: &Commit| written.unwrap_or_else(|| wal.followed(backup, own));
    let timeline = followed(newest);
    let history = wal.histories.get(&timeline).map_or(&[][..], Vec::as_slice);
    let is_on_the_way = |gap: &&Gap| {
        let left = history.iter().find(|entry| entry.timeline == gap.timeline);
        gap.timeline == timeline || left.is_some_and(|entry| gap.from_lsn < entry.switch_lsn)
    };
    let end_lsn = leading.iter().map(|backup| backup.end_lsn).max();
    let mut gaps = gaps.iter().filter(is_on_the_way);
    let reach = |backup: &Commit| wal.reach(backup, followed(backup));
    let good = leading.iter().rfind(|backup| backup.suspect.is_none()).and_then(|it| reach(it));
    // The newest may be of a standby that was far behind.
    let is_gap = |reach: Reach| {
        matches!(reach.then, Then::Gap { .. })
            && wal.goes_on_after(&reach)
            && leading.iter().all(|it| it == newest || it.end_lsn <= reach.until_lsn)
    };
    Outlook {
        reachable_until: good.as_ref().and_then(|reach| reach.until),
        broken_at: good.and_then(|reach| match reach.then {
            Then::End => None,
            // The end of a timeline that was left is stored after the history of the next.
            Then::Gap { .. } if !wal.goes_on_after(&reach) => None,
            Then::Gap { segment } | Then::Conflict { segment } => Some(segment),
        }),
        needs_backup: gaps.any(|gap| Some(gap.until_lsn) > end_lsn),
        gap_seen: reach(newest).is_some_and(is_gap),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recovery::tests::{at, backup, lsn, map};

    fn gap(timeline: u32, from: u64, until: u64) -> Gap {
        Gap {
            timeline,
            from_lsn: lsn(from),
            until_lsn: lsn(until),
            noticed_at: at(0),
            reason: String::new(),
        }
    }

    fn wanted(needs_backup: bool, gap_seen: bool) -> (bool, bool) {
        (needs_backup, gap_seen)
    }

    /// A backup (timeline, first segment, suspect) ends two segments after its first.
    #[test]
    fn a_gap_is_answered_by_one_backup_after_it_on_the_way_to_the_newest_timeline() {
        type Backups = &'static [(u32, u64, bool)];
        // Timeline 1 has a gap in 7 and 8, recorded. Timeline 2 left it before, in 5; or after, in 12.
        let one = || map(&[(1, (2..7).chain(9..20).collect())], &[]);
        let two = |left: &[(u32, u64)]| {
            let first = left[0].1;
            let timelines = [(1, (2..7).chain(9..20).collect()), (2, (first..40).collect())];
            map(&timelines, &[(2, left)])
        };
        let cases: [(&str, Backups, WalMap, _); 10] = [
            ("no backup at all waits for the schedule", &[], one(), wanted(false, false)),
            ("before the gap", &[(1, 2, false)], one(), wanted(true, true)),
            ("after it", &[(1, 2, false), (1, 10, false)], one(), wanted(false, false)),
            (
                "a suspect one after it",
                &[(1, 2, false), (1, 10, true)],
                one(),
                wanted(false, false),
            ),
            (
                "the newest by time is of a standby that was behind",
                &[(1, 10, false), (1, 2, false)],
                one(),
                wanted(false, false),
            ),
            ("restored to before it", &[(1, 2, false)], two(&[(1, 5)]), wanted(false, false)),
            (
                "restored to before it, and backed up before it",
                &[(1, 2, false), (1, 10, false), (2, 5, false)],
                two(&[(1, 5)]),
                wanted(false, false),
            ),
            (
                "promoted after it, no backup after it",
                &[(1, 2, false)],
                two(&[(1, 12)]),
                wanted(true, true),
            ),
            (
                "promoted after it, and backed up since",
                &[(1, 2, false), (2, 13, false)],
                two(&[(1, 12)]),
                wanted(false, false),
            ),
            ("no backup leads there", &[(1, 10, false)], two(&[(1, 5)]), wanted(true, false)),
        ];
        for (case, backups, wal, expected) in cases {
            let backups: Vec<Commit> = backups.iter().map(|it| backup(it.0, it.1, it.2)).collect();
            let found = outlook(&backups, &wal, &[gap(1, 7, 9)], wal.newest_with_wal());
            assert_eq!((found.needs_backup, found.gap_seen), expected, "{case}");
        }
    }

    /// The oldest of three backups was restored in place of the server.
    #[test]
    fn what_was_left_behind_says_nothing_about_what_can_be_reached() {
        let backups = [backup(1, 2, false), backup(1, 10, false), backup(1, 20, false)];
        let timelines = [(1, (2..30).collect()), (2, (4..9).collect())];
        let wal = map(&timelines, &[(2, &[(1, 4)])]);
        let found = outlook(&backups, &wal, &[], Some(2));
        let expected = Outlook { reachable_until: Some(at(8)), ..Outlook::default() };
        assert_eq!(found, expected);
        let known: Vec<_> =
            leading(&backups, &wal, Some(2)).iter().map(|it| it.start_lsn).collect();
        assert_eq!(known, [lsn(2)]);

        // As soon as it was promoted there is a history, and no WAL.
        let promoted = map(&timelines[..1], &[(2, &[(1, 4)])]);
        let found = outlook(&backups, &promoted, &[], Some(2));
        assert_eq!(found.reachable_until, Some(at(29)));
        let beside = outlook(&backups[..1], &promoted, &[], Some(1));
        assert_eq!(beside.reachable_until, Some(at(29)), "a copy was promoted");
    }

    /// A copy was promoted beside its server and thrown away; then the retention removed the backup that
    /// it came from.
    #[test]
    fn a_backup_is_asked_for_only_if_it_would_lead_to_the_primarys_timeline() {
        let wal = map(&[(1, (2..30).collect()), (2, (7..9).collect())], &[(2, &[(1, 7)])]);
        let (first, second) = (backup(1, 2, false), backup(1, 10, false));
        let until = |minute| Some(at(minute));
        for (case, backups, primary, expected) in [
            (
                "the server's, both",
                vec![first.clone(), second.clone()],
                Some(1),
                (until(29), false),
            ),
            ("the server's, the newer one", vec![second.clone()], Some(1), (until(29), false)),
            ("of the copy, if it were the primary", vec![first], Some(2), (until(8), false)),
            ("nothing leads to the copy", vec![second.clone()], Some(2), (None, true)),
            ("nobody knows which", vec![second.clone()], None, (None, false)),
            ("just promoted, nothing stored", vec![second], Some(3), (None, false)),
        ] {
            let found = outlook(&backups, &wal, &[], primary);
            assert_eq!((found.reachable_until, found.needs_backup), expected, "{case}");
        }
    }

    #[test]
    fn what_can_be_reached_is_told_of_the_newest_good_backup() {
        let wal = map(&[(1, (2..7).chain(9..20).collect())], &[]);
        let backups = [backup(1, 2, false), backup(1, 10, true)];
        let found = outlook(&backups, &wal, &[], None);
        let expected = Outlook {
            reachable_until: Some(at(6)),
            broken_at: Some("000000010000000000000007".to_owned()),
            ..Outlook::default()
        };
        assert_eq!(found, expected);
    }
}
