//! What Citus' catalogue says: nodes, tables, placements, jobs, and what waits to be cleaned up.
//!
//! Source: Citus' `pg_dist_*` relations and the views over them, by name of column: their number
//! grows from version to version.

use std::collections::{BTreeMap, BTreeSet};

use crate::known::{Known, Unknown};

/// What the coordinator's primary answered.
#[derive(Clone, Debug, PartialEq)]
pub struct Catalogue {
    /// The version of the extension, such as `14.0-1`.
    pub version: String,
    /// `citus_is_coordinator()`. A worker takes the same commands and obeys some of them.
    pub is_coordinator: bool,
    /// The nodes: primaries, and where Patroni registers them, secondaries.
    pub nodes: Vec<CitusNode>,
    /// The distributed tables, by their OID.
    pub tables: BTreeMap<u32, Table>,
    /// Where the shards are.
    pub placements: Vec<Placement>,
    /// What Citus has yet to remove.
    pub cleanup: Known<Vec<CleanupRecord>>,
    /// Background jobs that have not ended.
    pub jobs: Known<Vec<Job>>,
    /// Moves under way, those that nobody scheduled as a job too.
    pub progress: Known<Vec<Progress>>,
    /// Sessions of this agent, of any replica, that are at a move or at its end.
    pub movers: Known<Vec<Mover>>,
    /// Whether each node reaches each other.
    pub links: Known<Vec<Link>>,
    /// What Citus would move.
    pub citus_plan: Known<Vec<PlannedShard>>,
    /// Where its rebalance strategy wants no shards; `None` if that allows each of them everywhere.
    pub forbidden: Known<Option<Forbidden>>,
}

/// What the `shard_allowed_on_node_function` of the default rebalance strategy says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Forbidden {
    /// The function.
    pub function: String,
    /// Shards, and groups that they must not be on.
    pub places: BTreeSet<(i64, u32)>,
}

/// A row of `pg_dist_node`.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "they are columns of a row")]
pub struct CitusNode {
    /// `nodeid`: what a move is told. Another one if the node is removed and added again.
    pub id: u32,
    /// `groupid`: 0 is the coordinator's. Stays through a failover.
    pub group: u32,
    /// `nodename`. Another one after a failover.
    pub host: String,
    /// `nodeport`.
    pub port: u16,
    /// Whether `noderole` is `primary`.
    pub is_primary: bool,
    /// `isactive`. A node that has died keeps it.
    pub is_active: bool,
    /// `shouldhaveshards`: false for one that is drained, and usually for the coordinator.
    pub should_have_shards: bool,
    /// Whether it has metadata and they are up to date: `metadatasynced`, where `hasmetadata`.
    pub is_synced: bool,
}

impl CitusNode {
    /// `worker-1:5432`.
    pub fn address(&self) -> String {
        format!("{}:{}", self.host, self.port)
    }
}

/// How the rows of a table are spread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TableKind {
    /// By a hash of a column.
    Hash,
    /// One shard, on some node: a table of a distributed schema.
    Single,
    /// A copy on each node. Nothing to move.
    Reference,
    /// On the coordinator alone, with metadata. Nothing to move.
    Local,
    /// Something of long ago, which nobody rebalances.
    Other,
}

impl TableKind {
    /// From `partmethod`, `repmodel` and `colocationid` of `pg_dist_partition`.
    pub fn of(method: char, replication: char, colocation: u32) -> Self {
        match (method, replication) {
            ('h', _) => Self::Hash,
            ('n', 't') => Self::Reference,
            ('n', _) if colocation != 0 => Self::Single,
            ('n', _) => Self::Local,
            _ => Self::Other,
        }
    }

    /// Whether its shards can be moved.
    pub fn moves(self) -> bool {
        matches!(self, Self::Hash | Self::Single)
    }
}

/// A distributed table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    /// Its name, with its schema.
    pub name: String,
    /// How its rows are spread.
    pub kind: TableKind,
    /// Tables with the same number move together; 0 is none.
    pub colocation: u32,
    /// Whether logical replication can tell its rows apart: a primary key, another replica
    /// identity, or no rows of its own (partitioned).
    pub has_replica_identity: bool,
    /// What else keeps logical replication from carrying it.
    pub hindrance: Option<Hindrance>,
    /// Whether the agent's role may use its schema. If not, Citus tells none of the sizes on a node
    /// that has a shard of it, and warns.
    pub is_visible: bool,
    /// Its owner, as whom it is moved.
    pub owner: Owner,
}

/// What keeps logical replication from carrying a table.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Hindrance {
    /// Its access method is not `heap`: writes to a `columnar` one fail while it is published.
    AccessMethod(String),
    /// It is `UNLOGGED`, and cannot be published.
    Unlogged,
    /// Row-level security is forced on its owner, as whom rows arrive.
    RowSecurity,
}

/// The owner of a table, and what hangs on it.
///
/// Source: measured; Citus' issues 6925 and 7719.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    /// The role.
    pub name: String,
    /// Whether it may log in: tasks of a move do, as this role.
    pub can_login: bool,
    /// Whether it may create tables in the schema of the table.
    pub can_create: bool,
    /// Whether the agent's role has its rights.
    pub is_ours: bool,
}

/// A row of `pg_dist_placement`, with its shard and its size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    /// `shardid`.
    pub shard: i64,
    /// The OID of the table.
    pub table: u32,
    /// `groupid`: where it is.
    pub group: u32,
    /// Whether `shardstate` is 1: in use.
    pub is_active: bool,
    /// `shardminvalue` and `shardmaxvalue`; none for the only shard of a table.
    pub range: (Option<String>, Option<String>),
    /// Its size with its indexes, in bytes.
    pub bytes: Known<u64>,
}

/// A row of `pg_dist_cleanup`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CleanupRecord {
    /// `object_name`.
    pub object: String,
    /// `node_group_id`: where it is.
    pub group: u32,
    /// Whether a move that succeeded left it, for queries that were planned before: Citus drops it by
    /// itself. To drop it at once would fail those.
    pub is_deferred: bool,
}

/// A background job that has not ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Job {
    /// `job_id`.
    pub id: i64,
    /// `state`, in Citus' words.
    pub state: String,
    /// `description`.
    pub description: String,
    /// The most often that one of its tasks was tried again; Citus does so for half an hour
    /// without a word.
    pub retries: u32,
}

/// A move under way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Progress {
    /// The shard.
    pub shard: i64,
    /// From where: `worker-1:5432`.
    pub source: String,
    /// To where.
    pub target: String,
    /// `status`, in Citus' words.
    pub phase: String,
}

/// A session of this agent that is at a move, or at its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mover {
    /// `pid`, on the coordinator.
    pub pid: i32,
    /// The shard; `None` if it copies reference tables.
    pub shard: Option<i64>,
}

/// Whether one node reaches another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// From where: `worker-1:5432`.
    pub from: String,
    /// To where.
    pub to: String,
    /// Whether it does; `None` if the first could not be asked.
    pub works: Option<bool>,
}

/// A row of Citus' own plan: one for each of the colocated shards.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlannedShard {
    /// The shard.
    pub shard: i64,
    /// To where: `worker-1:5432`.
    pub target: String,
}

/// The shards of one range of all colocated tables: what is moved as one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardGroup {
    /// The lowest of its shards: its name, and what a move is told.
    pub id: i64,
    /// The colocation group of its tables.
    pub colocation: u32,
    /// Its shards, ascending.
    pub shards: Vec<i64>,
    /// The tables, by name.
    pub tables: Vec<String>,
    /// Whether it can be split, as shards of hash-distributed tables can.
    pub is_hash: bool,
    /// The group it is on.
    pub place: Known<u32>,
    /// Its size in bytes.
    pub bytes: Known<u64>,
}

impl Catalogue {
    /// The primary of a group, as Citus knows it.
    pub fn primary(&self, group: u32) -> Option<&CitusNode> {
        self.nodes.iter().find(|it| it.is_primary && it.group == group)
    }

    /// The group that Citus knows by an address: `worker-1:5432`.
    pub fn group_at(&self, address: &str) -> Option<u32> {
        self.nodes.iter().find(|it| it.address() == address).map(|it| it.group)
    }

    /// What can be moved, by lowest shard.
    pub fn shard_groups(&self) -> Vec<ShardGroup> {
        // Tables that are colocated with none share the number 0, so their OID tells them apart.
        let mut groups = BTreeMap::<_, Vec<(&Placement, &Table)>>::new();
        for placement in &self.placements {
            let Some(table) = self.tables.get(&placement.table).filter(|it| it.kind.moves()) else {
                continue;
            };
            let alone = if table.colocation == 0 { placement.table } else { 0 };
            let key = (table.colocation, alone, &placement.range);
            groups.entry(key).or_default().push((placement, table));
        }
        let mut groups: Vec<_> = groups.into_values().filter_map(|it| shard_group(&it)).collect();
        groups.sort_unstable_by_key(|it| it.id);
        groups
    }
}

fn shard_group(placements: &[(&Placement, &Table)]) -> Option<ShardGroup> {
    let shards: BTreeSet<i64> = placements.iter().map(|(it, _)| it.shard).collect();
    let tables: BTreeSet<&String> = placements.iter().map(|(_, table)| &table.name).collect();
    let places: BTreeSet<u32> = placements.iter().map(|(it, _)| it.group).collect();
    let id = *shards.first()?;
    let idle = placements.iter().find(|(it, _)| !it.is_active);
    let place = match places.first() {
        _ if idle.is_some() => Err(format!("a placement of shard {id} is not in use")),
        Some(place) if places.len() == 1 && placements.len() == shards.len() => Ok(*place),
        _ => Err(format!("shard {id} has {} placements, expected one", placements.len())),
    };
    let bytes = placements.iter().map(|(it, _)| it.bytes.clone()).sum();
    Some(ShardGroup {
        id,
        colocation: placements[0].1.colocation,
        shards: shards.into_iter().collect(),
        tables: tables.into_iter().cloned().collect(),
        is_hash: placements.iter().all(|(_, table)| table.kind == TableKind::Hash),
        place: place.map_err(Unknown),
        bytes,
    })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A table that can be moved.
    pub(crate) fn table(name: &str, kind: TableKind, colocation: u32) -> Table {
        let owner =
            Owner { name: "app".to_owned(), can_login: true, can_create: true, is_ours: true };
        let name = format!("public.{name}");
        Table {
            name,
            kind,
            colocation,
            has_replica_identity: true,
            hindrance: None,
            is_visible: true,
            owner,
        }
    }

    /// A node of its own group, as a worker is.
    pub(crate) fn node(group: u32) -> CitusNode {
        CitusNode {
            id: group + 10,
            group,
            host: if group == 0 { "coord".to_owned() } else { format!("w{group}") },
            port: 5432,
            is_primary: true,
            is_active: true,
            should_have_shards: group != 0,
            is_synced: true,
        }
    }

    /// Nothing but nodes.
    pub(crate) fn empty(groups: u32) -> Catalogue {
        Catalogue {
            version: "14.0-1".to_owned(),
            is_coordinator: true,
            nodes: (0..=groups).map(node).collect(),
            tables: BTreeMap::new(),
            placements: Vec::new(),
            cleanup: Ok(Vec::new()),
            jobs: Ok(Vec::new()),
            progress: Ok(Vec::new()),
            movers: Ok(Vec::new()),
            links: Ok(Vec::new()),
            citus_plan: Ok(Vec::new()),
            forbidden: Ok(None),
        }
    }

    pub(crate) fn placement(
        shard: i64,
        table: u32,
        group: u32,
        min: &str,
        bytes: u64,
    ) -> Placement {
        let range = (Some(min.to_owned()), Some(format!("{min}+")));
        Placement { shard, table, group, is_active: true, range, bytes: Ok(bytes) }
    }

    fn example() -> Catalogue {
        let mut it = empty(2);
        it.tables = [
            (1, table("a", TableKind::Hash, 1)),
            (2, table("b", TableKind::Hash, 1)),
            (3, table("c", TableKind::Hash, 2)),
            (4, table("reference", TableKind::Reference, 3)),
            (5, table("tenant", TableKind::Single, 4)),
            (6, table("local", TableKind::Local, 0)),
        ]
        .into();
        it.placements = vec![
            placement(101, 1, 1, "0", 10),
            placement(102, 1, 2, "8", 20),
            placement(103, 2, 1, "0", 1),
            placement(104, 2, 2, "8", 2),
            placement(105, 3, 1, "0", 5),
            placement(106, 4, 1, "", 7),
            placement(106, 4, 2, "", 7),
            Placement { range: (None, None), ..placement(107, 5, 2, "", 9) },
            Placement { range: (None, None), ..placement(108, 6, 0, "", 9) },
        ];
        it
    }

    #[test]
    fn colocated_shards_of_one_range_are_one_group() {
        let found: Vec<_> = example()
            .shard_groups()
            .into_iter()
            .map(|it| (it.id, it.shards, it.tables.join(" "), it.place.unwrap(), it.bytes.unwrap()))
            .collect();
        let expected = [
            (101, vec![101, 103], "public.a public.b", 1, 11),
            (102, vec![102, 104], "public.a public.b", 2, 22),
            (105, vec![105], "public.c", 1, 5),
            (107, vec![107], "public.tenant", 2, 9),
        ];
        let expected = expected.map(|(id, shards, tables, place, bytes)| {
            (id, shards, tables.to_owned(), place, bytes)
        });
        assert_eq!(found, expected);
    }

    /// One that nobody tells is not left out of the sum.
    #[test]
    fn a_size_that_one_shard_does_not_tell_is_unknown_for_its_group() {
        let mut it = example();
        it.placements[2].bytes = Err(Unknown::because("no answer"));
        let groups = it.shard_groups();
        assert_eq!(groups[0].bytes, Err(Unknown::because("no answer")));
        assert_eq!(groups[1].bytes, Ok(22));
    }

    #[test]
    fn a_group_that_is_not_in_one_place_has_none() {
        let why = |change: fn(&mut Catalogue)| {
            let mut it = example();
            change(&mut it);
            it.shard_groups()[0].place.clone().unwrap_err().0
        };
        let several = "shard 101 has 3 placements, expected one";
        assert_eq!(why(|it| it.placements.push(placement(101, 1, 2, "0", 10))), several);
        // Of two shards, on two nodes.
        assert_eq!(
            why(|it| it.placements[2].group = 2),
            "shard 101 has 2 placements, expected one"
        );
        let idle = "a placement of shard 101 is not in use";
        assert_eq!(why(|it| it.placements[2].is_active = false), idle);
    }

    #[test]
    fn the_kind_of_a_table_follows_from_three_columns() {
        for (method, replication, colocation, expected) in [
            ('h', 's', 1, TableKind::Hash),
            ('h', 'c', 1, TableKind::Hash),
            ('n', 't', 3, TableKind::Reference),
            ('n', 's', 4, TableKind::Single),
            ('n', 's', 0, TableKind::Local),
            ('a', 's', 0, TableKind::Other),
        ] {
            assert_eq!(TableKind::of(method, replication, colocation), expected, "{method}");
        }
    }
}
