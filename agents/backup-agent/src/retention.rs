//! Decides what may go: base backups by grandfather, father and son, and the WAL that no kept
//! backup needs. Pure.

use std::collections::BTreeSet;
use std::iter::successors;
use std::time::Duration;

use chrono::{DateTime, Datelike, TimeDelta, Utc};
use serde::Deserialize;
use shared::config::Problems;
use shared::pg::wal::{Segment, segment_number};

use crate::catalog::Mark;
use crate::clocks::APART_MAX;
use crate::manifest::{BackupId, Commit};
use crate::recovery::Window;
use crate::wal::piece::Piece;
use crate::wal::remnant::Remnant;
use crate::wal::{WalMap, WalObject};

/// What is kept.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Retention {
    /// The newest backup of each of so many days that have one (UTC).
    pub daily: usize,
    /// The newest backup of each of so many weeks that have one (ISO weeks).
    pub weekly: usize,
    /// The newest backup of each of so many months that have one.
    pub monthly: usize,
    /// Every moment this recent stays reachable. WAL stays for [`Retention::delete_after`] longer, so
    /// that what was marked as deleted and is brought back reaches what it reached.
    #[serde(with = "humantime_serde")]
    pub wal: Duration,
    /// How long what was marked as deleted can still be brought back.
    #[serde(with = "humantime_serde")]
    pub delete_after: Duration,
}

impl Default for Retention {
    fn default() -> Self {
        Self {
            daily: 7,
            weekly: 4,
            monthly: 12,
            wal: Duration::from_hours(30 * 24),
            delete_after: Duration::from_hours(24),
        }
    }
}

impl Retention {
    /// Adds every problem with these keys.
    pub fn check(&self, problems: &mut Problems) {
        if self.daily == 0 {
            problems.add("daily", "must be at least 1: the newest backup always stays");
        }
        let longest = self.wal.checked_add(self.delete_after);
        if longest.is_none_or(|it| TimeDelta::from_std(it).is_err()) {
            problems.add("wal", "is too long, with delete_after");
        }
    }
}

/// Until when ages are counted: by the clock, which says `now`, and no further than to what was stored last,
/// the cluster's own WAL or a backup. So a clock that is ahead makes nothing old, and where nothing new
/// comes, nothing goes. What was stored in the future was so by a clock that was ahead, and tells nothing.
pub fn as_of(
    backups: &[Commit],
    wal: &WalMap,
    primary: Option<u32>,
    now: DateTime<Utc>,
) -> DateTime<Utc> {
    let own = wal.candidates(primary).into_iter().filter_map(|own| wal.last_stored(own));
    let stored = own.chain(backups.iter().map(complete_at)).filter(|at| *at - now <= APART_MAX);
    stored.max().map_or(now, |newest| newest.min(now))
}

/// When a backup was complete, by the clock that says the earlier time if its two do not agree.
fn complete_at(backup: &Commit) -> DateTime<Utc> {
    let (ours, servers) = (backup.finished_at, backup.server_finished_at);
    let servers = servers.unwrap_or(ours);
    if (ours - servers).abs() > APART_MAX { ours.min(servers) } else { ours.max(servers) }
}

impl Mark {
    /// From when on the backup may be deleted, if ages are counted so far.
    pub fn due(&self, retention: &Retention) -> DateTime<Utc> {
        let grace = TimeDelta::from_std(retention.delete_after).unwrap_or(TimeDelta::MAX);
        let since = self.deleted_at.max(self.stored_at);
        since.checked_add_signed(grace).unwrap_or(DateTime::<Utc>::MAX_UTC)
    }

    /// Whether it was marked long enough ago, by its own word and by the store's; a mark of the future
    /// has no age.
    pub fn is_due(&self, retention: &Retention, as_of: DateTime<Utc>, now: DateTime<Utc>) -> bool {
        let is_past = self.deleted_at.max(self.stored_at) <= now;
        is_past && (retention.delete_after.is_zero() || self.due(retention) <= as_of)
    }
}

/// What is to become of one backup, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// The backup.
    pub backup_id: BackupId,
    /// Why it stays; it goes if there is no reason.
    pub keep: Vec<&'static str>,
}

/// Decides for each backup, oldest first. `primary` is the timeline that the cluster's primary writes,
/// if one is known; ages are counted until `as_of` ([`as_of()`]).
///
/// The newest backup and those of days, weeks and months are chosen among those that lead to the
/// cluster's own timeline, and once more among all: what was left is given up by a person, not by
/// the next backup. A backup that is suspect, or has lost WAL of its own, fills nobody's place: it stays
/// for a look while it is as young as the WAL, and as long as there is no other.
pub fn decide(
    backups: &[Commit],
    wal: &WalMap,
    retention: &Retention,
    primary: Option<u32>,
    as_of: DateTime<Utc>,
) -> Vec<Decision> {
    let window_start = ago(retention.wal, as_of);
    let mut oldest_first: Vec<&Commit> = backups.iter().collect();
    oldest_first.sort_by_key(|backup| backup.finished_at);
    let good = good(backups, wal);

    let own = wal.candidates(primary);
    let leading = own.iter().map(|timeline| leading(&good, wal, *timeline));
    let leading: Vec<Vec<&Commit>> = leading.filter(|it| !it.is_empty()).collect();
    let newest: Vec<&BackupId> =
        if leading.is_empty() { vec![&good] } else { leading.iter().collect() }
            .into_iter()
            .filter_map(|it: &Vec<&Commit>| it.last().map(|backup| &backup.backup_id))
            .collect();
    let all = || leading.iter().chain([&good]);
    let daily = newest_of_each(all(), retention.daily, |at| (at.year(), at.ordinal()));
    let weekly =
        newest_of_each(all(), retention.weekly, |at| (at.iso_week().year(), at.iso_week().week()));
    let monthly = newest_of_each(all(), retention.monthly, |at| (at.year(), at.month()));
    let anchors = anchors(&good, wal, primary, window_start);
    let starts = |id: &BackupId, is_own: bool, after_gap: bool| {
        let starts = |it: &Anchor<'_>| {
            let of_own = own.is_empty() || own.contains(&it.timeline);
            it.backup.backup_id == *id && of_own == is_own && it.after_gap == after_gap
        };
        anchors.iter().any(starts)
    };

    let decide = |backup: &&Commit| {
        let id = &backup.backup_id;
        let young = backup.finished_at > window_start;
        let is_good = good.iter().any(|it| it.backup_id == *id);
        let reasons = [
            (newest.contains(&id), "newest"),
            (starts(id, true, false), "start of the WAL window"),
            (starts(id, true, true), "start of the WAL after a gap"),
            (
                starts(id, false, false) || starts(id, false, true),
                "start of the WAL of a timeline that was left",
            ),
            (good.is_empty(), "nothing better than suspect backups"),
            (backup.suspect.is_some() && young, "suspect, kept for a look"),
            (
                backup.suspect.is_none() && !is_good && young,
                "not restorable, WAL of its own is missing; kept for a look",
            ),
            (daily.contains(id), "daily"),
            (weekly.contains(id), "weekly"),
            (monthly.contains(id), "monthly"),
        ];
        let keep = reasons.iter().filter(|(holds, _)| *holds).map(|(_, reason)| *reason).collect();
        Decision { backup_id: id.clone(), keep }
    };
    oldest_first.iter().map(decide).collect()
}

/// Which WAL the kept backups need, to become consistent and to reach the moments in the window. Without
/// a backup to start from, all of it.
#[derive(Debug)]
pub struct Needs<'a> {
    kept: &'a [Commit],
    wal: &'a WalMap,
    window_start: DateTime<Utc>,
    /// From this segment on everything is needed, on every timeline.
    floor: u64,
    /// Everything is needed on the timelines after this one.
    timeline: u32,
}

impl<'a> Needs<'a> {
    /// Works it out. `primary` and `as_of` as in [`decide`].
    pub fn new(
        kept: &'a [Commit],
        wal: &'a WalMap,
        retention: &Retention,
        primary: Option<u32>,
        as_of: DateTime<Utc>,
    ) -> Self {
        // The backup that began the window until a moment ago can be brought back.
        let window_start = ago(retention.wal.saturating_add(retention.delete_after), as_of);
        let anchors = anchors(&good(kept, wal), wal, primary, window_start);
        let anchors = anchors.iter().map(|it| it.backup);
        let floor = anchors.clone().map(|it| segment_number(it.start_lsn, wal.segment_bytes)).min();
        // What branched off later may lead to moments in the window from elsewhere.
        let timeline = anchors.map(|backup| backup.timeline).min();
        let (floor, timeline) = (floor.unwrap_or(0), timeline.unwrap_or(0));
        Self { kept, wal, window_start, floor, timeline }
    }

    /// Whether a segment is needed; it is no loss if one that is not is missing.
    pub fn has(&self, segment: Segment) -> bool {
        let Segment { timeline, number } = segment;
        let own =
            |backup: &Commit| backup.timeline == timeline && backup.segments().contains(&number);
        number >= self.floor || timeline > self.timeline || self.kept.iter().any(own)
    }

    /// Whether what belongs to a segment may go.
    fn is_spare(&self, segment: Segment, stored_at: DateTime<Utc>) -> bool {
        stored_at < self.window_start && !self.has(segment)
    }

    /// The complete segments that nothing needs.
    pub fn spare_wal(&self) -> Vec<&'a WalObject> {
        let all = self.wal.segments.iter().flat_map(|(timeline, segments)| {
            segments.iter().flat_map(move |(number, objects)| {
                let segment = Segment { timeline: *timeline, number: *number };
                objects.iter().map(move |object| (segment, object))
            })
        });
        all.filter(|(segment, object)| self.is_spare(*segment, object.stored_at))
            .map(|(_, object)| object)
            .collect()
    }

    /// The pieces of segments that nothing needs: the ends of timelines that were left. Those of complete
    /// segments are the receiver's to remove.
    pub fn spare_pieces(&self) -> Vec<&'a Piece> {
        let is_spare = |piece: &&Piece| self.is_spare(piece.segment, piece.stored_at);
        self.wal.pieces.values().flatten().filter(is_spare).collect()
    }

    /// What goes with WAL that nothing needs.
    pub fn spare_remnants<'b>(&self, remnants: &'b [Remnant]) -> Vec<&'b Remnant> {
        let is_spare = |remnant: &&Remnant| self.is_spare(remnant.segment, remnant.stored_at);
        remnants.iter().filter(is_spare).collect()
    }
}

/// The backups that a restore may start from, oldest first: neither suspect nor without WAL of their own.
/// If that is missing for each of them, it speaks against none.
fn good<'a>(backups: &'a [Commit], wal: &WalMap) -> Vec<&'a Commit> {
    let mut good: Vec<&Commit> = backups.iter().filter(|it| it.suspect.is_none()).collect();
    good.sort_by_key(|backup| backup.finished_at);
    let is_consistent = |backup: &&Commit| Window::of(backup, wal, backup.timeline).is_consistent();
    let consistent: Vec<&Commit> = good.iter().copied().filter(is_consistent).collect();
    if consistent.is_empty() { good } else { consistent }
}

/// A backup from which moments of the window are reached.
#[derive(Clone, Copy, Debug)]
struct Anchor<'a> {
    /// The timeline to whose WAL it leads.
    timeline: u32,
    backup: &'a Commit,
    /// Whether the way from the one before does not go so far.
    after_gap: bool,
}

/// The backups from which the moments of the window are reached: on the way to the cluster's own timeline,
/// and to every other of which WAL was stored in the window. One of all, if none leads anywhere.
fn anchors<'a>(
    good: &[&'a Commit],
    wal: &WalMap,
    primary: Option<u32>,
    window_start: DateTime<Utc>,
) -> Vec<Anchor<'a>> {
    let own = wal.candidates(primary).first().and_then(|own| wal.last_stored(*own));
    let since = own.map_or(window_start, |own| own.min(window_start));
    // Until a backup is as old as the window, the oldest serves what there is of it.
    let anchor = |good: &[&'a Commit]| anchor(good, window_start).or(good.first().copied());
    let in_window = |timeline: &u32| wal.last_stored(*timeline) >= Some(since);
    let mut anchors = Vec::new();
    for timeline in wal.with_wal().into_iter().filter(in_window) {
        let leading = leading(good, wal, timeline);
        let Some(first) = anchor(&leading) else { continue };
        anchors.push(Anchor { timeline, backup: first, after_gap: false });
        let next = |before: &&'a Commit| after_gap(&leading, wal, timeline, before);
        let after_gaps = successors(next(&first), next);
        anchors.extend(after_gaps.map(|backup| Anchor { timeline, backup, after_gap: true }));
    }
    if anchors.is_empty() {
        let only =
            |backup: &'a Commit| Anchor { timeline: backup.timeline, backup, after_gap: false };
        return anchor(good).map(only).into_iter().collect();
    }
    anchors
}

/// The first backup beyond where the WAL after `before` ends without a gap: no other leads to what follows.
fn after_gap<'a>(
    leading: &[&'a Commit],
    wal: &WalMap,
    timeline: u32,
    before: &Commit,
) -> Option<&'a Commit> {
    let until_lsn = wal.reach(before, timeline)?.until_lsn.max(before.end_lsn);
    leading.iter().copied().find(|backup| until_lsn < backup.end_lsn)
}

/// The backups that lead to a timeline, in the order of their places on the way there: a time of one may
/// be wrong, and then it would be the newest for long.
fn leading<'a>(good: &[&'a Commit], wal: &WalMap, timeline: u32) -> Vec<&'a Commit> {
    let leading = good.iter().copied().filter(|backup| wal.leads(backup, timeline));
    let mut leading: Vec<&Commit> = leading.collect();
    leading.sort_by_key(|backup| (backup.end_lsn, backup.finished_at));
    leading
}

/// The newest backup that was complete before the window: it serves the window's oldest moment.
fn anchor<'a>(good: &[&'a Commit], window_start: DateTime<Utc>) -> Option<&'a Commit> {
    good.iter().rev().find(|backup| backup.reaches_from() <= window_start).copied()
}

fn ago(span: Duration, as_of: DateTime<Utc>) -> DateTime<Utc> {
    let span = TimeDelta::from_std(span).unwrap_or(TimeDelta::MAX);
    as_of.checked_sub_signed(span).unwrap_or(DateTime::<Utc>::MIN_UTC)
}

/// The newest backup of each of the newest `count` periods that have one, of each list.
fn newest_of_each<'a, P: PartialEq>(
    lists: impl Iterator<Item = &'a Vec<&'a Commit>>,
    count: usize,
    period: impl Fn(DateTime<Utc>) -> P,
) -> BTreeSet<BackupId> {
    let mut kept = BTreeSet::new();
    for oldest_first in lists {
        let mut periods = Vec::new();
        for backup in oldest_first.iter().rev() {
            let this = period(backup.finished_at);
            if periods.contains(&this) {
                continue;
            }
            if periods.len() == count {
                break;
            }
            periods.push(this);
            kept.insert(backup.backup_id.clone());
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use shared::pg::wal::{HistoryEntry, Segment};
    use tokio_postgres::types::PgLsn;

    use super::*;
    use crate::manifest::{ObjectRecord, Suspicion};
    use crate::wal::remnant::What;

    const SEGMENT: u64 = 16 << 20;

    fn now() -> DateTime<Utc> {
        "2026-07-15T12:00:00Z".parse().unwrap()
    }

    fn day(ago: u32) -> DateTime<Utc> {
        now() - TimeDelta::days(ago.into())
    }

    /// A backup that was complete so many days ago, and needs the segments 10 × (1000 - days) and
    /// the one after.
    fn backup(days_ago: u32, suspect: bool) -> Commit {
        let record = ObjectRecord { object_bytes: 1, plain_bytes: 1, salt: [0; 32] };
        let first = segment(days_ago);
        Commit {
            format: 1,
            backup_id: BackupId::new(day(days_ago), 1, PgLsn::from(first * SEGMENT)),
            group: 0,
            system_identifier: 1,
            node: String::new(),
            from_standby: false,
            server_version_num: 170_000,
            wal_segment_bytes: SEGMENT,
            started_at: day(days_ago),
            finished_at: day(days_ago),
            server_finished_at: None,
            timeline: 1,
            start_lsn: PgLsn::from(first * SEGMENT),
            end_lsn: PgLsn::from((first + 2) * SEGMENT),
            suspect: suspect.then(|| Suspicion { reason: String::new(), warnings: Vec::new() }),
            archives: Vec::new(),
            chunk_bytes: 1,
            parts: Vec::new(),
            manifest: record.clone(),
            files: record,
            file_count: 0,
            previous: None,
        }
    }

    fn segment(days_ago: u32) -> u64 {
        10 * (1000 - u64::from(days_ago))
    }

    fn retention(daily: usize, weekly: usize, monthly: usize, wal_days: u64) -> Retention {
        Retention {
            daily,
            weekly,
            monthly,
            wal: Duration::from_hours(24 * wal_days),
            delete_after: Duration::ZERO,
        }
    }

    fn kept(ages: &[u32], suspect: &[u32], retention: &Retention) -> Vec<u32> {
        let backups: Vec<_> = ages.iter().map(|age| backup(*age, suspect.contains(age))).collect();
        let wal = map(&[(1, 0..segment(0) + 2)], now());
        let decisions = decide(&backups, &wal, retention, None, now());
        let keeps = |age: &&u32| {
            let id = backup(**age, false).backup_id;
            decisions.iter().any(|it| it.backup_id == id && !it.keep.is_empty())
        };
        ages.iter().filter(keeps).copied().collect()
    }

    #[test]
    fn backups_stay_by_day_week_and_month_and_for_the_window() {
        type Ages = &'static [u32];
        let cases: [(&str, Ages, Ages, Retention, Ages); 9] = [
            ("none", &[], &[], retention(7, 4, 12, 30), &[]),
            ("the only one stays, however old", &[900], &[], retention(1, 0, 0, 1), &[900]),
            ("days", &[5, 4, 3, 2, 1, 0], &[], retention(3, 0, 0, 0), &[2, 1, 0]),
            ("all younger than the window", &[5, 4, 3], &[], retention(1, 0, 0, 30), &[5, 3]),
            // 2026-07-15 is a Wednesday: 2 is Monday, 3 is Sunday of the week before.
            ("weeks", &[10, 9, 3, 2, 1], &[], retention(1, 3, 0, 0), &[10, 3, 1]),
            ("months", &[60, 50, 20, 10, 1], &[], retention(1, 0, 3, 0), &[50, 20, 1]),
            ("the window's start", &[9, 8, 3, 1], &[], retention(1, 0, 0, 7), &[8, 1]),
            (
                "a suspect one fills nobody's place",
                &[9, 3, 1],
                &[1],
                retention(1, 0, 0, 7),
                &[9, 3, 1],
            ),
            ("an old suspect one goes", &[20, 9, 1], &[9], retention(1, 0, 0, 7), &[20, 1]),
        ];
        for (case, ages, suspect, retention, expected) in cases {
            assert_eq!(kept(ages, suspect, &retention), expected, "{case}");
        }
    }

    /// Timeline 2 branched off in a segment, and its WAL was stored on a day; that of timeline 1 until
    /// another day.
    fn branched(at: u64, days: [u32; 2]) -> WalMap {
        let mut wal = map(&[(1, 9_000..9_990)], day(days[0]));
        wal.segments.extend(map(&[(2, at..segment(0) + 2)], day(days[1])).segments);
        let switch_lsn = PgLsn::from(at * SEGMENT + 100);
        let entry = HistoryEntry { timeline: 1, switch_lsn, reason: String::new() };
        wal.histories.insert(2, vec![entry]);
        wal
    }

    type Backups = &'static [(u32, u32)];
    type Case = (&'static str, Backups, WalMap, Retention, Option<u32>, Backups);

    /// Backups (days ago, timeline); those of timeline 1 that ended after the branch were given up.
    #[test]
    fn what_leads_to_the_clusters_own_timeline_stays_and_what_was_left_stays_for_the_window() {
        let defaults = Retention::default;
        let after = |days: u32| segment(days) + 5;
        let short = || retention(1, 0, 0, 0);
        let cases: [Case; 9] = [
            (
                "restored from the older of two, however short the window",
                &[(3, 1), (2, 1)],
                branched(after(3), [2, 1]),
                short(),
                None,
                &[(3, 1), (2, 1)],
            ),
            (
                "and backed up since",
                &[(3, 1), (2, 1), (1, 2)],
                branched(after(3), [2, 1]),
                short(),
                None,
                &[(1, 2)],
            ),
            (
                "restored, and backed up since, with the defaults",
                &[(40, 1), (35, 1), (3, 1), (2, 1), (1, 2)],
                branched(after(3), [2, 1]),
                defaults(),
                None,
                &[(40, 1), (35, 1), (3, 1), (2, 1), (1, 2)],
            ),
            (
                "restored to before the window, one backup a day would do",
                &[(45, 1), (40, 1), (35, 1), (2, 1), (1, 2)],
                branched(after(40), [2, 1]),
                retention(1, 0, 0, 30),
                None,
                &[(40, 1), (35, 1), (1, 2)],
            ),
            (
                "what was given up is out of the window",
                &[(75, 1), (70, 1), (40, 1), (33, 2), (1, 2)],
                branched(after(70), [38, 1]),
                retention(1, 0, 0, 30),
                None,
                &[(33, 2), (1, 2)],
            ),
            (
                "a copy that was thrown away, no primary",
                &[(50, 1), (40, 1), (1, 1)],
                branched(after(50), [1, 49]),
                retention(1, 0, 0, 30),
                None,
                &[(50, 1), (40, 1), (1, 1)],
            ),
            (
                "a copy that was thrown away, and the primary lives",
                &[(50, 1), (40, 1), (1, 1)],
                branched(after(50), [1, 49]),
                retention(1, 0, 0, 30),
                Some(1),
                &[(40, 1), (1, 1)],
            ),
            (
                "the copy is in the window",
                &[(50, 1), (40, 1), (1, 1)],
                branched(after(50), [1, 20]),
                retention(1, 0, 0, 30),
                Some(1),
                &[(50, 1), (40, 1), (1, 1)],
            ),
            (
                "nothing leads to the newest timeline",
                &[(3, 1), (2, 1)],
                branched(after(4), [2, 1]),
                short(),
                Some(2),
                &[(2, 1)],
            ),
        ];
        for (case, backups, wal, retention, primary, expected) in cases {
            let of = |(days, timeline): &(u32, u32)| {
                let mut of = backup(*days, false);
                of.timeline = *timeline;
                of
            };
            let backups: Vec<Commit> = backups.iter().map(of).collect();
            let decided = decide(&backups, &wal, &retention, primary, now());
            let keeps = decided.iter().filter(|it| !it.keep.is_empty()).map(|it| &it.backup_id);
            let expected: Vec<_> = expected.iter().map(|it| of(it).backup_id).collect();
            assert_eq!(keeps.cloned().collect::<Vec<_>>(), expected, "{case}");
            // From each that stays to lead somewhere, all WAL does.
            let kept: Vec<Commit> =
                backups.iter().filter(|it| expected.contains(&it.backup_id)).cloned().collect();
            assert_eq!(missing(&kept, &wal, &retention, primary), None, "{case}");
        }
    }

    /// The first segment that may go, on the ways from the backups that begin the window.
    fn missing(
        kept: &[Commit],
        wal: &WalMap,
        retention: &Retention,
        primary: Option<u32>,
    ) -> Option<Segment> {
        let needs = Needs::new(kept, wal, retention, primary, now());
        let good: Vec<&Commit> = kept.iter().collect();
        let anchors = anchors(&good, wal, primary, ago(retention.wal, now()));
        let mut ways = anchors.into_iter().flat_map(|Anchor { timeline, backup, .. }| {
            let first = segment_number(backup.start_lsn, SEGMENT);
            (first..first + 2000).map(move |number| {
                let lsn = PgLsn::from(number * SEGMENT);
                Segment { timeline: wal.on_the_way(timeline, lsn), number }
            })
        });
        ways.find(|segment| !needs.has(*segment))
    }

    /// A backup was complete at one time by the agent's clock and at another by the primary's, if that said.
    fn told(days: i64, servers_days: Option<i64>) -> Commit {
        let ago = |days| now() - TimeDelta::days(days);
        let server_finished_at = servers_days.map(ago);
        Commit { finished_at: ago(days), server_finished_at, ..backup(1, false) }
    }

    #[test]
    fn ages_count_until_what_was_stored_last_and_not_until_a_clock_that_is_ahead() {
        type Told = &'static [(i64, Option<i64>)];
        let cases: [(&str, Told, Option<i64>, i64); 12] = [
            ("nothing tells", &[], None, 0),
            ("WAL comes", &[(5, None)], Some(0), 0),
            ("the clock is ahead: all seems old", &[(45, None)], Some(40), 40),
            ("backups and WAL have stopped", &[(31, None), (30, None)], Some(29), 29),
            ("an idle server, and backups of its standby", &[(1, None)], Some(30), 1),
            ("a backup of the future", &[(-40, None), (5, None)], Some(1), 1),
            ("the agent's clock was ahead", &[(-40, Some(2)), (5, None)], None, 2),
            ("and the future has come", &[(1, Some(41))], None, 41),
            ("the primary's clock was ahead", &[(41, Some(1))], None, 41),
            ("WAL of the future, of a clock that was ahead", &[(2, None)], Some(-40), 2),
            ("all is of the future: the clock is behind", &[(-5, None)], Some(-5), 0),
            ("copied with older times", &[(5, None)], Some(2000), 5),
        ];
        for (case, backups, wal_days, expected) in cases {
            let backups: Vec<_> = backups.iter().map(|it| told(it.0, it.1)).collect();
            let wal = wal_days.map(|days| map(&[(1, 1..5)], now() - TimeDelta::days(days)));
            let found = as_of(&backups, &wal.unwrap_or_default(), Some(1), now());
            assert_eq!(found, now() - TimeDelta::days(expected), "{case}");
        }
        // The store's clock, or another replica's, is a little ahead.
        let wal = map(&[(1, 1..5)], now() + TimeDelta::minutes(1));
        assert_eq!(as_of(&[told(1, None)], &wal, None, now()), now());
    }

    /// As after a virtual machine was resumed with a wrong clock, 40 days ahead.
    #[test]
    fn a_clock_that_is_ahead_makes_nothing_go() {
        let backups: Vec<_> = [50, 40, 20, 3, 2, 1, 0].map(|days| backup(days, false)).into();
        let wal = map(&[(1, segment(50)..segment(0) + 2)], day(0));
        let retention =
            Retention { delete_after: Duration::from_hours(24), ..retention(3, 0, 0, 30) };
        let planned = |now| {
            let at = as_of(&backups, &wal, Some(1), now);
            let decided = decide(&backups, &wal, &retention, Some(1), at);
            let needs = Needs::new(&backups, &wal, &retention, Some(1), at);
            (decided, needs.spare_wal().len())
        };
        let (decided, spare) = planned(now());
        assert_eq!(planned(now() + TimeDelta::days(40)), (decided.clone(), spare));
        let kept: Vec<bool> = decided.iter().map(|it| !it.keep.is_empty()).collect();
        assert_eq!((kept, spare), (vec![false, true, false, false, true, true, true], 0));
    }

    #[test]
    fn a_mark_is_as_old_as_the_later_of_its_times_says() {
        let (hour, old) = (Duration::from_hours(1), 3);
        // Minutes ago.
        for (case, deleted, stored, as_of, grace, expected) in [
            ("just marked", 0, 0, 0, hour, false),
            ("long enough ago", 61, 61, 0, hour, true),
            ("copied with older times", 10, 1_000_000, 0, hour, false),
            ("copied without its times", 90, 10, 0, hour, false),
            ("marked by a clock that was behind", 1_000_000, 10, 0, hour, false),
            ("marked by a clock that was ahead", -1_000, 90, 0, hour, false),
            ("nothing came since it was marked", 90, 90, 90, hour, false),
            ("little came since it was marked", 90, 90, 40, hour, false),
            ("at once", old, old, 100, Duration::ZERO, true),
            ("at once, and marked in the future", -1, old, 100, Duration::ZERO, false),
            ("never", old, old, 0, Duration::MAX, false),
        ] {
            let ago = |minutes: i64| now() - TimeDelta::minutes(minutes);
            let mark = Mark { deleted_at: ago(deleted), stored_at: ago(stored) };
            let retention = Retention { delete_after: grace, ..Retention::default() };
            assert_eq!(mark.is_due(&retention, ago(as_of), now()), expected, "{case}");
        }
    }

    /// One was taken while the clock was 40 days ahead: it is not the newest until then.
    #[test]
    fn a_backup_of_the_future_takes_nobodys_place() {
        let ahead = Commit { finished_at: now() + TimeDelta::days(40), ..backup(5, false) };
        let backups = [backup(50, false), ahead, backup(2, false), backup(1, false)];
        let wal = map(&[(1, segment(50)..segment(0))], day(0));
        let decided = decide(&backups, &wal, &retention(1, 0, 0, 30), Some(1), now());
        let why = |backup: &Commit| {
            let decided = decided.iter().find(|it| it.backup_id == backup.backup_id).unwrap();
            decided.keep.join(", ")
        };
        let expected = ["start of the WAL window", "daily", "", "newest, daily"];
        assert_eq!(backups.each_ref().map(why), expected);
        // Its own time, which is wrong, does not make it the start of the window either.
        let earlier = Commit { server_finished_at: Some(now()), ..backup(40, false) };
        let backups = [backup(50, false), earlier, backup(1, false)];
        let decided = decide(&backups, &wal, &retention(1, 0, 0, 30), Some(1), now());
        assert_eq!(decided[0].keep, ["start of the WAL window"]);
    }

    #[test]
    fn nothing_but_suspect_backups_all_stay() {
        assert_eq!(kept(&[90, 80], &[90, 80], &retention(1, 0, 0, 7)), [90, 80]);
    }

    fn map(timelines: &[(u32, std::ops::Range<u64>)], stored_at: DateTime<Utc>) -> WalMap {
        let mut map = WalMap { segment_bytes: SEGMENT, ..WalMap::default() };
        for (timeline, numbers) in timelines {
            for number in numbers.clone() {
                let file = Segment { timeline: *timeline, number }.name(SEGMENT);
                let object = WalObject {
                    name: file.clone(),
                    file,
                    hash: String::new(),
                    object_bytes: 1,
                    stored_at,
                };
                map.segments.entry(*timeline).or_default().insert(number, vec![object]);
            }
        }
        map
    }

    /// A segment of the newest was lost in the store; then of all.
    #[test]
    fn a_backup_without_its_own_wal_fills_nobodys_place() {
        let backups = [backup(9, false), backup(3, false), backup(1, false)];
        let kept = |wal: &WalMap, wal_days: u64| {
            let decisions = decide(&backups, wal, &retention(1, 0, 0, wal_days), None, now());
            decisions.into_iter().map(|it| it.keep).collect::<Vec<_>>()
        };
        let first = segment(9);
        let look = "not restorable, WAL of its own is missing; kept for a look";
        let mut wal = map(&[(1, first..segment(1) + 5)], day(1));
        wal.segments.get_mut(&1).unwrap().remove(&segment(1));
        let (newest, anchor) = (["newest", "daily"], ["start of the WAL window"]);
        assert_eq!(kept(&wal, 5), [anchor.to_vec(), newest.to_vec(), vec![look]], "it is young");
        let all = ["newest", "start of the WAL window", "daily"];
        assert_eq!(kept(&wal, 0), [vec![], all.to_vec(), vec![]], "it is as old as the window");
        wal.segments.clear();
        assert!(!kept(&wal, 0)[2].is_empty(), "none has its WAL");
    }

    /// It was the only start for what follows the gap, and went because an older one begins the window.
    #[test]
    fn the_first_backup_after_a_gap_stays_as_long_as_what_follows_is_in_the_window() {
        // How long ago the gaps were, and which backups stay of those 50, 40, 19, 18, 8, 7 and 1 days ago.
        let days = [50, 40, 19, 18, 8, 7, 1];
        let backups = days.map(|days| backup(days, false));
        let lost = "start of the WAL after a gap";
        for (case, gaps, expected) in [
            ("none", &[][..], vec![(40, "start of the WAL window"), (1, "newest, daily")]),
            (
                "one in the window",
                &[20],
                vec![(40, "start of the WAL window"), (19, lost), (1, "newest, daily")],
            ),
            (
                "two",
                &[20, 9],
                vec![(40, "start of the WAL window"), (19, lost), (8, lost), (1, "newest, daily")],
            ),
            (
                "one before the window",
                &[45],
                vec![(40, "start of the WAL window"), (1, "newest, daily")],
            ),
            (
                "the newest begins what follows",
                &[4],
                vec![
                    (40, "start of the WAL window"),
                    (1, "newest, start of the WAL after a gap, daily"),
                ],
            ),
            (
                "no backup after it",
                &[0],
                vec![(40, "start of the WAL window"), (1, "newest, daily")],
            ),
        ] {
            let mut wal = map(&[(1, segment(50)..segment(0) + 5)], day(0));
            for days in gaps {
                wal.segments.get_mut(&1).unwrap().remove(&(segment(*days) + 3));
            }
            let decided = decide(&backups, &wal, &retention(1, 0, 0, 30), None, now());
            let keeps = days.iter().zip(&decided).filter(|(_, it)| !it.keep.is_empty());
            let keeps: Vec<_> = keeps.map(|(days, it)| (*days, it.keep.join(", "))).collect();
            let expected: Vec<_> =
                expected.into_iter().map(|(days, why)| (days, why.to_owned())).collect();
            assert_eq!(keeps, expected, "{case}");
        }
    }

    fn spare(kept: &[Commit], map: &WalMap) -> Vec<u64> {
        let retention = retention(1, 0, 0, 30);
        let spare = Needs::new(kept, map, &retention, None, now()).spare_wal();
        spare.iter().map(|wal| u64::from_str_radix(&wal.file[16..], 16).unwrap()).collect()
    }

    #[test]
    fn wal_goes_only_if_no_kept_backup_needs_it() {
        let old = day(100);
        let (monthly, anchor) = (backup(80, false), backup(40, false));
        let first = segment(80) - 3;
        let all = map(&[(1, first..segment(40) + 5)], old);
        let kept = [monthly.clone(), anchor.clone(), backup(1, false)];
        let is_own = |number: &u64| monthly.segments().contains(number);
        let expected: Vec<u64> = (first..segment(40)).filter(|number| !is_own(number)).collect();
        let in_log: Vec<u64> = expected.iter().map(|number| number % 256).collect();
        let all_but = "all but the monthly's own, up to the window's first backup";
        assert_eq!(spare(&kept, &all), in_log, "{all_but}");
        let retention = retention(1, 0, 0, 30);
        let needs = Needs::new(&kept, &all, &retention, None, now());
        let number = |number: &u64| !needs.has(Segment { timeline: 1, number: *number });
        let missing: Vec<u64> = (first..segment(40) + 5).filter(number).collect();
        assert_eq!(missing, expected, "{all_but}, may be missing");
    }

    #[test]
    fn wal_stays_without_a_backup_and_while_it_is_young() {
        let all = map(&[(1, 0..9)], day(100));
        assert_eq!(spare(&[], &all), Vec::<u64>::new());
        assert_eq!(spare(&[backup(40, true)], &all), Vec::<u64>::new(), "only a suspect backup");
        let young = map(&[(1, 0..9)], day(3));
        assert_eq!(spare(&[backup(40, false)], &young), Vec::<u64>::new());
        // No backup is as old as the window: the oldest there is counts.
        let fresh = backup(1, false);
        let before = map(&[(1, segment(1) - 2..segment(1) + 3)], day(100));
        assert_eq!(spare(&[fresh], &before).len(), 2);
    }

    /// The backup that began the window is marked as soon as the next one can begin it. Until it is
    /// deleted it can be brought back, and reaches what it reached.
    #[test]
    fn wal_stays_until_what_needs_it_cannot_be_brought_back() {
        let marked = backup(40, false);
        let all = map(&[(1, segment(40)..segment(5))], day(100));
        let between: Vec<u64> = (segment(40) + 2..segment(31)).map(|it| it % 256).collect();
        for (case, begins_window, delete_after, expected) in [
            ("no time to bring it back", 31, 0, between),
            ("it can be brought back", 31, 2, Vec::new()),
        ] {
            let kept = [marked.clone(), backup(begins_window, false), backup(1, false)];
            let delete_after = Duration::from_hours(24 * delete_after);
            let retention = Retention { delete_after, ..retention(1, 0, 0, 30) };
            let decided = decide(&kept, &all, &retention, None, now());
            assert!(decided[0].keep.is_empty() && !decided[1].keep.is_empty(), "{case}");
            let spare = Needs::new(&kept, &all, &retention, None, now()).spare_wal();
            let spare = spare.iter().map(|it| u64::from_str_radix(&it.file[16..], 16).unwrap());
            assert_eq!(spare.collect::<Vec<_>>(), expected, "{case}");
        }
    }

    #[test]
    fn pieces_go_with_the_wal_around_them() {
        let piece = |number: u64, stored_at| Piece {
            segment: Segment { timeline: 1, number },
            from: 0,
            to: 100,
            hash: String::new(),
            name: String::new(),
            object_bytes: 1,
            stored_at,
        };
        let anchor = backup(40, false);
        let (before, after) = (segment(40) - 9, segment(40) + 9);
        let mut map = map(&[], day(100));
        for (number, stored_at) in [(before, day(100)), (before + 1, day(3)), (after, day(100))] {
            let piece = piece(number, stored_at);
            map.pieces.insert(piece.segment, vec![piece]);
        }
        let kept = [anchor, backup(1, false)];
        let retention = retention(1, 0, 0, 30);
        let spare = Needs::new(&kept, &map, &retention, None, now()).spare_pieces();
        let numbers: Vec<u64> = spare.iter().map(|piece| piece.segment.number).collect();
        assert_eq!(numbers, [before], "old, and before everything that is kept");
        assert!(Needs::new(&[], &map, &retention, None, now()).spare_pieces().is_empty());
    }

    #[test]
    fn partial_files_labels_and_gaps_go_with_the_wal_they_belong_to() {
        let monthly = backup(80, false);
        let anchor = backup(40, false);
        let kept = [monthly.clone(), anchor, backup(1, false)];
        let old = day(100);
        for (case, timeline, number, stored_at, goes) in [
            ("before everything", 1, segment(80) - 5, old, true),
            ("of a kept backup's own WAL", 1, segment(80), old, false),
            ("between two kept backups", 1, segment(60), old, true),
            ("right before the window's backup", 1, segment(40) - 1, old, true),
            ("at the window's backup", 1, segment(40), old, false),
            ("in the window", 1, segment(20), old, false),
            ("of a timeline that branched later", 2, segment(60), old, false),
            ("young: what it goes with may be needed to understand", 1, segment(60), day(3), false),
        ] {
            for what in [What::Partial, What::BackupLabel, What::Gap] {
                let segment = Segment { timeline, number };
                let name = String::new();
                let remnants = [Remnant { what, segment, name, object_bytes: 1, stored_at }];
                let retention = retention(1, 0, 0, 30);
                let map = map(&[], now());
                let needs = Needs::new(&kept, &map, &retention, None, now());
                let spare = needs.spare_remnants(&remnants);
                assert_eq!(!spare.is_empty(), goes, "{case}, {what:?}");
                let nothing_kept = Needs::new(&[], &map, &retention, None, now());
                let nothing_kept = nothing_kept.spare_remnants(&remnants);
                assert!(nothing_kept.is_empty(), "{case}, {what:?}: without a backup");
            }
        }
    }
}
