//! `check` tries the whole chain, and the service answers Prometheus.

use std::time::Duration;

use harness::postgres::postgres_is_missing;
use harness::{Effect, Fault, Mode, Refusal, eventually};
use serde_json::Value;

use crate::scene::{Kind, Scene, write};

const LIMIT: Duration = Duration::from_mins(1);

async fn steps(scene: &Scene) -> (Option<i32>, Vec<Value>) {
    let finished = scene.run(&["check", "--json"]).await;
    (finished.code(), serde_json::from_str(&finished.stdout).unwrap_or_default())
}

fn failed(steps: &[Value]) -> Vec<&str> {
    let failed = steps.iter().filter(|step| step["outcome"] == "failed");
    failed.map(|step| step["step"].as_str().unwrap()).collect()
}

#[tokio::test]
async fn check_says_for_each_step_whether_it_works() {
    if postgres_is_missing() {
        return;
    }
    let mut scene = Scene::with(Kind::S3, "").await;
    scene.archive_wal().await;
    let (code, all) = steps(&scene).await;
    assert_eq!(code, Some(0), "{all:?}");
    assert!(all.len() >= 9, "{all:?}");

    let faults = scene.s3.as_ref().unwrap().faults();
    faults.add(Fault::new(Effect::Refuse(Refusal::AccessDenied)));
    let (code, all) = steps(&scene).await;
    assert_eq!(code, Some(1));
    assert!(failed(&all).contains(&"repository put"), "{all:?}");
    faults.clear();

    scene.primary.set("archive_command", "false").await;
    let name = scene.switch_wal().await;
    let query = "SELECT coalesce(last_failed_wal, '') FROM pg_stat_archiver";
    eventually("the archiver has failed", LIMIT, async || scene.primary.psql(query).await == name)
        .await;
    let (code, all) = steps(&scene).await;
    assert_eq!(code, Some(1));
    assert_eq!(failed(&all), ["group 0: archiving"], "{all:?}");

    scene.primary.stop(Mode::Fast).await;
    let (code, all) = steps(&scene).await;
    assert_eq!(code, Some(1));
    assert!(failed(&all).len() >= 2, "{all:?}");
}

/// `archive_command` may serve somebody else; what a receiver stores is safe all the same.
#[tokio::test]
async fn an_archiver_that_stores_elsewhere_is_none_of_our_business_while_wal_is_received() {
    if postgres_is_missing() {
        return;
    }
    let scene = Scene::new().await;
    scene.primary.set("archive_command", "true").await;
    let name = scene.switch_wal().await;
    let query = "SELECT coalesce(last_archived_wal, '') FROM pg_stat_archiver";
    let archived = async || scene.primary.psql(query).await == name;
    eventually("it is archived elsewhere", LIMIT, archived).await;
    let archiving = |all: &[Value]| {
        let step = all.iter().find(|step| step["step"] == "group 0: archiving");
        step.unwrap_or_else(|| panic!("{all:?}"))["outcome"].as_str().unwrap().to_owned()
    };
    let (code, all) = steps(&scene).await;
    assert_eq!((code, archiving(&all).as_str()), (Some(1), "failed"), "{all:?}");

    let mut running = scene.agent().spawn(&["run"]);
    running.logged("receiving WAL", LIMIT).await;
    let is_ok = async || {
        let (code, all) = steps(&scene).await;
        code == Some(0) && archiving(&all) == "ok"
    };
    eventually("it is well", LIMIT, is_ok).await;
    scene.primary.set("archive_command", "false").await;
    scene.switch_wal().await;
    let is_warned = async || {
        let (code, all) = steps(&scene).await;
        code == Some(0) && archiving(&all) == "warning"
    };
    eventually("pg_wal grows", LIMIT, is_warned).await;
    running.terminate().await.assert_success();
}

/// Takes a backup by the clock, and shows it.
#[tokio::test]
async fn the_service_takes_scheduled_backups_and_shows_them() {
    if postgres_is_missing() {
        return;
    }
    let scene = Scene::with(
        Kind::Directory,
        "[wal]\nreceive = false\n[backup]\nschedule = \"*/3 * * * * *\"\n",
    )
    .await;
    let text = std::fs::read_to_string(scene.config()).unwrap();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    write(&scene.config(), &text.replace("127.0.0.1:0", &address.to_string()));
    let mut running = scene.agent().spawn(&["run"]);
    running.logged("backup completed", LIMIT).await;
    let get = async |path: &str| -> (u16, String) {
        match reqwest::get(format!("http://{address}{path}")).await {
            Ok(response) => (response.status().as_u16(), response.text().await.unwrap()),
            Err(_) => (0, String::new()),
        }
    };
    assert_eq!(get("/livez").await.0, 200);
    eventually("the repository was read", LIMIT, async || get("/readyz").await.0 == 200).await;
    let (_, metrics) = get("/metrics").await;
    for line in [
        "# TYPE pgmesh_backup_runs counter",
        "pgmesh_backup_runs_total{cluster=\"tests\",group=\"0\",outcome=\"failed\"} 0",
        "# UNIT pgmesh_backup_last_size_bytes bytes",
        "# EOF",
    ] {
        assert!(metrics.lines().any(|it| it == line), "no {line:?} in:\n{metrics}");
    }
    let (_, status) = get("/status").await;
    let status: Value = serde_json::from_str(&status).unwrap();
    assert!(status["groups"]["0"]["state"]["last_run"]["backup_id"].is_string(), "{status}");
    let finished = running.terminate().await;
    finished.assert_success();
    assert_eq!(finished.unexpected_log_lines(&[]), Vec::<&str>::new());
}
