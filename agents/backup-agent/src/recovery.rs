//! Which backup a recovery starts from, and whether its target can be reached. Pure.

use std::fmt;

use chrono::{DateTime, SecondsFormat, TimeDelta, Utc};
use thiserror::Error;
use tokio_postgres::types::PgLsn;

use crate::manifest::{BackupId, Commit};
use crate::wal::{Moment, Reach, Rivals, Then, WalMap};

/// How far the clocks of store, server and agent may be apart before a time counts as beyond the
/// newest WAL.
const CLOCK_TOLERANCE: TimeDelta = TimeDelta::seconds(60);

/// Where a recovery is to stop. The words are PostgreSQL's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// The end of the WAL.
    End,
    /// As soon as the backup is consistent.
    Immediate,
    /// The last commit at or before a time.
    Time(DateTime<Utc>),
    /// A position, inclusive.
    Lsn(PgLsn),
    /// A restore point made by `pg_create_restore_point()`.
    Name(String),
    /// The commit of a transaction.
    Xid(u64),
}

impl Target {
    /// Whether a recovery from another backup than the chosen one could end elsewhere, and [`choose`]
    /// might have taken that one. The end, a position and a time are the same from wherever they are
    /// reached.
    pub fn depends_on(&self, other: &BackupId, chosen: &BackupId) -> bool {
        match self {
            Self::Immediate => other > chosen,
            // The first of that name or number counts.
            Self::Name(_) | Self::Xid(_) => other < chosen,
            Self::End | Self::Time(_) | Self::Lsn(_) => false,
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::End => f.write_str("the end of the WAL"),
            Self::Immediate => f.write_str("the end of the backup"),
            Self::Time(at) => write!(f, "time {}", at.to_rfc3339_opts(SecondsFormat::AutoSi, true)),
            Self::Lsn(lsn) => write!(f, "LSN {lsn}"),
            Self::Name(name) => write!(f, "restore point {name:?}"),
            Self::Xid(xid) => write!(f, "transaction {xid}"),
        }
    }
}

/// Which timeline a recovery follows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TargetTimeline {
    /// The cluster's own; from a backup that was asked for and does not lead there, the newest that
    /// descends from it.
    #[default]
    Latest,
    /// The backup's own.
    Current,
    /// A certain one.
    Number(u32),
}

impl std::str::FromStr for TargetTimeline {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "latest" => Ok(Self::Latest),
            "current" => Ok(Self::Current),
            number => number
                .parse()
                .map(Self::Number)
                .map_err(|_| format!("{number:?} is not latest, current or a number")),
        }
    }
}

/// What one backup can be recovered to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Window {
    /// The backup.
    pub backup_id: BackupId,
    /// Whether it is suspect.
    pub suspect: bool,
    /// The earliest position.
    pub from_lsn: PgLsn,
    /// The earliest time.
    pub from: DateTime<Utc>,
    /// How far its WAL goes; `None` if the timeline asked for does not descend from it.
    pub reach: Option<Reach>,
}

impl Window {
    /// The window of a backup along a timeline.
    pub fn of(backup: &Commit, wal: &WalMap, timeline: u32) -> Self {
        Self {
            backup_id: backup.backup_id.clone(),
            suspect: backup.suspect.is_some(),
            from_lsn: backup.end_lsn,
            from: backup.reaches_from(),
            reach: wal.reach(backup, timeline),
        }
    }

    /// Whether the WAL that makes the backup consistent is there.
    pub fn is_consistent(&self) -> bool {
        self.reach.as_ref().is_some_and(|reach| reach.until_lsn >= self.from_lsn)
    }

    /// Whether a recovery can stop there, as far as the repository tells.
    fn covers(&self, target: &Target) -> bool {
        let Some(reach) = self.reach.as_ref().filter(|_| self.is_consistent()) else {
            return false;
        };
        match target {
            Target::Lsn(lsn) => self.from_lsn <= *lsn && *lsn < reach.until_lsn,
            Target::Time(at) => {
                // Beyond WAL that is missing the time may be another backup's, and what came between is lost.
                let tolerance =
                    if reach.then == Then::End { CLOCK_TOLERANCE } else { TimeDelta::zero() };
                let newest = reach.until.map(|until| until + tolerance);
                self.from <= *at && Some(*at) <= newest
            }
            // Where a name or a transaction lies in the WAL is not known; PostgreSQL stops with an
            // error if it is not found.
            Target::Immediate | Target::Name(_) | Target::Xid(_) => true,
            Target::End => self.leads_to_the_end(),
        }
    }

    /// Whether no WAL is missing from the backup to the newest.
    pub fn leads_to_the_end(&self) -> bool {
        self.reach.as_ref().is_some_and(|reach| reach.then == Then::End)
    }
}

impl fmt::Display for Window {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { backup_id, suspect, from_lsn, from, reach } = self;
        write!(f, "{backup_id}{}: ", if *suspect { " (suspect)" } else { "" })?;
        let Some(reach) = reach else {
            return f.write_str("is not on the way to the timeline asked for");
        };
        if self.is_consistent() {
            let until = reach.until.map_or("?".to_owned(), time);
            write!(
                f,
                "from {} ({from_lsn}) to {until} (before {}) on timeline {}",
                // What is shown can be given back: rounded up, and the end down.
                time(*from + (TimeDelta::milliseconds(1) - TimeDelta::nanoseconds(1))),
                reach.until_lsn,
                reach.timeline
            )?;
        } else {
            f.write_str("cannot be restored, its own WAL is incomplete")?;
        }
        match &reach.then {
            Then::End => Ok(()),
            Then::Gap { segment } => write!(f, "; then WAL segment {segment} is missing"),
            Then::Conflict { segment } => {
                write!(f, "; then WAL segment {segment} is there with two contents")
            }
        }
    }
}

/// What a recovery starts from and follows.
#[derive(Clone, Debug, PartialEq)]
pub struct Choice<'a> {
    /// The backup.
    pub backup: &'a Commit,
    /// How far its WAL goes.
    pub reach: Reach,
}

/// Why a target is refused.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum Unreachable {
    /// The backup asked for is not listed.
    #[error("there is no backup {0}; `backup-agent list` shows them")]
    Unknown(BackupId),
    /// No backup leads there.
    #[error("{target} cannot be reached. What can be reached:\n{}", lines(.windows))]
    Target {
        /// What was asked for.
        target: String,
        /// What there is.
        windows: Vec<Window>,
    },
    /// Only suspect backups lead there.
    #[error(
        "{target} can be reached from suspect backups alone; name one with --backup to take it:\n{}",
        lines(.windows)
    )]
    Suspect {
        /// What was asked for.
        target: String,
        /// What there is.
        windows: Vec<Window>,
    },
    /// It can be reached, but not on the cluster's own timeline.
    #[error(
        "{target} cannot be reached on timeline {own}, which is the newest. What was left when \
         it began is restored only with --target-timeline:\n{}", lines(.windows)
    )]
    LeftBehind {
        /// What was asked for.
        target: String,
        /// The cluster's own timeline.
        own: u32,
        /// What there is.
        windows: Vec<Window>,
    },
    /// The time is one of what was left behind.
    #[error(
        "{target} is after timeline {left} was left for the one that leads to timeline {own}, and before \
         that began. With --target-timeline {left} the recovery ends with what was there at that time, \
         with --target-timeline {own} without what was left behind"
    )]
    Between {
        /// What was asked for.
        target: String,
        /// The timeline that was left.
        left: u32,
        /// The one that would be followed.
        own: u32,
    },
    /// Nobody can tell which timeline is the cluster's own.
    #[error(transparent)]
    Rivals(#[from] Rivals),
}

/// Chooses the backup for a target: the newest from which it can be reached, so that the least
/// WAL is replayed. Where a restore point or a transaction lies is not known in advance, so for
/// them it is the oldest. A suspect backup is taken only by name.
///
/// What the cluster's own timeline has left, by a failover or by a restore to an earlier moment, is
/// nobody's database any more, however new the backups of it are: it too is taken only by name. A
/// target before the own timeline began is recovered to on the timeline on which it lies, so that the
/// history of what comes of it tells what happened.
///
/// # Errors
///
/// The repository proves that the target cannot be reached, or does not tell what is meant.
pub fn choose<'a>(
    backups: &'a [Commit],
    wal: &WalMap,
    target: &Target,
    timeline: TargetTimeline,
    asked: Option<&BackupId>,
) -> Result<Choice<'a>, Unreachable> {
    let considered: Vec<&Commit> = match asked {
        None => backups.iter().collect(),
        Some(id) => {
            let found = backups.iter().find(|backup| backup.backup_id == *id);
            vec![found.ok_or_else(|| Unreachable::Unknown(id.clone()))?]
        }
    };
    let own = match timeline {
        TargetTimeline::Latest => own(wal, asked.and(considered.first().copied()))?,
        TargetTimeline::Current | TargetTimeline::Number(_) => None,
    };
    let windows = considered.iter().map(|backup| window(backup, wal, target, timeline, own));
    let windows: Vec<Window> = windows.collect::<Result<_, _>>()?;
    let is_left =
        |backup: &Commit| asked.is_none() && own.is_some_and(|own| !wal.leads(backup, own));
    let covering = considered.iter().zip(&windows).filter(|(_, window)| window.covers(target));
    let mut fit = covering
        .clone()
        .filter(|(backup, _)| !is_left(backup) && (asked.is_some() || backup.suspect.is_none()));
    let chosen = match target {
        Target::Name(_) | Target::Xid(_) => {
            let is_whole = |(_, window): &(&&Commit, &Window)| window.covers(&Target::End);
            fit.clone().find(is_whole).or_else(|| fit.next())
        }
        Target::End | Target::Immediate | Target::Time(_) | Target::Lsn(_) => fit.next_back(),
    };
    if let Some((backup, Window { reach: Some(reach), .. })) = chosen {
        return Ok(Choice { backup, reach: reach.clone() });
    }
    let target = target.to_string();
    let (left, others): (Vec<_>, Vec<_>) =
        covering.map(|(backup, _)| *backup).partition(|backup| is_left(backup));
    Err(match own {
        _ if !others.is_empty() => Unreachable::Suspect { target, windows },
        Some(own) if !left.is_empty() => Unreachable::LeftBehind { target, own, windows },
        _ => Unreachable::Target { target, windows },
    })
}

/// The cluster's own timeline, as far as that makes a difference to a backup that was asked for.
fn own(wal: &WalMap, asked: Option<&Commit>) -> Result<Option<u32>, Rivals> {
    let own = wal.own(None);
    let Some(backup) = asked else { return own };
    let mut led_to = wal.candidates(None).into_iter().filter(|it| wal.leads(backup, *it));
    match (led_to.next(), led_to.next()) {
        (Some(_), Some(_)) => own,
        (only, _) => Ok(only),
    }
}

/// What a backup can be recovered to, along the timeline on which the target lies.
fn window(
    backup: &Commit,
    wal: &WalMap,
    target: &Target,
    timeline: TargetTimeline,
    own: Option<u32>,
) -> Result<Window, Unreachable> {
    let followed = match timeline {
        TargetTimeline::Current => return Ok(Window::of(backup, wal, backup.timeline)),
        TargetTimeline::Number(number) => return Ok(Window::of(backup, wal, number)),
        TargetTimeline::Latest => wal.followed(backup, own),
    };
    let window = Window::of(backup, wal, followed);
    let is_left = own.is_some_and(|own| !wal.leads(backup, own));
    let earlier = match target {
        Target::Immediate => backup.timeline,
        Target::Lsn(lsn) => wal.on_the_way(followed, *lsn),
        Target::Time(at) if !is_left && window.covers(target) => match wal.moment(followed, *at) {
            Moment::OnTheWay => followed,
            Moment::Before(earlier) => earlier,
            Moment::LeftBehind(left) => {
                let (target, own) = (target.to_string(), followed);
                return Err(Unreachable::Between { target, left, own });
            }
        },
        Target::End | Target::Time(_) | Target::Name(_) | Target::Xid(_) => followed,
    };
    // Its last WAL may be stored as the beginning of the next one alone.
    let earlier = Window::of(backup, wal, earlier);
    Ok(if earlier.covers(target) { earlier } else { window })
}

fn lines(windows: &[Window]) -> String {
    windows.iter().map(|window| format!("  {window}")).collect::<Vec<_>>().join("\n")
}

fn time(at: DateTime<Utc>) -> String {
    at.to_rfc3339_opts(SecondsFormat::Millis, true)
}

#[cfg(test)]
pub(crate) mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use shared::pg::wal::{HistoryEntry, Segment};

    use super::*;
    use crate::manifest::ObjectRecord;
    use crate::wal::WalObject;
    use crate::wal::piece::Pieces;

    const SEGMENT: u64 = 16 << 20;

    pub(crate) fn at(minute: u32) -> DateTime<Utc> {
        DateTime::from_timestamp(1_800_000_000 + i64::from(minute) * 60, 0).unwrap()
    }

    pub(crate) fn lsn(segment: u64) -> PgLsn {
        PgLsn::from(segment * SEGMENT)
    }

    /// A backup that starts in segment `first` at that minute and ends two segments later.
    pub(crate) fn backup(timeline: u32, first: u64, suspect: bool) -> Commit {
        let record = ObjectRecord { object_bytes: 1, plain_bytes: 1, salt: [0; 32] };
        let started_at = at(u32::try_from(first).unwrap());
        Commit {
            format: 1,
            backup_id: BackupId::new(started_at, timeline, lsn(first)),
            group: 0,
            system_identifier: 1,
            node: "postgres-1".to_owned(),
            from_standby: false,
            server_version_num: 170_000,
            wal_segment_bytes: SEGMENT,
            started_at,
            finished_at: at(u32::try_from(first).unwrap() + 2),
            server_finished_at: None,
            timeline,
            start_lsn: lsn(first),
            end_lsn: lsn(first + 2),
            suspect: suspect.then(|| crate::manifest::Suspicion {
                reason: String::new(),
                warnings: Vec::new(),
            }),
            archives: Vec::new(),
            chunk_bytes: 1,
            parts: Vec::new(),
            manifest: record.clone(),
            files: record,
            file_count: 0,
            previous: None,
        }
    }

    /// Segments of a timeline, each stored in the minute of its number.
    fn segments(
        timeline: u32,
        numbers: impl Iterator<Item = u64>,
    ) -> BTreeMap<u64, Vec<WalObject>> {
        let object = |number| {
            let file = Segment { timeline, number }.name(SEGMENT);
            let stored_at = at(u32::try_from(number).unwrap());
            let wal = WalObject {
                name: String::new(),
                file,
                hash: String::new(),
                object_bytes: 1,
                stored_at,
            };
            (number, vec![wal])
        };
        numbers.map(object).collect()
    }

    /// Segments by timeline, and for each timeline with a history which ones were left before it, and
    /// in which segment.
    pub(crate) fn map(timelines: &[(u32, Vec<u64>)], histories: &[(u32, &[(u32, u64)])]) -> WalMap {
        let history = |entries: &[(u32, u64)]| {
            entries
                .iter()
                .map(|(timeline, segment)| HistoryEntry {
                    timeline: *timeline,
                    switch_lsn: PgLsn::from(segment * SEGMENT + 100),
                    reason: String::new(),
                })
                .collect()
        };
        WalMap {
            segment_bytes: SEGMENT,
            segments: timelines
                .iter()
                .map(|(timeline, numbers)| {
                    (*timeline, segments(*timeline, numbers.iter().copied()))
                })
                .collect(),
            pieces: Pieces::new(),
            histories: histories.iter().map(|(timeline, it)| (*timeline, history(it))).collect(),
            history_times: BTreeMap::new(),
            followed: BTreeSet::new(),
            strange: Vec::new(),
            unopened: Vec::new(),
            different: BTreeMap::new(),
        }
    }

    /// All WAL of a timeline was stored so many minutes later than the numbers of its segments say.
    pub(crate) fn later(mut map: WalMap, timeline: u32, minutes: i64) -> WalMap {
        let segments = map.segments.get_mut(&timeline).unwrap();
        for wal in segments.values_mut().flatten() {
            wal.stored_at += TimeDelta::minutes(minutes);
        }
        map
    }

    fn chosen(
        backups: &[Commit],
        wal: &WalMap,
        target: &Target,
        timeline: TargetTimeline,
    ) -> Option<(u64, u32, u64)> {
        let choice = choose(backups, wal, target, timeline, None).ok()?;
        let segment = |lsn: PgLsn| u64::from(lsn) / SEGMENT;
        let Choice { backup, reach } = choice;
        Some((segment(backup.start_lsn), reach.timeline, segment(reach.until_lsn)))
    }

    #[test]
    fn the_newest_backup_that_leads_to_the_target_is_chosen() {
        let backups = [backup(1, 2, false), backup(1, 10, false), backup(1, 20, true)];
        let wal = map(&[(1, (2..30).collect())], &[]);
        let cases = [
            ("the end, and not from the suspect one", Target::End, Some(10)),
            ("the backup alone", Target::Immediate, Some(10)),
            ("between the two", Target::Lsn(lsn(8)), Some(2)),
            ("exactly where the first is consistent", Target::Lsn(lsn(4)), Some(2)),
            ("before the first is consistent", Target::Lsn(lsn(3)), None),
            ("after both", Target::Lsn(lsn(15)), Some(10)),
            ("the end of the WAL, where no record begins", Target::Lsn(lsn(30)), None),
            ("a byte before it", Target::Lsn((u64::from(lsn(30)) - 1).into()), Some(10)),
            ("beyond the last segment", Target::Lsn(lsn(31)), None),
            ("a time between the two", Target::Time(at(9)), Some(2)),
            ("a time after both", Target::Time(at(25)), Some(10)),
            ("a time when the last segment was stored", Target::Time(at(29)), Some(10)),
            ("a time in the tolerance", Target::Time(at(30)), Some(10)),
            ("a time after the last segment", Target::Time(at(32)), None),
            ("a time before the first backup", Target::Time(at(3)), None),
            ("a name, from the oldest", Target::Name("x".to_owned()), Some(2)),
            ("a transaction, from the oldest", Target::Xid(7), Some(2)),
        ];
        for (case, target, first) in cases {
            let found = chosen(&backups, &wal, &target, TargetTimeline::Latest);
            assert_eq!(found, first.map(|first| (first, 1, 30)), "{case}");
        }
    }

    /// The window's own first second was refused: it was shown without its fraction.
    #[test]
    fn the_ends_of_a_window_can_be_given_back_as_they_are_shown() {
        let fraction = TimeDelta::nanoseconds(837_322_004);
        let backups = [Commit { finished_at: at(4) + fraction, ..backup(1, 2, false) }];
        let wal = map(&[(1, (2..30).collect())], &[]);
        let window = Window::of(&backups[0], &wal, 1);
        let until = window.reach.clone().unwrap().until.unwrap() + fraction;
        let reach = window.reach.clone().map(|reach| Reach { until: Some(until), ..reach });
        let window = Window { reach, ..window };
        let shown = window.to_string();
        let times = shown.split([' ', ',']).filter_map(|word| word.parse::<DateTime<Utc>>().ok());
        let times: Vec<_> = times.collect();
        assert_eq!(times.len(), 2, "{shown}");
        for time in times {
            assert!(window.covers(&Target::Time(time)), "{time} of {shown}");
        }
        let asked = Target::Time(at(4) + fraction).to_string();
        assert!(asked.contains(".837322004Z"), "{asked}");
        assert!(!Target::Time(at(4)).to_string().contains('.'));
    }

    #[test]
    fn a_gap_ends_the_window_of_the_backup_before_it() {
        let backups = [backup(1, 2, false), backup(1, 10, false)];
        let wal = map(&[(1, (2..7).chain(9..20).collect())], &[]);
        let cases = [
            ("the end, from the backup after the gap", Target::End, Some((10, 1, 20))),
            ("before the gap", Target::Lsn(lsn(6)), Some((2, 1, 7))),
            ("in the gap", Target::Lsn(lsn(8)), None),
            ("a time before the gap", Target::Time(at(6)), Some((2, 1, 7))),
            ("a time in the gap", Target::Time(at(7)), None),
            (
                "a name: only where the WAL is whole",
                Target::Name("x".to_owned()),
                Some((10, 1, 20)),
            ),
        ];
        for (case, target, expected) in cases {
            let found = chosen(&backups, &wal, &target, TargetTimeline::Latest);
            assert_eq!(found, expected, "{case}");
        }
        // Timeline 2 left it after what was lost.
        let left = map(&[(1, (2..7).collect()), (2, (12..20).collect())], &[(2, &[(1, 12)])]);
        for target in [Target::End, Target::Time(at(8))] {
            let found = chosen(&backups[..1], &left, &target, TargetTimeline::Number(1));
            assert_eq!(found, None, "{target}: on the timeline that was left");
        }
        let only_first = &backups[..1];
        let refused = choose(only_first, &wal, &Target::End, TargetTimeline::Latest, None);
        let message = refused.unwrap_err().to_string();
        assert!(
            message.contains("then WAL segment 000000010000000000000007 is missing"),
            "{message}"
        );
    }

    #[test]
    fn recovery_follows_the_newest_timeline_that_descends_from_the_backup() {
        let backups = [backup(1, 2, false)];
        // Timeline 1 ends in segment 8, which only timeline 2 has whole. Timeline 3 branched off
        // timeline 1 before the backup was consistent: a recovery cannot follow it.
        let histories: &[(u32, &[(u32, u64)])] = &[(2, &[(1, 8)]), (3, &[(1, 3)])];
        let timelines = [(1, (2..8).collect()), (2, (8..12).collect()), (3, vec![3])];
        let latest = chosen(
            &backups,
            &map(&timelines[..2], histories),
            &Target::End,
            TargetTimeline::Latest,
        );
        assert_eq!(latest, Some((2, 2, 12)));
        let wal = map(&timelines, histories);
        let cases = [
            ("latest, which is another", TargetTimeline::Latest, Target::End, None),
            (
                "current ends before the switch",
                TargetTimeline::Current,
                Target::End,
                Some((2, 1, 8)),
            ),
            ("current, within", TargetTimeline::Current, Target::Lsn(lsn(6)), Some((2, 1, 8))),
            ("a number", TargetTimeline::Number(2), Target::Lsn(lsn(10)), Some((2, 2, 12))),
            ("one that branched off too early", TargetTimeline::Number(3), Target::End, None),
            ("one that is unknown", TargetTimeline::Number(9), Target::End, None),
        ];
        for (case, timeline, target, expected) in cases {
            assert_eq!(chosen(&backups, &wal, &target, timeline), expected, "{case}");
        }
    }

    /// The oldest of three backups was restored in place of the server: its timeline is what lives,
    /// and the newest backup's WAL is what was given up.
    #[test]
    fn a_timeline_that_was_left_is_never_chosen_unasked() {
        let backups = [backup(1, 2, false), backup(1, 10, false), backup(1, 20, false)];
        let histories: &[(u32, &[(u32, u64)])] = &[(2, &[(1, 7)])];
        let wal = later(map(&[(1, (2..30).collect()), (2, (7..9).collect())], histories), 2, 40);
        let (latest, first) = (TargetTimeline::Latest, TargetTimeline::Number(1));
        let (live, before) = (Some((2, 2, 9)), Some((2, 1, 30)));
        let cases = [
            ("the end", Target::End, latest, live),
            ("a backup alone, which ends before the branch", Target::Immediate, latest, before),
            ("a position before the branch", Target::Lsn(lsn(6)), latest, before),
            ("a position of both", Target::Lsn(lsn(8)), latest, live),
            ("a position of what was left", Target::Lsn(lsn(25)), latest, None),
            ("a time before the branch", Target::Time(at(6)), latest, before),
            ("a time of what was left", Target::Time(at(25)), latest, None),
            ("a time between the two", Target::Time(at(40)), latest, None),
            ("a time of what lives", Target::Time(at(47)), latest, live),
            ("a name", Target::Name("x".to_owned()), latest, live),
            ("the end of what was left", Target::End, first, Some((20, 1, 30))),
            ("a time of what was left, by number", Target::Time(at(25)), first, Some((20, 1, 30))),
        ];
        for (case, target, timeline, expected) in cases {
            assert_eq!(chosen(&backups, &wal, &target, timeline), expected, "{case}");
        }
        let refused = choose(&backups, &wal, &Target::Time(at(25)), latest, None).unwrap_err();
        assert!(matches!(refused, Unreachable::Between { left: 1, own: 2, .. }), "{refused}");
        let asked = Some(&backups[2].backup_id);
        let by_name = choose(&backups, &wal, &Target::End, latest, asked).unwrap();
        assert_eq!(by_name.reach.timeline, 1);

        // As soon as it was promoted there is a history, and no WAL.
        let promoted = map(&[(1, (2..30).collect())], histories);
        let end = chosen(&backups, &promoted, &Target::End, latest);
        assert_eq!(end, Some((20, 1, 30)));
    }

    /// A copy was promoted beside its server, and thrown away.
    #[test]
    fn where_two_timelines_may_be_the_database_one_has_to_be_named() {
        let backups = [backup(1, 2, false), backup(1, 10, false)];
        let wal = map(&[(1, (2..30).collect()), (2, (7..9).collect())], &[(2, &[(1, 7)])]);
        let latest = TargetTimeline::Latest;
        for target in [Target::End, Target::Immediate, Target::Lsn(lsn(6))] {
            let refused = choose(&backups, &wal, &target, latest, None);
            let rivals = Rivals { newest: 2, other: 1 };
            assert_eq!(refused, Err(Unreachable::Rivals(rivals)), "{target}");
        }
        let asked = |index: usize| {
            let asked = Some(&backups[index].backup_id);
            choose(&backups, &wal, &Target::End, latest, asked).map(|it| it.reach.timeline)
        };
        assert!(asked(0).is_err(), "both go on from the first");
        assert_eq!(asked(1), Ok(1), "only the server's own");
        for (timeline, expected) in [(1, Some((10, 1, 30))), (2, Some((2, 2, 9)))] {
            let timeline = TargetTimeline::Number(timeline);
            assert_eq!(chosen(&backups, &wal, &Target::End, timeline), expected);
        }
    }

    /// A standby that lacked the end of the only backup was promoted.
    #[test]
    fn a_failover_before_the_end_of_the_only_backup_leaves_nothing_to_choose() {
        let backups = [backup(1, 10, false)];
        let wal = map(&[(1, (10..15).collect()), (2, (11..14).collect())], &[(2, &[(1, 11)])]);
        let wal = later(wal, 2, 10);
        for target in [Target::End, Target::Immediate, Target::Lsn(lsn(13))] {
            let refused = choose(&backups, &wal, &target, TargetTimeline::Latest, None);
            let message = refused.unwrap_err().to_string();
            assert!(message.contains("--target-timeline"), "{message}");
            assert!(message.contains("timeline 2, which is the newest"), "{message}");
            assert!(message.contains("on timeline 1"), "{message}");
        }
    }

    #[test]
    fn a_backup_that_cannot_be_read_matters_where_the_outcome_may_differ() {
        let [old, new] = [2, 20].map(|first| backup(1, first, false).backup_id);
        let name = || Target::Name("x".to_owned());
        for (case, target, other, chosen, expected) in [
            ("the newest backup is not the newest", Target::Immediate, &new, &old, true),
            ("an older one is nobody's choice", Target::Immediate, &old, &new, false),
            ("an earlier place of that name", name(), &old, &new, true),
            ("the oldest is chosen for a name", name(), &new, &old, false),
            ("a transaction", Target::Xid(7), &old, &new, true),
            ("the end is the end", Target::End, &new, &old, false),
            ("a position", Target::Lsn(lsn(30)), &new, &old, false),
            ("a time", Target::Time(at(30)), &new, &old, false),
        ] {
            assert_eq!(target.depends_on(other, chosen), expected, "{case}");
        }
    }

    #[test]
    fn a_segment_with_two_contents_ends_the_window() {
        let backups = [backup(1, 2, false)];
        let mut wal = map(&[(1, (2..10).collect())], &[]);
        let twice = wal.segments.get_mut(&1).unwrap().get_mut(&6).unwrap();
        twice.push(twice[0].clone());
        assert_eq!(chosen(&backups, &wal, &Target::End, TargetTimeline::Latest), None);
        let before = chosen(&backups, &wal, &Target::Lsn(lsn(5)), TargetTimeline::Latest);
        assert_eq!(before, Some((2, 1, 6)));
    }

    /// The primary's clock was ahead of the agent's: a commit at minute 21 by it is in the second backup.
    #[test]
    fn a_backup_is_no_start_for_a_time_at_which_it_was_not_complete_by_the_servers_clock() {
        let later = Commit { server_finished_at: Some(at(22)), ..backup(1, 10, false) };
        let backups = [backup(1, 2, false), later];
        let wal = map(&[(1, (2..30).collect())], &[]);
        for (minute, expected) in [(13, 2), (21, 2), (22, 10)] {
            let target = Target::Time(at(minute));
            let found = chosen(&backups, &wal, &target, TargetTimeline::Latest);
            assert_eq!(found.map(|(start, ..)| start), Some(expected), "{minute}");
        }
        let earlier = Commit { server_finished_at: Some(at(1)), ..backup(1, 10, false) };
        assert_eq!(earlier.reaches_from(), earlier.finished_at);
    }

    #[test]
    fn without_its_own_wal_a_backup_is_no_start() {
        let backups = [backup(1, 2, false)];
        let wal = map(&[(1, vec![2])], &[]);
        assert_eq!(chosen(&backups, &wal, &Target::Immediate, TargetTimeline::Latest), None);
    }

    #[test]
    fn a_suspect_backup_is_taken_when_it_is_named() {
        let backups = [backup(1, 2, true)];
        let wal = map(&[(1, (2..9).collect())], &[]);
        let latest = TargetTimeline::Latest;
        let refused = choose(&backups, &wal, &Target::End, latest, None).unwrap_err().to_string();
        assert!(refused.contains("--backup"), "{refused}");
        let id = backups[0].backup_id.clone();
        assert!(choose(&backups, &wal, &Target::End, latest, Some(&id)).is_ok());
    }
}
