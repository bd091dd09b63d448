//! A snapshot for the tests of what is shown.

use std::time::Duration;

use shared::pg::Node;

use crate::fleet::{Snapshot, Target};
use crate::observation::{
    Archiver, Conflicts, Receiver, ReceiverStatus, ReplayPause, Stage, WalStatus,
};
use crate::view::{
    CatchUp, Clock, DetailsView, GroupView, Lag, LagState, LagView, MostWal, NodeState, NodeView,
    Quorum, Role, Rpo, Runway, SenderKind, SenderView, SlotView, SplitBrain, SyncCount,
};

/// A group with a primary, a standby that is behind and one that does not answer.
#[expect(clippy::too_many_lines, reason = "one value, written out")]
pub(crate) fn example() -> Snapshot {
    let seconds = |it| Some(Duration::from_millis(it));
    let state = |role, replayed: &str| NodeState {
        role,
        system_identifier: 7_710_571_483_085_197_328,
        server_version: 170_012,
        timeline: Some(3),
        wal_lsn: replayed.parse().ok(),
        receive_lsn: None,
        replay_pause: None,
        receiver: None,
        clock: Clock { ahead_seconds: 0.25, error_seconds: 0.001 },
    };
    let node = |name: &str, state, lag, details| NodeView {
        name: name.to_owned(),
        is_member: true,
        up: Some(true),
        fresh_connect: Some(true),
        last_success_age: seconds(500),
        round_trip: seconds(1),
        state,
        lag,
        details,
    };
    let sender = SenderView {
        name: "postgres-2".to_owned(),
        kind: SenderKind::Standby,
        state: "streaming".to_owned(),
        sync_state: "sync".to_owned(),
        write_lag: seconds(1),
        flush_lag: seconds(2),
        replay_lag: None,
        reply_age_seconds: Some(0.5),
    };
    let logical =
        SenderView { name: "reports".to_owned(), kind: SenderKind::Logical, ..sender.clone() };
    let slot = SlotView {
        name: "postgres_2".to_owned(),
        logical: false,
        active: true,
        retained_bytes: Some(4096),
        safe_wal_bytes: Some(1 << 30),
        wal_status: Some(WalStatus::Reserved),
        inactive_for: None,
        runway: Runway::Lasts(Duration::from_hours(30)),
        xmin_age: None,
    };
    let old = SlotView {
        name: "old \"slot\"".to_owned(),
        logical: true,
        active: false,
        retained_bytes: None,
        safe_wal_bytes: None,
        wal_status: Some(WalStatus::Lost),
        inactive_for: seconds(7_200_000),
        runway: Runway::Lasts(Duration::ZERO),
        xmin_age: Some(12),
    };
    let of_primary = DetailsView {
        age: seconds(5_000),
        senders: Some(vec![sender, logical]),
        slots: Some(vec![slot, old]),
        conflicts: Some(Conflicts::default()),
        archiver: Some(Archiver {
            archived: 7,
            failed: 1,
            last_archived_age: seconds(60_000),
            last_failed_age: None,
        }),
        ..DetailsView::default()
    };
    let of_standby = DetailsView {
        age: seconds(5_000),
        senders: Some(Vec::new()),
        slots: Some(Vec::new()),
        conflicts: Some(Conflicts { snapshot: 3, ..Conflicts::default() }),
        archiver: None,
        apply_delay: Some(Duration::ZERO),
        upstream: Some("10.0.0.1:5432".to_owned()),
        upstream_slot: Some("postgres_2".to_owned()),
        application_name: Some("postgres-2".to_owned()),
    };
    let standby = NodeState {
        receive_lsn: "0/3000100".parse().ok(),
        replay_pause: Some(ReplayPause::Paused),
        receiver: Some(Receiver {
            status: ReceiverStatus::Streaming,
            received_timeline: Some(3),
            message_age: seconds(200),
        }),
        ..state(Role::Standby, "0/3000000")
    };
    let behind = LagView {
        state: LagState::Ok,
        replay: Lag { lower: seconds(11_600), estimate: seconds(12_000), upper: seconds(12_600) },
        receive: Lag { lower: seconds(0), estimate: seconds(0), upper: seconds(900) },
        replay_bytes: Some(256),
        receive_bytes: Some(0),
        catch_up: CatchUp::Never,
    };
    let unreachable = LagView {
        state: LagState::Unreachable,
        replay: Lag::default(),
        receive: Lag::default(),
        replay_bytes: None,
        receive_bytes: None,
        catch_up: CatchUp::Unknown,
    };
    let primary = state(Role::Primary, "0/3000100");
    let gone = NodeView {
        up: Some(false),
        fresh_connect: Some(false),
        last_success_age: seconds(90_000),
        ..node("postgres-3", None, Some(unreachable), None)
    };
    let group = GroupView {
        group: 0,
        nodes: vec![
            node("postgres-1", Some(primary), None, Some(of_primary)),
            node("postgres-2", Some(standby), Some(behind), Some(of_standby)),
            gone,
        ],
        primaries: 1,
        primary: Some("postgres-1".to_owned()),
        standby_leader: None,
        primary_sample_age: seconds(400),
        system_identifier: Some(7_710_571_483_085_197_328),
        timeline: Some(3),
        split_brain: SplitBrain::No,
        quorum: Quorum::Met(SyncCount { wanted: 1, present: 1 }),
        sync_waiting: Some(2),
        sync_wait: seconds(0),
        rpo: Rpo::Loss {
            standby: "postgres-2".to_owned(),
            lag: Lag { lower: seconds(0), estimate: seconds(0), upper: seconds(900) },
            bytes: Some(0),
        },
        most_wal: Some(MostWal { standby: "postgres-2".to_owned(), lacks_bytes: 0 }),
        wal_written_bytes: 1234,
        wal_bytes_per_second: Some(1024.5),
        history: seconds(3_600_000),
        history_entries: 120,
    };
    let target = |number: u8| {
        let name = format!("postgres-{number}");
        let node = Node { group: 0, name, host: format!("10.0.0.{number}"), port: 5432 };
        let mut target = Target::new(&node);
        target.answered(Duration::from_millis(2));
        target
    };
    let mut silent = target(3);
    silent.count(Stage::Dial);
    silent.error =
        Some("connect to postgres-3 (10.0.0.3:5432): Connection refused (os error 111)".to_owned());
    Snapshot {
        cluster: "demo".to_owned(),
        made_at: "2026-03-01T12:00:00Z".parse().unwrap_or_default(),
        groups: vec![group],
        targets: vec![target(1), target(2), silent],
    }
}
