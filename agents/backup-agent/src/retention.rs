//! Decides what may go: base backups by grandfather, father and son, and the WAL that no kept
//! backup needs. Pure.

use std::collections::BTreeSet;
use std::time::Duration;

use chrono::{DateTime, Datelike, TimeDelta, Utc};
use serde::Deserialize;
use shared::config::Problems;
use shared::pg::wal::segment_number;

use crate::manifest::{BackupId, Commit};
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
    /// Every moment this recent stays reachable.
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
        if TimeDelta::from_std(self.wal).is_err() {
            problems.add("wal", "is too long");
        }
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

/// Decides for each backup, oldest first.
///
/// A suspect backup fills nobody's place: it stays for a look while it is as young as the WAL,
/// and as long as there is no other.
pub fn decide(backups: &[Commit], retention: &Retention, now: DateTime<Utc>) -> Vec<Decision> {
    let window_start = window_start(retention, now);
    let mut oldest_first: Vec<&Commit> = backups.iter().collect();
    oldest_first.sort_by_key(|backup| backup.finished_at);
    let good: Vec<&Commit> =
        oldest_first.iter().copied().filter(|backup| backup.suspect.is_none()).collect();

    let daily = newest_of_each(&good, retention.daily, |at| (at.year(), at.ordinal()));
    let weekly =
        newest_of_each(&good, retention.weekly, |at| (at.iso_week().year(), at.iso_week().week()));
    let monthly = newest_of_each(&good, retention.monthly, |at| (at.year(), at.month()));
    let newest = good.last().map(|backup| &backup.backup_id);
    let anchor = anchor(&good, window_start).map(|backup| &backup.backup_id);

    let decide = |backup: &&Commit| {
        let id = &backup.backup_id;
        let young = backup.finished_at > window_start;
        let reasons = [
            (newest == Some(id), "newest"),
            (anchor == Some(id), "start of the WAL window"),
            (good.is_empty(), "nothing better than suspect backups"),
            (backup.suspect.is_some() && young, "suspect, kept for a look"),
            (daily.contains(id), "daily"),
            (weekly.contains(id), "weekly"),
            (monthly.contains(id), "monthly"),
        ];
        let keep = reasons.iter().filter(|(holds, _)| *holds).map(|(_, reason)| *reason).collect();
        Decision { backup_id: id.clone(), keep }
    };
    oldest_first.iter().map(decide).collect()
}

/// Returns the WAL that no kept backup needs, neither to become consistent nor to reach a moment
/// in the window. Without a backup to start from, nothing may go.
pub fn spare_wal<'a>(
    kept: &[Commit],
    wal: &'a WalMap,
    retention: &Retention,
    now: DateTime<Utc>,
) -> Vec<&'a WalObject> {
    let window_start = window_start(retention, now);
    let mut oldest_first: Vec<&Commit> = kept.iter().collect();
    oldest_first.sort_by_key(|backup| backup.finished_at);
    let good: Vec<&Commit> =
        oldest_first.iter().copied().filter(|backup| backup.suspect.is_none()).collect();
    // Everything from the start of this backup on is needed, on every timeline.
    let Some(anchor) = anchor(&good, window_start).or(good.first().copied()) else {
        return Vec::new();
    };
    let floor = segment_number(anchor.start_lsn, wal.segment_bytes);
    let is_needed = |timeline: u32, number: u64| {
        let own =
            |backup: &&Commit| backup.timeline == timeline && backup.segments().contains(&number);
        number >= floor || kept.iter().any(|backup| own(&backup))
    };
    let all = wal.segments.iter().flat_map(|(timeline, segments)| {
        segments.iter().flat_map(move |(number, objects)| {
            objects.iter().map(move |object| (*timeline, *number, object))
        })
    });
    all.filter(|(timeline, number, object)| {
        object.stored_at < window_start && !is_needed(*timeline, *number)
    })
    .map(|(_, _, object)| object)
    .collect()
}

/// The newest backup that was complete before the window: it serves the window's oldest moment.
fn anchor<'a>(good: &[&'a Commit], window_start: DateTime<Utc>) -> Option<&'a Commit> {
    good.iter().rev().find(|backup| backup.finished_at <= window_start).copied()
}

fn window_start(retention: &Retention, now: DateTime<Utc>) -> DateTime<Utc> {
    let window = TimeDelta::from_std(retention.wal).unwrap_or(TimeDelta::MAX);
    now.checked_sub_signed(window).unwrap_or(DateTime::<Utc>::MIN_UTC)
}

/// The newest backup of each of the newest `count` periods that have one.
fn newest_of_each<P: PartialEq>(
    oldest_first: &[&Commit],
    count: usize,
    period: impl Fn(DateTime<Utc>) -> P,
) -> BTreeSet<BackupId> {
    let mut kept = BTreeSet::new();
    let mut last = None;
    for backup in oldest_first.iter().rev() {
        let this = period(backup.finished_at);
        if last.as_ref() == Some(&this) {
            continue;
        }
        if kept.len() == count {
            break;
        }
        last = Some(this);
        kept.insert(backup.backup_id.clone());
    }
    kept
}
