//! A standby takes over from its primary under load, without Patroni: in order and not. What was
//! acknowledged and stored, or is on the standby by its synchronous confirmation, is restored.

use std::process::Stdio;

use harness::postgres::postgres_is_missing;
use harness::{Mode, PgServer, eventually};
use tokio::process::Child;
use tokio_postgres::types::PgLsn;

use crate::failover::Written;
use crate::receive::{LIMIT, RECEIVER, Receiving, WAL, load, reported, stored_up_to};
use crate::scene::{Kind, Scene};
use crate::standbys::restore_command;

/// A primary and its standby, both with the slot, and an agent.
struct Pair {
    receiving: Receiving,
    standby: PgServer,
}

impl Pair {
    async fn start() -> Self {
        let scene = Scene::streaming(Kind::S3, WAL).await;
        let standby = scene.primary.standby("standby1").await;
        scene.configure(&[&scene.primary, &standby]);
        let agent = scene.agent().spawn(&["run"]);
        let receiving = Receiving { scene, agent };
        receiving.stored_all().await;
        receiving.primary().psql("CREATE TABLE marks (i int)").await;
        receiving.scene.backup().await;
        let slot =
            format!("SELECT count(*) FROM pg_replication_slots WHERE slot_name = '{RECEIVER}'");
        let has_slot = async || standby.psql(&slot).await == "1";
        eventually("the standby has the slot", LIMIT, has_slot).await;
        Self { receiving, standby }
    }

    fn primary(&self) -> &PgServer {
        self.receiving.primary()
    }

    /// pgbench's load on the primary, which ends with it.
    async fn pgbench(&self) -> Child {
        let primary = self.primary();
        primary.run("pgbench", &["--initialize", "--scale=2", "--quiet"]).await;
        let mut load = primary.program("pgbench");
        load.args(["--client=2", "--time=300"]).stdout(Stdio::null()).stderr(Stdio::null());
        load.kill_on_drop(true).spawn().unwrap()
    }

    /// Ends the primary while others write, without owning it.
    async fn stop(&self, mode: &str) {
        let data = self.primary().data_directory().display().to_string();
        self.primary().run("pg_ctl", &["stop", "--wait", "--mode", mode, "--pgdata", &data]).await;
    }

    /// Writes marks while `change` runs, and until there are some more after it.
    async fn while_writing(&self, written: &Written, change: impl Future<Output = ()>) {
        let connect = async |index: usize| {
            let server = [self.primary(), &self.standby][index];
            server.try_connect_as("postgres", "postgres").await
        };
        written.while_writing(connect, change).await;
    }

    /// One window over both timelines, and in it every mark that was acknowledged.
    async fn nothing_is_lost(&self, written: &Written) {
        let Self { receiving, standby } = self;
        stored_up_to(standby, standby.current_lsn().await).await;
        let listed = receiving.scene.list().await;
        assert_eq!(listed.len(), 1, "another backup was needed: {listed:?}");
        assert_eq!(listed[0]["window"]["timeline"], 2, "{listed:?}");
        receiving.scene.run(&["list", "--wal"]).await.assert_success();
        receiving.scene.run(&["verify", "--wal"]).await.assert_success();
        let restored = marks(&receiving.recover("latest").await).await;
        let acknowledged = written.acknowledged.take();
        let lost: Vec<_> = acknowledged.iter().filter(|(i, _)| !restored.contains(i)).collect();
        assert!(lost.is_empty(), "of {} commits {lost:?} are lost", acknowledged.len());
        assert_eq!(restored, marks(standby).await);
    }
}

async fn marks(server: &PgServer) -> Vec<i32> {
    let marks = server.psql("SELECT i FROM marks ORDER BY i").await;
    marks.lines().map(|line| line.parse().unwrap()).collect()
}

#[tokio::test]
async fn a_switchover_by_hand_under_load_leaves_one_window() {
    if postgres_is_missing() {
        return;
    }
    let pair = Pair::start().await;
    let mut load = pair.pgbench().await;
    let written = Written::default();
    let change = async {
        // It waits until the standby and the repository have all.
        pair.stop("fast").await;
        pair.standby.promote().await;
    };
    pair.while_writing(&written, change).await;
    load.wait().await.unwrap();
    pair.nothing_is_lost(&written).await;
}

#[tokio::test]
async fn a_failover_by_hand_to_a_synchronous_standby_under_load_loses_nothing() {
    if postgres_is_missing() {
        return;
    }
    let mut pair = Pair::start().await;
    pair.primary().set("synchronous_standby_names", "standby1").await;
    let is_synchronous = "SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'";
    let synchronous = async || pair.primary().psql(is_synchronous).await == "1";
    eventually("the standby is synchronous", LIMIT, synchronous).await;
    let mut load = pair.pgbench().await;
    let written = Written::default();
    let change = async {
        pair.stop("immediate").await;
        pair.standby.promote().await;
    };
    pair.while_writing(&written, change).await;
    load.wait().await.unwrap();
    pair.nothing_is_lost(&written).await;

    // The old primary comes back on its timeline, takes writes, and is not listened to.
    pair.receiving.scene.primary.wait_for_end().await;
    pair.receiving.scene.primary.start().await;
    pair.primary().set("synchronous_standby_names", "").await;
    load_and_diverge(&pair).await;
    assert_eq!(reported(pair.primary()).await, None, "the old primary is followed");
    // Nor with the new one out of sight.
    pair.receiving.scene.configure(&[&pair.receiving.scene.primary]);
    pair.receiving.restart_agent().await;
    pair.receiving.agent.logged("an old primary that came back", LIMIT).await;
    pair.receiving.scene.run(&["verify", "--wal"]).await.assert_success();
}

async fn load_and_diverge(pair: &Pair) {
    load(pair.primary(), 20_000).await;
    pair.standby.psql("INSERT INTO marks VALUES (-1)").await;
    stored_up_to(&pair.standby, pair.standby.current_lsn().await).await;
}

/// Commits wait for the repository and not for the standby, which may lack some of them when it is
/// promoted: then that is said, and they are on the old timeline.
#[tokio::test]
async fn a_failover_by_hand_keeps_every_commit_that_waited_for_the_repository() {
    if postgres_is_missing() {
        return;
    }
    let mut pair = Pair::start().await;
    let names = format!("ANY 1 ({RECEIVER})");
    pair.primary().set("synchronous_standby_names", &names).await;
    let mut load = pair.pgbench().await;
    let written = Written::default();
    let change = async {
        // Of these the standby has nothing.
        pair.standby.set("primary_conninfo", "host=/nowhere").await;
        let streams = "SELECT count(*) FROM pg_stat_wal_receiver";
        let cut_off = async || pair.standby.psql(streams).await == "0";
        eventually("the standby is cut off", LIMIT, cut_off).await;
        let before = written.acknowledged.borrow().len();
        let more = async || written.acknowledged.borrow().len() > before + 20;
        eventually("more marks are written", LIMIT, more).await;
        // Whatever the agent has not stored by now, it never will.
        pair.receiving.agent.sigstop();
        pair.stop("immediate").await;
        pair.standby.promote().await;
    };
    pair.while_writing(&written, change).await;
    load.wait().await.unwrap();
    pair.receiving.restart_agent().await;
    stored_up_to(&pair.standby, pair.standby.current_lsn().await).await;
    pair.receiving.agent.logged("the new primary lacks WAL that is stored", LIMIT).await;

    let latest = marks(&pair.receiving.recover("latest").await).await;
    assert_eq!(latest, marks(&pair.standby).await);
    let arguments = ["--target-timeline", "1", "--target-action", "promote"];
    let old = pair.receiving.scene.restore("old", &arguments).await;
    let old = PgServer::start_existing(&old).await;
    old.recovered().await;
    let old = marks(&old).await;
    let acknowledged: Vec<(i32, PgLsn)> = written.acknowledged.take();
    let kept = |i: &i32| latest.contains(i) || old.contains(i);
    let lost: Vec<_> = acknowledged.iter().filter(|(i, _)| !kept(i)).collect();
    assert!(lost.is_empty(), "of {} commits {lost:?} are lost", acknowledged.len());
    let left_behind = acknowledged.iter().filter(|(i, _)| !latest.contains(i)).count();
    assert!(left_behind > 0, "the standby lacked nothing: nothing is shown");
}

/// The repository has less of the growing segment than the standby, and `restore_command` is asked first.
#[tokio::test]
async fn a_standby_that_is_restarted_keeps_commits_that_it_alone_has_confirmed() {
    if postgres_is_missing() {
        return;
    }
    for mode in [Mode::Immediate, Mode::Fast] {
        let Pair { receiving, mut standby } = Pair::start().await;
        let Receiving { scene, agent } = receiving;
        scene.primary.set("synchronous_standby_names", "standby1").await;
        standby.set("restore_command", &restore_command(&scene)).await;
        scene.primary.psql("INSERT INTO marks VALUES (1)").await;
        agent.kill9().await;
        scene.primary.psql("INSERT INTO marks SELECT generate_series(2, 5000)").await;
        drop(scene.primary);
        standby.stop(mode).await;
        standby.start().await;
        standby.promote().await;
        assert_eq!(standby.psql("SELECT count(*) FROM marks").await, "5000", "{}", standby.log());
        let left = "left to the server's own, which begins with what is stored";
        assert!(standby.log().contains(left), "{}", standby.log());
    }
}
