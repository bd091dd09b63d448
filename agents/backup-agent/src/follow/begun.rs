//! Whether a place is the one into which WAL was stored before. An empty one is not: a mount is
//! missing, or the configuration says somewhere else. What would be acknowledged there is removed by
//! the server.
//!
//! That WAL was stored before is kept in etcd, if one is configured: there Patroni may have made the
//! slot. Without etcd, a slot that holds WAL back tells, as the agent marks the place before it makes
//! one.
//!
//! A mark also says that the group is of the place's database cluster. The first one is called `begun`;
//! each further one, of which the time is part of the name, was made by the command.

use std::collections::BTreeMap;

use chrono::{DateTime, NaiveDateTime, TimeDelta, Utc};
use shared::etcd::KeyValue;
use shared::pg::Connection;
use shared::pg::wal::{WalFile, segment_number};
use shared::store::ObjectInfo;
use tokio_postgres::types::PgLsn;

use super::cluster::{self, Known};
use super::{FollowError, Primary};
use crate::backup::Context;
use crate::container::Kind;
use crate::repository::{Place, Repository, RepositoryError};
use crate::slots;
use crate::wal;

/// The object that is made before the first slot is, and what the names of later marks begin with.
const BEGUN: &str = "begun";
/// The time in a later mark's name: no two of a group are of the same time.
const TIME: &str = "%Y%m%dT%H%M%S%.6fZ";

/// A mark of a place. In order of time.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Mark {
    /// The time in its name; `None` for the first one.
    named: Option<DateTime<Utc>>,
    name: String,
    modified_at: DateTime<Utc>,
}

/// What a mark of a moment is called.
fn name(at: DateTime<Utc>) -> String {
    format!("{BEGUN}-{}", at.format(TIME))
}

/// The time in a later mark's name, which may be followed by a key's tag.
fn named(name: &str) -> Option<DateTime<Utc>> {
    let time = name.strip_prefix(BEGUN)?.strip_prefix('-')?;
    let time = time.split('-').next().unwrap_or_default();
    Some(NaiveDateTime::parse_from_str(time, "%Y%m%dT%H%M%S%.fZ").ok()?.and_utc())
}

/// The marks of a place, oldest first.
async fn marks(place: &Place) -> Result<Vec<Mark>, RepositoryError> {
    let listed = place.list(BEGUN, None, None).await?;
    let mark = |info: ObjectInfo| {
        let named = if info.key == BEGUN { None } else { Some(named(&info.key)?) };
        Some(Mark { named, name: info.key, modified_at: info.modified_at })
    };
    let mut marks: Vec<_> = listed.into_iter().filter_map(mark).collect();
    marks.sort_unstable();
    Ok(marks)
}

/// Whether a place is marked.
pub(crate) async fn is_marked(place: &Place) -> Result<bool, RepositoryError> {
    Ok(!marks(place).await?.is_empty())
}

/// What the newest mark of a place says.
#[derive(Debug)]
pub(super) enum Said {
    /// When it was said of its database cluster that it is the group's; `None` if it never was.
    At(Option<DateTime<Utc>>),
    /// About when, by a mark that does not open: its key is not configured, or it is damaged.
    Unopened(DateTime<Utc>, RepositoryError),
}

/// When it was last said of a place that its database cluster is the group's.
pub(super) async fn last_said(place: &Place) -> Result<Said, RepositoryError> {
    let mut unopened: Option<(Mark, RepositoryError)> = None;
    for mark in marks(place).await?.into_iter().rev() {
        let sealed_at = match place.sealed_at(Kind::Begun, &mark.name).await {
            Err(error @ RepositoryError::Container(_)) => {
                unopened = unopened.or(Some((mark, error)));
                continue;
            }
            sealed_at => sealed_at?,
        };
        let at = mark.named.or(sealed_at).unwrap_or(mark.modified_at);
        return Ok(match unopened {
            Some((Mark { named: Some(later), .. }, error)) if at < later => {
                Said::Unopened(later, error)
            }
            _ => Said::At(Some(at)),
        });
    }
    Ok(unopened.map_or(Said::At(None), |(mark, error)| {
        Said::Unopened(mark.named.unwrap_or(mark.modified_at), error)
    }))
}

/// Says that a group is of a place's database cluster from now on, whatever was said before.
///
/// # Errors
///
/// The repository failed.
pub(crate) async fn begin(repository: &Repository, place: &Place) -> Result<(), RepositoryError> {
    let mut newest = None;
    for place in repository.places(place.group).await? {
        newest = newest.max(match last_said(&place).await? {
            Said::At(at) => at,
            // A key may be lost: what is said now counts nevertheless.
            Said::Unopened(at, _) => Some(at),
        });
    }
    // By this host's clock, which may be behind the one before.
    let after = newest.map(|newest| newest + TimeDelta::microseconds(1));
    mark(place, &name(after.map_or(Utc::now(), |after| after.max(Utc::now())))).await
}

async fn mark(place: &Place, name: &str) -> Result<(), RepositoryError> {
    place.put_once(Kind::Begun, name, b"").await
}

/// Stores the newest mark of each of a group's places once more with the key that writes, unless it is
/// there: so the others can be given up.
async fn rekey(
    repository: &Repository,
    group: u32,
    may_write: &(dyn Fn() -> bool + Sync),
) -> Result<(), FollowError> {
    for place in repository.places(group).await? {
        // Of one that does not open nothing is needed, or nothing would be received.
        let Said::At(Some(at)) = last_said(&place).await? else { continue };
        let marks = marks(&place).await?;
        let newest = marks.last().and_then(|it| it.named);
        let mut is_there = false;
        for it in marks.iter().filter(|it| it.named == newest) {
            is_there = is_there || place.has_same_key(Kind::Begun, &it.name).await?;
        }
        if !is_there {
            super::require(&place, may_write)?;
            mark(&place, &format!("{}-{}", name(at), wal::tag(place.keys()))).await?;
        }
    }
    Ok(())
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
    let prefix = format!("/pgmesh/{}/begun/{group}/", context.config.cluster);
    let before = match &context.etcd {
        Some(etcd) => {
            let entries = etcd.list(&prefix).await?.entries;
            let of = |it: KeyValue| {
                let system_identifier = it.key.strip_prefix(&prefix)?.parse().ok()?;
                Some((system_identifier, String::from_utf8_lossy(&it.value).into_owned()))
            };
            entries.into_iter().filter_map(of).collect()
        }
        None => BTreeMap::new(),
    };
    let stored_before = match &context.etcd {
        Some(_) => before.contains_key(system_identifier),
        None => slot_lsn.is_some(),
    };
    let location = place.location();
    let limit = slot_lsn.unwrap_or(PgLsn::from(u64::MAX));
    if is_marked(place).await? {
        rekey(&context.repository, *group, may_write).await?;
    } else {
        let (node, group) = (primary.node.to_string(), *group);
        if stored_before && !holds_before(place, primary.segment_bytes, limit).await? {
            return Err(FollowError::Empty { place: location, node, group });
        }
        let known = cluster::known(&context.repository, group).await?;
        if let Some((known, stored_in)) = stored_elsewhere(&before, &known, *system_identifier) {
            let (place, stored_in) = (location, stored_in.to_owned());
            return Err(FollowError::Elsewhere { place, node, group, known, stored_in });
        }
        super::require(place, may_write)?;
        mark(place, BEGUN).await?;
    }
    if let Some(etcd) = context.etcd.as_ref().filter(|_| !stored_before) {
        etcd.put(&format!("{prefix}{system_identifier}"), &location, None).await?;
    }
    Ok(())
}

/// A database cluster of the group of which WAL was stored `before`, and where, if the repository knows
/// nothing at all of the group: it was made anew, and the repository is another one.
fn stored_elsewhere<'a>(
    before: &'a BTreeMap<u64, String>,
    known: &Known,
    own: u64,
) -> Option<(u64, &'a str)> {
    let mut others = before.iter().filter(|(it, _)| known.is_empty() && **it != own);
    others.next_back().map(|(it, stored_in)| (*it, stored_in.as_str()))
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

#[cfg(test)]
mod tests {
    use std::fmt::Write;
    use std::fs;
    use std::path::Path;
    use std::time::{Duration, SystemTime};

    use shared::telemetry::chain;
    use tempfile::TempDir;

    use super::*;
    use crate::config::Config;
    use crate::keys::new_key_file;

    /// The repository in a directory, with these keys, of which the first one writes.
    async fn repository(directory: &Path, keys: &[&str]) -> Repository {
        let path = directory.display();
        let mut text = format!(
            "cluster = 'demo'\n[postgres]\nuser = 'postgres'\n[repository.directory]\npath = '{path}/r'\n\
             [encryption]\nwrite_key = '{}'\n",
            keys[0]
        );
        for key in keys {
            let file = directory.join(key);
            if !file.exists() {
                new_key_file(&file).unwrap();
            }
            write!(text, "[[encryption.keys]]\nid = '{key}'\nfile = '{path}/{key}'\n").unwrap();
        }
        fs::create_dir_all(directory.join("r")).unwrap();
        let file = directory.join("config.toml");
        fs::write(&file, text).unwrap();
        let config: Config = shared::config::load(&file).unwrap();
        Repository::open(&config).await.unwrap()
    }

    async fn newest(repository: &Repository) -> Option<u64> {
        let known = cluster::known(repository, 0).await.unwrap();
        known.iter().max_by_key(|(_, mark)| **mark).map(|(it, _)| *it)
    }

    #[tokio::test]
    async fn the_newest_mark_says_which_cluster_is_the_groups() {
        let directory = TempDir::new().unwrap();
        let repository = repository(directory.path(), &["k1"]).await;
        let (old, new) = (repository.place(0, 7), repository.place(0, 8));
        mark(&old, BEGUN).await.unwrap();
        assert_eq!(newest(&repository).await, Some(7));
        for (place, expected) in [(&new, 8), (&old, 7), (&old, 7), (&new, 8)] {
            begin(&repository, place).await.unwrap();
            assert_eq!(newest(&repository).await, Some(expected));
            assert!(is_marked(place).await.unwrap());
        }
        // A clock that was ahead, and a copy, of which each object is of another time.
        let ahead = Utc::now() + TimeDelta::hours(1);
        mark(&new, &name(ahead)).await.unwrap();
        begin(&repository, &old).await.unwrap();
        assert_eq!(newest(&repository).await, Some(7));
        let marks = marks(&new).await.unwrap();
        let copied = directory.path().join("r").join(new.key(&marks[0].name));
        let later = SystemTime::now() + Duration::from_hours(2);
        fs::File::options().append(true).open(copied).unwrap().set_modified(later).unwrap();
        assert_eq!(newest(&repository).await, Some(7));
    }

    /// As repositories of before have them, which somebody copied.
    #[tokio::test]
    async fn a_mark_without_a_time_in_its_name_is_of_the_time_at_which_it_was_sealed() {
        let directory = TempDir::new().unwrap();
        let repository = repository(directory.path(), &["k1"]).await;
        for place in [repository.place(0, 7), repository.place(0, 8)] {
            mark(&place, BEGUN).await.unwrap();
        }
        let old = directory.path().join("r").join(repository.place(0, 7).key(BEGUN));
        let later = SystemTime::now() + Duration::from_hours(1);
        fs::File::options().append(true).open(old).unwrap().set_modified(later).unwrap();
        assert_eq!(newest(&repository).await, Some(8));
    }

    #[tokio::test]
    async fn marks_outlive_the_key_that_sealed_them() {
        let directory = TempDir::new().unwrap();
        let with = async |keys: &[&str]| repository(directory.path(), keys).await;
        let before = with(&["k1"]).await;
        mark(&before.place(0, 7), BEGUN).await.unwrap();
        begin(&before, &before.place(0, 8)).await.unwrap();
        let known = cluster::known(&before, 0).await.unwrap();

        let locked = cluster::known(&with(&["k2"]).await, 0).await.unwrap_err();
        let locked = chain(&locked).to_string();
        for part in ["v1/demo/0/8", "begun-", "key k1, which is not configured", "begin --group 0"]
        {
            assert!(locked.contains(part), "{locked}");
        }
        let lost = TempDir::new().unwrap();
        let only = async |keys: &[&str]| repository(lost.path(), keys).await;
        mark(&only(&["k1"]).await.place(0, 7), BEGUN).await.unwrap();
        let anew = only(&["k2"]).await;
        assert_eq!(newest(&anew).await, Some(7), "there is no other");
        begin(&anew, &anew.place(0, 8)).await.unwrap();
        assert_eq!(newest(&anew).await, Some(8), "the key of the one before is lost");
        let both = with(&["k2", "k1"]).await;
        rekey(&both, 0, &|| true).await.unwrap();
        rekey(&both, 0, &|| true).await.unwrap();
        for place in [both.place(0, 7), both.place(0, 8)] {
            assert_eq!(marks(&place).await.unwrap().len(), 2);
        }
        for keys in [&["k1"][..], &["k2"], &["k2", "k1"]] {
            assert_eq!(cluster::known(&with(keys).await, 0).await.unwrap(), known, "{keys:?}");
        }
        // Said with the new key alone: who has only the old one does not know what it says.
        begin(&both, &both.place(0, 7)).await.unwrap();
        let locked = cluster::known(&with(&["k1"]).await, 0).await.unwrap_err();
        assert!(chain(&locked).to_string().contains("key k2, which is not"), "{locked}");
        assert_eq!(newest(&with(&["k2"]).await).await, Some(7));
    }

    #[tokio::test]
    async fn a_mark_that_is_damaged_counts_until_another_is_said() {
        let directory = TempDir::new().unwrap();
        let repository = repository(directory.path(), &["k1"]).await;
        let (old, new) = (repository.place(0, 7), repository.place(0, 8));
        let damage = async |place: &Place| {
            let name = marks(place).await.unwrap().pop().unwrap().name;
            fs::write(directory.path().join("r").join(place.key(&name)), [0; 200]).unwrap();
            name
        };
        begin(&repository, &old).await.unwrap();
        damage(&old).await;
        assert_eq!(newest(&repository).await, Some(7), "there is no other");
        begin(&repository, &new).await.unwrap();
        assert_eq!(newest(&repository).await, Some(8), "of one that does not matter any more");
        let name = damage(&new).await;
        let error = chain(&cluster::known(&repository, 0).await.unwrap_err()).to_string();
        assert!(error.contains(&name) && error.contains("v1/demo/0/8"), "{error}");
        begin(&repository, &old).await.unwrap();
        assert_eq!(newest(&repository).await, Some(7), "it was said anew");
    }

    #[test]
    fn a_cluster_that_the_repository_does_not_know_stored_elsewhere() {
        let before = |all: &[u64]| all.iter().map(|it| (*it, format!("place {it}"))).collect();
        let known = |all: &[u64]| all.iter().map(|it| (*it, None)).collect::<Known>();
        for (case, in_etcd, in_repository, expected) in [
            ("the first start", &[][..], &[][..], None),
            ("it is its own", &[8], &[], None),
            ("the earlier one is there", &[7], &[7], None),
            ("it was removed when it was no longer needed", &[7, 8], &[8], None),
            ("made anew, and the repository is another one", &[7], &[], Some(7)),
            ("twice", &[6, 7], &[], Some(7)),
        ] {
            let before: BTreeMap<u64, String> = before(in_etcd);
            let found = stored_elsewhere(&before, &known(in_repository), 8);
            assert_eq!(found.map(|(it, _)| it), expected, "{case}");
            assert!(found.is_none_or(|(it, place)| place == format!("place {it}")), "{case}");
        }
    }
}
