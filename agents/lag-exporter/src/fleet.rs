//! All groups, and what is known of each connection: what the targets feed and the snapshots are
//! taken of.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use shared::pg::Node;
use tracing::{info, warn};

use crate::clock;
use crate::group::{Group, Limits};
use crate::history::SavedGroup;
use crate::line::Change;
use crate::observation::{Details, Report, Sample, Seed, Stage};
use crate::session::Failure;
use crate::view::GroupView;

/// The upper bounds of the buckets of round trips, in seconds: a server nearby, one far away, and
/// the limit on an answer.
pub const ROUND_TRIP_BUCKETS: [f64; 6] = [0.001, 0.005, 0.025, 0.1, 0.5, 2.5];

/// What is known about everything, at one moment: what `/status` shows and `/metrics` renders.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Snapshot {
    /// The cluster, as the configuration names it.
    pub cluster: String,
    /// When this was made, by the wall clock.
    pub made_at: DateTime<Utc>,
    /// The groups, by number.
    pub groups: Vec<GroupView>,
    /// The connections, by group and name.
    pub targets: Vec<Target>,
}

impl Snapshot {
    /// The connection to a node.
    pub fn target(&self, group: u32, name: &str) -> Option<&Target> {
        let found = self
            .targets
            .binary_search_by(|it| it.group.cmp(&group).then_with(|| it.name.as_str().cmp(name)));
        found.ok().map(|index| &self.targets[index])
    }
}

/// The connection to one node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Target {
    /// The node's group.
    pub group: u32,
    /// The node's name.
    pub name: String,
    /// Where it is reached: `10.0.0.7:5432`, or the directory of a Unix socket.
    pub address: String,
    /// Why the last question was not answered; `None` if it was.
    pub error: Option<String>,
    /// Why the last new connection was not made; `None` if it was.
    pub fresh_connect_error: Option<String>,
    /// Failures by how far they came, in the order of [`Stage::ALL`].
    pub failures: [u64; Stage::ALL.len()],
    /// Round trips by [`ROUND_TRIP_BUCKETS`]; the last are those that took longer.
    pub round_trips: [u64; ROUND_TRIP_BUCKETS.len() + 1],
    /// Their sum, in seconds.
    pub round_trip_seconds: f64,
}

impl Target {
    pub(crate) fn new(node: &Node) -> Self {
        let Node { group, name, host, port } = node;
        let address = if node.is_local() { host.clone() } else { format!("{host}:{port}") };
        Self {
            group: *group,
            name: name.clone(),
            address,
            error: None,
            fresh_connect_error: None,
            failures: [0; Stage::ALL.len()],
            round_trips: [0; ROUND_TRIP_BUCKETS.len() + 1],
            round_trip_seconds: 0.0,
        }
    }

    pub(crate) fn answered(&mut self, round_trip: Duration) {
        let seconds = round_trip.as_secs_f64();
        let bucket = ROUND_TRIP_BUCKETS.iter().position(|bound| seconds <= *bound);
        self.round_trips[bucket.unwrap_or(ROUND_TRIP_BUCKETS.len())] += 1;
        self.round_trip_seconds += seconds;
    }

    pub(crate) fn count(&mut self, stage: Stage) {
        if let Some(index) = Stage::ALL.iter().position(|it| *it == stage) {
            self.failures[index] += 1;
        }
    }
}

/// What was learnt, and may have failed.
#[derive(Debug)]
pub enum Learnt {
    /// The kept connection ended; a new one is made at once, so this says nothing about the server
    /// yet.
    ConnectionLost(Failure),
    /// There is no connection, neither a kept nor a new one.
    NoConnection(Failure),
    /// The positions.
    Sample(Result<Sample, Failure>),
    /// What changes slowly.
    Details(Result<Details, Failure>),
    /// The ages of positions before the first sample.
    Seed(Result<Seed, Failure>),
    /// A new connection beside the kept one.
    FreshConnect(Result<(), Failure>),
}

/// All groups. Clones share them.
#[derive(Clone, Debug)]
pub struct Fleet {
    cluster: Arc<str>,
    limits: Limits,
    known: Arc<Mutex<Known>>,
}

#[derive(Debug, Default)]
struct Known {
    groups: BTreeMap<u32, Group>,
    targets: BTreeMap<(u32, String), Target>,
    /// Whether every node was asked once.
    is_ready: bool,
}

impl Known {
    fn views(&self) -> Vec<GroupView> {
        let now = clock::now();
        // One without nodes is only remembered.
        let groups = self.groups.values().filter(|group| !group.nodes.is_empty());
        groups.map(|group| group.view(now)).collect()
    }
}

impl Fleet {
    /// No group yet.
    pub fn new(cluster: &str, limits: Limits) -> Self {
        Self { cluster: cluster.into(), limits, known: Arc::default() }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes up what another process knew, before anything else.
    pub fn restore(&self, saved: Vec<SavedGroup>) {
        let mut known = self.known();
        for saved in saved {
            let (number, entries) = (saved.group, saved.entries.len());
            let mut group = Group::new(number, self.limits);
            if group.restore(saved) {
                info!(group = number, entries, "history restored");
                known.groups.insert(number, group);
            }
        }
    }

    /// What another process would need to know.
    pub fn saved(&self) -> Vec<SavedGroup> {
        self.known().groups.values().filter_map(Group::saved).collect()
    }

    /// Says which nodes there are now. To be said again now and then: it is when those are
    /// forgotten that left long ago.
    pub fn set_members(&self, nodes: &[Node]) {
        let now = clock::now();
        let mut known = self.known();
        let Known { groups, targets, .. } = &mut *known;
        let mut names: BTreeMap<u32, Vec<String>> =
            groups.keys().map(|group| (*group, Vec::new())).collect();
        for node in nodes {
            names.entry(node.group).or_default().push(node.name.clone());
            let target = targets.entry((node.group, node.name.clone()));
            let target = target.or_insert_with(|| Target::new(node));
            target.address = Target::new(node).address;
        }
        for (number, names) in names {
            let group = groups.entry(number).or_insert_with(|| Group::new(number, self.limits));
            group.set_members(&names, now);
        }
        groups.retain(|_, group| !group.is_forgotten(now));
        targets.retain(|(number, name), _| {
            groups.get(number).is_some_and(|group| group.nodes.contains_key(name))
        });
    }

    /// Whether `node` is a member, or left not long ago.
    pub fn remembers(&self, node: &Node) -> bool {
        self.known().targets.contains_key(&(node.group, node.name.clone()))
    }

    /// Takes in what was learnt about `node`. Returns whether it should be asked for a seed.
    pub fn record(&self, node: &Node, learnt: Learnt) -> bool {
        let at = clock::now();
        let mut known = self.known();
        let Known { groups, targets, .. } = &mut *known;
        let target = targets.get_mut(&(node.group, node.name.clone()));
        let (Some(target), Some(group)) = (target, groups.get_mut(&node.group)) else {
            return false;
        };
        let report = match learnt {
            Learnt::Sample(Ok(sample)) => {
                target.answered(sample.answered_at.saturating_sub(sample.asked_at));
                target.error = None;
                Report::Sample(sample)
            }
            Learnt::Details(Ok(details)) => Report::Details(Box::new(details)),
            Learnt::Seed(Ok(seed)) => Report::Seed(seed),
            Learnt::ConnectionLost(failure) => {
                target.count(failure.stage);
                return false;
            }
            Learnt::NoConnection(failure) => {
                let outcome = Err(failure.stage);
                group.record(&node.name, Report::FreshConnect { at, outcome });
                target.count(failure.stage);
                target.fresh_connect_error = Some(failure.error.clone());
                target.error = Some(failure.error);
                Report::Failed { at, stage: failure.stage }
            }
            // Which says nothing about its positions.
            Learnt::Seed(Err(failure)) => {
                target.count(failure.stage);
                Report::SeedRefused
            }
            Learnt::Sample(Err(failure)) | Learnt::Details(Err(failure)) => {
                target.count(failure.stage);
                target.error = Some(failure.error);
                Report::Failed { at, stage: failure.stage }
            }
            Learnt::FreshConnect(outcome) => {
                let outcome = outcome.map_err(|failure| {
                    target.count(failure.stage);
                    target.fresh_connect_error = Some(failure.error);
                    failure.stage
                });
                if outcome.is_ok() {
                    target.fresh_connect_error = None;
                }
                Report::FreshConnect { at, outcome }
            }
        };
        match group.record(&node.name, report) {
            None => {}
            Some(Change::Promoted { from, to }) => {
                info!(group = node.group, node = node.name, from, timeline = to, "primary changed");
            }
            Some(Change::BegunAnew) => {
                warn!(group = node.group, node = node.name, "WAL history begins anew");
            }
        }
        group.wants_seed() == Some(&node.name)
    }

    /// What is known now.
    pub fn snapshot(&self) -> Snapshot {
        let known = self.known();
        let groups = known.views();
        let targets = known.targets.values().cloned().collect();
        Snapshot { cluster: self.cluster.to_string(), made_at: Utc::now(), groups, targets }
    }

    /// The groups of a [`Snapshot`].
    pub fn groups(&self) -> Vec<GroupView> {
        self.known().views()
    }

    /// Why the first round is not over. Once it is, a node that comes later, or does not answer,
    /// is no reason.
    pub fn not_ready(&self) -> Option<String> {
        let mut known = self.known();
        if known.is_ready {
            return None;
        }
        let nodes = || known.groups.values().flat_map(|group| group.nodes.values());
        let waiting = nodes().filter(|node| node.up.is_none()).count();
        match (nodes().count(), waiting) {
            (0, _) => Some("no node is known yet".to_owned()),
            (_, 0) => {
                known.is_ready = true;
                None
            }
            (all, waiting) => Some(format!("{waiting} of {all} nodes were not asked yet")),
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio_postgres::types::PgLsn;

    use super::*;
    use crate::observation::{Directory, Identity, Position};

    #[test]
    fn a_seed_that_is_refused_is_asked_for_once_and_proves_nothing() {
        let limits = Limits {
            stale_after: Duration::from_secs(5),
            history: Duration::from_hours(1),
            forget_after: Duration::from_mins(5),
        };
        let node = Node { group: 0, name: "a".to_owned(), host: "a".to_owned(), port: 5432 };
        let fleet = Fleet::new("demo", limits);
        fleet.set_members(std::slice::from_ref(&node));
        assert_eq!(fleet.not_ready().as_deref(), Some("1 of 1 nodes were not asked yet"));
        let sample = || Sample {
            asked_at: clock::now(),
            answered_at: clock::now(),
            identity: Identity {
                system_identifier: 7,
                server_version: 170_002,
                wal_segment_bytes: 16 << 20,
                started_at: DateTime::UNIX_EPOCH,
            },
            directory: Directory::default(),
            clock_ahead: chrono::TimeDelta::zero(),
            position: Position::Primary {
                timeline: 1,
                flush_lsn: PgLsn::from(5),
                insert_lsn: PgLsn::from(5),
                fork_lsn: None,
            },
        };
        assert!(fleet.record(&node, Learnt::Sample(Ok(sample()))), "a seed is wanted");
        let refused =
            Failure { stage: Stage::Query, error: "permission denied".to_owned(), is_final: false };
        assert!(!fleet.record(&node, Learnt::Seed(Err(refused))));
        assert_eq!(fleet.groups()[0].nodes[0].up, Some(true));
        assert_eq!(fleet.snapshot().targets[0].error, None);
        assert!(!fleet.record(&node, Learnt::Sample(Ok(sample()))));
        assert_eq!(fleet.not_ready(), None);
        assert!(fleet.remembers(&node));
    }
}
