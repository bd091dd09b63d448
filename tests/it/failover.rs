//! The primary changes while its WAL is received: by Patroni, in order and not, and by a promotion
//! that leaves behind what is stored.

use std::cell::{Cell, RefCell};
use std::fs;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use harness::postgres::postgres_is_missing;
use harness::{
    Agent, Finished, Mode, PatroniBuilder, PatroniCluster, PgServer, RunningAgent, eventually,
    patroni_is_missing,
};
use serde_json::Value;
use tempfile::TempDir;
use tokio::process::Child;
use tokio::time::timeout;
use tokio_postgres::Client;
use tokio_postgres::types::PgLsn;

use crate::receive::{Receiving, WAL, commits, load, objects, stored_up_to};
use crate::scene::{Kind, config_text, directory_repository, write};
use crate::wal_files::run_in;

/// A failover waits for the leader's key, 20 s, and for the promotion.
const LIMIT: Duration = Duration::from_mins(2);
const RECEIVER: &str = crate::receive::RECEIVER;

/// A Patroni cluster whose WAL an agent receives.
struct Mesh {
    cluster: PatroniCluster,
    directory: TempDir,
    agent: RunningAgent,
}

/// What a writer has done.
#[derive(Default)]
pub(crate) struct Written {
    /// Every mark that was acknowledged, and a position at or after its commit.
    pub(crate) acknowledged: RefCell<Vec<(i32, PgLsn)>>,
    stop: Cell<bool>,
}

impl Written {
    /// Commits one mark after the other on whichever of two servers takes it, and notes each that was
    /// acknowledged. `connect` connects to one of them.
    async fn write<E>(&self, connect: impl AsyncFn(usize) -> Result<Client, E>) {
        let mut i = 0;
        while !self.stop.get() {
            for index in 0..2 {
                let Ok(client) = connect(index).await else { continue };
                while !self.stop.get() {
                    i += 1;
                    let insert = "INSERT INTO marks VALUES ($1)";
                    let acknowledged = async {
                        client.execute(insert, &[&i]).await?;
                        client.query_one("SELECT pg_current_wal_flush_lsn()", &[]).await
                    };
                    // One that hangs is no worse than one that broke.
                    match timeout(Duration::from_secs(5), acknowledged).await {
                        Ok(Ok(row)) => self.acknowledged.borrow_mut().push((i, row.get(0))),
                        Ok(Err(_)) | Err(_) => break,
                    }
                }
            }
        }
    }

    /// Writes marks while `change` runs, and until there are some more after it.
    pub(crate) async fn while_writing<E>(
        &self,
        connect: impl AsyncFn(usize) -> Result<Client, E>,
        change: impl Future<Output = ()>,
    ) {
        let change = async {
            let count = || self.acknowledged.borrow().len();
            eventually("marks are written", LIMIT, async || count() > 50).await;
            change.await;
            let before = count();
            eventually("marks are written again", LIMIT, async || count() > before + 50).await;
            self.stop.set(true);
        };
        tokio::join!(self.write(connect), change);
    }
}

impl Mesh {
    async fn start() -> Self {
        Self::with(PatroniCluster::builder()).await
    }

    async fn with(builder: PatroniBuilder) -> Self {
        let builder = builder.slot(RECEIVER);
        let cluster = builder.parameter("wal_keep_size", "0").start(2).await;
        let directory = harness::directory();
        let key = directory.path().join("key");
        Agent::without_config().run(&["new-key", key.to_str().unwrap()]).await.assert_success();
        let scope = PatroniCluster::SCOPE;
        let endpoints = cluster.etcd.endpoints().join("\", \"");
        let extra =
            format!("{WAL}[etcd]\nendpoints = [\"{endpoints}\"]\n[patroni]\nscope = \"{scope}\"\n");
        let repository = directory_repository(directory.path());
        let config = directory.path().join("agent.toml");
        write(&config, &config_text(&key, &repository, &extra, &[]));
        let agent = Agent::new(&config).spawn(&["run"]);
        let mesh = Self { cluster, directory, agent };
        let leader = mesh.leader().await;
        leader.batch_execute("CREATE TABLE marks (i int)").await.unwrap();
        mesh.stored_all(&leader).await;
        mesh.run(&["backup"]).await.assert_success();
        mesh
    }

    async fn run(&self, arguments: &[&str]) -> Finished {
        Agent::new(&self.directory.path().join("agent.toml")).run(arguments).await
    }

    async fn leader(&self) -> Client {
        self.cluster.connect(self.cluster.leader().await).await
    }

    /// Waits until everything that a server has written by now is reported as stored.
    async fn stored_all(&self, leader: &Client) {
        let lsn: PgLsn =
            leader.query_one("SELECT pg_current_wal_flush_lsn()", &[]).await.unwrap().get(0);
        let stored = async || reported(leader).await.is_ok_and(|it| it >= Some(lsn));
        eventually("the WAL is stored", LIMIT, stored).await;
    }

    /// pgbench's load on a member; it ends when that does.
    fn pgbench(&self, index: usize, arguments: &[&str]) -> Child {
        let mut pgbench = harness::program::command("pgbench");
        pgbench
            .env("PGHOST", "127.0.0.1")
            .env("PGPORT", self.cluster.port(index).to_string())
            .env("PGUSER", "postgres")
            .env("PGDATABASE", "postgres")
            .args(arguments)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true);
        pgbench.spawn().unwrap()
    }

    /// Writes marks while `change` runs, and until there are some more after it.
    async fn while_writing(&self, written: &Written, change: impl Future<Output = ()>) {
        let connect = async |index| self.cluster.try_connect(index).await;
        written.while_writing(connect, change).await;
    }

    /// Checks that there is one window over all timelines, up to `timeline`.
    async fn is_one_window(&self, timeline: u32) {
        let listed = self.run(&["list", "--json"]).await;
        listed.assert_success();
        let listed: Vec<Value> = serde_json::from_str(&listed.stdout).unwrap();
        assert_eq!(listed.len(), 1, "another backup was needed: {listed:?}");
        assert_eq!(listed[0]["window"]["timeline"], timeline, "{listed:?}");
        self.run(&["list", "--wal"]).await.assert_success();
        self.run(&["verify", "--wal"]).await.assert_success();
    }

    /// The marks in a restore to the end of a timeline.
    async fn restored_marks(&self, timeline: &str) -> Vec<i32> {
        let to: PathBuf = self.directory.path().join(format!("restored-{timeline}"));
        let arguments = ["--target-timeline", timeline, "--target-action", "promote"];
        let mut all = vec!["restore", "--archive-mode", "off", "--to", to.to_str().unwrap()];
        all.extend(arguments);
        self.run(&all).await.assert_success();
        let restored = PgServer::start_existing(&to).await;
        restored.recovered().await;
        let marks = restored.psql("SELECT i FROM marks ORDER BY i").await;
        marks.lines().map(|line| line.parse().unwrap()).collect()
    }

    fn logged(&self, text: &str) -> bool {
        self.agent.stdout().contains(text)
    }
}

/// What a server was told is safe.
async fn reported(server: &Client) -> Result<Option<PgLsn>, tokio_postgres::Error> {
    let ask = "SELECT flush_lsn FROM pg_stat_replication WHERE application_name = $1";
    let rows = server.query(ask, &[&RECEIVER]).await?;
    Ok(rows.first().and_then(|row| row.get(0)))
}

async fn marks(server: &Client) -> Vec<i32> {
    let rows = server.query("SELECT i FROM marks ORDER BY i", &[]).await.unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

#[tokio::test]
async fn a_switchover_under_load_leaves_one_window() {
    if patroni_is_missing() {
        return;
    }
    let mut mesh = Mesh::start().await;
    let from = mesh.cluster.leader().await;
    let mut initialised = mesh.pgbench(from, &["--initialize", "--scale=2", "--quiet"]);
    assert!(initialised.wait().await.unwrap().success());
    let mut load = mesh.pgbench(from, &["--client=2", "--time=120"]);
    let written = Written::default();
    // The cluster is borrowed by the writer, and switched over by its own means.
    let order = serde_json::json!({
        "leader": mesh.cluster.name(from), "candidate": mesh.cluster.name(1 - from),
    });
    let url = format!("{}/switchover", mesh.cluster.rest_url(from));
    let change = async {
        let request = reqwest::Client::new().post(url).body(order.to_string());
        let answer = request.send().await.unwrap();
        assert!(answer.status().is_success(), "{answer:?}");
        let leads = async || mesh.cluster.leader().await == 1 - from;
        eventually("the candidate leads", LIMIT, leads).await;
    };
    mesh.while_writing(&written, change).await;
    load.start_kill().unwrap();
    load.wait().await.unwrap();
    mesh.cluster.settled().await;

    let leader = mesh.leader().await;
    mesh.stored_all(&leader).await;
    mesh.is_one_window(2).await;
    let acknowledged = written.acknowledged.take();
    let restored = mesh.restored_marks("latest").await;
    let lost: Vec<_> = acknowledged.iter().filter(|(i, _)| !restored.contains(i)).collect();
    assert!(lost.is_empty(), "of {} commits {lost:?} are lost", acknowledged.len());
    assert_eq!(restored, marks(&leader).await);
    let slots = "SELECT count(*) FROM pg_replication_slots WHERE slot_name = $1";
    for index in 0..2 {
        let member = mesh.cluster.connect(index).await;
        let count: i64 = member.query_one(slots, &[&RECEIVER]).await.unwrap().get(0);
        assert_eq!(count, 1, "slots of member {index}");
    }
}

#[tokio::test]
async fn a_failover_under_load_loses_nothing_that_was_stored() {
    if patroni_is_missing() {
        return;
    }
    let mut mesh = Mesh::start().await;
    let from = mesh.cluster.leader().await;
    let old = mesh.leader().await;
    let mut initialised = mesh.pgbench(from, &["--initialize", "--scale=2", "--quiet"]);
    assert!(initialised.wait().await.unwrap().success());
    let mut load = mesh.pgbench(from, &["--client=2", "--time=120"]);
    let written = Written::default();
    let stored = Cell::new(None);
    let before = async {
        // Some were reported as stored, with the load going on.
        let first = written.acknowledged.borrow()[0].1;
        let some = async || {
            stored.set(reported(&old).await.unwrap());
            stored.get() > Some(first)
        };
        eventually("marks are stored", LIMIT, some).await;
    };
    let writing = Written::default();
    mesh.while_writing(&written, before).await;
    mesh.cluster.kill9(from).await;
    load.wait().await.unwrap();
    let leads = async || mesh.cluster.leader().await == 1 - from;
    eventually("the other one leads", LIMIT, leads).await;
    mesh.while_writing(&writing, async {}).await;

    let leader = mesh.leader().await;
    mesh.stored_all(&leader).await;
    mesh.is_one_window(2).await;
    let restored = mesh.restored_marks("latest").await;
    assert_eq!(restored, marks(&leader).await);
    // What the new leader never had is on the old timeline alone, and that is said.
    let acknowledged = written.acknowledged.take();
    let stored = acknowledged.iter().filter(|(_, lsn)| Some(*lsn) <= stored.get());
    let lost: Vec<_> = stored.map(|(i, _)| *i).filter(|i| !restored.contains(i)).collect();
    if !lost.is_empty() {
        assert!(mesh.logged("the new primary lacks WAL that is stored"), "{lost:?}");
        let old_timeline = mesh.restored_marks("1").await;
        assert!(lost.iter().all(|i| old_timeline.contains(i)), "{lost:?}");
    }

    // The old leader comes back, and follows.
    mesh.cluster.start_member(from);
    mesh.cluster.settled().await;
    leader.batch_execute("INSERT INTO marks VALUES (-1)").await.unwrap();
    mesh.stored_all(&leader).await;
    assert_eq!(reported(&mesh.cluster.connect(from).await).await.unwrap(), None);
    mesh.is_one_window(2).await;
}

/// Commits wait for a synchronous standby, and the leader dies while they are written.
#[tokio::test]
async fn a_failover_to_a_synchronous_standby_under_load_loses_nothing() {
    if patroni_is_missing() {
        return;
    }
    let mut mesh = Mesh::with(PatroniCluster::builder().synchronous()).await;
    let from = mesh.cluster.leader().await;
    let written = Written::default();
    let change = async {
        // Only one that Patroni has noted as synchronous is promoted.
        let is_noted = async || {
            let cluster = mesh.cluster.get(from, "/cluster").await.unwrap_or_default();
            let members = cluster["members"].as_array().cloned().unwrap_or_default();
            members.iter().any(|member| member["role"] == "sync_standby")
        };
        eventually("commits wait for a standby", LIMIT, is_noted).await;
        let count = || written.acknowledged.borrow().len();
        let before = count();
        eventually("marks are written", LIMIT, async || count() > before + 50).await;
        mesh.cluster.kill9_at_once(from);
        let leads = async || mesh.cluster.leader().await == 1 - from;
        eventually("the other one leads", LIMIT, leads).await;
    };
    mesh.while_writing(&written, change).await;
    let leader = mesh.leader().await;
    mesh.stored_all(&leader).await;
    mesh.is_one_window(2).await;
    let restored = mesh.restored_marks("latest").await;
    let acknowledged = written.acknowledged.take();
    let lost: Vec<_> = acknowledged.iter().filter(|(i, _)| !restored.contains(i)).collect();
    assert!(lost.is_empty(), "of {} commits {lost:?} are lost", acknowledged.len());
    assert_eq!(restored, marks(&leader).await);
    mesh.cluster.kill9(from).await;
}

/// A standby that lacked WAL which is stored, promoted; the agent's configuration decides.
#[tokio::test]
async fn a_promotion_that_loses_what_is_stored_is_refused_or_followed() {
    if postgres_is_missing() {
        return;
    }
    let refuse = format!("{WAL}on_divergence = \"refuse\"\n");
    let (mut receiving, standby) = Receiving::with_standby(Kind::Directory, &refuse).await;
    receiving.primary().psql("CREATE TABLE marks (i int); INSERT INTO marks VALUES (1)").await;
    standby.catch_up(receiving.primary()).await;

    standby.set("primary_conninfo", "host=/nowhere").await;
    let streams = "SELECT count(*) FROM pg_stat_wal_receiver";
    eventually("the standby is cut off", LIMIT, async || standby.psql(streams).await == "0").await;
    receiving.primary().psql("INSERT INTO marks VALUES (2)").await;
    load(receiving.primary(), 100_000).await;
    receiving.primary().psql("INSERT INTO marks VALUES (3)").await;
    receiving.stored_all().await;
    receiving.scene.primary.stop(Mode::Immediate).await;
    standby.promote().await;
    standby.psql("INSERT INTO marks VALUES (4)").await;

    receiving.agent.logged("its history parts at", LIMIT).await;
    receiving.agent.logged("wal.on_divergence = \\\"follow\\\"", LIMIT).await;
    let stored = |part: &str| objects(&receiving.scene, part).len();
    let of_new = [stored("/wal/00000002"), stored("/partial/00000002"), stored("/history/")];
    assert_eq!(of_new, [0, 0, 0], "something of the new timeline is stored");
    assert_eq!(receiving.recover("refused").await.psql("SELECT max(i) FROM marks").await, "3");

    let config = receiving.scene.config();
    let text = fs::read_to_string(&config).unwrap().replace("\"refuse\"", "\"follow\"");
    write(&config, &text);
    let fresh = receiving.scene.agent().spawn(&["run"]);
    std::mem::replace(&mut receiving.agent, fresh).terminate().await.assert_success();
    receiving.agent.logged("the new primary lacks WAL that is stored", LIMIT).await;
    let said = receiving.agent.stdout();
    let said = said.lines().find(|line| line.contains("lacks WAL that is stored")).unwrap();
    let said: Value = serde_json::from_str(said).unwrap();
    let (from, until) = (lsn(&said["from_lsn"]), lsn(&said["until_lsn"]));
    assert_eq!(said["bytes"].as_u64().unwrap(), until - from, "{said}");
    assert!(until - from > 30_000_000, "{said}");
    standby.psql("INSERT INTO marks VALUES (5)").await;
    stored_up_to(&standby, standby.current_lsn().await).await;

    assert_eq!(commits(&receiving.recover("latest").await).await, "1,4,5");
    for timeline in ["1", "current"] {
        let arguments = ["--target-timeline", timeline, "--target-action", "promote"];
        let to = receiving.scene.restore(&format!("old-{timeline}"), &arguments).await;
        let restored = PgServer::start_existing(&to).await;
        restored.recovered().await;
        assert_eq!(commits(&restored).await, "1,2,3", "{timeline}");
        assert_eq!(restored.psql("SELECT count(*) FROM load").await, "100000", "{timeline}");
    }
}

/// The new primary's archiver is faster than the agent, which looks when its timeline is stored already.
#[tokio::test]
async fn a_promotion_that_loses_what_is_stored_is_refused_though_its_archiver_was_first() {
    if postgres_is_missing() {
        return;
    }
    let refuse = format!("{WAL}on_divergence = \"refuse\"\n");
    let (receiving, standby) = Receiving::with_standby(Kind::Directory, &refuse).await;
    receiving.primary().psql("CREATE TABLE marks (i int)").await;
    standby.catch_up(receiving.primary()).await;
    standby.set("primary_conninfo", "host=/nowhere").await;
    let streams = "SELECT count(*) FROM pg_stat_wal_receiver";
    eventually("the standby is cut off", LIMIT, async || standby.psql(streams).await == "0").await;
    receiving.primary().psql("INSERT INTO marks VALUES (2)").await;
    receiving.stored_all().await;
    let Receiving { mut scene, agent } = receiving;
    scene.primary.stop(Mode::Immediate).await;
    agent.kill9().await;

    standby.promote().await;
    let switched = standby.psql("SELECT pg_walfile_name(pg_switch_wal())").await;
    for file in ["00000002.history", &switched] {
        let push = ["wal-push", &format!("pg_wal/{file}")];
        run_in(&scene, standby.data_directory(), &push).await.assert_success();
    }
    let mut agent = scene.agent().spawn(&["run"]);
    agent.logged("its history parts at", LIMIT).await;
    assert_eq!(objects(&scene, "/partial/00000002").len(), 0);
    assert_eq!(objects(&scene, "/followed/").len(), 1, "timeline 1");
}

fn lsn(value: &Value) -> u64 {
    value.as_str().unwrap().parse::<PgLsn>().unwrap().into()
}
