//! What the servers of a group must have in common; pure.

use std::collections::{BTreeMap, BTreeSet};

use crate::catalogue::SETTINGS_DRIFT;
use crate::check::{Reading, Status};
use crate::component::Component;
use crate::facts::Facts;
use crate::probe::postgres::DeepFacts;

/// A standby with less than its primary of one of these stops replaying.
/// Source: PostgreSQL manual, "Administrator's Overview" of hot standby.
const NOT_LESS: [&str; 5] = [
    "max_connections",
    "max_locks_per_transaction",
    "max_prepared_transactions",
    "max_wal_senders",
    "max_worker_processes",
];

/// What should be the same, so that a server that is promoted goes on as the one before.
const ALIKE: [&str; 9] = [
    "archive_mode",
    "fsync",
    "full_page_writes",
    "max_replication_slots",
    "max_slot_wal_keep_size",
    "password_encryption",
    "shared_preload_libraries",
    "wal_level",
    "wal_log_hints",
];

/// So many differences are named.
const NAMED_MAX: usize = 3;

/// Compares the servers of a group; `None` until two of them have said what they have.
pub fn judge(facts: &Facts, group: u32) -> Option<Reading> {
    let servers: Vec<(&Component, &DeepFacts)> = facts
        .deep
        .iter()
        .filter(|(component, _)| component.group == Some(group))
        .filter_map(|(component, seen)| Some((component, seen.now().filter(|it| it.is_answer)?)))
        .filter(|(_, facts)| !facts.settings.is_empty())
        .collect();
    if servers.len() < 2 {
        return None;
    }
    let is_standby = |component: &Component| {
        facts.postgres.get(component).and_then(|it| it.now()).is_some_and(|it| it.in_recovery)
    };
    let primaries: Vec<_> = servers.iter().filter(|(it, _)| !is_standby(it)).collect();
    let mut too_low = Vec::new();
    if let [(primary, wants)] = primaries[..] {
        for (standby, has) in servers.iter().filter(|(it, _)| is_standby(it)) {
            too_low.extend(lower(standby, has, primary, wants));
        }
    }
    let mut differences = too_low.clone();
    differences.extend(ALIKE.iter().filter_map(|name| different(&servers, name)));
    let status = match (too_low.is_empty(), differences.is_empty()) {
        (false, _) => Status::Critical,
        (true, false) => Status::Warning,
        (true, true) => {
            let reason = format!("{} servers are set alike", servers.len());
            return Some(Reading::new(&SETTINGS_DRIFT, Status::Ok, reason));
        }
    };
    let more = differences.len().saturating_sub(NAMED_MAX);
    differences.truncate(NAMED_MAX);
    let mut reason = differences.join("; ");
    if more > 0 {
        reason = format!("{reason}; and {more} more");
    }
    Some(Reading::new(&SETTINGS_DRIFT, status, reason))
}

/// Settings of which a standby has less than its primary.
fn lower(
    standby: &Component,
    has: &DeepFacts,
    primary: &Component,
    wants: &DeepFacts,
) -> Vec<String> {
    let number = |facts: &DeepFacts, name: &str| facts.settings.get(name)?.parse::<i64>().ok();
    let too_low = NOT_LESS.iter().filter_map(|name| {
        let (has, wants) = (number(has, name)?, number(wants, name)?);
        (has < wants).then(|| {
            format!(
                "{name} is {has} on {} and {wants} on {}: the standby stops replaying",
                standby.name, primary.name
            )
        })
    });
    too_low.collect()
}

/// A setting that is not the same everywhere, in words.
fn different(servers: &[(&Component, &DeepFacts)], name: &str) -> Option<String> {
    let mut by_value: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (component, facts) in servers {
        let value = facts.settings.get(name)?;
        by_value.entry(value).or_default().push(&component.name);
    }
    let values: BTreeSet<_> = by_value.keys().collect();
    (values.len() > 1).then(|| {
        let said: Vec<_> = by_value
            .iter()
            .map(|(value, names)| format!("`{value}` on {}", names.join(", ")))
            .collect();
        format!("{name} is {}", said.join(" and "))
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::component::Kind;
    use crate::facts::record;
    use crate::probe::postgres::PostgresFacts;

    /// A primary and its standbys, each with its settings.
    fn judged(servers: &[(&str, &[(&str, &str)])]) -> Option<(Status, String)> {
        let mut facts = Facts::default();
        let times = (Duration::ZERO, Duration::ZERO);
        for (index, (name, settings)) in servers.iter().enumerate() {
            let component = Component::of_group(Kind::Postgres, 0, *name);
            let in_recovery = index > 0;
            let basic = PostgresFacts { in_recovery, ..PostgresFacts::default() };
            record(&mut facts.postgres, &component, times, Ok(basic));
            let own = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
            let settings = settings.iter().map(own).collect();
            let deep = DeepFacts { is_answer: true, settings, ..DeepFacts::default() };
            record(&mut facts.deep, &component, times, Ok(deep));
        }
        judge(&facts, 0).map(|it| (it.status, it.reason))
    }

    #[test]
    fn what_differs_is_named_with_who_has_it() {
        let alike: &[(&str, &str)] = &[("wal_level", "replica"), ("max_connections", "100")];
        for (case, servers, expected) in [
            ("alone", vec![("a", alike)], None),
            (
                "alike",
                vec![("a", alike), ("b", alike)],
                Some((Status::Ok, "2 servers are set alike")),
            ),
            (
                "another level",
                vec![("a", &[("wal_level", "logical")][..]), ("b", alike), ("c", alike)],
                Some((Status::Warning, "wal_level is `logical` on a and `replica` on b, c")),
            ),
            (
                "a standby with more",
                vec![("a", alike), ("b", &[("max_connections", "200")][..])],
                Some((Status::Ok, "2 servers are set alike")),
            ),
            (
                "a standby with less",
                vec![("a", alike), ("b", &[("max_connections", "50")][..])],
                Some((
                    Status::Critical,
                    "max_connections is 50 on b and 100 on a: the standby stops replaying",
                )),
            ),
        ] {
            let expected = expected.map(|(status, reason)| (status, reason.to_owned()));
            assert_eq!(judged(&servers), expected, "{case}");
        }
    }
}
