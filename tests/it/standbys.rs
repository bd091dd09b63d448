//! Standbys with `restore_command` while the repository is away: one that streams is promoted all the
//! same, one that has nothing else waits for it.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use harness::postgres::postgres_is_missing;
use harness::{Effect, Fault, Mode, Operation, PgServer, Refusal, eventually};
use rustix::process::{Pid, Signal, kill_process};
use tokio::time::{Instant, sleep, timeout};

use crate::receive::{LIMIT, RECEIVER, Receiving, commits, stored_up_to};
use crate::scene::{Kind, Scene};

const AWAY: Effect = Effect::Refuse(Refusal::ServiceUnavailable);
const WAITS: &str = "WAL is waited for";

pub(crate) fn restore_command(scene: &Scene) -> String {
    format!("{} wal-fetch %f %p", scene.agent().shell_command())
}

async fn timeline(server: &PgServer) -> String {
    server.psql("SELECT left(pg_walfile_name(pg_current_wal_lsn()), 8)").await
}

/// The history of a promoted server's parent is asked for after its signal file is gone: without an
/// answer it was down, and started as a primary on the old timeline.
#[tokio::test]
async fn a_streaming_standby_is_promoted_while_the_repository_is_away() {
    if postgres_is_missing() {
        return;
    }
    let mut scene = Scene::with(Kind::S3, "").await;
    let fetch = restore_command(&scene);
    scene.primary.psql("CREATE TABLE marks (i int); INSERT INTO marks VALUES (1)").await;
    let mut second = scene.primary.standby_with("second", &[("restore_command", &fetch)]).await;
    second.catch_up(&scene.primary).await;
    scene.s3.as_ref().unwrap().faults().add(Fault::new(AWAY));
    scene.primary.stop(Mode::Immediate).await;
    second.promote().await;
    assert_eq!(timeline(&second).await, "00000002", "{}", second.log());

    second.psql("INSERT INTO marks VALUES (2)").await;
    let third = second.standby("third").await;
    third.catch_up(&second).await;
    second.stop(Mode::Immediate).await;
    third.promote().await;
    assert_eq!(timeline(&third).await, "00000003", "{}", third.log());
    assert_eq!(commits(&third).await, "1,2");
    let history = third.data_directory().join("pg_wal/00000003.history");
    let history = fs::read_to_string(history).unwrap();
    let parents = history.lines().filter_map(|line| line.split_once('\t')).map(|(it, _)| it);
    assert_eq!(parents.collect::<Vec<_>>(), ["1", "2"], "{history}");
}

/// To a server that recovers, an exit code above 125 is the end, and it cannot be started again.
#[tokio::test]
async fn a_streaming_standby_lives_on_whatever_is_wrong_with_the_repository() {
    if postgres_is_missing() {
        return;
    }
    let mut scene = Scene::with(Kind::Directory, "").await;
    scene.primary.psql("CREATE TABLE marks (i int); INSERT INTO marks VALUES (1)").await;
    let fetch = [("restore_command", &*restore_command(&scene))];
    let mut standby = scene.primary.standby_with("second", &fetch).await;
    let (repository, away) = (scene.repository(), scene.path("away"));
    fs::rename(&repository, &away).unwrap();
    standby.restart().await;
    standby.catch_up(&scene.primary).await;
    says(&standby, "left to streaming", 1).await;

    fs::rename(&away, &repository).unwrap();
    fs::remove_file(scene.key()).unwrap();
    standby.restart().await;
    standby.catch_up(&scene.primary).await;

    fs::write(scene.config(), "garbage").unwrap();
    scene.primary.stop(Mode::Immediate).await;
    standby.promote().await;
    assert_eq!(timeline(&standby).await, "00000002", "{}", standby.log());
    assert_eq!(commits(&standby).await, "1");
}

/// A standby that gets its WAL from the repository alone, and whose repository has gone away with more.
async fn shipped() -> (Scene, PgServer) {
    let scene = Scene::with(Kind::S3, "").await;
    scene.primary.psql("CREATE TABLE marks (i int); INSERT INTO marks VALUES (1)").await;
    let standby = scene.primary.standby_with("shipped", &[("primary_conninfo", "")]).await;
    standby.set("restore_command", &restore_command(&scene)).await;
    scene.archive_wal().await;
    let replayed = async || commits(&standby).await == "1";
    eventually("the standby replays", LIMIT, replayed).await;
    scene.primary.psql("INSERT INTO marks VALUES (2)").await;
    let segment = scene.primary.psql("SELECT pg_walfile_name(pg_current_wal_lsn())").await;
    let away = Fault::new(AWAY).on(Operation::GetObject).key(&segment);
    scene.s3.as_ref().unwrap().faults().add(away);
    scene.archive_wal().await;
    says(&standby, WAITS, 1).await;
    (scene, standby)
}

async fn says(server: &PgServer, text: &str, times: usize) {
    let said = async || server.log().matches(text).count() >= times;
    eventually(&format!("the server's log says {text:?}"), LIMIT, said).await;
}

#[tokio::test]
async fn a_standby_that_has_only_the_repository_is_promoted_with_all_that_is_stored() {
    if postgres_is_missing() {
        return;
    }
    let (scene, mut standby) = shipped().await;
    // Waiting holds up neither its end nor its start.
    let began_at = Instant::now();
    standby.stop(Mode::Fast).await;
    standby.start().await;
    let took = began_at.elapsed();
    assert!(took < Duration::from_secs(40), "stopped and started in {took:?}");
    assert_eq!(commits(&standby).await, "1");
    says(&standby, WAITS, 2).await;

    standby.psql("SELECT pg_promote(false)").await;
    sleep(Duration::from_secs(8)).await;
    assert_eq!(standby.psql("SELECT pg_is_in_recovery()").await, "t", "{}", standby.log());
    scene.s3.as_ref().unwrap().faults().clear();
    standby.recovered().await;
    assert_eq!(commits(&standby).await, "1,2", "{}", standby.log());
}

#[tokio::test]
async fn who_takes_restore_command_away_promotes_without_the_repository() {
    if postgres_is_missing() {
        return;
    }
    let (_scene, standby) = shipped().await;
    standby.set("restore_command", "").await;
    says(&standby, "restore_command was taken away", 1).await;
    standby.promote().await;
    assert_eq!(commits(&standby).await, "1");
}

/// It ends its WAL before what is stored: that is said, and both ends can be restored.
#[tokio::test]
async fn a_standby_that_is_promoted_short_of_stored_wal_is_followed_and_the_loss_is_told() {
    if postgres_is_missing() {
        return;
    }
    let mut receiving = Receiving::start(Kind::Directory).await;
    receiving.primary().psql("CREATE TABLE marks (i int); INSERT INTO marks VALUES (1)").await;
    receiving.stored_all().await;
    let shipped = [("primary_conninfo", "")];
    let standby = receiving.primary().standby_with("shipped", &shipped).await;
    standby.set("restore_command", &restore_command(&receiving.scene)).await;
    let has_marks = "SELECT to_regclass('marks') IS NOT NULL";
    let replayed = async || standby.psql(has_marks).await == "t" && commits(&standby).await == "1";
    eventually("the standby replays", LIMIT, replayed).await;
    standby.set("restore_command", "").await;
    receiving.primary().psql("INSERT INTO marks VALUES (2); SELECT pg_switch_wal()").await;
    receiving.primary().psql("INSERT INTO marks VALUES (3)").await;
    receiving.stored_all().await;

    receiving.scene.configure(&[&receiving.scene.primary, &standby]);
    receiving.scene.primary.stop(Mode::Immediate).await;
    standby.promote().await;
    receiving.restart_agent().await;
    receiving.agent.logged("the new primary lacks WAL that is stored", LIMIT).await;
    standby.psql("INSERT INTO marks VALUES (4)").await;
    stored_up_to(&standby, standby.current_lsn().await).await;
    assert_eq!(commits(&receiving.recover("latest").await).await, "1,4");
    let arguments = ["--target-timeline", "1", "--target-action", "promote"];
    let old = receiving.scene.restore("old", &arguments).await;
    let old = PgServer::start_existing(&old).await;
    old.recovered().await;
    assert_eq!(commits(&old).await, "1,2,3");
}

/// The processes that fetch WAL in a data directory.
fn fetching(data: &Path) -> Vec<PathBuf> {
    let processes = fs::read_dir("/proc").unwrap().flatten().map(|process| process.path());
    let fetches = |path: &PathBuf| {
        let line = fs::read(path.join("cmdline")).unwrap_or_default();
        let mut words = line.split(|byte| *byte == 0);
        words.any(|word| word == b"wal-fetch")
            && fs::read_link(path.join("cwd")).is_ok_and(|cwd| cwd == data)
    };
    processes.filter(fetches).collect()
}

#[tokio::test]
async fn waiting_ends_with_the_server() {
    if postgres_is_missing() {
        return;
    }
    let (_scene, standby) = shipped().await;
    let data = standby.data_directory();
    assert!(!fetching(data).is_empty());
    let lines = fs::read_to_string(data.join("postmaster.pid")).unwrap();
    let server = Pid::from_raw(lines.lines().next().unwrap().parse().unwrap()).unwrap();
    kill_process(server, Signal::KILL).unwrap();
    let ended = async || fetching(data).is_empty();
    eventually("nothing waits any more", Duration::from_secs(10), ended).await;
}

async fn wait_for_the_repository(receiving: &Receiving) {
    let names = format!("ANY 1 ({RECEIVER})");
    receiving.primary().set("synchronous_standby_names", &names).await;
    let ask = "SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'quorum'";
    let waits = async || receiving.primary().psql(ask).await == "1";
    eventually("commits wait for the repository", LIMIT, waits).await;
}

#[tokio::test]
async fn commits_wait_for_moments_when_the_primary_is_restarted() {
    if postgres_is_missing() {
        return;
    }
    let mut receiving = Receiving::start(Kind::S3).await;
    receiving.primary().psql("CREATE TABLE marks (i int)").await;
    wait_for_the_repository(&receiving).await;
    receiving.scene.primary.restart().await;
    let began_at = Instant::now();
    receiving.primary().psql("INSERT INTO marks VALUES (1)").await;
    let took = began_at.elapsed();
    println!("the first commit after a restart waited for {took:?}");
    assert!(took < Duration::from_secs(6), "a commit waited for {took:?}");
    receiving.agent.logged("the server is shutting down", LIMIT).await;
    let log = receiving.agent.stdout();
    assert!(!log.contains("unexpected answer"), "{log}");
}

#[tokio::test]
async fn that_no_primary_is_there_is_in_the_log() {
    if postgres_is_missing() {
        return;
    }
    let mut receiving = Receiving::start(Kind::S3).await;
    receiving.scene.primary.stop(Mode::Fast).await;
    receiving.agent.logged("WAL is not being received. Start the primary", LIMIT).await;
    receiving.scene.primary.start().await;
    receiving.agent.logged("a primary is there again", LIMIT).await;
    let log = receiving.agent.stdout();
    assert_eq!(log.matches("WAL is not being received").count(), 1, "{log}");
}

#[tokio::test]
async fn remote_write_waits_for_the_repository() {
    if postgres_is_missing() {
        return;
    }
    let receiving = Receiving::start(Kind::S3).await;
    receiving.primary().psql("CREATE TABLE marks (i int)").await;
    wait_for_the_repository(&receiving).await;
    let faults = receiving.scene.s3.as_ref().unwrap().faults();
    faults.add(Fault::new(Effect::Stall).on(Operation::PutObject));
    let insert = "SET synchronous_commit = remote_write; INSERT INTO marks VALUES (1)";
    let commit = timeout(Duration::from_secs(4), receiving.primary().psql(insert));
    assert!(commit.await.is_err(), "it was acknowledged before it was stored");
    faults.clear();
    receiving.primary().psql("INSERT INTO marks VALUES (2)").await;
}
