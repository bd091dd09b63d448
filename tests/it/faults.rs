//! The agent is killed, the store fails, the servers change roles: no backup that is not whole is
//! ever listed, and the next run succeeds and cleans up what is its own.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use harness::postgres::postgres_is_missing;
use harness::{Agent, At, Effect, Fault, Mode, Operation, PgServer, Proxy, Refusal, eventually};

use crate::scene::{Kind, Scene, files};

const LIMIT: Duration = Duration::from_mins(1);
/// Backups of several parts, each part of several uploads.
const SMALL_OBJECTS: &str = "[backup]\nobject_bytes = 16777216\npart_bytes = 5242880\n";

async fn fill(server: &PgServer, mib: u32) {
    let rows = mib * 128;
    server
        .psql(&format!(
            "CREATE TABLE fill AS SELECT i, (SELECT string_agg(md5(i || ' ' || n), '') \
             FROM generate_series(1, 250) AS n) AS text FROM generate_series(1, {rows}) AS i"
        ))
        .await;
}

/// Objects and uploads below `base/` that no listed backup explains.
async fn leftovers(scene: &Scene) -> Vec<String> {
    let listed: Vec<String> = scene
        .list()
        .await
        .iter()
        .map(|backup| backup["backup_id"].as_str().unwrap().to_owned())
        .collect();
    let explained = |name: &String| listed.iter().any(|id| name.contains(id));
    let mut left: Vec<String> = match &scene.s3 {
        Some(s3) => {
            let uploads = s3.bucket().unfinished_uploads();
            let uploads = uploads.iter().map(|upload| format!("upload {upload:?}"));
            s3.bucket().keys("v1/").into_iter().chain(uploads).collect()
        }
        None => files(&scene.repository()).iter().map(|path| path.display().to_string()).collect(),
    };
    left.retain(|name| (name.contains("base") || name.contains("upload")) && !explained(name));
    left
}

/// Kills the agent at each of its steps.
async fn killed_at_each_step(kind: Kind) {
    let scene = Scene::with(kind, &format!("{SMALL_OBJECTS}rate_bytes_max = 20971520\n")).await;
    fill(&scene.primary, 24).await;
    for stage in
        ["asking the servers", "checkpoint", "copying", "checking", "waiting for WAL", "committing"]
    {
        let before = scene.list().await.len();
        let agent = scene.agent().env("RUST_LOG", "debug");
        let mut running = agent.spawn(&["backup"]);
        running.logged(&format!("\"stage\":\"{stage}\""), LIMIT).await;
        if stage == "copying" {
            eventually("a part is on its way", LIMIT, async || match &scene.s3 {
                Some(s3) => s3.requests(Operation::UploadPart) > 0,
                // An upload may be over between two looks; its object stays.
                None => files(&scene.repository()).iter().any(|path| {
                    let path = path.display().to_string();
                    path.contains("/.uploads/") || path.contains("/part-")
                }),
            })
            .await;
        }
        running.kill9().await;
        let listed = scene.list().await;
        // On a slow machine a run is past the last steps before the signal arrives. What is listed
        // then must be whole.
        let is_late = ["checking", "waiting for WAL", "committing"].contains(&stage);
        let most = before + usize::from(is_late);
        assert!((before..=most).contains(&listed.len()), "killed at {stage}: {listed:?}");
        if listed.len() > before {
            scene.run(&["verify"]).await.assert_success();
        }
    }
    scene.backup().await;
    let left = leftovers(&scene).await;
    assert!(left.is_empty(), "left behind: {left:?}");
    scene.run(&["verify"]).await.assert_success();
    let to =
        scene.restore("restored", &["--target", "immediate", "--target-action", "promote"]).await;
    let restored = PgServer::start_existing(&to).await;
    restored.recovered().await;
    assert_eq!(restored.psql("SELECT count(*) FROM fill").await, (24 * 128).to_string());
}

#[tokio::test]
async fn a_backup_killed_at_any_step_leaves_nothing_that_is_listed_in_a_directory() {
    if !postgres_is_missing() {
        Box::pin(killed_at_each_step(Kind::Directory)).await;
    }
}

#[tokio::test]
async fn a_backup_killed_at_any_step_leaves_nothing_that_is_listed_on_s3() {
    if !postgres_is_missing() {
        Box::pin(killed_at_each_step(Kind::S3)).await;
    }
}

#[tokio::test]
async fn a_passing_fault_of_the_store_is_overcome() {
    if postgres_is_missing() {
        return;
    }
    let scene = Scene::with(Kind::S3, SMALL_OBJECTS).await;
    fill(&scene.primary, 24).await;
    scene.archive_wal().await;
    let faults = scene.s3.as_ref().unwrap().faults();
    let cases = [
        ("503 SlowDown", Fault::new(Effect::Refuse(Refusal::SlowDown)).times(3)),
        (
            "429",
            Fault::new(Effect::Refuse(Refusal::TooManyRequests)).on(Operation::UploadPart).times(2),
        ),
        (
            "500",
            Fault::new(Effect::Refuse(Refusal::InternalError)).on(Operation::UploadPart).times(2),
        ),
        ("a lost answer", Fault::new(Effect::LoseAnswer).on(Operation::PutObject).times(2)),
        (
            "a lost answer to a part",
            Fault::new(Effect::LoseAnswer).on(Operation::UploadPart).times(2),
        ),
        (
            "a lost answer to the last",
            Fault::new(Effect::LoseAnswer).on(Operation::CompleteMultipartUpload).times(1),
        ),
        ("a request never answered", Fault::new(Effect::Stall).on(Operation::UploadPart).times(1)),
        ("slowness", Fault::new(Effect::Delay(Duration::from_millis(200)))),
    ];
    for (case, fault) in cases {
        let id = faults.add(fault);
        let finished = scene.run(&["backup"]).await;
        assert!(finished.is_success(), "{case}: {finished}");
        assert!(faults.hits(id) > 0, "{case} befell nothing");
        faults.clear();
    }
    scene.run(&["verify"]).await.assert_success();
}

#[tokio::test]
async fn a_lasting_fault_of_the_store_fails_the_backup_and_nothing_is_listed() {
    if postgres_is_missing() {
        return;
    }
    let scene = Scene::with(Kind::S3, SMALL_OBJECTS).await;
    fill(&scene.primary, 24).await;
    scene.archive_wal().await;
    let faults = scene.s3.as_ref().unwrap().faults();
    let part = |effect| Fault::new(effect).on(Operation::UploadPart);
    let cases = [
        ("refusing", part(Effect::Refuse(Refusal::ServiceUnavailable)), "ServiceUnavailable"),
        ("no permission", part(Effect::Refuse(Refusal::AccessDenied)), "AccessDenied"),
        ("silent", part(Effect::Stall), "part-0000"),
        ("a part kept short", part(Effect::StoreTruncated { bytes: 100 }).times(1), "part-0000"),
        ("nothing kept", Fault::new(Effect::StoreNothing).key("/files"), "files"),
        (
            "the commit refused",
            Fault::new(Effect::Refuse(Refusal::InternalError)).key("/commit"),
            "commit",
        ),
    ];
    for (case, fault, named) in cases {
        let id = faults.add(fault);
        let finished = scene.agent().limit(Duration::from_mins(3)).run(&["backup"]).await;
        finished.assert_code(1);
        assert!(faults.hits(id) > 0, "{case} befell nothing");
        assert!(finished.stderr.contains(named), "{case}: the message names it: {finished}");
        faults.clear();
        assert_eq!(scene.list().await.len(), 0, "{case}");
        // The commit object may come late: what it names stays until the next run.
        if case != "the commit refused" {
            assert_eq!(leftovers(&scene).await, Vec::<String>::new(), "{case}");
        }
    }
    scene.backup().await;
    assert_eq!(leftovers(&scene).await, Vec::<String>::new());
}

#[tokio::test]
async fn a_download_that_breaks_or_lies_is_repeated_or_refused() {
    if postgres_is_missing() {
        return;
    }
    let scene = Scene::with(Kind::S3, SMALL_OBJECTS).await;
    fill(&scene.primary, 24).await;
    scene.backup().await;
    let faults = scene.s3.as_ref().unwrap().faults();
    let get = |effect| Fault::new(effect).on(Operation::GetObject).key("part-0000");
    let overcome = [
        ("cut at half", get(Effect::CutBody(At::Fraction(0.5))).times(3)),
        ("throttled", get(Effect::Throttle { bytes_per_second: 4 << 20 })),
    ];
    for (number, (case, fault)) in overcome.into_iter().enumerate() {
        let id = faults.add(fault);
        let name = format!("restored-{number}");
        scene.restore(&name, &["--target", "immediate"]).await;
        assert!(faults.hits(id) > 0, "{case} befell nothing");
        faults.clear();
    }
    faults.add(get(Effect::FlipBit(At::Fraction(0.5))));
    let to = scene.path("refused");
    let refused =
        scene.run(&["restore", "--archive-mode", "off", "--to", to.to_str().unwrap()]).await;
    refused.assert_code(1);
    assert!(refused.stderr.contains("part-0000"), "{refused}");
    assert!(!to.join("global/pg_control").exists(), "the copy could start");
}

/// What is on disk is not fetched again, and what comes out is the same.
#[tokio::test]
async fn a_restore_that_was_stopped_is_resumed() {
    if postgres_is_missing() {
        return;
    }
    let scene = Scene::with(Kind::S3, SMALL_OBJECTS).await;
    fill(&scene.primary, 48).await;
    scene.backup().await;
    let faults = scene.s3.as_ref().unwrap().faults();
    let last = Fault::new(Effect::Refuse(Refusal::AccessDenied)).on(Operation::GetObject);
    faults.add(last.key("part-00003"));
    let to = scene.path("restored");
    let to = to.to_str().unwrap();
    let stopped = scene.run(&["restore", "--archive-mode", "off", "--to", to]).await;
    stopped.assert_code(1);
    assert!(stopped.stderr.contains("--resume"), "{stopped}");
    faults.clear();

    let not_empty = scene.run(&["restore", "--archive-mode", "off", "--to", to]).await;
    not_empty.assert_code(1);
    scene.run(&["restore", "--archive-mode", "off", "--resume", "--to", to]).await.assert_success();
    scene.primary.run("pg_verifybackup", &["--no-parse-wal", to]).await;
    let restored = PgServer::start_existing(&PathBuf::from(to)).await;
    restored.recovered().await;
    assert_eq!(restored.psql("SELECT count(*) FROM fill").await, (48 * 128).to_string());

    let nothing = scene.path("nothing");
    let refused = scene
        .run(&["restore", "--archive-mode", "off", "--resume", "--to", nothing.to_str().unwrap()])
        .await;
    refused.assert_code(1);
    assert!(refused.stderr.contains("leave --resume away"), "{refused}");
}

/// A file system of a few megabytes, which only whoever starts the tests can make.
#[tokio::test]
async fn a_full_disk_stops_a_restore_with_its_name() {
    if postgres_is_missing() {
        return;
    }
    let Some(small) = std::env::var_os("PGMESH_TEST_SMALL_DISK").map(PathBuf::from) else {
        return harness::skip("no small file system (PGMESH_TEST_SMALL_DISK is not set)");
    };
    let scene = Scene::with(Kind::S3, "").await;
    fill(&scene.primary, 96).await;
    scene.backup().await;
    let to = small.join("restored");
    let refused =
        scene.run(&["restore", "--archive-mode", "off", "--to", to.to_str().unwrap()]).await;
    refused.assert_code(1);
    assert!(refused.stderr.contains("has room for"), "{refused}");
    assert!(!to.exists(), "nothing was to be made");

    // The disk of a tablespace is another.
    let location = scene.primary.tablespace("big").await;
    scene.primary.psql("ALTER TABLE fill SET TABLESPACE big").await;
    scene.backup().await;
    let big = small.join("big");
    let map = format!("{}={}", location.display(), big.display());
    let data = scene.path("restored");
    let arguments =
        ["restore", "--archive-mode", "off", "--to", data.to_str().unwrap(), "--tablespace", &map];
    let refused = scene.run(&arguments).await;
    refused.assert_code(1);
    let says = format!("{} has room for", big.display());
    assert!(refused.stderr.contains(&says), "{refused}");

    // Somebody else takes the room while the restore runs.
    scene.primary.psql("DELETE FROM fill WHERE i > 2000").await;
    scene.primary.psql("VACUUM FULL fill").await;
    scene.backup().await;
    let faults = scene.s3.as_ref().unwrap().faults();
    let slow = Fault::new(Effect::Delay(Duration::from_secs(2))).on(Operation::GetObject);
    let slow = faults.add(slow.key("/part-"));
    let running = scene.agent().spawn(&arguments);
    eventually("it reads", LIMIT, async || faults.hits(slow) > 0).await;
    let filler = small.join("filler");
    fs::write(&filler, vec![1; 64 << 20]).unwrap_err();
    let full = running.wait().await;
    full.assert_code(1);
    assert!(full.stderr.contains(small.to_str().unwrap()), "{full}");
    assert!(full.stderr.contains("No space left on device"), "{full}");
    assert!(!data.join("global/pg_control").exists(), "the copy could start");
    fs::remove_file(filler).unwrap();
    fs::remove_dir_all(big).unwrap();
}

#[tokio::test]
async fn a_promotion_in_the_middle_fails_the_backup_and_the_next_one_succeeds() {
    if postgres_is_missing() {
        return;
    }
    let extra = format!("{SMALL_OBJECTS}rate_bytes_max = 8388608\n");
    let mut scene = Scene::with(Kind::Directory, &extra).await;
    fill(&scene.primary, 24).await;
    let standby = scene.primary.standby("standby1").await;
    standby.catch_up(&scene.primary).await;
    scene.configure(&[&scene.primary, &standby]);
    let agent = scene.agent().env("RUST_LOG", "debug");
    let mut running = agent.spawn(&["backup"]);
    running.logged("\"stage\":\"copying\"", LIMIT).await;
    scene.primary.stop(Mode::Immediate).await;
    standby.promote().await;
    let failed = running.wait().await;
    failed.assert_code(1);
    scene.configure(&[&standby]);
    assert!(scene.list().await.is_empty());
    scene.backup().await;
    assert_eq!(leftovers(&scene).await, Vec::<String>::new());
    scene.run(&["verify"]).await.assert_success();
}

#[tokio::test]
async fn a_restart_of_the_primary_in_the_middle_fails_the_backup() {
    if postgres_is_missing() {
        return;
    }
    let extra = format!("{SMALL_OBJECTS}rate_bytes_max = 8388608\n");
    let mut scene = Scene::with(Kind::Directory, &extra).await;
    fill(&scene.primary, 24).await;
    let standby = scene.primary.standby("standby1").await;
    standby.catch_up(&scene.primary).await;
    scene.configure(&[&scene.primary, &standby]);
    let agent = scene.agent().env("RUST_LOG", "debug");
    let mut running = agent.spawn(&["backup"]);
    running.logged("\"stage\":\"copying\"", LIMIT).await;
    scene.primary.restart().await;
    let failed = running.wait().await;
    // The standby's stream went on, but the lock is gone: another run may have begun.
    failed.assert_code(1);
    assert!(scene.list().await.is_empty());
    standby.catch_up(&scene.primary).await;
    scene.backup().await;
}

#[tokio::test]
async fn a_server_that_stalls_is_given_up() {
    if postgres_is_missing() {
        return;
    }
    let extra = format!("{SMALL_OBJECTS}rate_bytes_max = 8388608\nstall_timeout = \"2s\"\n");
    let scene = Scene::with(Kind::Directory, &extra).await;
    fill(&scene.primary, 24).await;
    let proxy = Proxy::start(scene.primary.socket()).await;
    scene.configure_address(&proxy.address().ip().to_string(), proxy.port());
    let agent = scene.agent().env("RUST_LOG", "debug");
    let mut running = agent.spawn(&["backup"]);
    running.logged("\"stage\":\"copying\"", LIMIT).await;
    proxy.stall();
    let failed = running.wait().await;
    failed.assert_code(1);
    assert!(failed.stderr.contains("sent nothing for 2 s"), "{failed}");
    proxy.heal();
    assert!(scene.list().await.is_empty());
    scene.backup().await;
}

#[tokio::test]
async fn two_runs_of_one_group_exclude_each_other() {
    if postgres_is_missing() {
        return;
    }
    let extra = format!("{SMALL_OBJECTS}rate_bytes_max = 8388608\n");
    let scene = Scene::with(Kind::Directory, &extra).await;
    fill(&scene.primary, 24).await;
    let agent = scene.agent().env("RUST_LOG", "debug");
    let mut first = agent.spawn(&["backup"]);
    first.logged("\"stage\":\"copying\"", LIMIT).await;
    let second = scene.run(&["backup"]).await;
    second.assert_code(1);
    assert!(second.stderr.contains("another base backup of group 0 is under way"), "{second}");
    first.wait().await.assert_success();
    assert_eq!(scene.list().await.len(), 1);
}

#[tokio::test]
async fn wal_that_does_not_come_fails_the_backup_with_a_hint() {
    if postgres_is_missing() {
        return;
    }
    let scene = Scene::with(Kind::Directory, "[backup]\nwal_timeout = \"3s\"\n").await;
    scene.primary.psql("ALTER SYSTEM SET archive_command = 'false'; SELECT pg_reload_conf()").await;
    let failed = scene.run(&["backup"]).await;
    failed.assert_code(1);
    assert!(failed.stderr.contains("pg_stat_archiver"), "{failed}");
    assert!(scene.list().await.is_empty());
}

/// Said before hours of copying, not after.
#[tokio::test]
async fn a_server_that_does_not_archive_is_refused_at_once() {
    if postgres_is_missing() {
        return;
    }
    let scene = Scene::new().await;
    let server = PgServer::builder().setting("archive_mode", "off").primary().await;
    scene.configure(&[&server]);
    let refused = scene.run(&["backup"]).await;
    refused.assert_code(1);
    assert!(refused.stderr.contains("archive_mode is off"), "{refused}");
    assert!(!refused.stderr.contains("base backup started"), "{refused}");
}

/// Under Object Lock nothing can be overwritten or deleted, and nothing has to be.
#[tokio::test]
async fn a_bucket_under_object_lock_is_enough() {
    if postgres_is_missing() {
        return;
    }
    let scene = Scene::with(Kind::S3, SMALL_OBJECTS).await;
    let faults = scene.s3.as_ref().unwrap().faults();
    faults.object_lock(true);
    fill(&scene.primary, 24).await;
    let agent = scene.agent().env("RUST_LOG", "debug");
    let mut killed = agent.spawn(&["backup"]);
    killed.logged("\"stage\":\"waiting for WAL\"", LIMIT).await;
    killed.kill9().await;
    scene.backup().await;
    scene.backup().await;
    scene.run(&["check"]).await.assert_success();
    let expired = scene.run(&["expire", "--apply"]).await;
    expired.assert_success();
    scene.run(&["verify"]).await.assert_success();
    let to = scene.restore("restored", &["--target", "immediate"]).await;
    scene.primary.run("pg_verifybackup", &["--no-parse-wal", to.to_str().unwrap()]).await;
}

/// A new key writes, the old one still reads; without it, the message says which is missing.
#[tokio::test]
async fn keys_are_rotated_without_rewriting_anything() {
    if postgres_is_missing() {
        return;
    }
    let scene = Scene::new().await;
    scene.backup().await;
    let new_key = scene.path("new-key");
    Agent::without_config().run(&["new-key", new_key.to_str().unwrap()]).await.assert_success();
    let old = fs::read_to_string(scene.config()).unwrap();
    let both = old.replace("write_key = \"k1\"", "write_key = \"k2\"")
        + &format!("[[encryption.keys]]\nid = \"k2\"\nfile = \"{}\"\n", new_key.display());
    crate::scene::write(&scene.config(), &both);
    scene.backup().await;
    scene.run(&["verify"]).await.assert_success();
    assert_eq!(scene.list().await.len(), 2);

    crate::scene::write(&scene.config(), &old);
    let without = scene.run(&["list"]).await;
    without.assert_code(1);
    assert!(without.stdout.contains("encrypted with key k2, which is not configured"), "{without}");
}

/// One id never means two keys: a run with the wrong one stops before it writes.
#[tokio::test]
async fn a_wrong_key_under_the_same_id_writes_no_backup() {
    if postgres_is_missing() {
        return;
    }
    let scene = Scene::new().await;
    scene.backup().await;
    let (key, right) = (scene.key(), scene.path("right-key"));
    fs::rename(&key, &right).unwrap();
    Agent::without_config().run(&["new-key", key.to_str().unwrap()]).await.assert_success();
    let refused = scene.run(&["backup"]).await;
    refused.assert_code(1);
    assert!(refused.stderr.contains("another key under the id"), "{refused}");
    scene.run(&["check"]).await.assert_code(1);
    fs::rename(&right, &key).unwrap();
    assert_eq!(scene.list().await.len(), 1);
    scene.run(&["verify"]).await.assert_success();
}

/// Marked first, brought back by removing the mark, deleted later; and `verify` stays content.
#[tokio::test]
async fn retention_marks_then_deletes_and_a_mark_can_be_taken_back() {
    if postgres_is_missing() {
        return;
    }
    let rules = |delete_after: &str| {
        format!(
            "[retention]\ndaily = 1\nweekly = 0\nmonthly = 0\nwal = \"0s\"\ndelete_after = \"{delete_after}\"\n"
        )
    };
    let scene = Scene::with(Kind::Directory, &rules("1h")).await;
    for _ in 0..3 {
        scene.backup().await;
    }
    let dry = scene.run(&["expire"]).await;
    dry.assert_success();
    assert!(dry.stdout.contains("nothing was changed"), "{dry}");
    scene.run(&["expire", "--group", "9"]).await.assert_code(1);
    assert_eq!(scene.list().await.len(), 3);
    scene.run(&["expire", "--apply"]).await.assert_success();
    assert_eq!(scene.list().await.len(), 1);
    scene.run(&["verify"]).await.assert_success();

    // Taken back: all three can be restored again, their WAL included.
    let tombstones: Vec<_> = files(&scene.repository())
        .into_iter()
        .filter(|path| path.display().to_string().contains("/tombstone/"))
        .collect();
    assert_eq!(tombstones.len(), 2);
    for tombstone in &tombstones {
        fs::remove_file(tombstone).unwrap();
    }
    assert_eq!(scene.list().await.len(), 3);
    scene.run(&["verify"]).await.assert_success();

    let text = fs::read_to_string(scene.config()).unwrap();
    crate::scene::write(&scene.config(), &text.replace("\"1h\"", "\"0s\""));
    let labels = || {
        let all = files(&scene.repository());
        all.iter().filter(|path| path.display().to_string().contains(".backup-")).count()
    };
    eventually("the labels are archived", LIMIT, async || labels() == 3).await;
    for run in 0..2 {
        let dry = scene.run(&["expire"]).await;
        dry.assert_success();
        let says_why = dry.stdout.contains("no kept backup needs the WAL that they go with");
        assert_eq!(says_why, run == 1, "{dry}");
        scene.run(&["expire", "--apply"]).await.assert_success();
    }
    // Labels of archived backups go with the WAL around them.
    assert_eq!(labels(), 1, "labels of backups");
    let bases = files(&scene.repository());
    let bases = bases.iter().filter(|path| path.display().to_string().contains("/base/"));
    let ids: std::collections::BTreeSet<_> = bases.map(|path| path.parent().unwrap()).collect();
    assert_eq!(ids.len(), 1, "{ids:?}");
    scene.run(&["verify"]).await.assert_success();
    scene.restore("restored", &["--target", "immediate"]).await;
}
