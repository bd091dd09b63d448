//! Whether the key that writes is the one that wrote before under its id. What another one seals,
//! nobody can read who has the right one; and it would be acknowledged all the same.
//!
//! Each object's header tells, so a hundred bytes of one object are enough: who wrote that was
//! compared with what was there before.

use crate::container::Kind;
use crate::repository::{Place, RepositoryError};
use crate::wal::newest;

/// The most backups that are asked, the newest first, where the newest WAL is of another key's id.
const BACKUPS_MAX: usize = 8;

/// Refuses a key that is not the one that wrote under its id. Where nothing was written under it,
/// there is nothing to compare.
///
/// # Errors
///
/// [`RepositoryError::OtherKey`]; or the store could not be asked.
pub async fn require(place: &Place) -> Result<(), RepositoryError> {
    let segments = newest::segments(place).await?;
    if let Some(name) = segments.last()
        && place.has_same_key(Kind::Wal, name).await?
    {
        return Ok(());
    }
    if let Some(name) = newest::pieces(place, &segments).await?.last()
        && place.has_same_key(Kind::Wal, name).await?
    {
        return Ok(());
    }
    let listed = place.list("base/", None, None).await?;
    let commits = listed.iter().rev().filter(|info| info.key.ends_with("/commit"));
    for info in commits.take(BACKUPS_MAX) {
        if place.has_same_key(Kind::Commit, &info.key).await? {
            return Ok(());
        }
    }
    Ok(())
}
