//! What the monitor makes of a course of answers.

use std::collections::BTreeMap;
use std::time::Duration;

use chrono::DateTime;
use tokio_postgres::types::PgLsn;

use crate::check::Status;
use crate::component::{Component, Kind};
use crate::facts::{Failure, Stage};
use crate::failover::Failover;
use crate::journal::{Event, What};
use crate::monitor::Monitor;
use crate::probe::haproxy::{HaproxyFacts, Server};
use crate::probe::postgres::{PostgresFacts, Receiver, Sender, Slot, StandardFacts};
use crate::settle::Now;
use crate::thresholds::Thresholds;

/// What a server of group 0 is made to say.
#[derive(Clone, Debug)]
enum Says {
    Primary { timeline: u32, lsn: u64 },
    Standby { timeline: u32, lsn: u64 },
    Refused,
}
use Says::{Primary, Refused, Standby};

/// A group of servers that is asked each second.
struct Scene {
    monitor: Monitor,
    second: u64,
    says: BTreeMap<&'static str, Says>,
    lost_slot: bool,
    events: Vec<Event>,
}

impl Scene {
    /// Server `a` is the primary, `b` its standby; five seconds have passed.
    fn pair() -> Self {
        let monitor = Monitor::new("demo", Thresholds::default(), Duration::ZERO);
        monitor.state().expect(&[Kind::Postgres], ["a", "b"].map(server));
        let says = BTreeMap::from([
            ("a", Primary { timeline: 1, lsn: 1000 }),
            ("b", Standby { timeline: 1, lsn: 1000 }),
        ]);
        let mut scene = Self { monitor, second: 100, says, lost_slot: false, events: vec![] };
        scene.pass(5);
        scene
    }

    fn now(&self) -> Now {
        let wall = DateTime::from_timestamp(i64::try_from(self.second).unwrap(), 0).unwrap();
        Now { boot: Duration::from_secs(self.second), wall }
    }

    /// A primary that writes has more each second.
    fn pass(&mut self, seconds: u64) -> &mut Self {
        for _ in 0..seconds {
            self.second += 1;
            let now = self.now().boot;
            for (name, says) in &self.says {
                let outcome = match *says {
                    Primary { timeline, lsn } => Ok(self.facts(false, timeline, lsn + self.second)),
                    Standby { timeline, lsn } => Ok(self.facts(true, timeline, lsn + self.second)),
                    Refused => {
                        let error = "connection refused".to_owned();
                        Err(Failure { stage: Stage::Dial, error })
                    }
                };
                let component = server(name);
                self.monitor.record(|it| &mut it.postgres, &component, (now, now), outcome);
            }
            self.events.extend(self.monitor.decide(self.now()));
        }
        self
    }

    fn says(&mut self, name: &'static str, says: Says) -> &mut Self {
        self.says.insert(name, says);
        self
    }

    fn facts(&self, in_recovery: bool, timeline: u32, lsn: u64) -> PostgresFacts {
        let now = self.now();
        let application_name = "b".to_owned();
        let [state, sync_state] = ["streaming", "async"].map(str::to_owned);
        let sender = Sender { application_name, state, sync_state };
        let slot = Slot {
            name: "gone".to_owned(),
            active: false,
            retained_bytes: None,
            wal_status: Some("lost".to_owned()),
            safe_bytes: None,
        };
        let standard = StandardFacts {
            senders: if in_recovery { vec![] } else { vec![sender] },
            slots: if self.lost_slot { vec![slot] } else { vec![] },
            ..StandardFacts::default()
        };
        let lsn = PgLsn::from(lsn);
        let receiver = Receiver {
            status: "streaming".to_owned(),
            silent_for: Some(Duration::ZERO),
            lsn: Some(lsn),
        };
        PostgresFacts {
            server_version: 170_000,
            system_identifier: 7,
            has_monitor: true,
            in_recovery,
            timeline,
            lsn: Some(lsn),
            at: now.boot,
            receiver: in_recovery.then_some(receiver),
            should_stream: in_recovery,
            started_at: DateTime::UNIX_EPOCH,
            connections: (5, 97),
            standard: Some((now.boot, standard)),
            ..PostgresFacts::default()
        }
    }

    fn status(&self, component: &Component, check: &str) -> Option<Status> {
        let state = self.monitor.state();
        state.checks.get(component)?.get(check).map(|it| it.status)
    }

    fn cluster(&self) -> Status {
        self.monitor.state().verdicts.cluster.status
    }

    fn failovers(&self) -> Vec<Failover> {
        let failover = |event: &Event| match &event.what {
            What::Failover(it) => Some(it.clone()),
            _ => None,
        };
        self.events.iter().filter_map(failover).collect()
    }
}

fn server(name: &str) -> Component {
    Component::of_group(Kind::Postgres, 0, name)
}

#[test]
fn all_is_well_and_nothing_is_said() {
    let mut scene = Scene::pair();
    scene.pass(300);
    assert_eq!(scene.cluster(), Status::Ok, "{:?}", scene.monitor.state().verdicts.cluster);
    assert!(scene.events.is_empty(), "{:?}", scene.events);
}

#[test]
fn what_was_not_asked_yet_is_not_well() {
    let mut scene = Scene::pair();
    assert_eq!(scene.cluster(), Status::Ok);
    scene.monitor.state().expect(&[Kind::Postgres], ["a", "b", "c"].map(server));
    scene.pass(1);
    assert_eq!(scene.cluster(), Status::Unknown);
    let reason = scene.monitor.state().verdicts.cluster.reason.clone();
    assert_eq!(reason, "1 of 3 components were not asked yet, such as postgres c of group 0");
    scene.says.remove("a");
    scene.monitor.state().expect(&[Kind::Postgres], ["b", "c"].map(server));
    scene.pass(5);
    let primary = scene.status(&Component::group(0), "primary");
    assert_eq!(primary, None, "c may be it");
    let fresh = Monitor::new("demo", Thresholds::default(), Duration::ZERO);
    assert_eq!(fresh.state().verdicts.cluster.status, Status::Unknown);
}

#[test]
fn one_lost_answer_is_no_outage() {
    let mut scene = Scene::pair();
    scene.says("a", Refused).pass(1).says("a", Primary { timeline: 1, lsn: 1000 }).pass(10);
    assert!(scene.events.is_empty(), "{:?}", scene.events);
}

#[test]
fn a_lost_primary_is_critical_until_another_takes_over() {
    let mut scene = Scene::pair();
    scene.says("a", Refused).pass(2);
    assert_eq!(scene.status(&server("a"), "reachable"), Some(Status::Critical));
    assert_eq!(scene.status(&Component::group(0), "primary"), Some(Status::Critical));
    assert_eq!(scene.cluster(), Status::Critical);
    assert_eq!(scene.failovers(), []);
    // Its last answer was at 105, the first failure at 106; the new one answers as a standby at 115 and as
    // a primary at 116.
    scene.pass(8).says("b", Primary { timeline: 2, lsn: 1000 }).pass(10);
    assert_eq!(scene.status(&Component::group(0), "primary"), Some(Status::Ok));
    // What is left is a part that another stands in for; but no standby is left.
    assert_eq!(scene.status(&server("a"), "reachable"), Some(Status::Critical));
    let failovers = scene.failovers();
    let [failover] = &failovers[..] else { panic!("{failovers:?}") };
    assert_eq!((failover.old.name.as_str(), failover.new.name.as_str()), ("a", "b"));
    assert!((failover.unavailable_at_most_seconds - 11.0).abs() < 0.01, "{failover:?}");
    assert!((failover.unavailable_at_least_seconds - 9.0).abs() < 0.01, "{failover:?}");
}

#[test]
fn a_connection_that_ends_says_to_the_moment_when_it_was_over() {
    let mut scene = Scene::pair();
    let searched = |scene: &Scene| scene.monitor.state().primaries.leaderless(scene.now());
    let end = Duration::from_millis(105_400);
    scene.monitor.lost(|it| &mut it.postgres, &server("a"), end);
    assert!(searched(&scene).is_empty());
    scene.says("a", Refused).pass(1);
    assert_eq!(searched(&scene), [0].into());
    scene.pass(9).says("b", Primary { timeline: 2, lsn: 1000 }).pass(10);
    assert!(searched(&scene).is_empty());
    let failovers = scene.failovers();
    let [failover] = &failovers[..] else { panic!("{failovers:?}") };
    assert!((failover.unavailable_at_most_seconds - 10.6).abs() < 0.01, "{failover:?}");
    assert!((failover.unavailable_at_least_seconds - 9.6).abs() < 0.01, "{failover:?}");

    // Nobody is searched for for ever.
    scene.says("b", Refused).pass(1);
    assert_eq!(searched(&scene), [0].into());
    scene.pass(120);
    assert!(searched(&scene).is_empty());
}

#[test]
fn what_nobody_asks_any_more_is_not_known() {
    let mut scene = Scene::pair();
    scene.monitor.state().ages.each = Duration::from_secs(5);
    let wait = |scene: &mut Scene, seconds| {
        for _ in 0..seconds {
            scene.second += 1;
            scene.monitor.decide(scene.now());
        }
    };
    wait(&mut scene, 5);
    assert_eq!(scene.cluster(), Status::Ok);
    wait(&mut scene, 2);
    for (component, check) in [(server("a"), "reachable"), (Component::group(0), "primary")] {
        assert_eq!(scene.status(&component, check), Some(Status::Unknown), "{component} {check}");
    }
    assert_eq!(scene.status(&Component::cluster(), "isolation"), Some(Status::Ok));
    assert_eq!(scene.cluster(), Status::Unknown);
    assert!(scene.failovers().is_empty());
    scene.pass(3);
    assert_eq!(scene.cluster(), Status::Ok, "{:?}", scene.monitor.state().verdicts.cluster);
}

#[test]
fn a_port_for_reads_without_a_server_follows_from_the_standby_that_is_lost() {
    let mut scene = Scene::pair();
    let proxy = Component::of_group(Kind::Haproxy, 0, "proxy");
    let down = || {
        let (name, state) = ("b".to_owned(), "DOWN".to_owned());
        let read = Some(vec![Server { name, is_up: false, state }]);
        Ok(HaproxyFacts { write: None, read })
    };
    let times = (Duration::from_secs(100), Duration::from_secs(100));
    scene.monitor.record(|it| &mut it.haproxy, &proxy, times, down());
    scene.pass(1);
    assert_eq!(scene.status(&proxy, "read"), Some(Status::Critical), "its standby is well");
    scene.says("b", Refused);
    for _ in 0..5 {
        scene.pass(1);
        let now = scene.now().boot;
        scene.monitor.record(|it| &mut it.haproxy, &proxy, (now, now), down());
    }
    assert_eq!(scene.status(&proxy, "read"), Some(Status::Warning));
    let state = scene.monitor.state();
    let reading = &state.checks[&proxy]["read"].reading;
    assert!(reading.follows && reading.reason.starts_with("group 0 lacks a standby: "));
}

#[test]
fn an_old_primary_that_comes_back_is_a_split_brain_and_no_failover() {
    let mut scene = Scene::pair();
    scene.says("b", Primary { timeline: 2, lsn: 1000 }).pass(4);
    assert_eq!(scene.status(&Component::group(0), "split_brain"), Some(Status::Critical));
    assert_eq!(scene.cluster(), Status::Critical);
    let reason =
        scene.monitor.state().checks[&Component::group(0)]["split_brain"].reading.reason.clone();
    assert!(reason.starts_with("confirmed: these go on to write: a (timeline 1, "), "{reason}");
    assert_eq!(scene.failovers().len(), 1);
    scene.says("a", Standby { timeline: 2, lsn: 1000 }).pass(10);
    assert_eq!(scene.status(&Component::group(0), "split_brain"), Some(Status::Ok));
    assert_eq!(scene.failovers().len(), 1);
}

#[test]
fn a_monitor_that_is_cut_off_says_that_and_not_that_all_is_down() {
    let mut scene = Scene::pair();
    scene.says("a", Refused).says("b", Refused).pass(5);
    assert_eq!(scene.status(&Component::cluster(), "isolation"), Some(Status::Critical));
    assert_eq!(scene.status(&server("a"), "reachable"), Some(Status::Unknown));
    assert_eq!(scene.status(&Component::group(0), "primary"), Some(Status::Unknown));
    assert_eq!(scene.cluster(), Status::Critical);
    assert!(scene.monitor.state().verdicts.cluster.reason.contains("0 of 2"));
}

#[test]
fn what_was_wrong_with_a_server_that_is_silent_has_not_ended() {
    let mut scene = Scene::pair();
    scene.lost_slot = true;
    scene.pass(20);
    assert_eq!(scene.status(&server("a"), "slots"), Some(Status::Critical));
    scene.says("a", Refused).pass(20);
    assert_eq!(scene.status(&server("a"), "slots"), Some(Status::Critical));
    let ended =
        |event: &&Event| matches!(event.what, What::Changed { check: "slots", to: Status::Ok, .. });
    assert_eq!(scene.events.iter().filter(ended).count(), 0);
}

#[test]
fn a_group_without_a_standby_that_streams_is_told() {
    let mut scene = Scene::pair();
    scene.says("b", Refused).pass(5);
    assert_eq!(scene.status(&server("b"), "reachable"), Some(Status::Critical));
    assert_eq!(scene.cluster(), Status::Warning, "the group goes on without a standby");
}
