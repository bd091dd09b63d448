//! How large the servers of a group should be, by the formula that this system was ordered with; pure.
//!
//! What the formula needs and nobody knows leaves its part of the result out.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};
use shared::config::Problems;

use crate::facts::Facts;
use crate::judge::group;
use crate::judge::words::{bytes, number};

/// The table `[sizing]`: what cannot be measured, or is expected to become more than what is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// Users of a group at the same time; without it the connections to its primary now.
    pub concurrent_users: Option<f64>,
    /// Transactions of a group in a second; without it those of late.
    pub transactions_per_second: Option<f64>,
    /// Memory of a server, bytes.
    pub ram_bytes: Option<f64>,
    /// By how much the data grows in a month: a factor.
    pub growth_rate: Option<f64>,
    /// For how many months data is kept.
    pub retention_months: Option<f64>,
    /// For how many days backups are kept.
    pub retention_days: Option<f64>,
}

impl Plan {
    /// Adds what is wrong to `problems`, with keys relative to the table.
    pub fn check(&self, problems: &mut Problems) {
        for (key, value) in [
            ("concurrent_users", self.concurrent_users),
            ("transactions_per_second", self.transactions_per_second),
            ("ram_bytes", self.ram_bytes),
            ("growth_rate", self.growth_rate),
            ("retention_months", self.retention_months),
            ("retention_days", self.retention_days),
        ] {
            if value.is_some_and(|it| !it.is_finite() || it <= 0.0) {
                problems.add(key, "must be above zero");
            }
        }
    }
}

/// What the formula comes to for one server of a group; bytes are of one copy of the data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Sizing {
    /// `max_connections`.
    pub max_connections: Option<f64>,
    /// `shared_buffers`.
    pub shared_buffers_bytes: Option<f64>,
    /// `effective_cache_size`.
    pub effective_cache_size_bytes: Option<f64>,
    /// `work_mem`.
    pub work_mem_bytes: Option<f64>,
    /// Cores.
    pub cores: Option<f64>,
    /// Data.
    pub data_bytes: Option<f64>,
    /// WAL.
    pub wal_bytes: Option<f64>,
    /// Backups.
    pub backup_bytes: Option<f64>,
    /// Storage in all.
    pub storage_bytes: Option<f64>,
}

/// `max_connections 850, 20 cores, shared_buffers 16.0 GiB`: what is known.
impl fmt::Display for Sizing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "it saturates")]
        let size =
            |name: &str, it: Option<f64>| it.map(|it| format!("{name} {}", bytes(it as u64)));
        let parts = [
            self.max_connections.map(|it| format!("max_connections {it}")),
            self.cores.map(|it| format!("{it} cores")),
            size("shared_buffers", self.shared_buffers_bytes),
            size("effective_cache_size", self.effective_cache_size_bytes),
            size("work_mem", self.work_mem_bytes),
            size("storage", self.storage_bytes),
        ];
        let parts: Vec<_> = parts.into_iter().flatten().collect();
        f.write_str(if parts.is_empty() { "unknown" } else { "" })?;
        f.write_str(&parts.join(", "))
    }
}

/// The formula. `database_bytes` is the size of the databases now.
///
/// Source: "Sizing Formula" of the order's capacity planning, as it stands there; the `work_mem` and the
/// backups of its example are other than what its formula comes to.
pub fn size(plan: &Plan, database_bytes: Option<f64>) -> Sizing {
    let max_connections = plan.concurrent_users.map(|it| (it * 1.5 + 100.0).ceil());
    let shared_buffers_bytes = plan.ram_bytes.map(|it| it * 0.25);
    let left = plan.ram_bytes.zip(shared_buffers_bytes).map(|(ram, buffers)| ram - buffers);
    let grown = plan.growth_rate.zip(plan.retention_months).map(|(rate, months)| rate * months);
    let data_bytes = database_bytes.zip(grown).map(|(bytes, grown)| bytes * grown);
    let wal_bytes = data_bytes.map(|it| it * 0.1);
    let backup_bytes = data_bytes.zip(plan.retention_days).map(|(data, days)| data * days);
    let storage = |((data, wal), backup): ((f64, f64), f64)| data + wal + backup * 1.2;
    Sizing {
        max_connections,
        shared_buffers_bytes,
        effective_cache_size_bytes: plan.ram_bytes.map(|it| it * 0.75),
        work_mem_bytes: left.zip(max_connections).map(|(left, most)| left / most / 2.0),
        cores: plan.transactions_per_second.map(|it| (it / 500.0).ceil().max(4.0)),
        data_bytes,
        wal_bytes,
        backup_bytes,
        storage_bytes: data_bytes.zip(wal_bytes).zip(backup_bytes).map(storage),
    }
}

/// The sizing of each group, by its primary as it is now.
pub fn of_groups(plan: &Plan, facts: &Facts) -> BTreeMap<u32, Sizing> {
    let of_group = |group| {
        let primary = group::primary(facts, group);
        let deep = primary.and_then(|(it, _)| facts.deep.get(it)).and_then(|it| it.now());
        let load = deep.and_then(|it| it.load).filter(|it| !it.over.is_zero());
        let sizes = deep.and_then(|it| it.sizes.as_ref());
        let measured = Plan {
            concurrent_users: plan
                .concurrent_users
                .or(primary.map(|(_, it)| f64::from(it.facts.connections.0))),
            transactions_per_second: plan
                .transactions_per_second
                .or(load.map(|it| number(it.transactions) / it.over.as_secs_f64())),
            ..*plan
        };
        let bytes = sizes.map(|it| number(it.databases.iter().map(|(_, bytes)| bytes).sum()));
        (group, size(&measured, bytes))
    };
    group::groups(facts).into_iter().map(of_group).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: f64 = 1_073_741_824.0;

    #[test]
    fn the_example_of_the_order_is_met_where_its_formula_is() {
        let plan = Plan {
            concurrent_users: Some(500.0),
            transactions_per_second: Some(10_000.0),
            ram_bytes: Some(64.0 * GIB),
            growth_rate: Some(2.0),
            retention_months: Some(10.0),
            retention_days: Some(30.0),
        };
        let sizing = size(&plan, Some(100.0 * GIB));
        let expected = Sizing {
            max_connections: Some(850.0),
            shared_buffers_bytes: Some(16.0 * GIB),
            effective_cache_size_bytes: Some(48.0 * GIB),
            work_mem_bytes: Some(48.0 * GIB / 850.0 / 2.0),
            cores: Some(20.0),
            data_bytes: Some(2000.0 * GIB),
            wal_bytes: Some(200.0 * GIB),
            backup_bytes: Some(60_000.0 * GIB),
            storage_bytes: Some(74_200.0 * GIB),
        };
        assert_eq!(sizing, expected);
        assert_eq!(
            sizing.to_string(),
            "max_connections 850, 20 cores, shared_buffers 16.0 GiB, effective_cache_size 48.0 GiB, \
             work_mem 28.9 MiB, storage 72.5 TiB"
        );
        assert_eq!(Sizing::default().to_string(), "unknown");
    }

    #[test]
    fn what_is_not_known_leaves_its_part_out() {
        let users = Plan { concurrent_users: Some(3.0), ..Plan::default() };
        let idle = Plan { transactions_per_second: Some(1.0), ..Plan::default() };
        let memory = Plan { ram_bytes: Some(GIB), ..Plan::default() };
        let growing =
            Plan { growth_rate: Some(1.0), retention_months: Some(12.0), ..Plan::default() };
        let none = Sizing::default();
        for (plan, bytes, expected) in [
            (Plan::default(), Some(GIB), none),
            (users, None, Sizing { max_connections: Some(105.0), ..none }),
            (idle, None, Sizing { cores: Some(4.0), ..none }),
            (
                memory,
                None,
                Sizing {
                    shared_buffers_bytes: Some(GIB / 4.0),
                    effective_cache_size_bytes: Some(GIB * 3.0 / 4.0),
                    ..none
                },
            ),
            (growing, None, none),
            (
                growing,
                Some(10.0),
                Sizing { data_bytes: Some(120.0), wal_bytes: Some(12.0), ..none },
            ),
        ] {
            assert_eq!(size(&plan, bytes), expected, "{plan:?}");
        }
    }
}
