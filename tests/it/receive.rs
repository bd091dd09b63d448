//! WAL is received as it is written: what was stored when everything is lost comes back.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use backup_agent::replication::Replication;
use backup_agent::slots;
use harness::postgres::postgres_is_missing;
use harness::{
    Effect, EtcdCluster, Fault, Finished, Mode, Operation, PgServer, Refusal, RunningAgent,
    etcd_is_missing, eventually,
};
use serde_json::{Value, json};
use shared::pg::settings::Tls;
use shared::pg::{Node, Settings, connect};
use tokio::time::Instant;
use tokio_postgres::types::PgLsn;

use crate::outage::admin_address;
use crate::replicas::section;
use crate::scene::{Kind, Scene, files, write};

pub(crate) const LIMIT: Duration = Duration::from_mins(1);
/// Ships often and beats often, so that tests are short.
pub(crate) const WAL: &str = "[wal]\nship_interval = \"200ms\"\nheartbeat = \"1s\"\n";
/// The receiver's connection, as a standby of the primary.
pub(crate) const RECEIVER: &str = "pgmesh_backup";

/// A primary whose WAL is received only, with a running agent and a backup.
pub(crate) struct Receiving {
    pub(crate) scene: Scene,
    pub(crate) agent: RunningAgent,
}

impl Receiving {
    pub(crate) async fn start(kind: Kind) -> Self {
        Self::with(kind, WAL).await
    }

    pub(crate) async fn with(kind: Kind, wal: &str) -> Self {
        Self::of(Scene::streaming(kind, wal).await).await
    }

    async fn of(scene: Scene) -> Self {
        let agent = scene.agent().spawn(&["run"]);
        let receiving = Self { scene, agent };
        receiving.stored_all().await;
        receiving.scene.backup().await;
        receiving
    }

    /// With a standby that may be promoted.
    pub(crate) async fn with_standby(kind: Kind, wal: &str) -> (Self, PgServer) {
        let scene = Scene::streaming(kind, wal).await;
        let standby = scene.primary.standby("standby1").await;
        scene.configure(&[&scene.primary, &standby]);
        let agent = scene.agent().spawn(&["run"]);
        let receiving = Self { scene, agent };
        receiving.stored_all().await;
        receiving.scene.backup().await;
        (receiving, standby)
    }

    pub(crate) fn primary(&self) -> &PgServer {
        &self.scene.primary
    }

    /// Waits until everything that the primary has written by now is reported as stored.
    pub(crate) async fn stored_all(&self) {
        stored_up_to(self.primary(), self.primary().current_lsn().await).await;
    }

    pub(crate) async fn restart_agent(&mut self) {
        let fresh = self.scene.agent().spawn(&["run"]);
        std::mem::replace(&mut self.agent, fresh).kill9().await;
    }

    /// Restores to the end of the WAL and starts what comes of it.
    pub(crate) async fn recover(&self, name: &str) -> PgServer {
        let to = self.scene.restore(name, &["--target-action", "promote"]).await;
        let restored = PgServer::start_existing(&to).await;
        restored.recovered().await;
        restored
    }
}

/// What the primary was told is safe.
pub(crate) async fn reported(primary: &PgServer) -> Option<PgLsn> {
    let ask =
        format!("SELECT flush_lsn FROM pg_stat_replication WHERE application_name = '{RECEIVER}'");
    primary.psql(&ask).await.parse().ok()
}

pub(crate) async fn stored_up_to(primary: &PgServer, lsn: PgLsn) {
    eventually("the WAL is stored", LIMIT, async || reported(primary).await >= Some(lsn)).await;
}

/// Objects of the repository whose path contains `part`.
pub(crate) fn objects(scene: &Scene, part: &str) -> Vec<PathBuf> {
    let all = files(&scene.repository());
    all.into_iter().filter(|path| path.display().to_string().contains(part)).collect()
}

pub(crate) async fn load(primary: &PgServer, rows: u32) {
    primary
        .psql(&format!(
            "CREATE TABLE IF NOT EXISTS load (i int, text text); INSERT INTO load \
             SELECT i, repeat(md5(i::text), 8) FROM generate_series(1, {rows}) AS i"
        ))
        .await;
}

pub(crate) async fn commits(server: &PgServer) -> String {
    server.psql("SELECT string_agg(i::text, ',' ORDER BY i) FROM marks").await
}

/// A growing segment is in the repository within moments; complete ones replace their pieces.
async fn a_commit_is_in_the_repository_within_moments(kind: Kind) {
    let receiving = Receiving::start(kind).await;
    let primary = receiving.primary();
    primary.psql("CREATE TABLE marks (i int)").await;
    for i in 1..=5 {
        primary.psql(&format!("INSERT INTO marks VALUES ({i})")).await;
        receiving.stored_all().await;
    }
    assert!(!objects(&receiving.scene, "/partial/").is_empty(), "no piece of a growing segment");
    load(primary, 200_000).await;
    primary.psql("INSERT INTO marks VALUES (6)").await;
    receiving.stored_all().await;
    let written = primary.psql("SELECT pg_walfile_name(pg_current_wal_lsn())").await;
    let complete = objects(&receiving.scene, "/wal/");
    assert!(complete.len() > 3, "{complete:?}");
    eventually("pieces of complete segments are removed", LIMIT, async || {
        let pieces = objects(&receiving.scene, "/partial/");
        pieces.iter().all(|path| *path.file_name().unwrap().to_string_lossy() >= *written)
    })
    .await;
    assert_eq!(primary.psql("SELECT count(*) FROM pg_replication_slots").await, "1");

    let Receiving { scene, agent } = receiving;
    agent.kill9().await;
    scene.primary.psql("INSERT INTO marks VALUES (7)").await;
    let receiving = Receiving { agent: scene.agent().spawn(&["list"]), scene };
    let restored = receiving.recover("restored").await;
    assert_eq!(commits(&restored).await, "1,2,3,4,5,6");
    assert_eq!(restored.psql("SELECT count(*) FROM load").await, "200000");
}

/// An agent that is frozen while much is under way: the server must not wait for its socket, least of
/// all a checkpoint that is to give its slot up.
#[tokio::test]
async fn a_frozen_agent_does_not_hold_up_the_checkpoints_of_its_server() {
    if postgres_is_missing() {
        return;
    }
    let settings = [("max_slot_wal_keep_size", "64MB"), ("wal_keep_size", "0")];
    let mut builder = PgServer::builder().name("a").tcp();
    for (name, value) in settings {
        builder = builder.setting(name, value);
    }
    let primary = builder.primary().await;
    let node = Node { group: 0, name: "a".into(), host: "127.0.0.1".into(), port: primary.port() };
    let settings = Settings {
        user: "postgres".to_owned(),
        password: None,
        database: "postgres".to_owned(),
        tls: Tls::Disable,
        allow_weak_auth: false,
        application_name: RECEIVER.to_owned(),
        connect_timeout: Duration::from_secs(5),
        statement_timeout: Duration::from_secs(5),
        lock_timeout: Duration::from_secs(5),
        idle_session_timeout: Duration::ZERO,
    };
    let limit = Duration::from_secs(30);
    let shown = async |mut connection: Replication| {
        let mut shown = Vec::new();
        for name in ["idle", "interval", "count"] {
            shown.push(connection.show(&format!("tcp_keepalives_{name}")).await.unwrap());
        }
        shown.push(connection.show("tcp_user_timeout").await.unwrap());
        shown
    };
    let backup = Replication::connect_for_backup(&settings, &node, limit).await.unwrap();
    assert_eq!(shown(backup).await, ["30", "10", "3", "0"]);
    let receiver = Replication::connect(&settings, &node, limit).await.unwrap();
    assert_eq!(shown(receiver).await, ["30", "10", "3", "60000"]);

    // Nobody reads from this one, as of a frozen agent.
    primary.psql("SELECT pg_create_physical_replication_slot('frozen', true)").await;
    let restart = "SELECT restart_lsn FROM pg_replication_slots";
    let from: PgLsn = primary.psql(restart).await.parse().unwrap();
    let receiver = Replication::connect(&settings, &node, limit).await.unwrap();
    let frozen = receiver.start_replication("frozen", 1, from).await.unwrap();
    primary.psql("CREATE TABLE t AS SELECT generate_series(1, 3000000)").await;
    primary.psql("SELECT pg_switch_wal()").await;
    let began_at = Instant::now();
    primary.psql("CHECKPOINT").await;
    let took = began_at.elapsed();
    assert!(took < Duration::from_secs(90), "the checkpoint took {took:?}");
    let status = primary.psql("SELECT wal_status FROM pg_replication_slots").await;
    assert_eq!(status, "lost");
    drop(frozen);

    // Who takes over does not wait for that.
    primary.psql("SELECT pg_create_physical_replication_slot('taken', true)").await;
    let of_slot = "FROM pg_replication_slots WHERE slot_name = 'taken'";
    let from: PgLsn = primary.psql(&format!("SELECT restart_lsn {of_slot}")).await.parse().unwrap();
    let connection = connect(&settings, &node).await.unwrap();
    let other = Replication::connect(&settings, &node, limit).await.unwrap();
    let other = other.start_replication("taken", 1, from).await.unwrap();
    assert_eq!(slots::free(&connection, "taken").await.unwrap(), None, "it is no agent's");
    let user = slots::user(&connection, "taken").await.unwrap().unwrap();
    assert!(user.contains(RECEIVER), "{user}");
    drop(other);
    let is_free = async || primary.psql(&format!("SELECT active {of_slot}")).await == "f";
    eventually("the other is gone", limit, is_free).await;
    let settings = Settings { application_name: "taken".to_owned(), ..settings };
    let receiver = Replication::connect(&settings, &node, limit).await.unwrap();
    let taken = receiver.start_replication("taken", 1, from).await.unwrap();
    primary.psql("CREATE TABLE u AS SELECT generate_series(1, 700000)").await;
    let began_at = Instant::now();
    let ended = slots::free(&connection, "taken").await.unwrap().unwrap();
    assert!(ended.contains("taken"), "{ended}");
    let took = began_at.elapsed();
    assert!(took < Duration::from_secs(4), "it took {took:?}");
    let active = primary.psql(&format!("SELECT active {of_slot}")).await;
    assert_eq!(active, "f");
    drop(taken);
}

#[tokio::test]
async fn a_commit_is_in_a_directory_within_moments() {
    if !postgres_is_missing() {
        Box::pin(a_commit_is_in_the_repository_within_moments(Kind::Directory)).await;
    }
}

#[tokio::test]
async fn a_commit_is_on_s3_within_moments() {
    if !postgres_is_missing() {
        Box::pin(a_commit_is_in_the_repository_within_moments(Kind::S3)).await;
    }
}

/// Each commit that was answered is in the repository, whatever dies right after.
#[tokio::test]
async fn a_commit_that_waits_for_the_repository_is_never_lost() {
    if postgres_is_missing() {
        return;
    }
    let mut receiving = Receiving::start(Kind::S3).await;
    receiving.primary().psql("CREATE TABLE marks (i int)").await;
    receiving.primary().set("synchronous_standby_names", &format!("ANY 1 ({RECEIVER})")).await;
    for i in 1..=10 {
        // Waits for the receiver, which is gone for a moment after each restart.
        receiving.primary().psql(&format!("INSERT INTO marks VALUES ({i})")).await;
        receiving.restart_agent().await;
    }
    receiving.agent.logged("commits wait for the repository alone", LIMIT).await;
    receiving.primary().psql("INSERT INTO marks VALUES (11)").await;
    let Receiving { mut scene, agent } = receiving;
    scene.primary.stop(Mode::Immediate).await;
    agent.kill9().await;
    let receiving = Receiving { agent: scene.agent().spawn(&["list"]), scene };
    let restored = receiving.recover("restored").await;
    assert_eq!(commits(&restored).await, "1,2,3,4,5,6,7,8,9,10,11");
}

/// That commits wait is known when the stream begins: none of them waits for the next look at the
/// server, or until WAL would be shipped without haste.
#[tokio::test]
async fn commits_that_wait_are_stored_at_once_from_the_first_on() {
    if postgres_is_missing() {
        return;
    }
    let wal = "[wal]\nship_interval = \"8s\"\nheartbeat = \"0s\"\n";
    let mut receiving = Receiving::with(Kind::Directory, wal).await;
    receiving.primary().psql("CREATE TABLE marks (i int)").await;
    receiving.stored_all().await;
    receiving.primary().set("synchronous_standby_names", &format!("ANY 1 ({RECEIVER})")).await;
    for _ in 0..2 {
        receiving.restart_agent().await;
        eventually("the receiver is back", LIMIT, async || {
            reported(receiving.primary()).await.is_some()
        })
        .await;
        let began_at = Instant::now();
        receiving.primary().psql("INSERT INTO marks VALUES (1)").await;
        let took = began_at.elapsed();
        assert!(took < Duration::from_secs(5), "a commit waited {took:?}");
    }
}

/// The store fails for a while: nothing is lost, nothing is acknowledged, and it catches up.
#[tokio::test]
async fn wal_that_cannot_be_stored_is_kept_by_the_slot() {
    if postgres_is_missing() {
        return;
    }
    let receiving = Receiving::start(Kind::S3).await;
    let primary = receiving.primary();
    primary.psql("CREATE TABLE marks (i int); INSERT INTO marks VALUES (1)").await;
    receiving.stored_all().await;
    let faults = receiving.scene.s3.as_ref().unwrap().faults();
    faults.add(Fault::new(Effect::Refuse(Refusal::InternalError)).on(Operation::PutObject));
    let before = reported(primary).await;
    load(primary, 400_000).await;
    primary.psql("INSERT INTO marks VALUES (2)").await;
    let lsn = primary.current_lsn().await;
    eventually("the store refuses", LIMIT, async || {
        receiving.agent.stdout().contains("trying again")
            || receiving.agent.stdout().contains("WAL is not being received")
    })
    .await;
    let now = reported(primary).await;
    assert!(
        now.is_none() || now == before,
        "acknowledged without being stored: {before:?} {now:?}"
    );
    faults.clear();
    stored_up_to(primary, lsn).await;
    let restored = receiving.recover("restored").await;
    assert_eq!(commits(&restored).await, "1,2");
    assert_eq!(restored.psql("SELECT count(*) FROM load").await, "400000");
}

/// The repository's mount goes away, and an empty directory is there: nothing is acknowledged into it,
/// neither while the agent runs nor by one that begins there.
async fn nothing_is_received_into_an_empty_place(receiving: &mut Receiving) -> PathBuf {
    receiving.primary().psql("CREATE TABLE marks (i int); INSERT INTO marks VALUES (1)").await;
    receiving.stored_all().await;
    let (path, away) = (receiving.scene.repository(), receiving.scene.path("away"));
    fs::rename(&path, &away).unwrap();
    fs::create_dir(&path).unwrap();
    harness::program::give_to_server_user(&path);
    let before = receiving.primary().current_lsn().await;
    receiving.primary().psql("INSERT INTO marks VALUES (2); SELECT pg_switch_wal()").await;
    receiving.agent.logged("is it mounted?", LIMIT).await;
    receiving.agent.logged("holds no WAL, and WAL of ", LIMIT).await;
    receiving.restart_agent().await;
    receiving.primary().psql("INSERT INTO marks VALUES (3); SELECT pg_switch_wal()").await;
    receiving.agent.logged("backup-agent begin --group 0", LIMIT).await;
    let ask =
        format!("SELECT restart_lsn FROM pg_replication_slots WHERE slot_name = '{RECEIVER}'");
    let slot: PgLsn = receiving.primary().psql(&ask).await.parse().unwrap();
    assert!(slot <= before, "{slot} was given up, {before} is stored");
    assert_eq!(files(&path), Vec::<PathBuf>::new());
    away
}

#[tokio::test]
async fn nothing_is_received_into_a_place_that_is_not_mounted() {
    if postgres_is_missing() {
        return;
    }
    let mut receiving = Receiving::start(Kind::Directory).await;
    let away = nothing_is_received_into_an_empty_place(&mut receiving).await;
    let path = receiving.scene.repository();
    fs::remove_dir_all(&path).unwrap();
    fs::rename(&away, &path).unwrap();
    receiving.stored_all().await;
    assert_eq!(commits(&receiving.recover("restored").await).await, "1,2,3");
}

/// Patroni makes its permanent slots before the agent runs for the first time.
#[tokio::test]
async fn a_slot_that_another_made_is_used_and_a_new_repository_is_begun_when_it_is_said() {
    if postgres_is_missing() || etcd_is_missing() {
        return;
    }
    let etcd = EtcdCluster::start(1).await;
    let scene = Scene::streaming(Kind::Directory, &format!("{WAL}{}", section(&etcd))).await;
    let make = format!("SELECT pg_create_physical_replication_slot('{RECEIVER}', true)");
    scene.primary.psql(&make).await;
    let mut receiving = Receiving::of(scene).await;
    nothing_is_received_into_an_empty_place(&mut receiving).await;
    receiving.scene.run(&["begin"]).await.assert_success();
    receiving.stored_all().await;
    receiving.scene.backup().await;
    assert_eq!(commits(&receiving.recover("restored").await).await, "1,2,3");
}

/// A standby is promoted under load: the window goes on without a gap, and the old primary that
/// comes back is refused.
#[tokio::test]
async fn a_failover_leaves_one_window() {
    if postgres_is_missing() {
        return;
    }
    let (mut receiving, standby) = Receiving::with_standby(Kind::Directory, WAL).await;
    let slot =
        format!("SELECT restart_lsn FROM pg_replication_slots WHERE slot_name = '{RECEIVER}'");
    eventually("the standby has the slot", LIMIT, async || !standby.psql(&slot).await.is_empty())
        .await;
    receiving.primary().psql("CREATE TABLE marks (i int); INSERT INTO marks VALUES (1)").await;
    load(receiving.primary(), 200_000).await;
    receiving.stored_all().await;
    standby.catch_up(receiving.primary()).await;
    receiving.scene.primary.stop(Mode::Immediate).await;
    standby.promote().await;
    standby.psql("INSERT INTO marks VALUES (2)").await;
    load(&standby, 100_000).await;
    stored_up_to(&standby, standby.current_lsn().await).await;
    assert_eq!(objects(&receiving.scene, "00000002.history").len(), 1);

    // The old primary comes back and takes writes.
    receiving.scene.primary.start().await;
    receiving.primary().psql("INSERT INTO marks VALUES (99)").await;
    standby.psql("INSERT INTO marks VALUES (3)").await;
    stored_up_to(&standby, standby.current_lsn().await).await;
    assert_eq!(reported(receiving.primary()).await, None, "the old primary is followed too");
    // With the new one out of sight, it is still refused.
    receiving.scene.configure(&[&receiving.scene.primary]);
    receiving.restart_agent().await;
    receiving.agent.logged("an old primary that came back", LIMIT).await;
    let remove = receiving.scene.run(&["expire", "--timeline", "2", "--apply"]).await;
    remove.assert_code(1);
    assert!(remove.stderr.contains("nothing shows that it is a copy's"), "{remove}");

    let listed = receiving.scene.list().await;
    assert_eq!(listed[0]["window"]["timeline"], 2, "{listed:?}");
    let restored = receiving.recover("restored").await;
    assert_eq!(commits(&restored).await, "1,2,3");
}

/// The slot is lost: the gap is said and recorded, a new base backup is taken, and the list has two
/// windows.
#[tokio::test]
async fn a_lost_slot_is_a_gap_and_is_answered_with_a_backup() {
    if postgres_is_missing() {
        return;
    }
    let mut receiving = Receiving::start(Kind::Directory).await;
    receiving.primary().psql("CREATE TABLE marks (i int); INSERT INTO marks VALUES (1)").await;
    receiving.stored_all().await;
    let Receiving { scene, agent } = receiving;
    agent.kill9().await;
    scene.primary.set("max_slot_wal_keep_size", "1MB").await;
    scene.primary.set("max_wal_size", "32MB").await;
    scene.primary.set("wal_keep_size", "0").await;
    let lost =
        format!("SELECT wal_status FROM pg_replication_slots WHERE slot_name = '{RECEIVER}'");
    let deadline = Instant::now() + LIMIT;
    while scene.primary.psql(&lost).await != "lost" {
        assert!(Instant::now() < deadline, "the slot is not lost");
        load(&scene.primary, 100_000).await;
        scene.primary.psql("SELECT pg_switch_wal(); CHECKPOINT").await;
    }
    scene.primary.psql("INSERT INTO marks VALUES (2)").await;
    scene.primary.set("max_slot_wal_keep_size", "-1").await;
    receiving = Receiving { agent: scene.agent().spawn(&["run"]), scene };
    receiving.agent.logged("GAP: WAL was removed before it was stored", LIMIT).await;
    let lost = "the replication slot was lost";
    receiving.agent.logged(lost, LIMIT).await;
    eventually("a new backup is taken", LIMIT, async || receiving.scene.list().await.len() == 2)
        .await;
    let listed = receiving.scene.list().await;
    receiving.primary().psql("INSERT INTO marks VALUES (3)").await;
    receiving.stored_all().await;
    assert_ne!(listed[0]["window"], listed[1]["window"]);
    assert_eq!(objects(&receiving.scene, "/gap/").len(), 1);
    assert_eq!(receiving.agent.stdout().matches(lost).count(), 1, "it is said once");
    let restored = receiving.recover("restored").await;
    assert_eq!(commits(&restored).await, "1,2,3");
}

/// Another database cluster had the group's name, and the newest backup is of that.
#[tokio::test]
async fn what_is_shown_is_of_the_server_that_is_followed() {
    if postgres_is_missing() {
        return;
    }
    let mut receiving = Receiving::start(Kind::Directory).await;
    let address = admin_address(&receiving.scene);
    let other = PgServer::builder().name("other").primary().await;
    receiving.scene.configure(&[&other]);
    receiving.scene.run(&["begin"]).await.assert_success();
    receiving.restart_agent().await;
    stored_up_to(&other, other.current_lsn().await).await;
    for _ in 0..2 {
        receiving.scene.backup().await;
    }
    receiving.scene.configure(&[&receiving.scene.primary]);
    let text = fs::read_to_string(receiving.scene.config()).unwrap();
    write(&receiving.scene.config(), &text.replace("127.0.0.1:0", &address));
    receiving.restart_agent().await;
    receiving.agent.logged("`backup-agent begin --group 0`", LIMIT).await;
    receiving.scene.run(&["begin"]).await.assert_success();
    receiving.stored_all().await;
    let expected = "SELECT system_identifier FROM pg_control_system()";
    let expected = receiving.primary().psql(expected).await;
    let shown = async || -> Option<Value> {
        let status = reqwest::get(format!("http://{address}/status")).await.ok()?;
        let status: Value = serde_json::from_str(&status.text().await.ok()?).ok()?;
        Some(status["groups"]["0"]["state"]["repository"].clone())
    };
    eventually("its own backup is shown", 2 * LIMIT, async || {
        shown().await.is_some_and(|it| it["system_identifier"] == expected && it["backups"] == 1)
    })
    .await;
    let shown = shown().await.unwrap();
    assert_eq!((&shown["needs_backup"], &shown["gap_seen"]), (&json!(false), &json!(false)));
    assert!(shown["reachable_from"].is_string() && shown["reachable_until"].is_string(), "{shown}");
}

/// A server that writes another WAL than what is stored of it is refused.
#[tokio::test]
async fn a_primary_that_lost_wal_is_refused() {
    if postgres_is_missing() {
        return;
    }
    let receiving = Receiving::start(Kind::Directory).await;
    receiving.primary().psql("CREATE TABLE marks (i int)").await;
    let Receiving { mut scene, agent } = receiving;
    scene.primary.stop(Mode::Fast).await;
    let data = scene.primary.data_directory().to_owned();
    let copy = scene.path("earlier");
    let copied = std::process::Command::new("cp").args(["-a", "--"]).args([&data, &copy]).status();
    assert!(copied.unwrap().success());
    scene.primary.start().await;
    load(&scene.primary, 20_000).await;
    stored_up_to(&scene.primary, scene.primary.current_lsn().await).await;
    agent.kill9().await;
    scene.primary.stop(Mode::Immediate).await;
    fs::rename(&data, scene.path("later")).unwrap();
    fs::rename(&copy, &data).unwrap();
    scene.primary.start().await;
    let before = files(&scene.repository());
    let mut agent = scene.agent().spawn(&["run"]);
    agent.logged("it lost what was on its disk", LIMIT).await;
    assert_eq!(files(&scene.repository()), before);
    let ended: Finished = agent.terminate().await;
    ended.assert_success();
}
