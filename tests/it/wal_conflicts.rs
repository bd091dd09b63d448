//! Two servers wrote the same segment, or somebody removed WAL: nothing is received past it in silence,
//! and nothing that was acknowledged is removed.

use std::fs;
use std::path::{Path, PathBuf};

use harness::postgres::postgres_is_missing;
use harness::program::give_to_server_user;
use harness::{Mode, eventually};

use crate::outage::admin_address;
use crate::receive::{LIMIT, Receiving, commits, load, objects, reported};
use crate::scene::{Kind, Scene, files, write};
use crate::wal_files::{data_directory, run_in};
use crate::wal_metrics::{is_in_state, metric};

/// Nothing is written that a test does not write.
const QUIET: &str = "[wal]\nship_interval = \"200ms\"\nheartbeat = \"0s\"\n";

/// A growing segment, and what of it is in the server's file by now, as a standby has it that wrote on.
async fn growing() -> (Receiving, String, PathBuf) {
    let receiving = Receiving::with(Kind::Directory, QUIET).await;
    let primary = receiving.primary();
    primary.psql("SELECT pg_switch_wal(); CREATE TABLE marks (i int)").await;
    primary.psql("INSERT INTO marks VALUES (1)").await;
    receiving.stored_all().await;
    let segment = primary.psql("SELECT pg_walfile_name(pg_current_wal_lsn())").await;
    let data = data_directory(&receiving.scene, "data");
    let file = data.join("pg_wal").join(&segment);
    fs::copy(primary.data_directory().join("pg_wal").join(&segment), &file).unwrap();
    give_to_server_user(&file);
    (receiving, segment, data)
}

async fn push(scene: &Scene, data: &Path, segment: &str, code: i32, said: &str) {
    let pushed = run_in(scene, data, &["wal-push", &format!("pg_wal/{segment}")]).await;
    pushed.assert_code(code);
    assert!(pushed.stderr.contains(said), "no {said:?} in {pushed}");
}

/// A complete segment of other content, that somebody stored while the true one was growing.
#[tokio::test]
async fn a_foreign_complete_segment_is_no_substitute_for_the_pieces_of_the_true_one() {
    if postgres_is_missing() {
        return;
    }
    let (mut receiving, segment, data) = growing().await;
    push(&receiving.scene, &data, &segment, 0, "").await;
    let foreign = objects(&receiving.scene, &format!("{segment}-")).remove(0);
    let primary = receiving.primary();
    primary.psql("INSERT INTO marks VALUES (2)").await;
    receiving.stored_all().await;
    load(primary, 100_000).await;
    primary.psql("INSERT INTO marks VALUES (3)").await;
    receiving.agent.logged("CONFLICT", LIMIT).await;
    let pieces = objects(&receiving.scene, &format!("{segment}."));
    let address = admin_address(&receiving.scene);
    receiving.restart_agent().await;
    receiving.agent.logged("is stored with two contents", LIMIT).await;
    is_in_state(&address, "failed").await;
    let is_broken = async || metric(&address, "wal_broken", "").await;
    eventually("the metric says so", LIMIT, async || is_broken().await == Some(1.0)).await;
    receiving.agent.logged("nothing is received past it", LIMIT).await;
    let still = objects(&receiving.scene, &format!("{segment}."));
    assert!(!pieces.is_empty() && pieces == still, "{still:?} is left of {pieces:?}");
    assert_eq!(reported(receiving.primary()).await, None);

    let scene = &receiving.scene;
    for command in [&["list", "--wal"][..], &["verify", "--wal"], &["check"]] {
        let finished = scene.run(command).await;
        finished.assert_code(1);
        let said = format!("CONFLICT: {segment}");
        let is_said = finished.stdout.contains(&said) || finished.stderr.contains(&said);
        assert!(is_said, "{command:?}: {finished}");
    }
    let fetched = run_in(scene, &data, &["wal-fetch", &segment, "fetched"]).await;
    fetched.assert_code(254);
    assert!(fetched.stderr.contains("CONFLICT"), "{fetched}");
    let to = scene.path("refused");
    scene
        .run(&["restore", "--archive-mode", "off", "--to", to.to_str().unwrap()])
        .await
        .assert_code(1);

    // The server that is right says which object is not its own.
    let own = receiving.primary().data_directory().join("pg_wal").join(&segment);
    let file = data.join("pg_wal").join(&segment);
    fs::copy(own, &file).unwrap();
    let name = foreign.file_name().unwrap().to_string_lossy().into_owned();
    push(scene, &data, &segment, 1, &name).await;
    fs::remove_file(&foreign).unwrap();
    receiving.stored_all().await;
    is_in_state(&address, "streaming").await;
    let is_whole = async || is_broken().await == Some(0.0);
    eventually("the metric says that it is over", 2 * LIMIT, is_whole).await;
    for command in [&["list", "--wal"][..], &["verify", "--wal"]] {
        receiving.scene.run(command).await.assert_success();
    }
    let restored = receiving.recover("restored").await;
    assert_eq!(commits(&restored).await, "1,2,3");
}

/// What a standby archives (`archive_mode = always`) may be a segment that `wal-fetch` has given it
/// while it was growing; and what a server archives must not contradict what was received.
#[tokio::test]
async fn a_segment_that_is_being_received_is_not_pushed_by_a_standby_nor_with_other_content() {
    if postgres_is_missing() {
        return;
    }
    let (receiving, segment, data) = growing().await;
    let before = files(&receiving.scene.repository());
    let file = data.join("pg_wal").join(&segment);
    for signal in ["standby.signal", "recovery.signal"] {
        write(&data.join(signal), "");
        push(&receiving.scene, &data, &segment, 1, "the segment is still growing").await;
        fs::remove_file(data.join(signal)).unwrap();
    }
    let whole = fs::read(&file).unwrap();
    let mut other = whole.clone();
    other[100] ^= 1;
    fs::write(&file, &other).unwrap();
    push(&receiving.scene, &data, &segment, 1, "CONFLICT").await;
    assert_eq!(files(&receiving.scene.repository()), before);

    receiving.primary().psql("SELECT pg_switch_wal()").await;
    receiving.stored_all().await;
    fs::copy(receiving.primary().data_directory().join("pg_wal").join(&segment), &file).unwrap();
    write(&data.join("standby.signal"), "");
    push(&receiving.scene, &data, &segment, 0, "").await;
}

/// What is stored ends with a segment, and the server was put back from a copy that is older.
#[tokio::test]
async fn a_server_that_was_put_back_is_refused_where_the_stored_wal_ends_with_a_segment() {
    if postgres_is_missing() {
        return;
    }
    let Receiving { mut scene, agent } = Receiving::with(Kind::Directory, QUIET).await;
    scene.primary.psql("CREATE TABLE marks (i int)").await;
    scene.primary.stop(Mode::Fast).await;
    let data = scene.primary.data_directory().to_owned();
    let copy = scene.path("earlier");
    let copied = std::process::Command::new("cp").args(["-a", "--"]).args([&data, &copy]).status();
    assert!(copied.unwrap().success());
    scene.primary.start().await;
    scene.primary.psql("INSERT INTO marks VALUES (1)").await;
    let segment = scene.primary.psql("SELECT pg_walfile_name(pg_switch_wal())").await;
    eventually("all is stored", LIMIT, async || {
        !objects(&scene, &format!("{segment}-")).is_empty()
            && objects(&scene, "/partial/").is_empty()
    })
    .await;
    agent.kill9().await;
    scene.primary.stop(Mode::Immediate).await;
    fs::rename(&data, scene.path("later")).unwrap();
    fs::rename(&copy, &data).unwrap();
    scene.primary.start().await;
    load(&scene.primary, 100_000).await;
    let before = files(&scene.repository());
    let held = "SELECT restart_lsn FROM pg_replication_slots";
    let held_before = scene.primary.psql(held).await;
    let mut agent = scene.agent().spawn(&["run"]);
    agent.logged(&format!("CONFLICT: {segment}"), LIMIT).await;
    assert_eq!(files(&scene.repository()), before);
    assert_eq!(scene.primary.psql(held).await, held_before);
}

/// Somebody has removed files from `pg_wal`, among them the one in which the slot is.
#[tokio::test]
async fn wal_that_is_gone_from_the_slots_own_segment_is_a_gap() {
    if postgres_is_missing() {
        return;
    }
    let mut receiving = Receiving::with(Kind::Directory, QUIET).await;
    receiving.primary().psql("CREATE TABLE marks (i int); INSERT INTO marks VALUES (1)").await;
    receiving.stored_all().await;
    let first = receiving.primary().psql("SELECT pg_walfile_name(pg_current_wal_lsn())").await;
    let Receiving { scene, agent } = receiving;
    agent.kill9().await;
    for i in 2..=5 {
        scene.primary.psql(&format!("INSERT INTO marks VALUES ({i})")).await;
        scene.primary.psql("SELECT pg_switch_wal()").await;
    }
    let last = scene.primary.psql("SELECT pg_walfile_name(pg_current_wal_lsn())").await;
    for path in files(&scene.primary.data_directory().join("pg_wal")) {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if name.len() == 24 && (&first..&last).contains(&&name) {
            fs::remove_file(path).unwrap();
        }
    }
    let agent = scene.agent().spawn(&["run"]);
    receiving = Receiving { scene, agent };
    receiving.agent.logged("GAP: WAL was removed", LIMIT).await;
    receiving.primary().psql("INSERT INTO marks VALUES (6)").await;
    receiving.stored_all().await;
    receiving.agent.logged("backup completed", LIMIT).await;
    receiving.scene.run(&["list", "--wal"]).await.assert_code(1);
    receiving.stored_all().await;
    let restored = receiving.recover("restored").await;
    assert_eq!(commits(&restored).await, "1,2,3,4,5,6");
}
