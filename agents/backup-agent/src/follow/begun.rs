//! Whether a place is the one into which WAL was stored before. An empty one is not: a mount is
//! missing, or the configuration says somewhere else. What would be acknowledged there is removed by
//! the server.
//!
//! That WAL was stored before is kept in etcd, if one is configured: there Patroni may have made the
//! slot. Without etcd, a slot that holds WAL back tells, as the agent marks the place before it makes
//! one.

use shared::pg::Connection;
use shared::pg::wal::{WalFile, segment_number};
use tokio_postgres::types::PgLsn;

use super::{FollowError, Primary};
use crate::backup::Context;
use crate::container::Kind;
use crate::repository::{Place, RepositoryError};
use crate::slots;

/// The object that is made before the first slot is.
pub(super) const BEGUN: &str = "begun";

/// Marks a place as one into which WAL is to be stored.
pub(crate) async fn begin(place: &Place) -> Result<(), RepositoryError> {
    match place.put(Kind::Begun, BEGUN, b"", 1).await {
        Ok(_) | Err(RepositoryError::Conflict { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Whether a place is marked.
pub(crate) async fn is_marked(place: &Place) -> Result<bool, RepositoryError> {
    Ok(place.store().head(&place.key(BEGUN)).await?.is_some())
}

/// Marks a place for the WAL of a primary, which also says that the group is of this database cluster;
/// refuses one that is not marked and has nothing of what is before the slot's position, if WAL was
/// stored before.
pub(super) async fn require(
    context: &Context,
    place: &Place,
    (connection, primary): (&Connection, &Primary),
    may_write: &(dyn Fn() -> bool + Sync),
) -> Result<(), FollowError> {
    let slot = &context.config.wal.slot;
    let slot_lsn = slots::held_from(connection, slot).await?;
    let Place { group, system_identifier, .. } = place;
    let key = format!("/pgmesh/{}/begun/{group}/{system_identifier}", context.config.cluster);
    let stored_before = match &context.etcd {
        Some(etcd) => etcd.get(&key).await?.is_some(),
        None => slot_lsn.is_some(),
    };
    let location = place.location();
    let before = slot_lsn.unwrap_or(PgLsn::from(u64::MAX));
    if !is_marked(place).await? {
        if stored_before && !holds_before(place, primary.segment_bytes, before).await? {
            let (node, group) = (primary.node.to_string(), *group);
            return Err(FollowError::Empty { place: location, node, group });
        }
        super::require(place, may_write)?;
        begin(place).await?;
    }
    if let Some(etcd) = context.etcd.as_ref().filter(|_| !stored_before) {
        etcd.put(&key, &location, None).await?;
    }
    Ok(())
}

async fn holds_before(
    place: &Place,
    segment_bytes: u64,
    lsn: PgLsn,
) -> Result<bool, RepositoryError> {
    let limit = segment_number(lsn, segment_bytes);
    for timeline in place.list_folders("wal/").await? {
        let oldest = place.list(&format!("wal/{timeline}/"), None, Some(1)).await?;
        let names = oldest.iter().filter_map(|info| info.key.rsplit('/').next()?.get(..24));
        let mut files = names.filter_map(|name| WalFile::parse(name, segment_bytes).ok());
        if files.any(|file| matches!(file, WalFile::Segment(it) if it.number < limit)) {
            return Ok(true);
        }
    }
    Ok(false)
}
