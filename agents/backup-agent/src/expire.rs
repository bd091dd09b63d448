//! Carries out the retention: marks backups as deleted, and deletes what was marked long enough
//! ago, and the WAL that nothing needs any more.
//!
//! A tombstone comes first, and only later does anything go. So a restore that is under way
//! finishes, and a mistake can be undone by deleting the tombstone.

pub mod timeline;

use std::collections::BTreeSet;

use chrono::{DateTime, Utc};
use shared::store::StoreErrorKind;
use shared::telemetry::chain;
use thiserror::Error;
use tokio_postgres::types::PgLsn;
use tracing::{info, warn};

use crate::backup::Context;
use crate::catalog::{Catalog, Mark, Tombstone, read_commit};
use crate::clocks::{self, ClockError};
use crate::container::Kind;
use crate::manifest::{BackupId, Commit, Suspicion};
use crate::repository::{Place, RepositoryError};
use crate::retention::{Decision, Needs, Retention, as_of, decide};
use crate::wal::piece::Piece;
use crate::wal::remnant::{self, Remnant, What};
use crate::wal::{WalError, WalMap, WalObject};

/// Why nothing goes, or not all that should.
#[derive(Debug, Error)]
pub enum ExpireError {
    /// Nobody can tell how old anything is.
    #[error(transparent)]
    Clock(#[from] ClockError),
    /// The WAL could not be looked at.
    #[error(transparent)]
    Wal(#[from] WalError),
    /// The repository failed.
    #[error(transparent)]
    Repository(#[from] RepositoryError),
}

/// What is to go, and why the rest stays.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Until when ages were counted ([`as_of`]).
    pub as_of: DateTime<Utc>,
    /// Each listed backup.
    pub decisions: Vec<Decision>,
    /// Backups that were marked long enough ago.
    pub delete: Vec<BackupId>,
    /// Backups that were marked and can still be brought back, and until when.
    pub marked: Vec<(BackupId, DateTime<Utc>)>,
    /// WAL segments that nothing needs.
    pub wal: Vec<WalObject>,
    /// Pieces of segments that nothing needs.
    pub pieces: Vec<Piece>,
    /// What goes with WAL that nothing needs: files of archivers, records of gaps.
    pub remnants: Vec<Remnant>,
    /// Backups that a listed one names as its predecessor: their tombstones stay.
    named: BTreeSet<BackupId>,
}

impl Plan {
    /// The backups that will be marked.
    pub fn mark(&self) -> impl Iterator<Item = &BackupId> {
        self.decisions.iter().filter(|it| it.keep.is_empty()).map(|it| &it.backup_id)
    }

    /// Whether it changes nothing.
    pub fn is_empty(&self) -> bool {
        self.mark().next().is_none() && self.delete.is_empty() && self.spare().is_empty()
    }

    /// Bytes that will go, beside those of backups.
    pub fn spare_bytes(&self) -> u64 {
        self.spare().iter().map(|spare| spare.object_bytes).sum()
    }
}

/// Objects of one kind that will go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Spare {
    /// How many.
    pub count: usize,
    /// Bytes in the store.
    pub object_bytes: u64,
    /// What they are, for people.
    pub name: &'static str,
    /// What they are, for programs.
    pub key: &'static str,
    /// Why they go.
    pub why: &'static str,
}

impl Plan {
    /// What will go beside backups, kind by kind.
    pub fn spare(&self) -> Vec<Spare> {
        const NEEDLESS: &str = "no kept backup needs them";
        const ORPHANED: &str = "no kept backup needs the WAL that they go with";
        let remnants = |what: What| {
            let of_kind = self.remnants.iter().filter(move |remnant| remnant.what == what);
            of_kind.map(|remnant| remnant.object_bytes).collect()
        };
        let kinds: [(Vec<u64>, _, _, _); 5] = [
            (
                self.wal.iter().map(|wal| wal.object_bytes).collect(),
                "WAL segments",
                "wal_segments",
                NEEDLESS,
            ),
            (
                self.pieces.iter().map(|piece| piece.object_bytes).collect(),
                "pieces of WAL segments",
                "wal_pieces",
                NEEDLESS,
            ),
            (remnants(What::Partial), ".partial files", "partial_files", ORPHANED),
            (remnants(What::BackupLabel), ".backup files", "backup_labels", ORPHANED),
            (remnants(What::Gap), "records of gaps", "gaps", ORPHANED),
        ];
        let spare = kinds.into_iter().filter(|(sizes, ..)| !sizes.is_empty());
        spare
            .map(|(sizes, name, key, why)| {
                let (count, object_bytes) = (sizes.len(), sizes.iter().sum());
                Spare { count, object_bytes, name, key, why }
            })
            .collect()
    }
}

/// Works out what the retention asks for at `now`. Changes nothing. `primary` is the timeline that the
/// cluster's primary writes, if one is known.
///
/// # Errors
///
/// The repository could not be read. A backup whose commit object is damaged stops everything:
/// nobody knows what it needs. One whose key is not configured stays, with what it may need; but the
/// newest has to have its key.
pub async fn plan(
    place: &Place,
    retention: &Retention,
    primary: Option<u32>,
    now: DateTime<Utc>,
) -> Result<Plan, WalError> {
    let mut catalog = Catalog::read(place).await?;
    let mut locked = Vec::new();
    for (backup_id, error) in catalog.unreadable.drain(..) {
        let is_newest = catalog.newest.as_ref() == Some(&backup_id);
        if !error.is_locked() || is_newest {
            return Err(error.into());
        }
        warn!(%backup_id, error = %chain(&error), "backup kept, as nobody can read it");
        if !locked.contains(&backup_id) {
            locked.push(backup_id);
        }
    }
    let kept = locked.iter().map(|backup_id| Decision {
        backup_id: backup_id.clone(),
        keep: vec!["its key is not configured"],
    });
    let mut decisions: Vec<Decision> = kept.collect();
    let named: BTreeSet<BackupId> =
        catalog.backups.iter().filter_map(|backup| backup.previous.clone()).collect();
    let Some(newest) = catalog.backups.last() else {
        let (delete, marked) = buried(&catalog, &named, |mark| mark.is_due(retention, now, now));
        let marked = until(&marked, retention);
        let (wal, pieces, remnants) = (Vec::new(), Vec::new(), Vec::new());
        return Ok(Plan { as_of: now, decisions, delete, marked, wal, pieces, remnants, named });
    };
    let map = WalMap::read(place, newest.wal_segment_bytes).await?;
    let as_of = as_of(&catalog.backups, &map, primary, now);
    let (delete, marks) = buried(&catalog, &named, |mark| mark.is_due(retention, as_of, now));
    decisions.extend(decide(&catalog.backups, &map, retention, primary, as_of));
    // What a marked backup needs stays as long as it can be brought back; one that is marked in
    // this very run, too.
    let stand_ins: Vec<_> =
        locked.iter().map(|id| stand_in(id, &catalog.backups, newest)).collect();
    let like = newest.clone();
    let mut needed = catalog.backups;
    needed.extend(stand_ins);
    for (backup_id, _) in &marks {
        match read_commit(place, backup_id).await {
            Ok(commit) => needed.push(commit),
            // Removed by hand: there is nothing to bring back.
            Err(RepositoryError::Store(error)) if error.kind == StoreErrorKind::NotFound => {}
            Err(error) if error.is_locked() => needed.push(stand_in(backup_id, &needed, &like)),
            Err(error) => return Err(error.into()),
        }
    }
    // The one that began the window may have been marked late: what it reached then stays.
    let marked_at = marks.iter().map(|(_, mark)| mark.deleted_at.min(mark.stored_at));
    let at = marked_at.chain([as_of]).min().unwrap_or(as_of);
    let needs = Needs::new(&needed, &map, retention, primary, at);
    let wal = needs.spare_wal().into_iter().cloned().collect();
    let pieces = needs.spare_pieces().into_iter().cloned().collect();
    let remnants = remnant::list(place, map.segment_bytes).await?;
    let remnants = needs.spare_remnants(&remnants).into_iter().cloned().collect();
    let marked = until(&marks, retention);
    Ok(Plan { as_of, decisions, delete, marked, wal, pieces, remnants, named })
}

/// Divides the marked backups into those that go and those that can still be brought back.
fn buried(
    catalog: &Catalog,
    named: &BTreeSet<BackupId>,
    is_due: impl Fn(&Mark) -> bool,
) -> (Vec<BackupId>, Vec<(BackupId, Mark)>) {
    let (due, marked): (Vec<_>, Vec<_>) =
        catalog.tombstones.clone().into_iter().partition(|(_, mark)| is_due(mark));
    // A tombstone stays after its backup, while a later one names that as its predecessor.
    let goes = |id: &BackupId| catalog.buried.contains(id) || !named.contains(id);
    (due.into_iter().map(|(id, _)| id).filter(goes).collect(), marked)
}

/// Until when each can be brought back.
fn until(marks: &[(BackupId, Mark)], retention: &Retention) -> Vec<(BackupId, DateTime<Utc>)> {
    marks.iter().map(|(id, mark)| (id.clone(), mark.due(retention))).collect()
}

/// What a backup needs whose commit object nobody can read: its name says where it begins, and the next
/// one began after its end. It is nothing to start from.
fn stand_in(backup_id: &BackupId, backups: &[Commit], like: &Commit) -> Commit {
    let (timeline, start_lsn) = backup_id.start();
    let is_later = |it: &&Commit| it.backup_id > *backup_id && it.timeline == timeline;
    let next = backups.iter().filter(is_later).map(|it| it.start_lsn).min();
    let reason = "its key is not configured".to_owned();
    Commit {
        backup_id: backup_id.clone(),
        timeline,
        start_lsn,
        end_lsn: next.unwrap_or(PgLsn::from(u64::MAX)),
        suspect: Some(Suspicion { reason, warnings: Vec::new() }),
        ..like.clone()
    }
}

/// Carries out a plan, if this host's clock is that of the repository and of the primary that `context`
/// leads to.
///
/// # Errors
///
/// The clocks are apart: nothing was changed. Or the repository could not be written. What Object Lock
/// protects stays, and is tried again next time.
pub async fn apply(
    place: &Place,
    plan: &Plan,
    context: Option<&Context>,
) -> Result<(), ExpireError> {
    if plan.is_empty() {
        return Ok(());
    }
    clocks::require(place, context).await?;
    // What makes room comes first: a full repository takes no mark.
    delete_marked(place, &plan.delete, &plan.named).await?;
    let names = plan.wal.iter().map(|wal| &wal.name);
    let names = names.chain(plan.pieces.iter().map(|piece| &piece.name));
    for name in names.chain(plan.remnants.iter().map(|remnant| &remnant.name)) {
        delete(place, name).await?;
    }
    let (segments, pieces, others) = (plan.wal.len(), plan.pieces.len(), plan.remnants.len());
    if segments + pieces + others > 0 {
        info!(segments, pieces, others, bytes = plan.spare_bytes(), "WAL deleted");
    }
    Ok(mark(place, plan.mark(), "retention").await?)
}

/// Marks backups as deleted.
async fn mark(
    place: &Place,
    backups: impl Iterator<Item = &BackupId>,
    reason: &str,
) -> Result<(), RepositoryError> {
    for backup_id in backups {
        let tombstone = Tombstone {
            backup_id: backup_id.clone(),
            deleted_at: Utc::now(),
            reason: reason.to_owned(),
        };
        let name = format!("tombstone/{backup_id}");
        let text = serde_json::to_vec(&tombstone)
            .map_err(|source| RepositoryError::Content { name: name.clone(), source })?;
        place.put_once(Kind::Tombstone, &name, &text).await?;
        info!(%backup_id, "backup marked as deleted");
    }
    Ok(())
}

/// Deletes backups that were marked; false if the store does not let all of them. The tombstones of those
/// that a later one has `named` stay.
async fn delete_marked(
    place: &Place,
    backups: &[BackupId],
    named: &BTreeSet<BackupId>,
) -> Result<bool, RepositoryError> {
    let mut is_done = true;
    for backup_id in backups {
        let mut all = true;
        // The commit object first: what is left is then no backup, whatever happens.
        all &= delete(place, &backup_id.object("commit")).await?;
        for object in place.list(&backup_id.object(""), None, None).await? {
            all &= delete(place, &object.key).await?;
        }
        if all {
            if !named.contains(backup_id) {
                delete(place, &format!("tombstone/{backup_id}")).await?;
            }
            info!(%backup_id, "backup deleted");
        } else {
            warn!(%backup_id, "backup not deleted: the store does not allow it yet");
        }
        is_done &= all;
    }
    Ok(is_done)
}

/// Deletes an object; false if the store does not let it.
async fn delete(place: &Place, name: &str) -> Result<bool, RepositoryError> {
    match place.store().delete(&place.key(name)).await {
        Ok(()) => Ok(true),
        Err(error) if error.kind == StoreErrorKind::Denied => Ok(false),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recovery::tests::{backup, lsn};

    /// A key was given up, and a backup was left under it.
    #[test]
    fn a_backup_that_nobody_can_read_needs_what_is_before_the_next() {
        let (locked, next, other) = (backup(1, 5, false), backup(1, 9, false), backup(2, 7, false));
        let backups = [other, next];
        let found = stand_in(&locked.backup_id, &backups, &backups[1]);
        assert_eq!((found.timeline, found.segments()), (1, 5..=8));
        assert_eq!(found.start_lsn, lsn(5));
        assert!(found.suspect.is_some());
        let last = stand_in(&locked.backup_id, &backups[..1], &backups[0]);
        assert!(last.segments().contains(&1_000_000));
    }
}
