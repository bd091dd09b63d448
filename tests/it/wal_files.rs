//! `wal-push` and `wal-fetch`: what is stored, what is refused, and the exit codes on which a
//! recovery depends.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use harness::postgres::postgres_is_missing;
use harness::program::give_to_server_user;
use harness::{Effect, Fault, Finished, Mode, Operation, PgServer, Refusal, eventually};

use crate::scene::{Kind, Scene, files, write};

const LIMIT: Duration = Duration::from_mins(1);

/// Runs the agent with `data` as its working directory, as PostgreSQL does.
pub(crate) async fn run_in(scene: &Scene, data: &Path, arguments: &[&str]) -> Finished {
    let mut command = harness::program::command("/usr/bin/env");
    command.arg("-C").arg(data).arg(harness::agent::agent_binary());
    command.arg("--config").arg(scene.config()).args(["--log-format", "json"]).args(arguments);
    harness::program::finish(&mut command, LIMIT).await
}

/// A directory with the primary's `pg_control`, and room for WAL.
pub(crate) fn data_directory(scene: &Scene, name: &str) -> PathBuf {
    let data = scene.path(name);
    for directory in [data.clone(), data.join("global"), data.join("pg_wal")] {
        fs::create_dir_all(&directory).unwrap();
        give_to_server_user(&directory);
    }
    let control = "global/pg_control";
    fs::copy(scene.primary.data_directory().join(control), data.join(control)).unwrap();
    give_to_server_user(&data.join(control));
    data
}

/// Every complete segment in a server's `pg_wal`.
fn segments(data: &Path) -> Vec<String> {
    let names = files(&data.join("pg_wal"));
    let names = names.iter().map(|path| path.file_name().unwrap().to_string_lossy().into_owned());
    names.filter(|name| name.len() == 24).collect()
}

fn stored(scene: &Scene, name: &str) -> Vec<PathBuf> {
    let all = files(&scene.repository());
    all.into_iter().filter(|path| path.display().to_string().contains(name)).collect()
}

#[tokio::test]
async fn the_same_content_again_is_fine_and_other_content_is_refused() {
    if postgres_is_missing() {
        return;
    }
    let scene = Scene::new().await;
    scene.archive_wal().await;
    let data = data_directory(&scene, "copy");
    let name = segments(scene.primary.data_directory())[0].clone();
    let source = scene.primary.data_directory().join("pg_wal").join(&name);
    let copy = data.join("pg_wal").join(&name);
    fs::copy(&source, &copy).unwrap();
    give_to_server_user(&copy);
    let path = format!("pg_wal/{name}");
    run_in(&scene, &data, &["wal-push", &path]).await.assert_success();
    let before = stored(&scene, &name);
    assert_eq!(before.len(), 1);

    let mut content = fs::read(&copy).unwrap();
    content[100_000] ^= 1;
    fs::write(&copy, content).unwrap();
    let refused = run_in(&scene, &data, &["wal-push", &path]).await;
    refused.assert_code(1);
    assert!(refused.stderr.contains("CONFLICT"), "{refused}");
    assert_eq!(stored(&scene, &name), before, "the other content was stored");
    let fetched = run_in(&scene, &data, &["wal-fetch", &name, "fetched"]).await;
    fetched.assert_success();
    assert!(fs::read(data.join("fetched")).unwrap() == fs::read(&source).unwrap());
}

#[tokio::test]
async fn what_is_not_the_segment_of_its_name_is_refused() {
    if postgres_is_missing() {
        return;
    }
    let scene = Scene::new().await;
    scene.archive_wal().await;
    let data = data_directory(&scene, "copy");
    let name = segments(scene.primary.data_directory())[0].clone();
    let content = fs::read(scene.primary.data_directory().join("pg_wal").join(&name)).unwrap();
    let with = |at: usize, byte: u8| {
        let mut content = content.clone();
        content[at] ^= byte;
        content
    };
    let cases = [
        ("a name of no WAL file", "settings.conf", content.clone(), "not the name of a WAL file"),
        ("another number", "0000000100000000000000AA", content.clone(), "page address"),
        ("another cluster", &name, with(24, 1), "system identifier"),
        ("another segment size", &name, with(34, 1), "segment"),
        (
            "no WAL at all",
            &name,
            b"not WAL, but long enough for a header, surely".to_vec(),
            "magic",
        ),
        ("cut short", &name, content[..1 << 20].to_vec(), "bytes, a segment has"),
        ("empty", &name, Vec::new(), "ends after 0 bytes"),
        ("a timeline from the future", &name, with(4, 8), "timeline"),
        ("a history of nothing", "00000002.history", Vec::new(), "names no timeline"),
    ];
    for (case, file, content, said) in cases {
        let path = data.join("pg_wal").join(file);
        fs::write(&path, content).unwrap();
        give_to_server_user(&path);
        let refused = run_in(&scene, &data, &["wal-push", &format!("pg_wal/{file}")]).await;
        refused.assert_code(1);
        assert!(refused.stderr.contains(said), "{case}: {refused}");
        assert!(stored(&scene, "AA-").is_empty(), "{case}");
    }
    let outside = run_in(&scene, &scene.path(""), &["wal-push", "copy/pg_wal/x"]).await;
    outside.assert_code(1);
}

/// Only the first segment of a timeline begins with what is before it.
#[tokio::test]
async fn a_segment_of_an_earlier_timeline_is_refused_unless_the_history_says_so() {
    if postgres_is_missing() {
        return;
    }
    let scene = Scene::new().await;
    scene.archive_wal().await;
    let data = data_directory(&scene, "copy");
    let name = segments(scene.primary.data_directory())[0].clone();
    let content = fs::read(scene.primary.data_directory().join("pg_wal").join(&name)).unwrap();
    let number = u32::from_str_radix(&name[16..], 16).unwrap();
    let push = async |file: &str, content: &[u8]| {
        let path = data.join("pg_wal").join(file);
        fs::write(&path, content).unwrap();
        give_to_server_user(&path);
        run_in(&scene, &data, &["wal-push", &format!("pg_wal/{file}")]).await
    };
    let left_in = |segment: u32| format!("1\t0/{:X}\tno recovery target\n", (segment << 24) + 256);
    let named = |timeline: u32| format!("{timeline:08X}{}", &name[8..]);

    let refused = push(&named(2), &content).await;
    refused.assert_code(1);
    assert!(refused.stderr.contains("no 00000002.history is stored"), "{refused}");
    push("00000002.history", left_in(number + 1).as_bytes()).await.assert_success();
    let refused = push(&named(2), &content).await;
    refused.assert_code(1);
    assert!(refused.stderr.contains("two servers wrote timeline 2"), "{refused}");
    assert!(stored(&scene, "/wal/00000002/").is_empty());
    push("00000003.history", left_in(number).as_bytes()).await.assert_success();
    push(&named(3), &content).await.assert_success();
    assert_eq!(stored(&scene, &named(3)).len(), 1);
}

#[tokio::test]
async fn wal_fetch_exits_with_1_only_if_the_file_was_never_produced() {
    if postgres_is_missing() {
        return;
    }
    let scene = Scene::new().await;
    scene.backup().await;
    for _ in 0..4 {
        scene.primary.psql("CREATE TABLE IF NOT EXISTS t (i int); INSERT INTO t VALUES (1)").await;
        scene.archive_wal().await;
    }
    let data = data_directory(&scene, "copy");
    let mut names: Vec<String> = stored(&scene, "/wal/")
        .iter()
        .map(|path| path.file_name().unwrap().to_string_lossy()[..24].to_owned())
        .collect();
    names.sort();
    let newest = names.last().unwrap().clone();
    let next =
        format!("{}{:08X}", &newest[..16], u32::from_str_radix(&newest[16..], 16).unwrap() + 1);
    let missing = names[names.len() - 2].clone();
    fs::remove_file(&stored(&scene, &missing)[0]).unwrap();

    let codes = [
        ("a stored segment", newest.as_str(), 0),
        ("the one after the newest", next.as_str(), 1),
        ("a history file of no timeline", "00000002.history", 1),
        ("a segment of a timeline that never was", "000000020000000000000003", 254),
        ("a segment in a gap", missing.as_str(), 254),
        ("nonsense", "nonsense", 254),
    ];
    for (case, file, code) in codes {
        let finished = run_in(&scene, &data, &["wal-fetch", file, "fetched"]).await;
        assert_eq!(finished.code(), Some(code), "{case}: {finished}");
        assert_eq!(data.join("fetched").exists(), code == 0, "{case}");
        fs::remove_file(data.join("fetched")).ok();
    }

    // A mount that is gone, or another cluster's name: an empty place proves nothing.
    let right = fs::read_to_string(scene.config()).unwrap();
    write(&scene.config(), &right.replace("cluster = \"tests\"", "cluster = \"test\""));
    for file in [newest.as_str(), &next, "00000002.history"] {
        let nothing = run_in(&scene, &data, &["wal-fetch", file, "fetched"]).await;
        assert_eq!(nothing.code(), Some(254), "{file}: {nothing}");
        assert!(nothing.stderr.contains("wrong mount"), "{nothing}");
    }
    write(&scene.config(), &right);

    // A standby goes on to stream where a recovery must stop.
    write(&data.join("standby.signal"), "");
    let standby = run_in(&scene, &data, &["wal-fetch", &missing, "fetched"]).await;
    standby.assert_code(1);
    assert!(standby.stderr.contains("left to streaming"), "{standby}");
    fs::remove_file(data.join("standby.signal")).unwrap();

    // Everything that goes wrong before the repository is even asked.
    let no_control = scene.path("empty");
    fs::create_dir(&no_control).unwrap();
    give_to_server_user(&no_control);
    for (case, arguments, directory) in [
        ("outside a data directory", vec!["wal-fetch", &newest, "fetched"], &no_control),
        ("an argument missing", vec!["wal-fetch", &newest], &data),
        ("an unknown option", vec!["wal-fetch", &newest, "fetched", "--fast"], &data),
        ("a place that cannot be written", vec!["wal-fetch", &newest, "no/such/place"], &data),
    ] {
        let finished = run_in(&scene, directory, &arguments).await;
        assert_eq!(finished.code(), Some(254), "{case}: {finished}");
    }
    write(&scene.config(), "cluster = \"tests\"\nnonsense = true\n");
    let garbage = run_in(&scene, &data, &["wal-fetch", &newest, "fetched"]).await;
    garbage.assert_code(254);
}

#[tokio::test]
async fn a_store_that_does_not_answer_stops_a_recovery_and_not_a_standby() {
    if postgres_is_missing() {
        return;
    }
    let scene = Scene::with(Kind::S3, "").await;
    scene.archive_wal().await;
    let data = data_directory(&scene, "copy");
    let name = segments(scene.primary.data_directory())[0].clone();
    let faults = scene.s3.as_ref().unwrap().faults();
    for effect in
        [Effect::Refuse(Refusal::ServiceUnavailable), Effect::Refuse(Refusal::AccessDenied)]
    {
        faults.clear();
        faults.add(Fault::new(effect));
        let finished = run_in(&scene, &data, &["wal-fetch", &name, "fetched"]).await;
        finished.assert_code(254);
        assert!(!data.join("fetched").exists());
    }
    faults.clear();
    faults.add(Fault::new(Effect::Refuse(Refusal::ServiceUnavailable)));
    write(&data.join("standby.signal"), "");
    run_in(&scene, &data, &["wal-fetch", &name, "fetched"]).await.assert_code(1);
    faults.clear();
    run_in(&scene, &data, &["wal-fetch", &name, "fetched"]).await.assert_success();
}

/// Names are unique by content, so a store that ignores conditional puts loses nothing: both
/// contents are there, and everybody is told.
#[tokio::test]
async fn two_writers_of_one_segment_lose_nothing_on_a_store_that_ignores_conditions() {
    if postgres_is_missing() {
        return;
    }
    let scene = Scene::with(Kind::S3, "").await;
    let faults = scene.s3.as_ref().unwrap().faults();
    faults.ignore_conditions(true);
    scene.archive_wal().await;
    let data = data_directory(&scene, "copy");
    let name = segments(scene.primary.data_directory())[0].clone();
    let content = fs::read(scene.primary.data_directory().join("pg_wal").join(&name)).unwrap();

    // A segment that nobody has stored yet, with two contents, pushed at the same moment. The
    // puts are slow, so that each writer has looked before the other is done.
    let mut fresh = content;
    let number = u64::from(fresh[8]) + (u64::from(fresh[9]) << 8);
    assert_eq!(number % 256, 0, "a segment begins at a multiple of its size");
    fresh[8..16].copy_from_slice(&(0x50_u64 << 24).to_le_bytes());
    let fresh_name = "000000010000000000000050";
    let mut other = fresh.clone();
    other[200_000] ^= 1;
    let (one, two) = (data_directory(&scene, "one"), data_directory(&scene, "two"));
    for (data, content) in [(&one, &fresh), (&two, &other)] {
        let path = data.join("pg_wal").join(fresh_name);
        fs::write(&path, content).unwrap();
        give_to_server_user(&path);
    }
    faults.add(Fault::new(Effect::Delay(Duration::from_millis(1500))).on(Operation::PutObject));
    let path = format!("pg_wal/{fresh_name}");
    let arguments = ["wal-push", path.as_str()];
    let (first, second) =
        tokio::join!(run_in(&scene, &one, &arguments), run_in(&scene, &two, &arguments));
    let refused = [&first, &second].iter().filter(|it| it.stderr.contains("CONFLICT")).count();
    assert!(refused >= 1, "nobody noticed: {first}\n{second}");
    faults.clear();

    let bucket = scene.s3.as_ref().unwrap().bucket();
    let both = bucket.keys("v1/").into_iter().filter(|key| key.contains(fresh_name)).count();
    assert_eq!(both, 2, "one of the two contents is gone");
    let fetched = run_in(&scene, &data, &["wal-fetch", fresh_name, "fetched"]).await;
    fetched.assert_code(254);
    assert!(fetched.stderr.contains("2 contents"), "{fetched}");
}

/// Archiving goes on by itself after the store was away, and nothing is acknowledged meanwhile.
#[tokio::test]
async fn archiving_waits_for_the_store_and_loses_nothing() {
    if postgres_is_missing() {
        return;
    }
    let scene = Scene::with(Kind::S3, "").await;
    scene.archive_wal().await;
    let faults = scene.s3.as_ref().unwrap().faults();
    faults.add(Fault::new(Effect::Refuse(Refusal::InternalError)).on(Operation::PutObject));
    let name = scene.switch_wal().await;
    let failed = "SELECT coalesce(last_failed_wal, '') FROM pg_stat_archiver";
    eventually("the archiver has failed", LIMIT, async || scene.primary.psql(failed).await == name)
        .await;
    let ready = scene.primary.data_directory().join(format!("pg_wal/archive_status/{name}.ready"));
    assert!(ready.exists(), "the segment was acknowledged");
    faults.clear();
    eventually("the segment is archived", LIMIT, async || !ready.exists()).await;
    let bucket = scene.s3.as_ref().unwrap().bucket();
    assert!(bucket.keys("v1/").iter().any(|key| key.contains(&name)));
}

/// A lying store: it says 200 and keeps nothing, or only a part.
#[tokio::test]
async fn a_store_that_lies_is_not_believed() {
    if postgres_is_missing() {
        return;
    }
    let scene = Scene::with(Kind::S3, "").await;
    scene.archive_wal().await;
    scene.primary.psql("ALTER SYSTEM SET archive_command = 'false'; SELECT pg_reload_conf()").await;
    let name = scene.switch_wal().await;
    let faults = scene.s3.as_ref().unwrap().faults();
    let data = scene.primary.data_directory();
    let path = format!("pg_wal/{name}");
    for effect in [Effect::StoreNothing, Effect::StoreTruncated { bytes: 1000 }] {
        faults.add(Fault::new(effect).on(Operation::PutObject));
        let pushed = run_in(&scene, data, &["wal-push", &path]).await;
        pushed.assert_code(1);
        faults.clear();
    }
    // The truncated object is there under this very name. It is not taken for the segment.
    let again = run_in(&scene, data, &["wal-push", &path]).await;
    again.assert_code(1);
    assert!(again.stderr.contains(&name), "{again}");
    let fetched = run_in(&scene, data, &["wal-fetch", &name, "fetched"]).await;
    fetched.assert_code(254);
}

/// A promotion ends a timeline inside a segment; PostgreSQL archives that piece as `.partial`.
#[tokio::test]
async fn the_files_of_a_promotion_are_stored() {
    if postgres_is_missing() {
        return;
    }
    let mut scene = Scene::new().await;
    let standby = scene.primary.standby("standby1").await;
    scene.primary.psql("CREATE TABLE t AS SELECT 1 AS i").await;
    standby.catch_up(&scene.primary).await;
    scene.primary.stop(Mode::Immediate).await;
    standby.promote().await;
    standby.psql("INSERT INTO t VALUES (2)").await;
    eventually("history and partial are stored", LIMIT, async || {
        !stored(&scene, "history/00000002.history").is_empty()
            && !stored(&scene, ".partial-").is_empty()
    })
    .await;
    scene.configure(&[&standby]);
    scene.backup().await;
    let to = scene.restore("restored", &[]).await;
    let restored = PgServer::start_existing(&to).await;
    restored.recovered().await;
    assert_eq!(restored.psql("SELECT count(*) FROM t").await, "2");
}
