//! Reasons not to move anything now. Pure.
//!
//! Each gate is closed until what it asks is known and good: what is not known closes it as what is
//! bad does. A refusal holds for the cluster, for what is on one group of servers, for the tables of one
//! colocation group, or for one shard.

mod cluster;
mod servers;
mod tables;

use std::fmt::{self, Display};

use chrono::{DateTime, TimeDelta, Utc};
use serde::{Deserialize, Serialize};

use crate::config::{Guard, Limits};
use crate::control::Control;
use crate::known::Known;
use crate::ledger::{DAY, Ledger, Outcome, Spent};
use crate::observation::Observation;
use crate::window::Window;
pub use tables::hindrance;

/// How long a run is where no window says so.
const RUN: TimeDelta = TimeDelta::hours(1);

/// One thing that must be known and good.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Gate {
    /// The catalogue is that of the coordinator.
    Coordinator,
    /// Citus' nodes are active, and have its metadata.
    Nodes,
    /// Each server answers.
    Reachable,
    /// Each node reaches each other.
    Links,
    /// Each group has a leader, is not paused and does not switch over.
    Patroni,
    /// The size of every shard is known.
    Sizes,
    /// Each node has the reference tables.
    ReferenceTables,
    /// Nobody else moves shards.
    Busy,
    /// No session of a move that has ended keeps its locks.
    Locks,
    /// Citus has cleaned up after moves.
    Cleanup,
    /// Nothing is left of moves that were broken off.
    Leftovers,
    /// No table is there of a shard that is not.
    Orphans,
    /// The window is open.
    Window,
    /// Nobody has paused the agent.
    Paused,
    /// Something is left of the budget.
    Budget,
    /// The last moves did not all fail.
    Setbacks,
    /// The health monitor's verdict.
    Health,
    /// No other agent is at work there.
    Activity,
    /// No base backup is taken there.
    BaseBackup,
    /// Standbys keep up.
    Lag,
    /// No slot that nobody reads from holds back WAL.
    Slots,
    /// No transaction that has written is open for long.
    Transactions,
    /// `wal_level` is `logical`.
    WalLevel,
    /// Slots, processes and connections are left.
    Headroom,
    /// There is room on the disk, for WAL too.
    Disk,
    /// Rows can be told apart by logical replication.
    ReplicaIdentity,
    /// Logical replication carries the tables.
    Tables,
    /// The agent may move the tables, and their owner can.
    Owner,
}

impl Gate {
    /// All, in the order in which they are shown.
    pub const ALL: [Self; 28] = [
        Self::Coordinator,
        Self::Nodes,
        Self::Reachable,
        Self::Links,
        Self::Patroni,
        Self::Sizes,
        Self::ReferenceTables,
        Self::Busy,
        Self::Locks,
        Self::Cleanup,
        Self::Leftovers,
        Self::Orphans,
        Self::Window,
        Self::Paused,
        Self::Budget,
        Self::Setbacks,
        Self::Health,
        Self::Activity,
        Self::BaseBackup,
        Self::Lag,
        Self::Slots,
        Self::Transactions,
        Self::WalLevel,
        Self::Headroom,
        Self::Disk,
        Self::ReplicaIdentity,
        Self::Tables,
        Self::Owner,
    ];

    /// Its name in metrics, logs and JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Coordinator => "coordinator",
            Self::Nodes => "nodes",
            Self::Reachable => "reachable",
            Self::Links => "links",
            Self::Patroni => "patroni",
            Self::Sizes => "sizes",
            Self::ReferenceTables => "reference_tables",
            Self::Busy => "busy",
            Self::Locks => "locks",
            Self::Cleanup => "cleanup",
            Self::Leftovers => "leftovers",
            Self::Orphans => "orphans",
            Self::Window => "window",
            Self::Paused => "paused",
            Self::Budget => "budget",
            Self::Setbacks => "setbacks",
            Self::Health => "health",
            Self::Activity => "activity",
            Self::BaseBackup => "base_backup",
            Self::Lag => "lag",
            Self::Slots => "slots",
            Self::Transactions => "transactions",
            Self::WalLevel => "wal_level",
            Self::Headroom => "headroom",
            Self::Disk => "disk",
            Self::ReplicaIdentity => "replica_identity",
            Self::Tables => "tables",
            Self::Owner => "owner",
        }
    }
}

/// What a refusal holds for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scope {
    /// Every move.
    Cluster,
    /// Moves from and to a group of servers.
    Group(u32),
    /// Moves of the tables of a colocation group.
    Colocation(u32),
    /// Moves of a shard, and of those that it is colocated with.
    Shard(i64),
}

impl Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cluster => f.pad("cluster"),
            Self::Group(group) => f.pad(&format!("group {group}")),
            Self::Colocation(id) => f.pad(&format!("colocation group {id}")),
            Self::Shard(id) => f.pad(&format!("shard {id}")),
        }
    }
}

/// A reason not to move something now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// Which gate is closed.
    pub gate: Gate,
    /// For what.
    pub scope: Scope,
    /// Why: a sentence without full stop.
    pub reason: String,
    /// What to do about it; the same.
    pub next: String,
}

impl Refusal {
    /// Whether it holds for every move. What would end any move that is under way keeps it from beginning.
    pub fn is_for_all(&self) -> bool {
        let is_coordinators = self.scope == Scope::Group(0) && self.ends_a_move().is_some();
        self.scope == Scope::Cluster || is_coordinators
    }

    /// How a move that is under way is to end because of it; `None` if it need not. Other gates close
    /// because of the move itself, or only make it wait: standbys that fall behind or are restarted, or a
    /// base backup, delay what comes next.
    pub const fn ends_a_move(&self) -> Option<Outcome> {
        match (self.gate, self.scope) {
            (Gate::Window | Gate::Paused, _) => Some(Outcome::Stopped),
            (Gate::Reachable, Scope::Cluster)
            | (Gate::Coordinator | Gate::Nodes | Gate::Patroni | Gate::Health | Gate::Disk, _) => {
                Some(Outcome::Closed)
            }
            _ => None,
        }
    }
}

/// What is decided from.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a> {
    /// What was found out.
    pub observation: &'a Observation,
    /// When something may be moved; at any time without one.
    pub window: Option<&'a Window>,
    /// How much may be moved.
    pub budget: &'a Limits,
    /// What must hold of the servers.
    pub limits: &'a Guard,
    /// What operators ask for.
    pub control: &'a Known<Control>,
    /// What was moved in the last 24 hours.
    pub ledger: &'a Known<Ledger>,
    /// The time.
    pub now: DateTime<Utc>,
}

/// When the run began that `now` belongs to.
pub fn run_began(window: Option<&Window>, now: DateTime<Utc>) -> DateTime<Utc> {
    window.map_or(now - RUN, |it| it.opened_at(now))
}

/// What was moved in the last 24 hours, and in this run.
pub fn spent(ledger: &Ledger, window: Option<&Window>, now: DateTime<Utc>) -> (Spent, Spent) {
    (ledger.spent(now - DAY), ledger.spent(run_began(window, now)))
}

/// Returns every reason not to move something now, gate by gate; none means that all is known and good.
pub fn refusals(inputs: Inputs<'_>) -> Vec<Refusal> {
    let mut refusals = Refusals(Vec::new());
    cluster::check(inputs, &mut refusals);
    servers::check(inputs, &mut refusals);
    tables::check(inputs, &mut refusals);
    // As they are listed, not as they were found.
    refusals.0.sort_by_key(|it| (it.gate, it.scope));
    refusals.0
}

/// The refusals found so far.
struct Refusals(Vec<Refusal>);

impl Refusals {
    fn add(
        &mut self,
        gate: Gate,
        scope: Scope,
        reason: impl Into<String>,
        next: impl Into<String>,
    ) {
        self.0.push(Refusal { gate, scope, reason: reason.into(), next: next.into() });
    }

    /// What is known; if it is not, that is a refusal. `what` is it: `how far its standbys are`.
    fn known<'a, T>(
        &mut self,
        gate: Gate,
        scope: Scope,
        what: &str,
        known: &'a Known<T>,
    ) -> Option<&'a T> {
        let unknown = |why: &_| {
            let reason = format!("{what} is unknown: {why}");
            let next = "see why it does not tell; nothing is moved before it does";
            self.add(gate, scope, reason, next);
        };
        known.as_ref().map_err(unknown).ok()
    }
}

#[cfg(test)]
pub(crate) mod tests;
