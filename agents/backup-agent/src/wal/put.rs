//! Stores a WAL file: the same content again is fine, other content is refused.

use bytes::Bytes;
use shared::store::StoreErrorKind;

use super::conflict::named;
use super::contents::contents;
use super::{
    CHUNK_BYTES, Packed, WalError, WalObject, branch, find, kind, object, read, rekey, stem,
};
use crate::container::{ContainerError, Kind};
use crate::repository::{Place, RepositoryError};
use crate::same_key;

/// What became of a file that was to be stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stored {
    /// It is new.
    Now,
    /// The same content was there.
    Before,
}

/// Stores a WAL file.
///
/// The same content again is fine. Other content under the same name is refused, whichever came
/// first: the list is read before and after, so that of two writers at the same moment at least
/// one sees the other, on every store.
///
/// # Errors
///
/// [`WalError::Conflict`]; or the repository failed.
pub async fn store(place: &Place, packed: Packed) -> Result<Stored, WalError> {
    let before = find(place, &packed.file).await?;
    store_object(place, packed, &before).await.map(|(stored, _)| stored)
}

/// Stores a WAL file as [`store`] does, for who stores a single one and knows nothing of those before:
/// that their key is the same is told by the segment before, for a hundred bytes more.
///
/// # Errors
///
/// [`RepositoryError::OtherKey`]; or as [`store`].
pub async fn push(place: &Place, packed: Packed) -> Result<Stored, WalError> {
    let (mut previous, mut before) = (Vec::new(), Vec::new());
    for wal in find_with_previous(place, &packed.file).await? {
        if wal.file == packed.file { before.push(wal) } else { previous.push(wal) }
    }
    let before = contents(place, before).await?;
    // What is there of this very file is read back as a whole.
    let mut is_told = !before.is_empty();
    if let Some(wal) = previous.first().filter(|_| !is_told) {
        is_told = place.has_same_key(Kind::Wal, &wal.name).await?;
    }
    if !is_told {
        same_key::require(place).await?;
    }
    store_object(place, packed, &before).await.map(|(stored, _)| stored)
}

/// Finds the objects of a file and, if it is a segment, of the one before in its folder, with one list
/// that has hardly more.
async fn find_with_previous(place: &Place, file: &str) -> Result<Vec<WalObject>, RepositoryError> {
    let Some(previous) = previous(file) else { return find(place, file).await };
    let (first, last) = (stem(&previous), stem(file));
    let common = first.bytes().zip(last.bytes()).take_while(|(one, other)| one == other).count();
    let listed = place.list(&last[..common], Some(&first), None).await?;
    let found = listed.into_iter().filter_map(object);
    Ok(found.filter(|wal| wal.file == previous || wal.file == file).collect())
}

/// The segment before one of the same folder, whatever their size.
fn previous(file: &str) -> Option<String> {
    let (folder, number) = file.split_at_checked(16).filter(|_| file.len() == 24)?;
    let number = u32::from_str_radix(number, 16).ok()?.checked_sub(1)?;
    Some(format!("{folder}{number:08X}"))
}

/// Stores a WAL file and reads its object back, so that what else holds it may be given up.
///
/// # Errors
///
/// As [`store`]; or the store does not give back what it was given.
pub async fn store_and_compare(place: &Place, packed: Packed) -> Result<Stored, WalError> {
    let name = packed.name();
    let before = find(place, &packed.file).await?;
    let error = match store_object(place, packed, &before).await {
        Ok((stored, None)) => return Ok(stored),
        Ok((stored, Some((name, object)))) => {
            let is_same = place.store().holds(&place.key(&name), &object).await;
            if is_same.map_err(RepositoryError::from)? {
                return Ok(stored);
            }
            let source = ContainerError::Replaced { name: name.clone() };
            WalError::DamagedCopy { name, source: Box::new(source.into()) }
        }
        Err(error) => error,
    };
    let is_damaged = match &error {
        WalError::DamagedCopy { .. } => true,
        WalError::Repository(RepositoryError::Store(error)) => {
            error.kind == StoreErrorKind::Corrupt
        }
        _ => false,
    };
    if is_damaged {
        // Its name would stand for what the server still has, and sends again.
        place.store().delete(&place.key(&name)).await.map_err(RepositoryError::from)?;
    }
    Err(error)
}

/// Stores a WAL file, of which these objects were there before; returns the object too if it was
/// written now.
async fn store_object(
    place: &Place,
    packed: Packed,
    before: &[WalObject],
) -> Result<(Stored, Option<(String, Bytes)>), WalError> {
    let mut name = packed.name();
    let Packed { file, hash, content, header } = packed;
    let conflict = |found: &[WalObject]| -> Result<(), WalError> {
        let others = found.iter().filter(|it| it.hash != hash).map(|it| it.name.as_str());
        match named(others) {
            None => Ok(()),
            Some(found) => Err(WalError::Conflict { name: file.clone(), found }),
        }
    };
    conflict(before)?;
    if let Some(header) = header.filter(|_| before.is_empty()) {
        branch::require_begun(place, &file, &header).await?;
    }
    let kind = kind(&file);
    for same in before {
        match read_back(place, same).await {
            Ok(()) => return Ok((Stored::Before, None)),
            // The key was given up, and this history is still needed.
            Err(error) if kind == Kind::History && error.is_locked() => {
                name = format!("{}{hash}{}", stem(&file), rekey::tag(place.keys()));
            }
            Err(error) => return Err(error),
        }
    }
    let (object, _) = content.seal(place.keys(), &place.identity(kind, &name), CHUNK_BYTES)?;
    let stored = match place.put_sealed(kind, &name, object.clone()).await {
        Ok(()) => Stored::Now,
        // Another writer was faster with the same content, sealed with another salt.
        Err(RepositoryError::Conflict { .. }) => Stored::Before,
        Err(error) => return Err(error.into()),
    };
    let after = find(place, &file).await?;
    conflict(&after)?;
    if stored == Stored::Before {
        for same in after.iter().filter(|it| it.name == name) {
            read_back(place, same).await?;
        }
    }
    Ok((stored, (stored == Stored::Now).then_some((name, object))))
}

/// Reads an object that is to stand for a file that is pushed again: a truncated one must not.
async fn read_back(place: &Place, same: &WalObject) -> Result<(), WalError> {
    match read(place, same, |_| Ok(())).await {
        Err(WalError::Repository(error)) if !error.is_damage() => Err(error.into()),
        Err(source) => {
            Err(WalError::DamagedCopy { name: same.name.clone(), source: Box::new(source) })
        }
        Ok(()) => Ok(()),
    }
}
