//! What etcd says about the replicas of one agent and the groups they hold.

use std::collections::{BTreeMap, BTreeSet};

use crate::etcd::{Change, KeyValue, LeaseId};

/// The keys below a prefix, as the watch on them has told so far.
#[derive(Debug, Default)]
pub(super) struct View {
    entries: BTreeMap<String, KeyValue>,
    /// What is newer than this is not known yet; `None` before the first list.
    revision: Option<i64>,
    jump: Option<Jump>,
}

/// What the watch could not tell one by one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Jump {
    /// Keys are gone, and nobody saw them being deleted.
    Unseen,
    /// The revision is lower than before: etcd was emptied, or restored from a snapshot. What was
    /// created before need not be there, and revisions of then mean nothing.
    OtherStore,
}

impl View {
    pub(super) fn take(&mut self, change: Change) {
        match change {
            Change::All { revision, entries } => {
                let entries = entries.into_iter().map(|it| (it.key.clone(), it)).collect();
                let before = std::mem::replace(&mut self.entries, entries);
                if Some(revision) < self.revision {
                    self.jump = Some(Jump::OtherStore);
                } else if before.keys().any(|key| !self.entries.contains_key(key)) {
                    self.jump.get_or_insert(Jump::Unseen);
                }
                self.revision = Some(revision);
            }
            Change::Put(entry) => {
                self.revision = self.revision.max(Some(entry.mod_revision));
                self.entries.insert(entry.key.clone(), entry);
            }
            Change::Deleted { key, revision } => {
                self.revision = self.revision.max(Some(revision));
                self.entries.remove(&key);
            }
        }
    }

    /// What could not be told one by one since the last call.
    pub(super) fn take_jump(&mut self) -> Option<Jump> {
        self.jump.take()
    }

    /// Tells whether the list has been read.
    pub(super) fn is_complete(&self) -> bool {
        self.revision.is_some()
    }

    pub(super) fn get(&self, key: &str) -> Option<&KeyValue> {
        self.entries.get(key)
    }

    /// The keys that live as long as a lease.
    pub(super) fn bound_to(&self, lease: LeaseId) -> impl Iterator<Item = &KeyValue> {
        self.entries.values().filter(move |entry| entry.lease == Some(lease))
    }

    /// Tells whether what was created in that revision is known, by now, to be no longer there.
    pub(super) fn has_lost(&self, key: &str, create_revision: i64) -> bool {
        let still_there =
            self.get(key).is_some_and(|entry| entry.create_revision == create_revision);
        !still_there && Some(create_revision) <= self.revision
    }

    /// The last parts of the keys below `prefix`.
    pub(super) fn names(&self, prefix: &str) -> BTreeSet<String> {
        self.entries.keys().filter_map(|key| key.strip_prefix(prefix)).map(str::to_owned).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(key: &str, create_revision: i64) -> KeyValue {
        let value = b"a".to_vec();
        let key = key.to_owned();
        KeyValue { key, value, create_revision, mod_revision: create_revision, lease: None }
    }

    #[test]
    fn a_key_is_lost_only_if_the_view_is_newer_than_the_key() {
        let mut view = View::default();
        assert!(!view.is_complete());
        assert!(!view.has_lost("k", 5), "nothing is known");
        view.take(Change::All { revision: 4, entries: vec![] });
        assert!(view.is_complete());
        assert!(!view.has_lost("k", 5), "the view is older");
        view.take(Change::Put(entry("k", 5)));
        assert!(!view.has_lost("k", 5), "it is there");
        view.take(Change::Deleted { key: "k".to_owned(), revision: 6 });
        assert!(view.has_lost("k", 5), "it was deleted");
        view.take(Change::Put(entry("k", 7)));
        assert!(view.has_lost("k", 5), "it is another's");
        assert!(!view.has_lost("k", 7));
        view.take(Change::All { revision: 9, entries: vec![entry("p/x", 8)] });
        assert!(view.has_lost("k", 7));
        assert_eq!(view.names("p/"), BTreeSet::from(["x".to_owned()]));
    }
    #[test]
    fn what_was_not_told_one_by_one_is_a_jump() {
        let all = |revision, keys: &[&str]| Change::All {
            revision,
            entries: keys.iter().map(|key| entry(key, 1)).collect(),
        };
        let deleted = Change::Deleted { key: "b".to_owned(), revision: 5 };
        for (case, changes, expected) in [
            ("the first list", vec![all(4, &["a"])], None),
            ("the same again", vec![all(4, &["a"]), all(4, &["a"])], None),
            ("one more", vec![all(4, &["a"]), all(9, &["a", "b"])], None),
            ("one less", vec![all(4, &["a", "b"]), all(9, &["a"])], Some(Jump::Unseen)),
            ("it was seen", vec![all(4, &["a", "b"]), deleted, all(9, &["a"])], None),
            ("emptied", vec![all(4, &["a"]), all(1, &[])], Some(Jump::OtherStore)),
            ("restored", vec![all(4, &["a"]), all(3, &["a"])], Some(Jump::OtherStore)),
            (
                "and broken again",
                vec![all(4, &["a"]), all(3, &["a"]), all(5, &[])],
                Some(Jump::OtherStore),
            ),
        ] {
            let mut view = View::default();
            for change in changes {
                view.take(change);
            }
            assert_eq!(view.take_jump(), expected, "{case}");
            assert_eq!(view.take_jump(), None, "{case}: told once");
        }
    }
}
