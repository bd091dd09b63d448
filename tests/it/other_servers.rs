//! Servers that do not belong in the group: of another database cluster, an old primary that came back, a
//! standby that was left behind; and somebody else's slot.

use std::fs;
use std::time::Duration;

use harness::postgres::postgres_is_missing;
use harness::{Mode, PgServer, eventually};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tokio::time::{Instant, sleep};

use crate::outage::admin_address;
use crate::receive::{LIMIT, RECEIVER, Receiving, load, objects, stored_up_to};
use crate::scene::{Kind, write};
use crate::wal_metrics::{is_in_state, metric, wal_status};

const QUIET: &str = "[wal]\nship_interval = \"200ms\"\nheartbeat = \"0s\"\n";

async fn identifier(server: &PgServer) -> String {
    server.psql("SELECT system_identifier FROM pg_control_system()").await
}

async fn slots(server: &PgServer) -> String {
    let ask = "SELECT string_agg(slot_name || ' ' || restart_lsn, ',') FROM pg_replication_slots";
    server.psql(ask).await
}

/// What `check` says of a step.
async fn checked(receiving: &Receiving, step: &str) -> Value {
    let checked = receiving.scene.run(&["check", "--json"]).await;
    let steps: Vec<Value> = serde_json::from_str(&checked.stdout).unwrap();
    let found = steps.iter().find(|it| it["step"] == format!("group 0: {step}"));
    found.unwrap_or_else(|| panic!("no {step} in {steps:?}")).clone()
}

async fn stands(address: &str, node: &PgServer, state: &str) {
    let labels = format!(",node=\"{}\",state=\"{state}\"", node.name());
    let is_so = async || metric(address, "server_state", &labels).await == Some(1.0);
    eventually(&format!("{} is {state}", node.name()), LIMIT, is_so).await;
}

/// Another cluster's primary, on a higher timeline.
async fn stranger() -> PgServer {
    let mut other = PgServer::builder().name("other").primary().await;
    other.stop(Mode::Fast).await;
    write(&other.data_directory().join("standby.signal"), "");
    other.start().await;
    other.promote().await;
    other
}

#[tokio::test]
async fn a_server_of_another_cluster_is_told_and_left_alone() {
    if postgres_is_missing() {
        return;
    }
    let mut receiving = Receiving::with(Kind::Directory, QUIET).await;
    let other = stranger().await;
    receiving.scene.configure(&[&receiving.scene.primary, &other]);
    let address = admin_address(&receiving.scene);
    receiving.restart_agent().await;
    receiving.stored_all().await;
    receiving.primary().psql("CREATE TABLE marks AS SELECT 1 AS i").await;
    receiving.stored_all().await;
    receiving.agent.logged("it is of another database cluster", LIMIT).await;
    stands(&address, &other, "other_cluster").await;
    is_in_state(&address, "streaming").await;
    assert_eq!(wal_status(&address).await["primary"], receiving.primary().name());
    assert_eq!(slots(&other).await, "");
    assert!(objects(&receiving.scene, &identifier(&other).await).is_empty());
    assert_eq!(checked(&receiving, "other").await["outcome"], "failed");
    assert_eq!(checked(&receiving, "WAL receiver").await["outcome"], "ok");

    // As its standby, with a slot of that name.
    let standby = other.standby("stranger").await;
    let make = format!("SELECT pg_create_physical_replication_slot('{RECEIVER}', true)");
    standby.psql(&make).await;
    load(&other, 1000).await;
    standby.catch_up(&other).await;
    let before = slots(&standby).await;
    receiving.scene.configure(&[&receiving.scene.primary, &standby]);
    let address = admin_address(&receiving.scene);
    receiving.restart_agent().await;
    load(receiving.primary(), 100_000).await;
    receiving.stored_all().await;
    stands(&address, &standby, "other_cluster").await;
    sleep(Duration::from_secs(12)).await;
    assert_eq!(slots(&standby).await, before);
}

#[tokio::test]
async fn another_cluster_under_the_same_name_is_refused_until_it_is_begun() {
    if postgres_is_missing() {
        return;
    }
    let mut receiving = Receiving::with(Kind::Directory, QUIET).await;
    let other = PgServer::builder().name(receiving.primary().name()).primary().await;
    receiving.scene.configure(&[&other]);
    let address = admin_address(&receiving.scene);
    receiving.restart_agent().await;
    receiving.agent.logged("backup-agent begin --group 0", LIMIT).await;
    is_in_state(&address, "failed").await;
    assert_eq!(slots(&other).await, "");
    let there = identifier(&other).await;
    assert!(objects(&receiving.scene, &there).is_empty(), "something of it is stored");
    let step = checked(&receiving, "who leads").await;
    assert!(step["detail"].as_str().unwrap().contains("begin --group 0"), "{step}");
    let backup = receiving.scene.run(&["backup"]).await;
    backup.assert_code(1);
    assert!(backup.stderr.contains(&there) || backup.stdout.contains(&there), "{backup}");

    receiving.scene.run(&["begin"]).await.assert_success();
    let step = checked(&receiving, "backups").await;
    assert_eq!(step["outcome"], "warning", "{step}");
    stored_up_to(&other, other.current_lsn().await).await;
    receiving.scene.backup().await;
    let step = checked(&receiving, "backups").await;
    assert_eq!(step["outcome"], "ok", "{step}");

    // The one before is started again: by a restarted host, or as it is to be the group's again.
    receiving.scene.configure(&[&receiving.scene.primary]);
    receiving.restart_agent().await;
    receiving.agent.logged("or is an earlier one back?", LIMIT).await;
    let step = checked(&receiving, "who leads").await;
    assert!(step["detail"].as_str().unwrap().contains("begin --group 0"), "{step}");
    receiving.scene.run(&["begin"]).await.assert_success();
    receiving.primary().psql("CREATE TABLE back (i int)").await;
    receiving.stored_all().await;
}

#[tokio::test]
async fn what_a_walsender_that_hangs_does_not_send_is_behind() {
    if postgres_is_missing() {
        return;
    }
    let mut receiving = Receiving::with(Kind::Directory, QUIET).await;
    let address = admin_address(&receiving.scene);
    receiving.restart_agent().await;
    receiving.primary().psql("CREATE TABLE load (i int, text text)").await;
    receiving.stored_all().await;
    is_in_state(&address, "streaming").await;
    let ask = "SELECT active_pid FROM pg_replication_slots";
    let sender = Pid::from_raw(receiving.primary().psql(ask).await.parse().unwrap()).unwrap();
    kill_process(sender, Signal::STOP).unwrap();
    let began_at = Instant::now();
    load(receiving.primary(), 10_000).await;
    let behind = async || metric(&address, "wal_lag_bytes", "").await > Some(1e6);
    eventually("what is not sent is behind", Duration::from_secs(25), behind).await;
    assert!(began_at.elapsed() < Duration::from_secs(25));
    let step = checked(&receiving, "WAL receiver").await;
    let detail = step["detail"].as_str().unwrap();
    assert!(detail.contains(&format!("PID {} ({RECEIVER}", sender.as_raw_nonzero())), "{step}");
    kill_process(sender, Signal::CONT).unwrap();
    receiving.stored_all().await;
}

#[tokio::test]
async fn an_old_primary_and_a_standby_that_was_left_behind_are_told() {
    if postgres_is_missing() {
        return;
    }
    let (mut receiving, mut standby) = Receiving::with_standby(Kind::Directory, QUIET).await;
    let left = receiving.primary().standby("left").await;
    receiving.scene.configure(&[&receiving.scene.primary, &standby, &left]);
    let address = admin_address(&receiving.scene);
    receiving.restart_agent().await;
    receiving.stored_all().await;
    standby.catch_up(receiving.primary()).await;
    standby.promote().await;
    stored_up_to(&standby, standby.current_lsn().await).await;
    load(&standby, 10_000).await;
    stored_up_to(&standby, standby.current_lsn().await).await;
    receiving.agent.logged("an old primary that came back", LIMIT).await;
    receiving.agent.logged("a standby on timeline 1, and the primary is on 2", LIMIT).await;
    stands(&address, receiving.primary(), "old_primary").await;
    stands(&address, &left, "other_timeline").await;
    is_in_state(&address, "streaming").await;
    let step = checked(&receiving, receiving.primary().name()).await;
    assert!(step["detail"].as_str().unwrap().contains("pg_rewind"), "{step}");
    assert_eq!(checked(&receiving, "left").await["outcome"], "warning");
    for step in ["timelines", "WAL receiver"] {
        assert_eq!(checked(&receiving, step).await["outcome"], "ok");
    }
    let log = receiving.agent.stdout();
    let changed = log.lines().find(|line| line.contains("another server is the primary now"));
    let changed: Value = serde_json::from_str(changed.unwrap()).unwrap();
    assert_eq!(changed["node"], standby.name(), "{changed}");
    assert_eq!(changed["from"], receiving.primary().name(), "{changed}");

    // Who is received from takes no logins: what is received goes on to be.
    let limit = "SELECT pg_reload_conf()";
    let hba = standby.data_directory().join("pg_hba.conf");
    let text = fs::read_to_string(&hba).unwrap();
    write(&hba, &format!("local all all reject\nhost all all all reject\n{text}"));
    standby.psql(limit).await;
    sleep(Duration::from_secs(75)).await;
    is_in_state(&address, "streaming").await;
    let status = wal_status(&address).await;
    assert_eq!(status["primary"], Value::Null, "{status}");
    assert_eq!(status["slots"][standby.name()], Value::Null, "{status}");
    assert!(!receiving.agent.stdout().contains("nothing is stored from"));
    write(&hba, &text);

    // It stops: the old one is as old as before.
    standby.stop(Mode::Fast).await;
    is_in_state(&address, "no_primary").await;
    sleep(Duration::from_secs(5)).await;
    stands(&address, receiving.primary(), "old_primary").await;
    assert_eq!(wal_status(&address).await["primary"], Value::Null);
    let log = receiving.agent.stdout();
    assert!(!log.contains("on the primary's timeline and of its database cluster again"), "{log}");
    let backup = receiving.scene.run(&["backup"]).await;
    backup.assert_code(1);
    assert!(backup.stderr.contains("expire --timeline 2"), "{backup}");
}

#[tokio::test]
async fn a_primary_on_an_older_timeline_than_a_standby_receives_is_not_received() {
    if postgres_is_missing() {
        return;
    }
    let (mut receiving, standby) = Receiving::with_standby(Kind::Directory, QUIET).await;
    receiving.stored_all().await;
    let Receiving { scene, agent } = receiving;
    agent.terminate().await.assert_success();
    standby.catch_up(&scene.primary).await;
    standby.promote().await;
    let follower = standby.standby("follower").await;
    load(&standby, 1000).await;
    follower.catch_up(&standby).await;

    // The new primary is not to be seen.
    scene.configure(&[&scene.primary, &follower]);
    let address = admin_address(&scene);
    let agent = scene.agent().spawn(&["run"]);
    receiving = Receiving { scene, agent };
    stands(&address, receiving.primary(), "old_primary").await;
    stands(&address, &follower, "ok").await;
    receiving.agent.logged("is a primary on timeline 1, which is over", LIMIT).await;
    assert!(!receiving.agent.stdout().contains("receiving WAL"));
    assert_eq!(checked(&receiving, receiving.primary().name()).await["outcome"], "failed");
    assert_eq!(checked(&receiving, "follower").await["outcome"], "ok");

    // Nor does it run: what the follower has is still the newest.
    drop(standby);
    sleep(Duration::from_secs(5)).await;
    stands(&address, receiving.primary(), "old_primary").await;
    receiving.agent.terminate().await.assert_success();
}

#[tokio::test]
async fn a_logical_slot_of_that_name_is_left_alone() {
    if postgres_is_missing() {
        return;
    }
    let mut receiving = Receiving::with(Kind::Directory, QUIET).await;
    let other = format!("SELECT pg_create_logical_replication_slot('{RECEIVER}', 'pgoutput')");
    receiving.primary().set("wal_level", "logical").await;
    let fresh = receiving.scene.agent();
    receiving.agent.terminate().await.assert_success();
    receiving.scene.primary.restart().await;
    receiving.scene.primary.psql(&format!("SELECT pg_drop_replication_slot('{RECEIVER}')")).await;
    receiving.scene.primary.psql(&other).await;
    let before = slots(&receiving.scene.primary).await;
    let mut agent = fresh.spawn(&["run"]);
    agent.logged("is a logical one and somebody else's", LIMIT).await;
    assert_eq!(slots(&receiving.scene.primary).await, before);
    agent.terminate().await.assert_success();
}
