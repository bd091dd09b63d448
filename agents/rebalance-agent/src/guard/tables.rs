//! Gates that close for tables: those of one colocation group, reference tables on a node, or one shard.

use std::collections::BTreeMap;

use super::{Gate, Inputs, Refusals, Scope};
use crate::catalogue::{Hindrance, ShardGroup, Table};
use crate::reference::{ReferenceCopy, lacks};
use crate::words::{bytes, some};

pub(super) fn check(inputs: Inputs<'_>, refusals: &mut Refusals) {
    reference(inputs, refusals);
    oversize(inputs, refusals);
    let role = &inputs.observation.role;
    let mut groups = BTreeMap::<u32, Vec<&Table>>::new();
    for table in inputs.observation.catalogue.tables.values().filter(|it| it.kind.moves()) {
        groups.entry(table.colocation).or_default().push(table);
    }
    for (colocation, tables) in groups {
        let scope = Scope::Colocation(colocation);
        let mut refuse = |gate, is_wrong: &dyn Fn(&Table) -> bool, reason: &str, next: String| {
            let tables = tables.iter().filter(|it| is_wrong(it));
            let mut names: Vec<_> = tables.map(|it| it.name.clone()).collect();
            names.sort_unstable();
            if !names.is_empty() {
                refusals.add(gate, scope, format!("{} {reason}", some(&names)), next);
            }
        };
        let next = "give each a primary key, or ALTER TABLE … REPLICA IDENTITY".to_owned();
        let reason = "has no replica identity";
        refuse(Gate::ReplicaIdentity, &|it| !it.has_replica_identity, reason, next);
        for (hindrance, reason, next) in hindrances(&tables) {
            let is_so = |it: &Table| it.hindrance.as_ref() == Some(&hindrance);
            refuse(Gate::Tables, &is_so, &reason, next);
        }
        for owner in owners(&tables) {
            let is_of = |it: &Table| it.owner.name == owner;
            let mut refuse = |is_wrong: fn(&Table) -> bool, reason: String, next: String| {
                refuse(Gate::Owner, &|it| is_of(it) && is_wrong(it), &reason, next);
            };
            refuse(
                |it| !it.owner.is_ours,
                format!("belongs to {owner}, whose rights {role} does not have"),
                format!("GRANT {owner} TO {role}; not if {owner} is a superuser: change the owner"),
            );
            refuse(
                |it| !it.owner.can_login,
                format!("belongs to {owner}, who may not log in, as a move must"),
                format!("ALTER ROLE {owner} LOGIN, and let it in from node to node"),
            );
            refuse(
                |it| !it.owner.can_create,
                format!("belongs to {owner}, who may not create tables in its schema"),
                format!("GRANT CREATE ON SCHEMA … TO {owner}"),
            );
        }
    }
}

/// A move brings no reference table along: queries that join one with the shard fail on the node
/// that lacks it.
fn reference(inputs: Inputs<'_>, refusals: &mut Refusals) {
    let catalogue = &inputs.observation.catalogue;
    let refused = ReferenceCopy::needed(inputs).and_then(|it| it.refused);
    let why = refused.map(|it| format!("; they are not copied: {it}")).unwrap_or_default();
    for node in catalogue.nodes.iter().filter(|it| it.is_primary && it.should_have_shards) {
        let names = lacks(catalogue, node);
        if !names.is_empty() {
            let reason =
                format!("{} lacks reference tables: {}{why}", node.address(), some(&names));
            let next = "they are copied before anything is moved there; or SELECT \
                        replicate_reference_tables()";
            refusals.add(Gate::ReferenceTables, Scope::Group(node.group), reason, next);
        }
    }
}

/// Shards that are wanted elsewhere and never fit into the budget: to wait would not help.
fn oversize(inputs: Inputs<'_>, refusals: &mut Refusals) {
    let catalogue = &inputs.observation.catalogue;
    let (no_control, most) = (crate::control::Control::default(), inputs.budget.bytes_max());
    let control = inputs.control.as_ref().unwrap_or(&no_control);
    let is_drained = |group: u32| {
        let node = catalogue.primary(group);
        control.drains.contains(&group) || node.is_some_and(|it| !it.should_have_shards)
    };
    let is_wanted_elsewhere = |it: &ShardGroup, place: u32| {
        let asked = it.shards.iter().filter_map(|shard| control.moves.get(shard));
        is_drained(place) || asked.clone().any(|to| *to != place)
    };
    for group in catalogue.shard_groups() {
        let (Ok(place), Ok(size)) = (&group.place, &group.bytes) else { continue };
        if most < *size && is_wanted_elsewhere(&group, *place) {
            let (size, most) = (bytes(*size), bytes(most));
            let reason = format!("it has {size}, and no run may move more than {most}");
            let next = if group.is_hash {
                "raise [budget] bytes_per_run, or split it with citus_split_shard_by_split_points()"
            } else {
                "raise [budget] bytes_per_run"
            };
            refusals.add(Gate::Budget, Scope::Shard(group.id), reason, next);
        }
    }
}

/// What keeps these tables from being replicated, each with its words.
fn hindrances(tables: &[&Table]) -> Vec<(Hindrance, String, String)> {
    let mut all: Vec<_> = tables.iter().filter_map(|it| it.hindrance.clone()).collect();
    all.sort_unstable();
    all.dedup();
    let in_words = |it: Hindrance| {
        let (reason, next) = hindrance(&it);
        (it, reason, next.to_owned())
    };
    all.into_iter().map(in_words).collect()
}

/// What keeps a table from being replicated, and what to do about it.
pub fn hindrance(it: &Hindrance) -> (String, &'static str) {
    match it {
        Hindrance::AccessMethod(method) => (
            format!("is {method}, and every write to it would fail while it is moved"),
            "move it while nobody writes to it: citus_move_shard_placement(…, 'block_writes')",
        ),
        Hindrance::Unlogged => (
            "is UNLOGGED, and nothing of it would be replicated".to_owned(),
            "ALTER TABLE … SET LOGGED, or citus_move_shard_placement(…, 'block_writes')",
        ),
        Hindrance::RowSecurity => (
            "has row-level security FORCED on its owner, as whom its rows would be written"
                .to_owned(),
            "ALTER TABLE … NO FORCE ROW LEVEL SECURITY, or citus_move_shard_placement(…, 'block_writes')",
        ),
    }
}

fn owners(tables: &[&Table]) -> Vec<String> {
    let mut owners: Vec<_> = tables.iter().map(|it| it.owner.name.clone()).collect();
    owners.sort_unstable();
    owners.dedup();
    owners
}
