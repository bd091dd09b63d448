//! `/metrics`, from what counts.

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::{Registry, Unit};

use crate::component::Component;
use crate::monitor::Monitor;

/// Renders the monitor's state.
#[derive(Debug)]
struct StateCollector(Monitor);

/// Adds the metrics of the monitor to a registry.
pub fn register(registry: &mut Registry, monitor: Monitor) {
    registry.register_collector(Box::new(StateCollector(monitor)));
}

fn labels(component: &Component) -> Vec<(&'static str, String)> {
    let group = component.group.map(|it| it.to_string()).unwrap_or_default();
    vec![
        ("component", component.kind.name().to_owned()),
        ("group", group),
        ("node", component.name.clone()),
    ]
}

impl Collector for StateCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let state = self.0.state();
        let cluster = ("cluster", state.cluster.clone());
        let mut family = |name: &str,
                          help: &str,
                          unit: Option<&Unit>,
                          rows: Vec<(Vec<(&'static str, String)>, f64)>| {
            if rows.is_empty() {
                return Ok(());
            }
            let gauge = ConstGauge::new(0.0);
            let mut family = encoder.encode_descriptor(name, help, unit, gauge.metric_type())?;
            for (mut labels, value) in rows {
                labels.insert(0, cluster.clone());
                ConstGauge::new(value).encode(family.encode_family(&labels)?)?;
            }
            Ok::<(), fmt::Error>(())
        };
        let statuses = state.checks.iter().flat_map(|(component, checks)| {
            checks.iter().map(|(check, it)| {
                let mut labels = labels(component);
                labels.push(("check", (*check).to_owned()));
                (labels, f64::from(it.status.code()))
            })
        });
        let help = "What a check says: 0 ok, 1 warning, 2 critical, 3 unknown";
        family("health_check_status", help, None, statuses.collect())?;
        let flapping = state.checks.iter().flat_map(|(component, checks)| {
            checks.iter().map(|(check, it)| {
                let mut labels = labels(component);
                labels.push(("check", (*check).to_owned()));
                (labels, f64::from(u8::from(it.is_flapping)))
            })
        });
        family(
            "health_check_flapping",
            "Whether a check keeps changing",
            None,
            flapping.collect(),
        )?;
        let components = state.verdicts.components.iter();
        let components =
            components.map(|(component, it)| (labels(component), f64::from(it.status.code())));
        let help = "What a component comes to: 0 ok, 1 warning, 2 critical, 3 unknown";
        family("health_component_status", help, None, components.collect())?;
        let groups = state.verdicts.groups.iter();
        let groups = groups
            .map(|(group, it)| (vec![("group", group.to_string())], f64::from(it.status.code())));
        let help = "What a group comes to: 0 ok, 1 warning, 2 critical, 3 unknown";
        family("health_group_status", help, None, groups.collect())?;
        let Some(decided_at) = state.decided_at else { return Ok(()) };
        let help = "What the cluster comes to: 0 ok, 1 warning, 2 critical, 3 unknown";
        let verdict = f64::from(state.verdicts.cluster.status.code());
        family("health_cluster_status", help, None, vec![(vec![], verdict)])?;
        #[expect(clippy::cast_precision_loss, reason = "milliseconds are far below 2^53")]
        let at = decided_at.wall.timestamp_millis() as f64 / 1000.0;
        let help = "When it was last judged";
        family("health_last_verdict_timestamp", help, Some(&Unit::Seconds), vec![(vec![], at)])
    }
}
