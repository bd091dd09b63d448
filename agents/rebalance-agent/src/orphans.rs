//! Tables that are named as shards are, on a node where Citus knows no placement of them. Pure.
//!
//! Nobody reads them, and nobody drops them; but rows may be in them that are nowhere else. An ordinary table
//! may be named like that too: `orders_2024` must never be taken for a shard.

use crate::words::{bytes, count, some};

/// A table that is named as a shard is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Named {
    /// Its OID, on its node.
    pub oid: u32,
    /// Its schema.
    pub schema: String,
    /// Its name.
    pub name: String,
    /// The number at the end of its name.
    pub number: i64,
    /// The name of one of its indexes that ends with the number too, as Citus names those of a shard, without it.
    pub index: Option<String>,
}

/// What the coordinator says of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "they are columns of a row")]
pub struct Facts {
    /// Citus moves, splits or makes shards now, and may not have written all of it down.
    pub is_at_work: bool,
    /// There is a shard of that number …
    pub is_known: bool,
    /// … and this is what a table of it is called.
    pub is_named_so: bool,
    /// It has a placement on this node.
    pub is_placed: bool,
    /// It has a placement in use on another.
    pub is_elsewhere: bool,
    /// Citus will drop it.
    pub is_recorded: bool,
    /// A distributed table has its name but for the number, and an index of the same name as its own.
    pub is_like_one: bool,
}

/// What an orphan may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// A table of a shard that is in use on another node.
    Copy,
    /// A table of a shard that is in use nowhere: it may be all there is of it.
    Only,
    /// Very likely a table of a shard that there was.
    Former,
}

/// A table of a shard without a placement.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Orphan {
    /// Its name, with its schema, quoted.
    pub table: String,
    /// The shard.
    pub shard: i64,
    /// Its size with its indexes, in bytes.
    pub bytes: u64,
    /// What it may be.
    pub kind: Kind,
}

impl Facts {
    /// What it is if it is an orphan.
    pub fn kind(self) -> Option<Kind> {
        if self.is_at_work || self.is_placed || self.is_recorded {
            return None;
        }
        match (self.is_known, self.is_named_so) {
            (true, true) if self.is_elsewhere => Some(Kind::Copy),
            (true, true) => Some(Kind::Only),
            (true, false) => None,
            (false, _) => self.is_like_one.then_some(Kind::Former),
        }
    }
}

/// What drops them, as their owner or as a superuser: in one statement, because one may refer to another.
pub fn drop_statement(tables: &[String]) -> String {
    // Citus lets nobody drop what is called as a shard that it knows.
    let set = "SET citus.enable_manual_changes_to_shards = on";
    format!("{set}; DROP TABLE {}", tables.join(", "))
}

/// What is said of the orphans of each kind on a node, and what to do about it.
pub fn told(orphans: &[Orphan], node: &str) -> Vec<(String, String)> {
    let of_kind = |kind| orphans.iter().filter(move |it| it.kind == kind);
    [Kind::Copy, Kind::Only, Kind::Former]
        .into_iter()
        .filter(|kind| of_kind(*kind).next().is_some())
        .map(|kind| {
            let names: Vec<_> =
                of_kind(kind).map(|it| format!("{} ({})", it.table, bytes(it.bytes))).collect();
            let tables: Vec<_> = of_kind(kind).map(|it| it.table.clone()).collect();
            let (number, statement) = (count(names.len(), "table"), drop_statement(&tables));
            let (of, next) = match kind {
                Kind::Copy => (
                    "of shards that Citus has on other nodes",
                    format!(
                        "if nothing in it is missing there, rebalance-agent cleanup --drop-orphans, or on {node}: \
                         {statement}"
                    ),
                ),
                Kind::Only => (
                    "of shards that Citus has in use nowhere",
                    format!(
                        "see pg_dist_placement: it may be all there is of the shard; if not, on {node}: {statement}"
                    ),
                ),
                Kind::Former => (
                    "named as shards that Citus does not know any more",
                    format!("if nobody needs what is in it, on {node}: {statement}"),
                ),
            };
            (format!("{number} on {node} {of}: {}", some(&names)), next)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_certainly_a_shard_without_a_placement_is_an_orphan() {
        let copy = Facts {
            is_at_work: false,
            is_known: true,
            is_named_so: true,
            is_placed: false,
            is_elsewhere: true,
            is_recorded: false,
            is_like_one: true,
        };
        let former = Facts { is_known: false, is_named_so: false, is_elsewhere: false, ..copy };
        for (case, facts, expected) in [
            ("a copy", copy, Some(Kind::Copy)),
            ("the only one", Facts { is_elsewhere: false, ..copy }, Some(Kind::Only)),
            ("one of a shard that there was", former, Some(Kind::Former)),
            ("it is in use", Facts { is_placed: true, ..copy }, None),
            ("Citus drops it", Facts { is_recorded: true, ..copy }, None),
            ("a move copies it", Facts { is_at_work: true, ..copy }, None),
            ("orders_102008, which is no shard", Facts { is_named_so: false, ..copy }, None),
            ("orders_2024, which is no shard", Facts { is_like_one: false, ..former }, None),
            ("Citus drops what it does not know", Facts { is_recorded: true, ..former }, None),
            ("a table is made", Facts { is_at_work: true, ..former }, None),
        ] {
            assert_eq!(facts.kind(), expected, "{case}");
        }
    }

    #[test]
    fn each_kind_is_told_with_the_statement_that_drops_it() {
        let orphan = |shard, kind| Orphan {
            table: format!("public.events_{shard}"),
            shard,
            bytes: 8192,
            kind,
        };
        let set = "SET citus.enable_manual_changes_to_shards = on; DROP TABLE";
        assert_eq!(
            told(&[orphan(1, Kind::Copy), orphan(2, Kind::Former), orphan(3, Kind::Copy)], "w1"),
            [
                (
                    "2 tables on w1 of shards that Citus has on other nodes: public.events_1 (8.0 KiB), \
                     public.events_3 (8.0 KiB)"
                        .to_owned(),
                    format!(
                        "if nothing in it is missing there, rebalance-agent cleanup --drop-orphans, or on w1: {set} \
                         public.events_1, public.events_3"
                    )
                ),
                (
                    "1 table on w1 named as shards that Citus does not know any more: public.events_2 (8.0 KiB)"
                        .to_owned(),
                    format!("if nobody needs what is in it, on w1: {set} public.events_2")
                ),
            ]
        );
        let only = told(&[orphan(1, Kind::Only)], "w1");
        assert!(only[0].1.starts_with("see pg_dist_placement: it may be all there is"), "{only:?}");
        assert_eq!(told(&[], "w1"), []);
    }
}
