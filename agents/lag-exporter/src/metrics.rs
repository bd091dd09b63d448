//! What Prometheus sees: the state of this moment, rendered from memory.
//!
//! A sample that is not known is left out. Of what is one of several words, all are always there.
//! Whatever is there twice is rendered once and counted, since Prometheus refuses a whole scrape
//! for one such series.
//!
//! How long the disk of `pg_wal` lasts is not among it: no query tells its free space. The runway of
//! a slot is that until `max_slot_wal_keep_size`.

mod gauges;
mod rows;

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::exemplar::Exemplar;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::{Registry, Unit};

use self::gauges::{GROUP_GAUGES, NODE_GAUGES, SENDER_GAUGES, SENDER_STATES, SLOT_GAUGES};
use self::rows::{Labels, Scope};
pub(crate) use self::rows::{NodeRow, Rows};
use crate::compat;
use crate::config::Compat;
use crate::fleet::{Fleet, ROUND_TRIP_BUCKETS, Snapshot};
use crate::observation::{ReceiverStatus, Stage, WalStatus};
use crate::view::{GroupView, LagState, NodeState, Role, SlotView, SplitBrain};

/// Renders the fleet at each scrape.
#[derive(Debug)]
pub struct FleetCollector {
    fleet: Fleet,
    compat: Option<Compat>,
    dropped: AtomicU64,
}

impl FleetCollector {
    /// Registers everything below `pgmesh_lag_`, and what `compat` names. The registry must have no
    /// prefix.
    pub fn register(registry: &mut Registry, fleet: Fleet, compat: Option<Compat>) {
        registry.register_collector(Box::new(Self { fleet, compat, dropped: AtomicU64::new(0) }));
    }
}

impl Collector for FleetCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        encode(&self.fleet.snapshot(), self.compat, &self.dropped, &mut encoder)
    }
}

fn encode(
    snapshot: &Snapshot,
    compat: Option<Compat>,
    dropped: &AtomicU64,
    encoder: &mut DescriptorEncoder<'_>,
) -> fmt::Result {
    let scope = |group: &GroupView| Scope::of(&snapshot.cluster, group.group);
    let scopes: Vec<Scope> = snapshot.groups.iter().map(scope).collect();
    let rows = Rows::of(snapshot, &scopes);
    let dropped = dropped.fetch_add(rows.dropped, Ordering::Relaxed) + rows.dropped;
    rows.encode(encoder, dropped)?;
    match compat {
        None => Ok(()),
        Some(Compat::PostgresExporter) => compat::encode(&rows, encoder),
    }
}

impl Rows<'_> {
    fn encode(&self, encoder: &mut DescriptorEncoder<'_>, dropped: u64) -> fmt::Result {
        for (name, help, unit, value) in GROUP_GAUGES {
            let samples = self.groups.iter().filter_map(|it| Some((it.labels(), value(it)?)));
            gauges(encoder, (name, help, unit.as_ref()), samples)?;
        }
        for (name, help, unit, value) in NODE_GAUGES {
            let samples = self.nodes.iter().filter_map(|it| Some((it.labels(), value(it)?)));
            gauges(encoder, (name, help, unit.as_ref()), samples)?;
        }
        for (name, help, unit, value) in SENDER_GAUGES {
            let samples = self.senders.iter().filter_map(|(node, sender)| {
                Some((node.with([("standby", &sender.name)]), value(sender)?))
            });
            gauges(encoder, (name, help, unit.as_ref()), samples)?;
        }
        for (name, help, unit, value) in SLOT_GAUGES {
            let samples = self
                .slots
                .iter()
                .filter_map(|it| Some((it.0.with(slot_labels(it.1)), value(it.1)?)));
            gauges(encoder, (name, help, unit.as_ref()), samples)?;
        }
        self.encode_group_states(encoder)?;
        self.encode_states(encoder)?;
        self.encode_counters(encoder, dropped)?;
        self.encode_round_trips(encoder)
    }

    /// What is one of several words of a group.
    fn encode_group_states(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let samples = self.groups.iter().flat_map(|group| {
            let current = match &group.view.split_brain {
                SplitBrain::No => "no",
                SplitBrain::Candidate(_) => "candidate",
                SplitBrain::Confirmed(_) => "confirmed",
            };
            ["no", "candidate", "confirmed"]
                .into_iter()
                .map(move |state| (group.with([("state", state)]), bit(state == current)))
        });
        let help =
            "Whether more than one primary takes writes: at the same moment, and both wrote.";
        gauges(encoder, ("pgmesh_lag_group_split_brain", help, None), samples)?;

        let samples = self.groups.iter().flat_map(|group| {
            let current = match (&group.view.primary, &group.view.standby_leader) {
                (Some(_), _) => "primary",
                (None, Some(_)) => "standby_leader",
                (None, None) => NONE,
            };
            ["primary", "standby_leader", NONE]
                .into_iter()
                .map(move |method| (group.with([("method", method)]), bit(method == current)))
        });
        let help = "What the lag is measured against. A standby leader, where the primary is in \
                    another cluster, may be behind itself.";
        gauges(encoder, ("pgmesh_lag_group_lag_method", help, None), samples)
    }

    /// What is one of several words of something in it.
    fn encode_states(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let samples =
            self.nodes.iter().filter_map(|it| Some((it, it.lag()?))).flat_map(|(node, lag)| {
                LagState::ALL.into_iter().map(move |state| {
                    (node.with([("state", state.name())]), bit(state == lag.state))
                })
            });
        let help = "What the lag's numbers mean, or why there are none.";
        gauges(encoder, ("pgmesh_lag_lag_state", help, None), samples)?;

        let standbys = || self.nodes.iter().filter_map(|it| Some((it, standby(it)?)));
        let samples = standbys().flat_map(|(node, state)| {
            let current = state.receiver.map_or(NONE, |it| it.status.name());
            let names = ReceiverStatus::ALL.map(ReceiverStatus::name).into_iter().chain([NONE]);
            names.map(move |name| (node.with([("state", name)]), bit(name == current)))
        });
        let help = "The status of the WAL receiver; none if none runs.";
        gauges(encoder, ("pgmesh_lag_wal_receiver_state", help, None), samples)?;

        for (name, help, states, current) in SENDER_STATES {
            let samples = self.senders.iter().flat_map(|(node, sender)| {
                states.iter().map(move |state| {
                    let labels = node.with([("standby", &sender.name), ("state", *state)]);
                    (labels, bit(*state == current(sender)))
                })
            });
            gauges(encoder, (name, help, None), samples)?;
        }

        let samples = self.slots.iter().flat_map(|slot| {
            let (node, slot) = slot;
            let [name, kind] = slot_labels(slot);
            let current = slot.wal_status.map_or(NONE, WalStatus::name);
            let names = WalStatus::ALL.map(WalStatus::name).into_iter().chain([NONE]);
            names.map(move |state| {
                (node.with([name, kind, ("state", state)]), bit(state == current))
            })
        });
        let help = "Whether the WAL that a slot needs is still there; none if it needs none.";
        gauges(encoder, ("pgmesh_lag_slot_wal_status", help, None), samples)?;

        let infos = self.nodes.iter().filter_map(|it| Some((it, it.state()?)));
        let infos: Vec<_> = infos
            .map(|(node, state)| {
                let role = if node.is_primary() { "primary" } else { "standby" };
                let (major, minor) = (state.server_version / 10_000, state.server_version % 10_000);
                let name = node.view.details.as_ref().and_then(|it| it.application_name.as_deref());
                let version = format!("{major}.{minor}");
                (node, role, version, state.system_identifier.to_string(), name.unwrap_or(""))
            })
            .collect();
        let samples = infos.iter().map(|(node, role, version, system_identifier, name)| {
            let labels = node.with([
                ("role", *role),
                ("version", version.as_str()),
                ("system_identifier", system_identifier.as_str()),
                ("application_name", *name),
            ]);
            (labels, 1.0)
        });
        let help = "What a node says it is, always 1. application_name is what a standby's upstream \
                    calls it: the label standby of pgmesh_lag_sender_*.";
        gauges(encoder, ("pgmesh_lag_node_info", help, None), samples)
    }

    /// What only grows.
    fn encode_counters(&self, encoder: &mut DescriptorEncoder<'_>, dropped: u64) -> fmt::Result {
        let written = self.groups.iter().map(|it| (it.labels(), it.view.wal_written_bytes));
        let help = "WAL written by the group's primaries since this process watches.";
        // Of a counter the unit stands before the suffix.
        let name = ("pgmesh_lag_wal_written", help, Some(&Unit::Bytes));
        counters(encoder, name, written)?;

        let errors = self.nodes.iter().filter_map(|it| Some((it, it.target?)));
        let errors = errors.flat_map(|(node, target)| {
            let stages = Stage::ALL.into_iter().zip(target.failures);
            stages.map(move |(stage, count)| (node.with([("stage", stage.name())]), count))
        });
        let help = "Questions and connections that failed, by how far they came.";
        counters(encoder, ("pgmesh_lag_target_errors", help, None), errors)?;

        let details = || self.nodes.iter().filter_map(|it| Some((it, it.view.details.as_ref()?)));
        let conflicts = details().filter_map(|(node, it)| Some((node, it.conflicts?)));
        let conflicts = conflicts.filter(|(node, _)| !node.is_primary()).flat_map(|(node, it)| {
            let reasons = [
                ("tablespace", Some(it.tablespace)),
                ("lock", Some(it.lock)),
                ("snapshot", Some(it.snapshot)),
                ("bufferpin", Some(it.buffer_pin)),
                ("deadlock", Some(it.deadlock)),
                ("logicalslot", it.logical_slot),
            ];
            let reasons = reasons.into_iter().filter_map(|(reason, count)| Some((reason, count?)));
            reasons.map(move |(reason, count)| (node.with([("reason", reason)]), count))
        });
        let help = "Queries on a standby that replay cancelled, since its statistics were reset.";
        counters(encoder, ("pgmesh_lag_recovery_conflicts", help, None), conflicts)?;

        let archiver = || details().filter_map(|(node, it)| Some((node.labels(), it.archiver?)));
        let done = archiver().map(|(labels, it)| (labels, it.archived));
        let help = "WAL files archived, since the statistics were reset.";
        counters(encoder, ("pgmesh_lag_archiver_archived", help, None), done)?;
        let failed = archiver().map(|(labels, it)| (labels, it.failed));
        let help = "Attempts to archive a WAL file that failed, since the statistics were reset.";
        counters(encoder, ("pgmesh_lag_archiver_failures", help, None), failed)?;

        let help = "Series that were there twice and were rendered once.";
        let name = "pgmesh_lag_dropped_series";
        let dropped = ConstCounter::new(dropped);
        dropped.encode(encoder.encode_descriptor(name, help, None, MetricType::Counter)?)
    }

    fn encode_round_trips(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let targets: Vec<_> =
            self.nodes.iter().filter_map(|it| Some((it.labels(), it.target?))).collect();
        if targets.is_empty() {
            return Ok(());
        }
        let mut family = encoder.encode_descriptor(
            "pgmesh_lag_target_poll_duration",
            "Time from the question for the positions to the answer.",
            Some(&Unit::Seconds),
            MetricType::Histogram,
        )?;
        for (labels, target) in targets {
            let bounds = ROUND_TRIP_BUCKETS.into_iter().chain([f64::INFINITY]);
            let mut buckets = [(0.0, 0); ROUND_TRIP_BUCKETS.len() + 1];
            for (bucket, of) in buckets.iter_mut().zip(bounds.zip(target.round_trips)) {
                *bucket = of;
            }
            let count = target.round_trips.iter().sum();
            let mut of_target = family.encode_family(&labels)?;
            of_target.encode_histogram(target.round_trip_seconds, count, &buckets, NO_EXEMPLARS)?;
        }
        Ok(())
    }
}

const NO_EXEMPLARS: Option<&HashMap<usize, Exemplar<Labels<'static, 0>, f64>>> = None;

/// The word for a receiver or a WAL status that is not there.
const NONE: &str = "none";

/// Name, help and unit of a family.
pub(crate) type Family<'a> = (&'a str, &'a str, Option<&'a Unit>);

/// Encodes a family of gauges, if it has samples.
pub(crate) fn gauges<'a, const N: usize>(
    encoder: &mut DescriptorEncoder<'_>,
    (name, help, unit): Family<'_>,
    samples: impl Iterator<Item = (Labels<'a, N>, f64)>,
) -> fmt::Result {
    let mut samples = samples.peekable();
    if samples.peek().is_none() {
        return Ok(());
    }
    let mut family = encoder.encode_descriptor(name, help, unit, MetricType::Gauge)?;
    for (labels, value) in samples {
        ConstGauge::new(value).encode(family.encode_family(&labels)?)?;
    }
    Ok(())
}

/// Encodes a family of counters, if it has samples; `_total` is added to its name.
fn counters<'a, const N: usize>(
    encoder: &mut DescriptorEncoder<'_>,
    (name, help, unit): Family<'_>,
    samples: impl Iterator<Item = (Labels<'a, N>, u64)>,
) -> fmt::Result {
    let mut samples = samples.peekable();
    if samples.peek().is_none() {
        return Ok(());
    }
    let mut family = encoder.encode_descriptor(name, help, unit, MetricType::Counter)?;
    for (labels, value) in samples {
        ConstCounter::new(value).encode(family.encode_family(&labels)?)?;
    }
    Ok(())
}

fn bit(value: bool) -> f64 {
    f64::from(u8::from(value))
}

#[expect(clippy::cast_precision_loss, reason = "exact up to 9 PB of WAL")]
fn float(value: u64) -> f64 {
    value as f64
}

fn seconds(span: Option<Duration>) -> Option<f64> {
    span.map(|span| span.as_secs_f64())
}

/// The state of a standby.
fn standby<'a>(node: &NodeRow<'a>) -> Option<&'a NodeState> {
    node.state().filter(|state| state.role == Role::Standby)
}

fn slot_labels(slot: &SlotView) -> [(&'static str, &str); 2] {
    let kind = if slot.logical { "logical" } else { "physical" };
    [("slot", &slot.name), ("slot_type", kind)]
}

#[cfg(test)]
mod tests {
    use std::fs;

    use prometheus_client::encoding::text;

    use super::*;
    use crate::example::example;
    use crate::view::Rpo;

    #[derive(Debug)]
    struct Fixed(Snapshot, Option<Compat>);

    impl Collector for Fixed {
        fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
            encode(&self.0, self.1, &AtomicU64::new(0), &mut encoder)
        }
    }

    fn scrape(snapshot: Snapshot, compat: Option<Compat>) -> String {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(Fixed(snapshot, compat)));
        let mut text = String::new();
        text::encode(&mut text, &registry).unwrap();
        text
    }

    /// The names and labels are an interface: what changes here changes for operators. Written anew
    /// with `UPDATE=1`.
    #[test]
    fn the_exposition_is_as_before() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/src/metrics/example.txt");
        let text = scrape(example(), Some(Compat::PostgresExporter));
        if std::env::var_os("UPDATE").is_some() {
            fs::write(path, &text).unwrap();
        }
        let expected = fs::read_to_string(path).unwrap();
        for (line, expected) in text.lines().zip(expected.lines()) {
            assert_eq!(line, expected);
        }
        assert_eq!(text.lines().count(), expected.lines().count());
    }

    #[test]
    fn no_series_is_there_twice() {
        let series = |text: &str| {
            let mut series: Vec<String> = text
                .lines()
                .filter(|line| !line.starts_with('#'))
                .filter_map(|line| Some(line.rsplit_once(' ')?.0.to_owned()))
                .collect();
            let count = series.len();
            series.sort_unstable();
            series.dedup();
            assert_eq!(series.len(), count);
            count
        };
        let before = series(&scrape(example(), None));

        let mut twice = example();
        let group = twice.groups[0].clone();
        for details in twice.groups[0].nodes.iter_mut().filter_map(|it| it.details.as_mut()) {
            if let Some(senders) = &mut details.senders {
                senders.extend(senders.clone());
            }
            if let Some(slots) = &mut details.slots {
                slots.extend(slots.clone());
            }
        }
        twice.groups[0].nodes.extend(group.nodes.clone());
        twice.groups.push(group);
        let text = scrape(twice, None);
        assert_eq!(series(&text), before);
        assert!(text.contains("pgmesh_lag_dropped_series_total 10\n"), "{text}");
    }

    #[test]
    fn what_is_not_sure_is_left_out() {
        let mut snapshot = example();
        let mut second = snapshot.groups[0].nodes[0].clone();
        second.name = "postgres-4".to_owned();
        snapshot.groups[0].nodes.push(second);
        snapshot.groups[0].rpo = Rpo::NoStandby;
        let text = scrape(snapshot, Some(Compat::PostgresExporter));
        let labels = "{cluster=\"demo\",group=\"0\"";
        for (line, is_there) in [
            (format!("pgmesh_lag_group_rpo_seconds{labels}}} inf\n"), true),
            (format!("pgmesh_lag_group_rpo_upper_seconds{labels}}} inf\n"), true),
            (format!("pgmesh_lag_group_rpo_lower_seconds{labels}"), false),
            (format!("pg_replication_lag_seconds{labels},node=\"postgres-1\"}} 0.0\n"), true),
            (format!("pg_replication_lag_seconds{labels},node=\"postgres-4\""), false),
        ] {
            assert_eq!(text.contains(&line), is_there, "{line}");
        }
        let mut elsewhere = example();
        let group = &mut elsewhere.groups[0];
        (group.primary, group.standby_leader) = (None, Some("postgres-2".to_owned()));
        let text = scrape(elsewhere, None);
        let line = format!("group_lag_method{labels},method=\"standby_leader\"}} 1.0\n");
        assert!(text.contains(&line), "{text}");
    }

    #[test]
    fn any_cluster_name_is_escaped() {
        let snapshot = Snapshot { cluster: "a\"b\\c\nd".to_owned(), ..example() };
        let expected = "pgmesh_lag_group_primaries{cluster=\"a\\\"b\\\\c\\nd\",group=\"0\"} 1.0\n";
        let text = scrape(snapshot, None);
        assert!(text.contains(expected), "{text}");
    }

    #[test]
    fn without_a_node_there_is_an_exposition() {
        let empty = Snapshot { groups: Vec::new(), targets: Vec::new(), ..example() };
        assert_eq!(
            scrape(empty, Some(Compat::PostgresExporter)),
            "# HELP pgmesh_lag_dropped_series Series that were there twice and were rendered once.\n\
             # TYPE pgmesh_lag_dropped_series counter\n\
             pgmesh_lag_dropped_series_total 0\n\
             # EOF\n"
        );
    }
}
