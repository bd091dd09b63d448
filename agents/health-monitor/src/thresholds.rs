//! The limits that checks go by: the catalogue's, or those that the configuration sets.

use std::collections::BTreeMap;

use serde::Deserialize;
use shared::config::Problems;

use crate::catalogue::CHECKS;
use crate::check::{Check, Limits, Measure, Reading, Status, Unit};
use crate::component::{Component, Kind};
use crate::verdict::Checks;

/// The tables `[limits.<kind>]`: `connections = { warning = 70, critical = 85 }`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(transparent)]
pub struct Thresholds(BTreeMap<Kind, BTreeMap<String, Limits>>);

impl Thresholds {
    /// Adds what is wrong to `problems`, with keys relative to the table.
    pub fn check(&self, problems: &mut Problems) {
        for (kind, limits) in &self.0 {
            for (name, limits) in limits {
                let key = format!("{kind}.{name}");
                let found = CHECKS.iter().find(|it| it.kind == *kind && it.name == name);
                match found.map(|it| it.limits.as_ref()) {
                    None => problems.add(&key, "is no check; see `health-monitor check --list`"),
                    Some(None) => problems.add(&key, "has no limits to set"),
                    // What may be more than all of it has defaults that are.
                    Some(Some(default))
                        if default.unit == Unit::Percent
                            && default.critical <= 100
                            && 100.0 < limits.warning.max(limits.critical) =>
                    {
                        problems
                            .add(&key, "must be 100 percent at most: it would never be reached");
                    }
                    Some(Some(default)) => {
                        let is_floor = default.critical < default.warning;
                        if is_floor != (limits.critical < limits.warning)
                            || !(limits.warning.is_finite() && limits.critical.is_finite())
                        {
                            let order = if is_floor { "below" } else { "at least" };
                            problems.add(&key, format!("critical must be {order} warning"));
                        }
                    }
                }
            }
        }
    }

    /// The limits of a check; `None` if it has none.
    pub fn of(&self, check: &Check) -> Option<Limits> {
        let default = check.limits.as_ref()?;
        let set = self.0.get(&check.kind).and_then(|it| it.get(check.name)).copied();
        #[expect(clippy::cast_precision_loss, reason = "limits are far below 2^53")]
        let default = Limits { warning: default.warning as f64, critical: default.critical as f64 };
        Some(set.unwrap_or(default))
    }
}

/// What a judge needs beside the facts.
#[derive(Clone, Copy, Debug)]
pub struct Scale<'a> {
    /// The limits.
    pub thresholds: &'a Thresholds,
    /// What each check came to before.
    pub before: &'a Checks,
}

impl Scale<'_> {
    /// Judges the number of a check that has limits; the reason says what was found.
    pub fn judge(
        &self,
        component: &Component,
        check: &'static Check,
        (name, value, max): (&'static str, f64, Option<f64>),
        reason: impl Into<String>,
    ) -> Reading {
        let Some((limits, default)) = self.thresholds.of(check).zip(check.limits.as_ref()) else {
            return Reading::new(check, Status::Unknown, reason);
        };
        let before = self.before.get(component).and_then(|it| it.get(check.name));
        let before = before.map_or(Status::default(), |it| it.status);
        let unit = default.unit;
        Reading::new(check, limits.judge(value, before), reason).with_measure(Measure {
            name,
            value,
            unit,
            limits: Some(limits),
            max,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalogue::{CACHE_HIT_RATIO, CONNECTIONS, ROLE};

    fn thresholds(text: &str) -> Thresholds {
        toml::from_str(text).unwrap()
    }

    #[test]
    fn limits_are_the_catalogues_unless_they_are_set() {
        let set = thresholds("[postgres]\nconnections = { warning = 10, critical = 20.5 }\n");
        assert_eq!(set.of(&CONNECTIONS), Some(Limits { warning: 10.0, critical: 20.5 }));
        assert_eq!(set.of(&CACHE_HIT_RATIO), Some(Limits { warning: 95.0, critical: 0.0 }));
        assert_eq!(set.of(&ROLE), None);
        assert!(toml::from_str::<Thresholds>("[postgres]\nrole = { warning = 1 }\n").is_err());
        assert!(toml::from_str::<Thresholds>("[mysql]\n").is_err());
    }

    #[test]
    fn limits_that_make_no_sense_are_told() {
        let mut problems = Problems::default();
        thresholds(
            "[postgres]\nconnection = { warning = 1, critical = 2 }\n\
             role = { warning = 1, critical = 2 }\n\
             connections = { warning = 90, critical = 80 }\n\
             cache_hit_ratio = { warning = 80, critical = 90 }\n\
             wraparound = { warning = 1000, critical = 2000 }\n\
             wal_size = { warning = 1000, critical = 2000 }\n\
             locks = { warning = nan, critical = 9 }\n",
        )
        .check(&mut problems);
        let found: Vec<_> =
            problems.found().iter().map(|it| format!("{}: {}", it.key, it.problem)).collect();
        assert_eq!(
            found,
            [
                "postgres.cache_hit_ratio: critical must be below warning",
                "postgres.connection: is no check; see `health-monitor check --list`",
                "postgres.connections: critical must be at least warning",
                "postgres.locks: critical must be at least warning",
                "postgres.role: has no limits to set",
                "postgres.wraparound: must be 100 percent at most: it would never be reached",
            ]
        );
    }

    #[test]
    fn a_judged_number_carries_its_limits() {
        let component = Component::of_group(Kind::Postgres, 0, "a");
        let scale = Scale { thresholds: &Thresholds::default(), before: &BTreeMap::new() };
        let reading = scale.judge(&component, &CONNECTIONS, ("used", 91.0, None), "91 of 100");
        assert_eq!(reading.status, Status::Critical);
        assert_eq!(reading.measures[0].limits, Some(Limits { warning: 80.0, critical: 90.0 }));
        assert!(reading.next_step().contains("PgBouncer"));
    }
}
