//! What Prometheus and `/status` see.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use chrono::{DateTime, Utc};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{
    DescriptorEncoder, EncodeLabelSet, EncodeLabelValue, EncodeMetric,
};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::{Registry, Unit};
use serde::Serialize;
use shared::lease::Shares;
use tokio::sync::watch;

use crate::follow::standing::Standing;
use crate::follow::{Following, SlotState, WalState};
use crate::manifest::Commit;
use crate::outlook::Outlook;
use crate::progress::Progress;

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
#[expect(non_camel_case_types, reason = "the names are the label's values")]
pub enum Outcome {
    /// A backup was committed.
    ok,
    /// A backup was committed and is suspect.
    suspect,
    /// None was.
    failed,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RunLabels {
    cluster: String,
    group: u32,
    outcome: Outcome,
}

/// What is known of one group.
#[derive(Clone, Debug, Default, Serialize)]
pub struct GroupState {
    /// The last run of this process that committed a backup.
    pub last_run: Option<LastRun>,
    /// Why the last run failed, if it did.
    pub last_error: Option<String>,
    /// What the repository holds, and when that was read.
    pub repository: Option<RepositoryState>,
    #[serde(skip)]
    progress: Option<Progress>,
    #[serde(skip)]
    following: Option<watch::Receiver<Following>>,
}

impl GroupState {
    /// What is known about receiving the group's WAL, where this agent does.
    fn following(&self) -> Option<Following> {
        self.following.as_ref().map(|following| following.borrow().clone())
    }
}

/// A run that committed a backup.
#[derive(Clone, Debug, Serialize)]
pub struct LastRun {
    /// The backup.
    pub backup_id: String,
    /// When it was complete.
    pub finished_at: DateTime<Utc>,
    /// How long it took, seconds.
    pub seconds: f64,
    /// Bytes before compression.
    pub bytes: u64,
    /// Bytes in the store.
    pub object_bytes: u64,
}

/// What the repository holds of one group.
#[derive(Clone, Debug, Serialize)]
pub struct RepositoryState {
    /// When it was read.
    pub observed_at: DateTime<Utc>,
    /// Of which database cluster; too many digits for a number of JSON.
    pub system_identifier: Option<String>,
    /// Backups that can be restored.
    pub backups: u64,
    /// Of those, suspect.
    pub suspect: u64,
    /// Backups whose commit object cannot be read.
    pub unreadable: u64,
    /// When the newest that is not suspect was complete.
    pub newest_at: Option<DateTime<Utc>>,
    /// From when on a moment can be reached.
    pub reachable_from: Option<DateTime<Utc>>,
    /// Until when, and what is wrong.
    #[serde(flatten)]
    pub outlook: Outlook,
    /// Pieces of WAL segments that were written since the newest backup and not removed yet.
    pub wal_pieces: u64,
}

impl RepositoryState {
    /// Nothing of a database cluster.
    pub fn new(system_identifier: Option<u64>) -> Self {
        Self {
            observed_at: Utc::now(),
            system_identifier: system_identifier.map(|it| it.to_string()),
            backups: 0,
            suspect: 0,
            unreadable: 0,
            newest_at: None,
            reachable_from: None,
            outlook: Outlook::default(),
            wal_pieces: 0,
        }
    }
}

/// The state of all groups, shared between the loops and the admin server.
#[derive(Clone, Debug)]
pub struct State {
    cluster: String,
    shares: Shares,
    groups: Arc<Mutex<BTreeMap<u32, GroupState>>>,
    runs: Family<RunLabels, Counter>,
}

impl State {
    /// A state that knows of no group.
    pub fn new(cluster: &str, shares: Shares) -> Self {
        let (groups, runs) = (Arc::default(), Family::default());
        Self { cluster: cluster.to_owned(), shares, groups, runs }
    }

    /// Since when etcd grants no lease, and this replica does nothing for it.
    pub fn lost_since(&self) -> Option<DateTime<Utc>> {
        self.shares.lost_since()
    }

    /// This replica is responsible for a group now, and this tells how its WAL is followed, if it is.
    pub fn took(&self, group: u32, following: Option<watch::Receiver<Following>>) {
        for outcome in [Outcome::ok, Outcome::suspect, Outcome::failed] {
            // Every series from 0 on, so that `rate()` sees the first failure.
            let cluster = self.cluster.clone();
            drop(self.runs.get_or_create(&RunLabels { cluster, group, outcome }));
        }
        self.change(group, |state| state.following = following);
    }

    /// Another replica is responsible for a group now: nothing is told of it any more.
    pub fn left(&self, group: u32) {
        self.groups.lock().unwrap_or_else(PoisonError::into_inner).remove(&group);
    }

    /// Registers the metrics below `backup`.
    pub fn register(&self, registry: &mut Registry) {
        let registry = registry.sub_registry_with_prefix("backup");
        registry.register("runs", "Base backup runs by outcome", self.runs.clone());
        registry.register_collector(Box::new(self.clone()));
    }

    /// A run began.
    pub fn began(&self, group: u32, progress: &Progress) {
        self.change(group, |state| state.progress = Some(progress.clone()));
    }

    /// A run committed a backup.
    pub fn completed(&self, group: u32, commit: &Commit) {
        let outcome = if commit.suspect.is_some() { Outcome::suspect } else { Outcome::ok };
        self.count(group, outcome);
        let run = LastRun {
            backup_id: commit.backup_id.to_string(),
            finished_at: commit.finished_at,
            seconds: (commit.finished_at - commit.started_at).as_seconds_f64(),
            bytes: commit.plain_bytes(),
            object_bytes: commit.object_bytes(),
        };
        self.change(group, |state| {
            state.progress = None;
            state.last_run = Some(run);
            state.last_error = None;
        });
    }

    /// A run failed.
    pub fn failed(&self, group: u32, error: String) {
        self.count(group, Outcome::failed);
        self.change(group, |state| {
            state.progress = None;
            state.last_error = Some(error);
        });
    }

    /// The repository was read.
    pub fn observed(&self, group: u32, repository: RepositoryState) {
        self.change(group, |state| state.repository = Some(repository));
    }

    /// Whether WAL was missing when the repository was last read.
    pub fn gap_seen(&self, group: u32) -> bool {
        let snapshot = self.snapshot();
        let observed = snapshot.get(&group).and_then(|it| it.repository.as_ref());
        observed.is_some_and(|it| it.outlook.gap_seen)
    }

    /// The database cluster that is followed: its system identifier, and its primary's timeline.
    pub fn followed(&self, group: u32) -> Option<(u64, u32)> {
        let following = self.snapshot().get(&group)?.following()?;
        following.primary.map(|primary| (primary.system_identifier, primary.timeline))
    }

    /// The database cluster that the repository was last read of.
    pub fn system_identifier(&self, group: u32) -> Option<u64> {
        let snapshot = self.snapshot();
        snapshot.get(&group)?.repository.as_ref()?.system_identifier.as_ref()?.parse().ok()
    }

    /// When the repository was last read, for each group.
    pub fn observed_at(&self) -> Vec<(u32, Option<DateTime<Utc>>)> {
        let at = |state: GroupState| state.repository.map(|it| it.observed_at);
        self.snapshot().into_iter().map(|(group, state)| (group, at(state))).collect()
    }

    /// What `/status` shows.
    pub fn status(&self) -> serde_json::Value {
        let groups: BTreeMap<u32, serde_json::Value> = self
            .snapshot()
            .into_iter()
            .map(|(group, state)| {
                let run = state.progress.as_ref().map(Progress::now).map(|(stage, done, total)| {
                    serde_json::json!({ "stage": stage, "bytes": done, "bytes_total": total })
                });
                let wal = state.following().map(|following| following.status());
                (group, serde_json::json!({ "running": run, "state": state, "wal": wal }))
            })
            .collect();
        serde_json::json!({
            "cluster": self.cluster,
            "now": Utc::now(),
            "no_lease_since": self.lost_since(),
            "groups": groups,
        })
    }

    fn count(&self, group: u32, outcome: Outcome) {
        let cluster = self.cluster.clone();
        self.runs.get_or_create(&RunLabels { cluster, group, outcome }).inc();
    }

    fn change(&self, group: u32, change: impl FnOnce(&mut GroupState)) {
        let mut groups = self.groups.lock().unwrap_or_else(PoisonError::into_inner);
        change(groups.entry(group).or_default());
    }

    fn snapshot(&self) -> BTreeMap<u32, GroupState> {
        self.groups.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// One gauge: its name, help, unit, and its value for a group, if there is one.
type Gauge = (&'static str, &'static str, Option<Unit>, fn(&GroupState) -> Option<f64>);

/// Prometheus has no integers: counts of bytes beyond 2⁵³ lose their last digits there too.
#[expect(clippy::cast_precision_loss, reason = "samples are 64-bit floats")]
fn float(count: u64) -> f64 {
    count as f64
}

fn bit(set: bool) -> f64 {
    if set { 1.0 } else { 0.0 }
}

fn seconds_since_1970(at: DateTime<Utc>) -> f64 {
    (at - DateTime::UNIX_EPOCH).as_seconds_f64()
}

/// What is not known is not there: an absent series says so, a 0 would not.
const GAUGES: &[Gauge] = &[
    ("running", "1 while a base backup is under way.", None, |state| {
        Some(bit(state.progress.is_some()))
    }),
    (
        "running_bytes",
        "Bytes of the server's files that the run under way has stored.",
        None,
        |state| state.progress.as_ref().map(|progress| float(progress.now().1)),
    ),
    (
        "last_success_timestamp",
        "When the last base backup of this process was complete.",
        Some(Unit::Seconds),
        |state| state.last_run.as_ref().map(|run| seconds_since_1970(run.finished_at)),
    ),
    ("last_duration", "How long the last base backup took.", Some(Unit::Seconds), |state| {
        state.last_run.as_ref().map(|run| run.seconds)
    }),
    ("last_size", "Size of the last base backup before compression.", Some(Unit::Bytes), |state| {
        state.last_run.as_ref().map(|run| float(run.bytes))
    }),
    (
        "last_stored",
        "Size of the last base backup in the repository.",
        Some(Unit::Bytes),
        |state| state.last_run.as_ref().map(|run| float(run.object_bytes)),
    ),
    (
        "repository_observed_timestamp",
        "When the repository was last read.",
        Some(Unit::Seconds),
        |state| state.repository.as_ref().map(|it| seconds_since_1970(it.observed_at)),
    ),
    ("repository_backups", "Base backups in the repository.", None, |state| {
        state.repository.as_ref().map(|it| float(it.backups))
    }),
    (
        "repository_suspect_backups",
        "Base backups of which the server read damaged pages, or left data out.",
        None,
        |state| state.repository.as_ref().map(|it| float(it.suspect)),
    ),
    (
        "repository_unreadable_backups",
        "Base backups whose commit object cannot be read.",
        None,
        |state| state.repository.as_ref().map(|it| float(it.unreadable)),
    ),
    (
        "newest_timestamp",
        "When the newest base backup in the repository that is not suspect was complete.",
        Some(Unit::Seconds),
        |state| Some(seconds_since_1970(state.repository.as_ref()?.newest_at?)),
    ),
    (
        "reachable_from_timestamp",
        "The earliest moment that can be restored.",
        Some(Unit::Seconds),
        |state| Some(seconds_since_1970(state.repository.as_ref()?.reachable_from?)),
    ),
    (
        "reachable_until_timestamp",
        "The latest moment that can be restored from the newest base backup.",
        Some(Unit::Seconds),
        |state| Some(seconds_since_1970(state.repository.as_ref()?.outlook.reachable_until?)),
    ),
    (
        "wal_broken",
        "1 when WAL after the newest base backup is missing or ambiguous.",
        None,
        |state| {
            let broken = state.repository.as_ref()?.outlook.broken_at.is_some();
            Some(bit(broken))
        },
    ),
    (
        "wal_pieces",
        "Pieces of WAL segments in the repository since the newest base backup: some dozens, unless \
         the store does not let them be deleted.",
        None,
        |state| state.repository.as_ref().map(|it| float(it.wal_pieces)),
    ),
    ("wal_receiving", "1 while WAL is being received.", None, |state| {
        Some(bit(state.following()?.received.is_some()))
    }),
    (
        "wal_contiguous_until_timestamp",
        "The last moment of which all WAL of the primary is in the repository; none before that is \
         known once, see wal_state.",
        Some(Unit::Seconds),
        |state| Some(seconds_since_1970(state.following()?.caught_up_at?)),
    ),
    (
        "wal_lag",
        "Age of the oldest WAL of the primary that is not in the repository; if all is, the time since \
         the primary said so, which it does each 5 s. None before that is known once, see wal_state.",
        Some(Unit::Seconds),
        |state| Some((Utc::now() - state.following()?.caught_up_at?).as_seconds_f64()),
    ),
    (
        "wal_lag",
        "WAL on the primary's disk, as far as it told, that is not in the repository; none while none is \
         received, see wal_state.",
        Some(Unit::Bytes),
        |state| state.following()?.received?.lag_bytes().map(float),
    ),
    (
        "wal_upload_age",
        "How long the oldest upload of WAL that is under way has taken so far; 0 if none is.",
        Some(Unit::Seconds),
        |state| {
            let following = state.following().filter(|it| it.received.is_some())?;
            Some(following.upload_since.map_or(0.0, |since| since.elapsed().as_secs_f64()))
        },
    ),
    (
        "wal_stored_position",
        "The position up to which WAL is in the repository, in bytes from 0/0.",
        Some(Unit::Bytes),
        |state| Some(float(state.following()?.received?.stored_lsn.into())),
    ),
    ("wal_timeline", "The timeline that is being received.", None, |state| {
        Some(f64::from(state.following()?.received?.timeline))
    }),
    (
        "wal_heartbeat_timestamp",
        "When a record written to the primary was last read back from the repository.",
        Some(Unit::Seconds),
        |state| Some(seconds_since_1970(state.following()?.heartbeat_at?)),
    ),
    ("commits_wait", "1 while commits wait for the repository.", None, |state| {
        Some(bit(state.following()?.burden?.commits_wait))
    }),
    (
        "commits_wait_alone",
        "1 while commits wait for the repository and for no other standby.",
        None,
        |state| {
            let burden = state.following()?.burden?;
            Some(bit(burden.commits_wait && burden.other_synchronous == 0))
        },
    ),
];

/// One gauge of a slot: its name, help, unit, and its value on a server, if there is one.
type SlotGauge = (&'static str, &'static str, Option<Unit>, fn(&SlotState) -> Option<f64>);

/// Of each server with the slot: the primary's holds back what is received from, a standby's what
/// will be if that is promoted.
const SLOT_GAUGES: &[SlotGauge] = &[
    (
        "slot_retained",
        "WAL that the server keeps because the repository does not have it yet.",
        Some(Unit::Bytes),
        |slot| slot.burden.retained_bytes.map(float),
    ),
    (
        "slot_limit",
        "max_slot_wal_keep_size of the server: beyond it the slot is lost.",
        Some(Unit::Bytes),
        |slot| slot.burden.limit_bytes.map(float),
    ),
    (
        "slot_lost",
        "1 from the loss of the slot until what it held back is stored, or its loss recorded.",
        None,
        |slot| Some(bit(slot.burden.is_lost)),
    ),
    ("pg_wal_size", "Size of pg_wal on the server.", Some(Unit::Bytes), |slot| {
        Some(float(slot.burden.pg_wal_bytes))
    }),
];

impl State {
    /// Whatever is not known of a group's WAL: how receiving it goes is.
    fn encode_wal_states(
        &self,
        groups: &BTreeMap<u32, GroupState>,
        encoder: &mut DescriptorEncoder<'_>,
    ) -> Result<(), fmt::Error> {
        let states = groups.iter().filter_map(|(group, state)| Some((group, state.following()?)));
        let states: Vec<_> =
            states.map(|(group, it)| (group.to_string(), it.wal_state())).collect();
        if states.is_empty() {
            return Ok(());
        }
        let help = "How receiving WAL goes, one series per state: 1 for the current one.";
        let mut family = encoder.encode_descriptor("wal_state", help, None, MetricType::Gauge)?;
        for (group, current) in states {
            for (state, name) in WalState::ALL {
                let labels =
                    [("cluster", self.cluster.as_str()), ("group", &group), ("state", name)];
                ConstGauge::new(bit(state == current)).encode(family.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }

    /// What each server is to the primary that is followed.
    fn encode_servers(
        &self,
        groups: &BTreeMap<u32, GroupState>,
        encoder: &mut DescriptorEncoder<'_>,
    ) -> Result<(), fmt::Error> {
        let of_group = |(group, state): (&u32, &GroupState)| {
            let servers = state.following().unwrap_or_default().servers;
            let group = group.to_string();
            servers.into_iter().map(move |(node, it)| (group.clone(), node, it.name()))
        };
        let servers: Vec<_> = groups.iter().flat_map(of_group).collect();
        if servers.is_empty() {
            return Ok(());
        }
        let help = "How a server stands to the primary that is followed, one series per state: 1 for the \
                    current one.";
        let mut family =
            encoder.encode_descriptor("server_state", help, None, MetricType::Gauge)?;
        for (group, node, current) in servers {
            for name in Standing::NAMES {
                let labels = [
                    ("cluster", self.cluster.as_str()),
                    ("group", &group),
                    ("node", &node),
                    ("state", name),
                ];
                ConstGauge::new(bit(name == current)).encode(family.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }

    fn encode_slots(
        &self,
        groups: &BTreeMap<u32, GroupState>,
        encoder: &mut DescriptorEncoder<'_>,
    ) -> Result<(), fmt::Error> {
        let following: Vec<_> = groups
            .iter()
            .filter_map(|(group, state)| Some((group.to_string(), state.following()?)))
            .collect();
        for (name, help, unit, value) in SLOT_GAUGES {
            let of_group = |(group, following): &(String, Following)| {
                let value = |(node, slot): (&String, &SlotState)| {
                    Some((group.clone(), node.clone(), value(slot)?))
                };
                following.slots.iter().filter_map(value).collect::<Vec<_>>()
            };
            let values: Vec<_> = following.iter().flat_map(of_group).collect();
            if values.is_empty() {
                continue;
            }
            let mut family =
                encoder.encode_descriptor(name, help, unit.as_ref(), MetricType::Gauge)?;
            for (group, node, value) in values {
                let labels =
                    [("cluster", self.cluster.as_str()), ("group", &group), ("node", &node)];
                ConstGauge::new(value).encode(family.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }
}

impl Collector for State {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let groups = self.snapshot();
        let help = "0 while etcd grants no lease: this replica receives no WAL and takes no scheduled \
                    backup then; otherwise 1.";
        let mut family = encoder.encode_descriptor("has_lease", help, None, MetricType::Gauge)?;
        let has_lease = ConstGauge::new(bit(self.lost_since().is_none()));
        has_lease.encode(family.encode_family(&[("cluster", self.cluster.as_str())])?)?;
        for (name, help, unit, value) in GAUGES {
            let values: Vec<_> =
                groups.iter().filter_map(|(group, state)| Some((group, value(state)?))).collect();
            if values.is_empty() {
                continue;
            }
            let mut family =
                encoder.encode_descriptor(name, help, unit.as_ref(), MetricType::Gauge)?;
            for (group, value) in values {
                let labels = [("cluster", self.cluster.as_str()), ("group", &group.to_string())];
                ConstGauge::new(value).encode(family.encode_family(&labels)?)?;
            }
        }
        self.encode_wal_states(&groups, &mut encoder)?;
        self.encode_servers(&groups, &mut encoder)?;
        self.encode_slots(&groups, &mut encoder)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::time::Duration;

    use prometheus_client::encoding::text::encode;
    use shared::lease::{Identity, TTL};

    use super::*;

    #[test]
    fn a_group_of_which_nothing_is_known_has_a_state() {
        let identity = Identity {
            cluster: "demo".to_owned(),
            agent: "backup-agent".to_owned(),
            replica: "a".to_owned(),
        };
        let (_, none) = watch::channel(BTreeSet::new());
        let (shares, _sharing) = Shares::new(None, identity, none, TTL, Duration::ZERO);
        let state = State::new("demo", shares);
        let (known, following) = watch::channel(Following::default());
        state.took(0, Some(following));
        state.took(1, None);
        let mut registry = Registry::default();
        state.register(&mut registry);
        let scrape = || {
            let mut text = String::new();
            encode(&mut text, &registry).unwrap();
            text
        };
        let said = |name: &str| {
            format!("backup_wal_state{{cluster=\"demo\",group=\"0\",state=\"{name}\"}} 1.0")
        };
        let text = scrape();
        assert!(text.contains("backup_has_lease{cluster=\"demo\"} 1.0"), "{text}");
        assert!(text.contains(&said("no_primary")) && !text.contains("wal_lag"), "{text}");
        assert_eq!(text.matches("backup_wal_state{").count(), WalState::ALL.len(), "{text}");
        assert!(!text.contains("server_state"), "{text}");
        let old = Standing::OldPrimary { timeline: 1, newest: 2 };
        known.send_modify(|it| it.servers = BTreeMap::from([("b".to_owned(), old)]));
        let labels = "cluster=\"demo\",group=\"0\",node=\"b\",state=\"old_primary\"";
        let text = scrape();
        assert!(text.contains(&format!("backup_server_state{{{labels}}} 1.0")), "{text}");
        assert_eq!(text.matches("backup_server_state{").count(), Standing::NAMES.len(), "{text}");
        known.send_modify(|it| it.caught_up_at = Some(Utc::now()));
        assert!(scrape().contains("wal_lag_seconds{"), "{}", scrape());
    }
}
