//! Which database cluster is a group's. A server of another one may answer under the group's names: by a
//! wrong address, or because the cluster was made anew. Nothing is stored of it until somebody says which.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use shared::pg::Node;
use shared::telemetry::chain;
use shared::topology::{Group, GroupError, NodeState, Role};
use thiserror::Error;
use tracing::warn;

use super::begun::{self, Said};
use super::reached::Reached;
use crate::repository::{Repository, RepositoryError};

/// The database clusters of a group that the repository knows, and when it was last said of each that it
/// is the group's; `None` if only base backups of it are there.
pub(crate) type Known = BTreeMap<u64, Option<DateTime<Utc>>>;

/// Why a server is not taken for the group's.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ClusterError {
    /// The repository holds another database cluster under this name.
    #[error(
        "{node} is of the database cluster with system identifier {found}, and the repository holds {known} \
         for group {group}: nothing of {node} is stored. Is it the wrong server? Then correct the \
         configuration. Was the database cluster made anew (initdb, pg_upgrade), or is an earlier one back? \
         Then say so with `backup-agent begin --group {group}`, and take a backup"
    )]
    Other {
        /// The group.
        group: u32,
        /// The server.
        node: String,
        /// Its system identifier.
        found: u64,
        /// What the repository holds, or what was followed before.
        known: u64,
    },
    /// Several database clusters answer, and nobody said which is the group's.
    #[error(
        "group {group} mixes database clusters, and the repository does not tell which is its own: {}. Take \
         the others out of the configuration", nodes.join(", ")
    )]
    Unclear {
        /// The group.
        group: u32,
        /// Each server with its system identifier.
        nodes: Vec<String>,
    },
}

/// Why no server is the primary to follow.
#[derive(Clone, Debug, Error)]
pub enum NotLed {
    /// There is none, or there are several.
    #[error(transparent)]
    Group(#[from] GroupError),
    /// It is of another database cluster.
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    /// What the repository holds of the group is not known.
    #[error("the repository does not say which database cluster is the group's: {0}")]
    Repository(String),
}

/// Reads which database clusters the repository knows of a group. WAL alone proves nothing: the archiver
/// of any server stores it.
pub(crate) async fn known(repository: &Repository, group: u32) -> Result<Known, RepositoryError> {
    let (mut known, mut unopened) = (Known::new(), None::<(DateTime<Utc>, String, _)>);
    for place in repository.places(group).await? {
        let mark = match begun::last_said(&place).await? {
            Said::At(mark) => mark,
            Said::Unopened(at, error) => {
                known.insert(place.system_identifier, None);
                if unopened.as_ref().is_none_or(|(before, ..)| *before < at) {
                    unopened = Some((at, place.location(), error));
                }
                continue;
            }
        };
        if mark.is_some() || !place.list_folders("base/").await?.is_empty() {
            known.insert(place.system_identifier, mark);
        }
    }
    match unopened {
        // What was said later counts; and without several there is nothing to choose from.
        Some((at, ..)) if Some(at) < known.values().flatten().copied().max() => Ok(known),
        Some((_, place, error)) if known.len() > 1 => {
            Err(RepositoryError::Unsaid { place, group, source: Box::new(error) })
        }
        Some((_, place, error)) => {
            let error = chain(&error);
            warn!(group, place, %error, "the mark of the only place of the group does not open: `backup-agent begin` makes another");
            Ok(known)
        }
        None => Ok(known),
    }
}

/// The database cluster of which it was last said that it is the group's, and when that was; any one of
/// several of which it never was.
fn newest(known: &Known) -> Option<(u64, Option<DateTime<Utc>>)> {
    known.iter().max_by_key(|(_, mark)| **mark).map(|(it, mark)| (*it, *mark))
}

/// Refuses a server of another database cluster than the repository knows, or of one that another has
/// followed.
pub(crate) fn require(
    known: &Known,
    (group, node, found): (u32, &Node, u64),
) -> Result<(), ClusterError> {
    match newest(known) {
        Some((newest, mark)) if known.get(&found) != Some(&mark) => {
            Err(ClusterError::Other { group, node: node.to_string(), found, known: newest })
        }
        _ => Ok(()),
    }
}

/// The database cluster that is the group's: the one that is `followed`, unless another was begun after
/// it; or, of those that answer, the last that was begun.
pub(crate) fn own(
    group: &Group,
    followed: Option<u64>,
    known: &Known,
) -> Result<Option<u64>, ClusterError> {
    let present: BTreeMap<u64, &Node> =
        states(group).map(|(node, state)| (state.system_identifier, node)).collect();
    let begun = |it: &u64| known.get(it).copied().flatten();
    if let Some(followed) = followed {
        let later = present.keys().filter(|it| begun(it) > begun(&followed));
        return Ok(Some(later.max_by_key(|it| begun(it)).copied().unwrap_or(followed)));
    }
    let mut candidates: Vec<u64> = present.keys().copied().collect();
    if let Some((_, mark)) = newest(known) {
        candidates.retain(|it| known.get(it) == Some(&mark));
    }
    match (candidates.as_slice(), present.first_key_value()) {
        ([only], _) => Ok(Some(*only)),
        (_, None) => Ok(None),
        ([], Some((found, node))) => {
            require(known, (group.number, node, *found)).map(|()| Some(*found))
        }
        (_, Some(_)) => {
            let name = |(node, state): (&Node, &NodeState)| {
                format!("{} has system identifier {}", node.name, state.system_identifier)
            };
            let nodes = states(group).map(name).collect();
            Err(ClusterError::Unclear { group: group.number, nodes })
        }
    }
}

/// The primary to follow, of the database cluster `own`: after a failover an old one may be back, on a
/// lower timeline. None is that is on a lower one than `at_least`, which the cluster has reached.
pub(crate) fn leading(
    group: &Group,
    own: Option<u64>,
    at_least: Option<u32>,
) -> Result<(&Node, &NodeState), NotLed> {
    let is_own = |state: &NodeState| own.is_none_or(|own| own == state.system_identifier);
    let is_over = |state: &NodeState| at_least.is_some_and(|least| state.timeline < least);
    if let Some(known) = own
        && !states(group).any(|(_, state)| is_own(state))
        && let Some((node, state)) = states(group).next()
    {
        let (node, found) = (node.to_string(), state.system_identifier);
        return Err(ClusterError::Other { group: group.number, node, found, known }.into());
    }
    let primaries = states(group)
        .filter(|(_, state)| state.role == Role::Primary && is_own(state) && !is_over(state));
    let newest = primaries.clone().map(|(_, state)| state.timeline).max();
    let newest: Vec<_> = primaries.filter(|(_, state)| Some(state.timeline) == newest).collect();
    let number = group.number;
    match newest.as_slice() {
        [primary] => Ok(*primary),
        [] => {
            let nodes = group.nodes.iter().map(|it| match &it.state {
                Ok(state) if !is_own(state) => {
                    format!("{} is of another database cluster", it.node.name)
                }
                Ok(state) if state.role == Role::Primary => {
                    format!(
                        "{} is a primary on timeline {}, which is over: the group has reached {}",
                        it.node.name,
                        state.timeline,
                        at_least.unwrap_or_default()
                    )
                }
                _ => it.to_string(),
            });
            Err(GroupError::NoPrimary { group: number, nodes: nodes.collect() }.into())
        }
        several => {
            let name = |(node, state): &(&Node, &NodeState)| {
                format!("{} on timeline {}", node.name, state.timeline)
            };
            let nodes = several.iter().map(name).collect();
            Err(GroupError::SeveralPrimaries { group: number, nodes }.into())
        }
    }
}

/// The newest primary of the only database cluster that answers, whether it is the group's or is to be.
///
/// # Errors
///
/// There is none, or several clusters answer.
pub(crate) fn the_only(group: &Group) -> Result<(&Node, &NodeState), NotLed> {
    match group.primary() {
        Err(GroupError::SeveralPrimaries { .. }) => leading(group, None, None),
        primary => Ok(primary?),
    }
}

/// What a group is found to be, without anything that was followed before.
#[derive(Debug)]
pub(crate) struct Judged<'a> {
    /// Its database cluster, if that is known.
    pub(crate) own: Option<u64>,
    /// The newest timeline that it is known to have reached.
    pub(crate) newest: Option<u32>,
    /// The primary to follow.
    pub(crate) leader: Result<(&'a Node, &'a NodeState), NotLed>,
}

/// Finds out which database cluster is the group's, and which server is to be followed.
pub(crate) async fn judge<'a>(repository: &Repository, group: &'a Group) -> Judged<'a> {
    let known = match known(repository, group.number).await {
        Ok(known) => known,
        // Without several to choose from, it is tried. What is there and does not open is told.
        Err(RepositoryError::Store(_)) if is_one(group) => Known::new(),
        Err(failure) => {
            let leader = Err(NotLed::Repository(chain(&failure).to_string()));
            return Judged { own: None, newest: None, leader };
        }
    };
    let newest = newest(&known).map(|(newest, _)| newest);
    match own(group, None, &known) {
        Ok(own) => {
            let mut reached = Reached::default();
            reached.see(group, own, None);
            let (leader, timeline) = (leading(group, own, reached.timeline()), reached.timeline());
            Judged { own: own.or(newest), newest: timeline, leader }
        }
        Err(reason) => Judged { own: newest, newest: None, leader: Err(reason.into()) },
    }
}

/// A group of its own servers alone, and of its primaries the one to follow.
///
/// # Errors
///
/// There is none.
pub(crate) async fn own_servers(
    repository: &Repository,
    mut group: Group,
) -> Result<Group, NotLed> {
    let (leader, state) = judge(repository, &group).await.leader?;
    let (leader, own) = (leader.clone(), state.system_identifier);
    let is_own = |node: &Node, state: &NodeState| {
        state.system_identifier == own && (state.role == Role::Standby || *node == leader)
    };
    group.nodes.retain(|it| it.state.as_ref().map_or(true, |state| is_own(&it.node, state)));
    Ok(group)
}

/// Whether all servers that answered are of one database cluster.
fn is_one(group: &Group) -> bool {
    let mut identifiers = states(group).map(|(_, state)| state.system_identifier);
    let first = identifiers.next();
    identifiers.all(|it| Some(it) == first)
}

/// The servers that answered.
pub(super) fn states(group: &Group) -> impl Iterator<Item = (&Node, &NodeState)> + Clone {
    group.nodes.iter().filter_map(|it| Some((&it.node, it.state.as_ref().ok()?)))
}

#[cfg(test)]
pub(super) mod tests {
    use std::time::Duration;

    use chrono::TimeDelta;
    use shared::pg::ConnectError;
    use shared::topology::Observation;

    use super::*;

    /// A server's name, role, timeline and system identifier; `None` if it does not answer.
    pub(in super::super) type Server<'a> = (&'a str, Option<(Role, u32, u64)>);

    /// Added to the timeline of a standby that receives it.
    const RECEIVES: u32 = 1 << 16;

    /// A standby of cluster 7 that receives WAL of a timeline.
    pub(in super::super) fn receiving(name: &str, timeline: u32) -> Server<'_> {
        (name, Some((Role::Standby, RECEIVES + timeline, 7)))
    }

    pub(in super::super) fn group(nodes: &[Server<'_>]) -> Group {
        let observation = |(name, state): &Server<'_>| {
            let (name, host) = ((*name).to_owned(), (*name).to_owned());
            let node = Node { group: 0, name, host, port: 5432 };
            let state = state.map(|(role, timeline, system_identifier)| NodeState {
                role,
                system_identifier,
                timeline: timeline % RECEIVES,
                received_timeline: timeline.checked_sub(RECEIVES),
                flush_lsn: None,
                replay_lsn: None,
                server_version: 170_002,
                data_checksums: true,
                wal_segment_bytes: 16 << 20,
            });
            let limit = Duration::from_secs(10);
            let silent = || ConnectError::TimedOut { node: node.to_string(), limit }.into();
            Observation { state: state.ok_or_else(silent), node }
        };
        Group { number: 0, nodes: nodes.iter().map(observation).collect() }
    }

    const P: Role = Role::Primary;
    const S: Role = Role::Standby;

    #[test]
    fn the_cluster_that_is_known_is_the_groups() {
        let begun = |seconds| Some(DateTime::UNIX_EPOCH + TimeDelta::seconds(seconds));
        let both = group(&[("a", Some((P, 1, 7))), ("x", Some((P, 2, 8)))]);
        let (a, x) = (group(&[("a", Some((P, 1, 7)))]), group(&[("x", Some((P, 2, 8)))]));
        let silent = group(&[("a", None)]);
        for (case, group, followed, known, expected) in [
            ("the first start", &a, None, vec![], Ok(Some(7))),
            ("nobody answers", &silent, None, vec![(7, begun(1))], Ok(None)),
            ("nobody answers any more", &silent, Some(7), vec![], Ok(Some(7))),
            ("nobody can tell", &both, None, vec![], Err("mixes database clusters")),
            ("the repository holds one", &both, None, vec![(7, begun(1))], Ok(Some(7))),
            ("of one there are backups only", &both, None, vec![(7, None)], Ok(Some(7))),
            ("it holds neither", &both, None, vec![(9, begun(1))], Err("the repository holds 9")),
            ("it holds another", &x, None, vec![(7, begun(1))], Err("the repository holds 7")),
            ("it was made anew", &both, None, vec![(7, begun(1)), (8, begun(2))], Ok(Some(8))),
            ("it is back", &a, None, vec![(7, begun(3)), (8, begun(2))], Ok(Some(7))),
            (
                "nobody said that it is back",
                &a,
                None,
                vec![(7, begun(1)), (8, begun(2))],
                Err("the repository holds 8"),
            ),
            (
                "never said of the one before",
                &a,
                None,
                vec![(7, None), (8, begun(1))],
                Err("the repository holds 8"),
            ),
            ("of none was it said", &a, None, vec![(7, None), (8, None)], Ok(Some(7))),
            ("backups of both", &both, None, vec![(7, None), (8, None)], Err("mixes database")),
            ("one is followed", &both, Some(7), vec![(7, begun(1))], Ok(Some(7))),
            ("it is followed and away", &x, Some(7), vec![(7, begun(1))], Ok(Some(7))),
            ("an older one is back", &x, Some(7), vec![(8, begun(1)), (7, begun(2))], Ok(Some(7))),
            ("it is back and begun", &a, Some(8), vec![(7, begun(3)), (8, begun(2))], Ok(Some(7))),
            ("one is begun", &x, Some(7), vec![(7, begun(1)), (8, begun(2))], Ok(Some(8))),
        ] {
            let known = known.into_iter().collect();
            match (own(group, followed, &known), expected) {
                (Err(error), Err(part)) => {
                    assert!(error.to_string().contains(part), "{case}: {error}");
                }
                (found, expected) => assert_eq!(found.ok(), expected.ok(), "{case}"),
            }
        }
    }

    /// A restarted agent is as strict as one that has followed the cluster.
    #[test]
    fn the_one_of_which_it_was_last_said_is_received() {
        let begun = |seconds| Some(DateTime::UNIX_EPOCH + TimeDelta::seconds(seconds));
        let a = group(&[("a", Some((P, 1, 7)))]);
        for (case, known, expected) in [
            ("nothing is known", vec![], true),
            ("only backups", vec![(7, None)], true),
            ("only backups of both", vec![(7, None), (8, None)], true),
            ("it is the only one", vec![(7, begun(1))], true),
            ("another one", vec![(8, begun(1))], false),
            ("another one came after it", vec![(7, begun(1)), (8, begun(2))], false),
            ("it came back after another one", vec![(7, begun(3)), (8, begun(2))], true),
            ("it is older than the marks", vec![(7, None), (8, begun(2))], false),
        ] {
            let known: Known = known.into_iter().collect();
            let found = require(&known, (0, &a.nodes[0].node, 7));
            assert_eq!(found.is_ok(), expected, "{case}: {found:?}");
        }
    }

    #[test]
    fn the_primary_is_the_newest_of_its_own_cluster() {
        for (case, nodes, own, at_least, expected) in [
            ("alone", vec![("a", Some((P, 1, 7)))], None, None, Ok("a")),
            (
                "an old one is back",
                vec![("a", Some((P, 1, 7))), ("b", Some((P, 2, 7)))],
                Some(7),
                None,
                Ok("b"),
            ),
            (
                "another cluster's, on a higher timeline",
                vec![("x", Some((P, 9, 8))), ("a", Some((P, 1, 7)))],
                Some(7),
                None,
                Ok("a"),
            ),
            (
                "only another cluster's",
                vec![("x", Some((P, 9, 8)))],
                Some(7),
                None,
                Err("x (x:5432) is of the database cluster with system identifier 8"),
            ),
            (
                "its own is a standby",
                vec![("x", Some((P, 9, 8))), ("a", Some((S, 1, 7)))],
                Some(7),
                None,
                Err("no primary: x is of another database cluster, a is a standby"),
            ),
            (
                "two on one timeline",
                vec![("a", Some((P, 2, 7))), ("b", Some((P, 2, 7)))],
                None,
                None,
                Err("several primaries: a on timeline 2, b on timeline 2"),
            ),
            (
                "the one that is received from takes no logins",
                vec![("a", Some((P, 1, 7))), ("b", None)],
                Some(7),
                Some(2),
                Err(
                    "a is a primary on timeline 1, which is over: the group has reached 2, b is unknown",
                ),
            ),
            (
                "nothing is received, so the old one is looked at",
                vec![("a", Some((P, 1, 7))), ("b", None)],
                Some(7),
                None,
                Ok("a"),
            ),
        ] {
            let group = group(&nodes);
            let found = leading(&group, own, at_least).map(|(node, _)| node.name.as_str());
            match (found, expected) {
                (Err(error), Err(part)) => {
                    assert!(error.to_string().contains(part), "{case}: {error}");
                }
                (found, expected) => assert_eq!(found.ok(), expected.ok(), "{case}"),
            }
        }
    }
}
