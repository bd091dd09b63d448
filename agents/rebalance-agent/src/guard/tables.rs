//! Gates that close for tables: those of one colocation group, or reference tables on a node.

use std::collections::BTreeMap;

use super::{Gate, Inputs, Refusals, Scope};
use crate::catalogue::{Catalogue, Table, TableKind};
use crate::words::some;

pub(super) fn check(inputs: Inputs<'_>, refusals: &mut Refusals) {
    reference(&inputs.observation.catalogue, refusals);
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
fn reference(catalogue: &Catalogue, refusals: &mut Refusals) {
    let has = |group: u32, oid: u32| {
        catalogue.placements.iter().any(|it| it.group == group && it.table == oid && it.is_active)
    };
    for node in catalogue.nodes.iter().filter(|it| it.is_primary && it.should_have_shards) {
        let tables = catalogue.tables.iter().filter(|(_, it)| it.kind == TableKind::Reference);
        let missing = tables.filter(|(oid, _)| !has(node.group, **oid));
        let mut names: Vec<_> = missing.map(|(_, it)| it.name.clone()).collect();
        names.sort_unstable();
        if !names.is_empty() {
            let reason = format!("{} lacks reference tables: {}", node.address(), some(&names));
            let next = "SELECT replicate_reference_tables()";
            refusals.add(Gate::ReferenceTables, Scope::Group(node.group), reason, next);
        }
    }
}

fn owners(tables: &[&Table]) -> Vec<String> {
    let mut owners: Vec<_> = tables.iter().map(|it| it.owner.name.clone()).collect();
    owners.sort_unstable();
    owners.dedup();
    owners
}
