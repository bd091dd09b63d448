//! From checks to components, groups and the cluster; pure.
//!
//! *Critical* is kept for what hurts now or may lose data: a group without a primary, two that write, no
//! way in. A part that others stand in for is a warning, however dead it is.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde::Serialize;

use crate::catalogue::REACHABLE;
use crate::check::Status;
use crate::component::{Component, Kind};
use crate::settle::Settled;

/// The checks of each component, as they count.
pub type Checks = BTreeMap<Component, BTreeMap<&'static str, Settled>>;

/// What a component, a group or the cluster comes to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Verdict {
    /// What it comes to.
    pub status: Status,
    /// Since when; of the check that is the reason.
    pub since: Option<DateTime<Utc>>,
    /// Why, in one sentence: empty while all is well.
    pub reason: String,
    /// What to do next.
    pub next: String,
}

impl Verdict {
    fn fine() -> Self {
        let (reason, next) = (String::new(), String::new());
        Self { status: Status::Ok, since: None, reason, next }
    }

    /// Makes it unknown, unless it is worse: not all that it goes by is known.
    pub fn hold(&mut self, reason: String) {
        if self.status < Status::Unknown {
            *self = Self { status: Status::Unknown, reason, ..Self::fine() };
        }
    }

    /// With a status that is not worse than `most`.
    fn at_most(self, most: Status) -> Self {
        Self { status: self.status.min(most), ..self }
    }
}

/// The worst of several; of equals the one that began first: it is the likelier cause.
fn worst(verdicts: impl Iterator<Item = Verdict>) -> Verdict {
    let later = |it: &Verdict| it.since.unwrap_or(DateTime::<Utc>::MAX_UTC);
    verdicts
        .reduce(|a, b| if (b.status, later(&a)) > (a.status, later(&b)) { b } else { a })
        .unwrap_or_else(Verdict::fine)
}

/// What one component comes to.
pub fn of_component(checks: &BTreeMap<&'static str, Settled>) -> Verdict {
    let most = checks.values().map(|it| it.status).max().unwrap_or_default();
    // What else was wrong with what does not answer is kept, and is not why it is so now.
    let silent = checks.get(REACHABLE.name).filter(|it| it.status == most);
    let checks: Vec<&Settled> = silent.map_or_else(|| checks.values().collect(), |it| vec![it]);
    worst(checks.into_iter().filter(|it| it.status != Status::Ok).map(|it| Verdict {
        status: it.status,
        since: Some(it.since),
        reason: it.reading.reason.clone(),
        next: it.reading.next_step().to_owned(),
    }))
}

/// All verdicts.
#[derive(Clone, Debug, Serialize)]
pub struct Verdicts {
    /// The cluster.
    pub cluster: Verdict,
    /// The groups.
    pub groups: BTreeMap<u32, Verdict>,
    /// The components.
    #[serde(skip)]
    pub components: BTreeMap<Component, Verdict>,
}

/// Rolls up. `primaries` are the servers that count as primaries: what is wrong with one of them is
/// wrong with its group; what is wrong with a standby leaves the group degraded.
pub fn roll_up(checks: &Checks, primaries: &BTreeMap<u32, String>) -> Verdicts {
    let components: BTreeMap<Component, Verdict> = checks
        .iter()
        .map(|(component, checks)| (component.clone(), of_component(checks)))
        .collect();
    let named = |component: &Component, verdict: &Verdict| Verdict {
        reason: match verdict.status {
            Status::Ok => String::new(),
            _ => format!("{component}: {}", verdict.reason),
        },
        ..verdict.clone()
    };
    let counts = |component: &Component, verdict: &Verdict| {
        let named = named(component, verdict);
        if stands_in(component, &components, primaries) {
            named.at_most(Status::Warning)
        } else {
            named
        }
    };
    let mut groups: BTreeMap<u32, Vec<Verdict>> = BTreeMap::new();
    let mut others = Vec::new();
    for (component, verdict) in &components {
        match component.group {
            Some(group) => groups.entry(group).or_default().push(counts(component, verdict)),
            None => others.push(counts(component, verdict)),
        }
    }
    let groups: BTreeMap<u32, Verdict> =
        groups.into_iter().map(|(group, verdicts)| (group, worst(verdicts.into_iter()))).collect();
    let cluster = worst(groups.values().cloned().chain(others));
    Verdicts { cluster, groups, components }
}

/// Whether something else stands in for a component that is down, or the service goes on without it.
pub(crate) fn stands_in(
    component: &Component,
    all: &BTreeMap<Component, Verdict>,
    primaries: &BTreeMap<u32, String>,
) -> bool {
    match component.kind {
        Kind::Postgres => {
            let primary = component.group.and_then(|group| primaries.get(&group));
            primary.is_some_and(|it| *it != component.name)
        }
        // Whether enough of etcd is there is said by the cluster's own check.
        Kind::Patroni | Kind::Etcd | Kind::Agent | Kind::Redis | Kind::Swarm => true,
        Kind::Pgbouncer | Kind::Haproxy => all.iter().any(|(other, verdict)| {
            (other.kind, other.group) == (component.kind, component.group)
                && other != component
                && verdict.status <= Status::Warning
        }),
        Kind::Cluster | Kind::Group | Kind::Repository | Kind::Disk => false,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::catalogue::{CLOCK, HAPROXY, PRIMARY};
    use crate::check::{Check, Reading};
    use crate::settle::Now;

    fn checks(all: &[(Component, &'static Check, Status, i64)]) -> Checks {
        let mut checks = Checks::new();
        for (component, check, status, since) in all {
            let wall = DateTime::from_timestamp(*since, 0).unwrap();
            let now = Now { boot: Duration::ZERO, wall };
            let reading = Reading::new(check, *status, "so it is");
            let settled = Settled::new(reading, Duration::ZERO, now);
            checks.entry(component.clone()).or_default().insert(check.name, settled);
        }
        checks
    }

    #[test]
    fn what_others_stand_in_for_is_a_warning() {
        let server = |name: &str| Component::of_group(Kind::Postgres, 1, name);
        let proxy = |name: &str| Component::of_group(Kind::Haproxy, 1, name);
        let foreign = Component::of_group(Kind::Haproxy, 2, "z");
        let (ok, bad) = (Status::Ok, Status::Critical);
        for (case, all, expected) in [
            ("nothing is watched", vec![], ok),
            ("all is well", vec![(server("a"), &REACHABLE, ok, 1)], ok),
            ("the primary", vec![(server("a"), &REACHABLE, bad, 1)], bad),
            ("a standby", vec![(server("b"), &REACHABLE, bad, 1)], Status::Warning),
            (
                "a standby, and the group has no primary",
                vec![(server("b"), &REACHABLE, bad, 1), (Component::group(1), &PRIMARY, bad, 2)],
                bad,
            ),
            (
                "one of two ways in",
                vec![(proxy("x"), &HAPROXY, bad, 1), (proxy("y"), &HAPROXY, ok, 1)],
                Status::Warning,
            ),
            (
                "both ways in",
                vec![(proxy("x"), &HAPROXY, bad, 1), (proxy("y"), &HAPROXY, bad, 1)],
                bad,
            ),
            (
                "the one way in, and one to another group",
                vec![(proxy("x"), &HAPROXY, bad, 1), (foreign, &HAPROXY, ok, 1)],
                bad,
            ),
            ("etcd", vec![(Component::new(Kind::Etcd, "e"), &HAPROXY, bad, 1)], Status::Warning),
        ] {
            let primaries = BTreeMap::from([(1, "a".to_owned())]);
            assert_eq!(roll_up(&checks(&all), &primaries).cluster.status, expected, "{case}");
        }
    }

    #[test]
    fn what_does_not_answer_is_down_for_that_reason() {
        let server = Component::of_group(Kind::Postgres, 1, "a");
        for (reachable, expected) in
            [(Status::Critical, Some(7)), (Status::Warning, Some(3)), (Status::Ok, Some(3))]
        {
            let all = checks(&[
                (server.clone(), &REACHABLE, reachable, 7),
                (server.clone(), &CLOCK, Status::Critical, 3),
            ]);
            let since = of_component(&all[&server]).since.map(|it| it.timestamp());
            assert_eq!(since, expected, "{reachable}");
        }
    }

    #[test]
    fn the_reason_is_the_worst_that_began_first() {
        let server = |name: &str| Component::of_group(Kind::Postgres, 1, name);
        let all = checks(&[
            (server("a"), &REACHABLE, Status::Critical, 7),
            (server("b"), &REACHABLE, Status::Critical, 3),
            (server("c"), &REACHABLE, Status::Warning, 1),
        ]);
        let verdicts = roll_up(&all, &BTreeMap::new());
        assert_eq!(verdicts.cluster.reason, "postgres b of group 1: so it is");
        assert_eq!(verdicts.cluster.since, DateTime::from_timestamp(3, 0));
        assert_eq!(verdicts.groups[&1], verdicts.cluster);
        assert!(!verdicts.cluster.next.is_empty());
    }
}
