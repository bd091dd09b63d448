//! Who belongs to Patroni's cluster, from one run of this monitor to the next; pure.
//!
//! Patroni's key of a member vanishes with it, whether it died or was taken away in order: that it is not
//! listed any more says nothing. So whoever was a member once is watched, and missed where it does not
//! answer, until Patroni lists it again, or somebody says that it is gone for good (`forget`).

mod keep;

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use shared::pg::Node;
use shared::topology::{Member, Members};

use crate::component::{Component, Kind};
use crate::facts::Membership;

pub(crate) use keep::load;
pub use keep::{ForgetArgs, Keeper, Known, forget};

/// A member, as it is kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Its group.
    pub group: u32,
    /// Its name.
    pub name: String,
    /// Where its server listens.
    pub host: String,
    /// The server's port.
    pub port: u16,
    /// Its Patroni's REST API, if it ever told.
    pub api_url: Option<String>,
    /// Somebody has said that it is gone for good. Whoever sees it listed again takes that back.
    #[serde(default)]
    pub is_forgotten: bool,
}

impl Entry {
    /// As a node to ask.
    pub fn node(&self) -> Node {
        let Self { group, name, host, port, .. } = self;
        Node { group: *group, name: name.clone(), host: host.clone(), port: *port }
    }
}

/// The members that were ever seen, by group and name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Vec<Entry>", into = "Vec<Entry>")]
pub struct Roster(BTreeMap<(u32, String), Entry>);

impl From<Vec<Entry>> for Roster {
    fn from(all: Vec<Entry>) -> Self {
        Self(all.into_iter().map(|it| ((it.group, it.name.clone()), it)).collect())
    }
}

impl From<Roster> for Vec<Entry> {
    fn from(roster: Roster) -> Self {
        roster.0.into_values().collect()
    }
}

/// Who was meant by [`Roster::forget`].
#[derive(Debug)]
pub struct Forgotten<'a> {
    /// The member.
    pub entry: &'a Entry,
    /// It was forgotten already.
    pub was_before: bool,
}

impl Roster {
    /// Takes up what is kept: members of before, and who is forgotten. What is missing there was lost.
    pub fn take_kept(&mut self, kept: &Self) {
        for (key, kept) in &kept.0 {
            let known = self.0.entry(key.clone()).or_insert_with(|| kept.clone());
            known.is_forgotten = kept.is_forgotten;
        }
    }

    /// Takes what Patroni lists. A Patroni that is silent is no reason to forget where it answered.
    pub fn take_listed(&mut self, members: &[Member]) {
        for Member { node, api_url, .. } in members {
            let key = (node.group, node.name.clone());
            let before = self.0.remove(&key).and_then(|it| it.api_url);
            let Node { group, name, host, port } = node.clone();
            let api_url = api_url.clone().or(before);
            self.0.insert(key, Entry { group, name, host, port, api_url, is_forgotten: false });
        }
    }

    /// Those that are watched.
    pub fn watched(&self) -> impl Iterator<Item = &Entry> {
        self.0.values().filter(|it| !it.is_forgotten)
    }

    /// Marks a member that is gone for good. One that is marked already is no error: whoever was stopped right after
    /// it says it again.
    ///
    /// # Errors
    ///
    /// There is none of that name, or more than one.
    pub fn forget(&mut self, name: &str, group: Option<u32>) -> Result<Forgotten<'_>, String> {
        let is_meant =
            |it: &&mut Entry| it.name == name && group.is_none_or(|group| it.group == group);
        let known: Vec<String> =
            self.watched().map(|it| format!("{} of group {}", it.name, it.group)).collect();
        let mut found: Vec<&mut Entry> = self.0.values_mut().filter(is_meant).collect();
        if found.iter().any(|it| !it.is_forgotten) {
            found.retain(|it| !it.is_forgotten);
        }
        match (found.pop(), found.is_empty()) {
            (Some(entry), true) => {
                let was_before = std::mem::replace(&mut entry.is_forgotten, true);
                Ok(Forgotten { entry, was_before })
            }
            (Some(_), false) => Err(format!("several are called `{name}`: say --group too")),
            (None, _) if known.is_empty() => Err("no members are known".to_owned()),
            (None, _) => {
                Err(format!("no member is called `{name}`; known are {}", known.join(", ")))
            }
        }
    }
}

/// How well it is known who belongs to the cluster called `scope`, of which Patroni lists these.
pub fn membership(
    scope: &str,
    listed: Option<&Members>,
    known: &Known,
    is_early: bool,
) -> Membership {
    let unknown = match (listed, &known.problem) {
        (None, _) => Some(format!("nobody says who the members of Patroni's `{scope}` are")),
        (Some(_), _) if known.is_read => None,
        (Some(_), Some(problem)) => {
            Some(format!("who was a member before cannot be read: {problem}"))
        }
        (Some(_), None) => Some("who was a member before is not known yet".to_owned()),
    };
    let left = known.roster.watched().map(Entry::node).filter(|node| {
        listed.is_some_and(|it| {
            !it.list.iter().any(|it| (it.node.group, &it.node.name) == (node.group, &node.name))
        })
    });
    let manned: BTreeSet<u32> = known.roster.watched().map(|it| it.group).collect();
    let empty = listed.map(|it| it.empty_groups.clone()).unwrap_or_default();
    Membership {
        is_early: is_early && unknown.is_some(),
        unknown,
        empty_groups: empty.difference(&manned).copied().collect(),
        left: left.map(|it| Component::of_group(Kind::Postgres, it.group, it.name)).collect(),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use shared::topology::Source;

    use super::*;

    pub(crate) fn member(group: u32, name: &str) -> Member {
        let node = Node { group, name: name.to_owned(), host: name.to_owned(), port: 5432 };
        Member { node, api_url: Some(format!("http://{name}:8008/patroni")), opinion: None }
    }

    fn names(roster: &Roster) -> String {
        roster.watched().map(|it| it.name.as_str()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn a_member_is_known_until_it_is_forgotten_and_again_when_it_is_listed() {
        let mut roster = Roster::default();
        roster.take_listed(&[member(0, "a"), member(0, "b")]);
        let kept = roster.clone();
        // Its key is gone, and so is that of all.
        roster.take_listed(&[member(0, "a")]);
        roster.take_listed(&[]);
        assert_eq!(names(&roster), "a b");
        // Another run, or another replica.
        let mut next = Roster::default();
        next.take_listed(&[member(0, "a"), member(1, "c")]);
        next.take_kept(&kept);
        assert_eq!(names(&next), "a b c");
        // Somebody says that it is gone; what is kept was lost; it is listed again.
        let mut said = kept.clone();
        assert_eq!(said.forget("b", None).unwrap().entry.name, "b");
        next.take_kept(&said);
        assert_eq!(names(&next), "a c");
        next.take_kept(&Roster::default());
        next.take_listed(&[member(0, "a")]);
        assert_eq!(names(&next), "a c");
        next.take_listed(&[member(0, "b")]);
        assert_eq!(names(&next), "a b c");
    }

    #[test]
    fn where_its_patroni_answered_is_not_forgotten() {
        let mut roster = Roster::default();
        roster.take_listed(&[member(0, "a")]);
        roster.take_listed(&[Member { api_url: None, ..member(0, "a") }]);
        let api_url = roster.watched().next().unwrap().api_url.clone();
        assert_eq!(api_url.as_deref(), Some("http://a:8008/patroni"));
    }

    #[test]
    fn who_is_meant_must_be_one() {
        let mut roster = Roster::default();
        assert_eq!(roster.forget("a", None).unwrap_err(), "no members are known");
        roster.take_listed(&[member(0, "a"), member(1, "a"), member(1, "b")]);
        let error = roster.forget("a", None).unwrap_err();
        assert_eq!(error, "several are called `a`: say --group too");
        let error = roster.forget("x", None).unwrap_err();
        assert!(error.ends_with("known are a of group 0, a of group 1, b of group 1"), "{error}");
        let forgotten = roster.forget("a", Some(1)).unwrap();
        assert_eq!((forgotten.entry.group, forgotten.was_before), (1, false));
        assert_eq!(names(&roster), "a b");
        // Once more; and the one that is left is meant where no group is said.
        let again = roster.forget("a", Some(1)).unwrap();
        assert_eq!((again.entry.group, again.was_before), (1, true));
        let other = roster.forget("a", None).unwrap();
        assert_eq!((other.entry.group, other.was_before), (0, false));
        assert_eq!(names(&roster), "b");
        assert!(
            roster.forget("a", None).is_err(),
            "both are forgotten: which one is meant is not known"
        );
    }

    #[test]
    fn who_is_known_and_how_well() {
        let listed = |names: &[&str], empty_groups: &[u32]| Members {
            list: names.iter().map(|it| member(0, it)).collect(),
            empty_groups: empty_groups.iter().copied().collect(),
            source: Source::Etcd,
            stale_since: None,
        };
        let known = |is_read, problem: Option<&str>| {
            let mut roster = Roster::default();
            roster.take_listed(&[member(0, "a"), member(0, "b"), member(1, "c")]);
            Known { roster, is_read, problem: problem.map(str::to_owned) }
        };
        let nobody = "nobody says who the members of Patroni's `demo` are";
        for (case, listed, known, unknown, left, empty) in [
            ("all is well", Some(listed(&["a", "b"], &[])), known(true, None), None, "c", ""),
            ("nobody lists them", None, known(true, None), Some(nobody), "", ""),
            (
                "those of before are not known",
                Some(listed(&["a"], &[])),
                known(false, Some("etcd is away")),
                Some("who was a member before cannot be read: etcd is away"),
                "b c",
                "",
            ),
            (
                "what is known cannot be kept",
                Some(listed(&["a"], &[])),
                known(true, Some("etcd is away")),
                None,
                "b c",
                "",
            ),
            ("groups", Some(listed(&["a", "b"], &[1, 2])), known(true, None), None, "c", "2"),
        ] {
            let found = membership("demo", listed.as_ref(), &known, false);
            assert_eq!(found.unknown.as_deref(), unknown, "{case}");
            let names: Vec<_> = found.left.iter().map(|it| it.name.as_str()).collect();
            assert_eq!(names.join(" "), left, "{case}");
            let groups: Vec<_> = found.empty_groups.iter().map(u32::to_string).collect();
            assert_eq!(groups.join(" "), empty, "{case}");
            assert!(!found.is_early);
            let early = membership("demo", listed.as_ref(), &known, true);
            assert_eq!(early.is_early, unknown.is_some(), "{case}");
        }
    }

    #[test]
    fn it_is_kept_as_a_list() {
        let mut roster = Roster::default();
        roster.take_listed(&[member(0, "a")]);
        let text = serde_json::to_string(&roster).unwrap();
        assert_eq!(
            text,
            "[{\"group\":0,\"name\":\"a\",\"host\":\"a\",\"port\":5432,\
             \"api_url\":\"http://a:8008/patroni\",\"is_forgotten\":false}]"
        );
        assert_eq!(serde_json::from_str::<Roster>(&text).unwrap(), roster);
    }
}
