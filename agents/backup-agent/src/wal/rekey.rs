//! Timeline histories and the keys that seal them. A history never expires and is needed as long as
//! there is WAL after it; a key is to be given up some day. So a history is stored once more with each
//! key that writes, beside the one that is there: nothing that is stored is ever changed.

use std::collections::BTreeMap;

use futures_util::stream::{self, StreamExt, TryStreamExt};

use super::map::AT_ONCE;
use super::{HASH_DIGITS, WalError, WalObject, is_hex, object, read, stem};
use crate::container::Kind;
use crate::keys::KeyRing;
use crate::repository::{Place, RepositoryError};

/// Hexadecimal digits of a key's tag.
const TAG_DIGITS: usize = 8;

/// What a history's name ends with where it is not the first of its content: it tells keys apart.
pub fn tag(keys: &KeyRing) -> String {
    let (id, _) = keys.writing();
    let mut tag = hex::encode(blake3::hash(id.as_bytes()).as_bytes());
    tag.truncate(TAG_DIGITS);
    tag
}

/// The content's hash in a name, without the key's tag if it has one.
pub(super) fn untagged(hash: &str) -> &str {
    let tagged = hash.split_at_checked(HASH_DIGITS);
    let tagged = tagged.filter(|(_, tag)| tag.len() == TAG_DIGITS && is_hex(tag));
    tagged.map_or(hash, |(hash, _)| hash)
}

/// Of the objects of a file that is to be read, only one of those that differ in nothing but their
/// key: the first whose key is configured.
///
/// # Errors
///
/// The store could not be asked.
pub async fn readable(
    place: &Place,
    mut found: Vec<WalObject>,
) -> Result<Vec<WalObject>, RepositoryError> {
    if found.len() < 2 || found.iter().any(|it| it.hash != found[0].hash) {
        return Ok(found);
    }
    for at in 0..found.len() {
        match place.sealed_at(super::kind(&found[at].file), &found[at].name).await {
            Err(error) if error.is_locked() => {}
            Err(error) => return Err(error),
            Ok(_) => return Ok(vec![found.swap_remove(at)]),
        }
    }
    found.truncate(1);
    Ok(found)
}

/// Stores every timeline history that can be read with the key that writes, unless it is there: so
/// the others can be given up.
///
/// # Errors
///
/// The repository failed, or a history is damaged.
pub async fn rekey(place: &Place) -> Result<(), WalError> {
    let mut histories = BTreeMap::<_, Vec<WalObject>>::new();
    for wal in place.list("history/", None, None).await?.into_iter().filter_map(object) {
        if wal.file.ends_with(".history") {
            histories.entry((wal.file.clone(), wal.hash.clone())).or_default().push(wal);
        }
    }
    let each = histories.into_values().map(|objects| rekey_one(place, objects));
    stream::iter(each).buffer_unordered(AT_ONCE).try_collect().await
}

/// The same of one history, of which these are the objects.
async fn rekey_one(place: &Place, objects: Vec<WalObject>) -> Result<(), WalError> {
    for wal in &objects {
        if place.has_same_key(Kind::History, &wal.name).await? {
            return Ok(());
        }
    }
    let mut text = Vec::new();
    let found = readable(place, objects).await?;
    let Some(first) = found.first() else { return Ok(()) };
    let take = |chunk: &[u8]| {
        text.extend_from_slice(chunk);
        Ok(())
    };
    match read(place, first, take).await {
        Ok(()) => {}
        // The server may have it.
        Err(error) if error.is_locked() => return Ok(()),
        Err(error) => return Err(error),
    }
    let name = format!("{}{}{}", stem(&first.file), first.hash, tag(place.keys()));
    Ok(place.put_once(Kind::History, &name, &text).await?)
}

/// The histories that no configured key opens, and why.
///
/// # Errors
///
/// The store could not be asked.
pub async fn locked(place: &Place) -> Result<Vec<RepositoryError>, RepositoryError> {
    let mut files = BTreeMap::<_, Option<RepositoryError>>::new();
    for wal in place.list("history/", None, None).await?.into_iter().filter_map(object) {
        if !wal.file.ends_with(".history") || matches!(files.get(&wal.file), Some(None)) {
            continue;
        }
        let opened = place.sealed_at(Kind::History, &wal.name).await;
        files.insert(wal.file, opened.err().filter(RepositoryError::is_locked));
    }
    Ok(files.into_values().flatten().collect())
}
