//! Reference tables that nodes lack: what is to be copied there before shards come, and why not now. Pure.
//!
//! One statement copies all of them to every node that lacks them. It counts as a move does: against the
//! budget, in the ledger, and after a failure it rests.

use serde::{Deserialize, Serialize};

use crate::catalogue::{Catalogue, CitusNode, Placement, TableKind};
use crate::guard::{Inputs, Refusal, Scope, hindrance, spent};
use crate::known::Known;
use crate::ledger::Ledger;
use crate::plan::{Budget, Move, ROOM_FACTOR, Why};
use crate::situation::room;
use crate::words::{bytes as in_words, some};

/// A copy of reference tables.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ReferenceCopy {
    /// As a move of the tables that some node lacks: from one that has them, to the first that does not.
    pub work: Move,
    /// The groups it goes to.
    pub groups: Vec<u32>,
    /// Why it is not done now, beside what is refused anyway.
    pub refused: Option<String>,
}

/// The names of the reference tables that a node lacks.
pub fn lacks(catalogue: &Catalogue, node: &CitusNode) -> Vec<String> {
    let shards = missing(catalogue, node.group);
    let mut names: Vec<_> = shards.map(|it| catalogue.tables[&it.table].name.clone()).collect();
    names.sort_unstable();
    names
}

/// A placement of each reference table that a group has none of.
fn missing(catalogue: &Catalogue, group: u32) -> impl Iterator<Item = &Placement> {
    let is_reference = |it: &&Placement| {
        let table = catalogue.tables.get(&it.table);
        it.is_active && table.is_some_and(|it| it.kind == TableKind::Reference)
    };
    let has = move |table: u32| {
        let mut placements = catalogue.placements.iter();
        placements.any(|it| it.group == group && it.table == table && it.is_active)
    };
    let mut all: Vec<_> = catalogue.placements.iter().filter(is_reference).collect();
    all.sort_by_key(|it| (it.shard, it.group));
    all.dedup_by_key(|it| it.shard);
    all.into_iter().filter(move |it| !has(it.table))
}

impl ReferenceCopy {
    /// What is to be copied; `None` if each node that is to have shards has all.
    pub fn needed(inputs: Inputs<'_>) -> Option<Self> {
        let catalogue = &inputs.observation.catalogue;
        let nodes = catalogue.nodes.iter().filter(|it| it.is_primary);
        nodes
            .clone()
            .find(|it| it.should_have_shards && missing(catalogue, it.group).next().is_some())?;
        // Citus asks for no more than that they are active.
        let lacking: Vec<(u32, Vec<&Placement>)> = nodes
            .filter(|it| it.is_active)
            .map(|it| (it.group, missing(catalogue, it.group).collect::<Vec<_>>()))
            .filter(|(_, placements)| !placements.is_empty())
            .collect();
        let mut all: Vec<&Placement> = lacking.iter().flat_map(|it| it.1.clone()).collect();
        all.sort_by_key(|it| it.shard);
        all.dedup_by_key(|it| it.shard);
        let first = *all.first()?;
        let of = |placements: &[&Placement]| -> Known<u64> {
            placements.iter().map(|it| it.bytes.clone()).sum()
        };
        let sizes: Vec<(u32, Known<u64>)> =
            lacking.iter().map(|(group, placements)| (*group, of(placements))).collect();
        let bytes: Known<u64> = sizes.iter().map(|(_, bytes)| bytes.clone()).sum();
        let bare = all.iter().filter(|it| !catalogue.tables[&it.table].has_replica_identity);
        let bare: Vec<_> = bare.map(|it| catalogue.tables[&it.table].name.clone()).collect();
        let hindered = all.iter().find_map(|it| {
            let table = &catalogue.tables[&it.table];
            let (reason, next) = hindrance(table.hindrance.as_ref()?);
            Some(format!("{} {reason}: {next}", table.name))
        });
        let refused = match &bytes {
            _ if hindered.is_some() => hindered,
            _ if !bare.is_empty() => {
                let next = "give each a primary key, or ALTER TABLE … REPLICA IDENTITY";
                Some(format!("{} has no replica identity: {next}", some(&bare)))
            }
            Err(why) => Some(why.to_string()),
            Ok(bytes) => too_dear(inputs, *bytes)
                .or_else(|| no_room(inputs, &sizes))
                .or_else(|| resting(inputs, first.shard)),
        };
        let work = Move {
            shard: first.shard,
            shards: all.iter().map(|it| it.shard).collect(),
            colocation: catalogue.tables[&first.table].colocation,
            tables: all.iter().map(|it| catalogue.tables[&it.table].name.clone()).collect(),
            bytes: bytes.unwrap_or(0),
            from: first.group,
            to: lacking.first()?.0,
            why: Why::ReferenceTables,
            gain: 0.0,
            figure_after: 0.0,
        };
        Some(Self { work, groups: lacking.iter().map(|it| it.0).collect(), refused })
    }

    /// Whether nothing is in the way, neither of the copy nor of one of the nodes that it goes to.
    pub fn may_begin(&self, refusals: &[Refusal]) -> bool {
        use crate::guard::Gate::ReferenceTables;
        let is_other = |it: &Refusal| it.gate != ReferenceTables;
        let is_here =
            |it: &Refusal| self.groups.iter().any(|group| it.scope == Scope::Group(*group));
        self.refused.is_none() && !refusals.iter().any(|it| is_other(it) && is_here(it))
    }
}

fn too_dear(inputs: Inputs<'_>, bytes: u64) -> Option<String> {
    let unknown = Ledger::default();
    let ledger = inputs.ledger.as_ref().unwrap_or(&unknown);
    let spent = spent(ledger, inputs.window, inputs.now);
    Budget::left(inputs.budget, spent).refusal(bytes)
}

fn no_room(inputs: Inputs<'_>, sizes: &[(u32, Known<u64>)]) -> Option<String> {
    let primary = |group: &u32| inputs.observation.servers.get(group)?.primary.as_ref().ok();
    sizes.iter().find_map(|(group, bytes)| {
        // One that does not answer, or does not tell, closes its own gate.
        let (primary, bytes) = (primary(group)?, bytes.as_ref().ok()?);
        let (room, needed) =
            (room(primary, inputs.limits).ok()?, bytes.saturating_mul(ROOM_FACTOR));
        (room < needed).then(|| {
            let (room, needed) = (in_words(room), in_words(needed));
            format!("{} has room for {room}, and {needed} are needed, with WAL", primary.name)
        })
    })
}

fn resting(inputs: Inputs<'_>, shard: i64) -> Option<String> {
    inputs.ledger.as_ref().ok()?.resting(shard, inputs.now)
}

#[cfg(test)]
mod tests {
    use chrono::{DateTime, Utc};

    use super::*;
    use crate::config::{Guard, Limits};
    use crate::control::Control;
    use crate::guard::Gate;
    use crate::guard::tests::well;
    use crate::known::Unknown;
    use crate::ledger::{Entry, Outcome};
    use crate::observation::Observation;
    use crate::servers::Disk;

    fn bare(observation: &mut Observation) {
        observation.catalogue.placements.retain(|it| (it.table, it.group) != (4, 2));
    }

    fn entry(copy: &ReferenceCopy, at: DateTime<Utc>, outcome: Outcome) -> Entry {
        Entry {
            at,
            shard: copy.work.shard,
            from: copy.work.from,
            to: copy.work.to,
            copies: true,
            colocation: None,
            job: None,
            moves: 1,
            bytes: copy.work.bytes,
            shards: copy.work.shards.clone(),
            replica: "host-1".to_owned(),
            outcome,
            reason: "no route to host".to_owned(),
            ended_at: Some(at),
        }
    }

    fn needed(observation: &Observation, budget: &Limits, ledger: Ledger) -> Option<ReferenceCopy> {
        ReferenceCopy::needed(Inputs {
            observation,
            window: None,
            budget,
            limits: &Guard::default(),
            control: &Ok(Control::default()),
            ledger: &Ok(ledger),
            now: observation.at,
        })
    }

    #[test]
    fn what_a_node_lacks_is_one_copy_of_all_to_each_node() {
        let budget = Limits::default();
        let mut observation = well();
        assert_eq!(needed(&observation, &budget, Ledger::default()), None);
        bare(&mut observation);
        let copy = needed(&observation, &budget, Ledger::default()).unwrap();
        assert_eq!((copy.groups.as_slice(), copy.refused.as_deref()), (&[2][..], None));
        let Move { shard, from, to, bytes, why, .. } = copy.work;
        assert_eq!((shard, from, to, bytes, why), (106, 0, 2, 5, Why::ReferenceTables));
        assert_eq!(
            lacks(&observation.catalogue, &observation.catalogue.nodes[2]),
            ["public.countries"]
        );
        // Citus copies to the coordinator too, once it copies; but not because of it.
        observation.catalogue.placements.retain(|it| (it.table, it.group) != (4, 0));
        let copy = needed(&observation, &budget, Ledger::default()).unwrap();
        assert_eq!((copy.groups, copy.work.from, copy.work.bytes), (vec![0, 2], 1, 10));
        let mut observation = well();
        observation.catalogue.placements.retain(|it| (it.table, it.group) != (4, 0));
        assert_eq!(needed(&observation, &budget, Ledger::default()), None);
    }

    #[test]
    fn it_is_bounded_as_a_move_is() {
        let limits = |bytes_per_run| Limits { bytes_per_run, ..Limits::default() };
        let mut observation = well();
        bare(&mut observation);
        let copy = needed(&observation, &limits(5), Ledger::default()).unwrap();
        assert_eq!(copy.refused, None);
        let at = observation.at;
        let record = |outcome| Ledger::new(vec![entry(&copy, at, outcome)]);
        for (case, change, budget, ledger, expected) in [
            (
                "never",
                (|_| {}) as fn(&mut Observation),
                4,
                Ledger::default(),
                "it has 5 B, and no run may move more than 4 B: raise [budget] bytes_per_run",
            ),
            (
                "spent",
                |_| {},
                9,
                record(Outcome::Moved),
                "4 B are left of the budget, and it has 5 B",
            ),
            (
                "resting",
                |_| {},
                99,
                record(Outcome::Failed),
                "it rests until 02:01:00 UTC: its last move failed: no route to host",
            ),
            (
                "no room",
                |it| {
                    let primary = it.servers.get_mut(&2).unwrap().primary.as_mut().unwrap();
                    primary.disk = Ok(Disk { available: 15 + 9, total: 100 });
                    primary.wal.as_mut().unwrap().max_bytes = 0;
                },
                99,
                Ledger::default(),
                "w2 has room for 9 B, and 10 B are needed, with WAL",
            ),
            (
                "unknown",
                |it| {
                    for it in &mut it.catalogue.placements {
                        it.bytes = Err(Unknown::because("no answer"));
                    }
                },
                99,
                Ledger::default(),
                "no answer",
            ),
            (
                "not logically",
                |it| it.catalogue.tables.get_mut(&4).unwrap().has_replica_identity = false,
                99,
                Ledger::default(),
                "public.countries has no replica identity: give each a primary key, or ALTER TABLE … \
                 REPLICA IDENTITY",
            ),
        ] {
            let mut observation = observation.clone();
            change(&mut observation);
            let copy = needed(&observation, &limits(budget), ledger).unwrap();
            assert_eq!(copy.refused.as_deref(), Some(expected), "{case}");
            assert!(!copy.may_begin(&[]), "{case}");
        }
        let refusal =
            |gate, scope| Refusal { gate, scope, reason: String::new(), next: String::new() };
        for (refusals, expected) in [
            (vec![], true),
            (vec![refusal(Gate::ReferenceTables, Scope::Group(2))], true),
            (vec![refusal(Gate::Lag, Scope::Group(1))], true),
            (vec![refusal(Gate::Lag, Scope::Group(2))], false),
        ] {
            assert_eq!(copy.may_begin(&refusals), expected, "{refusals:?}");
        }
    }
}
