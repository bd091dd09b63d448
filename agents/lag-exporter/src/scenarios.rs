//! What a group is said to be, from the samples of servers whose truth is known: every phase of
//! the experiment that this agent is measured by, and what a failover, a restart and a rebuilt
//! standby look like.

use std::collections::BTreeMap;
use std::time::Duration;

use chrono::{DateTime, TimeDelta};
use proptest::prelude::*;
use tokio_postgres::types::PgLsn;

use crate::group::{Group, Limits};
use crate::line::Change;
use crate::observation::{
    Details, Directory, Identity, PAGE_BYTES, Position, Receiver, ReceiverStatus, ReplayPause,
    Report, Sample, Seed, Sender, Slot, Stage, StandbyPosition, SyncWaits, WalFileAge, WalStatus,
};
use crate::view::{
    CatchUp, GroupView, Lag, LagState, LagView, MostWal, NodeView, Quorum, Role, Rpo, Runway,
    SplitBrain, SyncCount,
};

/// Milliseconds from one state of the world to the next: 20 commits a second.
const STEP: u64 = 50;
/// Each server is asked this often.
const INTERVAL: u64 = 1000;
/// From question to answer.
const ROUND_TRIP: u64 = 4;
const COMMIT_BYTES: u64 = 1000;
const LIMITS: Limits = Limits {
    stale_after: Duration::from_secs(5),
    history: Duration::from_hours(72),
    forget_after: Duration::from_mins(5),
};

/// What a standby does with the WAL there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// Receives and replays it.
    Follows,
    /// `pg_wal_replay_pause()`.
    Paused,
    /// Its startup process is stopped: it looks as before, but replays nothing.
    StartupStopped,
    /// Its receiver is stopped: it looks as before, but receives nothing.
    ReceiverStopped,
    /// It has no receiver.
    NoReceiver,
    /// It has no receiver, and does not replay what it has received.
    Stuck,
}

#[expect(clippy::struct_excessive_bools, reason = "they are independent, and named where set")]
#[derive(Clone, Debug)]
struct Server {
    name: &'static str,
    started: i64,
    system_identifier: u64,
    answers: bool,
    is_primary: bool,
    timeline: u32,
    /// Where its timeline's history left older ones.
    history: Vec<(u32, u64)>,
    /// Whether it tells the last of that.
    tells_fork: bool,
    /// Whether it tells the timeline of what it has replayed.
    tells_timeline: bool,
    mode: Mode,
    flush: u64,
    /// So much more a primary has begun to write.
    unflushed: u64,
    replay: u64,
    /// Whether a receiver was started since the server was.
    tells_received: bool,
    /// What it says of `RecoveryWalStream` where that is asked.
    startup_waits: bool,
    clock_ahead: i64,
    directory: Directory,
}

impl Server {
    fn position(&self) -> Position {
        if self.is_primary {
            return Position::Primary {
                timeline: self.timeline,
                flush_lsn: PgLsn::from(self.flush),
                insert_lsn: PgLsn::from(self.flush + self.unflushed),
                fork_lsn: self
                    .history
                    .last()
                    .filter(|_| self.tells_fork)
                    .map(|it| PgLsn::from(it.1)),
            };
        }
        let asks = self.flush.is_multiple_of(PAGE_BYTES) && self.replay < self.flush;
        let receiver = Receiver {
            status: ReceiverStatus::Streaming,
            received_timeline: Some(self.timeline),
            message_age: Some(Duration::ZERO),
        };
        Position::Standby(StandbyPosition {
            receive_lsn: self.tells_received.then_some(PgLsn::from(self.flush)),
            replay_lsn: Some(PgLsn::from(self.replay)),
            replay_pause: match self.mode {
                Mode::Paused => ReplayPause::Paused,
                _ => ReplayPause::NotPaused,
            },
            startup_waits: asks.then_some(self.startup_waits),
            timeline: self.tells_timeline.then_some(self.timeline),
            receiver: (!matches!(self.mode, Mode::NoReceiver | Mode::Stuck)).then_some(receiver),
        })
    }

    /// Goes on from where both histories are the same, unless it has gone another way.
    fn receive_from(&mut self, primary: &Self) {
        let left = primary.history.iter().find(|(timeline, _)| *timeline == self.timeline);
        if let Some((_, fork)) = left
            && self.replay <= *fork
        {
            (self.timeline, self.history) = (primary.timeline, primary.history.clone());
            self.flush = self.flush.min(*fork);
        }
        if self.timeline == primary.timeline {
            self.flush = self.flush.max(primary.flush);
        }
    }

    fn sample(&self, asked_at: u64) -> Sample {
        Sample {
            asked_at: ms(asked_at),
            answered_at: ms(asked_at + ROUND_TRIP),
            identity: Identity {
                system_identifier: self.system_identifier,
                server_version: 170_002,
                wal_segment_bytes: 16 << 20,
                started_at: DateTime::from_timestamp(self.started, 0).unwrap(),
            },
            directory: self.directory,
            clock_ahead: TimeDelta::milliseconds(self.clock_ahead),
            position: self.position(),
        }
    }
}

/// Servers, what they did, and what the group knows.
struct World {
    now: u64,
    writes: bool,
    servers: Vec<Server>,
    /// When each position of a timeline was written, and of what it began with.
    lines: BTreeMap<u32, Vec<(u64, u64)>>,
    /// Where a timeline's history left older ones.
    histories: BTreeMap<u32, Vec<(u32, u64)>>,
    /// The newest sample of each server: when, its timeline, and how far it had replayed.
    sampled: Vec<(u64, u32, u64)>,
    group: Group,
    changes: Vec<Change>,
    /// No sample is missed, so that an estimate is as good as promised.
    all_answer: bool,
}

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn seconds(seconds: u64) -> u64 {
    seconds * 1000
}

impl World {
    /// A primary `a` and standbys `b` and `c`, at 20 commits a second.
    fn new() -> Self {
        Self::of(&["a", "b", "c"])
    }

    /// A primary and standbys.
    fn of(names: &[&'static str]) -> Self {
        let server = |(index, name): (usize, &&'static str)| Server {
            name,
            started: 1_000_000 + i64::try_from(index).unwrap(),
            system_identifier: 7,
            answers: true,
            is_primary: index == 0,
            timeline: 1,
            history: Vec::new(),
            tells_fork: false,
            tells_timeline: true,
            mode: Mode::Follows,
            flush: 1 << 24,
            unflushed: 0,
            replay: 1 << 24,
            tells_received: true,
            startup_waits: true,
            clock_ahead: 0,
            directory: Directory::default(),
        };
        let servers: Vec<_> = names.iter().enumerate().map(server).collect();
        let mut world = Self {
            now: 100_600,
            writes: true,
            histories: BTreeMap::new(),
            sampled: vec![(0, 1, 0); servers.len()],
            servers,
            lines: BTreeMap::from([(1, vec![(0, 1 << 24)])]),
            group: Group::new(0, LIMITS),
            changes: Vec::new(),
            all_answer: true,
        };
        world.set_members();
        world
    }

    /// The same after half a minute.
    fn running() -> Self {
        let mut world = Self::new();
        world.run(seconds(30));
        world
    }

    /// Its primary is gone; `b` and `c` were promoted, and each writes a timeline 2 of its own.
    fn with_two_timelines_2() -> Self {
        let mut world = Self::running();
        world.server("a").answers = false;
        world.promote("b", true);
        let history = world.server("b").history.clone();
        let c = world.server("c");
        (c.is_primary, c.timeline, c.history) = (true, 2, history);
        world
    }

    fn set_members(&mut self) {
        let names: Vec<_> = self.servers.iter().map(|it| it.name.to_owned()).collect();
        self.group.set_members(&names, ms(self.now));
    }

    fn server(&mut self, name: &str) -> &mut Server {
        self.servers.iter_mut().find(|it| it.name == name).unwrap()
    }

    /// The primary on the newest timeline.
    fn primary(&self) -> &Server {
        let primaries = self.servers.iter().filter(|it| it.is_primary);
        primaries.max_by_key(|it| it.timeline).unwrap()
    }

    fn run(&mut self, time: u64) {
        let until = self.now + time;
        while self.now < until {
            self.now += STEP;
            if self.writes {
                for it in self.servers.iter_mut().filter(|it| it.is_primary) {
                    it.flush += COMMIT_BYTES;
                    self.lines.entry(it.timeline).or_default().push((self.now, it.flush));
                }
            }
            let primary = self.primary().clone();
            for it in self.servers.iter_mut().filter(|it| !it.is_primary) {
                if !matches!(it.mode, Mode::ReceiverStopped | Mode::NoReceiver | Mode::Stuck) {
                    it.receive_from(&primary);
                }
                if !matches!(it.mode, Mode::Paused | Mode::StartupStopped | Mode::Stuck) {
                    it.replay = it.replay.max(it.flush);
                }
            }
            self.ask();
        }
    }

    fn ask(&mut self) {
        for index in 0..self.servers.len() {
            if self.now % INTERVAL != index as u64 * 200 {
                continue;
            }
            let server = &self.servers[index];
            let asked_at = self.now;
            let report = if server.answers {
                self.sampled[index] = (asked_at, server.timeline, server.replay);
                Report::Sample(server.sample(asked_at))
            } else {
                Report::Failed { at: ms(asked_at), stage: Stage::Timeout }
            };
            let change = self.group.record(server.name, report);
            self.changes.extend(change);
        }
        self.check();
    }

    /// What must hold at any time.
    fn check(&self) {
        let view = self.view();
        for (server, (asked_at, timeline, replay)) in self.servers.iter().zip(&self.sampled) {
            let Some(node) = view.nodes.iter().find(|it| it.name == server.name) else { continue };
            let Some(LagView { state, replay: lag, .. }) = &node.lag else { continue };
            let Lag { lower, estimate, upper } = *lag;
            let line = view.timeline.and_then(|timeline| self.lines.get(&timeline));
            let missed = line.and_then(|line| line.iter().find(|(_, lsn)| lsn > replay));
            let since = |at: u64| ms(missed.map_or(0, |(missed, _)| at.saturating_sub(*missed)));
            let (truth, truth_now) = (since(*asked_at), since(self.now + ROUND_TRIP));
            let context = format!("{} at {}: {truth:?} {state:?} {lag:?}", server.name, self.now);
            assert!(lower.is_none_or(|lower| lower <= truth), "{context}");
            // A standby leader may be behind itself.
            let is_relative = view.standby_leader.is_some();
            assert!(is_relative || upper.is_none_or(|upper| truth_now <= upper), "{context}");
            assert!(estimate.is_none_or(|it| lower <= Some(it) && Some(it) <= upper), "{context}");
            let numbers = (lower.is_some(), estimate.is_some(), upper.is_some());
            let expected: &[_] = match state {
                LagState::Ok | LagState::CaughtUp => &[(true, true, true)],
                LagState::BeyondHistory => &[(true, false, false)],
                LagState::PrimaryUnknown => &[(false, false, true), (false, false, false)],
                _ => &[(false, false, false)],
            };
            assert!(expected.contains(&numbers), "{context}");
            if lower.is_some() && view.timeline != Some(*timeline) {
                let history = view.timeline.and_then(|timeline| self.histories.get(&timeline));
                let left = history.and_then(|it| it.iter().find(|(left, _)| left == timeline));
                assert!(left.is_some_and(|(_, fork)| replay <= fork), "another history: {context}");
            }
            if let Some(estimate) = estimate {
                let is_wide = width(*lag) > ms(2 * INTERVAL);
                let is_near = estimate.abs_diff(truth) <= ms(INTERVAL + INTERVAL / 2);
                assert!(is_near || is_wide || is_relative || !self.all_answer, "{context}");
            }
        }
    }

    fn view(&self) -> GroupView {
        self.group.view(ms(self.now + ROUND_TRIP))
    }

    fn node(&self, name: &str) -> NodeView {
        self.view().nodes.into_iter().find(|it| it.name == name).unwrap()
    }

    fn lag(&self, name: &str) -> LagView {
        self.node(name).lag.unwrap()
    }

    fn promote(&mut self, name: &str, fork_is_told: bool) {
        let timeline = self.servers.iter().map(|it| it.timeline).max().unwrap() + 1;
        let server = self.server(name);
        let (left, fork) = (server.timeline, server.replay);
        server.history.push((left, fork));
        (server.is_primary, server.timeline, server.tells_fork) = (true, timeline, fork_is_told);
        server.flush = fork;
        let history = server.history.clone();
        let mut line = self.lines.get(&left).cloned().unwrap();
        line.retain(|(_, lsn)| *lsn <= fork);
        self.lines.insert(timeline, line);
        self.histories.insert(timeline, history);
        // The record that ends recovery.
        self.write(60);
    }

    /// The primary writes so much.
    fn write(&mut self, bytes: u64) {
        let name = self.primary().name;
        self.server(name).flush += bytes;
        let Server { timeline, flush, .. } = *self.primary();
        self.lines.entry(timeline).or_default().push((self.now, flush));
    }

    /// Says what was written on the first timeline.
    fn wrote(&mut self, written: &[(u64, u64)]) {
        self.lines.insert(1, written.to_vec());
    }

    /// Another process takes up what this one knows.
    fn restart_agent(&mut self) {
        let saved = self.group.saved().unwrap();
        self.group = Group::new(0, LIMITS);
        self.set_members();
        assert!(self.group.restore(saved));
    }

    fn details(&mut self, name: &str, details: Details) {
        // Right after the positions.
        let (asked_at, answered_at) = (ms(self.now + ROUND_TRIP), ms(self.now + ROUND_TRIP));
        let details = Details { asked_at, answered_at, ..details };
        self.group.record(name, Report::Details(Box::new(details)));
    }
}

/// How far its bounds are apart.
fn width(lag: Lag) -> Duration {
    lag.upper.unwrap().checked_sub(lag.lower.unwrap()).unwrap()
}

/// A standby that is this many seconds behind, to half a second.
fn about(lag: Lag) -> Option<u64> {
    lag.estimate.map(|it| (it + ms(500)).as_secs())
}

#[expect(clippy::too_many_lines, reason = "it is a table")]
#[test]
fn every_phase_of_the_experiment_has_the_right_number() {
    struct Case {
        name: &'static str,
        script: fn(&mut World),
        state: LagState,
        replay: u64,
        receive: u64,
    }
    let cases = [
        Case {
            name: "steady load",
            script: |world| world.run(seconds(30)),
            state: LagState::CaughtUp,
            replay: 0,
            receive: 0,
        },
        Case {
            name: "idle primary",
            script: |world| {
                world.writes = false;
                world.run(seconds(40));
            },
            state: LagState::CaughtUp,
            replay: 0,
            receive: 0,
        },
        Case {
            name: "commits after idle",
            script: |world| {
                world.writes = false;
                for pause in 1..40 {
                    world.run(seconds(3) + pause * STEP);
                    world.write(COMMIT_BYTES);
                }
                world.run(seconds(1));
            },
            state: LagState::CaughtUp,
            replay: 0,
            receive: 0,
        },
        Case {
            name: "replay paused, load",
            script: |world| {
                world.server("b").mode = Mode::Paused;
                world.run(seconds(30));
            },
            state: LagState::Ok,
            replay: 30,
            receive: 0,
        },
        Case {
            name: "receiver stopped, load",
            script: |world| {
                world.server("b").mode = Mode::ReceiverStopped;
                world.run(seconds(30));
            },
            state: LagState::Ok,
            replay: 30,
            receive: 30,
        },
        Case {
            name: "startup process stopped, load",
            script: |world| {
                world.server("b").mode = Mode::StartupStopped;
                world.run(seconds(30));
            },
            state: LagState::Ok,
            replay: 30,
            receive: 0,
        },
        Case {
            name: "upstream unreachable, load",
            script: |world| {
                world.server("b").mode = Mode::NoReceiver;
                world.run(seconds(30));
            },
            state: LagState::Ok,
            replay: 30,
            receive: 30,
        },
        Case {
            name: "replay paused, then idle",
            script: |world| {
                world.server("b").mode = Mode::Paused;
                world.run(seconds(10));
                world.writes = false;
                world.run(seconds(20));
            },
            state: LagState::Ok,
            replay: 30,
            receive: 0,
        },
        Case {
            name: "link cut and idle: there is nothing to miss",
            script: |world| {
                world.writes = false;
                world.run(seconds(2));
                world.server("b").mode = Mode::NoReceiver;
                world.run(seconds(30));
            },
            state: LagState::CaughtUp,
            replay: 0,
            receive: 0,
        },
        Case {
            name: "one bulk transaction",
            script: |world| {
                for _ in 0..25 * 1000 / STEP {
                    world.write(4_000_000);
                    world.run(STEP);
                }
            },
            state: LagState::CaughtUp,
            replay: 0,
            receive: 0,
        },
        Case {
            name: "after a pause it catches up",
            script: |world| {
                world.server("b").mode = Mode::Paused;
                world.run(seconds(30));
                world.server("b").mode = Mode::Follows;
                world.run(seconds(2));
            },
            state: LagState::CaughtUp,
            replay: 0,
            receive: 0,
        },
        Case {
            name: "standby clock 30 s fast, paused",
            script: |world| {
                world.server("b").clock_ahead = 30_000;
                world.server("b").mode = Mode::Paused;
                world.run(seconds(5));
            },
            state: LagState::Ok,
            replay: 5,
            receive: 0,
        },
        Case {
            name: "standby clock 30 s slow, paused",
            script: |world| {
                world.server("b").clock_ahead = -30_000;
                world.server("b").mode = Mode::Paused;
                world.run(seconds(5));
            },
            state: LagState::Ok,
            replay: 5,
            receive: 0,
        },
    ];
    for Case { name, script, state, replay, receive } in cases {
        let mut world = World::running();
        script(&mut world);
        let lag = world.lag("b");
        let found = (lag.state, about(lag.replay), about(lag.receive));
        assert_eq!(found, (state, Some(replay), Some(receive)), "{name}");
        assert!(width(lag.replay) <= ms(2 * INTERVAL), "{name}: {lag:?}");
        // The other standby had nothing of all this.
        assert_eq!(world.lag("c").state, LagState::CaughtUp, "{name}");
    }
}

/// A primary with an open transaction and nothing else to do writes whole pages: what a standby
/// has then ends within a record, which it cannot replay.
#[test]
fn a_record_that_ends_beyond_the_page_is_no_lag() {
    let case = |beyond_page: u64, unreplayed: u64, startup_waits: bool, unflushed: u64| {
        let mut world = World::running();
        world.writes = false;
        world.run(seconds(2));
        let committed = world.primary().flush;
        let flush = committed.next_multiple_of(PAGE_BYTES) + beyond_page;
        let a = world.server("a");
        (a.flush, a.unflushed) = (flush, unflushed);
        let c = world.server("c");
        (c.flush, c.replay) = (flush, flush);
        let b = world.server("b");
        (b.flush, b.replay) = (flush, committed - unreplayed);
        (b.mode, b.startup_waits) = (Mode::StartupStopped, startup_waits);
        if beyond_page > 0 || !startup_waits || unflushed == 0 {
            let now = world.now;
            world.lines.get_mut(&1).unwrap().push((now, flush));
        }
        world.run(seconds(10));
        about(world.lag("b").replay).unwrap()
    };
    for (name, beyond_page, unreplayed, startup_waits, unflushed, expected) in [
        ("all signs", 0, 0, true, 100, 0),
        ("it does not wait for WAL", 0, 0, false, 100, 10),
        ("not at a page", 100, 0, true, 100, 10),
        ("longer than a record", 0, 300_000, true, 100, 27),
        ("the primary has ended its record", 0, 0, true, 0, 10),
    ] {
        let found = case(beyond_page, unreplayed, startup_waits, unflushed);
        assert!(found.abs_diff(expected) <= 1, "{name}: {found}");
    }
}

/// With `synchronous_commit = off`.
#[test]
fn a_commit_that_is_not_flushed_is_within_the_bounds() {
    let mut world = World::running();
    world.writes = false;
    world.run(seconds(2));
    for _ in 0..3 {
        world.server("a").unflushed = COMMIT_BYTES;
        let (now, end) = (world.now, world.primary().flush + COMMIT_BYTES);
        world.lines.get_mut(&1).unwrap().push((now, end));
        world.run(seconds(10));
        let LagView { state, replay, .. } = world.lag("b");
        assert_eq!((state, replay.lower), (LagState::CaughtUp, Some(ms(0))));
        assert!((10..13).contains(&replay.upper.unwrap().as_secs()), "{replay:?}");
        let a = world.server("a");
        (a.flush, a.unflushed) = (end, 0);
        world.run(seconds(3));
        assert!(world.lag("b").replay.upper < Some(ms(3000)));
    }
}

#[test]
fn a_position_at_a_page_counts_once_it_has_stayed_there() {
    let mut world = World::running();
    let page = world.primary().flush.next_multiple_of(PAGE_BYTES) + PAGE_BYTES;
    let now = world.now;
    let (mut sample, asked_at) = (world.server("b").sample(now), now + 2000);
    let mut record = |world: &mut World, at, receive| {
        let Position::Standby(position) = &mut sample.position else { panic!("a standby") };
        position.receive_lsn = Some(PgLsn::from(receive));
        position.startup_waits = Some(true);
        (sample.asked_at, sample.answered_at) = (ms(at), ms(at + 1));
        world.group.record("b", Report::Sample(sample));
        world.group.view(ms(at + 1)).nodes[1].lag.clone().unwrap().state
    };
    let server = world.server("a");
    (server.flush, server.unflushed) = (page, 100);
    let primary = server.sample(now + 1000);
    world.group.record("a", Report::Sample(primary));
    let states = [
        record(&mut world, asked_at, page),
        record(&mut world, asked_at + 1000, page),
        record(&mut world, asked_at + 2000, page - PAGE_BYTES),
    ];
    assert_eq!(states, [LagState::Ok, LagState::CaughtUp, LagState::Ok]);
}

#[test]
fn without_a_primary_only_an_old_lag_is_known() {
    let mut world = World::running();
    world.server("b").mode = Mode::Paused;
    world.run(seconds(10));
    world.server("a").answers = false;
    world.writes = false;
    world.run(seconds(4));
    assert_eq!(world.lag("c").state, LagState::CaughtUp, "not yet stale");
    world.run(seconds(26));

    let view = world.view();
    assert_eq!((view.primaries, view.primary, view.rpo), (0, None, Rpo::Unknown));
    assert_eq!(view.wal_bytes_per_second, None);
    assert!(view.primary_sample_age > Some(ms(seconds(29))), "{:?}", view.primary_sample_age);
    let LagView { state, replay, replay_bytes, catch_up, .. } = world.lag("c");
    assert_eq!((state, replay_bytes), (LagState::PrimaryUnknown, None));
    assert_eq!((replay.lower, replay.estimate), (None, None));
    assert!(replay.upper > Some(ms(seconds(29))), "{replay:?}");
    assert_eq!(catch_up, CatchUp::Unknown);
    // What this one lacks was written before, and grows older.
    let LagView { state, replay, replay_bytes, .. } = world.lag("b");
    assert_eq!((state, about(replay), replay_bytes), (LagState::Ok, Some(40), None));
    let LagView { state, .. } = world.lag("a");
    assert_eq!(state, LagState::Unreachable);

    world.server("a").answers = true;
    world.writes = true;
    world.run(seconds(3));
    assert_eq!(world.lag("c").state, LagState::CaughtUp);
    assert_eq!(about(world.lag("b").replay), Some(43));
    assert_eq!(world.changes, []);
}

#[test]
fn a_node_that_does_not_answer_has_no_number() {
    let mut world = World::new();
    let lag = world.lag("b");
    assert_eq!((lag.state, lag.replay), (LagState::Unknown, Lag::default()), "not asked yet");
    world.server("b").answers = false;
    world.run(seconds(10));
    let NodeView { up, last_success_age, state, lag, .. } = world.node("b");
    assert_eq!((up, last_success_age, state), (Some(false), None, None));
    assert_eq!(lag.map(|lag| lag.state), Some(LagState::Unreachable));
    world.server("b").answers = true;
    world.run(seconds(2));
    assert_eq!(world.lag("b").state, LagState::CaughtUp);
    world.server("b").answers = false;
    world.run(seconds(1));
    assert_eq!(world.lag("b").state, LagState::Unreachable, "at once");
    world.run(seconds(6));
    assert_eq!(world.lag("b").state, LagState::Unreachable);
    assert!(world.node("b").last_success_age > Some(ms(seconds(5))));
}

#[test]
fn a_question_that_is_not_answered_leaves_no_number() {
    let failed = |stage| Report::Failed { at: ms(0), stage };
    let connects = |outcome| Report::FreshConnect { at: ms(0), outcome };
    let table: [(&str, Vec<Report>, bool); 5] = [
        ("all is well", vec![connects(Ok(()))], true),
        ("a kept connection, and none to spare", vec![connects(Err(Stage::Auth))], true),
        ("it is silent", vec![failed(Stage::Timeout)], false),
        ("it is refused", vec![connects(Err(Stage::Dial)), failed(Stage::Dial)], false),
        ("a new connection alone", vec![failed(Stage::Dial), connects(Ok(()))], false),
    ];
    for (name, reports, is_known) in table {
        let mut world = World::running();
        for report in reports {
            world.group.record("b", report);
        }
        let expected = if is_known { LagState::CaughtUp } else { LagState::Unreachable };
        assert_eq!(world.lag("b").state, expected, "{name}");
        let NodeView { up, state, .. } = world.node("b");
        assert_eq!((up, state.is_some()), (Some(is_known), is_known), "{name}");
        assert_eq!(world.lag("c").state, LagState::CaughtUp, "{name}: the other one");
        world.run(seconds(1));
        assert_eq!(world.lag("b").state, LagState::CaughtUp, "{name}: it answers again");
    }
}

#[test]
fn a_lag_older_than_the_history_has_a_lower_bound_only() {
    let mut world = World::new();
    world.server("b").mode = Mode::Paused;
    world.server("b").replay -= 5000;
    world.wrote(&[(0, (1 << 24) - 5000), (90_000, 1 << 24)]);
    world.run(seconds(30));
    let LagView { state, replay, replay_bytes, catch_up, .. } = world.lag("b");
    assert_eq!((state, catch_up), (LagState::BeyondHistory, CatchUp::Never));
    assert!(replay.lower > Some(ms(seconds(28))), "{replay:?}");
    assert!(replay_bytes > Some(500_000), "{replay_bytes:?}");
}

/// What the primary remembers makes a lag of before the start known to a second.
#[test]
fn a_seed_gives_positions_before_the_start_an_age() {
    let mut world = World::new();
    world.writes = false;
    let segment = 16 << 20;
    world.server("a").flush = 5 * segment + 100;
    let b = world.server("b");
    (b.mode, b.replay) = (Mode::Paused, 3 * segment + segment / 2);
    // By the server's clock, which is not ours.
    world.wrote(&[(80_200, 3 * segment), (90_700, 4 * segment), (95_100, 5 * segment)]);
    world.run(seconds(1));
    assert_eq!(world.lag("b").state, LagState::BeyondHistory);
    assert_eq!(world.group.wants_seed(), Some("a"));
    let Sample { identity, .. } = world.server("a").sample(0);
    let files = [(2, 80_000), (3, 90_000), (4, 95_000), (5, 100_000), (6, 1000)];
    let seed = Seed {
        asked_at: ms(world.now),
        answered_at: ms(world.now + ROUND_TRIP),
        identity,
        up_for: TimeDelta::hours(1),
        timeline: 1,
        current_segment: "000000010000000000000005".to_owned(),
        files: files
            .map(|(number, modified)| WalFileAge {
                name: format!("0000000100000000{number:08X}"),
                age: TimeDelta::milliseconds(world.now.cast_signed() - modified),
            })
            .to_vec(),
        checkpoint: None,
    };
    world.group.record("b", Report::Seed(seed.clone()));
    assert_eq!(world.group.wants_seed(), Some("a"), "only the source knows");
    // Nothing is taken by a clock that is wrong.
    let saved = world.group.saved().unwrap();
    let mut off = Group::new(0, LIMITS);
    let sample = world.server("a").clone().sample(world.now);
    off.set_members(&["a".to_owned()], ms(world.now));
    let sample = Sample { clock_ahead: TimeDelta::seconds(120), ..sample };
    off.record("a", Report::Sample(sample));
    off.record("a", Report::Seed(seed.clone()));
    let entries = |group: &Group| group.saved().unwrap().entries.len();
    assert_eq!((off.wants_seed(), entries(&off)), (None, saved.entries.len()));
    world.group.record("a", Report::Seed(seed));
    assert_eq!(world.group.wants_seed(), None);
    assert!(saved.entries.len() < entries(&world.group));
    world.run(seconds(1));
    let LagView { state, replay, .. } = world.lag("b");
    assert_eq!(state, LagState::Ok);
    let bounds = (replay.lower.unwrap().as_secs(), replay.upper.unwrap().as_secs());
    // Written between 80.2 s and 90.7 s; the sample is of 102.3 s.
    assert_eq!(bounds, (10, 22));
}

#[test]
fn a_restart_with_the_history_goes_on_and_without_it_does_not() {
    let mut world = World::running();
    world.server("b").mode = Mode::Paused;
    world.run(seconds(60));
    let saved = world.group.saved().unwrap();
    for (saved, state, lag) in
        [(Some(saved.clone()), LagState::Ok, Some(75)), (None, LagState::BeyondHistory, None)]
    {
        world.group = Group::new(0, LIMITS);
        world.set_members();
        if let Some(saved) = saved {
            assert!(world.group.restore(saved));
        }
        let (before, lines) = (world.now, world.lines.clone());
        let servers = world.servers.clone();
        world.run(seconds(15));
        let LagView { state: found, replay, .. } = world.lag("b");
        assert_eq!((found, about(replay)), (state, lag));
        (world.now, world.lines, world.servers) = (before, lines, servers);
    }
    // Another cluster by the same name: nothing that was saved is true of it.
    world.group = Group::new(0, LIMITS);
    world.set_members();
    assert!(world.group.restore(saved.clone()));
    for server in &mut world.servers {
        server.system_identifier = 8;
    }
    world.run(seconds(3));
    assert_eq!(world.changes, [Change::BegunAnew]);
    assert_eq!(world.lag("b").state, LagState::BeyondHistory);
    // Entries that are not in order are none.
    let mut bad = saved;
    bad.entries.reverse();
    assert!(!world.group.restore(bad));
}

#[test]
fn a_failover_keeps_the_ages_of_what_both_primaries_have() {
    for (fork_is_told, is_seen, is_slow) in [
        (true, true, false),
        (true, true, true),
        (false, true, false),
        (false, true, true),
        (true, false, false),
        (false, false, false),
    ] {
        let mut world = World::running();
        world.server("c").mode = Mode::Paused;
        world.run(seconds(20));
        // The old primary writes what nobody gets, and dies.
        world.server("b").mode = Mode::ReceiverStopped;
        world.run(seconds(2));
        world.server("a").answers = false;
        let fork = world.server("b").replay;
        if is_slow {
            // It has begun its timeline, and runs its `recovery_end_command`.
            world.server("b").timeline = 2;
            world.run(seconds(3));
            world.server("b").timeline = 1;
        }
        world.promote("b", fork_is_told);
        // This process was started in between.
        if !is_seen {
            let saved = world.group.saved().unwrap();
            world.group = Group::new(0, LIMITS);
            world.set_members();
            assert!(world.group.restore(saved));
        }
        world.run(seconds(10));

        let case = format!("fork told: {fork_is_told}, seen: {is_seen}, slow: {is_slow}");
        assert_eq!(world.changes, [Change::Promoted { from: 1, to: 2 }], "{case}");
        let view = world.view();
        assert_eq!((view.timeline, view.primary.as_deref()), (Some(2), Some("b")), "{case}");
        assert_eq!(view.split_brain, SplitBrain::No, "{case}");
        let LagView { state, replay, .. } = world.lag("c");
        if is_seen {
            let lag = if is_slow { 35 } else { 32 };
            assert_eq!((state, about(replay)), (LagState::Ok, Some(lag)), "{case}");
        } else {
            assert_eq!(state, LagState::BeyondHistory, "{case}");
            assert_eq!(world.group.wants_seed(), Some("b"), "{case}");
        }

        // The old primary comes back as a standby, with what it alone has.
        let a = world.server("a");
        (a.is_primary, a.answers, a.mode) = (false, true, Mode::NoReceiver);
        a.started += 100;
        a.replay = a.flush;
        assert!(a.flush > fork + 10_000);
        world.run(seconds(1));
        let LagView { state, replay, replay_bytes, .. } = world.lag("a");
        let none = (LagState::Diverged, Lag::default(), None);
        assert_eq!((state, replay, replay_bytes), none, "{case}");
        assert!(matches!(world.view().rpo, Rpo::Loss { standby, .. } if standby == "c"), "{case}");

        // And is rebuilt.
        let (flush, a) = (world.primary().flush, world.server("a"));
        (a.timeline, a.flush, a.replay, a.mode) = (2, flush, flush, Mode::Follows);
        a.started += 100;
        world.run(seconds(2));
        assert_eq!(world.lag("a").state, LagState::CaughtUp, "{case}");
    }
}

/// Nobody follows the new primary yet: what was promised by the old one does not count.
#[test]
fn a_standby_that_waits_before_the_fork_is_behind_by_the_new_timeline() {
    let mut world = World::running();
    world.run(seconds(1));
    world.writes = false;
    world.run(seconds(20));
    world.server("a").answers = false;
    world.server("c").mode = Mode::NoReceiver;
    world.run(seconds(4));
    world.promote("b", true);
    world.run(seconds(10));
    let LagView { state, replay, .. } = world.lag("c");
    assert_eq!((state, about(replay)), (LagState::Ok, Some(10)));
    assert!(width(replay) <= ms(2 * INTERVAL), "the outage of 4 s widens nothing: {replay:?}");
}

#[test]
fn what_was_received_beyond_the_fork_does_not_count() {
    let mut world = World::running();
    world.server("b").mode = Mode::ReceiverStopped;
    world.server("c").mode = Mode::Paused;
    world.run(seconds(10));
    world.server("a").answers = false;
    world.promote("b", true);
    // It has not heard of the new timeline, and replays nothing.
    world.server("c").mode = Mode::Stuck;
    world.run(seconds(20));
    let LagView { state, receive, receive_bytes, .. } = world.lag("c");
    assert_eq!((state, about(receive)), (LagState::Ok, Some(20)));
    assert!(receive_bytes > Some(350_000), "{receive_bytes:?}");
}

/// Its replay is delayed or slow, and until it is through with its disk no receiver starts.
#[test]
fn what_a_standby_had_received_before_its_restart_is_not_said_to_be_lost() {
    let mut world = World::running();
    world.server("c").answers = false;
    world.server("b").mode = Mode::Paused;
    world.run(seconds(20));
    let b = world.server("b");
    (b.mode, b.tells_received, b.started) = (Mode::Stuck, false, b.started + 100);
    world.run(seconds(3));
    let LagView { state, replay, receive, receive_bytes, replay_bytes, .. } = world.lag("b");
    assert_eq!((state, about(replay)), (LagState::Ok, Some(23)));
    assert_eq!((receive.lower, receive.estimate, receive_bytes), (None, None, None));
    assert!(receive.upper > Some(ms(seconds(22))) && replay_bytes > Some(400_000));
    let Rpo::Loss { lag, bytes, .. } = world.view().rpo else { panic!("no loss") };
    assert_eq!((lag, bytes), (receive, None));
    // It has all there is: then nothing is missing on its disk either.
    let flush = world.primary().flush;
    world.writes = false;
    (world.server("b").flush, world.server("b").replay) = (flush, flush);
    world.run(seconds(3));
    let LagView { state, receive, receive_bytes, .. } = world.lag("b");
    assert_eq!((state, about(receive), receive_bytes), (LagState::CaughtUp, Some(0), Some(0)));
}

/// Timeline 2 is left by nobody: 3 began on 1, as 2 did, but elsewhere.
#[test]
fn a_dead_branch_is_no_part_of_the_history() {
    for (first, second) in [("b", "c"), ("c", "b")] {
        let mut world = World::of(&["a", "b", "c", "d"]);
        world.run(seconds(30));
        // `b` stays at 30 s, `d` at 40 s, `c` at 50 s.
        world.server("b").mode = Mode::NoReceiver;
        world.run(seconds(10));
        world.server("d").mode = Mode::NoReceiver;
        world.run(seconds(10));
        world.server("c").mode = Mode::NoReceiver;
        world.run(seconds(2));
        world.server("a").answers = false;
        world.promote(first, true);
        world.run(seconds(60));
        world.server(first).answers = false;
        world.promote(second, true);
        world.run(seconds(10));
        let promoted = |from| Change::Promoted { from, to: from + 1 };
        assert_eq!(world.changes, [promoted(1), promoted(2)]);
        let state = world.lag("d").state;
        if second == "b" {
            assert_eq!(state, LagState::Diverged);
            continue;
        }
        assert_eq!(state, LagState::Unknown);
        // It is found to share the history, and its lag began long before that was known.
        let primary = world.primary().clone();
        let d = world.server("d");
        (d.timeline, d.history, d.mode) = (3, primary.history, Mode::Paused);
        world.run(seconds(2));
        assert_eq!(world.lag("d").state, LagState::BeyondHistory);
    }
}

#[test]
fn a_primary_that_went_back_makes_its_standby_diverged() {
    let mut world = World::running();
    world.writes = false;
    // The server starts again, from a disk that had lost a second of WAL.
    let a = world.server("a");
    a.flush -= 20 * COMMIT_BYTES;
    a.started += 100;
    let flush = a.flush;
    world.lines.get_mut(&1).unwrap().retain(|(_, lsn)| *lsn <= flush);
    world.run(seconds(2));
    let lag = world.lag("b");
    assert_eq!((lag.state, lag.replay), (LagState::Diverged, Lag::default()));
    // That the primary has written as much again does not make it the same.
    world.writes = true;
    world.run(seconds(5));
    assert_eq!(world.lag("b").state, LagState::Diverged);
    assert_eq!(world.view().rpo, Rpo::NoStandby);
    // Nor that this agent is started anew, with what it knew.
    world.restart_agent();
    world.server("b").mode = Mode::Stuck;
    world.run(seconds(5));
    assert_eq!(world.lag("b").state, LagState::Diverged);
    // Once it was restarted, it may have been rebuilt or not.
    world.server("b").started += 100;
    world.run(seconds(20));
    assert_eq!(world.lag("b").state, LagState::Unknown);
    assert_eq!(world.view().rpo, Rpo::Unknown);
    // It has if it replays what it streams.
    let (flush, b) = (world.primary().flush, world.server("b"));
    (b.flush, b.replay, b.started, b.mode) = (flush, flush, b.started + 100, Mode::Follows);
    world.run(seconds(4));
    assert_eq!(world.lag("b").state, LagState::CaughtUp);
    world.run(seconds(4));
    assert_eq!(world.lag("b").state, LagState::CaughtUp);
}

/// Two were promoted, and each wrote its own timeline 2. Its receiver lays the primary's WAL over its own, and
/// it replays that from a checkpoint that both have.
#[test]
fn who_replays_the_primarys_wal_over_its_own_tables_is_no_good_standby() {
    for (is_stopped_in_order, expected) in [(true, LagState::Diverged), (false, LagState::Unknown)]
    {
        let mut world = World::with_two_timelines_2();
        let c = world.server("c");
        c.directory = Directory { statistics_reset: DateTime::from_timestamp(5, 0), checkpoint: 5 };
        world.run(seconds(3));
        for start in 1..4 {
            let (flush, c) = (world.primary().flush, world.server("c"));
            (c.is_primary, c.mode, c.flush, c.replay) = (false, Mode::Follows, flush, flush);
            c.started += 100;
            if is_stopped_in_order {
                c.directory.checkpoint += 1;
            } else {
                c.directory.statistics_reset = DateTime::from_timestamp(5 + start, 0);
            }
            world.run(seconds(10));
            assert_eq!(world.lag("c").state, expected, "{start}");
            world.restart_agent();
        }
        let (flush, c) = (world.primary().flush, world.server("c"));
        (c.flush, c.replay, c.started) = (flush, flush, c.started + 100);
        c.directory =
            Directory { statistics_reset: DateTime::from_timestamp(50, 0), checkpoint: 50 };
        world.run(seconds(10));
        assert_eq!(world.lag("c").state, LagState::CaughtUp, "it was rebuilt");
    }
}

/// Two were promoted, and each wrote its own timeline 2.
#[test]
fn who_wrote_the_primarys_timeline_as_well_has_no_number_until_it_is_rebuilt() {
    for is_saved in [false, true] {
        let mut world = World::with_two_timelines_2();
        world.run(seconds(3));
        assert!(matches!(world.view().split_brain, SplitBrain::Confirmed(_)));
        // It is made a standby without a rewind: it says what any standby does.
        let c = world.server("c");
        (c.is_primary, c.mode, c.replay) = (false, Mode::Stuck, c.flush);
        c.started += 100;
        if is_saved {
            world.restart_agent();
        }
        world.run(seconds(20));
        assert_eq!(world.lag("c").state, LagState::Unknown, "{is_saved}");
        assert_eq!(world.view().rpo, Rpo::Unknown, "{is_saved}");
        let (flush, c) = (world.primary().flush, world.server("c"));
        (c.flush, c.replay, c.started, c.mode) = (flush, flush, c.started + 100, Mode::Follows);
        world.run(seconds(10));
        assert_eq!(world.lag("c").state, LagState::CaughtUp, "{is_saved}");
    }
}

#[test]
fn two_primaries_are_told_and_a_lag_between_them_is_not() {
    // The old primary lives on, on the older timeline.
    let mut world = World::running();
    world.promote("b", true);
    world.run(seconds(3));
    let view = world.view();
    let names = || vec!["a".to_owned(), "b".to_owned()];
    assert_eq!(view.split_brain, SplitBrain::Confirmed(names()));
    assert_eq!((view.primaries, view.primary.as_deref()), (2, Some("b")));
    assert_eq!(world.lag("c").state, LagState::CaughtUp);

    // A copy that was started as a primary, on the same timeline.
    let mut world = World::running();
    world.server("c").is_primary = true;
    world.writes = false;
    world.run(seconds(3));
    let view = world.view();
    let names = || vec!["a".to_owned(), "c".to_owned()];
    assert_eq!(view.split_brain, SplitBrain::Candidate(names()));
    assert_eq!((view.primaries, view.primary, view.rpo), (2, None, Rpo::Unknown));
    let lag = world.lag("b");
    assert_eq!((lag.state, lag.replay), (LagState::PrimaryUnknown, Lag::default()));
    world.server("a").flush += 5;
    world.server("c").flush += 7;
    world.run(seconds(1));
    assert_eq!(world.view().split_brain, SplitBrain::Confirmed(names()));
    // One is stopped: the other's history is its own.
    world.server("a").answers = false;
    world.server("a").is_primary = false;
    world.run(seconds(8));
    assert_eq!(world.changes, [Change::BegunAnew]);
    assert_eq!(world.view().primary.as_deref(), Some("c"));
    assert_eq!(world.view().split_brain, SplitBrain::No);
}

#[test]
fn an_old_primary_is_followed_only_if_the_newer_one_is_long_gone() {
    let mut world = World::running();
    world.server("c").mode = Mode::NoReceiver;
    world.promote("b", true);
    world.run(seconds(2));
    world.server("b").answers = false;
    world.run(seconds(200));
    assert_eq!((world.view().primary, world.view().timeline), (None, Some(2)));
    assert_eq!(world.lag("c").state, LagState::Ok, "it waits where timeline 2 began");
    world.server("b").is_primary = false;
    world.server("c").mode = Mode::Follows;
    world.run(seconds(110));
    assert_eq!(world.changes, [Change::Promoted { from: 1, to: 2 }, Change::BegunAnew]);
    assert_eq!((world.view().primary.as_deref(), world.view().timeline), (Some("a"), Some(1)));
    assert_eq!(world.lag("c").state, LagState::CaughtUp);
}

#[test]
fn another_cluster_and_a_newer_timeline_have_no_number() {
    let mut world = World::running();
    world.server("b").system_identifier = 8;
    world.server("c").timeline = 3;
    world.run(seconds(2));
    let (b, c) = (world.lag("b"), world.lag("c"));
    assert_eq!((b.state, b.replay), (LagState::OtherCluster, Lag::default()));
    assert_eq!((c.state, c.replay), (LagState::PrimaryUnknown, Lag::default()));
    assert_eq!(world.view().rpo, Rpo::NoStandby);
}

#[test]
fn a_node_by_a_new_name_goes_on_and_the_old_name_is_forgotten_later() {
    let mut world = World::running();
    world.server("c").mode = Mode::Paused;
    world.run(seconds(10));
    world.server("a").name = "a2";
    world.server("b").name = "b2";
    world.set_members();
    world.run(seconds(10));
    assert_eq!(world.changes, []);
    let view = world.view();
    assert_eq!((view.primaries, view.primary.as_deref()), (1, Some("a2")));
    assert_eq!(view.split_brain, SplitBrain::No);
    let names: Vec<_> = view.nodes.iter().map(|it| it.name.as_str()).collect();
    assert_eq!(names, ["a", "a2", "b", "b2", "c"]);
    assert_eq!(world.lag("b").state, LagState::Unreachable);
    assert_eq!(about(world.lag("c").replay), Some(20));
    world.run(seconds(300));
    let names: Vec<_> = world.view().nodes.into_iter().map(|it| it.name).collect();
    assert_eq!(names, ["a2", "b2", "c"]);
    assert_eq!(world.group.record("a", Report::Failed { at: ms(0), stage: Stage::Dial }), None);
}

#[test]
fn what_would_be_lost_is_what_the_best_standby_has_not_received() {
    let mut world = World::running();
    world.server("b").mode = Mode::ReceiverStopped;
    world.run(seconds(10));
    world.server("c").mode = Mode::Paused;
    world.run(seconds(20));
    // This one has replayed less and received all.
    let Rpo::Loss { standby, lag, bytes } = world.view().rpo else { panic!("no loss") };
    assert_eq!((standby.as_str(), about(lag), bytes), ("c", Some(0), Some(0)));
    world.server("c").answers = false;
    world.run(seconds(10));
    let Rpo::Loss { standby, lag, bytes } = world.view().rpo else { panic!("no loss") };
    assert_eq!((standby.as_str(), about(lag)), ("b", Some(40)));
    assert!(bytes.unwrap().abs_diff(800 * COMMIT_BYTES) <= 20 * COMMIT_BYTES, "{bytes:?}");
    // The primary dies: what it was last seen to have stays known.
    let (flush, lost) = (world.primary().flush, bytes.unwrap());
    world.writes = false;
    world.server("a").answers = false;
    world.run(seconds(10));
    let MostWal { standby, lacks_bytes } = world.view().most_wal.unwrap();
    assert_eq!((standby.as_str(), world.view().rpo), ("b", Rpo::Unknown));
    assert!((lost..=flush).contains(&lacks_bytes), "{lacks_bytes} of {lost}");
    world.server("b").tells_received = false;
    world.run(seconds(2));
    assert_eq!(world.view().most_wal, None, "it may have more");
    world.server("a").answers = true;
    world.server("b").answers = false;
    world.run(seconds(10));
    assert_eq!(world.view().rpo, Rpo::NoStandby);
    assert_eq!(world.view().most_wal, None);
    assert_eq!(World::new().view().rpo, Rpo::Unknown);
}

#[test]
fn a_standby_says_when_it_will_have_caught_up() {
    let mut world = World::running();
    world.server("b").mode = Mode::Paused;
    world.run(seconds(100));
    assert_eq!(world.lag("b").catch_up, CatchUp::Never);
    assert_eq!(world.lag("c").catch_up, CatchUp::Done);
    // It replays five times as fast as the primary writes.
    world.server("b").mode = Mode::StartupStopped;
    for _ in 0..10_000 / STEP {
        world.server("b").replay += 5 * COMMIT_BYTES;
        world.run(STEP);
    }
    let CatchUp::In(time) = world.lag("b").catch_up else { panic!("never") };
    assert!((ms(seconds(15))..ms(seconds(60))).contains(&time), "{time:?}");
    // As fast as the primary writes is not enough.
    for _ in 0..70_000 / STEP {
        world.server("b").replay += COMMIT_BYTES - 1;
        world.run(STEP);
    }
    assert_eq!(world.lag("b").catch_up, CatchUp::Never);
}

#[test]
fn only_a_statement_that_is_seen_to_wait_twice_hangs() {
    let mut world = World::running();
    let sender = |name: &str| Sender {
        application_name: name.to_owned(),
        state: "streaming".to_owned(),
        flush_lsn: Some(1.into()),
        sync_priority: 1,
        ..Sender::default()
    };
    let count = SyncCount { wanted: 1, present: 1 };
    let (met, missed) = (Quorum::Met(count), Quorum::Missed(count));
    // Which statement waits the longest, by when it began.
    for (case, waits, expected, waited) in [
        ("not told", None, met, None),
        ("none", Some(None), met, Some(0)),
        ("a long one at its commit", Some(Some(1)), met, Some(0)),
        ("another", Some(Some(2)), met, Some(0)),
        ("the same again", Some(Some(2)), missed, Some(10_000)),
        ("and again", Some(Some(2)), missed, Some(20_000)),
        ("none any more", Some(None), met, Some(0)),
        ("the same, a while later", Some(Some(2)), met, Some(0)),
    ] {
        world.run(seconds(10));
        let sync_waits = waits.map(|it| SyncWaits {
            sessions: it.map_or(0, |_| 1),
            oldest: it.map(|it| DateTime::from_timestamp(it, 0).unwrap()),
        });
        let details = Details {
            synchronous_standby_names: Some("b".to_owned()),
            senders: Some(vec![sender("b")]),
            sync_waits,
            ..Details::default()
        };
        world.details("a", details);
        let view = world.view();
        assert_eq!(view.quorum, expected, "{case}");
        assert_eq!(view.sync_wait, waited.map(ms), "{case}");
        assert_eq!(view.sync_waiting, sync_waits.map(|it| it.sessions), "{case}");
    }
}

#[test]
fn a_group_shows_its_nodes_with_what_they_said() {
    let mut world = World::running();
    world.server("b").clock_ahead = -30_000;
    let sender = Sender {
        application_name: "b".to_owned(),
        client_address: None,
        state: "streaming".to_owned(),
        logical: false,
        flush_lsn: Some(1.into()),
        replay_lsn: Some(1.into()),
        write_lag: None,
        flush_lag: None,
        replay_lag: None,
        reply_age: None,
        sync_priority: 1,
        sync_state: "sync".to_owned(),
        pid: 7,
    };
    let slot = Slot {
        name: "b".to_owned(),
        logical: false,
        active: false,
        restart_lsn: Some(PgLsn::from(1 << 24)),
        wal_status: Some(WalStatus::Reserved),
        safe_wal_bytes: Some(20_000_000),
        inactive_for: None,
        xmin_age: Some(3),
    };
    let slots = Some(vec![slot]);
    for _ in 0..6 {
        world.run(seconds(10));
        world.details("a", Details { slots: slots.clone(), ..Details::default() });
    }
    world.details(
        "a",
        Details {
            synchronous_standby_names: Some("ANY 2 (b, c)".to_owned()),
            senders: Some(vec![sender]),
            slots,
            ..Details::default()
        },
    );
    let view = world.view();
    assert_eq!(view.quorum, Quorum::Missed(SyncCount { wanted: 2, present: 1 }));
    let rate = view.wal_bytes_per_second.unwrap();
    assert!((19_000.0..21_000.0).contains(&rate), "{rate}");
    assert!(view.wal_written_bytes.abs_diff(90 * 20_000) <= 40_000, "{}", view.wal_written_bytes);
    assert_eq!(view.system_identifier, Some(7));
    assert!(view.history > Some(ms(seconds(88))), "{:?}", view.history);

    let a = world.node("a");
    assert_eq!(a.lag, None, "a primary is not behind");
    let slot = &a.details.as_ref().unwrap().slots.as_ref().unwrap()[0];
    let Runway::Lasts(runway) = slot.runway else { panic!("{slot:?}") };
    assert!((950..1050).contains(&runway.as_secs()), "{runway:?}");
    assert_eq!(slot.retained_bytes, Some(world.primary().flush - 12 * COMMIT_BYTES - (1 << 24)));
    let b = world.node("b").state.unwrap();
    assert_eq!((b.role, b.timeline), (Role::Standby, Some(1)));
    assert!((b.clock.ahead_seconds + 30.0).abs() < 1e-9 && b.clock.error_seconds < 0.0021);
    let json = serde_json::to_string(&view).unwrap();
    assert_eq!(serde_json::from_str::<GroupView>(&json).unwrap(), view);

    // Details that are too old say nothing about now.
    world.run(seconds(61));
    assert_eq!((world.node("a").details, world.view().quorum), (None, Quorum::Unknown));
}

/// Patroni's key for it expires, and the server goes on.
#[test]
fn a_primary_that_left_the_topology_is_still_a_rival() {
    let mut world = World::running();
    let members = ["b", "c"].map(str::to_owned);
    let leave = |world: &mut World| world.group.set_members(&members, ms(world.now));
    leave(&mut world);
    world.run(seconds(3));
    assert_eq!(world.view().primary.as_deref(), Some("a"), "nobody else is one");
    world.promote("b", true);
    world.run(seconds(3));
    let names = || vec!["a".to_owned(), "b".to_owned()];
    assert_eq!(world.view().split_brain, SplitBrain::Confirmed(names()));
    assert_eq!((world.node("a").is_member, world.node("a").up), (false, Some(true)));
    // That goes on, however long, …
    for _ in 0..60 {
        world.run(seconds(10));
        leave(&mut world);
    }
    assert_eq!(world.view().split_brain, SplitBrain::Confirmed(names()));
    // … and is over soon after.
    world.server("a").answers = false;
    world.run(seconds(10));
    leave(&mut world);
    assert_eq!(world.view().split_brain, SplitBrain::No);
    assert_eq!(world.node("a").up, Some(false));
    world.run(seconds(300));
    leave(&mut world);
    assert_eq!(world.view().nodes.len(), 2);
}

#[test]
fn a_node_that_nobody_asks_any_more_does_not_answer() {
    let mut world = World::running();
    world.server("b").name = "b2";
    world.set_members();
    world.run(seconds(10));
    let NodeView { up, state, lag, .. } = world.node("b");
    let lag = lag.map(|lag| lag.state);
    assert_eq!((up, state, lag), (Some(false), None, Some(LagState::Unreachable)));
}

#[test]
fn a_node_that_left_before_it_was_asked_is_forgotten_at_once() {
    let mut world = World::running();
    let members = ["a", "b", "c", "d"].map(str::to_owned);
    world.group.set_members(&members, ms(world.now));
    assert_eq!(world.node("d").up, None);
    world.set_members();
    assert_eq!(world.view().nodes.len(), 3);
}

#[test]
fn a_refused_question_may_be_a_promotion_but_not_twice() {
    let mut world = World::running();
    let refused = || Report::Failed { at: ms(0), stage: Stage::Query };
    world.group.record("b", refused());
    assert_eq!(world.node("b").up, Some(true));
    world.group.record("b", refused());
    assert_eq!(world.node("b").up, Some(false));
    world.run(seconds(1));
    assert_eq!(world.node("b").up, Some(true));
    world.group.record("b", refused());
    assert_eq!(world.node("b").up, Some(true), "another time");
    // Who never answered anything else is not up.
    let mut world = World::new();
    world.group.record("b", refused());
    assert_eq!(world.node("b").up, Some(false));
}

#[test]
fn what_would_be_lost_is_not_known_before_each_was_asked_nor_for_sure_without_all() {
    let lost = |world: &World| match world.view().rpo {
        Rpo::Loss { lag, .. } => lag,
        other => panic!("{other:?}"),
    };
    let mut world = World::new();
    // The first to answer is the primary.
    while world.node("a").up.is_none() {
        world.run(STEP);
        assert_eq!(world.view().rpo, Rpo::Unknown);
    }
    while world.node("b").up.is_none() {
        assert_eq!(world.view().rpo, Rpo::Unknown);
        world.run(STEP);
    }
    world.run(seconds(10));
    assert!(lost(&world).lower.is_some());
    // The best one is silent, and goes on to receive.
    world.server("b").mode = Mode::ReceiverStopped;
    world.server("c").answers = false;
    world.run(seconds(20));
    let Lag { lower, estimate, upper } = lost(&world);
    assert_eq!(about(lost(&world)), Some(20));
    assert!(Some(Duration::from_secs(18)) < lower, "those that answer have no more: {lower:?}");
    assert!(lower <= estimate && estimate <= upper, "{lower:?} {estimate:?} {upper:?}");
    // One that answers, of which it cannot be told what it has, may have more.
    world.server("c").answers = true;
    world.server("c").started += 1;
    world.server("c").mode = Mode::NoReceiver;
    world.server("c").tells_timeline = false;
    world.run(seconds(2));
    assert_eq!(lost(&world).lower, None);
    world.server("c").tells_timeline = true;
    world.server("c").mode = Mode::Follows;
    world.server("c").answers = true;
    world.run(seconds(2));
    assert_eq!(lost(&world).lower, Some(Duration::ZERO));
    // A standby without a receiver, whose timeline is not known yet, is no proof of a loss.
    let mut world = World::of(&["a", "b"]);
    world.server("b").mode = Mode::NoReceiver;
    world.server("b").tells_timeline = false;
    world.run(seconds(3));
    assert_eq!(world.view().rpo, Rpo::Unknown);
}

/// It has moved on to the new timeline by the archive: no receiver says so.
#[test]
fn a_standby_that_follows_the_archive_is_on_its_new_timeline_at_once() {
    let mut world = World::running();
    world.server("c").mode = Mode::NoReceiver;
    world.run(seconds(2));
    world.server("a").answers = false;
    world.promote("b", true);
    world.run(seconds(5));
    let primary = world.primary().clone();
    let c = world.server("c");
    (c.timeline, c.flush, c.replay) = (2, primary.flush, primary.flush);
    world.run(seconds(1));
    assert!(matches!(world.lag("c").state, LagState::Ok | LagState::CaughtUp));

    // If it does not say so, it has not diverged; and if the old primary is the one that counts, it
    // has not caught up.
    for (tells, timeline, expected) in [
        (false, 2, LagState::Unknown),
        (true, 2, LagState::PrimaryUnknown),
        (true, 1, LagState::CaughtUp),
    ] {
        let mut world = World::running();
        world.writes = false;
        world.server("c").mode = Mode::NoReceiver;
        world.run(seconds(2));
        let c = world.server("c");
        (c.timeline, c.tells_timeline) = (timeline, tells);
        if timeline == 2 {
            (c.flush, c.replay) = (c.flush + 5000, c.replay + 5000);
        }
        for name in ["c", "a", "c"] {
            world.now += 400;
            let sample = world.server(name).clone().sample(world.now);
            world.group.record(name, Report::Sample(sample));
            assert_ne!(world.lag("c").state, LagState::Diverged);
        }
        assert_eq!(world.lag("c").state, expected, "it tells: {tells}, timeline {timeline}");
    }
}

/// Its replay is paused or its link is cut within a record that is not whole.
#[test]
fn a_record_that_may_be_partial_is_no_proof_of_a_lag() {
    for mode in [Mode::Paused, Mode::NoReceiver] {
        let mut world = World::running();
        world.writes = false;
        world.run(seconds(2));
        let committed = world.primary().flush;
        let page = committed.next_multiple_of(PAGE_BYTES);
        world.server("a").flush = page;
        let b = world.server("b");
        (b.flush, b.replay, b.mode, b.startup_waits) = (page, committed, Mode::Stuck, false);
        if mode == Mode::Paused {
            b.mode = Mode::StartupStopped;
        }
        // `World::check` knows that nothing is missing there.
        world.run(seconds(10));
        let LagView { state, replay, .. } = world.lag("b");
        assert_eq!((state, replay.lower), (LagState::Ok, Some(Duration::ZERO)), "{mode:?}");
        // Nor is it later, when nobody knows how far the primary is.
        world.server("a").answers = false;
        world.run(seconds(10));
        assert_eq!(world.lag("b").replay.lower, Some(Duration::ZERO), "{mode:?}");
    }
}

/// A group that follows a primary elsewhere: `a` is not one of its members.
#[test]
fn a_standby_cluster_is_measured_by_its_leader() {
    let members = ["b", "c", "d"].map(str::to_owned);
    let mut world = World::of(&["a", "b", "c", "d"]);
    world.group = Group::new(0, LIMITS);
    world.group.set_members(&members, ms(world.now));
    world.server("d").answers = false;
    world.run(seconds(5));
    let view = world.view();
    assert_eq!((view.primary, view.standby_leader), (None, None), "`d` may be the primary");
    assert_eq!(world.lag("c").state, LagState::PrimaryUnknown);
    world.server("d").answers = true;
    let sender = |name: &str| Sender { application_name: name.to_owned(), ..Sender::default() };
    let of_leader = Details { senders: Some(vec![sender("c"), sender("d")]), ..Details::default() };
    world.details("b", of_leader);
    world.run(seconds(5));
    world.server("c").mode = Mode::Paused;
    world.server("d").mode = Mode::ReceiverStopped;
    world.run(seconds(20));
    let view = world.view();
    assert_eq!((view.primary, view.standby_leader.as_deref()), (None, Some("b")));
    assert_eq!((view.rpo, view.quorum, view.primaries), (Rpo::Unknown, Quorum::Unknown, 0));
    let LagView { state, receive, receive_bytes, .. } = world.lag("b");
    assert_eq!((state, receive, receive_bytes), (LagState::CaughtUp, Lag::default(), None));
    let (c, d) = (world.lag("c"), world.lag("d"));
    assert_eq!((c.state, about(c.replay), about(c.receive)), (LagState::Ok, Some(20), Some(0)));
    assert_eq!((d.state, about(d.replay), about(d.receive)), (LagState::Ok, Some(20), Some(20)));
    assert_eq!((world.group.wants_seed(), world.group.saved()), (None, None));
    assert_eq!(world.changes, []);

    // Without its upstream it leads nobody.
    world.server("b").mode = Mode::NoReceiver;
    world.run(seconds(10));
    assert_eq!(world.view().standby_leader, None);
    assert_eq!(world.lag("c").state, LagState::PrimaryUnknown);
    world.server("b").mode = Mode::Follows;
    world.run(seconds(2));
    assert_eq!(world.view().standby_leader.as_deref(), Some("b"));

    // It is promoted: its WAL is measured as that of any primary.
    world.promote("b", true);
    world.run(seconds(3));
    let view = world.view();
    assert_eq!((view.primary.as_deref(), view.standby_leader), (Some("b"), None));
    assert_eq!(world.changes, [Change::BegunAnew]);
}

#[test]
fn who_is_ahead_of_a_standby_leader_takes_over() {
    let members = ["b", "c"].map(str::to_owned);
    let mut world = World::of(&["a", "b", "c"]);
    world.group = Group::new(0, LIMITS);
    world.group.set_members(&members, ms(world.now));
    world.run(seconds(5));
    let leader = |world: &World| world.view().standby_leader;
    let (first, other) = match leader(&world).as_deref() {
        Some("b") => ("b", "c"),
        Some("c") => ("c", "b"),
        other => panic!("{other:?}"),
    };
    world.run(seconds(20));
    assert_eq!(leader(&world).as_deref(), Some(first), "it stays");
    // It has lost the primary, though it does not look so.
    world.server(first).mode = Mode::ReceiverStopped;
    world.run(seconds(10));
    assert_eq!(leader(&world).as_deref(), Some(other));
    assert_eq!(world.lag(first).state, LagState::Ok);
    // The leader is gone.
    world.server(first).mode = Mode::Follows;
    world.run(seconds(5));
    world.server(other).answers = false;
    world.run(seconds(10));
    assert_eq!(leader(&world).as_deref(), Some(first));
}

/// What may happen next.
#[derive(Clone, Copy, Debug)]
enum Event {
    Time(u64),
    Mode(usize, Mode),
    Writes(bool),
    Bulk(u64),
    Answers(usize, bool),
    Promote(usize, bool),
    Restart { with_history: bool },
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    let mode = prop_oneof![
        3 => Just(Mode::Follows),
        1 => Just(Mode::Paused),
        1 => Just(Mode::StartupStopped),
        1 => Just(Mode::ReceiverStopped),
        1 => Just(Mode::NoReceiver),
    ];
    let event = prop_oneof![
        8 => (1..400_u64).prop_map(|steps| Event::Time(steps * STEP)),
        4 => (1..4_usize, mode).prop_map(|(index, mode)| Event::Mode(index, mode)),
        2 => any::<bool>().prop_map(Event::Writes),
        2 => (1..1_000_000_u64).prop_map(Event::Bulk),
        2 => (0..4_usize, any::<bool>()).prop_map(|(index, it)| Event::Answers(index, it)),
        1 => (1..4_usize, any::<bool>()).prop_map(|(index, told)| Event::Promote(index, told)),
        1 => any::<bool>().prop_map(|with_history| Event::Restart { with_history }),
    ];
    proptest::collection::vec(event, 1..40)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]
    /// [`World::check`] holds whatever happens.
    #[test]
    fn the_truth_is_within_the_bounds(events in events()) {
        let mut world = World::of(&["a", "b", "c", "d"]);
        world.all_answer = false;
        for event in events {
            match event {
                Event::Time(time) => world.run(time),
                Event::Mode(index, mode) => world.servers[index].mode = mode,
                Event::Writes(writes) => world.writes = writes,
                Event::Bulk(bytes) => world.write(bytes),
                Event::Answers(index, answers) => world.servers[index].answers = answers,
                Event::Promote(index, fork_is_told) => {
                    let Server { name, is_primary, .. } = world.servers[index];
                    if !is_primary {
                        world.promote(name, fork_is_told);
                    }
                }
                Event::Restart { with_history } => {
                    let saved = world.group.saved().filter(|_| with_history);
                    world.group = Group::new(0, LIMITS);
                    world.set_members();
                    if let Some(saved) = saved {
                        prop_assert!(world.group.restore(saved));
                    }
                }
            }
        }
        let entries = world.group.saved().map_or(0, |saved| saved.entries.len());
        prop_assert!(entries < 1500, "{entries} entries");
    }
}
