//! `list --wal` and `verify --wal`: what WAL there is, and whether it can be read.

use anyhow::{Context as _, bail};
use chrono::Utc;
use futures_util::{StreamExt, stream};
use serde_json::{Value, json};
use shared::pg::wal::Segment;
use shared::table::Table;
use shared::telemetry::chain;
use tokio_postgres::types::PgLsn;

use crate::catalog::Catalog;
use crate::commands::{none_of, print_json};
use crate::listing::heading;
use crate::manifest::{BackupId, Commit};
use crate::progress::Progress;
use crate::quantities::{bytes, time};
use crate::recovery::Window;
use crate::repository::{Place, RepositoryError};
use crate::retention::{Needs, Retention, as_of};
use crate::wal::piece::{self, Piece};
use crate::wal::ranges::{Next, Range, ranges};
use crate::wal::{self, Then, WalError, WalMap, WalObject, newest, remnant};

/// Objects that are read at once.
const AT_ONCE: usize = 4;
/// What is said of an object whose name is none of WAL, as far as this cluster's segments go.
const NOT_WAL: &str = "has no name of WAL with this cluster's wal_segment_size";

/// The WAL of a place.
struct Stored {
    map: WalMap,
    ranges: Vec<Range>,
    /// The backups that lack WAL of their own, and which.
    lacking: Vec<(BackupId, String)>,
}

async fn read(place: &Place, retention: &Retention) -> Result<Stored, WalError> {
    let catalog = Catalog::read(place).await?;
    let segment_bytes = match catalog.backups.last() {
        Some(newest) => newest.wal_segment_bytes,
        None => newest::segment_bytes(place).await?,
    };
    let mut map = WalMap::read(place, segment_bytes).await?;
    let lacks = |backup: &Commit| Some((backup.backup_id.clone(), lacks(backup, &map)?));
    let lacking = catalog.backups.iter().filter_map(lacks).collect();
    // Nobody knows what a backup needs whose commit object is damaged.
    let backups = if catalog.unreadable.is_empty() { catalog.backups } else { Vec::new() };
    map.strange.extend(remnant::strange(place, segment_bytes).await?);
    let as_of = as_of(&backups, &map, None, Utc::now());
    let needs = Needs::new(&backups, &map, retention, None, as_of);
    let ranges = ranges(&map, &wal::gaps(place).await?, |segment| !needs.has(segment));
    Ok(Stored { map, ranges, lacking })
}

/// What no recovery goes across.
#[derive(Debug)]
pub struct Broken {
    /// Segments with two contents.
    pub conflicts: Vec<String>,
    /// Where WAL is missing.
    pub gaps: Vec<String>,
}

/// What no recovery goes across in the WAL of a place.
///
/// # Errors
///
/// The repository could not be read.
pub async fn broken(place: &Place, retention: &Retention) -> Result<Broken, WalError> {
    let Stored { map, ranges, .. } = read(place, retention).await?;
    let gaps = ranges.iter().filter(|range| is_gap(range));
    let gaps = gaps.map(|it| {
        format!("after {} of timeline {}: {}", it.until_lsn, it.timeline, then(&it.next))
    });
    let conflicts = conflicting(&map).map(|(_, conflict)| conflict.to_string());
    Ok(Broken { conflicts: conflicts.collect(), gaps: gaps.collect() })
}

fn is_gap(range: &Range) -> bool {
    matches!(range.next, Next::Gap { .. } | Next::Unended { .. })
}

/// What a backup lacks of its own WAL, if it does: it may be the last that is stored, and no gap then.
fn lacks(backup: &Commit, map: &WalMap) -> Option<String> {
    let followed = map.followed(backup, map.own(None).ok().flatten());
    let window = Window::of(backup, map, followed);
    let reach = window.reach.as_ref().filter(|_| !window.is_consistent())?;
    Some(match &reach.then {
        Then::Conflict { segment } => {
            format!("cannot be restored: it needs WAL segment {segment}, which has two contents")
        }
        Then::End | Then::Gap { .. } => {
            let (from, until) = (reach.until_lsn, backup.end_lsn);
            format!(
                "cannot be restored: it needs WAL until {until}, and what is after {from} is missing"
            )
        }
    })
}

/// Lists the stored WAL of some places as ranges without a gap; fails if there is a gap, or a backup
/// lacks WAL. What nothing needs by the retention may be missing.
///
/// # Errors
///
/// Something is missing; or the repository could not be read.
pub async fn list(places: &[Place], retention: &Retention, as_json: bool) -> anyhow::Result<()> {
    let (mut values, mut texts, mut gaps, mut strange) = (Vec::new(), Vec::new(), 0, Vec::new());
    let mut lost = Vec::new();
    for place in places {
        let Stored { map, ranges, lacking } = read(place, retention).await?;
        lost.extend(lacking.into_iter().map(|(id, what)| format!("backup {id} {what}")));
        lost.extend(conflicting(&map).map(|(_, conflict)| conflict.to_string()));
        strange.extend(map.strange.iter().map(|name| place.key(name)));
        gaps += ranges.iter().filter(|range| is_gap(range)).count();
        values.extend(ranges.iter().map(|range| to_json(place, range)));
        if !ranges.is_empty() {
            let heading = heading(place.group, place.system_identifier);
            texts.push(format!("{heading}\n{}", to_table(&ranges)));
        }
    }
    let text = if texts.is_empty() { "no WAL is stored\n".to_owned() } else { texts.join("\n") };
    print(as_json, &values, text)?;
    let gaps = (gaps > 0)
        .then(|| format!("{gaps} gap{} in the WAL: no recovery goes across one", plural(gaps)));
    let strange = strange.first().map(|first| {
        let count = strange.len();
        format!("{count} object{} among the WAL that {NOT_WAL}: {first}", plural(count))
    });
    none_of(&gaps.into_iter().chain(lost).chain(strange).collect::<Vec<_>>())
}

/// The ranges of one database cluster, and below each what is after it.
fn to_table(ranges: &[Range]) -> Table {
    let header = ["TIMELINE", "FROM", "UNTIL", "SIZE", "STORED FROM", "STORED UNTIL"];
    let mut table = Table::new(&header).numbers(&[0, 1, 2, 3]);
    for range in ranges {
        table.row([
            range.timeline.to_string(),
            range.from_lsn.to_string(),
            range.until_lsn.to_string(),
            bytes(range.object_bytes),
            range.from.map_or("-".to_owned(), time),
            range.until.map_or("-".to_owned(), time),
        ]);
        match &range.next {
            Next::Newest => {}
            Next::Timelines(branches) => {
                for (timeline, switch_lsn) in branches {
                    table.note(branched(*timeline, *switch_lsn));
                }
            }
            next => table.note(then(next)),
        }
    }
    table
}

fn then(next: &Next) -> String {
    match next {
        Next::Newest => "newest".to_owned(),
        Next::Timelines(branches) => {
            let branches = branches.iter().map(|(timeline, at)| branched(*timeline, *at));
            branches.collect::<Vec<_>>().join(", ")
        }
        Next::Unended { timeline, switch_lsn } => format!(
            "GAP: {}, and what is before that is not stored yet, or lost",
            branched(*timeline, *switch_lsn)
        ),
        Next::Gap { until_lsn, reason: Some(reason) } => format!("GAP until {until_lsn}: {reason}"),
        Next::Gap { until_lsn, reason: None } => format!("GAP until {until_lsn}"),
        Next::Conflict { segment, .. } => {
            format!("CONFLICT: WAL segment {segment} is there with two contents")
        }
        Next::Expired { until_lsn } => {
            format!("nothing until {until_lsn}: removed by the retention, no backup needs it")
        }
    }
}

fn branched(timeline: u32, switch_lsn: PgLsn) -> String {
    format!("timeline {timeline} branched off at {switch_lsn}")
}

fn to_json(place: &Place, range: &Range) -> Value {
    json!({
        "group": place.group,
        "system_identifier": place.system_identifier.to_string(),
        "timeline": range.timeline,
        "from_lsn": range.from_lsn.to_string(),
        "until_lsn": range.until_lsn.to_string(),
        "segments": range.segments,
        "object_bytes": range.object_bytes,
        "stored_from": range.from,
        "stored_until": range.until,
        "then": match &range.next {
            Next::Newest => json!({ "reason": "newest" }),
            Next::Timelines(branches) => {
                let branch = |(timeline, at): &(u32, PgLsn)| {
                    json!({ "timeline": timeline, "switch_lsn": at.to_string() })
                };
                let timelines: Vec<_> = branches.iter().map(branch).collect();
                json!({ "reason": "timelines", "timelines": timelines })
            }
            Next::Unended { timeline, switch_lsn } => json!({
                "reason": "unended", "timeline": timeline, "switch_lsn": switch_lsn.to_string(),
            }),
            Next::Gap { until_lsn, reason } => json!({
                "reason": "gap", "until_lsn": until_lsn.to_string(), "recorded": reason,
            }),
            Next::Conflict { segment, until_lsn } => json!({
                "reason": "conflict", "segment": segment, "until_lsn": until_lsn.to_string(),
            }),
            Next::Expired { until_lsn } => json!({
                "reason": "expired", "until_lsn": until_lsn.to_string(),
            }),
        },
    })
}

/// One object of WAL.
enum Object<'a> {
    Segment(&'a WalObject),
    Piece(&'a Piece),
}

impl Object<'_> {
    /// Reads it back; returns its name too. A piece that was replaced meanwhile is good.
    async fn check(self, place: &Place, segment_bytes: u64) -> (String, Result<(), WalError>) {
        match self {
            Self::Segment(segment) => {
                (segment.name.clone(), wal::read(place, segment, |_| Ok(())).await)
            }
            Self::Piece(piece) => {
                let read = piece::read(place, piece).await.map(drop);
                let read = match read {
                    Err(error) if error.is_gone() => {
                        match piece::is_replaced(place, piece, segment_bytes).await {
                            Ok(true) => Ok(()),
                            Ok(false) => Err(error),
                            Err(error) => Err(error.into()),
                        }
                    }
                    read => read,
                };
                (piece.name.clone(), read)
            }
        }
    }
}

/// Reads all stored WAL back; fails if any of it is damaged, ambiguous or missing.
///
/// # Errors
///
/// Something is wrong; or the repository could not be read.
pub async fn verify(
    places: &[Place],
    retention: &Retention,
    as_json: bool,
    progress: &Progress,
) -> anyhow::Result<()> {
    let mut table = Table::new(&["GROUP", "WHAT IS WRONG"]);
    let (mut values, mut read_back, mut bad) = (Vec::new(), 0, 0);
    for place in places {
        let Stored { mut map, ranges, lacking } = read(place, retention).await?;
        for segment in map.superseded().collect::<Vec<_>>() {
            match map.compare_one(place, segment).await {
                Err(WalError::Repository(error)) if error.is_transient() => {
                    return Err(error).context("read the repository");
                }
                // One that cannot be read is named below.
                Ok(()) | Err(_) => {}
            }
        }
        for (segment, conflict) in conflicting(&map) {
            let file = segment.name(map.segment_bytes);
            complain(&mut table, &mut values, place, &file, &conflict.to_string());
            bad += 1;
        }
        let segments = map.segments.values().flat_map(|timeline| timeline.values());
        for range in ranges.iter().filter(|range| is_gap(range)) {
            let after = format!("timeline {} after {}", range.timeline, range.until_lsn);
            complain(&mut table, &mut values, place, &after, &then(&range.next));
            bad += 1;
        }
        for (backup_id, what) in &lacking {
            complain(&mut table, &mut values, place, backup_id.as_str(), what);
            bad += 1;
        }
        for name in &map.strange {
            complain(&mut table, &mut values, place, name, NOT_WAL);
            bad += 1;
        }
        for (file, conflict) in conflicts(place, &map).await {
            complain(&mut table, &mut values, place, &file, &chain(&conflict).to_string());
            bad += 1;
        }
        let objects: Vec<Object<'_>> = segments
            .flatten()
            .chain(&map.unopened)
            .map(Object::Segment)
            .chain(map.pieces.values().flatten().map(Object::Piece))
            .collect();
        progress.begin("reading WAL", objects.len() as u64 * map.segment_bytes);
        read_back += objects.len();
        let checks = objects.into_iter().map(|object| object.check(place, map.segment_bytes));
        let mut checks = stream::iter(checks).buffer_unordered(AT_ONCE);
        while let Some((name, result)) = checks.next().await {
            progress.add(map.segment_bytes);
            match result {
                Ok(()) => {}
                Err(WalError::Repository(RepositoryError::Store(error)))
                    if error.is_transient() =>
                {
                    return Err(error).context("read the repository");
                }
                Err(error) => {
                    complain(&mut table, &mut values, place, &name, &chain(&error).to_string());
                    bad += 1;
                }
            }
        }
    }
    if bad > 0 || read_back > 0 {
        let all_good = || format!("{read_back} WAL objects read back, all good\n");
        let text = if table.is_empty() { all_good() } else { table.to_string() };
        print(as_json, &values, text)?;
    }
    if bad > 0 {
        bail!("{bad} problem{} in {read_back} WAL objects", plural(bad));
    }
    if read_back == 0 {
        bail!("no WAL is stored there: nothing was verified");
    }
    Ok(())
}

/// Segments with two contents, as far as they were compared.
fn conflicting(map: &WalMap) -> impl Iterator<Item = (Segment, WalError)> {
    map.conflicts().map(|(segment, found)| {
        let name = segment.name(map.segment_bytes);
        (segment, WalError::Conflict { name, found })
    })
}

/// Segments of which pieces overlap and differ. What else there may be to pieces is found, and named,
/// when each is read.
async fn conflicts(place: &Place, map: &WalMap) -> Vec<(String, WalError)> {
    let mut found = Vec::new();
    for (segment, pieces) in &map.pieces {
        let cover = piece::cover(pieces);
        let stitched = piece::stitch(place, *segment, map.segment_bytes, &cover).await;
        if let Err(conflict @ WalError::Conflict { .. }) = stitched {
            found.push((segment.name(map.segment_bytes), conflict));
        }
    }
    found
}

fn complain(table: &mut Table, values: &mut Vec<Value>, place: &Place, object: &str, what: &str) {
    values.push(json!({ "group": place.group, "object": object, "problem": what }));
    let named = if what.contains(object) { what.to_owned() } else { format!("{object}: {what}") };
    table.row([place.group.to_string(), named]);
}

fn print(as_json: bool, values: &[Value], text: String) -> anyhow::Result<()> {
    if as_json { print_json(&json!(values)) } else { shared::cli::print(text) }
}

fn plural(count: usize) -> &'static str {
    if count == 1 { "" } else { "s" }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recovery::tests::{backup, map};

    /// A backup that starts in segment 10 needs two segments.
    #[test]
    fn a_backup_that_lacks_wal_of_its_own_is_named_with_it() {
        let needs = "cannot be restored: it needs WAL until 0/C000000, and what is after";
        for (case, numbers, expected) in [
            ("all is there", vec![10, 11], None),
            ("the last is missing, and no gap then", vec![10], Some("0/B000000")),
            ("the first", vec![11, 12], Some("0/A000000")),
            ("all", vec![], Some("0/A000000")),
        ] {
            let found = lacks(&backup(1, 10, false), &map(&[(1, numbers)], &[]));
            let expected = expected.map(|from| format!("{needs} {from} is missing"));
            assert_eq!(found, expected, "{case}");
        }
    }
}
