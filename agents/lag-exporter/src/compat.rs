//! The names of prometheus-community's `postgres_exporter`, with our labels and our lag.

use std::fmt;

use prometheus_client::encoding::DescriptorEncoder;

use crate::metrics::{NodeRow, Rows, gauges};

/// Name, help and value.
type Gauge = (&'static str, &'static str, fn(&NodeRow<'_>) -> Option<f64>);

/// Of a primary that exporter says 0. A second one may lack anything.
fn lag(node: &NodeRow<'_>) -> Option<f64> {
    if node.is_primary() {
        return (node.group.view.primary.as_ref() == Some(&node.view.name)).then_some(0.0);
    }
    Some(node.view.lag.as_ref()?.replay.estimate?.as_secs_f64())
}

const NODE_GAUGES: &[Gauge] = &[
    ("pg_up", "1 if the node answers, also a new connection.", |it| {
        let is_up = it.view.up? && it.view.fresh_connect != Some(false);
        Some(f64::from(u8::from(is_up)))
    }),
    ("pg_replication_lag_seconds", "As pgmesh_lag_replay_lag_seconds; 0 on the primary.", lag),
    ("pg_replication_lag", "As pg_replication_lag_seconds.", lag),
    ("pg_replication_is_replica", "1 if the node is a standby.", |it| {
        it.state().map(|_| f64::from(u8::from(!it.is_primary())))
    }),
];

/// Adds these names.
pub(crate) fn encode(rows: &Rows<'_>, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
    for (name, help, value) in NODE_GAUGES {
        let samples = rows.nodes.iter().filter_map(|it| Some((it.labels(), value(it)?)));
        gauges(encoder, (name, help, None), samples)?;
    }
    let slots = || rows.slots.iter().map(|(node, it)| (node.with([("slot_name", &it.name)]), it));
    let active = slots().map(|(labels, slot)| (labels, f64::from(u8::from(slot.active))));
    let help = "1 if somebody uses the slot.";
    gauges(encoder, ("pg_replication_slots_active", help, None), active)?;
    #[expect(clippy::cast_precision_loss, reason = "exact up to 9 PB of WAL")]
    let retained = slots().filter_map(|(labels, slot)| Some((labels, slot.retained_bytes? as f64)));
    let help = "WAL that the slot holds back, in bytes.";
    gauges(encoder, ("pg_replication_slots_pg_wal_lsn_diff", help, None), retained)
}
