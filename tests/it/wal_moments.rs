//! The store breaks at the very moment at which a mistake would lose WAL: between a complete segment and
//! its pieces, between a piece's listing and its reading, between one segment and the next, and between
//! one timeline and the next.

use std::fs;
use std::time::Duration;

use harness::postgres::postgres_is_missing;
use harness::{Effect, Fault, Mode, Operation, PgServer, Refusal, eventually};

use crate::receive::{LIMIT, RECEIVER, Receiving, commits, load, objects, stored_up_to};
use crate::scene::{Kind, write};
use crate::wal_files::{data_directory, run_in};

/// Ships often, and reads nothing back by itself.
const QUIET: &str = "[wal]\nship_interval = \"200ms\"\nheartbeat = \"0s\"\n";

async fn current_segment(primary: &PgServer) -> String {
    primary.psql("SELECT pg_walfile_name(pg_current_wal_lsn())").await
}

/// Begins a segment, and stores some pieces of it; returns its name.
async fn begin_segment(receiving: &Receiving) -> String {
    let primary = receiving.primary();
    primary.psql("SELECT pg_switch_wal()").await;
    primary.psql("CREATE TABLE marks (i int); INSERT INTO marks VALUES (1)").await;
    receiving.stored_all().await;
    primary.psql("INSERT INTO marks VALUES (2)").await;
    receiving.stored_all().await;
    current_segment(primary).await
}

/// The store keeps a part of a complete segment, and the agent dies before it reads it back. The pieces
/// are what there is of it.
#[tokio::test]
async fn a_damaged_complete_segment_does_not_stand_for_its_pieces() {
    if postgres_is_missing() {
        return;
    }
    let mut receiving = Receiving::with(Kind::S3, QUIET).await;
    let segment = begin_segment(&receiving).await;
    let faults = receiving.scene.s3.as_ref().unwrap().faults().clone();
    let complete = format!("/{segment}-");
    let lie = Fault::new(Effect::StoreTruncated { bytes: 2_000 }).on(Operation::PutObject);
    let lie = faults.add(lie.key(&complete));
    // Whatever it asks then, it gets no answer.
    for operation in [
        Operation::HeadObject,
        Operation::GetObject,
        Operation::DeleteObject,
        Operation::DeleteObjects,
    ] {
        faults.add(Fault::new(Effect::Stall).on(operation).key(&complete));
    }
    receiving.primary().psql("INSERT INTO marks VALUES (3); SELECT pg_switch_wal()").await;
    eventually("the store lies", LIMIT, async || faults.hits(lie) > 0).await;
    receiving.primary().psql("INSERT INTO marks VALUES (4)").await;
    let Receiving { scene, agent } = receiving;
    agent.kill9().await;
    faults.clear();
    assert_eq!(objects(&scene, &complete).len(), 1, "the truncated segment");
    assert!(!objects(&scene, &format!("/{segment}.")).is_empty(), "its pieces are gone");
    // Nobody takes it for the segment.
    let data = data_directory(&scene, "data");
    let fetched = run_in(&scene, &data, &["wal-fetch", &segment, "fetched"]).await;
    assert_eq!(fetched.code(), Some(254), "{fetched}");

    receiving = Receiving { agent: scene.agent().spawn(&["run"]), scene };
    receiving.stored_all().await;
    receiving.agent.logged("its pieces stand for it", LIMIT).await;
    receiving.scene.run(&["verify", "--wal"]).await.assert_success();
    assert_eq!(commits(&receiving.recover("restored").await).await, "1,2,3,4");
}

/// A segment is completed, and its pieces removed, between the moment at which `wal-fetch` has listed
/// them and that at which it reads the first.
#[tokio::test]
async fn pieces_that_vanish_under_a_fetch_are_fetched_as_a_whole() {
    if postgres_is_missing() {
        return;
    }
    let receiving = Receiving::with(Kind::S3, QUIET).await;
    let text = fs::read_to_string(receiving.scene.config()).unwrap();
    let patient = text.replace("attempt_timeout = \"3s\"", "attempt_timeout = \"5m\"");
    write(&receiving.scene.config(), &patient);
    let faults = receiving.scene.s3.as_ref().unwrap().faults();
    let data = data_directory(&receiving.scene, "data");
    receiving.primary().set("wal_keep_size", "1GB").await;
    receiving.primary().psql("CREATE TABLE marks (i int)").await;
    // On a machine that is busy enough the pieces may outlive the delay: then once more, with more.
    for seconds in [5, 20, 60] {
        let primary = receiving.primary();
        primary.psql("SELECT pg_switch_wal()").await;
        primary.psql("INSERT INTO marks VALUES (1)").await;
        receiving.stored_all().await;
        let segment = current_segment(primary).await;
        let pieces = format!("/{segment}.");
        let hold = Fault::new(Effect::Delay(Duration::from_secs(seconds))).on(Operation::GetObject);
        let hold = faults.add(hold.key(&pieces));
        let vanish = async {
            eventually("a piece is asked for", LIMIT, async || faults.hits(hold) > 0).await;
            primary.psql("INSERT INTO marks VALUES (2); SELECT pg_switch_wal()").await;
            eventually("the pieces are gone", LIMIT, async || {
                objects(&receiving.scene, &pieces).is_empty()
            })
            .await;
        };
        let target = format!("fetched-{seconds}");
        let arguments = ["wal-fetch", &segment, &target];
        let (fetched, ()) = tokio::join!(run_in(&receiving.scene, &data, &arguments), vanish);
        faults.clear();
        fetched.assert_success();
        if fetched.stderr.contains("put together from its pieces") {
            continue;
        }
        let whole = fs::read(primary.data_directory().join("pg_wal").join(&segment)).unwrap();
        assert!(fs::read(data.join(target)).unwrap() == whole, "not the complete segment");
        return;
    }
    panic!("the pieces never vanished in time");
}

/// Of two complete segments the later is stored first, and the agent dies. What there is of the earlier
/// one must not be taken for the end of the WAL.
#[tokio::test]
async fn a_growing_segment_before_a_complete_one_is_not_the_end() {
    if postgres_is_missing() {
        return;
    }
    let mut receiving = Receiving::with(Kind::S3, QUIET).await;
    let segment = begin_segment(&receiving).await;
    let faults = receiving.scene.s3.as_ref().unwrap().faults().clone();
    let complete = format!("/{segment}-");
    faults.add(Fault::new(Effect::Stall).on(Operation::PutObject).key(&complete));
    let primary = receiving.primary();
    primary.psql("INSERT INTO marks VALUES (3); SELECT pg_switch_wal()").await;
    primary.psql("INSERT INTO marks VALUES (4)").await;
    let next = current_segment(primary).await;
    primary.psql("SELECT pg_switch_wal()").await;
    primary.psql("INSERT INTO marks VALUES (5)").await;
    let later = format!("/{next}-");
    eventually("the later segment is stored", LIMIT, async || {
        !objects(&receiving.scene, &later).is_empty()
    })
    .await;
    let Receiving { scene, agent } = receiving;
    agent.kill9().await;
    faults.clear();
    assert!(objects(&scene, &complete).is_empty(), "the earlier segment is stored");

    let data = data_directory(&scene, "data");
    let fetched = run_in(&scene, &data, &["wal-fetch", &segment, "fetched"]).await;
    assert_eq!(fetched.code(), Some(254), "{fetched}");
    let said = format!("{next} is stored, which is after it");
    assert!(fetched.stderr.contains(&said), "{fetched}");
    assert!(!data.join("fetched").exists());
    let listed = scene.run(&["list", "--wal"]).await;
    listed.assert_code(1);
    assert!(listed.stdout.contains("GAP until"), "{listed}");
    let to = scene.path("refused");
    let refused = ["restore", "--archive-mode", "off", "--to", to.to_str().unwrap()];
    let refused = scene.run(&refused).await;
    refused.assert_code(1);

    receiving = Receiving { agent: scene.agent().spawn(&["run"]), scene };
    receiving.stored_all().await;
    receiving.scene.run(&["list", "--wal"]).await.assert_success();
    receiving.scene.run(&["verify", "--wal"]).await.assert_success();
    assert_eq!(commits(&receiving.recover("restored").await).await, "1,2,3,4,5");
}

/// Of the first segment of a new timeline only a first piece is stored, which ends before the branch.
/// The old timeline has the rest up to there.
#[tokio::test]
async fn the_first_pieces_of_a_timeline_do_not_hide_the_one_before() {
    if postgres_is_missing() {
        return;
    }
    let small = format!("{QUIET}ship_bytes = 65536\n");
    let (mut receiving, standby) = Receiving::with_standby(Kind::S3, &small).await;
    let slots = format!("SELECT count(*) FROM pg_replication_slots WHERE slot_name = '{RECEIVER}'");
    eventually("the standby has the slot", LIMIT, async || standby.psql(&slots).await == "1").await;
    let primary = receiving.primary();
    primary.psql("SELECT pg_switch_wal(); CREATE TABLE marks (i int)").await;
    load(primary, 20_000).await;
    primary.psql("INSERT INTO marks VALUES (1)").await;
    receiving.stored_all().await;
    standby.catch_up(primary).await;
    let segment = current_segment(primary).await;
    receiving.scene.primary.stop(Mode::Immediate).await;

    let faults = receiving.scene.s3.as_ref().unwrap().faults().clone();
    let pieces = "/partial/00000002";
    let refuse = Fault::new(Effect::Refuse(Refusal::InternalError)).on(Operation::PutObject);
    let refuse = faults.add(refuse.key(pieces).after(1));
    standby.promote().await;
    standby.psql("INSERT INTO marks VALUES (2)").await;
    eventually("the store fails", LIMIT, async || faults.hits(refuse) > 0).await;
    let Receiving { scene, agent } = receiving;
    agent.kill9().await;
    let stored = objects(&scene, pieces);
    assert_eq!(stored.len(), 1, "{stored:?}");
    let piece = stored[0].display().to_string();
    assert!(piece.contains(&segment[8..]), "{piece} is not of {segment}: nothing is shown");

    // What was committed before the promotion is on the new timeline too, as far as anybody knows.
    receiving = Receiving { agent: scene.agent().spawn(&["list"]), scene };
    let restored = receiving.recover("between").await;
    assert_eq!(commits(&restored).await, "1");
    assert_eq!(restored.psql("SELECT count(*) FROM load").await, "20000");

    faults.clear();
    receiving.scene.configure(&[&standby]);
    receiving.restart_agent().await;
    stored_up_to(&standby, standby.current_lsn().await).await;
    assert_eq!(commits(&receiving.recover("restored").await).await, "1,2");
}
