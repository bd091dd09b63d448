//! Each gate, and that none of them opens on what is unknown.

use std::collections::BTreeSet;
use std::time::Duration;

use chrono::TimeDelta;
use proptest::collection::vec;
use proptest::prelude::{any, prop_assert, proptest};

use super::*;
use crate::catalogue::tests::{empty, placement, table};
use crate::catalogue::{CleanupRecord, Hindrance, Job, Link, Mover, Progress, TableKind};
use crate::control::Pause;
use crate::known::Unknown;
use crate::ledger::{Entry, Outcome};
use crate::orphans::{Kind, Orphan};
use crate::servers::{
    Disk, GroupServers, IdleSlot, Primary, Replay, Resource, Sender, Standby, Transaction, Wal,
};
use crate::surroundings::{Activity, Health, PatroniGroup, Verdict};

const GIB: u64 = 1 << 30;

fn now() -> DateTime<Utc> {
    "2026-03-10T02:00:00Z".parse().unwrap()
}

fn primary(name: &str) -> Primary {
    let resource = |setting: &str, limit| Resource { setting: setting.to_owned(), used: 3, limit };
    let sender =
        Sender { name: format!("{name}b"), state: "streaming".to_owned(), lag_bytes: Some(4096) };
    Primary {
        name: name.to_owned(),
        wal_level: "logical".to_owned(),
        disk: Ok(Disk { available: 60 * GIB, total: 100 * GIB }),
        wal: Ok(Wal { bytes: GIB, max_bytes: GIB }),
        resources: Ok(vec![resource("max_connections", 100), resource("max_wal_senders", 10)]),
        oldest_transaction: Ok(None),
        senders: Ok(vec![sender]),
        lsn: Ok(GIB.into()),
        base_backups: Ok(0),
        artifacts: Ok(Vec::new()),
        orphans: Ok(Vec::new()),
        idle_slots: Ok(Vec::new()),
        readers: Ok(Vec::new()),
        active_connections: Ok(1),
    }
}

fn servers(name: &str) -> GroupServers {
    let replay = Ok(Replay { streams: true, lsn: Some((GIB - 4096).into()) });
    let standby = (format!("{name}b"), Ok(Standby { base_backups: Ok(0), replay }));
    GroupServers { primary: Ok(primary(name)), standbys: [standby].into() }
}

/// A coordinator and two workers, of which nothing is to be said.
pub(crate) fn well() -> Observation {
    let mut catalogue = empty(2);
    catalogue.tables = [
        (1, table("events", TableKind::Hash, 1)),
        (2, table("log", TableKind::Hash, 1)),
        (3, table("other", TableKind::Hash, 2)),
        (4, table("countries", TableKind::Reference, 3)),
    ]
    .into();
    catalogue.placements = vec![
        placement(101, 1, 1, "0", 10),
        placement(102, 1, 2, "8", 20),
        placement(103, 2, 1, "0", 10),
        placement(104, 2, 2, "8", 20),
        placement(105, 3, 1, "0", 10),
        placement(106, 4, 0, "", 5),
        placement(106, 4, 1, "", 5),
        placement(106, 4, 2, "", 5),
    ];
    let link =
        |from: &str, to: &str| Link { from: from.to_owned(), to: to.to_owned(), works: Some(true) };
    catalogue.links = Ok(vec![link("w1:5432", "w2:5432"), link("w2:5432", "w1:5432")]);
    let names = [(0, "coord"), (1, "w1"), (2, "w2")];
    let patroni = (0..3).map(|group| PatroniGroup {
        group,
        has_leader: true,
        is_paused: false,
        is_switching: false,
    });
    Observation {
        at: now(),
        coordinator: "coord".to_owned(),
        role: "pgmesh_rebalance".to_owned(),
        catalogue,
        servers: names.map(|(group, name)| (group, servers(name))).into(),
        verdict: Some(Ok(Verdict {
            health: Health::Ok,
            reason: String::new(),
            decided_at: now() - TimeDelta::seconds(1),
        })),
        activities: Some(Ok(Vec::new())),
        patroni: Some(Ok(patroni.collect())),
    }
}

/// So many shard groups, of so many bytes together, so many minutes ago.
fn moved(minutes: i64, moves: i64, bytes: u64) -> Ledger {
    let entry = |shard| Entry {
        at: now() - TimeDelta::minutes(minutes),
        shard,
        from: 1,
        to: 2,
        copies: false,
        colocation: None,
        job: None,
        moves: 1,
        bytes: if shard == 0 { bytes } else { 0 },
        shards: vec![shard],
        replica: String::new(),
        outcome: Outcome::Moved,
        reason: String::new(),
        ended_at: None,
    };
    Ledger::new((0..moves).map(entry).collect())
}

/// So many failures in a row, all so many minutes ago.
fn failed(minutes: i64, moves: i64) -> Ledger {
    let entries = moved(minutes, moves, 5).newest().cloned().collect::<Vec<_>>();
    let (outcome, reason) = (Outcome::Failed, "no route to host");
    let fail = |it: Entry| Entry { outcome, reason: reason.to_owned(), ..it };
    Ledger::new(entries.into_iter().map(fail).collect())
}

/// All that is decided from, to be changed.
struct World {
    observation: Observation,
    window: Option<Window>,
    control: Known<Control>,
    ledger: Known<Ledger>,
}

impl World {
    fn well() -> Self {
        let window = "schedule = \"0 1 * * *\"\nlength = \"4h\"\n";
        Self {
            observation: well(),
            window: Some(toml::from_str(window).unwrap()),
            control: Ok(Control::default()),
            ledger: Ok(Ledger::default()),
        }
    }

    fn refusals(&self) -> Vec<Refusal> {
        refusals(Inputs {
            observation: &self.observation,
            window: self.window.as_ref(),
            budget: &Limits::default(),
            limits: &Guard::default(),
            control: &self.control,
            ledger: &self.ledger,
            now: now(),
        })
    }

    fn primary(&mut self, group: u32) -> &mut Primary {
        self.observation.servers.get_mut(&group).unwrap().primary.as_mut().unwrap()
    }

    /// The only standby of a group.
    fn standby(&mut self, group: u32) -> &mut Standby {
        let standbys = &mut self.observation.servers.get_mut(&group).unwrap().standbys;
        let standby = standbys.values_mut().next().unwrap();
        if standby.is_err() {
            *standby = servers("w").standbys.into_values().next().unwrap();
        }
        standby.as_mut().unwrap()
    }

    fn node(&mut self, group: usize) -> &mut crate::catalogue::CitusNode {
        &mut self.observation.catalogue.nodes[group]
    }

    fn table(&mut self, oid: u32) -> &mut crate::catalogue::Table {
        self.observation.catalogue.tables.get_mut(&oid).unwrap()
    }

    fn verdict(&mut self) -> &mut Verdict {
        self.observation.verdict.as_mut().unwrap().as_mut().unwrap()
    }

    fn patroni(&mut self, group: usize) -> &mut PatroniGroup {
        &mut self.observation.patroni.as_mut().unwrap().as_mut().unwrap()[group]
    }
}

#[test]
fn a_cluster_that_is_well_is_open() {
    assert_eq!(World::well().refusals(), []);
}

/// What is not configured is not asked for.
#[test]
fn without_monitor_etcd_and_patroni_nobody_is_asked() {
    let mut world = World::well();
    world.window = None;
    world.observation.verdict = None;
    world.observation.activities = None;
    world.observation.patroni = None;
    assert_eq!(world.refusals(), []);
}

#[test]
fn the_names_of_gates_are_unlike_each_other_and_those_of_json() {
    let names: BTreeSet<_> = Gate::ALL.iter().map(|it| it.name()).collect();
    assert_eq!(names.len(), Gate::ALL.len());
    for gate in Gate::ALL {
        assert_eq!(serde_json::to_value(gate).unwrap(), gate.name());
    }
    assert!(Gate::ALL.is_sorted());
}

struct Case {
    change: fn(&mut World),
    gate: Gate,
    scope: Scope,
    reason: &'static str,
}

const fn case(gate: Gate, scope: Scope, reason: &'static str, change: fn(&mut World)) -> Case {
    Case { change, gate, scope, reason }
}

fn lag(world: &mut World, lag_bytes: Option<u64>) {
    world.primary(1).senders.as_mut().unwrap()[0].lag_bytes = lag_bytes;
}

fn activity(world: &mut World, kind: &str, group: Option<u32>) {
    world.observation.activities = Some(Ok(vec![Activity { kind: kind.to_owned(), group }]));
}

const ALL: Scope = Scope::Cluster;
const W1: Scope = Scope::Group(1);

fn idle_slot(held_bytes: u64, seconds: Option<u64>) -> IdleSlot {
    let idle_for = seconds.map(Duration::from_secs);
    IdleSlot { name: "standby_2".to_owned(), held_bytes, idle_for }
}

fn orphan() -> Orphan {
    let table = "public.events_102".to_owned();
    Orphan { table, shard: 102, bytes: 8192, kind: Kind::Copy }
}

const BAD: &[Case] = &[
    case(Gate::Coordinator, ALL, "the server that was asked is a worker", |it| {
        it.observation.catalogue.is_coordinator = false;
    }),
    case(Gate::Nodes, ALL, "w2:5432 is not active", |it| it.node(2).is_active = false),
    case(Gate::Nodes, ALL, "the metadata of w2:5432 are out of date", |it| {
        it.node(2).is_synced = false;
    }),
    case(Gate::Nodes, ALL, "pg_dist_node has no primary of group 2", |it| {
        it.node(2).is_primary = false;
    }),
    case(Gate::Sizes, ALL, "the size of shard 103 is not told, nor are those of 1 more", |it| {
        let unknown = Err(Unknown::because("the size of shard 103 is not told"));
        it.observation.catalogue.placements[2].bytes = unknown.clone();
        it.observation.catalogue.placements[4].bytes = unknown;
    }),
    case(
        Gate::Sizes,
        ALL,
        "pgmesh_rebalance may not use the schema of public.other: Citus tells no size of a node that \
         has a shard there",
        |it| {
            it.table(3).is_visible = false;
            it.observation.catalogue.placements[2].bytes = unknown();
        },
    ),
    case(Gate::ReferenceTables, W1, "w1:5432 lacks reference tables: public.countries", |it| {
        it.observation.catalogue.placements.retain(|it| (it.table, it.group) != (4, 1));
    }),
    case(
        Gate::ReferenceTables,
        W1,
        "w1:5432 lacks reference tables: public.countries; they are not copied: \
         public.countries has no replica identity: give each a primary key, or ALTER TABLE … REPLICA \
         IDENTITY",
        |it| {
            it.table(4).has_replica_identity = false;
            it.observation.catalogue.placements.retain(|it| (it.table, it.group) != (4, 1));
        },
    ),
    case(Gate::Reachable, ALL, "the primary of group 2 does not answer: it was not asked", |it| {
        it.observation.servers.remove(&2);
    }),
    case(Gate::Links, ALL, "no connection from w1:5432 to w2:5432", |it| {
        it.observation.catalogue.links.as_mut().unwrap()[0].works = Some(false);
    }),
    case(Gate::Links, ALL, "unknown whether there is a connection from w1:5432 to w2:5432", |it| {
        it.observation.catalogue.links.as_mut().unwrap()[0].works = None;
    }),
    case(Gate::Patroni, ALL, "group 2 has no leader", |it| it.patroni(2).has_leader = false),
    case(Gate::Patroni, ALL, "group 2 is paused", |it| it.patroni(2).is_paused = true),
    case(Gate::Patroni, ALL, "group 2 is about to switch over", |it| {
        it.patroni(2).is_switching = true;
    }),
    case(Gate::Patroni, ALL, "group 2 is not in etcd", |it| it.patroni(2).group = 7),
    case(Gate::Busy, ALL, "job 3 is running: Rebalance, and a task of it failed 2 times", |it| {
        let (state, description) = ("running".to_owned(), "Rebalance".to_owned());
        it.observation.catalogue.jobs = Ok(vec![Job { id: 3, state, description, retries: 2 }]);
    }),
    case(Gate::Busy, ALL, "shard 101 is moved from w1:5432 to w2:5432: Catching Up", |it| {
        let [source, target] = ["w1:5432", "w2:5432"].map(str::to_owned);
        let phase = "Catching Up".to_owned();
        it.observation.catalogue.progress =
            Ok(vec![Progress { shard: 101, source, target, phase }]);
    }),
    case(
        Gate::Cleanup,
        ALL,
        "1 object of a move to clean up: public.events_101 on group 1",
        |it| {
            let object = "public.events_101".to_owned();
            it.observation.catalogue.cleanup =
                Ok(vec![CleanupRecord { object, group: 1, is_deferred: false }]);
        },
    ),
    case(Gate::Window, ALL, "the window is closed", |it| {
        it.window = toml::from_str("schedule = \"0 3 * * *\"\nlength = \"4h\"\n").ok();
    }),
    case(Gate::Paused, ALL, "paused until 2026-03-10 03:00 UTC: an upgrade", |it| {
        let until = Some(now() + TimeDelta::hours(1));
        let pause = Pause { since: now(), until, comment: "an upgrade".to_owned() };
        it.control.as_mut().unwrap().pause = Some(pause);
    }),
    case(Gate::Setbacks, ALL, "the last 3 moves failed: no route to host", |it| {
        it.ledger = Ok(failed(4, 3));
    }),
    case(
        Gate::Budget,
        ALL,
        "moves of 256 shard groups began in the last 24 hours, as many as may",
        |it| it.ledger = Ok(moved(90, 256, 5)),
    ),
    case(
        Gate::Budget,
        ALL,
        "moves of 32 shard groups began since the window opened, as many as may",
        |it| it.ledger = Ok(moved(60, 32, 5)),
    ),
    case(
        Gate::Budget,
        ALL,
        "moves of 32 shard groups began in the last hour, as many as may",
        |it| {
            it.window = None;
            it.ledger = Ok(moved(60, 32, 5));
        },
    ),
    case(
        Gate::Budget,
        ALL,
        "100.0 GiB of 100.0 GiB began to be moved since the window opened",
        |it| {
            it.ledger = Ok(moved(59, 1, 100 * GIB));
        },
    ),
    case(
        Gate::Budget,
        ALL,
        "500.0 GiB of 500.0 GiB began to be moved in the last 24 hours",
        |it| {
            it.ledger = Ok(moved(90, 1, 500 * GIB));
        },
    ),
    case(Gate::Health, ALL, "the health monitor says critical: group 2 has no primary", |it| {
        it.verdict().health = Health::Critical;
        it.verdict().reason = "group 2 has no primary".to_owned();
    }),
    case(Gate::Health, ALL, "the health monitor says unknown: ", |it| {
        it.verdict().health = Health::Unknown;
    }),
    case(Gate::Health, ALL, "the health monitor's verdict is 1m 1s away from now", |it| {
        it.verdict().decided_at = now() - TimeDelta::seconds(61);
    }),
    case(Gate::Health, ALL, "the health monitor's verdict is 1h away from now", |it| {
        it.verdict().decided_at = now() + TimeDelta::hours(1);
    }),
    case(Gate::Activity, W1, "a backup is under way", |it| activity(it, "backup", Some(1))),
    case(Gate::Activity, ALL, "a restore of group 1 is under way", |it| {
        activity(it, "restore", Some(1));
    }),
    case(Gate::Activity, ALL, "a backup is under way", |it| activity(it, "backup", None)),
    case(Gate::BaseBackup, W1, "a base backup is taken from w1", |it| {
        it.primary(1).base_backups = Ok(1);
    }),
    case(Gate::BaseBackup, W1, "a base backup is taken from w1b", |it| {
        it.standby(1).base_backups = Ok(1);
    }),
    case(Gate::Lag, W1, "w1b is 64.0 MiB behind, and 64.0 MiB may be", |it| {
        lag(it, Some((64 << 20) + 1));
    }),
    case(Gate::Lag, W1, "how far w1b is behind is unknown", |it| lag(it, None)),
    case(Gate::Lag, W1, "w1b is in state catchup", |it| {
        it.primary(1).senders.as_mut().unwrap()[0].state = "catchup".to_owned();
    }),
    case(Gate::Lag, W1, "w1b does not stream", |it| {
        it.primary(1).senders = Ok(Vec::new());
        it.standby(1).replay.as_mut().unwrap().streams = false;
    }),
    // It follows another standby, which alone sees it.
    case(Gate::Lag, W1, "w1b is 64.0 MiB behind, and 64.0 MiB may be", |it| {
        it.primary(1).senders = Ok(Vec::new());
        it.standby(1).replay.as_mut().unwrap().lsn = Some((GIB - (64 << 20) - 1).into());
    }),
    case(
        Gate::Slots,
        W1,
        "nobody has read from slot standby_2 on w1 for 1m 1s, and it holds back 96 B of WAL",
        |it| it.primary(1).idle_slots = Ok(vec![idle_slot(96, Some(61))]),
    ),
    case(
        Gate::Slots,
        W1,
        "nobody has read from slot standby_2 on w1 for 5s, and it holds back 64.0 MiB of WAL",
        |it| it.primary(1).idle_slots = Ok(vec![idle_slot((64 << 20) + 1, Some(5))]),
    ),
    // Of an older server.
    case(
        Gate::Slots,
        W1,
        "nobody has read from slot standby_2 on w1, and it holds back 64.0 MiB of WAL",
        |it| it.primary(1).idle_slots = Ok(vec![idle_slot((64 << 20) + 1, None)]),
    ),
    case(Gate::Transactions, W1, "pid 7 of app on w1 has written and is open for 1m 1s", |it| {
        let (name, age) = ("pid 7 of app".to_owned(), Duration::from_secs(61));
        it.primary(1).oldest_transaction = Ok(Some(Transaction { name, age }));
    }),
    case(Gate::WalLevel, W1, "wal_level of w1 is replica", |it| {
        it.primary(1).wal_level = "replica".to_owned();
    }),
    case(
        Gate::Headroom,
        W1,
        "9 of 10 of max_wal_senders are in use on w1, and 2 must be left",
        |it| it.primary(1).resources.as_mut().unwrap()[1].used = 9,
    ),
    case(
        Gate::Headroom,
        W1,
        "91 of 100 of max_connections are in use on w1, and 10 must be left",
        |it| it.primary(1).resources.as_mut().unwrap()[0].used = 91,
    ),
    case(
        Gate::Disk,
        W1,
        "16.0 GiB of 100.0 GiB are free on the disk of w1, of which 15.0 GiB must stay free and \
         2.0 GiB are for WAL",
        |it| {
            it.primary(1).disk = Ok(Disk { available: 16 * GIB, total: 100 * GIB });
            it.primary(1).wal = Ok(Wal { bytes: GIB, max_bytes: 3 * GIB });
        },
    ),
    case(
        Gate::Leftovers,
        W1,
        "1 object of a move that was broken off on w1: slot citus_shard_move_slot_5_10_7",
        |it| {
            let slot = "slot citus_shard_move_slot_5_10_7".to_owned();
            it.primary(1).artifacts = Ok(vec![slot]);
        },
    ),
    case(
        Gate::Orphans,
        W1,
        "1 table on w1 of shards that Citus has on other nodes: public.events_102 (8.0 KiB)",
        |it| it.primary(1).orphans = Ok(vec![orphan()]),
    ),
    case(
        Gate::ReplicaIdentity,
        Scope::Colocation(1),
        "public.events, public.log has no replica identity",
        |it| {
            it.table(1).has_replica_identity = false;
            it.table(2).has_replica_identity = false;
        },
    ),
    case(
        Gate::Tables,
        Scope::Colocation(2),
        "public.other is columnar, and every write to it would fail while it is moved",
        |it| {
            it.table(3).hindrance = Some(Hindrance::AccessMethod("columnar".to_owned()));
        },
    ),
    case(
        Gate::Tables,
        Scope::Colocation(1),
        "public.log is UNLOGGED, and nothing of it would be replicated",
        |it| it.table(2).hindrance = Some(Hindrance::Unlogged),
    ),
    case(
        Gate::Tables,
        Scope::Colocation(1),
        "public.events has row-level security FORCED on its owner, as whom its rows would be written",
        |it| it.table(1).hindrance = Some(Hindrance::RowSecurity),
    ),
    case(
        Gate::ReferenceTables,
        W1,
        "w1:5432 lacks reference tables: public.countries; they are not copied: \
         public.countries is UNLOGGED, and nothing of it would be replicated: ALTER TABLE … SET \
         LOGGED, or citus_move_shard_placement(…, 'block_writes')",
        |it| {
            it.table(4).hindrance = Some(Hindrance::Unlogged);
            it.observation.catalogue.placements.retain(|it| (it.table, it.group) != (4, 1));
        },
    ),
    case(Gate::Busy, ALL, "which sessions move something is unknown: no answer", |it| {
        it.observation.catalogue.movers = Err(Unknown::because("no answer"));
    }),
    case(Gate::Busy, ALL, "session 7 of an agent on the coordinator moves shard 102", |it| {
        it.observation.catalogue.movers = Ok(vec![Mover { pid: 7, shard: Some(102) }]);
    }),
    case(Gate::Locks, ALL, "session 7 on the coordinator still holds the locks of shard 0", |it| {
        it.observation.catalogue.movers = Ok(vec![Mover { pid: 7, shard: Some(0) }]);
        it.ledger = Ok(failed(1, 1));
    }),
    case(Gate::Cleanup, W1, "1 object of a move to clean up: public.events_101 on group 1", |it| {
        let object = "public.events_101".to_owned();
        let record = CleanupRecord { object, group: 1, is_deferred: true };
        it.observation.catalogue.cleanup = Ok(vec![record]);
    }),
    case(Gate::Setbacks, Scope::Colocation(1), "the last 3 moves failed: no route to host", |it| {
        let mut entries: Vec<_> = failed(1, 3).newest().cloned().collect();
        for it in &mut entries {
            it.colocation = Some(1);
        }
        it.ledger = Ok(Ledger::new(entries));
    }),
    case(
        Gate::Owner,
        Scope::Colocation(2),
        "public.other belongs to app, whose rights pgmesh_rebalance does not have",
        |it| it.table(3).owner.is_ours = false,
    ),
    case(
        Gate::Owner,
        Scope::Colocation(2),
        "public.other belongs to app, who may not log in, as a move must",
        |it| it.table(3).owner.can_login = false,
    ),
    case(
        Gate::Owner,
        Scope::Colocation(2),
        "public.other belongs to app, who may not create tables in its schema",
        |it| it.table(3).owner.can_create = false,
    ),
];

/// To wait would not help, so it is said, and how to go on.
#[test]
fn a_shard_that_no_run_may_move_is_told_once_it_is_wanted_elsewhere() {
    let large = |world: &mut World| world.observation.catalogue.placements[1].bytes = Ok(101 * GIB);
    let changes: [fn(&mut World); 4] = [
        |it| it.node(2).should_have_shards = false,
        |it| it.control = Ok(Control { drains: [2].into(), ..Control::default() }),
        // Any shard of the group names it.
        |it| it.control = Ok(Control { moves: [(104, 1)].into(), ..Control::default() }),
        |it| it.control = Ok(Control { moves: [(104, 2)].into(), ..Control::default() }),
    ];
    for (change, is_told) in changes.iter().zip([true, true, true, false]) {
        let mut world = World::well();
        change(&mut world);
        assert_eq!(world.refusals(), []);
        large(&mut world);
        let found: Vec<_> = world
            .refusals()
            .into_iter()
            .map(|it| (it.gate, it.scope, it.reason, it.next.contains("bytes_per_run")))
            .collect();
        let reason = "it has 101.0 GiB, and no run may move more than 100.0 GiB".to_owned();
        let expected = (Gate::Budget, Scope::Shard(102), reason, true);
        assert_eq!(found, if is_told { vec![expected] } else { vec![] });
    }
}

#[test]
fn a_gate_that_closes_ends_a_move_or_leaves_it_alone() {
    for (gate, scope, expected) in [
        (Gate::Window, ALL, Some(Outcome::Stopped)),
        (Gate::Paused, ALL, Some(Outcome::Stopped)),
        (Gate::Reachable, ALL, Some(Outcome::Closed)),
        // A standby.
        (Gate::Reachable, W1, None),
        (Gate::Disk, W1, Some(Outcome::Closed)),
        (Gate::Health, ALL, Some(Outcome::Closed)),
        (Gate::Lag, W1, None),
        (Gate::Busy, ALL, None),
        (Gate::Budget, ALL, None),
    ] {
        let refusal = Refusal { gate, scope, reason: String::new(), next: String::new() };
        assert_eq!(refusal.ends_a_move(), expected, "{refusal:?}");
    }
}

#[test]
fn each_gate_closes_on_what_is_bad_and_no_other_with_it() {
    for Case { change, gate, scope, reason } in BAD {
        let mut world = World::well();
        change(&mut world);
        let found: Vec<_> =
            world.refusals().into_iter().map(|it| (it.gate, it.scope, it.reason)).collect();
        assert_eq!(found, [(*gate, *scope, (*reason).to_owned())], "{reason}");
        assert!(world.refusals().iter().all(|it| !it.next.is_empty()), "{reason}");
    }
    let tried: BTreeSet<_> = BAD.iter().map(|it| it.gate).collect();
    assert_eq!(tried.into_iter().collect::<Vec<_>>(), Gate::ALL);
}

#[test]
fn at_their_limits_gates_are_open() {
    let changes: [fn(&mut World); 15] = [
        |it| it.primary(1).idle_slots = Ok(vec![idle_slot(64 << 20, Some(60))]),
        |it| it.primary(1).idle_slots = Ok(vec![idle_slot(64 << 20, None)]),
        |it| it.ledger = Ok(failed(5, 3)),
        |it| it.ledger = Ok(failed(1, 2)),
        |it| lag(it, Some(64 << 20)),
        |it| {
            let (name, age) = ("pid 7 of app".to_owned(), Duration::from_mins(1));
            it.primary(1).oldest_transaction = Ok(Some(Transaction { name, age }));
        },
        |it| it.primary(1).resources.as_mut().unwrap()[1].used = 8,
        |it| it.ledger = Ok(moved(61, 255, 500 * GIB - 1)),
        |it| it.verdict().health = Health::Warning,
        |it| it.verdict().decided_at = now() - TimeDelta::seconds(60),
        |it| activity(it, "drill", Some(1)),
        |it| activity(it, "move", None),
        // Its sizes are told all the same.
        |it| it.table(3).is_visible = false,
        // The coordinator takes no shards.
        |it| it.observation.catalogue.placements.retain(|it| (it.table, it.group) != (4, 0)),
        // A reference table is on each node already.
        |it| it.table(4).has_replica_identity = false,
    ];
    for change in changes {
        let mut world = World::well();
        change(&mut world);
        assert_eq!(world.refusals(), []);
    }
}

/// It is looked for who must be brought back.
#[test]
fn a_session_that_keeps_its_locks_names_the_nodes_it_waits_for() {
    let mut world = World::well();
    world.observation.catalogue.movers = Ok(vec![Mover { pid: 7, shard: Some(0) }]);
    let entry = failed(1, 1).newest().next().cloned().unwrap();
    world.ledger = Ok(Ledger::new(vec![entry.clone()]));
    let refusals = world.refusals();
    let next = "bring back or fence w2:5432 or w1:5432, whichever does not answer";
    assert_eq!(refusals.first().map(|it| (it.gate, it.next.as_str())), Some((Gate::Locks, next)));
    // One that is watched closes nothing.
    world.ledger = Ok(Ledger::new(vec![Entry { outcome: Outcome::Started, ..entry }]));
    let refusals = world.refusals();
    assert!(refusals.iter().all(|it| !matches!(it.gate, Gate::Locks | Gate::Busy)), "{refusals:?}");
}

/// It has a part in each move, so what would end any of them keeps it from beginning.
#[test]
fn what_is_wrong_with_the_coordinator_closes_the_cluster_as_far_as_it_ends_moves() {
    for (gate, scope, expected) in [
        (Gate::Disk, Scope::Group(0), true),
        (Gate::Lag, Scope::Group(0), false),
        (Gate::Disk, Scope::Group(1), false),
        (Gate::Lag, Scope::Cluster, true),
    ] {
        let refusal = Refusal { gate, scope, reason: String::new(), next: String::new() };
        assert_eq!(refusal.is_for_all(), expected, "{gate:?} {scope}");
    }
}

/// What belongs to a move under way is not left over.
#[test]
fn objects_of_a_move_under_way_are_no_leftovers() {
    let mut world = World::well();
    world.primary(1).artifacts = Ok(vec!["slot citus_shard_move_slot_5_10_7".to_owned()]);
    world.primary(1).orphans = Ok(vec![orphan()]);
    let [source, target, phase] = ["w1:5432", "w2:5432", "Copying Data"].map(str::to_owned);
    let progress = vec![Progress { shard: 101, source, target, phase }];
    world.observation.catalogue.progress = Ok(progress);
    let gates: Vec<_> = world.refusals().iter().map(|it| it.gate).collect();
    assert_eq!(gates, [Gate::Busy]);
}

/// Somebody must end it: Citus waits for it, and a move to that node for Citus.
#[test]
fn who_reads_what_is_to_be_dropped_is_named() {
    let mut world = World::well();
    let object = "public.events_101".to_owned();
    let record = CleanupRecord { object, group: 1, is_deferred: true };
    world.observation.catalogue.cleanup = Ok(vec![record]);
    let next = |world: &World| world.refusals().pop().unwrap().next;
    assert!(next(&world).contains("SELECT pid, query"), "{}", next(&world));
    let reader = "pid 812 of report (psql, from 10.0.0.7) on coord:5432, by pid 47".to_owned();
    world.primary(1).readers = Ok(vec![reader]);
    assert_eq!(
        next(&world),
        "Citus does so each 15 s, once nobody reads it: end pid 812 of report (psql, from 10.0.0.7) on coord:5432, \
         by pid 47 on w1"
    );
    world.primary(1).readers = unknown();
    assert!(next(&world).contains("SELECT pid, query"), "{}", next(&world));
}

fn unknown<T>() -> Known<T> {
    Err(Unknown::because("no answer"))
}

const UNKNOWN: &[Case] = &[
    case(Gate::Links, ALL, "which node reaches which is unknown: no answer", |it| {
        it.observation.catalogue.links = unknown();
    }),
    case(Gate::Patroni, ALL, "what Patroni does is unknown: no answer", |it| {
        it.observation.patroni = Some(unknown());
    }),
    case(Gate::Sizes, ALL, "no answer", |it| {
        it.observation.catalogue.placements[0].bytes = unknown();
    }),
    case(Gate::Busy, ALL, "whether a job of Citus runs is unknown: no answer", |it| {
        it.observation.catalogue.jobs = unknown();
    }),
    case(Gate::Busy, ALL, "whether a shard is moved is unknown: no answer", |it| {
        it.observation.catalogue.progress = unknown();
    }),
    case(Gate::Cleanup, ALL, "what Citus has to clean up is unknown: no answer", |it| {
        it.observation.catalogue.cleanup = unknown();
    }),
    case(Gate::Paused, ALL, "whether it is paused is unknown: no answer", |it| {
        it.control = unknown();
    }),
    case(Gate::Budget, ALL, "what was moved in the last 24 hours is unknown: no answer", |it| {
        it.ledger = unknown();
    }),
    case(Gate::Health, ALL, "the health monitor's verdict is unknown: no answer", |it| {
        it.observation.verdict = Some(unknown());
    }),
    case(Gate::Activity, ALL, "what other agents do is unknown: no answer", |it| {
        it.observation.activities = Some(unknown());
    }),
    case(Gate::Reachable, ALL, "the primary of group 2 does not answer: no answer", |it| {
        it.observation.servers.get_mut(&2).unwrap().primary = unknown();
    }),
    case(Gate::Reachable, W1, "standby w1b does not answer: no answer", |it| {
        let standbys = &mut it.observation.servers.get_mut(&1).unwrap().standbys;
        standbys.insert("w1b".to_owned(), unknown());
    }),
    case(
        Gate::BaseBackup,
        W1,
        "whether a base backup is taken from w1 is unknown: no answer",
        |it| {
            it.primary(1).base_backups = unknown();
        },
    ),
    case(
        Gate::BaseBackup,
        Scope::Group(2),
        "whether a base backup is taken from w2b is unknown: no answer",
        |it| {
            it.standby(2).base_backups = unknown();
        },
    ),
    case(Gate::Lag, W1, "how far the standbys of w1 are is unknown: no answer", |it| {
        it.primary(1).senders = unknown();
    }),
    case(Gate::Lag, W1, "how far w1b is behind is unknown: no answer", |it| {
        it.standby(1).replay = unknown();
    }),
    case(Gate::Lag, W1, "how far w1b is behind is unknown", |it| {
        it.standby(1).replay = Ok(Replay { streams: true, lsn: None });
    }),
    case(Gate::Lag, W1, "how far w1b is behind is unknown", |it| it.primary(1).lsn = unknown()),
    case(Gate::Transactions, W1, "which transactions are open on w1 is unknown: no answer", |it| {
        it.primary(1).oldest_transaction = unknown();
    }),
    case(
        Gate::Headroom,
        W1,
        "what w1 has left of its processes and slots is unknown: no answer",
        |it| it.primary(1).resources = unknown(),
    ),
    case(Gate::Disk, W1, "the disk of w1 is unknown: no answer", |it| {
        it.primary(1).disk = unknown();
    }),
    case(Gate::Disk, W1, "the disk of w1 is unknown: no answer", |it| {
        it.primary(1).wal = unknown();
    }),
    case(Gate::Leftovers, W1, "what is left of moves on w1 is unknown: no answer", |it| {
        it.primary(1).artifacts = unknown();
    }),
    case(
        Gate::Orphans,
        W1,
        "which tables on w1 are of shards that are not there is unknown: no answer",
        |it| it.primary(1).orphans = unknown(),
    ),
    case(Gate::Slots, W1, "which slots of w1 nobody reads from is unknown: no answer", |it| {
        it.primary(1).idle_slots = unknown();
    }),
];

#[test]
fn each_gate_closes_on_what_is_unknown() {
    for Case { change, gate, scope, reason } in UNKNOWN {
        let mut world = World::well();
        change(&mut world);
        let found: Vec<_> =
            world.refusals().into_iter().map(|it| (it.gate, it.scope, it.reason)).collect();
        assert_eq!(found, [(*gate, *scope, (*reason).to_owned())], "{reason}");
    }
}

proptest! {
    /// Whatever else is unknown or bad: what is unknown closes its gate. Where a primary does not
    /// answer at all, nothing else is known of its group, and the whole cluster is closed; where a standby
    /// does not, its group is.
    #[test]
    fn a_guard_never_opens_on_unknown(
        unknown in vec(any::<bool>(), UNKNOWN.len()),
        bad in vec(any::<bool>(), BAD.len()),
        has_bad in any::<bool>(),
    ) {
        let mut world = World::well();
        let bad = BAD.iter().zip(bad).filter(|(_, is_there)| has_bad && *is_there);
        // First what is bad, as it is known; last the servers of which then nothing is known. A node
        // that Citus does not have is not asked.
        for (case, _) in bad.filter(|(it, _)| !matches!(it.gate, Gate::Reachable | Gate::Nodes)) {
            (case.change)(&mut world);
        }
        let mut changed: Vec<_> =
            UNKNOWN.iter().zip(unknown).filter(|(_, is_there)| *is_there).map(|it| it.0).collect();
        changed.sort_by_key(|it| (it.gate == Gate::Reachable, it.scope == ALL));
        for case in &changed {
            (case.change)(&mut world);
        }
        let refusals = world.refusals();
        for case in changed {
            let is_closed = refusals.iter().any(|it| {
                let is_gate = it.gate == case.gate || it.gate == Gate::Reachable;
                is_gate && (it.scope == case.scope || it.scope == ALL)
            });
            prop_assert!(is_closed, "{} stays open: {refusals:?}", case.reason);
        }
    }
}

/// Who looks should not stop it by hand.
#[test]
fn a_job_that_is_ours_is_told_from_one_that_is_not() {
    let next = |ours: Option<i64>| {
        let mut world = World::well();
        let (state, description) = ("running".to_owned(), "Rebalance".to_owned());
        world.observation.catalogue.jobs = Ok(vec![Job { id: 3, state, description, retries: 0 }]);
        let entry = moved(1, 1, 5).newest().next().cloned().unwrap();
        world.ledger = Ok(Ledger::new(vec![Entry { job: ours, ..entry }]));
        let refusals = world.refusals();
        assert_eq!(refusals.len(), 1, "{refusals:?}");
        refusals[0].next.clone()
    };
    assert!(next(Some(3)).ends_with("rebalance-agent pause"));
    for ours in [None, Some(2)] {
        assert!(next(ours).ends_with("citus_job_cancel()"));
    }
}
