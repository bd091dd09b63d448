//! What each node says it is.

use std::collections::BTreeSet;
use std::fmt;

use futures_util::future::join_all;
use thiserror::Error;
use tokio_postgres::Row;
use tokio_postgres::types::PgLsn;

use crate::pg::connect::connect;
use crate::pg::wal::{SegmentSizeError, check_segment_bytes};
use crate::pg::{ConnectError, Connection, Node, QueryError, Settings};

/// What a server is in its cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// Takes writes.
    Primary,
    /// In recovery: follows a primary.
    Standby,
}

/// What a server said of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeState {
    /// Its role.
    pub role: Role,
    /// The cluster's number, given by `initdb` and shared by all standbys.
    pub system_identifier: u64,
    /// On a primary the timeline it writes. On a standby the newest it has received or replayed.
    pub timeline: u32,
    /// On a standby the timeline that it receives just now. `None` on one that receives nothing, whose
    /// `timeline` may be older than what it has replayed; and on a primary.
    pub received_timeline: Option<u32>,
    /// On a primary how far WAL is on its disk. On a standby how far streamed WAL is on its disk;
    /// `None` if it has streamed none since it started.
    pub flush_lsn: Option<PgLsn>,
    /// On a standby how far WAL is replayed. `None` on a primary.
    pub replay_lsn: Option<PgLsn>,
    /// `server_version_num`: 170002 is 17.2.
    pub server_version: u32,
    /// Whether data pages carry checksums.
    pub data_checksums: bool,
    /// `wal_segment_size` in bytes, checked.
    pub wal_segment_bytes: u64,
}

impl NodeState {
    /// The major version of PostgreSQL: 17 of 17.2.
    pub fn major_version(&self) -> u32 {
        self.server_version / 10_000
    }
}

/// Why a node is unknown.
#[derive(Debug, Error)]
pub enum ObserveError {
    /// There is no connection.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// There is no answer.
    #[error(transparent)]
    Query(#[from] QueryError),
    /// A column is not of the type this version of PostgreSQL is known to have.
    #[error("read the state of {node}")]
    Column {
        /// The node.
        node: String,
        /// Which column.
        source: tokio_postgres::Error,
    },
    /// A number is outside the range PostgreSQL documents.
    #[error("{node} reports {what} {found}, out of range")]
    Range {
        /// The node.
        node: String,
        /// What was asked.
        what: &'static str,
        /// The answer.
        found: i64,
    },
    /// The server's segment size is impossible.
    #[error("read the state of {node}")]
    SegmentSize {
        /// The node.
        node: String,
        /// The size.
        source: SegmentSizeError,
    },
}

impl ObserveError {
    /// Tells whether the node may be known if asked again soon.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Connect(error) => error.is_transient(),
            Self::Query(error) => error.is_transient(),
            Self::Column { .. } | Self::Range { .. } | Self::SegmentSize { .. } => false,
        }
    }
}

/// One node, and what it said or why it said nothing.
#[derive(Debug)]
pub struct Observation {
    /// The node.
    pub node: Node,
    /// What it said. An error means unknown.
    pub state: Result<NodeState, ObserveError>,
}

/// The nodes of one group, as they answered in one turn.
#[derive(Debug)]
pub struct Group {
    /// The group's number.
    pub number: u32,
    /// Its nodes, in the order of the configuration.
    pub nodes: Vec<Observation>,
}

/// Why a group cannot be worked with.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum GroupError {
    /// No node says it is the primary.
    #[error("group {group} has no primary: {}", nodes.join(", "))]
    NoPrimary {
        /// The group.
        group: u32,
        /// Each node, and what it is: `postgres-1 is a standby`, `postgres-2 is unknown`.
        nodes: Vec<String>,
    },
    /// Several nodes say they are the primary: after a failover the old one came back, or the
    /// cluster is split.
    #[error("group {group} has several primaries: {}", nodes.join(", "))]
    SeveralPrimaries {
        /// The group.
        group: u32,
        /// Each of them with its timeline: `postgres-1 on timeline 3`.
        nodes: Vec<String>,
    },
    /// The nodes are not copies of one cluster.
    #[error("group {group} mixes clusters: {}", nodes.join(", "))]
    SeveralClusters {
        /// The group.
        group: u32,
        /// Each node with its system identifier.
        nodes: Vec<String>,
    },
}

impl Group {
    /// The one node that says it is the primary.
    ///
    /// Unknown nodes are passed over: one of them may be a primary too, and only fencing could
    /// rule that out.
    ///
    /// # Errors
    ///
    /// Fails when there is none, when there are several, or when the nodes that answered do not
    /// have one system identifier.
    pub fn primary(&self) -> Result<(&Node, &NodeState), GroupError> {
        let group = self.number;
        let identifiers: BTreeSet<_> =
            self.known().map(|(_, state)| state.system_identifier).collect();
        if identifiers.len() > 1 {
            let describe = |(node, state): (&Node, &NodeState)| {
                format!("{} has system identifier {}", node.name, state.system_identifier)
            };
            return Err(GroupError::SeveralClusters {
                group,
                nodes: self.known().map(describe).collect(),
            });
        }
        let primaries: Vec<_> =
            self.known().filter(|(_, state)| state.role == Role::Primary).collect();
        match primaries.as_slice() {
            [primary] => Ok(*primary),
            [] => {
                let nodes = self.nodes.iter().map(Observation::to_string).collect();
                Err(GroupError::NoPrimary { group, nodes })
            }
            several => {
                let describe = |(node, state): &(&Node, &NodeState)| {
                    format!("{} on timeline {}", node.name, state.timeline)
                };
                let nodes = several.iter().map(describe).collect();
                Err(GroupError::SeveralPrimaries { group, nodes })
            }
        }
    }

    /// The nodes that say they are standbys, in the order of the configuration.
    pub fn standbys(&self) -> impl Iterator<Item = (&Node, &NodeState)> {
        self.known().filter(|(_, state)| state.role == Role::Standby)
    }

    /// The nodes that did not answer, and why.
    pub fn unknown(&self) -> impl Iterator<Item = (&Node, &ObserveError)> {
        let error = |it| {
            let Observation { node, state }: &Observation = it;
            state.as_ref().err().map(|error| (node, error))
        };
        self.nodes.iter().filter_map(error)
    }

    fn known(&self) -> impl Iterator<Item = (&Node, &NodeState)> {
        let state = |it| {
            let Observation { node, state }: &Observation = it;
            state.as_ref().ok().map(|state| (node, state))
        };
        self.nodes.iter().filter_map(state)
    }
}

/// `postgres-1 is a standby`.
impl fmt::Display for Observation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match &self.state {
            Ok(NodeState { role: Role::Primary, .. }) => "a primary",
            Ok(NodeState { role: Role::Standby, .. }) => "a standby",
            Err(_) => "unknown",
        };
        write!(f, "{} is {what}", self.node.name)
    }
}

/// Asks the nodes of group `number`, all at the same time.
///
/// Takes no longer than the limits in `settings`.
pub async fn observe_group(settings: &Settings, nodes: &[Node], number: u32) -> Group {
    let in_group = nodes.iter().filter(|node| node.group == number);
    let observations = in_group.map(async |node| {
        let state = observe(settings, node).await;
        Observation { node: node.clone(), state }
    });
    Group { number, nodes: join_all(observations).await }
}

/// Asks one node, on a connection of its own.
///
/// # Errors
///
/// Fails when the node is unreachable, does not answer in time, or answers nonsense.
pub async fn observe(settings: &Settings, node: &Node) -> Result<NodeState, ObserveError> {
    let connection = connect(settings, node).await?;
    ask(&connection).await
}

/// What a server knows of itself, in one row. Any role may ask all of it, except that
/// `pg_stat_wal_receiver` needs `pg_monitor`.
///
/// The role is read once, in a subquery that cannot be flattened, so that a promotion in between
/// does not mix two answers. `pg_walfile_name()` is refused in recovery, and is there only for
/// the timeline: the control file names the one of the last checkpoint, which after a promotion
/// is still the old one. A standby has no function for its timeline, so the newest it knows counts.
/// A WAL receiver that has just started shows the timeline that it is to ask for: nobody may have it. Until
/// the first message both its times are the same.
///
/// Source: PostgreSQL's documentation, "System Administration Functions" and "Control Data
/// Functions"; `WalReceiverMain` in `walreceiver.c`.
const ASK: &str = "
    SELECT role.in_recovery,
           (SELECT system_identifier FROM pg_control_system()) AS system_identifier,
           CASE WHEN role.in_recovery
               THEN greatest(
                   (SELECT timeline_id FROM pg_control_checkpoint()),
                   (SELECT min_recovery_end_timeline FROM pg_control_recovery()),
                   (SELECT received_tli FROM pg_stat_wal_receiver))
               ELSE ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::int
           END::bigint AS timeline,
           CASE WHEN role.in_recovery THEN (SELECT received_tli::bigint FROM pg_stat_wal_receiver
               WHERE last_msg_send_time <> last_msg_receipt_time) END AS received_timeline,
           CASE WHEN role.in_recovery
               THEN pg_last_wal_receive_lsn()
               ELSE pg_current_wal_flush_lsn()
           END AS flush_lsn,
           CASE WHEN role.in_recovery THEN pg_last_wal_replay_lsn() END AS replay_lsn,
           current_setting('server_version_num')::bigint AS server_version,
           current_setting('data_checksums') = 'on' AS data_checksums,
           (SELECT setting::bigint FROM pg_settings WHERE name = 'wal_segment_size')
               AS wal_segment_bytes
      FROM (SELECT pg_is_in_recovery() AS in_recovery OFFSET 0) AS role";

/// Asks the node that `connection` leads to.
///
/// # Errors
///
/// Fails when the node does not answer in time, or answers nonsense.
pub async fn ask(connection: &Connection) -> Result<NodeState, ObserveError> {
    let row = connection.query_one(ASK, &[]).await?;
    let node = connection.node();
    let number = |what| -> Result<i64, ObserveError> { column(&row, what, node) };
    let in_range = |what, found: i64| {
        let out_of_range = |_| ObserveError::Range { node: node.to_string(), what, found };
        u32::try_from(found).map_err(out_of_range)
    };
    let segment_bytes = u64::from(in_range("wal_segment_bytes", number("wal_segment_bytes")?)?);
    let wal_segment_bytes = check_segment_bytes(segment_bytes)
        .map_err(|source| ObserveError::SegmentSize { node: node.to_string(), source })?;
    let in_recovery: bool = column(&row, "in_recovery", node)?;
    Ok(NodeState {
        role: if in_recovery { Role::Standby } else { Role::Primary },
        // The server shows this unsigned number as a signed one.
        system_identifier: number("system_identifier")?.cast_unsigned(),
        timeline: in_range("timeline", number("timeline")?)?,
        received_timeline: column::<Option<i64>>(&row, "received_timeline", node)?
            .map(|found| in_range("received_timeline", found))
            .transpose()?,
        flush_lsn: column(&row, "flush_lsn", node)?,
        replay_lsn: column(&row, "replay_lsn", node)?,
        server_version: in_range("server_version", number("server_version")?)?,
        data_checksums: column(&row, "data_checksums", node)?,
        wal_segment_bytes,
    })
}

fn column<'a, T: tokio_postgres::types::FromSql<'a>>(
    row: &'a Row,
    name: &str,
    node: &Node,
) -> Result<T, ObserveError> {
    row.try_get(name).map_err(|source| ObserveError::Column { node: node.to_string(), source })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn node(name: &str, host: &str, port: u16) -> Node {
        Node { group: 0, name: name.to_owned(), host: host.to_owned(), port }
    }

    fn state(role: Role, timeline: u32) -> NodeState {
        NodeState {
            role,
            system_identifier: 7,
            timeline,
            received_timeline: None,
            flush_lsn: None,
            replay_lsn: None,
            server_version: 170_002,
            data_checksums: true,
            wal_segment_bytes: 16 << 20,
        }
    }

    fn silent() -> ObserveError {
        let (node, limit) = ("c (c:5432)".to_owned(), Duration::from_secs(10));
        ConnectError::TimedOut { node, limit }.into()
    }

    fn group(states: Vec<Result<NodeState, ObserveError>>) -> Group {
        let observation = |(index, state): (usize, _)| {
            let name = ["a", "b", "c"][index];
            Observation { node: node(name, name, 5432), state }
        };
        Group { number: 0, nodes: states.into_iter().enumerate().map(observation).collect() }
    }

    #[test]
    fn a_group_has_exactly_one_primary() {
        let primary = || Ok(state(Role::Primary, 3));
        let standby = || Ok(state(Role::Standby, 3));
        let old_primary = || Ok(state(Role::Primary, 2));
        let foreign = || Ok(NodeState { system_identifier: 8, ..state(Role::Standby, 3) });
        for (states, expected) in [
            (vec![primary()], Ok("a")),
            (vec![standby(), primary(), standby()], Ok("b")),
            (vec![primary(), standby(), Err(silent())], Ok("a")),
            (vec![], Err("group 0 has no primary: ")),
            (
                vec![standby(), Err(silent())],
                Err("group 0 has no primary: a is a standby, b is unknown"),
            ),
            (
                vec![primary(), standby(), old_primary()],
                Err("group 0 has several primaries: a on timeline 3, c on timeline 2"),
            ),
            (
                vec![primary(), foreign()],
                Err("group 0 mixes clusters: a has system identifier 7, b has system identifier 8"),
            ),
        ] {
            let group = group(states);
            let found = group.primary().map(|(node, _)| node.name.clone());
            let expected = expected.map(str::to_owned).map_err(str::to_owned);
            assert_eq!(found.map_err(|error| error.to_string()), expected);
        }
    }

    #[test]
    fn an_unknown_node_is_neither_primary_nor_standby() {
        let group =
            group(vec![Ok(state(Role::Standby, 1)), Ok(state(Role::Primary, 1)), Err(silent())]);
        let names = |nodes: Vec<&Node>| nodes.iter().map(|it| it.name.clone()).collect::<Vec<_>>();
        assert_eq!(names(group.standbys().map(|(node, _)| node).collect()), ["a"]);
        assert_eq!(names(group.unknown().map(|(node, _)| node).collect()), ["c"]);
    }
}
