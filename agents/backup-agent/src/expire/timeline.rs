//! Removes what is stored of a timeline that is not the database's: `expire --timeline`.
//!
//! The history goes last. As long as anything of the timeline is there it is known for what it is: the
//! primary's WAL is refused still, and so is another timeline of that number. The oldest WAL goes first, so
//! that a recovery to the timeline ends with an error and not before its time.

use std::collections::BTreeSet;

use chrono::{DateTime, Utc};
use shared::pg::wal::{HistoryEntry, Segment, segment_number};
use shared::store::{ObjectInfo, StoreErrorKind};
use thiserror::Error;
use tokio_postgres::types::PgLsn;
use tracing::info;

use super::{Spare, delete, delete_marked, mark};
use crate::catalog::Catalog;
use crate::clocks::stored_now;
use crate::manifest::BackupId;
use crate::repository::{Place, RepositoryError};
use crate::rival::{Asked, Line, Stays, may_go};
use crate::wal::{WalError, WalMap, followed};

/// Why a timeline is not removed, or not all of it.
#[derive(Debug, Error)]
pub enum RemoveError {
    /// It is not there.
    #[error("nothing of it is stored in {place}; `backup-agent list --wal` shows what is")]
    Nothing {
        /// The place in the repository.
        place: String,
    },
    /// It must not go.
    #[error(transparent)]
    Stays(#[from] Stays),
    /// The store keeps some of it.
    #[error(
        "the store does not let {count} objects of it be deleted, so its history stays too. Once it does, \
         do this again"
    )]
    Kept {
        /// How many objects.
        count: usize,
    },
    /// What is stored could not be looked at.
    #[error(transparent)]
    Wal(#[from] WalError),
    /// The repository failed.
    #[error(transparent)]
    Repository(#[from] RepositoryError),
}

/// What is stored of a timeline.
#[derive(Debug)]
pub struct Removal {
    timeline: u32,
    /// The backups that were taken on it, or begun.
    backups: Vec<BackupId>,
    /// Of those, the ones that are listed.
    listed: Vec<BackupId>,
    /// Backups that one of another timeline names as its predecessor.
    named: BTreeSet<BackupId>,
    /// Everything else, in the order in which it goes.
    objects: Vec<ObjectInfo>,
    /// Where it begins, if any WAL of it is stored.
    pub from_lsn: Option<PgLsn>,
    /// Where it ends.
    pub until_lsn: Option<PgLsn>,
    /// When the first of it was stored, by the store's clock.
    pub first_stored_at: DateTime<Utc>,
    /// When the last of it was stored, by the store's clock.
    pub last_stored_at: DateTime<Utc>,
    stored: WalMap,
}

impl Removal {
    /// Looks at what is stored of a timeline. Changes nothing.
    ///
    /// # Errors
    ///
    /// [`RemoveError::Nothing`]; or the repository could not be read.
    pub async fn read(
        place: &Place,
        segment_bytes: u64,
        line: Line<'_>,
        timeline: u32,
    ) -> Result<Self, RemoveError> {
        let stored = WalMap::read(place, segment_bytes).await?;
        let catalog = Catalog::read(place).await?;
        let is_on = |id: &BackupId| id.start().0 == timeline;
        let listed = catalog.backups.iter().map(|backup| &backup.backup_id);
        let listed = listed.chain(catalog.unreadable.iter().map(|(id, _)| id));
        let listed: Vec<_> = listed.filter(|id| is_on(id)).cloned().collect();
        let others = catalog.unfinished.keys().chain(&catalog.buried).filter(|id| is_on(id));
        let backups: Vec<_> = listed.iter().chain(others).cloned().collect();
        let kept = catalog.backups.iter().filter(|backup| !is_on(&backup.backup_id));
        let named = kept.filter_map(|backup| backup.previous.clone()).collect();

        let mut objects = Vec::new();
        for prefix in prefixes(&stored, line, timeline) {
            objects.extend(place.list(&prefix, None, None).await?);
        }
        objects.sort_by_key(|info| is_history(&info.key));
        let mut times: Vec<_> = objects.iter().map(|info| info.modified_at).collect();
        for backup_id in &backups {
            let listed = place.list(&backup_id.object(""), None, None).await?;
            times.extend(listed.iter().map(|info| info.modified_at));
        }
        let (Some(first_stored_at), Some(last_stored_at)) =
            (times.iter().min().copied(), times.iter().max().copied())
        else {
            return Err(RemoveError::Nothing { place: place.location() });
        };
        let began = stored.began(timeline).map_or(PgLsn::from(0), |entry| entry.switch_lsn);
        let first = stored.numbers(timeline).min();
        let from_lsn = first.map(|number| began.max((number * segment_bytes).into()));
        let until_lsn = stored.end_of(timeline);
        Ok(Self {
            timeline,
            backups,
            listed,
            named,
            objects,
            from_lsn,
            until_lsn,
            first_stored_at,
            last_stored_at,
            stored,
        })
    }

    /// What goes, kind by kind.
    pub fn spare(&self) -> Vec<Spare> {
        let mut spare: Vec<Spare> = Vec::new();
        for info in &self.objects {
            let (name, key) = kind(&info.key);
            let object_bytes = info.bytes;
            match spare.iter_mut().find(|it| it.key == key) {
                Some(it) => {
                    it.count += 1;
                    it.object_bytes += object_bytes;
                }
                None => spare.push(Spare { count: 1, object_bytes, name, key, why: WHY }),
            }
        }
        spare
    }

    /// The backups that go.
    pub fn backups(&self) -> &[BackupId] {
        &self.backups
    }

    /// Whether it may go beside a primary; with `apply` also whether its server has been quiet. `force` says
    /// that the primary is the database.
    ///
    /// # Errors
    ///
    /// Why it stays.
    pub async fn require(
        &self,
        place: &Place,
        line: Line<'_>,
        apply: bool,
        force: bool,
    ) -> Result<(), RemoveError> {
        let now = if apply { Some(stores_time(place).await?) } else { None };
        let Self { timeline, first_stored_at, last_stored_at, .. } = *self;
        let asked = Asked { timeline, first_stored_at, last_stored_at, now, force };
        Ok(may_go(&self.stored, line, asked)?)
    }

    /// Removes it. The same again goes on where it was stopped.
    ///
    /// # Errors
    ///
    /// The repository failed; or the store keeps some of it.
    pub async fn apply(&self, place: &Place) -> Result<(), RemoveError> {
        // Whom a later backup names would be missed without.
        let named = self.listed.iter().filter(|id| self.named.contains(id));
        mark(place, named, "its timeline is not the database's").await?;
        // First of all: a backup without its WAL would be listed as one that is lost.
        let mut kept = usize::from(!delete_marked(place, &self.backups, &self.named).await?);
        for info in &self.objects {
            if kept == 0 || !is_history(&info.key) {
                kept += usize::from(!delete(place, &info.key).await?);
            }
        }
        if kept > 0 {
            return Err(RemoveError::Kept { count: kept });
        }
        let (timeline, objects) = (self.timeline, self.objects.len());
        info!(timeline, objects, backups = self.backups.len(), "timeline removed");
        Ok(())
    }
}

/// What the repository's clock says.
async fn stores_time(place: &Place) -> Result<DateTime<Utc>, RepositoryError> {
    match stored_now(place).await {
        // What goes makes the room that is missing.
        Err(RepositoryError::Store(error)) if error.kind == StoreErrorKind::Full => Ok(Utc::now()),
        now => now,
    }
}

/// Why all of it goes.
pub const WHY: &str = "the primary does not write it";

/// The prefixes of the names of all that is stored of a timeline, backups aside.
fn prefixes(stored: &WalMap, line: Line<'_>, timeline: u32) -> Vec<String> {
    let own = [
        format!("wal/{timeline:08X}/"),
        format!("partial/{timeline:08X}"),
        format!("gap/{timeline:08X}-"),
        format!("history/{timeline:08X}"),
        followed::name(timeline),
    ];
    own.into_iter().chain(end_before(stored, line, timeline)).collect()
}

/// The `.partial` file that the promotion to a timeline made of the segment in which it left the one before,
/// unless another promotion may have made it.
fn end_before(stored: &WalMap, line: Line<'_>, timeline: u32) -> Option<String> {
    let began = stored.began(timeline)?;
    let number = |entry: &HistoryEntry| segment_number(entry.switch_lsn, stored.segment_bytes);
    let others = stored.histories.iter().filter(|(it, _)| **it != timeline);
    let mut others = others.flat_map(|(_, history)| history).chain(line.history);
    if others.any(|entry| entry.timeline == began.timeline && number(entry) == number(began)) {
        return None;
    }
    let segment = Segment { timeline: began.timeline, number: number(began) };
    Some(format!("partial/{}.partial-", segment.name(stored.segment_bytes)))
}

fn is_history(name: &str) -> bool {
    name.starts_with("history/") && name.contains(".history-")
}

/// What an object is, for people and for programs.
fn kind(name: &str) -> (&'static str, &'static str) {
    match name.split('/').next().unwrap_or_default() {
        "wal" => ("WAL segments", "wal_segments"),
        "gap" => ("records of gaps", "gaps"),
        "followed" => ("marks that it was followed", "marks"),
        "history" if is_history(name) => ("timeline histories", "histories"),
        "history" => (".backup files", "backup_labels"),
        _ if name.contains(".partial-") => (".partial files", "partial_files"),
        _ => ("pieces of WAL segments", "wal_pieces"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recovery::tests::map;

    #[test]
    fn the_end_of_the_timeline_before_goes_if_no_other_promotion_made_it() {
        let stored = |histories: &[(u32, &[(u32, u64)])]| map(&[(1, vec![2])], histories);
        let partial = Some("partial/000000010000000000000006.partial-".to_owned());
        let entries = |histories: &[(u32, u64)]| map(&[], &[(9, histories)]).histories.remove(&9);
        for (case, stored, line, expected) in [
            ("the only promotion", stored(&[(2, &[(1, 6)])]), &[][..], partial.clone()),
            (
                "another one elsewhere",
                stored(&[(2, &[(1, 6)]), (3, &[(1, 7)])]),
                &[],
                partial.clone(),
            ),
            ("another one in it", stored(&[(2, &[(1, 6)]), (3, &[(1, 6)])]), &[], None),
            ("the primary's own in it", stored(&[(2, &[(1, 6)])]), &[(1, 6)], None),
            ("the primary's own elsewhere", stored(&[(2, &[(1, 6)])]), &[(1, 9)], partial),
            ("nothing tells where it began", stored(&[]), &[], None),
        ] {
            let history = entries(line).unwrap();
            let line = Line { timeline: 3, history: &history };
            assert_eq!(end_before(&stored, line, 2), expected, "{case}");
        }
    }

    #[test]
    fn a_name_says_what_goes_with_a_timeline() {
        let segment = "000000020000000100000006";
        for (name, key) in [
            (format!("wal/00000002/0000000200000001/{segment}-0123456789abcdef"), "wal_segments"),
            (format!("partial/{segment}.00000000-00040000-0123456789abcdef"), "wal_pieces"),
            (format!("partial/{segment}.partial-0123456789abcdef"), "partial_files"),
            (format!("history/{segment}.00000028.backup-0123456789abcdef"), "backup_labels"),
            ("history/00000002.history-0123456789abcdef01234567".to_owned(), "histories"),
            ("gap/00000002-0000000004000000-0000000007000010".to_owned(), "gaps"),
            ("followed/00000002".to_owned(), "marks"),
        ] {
            assert_eq!(kind(&name).1, key, "{name}");
            assert_eq!(is_history(&name), key == "histories", "{name}");
            let of_it = prefixes(&map(&[], &[]), Line { timeline: 1, history: &[] }, 2);
            assert!(of_it.iter().any(|prefix| name.starts_with(prefix)), "{name}");
        }
    }
}
