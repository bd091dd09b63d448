//! Another key under the same id: nothing that it would seal is acknowledged, because nobody who has
//! the right one could read it.

use std::fs;

use harness::postgres::postgres_is_missing;
use harness::program::give_to_server_user;
use harness::{Mode, Operation, PgServer, eventually};

use crate::receive::{LIMIT, RECEIVER, Receiving, WAL, commits, objects, stored_up_to};
use crate::scene::{Kind, Scene, files, write};
use crate::wal_files::{data_directory, run_in};

const SAID: &str = "was written with another key under the id k1";

/// Puts another key into the file; returns the right one.
fn change_key(scene: &Scene) -> String {
    let right = fs::read_to_string(scene.key()).unwrap();
    write(&scene.key(), &format!("{}\n", "ab".repeat(32)));
    right
}

async fn slot_lsn(primary: &PgServer) -> String {
    let ask = "SELECT restart_lsn FROM pg_replication_slots WHERE slot_name = ";
    primary.psql(&format!("{ask}'{RECEIVER}'")).await
}

/// There are pieces alone, or complete segments, or a backup too.
async fn nothing_is_received(kind: Kind, has_segments: bool, has_backup: bool) {
    let scene = Scene::streaming(kind, WAL).await;
    let agent = scene.agent().spawn(&["run"]);
    scene.primary.psql("CREATE TABLE marks (i int); INSERT INTO marks VALUES (1)").await;
    if has_segments {
        scene.primary.psql("SELECT pg_switch_wal(); INSERT INTO marks VALUES (2)").await;
    }
    stored_up_to(&scene.primary, scene.primary.current_lsn().await).await;
    if has_backup {
        scene.backup().await;
    }
    agent.terminate().await.assert_success();
    let right = change_key(&scene);
    let (slot, before) = (slot_lsn(&scene.primary).await, files(&scene.repository()));
    let mut agent = scene.agent().spawn(&["run"]);
    scene.primary.psql("INSERT INTO marks VALUES (3); SELECT pg_switch_wal()").await;
    agent.logged(SAID, LIMIT).await;
    let backup = scene.run(&["backup"]).await;
    backup.assert_code(1);
    assert!(
        backup.stderr.contains("another key under the") && backup.stderr.contains("id of its own"),
        "{backup}"
    );
    if has_backup {
        // Another backup would not help.
        for line in [&["list"][..], &["restore", "--archive-mode", "off", "--to", "/no/such"]] {
            let told = scene.run(line).await;
            told.assert_code(1);
            let says = "be read with the configured keys";
            assert!(told.stdout.contains(says) || told.stderr.contains(says), "{told}");
            assert!(
                !told.stderr.contains("--backup") && !told.stdout.contains("a target"),
                "{told}"
            );
        }
    }
    scene.primary.psql("INSERT INTO marks VALUES (4); SELECT pg_switch_wal()").await;
    agent.terminate().await.assert_success();
    assert_eq!(slot_lsn(&scene.primary).await, slot);
    assert_eq!(files(&scene.repository()), before);

    write(&scene.key(), &right);
    let receiving = Receiving { agent: scene.agent().spawn(&["run"]), scene };
    receiving.stored_all().await;
    if !has_backup {
        return;
    }
    receiving.scene.run(&["verify", "--wal"]).await.assert_success();
    let expected = if has_segments { "1,2,3,4" } else { "1,3,4" };
    assert_eq!(commits(&receiving.recover("restored").await).await, expected);
}

#[tokio::test]
async fn nothing_is_received_beside_a_backup_of_another_key() {
    if !postgres_is_missing() {
        nothing_is_received(Kind::Directory, true, true).await;
    }
}

#[tokio::test]
async fn nothing_is_received_beside_segments_of_another_key() {
    if !postgres_is_missing() {
        nothing_is_received(Kind::S3, true, false).await;
    }
}

#[tokio::test]
async fn nothing_is_received_beside_pieces_of_another_key() {
    if !postgres_is_missing() {
        nothing_is_received(Kind::Directory, false, false).await;
    }
}

/// The segment before tells, for one small read; and what is far from any other is refused too.
#[tokio::test]
async fn nothing_is_pushed_with_another_key() {
    if postgres_is_missing() {
        return;
    }
    let scene = Scene::with(Kind::S3, "").await;
    scene.archive_wal().await;
    scene.primary.psql("ALTER SYSTEM SET archive_command = 'false'; SELECT pg_reload_conf()").await;
    let name = scene.switch_wal().await;
    let data = data_directory(&scene, "copy");
    let content = fs::read(scene.primary.data_directory().join("pg_wal").join(&name)).unwrap();
    let mut far = content.clone();
    far[8..16].copy_from_slice(&(0x50_u64 << 24).to_le_bytes());
    for (name, content) in [(name.as_str(), &content), ("000000010000000000000050", &far)] {
        let path = data.join("pg_wal").join(name);
        fs::write(&path, content).unwrap();
        give_to_server_user(&path);
    }
    write(&data.join("pg_wal/00000002.history"), "1\t0/3000000\tno recovery target specified\n");

    let right = change_key(&scene);
    let before = files(&scene.repository());
    for file in [name.as_str(), "000000010000000000000050", "00000002.history"] {
        let refused = run_in(&scene, &data, &["wal-push", &format!("pg_wal/{file}")]).await;
        refused.assert_code(1);
        assert!(refused.stderr.contains(SAID), "{file}: {refused}");
        assert_eq!(files(&scene.repository()), before, "{file}");
    }
    write(&scene.key(), &right);
    let faults = scene.s3.as_ref().unwrap().faults();
    faults.forget_requests();
    run_in(&scene, &data, &["wal-push", &format!("pg_wal/{name}")]).await.assert_success();
    let asked: Vec<_> = faults.record().into_iter().map(|request| request.operation).collect();
    let (list, get) = (Operation::ListObjects, Operation::GetObject);
    // What is there of the segment, and its pieces; one object to try the key on; and whether another came.
    assert_eq!(asked, [list, list, get, Operation::PutObject, Operation::HeadObject, list]);

    // A new key with an id of its own is no wrong one, from its first segment on.
    let config = fs::read_to_string(scene.config()).unwrap();
    let second = scene.path("key2");
    write(&second, &format!("{}\n", "cd".repeat(32)));
    let keys = format!("[[encryption.keys]]\nid = \"k2\"\nfile = \"{}\"\n", second.display());
    let config = config.replace("write_key = \"k1\"", "write_key = \"k2\"");
    write(&scene.config(), &format!("{config}{keys}"));
    for file in ["000000010000000000000050", "00000002.history"] {
        run_in(&scene, &data, &["wal-push", &format!("pg_wal/{file}")]).await.assert_success();
    }
}

/// What the server has no other of is stored once more with the new key: the histories of its
/// timelines, which never expire.
#[tokio::test]
async fn a_key_is_given_up_after_a_failover() {
    if postgres_is_missing() {
        return;
    }
    let (mut receiving, standby) = Receiving::with_standby(Kind::Directory, WAL).await;
    eventually("the standby has the slot", LIMIT, async || !slot_lsn(&standby).await.is_empty())
        .await;
    receiving.primary().psql("CREATE TABLE marks (i int); INSERT INTO marks VALUES (1)").await;
    receiving.stored_all().await;
    standby.catch_up(receiving.primary()).await;
    receiving.scene.primary.stop(Mode::Immediate).await;
    standby.promote().await;
    stored_up_to(&standby, standby.current_lsn().await).await;
    receiving.scene.configure(&[&standby]);

    let config = fs::read_to_string(receiving.scene.config()).unwrap();
    let second = receiving.scene.path("key2");
    write(&second, &format!("{}\n", "cd".repeat(32)));
    let config = config.replace("write_key = \"k1\"", "write_key = \"k2\"");
    let both =
        format!("{config}[[encryption.keys]]\nid = \"k2\"\nfile = \"{}\"\n", second.display());
    let key = receiving.scene.key().display().to_string();
    let only = config.replace("\"k1\"", "\"k2\"").replace(&key, &second.display().to_string());
    assert_ne!(only, config);
    write(&receiving.scene.config(), &both);
    receiving.restart_agent().await;
    standby.psql("SELECT pg_switch_wal(); INSERT INTO marks VALUES (2)").await;
    stored_up_to(&standby, standby.current_lsn().await).await;
    receiving.scene.backup().await;
    let histories = || objects(&receiving.scene, "00000002.history");
    let twice = histories();
    assert_eq!(twice.len(), 2, "{twice:?}");

    // Without the old key, and without what was stored beside: the server has it.
    write(&receiving.scene.config(), &only);
    let longest = twice.iter().max_by_key(|path| path.as_os_str().len()).unwrap();
    fs::remove_file(longest).unwrap();
    let check = receiving.scene.run(&["check"]).await;
    assert!(check.stdout.contains("00000002.history-"), "{check}");
    receiving.restart_agent().await;
    standby.psql("INSERT INTO marks VALUES (3)").await;
    stored_up_to(&standby, standby.current_lsn().await).await;
    assert_eq!(objects(&receiving.scene, "00000002.history"), twice);
    let check = receiving.scene.run(&["check"]).await;
    assert!(!check.stdout.contains("00000002.history-"), "{check}");

    // The backup of the old key stays, and stops nothing.
    let expire = receiving.scene.run(&["expire"]).await;
    expire.assert_success();
    assert!(expire.stdout.contains("its key is not configured"), "{expire}");
    receiving.scene.run(&["list", "--wal"]).await.assert_code(0);
    let restored = receiving.recover("restored").await;
    assert_eq!(commits(&restored).await, "1,2,3");
}
