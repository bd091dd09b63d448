//! `/metrics`, from the newest report. What is not known has no sample.

use std::fmt;

use chrono::{DateTime, Utc};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::{Registry, Unit};

use crate::board::Board;
use crate::guard::Gate;
use crate::ledger::Spent;
use crate::report::{NodeView, Turn, View};

/// Renders the newest report.
#[derive(Debug)]
struct ReportCollector(Board);

/// Adds the metrics of the agent to a registry.
pub fn register(registry: &mut Registry, board: &Board) {
    let ours = registry.sub_registry_with_prefix("rebalance");
    ours.register("looks", "Looks at the cluster, by how they came out", board.looks.clone());
    ours.register(
        "moves",
        "Moves, jobs, and copies of reference tables, by how they ended",
        board.moves.clone(),
    );
    let help = "Size of the shard groups that were moved, and of reference tables that were copied";
    ours.register_with_unit("moved", help, Unit::Bytes, board.moved_bytes.clone());
    ours.register_collector(Box::new(ReportCollector(board.clone())));
}

type Labels = Vec<(&'static str, String)>;

struct Families<'a, 'e> {
    encoder: &'a mut DescriptorEncoder<'e>,
    cluster: String,
}

impl Families<'_, '_> {
    fn add(
        &mut self,
        name: &str,
        help: &str,
        unit: Option<&Unit>,
        rows: impl IntoIterator<Item = (Labels, f64)>,
    ) -> Result<(), fmt::Error> {
        let mut rows = rows.into_iter().peekable();
        if rows.peek().is_none() {
            return Ok(());
        }
        let gauge = ConstGauge::new(0.0);
        let mut family = self.encoder.encode_descriptor(name, help, unit, gauge.metric_type())?;
        for (mut labels, value) in rows {
            labels.insert(0, ("cluster", self.cluster.clone()));
            ConstGauge::new(value).encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }

    fn one(
        &mut self,
        name: &str,
        help: &str,
        unit: Option<&Unit>,
        value: Option<f64>,
    ) -> Result<(), fmt::Error> {
        self.add(name, help, unit, value.map(|it| (Vec::new(), it)))
    }
}

#[expect(clippy::cast_precision_loss, reason = "a metric is a floating point number")]
fn number(value: u64) -> f64 {
    value as f64
}

#[expect(clippy::cast_precision_loss, reason = "milliseconds are far below 2^53")]
fn seconds(at: DateTime<Utc>) -> f64 {
    at.timestamp_millis() as f64 / 1000.0
}

fn flag(value: bool) -> f64 {
    f64::from(u8::from(value))
}

impl Collector for ReportCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let report = self.0.report();
        let cluster = report.cluster.clone();
        let mut families = Families { encoder: &mut encoder, cluster };
        let has_citus = match &report.turn {
            Turn::Starting | Turn::Unknown { .. } => None,
            Turn::NoCitus { .. } => Some(0.0),
            Turn::Decided(_) => Some(1.0),
        };
        families.one("citus", "Whether the database is distributed", None, has_citus)?;
        let help = "Whether this replica is the one that moves; not while nothing is to be moved";
        families.one("leader", help, None, report.leads.map(flag))?;
        let help = "Whether a shard group is moved now";
        families.one("moving", help, None, Some(flag(report.moving.is_some())))?;
        let at = self.0.succeeded_at().map(seconds);
        let help = "When the cluster was last looked at and found";
        families.one("last_success_timestamp", help, Some(&Unit::Seconds), at)?;
        match &report.turn {
            Turn::Decided(view) => decided(view, &mut families),
            _ => Ok(()),
        }
    }
}

fn decided(view: &View, families: &mut Families<'_, '_>) -> Result<(), fmt::Error> {
    nodes(view, families)?;
    let refusals = Gate::ALL.map(|gate| {
        let number_of = view.refusals.iter().filter(|it| it.gate == gate).count();
        (vec![("gate", gate.name().to_owned())], number(number_of as u64))
    });
    families.add("refusals", "Reasons not to move something now, by gate", None, refusals)?;
    let is_closed = flag(view.closed().next().is_some());
    families.one("closed", "Whether nothing at all may be moved now", None, Some(is_closed))?;
    let is_open = view.window.map(|it| flag(it.is_open));
    families.one("window_open", "Whether the window is open", None, is_open)?;
    let is_paused = view.control.as_ref().map(|it| flag(it.pause_at(view.at).is_some()));
    families.one("paused", "Whether an operator wants nothing moved", None, is_paused)?;
    let spent = view.spent.map(|(day, run)| [("day", day), ("run", run)]);
    let rows = |of: fn(Spent) -> f64| {
        let row = move |(within, it): (&str, _)| (vec![("within", within.to_owned())], of(it));
        spent.into_iter().flatten().map(row)
    };
    let help = "Size of what was begun to be moved in 24 hours, and in this run";
    families.add("spent", help, Some(&Unit::Bytes), rows(|it| number(it.bytes)))?;
    let help = "Moves that were begun in 24 hours, and in this run";
    families.add("spent_moves", help, None, rows(|it| f64::from(it.moves)))?;
    let drains = view.drains.iter().map(|it| {
        let group = vec![("group", it.group.to_string())];
        (group, number(it.shards as u64))
    });
    let help = "Shards left on a group that is to be emptied";
    families.add("drain_shards_left", help, None, drains)?;
    let differences = view.comparison.as_ref().map(|it| number(it.differences.len() as u64));
    let help = "Shard groups that Citus' own plan treats in another way";
    families.one("plan_differences", help, None, differences)?;

    let Some(plan) = &view.plan else { return Ok(()) };
    let ratio = Unit::Other("ratio".to_owned());
    let figure = |it: crate::balance::Figure| {
        [("load", it.load), ("bytes", it.bytes), ("count", it.count)]
            .map(|(by, value)| (vec![("by", by.to_owned())], value))
    };
    let help = "How much of the load lies where it does not belong";
    families.add("imbalance", help, Some(&ratio), figure(plan.before))?;
    let help = "How much of it would after the planned moves";
    families.add("imbalance_planned", help, Some(&ratio), figure(plan.after))?;
    let moves = number(plan.moves.len() as u64);
    families.one("planned_moves", "Shard groups that are to be moved", None, Some(moves))?;
    let help = "Size of the shard groups that are to be moved";
    families.one("planned", help, Some(&Unit::Bytes), Some(number(plan.bytes())))?;
    let hot = number(plan.hot.len() as u64);
    let help = "Shard groups larger than any node's fair share, which should be split";
    families.one("hot_shard_groups", help, None, Some(hot))
}

fn nodes(view: &View, families: &mut Families<'_, '_>) -> Result<(), fmt::Error> {
    let rows = |value: &dyn Fn(&NodeView) -> Option<f64>| {
        let row = |it: &NodeView| {
            let labels = vec![("group", it.group.to_string()), ("node", it.node.clone())];
            Some((labels, value(it)?))
        };
        view.nodes.iter().filter_map(row).collect::<Vec<_>>()
    };
    let ratio = Unit::Other("ratio".to_owned());
    let bytes = Some(&Unit::Bytes);
    let sizes = rows(&|it| it.bytes.map(number));
    families.add("shards", "Size of the shard groups on a node", bytes, sizes)?;
    let counts = rows(&|it| it.shard_groups.map(f64::from));
    families.add("shard_groups", "Shard groups on a node", None, counts)?;
    let loads = rows(&|it| it.load);
    families.add("load", "Share of the load that a node has", Some(&ratio), loads)?;
    let targets = rows(&|it| it.target);
    families.add("target", "Share of the load that a node is to have", Some(&ratio), targets)?;
    let blocked = rows(&|it| Some(flag(it.blocked.is_some())));
    families.add(
        "node_blocked",
        "Whether nothing may be moved from or to a node",
        None,
        blocked,
    )?;
    let draining =
        rows(&|it| Some(flag(!it.is_wanted && it.shard_groups.is_some_and(|it| 0 < it))));
    families.add("node_draining", "Whether a node has shards and should not", None, draining)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tests::{config, report, skewed, view};

    fn scrape(turn: Turn) -> String {
        let board = Board::new(&config());
        if let Turn::Decided(_) = &turn {
            board.refresh(turn.clone());
        }
        board.set(report(turn));
        let mut registry = shared::metrics::registry();
        register(&mut registry, &board);
        shared::metrics::encode(&registry).unwrap()
    }

    #[test]
    fn the_names_are_those_that_alerts_use() {
        let seen = view(|it| {
            skewed(it);
            it.catalogue.is_coordinator = false;
        });
        let text = scrape(Turn::Decided(Box::new(seen)));
        for line in [
            "# TYPE pgmesh_rebalance_imbalance_ratio gauge",
            "pgmesh_rebalance_citus{cluster=\"demo\"} 1.0",
            "pgmesh_rebalance_imbalance_ratio{cluster=\"demo\",by=\"bytes\"} 0.5",
            "pgmesh_rebalance_shards_bytes{cluster=\"demo\",group=\"1\",node=\"w1:5432\"} 70.0",
            "pgmesh_rebalance_shard_groups{cluster=\"demo\",group=\"1\",node=\"w1:5432\"} 3.0",
            "pgmesh_rebalance_target_ratio{cluster=\"demo\",group=\"2\",node=\"w2:5432\"} 0.5",
            "pgmesh_rebalance_load_ratio{cluster=\"demo\",group=\"2\",node=\"w2:5432\"} 0.0",
            "pgmesh_rebalance_planned_moves{cluster=\"demo\"} 1.0",
            "pgmesh_rebalance_planned_bytes{cluster=\"demo\"} 40.0",
            "pgmesh_rebalance_refusals{cluster=\"demo\",gate=\"coordinator\"} 1.0",
            "pgmesh_rebalance_refusals{cluster=\"demo\",gate=\"lag\"} 0.0",
            "pgmesh_rebalance_closed{cluster=\"demo\"} 1.0",
            "pgmesh_rebalance_plan_differences{cluster=\"demo\"} 1.0",
            "pgmesh_rebalance_hot_shard_groups{cluster=\"demo\"} 0.0",
            "pgmesh_rebalance_moving{cluster=\"demo\"} 0.0",
            "pgmesh_rebalance_paused{cluster=\"demo\"} 0.0",
            "pgmesh_rebalance_spent_bytes{cluster=\"demo\",within=\"day\"} 0.0",
            "pgmesh_rebalance_spent_moves{cluster=\"demo\",within=\"run\"} 0.0",
            "pgmesh_rebalance_node_draining{cluster=\"demo\",group=\"0\",node=\"coord:5432\"} 0.0",
            "pgmesh_rebalance_node_blocked{cluster=\"demo\",group=\"1\",node=\"w1:5432\"} 0.0",
            "pgmesh_rebalance_last_success_timestamp_seconds{cluster=\"demo\"} 1773108000.0",
            "pgmesh_rebalance_looks_total{cluster=\"demo\",outcome=\"ok\"} 1",
        ] {
            assert!(text.lines().any(|it| it == line), "no line {line:?} in:\n{text}");
        }
        assert!(!text.contains("window_open"), "{text}");
    }

    /// Whoever writes a rule for it finds it at 0 before.
    #[test]
    fn a_session_that_keeps_its_locks_shows() {
        let line = |count| {
            format!("pgmesh_rebalance_refusals{{cluster=\"demo\",gate=\"locks\"}} {count}.0\n")
        };
        let text = scrape(Turn::Decided(Box::new(view(|_| {}))));
        assert!(text.contains(&line(0)), "{text}");
        let mut observation = crate::guard::tests::well();
        observation.catalogue.movers =
            Ok(vec![crate::catalogue::Mover { pid: 7, shard: Some(103) }]);
        let entry = crate::ledger::tests::entry(0, 103, crate::ledger::Outcome::Unknown);
        let ledger = Ok(crate::ledger::Ledger::new(vec![entry]));
        let control = Ok(crate::control::Control::default());
        let view = View::new(&observation, &config(), &control, &ledger, observation.at);
        let text = scrape(Turn::Decided(Box::new(view)));
        assert!(text.contains(&line(1)), "{text}");
        assert!(text.contains("pgmesh_rebalance_closed{cluster=\"demo\"} 1.0\n"), "{text}");
    }

    #[test]
    fn what_is_not_known_has_no_sample() {
        let unknown = Turn::Unknown { at: Utc::now(), reason: "no answer".to_owned() };
        for turn in [Turn::Starting, unknown] {
            let text = scrape(turn);
            let mut samples: Vec<_> = text.lines().filter(|it| !it.starts_with('#')).collect();
            samples.sort_unstable();
            assert_eq!(
                samples,
                [
                    "pgmesh_rebalance_looks_total{cluster=\"demo\",outcome=\"failed\"} 0",
                    "pgmesh_rebalance_looks_total{cluster=\"demo\",outcome=\"ok\"} 0",
                    "pgmesh_rebalance_moved_bytes_total{cluster=\"demo\"} 0",
                    "pgmesh_rebalance_moves_total{cluster=\"demo\",outcome=\"closed\"} 0",
                    "pgmesh_rebalance_moves_total{cluster=\"demo\",outcome=\"failed\"} 0",
                    "pgmesh_rebalance_moves_total{cluster=\"demo\",outcome=\"moved\"} 0",
                    "pgmesh_rebalance_moves_total{cluster=\"demo\",outcome=\"no_lock\"} 0",
                    "pgmesh_rebalance_moves_total{cluster=\"demo\",outcome=\"stopped\"} 0",
                    "pgmesh_rebalance_moves_total{cluster=\"demo\",outcome=\"unknown\"} 0",
                    "pgmesh_rebalance_moves_total{cluster=\"demo\",outcome=\"yielded\"} 0",
                    "pgmesh_rebalance_moving{cluster=\"demo\"} 0.0",
                ]
            );
        }
    }
}
