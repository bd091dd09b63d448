//! The WAL that a backup needs comes into its own repository, or the backup is refused and says why; and
//! what a copy tool left among the WAL is no content of it.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use harness::postgres::postgres_is_missing;
use harness::{Agent, Finished};
use serde_json::Value;
use tokio::time::{Instant, sleep};

use crate::receive::{LIMIT, Receiving, WAL, commits, objects};
use crate::scene::{Kind, Scene, write};

/// The agent with a configuration of its own: that of the scene, in which these words are others.
fn other(scene: &Scene, name: &str, words: &[(&str, &str)]) -> Agent {
    let mut text = fs::read_to_string(scene.config()).unwrap();
    for (old, new) in words {
        assert!(text.contains(old), "no {old} in {text}");
        text = text.replace(old, new);
    }
    let config = scene.path(name);
    write(&config, &text);
    Agent::new(&config)
}

async fn json(agent: &Agent, arguments: &[&str]) -> (Finished, Value) {
    let finished = agent.run(&[arguments, &["--json"]].concat()).await;
    let value = serde_json::from_str(&finished.stdout).unwrap_or_default();
    (finished, value)
}

fn outcome<'a>(steps: &'a Value, step: &str) -> &'a str {
    let found = steps.as_array().unwrap().iter().find(|it| it["step"] == step);
    found.map_or("not there", |it| it["outcome"].as_str().unwrap())
}

#[tokio::test]
async fn a_receiver_that_stores_elsewhere_is_told_and_no_backup_waits_for_it() {
    if postgres_is_missing() {
        return;
    }
    let mut receiving = Receiving::start(Kind::Directory).await;
    let scene = &receiving.scene;
    let elsewhere = other(scene, "other.toml", &[("cluster = \"tests\"", "cluster = \"other\"")]);
    let (finished, steps) = json(&elsewhere, &["check"]).await;
    finished.assert_code(1);
    assert_eq!(outcome(&steps, "group 0: WAL receiver"), "failed", "{finished}");
    let began_at = Instant::now();
    let refused = elsewhere.run(&["backup"]).await;
    refused.assert_code(1);
    assert!(refused.stderr.contains("is stored elsewhere"), "{refused}");
    assert!(began_at.elapsed() < LIMIT, "waited for {:?}", began_at.elapsed());

    let (finished, steps) = json(&scene.agent(), &["check"]).await;
    finished.assert_success();
    assert_eq!(outcome(&steps, "group 0: WAL receiver"), "ok", "{finished}");
    scene.backup().await;
    // An archiver may store the rest: then it is worth a warning.
    scene.primary.psql("ALTER SYSTEM SET archive_mode = on").await;
    scene.primary.set("archive_command", "true").await;
    receiving.scene.primary.restart().await;
    receiving.stored_all().await;
    let (_, steps) = json(&elsewhere, &["check"]).await;
    assert_eq!(outcome(&steps, "group 0: WAL receiver"), "warning", "{steps}");
}

/// The standby's last checkpoint is older than the WAL of a new repository.
#[tokio::test]
async fn the_first_backup_of_a_new_repository_is_not_read_from_before_its_wal() {
    if postgres_is_missing() {
        return;
    }
    let (receiving, _standby) = Receiving::with_standby(Kind::Directory, WAL).await;
    let Receiving { scene, agent } = receiving;
    for _ in 0..3 {
        scene.switch_wal().await;
    }
    let receiving = Receiving { scene, agent };
    receiving.stored_all().await;
    let Receiving { scene, agent } = receiving;
    agent.terminate().await.assert_success();
    let section = "[repository.directory]";
    let prefixed = format!("[repository]\nprefix = \"new\"\n{section}");
    let new = other(&scene, "new.toml", &[(section, &prefixed)]);

    let verified = new.run(&["verify", "--json"]).await;
    verified.assert_code(1);
    let said: Value = serde_json::from_str(&verified.stdout).unwrap();
    assert!(said["error"].as_str().unwrap().starts_with("there is no backup of"), "{verified}");
    let mut running = new.spawn(&["run"]);
    running.logged("backup-agent begin --group 0", LIMIT).await;
    let (_, begun) = json(&new, &["begin"]).await;
    assert_eq!(begun[0]["group"], 0, "{begun}");
    running.logged("receiving WAL", LIMIT).await;
    let began_at = Instant::now();
    let (finished, taken) = json(&new, &["backup"]).await;
    finished.assert_success();
    assert!(finished.stderr.contains("is past it"), "{finished}");
    assert_eq!(taken[0]["from_standby"], false, "{taken}");
    assert!(began_at.elapsed() < LIMIT, "waited for {:?}", began_at.elapsed());
    new.run(&["verify"]).await.assert_success();
    running.terminate().await.assert_success();
}

/// A receiver waits up to 30 s between two attempts. Nobody else is needed.
#[tokio::test]
async fn a_backup_waits_for_a_receiver_that_comes_back() {
    if postgres_is_missing() {
        return;
    }
    let Receiving { scene, agent } = Receiving::start(Kind::Directory).await;
    agent.terminate().await.assert_success();
    let back = async {
        sleep(Duration::from_secs(5)).await;
        scene.agent().spawn(&["run"])
    };
    let (finished, running) = tokio::join!(scene.run(&["backup"]), back);
    finished.assert_success();
    running.terminate().await.assert_success();
}

/// Another key alone would leave a backup that its own configuration cannot restore.
#[tokio::test]
async fn a_backup_whose_wal_cannot_be_opened_is_refused() {
    if postgres_is_missing() {
        return;
    }
    let receiving = Receiving::start(Kind::Directory).await;
    let scene = &receiving.scene;
    let before = scene.list().await.len();
    let key = scene.path("key9");
    Agent::without_config().run(&["new-key", key.to_str().unwrap()]).await.assert_success();
    let [old, new] = [scene.key(), key].map(|key| format!("\"{}\"", key.display()));
    let nine = other(scene, "nine.toml", &[("\"k1\"", "\"k9\""), (&old, &new)]);
    let refused = nine.run(&["backup"]).await;
    refused.assert_code(1);
    assert!(refused.stderr.contains("cannot be opened with this configuration"), "{refused}");
    assert_eq!(scene.list().await.len(), before);
}

/// The newest complete segment that is stored.
fn newest(scene: &Scene) -> PathBuf {
    objects(scene, "/wal/").pop().unwrap()
}

fn beside(object: &Path, end: &str) -> PathBuf {
    let name = object.file_name().unwrap().to_str().unwrap();
    let segment = name.split('-').next().unwrap();
    object.with_file_name(format!("{segment}-{end}"))
}

#[tokio::test]
async fn what_a_copy_tool_left_behind_is_no_content_of_a_segment() {
    if postgres_is_missing() {
        return;
    }
    let receiving = Receiving::start(Kind::Directory).await;
    let (scene, primary) = (&receiving.scene, receiving.primary());
    primary.psql("CREATE TABLE marks (i int); INSERT INTO marks VALUES (1)").await;
    scene.switch_wal().await;
    primary.psql("INSERT INTO marks VALUES (2)").await;
    receiving.stored_all().await;
    let object = newest(scene);
    let good = fs::read(&object).unwrap();
    let half = good.len() / 2;
    for (case, end, content, said) in [
        ("a name that is none", "aaaa.tmp", &b"x\n"[..], "has no name of WAL"),
        ("not even a header", "0123456789abcdef", b"x\n", "0123456789abcdef"),
        ("broken off", "fedcba9876543210", &good[..half], "fedcba9876543210"),
        ("of another name", "00000000ffffffff", &good, "00000000ffffffff"),
    ] {
        let left = beside(&object, end);
        write_bytes(&left, content);
        let (listed, backups) = json(&scene.agent(), &["list"]).await;
        listed.assert_success();
        assert_eq!(backups[0]["window"]["ends_with"]["reason"], "end", "{case}: {backups}");
        scene.run(&["verify"]).await.assert_success();
        let verified = scene.run(&["verify", "--wal"]).await;
        verified.assert_code(1);
        assert!(verified.stdout.contains(said), "{case}: {verified}");
        assert!(!verified.stdout.contains("two servers"), "{case}: {verified}");
        let restored = receiving.recover(end).await;
        assert_eq!(commits(&restored).await, "1,2", "{case}");
        scene.backup().await;
        fs::remove_file(&left).unwrap();
    }
    scene.run(&["verify", "--wal"]).await.assert_success();
}

fn write_bytes(path: &Path, content: &[u8]) {
    fs::write(path, content).unwrap();
    harness::program::give_to_server_user(path);
}
