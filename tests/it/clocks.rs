//! Nothing goes because of its age while nobody can tell how old it is.

use std::fs;
use std::path::Path;
use std::time::{Duration, SystemTime};

use backup_agent::config::Config;
use backup_agent::repository::Repository;
use harness::postgres::postgres_is_missing;

use crate::scene::{Kind, Scene, files};

const LIMIT: Duration = Duration::from_mins(1);
const DAYS: Duration = Duration::from_hours(40 * 24);

/// A configuration that keeps one backup and marks the others.
fn rules(delete_after: &str) -> String {
    format!(
        "[retention]\ndaily = 1\nweekly = 0\nmonthly = 0\nwal = \"0s\"\n\
         delete_after = \"{delete_after}\"\n"
    )
}

/// The objects below such a folder.
fn below(repository: &Path, folder: &str) -> Vec<String> {
    let found = files(repository).into_iter().map(|path| path.display().to_string());
    found.filter(|path| path.contains(folder)).collect()
}

/// What is stored, but for what the archiver may still bring.
fn kept(scene: &Scene) -> Vec<String> {
    let folders = ["/base/", "/tombstone/", "/probe/"];
    folders.iter().flat_map(|folder| below(&scene.repository(), folder)).collect()
}

#[tokio::test]
async fn nothing_goes_while_the_clock_of_the_repository_says_something_else() {
    if postgres_is_missing() {
        return;
    }
    let scene = Scene::with(Kind::S3, &rules("0s")).await;
    scene.backup().await;
    scene.backup().await;
    let before = kept(&scene);
    let faults = scene.s3.as_ref().unwrap().faults();
    faults.clock_behind(DAYS);
    let refused = scene.run(&["expire", "--apply"]).await;
    refused.assert_code(1);
    assert!(refused.stderr.contains("the repository's says"), "{refused}");
    assert!(refused.stderr.contains("nothing goes by its age"), "{refused}");
    assert!(refused.stdout.contains("NOT DONE"), "{refused}");
    assert_eq!(kept(&scene), before);

    faults.clock_behind(Duration::ZERO);
    for _ in 0..2 {
        scene.run(&["expire", "--apply"]).await.assert_success();
    }
    assert_eq!(scene.list().await.len(), 1);
    assert!(kept(&scene).len() < before.len());
}

/// The service says it too, after each backup.
#[tokio::test]
async fn nothing_goes_while_the_primarys_clock_says_something_else() {
    if postgres_is_missing() {
        return;
    }
    let service = "[wal]\nreceive = false\n[backup]\nschedule = \"*/3 * * * * *\"\n";
    let scene = Scene::with(Kind::Directory, &format!("{}{service}", rules("0s"))).await;
    scene.backup().await;
    scene.backup().await;
    let before = kept(&scene);
    let clock = async |body: &str| {
        let function =
            "CREATE OR REPLACE FUNCTION pg_catalog.clock_timestamp() RETURNS timestamptz";
        scene.primary.psql(&format!("{function} {body}")).await;
    };
    clock("LANGUAGE sql AS 'SELECT now() - interval ''40 days'''").await;
    let refused = scene.run(&["expire", "--apply"]).await;
    refused.assert_code(1);
    assert!(refused.stderr.contains("the primary's says"), "{refused}");
    assert_eq!(kept(&scene), before);
    let mut running = scene.agent().spawn(&["run"]);
    running.logged("retention not applied", LIMIT).await;
    let finished = running.terminate().await;
    let log = finished.unexpected_log_lines(&[]);
    let said = log.iter().find(|line| line.contains("retention not applied")).unwrap();
    assert!(said.contains("ERROR") && said.contains("Set the one that is wrong"), "{said}");
    assert_eq!(below(&scene.repository(), "/tombstone/"), Vec::<String>::new());

    clock("LANGUAGE internal AS 'clock_timestamp'").await;
    scene.run(&["expire", "--apply"]).await.assert_success();
    assert_ne!(below(&scene.repository(), "/tombstone/"), Vec::<String>::new());
}

/// A `wal-push` was under way, and by a clock that was ahead its upload was nobody's.
#[tokio::test]
async fn an_upload_is_as_old_as_the_clock_of_the_repository_says() {
    if postgres_is_missing() {
        return;
    }
    let scene = Scene::with(Kind::S3, "").await;
    scene.backup().await;
    let s3 = scene.s3.as_ref().unwrap();
    let config: Config = toml::from_str(&fs::read_to_string(scene.config()).unwrap()).unwrap();
    let repository = Repository::open(&config).await.unwrap();
    let place = repository.places(0).await.unwrap().pop().unwrap();
    place.store().upload(&place.key("wal/under-way"), 5 << 20, None).await.unwrap();
    s3.faults().clock_behind(DAYS);
    for (ago, left) in [(Duration::ZERO, 1), (Duration::from_hours(25), 0)] {
        let uploads = s3.bucket().unfinished_uploads();
        assert_eq!(uploads.len(), 1);
        s3.bucket().set_upload_started(&uploads[0], SystemTime::now() - DAYS - ago);
        scene.backup().await;
        assert_eq!(s3.bucket().unfinished_uploads().len(), left, "{ago:?}");
    }
}

/// `tar`, `cp` and `rclone` may give a copy any times.
#[tokio::test]
async fn what_is_marked_is_as_old_as_its_mark_says_and_not_as_its_file() {
    if postgres_is_missing() {
        return;
    }
    let scene = Scene::with(Kind::Directory, &rules("1h")).await;
    scene.backup().await;
    scene.backup().await;
    scene.run(&["expire", "--apply"]).await.assert_success();
    assert_eq!(below(&scene.repository(), "/tombstone/").len(), 1);
    let before = kept(&scene);
    let long_ago = SystemTime::UNIX_EPOCH + Duration::from_hours(50 * 365 * 24);
    for file in files(&scene.repository()) {
        fs::File::open(file).unwrap().set_modified(long_ago).unwrap();
    }
    let applied = scene.run(&["expire", "--apply"]).await;
    applied.assert_success();
    assert!(applied.stdout.contains("is marked"), "{applied}");
    assert_eq!(kept(&scene), before);
}
