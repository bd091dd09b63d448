//! The store is away for long, under load: the primary goes on and can be stopped, the operator is told
//! in time, and afterwards either nothing is lost or it is said what is.

use std::cell::{Cell, RefCell};
use std::fs;
use std::time::Duration;

use harness::postgres::postgres_is_missing;
use harness::{Effect, Fault, Mode, Operation, PgServer, RunningAgent, eventually};
use serde_json::Value;
use tokio::time::{Instant, sleep};
use tokio_postgres::types::PgLsn;

use crate::receive::{LIMIT, RECEIVER, Receiving, WAL, commits, load, objects};
use crate::scene::{Kind, Scene, write};
use crate::wal_faults::{MEMORY_KIB_MAX, is_honest, peak_kib, slot_used, stored};
use crate::wal_files::run_in;

/// How long the store is away, in seconds; the default makes up for it with more load.
const OUTAGE_VARIABLE: &str = "PGMESH_TEST_OUTAGE_SECONDS";
const OUTAGE_SECONDS: u64 = 30;
/// A stream that holds a shutdown up is given up within 30 s; the rest is for a busy machine.
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(50);
/// The longest that a commit may take that waits for nobody. A write of the same machine's disk may
/// be slow; the store is away for longer.
const COMMIT_LIMIT: Duration = Duration::from_secs(15);

/// Between two commits whose time is taken.
const PACE: Duration = Duration::from_millis(10);

/// Lets one attempt to store something take longer than any test.
fn be_patient(scene: &Scene) {
    let text = fs::read_to_string(scene.config()).unwrap();
    let patient = text.replace("attempt_timeout = \"3s\"", "attempt_timeout = \"20m\"");
    assert_ne!(patient, text);
    write(&scene.config(), &patient);
}

/// Gives the agent an address to be asked at; returns it.
pub(crate) fn admin_address(scene: &Scene) -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let text = fs::read_to_string(scene.config()).unwrap();
    write(&scene.config(), &text.replace("127.0.0.1:0", &address));
    address
}

/// The value of a metric of the slot on a server.
async fn slot_metric(address: &str, name: &str, node: &str) -> Option<f64> {
    let text = reqwest::get(format!("http://{address}/metrics")).await.ok()?.text().await.ok()?;
    let labels = format!("{{cluster=\"tests\",group=\"0\",node=\"{node}\"}} ");
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(&labels));
    line.map(|value| value.parse().unwrap())
}

/// Whether the agent said something about a server.
fn said_of(agent: &RunningAgent, text: &str, node: &str) -> bool {
    let said = agent.stdout();
    let lines = said.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let mut lines =
        lines.filter(|line| line["message"].as_str().is_some_and(|it| it.contains(text)));
    lines.any(|line| line["node"] == node)
}

/// Nothing is received from it, so its slot holds back ever more WAL.
#[tokio::test]
async fn a_primary_that_is_refused_keeps_its_alarms() {
    if postgres_is_missing() {
        return;
    }
    let mut receiving = Receiving::start(Kind::Directory).await;
    let address = admin_address(&receiving.scene);
    receiving.restart_agent().await;
    receiving.stored_all().await;
    // As a copy's archiver does, which was promoted.
    let data = receiving.primary().data_directory().to_owned();
    let history = "1\t0/1800000\tno recovery target specified\n";
    fs::write(data.join("pg_wal/00000002.history"), history).unwrap();
    let push = ["wal-push", "pg_wal/00000002.history"];
    run_in(&receiving.scene, &data, &push).await.assert_success();
    fs::remove_file(data.join("pg_wal/00000002.history")).unwrap();
    receiving.restart_agent().await;
    receiving.agent.logged("nothing is stored from", LIMIT).await;
    receiving.agent.logged("an old primary that came back", LIMIT).await;

    let primary = receiving.primary();
    primary.set("max_slot_wal_keep_size", "64MB").await;
    for setting in ["max_wal_size", "min_wal_size"] {
        primary.set(setting, "32MB").await;
    }
    eventually("its slot is lost", LIMIT, async || {
        load(primary, 50_000).await;
        primary.psql("SELECT pg_switch_wal(); CHECKPOINT").await;
        slot_metric(&address, "pgmesh_backup_slot_lost", primary.name()).await == Some(1.0)
    })
    .await;
    assert!(said_of(&receiving.agent, "the replication slot was lost", primary.name()));
}

async fn slot_status(server: &PgServer) -> String {
    let ask = "SELECT coalesce(wal_status, '') FROM pg_replication_slots WHERE slot_name = ";
    server.psql(&format!("{ask}'{RECEIVER}'")).await
}

/// A server that shuts down waits for what it has sent to be stored; but not for as long as a store
/// that hangs may take.
#[tokio::test]
async fn a_store_that_hangs_does_not_hold_up_a_shutdown() {
    if postgres_is_missing() {
        return;
    }
    let mut receiving = Receiving::start(Kind::S3).await;
    be_patient(&receiving.scene);
    receiving.restart_agent().await;
    let primary = &receiving.scene.primary;
    primary.psql("CREATE TABLE marks (i int); INSERT INTO marks VALUES (1)").await;
    receiving.stored_all().await;
    let faults = receiving.scene.s3.as_ref().unwrap().faults().clone();
    let hang = faults.add(Fault::new(Effect::Stall).on(Operation::PutObject));
    primary.psql("INSERT INTO marks VALUES (2)").await;
    eventually("the store hangs", LIMIT, async || faults.hits(hang) > 0).await;
    // More than is taken at once, so that the server has something left to send.
    load(primary, 400_000).await;
    primary.psql("INSERT INTO marks VALUES (3)").await;
    is_honest(&receiving, "the store hangs").await;

    let began_at = Instant::now();
    receiving.scene.primary.stop(Mode::Fast).await;
    let took = began_at.elapsed();
    assert!(took < SHUTDOWN_LIMIT, "it took {took:?}");
    receiving.agent.logged("is shutting down and waits for WAL", LIMIT).await;

    faults.clear();
    receiving.scene.primary.start().await;
    receiving.primary().psql("INSERT INTO marks VALUES (4)").await;
    receiving.stored_all().await;
    receiving.scene.run(&["list", "--wal"]).await.assert_success();

    // With a store that works, it waits until all is stored, its last record too.
    load(receiving.primary(), 50_000).await;
    receiving.scene.primary.stop(Mode::Fast).await;
    let data = receiving.primary().data_directory().display().to_string();
    let control = receiving.primary().run("pg_controldata", &[&data]).await;
    let checkpoint = control.lines().find_map(|it| it.strip_prefix("Latest checkpoint location:"));
    let checkpoint: PgLsn = checkpoint.unwrap().trim().parse().unwrap();
    let until = stored(&receiving.scene).await;
    assert!(checkpoint < until, "the last checkpoint is at {checkpoint}, {until} is stored");
    assert_eq!(commits(&receiving.recover("restored").await).await, "1,2,3,4");
}

/// The slot of a standby waits for its promotion, and is lost as the primary's is.
#[tokio::test]
async fn the_slot_of_a_standby_has_its_own_alarms() {
    const SLOT_MB: u64 = 160;
    if postgres_is_missing() {
        return;
    }
    let scene = Scene::streaming(Kind::S3, WAL).await;
    let limits =
        [("max_slot_wal_keep_size", "160MB"), ("wal_keep_size", "0"), ("max_wal_size", "32MB")];
    let standby = scene.primary.standby_with("standby1", &limits).await;
    scene.configure(&[&scene.primary, &standby]);
    let address = admin_address(&scene);
    let agent = scene.agent().spawn(&["run"]);
    let receiving = Receiving { scene, agent };
    receiving.stored_all().await;
    let has_slot = async || !slot_status(&standby).await.is_empty();
    eventually("the standby has the slot", LIMIT, has_slot).await;

    let faults = receiving.scene.s3.as_ref().unwrap().faults();
    faults.add(Fault::new(Effect::Stall).on(Operation::PutObject));
    let used = async || {
        let ask = "SELECT pg_wal_lsn_diff(pg_last_wal_replay_lsn(), restart_lsn)::bigint \
                   FROM pg_replication_slots";
        standby.psql(ask).await.parse::<u64>().unwrap() * 100 / (SLOT_MB << 20)
    };
    let half = "half of max_slot_wal_keep_size";
    for (percent, alarm) in [(52, half), (76, "three quarters of max_slot_wal_keep_size")] {
        while used().await < percent {
            load(receiving.primary(), 25_000).await;
            standby.catch_up(receiving.primary()).await;
        }
        let said = async || said_of(&receiving.agent, alarm, "standby1");
        eventually(alarm, LIMIT, said).await;
    }
    let name = receiving.primary().name();
    assert!(!said_of(&receiving.agent, half, name), "the primary's slot has no limit");
    let limit = slot_metric(&address, "pgmesh_backup_slot_limit_bytes", "standby1").await;
    assert_eq!(limit, Some(167_772_160.0));
    let retained = slot_metric(&address, "pgmesh_backup_slot_retained_bytes", "standby1").await;
    assert!(retained > Some(120e6), "{retained:?}");
    assert_eq!(slot_metric(&address, "pgmesh_backup_slot_lost", "standby1").await, Some(0.0));

    let lost = "the replication slot was lost";
    let deadline = Instant::now() + LIMIT;
    while !said_of(&receiving.agent, lost, "standby1") {
        assert!(Instant::now() < deadline, "the loss is not said");
        load(receiving.primary(), 50_000).await;
        receiving.primary().psql("SELECT pg_switch_wal(); CHECKPOINT").await;
        standby.catch_up(receiving.primary()).await;
        // A restartpoint is what removes WAL here.
        standby.psql("CHECKPOINT").await;
    }
    let is_lost = slot_metric(&address, "pgmesh_backup_slot_lost", "standby1").await;
    assert_eq!(is_lost, Some(1.0));
    assert_ne!(slot_status(receiving.primary()).await, "lost", "the primary's slot has no limit");

    faults.clear();
    receiving.stored_all().await;
    let over = async || {
        slot_metric(&address, "pgmesh_backup_slot_lost", "standby1").await == Some(0.0)
            && said_of(&receiving.agent, "alarms about the slot are over", "standby1")
    };
    eventually("the alarms are over", LIMIT, over).await;
    receiving.scene.run(&["list", "--wal"]).await.assert_success();
}

/// Commits on a primary while the store is away, and how long the slowest took.
#[derive(Default)]
struct Commits {
    marks: RefCell<Vec<i32>>,
    slowest: Cell<Duration>,
    stop: Cell<bool>,
}

impl Commits {
    /// Commits one mark after the other, and notes each.
    async fn make(&self, primary: &PgServer) {
        let client = primary.connect().await;
        let mut i = 1_000;
        while !self.stop.get() {
            let began_at = Instant::now();
            client.execute("INSERT INTO marks VALUES ($1)", &[&i]).await.unwrap();
            self.slowest.set(self.slowest.get().max(began_at.elapsed()));
            self.marks.borrow_mut().push(i);
            i += 1;
            // The load is others' work; this must not use the slot up in a long outage.
            sleep(PACE).await;
        }
    }
}

fn outage() -> Duration {
    let seconds = std::env::var(OUTAGE_VARIABLE).map(|it| it.parse().unwrap());
    Duration::from_secs(seconds.unwrap_or(OUTAGE_SECONDS))
}

/// Nothing of the store answers, for as long as the slot has room: nothing is lost, nobody waits.
#[tokio::test]
async fn an_outage_within_the_slots_limit_loses_nothing() {
    const SLOT_MB: u64 = 240;
    if postgres_is_missing() {
        return;
    }
    let mut receiving = Receiving::start(Kind::S3).await;
    let primary = &receiving.scene.primary;
    primary.psql("CREATE TABLE marks (i int); INSERT INTO marks VALUES (1)").await;
    primary.set("max_slot_wal_keep_size", &format!("{SLOT_MB}MB")).await;
    receiving.stored_all().await;
    let faults = receiving.scene.s3.as_ref().unwrap().faults().clone();
    let commits = Commits::default();
    let agent = &mut receiving.agent;
    let away = async {
        let hang = faults.add(Fault::new(Effect::Stall));
        let began_at = Instant::now();
        for (percent, alarm) in [
            (52, "half of max_slot_wal_keep_size"),
            (76, "three quarters of max_slot_wal_keep_size"),
        ] {
            while slot_used(primary, SLOT_MB).await < percent {
                load(primary, 20_000).await;
            }
            agent.logged(alarm, LIMIT).await;
        }
        // The commits alone write little.
        let over = async || began_at.elapsed() >= outage();
        eventually("the outage is over", outage() + LIMIT, over).await;
        assert!(faults.hits(hang) > 0);
        assert!(slot_used(primary, SLOT_MB).await < 100, "the test lost the slot itself");
        commits.stop.set(true);
    };
    tokio::join!(commits.make(primary), away);
    let slowest = commits.slowest.get();
    assert!(slowest < COMMIT_LIMIT, "a commit took {slowest:?}");
    let peak = peak_kib(&receiving.agent);
    assert!(peak < MEMORY_KIB_MAX, "{peak} KiB");

    faults.clear();
    receiving.stored_all().await;
    is_honest(&receiving, "the store is back").await;
    receiving.agent.logged("alarms about the slot are over", LIMIT).await;
    receiving.scene.run(&["list", "--wal"]).await.assert_success();
    assert_eq!(receiving.scene.list().await.len(), 1, "another backup was needed");
    let restored = receiving.recover("restored").await;
    let marks = restored.psql("SELECT i FROM marks WHERE i >= 1000 ORDER BY i").await;
    let marks: Vec<i32> = marks.lines().map(|line| line.parse().unwrap()).collect();
    assert_eq!(marks, commits.marks.take());
}

/// The store is away for longer than the slot has room: that is said at once, the gap is recorded as
/// soon as the store is back, and answered with a backup. Both windows can be restored.
#[tokio::test]
async fn an_outage_beyond_the_slots_limit_leaves_two_windows() {
    if postgres_is_missing() {
        return;
    }
    let mut receiving = Receiving::start(Kind::S3).await;
    let address = admin_address(&receiving.scene);
    receiving.restart_agent().await;
    let Receiving { scene, agent } = &mut receiving;
    let primary = &scene.primary;
    let metric = async || slot_metric(&address, "pgmesh_backup_slot_lost", primary.name()).await;
    primary.psql("CREATE TABLE marks (i int); INSERT INTO marks VALUES (1)").await;
    let before = primary.current_lsn().await;
    crate::receive::stored_up_to(primary, before).await;
    for (setting, value) in
        [("max_slot_wal_keep_size", "64MB"), ("max_wal_size", "32MB"), ("wal_keep_size", "0")]
    {
        primary.set(setting, value).await;
    }
    let faults = scene.s3.as_ref().unwrap().faults().clone();
    faults.add(Fault::new(Effect::Stall));
    primary.psql("SELECT pg_switch_wal(); INSERT INTO marks VALUES (2)").await;
    load(primary, 50_000).await;
    let between = primary.current_lsn().await;
    let deadline = Instant::now() + LIMIT;
    let lost = "the replication slot was lost";
    while !said_of(agent, lost, primary.name()) {
        assert!(Instant::now() < deadline, "the loss is not said while the store is away");
        load(primary, 50_000).await;
        primary.psql("SELECT pg_switch_wal(); CHECKPOINT").await;
    }
    eventually("the metric shows it", LIMIT, async || metric().await == Some(1.0)).await;
    primary.psql("INSERT INTO marks VALUES (3)").await;
    primary.set("max_slot_wal_keep_size", "-1").await;
    assert_eq!(objects(scene, "/gap/").len(), 0, "the store is away");

    faults.clear();
    agent.logged("GAP: WAL was removed before it was stored", LIMIT).await;
    eventually("a backup is taken", LIMIT, async || scene.list().await.len() == 2).await;
    assert_eq!(objects(scene, "/gap/").len(), 1);
    primary.psql("INSERT INTO marks VALUES (4)").await;
    receiving.stored_all().await;
    eventually("the metric is back", LIMIT, async || {
        let name = receiving.primary().name();
        slot_metric(&address, "pgmesh_backup_slot_lost", name).await == Some(0.0)
    })
    .await;

    two_windows_and_nothing_between(&receiving, before, between).await;
}

/// Restores to `before`, which is in the first window, and to the end of the second; `between` is in
/// neither.
async fn two_windows_and_nothing_between(receiving: &Receiving, before: PgLsn, between: PgLsn) {
    let scene = &receiving.scene;
    let listed = scene.list().await;
    assert_ne!(listed[0]["window"], listed[1]["window"], "{listed:?}");
    let shown = scene.run(&["list"]).await;
    shown.assert_success();
    assert!(shown.stdout.lines().count() >= 3, "{shown}");
    let wal = scene.run(&["list", "--wal"]).await;
    wal.assert_code(1);
    assert!(
        wal.stdout.contains("GAP until") && wal.stdout.contains("already been removed"),
        "{wal}"
    );

    let first = before.to_string();
    let to = ["--target-lsn", &first, "--target-action", "promote"];
    let restored = PgServer::start_existing(&scene.restore("first", &to).await).await;
    restored.recovered().await;
    assert_eq!(commits(&restored).await, "1");
    assert_eq!(commits(&receiving.recover("second").await).await, "1,2,3,4");
    // Nor does a recovery without a target take the gap for the end.
    let auto_conf = scene.path("endless").join("postgresql.auto.conf");
    scene.restore("endless", &to).await;
    let text = fs::read_to_string(&auto_conf).unwrap();
    let text: Vec<_> = text.lines().filter(|line| !line.contains("recovery_target_lsn")).collect();
    let text = text.join("\n");
    let (command, _) = text.split_once(" --until ").unwrap();
    write(&auto_conf, &format!("{command}'\n"));
    let mut endless = PgServer::builder().existing(&scene.path("endless"));
    endless.try_start().await.ok();
    endless.wait_for_end().await;
    assert!(endless.log().contains("could not restore file"), "{}", endless.log());

    let to = scene.path("between");
    let between = between.to_string();
    let mut refused = vec!["restore", "--archive-mode", "off", "--to", to.to_str().unwrap()];
    refused.extend(["--target-lsn", &between]);
    let refused = scene.run(&refused).await;
    refused.assert_code(1);
    let said = format!("{}{}", refused.stdout, refused.stderr);
    let expected = format!("LSN {between} cannot be reached. What can be reached:");
    assert!(said.contains(&expected), "{refused}");
    assert!(said.contains("is missing"), "{refused}");
    assert!(!to.exists(), "something was restored");
}
