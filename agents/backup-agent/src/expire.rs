//! Carries out the retention: marks backups as deleted, and deletes what was marked long enough
//! ago, and the WAL that nothing needs any more.
//!
//! A tombstone comes first, and only later does anything go. So a restore that is under way
//! finishes, and a mistake can be undone by deleting the tombstone.

use std::collections::BTreeSet;

use chrono::{DateTime, TimeDelta, Utc};
use shared::store::StoreErrorKind;
use tracing::{info, warn};

use crate::catalog::{Catalog, Tombstone, read_commit};
use crate::container::Kind;
use crate::manifest::BackupId;
use crate::repository::{Place, RepositoryError};
use crate::retention::{Decision, Retention, decide, spare_pieces, spare_remnants, spare_wal};
use crate::wal::piece::Piece;
use crate::wal::remnant::{self, Remnant, What};
use crate::wal::{WalError, WalMap, WalObject};

/// What is to go, and why the rest stays.
#[derive(Clone, Debug)]
pub struct Plan {
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

/// Works out what the retention asks for at `now`. Changes nothing.
///
/// # Errors
///
/// The repository could not be read. A backup whose commit object is damaged stops everything:
/// nobody knows what it needs.
pub async fn plan(
    place: &Place,
    retention: &Retention,
    now: DateTime<Utc>,
) -> Result<Plan, WalError> {
    let mut catalog = Catalog::read(place).await?;
    if let Some((_, error)) = catalog.unreadable.pop() {
        return Err(error.into());
    }
    let decisions = decide(&catalog.backups, retention, now);
    let grace = TimeDelta::from_std(retention.delete_after).unwrap_or(TimeDelta::MAX);
    let named: BTreeSet<BackupId> =
        catalog.backups.iter().filter_map(|backup| backup.previous.clone()).collect();
    let (mut delete, mut marked) = (Vec::new(), Vec::new());
    for (backup_id, at) in &catalog.tombstones {
        let due = at.checked_add_signed(grace).unwrap_or(DateTime::<Utc>::MAX_UTC);
        if due <= now {
            // A tombstone stays after its backup, while a later one names that as its predecessor.
            if catalog.buried.contains(backup_id) || !named.contains(backup_id) {
                delete.push(backup_id.clone());
            }
        } else {
            marked.push((backup_id.clone(), due));
        }
    }
    let Some(newest) = catalog.backups.last() else {
        let (wal, pieces, remnants) = (Vec::new(), Vec::new(), Vec::new());
        return Ok(Plan { decisions, delete, marked, wal, pieces, remnants, named });
    };
    let map = WalMap::read(place, newest.wal_segment_bytes).await?;
    // What a marked backup needs stays as long as it can be brought back; one that is marked in
    // this very run, too.
    let mut needed = catalog.backups;
    for (backup_id, _) in &marked {
        match read_commit(place, backup_id).await {
            Ok(commit) => needed.push(commit),
            // Removed by hand: there is nothing to bring back.
            Err(RepositoryError::Store(error)) if error.kind == StoreErrorKind::NotFound => {}
            Err(error) => return Err(error.into()),
        }
    }
    // The one that began the window may have been marked late: what it reached then stays.
    let marked_at = marked.iter().filter_map(|(backup_id, _)| catalog.tombstones.get(backup_id));
    let at = marked_at.min().copied().unwrap_or(now).min(now);
    let wal = spare_wal(&needed, &map, retention, at).into_iter().cloned().collect();
    let pieces = spare_pieces(&needed, &map, retention, at).into_iter().cloned().collect();
    let remnants = remnant::list(place, map.segment_bytes).await?;
    let remnants = spare_remnants(&needed, &remnants, map.segment_bytes, retention, at);
    let remnants = remnants.into_iter().cloned().collect();
    Ok(Plan { decisions, delete, marked, wal, pieces, remnants, named })
}

/// Carries out a plan.
///
/// # Errors
///
/// The repository could not be written. What Object Lock protects stays, and is tried again next
/// time.
pub async fn apply(place: &Place, plan: &Plan) -> Result<(), RepositoryError> {
    for backup_id in plan.mark() {
        let tombstone = Tombstone {
            backup_id: backup_id.clone(),
            deleted_at: Utc::now(),
            reason: "retention".to_owned(),
        };
        let name = format!("tombstone/{backup_id}");
        let text = serde_json::to_vec(&tombstone)
            .map_err(|source| RepositoryError::Content { name: name.clone(), source })?;
        match place.put(Kind::Tombstone, &name, &text, 1).await {
            Ok(_) | Err(RepositoryError::Conflict { .. }) => {}
            Err(error) => return Err(error),
        }
        info!(%backup_id, "backup marked as deleted");
    }
    for backup_id in &plan.delete {
        let mut all = true;
        // The commit object first: what is left is then no backup, whatever happens.
        all &= delete(place, &backup_id.object("commit")).await?;
        for object in place.list(&backup_id.object(""), None, None).await? {
            all &= delete(place, &object.key).await?;
        }
        if all {
            if !plan.named.contains(backup_id) {
                delete(place, &format!("tombstone/{backup_id}")).await?;
            }
            info!(%backup_id, "backup deleted");
        } else {
            warn!(%backup_id, "backup not deleted: the store does not allow it yet");
        }
    }
    let names = plan.wal.iter().map(|wal| &wal.name);
    let names = names.chain(plan.pieces.iter().map(|piece| &piece.name));
    for name in names.chain(plan.remnants.iter().map(|remnant| &remnant.name)) {
        delete(place, name).await?;
    }
    let (segments, pieces, others) = (plan.wal.len(), plan.pieces.len(), plan.remnants.len());
    if segments + pieces + others > 0 {
        info!(segments, pieces, others, bytes = plan.spare_bytes(), "WAL deleted");
    }
    Ok(())
}

/// Deletes an object; false if the store does not let it.
async fn delete(place: &Place, name: &str) -> Result<bool, RepositoryError> {
    match place.store().delete(&place.key(name)).await {
        Ok(()) => Ok(true),
        Err(error) if error.kind == StoreErrorKind::Denied => Ok(false),
        Err(error) => Err(error.into()),
    }
}
