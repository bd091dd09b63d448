//! WAL of servers whose segments have another size, before there is a backup that says so.

use std::fs;

use harness::postgres::postgres_is_missing;
use harness::{Mode, PgServer};
use serde_json::Value;

use crate::receive::{LIMIT, Receiving, WAL, commits, load, objects, reported};
use crate::scene::{Kind, Scene, files, write};

/// More segments than 16 MiB ones there can be in a log: half of them have names that no such segment has.
const SEGMENTS: u32 = 300;

#[tokio::test]
async fn the_size_of_segments_is_told_by_the_wal_itself() {
    if postgres_is_missing() {
        return;
    }
    let mut scene = Scene::streaming(Kind::Directory, WAL).await;
    let settings = [("min_wal_size", "2MB"), ("max_wal_size", "1GB")];
    let builder = PgServer::builder().wal_segment_mib(1);
    let builder = settings.iter().fold(builder, |it, (name, value)| it.setting(name, value));
    scene.primary = builder.primary().await;
    scene.configure(&[&scene.primary]);
    let agent = scene.agent().spawn(&["run"]);
    let receiving = Receiving { scene, agent };
    receiving.primary().psql("CREATE TABLE marks AS SELECT 1 AS i").await;
    receiving.stored_all().await;
    let listed = receiving.scene.run(&["list", "--wal"]).await;
    listed.assert_success();
    let switch = "PERFORM pg_logical_emit_message(false, 'test', 'x'), pg_switch_wal()";
    let many = format!("DO $$ BEGIN FOR i IN 1..{SEGMENTS} LOOP {switch}; END LOOP; END $$");
    receiving.primary().psql(&many).await;
    receiving.stored_all().await;
    let Receiving { scene, agent } = receiving;
    agent.terminate().await.assert_success();
    // Not the one that grows alone tells.
    for piece in objects(&scene, "/partial/") {
        fs::remove_file(piece).unwrap();
    }

    let complete = objects(&scene, "/wal/");
    assert!(complete.len() >= SEGMENTS as usize, "{} segments", complete.len());
    let listed = scene.run(&["list", "--wal", "--json"]).await;
    listed.assert_success();
    let ranges: Vec<Value> = serde_json::from_str(&listed.stdout).unwrap();
    assert_eq!(ranges.len(), 1, "{listed}");
    assert_eq!(ranges[0]["segments"], complete.len(), "{listed}");
    let verified = scene.run(&["verify", "--wal"]).await;
    verified.assert_success();
    assert!(verified.stdout.contains(&format!("{} WAL objects", complete.len())), "{verified}");

    let last = complete.last().unwrap();
    let name = last.file_name().unwrap().to_string_lossy().into_owned();
    let mut damaged = fs::read(last).unwrap();
    damaged[300] ^= 1;
    fs::write(last, &damaged).unwrap();
    let verified = scene.run(&["verify", "--wal"]).await;
    verified.assert_code(1);
    assert!(verified.stdout.contains(&name), "{verified}");
    // The newest one cannot be read, so another tells.
    scene.run(&["list", "--wal"]).await.assert_success();
    fs::remove_file(last).unwrap();
    scene.run(&["verify", "--wal"]).await.assert_success();

    let place = complete[0].ancestors().nth(4).unwrap();
    for strange in [
        complete[0].with_file_name("000000010000000000001000-0123456789abcdef"),
        complete[0].with_file_name("what.is.this"),
        place.join("history/00000002.history"),
    ] {
        fs::create_dir_all(strange.parent().unwrap()).unwrap();
        write(&strange, "x");
        let name = strange.file_name().unwrap().to_string_lossy().into_owned();
        for command in ["list", "verify"] {
            let found = scene.run(&[command, "--wal"]).await;
            found.assert_code(1);
            let said = format!("{}{}", found.stdout, found.stderr);
            assert!(said.contains(&name), "{command}: {found}");
            assert!(said.contains("no name of WAL"), "{command}: {found}");
        }
        fs::remove_file(strange).unwrap();
    }
    scene.run(&["list", "--wal"]).await.assert_success();
}

/// Names of WAL mean other positions after `pg_resetwal --wal-segsize`.
#[tokio::test]
async fn a_server_whose_segments_have_another_size_now_is_refused() {
    if postgres_is_missing() {
        return;
    }
    let mut receiving = Receiving::start(Kind::Directory).await;
    receiving.primary().psql("CREATE TABLE marks AS SELECT 1 AS i; SELECT pg_switch_wal()").await;
    receiving.stored_all().await;
    receiving.scene.primary.stop(Mode::Fast).await;
    let data = receiving.primary().data_directory().to_str().unwrap().to_owned();
    receiving.primary().run("pg_resetwal", &["--wal-segsize=32", &data]).await;
    let before = files(&receiving.scene.repository());
    receiving.scene.primary.start().await;
    receiving.restart_agent().await;
    receiving.agent.logged("the segment size changed from 16", LIMIT).await;
    load(receiving.primary(), 20_000).await;
    receiving.agent.logged("WAL is not being received", LIMIT).await;
    assert_eq!(reported(receiving.primary()).await, None);
    assert_eq!(files(&receiving.scene.repository()), before);
    // What is stored stays restorable.
    let restored = receiving.recover("restored").await;
    assert_eq!(commits(&restored).await, "1");
}
