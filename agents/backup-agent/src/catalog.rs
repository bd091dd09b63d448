//! Which backups exist: those with a commit object and without a tombstone.

use std::collections::{BTreeMap, BTreeSet};

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use shared::store::ObjectInfo;

use crate::container::Kind;
use crate::manifest::{BackupId, COMMIT_FORMAT, Commit};
use crate::repository::{Place, RepositoryError};

/// The backups of one place, as its objects tell.
#[derive(Debug, Default)]
pub struct Catalog {
    /// The backups that can be restored, oldest first.
    pub backups: Vec<Commit>,
    /// Backups whose commit object or tombstone cannot be read, and why.
    pub unreadable: Vec<(BackupId, RepositoryError)>,
    /// Backups that were marked as deleted, and when.
    pub tombstones: BTreeMap<BackupId, Mark>,
    /// Of those, the ones that objects are left of.
    pub buried: BTreeSet<BackupId>,
    /// The newest backup that there is, whether it can be read or not.
    pub newest: Option<BackupId>,
    /// Objects of backups that have no commit object: a run under way, or one that was stopped.
    pub unfinished: BTreeMap<BackupId, Vec<ObjectInfo>>,
}

/// What a tombstone says.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Tombstone {
    /// The backup that is deleted.
    pub backup_id: BackupId,
    /// When that was decided.
    pub deleted_at: DateTime<Utc>,
    /// Why.
    pub reason: String,
}

/// When a backup was marked as deleted. Either time may be wrong: a clock was, or the repository was
/// copied and its objects have other times since.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark {
    /// By the tombstone's own word.
    pub deleted_at: DateTime<Utc>,
    /// When the store says that the tombstone was stored.
    pub stored_at: DateTime<Utc>,
}

impl Catalog {
    /// Lists the backups and reads their commit objects.
    ///
    /// # Errors
    ///
    /// The store could not be asked. A single backup that cannot be read is listed in
    /// [`Catalog::unreadable`].
    pub async fn read(place: &Place) -> Result<Self, RepositoryError> {
        let mut catalog = Self::default();
        for info in place.list("tombstone/", None, None).await? {
            let Some(id) = info.key.strip_prefix("tombstone/").and_then(|id| id.parse().ok())
            else {
                continue;
            };
            // A tombstone deletes a backup, so it has to prove itself as a commit object does.
            match read_tombstone(place, &info.key).await {
                Ok(Tombstone { deleted_at, .. }) => {
                    let mark = Mark { deleted_at, stored_at: info.modified_at };
                    catalog.tombstones.insert(id, mark);
                }
                Err(error) if error.is_transient() => return Err(error),
                Err(error) => catalog.unreadable.push((id, error)),
            }
        }
        let mut committed = BTreeSet::new();
        let mut objects: BTreeMap<BackupId, Vec<ObjectInfo>> = BTreeMap::new();
        for info in catalog.list_objects(place).await? {
            let path = info.key.strip_prefix("base/").unwrap_or_default();
            let Some((id, object)) = path.split_once('/') else { continue };
            let Ok(id) = id.parse::<BackupId>() else { continue };
            if object == "commit" {
                committed.insert(id.clone());
            }
            objects.entry(id).or_default().push(info);
        }
        for (id, objects) in objects {
            if catalog.tombstones.contains_key(&id) {
                catalog.buried.insert(id);
                continue;
            }
            if !committed.contains(&id) {
                catalog.unfinished.insert(id, objects);
                continue;
            }
            catalog.newest = catalog.newest.take().max(Some(id.clone()));
            match read_commit(place, &id).await {
                Ok(commit) => catalog.backups.push(commit),
                Err(error) if error.is_transient() => return Err(error),
                Err(error) => catalog.unreadable.push((id, error)),
            }
        }
        Ok(catalog)
    }

    /// Whether there are backups, and the configured keys open none of them.
    pub fn is_locked(&self) -> bool {
        let mut errors = self.unreadable.iter().map(|(_, error)| error);
        self.backups.is_empty()
            && !self.unreadable.is_empty()
            && errors.all(|error| error.is_wrong_key() || error.is_locked())
    }

    /// Lists the objects of all backups. If the store does not let it, one of them may be to blame:
    /// then each is asked for alone.
    async fn list_objects(&mut self, place: &Place) -> Result<Vec<ObjectInfo>, RepositoryError> {
        match place.list("base/", None, None).await {
            Err(error) if !error.is_transient() => {}
            listed => return listed,
        }
        let mut listed = Vec::new();
        for folder in place.list_folders("base/").await? {
            let Ok(id) = folder.parse::<BackupId>() else { continue };
            match place.list(&id.object(""), None, None).await {
                Ok(objects) => listed.extend(objects),
                Err(error) if error.is_transient() => return Err(error),
                Err(_) if self.tombstones.contains_key(&id) => drop(self.buried.insert(id)),
                Err(error) => {
                    self.newest = self.newest.take().max(Some(id.clone()));
                    self.unreadable.push((id, error));
                }
            }
        }
        Ok(listed)
    }

    /// Backups that a later one names as its predecessor, and of which nothing is left: they were
    /// removed by hand, not by `expire`.
    pub fn vanished(&self) -> Vec<&BackupId> {
        let known: BTreeSet<&BackupId> = self
            .backups
            .iter()
            .map(|backup| &backup.backup_id)
            .chain(self.unreadable.iter().map(|(id, _)| id))
            .chain(self.tombstones.keys())
            .collect();
        let named = self.backups.iter().filter_map(|backup| backup.previous.as_ref());
        named.filter(|id| !known.contains(id)).collect()
    }
}

/// `wal_segment_size` of the newest backup that can be read; `None` if there is none.
///
/// # Errors
///
/// The store could not be asked.
pub async fn wal_segment_bytes(place: &Place) -> Result<Option<u64>, RepositoryError> {
    let listed = place.list("base/", None, None).await?;
    let commits = listed.iter().rev().filter_map(|info| info.key.strip_suffix("/commit"));
    for id in commits.filter_map(|path| path.strip_prefix("base/")?.parse().ok()) {
        match read_commit(place, &id).await {
            Ok(commit) => return Ok(Some(commit.wal_segment_bytes)),
            Err(error) if error.is_transient() => return Err(error),
            Err(_) => {}
        }
    }
    Ok(None)
}

async fn read_tombstone(place: &Place, name: &str) -> Result<Tombstone, RepositoryError> {
    let (text, _) = place.get(Kind::Tombstone, name).await?;
    let wrong = |source| RepositoryError::Content { name: name.to_owned(), source };
    serde_json::from_slice(&text).map_err(wrong)
}

/// Reads one backup's commit object.
///
/// # Errors
///
/// There is none, it is damaged, or it is of a later format.
pub async fn read_commit(place: &Place, id: &BackupId) -> Result<Commit, RepositoryError> {
    let name = id.object("commit");
    let (text, _) = place.get(Kind::Commit, &name).await?;
    let wrong = |source| RepositoryError::Content { name: name.clone(), source };
    let commit: Commit = serde_json::from_slice(&text).map_err(wrong)?;
    if commit.format != COMMIT_FORMAT {
        use serde::de::Error;
        let found = commit.format;
        return Err(wrong(serde_json::Error::custom(format!(
            "format {found}, this release reads {COMMIT_FORMAT}; use a newer backup-agent"
        ))));
    }
    Ok(commit)
}
