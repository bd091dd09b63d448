//! Scenes as the page shows them.

use std::time::Duration;

use chrono::DateTime;
use serde_json::json;
use tokio_postgres::types::PgLsn;

use super::*;
use crate::component::{Component, Kind};
use crate::facts::{Failure, Stage};
use crate::notify::board::Telling;
use crate::probe::agent::AgentFacts;
use crate::probe::disk::DiskFacts;
use crate::probe::etcd::EtcdFacts;
use crate::probe::haproxy::{HaproxyFacts, Server};
use crate::probe::pgbouncer::PgbouncerFacts;
use crate::probe::postgres::{PostgresFacts, Receiver, Sender, StandardFacts};
use crate::probe::redis::RedisFacts;
use crate::silence::Silence;
use crate::thresholds::Thresholds;

/// What a server says.
#[derive(Clone, Copy, PartialEq)]
enum Says {
    Primary { timeline: u32 },
    Standby { timeline: u32, behind: u64 },
    Nothing,
}
use Says::{Nothing, Primary, Standby};

const IN_STEP: Says = Standby { timeline: 3, behind: 4096 };

/// A cluster that is asked every half minute.
struct Scene {
    monitor: Monitor,
    second: u64,
    servers: Vec<(Component, Says)>,
    others: Vec<Component>,
    /// None of the others answers.
    is_cut_off: bool,
}

impl Scene {
    /// So many groups, each with a primary and standbys, and one or two of everything else.
    fn of(groups: u32, standbys: u32) -> Self {
        let names = |group: u32| match group {
            0 => "coordinator".to_owned(),
            _ => format!("worker-{group}"),
        };
        let server = |(group, number): (u32, u32)| {
            let name = format!("{}-{number}", names(group));
            let says = if number == 1 { Primary { timeline: 3 } } else { IN_STEP };
            (Component::of_group(Kind::Postgres, group, name), says)
        };
        let numbers = (0..groups).flat_map(|group| (1..=standbys + 1).map(move |it| (group, it)));
        let servers: Vec<_> = numbers.map(server).collect();
        let one = |kind, name: &str| Component::new(kind, name);
        let others = vec![
            one(Kind::Etcd, "etcd-1"),
            one(Kind::Etcd, "etcd-2"),
            one(Kind::Etcd, "etcd-3"),
            Component::of_group(Kind::Pgbouncer, 0, "pgbouncer-1"),
            Component::of_group(Kind::Pgbouncer, 0, "pgbouncer-2"),
            Component::of_group(Kind::Haproxy, 0, "haproxy-1"),
            one(Kind::Redis, "cache"),
            one(Kind::Agent, "repository-agent"),
            one(Kind::Agent, "lag-exporter"),
            one(Kind::Disk, "/var/lib"),
        ];
        let monitor = Monitor::new("demo", Thresholds::default(), Duration::ZERO);
        let kinds: Vec<_> = others.iter().map(|it| it.kind).collect();
        monitor.state().expect(&kinds, others.clone());
        monitor.state().expect(&[Kind::Postgres], servers.iter().map(|(it, _)| it.clone()));
        Self { monitor, second: 1_772_452_800, servers, others, is_cut_off: false }
    }

    fn now(&self) -> Now {
        let wall = DateTime::from_timestamp(i64::try_from(self.second).unwrap(), 0).unwrap();
        Now { boot: Duration::from_secs(self.second), wall }
    }

    fn pass(&mut self, seconds: u64, every: usize) -> &mut Self {
        for _ in (0..seconds).step_by(every) {
            self.second += every as u64;
            self.ask();
            self.monitor.decide(self.now());
        }
        self
    }

    fn ask(&self) {
        let now = self.now().boot;
        let times = (now, now);
        let failure = || Failure { stage: Stage::Dial, error: "connection refused".to_owned() };
        for (component, says) in &self.servers {
            let outcome = if *says == Nothing { Err(failure()) } else { Ok(self.server(*says)) };
            self.monitor.record(|it| &mut it.postgres, component, times, outcome);
        }
        for (number, it) in self.others.iter().enumerate() {
            fn said<T>(is_cut_off: bool, facts: T, failure: Failure) -> Result<T, Failure> {
                if is_cut_off { Err(failure) } else { Ok(facts) }
            }
            let cut = self.is_cut_off;
            match it.kind {
                Kind::Etcd => {
                    let member_id = number as u64;
                    let facts = EtcdFacts { member_id, ..etcd() };
                    self.monitor.record(|it| &mut it.etcd, it, times, said(cut, facts, failure()));
                }
                Kind::Pgbouncer => {
                    let (version, clients) = ("1.24.1".to_owned(), (412, 10_000));
                    let facts = PgbouncerFacts { version, clients, pools: vec![], query: None };
                    let facts = said(cut, facts, failure());
                    self.monitor.record(|it| &mut it.pgbouncer, it, times, facts);
                }
                Kind::Haproxy => {
                    let facts = said(cut, haproxy(), failure());
                    self.monitor.record(|it| &mut it.haproxy, it, times, facts);
                }
                Kind::Redis => {
                    let role = "master".to_owned();
                    let memory = (80 << 20, 1 << 30);
                    let facts = RedisFacts { role, memory, ..RedisFacts::default() };
                    self.monitor.record(|it| &mut it.redis, it, times, said(cut, facts, failure()));
                }
                Kind::Agent => {
                    let status = if it.name == "repository-agent" { backups() } else { json!({}) };
                    let facts = AgentFacts { not_ready: vec![], status };
                    let facts = said(cut, facts, failure());
                    self.monitor.record(|it| &mut it.agents, it, times, facts);
                }
                _ => {
                    let facts = DiskFacts {
                        free_bytes: 70 << 30,
                        bytes: 100 << 30,
                        free_inodes: 9,
                        inodes: 9,
                    };
                    self.monitor.record(|it| &mut it.disks, it, times, Ok(facts));
                }
            }
        }
    }

    fn server(&self, says: Says) -> PostgresFacts {
        let (in_recovery, timeline, behind) = match says {
            Standby { timeline, behind } => (true, timeline, behind),
            Primary { timeline } => (false, timeline, 0),
            Nothing => unreachable!(),
        };
        let [application_name, state, sync_state] = ["b", "streaming", "async"].map(str::to_owned);
        let senders = vec![Sender { application_name, state, sync_state }; 4];
        let now = self.now();
        PostgresFacts {
            server_version: 170_000,
            system_identifier: 7,
            has_monitor: true,
            in_recovery,
            timeline,
            lsn: Some(PgLsn::from((self.second << 8) - behind)),
            at: now.boot,
            receiver: in_recovery.then(|| Receiver {
                status: "streaming".to_owned(),
                silent_for: Some(Duration::ZERO),
                lsn: None,
            }),
            should_stream: in_recovery,
            started_at: DateTime::UNIX_EPOCH,
            connections: (34, 97),
            standard: Some((now.boot, StandardFacts { senders, ..StandardFacts::default() })),
            ..PostgresFacts::default()
        }
    }

    fn says(&mut self, name: &str, says: Says) -> &mut Self {
        let server = self.servers.iter_mut().find(|(it, _)| it.name == name);
        server.unwrap().1 = says;
        self
    }

    fn page(&self) -> String {
        render(&self.monitor, &Telling::default(), self.now())
    }

    /// An hour in which all was well but for a minute.
    fn after_an_hour(groups: u32, standbys: u32) -> Self {
        let mut scene = Self::of(groups, standbys);
        scene.pass(1800, 30);
        let name = scene.servers[1].0.name.clone();
        scene.says(&name, Nothing).pass(90, 30);
        scene.says(&name, IN_STEP).pass(1800, 30);
        scene
    }
}

fn etcd() -> EtcdFacts {
    EtcdFacts {
        member_id: 0,
        leader_id: Some(1),
        is_learner: false,
        raft_term: 4,
        version: "3.5.16".to_owned(),
        db_bytes: 12 << 20,
        quota_bytes: None,
        alarms: vec![],
        voters: [(0, "a".to_owned()), (1, "b".to_owned()), (2, "c".to_owned())].into(),
    }
}

fn haproxy() -> HaproxyFacts {
    let server =
        |name: &str, is_up| Server { name: name.to_owned(), is_up, state: "UP".to_owned() };
    HaproxyFacts {
        write: Some(vec![server("coordinator-1", true), server("coordinator-2", false)]),
        read: Some(vec![server("coordinator-2", true), server("coordinator-3", true)]),
    }
}

fn backups() -> serde_json::Value {
    let repository = json!({
        "newest_at": "2026-03-02T02:00:31Z", "reachable_from": "2026-02-16T02:00:29Z",
        "reachable_until": "2026-03-02T12:59:58Z", "needs_backup": false, "gap_seen": false,
    });
    let group = json!({ "state": { "repository": repository }, "wal": { "failure": null } });
    let last_error = "upload part 12 of base/20260302T020000Z: connection reset";
    let failed = json!({ "state": { "repository": repository, "last_error": last_error } });
    json!({ "groups": { "0": group, "1": group, "2": failed } })
}

#[test]
fn all_is_well_in_one_look() {
    let page = Scene::after_an_hour(3, 2).page();
    for text in [
        "<title>OK · demo</title>",
        "All is well: 9 servers in 3 groups, 10 other components",
        "the last hour: warning 2 min, ok 58 min",
        "as of 2026-03-02 13:01:30 UTC",
        "coordinator-1 takes writes · 2 standbys, lag up to 4.0 KiB",
        "follower, database of 12.0 MiB",
        "writes go to coordinator-1, reads go to 2 servers",
        "<td>2026-02-16 02:00:29 to 2026-03-02 12:59:58",
        "the last run failed: upload part 12",
        "<noscript><meta http-equiv=\"refresh\" content=\"10\"></noscript>",
    ] {
        assert!(page.contains(text), "no {text:?} in\n{page}");
    }
    assert!(!page.contains("What is wrong"), "{page}");
}

#[test]
fn what_is_wrong_stands_on_top_with_the_next_step() {
    let mut scene = Scene::after_an_hour(3, 2);
    let page = scene.says("worker-1-1", Nothing).pass(30, 1).page();
    for text in [
        "<title>CRITICAL · demo</title>",
        "none that answers takes writes; no answer from worker-1-1",
        "since 13:01:32 (28 s ago)",
        "<b>Next step:</b> see `patronictl list`",
        "no primary seen · 2 standbys · 1 without an answer",
        "what is wrong".to_uppercase().as_str(),
    ] {
        assert!(page.to_uppercase().contains(&text.to_uppercase()), "no {text:?} in\n{page}");
    }
    let place = |text: &str| page.find(text).unwrap();
    assert!(place("What is wrong") < place("<h2 id=\"h-groups\""));

    scene.says("worker-1-3", Primary { timeline: 4 });
    let page = scene.says("worker-1-2", Standby { timeline: 4, behind: 0 }).pass(60, 1).page();
    let failover = "failover: worker-1-3 takes writes in place of worker-1-1 (timeline 3 to 4)";
    assert!(page.contains(failover), "{page}");
    assert!(page.contains("<title>WARNING · demo</title>"), "{page}");
}

#[test]
fn what_others_stand_in_for_is_a_warning_beside_what_is_critical() {
    let mut scene = Scene::after_an_hour(1, 2);
    scene.says("coordinator-2", Nothing).says("coordinator-1", Nothing);
    let page = scene.pass(30, 1).page();
    let (_, wrong) = page.split_once("What is wrong").unwrap();
    let (wrong, _) = wrong.split_once("</section>").unwrap();
    let of = |name: &str| {
        let (before, _) = wrong.split_once(&format!("<b>postgres {name} ")).unwrap();
        before.rsplit_once("<li class=\"").unwrap().1.split_once('"').unwrap().0.to_owned()
    };
    assert_eq!([of("coordinator-1"), of("coordinator-2")], ["critical", "warning"], "{wrong}");
}

#[test]
fn a_monitor_that_reaches_nobody_says_only_that() {
    let mut scene = Scene::after_an_hour(2, 1);
    scene.is_cut_off = true;
    scene.servers.iter_mut().for_each(|it| it.1 = Nothing);
    scene.others.retain(|it| it.kind != Kind::Disk);
    let page = scene.pass(60, 2).page();
    assert_eq!(page.matches("<b>Next step:</b>").count(), 2, "{page}");
    assert!(page.contains("look at the network of the host that this monitor runs on"), "{page}");
    assert!(page.contains("more that may all follow from this"), "{page}");
}

#[test]
fn what_is_not_known_is_never_well() {
    let page = Scene::of(1, 1).page();
    assert!(page.contains("<title>UNKNOWN · demo</title>"), "{page}");
    assert!(page.contains("12 of 12 components were not asked yet"), "{page}");

    let mut scene = Scene::after_an_hour(1, 1);
    assert!(!scene.page().contains("class=\"late\""));
    scene.second += 3600;
    let page = scene.page();
    assert!(page.contains("Nothing was judged since 13:01:30 (1 h ago)"), "{page}");
}

#[test]
fn many_groups_are_closed_but_those_that_are_not_well_which_come_first() {
    let mut scene = Scene::after_an_hour(65, 4);
    let page = scene.says("worker-40-1", Nothing).pass(60, 5).page();
    assert_eq!(page.matches("<details class=\"group").count(), 65);
    assert_eq!(page.matches("\" open>").count(), 1);
    let place = |group: u32| page.find(&format!("id=\"group-{group}\"")).unwrap();
    assert!(place(40) < place(0) && place(0) < place(1));
    assert!(page.len() < 300_000, "{} bytes", page.len());
}

/// Names and reasons come from servers and configuration.
#[test]
fn nothing_from_outside_becomes_markup() {
    let evil = "<script>alert(1)</script>\"'&<img src=x onerror=alert(1)>";
    let mut scene = Scene::of(1, 0);
    let monitor = Monitor::new(evil, Thresholds::default(), Duration::ZERO);
    scene.servers = vec![(Component::of_group(Kind::Postgres, 0, evil), Primary { timeline: 1 })];
    scene.others = vec![Component::new(Kind::Agent, evil), Component::new(Kind::Redis, evil)];
    monitor.state().expect(&[Kind::Postgres], scene.servers.iter().map(|it| it.0.clone()));
    monitor.state().expect(&[Kind::Agent, Kind::Redis], scene.others.clone());
    scene.monitor = monitor;
    let well = scene.pass(10, 1).page();
    scene.servers[0].1 = Nothing;
    let bad = scene.pass(10, 1).page();
    let times = (scene.now().boot, scene.now().boot);
    let failure = Failure { stage: Stage::Answer, error: evil.to_owned() };
    let agent = &scene.others[0];
    let status = json!({ "groups": { "0": { "state": {
        "last_error": evil, "repository": { "newest_at": evil, "reachable_from": evil } } } } });
    let facts = AgentFacts { not_ready: vec![evil.to_owned()], status };
    scene.monitor.record(|it| &mut it.agents, agent, times, Ok(facts));
    scene.monitor.record(|it| &mut it.redis, &scene.others[1], times, Err(failure));
    scene.monitor.decide(scene.now());
    let silence = Silence::new(DateTime::UNIX_EPOCH, Duration::from_secs(1), vec![evil.to_owned()]);
    let trouble = Some(evil.to_owned());
    let telling = Telling { trouble, silences: vec![(silence, 0)], ..Telling::default() };
    let told = render(&scene.monitor, &telling, scene.now());
    assert!(told.contains("nobody is told of"), "{told}");
    for page in [well, bad, scene.page(), told] {
        assert!(page.contains("alert(1)"), "{page}");
        assert_eq!(page.matches("<script>").count(), 1, "{page}");
        assert!(!page.contains("<img") && !page.contains(evil), "{page}");
        assert!(!page.contains("\"'&"), "{page}");
    }
}

#[test]
fn the_policy_allows_what_is_in_the_page_and_nothing_else() {
    let (page, policy) = (Scene::of(1, 0).page(), policy());
    for (begin, end) in [("<style>", "</style>"), ("<script>", "</script>")] {
        let (_, rest) = page.split_once(begin).unwrap();
        let hash = STANDARD.encode(Sha256::digest(rest.split_once(end).unwrap().0));
        assert!(policy.contains(&format!("'sha256-{hash}'")), "{begin}: {policy}");
    }
    assert!(!policy.contains("unsafe") && !policy.contains('*'), "{policy}");
    for forbidden in [" style=", " onclick=", "http://", "https://", "//cdn"] {
        let page = page.replace("http://www.w3.org/2000/svg", "");
        assert!(!page.contains(forbidden), "{forbidden}");
    }
}
