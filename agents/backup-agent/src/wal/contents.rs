//! Which of several objects of one file hold a content. Two that open are two contents, and nobody knows
//! which is right. One that does not open, beside one that does, is what a copy that was broken off or
//! a store has left: it is none.

use shared::telemetry::chain;
use tracing::warn;

use super::{WalMap, WalObject, kind};
use crate::repository::{Place, RepositoryError};

/// The objects of one file that hold a content, and those that hold none. Asks for the header, the name
/// and the end of each, and only if there are several contents by their names.
///
/// # Errors
///
/// The store could not be asked.
pub(super) async fn split(
    place: &Place,
    found: Vec<WalObject>,
) -> Result<(Vec<WalObject>, Vec<WalObject>), RepositoryError> {
    if found.iter().all(|it| it.hash == found[0].hash) {
        return Ok((found, Vec::new()));
    }
    let mut looked = Vec::new();
    for wal in found {
        let opened = Box::pin(place.open(kind(&wal.file), &wal.name, None)).await;
        let damage = match opened {
            Err(error) if error.is_damage() => Some(chain(&error).to_string()),
            // What another key has sealed is another content, for all anybody knows.
            Err(RepositoryError::Container(_)) | Ok(_) => None,
            Err(error) => return Err(error),
        };
        looked.push((wal, damage));
    }
    let (contents, none) = sort_out(looked);
    for (wal, error) in &none {
        let object = &wal.name;
        warn!(object, error, "an object of WAL does not open and is left out: another one does");
    }
    Ok((contents, none.into_iter().map(|(wal, _)| wal).collect()))
}

/// Which of several hold a content, if for each it is known what is wrong with it: those with which
/// nothing is, or all if there are none of these.
fn sort_out<T>(looked: Vec<(T, Option<String>)>) -> (Vec<T>, Vec<(T, String)>) {
    let any_opens = looked.iter().any(|(_, damage)| damage.is_none());
    let (mut contents, mut none) = (Vec::new(), Vec::new());
    for (object, damage) in looked {
        match damage.filter(|_| any_opens) {
            Some(damage) => none.push((object, damage)),
            None => contents.push(object),
        }
    }
    (contents, none)
}

/// The objects of one file that hold a content.
///
/// # Errors
///
/// The store could not be asked.
pub(super) async fn contents(
    place: &Place,
    found: Vec<WalObject>,
) -> Result<Vec<WalObject>, RepositoryError> {
    Ok(split(place, found).await?.0)
}

impl WalMap {
    /// Leaves the objects out that hold no content, where another one does.
    pub(super) async fn leave_out_unopened(
        &mut self,
        place: &Place,
    ) -> Result<(), RepositoryError> {
        for several in self.segments.values_mut().flat_map(|timeline| timeline.values_mut()) {
            if several.len() > 1 {
                let (contents, none) = split(place, std::mem::take(several)).await?;
                *several = contents;
                self.unopened.extend(none);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;
    use shared::store::ObjectInfo;

    use super::*;
    use crate::wal::object;

    #[test]
    fn what_does_not_open_beside_what_does_holds_no_content() {
        for (case, opens, contents) in [
            ("one that is damaged", &[false][..], &[0][..]),
            ("two that open", &[true, true], &[0, 1]),
            ("the first alone opens", &[true, false], &[0]),
            ("the last alone opens", &[false, false, true], &[2]),
            ("none opens", &[false, false], &[0, 1]),
        ] {
            let damage = |opens: &bool| (!opens).then(|| "truncated".to_owned());
            let looked = opens.iter().map(damage).enumerate().collect();
            let (found, none) = sort_out(looked);
            assert_eq!(found, contents, "{case}");
            assert_eq!(found.len() + none.len(), opens.len(), "{case}");
        }
    }

    #[test]
    fn a_name_ends_with_the_hash_of_a_content_or_is_none() {
        let hash = "0123456789abcdef";
        let segment = "wal/00000001/0000000100000000/000000010000000000000014";
        for (name, expected) in [
            (format!("{segment}-{hash}"), true),
            (format!("history/00000002.history-{hash}"), true),
            (format!("history/00000002.history-{hash}89abcdef"), true),
            (format!("{segment}-aaaa.tmp"), false),
            (format!("{segment}-{hash}.tmp"), false),
            (format!("{segment}-{hash}.1a2b3c4d.partial"), false),
            (format!("{segment}-{}", hash.to_uppercase()), false),
            (format!("{segment}-{hash}89abcdef"), false),
            (format!("{segment}-{}", &hash[1..]), false),
            (format!("{segment}-"), false),
            (segment.to_owned(), false),
            (format!("history/00000002.history-{hash}.tmp"), false),
            (format!("history/00000002.history-{hash}89abcdefg"), false),
        ] {
            let info =
                ObjectInfo { key: name.clone(), bytes: 1, modified_at: DateTime::UNIX_EPOCH };
            let found = object(info);
            assert_eq!(found.is_some(), expected, "{name}");
            assert!(found.is_none_or(|it| it.hash == hash), "{name}");
        }
    }
}
