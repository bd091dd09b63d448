//! What the monitor makes of a course of answers.

use std::collections::BTreeMap;
use std::time::Duration;

use chrono::DateTime;
use tokio_postgres::types::PgLsn;

use crate::check::{Level, Status};
use crate::component::{Component, Kind};
use crate::facts::{Failure, Membership, Stage};
use crate::failover::Failover;
use crate::journal::{Event, What};
use crate::monitor::Monitor;
use crate::probe::haproxy::{HaproxyFacts, Server};
use crate::probe::pgbouncer::{PgbouncerFacts, Pool};
use crate::probe::postgres::{PostgresFacts, Receiver, Sender, Slot, StandardFacts};
use crate::settle::Now;
use crate::thresholds::Thresholds;
use crate::verdict::stands_in;

/// What a server of group 0 is made to say.
#[derive(Clone, Debug)]
enum Says {
    Primary { timeline: u32, lsn: u64 },
    Standby { timeline: u32, lsn: u64 },
    Refused,
    WrongPassword,
}
use Says::{Primary, Refused, Standby, WrongPassword};

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
                    WrongPassword => {
                        let error = "password authentication failed".to_owned();
                        Err(Failure { stage: Stage::Login, error })
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

fn membership(unknown: Option<&str>) -> Membership {
    Membership { unknown: unknown.map(str::to_owned), ..Membership::default() }
}

#[test]
fn members_that_nobody_knows_are_not_well() {
    let monitor = Monitor::new("demo", Thresholds::default(), Duration::ZERO);
    let proxy = Component::of_group(Kind::Haproxy, 0, "proxy");
    monitor.state().expect(&[Kind::Haproxy], [proxy.clone()]);
    let says = BTreeMap::new();
    let mut scene = Scene { monitor, second: 100, says, lost_slot: false, events: vec![] };
    let times = (Duration::from_secs(100), Duration::from_secs(100));
    let well = Ok(HaproxyFacts { write: None, read: None });
    scene.monitor.record(|it| &mut it.haproxy, &proxy, times, well);
    let early = Membership { is_early: true, ..membership(Some("nobody says who they are")) };
    scene.monitor.state().facts.membership = Some(early);
    scene.pass(1);
    assert!(scene.events.is_empty(), "{:?}", scene.events);
    assert_eq!(scene.cluster(), Status::Unknown);
    assert!(!scene.monitor.state().is_asked_at(Level::Basic));

    scene.monitor.state().facts.membership = Some(membership(Some("nobody says who they are")));
    scene.pass(5);
    assert_eq!(scene.status(&Component::cluster(), "members"), Some(Status::Unknown));
    assert_eq!(scene.monitor.not_ready().as_deref(), Some("nobody says who they are"));
    assert!(scene.monitor.state().is_asked_at(Level::Basic), "there is nobody else to ask");
    assert_eq!(scene.cluster(), Status::Unknown);
    assert_eq!(scene.monitor.state().verdicts.groups[&0].status, Status::Unknown);

    scene.monitor.state().facts.membership = Some(membership(None));
    scene.pass(5);
    assert_eq!(scene.status(&Component::cluster(), "members"), Some(Status::Ok));
    assert_eq!((scene.cluster(), scene.monitor.not_ready()), (Status::Ok, None));
}

#[test]
fn a_group_of_which_nobody_is_there_has_no_primary() {
    let mut scene = Scene::pair();
    let empty_groups = [1].into();
    let membership = Membership { empty_groups, ..membership(None) };
    scene.monitor.state().facts.membership = Some(membership);
    scene.pass(1);
    assert_eq!(scene.status(&Component::group(1), "primary"), Some(Status::Critical));
    assert_eq!(scene.status(&Component::group(0), "primary"), Some(Status::Ok));
    assert_eq!(scene.cluster(), Status::Critical);
}

#[test]
fn who_is_not_listed_any_more_is_missed_until_forgotten() {
    let mut scene = Scene::pair();
    let membership = Membership { left: [server("b")].into(), ..membership(None) };
    scene.monitor.state().facts.membership = Some(membership);
    scene.pass(5);
    assert_eq!(scene.status(&server("b"), "reachable"), Some(Status::Ok), "it answers");
    scene.says("b", Refused).pass(600);
    assert_eq!(scene.status(&server("b"), "reachable"), Some(Status::Critical));
    let reading = scene.monitor.state().checks[&server("b")]["reachable"].reading.clone();
    assert_eq!(reading.reason, "connection refused; Patroni does not list it any more");
    assert!(reading.next_step().ends_with("health-monitor forget b"), "{reading:?}");
}

#[test]
fn the_old_primary_that_goes_on_alone_is_the_primary() {
    let mut scene = Scene::pair();
    scene.says("b", Primary { timeline: 2, lsn: 1000 }).pass(5);
    let names = |scene: &Scene| scene.monitor.state().primaries.names()[&0].clone();
    assert_eq!(names(&scene), "b");
    let failovers = scene.failovers();
    assert!(failovers[0].both_wrote && failovers[0].lost_bytes_at_most.is_none());
    assert!(failovers[0].unavailable_at_most_seconds < 0.01, "{failovers:?}");
    // One lost answer of the other says nothing yet.
    scene.says("b", Refused).pass(2);
    assert_eq!(names(&scene), "b");
    scene.pass(5);
    assert_eq!(names(&scene), "a");
    let failovers = scene.failovers();
    let [_, back] = &failovers[..] else { panic!("{failovers:?}") };
    assert_eq!((back.old.name.as_str(), back.new.name.as_str()), ("b", "a"));
    assert!(back.both_wrote && back.lost_bytes_at_most.is_none(), "{back:?}");
    // What is wrong with it is wrong with the group.
    scene.lost_slot = true;
    scene.pass(5);
    let state = scene.monitor.state();
    let slots = &state.verdicts.components[&server("a")];
    assert_eq!(
        (slots.status, state.verdicts.groups[&0].status),
        (Status::Critical, Status::Critical)
    );
    assert!(!stands_in(&server("a"), &state.verdicts.components, &state.primaries.names()));
}

#[test]
fn who_does_not_let_this_monitor_in_may_be_the_primary() {
    for other in [WrongPassword, Refused] {
        let mut scene = Scene::pair();
        scene.says("a", WrongPassword).says("b", other.clone()).pass(20);
        let state = scene.monitor.state();
        for check in ["primary", "redundancy"] {
            let reading = &state.checks[&Component::group(0)][check].reading;
            assert_eq!((reading.status, reading.follows), (Status::Unknown, true), "{reading:?}");
        }
        let reachable = &state.checks[&server("a")]["reachable"];
        assert_eq!(reachable.status, Status::Critical);
        assert_eq!(state.verdicts.cluster.status, Status::Critical, "{other:?}");
    }
}

#[test]
fn who_waits_for_a_primary_that_is_lost_follows_and_for_one_that_may_be_there_does_not() {
    for (says, expected) in [
        (Refused, (Status::Warning, true)),
        (WrongPassword, (Status::Critical, false)),
        (Primary { timeline: 1, lsn: 1000 }, (Status::Critical, false)),
    ] {
        let mut scene = Scene::pair();
        scene.says("a", says.clone()).pass(5);
        let proxy = Component::of_group(Kind::Pgbouncer, 0, "proxy");
        let pool = Pool {
            database: "app".to_owned(),
            user: "app".to_owned(),
            waiting: 3,
            max_wait: Duration::from_secs(40),
            is_by_session: false,
        };
        let version = "1.24.1".to_owned();
        let facts = PgbouncerFacts { version, clients: (3, 100), pools: vec![pool], query: None };
        let now = scene.now().boot;
        scene.monitor.record(|it| &mut it.pgbouncer, &proxy, (now, now), Ok(facts));
        scene.pass(1);
        let reading = scene.monitor.state().checks[&proxy]["waiting"].reading.clone();
        assert_eq!((reading.status, reading.follows), expected, "{says:?} {reading:?}");
    }
}

#[test]
fn what_flapped_and_is_well_does_not_say_what_it_was() {
    let mut scene = Scene::pair();
    for _ in 0..4 {
        scene.says("a", Standby { timeline: 1, lsn: 1000 }).pass(5);
        scene.says("a", Primary { timeline: 1, lsn: 1000 }).pass(5);
    }
    let state = scene.monitor.state();
    let primary = &state.checks[&Component::group(0)]["primary"];
    assert!(primary.is_flapping);
    assert_eq!((primary.status, primary.worst), (Status::Warning, Status::Critical));
    let words = "it comes and goes: 6 changes in 10 min, well just now; last: ";
    assert!(primary.reading.reason.starts_with(words));
    assert!(!primary.reading.next_step().contains("promote"), "{:?}", primary.reading);
    assert_eq!(state.verdicts.cluster.status, Status::Warning);
}
