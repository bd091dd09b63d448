//! What Citus would move, and where the agent's plan differs from it. Pure.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::Move;
use crate::catalogue::{Catalogue, ShardGroup};
use crate::known::{Known, Unknown};

/// A shard group that Citus would move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wish {
    /// Its lowest shard.
    pub shard: i64,
    /// To which group.
    pub to: u32,
}

/// Where two plans differ.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Comparison {
    /// How many shard groups both would move to the same group.
    pub same: usize,
    /// The others.
    pub differences: Vec<Difference>,
}

/// A shard group that the two would not treat alike.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Difference {
    /// Its lowest shard.
    pub shard: i64,
    /// To which group the agent would move it; `None`: it would stay.
    pub ours: Option<u32>,
    /// To which group Citus would move it; `None`: it would stay.
    pub citus: Option<u32>,
}

/// The rows of `get_rebalance_table_shards_plan()`, one for each colocated shard, as shard groups.
///
/// # Errors
///
/// Citus gave no plan, or one that does not fit what its catalogue says.
pub fn wishes(catalogue: &Catalogue, groups: &[ShardGroup]) -> Known<Vec<Wish>> {
    let rows = catalogue.citus_plan.as_ref().map_err(Clone::clone)?;
    let of = |it: &ShardGroup| it.shards.iter().map(|shard| (*shard, it.id)).collect::<Vec<_>>();
    let by_shard: BTreeMap<i64, i64> = groups.iter().flat_map(of).collect();
    let mut wishes: Vec<Wish> = Vec::new();
    for row in rows {
        let shard = by_shard.get(&row.shard).ok_or_else(|| {
            Unknown(format!("Citus would move shard {}, which is not in its catalogue", row.shard))
        })?;
        let to = catalogue.group_at(&row.target).ok_or_else(|| {
            Unknown(format!("Citus would move to {}, which is not in its catalogue", row.target))
        })?;
        match wishes.iter_mut().find(|it| it.shard == *shard) {
            // A plan of several steps may move one on.
            Some(wish) => wish.to = to,
            None => wishes.push(Wish { shard: *shard, to }),
        }
    }
    Ok(wishes)
}

/// Where the agent's plan differs from that of Citus.
pub fn compare(moves: &[Move], wishes: &[Wish]) -> Comparison {
    let ours: BTreeMap<i64, u32> = moves.iter().map(|it| (it.shard, it.to)).collect();
    let theirs: BTreeMap<i64, u32> = wishes.iter().map(|it| (it.shard, it.to)).collect();
    let mut comparison = Comparison::default();
    for (shard, to) in &ours {
        match theirs.get(shard).copied() {
            Some(it) if it == *to => comparison.same += 1,
            citus => {
                comparison.differences.push(Difference { shard: *shard, ours: Some(*to), citus });
            }
        }
    }
    for (shard, to) in theirs.iter().filter(|(shard, _)| !ours.contains_key(shard)) {
        comparison.differences.push(Difference { shard: *shard, ours: None, citus: Some(*to) });
    }
    comparison.differences.sort_unstable_by_key(|it| it.shard);
    comparison
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalogue::tests::{empty, placement, table};
    use crate::catalogue::{PlannedShard, TableKind};
    use crate::plan::Why;

    fn row(shard: i64, target: &str) -> PlannedShard {
        PlannedShard { shard, target: target.to_owned() }
    }

    fn moved(shard: i64, to: u32) -> Move {
        Move {
            shard,
            shards: vec![shard],
            colocation: 1,
            tables: vec![],
            bytes: 1,
            from: 9,
            to,
            why: Why::Balance,
            gain: 0.1,
            figure_after: 0.0,
        }
    }

    #[test]
    fn the_rows_of_colocated_shards_are_one_wish() {
        let mut catalogue = empty(2);
        catalogue.tables =
            [(1, table("a", TableKind::Hash, 1)), (2, table("b", TableKind::Hash, 1))].into();
        catalogue.placements = vec![
            placement(101, 1, 1, "0", 10),
            placement(102, 1, 1, "8", 20),
            placement(103, 2, 1, "0", 1),
            placement(104, 2, 1, "8", 2),
        ];
        let groups = catalogue.shard_groups();
        let mut found = |rows| {
            catalogue.citus_plan = rows;
            wishes(&catalogue, &groups).map_err(|it| it.0)
        };
        let rows = vec![row(102, "w2:5432"), row(104, "w2:5432")];
        assert_eq!(found(Ok(rows)), Ok(vec![Wish { shard: 102, to: 2 }]));
        assert_eq!(found(Ok(vec![])), Ok(vec![]));
        let strange = "Citus would move shard 9, which is not in its catalogue";
        assert_eq!(found(Ok(vec![row(9, "w2:5432")])), Err(strange.to_owned()));
        let strange = "Citus would move to w9:5432, which is not in its catalogue";
        assert_eq!(found(Ok(vec![row(101, "w9:5432")])), Err(strange.to_owned()));
        assert_eq!(found(Err(Unknown::because("no answer"))), Err("no answer".to_owned()));
    }

    #[test]
    fn two_plans_are_compared_shard_group_by_shard_group() {
        let ours = [moved(1, 3), moved(2, 3), moved(3, 4)];
        let theirs = [(1, 3), (3, 5), (4, 3)].map(|(shard, to)| Wish { shard, to });
        let difference = |shard, ours, citus| Difference { shard, ours, citus };
        let expected = Comparison {
            same: 1,
            differences: vec![
                difference(2, Some(3), None),
                difference(3, Some(4), Some(5)),
                difference(4, None, Some(3)),
            ],
        };
        assert_eq!(compare(&ours, &theirs), expected);
        assert_eq!(compare(&[], &[]), Comparison::default());
    }
}
