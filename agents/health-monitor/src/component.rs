//! What the cluster is made of.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A kind of component.
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Serialize,
    Deserialize,
    clap::ValueEnum,
)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum Kind {
    /// The cluster as a whole, and this monitor's view of it.
    Cluster,
    /// A group: a coordinator or a worker with its standbys.
    Group,
    /// A PostgreSQL server, asked by SQL.
    Postgres,
    /// A member's Patroni, asked by its REST API.
    Patroni,
    /// A member of etcd.
    Etcd,
    /// A `PgBouncer`.
    Pgbouncer,
    /// An `HAProxy`.
    Haproxy,
    /// A Redis server.
    Redis,
    /// Another agent of ours.
    Agent,
    /// What the backup agent has stored of a group.
    Repository,
    /// A Swarm service.
    Swarm,
    /// A file system of the host this monitor runs on.
    Disk,
}

impl Kind {
    /// Its name in labels, configuration and `/status`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Cluster => "cluster",
            Self::Group => "group",
            Self::Postgres => "postgres",
            Self::Patroni => "patroni",
            Self::Etcd => "etcd",
            Self::Pgbouncer => "pgbouncer",
            Self::Haproxy => "haproxy",
            Self::Redis => "redis",
            Self::Agent => "agent",
            Self::Repository => "repository",
            Self::Swarm => "swarm",
            Self::Disk => "disk",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// One component. Its order is that of the status page: groups with their nodes by number.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Component {
    /// What it is.
    pub kind: Kind,
    /// The group it belongs to, if it belongs to one.
    pub group: Option<u32>,
    /// Its name: a node's, or the one that the configuration gives. Empty for a group and the cluster.
    pub name: String,
}

impl Component {
    /// The cluster.
    pub fn cluster() -> Self {
        Self { kind: Kind::Cluster, group: None, name: String::new() }
    }

    /// A group.
    pub fn group(group: u32) -> Self {
        Self { kind: Kind::Group, group: Some(group), name: String::new() }
    }

    /// A component of a group.
    pub fn of_group(kind: Kind, group: u32, name: impl Into<String>) -> Self {
        Self { kind, group: Some(group), name: printable(name) }
    }

    /// A component that belongs to no group.
    pub fn new(kind: Kind, name: impl Into<String>) -> Self {
        Self { kind, group: None, name: printable(name) }
    }
}

/// Text of somebody else, as it may go to a terminal or into one line of a message: what would move the
/// cursor, begin a line or turn the direction is replaced.
pub fn printable(text: impl Into<String>) -> String {
    let text = text.into();
    let turns = |it| matches!(it, '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    let is_plain = |it: char| !it.is_control() && !turns(it);
    if text.chars().all(is_plain) {
        return text;
    }
    text.chars().map(|it| if is_plain(it) { it } else { char::REPLACEMENT_CHARACTER }).collect()
}

/// As in `postgres worker-1 of group 1`.
impl fmt::Display for Component {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.kind, self.group) {
            (Kind::Cluster, _) => f.write_str("cluster"),
            (Kind::Group, Some(group)) => write!(f, "group {group}"),
            (kind, Some(group)) if self.name.is_empty() => write!(f, "{kind} of group {group}"),
            (kind, Some(group)) => write!(f, "{kind} {} of group {group}", self.name),
            (kind, None) => write!(f, "{kind} {}", self.name),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_one_line_of_plain_text() {
        for (name, expected) in [
            ("Käthe 1", "postgres Käthe 1 of group 0"),
            ("x\u{1b}[2Jy\nOK: all fine", "postgres x\u{fffd}[2Jy\u{fffd}OK: all fine of group 0"),
            ("a\u{202e}b\u{9b}", "postgres a\u{fffd}b\u{fffd} of group 0"),
        ] {
            assert_eq!(Component::of_group(Kind::Postgres, 0, name).to_string(), expected);
        }
    }

    #[test]
    fn a_component_is_named_as_people_do() {
        for (component, expected) in [
            (Component::cluster(), "cluster"),
            (Component::group(1), "group 1"),
            (Component::of_group(Kind::Postgres, 1, "worker-1"), "postgres worker-1 of group 1"),
            (Component::of_group(Kind::Repository, 1, ""), "repository of group 1"),
            (Component::new(Kind::Etcd, "etcd-1"), "etcd etcd-1"),
        ] {
            assert_eq!(component.to_string(), expected);
        }
    }
}
