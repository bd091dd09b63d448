//! The gauges, as tables: name, help, unit, and where the value comes from.

use std::time::Duration;

use prometheus_client::registry::Unit;

use super::rows::{GroupRow, NodeRow};
use super::{bit, float, seconds, standby};
use crate::observation::ReplayPause;
use crate::view::{CatchUp, Lag, Quorum, Rpo, Runway, SenderView, SlotView};

/// What is lost with the primary, in seconds: all of it is more than any number.
fn rpo(group: &GroupRow<'_>, part: fn(&Lag) -> Option<Duration>) -> Option<f64> {
    match &group.view.rpo {
        Rpo::Unknown => None,
        Rpo::NoStandby => Some(f64::INFINITY),
        Rpo::Loss { lag, .. } => seconds(part(lag)),
    }
}

/// It is not less than this. If no standby answers, nothing is sure but that it is not more than
/// everything.
fn rpo_lower(group: &GroupRow<'_>) -> Option<f64> {
    match &group.view.rpo {
        Rpo::Unknown | Rpo::NoStandby => None,
        Rpo::Loss { lag, .. } => seconds(lag.lower),
    }
}

/// Name, help, unit and value of a gauge of one kind of thing.
type Gauge<F> = (&'static str, &'static str, Option<Unit>, F);
type OfGroup = fn(&GroupRow<'_>) -> Option<f64>;
type OfNode = fn(&NodeRow<'_>) -> Option<f64>;
type OfSender = fn(&SenderView) -> Option<f64>;
type OfSlot = fn(&SlotView) -> Option<f64>;

pub(super) const GROUP_GAUGES: &[Gauge<OfGroup>] = &[
    ("pgmesh_lag_group_primaries", "Nodes that say they are primaries.", None, |it| {
        Some(f64::from(it.view.primaries))
    }),
    (
        "pgmesh_lag_group_primary_sample_age",
        "Time since the primary, or the standby leader, told its position; above a few seconds the \
         lag is not known.",
        Some(Unit::Seconds),
        |it| seconds(it.view.primary_sample_age),
    ),
    (
        "pgmesh_lag_group_sync_quorum_met",
        "0 if commits hang: a session is seen to wait for standbys, or too few are connected; 1 if \
         enough are connected and none is seen to. None if it is not known, or if commits wait for \
         nobody, as with synchronous_commit off or local.",
        None,
        |it| match it.view.quorum {
            Quorum::Unknown | Quorum::NotWanted => None,
            Quorum::Met(_) => Some(1.0),
            Quorum::Missed(_) => Some(0.0),
        },
    ),
    (
        "pgmesh_lag_group_sync_waiting_sessions",
        "Sessions of the primary whose commit waited for standbys when it was last asked.",
        None,
        |it| it.view.sync_waiting.map(f64::from),
    ),
    (
        "pgmesh_lag_group_sync_wait",
        "For so long the same session has surely waited for standbys; 0 if none was seen twice.",
        Some(Unit::Seconds),
        |it| seconds(it.view.sync_wait),
    ),
    (
        "pgmesh_lag_group_sync_standbys_wanted",
        "Standbys that commits wait for.",
        None,
        |it| match it.view.quorum {
            Quorum::Unknown => None,
            Quorum::NotWanted => Some(0.0),
            Quorum::Met(count) | Quorum::Missed(count) => Some(f64::from(count.wanted)),
        },
    ),
    (
        "pgmesh_lag_group_sync_standbys_present",
        "Standbys that are connected and may be waited for.",
        None,
        |it| match it.view.quorum {
            Quorum::Unknown | Quorum::NotWanted => None,
            Quorum::Met(count) | Quorum::Missed(count) => Some(f64::from(count.present)),
        },
    ),
    (
        "pgmesh_lag_group_rpo",
        "Age of the oldest WAL that is lost if the primary is lost now and the best standby that \
         answers is promoted; +Inf if none answers.",
        Some(Unit::Seconds),
        |it| rpo(it, |lag| lag.estimate),
    ),
    (
        "pgmesh_lag_group_rpo_lower",
        "It is not less than this, unless a standby that is silent has more and comes back.",
        Some(Unit::Seconds),
        rpo_lower,
    ),
    ("pgmesh_lag_group_rpo_upper", "It is not more than this.", Some(Unit::Seconds), |it| {
        rpo(it, |lag| lag.upper)
    }),
    (
        "pgmesh_lag_group_rpo",
        "WAL that is lost then; +Inf if no standby answers.",
        Some(Unit::Bytes),
        |it| match it.view.rpo {
            Rpo::Unknown => None,
            Rpo::NoStandby => Some(f64::INFINITY),
            Rpo::Loss { bytes, .. } => bytes.map(float),
        },
    ),
    (
        "pgmesh_lag_group_rpo_lower",
        "What the best standby that answers lacks at least, also while no primary answers: of the WAL \
         that the last one was seen to have. None if it cannot be told which one is the best.",
        Some(Unit::Bytes),
        |it| it.view.most_wal.as_ref().map(|it| float(it.lacks_bytes)),
    ),
    (
        "pgmesh_lag_group_wal_bytes_per_second",
        "WAL written per second, over the last minute.",
        None,
        |it| it.view.wal_bytes_per_second,
    ),
    ("pgmesh_lag_history", "How far back positions have an age.", Some(Unit::Seconds), |it| {
        seconds(it.view.history)
    }),
    ("pgmesh_lag_history_entries", "Positions that are kept for that.", None, |it| {
        u32::try_from(it.view.history_entries).ok().map(f64::from)
    }),
];

pub(super) const NODE_GAUGES: &[Gauge<OfNode>] = &[
    (
        "pgmesh_lag_replay_lag",
        "Age of the oldest WAL of the primary that is not replayed: what queries miss.",
        Some(Unit::Seconds),
        |it| seconds(it.lag()?.replay.estimate),
    ),
    ("pgmesh_lag_replay_lag_lower", "It is not less than this.", Some(Unit::Seconds), |it| {
        seconds(it.lag()?.replay.lower)
    }),
    ("pgmesh_lag_replay_lag_upper", "It is not more than this.", Some(Unit::Seconds), |it| {
        seconds(it.lag()?.replay.upper)
    }),
    (
        "pgmesh_lag_receive_lag",
        "Age of the oldest WAL of the primary that is not on the standby's disk.",
        Some(Unit::Seconds),
        |it| seconds(it.lag()?.receive.estimate),
    ),
    ("pgmesh_lag_receive_lag_lower", "It is not less than this.", Some(Unit::Seconds), |it| {
        seconds(it.lag()?.receive.lower)
    }),
    ("pgmesh_lag_receive_lag_upper", "It is not more than this.", Some(Unit::Seconds), |it| {
        seconds(it.lag()?.receive.upper)
    }),
    (
        "pgmesh_lag_replay_lag",
        "WAL of the primary that is not replayed.",
        Some(Unit::Bytes),
        |it| it.lag()?.replay_bytes.map(float),
    ),
    (
        "pgmesh_lag_receive_lag",
        "WAL of the primary that is not on the standby's disk.",
        Some(Unit::Bytes),
        |it| it.lag()?.receive_bytes.map(float),
    ),
    (
        "pgmesh_lag_catch_up",
        "When the standby will have caught up, at its pace of the last 15 s; +Inf is never.",
        Some(Unit::Seconds),
        |it| match it.lag()?.catch_up {
            CatchUp::Unknown => None,
            CatchUp::Done => Some(0.0),
            CatchUp::In(span) => Some(span.as_secs_f64()),
            CatchUp::Never => Some(f64::INFINITY),
        },
    ),
    ("pgmesh_lag_target_up", "1 if the node was asked lately and answered.", None, |it| {
        it.view.up.map(bit)
    }),
    (
        "pgmesh_lag_target_fresh_connect_success",
        "1 if the last new connection was made: what a kept one hides.",
        None,
        |it| it.view.fresh_connect.map(bit),
    ),
    (
        "pgmesh_lag_target_last_success_timestamp",
        "When the node last answered.",
        Some(Unit::Seconds),
        |it| Some(it.group.now - it.view.last_success_age?.as_secs_f64()),
    ),
    ("pgmesh_lag_in_recovery", "1 if the node is a standby.", None, |it| {
        Some(bit(!it.is_primary())).filter(|_| it.state().is_some())
    }),
    ("pgmesh_lag_timeline_id", "The timeline that the node writes or follows.", None, |it| {
        it.state()?.timeline.map(f64::from)
    }),
    (
        "pgmesh_lag_wal_lsn",
        "Position up to which the primary has written, or the standby replayed.",
        Some(Unit::Bytes),
        |it| it.state()?.wal_lsn.map(|lsn| float(lsn.into())),
    ),
    (
        "pgmesh_lag_wal_receiver_last_message_age",
        "Time since the WAL receiver heard anything.",
        Some(Unit::Seconds),
        |it| seconds(standby(it)?.receiver?.message_age),
    ),
    ("pgmesh_lag_replay_paused", "1 if replay is paused, or is about to be.", None, |it| {
        Some(bit(standby(it)?.replay_pause? != ReplayPause::NotPaused))
    }),
    (
        "pgmesh_lag_apply_delay",
        "Lag that is wanted: recovery_min_apply_delay.",
        Some(Unit::Seconds),
        |it| seconds(it.view.details.as_ref()?.apply_delay),
    ),
    (
        "pgmesh_lag_clock_skew",
        "By how much the node's clock is ahead of this host's.",
        Some(Unit::Seconds),
        |it| Some(it.state()?.clock.ahead_seconds),
    ),
    ("pgmesh_lag_clock_skew_error", "It is known to this.", Some(Unit::Seconds), |it| {
        Some(it.state()?.clock.error_seconds)
    }),
    (
        "pgmesh_lag_archiver_last_archived_timestamp",
        "When a WAL file was last archived.",
        Some(Unit::Seconds),
        |it| {
            let archiver = it.view.details.as_ref()?.archiver?;
            Some(it.group.now - archiver.last_archived_age?.as_secs_f64())
        },
    ),
    (
        "pgmesh_lag_archiver_last_failed_timestamp",
        "When archiving last failed.",
        Some(Unit::Seconds),
        |it| {
            let archiver = it.view.details.as_ref()?.archiver?;
            Some(it.group.now - archiver.last_failed_age?.as_secs_f64())
        },
    ),
];

pub(super) const SENDER_GAUGES: &[Gauge<OfSender>] = &[
    (
        "pgmesh_lag_sender_write_lag",
        "write_lag of pg_stat_replication.",
        Some(Unit::Seconds),
        |it| seconds(it.write_lag),
    ),
    (
        "pgmesh_lag_sender_flush_lag",
        "flush_lag of pg_stat_replication.",
        Some(Unit::Seconds),
        |it| seconds(it.flush_lag),
    ),
    (
        "pgmesh_lag_sender_replay_lag",
        "replay_lag of pg_stat_replication.",
        Some(Unit::Seconds),
        |it| seconds(it.replay_lag),
    ),
    (
        "pgmesh_lag_sender_reply_age",
        "Time since the standby's last reply, with the difference of the two clocks in it.",
        Some(Unit::Seconds),
        |it| it.reply_age_seconds,
    ),
];

/// Name, help, states, and the current one.
type SenderState = (&'static str, &'static str, &'static [&'static str], fn(&SenderView) -> &str);

pub(super) const SENDER_STATES: &[SenderState] = &[
    (
        "pgmesh_lag_sender_state",
        "state of pg_stat_replication.",
        &["startup", "catchup", "streaming", "backup", "stopping"],
        |it| &it.state,
    ),
    (
        "pgmesh_lag_sender_sync_state",
        "sync_state of pg_stat_replication.",
        &["async", "potential", "sync", "quorum"],
        |it| &it.sync_state,
    ),
];

pub(super) const SLOT_GAUGES: &[Gauge<OfSlot>] = &[
    ("pgmesh_lag_slot_active", "1 if somebody uses the slot.", None, |it| Some(bit(it.active))),
    ("pgmesh_lag_slot_retained", "WAL that the slot holds back.", Some(Unit::Bytes), |it| {
        it.retained_bytes.map(float)
    }),
    (
        "pgmesh_lag_slot_safe_wal",
        "WAL that may still be written before the slot is lost; none if there is no limit.",
        Some(Unit::Bytes),
        |it| it.safe_wal_bytes.map(float),
    ),
    ("pgmesh_lag_slot_inactive", "Time since somebody used it.", Some(Unit::Seconds), |it| {
        seconds(it.inactive_for)
    }),
    (
        "pgmesh_lag_slot_runway",
        "How long the slot lasts if what it holds back goes on to grow; 0 if it is lost, +Inf if it \
         does not grow; none if only the disk is its limit, whose free space no query tells.",
        Some(Unit::Seconds),
        |it| match it.runway {
            Runway::Unknown => None,
            Runway::Lasts(span) => Some(span.as_secs_f64()),
            Runway::Endless => Some(f64::INFINITY),
        },
    ),
    (
        "pgmesh_lag_slot_xmin_age_transactions",
        "Age of the oldest transaction whose rows the slot keeps from vacuum.",
        None,
        |it| it.xmin_age.map(f64::from),
    ),
];
