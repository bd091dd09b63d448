//! A copy was promoted beside its server and archives into the server's own repository.

use std::time::{Duration, SystemTime};

use harness::postgres::postgres_is_missing;
use harness::{Effect, Fault, Mode, Operation, PgServer, eventually};
use serde_json::Value;

use crate::receive::{LIMIT, Receiving, WAL};
use crate::scene::{Kind, Scene, write};

const STEP: &str = "group 0: timelines";

/// A server that archives and whose WAL is received, and a copy that was promoted, has archived two
/// segments and more, and was backed up.
async fn copied() -> (Receiving, PgServer) {
    let scene = Scene::with(Kind::S3, WAL).await;
    let agent = scene.agent().spawn(&["run"]);
    let receiving = Receiving { scene, agent };
    receiving.stored_all().await;
    receiving.scene.backup().await;
    receiving.primary().psql("CREATE TABLE t AS SELECT 1 AS i").await;
    receiving.stored_all().await;

    let to = receiving.scene.path("copy");
    let restore = ["restore", "--archive-mode", "preserve", "--to", to.to_str().unwrap()];
    receiving.scene.run(&restore).await.assert_success();
    let copy = PgServer::start_existing(&to).await;
    copy.recovered().await;
    for i in 10..12 {
        copy.psql(&format!("INSERT INTO t VALUES ({i})")).await;
        let name = copy.psql("SELECT pg_walfile_name(pg_switch_wal())").await;
        let is_archived = async || stored(&receiving.scene).iter().any(|key| key.contains(&name));
        eventually("its WAL is archived", LIMIT, is_archived).await;
    }
    // The later backup names the copy's as the one before it.
    receiving.scene.configure(&[&copy]);
    receiving.scene.backup().await;
    receiving.scene.configure(&[receiving.primary()]);
    receiving.scene.backup().await;
    receiving.primary().psql("INSERT INTO t VALUES (2)").await;
    receiving.stored_all().await;
    (receiving, copy)
}

/// What is stored of timeline 2.
fn stored(scene: &Scene) -> Vec<String> {
    let keys = scene.s3.as_ref().unwrap().bucket().keys("v1/");
    let is_of_it = |key: &String| {
        let last = key.rsplit('/').next().unwrap();
        last.starts_with("00000002") || key.contains("/base/") && key.contains("Z-00000002-")
    };
    keys.into_iter().filter(is_of_it).collect()
}

/// What `check` says of timelines, and whether that is all that fails.
async fn checked(scene: &Scene) -> (String, bool) {
    let finished = scene.run(&["check", "--json"]).await;
    let steps: Vec<Value> = serde_json::from_str(&finished.stdout).unwrap();
    let step = steps.iter().find(|step| step["step"] == STEP).unwrap();
    let failed: Vec<_> = steps.iter().filter(|step| step["outcome"] == "failed").collect();
    assert!(failed.iter().all(|it| it["step"] == STEP), "{failed:?}");
    let is_well = failed.is_empty() && finished.code() == Some(0);
    (step["detail"].as_str().unwrap().to_owned(), is_well)
}

async fn remove(scene: &Scene, arguments: &[&str], code: i32, said: &str) {
    let finished = scene.run(&[&["expire"], arguments].concat()).await;
    finished.assert_code(code);
    let is_said = finished.stdout.contains(said) || finished.stderr.contains(said);
    assert!(is_said, "{arguments:?}: no {said:?} in {finished}");
}

/// Lets what is stored of timeline 2 be so old that its server counts as stopped.
fn long_ago(scene: &Scene) {
    let bucket = scene.s3.as_ref().unwrap().bucket();
    let before = SystemTime::now() - Duration::from_mins(3);
    for key in &stored(scene) {
        bucket.set_modified(key, before);
    }
}

/// The copy has taken the number of the server's next timeline.
#[tokio::test]
async fn a_copy_that_archived_beside_its_server_is_removed_and_the_server_fails_over() {
    if postgres_is_missing() {
        return;
    }
    let (mut receiving, copy) = copied().await;
    let (detail, is_well) = checked(&receiving.scene).await;
    assert!(!is_well && detail.contains("is stored since "), "{detail}");
    assert!(detail.contains("expire --timeline 2 --group 0"), "{detail}");
    receiving.restart_agent().await;
    receiving.agent.logged("an old primary that came back", LIMIT).await;
    receiving.agent.logged("`backup-agent expire --timeline 2`", LIMIT).await;

    let scene = &receiving.scene;
    let before = stored(scene);
    for part in ["/wal/", "history/00000002.history", ".backup-", "/commit"] {
        assert!(before.iter().any(|key| key.contains(part)), "no {part} in {before:?}");
    }
    remove(scene, &["--timeline", "2"], 0, " WAL segments, ").await;
    remove(scene, &["--timeline", "2"], 0, "nothing was changed").await;
    remove(scene, &["--timeline", "2", "--apply"], 1, "its server is running").await;
    remove(scene, &["--timeline", "1", "--apply", "--force"], 1, "the primary writes").await;
    remove(scene, &["--timeline", "7", "--apply"], 1, "nothing of it is stored").await;
    remove(scene, &["--timeline", "2", "--group", "9"], 1, "group 9").await;
    assert_eq!(stored(scene), before, "something was removed");

    drop(copy);
    long_ago(scene);
    let faults = scene.s3.as_ref().unwrap().faults();
    let second =
        Fault::new(Effect::Stall).on(Operation::DeleteObject).key("/wal/00000002").after(1);
    let second = faults.add(second);
    let removal = scene.agent().spawn(&["expire", "--timeline", "2", "--apply"]);
    eventually("half of it is gone", LIMIT, async || faults.hits(second) > 0).await;
    removal.kill9().await;
    faults.clear();
    let half = stored(scene);
    let count = |keys: &[String], part: &str| keys.iter().filter(|key| key.contains(part)).count();
    assert_eq!(count(&half, "/wal/"), count(&before, "/wal/") - 1, "{half:?}");
    assert_eq!((count(&half, "/base/"), count(&half, "00000002.history")), (0, 1), "{half:?}");
    assert!(!checked(scene).await.1, "nothing is said of what is left");
    remove(scene, &["--timeline", "2", "--apply", "--json"], 0, "\"histories\": 1").await;
    assert_eq!(stored(scene), Vec::<String>::new());

    receiving.stored_all().await;
    let (detail, is_well) = checked(&receiving.scene).await;
    assert!(is_well, "{detail}");
    receiving.scene.primary.stop(Mode::Fast).await;
    write(&receiving.primary().data_directory().join("standby.signal"), "");
    receiving.scene.primary.start().await;
    receiving.primary().promote().await;
    receiving.primary().psql("INSERT INTO t VALUES (3)").await;
    receiving.scene.archive_wal().await;
    receiving.stored_all().await;
    assert!(stored(&receiving.scene).len() > 1);
    let (detail, is_well) = checked(&receiving.scene).await;
    assert!(is_well && detail.contains("timeline 2"), "{detail}");
    for what in [&["verify"][..], &["verify", "--wal"]] {
        receiving.scene.run(what).await.assert_success();
    }
    let restored = receiving.recover("restored").await;
    assert_eq!(restored.dump().await, receiving.primary().dump().await);
    assert_eq!(restored.psql("SELECT string_agg(i::text, ',') FROM t").await, "1,2,3");
}

/// Nobody looked at `check`: the server failed over, and its own timeline 2 is refused.
#[tokio::test]
async fn a_copy_whose_number_the_server_has_taken_too_is_told_from_it() {
    if postgres_is_missing() {
        return;
    }
    let (mut receiving, copy) = copied().await;
    drop(copy);
    let copied = stored(&receiving.scene);
    receiving.scene.primary.stop(Mode::Fast).await;
    write(&receiving.primary().data_directory().join("standby.signal"), "");
    receiving.scene.primary.start().await;
    receiving.primary().promote().await;
    receiving.primary().psql("INSERT INTO t VALUES (3)").await;
    receiving.agent.logged("two servers were promoted", LIMIT).await;
    receiving.agent.logged("`backup-agent expire --timeline 2`", LIMIT).await;
    assert_eq!(stored(&receiving.scene), copied, "two timelines of one number are stored");
    let (code, all) = {
        let finished = receiving.scene.run(&["check", "--json"]).await;
        (finished.code(), finished.stdout)
    };
    assert!(code == Some(1) && all.contains("expire --timeline 2"), "{all}");

    long_ago(&receiving.scene);
    remove(&receiving.scene, &["--timeline", "2", "--apply"], 0, "done").await;
    receiving.stored_all().await;
    receiving.scene.archive_wal().await;
    let (detail, is_well) = checked(&receiving.scene).await;
    assert!(is_well, "{detail}");
    let restored = receiving.recover("restored").await;
    assert_eq!(restored.dump().await, receiving.primary().dump().await);
}
