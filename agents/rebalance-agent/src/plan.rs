//! What to move, in which order, and what it brings. Pure.
//!
//! What is asked for by name comes first, then nodes that are drained. Then, one at a time, the move that
//! lowers the figure most for what it costs: its bytes, and a cutover. Where that leads into a dead end or
//! to the end of the budget, the moves that lower it most, whatever they cost, are tried too, and the better
//! plan is taken. No move of those raises the figure, and no shard group is moved twice.

mod citus;
mod planner;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

pub use citus::{Comparison, Difference, Wish, compare, wishes};

use crate::balance::{Figure, Loads, Place};
use crate::catalogue::{Forbidden, ShardGroup};
use crate::config::{Balance, Limits, Strategy};
use crate::known::{Known, Unknown};
use crate::ledger::Spent;
use crate::words::bytes as in_words;
use planner::Planner;
pub use planner::ROOM_FACTOR;

/// What a plan is made from.
#[derive(Clone, Debug)]
pub struct Situation {
    /// The nodes that shards can be on.
    pub places: Vec<Place>,
    /// What can be moved.
    pub groups: Vec<ShardGroup>,
    /// Colocation groups that must stay, and why.
    pub held: BTreeMap<u32, String>,
    /// Shard groups that must stay for a while, and why.
    pub resting: BTreeMap<i64, String>,
    /// Shards that somebody wants on a group of servers.
    pub asked: BTreeMap<i64, u32>,
    /// What Citus would move.
    pub citus: Known<Vec<Wish>>,
    /// Where Citus' rebalance strategy wants no shards.
    pub forbidden: Known<Option<Forbidden>>,
}

/// How much may be moved still.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Bytes.
    pub bytes: u64,
    /// Shard groups.
    pub moves: u32,
    /// Bytes, if nothing had been moved yet: what is larger never is.
    pub bytes_max: u64,
}

impl Budget {
    /// What is left for this run, of what it may move and of what a day may.
    pub fn left(limits: &Limits, (day, run): (Spent, Spent)) -> Self {
        let left = |limit: u64, spent: u64| limit.saturating_sub(spent);
        Self {
            bytes: left(limits.bytes_per_run, run.bytes).min(left(limits.bytes_per_day, day.bytes)),
            moves: (limits.moves_per_run.saturating_sub(run.moves))
                .min(limits.moves_per_day.saturating_sub(day.moves)),
            bytes_max: limits.bytes_max(),
        }
    }

    /// Why something of that size is not moved. What never fits says so first.
    pub fn refusal(&self, bytes: u64) -> Option<String> {
        let (size, left, most) = (in_words(bytes), in_words(self.bytes), in_words(self.bytes_max));
        if self.bytes_max < bytes {
            let next = "raise [budget] bytes_per_run";
            Some(format!("it has {size}, and no run may move more than {most}: {next}"))
        } else if self.moves == 0 {
            Some("the budget allows no more moves".to_owned())
        } else if self.bytes < bytes {
            Some(format!("{left} are left of the budget, and it has {size}"))
        } else {
            None
        }
    }
}

/// Why a shard group is moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Why {
    /// Somebody wants it there.
    Asked,
    /// Its node is drained.
    Drain,
    /// Nodes lack reference tables, without which no shard may come there.
    ReferenceTables,
    /// The load is spread better afterwards.
    Balance,
    /// Citus would.
    Citus,
}

/// One shard group that is to be moved.
///
/// Groups of servers, not nodes: a node's number and name are read again right before a move.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Move {
    /// The shard that a move is told; the others of its group go with it.
    pub shard: i64,
    /// All of them.
    pub shards: Vec<i64>,
    /// Their colocation group.
    pub colocation: u32,
    /// Their tables.
    pub tables: Vec<String>,
    /// Their size.
    pub bytes: u64,
    /// The group it is on.
    pub from: u32,
    /// The group it is to be on.
    pub to: u32,
    /// Why.
    pub why: Why,
    /// By how much it lowers the figure, when its turn comes; negative only if it is asked for, or in a
    /// plan of Citus.
    pub gain: f64,
    /// The figure after it.
    pub figure_after: f64,
}

/// Something that is not moved, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Skipped {
    /// What: `shard 102012 of public.events`, `colocation group 3`.
    pub what: String,
    /// A sentence without full stop.
    pub reason: String,
}

/// A shard group that is larger than any node's fair share: moving it cannot help.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Hot {
    /// Its lowest shard.
    pub shard: i64,
    /// Its tables.
    pub tables: Vec<String>,
    /// Its size.
    pub bytes: u64,
    /// Its share of all bytes.
    pub share: f64,
    /// The largest fair share of a node.
    pub fair_share: f64,
    /// What to do about it.
    pub advice: String,
}

/// What is to be moved, and what is not.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// The figure now.
    pub before: Figure,
    /// The figure when all is moved.
    pub after: Figure,
    /// The moves, in their order.
    pub moves: Vec<Move>,
    /// What is not moved although it should be.
    pub skipped: Vec<Skipped>,
    /// What should be split.
    pub hot: Vec<Hot>,
    /// Why there are no more moves: a sentence without full stop.
    pub end: String,
}

impl Plan {
    /// The bytes of all moves.
    pub fn bytes(&self) -> u64 {
        self.moves.iter().map(|it| it.bytes).sum()
    }
}

/// Makes a plan.
///
/// # Errors
///
/// A size is not known, or where shards may be: then nothing is moved.
pub fn plan(situation: &Situation, balance: &Balance, budget: Budget) -> Known<Plan> {
    if let Err(why) = &situation.forbidden {
        return Err(Unknown(format!(
            "where Citus' rebalance strategy allows shards is unknown: {why}"
        )));
    }
    let loads = Loads::new(&situation.places, &situation.groups, balance.count_share)?;
    let before = loads.figure();
    let mut planner = Planner::new(situation, balance, budget, loads);
    planner.ask();
    // Citus knows of no drain but `shouldhaveshards`, which is a superuser's to set.
    let end = match (planner.drain(), balance.strategy) {
        (Some(end), _) => end,
        (None, Strategy::Own) => planner.spread_well(),
        (None, Strategy::Citus) => planner.follow(situation.citus.as_ref().map_err(Clone::clone)?),
    };
    let hot = planner.hot();
    let Planner { loads, moves, skipped, .. } = planner;
    Ok(Plan { before, after: loads.figure(), moves, skipped, hot, end })
}

#[cfg(test)]
mod tests;
